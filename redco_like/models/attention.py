"""Attention in one function, and the modules around it: grouped heads, latent attention, positions, the cache.

    o_BLNV = attend(q_BLNH, k_BMKH, v_BMKV, config, context, layer, causal=True)

Shape letters: B batch, L queries, M keys, D embed, N = K * G heads, K kv heads, G groups, H head dim, V value dim,
R rank of the compressed keys and values, T layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from redco_like.models.config import Latent, ModelConfig, yarn_scale
from redco_like.models.layers import Norm, dense, normal
from sharding_rules.kernels import attention, causal_keep, distances, plain_attention

Cache = dict[str, jax.Array]


class Context(NamedTuple):
    """What all layers share.

    Attributes:
        cos_LR, sin_LR: of rotary positions.
        bias_1NLM: added to the scores (T5).
        keep_BM: which keys are no padding.
        position: of the first query in the cache; None where queries and keys are the same tokens, from the first on.
    """

    cos_LR: jax.Array | None = None
    sin_LR: jax.Array | None = None
    bias_1NLM: jax.Array | None = None
    keep_BM: jax.Array | None = None
    position: jax.Array | None = None


class PerLayer(NamedTuple):
    """What differs between layers of one stack: the layer's place in the cache, and how far it looks back."""

    index: jax.Array | None = None
    window: jax.Array | None = None


def attend(
    q_BLNH: jax.Array,
    k_BMKH: jax.Array,
    v_BMKV: jax.Array,
    config: ModelConfig,
    context: Context,
    layer: PerLayer,
    *,
    causal: bool,
    more: tuple[jax.Array, jax.Array] | None = None,
    bias_1NLM: jax.Array | None = None,
) -> jax.Array:
    """Attention of one layer: a call that a kernel can stand for, where nothing but the shapes says which scores count.

    A bias, padding, a cache and a window that differs between layers are for the plain computation alone.

    Args:
        more: further dimensions of queries and keys, whose products are added; these keys may have fewer heads yet.

    Returns:
        (B, L, N, V), in the dtype of the values.
    """
    c = config
    L, M = q_BLNH.shape[1], k_BMKH.shape[1]
    window = c.window if causal and c.window and c.window < M else None
    known = context.keep_BM is None and context.position is None and layer.window is None
    if bias_1NLM is None and known and (not causal or L == M):
        return attention(
            q_BLNH,
            k_BMKH,
            v_BMKV,
            causal=causal,
            scale=c.score_scale,
            window=window,
            softcap=c.attention_softcap,
            more=more,
        )
    keep = None
    if causal:
        keep = causal_keep(L, M, context.position, window if layer.window is None else layer.window)
    if context.keep_BM is not None:
        padding = context.keep_BM[:, None, None, None, :]
        keep = padding if keep is None else keep & padding
    return plain_attention(
        q_BLNH,
        k_BMKH,
        v_BMKV,
        scale=c.score_scale,
        more=more,
        keep=keep,
        bias_1NLM=bias_1NLM,
        softcap=c.attention_softcap,
    )


class Attention(nn.Module):
    """Self-attention, or attention to `memory_BMD`. q, k, v and out are separate kernels (embed, heads * head_dim)."""

    config: ModelConfig
    dtype: Any
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        context: Context,
        layer: PerLayer,
        cache: Cache | None = None,
        memory_BMD: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        source_BMD = x_BLD if memory_BMD is None else memory_BMD

        def heads(x: jax.Array, count: int, name: str) -> jax.Array:
            y = dense(count * c.head_dim, name, c.qkv_bias, self.dtype)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim)

        q_BLNH = heads(x_BLD, c.heads, "q")
        k_BMKH, v_BMKH = heads(source_BMD, c.kv_heads, "k"), heads(source_BMD, c.kv_heads, "v")
        if c.qk_norm:
            q_BLNH = Norm("rms", c.norm_eps, False, self.dtype, name="q_norm")(q_BLNH)
            k_BMKH = Norm("rms", c.norm_eps, False, self.dtype, name="k_norm")(k_BMKH)
        if context.cos_LR is not None and context.sin_LR is not None:
            q_BLNH = rotate(q_BLNH, context.cos_LR, context.sin_LR, c.rope_interleaved)
            k_BMKH = rotate(k_BMKH, context.cos_LR, context.sin_LR, c.rope_interleaved)
        if cache is not None:
            cache = store(cache, context, layer, keys=k_BMKH.swapaxes(1, 2), values=v_BMKH.swapaxes(1, 2))
            if context.position is not None:
                k_BMKH, v_BMKH = (load(cache, layer, name).swapaxes(1, 2) for name in ("keys", "values"))
        L, M = q_BLNH.shape[1], k_BMKH.shape[1]
        bias = alibi(c.heads, L, M, context.position) if c.position == "alibi" else context.bias_1NLM
        o_BLNH = attend(q_BLNH, k_BMKH, v_BMKH, c, context, layer, causal=self.causal, bias_1NLM=bias)
        o_BLX = o_BLNH.reshape(*o_BLNH.shape[:2], c.heads * c.head_dim)
        return dense(c.embed, "out", c.out_bias, self.dtype)(o_BLX), cache


