"""push_to_hub and the push command against a hub that speaks the real protocol."""

import hashlib
import json
from dataclasses import FrozenInstanceError
from io import BytesIO
from pathlib import Path
from shutil import copyfile, copytree

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load as load_tensors
from script import load_script

from timm_structdrop import attach, set_drop_prob
from timm_structdrop.__main__ import main
from timm_structdrop.errors import UserError
from timm_structdrop.hub import export_model, push_to_hub
from timm_structdrop.hub.card import END, START, updated_readme
from timm_structdrop.hub.export import layer_settings
from timm_structdrop.hub.failures import hub_errors
from timm_structdrop.hub.snapshot import read_snapshot
from timm_structdrop.recipes.trained import read_run

LENET = """
torch.manual_seed(seed)
model = timm.create_model("lenet5_dropcluster", n_clusters=6, drop_block_rate=0.25)
if clusters:
    model.act1.dropcluster.fit(torch.randn(8, 6, 28, 28), at=3)
"""
PUSH = LENET + "result = push_to_hub(model, repo, **{'license': 'mit', **settings}).commit_url"


def push(client, repo, clusters=True, seed=0, **settings):
    return client.run(PUSH, repo=repo, clusters=clusters, seed=seed, settings=settings)


def metadata(readme: bytes) -> dict:
    return yaml.safe_load(readme.decode().split("---\n")[1])


def test_one_commit_holds_everything(hub, client):
    labels = [f"digit {index}" for index in range(10)]
    facts = {"dataset": "digits", "top1": 97.5, "n_eval": 360, "seed": 42}
    address = push(client, "alice/whole", label_names=labels, facts=facts)
    repo = hub.repo("alice/whole")
    assert [summary for _, summary in repo.history] == ["initial commit", "Upload model"]
    assert address == f"{hub.url}/alice/whole/commit/{repo.sha('main')}"
    files = repo.head()
    assert set(files) == {
        ".gitattributes", "README.md", "clusters.png", "config.json", "model.safetensors"
    }  # fmt: skip
    config = json.loads(files["config.json"])
    assert config["architecture"] == "lenet5_dropcluster"
    assert config["model_args"]["n_clusters"] == 6
    assert config["model_args"]["drop_block_rate"] == 0.25
    assert config["pretrained_cfg"]["mean"] == [0.1307]
    assert config["label_names"] == labels
    assert config["sha256"] == hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert load_tensors(files["model.safetensors"])["act1.dropcluster.labels"].max() == 5
    assert Image.open(BytesIO(files["clusters.png"])).size[0] > 300
    card = metadata(files["README.md"])
    assert card["license"] == "mit" and card["library_name"] == "timm"
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == 97.5
    assert b"| rate in training | 0.25 |" in files["README.md"]
    assert b"Its drop rate comes back with it" in files["README.md"]


def test_a_repeated_push_of_the_same_model_is_no_commit(hub, client):
    first = push(client, "alice/same")
    assert push(client, "alice/same") == first
    assert len(hub.repo("alice/same").history) == 2
    assert push(client, "alice/same", seed=1) != first
    assert len(hub.repo("alice/same").history) == 3


def test_an_existing_readme_is_updated_and_keeps_what_people_wrote(hub, client):
    old = "---\nlicense: gpl-3.0\ntags: [mine]\nlanguage: en\n---\n# My notes\n"
    hub.add("alice/notes", {"README.md": old.encode(), "pytorch_model.bin": b"old"})
    push(client, "alice/notes")
    readme = hub.repo("alice/notes").head()["README.md"]
    card = metadata(readme)
    assert card["license"] == "mit" and card["language"] == "en"
    assert {"mine", "timm_structdrop"} <= set(card["tags"])
    assert b"# My notes" in readme and b"# Model card for notes" in readme
    push(client, "alice/notes", seed=1)
    again = hub.repo("alice/notes").head()["README.md"].decode()
    assert again.count("# My notes") == again.count("# Model card for notes") == 1


