"""Every packaged recipe: its flags, its schedule, two steps of it; the papers' tables as facts."""

import math
import statistics
import time
from argparse import Namespace
from functools import cache

import pytest
import timm
import torch
import yaml
from timm.scheduler.scheduler import Scheduler

from timm_structdrop.__main__ import main
from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import InferenceDrop
from timm_structdrop.layers import CamDrop2d
from timm_structdrop.models.placement import structdrop_layers
from timm_structdrop.models.structdrop_variants import variants
from timm_structdrop.recipes import (
    load_recipe,
    load_table,
    parse_metric,
    parse_with_sources,
    recipe_names,
    table_names,
    train_parser,
)
from timm_structdrop.recipes.build import (
    build_model,
    build_optimizer,
    build_scheduler,
    build_task,
    learning_rate,
)
from timm_structdrop.recipes.metric import is_of_a_run
from timm_structdrop.recipes.packaged import read_table
from timm_structdrop.recipes.validate_flags import validate_parser

NAMES = recipe_names()
CELLS = [name for name in NAMES if "/" in name]
# after how many epochs the papers' rates fall to a tenth
DECAYS = {
    "dropblock-table1": (100, 200, 265),
    "dropblock-fig3": (100, 200, 265),
    "dropblock-fig4": (100, 200, 265),
    "dropblock-fig5": (100, 200, 265),
    "dropcluster-table1": (150, 200),
    "dropcluster-table2": (150, 200),
    "dropcluster-table3": (150, 200),
    "dropcluster-table4": (150, 200),
    "dropcluster-table5": (150, 200),
    "rblock-table1-cifar10": (75, 130, 180),
    "rblock-table1-cifar100": (75, 130, 180),
    "rblock-table2": (75, 130, 180),
    "rblock-table3": (75, 130, 180),
    "camdrop-table1": (150, 250, 350),
    "camdrop-table2": (150, 250, 350),
    "camdrop-table3": (150, 250, 350),
    "camdrop-table4": (150, 250, 350),
    "camdrop-table5": (150, 250, 350),
    "camdrop-table6": (50, 80, 100),
    "camdrop-table7": (50, 80, 100),
}


def flags_of(name: str, *more: str) -> Namespace:
    return parse_with_sources(train_parser(), ["--recipe", name, *more])


FLAGS = {name: flags_of(name) for name in NAMES}


def test_every_setting_of_the_papers_has_its_recipe():
    assert {name.split("/")[0] for name in CELLS} == set(table_names())
    assert len(CELLS) == len(set(CELLS)) > 200
    for prefix, n_tables in (("dropblock", 5), ("dropcluster", 5), ("rblock", 4), ("camdrop", 8)):
        assert sum(name.startswith(prefix) for name in table_names()) == n_tables


