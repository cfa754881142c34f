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

Products in groups are `jax.lax.ragged_dot`, on TPUs a kernel that skips what is in no group, with gradients by
`pipelines.grouped_tpu`; on GPUs they are `pipelines.grouped`.

Shape letters: B batch, L length, T tokens, D embed, E experts, J experts per token, F mlp, R rows: J times tokens.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pipelines.grouped import grouped_dot, obstacle
from pipelines.grouped_tpu import grouped_dot_tpu
from sharding_rules import ExpertsCall
from sharding_rules.kernels import Call

GPUS = ("gpu", "cuda", "rocm")
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""As `jax.lax.ragged_dot`: of rows sorted by group, matrices, and the number of rows of each group."""


def experts_kernels(mesh: Mesh) -> ExpertsKernels | None:
    """What computes experts on a mesh; None for one device, where the plain computation is the same."""
    return ExpertsKernels(mesh.devices.flat[0].platform) if mesh.size > 1 else None


class ExpertsKernels:
    """Computes calls of `experts` on a mesh; `Layout.pin` takes it.

    Attributes:
        platform: of the devices.
        interpret: run the kernels' code step by step, on any platform (for tests).
    """

    def __init__(self, platform: str, *, interpret: bool = False):
        self.platform, self.interpret = platform, interpret

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
            return _tell(f"all tokens are gathered on every device: tokens and kernels are split as {split}")
        shared = (*over_hidden, *over_experts)
        summed = tuple(a for a in shared if not any(a in entry for entry in tokens))
        varying = {a for entry in tokens for a in entry} | set(shared)
        in_specs = [P(*(entry or None for entry in tokens[:-1]), None)] * 3
        in_specs += [P(*(entry or None for entry in spec)) for spec in kernels]
        # Where tokens are gathered and results scattered: over parts of the hidden dimension first, while they are few.
        exchanged = [
            (i, axes)
            for group in (over_hidden, over_experts)
            for i, entry in enumerate(tokens)
            if (axes := tuple(axis for axis in entry if axis in group))
        ]
        product = self._product(operands)
        ways = math.prod(mesh.shape[axis] for axis in over_experts)

        def own(*operands: jax.Array) -> jax.Array:
            for i, axes in exchanged:
                moved = (jax.lax.all_gather(x, axes, axis=i, tiled=True) for x in operands[:3])
                operands = (*moved, *operands[3:])
            if ways == 1:
                return _of_all_experts(call, product, *operands)
            return _of_own_experts(call, product, ways, over_experts, varying, *operands)

        def local(*operands: jax.Array) -> jax.Array:
            operands = tuple(_varying(x, varying - _axes(s)) for x, s in zip(operands, in_specs, strict=True))
            # Tokens of other devices are gathered again for the backward pass, which computes all else of them again.
            y = (own if ways == 1 else jax.checkpoint(own, prevent_cse=False))(*operands)
            for i, axes in reversed(exchanged):
                y = jax.lax.psum_scatter(y, axes, scatter_dimension=i, tiled=True)
            return jax.lax.psum(y, summed) if summed else y

        return jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=in_specs[0])(*operands)

    def _product(self, operands: Sequence[Any]) -> Product:
        """What multiplies rows in groups."""
        if self.platform == "tpu":
            return lambda x_RK, w_EKN, counts_E: grouped_dot_tpu(x_RK, w_EKN, counts_E, self.interpret)
        if self.platform not in GPUS:
            return jax.lax.ragged_dot
        if reason := obstacle(operands[0].dtype, *(w_EKN.dtype for w_EKN in operands[3:])):
            _tell(f"every token is multiplied with every expert of its device: {reason}")
            return jax.lax.ragged_dot
        return lambda x_RK, w_EKN, counts_E: grouped_dot(x_RK, w_EKN, counts_E, self.interpret)


def _of_all_experts(
    call: ExpertsCall,
    product: Product,
    x_BLD: jax.Array,
    expert_BLJ: jax.Array,
    weight_BLJ: jax.Array,
    *kernels: jax.Array,
) -> jax.Array:
    """All experts of a device's tokens, which it sorts."""
    (up_EDF, down_EFD), gate_EDF = kernels[:2], kernels[2:]
    J, D, E = expert_BLJ.shape[-1], x_BLD.shape[-1], up_EDF.shape[0]
    expert_R = _by_choice(expert_BLJ)
    order_R = jnp.argsort(expert_R)
    back_R = jnp.argsort(order_R)
    counts_E = jnp.bincount(expert_R, length=E)
    h_RD = _permuted(jnp.tile(x_BLD.reshape(-1, D), (J, 1)), order_R, back_R)
    up_RF = product(h_RD, up_EDF, counts_E)
    gate_RF = product(h_RD, gate_EDF[0], counts_E) if gate_EDF else None
    y_RD = product(call.hidden(up_RF, gate_RF), down_EFD, counts_E)
    y_JTD = _permuted(y_RD, back_R, order_R).reshape(J, -1, D)
    return jnp.einsum("jt,jtd->td", _by_choice(weight_BLJ).reshape(J, -1), y_JTD).reshape(x_BLD.shape)


