"""The windows of a cluster: where a call may lie, and which joint placements of several calls are alike.

    grid = Grid.of(parse_cluster("4x8xH100"))
    grid.windows                                               # runs of whole nodes, aligned slices of a node
    root = Arrangements(grid, related=())                      # joint placements, one representative for those alike
    root.child(16)[0].child(8)                                 # 16 devices, then 8: outside of them, or inside

Windows are runs of whole nodes, and slices of one node whose size is a power of two that begin at a multiple of it
(ReaL, Mei et al. 2024, arXiv 2406.14088). On a TPU a node is a slice, so that its windows are aligned runs.

*Symmetry*. Nodes that are joined by one network may be relabelled. Two joint placements are alike where every set of
calls has the same number of devices and of nodes in common, and calls of one role that overlap lie at the same offset
from each other (which shards they share, so what moves between them, depends on it). A class keeps every placement that
is alike, and its children come from all of them: that a window is a *run* is not something relabelling preserves, so
one placement alone would miss some of the ways to go on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping

import numpy as np

from search.cluster import Cluster
from search.rlhf.options import Window


@dataclasses.dataclass(frozen=True)
class Grid:
    """Devices in nodes.

    Attributes:
        nodes, per_node: how many, and devices of one.
        alike: whether nodes may be relabelled: every pair has the same link.
        sizes: of windows, in devices.
    """

    nodes: int
    per_node: int
    alike: bool
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, cluster: Cluster, *, sizes: Collection[int] | None = None) -> Grid:
        """Windows of a cluster.

        Args:
            sizes: that windows may have, in devices; default: all.

        Raises:
            ValueError: a size that no window has.
        """
        nodes, per_node = cluster.nodes, cluster.devices_per_node
        slices = [2**k for k in range(per_node.bit_length()) if 2**k < per_node]
        every = (*slices, *(per_node * k for k in range(1, nodes + 1)))
        for size in sizes or ():
            if size not in every:
                raise ValueError(
                    f"no window of {cluster.name} has {size} devices; there are {', '.join(map(str, every))}"
                )
        uniform = cluster.node_bytes_per_second is None
        # Nodes are alike where no tier lies between the node and the whole cluster.
        between = [t for t in cluster.tiers if per_node < t.devices < cluster.devices]
        kept = tuple(size for size in every if sizes is None or size in sizes)
        return cls(nodes, per_node, uniform and not between, kept)

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    def firsts(self, size: int) -> np.ndarray:
        """First devices of the windows of a size."""
        if size < self.per_node:
            inside = np.arange(0, self.per_node - size + 1, size)
            return (np.arange(self.nodes)[:, None] * self.per_node + inside[None, :]).ravel()
        return np.arange(self.nodes - size // self.per_node + 1) * self.per_node

    @functools.cached_property
    def windows(self) -> tuple[Window, ...]:
        """All of them, the small ones first."""
        return tuple(Window(int(first), size) for size in self.sizes for first in self.firsts(size))

    def relation(self, source: Window, target: Window) -> tuple[Window, Window]:
        """The same pair of windows at the lowest numbers: pairs that are alike give the same.

        Pairs that overlap keep their offset from each other. Of pairs that do not, those within a node are alike, and
        so are those in different nodes.

        >>> Grid(4, 8, True, (8,)).relation(Window(24, 8), Window(8, 8))
        (Window(first=0, devices=8), Window(first=8, devices=8))
        """
        if not self.alike:
            return source, target
        if source.overlaps(target):
            shift = min(source.first, target.first)
            return Window(source.first - shift, source.devices), Window(target.first - shift, target.devices)
        per = self.per_node
        if source.first // per == target.first // per:  # Two slices of one node.
            ahead = -(-source.devices // target.devices) * target.devices
            if ahead + target.devices <= per:
                return Window(0, source.devices), Window(ahead, target.devices)
            behind = -(-target.devices // source.devices) * source.devices
            return Window(behind, source.devices), Window(0, target.devices)
        ahead = -(-source.devices // per) * per
        return Window(0, source.devices), Window(ahead, target.devices)


class Arrangements:
    """A class of joint placements of the first few calls, with the classes that come of one more window.

    Attributes:
        sizes: of the windows so far.
        firsts_CD: first devices: a row per placement that is alike, a column per call.
    """

    def __init__(
        self,
        grid: Grid,
        related: Mapping[int, Collection[int]],
        *,
        allowed: Mapping[int, Collection[Window]] | None = None,
        sizes: tuple[int, ...] = (),
        firsts_CD: np.ndarray | None = None,
    ):
        """Begin with nothing placed.

        Args:
            related: position of a call -> positions of earlier calls from which its offset matters.
            allowed: position of a call -> its windows; default: all.
        """
        self.grid, self.related, self.allowed, self.sizes = grid, related, allowed or {}, sizes
        self.firsts_CD = np.zeros((1, 0), int) if firsts_CD is None else firsts_CD
        self._children: dict[int, tuple[Arrangements, ...]] = {}

    @functools.cached_property
    def windows(self) -> tuple[Window, ...]:
        """Of one placement of the class."""
        return tuple(Window(int(f), s) for f, s in zip(self.firsts_CD[0], self.sizes, strict=True))

    @functools.cached_property
    def overlaps(self) -> tuple[int, ...]:
        """Per call, the calls whose windows share a device with its own, as bits."""
        windows = self.windows
        return tuple(sum(1 << j for j, w in enumerate(windows) if w.overlaps(v)) for v in windows)

    @functools.cached_property
    def covers(self) -> tuple[int, ...]:
        """The sets of calls that have a device in common and to themselves, as bits; 0 where devices are left over."""
        return tuple(self.devices)

    @functools.cached_property
    def devices(self) -> dict[int, int]:
        """Devices of every cover."""
        out: dict[int, int] = {}
        for window, cover in segments(self.windows, self.grid.devices):
            out[cover] = out.get(cover, 0) + window.devices
        return dict(sorted(out.items()))

    def child(self, size: int) -> tuple[Arrangements, ...]:
        """Classes with one more window, of a size."""
        if size not in self._children:
            self._children[size] = self._grow(size)
        return self._children[size]

    def _grow(self, size: int) -> tuple[Arrangements, ...]:
        grid, depth = self.grid, len(self.sizes)
        first_P = grid.firsts(size)
        if depth in self.allowed:
            allowed = {w.first for w in self.allowed[depth] if w.devices == size}
            first_P = np.array([f for f in first_P if int(f) in allowed], int)
        if not len(first_P):
            return ()
        firsts_CD = self.firsts_CD
        columns = self._signature(first_P, size)
        grown = np.concatenate(
            [
                np.repeat(firsts_CD, len(first_P), axis=0),
                np.tile(first_P, len(firsts_CD))[:, None],
            ],
            axis=1,
        )
        if not columns:
            groups = np.zeros(len(grown), int)
        else:
            _, groups = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        order = np.argsort(groups.ravel(), kind="stable")
        cuts = np.flatnonzero(np.diff(groups.ravel()[order])) + 1
        return tuple(
            Arrangements(grid, self.related, allowed=self.allowed, sizes=(*self.sizes, size), firsts_CD=grown[rows])
            for rows in np.split(order, cuts)
        )

    def _signature(self, first_P: np.ndarray, size: int) -> list[np.ndarray]:
        """What tells placements apart: a column per fact, an entry per placement so far and new window."""
        grid, depth = self.grid, len(self.sizes)
        low_CP = np.broadcast_to(first_P[None, :], (len(self.firsts_CD), len(first_P)))
        if not grid.alike:
            return [low_CP.ravel()]
        columns = []
        per = grid.per_node
        for calls in range(1, 1 << depth):
            members = [i for i in range(depth) if calls >> i & 1]
            firsts_CM = self.firsts_CD[:, members]
            begin_C1 = firsts_CM.max(axis=1)[:, None]
            end_C1 = (firsts_CM + np.array([self.sizes[i] for i in members])).min(axis=1)[:, None]
            common_CP = np.minimum(end_C1, low_CP + size) - np.maximum(begin_C1, low_CP)
            columns.append(np.maximum(common_CP, 0).ravel())
            # Nodes in common differ from devices in common where several calls lie in parts of one node.
            lows_C1 = (firsts_CM // per).max(axis=1)[:, None]
            highs = [(self.firsts_CD[:, i] + self.sizes[i] - 1) // per for i in members]
            high_C1 = np.min(highs, axis=0)[:, None]
            nodes_CP = np.minimum(high_C1, (low_CP + size - 1) // per) - np.maximum(lows_C1, low_CP // per) + 1
            columns.append(np.maximum(nodes_CP, 0).ravel())
        for other in self.related.get(depth, ()):
            offset_CP = low_CP - self.firsts_CD[:, other][:, None]
            apart_CP = (offset_CP >= self.sizes[other]) | (offset_CP <= -size)
            columns.append(np.where(apart_CP, grid.devices, offset_CP).ravel())
        return columns


def segments(windows: Collection[Window], devices: int) -> tuple[tuple[Window, int], ...]:
    """Cut the devices where a window begins or ends: (devices, the windows over them as bits), in order.

    >>> segments((Window(0, 4), Window(2, 6)), 8)
    ((Window(first=0, devices=2), 1), (Window(first=2, devices=2), 3), (Window(first=4, devices=4), 2))
    """
    cuts = sorted({0, devices, *(w.first for w in windows), *(w.end for w in windows)})
    out = []
    for first, end in itertools.pairwise(cuts):
        cover = sum(1 << i for i, w in enumerate(windows) if w.first <= first and end <= w.end)
        out.append((Window(first, end - first), cover))
    return tuple(out)
