"""What we use of timm: public names, and the private ones listed here with their reason."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from timm.models import get_model_args
from torch import nn

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "timm",
    "timm.data",
    "timm.layers",
    "timm.loss",
    "timm.models",
    "timm.optim",
    "timm.scheduler",
    "timm.task",
    "timm.utils",
}
PRIVATE = {
    "_model_args": (
        "timm's factory writes a model's arguments into this attribute and its exports read it; "
        "variants and attached models add theirs, for which there is no public setter"
    ),
}
PACKAGE = sorted((ROOT / "timm_structdrop").rglob("*.py"))
FILES = [
    *PACKAGE,
    ROOT / "train.py",
    ROOT / "validate.py",
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
ASKING = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_timm(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a file imports from timm, and of what it takes from ``timm`` itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "timm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "timm":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield from re.findall(r"^timm(?:\.\w+)+$", ast.unparse(node))


USED = {path: set(names_of_timm(ast.parse(path.read_text()))) for path in FILES}


def members(tree: ast.AST) -> set[str]:
    """Private attributes that code takes of any object."""
    nodes = list(ast.walk(tree))
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    asked = [call.args[1] for call in calls if ast.unparse(call.func) in ASKING]
    found |= {str(name.value) for name in asked if isinstance(name, ast.Constant)}
    return {name for name in found if is_private(name)}


def own_definitions(tree: ast.AST) -> set[str]:
    """Functions and classes that a file defines, and attributes it sets on ``self``."""
    nodes = list(ast.walk(tree))
    stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return found | {node.attr for node in stored if ast.unparse(node.value) == "self"}


@pytest.fixture(scope="module")
def private_in_timm():
    files = Path(timm.__file__).parent.rglob("*.py")
    return set().union(*(re.findall(r"\b_[^\W_]\w*", file.read_text()) for file in files))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_names_come_from_the_public_roots_of_timm(path):
    for name in USED[path]:
        root = name if name in PUBLIC else name.rpartition(".")[0]
        assert root in PUBLIC, (
            f"{short(path)} uses {name}; import it from one of {', '.join(sorted(PUBLIC))}"
        )
        assert not is_private(name.rpartition(".")[2]), f"{short(path)} uses {name}"


@pytest.mark.parametrize("name", sorted(set().union(*USED.values()) - PUBLIC))
def test_the_installed_timm_has_the_name(name):
    root, _, last = name.rpartition(".")
    users = [short(path) for path in FILES if name in USED[path]]
    assert hasattr(importlib.import_module(root), last), (
        f"timm {timm.__version__} has no {last} in {root}; it is used in {', '.join(users)}"
    )


@pytest.mark.parametrize("path", FILES, ids=short)
def test_private_members_of_timm_are_listed(path, private_in_timm):
    tree = ast.parse(path.read_text())
    of_torch = {*dir(nn.Module), "_C"}
    found = (members(tree) & private_in_timm) - own_definitions(tree) - of_torch
    assert found <= PRIVATE.keys(), f"{short(path)} uses {found - PRIVATE.keys()}, private in timm"


@pytest.mark.parametrize("path", PACKAGE, ids=short)
def test_no_class_overrides_a_private_member_of_timm(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    for _, own in inspect.getmembers(module, inspect.isclass):
        if own.__module__ != module.__name__:
            continue
        for base in own.__mro__[1:]:
            if base.__module__.split(".")[0] == "timm":
                both = {name for name in vars(own).keys() & vars(base).keys() if is_private(name)}
                assert not both, f"{own.__qualname__} overrides {both} of timm's {base.__name__}"


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_every_listed_name_is_used(name):
    assert any(name in members(ast.parse(path.read_text())) for path in FILES), name


def test_timm_keeps_the_arguments_of_a_model_where_we_write_them():
    moved = f"timm {timm.__version__} moved _model_args: {PRIVATE['_model_args']}"
    model = timm.create_model("resnet26", num_classes=3, base_width=32)
    assert getattr(model, "_model_args", {}).get("base_width") == 32, moved
    model._model_args = {**model._model_args, "base_width": 16}
    assert get_model_args(model)["base_width"] == 16, moved
