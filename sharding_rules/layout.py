"""The one object the runtime asks: specs of everything, and the pinned function.

    traced = trace(loss, params, batch, rng, names=("params", "batch", "rng"))
    layout = make_layout(traced, MeshShape(fsdp=2, tensor=4), preset="fsdp+megatron")
    layout.specs("params"); layout.specs("batch"); layout.pin(make_mesh(layout.mesh_shape))
    print(layout.explain())

Only `pin` needs devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sharding_rules.assignment import Assignment, assign
from sharding_rules.assignment import preset as preset_assignment
from sharding_rules.axes import AxisTable, infer_axes, size_of
from sharding_rules.kernels import Kernels
from sharding_rules.mesh import MeshShape
from sharding_rules.partition import Shares, array_spec, override, param_shares, state_specs, tree_bytes
from sharding_rules.pin import POLICIES, Pinner
from sharding_rules.roles import Rows, find_rows
from sharding_rules.trace import TracedFunction


@dataclasses.dataclass(frozen=True)
class Layout:
    """A traced function, its axes, and their assignment to a mesh.

    Attributes:
        table: inferred axes.
        rows: axes grouped into decisions.
        assignment: rows -> mesh axes.
        params: name of the argument that holds the parameters.
    """

    table: AxisTable
    rows: Rows
    assignment: Assignment
    params: str = "params"

    @property
    def traced(self) -> TracedFunction:
        return self.table.traced

    @property
    def mesh_shape(self) -> MeshShape:
        return self.assignment.mesh

    @functools.cached_property
    def param_shares(self) -> dict[str, tuple[Shares, Shares]]:
        """Parameter path -> split while computing, split at rest."""
        return {
            path: param_shares(self.assignment, path, dims)
            for path, dims in zip(self.table.paths(self.params), self.table.inputs(self.params), strict=True)
        }

    def specs(self, name: str) -> Any:
        """PartitionSpecs of one argument at rest, with the argument's structure."""
        if name == self.params:
            return self._tree(name, [rest for _, rest in self.param_shares.values()])
        return self._tree(name, [array_spec(self.assignment, dims) for dims in self.table.inputs(name)])

    def compute_specs(self, name: str) -> Any:
        """PartitionSpecs of one argument while it is used: parameters with their fsdp shards gathered."""
        if name == self.params:
            return self._tree(name, [compute for compute, _ in self.param_shares.values()])
        return self.specs(name)

    @property
    def out_specs(self) -> Any:
        """PartitionSpecs of the function's results."""
        specs = [array_spec(self.assignment, dims).spec for dims in self.table.outputs()]
        return jax.tree.unflatten(jax.tree.structure(self.traced.out), specs)

    def state_specs(self, abstract_state: Any) -> Any:
        """PartitionSpecs of an optimizer state over these parameters, by tree path and shape."""
        return state_specs(abstract_state, self.traced.arg(self.params), self.specs(self.params))[0]

    def on(self, mesh_shape: MeshShape, preset: str, *, rules: Sequence[tuple[str, Any]] = ()) -> Layout:
        """The same model assigned to another mesh or by another preset; axes are not inferred again."""
        return _assigned(self.table, self.rows, mesh_shape, preset, rules, None, self.params)

    def pin(self, mesh: Mesh, remat: str = "none", kernels: Kernels | None = None) -> Callable[..., Any]:
        """The function with its intermediates pinned: same arguments, same results, differentiable; call it under
        `jit`.

        Args:
            mesh: made by `make_mesh` with this layout's shape.
            remat: "none", "dots" (matrix products are kept) or "full" (only block inputs are kept).
            kernels: computes calls of `attention` and `experts`; None: as the model says.
        """
        if remat != "none" and remat not in POLICIES:
            raise ValueError(f"remat={remat!r}; one of none, {', '.join(POLICIES)}")
        if dict(mesh.shape) != self.mesh_shape.sizes:
            raise ValueError(f"this layout is for mesh {self.mesh_shape}, not {dict(mesh.shape)}")
        pinner = Pinner(self.table, self.assignment, mesh, remat, kernels)
        structure = jax.tree.structure(self.traced.args)
        out = jax.tree.structure(self.traced.out)

        def pinned(*args: Any) -> Any:
            flat, given = jax.tree.flatten(args)
            if given != structure:
                raise ValueError(f"arguments do not have the structure that was traced: {given} against {structure}")
            return jax.tree.unflatten(out, pinner(*flat))

        return pinned

    def bytes_per_device(self, name: str) -> int:
        """Bytes of one argument on one device, at rest."""
        return tree_bytes(self.traced.arg(name), self.specs(name), self.mesh_shape)

    def explain(self, abstract_opt_state: Any = None) -> str:
        """The plan as tables, and the reason for what is whole; with an optimizer's state, its bytes too."""
        from sharding_rules.explain import explain

        return explain(self, abstract_opt_state)

    def _tree(self, name: str, shares: Sequence[Shares]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.traced.arg(name)), [s.spec for s in shares])


def make_layout(
    traced: TracedFunction,
    mesh_shape: MeshShape,
    preset: str = "data",
    *,
    rules: Sequence[tuple[str, Any]] = (),
    table: dict[str, Any] | None = None,
    params: str = "params",
    batch: str = "batch",
) -> Layout:
    """Infer axes and assign them to a mesh.

    Args:
        traced: the function.
        mesh_shape: devices per mesh axis.
        preset: a preset (`PRESETS`), parts joined by `+`.
        rules: `(path pattern, spec)` pairs over the preset's specs.
        table: instead of a preset, mesh axes by row name.

    Raises:
        PlanError: see `preset`, `assign` and `override`.
    """
    axes = infer_axes(traced, params=params, batch=batch)
    rows = find_rows(axes, params=params, batch=batch)
    return _assigned(axes, rows, mesh_shape, preset, rules, table, params)


def _assigned(
    axes: AxisTable,
    rows: Rows,
    mesh_shape: MeshShape,
    preset: str,
    rules: Sequence[tuple[str, Any]],
    table: dict[str, Any] | None,
    params: str,
) -> Layout:
    shapes = [tuple(size_of(dim) for dim in dims) for dims in axes.inputs(params)] if rules else []
    stated = override(axes.paths(params), shapes, rules, mesh_shape) if rules else {}
    if table is not None:
        assignment = dataclasses.replace(assign(axes, rows, table, mesh_shape, params=params), by_path=stated)
    else:
        assignment = preset_assignment(preset, axes, rows, mesh_shape, params=params, stated=stated)
    return Layout(axes, rows, assignment, params)
