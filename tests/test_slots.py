"""Where regularizers can sit, and that they run there."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import StructDropLayer
from timm_structdrop.models.hanging import convert_sync_batchnorm
from timm_structdrop.models.placement import place
from timm_structdrop.models.slots import Slot, find_slots, insert, stage_modules, stem_slot
from timm_structdrop.models.trace import trace


class Halve(StructDropLayer):
    """A stand-in regularizer whose effect is easy to see."""

    regularizer = "halve"

    def forward(self, x):
        return x / 2


class Negate(Halve):
    regularizer = "negate"

    def forward(self, x):
        return -x


def paths(model, kind, stage=None, img_size=(64, 64)):
    return [
        slot.path
        for slot in find_slots(model, img_size)
        if slot.kind == kind and stage in (None, slot.stage)
    ]


def test_slots_of_a_bottleneck_resnet():
    model = timm.create_model("resnet50")
    blocks = [f"layer4.{i}" for i in range(3)]
    assert paths(model, "stem") == ["act1"]
    assert paths(model, "conv", 4) == [f"{b}.{act}" for b in blocks for act in ("act1", "act2")]
    assert paths(model, "last_conv", 4) == [f"{b}.drop_path" for b in blocks]
    assert paths(model, "skip", 4) == [f"{b}.downsample" for b in blocks]
    assert paths(model, "stage") == [f"layer{i}" for i in (1, 2, 3, 4)]


def test_slots_of_a_basic_block_resnet_have_one_inner_convolution():
    model = timm.create_model("resnet20")
    assert paths(model, "conv", 3, (32, 32)) == [f"layer3.{i}.act1" for i in range(3)]
    assert paths(model, "stage", img_size=(32, 32)) == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnetv2_50", "stem.conv"),
        ("regnety_002", "stem.bn.act"),
        ("densenet121", "features.norm0.act"),
        ("convnext_atto", "stem.1"),
        ("efficientnet_b0", "bn1.act"),
        ("vgg11_bn", "features.2"),
        ("dla34", "base_layer.2"),
        ("ghostnet_100", "act1"),
        ("lenet5", "act1"),
    ],
)
def test_the_stem_ends_before_pooling_and_before_the_second_convolution(name, stem):
    size = timm.get_pretrained_cfg_value(name, "input_size")[1:]
    size = (64, 64) if size[0] > 64 else size
    assert stem_slot(timm.create_model(name), size) == Slot(stem, "stem", 0)


def test_stages_are_the_maps_at_a_quarter_to_a_thirtysecond():
    assert stage_modules(timm.create_model("efficientnet_b0")) == {
        1: "blocks.1",
        2: "blocks.2",
        3: "blocks.4",
        4: "blocks.6",
    }
    assert sorted(stage_modules(timm.create_model("convnext_atto"))) == [1, 2, 3, 4]


def test_traced_convolution_slots_follow_norm_and_activation_and_skip_the_squeeze():
    found = paths(timm.create_model("efficientnet_b0"), "conv", 4)
    assert found[:3] == ["blocks.5.0.bn1.act", "blocks.5.0.bn2.act", "blocks.5.0.bn3.act"]
    assert not any(".se." in path for path in found)


def test_a_residual_addition_ends_the_run_of_its_convolution():
    class Block(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.bn, self.act, self.inplace = nn.BatchNorm2d(3), nn.ReLU(), inplace
            self.feature_info = [{"module": "act", "reduction": 4, "num_chs": 3}]

        def forward(self, x):
            x = self.stem(x)
            y = self.bn(self.conv(x))
            if self.inplace:
                y += x
            else:
                y = y + x
            return self.act(y)

    for inplace in (True, False):
        assert paths(Block(inplace), "conv") == ["bn"]


def test_watching_a_model_leaves_no_trace():
    model = timm.create_model("resnet18").train()
    model.layer1.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    trace(model, (64, 64))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("path", ["maxpool", "layer1", "layer2.0.drop_path", "layer2.0.drop_block"])
def test_inserted_layers_run_and_keep_the_keys(path):
    model = timm.create_model("resnet18", zero_init_last=False).eval()
    x = torch.randn(1, 3, 64, 64)
    plain, keys = model(x), list(model.state_dict())
    insert(model, Slot(path, "", 0), Halve())
    assert list(model.state_dict()) == keys
    once = model(x)
    assert not torch.allclose(once, plain)
    insert(model, Slot(path, "", 0), Negate())
    assert not torch.allclose(model(x), once)


def test_a_layer_on_the_output_of_a_stage_scales_it():
    model = timm.create_model("resnet18").eval()
    x = torch.randn(1, 3, 64, 64)
    plain = model.forward_features(x)
    insert(model, Slot("layer4", "stage", 4), Halve())
    assert torch.equal(model.forward_features(x), plain / 2)


def test_copies_and_pickles_run_their_own_layer():
    model = timm.create_model("resnet18").eval()
    insert(model, Slot("act1", "stem", 0), Halve())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        twin.act1.halve.forward = lambda x: x
        assert not torch.allclose(twin(x), model(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


CONVERSIONS = {
    "torch's": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm's": timm.layers.convert_sync_batchnorm,
    "ours": convert_sync_batchnorm,
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["", "skip_in"])
@torch.no_grad()
def test_what_hangs_on_a_norm_survives_its_conversion_to_syncbatchnorm(conversion, compiled, kind):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Sequential(Residual(), Residual()), Residual()).eval()
    x = torch.randn(2, 3, 8, 8)
    plain = model(x)
    for layer in (Halve(), Negate()):
        insert(model, Slot("0.1.bn", kind, 0), layer)
    expected = model(x)
    assert not torch.allclose(expected, plain)
    model = CONVERSIONS[conversion](model)
    assert isinstance(model[0][1].bn, nn.SyncBatchNorm)
    run = torch.compile(model, backend="eager") if compiled else copy.deepcopy(model)
    if compiled and conversion != "ours":
        with pytest.warns(UserWarning, match="do nothing .* converted .* and compiled at once"):
            run(x)
        model(x)
        torch._dynamo.reset()
    for _ in range(2):
        assert torch.equal(run(x), expected)


def test_a_norm_made_anew_without_its_layer_is_an_error_in_training():
    model = nn.Sequential(Residual())
    insert(model, Slot("0.bn", "", 0), Halve())
    frozen = timm.layers.freeze_batch_norm_2d(model)
    x = torch.randn(2, 3, 8, 8)
    message = "a norm must keep its halve layer in training; bn of Residual, now FrozenBatchNorm2d"
    with pytest.raises(UserError, match=message):
        frozen(x)
    assert frozen.eval()(x).shape == x.shape


def test_a_slot_takes_a_regularizer_once():
    model = timm.create_model("resnet18")
    for path in ("act1", "layer4", "layer2.0.drop_path"):
        insert(model, Slot(path, "", 0), Halve())
        with pytest.raises(UserError, match=f"{path} has halve already"):
            insert(model, Slot(path, "", 0), Halve())


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(UserError, match=r"needs a CNN; Linear has no nn\.Conv2d"):
        place(nn.Linear(2, 2), "dropcluster")
