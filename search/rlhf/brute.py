"""Every assignment, one by one: what the exact search is checked against. No bound, no symmetry, no dominance.

    found = brute_force(problem, candidates(problem), offload=True)
    found.seconds, found.assignments

All combinations of candidates, all orders of dispatch and all sets of offloaded roles are evaluated, many at a time.
It shares the statement of the problem with the solver (`Problem`), and not how memory and waiting are worked out:
memory is added up on every device, and cycles that come back after one iteration are taken from arrays. Cycles over
several iterations can only make a period longer, so `search.rlhf.period` is asked for them only where a period would be
the best so far.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from search.rlhf.anneal import Candidates
from search.rlhf.period import period
from search.rlhf.problem import Place, Problem
from search.rlhf.simulator import steps_of

Values = npt.NDArray[np.float64]
_NEVER = -math.inf
AXES = 3
"""Calls whose candidates are combined in one array."""


@dataclasses.dataclass(frozen=True)
class Brute:
    """The best of everything.

    Attributes:
        seconds: its period; inf where nothing fits.
        places: by call.
        order, offloaded: of it.
        assignments: that were looked at, and `evaluations` with their orders and sets of offloaded roles.
    """

    seconds: float
    places: tuple[Place, ...]
    order: tuple[int, ...]
    offloaded: frozenset[int]
    assignments: int
    evaluations: int


@dataclasses.dataclass(frozen=True)
class _Task:
    """Seconds and windows (of calls) of a task, over all combinations at once.

    Attributes:
        there: 0 where there is such a task, -inf where there is none; None: everywhere.
    """

    seconds: Values
    windows: tuple[int, ...]
    there: Values | None
    after: tuple[int, ...]
    previous: tuple[int, ...]


def brute_force(
    problem: Problem,
    candidates: Candidates,
    *,
    offload: bool = True,
    tell: Callable[[int], None] = lambda count: None,
) -> Brute:
    """Evaluate everything.

    Args:
        candidates: places per call.
        tell: called with the number of assignments so far.
    """
    if not all(candidates):
        return Brute(math.inf, (), problem.orders[0], frozenset(), 0, 0)
    tables = _Tables(problem, candidates)
    fixed = max(0, problem.count - AXES)
    roles = range(len(problem.roles))
    sets = [frozenset(s) for k in roles for s in itertools.combinations(roles, k)] + [frozenset(roles)]
    best = Brute(math.inf, (), problem.orders[0], frozenset(), 0, 0)
    assignments = evaluations = 0
    axes = [
        np.arange(len(candidates[call])).reshape([-1 if a == at else 1 for a in range(problem.count - fixed)])
        for at, call in enumerate(range(fixed, problem.count))
    ]
    shape = tuple(len(candidates[call]) for call in range(fixed, problem.count))
    for first in itertools.product(*(range(len(candidates[call])) for call in range(fixed))):
        index = (*(np.array(i) for i in first), *axes)
        tables.at(index)
        assignments += math.prod(shape)
        for offloaded in sets if offload else sets[:1]:
            misfit = np.broadcast_to(np.where(tables.fits(offloaded), 0.0, math.inf), shape)
            if misfit.all():
                continue
            for order in problem.orders:
                evaluations += math.prod(shape)
                seconds = np.broadcast_to(tables.cycles(order, offloaded), shape) + misfit
                while True:
                    at = int(np.argmin(seconds))
                    if not seconds.flat[at] < best.seconds * (1 - 1e-12):
                        break
                    seconds = seconds.copy()
                    chosen = (*first, *(int(i) for i in np.unravel_index(at, shape)))
                    places = tuple(candidates[call][i] for call, i in enumerate(chosen))
                    steps = steps_of(problem, dict(enumerate(places)), order, offloaded)
                    exact = period([step.task for step in steps])
                    seconds.flat[at] = math.inf
                    if exact < best.seconds:
                        best = Brute(exact, places, order, offloaded, 0, 0)
        tell(assignments)
    return dataclasses.replace(best, assignments=assignments, evaluations=evaluations)


class _Tables:
    """What candidates need, and which of them share devices, as arrays to be indexed by them."""

    def __init__(self, problem: Problem, candidates: Candidates):
        self.problem, self.candidates = problem, candidates
        count = range(problem.count)

        def column(call: int, value: Callable[[Place], float]) -> Values:
            return np.array([value(place) for place in candidates[call]], float)

        self.seconds = [column(c, lambda p: p[1].seconds) for c in count]
        self.params = [column(c, lambda p: p[1].params_bytes) for c in count]
        self.working = [column(c, lambda p: p[1].working_bytes) for c in count]
        self.state = [column(c, lambda p: p[1].state_bytes) for c in count]
        # Bytes and seconds of bringing a role's home for a call, by the home's place.
        self.host_bytes = [column(problem.home[c], lambda p, c=c: problem.host_bytes(c, p)) for c in count]
        self.host_seconds = [column(problem.home[c], lambda p, c=c: problem.host_seconds(c, p)) for c in count]
        self.on = [
            np.array([[w.first <= d < w.end for w, _ in candidates[c]] for d in range(problem.grid.devices)], float)
            for c in count
        ]
        self.shared = [[np.where(self.on[a].T @ self.on[b] > 0, 0.0, _NEVER) for b in count] for a in count]
        self.moves = []
        for call in count:
            pairs = [[problem.move(call, p, h) for h in candidates[problem.home[call]]] for p in candidates[call]]
            seconds = np.array([[m.seconds for m in row] for row in pairs])
            there = np.array([[0.0 if m.copies else _NEVER for m in row] for row in pairs])
            self.moves.append((seconds, there))

    def at(self, index: tuple[np.ndarray, ...]) -> None:
        """Take these candidates: arrays that broadcast against each other, one per call."""
        self.index = index
        self._links: dict[tuple[int, int], Values] = {}
        pick = self.problem.home
        self.mine = [
            (self.seconds[c][i], self.params[c][i], self.working[c][i], self.state[c][i]) for c, i in enumerate(index)
        ]
        self.moved = [
            (seconds[i, index[pick[c]]], there[i, index[pick[c]]])
            for c, (i, (seconds, there)) in enumerate(zip(index, self.moves, strict=True))
        ]

    def fits(self, offloaded: frozenset[int]) -> np.ndarray:
        """Whether every device has the memory."""
        problem, index, out = self.problem, self.index, np.array(True)
        for device in range(problem.grid.devices):
            on = [self.on[c][device][i] for c, i in enumerate(index)]
            resident, most = np.array(0.0), np.array(0.0)
            for c in range(problem.count):
                home = problem.home[c]
                away = problem.role[c] in offloaded
                _, params, working, state = self.mine[c]
                copies = np.where(self.moved[c][1] == 0, 1.0, 0.0)
                loaded = self.host_bytes[c][index[home]] * on[home] if away else np.array(0.0)
                if home == c and not away:
                    resident = resident + (params + state) * on[c]
                most = np.maximum(most, loaded)
                most = np.maximum(most, copies * (loaded + params * on[c]))
                most = np.maximum(most, on[c] * (working + np.where(copies > 0, params, loaded)))
            out = out & (resident + most <= problem.usable)
        return out

    def cycles(self, order: tuple[int, ...], offloaded: frozenset[int]) -> Values:
        """The largest cycle that comes back after one iteration."""
        tasks = self._tasks(order, offloaded)
        best = np.array(0.0)
        links = {(i, j): self._link(tasks[i], tasks[j]) for j in range(len(tasks)) for i in range(j + 1)}
        for i, first in enumerate(tasks):
            reach: list[Values | None] = [None] * len(tasks)
            reach[i] = first.seconds
            for j in range(i, len(tasks)):
                if j > i:
                    into: Values | None = None
                    for k in range(i, j):
                        if (before := reach[k]) is None:
                            continue
                        link = np.array(0.0) if k in tasks[j].after else links[k, j]
                        way = before if link is None else before + link
                        into = way if into is None else np.maximum(into, way)
                    if into is None:
                        continue
                    reach[j] = into + tasks[j].seconds
                here = reach[j]
                if here is None:
                    continue
                closes = here if j in first.previous else here + links[i, j]
                best = np.maximum(best, closes)
        return best

    def _link(self, a: _Task, b: _Task) -> Values:
        """0 where two tasks share a device, -inf where not."""
        out: Values = np.array(_NEVER)
        for i in a.windows:
            for j in b.windows:
                if (i, j) not in self._links:
                    self._links[i, j] = self.shared[i][j][self.index[i], self.index[j]]
                out = np.maximum(out, self._links[i, j])
        for there in (a.there, b.there):
            if there is not None:
                out = np.minimum(out, there)
        return out

    def _tasks(self, order: tuple[int, ...], offloaded: frozenset[int]) -> list[_Task]:
        problem, tasks = self.problem, []
        runs: dict[int, int] = {}
        loads: list[int] = []
        for c in order:
            home, away, ready = problem.home[c], problem.role[c] in offloaded, ()
            if away:
                tasks.append([self.host_seconds[c][self.index[home]], (home,), None, (), c])
                loads.append(len(tasks) - 1)
                ready = (len(tasks) - 1,)
            if home != c:
                seconds, there = self.moved[c]
                tasks.append([np.where(there == 0, seconds, 0.0), tuple({c, home}), there, ready, c])
                ready = (len(tasks) - 1,)
            runs[c] = len(tasks)
            tasks.append([self.mine[c][0], (c,), None, (*ready, *(runs[o] for o in problem.before[c])), c])
            if away and problem.calls[c].kind == "train":
                tasks.append([self.host_seconds[c][self.index[c]], (c,), None, (runs[c],), None])
        out = []
        for at, (seconds, windows, there, after, call) in enumerate(tasks):
            previous: tuple[int, ...] = ()
            if call is not None and problem.trained[call]:
                last = runs[problem.home[call]]
                previous = (last + 1,) if at in loads else (last,)
            out.append(_Task(np.asarray(seconds, float), windows, there, after, previous))
        return out
