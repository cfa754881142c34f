"""Collectives of a compiled step, by kind and mesh axes, in bytes per device; those in loops as often as they run.

    found = collectives(compiled.as_text(), mesh_shape)
    by_axis(found)                          # {("all_gather", ("fsdp",)): bytes, ...}

As `search.hlo` reads them, but XLA for CPUs has no reduce-scatter: it sums the whole and every device keeps its part.
Both are therefore "sum" here, which has the bytes of either.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from search import hlo
from sharding_rules import MeshShape


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled step.

    Attributes:
        kind: "sum" (all-reduce or reduce-scatter), "all_gather", "all_to_all" or "permute".
        axes: mesh axes of its groups, outermost first; none where every device is alone.
        bytes: of one execution, per device.
        times: executions per step.
        source: the operation of the program that it comes from.
        shapes: of its results, as text.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    source: str
    shapes: str


def collectives(text: str, mesh: MeshShape) -> list[Collective]:
    """The collectives of an HLO module compiled for a mesh of devices 0, 1, 2, ... in the order of its axes.

    Raises:
        ValueError: a loop whose number of iterations the text does not tell.
    """
    module = hlo.parse(text)
    if unknown := module.unknown_loops():
        raise ValueError(f"loops with an unknown number of iterations: {', '.join(loop.name for loop in unknown)}")
    sums = {"all_reduce": "sum", "reduce_scatter": "sum"}
    return [
        Collective(sums.get(c.kind, c.kind), c.axes, c.bytes, c.times, c.op_name, c.shapes)
        for c in hlo.collectives(module, mesh)
    ]


def by_axis(found: Iterable[Collective]) -> Counter[Any]:
    """(kind, mesh axes) -> bytes per device and step."""
    total: Counter[Any] = Counter()
    for c in found:
        total[c.kind, c.axes] += c.bytes * c.times
    return total
