"""How the user's functions are called, and what they may return.

    loss = normalise_loss(loss_fn, training=True)
    total, aux = loss(params, batch, rng, state)      # a sum, its weight, metrics as (sum, weight), the new state

A user's function takes what it names of `(params, batch, rng, state, training)`. Inside, everything is a sum and a
weight, so that the mean over the global batch is the sum of sums over the sum of weights: whatever the mesh, the number
of microbatches and the mask.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sharding_rules import path_str

LOSS_ARGUMENTS = ("params", "batch", "rng", "state", "training")
PRED_ARGUMENTS = ("params", "batch", "rng", "state")
RESERVED_METRICS = ("loss", "grad_norm", "learning_rate", "skipped")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What a loss function may return when a scalar is not enough.

    Attributes:
        loss: scalar; the sum over the batch if `weight` is given, else the mean over its examples.
        weight: scalar; what the sum is divided by, such as the number of unmasked tokens.
        metrics: name to scalar (weighted as the loss is) or to a pair `(sum, weight)`.
        state: new mutable state, such as BatchNorm's; None leaves it as it was.
    """

    loss: Any
    weight: Any = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Any = None


def argument_names(fn: Callable[..., Any], allowed: Sequence[str], *, role: str) -> tuple[str, ...]:
    """Names of `allowed` that `fn` takes, in the order of its signature.

    >>> argument_names(lambda batch, params: 0.0, LOSS_ARGUMENTS, role="loss_fn")
    ('batch', 'params')

    Raises:
        ValueError: `fn` is not callable, or asks for an argument that is not one of `allowed`.
    """
    if not callable(fn):
        raise ValueError(f"{role} is a {type(fn).__name__}, not a function")
    names: list[str] = []
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return tuple(allowed)
        if name in allowed:
            names.append(name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{role} takes an argument {name!r}, which nobody gives it; it may name any of "
                f"({', '.join(allowed)}).{hint}"
            )
    return tuple(names)


def call_by_name(fn: Callable[..., Any], allowed: Sequence[str], *, role: str) -> Callable[..., Any]:
    """Wrap `fn` so that it is called with all of `allowed` as keywords and gets those it names.

    Raises:
        ValueError: see `argument_names`.
    """
    names = argument_names(fn, allowed, role=role)
    kinds = {name: p.kind for name, p in inspect.signature(fn).parameters.items()}
    positional = [name for name in names if kinds.get(name) is inspect.Parameter.POSITIONAL_ONLY]
    keyword = [name for name in names if name not in positional]

    def call(**values: Any) -> Any:
        return fn(*(values[name] for name in positional), **{name: values[name] for name in keyword})

    return call


