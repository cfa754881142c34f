"""The same kinds of model in Flax linen, Flax nnx and Equinox.

Shape letters as in `llama.py`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.base import ZooModel, cross_entropy, per_layer, stacked, tokens
from zoo.llama import TINY, attention, rotary, rotate

S = TINY
_LAYER_ROLES = {
    "ivy/scale": ("embed",),
    "owl/kernel": ("embed", "kv_heads*groups*head_dim"),
    "fox/kernel": ("embed", "kv_heads*head_dim"),
    "elk/kernel": ("embed", "kv_heads*head_dim"),
    "bat/kernel": ("kv_heads*groups*head_dim", "embed"),
    "ape/scale": ("embed",),
    "pig/kernel": ("embed", "mlp"),
    "hen/kernel": ("embed", "mlp"),
    "doe/kernel": ("mlp", "embed"),
}
_LAYER_SPECS = {
    "ivy/scale": (None,),
    "owl/kernel": (None, "tensor"),
    "fox/kernel": (None, "tensor"),
    "elk/kernel": (None, "tensor"),
    "bat/kernel": ("tensor", None),
    "ape/scale": (None,),
    "pig/kernel": (None, "tensor"),
    "hen/kernel": (None, "tensor"),
    "doe/kernel": ("tensor", None),
}


def _heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    B, L, _ = q.shape
    cos, sin = rotary(L, S.head_dim)
    q = rotate(q.reshape(B, L, S.heads, S.head_dim), cos, sin)
    k = rotate(k.reshape(B, L, S.kv_heads, S.head_dim), cos, sin)
    v = v.reshape(B, L, S.kv_heads, S.head_dim)
    return attention("grouped", q, k, v).reshape(B, L, -1)


class _LinenBlock(nn.Module):
    """As a scan body: (x, None) -> (x, None)."""

    @nn.compact
    def __call__(self, x, _):
        def dense(size, name):
            return nn.Dense(size, use_bias=False, name=name)

        h = nn.RMSNorm(name="ivy")(x)
        q = dense(S.heads * S.head_dim, "owl")(h)
        k, v = dense(S.kv_heads * S.head_dim, "fox")(h), dense(S.kv_heads * S.head_dim, "elk")(h)
        x = x + dense(S.embed, "bat")(_heads(q, k, v))
        h = nn.RMSNorm(name="ape")(x)
        h = nn.silu(dense(S.mlp, "pig")(h)) * dense(S.mlp, "hen")(h)
        return x + dense(S.embed, "doe")(h), None


class _LinenLlama(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens_BL):
        x = nn.Embed(S.vocab, S.embed, name="sky")(tokens_BL)
        if self.scanned:
            layers = nn.scan(
                nn.remat(_LinenBlock, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=S.layers,
                in_axes=nn.broadcast,
            )
            x, _ = layers(name="mop")(x, None)
        else:
            for i in range(S.layers):
                x, _ = _LinenBlock(name=f"mop_{i}")(x, None)
        return nn.Dense(S.vocab, use_bias=False, name="cap")(nn.RMSNorm(name="dew")(x))


_LINEN_TOP_ROLES = {"sky/embedding": ("vocab", "embed"), "dew/scale": ("embed",), "cap/kernel": ("embed", "vocab")}
_LINEN_TOP_SPECS = {"sky/embedding": ("tensor", None), "dew/scale": (None,), "cap/kernel": (None, "tensor")}


def _linen_llama(name: str, scanned: bool) -> ZooModel:
    module = _LinenLlama(scanned)

    def init(rng):
        return module.init(rng, jnp.zeros((1, S.length), jnp.int32))["params"]

    def loss(params, batch, rng):
        del rng
        return cross_entropy(module.apply({"params": params}, batch["s"]), batch["t"])

    def whole(layer, top, first):
        if scanned:
            return {**stacked(layer, "mop", first), **top}
        return {**{f"mop_{i}/{k}": v for i in range(S.layers) for k, v in layer.items()}, **top}

    return ZooModel(
        name,
        init,
        loss,
        tokens(S.vocab, S.length, "s", "t"),
        expected_roles=whole(_LAYER_ROLES, _LINEN_TOP_ROLES, "layers"),
        megatron=whole(_LAYER_SPECS, _LINEN_TOP_SPECS, None),
        notes="linen" + (", nn.scan over nn.remat" if scanned else ", a loop"),
    )


def linen_scanned(name: str) -> ZooModel:
    """Llama in linen: `nn.scan` over `nn.remat`."""
    return _linen_llama(name, True)


def linen_unrolled(name: str) -> ZooModel:
    """Llama in linen: a Python loop."""
    return _linen_llama(name, False)


class _NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def dense(before, after):
            return nnx.Linear(before, after, use_bias=False, rngs=rngs)

        self.ivy = nnx.RMSNorm(S.embed, rngs=rngs)
        self.owl = dense(S.embed, S.heads * S.head_dim)
        self.fox = dense(S.embed, S.kv_heads * S.head_dim)
        self.elk = dense(S.embed, S.kv_heads * S.head_dim)
        self.bat = dense(S.heads * S.head_dim, S.embed)
        self.ape = nnx.RMSNorm(S.embed, rngs=rngs)
        self.pig, self.hen = dense(S.embed, S.mlp), dense(S.embed, S.mlp)
        self.doe = dense(S.mlp, S.embed)

    def __call__(self, x):
        h = self.ivy(x)
        x = x + self.bat(_heads(self.owl(h), self.fox(h), self.elk(h)))
        h = self.ape(x)
        return x + self.doe(nnx.silu(self.pig(h)) * self.hen(h))


class _NnxLlama(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.sky = nnx.Embed(S.vocab, S.embed, rngs=rngs)
        self.mop = nnx.List([_NnxBlock(rngs) for _ in range(S.layers)])
        self.dew = nnx.RMSNorm(S.embed, rngs=rngs)
        self.cap = nnx.Linear(S.embed, S.vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens_BL):
        x = self.sky(tokens_BL)
        for layer in self.mop:
            x = layer(x)
        return self.cap(self.dew(x))


def nnx_llama(name: str) -> ZooModel:
    """Llama in nnx; parameters are an `nnx.State`."""

    def init(rng):
        return nnx.state(_NnxLlama(nnx.Rngs(rng)), nnx.Param)

    def loss(params, batch, rng):
        del rng
        graph = nnx.graphdef(nnx.eval_shape(lambda: _NnxLlama(nnx.Rngs(0))))
        return cross_entropy(nnx.merge(graph, params)(batch["s"]), batch["t"])

    return ZooModel(
        name,
        init,
        loss,
        tokens(S.vocab, S.length, "s", "t"),
        expected_roles={**per_layer(_LAYER_ROLES, "mop", S.layers), **_LINEN_TOP_ROLES},
        megatron={**per_layer(_LAYER_SPECS, "mop", S.layers), **_LINEN_TOP_SPECS},
        notes="nnx, a list of modules",
    )


class _LinenEncoder(nn.Module):
    """Post-norm blocks with `MultiHeadDotProductAttention`, whose kernels have three dimensions, and dropout."""

    @nn.compact
    def __call__(self, tokens_BL, deterministic):
        mask = nn.make_attention_mask(tokens_BL > 0, tokens_BL > 0)
        x = nn.Embed(64, 32, name="tub")(tokens_BL) + self.param("pot", nn.initializers.normal(0.5), (12, 32))
        for i in range(2):
            attend = nn.MultiHeadDotProductAttention(4, qkv_features=24, dropout_rate=0.1, name=f"zoo_{i}")
            x = nn.LayerNorm(name=f"yes_{i}")(x + attend(x, mask=mask, deterministic=deterministic))
            h = nn.Dense(32, name=f"aim_{i}")(nn.gelu(nn.Dense(48, name=f"fan_{i}")(x)))
            x = nn.LayerNorm(name=f"dim_{i}")(x + nn.Dropout(0.1, deterministic=deterministic)(h))
        return nn.Dense(16, name="lid")(jnp.tanh(nn.Dense(32, name="bin")(x[:, 0])))


def linen_encoder(name: str) -> ZooModel:
    """BERT-like classifier in linen with three-dimensional kernels and dropout."""
    module = _LinenEncoder()

    def init(rng):
        return module.init(rng, jnp.ones((1, 12), jnp.int32), True)["params"]

    def loss(params, batch, rng):
        logits = module.apply({"params": params}, batch["s"], False, rngs={"dropout": rng})
        return cross_entropy(logits, batch["t"])

    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        return {
            "s": rng.integers(0, 64, (global_batch, 12)).astype(np.int32),
            "t": rng.integers(0, 16, (global_batch,)).astype(np.int32),
        }

    roles: dict[str, Any] = {"tub/embedding": ("vocab", "embed"), "pot": (None, "embed")}
    specs: dict[str, Any] = {"tub/embedding": ("tensor", None), "pot": (None, None)}
    for i in range(2):
        for m in ("query", "key", "value"):
            roles |= {f"zoo_{i}/{m}/kernel": ("embed", "heads", "head_dim"), f"zoo_{i}/{m}/bias": ("heads", "head_dim")}
            specs |= {f"zoo_{i}/{m}/kernel": (None, "tensor", None), f"zoo_{i}/{m}/bias": ("tensor", None)}
        roles |= {f"zoo_{i}/out/kernel": ("heads", "head_dim", "embed"), f"zoo_{i}/out/bias": ("embed",)}
        specs |= {f"zoo_{i}/out/kernel": ("tensor", None, None), f"zoo_{i}/out/bias": (None,)}
        roles |= {f"fan_{i}/kernel": ("embed", "mlp"), f"aim_{i}/kernel": ("mlp", "embed")}
        specs |= {f"fan_{i}/kernel": (None, "tensor"), f"fan_{i}/bias": ("tensor",)}
        specs |= {f"aim_{i}/kernel": ("tensor", None), f"aim_{i}/bias": (None,)}
    return ZooModel(
        name,
        init,
        loss,
        make_batch,
        expected_roles=roles,
        megatron=specs,
        notes="linen; dropout in attention and after",
    )


def equinox_mlp(name: str) -> ZooModel:
    """`eqx.nn.MLP` under vmap; parameters are the arrays of `eqx.partition`."""
    import equinox as eqx

    def make(rng):
        return eqx.nn.MLP(20, 16, 32, 3, key=rng)

    def init(rng):
        return eqx.partition(make(rng), eqx.is_inexact_array)[0]

    def loss(params, batch, rng):
        del rng
        static = eqx.partition(
            eqx.filter_eval_shape(make, jax.random.key(0)), lambda x: isinstance(x, jax.ShapeDtypeStruct)
        )[1]
        model = eqx.combine(params, static)
        return jnp.mean((jax.vmap(model)(batch["p"]) - batch["q"]) ** 2)

    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        return {
            "p": rng.normal(size=(global_batch, 20)).astype(np.float32),
            "q": rng.normal(size=(global_batch, 16)).astype(np.float32),
        }

    return ZooModel(name, init, loss, make_batch, notes="equinox; weights are (out, in), used under vmap")


def equinox_transformer(name: str) -> ZooModel:
    """`eqx.nn.MultiheadAttention` and friends under vmap over batch and over length."""
    import equinox as eqx

    class Block(eqx.Module):
        zed: eqx.nn.LayerNorm
        wax: eqx.nn.MultiheadAttention
        pin: eqx.nn.LayerNorm
        cog: eqx.nn.Linear
        ace: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.zed, self.pin = eqx.nn.LayerNorm(32), eqx.nn.LayerNorm(32)
            self.wax = eqx.nn.MultiheadAttention(4, 32, key=keys[0])
            self.cog = eqx.nn.Linear(32, 48, key=keys[1])
            self.ace = eqx.nn.Linear(48, 32, key=keys[2])

        def __call__(self, x_LD):
            mask = jnp.tril(jnp.ones((x_LD.shape[0],) * 2, bool))
            h = jax.vmap(self.zed)(x_LD)
            x_LD = x_LD + self.wax(h, h, h, mask=mask)
            return x_LD + jax.vmap(lambda x: self.ace(jax.nn.gelu(self.cog(self.pin(x)))))(x_LD)

    class Model(eqx.Module):
        van: eqx.nn.Embedding
        nut: list[Block]
        boy: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.van = eqx.nn.Embedding(64, 32, key=keys[0])
            self.nut = [Block(k) for k in keys[1:3]]
            self.boy = eqx.nn.Linear(32, 64, use_bias=False, key=keys[3])

        def __call__(self, tokens_L):
            x = jax.vmap(self.van)(tokens_L)
            for block in self.nut:
                x = block(x)
            return jax.vmap(self.boy)(x)

    def init(rng):
        return eqx.partition(Model(rng), eqx.is_inexact_array)[0]

    def loss(params, batch, rng):
        del rng
        shapes = eqx.filter_eval_shape(Model, jax.random.key(0))
        static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))[1]
        return cross_entropy(jax.vmap(eqx.combine(params, static))(batch["s"]), batch["t"])

    roles = {
        **{f"wax/{m}_proj/weight": ("heads*head_dim", "embed") for m in ("query", "key", "value")},
        "wax/output_proj/weight": ("embed", "heads*head_dim"),
        "cog/weight": ("mlp", "embed"),
        "cog/bias": ("mlp",),
        "ace/weight": ("embed", "mlp"),
        "ace/bias": ("embed",),
    }
    specs = {
        **{f"wax/{m}_proj/weight": ("tensor", None) for m in ("query", "key", "value")},
        "wax/output_proj/weight": (None, "tensor"),
        "cog/weight": ("tensor", None),
        "cog/bias": ("tensor",),
        "ace/weight": (None, "tensor"),
        "ace/bias": (None,),
    }
    return ZooModel(
        name,
        init,
        loss,
        tokens(64, 12, "s", "t"),
        expected_roles={
            "van/weight": ("vocab", "embed"),
            "boy/weight": ("vocab", "embed"),
            **per_layer(roles, "nut", 2),
        },
        megatron={"van/weight": ("tensor", None), "boy/weight": ("tensor", None), **per_layer(specs, "nut", 2)},
        notes="equinox; weights are (out, in); everything is under vmap",
    )
