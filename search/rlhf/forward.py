"""Forward passes on every mesh of a window: seconds of a part of the rows on each stage, and bytes per device.

    for one in passes(model, cluster, parts=[1, 2, 4], stages=[1, 2], fix={}, forbid=()):
        one.all_seconds()                          # of all rows, one part after the other through the stages
        one.params_bytes, one.workspace_n          # on the fullest device

The rows are cut into *parts*. Stages hold whole layers, and a part goes through them one by one while others follow:
with t the seconds of a part on the slowest stage and T those of one part through all stages, m parts take
T + (m - 1) t (analytic).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from search.cluster import Cluster
from search.efficiency import Efficiency
from search.placement import PARAMS, REGIONS, Columns, Floats, Placement
from search.plan import Plan
from search.space import Space
from search.subcluster import part_of
from search.traced_model import TracedModel
from sharding_rules import STAGE


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What a host takes where it dispatches operations one by one instead of one compiled program; devices work
    meanwhile, so that a pass takes as long as the slower of the two.

    Attributes:
        operation_seconds: to dispatch one operation.
        collective_seconds: to dispatch one collective.
    """

    operation_seconds: float
    collective_seconds: float

    def cluster(self, cluster: Cluster) -> Cluster:
        """A cluster whose operations and collectives start so much later: for what is costed as one program."""
        attained = cluster.efficiency or Efficiency.for_accelerator(cluster.accelerator)
        launch = tuple((kind, self.operation_seconds) for kind, _ in attained.launch_seconds)
        accelerator = dataclasses.replace(cluster.accelerator, launch_seconds=self.collective_seconds)
        attained = dataclasses.replace(attained, launch_seconds=launch)
        return dataclasses.replace(cluster, accelerator=accelerator, efficiency=attained)

    def seconds(self, model: TracedModel, place: Placement, fsdp: int) -> Floats:
        """Of one part on the stages told apart; shape (stages,)."""
        operations = model.costs.ops[0]
        counted = operations.trips_n * (operations.kind_n != "stack")
        host_r = self.operation_seconds * operations.by_group(counted[None])[0].sum(1)
        sizes = place.mesh(fsdp).sizes
        for flow in place.flows:
            if any(sizes[axis] > 1 for axis in flow.axes):
                host_r[REGIONS.index(flow.region)] += self.collective_seconds * flow.times(model.costs.remats[0])
        return place.stage_weights("ends") @ host_r


