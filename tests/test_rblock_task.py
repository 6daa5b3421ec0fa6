"""R-Block in models and in training: the fork, the task and its loss."""

import copy
import math
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from timm_structdrop import attach
from timm_structdrop.errors import UserError
from timm_structdrop.layers import SUB_MODELS, CamDrop2d, Fork, RBlock2d, Step, StepAware
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training import DropSchedule, RBlockTask, StructDropTask, make_task
from timm_structdrop.training.rblock import mutual_kl
from timm_structdrop.training.steps import tell_step

CLASSES = 5


def build(name="resnet20_rblock", **settings):
    torch.manual_seed(0)
    settings = {"num_classes": CLASSES, "drop_block_rate": 0.3, **settings}
    return timm.create_model(name, **settings).train()


def batch(n=4, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, size, size, generator=generator).to(dtype)
    return images, torch.arange(n) % CLASSES


def task_of(model, criterion=None, **settings):
    return RBlockTask(model, criterion, verbose=False, **settings)


def fork_of(model):
    return next(name for name, module in model.named_modules() if isinstance(module, Fork))


def loss_by_the_equations(first, second, target, temperature, alpha):
    """Eqs. (1) to (5), sample by sample and class by class."""
    total = 0.0
    for z_1, z_2, y in zip(first, second, target.tolist(), strict=True):
        for own, other in ((z_1, z_2), (z_2, z_1)):
            ce = -torch.log(torch.exp(own[y]) / torch.exp(own).sum())
            p_own = torch.exp(own / temperature) / torch.exp(own / temperature).sum()
            p_other = torch.exp(other / temperature) / torch.exp(other / temperature).sum()
            kl = sum(p_other[k] * torch.log(p_other[k] / p_own[k]) for k in range(len(own)))
            total = total + (1 - alpha) * ce + alpha * temperature**2 * kl
    return total / len(target)


def concatenated_step(model, images, target, seed, temperature=3.0, alpha=0.1):
    """The loss and the logits of a full pass over the batch (x, x), with the masks of a fork."""
    for module in model.modules():
        if isinstance(module, Fork):
            module.eval()
        elif isinstance(module, RBlock2d):
            module.begin_step(Step(forked=True))
    torch.manual_seed(seed)
    logits = model(torch.cat([images, images]))
    first, second = logits[: len(images)], logits[len(images) :]
    return loss_by_the_equations(first, second, target, temperature, alpha), logits


@contextmanager
def front_once(model, n):
    """CamDrop in front of the fork drops the same in both halves of a concatenated batch."""
    front = []
    for name, layer in model.named_modules():
        if isinstance(layer, CamDrop2d) and name.startswith("layer1"):
            front.append(layer)

            def once(x, plain=layer.forward, layer=layer):
                step = layer.current_step()
                layer.begin_step(Step(alpha=step.alpha[:n]))
                # the scale of each sample is its own, so halves can be dropped in apart
                state = torch.get_rng_state()
                first = plain(x[:n])
                after = torch.get_rng_state()
                torch.set_rng_state(state)
                second = plain(x[n:])
                torch.set_rng_state(after)
                layer.begin_step(step)
                return torch.cat((first, second))

            layer.forward = once
    assert front
    yield
    for layer in front:
        del layer.forward


def behind_the_fork(model, name):
    """Whether the batch norm ``name`` sees both halves, by the position of the fork's module."""
    names = [n for n, _ in model.named_modules()]
    return names.index(name) > names.index(fork_of(model).rpartition(".")[0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("resnet20_rblock", {"sub_models": s}) for s in SUB_MODELS]
    + [("resnet18_cifar_rblock", {}), ("vgg16_cifar_rblock", {"sub_models": "bdropdml"})],
)
def test_a_forked_step_is_a_step_over_the_concatenated_batch(name, settings):
    # float64, so that a wrong mask or statistic cannot hide in rounding
    model = build(name, **settings).double()
    twin = copy.deepcopy(model)
    images, target = batch(3, 32 if name == "resnet20_rblock" else 8, torch.float64)
    expected, logits = concatenated_step(twin, images, target, seed=2)
    expected.backward()

    torch.manual_seed(2)
    task = task_of(model)
    result = task(images, target)
    result["loss"].backward()

    # KL is taken in float32, which is 1e-7 of 1
    torch.testing.assert_close(result["loss"], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result["output"], (logits[:3] + logits[3:]) / 2)
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )

    others = dict(twin.named_buffers())
    counts = batch_norm_counts(twin, images)
    for key, buffer in model.named_buffers():
        bn, _, kind = key.rpartition(".")
        if kind == "running_var" and not behind_the_fork(model, bn):
            # one update from 1 with momentum 0.1; n values per channel are counted once, not twice
            n = counts[bn] // 2
            batch_part, other_part = buffer - 0.9, others[key] - 0.9
            torch.testing.assert_close(batch_part, other_part * (2 * n - 1) / (2 * n - 2))
        else:
            torch.testing.assert_close(buffer, others[key])


