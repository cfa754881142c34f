"""The lockstep form of a schedule: one tick after another, in each a forward slot and a backward slot on every rank.

    table = lockstep(make_schedule("1f1b", stages=4, microbatches=16))
    table.forward_microbatch[tick, rank], table.forward_slot[tick, rank]; table.slots; table.phases

One SPMD program can run this: every rank does the same thing in every tick, so that its collectives are uniform; slots
with nothing to do run masked. Activations move one rank on, and gradients one rank back, between two ticks, and are
read in the very next tick, so that only the saved inputs of virtual stages need slots in a buffer.

With t of `schedules.forward_tick`, forwards are at tick t(m, s) and backwards at (L-1) + t(m, L-1-s): M V + L + P - 2
ticks and (M V + P - 1)(f + b) seconds, as 1F1B without lockstep for V = 1 and as Megatron's interleaved schedule, in
its order, for V > 1. Lockstep makes the way there and back 2P - 1 ticks, so that with V = 1 rank r keeps
min(M, 2 (P - r) - 1) microbatches rather than P - r. gpipe runs all its forwards before its first backward.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.schedules import Schedule, forward_tick, make_schedule, per_stage

NONE = -1
"""In a table: nothing to do in this slot."""


class Phase(NamedTuple):
    """Ticks `start <= tick < stop` in which the same slots are in use somewhere: one scan of the executor."""

    start: int
    stop: int
    forward: bool
    backward: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TickTable:
    """What each rank does in each tick. All arrays have shape (ticks, P) and are not writable.

    Attributes:
        name, stages, chunks, microbatches: of the schedule.
        forward_chunk, forward_microbatch: of the forward of this tick, or `NONE`; its stage is chunk * P + rank.
        backward_chunk, backward_microbatch: likewise of the backward, which runs after the forward of the same tick.
        forward_slot: where the forward saves its input; an idle forward writes to a slot that nobody reads.
        backward_slot: which slot the backward reads; an idle backward reads the slot that this rank's forward, idle or
            not, wrote last, so that it computes on finite numbers (zeros would give 0 * inf).
        slots: size of the buffer of saved inputs on every rank.
        phases: the tick ranges with the same slots in use.
    """

    name: str
    stages: int
    chunks: int
    microbatches: int
    forward_chunk: NDArray[np.int32]
    forward_microbatch: NDArray[np.int32]
    backward_chunk: NDArray[np.int32]
    backward_microbatch: NDArray[np.int32]
    forward_slot: NDArray[np.int32]
    backward_slot: NDArray[np.int32]
    slots: int
    phases: tuple[Phase, ...]

    @property
    def ticks(self) -> int:
        return len(self.forward_chunk)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Most saved inputs that each rank keeps at once, the one that is read in a tick included."""
        started = np.cumsum(self.forward_microbatch != NONE, axis=0)
        ended = np.cumsum(self.backward_microbatch != NONE, axis=0)
        ended_before = np.concatenate([np.zeros_like(ended[:1]), ended[:-1]])
        return tuple((started - ended_before).max(axis=0).tolist())


