"""A training step as one jaxpr: which of its equations run, and in which phase.

    step = trace_step(traced, remat="full")            # the loss and its backward pass as one jaxpr
    flow = Flow(infer_axes(step))                      # which equations run, and which depend on the cotangent

The cotangent of the loss is an argument of the traced step. The first equation to read it ends the forward pass; after
it, what does not depend on it but is under a `jax.checkpoint` is the forward pass computed again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Var
from jax.sharding import AbstractMesh, Mesh

from sharding_rules import AXES, Layout, MeshShape, TracedFunction, make_layout, trace, trainable
from sharding_rules.axes import AxisTable, Contraction, Dims, Scope, infer_axes, leaves, loop_parts, shape_of

Remat = Literal["none", "dots", "full"]
Phase = Literal["forward", "recompute", "backward"]
Names = tuple[tuple[str, ...], ...]
"""Names of the rows of an array's axes: for each dimension, major to minor."""

COTANGENT = "cotangent"
INNER = "inner"
"""The name of an axis that no row of the loss has: of intermediates only, never sharded."""
CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})


@dataclasses.dataclass
class Step:
    """A traced function with its axes, the names of their rows, and the flow of values.

    Attributes:
        table: axes of the step (or of the function itself, without a gradient).
        layout: the loss on one device, whose rows are those that plans decide.
        flow: which equations run, and in which phase.
    """

    table: AxisTable
    layout: Layout
    flow: Flow
    row_names: dict[Any, str]

    def names(self, dims: Dims) -> Names:
        """Names of the rows of an array's axes."""
        return tuple(tuple(self.row_names.get(axis, INNER) for axis in leaves(dim)) for dim in dims)


def analyse_step(
    traced: TracedFunction,
    *,
    remat: Remat = "none",
    grad: bool = True,
    params: str = "params",
    batch: str = "batch",
) -> Step:
    """Trace the step and infer its axes. See `trace_step` and `row_names`."""
    layout = make_layout(traced, MeshShape(), params=params, batch=batch)
    if not grad:
        if remat != "none":
            raise ValueError(f"remat={remat!r} means nothing without a backward pass: grad=False takes remat='none'")
        return Step(layout.table, layout, Flow(layout.table), row_names(layout, layout.table))
    table = infer_axes(trace_step(layout, remat), params=params, batch=batch)
    return Step(table, layout, Flow(table), row_names(layout, table))


def trace_step(layout: Layout, remat: Remat) -> TracedFunction:
    """Trace the loss and its gradients by the parameters that are trained; needs no device.

    The arguments are those of the loss and one more, the cotangent of the loss. The first leaf of the loss function's
    result is the loss, other leaves are auxiliary.

    Raises:
        ValueError: the result's first leaf is no floating scalar, or no parameter is trained.
    """
    traced = layout.traced
    out = jax.tree.leaves(traced.out)
    if not out or out[0].shape != () or not jnp.issubdtype(out[0].dtype, jnp.floating):
        raise ValueError(f"the gradient of a loss needs a floating scalar as the first result, not {out[:1] or 'none'}")
    position = traced.names.index(layout.params)
    leaves_, structure = jax.tree.flatten(traced.args[position])
    trained = jax.tree.leaves(trainable(traced.args[position]))
    if not any(trained):
        raise ValueError(
            f"none of the {len(leaves_)} leaves of {layout.params!r} is floating and not frozen: nothing to "
            "differentiate"
        )
    # A mesh of one device adds no pins, so that its devices are never asked for.
    mesh = cast(Mesh, AbstractMesh((1,) * len(AXES), AXES))
    pinned = layout.pin(mesh, remat)

    def step(*args: Any) -> Any:
        *given, cotangent = args
        flat = jax.tree.leaves(given[position])

        def loss(moving: list[Any]) -> tuple[Any, Any]:
            values = iter(moving)
            full = [next(values) if ok else leaf for leaf, ok in zip(flat, trained, strict=True)]
            given[position] = jax.tree.unflatten(structure, full)
            first, *rest = jax.tree.leaves(pinned(*given))
            return first, rest

        value, pullback, aux = jax.vjp(loss, [x for x, ok in zip(flat, trained, strict=True) if ok], has_aux=True)
        # The barrier is the first equation to read the cotangent: it ends the forward pass (`Flow.boundary`).
        return value, aux, pullback(jax.lax.optimization_barrier(cotangent))[0]

    cotangent = jax.ShapeDtypeStruct((), out[0].dtype)
    return trace(step, *traced.args, cotangent, names=(*traced.names, COTANGENT))


