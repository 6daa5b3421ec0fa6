"""Whatever a user writes into a layer, a recipe or a command line, the answer is a layer, flags, or
an error that says what is wrong; never another exception."""

import math
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from script import load_script

from timm_structdrop.errors import UserError
from timm_structdrop.layers import regularizers
from timm_structdrop.recipes import parse_structdrop, parse_with_sources, train_parser
from timm_structdrop.recipes.build import build_model
from timm_structdrop.recipes.packaged import read_mapping, read_table
from timm_structdrop.recipes.validate_flags import parse_validate_flags

train = load_script("train")
quick = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.floats(-0.5, 1.5),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -(10**30), 10**30]),
)
SCALARS = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=6),
    st.sampled_from(
        ["exact", "paper", "valid", "all", "floor", "stochastic", "cam", "mean", "batch", "0.1"]
    ),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.tuples(NUMBERS, NUMBERS))
NAMES = sorted(regularizers)


def usual_settings(name: str) -> tuple[str, ...]:
    return ("drop_prob", *regularizers[name].layer.setting_names())


@st.composite
def layers(draw):
    """A regularizer, some settings that may be anything, and a map."""
    name = draw(st.sampled_from(NAMES))
    given = draw(st.dictionaries(st.sampled_from(usual_settings(name)), VALUES, max_size=3))
    size = draw(st.tuples(*[st.integers(1, 9)] * 2))
    channels = draw(st.integers(1, 5))
    return name, given, channels, size


@st.composite
def shapes(draw, channels, size):
    """Mostly the map that a layer is for, with any batch; else any shape."""
    fits = st.tuples(st.integers(0, 3), st.just(channels), *map(st.just, size))
    return draw(st.one_of(fits, st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple)))


@quick
@given(st.data())
def test_a_layer_or_an_error_and_activations_or_an_error(data):
    name, given_settings, channels, size = data.draw(layers())
    try:
        layer = regularizers[name].layer.build(channels, size, **given_settings)
    except (ValueError, TypeError) as error:  # of numbers that are none, as Python says it
        assert str(error)
        return
    shape = data.draw(shapes(channels, size))
    x = torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets that were not given, and fits of few samples
        try:
            out = layer.train()(x)
        except ValueError as error:
            assert str(error)
            return
    assert out.shape == x.shape and not torch.isnan(out).any()
    assert torch.equal(layer.eval()(x), x)


FLAGS = sorted(train_parser().flags())
YAML_VALUES = st.recursive(
    st.one_of(SCALARS, st.sampled_from(["lenet5_dropblock", "digits", "cosine", "linear"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
RECIPES = st.dictionaries(
    st.one_of(st.sampled_from(FLAGS), SCALARS.filter(lambda key: key == key)), YAML_VALUES,
    max_size=4,
)  # fmt: skip


@settings(quick, max_examples=40)
@given(RECIPES)
def test_flags_or_an_error_from_any_yaml(tmp_path, values):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    for parse in (lambda a: parse_with_sources(train_parser(), a), parse_validate_flags):
        try:
            parse(["--config", str(config)])
        except UserError as error:
            assert str(error)


@quick
@given(st.one_of(st.text(max_size=40), RECIPES.map(yaml.safe_dump), st.binary(max_size=40)))
def test_flags_or_an_error_from_any_file(tmp_path, content):
    config = tmp_path / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "ignore"))
    try:
        parse_with_sources(train_parser(), ["--config", str(config)])
    except UserError as error:
        assert str(error)


@quick
@given(
    st.dictionaries(
        st.sampled_from(["paper", "table", "about", "metric", "runs", "base", "cells", "x"]),
        st.one_of(YAML_VALUES, st.dictionaries(st.text(max_size=4), RECIPES, max_size=2)),
    )
)
def test_a_table_or_an_error_from_any_yaml(values):
    try:
        read_table("mine", yaml.safe_dump(values))
    except UserError as error:
        assert str(error)


@quick
@given(st.text(max_size=30))
def test_a_mapping_or_an_error_from_any_text(text):
    for read in (lambda: read_mapping(text, "x"), lambda: parse_structdrop(text)):
        try:
            read()
        except UserError as error:
            assert str(error)


WORDS = st.lists(
    st.one_of(
        st.sampled_from([f"--{flag.replace('_', '-')}" for flag in FLAGS]),
        SCALARS.map(str),
        st.sampled_from(["block_size=3", "n_clusters=x", "=", "a=b=c", "dropout:p=[", "-"]),
    ),
    max_size=6,
)  # fmt: skip


@quick
@given(WORDS)
def test_flags_or_an_error_from_any_command_line(words):
    try:
        parse_with_sources(train_parser(), words)
    except UserError as error:
        assert str(error)


ATTACHED = st.sampled_from(
    ["", "dropblock:block_size=3", "dropcluster:n_clusters=(2,", "camdrop:stages=(9,)",
     "rblock:where=x", "dropout:drop_prob=2", "spatialdropout:modules=['act1']", "dropblock:x=1",
     "dropcluster:n_clusters=[3]", "dropblock:stages=3", "dropblock:modules=act1,img_size=x"]
)  # fmt: skip


@settings(quick, max_examples=80)
@given(
    st.sampled_from([f"lenet5_{name}" for name in NAMES if name != "stochasticdepth"] + ["lenet5"]),
    st.dictionaries(
        st.sampled_from(
            ["block_size", "stages", "where", "modules", "img_size", "n_clusters", "keep_prob",
             "gamma", "guide", "nothing", "drop_block_rate", "num_classes", "in_chans"]
        ),
        VALUES, max_size=2,
    ),
    ATTACHED,
)  # fmt: skip
def test_a_model_or_an_error_from_any_model_flags(model, keywords, attached):
    flags = train_parser().parse_flags(["--model", model, "--num-classes", "3", "--in-chans", "1"])
    flags.model_kwargs = keywords
    flags.structdrop = [attached] if attached else []
    try:
        assert isinstance(build_model(flags), torch.nn.Module)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system [exit]", "&a [*a]", "? {}"])
def test_yaml_that_is_more_than_values(text, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(UserError):
        parse_with_sources(train_parser(), ["--config", str(config)])
