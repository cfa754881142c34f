"""Exact search for the fastest plan that fits: best-first branch and bound with a certificate.

    result = solve(Space(TracedModel(traced, abstract_opt_state, cluster), cluster))
    result.plan, result.estimate.seconds_per_step, result.gap         # gap 0: nothing in the space is faster and fits

The tree: inner mesh -> its placement with one rematerialisation -> candidates (fsdp, microbatches). Nodes wait in order
of a lower bound of the seconds of everything below them (`CostModel.floor`, `CostModel.bound`, the estimate itself), so
the first candidate that is reached and fits is the fastest (Hart, Nilsson and Raphael 1968). Memory that a node cannot
do without (parameters, gradients, optimizer) prunes before activations are counted.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from search.cost import Columns, Placement, StepSeconds
from search.plan import Plan
from search.space import Inner, Space
from sharding_rules import format_bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a plan is expected to do; analytic.

    Attributes:
        seconds_per_step: the sum of `parts`.
        parts: compute, exposed communication by mesh axis, bubble, optimizer: seconds, those above 0.
        hidden_seconds: of collectives behind compute.
        mfu: model flops over peak flops.
        tokens_per_second: of all devices; examples where the batch holds no tokens.
        kept_bytes: parameters, gradients and optimizer state, per device.
        activation_bytes: that the backward pass keeps, per device.
    """

    seconds_per_step: float
    parts: dict[str, float]
    hidden_seconds: float
    mfu: float
    tokens_per_second: float
    kept_bytes: int
    activation_bytes: int
    label: str = "analytic"

    @property
    def bytes_per_device(self) -> int:
        return self.kept_bytes + self.activation_bytes


@dataclasses.dataclass(frozen=True)
class Costed:
    """A plan and its estimate."""

    plan: Plan
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the fastest plan that fits; None if none does.
        bound: seconds per step that no plan of the space beats and fits.
        gap: (estimate - bound) / estimate; 0 unless the time limit was hit.
        candidates: legal candidates of the space that were reached.
        evaluated: of which seconds were computed; the rest were below nodes that their bound or memory ruled out.
        memory_checked: of which activations were counted.
        placements, illegal: inner meshes that are legal, and the others with the reason.
        runners_up: the next fastest plans that fit, best first.
        pareto: plans that no other beats in both time and memory, fastest first; empty unless asked for.
        advice: where nothing fits, what is missing and what would fit.
        seconds: that the search took.
    """

    best: Costed | None
    bound: float
    gap: float
    candidates: int
    evaluated: int
    memory_checked: int
    placements: int
    illegal: dict[str, str]
    runners_up: tuple[Costed, ...]
    pareto: tuple[Costed, ...]
    advice: str
    seconds: float

    @property
    def plan(self) -> Plan | None:
        return self.best.plan if self.best else None

    @property
    def estimate(self) -> Estimate | None:
        return self.best.estimate if self.best else None

    def certificate(self) -> str:
        """One line: how much was searched and what is proven."""
        return (
            f"{self.candidates} candidates in {self.placements} placements, {self.evaluated} costed, "
            f"{self.memory_checked} counted in memory; bound {self.bound:.4g} s, gap {self.gap:.2%}, "
            f"{self.seconds:.2f} s of search"
        )


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One candidate, with the costs of its placement's candidates."""

    place: Placement
    columns: Columns
    parts: StepSeconds
    row: int


