"""Words for people."""

import pytest

from timm_structdrop.words import counted, table


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "epoch", "0 epochs"),
        (1, "epoch", "1 epoch"),
        (2, "batch", "2 batches"),
        (1, "batch", "1 batch"),
        (3, "class", "3 classes"),
        (1234, "validation image", "1,234 validation images"),
    ],
)
def test_one_is_singular(number, noun, text):
    assert counted(number, noun) == text


def test_columns_are_as_wide_as_their_longest_cell():
    text = table(["a", "long title"], [["wide cell", "x"], ["", "y"]])
    assert text.splitlines() == [
        "a          long title",
        "---------  ----------",
        "wide cell  x",
        "           y",
    ]
