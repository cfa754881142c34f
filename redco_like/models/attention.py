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
        cos_LR, sin_LR: of rotary positions; (B, L, R) where rows differ.
        bias_1NLM: added to the scores (T5).
        keep_BM: which keys are no padding.
        position: of the first query in the cache, one for all rows or one each (B,); None where queries and keys are
            the same tokens, from the first on.
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
    """Self-attention. q, k, v and out are separate kernels (embed, heads * head_dim).

    Attributes:
        reach: how many positions of the cache are read, from the first on; None for all.
    """

    config: ModelConfig
    dtype: Any
    causal: bool = True
    reach: int | None = None

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        context: Context,
        layer: PerLayer,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config

        def heads(x: jax.Array, count: int, name: str) -> jax.Array:
            y = dense(count * c.head_dim, name, c.qkv_bias, self.dtype)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim)

        q_BLNH = heads(x_BLD, c.heads, "q")
        k_BMKH, v_BMKH = heads(x_BLD, c.kv_heads, "k"), heads(x_BLD, c.kv_heads, "v")
        if c.qk_norm:
            q_BLNH = Norm(c.norm, c.norm_eps, False, self.dtype, name="q_norm")(q_BLNH)
            k_BMKH = Norm(c.norm, c.norm_eps, False, self.dtype, name="k_norm")(k_BMKH)
        if context.cos_LR is not None and context.sin_LR is not None:
            q_BLNH = rotate(q_BLNH, context.cos_LR, context.sin_LR, c.rope_interleaved)
            k_BMKH = rotate(k_BMKH, context.cos_LR, context.sin_LR, c.rope_interleaved)
        if cache is not None:
            cache = store(cache, context, layer, keys=k_BMKH.swapaxes(1, 2), values=v_BMKH.swapaxes(1, 2))
            if context.position is not None:
                k_BMKH, v_BMKH = (load(cache, layer, name, self.reach).swapaxes(1, 2) for name in ("keys", "values"))
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
    reach: int | None = None

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
            c_BM1R = load(cache, layer, "latent", self.reach)[:, :, None]
            k_rope = load(cache, layer, "rope", self.reach)[:, :, None]
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
    """Write what one layer adds; the length is the dimension before the last.

    Where rows have positions of their own, a row whose new tokens do not all fit writes nothing.
    """
    zero = jnp.int32(0)
    position = zero if context.position is None else context.position
    index = zero if layer.index is None else layer.index
    cache = dict(cache)
    for name, x in new.items():
        x = x.astype(cache[name].dtype)
        if position.ndim:
            cache[name] = _store_rows(cache[name], x, index, position)
        else:
            start = (index, *([zero] * (x.ndim - 2)), position, zero)
            cache[name] = jax.lax.dynamic_update_slice(cache[name], x[None], start)
    return cache


def _store_rows(cache: jax.Array, x: jax.Array, index: jax.Array, position_B: jax.Array) -> jax.Array:
    """Write (B, ..., L, width) at one layer's `index`, each row from its own position on.

    Rows are a batching dimension of the scatter: where they are split over devices, each writes its own.
    """
    rows = position_B.shape[0]
    where_B2 = jnp.stack([jnp.broadcast_to(index, (rows,)), position_B], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, x.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, cache.ndim - 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(cache, where_B2, x, numbers, indices_are_sorted=True, unique_indices=True, mode="drop")


def load(cache: Cache, layer: PerLayer, name: str, reach: int | None = None) -> jax.Array:
    """What one layer has stored, in the first `reach` positions (None: in all)."""
    x, index = cache[name], 0 if layer.index is None else layer.index
    if reach is None or reach == x.shape[-2]:
        return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
    zero = jnp.int32(0)
    sizes = (1, *x.shape[1:-2], reach, x.shape[-1])
    return jax.lax.dynamic_slice(x, (index, *[zero] * (x.ndim - 1)), sizes)[0]


# Positions.


def alibi(heads: int, L: int, M: int, position: jax.Array | None) -> jax.Array:
    """Attention with linear biases (arXiv 2108.12409): minus slope times distance, (1 or B, heads, L, M)."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    distance_BLM = distances(L, M, position).astype(jnp.float32).reshape(-1, L, M)
    return -distance_BLM[:, None] * jnp.asarray(slopes, jnp.float32)[None, :, None, None]


def rotary(c: ModelConfig, length: int, position: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (length, rotated dimensions of a head), in float32; each angle twice, as its pair lies.

    Where rows have positions of their own (B,), there is a dimension of rows before these.
    """
    frequencies, factor = rope_frequencies(c)
    frequencies = np.repeat(frequencies, 2) if c.rope_interleaved else np.tile(frequencies, 2)
    steps = jnp.arange(length, dtype=jnp.float32)
    if position is not None and position.ndim:
        steps = steps[None] + position.astype(jnp.float32)[:, None]
        angle_BLR = steps[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None]
        return jnp.cos(angle_BLR) * factor, jnp.sin(angle_BLR) * factor
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
        widths = [(0, 0)] * (cos_LR.ndim - 1) + [(0, rest)]
        cos_LR = jnp.pad(cos_LR, widths, constant_values=1.0)
        sin_LR = jnp.pad(sin_LR, widths)
    if cos_LR.ndim == 2:
        cos_LR, sin_LR = cos_LR[None], sin_LR[None]
    return (x * cos_LR[:, :, None] + turned * sin_LR[:, :, None]).astype(x_BLNH.dtype)


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
