"""Every public name says what it is; in the rooms of the maths also its arguments and shapes."""

import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import timm_structdrop

MATHS = ("timm_structdrop.layers", "timm_structdrop.cluster")
# what every nn.Module has; the class says what is particular about it
KNOWN_METHODS = {"forward", "extra_repr"}
# such as (B, C, H, W), (2B, ...), (..., n, d), (C,)
SHAPE = re.compile(r"\((?:\.\.\.|\d?[A-Za-z]'*),[^()]*|\b0-d\b|any shape")


def modules():
    """Every module of the package."""
    yield timm_structdrop
    for found in pkgutil.walk_packages(timm_structdrop.__path__, "timm_structdrop."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def public_names():
    """The functions and classes of each `__all__`, or without underscore, under their full name."""
    seen = {}
    for module in modules():
        named = getattr(module, "__all__", None)
        for name in named or [name for name in vars(module) if not name.startswith("_")]:
            found = getattr(module, name)
            if not (inspect.isclass(found) or inspect.isroutine(found)):
                continue
            home = getattr(found, "__module__", None) or ""
            if home == module.__name__ or (named and home.startswith("timm_structdrop")):
                seen[f"{home}.{found.__qualname__}"] = found
    return seen


def methods(cls):
    """(name, function) of the public methods and properties that the class itself defines."""
    for name, member in vars(cls).items():
        member = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(member) and name not in KNOWN_METHODS:
            yield name, member


def signature_of(found):
    """What a function takes, a class in its own constructor or a named tuple as its fields."""
    if not inspect.isclass(found):
        return {name: p.annotation for name, p in inspect.signature(found).parameters.items()}
    if hasattr(found, "_fields"):
        return inspect.get_annotations(found)
    if "__init__" not in vars(found):
        return {}
    parameters = inspect.signature(found.__init__).parameters
    return {name: p.annotation for name, p in parameters.items() if name != "self"}


def described(docstring):
    """The names that the sections of arguments and attributes describe, one or several a line."""
    names = set()
    for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: +.*)?\n?)*)", docstring, re.M):
        for line in textwrap.dedent(section).splitlines():
            entry = re.match(r"([\w*]+(?:, [\w*]+)*):", line)
            names |= set(entry[1].replace("*", "").split(", ")) if entry else set()
    return names


PUBLIC = public_names()
IN_MATHS = {name: found for name, found in PUBLIC.items() if name.startswith(MATHS)}


def takes_tensors(found):
    return any("Tensor" in str(annotation) for annotation in signature_of(found).values())


def own_docstring(found):
    """Not that of a parent."""
    return inspect.cleandoc(
        vars(found).get("__doc__") or "" if inspect.isclass(found) else found.__doc__ or ""
    )


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_it_has_a_docstring(name):
    docstring = own_docstring(PUBLIC[name])
    assert len(docstring.split()) >= 3, f"{name} needs a docstring; got {docstring!r}"
    assert not docstring.startswith(f"{name.rpartition('.')[2]}("), f"{name}: dataclass wrote it"


@pytest.mark.parametrize("name", sorted(n for n, found in PUBLIC.items() if inspect.isclass(found)))
def test_its_methods_have_docstrings(name):
    bare = [method for method, function in methods(PUBLIC[name]) if not function.__doc__]
    inherited = {m for m in bare for base in PUBLIC[name].__mro__[1:] if getattr(base, m, None)}
    assert not set(bare) - inherited, f"{name} has methods without a docstring"


@pytest.mark.parametrize("name", sorted(IN_MATHS))
def test_every_argument_of_the_maths_is_described(name):
    docstring = own_docstring(IN_MATHS[name])
    known = described(docstring)
    if not known:  # a short docstring says all in a sentence
        known = set(re.findall(r"``(\w+)", docstring))
    missing = set(signature_of(IN_MATHS[name])) - known
    assert not missing, f"{name} does not describe {sorted(missing)}"


@pytest.mark.parametrize(
    "name", sorted(name for name, found in IN_MATHS.items() if takes_tensors(found))
)
def test_the_shapes_of_tensors_are_stated(name):
    docstring = own_docstring(IN_MATHS[name])
    assert SHAPE.search(docstring), f"{name} takes tensors and states no shape"
