"""The plan: a frozen record of how a model runs on a mesh. The same file gives the same compiled step on every host.

plan = Plan(mesh=MeshShape(data=2, fsdp=2, tensor=2), preset="fsdp+megatron", microbatches=2, remat="full")
plan.save("plan.json"); Plan.load("plan.json") == plan
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from search.estimate import Estimate
from search.schedules import ScheduleName
from sharding_rules import AXES, MeshShape

PLAN_VERSION = 3
READABLE = (1, 2, 3)
"""Versions that are read; what the earlier ones lack is at its default."""
Remat = Literal["none", "dots", "full"]
Vocab = Literal["ends", "spread"]
Attention = Literal["fused", "plain"]
Offload = Literal["optimizer", "activations", "params"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
Rule = tuple[str, tuple[Any, ...]]
"""A path pattern and the mesh axes of each dimension, such as `("blocks/.*/kernel", ("fsdp", "tensor"))`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a training step runs.

    Attributes:
        mesh: devices per mesh axis.
        preset: name of the sharding preset (`sharding_rules.PRESETS`).
        rules: overrides by parameter path, applied over the preset.
        microbatches: number of sequential parts the global batch is split into; gradients are summed.
        remat: what the backward pass recomputes: nothing, all but matrix products, or whole blocks.
        schedule: of pipeline stages, where mesh.stage > 1.
        chunks: virtual stages per rank of the interleaved schedule.
        vocab: where a pipeline has the embedding and the head: at its ends, or spread over all stages (Vocabulary
            Parallelism, Yeung et al. 2024, arXiv 2411.05288).
        optimizer_sharding: the optimizer's state is also split over data (ZeRO-1, Rajbhandari et al. 2020).
        regather: parameters split over fsdp are gathered for each use; False: once per microbatch, and kept until its
            backward pass ends (ZeRO-2 in what moves, more memory).
        offload: what lies in the host's memory while it is not used.
        order: mesh axes larger than 1, outermost (slowest links) first; empty: the order of `sharding_rules.AXES`.
        param_dtype, compute_dtype, accum_dtype: dtype of stored parameters, of the forward and backward pass, and of
            the gradient sum over microbatches.
        attention: "fused": where the model calls `redco_like.attention`, the kernel of the platform runs (on CPUs none
            does); "plain": scores are written to memory.
        compiler_options: of XLA, (name, value) pairs that the step is compiled with.
        reason: one line on why this plan was taken.
        estimate, problem: what is expected of it, and what it was made for (model, cluster, sequence, batch, ...); not
            compared, and not needed to run it.
        verified: what a compiler said of it (`redco-like verify`); not compared either.
    """

    mesh: MeshShape
    preset: str = "data"
    rules: tuple[Rule, ...] = ()
    microbatches: int = 1
    remat: Remat = "none"
    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    vocab: Vocab = "ends"
    optimizer_sharding: bool = False
    regather: bool = True
    offload: tuple[Offload, ...] = ()
    order: tuple[str, ...] = ()
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    accum_dtype: str = "float32"
    attention: Attention = "fused"
    compiler_options: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    version: int = PLAN_VERSION
    estimate: Estimate | None = dataclasses.field(default=None, compare=False, repr=False)
    problem: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    verified: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name, choices in (("remat", Remat), ("schedule", ScheduleName), ("vocab", Vocab), ("attention", Attention)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}; one of {', '.join(get_args(choices))}")
        for name in ("microbatches", "chunks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; a whole number from 1 up")
        if self.chunks > 1 and self.schedule != "interleaved":
            raise ValueError(f"chunks={self.chunks} with the schedule {self.schedule}; only interleaved has chunks")
        for name, choices in (("offload", get_args(Offload)), ("order", AXES)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for entry in getattr(self, name):
                if entry not in choices:
                    raise ValueError(f"{name}: {entry!r}; among {', '.join(choices)}")
        if self.order and set(self.order) != {axis for axis, size in self.mesh.sizes.items() if size > 1}:
            raise ValueError(f"order={self.order} is not the axes of the mesh {self.mesh} that are larger than 1")
        for name in ("param_dtype", "compute_dtype", "accum_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r}; one of {', '.join(DTYPES)}")
        object.__setattr__(self, "rules", tuple(_rule(rule) for rule in self.rules))
        object.__setattr__(self, "compiler_options", tuple(_option(entry) for entry in self.compiler_options))

    @property
    def planned(self) -> tuple[str, ...]:
        """What of the plan the step cannot run yet, in words."""
        parts = []
        if self.mesh.stage > 1:
            chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
            parts.append(f"stage={self.mesh.stage} ({self.schedule}{chunks})")
            parts += ["the vocabulary spread over the stages"] if self.vocab == "spread" else []
        parts += ["parameters gathered once per microbatch"] if not self.regather and self.mesh.fsdp > 1 else []
        parts += [f"{what} offloaded to the host" for what in self.offload]
        return tuple(parts)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; unknown fields and other versions are errors that name them.

        Raises:
            ValueError: not JSON, a field that this version does not know, a version it cannot read.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError("the plan is not a JSON object")
        if record.get("version") not in READABLE:
            raise ValueError(
                f"the plan has version {record.get('version')!r}; this program reads {', '.join(map(str, READABLE))}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ValueError(f"the plan has unknown fields {unknown}; known: {sorted(known)}")
        if not isinstance(record.get("mesh"), dict):
            raise ValueError("the plan names no mesh")
        foreign = sorted(set(record["mesh"]) - set(AXES))
        if foreign:
            raise ValueError(f"the plan's mesh has an unknown mesh axis {foreign[0]!r} (axes: {', '.join(AXES)})")
        estimate = record.get("estimate")
        return cls(
            **{
                **record,
                "version": PLAN_VERSION,
                "mesh": MeshShape(**record["mesh"]),
                "estimate": Estimate.from_record(estimate) if estimate is not None else None,
            }
        )

    def save(self, path: str | pathlib.Path) -> None:
        pathlib.Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Plan:
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"no plan file at {path}")
        return cls.from_json(path.read_text())

    def diff(self, other: Plan) -> dict[str, tuple[Any, Any]]:
        """Fields that differ: name -> (mine, theirs)."""
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if field.compare and getattr(self, field.name) != getattr(other, field.name)
        }


def _option(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, list | tuple) or [type(part) for part in entry] != [str, str]:
        raise ValueError(f"compiler_options are pairs of a name and a value, both text, not {entry!r}")
    return entry[0], entry[1]


def _rule(rule: Any) -> Rule:
    """Make a rule plain data: a pattern, and per dimension None, a mesh axis or a tuple of mesh axes."""
    if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
        raise ValueError(f"rules are pairs of a path pattern and a spec, not {rule!r}")
    pattern, spec = rule
    entries = tuple(tuple(entry) if isinstance(entry, list | tuple) else entry for entry in spec)
    for entry in entries:
        if not all(isinstance(axis, str) for axis in (entry if isinstance(entry, tuple) else (entry or "",))):
            raise ValueError(f"rules: {pattern!r} has {entry!r} for a dimension; None, a mesh axis or a tuple of them")
    return pattern, entries
