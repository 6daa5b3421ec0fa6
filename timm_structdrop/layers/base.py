"""What all regularizers share: the layer, what a step tells it, the registry, argument rules."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "FittedLayer",
    "Paper",
    "Placement",
    "Regularizer",
    "Step",
    "StepAware",
    "StructDropLayer",
    "check_choice",
    "check_drop_prob",
    "check_fraction",
    "check_integer",
    "check_maps",
    "is_recomputed",
    "register",
    "regularizers",
    "tell",
]


class Step(NamedTuple):
    """What a training task tells of the forward that is running.

    Attributes:
        forked: the batch is doubled on its way, sub model by sub model (R-Block).
        classes: what guides the layer, (B,) class indices or (B, K) class weights: the target, or
            the network's own prediction, as ``needs_classes`` asks; None if it asks for nothing.
        alpha: the classifier's weights of these classes, (B, C') float32; None unless
            ``needs_classifier``.
    """

    forked: bool = False
    classes: Tensor | None = None
    alpha: Tensor | None = None


NOTHING = Step()


class StepAware(nn.Module):
    """A module that a training task tells each :class:`Step` of its model.

    A task gives the step to the module for one forward and takes it back behind it. Gradient
    checkpointing runs parts of that forward again in the backward pass; the task then says which
    step the pass belongs to, by the number that autograd gives it, so that nothing has to be taken
    back when the pass is over, or if it is never over.

    Attributes:
        needs_classes: ``"target"``: the step's classes are the batch's target; ``"prediction"``:
            they are what the network predicts in eval mode; None: the layer needs none.
        needs_classifier: the layer reads ``alpha``, so the model must have a linear classifier.
    """

    needs_classes: str | None = None
    needs_classifier: ClassVar[bool] = False
    _running: Step = NOTHING
    _repeated: tuple[int, Step] = (-1, NOTHING)

    def begin_step(self, step: Step | None) -> None:
        """Tell the step of the coming forwards; None: they belong to none."""
        self._running = NOTHING if step is None else step

    def begin_backward(self, step: Step) -> None:
        """Tell, in a backward pass, the step of the forwards that are repeated in it."""
        self._repeated = (_backward_number(), step)

    def current_step(self) -> Step:
        """The step of the forward that is running or being repeated; an empty one if it has none.

        Under ``torch.compile`` no Python runs in a repetition.
        """
        if torch.compiler.is_compiling() or not is_recomputed():
            return self._running
        number, step = self._repeated
        return step if number == _backward_number() else NOTHING

    def __getstate__(self) -> Mapping[str, Any]:
        """A copy that is made in mid-step does not keep the batch's target."""
        return {**self.__dict__, "_running": NOTHING, "_repeated": (-1, NOTHING)}


def is_recomputed() -> bool:
    """Whether the forward that is running repeats one, for a backward pass; eager code only."""
    return _backward_number() != -1


def _backward_number() -> int:
    # what torch.utils.checkpoint asks for itself; -1 outside of backward passes
    number: int = torch._C._current_graph_task_id()
    return number


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

    Attributes:
        regularizer: the name that it is registered under.
        keeps_map_state: its buffers have the shape of the map, which :meth:`build` is then given.
        forks: the batch is forked in front of the model's layers of this class, for two sub models
            (R-Block); a model has one fork.
        head_settings: by name of a setting, the values with which there is one layer, on the
            features before the classifier.
        drop_prob: the live rate.
    """

    regularizer: ClassVar[str]
    keeps_map_state: ClassVar[bool] = False
    forks: ClassVar[bool] = False
    head_settings: ClassVar[Mapping[str, Sequence[Any]]] = {}
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


class FittedLayer(StructDropLayer):
    """A layer that finds clusters in its activations, and drops nothing before.

    :class:`timm_structdrop.training.ClusterRefits` asks for the fits by epoch; cards and pictures
    read what was found.

    Attributes:
        n_clusters: clusters per channel.
        labels: the cluster of each pixel, (C, H, W) of any integer type.
        structured: False for the channels without clusters, (C,) bool.
        fitted_at: the time of the last fit, a 0-d integer; -1 = never.
        fits_itself: it finds its clusters without being asked.
        last_fit: the facts of the last fit: its time ``at``, ``n_clusters``, ``channels``,
            ``unstructured``, ``adjusted_rand_index`` and ``seconds``; None before the first.
    """

    n_clusters: int
    labels: Tensor
    structured: Tensor
    fitted_at: Tensor
    fits_itself: bool = False
    last_fit: dict[str, Any] | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether clusters have been found."""
        return int(self.fitted_at) >= 0

    def request_fit(self, at: int) -> None:
        """Make the next training forward fit the layer to its own input, before it drops anything.

        Args:
            at: what to record as the time of the fit, an epoch or update index >= 0.
        """
        raise NotImplementedError

    def draw_mask(self) -> Tensor:
        """A training step's mask at the target rate: True where units are kept, (C, H, W) bool, on
        the CPU."""
        raise NotImplementedError


