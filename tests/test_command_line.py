"""What every command shares: errors of one line without a usage, and readable help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from script import ROOT, load_script

from timm_structdrop.__main__ import COMMANDS
from timm_structdrop.__main__ import main as subcommands
from timm_structdrop.errors import UserError
from timm_structdrop.recipes import train_parser
from timm_structdrop.recipes.build import build_model
from timm_structdrop.recipes.validate_flags import validate_parser
from timm_structdrop.version import __version__
from tools import card, package

SCRIPTS = {"train": load_script("train").main, "validate": load_script("validate").main}
TOOLS = {"tools.card": card.main, "tools.package": package.main}
WRONG = [
    (
        "timm_structdrop lst",
        "COMMAND must be one of train, validate, list, inspect, .*'lst' (nearest: list)",
    ),
    ("timm_structdrop", "COMMAND must be one of train, validate, list, inspect, .*; got none"),
    ("timm_structdrop --x", "COMMAND must be one of .*; got '--x'"),
    ("timm_structdrop list x --layers", "--layers expected one argument"),
    ("timm_structdrop list --recipes --layers x", "--layers not allowed with argument --recipes"),
    ("timm_structdrop list a b", "there is nothing that takes the argument 'b'"),
    ("timm_structdrop push run a/b", "the following arguments are required: --license"),
    ("timm_structdrop push", "the following arguments are required: DIR, REPO, --license"),
    ("timm_structdrop fit lenet5", "the following arguments are required: --output"),
    ("timm_structdrop inspect lenet5 --outpt x", "unknown flag --outpt (nearest: --output,"),
    ("timm_structdrop inspect lenet5 --layers x", "--layers must be one of stages, convs; got 'x'"),
    ("timm_structdrop inspect lenet5 -b x", "-b/--batch-size must be a whole number; got 'x'"),
    ("timm_structdrop sweep x --seed 3", "unknown flag --seed (nearest: --seeds,"),
    ("timm_structdrop sweep x --jobs 0", "--jobs must be at least 1; got 0"),
    ("timm_structdrop list -- --epochs 3", "list takes no flags behind --; got ['--epochs', '3']"),
    ("tools.card --chek", "unknown flag --chek (nearest: --check,"),
    ("tools.package", "the following arguments are required: RUN"),
    ("train --sched cosin", "--sched must be one of cosine, .*; got 'cosin' (nearest: cosine"),
    ("train --epochs x", "--epochs must be a whole number; got 'x'"),
    ("train --lr x", "--lr must be a number; got 'x'"),
    ("train --epochs 0", "--epochs must be at least 1; got 0"),
    ("train --mean", "--mean expected at least one argument"),
    ("train --lr-base-scale x", "must be one of '', linear, sqrt; got 'x'"),
    ("validate --attack fgsm", "--attack must be pgd; got 'fgsm'"),
    ("validate --batch-size 0", "-b/--batch-size must be at least 1; got 0"),
    ("validate --corruptions fogg", "--corruptions: "),
    (
        "validate --model resnet20_dropblock --pretrained --dataset digits --num-samples 9",
        "--val-num-samples (--num-samples) says how long a streamed data set is",
    ),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_errors_are_one_line_without_a_usage(line, message, capsys):
    program, *words = line.split()
    rule = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(UserError, match=rule) as raised:
        {**SCRIPTS, **TOOLS}.get(program, subcommands)(words)
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


KEYWORDS = [
    ("lenet5_dropblock", "blocksize=3", "'blocksize' (nearest: block_size"),
    ("resnet20_dropcluster", "n_cluster=3", "'n_cluster' (nearest: n_clusters"),
    ("resnet18_dropblock", "zero_init_lst=3", "'zero_init_lst' (nearest: zero_init_last"),
    ("lenet5", "blocksize=3", "settings of lenet5; got 'blocksize'"),
]


@pytest.mark.parametrize(("model", "keyword", "message"), KEYWORDS)
def test_an_unknown_keyword_of_a_model_has_the_nearest_beside_it(model, keyword, message):
    flags = train_parser().parse_flags(["--model", model, "--model-kwargs", keyword])
    with pytest.raises(UserError, match=f"--model-kwargs must be.*{re.escape(message)}"):
        build_model(flags)


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_the_terminal_and_says_what_each_flag_is(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    calls = [(subcommands, ["--help"]), *((subcommands, [name, "--help"]) for name in COMMANDS)]
    for main, argv in (*calls, *((main, ["--help"]) for main in TOOLS.values())):
        try:
            main(argv)
        except SystemExit as end:
            assert end.code == 0
    pages = [capsys.readouterr().out, train_parser().format_help(), validate_parser().format_help()]
    for text in pages:
        examples = [line for line in text.splitlines() if line.startswith("    python")]
        too_long = [line for line in text.splitlines() if len(line) > columns]
        assert set(too_long) <= set(examples)
        assert "default: )" not in text and "None" not in text and "default: []" not in text
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", pages[0], flags=re.MULTILINE)


@pytest.mark.parametrize("parser", [train_parser(), validate_parser()], ids=["train", "validate"])
def test_every_flag_stands_in_a_group_with_a_help(parser):
    groups = [group for group in parser._action_groups if group._group_actions]
    for group in groups[1:]:  # the first one is argparse's, with --help
        assert len(group._group_actions) > 1, group.title
        assert all(action.help for action in group._group_actions), group.title
    assert [action.dest for action in groups[0]._group_actions] == ["help"]


def python(code, **env):
    """What a process of its own says on stderr: libraries read the environment at import."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    return done.stderr.decode()


def test_without_the_hub_the_packaged_weights_are_named(tmp_path):
    code = """
from train import main
from timm_structdrop.errors import run_command
argv = ["--model", "resnet18_dropcluster", "--pretrained", "--dataset", "digits"]
run_command(lambda: main(argv))
"""
    said = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert said == (
        "error: cannot load the weights of resnet18_dropcluster: offline mode is on; unset "
        "HF_HUB_OFFLINE; in the package: lenet5_dropcluster.digits, resnet20_dropcluster.digits\n"
    )


def test_what_the_hubs_client_says_is_said_once():
    code = """
import logging
from timm_structdrop.recipes.console import log_to_terminal
log_to_terminal()
logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
logging.getLogger("timm_structdrop.x").info("ours")
"""
    assert python(code).splitlines() == ["Retrying in 1s", "ours"]


def test_where_a_model_has_no_weights_the_packaged_ones_are_named():
    argv = ["--model", "resnet20_dropout", "--dataset", "digits"]
    for script, more in (("train", ["--pretrained"]), ("validate", [])):
        with pytest.raises(
            UserError, match=r"resnet20_dropout has none; in the package: resnet20_"
        ):
            SCRIPTS[script]([*argv, *more])


def test_the_installed_program_trains_where_there_is_no_repository(tmp_path):
    """Away from a clone: train, and what it says to type next is the program's own."""
    program = Path(sys.executable).with_name("timm-structdrop")
    flags = "--recipe digits-quickstart --epochs 1 --workers 0 --device cpu --log-interval 1000"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(*words):
        done = subprocess.run(
            [str(program), *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    assert run("--version") == (0, f"timm-structdrop {__version__}\n")
    code, text = run("train", *flags.split(), "--output", "out", "--experiment", "run")
    assert code == 0, text
    assert "Next: timm-structdrop validate --recipe digits-quickstart --checkpoint out/run" in text
    code, text = run("train", "--recipe", "digits-quickstrat")
    assert (code, text.count("\n")) == (2, 1) and text.startswith("error: unknown recipe")
