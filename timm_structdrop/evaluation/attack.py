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

    # two generators, so that neither draws differently for other batch sizes
    target_draws = torch.Generator().manual_seed(attack.seed)
    start_draws = torch.Generator().manual_seed(attack.seed + 1)
    start_time = time.perf_counter()
    samples = right = still_right = hit = 0
    max_change = 0.0
    with eval_mode(model):
        for images, classes in read_batches(loader):
            images, classes = images.to(device, torch.float32), classes.to(device)
            pixels = (images * scale + offset).clamp(0.0, 1.0)
            with torch.no_grad():
                before = logits(pixels)
            check_targets(classes, before.shape[1])
            wanted, first = classes, None
            if attack.targeted:
                wanted = random_targets(classes, before.shape[1], target_draws)
            if attack.random_start:
                noise = torch.rand(pixels.shape, generator=start_draws).to(device)
                first = (pixels + attack.eps * (2.0 * noise - 1.0)).clamp(0.0, 1.0)
            attacked = pgd(
                logits,
                pixels,
                wanted,
                eps=attack.eps,
                step_size=attack.step_size,
                steps=attack.steps,
                targeted=attack.targeted,
                start=first,
            )
            with torch.no_grad():
                after = logits(attacked).argmax(1)
            was_right = before.argmax(1) == classes
            hits = after == wanted if attack.targeted else was_right & (after != classes)
            samples += len(classes)
            right += int(was_right.sum())
            still_right += int((after == classes).sum())
            hit += int(hits.sum())
            max_change = max(max_change, float((attacked - pixels).abs().max()))
            if progress is not None:
                figures = {"error": 100 - 100 * still_right / samples}
                progress.update(len(classes), figures)
    if progress is not None:
        progress.close()
    if samples == 0:
        raise UserError("an attack needs at least one image; got none")
    of = samples if attack.targeted else right
    return {
        "clean_err": 100 - 100 * right / samples,
        "error_rate": 100 - 100 * still_right / samples,
        "success_rate": 100 * hit / of if of else None,
        "max_change": max_change,
        "samples": samples,
        "seconds": time.perf_counter() - start_time,
    }
