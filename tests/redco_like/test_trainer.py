"""The loop: resume, evaluation, checkpoints, non-finite steps, reset, bad input; what is counted and what is logged."""

import json
import os
import pathlib
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import (
    CLASSES,
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
from test_distributed import run_processes

import redco_like as rl
from redco_like import watch
from redco_like.trainer import _tokens_per_step

ROOT = pathlib.Path(__file__).parents[2]

EXAMPLES = make_examples(40)
F32_SHARDED = 1e-4


@pytest.fixture
def deployer(tmp_path):
    with rl.Deployer(tmp_path, compile_cache=False) as deployer:
        yield deployer


def make(deployer, *, loss_fn=mean_loss, init_fn=init_mlp, optimizer=None, plan="data", mesh="data=2", **settings):
    deployer.devices = deployer.devices[: rl.MeshShape.parse(mesh).size] if mesh else deployer.devices
    return rl.Trainer(
        deployer, collate, loss_fn, init_fn, optimizer or optax.adam(1e-2), plan=plan, mesh=mesh, **settings
    )


def fresh(folder, **settings):
    """A trainer of a new process, as far as one can be had in this one."""
    return make(rl.Deployer(folder, compile_cache=False), **settings)


def lines(trainer, name="loss"):
    return {line["step"]: line[name] for line in rl.read_metrics(trainer.folder) if name in line}


def test_fit_trains_logs_and_says_its_plan(deployer, caplog):
    trainer = make(deployer, optimizer=optax.adam(5e-2))
    with caplog.at_level("INFO", "redco_like"):
        result = trainer.fit(EXAMPLES, global_batch=8, epochs=4, log_every=1, eval_examples=make_examples(11, 1))
    assert (result.step, result.ended, result.skipped) == (20, "finished", 0)
    losses = lines(trainer)
    assert sorted(losses) == list(range(1, 21))
    first, *_, last = np.split(np.asarray([losses[step] for step in range(1, 21)]), 4)  # epochs: the same examples
    assert last.mean() < first.mean()
    assert sorted(lines(trainer, "eval/loss")) == [5, 10, 15, 20]
    assert {"grad_norm", "examples_per_second", "epoch"} <= rl.read_metrics(trainer.folder)[0].keys()
    said = "\n".join(caplog.messages)
    assert "plan: preset data on mesh data=2" in said
    assert "compiling the step took" in said
    assert "40 examples, 5 steps of 8 per epoch" in said
    assert rl.Plan.load(trainer.folder / "plan.json") == trainer.plan


@pytest.mark.parametrize("stop_after", [3, 5, 7])  # in an epoch, at its end, in the next
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, stop_after):
    def dropout_loss(params, batch, rng):
        keep = jax.random.bernoulli(rng, 0.7, batch["x"].shape)
        return mean_loss(params, {**batch, "x": jnp.where(keep, batch["x"], 0)})

    whole = fresh(tmp_path / "whole", loss_fn=dropout_loss)
    whole.fit(EXAMPLES, global_batch=8, epochs=2, log_every=1)
    first = fresh(tmp_path / "cut", loss_fn=dropout_loss)
    first.fit(EXAMPLES, global_batch=8, steps=stop_after, log_every=1)
    second = fresh(tmp_path / "cut", loss_fn=dropout_loss)
    result = second.fit(EXAMPLES, global_batch=8, epochs=2, log_every=1)
    assert result.step == 10
    assert lines(second) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.params), jax.device_get(second.params))


@pytest.mark.parametrize("told, rate_of", [(None, 7), (5, 5)])
def test_rate_counts_tokens_of_integer_rows_or_as_told(deployer, told, rate_of):
    class Memory:
        def __init__(self):
            self.lines, self.closed = {}, False

        def write(self, step, values):
            self.lines[step] = dict(values)

        def close(self):
            self.closed = True

    def loss_fn(params, batch):
        return (params["e"][batch["tokens"]] ** 2).mean()

    memory = Memory()
    trainer = rl.Trainer(
        deployer, lambda rows: {"tokens": np.stack(rows)}, loss_fn, lambda rng: {"e": jax.random.normal(rng, (9,))},
        optax.sgd(0.1), plan="data", writers=[memory],
    )  # fmt: skip
    rows = list(np.arange(16 * 7, dtype=np.int32).reshape(16, 7) % 9)
    trainer.fit(rows, global_batch=8, log_every=1, tokens_per_example=told, checkpoint_every=None)
    assert trainer.step == 2
    assert sorted(memory.lines) == [1, 2]
    assert memory.lines[2]["tokens_per_second"] > 0
    assert memory.closed
    assert _tokens_per_step(trainer.program.abstract_batch, told) == 8 * rate_of


