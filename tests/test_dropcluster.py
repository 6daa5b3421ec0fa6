"""DropCluster2d against Algorithms 1 and 2 of the paper, and the life of its state."""

import copy
import io
import math
import warnings

import pytest
import safetensors.torch
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from timm_structdrop.cluster import rena
from timm_structdrop.errors import UserError
from timm_structdrop.layers import DropCluster2d, drop_cluster_2d
from timm_structdrop.layers.dropcluster import cluster_mask, resample_labels


def smooth_maps(batch=8, channels=4, size=(8, 8), seed=0):
    """Activations whose neighbouring pixels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, channels, size[0] + 2, size[1] + 2, generator=generator)
    return nn.functional.avg_pool2d(noise, 3, stride=1)


def fitted_layer(channels=4, size=(8, 8), dead=(), **settings):
    layer = DropCluster2d(channels, size, **{"n_clusters": 5, **settings})
    maps = smooth_maps(channels=channels, size=size)
    maps[:, list(dead)] = 0.0
    layer.fit(maps, at=3)
    return layer


def algorithm_2(x, clusters, unstructured, dropped, training):
    """The paper's loop, with the clusters L to drop in each channel given."""
    channels, height, width = x.shape[1:]
    mask = torch.ones(channels, height, width)
    for i in range(channels):
        if i in unstructured:
            mask[i] = 0.0
        elif training:
            for cluster in dropped[i]:
                for row in range(height):
                    for column in range(width):
                        if clusters[i][row][column] == cluster:
                            mask[i, row, column] = 0.0
    return x * mask * (mask.numel() / mask.sum())


def test_algorithm_2_training():
    torch.manual_seed(0)
    layer = fitted_layer(dead=[2], drop_prob=0.4)
    x = torch.randn(3, 4, 8, 8) + 5.0  # never zero by itself
    out = layer(x)
    labels = layer.labels.tolist()
    dropped = [
        {labels[c][r][w] for r in range(8) for w in range(8) if (out[:, c, r, w] == 0).all()}
        for c in range(4)
    ]
    assert [len(dropped[c]) for c in (0, 1, 3)] == [2, 2, 2]  # floor(0.4 * 5), no remainder
    torch.testing.assert_close(out, algorithm_2(x, labels, {2}, dropped, training=True))


def test_algorithm_2_inference_masks_unstructured_channels():
    layer = fitted_layer(dead=[2]).eval()
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(layer(x), algorithm_2(x, layer.labels, {2}, None, training=False))


def test_inference_is_the_identity_when_all_channels_are_structured():
    layer = fitted_layer().eval()
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(layer(x), x)


def test_unfitted_layer_is_the_identity():
    layer = DropCluster2d(4, (8, 8))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(layer(x), x)
    assert not layer.is_fitted


def test_the_mask_is_shared_by_the_batch_and_differs_between_channels():
    torch.manual_seed(0)
    layer = fitted_layer(channels=16, drop_prob=0.4)
    zero = layer(torch.ones(5, 16, 8, 8)) == 0
    assert all(torch.equal(zero[0], other) for other in zero[1:])
    assert len({tuple(z.flatten().tolist()) for z in zero[0]}) > 1


@pytest.mark.parametrize(
    ("rounding", "expected"), [("stochastic", 0.1 * 15), ("floor", math.floor(0.1 * 15))]
)
def test_expected_number_of_clusters_dropped(rounding, expected):
    torch.manual_seed(0)
    channels, draws = 64, 200
    labels = torch.arange(15).repeat(channels, 1).reshape(channels, 3, 5)
    structured = torch.ones(channels, dtype=torch.bool)
    counts = torch.stack(
        [
            (~cluster_mask(labels, structured, 0.1, 15, rounding)).sum(dim=(1, 2)).float()
            for _ in range(draws)
        ]
    )
    n = counts.numel()
    # the remainder is a Bernoulli variable: its variance is at most 1/4
    assert abs(counts.mean().item() - expected) <= 5 * 0.5 / math.sqrt(n)
    assert set(counts.unique().tolist()) <= {1.0, 2.0}


def test_every_cluster_is_dropped_equally_often():
    torch.manual_seed(0)
    labels = torch.arange(6).repeat(500, 1).reshape(500, 2, 3)
    structured = torch.ones(500, dtype=torch.bool)
    dropped = torch.zeros(6)
    for _ in range(40):
        dropped += (~cluster_mask(labels, structured, 0.5, 6, "floor")).flatten(1).float().sum(0)
    n = 500 * 40
    assert (dropped / n - 0.5).abs().max() <= 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_whole_numbers_of_clusters_are_exact(p):
    """p * n is a whole number that float32 misses by one unit in the last place."""
    labels = torch.arange(10).repeat(4, 1).reshape(4, 2, 5)
    structured = torch.ones(4, dtype=torch.bool)
    for rounding in ("floor", "stochastic"):
        mask = cluster_mask(labels, structured, torch.tensor(p), 10, rounding)
        assert ((~mask).sum(dim=(1, 2)) == round(p * 10)).all()


