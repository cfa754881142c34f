"""Bytes on every device over an iteration: what lies there always, and what comes and goes with calls.

    found = memory(problem, places, offloaded=frozenset())
    found.peak, found.over                                     # of the fullest device; bytes too many there
    found.levels(spans, period)                                # seconds and bytes, per group of devices

A device holds, all the time, the parameters and optimizer state of the roles whose home is there and that are not
offloaded. While a call runs there come its activations or cache, its copy of the parameters where its layout is not the
home's, and the home of an offloaded role. A copy is made right before its call, so that no other call runs on these
devices meanwhile: what a device needs at most depends on where calls lie, and not on when they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from search.rlhf.options import Window
from search.rlhf.problem import Place, Problem
from search.rlhf.windows import segments

Phase = Literal["onload", "reallocate", "call", "offload"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that are alike.

    Attributes:
        window: they are.
        resident: bytes per device that stay.
        phases: (call, phase) -> bytes per device that are there besides, while it lasts.
    """

    window: Window
    resident: float
    phases: Mapping[tuple[int, Phase], float]

    @property
    def peak(self) -> float:
        return self.resident + max(self.phases.values(), default=0.0)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        groups: of devices that are alike.
        usable: bytes.
    """

    groups: tuple[Group, ...]
    usable: float

    @property
    def peak(self) -> float:
        return max((group.peak for group in self.groups), default=0.0)

    @property
    def over(self) -> float:
        """Bytes too many on the fullest device; 0 where everything fits."""
        return max(0.0, self.peak - self.usable)

    @property
    def fits(self) -> bool:
        return self.over == 0

    def levels(
        self, spans: Mapping[tuple[int, Phase], tuple[float, float]], period: float
    ) -> tuple[tuple[Window, tuple[tuple[float, float], ...]], ...]:
        """Bytes per device from each time of a steady iteration on, per group of devices.

        Args:
            spans: (call, phase) -> seconds from and to of its task, which may reach beyond the period.
        """
        return tuple((group.window, _levels(group, spans, period)) for group in self.groups)


def memory(problem: Problem, places: Mapping[int, Place], offloaded: frozenset[int] = frozenset()) -> Memory:
    """Bytes on every device.

    Args:
        places: call -> where and how; some calls may be missing, then this is what the others need at least.
        offloaded: roles that lie in the host's memory between their calls.
    """
    numbers = sorted(places)
    groups = []
    for window, cover in segments([places[i][0] for i in numbers], problem.grid.devices):
        here = frozenset(i for at, i in enumerate(numbers) if cover >> at & 1)
        resident = resident_bytes(problem, places, here, offloaded)
        groups.append(Group(window, resident, phase_bytes(problem, places, here, offloaded)))
    return Memory(tuple(groups), problem.usable)


def resident_bytes(
    problem: Problem, places: Mapping[int, Place], here: Iterable[int], offloaded: frozenset[int]
) -> float:
    """Bytes per device that stay where the windows of these calls lie."""
    return sum(
        places[call][1].params_bytes + places[call][1].state_bytes
        for call in here
        if problem.home[call] == call and problem.role[call] not in offloaded
    )


def phase_bytes(
    problem: Problem, places: Mapping[int, Place], here: frozenset[int], offloaded: frozenset[int]
) -> dict[tuple[int, Phase], float]:
    """Bytes per device that come and go where the windows of these calls lie, and of no others."""
    out: dict[tuple[int, Phase], float] = {}
    for call, place in places.items():
        home, option = problem.home[call], place[1]
        if home not in places:
            if call in here:  # The parameters are here, as a copy or at home.
                out[call, "call"] = option.params_bytes + option.working_bytes
            continue
        at_home = home in here
        if not (call in here or at_home):
            continue
        out_of = problem.role[call] in offloaded
        copies = problem.move(call, place, places[home]).copies
        loaded = problem.host_bytes(call, places[home]) if out_of and at_home else 0.0
        if loaded:
            out[call, "onload"] = loaded
        if copies and (call in here or loaded):
            out[call, "reallocate"] = loaded + (option.params_bytes if call in here else 0.0)
        if call in here:
            out[call, "call"] = option.working_bytes + (option.params_bytes if copies else loaded)
            if loaded and problem.calls[call].kind == "train":
                out[call, "offload"] = loaded
    return out


def _levels(
    group: Group, spans: Mapping[tuple[int, Phase], tuple[float, float]], period: float
) -> tuple[tuple[float, float], ...]:
    active: list[tuple[float, float, float]] = []
    for (call, phase), nbytes in group.phases.items():
        start, end = spans[call, phase]
        # What is brought stays until it is used; devices that only send have done with it.
        if phase == "onload":
            end = next(spans[call, then][0] for then in ("reallocate", "call") if (call, then) in spans)
        elif phase == "reallocate" and (call, "call") in group.phases:
            end = spans[call, "call"][0]
        if nbytes:
            active.append((start, end, nbytes))
    times = {0.0, *(time % period for start, end, _ in active for time in (start, end))} if period else {0.0}
    out: list[tuple[float, float]] = []
    for time in sorted(times):
        on = [nbytes for start, end, nbytes in active if _is_on(time, start, end, period)]
        level = group.resident + sum(on)
        if not out or out[-1][1] != level:
            out.append((time, level))
    return tuple(out)


def _is_on(time: float, start: float, end: float, period: float) -> bool:
    """Whether something that lasts from start to end in every iteration is there at a time of a steady one."""
    slack = 1e-9 * period  # Ends and begins that are the same come from sums in another order.
    if end - start >= period - slack:
        return end > start
    length, since = end - start, (time - start) % period
    if period - since <= slack:  # It begins now.
        since = 0.0
    return since < length - slack
