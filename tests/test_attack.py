"""PGD against a loop over pixels, against a maintained attack library, and its error rates."""

import importlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import Attack, evaluate_attack, pgd, random_targets

MEAN, STD = (0.4, 0.3), (0.2, 0.5)


def small_cnn() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 3 * 4, 5)).eval()


def some_images(n: int) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], many of them at its ends; classes."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(n, 2, 5, 6, generator=generator) * 1.6 - 0.3).clamp(0, 1)
    return images, torch.randint(5, (n,), generator=generator)


def slow_pgd(weight, image, target, eps, step_size, steps, sign):
    """The oracle for one image and linear logits W x: Madry et al.'s steps, a pixel at a time.

    The gradient of the cross-entropy is W^T (softmax(W x) - one_hot(y)).
    """
    x = list(image)
    for _ in range(steps):
        logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
        total = sum(np.exp(logit) for logit in logits)
        error = [np.exp(z) / total - (k == target) for k, z in enumerate(logits)]
        for j in range(len(x)):
            gradient = sum(weight[k][j] * error[k] for k in range(len(weight)))
            moved = x[j] + sign * step_size * np.sign(gradient)
            in_ball = min(max(moved, image[j] - eps), image[j] + eps)
            x[j] = min(max(in_ball, 0.0), 1.0)
    return x


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("eps", "step_size", "steps"), [(5 / 255, 1 / 255, 2), (0.1, 0.03, 6)])
def test_steps_projection_and_box(targeted, eps, step_size, steps):
    images, classes = some_images(4)
    images = images.double()
    weight = torch.randn(5, images[0].numel(), generator=torch.Generator().manual_seed(2)).double()
    settings = {"eps": eps, "step_size": step_size, "steps": steps}
    found = pgd(lambda x: x.flatten(1) @ weight.T, images, classes, targeted=targeted, **settings)
    for image, target, attacked in zip(images, classes.tolist(), found, strict=True):
        flat = image.flatten().tolist()
        expected = slow_pgd(weight.tolist(), flat, target, **settings, sign=-1 if targeted else 1)
        assert attacked.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert (found - images).abs().max() == pytest.approx(min(eps, steps * step_size))
    assert found.min() == 0
    assert found.max() == 1


@pytest.mark.parametrize("targeted", [False, True])
def test_against_the_adversarial_robustness_toolbox(targeted):
    attacks = pytest.importorskip(
        "art.attacks.evasion", reason="adversarial-robustness-toolbox is not installed"
    )
    estimators = importlib.import_module("art.estimators.classification")
    model, (images, classes) = small_cnn(), some_images(16)
    estimator = estimators.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (2, 5, 6), 5, clip_values=(0.0, 1.0), device_type="cpu"
    )
    for eps, step_size, steps in ((5 / 255, 1 / 255, 2), (0.1, 0.03, 7)):
        other = attacks.ProjectedGradientDescentPyTorch(
            estimator,
            norm=np.inf,
            eps=eps,
            eps_step=step_size,
            max_iter=steps,
            targeted=targeted,
            verbose=False,
        )
        one_hot = np.eye(5, dtype=np.float32)[classes.numpy()]
        expected = other.generate(images.numpy(), one_hot)
        found = pgd(
            model, images, classes, eps=eps, step_size=step_size, steps=steps, targeted=targeted
        )
        assert np.abs(found.numpy() - expected).max() < 1e-6
        assert np.abs(expected - images.numpy()).max() > 0.99 * min(eps, steps * step_size)


def test_targets_are_uniform_over_the_wrong_classes():
    classes = torch.arange(4).repeat(3000)
    targets = random_targets(classes, 4, torch.Generator().manual_seed(0))
    assert not (targets == classes).any()
    pairs = Counter(zip(classes.tolist(), targets.tolist(), strict=True))
    assert len(pairs) == 12
    for count in pairs.values():  # binomial (3000, 1/3): five standard deviations
        assert abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5
    with pytest.raises(UserError, match="at least 2 classes; got 1"):
        random_targets(torch.zeros(3, dtype=torch.long), 1, torch.Generator())


def normalised(n: int) -> TensorDataset:
    images, classes = some_images(n)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (MEAN, STD))
    return TensorDataset((images - mean) / std, classes)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
