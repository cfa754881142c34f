"""Execution plans of RLHF graphs: which devices and which plan for every call. No device needed."""

from search.rlhf.execution import Busy, CallPlan, ExecutionPlan, Move
from search.rlhf.graph import GRAPHS, Call, Graph, Workload
from search.rlhf.options import Costs, Option, Window

__all__ = [
    "GRAPHS",
    "Busy",
    "Call",
    "CallPlan",
    "Costs",
    "ExecutionPlan",
    "Graph",
    "Move",
    "Option",
    "Window",
    "Workload",
]
