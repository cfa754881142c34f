"""Where to cut a stack of layers into pipeline stages: exact for the slowest stage, exact for the simulated pipeline.

    cut_layers(layer_seconds, stages=4)                                        # the slowest stage is as fast as can be
    cut_layers(layer_seconds, stages=4, microbatches=16, transfer_seconds=t)   # work + (M-1) slowest + transfers
    cut_equal_layers(80, stages=8, first_layers=0.4, last_layers=1.3)          # closed form: layers alike
    cut_pipeline(f, b, stages=4, microbatches=16, schedule="1f1b")             # least makespan of the simulator

With V virtual stages per rank, cut into P*V stages: the slowest virtual stage is then as fast as can be.
Costs are seconds of one microbatch. The embedding's cost is part of the first layer's, the head's of the last one's.
Every stage gets at least one layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.schedule_times import makespan
from search.schedules import check_sizes, per_stage

_TIE = 1e-12
"""Relative difference below which two costs are one: sums of the same layers in another order."""


@dataclasses.dataclass(frozen=True)
class StageCut:
    """Layers per stage, and what that costs.

    Attributes:
        layers_per_stage: number of consecutive layers of each stage.
        bottleneck_seconds: time of the slowest stage for one microbatch.
        objective_seconds: what was minimised; the bottleneck, or seconds per step.
        bound_seconds: nothing is below this; equal to the objective where the cut is proven best.
        explored: how many partial cuts were looked at.
    """

    layers_per_stage: tuple[int, ...]
    bottleneck_seconds: float
    objective_seconds: float
    bound_seconds: float
    explored: int = 0

    @property
    def gap(self) -> float:
        """Share of the objective that is not proven: 0 is a proof."""
        return 1 - self.bound_seconds / self.objective_seconds if self.objective_seconds else 0.0


def cut_layers(
    layer_seconds: ArrayLike, *, stages: int, microbatches: int | None = None, transfer_seconds: ArrayLike = 0.0
) -> StageCut:
    """Cut layers with given costs into stages, exactly.

    With `microbatches` the least of (M-1) max_s t_s + sum_s t_s + 2 sum of the transfers at the cuts: the makespan of
    gpipe where forward and backward are in proportion, and the cost that Alpa (Zheng et al. 2022, arXiv 2201.12023)
    takes. For each candidate of the slowest stage, from below, a dynamic programme finds the cut with the least
    transfers; it ends when the candidate alone costs more than the best cut. Without `microbatches` the least slowest
    stage, then the least transfers. Ties go to the most even cut (least sum of squares).

    Args:
        layer_seconds: of each layer, forward and backward, for one microbatch.
        stages: P.
        microbatches: M.
        transfer_seconds: of a cut after each layer, one way: one number or L - 1.

    Raises:
        ValueError: fewer layers than stages, or costs that are negative or infinite.

    >>> cut_layers([1, 1, 1, 3], stages=2).layers_per_stage
    (3, 1)
    """
    layers = np.atleast_1d(np.asarray(layer_seconds, np.float64))
    count = _check_layers(len(layers), stages)
    layers = per_stage("layer_seconds", layers, count)
    transfer = per_stage("transfer_seconds", transfer_seconds, count - 1)
    sums = _interval_sums(layers)
    least = _least_bottleneck(sums, stages)[stages, 0]
    if microbatches is None:
        sizes, _ = _fewest_transfers(sums, transfer, stages, least)
        bottleneck = _bottleneck(sums, sizes)
        return StageCut(sizes, bottleneck, bottleneck, bottleneck)

    check_sizes("gpipe", stages=stages, chunks=1, microbatches=microbatches)
    best: StageCut | None = None
    candidates = np.unique(sums[np.isfinite(sums)])
    explored = 0
    total = float(layers.sum())
    fewest = 2 * float(np.sort(transfer)[: stages - 1].sum())
    for candidate in candidates[candidates >= least * (1 - _TIE)]:
        if best is not None and (microbatches - 1) * candidate + total + fewest >= best.objective_seconds * (1 - _TIE):
            break
        sizes, transfers = _fewest_transfers(sums, transfer, stages, candidate)
        explored += 1
        bottleneck = _bottleneck(sums, sizes)
        seconds = (microbatches - 1) * bottleneck + total + 2 * transfers
        if best is None or seconds < best.objective_seconds * (1 - _TIE):
            best = StageCut(sizes, bottleneck, seconds, seconds)
    if best is None:
        raise ValueError("no cut found")  # cannot happen: the least bottleneck is a candidate
    return dataclasses.replace(best, explored=explored)


def cut_equal_layers(
    layers: int, *, stages: int, layer_seconds: float = 1.0, first_layers: float = 0.0, last_layers: float = 0.0
) -> StageCut:
    """Cut layers that cost the same, in closed form, with what the first and the last stage do besides.

    A slowest stage T is possible where sum_s max(1, floor((T - extra_s) / c)) >= L; with no extras T = c ceil(L / P).
    Otherwise the least T is c n + extra_s for a whole n, within one layer of the even share of the work.

    Args:
        layers: L.
        stages: P.
        layer_seconds: c, of one layer for one microbatch.
        first_layers, last_layers: cost of the embedding and of the head, in layers.

    >>> cut_equal_layers(16, stages=4, first_layers=0.5, last_layers=2.0).layers_per_stage
    (4, 5, 5, 2)
    """
    _check_layers(layers, stages)
    per_stage("layer_seconds, first_layers and last_layers", [layer_seconds, first_layers, last_layers], 3)
    extra = np.zeros(stages)
    extra[0] += first_layers
    extra[-1] += last_layers

    def capacity(limit: float) -> NDArray[np.int64]:
        """Most layers of each stage within `limit`, in layers; no stage may be left without one."""
        most = np.floor((limit - extra) * (1 + _TIE) + _TIE).astype(np.int64)
        return np.minimum(most, layers - stages + 1)

    even = (layers + extra.sum()) / stages
    # One candidate of every kind of stage within a layer of the even share, or where a stage is full with one layer.
    floor = max(even, 1 + extra.max())
    kinds = np.unique(extra)
    candidates = np.unique([kind + math.ceil(floor - kind - _TIE) + step for kind in kinds for step in range(3)])
    limit = next(limit for limit in [floor, *candidates] if capacity(limit).sum() >= layers)
    sizes = capacity(float(limit))
    over = int(sizes.sum()) - layers  # taken from the fullest stages, the last of them first
    while over > 0:
        load = np.where(sizes > 1, sizes + extra, -np.inf)
        stage = stages - 1 - int(np.argmax(load[::-1]))
        sizes[stage] -= 1
        over -= 1
    bottleneck = float((sizes + extra).max()) * layer_seconds
    return StageCut(tuple(sizes.tolist()), bottleneck, bottleneck, bottleneck)


def cut_pipeline(
    forward_seconds: ArrayLike,
    backward_seconds: ArrayLike,
    *,
    stages: int,
    microbatches: int,
    schedule: Literal["gpipe", "1f1b", "zb_h1"] = "1f1b",
    weight_seconds: ArrayLike = 0.0,
    transfer_seconds: ArrayLike = 0.0,
    frontier: int = 5_000,
) -> StageCut:
    """Cut layers into stages with the least simulated makespan, by branch and bound over the cuts.

    The slowest stage does not decide alone: under 1f1b a slow first stage hides more than a slow last one. Stages are
    fixed from the first on. A partial cut is dropped if no completion can beat the best cut known: for each fixed stage
    (way there) + M (its work) + (way back), and for the rest the same with its least possible slowest stage. Complete
    cuts are simulated, all at once. The search starts from the cuts of `cut_layers`, moved downhill by single layers.

    Args:
        forward_seconds, backward_seconds, weight_seconds: of each layer for one microbatch, as in `simulate`.
        stages: P.
        microbatches: M.
        schedule: with one virtual stage per rank.
        transfer_seconds: of a cut after each layer, one way: one number or L - 1.
        frontier: most partial cuts kept at a time. Where more remain, those with the lowest bounds are kept and the
            result states the gap; 0 is a proof.

    Raises:
        ValueError: fewer layers than stages, or costs that are negative or infinite.
    """
    check_sizes(schedule, stages=stages, chunks=1, microbatches=microbatches)
    arrays = [np.atleast_1d(np.asarray(a, np.float64)) for a in (forward_seconds, backward_seconds, weight_seconds)]
    count = _check_layers(max(len(array) for array in arrays), stages)
    names = ("forward_seconds", "backward_seconds", "weight_seconds")
    f, b, w = (per_stage(name, array, count) for name, array in zip(names, arrays, strict=True))
    transfer = np.append(per_stage("transfer_seconds", transfer_seconds, count - 1), 0.0)
    split = schedule == "zb_h1"
    prefix = {key: np.concatenate([[0.0], np.cumsum(array)]) for key, array in (("f", f), ("b", b), ("w", w))}
    work = f + b + w
    done = np.concatenate([[0.0], np.cumsum(work)])
    total = done[-1]
    sums = _interval_sums(work)
    least = _least_bottleneck(sums, stages)
    explored = 0

    def seconds(ends: NDArray[np.int64]) -> NDArray[np.float64]:
        """Simulate complete cuts, given the end of each stage: shape (N, P)."""
        edges = np.concatenate([np.zeros_like(ends[:, :1]), ends], axis=1)
        return makespan(
            schedule,
            stages=stages,
            microbatches=microbatches,
            forward_seconds=np.diff(prefix["f"][edges]),
            backward_seconds=np.diff(prefix["b"][edges]),
            weight_seconds=np.diff(prefix["w"][edges]),
            transfer_seconds=transfer[ends[:, :-1] - 1],
        )

    starts = [
        cut_layers(work, stages=stages, transfer_seconds=transfer[:-1]),
        cut_layers(work, stages=stages, transfer_seconds=transfer[:-1], microbatches=microbatches),
    ]
    best_ends, best = _downhill(np.array([np.cumsum(cut.layers_per_stage) for cut in starts]), seconds)

    # A partial cut: the ends of its stages, the ways there and back through them, the largest bound of a fixed stage.
    ends = np.zeros((1, 1), np.int64)
    there, back, bound = np.zeros(1), np.zeros(1), np.zeros(1)
    dropped = math.inf
    for stage in range(stages - 1):
        row, end = np.nonzero(
            (ends[:, -1:] < np.arange(count + 1)) & (np.arange(count + 1) <= count - (stages - stage - 1))
        )
        begin = ends[row, -1]
        own = sums[begin, end]
        fixed = np.maximum(bound[row], there[row] + microbatches * own + (0.0 if split else back[row]))
        there_next = there[row] + prefix["f"][end] - prefix["f"][begin] + transfer[end - 1]
        back_next = back[row] + prefix["b"][end] - prefix["b"][begin] + transfer[end - 1]
        if not split:
            back_next += prefix["w"][end] - prefix["w"][begin]
        rest = there_next + microbatches * least[stages - stage - 1, end] + (0.0 if split else back_next)
        through = there_next + back_next + (prefix["f"][-1] - prefix["f"][end]) + (prefix["b"][-1] - prefix["b"][end])
        if schedule == "gpipe":  # the slowest forward and backward count wherever they are
            rest = np.maximum(rest, through + (microbatches - 1) * np.maximum(own, least[stages - stage - 1, end]))
        if schedule == "1f1b":  # round trips, as in `makespan_bound`; what is not cut yet costs at least its work
            trips, left = divmod(microbatches - 1, stages - stage)
            starts_at = np.concatenate([ends[row], end[:, None]], axis=1)
            final = starts_at[:, stages - left] if stages - left <= stage + 1 else count - max(left, 1)
            path = trips * (total - done[begin]) + (total - done[final] if left else 0.0)
            through = through + path
        bound_next = np.maximum(np.maximum(fixed, rest), through)
        explored += len(row)
        keep = np.flatnonzero(bound_next < best * (1 - _TIE))
        if len(keep) > frontier:
            keep = keep[np.argsort(bound_next[keep], kind="stable")]
            dropped = min(dropped, float(bound_next[keep[frontier]]))
            keep = np.sort(keep[:frontier])
        ends = np.concatenate([ends[row[keep]], end[keep, None]], axis=1)
        there, back, bound = there_next[keep], back_next[keep], bound_next[keep]
    if len(ends):
        ends = np.concatenate([ends[:, 1:], np.full((len(ends), 1), count)], axis=1)
        results = seconds(ends)
        explored += len(ends)
        if results.min() < best * (1 - _TIE):
            best_ends, best = _downhill(ends[results.argmin()][None], seconds)
    sizes = tuple(np.diff(best_ends, prepend=0).tolist())
    return StageCut(sizes, _bottleneck(sums, sizes), best, min(best, dropped), explored)


def _downhill(
    ends: NDArray[np.int64], seconds: Callable[[NDArray[np.int64]], NDArray[np.float64]]
) -> tuple[NDArray[np.int64], float]:
    """From the best of some cuts on, move one layer from one stage to another while that helps."""
    times = seconds(ends)
    best_ends, best = ends[int(times.argmin())], float(times.min())
    stages = len(best_ends)
    giver, taker, stage = np.mgrid[0:stages, 0:stages, 0:stages].reshape(3, stages**2, stages)
    moves = np.cumsum((stage == taker).astype(np.int64) - (stage == giver), axis=1)[giver[:, 0] != taker[:, 0]]
    while len(moves):
        near = best_ends + moves
        near = near[(np.diff(near, axis=1, prepend=0) > 0).all(axis=1)]
        times = seconds(near) if len(near) else np.array([math.inf])
        if times.min() >= best * (1 - _TIE):
            break
        best_ends, best = near[int(times.argmin())], float(times.min())
    return best_ends, best


def _check_layers(layers: int, stages: int) -> int:
    for label, size in (("layers", layers), ("stages", stages)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{label}={size!r}; a whole number from 1 up")
    if layers < stages:
        raise ValueError(f"{layers} layers cannot fill {stages} stages; at most {layers} stages")
    return int(layers)


def _interval_sums(layers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cost of layers i <= l < j at [i, j]; infinite where there is none. Shape (L + 1, L + 1)."""
    prefix = np.concatenate([[0.0], np.cumsum(layers)])
    sums = prefix[None, :] - prefix[:, None]
    return np.where(np.arange(len(prefix))[:, None] < np.arange(len(prefix)), np.maximum(sums, 0.0), np.inf)


