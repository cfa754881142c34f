"""Which plan is fastest and fits. No device needed."""

from search.accelerators import Accelerator, find_accelerator
from search.cluster import Cluster, parse_cluster
from search.collectives import collective_seconds
from search.costing import Costed, estimate_plan, timeline
from search.estimate import Estimate
from search.mapping import order_axes, order_nodes
from search.memory import StepBytes, activation_bytes, step_bytes
from search.plan import Plan
from search.schedules import Schedule, make_schedule, simulate
from search.sensitivity import Sensitivity, sensitivity
from search.solver import SearchResult, solve
from search.space import Space
from search.stages import cut_layers, cut_pipeline
from search.traced_model import TracedModel

__all__ = [
    "Accelerator",
    "Cluster",
    "Costed",
    "Estimate",
    "Plan",
    "Schedule",
    "SearchResult",
    "Sensitivity",
    "Space",
    "StepBytes",
    "TracedModel",
    "activation_bytes",
    "collective_seconds",
    "cut_layers",
    "cut_pipeline",
    "estimate_plan",
    "find_accelerator",
    "make_schedule",
    "order_axes",
    "order_nodes",
    "parse_cluster",
    "sensitivity",
    "simulate",
    "solve",
    "step_bytes",
    "timeline",
]
