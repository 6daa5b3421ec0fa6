"""The way of the target through the task to CamDrop layers, and that it stays nowhere."""

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch._dynamo.testing import CompileCounter

import timm_structdrop  # noqa: F401  registers the models
from timm_structdrop import attach
from timm_structdrop.errors import UserError
from timm_structdrop.layers import CamDrop2d, Step, StructDropLayer
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training import DropSchedule, StructDropTask
from timm_structdrop.training.steps import classifier_weight, predicted_classes, target_weights

CLASSES = 5


def build(seed=0, **settings):
    """A model with CamDrop, one batch, and a list that collects what each layer sees."""
    torch.manual_seed(seed)
    often = {"keep_prob": 0.6, "rank": "valid", "seed_rate": "candidates"}
    model = timm.create_model("resnet8_camdrop", num_classes=CLASSES, **{**often, **settings})
    nn.init.normal_(model.fc.weight)
    images, target = torch.randn(4, 3, 16, 16), torch.randint(0, CLASSES, (4,))
    return model.train(), images, target, watch(model)


def watch(model):
    seen = []
    for layer in structdrop_layers(model):
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.current_step().alpha))
    return seen


def is_forgotten(model):
    return all(layer.current_step() == Step() for layer in structdrop_layers(model))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_each_layer_sees_the_row_of_each_class_and_forgets_it():
    model, images, target, seen = build()
    task = StructDropTask(model)
    loss = task(images, target)["loss"]
    assert len(seen) == len(list(structdrop_layers(model))) == 9
    expected = torch.stack([model.fc.weight[int(label)] for label in target])
    assert all(torch.equal(cam, expected) and not cam.requires_grad for cam in seen)
    assert is_forgotten(model)
    loss.backward()
    assert is_forgotten(model)
    assert len(seen) == 9


