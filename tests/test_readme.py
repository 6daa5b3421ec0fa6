"""The README's code runs as it stands, and its commands are ones the scripts know."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

from timm_structdrop.layers import regularizers
from timm_structdrop.recipes import parse_with_sources, recipe_names, train_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]


def test_there_are_examples():
    assert len(PYTHON) >= 2
    assert len(SHELL) >= 4


def test_the_python_examples_run():
    names = {"criterion": torch.nn.CrossEntropyLoss()}
    names["model"] = timm.create_model("resnet8_dropcluster", num_classes=3)
    for code in PYTHON:
        exec(code, names)


def train_commands():
    for line in SHELL:
        for part in line.split("&&"):
            words = shlex.split(part)
            if words[:2] == ["python", "train.py"]:
                yield words[2:]


@pytest.mark.parametrize("flags", list(train_commands()), ids=" ".join)
def test_the_training_commands_are_understood(flags):
    parsed = parse_with_sources(train_parser(), flags)
    if "--recipe" in flags:
        assert parsed.recipe in recipe_names()


def test_it_gives_one_command_for_the_main_job_and_one_for_the_tests():
    assert sum("pip install" in line and "train.py" in line for line in SHELL) == 1
    assert sum("pip install" in line and line.endswith("pytest") for line in SHELL) == 1


def test_the_table_names_every_regularizer():
    for name in regularizers:
        assert f"| `{name}` |" in README, name


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