def _of_own_experts(
    call: ExpertsCall,
    product: Product,
    ways: int,
    axes: tuple[str, ...],
    varying: set[str],
    x_BLD: jax.Array,
    expert_BLJ: jax.Array,
    weight_BLJ: jax.Array,
    *kernels: jax.Array,
) -> jax.Array:
    """What this device's experts add to the tokens of all devices that share the experts.

    Rows of own experts are sorted first and computed in pieces, as many as there are: each the part of all rows that
    the device has if all experts get as many. The backward pass computes the hidden values of a piece again.
    """
    J, D, E = expert_BLJ.shape[-1], x_BLD.shape[-1], kernels[0].shape[0]
    T = expert_BLJ.size // J
    expert_R = _by_choice(expert_BLJ) - jax.lax.axis_index(axes) * E
    expert_R = jnp.where((expert_R >= 0) & (expert_R < E), expert_R, E)
    order_R = jnp.argsort(expert_R)
    back_R = jnp.argsort(order_R)
    ends_E = jnp.cumsum(jnp.bincount(expert_R, length=E + 1)[:E])
    size = -(-order_R.size // ways)
    order_R = jnp.pad(order_R, (0, size * ways - order_R.size))

    def piece(i: jax.Array, order_R: jax.Array, ends_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows of one piece, which of them have an expert, and how many each expert has."""
        rows_P = jax.lax.dynamic_slice_in_dim(order_R, i * size, size)
        here_E = jnp.clip(ends_E - i * size, 0, size)
        return rows_P, (jnp.arange(size) < here_E[-1])[:, None], jnp.diff(here_E, prepend=0)

    def results(h_PD: jax.Array, weight_P: jax.Array, kernels: Sequence[jax.Array], counts_E: jax.Array) -> jax.Array:
        up_PF = product(h_PD, kernels[0], counts_E)
        gate_PF = product(h_PD, kernels[2], counts_E) if len(kernels) > 2 else None
        return product(weight_P[:, None] * call.hidden(up_PF, gate_PF), kernels[1], counts_E)

    def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return _varying(jnp.zeros(shape, dtype), varying)

    def forward(*operands: Any) -> jax.Array:
        x_TD, weight_R, kernels, order_R, back_R, ends_E = operands

        def step(i: jax.Array, y_RD: jax.Array) -> jax.Array:
            rows_P, inside_P1, counts_E = piece(i, order_R, ends_E)
            y_PD = results(x_TD[rows_P % T], weight_R[rows_P], kernels, counts_E)
            return jax.lax.dynamic_update_slice_in_dim(y_RD, jnp.where(inside_P1, y_PD, 0), i * size, axis=0)

        y_RD = jax.lax.fori_loop(0, -(-ends_E[-1] // size), step, zeros((size * ways, D), x_TD.dtype))
        return y_RD[back_R].reshape(J, T, D).sum(0)

    def kept(*operands: Any) -> tuple[jax.Array, Any]:
        return forward(*operands), operands

    def backward(operands: Any, g_TD: jax.Array) -> tuple[Any, ...]:
        x_TD, weight_R, kernels, order_R, back_R, ends_E = operands

        def step(i: jax.Array, sums: Any) -> Any:
            rows_P, inside_P1, counts_E = piece(i, order_R, ends_E)
            h_PD, g_PD = (jnp.where(inside_P1, a[rows_P % T], 0) for a in (x_TD, g_TD))
            _, pull = jax.vjp(lambda h, w, k: results(h, w, k, counts_E), h_PD, weight_R[rows_P], kernels)
            dh_PD, dweight_P, dkernels = pull(g_PD)
            dh_PD, dweight_P = jnp.where(inside_P1, dh_PD, 0), jnp.where(inside_P1[:, 0], dweight_P, 0)
            dh_RD, dweight_R, totals = sums
            return (
                jax.lax.dynamic_update_slice_in_dim(dh_RD, dh_PD, i * size, axis=0),
                jax.lax.dynamic_update_slice_in_dim(dweight_R, dweight_P, i * size, axis=0),
                tuple(total + dk.astype(total.dtype) for total, dk in zip(totals, dkernels, strict=True)),
            )

        rows = size * ways
        totals = tuple(zeros(k.shape, jnp.promote_types(k.dtype, jnp.float32)) for k in kernels)
        first = zeros((rows, D), x_TD.dtype), zeros((rows,), weight_R.dtype), totals
        dh_RD, dweight_R, totals = jax.lax.fori_loop(0, -(-ends_E[-1] // size), step, first)
        dkernels = tuple(total.astype(k.dtype) for total, k in zip(totals, kernels, strict=True))
        return dh_RD[back_R].reshape(J, T, D).sum(0), dweight_R[back_R], dkernels, None, None, None

    computed = jax.custom_vjp(forward)
    computed.defvjp(kept, backward)
    y_TD = computed(x_BLD.reshape(-1, D), _by_choice(weight_BLJ), kernels, order_R, back_R, ends_E)
    return y_TD.reshape(x_BLD.shape)


def _by_choice(x_BLJ: jax.Array) -> jax.Array:
    """Rows: all tokens' first experts, then their second ones. With a token's experts side by side, a TPU would fill
    them up to tiles of 8 and write every array of rows twice.
    """
    return jnp.moveaxis(x_BLJ, -1, 0).reshape(-1)


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


@functools.cache
def _tell(reason: str) -> None:
    """Say what is not as fast as it could be, the first time."""
    warnings.warn(f"experts: {reason}", stacklevel=2)