def batch_rows(batch: Any) -> int:
    """Number of examples of a batch: the leading dimension that all its leaves share.

    Raises:
        ValueError: no leaves, a leaf without dimensions, or leading dimensions that disagree.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("the batch holds no arrays; collate_fn returns a tree of arrays with one row per example")
    shapes = {path_str(path) or "(the batch itself)": tuple(leaf.shape) for path, leaf in leaves}
    for path, shape in shapes.items():
        if not shape:
            raise ValueError(f"batch leaf {path!r} is a scalar; every leaf has one row per example")
    first, *rest = shapes.items()
    for path, shape in rest:
        if shape[0] != first[1][0]:
            raise ValueError(
                f"batch leaves disagree on the number of examples: {first[0]!r} has shape {first[1]}, "
                f"{path!r} has {shape}; the leading dimension of every leaf is the number of examples"
            )
    return first[1][0]


def normalise_loss(loss_fn: Callable[..., Any], *, training: bool) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """Turn a user's loss into `(params, batch, rng, state) -> (sum, {"weight", "metrics", "state"})`.

    Sums and weights are float32 scalars; `metrics` maps a name to a pair `(sum, weight)`; `state` has the structure and
    the dtypes of the state that went in.

    Raises:
        ValueError: at the call of this function for a bad signature; at tracing for a result of another form, with the
            shape that came back.
    """
    call = call_by_name(loss_fn, LOSS_ARGUMENTS, role="loss_fn")

    def normalised(params: Any, batch: Any, rng: Any, state: Any) -> tuple[jax.Array, dict[str, Any]]:
        output = loss_output(call(params=params, batch=batch, rng=rng, state=state, training=training))
        rows = batch_rows(batch)
        loss = _scalar(output.loss, "the loss")
        if output.weight is None:
            weight = jnp.float32(rows)
            total = loss * weight
        else:
            weight = _scalar(output.weight, "the weight of the loss")
            total = loss
        metrics = {}
        for name, value in sorted(output.metrics.items()):
            if name in RESERVED_METRICS:
                raise ValueError(
                    f"loss_fn returns a metric called {name!r}; the trainer logs its own under that name "
                    f"(taken: {', '.join(RESERVED_METRICS)})"
                )
            match value:
                case (value_sum, value_weight):
                    value_sum = _scalar(value_sum, f"the sum of metric {name!r}")
                    metrics[name] = (value_sum, _scalar(value_weight, f"the weight of metric {name!r}"))
                case _:
                    metrics[name] = (_scalar(value, f"metric {name!r}") * weight, weight)
        new_state = state if output.state is None else match_state(state, output.state)
        return total, {"weight": weight, "metrics": metrics, "state": new_state}

    return normalised


def loss_output(result: Any) -> LossOutput:
    """Read what a loss function returned.

    Accepts a scalar, `(sum, weight)`, `(loss, metrics)` where `loss` may itself be `(sum, weight)`, or a `LossOutput`.

    Raises:
        ValueError: anything else; says what came back.
    """
    match result:
        case LossOutput():
            return result
        case ((total, weight), Mapping() as metrics):
            return LossOutput(total, weight, metrics)
        case (loss, Mapping() as metrics):
            return LossOutput(loss, None, metrics)
        case (total, weight) if not isinstance(weight, tuple | list):
            return LossOutput(total, weight)
        case tuple() | list() | Mapping() | None:
            raise ValueError(
                f"loss_fn returned {_describe(result)}; it returns a scalar mean, (sum, weight), (loss, metrics dict) "
                "or LossOutput(loss, weight, metrics, state)"
            )
        case _:
            return LossOutput(result)


def match_state(old: Any, new: Any) -> Any:
    """Give `new` the dtypes of `old`.

    Raises:
        ValueError: another structure or other shapes; names the first paths that differ.
    """
    differences = tree_differences(old, new, dtypes=False)
    if differences:
        raise ValueError("loss_fn returned a state unlike the one it was given: " + "; ".join(differences[:3]))
    return jax.tree.map(lambda a, b: jnp.asarray(b).astype(a.dtype), old, new)


def tree_differences(expected: Any, actual: Any, *, dtypes: bool = True) -> list[str]:
    """Say in words where two trees of arrays differ in paths, shapes and dtypes; empty if nowhere."""
    want = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    have = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(actual)}
    out = [f"{path!r} is missing (expected {_describe(want[path])})" for path in want if path not in have]
    out += [f"{path!r} is not expected (it is {_describe(have[path])})" for path in have if path not in want]
    for path, leaf in want.items():
        if path in have and jnp.shape(have[path]) != tuple(leaf.shape):
            out.append(f"{path!r} has shape {jnp.shape(have[path])}, expected {tuple(leaf.shape)}")
        elif path in have and dtypes and have[path].dtype != leaf.dtype:
            out.append(f"{path!r} has dtype {have[path].dtype}, expected {leaf.dtype}")
    if not out and jax.tree.structure(expected) != jax.tree.structure(actual):
        out.append(f"the containers differ: {jax.tree.structure(actual)}, expected {jax.tree.structure(expected)}")
    return out


def describe_tree(tree: Any, *, limit: int = 8) -> str:
    """List the leaves of a tree as `path: dtype(shape)`, the first `limit` of them.

    >>> import numpy as np
    >>> describe_tree({"x": np.zeros((2, 3), "float32")})
    'x: float32(2, 3)'
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = ", ".join(f"{path_str(path) or 'itself'}: {_describe(leaf)}" for path, leaf in leaves[:limit])
    return (text or "nothing") + (f", and {len(leaves) - limit} more" if len(leaves) > limit else "")


def _scalar(value: Any, what: str) -> jax.Array:
    shape = getattr(value, "shape", ())
    if not isinstance(value, int | float | bool) and not hasattr(value, "dtype"):
        raise ValueError(f"loss_fn: {what} is {_describe(value)}; it must be a scalar")
    if tuple(shape):
        raise ValueError(
            f"loss_fn: {what} has shape {tuple(shape)}; it must be a scalar. For a mean over the global batch return "
            "its .mean(), or its .sum() with the number of entries as (sum, weight)"
        )
    return jnp.asarray(value).astype(jnp.float32)


def _describe(value: Any) -> str:
    match value:
        case tuple() | list():
            return f"a {type(value).__name__} of {len(value)}: ({', '.join(_describe(v) for v in value)})"
        case Mapping():
            return f"a dict with keys {list(value)}"
        case None:
            return "None"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{tuple(value.shape)}" if value.shape else f"{value.dtype} scalar"
    return f"a {type(value).__name__}"
