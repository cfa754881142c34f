"""From a plan, a loss and an optimizer to a compiled training step.

    program = build_train_program(loss_fn, init_fn, optax.adamw(3e-4), abstract_batch, plan, mesh)
    state = program.init(jax.random.key(0))                # born on the mesh
    state, metrics = program.step(state, batch)            # device scalars; nothing is fetched

The step, for a global batch cut into M microbatches (sums and weights as in `functions.normalise_loss`):

    g = sum_m d(loss sum of m)/d(params)        accumulated in `accum_dtype`, sharded as the parameters are at rest
    g, loss, metrics = each / sum of weights    scaled once, so the mean is over the global batch
    params, opt_state = optimizer(g)            kept only if loss and |g| are finite

Microbatch m is rows m, m+M, m+2M, ... of the global batch: every device keeps its own rows, nothing moves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.functions import (
    LOSS_ARGUMENTS,
    argument_names,
    batch_rows,
    normalise_loss,
    tree_differences,
)
from pipelines.kernels import kernels_for
from pipelines.problem import (
    InitialValues,
    abstract_init,
    abstract_key,
    cast_floats,
    check_rows,
    init_values,
    join_trainable,
    layout_of,
    local_bytes,
    split_trainable,
    split_trainable_like,
    trace_loss,
)
from search import Plan
from search.compiler_options import options_on
from sharding_rules import DATA, Layout, MeshShape, path_str, split_frozen
from sharding_rules.frozen import join

STEP_STREAM = 2**31 - 1
"""Folded into the key for the steps, so that no step's key is one that `init_fn` drew by splitting."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and the key.

    Attributes:
        step: int32 scalar, optimizer steps done; a skipped step does not count.
        params: the parameters at rest.
        opt_state: the optimizer's state.
        model_state: mutable model state (BatchNorm's), `{}` if there is none.
        rng: typed key, constant; the step's key is `fold_in(rng, step)`.
    """

    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    rng: Any


def build_train_program(
    loss_fn: Callable[..., Any],
    init_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    abstract_batch: Any,
    plan: Plan,
    mesh: Mesh,
    *,
    learning_rate: Callable[[Any], Any] | None = None,
) -> TrainProgram:
    """Trace the loss, lay it out on the mesh, and make the step; nothing is compiled yet.

    Args:
        loss_fn: takes what it names of `(params, batch, rng, state, training)`; its result: `functions.loss_output`.
        init_fn: `init_fn(rng) -> params`, or `(params, state)` if `loss_fn` names `state`.
        optimizer: any optax transformation. Its schedules count optimizer steps, however many microbatches there are.
        abstract_batch: the global batch as a tree of `ShapeDtypeStruct` (arrays pass too).
        plan: mesh, preset, microbatches, remat and dtypes.
        mesh: devices laid out as the plan says.
        learning_rate: schedule `step -> rate` to report as a metric. Without it, the rate is read from the state of
            `optax.inject_hyperparams` if the optimizer has one.

    Raises:
        ValueError: bad signatures, a loss of another form than it may have, a batch that does not split.
        PlanError: a plan that cannot be carried out.
    """
    if tuple(mesh.shape[axis] for axis in plan.mesh.sizes) != tuple(plan.mesh.sizes.values()):
        raise ValueError(f"the plan is for mesh {plan.mesh}, but the mesh given has {dict(mesh.shape)}")
    abstract_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_batch)
    rows = batch_rows(abstract_batch)
    check_rows(rows, microbatches=plan.microbatches, mesh=plan.mesh)
    values = abstract_init(loss_fn, init_fn, plan.param_dtype)
    microbatch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // plan.microbatches, *x.shape[1:]), x.dtype), abstract_batch
    )
    traced = trace_loss(loss_fn, values, microbatch, training=True, compute_dtype=plan.compute_dtype)
    layout = layout_of(traced, plan)
    return TrainProgram(loss_fn, init_fn, optimizer, abstract_batch, plan, mesh, values, layout, learning_rate)


class TrainProgram:
    """A step and what belongs to it, on one mesh. Made by `build_train_program`.

    Attributes:
        plan, mesh, layout: how the step runs.
        abstract_batch: the global batch, as shapes.
        batch_shardings: where its leaves go.
        kernels: what computes the model's calls of `attention` and `experts`.
        abstract_state: the `TrainState` as shapes with shardings: what a checkpoint is restored into.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        init_fn: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        abstract_batch: Any,
        plan: Plan,
        mesh: Mesh,
        values: InitialValues,
        layout: Layout,
        learning_rate: Callable[[Any], Any] | None,
    ):
        self.plan, self.mesh, self.layout, self.abstract_batch = plan, mesh, layout, abstract_batch
        self._loss_fn, self._init_fn, self._optimizer = loss_fn, init_fn, optimizer
        self._learning_rate = learning_rate
        self._values = values
        self._replicated = NamedSharding(mesh, P())
        self._param_shardings = self._shardings(layout.specs("params"))
        self.batch_shardings = self._shardings(layout.specs("batch"))
        trainable, _ = split_trainable(values.params)
        opt_state = jax.eval_shape(optimizer.init, trainable)
        state_specs, update_specs = layout.state_specs(opt_state), layout.specs("params")
        if plan.optimizer_sharding:
            state_specs = spread_over_data(state_specs, opt_state, plan.mesh)
            update_specs = spread_over_data(update_specs, values.params, plan.mesh)
        # Gradients as the optimizer takes them: as the parameters lie at rest, or as its state does.
        self._update_shardings = self._shardings(update_specs)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), values.params, opt_state, values.state, abstract_key())
        self.state_shardings = TrainState(
            self._replicated,
            self._param_shardings,
            self._shardings(state_specs),
            self._shardings(layout.specs("state")),
            self._replicated,
        )
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.state_shardings
        )
        self._nothing = split_frozen(self.abstract_state)[1]
        self._has_frozen = bool(jax.tree.leaves(self._nothing))
        self.kernels = kernels_for(plan.attention, mesh)
        self._pinned = layout.pin(mesh, remat=plan.remat, kernels=self.kernels)
        self._eval_programs: dict[Any, tuple[Any, Any]] = {}
        takes_state = "state" in argument_names(loss_fn, LOSS_ARGUMENTS, role="loss_fn")

        def fresh(params: Any, model_state: Any, rng: jax.Array) -> TrainState:
            opt_state = optimizer.init(split_trainable(params)[0])
            return TrainState(jnp.int32(0), params, opt_state, model_state, rng)

        def init(rng: jax.Array) -> TrainState:
            params, model_state = init_values(init_fn, takes_state, plan.param_dtype)(rng)
            return fresh(params, model_state, jax.random.fold_in(rng, STEP_STREAM))

        self._jit_init = jax.jit(init, out_shardings=self.state_shardings)

        # jnp.copy, because jit hands an untouched argument through as it is, and the first step would donate it.
        def copied(params: Any, model_state: Any, rng: jax.Array) -> TrainState:
            params, model_state = jax.tree.map(jnp.copy, (params, model_state))
            return fresh(params, model_state, jax.random.fold_in(rng, STEP_STREAM))

        self._jit_fresh = jax.jit(copied, out_shardings=split_frozen(self.state_shardings)[0])
        self._jit_nonfinite = jax.jit(self._nonfinite)

    def init(self, rng: jax.Array) -> TrainState:
        """Make the state on the mesh, each device its own shards; the values are those of `init_fn` on one device.

        `init_fn` gets `rng` itself; the steps' keys come from another stream of it.
        """
        return self._jit_init(rng)

    def state_from(self, params: Any, *, model_state: Any = None, rng: jax.Array | None = None) -> TrainState:
        """Copy parameters into a fresh state: new optimizer state, step 0. Compiles nothing the second time.

        The arrays given are never donated: they stay valid. What is frozen is not copied where it lies as it should.

        Args:
            params: tree of arrays, on the host or on any devices.
            model_state: mutable state; required if the model has one.
            rng: key of the steps, as for `init`; default `jax.random.key(0)`.

        Raises:
            ValueError: trees of another model; names the first paths that differ.
        """
        model_state = {} if model_state is None else model_state
        differences = {
            "params": tree_differences(self._values.params, params, dtypes=False),
            "model_state": tree_differences(self._values.state, model_state, dtypes=False),
        }
        for what, different in differences.items():
            if different:
                raise ValueError(f"the {what} given do not fit this model: " + "; ".join(different[:3]))

        def place(tree: Any, abstract: Any, shardings: Any) -> Any:
            cast = jax.tree.map(lambda x, a: x if x.dtype == a.dtype else x.astype(a.dtype), tree, abstract)
            return jax.device_put(cast, shardings)

        params = place(params, self._values.params, self._param_shardings)
        model_state = place(model_state, self._values.state, self.state_shardings.model_state)
        rng = jax.device_put(jax.random.key(0) if rng is None else rng, self._replicated)
        moving, fixed = split_frozen(params)
        state = self._jit_fresh(moving, model_state, rng)
        return dataclasses.replace(state, params=join(state.params, fixed))

    def compile(self) -> float:
        """Compile the step for its shapes, if that is not done; return the seconds it took."""
        start = time.perf_counter()
        _ = self._executable
        return time.perf_counter() - start

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes on a device, by shapes and shardings: arguments, of those what is donated, and results beside it."""
        batch = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract_batch, self.batch_shardings
        )
        moving, fixed = map(local_bytes, split_frozen(self.abstract_state))
        return {"arguments": moving + fixed + local_bytes(batch), "aliased": moving, "results": 0}

    def lower(self) -> jax.stages.Lowered:
        """The step as a compiler takes it, for the devices of the mesh."""

        def step(moving: Any, fixed: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
            state, metrics = self._step(join(moving, fixed), batch)
            return split_frozen(state)[0], metrics

        moving, fixed = split_frozen(self.state_shardings)
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(moving, fixed, self.batch_shardings),
            out_shardings=(moving, self._replicated),
        )
        return jitted.lower(*split_frozen(self.abstract_state), self.abstract_batch)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step. `state` is donated but for what is frozen; the metrics stay on the device.

        Returns:
            The new state, and scalars: `loss`, `grad_norm`, `skipped` (1 if loss or gradient was not finite and the
            state was therefore left as it was), `learning_rate` if known, and the metrics of `loss_fn`.
        """
        if not self._has_frozen:
            return self._executable(state, self._nothing, batch)
        moving, fixed = split_frozen(state)
        moving, metrics = self._executable(moving, fixed, batch)
        return join(moving, fixed), metrics

    @property
    def compiled_bytes_per_device(self) -> int | None:
        """Bytes that the compiled step needs on each device; None where the backend does not say."""
        analysis = self._executable.memory_analysis()
        if analysis is None:
            return None
        sizes = analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes
        return sum(sizes) - analysis.alias_size_in_bytes

    def eval_shardings(self, abstract_batch: Any) -> Any:
        """Where the leaves of a batch for `eval_step` go: over the data shards if its rows split, else replicated."""
        return self._eval_program(abstract_batch)[1]

    def eval_step(self, params: Any, model_state: Any, batch: Any, rng: jax.Array) -> dict[str, tuple[Any, Any]]:
        """The loss and the metrics of a batch of any number of rows, with `training=False`, as sums and weights.

        Compiled once per shape of batch. Nothing is fetched.
        """
        return self._eval_program(batch)[0](params, model_state, batch, rng)

    def nonfinite_paths(self, state: TrainState, batch: Any) -> dict[str, list[str]]:
        """Run the gradient again and list the paths of `gradients`, `params` and `batch` that are not finite."""
        flags = jax.device_get(self._jit_nonfinite(state, batch))
        return {
            name: [path_str(path) for path, bad in jax.tree_util.tree_leaves_with_path(tree) if bad]
            for name, tree in flags.items()
        }

    @functools.cached_property
    def _executable(self) -> jax.stages.Compiled:
        # Called directly: as cheap as a call through jit (0.3 ms for a whole step of a tiny model, either way), and the
        # state's shapes can never make it compile again in silence.
        return self.lower().compile(compiler_options=options_on(self.plan, self.mesh.devices.flat[0].platform))

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))

    def _gradient(self, state: TrainState, batch: Any) -> tuple[Any, dict[str, tuple[Any, Any]], Any]:
        """Sums over the global batch: gradient (trainable leaves), totals by name, and the last model state."""
        plan = self.plan
        rng = jax.random.fold_in(state.rng, state.step)
        weights = cast_floats(state.params, plan.compute_dtype)
        if plan.compute_dtype != plan.param_dtype:  # cast before gathering, so that fewer bytes move
            weights = jax.lax.with_sharding_constraint(weights, self._param_shardings)
        trainable, fixed = split_trainable(weights)
        # With the optimizer's state split over data, sums over microbatches are too: whole, each would be gathered.
        at_rest = split_trainable_like(self._update_shardings, self._values.params)

        def one(microbatch: Any, index: Any, model_state: Any) -> tuple[Any, dict[str, tuple[Any, Any]], Any]:
            def total_of(trainable: Any) -> tuple[jax.Array, dict[str, Any]]:
                params = join_trainable(trainable, fixed)
                return self._pinned(params, microbatch, jax.random.fold_in(rng, index), model_state)

            (total, aux), grads = jax.value_and_grad(total_of, has_aux=True)(trainable)
            grads = jax.lax.with_sharding_constraint(cast_floats(grads, plan.accum_dtype), at_rest)
            return grads, {"loss": (total, aux["weight"]), **aux["metrics"]}, aux["state"]

        if plan.microbatches == 1:
            return one(batch, 0, state.model_state)

        def split(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            parts = x.reshape(x.shape[0] // plan.microbatches, plan.microbatches, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(parts, NamedSharding(self.mesh, P(None, *sharding.spec)))

        def body(carry: Any, inputs: Any) -> tuple[Any, None]:
            sums, totals, model_state = carry
            microbatch = jax.lax.with_sharding_constraint(inputs[0], self.batch_shardings)
            grads, more, model_state = one(microbatch, inputs[1], model_state)
            sums = jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, sums, grads), at_rest)
            return (sums, jax.tree.map(jnp.add, totals, more), model_state), None

        microbatches = jax.tree.map(split, batch, self.batch_shardings)
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), microbatches)
        shapes = jax.eval_shape(one, first, jnp.int32(0), state.model_state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
        sums = jax.lax.with_sharding_constraint(zeros[0], at_rest)
        inputs = microbatches, jnp.arange(plan.microbatches)
        carry, _ = jax.lax.scan(body, (sums, zeros[1], state.model_state), inputs)
        return carry

    def _step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        sums, totals, model_state = self._gradient(state, batch)
        means = {name: total / weight for name, (total, weight) in totals.items()}
        scale = 1.0 / totals["loss"][1]
        trainable, fixed = split_trainable(state.params)
        grads = jax.tree.map(lambda g, p: (g * scale.astype(g.dtype)).astype(p.dtype), sums, trainable)
        if self.plan.optimizer_sharding:
            split = split_trainable_like(self._update_shardings, self._values.params)
            grads = jax.lax.with_sharding_constraint(grads, split)
        squares = [jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32))) for g in jax.tree.leaves(grads)]
        grad_norm = jnp.sqrt(sum(squares, jnp.float32(0)))
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)

        def update(old: Any) -> Any:
            step, trainable, opt_state, _ = old
            updates, opt_state = self._optimizer.update(grads, opt_state, trainable)
            return step + 1, optax.apply_updates(trainable, updates), opt_state, model_state

        old = state.step, trainable, state.opt_state, state.model_state
        branch = self.mesh.devices.flat[0].platform == "cpu"
        step, trainable, opt_state, model_state = update_if(finite, update, old, branch=branch)
        metrics = {**means, "grad_norm": grad_norm, "skipped": jnp.where(finite, 0, 1)}
        metrics |= applied_rates(self._learning_rate, state, opt_state)
        return TrainState(step, join_trainable(trainable, fixed), opt_state, model_state, state.rng), metrics

    def _nonfinite(self, state: TrainState, batch: Any) -> dict[str, Any]:
        sums, _, _ = self._gradient(state, batch)

        def bad(x: jax.Array) -> Any:
            return ~jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else False

        def flags(tree: Any) -> Any:
            return jax.tree.map(bad, tree)

        return {"gradients": flags(sums), "params": flags(state.params), "batch": flags(batch)}

    def _eval_program(self, batch: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(batch)
        key = structure, tuple((tuple(x.shape), x.dtype) for x in leaves)
        if key not in self._eval_programs:
            self._eval_programs[key] = self._make_eval(batch)
        return self._eval_programs[key]

    def _make_eval(self, batch: Any) -> tuple[Any, Any]:
        plan = self.plan
        abstract_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        compute_dtype = plan.compute_dtype
        traced = trace_loss(self._loss_fn, self._values, abstract_batch, training=False, compute_dtype=compute_dtype)
        if batch_rows(abstract_batch) % plan.mesh.batch_shards == 0:
            layout = layout_of(traced, plan)
            loss = layout.pin(self.mesh, kernels=self.kernels)
            shardings = self._shardings(layout.specs("batch"))
        else:  # a tail: too small to be worth splitting, and every example counts
            loss = normalise_loss(self._loss_fn, training=False)
            shardings = jax.tree.map(lambda _: self._replicated, abstract_batch)

        def sums(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> dict[str, tuple[Any, Any]]:
            total, aux = loss(cast_floats(params, plan.compute_dtype), batch, rng, model_state)
            return {"loss": (total, aux["weight"]), **aux["metrics"]}

        arguments = (self._param_shardings, self.state_shardings.model_state, shardings, self._replicated)
        return jax.jit(sums, in_shardings=arguments, out_shardings=self._replicated), shardings


def spread_over_data(specs: Any, abstract: Any, mesh: MeshShape) -> Any:
    """Split arrays over `data` too, along the largest dimension that still divides; one that has none stays whole.

    ZeRO-1 (Rajbhandari et al. 2020): for the optimizer's state, which only the update reads.

    >>> weight = jax.ShapeDtypeStruct((8, 64), "float32")
    >>> tuple(spread_over_data(P(None, "tensor"), weight, MeshShape(data=4, tensor=2)))
    (None, ('tensor', 'data'))
    """

    def spread(spec: P, leaf: Any) -> P:
        entries = [*spec, *[None] * (len(leaf.shape) - len(spec))]
        axes = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in entries]
        ways = [math.prod(mesh.sizes[axis] for axis in held) for held in axes]
        fitting = [i for i, size in enumerate(leaf.shape) if size and size % (ways[i] * mesh.data) == 0]
        if mesh.data == 1 or not fitting or any(DATA in held for held in axes):
            return spec
        chosen = max(fitting, key=lambda i: leaf.shape[i] / ways[i])
        axes[chosen] = (*axes[chosen], DATA)
        return P(*(held if len(held) > 1 else held[0] if held else None for held in axes))

    return jax.tree.map(spread, specs, abstract, is_leaf=lambda x: isinstance(x, P))


def update_if(ok: jax.Array, update: Callable[[Any], Any], old: Any, *, branch: bool) -> Any:
    """Return `update(old)`, or `old` where `ok` is false; the leaves keep the dtypes of `old`.

    With `branch` as a conditional, else as a selection; the values are the same. What compilers make of the two with
    Adam, in bytes of temporaries over bytes of parameters (compiled; a decoder block of 50 M parameters, of 3 M on the
    CPU; 1 is the gradient, which has to be whole before it is known to be finite): CPU 1.0 and 2.3, since a selection
    makes it copy the moments before it overwrites them; H100 4.0 and 1.2, and a conditional would make the host wait
    for the device besides; v5e 1.3 and 1.1.
    """

    def same_dtypes(old: Any) -> Any:
        return jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), update(old), old)

    if branch:
        return jax.lax.cond(ok, same_dtypes, lambda old: old, old)
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), same_dtypes(old), old)


def applied_rates(
    learning_rate: Callable[[Any], Any] | None, state: TrainState, opt_state: Any
) -> dict[str, jax.Array]:
    """The learning rate that the step applies, under `learning_rate` (or `learning_rate/0`, ... if there are several).

    A schedule is asked at the number of optimizer steps done so far, which is what optax's own schedules count;
    under `optax.MultiSteps` that is its `gradient_step`. Without a schedule the rate is what `optax.inject_hyperparams`
    left in its state `opt_state` after the update; of a step that was not applied it is that of the last one that was.
    """
    if learning_rate is not None:
        wrapped = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_multi_steps) if _is_multi_steps(x)]
        count = wrapped[0].gradient_step if wrapped else state.step
        return {"learning_rate": jnp.asarray(learning_rate(count), jnp.float32)}
    rates = [
        jnp.asarray(leaf, jnp.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
        if path_str(path).endswith("hyperparams/learning_rate")
    ]
    return {"learning_rate" if len(rates) == 1 else f"learning_rate/{i}": rate for i, rate in enumerate(rates)}


def _is_multi_steps(x: Any) -> bool:
    return isinstance(x, optax.MultiStepsState)
