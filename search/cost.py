"""Seconds per step of many plans at once (analytic), from the table of operations and the collectives they need.

    costs = CostModel(cluster, {"none": workload(traced), "full": workload(traced, remat="full")})
    parts = costs.seconds(placement, columns)          # numpy, one entry per candidate
    parts.total, parts.exposed["fsdp"], costs.mfu(parts.total, devices)

With M microbatches, C and X the seconds of compute and of collectives that may hide behind it, of one microbatch:

    step = M (compute + exposed) + optimizer
    op time      max(flops / attained flops, bytes / attained bandwidth) + launch            roofline (Williams 2009)
    overlapped   C + exposed(C, X),  exposed = s X if X <= C, else X - C + s C,  s = 0.13    slowed while both run
    exposed      collectives over tensor, context and expert, between which a device has nothing else to do
    hidden       gathers and reduce-scatters of fsdp behind the pass they belong to; the gradients' all-reduce, once per
                 step, behind the backward pass of the last microbatch

A *placement* says which mesh axes split which rows, and with it the traffic; within a placement only the split of the
batch between data and fsdp, the rematerialisation and the microbatches vary, so that work is counted once for all.

Not costed, though the compiled step has it: what moves where a split is misaligned (fused gate and up weights), where
tensor is larger than the heads of keys (queries move to them), and where tokens are sorted over the whole batch. Over
context the cost is that of gathering keys and values; XLA may gather queries and sum the outputs instead. Gradients are
all-reduced once per step, also with microbatches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from search.cluster import Cluster
from search.collectives import Kind, collective_seconds, lower_bound_seconds
from search.efficiency import Efficiency
from search.plan import Remat
from search.workload import Workload
from sharding_rules import AXES, DATA, FSDP, MeshShape

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
PRODUCTS = ("dot", "conv", "ragged")
Region = Literal["layers", "first", "last"]
"""Parts of a model: its repeated layers, what comes before them (the embedding) and what comes after (the head)."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """A collective that a placement needs.

    Attributes:
        kind: as in `search.collectives`.
        axes: mesh axes of the group, outermost first.
        bytes: of the whole buffer on all devices, for the global batch; or one number per fsdp size of the placement.
        split: mesh axes that split the buffer besides.
        phase: "forward" and "backward" are per microbatch, "step" is once.
        hides: whether it may run behind the compute of its phase.
        batch: whether the buffer shrinks with the number of microbatches.
        count: times per microbatch or step, by rematerialisation ("" for all).
        summed_bytes: instead of `bytes` with more than one microbatch (gradients summed in a wider dtype).
        region: the part of the model it belongs to: the repeated layers, which pipeline stages share out, or the rest.
    """

    kind: Kind
    axes: tuple[str, ...]
    bytes: float | Floats
    split: tuple[str, ...]
    phase: Literal["forward", "backward", "step"]
    hides: bool
    batch: bool
    count: Mapping[str, float]
    summed_bytes: float | Floats | None = None
    region: Region = "layers"

    def __post_init__(self):
        if self.phase == "step" and self.batch:
            raise ValueError(f"a {self.kind} once per step does not shrink with microbatches: batch=False")

    def times(self, remat: str) -> float:
        return self.count.get(remat, self.count.get("", 0.0))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which mesh axes split which rows; the same for all candidates with these sizes of the inner axes.

    Attributes:
        stage, expert, context, tensor: sizes of the mesh axes; the rest of the devices are split by data and fsdp.
        batch_shards: devices over data and fsdp.
        sequence: whether activations between blocks are split over tensor.
        rows: bool (rows, mesh axes), while computing.
        spill: bool (rows, mesh axes), for arrays whose mesh axes no row of `rows` took.
        beyond, groups: bool (rows): heads of keys fewer than their split, which then holds only with a row of groups.
        fsdp_sizes: sizes that are allowed.
        flows: collectives.
        optimizer_bytes: bytes that the optimizer step moves on a device, per fsdp size.
        gradient_bytes: bytes of the summed gradients on a device, per fsdp size.
        kept_bytes: parameters, gradients and optimizer state on a device, per fsdp size.
        payload: what the maker of the placement needs to count activations.
    """

    expert: int
    context: int
    tensor: int
    batch_shards: int
    sequence: bool
    rows: Bools
    spill: Bools
    beyond: Bools
    groups: Bools
    fsdp_sizes: tuple[int, ...]
    flows: tuple[Flow, ...]
    optimizer_bytes: Floats
    gradient_bytes: Floats
    kept_bytes: Floats
    payload: Any = None

    def mesh(self, fsdp: int) -> MeshShape:
        return MeshShape(
            data=self.batch_shards // fsdp, fsdp=fsdp, expert=self.expert, context=self.context, tensor=self.tensor
        )

    @property
    def devices(self) -> int:
        return self.batch_shards * self.expert * self.context * self.tensor


