"""Llama shapes as plain dicts: grouped heads, rotary positions, gated hidden layer, untied head.

Shape letters: B batch, L length, D embed, K kv heads, G groups, N = K * G heads, H head dim, F mlp, V vocab.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.base import ZooModel, cross_entropy, draw, g, per_layer, rms_norm, stacked, table, tokens, w


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a Llama; head_dim is its own number, so that embed is not heads * head_dim."""

    vocab: int = 56
    embed: int = 32
    layers: int = 3
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 6
    mlp: int = 40
    length: int = 12


TINY = Shapes()

LAYER_ROLES = {
    "nib": ("embed",),
    "qux": ("embed", "kv_heads*groups*head_dim"),
    "foo": ("embed", "kv_heads*head_dim"),
    "wug": ("embed", "kv_heads*head_dim"),
    "bar": ("kv_heads*groups*head_dim", "embed"),
    "baz": ("embed",),
    "fez": ("embed", "mlp"),
    "dax": ("embed", "mlp"),
    "kip": ("mlp", "embed"),
}
TOP_ROLES = {"zot": ("vocab", "embed"), "gum": ("embed",), "arc": ("embed", "vocab")}
LAYER_MEGATRON = {
    "nib": (None,),
    "qux": (None, "tensor"),
    "foo": (None, "tensor"),
    "wug": (None, "tensor"),
    "bar": ("tensor", None),
    "baz": (None,),
    "fez": (None, "tensor"),
    "dax": (None, "tensor"),
    "kip": ("tensor", None),
}
TOP_MEGATRON = {"zot": ("tensor", None), "gum": (None,), "arc": (None, "tensor")}


def layer_leaves(s: Shapes) -> dict[str, Any]:
    """One layer's parameters to draw."""
    return {
        "nib": g(s.embed),
        "qux": w(s.embed, s.heads * s.head_dim),
        "foo": w(s.embed, s.kv_heads * s.head_dim),
        "wug": w(s.embed, s.kv_heads * s.head_dim),
        "bar": w(s.heads * s.head_dim, s.embed),
        "baz": g(s.embed),
        "fez": w(s.embed, s.mlp),
        "dax": w(s.embed, s.mlp),
        "kip": w(s.mlp, s.embed),
    }


def top_leaves(s: Shapes) -> dict[str, Any]:
    """What is not in a layer."""
    return {"zot": table(s.vocab, s.embed), "gum": g(s.embed), "arc": w(s.embed, s.vocab)}


def init_scanned(rng: jax.Array, s: Shapes = TINY, dtype: Any = jnp.float32, layer: Any = None) -> Any:
    """Parameters with layers stacked in front."""
    leaves = layer or layer_leaves(s)
    layers = jax.vmap(lambda key: draw(key, leaves, dtype))(jax.random.split(rng, s.layers))
    return {"ham": layers, **draw(jax.random.fold_in(rng, 1), top_leaves(s), dtype)}


def init_unrolled(rng: jax.Array, s: Shapes = TINY, dtype: Any = jnp.float32) -> Any:
    """Parameters with a list of layers."""
    return draw(rng, {"ham": [layer_leaves(s)] * s.layers, **top_leaves(s)}, dtype)


