"""Assignments with what they cost: which roles have to be offloaded, in which order calls are best dispatched.

    evaluate = Evaluate(problem, offload=True)
    found = evaluate(places)                                   # inf seconds and `over` bytes where nothing makes it fit

Offloading a role only adds tasks, and removing tasks never makes a period longer where the order of dispatch is the
same. So of the sets of roles whose offloading makes an assignment fit, only those without a fitting part of their own
need be tried, and the best of them is the best of all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from search.rlhf.memory_timeline import phase_bytes, resident_bytes
from search.rlhf.problem import Place, Problem
from search.rlhf.simulator import best_order, bits_of
from search.rlhf.windows import segments


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A place for every call, and what follows.

    Attributes:
        places: by call.
        seconds: the period; inf where it does not fit.
        order: of dispatch.
        offloaded: roles.
        over: bytes too many on the fullest device, with the offloading that helps most.
    """

    places: tuple[Place, ...]
    seconds: float
    order: tuple[int, ...]
    offloaded: frozenset[int]
    over: float = 0.0


class Evaluate:
    """Counts and remembers evaluations."""

    def __init__(self, problem: Problem, *, offload: bool = True):
        self.problem, self.count = problem, 0
        roles = range(len(problem.roles))
        sizes = range(len(roles) + 1) if offload else (0,)
        self.sets = tuple(frozenset(chosen) for k in sizes for chosen in itertools.combinations(roles, k))
        self.roles = frozenset(roles)
        self._known: dict[tuple, Assignment] = {}

    def __call__(self, places: Sequence[Place], *, below: float = float("inf")) -> Assignment:
        """Evaluate an assignment.

        Args:
            below: a longer period need not be told: it may come back as inf.
        """
        key = tuple((window.first, id(option)) for window, option in places)
        known = self._known.get(key)
        if known is not None:
            return known
        self.count += 1
        problem, numbered = self.problem, dict(enumerate(places))
        covers = {cover: 0 for _, cover in segments([w for w, _ in places], problem.grid.devices)}
        fitting, over = self.fitting(numbered, covers)
        best = Assignment(tuple(places), float("inf"), problem.orders[0], frozenset(), over)
        groups = bits_of(range(problem.count), sorted(covers))
        for offloaded in fitting:
            limit = min(below, best.seconds)
            seconds, order = best_order(problem, numbered, offloaded, groups=groups, below=limit)
            if seconds < best.seconds:
                best = Assignment(tuple(places), seconds, order, offloaded)
        if below == float("inf") or best.seconds < float("inf"):
            self._known[key] = best
        return best

    def fitting(
        self,
        places: Mapping[int, Place],
        covers: Mapping[int, int],
        later: Mapping[int, float] | None = None,
    ) -> tuple[tuple[frozenset[int], ...], float]:
        """The least sets of roles whose offloading makes places fit, and the bytes over where there is none.

        Args:
            places: of some or all calls.
            covers: sets of these calls, in the order of `places`, whose windows have devices to themselves, as bits;
                and how many devices.
            later: role -> bytes over all devices that its home will need at least, where that has no place yet. Every
                device must have room for its share of them when it is fullest.
        """
        problem, numbers = self.problem, list(places)
        heres = [
            (frozenset(call for at, call in enumerate(numbers) if cover >> at & 1), devices)
            for cover, devices in covers.items()
        ]
        total = problem.usable * problem.grid.devices
        kept: list[frozenset[int]] = []
        least = float("inf")
        for offloaded in self.sets:
            if any(known <= offloaded for known in kept):
                continue
            peak, everywhere = 0.0, sum((later or {}).get(role, 0.0) for role in self.roles - offloaded)
            for here, devices in heres:
                phases = phase_bytes(problem, places, here, offloaded)
                most = resident_bytes(problem, places, here, offloaded) + max(phases.values(), default=0.0)
                peak, everywhere = max(peak, most), everywhere + devices * most
                if peak > problem.usable and kept:
                    break
            if peak <= problem.usable and everywhere <= total * (1 + 1e-12):
                kept.append(offloaded)
            least = min(least, peak)
        return tuple(kept), 0.0 if kept else max(0.0, least - problem.usable)
