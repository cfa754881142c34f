"""What the backward pass keeps, from the jaxpr of the step.

saved_activations(traced, "full")            # values kept from forward to backward, with their logical axes
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.extend.core import Var

from search.attention import axes_key, score_keys
from search.liveness import Flow, Names, Remat, Step, analyse_step, calls, dtype_of, itemsize, source_of
from sharding_rules import TracedFunction
from sharding_rules.axes import BATCH, Dims, Scope, loop_parts, shape_of


@dataclasses.dataclass(frozen=True)
class Saved:
    """A value that the backward pass keeps.

    Attributes:
        shape, dtype: of one iteration of the loops that make it.
        axes: row names per dimension.
        trips: how many such values are kept (the product of the lengths of those loops).
        source: where the model computes it, `file:line (function)`.
        activation: computed from the batch. Others are casts of weights, masks and the like, the same for any example.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: Names
    trips: int
    source: str
    activation: bool

    @property
    def bytes(self) -> int:
        """Bytes of all iterations, unsharded."""
        return math.prod(self.shape) * itemsize(self.dtype) * self.trips


def saved_activations(
    traced: TracedFunction,
    remat: Remat = "none",
    *,
    fused_attention: bool = False,
    params: str = "params",
    batch: str = "batch",
) -> list[Saved]:
    """List what the backward pass of a traced loss keeps, besides the arguments of the loss.

    These are the residuals of `jax.vjp` that the backward pass reads: what a loop keeps of each iteration, and whatever
    else is computed in the forward pass and read in the backward one. A compiler may keep less, by computing cheap
    values again.

    Args:
        traced: the loss, from `sharding_rules.trace`.
        remat: "none", "dots" or "full", applied as `Layout.pin` does.
        fused_attention: leave out what has the shape of attention's scores, which a fused one computes again.
        params, batch: names of the arguments that hold the parameters and the examples.
    """
    step = analyse_step(traced, remat=remat, params=params, batch=batch)
    return saved_in(step, fused_attention=fused_attention)


def saved_in(step: Step, *, fused_attention: bool = False) -> list[Saved]:
    """As `saved_activations`, from an analysed step."""
    scope, flow = step.table.scope, step.flow
    made = {v: (k, i) for k in range(flow.boundary) for i, v in enumerate(scope.jaxpr.eqns[k].outvars)}
    crossing: dict[Var, None] = {}
    for position in flow.live(scope):
        if position > flow.boundary:
            crossing |= {a: None for a in _read(flow, scope, position) if a in made}
    scores = score_keys(step) if fused_attention else frozenset()
    found = [_saved(step, scope, var, made[var]) for var in crossing]
    return [saved for saved, dims in found if axes_key(dims) not in scores]


def _read(flow: Flow, scope: Scope, position: int) -> list[Var]:
    """Variables that an equation reads; of those that an inner jaxpr takes, the ones it needs."""
    passed: dict[Any, bool] = {}
    for call in calls(scope, position):
        for atom, needed in zip(call.operands, flow.needed_inputs(call.scope), strict=True):
            if isinstance(atom, Var):
                passed[atom] = passed.get(atom, False) or needed
    return [a for a in scope.jaxpr.eqns[position].invars if isinstance(a, Var) and passed.get(a, True)]


def _saved(step: Step, scope: Scope, var: Var, made: tuple[int, int]) -> tuple[Saved, Dims]:
    dims, shape, trips = scope.dims[var], shape_of(var), 1
    activation = bool(scope.origin.get(var, 0) & BATCH)
    position, index = made
    eqn = scope.jaxpr.eqns[position]
    while eqn.primitive.name == "scan" and scope.children.get(position):
        (body,) = scope.children[position]
        carried = loop_parts(eqn)[1]
        if index < carried:
            break
        trips *= shape[0]
        dims, shape = dims[1:], shape[1:]
        inner = body.jaxpr.outvars[index]
        found = [(k, i) for k, e in enumerate(body.jaxpr.eqns) for i, v in enumerate(e.outvars) if v is inner]
        if not found:
            break
        scope, (position, index) = body, found[0]
        eqn = scope.jaxpr.eqns[position]
    return Saved(shape, dtype_of(var), step.names(dims), trips, source_of(eqn), activation), dims
