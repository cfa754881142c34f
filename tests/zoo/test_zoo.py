"""Each model of the zoo runs on one device: loss and gradients are finite, expectations fit its parameters."""

import time

import jax
import numpy as np
import pytest

import sharding_rules
import zoo

QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_model_has_finite_loss_and_gradients(name):
    model = zoo.MODELS[name]
    params = jax.jit(model.init, compiler_options=QUICK_COMPILE)(jax.random.key(0))
    batch = model.make_batch(np.random.default_rng(0), 8)
    loss, grads = jax.jit(jax.value_and_grad(model.loss), compiler_options=QUICK_COMPILE)(
        params, batch, jax.random.key(1)
    )
    assert np.isfinite(loss)
    unused = [
        path
        for path, grad in zip(sharding_rules.tree_paths(grads), jax.tree.leaves(grads), strict=True)
        if not (np.isfinite(grad).all() and np.any(np.asarray(grad)))
    ]
    assert not unused


@pytest.mark.parametrize("name", zoo.MODELS)
def test_expectations_fit_the_parameters(name):
    model = zoo.MODELS[name]
    params = model.abstract_params()
    ranks = dict(zip(sharding_rules.tree_paths(params), (x.ndim for x in jax.tree.leaves(params)), strict=True))
    for expected in (model.expected_roles, model.megatron):
        assert {path: len(dims) for path, dims in expected.items()} == {path: ranks.get(path) for path in expected}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_loss_is_a_mean_over_any_batch(name):
    model = zoo.MODELS[name]
    for global_batch in (4, 16):
        args = (model.abstract_params(), model.abstract_batch(global_batch), zoo.base.abstract_key())
        assert jax.eval_shape(model.loss, *args).shape == ()


@pytest.mark.parametrize("scanned", [True, False])
def test_llama_8b_has_eight_billion_parameters_and_no_array(scanned):
    began = time.perf_counter()
    loss, params, batch = zoo.llama_8b(scanned)
    assert sum(x.size for x in jax.tree.leaves(params)) == 8_030_261_248
    assert jax.eval_shape(loss, params, batch).shape == ()
    assert time.perf_counter() - began < 20


def test_llama_pinning_is_float32_at_rest():
    loss, params, batch = zoo.llama_pinning()
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    assert jax.eval_shape(loss, params, batch).shape == ()
