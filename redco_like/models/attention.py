"""Attention in one function, and the modules around it: grouped heads, latent attention, positions, the cache.

    o_BLNV = attend(q_BLNH, k_BMKH, v_BMKV, config, context, layer, causal=True)

Shape letters: B batch, L queries, M keys, D embed, N = K * G heads, K kv heads, G groups, H head dim, V value dim,
R rank of the compressed keys and values, T layers.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from redco_like.models.config import Latent, ModelConfig
from redco_like.models.layers import Norm, dense, normal
from redco_like.models.rotary import Turn, rotate
from sharding_rules.kernels import MASKED, attention, causal_keep, distances, plain_attention

Cache = dict[str, jax.Array]


class Context(NamedTuple):
    """What all layers share.

    Attributes:
        turn: cosines and sines of rotary positions. near: those of layers with a window, where these differ.
        bias_1NLM: added to the scores (T5).
        keep_BM: which keys are no padding.
        position: of the first query in the cache, one for all rows or one each (B,); None where queries and keys are
            the same tokens, from the first on.
        held: the cache, where rows have positions of their own: layers only read it, and what is new is written when
            all have run, in one go.
    """

    turn: Turn | None = None
    near: Turn | None = None
    bias_1NLM: jax.Array | None = None
    keep_BM: jax.Array | None = None
    position: jax.Array | None = None
    held: Cache | None = None


EVERYTHING = np.iinfo(np.int32).max
"""A window that hides nothing."""


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


def attend_rows(
    q_BLNH: jax.Array,
    older: tuple[jax.Array, ...],
    newer: tuple[jax.Array, ...],
    config: ModelConfig,
    context: Context,
    layer: PerLayer,
    *,
    more: jax.Array | None = None,
) -> jax.Array:
    """Attention of tokens to each other and to what their rows hold, without writing the one beside the other.

    With scores s1 and s2 to both, m = max(s1, s2): o = (exp(s1 - m) v1 + exp(s2 - m) v2) / (sum exp(s1 - m) + sum
    exp(s2 - m)).

    Args:
        older: keys (B, M, K, H) and values (B, M, K, V) of the cache, those of a row's position and after not counting;
            with `more`, further dimensions of the keys.
        newer: the same of the tokens themselves, (B, L, ...).
        more: further dimensions of the queries.

    Returns:
        (B, L, N, V), in the dtype of the values.
    """
    c, position_B = config, context.position
    B, L, N, _ = q_BLNH.shape
    K = newer[1].shape[2]
    window = layer.window if layer.window is not None else c.window or None
    assert position_B is not None

    def products(q_BLNH: jax.Array, k_BMKH: jax.Array) -> jax.Array:
        M, heads = k_BMKH.shape[1:3]
        q_BLKGH = q_BLNH.reshape(B, L, heads, N // heads, -1)
        y = jnp.einsum("blkgh,bmkh->bkglm", q_BLKGH, k_BMKH, preferred_element_type=jnp.float32)
        return y if heads == K else y.reshape(B, K, N // K, L, M)

    def scores(part: tuple[jax.Array, ...], position: jax.Array | None) -> jax.Array:
        M = part[0].shape[1]
        s_BKGLM = products(q_BLNH, part[0])
        if more is not None:
            s_BKGLM += products(more, part[2])
        s_BKGLM *= c.score_scale
        if c.attention_softcap:
            s_BKGLM = c.attention_softcap * jnp.tanh(s_BKGLM / c.attention_softcap)
        if c.position == "alibi":
            s_BKGLM += alibi(c.heads, L, M, position).reshape(-1, K, N // K, L, M)
        keep = causal_keep(L, M, position, window)
        if position is not None:
            before_BM = jax.lax.broadcasted_iota(jnp.int32, (B, M), 1) < jnp.broadcast_to(position[:, None], (B, M))
            keep &= before_BM[:, None, None, None]
        return jnp.where(keep, s_BKGLM, MASKED)

    parts = [(scores(older, position_B), older[1]), (scores(newer, None), newer[1])]
    most_BKGL1 = jnp.maximum(*(s.max(-1, keepdims=True) for s, _ in parts))
    total_BLKG1, o_BLKGV = jnp.float32(0), jnp.float32(0)
    for s_BKGLM, v_BMKV in parts:
        e_BKGLM = jnp.exp(s_BKGLM - most_BKGL1)
        total_BLKG1 += e_BKGLM.sum(-1).transpose(0, 3, 1, 2)[..., None]
        weights = e_BKGLM.astype(v_BMKV.dtype)
        o_BLKGV += jnp.einsum("bkglm,bmkv->blkgv", weights, v_BMKV, preferred_element_type=jnp.float32)
    return (o_BLKGV / total_BLKG1).astype(newer[1].dtype).reshape(B, L, N, -1)


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
        turn = context.turn
        if turn is not None and context.near is not None and layer.window is not None:
            # Which layers have a window is known when the loop over them runs.
            turn = jax.tree.map(functools.partial(jnp.where, layer.window < EVERYTHING), context.near, turn)
        if turn is not None:
            q_BLNH, k_BMKH = (rotate(x, turn, c.rope_interleaved) for x in (q_BLNH, k_BMKH))
        if context.held is not None:
            older = tuple(load(context.held, layer, x, self.reach).swapaxes(1, 2) for x in ("keys", "values"))
            o_BLNH = attend_rows(q_BLNH, older, (k_BMKH, v_BMKH), c, context, layer)
            new = {"keys": k_BMKH.swapaxes(1, 2), "values": v_BMKH.swapaxes(1, 2)}
            return dense(c.embed, "out", c.out_bias, self.dtype)(o_BLNH.reshape(*x_BLD.shape[:2], -1)), new
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
        if context.turn is not None:
            q_rope, k_rope = (rotate(x, context.turn, c.rope_interleaved) for x in (q_rope, k_rope))
        k_b = self.param("k_b", normal, (m.kv_rank, N * m.nope_dim)).astype(self.dtype)
        v_b = self.param("v_b", normal, (m.kv_rank, N * m.value_dim)).astype(self.dtype)
        if cache is not None:
            cache = store(cache, context, layer, latent=c_BLR, rope=k_rope[:, :, 0])
        if context.held is not None:
            held = {name: load(context.held, layer, name, self.reach)[:, :, None] for name in ("latent", "rope")}
            q_BLNR = jnp.einsum("blnh,rnh->blnr", q_BLNH, k_b.reshape(m.kv_rank, N, m.nope_dim))
            older = held["latent"], held["latent"], held["rope"]
            newer = c_BLR[:, :, None], c_BLR[:, :, None], k_rope
            o_BLNR = attend_rows(q_BLNR, older, newer, c, context, layer, more=q_rope)
            o_BLNV = jnp.einsum("blnr,rnv->blnv", o_BLNR, v_b.reshape(m.kv_rank, N, m.value_dim))
            cache = {"latent": c_BLR, "rope": k_rope[:, :, 0]}
        elif cache is None or context.position is None:
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
            cache[name] = _store_rows(cache[name], x[None], position, index[None])
        else:
            start = (index, *([zero] * (x.ndim - 2)), position, zero)
            cache[name] = jax.lax.dynamic_update_slice(cache[name], x[None], start)
    return cache


def store_rows(cache: Cache, new: Cache, position_B: jax.Array) -> Cache:
    """Write what all layers add, (layers, B, ..., L, width), each row from its own position on.

    A row whose new tokens do not all fit writes nothing.
    """
    return {name: _store_rows(x, new[name].astype(x.dtype), position_B) for name, x in cache.items()}


def _store_rows(cache: jax.Array, x: jax.Array, position_B: jax.Array, index_1: jax.Array | None = None) -> jax.Array:
    """Write (layers, B, ..., L, width): to all layers, or of one layer to that of `index_1`.

    Rows are a batching dimension of the scatter: where they are split over devices, each writes its own.
    """
    rows = position_B.shape[0]
    where = position_B[:, None]
    if index_1 is not None:
        where = jnp.concatenate([jnp.broadcast_to(index_1, (rows, 1)), where], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, *range(2, x.ndim)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(cache.ndim - 2,) if index_1 is None else (0, cache.ndim - 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(cache, where, x, numbers, indices_are_sorted=True, unique_indices=True, mode="drop")


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
