"""Kernels in 4 bits: NF4 of QLoRA (arXiv 2305.14314), for leaves chosen by path. Lossy, and only where you ask for it.

    small = quantize(base, ["*attention/*/kernel", "*mlp/*/kernel"])       # 4.5 bits per weight; double=True: 4.127
    params = lora.join(small, lora.init(rng, small, ["*attention/*/kernel"], rank=8))

Each block of 64 weights along the inputs of a kernel is scaled by its largest magnitude, and each weight is the nearest
of 16 numbers, the quantiles of a normal distribution. Shape letters: ... stacked, K inputs, N outputs, b = K / 64
blocks, G outputs whose scales are quantised together, g = N / G.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from redco_like.paths import Pattern, matching, replaced
from sharding_rules import NotTrained

CODES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The 16 values of NF4 (appendix E of the paper)."""

BLOCK = 64
"""Weights that share a scale."""

SCALES = 256
"""Scales that are quantised together, at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of blocks in 8 bits: `mean + levels * step`.

    Attributes:
        levels: int8 (..., b, N).
        step: float32 (..., b, g).
        mean: float32 (..., 1, 1).
    """

    levels: Any
    step: Any
    mean: Any

    def dequantize(self) -> jax.Array:
        *front, N = self.levels.shape
        g = self.step.shape[-1]
        wide = self.levels.astype(jnp.float32).reshape(*front, g, N // g) * self.step[..., None]
        return wide.reshape(*front, N) + self.mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4(NotTrained):
    """A kernel (..., K, N) in 4 bits per weight, written out where it is used. A leaf that is never trained.

    Attributes:
        codes: uint8 (..., b, 32, N); weight i of a block is in the low four bits of row i, or, from 32 on, in the high
            ones of row i - 32.
        scales: float32 (..., b, N), the largest magnitude of each block, or `Scales`.
        dtype: of the kernel that it stands for.
    """

    codes: Any
    scales: Any
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        *front, b, half, N = self.codes.shape
        return (*front, b * 2 * half, N)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The kernel, as near as 4 bits are; in its own dtype if none is given."""
        dtype = self.dtype if dtype is None else dtype
        scales = self.scales.dequantize() if isinstance(self.scales, Scales) else self.scales
        shifts = jnp.array([0, 4], jnp.uint8).reshape(*(1,) * (self.codes.ndim - 2), 2, 1, 1)
        index = jax.lax.bitwise_and(self.codes[..., None, :, :] >> shifts, jnp.uint8(15))
        values = jnp.asarray(CODES).at[index].get(mode="promise_in_bounds") * scales[..., None, None, :]
        return values.reshape(self.shape).astype(dtype)

    # What flax.linen opens when a module reads the parameter: see `_known_to_flax`.

    def unbox(self) -> jax.Array:
        return self.dequantize()

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Nf4:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Nf4:
        return self


def is_nf4(node: Any) -> bool:
    return isinstance(node, Nf4)


def quantize(params: Any, patterns: Pattern | Iterable[Pattern], *, double: bool = False, block: int = BLOCK) -> Any:
    """Replace the kernels that the patterns match by `Nf4`; the other leaves stay.

    Modules of flax.linen read an `Nf4` as the kernel that it stands for. Other functions call `dequantize` first.

    Args:
        params: a tree of floating arrays.
        patterns: globs over paths, or compiled regular expressions; see `paths.matching`.
        double: keep the scales in 8 bits too: evenly spaced levels around their mean, up to 256 outputs together (the
            paper has 8-bit floats in their place).
        block: weights that share a scale.

    Raises:
        ValueError: a pattern that matches nothing, a leaf that is no floating matrix, inputs that blocks do not divide.
    """
    _known_to_flax()
    chosen = matching(params, patterns, is_leaf=is_nf4)
    for path, kernel in chosen.items():
        _check(path, kernel, block)
    small = {path: _quantized(kernel, double=double, block=block) for path, kernel in chosen.items()}
    return replaced(params, small, is_leaf=is_nf4)


def dequantize(params: Any, dtype: Any = None) -> Any:
    """Write every `Nf4` of a tree out, all at once; in the dtype that each had if none is given."""
    return jax.tree.map(lambda x: x.dequantize(dtype) if is_nf4(x) else x, params, is_leaf=is_nf4)


def _check(path: str, kernel: Any, block: int) -> None:
    if is_nf4(kernel):
        raise ValueError(f"{path!r} is quantised already")
    if len(kernel.shape) < 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"{path!r} is {kernel.dtype}{tuple(kernel.shape)}; only floating matrices are quantised")
    K = kernel.shape[-2]
    if block < 2 or block % 2 or K % block:
        near = [size for size in range(2, K + 1, 2) if K % size == 0]
        hint = f"block={min(near, key=lambda size: abs(size - block))}" if near else "a pattern that leaves it out"
        raise ValueError(
            f"{path!r} of shape {tuple(kernel.shape)} has {K} inputs, which blocks of {block} do not divide (blocks "
            f"are even, as a byte holds two weights); nearest: {hint}"
        )


def _quantized(kernel: Any, *, double: bool, block: int) -> Nf4:
    codes, scales = _jitted(kernel, double=double, block=block)
    return Nf4(codes, scales, str(kernel.dtype))


def _nearest(kernel: Any, *, double: bool, block: int) -> tuple[jax.Array, Any]:
    *front, K, N = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(*front, K // block, block, N)
    scales: Any = jnp.abs(blocks).max(-2)
    if double:
        scales = _small_scales(scales)
    used = scales.dequantize() if double else scales
    unit = blocks / jnp.where(used > 0, used, 1.0)[..., None, :]
    middles = jnp.asarray((CODES[1:] + CODES[:-1]) / 2)
    index = jnp.searchsorted(middles, unit).astype(jnp.uint8)
    low, high = jnp.split(index, 2, axis=-2)
    return low | (high << jnp.uint8(4)), scales


_jitted = jax.jit(_nearest, static_argnames=("double", "block"))


def _small_scales(scales: jax.Array) -> Scales:
    *front, b, N = scales.shape
    G = next(size for size in range(min(SCALES, N), 0, -1) if N % size == 0)
    mean = scales.mean((-2, -1), keepdims=True)
    centred = (scales - mean).reshape(*front, b, N // G, G)
    step = jnp.abs(centred).max(-1) / 127
    levels = jnp.round(centred / jnp.where(step > 0, step, 1.0)[..., None]).astype(jnp.int8)
    return Scales(levels.reshape(*front, b, N), step, mean)


def _known_to_flax() -> None:
    from flax.core import meta

    meta.AxisMetadata.register(Nf4)
