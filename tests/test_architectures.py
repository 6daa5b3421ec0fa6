"""The plain architectures: their shapes, and every convention timm's own models keep."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_feature_extractor, get_graph_node_names
from timm.models import generate_default_cfgs, get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.models.architectures import architectures, register_architecture
from timm_structdrop.models.cifar_resnet import OptionAShortcut, option_a_shortcut
from timm_structdrop.models.lenet import PadToAtLeast

PARAMETERS = {
    "resnet8": 75_290,
    "resnet14": 172_506,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "vgg16_cifar": 14_724_042,
    "lenet5": 61_706,
}
SMALL = [name for name, architecture in architectures.items() if not architecture.timm_name]
RESNETS = [name for name in SMALL if name.startswith("resnet")]
CHAINS = ["vgg16_cifar", "lenet5"]
ONE_OF_EACH_CLASS = ["resnet8", "resnet18_cifar", *CHAINS]
IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def build(name: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def images(name: str, batch: int = 2, size: tuple[int, int] = (32, 32), **kwargs) -> Tensor:
    channels = kwargs.get("in_chans", architectures[name].cfg["input_size"][0])
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def with_running_statistics(model: nn.Module) -> nn.Module:
    """Batch norms whose statistics and weights are not 0 and 1, so that eval mode shows them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def test_the_registry_holds_what_the_papers_use():
    assert set(PARAMETERS) <= set(SMALL)
    assert {name: architectures[name].timm_name for name in IMAGENET} == dict(
        zip(IMAGENET, IMAGENET, strict=True)
    )
    assert all(architecture.name == name for name, architecture in architectures.items())


def test_a_name_is_registered_once_and_with_one_source_of_its_cfg():
    with pytest.raises(ValueError, match="'lenet5' is already registered"):
        register_architecture("lenet5", nn.Identity, summary="", cfg={})
    with pytest.raises(ValueError, match="either cfg or timm_name"):
        register_architecture("lenet6", nn.Identity, summary="")
    with pytest.raises(ValueError, match="either cfg or timm_name"):
        register_architecture("lenet6", nn.Identity, summary="", cfg={}, timm_name="resnet18")
    assert "lenet6" not in architectures


def test_timm_lists_the_small_models_in_a_module_of_their_own():
    assert sorted(timm.list_models(module="structdrop_small")) == sorted(SMALL)
    ours = set(timm.list_models(module="structdrop_small"))
    assert not ours & set(timm.list_models(module=["resnet", "vgg"]))


@pytest.mark.parametrize("name", SMALL)
def test_models_are_built_under_their_own_name(name):
    model = build(name, device="meta")
    assert model.pretrained_cfg["architecture"] == name
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name):
    model = build(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in path
    ]
    number = int("".join(filter(str.isdigit, name.split("_")[0])))
    # VGG-16's three linear layers are one here; LeNet-5 is C1, C3, C5, F6 and the classifier.
    assert len(layers) == (number - 2 if name == "vgg16_cifar" else number)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_resnets_have_timms_names_and_shapes(name):
    ours = architectures[name].constructor(device="meta").state_dict()
    timms = timm.create_model(name, device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in timms.items()}
    assert list(ours) == list(timms)


@pytest.mark.parametrize("name", IMAGENET)
def test_a_variant_shares_timms_weights_under_timms_tags(name):
    cfgs = generate_default_cfgs(architectures[name].default_cfgs("variant"))
    default = get_pretrained_cfg(name)
    assert cfgs["variant"].tags[0] == default.tag
    assert cfgs["variant"].cfgs[default.tag].hf_hub_id == f"timm/{name}.{default.tag}"
    tags = {tagged.split(".", 1)[1] for tagged in timm.list_pretrained(f"{name}.*")}
    assert set(cfgs["variant"].tags) == tags
    assert architectures[name].cfg["input_size"] == default.input_size


