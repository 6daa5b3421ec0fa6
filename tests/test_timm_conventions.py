"""What timm's own tests ask of a model, asked of every registered variant.

All of them are built. What is computed is computed for every regularizer in one network of each
kind and for one regularizer in each of the others, which are deeper or timm's.
"""

import math

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import get_notrace_modules
from torch import Tensor, nn
from torchvision.models import feature_extraction

from timm_structdrop.layers import DropCluster2d
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.models.trace import first_conv
from timm_structdrop.training import make_task

ALL = sorted(variants)
OF_EACH_KIND = ("lenet5", "resnet8", "vgg16_cifar", "resnet18", "resnet50_cifar")
DEEP = ("nasnetalarge", "resnet101", "resnet110", "resnet152", "resnet34", "resnet34_cifar",
        "resnet44", "resnet56")  # fmt: skip


def one_for_each_other_architecture() -> list[str]:
    """The regularizers in turn, so that these networks meet all of them."""
    names: dict[str, list[str]] = {}
    for name in ALL:
        names.setdefault(variants[name].architecture.name, []).append(name)
    others = [names[architecture] for architecture in sorted(set(names) - set(OF_EACH_KIND))]
    return [fitting[turn % len(fitting)] for turn, fitting in enumerate(others)]


def architecture(name: str) -> str:
    return variants[name].architecture.name


COMPUTED = [name for name in ALL if architecture(name) in OF_EACH_KIND]
COMPUTED += one_for_each_other_architecture()
ONE_EACH = sorted({architecture(name): name for name in COMPUTED}.values())
SHALLOW = [name for name in ONE_EACH if architecture(name) not in DEEP]
TRACED = sorted({*SHALLOW, *(name for name in COMPUTED if architecture(name) == "resnet8")})
KINDS_EXPORTED = ("lenet5", "resnet8", "resnet18", "vgg16_cifar", "convnext_tiny")
EXPORTED = [name for name in TRACED if architecture(name) in KINDS_EXPORTED]
LEVELS = sorted({*TRACED, *(name for name in COMPUTED if name.startswith(("lenet5", "vgg16")))})


def build(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(model: nn.Module, batch: int = 2) -> Tensor:
    """Of the default size, but of at most 64 x 64 pixels."""
    size = [min(side, 64) for side in model.default_cfg["input_size"][1:]]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, first_conv(model).in_channels, *size, generator=generator)


def shapes_only(name: str, **kwargs) -> tuple[nn.Module, Tensor]:
    """The model and one image of its default size, without memory for either."""
    model = build(name, device="meta", **kwargs).eval()
    for layer in model.modules():
        if isinstance(layer, DropCluster2d):  # its forward reads it
            layer.structured = torch.ones(len(layer.structured), dtype=torch.bool)
    size = timm.get_pretrained_cfg_value(name, "input_size")
    return model, torch.empty(1, *size, device="meta")


@pytest.fixture(scope="module")
def model(request) -> nn.Module:
    """The variant with 5 classes; tests of one variant share it."""
    return build(request.param, num_classes=5)


