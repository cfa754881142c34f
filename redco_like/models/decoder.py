"""Decoders: a stack of layers in one scan, for training, for reading a prompt and for one token after the other.

    module = Decoder(config, "bfloat16")
    logits, cache, balance = module.apply({"params": params}, tokens)

Shape letters as in `attention`; V vocab.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from redco_like.models.attention import EVERYTHING, Attention, Cache, Context, LatentAttention, PerLayer
from redco_like.models.config import ModelConfig
from redco_like.models.layers import Hidden, Mixture, dense, learned_positions, norm, normal
from redco_like.models.rotary import rotary


class Block(nn.Module):
    """One layer; returns the carry (activations, cache), the balance loss of its experts, and what it adds.

    What is added is for the cache where the context holds that; else the carry has it, and it is None.
    """

    config: ModelConfig
    dtype: Any
    dense_mlp: bool = False
    causal: bool = True
    reach: int | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: PerLayer, context: Context
    ) -> tuple[tuple[jax.Array, Cache | None], tuple[jax.Array, Cache | None]]:
        c = self.config
        x_BLD, cache = carry

        def attention(x: jax.Array) -> jax.Array:
            nonlocal cache
            if c.latent is not None:
                y, cache = LatentAttention(c, c.latent, self.dtype, self.reach, name="attention")(
                    x, context, layer, cache
                )
            else:
                y, cache = Attention(c, self.dtype, self.causal, self.reach, name="attention")(x, context, layer, cache)
            return y

        def hidden(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            if c.experts is not None and not self.dense_mlp:
                return Mixture(c, c.experts, self.dtype, name="mlp")(x)
            return Hidden(c, c.mlp, self.dtype, name="mlp")(x), jnp.float32(0)

        def normed(name: str, x: jax.Array) -> jax.Array:
            return norm(c, self.dtype, name)(x)

        match c.block:
            case "post":
                x_BLD = normed("attention_norm", x_BLD + attention(x_BLD))
                y_BLD, balance = hidden(x_BLD)
                x_BLD = normed("mlp_norm", x_BLD + y_BLD)
            case "sandwich":
                x_BLD += normed("attention_out_norm", attention(normed("attention_norm", x_BLD)))
                y_BLD, balance = hidden(normed("mlp_norm", x_BLD))
                x_BLD += normed("mlp_out_norm", y_BLD)
            case "parallel" | "parallel_one_norm":
                h_BLD = normed("attention_norm", x_BLD)
                y_BLD, balance = hidden(h_BLD if c.block == "parallel_one_norm" else normed("mlp_norm", x_BLD))
                x_BLD += attention(h_BLD) + y_BLD
            case _:
                x_BLD += attention(normed("attention_norm", x_BLD))
                y_BLD, balance = hidden(normed("mlp_norm", x_BLD))
                x_BLD += y_BLD
        return ((x_BLD, cache), (balance, None)) if context.held is None else ((x_BLD, None), (balance, cache))


class Layers(nn.Module):
    """All layers of a model: `dense_layers` first, where these differ, then `layers`, each stack traced once.

    Unrolled, every layer is traced, and has parameters of its own (`unroll`).
    """

    config: ModelConfig
    dtype: Any
    causal: bool = True
    reach: int | None = None
    unrolled: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, jax.Array]:
        c = self.config
        windows = np.array([window or EVERYTHING for window in c.windows], np.int32)
        balance = jnp.float32(0)
        added: list[Cache] = []
        stacks = [("dense_layers", 0, c.dense_layers)] if c.dense_layers else []
        stacks += [("layers", c.dense_layers, c.layers)]
        if self.unrolled:
            for name, index in [(name, i) for name, start, stop in stacks for i in range(start, stop)]:
                # 0, but not before the layer before is done: else all layers' parts of the cache are read at once.
                first = x_BLD[0, 0, 0]
                after = ((first > 1) & (first < 1)).astype(jnp.int32)
                layer = PerLayer(index + after, jnp.int32(windows[index]) if c.windows else None)
                place = f"{name}_{index - (0 if name == 'dense_layers' else c.dense_layers)}"
                block = Block(c, self.dtype, name == "dense_layers", self.causal, self.reach, name=place)
                (x_BLD, cache), (loss, new) = block((x_BLD, cache), layer, context)
                added += [] if new is None else [jax.tree.map(lambda x: x[None], new)]
                balance += loss
            stacks = []
        for name, start, stop in stacks:
            layer = PerLayer(
                None if cache is None and context.held is None else jnp.arange(start, stop, dtype=jnp.int32),
                jnp.asarray(windows[start:stop]) if c.windows else None,
            )
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=stop - start,
            )(c, self.dtype, name == "dense_layers", self.causal, self.reach, name=name)
            (x_BLD, cache), (losses, new) = stack((x_BLD, cache), layer, context)
            added += [] if new is None else [new]
            balance += losses.sum()
        if added:
            cache = added[0] if len(added) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *added)
        return x_BLD, cache, balance


def unroll(params: Any) -> Any:
    """Parameters of a decoder, taken apart for one that is unrolled: a layer each in place of their stacks.

    The CPU backend copies the part of a stack that a loop over layers reads, and that is all that a step of decoding
    does: unrolled, it takes a third of the time (124 M parameters, one row, 2 cores).
    """
    stacks = {}
    for name, stack in params["stack"].items():
        for i in range(jax.tree.leaves(stack)[0].shape[0]):
            stacks[f"{name}_{i}"] = jax.tree.map(lambda x, i=i: x[i], stack)
    return {**params, "stack": stacks}


class Decoder(nn.Module):
    """Token ids (B, L) to logits (B, L, V), the cache and the balance loss.

    With a cache and no position the tokens are a prompt, and only the last token's logits are made: (B, 1, V). With
    `last_B` these are the logits of the token of that index in each row. Where rows have positions of their own (B,),
    the cache is only read, and instead of it comes what it gets for these tokens. With `hidden` what logits would be
    made of comes in their place: (B, L, D), after the last norm.
    """

    config: ModelConfig
    dtype: Any
    unrolled: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        cache: Cache | None = None,
        position: jax.Array | None = None,
        last_B: jax.Array | None = None,
        reach: int | None = None,
        longest: int | None = None,
        hidden: bool = False,
    ) -> tuple[jax.Array, Cache | None, jax.Array]:
        c = self.config
        L = tokens_BL.shape[1]
        table_VD = self.param("embed", normal, (c.vocab, c.token_width or c.embed)).astype(self.dtype)
        x_BLD = table_VD[tokens_BL]
        if c.token_width:
            x_BLD = dense(c.embed, "embed_in", False, self.dtype)(x_BLD)
        if c.embed_scale:
            x_BLD *= jnp.asarray(c.embed**0.5, self.dtype)
        if c.position == "learned":
            table_PD = self.param("positions", normal, (c.max_length + c.position_offset, c.embed)).astype(self.dtype)
            x_BLD += learned_positions(table_PD, L, position, c.position_offset)
        turn = near = None
        if c.position == "rotary":
            # Of a cache, how much it can hold: what is written to it is turned once.
            held = L if cache is None else jax.tree.leaves(cache)[0].shape[-2]
            room = held if longest is None else longest
            turn = rotary(c, L, position, longest=room, near=bool(c.window) and not c.windows)
            near = rotary(c, L, position, longest=room, near=True) if c.local_theta and c.windows else None
        layers = Layers(c, self.dtype, reach=reach, unrolled=self.unrolled, name="stack")
        if cache is not None and position is not None and position.ndim:
            context = Context(turn=turn, near=near, position=position, held=cache)
            x_BLD, cache, balance = layers(x_BLD, context)
        else:
            x_BLD, cache, balance = layers(x_BLD, Context(turn=turn, near=near, position=position), cache)
        if last_B is not None:
            x_BLD = jax.vmap(lambda x_LD, last: jax.lax.dynamic_slice_in_dim(x_LD, last, 1))(x_BLD, last_B)
        elif cache is not None and position is None:
            x_BLD = x_BLD[:, -1:]
        if c.final_norm:
            x_BLD = norm(c, self.dtype, "norm")(x_BLD)
        if hidden:
            return x_BLD, cache, balance
        if c.token_width:
            x_BLD = dense(c.token_width, "embed_out", False, self.dtype)(x_BLD)
        if c.tied:
            logits_BLV = jnp.einsum("bld,vd->blv", x_BLD, table_VD)
        else:
            logits_BLV = dense(c.vocab, "head", c.head_bias, self.dtype)(x_BLD)
        if c.logit_softcap:
            logits_BLV = c.logit_softcap * jnp.tanh(logits_BLV / c.logit_softcap)
        return logits_BLV, cache, balance
