"""Files and configs of others run no code and reach no other files; tokens are written nowhere;
nothing is asked of a network unless the user asks for it."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from children import ROOT, Child
from hub_server import Hub
from script import write_images
from test_resume import FLAGS

from timm_structdrop.data import create_dataset
from timm_structdrop.errors import UserError
from timm_structdrop.hub import export_model
from timm_structdrop.models.weights import read_file

SOURCES = sorted(
    [ROOT / "train.py", ROOT / "validate.py"]
    + [file for room in ("timm_structdrop", "tools", "benchmarks", "examples") for file in
       (ROOT / room).rglob("*.py")]
)  # fmt: skip
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.load_all",
    "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.hub.load", "os.system", "os.popen", "eval", "exec", "marshal.load", "marshal.loads",
    "shelve.open", "joblib.load", "dill.load", "dill.loads",
}  # fmt: skip
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def calls(path: Path):
    """(dotted name, keywords) of every call, with the names that imports stand for."""
    tree = ast.parse(path.read_text())
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]:
                      alias.name if alias.asname else alias.name.split(".")[0]
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}"
                      for alias in node.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            yield names.get(first, first) + dot + rest, keywords


def unsafe_calls(path: Path) -> list[str]:
    found = []
    for name, keywords in calls(path):
        if name in SAFE_ONLY_WITH:
            key, wanted = SAFE_ONLY_WITH[name]
            value = keywords.get(key)
            if not (isinstance(value, ast.Constant) and value.value is wanted):
                found.append(name)
        shell = keywords.get("shell")
        if name in FORBIDDEN or (shell is not None and ast.unparse(shell) != "False"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_read_in_a_way_that_can_run_code(path):
    assert not unsafe_calls(path)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "from pickle import loads as read\nread(b)",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "eval(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_them(tmp_path, code):
    (tmp_path / "code.py").write_text(code)
    assert unsafe_calls(tmp_path / "code.py")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_checkpoints_and_class_maps_that_run_code_are_refused(tmp_path):
    bomb = Bomb(tmp_path / "it-ran")
    torch.save({"state_dict": {}, "args": bomb}, tmp_path / "last.pth.tar")
    with pytest.raises(UserError, match="can run code"):
        read_file(tmp_path / "last.pth.tar")
    data = write_images(tmp_path / "data", train=1, validation=1)
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError):
        create_dataset("", str(data), class_map=str(tmp_path / "map.pkl"))
    assert not bomb.folder.exists()


def files_opened(tmp_path: Path, folder: Path) -> tuple[list[str], str]:
    """Files outside of the libraries that a child opens which loads the model in `folder`."""
    child = Child("load", [str(folder)], tmp_path / "load.log", offline=True)
    child.end()
    said = child.said.splitlines()
    return [line[7:] for line in said if line.startswith("opened ")], child.said


HOSTILE = [
    {"pretrained_cfg": {"file": "{secret}"}},
    {"pretrained_cfg": {"hf_hub_filename": "../../secret.safetensors"}},
    {"pretrained_cfg": {"hf_hub_id": "mallory/evil", "source": "hf-hub"}},
    {"pretrained_cfg": {"url": "http://localhost:9/evil", "source": "timm", "custom_load": True}},
    {"pretrained_cfg": {"custom_load": "hf", "source": "local-dir", "file": "{secret}"}},
    {"pretrained_cfg": {"state_dict": {"a": 1}}},
    {"model_args": {"checkpoint_path": "{secret}"}},
    {"model_args": {"pretrained_cfg": {"file": "{secret}"}}},
    {"model_args": {"pretrained_cfg_overlay": {"file": "{secret}"}}},
    {"model_args": {"cache_dir": "{folder}/../elsewhere"}},
    {"model_args": {"base": "local-dir:{folder}/../other", "regularizers": []},
     "architecture": "structdrop_attached"},
    {"model_args": {"base": "lenet5", "regularizers": [{"name": "dropblock", "file": "{secret}"}],
                    "checkpoint_path": "{secret}"}, "architecture": "structdrop_attached"},
    {"architecture": "hf-hub:mallory/evil"},
    {"architecture": "../other"},
    {"architecture": "local-dir:{folder}/../other"},
]  # fmt: skip


def test_a_config_reaches_no_file_beside_its_own(tmp_path):
    """What `timm.create_model` makes of our models' configs, whoever wrote them."""
    torch.manual_seed(0)
    secret = tmp_path / "secret.pth"
    model = timm.create_model("lenet5_dropblock", num_classes=3)
    for name in ("mine", "other"):
        export_model(model, tmp_path / name)
    torch.save(model.state_dict(), secret)  # reading it goes through Python's open, which is heard
    folder = tmp_path / "mine"
    usual = json.loads((folder / "config.json").read_text())
    opened, said = files_opened(tmp_path, folder)
    assert f"{folder}/config.json" in opened and "loaded" in said, said
    for change in HOSTILE:
        text = json.dumps(change).replace("{secret}", str(secret)).replace("{folder}", str(folder))
        config = {**usual}
        for key, value in json.loads(text).items():
            config[key] = {**usual.get(key, {}), **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))
        (tmp_path / "load.log").unlink()
        opened, said = files_opened(tmp_path, folder)
        beside = [file for file in opened if not file.startswith(f"{folder}/") or ".." in file]
        assert not [file for file in beside if file.startswith(str(tmp_path))
                    and not file.endswith("load.log")], (change, beside)  # fmt: skip
        assert "connects to" not in said and "looks up" not in said, (change, said)