def test_private_repositories_branches_and_messages(hub, client):
    push(client, "alice/hidden", private=True, revision="v1", commit_message="Second try")
    repo = hub.repo("alice/hidden")
    assert repo.private
    assert set(repo.head()) == {".gitattributes"}  # main is as it was
    assert "model.safetensors" in repo.head("v1")
    assert repo.history[-1] == ("v1", "Second try")
    push(client, "alice/hidden", seed=1, private=True, revision="v1")  # both are there now
    assert len(repo.history) == 3
    push(client, "alice/open")
    piece = {"repo": "alice/open", "clusters": False, "seed": 1, "settings": {"private": True}}
    assert "alice/open is public already" in client.error(PUSH, **piece).error
    assert len(hub.repo("alice/open").history) == 2


def test_the_token_stays_out_of_the_repository(hub, client):
    push(client, "alice/secret")
    for content in hub.repo("alice/secret").head().values():
        assert b"hf_alice" not in content


def test_an_unfitted_model_has_no_picture(hub, client):
    push(client, "alice/unfitted", clusters=False)
    files = hub.repo("alice/unfitted").head()
    assert "clusters.png" not in files and b"clusters.png" not in files["README.md"]


BACK = {
    "rate given": lambda: timm.create_model("lenet5_dropblock", drop_block_rate=0.3, block_size=3),
    "keep_prob": lambda: timm.create_model("resnet8_camdrop", keep_prob=0.85, block_size=3),
    "timm's own rates": lambda: timm.create_model(
        "resnet8_dropblock", drop_rate=0.2, drop_path_rate=0.1, num_classes=7, in_chans=2
    ),
    "rate set later": lambda: _with_rate(timm.create_model("lenet5_rblock", sub_models="bdropdml")),
    "attached": lambda: attach(
        timm.create_model("resnet8", drop_rate=0.3)
        if timm.is_model("resnet8")
        else timm.create_model("resnet10t", num_classes=5, drop_rate=0.3),
        "dropblock",
        img_size=32,
        block_size=3,
        drop_prob=0.15,
    ),
    "attached to a variant": lambda: _with_rate(
        attach(timm.create_model("lenet5_dropcluster"), "dropblock", drop_prob=0.2)
    ),
    "channels_last": lambda: timm.create_model("resnet8_dropcluster").to(
        memory_format=torch.channels_last
    ),
}


def _with_rate(model):
    set_drop_prob(model, 0.05)
    return model


@pytest.mark.parametrize("name", BACK)
def test_an_export_brings_back_all_settings(name, tmp_path):
    model = BACK[name]()
    export_model(model, tmp_path / "model")
    back = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert layer_settings(back) == layer_settings(model) != []
    for attribute in ("drop_rate", "num_classes", "num_features"):
        assert getattr(back, attribute, None) == getattr(model, attribute, None), attribute
    paths = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert [m.drop_prob for m in back.modules() if type(m).__name__ == "DropPath"] == paths
    saved, loaded = model.state_dict(), back.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_what_timm_could_not_rebuild_is_refused(tmp_path):
    model = timm.create_model("lenet5_dropblock")
    next(m for m in model.modules() if hasattr(m, "block_size")).block_size = 2
    with pytest.raises(UserError, match=r"set by the arguments.*'block_size': 2"):
        export_model(model, tmp_path / "model")
    with pytest.raises(UserError, match=r"made by timm\.create_model"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(UserError, match="each of the 10 classes; got 2"):
        export_model(timm.create_model("lenet5_dropblock"), tmp_path / "model", label_names="ab")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("repo", "license", "message"),
    [
        ("net", "mit", "named user/name; got 'net'"),
        ("a/b/c", "mit", "named user/name"),
        ("a/b c", "mit", "cannot push to a/b c: a repository is named user/name"),
        ("alice/net", "", "a license must be an identifier of the Hub"),
        ("alice/net", None, "a license must be an identifier of the Hub"),
        ("alice/net", "apache2", r"got 'apache2' \(nearest: apache-2.0"),
    ],
)
def test_nothing_is_sent_with_wrong_arguments(repo, license, message):
    with pytest.raises(UserError, match=message):
        push_to_hub(timm.create_model("lenet5_dropblock"), repo, license=license)
    with pytest.raises(TypeError, match="license"):
        push_to_hub(timm.create_model("lenet5_dropblock"), repo)


