"""Logical axes: which dimensions of which arrays are the same thing.

    table = infer_axes(trace(loss, params, batch, names=("params", "batch")))
    table.inputs("params")      # dimensions of every parameter, as tuples of axes

A dimension is a tuple of axes, major to minor: `embed -> (kv_heads, groups, head_dim)` is one dimension of three axes,
and a dimension of size 1 is the empty tuple, equal to nothing by itself. Axes are joined by data flow alone
(`primitives.py` says how each primitive relates its operands and results); sizes never join anything. Two more forms:

* a *split* axis was found to be a product: it stands for its parts, major to minor;
* a *segmented* axis is a concatenation (a fused QKV, the gates of an LSTM): it stays one axis and knows its segments.

The algorithm is unification (Robinson 1965) over a union-find forest, extended with splitting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from sharding_rules.inline import Found, inline_calls
from sharding_rules.trace import TracedFunction, tree_paths

PARAM = 1
BATCH = 2
COUNTED = 4
"""Where a value comes from: bits of `Scope.origin`. A value with PARAM alone is a weight, with both an activation;
COUNTED marks what is a running count over the batch and no weight: positions among what is not masked.
"""


def join_origins(origins: Iterable[int]) -> int:
    """Where a value made of several comes from."""
    joined = 0
    for origin in origins:
        joined |= origin
    return joined & ~COUNTED if joined & PARAM else joined


class Axis:
    """A node of the forest. `parent` after a join, `parts` after a split, `segments` if it is a concatenation."""

    __slots__ = ("index", "parent", "parts", "segments", "size")

    def __init__(self, index: int, size: int):
        self.index = index
        self.size = size
        self.parent: Axis | None = None
        self.parts: tuple[Axis, ...] | None = None
        self.segments: tuple[Dim, ...] | None = None

    def __repr__(self) -> str:
        return f"a{self.index}:{self.size}"


Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]
"""One `Dim` per dimension of an array."""


def find(axis: Axis) -> Axis:
    while axis.parent is not None:
        if axis.parent.parent is not None:
            axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def leaves(dim: Sequence[Axis]) -> Dim:
    """The axes a dimension is made of now, major to minor."""
    out: list[Axis] = []
    for axis in dim:
        axis = find(axis)
        if axis.parts is None:
            out.append(axis)
        else:
            out.extend(leaves(axis.parts))
    return tuple(out)


def size_of(dim: Sequence[Axis]) -> int:
    return math.prod(axis.size for axis in dim)


class Unifier:
    """Makes axes, joins them and splits them."""

    def __init__(self):
        self.count = 0

    def fresh(self, size: int) -> Dim:
        """A new dimension; sizes 0 and 1 carry no axis."""
        if size <= 1:
            return ()
        self.count += 1
        return (Axis(self.count, int(size)),)

    def fresh_dims(self, shape: Sequence[int]) -> Dims:
        return tuple(self.fresh(size) for size in shape)

    def concatenated(self, segments: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """The dimension made of `segments` one after the other; sizes are theirs."""
        parts = [(segment, size) for segment, size in zip(segments, sizes, strict=True) if size]
        if len(parts) == 1:
            return parts[0][0]
        dim = self.fresh(sum(sizes))
        if dim:
            # A segment of size 1 has no axis of its own: give it one, so that sizes add up.
            dim[0].segments = tuple(segment or (Axis(0, size),) for segment, size in parts)
        return dim

    def unify(self, a: Sequence[Axis], b: Sequence[Axis]) -> bool:
        """Join two dimensions of equal size, splitting axes where one is finer. False where they cannot be aligned."""
        left, right = list(leaves(a)), list(leaves(b))
        while left and right:
            x, y = find(left[0]), find(right[0])
            if x.parts is not None or y.parts is not None:
                left[:1], right[:1] = leaves((x,)), leaves((y,))
            elif x is y:
                del left[0], right[0]
            elif x.size == y.size:
                self._join(x, y)
                del left[0], right[0]
            else:
                large, small = (x, y) if x.size > y.size else (y, x)
                if large.size % small.size or not self._split(large, small.size):
                    return False
        return not left and not right

    def take(self, dim: Sequence[Axis], size: int) -> tuple[Dim, Dim] | None:
        """Split a dimension into its major `size` and the rest; None if the cut falls inside no axis cleanly."""
        head: list[Axis] = []
        rest = list(leaves(dim))
        while size > 1:
            if not rest:
                return None
            axis = rest[0]
            if size % axis.size == 0:
                head.append(rest.pop(0))
                size //= axis.size
            elif axis.size % size == 0 and self._split(axis, size):
                rest[:1] = leaves((axis,))
            else:
                return None
        return tuple(head), tuple(rest)

    def _join(self, x: Axis, y: Axis) -> None:
        if x.segments is not None and y.segments is not None:
            self._join_segments(x.segments, y.segments)
        keep, drop = (x, y) if x.segments is not None else (y, x)
        drop.parent = keep

    def _join_segments(self, a: tuple[Dim, ...], b: tuple[Dim, ...]) -> None:
        """Join segments pairwise; where one side cuts finer, its segments become a concatenation of their own.

        Cuts that cross (a roll, a shift) say nothing more than that the whole is one axis, so they are left alone.
        """
        if len(a) > len(b):
            a, b = b, a
        fine = iter(b)
        pairs: list[tuple[Dim, list[Dim]]] = []
        for segment in a:
            group: list[Dim] = []
            missing = size_of(segment)
            while missing > 0:
                group.append(next(fine))
                missing -= size_of(group[-1])
            if missing < 0:
                return
            pairs.append((segment, group))
        for segment, group in pairs:
            whole = group[0] if len(group) == 1 else self.concatenated(group, [size_of(part) for part in group])
            if size_of(segment) > 1:
                self.unify(segment, whole)

    def _split(self, axis: Axis, major: int) -> bool:
        """Split an axis into `major` and the rest. A concatenation of equal segments splits between its segments."""
        if axis.segments is None:
            axis.parts = (*self.fresh(major), *self.fresh(axis.size // major))
            return True
        count = len(axis.segments)
        first = axis.segments[0]
        if any(size_of(segment) != size_of(first) for segment in axis.segments) or (major % count and count % major):
            return False
        segments, axis.segments = axis.segments, None
        axis.parts = (*self.fresh(count), *first)
        for other in segments[1:]:
            self.unify(first, other)
        return True


@dataclasses.dataclass
class Scope:
    """One call of one jaxpr: the dimensions and origin of its variables, and the scopes of the calls inside.

    A jaxpr called twice has two scopes: what flows through one call says nothing about the other.
    """

    jaxpr: Jaxpr
    dims: dict[Var, Dims] = dataclasses.field(default_factory=dict)
    origin: dict[Var, int] = dataclasses.field(default_factory=dict)
    children: dict[int, list[Scope]] = dataclasses.field(default_factory=dict)
    trips: int = 1
    """How many times the body runs in one evaluation of the whole function."""
    opaque: bool = False
    """Inside a custom gradient or a kernel: read, never rewritten."""

    def walk(self) -> Iterator[Scope]:
        yield self
        for scopes in self.children.values():
            for scope in scopes:
                yield from scope.walk()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A matrix product or convolution: what roles and assignments are read from.

    Attributes:
        kind: "dot", "ragged" or "conv".
        lhs, rhs, out: dimensions of operands and result.
        batch, contracted: axes that both operands share, kept or summed.
        lhs_origin, rhs_origin: PARAM, BATCH bits.
        lhs_key, rhs_key: identity of the operand: products of one activation share its gradient's sum.
        out_key: identity of the result.
        flops: over the whole evaluation, `trips` times the body's.
    """

    kind: str
    lhs: Dims
    rhs: Dims
    out: Dims
    batch: tuple[Dim, ...]
    contracted: tuple[Dim, ...]
    lhs_origin: int
    rhs_origin: int
    lhs_key: Any
    rhs_key: Any
    out_key: Any
    flops: int
    trips: int

    @property
    def weight(self) -> Dims | None:
        """The operand that is a weight, when the other is not one."""
        if self.rhs_origin == PARAM and self.lhs_origin != PARAM:
            return self.rhs
        if self.lhs_origin == PARAM and self.rhs_origin != PARAM:
            return self.lhs
        return None


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something a rule saw about one axis: `kind` is "layers", "table", "position", "spatial", "group", "softmax",
    ...
    """

    kind: str
    dim: Dim


@dataclasses.dataclass
class AxisTable:
    """The result of inference.

    Attributes:
        traced: the function, with its calls written out.
        scope: dimensions of every variable, call by call.
        contractions, marks: what the rules saw.
        unknown: primitives without a rule, or used as their rule does not foresee, with how often they occur; their
            results got fresh axes.
        notes: what could not be aligned, in words.
        keys: variable -> its dimensions along the keys of attention (`scores`).
        calls: of `attention` and `experts`, by the first variable that each one makes.
    """

    traced: TracedFunction
    scope: Scope
    contractions: list[Contraction]
    marks: list[Mark]
    unknown: dict[str, int]
    notes: list[str]
    keys: dict[Var, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    calls: Found = dataclasses.field(default_factory=dict)

    def inputs(self, name: str) -> list[tuple[Dim, ...]]:
        """Dimensions of the leaves of one argument, in leaf order, as the axes they are made of."""
        variables = self.scope.jaxpr.invars[self.traced.arg_slice(name)]
        return [tuple(leaves(dim) for dim in self.scope.dims[var]) for var in variables]

    def paths(self, name: str) -> list[str]:
        return tree_paths(self.traced.arg(name))

    def outputs(self) -> list[tuple[Dim, ...]]:
        """Dimensions of the leaves of the result."""
        return [
            tuple(leaves(dim) for dim in self.scope.dims[var]) if isinstance(var, Var) else ((),) * len(shape_of(var))
            for var in self.scope.jaxpr.outvars
        ]


class Inference:
    """State of one inference; what a primitive's rule gets as its first argument."""

    def __init__(self, rules: dict[str, Callable[..., Any]], call_rule: Callable[..., Any]):
        self.axes = Unifier()
        self.rules = rules
        self.call_rule = call_rule
        self.contractions: list[Contraction] = []
        self.marks: list[Mark] = []
        self.unknown: dict[str, int] = {}
        self.notes: list[str] = []

    # What rules use.

    def fresh(self, shape: Sequence[int]) -> Dims:
        return self.axes.fresh_dims(shape)

    def unify(self, a: Dim, b: Dim, why: str = "") -> None:
        if not self.axes.unify(a, b) and why:
            self.notes.append(f"{why}: {size_of(a)} and {size_of(b)} have no common factors in order; left apart")

    def unify_all(self, a: Dims, b: Dims) -> None:
        """Join two arrays dimension by dimension, where neither dimension is broadcast."""
        for x, y in zip(a, b, strict=True):
            if x and y:
                self.unify(x, y)

    def mark(self, kind: str, dim: Dim) -> None:
        if dim:
            self.marks.append(Mark(kind, dim))

    def call(
        self,
        parent: Scope,
        position: int,
        jaxpr: Jaxpr | ClosedJaxpr,
        dims: Sequence[Dims],
        origins: Sequence[int],
        *,
        trips: int = 1,
        opaque: bool = False,
    ) -> tuple[list[Dims], list[int]]:
        """Infer through an inner jaxpr called by equation `position` of `parent`; its results' dimensions and
        origins.
        """
        inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        scope = Scope(inner, trips=parent.trips * trips, opaque=opaque or parent.opaque)
        parent.children.setdefault(position, []).append(scope)
        self.run(scope, dims, origins)
        return [self.read(scope, var) for var in inner.outvars], [self.origin(scope, var) for var in inner.outvars]

    # The walk.

    def read(self, scope: Scope, atom: Var | Literal) -> Dims:
        if isinstance(atom, Literal):
            return self.fresh(shape_of(atom))
        return scope.dims[atom]

    def origin(self, scope: Scope, atom: Var | Literal) -> int:
        return 0 if isinstance(atom, Literal) else scope.origin[atom]

    def run(self, scope: Scope, dims: Sequence[Dims], origins: Sequence[int]) -> None:
        for var in scope.jaxpr.constvars:
            scope.dims[var], scope.origin[var] = self.fresh(shape_of(var)), 0
        for var, dim, origin in zip(scope.jaxpr.invars, dims, origins, strict=True):
            scope.dims[var], scope.origin[var] = dim, origin
        for position, eqn in enumerate(scope.jaxpr.eqns):
            self._equation(scope, position, eqn)

    def _equation(self, scope: Scope, position: int, eqn: JaxprEqn) -> None:
        ins = [self.read(scope, atom) for atom in eqn.invars]
        origins = [self.origin(scope, atom) for atom in eqn.invars]
        rule = self.rules.get(eqn.primitive.name) or (self.call_rule if inner_jaxpr(eqn) is not None else None)
        joined = join_origins(origins)
        outs: Any = None
        out_origins: Sequence[int] | None = None
        if rule is not None:
            outs = rule(self, Equation(scope, position, eqn, ins, origins))
            if isinstance(outs, Called):
                outs, out_origins = outs.dims, outs.origins
        if outs is None:
            self.unknown[eqn.primitive.name] = self.unknown.get(eqn.primitive.name, 0) + 1
            outs = [self.fresh(shape_of(var)) for var in eqn.outvars]
        for i, (var, dims) in enumerate(zip(eqn.outvars, outs, strict=True)):
            scope.dims[var] = dims
            scope.origin[var] = joined if out_origins is None else out_origins[i]


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation as a rule sees it.

    Attributes:
        ins: dimensions of the operands; `origins`: where each comes from.
    """

    scope: Scope
    position: int
    eqn: JaxprEqn
    ins: list[Dims]
    origins: list[int]

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def in_shapes(self) -> list[tuple[int, ...]]:
        return [shape_of(atom) for atom in self.eqn.invars]

    @property
    def out_shapes(self) -> list[tuple[int, ...]]:
        return [shape_of(var) for var in self.eqn.outvars]


@dataclasses.dataclass(frozen=True)
class Called:
    """What a rule returns when results differ in origin, as those of an inner jaxpr do."""

    dims: list[Dims]
    origins: list[int]


def inner_jaxpr(eqn: JaxprEqn) -> Jaxpr | ClosedJaxpr | None:
    """The jaxpr that an equation calls once on exactly its operands, if it is such a call."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, Jaxpr | ClosedJaxpr):
            plain = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            if _shapes(plain.invars) == _shapes(eqn.invars) and _shapes(plain.outvars) == _shapes(eqn.outvars):
                return inner
    return None


