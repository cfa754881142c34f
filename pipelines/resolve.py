"""What a user may write for a plan, made a `Plan`.

resolve_plan("fsdp", n_devices=8)                         # a preset on the plain mesh for it: fsdp=8
resolve_plan("fsdp+megatron", n_devices=8, mesh="fsdp=2,tensor=4")
resolve_plan("runs/lm/plan.json", n_devices=8)            # the same file, the same step
resolve_plan("auto", n_devices=8, problem=lambda: train_problem(...), cluster=lambda: cluster_here(jax.devices()))
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from search import Cluster, Plan, Space, TracedModel, solve
from search.attention import axes_without_kernel, runs_as_kernel
from search.costing import Costed
from sharding_rules import AXES, DATA, FSDP, TENSOR, MeshShape, PlanError, TracedFunction

Problem = Callable[[], tuple[TracedFunction, Any]]
"""Makes what the planner looks at: the function traced on the whole global batch, and the optimizer state's shapes."""


def resolve_plan(
    plan: Plan | str | pathlib.Path,
    *,
    n_devices: int,
    mesh: MeshShape | str | None = None,
    problem: Problem | None = None,
    cluster: Callable[[], Cluster] | None = None,
    compute_dtype: str = "float32",
    training: bool = True,
    forbid: Sequence[str] = (),
) -> Plan:
    """Turn `"auto"`, the name of a preset, a `Plan` or the path of a plan file into a `Plan` that the step can run.

    Args:
        plan: see above. `"auto"` is the fastest plan that fits, by exact search (`search.solve`).
        n_devices: devices to use when neither the plan nor `mesh` says how they are laid out.
        mesh: devices per axis, as a `MeshShape` or as text such as `"data=2,tensor=4"`.
        problem: what to plan for; needed for `"auto"` only, and called for it only.
        cluster: the devices to plan for; like `problem`. Every process has to get the same.
        compute_dtype: of the plan that is made; a `Plan` or a file has its own.
        training: False where the function is only run forward.
        forbid: mesh axes that a plan made by `"auto"` does not use.

    Raises:
        ValueError: no such file, or a mesh that contradicts the plan's or the devices.
        PlanError: no plan fits, or the plan has parts that the step cannot run yet.
    """
    shape = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
    if isinstance(plan, pathlib.Path) or (isinstance(plan, str) and plan.endswith(".json")):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        if shape is not None and shape != plan.mesh:
            raise ValueError(f"the plan is for mesh {plan.mesh}, but mesh={shape} was asked for; leave one of them out")
        if plan.planned:
            raise PlanError(
                f"the plan has {'; '.join(plan.planned)}: the step cannot run this yet. Plan again without "
                "--allow-planned, or with plan='auto'"
            )
        return plan
    if plan != "auto":
        reason = f"preset {plan} " + ("on the mesh asked for" if shape else f"on the plain mesh of {n_devices} devices")
        return Plan(shape or mesh_for_preset(plan, n_devices), plan, compute_dtype=compute_dtype, reason=reason)
    if problem is None or cluster is None:
        raise ValueError("plan='auto' needs a problem to plan for, and the cluster to plan it for")
    return _search(problem, cluster(), n_devices, shape, compute_dtype, training=training, forbid=forbid)


def _search(
    problem: Problem,
    cluster: Cluster,
    n_devices: int,
    mesh: MeshShape | None,
    compute_dtype: str,
    *,
    training: bool,
    forbid: Sequence[str],
) -> Plan:
    """The fastest plan that fits; the same on every process, or an error."""
    if cluster.devices != n_devices:
        raise ValueError(
            f"the cluster {cluster.name} has {cluster.devices} devices, but the plan is for {n_devices}; "
            "give the cluster that the run is on, or leave it out"
        )
    if mesh is not None and mesh.size != n_devices:
        raise ValueError(f"mesh {mesh} needs {mesh.size} devices, but {n_devices} are there")
    traced, opt_state = problem()
    fixed: dict[str, Any] = {} if mesh is None else dict(mesh.sizes)
    # Over axes that the attention kernels do not split, attention runs plainly where the caller has asked for them.
    whole = axes_without_kernel(cluster.accelerator.kind, "fused")
    plain = cluster.accelerator.kind == "cpu" or any(fixed.get(axis, 1) != 1 for axis in whole)
    fused = not plain and runs_as_kernel(traced)
    options: dict[str, Any] = {} if training else {"training": False, "remats": ("none",)}
    model = TracedModel(traced, opt_state, cluster, fused_attention=fused, **options)
    forbid = [axis for axis in AXES if axis in forbid and fixed.get(axis, 1) == 1]
    fixed = {name: size for name, size in fixed.items() if name not in forbid}
    space = Space(model, cluster, fix=fixed if training else fixed | {"microbatches": 1}, forbid=forbid)
    result = solve(space, runners_up=1)
    if result.best is None:
        raise PlanError(result.advice)
    best = result.best
    reason = "the mesh asked for; " * (mesh is not None) + best.plan.reason
    if result.runners_up:
        reason += f"; next: {_words(result.runners_up[0])}"
    plan = dataclasses.replace(best.plan, compute_dtype=compute_dtype, reason=reason, estimate=best.estimate)
    _check_agreed(plan)
    return plan


def _words(costed: Costed) -> str:
    plan = costed.plan
    rest = f"{plan.preset} on {plan.mesh}, remat {plan.remat}, {plan.microbatches} microbatches"
    return f"{rest}: {costed.estimate.seconds_per_step:.4g} s"


def _check_agreed(plan: Plan) -> None:
    """Refuse to start where processes have planned differently, as they do with different cluster files."""
    if jax.process_count() == 1:
        return
    mine = np.uint32(zlib.crc32(plan.to_json().encode()))
    everyones = np.asarray(multihost_utils.process_allgather(mine))
    if len(set(everyones.tolist())) > 1:
        raise PlanError(
            f"the processes have chosen different plans (process {jax.process_index()}: {plan.preset} on {plan.mesh}); "
            "they need the same cluster file and the same versions"
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
