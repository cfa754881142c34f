"""Is the plan that the search picks the fastest to run? On 8 virtual CPU devices, after measuring them.

Bar: the picked plan's seconds per step are at most 1.15 times those of the best of all plans that were run.

The devices are profiled (`redco_like.profile`), a small Llama is planned for them, and the picked plan is run beside
its runners-up and plans drawn at random from the space (mesh, rematerialisation, microbatches; seeded), at least 10 in
all, through the runtime that `Trainer` uses. They run in turn, in an order that changes from round to round; each
plan's seconds are compared with the picked plan's within a round, so that what else the machine does counts for both,
and the median over the rounds is taken.

Memory that is freed is kept (`KEEP_MEMORY`), as the allocators of accelerators keep it: XLA for CPUs gives the
temporaries of a step back to the system after each step, and the page faults of getting them again took up to 8 ms per
MB and device, more than the work on them.

    python benchmarks/plan_quality_cpu.py            # last line: one JSON object; exit status 1 if the bar is missed
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("PJRT_NPROC", "32")  # virtual devices wait for each other: there is a thread for each of them
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax

from pipelines import build_train_program
from pipelines.problem import train_problem
from redco_like.models import build_model
from redco_like.models.config import ModelConfig
from redco_like.profile import profile_devices
from search import Cluster, Plan, Space, TracedModel, parse_cluster, solve
from sharding_rules import PlanError, make_mesh

MAX_REGRET = 1.15
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Read by glibc when a process starts; another C library leaves them alone."""
GLOBAL_BATCH, LENGTH = 32, 48
CONFIG = ModelConfig(
    family="llama",
    kind="decoder",
    vocab=4096,
    embed=256,
    layers=4,
    heads=8,
    kv_heads=4,
    mlp=704,
    max_length=LENGTH,
    tied=False,
    norm="rms",
    activation="silu",
    gated=True,
    position="rotary",
)


@dataclasses.dataclass
class Candidate:
    """A plan, what was predicted, and the seconds per step of each round."""

    origin: str
    plan: Plan
    predicted: float
    parts: dict[str, float]
    measured: list[float]

    def name(self) -> str:
        plan = self.plan
        return f"{plan.mesh} {plan.preset} remat={plan.remat} microbatches={plan.microbatches}"


