"""Seconds of the operations of a step under a placement (analytic): the roofline, operation by operation.

    op time = max(flops / attained flops, bytes / attained bandwidth) + launch            Williams et al. 2009

Dimensions: n operations, a arrays that they move, r rows, x mesh axes, m numbers of microbatches.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from search.cluster import Cluster
from search.efficiency import Efficiency
from search.placement import REGIONS, Bools, Floats, Placement, axis_sizes
from search.regions import op_regions, split_ends
from search.workload import Workload
from sharding_rules import AXES, CONTEXT, EXPERT, TENSOR

PRODUCTS = ("dot", "conv", "ragged")
LOOPS = ("elementwise", "reduce")
PASSES = ("forward", "backward", "weights")
"""Forward; backward, with what it computes again; gradients of weights, which zero-bubble schedules run apart."""


TENSOR_AT, EXPERT_AT = AXES.index(TENSOR), AXES.index(EXPERT)
SUM_BYTES = 10
"""Bytes that a sum of gradients in float32 moves per byte of one in bfloat16: 4 of zeros, 4 + 2 + 4, and 4 + 2 at the
end, for 2."""


@dataclasses.dataclass(frozen=True)
class Routed:
    """Rows of calls of `sharding_rules.experts`, by name.

    Attributes:
        chosen: the experts of one token. hidden: the width of one expert.
    """

    chosen: str
    hidden: str


@dataclasses.dataclass(frozen=True)
class OpSeconds:
    """Seconds of one execution on a device, times its executions per step; shape (m, n).

    Attributes:
        flops, bytes: of the arithmetic and of the memory; the longer of the two counts.
        launch: shape (n,).
        beside: of what moves through memory besides, after the operation; shape (n,).
        gathered: the same, where its weights are gathered; shape (n,).
    """

    flops: Floats
    bytes: Floats
    launch: Floats
    beside: Floats
    gathered: Floats

    @property
    def total(self) -> Floats:
        """Without what is there only where weights are gathered."""
        return np.maximum(self.flops, self.bytes) + self.launch + self.beside


class OpTimes:
    """One workload as arrays.

    Args:
        work: of the step on the global batch.
        rows: names of the columns of placements.
        batch_rows: bool per row: split into microbatches.
        cluster, efficiency: machines and what they attain.
        layers: number of repeated layers.
        routed: where the model calls `experts`.
    """

    def __init__(
        self,
        work: Workload,
        rows: Sequence[str],
        batch_rows: Bools,
        cluster: Cluster,
        efficiency: Efficiency,
        layers: int = 1,
        routed: Routed | None = None,
    ):
        work = split_ends(work.merged(), layers)
        column = [list(work.rows).index(name) for name in rows]
        table, arrays = work.table(), work.arrays()
        self.axes_nr: Bools = table["axes"][:, column]
        self.contracted_nr: Bools = table["contracted"][:, column]
        self.array_axes_ar: Bools = arrays["axes"][:, column]
        self.array_op_a = arrays["op"]
        self.array_bytes_a: Floats = arrays["bytes"]
        self.trips_n: Floats = table["trips"]
        self.kind_n = table["kind"]
        self.product_n: Bools = np.isin(self.kind_n, PRODUCTS)
        self.attention_n: Bools = self.kind_n == "attention"
        self.causal_n: Bools = table["causal"]
        self.dtype_n, self.backward_n = table["dtype"], table["phase"] == "backward"
        self.arithmetic_n, self.transcendentals_n = table["flops"], table["transcendentals"]
        self.sizes_n3: Floats = np.stack([table["m"], table["n"], table["k"]], axis=1)
        self.batched_n: Bools = np.any(self.axes_nr & batch_rows, axis=1)
        self.batched_a: Bools = np.any(self.array_axes_ar & batch_rows, axis=1)
        self.batch_rows: Bools = batch_rows
        self.written_a: Bools = arrays["written"]
        self._operands(self.written_a)
        self.groups_n = self._groups(table["phase"], op_regions(work, layers))
        self._layouts: dict[Any, tuple[Any, ...]] = {}
        self._read_routed(rows, routed, table["phase"])
        self._attain(cluster, efficiency)

    def _read_routed(self, rows: Sequence[str], routed: Routed | None, phase_n: np.ndarray) -> None:
        """Arrays of all tokens of the devices that share experts, and how often operations run on own experts.

        A device with experts of its own (`pipelines.experts`) sorts the tokens of all that share them, and its arrays
        of tokens have room for all; those of the hidden width only for its own. For the backward pass it keeps nothing
        but tokens: it makes the hidden values again, once, whatever is rematerialised. Devices that each have a part
        of every expert have all tokens too.
        """
        self.gathered_a: Bools = np.zeros(len(self.array_op_a), bool)
        self.own_n: Floats = np.ones(len(self.trips_n))
        self.routed_n: Bools = np.zeros(len(self.trips_n), bool)
        self.matrix_a: Bools = np.zeros(len(self.array_op_a), bool)
        if routed is None:
            return
        chosen, hidden = (np.array([name == row for name in rows]) for row in (routed.chosen, routed.hidden))
        wide_a = self.array_axes_ar @ hidden
        self.gathered_a = self.array_axes_ar @ chosen & ~wide_a & ~self.product_n[self.array_op_a]
        self.routed_n[self.array_op_a[self.gathered_a]] = True
        ragged = self.kind_n == "ragged"
        # Gradients of experts' matrices: what their products write.
        gradient = ragged & (phase_n == "backward") & np.any(self.contracted_nr & self.batch_rows, axis=1)
        self.matrix_a = self.written_a & gradient[self.array_op_a]
        self.own_n[ragged & (phase_n == "recompute")] = 0.0
        self.own_n[ragged & (phase_n == "forward") & ~(self.contracted_nr @ hidden)] = 2.0
        self.own_n[(self.kind_n == "stack") & (self.axes_nr @ chosen)] = 0.0

    def on(self, cluster: Cluster, efficiency: Efficiency) -> OpTimes:
        """The same operations on other machines, or with other constants."""
        other = copy.copy(self)
        other._attain(cluster, efficiency)
        return other

    def _attain(self, cluster: Cluster, efficiency: Efficiency) -> None:
        """Rates of the operations."""
        self.efficiency = efficiency
        self.bandwidth = efficiency.bandwidth * cluster.accelerator.memory_bytes_per_second
        self.launch = dict(efficiency.launch_seconds)[cluster.accelerator.kind]
        peak = {str(dtype): peak_flops(cluster, str(dtype)) for dtype in np.unique(self.dtype_n)}
        peaks = np.array([peak[str(dtype)] for dtype in self.dtype_n])
        usual = peak_flops(cluster, "bfloat16")
        self.speed_n: Floats = np.maximum(peaks / usual, 1.0)
        narrow = np.array([1.0 if wide(str(dtype)) else efficiency.narrow for dtype in self.dtype_n])
        attention = efficiency.attention * np.where(self.backward_n, efficiency.attention_backward, 1.0)
        loops = ~(self.product_n | self.attention_n)
        fused = np.isin(self.kind_n, LOOPS)
        self.flops_n: Floats = self.arithmetic_n + np.where(
            loops, efficiency.transcendental_flops * self.transcendentals_n, 0.0
        )
        self.rate_n: Floats = np.where(
            self.product_n,
            peaks * efficiency.matmul * narrow,
            np.where(self.attention_n, peaks * attention, efficiency.vector * usual),
        )
        stacks = self.kind_n == "stack"
        moved = np.where(stacks, efficiency.stack_traffic, np.where(fused, efficiency.loop_traffic, 1.0))
        moved = np.where(self.routed_n & ~self.product_n & ~stacks, efficiency.routed_traffic, moved)
        self.traffic_n: Floats = moved / self.bandwidth
        self.launch_n: Floats = np.where(stacks, 0.0, self.launch)
        kernels = self.attention_n | (self.kind_n == "ragged")
        self.covers_n: Floats = np.where(
            kernels, efficiency.kernels_cover, np.where(self.product_n, 1.0, efficiency.loops_cover)
        )

    def _groups(self, phase: np.ndarray, regions: Sequence[str]) -> np.ndarray:
        """Region and pass of every operation, as one number."""
        backward = phase != "forward"
        weights = (phase == "backward") & self.product_n & np.any(self.contracted_nr & self.batch_rows, axis=1)
        passes = np.where(weights, 2, np.where(backward, 1, 0))
        return np.array([REGIONS.index(region) for region in regions]) * len(PASSES) + passes  # type: ignore[arg-type]

    def _operands(self, written: Bools) -> None:
        """Of a product, the larger two arrays that it reads: rows of one alone are those of m or n."""
        self.lhs_nr = np.zeros_like(self.axes_nr)
        self.rhs_nr = np.zeros_like(self.axes_nr)
        for op in np.flatnonzero(self.product_n):
            mine = np.flatnonzero((self.array_op_a == op) & ~written)
            largest = sorted(sorted(mine, key=lambda a: -self.array_bytes_a[a])[:2])
            if len(largest) == 2:
                self.lhs_nr[op], self.rhs_nr[op] = self.array_axes_ar[largest]
            elif largest:
                self.lhs_nr[op] = self.array_axes_ar[largest[0]]

    def split(self, incidence_ir: Bools, place: Placement, sizes_x: Floats) -> tuple[Floats, Bools]:
        """How many ways things divide whose rows are given, and over which mesh axes."""
        taken = self._computed(incidence_ir, place) | incidence_ir @ place.spill
        return np.where(taken, sizes_x, 1.0).prod(1), taken

    def _computed(self, incidence_ir: Bools, place: Placement) -> Bools:
        """Mesh axes that split things while they are computed with."""
        grouped = np.any(incidence_ir & place.groups, axis=1)
        clean = (incidence_ir & ~place.beyond) @ place.rows
        beyond = (incidence_ir & place.beyond) @ place.rows
        return clean | (beyond & np.asarray(grouped)[:, None])

    def seconds(self, place: Placement, sizes_x: Floats, counts_m: Floats) -> OpSeconds:
        """Seconds of one microbatch's operations, for some numbers of microbatches; shape (m, n)."""
        key = (id(place), tuple(sizes_x), tuple(counts_m), self.efficiency.room_for_all)
        if key not in self._layouts:
            if len(self._layouts) >= 32:
                self._layouts.clear()
            # The placement is kept, so that its id is not given to another.
            self._layouts[key] = (place, *self._layout(place, sizes_x, counts_m))
        _, parts_mn, moved_mn, local_3mn, slowest_n, matrix_n = self._layouts[key]
        batch_mn = np.maximum(self.arithmetic_n / parts_mn / (2 * local_3mn.prod(0)), 1.0)
        share_mn = self.efficiency.product(*local_3mn, batch=batch_mn, speed=self.speed_n) / self.efficiency.matmul
        rate_mn = np.where(self.product_n, self.rate_n * share_mn, self.rate_n)
        trips_n = self._executions(place)
        return OpSeconds(
            trips_n * (self.flops_n / parts_mn / rate_mn) * (1 + self.efficiency.contiguous * slowest_n),
            trips_n * moved_mn * self.traffic_n,
            trips_n * self.launch_n,
            # Summed over pieces of tokens in float32: filled with zeros, read and written as the gradient is read, and
            # cast; `pipelines.experts`.
            trips_n * matrix_n * (SUM_BYTES * self.efficiency.own_experts if place.expert > 1 else 0.0),
            trips_n * matrix_n * 2 * self.efficiency.matrix_copies,
        )

    def _executions(self, place: Placement) -> Floats:
        """How often each operation runs in a step."""
        own = self.efficiency.own_experts if place.expert > 1 else 0.0
        return self.trips_n * (1 + own * (self.own_n - 1))

    def _layout(self, place: Placement, sizes_x: Floats, counts_m: Floats) -> tuple[Floats, ...]:
        """Of every operation on a device: parts of its work, bytes, the sizes of a product, how much more than the mean
        the device with most of a causal mask's scores computes where context splits the sequence into c parts, (1 + ...
        + c) / c of which it has c makes 2 - 1 / c times; and seconds of reading a gradient of experts' matrices.
        """
        ways_n, taken_nx = self.split(self.axes_nr, place, sizes_x)
        ways_a, taken_ax = self.split(self.array_axes_ar, place, sizes_x)
        computed_nx = self._computed(self.axes_nr, place)
        # What lies split between blocks only (sequence parallelism) is whole where a product splits another row.
        whole_ax = taken_ax & ~self._computed(self.array_axes_ar, place) & computed_nx[self.array_op_a]
        whole_ax &= self.product_n[self.array_op_a, None]
        ways_a = ways_a / np.where(whole_ax, sizes_x, 1.0).prod(1)
        if self.gathered_a.any() and self.efficiency.own_experts:
            # Parts of experts compute all tokens of their devices, whole experts have room for them.
            if place.tensor > 1 and place.sequence:
                ways_a = np.where(self.gathered_a & taken_ax[:, TENSOR_AT], ways_a / sizes_x[TENSOR_AT], ways_a)
            room = np.where(taken_ax[:, EXPERT_AT], 1 + self.efficiency.room_for_all * (sizes_x[EXPERT_AT] - 1), 1.0)
            ways_a = np.where(self.gathered_a, ways_a / room, ways_a)
        parts_mn = np.where(self.batched_n, counts_m[:, None], 1.0)
        parts_ma = np.where(self.batched_a, counts_m[:, None], 1.0)
        moved_mn = np.stack([self._moved(ways_a * parts) for parts in parts_ma])
        # Of each mesh axis that splits a product, one of k, m, n and the batch of products gets it, in this order.
        sizes_n3 = self.sizes_n3.copy()
        left_nx = taken_nx.copy()
        roles = ((2, self.contracted_nr), (0, self.lhs_nr & ~self.rhs_nr), (1, self.rhs_nr & ~self.lhs_nr))
        for column, incidence in roles:
            rows = incidence & ~self.contracted_nr if column != 2 else incidence
            got = self._computed(rows, place) | (rows @ place.spill & ~computed_nx)
            got &= left_nx
            left_nx &= ~got
            sizes_n3[:, column] /= np.where(got, sizes_x, 1.0).prod(1)
        shrinks_n3 = np.stack(
            [((incidence & self.batch_rows).any(1)) for _, incidence in (roles[1], roles[2], roles[0])], axis=1
        )
        shrinks_n3[:, :2] &= ~shrinks_n3[:, 2:]
        local_mn3 = np.maximum(sizes_n3 / np.where(shrinks_n3, counts_m[:, None, None], 1.0), 1.0)
        matrices = np.bincount(
            self.array_op_a, self.matrix_a * self.array_bytes_a / ways_a, minlength=len(self.trips_n)
        )
        context = AXES.index(CONTEXT)
        slowest_n = np.where(self.causal_n & taken_nx[:, context], 1 - 1 / sizes_x[context], 0.0)
        return ways_n * parts_mn, moved_mn, np.moveaxis(local_mn3, 2, 0), slowest_n, matrices / self.bandwidth

    def memory_bytes(self, place: Placement, counts_m: Floats) -> dict[str, Floats]:
        """Bytes that a device moves in a step, as counted, nothing attained; shape (m,).

        Returns:
            "loops", "stacks", "routed" (what sorts tokens by experts, and back), "matrices" (those of experts, copied
            once), and of what else but products takes longer for its bytes than for its arithmetic, "rest".
        """
        sizes_x = np.array([float(size[0]) for size in axis_sizes(place, np.ones(1)).values()])
        _, moved_mn, *_, matrix_n = self._layout(place, sizes_x, counts_m)
        found = self.seconds(place, sizes_x, counts_m)
        loops, stacks = np.isin(self.kind_n, LOOPS), self.kind_n == "stack"
        routed = self.routed_n & ~self.product_n & ~stacks
        loops &= ~routed
        rest = ~loops & ~stacks & ~routed & ~self.product_n & (found.bytes > found.flops)
        which = {"loops": loops, "stacks": stacks, "routed": routed, "rest": rest}
        trips_n = self._executions(place)
        moved = {name: counts_m * (trips_n * moved_mn * mask).sum(-1) for name, mask in which.items()}
        return moved | {"matrices": counts_m * 2 * (trips_n * matrix_n).sum() * self.bandwidth}

    def by_group(self, seconds_mn: Floats) -> Floats:
        """Sums over the operations of each region and pass; shape (m, regions, passes)."""
        width = len(REGIONS) * len(PASSES)
        sums = [np.bincount(self.groups_n, row, minlength=width) for row in seconds_mn]
        return np.array(sums, np.float64).reshape(-1, len(REGIONS), len(PASSES))

    def bound(self, place: Placement, sizes_x: Floats) -> float:
        """Seconds of a step that no number of microbatches beats: large products, weights read once, no launches."""
        ways_n, _ = self.split(self.axes_nr, place, sizes_x)
        ways_a, _ = self.split(self.array_axes_ar, place, sizes_x)
        flops_n = self.flops_n / self.rate_n / ways_n
        trips_n = self._executions(place)
        return float((trips_n * np.maximum(flops_n, self.moved_seconds(ways_a))).sum())

    def floor(self) -> float:
        """Seconds of a step on one device at its peaks."""
        moved = self.moved_seconds(np.ones(len(self.array_bytes_a)))
        trips_n = self.trips_n * np.minimum(self.own_n, 1.0)
        return float((trips_n * np.maximum(self.flops_n / self.rate_n, moved)).sum())

    def moved_seconds(self, ways_a: Floats) -> Floats:
        """Seconds of one execution's bytes."""
        return self._moved(ways_a) * self.traffic_n

    def _moved(self, ways_a: Floats) -> Floats:
        moved = np.bincount(self.array_op_a, self.array_bytes_a / ways_a, minlength=len(self.trips_n))
        return np.asarray(moved, np.float64)


def wide(dtype: str) -> bool:
    """Whether a dtype has more than 8 bits."""
    return not dtype.startswith(("float8", "float4", "int8", "int4", "uint8", "uint4"))


def peak_flops(cluster: Cluster, dtype: str) -> float:
    """FLOP/s of products in a dtype; integers and what the accelerator does not list run as bfloat16 or float32."""
    for name in (dtype, dtype.partition("_")[0], "bfloat16", "float32"):
        try:
            return cluster.accelerator.flops(name)
        except ValueError:
            continue
    return cluster.accelerator.peak_flops_per_second[0][1]
