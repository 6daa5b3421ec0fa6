"""The command: see the package's docstring."""

import argparse
import time

from benchmarks.digits_study import report, runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Regularizers on few real digits.")
    parser.add_argument("stage", choices=["tune", "main", "ablations", "report"])
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    if args.stage == "report":
        report.write(runs.read())
        return
    rows = runs.read()
    done = {runs.of(row) for row in rows}
    todo = [key for key in runs.planned(args.stage, rows) if key not in done]
    print(f"{args.stage}: {len(todo)} runs to do, {len(done)} rows are there", flush=True)
    start = time.perf_counter()
    for count, found in enumerate(runs.append(runs.do(todo, args.jobs)), 1):
        left = (time.perf_counter() - start) / count * (len(todo) - count)
        print(
            f"{count}/{len(todo)}  {found['cell']}  {found['fraction']:g}  seed {found['seed']}  "
            f"validation {found['val_top1']:.1f} %  {left / 60:.0f} min left",
            flush=True,
        )


if __name__ == "__main__":
    main()
