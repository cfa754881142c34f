"""A GPT-2 as users write it: queries, keys and values from one kernel (D, 3D), layers in a list, tied embedding.

Shape letters: B batch, L length, D embed, N heads, H head dim, F hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax

from redco_like import attention

B, L, D, N, F, V = 32, 512, 512, 8, 2048, 4096
LAYERS = 3


def init_fn(rng):
    def normal(i, *shape):
        return 0.02 * jax.random.normal(jax.random.fold_in(rng, i), shape)

    def block(i):
        return {
            "norm_1": jnp.ones(D),
            "qkv": {"kernel": normal(4 * i, D, 3 * D), "bias": jnp.zeros(3 * D)},
            "out": {"kernel": normal(4 * i + 1, D, D), "bias": jnp.zeros(D)},
            "norm_2": jnp.ones(D),
            "up": {"kernel": normal(4 * i + 2, D, F), "bias": jnp.zeros(F)},
            "down": {"kernel": normal(4 * i + 3, F, D), "bias": jnp.zeros(D)},
        }

    blocks = [block(i) for i in range(LAYERS)]
    return {"tokens": normal(100, V, D), "positions": normal(101, L, D), "blocks": blocks, "norm": jnp.ones(D)}


def dense(x, p):
    return x @ p["kernel"] + p["bias"].astype(x.dtype)[None, None]


def layer_norm(x, scale):
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale.astype(jnp.float32)[None, None]


def loss_fn(params, batch):
    tokens_BL = batch["tokens"]
    x_BLD = params["tokens"][tokens_BL] + params["positions"][None]
    for p in params["blocks"]:
        h_BLD = layer_norm(x_BLD, p["norm_1"]).astype(x_BLD.dtype)
        q, k, v = (t.reshape(*t.shape[:2], N, D // N) for t in jnp.split(dense(h_BLD, p["qkv"]), 3, axis=-1))
        mixed_BLD = attention(q, k, v, causal=True, scale=(D // N) ** -0.5).reshape(x_BLD.shape)
        x_BLD = x_BLD + dense(mixed_BLD, p["out"])
        h_BLD = layer_norm(x_BLD, p["norm_2"]).astype(x_BLD.dtype)
        x_BLD = x_BLD + dense(jax.nn.gelu(dense(h_BLD, p["up"])), p["down"])
    logits_BLV = layer_norm(x_BLD, params["norm"]).astype(x_BLD.dtype) @ params["tokens"].T
    losses_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV.astype(jnp.float32), batch["labels"])
    return losses_BL.mean()


def get_config():
    ids = jax.ShapeDtypeStruct((B, L), jnp.int32)
    return {
        "loss_fn": loss_fn,
        "init_fn": init_fn,
        "optimizer": optax.adamw(1e-3),
        "batch": {"tokens": ids, "labels": ids},
        "fused_attention": True,
    }
