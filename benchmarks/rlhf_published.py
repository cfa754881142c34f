"""Execution plans on published PPO workloads (ReaL, arXiv 2406.14088): estimates, and what the search gains.

    REDCO_LIKE_GROUND_TRUTH=/data python benchmarks/rlhf_published.py [--quick]

Two constants of that system (seconds to dispatch an operation, and a collective) are fitted on two groups of points,
actor and critic of 7 B on 8 GPUs and actor of 13 B on 16; the other five groups are held out. Bars:

- seconds of the heuristic plan (tensor 8, stages = nodes, all calls on everything) on the groups held out: mean
  absolute error at most 15 %;
- gain of the searched plan over the heuristic, in the estimates: on average at least the measured one, over the points
  that were measured on both, and growing with the generation length, as it does there (1.20, 1.33 and 1.49 for 128, 384
  and 896 tokens);
- the searched plan is never slower than a heuristic: the one above, all colocated, what ReaL ships, HybridFlow's split
  and standalone placements.

The space that is searched is the one that ReaL searches (stages, data, tensor; checkpoints always; an iteration begins
when the one before has ended), so that the gain is not that of other kinds of plans. The last line is one JSON object;
the exit code is 1 where a bar is missed. `--quick`
fits on the first group and searches it alone, ten seconds a point.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import sys
import time

import numpy as np

from redco_like.validation.rlhf import Point, fit_software, read_points
from search.rlhf.forward import Dispatch

FITTED = ((7, 7, 8), (13, 7, 16))
ERROR_BAR = 0.15


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one group, ten seconds a point")
    parser.add_argument("--time-limit", type=float, default=30.0, metavar="SECONDS", help="of each search")
    options = parser.parse_args()
    folder = os.environ.get("REDCO_LIKE_GROUND_TRUTH")
    if not folder:
        parser.error("REDCO_LIKE_GROUND_TRUTH names no folder of published runs")
    points = read_points(folder)
    fitted = FITTED[:1] if options.quick else FITTED
    limit = min(options.time_limit, 10.0) if options.quick else options.time_limit
    begin = time.perf_counter()
    software = fit_software([point for point in points if point.group in fitted], time_limit=limit)
    print(
        f"{software.operation_seconds * 1e6:.1f} us per operation, {software.collective_seconds * 1e6:.0f} us per "
        f"collective, fitted on {', '.join(map(str, fitted))} in {time.perf_counter() - begin:.0f} s"
    )
    rows = []
    for point in points:
        searched = point.group in FITTED[:1] or not options.quick
        rows.append(_row(point, software, limit if searched else 0.0) | {"held_out": point.group not in fitted})
        print(_line(rows[-1]), flush=True)
    bars = _bars(rows)
    record = {
        "benchmark": "rlhf_published",
        "quick": options.quick,
        "software": dataclasses.asdict(software),
        "fitted": fitted,
        "rows": rows,
        "bars": bars,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "seconds": time.perf_counter() - begin,
    }
    for name, bar in bars.items():
        print(f"{'met' if bar['met'] else 'MISSED'}  {name}: {bar['value']} (bar: {bar['bar']})")
    print(json.dumps(record))
    return 0 if all(bar["met"] for bar in bars.values()) else 1


def _row(point: Point, software: Dispatch, time_limit: float) -> dict:
    case = point.case
    heuristic = case.heuristic_seconds(software)
    row = {
        "group": point.group,
        "new_tokens": case.row.new_tokens,
        "heuristic_measured": point.heuristic_seconds,
        "heuristic": heuristic,
        "error": heuristic / point.heuristic_seconds - 1,
        "searched_measured": point.searched_seconds,
        "gain_measured": point.gain,
    }
    if not time_limit:
        return row
    begin = time.perf_counter()
    found = case.search(software, time_limit=time_limit)
    if found.execution is None:
        return {**row, "searched": float("inf"), "gain": 0.0}
    execution = found.execution
    others = {"heuristic": heuristic, **execution.heuristics}
    return {
        **row,
        "searched": execution.period_seconds,
        "gap": found.gap,
        "gain": heuristic / execution.period_seconds,
        "over_best_heuristic": min(others.values()) / execution.period_seconds,
        "search_seconds": time.perf_counter() - begin,
        "windows": {plan.call: f"{plan.window} {plan.plan.mesh}" for plan in execution.calls},
    }


def _line(row: dict) -> str:
    text = (
        f"{row['group']!s:>12} {row['new_tokens']:4d} tokens: heuristic {row['heuristic']:6.1f} s, measured "
        f"{row['heuristic_measured']:6.1f} ({row['error']:+.0%})"
    )
    if "searched" in row:
        measured = "" if row["searched_measured"] is None else f", measured {row['searched_measured']:6.1f}"
        gain = "" if row["gain_measured"] is None else f", measured {row['gain_measured']:.2f}"
        text += f"; searched {row['searched']:6.1f} s{measured}; gain {row['gain']:.2f}{gain}"
        text += f"; gap {row.get('gap', 1.0):.1%}, {row.get('search_seconds', 0.0):.0f} s"
    return text


def _bars(rows: list[dict]) -> dict[str, dict]:
    held = [abs(row["error"]) for row in rows if row["held_out"]]
    error = float(np.mean(held))
    bars = {"error of the heuristic, held out": {"value": round(error, 4), "bar": ERROR_BAR, "met": error <= ERROR_BAR}}
    done = [row for row in rows if "gain" in row and row["gain_measured"] is not None]
    gain, measured = (float(np.mean([row[name] for row in done])) for name in ("gain", "gain_measured"))
    bars["gain"] = {"value": round(gain, 3), "bar": round(measured, 3), "met": gain >= measured}
    lengths = sorted({row["new_tokens"] for row in done})
    means = [float(np.mean([row["gain"] for row in done if row["new_tokens"] == n])) for n in lengths]
    grows = all(a < b for a, b in itertools.pairwise(means))
    bars["gain grows"] = {"value": [round(x, 3) for x in means], "bar": "growing", "met": grows}
    least = min(row.get("over_best_heuristic", 0.0) for row in done)
    bars["best heuristic over the searched plan, least"] = {
        "value": round(least, 4),
        "bar": 1,
        "met": least >= 1 - 1e-9,
    }
    return bars


if __name__ == "__main__":
    sys.exit(main())
