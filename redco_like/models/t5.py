"""T5: an encoder, a decoder that attends to it, and one table of relative positions for each.

Shape letters as in `attention`; S source length, R buckets.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from redco_like.models.attention import Attention, Context, PerLayer, bucket_bias
from redco_like.models.config import ModelConfig
from redco_like.models.layers import Hidden, dense, norm, normal


class T5Block(nn.Module):
    """One layer of the encoder, or of the decoder where it is given the encoder's output."""

    config: ModelConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, memory: tuple[jax.Array, Context] | None
    ) -> tuple[jax.Array, None]:
        c, dtype = self.config, self.dtype
        h_BLD = norm(c, dtype, "attention_norm")(x_BLD)
        x_BLD += Attention(c, dtype, self.causal, name="attention")(h_BLD, context, PerLayer())[0]
        if memory is not None:
            memory_BSD, beyond = memory
            h_BLD = norm(c, dtype, "cross_norm")(x_BLD)
            x_BLD += Attention(c, dtype, False, name="cross")(h_BLD, beyond, PerLayer(), None, memory_BSD)[0]
        h_BLD = norm(c, dtype, "mlp_norm")(x_BLD)
        return x_BLD + Hidden(c, c.mlp, dtype, name="mlp")(h_BLD), None


class T5Stack(nn.Module):
    """Layers in one scan, under one relative bias, and a norm."""

    config: ModelConfig
    dtype: Any
    layers: int
    causal: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, keep_BL: jax.Array | None = None, memory: tuple[jax.Array, Context] | None = None
    ) -> jax.Array:
        c, L = self.config, x_BLD.shape[1]
        table_RN = self.param("buckets", normal, (c.buckets, c.heads)).astype(self.dtype)
        bias_1NLM = bucket_bias(
            table_RN, L, L, both_ways=not self.causal, buckets=c.buckets, distance=c.bucket_distance
        )
        stack = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.layers,
        )(c, self.dtype, self.causal, name="layers")
        x_BLD, _ = stack(x_BLD, Context(bias_1NLM=bias_1NLM, keep_BM=keep_BL), memory)
        return norm(c, self.dtype, "norm")(x_BLD)


class T5(nn.Module):
    """Source ids (B, S) and the decoder's input ids (B, L) to logits (B, L, V)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, source_BS: jax.Array, tokens_BL: jax.Array, keep_BS: jax.Array | None = None) -> jax.Array:
        c = self.config
        table_VD = self.param("embed", normal, (c.vocab, c.embed)).astype(self.dtype)
        memory_BSD = T5Stack(c, self.dtype, c.layers, False, name="encoder")(table_VD[source_BS], keep_BS)
        decoder = T5Stack(c, self.dtype, c.decoder_layers, True, name="decoder")
        x_BLD = decoder(table_VD[tokens_BL], None, (memory_BSD, Context(keep_BM=keep_BS)))
        if not c.tied:
            return dense(c.vocab, "head", False, self.dtype)(x_BLD)
        return jnp.einsum("bld,vd->blv", x_BLD * jnp.asarray(c.embed**-0.5, self.dtype), table_VD)
