"""The one-line guarantee of the commands, and the hints behind unknown names."""

import errno
import os
import pickle
import subprocess
import sys
import traceback

import pytest
from torch.utils.data import DataLoader, Dataset

from timm_structdrop.errors import UserError, nearest, one_line, run_command


def outcome(capsys: pytest.CaptureFixture, error: BaseException) -> tuple[int | None, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("rate must be in [0, 1]; got 2"), "rate must be in [0, 1]; got 2"),
        (UserError("two\nlines\t and  more"), "two lines and more"),
        (UserError(), "UserError"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"),
            "No such file or directory: /a/b",
        ),
        (FileNotFoundError(), "FileNotFoundError"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "Permission denied: /a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "a worker process that reads images died (killed by signal: Killed); where memory is "
            "short, fewer --workers may help",
        ),
    ],
)
def test_what_a_user_did_wrong_is_one_line(capsys, error, line):
    assert outcome(capsys, error) == (2, f"error: {line}\n")


def test_ctrl_c_is_130_without_a_traceback(capsys):
    assert outcome(capsys, KeyboardInterrupt()) == (130, "")


@pytest.mark.parametrize(
    "bug", [ValueError("x"), RuntimeError("x"), OSError(errno.EBADF, "bad"), BrokenPipeError()]
)
def test_bugs_keep_their_traceback(bug):
    def main() -> None:
        raise bug

    with pytest.raises(type(bug)) as raised:
        run_command(main)
    assert raised.value is bug


def test_warnings_for_users_are_one_line_without_a_frame():
    program = (
        "import warnings\n"
        "from timm_structdrop.errors import run_command\n"
        "def main():\n"
        "    warnings.warn('two\\nlines', stacklevel=1)\n"
        "    warnings.warn('old', FutureWarning, stacklevel=1)\n"
        "run_command(main)\n"
        "warnings.warn('afterwards', stacklevel=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    first, *others = done.stderr.splitlines()
    assert first == "warning: two lines"
    assert [line for line in others if "Warning: " in line] == [
        "<string>:5: FutureWarning: old",
        "<string>:7: UserWarning: afterwards",
    ]


def test_success_returns():
    done = []
    run_command(lambda: done.append(1))
    assert done == [1]


def test_a_reader_that_leaves_is_no_traceback():
    program = (
        "from timm_structdrop.errors import run_command\n"
        "run_command(lambda: [print('line', i) for i in range(100000)])\n"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_nearest_names_the_closest_first():
    valid = ["resnet18", "resnet34", "vgg16", "LeNet5"]
    assert nearest("resnet_18", valid, n=1) == " (nearest: resnet18)"
    assert nearest("LENET", valid).startswith(" (nearest: LeNet5, ")
    assert nearest("zzz", valid).count(",") == 2
    assert nearest("anything", []) == ""


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        try:
            raise OSError("the cause")
        except OSError as cause:
            raise UserError(f"image {index}\ncannot be read") from cause


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_message_arrives_whole_and_alone(workers):
    with pytest.raises(UserError) as raised:
        list(DataLoader(Broken(), num_workers=workers))
    assert str(raised.value) == "image 0\ncannot be read"
    assert one_line(raised.value) == "image 0 cannot be read"
    # Its frames keep the loader's workers, which hang when the garbage collector stops them.
    traceback.clear_frames(raised.tb)


def test_user_errors_can_be_pickled():
    assert str(pickle.loads(pickle.dumps(UserError("a rule; got b")))) == "a rule; got b"
