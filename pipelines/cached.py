"""A step of inference with a cache, a whole prompt or one more token, as a plan lays it out.

program = build_cached_program(traced, plan, mesh)       # traced: (params, batch, state) -> (outputs, state)
outputs, cache = program.step(params, batch, cache)      # the cache is written in place
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.kernels import kernels_for
from pipelines.problem import layout_of, local_bytes
from search import Plan
from search.compiler_options import options_on
from sharding_rules import PlanError, TracedFunction

ARGUMENTS = ("params", "batch", "state")


def build_cached_program(traced: TracedFunction, plan: Plan, mesh: Mesh) -> CachedProgram:
    """Lay a traced step of inference out on the mesh; nothing is compiled yet.

    Args:
        traced: arguments params, batch and state (the cache); results (outputs, the cache with what is new).
        plan: mesh, preset and rules; rematerialisation plays no part.
        mesh: devices laid out as the plan says.

    Raises:
        ValueError: a function of other arguments or results.
        PlanError: a plan that cannot be carried out.
    """
    if traced.names != ARGUMENTS:
        raise ValueError(f"the step takes {', '.join(traced.names)}; a step with a cache takes {', '.join(ARGUMENTS)}")
    if not isinstance(traced.out, tuple) or len(traced.out) != 2:
        raise ValueError("the step returns no pair of outputs and cache")
    if jax.tree.structure(traced.out[1]) != jax.tree.structure(traced.arg("state")):
        raise ValueError("the cache that the step returns has another structure than the one it takes")
    if plan.microbatches > 1:
        raise PlanError(f"microbatches={plan.microbatches}: a step of inference runs all its rows at once")
    return CachedProgram(traced, plan, mesh)


class CachedProgram:
    """One compiled step of inference on one mesh. Made by `build_cached_program`.

    Attributes:
        plan, mesh, layout: how it runs.
        abstract_arguments: params, batch and cache as shapes with shardings.
    """

    def __init__(self, traced: TracedFunction, plan: Plan, mesh: Mesh):
        self.plan, self.mesh = plan, mesh
        self.layout = layout_of(traced, plan)
        self._pinned = self.layout.pin(mesh, kernels=kernels_for(plan.attention, mesh))

        def placed(specs: Any) -> Any:
            return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))

        self.shardings = tuple(placed(self.layout.specs(name)) for name in ARGUMENTS)
        self.abstract_arguments = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tuple(traced.args), self.shardings
        )
        # The cache leaves as it came, so that it is written in place.
        self._out = placed(self.layout.out_specs[0]), self.shardings[2]
        self._results = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), traced.out[0], self._out[0]
        )

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes on a device, by shapes and shardings: arguments, of those what is donated, and results beside it."""
        cache = local_bytes(self.abstract_arguments[2])
        arguments = local_bytes(self.abstract_arguments)
        return {"arguments": arguments, "aliased": cache, "results": local_bytes(self._results)}

    def lower(self) -> jax.stages.Lowered:
        """The step as a compiler takes it, for the devices of the mesh."""

        def step(params: Any, batch: Any, state: Any) -> Any:
            return self._pinned(params, batch, state)

        jitted = jax.jit(step, donate_argnums=2, in_shardings=self.shardings, out_shardings=self._out)
        return jitted.lower(*self.abstract_arguments)

    @functools.cached_property
    def _executable(self) -> jax.stages.Compiled:
        return self.lower().compile(compiler_options=options_on(self.plan, self.mesh.devices.flat[0].platform))

    def step(self, params: Any, batch: Any, state: Any) -> tuple[Any, Any]:
        """Run it; the arguments lie as `shardings` say, and the cache is donated."""
        return self._executable(params, batch, state)
