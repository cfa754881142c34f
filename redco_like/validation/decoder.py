"""The decoder that published runs trained, in plain JAX: traced on shapes, never run.

    traced, optimizer_state = decoder_problem(architecture, seq_len=2048, global_batch=512)

Parameters are stored in the compute dtype, as the optimizer's float32 copy is part of its state: PyTorch FSDP, Megatron
and the partitioner of XLA all gather and sum in that dtype.

Shape letters: B batch, L length, D embed, N heads, K heads of keys, G groups (N = K * G), H head size, F hidden,
V vocabulary, E experts, C tokens of one expert.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from redco_like.validation.runs import Architecture
from sharding_rules import TracedFunction, trace

Tree = Any
NARROW = {"float8": jnp.float8_e4m3fn, "float4": jnp.float4_e2m1fn}
"""Dtypes of products whose operands are cast for them."""


def decoder_problem(
    a: Architecture,
    *,
    seq_len: int,
    global_batch: int,
    product_dtype: str = "bfloat16",
    gain: bool = False,
    recompute_latents: bool = False,
    fused_loss: bool = False,
) -> tuple[TracedFunction, Tree]:
    """Trace the loss of a decoder on the whole global batch.

    Args:
        a: sizes.
        seq_len: tokens of an example.
        global_batch: examples of a step.
        product_dtype: of the products with weights of the layers: "bfloat16", "float16", "float8" or "float4".
        gain: scale the output of a block's second half by a parameter. Its gradient needs that half's last product,
            which a recomputed block then makes again, as PyTorch's checkpoint does; XLA drops it.
        recompute_latents: of latent attention keep the latents, and make queries, keys and values of them again.
        fused_loss: pick the label's logit by comparison, as fused kernels do. Otherwise it is looked up in the float32
            logits, which are then in memory.

    Returns:
        The traced loss, and the shapes of Adam's state: moments and a float32 copy of the parameters.
    """
    compute = jnp.dtype("float16" if product_dtype == "float16" else "bfloat16")
    params = _shapes(a, compute, gain)
    ids = jax.ShapeDtypeStruct((global_batch, seq_len), jnp.int32)
    options = {"product_dtype": product_dtype, "recompute": recompute_latents, "fused_loss": fused_loss}
    loss = functools.partial(_loss, a=a, **options)
    traced = trace(loss, params, {"inputs": ids, "labels": ids}, names=("params", "batch"))
    moment = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    return traced, {"mu": moment, "nu": moment, "copy": moment}


def _shapes(a: Architecture, dtype: Any, gain: bool) -> Tree:
    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    dense = a.dense_layers if a.experts else a.layers
    tree = {"table": leaf(a.vocab, a.embed), "norm": leaf(a.embed)}
    if dense:
        tree["layers"] = _layer(leaf, a, dense, experts=False, gain=gain)
    if a.experts:
        tree["expert_layers"] = _layer(leaf, a, a.layers - dense, experts=True, gain=gain)
    if not a.tied:
        tree["head"] = leaf(a.embed, a.vocab)
    return tree


def _layer(leaf: Any, a: Architecture, n: int, *, experts: bool, gain: bool) -> Tree:
    d, h = a.embed, a.head_dim
    tree = {"norm1": leaf(n, d), "norm2": leaf(n, d)}
    if gain:
        tree |= {"gain2": leaf(n, d)}
    if a.mla:
        m = a.mla
        queries = a.heads * (m.nope + m.rope)
        if m.q_rank:
            tree |= {"q_down": leaf(n, d, m.q_rank), "q": leaf(n, m.q_rank, queries)}
        else:
            tree |= {"q": leaf(n, d, queries)}
        tree |= {"kv_down": leaf(n, d, m.kv_rank), "k_rope": leaf(n, d, m.rope)}
        tree |= {"k": leaf(n, m.kv_rank, a.heads * m.nope), "v": leaf(n, m.kv_rank, a.heads * m.v)}
        tree |= {"out": leaf(n, a.heads * m.v, d)}
    else:
        tree |= {"q": leaf(n, d, a.heads * h), "k": leaf(n, d, a.kv_heads * h), "v": leaf(n, d, a.kv_heads * h)}
        tree |= {"out": leaf(n, a.heads * h, d)}
    matrices = ("gate", "up") if a.gated else ("up",)
    if experts:
        e, f = a.experts, a.expert_width
        tree |= {"router": leaf(n, d, e), "e_down": leaf(n, e, f, d)}
        tree |= {f"e_{name}": leaf(n, e, d, f) for name in matrices}
        if a.shared:
            tree |= {name: leaf(n, d, a.shared * f) for name in matrices} | {"down": leaf(n, a.shared * f, d)}
    else:
        tree |= {name: leaf(n, d, a.mlp) for name in matrices} | {"down": leaf(n, a.mlp, d)}
    return tree


def _loss(
    params: Tree, batch: Tree, *, a: Architecture, product_dtype: str, recompute: bool, fused_loss: bool
) -> jax.Array:
    x_BLD = params["table"][batch["inputs"]]
    for name in ("layers", "expert_layers"):
        if name in params:
            body = functools.partial(_block, a=a, product_dtype=product_dtype, recompute=recompute)
            x_BLD, _ = jax.lax.scan(body, x_BLD, params[name])
    x_BLD = _norm(x_BLD, params["norm"])
    head_DV = params["table"].T if a.tied else params["head"]
    logits_BLV = (x_BLD @ head_DV).astype(jnp.float32)
    if fused_loss:
        is_label_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2) == batch["labels"][..., None]
        chosen_BL = jnp.where(is_label_BLV, logits_BLV, 0.0).sum(axis=-1)
    else:
        chosen_BL = jnp.take_along_axis(logits_BLV, batch["labels"][..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_BLV, axis=-1) - chosen_BL)


def _block(
    x_BLD: jax.Array, p: Tree, *, a: Architecture, product_dtype: str, recompute: bool
) -> tuple[jax.Array, None]:
    dots = functools.partial(_dots, dtype=product_dtype)
    h_BLD = _norm(x_BLD, p["norm1"])
    x_BLD = x_BLD + (_latent_attention if a.mla else _attention)(h_BLD, p, a, dots, recompute)
    h_BLD = _norm(x_BLD, p["norm2"])
    y_BLD = _mlp(h_BLD, p, dots) if "up" in p else 0.0
    if "router" in p:
        y_BLD = y_BLD + _experts(h_BLD, p, a, product_dtype)
    return x_BLD + (y_BLD * p["gain2"][None, None] if "gain2" in p else y_BLD), None


def _attention(h_BLD: jax.Array, p: Tree, a: Architecture, dots: Any, _recompute: bool) -> jax.Array:
    B, L, _ = h_BLD.shape
    K, G, H = a.kv_heads, a.heads // a.kv_heads, a.head_dim
    q, k, v = dots(h_BLD, p["q"], p["k"], p["v"])
    q_BLKGH, k_BLKH, v_BLKH = q.reshape(B, L, K, G, H), k.reshape(B, L, K, H), v.reshape(B, L, K, H)
    s_BKGLM = jnp.einsum("blkgh,bmkh->bkglm", q_BLKGH, k_BLKH) * H**-0.5
    o_BLKGH = jnp.einsum("bkglm,bmkh->blkgh", _causal_softmax(s_BKGLM), v_BLKH)
    return dots(o_BLKGH.reshape(B, L, K * G * H), p["out"])[0]


def _latent_attention(h_BLD: jax.Array, p: Tree, a: Architecture, dots: Any, recompute: bool) -> jax.Array:
    assert a.mla is not None
    B, L, _ = h_BLD.shape
    N, m = a.heads, a.mla
    latent_BLR, shared_BLH, q_BLD = dots(h_BLD, p["kv_down"], p["k_rope"], p["q_down" if m.q_rank else "q"])

    def attend(latent_BLR: jax.Array, shared_BLH: jax.Array, q_BLD: jax.Array, p: Tree) -> jax.Array:
        if m.q_rank:
            q_BLD = dots(q_BLD, p["q"])[0]
        q_BLNH = q_BLD.reshape(B, L, N, m.nope + m.rope)
        k, v = dots(latent_BLR, p["k"], p["v"])
        k_BLNH, v_BLNH = k.reshape(B, L, N, m.nope), v.reshape(B, L, N, m.v)
        # The rotary part of a key is one for all heads; it is repeated, so that the scores are one product.
        k_BLNH = jnp.concatenate([k_BLNH, jnp.broadcast_to(shared_BLH[:, :, None], (B, L, N, m.rope))], -1)
        s_BNLM = jnp.einsum("blnh,bmnh->bnlm", q_BLNH, k_BLNH) * (m.nope + m.rope) ** -0.5
        return jnp.einsum("bnlm,bmnh->blnh", _causal_softmax(s_BNLM), v_BLNH)

    given = (latent_BLR, shared_BLH, q_BLD, p)
    o_BLNH: Any = _one_kernel(attend, *given) if recompute else attend(*given)
    return dots(o_BLNH.reshape(B, L, N * m.v), p["out"])[0]


def _causal_softmax(s: jax.Array) -> jax.Array:
    L = s.shape[-1]
    mask_LM = jax.lax.broadcasted_iota(jnp.int32, (L, L), 0) >= jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)
    mask = mask_LM.reshape((1,) * (s.ndim - 2) + (L, L))
    return jax.nn.softmax(jnp.where(mask, s, jnp.finfo(s.dtype).min), axis=-1)


def _mlp(h_BLD: jax.Array, p: Tree, dots: Any) -> jax.Array:
    if "gate" in p:
        gate, up = dots(h_BLD, p["gate"], p["up"])
        return dots(_one_kernel(_silu_gate, gate, up), p["down"])[0]
    return dots(_one_kernel(jax.nn.gelu, dots(h_BLD, p["up"])[0]), p["down"])[0]


def _experts(h_BLD: jax.Array, p: Tree, a: Architecture, product_dtype: str) -> jax.Array:
    """Route every token to its experts, each of which has room for its even share of a sequence's tokens."""
    _, L, _ = h_BLD.shape
    E, k = a.experts, a.chosen
    C = max(1, L * k // E)
    gates_BLE = jax.nn.softmax((h_BLD @ p["router"]).astype(jnp.float32), axis=-1)
    # The C tokens with the largest gate of each expert (expert choice): every expert full, every token k on average.
    gate_BEC, token_BEC = jax.lax.top_k(jnp.swapaxes(gates_BLE, 1, 2), C)
    x_BECD = jnp.take_along_axis(h_BLD[:, None], token_BEC[..., None], axis=2)

    def dots(x_BECD: Any, *weights: jax.Array) -> list[jax.Array]:
        each = jax.vmap(functools.partial(_dots, dtype=product_dtype), in_axes=(1, *(0 for _ in weights)), out_axes=1)
        return each(x_BECD, *weights)

    if "e_gate" in p:
        gate_BECF, up_BECF = dots(x_BECD, p["e_gate"], p["e_up"])
        h_BECF = _one_kernel(_silu_gate, gate_BECF, up_BECF)
    else:
        h_BECF = _one_kernel(jax.nn.gelu, dots(x_BECD, p["e_up"])[0])
    y_BECD = dots(h_BECF, p["e_down"])[0] * gate_BEC[..., None].astype(h_BLD.dtype)
    # Sequence by sequence: every device adds up its own tokens.
    add = jax.vmap(lambda h_LD, token_EC, y_ECD: jnp.zeros_like(h_LD).at[token_EC].add(y_ECD))
    return add(h_BLD, token_BEC, y_BECD)


def _dots(x: jax.Array, *weights: jax.Array, dtype: str) -> list[jax.Array]:
    """Multiply one activation with several weights; where they are narrow, it is cast once."""
    return _narrow_matmuls(x, weights, dtype) if dtype in NARROW else [x @ w for w in weights]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_matmuls(x: jax.Array, weights: tuple[jax.Array, ...], dtype: str) -> list[jax.Array]:
    return _narrow_forward(x, weights, dtype)[0]


def _narrow_forward(x: jax.Array, weights: tuple[jax.Array, ...], dtype: str) -> tuple[list[jax.Array], Any]:
    kept = _cast(x, dtype), [_cast(w, dtype) for w in weights]
    return [jnp.matmul(kept[0], w, preferred_element_type=x.dtype) for w in kept[1]], kept


def _narrow_backward(dtype: str, kept: Any, gradients: list[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Both products of the backward pass are narrow too, as Transformer Engine has them."""
    x, weights = kept
    dx, dws = None, []
    for w, g in zip(weights, gradients, strict=True):
        narrow, rows = _cast(g, dtype), tuple(range(g.ndim - 1))
        mine = jnp.matmul(narrow, w.T, preferred_element_type=g.dtype)
        dx = mine if dx is None else dx + mine
        dws.append(jax.lax.dot_general(x, narrow, ((rows, rows), ((), ())), preferred_element_type=g.dtype))
    assert dx is not None
    return dx, tuple(dws)


_narrow_matmuls.defvjp(_narrow_forward, _narrow_backward)


def _cast(x: jax.Array, dtype: str) -> jax.Array:
    return x.astype(NARROW[dtype]) if dtype in NARROW else x


def _norm(x_BLD: jax.Array, g_D: jax.Array) -> jax.Array:
    return _one_kernel(_rms_norm, x_BLD, g_D)


def _rms_norm(x_BLD: jax.Array, g_D: jax.Array) -> jax.Array:
    x32 = x_BLD.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + 1e-5)).astype(x_BLD.dtype) * g_D[None, None]


def _silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_kernel(fn: Any, *args: Any) -> jax.Array:
    """Run elementwise work that keeps nothing but its arguments for the backward pass, as a kernel written by hand."""
    return fn(*args)


def _one_kernel_forward(fn: Any, *args: jax.Array) -> tuple[jax.Array, Any]:
    return fn(*args), args


def _one_kernel_backward(fn: Any, args: Any, g: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(fn, *args)[1](g)


_one_kernel.defvjp(_one_kernel_forward, _one_kernel_backward)
