"""Experts as one call: what it computes is plain JAX, who computes it is decided later, as for `attention`.

    y_BLD = experts(x_BLD, expert_BLJ, weight_BLJ, up_EDF, down_EFD, gate_EDF, activation=jax.nn.silu)

Tokens are sorted by expert and multiplied in groups (arXiv 2211.15841); none is dropped. The compiler has no
partitioned form of that: it would gather the whole batch on every device. So the runtime gives such a call to
`pipelines.experts`, where every device sorts its own tokens.

Shape letters: B batch, L length, T = B * L tokens, D embed, E experts, J experts per token, F mlp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

Activate = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class ExpertsCall:
    """What is the same in every execution of one call of `experts`.

    Attributes:
        activation: an elementwise function.
        gated: whether the experts have a gate, which the activation is of; otherwise it is of `up`.
    """

    activation: Activate
    gated: bool

    def hidden(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
        """What is multiplied by `down`."""
        return self.activation(up) if gate is None else self.activation(gate) * up


def experts(
    x_BLD: jax.Array,
    expert_BLJ: jax.Array,
    weight_BLJ: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    gate_EDF: jax.Array | None = None,
    *,
    activation: Activate,
) -> jax.Array:
    """Weighted sum of the experts that each token goes to; on a mesh, every device sorts its own tokens.

    >>> x, expert, weight = jnp.ones((1, 4, 8)), jnp.zeros((1, 4, 2), int), jnp.full((1, 4, 2), 0.5)
    >>> experts(x, expert, weight, jnp.ones((3, 8, 16)), jnp.ones((3, 16, 8)), activation=jax.nn.relu).shape
    (1, 4, 8)

    Args:
        x_BLD: tokens; any number of dimensions may take the place of B and L.
        expert_BLJ: numbers of each token's experts, from 0 to E - 1.
        weight_BLJ: of their results.
        up_EDF, down_EFD, gate_EDF: kernels of all experts; without a gate, an expert is down(activation(up(x))),
            with one down(activation(gate(x)) * up(x)).
        activation: an elementwise function, the same object in every trace.

    Returns:
        An array like `x_BLD`.

    Raises:
        ValueError: shapes that do not go together.
    """
    kernels = (up_EDF, down_EFD) if gate_EDF is None else (up_EDF, down_EFD, gate_EDF)
    D, (E, _, F) = x_BLD.shape[-1], up_EDF.shape
    wanted = [(E, D, F), (E, F, D), (E, D, F)][: len(kernels)]
    if [kernel.shape for kernel in kernels] != wanted:
        raise ValueError(
            f"experts: kernels {', '.join(str(kernel.shape) for kernel in kernels)} and tokens {x_BLD.shape} do not go "
            "together; up and gate are (E, D, F), down is (E, F, D), and the last dimension of the tokens is D"
        )
    if expert_BLJ.shape != weight_BLJ.shape or expert_BLJ.shape[:-1] != x_BLD.shape[:-1]:
        raise ValueError(
            f"experts: tokens {x_BLD.shape}, numbers of experts {expert_BLJ.shape} and weights {weight_BLJ.shape} do "
            "not go together; the last two are alike, and have all dimensions of the tokens but the last"
        )
    return _marked(ExpertsCall(activation, gate_EDF is not None))(x_BLD, expert_BLJ, weight_BLJ, *kernels)


def experts_call(eqn: JaxprEqn) -> ExpertsCall | None:
    """What a call in a jaxpr computes, if it is one of `experts`; a derivative of such a call is none."""
    call = _BY_NAME.get(eqn.params.get("name", ""))
    body = eqn.params.get("jaxpr")
    if call is None or not isinstance(body, ClosedJaxpr) or len(eqn.invars) != 5 + call.gated:
        return None
    if len(eqn.outvars) != 1:
        return None
    operands = tuple((getattr(a.aval, "shape", ()), str(getattr(a.aval, "dtype", ""))) for a in eqn.invars)
    return call if [str(e.primitive) for e in body.jaxpr.eqns] == _inside(call, operands) else None


_BY_NAME: dict[str, ExpertsCall] = {}


@functools.cache
def _marked(call: ExpertsCall) -> Callable[..., jax.Array]:
    activation = "".join(c for c in getattr(call.activation, "__name__", "") if c.isalnum() or c == "_")
    base = name = f"experts_{'gated' if call.gated else 'plain'}_{activation}"
    while name in _BY_NAME:  # another function of that name
        name = f"{base}_{len(_BY_NAME)}"

    def marked(*operands: jax.Array) -> jax.Array:
        return _dispatch(call, *operands)

    marked.__name__ = marked.__qualname__ = name
    _BY_NAME[name] = call
    return jax.jit(marked)


def _dispatch(
    call: ExpertsCall, x_BLD: jax.Array, expert_BLJ: jax.Array, weight_BLJ: jax.Array, *kernels: jax.Array
) -> jax.Array:
    up_EDF, down_EFD, *gate_EDF = kernels
    x_TD, J = x_BLD.reshape(-1, x_BLD.shape[-1]), expert_BLJ.shape[-1]
    expert = expert_BLJ.reshape(-1)
    order = jnp.argsort(expert)
    counts_E = jnp.bincount(expert, length=up_EDF.shape[0])
    h = x_TD[order // J]
    up = jax.lax.ragged_dot(h, up_EDF, counts_E)
    gate = jax.lax.ragged_dot(h, gate_EDF[0], counts_E) if gate_EDF else None
    h = jax.lax.ragged_dot(call.hidden(up, gate), down_EFD, counts_E)
    y_TJD = jnp.zeros_like(h).at[order].set(h).reshape(-1, J, h.shape[-1])
    return jnp.einsum("tj,tjd->td", weight_BLJ.reshape(-1, J), y_TJD).reshape(x_BLD.shape)


@functools.cache
def _inside(call: ExpertsCall, operands: tuple[tuple[tuple[int, ...], str], ...]) -> list[str] | None:
    """Primitives of the call on such operands; None for operands that it does not take."""
    shapes = [shape for shape, _ in operands]
    if any(len(shape) != 3 for shape in shapes[3:]) or shapes[0][:-1] != shapes[1][:-1]:
        return None
    try:
        arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands)
        jaxpr = jax.make_jaxpr(functools.partial(_dispatch, call))(*arrays)
    except (TypeError, ValueError):
        return None
    return [str(e.primitive) for e in jaxpr.jaxpr.eqns]
