"""What an assignment of windows and options costs: the one objective of the search, of MCMC and of the heuristics.

    simulated = simulate(graph, {"generate": (Window(0, 8), option), ...}, order, costs, cluster=cluster)
    simulated.period, simulated.fits, simulated.timeline, simulated.moves

In the order of dispatch, every call is preceded by what brings its parameters: *onload* where its role is offloaded
(its home comes from the host; the home's devices are busy), then *reallocate* where its layout is not the home's (the
devices of both are busy), then the call; after training an offloaded role goes back to the host. What brings parameters
waits for the training of the iteration before and for its devices, not for the call's data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from search.cluster import Cluster
from search.rlhf.execution import Busy, Move
from search.rlhf.graph import Graph, Workload
from search.rlhf.memory_timeline import Memory, Phase, memory
from search.rlhf.options import Costs, Window
from search.rlhf.period import Task, period, starts
from search.rlhf.problem import Place, Problem
from search.rlhf.windows import segments


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What an assignment costs.

    Attributes:
        period: seconds.
        timeline: of a steady iteration.
        moves: of parameters, each iteration.
        memory: per group of devices that are alike, as `ExecutionPlan.memory`.
        usage: what the memory is made of.
        fits: whether it is within what is usable.
    """

    period: float
    timeline: tuple[Busy, ...]
    moves: tuple[Move, ...]
    memory: tuple[tuple[Window, tuple[tuple[float, float], ...]], ...]
    usage: Memory
    fits: bool


class Step(NamedTuple):
    """A task with what it is."""

    call: int
    phase: Phase
    task: Task


def simulate(
    graph: Graph,
    places: Mapping[str, Place],
    order: Sequence[str] | None,
    costs: Costs,
    *,
    cluster: Cluster,
    workload: Workload | None = None,
    offloaded: Collection[str] = (),
    usable_bytes: float | None = None,
    synchronous: bool = False,
) -> Simulated:
    """Run an assignment until it is steady.

    Args:
        places: call -> its window and option.
        order: of dispatch; None: the best there is.
        workload: is not looked at: costs are of one already.
        offloaded: roles that lie in the host's memory between their calls.
        synchronous: an iteration begins when all calls of the one before have ended.

    Raises:
        ValueError: an order that is none, a call without a place, an unknown call or role, a window outside the
            cluster or of another size than its option.
    """
    problem = Problem(
        graph, workload or Workload(1, 1, 1), cluster, costs, usable_bytes=usable_bytes, synchronous=synchronous
    )
    for name, (window, option) in places.items():
        _ = graph.call(name)
        if window.devices != option.devices:
            raise ValueError(
                f"call {name!r}: its option is for {option.devices} devices, its window {window} has {window.devices}"
            )
        if window.end > cluster.devices:
            raise ValueError(f"call {name!r}: window {window} of a cluster of {cluster.devices} devices")
    missing = [name for name in graph.order if name not in places]
    if missing:
        raise ValueError(f"call {missing[0]!r} has no window and option")
    for role in offloaded:
        if role not in graph.roles:
            raise ValueError(f"role {role!r} is offloaded, but there are only {', '.join(graph.roles)}")
    numbered = {problem.index[name]: place for name, place in places.items()}
    roles = frozenset(problem.roles.index(role) for role in offloaded)
    if order is None:
        return simulate_numbered(problem, numbered, best_order(problem, numbered, roles)[1], roles)
    if sorted(order) != sorted(graph.order):
        raise ValueError(f"the order {', '.join(order)} is not one of the calls {', '.join(graph.order)}")
    for i, name in enumerate(order):
        late = [other for other in graph.before(name) if other in order[i:]]
        if late:
            raise ValueError(f"call {name!r} is dispatched before {late[0]!r}, which it waits for")
    return simulate_numbered(problem, numbered, tuple(problem.index[name] for name in order), roles)


def simulate_numbered(
    problem: Problem, places: Mapping[int, Place], order: Sequence[int], offloaded: frozenset[int]
) -> Simulated:
    """`simulate`, of calls and roles by number."""
    steps = steps_of(problem, places, order, offloaded)
    tasks = [step.task for step in steps]
    seconds = period(tasks)
    begins = starts(tasks, seconds)
    spans: dict[tuple[int, Phase], tuple[float, float]] = {
        (step.call, step.phase): (begin, begin + step.task.seconds) for step, begin in zip(steps, begins, strict=True)
    }
    used = memory(problem, places, offloaded)
    timeline, moves = [], []
    for step, begin in zip(steps, begins, strict=True):
        call, home = problem.calls[step.call], problem.home[step.call]
        kind = call.kind if step.phase == "call" else step.phase
        busy = {"call": (step.call,), "reallocate": (step.call, home)}.get(step.phase, (home,))
        windows = _union([places[which][0] for which in busy])
        what = call.name if step.phase == "call" else f"{step.phase} {call.role} for {call.name}"
        timeline += [Busy(what, kind, window, begin, begin + step.task.seconds) for window in windows]
        if step.phase == "reallocate":
            found = problem.move(step.call, places[step.call], places[home])
            source = problem.calls[home].name
            moves.append(Move(call.role, "reallocate", source, call.name, found.nbytes, found.seconds))
        elif step.phase != "call":
            nbytes = problem.host_bytes(step.call, places[home]) * places[home][0].devices
            moves.append(Move(call.role, step.phase, call.name, call.name, nbytes, step.task.seconds))
    levels = used.levels(spans, seconds)
    return Simulated(seconds, tuple(timeline), tuple(moves), levels, used, used.fits)


