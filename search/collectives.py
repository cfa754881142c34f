"""Seconds of a collective on the links of a cluster (analytic).

    cluster = parse_cluster("16x8xH100")
    collective_seconds(cluster, "all_reduce", 1e9, size=16, stride=8)      # 16 devices, every 8th: one in each node

A group is (size, stride): the devices d, d + stride, ... of a numbering whose innermost links run fastest. All devices
run the collective at the same time, each in its own group, as a mesh axis does; `size` and `stride` may be tuples for
one group over several mesh axes. Bytes, sizes and strides may be numpy arrays; they broadcast.

`bytes_` is the whole buffer V of one device: the operand of an all-reduce, a reduce-scatter, an all-to-all or a
permute, the result of an all-gather.

Every collective is T = a + x + r sqrt(a x): launch and hops a, bytes over bandwidth x, and the filling of the pipeline
of chunks, r = `ramp`. The optimal chunk makes (sqrt(a) + sqrt(x))^2, r = 2 (Sanders, Speck and Traeff 2009, Two-tree
algorithms); NCCL measures near r = 1, TPUs 0. With n members, B the bandwidth of one device, h the seconds of a hop:

  ring         all-gather, reduce-scatter  x = (n-1)/n V/B    a = launch + (n-1) h          Thakur 2005, 4.1 and 4.3
               all-reduce, the two of them x = 2 (n-1)/n V/B  a = launch + 2 (n-1) h        Patarasuk and Yuan 2009
  tree         all-reduce                  x = 2 V/B          a = launch + 2 log2(n) h      double binary trees (NCCL)
  in a switch  all-reduce                  x = V/B_switch     a = launch + 2 h              NVLink SHARP
  all-to-all   on a switch                 x = (n-1)/n V/B    a = launch + (n-1) h          Thakur 2005, 4.2, pairwise
  permute                                  x = V/B            a = launch + h

Across tiers. A unit (node) with k members of the group sends k B_tier into the tier above: groups that share a network
card have a share each, since `Tier.bytes_per_second` is per device. NCCL's ring runs through all tiers at once: x is
the largest over tiers of (n-1)/n V / (k B_tier). On TPUs the collective is hierarchical, inside a slice and then across
on the 1/k shard: the sum over stages of (m-1)/m V / (k B), m members at the stage. An all-to-all sends (n-k)/n of V
out.

On a torus (Jouppi 2023, arXiv:2304.01433; jax-ml.github.io/scaling-book/sharding). A dimension that closes is a ring
that runs both ways, B = 2 links; one that does not is a line, 1 link; several dimensions work at once, B their sum.
Members g apart share each link with g - 1 other groups, B/g. An all-to-all of m along a dimension is bound by its
bisection, x = floor(m/2) ceil(m/2)/m V/B. A permute uses one link. A reduce-scatter over a whole slice is compiled as
an all-reduce, twice the bytes, where the slice has three dimensions or is a square above 2x2 (`compiled_kind`; seen in
the HLO of libtpu 0.0.42 for v4, v5e, v5p and v6e, closed or not; not on chips of two devices). Gathers are gathers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from search.cluster import Cluster

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute"]
Algorithm = Literal["best", "ring", "tree", "hierarchical"]
Floats = npt.NDArray[np.float64]


def collective_seconds(
    cluster: Cluster,
    kind: Kind,
    bytes_: Any,
    size: Any,
    stride: Any = 1,
    *,
    algorithm: Algorithm = "best",
) -> Floats:
    """Return the seconds of a collective (analytic).

    Args:
        cluster: from `search.cluster`.
        kind: what is done.
        bytes_: the whole buffer of one device (see the module); no bytes take no time.
        size: members of each group, or a tuple with one entry per mesh axis of the group.
        stride: distance of neighbours in the device numbering, one entry per entry of `size`.
        algorithm: "best" is what the libraries take: on a torus "hierarchical", else the faster of ring and tree
            (only an all-reduce has a tree). The others fix it.

    Returns:
        float64 array of the arguments' broadcast shape.

    Raises:
        ValueError: an unknown kind or algorithm, a size or stride below 1, a group that reaches past the cluster.

    >>> from search.cluster import parse_cluster
    >>> inside, across = collective_seconds(parse_cluster("2x8xA100"), "all_reduce", 1e9, 2, np.array([1, 8]))
    >>> bool(across > 5 * inside)
    True
    """
    _check_choice(kind, Kind, "kind")
    _check_choice(algorithm, Algorithm, "algorithm")
    group = _group(cluster, size, stride)
    volume = np.asarray(bytes_, np.float64)
    if np.any(volume < 0):
        raise ValueError(f"a collective of {volume.min():g} bytes")
    launch = cluster.accelerator.launch_seconds
    if kind == "permute":
        options = [_permute(group, volume)]
    elif kind == "all_to_all":
        options = [_all_to_all(group, volume)]
    elif algorithm == "hierarchical" or (algorithm == "best" and cluster.torus):
        options = [_hierarchical(group, volume, kind, _scattered_whole(cluster))]
    else:
        options = [_ring(group, volume, kind)] if algorithm != "tree" or kind != "all_reduce" else []
        if kind == "all_reduce" and algorithm != "ring":
            options += [_tree(group, volume, switch=False), _tree(group, volume, switch=True)]
    launch = launch + sum(np.where(reach.active, reach.level.launch, 0.0) for reach in group.reaches)
    seconds = np.minimum.reduce([_total(cluster, launch + hops, wire) for hops, wire in options])
    return np.where((group.size > 1) & (volume > 0), seconds, 0.0)


def compiled_kind(cluster: Cluster, kind: Kind, members: int) -> Kind:
    """Return what XLA makes of a collective over so many neighbours: of some reduce-scatters an all-reduce and a cut.

    >>> from search.cluster import parse_cluster
    >>> [compiled_kind(parse_cluster(name), "reduce_scatter", 16) for name in ("v5e:4x4", "v5e:4x8", "v5p:2x2x4")]
    ['all_reduce', 'reduce_scatter', 'all_reduce']
    """
    whole = members == _scattered_whole(cluster)
    return "all_reduce" if kind == "reduce_scatter" and whole else kind


def _scattered_whole(cluster: Cluster) -> float:
    """Devices of a slice over all of which nothing is reduce-scattered; infinity where it is."""
    torus = cluster.torus
    if torus is None or torus.devices_per_chip > 1:
        return math.inf
    dims = [n for n in torus.dims if n > 1]
    square = len(dims) == 2 and dims[0] == dims[1] > 2
    return math.prod(dims) if len(dims) == 3 or square else math.inf


def lower_bound_seconds(cluster: Cluster, kind: Kind, bytes_: Any, size: Any) -> Floats:
    """Return seconds that no group of this many devices can beat, wherever it lies and however it is ordered.

    A device sends or receives (n-1)/n of V through at most the fastest links it has, after one launch and one hop; an
    all-reduce twice that, or V once where the switch adds up. Grows with the size, so that it bounds larger groups too.

    Raises:
        ValueError: an unknown kind, a size below 1.
    """
    _check_choice(kind, Kind, "kind")
    n = np.asarray(size, np.float64)
    if np.any(n < 1):
        raise ValueError(f"a group of {n.min():g} devices")
    volume = np.asarray(bytes_, np.float64)
    levels = _levels(cluster)
    injection = [level.bandwidth for level in levels if level.ring == ""]
    torus = sum(level.bandwidth * (2 if level.ring == "wrap" else 1) for level in levels if level.ring)
    fastest = max([*injection, torus])
    share = (n - 1) / np.maximum(n, 1)
    if kind == "permute":
        links = [level.bandwidth for level in levels]
        wire = volume / max(links)
    elif kind == "all_reduce":
        wire = 2 * share * volume / fastest
        adders = [level.reduce for level in levels if level.reduce]
        if adders:
            wire = np.minimum(wire, volume / max(adders))
    else:
        wire = share * volume / fastest
    hop = min(level.latency for level in levels)
    seconds = _total(cluster, cluster.accelerator.launch_seconds + hop, wire)
    return np.where((n > 1) & (volume > 0), seconds, 0.0)


def bus_bandwidth(kind: Kind, bytes_: Any, size: Any, seconds: Any) -> Floats:
    """Return the bus bandwidth of NCCL's tests: bytes that cross a link per second, comparable with its peak.

    github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md. Payload as in `collective_seconds`.
    """
    n = np.asarray(size, np.float64)
    factor = {"all_reduce": 2 * (n - 1) / n, "permute": np.ones_like(n)}.get(kind, (n - 1) / n)
    return factor * np.asarray(bytes_, np.float64) / np.asarray(seconds, np.float64)


@dataclasses.dataclass(frozen=True)
class _Level:
    """One level of the device numbering: units of `inner` devices joined in groups of `outer`."""

    inner: int
    outer: int
    bandwidth: float  # bytes per second per device, one direction; of one link on a torus
    latency: float
    mesh: bool = False
    ring: Literal["", "line", "wrap"] = ""
    reduce: float = 0.0
    launch: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Reach:
    """Where a group's members lie at one level; arrays of the broadcast shape."""

    level: _Level
    members: Floats  # units of the level in the group
    inside: Floats  # members of the group in one unit
    gap: Floats  # units from one member to the next
    wraps: npt.NDArray[np.bool_]

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        return self.members > 1

    @property
    def bandwidth(self) -> Floats:
        """Bytes per second per device of a ring along this level."""
        level = self.level
        if level.ring:
            return level.bandwidth * np.where(self.wraps, 2.0, 1.0) / self.gap
        if level.mesh:
            return level.bandwidth * np.maximum(self.members - 1, 1) / max(1, level.outer // level.inner - 1)
        return np.full_like(self.members, level.bandwidth)

    @property
    def pair_bandwidth(self) -> Floats:
        """Bytes per second from one device to one other."""
        level = self.level
        peers = max(1, level.outer // level.inner - 1) if level.mesh else 1
        return level.bandwidth / self.gap / peers

    @property
    def hops(self) -> Floats:
        """Hops of an all-gather along this level."""
        steps = np.where(self.wraps, np.floor(self.members / 2), self.members - 1)
        return steps * self.gap


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A tier, or all dimensions of the torus at once; a hierarchical collective takes them one after another."""

    members: Floats
    inside: Floats
    bandwidth: Floats
    hop_seconds: Floats
    level: _Level


@dataclasses.dataclass(frozen=True)
class _Group:
    size: Floats
    reaches: tuple[_Reach, ...]

    def stages(self) -> list[_Stage]:
        stages = []
        for is_torus in (False, True):
            chosen = [reach for reach in self.reaches if bool(reach.level.ring) == is_torus]
            if not is_torus:
                stages += [
                    _Stage(
                        r.members,
                        r.inside,
                        r.bandwidth,
                        (r.members - 1) * r.level.latency,
                        r.level,
                    )
                    for r in chosen
                ]
            elif chosen:
                idle = np.zeros_like(self.size)
                stages.append(
                    _Stage(
                        np.prod([r.members for r in chosen], axis=0),
                        chosen[0].inside,
                        np.sum([np.where(r.active, r.bandwidth, idle) for r in chosen], axis=0),
                        np.sum([np.where(r.active, r.hops * r.level.latency, idle) for r in chosen], axis=0),
                        chosen[0].level,
                    )
                )
        return sorted(stages, key=lambda stage: stage.level.inner)


def _levels(cluster: Cluster) -> list[_Level]:
    """Innermost first. The devices of a chip share its torus links."""
    levels, inner = [], 1
    tiers = list(cluster.tiers)
    if cluster.torus is None:
        torus = []
    else:
        torus = list(zip(reversed(cluster.torus.dims), reversed(cluster.torus.wrap), strict=True))
    while tiers or torus:
        if cluster.torus and torus and (not tiers or tiers[0].devices > cluster.torus.devices_per_chip):
            if inner < cluster.torus.devices_per_chip:
                raise ValueError(
                    f"cluster {cluster.name!r}: {cluster.torus.devices_per_chip} devices per chip and no tier inside it"
                )
            dim, wrap = torus.pop(0)
            link = cluster.torus.bytes_per_second / cluster.torus.devices_per_chip
            # Two chips have one link between them, closed or not.
            ring = "wrap" if wrap and dim > 2 else "line"
            levels.append(_Level(inner, inner * dim, link, cluster.torus.latency_seconds, ring=ring))
        else:
            tier = tiers.pop(0)
            levels.append(
                _Level(
                    inner,
                    tier.devices,
                    tier.bytes_per_second,
                    tier.latency_seconds,
                    mesh=tier.links == "mesh",
                    reduce=tier.reduce_bytes_per_second,
                    launch=tier.launch_seconds,
                )
            )
        inner = levels[-1].outer
    return levels


def _group(cluster: Cluster, size: Any, stride: Any) -> _Group:
    sizes = size if isinstance(size, tuple) else (size,)
    strides = stride if isinstance(stride, tuple) else (stride,)
    if len(sizes) != len(strides):
        raise ValueError(f"a group over {len(sizes)} axes with {len(strides)} strides; one stride per size")
    pairs = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (*sizes, *strides)))
    ns, ss = pairs[: len(sizes)], pairs[len(sizes) :]
    if any(np.any(x < 1) for x in pairs):
        raise ValueError(f"a group of size {size} and stride {stride}; both are whole numbers from 1 up")
    total = np.prod(ns, axis=0)
    last = sum((n - 1) * s for n, s in zip(ns, ss, strict=True))
    if np.any(last >= cluster.devices):
        raise ValueError(
            f"a group of size {size} and stride {stride} reaches device {int(np.max(last))}; {cluster.name} has "
            f"{cluster.devices}"
        )
    reaches = []
    for level in _levels(cluster):
        members = np.ones_like(total)
        inside = np.ones_like(total)
        span = np.ones_like(total)
        for n, s in zip(ns, ss, strict=True):
            low, high = np.maximum(s, level.inner), np.minimum(n * s, level.outer)
            here = np.where(high > low, np.ceil(high / low - 1e-9), 1.0)
            members = members * here
            inside = inside * np.clip(np.floor(level.inner / s + 1e-9), 1.0, n)
            span = np.maximum(span, np.where(high > low, high / level.inner, 1.0))
        ways = level.outer // level.inner
        members = np.minimum(members, ways)
        gap = np.maximum(1.0, np.floor(span / members + 1e-9)) if level.ring else np.ones_like(total)
        wraps = (span >= ways - 1e-9) & (members > 1) & (level.ring == "wrap")
        reaches.append(_Reach(level, members, inside, gap, wraps))
    return _Group(total, tuple(reaches))


def _ring(group: _Group, volume: Floats, kind: Kind) -> tuple[Floats, Floats]:
    """One ring through all tiers: the slowest link sets the pace of every step."""
    rounds = 2.0 if kind == "all_reduce" else 1.0
    n = group.size
    wire, hop = np.zeros_like(n), np.zeros_like(n)
    for stage in group.stages():
        active = stage.members > 1
        bandwidth = np.where(active, stage.inside * stage.bandwidth, np.inf)
        wire = np.maximum(wire, 1 / bandwidth)
        hop = np.maximum(hop, np.where(active, stage.level.latency, 0.0))
    return rounds * (n - 1) * hop, rounds * (n - 1) / n * volume * wire


def _tree(group: _Group, volume: Floats, *, switch: bool) -> tuple[Floats, Floats]:
    """A double binary tree over units; inside a node that adds up, the switch does the work."""
    hops, wire = np.zeros_like(group.size), np.zeros_like(group.size)
    for stage in group.stages():
        active = stage.members > 1
        adds = switch and stage.level.reduce > 0
        steps = 1.0 if adds else np.ceil(np.log2(np.maximum(stage.members, 1)) - 1e-9)
        hops = hops + np.where(active, 2 * steps * stage.level.latency, 0.0)
        bandwidth = np.where(active, stage.inside * stage.bandwidth, np.inf)
        wire = np.maximum(wire, np.where(active, 1 / stage.level.reduce, 0.0) if adds else 2 / bandwidth)
    return hops, volume * wire


def _hierarchical(group: _Group, volume: Floats, kind: Kind, whole: float) -> tuple[Floats, Floats]:
    """Stage after stage, outwards on the shard that the inner stages leave (all-gather: inwards).

    Args:
        whole: members on the torus over which a reduce-scatter is an all-reduce.
    """
    rounds = 2.0 if kind == "all_reduce" else 1.0
    hops, wire = np.zeros_like(group.size), np.zeros_like(group.size)
    for stage in group.stages():
        active = stage.members > 1
        bandwidth = np.where(active, stage.inside * stage.bandwidth, np.inf)
        passes = np.where((stage.level.ring != "") & (stage.members == whole) & (kind == "reduce_scatter"), 2.0, 1.0)
        wire = wire + passes * (stage.members - 1) / stage.members / bandwidth
        hops = hops + np.where(active, stage.hop_seconds, 0.0)
    return rounds * hops, rounds * volume * wire


def _all_to_all(group: _Group, volume: Floats) -> tuple[Floats, Floats]:
    """Every tier carries what leaves its units, every torus dimension its bisection, all at once."""
    n = group.size
    hops, wire = np.zeros_like(n), np.zeros_like(n)
    for reach in group.reaches:
        if reach.level.ring:
            m = reach.members
            leaving = np.floor(m / 2) * np.ceil(m / 2) / m
            steps = reach.hops
            bandwidth = reach.bandwidth
        else:
            leaving = (n - np.minimum(reach.inside, n)) / n
            steps = reach.members - 1
            bandwidth = reach.bandwidth
        wire = np.maximum(wire, np.where(reach.active, leaving / bandwidth, 0.0))
        hops = hops + np.where(reach.active, steps * reach.level.latency, 0.0)
    return hops, volume * wire


def _permute(group: _Group, volume: Floats) -> tuple[Floats, Floats]:
    """Each device to the next of its group; the slowest neighbours set the time."""
    hops, wire = np.zeros_like(group.size), np.zeros_like(group.size)
    for reach in group.reaches:
        wire = np.maximum(wire, np.where(reach.active, 1 / reach.pair_bandwidth, 0.0))
        hops = np.maximum(hops, np.where(reach.active, reach.gap * reach.level.latency, 0.0))
    return hops, volume * wire


def _total(cluster: Cluster, start: Any, wire: Any) -> Floats:
    return start + wire + cluster.accelerator.ramp * np.sqrt(np.asarray(start * wire, np.float64))


def _check_choice(value: str, choices: Any, what: str) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{what}={value!r}; one of {', '.join(get_args(choices))}")
