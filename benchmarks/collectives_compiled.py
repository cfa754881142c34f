"""Collectives as planned and as XLA compiles them for 8 CPU devices, by kind and mesh axes.

    python benchmarks/collectives_compiled.py          under three minutes on 2 cores

Models are small, so bytes are too; the numbers of collectives and what they move do not depend on the width. XLA for
CPUs writes a reduce-scatter as an all-reduce: both are "sum".

Bar: of every plan that is not listed as missed, with its cause, each kind over each axis is within 10 % of the compiled
bytes per device; at least 8 plans of 4 models.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def main() -> int:
    """Print the table and one line of JSON; 1 if the bar is missed."""
    from plan_collectives import BAR, NEGLIGIBLE, PLANS, compare

    start = time.monotonic()
    agreeing, missed, models = 0, [], set()
    print(f"{'plan':44} {'axes':14} {'kind':10} {'planned kB':>11} {'compiled kB':>11} {'ratio':>7}")
    for plan in PLANS:
        rows = compare(plan)
        for row in rows:
            flag = "" if row.agrees else " missed" + (f": {plan.why}" if plan.why else "")
            sizes = f"{row.planned / 1e3:11.2f} {row.compiled / 1e3:11.2f} {row.ratio:7.3f}"
            print(f"{plan!s:44} {'+'.join(row.axes):14} {row.kind:10} {sizes}{flag}", flush=True)
        if all(row.agrees for row in rows):
            agreeing += 1
            models.add(plan.model)
        else:
            missed.append(plan)
    passed = all(plan.why for plan in missed) and agreeing >= 8 and len(models) >= 4
    result = {
        "benchmark": "collectives_compiled",
        "label": "compiled",
        "machine": platform.processor() or "cpu",
        "plans": len(PLANS),
        "agreeing": agreeing,
        "models_agreeing": len(models),
        "missed": {str(plan): plan.why for plan in missed},
        "bar": BAR,
        "negligible": NEGLIGIBLE,
        "seconds": round(time.monotonic() - start, 1),
        "passed": passed,
    }
    print("\n" + json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