def test_the_option_a_shortcut_is_subsampling_and_zero_channels():
    for (height, width), out_channels, stride in [
        ((8, 8), 6, 2), ((7, 4), 3, 2), ((5, 3), 5, 1), ((1, 1), 4, 2), ((6, 9), 7, 3),
    ]:  # fmt: skip
        x = torch.randn(2, 3, height, width)
        expected = torch.zeros(
            2, out_channels, math.ceil(height / stride), math.ceil(width / stride)
        )
        for b in range(2):
            for c in range(3):
                for i in range(expected.shape[2]):
                    for j in range(expected.shape[3]):
                        expected[b, c, i, j] = x[b, c, stride * i, stride * j]
        assert torch.equal(option_a_shortcut(x, out_channels, stride), expected)
    with pytest.raises(ValueError, match="at least in_channels = 8; got 4"):
        OptionAShortcut(8, 4, 2)


@pytest.mark.parametrize("name", ["resnet8", "resnet110"])
def test_option_a_shortcuts_sit_where_a_group_begins(name):
    model = build(name)
    slots = {path: module for path, module in model.named_modules() if path.endswith(".downsample")}
    assert list(slots) == ["layer2.0.downsample", "layer3.0.downsample"]
    for slot in slots.values():
        assert isinstance(slot, nn.Sequential) and isinstance(slot[0], OptionAShortcut)
        assert not slot.state_dict()
    before = list(model.state_dict())
    seen = []
    probe = nn.Identity()
    probe.register_forward_hook(lambda *args: seen.append(args[2].shape))
    slots["layer3.0.downsample"].append(probe)
    model(images(name))
    assert seen == [(2, 64, 8, 8)]
    assert list(model.state_dict()) == before


def slow_batch_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    mean, var, scale, shift = (
        weights[f"{name}.{part}"].view(1, -1, 1, 1)
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def test_resnet20_computes_what_the_paper_says():
    model = with_running_statistics(build("resnet20"))
    weights = model.state_dict()
    x = inputs = images("resnet20", size=(32, 28))

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int) -> Tensor:
        x = F.conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=1)
        return slow_batch_norm(x, weights, bn)

    x = torch.relu(conv_bn(x, "conv1", "bn1", 1))
    for group, width in ((1, 16), (2, 32), (3, 64)):
        for i in range(3):
            stride = 2 if group > 1 and i == 0 else 1
            shortcut = torch.zeros(2, width, x.shape[2] // stride, x.shape[3] // stride)
            shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
            block = f"layer{group}.{i}"
            x = torch.relu(conv_bn(x, f"{block}.conv1", f"{block}.bn1", stride))
            x = torch.relu(conv_bn(x, f"{block}.conv2", f"{block}.bn2", 1) + shortcut)
    logits = x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(inputs), logits, rtol=1e-4, atol=1e-5)


def test_vgg16_computes_configuration_d():
    model = with_running_statistics(build("vgg16_cifar"))
    weights = model.state_dict()
    convs = [key for key, value in weights.items() if value.ndim == 4]
    x = inputs = images("vgg16_cifar")
    for widths in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
        for width in widths:
            key = convs.pop(0)
            assert weights[key].shape == (width, x.shape[1], 3, 3)
            x = F.conv2d(x, weights[key], padding=1)
            x = torch.relu(slow_batch_norm(x, weights, key.replace("conv1.weight", "bn1")))
        x = F.max_pool2d(x, 2)
    assert not convs and x.shape == (2, 512, 1, 1)
    logits = x.flatten(1) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(inputs), logits, rtol=1e-4, atol=1e-5)


def test_lenet5_at_32_px_ends_in_fully_connected_layers():
    model = build("lenet5").eval()
    weights = model.state_dict()
    x = inputs = images("lenet5", size=(32, 32))
    for key in ("conv1", "layer1.0.conv1"):
        x = torch.relu(F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"]))
        x = F.max_pool2d(x, 2)
    assert x.shape == (2, 16, 5, 5)
    x = x.flatten(1)
    for key in ("layer2.0.conv1", "layer2.1.conv1"):
        x = torch.relu(x @ weights[f"{key}.weight"].flatten(1).T + weights[f"{key}.bias"])
    logits = x @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(inputs), logits, rtol=1e-4, atol=1e-5)


