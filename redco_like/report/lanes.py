"""What happens when in one step, as lanes of blocks: compute and the collectives of each mesh axis, or pipeline stages.

    step = step_lanes(plan, estimate, forward_share=0.25)
    for lane in step.lanes: lane.name, lane.blocks                # seconds from the start of the step
    step.repeats                                                  # stretches that repeat: their middle may be left out

Lengths are the estimate's. Within a microbatch it says how long collectives are and how much of them is hidden, not
when they run: they are drawn at the end of the pass that they belong to.
"""

from __future__ import annotations

import dataclasses

from redco_like.report.markup import seconds
from redco_like.report.words import exposed
from search import Plan, make_schedule, simulate
from search.estimate import Estimate
from search.schedules import Timeline
from sharding_rules import AXES, DATA

KINDS = {"F": "forward", "B": "backward", "W": "weight"}
WORDS = {"forward": "forward", "backward": "backward", "weight": "gradient of the weights"}


@dataclasses.dataclass(frozen=True)
class Block:
    """Something that takes time in a lane.

    Attributes:
        kind: forward, backward, weight, hidden, exposed, optimizer or offload.
        label: the microbatch, or nothing.
        tip: what it is, in words.
        odd: of a second (fourth, ...) chunk of a stage.
    """

    start: float
    end: float
    kind: str
    label: str = ""
    tip: str = ""
    odd: bool = False


@dataclasses.dataclass(frozen=True)
class Lane:
    """Blocks one after the other. `works`: where it has none, it is idle."""

    name: str
    blocks: tuple[Block, ...]
    works: bool = True


@dataclasses.dataclass(frozen=True)
class Repeat:
    """A stretch of `count` periods that look alike.

    Attributes:
        microbatches: of one period.
        passes: forward passes of one lane in one period.
    """

    start: float
    period: float
    count: int
    microbatches: int = 1
    passes: int = 1


@dataclasses.dataclass(frozen=True)
class Step:
    """One step. `pipeline`: its lanes are stages."""

    lanes: tuple[Lane, ...]
    seconds: float
    repeats: tuple[Repeat, ...]
    pipeline: bool


def step_lanes(
    plan: Plan, estimate: Estimate, *, forward_share: float | None = None, timeline: Timeline | None = None
) -> Step:
    """Lay out one step.

    Args:
        plan: what runs.
        estimate: how long its parts take.
        forward_share: of the compute; assumed from the rematerialisation if it is not known.
        timeline: of the pipeline, where the stages differ; without one they are taken to be equal.
    """
    if forward_share is None:
        forward_share = 1 / 4 if plan.remat == "full" else 1 / 3
    if plan.mesh.stage > 1:
        return _pipeline(plan, estimate, forward_share, timeline)
    return _microbatches(plan, estimate, forward_share)


def _microbatches(plan: Plan, estimate: Estimate, forward_share: float) -> Step:
    """Microbatches one after the other, and beside them the collectives of each mesh axis."""
    m = plan.microbatches
    waits = exposed(estimate)
    once = {axis: s for axis, s in waits.items() if axis == DATA}
    each = {axis: s / m for axis, s in waits.items() if axis != DATA}
    axes = [axis for axis in AXES if estimate.communication.get(axis, {}).get("seconds", 0) or waits.get(axis, 0)]
    hidden = {
        axis: max(0.0, estimate.communication.get(axis, {}).get("seconds", 0.0) - waits.get(axis, 0.0)) for axis in axes
    }
    compute = estimate.seconds.get("compute", 0.0) / m
    period = compute + sum(each.values())
    work: list[Block] = []
    links: dict[str, list[Block]] = {axis: [] for axis in axes}
    for k in range(m):
        now = k * period
        for kind, share in (("forward", forward_share), ("backward", 1 - forward_share)):
            if not share:
                continue
            begin, now = now, now + share * compute
            where = f"microbatch {k + 1} of {m}" if m > 1 else "the whole batch"
            work.append(Block(begin, now, kind, str(k + 1), f"{WORDS[kind]}, {where}: {seconds(now - begin)}"))
            for axis in axes:
                behind = hidden[axis] * share / m if axis != DATA else 0.0
                if axis == DATA and kind == "backward" and k == m - 1:
                    behind = min(hidden[axis], now)
                behind = min(behind, now - begin) if axis != DATA else behind
                if behind:
                    tip = f"{axis}: {seconds(behind)} behind compute"
                    links[axis].append(Block(now - behind, now, "hidden", "", tip))
            for axis, wait in each.items():
                if share * wait:
                    tip = f"{axis}: compute waits {seconds(share * wait)}, {where}"
                    links[axis].append(Block(now, now + share * wait, "exposed", "", tip))
                    now += share * wait
    now = m * period
    for axis, wait in once.items():
        if wait:
            tip = f"{axis}: compute waits {seconds(wait)}, once per step"
            links[axis].append(Block(now, now + wait, "exposed", "", tip))
            now += wait
    work += _ending(estimate, now)
    lanes = [Lane("compute", tuple(work)), *(Lane(axis, tuple(links[axis]), works=False) for axis in axes)]
    return Step(tuple(lanes), estimate.seconds_per_step, (Repeat(0.0, period, m),), pipeline=False)


