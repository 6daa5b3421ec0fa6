"""Models on their way through the Hub as users live it: train, push, load elsewhere, fine-tune."""

import json
import logging
import os

import pytest
import timm
import torch
import yaml
from hub_client import Client
from hub_server import Hub
from PIL import Image
from safetensors.torch import save as save_tensors
from script import load_script, write_images
from sklearn.datasets import load_digits

from timm_structdrop.errors import UserError
from timm_structdrop.hub.export import layer_settings
from timm_structdrop.models.weights import read_checkpoint

QUICK = [
    *("--recipe", "digits-quickstart", "--workers", "0", "--epochs", "2", "--cluster-start", "1"),
    *("--drop-block", "0.2", "--model-kwargs", "n_clusters=5", "--log-interval", "1000"),
]  # fmt: skip
COMMANDS = """
import os, sys
sys.path.insert(0, os.path.join(os.getcwd(), "tests"))
from script import load_script
from timm_structdrop.__main__ import main
"""


@pytest.fixture
def at_hub(hub, tmp_path, monkeypatch):
    """The processes that this one starts talk to the hub."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, value in hub.env(tmp_path / "home").items():
        monkeypatch.setenv(name, value)


def five_digits(folder):
    """The digits 0 to 4 as folders of images."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < 5 and index < 600:
            path = folder / ("train" if index < 450 else "validation") / str(label)
            path.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * 15.9).astype("uint8"))
            image.resize((32, 32), Image.Resampling.BILINEAR).save(path / f"{index}.png")
    return folder


def test_train_push_load_finetune_validate(hub, at_hub, tmp_path, caplog):
    output = ["--output", str(tmp_path), "--experiment", "run"]
    push = ["--push-to-hub", "alice/digits", "--hub-license", "mit"]
    load_script("train").main([*QUICK, *output, *push])
    assert "Pushed to alice/digits" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    repo = hub.repo("alice/digits")
    assert len(repo.history) == 2
    files = repo.head()
    config = json.loads(files["config.json"])
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    readme = files["README.md"].decode()
    assert "--recipe digits-quickstart" in readme and str(tmp_path) not in readme
    results = yaml.safe_load(readme.split("---\n")[1])["model-index"][0]["results"]
    trained = read_checkpoint(tmp_path / "run")
    rows = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    top1 = max(float(row.split(",")[rows[0].split(",").index("eval_top1")]) for row in rows[1:])
    assert results[0]["metrics"][0]["value"] == round(top1, 4)

    five_digits(tmp_path / "five")
    train = [
        *("--model", "hf-hub:alice/digits", "--pretrained", "--num-classes", "5"),
        *("--data-dir", str(tmp_path / "five"), "--epochs", "2", "--opt", "adamw", "--lr", "1e-3"),
        *("--batch-size", "32", "--workers", "0", "--smoothing", "0", "--warmup-epochs", "0"),
        *("--no-aug", "--output", str(tmp_path), "--experiment", "tuned", "--input-img-mode", "L"),
        *("--cluster-start", "9", "--log-interval", "1000"),
    ]  # fmt: skip
    validate = [
        *("--model", "hf-hub:alice/digits", "--checkpoint", str(tmp_path / "tuned")),
        *("--data-dir", str(tmp_path / "five"), "--workers", "0"),
        *("--results-file", str(tmp_path / "results.json"), "--results-format", "json"),
    ]  # fmt: skip
    with Client(hub.env(tmp_path / "elsewhere")) as client:
        conv, labels, settings = client.run("""
from timm_structdrop.hub.export import layer_settings
model = load_verified("alice/digits")
other = timm.create_model("hf-hub:alice/digits", pretrained=True)
assert layer_settings(other) == layer_settings(model)
state, again = model.state_dict(), other.state_dict()
assert all(torch.equal(state[key], again[key]) for key in state)
keys = "conv1.weight", "act1.dropcluster.labels"
result = [*(state[key].tolist() for key in keys), layer_settings(model)]
""")
        assert torch.equal(torch.tensor(conv), trained.state_dict["conv1.weight"])
        wanted = trained.state_dict["act1.dropcluster.labels"]
        assert torch.equal(torch.tensor(labels, dtype=wanted.dtype), wanted)
        assert wanted.max() == 4
        assert settings[0][1]["drop_prob"] == 0.2 and settings[0][1]["n_clusters"] == 5
        client.run(COMMANDS + "load_script('train').main(argv)", argv=train)
        client.run(COMMANDS + "load_script('validate').main(argv)", argv=validate)
        again = ["push", str(tmp_path / "tuned"), "alice/five", "--license", "mit"]
        client.run(COMMANDS + "main(argv)", argv=again)
    tuned = read_checkpoint(tmp_path / "tuned").state_dict
    assert len(tuned["fc.weight"]) == 5
    assert torch.equal(tuned["act1.dropcluster.labels"], wanted)
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result[0] if isinstance(result, list) else result)["top1"] > 90
    card = yaml.safe_load(hub.repo("alice/five").head()["README.md"].decode().split("---\n")[1])
    assert card["base_model"] == "alice/digits"
    assert json.loads(hub.repo("alice/five").head()["config.json"])["num_classes"] == 5


