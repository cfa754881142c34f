"""One small rule per primitive: how the dimensions of its operands and results relate.

A rule takes the `Inference` and the `Equation` and returns the dimensions of the results, joining axes on the way:

    @rule("transpose")
    def transpose(inf, eq):
        (x,) = eq.ins
        return [tuple(x[i] for i in eq.params["permutation"])]

To teach the toolkit a new primitive, write such a function, in user code too: `@rule("my_kernel")`. A primitive with no
rule gets fresh axes and is listed by `explain`; nothing fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

from sharding_rules.axes import (
    BATCH,
    COUNTED,
    PARAM,
    Called,
    Contraction,
    Dim,
    Dims,
    Equation,
    Inference,
    leaves,
    shape_of,
    size_of,
)

RULES: dict[str, Callable[[Inference, Equation], Any]] = {}


def rule(*names: str) -> Callable[..., Any]:
    """Register a rule for one or more primitives."""

    def register(fn: Callable[[Inference, Equation], Any]) -> Callable[[Inference, Equation], Any]:
        for name in names:
            RULES[name] = fn
        return fn

    return register


# Elementwise.


ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
    complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to
    max min mul name ne neg nextafter not one_minus_square or polygamma population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32 xor zeta
""".split()


@rule(*ELEMENTWISE)
def elementwise(inf: Inference, eq: Equation) -> list[Dims]:
    """Operands of the result's shape share its axes; scalars and size-1 dimensions join nothing."""
    outs = []
    for shape in eq.out_shapes:
        out: list[Dim] = [()] * len(shape)
        for dims, in_shape in zip(eq.ins, eq.in_shapes, strict=True):
            if len(in_shape) != len(shape):
                continue
            for i, dim in enumerate(dims):
                if in_shape[i] != shape[i] or not dim:
                    continue
                if out[i]:
                    inf.unify(out[i], dim, f"{eq.eqn.primitive.name} at dimension {i}")
                else:
                    out[i] = dim
        outs.append(tuple(dim or inf.axes.fresh(size) for dim, size in zip(out, shape, strict=True)))
    return outs


@rule(
    "optimization_barrier",
    "sharding_constraint",
    "device_put",
    "pvary",
    "pcast",
    "pbroadcast",
    "reshard",
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "ppermute",
    "mesh_cast",
)
def pass_through(inf: Inference, eq: Equation) -> list[Dims]:
    """Each result is its operand."""
    return list(eq.ins)


@rule("bitcast_convert_type")
def bitcast(inf: Inference, eq: Equation) -> list[Dims] | None:
    return list(eq.ins) if eq.in_shapes == eq.out_shapes else None


@rule(
    "iota",
    "rng_bit_generator",
    "rng_uniform",
    "random_bits",
    "random_seed",
    "random_split",
    "random_fold_in",
    "random_wrap",
    "random_unwrap",
    "random_clone",
    "axis_index",
    "empty",
    "empty2",
    "create_token",
    "full",
    "debug_callback",
    "debug_print",
    "all_to_all",
)
def fresh(inf: Inference, eq: Equation) -> list[Dims]:
    """New axes: an iota or random numbers take the axes of what they are combined with."""
    return [inf.fresh(shape) for shape in eq.out_shapes]


@rule("random_gamma")
def random_gamma(inf: Inference, eq: Equation) -> list[Dims]:
    """Keys and shape parameters to samples, element by element."""
    return [eq.ins[1]]


@rule("psum_scatter", "reduce_scatter", "all_gather", "all_gather_invariant")
def gathered(inf: Inference, eq: Equation) -> list[Dims]:
    """The dimension that is gathered or scattered gets an axis of its own."""
    if len(eq.in_shapes[0]) != len(eq.out_shapes[0]):
        return [inf.fresh(eq.out_shapes[0])]
    return [_window(inf, eq.ins[0], eq.in_shapes[0], eq.out_shapes[0])]


# Shape changes.


@rule("broadcast_in_dim")
def broadcast_in_dim(inf: Inference, eq: Equation) -> list[Dims]:
    (shape,) = eq.out_shapes
    source = dict(zip(eq.params["broadcast_dimensions"], eq.ins[0], strict=True))
    return [tuple(source.get(i) or inf.axes.fresh(size) for i, size in enumerate(shape))]


