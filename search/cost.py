"""Seconds per step of many plans at once (analytic), from the table of operations and the collectives they need.

    costs = CostModel(cluster, {"none": workload(traced), "full": workload(traced, remat="full")})
    parts = costs.seconds(placement, columns)          # numpy, one entry per candidate
    parts.total, parts.exposed["fsdp"], costs.mfu(parts.total, devices)

With M microbatches, C and X the seconds of compute and of collectives that may hide behind it, of one microbatch:

    step = M (compute + exposed) + exposed gradients + optimizer                                     without stages
    step = makespan(forward and backward of every stage) + exposed gradients + optimizer             with stages
    overlapped   C + exposed(C, X),  exposed = s X if X <= C, else X - C + s C, s = overlap_slowdown - 1
    exposed      collectives over tensor, context and expert, between which a device has nothing else to do
    hidden       gathers and reduce-scatters of fsdp behind the pass they belong to; the gradients' all-reduce, once per
                 step, behind the backward pass of the last microbatch; less what compilers wait for (`Efficiency`)

The makespan is that of `search.schedules`, exact: bubbles, uneven ends (embedding, head) and the transfers between
stages are in it (Pipette's hidden critical path, arXiv 2405.18093, is what 1F1B's simulation shows). With the
optimizer's state sharded over data (ZeRO-1), gradients are summed as without, and the updated parameters are gathered
at the end of the step: XLA:TPU sums gradients whole inside the backward loop and cuts them after it, and what lies at
rest is whole. What is offloaded moves over the host's link: the optimizer's state once per step, activations behind the
pass that makes or needs them.

Not costed, though the compiled step has it: what moves where tokens are sorted over the whole batch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from search.cluster import Cluster
from search.efficiency import Efficiency
from search.flow_times import FlowTimes, told_under, update_flows
from search.op_times import PASSES, PRODUCTS, OpTimes, Routed, peak_flops
from search.placement import (
    GRADIENTS,
    PARAMS,
    REGIONS,
    STATE,
    Bools,
    Columns,
    Floats,
    Flow,
    Placement,
    Variant,
    axis_sizes,
    numbering,
)
from search.plan import DTYPES, Remat, Vocab
from search.schedule_times import makespan, makespan_bound
from search.workload import Workload
from sharding_rules import AXES, DATA, STAGE

HOST_BYTES_PER_SECOND = {"gpu": 25e9, "tpu": 16e9, "cpu": 10e9}
"""Link of a device to its host, one direction: PCIe 4.0 x16 attains about 25 GB/s; a TPU host's share is assumed."""
VOCABS: tuple[Vocab, ...] = ("ends", "spread")


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """Seconds per step by part (analytic), one entry per candidate.

    Attributes:
        compute: of all microbatches on the busiest stage, the sum of gradients over microbatches included.
        exposed: mesh axis -> seconds of its collectives that compute does not hide, the slow-down of overlap included.
        hidden: seconds of collectives that run behind compute.
        bubble: what the pipeline takes beyond its busiest stage.
        optimizer: of the optimizer's step.
        offload: of transfers between device and host that nothing hides.
        collectives: mesh axis -> seconds of all its collectives on a device, hidden ones too.
        moved: mesh axis -> bytes of the buffers of those collectives, on a device.
    """

    compute: Floats
    exposed: Mapping[str, Floats]
    hidden: Floats
    bubble: Floats
    optimizer: Floats
    offload: Floats
    collectives: Mapping[str, Floats]
    moved: Mapping[str, Floats]

    @property
    def communication(self) -> Floats:
        """Exposed, over all axes."""
        return np.sum(list(self.exposed.values()), axis=0)

    @property
    def total(self) -> Floats:
        return self.compute + self.communication + self.bubble + self.optimizer + self.offload

    def at(self, i: int) -> dict[str, float]:
        """The parts of one candidate, without those that are zero."""
        parts = {"compute": self.compute[i], **{f"exposed {axis}": s[i] for axis, s in self.exposed.items()}}
        parts |= {"bubble": self.bubble[i], "optimizer": self.optimizer[i], "offload": self.offload[i]}
        return {name: float(seconds) for name, seconds in parts.items() if seconds > 0}


