"""The registered variants, by timm's conventions."""

import json

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs

import timm_structdrop
from timm_structdrop.errors import UserError
from timm_structdrop.models.architectures import architectures
from timm_structdrop.models.placement import structdrop_layers, where_in_words
from timm_structdrop.models.slots import find_slots
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.models.timm_cnns import late_cell_norms
from timm_structdrop.models.trace import first_conv

# every architecture once (but NASNet, which takes seconds a pass), and every regularizer once
SMALL = [(name, a) for name, a in architectures.items() if name != "nasnetalarge"]
SAMPLE = sorted(
    {f"{name}_{'dropcluster' if a.regularizers is None else 'dropblock'}" for name, a in SMALL}
    | {f"resnet20_{name}" for name in timm_structdrop.regularizers}
    | {f"resnet18_{name}" for name in timm_structdrop.regularizers}
)
SAMPLE = [name for name in SAMPLE if name in variants]


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def image(model, batch=2, size=64):
    channels = first_conv(model).in_channels
    size = min(
        size, timm.get_pretrained_cfg_value(model.pretrained_cfg["architecture"], "input_size")[-1]
    )
    return torch.randn(batch, channels, size, size)


def test_every_architecture_has_every_regularizer_that_fits():
    everywhere = ("dropcluster", "dropblock", "camdrop", "rblock", "dropout", "spatialdropout")
    for name, architecture in architectures.items():
        for regularizer in architecture.regularizers or everywhere:
            assert timm.is_model(f"{name}_{regularizer}")
    assert "resnet110_stochasticdepth" in timm.list_models("*_stochasticdepth")
    assert not timm.is_model("lenet5_stochasticdepth")  # it has no residual branch to drop


@pytest.mark.parametrize("name", architectures)
def test_the_residual_architectures_are_those_with_residual_branches(name):
    architecture = architectures[name]
    with torch.device("meta"):
        model = architecture.constructor()
    slots = find_slots(model, architecture.cfg["input_size"][-2:])
    assert architecture.residual == any(slot.kind == "last_conv" for slot in slots)
    fits = architecture.regularizers is None and architecture.residual
    assert timm.is_model(f"{name}_stochasticdepth") == fits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50_dropblock", "convolutions and skips of groups 3 and 4, gamma / 4 in group 3"),
        ("resnet20_dropblock", "convolutions and skips of groups 2 and 3, gamma / 4 in group 2"),
        ("efficientnet_b0_dropblock", "convolutions of groups 3 and 4, gamma / 4 in group 3"),
        ("nasnetalarge_dropblock", "after 120 modules, cell_9.conv_prev_1x1.bn to cell_17."),
        ("resnet20_camdrop", "convolutions and skips (before projection) of groups 1, 2 and 3"),
        ("resnet50_camdrop", "convolutions and skips (before projection) of groups 3 and 4"),
        ("resnet18_rblock", "convolutions and skips of groups 3 and 4, fork in front of them"),
        ("resnet18_stochasticdepth", "residual branches of groups 1 to 4, one rate for all"),
        ("resnet18_dropcluster", "stem convolution, before any pooling"),
        ("vgg16_cifar_dropout", "convolutions of group 5"),
    ],
)
def test_words_say_where_the_layers_are(name, words):
    variant = variants[name]
    with torch.device("meta"):
        plain = variant.architecture.constructor()
    size = variant.architecture.cfg["input_size"][-2:]
    found = variant.where(plain, find_slots(plain, size))
    assert found.startswith(words) and (found == words or "nasnet" in name)
    if "nasnet" not in name:
        assert where_in_words(build(name), variant.regularizer) == found


def test_words_follow_what_is_asked_for():
    model = build("resnet50_dropblock", stages=[4])
    assert where_in_words(model, "dropblock") == "convolutions and skips of group 4"
    model = build("resnet18_dropblock", where=["stem", "stage"], stages=[0, 4])
    words = "stem convolution and ends of group 4, gamma / 4 in the stem"
    assert where_in_words(model, "dropblock") == words
    model = build("resnet18_rblock", sub_models="r-drop")
    assert where_in_words(model, "rblock").startswith("features before the classifier")
    timm_structdrop.attach(model, "dropcluster", modules=["act1"])
    timm_structdrop.attach(model, "dropcluster", modules=["layer2"])
    assert where_in_words(model, "dropcluster") == "after act1; after layer2"
    assert where_in_words(model, "dropblock") is None
    doc = timm.model_entrypoint("resnet20_camdrop").__doc__
    assert doc.endswith("convolutions and skips (before projection) of groups 1, 2 and 3.")


@pytest.mark.parametrize("nothing", [{"stages": ()}, {"where": ()}, {"modules": ()}])
def test_a_variant_without_layers_is_refused(nothing):
    with pytest.raises(UserError, match=r"must name at least one .*; got none"):
        build("resnet8_dropblock", **nothing)


def test_our_models_are_apart_from_timms():
    assert set(timm.list_models(module="structdrop_variants")) == set(variants)
    assert not set(variants) & set(timm.list_models(module="resnet"))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_checkpoint_of_the_base_architecture_loads_strictly(name):
    base = build(variants[name].architecture.name).eval()
    model = build(name).eval()
    model.load_state_dict(base.state_dict(), strict=True)
    x = image(model)
    assert torch.equal(model(x), base(x))


