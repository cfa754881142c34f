"""What XLA's programs do beyond what the planner counts, read off compiled ones: constants of the cost model.

    python benchmarks/loop_traffic.py                                    about 15 minutes

It needs the extras tpu-aot and gpu-aot, and no TPU and no GPU. The planner counts the bytes of loops by the rule of
fusion of `search.fusion`, that of kernels fused by hand: XLA also fuses into products. And it counts what loops
over layers keep for the backward pass as written once and read once, which XLA copies into an array of all layers and
out of it. `loop_traffic` and `stack_traffic` of `search.efficiency.Efficiency` are what these two are multiplied by for
compiled software, fitted here on the seconds of memory-bound operations, copies and prefetches in the compiled
schedules (`search.roofline`) of models whose order no benchmark here compares, several rematerialisations each.
`unhidden` is the share of the gathers and scatters of sequence parallelism that those schedules wait for; on GPUs with
what it takes to write once what they move in another order: XLA does, as the sequence is not the leading dimension.

Of a mixture of experts, `routed_traffic` is what sorting tokens by experts and back moves of what the model writes out,
and `matrix_copies` how often gathered matrices of experts are copied: what is left of the memory's seconds when all
else is taken off, over plans with tensor 1, 2 and 4, which have more of the first and less of the second. Of parameters
that a device has to itself, `weight_copies` (GPUs) is what the memory's seconds grow by with data parallelism beyond
the cast and the optimizer, `update_copies` (TPUs) what copies grow by with ZeRO-1, and `sums_waited` (GPUs) the share
of the sums of gradients in shards that schedules wait for (all-reduces hide).

Bar: of each accelerator and of all of a kind, the constants in `redco_like/validation/fit.py` are within a fifth of
those found. The last line is JSON; exit 1 on a missed bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from redco_like.cli.planning import Loaded
    from search import Plan
    from search.compiler import Compiled

MOST_OFF = 0.2
CASES = (
    ("v5e", "qwen3-1.7b", "v5e:4x4", 64, 2048),
    ("v5p", "opt-2.7b", "v5p:2x4x4", 64, 2048),
    ("v6e", "llama-2-7b", "v6e:4x8", 64, 4096),
    ("gpu", "qwen3-1.7b", "8xH100", 32, 2048),
    ("gpu", "opt-2.7b", "8xH100", 32, 2048),
)
"""Accelerator, or kind of one, whose constants they are; model, cluster, global batch, sequence length."""
EXPERTS = (
    ("tpu", "qwen3-30b-a3b", "v6e:8x8", 128, 2048),
    ("tpu", "qwen3-30b-a3b", "v5p:4x4x4", 128, 4096),
    ("gpu", "qwen3-30b-a3b", "2x8xH100", 64, 2048),
)
"""The same, of mixtures of experts."""
ROUTED: tuple[dict[str, Any], ...] = tuple(
    {"tensor": tensor, "data": 1, "context": 1, "expert": 1, "sequence": False, "remat": "dots"} for tensor in (1, 2, 4)
)
PLANS: tuple[dict[str, Any], ...] = tuple(
    {"tensor": tensor, "data": 1, "context": 1, "expert": 1, "sequence": False, "remat": remat}
    for remat in ("none", "dots", "full")
    for tensor in (1, 2)
)
SEQUENCE: tuple[dict[str, Any], ...] = tuple(
    {"tensor": tensor, "data": 1, "context": 1, "expert": 1, "sequence": True} for tensor in (2, 4)
)
HELD: tuple[dict[str, Any], ...] = tuple(
    {
        "tensor": 1,
        "context": 1,
        "expert": 1,
        "remat": "dots",
        "microbatches": 1,
        "data": data,
        "optimizer_sharding": zero,
    }
    for data, zero in ((1, False), (4, False), (4, True), (8, False), (8, True))
)
TIMES = ("seconds", "exposed_seconds")


@dataclasses.dataclass(frozen=True)
class Point:
    """Of one plan: seconds of memory traffic, of loops and stacks as the planner counts them and all as compiled;
    seconds of gathers and scatters over tensor, with what is waited for of them; and of experts, seconds of sorting as
    counted and of copying the gathered matrices once.
    """

    plan: str
    loops: float
    stacks: float
    compiled: float
    scattered: float
    waited: float
    routed: float = 0.0
    matrices: float = 0.0


@dataclasses.dataclass(frozen=True)
class Held:
    """Of one plan: seconds of copying a device's own parameters once, as products take them and as they are stored;
    compiled, seconds of the memory beyond casts and the optimizer, and of copies alone; and of the sums of gradients.
    """

    plan: str
    sharded: bool
    own: float
    stored: float
    memory: float
    copies: float
    sums: float
    waited: float


def held(loaded: Loaded, check: Callable[[Loaded, Plan], Compiled], tell: Callable[[str], None]) -> list[Held]:
    """Compile plans of one model that differ in what a device has to itself."""
    from search import Space, hlo, solve
    from search.cost import PARAMS
    from search.costing import candidate
    from search.roofline import MEMORY_SHARE, step_seconds
    from sharding_rules import DATA, FSDP, PlanError

    costs, out = loaded.model.costs, []
    bandwidth = MEMORY_SHARE * loaded.cluster.accelerator.memory_bytes_per_second
    for fix in HELD:
        try:
            best = solve(Space(loaded.model, loaded.cluster, fix=fix), runners_up=0).best
        except PlanError:
            continue
        program = check(loaded, best.plan) if best is not None else None
        if best is None or program is None or not program.hlo:
            continue
        place, columns = candidate(loaded.model, best.plan)
        stored = float(costs.held(place, columns)[PARAMS, 0]) / bandwidth
        once = float(costs.update_bytes(place, columns)[0]) / bandwidth + (1 + costs.cast) * stored * (costs.cast < 1)
        time_ = step_seconds(hlo.parse(program.hlo), loaded.cluster, best.plan.mesh, order=best.plan.order)
        parts = time_.compute_seconds
        sums = [
            taken
            for taken in time_.collectives
            if taken.collective.kind == "reduce_scatter" and {*taken.collective.axes} <= {DATA, FSDP}
        ]
        point = Held(
            f"{best.plan.mesh}{' zero1' if fix['optimizer_sharding'] else ''}",
            fix["optimizer_sharding"],
            2 * costs.cast * stored,
            2 * stored,
            sum(parts.get(kind, 0.0) for kind in ("memory", "copy", "prefetch")) - once,
            parts.get("copy", 0.0),
            *(sum(getattr(taken, name) * taken.collective.times for taken in sums) for name in TIMES),
        )
        tell(
            f"  own {1e3 * point.own:5.1f} ms  memory {1e3 * point.memory:5.0f} ms  copies {1e3 * point.copies:4.1f} ms"
            f"  sums {1e3 * point.sums:4.1f} ms, waited {1e3 * point.waited:4.1f}  {point.plan}"
        )
        out.append(point)
    return out


def fitted_held(groups: list[list[Held]]) -> dict[str, float]:
    """Constants of what a device has to itself, from the plans of some models."""
    import numpy as np

    own, memory, stored, copies = [], [], [], []
    for group in groups:
        base, plain = group[0], {p.plan: p for p in group if not p.sharded}
        for p in group[1:]:
            if not p.sharded:
                own.append(p.own - base.own)
                memory.append(p.memory - base.memory)
            elif (same := plain.get(p.plan.removesuffix(" zero1"))) is not None:
                stored.append(p.stored)
                copies.append(p.copies - same.copies)
    every = [p for group in groups for p in group]
    return {
        "weight_copies": float(np.dot(own, memory) / np.dot(own, own)),
        "update_copies": float(np.dot(stored, copies) / np.dot(stored, stored)),
        "sums_waited": sum(p.waited for p in every) / max(sum(p.sums for p in every), 1e-12),
    }


def points(
    loaded: Loaded,
    check: Callable[[Loaded, Plan], Compiled],
    tell: Callable[[str], None],
    fixes: tuple[dict[str, Any], ...] = (*PLANS, *SEQUENCE),
) -> list[Point]:
    """Compile plans of one model."""
    import numpy as np

    from search import Space, hlo, solve
    from search.costing import candidate
    from search.roofline import MEMORY_SHARE, step_seconds
    from sharding_rules import TENSOR, PlanError

    costs, out = loaded.model.costs, []
    bandwidth = MEMORY_SHARE * loaded.cluster.accelerator.memory_bytes_per_second
    for fix in fixes:
        try:
            best = solve(Space(loaded.model, loaded.cluster, fix=fix), runners_up=0).best
        except PlanError:
            continue
        if best is None:
            continue
        plan = best.plan
        place, columns = candidate(loaded.model, plan)
        ops, parts_n = costs.ops[int(columns.remat[0])], columns.microbatches.astype(np.float64)
        found = ops.memory_bytes(place, parts_n)
        program = check(loaded, plan)
        if not program.hlo:
            continue
        time_ = step_seconds(hlo.parse(program.hlo), loaded.cluster, plan.mesh, order=plan.order)
        parts, once = time_.compute_seconds, costs.update_bytes(place, columns)[0] + found["rest"][0]
        seconds = sum(parts.get(kind, 0.0) for kind in ("memory", "copy", "prefetch")) - once / bandwidth
        scattered = [
            taken
            for taken in time_.collectives
            if taken.collective.axes == (TENSOR,) and taken.collective.kind != "all_reduce" and fix["sequence"]
        ]
        reordered = 2 * sum(taken.collective.bytes * taken.collective.times for taken in scattered) / bandwidth
        reordered *= loaded.cluster.accelerator.kind == "gpu"
        total, waited = (sum(getattr(taken, name) * taken.collective.times for taken in scattered) for name in TIMES)
        point = Point(
            f"{plan.mesh} {plan.remat} m{plan.microbatches}{' sequence' if fix['sequence'] else ''}",
            float(found["loops"][0] / bandwidth),
            float(found["stacks"][0] / bandwidth),
            float(seconds),
            total,
            waited + reordered,
            routed=float(found["routed"][0] / bandwidth),
            matrices=float(found["matrices"][0] / bandwidth),
        )
        tell(
            f"  loops {1e3 * point.loops:5.0f} ms  stacks {1e3 * point.stacks:5.0f} ms  compiled "
            f"{1e3 * point.compiled:5.0f} ms  "
            + (f"waited {point.waited / point.scattered:.0%}  " if point.scattered else "")
            + point.plan
        )
        out.append(point)
    return out


def fitted(found: list[Point]) -> tuple[float, float]:
    """The two constants: least squares of relative errors, none below zero."""
    import numpy as np
    from scipy.optimize import nnls

    seconds = np.array([p.compiled for p in found])
    counted = np.array([[p.loops, p.stacks] for p in found]) / seconds[:, None]
    loops, stacks = nnls(counted, np.ones(len(found)))[0]
    return float(loops), float(stacks)


def fitted_routed(found: list[Point], loops: float, stacks: float) -> tuple[float, float]:
    """What is left of the memory's seconds, as sorting and copies of matrices."""
    import numpy as np
    from scipy.optimize import nnls

    left = np.array([p.compiled - loops * p.loops - stacks * p.stacks for p in found])
    counted = np.array([[p.routed, p.matrices] for p in found]) / left[:, None]
    routed, copies = nnls(counted, np.ones(len(found)))[0]
    return float(routed), float(copies)


