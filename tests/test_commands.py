"""python -m timm_structdrop inspect and fit: what they print and write, and what they refuse."""

import argparse
import csv
import errno
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from script import load_script

import timm_structdrop.cli.inspect as inspect_command
import timm_structdrop.hub.export as export
from timm_structdrop.__main__ import main
from timm_structdrop.cli._images import load_subject
from timm_structdrop.cluster import adjusted_rand_index, rena
from timm_structdrop.data import create_dataset
from timm_structdrop.errors import UserError, run_command
from tools import package

DIGITS = ["--dataset", "digits", "--num-images", "24"]
NUMBERS = {"hopkins.json", "hopkins.csv"}
PICTURES = {"hopkins-histograms.png", "hopkins-map.png"}
OF_CLUSTERS = {"clusters.json", "clusters.csv", "labels.csv", "clusters.png", "mask.png"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A folder that `fit` made."""
    folder = tmp_path_factory.mktemp("fit") / "lenet"
    settings = ["--model-kwargs", "n_clusters=6", "--drop-block", "0.25"]
    main(["fit", "lenet5_dropcluster", *DIGITS, *settings, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A training's checkpoint with its settings; its clusters were fitted at epoch 12."""
    torch.manual_seed(1)
    settings = {"n_clusters": 4, "img_size": 24}
    model = timm.create_model("lenet5_dropcluster", **settings)
    model.act1.dropcluster.fit(torch.randn(4, 6, 20, 20), at=12)
    path = tmp_path_factory.mktemp("run") / "model_best.pth.tar"
    args = {"model": "lenet5_dropcluster", "dataset": "digits", "img_size": 24}
    args["model_kwargs"] = {"n_clusters": 4}
    content = {"state_dict": model.state_dict(), "arch": "lenet5_dropcluster", "args": args}
    torch.save(content, path)
    return path


def command_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    inspect_command.add_flags(parser)
    return parser.parse_args(argv[1:])


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def check_files(folder: Path) -> None:
    """Every picture decodes, all numbers parse."""
    for file in folder.iterdir():
        if file.suffix == ".png":
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L"))
            assert pixels.shape[0] > 100 and pixels.std() > 5, file
        elif file.suffix == ".json":
            json.loads(file.read_text())
        else:
            rows = list(csv.DictReader(file.read_text().splitlines()))
            assert rows and all(None not in row.values() for row in rows), file


def test_the_saved_folder_is_the_fitted_model(fitted, capsys):
    assert names(fitted) == {"config.json", "model.safetensors"}
    assert names(fitted.parent) == {"lenet"}
    modes = {file.stat().st_mode & 0o777 for file in fitted.iterdir()}
    assert len(modes) == 1
    loaded = timm.create_model(f"local-dir:{fitted}", pretrained=True).eval()
    layer = loaded.act1.dropcluster
    assert layer.is_fitted and layer.n_clusters == 6 and layer.target_drop_prob == 0.25
    again = timm.create_model(f"local-dir:{fitted}", pretrained=True).eval()
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), again(images))
    config = json.loads((fitted / "config.json").read_text())
    assert config["architecture"] == "lenet5_dropcluster"
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]


