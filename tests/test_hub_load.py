"""load_verified and timm's own loading against a hub that speaks the real protocol."""

import hashlib
import io
import json
import shutil

import pytest
import timm
import torch
from hub_client import Client
from hub_server import Hub
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from timm_structdrop import attach
from timm_structdrop.errors import UserError
from timm_structdrop.hub import export_model, load_verified
from timm_structdrop.hub.export import layer_settings

# What a loaded model is, JSON-able.
DESCRIBE = """
from timm_structdrop.hub.export import layer_settings
images = torch.linspace(-1, 1, 2 * CHANNELS * 32 * 32).reshape(2, CHANNELS, 32, 32)
def describe(model):
    model.eval()
    labels = [b.sum().item() for n, b in model.named_buffers() if n.endswith("labels")]
    return [model(images).tolist(), layer_settings(model), labels, model.drop_rate]
"""
LOADERS = {
    "verified": "model = load_verified('alice/REPO')",
    "timm": "model = timm.create_model('hf-hub:alice/REPO', pretrained=True)",
}


def lenet(seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(
        "lenet5_dropcluster", n_clusters=6, drop_block_rate=0.25, drop_rate=0.5
    )
    model.act1.dropcluster.fit(torch.randn(8, 6, 28, 28), at=3)
    return model


def attached():
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=4, drop_rate=0.1)
    settings = {"stages": (1, 2), "n_clusters": 5, "drop_prob": 0.2, "img_size": 32}
    attach(model, "dropcluster", where="stage", **settings)
    attach(model, "dropblock", drop_prob=0.15, block_size=3, img_size=32)
    layer = next(m for m in model.modules() if hasattr(m, "labels"))
    layer.fit(torch.randn(8, *layer.labels.shape))
    return model


MODELS = {"registered": lenet, "attached": attached}


