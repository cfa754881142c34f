"""Lower bounds of the period that add up over calls, so that calls without a place can have their best one.

    bounds = Bounds(problem, tables)
    bounds.terms(call, size)                                   # per bound and option: its share
    bounds.rest(depth)                                         # per bound: the least that the calls from there on add

Two calls *never run at the same time* where, of any two iterations, one waits for the other: data one way, a parameter
version the other way. Let C be calls of which no two run at the same time, and R calls that run at the same time as
none of C. Outside the time of C there are N devices for the work of R, so

    period >= sum over C of seconds + sum over R of seconds * devices / N

C of the actor's generation and training, R of the scores is PPO's critical path; C empty is the work of everything.
With C empty the work of moving parameters and of offloading counts as well. Where all calls of C and R lie between a
call and the training of its role, so do the seconds that bring the call its parameters.

Every mixture of such bounds is one as well. The best mixture at the start, and a grid of others, are used: a linear
program finds it (it is the Lagrangian dual of choosing the places of calls one by one).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from search.rlhf.problem import Problem

Floats = npt.NDArray[np.float64]
MOST_BOUNDS = 64


def never_together(problem: Problem) -> tuple[int, ...]:
    """Per call, the calls that never run at the same time, as bits."""
    count, ancestors = problem.count, problem.ancestors
    upto = [ancestors[i] | 1 << i for i in range(count)]

    def next_iteration(a: int, b: int) -> bool:
        """Whether b of the next iteration waits for a."""
        if problem.synchronous:
            return True
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


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of bounds: a row per bound, a column per call.

    Attributes:
        seconds_BN: of a call's seconds.
        work_BN: of its seconds * devices / N.
        brings_BN: of the seconds that bring a call its role's parameters after their training.
        extra_B: of the work (seconds * devices / N) of everything besides calls.
    """

    seconds_BN: Floats
    work_BN: Floats
    brings_BN: Floats
    extra_B: Floats

    def mixed(self, mix_MB: Floats) -> Weights:
        return Weights(mix_MB @ self.seconds_BN, mix_MB @ self.work_BN, mix_MB @ self.brings_BN, mix_MB @ self.extra_B)


def simple_bounds(problem: Problem) -> Weights:
    """The bounds of which all others are mixtures."""
    count, apart = problem.count, never_together(problem)
    every = (1 << count) - 1
    found: list[tuple[int, int]] = []
    for chain in range(1 << count):
        members = [i for i in range(count) if chain >> i & 1]
        if any(not apart[a] >> b & 1 for a, b in itertools.combinations(members, 2)):
            continue
        beside = every & ~chain
        for call in members:
            beside &= apart[call]
        found.append((chain, beside))
    # Seconds are at least seconds * devices / N: a bound with more calls in C and as many in all says no less.
    kept = [(0, every)] + [
        (chain, beside)
        for chain, beside in found
        if chain
        and not any(
            (chain, beside) != (more, other) and chain & more == chain and (chain | beside) & ~(more | other) == 0
            for more, other in found
        )
    ]

    def bits(values: list[int]) -> Floats:
        return np.array([[value >> i & 1 for i in range(count)] for value in values], float)

    brings = []
    for chain, beside in kept:
        row = 0
        for call in range(count):
            home = problem.home[call]
            if home == call or not problem.trained[call] or not (chain >> call & 1 and chain >> home & 1):
                continue
            # All the others run after this call and before its role is trained, so not while parameters are brought.
            others = (chain | beside) & ~(1 << call | 1 << home)
            after = sum(1 << i for i in range(count) if problem.ancestors[i] >> call & 1)
            if not others & ~(after & problem.ancestors[home]):
                row |= 1 << call
        brings.append(row)
    extra_B = np.array([float(not chain) for chain, _ in kept])
    return Weights(bits([c for c, _ in kept]), bits([b for _, b in kept]), bits(brings), extra_B)


class Bounds:
    """Additive bounds, for the calls in the order in which the search places them.

    Args:
        tables: per call, an array of its options: seconds and devices, (O, 2).
        sequence: in which calls are placed.
    """

    def __init__(self, problem: Problem, tables: list[Floats], sequence: tuple[int, ...]):
        simple, share = simple_bounds(problem), 1 / problem.grid.devices
        pure = [
            simple.seconds_BN[:, call, None] * table[:, 0]
            + simple.work_BN[:, call, None] * table[:, 0] * table[:, 1] * share
            for call, table in enumerate(tables)
        ]
        count = len(simple.extra_B)
        mixtures = [np.eye(count), _best_mixture(pure)[None, :]]
        steps = (0.25, 0.5, 0.75) if count <= 8 else (0.5,)
        for a, b in itertools.combinations(range(count), 2):
            for weight in steps:
                row = np.zeros((1, count))
                row[0, a], row[0, b] = weight, 1 - weight
                mixtures.append(row)
        mix_MB = np.concatenate(mixtures)[:MOST_BOUNDS]
        self.weights, self.share = simple.mixed(mix_MB), share
        least = np.stack([(mix_MB @ terms).min(axis=1) for terms in pure], axis=1)
        after = [least[:, list(sequence[depth:])].sum(axis=1) for depth in range(problem.count + 1)]
        self.rest_DM = np.stack(after)

    @property
    def root(self) -> float:
        return float(self.rest_DM[0].max())

    def terms(self, call: int, seconds_O: Floats, devices: int) -> Floats:
        """What options of a call add to every bound, (M, O)."""
        weight_M = self.weights.seconds_BN[:, call] + self.weights.work_BN[:, call] * devices * self.share
        return weight_M[:, None] * seconds_O[None, :]

    def with_moves(self, calls_M: Floats, brings: Mapping[int, float], extra: float) -> float:
        """The largest bound.

        Args:
            calls_M: what calls add.
            brings: call -> seconds that bring its parameters.
            extra: seconds * devices of everything besides calls.
        """
        total_M = calls_M + self.weights.extra_B * (extra * self.share)
        for call, seconds in brings.items():
            total_M = total_M + self.weights.brings_BN[:, call] * seconds
        return float(total_M.max())


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
