"""How long it takes to find the axes of Llama-3-8B, with no parameter allocated.

    python benchmarks/inference_time.py         about 10 s, no extra needed

Bars: 32 layers scanned under 1 s, unrolled under 15 s: trace of the loss, inference of axes, specs of every parameter.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import zoo  # noqa: E402

from sharding_rules import MeshShape, make_layout, trace  # noqa: E402

BARS_SECONDS = {"scanned": 1.0, "unrolled": 15.0}
REPEATS = 5


def seconds(scanned: bool) -> float:
    loss, params, batch = zoo.llama_8b(scanned)
    start = time.perf_counter()
    traced = trace(loss, params, batch, names=("params", "batch"))
    make_layout(traced, MeshShape(fsdp=8, tensor=8), "fsdp+megatron").specs("params")
    return time.perf_counter() - start


def main() -> int:
    results = {}
    for form, bar in BARS_SECONDS.items():
        runs = [seconds(form == "scanned") for _ in range(REPEATS)]
        results[form] = {
            "first": round(runs[0], 3),
            "median": round(statistics.median(runs), 3),
            "worst": round(max(runs), 3),
            "bar": bar,
        }
        print(f"{form}: first {runs[0]:.3f} s, then {statistics.median(runs[1:]):.3f} s (bar {bar} s)")
    passed = all(r["worst"] <= r["bar"] for r in results.values())
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(
        json.dumps(
            {
                "benchmark": "inference_time",
                "label": "measured",
                "machine": machine,
                "seconds": results,
                "passed": passed,
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