def test_the_papers_figures():
    """Some of each paper, read off its text."""
    for name, figures in {
        "dropblock-table1/dropblock": {"top1": 78.13, "top5": 94.02},
        "dropblock-table2/none": {"top1": 82.25, "top5": 95.88},
        "dropcluster-table1/dropcluster": {"top1": 63.01, "top5": 85.45},
        "dropcluster-table2/stochasticdepth-20": {"top1": 29.57, "top5": 58.21},
        "dropcluster-table4/dropcluster-10": {"top1": 29.04, "top5": 52.77},
        "rblock-table1-cifar10/vgg16-bdropdml": {"top1": 94.24},
        "rblock-table1-cifar100/resnet18-sdropdml": {"top1": 72.08},
        "rblock-table2/bdropdml": {"top1": 43.37},
        "camdrop-table1/camdrop": {"error": 4.19},
        "camdrop-table6/none": {"error": 23.61, "error5": 6.93},
        "camdrop-table7/camdrop": {"attack_error": 65.73, "attack_success": 20.16},
    }.items():
        assert load_recipe(name)["published"] == figures, name
    last = {c.published["top1@100%"] for c in load_table("rblock-table3").cells.values()}
    assert last == {71.17, 71.30, 71.86, 71.60, 72.35, 72.08}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("dropblock-table1", {"batch_size": 1024, "epochs": 300, "weight_decay": 1e-4, "lr": 0.4}),
        ("dropblock-table2", {"batch_size": 2048, "epochs": 340, "drop": 0.5}),
        (
            "dropcluster-table1",
            {"weight_decay": 5e-4, "lr": 0.1, "momentum": 0.9, "crop_padding": 4},
        ),
        ("dropcluster-table3", {"weight_decay": 1e-4, "lr": 0.1, "momentum": 0.9, "img_size": 224}),
        (
            "rblock-table1-cifar10",
            {"weight_decay": 5e-4, "lr": 0.1, "batch_size": 128, "epochs": 200},
        ),
        ("rblock-table2", {"weight_decay": 5e-4, "lr": 0.1, "batch_size": 128, "epochs": 200}),
        ("camdrop-table1", {"batch_size": 128, "epochs": 400, "lr": 0.1}),
        ("camdrop-table5", {"batch_size": 128, "epochs": 400, "lr": 2.0}),
        ("camdrop-table6", {"batch_size": 256, "epochs": 105, "lr": 0.1}),
    ],
)
def test_the_papers_settings(table, expected):
    metrics = {"dropb": "best", "dropc": "mean of the last 50 epochs", "rbloc": "best"}
    assert load_table(table).metric.text == metrics.get(table[:5], load_table(table).metric.text)
    for name in [name for name in CELLS if name.startswith(f"{table}/")]:
        found = {key: getattr(FLAGS[name], key) for key in expected}
        if name == "dropblock-table1/dropblock-smoothing":
            found["epochs"] -= 30  # the text: 330 epochs
        assert found == expected, name


def test_the_rates_fall_when_the_papers_say():
    model = torch.nn.Linear(1, 1)
    assert set(table_names()) - set(DECAYS) == {
        "camdrop-fig4", "digits-regularizers", "dropblock-table2",
    }  # fmt: skip
    for name in CELLS:
        decays = DECAYS.get(name.split("/")[0])
        if decays is None:
            continue
        optimizer = build_optimizer(FLAGS[name], model, world_size=1)
        # timm's milestone is in force one step early, which is an update here
        scheduler, epochs = build_scheduler(FLAGS[name], optimizer, updates_per_epoch=10)
        assert epochs == FLAGS[name].epochs
        assert isinstance(scheduler, Scheduler)
        base = learning_rate(FLAGS[name], 1)
        for decay in decays:
            for update in (10 * decay - 2, 10 * decay):
                scheduler.step_update(update)
                expected = base * 0.1 ** sum(update >= 10 * d for d in decays)
                assert math.isclose(optimizer.param_groups[0]["lr"], expected), name


def rate_at(name: str, epoch: float, updates_per_epoch: int = 10) -> float:
    """The learning rate of a recipe's update in mid-training; epochs are counted from 0."""
    optimizer = build_optimizer(FLAGS[name], torch.nn.Linear(1, 1), world_size=1)
    scheduler, _ = build_scheduler(FLAGS[name], optimizer, updates_per_epoch=updates_per_epoch)
    update = round(epoch * updates_per_epoch)
    if update:  # the rate of update 0 is set when the schedule is built
        scheduler.step_update(update)
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("table", [f"camdrop-table{i}" for i in range(1, 6)])
def test_camdrop_on_cifar_begins_at_a_hundredth(table):
    """The authors' code: one epoch at 0.01, whatever the rate that follows."""
    for name in (cell.name for cell in load_table(table).cells.values()):
        assert rate_at(name, 0) == 0.01
        assert 0.01 < rate_at(name, 0.5) < FLAGS[name].lr
        assert [rate_at(name, epoch) for epoch in (1, 1.5, 2, 100)] == [FLAGS[name].lr] * 4


