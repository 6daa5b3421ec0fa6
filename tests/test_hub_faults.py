"""What the Hub, the network and the disk can do wrong: success or one line that names the cause,
and a repository that is whole."""

import hashlib
import json
import time

import pytest
import timm
import torch
from hub_client import Client
from hub_server import PUSH_CALLS, Hub

from timm_structdrop.hub import export_model

FILES = {"README.md", "config.json", "model.safetensors"}
PUSH = """
model = timm.create_model("lenet5_dropout", drop_block_rate=0.25)
torch.nn.init.constant_(model.conv1.weight, seed)
result = push_to_hub(model, repo, license="mit", **settings).commit_url
"""


def piece(repo, seed=1.0, **settings):
    return PUSH, {"repo": repo, "seed": seed, "settings": settings}


def export_files(folder, seed=0):
    """The files of a repository with weights of its own."""
    torch.manual_seed(seed)
    export_model(timm.create_model("lenet5_dropout"), folder / str(seed))
    return {file.name: file.read_bytes() for file in (folder / str(seed)).iterdir()}


def check_whole(hub, repo, pushes):
    """Nothing but whole pushes after what was there before."""
    history = hub.repo(repo).history if repo in hub.repos else []
    assert [text for _, text in history if text == "Upload model"] == ["Upload model"] * pushes
    for commit in hub.repo(repo).commits.values() if history else ():
        assert not set(commit) & FILES or set(commit) >= FILES - {"README.md"} or "old" in commit
    if pushes:
        files = hub.repo(repo).head()
        sha256 = json.loads(files["config.json"])["sha256"]
        assert sha256 in files["README.md"].decode()


def check_line(outcome, *words):
    assert outcome.kind == "UserError", f"{outcome.kind}: {outcome.error}"
    assert "\n" not in outcome.error and len(outcome.error) < 320, outcome.error
    assert "hf_alice" not in outcome.error
    for word in words:
        assert word in outcome.error, f"{word!r} is not in {outcome.error!r}"


REFUSALS = {401: "hf auth login", 403: "write access", 404: "no such repository"}


@pytest.mark.parametrize("status", REFUSALS)
def test_refusals_at_each_call_are_one_line(hub, client, status):
    calls = [call for call in PUSH_CALLS if call not in ("lfs-put", "lfs-verify")]
    pieces = []
    for call in calls:
        repo = f"alice/refused-{status}-{call}"
        if call != "create":  # to be refused that where it is there is no reason not to push
            hub.add(repo, {"README.md": b"# Mine\n", "old": b""})
        hub.fault(call, status, repo=repo if call not in ("create", "validate-yaml") else None)
        pieces.append(piece(repo))
        if call in ("create", "validate-yaml"):  # these do not name the repository
            code, given = pieces.pop()
            check_line(client.error(code, **given), str(status), REFUSALS[status])
    for (_, given), outcome in zip(pieces, client.run_all(pieces), strict=True):
        check_line(outcome, f"cannot push to {given['repo']}", str(status), REFUSALS[status])
    for call in calls:
        check_whole(hub, f"alice/refused-{status}-{call}", 0)


def test_tokens_that_are_wrong_missing_or_read_only(hub, client, tmp_path):
    wrong = {"hf_wrong": ("401", "hf auth login"), "hf_reader": ("403", "write access")}
    for token, words in wrong.items():
        check_line(client.error(PUSH, **piece("alice/token", token=token)[1]), *words)
    check_line(client.error(PUSH, **piece("bob/net")[1]), "403", "rights", "write access")
    assert "alice/token" not in hub.repos and "bob/net" not in hub.repos


def test_409_on_create_is_a_repository_that_is_there(hub, client):
    hub.add("alice/there", {})
    client.run(PUSH, **piece("alice/there")[1])
    check_whole(hub, "alice/there", 1)
    hub.fault("create", 409)  # of something else by that name, without its address
    check_line(client.error(PUSH, **piece("alice/elsewhere")[1]), "cannot push to alice/elsewhere")


