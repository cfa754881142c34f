"""Rows of a cache that is any tree of arrays: which dimension is what, and single rows out and in.

    dims = cache_dims(init_cache)                     # of each leaf: where its rows and its positions are
    view = take_rows(cache, dims, local_SP, reach=256)     # P rows of each of S shards, their first 256 positions
    cache = put_rows(cache, view, dims, local_SP)

Rows are counted within their shard, so that every device moves its own: nothing is sent. A number that is no row of
the shard reads some row and writes none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sharding_rules import path_str


@dataclasses.dataclass(frozen=True)
class CacheDims:
    """Dimensions of one array of a cache: its rows, and the positions of their tokens."""

    rows: int
    length: int


def cache_dims(init_cache: Callable[[int, int], Any]) -> Any:
    """Find the dimensions by making caches (of shapes only) of other sizes.

    Args:
        init_cache: (rows, length) -> cache.

    Raises:
        ValueError: an array that has not one dimension of rows and one of positions.
    """
    base, more_rows, longer = (jax.eval_shape(lambda s=s: init_cache(*s)) for s in ((2, 4), (3, 4), (2, 5)))

    def dims(path: Any, a: Any, b: Any, c: Any) -> CacheDims:
        rows = [i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
        length = [i for i, (x, y) in enumerate(zip(a.shape, c.shape, strict=True)) if x != y]
        if len(rows) != 1 or len(length) != 1 or rows[0] >= length[0]:
            raise ValueError(
                f"the cache's array {path_str(path)!r} of shape {a.shape} for 2 rows of 4 positions has its rows in "
                f"dimensions {rows} and its positions in {length}; one each is needed, rows first"
            )
        return CacheDims(rows[0], length[0])

    return jax.tree_util.tree_map_with_path(dims, base, more_rows, longer)


def take_rows(cache: Any, dims: Any, local_SP: jax.Array, reach: int) -> Any:
    """The first `reach` positions of some rows of each shard, as a cache of S * P rows."""
    S, P = local_SP.shape

    def take(x: jax.Array, d: CacheDims) -> jax.Array:
        x = _by_shard(x, d, S)
        others = tuple(i for i in range(x.ndim) if i not in (d.rows, d.rows + 1))
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=others,
            collapsed_slice_dims=(d.rows + 1,),
            start_index_map=(d.rows + 1,),
            operand_batching_dims=(d.rows,),
            start_indices_batching_dims=(0,),
        )
        sizes = [1 if i in (d.rows, d.rows + 1) else n for i, n in enumerate(x.shape)]
        sizes[d.length + 1] = reach
        y = jax.lax.gather(x, local_SP[..., None], numbers, tuple(sizes), mode="clip")
        return y.reshape(*y.shape[: d.rows], S * P, *y.shape[d.rows + 2 :])

    return jax.tree.map(take, cache, dims)


def put_rows(cache: Any, view: Any, dims: Any, local_SP: jax.Array) -> Any:
    """Undo `take_rows`: write rows back, each where it was, or elsewhere in its shard."""
    S, P = local_SP.shape

    def put(x: jax.Array, y: jax.Array, d: CacheDims) -> jax.Array:
        shape = x.shape
        x = _by_shard(x, d, S)
        y = y.reshape(*y.shape[: d.rows], S, P, *y.shape[d.rows + 1 :])
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(i for i in range(y.ndim) if i not in (d.rows, d.rows + 1)),
            inserted_window_dims=(d.rows + 1,),
            scatter_dims_to_operand_dims=(d.rows + 1,),
            operand_batching_dims=(d.rows,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(x, local_SP[..., None], y, numbers, unique_indices=True, mode="drop").reshape(shape)

    return jax.tree.map(put, cache, view, dims)


def clear_rows(cache: Any, dims: Any, local_SP: jax.Array) -> Any:
    """Zero some rows: what is not a number would reach whoever has the row next, even behind a mask."""

    def zeros(x: jax.Array, d: CacheDims) -> jax.Array:
        return jnp.zeros((*x.shape[: d.rows], local_SP.size, *x.shape[d.rows + 1 :]), x.dtype)

    return put_rows(cache, jax.tree.map(zeros, cache, dims), dims, local_SP)


def _by_shard(x: jax.Array, d: CacheDims, shards: int) -> jax.Array:
    rows = x.shape[d.rows]
    return x.reshape(*x.shape[: d.rows], shards, rows // shards, *x.shape[d.rows + 1 :])
