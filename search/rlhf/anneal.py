"""Good assignments quickly: descent and annealing for the solver's start, and ReaL's MCMC to compare with.

    found = improve(Evaluate(problem), starts, evaluations=4000, seed=0)
    found = mcmc(Evaluate(problem), evaluations=100_000, seed=0)

Every number of steps is a number of evaluations, not of seconds, so that the same input gives the same result.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Mapping, Sequence

from search.rlhf.evaluate import Assignment, Evaluate
from search.rlhf.options import Window
from search.rlhf.problem import Place, Problem

Candidates = Sequence[Sequence[Place]]


def candidates(problem: Problem, allowed: Mapping[int, Collection[Window]] | None = None) -> Candidates:
    """Per call, every window with every option that fits there by itself.

    Args:
        allowed: call -> its windows; default: all.
    """
    out = []
    for call in range(problem.count):
        windows = (allowed or {}).get(call, problem.grid.windows)
        out.append(
            tuple(
                (window, option)
                for window in windows
                for option in problem.choices(call, window.devices)
                if option.params_bytes + option.state_bytes + option.working_bytes <= problem.usable
            )
        )
    return out


def cost(problem: Problem, found: Assignment) -> float:
    """Seconds; what does not fit is worse than everything that does, the more so the more is missing."""
    return found.seconds if found.seconds < math.inf else 1e9 * (1 + found.over / problem.usable)


def greedy(problem: Problem, options: Candidates) -> tuple[Place, ...]:
    """For every call the place where it is fastest by itself, which is ReaL's start."""
    return tuple(min(places, key=lambda place: place[1].seconds) for places in options)


def improve(
    evaluate: Evaluate,
    starts: Sequence[Sequence[Place]],
    options: Candidates,
    *,
    evaluations: int,
    seed: int = 0,
    deadline: float = math.inf,
) -> Assignment:
    """Anneal from the best start, then change one or two calls at a time until nothing is better.

    Args:
        evaluations: of annealing, and twice as many of what follows.
        deadline: of `time.monotonic`; it comes first only where evaluations take unusually long.
    """
    problem, draw = evaluate.problem, random.Random(seed)
    best = min((evaluate(start) for start in starts), key=lambda found: cost(problem, found))
    here = best
    hot, cold = 0.05, 0.001  # Shares of the period by which a step that is accepted may be worse.
    for step in range(evaluations):
        if not step % 64 and time.monotonic() > deadline:
            break
        places = list(here.places)
        call = draw.randrange(problem.count)
        places[call] = _another(draw, options[call], places, call)
        if draw.random() < 0.3:
            other = draw.randrange(problem.count)
            places[other] = _another(draw, options[other], places, other)
        there = evaluate(places)
        heat = hot * (cold / hot) ** (step / evaluations)
        rise = cost(problem, there) / cost(problem, here) - 1 if cost(problem, here) else 0.0
        if rise <= 0 or draw.random() < math.exp(-rise / heat):
            here = there
        if cost(problem, here) < cost(problem, best):
            best = here
    return descend(evaluate, best, options, evaluations=2 * evaluations, deadline=deadline)


def descend(
    evaluate: Evaluate,
    start: Assignment,
    options: Candidates,
    *,
    evaluations: float = math.inf,
    deadline: float = math.inf,
) -> Assignment:
    """Change one call at a time to the best place for it, until nothing is better."""
    problem, best = evaluate.problem, start
    last = evaluate.count + evaluations
    changed = True
    while changed:
        changed = False
        for call in range(problem.count):
            for place in options[call]:
                if evaluate.count >= last or time.monotonic() > deadline:
                    return best
                places = (*best.places[:call], place, *best.places[call + 1 :])
                found = evaluate(places, below=best.seconds)
                if cost(problem, found) < cost(problem, best) * (1 - 1e-9):
                    best, changed = found, True
    return best


def mcmc(
    evaluate: Evaluate,
    options: Candidates,
    *,
    evaluations: int,
    seed: int = 0,
    beta: float = 1.0,
    deadline: float = math.inf,
) -> Assignment:
    """ReaL's search (Mei et al. 2024, arXiv 2406.14088): Metropolis-Hastings over execution plans.

    It starts from the fastest place of every call by itself. A proposal gives one call, drawn evenly, another place,
    drawn evenly; it is accepted with probability min(1, exp(-beta (cost' - cost))), costs in seconds. The best seen is
    returned. What ReaL's program does with its beta accepts nearly everything (it divides whole numbers); `beta` is
    free here. What does not fit costs more than everything that does.
    """
    problem, draw = evaluate.problem, random.Random(seed)
    here = best = evaluate(greedy(problem, options))
    for step in range(evaluations):
        if not step % 64 and time.monotonic() > deadline:
            break
        call = draw.randrange(problem.count)
        places = list(here.places)
        places[call] = draw.choice(options[call])
        there = evaluate(places)
        rise = cost(problem, there) - cost(problem, here)
        if rise <= 0 or draw.random() < math.exp(-min(beta * rise, 700.0)):
            here = there
        if cost(problem, here) < cost(problem, best):
            best = here
    return best


def _another(draw: random.Random, options: Sequence[Place], places: Sequence[Place], call: int) -> Place:
    """A place for a call: any, or one on another call's window (few plans are good that share no windows)."""
    if draw.random() < 0.5:
        window = places[draw.randrange(len(places))][0]
        same = [place for place in options if place[0] == window]
        if same:
            return draw.choice(same)
    return draw.choice(options)
