"""GRPO: the samples of a prompt are compared with each other, and no critic is needed (Shao et al. 2024, 2402.03300).

    algorithm = GRPO(samples=8)
    algorithm = GRPO(samples=8, kl=0.0, clip_high=0.28, average="tokens")           # as DAPO (arXiv 2503.14476)
    algorithm = GRPO(samples=8, kl=0.0, scale=False, average="width")               # as Dr. GRPO (arXiv 2503.20783)

All tokens of completion i have the advantage (r_i - mean r) / std r over the samples of its prompt; the loss is PPO's
clipped objective and kl times an estimate of KL(pi || reference), which is differentiated. Where all samples of a
prompt have the same reward their advantages are 0: they move the policy only towards the reference.

Shape letters as in `algorithm`; P prompts, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from pipelines import LossOutput
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Experience, Rollout, State, check_numbers, check_samples, rollout_metrics
from redco_like.rlhf.heads import score_rewards
from redco_like.rlhf.policy import clipped, k3, policy_metrics, read_policy, score_logprobs
from search.rlhf import GRAPHS, Graph

Average = Literal["completions", "tokens", "width"]
"""Over what the loss is a mean: over completions, each the mean over its tokens (GRPO); over all tokens (DAPO); over
completions, each its sum over the width of the arrays, which is the same for all (Dr. GRPO)."""


@dataclasses.dataclass(frozen=True)
class GRPO:
    """Settings of GRPO.

    Attributes:
        clip: how far below 1 the ratio may go (0.2, Schulman et al. 2017).
        clip_high: how far above 1; None for the same (DAPO: 0.28).
        kl: coefficient of the KL against the reference, in the loss (0.04, Shao et al. 2024).
        scale: divide by the standard deviation of the group; Dr. GRPO does not.
        average: see `Average`.
        samples: completions per prompt; at least 2.
        minibatches, epochs: see `Algorithm` (one step per rollout, Shao et al. 2024).

    Raises:
        ValueError: a number out of its range.
    """

    clip: float = 0.2
    clip_high: float | None = None
    kl: float = 0.04
    scale: bool = True
    average: Average = "completions"
    samples: int = 8
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self):
        check_numbers(self, above_0=("clip", "clip_high"), from_0=("kl",))
        check_samples(self)
        if self.average not in get_args(Average):
            raise ValueError(f"average={self.average!r}; one of {', '.join(get_args(Average))}")

    def graph(self, *, reward_model: bool) -> Graph:
        return GRAPHS["grpo"](reward_model=reward_model)

    def score_fns(self) -> dict[str, Any]:
        return {"reward": score_rewards, "reference": score_logprobs}

    def loss_fns(self) -> dict[str, Any]:
        return {"train_actor": self.actor_loss}

    def start(self) -> dict[str, float]:
        return {}

    def experience(self, rollout: Rollout, state: State) -> Experience:
        known = rollout.need("rewards", "logprobs", "reference_logprobs")
        check_samples(self, rollout)
        advantages_B = group_advantages(known["rewards"], rollout.samples, scale=self.scale)
        batch = {**rollout.batch(), **known, "advantages": advantages_B[:, None] * rollout.mask_BL}
        return Experience(batch, rollout_metrics(rollout), dict(state))

    def actor_loss(self, model: Model) -> Any:
        """The clipped objective, negated, and the KL."""
        high = self.clip if self.clip_high is None else self.clip_high

        def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
            mask_BL = batch["mask"]
            policy = read_policy(model, params, batch)
            change_BL = (policy.logprobs_BL - batch["logprobs"]) * mask_BL
            gain_BL, held_BL = clipped(change_BL, batch["advantages"], low=self.clip, high=high)
            kl_BL = k3((batch["reference_logprobs"] - policy.logprobs_BL) * mask_BL)
            loss_BL = (self.kl * kl_BL - gain_BL) * mask_BL
            length_B, rows = mask_BL.sum(1), jnp.minimum(mask_BL.sum(1), 1.0).sum()
            match self.average:
                case "completions":
                    total, weight = (loss_BL.sum(1) / jnp.maximum(length_B, 1.0)).sum(), rows
                case "tokens":
                    total, weight = loss_BL.sum(), length_B.sum()
                case "width":
                    total, weight = loss_BL.sum() / mask_BL.shape[1], rows
            metrics = policy_metrics(policy, change_BL, held_BL, mask_BL)
            metrics["kl_reference"] = (kl_BL * mask_BL).sum(), length_B.sum()
            return LossOutput(total + policy.balance * weight, weight, metrics)

        return loss_fn


def group_advantages(rewards_B: np.ndarray, samples: int, *, scale: bool) -> np.ndarray:
    """(r - mean) / (std + 1e-4) over each prompt's samples (Shao et al. 2024, 4.1.2); without `scale`, r - mean.

    The standard deviation is that of the group itself (over N, not N - 1). Equal rewards give exactly 0.
    """
    rewards_PN = rewards_B.astype(np.float64).reshape(-1, samples)
    centred_PN = rewards_PN - rewards_PN[:, :1]
    centred_PN -= centred_PN.mean(1, keepdims=True)
    if scale:
        centred_PN /= centred_PN.std(1, keepdims=True) + 1e-4
    return centred_PN.reshape(-1).astype(np.float32)