def test_training_goes_on_when_the_hub_is_away(tmp_path, monkeypatch, caplog):
    with Hub() as gone:
        for name, value in gone.env(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
    push = ["--push-to-hub", "alice/net", "--push-every", "1", "--hub-license", "mit"]
    load_script("train").main([*QUICK, "--output", str(tmp_path), "--experiment", "run", *push])
    assert (tmp_path / "run" / "model_best.pth.tar").exists()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert warnings[0].startswith("Not pushed: cannot push to alice/net: ")
    assert "cannot be reached" in warnings[0]
    assert "python -m timm_structdrop push" in warnings[0] and "hf_alice" not in warnings[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push-to-hub", "alice/net"], "--push-to-hub needs --hub-license, such as apache-2.0"),
        (["--push-to-hub", "a/b", "--hub-license", "apache2"], r"'apache2' \(nearest: apache-2.0"),
        (
            ["--push-to-hub", "net", "--hub-license", "mit"],
            "a repository is named user/name; got 'net'",
        ),
        (["--push-every", "3"], "--push-every needs --push-to-hub; got 3"),
        (["--hub-license", "mit"], "--hub-license needs --push-to-hub; got mit"),
    ],
)
def test_wrong_flags_end_before_the_training(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_script("train").main([*QUICK, "--output", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def timms(hub):
    """timm's own repositories, with weights of timm's own models."""
    torch.manual_seed(0)
    models = {}
    for name in ("resnet18", "resnet50"):
        model = models[name] = timm.create_model(name)
        config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": {}}
        weights = save_tensors(model.state_dict(), {"format": "pt"})
        files = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
        hub.add(f"timm/{name}.a1_in1k", {**files, "pytorch_model.bin": b"a pickle"})
    return models


def test_imagenet_variants_take_timms_weights(hub, timms, tmp_path):
    images = write_images(tmp_path / "images", n_classes=2, train=16, validation=4)
    data = ["--data-dir", str(images), "--img-size", "64"]
    fit = [
        *("fit", "resnet18_dropcluster", "--pretrained", *data, "--drop-block", "0.2"),
        *("--output", str(tmp_path / "fitted"), "--num-images", "16"),
    ]  # fmt: skip
    train = [
        *("--pretrained", "--num-classes", "2", *data, "--epochs", "1", "--batch-size", "8"),
        *("--workers", "0", "--lr", "1e-9", "--warmup-epochs", "0", "--log-interval", "1000"),
        *("--output", str(tmp_path)),
    ]  # fmt: skip
    with Client(hub.env(tmp_path / "home", token=None)) as client:
        sums = client.run("""
model = timm.create_model("resnet50_dropcluster", pretrained=True)
result = [value.double().sum().item() for value in model.parameters()]
""")
        assert sums == [value.double().sum().item() for value in timms["resnet50"].parameters()]
        client.run(COMMANDS + "main(argv)", argv=fit)
        run = COMMANDS + "load_script('train').main(argv)"
        plain = ["--model", "resnet18_dropcluster", "--experiment", "plain", *train]
        client.run(run, argv=plain)
        fitted = ["--model", f"local-dir:{tmp_path / 'fitted'}", "--experiment", "from", *train]
        assert not client.run_all([(run, {"argv": fitted})])[0].warnings
    conv = timms["resnet18"].state_dict()["layer1.0.conv1.weight"]
    model = timm.create_model(f"local-dir:{tmp_path / 'fitted'}", pretrained=True)
    assert layer_settings(model)[0][1]["drop_prob"] == 0.2
    assert model.act1.dropcluster.is_fitted
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], conv)
    for experiment in ("plain", "from"):
        state = read_checkpoint(tmp_path / experiment).state_dict
        assert state["fc.weight"].shape == (2, 512)
        torch.testing.assert_close(state["layer1.0.conv1.weight"], conv)
    labels = model.state_dict()["act1.dropcluster.labels"]
    assert torch.equal(state["act1.dropcluster.labels"], labels)