def main(options: argparse.Namespace) -> int:
    import numpy as np

    from redco_like.cli.planning import load
    from redco_like.validation.fit import COMPILED
    from redco_like.verify import CHILD, PROBLEM
    from search.compiler import compile_in_child
    from search.topology import target_of

    def check(loaded: Loaded, plan: Plan) -> Compiled:
        request = {
            "plan": dataclasses.replace(plan, reason="", estimate=None, problem={}).to_json(),
            "cluster": loaded.cluster.to_json(),
            "problem": {name: loaded.record[name] for name in PROBLEM if loaded.record.get(name) is not None},
        }
        return compile_in_child(CHILD, request, target_of(loaded.cluster))

    start = time.monotonic()
    found: dict[str, list[Point]] = {}
    routed: dict[str, list[tuple[float, float]]] = {}
    alone: dict[str, list[list[Held]]] = {}
    cases = [
        case for case in (*CASES, *EXPERTS) if not options.only or {case[0], case[2].split(":")[0]} & {*options.only}
    ]
    for number, (name, model, cluster, batch, length) in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {time.monotonic() - start:4.0f} s  {model} on {cluster}", flush=True)
        record = {
            "model": model,
            "cluster": cluster,
            "seq_len": length,
            "global_batch": batch,
            "optimizer": "adamw",
            "dtype": "bfloat16",
            "param_dtype": "float32",
            "task": "train",
        }
        loaded, tell = load(record, lambda _: None), lambda text: print(text, flush=True)
        if loaded.model.has_experts:
            mine = points(loaded, check, tell, ROUTED)
            attained = loaded.model.costs.efficiency
            pair = fitted_routed(mine, attained.loop_traffic, attained.stack_traffic)
            print(f"  routed_traffic {pair[0]:.2f}, matrix_copies {pair[1]:.1f}", flush=True)
            routed.setdefault(name, []).append(pair)
            continue
        alone.setdefault("gpu" if name == "gpu" else "tpu", []).append(held(loaded, check, tell))
        mine = points(loaded, check, tell)
        for key in {name, "gpu" if name == "gpu" else "tpu"}:
            found.setdefault(key, []).extend(mine)
    kinds, passed = {}, True
    for kind, mine in found.items():
        fits = [p for p in mine if not p.scattered]
        loops, stacks = fitted(fits)
        unhidden = sum(p.waited for p in mine) / max(sum(p.scattered for p in mine), 1e-9)
        errors = [abs((loops * p.loops + stacks * p.stacks) / p.compiled - 1) for p in fits]
        values = {"loop_traffic": loops, "stack_traffic": stacks, "unhidden": unhidden}
        used = {name: COMPILED[kind][name] for name in values if name in COMPILED[kind]}
        passed &= all(abs(values[name] - value) <= MOST_OFF * max(values[name], value) for name, value in used.items())
        kinds[kind] = {
            **{name: round(value, 3) for name, value in values.items()},
            "used": used,
            "plans": len(mine),
            "mean_error": round(float(np.mean(errors)), 3),
            "largest_error": round(max(errors), 3),
        }
        print(f"{kind}: {kinds[kind]}", flush=True)
    experts = {}
    for kind, pairs in routed.items():
        values: dict[str, float] = dict(zip(("routed_traffic", "matrix_copies"), np.mean(pairs, axis=0), strict=True))
        used = {name: COMPILED[kind][name] for name in values}
        passed &= all(abs(values[name] - value) <= MOST_OFF * max(values[name], value) for name, value in used.items())
        rounded = {name: round(float(value), 3) for name, value in values.items()}
        experts[kind] = {**rounded, "used": used, "each": pairs}
    own = {}
    for kind, groups in alone.items():
        values = fitted_held([group for group in groups if len(group) > 1])
        used = {name: COMPILED[kind][name] for name in values if name in COMPILED[kind]}
        passed &= all(abs(values[name] - value) <= MOST_OFF * max(values[name], value) for name, value in used.items())
        own[kind] = {**{name: round(value, 3) for name, value in values.items()}, "used": used}
        print(f"{kind}: {own[kind]}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "loop_traffic",
                "labels": {"loops": "analytic", "stacks": "analytic", "compiled": "compiled"},
                "machine": platform.processor() or "cpu",
                "seconds": round(time.monotonic() - start),
                "kinds": kinds,
                "experts": experts,
                "own": own,
                "rows": [
                    {"kind": kind, **dataclasses.asdict(p)}
                    for kind, mine in found.items()
                    if kind != "tpu"
                    for p in mine
                ],
                "bars": {"constants": MOST_OFF},
                "passed": passed,
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="v5e, v5p, v6e, gpu, 2x8xH100, ...")
    sys.exit(main(parser.parse_args()))
