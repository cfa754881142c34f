"""How long a plan takes: the command from start to printed table, and the search from 8 to 16,384 devices.

    python benchmarks/planner_speed.py         about a minute on 2 quiet cores, no extra needed

Bars: `redco-like plan --model llama-3-70b --cluster v5p-1024 --seq-len 8192 --global-batch 1024` under 8 s from start
to printed table, its search under 2 s with gap 0; the search's seconds grow at most like candidates to the power 1.2
(measured with every candidate costed: the Pareto front). CPU seconds are shown beside, for busy machines.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from redco_like.problem import load_problem  # noqa: E402
from search import Space, TracedModel, parse_cluster, solve  # noqa: E402

BAR_COMMAND_SECONDS = 8.0
BAR_SEARCH_SECONDS = 2.0
BAR_POWER = 1.2
DEVICES = [8, 32, 128, 512, 2048, 8192, 16384]
MODEL, SEQ_LEN, BATCH = "llama-3-8b", 8192, 16384
COMMAND = "plan --model llama-3-70b --cluster v5p-1024 --seq-len 8192 --global-batch 1024"
REPEATS = 3
PROOF = r"(\d+) candidates in .* gap ([\d.]+)%, ([\d.]+) s of search"


def command() -> dict[str, object]:
    """Run the command several times in processes of their own."""
    runs = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        entry = [str(pathlib.Path(sys.executable).parent / "redco-like"), *COMMAND.split()]
        done = subprocess.run(entry, capture_output=True, text=True, check=True, cwd=ROOT)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        proof = re.search(PROOF, " ".join(done.stdout.split()))
        if proof is None:
            raise SystemExit(f"no certificate in what the command printed:\n{done.stdout}")
        runs.append((wall, cpu, *proof.groups()))
    print(done.stdout)
    return {
        "wall_seconds": [round(run[0], 2) for run in runs],
        "cpu_seconds": [round(run[1], 2) for run in runs],
        "search_seconds": [float(run[4]) for run in runs],
        "gap": float(runs[-1][3]) / 100,
        "candidates": int(runs[-1][2]),
    }


def scaling() -> list[dict[str, float]]:
    """Search one model on more and more devices, once for the best plan and once for the whole front."""
    problem = load_problem(MODEL, seq_len=SEQ_LEN, global_batch=BATCH)
    rows = []
    for devices in DEVICES:
        cluster = parse_cluster(f"{devices // 8}x8xH100")
        model = TracedModel(problem.traced, problem.opt_state, cluster, fused_attention=True)
        start = time.process_time()
        best = solve(Space(model, cluster))
        middle = time.process_time()
        front = solve(Space(model, cluster), pareto=True)
        row = {
            "devices": devices,
            "candidates": count(model, cluster),
            "front": len(front.pareto),
            "search_cpu_seconds": round(middle - start, 3),
            "front_cpu_seconds": round(time.process_time() - middle, 3),
            "costed": best.evaluated,
            "gap": best.gap,
            "seconds_per_step": best.estimate.seconds_per_step if best.estimate else None,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def count(model: TracedModel, cluster) -> int:
    """All candidates of the space."""
    space = Space(model, cluster)
    places = (model.place(inner) for inner in space.inner_meshes())
    return sum(len(space.columns(place)) for place in places if not isinstance(place, str))


def main() -> int:
    found, rows = command(), scaling()
    x, y = (np.log([row[key] for row in rows]) for key in ("candidates", "front_cpu_seconds"))
    power = float(np.polyfit(x, y, 1)[0])
    command_seconds = statistics.median(found["wall_seconds"])
    search_seconds = statistics.median(found["search_seconds"])
    missed = []
    if command_seconds > BAR_COMMAND_SECONDS:
        missed.append(f"the command took {command_seconds:.1f} s, bar {BAR_COMMAND_SECONDS}")
    if search_seconds > BAR_SEARCH_SECONDS:
        missed.append(f"its search took {search_seconds:.1f} s, bar {BAR_SEARCH_SECONDS}")
    if found["gap"] != 0 or any(row["gap"] for row in rows):
        missed.append("a gap is left")
    if power > BAR_POWER:
        missed.append(f"seconds grow like candidates to the power {power:.2f}, bar {BAR_POWER}")
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    record = {"command": found, "scaling": rows, "power": round(power, 3), "machine": machine, "missed": missed}
    print(json.dumps(record))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