def test_short_run_logs_its_last_step(deployer):
    trainer = make(deployer)
    result = trainer.fit(EXAMPLES, global_batch=8, steps=3)
    assert lines(trainer) == {3: pytest.approx(result.loss)}


def test_finished_run_has_nothing_left_to_do(tmp_path):
    fresh(tmp_path).fit(EXAMPLES, global_batch=8)
    again = fresh(tmp_path)
    result = again.fit(EXAMPLES, global_batch=8)
    assert (result.step, result.loss, again.step) == (5, None, 5)
    assert fresh(tmp_path).fit(EXAMPLES, global_batch=8, epochs=2).step == 10  # the same run, made longer


def test_resume_false_starts_anew(tmp_path):
    fresh(tmp_path).fit(EXAMPLES, global_batch=8)
    trainer = fresh(tmp_path)
    assert trainer.fit(EXAMPLES, global_batch=8, steps=2, resume=False).step == 2


def test_checkpoint_restores_on_another_mesh_and_plan(tmp_path):
    whole = fresh(tmp_path / "whole")
    whole.fit(EXAMPLES, global_batch=8, epochs=2, log_every=1)
    fresh(tmp_path / "cut").fit(EXAMPLES, global_batch=8, steps=7)
    trainer = fresh(tmp_path / "cut", plan="fsdp+megatron", mesh="data=2,fsdp=2,tensor=2")
    trainer.fit(EXAMPLES, global_batch=8, epochs=2, log_every=1)
    assert not trainer.params["w"].sharding.is_fully_replicated
    expected = lines(whole)
    for step, loss in lines(trainer).items():
        np.testing.assert_allclose(loss, expected[step], rtol=F32_SHARDED)


def test_resume_with_another_batch_is_refused(tmp_path):
    fresh(tmp_path).fit(EXAMPLES, global_batch=8, steps=2)
    with pytest.raises(ValueError, match=r"global_batch was 8, is 4.*resume=False"):
        fresh(tmp_path).fit(EXAMPLES, global_batch=4, steps=2)


def test_checkpoint_of_another_model_is_refused_before_training(tmp_path):
    fresh(tmp_path).fit(EXAMPLES, global_batch=8, steps=2)

    def wider(rng):
        return {**init_mlp(rng), "w": jnp.zeros((4, 8)), "b": jnp.zeros(8), "v": jnp.zeros((8, CLASSES))}

    with pytest.raises(rl.CheckpointError, match=r"another model.*\n.*mu/b: saved float32\[16\], wanted float32\[8\]"):
        fresh(tmp_path, init_fn=wider).fit(EXAMPLES, global_batch=8, steps=2)


def test_truncated_checkpoint_is_refused_before_training(tmp_path):
    first = fresh(tmp_path)
    first.fit(EXAMPLES, global_batch=8, steps=2)
    data = [p for p in (first.folder / "checkpoints" / "2").rglob("*") if p.is_file() and p.parent.name == "d"]
    data[0].write_bytes(data[0].read_bytes()[:10])
    with pytest.raises(rl.CheckpointError, match="damaged"):
        fresh(tmp_path).fit(EXAMPLES, global_batch=8, steps=2)


def test_best_checkpoint_is_kept_and_restored(deployer):
    trainer = make(deployer, best_metric="loss", optimizer=optax.sgd(optax.linear_schedule(0.1, 30.0, 12)),
                   keep_checkpoints=1)  # fmt: skip
    valid = make_examples(16, 1)
    trainer.fit(EXAMPLES, global_batch=8, steps=12, eval_examples=valid, eval_every=2, checkpoint_every=6)
    scores = lines(trainer, "eval/loss")
    trainer.restore("best")
    assert trainer.step == min(scores, key=scores.get)
    np.testing.assert_allclose(trainer.evaluate(valid)["loss"], min(scores.values()), rtol=1e-5)


