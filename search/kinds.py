"""What kind of work a primitive is: a view, part of a loop, a product, indexing, a collective."""

from __future__ import annotations

import math

from jax.extend.core import JaxprEqn, Var

from search.liveness import bytes_of
from sharding_rules.axes import shape_of
from sharding_rules.primitives import ELEMENTWISE

VIEWS = frozenset(
    """broadcast_in_dim reshape transpose squeeze expand_dims slice split unstack rev dynamic_slice stop_gradient
    optimization_barrier copy copy_p iota full empty empty2 sharding_constraint reshard device_put pvary pcast
    mesh_cast random_wrap random_unwrap name axis_index create_token""".split()
)
"""Primitives that move nothing: their result is read from their operand, where it lies."""
LOOPS = frozenset({*ELEMENTWISE, "concatenate", "pad", "random_bits", "tile"}) - VIEWS
COLLECTIVES = frozenset(
    """psum psum_invariant pmax pmin ppermute all_gather all_gather_invariant all_to_all ragged_all_to_all
    psum_scatter reduce_scatter pbroadcast""".split()
)


def contracted_dimensions(eqn: JaxprEqn) -> tuple[int, ...]:
    """Dimensions of a product's first operand that are summed over; of a convolution, its channels."""
    match eqn.primitive.name:
        case "conv_general_dilated":
            return (eqn.params["dimension_numbers"].lhs_spec[1],) if eqn.params["feature_group_count"] == 1 else ()
        case "dot_general":
            return tuple(eqn.params["dimension_numbers"][0][0])
        case _:
            return tuple(eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0])


def touched(eqn: JaxprEqn, kind: str, *, fresh: bool) -> tuple[dict[int, int], int | None]:
    """What indexing moves: bytes read of some operands, by position, and bytes written; else all of each.

    What is picked is read and written. What is put is read and written, and added to what was there; `fresh` where that
    is a constant, as in the gradient of a gather: then the whole result is written, and what is put counts twice where
    it is read. The bytes that are picked or put divide as the picked or put array does, not as the whole one.
    """
    if kind == "gather":
        return {0: bytes_of(eqn.outvars[0])}, None
    if kind == "scatter" and not eqn.primitive.name.startswith("select"):
        plain = eqn.primitive.name in ("scatter", "dynamic_update_slice")
        put = _put(eqn)
        update = bytes_of(eqn.invars[put])
        return ({put: 2 * update}, bytes_of(eqn.outvars[0])) if fresh else ({0: 0 if plain else update}, update)
    return {}, None


def touched_like(eqn: JaxprEqn, kind: str) -> Var | None:
    """The array whose axes divide what indexing moves: what is picked, or what is put."""
    if kind == "gather":
        return eqn.outvars[0]
    if kind == "scatter" and not eqn.primitive.name.startswith("select"):
        atom = eqn.invars[_put(eqn)]
        return atom if isinstance(atom, Var) else None
    return None


def _put(eqn: JaxprEqn) -> int:
    return 1 if eqn.primitive.name == "dynamic_update_slice" else 2


def is_view(eqn: JaxprEqn) -> bool:
    """Whether an equation moves nothing: a view, or a reduction over dimensions of size 1."""
    if is_reduction(eqn):
        return math.prod(shape_of(eqn.invars[0])) == math.prod(shape_of(eqn.outvars[0]))
    return eqn.primitive.name in VIEWS


def is_reduction(eqn: JaxprEqn) -> bool:
    """Whether an equation reduces over whole dimensions, and so joins the loop of what it reads."""
    name = eqn.primitive.name
    if name in COLLECTIVES or name.startswith(("reduce_window", "reduce_precision")):
        return False
    return name.startswith(("reduce_", "arg"))


def kind_of(name: str) -> str:
    """The kind of a primitive that is no view and no product."""
    if name in LOOPS:
        return "elementwise"
    if name in COLLECTIVES:
        return "collective"
    if name == "gather":
        return "gather"
    if name.startswith("scatter") or name in {"dynamic_update_slice", "select_and_scatter_add", "select_and_scatter"}:
        return "scatter"
    if name in {"sort", "top_k", "approx_top_k"}:
        return "sort"
    if name.startswith(("reduce", "cum")):
        return "reduce"
    return "other"
