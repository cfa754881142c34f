"""Candidates as data: which mesh axes split which rows, what has to move, and the choices that vary within that.

A *placement* fixes the sizes of the inner mesh axes, and with them which rows are split and what has to move; a
*variant* fixes what is not a number (schedule, offload, order of axes, ...); the *columns* of a placement are its
candidates: fsdp, rematerialisation, microbatches and variant.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from search.collectives import Kind
from search.plan import Offload, Vocab
from search.regions import Region
from search.schedules import ScheduleName
from sharding_rules import AXES, DATA, FSDP, MeshShape

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
REGIONS: tuple[Region, ...] = ("layers", "first", "last")
PARAMS, GRADIENTS, STATE = range(3)
"""Rows of `Placement.held`."""


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
        region: the part of the model it belongs to.
        again: whether it gathers once more what the forward pass had gathered, unless that is kept.
        waits: whether a share of it is waited for though it may hide (`Efficiency.sums_waited`).
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
    again: bool = False
    waits: bool = False

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
        held: bytes of parameters, gradients and optimizer state on a device without pipeline stages, by region:
            shape (3, regions, fsdp sizes), regions as in `REGIONS`.
        cache_bytes: of other inputs that stay on a device (a cache of keys and values).
        boundary_bytes: what passes from one layer to the next on a device, all microbatches together; `boundary_split`
            are mesh axes that split it besides.
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
    held: Floats
    stage: int = 1
    cache_bytes: float = 0.0
    boundary_bytes: float = 0.0
    boundary_split: tuple[str, ...] = ()

    def mesh(self, fsdp: int) -> MeshShape:
        return MeshShape(
            data=self.batch_shards // fsdp,
            fsdp=fsdp,
            stage=self.stage,
            expert=self.expert,
            context=self.context,
            tensor=self.tensor,
        )

    @property
    def devices(self) -> int:
        return self.batch_shards * self.stage * self.expert * self.context * self.tensor

    def stage_weights(self, vocab: Vocab) -> Floats:
        """Share of every region that the first, an inner and the last stage have; shape (stages told apart, regions).

        One row where all are alike: without stages, or with a vocabulary that is spread.
        """
        p = self.stage
        if p == 1 or vocab == "spread":
            return np.full((1, 3), 1 / p)
        return np.array([[1 / p, 1, 0], [1 / p, 0, 0], [1 / p, 0, 1]])


@dataclasses.dataclass(frozen=True)
class Variant:
    """Choices that are not sizes; the fields of `search.plan.Plan`. An empty order is that of `AXES`."""

    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    vocab: Vocab = "ends"
    optimizer_sharding: bool = False
    regather: bool = True
    offload: tuple[Offload, ...] = ()
    order: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Candidates of one placement: parallel arrays.

    Attributes:
        fsdp: index into `Placement.fsdp_sizes`.
        remat: index into `CostModel.remats`.
        microbatches: number.
        variant: index into `variants`.
    """

    fsdp: npt.NDArray[np.int64]
    remat: npt.NDArray[np.int64]
    microbatches: npt.NDArray[np.int64]
    variant: npt.NDArray[np.int64] = None  # pyright: ignore[reportAssignmentType]
    variants: tuple[Variant, ...] = (Variant(),)

    def __post_init__(self):
        if self.variant is None:
            object.__setattr__(self, "variant", np.zeros(len(self.fsdp), np.int64))

    def __len__(self) -> int:
        return len(self.fsdp)

    def take(self, which: Any) -> Columns:
        """The candidates that an index or a mask picks."""
        at = np.atleast_1d(which)
        return Columns(self.fsdp[at], self.remat[at], self.microbatches[at], self.variant[at], self.variants)

    def flags(self, field: str) -> npt.NDArray[Any]:
        """A field of every candidate's variant."""
        return np.array([getattr(v, field) for v in self.variants])[self.variant]

    def offloads(self, what: Offload) -> Bools:
        return np.array([what in v.offload for v in self.variants], bool)[self.variant]


def numbering(place: Placement, columns: Columns) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Sizes of the mesh axes, and distances of neighbours along them, per candidate."""
    fsdp_n = np.array(place.fsdp_sizes, np.float64)[columns.fsdp]
    sizes = axis_sizes(place, fsdp_n)
    strides = {axis: np.ones_like(fsdp_n) for axis in AXES}
    for order in {variant.order for variant in columns.variants}:
        here = np.array([variant.order == order for variant in columns.variants])[columns.variant]
        for axis, stride in axis_strides(order, sizes).items():
            strides[axis][here] = stride[here]
    return sizes, strides


def axis_sizes(place: Placement, fsdp_n: Floats) -> dict[str, Floats]:
    sizes = {axis: np.full_like(fsdp_n, getattr(place, axis, 1)) for axis in AXES}
    return sizes | {DATA: place.batch_shards / fsdp_n, FSDP: fsdp_n}


def axis_strides(order: Sequence[str], sizes: Mapping[str, Floats]) -> dict[str, Floats]:
    """Distances of neighbours, in device numbers, for axes outermost first; those that are not named come outside."""
    names = order or AXES
    strides: dict[str, Floats] = {}
    stride = np.ones_like(sizes[DATA])
    for axis in reversed([*(a for a in AXES if a not in names), *names]):
        strides[axis], stride = stride, stride * sizes[axis]
    return strides


def orders(place: Placement) -> list[tuple[str, ...]]:
    """Every order of the mesh axes that may be larger than 1; the plain one first."""
    axes = [axis for axis in AXES if (place.batch_shards if axis in (DATA, FSDP) else getattr(place, axis)) > 1]
    return list(itertools.permutations(axes))


def in_flight(schedule: ScheduleName, *, stages: int, chunks: int, microbatches: Any) -> Floats:
    """Microbatches whose activations each rank keeps at once, in units of a whole stage; shape (stages, ...).

    The closed forms of `search.schedules.peak_in_flight`.
    """
    m = np.asarray(microbatches, np.float64)
    rank = np.arange(stages, dtype=np.float64).reshape(-1, *(1,) * m.ndim)
    if schedule == "gpipe":
        return np.broadcast_to(m, (stages, *m.shape)).astype(np.float64)
    if schedule == "zb_h1":
        return np.broadcast_to(np.minimum(m, stages), (stages, *m.shape)).astype(np.float64)
    if chunks == 1:
        return np.minimum(m, stages - rank)
    return np.minimum(m * chunks, 2 * (stages - rank - 1) + (chunks - 1) * stages + 1) / chunks
