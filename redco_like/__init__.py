"""Train and run any JAX model on any mesh: three functions, no sharding annotations."""

from pipelines import LossOutput
from redco_like.checkpoint import CheckpointError, CheckpointStore
from redco_like.data import DataLoader
from redco_like.deployer import Deployer, DeployError
from redco_like.metrics import MetricsLog, Progress, read_metrics
from redco_like.predictor import Predictor
from redco_like.trainer import FitResult, Trainer
from redco_like.watch import NonFiniteError
from search import Plan
from sharding_rules import MeshShape, PlanError

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "DataLoader",
    "DeployError",
    "Deployer",
    "FitResult",
    "LossOutput",
    "MeshShape",
    "MetricsLog",
    "NonFiniteError",
    "Plan",
    "PlanError",
    "Predictor",
    "Progress",
    "Trainer",
    "read_metrics",
]