class _Search:
    """Counters and what is shared by the steps of one search."""

    def __init__(self, space: Space):
        self.space, self.costs = space, space.model.costs
        self.budget = space.budget_bytes
        self.illegal: dict[str, str] = {}
        self.candidates = self.evaluated = self.placements = 0
        self.checked: set[Any] = set()

    def place(self, inner: Inner) -> tuple[Placement, Columns] | None:
        """A legal placement with its candidates, if it has any."""
        place = self.space.model.place(inner)
        if isinstance(place, str):
            name = f"{inner.mesh()}{' sequence' if inner.sequence else ''}"
            self.illegal[name] = place
            return None
        columns = self.space.columns(place)
        return (place, columns) if len(columns) else None

    def bytes(self, place: Placement, columns: Columns, row: int) -> tuple[int, int]:
        """Kept bytes, and activations, of a candidate."""
        remat = self.costs.remats[int(columns.remat[row])]
        activations = self.space.model.activation_bytes(place, remat) // int(columns.microbatches[row])
        return int(place.kept_bytes[columns.fsdp[row]]), activations

    def costed(self, leaf: _Leaf) -> Costed:
        place, columns, i = leaf.place, leaf.columns, leaf.row
        seconds = float(leaf.parts.total[i])
        kept, activations = self.bytes(place, columns, i)
        remat = self.costs.remats[int(columns.remat[i])]
        cluster, used = self.space.cluster, place.devices
        estimate = Estimate(
            seconds_per_step=seconds,
            parts=leaf.parts.at(i),
            hidden_seconds=float(leaf.parts.hidden[i]),
            mfu=float(self.costs.mfu(seconds, cluster.devices)),
            tokens_per_second=self.space.model.tokens / seconds,
            kept_bytes=kept,
            activation_bytes=activations,
        )
        reason = (
            f"{seconds:.4g} s per step on {used} of {cluster.name} (analytic), "
            f"{format_bytes(kept + activations)} of {format_bytes(self.budget)} usable per device"
        )
        return Costed(
            self.space.plan(place, int(columns.fsdp[i]), remat, int(columns.microbatches[i]), reason=reason), estimate
        )


def solve(
    space: Space, *, runners_up: int = 5, pareto: bool = False, time_limit_seconds: float = math.inf
) -> SearchResult:
    """Find the fastest plan of a space that fits in memory.

    Args:
        space: what to search.
        runners_up: how many of the next best plans to find too.
        pareto: also cost every candidate for the front of time and memory.
        time_limit_seconds: after it no more nodes are opened: the best candidate found so far is returned with its gap.
    """
    start = time.perf_counter()
    search = _Search(space)
    found: list[Costed] = []
    bound = math.inf
    tie = itertools.count()
    heap: list[tuple[float, tuple[Any, ...], int, Any]] = []
    for inner in space.inner_meshes():
        devices = inner.mesh().size
        heapq.heappush(heap, (search.costs.floor(devices), (), next(tie), inner))
    unopened: list[Any] = []
    while (heap or (unopened and not found)) and len(found) <= runners_up:
        late = time.perf_counter() - start > time_limit_seconds
        if not heap:
            # Out of time, and nothing fits yet: one more node, the most promising.
            heap += [(item[0], item[1], next(tie), item[2]) for item in _open(search, unopened.pop(0))]
            heapq.heapify(heap)
            continue
        seconds, _, _, node = heapq.heappop(heap)
        if late and not isinstance(node, _Leaf):
            bound = min(bound, seconds)
            unopened.append(node)
            continue
        if not isinstance(node, _Leaf):
            for item in _open(search, node):
                heapq.heappush(heap, (item[0], item[1], next(tie), item[2]))
            continue
        search.checked.add((id(node.place), int(node.columns.remat[node.row])))
        if sum(search.bytes(node.place, node.columns, node.row)) <= search.budget:
            if not found:
                bound = min(bound, seconds)
            found.append(search.costed(node))
    best = found[0] if found else None
    gap = max(0.0, 1 - bound / best.estimate.seconds_per_step) if best else 0.0
    front = _pareto(search) if pareto else ()
    return SearchResult(
        best=best,
        bound=bound,
        gap=gap,
        candidates=search.candidates,
        evaluated=search.evaluated,
        memory_checked=len(search.checked),
        placements=search.placements,
        illegal=search.illegal,
        runners_up=tuple(found[1 : runners_up + 1]),
        pareto=front,
        advice="" if best else _advice(search),
        seconds=time.perf_counter() - start,
    )


