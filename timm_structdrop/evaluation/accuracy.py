"""Loss, top-1 and top-5 of a classifier over a loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from timm_structdrop.data.workers import read_batches
from timm_structdrop.errors import UserError
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.training import Progress

__all__ = ["check_targets", "evaluate"]


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    amp_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
    model_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    active: Collection[nn.Module] = (),
) -> dict[str, float]:
    """Evaluate `model`, in eval mode, on batches of images (B, C, H, W) and class indices (B,).

    The modules `active` stay in training mode (dropout layers, to drop at inference).
    `criterion` is a mean over the batch of float32 logits (default cross-entropy). Of a distributed
    run every process gets the figures over all samples, each counted once. The modules' training
    flags are as before when it returns.

    Returns `loss`; `top1` and `top5` in percent (with fewer than 5 classes, `top5` counts them
    all); `samples`; `seconds`. Raises `UserError` when there is no sample or a target is not one of
    the model's classes.
    """
    evaluator = ClassificationEvaluator(
        device, max_samples=evaluation_sample_limit(loader), criterion=criterion
    )
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    start = time.perf_counter()
    with eval_mode(model, active), torch.inference_mode():
        for images, target in read_batches(loader):
            images = images.to(device=device, dtype=model_dtype, non_blocking=True)
            target = target.to(device=device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with amp_autocast():
                output = model(images)
            output = output[0] if isinstance(output, (tuple, list)) else output
            check_targets(target, output.shape[1])
            evaluator.update(output, target)
            if progress is not None:
                figures = evaluator.summary()
                progress.update(
                    len(target) * processes, {"loss": figures["loss"], "top1": figures["top1"]}
                )
    if progress is not None:
        progress.close()
    samples = torch.tensor(evaluator.num_samples, device=device)
    if processes > 1:
        dist.all_reduce(samples)
    if samples == 0:
        raise UserError("evaluation needs at least one image; got none")
    return {
        **evaluator.compute(distributed=processes > 1),
        "samples": int(samples),
        "seconds": time.perf_counter() - start,
    }


def check_targets(target: Tensor, n_classes: int) -> None:
    """Raise UserError for a class index that is not in [0, n_classes)."""
    low, high = torch.stack(target.aminmax()).tolist()
    if low < 0 or high >= n_classes:
        raise UserError(
            f"targets must be classes of the model, in [0, {n_classes - 1}]; "
            f"got {low if low < 0 else high}"
        )