@dataclasses.dataclass(frozen=True)
class Columns:
    """Candidates of one placement: parallel arrays.

    Attributes:
        fsdp: index into `Placement.fsdp_sizes`.
        remat: index into `CostModel.remats`.
        microbatches: number.
    """

    fsdp: npt.NDArray[np.int64]
    remat: npt.NDArray[np.int64]
    microbatches: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.fsdp)


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """Seconds per step by part (analytic), one entry per candidate.

    Attributes:
        compute: of all microbatches, the sum of gradients over microbatches included.
        exposed: mesh axis -> seconds of its collectives that compute does not hide, the slow-down of overlap included.
        hidden: seconds of collectives that run behind compute.
        bubble: idle time of pipeline stages: 0, stages are not run.
        optimizer: of the optimizer's step.
    """

    compute: Floats
    exposed: Mapping[str, Floats]
    hidden: Floats
    bubble: Floats
    optimizer: Floats

    @property
    def communication(self) -> Floats:
        """Exposed, over all axes."""
        return np.sum(list(self.exposed.values()), axis=0)

    @property
    def total(self) -> Floats:
        return self.compute + self.communication + self.bubble + self.optimizer

    def at(self, i: int) -> dict[str, float]:
        """The parts of one candidate, without those that are zero."""
        parts = {"compute": self.compute[i], **{f"exposed {axis}": s[i] for axis, s in self.exposed.items()}}
        parts |= {"bubble": self.bubble[i], "optimizer": self.optimizer[i]}
        return {name: float(seconds) for name, seconds in parts.items() if seconds > 0}


class _Ops:
    """One workload as arrays; n operations, a arrays that they move, r rows, x mesh axes."""

    def __init__(self, work: Workload, rows: Sequence[str], batch_rows: Bools, cluster: Cluster, eff: Efficiency):
        work = work.merged()
        column = [list(work.rows).index(name) for name in rows]
        table, arrays = work.table(), work.arrays()
        self.axes_nr: Bools = table["axes"][:, column]
        self.contracted_nr: Bools = table["contracted"][:, column]
        self.array_axes_ar: Bools = arrays["axes"][:, column]
        self.array_op_a = arrays["op"]
        self.array_bytes_a: Floats = arrays["bytes"]
        self.trips_n: Floats = table["trips"]
        self.forward_n: Bools = table["phase"] == "forward"
        kinds = table["kind"]
        self.product_n: Bools = np.isin(kinds, PRODUCTS)
        peaks = np.array([_peak(cluster, dtype) for dtype in table["dtype"]])
        self.flops_n: Floats = np.where(
            self.product_n | (kinds == "attention"),
            table["flops"],
            table["flops"] + eff.transcendental_flops * table["transcendentals"],
        )
        vector = np.full(len(kinds), eff.vector * _peak(cluster, "bfloat16"))
        self.rate_n: Floats = np.where(
            self.product_n, peaks * eff.matmul, np.where(kinds == "attention", peaks * eff.attention, vector)
        )
        self.sizes_n3: Floats = np.stack([table["m"], table["n"], table["k"]], axis=1)
        self.batched_n: Bools = np.any(self.axes_nr & batch_rows, axis=1)
        self.batched_a: Bools = np.any(self.array_axes_ar & batch_rows, axis=1)
        self.batch_rows: Bools = batch_rows
        # The operands of a product, the larger two that it reads: rows of one alone are those of m or n.
        self.lhs_nr = np.zeros_like(self.axes_nr)
        self.rhs_nr = np.zeros_like(self.axes_nr)
        read = ~arrays["written"]
        for op in np.flatnonzero(self.product_n):
            mine = np.flatnonzero((self.array_op_a == op) & read)
            largest = sorted(sorted(mine, key=lambda a: -self.array_bytes_a[a])[:2])
            if len(largest) == 2:
                self.lhs_nr[op], self.rhs_nr[op] = self.array_axes_ar[largest]
            elif largest:
                self.lhs_nr[op] = self.array_axes_ar[largest[0]]

    def split(self, incidence_ir: Bools, place: Placement, sizes_x: Floats) -> tuple[Floats, Bools]:
        """How many ways things divide whose rows are given, and over which mesh axes."""
        grouped = np.any(incidence_ir & place.groups, axis=1)
        clean = (incidence_ir & ~place.beyond) @ place.rows
        beyond = (incidence_ir & place.beyond) @ place.rows
        taken = clean | (beyond & np.asarray(grouped)[:, None]) | incidence_ir @ place.spill
        return np.where(taken, sizes_x, 1.0).prod(1), taken