@pytest.mark.parametrize("mesh", ["data=1", "data=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("count", [16, 21, 3])
def test_evaluation_counts_every_example_once(deployer, mesh, count):
    trainer = make(deployer, loss_fn=masked_loss, plan="auto", mesh=mesh)
    trainer.prepare(EXAMPLES, global_batch=8)
    batch = make_batch(count, 5)
    got = trainer.evaluate(make_examples(count, 5))
    total, weight = masked_loss(jax.device_get(trainer.params), batch)
    np.testing.assert_allclose(got["loss"], total / weight, rtol=F32_SHARDED)


def test_evaluation_before_training_and_of_nothing(deployer):
    trainer = make(deployer)
    with pytest.raises(ValueError, match="say global_batch"):
        trainer.evaluate(EXAMPLES)
    assert np.isfinite(trainer.evaluate(make_examples(3), global_batch=8)["loss"])
    with pytest.raises(ValueError, match="examples is empty"):
        trainer.evaluate([])


def test_broken_evaluation_shows_before_the_first_step(deployer):
    def loss_fn(params, batch, training):
        return mean_loss(params, batch if training else {"x": batch["image"]})

    trainer = make(deployer, loss_fn=loss_fn)
    with pytest.raises(KeyError, match="image"):
        trainer.fit(EXAMPLES, global_batch=8, steps=2, eval_examples=EXAMPLES)
    assert trainer.step == 0


def test_unknown_best_metric_is_refused_before_the_first_step(deployer):
    with pytest.raises(ValueError, match="best_metric='bleu' is not among the metrics of the evaluation: loss"):
        make(deployer, best_metric="bleu").fit(EXAMPLES, global_batch=8, steps=2, eval_examples=EXAMPLES)
    with pytest.raises(ValueError, match="give eval_examples"):
        make(deployer, best_metric="loss").fit(EXAMPLES, global_batch=8, steps=2)


def poisoned(*bad):
    """Examples, some of which make the loss NaN."""
    examples = make_examples(40)
    for index in bad:
        examples[index] = {**examples[index], "x": np.full_like(examples[index]["x"], np.nan)}
    return examples


def test_non_finite_step_raises_and_names_what_is_not_finite(deployer):
    trainer = make(deployer)
    with pytest.raises(
        rl.NonFiniteError, match=r"step \d: loss nan.*not finite: batch x; gradients v, w.*not applied"
    ) as caught:
        trainer.fit(poisoned(3), global_batch=8, epochs=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(trainer.params)))
    assert "step" in str(caught.value)


def test_non_finite_steps_are_skipped_and_counted(deployer):
    trainer = make(deployer, on_nonfinite="skip", learning_rate=lambda step: 1.0 * step)
    result = trainer.fit(poisoned(3), global_batch=8, epochs=2, log_every=1)
    assert (result.step, result.skipped, int(trainer.state.step)) == (10, 2, 8)
    assert rl.read_metrics(trainer.folder)[-1]["skipped"] == 2
    assert list(lines(trainer, "learning_rate").values())[-1] == 7.0  # a skipped step does not move the schedule


def test_too_many_non_finite_steps_in_a_row_are_an_error(deployer):
    trainer = make(deployer, on_nonfinite="skip", most_skips=3)
    with pytest.raises(rl.NonFiniteError, match=r"step 3: loss nan, .*and so were 2 steps before it"):
        trainer.fit(poisoned(*range(40)), global_batch=8, epochs=1)


def test_non_finite_step_stops_with_a_checkpoint(tmp_path):
    trainer = fresh(tmp_path, on_nonfinite="stop")
    result = trainer.fit(poisoned(*range(40)), global_batch=8, epochs=50)
    assert "not finite" in result.ended
    assert result.step < 250
    other = fresh(tmp_path)
    other.prepare(EXAMPLES, global_batch=8)
    expected = jax.device_get(other.params)
    other.restore()
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(other.params))


