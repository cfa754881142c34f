"""A part of a cluster as a cluster of its own: the devices of a window, with the links between them.

    part_of(parse_cluster("16x8xA100-80"), 4)                  # half a node
    part_of(parse_cluster("16x8xA100-80"), 32)                 # four nodes

A part is a run of devices in the cluster's order: some devices of one node or slice, or some whole ones. Where links
differ from one such run to the next, it has those of the slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from search.cluster import Cluster, Tier, Torus


@functools.lru_cache(maxsize=256)
def part_of(cluster: Cluster, devices: int) -> Cluster:
    """The links of so many neighbouring devices.

    Raises:
        ValueError: a number that no run of devices fills evenly; names the nearest that one does.

    >>> from search import parse_cluster
    >>> [part_of(parse_cluster("4x8xA100-80"), n).nodes for n in (2, 8, 16)]
    [1, 1, 2]
    >>> part_of(parse_cluster("v5p:4x4x4"), 8).torus.dims
    (1, 2, 4)
    """
    if devices == cluster.devices:
        return cluster
    if not _fits(cluster, devices):
        sizes = [n for n in range(1, cluster.devices + 1) if _fits(cluster, n)]
        nearest = min(sizes, key=lambda n: (abs(n - devices), n))
        raise ValueError(
            f"{devices} devices are no part of {cluster.name}, {cluster.devices} devices; nearest: {nearest}"
        )
    per_chip = 1 if cluster.torus is None else cluster.torus.devices_per_chip
    tiers: list[Tier] = []
    for tier in cluster.tiers:
        outside = cluster.torus is not None and tier.devices > per_chip
        inside = cluster.torus.devices if cluster.torus is not None and outside else tiers[-1].devices if tiers else 1
        if devices > inside or (not tiers and not outside):
            tiers.append(dataclasses.replace(tier, devices=min(tier.devices, devices)))
    torus = None if cluster.torus is None else _block(cluster.torus, min(devices, cluster.torus.devices))
    matrix, names = cluster.node_bytes_per_second, cluster.node_names
    if matrix is not None:
        nodes, per_node = devices // cluster.devices_per_node, cluster.devices_per_node
        first = _slowest(matrix, nodes) if devices >= per_node else 0
        here = range(first, first + nodes)
        matrix = tuple(tuple(matrix[i][j] for j in here) for i in here) if nodes > 1 else None
        names = tuple(names[i] for i in here) if nodes > 1 and names else ()
    return dataclasses.replace(
        cluster,
        name=f"{devices} of {cluster.name}",
        tiers=tuple(tiers),
        torus=torus,
        node_bytes_per_second=matrix,
        node_names=names,
    )


def _fits(cluster: Cluster, devices: int) -> bool:
    if not 1 <= devices <= cluster.devices:
        return False
    sizes = [tier.devices for tier in cluster.tiers]
    if cluster.torus is not None:
        per_chip, dims = cluster.torus.devices_per_chip, cluster.torus.dims
        sizes += [per_chip * math.prod(dims[i:]) for i in range(len(dims))]
    inner = 1
    for size in sorted({*sizes, cluster.devices_per_node}):
        if devices <= size:
            break
        inner = size
    return devices % inner == 0


def _block(torus: Torus, devices: int) -> Torus:
    """The first chips of a torus; what is not whole does not close to a ring."""
    left, dims = devices // torus.devices_per_chip, []
    for dim in reversed(torus.dims):
        dims.append(min(dim, max(left, 1)))
        left //= dims[-1]
    dims.reverse()
    wrap = tuple(w and n == whole for w, n, whole in zip(torus.wrap, dims, torus.dims, strict=True))
    # Of a chip of several devices, one alone still is a chip: what is inside it is a tier.
    return dataclasses.replace(
        torus, dims=tuple(dims), wrap=wrap, devices_per_chip=min(torus.devices_per_chip, devices)
    )


def _slowest(matrix: tuple[tuple[float, ...], ...], nodes: int) -> int:
    """Where the run of nodes begins whose slowest link is the slowest of all."""

    def worst(first: int) -> float:
        here = range(first, first + nodes)
        return min((matrix[i][j] for i in here for j in here if i != j), default=math.inf)

    return min(range(len(matrix) - nodes + 1), key=worst)
