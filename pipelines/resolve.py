"""What a user may write for a plan, made a `Plan`.

resolve_plan("fsdp", n_devices=8)                         # a preset on the plain mesh for it: fsdp=8
resolve_plan("fsdp+megatron", n_devices=8, mesh="fsdp=2,tensor=4")
resolve_plan("runs/lm/plan.json", n_devices=8)            # the same file, the same step
resolve_plan("auto", n_devices=8, problem=lambda: train_problem(...), memory_bytes=80e9)
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from search import Plan, auto_plan
from sharding_rules import DATA, FSDP, TENSOR, MeshShape, TracedFunction

Problem = Callable[[], tuple[TracedFunction, Any]]
"""Makes what the planner looks at: the function traced on the whole global batch, and the optimizer state's shapes."""


def resolve_plan(
    plan: Plan | str | pathlib.Path,
    *,
    n_devices: int,
    mesh: MeshShape | str | None = None,
    problem: Problem | None = None,
    memory_bytes: float = math.inf,
    compute_dtype: str = "float32",
) -> Plan:
    """Turn `"auto"`, the name of a preset, a `Plan` or the path of a plan file into a `Plan`.

    Args:
        plan: see above.
        n_devices: devices to use when neither the plan nor `mesh` says how they are laid out.
        mesh: devices per axis, as a `MeshShape` or as text such as `"data=2,tensor=4"`.
        problem: what to plan for; needed for `"auto"` only, and called for it only.
        memory_bytes: memory of one device, for `"auto"`.
        compute_dtype: of the plan that is made; a `Plan` or a file has its own.

    Raises:
        ValueError: no such file, or a mesh that contradicts the plan's.
        PlanError: no plan fits.
    """
    shape = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
    if isinstance(plan, pathlib.Path) or (isinstance(plan, str) and plan.endswith(".json")):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        if shape is not None and shape != plan.mesh:
            raise ValueError(f"the plan is for mesh {plan.mesh}, but mesh={shape} was asked for; leave one of them out")
        return plan
    if plan != "auto":
        reason = f"preset {plan} " + ("on the mesh asked for" if shape else f"on the plain mesh of {n_devices} devices")
        return Plan(shape or mesh_for_preset(plan, n_devices), plan, compute_dtype=compute_dtype, reason=reason)
    if problem is None:
        raise ValueError("plan='auto' needs a problem to plan for")
    traced, opt_state = problem()
    return auto_plan(
        traced, opt_state, n_devices=n_devices, memory_bytes=memory_bytes, mesh=shape, compute_dtype=compute_dtype
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


def memory_bytes_per_device(devices: Sequence[Any]) -> float:
    """Memory of the smallest device as its runtime states it; for CPU devices an equal share of the machine's."""
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    if limits:
        return float(min(limits))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(len(stats), 1)
