"""The code of the README and of the guide runs as it stands, and their commands are known."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from timm_structdrop.__main__ import COMMANDS, command_parser
from timm_structdrop.layers import regularizers
from timm_structdrop.recipes import parse_with_sources, recipe_names, train_parser
from timm_structdrop.recipes.validate_flags import validate_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "training.md").read_text()
TEXT = README + GUIDE
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]


def test_there_are_examples():
    assert len(PYTHON) >= 2
    assert len(SHELL) >= 4


def test_the_python_examples_run():
    names = {"loader": [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))] * 2}
    for code in PYTHON:
        exec(code, names)
    assert names["model"].act1.dropcluster.fitted_at == 1


def commands(*start):
    """The words behind ``start`` of the commands that begin with it."""
    for line in SHELL:
        for part in line.split("&&"):
            words = shlex.split(part)
            if words[: len(start)] == list(start):
                yield words[len(start) :]


@pytest.mark.parametrize("flags", list(commands("python", "train.py")), ids=" ".join)
def test_the_training_commands_are_understood(flags):
    parsed = parse_with_sources(train_parser(), flags)
    if "--recipe" in flags:
        assert parsed.recipe in recipe_names()


@pytest.mark.parametrize("flags", list(commands("python", "validate.py")), ids=" ".join)
def test_the_validation_commands_are_understood(flags):
    validate_parser().parse_flags(flags)


@pytest.mark.parametrize("words", list(commands("python", "-m", "timm_structdrop")), ids=" ".join)
def test_the_other_commands_are_understood(words):
    command_parser(words[0]).parse_flags(words[1:])


def test_every_flag_in_the_text_is_one_with_a_help():
    parsers = [train_parser(), validate_parser(), *map(command_parser, COMMANDS)]
    known = {
        flag: action for parser in parsers for flag, action in parser._option_string_actions.items()
    }
    known["--device-modules"] = known["--model"]  # of timm's train.py
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT):
        assert flag in known and known[flag].help, flag


def test_it_gives_one_command_for_the_main_job_and_one_for_the_tests():
    assert sum("pip install" in line and "train.py" in line for line in SHELL) == 1
    assert sum("pip install" in line and line.endswith("pytest") for line in SHELL) == 1


def test_the_table_names_every_regularizer_with_its_paper():
    for name, entry in regularizers.items():
        (row,) = (line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        authors = entry.paper.citation.split(",")[0]
        assert f"| [{authors}]({entry.paper.url}) |" in row, name


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
