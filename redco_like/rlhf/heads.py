"""A number for every token of any decoder: the head of critics and reward models.

    params = init_head(model, jax.random.key(0), sft_params)     # {"model": ..., "head": {"kernel", "bias"}}
    values_BL = token_values(model, params, tokens_BL)

The head reads the hidden states after the last norm, in place of the kernel that makes logits, which is left out. As
all parameters here, it has no names of axes: the planner sees what it is from how it is used.

Shape letters as in `algorithm`; D embed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from redco_like.models.model import Model

UNUSED = ("head", "embed_out")
"""Kernels of a decoder that only logits need."""


def init_head(model: Model, rng: jax.Array, params: Any = None) -> dict[str, Any]:
    """Parameters of a model with a head of zeros: every value is 0 until it is trained.

    Args:
        model: a decoder.
        rng: a key, for a model that is drawn.
        params: to start from, such as the fine-tuned model's; not copied. None: drawn.
    """
    params = model.init_fn(rng) if params is None else params
    kept = {name: value for name, value in params.items() if name not in UNUSED}
    return {"model": kept, "head": {"kernel": jnp.zeros((model.config.embed, 1)), "bias": jnp.zeros((1,))}}


def token_values(model: Model, params: Any, tokens_BL: jax.Array) -> jax.Array:
    """The head's number at every token (B, L), in float32: of what stands up to it and with it."""
    hidden_BLD = model.hidden(params["model"], tokens_BL)
    kernel_D1 = params["head"]["kernel"].astype(hidden_BLD.dtype)
    values_BL1 = jnp.einsum("bld,do->blo", hidden_BLD, kernel_D1).astype(jnp.float32)
    return (values_BL1 + params["head"]["bias"].astype(jnp.float32)[None, None])[..., 0]


def sequence_scores(model: Model, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """The head's number at the last token of each sequence (B,), picked by a sum: an index would gather."""
    values_BL = token_values(model, params, batch["tokens"])
    place_1L = jnp.arange(values_BL.shape[1], dtype=jnp.int32)[None]
    return jnp.where(place_1L == batch["last"][:, None], values_BL, 0.0).sum(-1)


def score_values(model: Model) -> Callable[..., jax.Array]:
    """What a critic does: the value of what stands before each token of a completion (B, L), 0 elsewhere."""

    def pred_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
        return token_values(model, params, batch["tokens"]) * batch["mask"]

    return pred_fn


def score_rewards(model: Model) -> Callable[..., jax.Array]:
    """What a reward model does: a number for each sequence (B,)."""

    def pred_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
        return sequence_scores(model, params, batch)

    return pred_fn