def test_failures_that_pass_are_waited_for(hub, client):
    """Once 412, 429 (with Retry-After) or 500 at each call; one second of waiting, shared."""
    pieces = []
    shared = ("create", "validate-yaml", "lfs-put", "lfs-verify")
    for call in PUSH_CALLS:
        status = 412 if call == "commit" else 500
        repo = f"alice/once-{call}"
        hub.add(repo, {"README.md": b"# Mine\n", "old": b""})
        hub.fault(call, status, repo=None if call in shared else repo)
        pieces.append(piece(repo, seed=float(len(pieces) + 2)))
    for call in ("create", "preupload", "commit"):
        repo = f"alice/busy-{call}"
        hub.add(repo, {"README.md": b"# Mine\n", "old": b""})
        hub.fault(call, 429, repo=None if call in shared else repo, headers={"Retry-After": "1"})
        pieces.append(piece(repo, seed=float(len(pieces) + 2)))
    for (_, given), outcome in zip(pieces, client.run_all(pieces), strict=True):
        assert not outcome.error, f"{given['repo']}: {outcome.error}"
        check_whole(hub, given["repo"], 1)
        assert b"# Mine" in hub.repo(given["repo"]).head()["README.md"]
    assert all(not fault.times for fault in hub.faults)


def test_an_answer_that_is_lost_does_not_push_twice(hub, client):
    hub.fault("commit", 500, repo="alice/lost", after=True)
    client.run(PUSH, **piece("alice/lost", seed=3.5)[1])
    check_whole(hub, "alice/lost", 1)


def test_a_push_in_between_is_kept(hub, client):
    """Another push lands after this one has read the README: 412, and this one reads it again."""
    repo = hub.add("alice/race", {"README.md": b"# First\n", "old": b""})
    theirs = {**repo.head(), "README.md": b"# Second\n", "theirs": b""}
    hub.fault("validate-yaml", meanwhile=lambda: repo.commit("main", theirs, "theirs"))
    client.run(PUSH, **piece("alice/race", seed=4.5)[1])
    assert b"# Second" in repo.head()["README.md"] and "theirs" in repo.head()


@pytest.fixture(scope="module")
def stubborn(hub, client, tmp_path_factory):
    """Everything that is only given up after half a minute, waited for at once."""
    pieces = {}
    for call in ("info", "preupload", "lfs-batch", "commit"):
        repo = f"alice/always-{call}"
        hub.add(repo, {"README.md": b"# Mine\n", "old": b""})
        hub.fault(call, 503 if call == "commit" else 500, repo=repo, times=1e9)
        pieces[call] = piece(repo)
    repo = "alice/always-412"
    hub.add(repo, {})
    hub.fault("commit", 412, repo=repo, times=1e9)
    pieces["412"] = piece(repo)
    hub.add("alice/limited", {})
    hub.fault("info", 429, repo="alice/limited", times=1e9, headers={"Retry-After": "300"})
    pieces["limited"] = piece("alice/limited")
    files = export_files(tmp_path_factory.mktemp("model"))
    for status in (403, 500):
        hub.add(f"alice/load-{status}", files)
        hub.fault("info", status, repo=f"alice/load-{status}", times=1e9)
        pieces[f"load-{status}"] = (f"load_verified('alice/load-{status}')", {})
        hub.add(f"alice/weights-{status}", files)
        weights = {"repo": f"alice/weights-{status}", "path": "model.safetensors"}
        hub.fault("head", status, times=1e9, **weights)
        pieces[f"weights-{status}"] = (f"load_verified('alice/weights-{status}')", {})
    return dict(zip(pieces, client.run_all(list(pieces.values())), strict=True))