@rule("reshape")
def reshape(inf: Inference, eq: Equation) -> list[Dims]:
    """Match runs of dimensions with equal products; a run's axes are dealt out again, split where a cut asks for it."""
    (shape,), (source,) = eq.out_shapes, eq.in_shapes
    if 0 in shape:
        return [inf.fresh(shape)]
    out: list[Dim] = []
    i = o = 0
    while o < len(shape) or i < len(source):
        ins, outs = [i], [o]
        i, o = i + 1, o + 1
        have = source[ins[0]] if ins[0] < len(source) else 1
        want = shape[outs[0]] if outs[0] < len(shape) else 1
        while have != want:
            if have < want:
                have *= source[i]
                ins.append(i)
                i += 1
            else:
                want *= shape[o]
                outs.append(o)
                o += 1
        run: Dim = tuple(axis for k in ins if k < len(source) for axis in eq.ins[0][k])
        outs = [k for k in outs if k < len(shape)]
        for k in outs:
            cut = inf.axes.take(run, shape[k])
            if cut is None:
                inf.notes.append(
                    f"reshape {source} -> {shape}: dimension {k} cuts inside an axis; it gets an axis of its own"
                )
                out.extend(inf.fresh([shape[j] for j in outs[len(out) - outs[0] :]]))
                break
            out.append(cut[0])
            run = cut[1]
    return [tuple(out)]


@rule("tile")
def tile(inf: Inference, eq: Equation) -> list[Dims]:
    """Repetitions are a factor in front of the dimension."""
    return [tuple((*inf.axes.fresh(n), *dim) for dim, n in zip(eq.ins[0], eq.params["reps"], strict=True))]


@rule("unstack")
def unstack(inf: Inference, eq: Equation) -> list[Dims]:
    (x,), axis = eq.ins, eq.params["axis"]
    inf.mark("indexed", x[axis])
    return [(*x[:axis], *x[axis + 1 :]) for _ in eq.out_shapes]


@rule("transpose")
def transpose(inf: Inference, eq: Equation) -> list[Dims]:
    (x,) = eq.ins
    return [tuple(x[i] for i in eq.params["permutation"])]


@rule("squeeze")
def squeeze(inf: Inference, eq: Equation) -> list[Dims]:
    (x,), gone = eq.ins, {d % max(len(eq.in_shapes[0]), 1) for d in eq.params["dimensions"]}
    return [tuple(dim for i, dim in enumerate(x) if i not in gone)]


@rule("expand_dims")
def expand_dims(inf: Inference, eq: Equation) -> list[Dims]:
    kept = iter(eq.ins[0])
    return [tuple(() if i in eq.params["dimensions"] else next(kept) for i in range(len(eq.out_shapes[0])))]


@rule("rev", "cumprod", "cummax", "cummin", "cumlogsumexp")
def same_dims(inf: Inference, eq: Equation) -> list[Dims]:
    return [eq.ins[0]]


@rule("cumsum")
def cumsum(inf: Inference, eq: Equation) -> Called:
    """A running count over the batch (of tokens that are not masked) numbers positions."""
    origin = eq.origins[0]
    return Called([eq.ins[0]], [origin | COUNTED if origin == BATCH else origin])


@rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"
)
def reduce(inf: Inference, eq: Equation) -> list[Dims]:
    (x,) = eq.ins
    if eq.eqn.primitive.name == "reduce_max":
        for i in eq.params["axes"]:
            inf.mark("softmax", x[i])
    return [tuple(dim for i, dim in enumerate(x) if i not in eq.params["axes"])]


@rule("reduce")
def reduce_generic(inf: Inference, eq: Equation) -> list[Dims]:
    kept = tuple(dim for i, dim in enumerate(eq.ins[0]) if i not in eq.params["dimensions"])
    return [kept for _ in eq.out_shapes]


@rule("split")
def split(inf: Inference, eq: Equation) -> list[Dims]:
    """A dimension that is split is a concatenation of what comes out."""
    (x,), axis, sizes = eq.ins, eq.params["axis"], eq.params["sizes"]
    pieces = _pieces(inf, x[axis], sizes)
    return [tuple(piece if i == axis else dim for i, dim in enumerate(x)) for piece in pieces]


@rule("concatenate")
def concatenate(inf: Inference, eq: Equation) -> list[Dims]:
    axis = eq.params["dimension"]
    out = list(eq.ins[0])
    for other in eq.ins[1:]:
        for i, dim in enumerate(other):
            if i != axis and dim:
                if out[i]:
                    inf.unify(out[i], dim)
                else:
                    out[i] = dim
    out[axis] = inf.axes.concatenated([dims[axis] for dims in eq.ins], [shape[axis] for shape in eq.in_shapes])
    return [tuple(out)]