def _open(search: _Search, node: Any) -> Iterator[tuple[float, tuple[Any, ...], Any]]:
    """The nodes below a node, with their bounds."""
    if isinstance(node, Inner):
        made = search.place(node)
        if made is None:
            return
        place, columns = made
        search.placements += 1
        search.candidates += len(columns)
        fits = place.kept_bytes[columns.fsdp] <= search.budget
        for remat in np.unique(columns.remat[fits]):
            keep = fits & (columns.remat == remat)
            below = Columns(columns.fsdp[keep], columns.remat[keep], columns.microbatches[keep])
            yield search.costs.bound(place, int(remat)), (), (place, below)
        return
    place, columns = node
    parts = search.costs.seconds(place, columns)
    search.evaluated += len(columns)
    for i, seconds in enumerate(parts.total):
        order = (int(columns.microbatches[i]), int(columns.remat[i]), place.tensor, place.context, place.expert)
        yield float(seconds), (*order, place.sequence, int(columns.fsdp[i])), _Leaf(place, columns, parts, i)


def _everything(search: _Search) -> Iterator[tuple[Placement, Columns]]:
    for inner in search.space.inner_meshes():
        made = search.place(inner)
        if made is not None:
            yield made


def _memory(search: _Search, place: Placement, columns: Columns) -> np.ndarray:
    """Bytes per device of candidates."""
    by_remat = {
        int(r): search.space.model.activation_bytes(place, search.costs.remats[int(r)]) for r in set(columns.remat)
    }
    activations = np.array([by_remat[int(r)] for r in columns.remat], np.int64)
    return place.kept_bytes[columns.fsdp] + activations // columns.microbatches


def _pareto(search: _Search) -> tuple[Costed, ...]:
    """Plans that fit and that no other beats in both time and memory, by costing every candidate."""
    points: list[tuple[float, float, _Leaf]] = []
    for place, columns in _everything(search):
        parts = search.costs.seconds(place, columns)
        memory = _memory(search, place, columns)
        total = parts.total
        order, least = np.lexsort((memory, total)), math.inf
        for i in order:
            if memory[i] < least and memory[i] <= search.budget:
                least = memory[i]
                points.append((float(total[i]), float(memory[i]), _Leaf(place, columns, parts, int(i))))
    points.sort(key=lambda point: point[:2])
    front, least = [], math.inf
    for _, memory, leaf in points:
        if memory < least:
            least = memory
            front.append(search.costed(leaf))
    return tuple(front)


def _advice(search: _Search) -> str:
    """Why nothing fits, by the candidate that needs least, and what would."""
    space = search.space
    nearest: tuple[float, Placement, Columns, int] | None = None
    for place, columns in _everything(search):
        memory = _memory(search, place, columns)
        i = int(np.argmin(memory))
        if nearest is None or memory[i] < nearest[0]:
            nearest = (float(memory[i]), place, columns, i)
    if nearest is None:
        why = next(iter(search.illegal.values()), "the constraints leave nothing")
        return f"no mesh of {space.cluster.devices} devices suits this model, batch and constraints: {why}"
    total, place, columns, i = nearest
    kept, activations = search.bytes(place, columns, i)
    plan = space.plan(
        place, int(columns.fsdp[i]), search.costs.remats[int(columns.remat[i])], int(columns.microbatches[i])
    )
    text = (
        f"nothing fits {format_bytes(search.budget)} per device (analytic): the least, {plan.preset} on {plan.mesh}, "
        f"remat {plan.remat}, {plan.microbatches} microbatches, needs {format_bytes(total)}: parameters, gradients and "
        f"optimizer {format_bytes(kept)} and activations {format_bytes(activations)}"
    )
    if kept >= search.budget:
        times = 2 ** math.ceil(math.log2(kept / search.budget))
        return (
            f"{text}. No batch is small enough; about {times * 2} times the devices, all on fsdp, would do, "
            "or an optimizer with a smaller state"
        )
    share = (search.budget - kept) / activations
    return (
        f"{text}. It would fit with {share:.0%} of the tokens per example, or a device with "
        f"{format_bytes(total / space.memory_share)} usable, or more devices"
    )
