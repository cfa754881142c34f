"""Makespans of many candidates at once, and a bound that no schedule beats. Equal to `simulate`, to the last bit.

    makespan("1f1b", stages=4, microbatches=16, forward_seconds=f_NxL, backward_seconds=b_NxL)   # shape (N,)

Dimensions: N candidates, L = P*V virtual stages, M microbatches.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.schedules import KINDS, ScheduleName, check_sizes, schedule_clock, stage_times

_BLOCK_NUMBERS = 1 << 22
"""Numbers kept per block of candidates (32 MB), so that memory does not grow with the number of candidates."""


def makespan(
    name: ScheduleName,
    *,
    stages: int,
    chunks: int = 1,
    microbatches: int,
    forward_seconds: ArrayLike,
    backward_seconds: ArrayLike,
    weight_seconds: ArrayLike = 0.0,
    transfer_seconds: ArrayLike = 0.0,
) -> NDArray[np.float64]:
    """Compute the makespan of a named schedule for many sets of times; the arguments of `simulate`.

    Args:
        name, stages, chunks, microbatches: as for `make_schedule`.
        forward_seconds, backward_seconds, weight_seconds: one number, or shape (..., L) or (..., 1): leading dimensions
            are candidates and broadcast against each other.
        transfer_seconds: one number, or shape (..., L - 1) or (..., 1).

    Returns:
        Seconds, of the shape of the leading dimensions.

    >>> makespan("1f1b", stages=4, microbatches=16, forward_seconds=[[1.0], [2.0]], backward_seconds=2.0)
    array([57., 76.])
    """
    waves = _waves(name, stages, chunks, microbatches)
    times = stage_times(
        stages * chunks,
        stages,
        split_backward=name == "zb_h1",
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        weight_seconds=weight_seconds,
        transfer_seconds=transfer_seconds,
    )
    shape = np.broadcast_shapes(*(array.shape[:-1] for array in times.values()))
    flat = {  # candidates last, so that the rows that a wave picks are contiguous
        key: np.ascontiguousarray(np.broadcast_to(array, (*shape, array.shape[-1])).reshape(-1, array.shape[-1]).T)
        for key, array in times.items()
    }
    count = flat["F"].shape[1]
    block = max(1, _BLOCK_NUMBERS // (2 * (stages * chunks + 1) * microbatches))
    parts = [
        _run(waves, {key: array[:, at : at + block] for key, array in flat.items()}, stages, microbatches)
        for at in range(0, count, block)
    ]
    return (np.concatenate(parts) if parts else np.zeros(0)).reshape(shape)


def _run(waves: _Waves, times: dict[str, NDArray], stages: int, microbatches: int) -> NDArray[np.float64]:
    transfer = times["transfer"]
    virtual_stages, count = times["F"].shape
    free_PxN = np.zeros((stages, count))
    # Row s + 1 of forward_ends and row s of backward_ends belong to stage s; outer rows stay zero.
    forward_ends = np.zeros((virtual_stages + 1, microbatches, count))
    backward_ends = np.zeros((virtual_stages + 1, microbatches, count))
    for kind, stage, microbatch, rank in waves:
        start = free_PxN[rank]
        if kind == 0:
            np.maximum(start, forward_ends[stage, microbatch] + transfer[stage], out=start)
        elif kind == 1:  # its own forward ran earlier on the same rank
            np.maximum(start, backward_ends[stage + 1, microbatch] + transfer[stage + 1], out=start)
        start += times[KINDS[kind]][stage]
        free_PxN[rank] = start
        if kind == 0:
            forward_ends[stage + 1, microbatch] = start
        elif kind == 1:
            backward_ends[stage, microbatch] = start
    return free_PxN.max(axis=0)


_Waves = list[tuple[int, NDArray, NDArray, NDArray]]


@functools.lru_cache(maxsize=256)
def _waves(name: ScheduleName, stages: int, chunks: int, microbatches: int) -> _Waves:
    """Group a schedule's operations: those of one clock tick and kind are on different ranks and do not depend."""
    clock = schedule_clock(name, stages=stages, chunks=chunks, microbatches=microbatches)
    changes = (np.diff(clock.tick) != 0) | (np.diff(clock.kind) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(clock.tick)]
    rank = clock.stage % stages
    return [
        (int(clock.kind[a]), clock.stage[a:b], clock.microbatch[a:b], rank[a:b]) for a, b in itertools.pairwise(edges)
    ]


def makespan_bound(
    name: ScheduleName,
    *,
    stages: int,
    chunks: int = 1,
    microbatches: int,
    forward_seconds: ArrayLike,
    backward_seconds: ArrayLike,
    weight_seconds: ArrayLike = 0.0,
    transfer_seconds: ArrayLike = 0.0,
) -> NDArray[np.float64]:
    """Bound the makespan from below without running the schedule; the arguments and shape of `makespan`.

    The longest of a few paths through the dependencies, for every rank r (way: work and transfers of ranks before):
        way there + M (its work) + way back         any schedule; without the way back where W may come last
        every stage once, there and back            one microbatch
        gpipe, V = 1                                sum f + (M-1) max f, likewise b, and all transfers: exact
        1f1b: rank r keeps n = P - r microbatches, so that one of n must go from r to the end and back before the next
        starts: every stage once + (M-1) div n such round trips + one of (M-1) mod n microbatches
    Equal to the makespan for equal stages: gpipe and 1f1b always, interleaved without transfers.
    """
    check_sizes(name, stages=stages, chunks=chunks, microbatches=microbatches)
    split = name == "zb_h1"
    times = stage_times(
        stages * chunks,
        stages,
        split_backward=split,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        weight_seconds=weight_seconds,
        transfer_seconds=transfer_seconds,
    )
    forward, backward, transfer = times["F"], times["B"], times["transfer"]
    way_there = np.cumsum(forward + transfer[..., 1:], axis=-1)
    way_back = np.cumsum(backward + transfer[..., 1:], axis=-1)
    once = bound = way_there[..., -1] + way_back[..., -1]
    if split:
        bound = bound + times["W"][..., 0]
    if name == "gpipe" and chunks == 1:
        return once + (microbatches - 1) * (forward.max(-1) + backward.max(-1))
    one_f_one_b = chunks == 1 and name in ("1f1b", "interleaved")
    trip = once[..., None] - (way_there + way_back) + forward + backward + 2 * transfer[..., 1:]
    for rank in range(stages):
        there = way_there[..., rank - 1] if rank else 0.0
        back = way_back[..., rank - 1] if rank else 0.0
        work = (forward + backward)[..., rank::stages].sum(-1)
        if split:
            work = work + times["W"][..., rank::stages].sum(-1)
        bound = np.maximum(bound, there + microbatches * work + (0.0 if split else back))
        if one_f_one_b:
            trips, left = divmod(microbatches - 1, stages - rank)
            rest = np.maximum(left * trip[..., -1], trip[..., stages - left]) if left else 0.0
            bound = np.maximum(bound, once + trips * trip[..., rank] + rest)
    return bound
