"""Encoders: BERT, which guesses masked tokens, and ViT, which classifies images.

Shape letters: B batch, L length, D embed, V vocab, P positions, S image side, C channels or classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from redco_like.models.attention import Context
from redco_like.models.config import ModelConfig
from redco_like.models.decoder import Layers
from redco_like.models.layers import activate, dense, norm, normal


class Bert(nn.Module):
    """Token ids (B, L) to logits (B, L, V) of the masked-token head, which shares the embedding."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens_BL: jax.Array, types_BL: jax.Array | None = None, keep_BL: jax.Array | None = None
    ) -> jax.Array:
        c = self.config
        table_VD = self.param("embed", normal, (c.vocab, c.embed)).astype(self.dtype)
        table_PD = self.param("positions", normal, (c.max_length, c.embed)).astype(self.dtype)
        x_BLD = table_VD[tokens_BL] + table_PD[None, : tokens_BL.shape[1]]
        if c.types:
            types_TD = self.param("types", normal, (c.types, c.embed)).astype(self.dtype)
            x_BLD += types_TD[:1][None] if types_BL is None else types_TD[types_BL]
        x_BLD = norm(c, self.dtype, "embed_norm")(x_BLD)
        x_BLD, _, _ = Layers(c, self.dtype, causal=False, name="stack")(x_BLD, Context(keep_BM=keep_BL))
        h_BLD = activate(c.activation, dense(c.embed, "transform", True, self.dtype)(x_BLD))
        h_BLD = norm(c, self.dtype, "transform_norm")(h_BLD)
        bias_V = self.param("head_bias", nn.initializers.zeros, (c.vocab,)).astype(self.dtype)
        return jnp.einsum("bld,vd->blv", h_BLD, table_VD) + bias_V[None, None]


class Vit(nn.Module):
    """Images (B, S, S, channels) to logits (B, classes), read from the class token."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, images_BSSC: jax.Array) -> jax.Array:
        c = self.config
        window = (c.patch, c.patch)
        patches = nn.Conv(
            c.embed, window, window, padding="VALID", dtype=self.dtype, kernel_init=normal, name="patches"
        )
        x_BLD = patches(images_BSSC.astype(self.dtype))
        B = x_BLD.shape[0]
        x_BLD = x_BLD.reshape(B, -1, c.embed)
        first_11D = self.param("class_token", normal, (1, 1, c.embed)).astype(self.dtype)
        x_BLD = jnp.concatenate([jnp.broadcast_to(first_11D, (B, 1, c.embed)), x_BLD], axis=1)
        x_BLD += self.param("positions", normal, (1, *x_BLD.shape[1:])).astype(self.dtype)
        x_BLD, _, _ = Layers(c, self.dtype, causal=False, name="stack")(x_BLD, Context())
        x_BD = norm(c, self.dtype, "norm")(x_BLD[:, 0])
        return dense(c.classes, "head", True, self.dtype)(x_BD)
