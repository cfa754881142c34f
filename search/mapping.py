"""Which mesh axis lies on which links, and which node sits next to which.

    best = order_axes(cluster, {"data": 16, "tensor": 8}, [Traffic("all_reduce", 2e9, ("data",)), ...])
    best.order                                             # outermost first: ("data", "tensor")
    device_order(cluster, best, {"data": 16, "tensor": 8}) # device numbers in the mesh's shape

    ring = order_nodes(cluster.node_bytes_per_second, bytes_=1e9)
    ring.order, ring.seconds, ring.gap                     # a measured matrix: exact up to 20 nodes

Axes are few: every order, on every order of a torus's dimensions, is costed. Nodes of a ring are ordered by the exact
dynamic program over subsets (Bellman 1962; Held and Karp 1962), n^2 2^n steps; beyond, by simulated annealing, with a
lower bound from the relaxation of a tour to an assignment, and the gap reported.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from search.cluster import Cluster
from search.collectives import Kind, collective_seconds

Floats = npt.NDArray[np.float64]
Shape = Literal["ring", "line"]
Pace = Literal["slowest", "sum"]
EXACT_NODES = 20


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one step over one or several mesh axes.

    Attributes:
        kind, bytes_: as in `search.collectives.collective_seconds`.
        axes: mesh axes of the group; axes of size 1 are ignored.
        count: how many times per step.
    """

    kind: Kind
    bytes_: float
    axes: tuple[str, ...]
    count: float = 1.0


@dataclasses.dataclass(frozen=True)
class AxisOrder:
    """The best order of mesh axes.

    Attributes:
        order: axes larger than 1, outermost (slowest link) first.
        torus_order: order of the torus's dimensions in the device numbering, () without a torus.
        seconds: of the traffic in this order (analytic).
        candidates: orders that were costed: all there are.
        runners_up: (order, torus order, seconds) of the others, best first, with the same seconds once.
    """

    order: tuple[str, ...]
    torus_order: tuple[int, ...]
    seconds: float
    candidates: int
    runners_up: tuple[tuple[tuple[str, ...], tuple[int, ...], float], ...]


@dataclasses.dataclass(frozen=True)
class NodeOrder:
    """An order of nodes on measured links.

    Attributes:
        order: node numbers, along the ring or line.
        seconds: its cost.
        lower_bound_seconds: no order costs less.
        exact: whether the order is proved the best.
    """

    order: tuple[int, ...]
    seconds: float
    lower_bound_seconds: float
    exact: bool

    @property
    def gap(self) -> float:
        """Relative distance to the bound; 0 for an exact order."""
        return self.seconds / self.lower_bound_seconds - 1 if self.lower_bound_seconds > 0 else 0.0


