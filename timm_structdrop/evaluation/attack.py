"""Projected gradient descent (Madry et al. 2017, arXiv:1706.06083), CamDrop's Table 7."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from timm_structdrop.data.workers import read_batches
from timm_structdrop.errors import UserError
from timm_structdrop.evaluation.accuracy import check_targets
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.training import Progress

__all__ = ["Attack", "evaluate_attack", "pgd", "random_targets"]


@dataclass(frozen=True)
class Attack:
    """Settings of a PGD attack in the maximum norm; the defaults are those of CamDrop's Table 7.

    Attributes:
        eps: radius of the ball, in (0, 1]: pixel values are in [0, 1].
        step_size: change of a pixel in a step, in (0, 1].
        steps: gradient steps, at least 1.
        targeted: move towards a class drawn at random from the wrong ones, instead of away from
            the right one.
        random_start: start from a random point of the ball, as Madry et al., not from the image.
            Without it ``steps * step_size`` bounds the change too.
        seed: of the targets and the starts.

    Raises:
        UserError: a setting is out of range.
    """

    eps: float = 5 / 255
    step_size: float = 1 / 255
    steps: int = 2
    targeted: bool = False
    random_start: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("eps", "step_size"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(
                    f"{name} must be in (0, 1], pixel values being in [0, 1] (5/255, not 5); "
                    f"got {getattr(self, name)}"
                )
        if self.steps != int(self.steps) or self.steps < 1:
            raise UserError(f"steps must be an integer of at least 1; got {self.steps}")


def pgd(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    classes: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    targeted: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """Adversarial images in the ball of radius eps around ``images`` in the maximum norm.

    x_(t+1) = clip_[0, 1](Pi(x_t + step_size sign(grad_x CE(logits(x_t), y)))), where Pi is the
    projection to |x - x_0| <= eps, pixel by pixel; a targeted attack descends, towards y.

    Args:
        logits: maps images (B, C, H, W) in [0, 1] to logits (B, K).
        images: x_0, (B, C, H, W) in [0, 1].
        classes: y, (B,): the right classes, or those to move towards.
        eps: in (0, 1].
        step_size: in (0, 1].
        steps: at least 1.
        targeted: whether ``classes`` are targets.
        start: the first x, in the ball; None starts from ``images``.

    Returns:
        (B, C, H, W) in [0, 1].

    Raises:
        UserError: the logits have no gradient with respect to the images.
    """
    direction = -step_size if targeted else step_size
    low, high = (images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0)
    attacked = images if start is None else start
    for _ in range(steps):
        gradient = _loss_gradient(logits, attacked, classes)
        # low and high are the ball cut with the box: to clamp once is to project to both
        attacked = torch.clamp(attacked + direction * gradient.sign(), low, high)
    return attacked


def _loss_gradient(logits: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor) -> Tensor:
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        output = logits(images)
        gradient = None
        if output.requires_grad:
            # summed, so that an image's gradient does not depend on the size of its batch
            loss = cross_entropy(output.float(), classes, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
    if gradient is None:
        raise UserError(
            "an attack needs a model whose logits have a gradient with respect to the image; got "
            "logits without one (an exported model, or a forward under torch.no_grad)"
        )
    return gradient


def random_targets(classes: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
    """For each of ``classes`` (B,) another one, uniform over the other ``n_classes - 1``.

    Raises:
        UserError: there is no other class.
    """
    if n_classes < 2:
        raise UserError(f"a targeted attack needs at least 2 classes; got {n_classes}")
    steps = torch.randint(1, n_classes, classes.shape, generator=generator)
    return (classes + steps.to(classes.device)) % n_classes


def evaluate_attack(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    attack: Attack,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    amp_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
    model_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack ``model``, in eval mode, on a loader's images, normalised by ``mean`` and ``std``.

    Targets and starts depend on the seed and on the order of the images, not on the batch size.

    Returns:
        In percent: ``clean_err`` and ``error_rate``, the top-1 errors before and under the attack;
        ``success_rate``: targeted, the images classified as their target; else those of the images
        classified right before that no longer are (None without any). ``max_change``: the largest
        change of a pixel, in [0, 1]. ``samples``, ``seconds``.

    Raises:
        UserError: there is no image, a target is not one of the model's classes, or the model has
            no gradients.
    """
    shape = (1, -1, 1, 1)
    offset = torch.tensor(mean, device=device).view(shape)
    scale = torch.tensor(std, device=device).view(shape)

    def logits(pixels: Tensor) -> Tensor:
        images = ((pixels - offset) / scale).to(model_dtype or pixels.dtype)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with amp_autocast():
            output = model(images)
        return output[0] if isinstance(output, (tuple, list)) else output

    begin = time.perf_counter()
    draws = _Draws(attack)
    count = _Count(attack.targeted)
    with eval_mode(model):
        for images, classes in read_batches(loader):
            images, classes = images.to(device, torch.float32), classes.to(device)
            pixels = (images * scale + offset).clamp(0.0, 1.0)
            with torch.no_grad():
                before = logits(pixels)
            check_targets(classes, before.shape[1])
            wanted = draws.targets(classes, before.shape[1]) if attack.targeted else classes
            attacked = pgd(
                logits,
                pixels,
                wanted,
                eps=attack.eps,
                step_size=attack.step_size,
                steps=attack.steps,
                targeted=attack.targeted,
                start=draws.start(pixels) if attack.random_start else None,
            )
            with torch.no_grad():
                after = logits(attacked)
            count.add(classes, wanted, before.argmax(1), after.argmax(1))
            count.max_change = max(count.max_change, float((attacked - pixels).abs().max()))
            if progress is not None:
                progress.update(len(classes), {"error": count.error_rate})
    if progress is not None:
        progress.close()
    return {**count.figures(), "seconds": time.perf_counter() - begin}


