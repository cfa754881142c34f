"""Branch and bound over the places of calls: the shortest period, with a certificate.

    found = minimise(Evaluate(problem), start=assignment, deadline=time.monotonic() + 60)
    found.best, found.bound, found.finished

Calls get their places one by one, those with most GPU-seconds first; the part with the lowest bound goes on first. The
bound of a part is the largest of
- `Bounds`: what adds up over calls, those without a place at their best;
- the work of the fullest device;
- the exact period of the placed calls, over all orders of dispatch and all sets of offloaded roles that may still fit,
  with moves and offloading, while calls without a place take their least seconds and no devices.

A part is given up where its bound is not below the best that is known, or where no offloading can make it fit. Of joint
windows that are alike (`search.rlhf.windows`) one stands for all. Of the options of a call on as many devices, one is
left out where another has the same layout (or the role has no other call, so that layouts do not matter) and needs no
more of anything: since for a given order of dispatch a period never becomes longer when a task becomes shorter, and
memory does not depend on time, this loses nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping

import numpy as np

from search.rlhf.bounds import Bounds, Floats
from search.rlhf.evaluate import Assignment, Evaluate
from search.rlhf.options import Option, Window
from search.rlhf.problem import Place, Problem
from search.rlhf.simulator import best_order, bits_of
from search.rlhf.windows import Arrangements

CLOSE = 1e-9
"""A plan must be better by this share to replace another."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        best: None where nothing fits.
        bound: no assignment has a shorter period, up to rounding.
        finished: whether nothing was left to look at.
        parts: assignments and partial ones whose period was computed.
    """

    best: Assignment | None
    bound: float
    finished: bool
    parts: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """The first calls with places."""

    arrangement: Arrangements
    options: tuple[Option, ...]
    bound: float


@dataclasses.dataclass(frozen=True)
class _Table:
    """Options of a call on so many devices, as arrays."""

    options: tuple[Option, ...]
    seconds_O: Floats
    working_O: Floats  # While the call runs, parameters apart.
    params_O: Floats
    state_O: Floats


def minimise(
    evaluate: Evaluate,
    *,
    start: Assignment | None = None,
    deadline: float = math.inf,
    allowed: Mapping[int, Collection[Window]] | None = None,
    among: Mapping[int, Collection[Option]] | None = None,
    parts: float = math.inf,
    dominance: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Find the assignment with the shortest period.

    Args:
        start: to be better than.
        deadline: of `time.monotonic`.
        allowed: call -> windows that it may have; default: all.
        among: call -> options that it may have; default: all.
        parts: stop after so many.
        dominance: leave out options that cannot be in the best assignment, or only there beside another best one.
        tell: called with how far it is, every few seconds.
    """
    search = _Search(evaluate, allowed or {}, among or {}, dominance=dominance)
    if not all(search.tables):
        return Outcome(None, math.inf, True, 0)
    found = search.run(start, deadline, parts, tell)
    if not evaluate.problem.every_order:  # Then periods of parts bound those of the orders that are looked at alone.
        return dataclasses.replace(found, bound=min(found.bound, search.bounds.root), finished=False)
    return found


def undominated(problem: Problem, call: int, options: Collection[Option]) -> tuple[Option, ...]:
    """Leave out options that another is at least as good as in every respect."""
    alone = len(problem.graph.of_role(problem.calls[call].role)) == 1
    kept: list[Option] = []

    def needs(option: Option) -> tuple[float, ...]:
        place = Window(0, option.devices), option
        home = problem.host_seconds(call, place) if problem.home[call] == call else 0.0
        # What stays, what is there while the call runs, and what a copy or the home adds to it.
        stays = option.params_bytes + option.state_bytes
        return option.seconds, option.working_bytes, stays, option.params_bytes, home

    def layout(option: Option) -> object:
        return None if alone else option.tree if option.tree is not None else option.plan

    for option in sorted(options, key=needs):
        mine, lies = needs(option), layout(option)
        if not any(layout(o) == lies and all(a <= b for a, b in zip(needs(o), mine, strict=True)) for o in kept):
            kept.append(option)
    return tuple(kept)


