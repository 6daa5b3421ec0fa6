"""A training step of R-Block over the step on the concatenated batch, and over a plain step.

    python -m benchmarks.rblock [--repeats N] [--quick] [--device cuda]

ResNet-50, R-Block in groups 3 and 4. A step is the forward, the loss, the backward and an SGD
update. The concatenated step sends (x, x) through the whole network with the same R-Block layers
and the same loss; the plain step has neither.
"""

from typing import Any

import timm
from torch import Tensor, nn

from benchmarks._models import make_step
from benchmarks._settings import Settings
from benchmarks._text import milliseconds, ratio, table
from benchmarks._timing import compared, one_thread, paired
from timm_structdrop.layers import Fork

TITLE = "R-Block's fork"
ARCHITECTURE = "resnet50"
SHAPE, QUICK_SHAPE = (16, 3, 128, 128), (4, 3, 64, 64)
SUB_MODELS = ("sdropdml", "bdropdml")


class Concatenated(nn.Module):
    """A model with R-Block, forked at the image instead of at its first regularized group."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.fork = Fork()
        self.model = model
        self.num_classes = model.num_classes
        for module in model.modules():
            if isinstance(module, Fork):
                module.forward = lambda x: x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(self.fork(x))
        return out


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per construction of the sub models and step it is compared with."""
    shape, device = settings.pick(SHAPE, QUICK_SHAPE), settings.device
    steps = {"plain": make_step(ARCHITECTURE, shape, device)}
    for name in SUB_MODELS:
        steps[name] = make_step(f"{ARCHITECTURE}_rblock", shape, device, sub_models=name)
        whole = Concatenated(timm.create_model(f"{ARCHITECTURE}_rblock", sub_models=name))
        steps[f"concatenated {name}"] = make_step(whole, shape, device)
    with one_thread():
        times = paired(steps, settings.rounds(5), warm_up=1, device=device)
    return [
        {"sub_models": name, "over": over, "shape": shape, **compared(times[name], times[other])}
        for name in SUB_MODELS
        for over, other in (("concatenated", f"concatenated {name}"), ("plain", "plain"))
    ]


def headline(rows: list[dict[str, Any]]) -> str:
    found = "; ".join(
        f"{row['sub_models']} {row['ratio']['median']:.2f}"
        for row in rows
        if row["over"] == "concatenated"
    )
    return f"R-Block's step over the one on the concatenated batch ({ARCHITECTURE}): {found}."


def report(rows: list[dict[str, Any]]) -> list[str]:
    batch, _, height, width = rows[0]["shape"]
    return [
        f"{ARCHITECTURE}, batch {batch} at {height}x{width}; {rows[0]['repeats']} rounds.",
        "",
        *table(
            ["sub models", "over the step", "its time", "R-Block / it", "processor time"],
            [
                [
                    row["sub_models"],
                    row["over"],
                    milliseconds(row["other_ms"]),
                    ratio(row["ratio"]),
                    f"{row['processor_ratio']:.2f}",
                ]
                for row in rows
            ],
        ),
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("rblock")
