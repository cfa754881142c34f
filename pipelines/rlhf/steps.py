"""What a call runs, on its own mesh: scores and training here, generation where the engine is.

    mesh = window_mesh(call_plan, devices)
    score = ScoreStep(pred_fn, abstract_params, abstract_batch, plan, mesh, reads="sequences", writes="values")
    done = score.run(params, {"sequences": batch}, 1)          # done.outputs["values"]: numpy, all rows

A step is given parameters that lie as its `param_shardings` say, and data on the host; it returns data on the host and
has then finished. Batches are trees of numpy arrays with one row per sequence, the same on every process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.functions import batch_rows
from pipelines.infer import build_predict_program
from pipelines.problem import init_like
from pipelines.train import TrainState, build_train_program
from search import Plan
from search.rlhf import CallPlan
from sharding_rules import PlanError, make_mesh, split_frozen
from sharding_rules.frozen import join


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of a call.

    Attributes:
        outputs: name of data -> values on the host.
        metrics: name -> number.
        state: the new one, of a call that trains.
    """

    outputs: dict[str, Any]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    state: Any = None


class Step(Protocol):
    """A call on its mesh."""

    reads: tuple[str, ...]
    """Names of the data that `run` looks up."""
    mesh: Mesh
    param_shardings: Any
    """Where the parameters lie that `run` is given."""
    compute_dtype: str | None
    """What `run` casts them to; they may come so. None: they come as they are stored."""

    def run(self, params: Any, data: Mapping[str, Any], iteration: int) -> Done:
        """Do the call; `params` is the whole state of a role that is trained here.

        In a run of several processes those with devices of the mesh call it, at the same time.
        """
        ...

    def joined(self, parts: Sequence[Done]) -> Done:
        """What the processes with devices of the mesh have made, in their order, as one."""
        ...

    def close(self) -> None:
        """Give up what lies on the devices besides the parameters, until the next call."""
        ...


def window_mesh(call: CallPlan, devices: Sequence[Any]) -> Mesh:
    """The mesh of a call, on the devices of its window.

    Raises:
        PlanError: the window has devices that are not there.
    """
    if call.window.end > len(devices):
        raise PlanError(
            f"call {call.call!r} runs on devices {call.window}, but there are {len(devices)}; make an execution plan "
            f"for {len(devices)} devices"
        )
    return make_mesh(call.plan.mesh, devices[call.window.first : call.window.end], order=call.plan.order)


class ScoreStep:
    """One forward pass over an iteration's sequences.

    Args:
        pred_fn: (params, batch) -> an array with one row per sequence.
        abstract_params: of the role; abstract_batch: all of an iteration's sequences.
        plan: microbatches are parts that are computed one after the other.
        mesh: devices laid out as the plan says.
        reads, writes: names of the batch and of what comes of it.

    Raises:
        ValueError, PlanError: see `build_predict_program`; or sequences that do not split into microbatches.
    """

    def __init__(
        self,
        pred_fn: Callable[..., Any],
        abstract_params: Any,
        abstract_batch: Any,
        plan: Plan,
        mesh: Mesh,
        *,
        reads: str,
        writes: str,
    ):
        self.reads, self._writes, self.mesh = (reads,), writes, mesh
        rows = batch_rows(abstract_batch)
        if rows % plan.microbatches:
            raise ValueError(f"{rows} sequences do not split into {plan.microbatches} microbatches")
        self._rows = rows // plan.microbatches
        self.compute_dtype: str | None = plan.compute_dtype
        part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self._rows, *x.shape[1:]), x.dtype), abstract_batch)
        self._program = build_predict_program(pred_fn, _forms(abstract_params), part, plan, mesh)
        self.param_shardings = self._program.param_shardings
        self._replicated = NamedSharding(mesh, P())

    def run(self, params: Any, data: Mapping[str, Any], iteration: int) -> Done:
        del iteration
        batch = data[self.reads[0]]
        key = _key(0, self._replicated)
        parts = []
        for start in range(0, batch_rows(batch), self._rows):
            part = jax.tree.map(lambda x, start=start: x[start : start + self._rows], batch)
            placed = _placed(part, self._program.batch_shardings)
            parts.append(self._program.predict(params, placed, key))
        scores = [jax.tree.map(_fetched, part) for part in parts]
        made = jax.tree.map(lambda *xs: np.concatenate(xs), *scores)
        return Done({self._writes: made})

    def joined(self, parts: Sequence[Done]) -> Done:
        return parts[0]

    def close(self) -> None:
        pass