class LatentAttention(nn.Module):
    """Multi-head latent attention; with a cache, queries meet the compressed vectors and keys are never made.

    Kernels that Hugging Face keeps in one are separate, so that no axis is made of unlike parts: its `q_b_proj` (or
    `q_proj`) is `q_nope` and `q_rope`, head by head; `kv_a_proj_with_mqa` is `kv_a` and `k_rope`; `kv_b_proj` is `k_b`
    and `v_b`, head by head.
    """

    config: ModelConfig
    latent: Latent
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, layer: PerLayer, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        c, m = self.config, self.latent
        B, L, _ = x_BLD.shape
        N = c.heads
        q_BLX = x_BLD
        if m.query_rank:
            q_BLX = dense(m.query_rank, "q_a", c.qkv_bias, self.dtype)(q_BLX)
            q_BLX = Norm("rms", c.norm_eps, False, self.dtype, name="q_norm")(q_BLX)
        q_BLNH = dense(N * m.nope_dim, "q_nope", False, self.dtype)(q_BLX).reshape(B, L, N, m.nope_dim)
        q_rope = dense(N * m.rope_dim, "q_rope", False, self.dtype)(q_BLX).reshape(B, L, N, m.rope_dim)
        c_BLR = dense(m.kv_rank, "kv_a", c.qkv_bias, self.dtype)(x_BLD)
        c_BLR = Norm("rms", c.norm_eps, False, self.dtype, name="kv_norm")(c_BLR)
        k_rope = dense(m.rope_dim, "k_rope", c.qkv_bias, self.dtype)(x_BLD)[:, :, None, :]
        if context.cos_LR is not None and context.sin_LR is not None:
            q_rope = rotate(q_rope, context.cos_LR, context.sin_LR, c.rope_interleaved)
            k_rope = rotate(k_rope, context.cos_LR, context.sin_LR, c.rope_interleaved)
        k_b = self.param("k_b", normal, (m.kv_rank, N * m.nope_dim)).astype(self.dtype)
        v_b = self.param("v_b", normal, (m.kv_rank, N * m.value_dim)).astype(self.dtype)
        if cache is not None:
            cache = store(cache, context, layer, latent=c_BLR, rope=k_rope[:, :, 0])
        if cache is None or context.position is None:
            k_BLNH = (c_BLR @ k_b).reshape(B, L, N, m.nope_dim)
            v_BLNV = (c_BLR @ v_b).reshape(B, L, N, m.value_dim)
            o_BLNV = attend(q_BLNH, k_BLNH, v_BLNV, c, context, layer, causal=True, more=(q_rope, k_rope))
        else:
            c_BM1R = load(cache, layer, "latent")[:, :, None]
            k_rope = load(cache, layer, "rope")[:, :, None]
            q_BLNR = jnp.einsum("blnh,rnh->blnr", q_BLNH, k_b.reshape(m.kv_rank, N, m.nope_dim))
            o_BLNR = attend(q_BLNR, c_BM1R, c_BM1R, c, context, layer, causal=True, more=(q_rope, k_rope))
            o_BLNV = jnp.einsum("blnr,rnv->blnv", o_BLNR, v_b.reshape(m.kv_rank, N, m.value_dim))
        return dense(c.embed, "out", c.out_bias, self.dtype)(o_BLNV.reshape(B, L, N * m.value_dim)), cache


