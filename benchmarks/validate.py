"""The cost model against published runs, as `redco-like validate` has it: prints one JSON object as its last line.

    REDCO_LIKE_GROUND_TRUTH=/data/published python benchmarks/validate.py [--shipped] [--write] [--plot validation.png]

`--shipped` takes the constants of search/efficiencies.toml instead of fitting, `--write` writes the fitted ones there.
Exits with 1 when a bar is missed (the limits are at the top of redco_like/validation/report.py), with 2 without data.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import pathlib
import sys
import time

from rich.console import Console

from redco_like.validation import validate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of published_runs.csv; default $REDCO_LIKE_GROUND_TRUTH")
    parser.add_argument("--shipped", action="store_true", help="do not fit")
    parser.add_argument("--write", action="store_true", help="write search/efficiencies.toml")
    parser.add_argument("--plot", help="file of the scatter plot")
    parser.add_argument("--json", help="file of the whole record")
    options = parser.parse_args()
    start = time.perf_counter()
    console = Console(width=160)
    try:
        report = validate(options.folder, fit=not options.shipped, progress=console.print, plot=options.plot)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(report)
    if options.write and report.constants_file:
        with importlib.resources.as_file(importlib.resources.files("search")) as folder:
            (folder / "efficiencies.toml").write_text(report.constants_file, encoding="utf-8")
    if options.json:
        pathlib.Path(options.json).write_text(report.to_json(), encoding="utf-8")
    groups = {e.name: {"split": e.split, "runs": e.runs, "mean_error": round(e.mean, 4)} for e in report.groups}
    rankings = {r.name: {"regret": round(r.regret, 4), "rank": round(r.rank, 4)} for r in report.rankings}
    summary = {
        "groups": groups,
        "memory": {name: round(error, 4) for name, (error, _) in report.memory.items()},
        "rankings": rankings,
        "schedules": {name: [right, pairs] for name, right, pairs in report.schedules},
        "missed": [str(bar) for bar in report.missed],
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(summary))
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