def test_soft_targets_weigh_the_rows():
    torch.manual_seed(0)
    weight, target = torch.randn(CLASSES, 7), torch.randn(4, CLASSES).softmax(1)
    expected = torch.zeros(4, 7)
    for b in range(4):
        for k in range(CLASSES):
            expected[b] += target[b, k] * weight[k]
    torch.testing.assert_close(target_weights(weight, target, 4), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(target_weights(weight, target, 4), expected)


def test_one_hot_targets_are_class_indices():
    results = []
    for hot in (False, True):
        model, images, target, _ = build()
        task = StructDropTask(model, SoftTargetCrossEntropy() if hot else nn.CrossEntropyLoss())
        torch.manual_seed(1)
        result = task(images, nn.functional.one_hot(target, CLASSES).float() if hot else target)
        result["loss"].backward()
        results.append((result["output"].detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_mixup_and_label_smoothing_reach_the_layers():
    model, images, target, seen = build()
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    torch.manual_seed(2)
    images, soft = mixup(images, target)
    StructDropTask(model, SoftTargetCrossEntropy())(images, soft)
    torch.testing.assert_close(seen[0], soft @ model.fc.weight.detach())


def test_the_target_decides_what_is_dropped():
    outs = []
    for shift in (0, 1):
        model, images, target, _ = build()
        torch.manual_seed(1)
        outs.append(StructDropTask(model)(images, (target + shift) % CLASSES)["output"])
    assert not torch.allclose(outs[0], outs[1])


@pytest.mark.parametrize("frozen", ["", "conv1", "layer1"])
def test_checkpointing_gives_the_gradients_of_the_plain_step(frozen):
    """The recomputed forwards are guided too: averages would warn, and drop other blocks."""
    results = []
    for checkpointing in (False, True):
        model, images, target, seen = build()
        model.set_grad_checkpointing(checkpointing)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        task = StructDropTask(model)
        for seed in (1, 2):  # gradients accumulate
            torch.manual_seed(seed)
            task(images, target.roll(seed))["loss"].backward()
            assert is_forgotten(model)
        results.append(gradients(model))
        assert None not in seen
        assert len(seen) == (36 if checkpointing else 18)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    results = []
    for between in (False, True):
        model, images, target, _ = build()
        model.set_grad_checkpointing(True)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        torch.manual_seed(1)
        loss = StructDropTask(model)(images, target)["loss"]
        if between:
            model.eval()(images[:2])
            model.train()
        loss.backward()
        results.append(gradients(model))
        assert is_forgotten(model)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_an_exception_in_the_forward_leaves_nothing():
    model, images, target, seen = build()

    def broken_loss(output, target):
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        StructDropTask(model, broken_loss)(images, target)
    assert seen[0] is not None
    assert is_forgotten(model)


def test_an_exception_in_the_backward_is_over_at_the_next_step():
    model, images, target, seen = build()
    task = StructDropTask(model)

    def stop(gradient):
        raise RuntimeError("no gradient")

    handle = model.layer2[0].conv1.weight.register_hook(stop)
    with pytest.raises(RuntimeError, match="no gradient"):
        task(images, target)["loss"].backward()
    handle.remove()
    del seen[:]
    task(images[:3], target[:3])["loss"].backward()
    assert all(len(cam) == 3 for cam in seen)
    assert is_forgotten(model)


def test_a_forward_outside_of_the_task_is_not_guided():
    model, images, target, seen = build()
    StructDropTask(model)(images, target)["loss"].backward()
    del seen[:]
    with pytest.warns(UserWarning, match="no target was given"):
        model(images)
    assert set(seen) == {None}


def test_two_models_do_not_mix():
    first, images, target, seen_first = build(seed=0)
    second, _, _, seen_second = build(seed=1)
    for model in (first, second):
        model.set_grad_checkpointing(True)
    losses = [StructDropTask(model)(images, target)["loss"] for model in (first, second)]
    for loss in losses:
        loss.backward()
    for model, seen in ((first, seen_first), (second, seen_second)):
        assert len(seen) == 18
        assert all(torch.equal(cam, model.fc.weight[target]) for cam in seen)
        assert is_forgotten(model)


def test_one_graph_serves_every_step():
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    model = timm.create_model("resnet8_camdrop", num_classes=CLASSES, keep_prob=0.6).train()
    task = StructDropTask(model, schedule=DropSchedule(model, "linear", total_updates=4))
    task.compile(backend=counter, fullgraph=True)
    for update in range(5):
        task.begin_update(update)
        images, target = torch.randn(4, 3, 16, 16), torch.randint(0, CLASSES, (4,))
        task(images, target)["loss"].backward()
        assert is_forgotten(model)
    assert counter.frame_count == 1


def test_compiled_without_a_target_it_warns_once_in_one_graph():
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    compiled = torch.compile(CamDrop2d(0.3, 3).train(), backend=counter, fullgraph=True)
    with pytest.warns(UserWarning, match="no target was given") as found:
        for _ in range(3):
            compiled(torch.randn(2, 8, 6, 6))
    ours = [warning for warning in found if warning.category is UserWarning]
    assert len(ours) == counter.frame_count == 1
    layer = CamDrop2d(0.3, 3).train()
    layer.begin_step(Step(alpha=torch.randn(2, 8)))
    torch.compile(layer, backend=counter, fullgraph=True)(torch.randn(2, 8, 6, 6))  # silent


def test_averaged_copies_and_autocast():
    model, images, target, seen = build()
    task = StructDropTask(model)
    task.setup_ema(decay=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(images, target)["loss"]
    loss.backward()
    task.update_ema(step=1)
    assert all(torch.equal(cam, model.fc.weight[target]) for cam in seen)
    assert is_forgotten(task.trainable_module_ema.module)
    assert is_forgotten(copy.deepcopy(task).trainable_module)


def test_in_distributed_training(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for distributed in (False, True):
            model, images, target, seen = build()
            task = StructDropTask(model)
            if distributed:
                task.prepare_distributed()
            torch.manual_seed(1)
            task(images, target)["loss"].backward()
            assert len(seen) == 9 and None not in seen
            assert is_forgotten(model)
            results.append(gradients(model))
        torch.testing.assert_close(results[0], results[1])
    finally:
        dist.destroy_process_group()


def test_two_processes_are_guided_by_their_own_targets_to_the_same_weights(tmp_path):
    mp.spawn(train_in_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["weights"] and one["guided"] and two["guided"]
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])
    assert one["loss"] != two["loss"]


def train_in_process(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, images, target, seen = build()
    target = (target + rank) % CLASSES
    task = StructDropTask(model)
    task.prepare_distributed()
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guided = True
    for _ in range(2):
        expected = model.fc.weight.detach()[target].clone()
        optimizer.zero_grad()
        loss = task(images, target)["loss"]
        loss.backward()
        guided &= all(torch.equal(cam, expected) for cam in seen) and len(seen) == 9
        guided &= is_forgotten(model)
        seen.clear()
        optimizer.step()
    weights = {key: value.detach() for key, value in model.named_parameters()}
    found = {"weights": weights, "loss": float(loss), "guided": guided}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_any_timm_cnn_can_be_guided():
    model = attach(timm.create_model("mobilenetv3_small_050", num_classes=CLASSES), "camdrop")
    seen = watch(model.train())
    task = StructDropTask(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(torch.randn(4, 3, 64, 64), torch.arange(4))["loss"].backward()
    assert seen and None not in seen


class Net(nn.Module):
    """A CNN of one convolution with a classifier of the test's choice."""

    def __init__(self, classifier, guide="cam"):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.camdrop = CamDrop2d(0.3, block_size=3, guide=guide)
        self.classifier = classifier

    def get_classifier(self):
        return self.classifier

    def forward(self, x):
        x = self.camdrop(self.conv(x)).mean((2, 3), keepdim=True)
        return self.classifier(x if isinstance(self.classifier, nn.Conv2d) else x.flatten(1))


def test_a_1x1_convolution_is_a_linear_classifier():
    model = Net(nn.Conv2d(8, CLASSES, 1))
    expected = model.classifier.weight.detach().squeeze()
    assert torch.equal(classifier_weight(model), expected)


@pytest.mark.parametrize(
    ("classifier", "found"),
    [
        (nn.Identity(), r"Net has Identity\(\)"),
        (nn.Sequential(nn.Linear(8, 5), nn.ReLU()), r"Net has Sequential\("),
        (nn.Conv2d(8, 5, 3), r"Net has Conv2d\(8, 5, kernel_size=\(3, 3\)"),
    ],
)
def test_a_model_without_a_linear_classifier_is_refused(classifier, found):
    with pytest.raises(UserError, match=rf"nn\.Linear or a 1x1 nn\.Conv2d; {found}"):
        StructDropTask(Net(classifier))
    StructDropTask(Net(classifier, guide="avg"))
    with pytest.raises(UserError, match="Sequential has no get_classifier"):
        StructDropTask(nn.Sequential(nn.Conv2d(3, 8, 3), CamDrop2d()))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"with B = 4 and K = 5; got torch.int64 \(3,\)"),
        (torch.zeros(4), r"with B = 4 and K = 5; got torch.float32 \(4,\)"),
        (torch.zeros(4, 6), r"with B = 4 and K = 5; got torch.float32 \(4, 6\)"),
        (torch.zeros((), dtype=torch.long), r"with B = 4 and K = 5; got torch.int64 \(\)"),
        (torch.tensor([0, 1, 5, 2]), r"classes in \[0, 4\]; got values from 0 to 5"),
        (torch.tensor([0, 1, -1, 2]), r"classes in \[0, 4\]; got values from -1 to 2"),
        (torch.full((4, 5), 1.5), r"weights in \[0, 1\]; got values from 1.5 to 1.5"),
        (torch.full((4, 5), float("nan")), r"weights in \[0, 1\]; got values from nan to nan"),
    ],
)
def test_targets_that_do_not_fit(target, message):
    model, images, _, _ = build()
    with pytest.raises(UserError, match=message):
        StructDropTask(model)(images, target)
    assert is_forgotten(model)


class TestPredicted:
    """guide="predicted": the row of the class that the network predicts, not of the target."""

    def test_the_row_is_that_of_the_class_predicted_in_eval_mode(self):
        model, images, target, seen = build(guide="predicted")
        model.eval()
        rows = model.fc.weight.detach()[model(images).argmax(1)]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.train()
        seen.clear()
        classes = predicted_classes(model, images)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(model.fc.weight.detach()[classes], rows)
        assert model.training and all(module.training for module in model.modules())
        seen.clear()
        StructDropTask(model)(images, target)
        told = [alpha for alpha in seen if alpha is not None]  # none in the forward that predicts
        assert len(told) == 9 and all(torch.equal(alpha, rows) for alpha in told)
        assert is_forgotten(model)

    def test_the_target_does_not_decide_what_is_dropped(self):
        outs = []
        for shift in (0, 1):
            model, images, target, _ = build(guide="predicted")
            torch.manual_seed(1)
            outs.append(StructDropTask(model)(images, (target + shift) % CLASSES)["output"])
        assert torch.equal(*outs)

    def test_the_target_may_be_anything_that_the_loss_takes(self):
        model, images, _, _ = build(guide="predicted")
        task = StructDropTask(model, lambda output, target: (output - target).square().mean())
        task(images, torch.randn(4, CLASSES))["loss"].backward()

    def test_the_random_numbers_are_those_of_the_step_alone(self):
        model, images, _, _ = build(guide="predicted")
        torch.manual_seed(3)
        predicted_classes(model, images)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(3)))

    def test_in_eval_mode_nothing_is_predicted(self):
        model, images, target, seen = build(guide="predicted")
        model.eval()
        StructDropTask(model)(images, target)
        assert len(seen) == 9  # one forward

    def test_checkpointing_gives_the_gradients_of_the_plain_step(self):
        results = []
        for checkpointing in (False, True):
            model, images, target, _ = build(guide="predicted")
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                StructDropTask(model)(images, target)["loss"].backward()
            results.append(gradients(model))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)

    def test_under_autocast_all_weights_get_gradients(self):
        """Weights that the prediction rounds, without a graph, must not serve the step."""
        model, images, target, _ = build(guide="predicted")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = StructDropTask(model)(images, target)["loss"]
        loss.backward()
        assert set(gradients(model)) == {name for name, _ in model.named_parameters()}

    def test_compiled_there_is_one_graph_to_predict_and_one_to_train(self):
        torch._dynamo.reset()
        counter = CompileCounter()
        model, _, target, _ = build(guide="predicted")
        for layer in structdrop_layers(model):
            layer._forward_pre_hooks.clear()
        task = StructDropTask(model)
        task.compile(backend=counter, fullgraph=True)
        for seed in range(4):
            torch.manual_seed(seed)
            task(torch.randn(4, 3, 16, 16), target)["loss"].backward()
        assert counter.frame_count == 2

    def test_with_two_processes(self, tmp_path):
        mp.spawn(predict_in_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
        one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert one["guided"] and two["guided"]
        assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])

    def test_both_kinds_in_one_model(self):
        model, images, target, _ = build(stages=[1, 2])
        attach(model, "camdrop", stages=[3], guide="predicted", img_size=16)
        seen = {}
        for name, layer in model.named_modules():
            if isinstance(layer, CamDrop2d):
                layer.register_forward_pre_hook(
                    lambda layer, args, name=name: seen.update({name: layer.current_step()})
                )
        StructDropTask(model.train())(images, target)
        classes = {name: step.classes for name, step in seen.items()}
        assert all(torch.equal(classes[n], target) for n in classes if not n.startswith("layer3"))
        predicted = [classes[n] for n in classes if n.startswith("layer3")]
        assert predicted and all(torch.equal(one, predicted[0]) for one in predicted)
        assert not torch.equal(predicted[0], target)


