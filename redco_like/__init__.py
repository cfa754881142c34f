"""Train and run any JAX model on any mesh: three functions, no sharding annotations.

Names are imported when they are first used, so that `redco-like --help` does not wait for JAX and Orbax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines import LossOutput
    from pipelines.generation import SamplingParams
    from redco_like.checkpoint import CheckpointError, CheckpointStore
    from redco_like.data import DataLoader
    from redco_like.deployer import Deployer, DeployError
    from redco_like.engine import Completion, Engine, Event
    from redco_like.metrics import MetricsLog, Progress, read_metrics
    from redco_like.predictor import Predictor
    from redco_like.rlhf.dpo import DPO
    from redco_like.rlhf.grpo import GRPO
    from redco_like.rlhf.ppo import PPO
    from redco_like.rlhf.reward_model import RewardModel
    from redco_like.rlhf.rloo import RLOO
    from redco_like.rlhf.sft import SFT
    from redco_like.rlhf.trainer import RLTrainer
    from redco_like.trainer import FitResult, Trainer
    from redco_like.watch import NonFiniteError
    from search import Plan
    from search.rlhf import ExecutionPlan
    from sharding_rules import Frozen, MeshShape, PlanError, attention, experts

_HOMES = {
    "CheckpointError": "redco_like.checkpoint",
    "CheckpointStore": "redco_like.checkpoint",
    "Completion": "redco_like.engine",
    "DPO": "redco_like.rlhf.dpo",
    "DataLoader": "redco_like.data",
    "DeployError": "redco_like.deployer",
    "Deployer": "redco_like.deployer",
    "Engine": "redco_like.engine",
    "Event": "redco_like.engine",
    "ExecutionPlan": "search.rlhf",
    "FitResult": "redco_like.trainer",
    "Frozen": "sharding_rules",
    "GRPO": "redco_like.rlhf.grpo",
    "LossOutput": "pipelines",
    "MeshShape": "sharding_rules",
    "MetricsLog": "redco_like.metrics",
    "NonFiniteError": "redco_like.watch",
    "PPO": "redco_like.rlhf.ppo",
    "Plan": "search",
    "PlanError": "sharding_rules",
    "Predictor": "redco_like.predictor",
    "Progress": "redco_like.metrics",
    "RLOO": "redco_like.rlhf.rloo",
    "RLTrainer": "redco_like.rlhf.trainer",
    "RewardModel": "redco_like.rlhf.reward_model",
    "SFT": "redco_like.rlhf.sft",
    "SamplingParams": "pipelines.generation",
    "Trainer": "redco_like.trainer",
    "attention": "sharding_rules",
    "experts": "sharding_rules",
    "read_metrics": "redco_like.metrics",
}

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "RLOO",
    "SFT",
    "CheckpointError",
    "CheckpointStore",
    "Completion",
    "DataLoader",
    "DeployError",
    "Deployer",
    "Engine",
    "Event",
    "ExecutionPlan",
    "FitResult",
    "Frozen",
    "LossOutput",
    "MeshShape",
    "MetricsLog",
    "NonFiniteError",
    "Plan",
    "PlanError",
    "Predictor",
    "Progress",
    "RLTrainer",
    "RewardModel",
    "SamplingParams",
    "Trainer",
    "attention",
    "experts",
    "read_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
