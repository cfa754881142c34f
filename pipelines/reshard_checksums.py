"""Checksums of parts of arrays, computed where they lie. Those of disjoint parts add up to that of their union.

    total = sum(part_checksum(shard, shard_box, piece, shape) for ...) % 2**32

c = sum over elements of bits(x) w(i) mod 2^32, i the element's number in the whole array, w(i) odd and mixed from i
(the finaliser of MurmurHash3, Appleby 2011). A single changed element always changes c, as odd numbers are invertible
mod 2^32; elements in wrong places or several changed ones go unseen with probability 2^-32 or so.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipelines.reshard_pieces import Box

MODULUS = 2**32
BLOCK_ELEMENTS = 2**16


def part_checksum(shard: jax.Array, held: Box, part: Box, shape: tuple[int, ...]) -> jax.Array:
    """Checksum of a part of an array (asynchronous).

    Args:
        shard: on one device.
        held: the box of the whole array that it holds.
        part: inside `held`.
        shape: of the whole array.

    Returns:
        uint32 scalar, on the shard's device.
    """
    start = np.asarray([s - begin for (s, _), (begin, _) in zip(part, held, strict=True)], np.int32)
    offset = np.asarray([s % MODULUS for s, _ in part], np.uint32)
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    stride = np.asarray([s % MODULUS for s in reversed(strides)][: len(shape)], np.uint32)
    return _checksum(_bits(shard), start, offset, stride, tuple(stop - s for s, stop in part))


def _bits(shard: Any) -> Any:
    """Half-width floats on a CPU device as integers in the same memory: its compiler would convert the whole shard."""
    halves = jnp.issubdtype(shard.dtype, jnp.floating) and shard.dtype.itemsize == 2
    if not halves or not isinstance(shard, jax.Array) or len(shard.devices()) > 1:
        return shard
    (device,) = shard.devices()
    return jax.device_put(np.asarray(shard).view(np.uint16), device) if device.platform == "cpu" else shard


@functools.partial(jax.jit, static_argnums=4)
def _checksum(shard: Any, start: Any, offset: Any, stride: Any, size: tuple[int, ...]) -> jax.Array:
    """Block by block: XLA's CPU backend writes what it adds up, four bytes for each element."""
    if math.prod(size) <= BLOCK_ELEMENTS:
        return _block_sum(shard, start, offset, stride, (0,) * len(size), size)
    # Whole dimensions from `dim` on are a block or less; those before it are looped over, and so are parts of `dim`.
    dim = next(d for d in range(len(size)) if math.prod(size[d + 1 :]) <= BLOCK_ELEMENTS)
    rows = BLOCK_ELEMENTS // math.prod(size[dim + 1 :])
    total = jnp.zeros((), jnp.uint32)
    for first, many, length in ((0, size[dim] // rows, rows), (size[dim] // rows * rows, 1, size[dim] % rows)):
        if not length:
            continue
        counts = (*size[:dim], many)

        def add(i: Any, total: Any, first: int = first, length: int = length, counts: Any = counts) -> Any:
            at = list(jnp.unravel_index(i, counts))
            at[dim] = first + at[dim] * length
            at += [0] * (len(size) - len(at))
            block = ((1,) * dim) + (length,) + size[dim + 1 :]
            return total + _block_sum(shard, start, offset, stride, at, block)

        total = lax.fori_loop(0, math.prod(counts), add, total)
    return total


def _block_sum(shard: Any, start: Any, offset: Any, stride: Any, at: Any, size: tuple[int, ...]) -> jax.Array:
    part = shard
    if size != shard.shape:
        part = lax.dynamic_slice(shard, [start[d] + at[d] for d in range(len(size))], size)
    number = jnp.zeros(size, jnp.uint32)
    for d in range(len(size)):
        first = offset[d] + jnp.asarray(at[d], jnp.uint32)
        number += (lax.broadcasted_iota(jnp.uint32, size, d) + first) * stride[d]
    number ^= number >> 16
    number *= jnp.uint32(0x85EBCA6B)
    number ^= number >> 13
    number *= jnp.uint32(0xC2B2AE35)
    number ^= number >> 16
    return jnp.sum(_words(part) * (number | jnp.uint32(1)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as one uint32."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(x.real) + _words(x.imag) * jnp.uint32(0x9E3779B1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        halves = lax.bitcast_convert_type(x, jnp.uint32)
        return halves[..., 0] + halves[..., 1] * jnp.uint32(0x9E3779B1)
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        return x.astype(jnp.int32).astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        return _words(x.astype(jnp.float32))
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, words).astype(jnp.uint32)