def test_loop_never_reads_the_step_just_dispatched():
    read = []

    class Scalar(float):
        def __new__(cls, step):
            self = super().__new__(cls, 0.0)
            self.step = step
            return self

        def __int__(self):
            read.append(self.step)
            return 0

    monitor = watch.StepWatch(
        lambda *_: None, log_every=1000, last_step=10**6, policy="raise", most_skips=1, explain=str, logger=None
    )
    for step in range(1, 50):
        monitor.push(step, {"skipped": Scalar(step), "loss": 0.0}, None)
        assert step - 1 not in read
    monitor.drain()
    assert read == list(range(1, 50))


def test_schedule_under_accumulation_counts_optimizer_steps(deployer):
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    plan = rl.Plan(rl.MeshShape(data=2), microbatches=2)
    trainer = make(deployer, plan=plan, optimizer=optax.sgd(schedule), learning_rate=schedule)
    trainer.fit(EXAMPLES, global_batch=8, log_every=1)
    np.testing.assert_allclose(list(lines(trainer, "learning_rate").values()), [0.1, 0.09, 0.08, 0.07, 0.06], rtol=1e-5)


def test_reset_does_not_compile_again(deployer):
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return mean_loss(params, batch)

    trainer = make(deployer, loss_fn=loss_fn)
    trainer.fit(EXAMPLES, global_batch=8, resume=False, checkpoint_every=None)
    count, mine = len(traces), init_mlp(jax.random.key(7))
    results = []
    for _ in range(3):
        trainer.reset(mine)
        assert trainer.step == 0
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.params), jax.device_get(mine))
        results.append(trainer.fit(EXAMPLES, global_batch=8, checkpoint_every=None).loss)
    assert len(traces) == count
    assert len(set(results)) == 1
    trainer.reset()
    trainer.reset(rng=jax.random.key(3))
    np.testing.assert_allclose(trainer.params["w"], init_mlp(jax.random.key(3))["w"], rtol=1e-6)


def test_given_parameters_are_copied_and_trained(deployer):
    mine = init_mlp(jax.random.key(7))
    trainer = make(deployer, params=mine)
    trainer.fit(EXAMPLES, global_batch=8)
    assert not np.array_equal(trainer.params["w"], mine["w"])


def test_mutable_state_is_trained_and_checkpointed(tmp_path):
    trainer = fresh(tmp_path, loss_fn=batch_norm_loss, init_fn=init_batch_norm)
    trainer.fit(EXAMPLES, global_batch=8)
    other = fresh(tmp_path, loss_fn=batch_norm_loss, init_fn=init_batch_norm)
    other.prepare(EXAMPLES, global_batch=8)
    other.restore()
    assert np.any(np.asarray(other.state.model_state["mean"]))
    np.testing.assert_array_equal(other.state.model_state["mean"], trainer.state.model_state["mean"])


def test_second_fit_goes_on_and_may_have_another_batch(deployer):
    trainer = make(deployer)
    trainer.fit(EXAMPLES, global_batch=8, checkpoint_every=None)
    before = jax.device_get(trainer.params)
    assert trainer.fit(EXAMPLES, global_batch=4, checkpoint_every=None).step == 15
    assert not np.array_equal(before["w"], trainer.params["w"])


def test_two_trainers_live_on_one_deployer(deployer):
    first, second = make(deployer, name="actor"), make(deployer, name="critic", plan="fsdp", mesh="fsdp=2")
    first.fit(EXAMPLES, global_batch=8, steps=2)
    second.fit(EXAMPLES, global_batch=8, steps=3)
    first.fit(EXAMPLES, global_batch=8, steps=2)
    assert (first.step, second.step) == (4, 3)
    assert not np.array_equal(first.params["w"], second.params["w"])
    assert first.folder != second.folder


def test_trainer_without_workdir_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with rl.Deployer(compile_cache=False) as deployer:
        trainer = make(deployer)
        assert trainer.fit(EXAMPLES, global_batch=8).step == 5
        with pytest.raises(ValueError, match="give the Deployer a workdir"):
            trainer.save()
    assert list(tmp_path.iterdir()) == []


def test_sigterm_saves_a_checkpoint_and_stops(tmp_path):
    trainer = fresh(tmp_path)
    trainer.prepare(EXAMPLES, global_batch=8)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    former = signal.getsignal(signal.SIGTERM)
    result = trainer.fit(EXAMPLES, global_batch=8, steps=10**7, checkpoint_every=None, log_every=1000)
    assert result.ended == "signal SIGTERM"
    assert 0 < result.step < 10**7
    assert signal.getsignal(signal.SIGTERM) is former
    other = fresh(tmp_path)
    other.prepare(EXAMPLES, global_batch=8)
    other.restore()
    assert other.step == result.step


