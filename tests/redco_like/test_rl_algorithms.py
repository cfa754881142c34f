"""Algorithms against what they are by definition, in numpy; and what must never matter: padding, splits, shards."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pipelines import build_train_program
from pipelines.functions import normalise_loss
from redco_like.models import architecture, build_model
from redco_like.rlhf import DPO, GRPO, PPO, RLOO, SFT, Algorithm, Examples, Pairs, RewardModel, Rollout, init_head
from redco_like.rlhf.algorithm import rollout_metrics
from redco_like.rlhf.grpo import group_advantages
from redco_like.rlhf.heads import sequence_scores, token_values
from redco_like.rlhf.policy import clipped, k3
from redco_like.rlhf.ppo import explained_variance, gae, token_rewards, whiten
from redco_like.rlhf.rloo import left_out
from search import Plan
from sharding_rules import MeshShape, make_layout, make_mesh, trace

VOCAB, WIDTH = 12, 8
SIZES = {"embed": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 32}
EXACT, SHARDED = 1e-5, 1e-4
ALGORITHMS = (PPO(), GRPO(samples=2), RLOO(samples=2), DPO(), RewardModel(), SFT())
LOSSES = [(algorithm, call) for algorithm in ALGORITHMS for call in algorithm.loss_fns()]
LOSSES += [(GRPO(samples=2, average="tokens", clip_high=0.3), "train_actor"), (PPO(value_clip=None), "train_critic")]


def names(value):
    return value if isinstance(value, str) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class Table:
    """A decoder that looks one token back: it compiles in no time. What the losses need of a model, and no more."""

    config = architecture("llama-2-7b")

    def forward(self, params, tokens_BL):
        return params["logits"][tokens_BL], jnp.float32(0)

    def hidden(self, params, tokens_BL):
        return params["hidden"][tokens_BL]


@functools.cache
def small():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"logits": jax.random.normal(keys[0], (VOCAB, VOCAB))}
    head = {"kernel": jax.random.normal(keys[1], (16, 1)) * 0.3, "bias": jnp.array([0.2])}
    return Table(), params, {"model": {"hidden": jax.random.normal(keys[2], (VOCAB, 16))}, "head": head}


@functools.cache
def real():
    config = dataclasses.replace(architecture("llama-2-7b"), vocab=VOCAB, max_length=16, tied=False, **SIZES)
    model = build_model(config, dtype="float32")
    params = model.init_fn(jax.random.key(0))
    # Far from uniform, so that mistakes show.
    params = jax.tree.map(lambda x: x * 6.0 if x.ndim > 1 else x, params)
    headed = init_head(model, jax.random.key(1), params)
    headed["head"]["kernel"] = jax.random.normal(jax.random.key(2), (16, 1)) * 0.3
    headed["head"]["bias"] = jnp.array([0.2])
    return model, params, headed


# All losses with the table, and with the Llama one of tokens; the others of these are slow.
CASES = [pytest.param(a, call, small, id=f"{names(a)}-{call}-{i}") for i, (a, call) in enumerate(LOSSES)]
CASES += [
    pytest.param(a, call, real, id=f"llama-{names(a)}-{call}-{i}", marks=() if not i else pytest.mark.slow)
    for i, (a, call) in enumerate(LOSSES)
]


def draw_sequences(rng, count):
    """Prompts and completions of all lengths that fit."""
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 4)).tolist() for _ in range(count)]
    return prompts, [rng.integers(0, VOCAB, rng.integers(1, 5)).tolist() for _ in range(count)]


def make_rollout(seed=0, *, prompts=4, samples=2, width=WIDTH, rewards=None):
    rng = np.random.default_rng(seed)
    asked, _ = draw_sequences(rng, prompts)
    _, written = draw_sequences(rng, prompts * samples)
    logprobs = [(-rng.exponential(1.5, len(tokens))).tolist() for tokens in written]
    rewards = rng.normal(size=len(written)) if rewards is None else rewards
    rollout = Rollout.of(asked, written, width=width, samples=samples, logprobs=logprobs, rewards=rewards)
    place = rollout.mask_BL > 0
    for name in ("reference_logprobs", "values"):
        array = np.zeros(place.shape, np.float32)
        array[place] = rng.normal(-1.0, 0.7, place.sum())  # in the order of the tokens: the same for any width
        rollout = rollout.scored(name, array)
    return rollout


def make_record(algorithm, *, width=WIDTH, rows=8):
    rng = np.random.default_rng(7)
    if algorithm.graph(reward_model=False).inputs == ("prompts",):
        return make_rollout(prompts=rows // 2, width=width)
    prompts, first = draw_sequences(rng, rows)
    if isinstance(algorithm, SFT):
        return Examples.of(list(zip(prompts, first, strict=True)), width=width)
    second = draw_sequences(rng, rows)[1]
    pairs = Pairs.of(list(zip(prompts, first, second, strict=True)), width=width)
    return pairs.scored("reference_logprobs", rng.normal(-5, 1, (rows, 2)))


def make_batch(algorithm, **options):
    return algorithm.experience(make_record(algorithm, **options), algorithm.start()).batch


@functools.cache
def loss_of(algorithm, call, made=small):
    """(params, batch) -> sum, {"weight", "metrics"}; and the parameters that it reads."""
    model, params, headed = made()
    loss = normalise_loss(algorithm.loss_fns()[call](model), training=True)
    role = algorithm.graph(reward_model=True).call(call).role
    return jax.jit(lambda params, batch: loss(params, batch, None, {})), params if role == "actor" else headed


@functools.cache
def forward():
    return jax.jit(small()[0].forward)


@functools.cache
def values():
    return jax.jit(functools.partial(token_values, small()[0]))


def assert_close(a, b, rtol=EXACT, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def logprobs_by_hand(params, tokens_BL):
    """log p(token l + 1) at place l, token by token, in float64."""
    logits_BLV = np.asarray(forward()(params, tokens_BL)[0], np.float64)
    made = np.zeros(tokens_BL.shape)
    for b, row in enumerate(tokens_BL):
        for place in range(len(row) - 1):
            p_V = np.exp(logits_BLV[b, place] - logits_BLV[b, place].max())
            made[b, place] = np.log(p_V[row[place + 1]] / p_V.sum())
    return made


# Advantages, on the host.


@st.composite
def rollout_arrays(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask_BL = np.zeros((rows, width), np.float32)
    for b in range(rows):
        begin = rng.integers(0, width)
        mask_BL[b, begin : rng.integers(begin + 1, width + 1)] = 1
    return mask_BL, rng.normal(size=mask_BL.shape) * mask_BL, rng.normal(size=mask_BL.shape).astype(np.float32)


@hypothesis.settings(max_examples=40)
@hypothesis.given(rollout_arrays(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_its_deltas(arrays, discount, trace):
    mask_BL, rewards_BL, values_BL = arrays
    advantages_BL, returns_BL = gae(rewards_BL, values_BL, mask_BL, discount=discount, trace=trace)
    for mask_L, rewards_L, values_L, found_L, return_L in zip(
        mask_BL, rewards_BL, values_BL, advantages_BL, returns_BL, strict=True
    ):
        places = np.flatnonzero(mask_L)
        r, v = rewards_L[places], np.append(values_L[places], 0.0)
        for t in range(len(places)):
            expected = sum(
                (discount * trace) ** k * (r[t + k] + discount * v[t + k + 1] - v[t + k]) for k in range(len(r) - t)
            )
            np.testing.assert_allclose(found_L[places[t]], expected, atol=1e-5)
            np.testing.assert_allclose(return_L[places[t]], expected + v[t], atol=1e-5)
        assert not found_L[mask_L == 0].any()
        assert not return_L[mask_L == 0].any()


def test_gae_with_a_trace_of_one_is_the_reward_to_go():
    rollout = make_rollout()
    rewards_BL = token_rewards(rollout.rewards_B, np.zeros(rollout.mask_BL.shape), rollout.mask_BL, 0.0)
    _, returns_BL = gae(rewards_BL, rollout.values_BL, rollout.mask_BL, discount=1.0, trace=1.0)
    np.testing.assert_allclose(returns_BL, rollout.rewards_B[:, None] * rollout.mask_BL, atol=1e-5)


def test_token_rewards_add_up_to_the_reward_less_the_penalty():
    rollout = make_rollout()
    excess_BL = rollout.logprobs_BL - rollout.reference_logprobs_BL
    rewards_BL = token_rewards(rollout.rewards_B, excess_BL, rollout.mask_BL, 0.3)
    np.testing.assert_allclose(rewards_BL.sum(1), rollout.rewards_B - 0.3 * excess_BL.sum(1), atol=1e-5)
    for b, row in enumerate(rewards_BL):
        *before, last = np.flatnonzero(rollout.mask_BL[b])
        np.testing.assert_allclose(row[before], -0.3 * excess_BL[b, before], atol=1e-6)
        np.testing.assert_allclose(row[last], rollout.rewards_B[b] - 0.3 * excess_BL[b, last], atol=1e-5)


@hypothesis.settings(max_examples=30)
@hypothesis.given(rollout_arrays())
def test_whitened_values_have_mean_zero_and_variance_one(arrays):
    mask_BL, _, values_BL = arrays
    hypothesis.assume(mask_BL.sum() > 1)
    white = whiten(values_BL, mask_BL)[mask_BL > 0].astype(np.float64)
    np.testing.assert_allclose((white.mean(), white.var()), (0, 1), atol=1e-3)
    assert not whiten(np.full_like(values_BL, 0.1), mask_BL).any()


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    rollout = make_rollout()
    returns_BL = rollout.values_BL + 1.0
    assert explained_variance(rollout.values_BL, returns_BL, rollout.mask_BL) == pytest.approx(1)
    assert explained_variance(np.zeros_like(returns_BL), returns_BL, rollout.mask_BL) == pytest.approx(0)
    assert explained_variance(rollout.values_BL, np.ones_like(returns_BL), rollout.mask_BL) == 0


@pytest.mark.parametrize(
    "divergence, factor",
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.1), (5.4, 1 - 0.1 * 0.1), (60.0, 1 + 0.1 * 0.2), (0.0, 1 - 0.1 * 0.2)],
)
def test_kl_controller_steers_as_ziegler_et_al(divergence, factor):
    assert PPO(kl_target=6.0).steered(0.2, divergence) == pytest.approx(0.2 * factor)
    assert PPO().steered(0.2, divergence) == 0.2


def test_kl_controller_state_goes_from_iteration_to_iteration():
    algorithm, rollout = PPO(kl=0.2, kl_target=1e-3), make_rollout()
    coefficient = algorithm.start()["kl_coefficient"]
    for _ in range(3):
        made = algorithm.experience(rollout, {"kl_coefficient": coefficient})
        assert made.metrics["kl_coefficient"] == coefficient
        sign = np.sign(made.metrics["kl"])
        assert made.state["kl_coefficient"] == pytest.approx(coefficient * (1 + 0.02 * sign))
        coefficient = made.state["kl_coefficient"]


rewards_of_groups = st.integers(2, 5).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.floats(-3, 3, width=32), min_size=3 * n, max_size=3 * n))
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(rewards_of_groups, st.floats(-5, 5, width=32))
def test_group_baselines_are_their_definitions_and_ignore_a_shift(groups, shift):
    samples, rewards = groups
    rewards_B = np.asarray(rewards, np.float32)
    for begin in range(0, len(rewards), samples):
        group = rewards_B[begin : begin + samples].astype(np.float64)
        here = slice(begin, begin + samples)
        normalised = (group - group.mean()) / (np.sqrt(np.mean((group - group.mean()) ** 2)) + 1e-4)
        others = [np.mean(np.delete(group, i)) for i in range(samples)]
        np.testing.assert_allclose(group_advantages(rewards_B, samples, scale=True)[here], normalised, atol=1e-5)
        np.testing.assert_allclose(
            group_advantages(rewards_B, samples, scale=False)[here], group - group.mean(), atol=1e-5
        )
        np.testing.assert_allclose(left_out(rewards_B, samples)[here], group - others, atol=1e-5)
    np.testing.assert_allclose(left_out(rewards_B + shift, samples), left_out(rewards_B, samples), atol=2e-5)
    np.testing.assert_allclose(
        group_advantages(rewards_B + shift, samples, scale=False),
        group_advantages(rewards_B, samples, scale=False),
        atol=2e-5,
    )


def test_scaled_group_advantages_ignore_the_unit_of_the_reward():
    rewards_B = np.array([0, 1, 1, 0, 2, 5, 5, 5], np.float32)
    ones, tens = (group_advantages(rewards_B * unit, 4, scale=True) for unit in (1, 10))
    np.testing.assert_allclose(ones, tens, rtol=1e-3)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7])
@pytest.mark.parametrize("samples", [2, 3, 7])
def test_equal_rewards_give_advantages_of_exactly_zero(reward, samples):
    rewards_B = np.full(samples * 4, reward, np.float32)
    assert not group_advantages(rewards_B, samples, scale=True).any()
    assert not left_out(rewards_B, samples).any()


def test_rloo_takes_the_penalty_into_the_reward():
    rollout = make_rollout()
    made = RLOO(samples=2, kl=0.3).experience(rollout, {})
    excess_B = (rollout.logprobs_BL - rollout.reference_logprobs_BL).sum(1)
    np.testing.assert_allclose(made.batch["advantages"], left_out(rollout.rewards_B - 0.3 * excess_B, 2), atol=1e-5)
    assert made.metrics["reward_after_kl"] == pytest.approx(np.mean(rollout.rewards_B - 0.3 * excess_B), abs=1e-5)


def test_rollout_metrics_say_what_happened():
    rollout = make_rollout(rewards=[1, 1, 0, 1, 0, 0, 1, 0])
    metrics = rollout_metrics(rollout)
    assert metrics["reward"] == 0.5
    assert metrics["groups_equal"] == 0.5
    assert metrics["length"] == pytest.approx(rollout.mask_BL.sum() / 8)
    assert "groups_equal" not in rollout_metrics(dataclasses.replace(rollout, samples=1))


# Objectives.


@pytest.mark.parametrize(
    "ratio, advantage, gain, slope, is_held",
    [
        (1.0, 2.0, 2.0, 2.0, 0),  # at 1 the slope is the advantage
        (1.1, 2.0, 2.2, 2.2, 0),
        (1.5, 2.0, 2.4, 0.0, 1),  # too likely already
        (1.5, -2.0, -3.0, -3.0, 0),  # a mistake that has become likelier is not forgiven
        (0.5, -2.0, -1.6, 0.0, 1),  # too unlikely already
        (0.5, 2.0, 1.0, 1.0, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clip_holds_back_what_has_gone_far_enough(ratio, advantage, gain, slope, is_held):
    def gain_of(change):
        return clipped(change, jnp.float32(advantage), low=0.2, high=0.2)

    change = jnp.log(jnp.float32(ratio))
    np.testing.assert_allclose(gain_of(change), (gain, is_held), rtol=EXACT, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda c: gain_of(c)[0])(change), slope, rtol=EXACT, atol=1e-6)


def test_clip_may_reach_further_up_than_down():
    change = jnp.log(jnp.array([1.25, 1.4, 0.75]))
    gain, is_held = clipped(change, jnp.array([1.0, 1.0, -1.0]), low=0.2, high=0.3)
    np.testing.assert_allclose(gain, [1.25, 1.3, -0.8], rtol=EXACT)
    np.testing.assert_array_equal(is_held, [0, 1, 1])


def test_k3_is_never_negative_and_its_mean_is_the_divergence():
    rng = np.random.default_rng(0)
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 9)))
    estimates = np.asarray(k3(jnp.asarray(np.log(q / p), jnp.float32)))
    assert (estimates >= 0).all()
    np.testing.assert_allclose((p * estimates).sum(), (p * np.log(p / q)).sum(), rtol=EXACT)


def test_actor_losses_are_their_formulas():
    _, params, _ = small()
    rollout = make_rollout()
    mask_BL = rollout.mask_BL
    now_BL = logprobs_by_hand(params, rollout.tokens_BL)
    ratio_BL = np.exp((now_BL - rollout.logprobs_BL) * mask_BL)
    reference_BL = np.exp((rollout.reference_logprobs_BL - now_BL) * mask_BL)
    kl_BL = reference_BL - 1 - np.log(reference_BL)

    def surrogate(r, a, high=0.2):
        return np.minimum(r * a, np.clip(r, 0.8, 1 + high) * a)

    def found(algorithm, batch):
        loss, params = loss_of(algorithm, "train_actor")
        total, aux = loss(params, batch)
        return total / aux["weight"], {k: s / w for k, (s, w) in aux["metrics"].items()}

    made = PPO().experience(rollout, {"kl_coefficient": 0.1})
    gain_BL = surrogate(ratio_BL, made.batch["advantages"])
    value, metrics = found(PPO(), made.batch)
    np.testing.assert_allclose(value, -(gain_BL * mask_BL).sum() / mask_BL.sum(), rtol=SHARDED)
    np.testing.assert_allclose(metrics["ratio"], (ratio_BL * mask_BL).sum() / mask_BL.sum(), rtol=SHARDED)
    held_BL = (gain_BL < ratio_BL * made.batch["advantages"]) * mask_BL
    np.testing.assert_allclose(metrics["clip_fraction"], held_BL.sum() / mask_BL.sum(), rtol=SHARDED)
    logits_BLV = np.asarray(forward()(params, rollout.tokens_BL)[0], np.float64)
    p_BLV = np.exp(logits_BLV) / np.exp(logits_BLV).sum(-1, keepdims=True)
    entropy_BL = -(p_BLV * np.log(p_BLV)).sum(-1)
    np.testing.assert_allclose(metrics["entropy"], (entropy_BL * mask_BL).sum() / mask_BL.sum(), rtol=SHARDED)

    for average in ("completions", "tokens", "width"):
        algorithm = GRPO(samples=2, kl=0.3, clip_high=0.4, average=average)
        batch = algorithm.experience(rollout, {}).batch
        token_BL = (0.3 * kl_BL - surrogate(ratio_BL, batch["advantages"], 0.4)) * mask_BL
        expected = {
            "completions": np.mean(token_BL.sum(1) / mask_BL.sum(1)),
            "tokens": token_BL.sum() / mask_BL.sum(),
            "width": np.mean(token_BL.sum(1) / WIDTH),
        }
        value, metrics = found(algorithm, batch)
        np.testing.assert_allclose(value, expected[average], rtol=SHARDED)
        np.testing.assert_allclose(metrics["kl_reference"], (kl_BL * mask_BL).sum() / mask_BL.sum(), rtol=SHARDED)

    batch = RLOO(samples=2).experience(rollout, {}).batch
    whole_B = np.exp(((now_BL - rollout.logprobs_BL) * mask_BL).sum(1))
    value, _ = found(RLOO(samples=2), batch)
    np.testing.assert_allclose(value, -np.mean(surrogate(whole_B, batch["advantages"])), rtol=SHARDED)


def test_critic_loss_is_the_worse_of_the_two_errors():
    _, _, headed = small()
    batch = make_batch(PPO())
    values_BL = np.asarray(values()(headed, batch["tokens"]), np.float64)
    near_BL = batch["values"] + np.clip(values_BL - batch["values"], -0.2, 0.2)
    free_BL, near_BL = (values_BL - batch["returns"]) ** 2, (near_BL - batch["returns"]) ** 2
    for algorithm, worst_BL in ((PPO(), np.maximum(free_BL, near_BL)), (PPO(value_clip=None), free_BL)):
        loss, params = loss_of(algorithm, "train_critic")
        total, aux = loss(params, batch)
        count = batch["mask"].sum()
        np.testing.assert_allclose(total / aux["weight"], 0.5 * (worst_BL * batch["mask"]).sum() / count, rtol=SHARDED)
        error, weight = aux["metrics"]["value_error"]
        np.testing.assert_allclose(error / weight, (free_BL * batch["mask"]).sum() / count, rtol=SHARDED)


def test_dpo_is_its_closed_form_and_starts_at_log_2():
    model, params, _ = small()
    record = make_record(DPO())
    scores_B2L = logprobs_by_hand(params, record.tokens_B2L.reshape(-1, WIDTH)).reshape(-1, 2, WIDTH)
    scores_B2 = (scores_B2L * record.mask_B2L).sum(-1)
    np.testing.assert_allclose(
        jax.jit(DPO().score_fns()["reference"](model))(params, record.batch()), scores_B2, rtol=SHARDED
    )
    algorithm = DPO(beta=0.3)
    loss, _ = loss_of(algorithm, "train_actor")
    margin_B = 0.3 * np.diff((scores_B2 - record.reference_logprobs_B2)[:, ::-1])[:, 0]
    total, aux = loss(params, algorithm.experience(record, {}).batch)
    np.testing.assert_allclose(total / aux["weight"], np.mean(np.log1p(np.exp(-margin_B))), rtol=SHARDED)
    np.testing.assert_allclose(np.divide(*aux["metrics"]["accuracy"]), np.mean(margin_B > 0), rtol=SHARDED)
    same = record.scored("reference_logprobs", scores_B2)
    total, aux = loss(params, algorithm.experience(same, {}).batch)
    np.testing.assert_allclose(total / aux["weight"], np.log(2), rtol=SHARDED)


def test_reward_model_loss_is_that_of_bradley_and_terry():
    _, _, headed = small()
    record = make_record(RewardModel())
    values_BL = np.asarray(values()(headed, record.tokens_B2L.reshape(-1, WIDTH)), np.float64)
    last_B = record.batch()["last"].reshape(-1)
    scores_B2 = values_BL[np.arange(len(last_B)), last_B].reshape(-1, 2)
    loss, _ = loss_of(RewardModel(), "train_reward")
    total, aux = loss(headed, record.batch())
    expected = np.mean(np.log1p(np.exp(-(scores_B2[:, 0] - scores_B2[:, 1]))))
    np.testing.assert_allclose(total / aux["weight"], expected, rtol=SHARDED)


def test_sft_is_the_models_own_loss_of_the_completions():
    model, params, _ = real()
    batch = make_batch(SFT())
    loss, _ = loss_of(SFT(), "train_actor", real)
    total, aux = loss(params, batch)
    labels = np.where(batch["mask"] > 0, batch["labels"], -1)
    expected, count = jax.jit(model.loss_fn)(params, {"tokens": batch["tokens"], "labels": labels})
    np.testing.assert_allclose((total, aux["weight"]), (expected, count), rtol=EXACT)


@pytest.mark.parametrize("algorithm", [PPO(), GRPO(samples=2, kl=0.0), RLOO(samples=2)], ids=names)
def test_first_step_on_a_rollout_is_the_policy_gradient(algorithm):
    model, params, _ = small()
    rollout = make_rollout()
    now_BL = jax.jit(PPO().score_fns()["reference"](model))(params, rollout.batch())
    rollout = rollout.scored("logprobs", now_BL)
    batch = algorithm.experience(rollout, algorithm.start()).batch
    loss, _ = loss_of(algorithm, "train_actor")
    mask_BL = batch["mask"]

    def reinforce(params):
        logits_BLV = model.forward(params, batch["tokens"])[0]
        all_BLV = jax.nn.log_softmax(logits_BLV)
        logprobs_BL = jnp.take_along_axis(all_BLV, batch["labels"][..., None], -1)[..., 0] * mask_BL
        match algorithm:
            case PPO():
                return -(batch["advantages"] * logprobs_BL).sum() / mask_BL.sum()
            case GRPO():
                return -(batch["advantages"] * logprobs_BL / mask_BL.sum(1, keepdims=True)).sum() / len(mask_BL)
        return -(batch["advantages"] * logprobs_BL.sum(1)).mean()

    def mean(params):
        total, aux = loss(params, batch)
        return total / aux["weight"]

    assert_close(jax.jit(jax.grad(mean))(params), jax.jit(jax.grad(reinforce))(params), rtol=SHARDED)


@pytest.mark.parametrize("algorithm", [PPO(kl=0.0), GRPO(samples=2, kl=0.0), RLOO(samples=2, kl=0.0)], ids=names)
def test_equal_rewards_move_no_policy(algorithm):
    rollout = make_rollout(rewards=np.full(8, 0.7))
    rollout = rollout.scored("values", np.full(rollout.mask_BL.shape, 0.7) * rollout.mask_BL)
    made = algorithm.experience(rollout, algorithm.start())
    loss, params = loss_of(algorithm, "train_actor")
    grads = jax.jit(jax.grad(lambda params: loss(params, made.batch)[0]))(params)
    for leaf in jax.tree.leaves(grads):
        assert not np.asarray(leaf).any()
    assert all(np.isfinite(value) for value in made.metrics.values())
    assert made.metrics["groups_equal"] == 1


def test_equal_rewards_leave_grpo_its_pull_towards_the_reference():
    made = GRPO(samples=2).experience(make_rollout(rewards=np.ones(8)), {})
    loss, params = loss_of(GRPO(samples=2), "train_actor")
    grads = jax.tree.leaves(jax.jit(jax.grad(lambda params: loss(params, made.batch)[0]))(params))
    assert sum(float(jnp.abs(leaf).sum()) for leaf in grads) > 0
    assert all(np.isfinite(leaf).all() for leaf in grads)


# What must not matter.


@pytest.mark.parametrize("algorithm, call, model", CASES)
def test_padding_and_empty_rows_never_matter(algorithm, call, model):
    loss, params = loss_of(algorithm, call, model)
    expected = loss(params, make_batch(algorithm))
    wider = make_batch(algorithm, width=WIDTH + 3)
    noise = np.random.default_rng(1).integers(0, VOCAB, wider["tokens"].shape)
    behind = np.arange(wider["tokens"].shape[-1]) > wider["last"][..., None]
    filled = {**wider, "tokens": np.where(behind, noise, wider["tokens"]).astype(np.int32)}
    more = {name: np.concatenate([array, np.zeros_like(array[:2])]) for name, array in filled.items()}
    assert_close(loss(params, more), expected, rtol=SHARDED)


@pytest.mark.parametrize("algorithm, call, model", CASES)
def test_parts_of_a_batch_add_up_to_the_whole(algorithm, call, model):
    loss, params = loss_of(algorithm, call, model)
    batch = make_batch(algorithm)
    whole = loss(params, batch)
    parts = [
        loss(params, {name: array[part] for name, array in batch.items()}) for part in ([0, 3, 5], [1, 2, 4, 6, 7])
    ]
    assert_close(jax.tree.map(lambda a, b: a + b, *parts), whole, rtol=SHARDED)


@pytest.mark.parametrize(
    "algorithm, call",
    [pytest.param(*case, marks=() if i in (0, 4) else pytest.mark.slow) for i, case in enumerate(LOSSES[:7])],
    ids=names,
)
def test_shards_equal_one_device(algorithm, call):
    loss, params = loss_of(algorithm, call, real)
    batch = make_batch(algorithm)
    shape = MeshShape(data=2, tensor=2)
    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    weight = aux["weight"]
    program = build_train_program(
        algorithm.loss_fns()[call](real()[0]),
        lambda rng: params,
        optax.sgd(1.0),
        batch,
        Plan(shape, "fsdp+megatron", microbatches=2),
        make_mesh(shape, jax.devices()[:4]),
    )
    state = program.state_from(params)
    state, metrics = program.step(state, jax.device_put(batch, program.batch_shardings))
    np.testing.assert_allclose(metrics["loss"], value / weight, rtol=SHARDED)
    expected = jax.tree.map(lambda p, g: p - g / weight, params, grads)
    assert_close(jax.device_get(state.params), jax.device_get(expected), rtol=SHARDED)


@pytest.mark.parametrize("algorithm, call", [(PPO(), "train_actor"), (DPO(), "train_actor")], ids=names)
def test_planner_lays_policies_out_as_the_models_own_loss(algorithm, call):
    model, params, _ = real()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(algorithm))
    mesh = MeshShape(data=2, context=2, tensor=2)

    def layout(loss, batch):
        return make_layout(trace(loss, shapes, batch, names=("params", "batch")), mesh, "fsdp+megatron")

    own = layout(model.loss_fn, model.abstract_batch(8, WIDTH))
    ours = layout(lambda params, batch: algorithm.loss_fns()[call](model)(params, batch).loss, batch)
    assert ours.specs("params") == own.specs("params")
    assert ours.specs("batch")["mask"][0] == own.specs("batch")["tokens"][0]


# Heads.


def test_a_new_head_says_zero_and_has_no_kernel_for_logits():
    model, params, _ = real()
    made = init_head(model, jax.random.key(0), params)
    assert "head" in params
    assert "head" not in made["model"]
    assert not np.asarray(token_values(model, made, np.ones((2, 5), np.int32))).any()
    drawn = init_head(model, jax.random.key(0))
    assert jax.tree.structure(drawn) == jax.tree.structure(made)


def test_values_see_nothing_of_what_comes_after_and_scores_see_the_last_token():
    model, _, headed = real()
    record = Rollout.of([[1, 2, 3]], [[4, 5, 6]], width=WIDTH)
    other = Rollout.of([[1, 2, 3]], [[4, 5, 7]], width=WIDTH)
    values, changed = (np.asarray(PPO().score_fns()["critic"](model)(headed, r.batch())) for r in (record, other))
    np.testing.assert_array_equal(values, changed)  # the last token is predicted from what stands before it
    assert (values[0] != 0).tolist() == [False, False, True, True, True, False, False, False]
    assert sequence_scores(model, headed, record.batch()) != sequence_scores(model, headed, other.batch())


def test_hidden_states_make_the_models_logits():
    model, params, _ = real()
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    logits = model.hidden(params, tokens) @ params["head"]["kernel"]
    np.testing.assert_allclose(model.forward(params, tokens)[0], logits, rtol=EXACT, atol=1e-5)
    with pytest.raises(ValueError, match=r"bert .*only decoders score whole sequences"):
        build_model(architecture("bert-base"), dtype="float32").hidden({}, tokens)


# Records and settings.


def test_arrays_lie_where_a_token_is_predicted():
    rollout = Rollout.of([[1, 2], [3]], [[4], [5, 6]], width=5, logprobs=[[-1.0], [-2.0, -3.0]])
    batch = rollout.batch()
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 4, 0, 0], [3, 5, 6, 0, 0]])
    np.testing.assert_array_equal(batch["labels"], [[2, 4, 0, 0, 0], [5, 6, 0, 0, 0]])
    np.testing.assert_array_equal(batch["mask"], [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.logprobs_BL, [[0, -1, 0, 0, 0], [-2, -3, 0, 0, 0]])
    np.testing.assert_array_equal(batch["last"], [2, 2])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_algorithms_name_all_that_their_graph_calls(algorithm):
    assert isinstance(algorithm, Algorithm)
    graph = algorithm.graph(reward_model=True)
    kinds = {kind: {call.name for call in graph.calls if call.kind == kind} for kind in ("score", "train")}
    assert kinds["score"] == set(algorithm.score_fns())
    assert kinds["train"] == set(algorithm.loss_fns())
    assert all(isinstance(value, float) for value in algorithm.start().values())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda r: r.scored("rewards", [1.0]), r"rewards has shape \(1,\); it must be \(8,\)"),
        (lambda r: r.scored("rewards", [0.0, np.nan] * 4), r"rewards has nan in row 1"),
        (lambda r: r.scored("reward", np.zeros(8)), r"a Rollout has no 'reward'; it has mask, tokens"),
        (lambda r: r.scored("values", np.full((8, WIDTH), np.inf)), r"values has inf in row 0"),
        (lambda r: dataclasses.replace(r, samples=3), r"8 completions are no whole number of groups of samples=3"),
        (lambda r: dataclasses.replace(r, mask_BL=r.mask_BL[0]), r"mask has shape \(8,\); it must be \(B, L\)"),
        (lambda r: Rollout.of([[1] * 6], [[2] * 4], width=8), r"prompt of 6 and a completion of 4 tokens.*nearest: 10"),
        (lambda r: Rollout.of([[]], [[2]], width=8), r"row 0 has an empty prompt"),
        (lambda r: Rollout.of([[1], [2]], [[2]], width=8), r"1 completions of 2 prompts"),
        (lambda r: Rollout.of([[1]], [[2, 3]], width=8, logprobs=[[-1.0]]), r"completion 0: 1 log-prob.* of 2 tokens"),
        (lambda r: PPO().experience(dataclasses.replace(r, values_BL=None), PPO().start()), r"has no values"),
        (lambda r: GRPO().experience(dataclasses.replace(r, samples=1), {}), r"GRPO: samples=1.*at least 2"),
        (lambda r: GRPO(samples=1), r"GRPO: samples=1"),
        (lambda r: RLOO(samples=0), r"RLOO: samples=0; a whole number from 1 up"),
        (lambda r: PPO(clip=0.0), r"PPO: clip=0.0; it must be a number above 0"),
        (lambda r: PPO(trace=1.5), r"PPO: trace=1.5; it must be a number from 0 to 1"),
        (lambda r: PPO(kl=float("nan")), r"PPO: kl=nan; it must be a number at least 0"),
        (lambda r: DPO(beta=-1), r"DPO: beta=-1; it must be a number above 0"),
        (lambda r: GRPO(average="mean"), r"average='mean'; one of completions, tokens, width"),
        (lambda r: Pairs.of([([1], [2], [3])], width=4).need("reference_logprobs"), r"pairs has no reference_logprobs"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(make_rollout())
