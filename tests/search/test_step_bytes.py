"""Parameters, gradients and optimizer state on a device: counted as they are placed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from search import step_bytes
from sharding_rules import MeshShape, make_layout, make_mesh, trace

EMBED, MLP, VOCAB, LAYERS, BATCH, LENGTH = 32, 128, 64, 4, 16, 8


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def loss(params, batch):
    def block(x, p):
        return x + jnp.sin(jnp.tanh(x @ p["u"])) @ p["v"], None

    x, _ = jax.lax.scan(block, params["t"][batch["i"]], params["b"])
    return jax.nn.log_softmax(x @ params["t"].T).mean()


PARAMS = {"t": f32(VOCAB, EMBED), "b": {"u": f32(LAYERS, EMBED, MLP), "v": f32(LAYERS, MLP, EMBED)}}
TRACED = trace(loss, PARAMS, {"i": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)}, names=("params", "batch"))
OPTIMIZER = jax.eval_shape(optax.adam(1e-3).init, PARAMS)
ELEMENTS = VOCAB * EMBED + 2 * LAYERS * EMBED * MLP


@pytest.mark.parametrize(
    "mesh, preset",
    [
        (MeshShape(), "data"),
        (MeshShape(data=8), "data"),
        (MeshShape(fsdp=8), "fsdp"),
        (MeshShape(fsdp=2, tensor=4), "fsdp+megatron"),
    ],
)
def test_parameters_and_optimizer_are_counted_exactly(mesh, preset):
    layout = make_layout(TRACED, mesh, preset)
    counted = step_bytes(layout, OPTIMIZER, remat="none", microbatches=1)
    device_mesh = make_mesh(mesh, jax.devices()[: mesh.size])

    def placed(tree, specs):
        arrays = jax.tree.map(
            lambda leaf, spec: jax.device_put(np.zeros(leaf.shape, leaf.dtype), NamedSharding(device_mesh, spec)),
            tree,
            specs,
        )
        first = device_mesh.devices.flat[0]
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(arrays)
            for shard in leaf.addressable_shards
            if shard.device == first
        )

    assert counted.params == placed(PARAMS, layout.specs("params")) == layout.bytes_per_device("params")
    assert counted.optimizer == placed(OPTIMIZER, layout.state_specs(OPTIMIZER))
    assert counted.gradients == counted.params


def test_half_precision_parameters_are_counted_as_such():
    layout = make_layout(TRACED, MeshShape(), "data")
    counted = step_bytes(layout, OPTIMIZER, remat="none", microbatches=1, param_dtype="bfloat16")
    assert (counted.params, counted.gradients) == (2 * ELEMENTS, 4 * ELEMENTS)
