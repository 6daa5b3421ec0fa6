"""The rooms of the package and the one-way imports between them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from timm_structdrop.layers import regularizers

PACKAGE = Path(__file__).parent.parent / "timm_structdrop"

# A room may import only from the rooms before it.
ROOMS = [
    "version",
    "errors",
    "words",
    "files",
    "cluster",
    "layers",
    "models",
    "data",
    "training",
    "evaluation",
    "analysis",
    "hub",
    "recipes",
    "cli",
    "__init__",
    "__main__",
]
TORCH_ONLY = {"cluster", "layers"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute; got a relative one"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def room_of_import(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "timm_structdrop" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in ROOMS else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = ROOMS.index(room(path))
    for name in imported_modules(path):
        other = room_of_import(name)
        if other is not None and other != room(path):
            assert ROOMS.index(other) < own, f"{path.name} of {room(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_private_module_is_imported_in_its_own_room_only(path):
    for name in imported_modules(path):
        if room_of_import(name) not in (None, room(path)):
            of_room = PACKAGE.joinpath(*name.split(".")[1:3]).with_suffix(".py")
            private = of_room.stem.startswith("_") and of_room.is_file()
            assert not private, f"{path.name} of {room(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_maths_rooms_know_only_torch(path):
    if room(path) in TORCH_ONLY:
        foreign = {name.split(".")[0] for name in imported_modules(path)}
        assert foreign <= {"torch", "timm_structdrop"} | set(sys.stdlib_module_names), foreign


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_package_needs_nothing_of_the_repository_beside_it(path):
    beside = {file.stem for file in PACKAGE.parent.iterdir()} - {PACKAGE.name}
    assert not {name.split(".")[0] for name in imported_modules(path)} & beside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_regularizers_class_is_known_in_its_own_room_only(path):
    """Others ask the registry, and the class what it needs; one file is about DropBlock itself."""
    classes = {entry.layer.__name__ for entry in regularizers.values()}
    if room(path) != "layers" and path.name != "inference_drop.py":
        ours = (name for name in imported_modules(path) if name.startswith("timm_structdrop."))
        assert not classes & {name.rpartition(".")[2] for name in ours}


def test_every_file_is_in_a_room():
    for path in FILES:
        assert room(path) in ROOMS, path


def test_import_loads_no_heavy_library():
    code = (
        "import sys, timm\nbefore = set(sys.modules)\nimport timm_structdrop\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) - set(sys.stdlib_module_names) == {"timm_structdrop"}
