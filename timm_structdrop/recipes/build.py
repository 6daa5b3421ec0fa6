"""Models, losses, optimizers, schedules and tasks from flags."""

from __future__ import annotations

import argparse
import inspect
import logging
from typing import Any

import timm
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn
from torch.optim import Optimizer

from timm_structdrop.errors import UserError, nearest, unexpected_keyword
from timm_structdrop.hub.failures import hub_errors
from timm_structdrop.layers import FittedLayer
from timm_structdrop.models.packaged import packaged
from timm_structdrop.models.placement import paper_schedule, structdrop_layers
from timm_structdrop.models.structdrop_attached import attach
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.recipes.device import check_compile_backend
from timm_structdrop.recipes.parser import parse_structdrop
from timm_structdrop.training import (
    ClusterRefits,
    DropSchedule,
    Ranking,
    StructDropTask,
    has_fork,
    make_task,
)
from timm_structdrop.words import counted

__all__ = ["build_model", "build_optimizer", "build_scheduler", "build_task", "check_has_weights"]

_logger = logging.getLogger(__name__)


def build_model(flags: argparse.Namespace) -> Any:
    """The model with its regularizers, on the CPU; for the random start seed torch before.

    Raises:
        UserError: the model is unknown or does not take what the flags say.
    """
    check_compile_backend(flags.torchcompile)
    arch = flags.model.split(".")[0]
    if ":" not in flags.model and not timm.is_model(arch):
        raise UserError(f"unknown model {flags.model!r}{nearest(arch, timm.list_models())}")
    if flags.pretrained:
        check_has_weights(flags.model, "--pretrained needs a model with pretrained weights")
    size = tuple(flags.input_size[1:]) if flags.input_size else flags.img_size
    settings: dict[str, Any] = dict(flags.model_kwargs)
    if arch in variants and size is not None:
        settings.setdefault("img_size", size)
    if flags.pretrained_path:
        settings["pretrained_cfg_overlay"] = {"file": flags.pretrained_path, "num_classes": -1}
    model: Any
    try:
        with hub_errors("load the weights of", flags.model, packaged_hint(arch)):
            model = timm.create_model(
                flags.model,
                pretrained=flags.pretrained or bool(flags.pretrained_path),
                in_chans=flags.input_size[0] if flags.input_size else flags.in_chans,
                num_classes=flags.num_classes,
                drop_rate=flags.drop,
                drop_path_rate=flags.drop_path,
                # 0 is what a model without a regularizer drops
                drop_block_rate=flags.drop_block if arch in variants else flags.drop_block or None,
                global_pool=flags.gp,
                bn_momentum=flags.bn_momentum,
                bn_eps=flags.bn_eps,
                checkpoint_path=flags.initial_checkpoint,
                **settings,
            )
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(_refusal(flags, arch, error)) from error
    for text in flags.structdrop:
        name, layer_settings = parse_structdrop(text)
        try:
            attach(model, name, **{"img_size": size, **layer_settings})
        except TypeError as error:
            raise UserError(f"--structdrop {text} does not fit {name}: {error}") from error
    _initialize_head(model, flags.head_init_scale, flags.head_init_bias)
    if flags.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def check_has_weights(model: str, rule: str) -> None:
    """Raise UserError, beginning with ``rule``, for a model of timm without pretrained weights."""
    if ":" in model or timm.list_models(model, pretrained=True):
        return
    raise UserError(f"{rule}; {model} has none{packaged_hint(model.split('.')[0])}")


def packaged_hint(arch: str) -> str:
    """Names of the weights in the package that are of a variant's architecture, or else of its
    regularizer, to put behind an error; empty for what is no variant."""
    own = variants.get(arch)
    if own is None:
        return ""
    there = [(variants[name], str(facts["name"])) for name, facts in packaged().items()]
    near = [tagged for other, tagged in there if other.architecture is own.architecture]
    near = near or [tagged for other, tagged in there if other.regularizer == own.regularizer]
    return f"; in the package: {', '.join(near)}" if near else ""


def _refusal(flags: argparse.Namespace, arch: str, error: Exception) -> str:
    """Why a model cannot be built; for an unknown keyword with the nearest that are known."""
    maker, keyword = unexpected_keyword(error) or ("", "")
    if keyword == "drop_block_rate" and keyword not in flags.model_kwargs:
        own = [name for name, variant in variants.items() if variant.architecture.name == arch]
        example = own[0] if own else "resnet50_dropblock"
        return (
            f"--drop-block must be 0 for a model that takes no drop rate; got {flags.drop_block} "
            f"for {flags.model} ({example} and others have a regularizer)"
        )
    if keyword not in flags.model_kwargs:
        return f"model {flags.model} does not take these flags: {error}"
    made = getattr(timm.models, maker, None)
    known = set(inspect.signature(made).parameters) if callable(made) else set()
    if arch in variants:
        known |= set(variants[arch].keywords())
    return (
        f"--model-kwargs must be settings of {flags.model}; got {keyword!r}"
        f"{nearest(keyword, known)}"
    )


