"""Drop schedules: pure functions of the update index, and what they do to layers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import DropBlock2d
from timm_structdrop.training import DropSchedule, live_drop_prob, schedule_shapes


def model(*rates: float) -> nn.Module:
    return nn.Sequential(*(DropBlock2d(drop_prob=rate) for rate in rates))


def slow_factor(shape: str, update: int, total: int, start: int) -> float:
    """The shapes as a table of cases, written from their names."""
    if update < start:
        return {"linear": 0.0, "delayed": 0.0, "cosine": 0.0}.get(shape, 1.0)
    part = 1.0 if update >= total else (update - start) / (total - start)
    if shape in ("constant", "delayed"):
        return 1.0
    if shape == "linear":
        return part
    if shape == "inverse":
        return 1.0 - part
    if shape == "v":
        return 1.0 - 2 * part if part < 0.5 else 2 * part - 1.0
    return math.sin(math.pi * part / 2) ** 2


@given(
    shape=st.sampled_from(sorted(schedule_shapes)),
    total=st.integers(1, 200),
    start=st.integers(0, 199),
    update=st.integers(0, 500),
)
def test_factors_are_those_of_the_formulas(shape, total, start, update):
    start %= total
    schedule = DropSchedule(model(0.1), shape, total_updates=total, start_update=start)
    factor = schedule.factor(update)
    assert factor == pytest.approx(slow_factor(shape, update, total, start), abs=1e-12)
    assert 0.0 <= factor <= 1.0


@pytest.mark.parametrize(
    ("shape", "ends"),
    [
        ("constant", (1, 1, 1)),
        ("linear", (0, 0.5, 1)),
        ("inverse", (1, 0.5, 0)),
        ("v", (1, 0, 1)),
        ("cosine", (0, 0.5, 1)),
    ],
)
def test_beginning_middle_and_end(shape, ends):
    schedule = DropSchedule(model(0.1), shape, total_updates=10)
    assert [schedule.factor(update) for update in (0, 5, 10)] == pytest.approx(ends)


def test_delayed_begins_at_its_start():
    schedule = DropSchedule(model(0.1), "delayed", total_updates=10, start_update=4)
    assert [schedule.factor(update) for update in (3, 4)] == [0.0, 1.0]


def test_every_layer_moves_towards_its_own_target():
    layers = model(0.1, 0.4)
    factor = DropSchedule(layers, "linear", total_updates=8).step(2)
    assert factor == 0.25
    assert [layer.rate() for layer in layers] == pytest.approx([0.025, 0.1])
    assert [float(layer.drop_prob) for layer in layers] == pytest.approx([0.025, 0.1])
    assert live_drop_prob(layers) == pytest.approx(0.0625)
    assert live_drop_prob([]) is None


def test_a_resumed_schedule_continues_at_the_right_rate():
    through, resumed = model(0.3), model(0.3)
    for update in range(8):
        DropSchedule(through, "cosine", total_updates=10).step(update)
    DropSchedule(resumed, "cosine", total_updates=10).step(7)
    assert torch.equal(through[0].drop_prob, resumed[0].drop_prob)


def test_layers_can_be_given_one_by_one():
    layers = model(0.2, 0.2)
    DropSchedule([layers[1]], "inverse", total_updates=2).step(1)
    assert [layer.rate() for layer in layers] == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"shape": "linaer", "total_updates": 5}, "nearest: linear"),
        ({"shape": "linear", "total_updates": 0}, "total_updates must be at least 1; got 0"),
        (
            {"shape": "linear", "total_updates": 5, "start_update": 5},
            r"in \[0, total_updates = 5\)",
        ),
        ({"shape": "linear", "total_updates": 5, "start_update": -1}, "got -1"),
    ],
)
def test_wrong_settings_state_the_rule(settings, rule):
    with pytest.raises(UserError, match=rule):
        DropSchedule(model(0.1), **settings)


def test_a_model_without_layers_and_a_negative_update_are_errors():
    with pytest.raises(UserError, match="structured layers"):
        DropSchedule(nn.Linear(2, 2), "linear", total_updates=5)
    with pytest.raises(UserError, match="got -1"):
        DropSchedule(model(0.1), "linear", total_updates=5).factor(-1)