def test_fit_is_algorithm_1():
    maps = smooth_maps()
    maps[:, 1] = 0.0
    layer = DropCluster2d(4, (8, 8), n_clusters=5)
    result = layer.fit(maps, at=7)
    expected = rena(maps, 5)
    assert layer.structured.tolist() == [True, False, True, True] == result.structured.tolist()
    for channel in (0, 2, 3):
        assert torch.equal(layer.labels[channel].long(), expected.labels[channel])
    assert int(layer.fitted_at) == 7
    assert layer.fitted_size.tolist() == [8, 8]
    assert layer.last_fit["unstructured"] == 1
    assert layer.last_fit["adjusted_rand_index"] is None
    layer.fit(maps, at=8)
    assert layer.last_fit["adjusted_rand_index"] == pytest.approx(1.0)


def test_requested_fit_uses_the_next_training_batch_and_drops_at_once():
    torch.manual_seed(0)
    layer = DropCluster2d(4, (8, 8), n_clusters=5, drop_prob=0.4)
    x = smooth_maps() + 5.0
    layer.request_fit(at=2)
    layer.eval()(x)
    assert not layer.is_fitted
    out = layer.train()(x)
    assert int(layer.fitted_at) == 2
    assert (out == 0).any()
    layer(smooth_maps(seed=1))
    assert int(layer.fitted_at) == 2


def test_the_layer_counts_training_forwards_in_a_foreign_loop():
    layer = DropCluster2d(4, (8, 8), n_clusters=5, fit_start_step=3, fit_every_steps=2)
    fitted_at = []
    for step in range(1, 8):
        layer.train()(smooth_maps(seed=step))
        layer.eval()(smooth_maps(seed=step))
        fitted_at.append(int(layer.fitted_at))
    assert fitted_at == [-1, -1, 3, 3, 5, 5, 7]


def test_a_resumed_layer_counts_on():
    first = DropCluster2d(4, (8, 8), n_clusters=5, fit_start_step=3)
    for step in range(2):
        first(smooth_maps(seed=step))
    second = DropCluster2d(4, (8, 8), n_clusters=5, fit_start_step=3)
    second.load_state_dict(first.state_dict())
    second(smooth_maps(seed=2))
    assert int(second.fitted_at) == 3


def test_the_count_is_read_from_the_device_once():
    """A fake GPU raises where the host would have to wait for a value."""
    layer = DropCluster2d(4, (8, 8), n_clusters=5, fit_start_step=9)
    layer(smooth_maps())
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda:0")
        except RuntimeError as error:
            pytest.skip(f"this torch has no fake GPU without a real one: {str(error)[:40]}")
        for name, buffer in list(layer.named_buffers()):
            layer.register_buffer(
                name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda:0")
            )
        x = torch.empty(2, 4, 8, 8, device="cuda:0")
        layer._checked_size = (8, 8)
        assert layer(x).is_cuda