@dataclasses.dataclass(frozen=True)
class _Stages:
    """One microbatch on the stages that differ. Dimensions: p passes (forward, backward), k stages told apart (first,
    inner, last; one without stages), x mesh axes, n candidates.

    Attributes:
        compute_pkn: the gradients of weights are part of backward.
        cover_pkn: of which collectives may run behind.
        weights_kn: of which gradients of weights.
        hidden_pxkn, exposed_pxkn: seconds of collectives that may hide, and that may not.
        step_hidden_xkn, step_exposed_xkn: the same, once per step.
        beside_xkn: what runs, piece by piece, beside the products it feeds.
        moved_xkn: bytes of buffers per microbatch; step_moved_xkn: once per step.
        host_pkn: transfers to and from the host.
        transfer_n: activations to the next stage.
        real_k: whether a stage exists (with two stages none is inner).
    """

    compute_pkn: Floats
    cover_pkn: Floats
    weights_kn: Floats
    hidden_pxkn: Floats
    exposed_pxkn: Floats
    step_hidden_xkn: Floats
    step_exposed_xkn: Floats
    beside_xkn: Floats
    moved_xkn: Floats
    step_moved_xkn: Floats
    host_pkn: Floats
    transfer_n: Floats
    real_k: Bools


class CostModel:
    """Seconds of candidates on a cluster.

    Args:
        cluster: accelerators and links.
        works: rematerialisation -> workload of the step on the global batch; all have the same rows.
        batch_rows: names of the rows that are split into microbatches.
        efficiency: constants; default those that the cluster's file has measured.
        layers: number of repeated layers of the model, for pipelines.
        routed: rows of calls of `experts`, where there are some.
        stored_width: bytes of an element of a stored parameter; 0 for that of the products' dtype.
    """

    def __init__(
        self,
        cluster: Cluster,
        works: Mapping[Remat, Workload],
        *,
        batch_rows: Sequence[str] = ("batch",),
        efficiency: Efficiency | None = None,
        layers: int = 1,
        routed: Routed | None = None,
        stored_width: int = 0,
    ):
        self.remats: tuple[Remat, ...] = tuple(works)
        self.row_names = tuple(next(iter(works.values())).rows)
        is_batch = np.isin(self.row_names, list(batch_rows))
        self.works = dict(works)
        self.layers = layers
        attained = efficiency or cluster.efficiency or Efficiency()
        self.ops = [
            OpTimes(work, self.row_names, is_batch, cluster, attained, layers, routed) for work in works.values()
        ]
        self.flows = FlowTimes(cluster, attained, self.remats)
        self._attain(cluster, attained)
        self.trains = any(op.phase == "backward" for op in next(iter(works.values())).ops)
        self.model_flops = min(work.product_flops for work in works.values())
        by_dtype = {k: v for k, v in works[self.remats[0]].flops_by("dtype").items() if k in DTYPES}
        self.dtype = max(by_dtype, key=lambda name: by_dtype[name], default="bfloat16")
        width = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        self.cast = min(width / stored_width, 1.0) if stored_width else 1.0
        """Bytes of parameters as products take them, over those of stored ones."""

    def on(self, cluster: Cluster, efficiency: Efficiency | None = None) -> CostModel:
        """The same work on other machines, or with other constants."""
        other = copy.copy(self)
        attained = efficiency or cluster.efficiency or Efficiency()
        other.ops = [ops.on(cluster, attained) for ops in self.ops]
        other.flows = self.flows.on(cluster, attained)
        other._attain(cluster, attained)
        return other

    def _attain(self, cluster: Cluster, efficiency: Efficiency) -> None:
        self.cluster, self.efficiency = cluster, efficiency
        self.bandwidth = efficiency.bandwidth * cluster.accelerator.memory_bytes_per_second
        self.host_bandwidth = HOST_BYTES_PER_SECOND[cluster.accelerator.kind]
        self.launch = dict(efficiency.launch_seconds)[cluster.accelerator.kind]

    def seconds(
        self, place: Placement, columns: Columns, *, saved_bytes: Floats | None = None, exact: bool = True
    ) -> StepSeconds:
        """Seconds of candidates of one placement.

        Args:
            place: which mesh axes split what.
            columns: its candidates.
            saved_bytes: activations that one microbatch keeps on a device without stages, per candidate; needed where
                they are offloaded.
            exact: run the schedules of pipelines; otherwise what no schedule of the kind beats.
        """
        if saved_bytes is None:
            saved_bytes = np.zeros(len(columns))
        spread = columns.flags("vocab") == "spread"
        if not spread.any() or place.stage == 1:
            return self._seconds(place, columns, saved_bytes, "ends", exact)
        if spread.all():
            return self._seconds(place, columns, saved_bytes, "spread", exact)
        kinds: tuple[tuple[Vocab, Bools], ...] = (("ends", ~spread), ("spread", spread))
        parts = [self._seconds(place, columns.take(which), saved_bytes[which], v, exact) for v, which in kinds]
        return _merge(parts, [which for _, which in kinds])

    def _seconds(
        self, place: Placement, columns: Columns, saved_bytes: Floats, vocab: Vocab, exact: bool
    ) -> StepSeconds:
        one = self._stages(place, columns, saved_bytes, vocab)
        m = columns.microbatches.astype(np.float64)
        hidden_pkn = one.hidden_pxkn.sum(1)
        # What hides and does not fit is told under the axes it belongs to, in proportion.
        left_pxkn = self.exposed(one.cover_pkn, hidden_pkn)[:, None] * _share(one.hidden_pxkn, axis=1)
        exposed_pxkn = one.exposed_pxkn + left_pxkn
        host_pkn = np.maximum(one.host_pkn - one.compute_pkn, 0.0)
        passes_pkn = one.compute_pkn + exposed_pxkn.sum(1) + host_pkn
        each_kn = np.where(one.real_k[:, None], passes_pkn.sum(0), -1.0)
        pick = _Picker(each_kn.argmax(0))
        bubble = np.zeros(len(columns))
        if place.stage > 1:
            weights_kn = one.weights_kn
            bubble = self._makespan(place, columns, passes_pkn, weights_kn, one, vocab, exact) - m * pick(each_kn)
        # The sum of gradients hides behind the last backward pass, beside what hides there anyway. Of several chunks
        # only one waits: the others' collectives run behind its neighbours' work.
        both_xkn = one.hidden_pxkn[1] + one.step_hidden_xkn
        left_xkn = self.exposed(one.cover_pkn[1], both_xkn.sum(0))[None] * _share(both_xkn, axis=0)
        step_xkn = (left_xkn - left_pxkn[1]) / columns.flags("chunks")
        updated_xkn, updated_moved_xkn = self._updated(place, columns, vocab)
        once_xkn = one.step_exposed_xkn + updated_xkn
        step_xkn += once_xkn
        worst = _Picker(np.where(one.real_k[:, None], step_xkn.sum(0), -np.inf).argmax(0))
        exposed_xn = m * pick(exposed_pxkn.sum(0)) + worst(step_xkn)
        collectives_pxkn = one.hidden_pxkn + one.exposed_pxkn
        collectives_xn = m * pick(collectives_pxkn.sum(0) + one.beside_xkn) + worst(one.step_hidden_xkn + once_xkn)
        moved_xn = m * pick(one.moved_xkn) + worst(one.step_moved_xkn + updated_moved_xkn)
        held_3n = self.held(place, columns)
        data = self._state_shards(place, columns)
        state_n = np.where(columns.offloads("optimizer"), 2 * held_3n[STATE] / data / self.host_bandwidth, 0.0)
        return StepSeconds(
            compute=m * pick(one.compute_pkn.sum(0))
            + np.where(m > 1, self.efficiency.gradient_passes * m * held_3n[GRADIENTS] / self.bandwidth, 0.0)
            + self.copied_bytes(place, columns) / self.bandwidth,
            exposed={axis: exposed_xn[i] for i, axis in enumerate(AXES)},
            hidden=m * pick(hidden_pkn.sum(0) + one.beside_xkn.sum(0)) + worst(one.step_hidden_xkn.sum(0)),
            bubble=bubble,
            optimizer=(self.update_bytes(place, columns) / self.bandwidth + self.launch) * self.trains,
            offload=m * pick(host_pkn.sum(0)) + state_n,
            collectives={axis: collectives_xn[i] for i, axis in enumerate(AXES)},
            moved={axis: moved_xn[i] for i, axis in enumerate(AXES)},
        )

    def _stages(self, place: Placement, columns: Columns, saved_bytes: Floats, vocab: Vocab) -> _Stages:
        """One microbatch on the stages; what variants do not change is computed once for them."""
        first, inverse = _alike(columns)
        one = self._base_stages(place, columns.take(first), vocab)
        host_n = np.where(columns.offloads("activations"), saved_bytes / self.host_bandwidth, 0.0)
        shard_n = self.held(place, columns)[PARAMS] / self.host_bandwidth
        host_n = host_n / place.stage + np.where(columns.offloads("params"), shard_n, 0.0)
        spread = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name not in ("host_pkn", "real_k")}
        host_pkn = np.broadcast_to(host_n, (2, len(one.real_k), len(columns)))
        return _Stages(**{name: x[..., inverse] for name, x in spread.items()}, host_pkn=host_pkn, real_k=one.real_k)

    def _base_stages(self, place: Placement, columns: Columns, vocab: Vocab) -> _Stages:
        n = len(columns)
        weights_kr = place.stage_weights(vocab)
        compute_rqn, cover_rqn = self._compute(place, columns)
        sizes, strides = numbering(place, columns)
        shape = (2, len(REGIONS), len(AXES), n)
        hidden, exposed = np.zeros(shape), np.zeros(shape)
        step_hidden, step_exposed = np.zeros(shape[1:]), np.zeros(shape[1:])
        moved, step_moved = np.zeros(shape[1:]), np.zeros(shape[1:])
        beside = np.zeros(shape[1:])
        kept = ~columns.flags("regather").astype(bool)
        flows = [*place.flows, *self._vocab_flows(place, vocab)]
        for flow, seconds, volume in self.flows.seconds(flows, columns, sizes, strides):
            if flow.again:
                seconds, volume = np.where(kept, 0.0, seconds), np.where(kept, 0.0, volume)
            told_xn = told_under(flow, sizes)
            region = REGIONS.index(flow.region)
            alone = self.flows.alone(flow)
            if flow.phase == "step":
                (step_hidden if flow.hides else step_exposed)[region] += told_xn * seconds * (1 - alone)
                step_exposed[region] += told_xn * seconds * alone
                step_moved[region] += told_xn * volume
            else:
                into = hidden if self.flows.hides(flow) else exposed
                waited = self.flows.waited(flow, sizes)
                into[int(flow.phase == "backward"), region] += told_xn * seconds * waited * (1 - alone)
                exposed[int(flow.phase == "backward"), region] += told_xn * seconds * waited * alone
                beside[region] += told_xn * seconds * (1 - waited)
                moved[region] += told_xn * volume

        def on_stages(x: Floats) -> Floats:
            """Regions shared out over the stages: the third dimension from the right becomes the second."""
            return np.einsum("kr,...rn->...kn", weights_kr, x)

        compute_qkn, cover_qkn = (on_stages(np.moveaxis(x, 0, 1)) for x in (compute_rqn, cover_rqn))
        return _Stages(
            compute_pkn=np.stack([compute_qkn[0], compute_qkn[1] + compute_qkn[2]]),
            cover_pkn=np.stack([cover_qkn[0], cover_qkn[1] + cover_qkn[2]]),
            weights_kn=compute_qkn[2],
            hidden_pxkn=on_stages(np.moveaxis(hidden, 1, 2)),
            exposed_pxkn=on_stages(np.moveaxis(exposed, 1, 2)),
            step_hidden_xkn=on_stages(np.moveaxis(step_hidden, 0, 1)),
            step_exposed_xkn=on_stages(np.moveaxis(step_exposed, 0, 1)),
            beside_xkn=on_stages(np.moveaxis(beside, 0, 1)),
            moved_xkn=on_stages(np.moveaxis(moved, 0, 1)),
            step_moved_xkn=on_stages(np.moveaxis(step_moved, 0, 1)),
            host_pkn=np.zeros((2, len(weights_kr), n)),
            transfer_n=self._transfer(place, columns, sizes, strides),
            real_k=np.array([True, place.stage > 2, True])[: len(weights_kr)],
        )

    def _transfer(self, place: Placement, columns: Columns, sizes: Any, strides: Any) -> Floats:
        """Seconds from one stage to the next, of one microbatch."""
        if place.stage == 1:
            return np.zeros(len(columns))
        local = math.prod((sizes[axis] for axis in place.boundary_split), start=np.ones(len(columns)))
        volume = place.boundary_bytes / local / columns.microbatches
        return self.flows.collective("permute", volume, (sizes[STAGE],), (strides[STAGE],))

    def _vocab_flows(self, place: Placement, vocab: Vocab) -> list[Flow]:
        """A vocabulary spread over the stages: the last activation goes to all of them, and its gradient is summed."""
        if vocab == "ends" or place.stage == 1:
            return []
        split = place.boundary_split
        # All stages take part in each: times their number, since what is told of a region is shared out over them.
        return [
            Flow("all_reduce", (STAGE,), place.boundary_bytes * place.stage, split, phase, True, True, {"": 1.0})
            for phase in ("forward", "backward")
        ]

    def _updated(self, place: Placement, columns: Columns, vocab: Vocab) -> tuple[Floats, Floats]:
        """Of parameters that were updated in shards over data (ZeRO-1): seconds to gather them, and bytes; shape (mesh
        axes, stages told apart, candidates).
        """
        weights_kr = place.stage_weights(vocab)
        seconds, moved = (np.zeros((len(AXES), len(weights_kr), len(columns))) for _ in range(2))
        sharded = columns.flags("optimizer_sharding").astype(bool)
        if not sharded.any():
            return seconds, moved
        for flow, each, volume in self.flows.seconds(update_flows(place), columns, *numbering(place, columns)):
            on_stage_k = weights_kr[:, REGIONS.index(flow.region), None]
            seconds[AXES.index(DATA)] += on_stage_k * np.where(sharded, each, 0.0)
            moved[AXES.index(DATA)] += on_stage_k * np.where(sharded, volume, 0.0)
        return seconds, moved

    def _makespan(
        self,
        place: Placement,
        columns: Columns,
        passes_pkn: Floats,
        weights_kn: Floats,
        one: _Stages,
        vocab: Vocab,
        exact: bool,
    ) -> Floats:
        """Seconds of the pipeline, by its schedule."""
        out = np.zeros(len(columns))
        run = makespan if exact else makespan_bound
        keys = [(v.schedule, v.chunks) for v in columns.variants]
        groups: dict[Any, list[int]] = {}
        for i in range(len(columns)):
            groups.setdefault((*keys[columns.variant[i]], int(columns.microbatches[i])), []).append(i)
        for (schedule, chunks, m), rows in groups.items():
            split = schedule == "zb_h1"
            forward, backward, weights = (_virtual(x[:, rows], place.stage, chunks) for x in (*passes_pkn, weights_kn))
            out[rows] = run(
                schedule,
                stages=place.stage,
                chunks=chunks,
                microbatches=m,
                forward_seconds=forward,
                backward_seconds=backward - weights if split else backward,
                weight_seconds=weights if split else 0.0,
                transfer_seconds=one.transfer_n[rows, None],
            )
        return out

    def held(self, place: Placement, columns: Columns) -> Floats:
        """Bytes of parameters, gradients and optimizer state on the fullest stage, nothing sharded over data or
        offloaded; shape (3, candidates).
        """
        out = np.zeros((3, len(columns)))
        for vocab in VOCABS:
            here = columns.flags("vocab") == vocab
            stages_3kn = np.einsum("kr,prn->pkn", place.stage_weights(vocab), place.held[:, :, columns.fsdp[here]])
            out[:, here] = _Picker(stages_3kn.sum(0).argmax(0))(stages_3kn)
        return out

    def copied_bytes(self, place: Placement, columns: Columns) -> Floats:
        """Bytes that a device's own parameters move per step besides what products and the optimizer do."""
        attained = self.efficiency
        casts = attained.weight_casts * (1 + self.cast) * (self.cast < 1)
        copies = attained.weight_copies * 2 * self.cast * columns.microbatches
        gathered = attained.update_copies * 2 * columns.flags("optimizer_sharding")
        return self.held(place, columns)[PARAMS] * (casts + copies + gathered) * self.trains

    def update_bytes(self, place: Placement, columns: Columns) -> Floats:
        """Bytes that the optimizer's step moves on a device."""
        params, gradients, state = self.held(place, columns)
        return (2 * params + gradients + 2 * state) / self._state_shards(place, columns)

    def _state_shards(self, place: Placement, columns: Columns) -> Floats:
        """Into how many parts the optimizer's state is split over data."""
        data = place.batch_shards / self._fsdp(place, columns)
        return np.where(columns.flags("optimizer_sharding"), data, 1.0)

    def exposed(self, compute: Any, collectives: Any) -> Floats:
        """Seconds that collectives add to the compute they run beside: the slow-down, and what does not fit."""
        slow = self.efficiency.overlap_slowdown - 1
        c, x = np.asarray(compute, np.float64), np.asarray(collectives, np.float64)
        return np.where(x <= c, slow * x, x - c + slow * c)

    def mfu(self, seconds: Any, devices: int) -> Floats:
        """Share of the devices' peak that the model's own products make up, recomputed ones left out."""
        peak = devices * peak_flops(self.cluster, self.dtype)
        return self.model_flops / (np.asarray(seconds, np.float64) * peak)

    def floor(self, devices: int) -> float:
        """Seconds that no plan on this many devices beats: every operation at peak, spread over all devices."""
        return min(ops.floor() for ops in self.ops) / devices

    def bound(self, place: Placement, remat: int, *, sharded: bool = False) -> float:
        """Seconds that no candidate of a placement with this rematerialisation beats.

        Products at the efficiency of large ones, weights read once, no launches; exposed collectives in one microbatch,
        on the fastest links; hidden ones for nothing; stages all equal and never idle; the optimizer at the largest
        fsdp, and over data if candidates may have it `sharded`.
        """
        sizes = {axis: float(size[0]) for axis, size in axis_sizes(place, np.ones(1)).items()}
        seconds = self.ops[remat].bound(place, np.array(list(sizes.values())))
        seconds += sum(self.flows.bound(flow, self.remats[remat], sizes) for flow in place.flows)
        held_3f = place.held.sum(1)
        update = float((2 * held_3f[PARAMS] + held_3f[GRADIENTS] + 2 * held_3f[STATE]).min())
        update /= place.batch_shards if sharded else 1
        return seconds / place.stage + (update / place.stage / self.bandwidth + self.launch) * self.trains

    def compute_by_kind(self, place: Placement, remat: int, microbatches: int) -> dict[str, float]:
        """Seconds of a step's compute by what limits it: products, attention, memory, arithmetic, launches."""
        ops = self.ops[remat]
        sizes_x = np.array([float(s[0]) for s in axis_sizes(place, np.ones(1)).values()])
        found = ops.seconds(place, sizes_x, np.array([float(microbatches)]))
        longer = found.flops[0] >= found.bytes[0]
        kinds = np.where(
            ~longer,
            "memory",
            np.where(ops.product_n, "products", np.where(ops.kind_n == "attention", "attention", "arithmetic")),
        )
        seconds = microbatches / place.stage * np.maximum(found.flops[0], found.bytes[0])
        out = {str(kind): float(seconds[kinds == kind].sum()) for kind in np.unique(kinds)}
        beside = float(microbatches / place.stage * found.beside.sum())
        out |= {"memory": out.get("memory", 0.0) + beside} if beside else {}
        return out | {"launches": float(microbatches / place.stage * found.launch.sum())}

    def stage_seconds(self, place: Placement, columns: Columns, saved_bytes: Floats | None = None) -> dict[str, Any]:
        """Of the first candidate, what its schedule is run with: the time arguments of `search.schedules.simulate`."""
        columns = columns.take(0)
        variant = columns.variants[int(columns.variant[0])]
        one = self._stages(place, columns, np.zeros(1) if saved_bytes is None else saved_bytes, variant.vocab)
        left_pkn = self.exposed(one.cover_pkn, one.hidden_pxkn.sum(1)) + one.exposed_pxkn.sum(1)
        passes_pkn = one.compute_pkn + left_pkn
        forward, backward, weights = (
            _virtual(x, place.stage, variant.chunks)[0] for x in (*passes_pkn, one.weights_kn)
        )
        split = variant.schedule == "zb_h1"
        return {
            "forward_seconds": forward,
            "backward_seconds": backward - weights if split else backward,
            "weight_seconds": weights if split else np.zeros_like(weights),
            "transfer_seconds": float(one.transfer_n[0]),
        }

    def forward_seconds(self, place: Placement, columns: Columns) -> tuple[Floats, Floats]:
        """One microbatch's forward pass, what is waited for of its collectives included.

        Returns:
            Seconds on the stages told apart (first, inner, last; one without stages), shape (stages, candidates), and
            of a transfer to the next stage, shape (candidates,).
        """
        one = self._stages(place, columns, np.zeros(len(columns)), "ends")
        left_pkn = self.exposed(one.cover_pkn, one.hidden_pxkn.sum(1)) + one.exposed_pxkn.sum(1)
        return (one.compute_pkn + left_pkn)[0], one.transfer_n

    def _compute(self, place: Placement, columns: Columns) -> Floats:
        """Seconds of one microbatch's operations, and of these what collectives may run behind; shape (2, regions,
        passes, candidates).

        How the batch is split between data and fsdp matters only where gathered weights are copied.
        """
        out = np.zeros((2, len(REGIONS), len(PASSES), len(columns)))
        fsdp_n = np.array(place.fsdp_sizes, np.int64)[columns.fsdp]
        sizes_x = np.array([float(size[0]) for size in axis_sizes(place, np.ones(1)).values()])
        for remat, ops in enumerate(self.ops):
            here = columns.remat == remat
            counts = np.unique(columns.microbatches[here])
            if len(counts):
                each = ops.seconds(place, sizes_x, counts.astype(np.float64))
                found = np.stack([ops.by_group(each.total), ops.by_group(each.total * ops.covers_n)])
                rows = np.searchsorted(counts, columns.microbatches[here])
                out[:, :, :, here] = np.moveaxis(found[:, rows], 1, 3)
                if each.gathered.any():
                    copied_rp = ops.by_group(np.broadcast_to(each.gathered, each.total.shape))[0]
                    out[0][:, :, here] += copied_rp[:, :, None] * (fsdp_n[here] > 1)
        return out

    def flow_seconds(self, place: Placement, columns: Columns) -> Iterator[tuple[Flow, Floats, Floats]]:
        """Collectives of candidates with their seconds, and bytes of their buffers on a device, per microbatch or step.

        What is waited for of those that do not hide, and not what is kept instead of gathered again (`regather`).
        """
        kept = ~columns.flags("regather").astype(bool)
        sizes, strides = numbering(place, columns)
        for flow, seconds, volume in self.flows.seconds(place.flows, columns, sizes, strides):
            runs = np.where(kept & flow.again, 0.0, 1.0)
            yield flow, seconds * self.flows.waited(flow, sizes) * runs, volume * runs
        sharded = np.where(columns.flags("optimizer_sharding"), 1.0, 0.0)
        if sharded.any():
            for flow, seconds, volume in self.flows.seconds(update_flows(place), columns, sizes, strides):
                yield flow, seconds * sharded, volume * sharded

    def _fsdp(self, place: Placement, columns: Columns) -> Floats:
        return np.array(place.fsdp_sizes, np.float64)[columns.fsdp]