def loop_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """Numbers of constants and of carried values among a scan's operands.

    Read off the ranks: what is scanned has one dimension more outside than inside. The parameters that say so differ
    between versions of JAX (`num_consts` and `num_carry`, or trees in `ft_in`).
    """
    body = eqn.params["jaxpr"]
    body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    carry = sum(a == b for a, b in zip(_shapes(eqn.outvars), _shapes(body.outvars), strict=True))
    kept = sum(a == b for a, b in zip(_shapes(eqn.invars), _shapes(body.invars), strict=True))
    return kept - carry, carry


def shape_of(atom: Var | Literal) -> tuple[int, ...]:
    """The shape of a variable; `()` for what has none, such as a token."""
    return getattr(atom.aval, "shape", ())


def _shapes(atoms: Sequence[Var | Literal]) -> list[tuple[int, ...]]:
    return [shape_of(atom) for atom in atoms]


def infer_axes(traced: TracedFunction, *, params: str = "params", batch: str = "batch") -> AxisTable:
    """Find the logical axes of every array of a traced function.

    Args:
        traced: from `trace`.
        params, batch: names of the arguments that hold the parameters and the examples.

    Returns:
        The table; reading it needs no device.
    """
    from sharding_rules import control_flow, primitives
    from sharding_rules.scores import key_dimensions

    inference = Inference(primitives.RULES, control_flow.inline_call)
    found: Found = {}
    traced = dataclasses.replace(traced, jaxpr=inline_calls(traced.jaxpr, found))
    scope = Scope(traced.jaxpr.jaxpr)
    origins: list[int] = []
    for name, arg in zip(traced.names, traced.args, strict=True):
        for leaf in jax.tree.leaves(arg):
            # What is drawn for a step (noise, time steps, dropout) goes with the examples, not with the weights.
            drawn = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            origins.append(PARAM if name == params else BATCH if name == batch or drawn else 0)
    dims = [inference.fresh(shape_of(var)) for var in scope.jaxpr.invars]
    inference.run(scope, dims, origins)
    keys = key_dimensions(scope)
    seen = inference.contractions, inference.marks, inference.unknown, inference.notes
    return AxisTable(traced, scope, *seen, keys, found)
