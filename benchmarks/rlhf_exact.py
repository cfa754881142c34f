"""Is the search over execution plans exact, how far does its proof reach, and does ReaL's MCMC ever beat it?

    python benchmarks/rlhf_exact.py            about a quarter of an hour on 2 quiet cores, no extra needed
    python benchmarks/rlhf_exact.py --quick    about 3 minutes: without the 1.1e8 plans, fewer clusters

Bars:
- one node of 8 devices, PPO with 22 places per call: the search finds the period that is the least of all 22^6 =
  1.1e8 assignments in all 12 orders of dispatch (1.4e9 evaluations, none left out by a bound), with dominance and
  without; the same for GRPO with every set of offloaded roles (22^4 assignments, 2 orders, 8 sets);
- 16, 32 and 64 devices, PPO, several models and workloads: optimum proved, or a gap of at most 5 %, within 60 s;
- 128 devices, four models of 70B: a gap of at most 10 % within 60 s;
- ReaL's MCMC with ten times the search's evaluations ends with no shorter period, over seeds and temperatures;
- no heuristic (all colocated, ReaL's, the one that ReaL's program sets, HybridFlow's split, standalone) is better.

Every assignment is evaluated by arrays over all combinations of three calls at a time: bytes on every device, and the
largest cycle of waiting that comes back after one iteration. That is never more than the period, so the exact period is
worked out only where it would be the best so far. Costs are in closed form (tests/synthetic_rlhf.py): it is the search
that is tried here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
sys.path.append(str(ROOT / "tests"))

from synthetic_rlhf import SyntheticCosts  # noqa: E402

from search import parse_cluster  # noqa: E402
from search.rlhf import GRAPHS, Workload, solve  # noqa: E402
from search.rlhf.anneal import candidates, mcmc  # noqa: E402
from search.rlhf.brute import brute_force  # noqa: E402
from search.rlhf.evaluate import Evaluate  # noqa: E402
from search.rlhf.problem import Problem  # noqa: E402
from search.rlhf.solver import minimise  # noqa: E402

SAME = 1e-8
BAR_GAP, BAR_GAP_128, LIMIT_SECONDS = 0.05, 0.10, 60.0
TWENTY_TWO = {8: 8, 4: 3, 2: 2}  # Options per window size: 8 + 2 * 3 + 4 * 2 places.
SMALL, LARGE = Workload(128, 256, 256, minibatches=4), Workload(512, 1024, 1024, minibatches=4)
LONG = Workload(128, 256, 2048, minibatches=4)
CASES = [
    # cluster, billions of parameters of the actor and the reference, of the critic and the reward model; workload
    ("2x8xA100-80", 7, 7, SMALL),
    ("2x8xA100-80", 13, 7, LARGE),
    ("4x8xA100-80", 13, 7, LONG),
    ("4x8xA100-80", 34, 7, LARGE),
    ("8x8xA100-80", 7, 7, LONG),
    ("8x8xA100-80", 13, 13, SMALL),
    ("8x8xA100-80", 34, 7, LARGE),
    ("8x8xA100-80", 70, 7, LONG),
    ("16x8xA100-80", 70, 70, SMALL),
    ("16x8xA100-80", 70, 70, LARGE),
    ("16x8xA100-80", 70, 70, LONG),
]
QUICK = (0, 4, 9)
WALKED = (0, 1, 3)
"""Cases in which MCMC walks too."""
BETAS = (0.3, 3.0, 30.0)
"""Per second of a period of 10 seconds; scaled with the period."""


def costs_of(actor: float, critic: float, workload: Workload, strategies: int | dict[int, int]) -> SyntheticCosts:
    sizes = {"actor": actor * 1e9, "reference": actor * 1e9, "critic": critic * 1e9, "reward": critic * 1e9}
    return SyntheticCosts(sizes, workload, 8, strategies=strategies)


def one_node(graph: str, actor: float, critic: float, *, offload: bool) -> dict:
    """Everything on 8 devices, against the search."""
    cluster = parse_cluster("8xA100-80")
    problem = Problem(GRAPHS[graph](), SMALL, cluster, costs_of(actor, critic, SMALL, TWENTY_TWO))
    options = candidates(problem)
    start, told = time.process_time(), time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"  {count:.3g} assignments, {time.process_time() - start:.0f} s", flush=True)

    every = brute_force(problem, options, offload=offload, tell=tell)
    middle = time.process_time()
    found = minimise(Evaluate(problem, offload=offload))
    end = time.process_time()
    plain = minimise(Evaluate(problem, offload=offload), dominance=False)
    assert found.best is not None
    assert plain.best is not None
    row = {
        "graph": graph,
        "places": [len(places) for places in options],
        "assignments": every.assignments,
        "evaluations": every.evaluations,
        "brute_seconds": round(middle - start, 1),
        "brute_period": every.seconds,
        "search_period": found.best.seconds,
        "without_dominance": plain.best.seconds,
        "parts": found.parts,
        "search_seconds": round(end - middle, 2),
        "offloaded": len(found.best.offloaded),
    }
    row["ok"] = all(
        abs(x.best.seconds / every.seconds - 1) < SAME and x.finished for x in (found, plain) if x.best is not None
    )
    print(row, flush=True)
    return row


def proof(case: tuple[str, float, float, Workload], *, walk: bool) -> dict:
    """The certificate on a cluster, and MCMC with ten times the evaluations."""
    name, actor, critic, workload = case
    cluster = parse_cluster(name)
    costs = costs_of(actor, critic, workload, 99)
    found = solve(GRAPHS["ppo"](), workload, cluster, costs, time_limit=LIMIT_SECONDS)
    plan = found.execution
    assert plan is not None
    bar = BAR_GAP_128 if cluster.devices >= 128 else BAR_GAP
    row = {
        "cluster": name,
        "models": [actor, critic],
        "workload": [workload.prompts, workload.prompt_tokens, workload.new_tokens],
        "period": round(plan.period_seconds, 4),
        "gap": round(found.gap, 5),
        "finished": plan.search["finished"],
        "seconds": round(plan.search["seconds"], 1),
        "evaluations": found.evaluations,
        "heuristics": {key: round(value / plan.period_seconds, 3) for key, value in plan.heuristics.items()},
    }
    row["ok"] = found.gap <= bar and min(plan.heuristics.values()) >= plan.period_seconds * (1 - SAME)
    if walk:
        ends = []
        for seed, beta in enumerate(BETAS):
            problem = Problem(GRAPHS["ppo"](), workload, cluster, costs)
            walked = mcmc(
                Evaluate(problem),
                candidates(problem),
                evaluations=10 * found.evaluations,
                seed=seed,
                beta=beta * 10 / plan.period_seconds,
            )
            ends.append(round(walked.seconds / plan.period_seconds, 4))
        row["mcmc_over_search"] = ends
        row["ok"] = row["ok"] and min(ends) >= 1 - SAME
    print(row, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    nodes = [one_node("grpo", 3, 1, offload=True), one_node("grpo", 30, 30, offload=True)]
    if not quick:
        nodes.append(one_node("ppo", 2, 1, offload=False))
    chosen = QUICK if quick else range(len(CASES))
    proofs = [proof(CASES[i], walk=i in (WALKED[:1] if quick else WALKED)) for i in chosen]
    ok = all(row["ok"] for row in nodes + proofs)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "rlhf_exact", "ok": ok, "machine": machine, "one_node": nodes, "proofs": proofs}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
