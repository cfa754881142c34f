"""The plan taken by a count of bytes: what it picks as memory shrinks, what it says, and the count itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from search import Plan, auto_plan, step_bytes
from sharding_rules import MeshShape, PlanError, format_bytes, make_layout, make_mesh, trace

EMBED, MLP, VOCAB, LAYERS, BATCH, LENGTH = 32, 128, 64, 4, 16, 8
P = jax.P


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
KEPT = 4 * ELEMENTS * 4  # parameters, gradients and two moments, float32


def plan_for(memory_bytes, **options):
    return auto_plan(TRACED, OPTIMIZER, **{"n_devices": 8, **options}, memory_bytes=memory_bytes)


def bytes_of(plan):
    layout = make_layout(TRACED, plan.mesh, plan.preset)
    return step_bytes(layout, OPTIMIZER, remat=plan.remat, microbatches=plan.microbatches)


def test_data_parallelism_is_taken_where_it_fits():
    plan = plan_for(10 * KEPT)
    assert (plan.preset, plan.mesh, plan.microbatches, plan.remat) == ("data", MeshShape(data=8), 1, "none")
    assert "analytic" in plan.reason


def test_fsdp_is_taken_where_the_parameters_do_not_fit():
    plan = plan_for(KEPT)
    assert (plan.preset, plan.mesh) == ("fsdp", MeshShape(fsdp=8))
    assert plan.remat == "none"
    assert "data on data=8" in plan.reason  # what would have been taken, and what it would need


def test_everything_is_recomputed_before_the_batch_is_cut():
    taken = [plan_for(memory) for memory in (KEPT // 2, KEPT // 3, 2 * KEPT // 7, KEPT // 4)]
    order = [("none", "dots", "full").index(plan.remat) + plan.microbatches for plan in taken]
    assert order == sorted(order)
    assert taken[-1].remat != "none"


@pytest.mark.parametrize("memory", [10 * KEPT, KEPT, KEPT // 2, KEPT // 3, KEPT // 4])
def test_what_is_taken_fits_by_its_own_count(memory):
    plan = plan_for(memory)
    assert plan.mesh.size == 8
    assert bytes_of(plan).total <= 0.85 * memory
    assert BATCH % (plan.microbatches * plan.mesh.batch_shards) == 0


def test_less_memory_never_needs_more_bytes():
    totals = [bytes_of(plan_for(memory)).total for memory in (10 * KEPT, KEPT, KEPT // 3, KEPT // 4)]
    assert totals == sorted(totals, reverse=True)


def test_tensor_parallelism_is_taken_where_the_batch_is_too_small():
    traced = trace(loss, PARAMS, {"i": jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)}, names=("params", "batch"))
    plan = auto_plan(traced, OPTIMIZER, n_devices=8, memory_bytes=KEPT)
    assert (plan.preset, plan.mesh) == ("fsdp+megatron", MeshShape(fsdp=4, tensor=2))


def test_a_mesh_that_is_asked_for_is_kept():
    mesh = MeshShape(data=2, fsdp=2, tensor=2)
    plan = plan_for(10 * KEPT, mesh=mesh)
    assert (plan.mesh, plan.preset) == (mesh, "fsdp+megatron")
    assert "the mesh asked for" in plan.reason


def test_the_tensor_axis_stays_inside_a_node():
    with pytest.raises(PlanError, match="no mesh of 8 devices suits this model and batch"):
        small = trace(loss, PARAMS, {"i": jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)}, names=("params", "batch"))
        auto_plan(small, OPTIMIZER, n_devices=8, memory_bytes=KEPT, devices_per_node=4)


def test_nothing_fits_says_what_is_needed():
    with pytest.raises(PlanError) as caught:
        plan_for(10_000)
    message = str(caught.value)
    assert "on 8 devices" in message
    assert "take more devices" in message
    closest = re.search(r"the closest, (\S+) on (\S+), remat full, (\d+) microbatches, needs (\S+ \S+);", message)
    preset, mesh, microbatches, needed = closest.groups()
    plan = Plan(MeshShape.parse(mesh), preset, microbatches=int(microbatches), remat="full")
    assert needed == format_bytes(bytes_of(plan).total)
    assert bytes_of(plan).total <= bytes_of(plan_for(KEPT // 4)).total


def test_a_mesh_that_the_model_cannot_use_names_the_dimension():
    with pytest.raises(PlanError, match="tensor=3"):
        plan_for(10 * KEPT, n_devices=6, mesh=MeshShape(data=2, tensor=3))


# The count.


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
