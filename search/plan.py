"""The plan: a frozen record of how a model runs on a mesh. The same file gives the same compiled step on every host.

plan = Plan(mesh=MeshShape(data=2, fsdp=2, tensor=2), preset="fsdp+megatron", microbatches=2, remat="full")
plan.save("plan.json"); Plan.load("plan.json") == plan
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Literal, get_args

from sharding_rules import AXES, MeshShape

PLAN_VERSION = 1
Remat = Literal["none", "dots", "full"]
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
        param_dtype, compute_dtype, accum_dtype: dtype of stored parameters, of the forward and backward pass, and of
            the gradient sum over microbatches.
        reason: one line on why this plan was taken.
    """

    mesh: MeshShape
    preset: str = "data"
    rules: tuple[Rule, ...] = ()
    microbatches: int = 1
    remat: Remat = "none"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    accum_dtype: str = "float32"
    reason: str = ""
    version: int = PLAN_VERSION

    def __post_init__(self):
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat={self.remat!r}; one of {', '.join(get_args(Remat))}")
        if not isinstance(self.microbatches, int) or self.microbatches < 1:
            raise ValueError(f"microbatches={self.microbatches!r}; a whole number from 1 up")
        for name in ("param_dtype", "compute_dtype", "accum_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r}; one of {', '.join(DTYPES)}")
        object.__setattr__(self, "rules", tuple(_rule(rule) for rule in self.rules))

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
        if record.get("version") != PLAN_VERSION:
            raise ValueError(
                f"the plan has version {record.get('version')!r}; this program reads version {PLAN_VERSION}"
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
        return cls(**{**record, "mesh": MeshShape(**record["mesh"])})

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
            if getattr(self, field.name) != getattr(other, field.name)
        }


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
