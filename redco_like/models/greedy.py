"""What an encoder-decoder writes for a source, one token after the other, each the likeliest.

tokens = jax.jit(functools.partial(greedy, model, max_tokens=64, eos=1))(params, source, mask)

Shape letters: B batch, S source length, L tokens before the first that is written, T tokens that are written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from redco_like.models.model import Model


def greedy(
    model: Model,
    params: Any,
    source_BS: jax.Array,
    mask_BS: jax.Array | None = None,
    *,
    max_tokens: int,
    eos: int | None = None,
    prompt_BL: jax.Array | None = None,
) -> jax.Array:
    """Write up to `max_tokens` tokens for each source, or up to its end: pure, to be compiled as a whole.

    Args:
        mask_BS: what of the source is no padding; None for all.
        eos: the token that ends a row; None for rows of `max_tokens` tokens.
        prompt_BL: what the decoder begins with, such as a language; None for the start token.

    Returns:
        (B, T) tokens, that of the end included; behind it -1.

    Raises:
        ValueError: a model that is no encoder-decoder, no tokens, or more than a table of positions has.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}; it is at least 1")
    memory = model.encode(params, source_BS, mask_BS)
    B, S = source_BS.shape
    if prompt_BL is None:
        prompt_BL = jnp.full((B, 1), model.config.start_token, jnp.int32)
    L = prompt_BL.shape[1]
    cache = model.init_cache(B, L + max_tokens - 1, source=S)
    logits_B1V, cache = model.prefill(params, prompt_BL, cache, memory)
    none_BT = jnp.full((B, max_tokens), -1, jnp.int32)

    def write(written_BT: jax.Array, step: jax.Array, logits_B1V: jax.Array, ended_B: jax.Array) -> Any:
        token_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        column_B1 = jnp.where(ended_B, -1, token_B)[:, None]
        written_BT = jax.lax.dynamic_update_slice(written_BT, column_B1, (jnp.int32(0), step))
        return written_BT, step + 1, token_B, ended_B if eos is None else ended_B | (token_B == eos)

    def unfinished(state: Any) -> jax.Array:
        (_, step, _, ended_B), _ = state
        return (step < max_tokens) & ~ended_B.all()

    def another(state: Any) -> Any:
        (written_BT, step, token_B, ended_B), cache = state
        logits_B1V, cache = model.decode(params, token_B[:, None], cache, step + (L - 1))
        return write(written_BT, step, logits_B1V, ended_B), cache

    first = write(none_BT, jnp.int32(0), logits_B1V, jnp.zeros(B, bool))
    (written_BT, *_), _ = jax.lax.while_loop(unfinished, another, (first, cache))
    return written_BT