def _initialize_head(model: Any, scale: float | None, bias: float | None) -> None:
    if scale is None and bias is None:
        return
    head = model.get_classifier()
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            head.bias.mul_(scale)
        if bias is not None:
            head.bias.fill_(bias)


def build_optimizer(flags: argparse.Namespace, model: nn.Module, world_size: int) -> Optimizer:
    """timm's optimizer of that name; its rate, if not given, from ``--lr-base`` as in timm.

    Raises:
        UserError: the optimizer is unknown or does not take its settings.
    """
    if flags.opt.lower() not in list_optimizers():
        raise UserError(f"unknown optimizer {flags.opt!r}{nearest(flags.opt, list_optimizers())}")
    settings = {**optimizer_kwargs(cfg=flags), "lr": learning_rate(flags, world_size)}
    try:
        return create_optimizer_v2(model, **settings, **flags.opt_kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {flags.opt} does not take these flags: {error}") from error


def learning_rate(flags: argparse.Namespace, world_size: int) -> float:
    """``--lr``, or timm's rule: ``--lr-base`` scaled by the images of an update, linearly or, for
    adaptive optimizers, by the square root."""
    if flags.lr:
        return flags.lr
    images = flags.batch_size * flags.grad_accum_steps * world_size
    adaptive = any(part in flags.opt.lower() for part in ("ada", "lamb"))
    scale = flags.lr_base_scale or ("sqrt" if adaptive else "linear")
    ratio = images / flags.lr_base_size
    return flags.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def build_scheduler(
    flags: argparse.Namespace, optimizer: Optimizer, updates_per_epoch: int
) -> tuple[Any, int]:
    """timm's learning rate scheduler (or None) and the epochs that it makes of ``--epochs``.

    Raises:
        UserError: the schedule does not take its settings.
    """
    ranking = Ranking.of_run(flags.eval_metric, evaluated=bool(flags.val_split))
    settings = scheduler_kwargs(flags, decreasing_metric=ranking.decreasing)
    try:
        made = create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError) as error:
        raise UserError(f"schedule {flags.sched} does not take these flags: {error}") from error
    scheduler, epochs = made
    if scheduler is not None and flags.warmup_epochs >= epochs:
        _logger.warning(
            f"The learning rate will not do more than warm up: --warmup-epochs is "
            f"{flags.warmup_epochs} in a run of {counted(epochs, 'epoch')}"
        )
    return made


def build_task(
    flags: argparse.Namespace,
    model: nn.Module,
    epochs: int,
    updates_per_epoch: int,
    device: torch.device,
) -> StructDropTask:
    """The model with its loss, drop schedule, cluster refits and averaged copy.

    Raises:
        UserError: the drop schedule, the refits or the settings of R-Block's loss do not fit the
            model or the epochs.
    """
    schedule = refits = None
    if flags.drop_schedule or list(structdrop_layers(model)):
        schedule = DropSchedule(
            model,
            flags.drop_schedule or paper_schedule(model),
            total_updates=epochs * updates_per_epoch,
            start_update=round(flags.drop_schedule_start * updates_per_epoch),
        )
    clusters = [layer for layer in model.modules() if isinstance(layer, FittedLayer)]
    if not all(layer.fits_itself for layer in clusters):
        refits = ClusterRefits(model, flags.cluster_start, flags.cluster_every)
        fitted = any(layer.is_fitted for layer in clusters)  # it came with pretrained weights
        if flags.cluster_start >= epochs and not fitted:
            _logger.warning(
                "DropCluster will not do anything: its first fit comes after "
                f"{counted(flags.cluster_start, 'epoch')} (--cluster-start), and the run has "
                f"{epochs}"
            )
    mutual: dict[str, Any] = {}
    if has_fork(model):
        mutual = {"temperature": flags.rblock_temperature, "alpha": flags.rblock_alpha}
    task = make_task(
        model,
        training_loss(flags),
        schedule=schedule,
        refits=refits,
        device=device,
        verbose=False,
        **mutual,
    )
    if flags.model_ema:
        task.setup_ema(
            decay=flags.model_ema_decay,
            use_warmup=flags.model_ema_warmup,
            device=torch.device("cpu") if flags.model_ema_force_cpu else None,
        )
    return task


def training_loss(flags: argparse.Namespace) -> nn.Module:
    """timm's loss for these flags; mixup smooths the targets itself."""
    mixes = flags.mixup > 0 or flags.cutmix > 0 or flags.cutmix_minmax
    if flags.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if mixes else flags.smoothing,
            target_threshold=flags.bce_target_thresh,
            sum_classes=flags.bce_sum,
            pos_weight=flags.bce_pos_weight,
        )
    if mixes:
        return SoftTargetCrossEntropy()
    if flags.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=flags.smoothing)
    return nn.CrossEntropyLoss()
