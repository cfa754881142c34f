"""Products of rows in groups on GPUs, each group with a matrix of its own: what `jax.lax.ragged_dot` computes.

    y_RN = grouped_dot(x_RK, w_EKN, counts_E)          # rows are sorted by group

XLA for GPUs multiplies every row with every matrix and masks all but one: E times the work. Here a program of a Triton
kernel multiplies one tile of rows with one matrix. Where a tile has rows of several groups, a program for each stores
its own rows; there are at most rows / TILE + E of them, and those that are not needed end at once.

Shape letters: R rows, E groups, K inner, N columns, V visits (of a tile by a group), T = TILE.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

TILE = 128
"""Rows and columns of one program."""
INNER = 64
"""Rows or columns that a program reads at a time."""


def obstacle(inner_and_columns: Sequence[int], *dtypes: Any) -> str:
    """Why the kernels do not compute a product and its gradients; empty if they do."""
    if any(size % TILE for size in inner_and_columns):
        return f"matrices of {' x '.join(map(str, inner_and_columns))} are no multiples of {TILE}"
    if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"rows and matrices are of {' and '.join(str(jnp.dtype(dtype)) for dtype in dtypes)}"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(x_RK: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool = False) -> jax.Array:
    """Rows of group e times w[e]; rows of no group, which come last, have any values.

    Args:
        x_RK: rows, sorted by group.
        w_EKN: a matrix for each group.
        counts_E: rows of each group.
        interpret: run the kernels' code step by step, on any platform (for tests).
    """
    return _rows(x_RK, w_EKN, counts_E, interpret, turned=False)


def _forward(x_RK: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool) -> tuple[jax.Array, Any]:
    return _rows(x_RK, w_EKN, counts_E, interpret, turned=False), (x_RK, w_EKN, counts_E)


def _backward(interpret: bool, operands: Any, g_RN: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RK, w_EKN, counts_E = operands
    return _rows(g_RN, w_EKN, counts_E, interpret, turned=True), _matrices(x_RK, g_RN, w_EKN, counts_E, interpret), None


grouped_dot.defvjp(_forward, _backward)


def _padded(x_RK: jax.Array) -> jax.Array:
    return jnp.pad(x_RK, ((0, -x_RK.shape[0] % TILE), (0, 0)))


def _ends(counts_E: jax.Array) -> jax.Array:
    """Where groups begin, and where the last one ends."""
    return jnp.pad(jnp.cumsum(counts_E.astype(jnp.int32)), (1, 0))


def _rows(x_RK: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool, *, turned: bool) -> jax.Array:
    """Rows times their group's matrix, or its transpose."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    plain = jax.eval_shape(jax.lax.ragged_dot, x_RK, w_EKN.swapaxes(1, 2) if turned else w_EKN, counts_E)
    E, R = w_EKN.shape[0], x_RK.shape[0]
    inner, columns = x_RK.shape[1], plain.shape[1]
    x_RK, ends_E = _padded(x_RK), _ends(counts_E)
    tiles = x_RK.shape[0] // TILE
    # Group e visits the tiles from that of its first row to that of its last.
    first_E, last_E = ends_E[:-1] // TILE, -(-ends_E[1:] // TILE)
    visits_E = jnp.cumsum(jnp.where(ends_E[1:] > ends_E[:-1], last_E - first_E, 0))
    visit_V = jnp.arange(tiles + E, dtype=jnp.int32)
    group_V = jnp.searchsorted(visits_E, visit_V, side="right").astype(jnp.int32)  # E where there is none left
    group = jnp.minimum(group_V, E - 1)
    before_E = jnp.pad(visits_E, (1, 0))
    tile_V = jnp.minimum(first_E[group] + visit_V - before_E[group], tiles - 1).astype(jnp.int32)

    def kernel(group_ref: Any, tile_ref: Any, ends_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
        visit, column = pl.program_id(1), pl.program_id(0)
        group, tile = group_ref[visit], tile_ref[visit]

        @pl.when(group < E)
        def _() -> None:
            rows, here = pl.ds(tile * TILE, TILE), pl.ds(column * TILE, TILE)

            def step(k: Any, total: Any) -> Any:
                some = pl.ds(k * INNER, INNER)
                x = x_ref[rows, some]
                w = w_ref[group, here, some].T if turned else w_ref[group, some, here]
                return total + gpu.dot(x, w)

            total = jax.lax.fori_loop(0, inner // INNER, step, jnp.zeros((TILE, TILE), jnp.float32))
            row = tile * TILE + jnp.arange(TILE)
            own = (row >= ends_ref[group]) & (row < ends_ref[group + 1])
            mask = jnp.broadcast_to(own[:, None], (TILE, TILE))
            gpu.store(y_ref.at[rows, here], total.astype(y_ref.dtype), mask=mask)

    out = plain.update(shape=(x_RK.shape[0], columns))
    y_RN = pl.pallas_call(
        kernel,
        grid=(columns // TILE, tiles + E),
        out_shape=out,
        compiler_params=gpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_rows",
    )(group_V, tile_V, ends_E, x_RK, w_EKN)
    return y_RN[:R]


def _matrices(x_RK: jax.Array, g_RN: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool) -> jax.Array:
    """The gradient of the matrices: of each, the products of its group's rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    plain = jax.eval_shape(lambda w: w + 0, w_EKN)
    E, K, N = w_EKN.shape
    x_RK, g_RN, ends_E = _padded(x_RK), _padded(g_RN), _ends(counts_E)

    def kernel(ends_ref: Any, x_ref: Any, g_ref: Any, w_ref: Any) -> None:
        group, k, n = pl.program_id(2), pl.program_id(1), pl.program_id(0)
        start, stop = ends_ref[group], ends_ref[group + 1]
        inner, columns = pl.ds(k * TILE, TILE), pl.ds(n * TILE, TILE)

        def step(tile: Any, total: Any) -> Any:
            rows = pl.ds(tile * INNER, INNER)
            row = tile * INNER + jnp.arange(INNER)
            own = ((row >= start) & (row < stop))[:, None]
            # Both: what is in no group may be no number.
            x = jnp.where(own, x_ref[rows, inner], 0)
            g = jnp.where(own, g_ref[rows, columns], 0)
            return total + gpu.dot(x.T, g)

        total = jnp.zeros((TILE, TILE), jnp.float32)
        total = jax.lax.fori_loop(start // INNER, (stop + INNER - 1) // INNER, step, total)
        w_ref[group, inner, columns] = total.astype(w_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(N // TILE, K // TILE, E),
        out_shape=plain,
        compiler_params=gpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_matrices",
    )(ends_E, x_RK, g_RN)
