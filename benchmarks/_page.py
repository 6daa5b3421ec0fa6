"""The files of a run of the speed benchmarks: numbers, and the pages that are made of them."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, ROOT
from benchmarks._text import table, versions
from timm_structdrop.errors import UserError
from timm_structdrop.files import save_json, save_png, save_text
from timm_structdrop.training.progress import format_seconds

__all__ = ["DOCUMENT", "page", "read", "section", "summary", "with_summary", "write"]

DOCUMENT = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks -->", "<!-- speed: end -->"


def section(module: Any, rows: list[dict[str, Any]]) -> list[str]:
    """What one benchmark found, as Markdown."""
    return [f"## {module.TITLE}", "", *module.report(rows)]


def write(results: dict[str, Any], folder: Path, named: list[str]) -> list[Path]:
    """Write the numbers, the page and the pictures of a run, each whole or not at all.

    A whole run on the CPU is ``speed.json``, ``speed.md`` and ``growth.png``; other runs have other
    names, so that they cannot take its place. Written beside the benchmarks, it also becomes the
    summary in ``docs/results.md``.

    Args:
        results: of :func:`benchmarks._suite.measured`; the names of the pictures are added.
        folder: is there.
        named: the benchmarks that were asked for by name.
    """
    kind = [results["device"]] * (results["device"] != "cpu") + ["quick"] * results["quick"]
    stem = folder / "-".join(["speed", *named, *kind])
    results["pictures"] = {}
    paths = []
    for name, found in results["benchmarks"].items():
        module = import_module(f"benchmarks.{name}")
        if hasattr(module, "draw"):
            picture = folder / ("-".join([name, *kind]) + ".png")
            results["skipped"].pop(picture.name, None)
            try:
                paths.append(save_png(module.draw(found["rows"]), picture))
                results["pictures"][name] = picture.name
            except UserError as error:
                results["skipped"][picture.name] = str(error)
    paths.append(save_json(results, stem.with_suffix(".json")))
    paths.append(save_text(page(read(paths[-1])), stem.with_suffix(".md")))
    if stem.resolve() == RESULTS.resolve() / "speed":
        text = with_summary(DOCUMENT.read_text(encoding="utf-8"), read(stem.with_suffix(".json")))
        paths.append(save_text(text, DOCUMENT))
    return paths


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def page(results: Mapping[str, Any]) -> str:
    """The page of a run, from what its JSON file holds."""
    benchmarks = results["benchmarks"]
    lines = ["# Speed", "", *introduction(results), ""]
    for name, found in benchmarks.items():
        lines += [*section(import_module(f"benchmarks.{name}"), found["rows"]), ""]
        if name in results["pictures"]:
            lines += [f"![{name}]({results['pictures'][name]})", ""]
    ran = [
        [f"`python -m benchmarks.{name}`", format_seconds(f["seconds"]), f"{f['load']:.1f}"]
        for name, f in benchmarks.items()
    ]
    lines += ["## The run", "", *table(["benchmark", "took", "load average before"], ran)]
    lines += [f"\n{name} was left out: {why}." for name, why in results["skipped"].items()]
    return "\n".join(lines) + "\n"


def introduction(results: Mapping[str, Any]) -> list[str]:
    """What was measured, where and how."""
    warning = ["**A quick run: small sizes and few rounds; nothing to quote.**", ""]
    return [
        *(warning if results["quick"] else []),
        f"`{results['command']}` on {results['date'][:10]}: {results['hardware']}; "
        f"{versions(results)}.",
        "",
        "What is compared takes turns in one process, each round beginning with another one, and "
        "ratios are taken within a round, so that what else the machine does meets both: medians, "
        "quartiles in brackets. Ratios of processor time stand beside them, because on a busy "
        "machine a process also waits for its turn. All numbers are in the JSON file beside this.",
    ]


def summary(results: Mapping[str, Any]) -> list[str]:
    """The figures that matter most, a line for each benchmark."""
    lines = [
        f"`{results['command']}` on {results['date'][:10]}, {results['hardware']}; medians:",
        "",
    ]
    for name, found in results["benchmarks"].items():
        lines.append(f"- {import_module(f'benchmarks.{name}').headline(found['rows'])}")
    return lines


def with_summary(document: str, results: Mapping[str, Any]) -> str:
    """The document with the run's summary between its two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *summary(results), END + after])