def test_camdrop_figure_4_is_the_authors_script():
    """64 results; Adam, whose rate is multiplied by 0.3 every 10 epochs; gamma falls linearly."""
    cells = [cell.name for cell in load_table("camdrop-fig4").cells.values()]
    grid = {(FLAGS[name].lr, 1 - FLAGS[name].drop_block) for name in cells}
    assert len(cells) == len(grid) == 64
    rates, gammas = ({point[axis] for point in grid} for axis in (0, 1))
    assert (len(rates), min(rates), max(rates)) == (8, 0.03, 15.0)
    assert (len(gammas), min(gammas), max(gammas)) == (8, 0.5, 1.0)
    name = "camdrop-fig4/lr0.03-gamma0.9"
    for epoch, falls in ((0, 0), (9, 0), (10, 1), (19.5, 1), (20, 2), (99, 9)):
        assert math.isclose(rate_at(name, epoch), 0.03 * 0.3**falls), epoch
    model = build_model(FLAGS[name])
    task = build_task(FLAGS[name], model, 100, 10, torch.device("cpu"))
    assert isinstance(build_optimizer(FLAGS[name], model, 1), torch.optim.Adam)
    for update, rate in ((0, 0.0), (500, 0.05), (1000, 0.1)):
        task.begin_update(update)
        assert all(math.isclose(x.rate(), rate, rel_tol=1e-6) for x in structdrop_layers(model))
    paths = [p for p, module in model.named_modules() if isinstance(module, CamDrop2d)]
    assert len(paths) == 6 and all(path.startswith("layer3.") for path in paths)
    assert len(model.layer1) == len(model.layer2) == len(model.layer3) == 2


def test_dropouts_best_rate_of_dropblock_table_1_is_in_figure_3():
    figure, table = FLAGS["dropblock-fig3/dropout-kp0.70"], FLAGS["dropblock-table1/dropout"]
    for key in ("model", "drop_block", "model_kwargs", "lr", "epochs"):
        assert getattr(figure, key) == getattr(table, key)


def test_dropblock_has_one_seed_rate_in_all_of_rblocks_tables():
    for name in (name for name in CELLS if name.startswith("rblock-") and "dropblock" in name):
        assert FLAGS[name].model_kwargs["gamma"] == "paper", name


def test_rblocks_resnet_18_keeps_its_max_pool():
    """The paper changes the first convolution alone: at 32 px the last group's maps are 2x2."""
    names = [n for n in CELLS if n.startswith("rblock-") and FLAGS[n].model.startswith("resnet18")]
    assert len(names) == 2 * 6 + 6
    for name in names:
        model = build_model(FLAGS[name])
        assert model.conv1.stride == (1, 1) and model.conv1.kernel_size == (3, 3), name
        assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (2, 2), name


@pytest.mark.parametrize(
    ("table", "flag", "expected"),
    [
        ("dropblock-fig5", "drop_at_inference", [InferenceDrop(7, 0.9, "paper")]),
        ("dropcluster-table5", "severities", (1,)),
        ("camdrop-table7", "attack", "pgd"),
    ],
)
def test_what_a_note_says_to_run_is_understood(table, flag, expected):
    """The words behind ``validate.py``, up to a comma or what is neither a flag nor its value."""
    words = load_table(table).note.split("validate.py ")[1].split(", ")[0].split()
    said: list[str] = []
    while words and (words[0].startswith("--") or said[-1].startswith("--")):
        said.append(words.pop(0))
    assert getattr(parse_with_sources(validate_parser(), said), flag) == expected


def test_a_note_is_a_sentence_without_its_full_stop():
    """It comes into cards, which set the stop, and starts a sentence there."""
    for name in NAMES:
        note = load_recipe(name).get("note", "x")
        assert note[-1] != "." and "\n" not in note and ".." not in note, name
    assert load_recipe("dropblock-table1/dropout")["note"].count(". Figure 3 says") == 1


def shape_of(flags: Namespace) -> tuple:
    """What decides whether two cells run the same code: one rate or block size is like another."""
    numbers = ("block_size", "n_channels")
    kwargs = {key: value for key, value in flags.model_kwargs.items() if key not in numbers}
    off = flags.drop_block == 0
    return (
        flags.model,
        str(kwargs),
        off,
        flags.drop > 0,
        bool(flags.drop_path),
        flags.smoothing > 0,
    )


def one_of_each() -> list[str]:
    chosen: dict[tuple, str] = {}
    for name in CELLS:
        chosen.setdefault(shape_of(FLAGS[name]), name)
    return list(chosen.values())


