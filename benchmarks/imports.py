"""What importing timm_structdrop adds to importing timm.

    python -m benchmarks.imports [--repeats N]

Both are imported in a fresh process, one after the other, so that the ratio is paired.
"""

import argparse
import platform
import statistics
import subprocess
import sys

import timm
import torch

CODE = """
import time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_structdrop
print(middle - start, time.perf_counter() - middle)
"""


def run(repeats: int = 7) -> list[tuple[float, float]]:
    """Seconds of ``import timm`` and of ``import timm_structdrop`` after it, by process."""
    found = []
    for _ in range(repeats + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        first, second = map(float, done.stdout.split())
        found.append((first, second))
    return found[1:]  # the first process fills the disk cache


def main() -> None:
    parser = argparse.ArgumentParser(description="The time that the import adds.")
    parser.add_argument("--repeats", type=int, default=7)
    times = run(parser.parse_args().repeats)
    shares = [100 * ours / theirs for theirs, ours in times]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(
        f"import timm {statistics.median(a for a, _ in times):.2f} s, timm_structdrop after it "
        f"{statistics.median(b for _, b in times):.3f} s: {statistics.median(shares):.1f} % more "
        f"({min(shares):.1f} to {max(shares):.1f}), {len(times)} processes"
    )


if __name__ == "__main__":
    main()