def lockstep(schedule: Schedule) -> TickTable:
    """Put a schedule into ticks of one forward and one backward per rank, with slots for what is saved.

    Slots are allocated by colouring intervals [forward tick, backward tick] in order of their start, which takes the
    least number of slots: `max(in_flight)`, and one more only if an idle forward would find every slot taken.

    Raises:
        ValueError: a schedule with separate weight gradients, whose ticks would cost the longest of three operations on
            every rank (ZB-H1 took 404 against 212 Mcycles of 1F1B), or one that is not the named schedule of its sizes.

    >>> table = lockstep(make_schedule("1f1b", stages=4, microbatches=16))
    >>> table.ticks, table.slots, table.in_flight
    (22, 7, (7, 5, 3, 1))
    """
    if schedule.split_backward:
        raise ValueError(
            f"schedule {schedule.name!r} has weight gradients of its own: a lockstep tick would last as long as the "
            "longest of F, B and W on every rank; use '1f1b' or 'interleaved', which lose nothing in lockstep"
        )
    stages, chunks, microbatches = schedule.stages, schedule.chunks, schedule.microbatches
    named = make_schedule(schedule.name, stages=stages, chunks=chunks, microbatches=microbatches)  # pyright: ignore[reportArgumentType]
    if schedule.orders != named.orders:
        raise ValueError(f"the orders are not those of {schedule.name!r}; only named schedules have a lockstep form")

    last = schedule.virtual_stages - 1
    microbatch, stage = (axis.ravel() for axis in np.mgrid[0:microbatches, 0 : last + 1])
    forward = forward_tick(microbatch, stage, stages=stages, chunks=chunks)
    first_backward = microbatches * chunks + stages - 1 if schedule.name == "gpipe" else last
    backward = first_backward + forward_tick(microbatch, last - stage, stages=stages, chunks=chunks)
    shape = int(backward.max()) + 1, stages

    columns = {}
    for name, tick in (("forward", forward), ("backward", backward)):
        for what, value in (("chunk", stage // stages), ("microbatch", microbatch)):
            column = np.full(shape, NONE, np.int32)
            column[tick, stage % stages] = value
            columns[f"{name}_{what}"] = column
    forward_slot, backward_slot = _allocate(forward, backward, stage % stages, shape)
    for column in (*columns.values(), forward_slot, backward_slot):
        column.setflags(write=False)
    phases = _phases(
        (columns["forward_chunk"] != NONE).any(axis=1).tolist(),
        (columns["backward_chunk"] != NONE).any(axis=1).tolist(),
    )
    return TickTable(
        name=schedule.name,
        stages=stages,
        chunks=chunks,
        microbatches=microbatches,
        **columns,
        forward_slot=forward_slot,
        backward_slot=backward_slot,
        slots=int(forward_slot.max()) + 1,
        phases=phases,
    )


def _allocate(
    forward: NDArray, backward: NDArray, rank: NDArray, shape: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Colour the intervals [forward, backward] of each rank: the lowest free slot, in order of their start."""
    ticks, ranks = shape
    forward_slot = np.zeros(shape, np.int32)
    backward_slot = np.zeros(shape, np.int32)
    forwards_run = np.isin(np.arange(ticks), forward)  # where no rank has a forward the executor runs none
    for r in range(ranks):
        mine = rank == r
        ends = dict(zip(forward[mine].tolist(), backward[mine].tolist(), strict=True))
        taken: dict[int, int] = {}  # slot -> last tick in which it is read
        reads: dict[int, int] = {}
        written = 0
        for tick in range(ticks):
            taken = {slot: end for slot, end in taken.items() if end >= tick}
            if forwards_run[tick]:
                written = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            if tick in ends:
                taken[written] = ends[tick]
                reads[ends[tick]] = written
            forward_slot[tick, r] = written
            backward_slot[tick, r] = reads.get(tick, written)
    return forward_slot, backward_slot


def _phases(forward: list[bool], backward: list[bool]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    for tick, (f, b) in enumerate(zip(forward, backward, strict=True)):
        if phases and phases[-1][2:] == (f, b):
            phases[-1] = phases[-1]._replace(stop=tick + 1)
        else:
            phases.append(Phase(tick, tick + 1, f, b))
    return tuple(phases)


def validate_table(table: TickTable) -> None:
    """Run the table on tokens: every read sees the right virtual stage and microbatch, every operation runs once.

    Raises:
        ValueError: names the operation, the tick and the rank, and what was read instead.
    """
    ranks, last = range(table.stages), table.stages * table.chunks - 1
    buffer: list[dict[int, object]] = [{} for _ in ranks]
    activation: list[object] = [None] * table.stages  # what each rank sent on in the tick before
    gradient: list[object] = [None] * table.stages
    done: set[tuple[str, int, int]] = set()

    forwards_run = (table.forward_microbatch != NONE).any(axis=1)

    def read(where: str, got: object, expected: object) -> None:
        if got != expected:
            raise ValueError(f"{where} reads {got}, expected {expected}")

    for tick in range(table.ticks):
        new_activation, new_gradient = list[object]([None] * table.stages), list[object]([None] * table.stages)
        for rank in ranks:
            slot, microbatch = int(table.forward_slot[tick, rank]), int(table.forward_microbatch[tick, rank])
            if not 0 <= slot < table.slots:
                raise ValueError(f"tick {tick} rank {rank}: slot {slot} is outside of {table.slots}")
            if forwards_run[tick]:
                buffer[rank][slot] = "what an idle forward left"
            if microbatch != NONE:
                stage = int(table.forward_chunk[tick, rank]) * table.stages + rank
                where = f"tick {tick} rank {rank}: F(stage {stage}, microbatch {microbatch})"
                if stage:
                    read(where, activation[rank - 1], ("F", stage - 1, microbatch))
                _once(done, where, ("F", stage, microbatch))
                buffer[rank][slot] = new_activation[rank] = "F", stage, microbatch
            slot, microbatch = int(table.backward_slot[tick, rank]), int(table.backward_microbatch[tick, rank])
            if microbatch != NONE:
                stage = int(table.backward_chunk[tick, rank]) * table.stages + rank
                where = f"tick {tick} rank {rank}: B(stage {stage}, microbatch {microbatch})"
                read(where, buffer[rank].get(slot), ("F", stage, microbatch))
                if stage < last:
                    read(where, gradient[(rank + 1) % table.stages], ("B", stage + 1, microbatch))
                _once(done, where, ("B", stage, microbatch))
                new_gradient[rank] = "B", stage, microbatch
            elif slot not in buffer[rank]:
                raise ValueError(
                    f"tick {tick} rank {rank}: an idle backward reads slot {slot}, which was never written"
                )
        activation, gradient = new_activation, new_gradient
    for kind in "FB":
        for stage in range(last + 1):
            for microbatch in range(table.microbatches):
                if (kind, stage, microbatch) not in done:
                    raise ValueError(f"{kind}(stage {stage}, microbatch {microbatch}) is missing")


def _once(done: set[tuple[str, int, int]], where: str, op: tuple[str, int, int]) -> None:
    if op in done:
        raise ValueError(f"{where} runs twice")
    done.add(op)


def lockstep_seconds(
    table: TickTable, *, forward_seconds: ArrayLike, backward_seconds: ArrayLike, tick_seconds: float = 0.0
) -> float:
    """Time of a table: each tick lasts as long as its slowest forward, its slowest backward and the tick's own cost.

    Every rank runs every slot of a phase, masked where idle, so a phase's tick costs the slowest virtual stage that any
    rank may pick.

    Args:
        table: the table.
        forward_seconds: one number or one per virtual stage.
        backward_seconds: likewise, weight gradients included.
        tick_seconds: what a tick costs besides, such as transfers that are not hidden.
    """
    count = table.stages * table.chunks
    forward = per_stage("forward_seconds", forward_seconds, count).max()
    backward = per_stage("backward_seconds", backward_seconds, count).max()
    return float(
        sum(
            (phase.stop - phase.start) * (phase.forward * forward + phase.backward * backward) for phase in table.phases
        )
        + table.ticks * tick_seconds
    )
