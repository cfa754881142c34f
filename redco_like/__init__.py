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
    from redco_like.trainer import FitResult, Trainer
    from redco_like.watch import NonFiniteError
    from search import Plan
    from sharding_rules import Frozen, MeshShape, PlanError, attention, experts

_HOMES = {
    "CheckpointError": "redco_like.checkpoint",
    "CheckpointStore": "redco_like.checkpoint",
    "Completion": "redco_like.engine",
    "DataLoader": "redco_like.data",
    "DeployError": "redco_like.deployer",
    "Deployer": "redco_like.deployer",
    "Engine": "redco_like.engine",
    "Event": "redco_like.engine",
    "FitResult": "redco_like.trainer",
    "Frozen": "sharding_rules",
    "LossOutput": "pipelines",
    "MeshShape": "sharding_rules",
    "MetricsLog": "redco_like.metrics",
    "NonFiniteError": "redco_like.watch",
    "Plan": "search",
    "PlanError": "sharding_rules",
    "Predictor": "redco_like.predictor",
    "Progress": "redco_like.metrics",
    "SamplingParams": "pipelines.generation",
    "Trainer": "redco_like.trainer",
    "attention": "sharding_rules",
    "experts": "sharding_rules",
    "read_metrics": "redco_like.metrics",
}

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "Completion",
    "DataLoader",
    "DeployError",
    "Deployer",
    "Engine",
    "Event",
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
