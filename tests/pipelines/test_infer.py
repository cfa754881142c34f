"""Prediction programs: sharded equals unsharded, parameters on the mesh stay where they are."""

import jax
import numpy as np
import pytest
from small_models import init_mlp, logits, make_batch

from pipelines import build_predict_program
from search import Plan
from sharding_rules import MeshShape, make_mesh

PARAMS = init_mlp(jax.random.key(0))
F32_SHARDED = 1e-4


def pred_fn(params, batch):
    return logits(params, batch["x"])


def build(shape, preset, params=PARAMS, rows=8, **plan):
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    return build_predict_program(pred_fn, params, make_batch(rows), Plan(shape, preset, **plan), mesh)


@pytest.mark.parametrize(
    "shape, preset",
    [
        (MeshShape(data=8), "data"),
        (MeshShape(fsdp=8), "fsdp"),
        (MeshShape(data=2, fsdp=2, tensor=2), "fsdp+megatron"),
    ],
)
def test_prediction_on_a_mesh_equals_one_device(shape, preset):
    program = build(shape, preset)
    params, state = program.place(PARAMS)
    batch = make_batch(8)
    outputs = program.predict(params, jax.device_put(batch, program.batch_shardings), jax.random.key(0), state)
    np.testing.assert_allclose(outputs, pred_fn(PARAMS, batch), rtol=F32_SHARDED, atol=1e-6)


def test_parameters_on_the_mesh_keep_their_shardings():
    placed, _ = build(MeshShape(fsdp=8), "fsdp").place(PARAMS)
    program = build(MeshShape(fsdp=8), "fsdp", params=placed)
    assert program.param_shardings == jax.tree.map(lambda x: x.sharding, placed)
    assert program.place(placed)[0]["w"] is placed["w"]


def test_compute_dtype_reaches_the_prediction():
    program = build(MeshShape(), "data", compute_dtype="bfloat16")
    outputs = program.predict(PARAMS, make_batch(8), jax.random.key(0))
    np.testing.assert_allclose(outputs, pred_fn(PARAMS, make_batch(8)), rtol=2e-2, atol=2e-2)
    assert not np.array_equal(outputs, pred_fn(PARAMS, make_batch(8)))


def test_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 6 examples is smaller than 8 data shards"):
        build(MeshShape(data=8), "data", rows=6)


def test_bytes_are_those_of_the_compiled_program():
    shape = MeshShape(fsdp=4, tensor=2)
    mesh, batch = make_mesh(shape, jax.devices()), {"x": make_batch(8)["x"]}
    program = build_predict_program(pred_fn, PARAMS, batch, Plan(shape, "fsdp+megatron"), mesh)
    analysis = program.lower().compile().memory_analysis()
    key = 8  # which this function does not read: no argument of the compiled program
    assert program.device_bytes == {
        "arguments": analysis.argument_size_in_bytes + key,
        "results": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
    }
