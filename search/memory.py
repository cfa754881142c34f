"""Bytes per device of a training step, analytic: what a plan keeps, and what its backward pass saves.

    bytes_ = step_bytes(layout, abstract_opt_state, remat="full", microbatches=1)
    bytes_.total

Parameters, gradients and optimizer state are exact, by their specs. Saved activations are an upper bound read off the
jaxpr: every result that a backward pass may need, at the size of its shard, times the iterations of its loop.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sharding_rules import Layout
from sharding_rules.axes import BATCH, PARAM, Scope, loop_parts, shape_of
from sharding_rules.partition import array_spec, tree_bytes

NOT_SAVED = frozenset(
    """add add_any sub neg broadcast_in_dim reshape transpose squeeze expand_dims convert_element_type slice split
    concatenate reduce_sum copy copy_p stop_gradient select_n iota pad rev dynamic_slice jit pjit closed_call scan
    while cond checkpoint remat remat2 custom_jvp_call custom_vjp_call sharding_constraint
    optimization_barrier""".split()
)
"""Linear or cheap operations whose results no derivative needs, and calls, whose insides are counted instead."""


SAVED_TWICE = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma div erf erf_inv erfc expm1 integer_pow lgamma log
    log1p logistic pow rsqrt sin sinh sqrt square tan tanh""".split()
)
"""Operations whose derivative is a factor of its own (the cosine of a sine), saved beside the result."""


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes per device, by part (analytic)."""

    params: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.params + self.gradients + self.optimizer + self.activations


def step_bytes(
    layout: Layout, abstract_opt_state: Any, *, remat: str, microbatches: int, param_dtype: str = "float32"
) -> StepBytes:
    """Count the bytes per device of a training step.

    Args:
        layout: of the loss traced on the whole global batch.
        abstract_opt_state: shapes of the optimizer's state.
        remat: "none", "dots" or "full".
        microbatches: activations are those of one microbatch.
        param_dtype: dtype of the stored parameters; gradients are summed in float32 or wider.
    """
    width = jnp.dtype(param_dtype).itemsize
    elements = 0
    for leaf, (_, rest) in zip(
        jax.tree.leaves(layout.traced.arg(layout.params)), layout.param_shares.values(), strict=True
    ):
        elements += math.prod(leaf.shape) // layout.assignment.ways([a for entry in rest.entries for a in entry])
    optimizer = tree_bytes(abstract_opt_state, layout.state_specs(abstract_opt_state), layout.mesh_shape)
    activations = activation_bytes(layout, remat) // microbatches
    return StepBytes(elements * width, elements * max(width, 4), optimizer, activations)


def activation_bytes(layout: Layout, remat: str) -> int:
    """Bytes per device that the backward pass of one pass over the traced batch keeps, with the largest block's
    transients.
    """
    saved = 0
    block = 0
    for scope in layout.table.scope.walk():
        inside = scope.trips > 1 and remat != "none"
        everything = sum(_bytes(layout, scope, var) * times for var, times in _needed(scope))
        if not inside:
            saved += everything * scope.trips
            continue
        block = max(block, everything)
        if remat == "dots":
            saved += scope.trips * sum(
                _bytes(layout, scope, eqn.outvars[0])
                for eqn in scope.jaxpr.eqns
                if eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][0]
            )
    if remat != "none":
        saved += _carries(layout)
    return saved + block


def _needed(scope: Scope) -> list[tuple[Any, int]]:
    """Results that a backward pass may need, and how many arrays of their size."""
    return [
        (var, 2 if eqn.primitive.name in SAVED_TWICE else 1)
        for eqn in scope.jaxpr.eqns
        if eqn.primitive.name not in NOT_SAVED
        for var in eqn.outvars
        if scope.origin.get(var) == PARAM | BATCH and shape_of(var)
    ]


def _carries(layout: Layout) -> int:
    """The inputs of every block: what a loop carries, once per iteration."""
    total = 0
    for scope in layout.table.scope.walk():
        for position, eqn in enumerate(scope.jaxpr.eqns):
            if eqn.primitive.name == "scan":
                (body,) = scope.children[position]
                start, carry = loop_parts(eqn)
                for var in body.jaxpr.invars[start : start + carry]:
                    if body.origin[var] & BATCH and jnp.issubdtype(_dtype(var), jnp.floating):
                        total += _bytes(layout, body, var) * body.trips
    return total


def _bytes(layout: Layout, scope: Scope, var: Any) -> int:
    shares = array_spec(layout.assignment, scope.dims[var], spill=True)
    ways = layout.assignment.ways([a for entry in shares.entries for a in entry])
    return math.prod(shape_of(var)) * _dtype(var).itemsize // ways


def _dtype(var: Any) -> Any:
    return var.aval.dtype
