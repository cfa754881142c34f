"""Prediction: one output per example, in order, for any number of examples, on any mesh, beside a trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import WIDTH, collate, init_mlp, logits, make_batch, make_examples, mean_loss

import redco_like as rl
from redco_like.predictor import rows_of

PARAMS = init_mlp(jax.random.key(0))
F32_SHARDED = 1e-4


@pytest.fixture
def deployer():
    with rl.Deployer(compile_cache=False) as deployer:
        yield deployer


def pred_fn(params, batch):
    return {"label": logits(params, batch["x"]).argmax(-1), "first": batch["x"][:, 0]}


def make(deployer, mesh="data=2", pred_fn=pred_fn, params=PARAMS, plan="auto", **settings):
    deployer.devices = jax.devices()[: rl.MeshShape.parse(mesh).size] if mesh else jax.devices()
    return rl.Predictor(deployer, collate, pred_fn, params=params, plan=plan, mesh=mesh, **settings)


@pytest.mark.parametrize("mesh", ["data=1", "data=8", "fsdp=2,tensor=2"])
@pytest.mark.parametrize("count", [1, 16, 21])
def test_outputs_come_back_in_order_one_per_example(deployer, mesh, count):
    outputs = make(deployer, mesh).predict(make_examples(count), per_device_batch=2)
    batch = make_batch(count)
    assert [output["label"] for output in outputs] == logits(PARAMS, batch["x"]).argmax(-1).tolist()
    assert [output["first"] for output in outputs] == batch["x"][:, 0].tolist()


def test_parameters_of_a_trainer_are_used_without_a_copy(deployer):
    trainer = rl.Trainer(deployer, collate, mean_loss, init_mlp, optax.sgd(0.1), plan="fsdp", mesh="fsdp=8")
    trainer.prepare(make_examples(8), global_batch=8)
    predictor = rl.Predictor(deployer, collate, pred_fn, params=trainer.params)
    before = predictor.predict(make_examples(5))
    (program,) = predictor._programs.values()
    placed, _ = program.place(trainer.params)
    assert [s.data.unsafe_buffer_pointer() for s in placed["w"].addressable_shards] == [
        s.data.unsafe_buffer_pointer() for s in trainer.params["w"].addressable_shards
    ]
    assert program.mesh == trainer.mesh
    assert len(before) == 5


def test_parameters_that_a_step_consumed_are_refused_with_advice(deployer):
    trainer = rl.Trainer(deployer, collate, mean_loss, init_mlp, optax.sgd(0.1), plan="data")
    trainer.prepare(make_examples(8), global_batch=8)
    stale = rl.Predictor(deployer, collate, pred_fn, params=trainer.params)
    live = rl.Predictor(deployer, collate, pred_fn, params=lambda: trainer.params)
    live.predict(make_examples(3))
    trainer.fit(make_examples(8), global_batch=8)
    with pytest.raises(ValueError, match=r"params=lambda: trainer\.params"):
        stale.predict(make_examples(3))
    expected = logits(jax.device_get(trainer.params), make_batch(3)["x"]).argmax(-1)
    assert [output["label"] for output in live.predict(make_examples(3))] == expected.tolist()
    assert len(live._programs) == 1


def test_parameters_can_be_replaced_without_compiling_again(deployer):
    traces = []

    def counted(params, batch):
        traces.append(1)
        return logits(params, batch["x"])

    predictor = make(deployer, pred_fn=counted)
    first = predictor.predict(make_examples(4))
    count = len(traces)
    predictor.params = init_mlp(jax.random.key(1))
    second = predictor.predict(make_examples(4))
    assert len(traces) == count
    assert not np.array_equal(first[0], second[0])


def test_state_and_rng_are_given_to_those_who_name_them(deployer):
    def noisy(batch, rng, state):
        return batch["x"][:, 0] + state["shift"] + jax.random.normal(rng, batch["x"].shape[:1])

    predictor = make(deployer, pred_fn=noisy, state={"shift": jnp.float32(100)})
    outputs = predictor.predict(make_examples(8), per_device_batch=2)
    assert all(90 < output < 110 for output in outputs)
    assert outputs == predictor.predict(make_examples(8), per_device_batch=2)
    assert len({float(o) - float(x) for o, x in zip(outputs, make_batch(8)["x"][:, 0], strict=True)}) == 8


def test_output_fn_sees_real_rows_only(deployer):
    seen = []

    def output_fn(output):
        seen.append(len(output["label"]))
        return [int(label) for label in output["label"]]

    predictor = make(deployer, output_fn=output_fn)
    assert len(predictor.predict(make_examples(7), per_device_batch=2)) == 7
    assert seen == [4, 3]
    predictor = make(deployer, output_fn=lambda output: [1])
    with pytest.raises(ValueError, match="output_fn returned 1 items for a batch of 4 examples"):
        predictor.predict(make_examples(7), per_device_batch=2)


def test_batches_of_several_lengths_are_each_compiled_for(deployer):
    def to_longest(examples):
        longest = max(len(example) for example in examples)
        return {"x": np.stack([np.pad(example, (0, longest - len(example))) for example in examples])}

    examples = [np.ones(1 + i // 4, np.float32) for i in range(11)]
    deployer.devices = jax.devices()[:2]
    predictor = rl.Predictor(deployer, to_longest, lambda batch: batch["x"].sum(-1), params={}, plan="data")
    assert predictor.predict(examples, per_device_batch=2) == [float(len(example)) for example in examples]


def test_two_predictors_of_other_models_live_in_one_process(deployer):
    first = make(deployer)
    second = make(deployer, params={"a": jnp.full(WIDTH, 2.0)}, pred_fn=lambda params, batch: batch["x"] @ params["a"])
    first.predict(make_examples(2))
    np.testing.assert_allclose(second.predict(make_examples(2)), make_batch(2)["x"].sum(1) * 2, rtol=F32_SHARDED)


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda params, batch: logits(params, batch["x"]).mean(), r"output 'itself' has shape \(\)"),
        (lambda params, batch: {"a": logits(params, batch["x"])[0]}, r"output 'a' has shape \(3,\)"),
    ],
)
def test_outputs_without_one_row_per_example_are_refused(deployer, fn, message):
    with pytest.raises(ValueError, match=message):
        make(deployer, pred_fn=fn).predict(make_examples(3))


def test_bad_arguments_are_refused(deployer):
    with pytest.raises(ValueError, match=r"pred_fn takes an argument 'training'.*\(params, batch, rng, state\)"):
        make(deployer, pred_fn=lambda params, training: 0)
    with pytest.raises(ValueError, match="examples is empty"):
        make(deployer).predict([])
    with pytest.raises(ValueError, match="per_device_batch=0"):
        make(deployer).predict(make_examples(1), per_device_batch=0)
    with pytest.raises(KeyError) as caught:
        make(deployer, pred_fn=lambda params, batch: batch["text"]).predict(make_examples(1))
    assert "x: float32" in "".join(caught.value.__notes__)


def test_rows_of_a_tree_are_trees():
    assert rows_of({"a": np.arange(2), "b": np.ones((2, 1))})[1]["a"] == 1