# The cache: arrays of all layers, in the carry of the loop over layers, so that an update moves only what is new.


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: Any) -> Cache:
    """Zeros: keys and values (layers, rows, kv heads, length, head dim); with latent attention, the compressed ones."""
    front = (config.layers, rows)
    if config.latent:
        widths = {"latent": config.latent.kv_rank, "rope": config.latent.rope_dim}
        return {name: jnp.zeros((*front, length, width), dtype) for name, width in widths.items()}
    shape = (*front, config.kv_heads, length, config.head_dim)
    return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}


def store(cache: Cache, context: Context, layer: PerLayer, **new: jax.Array) -> Cache:
    """Write what one layer adds; the length is the dimension before the last."""
    zero = jnp.int32(0)
    position = zero if context.position is None else context.position
    index = zero if layer.index is None else layer.index
    cache = dict(cache)
    for name, x in new.items():
        start = (index, *([zero] * (x.ndim - 2)), position, zero)
        cache[name] = jax.lax.dynamic_update_slice(cache[name], x[None].astype(cache[name].dtype), start)
    return cache


def load(cache: Cache, layer: PerLayer, name: str) -> jax.Array:
    """What one layer has stored."""
    return jax.lax.dynamic_index_in_dim(cache[name], 0 if layer.index is None else layer.index, 0, keepdims=False)


# Positions.


def alibi(heads: int, L: int, M: int, position: jax.Array | None) -> jax.Array:
    """Attention with linear biases (arXiv 2108.12409): minus slope times distance, (1, heads, L, M)."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    distance_LM = distances(L, M, position).astype(jnp.float32)
    return -distance_LM[None, None] * jnp.asarray(slopes, jnp.float32)[None, :, None, None]


def bucket_bias(table_RN: jax.Array, L: int, M: int, *, both_ways: bool, buckets: int, distance: int) -> jax.Array:
    """T5's relative bias, (1, heads, L, M): near positions exact, far ones by logarithm."""
    before_LM = distances(L, M, None)
    first = jnp.zeros_like(before_LM)
    if both_ways:
        buckets //= 2
        first = jnp.where(before_LM < 0, buckets, 0)
        before_LM = jnp.abs(before_LM)
    before_LM = jnp.maximum(before_LM, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(before_LM, 1).astype(jnp.float32) / exact) / math.log(distance / exact)
    far = jnp.minimum(exact + (far * (buckets - exact)).astype(jnp.int32), buckets - 1)
    bucket_LM = first + jnp.where(before_LM < exact, before_LM, far)
    return jnp.transpose(table_RN[bucket_LM], (2, 0, 1))[None]


def rotary(c: ModelConfig, length: int, position: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (length, rotated dimensions of a head), in float32; each angle twice, as its pair lies."""
    frequencies, factor = rope_frequencies(c)
    frequencies = np.repeat(frequencies, 2) if c.rope_interleaved else np.tile(frequencies, 2)
    steps = jnp.arange(length, dtype=jnp.float32)
    steps = steps if position is None else steps + position.astype(jnp.float32)
    angle_LR = steps[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.cos(angle_LR) * factor, jnp.sin(angle_LR) * factor


def rotate(x_BLNH: jax.Array, cos_LR: jax.Array, sin_LR: jax.Array, interleaved: bool) -> jax.Array:
    """Turn pairs of the first R dimensions of each head; the rest is turned by an angle of 0.

    Written as a sum of two arrays of full width, so that the dimensions of a head stay one axis.
    """
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
        cos_LR = jnp.pad(cos_LR, ((0, 0), (0, rest)), constant_values=1.0)
        sin_LR = jnp.pad(sin_LR, ((0, 0), (0, rest)))
    return (x * cos_LR[None, :, None] + turned * sin_LR[None, :, None]).astype(x_BLNH.dtype)


def rope_frequencies(c: ModelConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each pair, and a factor on cosines and sines (YaRN, arXiv 2309.00071; LongRoPE)."""
    dim = c.rope_dim
    plain = c.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    s = c.rope_scaling
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
        stretch = c.max_length / s.original_length
        factors = np.asarray(s.long_factor if stretch > 1 else s.short_factor)
        return plain / factors, math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(s.original_length))

    def dimension(rotations: float) -> float:
        return dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = max(math.floor(dimension(s.beta_fast)), 0), min(math.ceil(dimension(s.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    factor = yarn_scale(s.factor, s.mscale or 1.0)
    if s.mscale and s.mscale_all_dim:
        factor /= yarn_scale(s.factor, s.mscale_all_dim)
    return plain / s.factor * ramp + plain * (1 - ramp), factor