class Run:
    """A plan as the runtime runs it; its state is made for each round, so that only one is there at a time."""

    def __init__(self, model: Any, optimizer: Any, batch: Any, plan: Plan):
        self.program = build_train_program(
            model.loss_fn, model.init_fn, optimizer, batch, plan, make_mesh(plan.mesh, jax.devices())
        )
        self.compile_seconds = self.program.compile()
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, CONFIG.vocab, (GLOBAL_BATCH, LENGTH + 1)).astype(np.int32)
        values = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        self.batch = jax.device_put(values, self.program.batch_shardings)

    def seconds(self, steps: int) -> float:
        state, _ = self.program.step(self.program.init(jax.random.key(0)), self.batch)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = self.program.step(state, self.batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / steps


def candidates(model: TracedModel, cluster: Cluster, count: int, seed: int) -> tuple[list[Candidate], str]:
    """The picked plan, its runners-up, and plans drawn from the space; and what the search says of itself."""
    result = solve(Space(model, cluster), runners_up=4)
    if result.best is None:
        raise SystemExit(result.advice)
    costed = [("picked", result.best), *(("runner-up", other) for other in result.runners_up)]
    seen = {other.plan.to_json() for _, other in costed}
    draw = random.Random(seed)
    sizes = [1, 2, 4, 8]
    meshes = [mesh for mesh in itertools.product(sizes, repeat=4) if np.prod(mesh) == 8]
    for _ in range(50 * count):
        if len(costed) >= count:
            break
        mesh = dict(zip(("data", "fsdp", "context", "tensor"), draw.choice(meshes), strict=True))
        fixed = {**mesh, "remat": draw.choice(["none", "dots", "full"]), "microbatches": draw.choice(sizes)}
        fixed["sequence"] = mesh["tensor"] > 1 and draw.random() < 0.5
        try:
            best = solve(Space(model, cluster, fix=fixed), runners_up=0).best
        except PlanError:
            continue
        if best is not None and best.plan.to_json() not in seen and not best.plan.planned:
            seen.add(best.plan.to_json())
            costed.append(("drawn", best))
    found = [
        Candidate(origin, c.plan, c.estimate.seconds_per_step, dict(c.estimate.seconds), []) for origin, c in costed
    ]
    return found, result.certificate()


def spearman(xs: list[float], ys: list[float]) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (xs, ys)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> int:
    parser = argparse.ArgumentParser(description="seconds of the picked plan beside other plans of the same model")
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="per round and plan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", help="a cluster file that redco-like profile wrote; default: profile now")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.cluster:
        cluster = parse_cluster(options.cluster)
    else:
        profile = profile_devices(progress=lambda words: print(f"profile: {words}", flush=True))
        print(profile)
        cluster = profile.cluster
    profile_seconds = time.perf_counter() - start
    model = build_model(CONFIG, dtype="float32")
    optimizer = optax.adamw(1e-3)
    batch = model.abstract_batch(GLOBAL_BATCH, LENGTH)
    traced, opt_state = train_problem(model.loss_fn, model.init_fn, optimizer, batch, "float32")
    planned = TracedModel(traced, opt_state, cluster, fused_attention=False)
    found, certificate = candidates(planned, cluster, options.plans, options.seed)
    print(certificate)
    runs = []
    for candidate in found:
        runs.append(Run(model, optimizer, batch, candidate.plan))
        print(f"compiled in {runs[-1].compile_seconds:4.1f} s: {candidate.name()}", flush=True)
    draw = random.Random(options.seed)
    order = list(range(len(runs)))
    for i in range(options.rounds):
        draw.shuffle(order)
        for j in order:
            found[j].measured.append(runs[j].seconds(options.steps))
        print(f"round {i + 1} of {options.rounds}: picked {found[0].measured[-1]:.3f} s", flush=True)
    picked = found[0]
    ratios = [statistics.median(mine / p for mine, p in zip(c.measured, picked.measured, strict=True)) for c in found]
    medians = [statistics.median(c.measured) for c in found]
    regret = 1 / min(ratios)
    rank = spearman([c.predicted for c in found], ratios)
    errors = [abs(c.predicted / m - 1) for c, m in zip(found, medians, strict=True)]
    print(f"{'measured':>9s} {'predicted':>9s} {'of picked':>9s}")
    for i in np.argsort(ratios):
        c = found[i]
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in c.parts.items() if seconds > 0)
        print(f"{medians[i]:9.3f} {c.predicted:9.3f} {ratios[i]:9.2f}  {c.origin:9s} {c.name()}  ({parts})")
    met = regret <= MAX_REGRET
    print(f"picked / best: {regret:.3f} (bar {MAX_REGRET}); Spearman {rank:.2f} over {len(found)} plans")
    record = {
        "benchmark": "plan_quality_cpu",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "jax": jax.__version__,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "seed": options.seed,
        "profile_seconds": round(profile_seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "picked_over_best": round(regret, 4),
        "bar": MAX_REGRET,
        "spearman": round(rank, 4),
        "median_absolute_error": round(statistics.median(errors), 4),
        "plans": [
            {
                "plan": c.name(),
                "origin": c.origin,
                "measured_seconds": round(m, 4),
                "measured_quartiles": [round(q, 4) for q in statistics.quantiles(c.measured, n=4)[::2]],
                "predicted_seconds": round(c.predicted, 4),
                "of_picked": round(r, 4),
            }
            for c, m, r in zip(found, medians, ratios, strict=True)
        ],
        "met": met,
    }
    print(json.dumps(record))
    return 0 if met else 1


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    raise SystemExit(main())