@pytest.mark.parametrize("call", ["info", "preupload", "lfs-batch", "commit"])
def test_failures_that_stay_are_one_line(hub, stubborn, call):
    status = "503" if call == "commit" else "500"
    check_line(stubborn[call], f"answered {status}", "problem of the Hub: try again later")
    check_whole(hub, f"alice/always-{call}", 0)


def test_a_conflict_or_a_limit_that_stays_is_one_line(hub, stubborn):
    check_line(stubborn["412"], "answered 412", "keeps changing the repository")
    check_line(stubborn["limited"], "answered 429", "too many requests")
    check_whole(hub, "alice/always-412", 0)


def test_loading_from_a_hub_that_fails_is_one_line(stubborn):
    for name in ("load", "weights"):
        check_line(stubborn[f"{name}-403"], f"cannot load alice/{name}-403", "answered 403")
        check_line(stubborn[f"{name}-500"], f"cannot load alice/{name}-500", "answered 500")


@pytest.mark.parametrize("damage", ["cut", "short", "corrupt"])
def test_damaged_downloads(hub, client, tmp_path, damage):
    """Once is mended or said; afterwards the cache holds the true file."""
    files = export_files(tmp_path, seed=ord(damage[1]))
    hub.add(f"alice/{damage}", files)
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    fault = hub.fault("lfs-get", body=damage, path=sha256)
    load = f"result = load_verified('alice/{damage}').conv1.weight.sum().item()"
    outcome = client.run_all([(load, {})])[0]
    assert fault.times == 0
    if outcome.error:  # of a cut one, a client that does not resume
        what = {"short": "ended early", "cut": "broke off"}[damage]
        check_line(outcome, f"cannot load alice/{damage}", what)
        outcome = client.run_all([(load, {})])[0]
    assert not outcome.error, outcome.error
    assert bool(outcome.warnings) == (damage == "corrupt")
    timms = load.replace("load_verified('alice/", "timm.create_model('hf-hub:alice/")
    again = client.run(timms.replace("')", "', pretrained=True)"))
    assert again == outcome.value


LIMITED = """
import resource
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
try:
    {code}
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""


@pytest.mark.parametrize("most", [0, 100, 100_000])
def test_a_full_disk_is_one_line(hub, client, tmp_path, most):
    push = LIMITED.format(code=PUSH.strip().replace("\n", "\n    "))
    check_line(client.error(push, most=most, **piece(f"alice/full-{most}")[1]), "File too large")
    assert f"alice/full-{most}" not in hub.repos
    repo = f"alice/full-load-{most}"
    hub.add(repo, export_files(tmp_path, seed=most + 1))
    load = f"load_verified('{repo}')"
    check_line(client.error(LIMITED.format(code=load), most=most), repo, "File too large")
    assert not client.run_all([(load, {})])[0].error  # nothing bad was left in the cache


def test_nobody_answers(client, hub, tmp_path):
    """Refused at once; not after the half minute in which the client repeats its calls."""
    with Hub() as other:
        env = other.env(tmp_path)
    with Client(env) as lonely:
        lonely.run("")
        start = time.monotonic()
        for code, given in (piece("alice/net"), ("load_verified('alice/net')", {})):
            check_line(lonely.error(code, **given), "alice/net", f"{other.url} cannot be reached")
        assert time.monotonic() - start < 5


def test_kill_in_mid_push_then_push_again(hub, client, tmp_path):
    hub.fault("lfs-put", seconds=1.0)
    with Client(hub.env(tmp_path)) as victim:
        seen = len(hub.calls)
        line = json.dumps([piece("alice/killed", seed=5.5)])
        victim.process.stdin.write(line + "\n")
        victim.process.stdin.flush()
        while not any(call == "lfs-put" for call, _ in hub.calls[seen:]):
            assert victim.process.poll() is None
            time.sleep(0.02)
        victim.process.kill()
        victim.process.wait()
    check_whole(hub, "alice/killed", 0)
    client.run(PUSH, **piece("alice/killed", seed=5.5)[1])
    check_whole(hub, "alice/killed", 1)
