"""PPO with a critic, as for language models (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, 2203.02155).

    algorithm = PPO(kl=0.02)
    made = algorithm.experience(rollout, algorithm.start())        # of a rollout with rewards, reference and values

Every token of a completion is an action. Its reward is the penalty -kl (log pi - log pi_ref), and the last one also
gets the completion's. Advantages are GAE's, whitened over the rollout; the actor's loss is the clipped objective, the
critic's the clipped squared error.

Shape letters as in `algorithm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipelines import LossOutput
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Experience, Rollout, State, check_numbers, rollout_metrics
from redco_like.rlhf.heads import score_rewards, score_values, token_values
from redco_like.rlhf.policy import clipped, policy_metrics, read_policy, score_logprobs
from search.rlhf import GRAPHS, Graph


@dataclasses.dataclass(frozen=True)
class PPO:
    """Settings of PPO.

    Attributes:
        clip: how far the ratio may go from 1 (Schulman et al. 2017: 0.2).
        value_clip: how far a value may go from what the critic said of the rollout, before it counts no more; None for
            no clip.
        discount: gamma of GAE (1 for completions, Ziegler et al. 2019).
        trace: lambda of GAE (0.95, Schulman et al. 2016, arXiv 1506.02438).
        kl: coefficient of the penalty against the reference, per token (0.02, Ouyang et al. 2022).
        kl_target: nats per completion that the coefficient is steered to (Ziegler et al. 2019, arXiv 1909.08593, 2.2;
            they take 6 to 10); None: it stays as it is.
        kl_gain: how quickly it is steered (0.1, the same).
        samples, minibatches, epochs: see `Algorithm` (4 epochs, Ziegler et al. 2019).

    Raises:
        ValueError: a number out of its range.
    """

    clip: float = 0.2
    value_clip: float | None = 0.2
    discount: float = 1.0
    trace: float = 0.95
    kl: float = 0.02
    kl_target: float | None = None
    kl_gain: float = 0.1
    samples: int = 1
    minibatches: int = 1
    epochs: int = 4

    def __post_init__(self):
        check_numbers(
            self, above_0=("clip", "value_clip", "kl_target"), share=("discount", "trace"), from_0=("kl", "kl_gain")
        )

    def graph(self, *, reward_model: bool) -> Graph:
        return GRAPHS["ppo"](reward_model=reward_model)

    def score_fns(self) -> dict[str, Any]:
        return {"reward": score_rewards, "reference": score_logprobs, "critic": score_values}

    def loss_fns(self) -> dict[str, Any]:
        return {"train_actor": self.actor_loss, "train_critic": self.critic_loss}

    def start(self) -> dict[str, float]:
        return {"kl_coefficient": self.kl}

    def experience(self, rollout: Rollout, state: State) -> Experience:
        known = rollout.need("rewards", "logprobs", "reference_logprobs", "values")
        mask_BL, values_BL = rollout.mask_BL, known["values"]
        coefficient = state["kl_coefficient"]
        excess_BL = (known["logprobs"] - known["reference_logprobs"]) * mask_BL
        rewards_BL = token_rewards(known["rewards"], excess_BL, mask_BL, coefficient)
        advantages_BL, returns_BL = gae(rewards_BL, values_BL, mask_BL, discount=self.discount, trace=self.trace)
        divergence = float(excess_BL.sum(1).mean())
        metrics = rollout_metrics(rollout) | {
            "kl_coefficient": coefficient,
            "reward_after_kl": float(rewards_BL.sum(1).mean()),
            "value": masked_mean(values_BL, mask_BL),
            "explained_variance": explained_variance(values_BL, returns_BL, mask_BL),
        }
        batch = {**rollout.batch(), **known, "advantages": whiten(advantages_BL, mask_BL), "returns": returns_BL}
        return Experience(batch, metrics, {"kl_coefficient": self.steered(coefficient, divergence)})

    def steered(self, coefficient: float, divergence: float) -> float:
        """The next iteration's KL coefficient (Ziegler et al. 2019, section 2.2).

            coefficient (1 + kl_gain clip((divergence - target) / target, -0.2, 0.2))

        Args:
            coefficient: of this iteration.
            divergence: nats per completion, the mean of this iteration.
        """
        if self.kl_target is None:
            return coefficient
        error = min(max((divergence - self.kl_target) / self.kl_target, -0.2), 0.2)
        return coefficient * (1 + self.kl_gain * error)

    def actor_loss(self, model: Model) -> Any:
        """The clipped objective, negated; the mean over tokens."""

        def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
            mask_BL, count = batch["mask"], batch["mask"].sum()
            policy = read_policy(model, params, batch)
            change_BL = (policy.logprobs_BL - batch["logprobs"]) * mask_BL
            gain_BL, held_BL = clipped(change_BL, batch["advantages"], low=self.clip, high=self.clip)
            total = policy.balance * count - (gain_BL * mask_BL).sum()
            return LossOutput(total, count, policy_metrics(policy, change_BL, held_BL, mask_BL))

        return loss_fn

    def critic_loss(self, model: Model) -> Any:
        """Half of the squared error, or of the clipped value's if that is larger; the mean over tokens."""

        def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
            mask_BL, old_BL, returns_BL = batch["mask"], batch["values"], batch["returns"]
            values_BL = token_values(model, params, batch["tokens"])
            error_BL = jnp.square(values_BL - returns_BL)
            worst_BL = error_BL
            if self.value_clip is not None:
                near_BL = old_BL + jnp.clip(values_BL - old_BL, -self.value_clip, self.value_clip)
                worst_BL = jnp.maximum(error_BL, jnp.square(near_BL - returns_BL))
            count = mask_BL.sum()

            def over(values_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
                return (values_BL * mask_BL).sum(), count

            clip_fraction_BL = (worst_BL > error_BL).astype(jnp.float32)
            metrics = {"value_error": over(error_BL), "value_clip_fraction": over(clip_fraction_BL)}
            return LossOutput(0.5 * (worst_BL * mask_BL).sum(), count, metrics)

        return loss_fn


# Between scoring and training, on the host.


def token_rewards(rewards_B: np.ndarray, excess_BL: np.ndarray, mask_BL: np.ndarray, coefficient: float) -> np.ndarray:
    """Spread rewards over tokens: -coefficient (log pi - log pi_ref) at each, the completion's at its last."""
    places_L = np.arange(1, mask_BL.shape[1] + 1)
    last_B = (places_L * (mask_BL > 0)).max(1)
    at_end_BL = (places_L[None] == last_B[:, None]) & (mask_BL > 0)
    return -coefficient * excess_BL * mask_BL + at_end_BL * rewards_B[:, None]


def gae(
    rewards_BL: np.ndarray, values_BL: np.ndarray, mask_BL: np.ndarray, *, discount: float, trace: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eqs. 11 and 16).

        delta_t = r_t + discount V_(t+1) - V_t,   A_t = sum_k (discount trace)^k delta_(t+k)

    What follows a completion is worth nothing, whether it ended or was cut off.

    Args:
        rewards_BL, values_BL: of each token of the completions.
        mask_BL: 1 on their tokens, which follow each other.
        discount, trace: gamma and lambda.

    Returns:
        Advantages and returns (advantages + values), 0 outside the mask; float32.
    """
    wide = np.float64
    values_BL = values_BL.astype(wide) * mask_BL
    advantages_BL = np.zeros(mask_BL.shape, wide)
    after_B = next_B = np.zeros(len(mask_BL), wide)
    for t in reversed(range(mask_BL.shape[1])):
        delta_B = rewards_BL[:, t] + discount * next_B - values_BL[:, t]
        after_B = (delta_B + discount * trace * after_B) * mask_BL[:, t]
        next_B = values_BL[:, t]
        advantages_BL[:, t] = after_B
    return advantages_BL.astype(np.float32), ((advantages_BL + values_BL) * mask_BL).astype(np.float32)


def whiten(values_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
    """Shift and scale to a mean of 0 and a variance of 1 over the mask; equal values become 0."""
    count = mask_BL.sum()
    if not count:
        return np.zeros_like(values_BL)
    wide_BL = values_BL.astype(np.float64)
    centred_BL = (wide_BL - (wide_BL * mask_BL).sum() / count) * mask_BL
    # 1e-8 beside the variance: noise of rounding, 1e-8 of values of 1, is not blown up.
    return (centred_BL / np.sqrt(np.square(centred_BL).sum() / count + 1e-8)).astype(np.float32)


def masked_mean(values_BL: np.ndarray, mask_BL: np.ndarray) -> float:
    return float((values_BL * mask_BL).sum(dtype=np.float64) / max(mask_BL.sum(), 1))


def explained_variance(values_BL: np.ndarray, returns_BL: np.ndarray, mask_BL: np.ndarray) -> float:
    """1 - var(returns - values) / var(returns); 0 where returns do not vary."""
    values, returns = (array[mask_BL > 0].astype(np.float64) for array in (values_BL, returns_BL))
    spread = returns.var() if returns.size else 0.0
    return float(1 - (returns - values).var() / spread) if spread > 1e-12 else 0.0