def test_stop_file_saves_a_checkpoint_and_stops(tmp_path):
    trainer = fresh(tmp_path)
    (trainer.folder / watch.STOP_FILE).touch()
    result = trainer.fit(EXAMPLES, global_batch=8, steps=10**7)
    assert "STOP" in result.ended
    assert not (trainer.folder / watch.STOP_FILE).exists()
    other = fresh(tmp_path)
    assert other.fit(EXAMPLES, global_batch=8, steps=result.step + 2).step == result.step + 2


def test_auto_plan_runs_on_all_devices(deployer):
    trainer = make(deployer, plan="auto", mesh=None)
    trainer.fit(EXAMPLES, global_batch=8, steps=2)
    assert trainer.plan.mesh.size == 8
    record = json.loads((trainer.folder / "plan.json").read_text())
    assert "(analytic)" in record["reason"]
    assert record["estimate"]["seconds_per_step"] > 0
    again = make(deployer, plan=trainer.folder / "plan.json", mesh=None, name="again")
    again.fit(EXAMPLES, global_batch=8, steps=2)
    assert again.plan == trainer.plan
    assert again.program.layout.specs("params") == trainer.program.layout.specs("params")


def test_auto_plan_is_for_the_cluster_given(deployer, tmp_path):
    file = tmp_path / "slow.toml"
    file.write_text('accelerator = "H100"\n[[tiers]]\nname = "node"\ndevices = 8\nbytes_per_second = 1.0\n')
    trainer = make(deployer, plan="auto", mesh=None, cluster=file)
    trainer.prepare(EXAMPLES, global_batch=8)
    assert trainer.plan.estimate.exposed_seconds > 1
    with pytest.raises(ValueError, match="16xH100 has 16 devices, but the plan is for 8"):
        make(deployer, plan="auto", mesh=None, cluster="16xH100", name="b").prepare(EXAMPLES, global_batch=8)
    with pytest.raises(ValueError, match="did you mean"):
        make(deployer, plan="auto", mesh=None, cluster="8xH10")


