"""The collectives that a placement needs, read off the contractions of the model: `search.cost.Flow`s.

traffic = ActivationTraffic(layout, works, activation_width=2, merges=True)
flows = [*traffic.flows(placement), *param_flows(traffic_by_fsdp_size)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search.cost import Flow, Placement
from search.workload import Workload
from sharding_rules import AXES, BATCH_AXES, CONTEXT, EXPERT, FSDP, TENSOR, Layout
from sharding_rules.axes import BATCH, PARAM, Contraction, leaves, size_of


class ActivationTraffic:
    """Collectives of activations.

    Args:
        layout: of the model, on any mesh.
        works: rematerialisation -> workload.
        activation_width: bytes of an element.
        merges: whether products of one activation share the sum of its gradient.
    """

    def __init__(self, layout: Layout, works: Mapping[Any, Workload], *, activation_width: int, merges: bool):
        self.layout, self.works = layout, works
        self.activation_width, self.merges = activation_width, merges
        self._recomputed = {r: _recompute_ratio(work) for r, work in works.items()}
        self._index = {row.name: i for i, row in enumerate(layout.rows.rows)}
        self._outside_experts = self._rows_outside_experts()

    def flows(self, place: Placement) -> list[Flow]:
        """Collectives of one placement."""
        return [*self._activation_flows(place), *self._lookup_flows(place)]

    def _rows_outside_experts(self) -> set[str]:
        """Rows of parameters that no expert has: what enters and leaves the experts."""
        out: set[str] = set()
        for dims in self.layout.table.inputs(self.layout.params):
            rows = {r for dim in dims for axis in leaves(dim) if (r := self.layout.rows.of(axis))}
            if not any(r.role == "expert" for r in rows):
                out |= {r.name for r in rows}
        return out

    def _names(self, dims: Any) -> set[str]:
        return {r.name for dim in dims for axis in leaves(dim) if (r := self.layout.rows.of(axis))}

    def _axes(
        self, place: Placement, names: set[str], *, spill: bool = False, among: set[str] | None = None
    ) -> set[str]:
        """Mesh axes that split something with these rows; keys split beyond their heads need groups in the whole."""
        index = [self._index[name] for name in names]
        grouped = any(place.groups[self._index[name]] for name in among or names)
        table = place.rows | place.spill if spill else place.rows
        return {
            axis
            for i in index
            for j, axis in enumerate(AXES)
            if table[i, j] and (grouped or not place.beyond[i] or axis != TENSOR)
        }

    def _activation_flows(self, place: Placement) -> list[Flow]:
        """Collectives of activations, forward and backward: see the module `search.cost`.

        A product over a split row leaves partial sums: all-reduced forward (row parallel). One whose weight's other row
        is split has a partial input gradient: all-reduced backward, once per activation (column parallel). With
        sequence parallelism each of the two is a reduce-scatter and an all-gather, and in a loop the input is gathered
        once more for the weight's gradient. Keys and values are gathered over context. Experts' inputs and outputs move
        in all-to-alls.
        """
        flows: dict[Any, dict[str, float]] = {}

        def add(kind: str, axis: str, dims: Any, phase: str, trips: float, again: Mapping[str, float] | None = None):
            names = self._names(dims)
            split = self._axes(place, names) - ({axis} if kind != "all_to_all" else set())
            bytes_ = self.activation_width * math.prod(size_of(dim) for dim in dims)
            batch = any(self.layout.rows[name].role == "batch" for name in names)
            key = (kind, axis, float(bytes_), tuple(a for a in AXES if a in split), phase, batch)
            counts = flows.setdefault(key, dict.fromkeys(self.works, 0.0))
            for remat in counts:
                counts[remat] += trips * (1.0 if again is None else again[remat])

        seen: set[Any] = set()
        for c in self.layout.table.contractions:
            again = {remat: ratio.get(self._signature(c), 0.0) for remat, ratio in self._recomputed.items()}
            if c.weight is None:
                self._gathered_keys(place, c, add, again)
                continue
            weight, x = self._names(c.weight), c.lhs if c.weight is c.rhs else c.rhs
            key = c.lhs_key if c.weight is c.rhs else c.rhs_key
            trained = (c.lhs_origin | c.rhs_origin) & (PARAM | BATCH) == PARAM | BATCH and (
                (c.lhs_origin if c.weight is c.rhs else c.rhs_origin) & PARAM
            )
            contracted = self._names(c.contracted)
            made = weight - contracted
            whole = weight | self._names(x)
            for axis in (CONTEXT, TENSOR):
                rows_in = axis in self._axes(place, contracted, among=whole)
                rows_out = axis in self._axes(place, made, among=weight)
                if rows_in:
                    scattered = axis == TENSOR and self._scattered(place, c.out)
                    add("reduce_scatter" if scattered else "all_reduce", axis, c.out, "forward", c.trips)
                    add("reduce_scatter" if scattered else "all_reduce", axis, c.out, "backward", c.trips, again)
                    if scattered:
                        add("all_gather", axis, c.out, "backward", c.trips)
                elif rows_out and axis not in self._axes(place, self._names(x)):
                    scattered = axis == TENSOR and self._scattered(place, x)
                    first = (key, axis) not in seen
                    seen.add((key, axis))
                    if scattered and first:
                        add("all_gather", axis, x, "forward", c.trips)
                        if c.trips > 1:
                            add("all_gather", axis, x, "backward", c.trips)
                    if trained and (first or not self.merges):
                        add("reduce_scatter" if scattered else "all_reduce", axis, x, "backward", c.trips)
            # A router makes the row of experts; experts' weights are multiplied one by one.
            if place.expert > 1 and (c.kind == "ragged" or self._has_experts(c.batch)) and self._has_experts(c.weight):
                if contracted & self._outside_experts and (key, EXPERT) not in seen:
                    seen.add((key, EXPERT))
                    add("all_to_all", EXPERT, x, "forward", c.trips)
                    add("all_to_all", EXPERT, x, "backward", c.trips)
                    add("all_to_all", EXPERT, x, "backward", c.trips, again)
                if made & self._outside_experts:
                    add("all_to_all", EXPERT, c.out, "forward", c.trips)
                    add("all_to_all", EXPERT, c.out, "backward", c.trips)
                    add("all_to_all", EXPERT, c.out, "backward", c.trips, again)
        out = [
            Flow(kind, (axis,), bytes_, split, phase, False, batch, counts)  # type: ignore[arg-type]
            for (kind, axis, bytes_, split, phase, batch), counts in flows.items()
        ]
        return out

    def _has_experts(self, dims: Any) -> bool:
        return any(self.layout.rows[name].role == "expert" for name in self._names(dims))

    def _scattered(self, place: Placement, dims: Any) -> bool:
        """Whether an activation is split along its length between blocks."""
        return any(place.spill[self._index[name]].any() for name in self._names(dims))

    def _signature(self, c: Contraction) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(self._names(c.contracted)), frozenset(self._names((*c.lhs, *c.rhs, *c.out)))

    def _gathered_keys(self, place: Placement, c: Contraction, add: Any, again: Mapping[str, float]) -> None:
        """Of two activations whose rows both want one mesh axis: the smaller is gathered, its gradient scattered."""
        if not (c.lhs_origin & c.rhs_origin & PARAM):
            return
        for axis in (CONTEXT, TENSOR):
            lhs, rhs, out = (
                sum(axis in self._axes(place, self._names((dim,)), among=self._names(dims)) for dim in dims)
                for dims in (c.lhs, c.rhs, c.out)
            )
            if not (lhs and rhs and max(lhs, rhs, out) > 1):
                if lhs and rhs and not out:
                    add("all_reduce", axis, c.out, "forward", c.trips)
                continue
            smaller = min((c.lhs, c.rhs), key=lambda dims: math.prod(size_of(dim) for dim in dims))
            one = smaller if lhs == rhs else c.lhs if lhs < rhs else c.rhs
            add("all_gather", axis, one, "forward", c.trips)
            add("all_gather", axis, one, "backward", c.trips)
            add("reduce_scatter", axis, one, "backward", c.trips)

    def _lookup_flows(self, place: Placement) -> list[Flow]:
        """Sums over a split row that no product makes: rows of an embedding, the softmax over a vocabulary."""
        flows: dict[Any, dict[str, float]] = {}
        for remat, work in self.works.items():
            for op in work.ops:
                if op.kind not in ("gather", "reduce"):
                    continue
                names = [
                    {n for dim in array.axes for n in dim if n in self._index} for array in (*op.reads, *op.writes)
                ]
                if TENSOR not in self._axes(place, set().union(*names[: len(op.reads)])):
                    continue
                for array, held in zip(op.writes, names[len(op.reads) :], strict=True):
                    batch = any(self.layout.rows[n].role == "batch" for n in held)
                    if not batch or TENSOR in self._axes(place, held):
                        continue
                    scattered = op.kind == "gather" and any(place.spill[self._index[n]].any() for n in held)
                    split = tuple(a for a in AXES if a in self._axes(place, held))
                    phase = "forward" if op.phase == "forward" else "backward"
                    kind = "reduce_scatter" if scattered else "all_reduce"
                    key = (kind, float(array.bytes), split, phase)
                    flows.setdefault(key, {})[remat] = flows.get(key, {}).get(remat, 0.0) + op.trips
        return [
            Flow(kind, (TENSOR,), bytes_, split, phase, False, True, counts)
            for (kind, bytes_, split, phase), counts in flows.items()
        ]


def param_flows(traffic: Sequence[Mapping[Any, float]]) -> list[Flow]:
    """Gathers and reduce-scatters of what lies split over fsdp, and the sum of gradients; bytes per fsdp size."""
    gathers: dict[Any, np.ndarray] = {}
    sums: dict[Any, np.ndarray] = {}
    for i, by_class in enumerate(traffic):
        for (split, gathered, trips, floating, itemsize, region), bytes_ in by_class.items():
            if gathered:
                found = gathers.setdefault((split, trips, floating, region), np.zeros(len(traffic)))
                found[i] += bytes_ / trips
            if floating:
                axes = tuple(a for a in (*BATCH_AXES, CONTEXT) if a not in split and not (gathered and a == FSDP))
                held = (*split, FSDP) if gathered else split
                found = sums.setdefault((axes, held, region), np.zeros((2, len(traffic))))
                found[:, i] += bytes_, bytes_ * max(1.0, 4 / itemsize)
    flows = []
    for (split, trips, floating, region), bytes_ in gathers.items():
        count = {"": float(trips)}
        flows.append(Flow("all_gather", (FSDP,), bytes_, split, "forward", True, False, count, region=region))
        # Outside of loops the compiler keeps what it gathered for the backward pass (seen in XLA's HLO).
        if trips > 1:
            flows.append(
                Flow("all_gather", (FSDP,), bytes_, split, "backward", True, False, count, region=region, again=True)
            )
        if floating:
            flows.append(Flow("reduce_scatter", (FSDP,), bytes_, split, "backward", True, False, count, region=region))
    for (axes, held, region), (bytes_, summed) in sums.items():
        flows.append(Flow("all_reduce", axes, bytes_, held, "step", True, False, {"": 1.0}, summed, region))
    return flows


def _recompute_ratio(work: Workload) -> dict[tuple[frozenset[str], frozenset[str]], float]:
    """Of products with the same rows, how many of the forward pass the backward pass makes again."""
    forward: dict[Any, float] = {}
    again: dict[Any, float] = {}
    for op in work.ops:
        if op.k and op.phase != "backward":
            key = (frozenset(op.contracted), frozenset(op.axes))
            side = forward if op.phase == "forward" else again
            side[key] = side.get(key, 0.0) + op.trips
    return {key: again.get(key, 0.0) / trips for key, trips in forward.items()}
