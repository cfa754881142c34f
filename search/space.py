"""The declared space of plans: every mesh, and every choice that a plan has.

    model = TracedModel(traced, abstract_opt_state, cluster)
    space = Space(model, cluster, fix={"tensor": 4}, forbid=("context",))
    for inner in space.inner_meshes():
        placement = model.place(inner)                 # a Placement, or the reason why there is none
        columns = space.columns(placement)             # its candidates, as arrays

Inner sizes (stage, expert, context, tensor, sequence) make a placement; the rest of the devices are split between data
and fsdp. A candidate is legal if `Layout.on` accepts its mesh and preset, the batch divides by the devices that split
it, and the microbatches divide what each of those has. What the step cannot run yet (`Plan.planned`) is in the space
only if it is allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from search.accelerators import Accelerator, accelerators
from search.attention import axes_without_kernel
from search.cluster import Cluster
from search.compiler_options import options_for
from search.cost import CostModel
from search.memory import ActivationBytes
from search.placement import Columns, Placement, Variant, orders
from search.plan import Offload, Plan
from search.schedules import ScheduleName
from sharding_rules import AXES, CONTEXT, DATA, EXPERT, FSDP, STAGE, TENSOR, MeshShape, PlanError

HEADROOM = 0.92
"""Most of a device's usable memory that a plan may count on; the rest is for fragmentation. See `memory_share`."""
PLANNED = ("schedule", "chunks", "vocab", "regather", "offload")
"""Choices that `Variant` has and the step cannot run yet."""
CHOICES = (*AXES, "sequence", "remat", "microbatches", "order", "optimizer_sharding", *PLANNED)
OFFLOADS: tuple[tuple[Offload, ...], ...] = ((), ("optimizer",), ("activations",), ("optimizer", "activations"))


