"""What a plan's collectives move, by mesh axis (analytic): the sums of `Estimate.communication`, taken apart."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from search import Plan, TracedModel, collective_seconds
from search.costing import candidate
from search.placement import REGIONS, Flow, numbering


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


def collectives(model: TracedModel, plan: Plan) -> list[Collective]:
    """List them, by axis and then the slowest first; on the stage that has most of them.

    Raises:
        PlanError: the plan is not legal for the model.
    """
    place, columns = candidate(model, plan)
    sizes, strides = numbering(place, columns)
    m = plan.microbatches
    weights_kr = place.stage_weights(plan.vocab)
    found: dict[tuple, np.ndarray] = {}
    for flow in place.flows:
        axes = tuple(axis for axis in flow.axes if sizes[axis][0] > 1)
        times = flow.times(plan.remat)
        if not axes or not times or (flow.again and not plan.regather):
            continue
        volume = _bytes(flow, int(columns.fsdp[0]), m) / math.prod(float(sizes[axis][0]) for axis in flow.split)
        group = [(float(sizes[axis][0]), float(strides[axis][0])) for axis in flow.axes]
        once = collective_seconds(model.costs.cluster, flow.kind, volume, *zip(*group, strict=True))
        # What links attain and compute waits for, as in `CostModel`: one that leaves the node is bound by the network.
        attained = model.costs.efficiency
        inside = sum((n - 1) * stride for n, stride in group) < model.costs.cluster.devices_per_node
        once = once / (attained.links if inside else attained.network)
        if not flow.hides and flow.phase != "step":
            once = once * attained.unhidden
        runs = times * (1 if flow.phase == "step" else m)
        on_stages_k3 = np.outer(weights_kr[:, REGIONS.index(flow.region)], [runs, runs * volume, runs * float(once)])
        key = (axes, flow.kind, flow.phase, flow.hides)
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


def _bytes(flow: Flow, fsdp: int, microbatches: int) -> float:
    """Of the buffer on all devices."""
    buffer = flow.bytes if flow.summed_bytes is None or microbatches == 1 else flow.summed_bytes
    size = float(np.asarray(buffer)[fsdp]) if np.ndim(buffer) else float(buffer)  # type: ignore[arg-type]
    return size / microbatches if flow.batch else size
