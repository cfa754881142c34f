"""What an error of the model's constants does to the choice of a plan: every constant is turned down and up.

for row in sensitivity(model, [result.best.plan, *(r.plan for r in result.runners_up)]):
    row.constant, row.factor, row.seconds, row.winner
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from search.cluster import Cluster
from search.costing import estimate_plan
from search.efficiency import Efficiency
from search.plan import Plan
from search.traced_model import TracedModel

SHARES = {"matrix products": "matmul", "attention": "attention", "memory bandwidth": "bandwidth"}
"""Constants of `Efficiency` by the name that people know."""
LINKS = ("links in a node", "network between nodes")


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Plans with one constant changed.

    Attributes:
        constant: which.
        factor: what its rate was multiplied with.
        seconds: per step of every plan.
        winner: index of the fastest plan.
    """

    constant: str
    factor: float
    seconds: tuple[float, ...]
    winner: int


def sensitivity(model: TracedModel, plans: Sequence[Plan], *, change: float | None = None) -> list[Sensitivity]:
    """Estimate plans again with every constant turned down and up.

    Args:
        model: what was planned.
        plans: legal ones, the best first.
        change: relative; default the spread of the cost model's constants.

    Returns:
        Two rows per constant that matters on this cluster.
    """
    change = model.costs.efficiency.spread if change is None else change
    out = []
    for constant in (*SHARES, *(LINKS if model.costs.cluster.nodes > 1 else LINKS[:1])):
        for factor in (1 / (1 + change), 1 + change):
            turned = model.on(*_turned(model.costs.cluster, model.costs.efficiency, constant, factor))
            seconds = tuple(estimate_plan(turned, plan).seconds_per_step for plan in plans)
            out.append(Sensitivity(constant, factor, seconds, min(range(len(plans)), key=lambda i: seconds[i])))
    return out


def _turned(cluster: Cluster, efficiency: Efficiency, constant: str, factor: float) -> tuple[Cluster, Efficiency]:
    if constant in SHARES:
        name = SHARES[constant]
        return cluster, dataclasses.replace(efficiency, **{name: getattr(efficiency, name) * factor})
    inside = constant == LINKS[0]
    tiers = tuple(
        dataclasses.replace(
            tier,
            bytes_per_second=tier.bytes_per_second * factor,
            reduce_bytes_per_second=tier.reduce_bytes_per_second * factor,
        )
        if (tier.devices <= cluster.devices_per_node) == inside
        else tier
        for tier in cluster.tiers
    )
    torus, matrix = cluster.torus, cluster.node_bytes_per_second
    if torus and inside:
        torus = dataclasses.replace(torus, bytes_per_second=torus.bytes_per_second * factor)
    if matrix and not inside:
        matrix = tuple(tuple(x * factor for x in row) for row in matrix)
    return dataclasses.replace(cluster, tiers=tiers, torus=torus, node_bytes_per_second=matrix), efficiency
