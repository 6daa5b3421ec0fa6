"""Reading checkpoint files: every failure is one clear error, and no code in a file ever runs."""

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from timm_structdrop.errors import UserError, one_line
from timm_structdrop.models.weights import (
    Checkpoint,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    read_file,
)


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training output folder as timm's saver leaves it."""
    model, average = net(), net()
    saved = {
        "arch": "tiny",
        "args": argparse.Namespace(model="tiny", img_size=32, model_kwargs={"k": 1}),
        "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
        "state_dict_ema": average.state_dict(),
    }
    torch.save(saved, tmp_path / "model_best.pth.tar")
    torch.save({**saved, "arch": "later"}, tmp_path / "last.pth.tar")
    return tmp_path


def test_a_folder_means_its_best_then_its_last(run):
    assert find_checkpoint(run).name == "model_best.pth.tar"
    (run / "model_best.pth.tar").unlink()
    assert find_checkpoint(run).name == "last.pth.tar"
    (run / "last.pth.tar").unlink()
    with pytest.raises(UserError, match="must hold model_best or last"):
        find_checkpoint(run)


def test_weights_ema_and_settings_are_read(run):
    content = read_file(run)
    plain, ema = read_checkpoint(run), read_checkpoint(run, use_ema=True)
    for key, value in net().state_dict().items():
        assert plain.state_dict[key].shape == value.shape
        torch.testing.assert_close(plain.state_dict[key], content["state_dict"][f"module.{key}"])
        torch.testing.assert_close(ema.state_dict[key], content["state_dict_ema"][key])
    assert (plain.arch, plain.is_ema, ema.is_ema) == ("tiny", False, True)
    assert plain.args == {"model": "tiny", "img_size": 32, "model_kwargs": {"k": 1}}


def test_bare_weights_take_their_settings_from_args_yaml(tmp_path):
    weights = net().state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "bare.pth").args == {}
    (tmp_path / "args.yaml").write_text("model: tiny\nimg_size: 16\n")
    for name in ("model.safetensors", "bare.pth"):
        found = read_checkpoint(tmp_path / name)
        assert (found.arch, found.args["img_size"]) == ("tiny", 16)
        assert found.state_dict.keys() == weights.keys()


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


WHOLE = torch_bytes({"state_dict": net().state_dict()})


@pytest.mark.parametrize("name", ["x.pth.tar", "x.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n" * 9, bytes(range(256)) * 4, WHOLE[:-9], WHOLE[: len(WHOLE) // 2], a_zip()],
    ids=["empty", "text", "bytes", "nearly whole", "half", "zip"],
)
def test_what_is_no_checkpoint_is_named(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"must be a whole .*{name} \\({len(content)} bytes\\)"):
        read_checkpoint(file)


class Payload:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize(
    "content",
    [torch_bytes({"state_dict": Payload()}), torch_bytes(net())],
    ids=["a call", "a module"],
)
def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"plain values only.*x.pth holds (posix|nt|torch)\."):
        read_checkpoint("x.pth")
    assert not (tmp_path / "it_ran").exists()


def test_a_plain_pickle_is_not_opened_either(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"x\.pth"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": 4}, [torch.zeros(1)], {}])
def test_a_file_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"must hold a dict of weights; .*x\.pth"):
        read_checkpoint(tmp_path / "x.pth")


def test_missing_files_and_missing_averages(tmp_path):
    with pytest.raises(UserError, match=r"existing file or folder; got .*gone\.pth"):
        read_checkpoint(tmp_path / "gone.pth")
    torch.save(net().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"EMA\) weights; .*bare\.pth has none"):
        read_checkpoint(tmp_path / "bare.pth", use_ema=True)


def test_weights_load_exactly(run):
    model, held = net(), read_checkpoint(run)
    load_weights(model, held, "tiny")
    for key, value in model.state_dict().items():
        assert torch.equal(value, held.state_dict[key])


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 3)), "2 not in the model (1.weight, ...)"),
        (nn.Sequential(*net(), nn.Linear(2, 1)), "2 missing (2.weight, ...)"),
        (net(5), "3 of another shape (0.weight: [3, 4] in it, [5, 4] in the model)"),
    ],
)
def test_another_architecture_names_both_and_why(wanted, reason):
    held = Checkpoint(Path("a.pth"), net().state_dict(), "tiny", {}, False)
    with pytest.raises(UserError) as raised:
        load_weights(wanted, held, "big")
    line = one_line(raised.value)
    assert line == f"the checkpoint must fit the model big; a.pth holds tiny: {reason}"
