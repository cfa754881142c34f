"""What there is to train, as shapes: parameters, the traced loss, its layout; and what every step is checked for first.

    values = abstract_init(loss_fn, init_fn, "float32")
    traced = trace_loss(loss_fn, values, abstract_batch, training=True, compute_dtype="float32")
    layout = layout_of(traced, plan)

Nothing is allocated and no device is needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from pipelines.functions import LOSS_ARGUMENTS, argument_names, describe_tree, normalise_loss
from search import Plan
from search.liveness import itemsize
from sharding_rules import Layout, MeshShape, TracedFunction, is_frozen, make_layout, path_str, trace, trainable
from sharding_rules.frozen import join

NAMES = ("params", "batch", "rng", "state")


@dataclasses.dataclass(frozen=True)
class InitialValues:
    """What `init_fn` makes, as shapes: `params` in the plan's dtype and `state` as it comes."""

    params: Any
    state: Any


def abstract_init(loss_fn: Callable[..., Any], init_fn: Callable[..., Any], param_dtype: str) -> InitialValues:
    """Shapes of the parameters and of the mutable state, without making them.

    Raises:
        ValueError: `init_fn` does not return `(params, state)` though `loss_fn` names `state`, or not only arrays.
    """
    takes_state = "state" in argument_names(loss_fn, LOSS_ARGUMENTS, role="loss_fn")
    params, state = jax.eval_shape(init_values(init_fn, takes_state, param_dtype), abstract_key())
    return InitialValues(params, state)


def trace_loss(
    loss_fn: Callable[..., Any], values: InitialValues, abstract_batch: Any, *, training: bool, compute_dtype: str
) -> TracedFunction:
    """Trace the normalised loss on abstract values; its arguments are called params, batch, rng and state.

    An exception of the user's function keeps its type and gets a note that lists what the function was given.
    """
    loss = normalise_loss(loss_fn, training=training)
    params = cast_floats(values.params, compute_dtype)
    try:
        return trace(loss, params, abstract_batch, abstract_key(), values.state, names=NAMES)
    except Exception as error:
        error.add_note(
            f"while tracing loss_fn with the parameters that init_fn makes ({describe_tree(params)}), "
            f"a batch of ({describe_tree(abstract_batch)}) and a state of ({describe_tree(values.state)})"
        )
        raise


def train_problem(
    loss_fn: Callable[..., Any],
    init_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    abstract_batch: Any,
    compute_dtype: str,
) -> tuple[TracedFunction, Any]:
    """What the planner looks at: the loss traced on the whole global batch, and the optimizer state's shapes."""
    values = abstract_init(loss_fn, init_fn, "float32")
    traced = trace_loss(loss_fn, values, abstract_batch, training=True, compute_dtype=compute_dtype)
    return traced, jax.eval_shape(optimizer.init, split_trainable(values.params)[0])


def layout_of(traced: TracedFunction, plan: Plan) -> Layout:
    """Lay a traced function out as the plan says."""
    rules = tuple((pattern, P(*spec)) for pattern, spec in plan.rules)
    return make_layout(traced, plan.mesh, plan.preset, rules=rules)


def check_rows(rows: int, *, microbatches: int, mesh: MeshShape, what: str = "global batch") -> None:
    """Refuse a batch that does not split over microbatches and data shards.

    >>> check_rows(12, microbatches=1, mesh=MeshShape(data=8))
    Traceback (most recent call last):
    ValueError: a global batch of 12 examples does not split over 8 data shards (mesh data=8); nearest: 8 or 16

    Raises:
        ValueError: names the nearest sizes that work.
    """
    shards = mesh.batch_shards
    unit = microbatches * shards
    if rows and rows % unit == 0:
        return
    below, above = rows // unit * unit, -(-rows // unit) * unit or unit
    over = f"{shards} data shards (mesh {mesh})"
    over = over if microbatches == 1 else f"{microbatches} microbatches x {over} = {unit}"
    verb = "is smaller than" if rows < unit else "does not split over"
    raise ValueError(f"a {what} of {rows} examples {verb} {over}; nearest: {f'{below} or ' if below else ''}{above}")


def cast_floats(tree: Any, dtype: str) -> Any:
    """Cast the floating leaves of a tree; integers, booleans, keys and what is frozen stay. Works on shapes too."""

    def cast(x: Any) -> Any:
        if is_frozen(x):
            return x
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype or jnp.finfo(x.dtype).bits < 16:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))
        return x.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=is_frozen)


def split_trainable(params: Any) -> tuple[Any, Any]:
    """Part a tree into leaves that are trained and the rest, with None where the other has a leaf."""
    trained = trainable(params)
    values = jax.tree.map(lambda x, ok: x if ok else None, params, trained)
    return values, jax.tree.map(lambda x, ok: None if ok else x, params, trained)


def join_trainable(trained: Any, fixed: Any) -> Any:
    """Undo `split_trainable`."""
    return join(trained, fixed)


def split_trainable_like(tree: Any, params: Any) -> Any:
    """The part of `tree` (structured as `params`) that belongs to parameters that are trained, None elsewhere."""
    return jax.tree.map(lambda ok, x: x if ok else None, trainable(params), tree)


def init_values(init_fn: Callable[..., Any], takes_state: bool, param_dtype: str) -> Callable[[Any], tuple[Any, Any]]:
    def values(rng: jax.Array) -> tuple[Any, Any]:
        made = init_fn(rng)
        for path, leaf in jax.tree_util.tree_leaves_with_path(made):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                raise ValueError(
                    f"init_fn returned a {type(leaf).__name__} at {path_str(path) or 'its top'!r}: every leaf must be "
                    "an array. Of a model object that also holds functions or settings, keep those aside "
                    "(equinox.partition, nnx.split) and join them again in loss_fn"
                )
        if not takes_state:
            return cast_floats(made, param_dtype), {}
        if not (isinstance(made, tuple) and len(made) == 2):
            raise ValueError(
                f"loss_fn names `state`, so init_fn(rng) returns (params, state); it returned a {type(made).__name__}"
            )
        return cast_floats(made[0], param_dtype), made[1]

    return values


def init_like(params: Any, state: Any = None) -> Callable[[Any], Any]:
    """An `init_fn` of zeros, with the form of what is given: for values that come from elsewhere."""
    forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params if state is None else (params, state))
    return lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forms)


def local_bytes(abstract: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * itemsize(x.dtype) for x in jax.tree.leaves(abstract))


def abstract_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key, 0)