def _alike(columns: Columns) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of candidates that move and compute the same, the first; and for every candidate, which of those it is like."""
    kinds = [(v.order, v.regather) for v in columns.variants]
    kind_v = np.array([kinds.index(kind) for kind in kinds])
    rows = np.stack([columns.fsdp, columns.remat, columns.microbatches, kind_v[columns.variant]])
    _, first, inverse = np.unique(rows, axis=1, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


class _Picker:
    """Picks, for every candidate, one of the stages told apart: the second dimension from the right."""

    def __init__(self, which_n: npt.NDArray[np.int64]):
        self.which_n = which_n

    def __call__(self, x: Floats) -> Floats:
        return np.take_along_axis(x, self.which_n.reshape((1,) * (x.ndim - 1) + (-1,)), axis=-2)[..., 0, :]


def _share(x: Floats, *, axis: int) -> Floats:
    total = x.sum(axis, keepdims=True)
    return np.divide(x, total, out=np.zeros_like(x), where=total > 0)


def _virtual(x_kn: Floats, stages: int, chunks: int) -> Floats:
    """Seconds of every virtual stage from those of the stages told apart; shape (candidates, stages * chunks).

    What only the first or the last stage has belongs to the first or the last virtual stage.
    """
    if len(x_kn) == 1:
        return np.repeat(x_kn.T / chunks, stages * chunks, axis=1)
    first, inner, last = x_kn
    out = np.repeat(inner[:, None] / chunks, stages * chunks, axis=1)
    out[:, 0] += first - inner
    out[:, -1] += last - inner
    return out


def _merge(parts: Sequence[StepSeconds], masks: Sequence[Bools]) -> StepSeconds:
    """Seconds of candidates from those of their groups."""

    def scatter(values: Sequence[Floats]) -> Floats:
        out = np.zeros(len(masks[0]))
        for value, mask in zip(values, masks, strict=True):
            out[mask] = value
        return out

    fields: dict[str, Any] = {}
    for field in dataclasses.fields(StepSeconds):
        values = [getattr(part, field.name) for part in parts]
        fields[field.name] = (
            {axis: scatter([v[axis] for v in values]) for axis in values[0]}
            if isinstance(values[0], Mapping)
            else scatter(values)
        )
    return StepSeconds(**fields)


__all__ = ["PRODUCTS", "Columns", "CostModel", "Flow", "Placement", "StepSeconds", "Variant"]
