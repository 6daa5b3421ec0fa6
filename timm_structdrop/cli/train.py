"""Train a timm model with structured dropout: flags, then objects, then the training.

    timm-structdrop train --recipe digits-quickstart
    torchrun --nproc-per-node 4 -m timm_structdrop train --model resnet50_dropcluster ...

The flags are timm's, and `--help` lists them with ours. In a clone it is ``python train.py`` too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import NativeScaler, init_distributed_device
from torch import nn

from timm_structdrop.cli.push import push_command
from timm_structdrop.errors import (
    UserError,
    dead_worker,
    hear_no_more_of_workers,
    one_line,
)
from timm_structdrop.files import save_text
from timm_structdrop.hub import RunPushes, check_push
from timm_structdrop.models.hanging import convert_sync_batchnorm
from timm_structdrop.recipes import parse_with_sources, train_parser
from timm_structdrop.recipes.build import (
    build_model,
    build_optimizer,
    build_scheduler,
    build_task,
)
from timm_structdrop.recipes.build_data import evaluation, training_batches
from timm_structdrop.recipes.build_datasets import input_settings
from timm_structdrop.recipes.console import called, log_to_terminal
from timm_structdrop.recipes.device import chosen_device, make_fast
from timm_structdrop.recipes.tag_settings import with_tag_settings
from timm_structdrop.training import (
    Loop,
    LoopSettings,
    Position,
    Ranking,
    RunSaver,
    RunState,
    SummaryFile,
    TrainingStopped,
    find_resume,
    fit,
    resume,
    seed_everything,
)
from timm_structdrop.words import counted

__all__ = ["main"]

_logger = logging.getLogger("timm_structdrop.train")


@dataclass(frozen=True)
class Process:
    """This process of the run, and the device it computes on."""

    device: torch.device
    rank: int
    world_size: int


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say."""
    flags = with_tag_settings(parse_with_sources(train_parser(), argv))
    check_push_flags(flags)
    process = start_process(flags)
    checkpoint = find_resume(flags.resume) if flags.resume else None

    seed_everything("model", flags.seed)
    model = build_model(flags)
    data = input_settings(flags, model)
    loader, mixup = training_batches(
        flags, data, model.num_classes, process.device, process.rank, process.world_size
    )
    evaluate = evaluation(flags, data, process.device, process.rank, process.world_size)
    model = place_model(flags, model, process)
    updates_per_epoch = -(-len(loader) // flags.grad_accum_steps)
    optimizer = build_optimizer(flags, model, process.world_size)
    scheduler, epochs = build_scheduler(flags, optimizer, updates_per_epoch)
    task = build_task(flags, model, epochs, updates_per_epoch, process.device)

    scaler = grad_scaler(flags, process)
    run = RunState(flags.model, task, optimizer, scheduler, scaler, vars(flags))
    settings = loop_settings(flags, epochs, process)
    loop = Loop(run, loader, process.device, settings, mixup, evaluate)
    start, content = continue_run(flags, loop, checkpoint)
    if process.rank == 0:
        folder = output_folder(flags, checkpoint, data)
        loop.saver = RunSaver(run, folder, loop.ranking.decreasing, flags.checkpoint_hist)
        prepare_output(loop, folder, start, checkpoint, content)
        announce(loop, folder, start, data)
    pushes = hub_pushes(flags, loop)
    compile_and_wrap(flags, loop, process)
    results = run_to_the_end(loop, start)
    if process.rank == 0:
        report(flags, loop, results)
    if pushes is not None:
        pushes.finish()


def check_push_flags(flags: argparse.Namespace) -> None:
    """What would otherwise be known when the training is over."""
    if not flags.push_to_hub:
        for flag, value in (("push-every", flags.push_every), ("hub-license", flags.hub_license)):
            if value:
                raise UserError(f"--{flag} needs --push-to-hub; got {value}")
        return
    if not flags.hub_license:
        raise UserError("--push-to-hub needs --hub-license, such as apache-2.0; got none")
    check_push(flags.push_to_hub, flags.hub_license)


def start_process(flags: argparse.Namespace) -> Process:
    """Logging, distributed processes and the device's settings."""
    chosen = chosen_device(flags.device)
    found = argparse.Namespace(device=str(chosen))
    process = Process(init_distributed_device(found), found.rank, found.world_size)
    log_to_terminal(is_first=process.rank == 0)
    if chosen.type == "cpu" and flags.workers and "OMP_NUM_THREADS" not in os.environ:
        # threads that wait for each other are slow where worker processes take their cores
        torch.set_num_threads(max(1, torch.get_num_threads() - flags.workers))
    make_fast(flags, chosen)
    return process


def place_model(flags: argparse.Namespace, model: nn.Module, process: Process) -> nn.Module:
    model = model.to(process.device)
    if flags.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if process.world_size > 1 and flags.sync_bn:
        model = convert_sync_batchnorm(model)
    return model


def grad_scaler(flags: argparse.Namespace, process: Process) -> NativeScaler | None:
    """Only float16 needs its gradients scaled, and only GPUs compute in it."""
    needed = flags.amp and flags.amp_dtype == "float16" and process.device.type == "cuda"
    return NativeScaler(device="cuda") if needed else None


def loop_settings(flags: argparse.Namespace, epochs: int, process: Process) -> LoopSettings:
    return LoopSettings(
        epochs=epochs,
        seed=flags.seed,
        grad_accum_steps=flags.grad_accum_steps,
        clip_grad=flags.clip_grad,
        clip_mode=flags.clip_mode,
        amp_dtype=getattr(torch, flags.amp_dtype) if flags.amp else None,
        channels_last=flags.channels_last,
        mixup_off_epoch=flags.mixup_off_epoch,
        val_interval=flags.val_interval,
        eval_metric=flags.eval_metric,
        log_interval=flags.log_interval,
        recovery_interval=flags.recovery_interval,
        dist_bn="" if flags.sync_bn else flags.dist_bn,
        synchronize_step=flags.synchronize_step,
        rank=process.rank,
        world_size=process.world_size,
    )


def continue_run(
    flags: argparse.Namespace, loop: Loop, checkpoint: Path | None
) -> tuple[Position, Mapping[str, Any]]:
    """Restore what `--resume` names, and the learning rate of where it stands."""
    start = Position()
    content: Mapping[str, Any] = {}
    if checkpoint is not None:
        start, content = resume(loop.run, checkpoint, weights_only=flags.no_resume_opt)
    if flags.start_epoch is not None:
        start = Position(flags.start_epoch)
    if start != Position():
        set_learning_rate(loop, start)
    return start, content


def set_learning_rate(loop: Loop, position: Position) -> None:
    """The rate that the flags' schedule has there; timm's schedules are functions of it."""
    scheduler = loop.run.scheduler
    if scheduler is not None:
        scheduler.step(position.epoch)
        scheduler.step_update(loop.updates_before(position))


def output_folder(
    flags: argparse.Namespace, checkpoint: Path | None, data: Mapping[str, Any]
) -> Path:
    """Where the run writes: the folder it is continued in, or `<output>/<experiment>`, or timm's
    `<output>/<timestamp>-<model>-<size>`."""
    output = Path(flags.output or "output/train")
    if checkpoint is not None and not flags.experiment:
        folder = checkpoint.parent
        if not flags.output or folder.resolve().parent == output.resolve():
            return folder
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{time}-{safe_model_name(flags.model)}-{data['input_size'][-1]}"
    folder = output / (flags.experiment or name)
    continued = checkpoint is not None and folder.resolve() == checkpoint.parent.resolve()
    if not continued and (folder / "last.pth.tar").exists():
        raise UserError(f"{folder} holds a run: continue it with --resume, or name another folder")
    return folder


def prepare_output(
    loop: Loop,
    folder: Path,
    start: Position,
    checkpoint: Path | None,
    content: Mapping[str, Any],
) -> None:
    """Make the folder with args.yaml and what summary.csv and the list of the best go on from;
    where another figure ranked the epochs before, the search for the best begins anew."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(loop.run.settings), default_flow_style=False)
    save_text(text, folder / "args.yaml")
    loop.summary = SummaryFile(folder / "summary.csv", start.epoch)
    if checkpoint is not None and loop.saver is not None and ranking_of(content) == loop.ranking:
        loop.saver.restore(content, checkpoint)


def ranking_of(content: Mapping[str, Any]) -> Ranking:
    """What ranked the epochs of the run that saved a checkpoint, this package's or timm's."""
    saved = content.get("args") or {}
    flags = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    evaluated = bool(flags.get("val_split", "validation"))
    return Ranking.of_run(flags.get("eval_metric", "top1"), evaluated)


def hub_pushes(flags: argparse.Namespace, loop: Loop) -> RunPushes | None:
    """What pushes the folder of the first process, if asked to."""
    if not flags.push_to_hub or loop.saver is None:
        return None
    folder = loop.saver.folder
    command = push_command(folder, flags.push_to_hub, flags.hub_license, flags.hub_private)
    pushes = RunPushes(folder, flags.push_to_hub, command, every=flags.push_every)
    if flags.push_every:
        loop.after_epoch = pushes.after_epoch
    return pushes


def announce(loop: Loop, folder: Path, start: Position, data: Mapping[str, Any]) -> None:
    """What is trained on what and how, before it is."""
    run, settings = loop.run, loop.settings
    parameters = sum(parameter.numel() for parameter in run.task.trainable_module.parameters())
    rates = getattr(run.scheduler, "base_values", None)
    rate = max(rates or [group["lr"] for group in run.optimizer.param_groups])
    _logger.info(
        f"{run.arch}: {parameters:,} parameters on {loop.device}, "
        f"input {' x '.join(map(str, data['input_size']))} (channels, height, width)"
    )
    _logger.info(
        f"{counted(settings.epochs, 'epoch')} of {counted(len(loop.loader), 'batch')}; "
        f"{type(run.optimizer).__name__}, learning rate {rate:.3g}"
    )
    schedule = run.task.schedule
    if schedule is not None:
        targets = sorted({layer.target_drop_prob for layer in schedule.layers})
        _logger.info(
            f"{counted(len(schedule.layers), 'structured layer')}, drop rate "
            f"{', '.join(map(str, targets))}, {schedule.shape}"
        )
    if start.epoch >= settings.epochs:
        _logger.info(
            f"The run has its {counted(settings.epochs, 'epoch')} already; --epochs N goes on to "
            "N of them"
        )
    elif start != Position():
        _logger.info(
            f"Going on with batch {start.batch + 1} of epoch {start.epoch + 1}/{settings.epochs}"
        )
    _logger.info(f"Writing to {folder}")


def compile_and_wrap(flags: argparse.Namespace, loop: Loop, process: Process) -> None:
    """torch.compile first, so that DistributedDataParallel stays out of the compiled graph."""
    task = loop.run.task
    if flags.torchcompile:
        task.compile(backend=flags.torchcompile, mode=flags.torchcompile_mode)
        task.compile_ema(backend=flags.torchcompile, mode=flags.torchcompile_mode)
    if process.world_size > 1:
        ids = [process.device] if process.device.type != "cpu" else None
        buffers = {"broadcast_buffers": False} if flags.no_ddp_bb else {}
        task.prepare_distributed(device_ids=ids, **buffers)


def run_to_the_end(loop: Loop, start: Position) -> list[dict[str, Any]]:
    try:
        results = fit(loop, start)
    except (TrainingStopped, KeyboardInterrupt) as stop:
        if loop.saver is not None:
            print(f"\nstopped; {how_to_go_on(loop)}", file=sys.stderr)
        leave_processes(loop)
        if isinstance(stop, TrainingStopped):
            sys.exit(143)
        raise
    except RuntimeError as error:
        if dead_worker(error) is None and not is_lost_process(error, loop):
            raise
        hear_no_more_of_workers()
        lost = f"process {loop.settings.rank} of the run has lost another one, which is why it ends"
        cause = dead_worker(error) or f"{lost} ({one_line(error)})"
        raise UserError(f"{cause}; {how_to_go_on(loop)}") from error
    leave_processes(loop)
    return results


def how_to_go_on(loop: Loop) -> str:
    """What to type after the end of a run before its end."""
    if loop.saver is None:
        return "go on with --resume"
    folder = loop.saver.folder
    try:
        find_resume(folder)
    except UserError:
        return f"nothing is saved yet in {folder}: start again"
    return f"go on with: {shlex.join([*called('train'), '--resume', str(folder)])}"


def is_lost_process(error: RuntimeError, loop: Loop) -> bool:
    """Whether another process of a distributed run is gone; gloo has no class for it."""
    if loop.settings.world_size == 1:
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def leave_processes(loop: Loop) -> None:
    if loop.settings.world_size > 1:
        torch.distributed.destroy_process_group()


def report(flags: argparse.Namespace, loop: Loop, results: list[dict[str, Any]]) -> None:
    """timm's closing lines, and what to run next."""
    saver = loop.saver
    assert saver is not None
    if saver.best_metric is not None and saver.best_epoch is not None:
        _logger.info(
            f"*** Best metric: {saver.best_metric:.4f}, {loop.ranking.words} "
            f"(epoch {saver.best_epoch + 1}/{loop.settings.epochs})"
        )
    best_last = sorted(results, key=loop.ranking.sort_key)
    print(f"--result\n{json.dumps(best_last[-10:], indent=4)}", flush=True)
    best = saver.folder / "model_best.pth.tar"
    _logger.info(f"Next: {shlex.join(validate_command(flags, best, loop.measures_average))}")


def validate_command(flags: argparse.Namespace, checkpoint: Path, averaged: bool) -> list[str]:
    """The command that evaluates what was trained, the averaged weights or the model's own."""
    command = called("validate")
    if flags.recipe:
        command += ["--recipe", flags.recipe]
    else:
        command += ["--model", flags.model]
        command += ["--dataset", flags.dataset] if flags.dataset else []
    folder = flags.data_dir or flags.data
    command += ["--data-dir", folder] if folder else []
    command += ["--checkpoint", str(checkpoint)]
    return command + (["--use-ema"] if averaged else [])
