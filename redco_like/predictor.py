"""Prediction: examples in, outputs out, in the same order.

predictor = Predictor(deployer, collate_fn, pred_fn, params=trainer.params)
outputs = predictor.predict(test_examples, per_device_batch=8)        # one output per example
completions = predictor.generate(prompts, model, SamplingParams(max_tokens=64))
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pipelines import PredictProgram, build_predict_program, resolve_plan
from pipelines.devices import cluster_here
from pipelines.functions import PRED_ARGUMENTS, argument_names
from pipelines.infer import lives_on, trace_pred
from redco_like.data import Piece, collate, from_whole, process_rows, sequential, sharded
from redco_like.deployer import Deployer
from search import Plan
from sharding_rules import AXES, MeshShape, make_mesh

if TYPE_CHECKING:
    from pipelines.generation import SamplingParams
    from redco_like.engine import Completion
    from redco_like.models.model import Model


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
        self._plans: dict[Any, tuple[Plan, Mesh]] = {}
        self._programs: dict[Any, PredictProgram] = {}
        self._engines: dict[Any, Any] = {}

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
        state = {} if state is None else state
        first = collate(examples, np.arange(1), self._collate_fn)
        plan, mesh = self._planned(first, per_device_batch, params, state)
        rows = per_device_batch * plan.mesh.batch_shards
        program = self._program(_sized(first, rows), plan, mesh, params, state)
        params, state = program.place(params, state)
        slices = (
            process_rows(jax.tree.leaves(program.batch_shardings)[0]) if self._deployer.process_count > 1 else (0, 1)
        )

        def place(piece: Piece) -> tuple[int, PredictProgram, Any]:
            batch = piece.batch
            program = self._program(_sized(batch, rows), plan, mesh, params, state)
            if not piece.whole:
                return piece.count, program, sharded(batch, program.batch_shardings)
            filled = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], rows - len(x), 0)]), batch)
            return piece.count, program, from_whole(filled, program.batch_shardings)

        outputs: list[Any] = []
        in_flight: list[tuple[int, Any]] = []
        pieces = sequential(examples, self._collate_fn, rows, *slices, place=place)
        for index, (count, here, batch) in enumerate(pieces):
            in_flight.append((count, here.predict(params, batch, jax.random.fold_in(self._rng, index), state)))
            if len(in_flight) > 1:
                self._collect(*in_flight.pop(0), outputs)
        for count, output in in_flight:
            self._collect(count, output, outputs)
        return outputs

    def generate(
        self,
        examples: Sequence[Any],
        model: Model,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_fn: Callable[[Any], Sequence[int]] | None = None,
        rows: int = 16,
        length: int | None = None,
        eos: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """Continue one prompt per example, in the order of the examples, by an `Engine` on this predictor's devices.

        The engine is kept: a later call compiles nothing, and follows parameters that were given as a function. An
        encoder-decoder reads the example as its source, and writes greedily (`redco_like.models.greedy`).

        Args:
            examples: prompts, or what `prompt_fn` makes one of.
            model: whose parameters this predictor has.
            sampling: how to continue; for all of them, or one each.
            prompt_fn: example -> token ids; default the example itself.
            rows: sequences at a time (all shards together).
            length: tokens of prompt and continuation; default as long as these need, rounded up to a power of two.
            eos: tokens that end a continuation.

        Returns:
            For each example its continuations, `n` of its sampling parameters.

        Raises:
            ValueError: as `Engine.submit`; an encoder-decoder and anything but greedy.
        """
        from redco_like.generation import continue_prompts

        params = self._live(self.params, "params")
        prompts = [
            tuple(int(t) for t in (example if prompt_fn is None else prompt_fn(example))) for example in examples
        ]
        where = {"deployer": self._deployer, "plan": self._plan, "mesh": self._mesh_wanted}
        return continue_prompts(
            self._engines, model, params, prompts, sampling, where=where, rows=rows, length=length, eos=tuple(eos)
        )

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

    def _planned(self, first: Any, per_device_batch: int, params: Any, state: Any) -> tuple[Plan, Mesh]:
        """The plan and its mesh: the parameters' own if they live on one, else what the plan says."""
        home = home_of(params)
        key = _form((params, state)), home, per_device_batch
        if key not in self._plans:
            shape = self._mesh_wanted
            if shape is None and home is not None and isinstance(self._plan, str) and not self._plan.endswith(".json"):
                shape = MeshShape(**home.shape)
            devices = self._deployer.devices

            def problem() -> Any:
                rows = per_device_batch * (len(devices) if shape is None else shape.batch_shards)
                forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
                dtype, batch = self._compute_dtype, _sized(first, rows)
                return trace_pred(self._pred_fn, forms[0], batch, abstract_state=forms[1], compute_dtype=dtype), {}

            plan = resolve_plan(
                self._plan,
                n_devices=len(devices),
                mesh=shape,
                problem=problem,
                cluster=lambda: cluster_here(devices),
                compute_dtype=self._compute_dtype,
                training=False,
            )
            at_home = home is not None and MeshShape(**home.shape) == plan.mesh
            mesh = home if home is not None and at_home else make_mesh(plan.mesh, devices, order=plan.order)
            self._plans[key] = plan, mesh
        return self._plans[key]

    def _program(self, abstract_batch: Any, plan: Plan, mesh: Mesh, params: Any, state: Any) -> PredictProgram:
        """The program for batches of this form; one is compiled for each form that comes by."""
        key = _form((params, state, abstract_batch)), mesh
        if key not in self._programs:
            self._programs[key] = build_predict_program(self._pred_fn, params, abstract_batch, plan, mesh, state=state)
        return self._programs[key]


def _sized(batch: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)


def _form(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(x), x.dtype, getattr(x, "sharding", None)) for x in leaves)


def rows_of(output: Any) -> list[Any]:
    """Cut a tree of arrays into a list of trees, one per row.

    >>> rows_of({"a": np.asarray([1, 2])})
    [{'a': np.int64(1)}, {'a': np.int64(2)}]
    """
    leaves, structure = jax.tree.flatten(output)
    return [structure.unflatten(row) for row in zip(*leaves, strict=True)]


def home_of(params: Any) -> Mesh | None:
    """The mesh that all the parameters live on, if there is one."""
    leaves = jax.tree.leaves(params)
    sharding = getattr(leaves[0], "sharding", None) if leaves else None
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    mesh = sharding.mesh
    return mesh if mesh.axis_names == AXES and all(lives_on(leaf, mesh) for leaf in leaves) else None
