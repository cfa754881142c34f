"""The declared space of plans: every mesh, sequence parallelism, rematerialisation and number of microbatches.

    model = TracedModel(traced, abstract_opt_state, cluster)
    space = Space(model, cluster, fix={"tensor": 4}, forbid=("context",))
    for inner in space.inner_meshes():
        placement = model.place(inner)                 # a Placement, or the reason why there is none
        columns = space.columns(placement)             # its candidates, as arrays

Inner sizes (expert, context, tensor, sequence) make a placement; the rest of the devices are split between data and
fsdp. A candidate is legal if `Layout.on` accepts its mesh and preset, the batch divides by the devices that split it,
and the microbatches divide what each of those has. Pipeline stages are not in the space: the step does not run them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from search.cluster import Cluster
from search.cost import Columns, CostModel, Efficiency, Flow, Placement
from search.memory import activation_bytes
from search.plan import Plan, Remat
from search.workload import Workload, workload
from sharding_rules import (
    AXES,
    BATCH_AXES,
    CONTEXT,
    DATA,
    EXPERT,
    FSDP,
    STAGE,
    TENSOR,
    Layout,
    MeshShape,
    PlanError,
    TracedFunction,
    make_layout,
    tree_paths,
)
from sharding_rules.axes import BATCH, PARAM, Contraction, leaves, size_of
from sharding_rules.partition import param_shares, tree_bytes

HEADROOM = 0.85
"""Share of a device's usable memory that a plan may count on, as in `search.auto`."""
REMATS: tuple[Remat, ...] = ("none", "dots", "full")
CHOICES = (*AXES, "sequence", "remat", "microbatches")


@dataclasses.dataclass(frozen=True, order=True)
class Inner:
    """What a placement is made for: sizes of the inner mesh axes, and the devices left for data and fsdp."""

    tensor: int
    context: int
    expert: int
    sequence: bool
    batch_shards: int

    def mesh(self, fsdp: int = 1) -> MeshShape:
        return MeshShape(
            data=self.batch_shards // fsdp, fsdp=fsdp, expert=self.expert, context=self.context, tensor=self.tensor
        )

    def preset(self, fsdp: int = 1) -> str:
        """The preset that uses these axes."""
        parts = ["fsdp"] * (fsdp > 1) + ["megatron"] * (self.tensor > 1) + ["sequence"] * self.sequence
        return "+".join(parts) or "data"


