"""The steady-state period of iterations: the maximum cycle ratio of their tasks. Pure Python, no device.

    tasks = [Task(2.0, devices=0b01, after=()), Task(3.0, devices=0b11, after=(0,))]
    period(tasks)                                              # 5.0: they share a device

Every iteration has the same tasks, in one order. A task waits for those it reads from (of this iteration, or of the one
before) and, on every device, for the tasks that come earlier in the order, those of earlier iterations first. In the
long run an iteration begins every `period` seconds, where the period is the largest ratio of seconds to iterations over
the cycles of waiting (Baccelli et al. 1992, Synchronization and Linearity, theorem 2.28; Karp 1978 for the algorithm).
It is no makespan: what one iteration does at its end and the next at its begin overlap as far as data, parameter
versions and devices allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_NEVER = float("-inf")


class Task(NamedTuple):
    """Something that keeps devices busy, once an iteration.

    Attributes:
        seconds: it takes.
        devices: groups of devices that it needs, as bits.
        after: tasks of the same iteration, earlier in the order, that it waits for.
        previous: tasks of the iteration before, at its own place in the order or later, that it waits for.
    """

    seconds: float
    devices: int
    after: tuple[int, ...] = ()
    previous: tuple[int, ...] = ()


def period(tasks: Sequence[Task], *, below: float = float("inf")) -> float:
    """Seconds from one iteration's begin to the next one's, in the long run.

    Args:
        below: a longer period need not be told: inf may come back for it.
    """
    reach = _longest(tasks)
    single = _back_after_one(tasks, reach)
    if single >= below:
        return float("inf")
    again = _steps(tasks, reach)
    return single if _settles(again, single) else max(single, _karp(np.array(again)))


def _longest(tasks: Sequence[Task]) -> list[list[float]]:
    """Seconds from the begin of task i to the end of task j of its iteration; -inf where j need not wait for it."""
    count = len(tasks)
    waits = []
    for j, task in enumerate(tasks):
        devices, after = task.devices, task.after
        waits.append([i for i in range(j) if tasks[i].devices & devices or i in after])
    out = []
    for i in range(count):
        row = [_NEVER] * count
        row[i] = tasks[i].seconds
        for j in range(i + 1, count):
            best = _NEVER
            for k in waits[j]:
                if row[k] > best:
                    best = row[k]
            if best > _NEVER:
                row[j] = best + tasks[j].seconds
        out.append(row)
    return out


def _back_after_one(tasks: Sequence[Task], reach: list[list[float]]) -> float:
    """The largest cycle that comes back after one iteration: most often the period, and never more than it."""
    best = 0.0
    for i, row in enumerate(reach):
        devices, previous = tasks[i].devices, tasks[i].previous
        for j in range(i, len(tasks)):
            if row[j] > best and (tasks[j].devices & devices or j in previous):
                best = row[j]
    return best


def starts(tasks: Sequence[Task], seconds: float) -> list[float]:
    """When the tasks of an iteration begin where one begins every `seconds`; the earliest at 0.

    Raises:
        ValueError: `seconds` is below the period.
    """
    begin = [0.0] * len(tasks)
    slack = 1e-9 * max(seconds, 1e-30)
    for _ in range(len(tasks) + 1):
        changed = False
        for j, task in enumerate(tasks):
            least = begin[j]
            for i, other in enumerate(tasks):
                shared = other.devices & task.devices
                if i < j and (shared or i in task.after):
                    least = max(least, begin[i] + other.seconds)
                elif i >= j and (shared or i in task.previous):
                    least = max(least, begin[i] + other.seconds - seconds)
            if least > begin[j] + slack:
                begin[j], changed = least, True
        if not changed:
            low = min(begin, default=0.0)
            return [b - low for b in begin]
    raise ValueError(f"iterations cannot begin every {seconds:.6g} s: the period is {period(tasks):.6g} s")


def _steps(tasks: Sequence[Task], reach: list[list[float]]) -> list[list[float]]:
    """From the begin of task i to that of task j in the next iteration."""
    count = len(tasks)
    ends = [
        [k for k in range(j, count) if tasks[k].devices & task.devices or k in task.previous]
        for j, task in enumerate(tasks)
    ]
    return [[max([row[k] for k in ends[j]], default=_NEVER) for j in range(count)] for row in reach]


def _settles(again: list[list[float]], seconds: float) -> bool:
    """Whether no cycle of several iterations takes more than `seconds` each."""
    n = len(again)
    begin = [0.0] * n
    slack = 1e-9 * max(seconds, 1e-30)
    for _ in range(n + 1):
        changed = False
        for i, row in enumerate(again):
            for j in range(n):
                least = begin[i] + row[j] - seconds
                if least > begin[j] + slack:
                    begin[j], changed = least, True
        if not changed:
            return True
    return False


def _karp(again_NN: np.ndarray) -> float:
    """The largest mean of a cycle (Karp 1978), from every task at once."""
    n = len(again_NN)
    walks = [np.zeros(n)]
    for _ in range(n):
        walks.append((walks[-1][:, None] + again_NN).max(axis=0))
    last = walks[n]
    best = _NEVER
    for v in range(n):
        if last[v] > _NEVER:
            best = max(best, min((last[v] - walks[k][v]) / (n - k) for k in range(n) if walks[k][v] > _NEVER))
    return float(best)
