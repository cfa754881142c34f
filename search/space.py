"""The declared space of plans: every mesh, sequence parallelism, rematerialisation and number of microbatches.

    model = TracedModel(traced, abstract_opt_state, cluster)
    space = Space(model, cluster, fix={"tensor": 4}, forbid=("context",))
    for inner in space.inner_meshes():
        placement = model.place(inner)                 # a Placement, or the reason why there is none
        columns = space.columns(placement)             # its candidates, as arrays

Inner sizes (expert, context, tensor, sequence) make a placement; the rest of the devices are split between data and
fsdp. A candidate is legal if `Layout.on` accepts its mesh and preset, the batch divides by the devices that split it,
and the microbatches divide what each of those has. Pipeline stages are not in the space: the step does not run them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from search.cluster import Cluster
from search.cost import Columns, CostModel, Placement
from search.plan import Plan
from sharding_rules import AXES, CONTEXT, DATA, EXPERT, FSDP, STAGE, TENSOR, MeshShape, PlanError

HEADROOM = 0.85
"""Share of a device's usable memory that a plan may count on, as in `search.auto`."""
CHOICES = (*AXES, "sequence", "remat", "microbatches")


@dataclasses.dataclass(frozen=True, order=True)
class Inner:
    """What a placement is made for: sizes of the inner mesh axes, and the devices left for data and fsdp."""

    tensor: int
    context: int
    expert: int
    sequence: bool
    batch_shards: int

    def mesh(self, fsdp: int = 1) -> MeshShape:
        return MeshShape(
            data=self.batch_shards // fsdp, fsdp=fsdp, expert=self.expert, context=self.context, tensor=self.tensor
        )

    def preset(self, fsdp: int = 1) -> str:
        """The preset that uses these axes."""
        parts = ["fsdp"] * (fsdp > 1) + ["megatron"] * (self.tensor > 1) + ["sequence"] * self.sequence
        return "+".join(parts) or "data"


class Model(Protocol):
    """What is planned: a traced model, or anything that places itself and counts its bytes."""

    costs: CostModel
    batch: int
    """Examples in the global batch."""
    tokens: int
    """Elements of the largest integer array of the batch, or its examples."""
    has_experts: bool
    """Whether a row of experts exists: without one, the expert axis would be another name for data."""
    dtypes: Mapping[str, str]
    """`param_dtype` and `compute_dtype` of plans."""

    def place(self, inner: Inner) -> Placement | str:
        """The placement, or why there is none."""
        ...

    def activation_bytes(self, place: Placement, remat: str) -> int:
        """Bytes per device that the backward pass keeps in one microbatch that is the whole batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Space:
    """Candidates for a number of devices, under constraints.

    Attributes:
        model: what is planned.
        cluster: where.
        fix: choice -> value: a mesh axis and its size, `sequence` (bool), `remat`, `microbatches`.
        forbid: mesh axes that stay 1, or `sequence`.
        memory_share: of a device's usable memory that a plan may count on.
        allow_idle: also plans that leave devices unused.
    """

    model: Model
    cluster: Cluster
    fix: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    forbid: Sequence[str] = ()
    memory_share: float = HEADROOM
    allow_idle: bool = False

    def __post_init__(self):
        for name in (*self.fix, *self.forbid):
            if name not in CHOICES:
                raise ValueError(f"no choice called {name!r}; there are {', '.join(CHOICES)}")
        if self.fix.get(STAGE, 1) != 1:
            raise PlanError(
                f"stage={self.fix[STAGE]}: pipeline stages are not run by this step; give its devices to data"
            )
        if "remat" in self.fix and self.fix["remat"] not in self.model.costs.remats:
            raise ValueError(f"remat={self.fix['remat']!r}; one of {', '.join(self.model.costs.remats)}")
        both = set(self.fix) & set(self.forbid)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is both fixed and forbidden")
        wanted = math.prod(int(self.fix.get(axis, 1)) for axis in AXES)
        if self.cluster.devices % wanted:
            raise PlanError(
                f"the sizes that are fixed take {wanted} devices, which do not divide the {self.cluster.devices} of "
                f"{self.cluster.name}; the nearest number that does is {_nearest(wanted, self.cluster.devices)}"
            )

    @property
    def budget_bytes(self) -> float:
        """Memory of a device that a plan may use."""
        return self.memory_share * self.cluster.accelerator.usable_memory_bytes

    def inner_meshes(self) -> list[Inner]:
        """Every choice of inner sizes, legal or not."""
        n, out = self.cluster.devices, []
        for used in divisors(n) if self.allow_idle else [n]:
            for expert in self._sizes(EXPERT, used):
                for context in self._sizes(CONTEXT, used // expert):
                    for tensor in self._sizes(TENSOR, used // (expert * context)):
                        rest = used // (expert * context * tensor)
                        if self._outer(rest):
                            out += [Inner(tensor, context, expert, s, rest) for s in self._sequence(tensor)]
        return sorted(out)

    def columns(self, place: Placement) -> Columns:
        """The candidates of a placement: fsdp, rematerialisation and microbatches."""
        allowed = set(self._outer(place.batch_shards))
        fsdp = [i for i, size in enumerate(place.fsdp_sizes) if size in allowed]
        remats = self.model.costs.remats
        remat = [i for i, name in enumerate(remats) if name == self.fix.get("remat", name)]
        parts = divisors(self.model.batch // (place.batch_shards * place.expert))
        parts = [m for m in parts if m == self.fix.get("microbatches", m)]
        grid = np.meshgrid(fsdp, remat, parts, indexing="ij")
        return Columns(*(np.asarray(axis.ravel(), np.int64) for axis in grid))

    def plan(self, place: Placement, fsdp: int, remat: str, microbatches: int, **fields: Any) -> Plan:
        """The plan of one candidate."""
        inner = Inner(place.tensor, place.context, place.expert, place.sequence, place.batch_shards)
        size = place.fsdp_sizes[fsdp]
        return Plan(inner.mesh(size), inner.preset(size), (), microbatches, remat, **{**self.model.dtypes, **fields})  # type: ignore[arg-type]

    def _sizes(self, axis: str, devices: int) -> list[int]:
        if axis in self.forbid or (axis == EXPERT and not self.model.has_experts and axis not in self.fix):
            return [1]
        return [n for n in divisors(devices) if n == self.fix.get(axis, n)]

    def _sequence(self, tensor: int) -> list[bool]:
        options = [False, True] if tensor > 1 and "sequence" not in self.forbid else [False]
        return [s for s in options if s == self.fix.get("sequence", s)]

    def _outer(self, rest: int) -> list[int]:
        """Sizes of fsdp, where data takes what is left."""
        sizes = self._sizes(FSDP, rest)
        return [f for f in sizes if rest // f == self.fix.get(DATA, 1 if DATA in self.forbid else rest // f)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(wanted: int, devices: int) -> int:
    return min(divisors(devices), key=lambda d: abs(math.log(d / wanted)))