@pytest.mark.parametrize("plan, mesh, message", [
    ("fsdp", "fsdp=16", "needs 16 devices"),
    (rl.Plan(rl.MeshShape(data=2)), "data=4", "the plan is for mesh data=2"),
    ("nowhere/plan.json", None, "no plan file at"),
    ("zero3", None, "unknown preset 'zero3'"),
    (rl.Plan(rl.MeshShape(stage=8), microbatches=8), None, "the plan has stage=8 .* the step cannot run this yet"),
])  # fmt: skip
def test_impossible_plan_is_refused(deployer, plan, mesh, message):
    trainer = rl.Trainer(deployer, collate, mean_loss, init_mlp, optax.adam(1e-2), plan=plan, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        trainer.fit(EXAMPLES, global_batch=8, steps=1)


def ragged(examples):
    return {"x": [example["x"][: 1 + i] for i, example in enumerate(examples)]}


@pytest.mark.parametrize("settings, fit, message", [
    ({"loss_fn": cross_entropy}, {}, r"the loss has shape \(8,\); it must be a scalar"),
    ({"loss_fn": lambda params: (1.0, 2.0, 3.0)}, {}, "loss_fn returned a tuple of 3"),
    ({}, {"examples": []}, "examples is empty"),
    ({}, {"examples": EXAMPLES[:5]}, "5 examples are fewer than one global batch of 8"),
    ({}, {"global_batch": 1}, r"global batch of 1 examples is smaller than 2 data shards .*nearest: 2"),
    ({}, {"global_batch": 5}, r"5 examples does not split over 2 data shards .*nearest: 4 or 6"),
    ({"plan": rl.Plan(rl.MeshShape(data=2), microbatches=3)}, {}, r"3 microbatches x 2 data shards .*nearest: 6 or 12"),
    ({}, {"epochs": 1, "steps": 2}, "say one of them"),
    ({}, {"log_every": 0}, "log_every=0"),
    ({}, {"eval_every": "day"}, "eval_every='day'"),
    ({}, {"checkpoint_every": 0}, "checkpoint_every=0"),
])  # fmt: skip
def test_bad_input_is_refused_before_the_first_step(deployer, settings, fit, message):
    trainer = make(deployer, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.fit(**{"examples": EXAMPLES, "global_batch": 8, "steps": 3, **fit})
    assert trainer.step == 0


@pytest.mark.parametrize("settings, message", [
    ({"loss_fn": lambda weights, batch: 0.0}, r"takes an argument .weights.*\(params, batch, rng, state, training\)"),
    ({"loss_fn": 3}, "loss_fn is a int"),
    ({"optimizer": 0.1}, "optimizer is a float"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'; one of 'raise', 'skip', 'stop'"),
    ({"init_fn": {"w": 1}}, "init_fn is a dict"),
    ({"mesh": "datum=2"}, "did you mean 'data'"),
])  # fmt: skip
def test_bad_settings_are_refused_at_once(deployer, settings, message):
    with pytest.raises(ValueError, match=message):
        rl.Trainer(**{"deployer": deployer, "collate_fn": collate, "loss_fn": mean_loss, "init_fn": init_mlp,
                      "optimizer": optax.adam(1e-2), **settings})  # fmt: skip


def test_ragged_batches_are_refused_before_compiling(deployer):
    trainer = rl.Trainer(deployer, ragged, mean_loss, init_mlp, optax.adam(1e-2), plan="data")
    with pytest.raises(ValueError, match="collate_fn"):
        trainer.fit(EXAMPLES, global_batch=8)


def test_state_before_any_examples_is_refused_with_advice(deployer):
    with pytest.raises(ValueError, match=r"call trainer.prepare\(examples, global_batch=...\) or fit first"):
        _ = make(deployer).params


def test_slow_work_is_announced_while_it_runs(caplog):
    import logging
    import time

    with caplog.at_level("INFO"), watch.announced("compiling", logging.getLogger("test"), seconds_between=0.05):
        time.sleep(0.7)
    said = [record.getMessage() for record in caplog.records if record.name == "test"]
    assert said[0] == "compiling ..."
    assert "so far" in said[1]
    assert said[-1].startswith("compiling took 0.")


def test_two_processes_train_evaluate_predict_and_stop_as_one(tmp_path):
    program = """
    import optax
    import redco_like as rl
    from small_models import collate, init_mlp, logits, make_examples, masked_loss

    where = explicit if process >= 0 else False
    deployer = rl.Deployer(folder / ("one" if process < 0 else "two"), distributed=where, compile_cache=False)
    trainer = rl.Trainer(deployer, collate, masked_loss, init_mlp, optax.adam(1e-2), plan="fsdp+megatron",
                         mesh="data=2,fsdp=2,tensor=2", best_metric="loss")
    valid = make_examples(21, 1)
    result = trainer.fit(make_examples(40), global_batch=8, eval_examples=valid)
    predictor = rl.Predictor(deployer, collate, lambda params, batch: logits(params, batch["x"]).argmax(-1),
                             params=lambda: trainer.params)
    labels = [int(label) for label in predictor.predict(valid, per_device_batch=1)]
    if process == 0:
        (trainer.folder / "STOP").touch()
    deployer.barrier("the wish to stop is there")
    steps = 10**6 if process >= 0 else 1
    stopped = trainer.fit(make_examples(40), global_batch=8, steps=steps, eval_examples=valid, eval_every=None)
    print("RESULT", json.dumps([result.loss, result.evaluation["loss"], labels, stopped.step, stopped.ended]))
    """
    variables = lambda process, port: {  # noqa: E731
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 if process < 0 else 4}",
    }
    outputs = run_processes(program, tmp_path, (-1, 0, 1), variables)
    found = [[line for line in output.splitlines() if line.startswith("RESULT")] for output in outputs]
    assert all(found), "\n".join(outputs)
    one, first, second = (json.loads(lines[0].removeprefix("RESULT")) for lines in found)
    np.testing.assert_allclose(first[:2], one[:2], rtol=F32_SHARDED)
    assert first[:2] == second[:2]
    assert one[2] == first[2] == second[2]
    assert first[3] == second[3] < 10**6
    assert "STOP" in first[4] + second[4]
