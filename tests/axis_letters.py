"""What inference found about a function, written like an einsum.

    letters(jnp.dot, f32(2, 3), f32(3, 4)) == "ab bc -> ac"

Letters are axes in order of appearance; `1` is a dimension of size 1, `(ab)` a dimension made of two axes, `[a|b]` a
concatenation, `.` an array without dimensions.
"""

import string

import jax
import jax.numpy as jnp

from sharding_rules import trace
from sharding_rules.axes import infer_axes, leaves


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def infer(fn, *args):
    """The table of axes; the first argument is called `params`, the second `batch`."""
    names = ("params", "batch", *(f"arg{i}" for i in range(2, len(args))))[: len(args)]
    return infer_axes(trace(fn, *args, names=names))


def letters(fn, *args):
    """Axes of all inputs and outputs, as letters."""
    return table_letters(infer(fn, *args))


def table_letters(table):
    names = {}

    def axis_name(axis):
        if axis.segments is not None:
            return "[" + "|".join(dim_name(segment) for segment in axis.segments) + "]"
        return names.setdefault(axis, string.ascii_letters[len(names)])

    def dim_name(dim):
        parts = [axis_name(axis) for axis in leaves(dim) if axis.size > 1]
        return "1" if not parts else parts[0] if len(parts) == 1 else f"({''.join(parts)})"

    def array_name(dims):
        return "".join(dim_name(dim) for dim in dims) or "."

    inputs = [array_name(dims) for name in table.traced.names for dims in table.inputs(name)]
    return " ".join(inputs) + " -> " + " ".join(array_name(dims) for dims in table.outputs())
