"""Encoder-decoders: T5 and BART, for training, for reading a source and for one token after the other.

    module = EncoderDecoder(config, "bfloat16")
    logits, _ = module.apply({"params": params}, tokens, source=source)

T5 has norms before each part and one table of relative positions for each stack; BART has them after each part, and
tables of absolute positions. Shape letters as in `attention`; S source length, P positions, R buckets.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from redco_like.models.attention import Attention, Cache, Context, PerLayer, attend, load, store
from redco_like.models.config import ModelConfig
from redco_like.models.layers import Hidden, dense, learned_positions, norm, normal
from sharding_rules.kernels import distances


class Memory(NamedTuple):
    """What the decoder attends to: the encoder's output, and which of it is no padding (None: all of it)."""

    values_BSD: jax.Array
    keep_BS: jax.Array | None = None


class CrossAttention(nn.Module):
    """Attention to the memory, or to the keys and values that the cache has of it."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, layer: PerLayer, memory: Memory | None, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config

        def heads(x: jax.Array, count: int, name: str) -> jax.Array:
            y = dense(count * c.head_dim, name, c.qkv_bias, self.dtype)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim)

        q_BLNH = heads(x_BLD, c.heads, "q")
        if memory is not None:
            keep_BS = memory.keep_BS
            k_BSKH, v_BSKH = (heads(memory.values_BSD, c.kv_heads, name) for name in ("k", "v"))
            if cache is not None:
                new = {"cross_keys": k_BSKH.swapaxes(1, 2), "cross_values": v_BSKH.swapaxes(1, 2)}
                cache = store(cache, Context(), layer, **new)
        elif cache is not None:
            keep_BS = cache["keep"]
            k_BSKH, v_BSKH = (load(cache, layer, name).swapaxes(1, 2) for name in ("cross_keys", "cross_values"))
        else:
            raise ValueError(f"{c.family}: the decoder is given neither a source, nor the memory of one, nor a cache")
        o_BLNH = attend(q_BLNH, k_BSKH, v_BSKH, c, Context(keep_BM=keep_BS), PerLayer(), causal=False)
        o_BLX = o_BLNH.reshape(*o_BLNH.shape[:2], c.heads * c.head_dim)
        return dense(c.embed, "out", c.out_bias, self.dtype)(o_BLX), cache


class Layer(nn.Module):
    """One layer of the encoder, or of the decoder, which attends to the memory or to the cache's keys of it."""

    config: ModelConfig
    dtype: Any
    decoder: bool
    reach: int | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: PerLayer, context: Context, memory: Memory | None
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        c, dtype = self.config, self.dtype
        x_BLD, cache = carry

        def attention(x_BLD: jax.Array) -> jax.Array:
            nonlocal cache
            y_BLD, cache = Attention(c, dtype, self.decoder, self.reach, name="attention")(x_BLD, context, layer, cache)
            return y_BLD

        def cross(x_BLD: jax.Array) -> jax.Array:
            nonlocal cache
            y_BLD, cache = CrossAttention(c, dtype, name="cross")(x_BLD, layer, memory, cache)
            return y_BLD

        parts = [
            ("attention_norm", attention),
            ("cross_norm", cross),
            ("mlp_norm", Hidden(c, c.mlp, dtype, name="mlp")),
        ]
        for name, part in parts if self.decoder else (parts[0], parts[2]):
            if c.block == "post":
                x_BLD = norm(c, dtype, name)(x_BLD + part(x_BLD))
            else:
                x_BLD += part(norm(c, dtype, name)(x_BLD))
        return (x_BLD, cache), None


class Stack(nn.Module):
    """Layers in one scan, with the positions before and a norm after."""

    config: ModelConfig
    dtype: Any
    layers: int
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        keep_BL: jax.Array | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        position: jax.Array | None = None,
        reach: int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c, L = self.config, x_BLD.shape[1]
        M = L if cache is None or position is None else reach or cache["keys"].shape[-2]
        bias = None
        if c.position == "buckets":
            table_RN = self.param("buckets", normal, (c.buckets, c.heads)).astype(self.dtype)
            bias = bucket_bias(table_RN, L, M, position, both_ways=not self.decoder, distance=c.bucket_distance)
        else:
            table_PD = self.param("positions", normal, (c.max_length + c.position_offset, c.embed)).astype(self.dtype)
            x_BLD += learned_positions(table_PD, L, position, c.position_offset)
            x_BLD = norm(c, self.dtype, "embed_norm")(x_BLD)
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.layers,
        )(c, self.dtype, self.decoder, reach, name="layers")
        layer = PerLayer(None if cache is None else jnp.arange(self.layers, dtype=jnp.int32))
        context = Context(bias_1NLM=bias, keep_BM=keep_BL, position=position)
        (x_BLD, cache), _ = stack((x_BLD, cache), layer, context, memory)
        return norm(c, self.dtype, "norm")(x_BLD) if c.final_norm else x_BLD, cache


