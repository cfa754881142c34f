"""Runs execution plans of RLHF graphs; knows programs and moves, no algorithm."""

from pipelines.rlhf.runner import CallError, HostStep, Outcome, Ran, Runner
from pipelines.rlhf.steps import Done, ScoreStep, Step, TrainStep, window_mesh

__all__ = [
    "CallError",
    "Done",
    "HostStep",
    "Outcome",
    "Ran",
    "Runner",
    "ScoreStep",
    "Step",
    "TrainStep",
    "window_mesh",
]
