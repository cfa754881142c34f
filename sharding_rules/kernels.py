"""Attention as one call that a kernel can stand for: what it computes is plain JAX, who computes it is decided later.

    o_BLNV = attention(q_BLNH, k_BMKH, v_BMKV, causal=True, scale=H**-0.5)

The call is a `jax.jit` with a name of its own, so a jaxpr shows it while its inside stays in view: axes, operations and
memory are read from there. `Layout.pin` gives such a call to a kernel if it is given one for it; without, and in any
other program, the plain computation runs.

Shape letters: B batch, L queries, M keys, N = K * G heads, K kv heads, G groups, H head dim, V value dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.sharding import Mesh, PartitionSpec

from sharding_rules.mixture import ExpertsCall, experts_call

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What is the same in every execution of one call of `attention`.

    Attributes:
        causal: queries see no later keys; position i of both is the same token.
        scale: of the scores.
        window: how many keys a query sees, its own included; None for all. Only with `causal`.
        softcap: scores s become softcap * tanh(s / softcap); 0 for no cap.
    """

    causal: bool
    scale: float
    window: int | None = None
    softcap: float = 0.0

    @property
    def name(self) -> str:
        """Name of the call in a jaxpr and in compiled programs."""
        parts = ["attention", "causal" if self.causal else "full"]
        parts += [f"window{self.window}"] if self.window else []
        parts += [f"softcap{self.softcap!r}"] if self.softcap else []
        return "_".join([*parts, f"scale{self.scale!r}"])


Call = AttentionCall | ExpertsCall
Kernels = Callable[[Any, Mesh, Sequence[Any], Sequence[PartitionSpec]], Any]
"""Computes a `Call` on a mesh, from its operands and how these are split; None: it does not.

Tokens of `experts` are told as they lie between blocks, and the result lies as they do.
"""


