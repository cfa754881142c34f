"""Execution plans of RLHF graphs: which devices and which plan for every call. No device needed."""

from search.rlhf.execution import Busy, CallPlan, ExecutionPlan, Move
from search.rlhf.graph import GRAPHS, Call, Graph, Workload
from search.rlhf.options import Costs, Option, Window
from search.rlhf.plans import Found, heuristics, solve
from search.rlhf.simulator import Simulated, simulate

__all__ = [
    "GRAPHS",
    "Busy",
    "Call",
    "CallPlan",
    "Costs",
    "ExecutionPlan",
    "Found",
    "Graph",
    "Move",
    "Option",
    "Simulated",
    "Window",
    "Workload",
    "heuristics",
    "simulate",
    "solve",
]