def test_rates_are_timms_keywords():
    model = build("resnet18_dropcluster", drop_block_rate=0.3, drop_rate=0.4, drop_path_rate=0.2)
    assert [layer.rate() for layer in structdrop_layers(model)] == [0.3]
    assert model.drop_rate == 0.4
    assert any(isinstance(m, timm.layers.DropPath) for m in model.modules())
    assert build("resnet18_dropcluster").act1.dropcluster.rate() == 0.1
    assert build("resnet18_dropcluster", drop_block_rate=0.0).act1.dropcluster.rate() == 0.0
    kept = build("resnet18_dropcluster", keep_prob=0.9).act1.dropcluster.rate()
    assert kept == pytest.approx(0.1)


def test_in_chans_and_classifier():
    model = build("resnet18_dropcluster", in_chans=1, num_classes=0)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 512)
    model.reset_classifier(4)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 4)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for enable in (False, True):
        model = build("resnet18_dropblock", num_classes=3, drop_block_rate=0.3)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    "name", ["resnet18_dropcluster", "resnet20_dropblock", "lenet5_dropcluster"]
)
def test_features_only_contains_the_regularizer(name):
    model = build(name, features_only=True)
    assert list(structdrop_layers(model))
    size = variants[name].architecture.cfg["input_size"]
    maps = model(torch.randn(2, size[0], 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()


def test_the_stored_labels_have_the_training_resolution():
    assert build("resnet50_dropcluster").act1.dropcluster.labels.shape == (64, 112, 112)
    small = build("resnet50_dropcluster", img_size=32)
    assert small.act1.dropcluster.labels.shape == (64, 16, 16)
    wide = build("resnet18_dropcluster", img_size=[64, 96])
    assert wide.act1.dropcluster.labels.shape == (64, 32, 48)


def test_placement_keywords():
    model = build("resnet50_dropblock", stages=[1], where="stage", block_size=5)
    assert [layer.block_size for layer in structdrop_layers(model)] == [5]


def test_settings_are_json_able_and_recorded():
    model = build("resnet18_dropcluster", n_clusters=7, rounding="floor")
    args = timm.models.get_model_args(model)
    assert args["n_clusters"] == 7
    assert args["rounding"] == "floor"
    for layer in structdrop_layers(model):
        assert json.loads(json.dumps(layer.settings())) == layer.settings()


def test_timms_weights_under_timms_tags():
    ours = timm.list_pretrained("resnet50_dropcluster*")
    theirs = [
        f"resnet50_dropcluster.{cfg.tag}" for cfg in get_arch_pretrained_cfgs("resnet50").values()
    ]
    assert set(theirs) <= set(ours)
    cfg = timm.get_pretrained_cfg("resnet50_dropcluster.a1_in1k")
    assert cfg.hf_hub_id == "timm/resnet50.a1_in1k"
    assert "not yet fitted" in cfg.description
    assert cfg.architecture == "resnet50_dropcluster"


def test_a_file_with_the_base_architectures_weights_is_pretrained_weights(tmp_path):
    base = build("resnet18", num_classes=1000).eval()
    torch.save(base.state_dict(), tmp_path / "base.pth")
    model = build(
        "resnet18_dropcluster",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "base.pth")},
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), base(x))
    tuned = build(
        "resnet18_dropcluster",
        pretrained=True,
        num_classes=4,
        in_chans=1,
        pretrained_cfg_overlay={"file": str(tmp_path / "base.pth")},
    )
    assert tuned.fc.out_features == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_clusters": 300}, r"n_clusters must be in \[2, min\(256, H\*W = 1024\)\]; got 300"),
        ({"drop_block_rate": 1.0}, r"drop_prob must be in \[0, 1\); got 1.0"),
        ({"keep_prob": 0.0}, r"keep_prob must be in \(0, 1\]; got 0.0"),
        ({"keep_prob": 0.9, "drop_block_rate": 0.1}, r"got both 0.1 and 0.9"),
        ({"stages": [9], "where": "stage"}, r"are 1, 2, 3; got 9"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(UserError, match=message):
        build("resnet20_dropcluster", **kwargs)


def test_the_amoebanet_setting_on_nasnet():
    """After every batch norm of the last half of the cells, block 11, keep 0.9."""
    with torch.device("meta"):
        plain = timm.create_model("nasnetalarge", num_classes=2)
    cells = ["cell_9", "cell_10", "cell_11", "reduction_cell_1"]
    cells += [f"cell_{i}" for i in range(12, 18)]
    arguments = late_cell_norms(plain)
    norms = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d) and name.split(".")[0] in cells
    ]
    assert arguments == {"modules": norms, "block_size": 11}
    assert "nasnetalarge_dropblock" in variants
    assert timm_structdrop.regularizers["dropblock"].layer.default_drop_prob() == 0.1


@pytest.mark.parametrize(
    "name, defaults",
    [
        ("dropblock", {"drop_prob": 0.1, "block_size": 7, "gamma": "exact"}),
        ("dropcluster", {"drop_prob": 0.1, "n_clusters": 15, "rounding": "stochastic"}),
        ("camdrop", {"drop_prob": 0.1, "block_size": 8, "guide": "cam", "channels": "dominant"}),
        ("rblock", {"drop_prob": 0.2, "block_size": 3, "sub_models": "sdropdml"}),
    ],
)
def test_who_sets_nothing_gets_the_papers_settings(name, defaults):
    model = timm.create_model(f"resnet20_{name}")
    (first, *_) = structdrop_layers(model)
    settings = {**first.settings(), "drop_prob": first.target_drop_prob}
    assert defaults.items() <= settings.items()


def test_an_unknown_keyword_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"keyword argument 'blocksize' \(nearest: block_size"):
        timm.create_model("resnet20_dropblock", blocksize=3)
