"""Prediction: examples in, outputs out, in the same order.

predictor = Predictor(deployer, collate_fn, pred_fn, params=trainer.params)
outputs = predictor.predict(test_examples, per_device_batch=8)        # one output per example
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pipelines import PredictProgram, build_predict_program, resolve_plan
from pipelines.functions import PRED_ARGUMENTS, argument_names
from pipelines.infer import lives_on, trace_pred
from pipelines.resolve import memory_bytes_per_device
from redco_like.data import Piece, collate, process_rows, sequential, sharded
from redco_like.deployer import Deployer
from search import Plan
from sharding_rules import AXES, MeshShape, make_mesh


class Predictor:
    """Runs `pred_fn` over examples. Several predictors and trainers may live in one process.

    Args:
        deployer: devices, keys.
        collate_fn: list of examples -> batch, a tree of numpy arrays with one row per example.
        pred_fn: takes what it names of `(params, batch, rng, state)`; every leaf it returns has one row per example.
        params: the parameters, or a function without arguments that returns them. A trainer's are used where they are,
            without a copy; as its next step consumes them, write `params=lambda: trainer.params` to follow it.
        plan: "auto", the name of a preset, a `Plan`, or the path of a plan file.
        mesh: devices per axis; default the one that the parameters live on, else what the plan suggests.
        compute_dtype: where the plan does not say.
        state: mutable model state for `pred_fn`, or a function that returns it.
        output_fn: applied to the outputs of each batch (a tree of numpy arrays, rows of real examples only); returns a
            list with one item per example. Default: the tree cut into its rows.
        name: to which the predictor's key belongs.
    """

    def __init__(
        self,
        deployer: Deployer,
        collate_fn: Callable[[list[Any]], Any],
        pred_fn: Callable[..., Any],
        *,
        params: Any,
        plan: Plan | str | pathlib.Path = "auto",
        mesh: MeshShape | str | None = None,
        compute_dtype: str = "float32",
        state: Any = None,
        output_fn: Callable[[Any], list[Any]] | None = None,
        name: str = "predict",
    ):
        argument_names(pred_fn, PRED_ARGUMENTS, role="pred_fn")
        self._deployer, self._collate_fn, self._pred_fn = deployer, collate_fn, pred_fn
        self.params, self.state = params, state
        self._plan, self._compute_dtype = plan, compute_dtype
        self._mesh_wanted = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
        self._output_fn = rows_of if output_fn is None else output_fn
        self._rng = deployer.rng(name)
        self._programs: dict[Any, PredictProgram] = {}

    def predict(self, examples: Sequence[Any], *, per_device_batch: int = 8) -> list[Any]:
        """Return one output per example, in the order of the examples.

        The last batch is filled up by repeating its last example, and cut again. While a batch is computed, the next
        one is collated and the one before is fetched.

        Args:
            examples: a sequence, of any length.
            per_device_batch: examples per data shard at a time.

        Raises:
            ValueError: no examples, batches or outputs of a wrong form, parameters that a training step has consumed.
            PlanError: a plan that cannot be carried out.
        """
        if per_device_batch < 1:
            raise ValueError(f"per_device_batch={per_device_batch}; at least 1")
        if len(examples) == 0:
            raise ValueError("examples is empty: there is nothing to predict")
        params, state = self._live(self.params, "params"), self._live(self.state, "state")
        program, rows = self._program(examples, per_device_batch, params, state)
        params = program.place(params)
        state = jax.device_put({} if state is None else state, program.state_shardings)
        slices = (0, 1)
        if self._deployer.process_count > 1:
            slices = process_rows(jax.tree.leaves(program.batch_shardings)[0])

        def place(piece: Piece) -> Any:
            if not piece.whole:
                return piece.count, sharded(piece.batch, program.batch_shardings)
            filled = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], rows - len(x), 0)]), piece.batch)
            return piece.count, jax.tree.map(
                lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), filled, program.batch_shardings
            )

        outputs: list[Any] = []
        in_flight: list[tuple[int, Any]] = []
        for index, (count, batch) in enumerate(sequential(examples, self._collate_fn, rows, *slices, place=place)):
            in_flight.append((count, program.predict(params, batch, jax.random.fold_in(self._rng, index), state)))
            if len(in_flight) > 1:
                self._collect(*in_flight.pop(0), outputs)
        for count, output in in_flight:
            self._collect(count, output, outputs)
        return outputs

    def _collect(self, count: int, output: Any, outputs: list[Any]) -> None:
        made = self._output_fn(jax.tree.map(lambda x: x[:count], jax.device_get(output)))
        if len(made) != count:
            raise ValueError(
                f"output_fn returned {len(made)} items for a batch of {count} examples; one each is needed"
            )
        outputs.extend(made)

    def _live(self, tree: Any, what: str) -> Any:
        # An Equinox model can be called too, and is a tree.
        tree = tree() if callable(tree) and jax.tree_util.all_leaves([tree]) else tree
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"the {what} given to this Predictor were consumed by a training step since; give a function instead, "
                f"{what}=lambda: trainer.{'params' if what == 'params' else 'state.model_state'}"
            )
        return tree

    def _program(self, examples: Sequence[Any], per_device_batch: int, params: Any, state: Any) -> Any:
        batch = collate(examples, np.arange(1), self._collate_fn)
        leaves, structure = jax.tree.flatten((params, state, batch))
        forms = tuple((np.shape(x), x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = structure, forms, per_device_batch
        if key not in self._programs:
            self._programs[key] = self._build(batch, per_device_batch, params, state)
        program = self._programs[key]
        return program, per_device_batch * program.plan.mesh.batch_shards

    def _build(self, batch: Any, per_device_batch: int, params: Any, state: Any) -> PredictProgram:
        home = _home(params)
        shape = self._mesh_wanted
        if shape is None and home is not None and isinstance(self._plan, str) and not self._plan.endswith(".json"):
            shape = MeshShape(**home.shape)
        devices = self._deployer.devices

        def sized(rows: int) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

        def problem() -> Any:
            rows = per_device_batch * (len(devices) if shape is None else shape.batch_shards)
            values = params, {} if state is None else state
            forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
            dtype = self._compute_dtype
            return trace_pred(self._pred_fn, forms[0], sized(rows), abstract_state=forms[1], compute_dtype=dtype), {}

        plan = resolve_plan(
            self._plan,
            n_devices=len(devices),
            mesh=shape,
            problem=problem,
            memory_bytes=memory_bytes_per_device(devices),
            compute_dtype=self._compute_dtype,
        )
        mesh = home if home is not None and MeshShape(**home.shape) == plan.mesh else make_mesh(plan.mesh, devices)
        rows = per_device_batch * plan.mesh.batch_shards
        return build_predict_program(self._pred_fn, params, sized(rows), plan, mesh, state=state)


def rows_of(output: Any) -> list[Any]:
    """Cut a tree of arrays into a list of trees, one per row.

    >>> rows_of({"a": np.asarray([1, 2])})
    [{'a': np.int64(1)}, {'a': np.int64(2)}]
    """
    leaves, structure = jax.tree.flatten(output)
    return [structure.unflatten(row) for row in zip(*leaves, strict=True)]


def _home(params: Any) -> Mesh | None:
    """The mesh that all the parameters live on, if there is one."""
    leaves = jax.tree.leaves(params)
    sharding = getattr(leaves[0], "sharding", None) if leaves else None
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    mesh = sharding.mesh
    return mesh if mesh.axis_names == AXES and all(lives_on(leaf, mesh) for leaf in leaves) else None
