"""What DropCluster's refits cost, as a share of the training between them.

    python -m benchmarks.refits [--repeats N] [--quick] [--device cuda]

The fit of all channels of the stem on one mini-batch, against the training steps of the schedule it
interrupts: ResNet-50 on CIFAR-100's 32 px (batch 128, 390 steps an epoch) and on ImageNet's 224 px
(batch 32, 40036 steps an epoch), a fit every 50 epochs; and LeNet-5 on the digits as in the recipe
digits-quickstart (batch 32, 44 steps an epoch, two fits in 20 epochs).
"""

from typing import Any

import timm
import torch

from benchmarks._models import make_step
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, percent, table
from benchmarks._timing import compared, one_thread, paired
from timm_structdrop.models.placement import structdrop_layers

TITLE = "DropCluster's fits"
# Model: shape of the images, steps of an epoch, epochs from one fit to the next.
SCHEDULES = (
    ("lenet5_dropcluster", (32, 1, 32, 32), 44, 10),
    ("resnet50_dropcluster", (128, 3, 32, 32), 390, 50),
    ("resnet50_dropcluster", (32, 3, 224, 224), 40036, 50),
)


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per schedule: times of a fit and of a step, and the share of the fits."""
    with one_thread():
        return [row(*schedule, settings) for schedule in settings.pick(SCHEDULES, SCHEDULES[:1])]


def row(
    name: str, shape: tuple[int, int, int, int], steps: int, epochs: int, settings: Settings
) -> dict[str, Any]:
    model = timm.create_model(name, num_classes=10, in_chans=shape[1], img_size=shape[2])
    step = make_step(model, shape, settings.device)
    (layer,) = structdrop_layers(model)
    maps: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: maps.append(args[0].detach()))
    step()
    handle.remove()
    functions = {"fit": lambda: layer.fit(maps[0]), "step": step}
    times = paired(functions, settings.rounds(3), warm_up=1, device=settings.device)
    found = compared(times["fit"], times["step"])
    return {
        "model": name,
        "shape": shape,
        "steps_an_epoch": steps,
        "epochs_between": epochs,
        **found,
        "share": found["ratio"]["median"] / (steps * epochs),
    }


def headline(rows: list[dict[str, Any]]) -> str:
    found = "; ".join(
        f"{percent(row['share'])} of a {row['model']} training at {row['shape'][2]} px"
        for row in rows
    )
    return f"DropCluster's fits take {found}."


def report(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{rows[0]['repeats']} rounds.",
        "",
        *table(
            ["model", "batch", "a fit", "a step", "a fit every", "share of the training"],
            [
                [
                    row["model"],
                    f"{row['shape'][0]} at {row['shape'][2]} px",
                    milliseconds(row["ms"]),
                    milliseconds(row["other_ms"]),
                    f"{row['epochs_between']} epochs of {row['steps_an_epoch']} steps",
                    percent(row["share"]),
                ]
                for row in rows
            ],
        ),
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("refits")
