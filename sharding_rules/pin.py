"""Pin intermediates: the same function, with `with_sharding_constraint` where the compiler would otherwise guess.

    pinned = Pinner(table, assignment, mesh, remat="full")(*flat_args)

The jaxpr is evaluated again, equation by equation, under the caller's trace. Pins go on the results of products,
convolutions, gathers, scatters and concatenations, on the carries of loops, on the batch, and on a weight where it
meets an activation (there its fsdp shards are gathered: inside the loop over layers, one layer at a time).
Elementwise operations follow their operands. Custom gradients and kernels are evaluated as they are, with pins around
them. On one device nothing is added.

A weight whose output dimension is a concatenation (fused QKV, gate and up) is multiplied segment by segment, so that
each segment is split by its own axis; the pieces are carried apart through elementwise operations until the model
splits them.

Weights that a loop over layers gathers are gathered again by its backward pass, whatever is rematerialised.

A call of `attention` or `experts` is given to a kernel, if there is one for it: its operands and how they are split go
in whole.

Rematerialisation is applied in the same pass: the body of a loop over layers, or for unrolled models each stretch
between two points where a single activation is alive, is wrapped in `jax.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding

from sharding_rules.assignment import Assignment
from sharding_rules.axes import BATCH, PARAM, AxisTable, Dim, Dims, Scope, leaves, loop_parts, shape_of, size_of
from sharding_rules.inline import CALLS, WrittenOut
from sharding_rules.kernels import Kernels
from sharding_rules.mixture import ExpertsCall
from sharding_rules.partition import array_spec, to_spec
from sharding_rules.primitives import RULES, elementwise

PINNED = frozenset(
    """
    dot_general ragged_dot ragged_dot_general conv_general_dilated gather scatter scatter-add scatter_add
    concatenate dynamic_update_slice split cumsum sort top_k custom_vjp_call custom_vjp_call_jaxpr shard_map
    reduce_window_max reduce_window_sum pallas_call
    """.split()
)
"""Primitives whose results are pinned."""
PRODUCTS = frozenset({"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"})
CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATION = PARAM | BATCH
MOVES = frozenset("sharding_constraint all_gather all_gather_invariant pcast pvary reshape".split())
"""Primitives that only move what is there."""
OUTER_ROLES = frozenset({"batch", "length", "spatial"})


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An array in consecutive pieces along one dimension: what a product with a concatenated weight gives."""

    parts: tuple[Any, ...]
    dimension: int

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(part.shape[self.dimension] for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        return (*shape[: self.dimension], sum(self.sizes), *shape[self.dimension + 1 :])

    def whole(self) -> Any:
        return jnp.concatenate(self.parts, axis=self.dimension)

    def meets(self, x: Any) -> bool:
        """Whether a value can be cut like this one: an array of this shape, or of size 1 where it is broadcast."""
        if isinstance(x, Pieces):
            return x.shape == self.shape and x.sizes == self.sizes and x.dimension == self.dimension
        shape = jnp.shape(x)
        return not shape or (
            len(shape) == len(self.shape) and all(a in (1, b) for a, b in zip(shape, self.shape, strict=True))
        )

    def cut(self, x: Any) -> list[Any]:
        """Cut a value like this one; what is broadcast along the pieces is the same for each."""
        if isinstance(x, Pieces):
            return list(x.parts)
        if not jnp.shape(x) or jnp.shape(x)[self.dimension] == 1:
            return [x] * len(self.parts)
        return jnp.split(x, list(_offsets(self.sizes))[1:-1], axis=self.dimension)


def _offsets(sizes: Sequence[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


class Pinner:
    """Evaluates a traced function again with pins and rematerialisation. Call it with the flat arguments."""

    def __init__(
        self,
        table: AxisTable,
        assignment: Assignment,
        mesh: Mesh,
        remat: str = "none",
        kernels: Kernels | None = None,
    ):
        self.table = table
        self.assignment = assignment
        self.mesh = mesh
        self.remat = remat
        self.kernels = kernels
        self.active = mesh.size > 1
        self._regathered: set[int] = set()
        """Bodies of loops whose weights are gathered again by the backward pass."""

    def __call__(self, *args: Any) -> list[Any]:
        scope = self.table.scope
        values = [
            self.pin(x, scope.dims[var]) if scope.origin[var] == BATCH else x
            for var, x in zip(scope.jaxpr.invars, args, strict=True)
        ]
        env: dict[Var, Any] = dict(zip(scope.jaxpr.invars, values, strict=True))
        env.update(zip(scope.jaxpr.constvars, self.table.traced.jaxpr.consts, strict=True))
        if self.remat != "none" and not _loops_over_layers(scope):
            self._run_in_stretches(scope, env)
        else:
            self._run(scope, env, range(len(scope.jaxpr.eqns)))
        return [
            self.pin(whole(self._read(env, var)), scope.dims[var]) if isinstance(var, Var) else self._read(env, var)
            for var in scope.jaxpr.outvars
        ]

    def pin(self, x: Any, dims: Dims, *, spill: bool = True, keys: Collection[int] = ()) -> Any:
        """Constrain one array to the split of its axes.

        Args:
            x: the array.
            dims: its dimensions.
            spill: whether the assignment's `spill` may apply too.
            keys: its dimensions along the keys of attention.
        """
        if isinstance(x, Pieces) or not self.active or not dims or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        spill = spill and any(
            (row := self.assignment.rows.of(axis)) and row.role not in OUTER_ROLES
            for dim in dims
            for axis in leaves(dim)
        )
        shares = array_spec(self.assignment, dims, spill=spill, keys=keys)
        spec = to_spec(shares.entries, unconstrained=shares.misaligned)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    @staticmethod
    def _read(env: dict[Var, Any], atom: Var | Literal) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    def _call(self, scope: Scope, args: Sequence[Any], consts: Sequence[Any] = ()) -> list[Any]:
        env: dict[Var, Any] = dict(zip(scope.jaxpr.invars, args, strict=True))
        env.update(zip(scope.jaxpr.constvars, consts, strict=True))
        self._run(scope, env, range(len(scope.jaxpr.eqns)))
        return [whole(self._read(env, var)) for var in scope.jaxpr.outvars]

    def _run(self, scope: Scope, env: dict[Var, Any], positions: Sequence[int]) -> None:
        done = 0
        for position in positions:
            if position < done:
                continue
            eqn = scope.jaxpr.eqns[position]
            call = self.table.calls.get(eqn.outvars[0]) if eqn.outvars else None
            if call and call.stop <= positions[-1] + 1 and (out := self._in_kernel(scope, call, env)) is not None:
                env[call.result], done = out, call.stop
                continue
            values = [self._read(env, atom) for atom in eqn.invars]
            outs = self._equation(scope, position, eqn, values)
            for var, value in zip(eqn.outvars, outs, strict=True):
                env[var] = value

    def _in_kernel(self, scope: Scope, call: WrittenOut, env: dict[Var, Any]) -> Any:
        """The result of a call of `attention` or `experts`, by a kernel; None if there is none for it."""
        operands = [atom for atom in call.operands if isinstance(atom, Var)]
        if self.kernels is None or len(operands) < len(call.operands):
            return None
        between = isinstance(call.call, ExpertsCall)
        specs = [
            array_spec(self.assignment, scope.dims[a], spill=between and bool(scope.origin[a] & BATCH)).spec
            for a in operands
        ]
        weights = [between and scope.origin[a] == PARAM for a in operands]
        kernels = self.kernels

        def run(*values: Any) -> Any:
            gathered = [
                self.pin(x, scope.dims[a], spill=False) if weight else x
                for x, a, weight in zip(values, operands, weights, strict=True)
            ]
            return kernels(call.call, self.mesh, gathered, specs)

        values = [whole(self._read(env, atom)) for atom in operands]
        if any(weights) and id(scope) in self._regathered:
            return jax.checkpoint(run, policy=_computed, prevent_cse=False)(*values)
        return run(*values)

    def _equation(self, scope: Scope, position: int, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        children = scope.children.get(position)
        if children and not children[0].opaque:
            if name not in CALLS:
                values = [x.whole() if isinstance(x, Pieces) else x for x in values]
            if name == "scan":
                return self._scan(scope, eqn, children[0], values)
            if name == "while":
                return self._while(scope, eqn, children[0], values)
            if name == "cond":
                branches = [
                    lambda *xs, s=child, c=branch.consts: self._call(s, xs, c)
                    for child, branch in zip(children, eqn.params["branches"], strict=True)
                ]
                return jax.lax.switch(values[0], branches, *values[1:])
            consts = next((p.consts for p in eqn.params.values() if isinstance(p, ClosedJaxpr)), ())
            if name in CHECKPOINTS:
                body = jax.checkpoint(
                    lambda *xs: self._call(children[0], xs, consts),
                    policy=eqn.params.get("policy"),
                    prevent_cse=eqn.params.get("prevent_cse", True),
                )
                return body(*values)
            if name in CALLS:
                return self._call(children[0], values, consts)
        if any(isinstance(x, Pieces) for x in values):
            pieces = self._on_pieces(eqn, values)
            if pieces is not None:
                return [self.pin(x, scope.dims[var]) for x, var in zip(pieces, eqn.outvars, strict=True)]
            values = [x.whole() if isinstance(x, Pieces) else x for x in values]
        if (
            name == "dot_general"
            and self.active
            and (product := self._product_in_pieces(scope, eqn, values)) is not None
        ):
            return [product]
        run = self._gathering(scope, lambda *xs: evaluate(eqn, self._gathered(scope, eqn, xs)))
        outs = run(*values) if name in PRODUCTS else evaluate(eqn, self._gathered(scope, eqn, values))
        if name in PINNED:
            if name == "gather" and self.assignment.spill:  # first summed over the table's shards, then cut
                outs = [self.pin(x, scope.dims[var], spill=False) for x, var in zip(outs, eqn.outvars, strict=True)]
            outs = [
                self.pin(x, scope.dims[var], keys=self.table.keys.get(var, ())) if scope.origin[var] & BATCH else x
                for var, x in zip(eqn.outvars, outs, strict=True)
            ]
        return outs

    def _gathered(self, scope: Scope, eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
        """Pin weights where they meet an activation, which gathers their fsdp shards.

        Their gradients are left to the compiler, which makes reduce-scatters of them where they are stored. Pinning a
        gradient to the weight's split at rest as well makes XLA:TPU choose windowed loops, which take more temporaries.
        """
        origins = [0 if isinstance(atom, Literal) else scope.origin[atom] for atom in eqn.invars]
        if not any(origin & BATCH for origin in origins):
            return values
        # What is split between blocks only is gathered where it enters one: once, before the products that share it.
        product = bool(self.assignment.spill) and PARAM in origins and eqn.primitive.name in PRODUCTS
        dot = eqn.primitive.name == "dot_general"
        return [
            self.pin(x, scope.dims[atom], spill=False)
            if isinstance(atom, Var) and (origin == PARAM or product or (dot and self._whole_keys(scope.dims[atom])))
            else x
            for x, origin, atom in zip(values, origins, eqn.invars, strict=True)
        ]

    def _whole_keys(self, dims: Dims) -> bool:
        """Whether an array has keys or values that are split further than their heads, and are whole for that."""
        axes = [axis for dim in dims for axis in leaves(dim)]
        rows = [row for axis in axes if (row := self.assignment.rows.of(axis))]
        return all(row.role != "groups" for row in rows) and any(
            self.assignment.beyond_keys(axis, self.assignment.ways(self.assignment.compute.get(row.name, ())))
            for axis in axes
            if (row := self.assignment.rows.of(axis))
        )

    def _gathering(self, scope: Scope, product: Callable[..., Any]) -> Callable[..., Any]:
        """A product that gathers its weight: again in the backward pass, where a loop would stack up those of all
        layers.
        """
        return jax.checkpoint(product, prevent_cse=False) if id(scope) in self._regathered else product

    # Concatenated weights.

    def _product_in_pieces(self, scope: Scope, eqn: JaxprEqn, values: list[Any]) -> Pieces | None:
        """Multiply by a concatenated weight segment by segment, if its segments are split by an axis of their own."""
        (contracting, batch) = eqn.params["dimension_numbers"]
        for side in (0, 1):
            atom, other = eqn.invars[side], eqn.invars[1 - side]
            if not isinstance(atom, Var) or scope.origin[atom] != PARAM:
                continue
            if not isinstance(other, Var) or not scope.origin[other] & BATCH:
                continue
            dims = scope.dims[atom]
            free = [i for i in range(len(dims)) if i not in (*contracting[side], *batch[side])]
            for i in array_spec(self.assignment, dims).misaligned & set(free):
                segments = _segments(dims[i])
                if segments is None:
                    continue
                out = len(batch[0]) + free.index(i)
                if side == 1:
                    out += values[0].ndim - len(contracting[0]) - len(batch[0])
                offsets = _offsets([size_of(segment) for segment in segments])
                parts = []
                for segment, start, stop in zip(segments, offsets, offsets[1:], strict=False):
                    part_dims = tuple(segment if j == i else dim for j, dim in enumerate(dims))

                    def multiply(
                        weight: Any, x: Any, side=side, i=i, start=start, stop=stop, part_dims=part_dims
                    ) -> Any:
                        piece = jax.lax.slice_in_dim(weight, start, stop, axis=i)
                        piece = self.pin(piece, part_dims, spill=False)
                        return eqn.primitive.bind(*((piece, x) if side == 0 else (x, piece)), **eqn.params)

                    x = self.pin(values[1 - side], scope.dims[other], spill=False)
                    product = self._gathering(scope, multiply)(values[side], x)
                    out_dims = scope.dims[eqn.outvars[0]]
                    parts.append(self.pin(product, tuple(segment if j == out else d for j, d in enumerate(out_dims))))
                return Pieces(tuple(parts), out)
        return None

    @staticmethod
    def _on_pieces(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
        """Carry pieces through one equation; None where they have to be put together first."""
        pieces = next(x for x in values if isinstance(x, Pieces))
        name, d, params = eqn.primitive.name, pieces.dimension, eqn.params
        if RULES.get(name) is elementwise and len(eqn.outvars) == 1 and not any("jaxpr" in key for key in params):
            if shape_of(eqn.outvars[0]) != pieces.shape or not all(pieces.meets(x) for x in values):
                return None
            cuts = [pieces.cut(x) for x in values]
            return [Pieces(tuple(eqn.primitive.bind(*part, **params) for part in zip(*cuts, strict=True)), d)]
        if name == "split" and params["axis"] == d and tuple(params["sizes"]) == pieces.sizes:
            return list(pieces.parts)
        if name == "slice" and not params["strides"]:
            spans = list(zip(params["start_indices"], params["limit_indices"], strict=True))
            offsets = _offsets(pieces.sizes)
            if all(span == (0, n) for j, (span, n) in enumerate(zip(spans, pieces.shape, strict=True)) if j != d):
                for part, start, stop in zip(pieces.parts, offsets, offsets[1:], strict=False):
                    if spans[d] == (start, stop):
                        return [part]
        if name == "reshape" and len(set(pieces.sizes)) == 1 and params["dimensions"] is None:
            shape, before = params["new_sizes"], math.prod(pieces.shape[:d])
            for j in range(len(shape)):
                if math.prod(shape[:j]) == before and shape[j] == len(pieces.parts):
                    return [jnp.concatenate([p.reshape(*shape[:j], 1, *shape[j + 1 :]) for p in pieces.parts], axis=j)]
        return None

    def _scan(self, scope: Scope, eqn: JaxprEqn, child: Scope, values: list[Any]) -> list[Any]:
        p = eqn.params
        consts_n, carry_n = loop_parts(eqn)
        split = consts_n + carry_n
        consts, carry, xs = values[:consts_n], values[consts_n:split], values[split:]
        carry_vars = child.jaxpr.invars[consts_n:split]

        def pinned(carry: Sequence[Any]) -> list[Any]:
            return [
                self.pin(x, child.dims[var]) if child.origin[var] & BATCH else x
                for x, var in zip(carry, carry_vars, strict=True)
            ]

        def inner(consts: Sequence[Any], carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            outs = self._call(child, [*consts, *carry, *xs], p["jaxpr"].consts)
            return pinned(outs[:carry_n]), outs[carry_n:]

        layers = any(not isinstance(a, Literal) and scope.origin[a] == PARAM for a in eqn.invars[split:])
        if layers and not any(e.primitive.name in CHECKPOINTS for e in child.jaxpr.eqns):
            if self.remat != "none":
                inner = jax.checkpoint(inner, policy=POLICIES[self.remat], prevent_cse=False)
            elif self.assignment.storage and self.assignment.mesh.fsdp > 1:
                self._regathered.add(id(child))
        carry, ys = jax.lax.scan(
            lambda carry, xs: inner(consts, carry, xs),
            pinned(carry),
            xs,
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys]

    def _while(self, scope: Scope, eqn: JaxprEqn, body: Scope, values: list[Any]) -> list[Any]:
        p = eqn.params
        cond_n, body_n = p["cond_nconsts"], p["body_nconsts"]
        cond_consts, body_consts, carry = values[:cond_n], values[cond_n : cond_n + body_n], values[cond_n + body_n :]
        return jax.lax.while_loop(
            lambda carry: jaxpr_as_fun(p["cond_jaxpr"])(*cond_consts, *carry)[0],
            lambda carry: self._call(body, [*body_consts, *carry], p["body_jaxpr"].consts),
            carry,
        )

    # Rematerialisation of unrolled models.

    def _run_in_stretches(self, scope: Scope, env: dict[Var, Any]) -> None:
        """Wrap each stretch between two points with one live activation in `jax.checkpoint`; the last one, the loss,
        is kept.
        """
        eqns = scope.jaxpr.eqns
        cuts = [0, *stretches(scope), len(eqns)]
        last_use = _last_uses(scope.jaxpr)
        for start, stop in itertools.pairwise(cuts):
            positions = range(start, stop)
            if stop == len(eqns):
                self._run(scope, env, positions)
                continue
            made = {var for k in positions for var in eqns[k].outvars}
            reads = {a: None for k in positions for a in eqns[k].invars if isinstance(a, Var) and a not in made}
            kept = [var for k in positions for var in eqns[k].outvars if last_use.get(var, -1) >= stop]

            def stretch(*inputs: Any, reads=reads, kept=kept, positions=positions) -> list[Any]:
                local = dict(zip(reads, inputs, strict=True))
                self._run(scope, local, positions)
                return [whole(local[var]) for var in kept]

            outs = jax.checkpoint(stretch, policy=POLICIES[self.remat])(*(env[var] for var in reads))
            env.update(zip(kept, outs, strict=True))


def stretches(scope: Scope) -> list[int]:
    """Positions in a jaxpr to cut at: where at most one activation is alive that was not alive at an earlier cut.

    Not inside a block: where an activation of an earlier cut (a residual) is waiting for its last use, after which
    fewer are alive, the cut is put off until then.
    """
    eqns = scope.jaxpr.eqns
    last_use = _last_uses(scope.jaxpr)
    alive: set[Var] = set()
    counts: list[int] = []
    for k in range(len(eqns)):
        _step(scope, k, alive, last_use)
        counts.append(len(alive))
    counts.append(len(alive))
    alive = set()
    saved: set[Var] = set()
    cuts: list[int] = []
    work = False
    for k, eqn in enumerate(eqns):
        work = work or eqn.primitive.name in {"dot_general", "conv_general_dilated"} or k in scope.children
        _step(scope, k, alive, last_use)
        new = alive - saved
        if not work or len(new) > 1 or not alive or k + 1 == len(eqns):
            continue
        if any(counts[last_use[v]] < len(alive) for v in alive & saved):
            continue
        cuts.append(k + 1)
        saved |= new
        work = False
    return cuts


def _step(scope: Scope, k: int, alive: set[Var], last_use: dict[Var, int]) -> None:
    """Update the activations that are alive after equation `k`."""
    eqn = scope.jaxpr.eqns[k]
    alive |= {v for v in eqn.outvars if scope.origin.get(v) == ACTIVATION and shape_of(v) and last_use.get(v, -1) > k}
    alive -= {v for v in alive if last_use.get(v, -1) <= k}


def _last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    uses = {a: k for k, eqn in enumerate(jaxpr.eqns) for a in eqn.invars if isinstance(a, Var)}
    return uses | {a: len(jaxpr.eqns) for a in jaxpr.outvars if isinstance(a, Var)}


def _loops_over_layers(scope: Scope) -> bool:
    """Whether some loop takes one layer's weights per iteration."""
    for inner in scope.walk():
        for eqn in inner.jaxpr.eqns:
            if eqn.primitive.name == "scan":
                xs = eqn.invars[sum(loop_parts(eqn)) :]
                if any(isinstance(a, Var) and inner.origin[a] == PARAM for a in xs):
                    return True
    return False


def whole(x: Any) -> Any:
    """Put pieces together; any other value as it is."""
    return x.whole() if isinstance(x, Pieces) else x


def _computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: what was gathered is not kept for the backward pass, but gathered again."""
    return primitive.name not in MOVES


def _segments(dim: Dim) -> tuple[Dim, ...] | None:
    """The consecutive segments of a dimension: those of a concatenation, or those that a leading factor counts."""
    axes = leaves(dim)
    if len(axes) == 1 and axes[0].segments is not None:
        return axes[0].segments
    if len(axes) > 1 and axes[0].size <= 8:
        return tuple(axes[1:] for _ in range(axes[0].size))
    return None


def evaluate(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as it stands, custom gradients and source lines included."""
    invars = list(dict.fromkeys(a for a in eqn.invars if isinstance(a, Var)))
    first = {a: v for a, v in zip(eqn.invars, values, strict=True) if isinstance(a, Var)}
    jaxpr = Jaxpr((), invars, list(eqn.outvars), [eqn], eqn.effects, _debug_info(len(invars), len(eqn.outvars)))
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*(first[a] for a in invars))


@functools.cache
def _debug_info(inputs: int, outputs: int) -> Any:
    """What a jaxpr says of itself in errors, which a jaxpr must have: that of a traced function of as many values."""

    def one_equation(*operands: Any) -> Any:
        return (0,) * outputs

    return jax.make_jaxpr(one_equation)(*(0,) * inputs).jaxpr.debug_info