def test_fit_keeps_the_weights_and_finds_the_clusters_of_a_training_step(tmp_path):
    source = timm.create_model("resnet20_dropcluster", num_classes=10, in_chans=1, n_clusters=5)
    source.bn1.running_mean.normal_()
    torch.nn.init.normal_(source.bn1.bias)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pt")
    shape = ["--num-classes", "10", "--in-chans", "1", "--model-kwargs", "n_clusters=5"]
    weights = ["--checkpoint", str(tmp_path / "w.pt"), "--img-size", "24"]
    out = tmp_path / "out"
    argv = ["resnet20_dropcluster", *DIGITS, *shape, *weights, "--num-images", "2000"]
    main(["fit", *argv, "--output", str(out)])
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert loaded.act1.dropcluster.labels.shape == (16, 24, 24)
    state = loaded.state_dict()
    for key, value in source.state_dict().items():
        if "dropcluster" not in key:
            assert torch.equal(state[key], value), key
    images = digits(loaded, "train")
    assert len(images) == 1437  # all there are
    with torch.no_grad():
        raw = source.conv1(images)
        centred = raw - raw.mean((0, 2, 3), keepdim=True)
        normal = centred / (raw.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        found = rena(torch.relu(normal + source.bn1.bias[:, None, None]), 5)
    agreement = adjusted_rand_index(found.labels, loaded.act1.dropcluster.labels)
    # the order of the images changes the last bits of the sums
    assert agreement[found.structured].min() > 0.9
    assert torch.equal(found.structured, loaded.act1.dropcluster.structured)
    assert 0 < found.structured.sum() < 16


def digits(model, split: str) -> torch.Tensor:
    config = timm.data.resolve_data_config({}, model=model)  # as the saved folder says
    dataset = create_dataset("digits", split=split, input_img_mode="L")
    dataset.transform = timm.data.create_transform(**config)
    return torch.stack([image for image, _ in dataset])


def test_fit_of_a_timm_model_with_a_layer_attached(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    argv = ["resnet20", *DIGITS, "--img-size", "16", "--structdrop", "dropcluster:n_clusters=3"]
    main(["fit", *argv, "--output", str(out)])
    assert "act1   3         16" in capsys.readouterr().out
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert loaded.act1.dropcluster.is_fitted
    assert loaded.act1.dropcluster.labels.shape == (16, 16, 16)


def test_inspect_of_a_fitted_model(fitted, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    argv = ["inspect", f"local-dir:{fitted}", "--pretrained", *DIGITS, "--output", str(out)]
    main(argv)
    text = capsys.readouterr().out
    assert "DropCluster at act1: 6 clusters, " in text and "fitted at 0" in text
    assert "the learned clusters" in text and "layer2 is skipped: its 1x1 maps" in text
    assert names(out) == NUMBERS | PICTURES | OF_CLUSTERS | {"study.csv"}
    assert all(str(out / name) in text for name in names(out))
    check_files(out)
    assert text.startswith(f"local-dir:{fitted} (pretrained weights), 24 validation images")
    assert load_subject(command_args(argv)).name == "lenet5_dropcluster"  # for the titles
    clusters = json.loads((out / "clusters.json").read_text())
    model = timm.create_model(f"local-dir:{fitted}", pretrained=True)
    assert clusters["unstructured"] == int((~model.act1.dropcluster.structured).sum())
    assert clusters["study"]["n_images"] == clusters["num_images"] == 24
    rows = [
        row
        for row in csv.DictReader((out / "labels.csv").read_text().splitlines())
        if row["channel"] == "1"
    ]
    labels = torch.tensor([[int(v) for v in row["labels"].split()] for row in rows])
    assert torch.equal(labels, model.act1.dropcluster.labels[1].long())
    before = {name: (out / name).read_bytes() for name in names(out)}
    main(argv)
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_inspect_takes_the_settings_of_a_training(checkpoint, tmp_path, capsys):
    argv = ["inspect", "lenet5_dropcluster", "--checkpoint", str(checkpoint.parent)]
    main([*argv, "--num-images", "9", "--output", str(tmp_path / "a")])
    text = capsys.readouterr().out
    assert "9 validation images of digits (1x24x24)" in text and str(checkpoint) in text
    assert "4 clusters, 0 of 6 channels unstructured, fitted at 12" in text
    assert "need 10 images; got 9" in text and "study.csv" not in names(tmp_path / "a")
    with pytest.raises(UserError, match="must fit the model lenet5_dropcluster"):
        main([*argv, "--num-classes", "3", "--output", str(tmp_path / "b")])


def epsilons(model: torch.nn.Module) -> set[float]:
    return {norm.eps for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)}


def test_batch_norms_have_the_epsilon_of_the_training(tmp_path, capsys):
    """Everywhere a run's checkpoint is read, and in what is exported and packaged from it."""
    name, data = "efficientnet_b0_dropblock", ["--dataset", "digits", "--device", "cpu"]
    run, bn = tmp_path / "run", ["--bn-eps", "0.25", "--bn-momentum", "0.5"]
    size = ["--img-size", "32", "--in-chans", "1", "--num-classes", "10", "--workers", "0"]
    short = ["--epochs", "1", "--warmup-epochs", "0", "--train-fraction", "0.1"]
    where = ["--output", str(tmp_path), "--experiment", "run"]
    load_script("train").main(["--model", name, *data, *size, *short, *where, *bn])
    validate = load_script("validate")
    flags, checkpoint, decided = validate.parse_validate_flags(["--checkpoint", str(run)])
    assert decided["bn_eps"] == 0.25
    assert epsilons(validate.make_model(flags, checkpoint)) == {0.25}
    given = ["--checkpoint", str(run), "--bn-eps", "0.125"]
    flags, checkpoint, _ = validate.parse_validate_flags(given)
    assert epsilons(validate.make_model(flags, checkpoint)) == {0.125}

    assert epsilons(load_subject(command_args(["inspect", name, *given])).model) == {0.125}
    subject = load_subject(command_args(["inspect", name, *given[:2]]))
    assert epsilons(subject.model) == {0.25}

    attached = ["--structdrop", "dropcluster:n_clusters=4"]
    main(["fit", name, *given[:2], *attached, "--output", str(tmp_path / "fitted")])
    exported = timm.create_model(f"local-dir:{tmp_path / 'fitted'}", pretrained=True)
    assert epsilons(exported) == {0.25}
    norms = [norm for norm in exported.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.5}

    package.main([str(run), "--output", str(tmp_path / "packaged")])
    facts = json.loads((tmp_path / "packaged" / f"{name}.json").read_text())
    assert facts["model_args"] == {"bn_momentum": 0.5, "bn_eps": 0.25}


def test_inspect_of_an_unfitted_model_says_so(tmp_path, capsys):
    argv = ["inspect", "lenet5_dropcluster", *DIGITS, "--split", "train", "--num-samples", "1"]
    main([*argv, "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert "fitted here, on these images" in text and "random weights" in text
    assert "the learned clusters" not in text
    assert names(tmp_path) == NUMBERS | PICTURES | OF_CLUSTERS
    clusters = json.loads((tmp_path / "clusters.json").read_text())
    assert clusters["fitted_here"] and "study" not in clusters and clusters["split"] == "train"


def test_inspect_of_any_cnn_says_where_dropcluster_should_go(tmp_path, capsys):
    argv = ["inspect", "test_resnet", *DIGITS, "--img-size", "32", "--layers", "convs"]
    main([*argv, "--threshold", "0.1", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert names(tmp_path) == NUMBERS | PICTURES
    check_files(tmp_path)
    best = json.loads((tmp_path / "hopkins.json").read_text())["recommended"]
    assert f'attach(model, "dropcluster", modules=["{best}"]) puts DropCluster there' in text
    main([*argv, "--threshold", "1", "--output", str(tmp_path / "none")])
    assert "No layer of 15 or more pixels is structured" in capsys.readouterr().out
    assert names(tmp_path / "none") == NUMBERS | {"hopkins-histograms.png"}


def test_several_layers_have_files_of_their_own(tmp_path, capsys):
    argv = ["inspect", "resnet20", *DIGITS, "--img-size", "24", "--batch-size", "10"]
    argv += ["--structdrop", "dropcluster:modules=['act1','layer2'],n_clusters=4"]
    main([*argv, "--output", str(tmp_path)])
    expected = {
        name.replace(".", f"-{layer}.") for name in OF_CLUSTERS for layer in ("act1", "layer2")
    }
    maps = {"hopkins-map-act1.png", "hopkins-map-layer2.png", "hopkins-histograms.png"}
    assert names(tmp_path) == expected | maps | NUMBERS


def test_numbers_are_written_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"timm-structdrop\[plot\].*; the numbers are in"):
        main(["inspect", "lenet5_dropcluster", *DIGITS, "--output", str(tmp_path)])
    assert names(tmp_path) == NUMBERS | {n for n in OF_CLUSTERS if not n.endswith("png")}


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(model, folder, **settings):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_for_hf", half)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        main(["fit", "lenet5_dropcluster", *DIGITS, "--output", str(tmp_path / "out")])
    assert names(tmp_path) == set()


def test_list_names_a_variant_its_place_and_its_pretrained_tags(capsys):
    main(["list", "resnet18_drop*"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["variant", "where", "params", "rate", "pretrained"]
    assert max(map(len, lines)) <= 130
    (row,) = [line for line in lines if line.startswith("resnet18_dropcluster ")]
    assert "stem convolution" in row and row.endswith("a1_in1k and 6 more")
    main(["list", "resnet18_dropcluster"])
    assert "a1_in1k a2_in1k a3_in1k" in capsys.readouterr().out
    main(["list", "--layers", "lenet5_dropcluster"])
    assert "act1.dropcluster  dropcluster  0.1 " in capsys.readouterr().out


BAD = {
    "unknown model": (["lenet5_dropclster"], "unknown model 'lenet5_dropclster' (nearest: lenet5"),
    "no checkpoint": (
        ["lenet5", "--checkpoint", "none.pt"],
        "existing file or folder; got none.pt",
    ),
    "two weights": (["lenet5", "--checkpoint", "x", "--pretrained"], "got both"),
    "no data set": (["lenet5"], "--data-dir must name a folder of images, or --dataset"),
    "unknown data": (
        ["lenet5", "--dataset", "digitz"],
        "unknown dataset 'digitz' (nearest: digits",
    ),
    "no folder": (["lenet5", "--data-dir", "nowhere"], "data folder must exist; got nowhere"),
    "no split": (["lenet5", *DIGITS, "--split", "x"], "unknown split 'x'"),
    "no images": (
        ["lenet5", *DIGITS, "--num-images", "0"],
        "--num-images must be at least 1; got 0",
    ),
    "too small": (
        ["lenet5_dropcluster", *DIGITS, "--img-size", "3"],
        "lenet5_dropcluster does not",
    ),
    "one pixel": (
        ["resnet18_dropcluster", *DIGITS, "--img-size", "2"],
        "n_clusters must be in [2,",
    ),
    "clusters": (["lenet5_dropcluster", *DIGITS, "--model-kwargs", "n_clusters=999"], "got 999"),
    "setting": (["lenet5_dropcluster", *DIGITS, "--model-kwargs", "n_cluster=3"], "n_cluster"),
    "device": (
        ["lenet5", *DIGITS, "--device", "abacus"],
        "must be one that torch knows; got 'abacus'",
    ),
    "gpu": (
        ["lenet5", *DIGITS, "--device", "cuda:99"],
        "--device must be available; got 'cuda:99'",
    ),
}
BAD_INSPECT = {
    "maps": (["resnet18", *DIGITS, "--img-size", "4"], "maps must be at least 3x3"),
    "no cnn": (["resmlp_12_224", *DIGITS, "--structdrop", "x"], "must be one of"),
    "threshold": (["lenet5", *DIGITS, "--threshold", "7"], "--threshold must be in [0, 1]; got 7"),
    "batch": (["lenet5", *DIGITS, "--batch-size", "0"], "--batch-size must be at least 1; got 0"),
    "samples": (["lenet5", *DIGITS, "--num-samples", "-1"], "--num-samples must be at least 1"),
}
BAD_FIT = {
    "no layer": (["lenet5", *DIGITS], "must have a DropCluster layer; lenet5 has none (nearest: l"),
    "other layer": (["resnet20_dropblock", *DIGITS], "resnet20_dropblock has none"),
}


def fails(capsys, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(partial(main, argv))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


@pytest.mark.parametrize("command", ["inspect", "fit"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(command, case, tmp_path, capsys):
    argv, message = BAD[case]
    fails(capsys, [command, *argv, "--output", str(tmp_path / "out")], message)
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == set()


@pytest.mark.parametrize("case", BAD_INSPECT)
def test_bad_input_of_inspect(case, tmp_path, capsys):
    argv, message = BAD_INSPECT[case]
    fails(capsys, ["inspect", *argv, "--output", str(tmp_path)], message)


@pytest.mark.parametrize("case", BAD_FIT)
def test_bad_input_of_fit(case, tmp_path, capsys):
    argv, message = BAD_FIT[case]
    fails(capsys, ["fit", *argv, "--output", str(tmp_path / "out")], message)
    assert names(tmp_path) == set()


def test_dead_and_broken_activations_cannot_be_fitted(tmp_path, capsys):
    for value, message in ((-1.0, "none of the 6 channels has structure"), (torch.nan, "NaN")):
        model = timm.create_model("lenet5_dropcluster")
        torch.nn.init.zeros_(model.conv1.weight)
        torch.nn.init.constant_(model.conv1.bias, value)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        argv = ["lenet5_dropcluster", *DIGITS, "--checkpoint", str(tmp_path / "w.pt")]
        fails(capsys, ["fit", *argv, "--output", str(tmp_path / "out")], message)
        assert names(tmp_path) == {"w.pt"}


def test_bad_output(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    model = ["lenet5_dropcluster", *DIGITS, "--output"]
    fails(capsys, ["inspect", *model, str(file)], f"must be a folder; {file} is a file")
    fails(capsys, ["inspect", *model, str(file / "x")], f"must be a folder; {file} is a file")
    fails(capsys, ["fit", *model, str(file)], f"must be a new or empty folder; got {file}")
    fails(capsys, ["fit", *model, str(file / "x")], f"must be a folder; {file} is a file")
    fails(capsys, ["fit", *model, str(tmp_path)], f"must be a new or empty folder; got {tmp_path}")
    assert file.read_text() == "mine" and names(tmp_path) == {"file"}
    monkeypatch.setattr("os.access", lambda *_: False)
    for command in ("inspect", "fit"):
        argv = [command, *model, str(tmp_path / "out")]
        fails(capsys, argv, "must be a writable folder")
