"""Why no execution plan fits, and what would help.

advice(evaluate, {"actor": "llama-2-70b", ...})            # one sentence each
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from search.rlhf.anneal import candidates, greedy, improve
from search.rlhf.evaluate import Assignment, Evaluate
from search.rlhf.memory_timeline import memory
from search.rlhf.options import Option
from search.rlhf.problem import Problem

_SEARCHED = 2000


def advice(evaluate: Evaluate, models: Mapping[str, str]) -> str:
    """Say which role is too large, by how many bytes per device, and what would make it fit.

    The figures are those of the plan that comes nearest, as far as a short search finds it.
    """
    problem = evaluate.problem
    for call, entry in enumerate(problem.calls):
        named = f"role {entry.role!r} ({models[entry.role]}), call {entry.name!r}"
        sized = [(size, option) for size in problem.grid.sizes for option in problem.choices(call, size)]
        if not sized:
            sized = _roomier(problem, call)
        if not sized:
            sizes = ", ".join(map(str, problem.grid.sizes))
            return (
                f"nothing fits: {named} has no option on any window ({sizes} devices): no mesh of these sizes suits "
                "the model and the workload; other numbers of sequences or minibatches may"
            )
        size, option = min(sized, key=lambda entry: _needs(entry[1]))
        if _needs(option) > problem.usable:
            over = _needs(option) - problem.usable
            return (
                f"nothing fits: {named} needs {_gib(_needs(option))} per device at least (analytic), on {size} devices "
                f"with {option.plan.mesh}: parameters {_gib(option.params_bytes)}, optimizer "
                f"{_gib(option.state_bytes)}, working {_gib(option.working_bytes)}; that is {_gib(over)} more than the "
                f"{_gib(problem.usable)} usable. {_helps(problem, _needs(option), option)}"
            )
    options = candidates(problem)
    nearest = improve(
        Evaluate(problem, offload=len(evaluate.sets) > 1), [greedy(problem, options)], options, evaluations=_SEARCHED
    )
    return _together(problem, nearest, offload=len(evaluate.sets) > 1, models=models, evaluate=evaluate)


def _roomier(problem: Problem, call: int) -> list[tuple[int, Option]]:
    """Options on devices with as many times the memory as it takes, where the costs can be asked about those."""
    elsewhere = getattr(problem.costs, "on", None)
    size = problem.grid.sizes[-1]
    if elsewhere is None:
        return []
    for times in (2, 4, 8, 16, 32, 64):
        accelerator = problem.cluster.accelerator
        larger = dataclasses.replace(
            accelerator,
            memory_bytes=times * accelerator.memory_bytes,
            usable_memory_bytes=times * accelerator.usable_memory_bytes,
        )
        costs = elsewhere(dataclasses.replace(problem.cluster, accelerator=larger))
        found = [(size, option) for option in costs.options(problem.calls[call], size)]
        if found:
            return found
    return []


def _together(
    problem: Problem, nearest: Assignment, *, offload: bool, models: Mapping[str, str], evaluate: Evaluate
) -> str:
    places = dict(enumerate(nearest.places))
    used = memory(problem, places, evaluate.sets[-1] if offload else frozenset())
    fullest = max(used.groups, key=lambda group: group.peak)
    by_role: dict[str, float] = {}
    for call in range(problem.count):
        window, option = places[call]
        if problem.home[call] == call and window.overlaps(fullest.window):
            role = problem.calls[call].role
            by_role[role] = by_role.get(role, 0.0) + option.params_bytes + option.state_bytes
    parts = ", ".join(
        f"{role} ({models[role]}) {_gib(nbytes)}" for role, nbytes in sorted(by_role.items(), key=lambda e: -e[1])
    )
    largest = max(by_role, key=lambda role: by_role[role], default=problem.roles[0])
    text = (
        f"nothing fits: every role fits by itself, but together they need {_gib(used.peak)} on devices "
        f"{fullest.window} in the plan that comes nearest (analytic), {_gib(used.over)} more than the "
        f"{_gib(problem.usable)} usable; parameters and optimizer there: {parts}."
    )
    ways = []
    if not offload:
        options = candidates(problem)
        eased = Evaluate(problem, offload=True)
        if improve(eased, [nearest.places], options, evaluations=_SEARCHED).seconds < math.inf:
            ways.append("offloading of idle roles (it fits with that)")
    more = 2 ** max(1, math.ceil(math.log2(used.peak / problem.usable)))
    ways += [f"about {more} times the devices", f"devices with {_gib(used.peak)} usable", f"a smaller {largest}"]
    return f"{text} It would fit with " + ", or ".join(ways)


def _needs(option: Option) -> float:
    return option.params_bytes + option.state_bytes + option.working_bytes


def _helps(problem: Problem, needs: float, option: Option) -> str:
    kept = option.params_bytes + option.state_bytes
    more = 2 ** max(1, math.ceil(math.log2(needs / problem.usable)))
    ways = [f"about {more} times the devices", f"devices with {_gib(needs)} usable"]
    if kept < problem.usable:
        ways.append("more minibatches or shorter sequences (less working memory)")
    elif option.state_bytes:
        ways.append("an optimizer with a smaller state")
    return "It would fit with " + ", or ".join(ways)


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