def computed(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", names, indirect=True)


@pytest.mark.parametrize("name", ALL)
def test_the_default_cfg_describes_the_model(name):
    model = build(name, device="meta")
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["architecture"] == name
    for key in ("input_size", "num_classes", "pool_size", "first_conv", "classifier"):
        assert timm.get_pretrained_cfg_value(name, key) == cfg[key], "the model is the name's"
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"] == model.num_classes
    assert model.num_features > 0 and model.head_hidden_size > 0
    assert {layer.regularizer for layer in structdrop_layers(model)} == {variants[name].regularizer}
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model.num_classes == 0 and not list(model.get_classifier().parameters())


@pytest.mark.parametrize("name", ONE_EACH)
def test_shapes_with_and_without_classifier_and_pooling(name):
    model, image = shapes_only(name)
    unpooled = (1, model.num_features, *model.default_cfg["pool_size"])
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == unpooled
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(image).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model(image).shape == unpooled
    if name in SHALLOW:
        headless, _ = shapes_only(name, num_classes=0, global_pool="")
        assert headless(image).shape == unpooled


@pytest.mark.parametrize("name", LEVELS)
def test_features_of_every_level_keep_the_regularizer(name):
    model, image = shapes_only(name, features_only=True)
    whole = build(name, device="meta")
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    maps = model(image)
    assert [feature.shape[1] for feature in maps] == channels
    for feature, reduction in zip(maps, reductions, strict=True):
        for side, full in zip(feature.shape[2:], image.shape[2:], strict=True):
            assert 1 <= side <= math.ceil(full / reduction)
    assert len(list(structdrop_layers(model))) == len(list(structdrop_layers(whole)))


@pytest.mark.parametrize("name", [name for name in SHALLOW if architecture(name) in OF_EACH_KIND])
def test_every_level_alone(name):
    expected = build(name, device="meta", features_only=True).feature_info
    for index, channels, reduction in zip(
        expected.out_indices, expected.channels(), expected.reduction(), strict=True
    ):
        model, image = shapes_only(name, features_only=True, out_indices=(index,))
        assert model.feature_info.channels() == [channels]
        assert model.feature_info.reduction() == [reduction]
        (feature,) = model(image)
        assert feature.shape[1] == channels


@computed(COMPUTED)
def test_a_training_step_reaches_every_parameter(model):
    clusters = [layer for layer in model.modules() if isinstance(layer, DropCluster2d)]
    for layer in clusters:
        layer.request_fit(at=0)
    x = images(model)
    torch.manual_seed(2)
    result = make_task(model.train(), nn.CrossEntropyLoss(), verbose=False)(x, torch.tensor([0, 4]))
    assert result["output"].shape == (2, 5) and result["output"].isfinite().all()
    result["loss"].backward()
    assert [path for path, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(layer.is_fitted for layer in clusters)
    model.zero_grad()


@computed(COMPUTED)
def test_evaluation_is_the_same_twice_and_checkpointed(model):
    x = images(model)
    with torch.no_grad():
        expected = model.eval()(x)
        assert expected.shape == (2, 5) and expected.isfinite().all()
        assert torch.equal(model(x), expected)
    if architecture(model.default_cfg["architecture"]) != "nasnetalarge":  # timm's has none
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), expected)
        model.set_grad_checkpointing(False)


@computed(COMPUTED)
def test_intermediates(model):
    if not hasattr(model, "forward_intermediates"):
        assert architecture(model.default_cfg["architecture"]) in ("densenet121", "nasnetalarge")
        return
    x = images(model)
    with torch.no_grad():
        features = model.eval().forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    for feature, info in zip(maps, model.feature_info, strict=True):
        assert feature.isfinite().all()
        assert feature.shape[2] <= math.ceil(x.shape[2] / info["reduction"]) + 1


# the plain forward of a traced model is not how R-Block and CamDrop are trained, and they say so
@pytest.mark.filterwarnings("ignore:an R-Block model is trained without its task")
@pytest.mark.filterwarnings("ignore:CamDrop2d. no target")
@computed(TRACED)
def test_fx_traces_training_and_evaluation(model):
    x = images(model)
    settings = {"leaf_modules": get_notrace_modules(), "param_shapes_constant": True}
    of_training, of_evaluation = feature_extraction.get_graph_node_names(model, settings)
    traced = feature_extraction.create_feature_extractor(
        model, train_return_nodes=of_training[-1:], eval_return_nodes=of_evaluation[-1:],
        tracer_kwargs=settings,
    )  # fmt: skip
    with torch.no_grad():
        (logits,) = traced.eval()(x).values()
        assert torch.equal(logits, model.eval()(x))
    (logits,) = traced.train()(x).values()
    logits.mean().backward()
    assert all(p.grad is not None for p in traced.parameters())
    assert len(list(structdrop_layers(traced))) == len(list(structdrop_layers(model)))
    model.zero_grad()


def test_timms_own_extractor_takes_features_of_a_training_model():
    model = build("resnet8_dropblock", drop_block_rate=0.5).train()
    extractor = create_feature_extractor(model, {"layer3": "map"})
    torch.manual_seed(0)
    one, other = (extractor(images(model))["map"] for _ in range(2))
    assert one.shape == (2, 64, 8, 8)
    assert not torch.equal(one, other), "it drops"


@computed(EXPORTED)
def test_export(model):
    x = images(model)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (x,)).module()
        torch.testing.assert_close(exported(x), model(x))
