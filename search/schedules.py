"""Pipeline schedules as data: which operation each rank runs, in which order; their validator and their simulator.

    schedule = make_schedule("1f1b", stages=4, microbatches=16)
    validate(schedule)
    simulate(schedule, forward_seconds=1.0, backward_seconds=2.0).makespan_seconds   # 57.0

A model is cut into L = P*V *virtual stages* of consecutive layers; virtual stage s lives on rank s mod P. An operation
is F (forward), B (backward; where W exists only the gradient of the input) or W (gradient of the weights) of one
virtual stage and one microbatch. Every named schedule is a *clock*: a whole number per operation, in closed form, that
grows along every dependency and never repeats on a rank. Sorting a rank's operations by it gives the rank's order, so
that no schedule made here can deadlock. `search.schedule_times` computes many makespans at once with the same clocks,
`search.schedule_table` the lockstep form that one SPMD program runs.

Sources:
    gpipe        Huang et al. 2019, arXiv 1811.06965: all forwards, then all backwards.
    1f1b         PipeDream-flush: Narayanan et al. 2021, arXiv 2006.09503; rank r keeps min(M, P - r) microbatches.
    interleaved  Megatron-LM: Narayanan et al. 2021, arXiv 2104.04473; V virtual stages per rank, bubble (P-1)/(V M).
    zb_h1        Zero Bubble: Qi et al. 2024, arXiv 2401.10241; B and W apart, rank r runs W r microbatches late, every
                 rank keeps min(M, P) microbatches; bubble (P-1)(F + B - W), exact where W <= F, W <= B and M >= P.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

SCHEDULE_VERSION = 1
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb_h1"]
Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Op(NamedTuple):
    """One operation: its kind, its virtual stage and its microbatch; `str()` is such as `F(stage 2, microbatch 5)`."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, microbatch {self.microbatch})"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order of operations of every rank.

    Attributes:
        name: what made it; any word for a schedule of one's own.
        stages: P, the number of ranks (the size of the `stage` mesh axis).
        chunks: V, virtual stages per rank.
        microbatches: M.
        orders: the operations of each rank, in order.
    """

    name: str
    stages: int
    chunks: int
    microbatches: int
    orders: tuple[tuple[Op, ...], ...]
    version: int = SCHEDULE_VERSION

    @property
    def virtual_stages(self) -> int:
        return self.stages * self.chunks

    @property
    def split_backward(self) -> bool:
        """Whether weight gradients are operations of their own."""
        return any(op.kind == "W" for order in self.orders for op in order)

    def rank_of(self, stage: int) -> int:
        return stage % self.stages

    def to_json(self) -> str:
        """Write the schedule; an operation is `[kind, virtual stage, microbatch]`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read and validate a schedule.

        Raises:
            ValueError: not JSON, another version, fields that are missing or unknown, or not a schedule that can run.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the schedule is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError("the schedule is not a JSON object")
        if record.get("version") != SCHEDULE_VERSION:
            raise ValueError(
                f"the schedule has version {record.get('version')!r}; this program reads version {SCHEDULE_VERSION}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if set(record) != known:
            raise ValueError(
                f"the schedule has unknown fields {sorted(set(record) - known)} "
                f"and lacks {sorted(known - set(record))}; known: {sorted(known)}"
            )
        try:
            orders = tuple(tuple(Op(*entry) for entry in order) for order in record["orders"])
        except TypeError:
            raise ValueError("orders must be a list per rank of [kind, virtual stage, microbatch]") from None
        schedule = cls(**{**record, "orders": orders})
        validate(schedule)
        return schedule


class Clock(NamedTuple):
    """Operations as arrays sorted by `tick`, with `kind` an index into `KINDS`."""

    tick: NDArray[np.int64]
    kind: NDArray[np.int64]
    stage: NDArray[np.int64]
    microbatch: NDArray[np.int64]


def make_schedule(name: ScheduleName, *, stages: int, chunks: int = 1, microbatches: int) -> Schedule:
    """Make a named schedule.

    Args:
        name: "gpipe" (with chunks > 1 the circular pipeline), "1f1b", "interleaved" (chunks == 1 is 1f1b) or "zb_h1".
        stages: P, the number of ranks.
        chunks: V, virtual stages per rank.
        microbatches: M; a multiple of P where V > 1.

    Raises:
        ValueError: an unknown name, sizes that are not whole numbers from 1 up, or sizes the schedule does not have.

    >>> [str(op) for op in make_schedule("1f1b", stages=2, microbatches=2).orders[1]][:2]
    ['F(stage 1, microbatch 0)', 'B(stage 1, microbatch 0)']
    """
    clock = schedule_clock(name, stages=stages, chunks=chunks, microbatches=microbatches)
    orders: list[list[Op]] = [[] for _ in range(stages)]
    for kind, stage, microbatch in zip(
        clock.kind.tolist(), clock.stage.tolist(), clock.microbatch.tolist(), strict=True
    ):
        orders[stage % stages].append(Op(KINDS[kind], stage, microbatch))
    return Schedule(name, stages, chunks, microbatches, tuple(tuple(order) for order in orders))


def schedule_clock(name: ScheduleName, *, stages: int, chunks: int = 1, microbatches: int) -> Clock:
    """Give every operation of a named schedule a whole number, in closed form, and sort by it.

    A dependency always has the smaller number, and no rank has a number twice. With t the tick of `forward_tick`:
        gpipe        F t(m, s)     B M V + P - 1 + t(m, L-1-s)
        1f1b         F 2m + s      B 2m + 2P - 1 - s
        interleaved  F 2 t(m, s)   B 2 (L - 1 + t(m, L-1-s)) + 1
        zb_h1        F 6m + 3s     B 6m + 6P - 3 - 3s      W 6m + 6P - 2 + 3s, that is right after B of microbatch m + s
    """
    check_sizes(name, stages=stages, chunks=chunks, microbatches=microbatches)
    last = stages * chunks - 1
    microbatch, stage = (axis.ravel() for axis in np.mgrid[0:microbatches, 0 : last + 1])
    tick = forward_tick(microbatch, stage, stages=stages, chunks=chunks)
    mirrored = forward_tick(microbatch, last - stage, stages=stages, chunks=chunks)
    if name == "gpipe":
        ticks = [tick, microbatches * chunks + stages - 1 + mirrored]
    elif name == "zb_h1":
        first = 6 * microbatch + 6 * stages
        ticks = [6 * microbatch + 3 * stage, first - 3 - 3 * stage, first - 2 + 3 * stage]
    elif chunks == 1:
        ticks = [2 * microbatch + stage, 2 * microbatch + 2 * stages - 1 - stage]
    else:
        ticks = [2 * tick, 2 * (last + mirrored) + 1]
    kind = np.repeat(np.arange(len(ticks)), len(microbatch))
    all_ticks, stage, microbatch = np.concatenate(ticks), np.tile(stage, len(ticks)), np.tile(microbatch, len(ticks))
    order = np.lexsort((stage, kind, all_ticks))
    return Clock(all_ticks[order], kind[order], stage[order], microbatch[order])


def forward_tick(microbatch: Any, stage: Any, *, stages: int, chunks: int) -> Any:
    """Tick of a forward when every rank runs one forward per tick: groups of P microbatches pass chunk after chunk.

    t(m, s) = (m div P) P V + m mod P + (s div P) P + s mod P; with V = 1 this is m + s. Takes whole numbers or arrays.

    >>> forward_tick(5, 3, stages=4, chunks=1), forward_tick(5, 7, stages=4, chunks=2)
    (8, 16)
    """
    if chunks == 1:
        return microbatch + stage
    return microbatch // stages * (stages * chunks) + microbatch % stages + stage


def check_sizes(name: str, *, stages: int, chunks: int, microbatches: int) -> None:
    """Refuse sizes that the named schedule does not have."""
    if name not in get_args(ScheduleName):
        raise ValueError(f"schedule {name!r} is unknown; one of {', '.join(get_args(ScheduleName))}")
    for label, size in (("stages", stages), ("chunks", chunks), ("microbatches", microbatches)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{label}={size!r}; a whole number from 1 up")
    if chunks > 1 and name in ("1f1b", "zb_h1"):
        raise ValueError(f"{name} has one virtual stage per rank, asked for chunks={chunks}; use 'interleaved'")
    if chunks > 1 and microbatches % stages:
        below, above = microbatches // stages * stages, -(-microbatches // stages) * stages
        raise ValueError(
            f"chunks={chunks} needs microbatches divisible by stages={stages}, got {microbatches}; "
            f"nearest: {above if below == 0 else f'{below} or {above}'}"
        )


def needs(schedule: Schedule, op: Op) -> tuple[Op, ...]:
    """List the operations whose results an operation reads."""
    if op.kind == "W":
        return (Op("B", op.stage, op.microbatch),)
    if op.kind == "F":
        return (Op("F", op.stage - 1, op.microbatch),) if op.stage else ()
    own = Op("F", op.stage, op.microbatch)
    return (own, Op("B", op.stage + 1, op.microbatch)) if op.stage + 1 < schedule.virtual_stages else (own,)


def validate(schedule: Schedule) -> None:
    """Check that a schedule runs: every operation exactly once, on its rank, reading what is there, with no deadlock.

    Raises:
        ValueError: names the operation, and the rank and position where it stands or what it waits for.
    """
    if len(schedule.orders) != schedule.stages:
        raise ValueError(f"the schedule has {len(schedule.orders)} orders for stages={schedule.stages} ranks")
    seen: dict[Op, tuple[int, int]] = {}
    for rank, order in enumerate(schedule.orders):
        for position, op in enumerate(order):
            where = f"rank {rank} position {position}"
            if op.kind not in KINDS:
                raise ValueError(f"{where}: kind {op.kind!r} is unknown; one of {', '.join(KINDS)}")
            if not (0 <= op.stage < schedule.virtual_stages and 0 <= op.microbatch < schedule.microbatches):
                raise ValueError(
                    f"{where}: {op} is outside of {schedule.virtual_stages} virtual stages "
                    f"and {schedule.microbatches} microbatches"
                )
            if schedule.rank_of(op.stage) != rank:
                raise ValueError(f"{where}: {op} belongs on rank {schedule.rank_of(op.stage)}")
            if op in seen:
                raise ValueError(f"{where}: {op} runs twice, first at rank {seen[op][0]} position {seen[op][1]}")
            seen[op] = rank, position
    for kind in KINDS if schedule.split_backward else KINDS[:2]:
        for stage in range(schedule.virtual_stages):
            for microbatch in range(schedule.microbatches):
                if (op := Op(kind, stage, microbatch)) not in seen:
                    raise ValueError(f"{op} is missing on rank {schedule.rank_of(stage)}")
    for _ in run_order(schedule):
        pass


def run_order(schedule: Schedule) -> Iterator[Op]:
    """Yield the operations in an order that a single thread can issue: each after all that it needs.

    Raises:
        ValueError: a deadlock; says which operation each rank stands at and what that waits for.
    """
    position = [0] * schedule.stages
    waiting: dict[Op, list[int]] = {}
    done: set[Op] = set()
    ready = list(range(schedule.stages))
    while ready:
        rank = heapq.heappop(ready)
        while position[rank] < len(schedule.orders[rank]):
            op = schedule.orders[rank][position[rank]]
            missing = [need for need in needs(schedule, op) if need not in done]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            done.add(op)
            position[rank] += 1
            for waiter in waiting.pop(op, ()):
                heapq.heappush(ready, waiter)
            yield op
    stuck = [
        f"rank {rank} at {schedule.orders[rank][position[rank]]} waits for {need}"
        for rank, need in sorted((rank, need) for need, ranks in waiting.items() for rank in ranks)
    ]
    if stuck:
        raise ValueError(f"the schedule deadlocks: {'; '.join(stuck)}")


def peak_in_flight(schedule: Schedule, activation_bytes: ArrayLike = 1) -> tuple[float, ...]:
    """Most that each rank keeps at once of what forwards saved; times do not matter, only the order on the rank.

    A forward's activations are kept until its backward is done, with zb_h1 until its weight gradients are.

    Args:
        schedule: the schedule.
        activation_bytes: bytes that one microbatch saves, one number or one per virtual stage; 1 counts virtual stages.

    >>> peak_in_flight(make_schedule("1f1b", stages=4, microbatches=16))
    (4.0, 3.0, 2.0, 1.0)
    """
    sizes = per_stage("activation_bytes", activation_bytes, schedule.virtual_stages)
    last = "W" if schedule.split_backward else "B"
    peaks = []
    for order in schedule.orders:
        held = peak = 0.0
        for op in order:
            if op.kind == "F":
                held += sizes[op.stage]
                peak = max(peak, held)
            elif op.kind == last:
                held -= sizes[op.stage]
        peaks.append(float(peak))
    return tuple(peaks)


class Busy(NamedTuple):
    """An operation and when it ran, in seconds from the start of the step."""

    op: Op
    start_seconds: float
    end_seconds: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a simulation found (an estimate as analytic, or measured, as the times that it was given).

    Attributes:
        makespan_seconds: from the first operation's start to the last one's end.
        busy: the operations of each rank with their times, in order.
        in_flight: most virtual-stage activations that each rank keeps at once.
    """

    makespan_seconds: float
    busy: tuple[tuple[Busy, ...], ...]
    in_flight: tuple[int, ...]

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        return tuple(sum(item.end_seconds - item.start_seconds for item in rank) for rank in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time, in [0, 1); uniform 1F1B: (P-1)/(M+P-1)."""
        total = self.makespan_seconds * len(self.busy)
        return max(0.0, 1 - sum(self.busy_seconds) / total) if total else 0.0

    @property
    def bubble_overhead(self) -> float:
        """Idle time over computing time, as Megatron-LM states it; uniform interleaved: (P-1)/(V M)."""
        work = sum(self.busy_seconds)
        return max(0.0, self.makespan_seconds * len(self.busy) / work - 1) if work else 0.0

    @property
    def idle(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Intervals (start, end) in seconds in which each rank waits; with `busy` they tile the makespan."""
        ranks = []
        for rank in self.busy:
            edges = [0.0, *(time for item in rank for time in item[1:]), self.makespan_seconds]
            ranks.append(tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a))
        return tuple(ranks)


def simulate(
    schedule: Schedule,
    *,
    forward_seconds: ArrayLike,
    backward_seconds: ArrayLike,
    weight_seconds: ArrayLike = 0.0,
    transfer_seconds: ArrayLike = 0.0,
) -> Timeline:
    """Run a schedule: each rank runs its order, an operation starts when the rank is free and its inputs have arrived.

    Transfers overlap with computing. They still show: under 1F1B rank 0 may not start microbatch m + P before
    microbatch m is back, so each group of P microbatches pays the way there and back again: Pipette's hidden path (Yim
    et al., DATE 2024, arXiv 2405.18093), T = floor(M/P) [P (f + b) + T_p2p] + (P-1) (f + b), with T_p2p = 2 (P-1)
    transfer. Exactly, for equal stages (the same growth per group; 2 (P-2) transfer more where P divides M, as within
    the last group the other ranks wait too):
        makespan = (M + P - 1) (f + b) + 2 transfer [P - 1 + (M - 1) - ceil((M - 1) / P)]

    Args:
        schedule: the schedule.
        forward_seconds: of one microbatch, one number or one per virtual stage (those of embedding and head differ).
        backward_seconds: likewise, of the gradient of the input, recomputation included.
        weight_seconds: likewise, of the gradient of the weights. Added to the backward where the schedule has no W.
        transfer_seconds: between neighbouring virtual stages, either way: one number or one per boundary (L - 1).

    Raises:
        ValueError: a wrong number of times, a negative or infinite one, or a schedule that deadlocks.
    """
    times = stage_times(
        schedule.virtual_stages,
        schedule.stages,
        split_backward=schedule.split_backward,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        weight_seconds=weight_seconds,
        transfer_seconds=transfer_seconds,
    )
    seconds: Mapping[str, list[float]] = {kind: times[kind].tolist() for kind in KINDS}
    transfer = times["transfer"].tolist()
    free = [0.0] * schedule.stages
    end: dict[Op, float] = {}
    busy: list[list[Busy]] = [[] for _ in range(schedule.stages)]
    for op in run_order(schedule):
        rank = schedule.rank_of(op.stage)
        start = free[rank]
        for need in needs(schedule, op):
            hop = transfer[min(need.stage, op.stage) + 1] if need.stage != op.stage else 0.0
            start = max(start, end[need] + hop)
        end[op] = free[rank] = start + seconds[op.kind][op.stage]
        busy[rank].append(Busy(op, start, end[op]))
    in_flight = tuple(int(peak) for peak in peak_in_flight(schedule))
    return Timeline(max(free), tuple(tuple(rank) for rank in busy), in_flight)


def stage_times(virtual_stages: int, stages: int, *, split_backward: bool, **seconds: ArrayLike) -> dict[str, NDArray]:
    """Broadcast times to `F`, `B`, `W` of shape (..., L) and `transfer` of shape (..., L + 1).

    `transfer[..., s]` is between virtual stages s - 1 and s; the ends are 0, and so is everything on a single rank.
    Without W the weight gradients are part of B.
    """
    times = {
        kind: per_stage(name, seconds[name], virtual_stages)
        for kind, name in zip(KINDS, ("forward_seconds", "backward_seconds", "weight_seconds"), strict=True)
    }
    if not split_backward:
        times["B"] = times["B"] + times["W"]
    inner = per_stage("transfer_seconds", seconds["transfer_seconds"], virtual_stages - 1) * (stages > 1)
    times["transfer"] = np.concatenate([np.zeros_like(inner[..., :1]), inner, np.zeros_like(inner[..., :1])], axis=-1)
    if virtual_stages == 1:
        times["transfer"] = np.zeros(2)
    return times


def per_stage(name: str, values: ArrayLike, count: int) -> NDArray[np.float64]:
    """Make one number, or arrays whose last dimension is 1 or `count`, an array of shape (..., count)."""
    array = np.asarray(values, np.float64)
    if not np.all(np.isfinite(array) & (array >= 0)):
        raise ValueError(f"{name} holds negative or infinite numbers: {_short(array[~(array >= 0) | np.isinf(array)])}")
    if array.ndim and array.shape[-1] not in (1, count):
        raise ValueError(f"{name} has {array.shape[-1]} numbers; one, or {count}")
    return np.broadcast_to(array, (*array.shape[:-1], count)) if array.ndim else np.full(count, array[()])


def _short(values: Sequence[float] | NDArray) -> str:
    return ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
