"""Which plan is fastest and fits. No device needed."""

from search.auto import auto_plan
from search.memory import StepBytes, activation_bytes, step_bytes
from search.plan import Plan

__all__ = ["Plan", "StepBytes", "activation_bytes", "auto_plan", "step_bytes"]