@dataclasses.dataclass(frozen=True, order=True)
class Inner:
    """What a placement is made for: sizes of the inner mesh axes, and the devices left for data and fsdp."""

    tensor: int
    context: int
    expert: int
    sequence: bool
    batch_shards: int
    stage: int = 1

    def mesh(self, fsdp: int = 1) -> MeshShape:
        return MeshShape(
            data=self.batch_shards // fsdp,
            fsdp=fsdp,
            stage=self.stage,
            expert=self.expert,
            context=self.context,
            tensor=self.tensor,
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
    layers: int
    """Repeated layers that pipeline stages can share out; 1 if there are none."""
    plan_fields: Mapping[str, str]
    """What all its plans have in common: `param_dtype`, `compute_dtype`, `attention`."""

    def place(self, inner: Inner) -> Placement | str:
        """The placement, or why there is none."""
        ...

    def activations(
        self, place: Placement, remat: str, microbatches: npt.NDArray[np.int64], fsdp: npt.NDArray[np.int64]
    ) -> ActivationBytes:
        """Bytes per device, without stages, of candidates with one rematerialisation."""
        ...


@dataclasses.dataclass(frozen=True)
class Space:
    """Candidates for a number of devices, under constraints.

    Attributes:
        model: what is planned.
        cluster: where.
        fix: choice -> value: a mesh axis and its size, `sequence` (bool), `remat`, `microbatches`, or a field of
            `Plan` that is planned only.
        forbid: mesh axes that stay 1, or `sequence`, `optimizer_sharding`, `offload`; `order`: only that of `AXES`.
        memory_share: of a device's usable memory that a plan may count on; 0: as `memory_share` has it.
        allow_idle: also plans that leave devices unused.
        allow_planned: also plans that the step cannot run yet.
        max_microbatch: most examples that a device may have in one microbatch.
    """

    model: Model
    cluster: Cluster
    fix: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    forbid: Sequence[str] = ()
    memory_share: float = 0.0
    allow_idle: bool = False
    allow_planned: bool = False
    max_microbatch: int | None = None

    def __post_init__(self):
        if not self.memory_share:
            object.__setattr__(self, "memory_share", memory_share(self.cluster.accelerator))
        for name in (*self.fix, *self.forbid):
            if name not in CHOICES:
                raise ValueError(f"no choice called {name!r}; there are {', '.join(CHOICES)}")
        if "remat" in self.fix and self.fix["remat"] not in self.model.costs.remats:
            raise ValueError(f"remat={self.fix['remat']!r}; one of {', '.join(self.model.costs.remats)}")
        for axis in self._whole:
            if self.fix.get(axis, 1) != 1:
                raise PlanError(
                    f"{axis}={self.fix[axis]}: attention kernels of {self.cluster.accelerator.name} take whole "
                    "sequences; with plain attention (--attention plain) it can be planned"
                )
        both = set(self.fix) & set(self.forbid)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is both fixed and forbidden")
        if not self.allow_planned:
            wished = [n for n in PLANNED if n in self.fix] + [STAGE] * (self.fix.get(STAGE, 1) != 1)
            if wished:
                raise PlanError(
                    f"{wished[0]}={self.fix[wished[0]]}: the step cannot run this yet; plan it all the same with "
                    "allow_planned (--allow-planned), or leave it out"
                )
        if self.max_microbatch is not None and self.max_microbatch < 1:
            raise ValueError(f"max_microbatch={self.max_microbatch}; a whole number from 1 up")
        wanted = math.prod(int(self.fix.get(axis, 1)) for axis in AXES)
        if self.cluster.devices % wanted:
            raise PlanError(
                f"the sizes that are fixed take {wanted} devices, which do not divide the {self.cluster.devices} of "
                f"{self.cluster.name}; the nearest number that does is {_nearest(wanted, self.cluster.devices)}"
            )

    @property
    def _whole(self) -> tuple[str, ...]:
        """Mesh axes that attention is not split over here."""
        return axes_without_kernel(self.cluster.accelerator.kind, self.model.plan_fields.get("attention", "plain"))

    @property
    def budget_bytes(self) -> float:
        """Memory of a device that a plan may use."""
        return self.memory_share * self.cluster.accelerator.usable_memory_bytes

    def inner_meshes(self) -> list[Inner]:
        """Every choice of inner sizes, legal or not."""
        n, out = self.cluster.devices, []
        for used in divisors(n) if self.allow_idle else [n]:
            for stage in self._stages(used):
                for expert in self._sizes(EXPERT, used // stage):
                    for context in self._sizes(CONTEXT, used // (stage * expert)):
                        for tensor in self._sizes(TENSOR, used // (stage * expert * context)):
                            rest = used // (stage * expert * context * tensor)
                            if self._outer(rest):
                                out += [Inner(tensor, context, expert, s, rest, stage) for s in self._sequence(tensor)]
        return sorted(out)

    def columns(self, place: Placement, *, everything: bool = True) -> Columns:
        """The candidates of a placement: fsdp, rematerialisation, microbatches and variant; see `variants`."""
        allowed = set(self._outer(place.batch_shards))
        fsdp = [i for i, size in enumerate(place.fsdp_sizes) if size in allowed]
        remats = self.model.costs.remats
        remat = [i for i, name in enumerate(remats) if name == self.fix.get("remat", name)]
        each = self.model.batch // (place.batch_shards * place.expert)
        # A step of inference runs all its rows at once.
        splits = divisors(each) if self.model.costs.trains else [1]
        parts = [m for m in splits if m == self.fix.get("microbatches", m)]
        parts = [m for m in parts if self.max_microbatch is None or each // m <= self.max_microbatch]
        variants = self.variants(place, everything=everything)
        if not variants:
            return Columns(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        grid = np.meshgrid(fsdp, remat, parts, np.arange(len(variants)), indexing="ij")
        f, r, m, v = (np.asarray(axis.ravel(), np.int64) for axis in grid)
        columns = Columns(f, r, m, v, variants=variants)
        if len(variants) == 1 and place.stage == 1:
            return columns
        return columns.take(np.flatnonzero(self._sensible(place, columns)))

    @property
    def offloads(self) -> tuple[tuple[Offload, ...], ...]:
        """What may lie in the host's memory; nothing first. A plan that fits without is never slower."""
        wanted: Any = self.fix.get("offload")
        if isinstance(wanted, str):
            wanted = [part for part in wanted.split("+") if part != "none"]
        if wanted is not None:
            return (tuple(wanted),)
        return OFFLOADS if self.allow_planned and "offload" not in self.forbid else OFFLOADS[:1]

    def variants(self, place: Placement, *, everything: bool = True) -> tuple[Variant, ...]:
        """Choices that are not sizes, for one placement; everything, or without what is offloaded."""
        pipelines: list[tuple[ScheduleName, int]] = [("1f1b", 1)]
        vocabs, regathers = ["ends"], [True]
        if self.allow_planned:
            regathers = [True, False] if place.batch_shards > 1 else [True]
        if place.stage > 1:
            chunks = [v for v in divisors(self.model.layers // place.stage) if 1 < v <= 8]
            pipelines = [("gpipe", 1), ("1f1b", 1), ("zb_h1", 1), *(("interleaved", v) for v in chunks)]
            vocabs = ["ends", "spread"]
        trains = self.model.costs.trains and place.batch_shards > 1 and "optimizer_sharding" not in self.forbid
        found = [
            Variant(schedule, chunks, vocab, sharded, regather, offload, order)  # type: ignore[arg-type]
            for (schedule, chunks), vocab, sharded, regather, offload, order in itertools.product(
                pipelines,
                vocabs,
                [False, True] if trains else [False],
                regathers,
                self.offloads if everything or "offload" in self.fix else OFFLOADS[:1],
                self._orders(place),
            )
        ]
        fixed = {name: value for name, value in self.fix.items() if name in (*PLANNED, "optimizer_sharding")}
        fixed.pop("offload", None)
        return tuple(v for v in found if all(getattr(v, name) == value for name, value in fixed.items()))

    def _orders(self, place: Placement) -> list[tuple[str, ...]]:
        """Orders of the mesh axes on the links; only the plain one where all links are alike.

        Stages come anywhere between the others, which then keep their order.
        """
        wanted = self.fix.get("order")
        if wanted is not None:
            wanted = tuple(wanted.split("+") if isinstance(wanted, str) else wanted)
            return [order for order in orders(place) if tuple(axis for axis in order if axis in wanted) == wanted]
        alike = self.cluster.torus is None and self.cluster.nodes == 1
        if alike or "order" in self.forbid:
            return [()]
        found = [(), *orders(place)[1:]]
        if place.stage > 1:
            rest = [tuple(axis for axis in order if axis != STAGE) for order in orders(place)]
            found = [order for order, others in zip(found, rest, strict=True) if others == rest[0]]
        return found

    def _sensible(self, place: Placement, columns: Columns) -> npt.NDArray[np.bool_]:
        """Which candidates their schedule can run, and which are not another candidate by another name."""
        fsdp = np.array(place.fsdp_sizes)[columns.fsdp]
        data = place.batch_shards // fsdp
        interleaved = columns.flags("schedule") == "interleaved"
        fits = ~interleaved | (columns.microbatches % place.stage == 0)
        sharded, regathers = columns.flags("optimizer_sharding"), columns.flags("regather")
        # An axis of size 1 lies nowhere: of the orders that differ in it alone, the one with it in front counts.
        first = np.array([DATA not in v.order or v.order[0] == DATA for v in columns.variants])[columns.variant]
        second = np.array([FSDP not in v.order or v.order.index(FSDP) <= 1 for v in columns.variants])[columns.variant]
        placed = ((data > 1) | first) & ((fsdp > 1) | second)
        return fits & placed & (~sharded | (data > 1)) & (regathers | (fsdp > 1))

    def plan(self, place: Placement, columns: Columns, row: int, **fields: Any) -> Plan:
        """The plan of one candidate."""
        inner = Inner(place.tensor, place.context, place.expert, place.sequence, place.batch_shards, place.stage)
        size = place.fsdp_sizes[int(columns.fsdp[row])]
        variant = columns.variants[int(columns.variant[row])]
        mesh = inner.mesh(size)
        plain = tuple(axis for axis, n in mesh.sizes.items() if n > 1)
        order = tuple(axis for axis in variant.order if mesh.sizes[axis] > 1)
        variant = dataclasses.replace(variant, order=() if order == plain else order)
        plan = Plan(
            mesh,
            inner.preset(size),
            (),
            int(columns.microbatches[row]),
            self.model.costs.remats[int(columns.remat[row])],
            **{**dataclasses.asdict(variant), **self.model.plan_fields, **fields},
        )
        return dataclasses.replace(plan, compiler_options=options_for(self.cluster.accelerator, plan))

    def _stages(self, devices: int) -> list[int]:
        if not self.allow_planned or STAGE in self.forbid:
            return [1]
        return [p for p in divisors(devices) if p == self.fix.get(STAGE, p) and self.model.layers % p == 0]

    def _sizes(self, axis: str, devices: int) -> list[int]:
        if (
            axis in self.forbid
            or axis in self._whole
            or (axis == EXPERT and not self.model.has_experts and axis not in self.fix)
        ):
            return [1]
        return [n for n in divisors(devices) if n == self.fix.get(axis, n)]

    def _sequence(self, tensor: int) -> list[bool]:
        options = [False, True] if tensor > 1 and "sequence" not in self.forbid else [False]
        return [s for s in options if s == self.fix.get("sequence", s)]

    def _outer(self, rest: int) -> list[int]:
        """Sizes of fsdp, where data takes what is left."""
        sizes = self._sizes(FSDP, rest)
        return [f for f in sizes if rest // f == self.fix.get(DATA, 1 if DATA in self.forbid else rest // f)]


def memory_share(accelerator: Accelerator) -> float:
    """Share of a device's usable memory that a plan may count on by the analytic count.

    At most `HEADROOM`, and less where a compiler needed more than was counted: by the largest ratio that was seen for
    the accelerator (`memory_ratios.toml`, from `benchmarks/memory_accuracy.py`), or for any of its kind.

    >>> from search.accelerators import find_accelerator
    >>> memory_share(find_accelerator("H100")) == memory_share(find_accelerator("A100")) < HEADROOM
    True
    """
    table = _memory_ratios()
    alike = [r for name, r in table.items() if accelerators()[name].kind == accelerator.kind]
    ratios = [table[accelerator.name]] if accelerator.name in table else alike
    return min([HEADROOM, *(1 / ratio["most"] for ratio in ratios)])


@functools.cache
def _memory_ratios() -> Mapping[str, Mapping[str, float]]:
    return tomllib.loads(importlib.resources.files("search").joinpath("memory_ratios.toml").read_text("utf-8"))


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _nearest(wanted: int, devices: int) -> int:
    return min(divisors(devices), key=lambda d: abs(math.log(d / wanted)))
