"""Exact search for the fastest plan that fits: best-first branch and bound with a certificate.

    result = solve(Space(TracedModel(traced, abstract_opt_state, cluster), cluster))
    result.plan, result.estimate.seconds_per_step, result.gap         # gap 0: nothing in the space is faster and fits

The tree: inner mesh -> its placement with one rematerialisation -> candidates (fsdp, microbatches, variants). Nodes
wait in order of a lower bound of the seconds of everything below them (`CostModel.floor`, `CostModel.bound`, for
pipelines what no schedule of the kind beats, the estimate itself), so the first candidate that is reached, exact and
fits is the fastest (Hart, Nilsson and Raphael 1968). Memory that a node cannot do without (parameters, gradients,
optimizer) prunes before activations are counted.
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

from search.cost import StepSeconds
from search.costing import Costed, estimate, memory_parts, saved_bytes
from search.estimate import Estimate
from search.placement import Columns, Placement
from search.plan import Plan
from search.space import Inner, Space
from sharding_rules import format_bytes


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
        runners_up: the next fastest plans that fit, best first; each in its best order of mesh axes and with the
            optimizer's state where it is best.
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
    """One candidate, with the costs of its placement's candidates; not exact where a schedule was not run.

    Attributes:
        total: seconds per step of all of them.
        rows: the candidates, the fastest first.
        at: which of them this one is.
    """

    place: Placement
    columns: Columns
    parts: StepSeconds
    total: np.ndarray
    rows: np.ndarray
    at: int
    exact: bool

    @property
    def row(self) -> int:
        return int(self.rows[self.at])

    @property
    def choice(self) -> tuple[Any, ...]:
        """What a person would call the plan: all but the order of its axes and where the optimizer lies."""
        i = self.row
        variant = self.columns.variants[int(self.columns.variant[i])]
        variant = dataclasses.replace(variant, order=(), optimizer_sharding=False)
        numbers = (self.columns.fsdp, self.columns.remat, self.columns.microbatches)
        return (id(self.place), variant, *(int(x[i]) for x in numbers))

    def entry(self) -> tuple[float, tuple[Any, ...], _Leaf]:
        """Its place in the queue."""
        return float(self.total[self.row]), _order(self.place, self.columns, self.row), self


class _Search:
    """Counters and what is shared by the steps of one search."""

    def __init__(self, space: Space):
        self.space, self.model, self.costs = space, space.model, space.model.costs
        self.budget = space.budget_bytes
        self.illegal: dict[str, str] = {}
        self.candidates = self.evaluated = self.placements = 0
        self.checked: set[Any] = set()
        self._counted: dict[int, tuple[Columns, np.ndarray]] = {}

    def place(self, inner: Inner, *, everything: bool = False) -> tuple[Placement, Columns] | None:
        """A legal placement with its candidates, if it has any."""
        place = self.model.place(inner)
        if isinstance(place, str):
            name = f"{inner.mesh()}{' sequence' if inner.sequence else ''}"
            self.illegal[name] = place
            return None
        columns = self.space.columns(place, everything=everything)
        return (place, columns) if len(columns) else None

    def least_bytes(self, place: Placement, columns: Columns) -> np.ndarray:
        """What candidates cannot do without."""
        params, gradients, state = self.costs.held(place, columns)
        data = place.batch_shards / np.array(place.fsdp_sizes)[columns.fsdp]
        state = 0.0 if any("optimizer" in what for what in self.space.offloads) else state
        sharded = columns.flags("optimizer_sharding").astype(bool)
        gradients = gradients / np.where(sharded & (columns.microbatches > 1), data, 1.0)
        return params + gradients + state / np.where(sharded, data, 1.0)

    def bytes(self, place: Placement, columns: Columns) -> np.ndarray:
        """Bytes per device."""
        return sum(memory_parts(self.model, place, columns).values(), start=np.zeros(len(columns)))

    def leaf_bytes(self, leaf: _Leaf) -> float:
        """Bytes per device of a candidate; those beside it are counted with it."""
        key = id(leaf.columns)
        if key not in self._counted:
            self._counted[key] = leaf.columns, self.bytes(leaf.place, leaf.columns)
        return float(self._counted[key][1][leaf.row])

    def following(self, leaf: _Leaf) -> _Leaf | None:
        """The next slower candidate of the same placement; of those whose bytes are known, the next that fits."""
        rows, counted = leaf.rows[leaf.at + 1 :], self._counted.get(id(leaf.columns))
        if counted is not None and len(self.space.offloads) == 1:
            rows = rows[counted[1][rows] <= self.budget]
        return dataclasses.replace(leaf, rows=rows, at=0) if len(rows) else None

    def seconds(self, place: Placement, columns: Columns, *, exact: bool) -> StepSeconds:
        saved = saved_bytes(self.model, place, columns)
        return self.costs.seconds(place, columns, saved_bytes=saved, exact=exact)

    def costed(self, leaf: _Leaf) -> Costed:
        found = estimate(self.model, leaf.place, leaf.columns, leaf.row, leaf.parts, self.budget)
        reason = (
            f"{found.seconds_per_step:.4g} s per step on {leaf.place.devices} of {self.space.cluster.name} (analytic), "
            f"{format_bytes(found.bytes_per_device)} of {format_bytes(self.budget)} usable per device"
        )
        return Costed(self.space.plan(leaf.place, leaf.columns, leaf.row, reason=reason, estimate=found), found)


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
    known: set[Any] = set()
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
        if isinstance(node, _Leaf) and (following := search.following(node)) is not None:
            after = following.entry()
            heapq.heappush(heap, (after[0], after[1], next(tie), after[2]))
        if late and not isinstance(node, _Leaf):
            bound = min(bound, seconds)
            unopened.append(node)
            continue
        if not isinstance(node, _Leaf) or not node.exact:
            for item in _open(search, node):
                heapq.heappush(heap, (item[0], item[1], next(tie), item[2]))
            continue
        # With more of it in the host's memory a candidate is never faster: these come later, whatever becomes of it.
        for item in _offloaded(search, node):
            heapq.heappush(heap, (item[0], item[1], next(tie), item[2]))
        if node.choice in known:
            continue
        search.checked.add((id(node.place), int(node.columns.remat[node.row])))
        if search.leaf_bytes(node) <= search.budget:
            if not found:
                bound = min(bound, seconds)
            found.append(search.costed(node))
            known.add(node.choice)
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
        fits = search.least_bytes(place, columns) <= search.budget
        for remat in np.unique(columns.remat[fits]):
            below = columns.take(np.flatnonzero(fits & (columns.remat == remat)))
            sharded = "optimizer_sharding" not in search.space.forbid
            yield search.costs.bound(place, int(remat), sharded=sharded), (), (place, below)
        return
    if isinstance(node, _Leaf):
        columns = node.columns.take(node.row)
        parts = search.seconds(node.place, columns, exact=True)
        yield _Leaf(node.place, columns, parts, parts.total, np.zeros(1, np.int64), 0, exact=True).entry()
        return
    place, columns = node
    exact = place.stage == 1
    parts = search.seconds(place, columns, exact=exact)
    search.evaluated += len(columns)
    # The fastest stands for all: the next one enters the queue when it has left.
    total = parts.total
    rows = np.lexsort((columns.fsdp, columns.variant, columns.remat, columns.microbatches, total))
    yield _Leaf(place, columns, parts, total, rows, 0, exact=exact).entry()


def _offloaded(search: _Search, leaf: _Leaf) -> Iterator[tuple[float, tuple[Any, ...], _Leaf]]:
    """A candidate with more and more of it in the host's memory, where it then fits: never faster than without."""
    one = leaf.columns.take(leaf.row)
    variant = one.variants[int(one.variant[0])]
    moved = tuple(dataclasses.replace(variant, offload=what) for what in search.space.offloads if what)
    if variant.offload or not moved:
        return
    every = np.zeros(len(moved), np.int64)
    columns = dataclasses.replace(one.take(every), variant=np.arange(len(moved)), variants=moved)
    search.candidates += len(moved)
    rows = np.flatnonzero(search.bytes(leaf.place, columns) <= search.budget)
    if len(rows):
        search.evaluated += len(moved)
        parts = search.seconds(leaf.place, columns, exact=True)
        for row in rows:
            yield _Leaf(leaf.place, columns, parts, parts.total, np.array([row]), 0, exact=True).entry()


