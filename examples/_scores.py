"""Average precision and recall of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

Boxes = dict[str, Tensor]


def matches(found: Boxes, truth: Boxes, label: int, iou: float) -> tuple[Tensor, Tensor, int]:
    """Scores of an image's boxes of a class, best first; which are right; how many there are.

    A box is right if the object it overlaps most, of those not yet taken by a better box, has an
    intersection over union of at least ``iou`` with it.
    """
    mine = found["labels"] == label
    order = found["scores"][mine].argsort(descending=True)
    boxes, scores = found["boxes"][mine][order], found["scores"][mine][order]
    objects = truth["boxes"][truth["labels"] == label]
    right = torch.zeros(len(boxes), dtype=torch.bool)
    overlap = box_iou(boxes, objects) if len(objects) else torch.zeros(len(boxes), 0)
    for index in range(len(boxes) if len(objects) else 0):
        best, place = overlap[index].max(0)
        if best >= iou:
            right[index] = True
            overlap[:, place] = -1.0
    return scores, right, len(objects)


def average_precision(
    found: Sequence[Boxes], truth: Sequence[Boxes], n_classes: int, iou: float = 0.5
) -> dict[str, Any]:
    """``ap``: the area under precision against recall (precision made monotone), the mean over the
    classes that occur; ``recall``: the fraction of the objects that any box found. In percent."""
    areas, hits, total = [], 0, 0
    for label in range(n_classes):
        parts = [matches(f, t, label, iou) for f, t in zip(found, truth, strict=True)]
        count = sum(n for _, _, n in parts)
        if not count:
            continue
        order = torch.cat([scores for scores, _, _ in parts]).argsort(descending=True)
        right = torch.cat([right for _, right, _ in parts])[order].double()
        recall = right.cumsum(0) / count
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        precision = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
        steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.double))
        areas.append(float((steps * precision).sum()))
        hits += int(right.sum())
        total += count
    return {
        "ap": 100 * sum(areas) / max(len(areas), 1),
        "recall": 100 * hits / max(total, 1),
        "objects": total,
    }
