"""RLTrainer: the same on any plan, resumed as if never stopped, and clear about what is wrong with what it is given."""

import math
import os
import signal

import jax
import numpy as np
import optax
import pytest
from tiny_rl import PROMPTS, UNEQUAL, collate, execution_of, fit, furthest, made, params_of, reward, trainer_of

from redco_like import CheckpointStore, SamplingParams, read_metrics
from redco_like import rlhf as rl
from redco_like.rlhf.rewards import Written, call_metrics, call_rewards
from search.rlhf import ExecutionPlan
from sharding_rules import PlanError

PPO = rl.PPO(minibatches=2, epochs=1, kl_target=0.5)
GRPO = rl.GRPO(samples=4, kl=0.0)


def losses(folder):
    return [[line[name] for name in line if name.endswith(("loss", "reward", "kl"))] for line in read_metrics(folder)]


def check_same(alone, spread, folders):
    """The losses of three iterations, and the parameters after them."""
    assert furthest(params_of(alone), params_of(spread)) < 1e-4
    there, here = (losses(folder) for folder in folders)
    assert len(there) == len(here) == 3
    np.testing.assert_allclose(here, there, atol=1e-4)


def test_ppo_on_unequal_meshes_equals_one_device(tmp_path):
    _, params = made()
    given = jax.device_put(params)
    alone = trainer_of(PPO, workdir=tmp_path / "one", params=given)
    fit(alone)
    spread = trainer_of(PPO, devices=8, workdir=tmp_path / "spread", plan=execution_of(PPO, 16, UNEQUAL))
    result = fit(spread)
    check_same(alone, spread, [tmp_path / "one/rl", tmp_path / "spread/rl"])
    assert {name for name in result.metrics if name.startswith("edge/")} == {
        "edge/actor: train_actor -> generate/seconds",
        "edge/critic: train_critic -> critic/seconds",
    }
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    assert ExecutionPlan.load(tmp_path / "spread/rl/execution.json") == spread.execution
    # What was lent to a call was given up after it, and an engine keeps nothing between its calls.
    assert not spread.runner.roles._lent
    assert spread.runner.steps["generate"].engine.params is None
    # Steps donate their state: neither what it was made of, nor the reference that began as the same.
    assert furthest(params_of(alone)["actor"], params) > 1e-3
    assert furthest(params_of(alone)["reference"], params) == 0.0
    assert furthest(jax.device_get(given), params) == 0.0


