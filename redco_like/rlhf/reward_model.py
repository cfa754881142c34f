"""Reward models, from pairs of completions (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    algorithm = RewardModel()
    params = init_head(model, jax.random.key(0), sft_params)

    loss = -log sigmoid(r(chosen) - r(rejected))

The reward is read at the last token of a completion. Only differences are trained: what is added to all rewards stays
as it was drawn.

Shape letters as in `algorithm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pipelines import LossOutput
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Experience, Pairs, State
from redco_like.rlhf.dpo import one_by_one, pair_metrics, pairs_there
from redco_like.rlhf.heads import sequence_scores
from search.rlhf import GRAPHS, Graph


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Settings of reward modelling.

    Attributes:
        samples, minibatches, epochs: see `Algorithm` (a second epoch overfits, Ouyang et al. 2022).
    """

    samples: int = 1
    minibatches: int = 1
    epochs: int = 1

    def graph(self, *, reward_model: bool = True) -> Graph:
        return GRAPHS["reward_modelling"]()

    def score_fns(self) -> dict[str, Any]:
        return {}

    def loss_fns(self) -> dict[str, Any]:
        return {"train_reward": pairwise_loss}

    def start(self) -> dict[str, float]:
        return {}

    def experience(self, rollout: Pairs, state: State) -> Experience:
        return Experience(rollout.batch(), pair_metrics(rollout), dict(state))


def pairwise_loss(model: Model) -> Any:
    """The mean over pairs of -log sigmoid of the difference."""

    def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
        some_B = pairs_there(batch)
        scores_B2 = sequence_scores(model, params, one_by_one(batch)).reshape(batch["last"].shape)
        margin_B = scores_B2[:, 0] - scores_B2[:, 1]
        pairs = some_B.sum()

        def over(values_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (values_B * some_B).sum(), pairs

        metrics = {
            "accuracy": over((margin_B > 0).astype(jnp.float32)),
            "margin": over(margin_B),
            "reward_chosen": over(scores_B2[:, 0]),
            "reward_rejected": over(scores_B2[:, 1]),
        }
        return LossOutput((-jax.nn.log_sigmoid(margin_B) * some_B).sum(), pairs, metrics)

    return loss_fn
