"""The collectives that a placement needs, read off the contractions of the model: `search.placement.Flow`s.

traffic = ActivationTraffic(layout, works, activation_width=2, merges=True)
flows = [*traffic.flows(placement), *param_flows(traffic_by_fsdp_size, merges=True, expert=placement.expert)]

What they are follows from the pins of `sharding_rules` and from what XLA makes of them, as compiled for CPUs and TPUs
(`benchmarks/collectives_compiled.py`):

* A product over a split row leaves partial sums: all-reduced forward (row parallel). One whose weight's other row is
  split has a partial input gradient: all-reduced backward, once per activation (column parallel). With sequence
  parallelism each of the two is a reduce-scatter and an all-gather, and in a loop the input is gathered once more for
  the weight's gradient.
* Over context, keys and values are gathered and their gradients scattered; in a loop they are gathered once more. Where
  attention is one kernel they are kept for its backward pass, and gathered once more only if the kernel runs once more.
* With more tensor shards than heads of keys, keys and values are whole: their gradients are summed over the shards of
  one head, then gathered.
* A concatenated weight (fused QKV, gate and up) is used part by part: what lies elsewhere moves between neighbours. XLA
  moves that much over 2 shards, and 2 to 4 times as much over more.
* What enters and leaves experts moves in all-to-alls. Calls of `experts` gather tokens over the axis that splits the
  experts, once more in the backward pass, and scatter results; other axes see tokens, not a row for each choice.
* Gradients of what fsdp splits are reduce-scattered; where another axis splits the batch too, they are all-reduced over
  both, whole, and then cut.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Var

from search.placement import Flow, Placement
from search.regions import Region, count_layers, op_regions, sequence_regions
from search.workload import Workload
from sharding_rules import AXES, BATCH_AXES, CONTEXT, EXPERT, FSDP, TENSOR, ExpertsCall, Layout
from sharding_rules.axes import BATCH, PARAM, Contraction, Dims, Scope, leaves, shape_of, size_of
from sharding_rules.primitives import ELEMENTWISE
from sharding_rules.roles import spread

_BIT = {axis: 1 << i for i, axis in enumerate(AXES)}
SHARDED = ("all_to_all", "permute")
"""Kinds whose buffer is a shard of what the axis splits."""
_AXES_OF = [tuple(axis for axis in AXES if bits & _BIT[axis]) for bits in range(1 << len(AXES))]


@dataclasses.dataclass(frozen=True)
class _Array:
    """An operand: rows per dimension, as bits, and its elements."""

    dims: tuple[int, ...]
    elements: int

    @property
    def rows(self) -> int:
        return _union(self.dims)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A contraction as traffic sees it; rows are bits.

    Attributes:
        weight, keys: which operand (0 or 1) is the weight, and the keys or values of attention.
        segments: of each concatenation in the weight, the rows inside and the number of segments.
        called: of a call of `experts`, whose rows are counted as tokens.
        wide: how many times wider than other activations the one is that it takes, and its gradient (a router's, in
            float32); what is gathered is so before it is cast.
        merges: whether its input's gradient is summed with those of other products.
        again: how often it is repeated, per rematerialisation.
    """

    lhs: _Array
    rhs: _Array
    out: _Array
    weight: int | None
    contracted: int
    attention: bool
    keys: int | None
    trained: bool
    segments: tuple[tuple[int, int], ...]
    ragged: bool
    called: bool
    wide: int
    merges: bool
    batch: int
    region: Region
    trips: int
    again: tuple[float, ...]

    def operand(self, side: int) -> _Array:
        return (self.lhs, self.rhs)[side]


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A gather or a reduction: rows that it reads, and what it makes; times per rematerialisation."""

    scatters: bool
    read: int
    made: int
    bytes: int
    phase: str
    region: Region


class _Split:
    """Mesh axes of rows under one placement, as bits; remembers what it was asked."""

    def __init__(self, place: Placement):
        weights = np.array([_BIT[axis] for axis in AXES])
        self._rows = (place.rows @ weights).tolist()
        self._spill = (place.spill @ weights).tolist()
        self.spilled = _bits(np.flatnonzero(self._spill))
        self.beyond = _bits(np.flatnonzero(place.beyond))
        self.groups = _bits(np.flatnonzero(place.groups))
        self._known: dict[tuple[int, int], int] = {}

    def axes(self, rows: int, among: int | None = None) -> int:
        """Axes that split something with these rows; keys split beyond their heads need groups in the whole."""
        among = rows if among is None else among
        key = (rows, among)
        if key not in self._known:
            grouped = bool(self.groups & among)
            found = 0
            for i in _indices(rows):
                found |= self._rows[i] & (-1 if grouped or not self.beyond >> i & 1 else ~_BIT[TENSOR])
            self._known[key] = found
        return self._known[key]


class ActivationTraffic:
    """Collectives of activations.

    Args:
        layout: of the model, on any mesh.
        works: rematerialisation -> workload.
        activation_width: bytes of an element.
        merges: whether products of one activation share the sum of its gradient. Those of one that goes to experts
            too do not: the experts' sum stands between theirs.
    """

    def __init__(self, layout: Layout, works: Mapping[Any, Workload], *, activation_width: int, merges: bool):
        self.layout, self.works = layout, works
        self.activation_width, self.merges = activation_width, merges
        self._index = {row.name: i for i, row in enumerate(layout.rows.rows)}
        roles: dict[str, int] = collections.defaultdict(int)
        for i, row in enumerate(layout.rows.rows):
            roles[row.role] |= 1 << i
        self._batch, self._experts = roles["batch"], roles["expert"]
        self._sizes = [row.size for row in layout.rows.rows]
        self._outside_experts = self._rows_outside_experts()
        self._inside = {row.name: self._rows([(axis,) for axis in row.axes]) for row in layout.rows.rows}
        calls = [c.operands for c in layout.table.calls.values() if isinstance(c.call, ExpertsCall)]
        self._dispatched = {id(operands[0]) for operands in calls}
        self._chosen = max((shape_of(operands[1])[-1] for operands in calls), default=0)
        """Experts per token, of calls of `experts`."""
        layers = count_layers(layout)
        self._kernel_again = _kernel_ratios(self.works.values())
        self._bundles = self._read_products(layers)
        self._lookups = self._read_lookups(layers)

    def flows(self, place: Placement) -> list[Flow]:
        """Collectives of one placement."""
        split = _Split(place)
        found = _Flows(tuple(self.works), self.activation_width, split, self._batch)
        for bundle, count in self._bundles.items():
            self._bundle(place, split, bundle, count, found)
        for lookup, counts in self._lookups.items():
            self._lookup(split, lookup, counts, found)
        return found.flows()

    # Reading the model, once.

    def _rows(self, dims: Iterable[Any]) -> int:
        rows = 0
        for dim in dims:
            for axis in spread(dim):
                row = self.layout.rows.of(axis)
                if row is not None:
                    rows |= 1 << self._index[row.name]
        return rows

    def _array(self, dims: Dims) -> _Array:
        return _Array(tuple(self._rows((dim,)) for dim in dims), math.prod(size_of(dim) for dim in dims))

    def _rows_outside_experts(self) -> int:
        """Rows of parameters that no expert has: what enters and leaves the experts."""
        out = 0
        for dims in self.layout.table.inputs(self.layout.params):
            rows = self._rows(dims)
            out |= 0 if rows & self._experts else rows
        return out

    def _read_products(self, layers: int) -> collections.Counter[tuple[_Product, ...]]:
        """Products of one activation, in order, and how often such bundles occur."""
        ratios = [_recompute_ratio(work) for work in self.works.values()]
        contractions = self.layout.table.contractions
        signatures = [self._signature(c) for c in contractions]
        occurrences: collections.Counter[Any] = collections.Counter()
        for signature, c in zip(signatures, contractions, strict=True):
            occurrences[signature] += c.trips
        regions = sequence_regions([layers > 1 and occurrences[s] % layers == 0 for s in signatures])
        bundles: dict[Any, list[_Product]] = {}
        for i, (c, signature, region) in enumerate(zip(contractions, signatures, regions, strict=True)):
            product = self._product(c, region, tuple(ratio.get(signature, 0.0) for ratio in ratios))
            activation = None if product.weight is None else (c.rhs_key, c.lhs_key)[product.weight]
            bundles.setdefault(("alone", i) if activation is None else (id(activation), c.trips), []).append(product)
        return collections.Counter(tuple(bundle) for bundle in bundles.values())

    def _product(self, c: Contraction, region: Region, again: tuple[float, ...]) -> _Product:
        weight = None if c.weight is None else int(c.weight is c.rhs)
        origin = 0 if weight is None else (c.rhs_origin, c.lhs_origin)[weight]
        segments = [a.segments for dim in c.weight or () for a in leaves(dim) if a.segments]
        inside = [(self._rows(found), sum(size_of(part) > 1 for part in found)) for found in segments]
        keys = self.layout.table.keys.get(c.out_key, ())
        rhs_from = len(c.lhs) - len(c.contracted)
        lhs, rhs, out = (self._array(dims) for dims in (c.lhs, c.rhs, c.out))
        called = c.kind == "ragged" and self._chosen > 0
        if called:
            lhs, out = (dataclasses.replace(x, elements=x.elements // self._chosen) for x in (lhs, out))
        activation = None if weight is None else (c.rhs_key, c.lhs_key)[weight]
        return _Product(
            lhs=lhs,
            rhs=rhs,
            out=out,
            weight=weight,
            contracted=self._rows(c.contracted),
            attention=bool(c.lhs_origin & c.rhs_origin & PARAM),
            keys=int(keys[0] >= rhs_from) if keys else None,
            trained=(c.lhs_origin | c.rhs_origin) & (PARAM | BATCH) == PARAM | BATCH and bool(origin & PARAM),
            segments=tuple(inside),
            ragged=c.kind == "ragged",
            called=called,
            wide=max(1, _itemsize(activation) // self.activation_width),
            merges=self.merges and id(activation) not in self._dispatched,
            batch=self._rows(c.batch),
            region=region,
            trips=c.trips,
            again=again,
        )

    def _signature(self, c: Contraction) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(self._names(c.contracted)), frozenset(self._names((*c.lhs, *c.rhs, *c.out)))

    def _names(self, dims: Any) -> set[str]:
        return {r.name for dim in dims for axis in leaves(dim) if (r := self.layout.rows.of(axis))}

    def _read_lookups(self, layers: int) -> dict[_Lookup, list[float]]:
        found: dict[_Lookup, list[float]] = {}
        for k, work in enumerate(self.works.values()):
            merged = work.merged()
            for op, region in zip(merged.ops, op_regions(merged, layers), strict=True):
                if op.kind not in ("gather", "reduce"):
                    continue
                read = self._named(n for array in op.reads for dim in array.axes for n in dim)
                read |= self._named(op.contracted)
                for array in op.writes:
                    made = self._named(n for dim in array.axes for n in dim)
                    phase = "forward" if op.phase == "forward" else "backward"
                    lookup = _Lookup(op.kind == "gather", read, made, array.bytes, phase, region)
                    found.setdefault(lookup, [0.0] * len(self.works))[k] += op.trips
        return found

    def _named(self, names: Iterable[str]) -> int:
        return _union(self._inside[name] for name in names if name in self._inside)

    # One placement.

    def _bundle(self, place: Placement, split: _Split, bundle: tuple[_Product, ...], count: int, found: _Flows) -> None:
        summed: set[str] = set()
        routed = False
        for p in bundle:

            def add(kind: str, axis: str, array: _Array, phase: str, again: Sequence[float] | None = None, p=p):
                found.add(kind, axis, array, phase, p.region, count * p.trips, again)

            if p.weight is None:
                self._gathered_keys(split, p, add)
                continue
            x, weight = p.operand(1 - p.weight), p.operand(p.weight).rows
            made = weight & ~p.contracted
            # A concatenation that is split part by part is multiplied part by part.
            cut = (n for rows, n in p.segments if rows & made and split.axes(rows, weight) & _BIT[TENSOR])
            parts = max(cut, default=1)
            for axis in (CONTEXT, TENSOR):
                bit = _BIT[axis]
                if split.axes(p.contracted, weight | x.rows) & bit:
                    scattered = axis == TENSOR and bool(split.spilled & p.out.rows)
                    kind = "reduce_scatter" if scattered else "all_reduce"
                    add(kind, axis, p.out, "forward")
                    if not p.called:  # tokens alone are kept of a call: its backward pass needs no sum of its results
                        add(kind, axis, p.out, "backward", p.again)
                    if scattered:
                        add("all_gather", axis, p.out, "backward")
                elif split.axes(made, weight) & bit and not split.axes(x.rows) & bit:
                    scattered = axis == TENSOR and bool(split.spilled & x.rows)
                    first = axis not in summed
                    summed.add(axis)
                    if scattered and first:
                        add("all_gather", axis, x, "forward")
                        if p.trips > 1:
                            add("all_gather", axis, x, "backward")
                    if p.trained and (first or not p.merges):
                        wide = dataclasses.replace(x, elements=x.elements * p.wide)
                        for _ in range(1 if p.merges else parts):
                            add("reduce_scatter" if scattered else "all_reduce", axis, wide, "backward")
            if parts > 1:
                # Shards are contiguous, each part is split by itself: what is elsewhere moves, at least so much.
                part = dataclasses.replace(p.operand(p.weight), elements=p.operand(p.weight).elements // parts)
                for _ in range(parts):
                    add("permute", TENSOR, part, "forward")
                    add("permute", TENSOR, part, "backward", p.again)
                    if p.trained:
                        add("permute", TENSOR, part, "backward")
            if split.axes(x.rows & ~weight, x.rows) & _BIT[TENSOR] and not split.axes(weight) & _BIT[TENSOR]:
                # Its gradient is a sum over what tensor splits.
                add("all_reduce", TENSOR, p.operand(p.weight), "backward")
            # A router makes the row of experts; experts' weights are multiplied one by one.
            if place.expert > 1 and p.called:
                if p.contracted & self._outside_experts and not routed:
                    routed = True
                    add("all_gather", EXPERT, x, "forward")
                    add("all_gather", EXPERT, x, "backward")
                    add("reduce_scatter", EXPERT, x, "backward")
                if made & self._outside_experts:
                    add("reduce_scatter", EXPERT, p.out, "forward")
                    add("all_gather", EXPERT, p.out, "backward")
            elif place.expert > 1 and weight & self._experts and (p.ragged or p.batch & self._experts):
                if p.contracted & self._outside_experts and not routed:
                    routed = True
                    add("all_to_all", EXPERT, x, "forward")
                    add("all_to_all", EXPERT, x, "backward")
                    add("all_to_all", EXPERT, x, "backward", p.again)
                if made & self._outside_experts:
                    add("all_to_all", EXPERT, p.out, "forward")
                    add("all_to_all", EXPERT, p.out, "backward")
                    add("all_to_all", EXPERT, p.out, "backward", p.again)

    def _gathered_keys(self, split: _Split, p: _Product, add: Callable[..., None]) -> None:
        """Of two activations whose rows want one mesh axis, the keys or values are gathered, their gradient scattered.

        Without a sign of which those are, it is the one with fewer split dimensions, or the smaller.
        """
        if not p.attention:
            return
        for axis in (CONTEXT, TENSOR):
            bit = _BIT[axis]
            lhs, rhs, out = (
                sum(bool(split.axes(dim, array.rows) & bit) for dim in array.dims) for array in (p.lhs, p.rhs, p.out)
            )
            if lhs and rhs and max(lhs, rhs, out) > 1:
                smaller = int(p.rhs.elements < p.lhs.elements)
                one = p.operand(int(rhs < lhs) if lhs != rhs else smaller if p.keys is None else p.keys)
                add("all_gather", axis, one, "forward")
                # Outside of loops, what was gathered is kept unless it is computed again.
                again = None if p.trips > 1 else p.again
                add("all_gather", axis, one, "backward", self._kernel_again or again)
                add("reduce_scatter", axis, one, "backward")
            elif lhs and rhs and not out:
                add("all_reduce", axis, p.out, "forward")
        for one in (p.lhs, p.rhs):
            if one.rows & split.beyond and not one.rows & split.groups:
                heads = math.prod(self._sizes[i] for i in _indices(one.rows & split.beyond))
                add("all_reduce", TENSOR, dataclasses.replace(one, elements=one.elements // heads), "backward")
                add("all_gather", TENSOR, one, "backward")

    def _lookup(self, split: _Split, op: _Lookup, counts: Sequence[float], found: _Flows) -> None:
        """Sums over a split row that no product makes: rows of an embedding, the softmax over a vocabulary."""
        batch = bool(op.made & self._batch)
        if not batch or not split.axes(op.read) & _BIT[TENSOR] or split.axes(op.made) & _BIT[TENSOR]:
            return
        scattered = op.scatters and bool(op.made & split.spilled)
        kind = "reduce_scatter" if scattered else "all_reduce"
        found.count((kind, TENSOR, float(op.bytes), split.axes(op.made), op.phase, True, op.region), counts)
        if scattered and op.phase == "forward":
            key = ("all_gather", TENSOR, float(op.bytes), split.axes(op.made), "backward", True, op.region)
            found.count(key, counts)


def _itemsize(var: Var | None) -> int:
    return 0 if var is None else int(var.aval.dtype.itemsize)  # pyright: ignore[reportAttributeAccessIssue]


class _Flows:
    """Flows of one placement that are alike, with the sum of their counts per rematerialisation."""

    def __init__(self, remats: Sequence[Any], width: int, split: _Split, batch: int):
        self.remats, self.width, self.split, self.batch = remats, width, split, batch
        self._counts: dict[Any, list[float]] = {}

    def add(
        self, kind: str, axis: str, array: _Array, phase: str, region: Region, times: float, again: Any = None
    ) -> None:
        rows = array.rows
        split = self.split.axes(rows) & (-1 if kind in SHARDED else ~_BIT[axis])
        key = (kind, axis, float(self.width * array.elements), split, phase, bool(rows & self.batch), region)
        self.count(key, [times] * len(self.remats) if again is None else [times * a for a in again])

    def count(self, key: Any, times: Sequence[float]) -> None:
        if any(times):
            counts = self._counts.setdefault(key, [0.0] * len(self.remats))
            counts[:] = [a + b for a, b in zip(counts, times, strict=True)]

    def flows(self) -> list[Flow]:
        return [
            Flow(
                kind,
                (axis,),
                bytes_,
                _AXES_OF[split if kind in SHARDED else split & ~_BIT[axis]],
                phase,
                hides=False,
                batch=batch,
                count=dict(zip(self.remats, counts, strict=True)),
                region=region,
            )
            for (kind, axis, bytes_, split, phase, batch, region), counts in self._counts.items()
        ]


def param_flows(traffic: Sequence[Mapping[Any, float]], *, merges: bool, expert: int) -> list[Flow]:
    """Gathers of what lies split over fsdp, and the sums of gradients; bytes per fsdp size.

    Args:
        traffic: per fsdp size, the last being the one without data parallelism: bytes by mesh axes that split a
            parameter while computing, whether fsdp is gathered besides, trips, whether it has a gradient, bytes of an
            element, number of its gradients that are summed apart, region, and whether it is a matrix of experts.
        merges: whether the compiler makes one sum of those over the batch and over context.
        expert: size of the mesh axis.
    """
    gathers: dict[Any, np.ndarray] = {}
    sums: dict[Any, np.ndarray] = {}
    last = len(traffic) - 1
    for i, by_class in enumerate(traffic):
        for (split, gathered, trips, floating, itemsize, parts, region, of_experts), bytes_ in by_class.items():
            if gathered:
                found = gathers.setdefault((split, trips, region), np.zeros(len(traffic)))
                found[i] += bytes_ / trips
            if not floating:
                continue
            batch = tuple(axis for axis in BATCH_AXES if axis not in split)
            kinds: list[tuple[str, tuple[str, ...]]] = [("all_reduce", batch)]
            if gathered and i == last and (expert == 1 or EXPERT not in batch):
                kinds = [("reduce_scatter", (FSDP,))]
            if merges and kinds[0][0] == "all_reduce":
                kinds = [("all_reduce", (*batch, CONTEXT))]
            else:
                kinds.insert(0, ("all_reduce", (CONTEXT,)))
            for kind, axes in kinds:
                # What is gathered in a loop or not is summed in the backward pass that made it.
                waits = kind == "reduce_scatter" or of_experts
                key = (kind, axes, split, trips if gathered else 0, region, waits)
                found = sums.setdefault(key, np.zeros((2, len(traffic))))
                found[:, i] += parts * bytes_, parts * bytes_ * max(1.0, 4 / itemsize)
    flows = []
    loops = any(trips > 1 for by_class in traffic for _, _, trips, *_ in by_class)
    for (split, trips, region), bytes_ in gathers.items():
        count = {"": float(trips)}
        flows.append(Flow("all_gather", (FSDP,), bytes_, split, "forward", True, False, count, region=region))
        # What is gathered outside of loops is kept for the backward pass, unless what it is used in is computed again,
        # which without loops over layers is every stretch between two blocks.
        if trips == 1:
            count = {"": 0.0 if loops else 1.0, "none": 0.0}
        if any(count.values()):
            flows.append(
                Flow("all_gather", (FSDP,), bytes_, split, "backward", True, False, count, region=region, again=True)
            )
    for (kind, axes, split, trips, region, waits), (bytes_, summed) in sums.items():
        if trips:
            count = {"": float(trips)}
            one = Flow(kind, axes, bytes_ / trips, split, "backward", True, False, count, region=region, waits=waits)
        else:
            one = Flow(kind, axes, bytes_, split, "step", True, False, {"": 1.0}, summed, region, waits=waits)
        flows.append(one)
    return flows


SAME_SUM = frozenset(
    ("broadcast_in_dim", "reshape", "transpose", "convert_element_type", "squeeze", "expand_dims", "copy", *ELEMENTWISE)
)
"""What leaves a gradient as large as it was when it is summed over devices: broadcast ones are summed before."""


def gradient_sums(layout: Layout, *, merges: bool) -> list[float]:
    """Elements of each parameter's gradients that are summed over devices, over its own elements; in leaf order.

    A gradient is summed where the weight, or what is computed from it alone (a table of positions looked up once for
    all layers), meets the batch. A weight used several times (a tied table) has several, one where they are merged.
    """
    scope = layout.table.scope
    variables = scope.jaxpr.invars[layout.traced.arg_slice(layout.params)]
    sizes = [max(1, math.prod(shape_of(var))) for var in variables]
    total = [0.0] * len(variables)

    def visit(scope: Scope, known: dict[Var, tuple[int, float]]) -> None:
        uses: collections.Counter[Var] = collections.Counter()
        for position, eqn in enumerate(scope.jaxpr.eqns):
            here = [a for a in dict.fromkeys(a for a in eqn.invars if isinstance(a, Var)) if a in known]
            if not here:
                continue
            largest = max(here, key=lambda a: known[a][1])
            if all(scope.origin[var] == PARAM for var in eqn.outvars):
                index, size = known[largest]
                if eqn.primitive.name in SAME_SUM:
                    known |= dict.fromkeys(eqn.outvars, (index, size))
                else:
                    per_element = size / max(1, math.prod(shape_of(largest)))
                    known |= {var: (index, per_element * math.prod(shape_of(var))) for var in eqn.outvars}
                continue
            children = scope.children.get(position)
            if not children:
                uses.update(here)
            for child in children or ():
                atoms = eqn.invars[len(eqn.invars) - len(child.jaxpr.invars) :]
                if len(atoms) < len(child.jaxpr.invars):
                    continue
                inner: dict[Var, tuple[int, float]] = {}
                for var, atom in zip(child.jaxpr.invars, atoms, strict=True):
                    if isinstance(atom, Var) and atom in known:
                        inner[var] = known[atom]
                visit(child, inner)
        for var, count in uses.items():
            index, size = known[var]
            total[index] += size * (1 if merges else count)

    visit(scope, {var: (i, float(n)) for i, (var, n) in enumerate(zip(variables, sizes, strict=True))})
    return [max(1.0, t / n) for t, n in zip(total, sizes, strict=True)]


def _union(rows: Iterable[int]) -> int:
    union = 0
    for row in rows:
        union |= row
    return union


def _bits(indices: Iterable[int]) -> int:
    return _union(1 << int(i) for i in indices)


def _indices(rows: int) -> list[int]:
    return [i for i in range(rows.bit_length()) if rows >> i & 1]


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


def _kernel_ratios(works: Iterable[Workload]) -> list[float]:
    """Of the attention kernels of the forward pass, how many the backward pass runs again; empty without kernels."""
    out = []
    for work in works:
        phases = collections.Counter()
        for op in work.ops:
            if op.kind == "attention":
                phases[op.phase] += op.trips
        if not phases["forward"]:
            return []
        out.append(sum(n for phase, n in phases.items() if phase not in ("forward", "backward")) / phases["forward"])
    return out
