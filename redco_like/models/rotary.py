"""Rotary positions (arXiv 2104.09864) and how they are stretched to lengths beyond those of pretraining.

    turn = rotary(config, length=L, position=None, longest=L)
    q_BLNH = rotate(q_BLNH, turn, config.rope_interleaved)

Shape letters: B batch, L length, N heads, H head dim, R dimensions of a head that turn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from redco_like.models.config import ModelConfig, yarn_scale


class Turn(NamedTuple):
    """Cosines and sines, (L, R), or (B, L, R) where rows differ; each angle twice, as its pair lies."""

    cos_LR: jax.Array
    sin_LR: jax.Array


def rotary(c: ModelConfig, length: int, position: jax.Array | None, *, longest: int, near: bool = False) -> Turn:
    """Turns of `length` positions from `position` on, in float32; where rows have positions of their own (B,), of each.

    Args:
        longest: how many positions there can be in all, which LongRoPE goes by.
        near: for layers with a window, which may have frequencies of their own (Gemma 3).
    """
    frequencies, factor = rope_frequencies(c, longest=longest, near=near)
    frequencies = np.repeat(frequencies, 2) if c.rope_interleaved else np.tile(frequencies, 2)
    steps = jnp.arange(length, dtype=jnp.float32)
    if position is not None and position.ndim:
        steps = steps[None] + position.astype(jnp.float32)[:, None]
        angle_BLR = steps[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None]
        return Turn(jnp.cos(angle_BLR) * factor, jnp.sin(angle_BLR) * factor)
    steps = steps if position is None else steps + position.astype(jnp.float32)
    angle_LR = steps[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return Turn(jnp.cos(angle_LR) * factor, jnp.sin(angle_LR) * factor)


def rotate(x_BLNH: jax.Array, turn: Turn, interleaved: bool) -> jax.Array:
    """Turn pairs of the first R dimensions of each head; the rest is turned by an angle of 0.

    Written as a sum of two arrays of full width, so that the dimensions of a head stay one axis.
    """
    cos_LR, sin_LR = turn
    rest = x_BLNH.shape[-1] - cos_LR.shape[-1]
    x = x_BLNH.astype(jnp.float32)
    if interleaved:
        pairs = x[..., : x.shape[-1] - rest].reshape(*x.shape[:-1], -1, 2)
        turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(*x.shape[:-1], -1)
    else:
        first, second = jnp.split(x[..., : x.shape[-1] - rest], 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    if rest:
        turned = jnp.pad(turned, [(0, 0)] * 3 + [(0, rest)])
        widths = [(0, 0)] * (cos_LR.ndim - 1) + [(0, rest)]
        cos_LR = jnp.pad(cos_LR, widths, constant_values=1.0)
        sin_LR = jnp.pad(sin_LR, widths)
    if cos_LR.ndim == 2:
        cos_LR, sin_LR = cos_LR[None], sin_LR[None]
    return (x * cos_LR[:, :, None] + turned * sin_LR[:, :, None]).astype(x_BLNH.dtype)


def rope_frequencies(c: ModelConfig, *, longest: int = 0, near: bool = False) -> tuple[np.ndarray, float]:
    """Angle per position of each pair, and a factor on cosines and sines.

    Stretched as Llama 3 does it, by YaRN (arXiv 2309.00071), or by LongRoPE (arXiv 2402.13753), whose factors depend on
    whether there are more positions than in pretraining: `longest`.
    """
    dim = c.rope_dim
    theta = c.local_theta if near and c.local_theta else c.rope_theta
    plain = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    s = None if near and c.local_theta else c.rope_scaling
    if s is None:
        return plain, 1.0
    if s.kind == "linear":
        return plain / s.factor, 1.0
    if s.kind == "llama3":
        wavelength = 2 * math.pi / plain
        smooth = (s.original_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * plain / s.factor + smooth * plain, 1.0
    if s.kind == "longrope":
        factors = np.asarray(s.long_factor if longest > s.original_length else s.short_factor)
        warm = math.sqrt(1 + math.log(max(s.factor, 1.0)) / math.log(s.original_length))
        return plain / factors, s.attention_factor or warm

    def dimension(rotations: float) -> float:
        return dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = max(math.floor(dimension(s.beta_fast)), 0), min(math.ceil(dimension(s.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    warm = yarn_scale(s.factor, 1.0)
    if s.mscale and s.mscale_all_dim:
        warm = yarn_scale(s.factor, s.mscale) / yarn_scale(s.factor, s.mscale_all_dim)
    return plain / s.factor * ramp + plain * (1 - ramp), s.attention_factor or warm