def rotary(length: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (length, head_dim), each angle twice."""
    inverse = 10000.0 ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * inverse[None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLNH: jax.Array, cos_LH: jax.Array, sin_LH: jax.Array) -> jax.Array:
    """Turn each pair (h, h + H/2) by the angle of its position."""
    first, second = jnp.split(x_BLNH, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos_LH[None, :, None, :], sin_LH[None, :, None, :]
    return (x_BLNH * cos + turned * sin).astype(x_BLNH.dtype)


def attention(
    kind: Literal["grouped", "repeat", "sdpa"], q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array
) -> jax.Array:
    """Causal attention of grouped heads, in three common spellings; returns (B, L, N, H)."""
    B, L, N, H = q_BLNH.shape
    K = k_BLKH.shape[2]
    if kind == "sdpa":
        return jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, is_causal=True)
    mask_LM = jax.lax.broadcasted_iota(jnp.int32, (L, L), 0) >= jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)
    if kind == "repeat":
        k_BLNH, v_BLNH = (jnp.repeat(x, N // K, axis=2) for x in (k_BLKH, v_BLKH))
        s_BNLM = jnp.einsum("blnh,bmnh->bnlm", q_BLNH, k_BLNH).astype(jnp.float32) * H**-0.5
        p_BNLM = jax.nn.softmax(jnp.where(mask_LM, s_BNLM, -1e30), axis=-1).astype(v_BLKH.dtype)
        return jnp.einsum("bnlm,bmnh->blnh", p_BNLM, v_BLNH)
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
    s_BKGLM = jnp.einsum("blkgh,bmkh->bkglm", q_BLKGH, k_BLKH).astype(jnp.float32) * H**-0.5
    p_BKGLM = jax.nn.softmax(jnp.where(mask_LM, s_BKGLM, -1e30), axis=-1).astype(v_BLKH.dtype)
    return jnp.einsum("bkglm,bmkh->blkgh", p_BKGLM, v_BLKH).reshape(B, L, N, H)


def block(x_BLD: jax.Array, p: Any, s: Shapes, kind: Any = "grouped") -> jax.Array:
    """One layer; parameters are cast to the activations' dtype."""
    p = jax.tree.map(lambda leaf: leaf.astype(x_BLD.dtype), p)
    B, L, _ = x_BLD.shape
    cos, sin = rotary(L, s.head_dim)
    h = rms_norm(x_BLD, p["nib"])
    q = rotate((h @ p["qux"]).reshape(B, L, s.heads, s.head_dim), cos, sin)
    k = rotate((h @ p["foo"]).reshape(B, L, s.kv_heads, s.head_dim), cos, sin)
    v = (h @ p["wug"]).reshape(B, L, s.kv_heads, s.head_dim)
    x_BLD = x_BLD + attention(kind, q, k, v).reshape(B, L, s.heads * s.head_dim) @ p["bar"]
    h = rms_norm(x_BLD, p["baz"])
    if "fez" in p:
        gate, up = h @ p["fez"], h @ p["dax"]
    else:
        gate, up = jnp.split(h @ p["dax"], 2, axis=-1)
    return x_BLD + (jax.nn.silu(gate) * up) @ p["kip"]


def forward_loss(
    params: Any,
    batch: Any,
    s: Shapes = TINY,
    *,
    kind: Any = "grouped",
    remat: bool = False,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Next-token loss; layers are scanned if stacked, else a loop."""

    def layer(x, p):
        return block(x, p, s, kind)

    layer = jax.checkpoint(layer) if remat else layer
    x = params["zot"].astype(dtype)[batch["s"]]
    if isinstance(params["ham"], dict):
        x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["ham"])
    else:
        for p in params["ham"]:
            x = layer(x, p)
    x = rms_norm(x, params["gum"].astype(dtype))
    return cross_entropy(x @ params["arc"].astype(dtype), batch["t"])


def _model(name: str, notes: str, *, init: Any = init_scanned, roles: Any = None, **options: Any) -> ZooModel:
    def loss(params, batch, rng):
        del rng
        return forward_loss(params, batch, **options)

    if init is init_unrolled:
        expected = per_layer(LAYER_ROLES, "ham", TINY.layers)
        megatron = per_layer(LAYER_MEGATRON, "ham", TINY.layers)
    else:
        expected = stacked(LAYER_ROLES, "ham", "layers")
        megatron = stacked(LAYER_MEGATRON, "ham", None)
    return ZooModel(
        name,
        init,
        loss,
        tokens(TINY.vocab, TINY.length, "s", "t"),
        expected_roles={**expected, **TOP_ROLES},
        megatron={**megatron, **TOP_MEGATRON},
        notes=notes,
    )


def scanned(name: str) -> ZooModel:
    """Scanned layers, grouped attention in five dimensions."""
    return _model(name, "scan over layers")


def remat(name: str) -> ZooModel:
    """Scanned layers under `jax.checkpoint`."""
    return _model(name, "scan and remat", remat=True)


def unrolled(name: str) -> ZooModel:
    """A list of layers, three times the same rows."""
    return _model(name, "a list of layers", init=init_unrolled)


def repeat(name: str) -> ZooModel:
    """Keys and values repeated for every query head."""
    return _model(name, "jnp.repeat of keys and values", kind="repeat")


def sdpa(name: str) -> ZooModel:
    """`jax.nn.dot_product_attention`."""
    return _model(name, "jax.nn.dot_product_attention", init=init_unrolled, kind="sdpa")


def fused(name: str) -> ZooModel:
    """Gate and up projections as one (embed, 2 * mlp) weight."""
    s = TINY
    leaves = {k: v for k, v in layer_leaves(s).items() if k != "fez"} | {"dax": w(s.embed, 2 * s.mlp)}

    def init(rng):
        return init_scanned(rng, s, layer=leaves)

    model = _model(name, "gate and up in one weight", init=init)
    roles = {k: v for k, v in model.expected_roles.items() if k not in ("ham/fez", "ham/dax")}
    specs = {k: v for k, v in model.megatron.items() if k != "ham/fez"}
    return dataclasses.replace(model, expected_roles={**roles, "ham/dax": ("layers", "embed", None)}, megatron=specs)