@dataclasses.dataclass(frozen=True)
class Passes:
    """A forward pass on one mesh, for some numbers of parts of its rows; all of it is analytic.

    Attributes:
        space, place, columns: what is costed; one candidate per number of parts.
        stages: of the mesh.
        slowest_n: seconds of a part on the slowest stage, its transfer to the next one included.
        through_n: seconds of a part through all stages.
        params_bytes: on the fullest device.
        workspace_n: bytes beside parameters and cache, on the fullest device.
        rows: on a device, of all parts together.
        cache_bytes: of the whole cache of all rows, on a device; 0 without one.
    """

    space: Space
    place: Placement
    columns: Columns
    stages: int
    slowest_n: Floats
    through_n: Floats
    params_bytes: float
    workspace_n: Floats
    rows: int
    cache_bytes: float

    @property
    def parts_n(self) -> np.ndarray:
        return self.columns.microbatches

    @property
    def fsdp(self) -> int:
        return self.place.fsdp_sizes[int(self.columns.fsdp[0])]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two passes of one model on the same mesh share."""
        return self.place.mesh(self.fsdp), self.place.sequence

    def all_seconds(self) -> Floats:
        """Seconds of all rows, by the number of parts; shape (n,)."""
        return self.through_n + (self.parts_n - 1) * self.slowest_n

    def plan(self, row: int, **fields: Any) -> Plan:
        """The plan of one number of parts."""
        return self.space.plan(self.place, self.columns, row, **fields)


def passes(
    model: TracedModel,
    cluster: Cluster,
    *,
    parts: Sequence[int],
    stages: Sequence[int],
    fix: Mapping[str, Any],
    forbid: Sequence[str],
    uneven: bool = False,
    dispatch: Dispatch | None = None,
) -> Iterator[Passes]:
    """Cost a forward pass on every mesh of a cluster.

    Args:
        model: of a function that is only run forward, traced on all rows.
        cluster: the window.
        parts: numbers of parts to look at; of these, those into which the rows of a device split.
        dispatch: of a host that dispatches operation by operation.
        uneven: also those into which they do not split evenly; seconds are those of the mean part.
        stages: numbers of pipeline stages to look at; of these, those that divide the layers and the devices.
        fix, forbid: of the mesh, as `search.Space` has them.
    """
    here = model.on(cluster)
    # What a plan is called does not depend on its stages: the space only names and lists.
    space = Space(here, cluster, forbid=tuple(dict.fromkeys((*forbid, "order"))))
    fix = {name: value for name, value in fix.items() if name != STAGE}
    for stage in stages:
        if cluster.devices % stage or model.repeats % stage:
            continue
        for inner in _inner(model, cluster, stage, fix, forbid):
            place = model.place(inner)
            if isinstance(place, str):
                continue
            each = model.batch // (place.batch_shards * place.expert)
            counts = [m for m in parts if m <= each and (uneven or each % m == 0)]
            if not counts:
                continue
            place = dataclasses.replace(place, stage=stage, boundary_bytes=_boundary_bytes(model, place))
            for fsdp in _fsdp(place, fix, forbid):
                columns = Columns(np.full(len(counts), fsdp), np.zeros(len(counts), np.int64), np.array(counts))
                yield _costed(space, here, place, columns, dispatch)


def _inner(model: TracedModel, cluster: Cluster, stage: int, fix: Mapping[str, Any], forbid: Sequence[str]) -> Any:
    """Inner sizes of the mesh that a stage has to itself."""
    wanted = {name: size for name, size in fix.items() if name not in ("remat", "microbatches", "schedule", "chunks")}
    try:
        part = part_of(cluster, cluster.devices // stage)
        return Space(
            model.on(part), part, fix=wanted, forbid=tuple(f for f in forbid if f not in wanted)
        ).inner_meshes()
    except ValueError:
        # A stage would have parts of several nodes, or what is fixed does not divide what it has.
        return []


def _fsdp(place: Placement, fix: Mapping[str, Any], forbid: Sequence[str]) -> list[int]:
    """Which sizes of fsdp, as indices."""
    out = []
    for i, size in enumerate(place.fsdp_sizes):
        if size > 1 and "fsdp" in forbid:
            continue
        if size == fix.get("fsdp", size) and place.batch_shards // size == fix.get("data", place.batch_shards // size):
            out.append(i)
    return out


def _costed(space: Space, model: TracedModel, place: Placement, columns: Columns, dispatch: Dispatch | None) -> Passes:
    passes_kn, transfer_n = model.costs.forward_seconds(place, columns)
    if dispatch is not None:
        host_k = dispatch.seconds(model, place, place.fsdp_sizes[int(columns.fsdp[0])])
        passes_kn = np.maximum(passes_kn, host_k[:, None])
    stages = place.stage
    if len(passes_kn) == 1:
        through_n, slowest_n = passes_kn[0] * stages, passes_kn[0]
    else:
        first, inner, last = passes_kn
        through_n = first + last + (stages - 2) * inner
        slowest_n = np.maximum(np.maximum(first, last), inner if stages > 2 else 0.0)
    if stages > 1:
        through_n, slowest_n = through_n + (stages - 1) * transfer_n, slowest_n + transfer_n
    fsdp_n = np.array(place.fsdp_sizes)[columns.fsdp]
    found = model.activations(place, model.costs.remats[0], columns.microbatches, fsdp_n)
    # The cache is written in place: the new one is not beside it.
    beside_n = np.maximum(found.total - place.cache_bytes / columns.microbatches, 0.0)
    workspace_n = beside_n - np.minimum(found.stacked, beside_n) * (1 - 1 / stages)
    return Passes(
        space=space,
        place=place,
        columns=columns,
        stages=stages,
        slowest_n=slowest_n,
        through_n=through_n,
        params_bytes=float(model.costs.held(place, columns)[PARAMS].max()),
        workspace_n=np.asarray(workspace_n, np.float64),
        rows=model.batch // (place.batch_shards * place.expert),
        cache_bytes=place.cache_bytes / stages,
    )


def _boundary_bytes(model: TracedModel, place: Placement) -> float:
    """What passes from one layer to the next, on a device: one vector of the model's width per token."""
    widths = [row.size for row in model.layout.rows.rows if row.role == "embed"]
    itemsize = np.dtype(model.costs.dtype).itemsize if model.costs.dtype != "bfloat16" else 2
    whole = model.tokens * max(widths, default=0) * itemsize
    return whole / (place.batch_shards * place.expert * (place.tensor if place.sequence else 1))