@rule("slice")
def slice_(inf: Inference, eq: Equation) -> list[Dims]:
    """Slices of one array that tile a dimension split it into segments; a strided slice keeps the major factor;
    any other slice is a window, with an axis of its own."""
    (x,), (shape,), (source,) = eq.ins, eq.out_shapes, eq.in_shapes
    strides = eq.params["strides"] or (1,) * len(shape)
    starts, limits = eq.params["start_indices"], eq.params["limit_indices"]
    out: list[Dim] = []
    for i, dim in enumerate(x):
        if shape[i] == source[i]:
            out.append(dim)
        elif strides[i] > 1 and source[i] == shape[i] * strides[i] and (cut := inf.axes.take(dim, shape[i])):
            out.append(cut[0])
        elif shape[i] == 1:
            inf.mark("indexed", dim)
            out.append(())
        elif strides[i] == 1 and (cuts := _tiling(eq, i)):
            pieces = _pieces(inf, dim, [b - a for a, b in itertools.pairwise(cuts)])
            out.append(pieces[cuts.index(starts[i])])
        else:
            inf.mark("window", dim)
            out.append(inf.axes.fresh(limits[i] - starts[i]) if strides[i] == 1 else inf.axes.fresh(shape[i]))
    return [tuple(out)]


def _tiling(eq: Equation, dimension: int) -> list[int] | None:
    """Cut points of a dimension, if all slices of this array along it are disjoint; None if they overlap."""
    (var,) = eq.eqn.invars
    size = shape_of(var)[dimension]
    spans = set()
    for other in eq.scope.jaxpr.eqns:
        if other.primitive.name == "slice" and other.invars[0] is var:
            span = (other.params["start_indices"][dimension], other.params["limit_indices"][dimension])
            if span != (0, size):
                spans.add(span)
    ordered = sorted(spans)
    if len(ordered) < 2 or any(b[0] < a[1] for a, b in itertools.pairwise(ordered)):
        return None
    return sorted({0, size, *(edge for span in ordered for edge in span)})


