"""T5 shapes as a plain dict: encoder and decoder, cross attention, relative position bias, one embedding for both.

Shape letters: B batch, S source length, T target length, D embed, N heads, H head dim, F mlp, V vocab,
R position buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from zoo.base import ZooModel, cross_entropy, draw, g, per_layer, rms_norm, table, w

S, T, D, N, H, F, V, R = 20, 12, 32, 8, 6, 40, 56, 16
LAYERS = 2


def _buckets(relative: jax.Array, both_ways: bool) -> jax.Array:
    """T5's buckets of relative positions: near ones exact, far ones by logarithm."""
    buckets = R
    found = jnp.zeros_like(relative)
    if both_ways:
        buckets //= 2
        found = jnp.where(relative > 0, buckets, 0)
        relative = jnp.abs(relative)
    else:
        relative = jnp.maximum(-relative, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(relative, 1) / exact) / math.log(32 / exact) * (buckets - exact)
    far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
    return found + jnp.where(relative < exact, relative, far)


def _position_bias(bias_RN: jax.Array, length: int, both_ways: bool) -> jax.Array:
    relative = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    return jnp.transpose(bias_RN[_buckets(relative, both_ways)], (2, 0, 1))[None]


def _attend(p, x, memory, bias):
    B = x.shape[0]
    q = (x @ p["fee"]).reshape(B, -1, N, H)
    k = (memory @ p["die"]).reshape(B, -1, N, H)
    v = (memory @ p["pal"]).reshape(B, -1, N, H)
    s_BNTS = jnp.einsum("btnh,bsnh->bnts", q, k)
    o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s_BNTS + bias, axis=-1), v)
    return o.reshape(B, -1, N * H) @ p["cob"]


def _hidden(p, x):
    return jax.nn.relu(x @ p["rim"]) @ p["ink"]


def t5(name: str) -> ZooModel:
    """Relu hidden layer, tied head scaled by embed^-0.5, padded sources masked, targets shifted right."""
    heads = {"fee": w(D, N * H), "die": w(D, N * H), "pal": w(D, N * H), "cob": w(N * H, D)}
    hidden = {"rim": w(D, F), "ink": w(F, D)}
    encoder = {"z": g(D), "y": heads, "x": g(D), "w": hidden}
    decoder = {"n": g(D), "m": heads, "l": g(D), "k": heads, "j": g(D), "i": hidden}

    def init(rng):
        leaves = {
            "yam": table(V, D),
            "urn": {"p": [encoder] * LAYERS, "q": table(R, N), "a": g(D)},
            "elm": {"p": [decoder] * LAYERS, "q": table(R, N), "a": g(D)},
        }
        return draw(rng, leaves)

    def loss(params, batch, rng):
        del rng
        source, target = batch["s"], batch["t"]
        keep_B11S = (source > 0)[:, None, None, :]
        masked = jnp.where(keep_B11S, 0.0, -1e9)

        enc = params["urn"]
        bias = _position_bias(enc["q"], source.shape[1], True) + masked
        x = params["yam"][source]
        for p in enc["p"]:
            h = rms_norm(x, p["z"])
            x = x + _attend(p["y"], h, h, bias)
            x = x + _hidden(p["w"], rms_norm(x, p["x"]))
        memory = rms_norm(x, enc["a"])

        dec = params["elm"]
        causal = jnp.triu(jnp.full((target.shape[1],) * 2, -1e9), 1)[None, None]
        bias = _position_bias(dec["q"], target.shape[1], False) + causal
        shifted = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))
        x = params["yam"][shifted]
        for p in dec["p"]:
            h = rms_norm(x, p["n"])
            x = x + _attend(p["m"], h, h, bias)
            x = x + _attend(p["k"], rms_norm(x, p["l"]), memory, masked)
            x = x + _hidden(p["i"], rms_norm(x, p["j"]))
        logits = rms_norm(x, dec["a"]) * D**-0.5 @ params["yam"].T
        return cross_entropy(logits, target)

    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        source = rng.integers(1, V, (global_batch, S)).astype(np.int32)
        source[np.arange(S)[None] >= rng.integers(S // 2, S + 1, (global_batch, 1))] = 0
        return {"s": source, "t": rng.integers(1, V, (global_batch, T)).astype(np.int32)}

    def spread(prefix_attention, prefix_hidden, norms, attention, hidden_dims, norm):
        return {
            **{f"{a}/{k}": v for a in prefix_attention for k, v in attention.items()},
            **{f"{prefix_hidden}/{k}": v for k, v in hidden_dims.items()},
            **dict.fromkeys(norms, norm),
        }

    roles = (
        {**dict.fromkeys(("fee", "die", "pal"), ("embed", "heads*head_dim")), "cob": ("heads*head_dim", "embed")},
        {"rim": ("embed", "mlp"), "ink": ("mlp", "embed")},
        ("embed",),
    )
    specs = (
        {**dict.fromkeys(("fee", "die", "pal"), (None, "tensor")), "cob": ("tensor", None)},
        {"rim": (None, "tensor"), "ink": ("tensor", None)},
        (None,),
    )

    def whole(parts, vocab, position, norm):
        return {
            "yam": vocab,
            "urn/q": position,
            "elm/q": position,
            "urn/a": norm,
            "elm/a": norm,
            **per_layer(spread(("y",), "w", ("z", "x"), *parts), "urn/p", LAYERS),
            **per_layer(spread(("m", "k"), "i", ("n", "l", "j"), *parts), "elm/p", LAYERS),
        }

    return ZooModel(
        name,
        init,
        loss,
        make_batch,
        expected_roles=whole(roles, ("vocab", "embed"), (None, "heads"), ("embed",)),
        megatron=whole(specs, ("tensor", None), (None, "tensor"), (None,)),
        notes="the bias table joins the heads of every layer of its side; the embedding joins encoder and decoder",
    )