def row_names(layout: Layout, table: AxisTable) -> dict[Any, str]:
    """Name the axes of a step's table as the rows of the loss, which plans decide on.

    The rows are found on the loss, because the backward products of a step would mislead a reading of roles. Axes are
    matched through the arguments, and then through the products of the forward pass, which both tables list in the same
    order. Axes that neither holds (of a few intermediates) have no row: `Step.names` calls them `inner`.
    """
    if table is layout.table:
        return {axis: row.name for axis, row in layout.rows.by_axis.items()}
    pairs: list[tuple[Any, Any]] = []
    for name in layout.traced.names:
        for ours, theirs in zip(table.inputs(name), layout.table.inputs(name), strict=True):
            pairs += zip(ours, theirs, strict=True)
    for ours, theirs in zip(table.contractions, layout.table.contractions, strict=False):
        for a, b in ((ours.lhs, theirs.lhs), (ours.rhs, theirs.rhs), (ours.out, theirs.out)):
            if len(a) == len(b):
                pairs += zip(a, b, strict=True)
    names: dict[Any, str] = {}
    for ours, theirs in pairs:
        a, b = leaves(ours), leaves(theirs)
        if [x.size for x in a] == [x.size for x in b]:
            for x, y in zip(a, b, strict=True):
                row = layout.rows.of(y)
                if row is not None:
                    names.setdefault(x, row.name)
    _name_recomputed(table.contractions, names)
    return names


def _name_recomputed(contractions: Sequence[Contraction], names: dict[Any, str]) -> None:
    """Name the axes of products that are alike, but for axes without a name, to one whose axes all have names.

    What only intermediates have (the capacity of experts) is made anew where the forward pass is computed again.
    """

    def axes(c: Contraction) -> list[Any]:
        return [axis for dims in (c.lhs, c.rhs, c.out) for dim in dims for axis in leaves(dim)]

    alike: dict[Any, list[list[Any]]] = {}
    partial: list[tuple[Any, list[Any]]] = []
    for c in contractions:
        shape = (c.kind, tuple(len(leaves(dim)) for dims in (c.lhs, c.rhs, c.out) for dim in dims))
        found = axes(c)
        key = (shape, tuple(axis.size for axis in found))
        if all(axis in names for axis in found):
            alike.setdefault(key, []).append(found)
        else:
            partial.append((key, found))
    for key, found in partial:
        for other in alike.get(key, ()):
            if all(x not in names or names[x] == names[y] for x, y in zip(found, other, strict=True)):
                names.update((x, names[y]) for x, y in zip(found, other, strict=True))
                break


# The flow of values through calls.


@dataclasses.dataclass(frozen=True)
class Call:
    """An inner jaxpr of an equation: which operands it takes and which results it gives.

    Attributes:
        operands: outer atoms, one per input of the inner jaxpr.
        results: outer variables, one per result of the inner jaxpr; None for the condition of a loop.
        loop: (first carried input, number of carried values), (0, 0) if it is no loop.
    """

    scope: Scope
    operands: tuple[Any, ...]
    results: tuple[Var, ...] | None
    loop: tuple[int, int] = (0, 0)


def calls(scope: Scope, position: int) -> list[Call]:
    """The inner jaxprs of an equation, as `infer_axes` entered them."""
    eqn, children = scope.jaxpr.eqns[position], scope.children.get(position, [])
    ins, outs = tuple(eqn.invars), tuple(eqn.outvars)
    if not children:
        return []
    match eqn.primitive.name:
        case "scan":
            return [Call(children[0], ins, outs, loop_parts(eqn))]
        case "cond":
            return [Call(child, ins[1:], outs) for child in children]
        case "while":
            cond_n, body_n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carry = ins[cond_n + body_n :]
            return [
                Call(children[0], ins[cond_n:], outs, (body_n, len(carry))),
                Call(children[1], (*ins[:cond_n], *carry), None),
            ]
        case _:
            return [Call(child, ins, outs) for child in children]


