"""Floating point operations of one equation, and the shape of its product.

    product(eqn).flops       # 2 m n k per batch; convolutions count the window positions that fall on data
    arithmetic(eqn)          # of anything else: one per element, transcendentals apart, as XLA's cost analysis counts

Products are exact. `arithmetic` is exact for elementwise operations and reductions; sorts, scans and random numbers are
counted by what a plain implementation does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from jax.extend.core import JaxprEqn

from sharding_rules.axes import shape_of
from sharding_rules.primitives import ELEMENTWISE

ProductKind = Literal["dot", "conv", "ragged"]

TRANSCENDENTAL = frozenset(
    """acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp exp2
    expm1 igamma igammac lgamma log log1p logistic polygamma pow regularized_incomplete_beta rsqrt sin sinh sqrt tan
    tanh zeta""".split()
)
"""Elementwise operations that hardware makes of many: counted apart from `flops`."""
FREE = frozenset("copy copy_p name stop_gradient optimization_barrier".split())
"""Elementwise operations that compute nothing."""
RANDOM_FLOPS_PER_WORD = 60
"""Threefry-2x32: 20 rounds of an addition, a rotation (3) and an exclusive or, and 5 key injections, for two words."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, or what a convolution is as one.

    Attributes:
        batch, m, n, k: sizes; flops are 2 batch m n k, less the window positions of a convolution that fall on padding.
        flops: of one execution.
    """

    kind: ProductKind
    batch: int
    m: int
    n: int
    k: int
    flops: int


def product(eqn: JaxprEqn) -> Product | None:
    """The product that an equation is; None for anything else."""
    match eqn.primitive.name:
        case "dot_general":
            return _dot(eqn)
        case "conv_general_dilated":
            return _conv(eqn)
        case "ragged_dot" | "ragged_dot_general":
            return _ragged(eqn)
    return None


def _sizes(shape: tuple[int, ...], dims: Any) -> int:
    return math.prod(shape[i] for i in dims)


def _dot(eqn: JaxprEqn) -> Product:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lhs, rhs = (shape_of(atom) for atom in eqn.invars[:2])
    batch, k = _sizes(lhs, lb), _sizes(lhs, lc)
    m = _sizes(lhs, set(range(len(lhs))) - {*lc, *lb})
    n = _sizes(rhs, set(range(len(rhs))) - {*rc, *rb})
    return Product("dot", batch, m, n, k, 2 * batch * m * n * k)


def _ragged(eqn: JaxprEqn) -> Product:
    """Rows in groups, each with a matrix of its own: every row is multiplied once.

    Where the groups cut the contracted dimension (the gradient of the matrices), the result has one matrix per group,
    and every row again enters one of them.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    lhs, rhs = (shape_of(atom) for atom in eqn.invars[:2])
    batch, k = _sizes(lhs, lb), _sizes(lhs, lc)
    m = _sizes(lhs, set(range(len(lhs))) - {*lc, *lb})
    n = _sizes(rhs, set(range(len(rhs))) - {*rc, *rb, *numbers.rhs_group_dimensions})
    return Product("ragged", batch, m, n, k, 2 * batch * m * n * k)


def _conv(eqn: JaxprEqn) -> Product:
    p = eqn.params
    (lhs_spec, rhs_spec, out_spec) = p["dimension_numbers"]
    lhs, rhs = (shape_of(atom) for atom in eqn.invars[:2])
    out = shape_of(eqn.outvars[0])
    groups = p["feature_group_count"] * p["batch_group_count"]
    k_in, n = rhs[rhs_spec[1]], out[out_spec[1]]
    valid = positions = window = 1
    for i, (a, b, c) in enumerate(zip(lhs_spec[2:], rhs_spec[2:], out_spec[2:], strict=True)):
        valid *= valid_positions(
            lhs[a],
            rhs[b],
            out[c],
            p["window_strides"][i],
            p["padding"][i][0],
            p["lhs_dilation"][i],
            p["rhs_dilation"][i],
        )
        positions *= out[c]
        window *= rhs[b]
    rows = out[out_spec[0]]
    return Product("conv", groups, rows * positions, n // groups, k_in * window, 2 * rows * n * k_in * valid)


def valid_positions(
    size: int, window: int, out: int, stride: int, pad_low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Pairs of an output position and a window position that fall on data, not on padding or a dilation's hole.

    >>> valid_positions(size=4, window=3, out=4, stride=1, pad_low=1, lhs_dilation=1, rhs_dilation=1)
    10
    """
    at = np.arange(out)[:, None] * stride + np.arange(window)[None, :] * rhs_dilation - pad_low
    return int(np.count_nonzero((at >= 0) & (at <= (size - 1) * lhs_dilation) & (at % lhs_dilation == 0)))


def arithmetic(eqn: JaxprEqn) -> tuple[int, int]:
    """Flops and transcendental operations of an equation that is no product, for one execution."""
    name = eqn.primitive.name
    out = math.prod(shape_of(eqn.outvars[0])) if eqn.outvars else 0
    source = math.prod(shape_of(eqn.invars[0])) if eqn.invars else 0
    if name in FREE:
        return 0, 0
    if name in TRANSCENDENTAL:
        return 0, out
    if name == "integer_pow":
        return _multiplications(eqn.params["y"]) * out, 0
    if name.startswith(("random_bits", "threefry", "rng_bit", "rng_uniform")):
        return RANDOM_FLOPS_PER_WORD * out, 0
    if name in _ELEMENTWISE:
        return out, 0
    if name.startswith("reduce_window") or name == "select_and_gather_add":
        return out * math.prod(eqn.params["window_dimensions"]), 0
    if name.startswith(("reduce_", "arg")) and name != "reduce_precision":
        return max(source - out, 0), 0
    if name.startswith("cum"):
        return out, 0
    if name in {"sort", "top_k", "approx_top_k"}:
        return source * max(1, math.ceil(math.log2(max(2, shape_of(eqn.invars[0])[-1])))), 0
    if name.startswith("scatter") and name != "scatter":
        return math.prod(shape_of(eqn.invars[2])), 0
    if name.startswith("select_and_scatter"):
        return source * math.prod(eqn.params["window_dimensions"]), 0
    return 0, 0


_ELEMENTWISE = frozenset(ELEMENTWISE)


def _multiplications(power: int) -> int:
    """Of raising to a whole power by squaring; a negative one divides at the end."""
    bits = bin(abs(power))[2:]
    return len(bits) - 1 + bits.count("1") - 1 + (power < 0) if power else 0
