"""How thoroughly, and on what, the speed benchmarks measure."""

from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Settings"]

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the flags of ``python -m benchmarks`` ask for.

    Attributes:
        quick: small sizes and few rounds, to see that all of it works.
        repeats: rounds of every benchmark; None leaves that to each.
        device: "cpu" or "cuda".
    """

    quick: bool = False
    repeats: int | None = None
    device: str = "cpu"

    def pick(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def rounds(self, full: int, quick: int = 2) -> int:
        return self.repeats or self.pick(full, quick)
