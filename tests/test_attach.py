"""attach: any regularizer on any CNN, what it leaves as it was, and how it is recorded."""

import copy
import io
import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.utils import ModelEmaV3
from torch import nn

import timm_structdrop
from timm_structdrop import attach, restore, set_drop_prob
from timm_structdrop.errors import UserError
from timm_structdrop.layers import DropBlock2d, DropCluster2d
from timm_structdrop.models.placement import paper_schedule, structdrop_layers
from timm_structdrop.training.steps import tell_step

# one small model of each family, and a size that gives every stage a map of several pixels
FAMILIES = {
    "resnetv2_18": 64,
    "regnety_002": 64,
    "densenet121": 64,
    "convnext_atto": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_small_050": 64,
    "vgg11_bn": 64,
    "hrnet_w18_small": 64,
    "dla46_c": 64,
    "inception_next_atto": 64,
    "xception41": 64,
    "dpn48b": 64,
    "cspresnet50": 64,
    "repvgg_a0": 64,
    "ghostnet_050": 64,
    "darknet17": 64,
    "dm_nfnet_f0": 64,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_regularizers_and_keeps_keys_and_eval_output(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, FAMILIES[name], FAMILIES[name])
    before, keys = model(x), list(model.state_dict())
    attach(model, "dropblock", stages=[3], block_size=3, drop_prob=0.3)
    attach(model, "dropcluster", n_clusters=4, img_size=FAMILIES[name])
    own = ("labels", "structured", "fitted_at", "fitted_size", "step")
    assert [k for k in model.state_dict() if k.rpartition(".")[2] not in own] == keys
    assert torch.equal(model(x), before)
    stem = next(m for m in structdrop_layers(model) if isinstance(m, DropCluster2d))
    stem.request_fit(at=1)
    model.train()
    model(x).sum().backward()
    assert stem.is_fitted
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_dropblock_sits_where_the_paper_puts_it_in_a_resnet():
    model = attach(timm.create_model("resnet50"), "dropblock")
    where = {n: m for n, m in model.named_modules() if isinstance(m, DropBlock2d)}
    # 6 + 3 blocks, each with two inner convolutions, a last one and a skip
    assert len(where) == 9 * 4
    assert {n.split(".")[0] for n in where} == {"layer3", "layer4"}
    assert {m.gamma_scale for n, m in where.items() if n.startswith("layer3")} == {0.25}
    assert {m.gamma_scale for n, m in where.items() if n.startswith("layer4")} == {1.0}
    assert isinstance(model.layer4[0].downsample[-1], DropBlock2d)  # behind the projection
    assert isinstance(model.layer4[1].downsample, DropBlock2d)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"where": ["conv", "last_conv"]}, 9 * 3),
        ({"stages": [4]}, 3 * 4),
        ({"stages": [1], "where": "stage", "block_size": 5}, 1),
        ({"stages": [4], "where": ["stage"]}, 1),
        ({"modules": ["layer2.0", "maxpool"]}, 2),
    ],
)
def test_the_placements_the_papers_sweep(arguments, expected):
    model = attach(timm.create_model("resnet50"), "dropblock", **arguments)
    assert len(list(structdrop_layers(model))) == expected


def test_one_layer_at_the_end_of_a_stage_has_the_full_rate():
    model = attach(timm.create_model("resnet18"), "dropblock", stages=[1], where="stage")
    assert [layer.gamma_scale for layer in structdrop_layers(model)] == [1.0]


def test_a_setting_of_the_user_wins_over_the_papers():
    model = attach(timm.create_model("resnet18"), "dropblock", gamma_scale=0.5)
    assert {layer.gamma_scale for layer in structdrop_layers(model)} == {0.5}


