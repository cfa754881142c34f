"""The step: sums over the global batch, whatever the mesh and the microbatches; a bad step never enters the state."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import (
    batch_norm_loss,
    collate,
    cross_entropy,
    init_batch_norm,
    init_mlp,
    make_batch,
    make_examples,
    masked_loss,
    mean_loss,
)

from pipelines import build_train_program
from pipelines import train as train_module
from pipelines.problem import cast_floats, check_rows, join_trainable, split_trainable
from pipelines.train import update_if
from search import Plan
from sharding_rules import MeshShape, make_mesh

ONE, DATA8, FSDP8 = MeshShape(), MeshShape(data=8), MeshShape(fsdp=8)
TENSOR = MeshShape(data=2, fsdp=2, tensor=2)
ROWS = 32
F32_SHARDED = 1e-4
"""Relative tolerance of a float32 result across shardings (sums in another order)."""


def build(shape=ONE, *, loss_fn=mean_loss, init_fn=init_mlp, optimizer=None, batch=None, learning_rate=None, **plan):
    preset = {ONE: "data", DATA8: "data", FSDP8: "fsdp"}.get(shape, "fsdp+megatron")
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    batch = make_batch(ROWS) if batch is None else batch
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    plan = Plan(shape, preset, **plan)
    return build_train_program(loss_fn, init_fn, optimizer, batch, plan, mesh, learning_rate=learning_rate)


def train(program, steps=3, *, state=None, seed=0):
    state = program.init(jax.random.key(0)) if state is None else state
    history = []
    for i in range(steps):
        state, metrics = program.step(state, jax.device_put(make_batch(ROWS, seed + i), program.batch_shardings))
        history.append(jax.device_get(metrics))
    return state, history


def update_if_called(*args, branch, **_):
    return update_if(*args, branch=branch)


def assert_close(a, b, rtol=F32_SHARDED, atol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), jax.device_get(a), jax.device_get(b)
    )


def reference(loss_fn, params, batch, optimizer):
    (loss, grads), state = jax.value_and_grad(loss_fn)(params, batch), optimizer.init(params)
    updates, _ = optimizer.update(grads, state, params)
    return loss, optax.tree.norm(grads), optax.apply_updates(params, updates)


@pytest.mark.parametrize("shape", [DATA8, FSDP8, TENSOR], ids=str)
def test_steps_on_a_mesh_equal_one_device(shape):
    state, history = train(build(ONE, optimizer=optax.adamw(1e-2)))
    sharded_state, sharded_history = train(build(shape, optimizer=optax.adamw(1e-2)))
    assert_close(history, sharded_history)
    assert_close(state.params, sharded_state.params)


def test_one_step_equals_optax_by_hand():
    program = build()
    state = program.init(jax.random.key(3))
    loss, norm, params = reference(mean_loss, init_mlp(jax.random.key(3)), make_batch(ROWS), optax.sgd(0.1))
    state, metrics = program.step(state, make_batch(ROWS))
    assert_close((metrics["loss"], metrics["grad_norm"], state.params), (loss, norm, params), rtol=1e-5)
    assert int(state.step) == 1
    assert int(metrics["skipped"]) == 0


@pytest.mark.parametrize("shape", [ONE, DATA8, TENSOR], ids=str)
@pytest.mark.parametrize("loss_fn", [mean_loss, masked_loss])
def test_microbatches_give_the_mean_over_the_global_batch(shape, loss_fn):
    whole_state, whole = train(build(ONE, loss_fn=loss_fn, microbatches=1))
    state, history = train(build(shape, loss_fn=loss_fn, microbatches=4))
    assert_close(whole, history)
    assert_close(whole_state.params, state.params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_result(remat):
    expected_state, expected = train(build(ONE))
    state, history = train(build(TENSOR, remat=remat, microbatches=2))
    assert_close(expected, history)
    assert_close(expected_state.params, state.params)


def test_masked_loss_is_divided_by_the_global_weight_and_not_per_shard():
    batch = make_batch(ROWS)
    batch["mask"] = np.zeros(ROWS, np.float32)
    batch["mask"][:5] = 1  # all the weight lies in two of the eight shards
    program = build(DATA8, loss_fn=masked_loss, microbatches=2)
    _, metrics = program.step(program.init(jax.random.key(0)), jax.device_put(batch, program.batch_shardings))
    expected = np.mean(cross_entropy(init_mlp(jax.random.key(0)), batch)[:5])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=F32_SHARDED)


def test_metrics_are_means_over_the_global_batch():
    def loss_fn(params, batch):
        return masked_loss(params, batch), {
            "x": (batch["x"][:, 0].sum(), batch["x"].shape[0]),
            "mask": batch["mask"].mean(),
        }

    batch = make_batch(ROWS)
    program = build(DATA8, loss_fn=loss_fn, microbatches=2)
    _, metrics = program.step(program.init(jax.random.key(0)), jax.device_put(batch, program.batch_shardings))
    np.testing.assert_allclose(metrics["x"], batch["x"][:, 0].mean(), rtol=F32_SHARDED)
    halves = batch["mask"].reshape(-1, 2)  # a plain scalar is weighted as the loss is, microbatch by microbatch
    np.testing.assert_allclose(metrics["mask"], np.average(halves.mean(0), weights=halves.sum(0)), rtol=F32_SHARDED)


def test_memory_is_flat_in_the_number_of_microbatches():
    def bytes_beyond_batch(microbatches):
        batch = make_batch(1024 * microbatches)
        program = build(batch=batch, microbatches=microbatches)
        copies = 2 * sum(x.nbytes for x in jax.tree.leaves(batch))  # as given, and as microbatches
        return program.compiled_bytes_per_device - copies

    assert bytes_beyond_batch(16) < bytes_beyond_batch(2) + 4096


def test_microbatching_moves_no_rows_between_devices():
    program = build(DATA8, microbatches=4)
    program.compile()
    text = program._executable.as_text()
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    assert "all-gather" not in text


def test_sharded_init_equals_unsharded_and_is_born_sharded():
    state = build(FSDP8, optimizer=optax.adam(1e-3)).init(jax.random.key(5))
    assert_close(state.params, init_mlp(jax.random.key(5)), rtol=1e-6)
    assert state.params["w"].addressable_shards[0].data.size == state.params["w"].size // 8
    assert state.opt_state[0].mu["w"].sharding == state.params["w"].sharding


def test_state_is_donated_and_keeps_its_shardings():
    program = build(FSDP8)
    state = program.init(jax.random.key(0))
    new, _ = program.step(state, jax.device_put(make_batch(ROWS), program.batch_shardings))
    assert state.params["w"].is_deleted()
    assert jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(lambda x: x.sharding, program.abstract_state)


def test_dropout_does_not_depend_on_the_mesh():
    def loss_fn(params, batch, rng):
        keep = jax.random.bernoulli(rng, 0.5, batch["x"].shape)
        return mean_loss(params, {**batch, "x": jnp.where(keep, batch["x"], 0)})

    one = train(build(ONE, loss_fn=loss_fn, microbatches=2))[1]
    assert_close(one, train(build(DATA8, loss_fn=loss_fn, microbatches=2))[1])
    assert_close(one, train(build(TENSOR, loss_fn=loss_fn, microbatches=2))[1])
    assert one[0]["loss"] != train(build(ONE, microbatches=2))[1][0]["loss"]


def test_keys_differ_between_steps_and_microbatches():
    def squares(params, rng):
        draw = jax.random.uniform(rng)
        return params["w"] * 0 + draw, {"square": draw**2}

    program = build(loss_fn=squares, init_fn=lambda rng: {"w": jnp.float32(0)}, microbatches=2)
    _, history = train(program)
    assert len({float(m["loss"]) for m in history}) == 3
    assert all(m["square"] - m["loss"] ** 2 > 1e-8 for m in history)  # variance above 0: the two draws differ


def test_batch_norm_state_is_kept_and_used():
    program = build(DATA8, loss_fn=batch_norm_loss, init_fn=init_batch_norm, microbatches=2)
    state, _ = train(program, 1)
    batch = make_batch(ROWS)
    first, second = batch["x"][0::2].mean(0), batch["x"][1::2].mean(0)
    np.testing.assert_allclose(state.model_state["mean"], 0.09 * first + 0.1 * second, rtol=F32_SHARDED, atol=1e-6)
    total, weight = program.eval_step(state.params, state.model_state, batch, state.rng)["loss"]
    expected = batch_norm_loss(state.params, batch, state.model_state, False).loss
    np.testing.assert_allclose(total / weight, expected, rtol=F32_SHARDED)


@pytest.mark.parametrize("shape", [DATA8, TENSOR])
def test_optimizer_state_split_over_data_changes_where_it_lies_and_no_value(shape):
    plain, split = (build(shape, optimizer=optax.adam(1e-2), optimizer_sharding=on) for on in (False, True))
    (one, history), (other, same) = train(plain), train(split)
    assert_close(one.params, other.params)
    assert_close(history, same)
    spread = [x for x in jax.tree.leaves(other.opt_state[0].mu) if "data" in str(x.sharding.spec)]
    assert {x.shape for x in spread} >= {x.shape for x in jax.tree.leaves(one.params) if x.ndim == 2}
    assert all(x.addressable_shards[0].data.size * shape.data <= x.size for x in spread)
    assert not any("data" in str(x.sharding.spec) for x in jax.tree.leaves(other.params))


def test_step_with_a_split_optimizer_holds_no_whole_array_of_its_state():
    rows = 4096

    def init_fn(rng):
        return {"w": jax.random.normal(rng, (rows, 4)) * 0.01}

    def loss_fn(params, batch):
        return jnp.square(params["w"] @ batch["x"][:, :4].T).mean()

    plain, split = (
        build(DATA8, optimizer=optax.adam(1e-2), loss_fn=loss_fn, init_fn=init_fn, optimizer_sharding=on)
        for on in (False, True)
    )
    moments = 2 * rows * 4 * 4
    assert plain.compiled_bytes_per_device - split.compiled_bytes_per_device >= 0.9 * moments * 7 / 8
    # The root of the second moment is taken of what a device holds of it.
    whole, part = (re.findall(r"f32\[(\d+),4\]\S* sqrt\(", x._executable.as_text()) for x in (plain, split))
    assert (set(whole), set(part)) == ({str(rows)}, {str(rows // 8)})


@pytest.mark.parametrize("microbatches", [1, 4])
def test_schedule_counts_optimizer_steps_and_logged_rate_is_the_applied_one(microbatches):
    schedule = optax.linear_schedule(1.0, 0.0, 10)

    def loss_fn(params):
        return params["w"] * 1.0  # gradient 1, so that the parameter moves by the rate

    program = build(
        loss_fn=loss_fn,
        init_fn=lambda rng: {"w": jnp.float32(0)},
        optimizer=optax.sgd(schedule),
        learning_rate=schedule,
        microbatches=microbatches,
    )
    state, where, moved, logged = program.init(jax.random.key(0)), 0.0, [], []
    for i in range(3):
        state, metrics = program.step(state, make_batch(ROWS, i))
        moved.append(where - float(state.params["w"]))
        where = float(state.params["w"])
        logged.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(moved, [1.0, 0.9, 0.8], rtol=1e-5)
    np.testing.assert_allclose(logged, moved, rtol=1e-5)


def test_rate_is_read_from_inject_hyperparams():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(1.0, 0.0, 10))
    _, history = train(build(optimizer=optimizer))
    np.testing.assert_allclose([m["learning_rate"] for m in history], [1.0, 0.9, 0.8], rtol=1e-6)


def test_rate_under_multi_steps_follows_its_gradient_step():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    optimizer = optax.MultiSteps(optax.sgd(schedule), every_k_schedule=2)
    _, history = train(build(optimizer=optimizer, learning_rate=schedule), 4)
    np.testing.assert_allclose([m["learning_rate"] for m in history], [1.0, 1.0, 0.9, 0.9], rtol=1e-6)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("shape", [ONE, FSDP8], ids=str)
def test_non_finite_step_leaves_the_state_as_it_was(shape, branch, monkeypatch):
    # CPUs branch, accelerators select; both must do.
    monkeypatch.setattr(train_module, "update_if", functools.partial(update_if_called, branch=branch))
    program = build(shape, optimizer=optax.adam(1e-2), microbatches=2)
    state, _ = train(program, 2)
    before = jax.device_get(dataclasses.replace(state, rng=None))
    bad = make_batch(ROWS)
    bad["x"][3, 1] = np.nan
    state, metrics = program.step(state, jax.device_put(bad, program.batch_shardings))
    assert int(metrics["skipped"]) == 1
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(dataclasses.replace(state, rng=None)))
    assert program.nonfinite_paths(state, bad) == {"gradients": ["v", "w"], "params": [], "batch": ["x"]}
    _, history = train(program, 1, state=state)
    assert np.isfinite(history[0]["loss"])


def test_check_for_finite_numbers_costs_no_copy_of_the_optimizer_state():
    width = 512

    def init_fn(rng):
        return {"w": jax.random.normal(rng, (width, width))}

    def loss_fn(params, batch):
        return ((batch["x"] @ params["w"]) ** 2).mean()

    batch = {"x": np.zeros((8, width), np.float32)}
    program = build(loss_fn=loss_fn, init_fn=init_fn, optimizer=optax.adam(1e-3), batch=batch)
    params_bytes = 4 * width**2
    assert program.compiled_bytes_per_device < 4.2 * params_bytes  # parameters, two moments, gradient


def test_state_keeps_its_dtypes_whatever_the_optimizer_returns():
    def widening(updates, state, params=None):
        return updates, jax.tree.map(lambda x: x.astype(jnp.float32) + 1, state)

    optimizer = optax.GradientTransformation(lambda params: {"n": jnp.zeros((), jnp.bfloat16)}, widening)
    state, _ = train(build(optimizer=optimizer), 2)
    assert state.opt_state["n"].dtype == jnp.bfloat16
    assert state.opt_state["n"] == 2


def test_compute_dtype_casts_floats_and_nothing_else():
    seen = {}

    def init_fn(rng):
        return {**init_mlp(rng), "count": jnp.int32(7), "key": jax.random.key(1)}

    def loss_fn(params, batch):
        seen.update({name: leaf.dtype for name, leaf in {**params, **batch}.items()})
        return mean_loss(params, {**batch, "x": batch["x"].astype(jnp.bfloat16)})

    program = build(loss_fn=loss_fn, init_fn=init_fn, optimizer=optax.adamw(1e-2), compute_dtype="bfloat16")
    state, history = train(program, 2)
    assert seen["w"] == jnp.bfloat16
    assert seen["count"] == jnp.int32
    assert seen["x"] == jnp.float32
    assert jnp.issubdtype(seen["key"], jax.dtypes.prng_key)
    assert state.params["w"].dtype == jnp.float32
    assert int(state.params["count"]) == 7
    np.testing.assert_allclose(history[1]["loss"], train(build(optimizer=optax.adamw(1e-2)))[1][1]["loss"], rtol=2e-2)


def test_param_dtype_is_what_is_stored():
    state = build(param_dtype="bfloat16", compute_dtype="bfloat16").init(jax.random.key(0))
    assert state.params["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [32, 5, 1])
@pytest.mark.parametrize("shape", [ONE, DATA8, TENSOR], ids=str)
def test_eval_step_takes_any_number_of_rows(shape, rows):
    program = build(shape, loss_fn=masked_loss)
    state = program.init(jax.random.key(0))
    batch = make_batch(rows)
    placed = jax.device_put(batch, program.eval_shardings(batch))
    total, weight = program.eval_step(state.params, state.model_state, placed, state.rng)["loss"]
    assert_close((total, weight), masked_loss(init_mlp(jax.random.key(0)), batch))


def test_state_from_copies_and_does_not_compile_again():
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return mean_loss(params, batch)

    program = build(FSDP8, loss_fn=loss_fn, optimizer=optax.adam(1e-2))
    mine = init_mlp(jax.random.key(9))
    state, first = train(program, 2, state=program.state_from(mine))
    count = len(traces)
    kept = state.params
    again, second = train(program, 2, state=program.state_from(mine))
    assert len(traces) == count
    assert int(again.step) == 2
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not mine["w"].is_deleted()
    train(program, 1, state=program.state_from(kept))
    assert not kept["w"].is_deleted()  # arrays already on the mesh are copied, never donated


def test_state_from_another_model_is_refused_by_path():
    program = build()
    with pytest.raises(ValueError, match=r"params given do not fit .*: 'w' has shape \(2, 2\), expected \(4, 16\)"):
        program.state_from({**init_mlp(jax.random.key(0)), "w": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="'b' is missing"):
        program.state_from({k: v for k, v in init_mlp(jax.random.key(0)).items() if k != "b"})


@pytest.mark.parametrize(
    "rows, microbatches, shape, message",
    [
        (4, 1, DATA8, r"4 examples is smaller than 8 data shards .*; nearest: 8"),
        (20, 1, DATA8, r"20 examples does not split over 8 data shards \(mesh data=8\); nearest: 16 or 24"),
        (24, 2, TENSOR, None),
        (20, 2, TENSOR, r"2 microbatches x 4 data shards \(mesh data=2,fsdp=2,tensor=2\) = 8; nearest: 16 or 24"),
    ],
)
def test_batch_that_does_not_split_is_refused_with_the_nearest_sizes(rows, microbatches, shape, message):
    if message is None:
        return check_rows(rows, microbatches=microbatches, mesh=shape)
    with pytest.raises(ValueError, match=message):
        check_rows(rows, microbatches=microbatches, mesh=shape)


def test_loss_of_the_wrong_shape_is_refused_before_compiling():
    with pytest.raises(ValueError, match=r"the loss has shape \(32,\)"):
        build(loss_fn=cross_entropy)


def test_parameters_that_do_not_match_the_loss_are_shown():
    with pytest.raises(KeyError) as caught:
        build(init_fn=lambda rng: {"weights": jnp.zeros((4, 3))})
    note = "\n".join(caught.value.__notes__)
    assert "weights: float32(4, 3)" in note
    assert "x: float32(32, 4)" in note


def test_init_without_the_state_that_the_loss_names_is_refused():
    with pytest.raises(ValueError, match=r"init_fn\(rng\) returns \(params, state\); it returned a dict"):
        build(loss_fn=batch_norm_loss, init_fn=init_mlp)


def test_init_with_leaves_that_are_no_arrays_is_explained():
    with pytest.raises(ValueError, match=r"init_fn returned a custom_jvp at 'activation'.*equinox\.partition"):
        build(init_fn=lambda rng: {"w": jnp.zeros(3), "activation": jax.nn.relu})


def test_mesh_that_is_not_the_plans_is_refused():
    with pytest.raises(ValueError, match="the plan is for mesh data=8"):
        build_train_program(mean_loss, init_mlp, optax.sgd(0.1), make_batch(8), Plan(DATA8), make_mesh(FSDP8))


def test_splitting_and_joining_trainable_leaves_round_trips():
    tree = {"a": jnp.zeros(2), "n": jnp.int32(1), "k": jax.random.key(0)}
    trainable, fixed = split_trainable(tree)
    assert trainable["n"] is None
    assert fixed["a"] is None
    assert jax.tree.structure(join_trainable(trainable, fixed)) == jax.tree.structure(tree)
    assert cast_floats(tree, "bfloat16")["a"].dtype == jnp.bfloat16


def test_collate_stacks_examples():
    batch = collate(make_examples(3))
    assert batch["x"].shape == (3, 4)
