"""What all structured-dropout layers share: a rate that schedules can move, and settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from timm_structdrop.layers._check import check_drop_prob
from timm_structdrop.layers._step import StepAware

__all__ = ["StructDropLayer"]


class StructDropLayer(StepAware):
    """Base class of the regularizers: maps (B, C, H, W) to (B, C, H, W).

    A layer has a target rate, ``target_drop_prob``, which is a setting, and a live rate,
    ``drop_prob``, which a schedule moves between 0 and the target. The live rate is a 0-d float32
    buffer, so that ``torch.compile`` reads it as data and does not recompile when it changes; it is
    not persistent, so a checkpoint of the base architecture and one of the regularized model have
    the same keys.

    Subclasses implement :meth:`forward`, take every setting as a keyword of ``__init__`` and keep
    it under the keyword's name. One that needs the batch's target, or the network's prediction,
    sets ``needs_classes`` and reads :meth:`current_step`, see
    :class:`~timm_structdrop.layers.StepAware`.
    """

    regularizer: ClassVar[str]
    keeps_map_state: ClassVar[bool] = False  # its buffers have the shape of the map
    drop_prob: Tensor

    def __init__(self, drop_prob: float = 0.1) -> None:
        super().__init__()
        self.target_drop_prob = check_drop_prob(drop_prob)
        self._rate = self.target_drop_prob
        self.register_buffer("drop_prob", torch.tensor(self._rate), persistent=False)

    @classmethod
    def build(cls, channels: int, size: tuple[int, int], /, **settings: Any) -> StructDropLayer:
        """A layer for a map of ``channels`` x ``size`` = (H, W); most layers fit any map."""
        return cls(**settings)

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The keywords a user may give, beside ``drop_prob``."""
        parameters = inspect.signature(cls.__init__).parameters
        given = ("channels", "size") if cls.keeps_map_state else ()
        return tuple(n for n in parameters if n not in ("self", "drop_prob", *given))

    @classmethod
    def default_drop_prob(cls) -> float:
        """The rate of a layer that is built without one."""
        return float(inspect.signature(cls.__init__).parameters["drop_prob"].default)

    def settings(self) -> dict[str, Any]:
        """The layer's settings as a JSON-able dict, target rate included."""
        return {
            "drop_prob": self.target_drop_prob,
            **{name: getattr(self, name) for name in self.setting_names()},
        }

    def rate(self) -> float:
        """The live rate as a Python float, without a device synchronisation."""
        return self._rate

    def live_rate(self) -> float | Tensor:
        """The live rate as a forward reads it: a float, or the buffer under ``torch.compile``."""
        return self.drop_prob if torch.compiler.is_compiling() else self._rate

    def set_drop_prob(self, drop_prob: float) -> None:
        """Set the target rate and the live rate.

        Raises:
            ValueError: ``drop_prob`` is not in [0, 1).
        """
        self.target_drop_prob = check_drop_prob(drop_prob)
        self.scale_drop_prob(1.0)

    def scale_drop_prob(self, factor: float) -> None:
        """Set the live rate to ``factor * target_drop_prob``, factor in [0, 1].

        Raises:
            ValueError: ``factor`` is not in [0, 1].
        """
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"the factor of a drop schedule must be in [0, 1]; got {factor}")
        rate = factor * self.target_drop_prob
        if rate != self._rate:
            self._rate = rate
            self.drop_prob.fill_(rate)

    def is_off(self) -> bool:
        """True where an eager forward may return its input as it is.

        Under ``torch.compile`` the answer is always False at a rate of 0, because a branch on the
        rate would recompile when a schedule moves it; the mask is then all ones.
        """
        if not self.training:
            return True
        return not torch.compiler.is_compiling() and self._rate == 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructDropLayer:
        super()._apply(fn, recurse)
        # .half() and .to(bfloat16) would round the rate: 0.1 becomes 0.10009765625
        self.drop_prob = torch.full_like(self.drop_prob, self._rate, dtype=torch.float32)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