def steps_of(
    problem: Problem,
    places: Mapping[int, Place],
    order: Sequence[int],
    offloaded: frozenset[int],
    groups: Mapping[int, int] | None = None,
    least: Sequence[float] = (),
) -> list[Step]:
    """Tasks of an iteration in their order.

    Args:
        groups: call -> its devices, as `groups_of` has them, where that is known.
        least: seconds of calls that have no place yet; they need no devices.
    """
    if groups is None:
        groups = groups_of(places, problem.grid.devices)
    found: list[tuple[int, Phase, float, int, tuple[int, ...]]] = []  # call, phase, seconds, devices, after
    runs: dict[int, int] = {}  # call -> its task
    back: dict[int, int] = {}  # role -> the task that brings it back to the host after its training
    for call in order:
        home, role = problem.home[call], problem.role[call]
        after = tuple([runs[other] for other in problem.before[call]])
        if call not in places:
            runs[call] = len(found)
            found.append((call, "call", least[call], 0, after))
            continue
        place, known, away = places[call], home in places, role in offloaded
        if known and away:
            found.append((call, "onload", problem.host_seconds(call, places[home]), groups[home], ()))
            after = (len(found) - 1, *after)
        if known and home != call and (moved := problem.move(call, place, places[home])).copies:
            ready = after[:1] if away else ()
            found.append((call, "reallocate", moved.seconds, groups[call] | groups[home], ready))
            after = (len(found) - 1, *after)
        runs[call] = len(found)
        found.append((call, "call", place[1].seconds, groups[call], after))
        if away and problem.calls[call].kind == "train":
            back[role] = len(found)
            found.append((call, "offload", problem.host_seconds(call, place), groups[call], (runs[call],)))
    steps = []
    for call, phase, seconds, devices, after in found:
        previous: tuple[int, ...] = ()
        if problem.trained[call] and phase != "offload":  # What brings parameters, or uses them.
            trained = runs[problem.home[call]]
            previous = (back.get(problem.role[call], trained) if phase == "onload" else trained,)
        if problem.synchronous:
            previous = tuple(range(len(steps), len(found)))
        steps.append(Step(call, phase, Task(seconds, devices, after, previous)))
    return steps


def _union(windows: Sequence[Window]) -> list[Window]:
    """The devices of any of the windows, as windows without a device in common."""
    out: list[Window] = []
    for window in sorted(windows):
        if out and window.first <= out[-1].end:
            out[-1] = Window(out[-1].first, max(out[-1].end, window.end) - out[-1].first)
        else:
            out.append(window)
    return out


def groups_of(places: Mapping[int, Place], devices: int) -> dict[int, int]:
    """Call -> its devices, as bits: one for those that the same windows lie over."""
    numbers = list(places)
    covers = {cover for _, cover in segments([places[i][0] for i in numbers], devices)}
    return bits_of(numbers, sorted(covers))


def bits_of(numbers: Sequence[int], covers: Sequence[int]) -> dict[int, int]:
    """Call -> its devices, as bits over the covers; bit i of a cover says that the window of call numbers[i] is one."""
    return {
        call: sum(1 << group for group, cover in enumerate(covers) if cover >> at & 1)
        for at, call in enumerate(numbers)
    }


def best_order(
    problem: Problem,
    places: Mapping[int, Place],
    offloaded: frozenset[int],
    *,
    groups: Mapping[int, int] | None = None,
    least: Sequence[float] = (),
    below: float = float("inf"),
) -> tuple[float, tuple[int, ...]]:
    """The shortest period over the orders of dispatch, and its order; inf where none is below a limit.

    Orders that differ only in calls without a device in common give the same period: one of them is tried. Where calls
    have no place yet, no places for them make it shorter.
    """
    if groups is None:
        groups = groups_of(places, problem.grid.devices)
    blocks = [block_devices(problem, places, call, offloaded, groups) for call in range(problem.count)]
    clashes = [(a, b) for a, b in problem.unordered if blocks[a] & blocks[b]]
    best, found = below, problem.orders[0]
    seen: set[tuple[bool, ...]] = set()
    for order, at in zip(problem.orders, problem.positions, strict=True):
        key = tuple(at[a] < at[b] for a, b in clashes)
        if key in seen:
            continue
        seen.add(key)
        tasks = [step.task for step in steps_of(problem, places, order, offloaded, groups, least)]
        seconds = period(tasks, below=best)
        if seconds < best:
            best, found = seconds, order
    return (best, found) if best < below else (float("inf"), found)


def block_devices(
    problem: Problem, places: Mapping[int, Place], call: int, offloaded: frozenset[int], groups: Mapping[int, int]
) -> int:
    """Devices of a call and of what brings its parameters, as bits."""
    home = problem.home[call]
    if call not in places:
        return 0
    if home not in places:
        return groups[call]
    if problem.role[call] in offloaded or problem.move(call, places[call], places[home]).copies:
        return groups[call] | groups[home]
    return groups[call]
