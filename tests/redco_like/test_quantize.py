"""NF4: the paper's codes, errors within the widest gap, exact where it can be, 4.5 bits; opened inside the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from redco_like.models import ModelConfig, build_model
from redco_like.quantize import BLOCK, CODES, Nf4, dequantize, quantize
from sharding_rules import trainable

WIDEST = float(np.diff(CODES).max())


def kernel_of(shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, shape) * scale, jnp.float32)


def test_codes_are_the_papers():
    """Equal shares of the normal distribution on each side of an exact zero, as section 3 of QLoRA makes them."""
    offset = 0.9677083
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([0.0, *positive, *negative])
    np.testing.assert_allclose(CODES, values / values.max(), atol=1e-6)
    assert len(set(CODES.tolist())) == 16


@given(
    shape=st.sampled_from([((), 1, 5), ((2,), 3, 4)]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(max_examples=15)
def test_error_is_at_most_half_the_widest_gap_of_each_block(shape, seed, scale):
    front, blocks, outputs = shape
    kernel = kernel_of((*front, blocks * BLOCK, outputs), seed, scale)
    found = quantize({"w": kernel}, ["w"])["w"]
    assert found.shape == kernel.shape
    error = np.abs(np.asarray(found.dequantize() - kernel)).reshape(*front, blocks, BLOCK, outputs).max(-2)
    most = np.abs(np.asarray(kernel)).reshape(*front, blocks, BLOCK, outputs).max(-2)
    assert (error <= most * WIDEST / 2 * (1 + 1e-5)).all()


def test_codes_times_a_scale_come_back_exactly():
    index = np.random.default_rng(0).integers(0, 16, (2 * BLOCK, 5))
    index[::BLOCK] = 15
    kernel = CODES[index] * np.repeat([[0.5], [8.0]], BLOCK, 0)
    found = quantize({"w": jnp.asarray(kernel, jnp.float32)}, ["w"])["w"]
    np.testing.assert_array_equal(found.dequantize(), kernel.astype(np.float32))
    zeros = jnp.zeros((BLOCK, 2))
    np.testing.assert_array_equal(quantize({"w": zeros}, ["w"])["w"].dequantize(), zeros)


def test_bits_per_weight():
    kernel = kernel_of((4096, 1024))
    assert quantize({"w": kernel}, ["w"])["w"].nbytes * 8 / kernel.size == 4.5
    double = quantize({"w": kernel}, ["w"], double=True)["w"]
    assert double.nbytes * 8 / kernel.size == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_scales_in_8_bits_add_little_error():
    kernel = kernel_of((2, 4 * BLOCK, 512))
    error, double_error = (
        float(jnp.abs(quantize({"w": kernel}, ["w"], double=double)["w"].dequantize() - kernel).mean())
        for double in (False, True)
    )
    assert double_error < 1.05 * error


def test_flax_modules_read_the_kernel_inside_the_loop_over_layers():
    sizes = {"embed": 64, "layers": 3, "heads": 2, "mlp": 192, "vocab": 50, "norm": "rms"}
    model = build_model(ModelConfig("llama", "decoder", **sizes), dtype="float32")
    params = jax.jit(model.init_fn)(jax.random.key(0))
    small = quantize(params, ["*/kernel"])
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    batch = {"tokens": tokens, "labels": tokens}
    loss_fn = jax.jit(model.loss_fn)
    np.testing.assert_allclose(loss_fn(small, batch), loss_fn(dequantize(small), batch), rtol=1e-6)
    text = str(jax.make_jaxpr(model.loss_fn)(small, batch))
    assert "f32[64,192]" in text
    assert "f32[3,64,192]" not in text


def test_quantised_leaves_are_never_trained_and_the_others_stay():
    params = {"a": kernel_of((BLOCK, 4)), "b": jnp.ones(3)}
    small = quantize(params, ["a"])
    assert isinstance(small["a"], Nf4)
    assert small["b"] is params["b"]
    assert jax.tree.leaves(trainable(small)) == [False, False, True]
    assert dequantize(small, jnp.bfloat16)["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "params, pattern, message",
    [
        ({"w": jnp.ones((96, 4))}, "w", r"'w' of shape \(96, 4\) has 96 inputs, .*nearest: block=48"),
        ({"w": jnp.ones((63, 4))}, "w", "nearest: a pattern that leaves it out"),
        ({"w": jnp.ones(64)}, "w", r"'w' is float32\(64,\); only floating matrices"),
        ({"w": jnp.ones((64, 2), jnp.int32)}, "w", "only floating matrices"),
        ({"up/kernel": jnp.ones((64, 2))}, "*/kern", "matches none of the 1 parameters; nearest: up/kernel"),
        (quantize({"w": jnp.ones((64, 2))}, "w"), "w", "'w' is quantised already"),
    ],
)
def test_leaves_that_cannot_be_quantised_are_refused(params, pattern, message):
    with pytest.raises(ValueError, match=message):
        quantize(params, pattern)