def test_reward_fn_that_raises_loses_nothing_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = trainer_of(GRPO, workdir=tmp_path / "whole")
    fit(whole, iterations=5)
    calls = []

    def failing(prompts, completions):
        calls.append(list(prompts))
        if len(calls) == 3:
            raise ConnectionError("the judge is away")
        return reward(prompts, completions)

    with pytest.raises(ConnectionError, match="the judge is away") as caught:
        fit(trainer_of(GRPO, workdir=tmp_path / "parts", reward_fn=failing), iterations=5)
    shown = ", ".join(map(str, calls[2][::4]))  # four samples of each
    assert f"in iteration 3, where reward_fn scored 16 completions of prompts {shown}" in caught.value.__notes__
    with CheckpointStore(tmp_path / "parts/rl/checkpoints") as store:
        assert store.steps() == [2]

    def stopping(prompts, completions):
        calls.append(1)
        if len(calls) == 5:  # the fourth iteration: the third was begun twice
            os.kill(os.getpid(), signal.SIGTERM)
        return reward(prompts, completions)

    parts = trainer_of(GRPO, workdir=tmp_path / "parts", reward_fn=stopping)
    stopped = fit(parts, iterations=5)
    assert (stopped.iteration, stopped.ended) == (4, "signal SIGTERM")
    parts._may_resume = True
    assert fit(parts, iterations=5).iteration == 5
    for a, b in zip(jax.tree.leaves(whole.runner.state), jax.tree.leaves(parts.runner.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path / "whole/rl") == losses(tmp_path / "parts/rl")
    assert fit(parts, iterations=5).iteration == 10  # a later call goes on from where it is
    with pytest.raises(ValueError, match="was written with other data: prompts_per_iteration: 4 then, 2 now"):
        fit(trainer_of(GRPO, workdir=tmp_path / "parts"), iterations=5, sequences=8)

    # Greedy samples of a prompt are the same, so GRPO has no advantages: without a KL, no gradient either.
    result = fit(parts, iterations=1, temperature=0.0)
    assert result.metrics["groups_equal"] == 1.0
    assert (result.metrics["loss"], result.metrics["grad_norm"], result.metrics["skipped"]) == (0.0, 0.0, 0.0)
    assert math.isfinite(result.metrics["entropy"])


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_ppo_stopped_twice_and_resumed_equals_uninterrupted(tmp_path, spread):
    """Also where iterations overlap: the checkpoint is of the finished one."""
    where = {"devices": 8, "plan": execution_of(PPO, 16, UNEQUAL)} if spread else {}
    whole = trainer_of(PPO, workdir=tmp_path / "whole", **where)
    fit(whole, iterations=4)

    def run():
        trainer = trainer_of(PPO, workdir=tmp_path / "parts", **where)
        return trainer, fit(trainer, iterations=4)

    for iteration in (1, 2):
        (tmp_path / "parts/rl").mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts/rl/STOP").touch()
        _, stopped = run()
        assert stopped.iteration == iteration
        assert "STOP" in stopped.ended
    parts, last = run()
    assert (last.iteration, last.ended) == (4, "finished")
    for a, b in zip(
        jax.tree.leaves((whole.runner.state, whole._algorithm_state)),
        jax.tree.leaves((parts.runner.state, parts._algorithm_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path / "whole/rl") == losses(tmp_path / "parts/rl")
    assert whole._algorithm_state["kl_coefficient"] != PPO.kl


@pytest.mark.slow
@pytest.mark.parametrize("offloaded", [(), ("actor", "reference", "critic")])
@pytest.mark.parametrize("algorithm", [PPO, rl.GRPO(samples=2, minibatches=2)])
def test_unequal_meshes_equal_one_device(tmp_path, algorithm, offloaded):
    temperature = 1.0 if algorithm.samples > 1 else 0.0  # greedy samples of a prompt would all be the same
    alone = trainer_of(algorithm, workdir=tmp_path / "one")
    fit(alone, temperature=temperature)
    prompts = 16 // algorithm.samples
    offloaded = [role for role in offloaded if role in alone.graph.roles]
    plan = execution_of(algorithm, prompts, UNEQUAL, offloaded)
    spread = trainer_of(algorithm, devices=8, workdir=tmp_path / "spread", plan=plan)
    result = fit(spread, temperature=temperature)
    check_same(alone, spread, [tmp_path / "one/rl", tmp_path / "spread/rl"])
    assert ("edge/actor: train_actor -> host/seconds" in result.metrics) == bool(offloaded)
    # Another size of iterations: other programs, the same roles.
    before = params_of(alone)
    assert fit(alone, iterations=1, sequences=8, temperature=temperature).iteration == 4
    after = params_of(alone)
    assert 0 < furthest(before["actor"], after["actor"]) < 0.02
    assert furthest(before["reference"], after["reference"]) == 0.0


def test_prompts_that_do_not_fit_are_named():
    trainer = trainer_of(GRPO)
    with pytest.raises(
        ValueError, match=r"prompt \d+ has 5 tokens, more than prompt_tokens=4.*nearest: prompt_tokens=5"
    ):
        fit(trainer, sequences=96, prompt_tokens=4)
    with pytest.raises(ValueError, match="there are 3 prompts; nearest: 3"):
        trainer.fit(PROMPTS[:3], iterations=1, prompts_per_iteration=4)
    with pytest.raises(ValueError, match="made an empty prompt of 5"):
        fit(trainer_of(GRPO, collate_fn=lambda ps: [() if p == 5 else (1,) for p in ps]))
    with pytest.raises(ValueError, match="returned 1 items for 24 prompts"):
        fit(trainer_of(GRPO, collate_fn=lambda ps: [(1,)]))
    with pytest.raises(ValueError, match="prompts is empty"):
        trainer.fit([], iterations=1)


def test_bad_settings_are_named():
    model, params = made()
    with pytest.raises(ValueError, match="neither reward_fn nor reward_model: GRPO needs one"):
        trainer_of(GRPO, reward_fn=None)
    with pytest.raises(ValueError, match="both reward_fn and reward_model"):
        trainer_of(GRPO, reward_model=(model, params))
    with pytest.raises(ValueError, match="generates nothing that a reward"):
        trainer_of(rl.DPO())
    with pytest.raises(ValueError, match="reward_fn takes an argument 'answers'"):
        trainer_of(GRPO, reward_fn=lambda answers: [1.0])
    with pytest.raises(ValueError, match="there is no role 'critic' in graph 'grpo'; it has actor, reference"):
        trainer_of(GRPO, critic=(model, params))
    with pytest.raises(ValueError, match="role 'critic' is trained and has no optimizer; there are actor"):
        trainer_of(PPO, optimizer={"actor": optax.sgd(0.1)})
    with pytest.raises(ValueError, match=r"sampling\.n=3, but GRPO has samples=4"):
        trainer_of(GRPO).fit(PROMPTS, iterations=1, sampling=SamplingParams(max_tokens=4, n=3))
    with pytest.raises(ValueError, match="iterations=0"):
        fit(trainer_of(GRPO), iterations=0)


def test_plans_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"is for 8 devices .*, but there are 4; make one for 4"):
        fit(trainer_of(GRPO, devices=4, plan=execution_of(GRPO, 4, UNEQUAL)))
    with pytest.raises(ValueError, match="calls of the plan alone: critic, train_actor, train_critic"):
        fit(trainer_of(GRPO, devices=8, plan=execution_of(PPO, 16, UNEQUAL)))
    with pytest.raises(ValueError, match="no execution plan at"):
        fit(trainer_of(GRPO, plan=tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"does not split|is smaller than") as caught:
        fit(trainer_of(GRPO, devices=8, plan=execution_of(GRPO, 1, UNEQUAL)), sequences=4)
    assert "while building call 'train_actor' on devices 0-7" in caught.value.__notes__


WRITTEN = Written.of(["a", "b"], [(1, 2), (3,), (4, 5), (5,)], samples=2, decode_fn=None, eos=(5,))


@pytest.mark.parametrize(
    "made, words",
    [
        ([1, 2, 3], r"returned \(3,\) numbers for 4 completions"),
        (None, "returned a NoneType"),
        (1.0, "returned a float"),
        ([[1], [2], [3], [4]], r"returned \(4, 1\) numbers"),
        ([1, 2, math.nan, 4], r"returned nan for completion 2 of 4, \(4, 5\) \(of prompt 'b'\)"),
        ([1, 2, 3, math.inf], "returned inf for completion 3"),
        ([1, None, 3, 4], "returned None for completion 1"),
        (np.asarray(["x", "1", "2", "3"]), "for completion 0"),
    ],
)
def test_rewards_of_a_wrong_form_are_named(made, words):
    with pytest.raises(rl.RewardError, match=words) as caught:
        call_rewards(lambda prompts, completions: made, WRITTEN, picked=[7, 9], iteration=3)
    assert caught.value.__notes__ == ["in iteration 3, where reward_fn scored 4 completions of prompts 7, 9"]


def test_functions_get_what_they_name():
    text = Written.of(
        ["a", "b"], [(1, 2), (5,)], samples=1, decode_fn=lambda tokens: "-".join(map(str, tokens)), eos=(5,)
    )
    seen = []
    made = call_rewards(
        lambda completions, tokens: seen.append((completions, tokens)) or np.asarray([1, 2]),
        text,
        picked=[0, 1],
        iteration=1,
    )
    assert (made.dtype, made.tolist()) == (np.float32, [1, 2])
    assert seen == [(["1-2", ""], [(1, 2), (5,)])]  # an end token alone is an empty completion
    assert call_metrics(lambda rewards, prompts: {"best": max(rewards)}, text, made) == {"best": 2.0}
    with pytest.raises(ValueError, match="metrics_fn returned"):
        call_metrics(lambda rewards: [1.0], text, made)


def three(pairs):
    """Pairs of numbers as prompts with two completions."""
    return [(collate([a])[0], (3, 4, a % 5), (b % 7, 1)) for a, b in pairs]


PAIRS = [(p, p + 1) for p in PROMPTS]


def test_dpo_runs_on_pairs(tmp_path):
    dpo = trainer_of(rl.DPO(minibatches=2), workdir=tmp_path, collate_fn=three, reward_fn=None)
    first = dpo.fit(PAIRS, iterations=1, prompts_per_iteration=8).metrics
    last = dpo.fit(PAIRS, iterations=9, prompts_per_iteration=8).metrics
    assert last["loss"] < first["loss"] < math.log(2) + 0.01
    assert last["accuracy"] > 0.9
    with pytest.raises(ValueError, match=r"made 2 sequences of .* they must be 3: prompt, chosen, rejected"):
        trainer_of(rl.DPO(), collate_fn=lambda ps: [((1,), (2,)) for _ in ps], reward_fn=None).fit(PAIRS, iterations=1)
    with pytest.raises(ValueError, match=r"example \d+ has 8 tokens, more than length=7; nearest: length=8"):
        dpo.fit(PAIRS, iterations=1, prompts_per_iteration=24, length=7)


@pytest.mark.slow
def test_a_reward_model_is_trained_and_scores_in_the_graph():
    judge = trainer_of(rl.RewardModel(), collate_fn=three, reward_fn=None)
    first = judge.fit(PAIRS, iterations=1, prompts_per_iteration=8).metrics
    last = judge.fit(PAIRS, iterations=9, prompts_per_iteration=8).metrics
    assert last["loss"] < first["loss"]
    assert set(judge.params) == {"model", "head"}
    model, _ = made()
    scored = trainer_of(GRPO, reward_fn=None, reward_model=(model, judge.params))
    assert math.isfinite(fit(scored, iterations=1).metrics["reward"])
    tuned = trainer_of(rl.SFT(), collate_fn=lambda ps: [row[:2] for row in three(ps)], reward_fn=None)
    first = tuned.fit(PAIRS, iterations=1, prompts_per_iteration=8).metrics
    last = tuned.fit(PAIRS, iterations=9, prompts_per_iteration=8).metrics
    assert last["loss"] < first["loss"]