def test_lenet5_pads_small_maps_and_averages_positions_of_large_ones():
    model = build("lenet5").eval()
    small = images("lenet5", size=(28, 28))
    s4 = F.max_pool2d(model.layer1(model.act1(model.conv1(small))), 2)
    assert s4.shape == (2, 16, 4, 4)
    padded = torch.zeros(2, 16, 5, 5)
    padded[:, :, :4, :4] = s4
    c5 = model.layer2[0].conv1
    expected = F.relu(padded.flatten(1) @ c5.weight.flatten(1).T + c5.bias)
    torch.testing.assert_close(model.layer2[0](model.forward_intermediates(small)[1][1]).flatten(1),
                               expected)  # fmt: skip
    assert (
        PadToAtLeast(5)(torch.ones(1, 1, 3, 7)).sum((0, 1)).tolist()
        == [[1] * 7] * 3 + [[0] * 7] * 2
    )
    assert PadToAtLeast(5)(torch.ones(1, 1, 7, 4)).sum((0, 1)).tolist() == [[1] * 4 + [0]] * 7
    large = images("lenet5", size=(36, 32))
    windows = torch.stack([model(large[:, :, top : top + 32]) for top in (0, 4)])
    torch.testing.assert_close(model(large), windows.mean(0))


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50_cifar"])
def test_a_cifar_stem_keeps_the_resolution_and_timms_names(name):
    model = build(name, device="meta")
    timms = timm.create_model(name.removesuffix("_cifar"), num_classes=10, device="meta")
    theirs = {key: value.shape for key, value in timms.state_dict().items()}
    theirs["conv1.weight"] = (64, 3, 3, 3)
    assert {key: value.shape for key, value in model.state_dict().items()} == theirs
    assert isinstance(model.maxpool, nn.Identity)
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]
    dilated = build(name, device="meta", output_stride=8)
    assert [info["reduction"] for info in dilated.feature_info] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "path", "fan"),
    [
        ("resnet18_cifar", "conv1", 64 * 9),
        ("resnet20", "layer3.1.conv2", 64 * 9),
        ("vgg16_cifar", "layer2.0.conv1", 128 * 9),
        ("lenet5", "layer2.0.conv1", 16 * 25),  # fan-in: no batch norm mends the scale
    ],
)
def test_convolutions_start_with_he_initialisation(name, path, fan):
    conv = build(name).get_submodule(path)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
    assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("name", SMALL)
def test_the_default_cfg_describes_the_model(name):
    model = build(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    assert model.num_classes == 10 and model.in_chans == cfg["input_size"][0]
    x = torch.randn(2, *cfg["input_size"])
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pre_logits)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_classifier_and_pooling_can_be_left_out_or_replaced(name):
    x = images(name)
    bare = build(name, num_classes=0, global_pool="").eval()
    assert bare(x).shape == (2, bare.num_features, *bare.default_cfg["pool_size"])
    model = build(name, dtype=torch.float64).train()
    model.reset_classifier(7, "catavgmax")
    assert model.num_classes == 7 and model.head_hidden_size == 2 * model.num_features
    assert model.fc.weight.dtype == torch.float64 and model.fc.training
    assert model(x.double()).shape == (2, 7)
    model.eval().reset_classifier(3)
    assert model.head_hidden_size == 2 * model.num_features and not model.fc.training
    assert model(x.double()).shape == (2, 3)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_receives_a_gradient(name):
    model = build(name, num_classes=42, in_chans=2).train()
    logits = model(images(name, in_chans=2))
    assert logits.shape == (2, 42) and logits.isfinite().all()
    logits.square().mean().backward()
    assert [path for path, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_drop_rate_is_dropout_before_the_classifier(name):
    model = build(name, drop_rate=0.75)
    features = torch.ones(50, model.num_features, 1, 1)
    dropped = model.train().forward_head(features, pre_logits=True)
    share = (dropped == 0).float().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / dropped.numel())
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), features.flatten(1))


