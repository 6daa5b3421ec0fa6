"""DropBlock at inference: what it drops, that it leaves no trace, and where it goes."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import (
    InferenceDrop,
    dropblock_layers,
    dropping,
    evaluate,
    with_dropblock,
)
from timm_structdrop.layers import DropBlock2d
from timm_structdrop.models.placement import place


class OnesAndZeros(nn.Module):
    """Tells by its logits which share of a map of ones a DropBlock layer keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = DropBlock2d(0.3, 5, gamma_scale=0.5)
        self.kept: list[float] = []
        self.blocks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.ones_like(x))
        self.kept.append((y != 0).float().mean().item())
        self.blocks.append(y)
        return x.flatten(1)[:, :4]


def ones(n: int = 64) -> DataLoader:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, 3, 12, 14), torch.zeros(n, dtype=torch.long))
    return DataLoader(data, 32)


def test_the_fraction_kept_in_evaluation():
    model, loader = OnesAndZeros(), ones(512)
    torch.manual_seed(1)
    for drop in (InferenceDrop(7, 0.8), InferenceDrop(1, 0.5)):
        model.kept.clear()
        model.drop.gamma_scale = 1.0
        with dropping(model, drop) as layers:
            evaluate(model, loader, active=layers)
        # 512 * 3 maps of 168 units in blocks: the share of a map varies by less than 0.2
        kept = sum(model.kept) / len(model.kept)
        assert kept == pytest.approx(drop.keep_prob, abs=5 * 0.2 / (512 * 3) ** 0.5)
    model.kept.clear()
    evaluate(model, loader)
    assert set(model.kept) == {1.0}
    with dropping(model, InferenceDrop(7, 1.0)) as layers:
        evaluate(model, loader, active=layers)
    assert set(model.kept) == {1.0}


def test_blocks_have_the_size_asked_for():
    model = OnesAndZeros()
    with dropping(model, InferenceDrop(3, 0.97)) as layers:
        assert (model.drop.block_size, model.drop.gamma_scale) == (3, 0.5)
        evaluate(model, ones(), active=layers)
    maps = torch.cat(model.blocks).flatten(0, 1)
    dropped = (maps == 0).flatten(1).sum(1)
    assert dropped[dropped > 0].min() == 9


def test_everything_is_as_before_afterwards():
    model = OnesAndZeros().eval()
    model.drop.scale_drop_prob(0.25)
    with pytest.raises(ZeroDivisionError), dropping(model, InferenceDrop(2, 0.5)) as layers:
        assert list(layers) == [model.drop]
        assert model.drop.rate() == 0.5
        evaluate(model, ones(), active=layers)
        assert not model.drop.training
        raise ZeroDivisionError
    assert model.drop.settings() == DropBlock2d(0.3, 5, gamma_scale=0.5).settings()
    assert model.drop.rate() == pytest.approx(0.075)
    assert float(model.drop.drop_prob) == pytest.approx(0.075)
    model.drop.set_drop_prob(0.0)
    with dropping(model, InferenceDrop(2, 0.5)):
        pass
    assert model.drop.rate() == model.drop.target_drop_prob == 0


def test_a_model_keeps_its_own_layers_and_another_gets_them():
    own = timm.create_model("resnet8_dropblock", num_classes=10, in_chans=1)
    count = len(dropblock_layers(own))
    assert with_dropblock(own, (32, 32)) == f"the model's own DropBlock layers ({count})"
    assert len(dropblock_layers(own)) == count

    plain = timm.create_model("resnet20", num_classes=10).eval()
    image = torch.randn(2, 3, 32, 32)
    before = plain(image)
    note = with_dropblock(plain, (32, 32))
    expected = place(timm.create_model("resnet20", num_classes=10), "dropblock", img_size=32)
    paths = [path for path, module in expected.named_modules() if isinstance(module, DropBlock2d)]
    found = [path for path, module in plain.named_modules() if isinstance(module, DropBlock2d)]
    assert found == paths
    assert note.startswith(f"DropBlock layers attached at their default places ({len(paths)}): ")
    assert torch.equal(plain(image), before)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "vit"])
def test_a_model_without_a_place(model):
    if model == "vit":
        model = timm.create_model("test_vit")
    with pytest.raises(UserError, match=r"needs a model with DropBlock layers or with places for"):
        with_dropblock(model, (160, 160))
    with (
        pytest.raises(UserError, match=r"needs DropBlock layers; .* has none"),
        dropping(model, InferenceDrop(7, 0.9)),
    ):
        pass


def test_gamma_is_exact_unless_the_papers_is_asked_for():
    """Eq. (1) with keep 0.75 and block 5 on 12 x 14 maps, against what it keeps by counting."""
    model, loader = OnesAndZeros(), ones(512)
    model.drop.gamma_scale, model.drop.gamma = 1.0, "paper"
    rate = 0.25 * 12 * 14 / (25 * 8 * 10)
    covering = [sum(s <= i < s + 5 for s in range(8)) for i in range(12)]
    across = [sum(s <= j < s + 5 for s in range(10)) for j in range(14)]
    by_paper = sum((1 - rate) ** (n * m) for n in covering for m in across) / (12 * 14)
    torch.manual_seed(2)
    for text, expected in (
        ("block=5,keep=0.75", 0.75),
        ("block=5,gamma=paper,keep=0.75", by_paper),
    ):
        model.kept.clear()
        with dropping(model, InferenceDrop.parse(text)) as layers:
            evaluate(model, loader, active=layers)
        kept = sum(model.kept) / len(model.kept)
        assert kept == pytest.approx(expected, abs=5 * 0.2 / (512 * 3) ** 0.5)
        assert model.drop.gamma == "paper"
    assert by_paper > 0.78


def test_settings_in_words():
    assert InferenceDrop.parse("block=7,keep=0.9") == InferenceDrop(7, 0.9)
    assert InferenceDrop.parse("keep=1, block=1") == InferenceDrop(1, 1.0)
    assert InferenceDrop.parse("gamma=paper,keep=1,block=1") == InferenceDrop(1, 1.0, "paper")
    with pytest.raises(UserError, match="gamma must be exact or paper; got papers"):
        InferenceDrop.parse("block=7,keep=0.9,gamma=papers")
    wrong = ("", "7,0.9", "block=7", "block=7,keep=0.9,x=1", "block=x,keep=1", "block=7,block=7")
    for text in (*wrong, "block=7.5,keep=0.9"):
        with pytest.raises(
            UserError, match=r"must be block=SIZE,keep=PROBABILITY\[,gamma=paper\]; got"
        ):
            InferenceDrop.parse(text)
    with pytest.raises(UserError, match="block must be an integer of at least 1; got 0"):
        InferenceDrop.parse("block=0,keep=0.9")
    for keep in ("0", "1.1", "nan"):
        with pytest.raises(UserError, match=r"keep must be a probability in \(0, 1\]; got"):
            InferenceDrop.parse(f"block=7,keep={keep}")
