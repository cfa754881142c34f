"""RLOO: REINFORCE with the other samples of a prompt as the baseline (Ahmadian et al. 2024, arXiv 2402.14740).

    algorithm = RLOO(samples=4)

A whole completion is one action. Its reward is R - kl sum(log pi - log pi_ref), its advantage that less the mean of
the other samples of its prompt. The first step on a rollout is REINFORCE's; later ones, on a policy that has moved,
weigh by the ratio of whole completions, clipped as PPO's is.

Shape letters as in `algorithm`; P prompts, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pipelines import LossOutput
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Experience, Rollout, State, check_numbers, check_samples, rollout_metrics
from redco_like.rlhf.heads import score_rewards
from redco_like.rlhf.policy import clipped, policy_metrics, read_policy, score_logprobs
from search.rlhf import GRAPHS, Graph


@dataclasses.dataclass(frozen=True)
class RLOO:
    """Settings of RLOO.

    Attributes:
        kl: coefficient of the KL against the reference, in the reward (0.03, Ahmadian et al. 2024, appendix C).
        clip: how far the ratio of whole completions may go from 1; only a second step on a rollout feels it.
        samples: completions per prompt; at least 2 (they take 2 and 4).
        minibatches, epochs: see `Algorithm`.

    Raises:
        ValueError: a number out of its range.
    """

    kl: float = 0.03
    clip: float = 0.2
    samples: int = 4
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self):
        check_numbers(self, above_0=("clip",), from_0=("kl",))
        check_samples(self)

    def graph(self, *, reward_model: bool) -> Graph:
        return GRAPHS["rloo"](reward_model=reward_model)

    def score_fns(self) -> dict[str, Any]:
        return {"reward": score_rewards, "reference": score_logprobs}

    def loss_fns(self) -> dict[str, Any]:
        return {"train_actor": self.actor_loss}

    def start(self) -> dict[str, float]:
        return {}

    def experience(self, rollout: Rollout, state: State) -> Experience:
        known = rollout.need("rewards", "logprobs", "reference_logprobs")
        check_samples(self, rollout)
        excess_B = ((known["logprobs"] - known["reference_logprobs"]) * rollout.mask_BL).sum(1)
        rewards_B = known["rewards"] - self.kl * excess_B
        batch = {**rollout.batch(), **known, "advantages": left_out(rewards_B, rollout.samples)}
        metrics = rollout_metrics(rollout) | {"reward_after_kl": float(rewards_B.mean())}
        return Experience(batch, metrics, dict(state))

    def actor_loss(self, model: Model) -> Any:
        """The mean over completions of -A r, r = pi(y) / pi_old(y): at r = 1 its gradient is that of -A log pi(y)."""

        def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
            mask_BL = batch["mask"]
            policy = read_policy(model, params, batch)
            change_BL = (policy.logprobs_BL - batch["logprobs"]) * mask_BL
            some_B = jnp.minimum(mask_BL.sum(1), 1.0)
            gain_B, held_B = clipped(change_BL.sum(1), batch["advantages"], low=self.clip, high=self.clip)
            rows = some_B.sum()
            metrics = policy_metrics(policy, change_BL, held_B[:, None] * mask_BL, mask_BL)
            metrics["clip_fraction"] = (held_B * some_B).sum(), rows
            return LossOutput(policy.balance * rows - (gain_B * some_B).sum(), rows, metrics)

        return loss_fn


def left_out(rewards_B: np.ndarray, samples: int) -> np.ndarray:
    """r_i less the mean of the other samples of its prompt (eq. 9): N / (N - 1) (r_i - mean). Equal ones give 0."""
    rewards_PN = rewards_B.astype(np.float64).reshape(-1, samples)
    centred_PN = rewards_PN - rewards_PN[:, :1]
    centred_PN -= centred_PN.mean(1, keepdims=True)
    return (centred_PN * (samples / (samples - 1))).reshape(-1).astype(np.float32)