class _Search:
    def __init__(
        self,
        evaluate: Evaluate,
        allowed: Mapping[int, Collection[Window]],
        among: Mapping[int, Collection[Option]],
        *,
        dominance: bool,
    ):
        self.evaluate, self.problem = evaluate, evaluate.problem
        problem = self.problem
        self.parts = 0
        tables: list[dict[int, _Table]] = []
        for call in range(problem.count):
            sizes = problem.grid.sizes
            if call in allowed:
                sizes = tuple(sorted({window.devices for window in allowed[call]}))
            mine = {}
            for size in sizes:
                options = [
                    o
                    for o in problem.choices(call, size)
                    if (call not in among or any(o is other for other in among[call]))
                    and o.params_bytes + o.state_bytes + o.working_bytes <= problem.usable
                ]
                kept = undominated(problem, call, options) if dominance else tuple(options)
                if kept:
                    mine[size] = _table(kept)
            tables.append(mine)
        self.tables = tables
        if not all(tables):
            return
        work = [min(float(t.seconds_O.min()) * size for size, t in mine.items()) for mine in tables]
        self.least = [min(float(t.seconds_O.min()) for t in mine.values()) for mine in tables]
        self.sequence = tuple(sorted(range(problem.count), key=lambda call: (-work[call], call)))
        flat = [
            np.array([(s, size) for size, t in mine.items() for s in t.seconds_O], float).reshape(-1, 2)
            for mine in tables
        ]
        self.bounds = Bounds(problem, flat, self.sequence)
        self.terms = [
            {size: self.bounds.terms(call, t.seconds_O, size) for size, t in mine.items()}
            for call, mine in enumerate(tables)
        ]
        self.columns = [
            {size: {id(o): i for i, o in enumerate(t.options)} for size, t in mine.items()} for mine in tables
        ]
        # Bytes over all devices that the homes of calls from a depth on need at least, by role.
        homes = {
            call: min(float((t.params_O + t.state_O).min()) * size for size, t in tables[call].items())
            for call in range(problem.count)
            if problem.home[call] == call
        }
        self.later = [
            {problem.role[call]: homes[call] for call in self.sequence[depth:] if call in homes}
            for depth in range(problem.count + 1)
        ]
        at = {call: depth for depth, call in enumerate(self.sequence)}
        related = {
            depth: tuple(
                other
                for other in range(depth)
                if problem.role[self.sequence[other]] == problem.role[call]
                and problem.home[call] in (call, self.sequence[other])
            )
            for depth, call in enumerate(self.sequence)
        }
        windows = {at[call]: windows for call, windows in allowed.items()}
        self.root = Arrangements(problem.grid, related, allowed=windows)

    def run(self, start: Assignment | None, deadline: float, parts: float, tell: Callable[[str], None]) -> Outcome:
        self.best = start if start is not None and start.seconds < math.inf else None
        ticket, told = itertools.count(), time.monotonic()
        # What waits: (bound, fewest calls left first, ticket, part with its sorted ways to go on, the next of them).
        waiting: list[tuple[float, int, int, _Part, list, int]] = []

        def push(part: _Part, ways: list, next_way: int) -> None:
            if next_way < len(ways) and ways[next_way][0] < self.limit:
                entry = max(part.bound, ways[next_way][0]), -len(part.options), next(ticket), part, ways, next_way
                heapq.heappush(waiting, entry)

        root = _Part(self.root, (), self.bounds.root)
        push(root, self.ways(root), 0)
        while waiting and waiting[0][0] < self.limit:
            now = time.monotonic()
            if now > told + 2:
                told = now
                known = "nothing that fits yet" if self.best is None else f"{self.best.seconds:.4g} s"
                tell(f"branch and bound: {known}, at least {waiting[0][0]:.4g} s, {self.parts} parts")
            if now > deadline or self.parts >= parts:
                bound = min(waiting[0][0], math.inf if self.best is None else self.best.seconds)
                return Outcome(self.best, bound, False, self.parts)
            bound, _, _, part, ways, at = heapq.heappop(waiting)
            push(part, ways, at + 1)
            _, arrangement, option = ways[at]
            child = self.look(_Part(arrangement, (*part.options, option), bound))
            if child is not None:
                push(child, self.ways(child), 0)
        return Outcome(self.best, math.inf if self.best is None else self.best.seconds, True, self.parts)

    @property
    def limit(self) -> float:
        return math.inf if self.best is None else self.best.seconds * (1 - CLOSE)

    def look(self, part: _Part) -> _Part | None:
        """A part with the exact bound of its calls; None where it ends here, as the new best or not."""
        self.parts += 1
        problem, arrangement = self.problem, part.arrangement
        numbers = self.sequence[: len(part.options)]
        pairs = zip(arrangement.windows, part.options, strict=True)
        places = dict(zip(numbers, pairs, strict=True))
        fitting, _ = self.evaluate.fitting(places, arrangement.devices, self.later[len(places)])
        groups = bits_of(numbers, arrangement.covers)
        best, best_set, order = self.limit, None, problem.orders[0]
        calls_M = self.placed(part) + self.bounds.rest_DM[len(places)]
        for offloaded in fitting:
            least = self.bounds.with_moves(calls_M, *self.moving(places, offloaded))
            if least >= best:
                continue
            seconds, found = best_order(problem, places, offloaded, groups=groups, least=self.least, below=best)
            if seconds < best:
                seconds = seconds if len(places) == problem.count else max(seconds, least)
                best, best_set, order = seconds, offloaded, found
        if best_set is None:
            return None
        if len(places) < problem.count:
            return dataclasses.replace(part, bound=max(part.bound, best))
        ordered = tuple(places[call] for call in range(problem.count))
        self.best = Assignment(ordered, best, order, best_set)
        return None

    def ways(self, part: _Part) -> list[tuple[float, Arrangements, Option]]:
        """Ways to place the next call, the lowest bound first."""
        problem, depth = self.problem, len(part.options)
        call = self.sequence[depth]
        arrangement, limit = part.arrangement, self.limit
        placed_M = self.placed(part) + self.bounds.rest_DM[depth + 1]
        covers = arrangement.covers
        load_V = np.array([self._load(part, cover) for cover in covers])
        is_home, may_leave = problem.home[call] == call, len(self.evaluate.sets) > 1
        used = [self._bytes(part, cover, may_leave=may_leave) for cover in covers]
        stays_V, peak_V = np.array([u[0] for u in used]), np.array([u[0] + u[1] for u in used])
        out: list[tuple[float, Arrangements, Option]] = []
        for size, table in self.tables[call].items():
            added = (placed_M[:, None] + self.terms[call][size]).max(axis=0)
            if not (added < limit).any():
                continue
            children = arrangement.child(size)
            if not children:
                continue
            over_AV = np.array([self._over(child, covers, depth) for child in children])
            load_A = np.where(over_AV, load_V, -math.inf).max(axis=1)
            stays_A = np.where(over_AV, stays_V, -math.inf).max(axis=1)
            peak_A = np.where(over_AV, peak_V, -math.inf).max(axis=1)
            home_O = table.params_O + table.state_O if is_home else np.zeros(len(table.options))
            runs_O = table.working_O + (home_O if is_home else 0.0)
            kept_O = np.zeros(len(table.options)) if may_leave else home_O
            fits_AO = (stays_A[:, None] + runs_O <= problem.usable) & (peak_A[:, None] + kept_O <= problem.usable)
            bound_AO = np.maximum(added[None, :], load_A[:, None] + table.seconds_O[None, :])
            for a, o in np.argwhere(fits_AO & (bound_AO < limit)):
                out.append((float(bound_AO[a, o]), children[a], table.options[o]))
        out.sort(key=lambda way: way[0])
        return out

    def placed(self, part: _Part) -> Floats:
        """What the calls of a part add to every bound."""
        out_M = np.zeros(self.bounds.rest_DM.shape[1])
        for at, (size, option) in enumerate(zip(part.arrangement.sizes, part.options, strict=True)):
            call = self.sequence[at]
            out_M += self.terms[call][size][:, self.columns[call][size][id(option)]]
        return out_M

    def moving(self, places: Mapping[int, Place], offloaded: frozenset[int]) -> tuple[dict[int, float], float]:
        """Seconds that bring each call its parameters, and the work of all moving: seconds * devices, at least."""
        problem, brings, work = self.problem, {}, 0.0
        for call, place in places.items():
            home, away = problem.home[call], problem.role[call] in offloaded
            if home not in places:
                continue
            its = places[home]
            seconds = problem.host_seconds(call, its) if away else 0.0
            work += seconds * its[0].devices
            if home == call:
                if problem.calls[call].kind == "train":
                    work += seconds * its[0].devices
                continue
            move = problem.move(call, place, its)
            common = max(0, min(its[0].end, place[0].end) - max(its[0].first, place[0].first))
            work += move.seconds * (its[0].devices + place[0].devices - common)
            back = problem.host_seconds(home, its) if away and problem.trained[call] else 0.0
            brings[call] = seconds + move.seconds + back
        return brings, work

    def _load(self, part: _Part, cover: int) -> float:
        """Seconds for which calls that are placed keep a device of a cover busy."""
        return sum(option.seconds for at, option in enumerate(part.options) if cover >> at & 1)

    def _bytes(self, part: _Part, cover: int, *, may_leave: bool) -> tuple[float, float]:
        """Bytes that stay on a device of a cover, and that come besides, at least."""
        problem, stays, comes = self.problem, 0.0, 0.0
        for at, option in enumerate(part.options):
            if not cover >> at & 1:
                continue
            call = self.sequence[at]
            home = problem.home[call] == call
            mine = option.params_bytes + option.state_bytes if home else 0.0
            stays += 0.0 if may_leave else mine
            comes = max(comes, option.working_bytes + (mine if may_leave else 0.0))
        return stays, comes

    def _over(self, child: Arrangements, covers: tuple[int, ...], depth: int) -> list[bool]:
        """Whether the new window lies over devices of each cover of the calls before."""
        mine = set(child.covers)
        return [cover | 1 << depth in mine for cover in covers]


def _table(options: tuple[Option, ...]) -> _Table:
    def array(values) -> Floats:
        return np.array(list(values), float)

    return _Table(
        options,
        array(o.seconds for o in options),
        array(o.working_bytes for o in options),
        array(o.params_bytes for o in options),
        array(o.state_bytes for o in options),
    )