def _bottleneck(sums: NDArray[np.float64], sizes: tuple[int, ...]) -> float:
    edges = np.concatenate([[0], np.cumsum(sizes)])
    return float(sums[edges[:-1], edges[1:]].max())


def _least_bottleneck(sums: NDArray[np.float64], stages: int) -> NDArray[np.float64]:
    """Least slowest stage of the layers from i on in p stages, at [p, i]. Shape (P + 1, L + 1)."""
    least = np.full((stages + 1, len(sums)), np.inf)
    least[0, -1] = 0.0
    for p in range(1, stages + 1):
        least[p] = np.maximum(sums, least[p - 1][None, :]).min(axis=1)
    return least


def _fewest_transfers(
    sums: NDArray[np.float64], transfer: NDArray[np.float64], stages: int, limit: float
) -> tuple[tuple[int, ...], float]:
    """Cut with the least transfers (one way) whose stages are all within `limit`; then the least sum of squares."""
    count = len(sums) - 1
    allowed = sums <= limit * (1 + _TIE)
    squares = np.where(allowed, np.square(np.where(allowed, sums, 0.0)), np.inf)
    at_end = np.concatenate([[0.0], transfer, [0.0]])  # cost of ending a stage before layer j
    cost, even = np.full(count + 1, np.inf), np.full(count + 1, np.inf)
    cost[count] = even[count] = 0.0
    choice = []
    for _ in range(stages):
        through = np.where(allowed, (at_end + cost)[None, :], np.inf)
        best = through.min(axis=1)
        ties = through <= (best * (1 + _TIE))[:, None]
        evenness = np.where(ties & np.isfinite(through), squares + even[None, :], np.inf)
        pick = evenness.argmin(axis=1)
        choice.append(pick)
        cost, even = best, evenness.min(axis=1)
    sizes, at = [], 0
    for pick in reversed(choice):
        sizes.append(int(pick[at]) - at)
        at = int(pick[at])
    return tuple(sizes), float(cost[0])
