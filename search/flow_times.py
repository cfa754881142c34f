"""Seconds of collectives for many candidates at once (analytic), and what of them may run behind compute.

    times = FlowTimes(cluster, efficiency, remats)
    for flow, seconds_n, bytes_n in times.seconds(place.flows, columns, *numbering(place, columns)): ...
    times.hides(flow), times.waited(flow, sizes), times.alone(flow)

Beside `search.op_times` (operations) and `search.schedule_times` (pipelines); `search.cost` puts the three together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from search.cluster import Cluster
from search.collectives import Kind, collective_seconds, lower_bound_seconds
from search.efficiency import Efficiency
from search.placement import PARAMS, REGIONS, Bools, Columns, Floats, Flow, Placement
from search.plan import Remat
from sharding_rules import AXES, DATA, STAGE

_MOST_KEPT = 4096
"""Collectives whose seconds are kept."""


class FlowTimes:
    """Seconds of collectives on a cluster.

    Args:
        cluster: its links.
        efficiency: what they attain, and what the compiler hides.
        remats: rematerialisations, in the order in which columns number them.
    """

    def __init__(self, cluster: Cluster, efficiency: Efficiency, remats: Sequence[Remat]):
        self.cluster, self.efficiency, self.remats = cluster, efficiency, tuple(remats)
        self._kept: dict[Any, Floats] = {}

    def on(self, cluster: Cluster, efficiency: Efficiency) -> FlowTimes:
        """The same on other machines, or with other constants."""
        other = FlowTimes(cluster, efficiency, self.remats)
        if cluster == self.cluster:
            other._kept = self._kept  # before what links attain
        return other

    def seconds(
        self, flows: Sequence[Flow], columns: Columns, sizes: Mapping[str, Floats], strides: Mapping[str, Floats]
    ) -> Iterator[tuple[Flow, Floats, Floats]]:
        """Flows with their seconds, and bytes of their buffers on a device, per microbatch or per step; one entry per
        candidate.

        Args:
            flows: collectives.
            columns: candidates.
            sizes, strides: of the mesh axes, from `numbering`.
        """
        m = columns.microbatches
        alike: dict[tuple[Kind, tuple[str, ...]], list[tuple[Flow, Floats]]] = {}
        for flow in flows:
            volume = _of_candidates(flow.bytes, columns)
            if flow.summed_bytes is not None:
                volume = np.where(m > 1, _of_candidates(flow.summed_bytes, columns), volume)
            volume = volume / math.prod((sizes[axis] for axis in flow.split), start=np.ones(len(columns)))
            alike.setdefault((flow.kind, flow.axes), []).append((flow, volume / m if flow.batch else volume))
        for (kind, axes), group in alike.items():
            at = tuple(sizes[axis] for axis in axes), tuple(strides[axis] for axis in axes)
            seconds_fn = self.collective(kind, np.stack([volume for _, volume in group]), *at)
            for (flow, volume), once in zip(group, seconds_fn, strict=True):
                times = np.array([flow.times(remat) for remat in self.remats])[columns.remat]
                yield flow, once * times, volume * times

    def collective(self, kind: Kind, volume: Floats, sizes: Sequence[Floats], strides: Sequence[Floats]) -> Floats:
        """Seconds of a collective by what links attain; one that leaves the node is bound by the network."""
        key = (kind, *(x.tobytes() for x in (volume, *sizes, *strides))) if volume.shape[-1] == 1 else None
        seconds = self._kept.get(key)
        if seconds is None:
            seconds = collective_seconds(self.cluster, kind, volume, tuple(sizes), tuple(strides))
            if key is not None and len(self._kept) < _MOST_KEPT:
                self._kept[key] = seconds
        last = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        inside = np.asarray(last) < self.cluster.devices_per_node
        return seconds / np.where(inside, self.efficiency.links, self.efficiency.network)

    def hides(self, flow: Flow) -> bool:
        """Whether a collective may run behind compute as a whole."""
        sums = flow.kind == "all_reduce" and flow.phase == "backward" and STAGE not in flow.axes
        return flow.hides or (sums and self.efficiency.sums_behind_weights > 0)

    def alone(self, flow: Flow) -> float:
        """Share of a collective that is waited for though it may hide."""
        return self.efficiency.sums_waited if flow.waits else 0.0

    def waited(self, flow: Flow, sizes: Mapping[str, Floats]) -> Floats:
        """Share of a collective's seconds that is waited for, or may hide behind compute as a whole; the rest runs
        beside the products that it feeds.
        """
        size = math.prod((sizes[axis] for axis in flow.axes), start=np.ones_like(sizes[DATA]))
        # Of an all-reduce nothing can start before the whole product is there: no pieces to run beside what they feed.
        whole = flow.hides or flow.phase == "step" or flow.kind == "all_reduce"
        return np.ones_like(size) if whole else self.efficiency.waited(flow.axes, size)

    def bound(self, flow: Flow, remat: Remat, sizes: Mapping[str, float]) -> float:
        """Seconds that a collective between operations takes at least, in one microbatch on the fastest links; 0 for
        those that may hide, and those of a step.
        """
        if self.hides(flow) or flow.phase == "step":
            return 0.0
        size = math.prod(sizes[axis] for axis in flow.axes)
        volume = float(np.min(flow.bytes)) / math.prod(sizes[axis] for axis in flow.split)
        once = lower_bound_seconds(self.cluster, flow.kind, volume, size)
        waited = 1.0 if flow.kind == "all_reduce" else self.efficiency.waited(flow.axes, size)
        return float(waited / max(self.efficiency.links, self.efficiency.network) * once) * flow.times(remat)


def update_flows(place: Placement) -> list[Flow]:
    """Gathers over data of parameters as they lie at rest, in their own dtype, by region (ZeRO-1); nothing is left to
    run beside them.
    """
    return [
        Flow("all_gather", (DATA,), params_f, (), "step", False, False, {"": 1.0}, region=region)
        for region, params_f in zip(REGIONS, place.held[PARAMS], strict=True)
    ]


def told_under(flow: Flow, sizes: Mapping[str, Floats]) -> Bools:
    """The mesh axis that a flow's seconds are told under: the outermost of its axes that is larger than 1; shape (mesh
    axes, candidates).
    """
    told = np.zeros((len(AXES), len(sizes[DATA])), dtype=bool)
    free = np.ones(len(sizes[DATA]), dtype=bool)
    for axis in flow.axes:
        told[AXES.index(axis)] = free & (sizes[axis] > 1)
        free &= ~(sizes[axis] > 1)
    return told


def _of_candidates(bytes_: float | Floats, columns: Columns) -> Floats:
    return np.asarray(bytes_, np.float64)[columns.fsdp] if np.ndim(bytes_) else np.full(len(columns), float(bytes_))  # type: ignore[arg-type]