def test_what_is_wrong_is_said_before_anything_is_read_or_drawn(monkeypatch):
    argv = ["push", "nowhere", "alice/net", "--license"]
    with pytest.raises(UserError, match=r"got 'foo' \(nearest: "):
        main([*argv, "foo"])
    monkeypatch.setattr("timm_structdrop.hub.push.get_token", lambda: None)
    with pytest.raises(UserError, match="cannot push to alice/net: there is no token; run `hf"):
        main([*argv, "mit"])
    monkeypatch.setattr("timm_structdrop.hub.push.get_token", lambda: "hf_alice")
    with pytest.raises(UserError, match=r"DIR must be an output folder.*got nowhere"):
        main([*argv, "mit"])


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory) -> Path:
    """The folder of a run that kept and evaluated averaged weights."""
    folder = tmp_path_factory.mktemp("averaged")
    load_script("train").main(
        ["--recipe", "digits-quickstart", "--workers", "0", "--epochs", "2", "--device", "cpu",
         "--model-ema", "--model-ema-decay", "0.9", "--checkpoint-hist", "2", "--log-interval",
         "1000", "--output", str(folder), "--experiment", "run"]
    )  # fmt: skip
    return folder / "run"


def changed_run(averaged_run: Path, folder: Path, **changes: object) -> Path:
    """A copy of the run with other facts in its best checkpoint."""
    copytree(averaged_run, folder)
    saved = torch.load(folder / "model_best.pth.tar", weights_only=True)
    saved["args"] |= {key: changes.pop(key) for key in list(changes) if key in saved["args"]}
    kept = {key: value for key, value in {**saved, **changes}.items() if value is not None}
    torch.save(kept, folder / "model_best.pth.tar")
    return folder


def weights_of(trained) -> torch.Tensor:
    return trained.model.state_dict()["conv1.weight"]


@pytest.mark.parametrize("weights", ["state_dict", "state_dict_ema"])
def test_the_weights_that_the_figures_are_of_are_published(averaged_run, tmp_path, weights):
    saved = torch.load(averaged_run / "model_best.pth.tar", weights_only=True)
    assert saved["validation"]["weights"] == "state_dict_ema"
    figures = {"weights": weights, "loss": 0.1, "top1": 12.5, "top5": 75.0}
    trained = read_run(changed_run(averaged_run, tmp_path / "run", validation=figures))
    assert torch.equal(weights_of(trained), saved[weights]["conv1.weight"])
    assert (trained.facts["top1"], trained.facts["top5"]) == (12.5, 75.0)


def test_without_figures_in_the_checkpoint_those_of_the_summary_count(averaged_run, tmp_path):
    saved = torch.load(averaged_run / "model_best.pth.tar", weights_only=True)
    older = read_run(changed_run(averaged_run, tmp_path / "older", validation=None))
    assert older.facts["top1"] == saved["metric"]
    assert torch.equal(weights_of(older), saved["state_dict_ema"]["conv1.weight"])
    elsewhere = changed_run(
        averaged_run, tmp_path / "elsewhere", validation=None, model_ema_force_cpu=True
    )
    assert "top1" not in read_run(elsewhere).facts  # they may be of the other weights