def predict_in_process(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, images, target, seen = build(guide="predicted")
    images = images + rank
    task = StructDropTask(model)
    task.prepare_distributed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guided = True
    for step in range(2):
        expected = model.fc.weight.detach()[predicted_classes(model, images)].clone()
        seen.clear()
        torch.manual_seed(2 * step + rank)
        optimizer.zero_grad()
        task(images, target)["loss"].backward()
        told = [alpha for alpha in seen if alpha is not None]
        guided &= len(told) == 9 and all(torch.equal(alpha, expected) for alpha in told)
        optimizer.step()
    weights = {key: value.detach() for key, value in model.named_parameters()}
    torch.save({"weights": weights, "guided": guided}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class OfAStranger(StructDropLayer):
    """A regularizer that this package does not know: no unit of a sample's class is dropped."""

    needs_classes = "target"

    def forward(self, x):
        classes = self.current_step().classes
        assert classes is not None
        return x * (classes % 2)[:, None, None, None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_strangers_layer_is_told_the_target(checkpointing):
    """In a model without a classifier that anybody could read."""
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(3, CLASSES, 3), OfAStranger()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = conv, layer

        def forward(self, x):
            part = lambda x: self.layer(self.conv(x))  # noqa: E731
            if checkpointing:
                x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
            else:
                x = part(x)
            return x.mean((2, 3))

    target = torch.tensor([0, 1, 2, 3])
    result = StructDropTask(Model().train())(torch.randn(4, 3, 8, 8), target)
    result["loss"].backward()
    assert (result["output"][[0, 2]] == 0).all() and (result["output"][[1, 3]] != 0).all()
    assert conv.weight.grad is not None and layer.current_step() == Step()


A_STRANGERS_FILE = """
from pathlib import Path

import timm
import torch
from timm.models import register_model

from timm_structdrop import attach
from timm_structdrop.cli.list import layers_table
from timm_structdrop.layers.base import Paper, Placement, StructDropLayer, register
from timm_structdrop.training import make_task


@register(
    "oddclasses",
    summary="drops the samples of even classes",
    paper=Paper("Me 2026", url="https://example.org"),
    placement=Placement(where=("stage",), last_stages=2, schedule="linear"),
)
class OddClasses(StructDropLayer):
    needs_classes = "target"

    def __init__(self, drop_prob: float = 0.1, kept: int = 1) -> None:
        super().__init__(drop_prob)
        self.kept = kept

    def forward(self, x):
        if self.is_off():
            return x
        return x * (self.current_step().classes % 2 == self.kept)[:, None, None, None]


@register_model
def resnet8_oddclasses(pretrained=False, **keywords):
    return attach(timm.create_model("resnet8", **keywords), "oddclasses", kept=0)


if __name__ == "__main__":
    from script import load_script, write_images

    model = timm.create_model("resnet8_oddclasses", num_classes=4).train()
    model.fc.bias.data.zero_()
    output = make_task(model)(torch.randn(4, 3, 32, 32), torch.arange(4))["output"]
    print((output != 0).any(1).tolist())
    print(layers_table("resnet8_oddclasses"))
    write_images(Path("images"))
    load_script("train").main(
        "--data-dir images --in-chans 1 --img-size 16 --num-classes 2 --batch-size 16 --workers 0 "
        "--device cpu --epochs 1 --model resnet8 --structdrop oddclasses:drop_prob=0.2,kept=1 "
        "--output out --experiment run".split()
    )
"""


def test_a_strangers_regularizer_needs_public_names_only(tmp_path):
    """Registered in a file outside of the package: in the task, in ``list`` and in train.py."""
    assert not re.search(r"timm_structdrop\S*\._", A_STRANGERS_FILE)
    file = tmp_path / "strange.py"
    file.write_text(A_STRANGERS_FILE)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "[True, False, True, False]"
    layers = [line.split() for line in lines if " oddclasses " in line]
    assert [row[:3] for row in layers] == [
        ["layer2.oddclasses", "oddclasses", "0.1"],
        ["layer3.oddclasses", "oddclasses", "0.1"],
    ]
    assert (tmp_path / "out" / "run" / "summary.csv").is_file()


def test_gradients_by_autograd_grad_are_those_of_backward():
    results = []
    for by_grad in (False, True):
        model, images, target, _ = build()
        model.set_grad_checkpointing(True)
        torch.manual_seed(1)
        loss = StructDropTask(model)(images, target)["loss"]
        if by_grad:
            results.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        else:
            loss.backward()
            results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:CamDrop2d. no target:UserWarning")  # that is the case tested
def test_a_step_that_never_goes_backward_guides_no_other_forward():
    """Each checkpointed forward is repeated as it was, whatever came in between."""
    model, images, target, _ = build()
    model.set_grad_checkpointing(True)
    guided = StructDropTask(model)(images, target)["loss"]
    model(images).sum().backward()  # not guided, and recomputed as such
    model.zero_grad()
    unguided = model(images).sum()
    guided.backward()
    unguided.backward()
    assert is_forgotten(model)