def test_regularizers_compose_and_copies_are_independent():
    model = timm.create_model("resnet18", num_classes=3)
    attach(model, "dropcluster", img_size=64)
    attach(model, "dropblock", drop_prob=0.3)
    twin = copy.deepcopy(model)
    set_drop_prob(twin, 0.0)
    assert {layer.rate() for layer in structdrop_layers(model)} == {0.1, 0.3}
    twin.train()
    assert torch.isfinite(twin(torch.randn(2, 3, 64, 64))).all()


def test_attach_is_active_in_training_after_attach_to_a_model_in_eval():
    model = attach(timm.create_model("resnet18").eval(), "dropblock", drop_prob=0.5)
    assert not any(layer.training for layer in structdrop_layers(model))
    model.train()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x), model(x))


def test_compiled_and_eager_eval_agree():
    model = attach(timm.create_model("resnet18", num_classes=3), "dropcluster", img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


class TestRecord:
    def build(self):
        torch.manual_seed(0)
        model = timm.create_model("convnext_atto", num_classes=3)
        attach(model, "dropcluster", n_clusters=4, img_size=64)
        attach(model, "dropblock", stages=[4], block_size=3)
        model.train()
        next(m for m in structdrop_layers(model) if isinstance(m, DropCluster2d)).request_fit(2)
        model(torch.randn(4, 3, 64, 64))
        return model.eval()

    def test_a_saved_folder_comes_back_with_regularizers_and_state(self, tmp_path):
        model = self.build()
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert twin.structdrop == model.structdrop
        assert [type(m) for m in structdrop_layers(twin)] == [
            type(m) for m in structdrop_layers(model)
        ]
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(twin(x), model(x))
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in twin.state_dict().items())

    def test_the_config_is_json_and_names_the_base(self, tmp_path):
        save_for_hf(self.build(), str(tmp_path), safe_serialization=True)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architecture"] == "structdrop_attached"
        assert config["model_args"]["base"] == "convnext_atto"

    def test_another_number_of_classes_and_features(self, tmp_path):
        model = self.build()
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
        assert tuned(torch.randn(2, 3, 64, 64)).shape == (2, 7)
        labels = next(k for k in model.state_dict() if k.endswith("labels"))
        assert torch.equal(tuned.state_dict()[labels], model.state_dict()[labels])
        features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
        assert len(features(torch.randn(2, 3, 64, 64))) == 4

    def test_restore_repeats_what_was_attached(self):
        model = self.build()
        twin = restore(timm.create_model("convnext_atto", num_classes=3), model.structdrop)
        twin.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(twin.eval()(x), model(x))

    def test_a_record_that_is_none(self):
        with pytest.raises(UserError, match="a record of a regularizer needs a name; got 'x'"):
            restore(timm.create_model("resnet18"), ["x"])

    def test_an_unknown_base(self):
        with pytest.raises(UserError, match="base must be a model timm knows; got 'resnet51'"):
            timm.create_model("structdrop_attached", base="resnet51", regularizers=[])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dropblok", {}, r"must be one of .*; got 'dropblok' \(nearest: dropblock"),
        ("dropblock", {"drop_prob": 1.5}, r"drop_prob must be in \[0, 1\); got 1.5"),
        ("dropblock", {"block_size": 0}, r"block_size must be .*; got 0"),
        ("dropblock", {"blocksize": 3}, r"setting of dropblock must be one of .*got 'blocksize'"),
        ("dropblock", {"stages": [5]}, r"stages of ResNet with a place .* are 1, 2, 3, 4; got 5"),
        ("dropblock", {"where": "skips"}, r"where must name kinds of stem, .*; got 'skips'"),
        ("dropblock", {"modules": ["layer9"]}, r"modules must be names .*; got 'layer9'"),
        ("dropblock", {"modules": []}, r"modules must name at least one module; got none"),
        ("dropcluster", {"n_clusters": 10**6}, r"n_clusters must be in .*; got 1000000"),
        ("dropcluster", {"img_size": 0}, r"img_size must be one or two positive integers; got 0"),
    ],
)
def test_bad_input(name, arguments, message):
    model = timm.create_model("resnet18")
    with pytest.raises(UserError, match=message):
        attach(model, name, **arguments)
    assert not list(structdrop_layers(model))


