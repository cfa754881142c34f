"""From a plan and a prediction function to a compiled program.

    program = build_predict_program(pred_fn, params, abstract_batch, plan, mesh)
    params, state = program.place(params)
    outputs = program.predict(params, batch, rng, state)      # on the device, rows in order

Parameters that already live on the mesh (a trainer's) are used where they are: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.functions import PRED_ARGUMENTS, batch_rows, call_by_name, describe_tree
from pipelines.kernels import kernels_for
from pipelines.problem import NAMES, cast_floats, check_rows, layout_of, local_bytes
from search import Plan
from sharding_rules import Layout, TracedFunction, path_str, trace


def trace_pred(
    pred_fn: Callable[..., Any], abstract_params: Any, abstract_batch: Any, *, abstract_state: Any, compute_dtype: str
) -> TracedFunction:
    """Trace `pred_fn` on abstract values and check that every output has one row per example.

    An exception of the user's function keeps its type and gets a note that lists what the function was given.

    Raises:
        ValueError: a bad signature, or an output whose leading dimension is not the batch; names its path and shape.
    """
    call = call_by_name(pred_fn, PRED_ARGUMENTS, role="pred_fn")
    params = cast_floats(abstract_params, compute_dtype)

    def positional(params: Any, batch: Any, rng: Any, state: Any) -> Any:
        return call(params=params, batch=batch, rng=rng, state=state)

    key = jax.eval_shape(jax.random.key, 0)
    try:
        traced = trace(positional, params, abstract_batch, key, abstract_state, names=NAMES)
    except Exception as error:
        error.add_note(
            f"while tracing pred_fn with parameters ({describe_tree(params)}), a batch of "
            f"({describe_tree(abstract_batch)}) and a state of ({describe_tree(abstract_state)})"
        )
        raise
    rows = batch_rows(abstract_batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(traced.out):
        if not leaf.shape or leaf.shape[0] != rows:
            raise ValueError(
                f"pred_fn: output {path_str(path) or 'itself'!r} has shape {tuple(leaf.shape)}; its leading dimension "
                f"must be the {rows} examples of the batch, one row each"
            )
    return traced


def build_predict_program(
    pred_fn: Callable[..., Any], params: Any, abstract_batch: Any, plan: Plan, mesh: Mesh, *, state: Any = None
) -> PredictProgram:
    """Trace `pred_fn` and lay it out on the mesh.

    Args:
        pred_fn: takes what it names of `(params, batch, rng, state)`; every output leaf has one row per example.
        params: arrays or `ShapeDtypeStruct`; arrays that live on `mesh` keep their shardings.
        abstract_batch: the batch as shapes (arrays pass too).
        plan: mesh, preset, rules and compute dtype; microbatches and remat play no part.
        mesh: devices laid out as the plan says.
        state: mutable model state, if `pred_fn` names it.

    Raises:
        ValueError: see `trace_pred`; or a batch that does not split over the data shards.
        PlanError: a plan that cannot be carried out.
    """
    state = {} if state is None else state
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, abstract_batch, state))
    traced = trace_pred(pred_fn, shapes[0], shapes[1], abstract_state=shapes[2], compute_dtype=plan.compute_dtype)
    check_rows(batch_rows(abstract_batch), microbatches=1, mesh=plan.mesh, what="batch")
    layout = layout_of(traced, plan)
    return PredictProgram(layout, plan, mesh, params, state)


class PredictProgram:
    """A compiled prediction on one mesh. Made by `build_predict_program`.

    Attributes:
        plan, mesh, layout: how it runs.
        batch_shardings, param_shardings, state_shardings: where its arguments go.
        abstract_arguments: params, batch, key and state as shapes with shardings.
    """

    def __init__(self, layout: Layout, plan: Plan, mesh: Mesh, params: Any, state: Any):
        self.layout, self.plan, self.mesh = layout, plan, mesh

        def shardings(specs: Any) -> Any:
            return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))

        def where_they_are(tree: Any, specs: Any) -> Any:
            return jax.tree.map(lambda x, s: x.sharding if lives_on(x, mesh) else s, tree, shardings(specs))

        self.batch_shardings = shardings(layout.specs("batch"))
        self.param_shardings = where_they_are(params, layout.specs("params"))
        self.state_shardings = where_they_are(state, layout.specs("state"))
        pinned = layout.pin(mesh, kernels=kernels_for(plan.attention, mesh))
        outputs = shardings(layout.out_specs) if jax.process_count() == 1 else NamedSharding(mesh, P())

        def step(params: Any, batch: Any, rng: jax.Array, state: Any) -> Any:  # `search.compiler` reads this name
            return pinned(cast_floats(params, plan.compute_dtype), batch, rng, state)

        arguments = (self.param_shardings, self.batch_shardings, NamedSharding(mesh, P()), self.state_shardings)
        self._predict = jax.jit(step, in_shardings=arguments, out_shardings=outputs)
        batch, key = (layout.traced.arg(name) for name in ("batch", "rng"))
        self.abstract_arguments = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (params, batch, key, state), arguments
        )
        self._results = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            layout.traced.out,
            shardings(layout.out_specs),
        )

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes on a device, by shapes and shardings: arguments, of those what is donated (nothing), and results."""
        return {
            "arguments": local_bytes(self.abstract_arguments),
            "aliased": 0,
            "results": local_bytes(self._results),
        }

    def lower(self) -> jax.stages.Lowered:
        """The program as a compiler takes it, for the devices of the mesh."""
        return self._predict.lower(*self.abstract_arguments)

    def place(self, params: Any, state: Any = None) -> tuple[Any, Any]:
        """Put parameters and state where the program wants them; those already there are not copied."""
        return jax.device_put((params, {} if state is None else state), (self.param_shardings, self.state_shardings))

    def predict(self, params: Any, batch: Any, rng: jax.Array, state: Any = None) -> Any:
        """Run on one batch; the outputs stay on the device."""
        return self._predict(params, batch, rng, {} if state is None else state)


def lives_on(x: Any, mesh: Mesh) -> bool:
    """Whether `x` is an array (or an abstract one) sharded by name over `mesh`."""
    sharding = getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh
