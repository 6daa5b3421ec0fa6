"""The slots of a regularizer in words: which convolutions and skips, of which groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from timm_structdrop.models.slots import Slot

__all__ = ["groups_in_words", "kinds_in_words", "listed", "slots_in_words"]

NAMED = 3  # modules that are named; of more, the first and the last


def slots_in_words(slots: Sequence[Slot]) -> str:
    """Such as ``convolutions and skips of groups 3 and 4``.

    Args:
        slots: in the order of the forward pass, all after named modules or none.
    """
    kinds = {slot.kind for slot in slots}
    if kinds == {"head"}:
        return "features before the classifier"
    if kinds == {"module"}:
        names = [slot.path for slot in slots]
        if len(names) <= NAMED:
            return f"after {listed(names)}"
        return f"after {len(names)} modules, {names[0]} to {names[-1]}"
    groups = sorted({slot.stage for slot in slots} - {0})
    what = kinds_in_words(kinds)
    return f"{what} of {groups_in_words(groups)}" if groups else what


def kinds_in_words(kinds: Collection[str]) -> str:
    """Kinds of slots in words, ``conv`` and ``last_conv`` both as convolutions."""
    if set(kinds) == {"stem"}:
        return "stem convolution, before any pooling"
    words = {
        "stem convolution": "stem" in kinds,
        "convolutions": "conv" in kinds,
        "residual branches": "last_conv" in kinds and "conv" not in kinds,
        "skips (before projection)": "skip_in" in kinds,
        "skips": "skip" in kinds,
        "ends": "stage" in kinds,
    }
    return listed([word for word, is_there in words.items() if is_there])


def groups_in_words(groups: Sequence[int]) -> str:
    """Numbers of stages in words: ``group 4``, ``groups 3 and 4``, ``groups 1 to 4``; 0 is the
    stem."""
    if groups[0] == 0:
        return listed(["the stem", *([groups_in_words(groups[1:])] if groups[1:] else [])])
    if len(groups) == 1:
        return f"group {groups[0]}"
    if len(groups) > NAMED and groups[-1] - groups[0] == len(groups) - 1:
        return f"groups {groups[0]} to {groups[-1]}"
    return f"groups {listed([str(group) for group in groups])}"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
