"""RLHF: algorithms, each in a file of its own, and the trainer that runs them.

    from redco_like import rlhf as rl
    trainer = rl.RLTrainer(deployer, model, params, algorithm=rl.GRPO(samples=8), collate_fn=encode, reward_fn=correct)

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redco_like.rlhf.algorithm import Algorithm, Examples, Experience, Pairs, Rollout
    from redco_like.rlhf.dpo import DPO
    from redco_like.rlhf.grpo import GRPO
    from redco_like.rlhf.heads import init_head
    from redco_like.rlhf.ppo import PPO
    from redco_like.rlhf.reward_model import RewardModel
    from redco_like.rlhf.rewards import RewardError
    from redco_like.rlhf.rloo import RLOO
    from redco_like.rlhf.sft import SFT
    from redco_like.rlhf.trainer import RLResult, RLTrainer

_HOMES = {
    "DPO": "dpo",
    "GRPO": "grpo",
    "PPO": "ppo",
    "RLOO": "rloo",
    "SFT": "sft",
    "Algorithm": "algorithm",
    "Examples": "algorithm",
    "Experience": "algorithm",
    "Pairs": "algorithm",
    "RLResult": "trainer",
    "RLTrainer": "trainer",
    "RewardError": "rewards",
    "RewardModel": "reward_model",
    "Rollout": "algorithm",
    "init_head": "heads",
}

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "RLOO",
    "SFT",
    "Algorithm",
    "Examples",
    "Experience",
    "Pairs",
    "RLResult",
    "RLTrainer",
    "RewardError",
    "RewardModel",
    "Rollout",
    "init_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"redco_like.rlhf.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