def batch_norm_counts(model, images):
    """Values per channel that each batch norm of the concatenated pass sees."""
    counts, handles = {}, []
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def note(module, args, output, key=key):
                counts[key] = args[0].numel() // args[0].shape[1]

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        copy_of_state = copy.deepcopy(model.state_dict())
        model(torch.cat([images, images]))
        model.load_state_dict(copy_of_state)
    for handle in handles:
        handle.remove()
    return counts


class TestLoss:
    def test_it_is_the_papers(self):
        generator = torch.Generator().manual_seed(0)
        first, second = torch.randn(2, 6, CLASSES, generator=generator, dtype=torch.float64) * 3
        _, target = batch(6)
        for temperature in (1.0, 3.0):
            kl = mutual_kl(first, second, temperature)
            ce = nn.functional.cross_entropy(first, target)
            ce = ce + nn.functional.cross_entropy(second, target)
            expected = loss_by_the_equations(first, second, target, temperature, 0.25)
            assert float(0.75 * ce + 0.25 * temperature**2 * kl) == pytest.approx(
                float(expected), rel=1e-5
            )

    def test_gradients_flow_through_both_arguments(self):
        first, second = torch.randn(2, 4, CLASSES).unbind(0)
        first.requires_grad_(), second.requires_grad_()
        mutual_kl(first, second, 3.0).backward()
        assert bool(first.grad.any()) and bool(second.grad.any())

    def test_the_parts_make_the_loss_and_are_detached(self):
        task = task_of(build(), temperature=2.0, alpha=0.3)
        result = task(*batch())
        expected = 0.7 * result["ce"] + 0.3 * 4.0 * result["kl"]
        torch.testing.assert_close(result["loss"].detach(), expected)
        assert result["output"].shape == (4, CLASSES)
        assert float(result["kl"]) > 0
        assert not result["kl"].requires_grad and not result["ce"].requires_grad

    def test_without_dropping_the_sub_models_agree(self):
        task = task_of(build(drop_block_rate=0.0))
        result = task(*batch())
        assert float(result["kl"]) == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize(
        "criterion", [SoftTargetCrossEntropy(), BinaryCrossEntropy(smoothing=0.0)]
    )
    def test_mixed_targets(self, criterion):
        images, target = batch()
        images, target = Mixup(0.8, 1.0, num_classes=CLASSES)(images, target)
        task = task_of(build(), criterion)
        result = task(images, target)
        result["loss"].backward()
        assert torch.isfinite(result["loss"])
        assert result["output"].shape == (4, CLASSES)

    def test_smoothed_targets_are_the_criterions_business(self):
        criterion = LabelSmoothingCrossEntropy(0.1)
        torch.manual_seed(2)
        plain = task_of(build(), alpha=0.0)(*batch())["loss"]
        torch.manual_seed(2)
        smoothed = task_of(build(), criterion, alpha=0.0)(*batch())["loss"]
        assert plain.item() != smoothed.item()


