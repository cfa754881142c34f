"""Where parameters go: a plan, a mesh or shardings, made a sharding for each path.

placement = place(config, shapes, plan="fsdp", mesh="fsdp=8")
placement.shardings["stack/layers/attention/q/kernel"]
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from redco_like.models.config import ModelConfig
from search import Plan
from sharding_rules import AXES, MeshShape, make_mesh, path_str

_ROWS, _LENGTH = 16, 2048  # sequences in flight and their length that "auto" plans for


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings by path, and what they come from (None where they come from none)."""

    shardings: Mapping[str, Sharding]
    plan: Plan | None = None
    mesh: Mesh | None = None


def place(
    config: ModelConfig,
    paths: list[str],
    *,
    plan: Plan | str | pathlib.Path | None,
    mesh: Mesh | MeshShape | str | None,
    shardings: Any,
    dtype: str,
) -> Placement:
    """Say where each parameter goes.

    Args:
        plan: see `load`; "auto" is the fastest for decoding 16 sequences of up to 2048 tokens (for models that are no
            decoders: for a training step of 16).
        mesh: of the plan; without a plan every device of it gets all parameters.
        shardings: a tree like the parameters, or one sharding for all; instead of a plan.
        dtype: of the computation that is planned.

    Raises:
        ValueError: a plan and shardings both, or shardings of another tree.
        PlanError: a plan that cannot be carried out.
    """
    if shardings is not None:
        if plan is not None or mesh is not None:
            raise ValueError("shardings say where everything goes: leave plan and mesh out, or the shardings")
        return Placement(_given(shardings, paths))
    if plan is None:
        if mesh is None:
            return Placement(dict.fromkeys(paths, SingleDeviceSharding(jax.local_devices()[0])))
        made = _mesh_of(mesh)
        return Placement(dict.fromkeys(paths, NamedSharding(made, P())), mesh=made)
    return _planned(config, plan, mesh, dtype)


def _given(shardings: Any, paths: list[str]) -> Mapping[str, Sharding]:
    if isinstance(shardings, Sharding):
        return dict.fromkeys(paths, shardings)
    leaves = jax.tree_util.tree_leaves_with_path(shardings, is_leaf=lambda x: isinstance(x, Sharding))
    given = {path_str(path): leaf for path, leaf in leaves}
    lacking = sorted(set(paths) - set(given))
    if lacking or set(given) - set(paths):
        raise ValueError(
            f"shardings is not a tree like the parameters: it lacks {lacking[:4]} and has "
            f"{sorted(set(given) - set(paths))[:4]} besides; take jax.eval_shape(model.init_fn, key) and map over it"
        )
    return given


def _mesh_of(mesh: Mesh | MeshShape | str) -> Mesh:
    if isinstance(mesh, Mesh):
        return mesh
    shape = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
    devices = jax.devices()
    return make_mesh(shape, devices[: shape.size] if jax.process_count() == 1 else devices)


def _planned(
    config: ModelConfig, plan: Plan | str | pathlib.Path, mesh: Mesh | MeshShape | str | None, dtype: str
) -> Placement:
    # The planner imports models: not the other way round before it is asked.
    from pipelines import resolve_plan
    from pipelines.devices import cluster_here
    from pipelines.problem import layout_of
    from redco_like.problem import load_problem

    if isinstance(mesh, Mesh) and mesh.axis_names != AXES:
        raise ValueError(f"a plan needs a mesh with the axes {AXES}, as sharding_rules.make_mesh makes it")
    home = None if mesh is None else _mesh_of(mesh)
    devices = jax.devices() if home is None else list(home.devices.flat)
    rows = -(-_ROWS // len(devices)) * len(devices)
    decoder = config.kind == "decoder"
    length = None if config.kind == "vision" else min(_LENGTH, config.max_length)
    task = "decode" if decoder else "train"
    problem = load_problem(config, seq_len=length, global_batch=rows, dtype=dtype, task=task)
    resolved = resolve_plan(
        plan,
        n_devices=len(devices),
        mesh=None if home is None else MeshShape(**home.shape),
        problem=lambda: (problem.traced, problem.opt_state or {}),
        cluster=lambda: cluster_here(devices),
        compute_dtype=dtype,
        training=not decoder,
    )
    made = home if home is not None else make_mesh(resolved.mesh, devices, order=resolved.order)
    specs = layout_of(problem.traced, resolved).specs("params")
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    return Placement({path_str(path): NamedSharding(made, spec) for path, spec in leaves}, resolved, made)
