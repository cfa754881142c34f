"""Rows of a cache that is any tree of arrays, spread over a mesh: every device moves its own, and nothing is sent.

    rows = CacheRows(cache_dims(init_cache), specs, mesh)
    view = rows.take(cache, row_SP, reach=256)             # P rows of each of S shards, their first 256 positions
    cache = rows.append(cache, added, row_SP, start_SP)    # new positions, each row from its own on

Rows are counted within their shard. They are written one after the other by updates in place: as a scatter the compiler
for TPUs would want the cache in another layout, and copy it (libtpu 0.0.42).

Shape letters: S shards, P rows of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sharding_rules import BATCH_AXES, PlanError, path_str


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
        if len(rows) != 1 or len(length) != 1:
            raise ValueError(
                f"the cache's array {path_str(path)!r} of shape {a.shape} for 2 rows of 4 positions has its rows in "
                f"dimensions {rows} and its positions in {length}; one each is needed"
            )
        return CacheDims(rows[0], length[0])

    return jax.tree_util.tree_map_with_path(dims, base, more_rows, longer)


class CacheRows:
    """Moves rows of a cache.

    Args:
        dims: of each array, as `cache_dims` finds them.
        specs: how each array is split.
        mesh: over these devices.

    Raises:
        PlanError: positions that are split, or rows that are not split as the batch is.
    """

    def __init__(self, dims: Any, specs: Any, mesh: Mesh):
        self.dims, self.specs, self.mesh = dims, specs, mesh
        batch = {axis for axis in BATCH_AXES if mesh.shape[axis] > 1}
        for path, d in jax.tree_util.tree_leaves_with_path(dims):
            spec = _leaf(specs, path)
            if _axes(spec, d.length, mesh) or _axes(spec, d.rows, mesh) != batch:
                raise PlanError(
                    f"the plan splits the cache's array {path_str(path)!r} as {spec}: rows (dimension {d.rows}) are "
                    f"split over {', '.join(sorted(batch)) or 'nothing'} and positions (dimension {d.length}) over "
                    "nothing; a plan without the axis context does that"
                )

    def take(self, cache: Any, row_SP: jax.Array, reach: int) -> Any:
        """The first `reach` positions of some rows, as a cache of S * P rows. What is no row reads the last one."""

        def local(cache: Any, row_P: jax.Array) -> Any:
            def of(x: jax.Array, d: CacheDims) -> jax.Array:
                parts = [_row(x, d, row_P[0, i], reach) for i in range(row_P.shape[1])]
                return jnp.concatenate(parts, axis=d.rows)

            return jax.tree.map(of, cache, self.dims)

        return self._over(local, 1)(cache, row_SP)

    def append(self, cache: Any, added: Any, row_SP: jax.Array, start_SP: jax.Array) -> Any:
        """Write new positions of S * P rows, each from its own `start_SP` on.

        A row whose new positions do not all fit, and what is no row of the shard, writes nothing.
        """

        def local(cache: Any, added: Any, row_P: jax.Array, start_P: jax.Array) -> Any:
            def write(i: Any, cache: Any) -> Any:
                def of(x: jax.Array, new: jax.Array, d: CacheDims) -> jax.Array:
                    row, start = row_P[0, i], start_P[0, i]
                    new = jax.lax.dynamic_slice_in_dim(new, i, 1, d.rows).astype(x.dtype)
                    at = [jnp.int32(0)] * x.ndim
                    at[d.rows], at[d.length] = row, start
                    fits = (row < x.shape[d.rows]) & (start + new.shape[d.length] <= x.shape[d.length])
                    new = jnp.where(fits, new, jax.lax.dynamic_slice(x, at, new.shape))
                    return jax.lax.dynamic_update_slice(x, new, at)

                return jax.tree.map(of, cache, added, self.dims)

            return jax.lax.fori_loop(0, row_P.shape[1], write, cache)

        shards = self.specs
        return self._over(local, 2, shards)(cache, added, row_SP, start_SP)

    def copy(self, cache: Any, source_S1: jax.Array, target_S1: jax.Array, reach: int) -> Any:
        """Copy the first positions of one row of each shard to another one of it."""

        def local(cache: Any, source: jax.Array, target: jax.Array) -> Any:
            def of(x: jax.Array, d: CacheDims) -> jax.Array:
                return _put(x, d, target[0, 0], _row(x, d, source[0, 0], reach))

            return jax.tree.map(of, cache, self.dims)

        return self._over(local, 2)(cache, source_S1, target_S1)

    def clear(self, cache: Any, row_S1: jax.Array) -> Any:
        """Zero a row of each shard: what is not a number would reach whoever has it next, even behind a mask."""

        def local(cache: Any, row: jax.Array) -> Any:
            def of(x: jax.Array, d: CacheDims) -> jax.Array:
                return _put(x, d, row[0, 0], jnp.zeros((*x.shape[: d.rows], 1, *x.shape[d.rows + 1 :]), x.dtype))

            return jax.tree.map(of, cache, self.dims)

        return self._over(local, 1)(cache, row_S1)

    def _over(self, local: Callable[..., Any], numbers: int, *more: Any) -> Callable[..., Any]:
        """Each device's part of caches, and numbers of rows of its shard."""
        specs = (self.specs, *more, *[P(BATCH_AXES, None)] * numbers)
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=self.specs, check_vma=False)


def _row(x: jax.Array, d: CacheDims, row: jax.Array, reach: int) -> jax.Array:
    sizes = list(x.shape)
    sizes[d.rows], sizes[d.length] = 1, reach
    at = [jnp.int32(0)] * x.ndim
    at[d.rows] = row
    return jax.lax.dynamic_slice(x, at, sizes)


def _put(x: jax.Array, d: CacheDims, row: jax.Array, new: jax.Array) -> jax.Array:
    """Write the first positions of a row, if it is one."""
    at = [jnp.int32(0)] * x.ndim
    at[d.rows] = row
    kept = jnp.where(row < x.shape[d.rows], new, jax.lax.dynamic_slice(x, at, new.shape))
    return jax.lax.dynamic_update_slice(x, kept, at)


def _leaf(tree: Any, path: Any) -> Any:
    found = dict(
        (path_str(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    )
    return found[path_str(path)]


def _axes(spec: P, dimension: int, mesh: Mesh) -> set[str]:
    """Mesh axes larger than 1 that split a dimension."""
    entry = spec[dimension] if dimension < len(spec) else None
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return {name for name in names if mesh.shape[name] > 1}
