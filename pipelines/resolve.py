"""What a user may write for a plan, made a `Plan`.

resolve_plan("fsdp", n_devices=8)                         # a preset on the mesh that suits it: fsdp=8
resolve_plan("fsdp+megatron", n_devices=8, mesh="fsdp=2,tensor=4")
resolve_plan("runs/lm/plan.json", n_devices=8)            # the same file, the same step
"""

from __future__ import annotations

import math
import pathlib

from search import Plan
from sharding_rules import DATA, FSDP, TENSOR, MeshShape


def resolve_plan(plan: Plan | str | pathlib.Path, *, n_devices: int, mesh: MeshShape | str | None = None) -> Plan:
    """Turn `"auto"`, the name of a preset, a `Plan` or the path of a plan file into a `Plan`.

    Args:
        plan: see above.
        n_devices: devices to use when neither the plan nor `mesh` says how they are laid out.
        mesh: devices per axis, as a `MeshShape` or as text such as `"data=2,tensor=4"`.

    Raises:
        ValueError: no such file, or a mesh that contradicts the plan's.
    """
    shape = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
    if isinstance(plan, pathlib.Path) or (isinstance(plan, str) and plan.endswith(".json")):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        if shape is not None and shape != plan.mesh:
            raise ValueError(f"the plan is for mesh {plan.mesh}, but mesh={shape} was asked for; leave one of them out")
        return plan
    if plan == "auto":
        return Plan(shape or MeshShape(data=n_devices), "data")
    if shape is not None:
        return Plan(shape, plan, reason=f"preset {plan} on the mesh asked for")
    shape = mesh_for_preset(plan, n_devices)
    return Plan(
        shape, plan, reason=f"preset {plan}, and as no mesh was asked for, the plain one for {n_devices} devices"
    )


def mesh_for_preset(preset: str, n_devices: int) -> MeshShape:
    """The plain mesh for a preset: all devices on the one axis that it needs, or shared out evenly between two.

    >>> str(mesh_for_preset("fsdp+megatron", 8))
    'fsdp=4,tensor=2'
    """
    parts = preset.split("+")
    rest = FSDP if "fsdp" in parts else DATA
    if not {"megatron", "redco"} & set(parts):
        return MeshShape(**{rest: n_devices})
    if rest != FSDP and DATA not in parts:
        return MeshShape(**{TENSOR: n_devices})
    tensor = max(t for t in range(1, math.isqrt(n_devices) + 1) if n_devices % t == 0)
    return MeshShape(**{rest: n_devices // tensor, TENSOR: tensor})
