"""The rules of the layers' arguments: a check returns the value, or states the rule it breaks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_choice", "check_drop_prob", "check_fraction", "check_integer", "check_maps"]


def check_drop_prob(drop_prob: float) -> float:
    """The rate as a float.

    Raises:
        ValueError: ``drop_prob`` is not a number in [0, 1).
    """
    return check_fraction("drop_prob", drop_prob, "[0, 1)")


def check_fraction(name: str, value: float, interval: str) -> float:
    """``value`` as a float.

    Args:
        name: what the argument is called.
        value: the argument.
        interval: ``"[0, 1]"``, ``"[0, 1)"`` or ``"(0, 1]"``.

    Raises:
        ValueError: it is not a number, or not in the interval.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number in {interval}; got {value!r}") from error
    above = number > 0.0 or (number == 0.0 and interval.startswith("["))
    below = number < 1.0 or (number == 1.0 and interval.endswith("]"))
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}; got {value}")
    return number


def check_integer(
    name: str,
    value: int,
    rule: str = "an integer of at least 1",
    low: int = 1,
    high: int | None = None,
) -> int:
    """``value`` as an int.

    Args:
        name: what the argument is called.
        value: the argument.
        rule: what it must be, in words.
        low: the smallest that it may be.
        high: the largest; None for no bound.

    Raises:
        ValueError: it is no integer, or not between them.
    """
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be {rule}; got {value!r}") from error
    if value != whole or whole < low or (high is not None and whole > high):
        raise ValueError(f"{name} must be {rule}; got {value!r}")
    return whole


def check_choice(name: str, value: str, valid: Sequence[str]) -> str:
    """``value`` if it is one of ``valid``.

    Args:
        name: what the argument is called.
        value: the argument.
        valid: what it may be.

    Raises:
        ValueError: it is not.
    """
    if value not in valid:
        raise ValueError(f"{name} must be {' or '.join(map(repr, valid))}; got {value!r}")
    return value


def check_maps(x: Tensor) -> None:
    """Raise ValueError unless ``x`` is (B, C, H, W)."""
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W); got {tuple(x.shape)}")
