"""A training step with each regularizer, over the step of the plain architecture.

    python -m benchmarks.steps [--repeats N] [--quick] [--device cuda]

Every registered regularizer at its default place and rate, DropCluster with its clusters found. A
step is the forward, the loss, the backward and an SGD update on the same images. All take turns,
and so does a second plain model: how far its ratio is from 1 is what the machine alone does.
"""

from typing import Any

import timm

from benchmarks._models import make_step
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, ratio, table
from benchmarks._timing import compared, one_thread, paired
from timm_structdrop.layers import regularizers
from timm_structdrop.models.placement import structdrop_layers

TITLE = "A training step with each regularizer"
AGAIN = "a second plain model"
PREDICTED = "camdrop, predicted classes"
# Architecture: shape of the images, the same in --quick, classes and rounds.
CASES = {
    "resnet50": ((8, 3, 224, 224), (4, 3, 64, 64), 1000, 5),
    "resnet110": ((64, 3, 32, 32), (8, 3, 32, 32), 10, 7),
}


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per architecture and regularizer: the step over the plain one, and the layers."""
    with one_thread():
        return [row for name in CASES for row in architecture_rows(name, settings)]


def architecture_rows(architecture: str, settings: Settings) -> list[dict[str, Any]]:
    full, quick, classes, rounds = CASES[architecture]
    shape = settings.pick(full, quick)
    models = {name: f"{architecture}_{name}" for name in regularizers}
    models |= {PREDICTED: f"{architecture}_camdrop", AGAIN: architecture}
    steps = {
        name: make_step(
            model,
            shape,
            settings.device,
            num_classes=classes,
            **({"guide": "predicted"} if name == PREDICTED else {}),
        )
        for name, model in {"plain": architecture, **models}.items()
    }
    times = paired(steps, settings.rounds(rounds), warm_up=1, device=settings.device)
    return [
        {
            "architecture": architecture,
            "shape": shape,
            "regularizer": name,
            "layers": len(list(structdrop_layers(timm.create_model(model)))),
            **compared(times[name], times["plain"]),
        }
        for name, model in models.items()
    ]


def headline(rows: list[dict[str, Any]]) -> str:
    found = []
    for architecture in CASES:
        ratios = ", ".join(
            f"{row['regularizer']} {row['ratio']['median']:.2f}"
            for row in rows
            if row["architecture"] == architecture
        )
        found.append(f"{architecture} {ratios}")
    return f"A training step over the plain one: {'; '.join(found)}."


def report(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for architecture in CASES:
        chosen = [row for row in rows if row["architecture"] == architecture]
        batch, _, height, width = chosen[0]["shape"]
        lines += [
            f"{architecture}, batch {batch} at {height}x{width}; a plain step takes "
            f"{milliseconds(chosen[0]['other_ms'])}; {chosen[0]['repeats']} rounds.",
            "",
            *table(
                ["regularizer", "layers", "step / plain step", "processor time"],
                [
                    [
                        row["regularizer"],
                        str(row["layers"]),
                        ratio(row["ratio"]),
                        f"{row['processor_ratio']:.2f}",
                    ]
                    for row in chosen
                ],
            ),
            "",
        ]
    return lines[:-1]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("steps")