def order_axes(cluster: Cluster, sizes: Mapping[str, int], traffic: Sequence[Traffic], *, keep: int = 5) -> AxisOrder:
    """Find the order of mesh axes on the cluster's links that makes the traffic fastest.

    Args:
        cluster: its devices are as many as the mesh's.
        sizes: mesh axis -> size.
        traffic: what the axes carry; costs are added up, without overlap.
        keep: how many runners-up are returned.

    Raises:
        ValueError: another number of devices, or traffic on an axis that the mesh lacks.
    """
    axes = [axis for axis, size in sizes.items() if size > 1]
    if math.prod(sizes.values()) != cluster.devices:
        raise ValueError(
            f"a mesh of {math.prod(sizes.values())} devices ({_text(sizes)}) on the {cluster.devices} of {cluster.name}"
        )
    for entry in traffic:
        for axis in entry.axes:
            if axis not in sizes:
                raise ValueError(f"traffic on axis {axis!r}; the mesh has {', '.join(sizes)}")
    dims = len(cluster.torus.dims) if cluster.torus else 0
    found: dict[tuple[tuple[int, ...], tuple[bool, ...]], tuple[int, ...]] = {}
    for perm in itertools.permutations(range(dims)):
        torus = turn_torus(cluster, perm).torus
        found.setdefault((torus.dims, torus.wrap) if torus else ((), ()), perm)
    costed = []
    for perm in found.values():
        turned = turn_torus(cluster, perm)
        known: dict[Any, float] = {}
        for order in itertools.permutations(axes):
            strides = axis_strides(order, sizes)
            seconds = 0.0
            for entry in traffic:
                pairs = tuple((sizes[axis], strides[axis]) for axis in entry.axes if sizes[axis] > 1)
                if not pairs:
                    continue
                key = (entry.kind, entry.bytes_, frozenset(pairs))
                if key not in known:
                    group_sizes, group_strides = zip(*pairs, strict=True)
                    known[key] = float(collective_seconds(turned, entry.kind, entry.bytes_, group_sizes, group_strides))
                seconds += entry.count * known[key]
            costed.append((seconds, perm, order))
    # Among equals, the order of the mesh itself: the mesh is then the plain numbering.
    best = min(costed, key=lambda c: (c[0], c[1], [axes.index(axis) for axis in c[2]]))
    others: dict[float, tuple[tuple[str, ...], tuple[int, ...], float]] = {}
    for seconds, perm, order in sorted(costed, key=lambda c: c[0]):
        if seconds > best[0]:
            others.setdefault(seconds, (order, perm, seconds))
    return AxisOrder(best[2], best[1], best[0], len(costed), tuple(others.values())[:keep])