def _peak(cluster: Cluster, dtype: str) -> float:
    """FLOP/s of products in a dtype; integers and what the accelerator does not list run as bfloat16 or float32."""
    for name in (dtype, "bfloat16", "float32"):
        try:
            return cluster.accelerator.flops(name)
        except ValueError:
            continue
    return cluster.accelerator.peak_flops_per_second[0][1]


class CostModel:
    """Seconds of candidates on a cluster.

    Args:
        cluster: accelerators and links.
        works: rematerialisation -> workload of the step on the global batch; all have the same rows.
        batch_rows: names of the rows that are split into microbatches.
        efficiency: constants; default those that the cluster's file has measured.
    """

    def __init__(
        self,
        cluster: Cluster,
        works: Mapping[Remat, Workload],
        *,
        batch_rows: Sequence[str] = ("batch",),
        efficiency: Efficiency | None = None,
    ):
        self.cluster = cluster
        self.efficiency = efficiency or cluster.efficiency or Efficiency()
        self.remats: tuple[Remat, ...] = tuple(works)
        self.row_names = tuple(next(iter(works.values())).rows)
        is_batch = np.isin(self.row_names, list(batch_rows))
        self.works = dict(works)
        self._ops = [_Ops(work, self.row_names, is_batch, cluster, self.efficiency) for work in works.values()]
        self.bandwidth = self.efficiency.bandwidth * cluster.accelerator.memory_bytes_per_second
        self.launch = dict(self.efficiency.launch_seconds)[cluster.accelerator.kind]
        self.model_flops = min(work.product_flops for work in works.values())
        by_dtype = {k: v for k, v in works[self.remats[0]].flops_by("dtype").items()}
        self.dtype = max(by_dtype, key=lambda name: by_dtype[name], default="bfloat16")

    def seconds(self, place: Placement, columns: Columns) -> StepSeconds:
        """Seconds of candidates of one placement."""
        compute_2n = self._compute(place, columns)
        m = columns.microbatches.astype(np.float64)
        fsdp_n = np.array(place.fsdp_sizes, np.float64)[columns.fsdp]
        gradients_n = np.where(m > 1, 3 * m * place.gradient_bytes[columns.fsdp] / self.bandwidth, 0.0)
        sizes, strides = _numbering(place, fsdp_n)
        hidden = {phase: np.zeros((len(AXES), len(columns))) for phase in ("forward", "backward", "step")}
        exposed_xn = np.zeros((len(AXES), len(columns)))
        for flow in place.flows:
            seconds = self._flow(flow, columns, sizes, strides)
            credit = self._credit(flow, sizes)
            if flow.hides:
                hidden[flow.phase] += credit * seconds
            else:
                exposed_xn += credit * seconds * (1.0 if flow.phase == "step" else m)
        forward, backward = compute_2n
        last_xn = hidden["backward"] + hidden["step"]
        for behind, xn, count in (
            (forward, hidden["forward"], m),
            (backward, hidden["backward"], m - 1),
            (backward, last_xn, 1.0),
        ):
            total = xn.sum(0)
            share = np.divide(xn, total, out=np.zeros_like(xn), where=total > 0)
            exposed_xn += count * self.exposed(behind, total) * share
        every = (m * (hidden["forward"] + hidden["backward"]) + hidden["step"]).sum(0)
        return StepSeconds(
            compute=m * (forward + backward) + gradients_n,
            exposed={axis: exposed_xn[i] for i, axis in enumerate(AXES)},
            hidden=every,
            bubble=np.zeros(len(columns)),
            optimizer=place.optimizer_bytes[columns.fsdp] / self.bandwidth + self.launch,
        )

    def exposed(self, compute: Any, collectives: Any) -> Floats:
        """Seconds that collectives add to the compute they run beside: the slow-down, and what does not fit."""
        slow = self.efficiency.overlap_slowdown - 1
        c, x = np.asarray(compute, np.float64), np.asarray(collectives, np.float64)
        return np.where(x <= c, slow * x, x - c + slow * c)

    def mfu(self, seconds: Any, devices: int) -> Floats:
        """Share of the devices' peak that the model's own products make up, recomputed ones left out."""
        peak = devices * _peak(self.cluster, self.dtype)
        return self.model_flops / (np.asarray(seconds, np.float64) * peak)

    def floor(self, devices: int) -> float:
        """Seconds that no plan on this many devices beats: every operation at peak, spread over all devices."""
        best = math.inf
        for ops in self._ops:
            flops = np.maximum(ops.flops_n / ops.rate_n, self._op_bytes(ops, np.ones(len(ops.array_bytes_a))))
            best = min(best, float((ops.trips_n * flops).sum()) / devices)
        return best

    def bound(self, place: Placement, remat: int) -> float:
        """Seconds that no candidate of a placement with this rematerialisation beats.

        Products at the efficiency of large ones, weights read once, no launches; exposed collectives in one microbatch,
        on the fastest links; hidden ones for nothing; the optimizer at the largest fsdp.
        """
        ops = self._ops[remat]
        fsdp = np.ones(1)
        sizes_x = np.array([size[0] for size in _numbering(place, fsdp)[0].values()])
        ways_n, _ = ops.split(ops.axes_nr, place, sizes_x)
        ways_a, _ = ops.split(ops.array_axes_ar, place, sizes_x)
        seconds = (ops.trips_n * np.maximum(ops.flops_n / ops.rate_n / ways_n, self._op_bytes(ops, ways_a))).sum()
        for flow in place.flows:
            if not flow.hides:
                local = {axis: size for axis, size in zip(AXES, sizes_x, strict=True)}
                size = math.prod(local[axis] for axis in flow.axes)
                volume = float(np.min(flow.bytes)) / math.prod(local[axis] for axis in flow.split)
                once = lower_bound_seconds(self.cluster, flow.kind, volume, size)
                seconds += flow.times(self.remats[remat]) * float(once)
        return float(seconds + place.optimizer_bytes.min() / self.bandwidth + self.launch)

    def _op_bytes(self, ops: _Ops, ways_a: Floats) -> Floats:
        """Seconds of one execution's bytes."""
        moved = np.bincount(ops.array_op_a, ops.array_bytes_a / ways_a, minlength=len(ops.trips_n))
        return moved / self.bandwidth

    def _compute(self, place: Placement, columns: Columns) -> Floats:
        """Seconds of one microbatch's (forward, recompute and backward) operations; shape (2, candidates).

        How the batch is split between data and fsdp does not matter.
        """
        out = np.zeros((2, len(columns)))
        sizes_x = np.array([size[0] for size in _numbering(place, np.ones(1))[0].values()])
        for remat, ops in enumerate(self._ops):
            here = columns.remat == remat
            counts = np.unique(columns.microbatches[here])
            if not len(counts):
                continue
            forward, backward = self._op_seconds(ops, place, sizes_x, counts.astype(np.float64))
            index = np.searchsorted(counts, columns.microbatches[here])
            out[0, here], out[1, here] = forward[index], backward[index]
        return out

    def _op_seconds(self, ops: _Ops, place: Placement, sizes_x: Floats, counts_m: Floats) -> tuple[Floats, Floats]:
        ways_n, taken_nx = ops.split(ops.axes_nr, place, sizes_x)
        ways_a, _ = ops.split(ops.array_axes_ar, place, sizes_x)
        parts_mn = np.where(ops.batched_n, counts_m[:, None], 1.0)
        parts_ma = np.where(ops.batched_a, counts_m[:, None], 1.0)
        moved_mn = np.stack([self._op_bytes(ops, ways_a * parts) for parts in parts_ma])
        # Of each mesh axis that splits a product, one of k, m, n and the batch of products gets it, in this order.
        sizes_n3 = ops.sizes_n3.copy()
        left_nx = taken_nx.copy()
        roles = ((2, ops.contracted_nr), (0, ops.lhs_nr & ~ops.rhs_nr), (1, ops.rhs_nr & ~ops.lhs_nr))
        for column, incidence in roles:
            _, got = ops.split(incidence & ~ops.contracted_nr if column != 2 else incidence, place, sizes_x)
            got &= left_nx
            left_nx &= ~got
            sizes_n3[:, column] /= np.where(got, sizes_x, 1.0).prod(1)
        shrinks_n3 = np.stack(
            [((incidence & ops.batch_rows).any(1)) for _, incidence in (roles[1], roles[2], roles[0])], axis=1
        )
        shrinks_n3[:, :2] &= ~shrinks_n3[:, 2:]
        local_mn3 = np.maximum(sizes_n3 / np.where(shrinks_n3, counts_m[:, None, None], 1.0), 1.0)
        share_mn = self.efficiency.product(*np.moveaxis(local_mn3, 2, 0)) / self.efficiency.matmul
        rate_mn = np.where(ops.product_n, ops.rate_n * share_mn, ops.rate_n)
        seconds_mn = np.maximum(ops.flops_n / (ways_n * parts_mn) / rate_mn, moved_mn) + self.launch
        seconds_mn *= ops.trips_n
        return seconds_mn[:, ops.forward_n].sum(1), seconds_mn[:, ~ops.forward_n].sum(1)

    def _flow(self, flow: Flow, columns: Columns, sizes: Mapping[str, Floats], strides: Mapping[str, Floats]) -> Floats:
        """Seconds of a flow per microbatch, or per step."""
        m = columns.microbatches
        volume = _pick(flow.bytes, columns)
        if flow.summed_bytes is not None:
            volume = np.where(m > 1, _pick(flow.summed_bytes, columns), volume)
        volume = volume / math.prod((sizes[axis] for axis in flow.split), start=np.ones(len(columns)))
        if flow.batch:
            volume = volume / m
        once = collective_seconds(
            self.cluster,
            flow.kind,
            volume,
            tuple(sizes[axis] for axis in flow.axes),
            tuple(strides[axis] for axis in flow.axes),
        )
        return once * np.array([flow.times(remat) for remat in self.remats])[columns.remat]

    def _credit(self, flow: Flow, sizes: Mapping[str, Floats]) -> Bools:
        """The mesh axis that a flow's seconds are told under: the outermost of its axes that is larger than 1."""
        credit = np.zeros((len(AXES), len(sizes[DATA])), dtype=bool)
        free = np.ones(len(sizes[DATA]), dtype=bool)
        for axis in flow.axes:
            credit[AXES.index(axis)] = free & (sizes[axis] > 1)
            free &= ~(sizes[axis] > 1)
        return credit


def _pick(bytes_: float | Floats, columns: Columns) -> Floats:
    return np.asarray(bytes_, np.float64)[columns.fsdp] if np.ndim(bytes_) else np.full(len(columns), float(bytes_))  # type: ignore[arg-type]


def _numbering(place: Placement, fsdp_n: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Sizes of the mesh axes, and distances of neighbours along them, in the order of `AXES`: tensor innermost."""
    ones = np.ones_like(fsdp_n)
    sizes = dict.fromkeys(AXES, ones) | {DATA: place.batch_shards / fsdp_n, FSDP: fsdp_n}
    sizes |= {axis: ones * getattr(place, axis) for axis in ("expert", "context", "tensor")}
    strides, stride = {}, ones
    for axis in reversed(AXES):
        strides[axis], stride = stride, stride * sizes[axis]
    return {axis: sizes[axis] for axis in AXES}, strides
