"""Shapes of large models, for timing and for compilers: no array is made.

loss, params, batch = llama_8b(scanned=False)
traced = sharding_rules.trace(loss, params, batch, names=("params", "batch"))
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def llama_8b(scanned: bool = True) -> tuple[Callable[[Any, Any], jax.Array], Any, Any]:
    """Llama-3-8B in bfloat16, batch 8 of 2048 tokens; (loss, abstract params, abstract batch)."""
    return _llama(
        scanned=scanned,
        global_batch=8,
        remat=False,
        param_dtype=jnp.bfloat16,
        vocab=128256,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        length=2048,
    )


def llama_pinning(
    batch: int = 16, length: int = 2048, layers: int = 4
) -> tuple[Callable[[Any, Any], jax.Array], Any, Any]:
    """A few scanned layers under `jax.checkpoint`, float32 parameters, bfloat16 maths, plain softmax attention."""
    return _llama(
        scanned=True,
        global_batch=batch,
        remat=True,
        param_dtype=jnp.float32,
        vocab=32768,
        embed=4096,
        layers=layers,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        length=length,
    )


def _llama(*, scanned: bool, global_batch: int, remat: bool, param_dtype: Any, **sizes: int) -> Any:
    from zoo import base, llama

    shapes = llama.Shapes(**sizes)
    init = llama.init_scanned if scanned else llama.init_unrolled
    params = jax.eval_shape(functools.partial(init, s=shapes, dtype=param_dtype), base.abstract_key())
    tokens = jax.ShapeDtypeStruct((global_batch, shapes.length), jnp.int32)

    def loss(params: Any, batch: Any) -> jax.Array:
        with jax.numpy_rank_promotion("allow"):
            return llama.forward_loss(params, batch, shapes, remat=remat, dtype=jnp.bfloat16)

    return loss, params, {"s": tokens, "t": tokens}
