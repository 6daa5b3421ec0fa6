"""What the study compares: each cell is a way to train the same LeNet-5."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ABLATIONS", "CONTROLS", "MAIN", "RATES", "Cell", "by_name"]

# the training step from which DropCluster and its controls drop, and the steps of its fits
FIRST_FIT = 150
FITS = (150, 300, 450)


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        name: of the cell.
        variant: the registered model; plain LeNet-5 where None.
        settings: keywords of the model.
        tuned_as: the cell whose tuned rate it takes; itself where None.
        rate: a fixed rate; None takes the tuned one.
        schedule: of the drop rate; None takes that of the regularizer's paper.
        start: training step at which the schedule begins.
        order: changes the order of the batches, nothing else.
        voronoi: random Voronoi cells take the place of the clusters.
    """

    name: str
    variant: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None
    rate: float | None = None
    schedule: str | None = None
    start: int = 0
    order: int = 0
    voronoi: bool = False


# at DropCluster's place, behind the first convolution, and from its first fit on
AT_THE_STEM: dict[str, Any] = {
    "tuned_as": "dropcluster",
    "schedule": "delayed",
    "start": FIRST_FIT,
}
STEM = {"modules": ["act1"]}

# Eqs. (4) to (9) of CamDrop's paper as they are written; the default is the authors' code
LETTER = {"rank": "valid", "seed_rate": "candidates"}

# the convolutions with maps of more than one unit: 12 x 12 and 2 x 2
BLOCKS = {"modules": ["act1", "layer1.0.act1"], "block_size": 3}

MAIN = (
    Cell("none", rate=0.0),
    Cell("none, other batches", rate=0.0, order=1),
    Cell("label smoothing"),
    Cell("dropout", "lenet5_dropout"),
    Cell("spatialdropout", "lenet5_spatialdropout"),
    Cell("dropblock", "lenet5_dropblock", BLOCKS),
    Cell("dropcluster", "lenet5_dropcluster"),
    Cell("camdrop", "lenet5_camdrop", BLOCKS),
    Cell("rblock bdropdml", "lenet5_rblock", {**BLOCKS, "sub_models": "bdropdml"}),
    Cell("rblock sdropdml", "lenet5_rblock", {**BLOCKS, "sub_models": "sdropdml"}),
)
CONTROLS = (
    Cell("stem: dropout", "lenet5_dropout", STEM, **AT_THE_STEM),
    Cell("stem: dropblock", "lenet5_dropblock", {**STEM, "block_size": 3}, **AT_THE_STEM),
    Cell("stem: voronoi cells", "lenet5_dropcluster", tuned_as="dropcluster", voronoi=True),
)


def _camdrop(label: str, **settings: Any) -> Cell:
    return Cell(f"camdrop: {label}", "lenet5_camdrop", {**BLOCKS, **settings}, tuned_as="camdrop")


def _dropblock(label: str, schedule: str | None = None, **settings: Any) -> Cell:
    return Cell(
        f"dropblock: {label}",
        "lenet5_dropblock",
        {**BLOCKS, **settings},
        tuned_as="dropblock",
        schedule=schedule,
    )


ABLATIONS = (
    _camdrop("guided by averages (Table 2)", guide="avg"),
    _camdrop("all channels (Table 3)", channels="all"),
    *(_camdrop(f"n' = C/{n} (Table 4)", n_channels=1 / n) for n in (16, 4, 2)),
    _camdrop("guided by predicted classes", guide="predicted"),
    _camdrop("the letter", **LETTER),
    _camdrop("the letter, guided by predicted classes", guide="predicted", **LETTER),
    *(
        Cell(f"rblock: {kind} (Table 3)", "lenet5_rblock", settings, tuned_as=tuned)
        for kind, settings, tuned in (
            ("r-drop", {"sub_models": "r-drop"}, "dropout"),
            ("c-drop", {"sub_models": "c-drop"}, "dropout"),
            ("r-spatialdropout", {**BLOCKS, "sub_models": "r-spatialdropout"}, "spatialdropout"),
            ("r-dropblock", {**BLOCKS, "sub_models": "r-dropblock"}, "dropblock"),
        )
    ),
    _dropblock("without schedule (Fig. 3)", schedule="constant"),
    _dropblock("first convolution only (Fig. 4)", modules=["act1"]),
    _dropblock("second convolution only (Fig. 4)", modules=["layer1.0.act1"]),
    _dropblock("block 1 (Fig. 4)", block_size=1),
    _dropblock("block 5 (Fig. 4)", block_size=5),
)

# what the rate of each tuned cell is chosen from, on validation images
RATES = {
    "label smoothing": (0.05, 0.1, 0.2, 0.3),
    "dropout": (0.1, 0.2, 0.3, 0.5),
    "spatialdropout": (0.1, 0.2, 0.3, 0.5),
    "dropblock": (0.05, 0.1, 0.2, 0.3),
    "dropcluster": (0.1, 0.2, 0.3, 0.5),
    "camdrop": (0.1, 0.2, 0.3, 0.5),
    "rblock bdropdml": (0.1, 0.2, 0.3, 0.5),
    "rblock sdropdml": (0.1, 0.2, 0.3, 0.5),
}


def by_name(name: str) -> Cell:
    """The cell of that name.

    Raises:
        KeyError: there is none.
    """
    return {cell.name: cell for cell in (*MAIN, *CONTROLS, *ABLATIONS)}[name]
