"""Supervised fine-tuning: the cross entropy of completions, prompts left out.

    algorithm = SFT()
    examples = Examples.of([(prompt, completion), ...], width=96)

Shape letters as in `algorithm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines import LossOutput
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Examples, Experience, State
from redco_like.rlhf.policy import read_policy
from search.rlhf import GRAPHS, Graph


@dataclasses.dataclass(frozen=True)
class SFT:
    """Settings of supervised fine-tuning.

    Attributes:
        samples, minibatches, epochs: see `Algorithm`.
    """

    samples: int = 1
    minibatches: int = 1
    epochs: int = 1

    def graph(self, *, reward_model: bool = False) -> Graph:
        return GRAPHS["sft"]()

    def score_fns(self) -> dict[str, Any]:
        return {}

    def loss_fns(self) -> dict[str, Any]:
        return {"train_actor": completion_loss}

    def start(self) -> dict[str, float]:
        return {}

    def experience(self, rollout: Examples, state: State) -> Experience:
        lengths_B = rollout.mask_BL.sum(1)
        return Experience(
            rollout.batch(), {"examples": float(len(lengths_B)), "length": float(lengths_B.mean())}, dict(state)
        )


def completion_loss(model: Model) -> Any:
    """The mean over the completions' tokens of -log pi."""

    def loss_fn(params: Any, batch: Mapping[str, Any]) -> LossOutput:
        mask_BL, count = batch["mask"], batch["mask"].sum()
        policy = read_policy(model, params, batch)
        metrics = {"entropy": ((policy.entropy_BL * mask_BL).sum(), count)}
        return LossOutput(policy.balance * count - (policy.logprobs_BL * mask_BL).sum(), count, metrics)

    return loss_fn
