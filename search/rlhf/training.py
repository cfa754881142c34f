"""Training steps on a window: every candidate of the planner's space that fits, without those that another beats.

    found = training(model, cluster, budget_bytes=7e10, fix={}, forbid=("context",), allow_planned=True)
    found[0].seconds, found[0].state_bytes                     # of one optimizer step

A role that is trained holds its parameters as its other calls read them, in the dtype of the computation. Where they
are stored in a wider one, those master weights count as state, beside the optimizer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from search.cluster import Cluster
from search.costing import memory_parts
from search.placement import Columns, Placement
from search.plan import Plan
from search.space import PLANNED, Space
from search.traced_model import TracedModel

SETTLED: Mapping[str, Any] = {"vocab": "ends", "regather": True, "offload": "none", "schedule": "1f1b"}
"""What is not looked at for pipelines unless it is fixed otherwise: each multiplies the candidates and changes the time
of a step by a few percent."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """One way to make an optimizer step; all of it is analytic.

    Attributes:
        seconds: of the step.
        params_bytes, working_bytes, state_bytes: of the fullest device, as `search.rlhf.Option` has them.
        parts: what the seconds are made of.
    """

    space: Space
    place: Placement
    columns: Columns
    row: int
    seconds: float
    params_bytes: float
    working_bytes: float
    state_bytes: float
    parts: dict[str, float]

    def plan(self, **fields: Any) -> Plan:
        return self.space.plan(self.place, self.columns, self.row, **fields)


def training(
    model: TracedModel,
    cluster: Cluster,
    *,
    budget_bytes: float,
    fix: Mapping[str, Any],
    forbid: Sequence[str],
    allow_planned: bool,
) -> list[Trained]:
    """Ways to make a step that fit; of one layout of the parameters, none is both slower and larger than another.

    Args:
        model: of the loss, traced on all rows of a step.
        cluster: the window.
        budget_bytes: of a device.
        fix, forbid: as `search.Space` has them.
        allow_planned: also pipelines, which the step cannot run yet.
    """
    here = model.on(cluster)
    settled = {k: v for k, v in SETTLED.items() if k not in forbid} if allow_planned else {}
    fix = {k: v for k, v in {**settled, **fix}.items() if allow_planned or k not in PLANNED}
    try:
        space = Space(
            here,
            cluster,
            fix=fix,
            forbid=tuple(f for f in dict.fromkeys((*forbid, "order")) if f not in fix),
            allow_planned=allow_planned,
        )
    except ValueError:
        # The sizes that are fixed do not divide this window.
        return []
    out: list[Trained] = []
    for inner in space.inner_meshes():
        place = here.place(inner)
        if isinstance(place, str):
            continue
        columns = space.columns(place)
        if len(columns):
            out += _fitting(space, place, columns, budget_bytes)
    return out


def _fitting(space: Space, place: Placement, columns: Columns, budget_bytes: float) -> list[Trained]:
    """Candidates of one placement."""
    model = space.model
    held_3n = model.costs.held(place, columns)
    sharded = columns.flags("optimizer_sharding").astype(bool)
    data_n = place.batch_shards / np.array(place.fsdp_sizes)[columns.fsdp]
    columns = columns.take(np.flatnonzero(held_3n[0] + held_3n[2] / np.where(sharded, data_n, 1.0) <= budget_bytes))
    if not len(columns):
        return []
    memory = memory_parts(model, place, columns)
    fits = np.flatnonzero(sum(memory.values(), start=np.zeros(len(columns))) <= budget_bytes)
    if not len(fits):
        return []
    columns, memory = columns.take(fits), {name: x[fits] for name, x in memory.items()}
    params_n, state_n, working_n = _split(memory, model.plan_fields)
    # A schedule is run only for those that could be wanted by what no schedule beats.
    rough_n = model.costs.seconds(place, columns, exact=False).total
    rows = _front(columns, rough_n, working_n, state_n)
    columns, params_n, state_n, working_n = columns.take(rows), params_n[rows], state_n[rows], working_n[rows]
    parts = model.costs.seconds(place, columns, exact=True)
    total_n = parts.total
    return [
        Trained(
            space,
            place,
            columns,
            int(i),
            float(total_n[i]),
            float(params_n[i]),
            float(working_n[i]),
            float(state_n[i]),
            parts.at(int(i)),
        )
        for i in _front(columns, total_n, working_n, state_n)
    ]


def _split(memory: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[Any, Any, Any]:
    """Parameters as they are read, what stays with them, and what a step takes besides."""
    width, stored = (jnp.dtype(fields[name]).itemsize for name in ("compute_dtype", "param_dtype"))
    params_n, state_n, transient_n = memory["params"], memory["optimizer"], memory["transient"]
    if width < stored:
        # The step's own narrow copy of what is stored is the one that the other calls read.
        copy_n = params_n * (width / stored)
        params_n, state_n, transient_n = copy_n, state_n + params_n, np.maximum(transient_n - copy_n, 0.0)
    return params_n, state_n, memory["gradients"] + memory["activations"] + transient_n


def _front(columns: Columns, seconds_n: Any, working_n: Any, state_n: Any) -> list[int]:
    """Of each layout, candidates that no other beats in seconds, working bytes and state; the fastest first."""
    out: list[int] = []
    best: dict[int, list[tuple[float, float]]] = {}
    for i in np.lexsort((columns.variant, columns.remat, columns.microbatches, state_n, working_n, seconds_n)):
        here = best.setdefault(int(columns.fsdp[i]), [])
        point = float(working_n[i]), float(state_n[i])
        if not any(w <= point[0] and s <= point[1] for w, s in here):
            here.append(point)
            out.append(int(i))
    return out


__all__ = ["Trained", "training"]
