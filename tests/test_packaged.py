"""The checkpoints inside the package: their accuracy, what comes along, how they are made."""

import fnmatch
import hashlib
import json
import shlex
import socket
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from script import load_script
from timm.data import create_transform, resolve_model_data_config
from timm.models import is_model_pretrained, save_for_hf

from timm_structdrop.data import DigitsDataset
from timm_structdrop.errors import UserError
from timm_structdrop.hub.card import TEMPLATE
from timm_structdrop.layers import DropCluster2d
from timm_structdrop.models.packaged import FOLDER, packaged
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.recipes import parse_with_sources, tag_settings, train_parser
from timm_structdrop.recipes.command_line import training_command
from timm_structdrop.recipes.tag_settings import with_tag_settings
from tools.package import circumstances, main, write_weights

PUBLISHED = {
    "lenet5_dropcluster",
    "resnet20_camdrop",
    "resnet20_dropblock",
    "resnet20_dropcluster",
    "resnet20_rblock",
    "resnet110_camdrop",
}
NAMES = sorted(packaged())
MOST_BYTES = 8_000_000
ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network must not be needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def correct_digits(model: torch.nn.Module, mode: str = "L") -> int:
    """How many of the 360 held-out digits a model gets right, fed as a card shows it."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    digits = DigitsDataset(is_train=False, input_img_mode=mode, transform=transform)
    images = torch.stack([digits[index][0] for index in range(len(digits))])
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(1) for batch in images.split(90)])
    return int((answers == torch.tensor(digits.targets)).sum())


def test_what_is_published_is_there():
    assert set(NAMES) == PUBLISHED
    for name in NAMES:
        assert is_model_pretrained(f"{name}.digits")
        assert timm.list_models(name, pretrained=True) == [f"{name}.digits"]
        # a name alone describes what it builds without weights
        plain = timm.get_pretrained_cfg(name).to_dict()
        assert plain == timm.create_model(name).pretrained_cfg


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_the_published_one(name, no_network):
    facts = packaged()[name]
    model = timm.create_model(name, pretrained=True).eval()
    assert facts["n_eval"] == 360
    assert correct_digits(model) == facts["n_correct"]
    assert facts["top1"] == round(100 * facts["n_correct"] / 360, 4) > 97


@pytest.mark.parametrize("name", NAMES)
def test_provenance(name):
    facts = packaged()[name]
    content = (FOLDER / f"{name}.safetensors").read_bytes()
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["size"] == len(content)
    assert facts["model"] == name and facts["name"] == f"{name}.digits"
    assert {"torch", "timm", "python", "timm_structdrop"} <= set(facts["versions"])
    assert facts["hardware"] and facts["license"] == "apache-2.0"
    words = shlex.split(facts["command"])
    flags = parse_with_sources(train_parser(), words[2:])
    assert words[:2] == ["python", "train.py"] and "--seed" in words
    assert (flags.model, flags.seed, flags.epochs) == (name, facts["seed"], facts["epochs"])
    assert flags.model_kwargs == facts["model_args"]


def test_all_together_are_small():
    files = list(FOLDER.iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_they_are_in_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["timm_structdrop"]
    for file in (*FOLDER.iterdir(), TEMPLATE):
        path = str(file.relative_to(ROOT / "timm_structdrop"))
        assert any(fnmatch.fnmatch(path, pattern) for pattern in patterns), path


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_file_in_single_precision(name):
    model = timm.create_model(f"{name}.digits", pretrained=True)
    stored = load_file(FOLDER / f"{name}.safetensors")
    state = model.state_dict()
    assert stored.keys() == state.keys()
    for key, value in stored.items():
        if value.is_floating_point():
            assert value.dtype == torch.float16 and state[key].dtype == torch.float32
            torch.testing.assert_close(state[key], value.float(), rtol=0, atol=0)
        else:
            assert torch.equal(state[key], value) and state[key].dtype == value.dtype


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_dropcluster")])
def test_clusters_come_along(name):
    model = timm.create_model(name, pretrained=True)
    layers = [module for module in model.modules() if isinstance(module, DropCluster2d)]
    assert layers and all(layer.is_fitted for layer in layers)
    for layer in layers:
        size = (layer.labels.shape[1], layer.labels.shape[2])
        assert tuple(layer.fitted_size.tolist()) == size
        for labels in layer.labels[layer.structured]:
            assert len(labels.unique()) == layer.n_clusters


def test_masked_channels_come_along(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("lenet5_dropcluster", n_clusters=4).eval()
    activations = torch.randn(8, 6, 28, 28)
    activations[:, 2] = 1.0
    layer = model.act1.dropcluster
    layer.fit(activations, at=7)
    write_weights(model.state_dict(), tmp_path / "w.safetensors")
    file = {"file": str(tmp_path / "w.safetensors")}
    again = timm.create_model(
        "lenet5_dropcluster", n_clusters=4, pretrained=True, pretrained_cfg_overlay=file
    )
    assert again.act1.dropcluster.structured.tolist() == [True, True, False, True, True, True]
    assert torch.equal(again.act1.dropcluster.labels, layer.labels)
    assert int(again.act1.dropcluster.fitted_at) == 7


def test_another_number_of_classes_keeps_the_rest(no_network):
    model = timm.create_model("resnet20_dropcluster", pretrained=True, num_classes=3)
    whole = timm.create_model("resnet20_dropcluster", pretrained=True).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole[key]) or key.startswith("fc."), key
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 3)


def test_colour_images_are_understood_as_well():
    facts = packaged()["resnet20_dropblock"]
    model = timm.create_model("resnet20_dropblock", pretrained=True, in_chans=3).eval()
    config = resolve_model_data_config(model)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *config["input_size"][1:])}
    assert abs(correct_digits(model, "RGB") - facts["n_correct"]) <= 1


def test_features_only():
    model = timm.create_model("resnet20_dropcluster", pretrained=True, features_only=True)
    whole = timm.create_model("resnet20_dropcluster", pretrained=True).eval()
    images = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images)[-1], whole.forward_features(images))


def test_without_pretrained_the_architecture_is_as_ever():
    model = timm.create_model("resnet20_dropblock")
    assert model.conv1.in_channels == 3
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert "file" not in model.pretrained_cfg


def test_the_settings_of_the_training_come_with_the_tag_and_with_an_export(tmp_path, monkeypatch):
    monkeypatch.setitem(packaged()["resnet20_dropblock"], "model_args", {"block_size": 4})
    model = timm.create_model("resnet20_dropblock", pretrained=True)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    untrained = timm.create_model("resnet20_dropblock.digits")
    for built in (model, again, untrained):
        assert built.layer3[0].act1.dropblock.block_size == 4
    own = timm.create_model("resnet20_dropblock", pretrained=True, block_size=2)
    assert own.layer3[0].act1.dropblock.block_size == 2
    assert timm.create_model("resnet20_dropblock").layer3[0].act1.dropblock.block_size == 7


def test_clusters_are_stored_at_the_size_of_the_training(tmp_path):
    model = timm.create_model("resnet20_dropcluster", pretrained=True)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    stored = load_file(FOLDER / "resnet20_dropcluster.safetensors")["act1.dropcluster.labels"]
    assert torch.equal(model.act1.dropcluster.labels, stored)
    assert torch.equal(again.act1.dropcluster.labels, stored)


@pytest.mark.parametrize("file", [FOLDER / "gone.safetensors", Path("nowhere/gone.bin")])
def test_a_missing_file_is_one_clear_line(file):
    with pytest.raises(UserError, match=r"existing file.*gone") as caught:
        timm.create_model(
            "lenet5_dropcluster", pretrained=True, pretrained_cfg_overlay={"file": str(file)}
        )
    assert ("install timm-structdrop again" in str(caught.value)) == (file.parent == FOLDER)
    assert "\n" not in str(caught.value)


def test_half_precision_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match=r"half precision.*big is not"):
        write_weights({"big": torch.tensor([70000.0])}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"gone.*cannot be written"):
        write_weights({"small": torch.tensor([7.0])}, tmp_path / "gone" / "w.safetensors")


def save_run(folder: Path, name: str = "lenet5_dropcluster", **flags) -> Path:
    torch.manual_seed(3)
    folder.mkdir()
    settings = {"recipe": "digits-quickstart", "model": name, "seed": 3}
    known = vars(parse_with_sources(train_parser(), ["--recipe", "digits-quickstart"]))
    model = timm.create_model("lenet5_dropcluster", n_clusters=6)
    saved = {**known, **settings, **flags}
    (folder / "args.yaml").write_text(yaml.safe_dump(saved))
    torch.save({"state_dict": model.state_dict(), "arch": name}, folder / "model_best.pth.tar")
    return folder


def test_the_command_packages_a_run(tmp_path, capsys):
    run = save_run(tmp_path / "run", model_kwargs={"n_clusters": 6}, lr=0.01)
    main([str(run), "--output", str(tmp_path / "out"), "--hardware", "an abacus"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "lenet5_dropcluster.json",
        "lenet5_dropcluster.safetensors",
    }
    facts = json.loads((tmp_path / "out" / "lenet5_dropcluster.json").read_text())
    weights = tmp_path / "out" / "lenet5_dropcluster.safetensors"
    assert facts["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert facts["model_args"] == {"n_clusters": 6} and facts["hardware"] == "an abacus"
    assert facts["label_names"] == list("0123456789")
    assert facts["command"] == (
        "python train.py --recipe digits-quickstart --model-kwargs n_clusters=6 --lr 0.01 --seed 3"
    )
    model = timm.create_model(
        "lenet5_dropcluster",
        n_clusters=6,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights)},
    )
    assert correct_digits(model.eval()) == facts["n_correct"]
    assert f"({facts['n_correct']} of 360)" in capsys.readouterr().out


def test_the_command_refuses_what_is_no_training_of_a_variant(tmp_path):
    for run, message in (
        (save_run(tmp_path / "a", name="resnet18"), "must be of a variant; .*resnet18"),
        (save_run(tmp_path / "folder", dataset="", data_dir="images"), "trained on a folder"),
        (tmp_path / "nothing", "existing file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(run), "--output", str(tmp_path / "out")])
    run = save_run(tmp_path / "b")
    (run / "args.yaml").unlink()
    with pytest.raises(UserError, match=r"needs the args.yaml"):
        main([str(run), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_failed_package_leaves_what_was_there(tmp_path):
    run = save_run(tmp_path / "run", model_kwargs={"n_clusters": 6}, val_split="no_such_split")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lenet5_dropcluster.json").write_text("{}")
    with pytest.raises(UserError):
        main([str(run), "--output", str(tmp_path / "out")])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["lenet5_dropcluster.json"]


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "digits-quickstart", "--seed", "5"],
        ["--model", "resnet8_camdrop", "--dataset", "digits", "--model-kwargs", "block_size=3"],
        ["--model", "resnet18", "--structdrop", "dropblock:block_size=5", "--scale", "0.2", "1.0"],
        ["some folder", "--model", "resnet18", "--amp", "--decay-milestones", "3", "9"],
    ],
    ids=" ".join,
)
def test_the_training_command_is_understood_as_the_same_flags(words):
    flags = parse_with_sources(train_parser(), words)
    command = shlex.split(training_command(vars(flags)))
    assert command[:2] == ["python", "train.py"]
    assert parse_with_sources(train_parser(), command[2:]) == flags
    assert len(command) <= len(words) + 4


def test_a_run_from_packaged_weights_says_all_that_its_checkpoint_needs(tmp_path, capsys):
    train, validate = load_script("train"), load_script("validate")
    words = ["--model", "resnet20_dropcluster", "--pretrained", "--dataset", "digits"]
    settings = ["--epochs", "1", "--lr", "1e-9", "--warmup-epochs", "0", "--workers", "0"]
    train.main([*words, *settings, "--output", str(tmp_path), "--model-ema"])
    (run,) = tmp_path.iterdir()
    args = yaml.safe_load((run / "args.yaml").read_text())
    data = packaged()["resnet20_dropcluster"]["data"]
    assert [args["in_chans"], args["img_size"], args["img_size"]] == data["input_size"]
    assert args["mean"] == data["mean"] and args["std"] == data["std"]
    capsys.readouterr()
    validate.main(
        ["--model", "resnet20_dropcluster", "--checkpoint", str(run), "--use-ema", "--workers", "0"]
    )
    result = json.loads(capsys.readouterr().out.partition("--result")[2])
    assert result["img_size"] == 16 and result["top1"] > 90


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resnet20_dropcluster", "--pretrained"], (1, 16)),
        (["resnet20_dropcluster.digits"], (1, 16)),
        (["resnet20_dropcluster", "--pretrained", "--img-size", "24", "--in-chans", "3"], (3, 24)),
        (["resnet20_dropcluster"], (None, None)),
        (["resnet18_dropcluster", "--pretrained"], (None, None)),
    ],
    ids=str,
)
def test_flags_say_what_the_tag_decides(words, expected):
    flags = with_tag_settings(parse_with_sources(train_parser(), ["--model", *words]))
    assert (flags.in_chans, flags.img_size) == expected
    assert (flags.num_classes == 10) == (expected != (None, None))


def test_images_that_had_no_say_in_the_choice_are_not_said_to_have_had_one():
    by_loss = circumstances({"epochs": 3, "val_split": ""}, "a machine")
    assert by_loss["selection"] is None and by_loss["split"] == "validation"
    usual = circumstances({"epochs": 3, "val_split": "test"}, "a machine")
    assert usual["selection"] == "the best of 3 epochs by top-1 on these images"


def test_batch_norm_settings_of_a_tag_are_flags_of_their_own(monkeypatch):
    facts = {**packaged()["resnet20_dropblock"], "model_args": {"bn_eps": 0.25, "block_size": 3}}
    monkeypatch.setattr(tag_settings, "packaged", lambda: {"efficientnet_b0_dropblock": facts})
    words = ["--model", "efficientnet_b0_dropblock.digits"]
    flags = with_tag_settings(parse_with_sources(train_parser(), words))
    assert (flags.bn_eps, flags.model_kwargs) == (0.25, {"block_size": 3})
    flags = with_tag_settings(parse_with_sources(train_parser(), [*words, "--bn-eps", "0.5"]))
    assert (flags.bn_eps, flags.model_kwargs) == (0.5, {"block_size": 3})

    variant = variants["efficientnet_b0_dropblock"]
    monkeypatch.setattr(type(variant), "_trained_with", lambda self, cfg: facts["model_args"])
    model = variant.build(bn_eps=0.125)
    assert model.bn1.eps == 0.125 and variant.build().bn1.eps == 0.25
    assert {layer.block_size for layer in structdrop_layers(model)} == {3}
