"""Where HybridFlow's roles go, by the planner's own constants (Sheng et al. 2024, arXiv 2409.19256, section 8).

    periods(7, 64)                                             # placement -> seconds per iteration
    by_tensor(13, 16, offload=False)                           # tensor size of generation -> seconds

PPO of four models of one size: 1024 prompts of 1024 tokens, 1024 new tokens each, one epoch of 8 minibatches; nodes of
8 A100-80 with NVLink, 200 Gb/s between nodes; an iteration begins when the one before has ended. Nothing is fitted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from redco_like.rlhf_problem import call_costs
from search import Cluster, parse_cluster
from search.efficiency import Efficiency
from search.rlhf.costs import CallCosts, Constraint
from search.rlhf.graph import GRAPHS, Workload
from search.rlhf.plans import heuristics

WORKLOAD = Workload(1024, 1024, 1024, minibatches=8)
GRAPH = GRAPHS["ppo"]()
PLACEMENTS = ("colocated", "split", "standalone")
PER_NODE = 8
NODE_BYTES_PER_SECOND = 25e9
"""200 Gb/s, shared by the devices of a node."""
TRAINS = {"tensor": 8, "data": 2, "fsdp": 1}
"""How HybridFlow trains on 16 devices where it compares tensor sizes of generation (its figure 15)."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A colocated plan with one tensor size of generation.

    Attributes:
        period_seconds: of an iteration; inf where it does not fit.
        seconds: of generation, and of bringing the parameters for it.
        rows: sequences that are generated at a time.
    """

    period_seconds: float
    seconds: float
    rows: int


def cluster(gpus: int) -> Cluster:
    """HybridFlow's nodes."""
    found = parse_cluster(f"{gpus}xA100-80")
    efficiency = found.accelerator.nic_efficiency
    each = NODE_BYTES_PER_SECOND / PER_NODE * efficiency
    tiers = [
        dataclasses.replace(tier, bytes_per_second=each) if tier.devices > PER_NODE else tier for tier in found.tiers
    ]
    return dataclasses.replace(found, tiers=tuple(tiers))


def costs(
    billions: int,
    gpus: int,
    *,
    constraints: Mapping[str, Constraint] | None = None,
    network: float = 0.0,
    stages: bool = False,
) -> CallCosts:
    """What the calls cost.

    Args:
        billions: 7 or 13.
        stages: whether there may be pipelines, as Megatron has them.
        network: share of the bandwidth between nodes that collectives attain; default the planner's.
    """
    where = cluster(gpus)
    efficiency = None
    if network:
        efficiency = dataclasses.replace(Efficiency.for_accelerator(where.accelerator), network=network)
    models = dict.fromkeys(GRAPH.roles, f"llama-2-{billions}b")
    return call_costs(
        models, GRAPH, WORKLOAD, where, constraints=constraints, efficiency=efficiency, allow_planned=stages
    )


def periods(billions: int, gpus: int, *, network: float = 0.0) -> dict[str, float]:
    """Seconds per iteration of every placement that people use; inf where one does not fit or cannot be."""
    found = costs(billions, gpus, network=network, stages=True)
    plans = heuristics(GRAPH, WORKLOAD, found.cluster, found, synchronous=True)
    names = dict.fromkeys((*PLACEMENTS, *plans))
    fits = {name for name, plan in plans.items() if not plan.reason}
    return {name: plans[name].period_seconds if name in fits else math.inf for name in names}


def by_tensor(billions: int, gpus: int, *, offload: bool) -> dict[int, Generation]:
    """Colocated plans that differ in the tensor size of generation; training and scoring are as HybridFlow has them.

    Args:
        offload: whether roles may lie in the host's memory between their calls.
    """
    out = {}
    for tensor in (1, 2, 4, 8):
        constraints = {
            "generate": Constraint({"tensor": tensor}),
            "train": Constraint(TRAINS),
            "score": Constraint(TRAINS),
        }
        found = costs(billions, gpus, constraints=constraints)
        plan = heuristics(GRAPH, WORKLOAD, found.cluster, found, offload=offload, synchronous=True).get("colocated")
        if plan is None:
            out[tensor] = Generation(math.inf, math.inf, 0)
            continue
        call = plan.call("generate")
        moves = sum(move.seconds for move in plan.moves if move.target == call.call)
        fits = not plan.reason
        out[tensor] = Generation(
            plan.period_seconds if fits else math.inf, call.seconds + moves if fits else math.inf, call.rows
        )
    return out
