"""What importing timm_structdrop adds to importing timm.

    python -m benchmarks.imports [--repeats N] [--quick]

Both are imported in a fresh process, one after the other, so that the ratio is paired; and what the
second one loads that the first one had not is listed.
"""

import json
import subprocess
import sys
from typing import Any

from benchmarks._settings import Settings
from benchmarks._text import milliseconds, ratio, table
from benchmarks._timing import Times, compared

TITLE = "Importing"
CPU_ONLY = True
LIMIT = 3.0  # percent of `import timm`
NEVER_EAGER = ("sklearn", "matplotlib", "nilearn")
CODE = """
import json, sys, time
def now():
    return [1000 * clock() for clock in (time.perf_counter, time.process_time)]
start = now()
import timm
middle, before = now(), set(sys.modules)
start_of_ours = now()
import timm_structdrop
end = now()
print(json.dumps({
    "timm": [b - a for a, b in zip(start, middle)],
    "ours": [b - a for a, b in zip(start_of_ours, end)],
    "added": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
}))
"""


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row: the import over that of timm, and the libraries that it adds."""
    found = [in_fresh_process() for _ in range(settings.rounds(11) + 1)]
    rounds = found[1:]  # the first process fills the disk cache
    ours, timm = (
        Times(*([one[name][kind] for one in rounds] for kind in (0, 1)))
        for name in ("ours", "timm")
    )
    added = set(found[0]["added"]) - set(sys.stdlib_module_names) - {"timm_structdrop"}
    return [{**compared(ours, timm), "added": sorted(added)}]


def in_fresh_process() -> dict[str, Any]:
    """Elapsed and processor milliseconds of both imports, and the second's top-level modules."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def headline(rows: list[dict[str, Any]]) -> str:
    (row,) = rows
    eager = [name for name in NEVER_EAGER if name in row["added"]]
    return (
        f"`import timm_structdrop` takes {ratio(in_percent(row), 1)} % of `import timm` "
        f"(at most {LIMIT:g} wanted) and loads "
        f"{', '.join(eager) if eager else 'none of ' + ', '.join(NEVER_EAGER)}."
    )


def in_percent(row: dict[str, Any]) -> dict[str, float]:
    return {name: 100 * value for name, value in row["ratio"].items()}


def report(rows: list[dict[str, Any]]) -> list[str]:
    (row,) = rows
    return [
        f"{row['repeats']} fresh processes.",
        "",
        *table(
            [
                "`import timm`",
                "`import timm_structdrop` after it",
                "percent more",
                "processor time",
            ],
            [
                [
                    milliseconds(row["other_ms"]),
                    milliseconds(row["ms"]),
                    ratio(in_percent(row), 1),
                    f"{100 * row['processor_ratio']:.1f}",
                ]
            ],
        ),
        "",
        f"Libraries that it loads and timm does not: {', '.join(row['added']) or 'none'}.",
    ]


if __name__ == "__main__":
    from benchmarks._suite import alone

    alone("imports")
