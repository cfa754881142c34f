"""What is frozen: laid out by the plan, never trained, copied, cast, donated or saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import collate, init_mlp, make_batch, make_examples, mean_loss

import redco_like as rl
from pipelines import build_train_program
from pipelines.problem import train_problem
from search import Plan, TracedModel, parse_cluster
from search.space import Inner
from sharding_rules import Frozen, MeshShape, make_mesh, split_frozen, trainable

FSDP8 = MeshShape(fsdp=8)


def loss_of_head(params, batch):
    return mean_loss({"v": params["head"], **params["body"].frozen}, batch)


def init_head(rng):
    params = init_mlp(rng)
    return {"head": params.pop("v"), "body": Frozen(params)}


def build(shape=FSDP8, **plan):
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    preset = "fsdp" if shape.fsdp > 1 else "data"
    return build_train_program(
        loss_of_head, init_head, optax.adam(1e-2), make_batch(32), Plan(shape, preset, **plan), mesh
    )


def test_split_frozen_parts_every_leaf_once():
    tree = {"a": jnp.ones(2), "b": Frozen({"c": jnp.ones(3), "d": jnp.ones(2, jnp.int32)})}
    moving, fixed = split_frozen(tree)
    assert [x.shape for x in jax.tree.leaves(moving)] == [(2,)]
    assert [x.shape for x in jax.tree.leaves(fixed)] == [(3,), (2,)]
    assert jax.tree.leaves(trainable(tree)) == [True, False, False]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_steps_train_the_rest_alone_and_equal_one_device(microbatches):
    found = []
    for shape in (MeshShape(), FSDP8):
        program = build(shape, microbatches=microbatches if shape.size == 1 else 1)
        state = program.init(jax.random.key(0))
        before = jax.device_get(state.params)
        for i in range(3):
            state, metrics = program.step(state, make_batch(32, i))
        after = jax.device_get(state.params)
        jax.tree.map(np.testing.assert_array_equal, before["body"], after["body"])
        assert np.abs(before["head"] - after["head"]).max() > 1e-3
        found.append((after["head"], metrics["loss"]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4)


def test_frozen_parameters_are_split_and_have_no_optimizer_state():
    program = build()
    state = program.init(jax.random.key(0))
    assert state.params["body"].frozen["w"].sharding.shard_shape((4, 16)) == (4, 2)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert [x.shape for x in moments] == [state.params["head"].shape] * 2


def test_frozen_parameters_keep_their_dtype_and_are_neither_copied_nor_donated():
    def init_half(rng):
        params = init_head(rng)
        return {**params, "body": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["body"])}

    seen = []

    def loss_fn(params, batch):
        seen.append((params["head"].dtype, params["body"].frozen["w"].dtype))
        return loss_of_head(params, batch)

    mesh = make_mesh(FSDP8, jax.devices())
    plan = Plan(FSDP8, "fsdp", compute_dtype="float32")
    program = build_train_program(loss_fn, init_half, optax.adam(1e-2), make_batch(32), plan, mesh)
    given = program.init(jax.random.key(0)).params
    state = program.state_from(given)
    for _ in range(2):
        state, _ = program.step(state, jax.device_put(make_batch(32), program.batch_shardings))
    assert {str(dtype) for _, dtype in seen} == {"bfloat16"}
    assert {str(dtype) for dtype, _ in seen} == {"float32"}
    mine, theirs = (p["body"].frozen["w"].addressable_data(3) for p in (given, state.params))
    assert mine.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    assert state.params["body"].frozen["w"].dtype == jnp.bfloat16


def test_trainer_from_given_parameters_shares_what_is_frozen_and_saves_the_rest(tmp_path):
    params = init_head(jax.random.key(0))
    with rl.Deployer(tmp_path, compile_cache=False) as deployer:
        deployer.devices = deployer.devices[:1]
        trainers = [
            rl.Trainer(deployer, collate, loss_of_head, None, optax.adam(1e-2), params=params, plan="data", name=name)
            for name in "ab"
        ]
        for trainer in trainers:
            trainer.fit(make_examples(32), global_batch=16, steps=4)
        first, second = (trainer.params["body"].frozen["w"] for trainer in trainers)
        assert first.unsafe_buffer_pointer() == second.unsafe_buffer_pointer()
        assert not params["body"].frozen["w"].is_deleted()
        store = rl.CheckpointStore(tmp_path / "a" / "checkpoints")
        assert not any("frozen" in path for path in store.metadata()["arrays"])
        trained = jax.device_get(trainers[0].params)
        trainers[0].reset()
        assert np.abs(trainers[0].params["head"] - trained["head"]).max() > 1e-3
        trainers[0].restore()
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainers[0].params), trained)


def test_trainer_without_init_fn_and_params_is_refused(tmp_path):
    with rl.Deployer(tmp_path, compile_cache=False) as deployer, pytest.raises(ValueError, match="neither init_fn nor"):
        rl.Trainer(deployer, collate, mean_loss, None, optax.sgd(0.1))


def test_planner_counts_neither_gradients_nor_optimizer_for_what_is_frozen():
    def planned(loss_fn, init_fn):
        traced, opt_state = train_problem(loss_fn, init_fn, optax.adam(1e-2), make_batch(64), "float32")
        model = TracedModel(traced, opt_state, parse_cluster("8xH100"))
        place = model.place(Inner(tensor=1, context=1, expert=1, sequence=False, batch_shards=8))
        assert not isinstance(place, str)
        return place.held.sum(1)[:, 0], model

    (params, gradients, optimizer), whole = planned(mean_loss, init_mlp)
    (params_f, gradients_f, optimizer_f), frozen = planned(loss_of_head, init_head)
    head, everything = 16 * 3 * 4, (16 * 3 + 16 + 4 * 16) * 4
    assert (params, gradients, optimizer - 4) == (everything, everything, 2 * everything)
    assert (params_f, gradients_f, optimizer_f - 4) == (everything, head, 2 * head)
    assert frozen.works["none"].merged().flops < whole.works["none"].merged().flops