@pytest.mark.parametrize("name", RESNETS)
def test_drop_path_follows_timms_linear_rule(name):
    model = build(name, drop_path_rate=0.3, device="meta")
    blocks = [block for stage in model.children() if isinstance(stage, nn.Sequential)
              for block in stage]  # fmt: skip
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks]
    assert rates == pytest.approx([0.3 * i / (len(blocks) - 1) for i in range(len(blocks))])
    assert not any(isinstance(m, DropPath) for m in build(name, device="meta").modules())


@pytest.mark.parametrize("name", CHAINS)
def test_drop_path_needs_residual_branches(name):
    build(name, drop_path_rate=0.0, device="meta")
    with pytest.raises(UserError, match=r"drop_path_rate must be 0 .* got 0\.1"):
        build(name, drop_path_rate=0.1)


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_a_depth_is_6n_plus_2(depth):
    with pytest.raises(UserError, match=rf"6n \+ 2 with n >= 1; got {depth}"):
        architectures["resnet20"].constructor(depth=depth)


def test_residual_blocks_start_as_their_shortcut_unless_told_otherwise():
    weights = [
        build("resnet8", **kwargs).layer1[0].bn2.weight.abs().sum().item()
        for kwargs in ({}, {"zero_init_last": False})
    ]
    assert weights == [0, 16]


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_end_in_the_features(name):
    model = build(name).eval()
    x = images(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(final, maps[-1])
        assert len(maps) == len(model.feature_info) >= 3
        for info, feature in zip(model.feature_info, maps, strict=True):
            assert feature.shape[1] == info["num_chs"]
            assert max(feature.shape[2:]) <= math.ceil(32 / info["reduction"])
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert all(map(torch.equal, last_two, maps[-2:]))
        early, first = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(first[0], maps[0])
    assert torch.equal(early, maps[0])


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_features_only_returns_each_feature(name):
    x = images(name)
    reference = build(name).eval()
    maps = reference.forward_intermediates(x, intermediates_only=True)
    everything = build(name, features_only=True).eval()
    assert all(map(torch.equal, everything(x), maps))
    assert everything.feature_info.channels() == [m.shape[1] for m in maps]
    for index, expected in enumerate(maps):
        (feature,) = build(name, features_only=True, out_indices=(index,)).eval()(x)
        assert torch.equal(feature, expected)
    for feature_cls in ("getter", "hook", "fx"):
        model = build(name, features_only=True, out_indices=(0, -2), feature_cls=feature_cls)
        first, last_but_one = model.eval()(x)
        assert torch.equal(first, maps[0]) and torch.equal(last_but_one, maps[-2])


@pytest.mark.parametrize("name", ["resnet8", *CHAINS])
@pytest.mark.parametrize("kept", [[0], [-2], [0, 1]])
def test_pruning_keeps_what_is_wanted_and_drops_the_rest(name, kept):
    model = build(name).eval()
    x = images(name)
    expected = model.forward_intermediates(x, kept, intermediates_only=True)
    size = sum(p.numel() for p in model.parameters())
    indices = model.prune_intermediate_layers(kept, prune_head=False)  # it has nothing to stand on
    assert indices == [index % len(model.feature_info) for index in kept]
    final, maps = model.forward_intermediates(x, indices)
    assert all(map(torch.equal, maps, expected))
    assert torch.equal(final, expected[-1]) and torch.equal(model(x), expected[-1])
    assert model.num_features == expected[-1].shape[1] and model.num_classes == 0
    assert sum(p.numel() for p in model.parameters()) < size


def test_pruning_nothing_keeps_the_head_if_asked():
    model = build("lenet5")
    assert model.prune_intermediate_layers([0, 2], prune_head=False) == [0, 2]
    assert model.num_classes == 10 and model(images("lenet5")).shape == (2, 10)
    model.prune_intermediate_layers(1)
    assert model.num_classes == 0 and model(images("lenet5")).shape == (2, 84, 1, 1)


@pytest.mark.parametrize("indices", [0, 4, [], [3], [-4]])
def test_features_out_of_range_are_refused(indices):
    with pytest.raises(ValueError, match="must be in"):
        build("lenet5").forward_intermediates(images("lenet5"), indices)
    with pytest.raises(ValueError, match="NCHW; got NHWC"):
        build("lenet5").forward_intermediates(images("lenet5"), output_fmt="NHWC")


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18_cifar", *CHAINS])
def test_gradient_checkpointing_changes_memory_only(name):
    results = []
    for enable in (False, True):
        model = build(name).train()
        model.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t) or t, lambda t: t
        ):
            logits, _ = model.forward_intermediates(images(name))
            logits = model.forward_head(logits)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in model.parameters()], len(saved)))
    (plain, plain_grads, plain_saved), (other, other_grads, other_saved) = results
    torch.testing.assert_close(plain, other)
    for expected, grad in zip(plain_grads, other_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert other_saved < plain_saved


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups_follow_the_depth(name, coarse):
    model = build(name, device="meta")
    group_of = group_parameters(model, model.group_matcher(coarse), reverse=True)
    in_order = [group_of[path] for path, _ in model.named_parameters()]
    assert in_order == sorted(in_order)
    blocks = [path.rsplit(".", 2)[0] for path in group_of if path.startswith("layer")]
    blocks = {path.split(".downsample")[0] for path in blocks}
    stages = {path.split(".")[0] for path in blocks}
    assert len(set(in_order)) == 2 + len(stages if coarse else blocks)
    assert {path for path in group_of if group_of[path] == max(in_order)} == {
        "fc.weight",
        "fc.bias",
    }


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_fx_extraction_gives_the_same_logits(name):
    model = build(name).eval()
    x = images(name)
    nodes = {path: path for path in ("layer1", "layer2", "fc")}
    extractor = create_feature_extractor(model, nodes)
    with torch.no_grad():
        found = extractor(x)
        assert torch.equal(found["fc"], model(x))
        first = [info["module"] for info in model.feature_info].index("layer1")
        maps = model.forward_intermediates(x, [first, first + 1], intermediates_only=True)
        assert torch.equal(found["layer1"], maps[0]) and torch.equal(found["layer2"], maps[1])
    assert get_graph_node_names(model)[0] == get_graph_node_names(model)[1]
    extractor.train()(x)["fc"].sum().backward()
    assert all(p.grad is not None for p in extractor.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_export_and_compile_give_the_same_logits(name):
    model = build(name).eval()
    x = images(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        more = images(name, batch=5)
        torch.testing.assert_close(exported(more), model(more))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_state_dicts_are_whole(name):
    model = build(name).eval()
    x = images(name)
    other = build(name, seed=7).eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (33, 17), (48, 64)])
def test_other_input_sizes_work(name, size):
    model = build(name).eval()
    x = images(name, size=size)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        maps = model.forward_intermediates(x, intermediates_only=True)
    for info, feature in zip(model.feature_info, maps, strict=True):
        for side, full in zip(feature.shape[2:], size, strict=True):
            assert 1 <= side <= math.ceil(full / info["reduction"])


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50_cifar"])
@pytest.mark.parametrize("stem_pool", [False, True])
def test_the_cifar_stem_keeps_timms_max_pool_if_asked_to(name, stem_pool):
    model = timm.create_model(name, stem_pool=stem_pool).eval()
    assert model.conv1.stride == (1, 1) and model.conv1.kernel_size == (3, 3)
    theirs = timm.create_model(name.removesuffix("_cifar")).maxpool
    assert repr(model.maxpool) == repr(theirs if stem_pool else nn.Identity())
    plain = timm.create_model(name)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    sides = [32, 16, 8, 4, 2] if stem_pool else [32, 32, 16, 8, 4]
    features = timm.create_model(name, stem_pool=stem_pool, features_only=True).eval()
    assert [map_.shape[-1] for map_ in features(x)] == sides
    assert [32 // reduction for reduction in features.feature_info.reduction()] == sides


def test_the_max_pool_comes_back_with_an_export(tmp_path):
    settings = {"stem_pool": True, "num_classes": 5, "drop_block_rate": 0.3}
    model = timm.create_model("resnet18_cifar_rblock", **settings).eval()
    assert isinstance(model.maxpool, nn.MaxPool2d)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))
