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


def obstacle(*dtypes: Any) -> str:
    """Why the kernels do not compute a product and its gradients; empty if they do."""
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


def group_ends(counts_E: jax.Array) -> jax.Array:
    """Where groups begin, and where the last one ends."""
    return jnp.pad(jnp.cumsum(counts_E.astype(jnp.int32)), (1, 0))


def group_visits(ends_E: jax.Array, tiles: int, tile: int, *, of_empty: int) -> tuple[jax.Array, jax.Array]:
    """Which group visits which tile of rows, in order: each those from that of its first row to that of its last.

    Args:
        ends_E: of `group_ends`.
        tiles, tile: number of tiles, rows of one.
        of_empty: visits of a group without rows.

    Returns:
        Groups and tiles; group E where there is no visit left.
    """
    E = ends_E.size - 1
    first_E, last_E = ends_E[:-1] // tile, -(-ends_E[1:] // tile)
    visits_E = jnp.cumsum(jnp.where(ends_E[1:] > ends_E[:-1], last_E - first_E, of_empty))
    visit_V = jnp.arange(tiles + E, dtype=jnp.int32)
    group_V = jnp.searchsorted(visits_E, visit_V, side="right").astype(jnp.int32)
    group = jnp.minimum(group_V, E - 1)
    before_E = jnp.pad(visits_E, (1, 0))
    return group_V, jnp.minimum(first_E[group] + visit_V - before_E[group], tiles - 1).astype(jnp.int32)


def within(block: Any, width: int, size: int) -> Any:
    """Which places of a block are inside of a dimension; None where all blocks are."""
    return None if size % width == 0 else block * width + jnp.arange(width) < size


def _both(row: Any, column: Any, shape: Sequence[int]) -> jax.Array:
    """A mask of two dimensions from those of its rows and its columns, of which one may be None."""
    parts = [
        mask
        for mask in (None if row is None else row[:, None], None if column is None else column[None])
        if mask is not None
    ]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, parts), tuple(shape))


def _masked_load(ref: Any, place: tuple[Any, ...], row: Any, column: Any) -> jax.Array:
    """Part of a matrix, zero where a mask of its rows or columns says no."""
    from jax.experimental.pallas import triton as gpu

    if row is None and column is None:
        return ref[place]
    shape = tuple(part.size for part in place[-2:])
    return gpu.load(ref.at[place], mask=_both(row, column, shape), other=0)


def _rows(x_RK: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool, *, turned: bool) -> jax.Array:
    """Rows times their group's matrix, or its transpose."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    plain = jax.eval_shape(jax.lax.ragged_dot, x_RK, w_EKN.swapaxes(1, 2) if turned else w_EKN, counts_E)
    E, R = w_EKN.shape[0], x_RK.shape[0]
    inner, columns = x_RK.shape[1], plain.shape[1]
    x_RK, ends_E = _padded(x_RK), group_ends(counts_E)
    tiles = x_RK.shape[0] // TILE
    group_V, tile_V = group_visits(ends_E, tiles, TILE, of_empty=0)

    def kernel(group_ref: Any, tile_ref: Any, ends_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
        visit, column = pl.program_id(1), pl.program_id(0)
        group, tile = group_ref[visit], tile_ref[visit]

        @pl.when(group < E)
        def _() -> None:
            rows, here = pl.ds(tile * TILE, TILE), pl.ds(column * TILE, TILE)

            def step(k: Any, total: Any) -> Any:
                some = pl.ds(k * INNER, INNER)
                x = _masked_load(x_ref, (rows, some), None, within(k, INNER, inner))
                if turned:
                    return total + gpu.dot(
                        x, _masked_load(w_ref, (group, here, some), column_T, within(k, INNER, inner)).T
                    )
                return total + gpu.dot(x, _masked_load(w_ref, (group, some, here), within(k, INNER, inner), column_T))

            column_T = within(column, TILE, columns)
            total = jax.lax.fori_loop(0, -(-inner // INNER), step, jnp.zeros((TILE, TILE), jnp.float32))
            row = tile * TILE + jnp.arange(TILE)
            own = (row >= ends_ref[group]) & (row < ends_ref[group + 1])
            mask = own[:, None] if column_T is None else own[:, None] & column_T[None]
            mask = jnp.broadcast_to(mask, (TILE, TILE))
            gpu.store(y_ref.at[rows, here], total.astype(y_ref.dtype), mask=mask)

    out = plain.update(shape=(x_RK.shape[0], columns))
    y_RN = pl.pallas_call(
        kernel,
        grid=(-(-columns // TILE), tiles + E),
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
    x_RK, g_RN, ends_E = _padded(x_RK), _padded(g_RN), group_ends(counts_E)

    def kernel(ends_ref: Any, x_ref: Any, g_ref: Any, w_ref: Any) -> None:
        group, k, n = pl.program_id(2), pl.program_id(1), pl.program_id(0)
        start, stop = ends_ref[group], ends_ref[group + 1]
        inner, columns = pl.ds(k * TILE, TILE), pl.ds(n * TILE, TILE)
        inner_T, column_T = within(k, TILE, K), within(n, TILE, N)

        def step(tile: Any, total: Any) -> Any:
            rows = pl.ds(tile * INNER, INNER)
            row = tile * INNER + jnp.arange(INNER)
            own = (row >= start) & (row < stop)
            # Both: what is in no group may be no number.
            x = _masked_load(x_ref, (rows, inner), own, inner_T)
            g = _masked_load(g_ref, (rows, columns), own, column_T)
            return total + gpu.dot(x.T, g)

        total = jnp.zeros((TILE, TILE), jnp.float32)
        total = jax.lax.fori_loop(start // INNER, (stop + INNER - 1) // INNER, step, total)
        here = w_ref.at[group, inner, columns]
        if inner_T is None and column_T is None:
            here[...] = total.astype(w_ref.dtype)
        else:
            gpu.store(here, total.astype(w_ref.dtype), mask=_both(inner_T, column_T, total.shape))

    return pl.pallas_call(
        kernel,
        grid=(-(-N // TILE), -(-K // TILE), E),
        out_shape=plain,
        compiler_params=gpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_matrices",
    )(ends_E, x_RK, g_RN)