def _pieces(inf: Inference, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Axes of the consecutive pieces of a dimension."""
    if not dim:
        return [() for _ in sizes]
    now = leaves(dim)
    if len(now) == 1 and now[0].segments is not None and [size_of(s) for s in now[0].segments] == list(sizes):
        return list(now[0].segments)
    if len(now) > 1 and len(set(sizes)) == 1 and now[0].size == len(sizes):
        return [now[1:] for _ in sizes]
    pieces = [inf.axes.fresh(size) for size in sizes]
    whole = inf.axes.concatenated(pieces, sizes)
    if len(now) == 1:
        inf.unify(dim, whole)
    else:
        inf.notes.append(
            f"split of {size_of(dim)} into {list(sizes)} cuts across factors {[a.size for a in now]}; left apart"
        )
    return pieces


@rule("pad")
def pad(inf: Inference, eq: Equation) -> list[Dims]:
    out = []
    for dim, size, (low, high, interior) in zip(eq.ins[0], eq.out_shapes[0], eq.params["padding_config"], strict=True):
        out.append(dim if (low, high, interior) == (0, 0, 0) else inf.axes.fresh(size))
    return [tuple(out)]


@rule("dynamic_slice")
def dynamic_slice(inf: Inference, eq: Equation) -> list[Dims]:
    return [_window(inf, eq.ins[0], eq.in_shapes[0], eq.out_shapes[0])]


@rule("dynamic_update_slice")
def dynamic_update_slice(inf: Inference, eq: Equation) -> list[Dims]:
    x, update = eq.ins[:2]
    for a, b, n, m in zip(x, update, *eq.in_shapes[:2], strict=True):
        if n == m:
            inf.unify(a, b)
    return [x]


def _window(inf: Inference, dims: Dims, source: Sequence[int], shape: Sequence[int]) -> Dims:
    return tuple(d if n == m else inf.axes.fresh(m) for d, n, m in zip(dims, source, shape, strict=True))


# Indexing, sorting.


@rule("gather")
def gather(inf: Inference, eq: Equation) -> list[Dims]:
    (x, indices), numbers, sizes = eq.ins, eq.params["dimension_numbers"], eq.params["slice_sizes"]
    (source, _), (shape,) = eq.in_shapes, eq.out_shapes
    for i in numbers.start_index_map:
        if sizes[i] != source[i]:
            counted = not eq.origins[1] & BATCH or eq.origins[1] & COUNTED
            kind = "position" if counted else "table" if eq.origins[0] == PARAM else "label"
            inf.mark(kind, x[i])
    for a, b in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        if x[a] and indices[b]:
            inf.unify(x[a], indices[b])
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offset = iter([i for i in range(len(source)) if i not in gone])
    batch = iter(indices[:-1])
    out: list[Dim] = []
    for i, size in enumerate(shape):
        if i in numbers.offset_dims:
            k = next(offset)
            out.append(x[k] if sizes[k] == source[k] else inf.axes.fresh(size))
        else:
            out.append(next(batch) or inf.axes.fresh(size))
    return [tuple(out)]


@rule(
    "scatter",
    "scatter-add",
    "scatter_add",
    "scatter-mul",
    "scatter_mul",
    "scatter-min",
    "scatter_min",
    "scatter-max",
    "scatter_max",
    "scatter-sub",
    "scatter_sub",
)
def scatter(inf: Inference, eq: Equation) -> list[Dims]:
    (x, indices, updates), numbers = eq.ins, eq.params["dimension_numbers"]
    source, update_shape = eq.in_shapes[0], eq.in_shapes[2]
    for a, b in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        if x[a] and indices[b]:
            inf.unify(x[a], indices[b])
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = iter([i for i in range(len(source)) if i not in gone])
    batch = iter(indices[:-1])
    for i, dim in enumerate(updates):
        if i in numbers.update_window_dims:
            k = next(window)
            if source[k] == update_shape[i] and x[k] and dim:
                inf.unify(x[k], dim)
        else:
            other = next(batch)
            if other and dim:
                inf.unify(other, dim)
    return [x]


@rule("sort")
def sort(inf: Inference, eq: Equation) -> list[Dims]:
    first = eq.ins[0]
    for other in eq.ins[1:]:
        inf.unify_all(first, other)
    return [first for _ in eq.out_shapes]


@rule("top_k", "approx_top_k")
def top_k(inf: Inference, eq: Equation) -> list[Dims]:
    along = eq.params.get("axis", eq.params.get("reduction_dimension", -1)) % len(eq.in_shapes[0])
    kept = inf.axes.fresh(eq.out_shapes[0][along])
    return [tuple(kept if i == along else dim for i, dim in enumerate(eq.ins[0])) for _ in eq.out_shapes]


# Contractions.


@rule("dot_general")
def dot_general(inf: Inference, eq: Equation) -> list[Dims]:
    (lhs, rhs), ((lc, rc), (lb, rb)) = eq.ins, eq.params["dimension_numbers"]
    for i, j in zip((*lb, *lc), (*rb, *rc), strict=True):
        if lhs[i] and rhs[j]:
            inf.unify(lhs[i], rhs[j], "dot_general")
    out = (
        tuple(lhs[i] for i in lb)
        + tuple(dim for i, dim in enumerate(lhs) if i not in (*lb, *lc))
        + tuple(dim for i, dim in enumerate(rhs) if i not in (*rb, *rc))
    )
    flops = 2 * math.prod(eq.out_shapes[0]) * math.prod(eq.in_shapes[0][i] for i in lc) * eq.scope.trips
    _contraction(inf, eq, "dot", out, tuple(lhs[i] for i in lb), tuple(lhs[i] for i in lc), flops)
    return [out]


@rule("ragged_dot_general")
def ragged_dot(inf: Inference, eq: Equation) -> list[Dims]:
    """A product in which runs of rows (their lengths are the third operand) each have a matrix of their own.

    Where the runs are contracted, as in the weights' gradient, each gives a matrix: the result gains the groups' axis.
    """
    lhs, rhs, groups = eq.ins[:3]
    numbers = eq.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    for i, j in zip((*lb, *lc), (*rb, *rc), strict=True):
        if lhs[i] and rhs[j]:
            inf.unify(lhs[i], rhs[j], "ragged_dot_general")
    group = groups[-1]
    for i in numbers.rhs_group_dimensions:
        if group and rhs[i]:
            inf.unify(group, rhs[i])
        inf.mark("group", rhs[i])
    shared = (*rb, *rc, *numbers.rhs_group_dimensions)
    out = (
        *((group,) if set(numbers.lhs_ragged_dimensions) & set(lc) else ()),
        *(lhs[i] for i in lb),
        *(dim for i, dim in enumerate(lhs) if i not in (*lb, *lc)),
        *(dim for i, dim in enumerate(rhs) if i not in shared),
    )
    # Every row meets one matrix: the rows' own products, however they fall into groups.
    rows = math.prod(eq.in_shapes[0])
    flops = 2 * rows * math.prod(n for i, n in enumerate(eq.in_shapes[1]) if i not in shared) * eq.scope.trips
    _contraction(inf, eq, "ragged", out, tuple(lhs[i] for i in lb), tuple(lhs[i] for i in lc), flops)
    return [out]


def _contraction(
    inf: Inference, eq: Equation, kind: str, out: Dims, batch: tuple[Dim, ...], contracted: tuple[Dim, ...], flops: int
) -> None:
    lhs_key, rhs_key = (None if isinstance(atom, Literal) else atom for atom in eq.eqn.invars[:2])
    inf.contractions.append(
        Contraction(
            kind,
            eq.ins[0],
            eq.ins[1],
            out,
            batch,
            contracted,
            eq.origins[0],
            eq.origins[1],
            lhs_key,
            rhs_key,
            eq.eqn.outvars[0],
            flops,
            eq.scope.trips,
        )
    )


@rule("conv_general_dilated")
def conv_general_dilated(inf: Inference, eq: Equation) -> list[Dims]:
    """Channels contract; a spatial dimension keeps its axis, or the part of it that the stride leaves."""
    (lhs, rhs), p = eq.ins, eq.params
    (lhs_spec, rhs_spec, out_spec), groups = p["dimension_numbers"], p["feature_group_count"]
    out: list[Dim] = list(inf.fresh(eq.out_shapes[0]))
    feature, kernel_in, kernel_out = lhs[lhs_spec[1]], rhs[rhs_spec[1]], rhs[rhs_spec[0]]
    out[out_spec[1]] = kernel_out
    if p["batch_group_count"] == 1:
        out[out_spec[0]] = lhs[lhs_spec[0]]
    if groups == 1:
        inf.unify(feature, kernel_in, "convolution")
    else:
        ins, outs = inf.axes.take(feature, groups), inf.axes.take(kernel_out, groups)
        if ins and outs:
            inf.unify(ins[0], outs[0])
            if ins[1] and kernel_in:
                inf.unify(ins[1], kernel_in)
    for k, (a, b) in enumerate(zip(lhs_spec[2:], out_spec[2:], strict=True)):
        out[b] = _strided(
            inf, lhs[a], eq.in_shapes[0][a], eq.out_shapes[0][b], p["window_strides"][k], p["lhs_dilation"][k]
        )
        inf.mark("spatial", lhs[a])
        inf.mark("spatial", out[b])
        inf.mark("window", rhs[rhs_spec[2 + k]])
    inf.mark("channel", feature)
    inf.mark("channel", kernel_out)
    window = math.prod(eq.in_shapes[1][i] for i in rhs_spec[1:])
    flops = 2 * math.prod(eq.out_shapes[0]) * window * eq.scope.trips // math.prod(p["lhs_dilation"])
    _contraction(inf, eq, "conv", tuple(out), (), (feature,) if groups == 1 else (), flops)
    return [tuple(out)]


@rule(
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "reduce_window",
    "select_and_gather_add",
    "cumred_reduce_window_impl",
)
def reduce_window(inf: Inference, eq: Equation) -> list[Dims]:
    strides = eq.params["window_strides"]
    out = tuple(
        _strided(inf, dim, n, m, s, 1) if (n, s) != (m, 1) else dim
        for dim, n, m, s in zip(eq.ins[0], eq.in_shapes[0], eq.out_shapes[0], strides, strict=True)
    )
    return [out for _ in eq.out_shapes]


@rule("select_and_scatter_add", "select_and_scatter")
def select_and_scatter(inf: Inference, eq: Equation) -> list[Dims]:
    """The gradient of pooling: shaped like what was pooled."""
    return [next(dims for dims, shape in zip(eq.ins, eq.in_shapes, strict=True) if shape == eq.out_shapes[0])]


def _strided(inf: Inference, dim: Dim, size: int, out_size: int, stride: int, dilation: int) -> Dim:
    if size == out_size and stride == dilation == 1:
        return dim
    if size == out_size * stride and (cut := inf.axes.take(dim, out_size)):
        return cut[0]
    if out_size == size * dilation:
        return (*dim, *inf.axes.fresh(dilation))
    return inf.axes.fresh(out_size)
