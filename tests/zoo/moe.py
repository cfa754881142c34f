"""Mixtures of experts, top 2 of 8, by one-hot dispatch and by sorting with `ragged_dot`; and an LSTM.

Shape letters: B batch, L length, T = B * L tokens, D embed, E experts, C capacity, F mlp, J = 2 choices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.base import ZooModel, cross_entropy, draw, g, per_layer, rms_norm, table, tokens, w
from zoo.gpt import causal_attention

L, D, N, H, E, F, V, J = 12, 32, 4, 8, 8, 48, 64, 2
LAYERS = 2


def _one_hot(p, x_BLD):
    """GShard: each row of the batch is a group, each expert takes at most C tokens of it."""
    length = x_BLD.shape[1]
    capacity = 2 * J * length // E
    gates_BLE = jax.nn.softmax(x_BLD @ p["r"], axis=-1)
    top_BLJ, index_BLJ = jax.lax.top_k(gates_BLE, J)
    top_BLJ = top_BLJ / top_BLJ.sum(-1, keepdims=True)
    chosen_BLJE = jax.nn.one_hot(index_BLJ, E)
    # First choices of all tokens get their place before second ones.
    order = jnp.cumsum(chosen_BLJE.swapaxes(1, 2).reshape(-1, J * length, E), axis=1)
    place_BLJE = order.reshape(-1, J, length, E).swapaxes(1, 2) * chosen_BLJE - 1
    slot_BLJEC = jax.nn.one_hot(place_BLJE.astype(jnp.int32), capacity)
    combine_BLEC = jnp.einsum("blj,bljec->blec", top_BLJ, slot_BLJEC)
    dispatch_BLEC = (combine_BLEC > 0).astype(x_BLD.dtype)
    h_EBCD = jnp.einsum("blec,bld->ebcd", dispatch_BLEC, x_BLD)
    h = jax.nn.silu(jnp.einsum("ebcd,edf->ebcf", h_EBCD, p["s"])) * jnp.einsum("ebcd,edf->ebcf", h_EBCD, p["a"])
    h_EBCD = jnp.einsum("ebcf,efd->ebcd", h, p["k"])
    y_BLD = jnp.einsum("blec,ebcd->bld", combine_BLEC, h_EBCD)
    # Load balancing of the Switch transformer.
    balance = E * jnp.sum(chosen_BLJE.mean((0, 1, 2)) * gates_BLE.mean((0, 1)))
    return y_BLD, balance


def _sorted(p, x_BLD):
    """Megablocks: tokens are sorted by expert and multiplied in groups; none is dropped."""
    x_TD = x_BLD.reshape(-1, D)
    gates_TE = jax.nn.softmax(x_TD @ p["r"], axis=-1)
    top_TJ, index_TJ = jax.lax.top_k(gates_TE, J)
    expert = index_TJ.reshape(-1)
    order = jnp.argsort(expert)
    counts = jnp.bincount(expert, length=E)
    h = x_TD[order // J]
    h = jax.nn.silu(jax.lax.ragged_dot(h, p["s"], counts)) * jax.lax.ragged_dot(h, p["a"], counts)
    h = jax.lax.ragged_dot(h, p["k"], counts)
    y = jnp.zeros_like(h).at[order].set(h).reshape(-1, J, D)
    y_TD = jnp.einsum("tj,tjd->td", top_TJ / top_TJ.sum(-1, keepdims=True), y)
    return y_TD.reshape(x_BLD.shape), E * jnp.sum(counts / expert.shape[0] * gates_TE.mean(0))


def _model(name: str, experts: Any, notes: str) -> ZooModel:
    block = {
        "o": g(D),
        "h": {"n": w(D, N * H), "b": w(D, N * H), "z": w(D, N * H), "c": w(N * H, D)},
        "e": g(D),
        "b": {"r": w(D, E), "s": w(E, D, F), "a": w(E, D, F), "k": w(E, F, D)},
    }

    def init(rng):
        return draw(rng, {"t": table(V, D), "l": [block] * LAYERS, "q": g(D), "f": w(D, V)})

    def loss(params, batch, rng):
        del rng
        x = params["t"][batch["s"]]
        total = 0.0
        for p in params["l"]:
            h = rms_norm(x, p["o"])
            q, k, v = ((h @ p["h"][m]).reshape(*h.shape[:2], N, H) for m in ("n", "b", "z"))
            x = x + causal_attention(q, k, v).reshape(*h.shape[:2], N * H) @ p["h"]["c"]
            y, balance = experts(p["b"], rms_norm(x, p["e"]))
            x, total = x + y, total + balance
        return cross_entropy(rms_norm(x, params["q"]) @ params["f"], batch["t"]) + 0.01 * total

    roles = {
        **dict.fromkeys(("h/n", "h/b", "h/z"), ("embed", "heads*head_dim")),
        "h/c": ("heads*head_dim", "embed"),
        "b/r": ("embed", "expert"),
        "b/s": ("expert", "embed", "mlp"),
        "b/a": ("expert", "embed", "mlp"),
        "b/k": ("expert", "mlp", "embed"),
    }
    specs = {
        **dict.fromkeys(("h/n", "h/b", "h/z"), (None, "tensor")),
        "h/c": ("tensor", None),
        "b/s": (None, None, "tensor"),
        "b/a": (None, None, "tensor"),
        "b/k": (None, "tensor", None),
    }
    return ZooModel(
        name,
        init,
        loss,
        tokens(V, L, "s", "t"),
        expected_roles={"t": ("vocab", "embed"), "f": ("embed", "vocab"), **per_layer(roles, "l", LAYERS)},
        megatron={"t": ("tensor", None), "f": (None, "tensor"), **per_layer(specs, "l", LAYERS)},
        notes=notes,
    )


def one_hot(name: str) -> ZooModel:
    """Top-2 router, dispatch and combine by einsum, capacity; 8 experts and batch 8."""
    return _model(name, _one_hot, "one-hot dispatch; tokens over capacity are dropped; experts equal the batch (8)")


def ragged(name: str) -> ZooModel:
    """Top-2 router, argsort, `jax.lax.ragged_dot`, scatter back."""
    return _model(name, _sorted, "sort, ragged_dot, scatter; batch and length are merged into tokens")


def lstm(name: str) -> ZooModel:
    """Two LSTM layers, each a scan over time with the four gates in one weight; then a classifier of the last state."""
    inputs, hidden, classes = 20, 32, 16

    def init(rng):
        return draw(
            rng,
            {
                "b": {"i": w(inputs, 4 * hidden), "h": w(hidden, 4 * hidden), "o": w(1, 4 * hidden)},
                "a": {"i": w(hidden, 4 * hidden), "h": w(hidden, 4 * hidden), "o": w(1, 4 * hidden)},
                "z": w(hidden, classes),
            },
        )

    def run(p, x_BLI):
        def step(carry, x):
            h, c = carry
            i, f, o, u = jnp.split(x + h @ p["h"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(u)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x_BLI.shape[0], hidden))
        x_LBI = jnp.swapaxes(x_BLI @ p["i"] + p["o"][0], 0, 1)
        _, h_LBH = jax.lax.scan(step, (zero, zero), x_LBI)
        return jnp.swapaxes(h_LBH, 0, 1)

    def loss(params, batch, rng):
        del rng
        h = run(params["a"], run(params["b"], batch["s"]))
        return cross_entropy(h[:, -1] @ params["z"], batch["t"])

    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        return {
            "s": rng.normal(size=(global_batch, L, inputs)).astype(np.float32),
            "t": rng.integers(0, classes, (global_batch,)).astype(np.int32),
        }

    return ZooModel(
        name,
        init,
        loss,
        make_batch,
        notes="scan over time, not over layers; gates are four segments; hidden meets itself in the square weight",
    )
