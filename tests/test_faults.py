"""What happens to a training from outside: it is killed, told to end, runs out of disk, loses a
worker or a process, meets a broken image. Nothing that was saved is lost, and the end is one line.
"""

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from children import Child
from script import write_images
from test_resume import FLAGS, assert_same_run

from timm_structdrop.errors import UserError
from timm_structdrop.models.weights import read_file
from timm_structdrop.training import find_resume

KILLS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def start(tmp_path, images):
    """Starts train.py into `tmp_path`/run; ends what is left of it."""
    children = []

    def child(*flags: str, env: dict[str, str] | None = None, **settings) -> Child:
        output = ("--data-dir", str(images), "--output", str(tmp_path), "--experiment", "run")
        argv = flags if "--resume" in flags else (*FLAGS, *output, *flags)
        log = tmp_path / f"log{len(children)}"
        children.append(Child("train", argv, log, env, **settings))
        return children[-1]

    yield child
    for one in children:
        if one.process.exitcode is None:
            one.kill()


def errors(child: Child) -> list[str]:
    """The lines of its end; there is no traceback and no bare class of an exception."""
    assert "Traceback" not in child.said, child.said
    return [line for line in child.said.splitlines() if line.startswith("error: ")]


def check_one_line(child: Child, *words: str) -> None:
    (line,) = errors(child)
    assert child.said.endswith(line + "\n"), child.said
    for word in words:
        assert word in line, line


def position(folder: Path) -> tuple[int, int]:
    """(epoch, batch) that the run would go on from; (0, 0) where nothing is saved."""
    try:
        saved = read_file(find_resume(folder))["position"]
    except UserError:
        return 0, 0
    return saved["epoch"], saved["batch"]


def check_all_whole(folder: Path) -> None:
    for file in folder.glob("*.pth.tar"):
        assert "optimizer" in read_file(file), file


def test_killed_twenty_times_at_random_it_is_the_same_run(start, tmp_path):
    longer = ("--epochs", "20")
    whole = start(*longer, "--experiment", "whole")
    whole.wait_for_words("Writing to")
    begun = time.monotonic()
    assert whole.end() == 0, whole.said
    share = (time.monotonic() - begun) / KILLS
    draw = random.Random(0)
    folder = tmp_path / "run"
    reached, positions = (0, 0), set()
    for _ in range(KILLS):
        again = ("--resume", str(folder)) if reached != (0, 0) else longer
        child = start(*again)
        child.wait_for_words("Train ")  # of the first batch
        time.sleep(draw.uniform(0, 0.7 * share))
        child.kill()
        assert child.process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
        check_all_whole(folder)
        now = position(folder)
        assert now >= reached, "a checkpoint is lost"
        reached = now
        positions.add(now)
    assert len(positions) > KILLS // 4, "killed too early to test anything"
    last = start("--resume", str(folder))
    assert last.end() == 0, last.said
    assert not list(folder.glob("recovery-*"))
    for file in folder.glob("*.tmp"):  # of a kill in the middle of writing
        file.unlink()
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("group", [False, True])
def test_sigterm_saves_and_ends_with_143(start, tmp_path, group):
    """Also when the workers get it, as from `timeout`, Ctrl-C's cousins and batch systems."""
    child = start("--recovery-interval", "0", "--epochs", "500", "--workers", "2")
    child.wait_until(lambda: (tmp_path / "run" / "checkpoint-1.pth.tar").exists())
    child.signal(signal.SIGTERM, group)
    assert child.end(30) == 143, child.said
    folder = tmp_path / "run"
    assert "Traceback" not in child.said
    assert f"stopped; go on with: python train.py --resume {folder}" in child.said
    epoch, _ = position(folder)
    again = start("--resume", str(folder), "--epochs", str(epoch + 1))
    assert again.end() == 0, again.said
    rows = (folder / "summary.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(epoch + 1))


def test_a_disk_that_fills_up_leaves_the_checkpoint_of_before(start, tmp_path):
    child = start("--epochs", "500", "--recovery-interval", "0", "--checkpoint-hist", "500")
    folder = tmp_path / "run"
    child.wait_until(lambda: (folder / "checkpoint-0.pth.tar").exists())
    child.limit_files(40_000)
    assert child.end(60) == 2
    check_one_line(child, "cannot be written: File too large", str(folder))
    assert not list(folder.glob("*.tmp"))
    check_all_whole(folder)
    assert position(folder)[0] >= 1
    again = start("--resume", str(folder), "--epochs", str(position(folder)[0] + 1))
    assert again.end() == 0, again.said


def test_a_worker_that_is_killed_is_one_line_that_says_how_to_go_on(start, tmp_path):
    child = start("--epochs", "500", "--workers", "2")
    folder = tmp_path / "run"
    child.wait_until(lambda: (folder / "checkpoint-0.pth.tar").exists())
    os.kill(child.wait_until(child.children)[0], signal.SIGKILL)
    assert child.end(30) == 2, child.said
    check_one_line(
        child, "worker process", "--workers",
        f"go on with: python train.py --resume {folder}",
    )  # fmt: skip
    again = start("--resume", str(folder), "--workers", "0", "--epochs", "2")
    assert again.end() == 0, again.said


def test_without_anything_saved_it_does_not_say_to_resume(start, tmp_path):
    child = start("--epochs", "500", "--workers", "2", "--recovery-interval", "0",
                  "--val-interval", "500")  # fmt: skip
    child.wait_for_words("Train 2/")
    os.kill(child.wait_until(child.children)[0], signal.SIGKILL)
    assert child.end(30) == 2, child.said
    check_one_line(child, "nothing is saved yet", "start again")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_is_cut_off_is_one_line_that_names_it(start, tmp_path, workers):
    data = write_images(tmp_path / "data")
    broken = data / "train" / "class1" / "7.png"
    broken.write_bytes(broken.read_bytes()[:90])
    child = start("--data-dir", str(data), "--workers", workers)
    assert child.end(60) == 2, child.said
    check_one_line(child, f"images must be readable; got {broken}")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def pair(start, tmp_path):
    """Two processes of one run, well into it."""
    port = free_port()

    def started(*flags: str) -> list[Child]:
        ranks = [
            start(*flags, env={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            })
            for rank in range(2)
        ]  # fmt: skip
        ranks[0].wait_until(lambda: (tmp_path / "run" / "checkpoint-0.pth.tar").exists())
        return ranks

    return started


@pytest.mark.parametrize("dead", [0, 1])
def test_when_a_process_of_the_run_dies_the_other_ends_in_one_line(pair, tmp_path, dead):
    ranks = pair("--epochs", "500")
    ranks[dead].kill()
    begun = time.monotonic()
    other = ranks[1 - dead]
    assert other.end(60) == 2, other.said
    assert time.monotonic() - begun < 30
    check_one_line(other, f"process {1 - dead} of the run has lost another one", "--resume")
    check_all_whole(tmp_path / "run")
    again = position(tmp_path / "run")
    assert again > (0, 0)


def test_sigterm_to_one_process_of_a_run_stops_all_of_them_after_the_same_update(pair, tmp_path):
    ranks = pair("--epochs", "500", "--recovery-interval", "0")
    ranks[1].signal(signal.SIGTERM)
    assert [rank.end(60) for rank in ranks] == [143, 143], [rank.said for rank in ranks]
    assert not any("Traceback" in rank.said for rank in ranks)
    assert "stopped; go on with" in ranks[0].said
    assert find_resume(tmp_path / "run").name.startswith("recovery-")