def test_a_regularizer_that_a_model_cannot_carry():
    with pytest.raises(UserError, match="stochasticdepth needs a place of kind last_conv; VGG has"):
        attach(timm.create_model("vgg11_bn"), "stochasticdepth", img_size=64)


def test_set_drop_prob_reaches_timms_layers_if_asked():
    model = attach(timm.create_model("resnet18", drop_path_rate=0.2), "dropblock")
    paths = [m for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    set_drop_prob(model, 0.05)
    assert {layer.rate() for layer in structdrop_layers(model)} == {0.05}
    assert max(path.drop_prob for path in paths) == pytest.approx(0.2)
    set_drop_prob(model, 0.07, include_timm=True)
    assert {path.drop_prob for path in paths} == {0.07}


def test_set_drop_prob_on_a_model_without_layers():
    with pytest.raises(UserError, match="needs a structured-dropout layer; ResNet has none"):
        set_drop_prob(timm.create_model("resnet18"), 0.1)


def test_the_public_names():
    assert {"dropcluster", "dropblock", "dropout"} <= set(timm_structdrop.regularizers)
    assert issubclass(timm_structdrop.regularizers["dropblock"].layer, nn.Module)


def test_the_papers_schedule_is_the_default():
    model = timm.create_model("resnet18")
    assert paper_schedule(model) == "constant"
    attach(model, "dropblock")
    assert paper_schedule(model) == "linear"
    attach(model, "dropcluster", img_size=64)
    assert paper_schedule(model) == "constant"


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "convnext_atto"])
def test_layers_at_the_head_survive_another_number_of_classes(name):
    model = timm.create_model(name, num_classes=3)
    attach(model, "rblock", sub_models="c-drop", drop_prob=0.5, img_size=64)
    pool = "head.global_pool" if name == "convnext_atto" else "global_pool"
    attach(model, "dropout", modules=[pool], drop_prob=0.3)
    layers = list(structdrop_layers(model))
    ran = []
    hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in layers]
    x = torch.randn(4, 3, 64, 64)
    for num_classes in (7, 0, 5):
        model.reset_classifier(num_classes)
        assert {id(layer) for layer in structdrop_layers(model)} == set(map(id, layers))
        ran.clear()
        with tell_step(model.train(), forked=True):
            out = model(x)
        assert sorted(map(id, ran)) == sorted(map(id, layers))
        assert len(out) == 8
        assert num_classes in (0, out.shape[1])
    for hook in hooks:
        hook.remove()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        twin.eval().reset_classifier(2)
        assert len(list(structdrop_layers(twin))) == 2
        assert (twin(x).shape[1], model.eval()(x).shape[1]) == (2, 5)


def test_layers_that_pruning_takes_away_do_not_come_back():
    model = timm.create_model("resnet18", num_classes=3)
    attach(model, "dropblock", modules=["layer2", "layer4.1.act1"])
    model.prune_intermediate_layers([2])
    assert len(list(structdrop_layers(model))) == 1


def test_an_averaged_copy_of_an_attached_model_follows_it():
    model = attach(timm.create_model("resnet18", num_classes=3), "dropcluster", img_size=64)
    ema = ModelEmaV3(model, decay=0.0)
    model.act1.dropcluster.request_fit(at=1)
    model.train()(torch.randn(4, 3, 64, 64))
    ema.update(model)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ema.module.eval()(x), model.eval()(x))


def test_features_of_an_attached_model_contain_the_regularizer():
    model = timm.create_model(
        "structdrop_attached",
        base="regnety_002",
        regularizers=[{"name": "dropblock", "stages": [4], "drop_prob": 0.5}],
        features_only=True,
    ).train()
    x = torch.randn(2, 3, 64, 64)
    first, second = model(x), model(x)
    assert not torch.equal(first[-1], second[-1])
