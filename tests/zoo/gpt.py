"""GPT-2 and OPT shapes as plain dicts.

Shape letters: B batch, L length, D embed, N heads, H head dim, F mlp, V vocab.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zoo.base import ZooModel, b, cross_entropy, draw, g, layer_norm, per_layer, table, tokens, w

L, D, N, H, F, V = 12, 32, 8, 4, 48, 64
LAYERS = 2


def causal_attention(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array) -> jax.Array:
    """Softmax attention where each position sees itself and what is before it."""
    length = q_BLNH.shape[1]
    s_BNLM = jnp.einsum("blnh,bmnh->bnlm", q_BLNH, k_BLNH) * q_BLNH.shape[-1] ** -0.5
    mask_LM = jnp.tril(jnp.ones((length, length), bool))
    s_BNLM = jnp.where(mask_LM, s_BNLM, jnp.finfo(s_BNLM.dtype).min)
    return jnp.einsum("bnlm,bmnh->blnh", jax.nn.softmax(s_BNLM, axis=-1), v_BLNH)


def _dropout(key: jax.Array, x: jax.Array, rate: float = 0.1) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def gpt2(name: str) -> ZooModel:
    """Fused QKV as (d, 3d) cut by `jnp.split`, learned positions, tied embedding, dropout, tokens shifted inside."""
    block = {
        "yy": g(D),
        "bb": b(D),
        "foo": w(D, 3 * D),
        "oof": b(3 * D),
        "bar": w(D, D),
        "rab": b(D),
        "xx": g(D),
        "cc": b(D),
        "qux": w(D, F),
        "xuq": b(F),
        "baz": w(F, D),
        "zab": b(D),
    }

    def init(rng):
        layers = [block] * LAYERS
        return draw(rng, {"w": table(V, D), "e": table(L, D), "h": layers, "b": g(D), "a": b(D)})

    def layer(x, p, rng):
        key_1, key_2 = jax.random.split(rng)
        h = layer_norm(x, p["yy"], p["bb"]) @ p["foo"] + p["oof"]
        q, k, v = (t.reshape(*t.shape[:2], N, H) for t in jnp.split(h, 3, axis=-1))
        o = causal_attention(q, k, v).reshape(x.shape)
        x = x + _dropout(key_1, o @ p["bar"] + p["rab"])
        h = jax.nn.gelu(layer_norm(x, p["xx"], p["cc"]) @ p["qux"] + p["xuq"])
        return x + _dropout(key_2, h @ p["baz"] + p["zab"])

    def loss(params, batch, rng):
        inputs, labels = batch["s"][:, :-1], batch["s"][:, 1:]
        x = params["w"][inputs] + params["e"][jnp.arange(inputs.shape[1])]
        for i, p in enumerate(params["h"]):
            x = layer(x, p, jax.random.fold_in(rng, i))
        logits = layer_norm(x, params["b"], params["a"]) @ params["w"].T
        return cross_entropy(logits, labels)

    roles = {
        "yy": ("embed",),
        "foo": ("embed", None),
        "bar": ("heads*head_dim", "embed"),
        "rab": ("embed",),
        "xx": ("embed",),
        "qux": ("embed", "mlp"),
        "xuq": ("mlp",),
        "baz": ("mlp", "embed"),
        "zab": ("embed",),
    }
    megatron = {
        **{k: (None,) for k in ("yy", "bb", "xx", "cc", "rab", "zab")},
        "foo": (None, "tensor"),
        "oof": ("tensor",),
        "bar": ("tensor", None),
        "qux": (None, "tensor"),
        "xuq": ("tensor",),
        "baz": ("tensor", None),
    }
    return ZooModel(
        name,
        init,
        loss,
        tokens(V, L + 1, "s"),
        expected_roles={
            "w": ("vocab", "embed"),
            "e": (None, "embed"),
            "b": ("embed",),
            "a": ("embed",),
            **per_layer(roles, "h", LAYERS),
        },
        megatron={
            "w": ("tensor", None),
            "e": (None, None),
            "b": (None,),
            "a": (None,),
            **per_layer(megatron, "h", LAYERS),
        },
        notes="fused QKV is three segments; tied embedding; dropout; the batch has one token more than the length",
    )


def gpt2_reshaped(name: str) -> ZooModel:
    """Fused QKV reshaped to (3, heads, head_dim), layers scanned, embedding tied."""
    block = {
        "ne": g(D),
        "en": b(D),
        "wo": w(D, 3 * D),
        "ow": b(3 * D),
        "du": w(D, D),
        "ud": b(D),
        "mi": g(D),
        "im": b(D),
        "ta": w(D, F),
        "at": b(F),
        "be": w(F, D),
        "eb": b(D),
    }

    def init(rng):
        layers = jax.vmap(lambda key: draw(key, block))(jax.random.split(rng, LAYERS))
        top = draw(jax.random.fold_in(rng, 1), {"k": table(V, D), "j": table(L, D), "d": g(D), "f": b(D)})
        return {"a": layers, **top}

    def layer(x, p):
        h = layer_norm(x, p["ne"], p["en"]) @ p["wo"] + p["ow"]
        h = h.reshape(*x.shape[:2], 3, N, H)
        o = causal_attention(h[:, :, 0], h[:, :, 1], h[:, :, 2]).reshape(x.shape)
        x = x + o @ p["du"] + p["ud"]
        h = jax.nn.gelu(layer_norm(x, p["mi"], p["im"]) @ p["ta"] + p["at"])
        return x + h @ p["be"] + p["eb"], None

    def loss(params, batch, rng):
        del rng
        x = jnp.take(params["k"], batch["s"], axis=0) + params["j"]
        x, _ = jax.lax.scan(layer, x, params["a"])
        logits = jnp.einsum("bld,vd->blv", layer_norm(x, params["d"], params["f"]), params["k"])
        return cross_entropy(logits, batch["t"])

    return ZooModel(
        name,
        init,
        loss,
        tokens(V, L, "s", "t"),
        expected_roles={
            "k": ("vocab", "embed"),
            "j": (None, "embed"),
            "a/ne": ("layers", "embed"),
            "a/wo": ("layers", "embed", None),
            "a/du": ("layers", "heads*head_dim", "embed"),
            "a/ta": ("layers", "embed", "mlp"),
            "a/be": ("layers", "mlp", "embed"),
        },
        megatron={
            "k": ("tensor", None),
            "j": (None, None),
            "d": (None,),
            "f": (None,),
            **{f"a/{k}": (None, None) for k in ("ne", "en", "ud", "mi", "im", "eb")},
            "a/du": (None, "tensor", None),
            "a/ta": (None, None, "tensor"),
            "a/at": (None, "tensor"),
            "a/be": (None, "tensor", None),
        },
        notes="the 3 of QKV is the major factor of the fused dimension: 96 = 3 * heads * head_dim",
    )


def opt(name: str) -> ZooModel:
    """OPT: separate q, k, v, out with biases, relu, learned positions, norm before each block, a padding mask."""
    block = {
        "u1": g(D),
        "u0": b(D),
        "zig": {"a": w(D, D), "b": b(D)},
        "nag": {"a": w(D, D), "b": b(D)},
        "dog": {"a": w(D, D), "b": b(D)},
        "cat": {"a": w(D, D), "b": b(D)},
        "t1": g(D),
        "t0": b(D),
        "sun": {"a": w(D, F), "b": b(F)},
        "fog": {"a": w(F, D), "b": b(D)},
    }

    def init(rng):
        return draw(rng, {"v": table(V, D), "o": table(L + 2, D), "l": [block] * LAYERS, "h": g(D), "c": b(D)})

    def dense(x, p):
        return x @ p["a"] + p["b"]

    def layer(x, p, bias_B1LM):
        h = layer_norm(x, p["u1"], p["u0"])
        q, k, v = (dense(h, p[n]).reshape(*x.shape[:2], N, H) for n in ("zig", "nag", "dog"))
        s_BNLM = jnp.einsum("blnh,bmnh->bnlm", q * H**-0.5, k) + bias_B1LM
        o = jnp.einsum("bnlm,bmnh->blnh", jax.nn.softmax(s_BNLM), v).reshape(x.shape)
        x = x + dense(o, p["cat"])
        h = jax.nn.relu(dense(layer_norm(x, p["t1"], p["t0"]), p["sun"]))
        return x + dense(h, p["fog"])

    def loss(params, batch, rng):
        del rng
        mask = batch["m"]
        positions = jnp.cumsum(mask, axis=1) * mask + 1
        x = params["v"][batch["s"]] + params["o"][positions]
        causal = jnp.tril(jnp.ones((L, L), bool))[None, None]
        bias = jnp.where(causal & (mask[:, None, None, :] > 0), 0.0, -1e9)
        for p in params["l"]:
            x = layer(x, p, bias)
        logits = layer_norm(x, params["h"], params["c"]) @ params["v"].T
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch["t"][..., None], axis=-1)[..., 0]
        return jnp.sum(nll * mask) / jnp.sum(mask)

    def make_batch(rng, global_batch):
        batch = tokens(V, L, "s", "t")(rng, global_batch)
        lengths = rng.integers(L // 2, L + 1, (global_batch, 1))
        return {**batch, "m": (np.arange(L)[None] < lengths).astype(np.int32)}

    column = {"a": (None, "tensor"), "b": ("tensor",)}
    row = {"a": ("tensor", None), "b": (None,)}
    megatron = {
        **{k: (None,) for k in ("u1", "u0", "t1", "t0")},
        **{f"{m}/{k}": v for m in ("zig", "nag", "dog", "sun") for k, v in column.items()},
        **{f"{m}/{k}": v for m in ("cat", "fog") for k, v in row.items()},
    }
    roles = {
        "u1": ("embed",),
        **{f"{m}/a": ("embed", "heads*head_dim") for m in ("zig", "nag", "dog")},
        **{f"{m}/b": ("heads*head_dim",) for m in ("zig", "nag", "dog")},
        "cat/a": ("heads*head_dim", "embed"),
        "cat/b": ("embed",),
        "sun/a": ("embed", "mlp"),
        "sun/b": ("mlp",),
        "fog/a": ("mlp", "embed"),
    }
    return ZooModel(
        name,
        init,
        loss,
        make_batch,
        expected_roles={
            "v": ("vocab", "embed"),
            "o": (None, "embed"),
            "h": ("embed",),
            **per_layer(roles, "l", LAYERS),
        },
        megatron={
            "v": ("tensor", None),
            "o": (None, None),
            "h": (None,),
            "c": (None,),
            **per_layer(megatron, "l", LAYERS),
        },
        notes="positions are looked up from a cumulative sum of the mask, as OPT does; heads equal the batch (8)",
    )
