"""A plan and three functions -> compiled graphs that run."""

from pipelines.functions import LossOutput
from pipelines.infer import PredictProgram, build_predict_program
from pipelines.resolve import resolve_plan
from pipelines.train import TrainProgram, TrainState, build_train_program

__all__ = [
    "LossOutput",
    "PredictProgram",
    "TrainProgram",
    "TrainState",
    "build_predict_program",
    "build_train_program",
    "resolve_plan",
]
