"""Sharded equals unsharded: loss and every gradient, every model of the zoo, on every kind of mesh."""

import functools

import jax
import numpy as np
import pytest
import zoo
from jax.sharding import NamedSharding
from zoo.base import abstract_key

from sharding_rules import MeshShape, make_layout, make_mesh, trace

TOLERANCE = 1e-4
"""Relative to the largest entry of each gradient: float32 sums in another order."""
MESHES = {
    "data=8": "data",
    "fsdp=8": "fsdp",
    "data=2,tensor=4": "megatron",
    "fsdp=2,tensor=4": "fsdp+megatron",
    "data=2,fsdp=2,tensor=2": "fsdp+megatron+sequence",
}
REMAT = {"fsdp=8": "full", "data=2,fsdp=2,tensor=2": "dots"}
"""Some meshes also rematerialise, to cover both."""
VARIANTS = {
    "gpt2_reshaped",
    "llama_unrolled",
    "llama_repeat",
    "llama_sdpa",
    "llama_fused",
    "llama_remat",
    "llama_linen_unrolled",
    "mlp_equal",
    "mlp_residual",
    "moe_ragged",
    "vit_reshape",
    "resnet_group",
    "equinox_transformer",
    "mixer",
}
"""Another way to write a model that runs on every mesh; on those but two they are marked slow."""
EXTRA = {
    ("moe_one_hot", "data=2,expert=2,tensor=2"): "megatron",
    ("moe_ragged", "fsdp=2,expert=4"): "fsdp",
    ("llama_scanned", "data=2,context=2,tensor=2"): "megatron",
    ("llama_sdpa", "data=2,context=4"): "data",
    ("t5", "fsdp=2,context=4"): "fsdp",
    ("llama_scanned", "tensor=8"): "megatron",  # more than its 4 kv heads
}
"""Meshes that only some models can use."""
QUICK_FOR_VARIANTS = {"fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2"}


def cases():
    for name in zoo.MODELS:
        for mesh in MESHES:
            marks = [pytest.mark.xdist_group(name)]
            if name in VARIANTS and mesh not in QUICK_FOR_VARIANTS:
                marks.append(pytest.mark.slow)
            yield pytest.param(name, mesh, MESHES[mesh], marks=marks, id=f"{name}-{mesh}")
    for (name, mesh), preset in EXTRA.items():
        yield pytest.param(name, mesh, preset, marks=pytest.mark.xdist_group(name), id=f"{name}-{mesh}")


@functools.cache
def reference(name):
    model = zoo.MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0))
    batch = model.make_batch(np.random.default_rng(0), 8)
    loss, gradients = jax.jit(jax.value_and_grad(model.loss, allow_int=True))(params, batch, jax.random.key(1))
    traced = trace(model.loss, params, batch, abstract_key(), names=("params", "batch", "rng"))
    return params, batch, float(loss), gradients, make_layout(traced, MeshShape())


@pytest.mark.parametrize("name, mesh_name, preset", list(cases()))
def test_loss_and_gradients_equal_unsharded(name, mesh_name, preset):
    params, batch, loss, gradients, layout = reference(name)
    shape = MeshShape.parse(mesh_name)
    layout = layout.on(shape, preset)
    mesh = make_mesh(shape)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, layout.specs("params"))
    pinned = layout.pin(mesh, REMAT.get(mesh_name, "none"))
    got, sharded = jax.jit(jax.value_and_grad(pinned))(placed, batch, jax.random.key(1))
    assert float(got) == pytest.approx(loss, rel=1e-5)
    for path, want, have in zip(layout.table.paths("params"), *map(jax.tree.leaves, (gradients, sharded)), strict=True):
        scale = float(np.abs(want).max())
        assert float(np.abs(np.asarray(want) - np.asarray(have)).max()) <= TOLERANCE * scale + 1e-7, path