def attention(
    q_BLNH: jax.Array,
    k_BMKH: jax.Array,
    v_BMKV: jax.Array,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    more: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of grouped heads, softmax in float32; under a plan with fused attention, the platform's kernel.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attention(x, x, x, causal=True, scale=8**-0.5).shape
    (1, 4, 2, 8)

    Args:
        causal: queries see no later keys; then there are as many keys as queries.
        scale: of the scores, a number known when the model is traced.
        window: how many keys a query sees, its own included; None for all. Only with `causal`.
        softcap: scores s become softcap * tanh(s / softcap); 0 for no cap.
        more: further dimensions of queries and keys, whose products are added; these keys may have fewer heads yet
            (the rotary part of latent attention).

    Returns:
        (B, L, N, V), in the dtype of the values.

    Raises:
        ValueError: shapes that do not go together.
    """
    (B, L, N, H), (M, K) = q_BLNH.shape, k_BMKH.shape[1:3]
    if k_BMKH.shape != (B, M, K, H) or v_BMKV.shape[:3] != (B, M, K) or N % K:
        raise ValueError(
            f"attention: queries {q_BLNH.shape}, keys {k_BMKH.shape} and values {v_BMKV.shape} do not go together; "
            "they are (B, L, N, H), (B, M, K, H) and (B, M, K, V), with N a multiple of K"
        )
    if causal and L != M:
        raise ValueError(f"attention: causal=True with {L} queries and {M} keys; both are the same tokens")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window={window} with causal={causal}; a window is at least 1, and causal")
    call = AttentionCall(bool(causal), float(scale), window if window is None or window < M else None, float(softcap))
    return _marked(call)(q_BLNH, k_BMKH, v_BMKV, *(more or ()))


def plain_attention(
    q_BLNH: jax.Array,
    k_BMKH: jax.Array,
    v_BMKV: jax.Array,
    *,
    scale: float,
    more: tuple[jax.Array, jax.Array] | None = None,
    keep: jax.Array | None = None,
    bias_1NLM: jax.Array | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """Softmax of scores in float32, times values. Keys are not copied for the heads that share them.

    Args:
        more: see `attention`.
        keep: which scores count; of shape (1 or B, 1, 1, 1 or L, M).
        bias_1NLM: added to the scores; (1 or B, N, L, M).

    Returns:
        (B, L, N, V), in the dtype of the values.
    """
    B, L, N, _ = q_BLNH.shape
    M, K = k_BMKH.shape[1:3]

    def products(q_BLNH: jax.Array, k_BMKH: jax.Array) -> jax.Array:
        heads = k_BMKH.shape[2]
        q_BLKGH = q_BLNH.reshape(B, L, heads, N // heads, -1)
        y_BKGLM = jnp.einsum("blkgh,bmkh->bkglm", q_BLKGH, k_BMKH, preferred_element_type=jnp.float32)
        return y_BKGLM if heads == K else y_BKGLM.reshape(B, K, N // K, L, M)

    scores_BKGLM = products(q_BLNH, k_BMKH)
    if more is not None:
        scores_BKGLM += products(*more)
    scores_BKGLM *= scale
    if softcap:
        scores_BKGLM = softcap * jnp.tanh(scores_BKGLM / softcap)
    if bias_1NLM is not None:
        scores_BKGLM += bias_1NLM.reshape(-1, K, N // K, L, M).astype(jnp.float32)
    if keep is not None:
        scores_BKGLM = jnp.where(keep, scores_BKGLM, MASKED)
    weights_BKGLM = jax.nn.softmax(scores_BKGLM, axis=-1).astype(v_BMKV.dtype)
    return jnp.einsum("bkglm,bmkv->blkgv", weights_BKGLM, v_BMKV).reshape(B, L, N, v_BMKV.shape[-1])


def causal_keep(L: int, M: int, position: jax.Array | None, window: Any) -> jax.Array:
    """Which scores count: of no later keys, and of the last `window` ones if that is not None.

    Returns:
        (1, 1, 1, L, M), or (B, 1, 1, L, M) where `position` (see `distances`) differs between rows.
    """
    distance = distances(L, M, position)
    keep = distance >= 0
    if window is not None:
        keep &= distance < window
    return keep.reshape(-1, 1, 1, L, M)


def distances(L: int, M: int, position: jax.Array | None) -> jax.Array:
    """How many tokens each key (of M) lies before each query (of L), the first of which is at `position`.

    Returns:
        (L, M), or (B, L, M) where the rows have positions of their own (B,).
    """
    rows = () if position is None else position.shape
    shape, last = (*rows, L, M), len(rows) + 1
    query = jax.lax.broadcasted_iota(jnp.int32, shape, last - 1)
    if position is not None:
        query += jnp.broadcast_to(position[:, None, None], shape) if rows else position
    return query - jax.lax.broadcasted_iota(jnp.int32, shape, last)


def attention_call(eqn: JaxprEqn) -> AttentionCall | None:
    """What a call in a jaxpr computes, if it is one of `attention`.

    A derivative of the call, and a batch of calls, keep its name: they are told from it by what is inside.
    """
    call = _BY_NAME.get(eqn.params.get("name", ""))
    body = eqn.params.get("jaxpr")
    if call is None or not isinstance(body, ClosedJaxpr) or len(eqn.invars) not in (3, 5) or len(eqn.outvars) != 1:
        return None
    operands = [(getattr(a.aval, "shape", ()), str(getattr(a.aval, "dtype", ""))) for a in eqn.invars]
    if any(len(shape) != 4 for shape, _ in operands):
        return None
    return call if [str(e.primitive) for e in body.jaxpr.eqns] == _inside(call, tuple(operands)) else None


def kernel_call(eqn: JaxprEqn) -> Call | None:
    """What a call in a jaxpr computes, if it is one of `attention` or `experts`."""
    return attention_call(eqn) or experts_call(eqn)


_BY_NAME: dict[str, AttentionCall] = {}


@functools.cache
def _marked(call: AttentionCall) -> Callable[..., jax.Array]:
    marked = _body(call)
    marked.__name__ = marked.__qualname__ = call.name
    _BY_NAME[call.name] = call
    return jax.jit(marked)


def _body(call: AttentionCall) -> Callable[..., jax.Array]:
    def body(q_BLNH: jax.Array, k_BMKH: jax.Array, v_BMKV: jax.Array, *more: jax.Array) -> jax.Array:
        keep = causal_keep(q_BLNH.shape[1], k_BMKH.shape[1], None, call.window) if call.causal else None
        both = (more[0], more[1]) if more else None
        return plain_attention(q_BLNH, k_BMKH, v_BMKV, scale=call.scale, more=both, keep=keep, softcap=call.softcap)

    return body


@functools.cache
def _inside(call: AttentionCall, operands: tuple[tuple[tuple[int, ...], str], ...]) -> list[str] | None:
    """Primitives of the call on such operands; None for operands that it does not take."""
    try:
        jaxpr = jax.make_jaxpr(_body(call))(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands))
    except (TypeError, ValueError):
        return None
    return [str(e.primitive) for e in jaxpr.jaxpr.eqns]
