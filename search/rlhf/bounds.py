"""Lower bounds of the period that add up over calls, so that calls without a place can have their best one.

    bounds = Bounds(problem, tables)
    bounds.terms(call, size)                                   # per bound and option: its share
    bounds.rest(depth)                                         # per bound: the least that the calls from there on add

Two calls *never run at the same time* where, of any two iterations, one waits for the other: data one way, a parameter
version the other way. Let C be calls of which no two run at the same time, and R calls that run at the same time as
none of C. Outside the time of C there are N devices for the work of R, so

    period >= sum over C of seconds + sum over R of seconds * devices / N

C of the actor's generation and training, R of the scores is PPO's critical path; C empty is the work of everything.
Every mixture of such bounds is one as well. The best mixture at the start, and a grid of others, are used: a linear
program finds it (it is the Lagrangian dual of choosing the places of calls one by one).
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from search.rlhf.problem import Problem

Floats = npt.NDArray[np.float64]
MOST_BOUNDS = 64


def never_together(problem: Problem) -> tuple[int, ...]:
    """Per call, the calls that never run at the same time, as bits.

    >>> from search.rlhf.graph import dpo                      # doctest: +SKIP
    """
    count, ancestors = problem.count, problem.ancestors
    upto = [ancestors[i] | 1 << i for i in range(count)]

    def next_iteration(a: int, b: int) -> bool:
        """Whether b of the next iteration waits for a."""
        for call in range(count):
            home = problem.home[call]
            if problem.trained[call] and upto[home] >> a & 1 and upto[b] >> call & 1:
                return True
        return False

    out = []
    for a in range(count):
        bits = 0
        for b in range(count):
            ordered = (upto[b] >> a & 1 and next_iteration(b, a)) or (upto[a] >> b & 1 and next_iteration(a, b))
            if a != b and ordered:
                bits |= 1 << b
        out.append(bits)
    return tuple(out)


def simple_bounds(problem: Problem) -> tuple[Floats, Floats]:
    """Weights of seconds and of seconds * devices / N: a row per bound, a column per call."""
    count, apart = problem.count, never_together(problem)
    found: list[tuple[int, int]] = []
    for chain in range(1 << count):
        members = [i for i in range(count) if chain >> i & 1]
        if any(not apart[a] >> b & 1 for a, b in itertools.combinations(members, 2)):
            continue
        beside = (1 << count) - 1 & ~chain
        for call in members:
            beside &= apart[call]
        found.append((chain, beside))
    # Seconds are at least seconds * devices / N: a bound with more calls in C and as many in all says no less.
    kept = [
        (chain, beside)
        for chain, beside in found
        if not any(
            (chain, beside) != (more, other) and chain & more == chain and (chain | beside) & ~(more | other) == 0
            for more, other in found
        )
    ]
    seconds_BN = np.array([[chain >> i & 1 for i in range(count)] for chain, _ in kept], float)
    work_BN = np.array([[beside >> i & 1 for i in range(count)] for _, beside in kept], float)
    return seconds_BN, work_BN


class Bounds:
    """Additive bounds, for the calls in the order in which the search places them.

    Args:
        tables: per call, an array of its options: seconds and devices, (O, 2).
        sequence: in which calls are placed.
    """

    def __init__(self, problem: Problem, tables: list[Floats], sequence: tuple[int, ...]):
        simple_seconds, simple_work = simple_bounds(problem)
        share = 1 / problem.grid.devices
        pure = [
            simple_seconds[:, call, None] * table[:, 0] + simple_work[:, call, None] * table[:, 0] * table[:, 1] * share
            for call, table in enumerate(tables)
        ]
        mixtures = [np.eye(len(simple_seconds)), _best_mixture(pure)[None, :]]
        steps = (0.25, 0.5, 0.75) if len(simple_seconds) <= 8 else (0.5,)
        for a, b in itertools.combinations(range(len(simple_seconds)), 2):
            for weight in steps:
                row = np.zeros((1, len(simple_seconds)))
                row[0, a], row[0, b] = weight, 1 - weight
                mixtures.append(row)
        mix_MB = np.concatenate(mixtures)[:MOST_BOUNDS]
        self.seconds_MN = mix_MB @ simple_seconds
        self.work_MN = mix_MB @ simple_work * share
        least = np.stack([(mix_MB @ terms).min(axis=1) for terms in pure], axis=1)
        after = [least[:, list(sequence[depth:])].sum(axis=1) for depth in range(problem.count + 1)]
        self.rest_DM = np.stack(after)

    @property
    def root(self) -> float:
        return float(self.rest_DM[0].max())

    def terms(self, call: int, seconds_O: Floats, devices: int) -> Floats:
        """What options of a call add to every bound, (M, O)."""
        return (self.seconds_MN[:, call] + self.work_MN[:, call] * devices)[:, None] * seconds_O[None, :]


def _best_mixture(pure: list[Floats]) -> Floats:
    """Weights of bounds for which their sum, with every call at its least, is largest."""
    bounds, calls = len(pure[0]), len(pure)
    rows = []
    for call, terms_BO in enumerate(pure):
        block = np.zeros((terms_BO.shape[1], bounds + calls))
        block[:, :bounds] = -terms_BO.T
        block[:, bounds + call] = 1
        rows.append(block)
    matrix = np.concatenate(rows)
    goal = np.concatenate([np.zeros(bounds), -np.ones(calls)])
    total = np.concatenate([np.ones(bounds), np.zeros(calls)])[None, :]
    limits = [(0, 1)] * bounds + [(None, None)] * calls
    found = linprog(goal, A_ub=matrix, b_ub=np.zeros(len(matrix)), A_eq=total, b_eq=[1.0], bounds=limits)
    if found.x is None:  # A bound is a bound with any weights.
        return np.full(bounds, 1 / bounds)
    weights = np.maximum(found.x[:bounds], 0)
    return weights / weights.sum()