def _order(place: Placement, columns: Columns, i: int) -> tuple[Any, ...]:
    """Among equals the simpler candidate comes first, always the same one."""
    sizes = (place.stage, place.tensor, place.context, place.expert)
    numbers = (columns.microbatches, columns.remat, columns.variant, columns.fsdp)
    m, remat, variant, fsdp = (int(x[i]) for x in numbers)
    return (m, remat, variant, *sizes, place.sequence, fsdp)


def _everything(search: _Search) -> Iterator[tuple[Placement, Columns]]:
    for inner in search.space.inner_meshes():
        made = search.place(inner, everything=True)
        if made is not None:
            yield made


def _pareto(search: _Search) -> tuple[Costed, ...]:
    """Plans that fit and that no other beats in both time and memory, by costing every candidate."""
    points: list[tuple[float, float, _Leaf]] = []
    for place, columns in _everything(search):
        parts = search.seconds(place, columns, exact=True)
        memory = search.bytes(place, columns)
        total = parts.total
        order, least = np.lexsort((memory, total)), math.inf
        for at, i in enumerate(order):
            if memory[i] < least and memory[i] <= search.budget:
                least = memory[i]
                points.append(
                    (float(total[i]), float(memory[i]), _Leaf(place, columns, parts, total, order, at, exact=True))
                )
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
    nearest = _least(search)
    if nearest is None:
        why = next(iter(search.illegal.values()), "the constraints leave nothing")
        return f"no mesh of {space.cluster.devices} devices suits this model, batch and constraints: {why}"
    place, columns, i = nearest
    parts = {name: float(x[0]) for name, x in memory_parts(search.model, place, columns.take(i)).items()}
    total = sum(parts.values())
    kept = total - parts["activations"] - parts["transient"]
    plan = space.plan(place, columns, i)
    text = (
        f"nothing fits {format_bytes(search.budget)} per device (analytic): the least, {plan.preset} on {plan.mesh}, "
        f"remat {plan.remat}, {plan.microbatches} microbatches, needs {format_bytes(total)}: parameters, gradients and "
        f"optimizer {format_bytes(kept)}, activations and transients {format_bytes(total - kept)}"
    )
    ways = []
    if kept < search.budget:
        ways.append(f"{(search.budget - kept) / (total - kept):.0%} of the tokens per example")
    more = 2 ** math.ceil(math.log2(max(total / search.budget, 1.01)))
    ways.append(f"about {more} times the devices")
    ways.append(f"devices with {format_bytes(total / space.memory_share)} usable")
    if not space.allow_planned:
        helps = _least(_Search(dataclasses.replace(space, allow_planned=True)))
        if helps is not None:
            less = float(search.bytes(helps[0], helps[1].take(helps[2]))[0])
            if less <= search.budget:
                named = space.plan(*helps).planned
                ways.append(f"{', '.join(named)} (planned: the step cannot run it yet; {format_bytes(less)})")
    if kept >= search.budget:
        ways.append("an optimizer with a smaller state")
    return f"{text}. It would fit with " + ", or ".join(ways)


def _least(search: _Search) -> tuple[Placement, Columns, int] | None:
    """The candidate that needs least memory."""
    nearest: tuple[float, tuple[Placement, Columns, int]] | None = None
    for place, columns in _everything(search):
        memory = search.bytes(place, columns)
        i = int(np.argmin(memory))
        if nearest is None or memory[i] < nearest[0]:
            nearest = float(memory[i]), (place, columns, i)
    return nearest[1] if nearest else None
