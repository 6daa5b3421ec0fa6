"""The norms of Eq. (16) against gradients taken one image, logit and bias at a time."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_structdrop  # noqa: F401  registers the models
from benchmarks.gradient_bound import gradient_bound
from timm_structdrop.analysis import find_places
from timm_structdrop.analysis.maps import place_named
from timm_structdrop.errors import UserError

CAMDROP, MATCHED = "camdrop", "dropout, as many units as CamDrop"


def build(name="resnet8", n=3, **settings):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, in_chans=3, **settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(model.fc.weight)
    return model, torch.randn(n, 3, 16, 16), torch.arange(n) % 4


@pytest.mark.parametrize(
    ("name", "place", "bias_of"),
    [
        ("resnet8", "layer2.0.act1", "layer2.0.bn1"),
        ("resnet8", "layer3.0.bn2", "layer3.0.bn2"),
        ("resnet8_camdrop", "act1", "bn1"),
        ("lenet5", "layer1.0.act1", "layer1.0.conv1"),
    ],
)
def test_norms_are_those_of_the_layers_own_biases(name, place, bias_of):
    model, images, target = build(name)
    found = gradient_bound(model.train(), images, target, place_named(model, place), draws=1)
    assert model.training
    slow = copy.deepcopy(model).eval()
    bias = slow.get_submodule(bias_of).bias
    for n in range(3):
        logits = slow(images[n : n + 1])[0]
        norm = sum(torch.autograd.grad(s, bias, retain_graph=True)[0].abs() for s in logits)
        torch.testing.assert_close(found.norms["none"][0, n], norm, rtol=1e-3, atol=1e-4)
        loss = F.cross_entropy(logits[None], target[n : n + 1])
        (gradient,) = torch.autograd.grad(loss, bias)
        torch.testing.assert_close(
            found.gradients["none"][0, n], gradient.abs(), rtol=1e-3, atol=1e-4
        )


def test_behind_the_last_mask_a_norm_is_a_sum_over_kept_units():
    """From the last batch norm to the logits there is a ReLU, the mean and the classifier."""
    model, images, target = build(n=4)
    place = place_named(model, "layer3.0.bn2")
    model.layer3[0].act2 = nn.Identity()  # then ||dS / db_c|| = kept_c / HW * sum_k |w_kc|
    found = gradient_bound(model, images, target, place, draws=5, keep_prob=0.7, block_size=2)
    whole = model.fc.weight.detach().abs().sum(0)
    torch.testing.assert_close(found.norms["none"][0], whole.expand(4, -1))
    for mask in (CAMDROP, MATCHED, "dropout"):
        kept = found.norms[mask] / whole
        assert float(1 - kept.mean()) == pytest.approx(found.dropped[mask], rel=1e-4)
        sixteenths = kept * 16  # 4x4 maps
        torch.testing.assert_close(sixteenths, sixteenths.round(), atol=1e-3, rtol=0)
    channels_hit = (found.norms[CAMDROP] < whole * 0.99).any(2).sum()
    assert channels_hit > 0
    dominant = model.fc.weight.detach()[target].topk(8, dim=1).indices  # C / 8 of 64
    for b in range(4):
        hit = (found.norms[CAMDROP][:, b] < whole * 0.99).any(0).nonzero().flatten()
        assert set(hit.tolist()) <= set(dominant[b].tolist())


def test_masks_drop_what_they_say():
    model, images, target = build(n=8)
    place = place_named(model, "layer2.0.act1")
    found = gradient_bound(model, images, target, place, draws=6, keep_prob=0.8, block_size=3)
    assert found.dropped["none"] == 0.0
    units = 6 * 8 * 32 * 8 * 8
    assert found.dropped["dropout"] == pytest.approx(0.2, abs=5 * (0.16 / units) ** 0.5)
    assert 0 < found.dropped[CAMDROP] < 0.2 / 8  # in an eighth of the channels
    assert found.dropped[MATCHED] == pytest.approx(
        found.dropped[CAMDROP], abs=5 * (found.dropped[CAMDROP] / units) ** 0.5
    )
    assert found.norms["none"].shape == (1, 8, 32) and found.norms[CAMDROP].shape == (6, 8, 32)


def test_rescaling_multiplies_what_is_kept():
    model, images, target = build()
    model.layer3[0].act2 = nn.Identity()
    place = place_named(model, "layer3.0.bn2")
    plain, rescaled = (
        gradient_bound(model, images, target, place, draws=2, keep_prob=0.5, rescale=rescale)
        for rescale in (False, True)
    )
    torch.testing.assert_close(rescaled.norms["dropout"], plain.norms["dropout"] * 2)
    torch.testing.assert_close(rescaled.norms["none"], plain.norms["none"])


def test_the_same_seed_gives_the_same_masks_and_leaves_the_generator():
    model, images, target = build()
    place = place_named(model, "act1")
    state = torch.get_rng_state()
    first, second, other = (
        gradient_bound(model, images, target, place, draws=2, seed=seed).norms["dropout"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_claims_and_numbers():
    model, images, target = build(n=6)
    place = next(p for p in find_places(model, (16, 16), "convs") if p.name == "layer3.0.bn2")
    found = gradient_bound(model, images, target, place, draws=4, keep_prob=0.5, block_size=2)
    numbers = found.numbers()
    assert numbers["n_images"] == 6 and numbers["n_biases"] == 64
    assert all(mask["share_bounded"] == 1.0 for mask in numbers["masks"].values())
    claims = {(claim["smaller"], claim["larger"]): claim for claim in numbers["claims"]}
    assert len(claims) == 4
    assert claims["dropout", "none"]["verdict"] == "holds"
    assert claims["camdrop", "dropout"]["verdict"] == "fails"  # it drops so much less
    claim = found.claim("none", "none")
    assert claim["verdict"] == "undecided" and claim["share_equal"] == claim["share_holds"] == 1.0
    a, b = found.norms["dropout"], found.norms["none"]
    differences = [float(a[:, n].mean() - b[:, n].mean()) for n in range(6)]
    claim = claims["dropout", "none"]
    assert claim["mean_difference"] == pytest.approx(sum(differences) / 6, rel=1e-4)
    assert claim["standard_error"] == pytest.approx(
        float(torch.tensor(differences).std()) / 6**0.5, rel=1e-4
    )
    assert claim["share_holds"] == pytest.approx(float((a <= b).float().mean()), abs=0.02)


@pytest.mark.parametrize(
    ("place", "settings", "message"),
    [
        ("layer1.0.conv1", {}, "a layer with a bias .*; layer1.0.conv1 is Conv2d"),
        ("act1", {"keep_prob": 0.0}, r"keep_prob must be in \(0, 1\]; got 0.0"),
        ("act1", {"draws": 0}, "got 3 images, 0 draws"),
    ],
)
def test_bad_input(place, settings, message):
    model, images, target = build()
    with pytest.raises(UserError, match=message):
        gradient_bound(model, images, target, place_named(model, place), **settings)


def test_a_norm_with_an_activation_in_it_is_refused():
    model = timm.create_model("efficientnet_b0", num_classes=4)
    with pytest.raises(UserError, match="no activation in it; bn1 is BatchNormAct2d"):
        gradient_bound(
            model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), place_named(model, "bn1")
        )