class _Draws:
    """Targets and starts of an attack, from a generator each: neither depends on batch sizes."""

    def __init__(self, attack: Attack) -> None:
        self.eps = attack.eps
        self.for_targets = torch.Generator().manual_seed(attack.seed)
        self.for_starts = torch.Generator().manual_seed(attack.seed + 1)

    def targets(self, classes: Tensor, n_classes: int) -> Tensor:
        return random_targets(classes, n_classes, self.for_targets)

    def start(self, pixels: Tensor) -> Tensor:
        """A random point of the ball around each image, in [0, 1]."""
        noise = torch.rand(pixels.shape, generator=self.for_starts).to(pixels.device)
        return (pixels + self.eps * (2.0 * noise - 1.0)).clamp(0.0, 1.0)


@dataclass
class _Count:
    """Images right before and after an attack, and those on which it succeeded."""

    targeted: bool
    samples: int = 0
    right: int = 0
    still_right: int = 0
    hit: int = 0
    max_change: float = 0.0

    def add(self, classes: Tensor, wanted: Tensor, before: Tensor, after: Tensor) -> None:
        """A batch, all (B,): its classes, what the attack wanted, what the model answered."""
        was_right = before == classes
        hits = after == wanted if self.targeted else was_right & (after != classes)
        self.samples += len(classes)
        self.right += int(was_right.sum())
        self.still_right += int((after == classes).sum())
        self.hit += int(hits.sum())

    @property
    def error_rate(self) -> float:
        """Top-1 error under the attack, in percent."""
        return 100 - 100 * self.still_right / self.samples

    def figures(self) -> dict[str, Any]:
        """What :func:`evaluate_attack` returns, but for the time."""
        if self.samples == 0:
            raise UserError("an attack needs at least one image; got none")
        of = self.samples if self.targeted else self.right
        return {
            "clean_err": 100 - 100 * self.right / self.samples,
            "error_rate": self.error_rate,
            "success_rate": 100 * self.hit / of if of else None,
            "max_change": self.max_change,
            "samples": self.samples,
        }
