"""What a plan's collectives move, by mesh axis (analytic): the sums of `Estimate.communication`, taken apart."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from search.collectives import compiled_kind
from search.costing import candidate
from search.placement import REGIONS
from search.plan import Plan
from search.space import Model


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one mesh axis; per device and step.

    Attributes:
        axis: the outermost of the mesh axes that it goes over, which its seconds are told under.
        axes: all of them that are larger than 1.
        phase: "forward" and "backward" of every microbatch, or "step".
        count: executions.
        bytes: of the buffers.
        seconds: in all, hidden or not.
        hides: whether it may run behind compute.
    """

    axis: str
    axes: tuple[str, ...]
    kind: str
    phase: str
    count: float
    bytes: float
    seconds: float
    hides: bool


def collectives(model: Model, plan: Plan) -> list[Collective]:
    """List them, by axis and then the slowest first; on the stage that has most of them.

    Raises:
        PlanError: the plan is not legal for the model.
    """
    place, columns = candidate(model, plan)
    sizes = plan.mesh.sizes
    weights_kr = place.stage_weights(plan.vocab)
    found: dict[tuple, np.ndarray] = {}
    for flow, (seconds,), (volume,) in model.costs.flow_seconds(place, columns):
        axes = tuple(axis for axis in flow.axes if sizes[axis] > 1)
        if not axes or not seconds:
            continue
        runs = 1 if flow.phase == "step" else plan.microbatches
        each = [runs * flow.times(plan.remat), runs * volume, runs * seconds]
        on_stages_k3 = np.outer(weights_kr[:, REGIONS.index(flow.region)], each)
        kind = compiled_kind(model.costs.cluster, flow.kind, math.prod(sizes[axis] for axis in axes))
        key = (axes, kind, flow.phase, flow.hides)
        found[key] = found.get(key, 0.0) + on_stages_k3
    if not found:
        return []
    stage = int(sum(x[:, 2] for x in found.values()).argmax())  # pyright: ignore[reportAttributeAccessIssue]
    rows = [
        Collective(axes[0], axes, kind, phase, float(x[stage, 0]), float(x[stage, 1]), float(x[stage, 2]), hides)
        for (axes, kind, phase, hides), x in found.items()
        if x[stage, 2] > 0
    ]
    return sorted(rows, key=lambda row: (list(sizes).index(row.axis), -row.seconds))