def axis_strides(order: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the distance of neighbours along each axis, in device numbers, for axes ordered outermost first.

    >>> axis_strides(("data", "tensor"), {"data": 2, "tensor": 4})
    {'tensor': 1, 'data': 4}
    """
    strides, inner = {}, 1
    for axis in reversed(order):
        strides[axis] = inner
        inner *= sizes[axis]
    return strides


def device_order(cluster: Cluster, best: AxisOrder, sizes: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Return device numbers in the mesh's shape (axes as in `sizes`): each axis lies on the links chosen for it.

    Device numbers are the cluster's: the innermost tier, then the last dimension of the torus, runs fastest.
    """
    numbers = np.arange(cluster.devices)
    if cluster.torus:
        torus = cluster.torus
        shape = (-1, *torus.dims, torus.devices_per_chip)
        turned = (0, *(1 + d for d in best.torus_order), len(shape) - 1)
        numbers = numbers.reshape(shape).transpose(turned).reshape(-1)
    by_order = numbers.reshape([sizes[axis] for axis in best.order])
    wanted = [axis for axis in sizes if sizes[axis] > 1]
    return by_order.transpose([best.order.index(axis) for axis in wanted]).reshape(list(sizes.values()))


def turn_torus(cluster: Cluster, order: Sequence[int]) -> Cluster:
    """Return the cluster with its devices numbered along the torus's dimensions in another order."""
    if cluster.torus is None or not order:
        return cluster
    torus = cluster.torus
    dims, wrap = tuple(torus.dims[d] for d in order), tuple(torus.wrap[d] for d in order)
    return dataclasses.replace(cluster, torus=dataclasses.replace(torus, dims=dims, wrap=wrap))


def reorder_nodes(cluster: Cluster, order: Sequence[int]) -> Cluster:
    """Return the cluster with the nodes of its measured matrix in another order."""
    if cluster.node_bytes_per_second is None:
        raise ValueError(f"{cluster.name} has no measured matrix of its nodes")
    if sorted(order) != list(range(len(cluster.node_bytes_per_second))):
        raise ValueError(
            f"{list(order)} is no order of the {len(cluster.node_bytes_per_second)} nodes of {cluster.name}"
        )
    matrix = tuple(tuple(cluster.node_bytes_per_second[i][j] for j in order) for i in order)
    names = tuple(cluster.node_names[i] for i in order) if cluster.node_names else ()
    return dataclasses.replace(cluster, node_bytes_per_second=matrix, node_names=names)


def order_seconds(
    bytes_per_second: Any, order: Sequence[int], *, bytes_: float = 1.0, shape: Shape = "ring", pace: Pace = "slowest"
) -> float:
    """Return what an order of nodes costs: bytes over each link from one node to the next, see `order_nodes`."""
    weights = _weights(bytes_per_second, bytes_)
    if sorted(order) != list(range(len(weights))):
        raise ValueError(f"{list(order)} is no order of {len(weights)} nodes")
    links = [weights[a, b] for a, b in itertools.pairwise([*order, order[0]] if shape == "ring" else order)]
    return float(max(links, default=0.0) if pace == "slowest" else sum(links)) if len(weights) > 1 else 0.0


def order_nodes(
    bytes_per_second: Any,
    *,
    bytes_: float = 1.0,
    shape: Shape = "ring",
    pace: Pace = "slowest",
    exact_nodes: int = EXACT_NODES,
    sweeps: int = 400,
    seed: int = 0,
) -> NodeOrder:
    """Order nodes on measured links, each sending to the next.

    Args:
        bytes_per_second: square matrix, row to column; the diagonal is ignored.
        bytes_: sent over every link; the seconds scale with it.
        shape: "ring" (data parallel rings) closes, "line" (pipeline stages) does not.
        pace: "slowest" is the largest of the links' seconds (steps in which all send), "sum" their sum (one message
            passed along).
        exact_nodes: up to this many nodes the result is exact; memory and time double with each (20: 90 MB, a second).
        sweeps: of annealing beyond, moves per node.
        seed: of annealing.

    Returns:
        The order; relabelling the nodes relabels it and changes nothing else, but for ties.

    Raises:
        ValueError: a matrix that is not square or has a bandwidth that is no number above 0, unknown shape or pace.
    """
    if shape not in get_args(Shape) or pace not in get_args(Pace):
        raise ValueError(f"shape={shape!r}, pace={pace!r}; {get_args(Shape)} and {get_args(Pace)}")
    weights = _weights(bytes_per_second, bytes_)
    n = len(weights)
    if n <= 1:
        return NodeOrder(tuple(range(n)), 0.0, 0.0, True)
    labels = _canonical(weights)
    ordered = weights[np.ix_(labels, labels)]
    if shape == "line":  # a node that costs nothing closes the line
        ordered = np.pad(ordered, (0, 1))
        np.fill_diagonal(ordered, np.inf)
    exact = n <= exact_nodes
    tour = _held_karp(ordered, pace) if exact else _anneal(ordered, pace, sweeps, np.random.default_rng(seed))
    if shape == "line":
        at = tour.index(n)
        tour = tour[at + 1 :] + tour[:at]
    order = tuple(int(labels[i]) for i in tour)
    seconds = order_seconds(bytes_per_second, order, bytes_=bytes_, shape=shape, pace=pace)
    bound = seconds if exact else min(seconds, _tour_bound(ordered, pace))
    return NodeOrder(order, seconds, bound, exact)


def _weights(bytes_per_second: Any, bytes_: float) -> Floats:
    """Seconds of each link; infinite on the diagonal."""
    matrix = np.array(bytes_per_second, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"bandwidths of shape {matrix.shape}; a square matrix, one row and one column per node")
    np.fill_diagonal(matrix, 1.0)
    if not np.all(np.isfinite(matrix) & (matrix > 0)):
        i, j = np.argwhere(~(np.isfinite(matrix) & (matrix > 0)))[0]
        raise ValueError(f"the bandwidth from node {i} to node {j} is {matrix[i, j]}; it is a number above 0")
    weights = bytes_ / matrix
    np.fill_diagonal(weights, np.inf)
    return weights


def _canonical(weights: Floats) -> npt.NDArray[np.int64]:
    """Sort nodes by their links, so that their labels do not matter."""
    signature = np.concatenate([np.sort(weights, axis=1), np.sort(weights.T, axis=1)], axis=1)
    return np.lexsort(signature.T[::-1])


def _held_karp(weights: Floats, pace: Pace) -> list[int]:
    """The best tour, by best[S, j]: the cheapest path from the last node through S that ends in j of S."""
    free, start = len(weights) - 1, len(weights) - 1
    join = np.maximum if pace == "slowest" else np.add
    best = np.full((1 << free, free), np.inf)
    for j in range(free):
        best[1 << j, j] = weights[start, j]
    masks = np.arange(1 << free)
    counts = np.bitwise_count(masks)
    for count in range(1, free):
        layer = masks[counts == count]
        for j in range(free):
            sources = layer[(layer >> j) & 1 == 0]
            best[sources | (1 << j), j] = join(best[sources], weights[:free, j]).min(axis=1)
    ends = join(best[-1], weights[:free, start])
    tour, mask = [int(np.argmin(ends))], (1 << free) - 1
    while mask.bit_count() > 1:
        j = tour[-1]
        mask ^= 1 << j
        tour.append(int(np.argmin(join(best[mask], weights[:free, j]))))
    return [start, *reversed(tour)]


def _anneal(weights: Floats, pace: Pace, sweeps: int, rng: np.random.Generator) -> list[int]:
    """Simulated annealing over reversals, moves of a segment and swaps, from the best nearest-neighbour tour."""
    n = len(weights)
    # A maximum is all plateaus; the sum of a high power leads to it.
    scale = _tour_bound(weights, "slowest")
    powered = np.minimum(weights / scale, 1e6) ** 32 if pace == "slowest" and scale > 0 else weights

    def energy(tour: npt.NDArray[np.int64]) -> float:
        total = float(powered[tour, np.roll(tour, -1)].sum())
        return total ** (1 / 32) if pace == "slowest" else total

    tour = min((_nearest_neighbour(weights, start) for start in range(n)), key=energy)
    now = energy(tour)
    best, best_energy = tour.copy(), now
    finite = weights[np.isfinite(weights) & (weights > 0)] / (scale if pace == "slowest" and scale > 0 else 1.0)
    hot = max(float(finite.std()), 1e-9 * float(finite.mean()))
    steps = sweeps * n
    for temperature in np.geomspace(hot, 1e-4 * hot, steps):
        i, j = sorted(rng.integers(0, n, 2))
        move = rng.integers(3)
        if move == 0:
            tried = np.concatenate([tour[:i], tour[i : j + 1][::-1], tour[j + 1 :]])
        elif move == 1:
            rest = np.concatenate([tour[:i], tour[j + 1 :]])
            at = int(rng.integers(0, len(rest) + 1))
            tried = np.concatenate([rest[:at], tour[i : j + 1], rest[at:]])
        else:
            tried = tour.copy()
            tried[i], tried[j] = tour[j], tour[i]
        then = energy(tried)
        if then <= now or rng.random() < math.exp((now - then) / temperature):
            tour, now = tried, then
            if now < best_energy:
                best, best_energy = tour.copy(), now
    return [int(i) for i in best]


def _nearest_neighbour(weights: Floats, start: int) -> npt.NDArray[np.int64]:
    tour, left = [start], np.ones(len(weights), bool)
    left[start] = False
    while left.any():
        tour.append(int(np.argmin(np.where(left, weights[tour[-1]], np.inf))))
        left[tour[-1]] = False
    return np.array(tour)


def _tour_bound(weights: Floats, pace: Pace) -> float:
    """No tour costs less: every node is left once and entered once, an assignment; and a tour is connected.

    scipy comes with jax.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components, maximum_bipartite_matching

    n = len(weights)
    if pace == "sum":
        finite = np.where(np.isfinite(weights), weights, 2 * weights[np.isfinite(weights)].sum() + 1)
        return float(finite[linear_sum_assignment(finite)].sum())

    def possible(limit: float) -> bool:
        links = csr_matrix(weights <= limit)
        parts, _ = connected_components(links, connection="strong")
        return parts == 1 and bool(np.all(maximum_bipartite_matching(links) >= 0))

    limits = np.unique(weights[np.isfinite(weights)])
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(limits[middle]) else (middle + 1, high)
    return float(limits[low]) if n > 1 else 0.0


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
