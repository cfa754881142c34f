"""Calls of `sharding_rules.experts` on a mesh: every device sorts its own tokens, and multiplies those of its experts.

    kernels = ExpertsKernels(platform)                                 # of the mesh's devices
    pinned = layout.pin(mesh, remat=plan.remat, kernels=kernels)

Inside one `jax.shard_map` over the whole mesh:

* Where an axis splits the experts or their hidden dimension and the tokens too (`expert`; `tensor` under sequence
  parallelism), the tokens are gathered over it, and the results are summed and scattered back. Where it does not split
  the tokens, the results are summed.
* Of the gathered tokens, a device sorts those of its own experts first. Products leave out the others; arrays have room
  for all of them, since all tokens may choose the same experts and none is dropped.
* A device that splits only the batch or the length sends nothing but gradients of weights.

Products in groups are `jax.lax.ragged_dot`: on TPUs a kernel that skips what is in no group.

Shape letters: B batch, L length, D embed, E experts, J experts per token, F mlp, R rows: tokens times J.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sharding_rules import ExpertsCall
from sharding_rules.kernels import Call


def experts_kernels(mesh: Mesh) -> ExpertsKernels | None:
    """What computes experts on a mesh; None for one device, where the plain computation is the same."""
    return ExpertsKernels(mesh.devices.flat[0].platform) if mesh.size > 1 else None


class ExpertsKernels:
    """Computes calls of `experts` on a mesh; `Layout.pin` takes it.

    Attributes:
        platform: of the devices.
    """

    def __init__(self, platform: str):
        self.platform = platform

    def __call__(self, call: Call, mesh: Mesh, operands: Sequence[Any], specs: Sequence[P]) -> Any:
        """The result, split as the tokens are; None to have it computed plainly."""
        if not isinstance(call, ExpertsCall):
            return None
        tokens = _entries(specs[0], operands[0].ndim)
        up_spec, down_spec = _entries(specs[3], 3), _entries(specs[4], 3)
        over_experts, over_hidden = up_spec[0], up_spec[2]
        kernels = [up_spec, down_spec, *(_entries(spec, 3) for spec in specs[5:])]
        if (
            tokens[-1]
            or down_spec != (over_experts, over_hidden, ())
            or any(spec != (over_experts, (), over_hidden) for spec in (up_spec, *kernels[2:]))
        ):
            split = ", ".join(str(spec) for spec in (specs[0], *specs[3:]))
            return _tell(f"tokens and kernels are split as {split}, which no program is made for")
        shared = (*over_experts, *over_hidden)
        # Where tokens are gathered and results scattered: dimension -> axes.
        exchanged = {i: axes for i, entry in enumerate(tokens) if (axes := tuple(a for a in entry if a in shared))}
        summed = tuple(a for a in shared if not any(a in entry for entry in tokens))
        varying = {a for entry in tokens for a in entry} | set(shared)
        in_specs = [P(*(entry or None for entry in tokens[:-1]), None)] * 3
        in_specs += [P(*(entry or None for entry in spec)) for spec in kernels]

        def local(*operands: jax.Array) -> jax.Array:
            operands = tuple(_varying(x, varying - _axes(spec)) for x, spec in zip(operands, in_specs, strict=True))
            (*moved, up_EDF, down_EFD), gate_EDF = operands[:5], operands[5:]
            for i, axes in exchanged.items():
                moved = [jax.lax.all_gather(x, axes, axis=i, tiled=True) for x in moved]
            y = _own(call, moved, up_EDF, down_EFD, gate_EDF[0] if gate_EDF else None, over_experts)
            for i, axes in exchanged.items():
                y = jax.lax.psum_scatter(y, axes, scatter_dimension=i, tiled=True)
            return jax.lax.psum(y, summed) if summed else y

        return jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=in_specs[0])(*operands)


def _own(
    call: ExpertsCall,
    tokens: Sequence[jax.Array],
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    gate_EDF: jax.Array | None,
    over_experts: tuple[str, ...],
) -> jax.Array:
    """What this device's experts, or its part of all experts, add to tokens."""
    x_BLD, expert_BLJ, weight_BLJ = tokens
    J, D, E = expert_BLJ.shape[-1], x_BLD.shape[-1], up_EDF.shape[0]
    expert_R = expert_BLJ.reshape(-1)
    if over_experts:  # those of other devices come last
        expert_R -= jax.lax.axis_index(over_experts) * E
        expert_R = jnp.where((expert_R >= 0) & (expert_R < E), expert_R, E)
    order_R = jnp.argsort(expert_R)
    back_R = jnp.argsort(order_R)
    counts_E = jnp.bincount(expert_R, length=E + 1)[:E]
    inside_R1 = (jnp.arange(expert_R.size) < counts_E.sum())[:, None] if over_experts else None

    def inside(h_RD: jax.Array) -> jax.Array:
        return h_RD if inside_R1 is None else jnp.where(inside_R1, h_RD, 0)

    x_RD = jnp.repeat(x_BLD.reshape(-1, D), J, axis=0)
    h_RD = inside(_permuted(x_RD, order_R, back_R))
    up_RF = jax.lax.ragged_dot(h_RD, up_EDF, counts_E)
    gate_RF = None if gate_EDF is None else jax.lax.ragged_dot(h_RD, gate_EDF, counts_E)
    y_RD = inside(jax.lax.ragged_dot(call.hidden(up_RF, gate_RF), down_EFD, counts_E))
    y_TJD = _permuted(y_RD, back_R, order_R).reshape(-1, J, D)
    return jnp.einsum("tj,tjd->td", weight_BLJ.reshape(-1, J), y_TJD).reshape(x_BLD.shape)


@jax.custom_vjp
def _permuted(x_RD: jax.Array, order_R: jax.Array, back_R: jax.Array) -> jax.Array:
    """Rows in another order. Their gradient is one more gather, where JAX would make a scatter that adds."""
    del back_R
    return x_RD[order_R]


def _permuted_forward(x_RD: jax.Array, order_R: jax.Array, back_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x_RD[order_R], back_R


def _permuted_backward(back_R: jax.Array, g_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return g_RD[back_R], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def _varying(x: jax.Array, axes: set[str]) -> jax.Array:
    """What is the same along axes as what may differ: its gradient is summed over them here, and only once."""
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _axes(spec: P) -> set[str]:
    return {axis for entry in _entries(spec, len(spec)) for axis in entry}


def _entries(spec: P, ndim: int) -> tuple[tuple[str, ...], ...]:
    """Mesh axes of every dimension."""
    entries = (*spec, *[None] * (ndim - len(spec)))
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)


def _tell(reason: str) -> None:
    warnings.warn(f"experts are computed plainly, all tokens on every device: {reason}", stacklevel=2)
