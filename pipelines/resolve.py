"""What a user may write for a plan, made a `Plan`.

    resolve_plan("auto", trace_at, n_devices=8, global_batch=64)
    resolve_plan("fsdp", ..., mesh="fsdp=4,data=2")         # a preset on a mesh
    resolve_plan("runs/lm/plan.json", ...)                   # the same file, the same step
"""

from __future__ import annotations

import pathlib

from search import Plan
from sharding_rules import MeshShape


def resolve_plan(plan: Plan | str | pathlib.Path, *, n_devices: int, mesh: MeshShape | str | None = None) -> Plan:
    """Turn `"auto"`, the name of a preset, a `Plan` or the path of a plan file into a `Plan`.

    Args:
        plan: see above.
        n_devices: devices to use when neither the plan nor `mesh` says how they are laid out.
        mesh: devices per axis, as a `MeshShape` or as text such as `"data=2,tensor=4"`.

    Raises:
        ValueError: no such file or preset, or a mesh that contradicts the plan's.
    """
    shape = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
    if isinstance(plan, pathlib.Path) or (isinstance(plan, str) and plan.endswith(".json")):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        if shape is not None and shape != plan.mesh:
            raise ValueError(f"the plan is for mesh {plan.mesh}, but mesh={shape} was asked for; leave one of them out")
        return plan
    return Plan(shape or MeshShape(data=n_devices), "data")