def files_of(model, folder) -> dict[str, bytes]:
    export_model(model, folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub() as hub:
        folder = tmp_path_factory.mktemp("models")
        hub.originals = {name: make() for name, make in MODELS.items()}
        hub.files = {name: files_of(m, folder / name) for name, m in hub.originals.items()}
        for name, files in hub.files.items():
            hub.add(f"alice/{name}", files)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    with Client(hub.env(home)) as client:
        yield client


def cached(home, repo, name):
    """The file of a repository in the cache."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    return next(folder.glob(f"snapshots/*/{name}"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loader", LOADERS)
def test_the_loaded_model_is_the_pushed_one(hub, client, name, loader):
    model = hub.originals[name]
    given = {"CHANNELS": model.conv1.in_channels if name == "registered" else 3}
    code = f"{DESCRIBE}\n{LOADERS[loader].replace('REPO', name)}\nresult = describe(model)"
    found = client.run(code, **given)
    space = {"torch": torch, **given}
    exec(DESCRIBE, space)
    wanted = json.loads(json.dumps(space["describe"](model)))
    assert found[1:] == wanted[1:]
    assert torch.allclose(torch.tensor(found[0]), torch.tensor(wanted[0]), rtol=0, atol=0)


def test_other_keywords_and_where_it_came_from(hub, client):
    code = """
model = load_verified("alice/registered", num_classes=3, drop_block_rate=0.5)
result = [model.num_classes, model.act1.dropcluster.target_drop_prob, model.pretrained_cfg]
"""
    classes, rate, cfg = client.run(code)
    assert (classes, rate) == (3, 0.5)
    assert cfg["hf_hub_id"] == f"alice/registered@{hub.repo('alice/registered').sha('main')}"
    assert "file" not in cfg


def test_config_and_weights_are_of_one_commit(hub, client, tmp_path):
    repo = hub.add("alice/moving", hub.files["registered"])
    first = repo.sha("main")
    other = files_of(lenet(seed=7), tmp_path / "other")
    repo.branches["v1"] = first
    between = {"repo": "alice/moving", "path": "config.json"}
    hub.fault("get", **between, meanwhile=lambda: repo.commit("main", other, "in between"))
    old = client.run("result = load_verified('alice/moving').conv1.weight.sum().item()")
    weight = load_tensors(hub.files["registered"]["model.safetensors"])["conv1.weight"]
    assert old == weight.sum().item()
    new, tag, sha = client.run(
        "result = [load_verified('alice/moving', **g).conv1.weight.sum().item() for g in given]",
        given=[{}, {"revision": "v1"}, {"revision": first}],
    )
    assert tag == sha == old != new
    also = "result = load_verified('alice/moving@v1').conv1.weight.sum().item()"
    assert client.run(also) == old


def test_private_repositories_need_the_token(hub, client):
    hub.add("bob/private", hub.files["registered"], private=True)
    error = client.error("load_verified('bob/private')").error
    assert error.startswith("cannot load bob/private: the Hub answered 404")
    assert client.run("result = load_verified('bob/private', token='hf_bob').num_classes") == 10


def test_a_corrupted_download_is_noticed_and_mended(hub, client, home):
    hub.add("alice/flipped", hub.files["registered"])
    oid = hashlib.sha256(hub.files["registered"]["model.safetensors"]).hexdigest()
    shutil.rmtree(home / "hub" / "models--alice--flipped", ignore_errors=True)
    hub.fault("lfs-get", body="corrupt")
    outcome = client.run_all([("result = load_verified('alice/flipped').num_classes", {})])[0]
    assert outcome.value == 10
    (warning,) = outcome.warnings
    assert "is not what was pushed" in warning and "downloaded again" in warning
    content = cached(home, "alice/flipped", "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == oid


def test_a_file_that_stays_corrupted_is_named_and_taken_out_of_the_cache(hub, client, home):
    hub.add("alice/broken", hub.files["registered"])
    fault = hub.fault("lfs-get", body="corrupt", times=2)
    error = client.error("load_verified('alice/broken')").error
    assert fault.times == 0
    assert "\n" not in error and "its SHA-256 is" in error and "removed from the cache" in error
    path = error.split()[0]
    assert path.startswith(str(home)) and path.endswith("model.safetensors")
    with pytest.raises(StopIteration):
        cached(home, "alice/broken", "model.safetensors")
    # what timm loads afterwards is the true file again
    code = "result = timm.create_model('hf-hub:alice/broken', pretrained=True).conv1.weight.sum()"
    weight = load_tensors(hub.files["registered"]["model.safetensors"])["conv1.weight"]
    assert client.run(code + "; result = result.item()") == weight.sum().item()


def test_a_cache_that_timm_was_given_corrupted_is_found(hub, client, home):
    hub.add("alice/poisoned", hub.files["registered"])
    hub.fault("lfs-get", body="corrupt")
    client.run("timm.create_model('hf-hub:alice/poisoned', pretrained=True)")  # not a word
    outcome = client.run_all([("load_verified('alice/poisoned')", {})])[0]
    assert not outcome.error and "downloaded again" in outcome.warnings[0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_damaged_on_this_disk_are_mended(hub, client, home, name):
    repo = f"alice/damaged-{name.split('.')[0]}"
    hub.add(repo, hub.files["registered"])
    client.run(f"load_verified('{repo}')")
    path = cached(home, repo, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    outcome = client.run_all([(f"result = load_verified('{repo}').num_classes", {})])[0]
    assert outcome.value == 10 and str(path) in outcome.warnings[0]


def test_weights_that_the_config_does_not_describe_are_refused(hub, client, tmp_path):
    other = files_of(lenet(seed=3), tmp_path / "other")["model.safetensors"]
    hub.add("alice/mixed", {**hub.files["registered"], "model.safetensors": other})
    error = client.error("load_verified('alice/mixed')").error
    assert "is not the model.safetensors that was pushed to alice/mixed" in error


def test_pickles_are_refused(hub, client):
    stream = io.BytesIO()
    torch.save(hub.originals["registered"].state_dict(), stream)
    config = hub.files["registered"]["config.json"]
    hub.add("alice/pickled", {"config.json": config, "pytorch_model.bin": stream.getvalue()})
    error = client.error("load_verified('alice/pickled')").error
    assert error == (
        "alice/pickled must have model.safetensors; it has pytorch_model.bin, and unpickling that "
        "can run code"
    )
    assert ("lfs-get", "alice/pickled") not in hub.calls


def config_with(hub, **changes) -> bytes:
    config = json.loads(hub.files["registered"]["config.json"])
    for key, value in changes.items():
        if isinstance(value, dict):
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_cfg": {"hf_hub_filename": "../../evil.bin"}}, "it has hf_hub_filename"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "it has file"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "it has checkpoint_path"),
        ({"model_args": {"pretrained_strict": False}}, "it has pretrained_strict"),
        ({"architecture": "../lenet5"}, "is a '../lenet5', no model of timm"),
        ({"architecture": "lenet5_dropclust"}, "(nearest: lenet5_dropcluster"),
        ({"architecture": 3}, "names no architecture"),
        ({"model_args": {"n_clusters": "six"}}, "does not give a model"),
        ({"model_args": {"nonsense": 1}}, "does not give a model"),
        ({"sha256": 5}, "sha256 in"),
        ({"sha256": "0" * 64}, "not " + "0" * 64),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_say_more_than_a_model(hub, client, changes, message):
    files = {**hub.files["registered"], "config.json": config_with(hub, **changes)}
    hub.add("alice/strange", files)
    outcome = client.error("load_verified('alice/strange')")
    assert outcome.kind == "UserError" and message in outcome.error
    assert "\n" not in outcome.error


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must have model.safetensors; it has .gitattributes"),
        ({"model.safetensors": save_tensors({"a": torch.zeros(1)})}, "there is no such file"),
        ({"config.json": b"{", "model.safetensors": b""}, "is not JSON"),
        ({"config.json": b"[]", "model.safetensors": b""}, "names no architecture"),
        ({"config.json": b'{"architecture": "lenet5_dropout"}', "model.safetensors": b"x" * 99},
         "does not give a model"),
    ],
)  # fmt: skip
def test_repositories_without_a_model(hub, client, files, message):
    hub.add("alice/odd", files)
    outcome = client.error("load_verified('alice/odd')")
    assert outcome.kind == "UserError" and message in outcome.error and "\n" not in outcome.error


def test_wrong_names_and_revisions(hub, client):
    wrong = {
        "alice/none": "answered 404 (Repository not found); there is no such repository",
        "alice/registered@v9": "there is no such revision",
        "alice": "named user/name or user/name@revision; got 'alice'",
        "alice/registered@": "named user/name or user/name@revision",
        "../etc/passwd": "named user/name or",
        "alice/..": "a repository is named user/name",
    }
    for repo, message in wrong.items():
        outcome = client.error("load_verified(repo)", repo=repo)
        assert outcome.kind == "UserError" and message in outcome.error, outcome.error
    with pytest.raises(UserError, match="a revision is given once; got 'v1' and 'v2'"):
        load_verified("alice/net@v1", revision="v2")


def test_a_local_folder_is_the_same_model(hub, tmp_path):
    for name, model in hub.originals.items():
        export_model(model, tmp_path / name)
        back = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        assert layer_settings(back) == layer_settings(model)
        saved, loaded = model.state_dict(), back.state_dict()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_offline_the_cache_is_checked_against_the_config(hub, client, home, tmp_path):
    client.run("load_verified('alice/registered'); load_verified('alice/attached')")
    with Client({**hub.env(home), "HF_HUB_OFFLINE": "1"}) as offline:
        outcome = offline.run_all([("result = load_verified('alice/registered').num_classes", {})])
        assert outcome[0].value == 10
        assert "is taken from the cache" in outcome[0].warnings[0]
        error = offline.error("load_verified('alice/none')").error
        assert error == "cannot load alice/none: offline mode is on; unset HF_HUB_OFFLINE"
        path = cached(home, "alice/attached", "model.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        assert "its SHA-256 is" in offline.error("load_verified('alice/attached')").error
        push = "push_to_hub(timm.create_model('lenet5_dropout'), 'alice/net', license='mit')"
        error = offline.error(push).error
        assert error == "cannot push to alice/net: offline mode is on; unset HF_HUB_OFFLINE"
