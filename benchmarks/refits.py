"""What DropCluster's refits cost, as a share of the training between them.

    python -m benchmarks.refits [--repeats N]

The fit of all channels of the stem on one mini-batch, against the training steps of the schedule it
interrupts: ResNet-50 on CIFAR-100's 32 px (batch 128, 390 steps an epoch) and on ImageNet's 224 px
(batch 32, 40036 steps an epoch), a fit every 50 epochs; and LeNet-5 on the digits as in the recipe
digits-quickstart (batch 32, 44 steps an epoch, two fits in 20 epochs). One process, one thread.
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch

import timm_structdrop  # noqa: F401  registers the models
from benchmarks._timing import one_thread, paired


class Setting(NamedTuple):
    """A training schedule: the model, its images, and the steps from one fit to the next."""

    model: str
    size: int
    channels: int
    batch: int
    steps_between: int


SETTINGS = (
    Setting("lenet5_dropcluster", 32, 1, 32, 10 * 44),
    Setting("resnet50_dropcluster", 32, 3, 128, 50 * 390),
    Setting("resnet50_dropcluster", 224, 3, 32, 50 * 40036),
)


def run(repeats: int = 3) -> list[dict[str, Any]]:
    """One row per setting: milliseconds of a fit and of a step, and the share of the fits."""
    with one_thread():
        return [row(setting, repeats) for setting in SETTINGS]


def row(setting: Setting, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(
        setting.model, num_classes=10, in_chans=setting.channels, img_size=setting.size
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(setting.batch, setting.channels, setting.size, setting.size)
    target = torch.randint(10, (setting.batch,))
    layer = model.act1.dropcluster
    maps: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: maps.append(args[0].detach()))
    model(images)
    handle.remove()

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()

    functions: dict[str, Callable[[], object]] = {
        "fit": lambda: layer.fit(maps[0]),
        "step": step,
    }
    times = paired(functions, repeats, warm_up=1)
    fit, one_step = (statistics.median(times[name]) for name in ("fit", "step"))
    return {
        **setting._asdict(),
        "fit_ms": fit,
        "step_ms": one_step,
        "share": fit / (one_step * setting.steps_between),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of DropCluster's refits.")
    parser.add_argument("--repeats", type=int, default=3)
    rows = run(parser.parse_args().repeats)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread")
    for found in rows:
        print(
            f"{found['model']} {found['size']} px, batch {found['batch']}: fit "
            f"{found['fit_ms']:.0f} ms, step {found['step_ms']:.0f} ms, a fit every "
            f"{found['steps_between']} steps: {100 * found['share']:.2g} % of the training"
        )


if __name__ == "__main__":
    main()
