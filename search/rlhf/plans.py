"""Search an execution plan, with a certificate, beside what heuristics give.

    found = solve(graph, workload, cluster, costs, models={"actor": "llama-2-7b", ...})
    found.execution.save("rlhf.json")
    found.bound, found.gap, found.advice

The space: every call has a window (`search.rlhf.windows`) and one of the options that the costs give for it; every
role may be offloaded between its calls; the calls of an iteration are dispatched in any order that respects what they
wait for, the same in every iteration, and on a device the calls of an iteration come after all of the one before. What
brings parameters to a call is dispatched right before it. Over this space the period is the exact optimum where
`gap` is 0.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from search.cluster import Cluster
from search.rlhf.advice import advice
from search.rlhf.anneal import candidates, greedy, improve
from search.rlhf.evaluate import Assignment, Evaluate
from search.rlhf.execution import CallPlan, ExecutionPlan
from search.rlhf.graph import Graph, Workload
from search.rlhf.heuristics import placements
from search.rlhf.options import Costs
from search.rlhf.problem import Problem
from search.rlhf.simulator import simulate_numbered
from search.rlhf.solver import minimise

ANNEALED = 3000
"""Evaluations of annealing before the exact search."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search gave.

    Attributes:
        execution: the plan; None where nothing fits.
        bound: seconds; no plan of the space has a shorter period. inf where nothing fits.
        gap: how far the period may be above the best, as a share of it; 0: it is the best.
        evaluations: plans, and parts of plans, whose period was computed.
        advice: why nothing fits and what would help; empty where something does.
        others: name -> the plan of a heuristic.
    """

    execution: ExecutionPlan | None
    bound: float
    gap: float
    evaluations: int
    advice: str
    others: Mapping[str, ExecutionPlan] = dataclasses.field(default_factory=dict)


def solve(
    graph: Graph,
    workload: Workload,
    cluster: Cluster,
    costs: Costs,
    *,
    models: Mapping[str, str] | None = None,
    time_limit: float = 60.0,
    offload: bool = True,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
    sizes: Collection[int] | None = None,
    usable_bytes: float | None = None,
    synchronous: bool = False,
) -> Found:
    """Find the execution plan with the shortest period.

    Args:
        models: role -> name, for the plan; default: the roles' own names.
        time_limit: seconds of searching (costs take what they take before). Where it hits, or half of it while
            annealing, the plan may differ from machine to machine; else the same input gives the same plan.
        offload: whether roles may lie in the host's memory between their calls.
        seed: of annealing.
        tell: called with what is going on.
        sizes: of windows, in devices; default: all.
        usable_bytes: of a device; default: the share of its memory that plans count on.
        synchronous: an iteration begins when all calls of the one before have ended, as in systems whose controller
            waits for them (ReaL, HybridFlow); `pipelines.rlhf` does not wait.

    Raises:
        ValueError: a time limit that is none, a role without a model, a size that no window has, options that
            contradict themselves.
    """
    if not time_limit > 0:
        raise ValueError(f"time_limit={time_limit!r}; a number of seconds above 0")
    tell = tell or (lambda text: None)
    models = _models(graph, models)
    problem = Problem(graph, workload, cluster, costs, usable_bytes=usable_bytes, sizes=sizes, synchronous=synchronous)
    evaluate = Evaluate(problem, offload=offload)
    tell("costs of calls on windows")
    options = candidates(problem)  # Asks for the costs of every call on every size.
    begin = time.monotonic()
    if not all(options):
        return Found(None, math.inf, 0.0, 0, advice(evaluate, models))
    tell("plans that people use")
    known = placements(evaluate, deadline=begin + time_limit / 3)
    tell("annealing")
    starts = [found.places for found in known.values()] + [greedy(problem, options)]
    start = improve(evaluate, starts, options, evaluations=ANNEALED, seed=seed, deadline=begin + time_limit / 2)
    tell(f"branch and bound, from {start.seconds:.4g} s" if start.seconds < math.inf else "branch and bound")
    outcome = minimise(evaluate, start=start, deadline=begin + time_limit, tell=tell)
    seconds = time.monotonic() - begin
    count = evaluate.count + outcome.parts
    if outcome.best is None:
        text = advice(evaluate, models) if outcome.finished else _unfinished(time_limit)
        return Found(None, outcome.bound, 0.0, count, text)
    record = {
        "finished": outcome.finished,
        "seconds": seconds,
        "evaluations": count,
        "start_seconds": start.seconds,
        "every_order": problem.every_order,
        "offload": offload,
    }
    periods = {name: found.seconds for name, found in known.items()}
    best, bound = outcome.best, min(outcome.bound, outcome.best.seconds)
    gap = 1 - bound / best.seconds if best.seconds else 0.0
    execution = execution_plan(problem, best, models, bound=bound, heuristics=periods, search=record)
    execution = dataclasses.replace(execution, reason=_reason(problem, execution, outcome.finished, time_limit))
    others = {name: execution_plan(problem, found, models, bound=bound) for name, found in known.items()}
    return Found(execution, bound, gap, count, "", others)


def heuristics(
    graph: Graph,
    workload: Workload,
    cluster: Cluster,
    costs: Costs,
    *,
    models: Mapping[str, str] | None = None,
    offload: bool = True,
    sizes: Collection[int] | None = None,
    usable_bytes: float | None = None,
    synchronous: bool = False,
) -> dict[str, ExecutionPlan]:
    """Plans that people use (`search.rlhf.heuristics`): name -> the plan.

    A plan that does not fit is told by its memory; one that cannot be here is left out.
    """
    models = _models(graph, models)
    problem = Problem(graph, workload, cluster, costs, usable_bytes=usable_bytes, sizes=sizes, synchronous=synchronous)
    found = placements(Evaluate(problem, offload=offload))
    return {name: execution_plan(problem, assignment, models) for name, assignment in found.items()}


def execution_plan(
    problem: Problem,
    found: Assignment,
    models: Mapping[str, str],
    *,
    bound: float = 0.0,
    heuristics: Mapping[str, float] | None = None,
    search: Mapping[str, Any] | None = None,
) -> ExecutionPlan:
    """Write an assignment as an execution plan, with its timeline, moves and memory."""
    places = dict(enumerate(found.places))
    simulated = simulate_numbered(problem, places, found.order, found.offloaded)
    calls = []
    for call in found.order:
        window, option = found.places[call]
        calls.append(
            CallPlan(
                problem.calls[call].name,
                window,
                option.plan,
                prefill=option.prefill,
                rows=option.rows,
                seconds=option.seconds,
                params_bytes=option.params_bytes,
                working_bytes=option.working_bytes,
                state_bytes=option.state_bytes,
            )
        )
    reason = "" if simulated.fits else f"does not fit: {_gib(simulated.usage.over)} too much on the fullest device"
    return ExecutionPlan(
        problem.graph,
        problem.workload,
        dict(models),
        problem.cluster.name,
        problem.grid.devices,
        tuple(calls),
        moves=simulated.moves,
        offloaded=tuple(problem.roles[role] for role in sorted(found.offloaded)),
        period_seconds=simulated.period,
        bound_seconds=bound,
        timeline=simulated.timeline,
        memory=simulated.memory,
        usable_bytes=problem.usable,
        heuristics=dict(heuristics or {}),
        search=dict(search or {}),
        reason=reason,
    )


def _models(graph: Graph, models: Mapping[str, str] | None) -> dict[str, str]:
    if models is None:
        return {role: role for role in graph.roles}
    for role in graph.roles:
        if role not in models:
            raise ValueError(f"role {role!r} has no model; there are models for {', '.join(models) or 'none'}")
    return {role: models[role] for role in graph.roles}


def _unfinished(time_limit: float) -> str:
    return (
        f"nothing that fits was found within {time_limit:.4g} s, and not everything was looked at: a longer time limit "
        "may help"
    )


def _reason(problem: Problem, execution: ExecutionPlan, finished: bool, time_limit: float) -> str:
    if finished:
        proof = "no plan of the space is faster"
    elif not problem.every_order:
        proof = f"of {len(problem.orders)} orders of dispatch, at most {execution.gap:.1%} above the best"
    else:
        proof = f"stopped after {time_limit:.4g} s: at most {execution.gap:.1%} above the best"
    known = {name: seconds for name, seconds in execution.heuristics.items() if seconds < math.inf}
    if not known:
        return f"{execution.period_seconds:.4g} s per iteration (analytic); {proof}"
    name = min(known, key=lambda key: (known[key], key))
    gain = known[name] / execution.period_seconds
    return f"{execution.period_seconds:.4g} s per iteration (analytic), {gain:.2f} times as fast as {name}; {proof}"


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