def test_rates_by_hand(targeted, random_start):
    model, data = small_cnn(), normalised(40)
    model.train()
    attack = Attack(0.2, 0.05, 6, targeted, random_start, seed=3)
    found = [
        evaluate_attack(model, DataLoader(data, size), attack, mean=MEAN, std=STD)
        for size in (40, 7)
    ]
    for one in found:
        assert one.pop("seconds") > 0
    assert all(one == pytest.approx(found[0]) for one in found)
    assert model.training
    assert model[1].training
    assert all(parameter.grad is None for parameter in model.parameters())

    model.eval()
    images, classes = some_images(40)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (MEAN, STD))
    wanted = classes
    if targeted:
        wanted = random_targets(classes, 5, torch.Generator().manual_seed(3))
    start = None
    if random_start:
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(4))
        start = (images + 0.4 * noise - 0.2).clamp(0, 1)
    attacked = pgd(
        lambda x: model((x - mean) / std),
        images,
        wanted,
        eps=0.2,
        step_size=0.05,
        steps=6,
        targeted=targeted,
        start=start,
    )
    before = model((images - mean) / std).argmax(1)
    after = model((attacked - mean) / std).argmax(1)
    right = (before == classes).float()
    assert found[0]["clean_err"] == pytest.approx(100 - 100 * right.mean().item(), abs=1e-4)
    error = 100 * (after != classes).float().mean().item()
    assert found[0]["error_rate"] == pytest.approx(error, abs=1e-4)
    if targeted:
        success = (after == wanted).float().mean().item()
    else:
        success = ((after != classes) * right).sum().item() / right.sum().item()
    assert found[0]["success_rate"] == pytest.approx(100 * success, abs=1e-4)
    assert found[0]["max_change"] == pytest.approx(0.2, abs=1e-6)
    assert found[0]["samples"] == 40
    assert found[0]["success_rate"] > 0


def test_a_bounded_number_of_steps_and_no_image_right():
    model, data = small_cnn(), normalised(12)
    figures = evaluate_attack(model, DataLoader(data, 5), Attack(), mean=MEAN, std=STD)
    assert figures["max_change"] == pytest.approx(2 / 255, abs=1e-6)  # eps is 5/255
    images, _ = data.tensors
    wrong = TensorDataset(images, (model(images).argmax(1) + 1) % 5)
    figures = evaluate_attack(model, DataLoader(wrong, 5), Attack(), mean=MEAN, std=STD)
    assert (figures["clean_err"], figures["success_rate"]) == (100, None)


class Frozen(nn.Module):
    """A model whose logits carry no gradient, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.model = small_cnn()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                return self.model(x)
        if self.way == "cut":
            return self.model(x.detach())
        return torch.from_numpy(self.model(x).detach().numpy())


@pytest.mark.parametrize("way", ["no_grad", "cut", "exported"])
def test_a_model_without_gradients_is_one_line(way):
    loader = DataLoader(normalised(3), 3)
    with pytest.raises(UserError, match="an attack needs a model whose logits have a gradient"):
        evaluate_attack(Frozen(way), loader, Attack(), mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"eps": 5}, r"eps must be in \(0, 1\], .* \(5/255, not 5\); got 5"),
        ({"eps": 0.0}, r"eps must be in \(0, 1\]"),
        ({"eps": float("nan")}, r"eps must be in \(0, 1\]"),
        ({"step_size": -0.1}, r"step_size must be in \(0, 1\]"),
        ({"steps": 0}, "steps must be an integer of at least 1; got 0"),
    ],
)
def test_settings_out_of_range(settings, line):
    with pytest.raises(UserError, match=line):
        Attack(**settings)


def test_no_image_and_a_class_that_the_model_lacks():
    images, classes = normalised(3).tensors
    with pytest.raises(UserError, match="at least one image"):
        evaluate_attack(small_cnn(), [], Attack(), mean=MEAN, std=STD)
    with pytest.raises(UserError, match=r"in \[0, 4\]; got 6"):
        evaluate_attack(
            small_cnn(), [(images, torch.full_like(classes, 6))], Attack(), mean=MEAN, std=STD
        )