@pytest.mark.parametrize("name", one_of_each())
def test_two_steps_of_a_recipe(name):
    """Flags to model, optimizer and schedule; two updates on noise, two classes of it.

    Images of ImageNet's models are 64 px here. NASNet-A is only built, without memory: one step of
    its 89 million parameters takes longer than all the others.
    """
    small = ["--input-size", "3", "64", "64"] if (FLAGS[name].img_size or 0) > 64 else []
    flags = flags_of(name, "--cluster-start", "0", "--warmup-epochs", "0", *small)
    if flags.model.startswith("nasnet"):
        with torch.device("meta"):
            model = build_model(FLAGS[name])
        layers = list(structdrop_layers(model))
        assert bool(layers) == flags.model.endswith("_dropblock")
        assert all(layer.block_size == 11 for layer in layers)
        return
    torch.manual_seed(0)
    model = build_model(flags)
    layers = list(structdrop_layers(model))
    assert bool(layers) == ("_" in flags.model.removesuffix("_cifar")), flags.model
    optimizer = build_optimizer(flags, model, world_size=1)
    build_scheduler(flags, optimizer, updates_per_epoch=2)
    task = build_task(flags, model, flags.epochs, 2, torch.device("cpu"))
    size = flags.input_size or (flags.in_chans or 3, flags.img_size, flags.img_size)
    images, target = torch.randn(2, *size), torch.tensor([0, 1])
    task.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    task.begin_epoch(0)
    for update in (0, flags.epochs):
        task.begin_update(update)
        loss = task(images, target)["loss"]
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(layer.rate() > 0 for layer in layers) or flags.drop_block == 0
    moved = [bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@cache
def maps_of(model: str, settings: str, size: tuple[int, ...]) -> list[tuple[int, tuple[int, int]]]:
    """(block_size, (H, W)) of each layer of a model that drops blocks, for images of this size.

    Built and run on the meta device: shapes alone.
    """
    with torch.device("meta"):
        built = timm.create_model(
            model, in_chans=size[0], img_size=size[1:], **yaml.safe_load(settings)
        )
    found = []

    def note(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].ndim == 4:  # the features before a classifier have no map
            found.append((layer.block_size, tuple(args[0].shape[2:])))

    layers = [layer for layer in structdrop_layers(built) if hasattr(layer, "block_size")]
    for layer in layers:
        layer.register_forward_pre_hook(note)
    if layers:
        with torch.no_grad():
            built.eval()(torch.zeros(1, *size, device="meta"))
    return found


def clamps(name: str) -> bool:
    """Whether a recipe asks for blocks larger than a map that they are dropped in."""
    flags = FLAGS[name]
    if flags.model not in variants:
        return False
    size = tuple(flags.input_size or (flags.in_chans or 3, flags.img_size, flags.img_size))
    found = maps_of(flags.model, yaml.safe_dump(flags.model_kwargs), size)
    return any(block_size > min(shape) for block_size, shape in found)


@pytest.mark.parametrize("table", ["", *table_names()])
def test_no_block_is_larger_than_its_map_unless_the_note_says_clamped(table):
    """Of the single recipes too. A table's note says it for some of its cells, a cell's for its
    own."""
    names = [name for name in NAMES if name.rpartition("/")[0] == table]
    clamped = {name for name in names if clamps(name)}
    silent = {name for name in clamped if "clamped" not in load_recipe(name).get("note", "")}
    assert not silent
    if table:
        said = {c.name for c in load_table(table).cells.values() if "clamped" in c.note}
        assert said <= clamped
        assert clamped or "clamped" not in load_table(table).note


def test_the_maps_of_a_recipe():
    """Known ones: 7x7 and, before the stride, 14x14 in group 4 of ResNet-50 at 224 px."""
    assert set(maps_of("resnet50_dropblock", "{stages: [4]}", (3, 224, 224))) == {
        (7, (7, 7)),
        (7, (14, 14)),
    }
    assert set(maps_of("resnet18_cifar_rblock", "{sub_models: r-drop}", (3, 32, 32))) == set()


ROWS = [
    {"epoch": str(i), "eval_top1": value, "eval_top5": "90"}
    for i, value in enumerate(["10", "", "50", "40", "30", "20"])
]


@pytest.mark.parametrize(
    ("rule", "figure", "expected"),
    [
        ("last", "top1", 20.0),
        ("best", "top1", 50.0),
        ("best", "error", 50.0),
        ("mean of the last 3 epochs", "top1", 30.0),
        ("mean of the last 50 epochs", "top1", 30.0),
        ("median of the last 4 epochs", "top1", 35.0),
        ("median of the best 3 epochs", "top1", 40.0),
        ("median of the best 3 epochs", "error", 60.0),
        ("median of the last 2 epochs", "error5", 10.0),
        ("best", "top1@50%", 50.0),
        ("best", "top1@20%", 10.0),
        ("last", "top1@67%", 40.0),
        ("last", "gaussian_noise", None),
    ],
)
def test_rules_of_metrics(rule, figure, expected):
    assert parse_metric(rule).of(ROWS, figure) == expected
    assert parse_metric(rule).of([], figure) is None
    assert is_of_a_run(figure) == (expected is not None)


def test_a_rule_on_random_rows_against_a_slow_one():
    generator = torch.Generator().manual_seed(0)
    values = [round(v, 3) for v in (100 * torch.rand(60, generator=generator)).tolist()]
    rows = [{"eval_top1": str(value)} for value in values]
    assert parse_metric("mean of the last 50 epochs").of(rows, "top1") == statistics.mean(
        values[10:]
    )
    best = sorted(100 - value for value in values)[:5]
    assert math.isclose(parse_metric("median of the best 5 epochs").of(rows, "error"), best[2])


@pytest.mark.parametrize("rule", ["worst", "mean of the last 0 epochs", "mean of last 5 epochs"])
def test_unknown_rules(rule):
    with pytest.raises(UserError, match=f"a metric must be last, best, or .*; got '{rule}'"):
        parse_metric(rule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: {a: {lrr: 1}}", "unknown key 'lrr' in x/a (nearest: lr"),
        ("base: {modle: y}\ncells: {a: {}}", "unknown key 'modle' in the base of table x"),
        ("papper: y\ncells: {a: {}}", "unknown key 'papper' in table x (nearest: paper"),
        ("base: {}", "table x must have cells, and a base that is a mapping of flags"),
        ("cells: {a: 3}", "x/a must be a mapping of facts and flags; got 3"),
        ("cells: {a: {published: {top1: high}}}", "published of x/a must map figures to numbers"),
        ("metric: most\ncells: {a: {}}", "a metric must be last, best"),
        ("- a", "table x must be a mapping"),
    ],
)
def test_tables_that_are_not_right(text, message):
    with pytest.raises(UserError) as raised:
        read_table("x", text)
    assert message in str(raised.value)


def test_a_cell_is_the_base_with_its_own_flags():
    cells = read_table(
        "x",
        "base: {lr: 1.0, model_kwargs: {a: 1, b: 2}}\n"
        "cells: {one: {row: One}, two: {lr: 2.0, model_kwargs: {b: 3}, published: {top1: 5}}}",
    ).cells
    assert cells["one"].flags == {"lr": 1.0, "model_kwargs": {"a": 1, "b": 2}}
    assert cells["two"].flags == {"lr": 2.0, "model_kwargs": {"a": 1, "b": 3}}
    assert (cells["two"].name, cells["two"].published) == ("x/two", {"top1": 5.0})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("camdrop-table1", "camdrop-table1 is a table: a recipe is one of its cells, such as camd"),
        ("camdrop-table1/camdop", "of table camdrop-table1 (nearest: camdrop"),
        ("camdrop-table9/none", "unknown recipe 'camdrop-table9/none' (nearest: camdrop-table"),
    ],
)
def test_unknown_cells(name, message):
    with pytest.raises(UserError) as raised:
        load_recipe(name)
    assert message in str(raised.value)


def test_the_list_names_paper_table_and_figure(capsys):
    main(["list", "--recipes", "rblock-table2/*drop*"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["recipe", "paper", "table", "model", "data", "published", "metric"]
    assert len(lines) == 2 + 4
    for word in ("Wang & Hu 2023", "Table 2", "resnet34_rblock", "tiny_imagenet", "top1 43.37"):
        assert word in lines[4]
    started = time.perf_counter()
    main(["list", "--recipes"])
    assert time.perf_counter() - started < 20
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)
    with pytest.raises(UserError, match="the filter must match a recipe's name; got 'x'"):
        main(["list", "--recipes", "x"])