class TestFlag:
    def test_in_eval_the_task_is_the_plain_model(self):
        model = build().eval()
        images, target = batch()
        result = task_of(model).eval()(images, target)
        assert torch.equal(result["output"], model(images))
        assert set(result) == {"loss", "output"}

    def test_nothing_is_left_behind_a_step_or_a_failure(self):
        model = build()
        task = task_of(model)
        task(*batch())
        assert not any(m.current_step().forked for m in model.modules() if isinstance(m, StepAware))
        with pytest.raises(RuntimeError):
            task(torch.randn(2, 4, 32, 32), torch.tensor([0, 1]))
        assert not any(m.current_step().forked for m in model.modules() if isinstance(m, StepAware))
        assert model.eval()(batch()[0]).shape == (4, CLASSES)

    def test_compiled_without_its_task_it_warns_once_in_one_graph(self):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model = build("lenet5_rblock", in_chans=3)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with pytest.warns(UserWarning, match="trained without its task") as warnings:
            for _ in range(2):
                compiled(batch()[0])
        ours = [warning for warning in warnings if warning.category is UserWarning]
        assert len(ours) == counter.frame_count == 1

    @pytest.mark.parametrize("sub_models", SUB_MODELS)
    def test_a_model_without_its_task_warns_once_and_is_sane(self, sub_models):
        model = build(sub_models=sub_models)
        images, target = batch()
        with pytest.warns(UserWarning, match="trained without its task") as warnings:
            out = model(images)
        assert len(warnings) == 1
        assert out.shape == (4, CLASSES)
        nn.functional.cross_entropy(model(images), target).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert not torch.equal(model(images), out)

    def test_two_models_do_not_mix(self):
        one, two = build(), build()
        task_of(one)(*batch())
        fork = two.get_submodule(fork_of(two))
        fork._warned = True
        assert two(batch()[0]).shape == (4, CLASSES)

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        grads = []
        for enable in (False, True):
            model = build()
            model.set_grad_checkpointing(enable)
            torch.manual_seed(3)
            task_of(model)(*batch())["loss"].backward()
            grads.append([p.grad for p in model.parameters()])
        for plain, checkpointed in zip(*grads, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)

    def test_timms_resnet_forks_in_a_checkpointed_chain(self):
        # timm flattens the stages, so hooks of the stages themselves never run
        model = build("resnet18_rblock")
        model.set_grad_checkpointing(True)
        result = task_of(model)(*batch(2, 64))
        result["loss"].backward()
        assert result["output"].shape == (2, CLASSES)


