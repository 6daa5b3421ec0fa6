"""Loss, top-1 and top-5 of a classifier over a loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import accuracy
from torch import Tensor, nn

from timm_structdrop.errors import UserError
from timm_structdrop.training import Progress

__all__ = ["evaluate"]


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
) -> dict[str, float]:
    """Evaluate `model`, in eval mode, on batches of images (B, C, H, W) and class indices (B,).

    `criterion` is a mean over the batch (default cross-entropy). Of a distributed run every
    process gets the figures over all processes' samples. The modules' training flags are as before
    when it returns; what batch norm and the regularizers hold is not touched.

    Returns `loss`; `top1` and `top5` in percent (with fewer than 5 classes, `top5` counts them
    all); `samples`; `seconds`. Raises `UserError` when the loader is empty or a target is not one
    of the model's classes.
    """
    criterion = criterion or nn.CrossEntropyLoss()
    sums = torch.zeros(4, dtype=torch.float64)
    start = time.perf_counter()
    with _eval_mode(model), torch.inference_mode():
        for images, target in loader:
            images = images.to(device=device, dtype=model_dtype, non_blocking=True)
            target = target.to(device=device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with amp_autocast():
                output = model(images)
                output = output[0] if isinstance(output, (tuple, list)) else output
                _check_targets(target, output.shape[1])
                loss = criterion(output, target)
            sums += _batch_sums(loss, output, target)
            if progress is not None:
                figures = _figures(sums)
                progress.update(len(target), {name: figures[name] for name in ("loss", "top1")})
    if progress is not None:
        progress.close()
    return {**_figures(_over_processes(sums, device)), "seconds": time.perf_counter() - start}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _check_targets(target: Tensor, n_classes: int) -> None:
    low, high = torch.stack(target.aminmax()).tolist()
    if low < 0 or high >= n_classes:
        raise UserError(
            f"targets must be classes of the model, in [0, {n_classes - 1}]; "
            f"got {low if low < 0 else high}"
        )


def _batch_sums(loss: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """Loss x B, numbers of right answers at 1 and 5, and B; exact, unlike percentages."""
    size = len(target)
    top1, top5 = accuracy(output, target, topk=(1, 5))
    figures = torch.stack([loss.float(), top1, top5]).double().cpu()
    right = (figures[1:] * (size / 100)).round()
    return torch.cat([figures[:1] * size, right, torch.tensor([size], dtype=torch.float64)])


def _over_processes(sums: Tensor, device: torch.device | str) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    total = sums.to(device)
    dist.all_reduce(total)
    return total.cpu()


def _figures(sums: Tensor) -> dict[str, float]:
    loss, right1, right5, samples = sums.tolist()
    if samples == 0:
        raise UserError("evaluation needs at least one image; got none")
    return {
        "loss": loss / samples,
        "top1": 100 * right1 / samples,
        "top5": 100 * right5 / samples,
        "samples": int(samples),
    }
