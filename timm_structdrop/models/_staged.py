"""What the small architectures share: a chain of stages, and timm's conventions around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from torch import Tensor, nn

__all__ = ["StagedNet"]


class StagedNet(nn.Module):
    """A chain: `conv1`, `bn1`, `act1`, `layer1`, `layer2`, ..., then `global_pool` and `fc`.

    The names are those of timm's ResNet. A subclass assigns the children of the chain in the order
    in which they run (`bn1` may be missing, a last pooling layer may follow), each stage through
    :meth:`add_stage`, and ends its constructor with :meth:`add_head`. The rest of what timm expects
    from a model is here: classifier, features, intermediates, pruning, gradient checkpointing
    (stage by stage, one block at a time) and parameter groups.

    Attributes:
        feature_info: timm's description of the features: a dict with `num_chs`, `reduction` and
            `module` for each.
        num_features: channels of the map `forward_features` returns.
        head_hidden_size: width of what `forward_head(x, pre_logits=True)` returns.
    """

    global_pool: SelectAdaptivePool2d
    fc: nn.Module

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []

    def add_feature(self, module: str, num_chs: int, reduction: int) -> None:
        """Make the output of a child a feature: `num_chs` channels, 1/`reduction` of the input."""
        self.feature_info.append({"num_chs": num_chs, "reduction": reduction, "module": module})

    def add_stage(self, blocks: Sequence[nn.Module], num_chs: int, reduction: int) -> None:
        """Append `blocks` as the next `layer<n>`, whose output is a feature."""
        name = f"layer{1 + sum(child.startswith('layer') for child in self.chain())}"
        self.add_module(name, nn.Sequential(*blocks))
        self.add_feature(name, num_chs, reduction)

    def add_head(
        self,
        num_features: int,
        global_pool: str,
        init_mode: Literal["fan_in", "fan_out"] = "fan_out",
        zero_init_last: bool = True,
        **dd: Any,
    ) -> None:
        """Append the pooling and the classifier, and initialise the weights.

        Args:
            num_features: channels of the chain's output.
            global_pool: timm's pooling type; `""` for none.
            init_mode: He et al.'s normal initialisation of the convolutions keeps the variance of
                the activations ("fan_in") or of the gradients ("fan_out", timm's choice).
            zero_init_last: residual blocks start as their shortcut.
            **dd: `device` and `dtype` of the classifier.
        """
        self.num_features = num_features
        self.global_pool, self.fc = create_classifier(
            num_features, self.num_classes, pool_type=global_pool, **dd
        )
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=init_mode, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif zero_init_last and callable(zero := getattr(module, "zero_init_last", None)):
                zero()

    def chain(self) -> list[str]:
        """The names of the children `forward_features` runs, in order: all up to the head."""
        names = [name for name, _ in self.named_children()]
        return names[: names.index("global_pool")] if "global_pool" in names else names

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups: the stem, then each stage (`coarse`) or block, then the head."""
        return {
            "stem": r"^conv1|bn1",
            "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)",
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or with `name_only` its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes means none, `global_pool=None` the pooling as it is."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _run(self, name: str, x: Tensor) -> Tensor:
        child = getattr(self, name)
        if self.grad_checkpointing and name.startswith("layer"):
            return checkpoint_seq(child, x)
        return child(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map before pooling: (B, in_chans, H, W) -> (B, num_features, h, w)."""
        for name in self.chain():
            x = self._run(name, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features and, unless `intermediates_only`, the output of `forward_features`.

        Args:
            x: (B, in_chans, H, W).
            indices: which features; the last n if an int, all if None.
            norm: part of timm's signature; there is no final norm to apply.
            stop_early: leave out what comes after the last wanted feature.
            output_fmt: "NCHW".

        Raises:
            ValueError: another `output_fmt`, or indices out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW; got {output_fmt}")
        wanted = self._wanted_features(indices)
        intermediates = []
        for name in self.chain():
            x = self._run(name, x)
            if name in wanted:
                intermediates.append(x)
            if stop_early and len(intermediates) == len(wanted):
                break
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the wanted features do not need; returns their indices.

        A head that has lost the end of the chain is removed whatever `prune_head` says.

        Raises:
            ValueError: indices out of range.
        """
        wanted = self._wanted_features(indices)
        last = max(wanted.values())
        names = self.chain()
        ended = last < len(self.feature_info) - 1
        if ended:
            for name in names[names.index(self.feature_info[last]["module"]) + 1 :]:
                setattr(self, name, nn.Sequential())
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or ended:
            self.reset_classifier(0, "")
        return list(wanted.values())

    def _wanted_features(self, indices: int | Sequence[int] | None) -> dict[str, int]:
        count = len(self.feature_info)
        chosen: Sequence[int]
        if indices is None:
            chosen = range(count)
        elif isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"the last n features: n must be in [1, {count}]; got {indices}")
            chosen = range(count - indices, count)
        else:
            if not indices or not all(-count <= index < count for index in indices):
                raise ValueError(
                    f"feature indices must be in [{-count}, {count - 1}]; got {list(indices)}"
                )
            chosen = sorted({index % count for index in indices})
        return {self.feature_info[index]["module"]: index for index in chosen}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and classifier: (B, num_features, h, w) -> (B, num_classes).

        With `pre_logits`, what the classifier would have seen: (B, head_hidden_size).
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