class TestTraining:
    def test_make_task_picks_it(self):
        assert type(make_task(build(), verbose=False, alpha=0.2)) is RBlockTask
        assert type(make_task(timm.create_model("resnet20"), verbose=False)) is StructDropTask
        attached = attach(timm.create_model("resnet18"), "rblock", sub_models="bdropdml")
        assert type(make_task(attached, verbose=False)) is RBlockTask

    def test_ema_and_schedule_and_learning(self):
        model = build(drop_block_rate=0.2)
        schedule = DropSchedule(model, "linear", total_updates=10)
        task = task_of(model, schedule=schedule)
        task.setup_ema(decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for update in range(10):
            task.begin_update(update)
            result = task(*batch())
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            task.update_ema(step=update)
            losses.append(float(result["ce"]))
        assert losses[-1] < 0.9 * losses[0]
        assert all(layer.rate() == pytest.approx(0.18) for layer in structdrop_layers(model))
        averaged = task.get_eval_model(ema=True)
        assert averaged(batch()[0]).shape == (4, CLASSES)

    def test_gradients_accumulate(self):
        model = build(drop_block_rate=0.0).eval()
        for module in model.modules():
            module.training = isinstance(module, StepAware) or module is model
        images, target = batch()
        task = task_of(model)
        task(images, target)["loss"].backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for half in (slice(0, 2), slice(2, 4)):
            (task(images[half], target[half])["loss"] / 2).backward()
        for parameter, expected in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)

    def test_autocast_and_channels_last(self):
        model = build().to(memory_format=torch.channels_last)
        images, target = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = task_of(model)(images.to(memory_format=torch.channels_last), target)
        assert result["kl"].dtype == torch.float32
        result["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_compiled_it_is_the_same_step_in_one_graph(self):
        torch._dynamo.reset()
        results = []
        counter = CompileCounterWithBackend("aot_eager")
        for compiled in (False, True):
            model = build("lenet5_rblock", in_chans=3, drop_block_rate=0.4)
            task = task_of(model)
            if compiled:
                task.compile(backend=counter, fullgraph=True)
            torch.manual_seed(4)
            result = task(*batch())
            result["loss"].backward()
            results.append((result["loss"].detach(), [p.grad for p in model.parameters()]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
        for layer in structdrop_layers(model):
            layer.scale_drop_prob(0.5)
        task(*batch())
        assert counter.frame_count == 1
        task.eval()
        assert task(*batch())["output"].shape == (4, CLASSES)

    def test_two_processes_have_the_same_weights_and_other_masks(self, tmp_path):
        mp.spawn(train_in_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
        one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(one["weights"][k], two["weights"][k]) for k in one["weights"])
        assert one["loss"] != two["loss"]


def train_in_process(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build("resnet8_rblock")
    task = task_of(model)
    task.prepare_distributed(broadcast_buffers=False)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        result = task(*batch())
        result["loss"].backward()
        optimizer.step()
    weights = {key: value.detach() for key, value in model.named_parameters()}
    torch.save({"weights": weights, "loss": float(result["loss"])}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class TwoEyes(nn.Module):
    """The images go two ways from the start."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head((self.left(x) * self.right(x)).mean((2, 3)))


class TestPlacement:
    @pytest.mark.parametrize(
        ("name", "settings", "fork", "layers"),
        [
            ("resnet18_cifar_rblock", {}, "layer3.0", 4 * 3),
            ("resnet20_rblock", {"sub_models": "bdropdml"}, "layer2.0", 6 * 3),
            ("resnet18_rblock", {"stages": [4]}, "layer4.0", 2 * 3),
            ("resnet18_rblock", {"where": "stage", "stages": [2, 3]}, "layer2.rblock", 2),
            ("resnet18_rblock", {"modules": ["layer2.0.act1"]}, "layer2.0", 1),
            ("resnet18_rblock", {"modules": ["maxpool"]}, "maxpool.rblock", 1),
            ("vgg16_cifar_rblock", {}, "layer4.0.act1.rblock", 6),
            ("resnet18_rblock", {"sub_models": "r-drop"}, "fc.rblock", 1),
            ("vgg16_cifar_rblock", {"sub_models": "c-drop"}, "fc.rblock", 1),
        ],
    )
    def test_where_layers_and_fork_are(self, name, settings, fork, layers):
        model = build(name, drop_block_rate=None, img_size=32, **settings)
        assert fork_of(model) == f"{fork}.fork"
        found = list(structdrop_layers(model))
        assert len(found) == layers
        assert {(layer.target_drop_prob, layer.block_size) for layer in found} == {(0.2, 3)}
        base = timm.create_model(name.removesuffix("_rblock"), num_classes=CLASSES)
        assert list(model.state_dict()) == list(base.state_dict())

    def test_what_runs_before_the_fork_runs_on_the_batch_once(self):
        model, batches = build("resnet18_rblock"), {}
        for name in ("layer2.1", "layer3.0.conv1", "layer3.0.downsample", "fc"):
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: batches.update({name: len(output)})
            )
        task_of(model)(*batch(2, 64))
        assert batches == {
            "layer2.1": 2, "layer3.0.conv1": 4, "layer3.0.downsample": 4, "fc": 4
        }  # fmt: skip

    @pytest.mark.parametrize(
        "name",
        ["efficientnet_b0", "convnext_atto", "densenet121", "regnety_002", "inception_next_atto"],
    )
    def test_other_cnns(self, name):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=CLASSES)
        keys = list(model.state_dict())
        attach(model, "rblock", img_size=64, drop_prob=0.5)
        assert list(model.state_dict()) == keys
        result = task_of(model.train())(*batch(2, 64))
        result["loss"].backward()
        assert result["output"].shape == (2, CLASSES)
        assert float(result["kl"]) > 0

    @pytest.mark.parametrize(
        ("make", "fork"),
        [
            (lambda: timm.create_model("hrnet_w18_small", num_classes=CLASSES), "conv1.fork"),
            (lambda: TwoEyes(), "fork"),
        ],
        ids=["hrnet", "two eyes"],
    )
    def test_networks_whose_branches_pass_by_fork_at_their_input(self, make, fork):
        torch.manual_seed(0)
        model = make()
        images, target = batch(2, 64)
        keys, plain = list(model.state_dict()), model.eval()(images)
        where = {"modules": ["left"]} if fork == "fork" else {}
        attach(model, "rblock", img_size=64, drop_prob=0.5, **where)
        assert list(model.state_dict()) == keys and fork_of(model) == fork
        assert torch.equal(model(images), plain)

        model = copy.deepcopy(model).double().train()
        twin, images = copy.deepcopy(model), images.double()
        expected, _ = concatenated_step(twin, images, target, seed=2)
        expected.backward()
        torch.manual_seed(2)
        result = task_of(model)(images, target)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"], expected, rtol=1e-6, atol=1e-7)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert float(result["kl"]) > 0

    def test_a_fork_at_the_input_is_compiled_in_one_graph(self):
        torch._dynamo.reset()
        model = attach(TwoEyes(), "rblock", modules=["left"], img_size=8, drop_prob=0.5)
        task = task_of(model.train())
        task.compile(backend=CompileCounterWithBackend("aot_eager"), fullgraph=True)
        result = task(*batch(2, 8))
        result["loss"].backward()
        assert result["output"].shape == (2, CLASSES) and float(result["kl"]) > 0

    def test_features_only_in_eval(self):
        model = build("resnet18_rblock", features_only=True).eval()
        base = timm.create_model("resnet18", features_only=True).eval()
        base.load_state_dict(model.state_dict())
        images, _ = batch(1, 64)
        for ours, theirs in zip(model(images), base(images), strict=True):
            assert torch.equal(ours, theirs)

    def test_a_copy_forks_by_itself(self):
        model = build()
        twin = copy.deepcopy(model)
        task_of(twin)(*batch())
        assert not any(m.current_step().forked for m in model.modules() if isinstance(m, StepAware))

    def test_regularizers_compose_around_the_fork(self):
        model = build("resnet18_rblock")
        attach(model, "dropblock", block_size=3)
        assert task_of(model)(*batch(2, 64))["output"].shape == (2, CLASSES)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_camdrop_around_the_fork_has_the_targets_of_both_sub_models(self, checkpointing):
        """As in a pass over (x, x) guided by (y, y); stage 1 is in front of the fork."""
        model = build(drop_block_rate=0.2).double()
        attach(model, "camdrop", stages=[1, 3], drop_prob=0.3, block_size=3, img_size=32)
        twin = copy.deepcopy(model)
        images, target = batch(3, 32, torch.float64)
        with tell_step(twin, torch.cat((target, target)), batch=6), front_once(twin, 3):
            expected, _ = concatenated_step(twin, images, target, seed=2)
        expected.backward()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        result = task_of(model)(images, target)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"], expected, rtol=1e-6, atol=1e-7)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"sub_models": "rdrop"},
                r"sub_models must be .*; got 'rdrop' \(nearest: r-drop",
            ),
            (
                {"sub_models": "r-drop", "stages": [3]},
                r"'r-drop' acts before the classifier: stages, where and modules .*; got \[3\]",
            ),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(UserError, match=message):
            build("resnet18_rblock", **settings)

    def test_a_second_fork_is_refused(self):
        model = build("resnet18_rblock")
        with pytest.raises(UserError, match=r"forked once.*ResNet is forked already"):
            attach(model, "rblock", stages=[2])

    def test_a_head_that_nobody_names(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(UserError, match=r"before one classifier.*Sequential has none"):
            attach(model, "rblock", sub_models="r-drop")

    def test_a_network_without_a_place_to_fork(self):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

            def forward(self, x):
                return self.head(self.conv(x).mean((0, 2, 3)))

        with pytest.raises(UserError, match="Flat has none before conv: choose other stages"):
            attach(Flat(), "rblock", modules=["conv"], img_size=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0; got nan"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_task_settings(settings, message):
    with pytest.raises(UserError, match=message):
        task_of(build(), **settings)


def test_a_model_without_rblock():
    with pytest.raises(UserError, match=r"needs a model with R-Block.*got CifarResNet without it"):
        task_of(timm.create_model("resnet20"))