class Model(Protocol):
    """What is planned: a traced model, or anything that places itself and counts its bytes."""

    costs: CostModel
    batch: int
    """Examples in the global batch."""
    tokens: int
    """Elements of the largest integer array of the batch, or its examples."""
    has_experts: bool
    """Whether a row of experts exists: without one, the expert axis would be another name for data."""
    dtypes: Mapping[str, str]
    """`param_dtype` and `compute_dtype` of plans."""

    def place(self, inner: Inner) -> Placement | str:
        """The placement, or why there is none."""
        ...

    def activation_bytes(self, place: Placement, remat: str) -> int:
        """Bytes per device that the backward pass keeps in one microbatch that is the whole batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Space:
    """Candidates for a number of devices, under constraints.

    Attributes:
        model: what is planned.
        cluster: where.
        fix: choice -> value: a mesh axis and its size, `sequence` (bool), `remat`, `microbatches`.
        forbid: mesh axes that stay 1, or `sequence`.
        memory_share: of a device's usable memory that a plan may count on.
        allow_idle: also plans that leave devices unused.
    """

    model: Model
    cluster: Cluster
    fix: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    forbid: Sequence[str] = ()
    memory_share: float = HEADROOM
    allow_idle: bool = False

    def __post_init__(self):
        for name in (*self.fix, *self.forbid):
            if name not in CHOICES:
                raise ValueError(f"no choice called {name!r}; there are {', '.join(CHOICES)}")
        if self.fix.get(STAGE, 1) != 1:
            raise PlanError(
                f"stage={self.fix[STAGE]}: pipeline stages are not run by this step; give its devices to data"
            )
        if "remat" in self.fix and self.fix["remat"] not in self.model.costs.remats:
            raise ValueError(f"remat={self.fix['remat']!r}; one of {', '.join(self.model.costs.remats)}")
        both = set(self.fix) & set(self.forbid)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is both fixed and forbidden")
        wanted = math.prod(int(self.fix.get(axis, 1)) for axis in AXES)
        if self.cluster.devices % wanted:
            raise PlanError(
                f"the sizes that are fixed take {wanted} devices, which do not divide the {self.cluster.devices} of "
                f"{self.cluster.name}; the nearest number that does is {_nearest(wanted, self.cluster.devices)}"
            )

    @property
    def budget_bytes(self) -> float:
        """Memory of a device that a plan may use."""
        return self.memory_share * self.cluster.accelerator.usable_memory_bytes

    def inner_meshes(self) -> list[Inner]:
        """Every choice of inner sizes, legal or not."""
        n, out = self.cluster.devices, []
        for used in _divisors(n) if self.allow_idle else [n]:
            for expert in self._sizes(EXPERT, used):
                for context in self._sizes(CONTEXT, used // expert):
                    for tensor in self._sizes(TENSOR, used // (expert * context)):
                        rest = used // (expert * context * tensor)
                        if self._outer(rest):
                            out += [Inner(tensor, context, expert, s, rest) for s in self._sequence(tensor)]
        return sorted(out)

    def columns(self, place: Placement) -> Columns:
        """The candidates of a placement: fsdp, rematerialisation and microbatches."""
        allowed = set(self._outer(place.batch_shards))
        fsdp = [i for i, size in enumerate(place.fsdp_sizes) if size in allowed]
        remats = self.model.costs.remats
        remat = [i for i, name in enumerate(remats) if name == self.fix.get("remat", name)]
        parts = _divisors(self.model.batch // (place.batch_shards * place.expert))
        parts = [m for m in parts if m == self.fix.get("microbatches", m)]
        grid = np.meshgrid(fsdp, remat, parts, indexing="ij")
        return Columns(*(np.asarray(axis.ravel(), np.int64) for axis in grid))

    def plan(self, place: Placement, fsdp: int, remat: str, microbatches: int, **fields: Any) -> Plan:
        """The plan of one candidate."""
        inner = Inner(place.tensor, place.context, place.expert, place.sequence, place.batch_shards)
        size = place.fsdp_sizes[fsdp]
        return Plan(inner.mesh(size), inner.preset(size), (), microbatches, remat, **{**self.model.dtypes, **fields})  # type: ignore[arg-type]

    def _sizes(self, axis: str, devices: int) -> list[int]:
        if axis in self.forbid or (axis == EXPERT and not self.model.has_experts and axis not in self.fix):
            return [1]
        return [n for n in _divisors(devices) if n == self.fix.get(axis, n)]

    def _sequence(self, tensor: int) -> list[bool]:
        options = [False, True] if tensor > 1 and "sequence" not in self.forbid else [False]
        return [s for s in options if s == self.fix.get("sequence", s)]

    def _outer(self, rest: int) -> list[int]:
        """Sizes of fsdp, where data takes what is left."""
        sizes = self._sizes(FSDP, rest)
        return [f for f in sizes if rest // f == self.fix.get(DATA, 1 if DATA in self.forbid else rest // f)]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(wanted: int, devices: int) -> int:
    return min(_divisors(devices), key=lambda d: abs(math.log(d / wanted)))


@dataclasses.dataclass(frozen=True)
class _ParamClass:
    """Parameters that are split alike: same axes and shape."""

    path: str
    dims: Any
    elements: int
    count: int
    itemsize: int
    floating: bool
    trips: int
    optimizer_bytes: int


class TracedModel:
    """A traced loss as something to plan.

    Args:
        traced: the loss on the whole global batch, with arguments `params` and `batch`.
        abstract_opt_state: shapes of the optimizer's state.
        cluster: accelerators and links.
        efficiency: constants of the cost model.
        param_dtype: dtype of the stored parameters; gradients are summed in float32 or wider.
        fused_attention: cost attention as one operation.
        remats: which rematerialisations to consider.
    """

    def __init__(
        self,
        traced: TracedFunction,
        abstract_opt_state: Any,
        cluster: Cluster,
        *,
        efficiency: Efficiency | None = None,
        param_dtype: str = "float32",
        fused_attention: bool = False,
        remats: Sequence[Remat] = REMATS,
    ):
        self.layout = make_layout(traced, MeshShape(), "data")
        self.works: dict[Remat, Workload] = {
            r: workload(traced, remat=r, fused_attention=fused_attention) for r in remats
        }
        batch_rows = [row.name for row in self.layout.rows.rows if row.role == "batch"]
        self.costs = CostModel(cluster, self.works, batch_rows=batch_rows, efficiency=efficiency)
        arrays = jax.tree.leaves(traced.arg("batch"))
        self.batch = max((x.shape[0] for x in arrays if x.shape), default=1)
        ids = [math.prod(x.shape) for x in arrays if jnp.issubdtype(x.dtype, jnp.integer) and len(x.shape) > 1]
        self.tokens = max(ids, default=self.batch)
        self.has_experts = any(row.role == "expert" for row in self.layout.rows.rows)
        self.dtypes = {"param_dtype": param_dtype, "compute_dtype": self.costs.dtype}
        self.merges = cluster.accelerator.kind != "cpu"
        """Whether products of one activation share the sum of its gradient; XLA for CPUs sums each alone."""
        self.opt_state = abstract_opt_state
        self.width = jnp.dtype(param_dtype).itemsize
        self.activation_width = _itemsize(self.costs.dtype)
        self._recomputed = {r: _recompute_ratio(work) for r, work in self.works.items()}
        self._index = {row.name: i for i, row in enumerate(self.layout.rows.rows)}
        self._outside_experts = self._rows_outside_experts()
        self._classes, self._whole_optimizer = self._param_classes()
        self._placed: dict[Inner, Placement | str] = {}
        self._kept: dict[tuple[int, ...], Any] = {}
        self._activations: dict[tuple[Inner, str], int] = {}

    # Placing.

    def place(self, inner: Inner) -> Placement | str:
        """The placement of some inner sizes, or the reason why it is not legal."""
        if inner not in self._placed:
            self._placed[inner] = self._place(inner)
        return self._placed[inner]

    def _place(self, inner: Inner) -> Placement | str:
        mesh = inner.mesh()
        if self.batch % mesh.batch_shards:
            return f"a batch of {self.batch} does not split over {mesh.batch_shards} devices"
        try:
            layout = self.layout.on(mesh, inner.preset())
        except PlanError as error:
            return str(error)
        if inner.sequence and not layout.assignment.spill:
            return f"no length divides by tensor={inner.tensor}"
        rows = self.layout.rows.rows
        compute = np.array([[axis in layout.assignment.compute.get(row.name, ()) for axis in AXES] for row in rows])
        spill = np.array([[axis in layout.assignment.spill.get(row.name, ()) for axis in AXES] for row in rows])
        beyond = [
            row.role == "kv_heads" and compute[i, -1] and row.size % inner.tensor > 0 for i, row in enumerate(rows)
        ]
        sizes = tuple(_divisors(inner.batch_shards))
        kept = [self._kept_bytes(layout, inner, fsdp) for fsdp in sizes]
        params, gradients, optimizer = np.array([k[0] for k in kept], np.float64).T
        place = Placement(
            expert=inner.expert,
            context=inner.context,
            tensor=inner.tensor,
            batch_shards=inner.batch_shards,
            sequence=inner.sequence,
            rows=compute,
            spill=spill,
            beyond=np.array(beyond),
            groups=np.array([row.role == "groups" for row in rows]),
            fsdp_sizes=sizes,
            flows=(),
            # Reads everything once and writes parameters and state back.
            optimizer_bytes=2 * params + gradients + 2 * optimizer,
            gradient_bytes=gradients,
            kept_bytes=params + gradients + optimizer,
            payload=(inner, layout),
        )
        flows = [*self._activation_flows(place), *_param_flows([k[1] for k in kept])]
        return dataclasses.replace(place, flows=tuple(flows))

    def activation_bytes(self, place: Placement, remat: str) -> int:
        inner, layout = place.payload
        if (inner, remat) not in self._activations:
            self._activations[inner, remat] = activation_bytes(layout, remat)
        return self._activations[inner, remat]

    # Parameters.

    def _param_classes(self) -> tuple[list[_ParamClass], bool]:
        """Classes of parameters, and whether every optimizer leaf is shaped like its parameter or has one element."""
        layout = self.layout
        paths = layout.table.paths(layout.params)
        params = dict(zip(paths, jax.tree.leaves(layout.traced.arg(layout.params)), strict=True))
        optimizer: dict[str, int] = {}
        regular = True
        for path, leaf in zip(tree_paths(self.opt_state), jax.tree.leaves(self.opt_state), strict=True):
            parts = path.split("/")
            owner = next((o for i in range(len(parts)) if (o := "/".join(parts[i:])) in params), None)
            if owner is not None and leaf.shape == params[owner].shape:
                optimizer[owner] = optimizer.get(owner, 0) + leaf.dtype.itemsize
            elif math.prod(leaf.shape) > 1:
                regular = False
        found: dict[Any, _ParamClass] = {}
        for path, dims in zip(paths, layout.table.inputs(layout.params), strict=True):
            leaf = params[path]
            rows = [[layout.rows.of(axis) for axis in leaves(dim)] for dim in dims]
            names = tuple(
                tuple((r.name if r else "", a.size) for r, a in zip(rs, leaves(d), strict=True))
                for rs, d in zip(rows, dims, strict=True)
            )
            segmented = any(axis.segments is not None for dim in dims for axis in leaves(dim))
            key = (names, leaf.dtype, optimizer.get(path, 0), path if segmented else "")
            trips = math.prod(r.size for dim in rows for r in dim if r is not None and r.role == "layers")
            made = found.get(key)
            found[key] = (
                dataclasses.replace(made, count=made.count + 1)
                if made
                else _ParamClass(
                    path,
                    dims,
                    math.prod(leaf.shape),
                    1,
                    leaf.dtype.itemsize,
                    bool(jnp.issubdtype(leaf.dtype, jnp.floating)),
                    trips,
                    optimizer.get(path, 0),
                )
            )
        return list(found.values()), not regular

    def _kept_bytes(self, layout: Layout, inner: Inner, fsdp: int) -> tuple[tuple[int, int, int], dict[Any, float]]:
        """Bytes of parameters, gradients and optimizer on a device, as `step_bytes` has them, and traffic by class."""
        key = (inner.tensor, inner.context, inner.expert, fsdp)
        if key in self._kept:
            return self._kept[key]
        mesh = inner.mesh(fsdp)
        assignment = dataclasses.replace(layout.assignment, mesh=mesh, storage=fsdp > 1)
        elements = optimizer = 0
        traffic: dict[Any, float] = {}
        for c in self._classes:
            compute, rest = param_shares(assignment, c.path, c.dims)
            held = c.count * (c.elements // assignment.ways([a for entry in rest.entries for a in entry]))
            elements += held
            optimizer += held * c.optimizer_bytes
            split = tuple(axis for axis in AXES if any(axis in entry for entry in compute.entries))
            gathered = any(FSDP in entry for entry in rest.entries) and FSDP not in split
            use = (split, gathered, c.trips, c.floating, c.itemsize)
            traffic[use] = traffic.get(use, 0.0) + c.count * c.elements * c.itemsize
        if self._whole_optimizer:
            full = self.layout.on(mesh, inner.preset(fsdp))
            optimizer = tree_bytes(self.opt_state, full.state_specs(self.opt_state), mesh)
        else:
            small = (x for x in jax.tree.leaves(self.opt_state) if math.prod(x.shape) <= 1)
            optimizer += sum(x.dtype.itemsize for x in small) - self._scalars_counted()
        self._kept[key] = ((elements * self.width, elements * max(self.width, 4), optimizer), traffic)
        return self._kept[key]

    def _scalars_counted(self) -> int:
        """Bytes of optimizer leaves of one element that belong to parameters of one element."""
        return sum(c.optimizer_bytes * c.count for c in self._classes if c.elements <= 1)

    # Activations.

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
        return out + self._lookup_flows(place)

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


def _param_flows(traffic: Sequence[Mapping[Any, float]]) -> list[Flow]:
    """Gathers and reduce-scatters of what lies split over fsdp, and the sum of gradients; bytes per fsdp size."""
    gathers: dict[Any, np.ndarray] = {}
    sums: dict[Any, np.ndarray] = {}
    for i, by_class in enumerate(traffic):
        for (split, gathered, trips, floating, itemsize), bytes_ in by_class.items():
            if gathered:
                found = gathers.setdefault((split, trips, floating), np.zeros(len(traffic)))
                found[i] += bytes_ / trips
            if floating:
                axes = tuple(a for a in (*BATCH_AXES, CONTEXT) if a not in split and not (gathered and a == FSDP))
                held = (*split, FSDP) if gathered else split
                found = sums.setdefault((axes, held), np.zeros((2, len(traffic))))
                found[:, i] += bytes_, bytes_ * max(1.0, 4 / itemsize)
    flows = []
    for (split, trips, floating), bytes_ in gathers.items():
        count = {"": float(trips)}
        # Outside of loops the compiler keeps what it gathered for the backward pass (seen in XLA's HLO).
        for phase in ("forward", "backward") if trips > 1 else ("forward",):
            flows.append(Flow("all_gather", (FSDP,), bytes_, split, phase, True, False, count))
        if floating:
            flows.append(Flow("reduce_scatter", (FSDP,), bytes_, split, "backward", True, False, count))
    for (axes, held), (bytes_, summed) in sums.items():
        flows.append(Flow("all_reduce", axes, bytes_, held, "step", True, False, {"": 1.0}, summed))
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


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


__all__ = ["HEADROOM", "Inner", "Model", "Space", "TracedModel"]