class EncoderDecoder(nn.Module):
    """The decoder's input ids (B, L) to logits (B, L, V) and the cache, given a source (B, S) or the memory of one.

    With a cache and no position the tokens are the first ones: the memory's keys and values are written to the cache,
    and only the last token's logits are made, (B, 1, V). With a position, the cache stands for the memory; `last_B` and
    `reach` are those of `Decoder`.
    """

    config: ModelConfig
    dtype: Any

    def setup(self) -> None:
        c = self.config
        self.embed = self.param("embed", normal, (c.vocab, c.embed))
        self.encoder = Stack(c, self.dtype, c.layers, False)
        self.decoder = Stack(c, self.dtype, c.decoder_layers, True)
        if not c.tied:
            self.head = dense(c.vocab, "head", False, self.dtype)
        if c.head_bias:
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (c.vocab,))

    def encode(self, source_BS: jax.Array, keep_BS: jax.Array | None = None) -> Memory:
        """Read the source."""
        keep_BS = None if keep_BS is None else keep_BS.astype(bool)
        values_BSD, _ = self.encoder(self._embed(source_BS), keep_BS)
        return Memory(values_BSD, keep_BS)

    def __call__(
        self,
        tokens_BL: jax.Array,
        cache: Cache | None = None,
        position: jax.Array | None = None,
        last_B: jax.Array | None = None,
        reach: int | None = None,
        *,
        source: jax.Array | None = None,
        memory: Memory | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        if source is not None:
            memory = self.encode(source, keep)
        if cache is not None and memory is not None:
            cache = {**cache, "keep": _kept(memory, cache["keep"])}
        x_BLD, cache = self.decoder(self._embed(tokens_BL), None, memory, cache, position, reach)
        if last_B is not None:
            x_BLD = jax.vmap(lambda x_LD, last: jax.lax.dynamic_slice_in_dim(x_LD, last, 1))(x_BLD, last_B)
        elif cache is not None and position is None:
            x_BLD = x_BLD[:, -1:]
        if not c.tied:
            logits_BLV = self.head(x_BLD)
        else:
            if c.position == "buckets":
                x_BLD *= jnp.asarray(c.embed**-0.5, self.dtype)
            logits_BLV = jnp.einsum("bld,vd->blv", x_BLD, self.embed.astype(self.dtype))
        if c.head_bias:
            # A buffer of the published models, which is not trained.
            logits_BLV += jax.lax.stop_gradient(self.head_bias).astype(self.dtype)[None, None]
        return logits_BLV, cache

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        x_BLD = self.embed.astype(self.dtype)[tokens_BL]
        return x_BLD * jnp.asarray(self.config.embed**0.5, self.dtype) if self.config.embed_scale else x_BLD


def read_by_decode(params: Any) -> Any:
    """The parameters without those that have done their part when there is a cache: the encoder's, and the kernels of
    the memory's keys and values.

    A step that is planned without them neither holds nor moves them.
    """
    layers = params["decoder"]["layers"]
    cross = {name: x for name, x in layers["cross"].items() if name not in ("k", "v")}
    decoder = {**params["decoder"], "layers": {**layers, "cross": cross}}
    return {**{name: x for name, x in params.items() if name != "encoder"}, "decoder": decoder}


def empty_memory(config: ModelConfig, rows: int, source: int, dtype: Any) -> Cache:
    """Zeros: keys and values of a source, (layers, rows, kv heads, source, head dim), all of it padding."""
    shape = (config.decoder_layers, rows, config.kv_heads, source, config.head_dim)
    keep = jnp.zeros((rows, source), bool)
    return {"cross_keys": jnp.zeros(shape, dtype), "cross_values": jnp.zeros(shape, dtype), "keep": keep}


def _kept(memory: Memory, room_BS: jax.Array) -> jax.Array:
    """What the cache's places for a source hold: what is no padding; the source may be shorter than they are."""
    S = memory.values_BSD.shape[1]
    if room_BS.shape[1] < S:
        raise ValueError(f"a source of {S} tokens for a cache of {room_BS.shape[1]}; nearest: init_cache(source={S})")
    kept_BS = jnp.ones((room_BS.shape[0], S), bool) if memory.keep_BS is None else memory.keep_BS.astype(bool)
    return jnp.pad(kept_BS, ((0, 0), (0, room_BS.shape[1] - S)))


def bucket_bias(
    table_RN: jax.Array, L: int, M: int, position: jax.Array | None, *, both_ways: bool, distance: int
) -> jax.Array:
    """T5's relative bias, (1 or B, heads, L, M): near positions exact, far ones by logarithm.

    Bounds of the buckets are whole numbers, so that no device's logarithm puts a distance into another bucket.
    """
    buckets = table_RN.shape[0]
    before_LM = distances(L, M, position)
    first = jnp.zeros_like(before_LM)
    if both_ways:
        buckets //= 2
        first = jnp.where(before_LM < 0, buckets, 0)
        before_LM = jnp.abs(before_LM)
    before_LM = jnp.maximum(before_LM, 0)
    bucket_LM = jnp.minimum(before_LM, buckets // 2)
    for bound in bucket_bounds(buckets, distance):
        bucket_LM += (before_LM >= bound).astype(jnp.int32)
    return jnp.moveaxis(table_RN[(first + bucket_LM).reshape(-1, L, M)], -1, 1)


def bucket_bounds(buckets: int, distance: int) -> list[int]:
    """The distances at which the buckets after the first of the far ones begin.

    >>> bucket_bounds(16, 128)
    [12, 16, 23, 32, 46, 64, 91]
    """
    exact = buckets // 2
    ratio = distance / exact
    # At a whole power the bound is a whole number, which the logarithm may miss by its last bit.
    return [math.ceil(exact * ratio ** (k / (buckets - exact)) - 1e-6) for k in range(1, buckets - exact)]
