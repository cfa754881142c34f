"""DPO: from pairs of completions, without rewards (Rafailov et al. 2023, arXiv 2305.18290).

    algorithm = DPO(beta=0.1)
    pairs = Pairs.of([(prompt, chosen, rejected), ...], width=96)
    pairs = pairs.scored("reference_logprobs", scores_B2)          # of the call "reference"

    loss = -log sigmoid(beta ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r))))             (eq. 7)

Shape letters as in `algorithm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipelines import LossOutput
from redco_like.models.layers import label_loss
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Experience, Pairs, State, check_numbers
from redco_like.rlhf.policy import read_policy
from search.rlhf import GRAPHS, Graph


@dataclasses.dataclass(frozen=True)
class DPO:
    """Settings of DPO.

    Attributes:
        beta: how much log-probability a preference is worth (0.1, Rafailov et al. 2023).
        samples, minibatches, epochs: see `Algorithm`; pairs are given, so samples is 1.

    Raises:
        ValueError: a number out of its range.
    """

    beta: float = 0.1
    samples: int = 1
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self):
        check_numbers(self, above_0=("beta",))

    def graph(self, *, reward_model: bool = False) -> Graph:
        return GRAPHS["dpo"]()

    def score_fns(self) -> dict[str, Any]:
        return {"reference": score_pairs}

    def loss_fns(self) -> dict[str, Any]:
        return {"train_actor": self.actor_loss}

    def start(self) -> dict[str, float]:
        return {}

    def experience(self, rollout: Pairs, state: State) -> Experience:
        known = rollout.need("reference_logprobs")
        return Experience({**rollout.batch(), **known}, pair_metrics(rollout), dict(state))

    def actor_loss(self, model: Model) -> Any:
        """The mean over pairs."""

        def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
            flat, some_B = one_by_one(batch), pairs_there(batch)
            policy = read_policy(model, params, flat)
            logprobs_B2 = (policy.logprobs_BL * flat["mask"]).sum(1).reshape(batch["last"].shape)
            rewards_B2 = self.beta * (logprobs_B2 - batch["reference_logprobs"])
            margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
            pairs = some_B.sum()

            def over(values_B: jax.Array) -> tuple[jax.Array, jax.Array]:
                return (values_B * some_B).sum(), pairs

            metrics = {
                "reward_chosen": over(rewards_B2[:, 0]),
                "reward_rejected": over(rewards_B2[:, 1]),
                "margin": over(margin_B),
                "accuracy": over((margin_B > 0).astype(jnp.float32)),
                "entropy": ((policy.entropy_BL * flat["mask"]).sum(), flat["mask"].sum()),
            }
            total = (-jax.nn.log_sigmoid(margin_B) * some_B).sum() + policy.balance * pairs
            return LossOutput(total, pairs, metrics)

        return loss_fn


def score_pairs(model: Model) -> Callable[..., jax.Array]:
    """Log-probability of both completions of each pair (B, 2): what the reference does."""

    def pred_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
        flat = one_by_one(batch)
        logits_BLV, _ = model.forward(params, flat["tokens"])
        logprobs_BL = -label_loss(logits_BLV, flat["labels"]) * flat["mask"]
        return logprobs_BL.sum(1).reshape(batch["last"].shape)

    return pred_fn


def one_by_one(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The sequences of pairs (B, 2, ...) as twice as many rows (2B, ...)."""
    names = ("tokens", "labels", "mask", "last")
    return {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names}


def pairs_there(batch: Mapping[str, Any]) -> jax.Array:
    """1 for each pair (B,), 0 for rows that only fill a batch up."""
    return jnp.minimum(batch["mask"].sum((1, 2)), 1.0)


def pair_metrics(pairs: Pairs) -> dict[str, float]:
    """How many, and how long the completions are."""
    lengths_B2 = pairs.mask_B2L.sum(-1)
    return {
        "pairs": float(len(lengths_B2)),
        "length_chosen": float(np.mean(lengths_B2[:, 0])),
        "length_rejected": float(np.mean(lengths_B2[:, 1])),
    }
