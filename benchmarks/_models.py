"""What the speed benchmarks train: models on made-up images."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_structdrop  # noqa: F401  registers the models
from timm_structdrop.layers import DropCluster2d
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.training import StructDropTask, make_task

__all__ = ["conv_activations", "make_step", "make_training"]


def conv_activations(shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """(B, C, H, W): random 7x7 convolutions of smoothed noise, after ReLU."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, height + 12, width + 12, generator=generator)
    images = F.avg_pool2d(F.avg_pool2d(images, 4, stride=1), 4, stride=1)
    kernels = torch.randn(channels, 3, 7, 7, generator=generator)
    return F.relu(F.conv2d(images, kernels))


def make_training(
    model: nn.Module, device: str = "cpu"
) -> tuple[StructDropTask, torch.optim.Optimizer]:
    """The model's task, in training mode, and SGD with momentum.

    DropCluster finds its clusters in the first step, so that the others drop.
    """
    for layer in structdrop_layers(model):
        if isinstance(layer, DropCluster2d):
            layer.request_fit(0)
    task = make_task(model.to(device), device=torch.device(device), verbose=False)
    task.train()
    return task, torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)


def make_step(
    model: str | nn.Module,
    shape: tuple[int, int, int, int],
    device: str = "cpu",
    **arguments: Any,
) -> Callable[[], None]:
    """One training step of a model, always on the same batch: forward, loss, backward, update.

    Args:
        model: its name, or the model itself.
        shape: of the images, (B, C, H, W).
        device: to train on.
        arguments: of ``timm.create_model``.
    """
    torch.manual_seed(0)
    if isinstance(model, str):
        model = timm.create_model(model, in_chans=shape[1], **arguments)
    task, optimizer = make_training(model, device)
    images = torch.randn(shape, device=device)
    target = torch.randint(model.num_classes, shape[:1], device=device)

    def step() -> None:
        optimizer.zero_grad()
        task(images, target)["loss"].backward()
        optimizer.step()

    return step