class TrainStep:
    """Optimizer steps over an iteration's data, in minibatches that are drawn anew in each pass.

    Which rows a minibatch has depends on the seed, the iteration and the pass alone.

    Args:
        loss_fn: as `build_train_program` takes it.
        abstract_params: of the role; abstract_batch: all of an iteration's rows.
        optimizer: counts optimizer steps, of which an iteration has `minibatches * epochs`.
        plan: of one step, over a minibatch.
        mesh: devices laid out as the plan says.
        reads: name of the batch.
        minibatches: optimizer steps per pass. epochs: passes. seed: of the minibatches.

    Raises:
        ValueError, PlanError: see `build_train_program`; or rows that do not split into minibatches.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        abstract_params: Any,
        optimizer: optax.GradientTransformation,
        abstract_batch: Any,
        plan: Plan,
        mesh: Mesh,
        *,
        reads: str,
        minibatches: int = 1,
        epochs: int = 1,
        seed: int = 0,
    ):
        if plan.planned:
            raise PlanError(f"the plan has {'; '.join(plan.planned)}: the step cannot run this yet")
        self.reads, self.mesh = (reads,), mesh
        self.compute_dtype: str | None = None
        rows = batch_rows(abstract_batch)
        if rows % minibatches:
            raise ValueError(f"{rows} rows do not split into minibatches={minibatches}")
        self._rows, self._epochs, self._seed = rows // minibatches, epochs, seed
        part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self._rows, *x.shape[1:]), x.dtype), abstract_batch)
        init_fn = init_like(_forms(abstract_params))
        self.program = build_train_program(loss_fn, init_fn, optimizer, part, plan, mesh)
        self.param_shardings = self.program.state_shardings.params
        self._replicated = NamedSharding(mesh, P())

    def state_from(self, params: Any, seed: int) -> TrainState:
        """Copy parameters, wherever they are, into a fresh state on the mesh."""
        return self.program.state_from(place(params, self.param_shardings), rng=_key(seed, self._replicated))

    def run(self, params: TrainState, data: Mapping[str, Any], iteration: int) -> Done:
        state, batch, made = params, data[self.reads[0]], []
        for epoch in range(self._epochs):
            order = np.random.default_rng([self._seed, iteration, epoch]).permutation(batch_rows(batch))
            for start in range(0, len(order), self._rows):
                picked = order[start : start + self._rows]
                rows = jax.tree.map(lambda x, picked=picked: x[picked], batch)
                state, metrics = self.program.step(state, _placed(rows, self.program.batch_shardings))
                made.append(metrics)
        jax.block_until_ready(jax.tree.leaves(state))
        steps = [{name: float(_fetched(value)) for name, value in metrics.items()} for metrics in made]
        means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        means["skipped"] = float(sum(step["skipped"] for step in steps))
        return Done({}, means, state)

    def joined(self, parts: Sequence[Done]) -> Done:
        return parts[0]

    def close(self) -> None:
        pass

    @property
    def abstract_state(self) -> TrainState:
        return self.program.abstract_state


def place(tree: Any, shardings: Any) -> Any:
    """Put values of which every process has all onto a mesh; arrays that lie there already are not copied."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(one, tree, shardings)


def moving(state: Any) -> Any:
    """The part of a state that a checkpoint holds: all that is not frozen."""
    return split_frozen(state)[0]


def with_moving(state: Any, moved: Any) -> Any:
    """A state with another moving part."""
    return join(moved, split_frozen(state)[1])


def plain(tree: Any) -> Any:
    """A tree, or its shapes, with the numbers of its keys in their place."""

    def one(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
            return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
        return jax.random.key_data(x)

    return jax.tree.map(one, tree)


def keyed(tree: Any, form: Any) -> Any:
    """Undo `plain`, by the shapes of what it was."""

    def one(x: Any, like: Any) -> Any:
        if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return x
        return jax.random.wrap_key_data(x)

    return jax.tree.map(one, tree, form)


def _forms(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _key(seed: int, sharding: NamedSharding) -> jax.Array:
    """A typed key on the devices of a mesh."""
    data = np.asarray(jax.random.key_data(jax.random.key(seed)))
    placed = jax.make_array_from_callback(data.shape, sharding, data.__getitem__)
    return jax.random.wrap_key_data(placed)


def _placed(batch: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, np.asarray(x).__getitem__), batch, shardings
    )


def _fetched(x: jax.Array) -> np.ndarray:
    """An array as numpy, of which this process may have the whole on each of its devices only."""
    return np.asarray(x if x.is_fully_addressable else x.addressable_data(0))