def test_hopkins_criterion_masks_channels_without_structure():
    coarse = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = nn.functional.interpolate(coarse, (16, 16), mode="bicubic", align_corners=True)
    maps[:, 1] = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(1))
    by_rena = DropCluster2d(2, (16, 16), n_clusters=5)
    by_rena.fit(maps)
    by_hopkins = DropCluster2d(2, (16, 16), n_clusters=5, criterion="hopkins")
    by_hopkins.fit(maps)
    assert by_rena.structured.tolist() == [True, True]
    assert by_hopkins.structured.tolist() == [True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fit_on_activations_that_are_not_finite_is_refused(bad):
    layer = fitted_layer()
    before = copy.deepcopy(layer.state_dict())
    maps = smooth_maps(seed=5)
    maps[0, 0, 0, 0] = bad
    with pytest.warns(UserWarning, match="NaN or Inf.*; the old clusters are kept"):
        assert layer.fit(maps, at=9) is None
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_a_fit_without_any_structured_channel_is_refused():
    layer = fitted_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.warns(UserWarning, match="none of the 4 channels has structure"):
        layer.fit(torch.zeros(8, 4, 8, 8), at=9)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_a_batch_of_one_can_be_fitted():
    layer = DropCluster2d(4, (8, 8), n_clusters=5)
    assert layer.fit(smooth_maps(batch=1)).structured.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_clusters": 65}, r"n_clusters must be in \[2, min\(256, H\*W = 64\)\]; got 65"),
        ({"n_clusters": 1}, r"n_clusters must be in .* got 1"),
        ({"rounding": "up"}, r"rounding must be 'stochastic' or 'floor'; got 'up'"),
        ({"criterion": "x"}, r"criterion must be 'rena' or 'hopkins'; got 'x'"),
        ({"hopkins_threshold": 2.0}, r"hopkins_threshold must be in \[0, 1\]; got 2.0"),
        ({"n_clusters": 4.5}, r"n_clusters must be in .* got 4.5"),
        ({"n_clusters": "few"}, r"n_clusters must be in .* got 'few'"),
        ({"hopkins_threshold": "low"}, r"hopkins_threshold must be a number in .* got 'low'"),
        ({"fit_start_step": 0}, r"fit_start_step must be an integer of at least 1 or None; got 0"),
        ({"fit_start_step": 1.5}, r"fit_start_step must be an integer .* got 1.5"),
        ({"fit_start_step": 1, "fit_every_steps": 0}, r"fit_every_steps must be an .* got 0"),
        ({"fit_every_steps": 5}, r"fit_every_steps needs fit_start_step; got 5"),
        ({"drop_prob": 1.0}, r"drop_prob must be in \[0, 1\); got 1.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DropCluster2d(4, (8, 8), **{"n_clusters": 5, **settings})


def test_a_map_smaller_than_the_number_of_clusters():
    layer = DropCluster2d(4, (8, 8), n_clusters=15)
    with pytest.raises(ValueError, match=r"H\*W = 9\] of the map; got 15 on a 3x3 map"):
        layer(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_prob": 1.0}, r"drop_prob must be in \[0, 1\); got 1.0"),
        ({"rounding": "up"}, r"rounding must be 'stochastic' or 'floor'; got 'up'"),
        ({"x": torch.ones(4, 8, 8)}, r"x must be \(B, C, H, W\); got \(4, 8, 8\)"),
        ({"labels": torch.zeros(4, 8, 7)}, r"for x with .* = \(4, 8, 8\); got \(4, 8, 7\) and"),
        ({"structured": torch.ones(3) > 0}, r"structured \(C,\) for x .* and \(3,\)"),
    ],
)
def test_wrong_arguments_of_the_function(arguments, message):
    right = {
        "x": torch.ones(2, 4, 8, 8),
        "labels": torch.zeros(4, 8, 8, dtype=torch.uint8),
        "structured": torch.ones(4, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        drop_cluster_2d(**{**right, **arguments})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_repeated_by_checkpointing_is_not_counted(use_reentrant):
    layer = DropCluster2d(4, (8, 8), n_clusters=5, fit_start_step=2, fit_every_steps=2)
    fits = []
    for step in range(1, 6):
        x = smooth_maps(seed=step).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        if step == 5:
            layer.request_fit(at=9)  # is for the next forward
        y.sum().backward()
        fits.append(int(layer.fitted_at))
    assert int(layer.step) == 5
    assert fits == [-1, 2, 2, 4, 4]
    layer(smooth_maps(seed=6))
    assert int(layer.fitted_at) == 6


def test_maps_too_small_for_the_hopkins_criterion():
    message = "must be at least 3x3 where criterion is 'hopkins'; got 8x2"
    with pytest.raises(ValueError, match=message):
        DropCluster2d(4, (8, 2), n_clusters=5, criterion="hopkins")
    layer = DropCluster2d(4, (8, 8), n_clusters=5, criterion="hopkins")
    for refused in (layer.fit, layer):
        with pytest.raises(ValueError, match=message):
            refused(torch.randn(2, 4, 8, 2))
    settings = {"img_size": 8, "n_clusters": 4, "criterion": "hopkins"}
    with pytest.raises(UserError, match=r"dropcluster: maps must be at least 3x3 .* got 2x2"):
        timm.create_model("resnet18_cifar_dropcluster", **settings, modules=["layer3"])


def test_wrong_activations():
    with pytest.raises(ValueError, match=r"activations must be \(B, C = 4, H, W\); got"):
        DropCluster2d(4, (8, 8)).fit(torch.randn(2, 3, 8, 8))


class TestState:
    def test_memory_is_a_byte_per_pixel_and_channel(self):
        layer = DropCluster2d(64, (56, 56))
        size = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
        assert size <= 64 * 56 * 56 + 64 + 64

    def test_round_trip_through_torch_save_and_safetensors(self):
        layer = fitted_layer(dead=[1])
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        blob = safetensors.torch.save(layer.state_dict())
        for state in (torch.load(file, weights_only=True), safetensors.torch.load(blob)):
            other = DropCluster2d(4, (8, 8), n_clusters=5)
            other.load_state_dict(state)
            assert all(
                torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers(), strict=True)
            )

    def test_a_state_dict_without_it_loads_strictly_and_unfits(self):
        layer = fitted_layer(dead=[1])
        layer.load_state_dict({}, strict=True)
        assert not layer.is_fitted
        assert layer.structured.all()

    def test_half_a_state_is_an_error(self):
        state = fitted_layer().state_dict()
        del state["structured"]
        with pytest.raises(RuntimeError, match="Missing key"):
            DropCluster2d(4, (8, 8), n_clusters=5).load_state_dict(state)

    def test_another_number_of_channels_is_an_error(self):
        with pytest.raises(RuntimeError, match="size mismatch for labels"):
            DropCluster2d(3, (8, 8), n_clusters=5).load_state_dict(fitted_layer().state_dict())

    def test_labels_of_another_resolution_are_resampled_and_said_once(self):
        small = fitted_layer(dead=[1])
        large = DropCluster2d(4, (16, 16), n_clusters=5)
        large.load_state_dict(small.state_dict())
        expected = small.labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(large.labels, expected)
        with pytest.warns(UserWarning, match="fitted on 8x8 maps are resampled to 16x16") as said:
            for _ in range(3):
                large(torch.randn(2, 4, 16, 16))
        assert len(said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            large(torch.randn(2, 4, 8, 8))  # the resolution of the fit: nothing to say
            large.eval()(torch.randn(2, 4, 16, 16))

    @pytest.mark.parametrize("stored", [(16, 16), (11, 9), (13, 29)])
    def test_a_fit_at_another_resolution_than_the_buffers_is_used_unchanged(self, stored):
        maps = smooth_maps()
        layer = DropCluster2d(4, stored, n_clusters=5)
        result = layer.fit(maps)
        assert torch.equal(resample_labels(layer.labels, (8, 8)).long(), result.labels)

    def test_ema_created_before_the_first_fit(self):
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), DropCluster2d(4, (8, 8), n_clusters=5))
        ema = ModelEmaV3(model, decay=0.5)
        model[1].fit(smooth_maps(), at=1)
        ema.update(model)
        assert all(
            torch.equal(a, b)
            for a, b in zip(ema.module[1].buffers(), model[1].buffers(), strict=True)
        )

    def test_deepcopy_is_independent(self):
        layer = fitted_layer()
        twin = copy.deepcopy(layer)
        twin.fit(smooth_maps(seed=9), at=8)
        assert int(layer.fitted_at) == 3

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_conversion_keeps_labels_and_rate(self, dtype):
        layer = fitted_layer(drop_prob=0.1).to(dtype)
        assert layer.labels.dtype == torch.uint8
        assert layer.structured.dtype == torch.bool
        assert layer.drop_prob.dtype == torch.float32
        assert layer(smooth_maps().to(dtype)).dtype == dtype


class TestCompile:
    def test_one_graph_for_all_rates_and_refits(self):
        layer = fitted_layer(drop_prob=0.4)
        counter = CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        x = smooth_maps() + 5.0
        for step in range(6):
            layer.scale_drop_prob(step / 6)
            out = compiled(x)
        layer.fit(smooth_maps(seed=2), at=4)
        assert (out == 0).any()
        compiled(x)
        assert counter.frame_count == 1

    def test_a_layer_that_is_not_fitted_is_the_identity(self):
        layer = DropCluster2d(4, (8, 8), n_clusters=5, drop_prob=0.4)
        x = torch.randn(2, 4, 8, 8)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), x)

    def test_a_requested_fit_in_a_step_forced_to_eager(self):
        layer = DropCluster2d(4, (8, 8), n_clusters=5, drop_prob=0.4)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        compiled(smooth_maps())
        layer.request_fit(at=1)
        with torch.compiler.set_stance("force_eager"):
            compiled(smooth_maps())
        assert int(layer.fitted_at) == 1
        assert (compiled(smooth_maps() + 5.0) == 0).any()

    def test_a_layer_that_counts_fits_itself_in_a_compiled_loop(self):
        layer = DropCluster2d(4, (8, 8), n_clusters=5, fit_start_step=2)
        compiled = torch.compile(layer, backend="eager")
        for step in range(3):
            compiled(smooth_maps(seed=step))
        assert int(layer.fitted_at) == 2


def test_the_pure_function_and_the_layer_agree():
    layer = fitted_layer(dead=[0], drop_prob=0.4)
    x = torch.randn(2, 4, 8, 8)
    torch.manual_seed(1)
    by_layer = layer(x)
    torch.manual_seed(1)
    by_function = drop_cluster_2d(x, layer.labels, layer.structured, 0.4, 5)
    assert torch.equal(by_layer, by_function)


def test_as_many_clusters_as_pixels_are_the_pixels():
    """The upper end of [2, H W]: each pixel is a cluster, and dropping is unstructured."""
    layer = DropCluster2d(3, (4, 4), n_clusters=16, drop_prob=0.25)
    x = torch.randn(8, 3, 4, 4)
    layer.fit(x)
    assert all(len(labels.unique()) == 16 for labels in layer.labels)
    assert layer(x).shape == x.shape