class Flow:
    """Which equations of a table's jaxpr are needed for its results, and which depend on the cotangent."""

    def __init__(self, table: AxisTable):
        self._live: dict[int, list[int]] = {}
        self._needed: dict[int, list[bool]] = {}
        self._tainted: dict[int, set[Var]] = {}
        scope, traced = table.scope, table.traced
        self._mark_live(scope, [True] * len(scope.jaxpr.outvars))
        flags = [False] * len(scope.jaxpr.invars)
        self.boundary = len(scope.jaxpr.eqns)
        """Position of the top-level equation that ends the forward pass."""
        if COTANGENT in traced.names:
            flags[traced.arg_slice(COTANGENT)] = [True]
            (cotangent,) = scope.jaxpr.invars[traced.arg_slice(COTANGENT)]
            self.boundary = next(k for k, eqn in enumerate(scope.jaxpr.eqns) if cotangent in _variables(eqn))
        self._mark_tainted(scope, flags)

    def live(self, scope: Scope) -> list[int]:
        """Positions of the equations that results depend on, or that have effects."""
        return self._live.get(id(scope), [])

    def needed_inputs(self, scope: Scope) -> list[bool]:
        """Which inputs of a jaxpr its live equations and needed results read."""
        return self._needed[id(scope)]

    def is_tainted(self, scope: Scope, atom: Any) -> bool:
        """Whether a value depends on the cotangent."""
        return atom in self._tainted[id(scope)] if isinstance(atom, Var) else False

    def is_backward(self, scope: Scope, eqn: JaxprEqn) -> bool:
        """Whether an equation reads or makes what depends on the cotangent."""
        return any(self.is_tainted(scope, atom) for atom in (*eqn.invars, *eqn.outvars))

    def _mark_live(self, scope: Scope, results: Sequence[bool]) -> list[bool]:
        eqns = scope.jaxpr.eqns
        needed = {v for v, ok in zip(scope.jaxpr.outvars, results, strict=True) if ok and isinstance(v, Var)}
        live: list[int] = []
        for position in range(len(eqns) - 1, -1, -1):
            eqn = eqns[position]
            if not eqn.effects and not any(var in needed for var in eqn.outvars):
                continue
            live.append(position)
            inner = calls(scope, position)
            if not inner:
                needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
                continue
            reads = {id(atom) for call in inner for atom in call.operands}
            # What chooses a branch, or anything else that no inner jaxpr takes.
            needed.update(a for a in eqn.invars if isinstance(a, Var) and id(a) not in reads)
            # A condition first: what it reads of the carry is needed of the body.
            for call in reversed(inner):
                wanted = [True] * len(call.scope.jaxpr.outvars)
                if call.results is not None:
                    wanted = [var in needed for var in call.results]
                start, carried = call.loop
                if call.results is not None and len(inner) == 2 and eqn.primitive.name == "while":
                    condition = self._needed[id(inner[1].scope)]
                    read = condition[len(condition) - carried :]
                    wanted = [a or b for a, b in zip(wanted, read, strict=True)]
                flags = self._mark_live(call.scope, wanted)
                while any(flags[start + i] and not wanted[i] for i in range(carried)):
                    wanted[:carried] = [a or b for a, b in zip(wanted, flags[start : start + carried], strict=False)]
                    flags = self._mark_live(call.scope, wanted)
                needed.update(a for a, ok in zip(call.operands, flags, strict=True) if ok and isinstance(a, Var))
        self._live[id(scope)] = live[::-1]
        self._needed[id(scope)] = [var in needed for var in scope.jaxpr.invars]
        return self._needed[id(scope)]

    def _mark_tainted(self, scope: Scope, inputs: Sequence[bool]) -> list[bool]:
        tainted = {var for var, ok in zip(scope.jaxpr.invars, inputs, strict=True) if ok}
        self._tainted[id(scope)] = tainted
        for position, eqn in enumerate(scope.jaxpr.eqns):
            for call in (inner := calls(scope, position)):
                flags = [isinstance(atom, Var) and atom in tainted for atom in call.operands]
                start, carried = call.loop
                results = self._mark_tainted(call.scope, flags)
                while any(results[i] and not flags[start + i] for i in range(carried)):
                    flags[start : start + carried] = [
                        a or b for a, b in zip(flags[start : start + carried], results[:carried], strict=True)
                    ]
                    results = self._mark_tainted(call.scope, flags)
                if call.results is not None:
                    tainted.update(var for var, ok in zip(call.results, results, strict=True) if ok)
            if not inner and any(isinstance(atom, Var) and atom in tainted for atom in eqn.invars):
                tainted.update(eqn.outvars)
        return [isinstance(var, Var) and var in tainted for var in scope.jaxpr.outvars]


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [atom for atom in eqn.invars if isinstance(atom, Var)]


def source_of(eqn: JaxprEqn) -> str:
    """Where a program computes something, `file:line (function)`; empty if nobody knows."""
    return source_info_util.summarize(eqn.source_info)


def dtype_of(atom: Any) -> Any:
    """The dtype of a variable; None for what has none, such as a token."""
    return getattr(atom.aval, "dtype", None)


def bytes_of(atom: Any) -> int:
    """Bytes of the array that a variable holds."""
    dtype = dtype_of(atom)
    return math.prod(shape_of(atom)) * itemsize(dtype) if dtype is not None else 0


def itemsize(dtype: Any) -> int:
    """Bytes of one element; a random key counts as its two words."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize
