"""A traced loss as something to plan: its placements, its traffic, its bytes.

model = TracedModel(traced, abstract_opt_state, cluster)
model.place(inner)                                 # a Placement, or the reason why there is none
model.activations(placement, "full", microbatches, fsdp)
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend.core import Var

from search.cluster import Cluster
from search.cost import CostModel
from search.efficiency import Efficiency
from search.liveness import Step, analyse_step
from search.memory import ActivationBytes, ActivationMemory
from search.op_times import Routed
from search.placement import REGIONS, Floats, Placement
from search.plan import Remat
from search.regions import ParamRegion, Region, count_layers, op_regions, param_regions, stacks
from search.space import Inner, divisors
from search.traffic import ActivationTraffic, gradient_sums, param_flows
from search.workload import Workload, workload_of
from sharding_rules import (
    AXES,
    FSDP,
    TENSOR,
    ExpertsCall,
    Layout,
    MeshShape,
    PlanError,
    TracedFunction,
    make_layout,
    trainable,
    tree_paths,
)
from sharding_rules.axes import leaves
from sharding_rules.partition import param_shares, tree_bytes

REMATS: tuple[Remat, ...] = ("none", "dots", "full")
CACHE = "state"
"""The argument that is neither parameters nor examples: keys and values of inference, running means of training."""


@dataclasses.dataclass(frozen=True)
class _ParamClass:
    """Parameters that are split alike: same axes and shape."""

    path: str
    dims: Any
    elements: int
    count: int
    itemsize: int
    trained: bool
    trips: int
    optimizer_bytes: int
    region: ParamRegion
    sums: float
    apart: float  # the same where uses of one parameter are summed one by one
    of_experts: bool  # a matrix that a call of `experts` takes


def _routed(layout: Layout) -> Routed | None:
    """Rows of the experts that a model calls."""
    for scope in layout.table.scope.walk():
        for eqn in scope.jaxpr.eqns:
            found = layout.table.calls.get(eqn.outvars[0]) if eqn.outvars else None
            if found is None or not isinstance(found.call, ExpertsCall):
                continue
            last = [scope.dims[var][-1] for var in (found.operands[1], found.operands[3]) if isinstance(var, Var)]
            rows = [layout.rows.of(axis) for dim in last for axis in leaves(dim)]
            if len(rows) == 2 and rows[0] is not None and rows[1] is not None:
                return Routed(rows[0].name, rows[1].name)
    return None


class TracedModel:
    """A traced loss as something to plan.

    Args:
        traced: the loss on the whole global batch, with arguments `params` and `batch`.
        abstract_opt_state: shapes of the optimizer's state.
        cluster: accelerators and links.
        efficiency: constants of the cost model; default those measured for the cluster, or fitted for its accelerator.
        param_dtype: dtype of the stored parameters; gradients are summed in float32 or wider.
        fused_attention: cost attention as one operation.
        remats: which rematerialisations to consider.
        training: False for a function that is only run forward; it has no gradients and no optimizer.
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
        training: bool = True,
    ):
        self.layout = make_layout(traced, MeshShape(), "data")
        steps: dict[Remat, Step] = {r: analyse_step(traced, remat=r, grad=training) for r in remats}
        self.works: dict[Remat, Workload] = {
            r: workload_of(step, fused_attention=fused_attention) for r, step in steps.items()
        }
        options: dict[str, Any] = {"fused_attention": fused_attention, "accelerator": cluster.accelerator.kind}
        options["param_dtype"] = param_dtype
        self._memory = ActivationMemory(traced, self.layout, remats, steps=steps, **options)
        self.training = training
        self.repeats = count_layers(self.layout)
        self._batch_rows = [row.name for row in self.layout.rows.rows if row.role == "batch"]
        self.costs = CostModel(
            cluster,
            self.works,
            batch_rows=self._batch_rows,
            efficiency=efficiency or _attained(cluster),
            layers=self.repeats,
            routed=_routed(self.layout),
            stored_width=_itemsize(param_dtype),
        )
        self.layers = self._stageable()
        arrays = jax.tree.leaves(traced.arg("batch"))
        self._arguments = traced.names
        self.batch = max((x.shape[0] for x in arrays if x.shape), default=1)
        ids = [math.prod(x.shape) for x in arrays if jnp.issubdtype(x.dtype, jnp.integer) and len(x.shape) > 1]
        self.tokens = max(ids, default=self.batch)
        self.has_experts = any(row.role == "expert" for row in self.layout.rows.rows)
        self.plan_fields: Mapping[str, str] = {
            "param_dtype": param_dtype,
            "compute_dtype": self.costs.dtype,
            "attention": "fused" if fused_attention else "plain",
        }
        self.merges = cluster.accelerator.kind != "cpu"
        """Whether products of one activation share the sum of its gradient; XLA for CPUs sums each alone."""
        self.opt_state = abstract_opt_state
        self.width = jnp.dtype(param_dtype).itemsize
        self._traffic = ActivationTraffic(
            self.layout, self.works, activation_width=_itemsize(self.costs.dtype), merges=self.merges
        )
        self._classes, self._whole_optimizer = self._param_classes()
        self._placed: dict[Inner, Placement | str] = {}
        self._kept: dict[tuple[int, ...], Any] = {}
        self._inputs: ActivationMemory | None = None

    def on(self, cluster: Cluster, efficiency: Efficiency | None = None) -> TracedModel:
        """The same model on other links or with other constants; placements and bytes stay."""
        other = copy.copy(self)
        other.costs = self.costs.on(cluster, efficiency or _attained(cluster))
        return other

    # Placing.

    def place(self, inner: Inner) -> Placement | str:
        """The placement of some inner sizes, or the reason why it is not legal."""
        if inner not in self._placed:
            self._placed[inner] = self._place(inner)
        return self._placed[inner]

    def _place(self, inner: Inner) -> Placement | str:
        # Stages hold whole layers: within one, the mesh is that of the other axes.
        mesh = dataclasses.replace(inner.mesh(), stage=1)
        if inner.stage > 1 and self.layers % inner.stage:
            return f"stage={inner.stage} does not divide the model's {self.layers} layers"
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
        if not self.training and CACHE in self._arguments and any(beyond):
            heads = rows[beyond.index(True)].size
            return (
                f"tensor={inner.tensor} is more than the {heads} kv heads of the cache, which would be whole everywhere"
            )
        sizes = tuple(divisors(inner.batch_shards))
        held = [self._held(layout, inner, fsdp) for fsdp in sizes]
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
            held=np.stack([h[0] for h in held], axis=-1),
            stage=inner.stage,
            cache_bytes=layout.bytes_per_device(CACHE) if CACHE in self._arguments else 0,
        )
        weights = param_flows([h[1] for h in held], merges=self.merges, expert=inner.expert)
        flows = [*self._traffic.flows(place), *weights]
        if not self.training:
            flows = [flow for flow in flows if flow.phase == "forward"]
        boundary = self._boundary_bytes(place) if inner.stage > 1 else 0.0
        return dataclasses.replace(place, flows=tuple(flows), boundary_bytes=boundary)

    def activations(
        self, place: Placement, remat: str, microbatches: npt.NDArray[np.int64], fsdp: npt.NDArray[np.int64]
    ) -> ActivationBytes:
        """Bytes per device, without stages, of candidates with one rematerialisation."""
        return self._memory.bytes(place, remat, microbatches, fsdp)  # type: ignore[arg-type]

    def _stageable(self) -> int:
        """Layers that pipeline stages can share out: one stack of them that is most of the model."""
        if not self.training or self.repeats == 1 or stacks(self.layout) > 1:
            return 1
        work = self.works[next(iter(self.works))].merged()
        regions = op_regions(work, self.repeats)
        inside = [op.flops * op.trips for op, region in zip(work.ops, regions, strict=True) if region == "layers"]
        return self.repeats if sum(inside) > 0.5 * work.flops else 1

    def _boundary_bytes(self, place: Placement) -> float:
        """What passes from one layer to the next on a device: what is kept when whole layers are computed again."""
        if self._inputs is None:
            self._inputs = ActivationMemory(self.layout.traced, self.layout, ("full",), fused_attention=True)
        return float(self._inputs.bytes(place, "full").layers[0]) / self.layers

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
        regions = param_regions(layout, self.repeats)
        sums, apart = (gradient_sums(layout, merges=merges) for merges in (self.merges, False))
        trained = jax.tree.leaves(trainable(layout.traced.arg(layout.params)))
        called = any(isinstance(found.call, ExpertsCall) for found in layout.table.calls.values())
        inputs = layout.table.inputs(layout.params)
        for path, dims, region, summed, each, moves in zip(paths, inputs, regions, sums, apart, trained, strict=True):
            leaf = params[path]
            rows = [[layout.rows.of(axis) for axis in leaves(dim)] for dim in dims]
            names = tuple(
                tuple((r.name if r else "", a.size) for r, a in zip(rs, leaves(d), strict=True))
                for rs, d in zip(rows, dims, strict=True)
            )
            segmented = any(axis.segments is not None for dim in dims for axis in leaves(dim))
            key = (names, leaf.dtype, moves, optimizer.get(path, 0), path if segmented else "", region, summed, each)
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
                    moves,
                    trips,
                    optimizer.get(path, 0),
                    region,
                    summed,
                    each,
                    called and any(r is not None and r.role == "expert" for row in rows for r in row),
                )
            )
        return list(found.values()), not regular

    def _held(self, layout: Layout, inner: Inner, fsdp: int) -> tuple[Floats, dict[Any, float]]:
        """Bytes of parameters, gradients and optimizer by region, as `Placement.held`, and traffic by class.

        A parameter that is used before and after the layers is on the last stage, and with several also on the first.
        """
        key = (inner.tensor, inner.context, inner.expert, fsdp, inner.stage > 1, inner.sequence)
        if key in self._kept:
            return self._kept[key]
        mesh = dataclasses.replace(inner.mesh(fsdp), stage=1)
        assignment = dataclasses.replace(layout.assignment, mesh=mesh, storage=fsdp > 1)
        elements_r, params_r, optimizer_r = np.zeros((3, len(REGIONS)))  # elements: of what is trained
        traffic: dict[Any, float] = {}
        for c in self._classes:
            compute, rest = param_shares(assignment, c.path, c.dims)
            held = c.count * (c.elements // assignment.ways([a for entry in rest.entries for a in entry]))
            regions: tuple[Region, ...] = (c.region,) if c.region != "both" else ("last", "first")
            for region in regions[: 1 if inner.stage == 1 else 2]:
                elements_r[REGIONS.index(region)] += held * c.trained
                # What is not trained keeps its dtype; the rest is stored in `param_dtype`.
                params_r[REGIONS.index(region)] += held * (self.width if c.trained else c.itemsize)
                optimizer_r[REGIONS.index(region)] += held * c.optimizer_bytes
            split = tuple(axis for axis in AXES if any(axis in entry for entry in compute.entries))
            gathered = any(FSDP in entry for entry in rest.entries) and FSDP not in split
            # XLA does not merge the sums of a tied table whose uses have different tokens on the members of tensor.
            sums = c.apart if inner.sequence and inner.tensor > 1 and TENSOR not in split else c.sums
            use = (split, gathered, c.trips, c.trained and self.training, c.itemsize, sums, regions[0], c.of_experts)
            traffic[use] = traffic.get(use, 0.0) + c.count * c.elements * c.itemsize
        if self._whole_optimizer:
            full = self.layout.on(mesh, inner.preset(fsdp))
            total = tree_bytes(self.opt_state, full.state_specs(self.opt_state), mesh)
            optimizer_r = total * elements_r / max(elements_r.sum(), 1)
        else:
            small = (x for x in jax.tree.leaves(self.opt_state) if math.prod(x.shape) <= 1)
            optimizer_r[-1] += sum(x.dtype.itemsize for x in small) - self._scalars_counted()
        gradients_r = elements_r * max(self.width, 4) * self.training
        self._kept[key] = np.stack([params_r, gradients_r, optimizer_r]), traffic
        return self._kept[key]

    def _scalars_counted(self) -> int:
        """Bytes of optimizer leaves of one element that belong to parameters of one element."""
        return sum(c.optimizer_bytes * c.count for c in self._classes if c.elements <= 1)


def _attained(cluster: Cluster) -> Efficiency:
    return cluster.efficiency or Efficiency.for_accelerator(cluster.accelerator)


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