def test_a_checkpoint_that_is_replaced_meanwhile_is_published_as_one(
    averaged_run, tmp_path, monkeypatch
):
    figures = {"weights": "state_dict_ema", "loss": 0.1, "top1": 12.5, "top5": 75.0}
    other = changed_run(averaged_run, tmp_path / "other", validation=figures, epoch=7)
    run = tmp_path / "run"
    copytree(averaged_run, run)
    saved = torch.load(run / "model_best.pth.tar", weights_only=True)
    load = torch.load

    def load_and_replace(*args, **settings):
        content = load(*args, **settings)
        copyfile(other / "model_best.pth.tar", run / "next")
        (run / "next").replace(run / "model_best.pth.tar")
        return content

    monkeypatch.setattr(torch, "load", load_and_replace)
    trained = read_run(run)
    assert torch.equal(weights_of(trained), saved["state_dict_ema"]["conv1.weight"])
    assert trained.facts["top1"] == saved["metric"] != 12.5


def test_a_snapshot_says_which_weights_its_figures_are_of_and_stays_as_it_is(
    averaged_run, tmp_path
):
    saved = torch.load(averaged_run / "model_best.pth.tar", weights_only=True)
    snapshot = read_snapshot(averaged_run)
    assert snapshot.checkpoint.is_ema and snapshot.epoch == saved["epoch"]
    assert snapshot.figures == {key: saved["validation"][key] for key in ("top1", "top5")}
    with pytest.raises(FrozenInstanceError):
        snapshot.epoch = 9
    with pytest.raises(TypeError):
        snapshot.figures["top1"] = 100.0
    own = changed_run(averaged_run, tmp_path / "run", validation=None, model_ema=False, epoch=0)
    assert not read_snapshot(own).checkpoint.is_ema and read_snapshot(own).epoch == 0
    rows = (own / "summary.csv").read_text().splitlines()
    first = dict(zip(*(row.split(",") for row in rows[:2]), strict=True))
    assert read_snapshot(own).figures["top1"] == float(first["eval_top1"])


@pytest.mark.parametrize(
    "error, is_turned",
    [
        (PermissionError(13, "Permission denied", "model.safetensors"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (ValueError("a shape is wrong"), False),
        (RuntimeError("size mismatch"), False),
        (KeyError("siblings"), False),
    ],
)
def test_only_what_fails_at_the_hub_on_the_way_or_on_the_disk_is_put_in_words(error, is_turned):
    wanted = UserError if is_turned else type(error)
    with pytest.raises(wanted) as raised, hub_errors("push to", "alice/net"):
        raise error
    assert (raised.value is error) != is_turned
    assert not is_turned or str(raised.value).startswith("cannot push to alice/net: ")


def test_readmes_merge():
    card = "---\nlicense: mit\ntags:\n- a\n---\n\n# Card\n"
    fresh = updated_readme(None, card)
    assert fresh == f"---\nlicense: mit\ntags:\n- a\n---\n\n{START}\n\n# Card\n\n{END}\n"
    assert updated_readme(fresh, card) == fresh
    edited = fresh.replace(START, f"Before.\n\n{START}").replace(END, f"{END}\n\nAfter.")
    updated = updated_readme(edited, card.replace("# Card", "# Other"))
    assert "Before." in updated and "After." in updated
    assert "# Other" in updated and "# Card" not in updated
    broken = updated_readme("---\n: [\n---\nText.\n", card)
    assert yaml.safe_load(broken.split("---\n")[1])["license"] == "mit" and "Text." in broken
    assert updated_readme("no metadata", card).endswith(f"{END}\n\nno metadata\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "must be an output folder of train.py or of fit"),
        (lambda folder: folder.mkdir(), "must hold model_best or last"),
        (lambda folder: _write(folder, "config.json", "{}"), "must hold a whole exported model"),
        (lambda folder: _write(folder, "config.json", "?"), "must hold a whole exported model"),
        (lambda folder: _write(folder, "last.pth.tar", "?"), "whole torch or safetensors file"),
    ],
)
def test_folders_that_hold_no_model(tmp_path, monkeypatch, make, message):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        main(["push", str(tmp_path / "run"), "alice/net", "--license", "mit"])


def _write(folder: Path, name: str, text: str) -> None:
    folder.mkdir()
    (folder / name).write_text(text)
