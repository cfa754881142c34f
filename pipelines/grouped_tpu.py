"""Products of rows in groups on TPUs: `jax.lax.ragged_dot`, with a kernel for the gradient of its matrices.

    y_RN = grouped_dot_tpu(x_RK, w_EKN, counts_E)      # rows are sorted by group

XLA for TPUs has a kernel for the product and for the gradient of its rows. The gradient of its matrices it writes as
one product of all rows per matrix, all but its own rows masked: E times the work, unless the blocks that are masked are
skipped, which is lost where a collective is merged into the product. Here, as in megablox (Gale et al. 2022,
arXiv 2211.15841), a visit adds one tile of rows to the matrix of one group; a tile with rows of several groups is
visited by each.

Shape letters as in `pipelines.grouped`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pipelines.grouped import group_ends, group_visits

ROWS = 512
"""Of a tile."""
MOST_COLUMNS = 1024
"""Of a block of a matrix, both ways: its sum in float32 and two of each operand's blocks are 12 MiB on the chip."""
LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot_tpu(x_RK: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool = False) -> jax.Array:
    """Rows of group e times w[e]; rows of no group, which come last, have any values.

    Args:
        x_RK: rows, sorted by group.
        w_EKN: a matrix for each group.
        counts_E: rows of each group.
        interpret: run the kernel's code step by step, on any platform (for tests).
    """
    return jax.lax.ragged_dot(x_RK, w_EKN, counts_E)


def _forward(x_RK: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool) -> tuple[jax.Array, Any]:
    return jax.lax.ragged_dot(x_RK, w_EKN, counts_E), (x_RK, w_EKN, counts_E)


def _backward(interpret: bool, operands: Any, g_RN: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RK, w_EKN, counts_E = operands
    _, pull = jax.vjp(lambda x: jax.lax.ragged_dot(x, w_EKN, counts_E), x_RK)
    return *pull(g_RN), _matrices(x_RK, g_RN, w_EKN, counts_E, interpret), None


grouped_dot_tpu.defvjp(_forward, _backward)


def block_size(size: int) -> int:
    """Columns of a block: equal ones, none above `MOST_COLUMNS`, whole lanes.

    >>> block_size(4096), block_size(1408), block_size(96)
    (1024, 768, 128)
    """
    blocks = -(-size // MOST_COLUMNS)
    return -(-size // blocks // LANES) * LANES


def _matrices(x_RK: jax.Array, g_RN: jax.Array, w_EKN: jax.Array, counts_E: jax.Array, interpret: bool) -> jax.Array:
    """The gradient of the matrices: of each, the products of its group's rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    plain = jax.eval_shape(lambda w: w + 0, w_EKN)
    E, K, N = w_EKN.shape
    inner, columns = block_size(K), block_size(N)
    padding = ((0, -x_RK.shape[0] % ROWS), (0, 0))
    x_RK, g_RN, ends_E = jnp.pad(x_RK, padding), jnp.pad(g_RN, padding), group_ends(counts_E)
    # An empty group is visited once: its gradient is zero.
    group_V, tile_V = group_visits(ends_E, x_RK.shape[0] // ROWS, ROWS, of_empty=1)

    def kernel(
        group_ref: Any, tile_ref: Any, ends_ref: Any, x_ref: Any, g_ref: Any, w_ref: Any, total_ref: Any
    ) -> None:
        visit, last = pl.program_id(2), pl.num_programs(2) - 1
        group, first_row = group_ref[visit], tile_ref[visit] * ROWS
        own = jnp.minimum(group, E - 1)
        start, stop = ends_ref[own], ends_ref[own + 1]
        whole = (first_row >= start) & (first_row + ROWS <= stop)

        def add(x: jax.Array, g: jax.Array) -> None:
            total_ref[...] += jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        @pl.when((visit == 0) | (group_ref[jnp.maximum(visit - 1, 0)] != group))
        def _() -> None:
            total_ref[...] = jnp.zeros_like(total_ref)

        @pl.when((group < E) & whole)
        def _() -> None:
            add(x_ref[...], g_ref[...])

        @pl.when((group < E) & ~whole & (start < stop))
        def _() -> None:
            # Both: what is in no group may be no number.
            def masked(ref: Any) -> jax.Array:
                row = first_row + jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
                rows = ref[...]
                return jnp.where((row >= start) & (row < stop), rows.astype(jnp.float32), 0.0).astype(rows.dtype)

            add(masked(x_ref), masked(g_ref))

        @pl.when((group < E) & ((visit == last) | (group_ref[jnp.minimum(visit + 1, last)] != group)))
        def _() -> None:
            w_ref[...] = total_ref[...].astype(w_ref.dtype)

    def matrix(n: Any, k: Any, visit: Any, group_ref: Any, tile_ref: Any, ends_ref: Any) -> tuple[Any, ...]:
        return jnp.minimum(group_ref[visit], E - 1), k, n

    grid = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(-(-N // columns), -(-K // inner), group_V.size),
        in_specs=[
            pl.BlockSpec((ROWS, inner), lambda n, k, visit, groups, tiles, ends: (tiles[visit], k)),
            pl.BlockSpec((ROWS, columns), lambda n, k, visit, groups, tiles, ends: (tiles[visit], n)),
        ],
        out_specs=pl.BlockSpec((None, inner, columns), matrix),
        scratch_shapes=[tpu.VMEM((inner, columns), jnp.float32)],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=plain,
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matrices",
    )(group_V, tile_V, ends_E, x_RK, g_RN)
