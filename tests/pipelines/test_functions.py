"""The calling convention: which arguments, which results, and what is said when they are wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipelines import LossOutput
from pipelines.functions import (
    LOSS_ARGUMENTS,
    argument_names,
    batch_rows,
    call_by_name,
    match_state,
    normalise_loss,
    tree_differences,
)

ROWS = 4
BATCH = {"x": np.arange(ROWS, dtype=np.float32)}


def run(loss_fn, *, training=True, state=None):
    state = {} if state is None else state
    total, aux = normalise_loss(loss_fn, training=training)(2.0, BATCH, jax.random.key(0), state)
    metrics = {name: (float(a), float(b)) for name, (a, b) in aux["metrics"].items()}
    return float(total), float(aux["weight"]), metrics, aux["state"]


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda params, batch: 0, ("params", "batch")),
        (lambda batch, *, training: 0, ("batch", "training")),
        (lambda **everything: 0, LOSS_ARGUMENTS),
        (lambda params, scale=3.0: 0, ("params",)),
        (functools.partial(lambda params, batch, scale: 0, scale=2.0), ("params", "batch")),
        (jax.jit(lambda state, params: 0), ("state", "params")),
    ],
)
def test_arguments_taken_by_name_follow_the_signature(fn, expected):
    assert argument_names(fn, LOSS_ARGUMENTS, role="loss_fn") == expected


def test_positional_only_arguments_are_given_in_order():
    call = call_by_name(lambda batch, params, /: (batch, params), LOSS_ARGUMENTS, role="loss_fn")
    assert call(params=1, batch=2, rng=3, state=4, training=True) == (2, 1)


def test_unknown_argument_is_refused_with_the_allowed_names():
    with pytest.raises(ValueError, match=r"loss_fn takes an argument 'parms'.*batch, rng, state, training.*'params'"):
        normalise_loss(lambda parms, batch: 0.0, training=True)
    with pytest.raises(ValueError, match="loss_fn is a int, not a function"):
        normalise_loss(3, training=True)


def test_scalar_loss_is_a_mean_weighted_by_examples():
    assert run(lambda batch: batch["x"].mean())[:2] == (6.0, 4.0)


def test_sum_and_weight_stay_what_they_are():
    assert run(lambda batch: (batch["x"].sum(), jnp.int32(3)))[:2] == (6.0, 3.0)


def test_metrics_take_the_weight_of_the_loss_or_their_own():
    total, weight, metrics, _ = run(lambda batch: ((batch["x"].sum(), 3), {"a": jnp.float32(2), "b": (5.0, 10)}))
    assert (total, weight, metrics) == (6.0, 3.0, {"a": (6.0, 3.0), "b": (5.0, 10.0)})


def test_loss_output_carries_weight_metrics_and_state():
    state = {"mean": jnp.zeros(2, jnp.float32)}

    def loss_fn(batch, state, training):
        assert training
        return LossOutput(batch["x"].sum(), 2, {"n": 1.0}, {"mean": state["mean"].astype(jnp.bfloat16) + 1})

    total, weight, metrics, new = run(loss_fn, state=state)
    assert (total, weight, metrics) == (6.0, 2.0, {"n": (2.0, 2.0)})
    assert new["mean"].dtype == jnp.float32
    assert new["mean"].tolist() == [1.0, 1.0]


def test_training_flag_reaches_the_loss():
    assert run(lambda training: jnp.float32(1 if training else 2), training=False)[0] == 8.0


@pytest.mark.parametrize(
    "result, message",
    [
        (jnp.zeros(ROWS), r"the loss has shape \(4,\); it must be a scalar.*\.mean\(\)"),
        ((jnp.zeros(ROWS), 1), r"the loss has shape \(4,\)"),
        ((jnp.float32(0), jnp.zeros(ROWS)), r"the weight of the loss has shape \(4,\)"),
        ((0.0, 1.0, 2.0), r"loss_fn returned a tuple of 3"),
        ((0.0, (1.0, 2.0)), r"loss_fn returned a tuple of 2"),
        ({"loss": 0.0}, r"a dict with keys \['loss'\]"),
        (None, "loss_fn returned None"),
        ("high", "the loss is a str"),
        ((0.0, {"m": jnp.zeros(3)}), r"metric 'm' has shape \(3,\)"),
        ((0.0, {"m": "x"}), "metric 'm' is a str"),
        ((0.0, {"grad_norm": 1.0}), "a metric called 'grad_norm'"),
    ],
)
def test_result_of_another_form_is_refused_by_name_and_shape(result, message):
    with pytest.raises(ValueError, match=message):
        run(lambda: result)


def test_state_of_another_shape_is_refused_by_path():
    with pytest.raises(ValueError, match=r"'mean' has shape \(3,\), expected \(2,\)"):
        match_state({"mean": jnp.zeros(2)}, {"mean": jnp.zeros(3)})
    with pytest.raises(ValueError, match="'var' is not expected"):
        match_state({"mean": jnp.zeros(2)}, {"mean": jnp.zeros(2), "var": jnp.zeros(2)})


@pytest.mark.parametrize(
    "batch, message",
    [
        ({}, "holds no arrays"),
        ({"x": np.float32(1)}, "batch leaf 'x' is a scalar"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, r"'x' has shape \(4, 2\), 'y' has \(3,\)"),
    ],
)
def test_batch_without_common_rows_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        batch_rows(batch)


def test_tree_differences_of_equal_trees_are_none():
    tree = {"a": np.zeros((2, 3)), "b": [np.zeros(1)]}
    assert tree_differences(tree, tree) == []
    assert "dtype float32" in tree_differences(tree, {"a": np.zeros((2, 3), np.float32), "b": tree["b"]})[0]