def _ending(estimate: Estimate, now: float) -> list[Block]:
    """What follows the last backward pass and its collectives."""
    blocks = []
    for part, words in (("offload", "transfers to and from the host"), ("optimizer", "optimizer step")):
        if took := estimate.seconds.get(part, 0.0):
            blocks.append(Block(now, now + took, part, "", f"{words}: {seconds(took)}"))
            now += took
    return blocks


def _pipeline(plan: Plan, estimate: Estimate, forward_share: float, timeline: Timeline | None) -> Step:
    """Stages, each with its operations; every other wait is at the end."""
    p, m = plan.mesh.stage, plan.microbatches
    waits = exposed(estimate)
    once = waits.get(DATA, 0.0)
    if timeline is None:
        timeline = _equal_stages(plan, forward_share)
    ending = once + sum(estimate.seconds.get(part, 0.0) for part in ("offload", "optimizer"))
    scale = (estimate.seconds_per_step - ending) / timeline.makespan_seconds if timeline.makespan_seconds else 0.0
    lanes = []
    for rank, busy in enumerate(timeline.busy):
        blocks = []
        for item in busy:
            kind, chunk = KINDS[item.op.kind], item.op.stage // p
            start, end = item.start_seconds * scale, item.end_seconds * scale
            piece = f", chunk {chunk + 1}" if plan.chunks > 1 else ""
            tip = (
                f"stage {rank + 1}{piece}: {WORDS[kind]} of microbatch {item.op.microbatch + 1}, {seconds(end - start)}"
            )
            blocks.append(Block(start, end, kind, str(item.op.microbatch + 1), tip, bool(chunk % 2)))
        now = estimate.seconds_per_step - ending
        if once:
            blocks.append(Block(now, now + once, "exposed", "", f"sum of gradients over data: {seconds(once)}"))
        lanes.append(Lane(f"stage {rank + 1}", (*blocks, *_ending(estimate, now + once))))
    return Step(tuple(lanes), estimate.seconds_per_step, _repeats(plan, timeline, scale, m), pipeline=True)


def _equal_stages(plan: Plan, forward_share: float) -> Timeline:
    """The schedule with stages that all take the same time, in units of one microbatch."""
    schedule = make_schedule(plan.schedule, stages=plan.mesh.stage, chunks=plan.chunks, microbatches=plan.microbatches)
    backward = 1 - forward_share
    weight = backward / 2 if schedule.split_backward else 0.0
    return simulate(schedule, forward_seconds=forward_share, backward_seconds=backward - weight, weight_seconds=weight)


def _repeats(plan: Plan, timeline: Timeline, scale: float, microbatches: int) -> tuple[Repeat, ...]:
    """Where a schedule is in its steady state: on the first rank, from its first backward pass to its last forward.

    GPipe has two such stretches, as all forward passes come first.
    """
    group = plan.mesh.stage if plan.chunks > 1 else 1
    first, last = timeline.busy[0], timeline.busy[-1]

    def stretch(start: float, end: float, times: list[float]) -> Repeat | None:
        middle = len(times) // 2
        if middle + group >= len(times):
            return None
        period = times[middle + group] - times[middle]
        count = int((end - start) / period + 1e-6) if period > 0 else 0
        return Repeat(start * scale, period * scale, count, group, group * plan.chunks) if count > 0 else None

    forwards = [i.start_seconds for i in first if i.op.kind == "F" and i.op.stage == 0]
    backwards = [i.end_seconds for i in first if i.op.kind == "B" and i.op.stage == 0]
    if plan.schedule == "gpipe":
        arrival = next(i.start_seconds for i in last if i.op.kind == "F")
        leaves = max(i.end_seconds for i in last if i.op.kind == "B")
        found = [
            stretch(arrival, max(forwards), forwards),
            stretch(min(i.start_seconds for i in first if i.op.kind == "B"), leaves, backwards),
        ]
    else:
        found = [stretch(min(backwards), max(forwards), backwards)]
    return tuple(repeat for repeat in found if repeat is not None)
