"""Where CamDrop sits, and the slot in front of a skip's projection."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

import timm_structdrop  # noqa: F401  registers the models
from timm_structdrop.errors import UserError
from timm_structdrop.layers import CamDrop2d, StructDropLayer
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.models.slots import Slot, find_slots, insert
from timm_structdrop.models.trace import map_shape


class Shift(StructDropLayer):
    """A stand-in whose place in a chain shows in the result."""

    regularizer = "shift"

    def forward(self, x):
        return x + 1


class Twice(StructDropLayer):
    regularizer = "twice"

    def forward(self, x):
        return x * 2


def camdrop_paths(model):
    return [path for path, module in model.named_modules() if isinstance(module, CamDrop2d)]


def test_an_imagenet_resnet_has_it_in_groups_3_and_4():
    paths = camdrop_paths(timm.create_model("resnet18_camdrop"))
    expected = []
    for group in (3, 4):
        for block in (0, 1):
            skip = ".downsample.camdrop" if block == 0 else ".downsample"
            names = (".act1.camdrop", skip, ".drop_path")
            expected += [f"layer{group}.{block}{name}" for name in names]
    assert sorted(paths) == sorted(expected)


def test_the_small_resnets_have_it_in_all_groups_with_block_8():
    layers = list(structdrop_layers(timm.create_model("resnet8_camdrop")))
    assert len(layers) == 9
    assert {layer.block_size for layer in layers} == {8}
    layers = list(structdrop_layers(timm.create_model("resnet8_camdrop", block_size=3, stages=[3])))
    assert [layer.block_size for layer in layers] == [3] * 3
    assert next(structdrop_layers(timm.create_model("resnet18_cifar_camdrop"))).block_size == 7


def test_the_specified_call():
    model = timm.create_model(
        "resnet110_camdrop", num_classes=10, block_size=8, keep_prob=0.9, guide="cam"
    )
    layers = list(structdrop_layers(model))
    assert len(layers) == 3 * 54
    assert layers[0].rate() == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "count"), [("vgg16_cifar", 6), ("lenet5", 1)])
def test_chains_have_it_after_the_convolutions_of_the_last_groups(name, count):
    assert len(list(structdrop_layers(timm.create_model(f"{name}_camdrop")))) == count


def test_every_setting_is_a_keyword():
    settings = {"guide": "avg", "channels": "all", "n_channels": 0.5, "n_pixels": 3}
    settings |= {"rank": "all", "seed_rate": "dropblock", "block_size": 5}
    model = timm.create_model("resnet8_camdrop", **settings)
    for layer in structdrop_layers(model):
        assert layer.settings() == {"drop_prob": 0.1, **settings}


def test_the_slot_before_a_projection():
    model = timm.create_model("resnet18").eval()
    slots = [slot for slot in find_slots(model, (64, 64)) if slot.kind == "skip_in"]
    assert [slot.path for slot in slots if slot.stage == 4] == [
        "layer4.0.downsample",
        "layer4.1.downsample",
    ]
    keys = list(model.state_dict())
    block = model.layer4[0]
    x = torch.randn(1, 256, 4, 4)
    expected = block.downsample((x + 1) * 2)
    before = Slot("layer4.0.downsample", "skip_in", 4)
    insert(model, before, Twice())
    insert(model, before, Shift())
    assert torch.equal(block.downsample(x), expected)
    assert list(model.state_dict()) == keys
    insert(model, Slot("layer4.0.downsample", "skip", 4), CamDrop2d())
    assert [name for name, _ in block.downsample.named_children()][-1] == "camdrop"
    with pytest.raises(UserError, match="takes each regularizer once"):
        insert(model, before, Shift())


def test_the_slot_of_a_skip_without_projection():
    model = timm.create_model("resnet18")
    path = Slot("layer4.1.downsample", "skip_in", 4)
    insert(model, path, Twice())
    assert model.layer4[1].downsample(torch.ones(1)) == 2
    insert(model, path, Shift())
    assert model.layer4[1].downsample(torch.ones(1)) == 4
    assert list(model.state_dict()) == list(timm.create_model("resnet18").state_dict())


def test_the_slot_before_a_module_that_is_no_chain():
    model = nn.Sequential(nn.Linear(2, 2))
    insert(model, Slot("0", "skip_in", 0), Shift())
    x = torch.randn(1, 2)
    linear = model[0]
    expected = nn.functional.linear(x + 1, linear.weight, linear.bias)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_state_in_front_of_a_projection_has_the_size_of_its_input():
    model = timm.create_model("resnet18")
    assert map_shape(model, "layer4.0.downsample", (64, 64)) == (512, 2, 2)
    assert map_shape(model, "layer4.0.downsample", (64, 64), before=True) == (256, 4, 4)


def test_copies_and_pickles_of_a_variant_drop_the_same():
    model = timm.create_model("resnet8_camdrop", keep_prob=0.5, guide="avg").train()
    x = torch.randn(2, 3, 16, 16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    outs = []
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), model):
        torch.manual_seed(0)
        outs.append(twin(x))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[2])
