"""What every registered regularizer keeps; a layer that registers itself is tested here as well."""

import copy
import inspect
import json
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from timm_structdrop.layers import Regularizer, StructDropLayer, register, regularizers

CHANNELS, SIZE = 12, (8, 6)
SHAPE = (6, CHANNELS, *SIZE)


# at the rate of its default CamDrop seldom drops anything of maps this small
OFTEN = {"camdrop": {"rank": "valid", "seed_rate": "candidates"}}


def build(name, drop_prob=0.4, **settings):
    """A layer in training, ready to drop something."""
    torch.manual_seed(0)
    settings = {**OFTEN.get(name, {}), **settings}
    layer = regularizers[name].layer.build(CHANNELS, SIZE, drop_prob=drop_prob, **settings)
    if hasattr(layer, "fit"):
        layer.fit(smooth_maps())
    return layer.train()


def smooth_maps():
    """Activations without zeros whose neighbouring pixels are correlated."""
    noise = torch.randn(8, CHANNELS, SIZE[0] + 2, SIZE[1] + 2)
    return nn.functional.avg_pool2d(noise, 3, stride=1)


every = pytest.mark.parametrize("name", sorted(regularizers))
# a plain forward carries no target: the layer says so once and does without
pytestmark = pytest.mark.filterwarnings("ignore:.*no target was given to this forward")


@every
def test_the_entry_says_what_it_is(name):
    entry = regularizers[name]
    assert isinstance(entry, Regularizer)
    assert entry.name == entry.layer.regularizer == name
    assert issubclass(entry.layer, StructDropLayer)
    assert entry.summary and entry.paper
    assert inspect.getdoc(entry.layer)


@every
def test_a_name_is_taken_once_and_plain(name):
    with pytest.raises(ValueError, match=f"must be unique; '{name}' is already registered"):
        register(name, summary="", paper="")
    with pytest.raises(ValueError, match=r"must be lower-case letters and digits; got '.+'"):
        register(f"{name}_2", summary="", paper="")


@every
def test_it_drops_and_scales_in_training(name):
    layer = build(name)
    x = smooth_maps()
    out = layer(x)
    assert out.shape == x.shape
    assert 0 < int((out == 0).sum()) < out.numel()
    assert torch.equal(out.sign()[out != 0], x.sign()[out != 0])
    assert float((out / x).max()) > 1.0


@every
def test_the_mean_is_kept(name):
    """Over many draws a map of ones stays one on average, within five standard errors."""
    layer = build(name, drop_prob=0.3)
    means = torch.stack([layer(torch.ones(SHAPE)).mean() for _ in range(200)])
    assert abs(float(means.mean()) - 1.0) < 5 * float(means.std()) / math.sqrt(200) + 1e-6


@every
def test_it_is_the_identity_in_eval(name):
    x = smooth_maps()
    layer = build(name).eval()
    state = torch.get_rng_state()
    assert layer(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_it_is_the_identity_at_rate_zero(name):
    x = smooth_maps()
    assert torch.equal(build(name, drop_prob=0.0)(x), x)
    layer = build(name)
    layer.scale_drop_prob(0.0)
    assert torch.equal(layer(x), x)


@every
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_memory_format_are_kept_and_gradients_are_finite(name, dtype, memory_format):
    layer = build(name).to(dtype)
    x = smooth_maps().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype and out.shape == x.shape
    assert out.is_contiguous(memory_format=memory_format)
    out.float().square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad == 0, out == 0)


@every
def test_the_rate_stays_exact_in_half_precision(name):
    layer = build(name, drop_prob=0.1).half().to(torch.bfloat16)
    assert layer.drop_prob.dtype == torch.float32
    assert float(layer.drop_prob) == pytest.approx(0.1, rel=1e-7)
    assert layer.rate() == 0.1


@every
def test_autocast(name):
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), build(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(4, 3, *SIZE))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert torch.isfinite(model[0].weight.grad).all()


@every
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_a_rate_out_of_range_is_refused(name, rate):
    message = rf"drop_prob must be in \[0, 1\); got {rate}"
    with pytest.raises(ValueError, match=message):
        regularizers[name].layer.build(CHANNELS, SIZE, drop_prob=rate)
    layer = build(name)
    with pytest.raises(ValueError, match=message):
        layer.set_drop_prob(rate)
    assert layer.rate() == layer.target_drop_prob == 0.4
    for factor in (-0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"must be in \[0, 1\]; got {factor}"):
            layer.scale_drop_prob(factor)


@every
def test_a_schedule_moves_the_live_rate_and_leaves_the_target(name):
    layer = build(name)
    layer.scale_drop_prob(0.25)
    assert layer.rate() == pytest.approx(0.1)
    assert float(layer.drop_prob) == pytest.approx(0.1)
    assert layer.settings()["drop_prob"] == 0.4
    layer.set_drop_prob(0.2)
    assert layer.rate() == layer.target_drop_prob == 0.2
    assert float(layer.drop_prob) == pytest.approx(0.2)


@every
def test_settings_are_json_and_build_the_same_layer(name):
    layer = build(name, drop_prob=0.3)
    settings = layer.settings()
    text = json.dumps(settings)
    again = regularizers[name].layer.build(CHANNELS, SIZE, **json.loads(text))
    assert json.dumps(again.settings()) == text
    assert set(settings) == {"drop_prob", *type(layer).setting_names()}
    for setting, value in settings.items():
        assert f"{setting}={value!r}" in repr(layer)


@every
def test_the_state_dict_does_not_hold_the_rate_and_loads_back(name):
    layer = build(name)
    state = layer.state_dict()
    assert "drop_prob" not in state
    other = regularizers[name].layer.build(CHANNELS, SIZE, drop_prob=0.2)
    other.load_state_dict(state, strict=True)
    assert other.rate() == 0.2
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key])
    # a checkpoint of the architecture without the layer holds nothing of it
    regularizers[name].layer.build(CHANNELS, SIZE).load_state_dict({}, strict=True)


@every
def test_a_deep_copy_is_independent_and_drops_the_same(name):
    layer = build(name)
    twin = copy.deepcopy(layer)
    x = smooth_maps()
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), out)
    twin.set_drop_prob(0.1)
    assert layer.rate() == 0.4 and float(layer.drop_prob) == pytest.approx(0.4)


@every
def test_masks_come_from_torchs_generator(name):
    layer, x = build(name), smooth_maps()
    outs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


@every
def test_it_works_without_gradients_and_leaves_its_input_alone(name):
    layer, x = build(name), smooth_maps()
    before = x.clone()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        assert layer(x).shape == x.shape
    assert torch.equal(x, before)


@every
def test_its_output_may_be_added_to_in_place(name):
    """As residual blocks do with ``x += shortcut``."""
    x = smooth_maps().requires_grad_()
    out = build(name)(x)
    dropped = out == 0
    out += 1.0
    out.sum().backward()
    assert torch.equal(x.grad == 0, dropped)


@every
def test_compiled_it_is_one_graph_whatever_the_rate(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = build(name)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = smooth_maps()
    for factor in (0.0, 0.5, 1.0):
        layer.scale_drop_prob(factor)
        out = compiled(x)
        assert out.shape == x.shape
        assert bool((out == 0).any()) == (factor > 0.0)
    layer.set_drop_prob(0.3)
    compiled(x)
    assert counter.frame_count == 1


@every
def test_compiled_gradients_are_finite(name):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), build(name))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(4, 3, *SIZE)).square().sum().backward()
    gradient = model[0].weight.grad
    assert torch.isfinite(gradient).all() and bool(gradient.any())