TOKEN = "hf_do_not_write_this_down"


def test_a_token_is_in_nothing_that_a_run_and_its_failing_push_write(tmp_path):
    images = write_images(tmp_path / "images")
    with Hub() as hub:
        hub.fault("create", 403, times=100)
        env = {**hub.env(tmp_path / "home"), "HF_TOKEN": TOKEN, "PYTHONWARNINGS": "default"}
        run = ("--data-dir", str(images), "--output", str(tmp_path), "--experiment", "run")
        push = ("--push-to-hub", "alice/run", "--hub-license", "mit")
        child = Child("train", [*FLAGS, *run, "--epochs", "1", *push], tmp_path / "log", env)
        assert child.end() == 0, child.said
    assert "Not pushed" in child.said and "403" in child.said, child.said
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert tmp_path / "run" / "args.yaml" in written and tmp_path / "log" in written
    for file in written:
        assert TOKEN.encode() not in file.read_bytes(), file
    saved = read_file(tmp_path / "run" / "last.pth.tar")
    assert TOKEN not in str(saved["args"])


def test_nothing_connects_to_anywhere_unless_asked(tmp_path):
    """The quick start, validation, and the commands that look at what is there."""
    run = tmp_path / "run"
    small = ("--batch-size", "32", "--workers", "0")
    commands = [
        ("train", "--recipe", "digits-quickstart", "--epochs", "1", "--train-fraction", "0.1",
         "--cluster-start", "0", "--output", str(tmp_path), "--experiment", "run", *small),
        ("validate", "--checkpoint", str(run / "last.pth.tar"), *small),
        ("timm_structdrop", "list", "lenet5*"),
        ("timm_structdrop", "list", "--recipes"),
        ("timm_structdrop", "inspect", "lenet5_dropcluster", "--checkpoint", str(run),
         "--output", str(tmp_path / "pictures")),
        ("tools.card", "--check"),
    ]  # fmt: skip
    for index, (command, *argv) in enumerate(commands):
        child = Child(command, argv, tmp_path / f"log{index}", offline=True)
        status = child.end(200)
        assert "connects to" not in child.said and "looks up" not in child.said, child.said
        assert status == 0, child.said


def test_the_guard_of_these_tests_works(tmp_path):
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    argv = ["--model", "hf-hub:alice/net", "--dataset", "digits"]
    child = Child("validate", argv, tmp_path / "log", env, offline=True)
    assert child.end() != 0
    assert "looks up" in child.said or "connects to" in child.said, child.said