@dataclass(frozen=True)
class Paper:
    """A publication, as tables and cards cite it.

    Attributes:
        citation: one line for tables, such as ``Ghiasi et al. 2018, arXiv:1810.12890``.
        name: of what it is about, as it writes it.
        title: as printed.
        url: where to read it.
        bibtex: one entry.
    """

    citation: str
    name: str = ""
    title: str = ""
    url: str = ""
    bibtex: str = ""

    @classmethod
    def with_bibtex(
        cls, citation: str, name: str, title: str, url: str, kind: str, key: str, **fields: str
    ) -> Paper:
        """A paper whose BibTeX entry has this kind and key, its title and these fields."""
        lines = [f"  {field} = {{{value}}}" for field, value in {"title": title, **fields}.items()]
        return cls(citation, name, title, url, f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}")


@dataclass(frozen=True)
class Placement:
    """Where a regularizer sits in a network unless the user says otherwise.

    Attributes:
        where: kinds of slots, of ``stem``, ``conv``, ``last_conv``, ``skip_in``, ``skip`` and
            ``stage``; see :mod:`timm_structdrop.models.slots`.
        last_stages: how many stages, counted from the deepest; 0 means all.
        note: what else there is to say of the layers.
        early: settings of the layers in all but the deepest stage of the network.
        early_words: the same in words.
        schedule: the paper's drop schedule, a shape of
            :class:`timm_structdrop.training.DropSchedule`.
    """

    where: tuple[str, ...] = ("conv",)
    last_stages: int = 1
    note: str = ""
    early: Mapping[str, Any] = field(default_factory=dict)
    early_words: str = ""
    schedule: str = "constant"


@dataclass(frozen=True)
class Regularizer:
    """One entry of :data:`regularizers`.

    Attributes:
        name: the name users write, and the suffix of the registered models.
        layer: the layer class.
        summary: one line for tables.
        paper: where it comes from.
        placement: where it sits unless the user says otherwise.
        residual_only: it acts on residual branches, so other networks have no place for it.
    """

    name: str
    layer: type[StructDropLayer]
    summary: str
    paper: Paper
    placement: Placement
    residual_only: bool


regularizers: dict[str, Regularizer] = {}

LayerT = TypeVar("LayerT", bound="type[StructDropLayer]")


def register(
    name: str,
    *,
    summary: str,
    paper: Paper | str,
    placement: Placement | None = None,
    residual_only: bool = False,
) -> Callable[[LayerT], LayerT]:
    """Class decorator that enters a layer into :data:`regularizers`.

    Args:
        name: the name users write; lower-case letters and digits.
        summary: one line for tables.
        paper: where it comes from; its citation alone does.
        placement: where it sits unless the user says otherwise; None for the convolutions of the
            last group.
        residual_only: it acts on residual branches, so other networks have no place for it.

    Raises:
        ValueError: the name is taken or is not a lower-case identifier.
    """
    if name in regularizers:
        raise ValueError(f"a regularizer's name must be unique; {name!r} is already registered")
    if not name.isidentifier() or name != name.lower() or "_" in name:
        raise ValueError(
            f"a regularizer's name must be lower-case letters and digits; got {name!r}"
        )
    source = Paper(paper) if isinstance(paper, str) else paper

    def enter(layer: LayerT) -> LayerT:
        regularizers[name] = Regularizer(
            name, layer, summary, source, placement or Placement(), residual_only
        )
        layer.regularizer = name
        return layer

    return enter


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


@torch.compiler.assume_constant_result
def tell(message: str) -> None:
    """Warn with ``message``, which Python shows once unless its filters say otherwise.

    ``torch.compile`` runs this function while it traces the layer and leaves nothing of it in the
    graph: the warning comes once for each layer and graph, neither breaks the graph nor compiles
    again. A layer that remembered there that it has warned would be compiled twice.
    """
    warnings.warn(message, stacklevel=3)
