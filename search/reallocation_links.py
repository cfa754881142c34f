"""Bytes that every device and link carries in a move of parameters, their seconds, and a bound below them.

    traffic = Traffic(numbers, cluster)
    traffic.add(axes, group_N, wanted_N, bytes_UV)              # once per way of cutting
    traffic.settle()
    link_seconds(traffic), bound_seconds(traffic)

Letters: N devices of both windows, U old boxes, V new boxes, K nodes, C cells: devices of one node that want the same
new box. The schedule is described in `search.reallocation`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from search.cluster import Cluster, Tier, Torus
from search.reallocation_balance import Holders, balance

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass
class _Cut:
    """One way of cutting: what `Traffic.pairs` needs again."""

    axes: tuple[str, ...]
    group_N: Ints
    cell_N: Ints
    inside_UC: Floats
    across_UC: Floats
    handed_UC: Floats
    passed_UC: Floats
    box_C: Ints
    members_C: Floats


class Traffic:
    """Bytes in and out of each device, inside its node and across nodes.

    Attributes:
        lacking_N: bytes that each device needs and does not hold.
        in_N, out_N: bytes received and sent; network_in_N and network_out_N are the parts that cross nodes.
    """

    def __init__(self, numbers: Ints, cluster: Cluster):
        n = len(numbers)
        self.numbers, self.cluster = numbers, cluster
        nodes, self.node_N = np.unique(numbers // cluster.devices_per_node, return_inverse=True)
        self.nodes = nodes
        self.lacking_N, self.network_in_N = np.zeros(n), np.zeros(n)
        self._passed_on_N, self._network_passed_on_N = np.zeros(n), np.zeros(n)
        self._inside: dict[tuple[str, ...], Holders] = {}
        self._across: dict[tuple[str, ...], Holders] = {}
        self.once: dict[tuple[str, ...], Holders] = {}
        self.enters_K, self.leaves_K = np.zeros(len(nodes)), np.zeros(len(nodes))
        self._cuts: list[_Cut] = []

    def add(self, axes: tuple[str, ...], group_N: Ints, wanted_N: Ints, bytes_UV: Floats) -> None:
        """Add leaves that are cut alike.

        Args:
            axes: that cut the old boxes: together with the source's mesh they say who holds which.
            group_N, wanted_N: the old box that a device holds, the new box that it wants; -1: none.
            bytes_UV: shared by each old and each new box.
        """
        boxes, nodes = len(bytes_UV), len(self.nodes)
        is_source, is_target = group_N >= 0, wanted_N >= 0
        holders_UK = np.bincount(group_N[is_source] * nodes + self.node_N[is_source], minlength=boxes * nodes).reshape(
            boxes, nodes
        )
        cells, cell_T = np.unique(wanted_N[is_target] * nodes + self.node_N[is_target], return_inverse=True)
        box_C, node_C, members_C = cells // nodes, cells % nodes, np.bincount(cell_T).astype(float)
        cell_N = np.full(len(group_N), -1)
        cell_N[is_target] = cell_T
        both = is_source & is_target
        holding_UC = np.bincount(group_N[both] * len(cells) + cell_N[both], minlength=boxes * len(cells)).reshape(
            boxes, len(cells)
        )
        receivers_UC = members_C - holding_UC
        bytes_UC = np.where(receivers_UC > 0, bytes_UV[:, box_C], 0.0)
        senders_UC = holders_UK[:, node_C]
        to_cells = np.zeros((len(cells), nodes))
        to_cells[np.arange(len(cells)), node_C] = 1.0
        to_boxes = np.zeros((len(cells), bytes_UV.shape[1]))
        to_boxes[np.arange(len(cells)), box_C] = 1.0

        # Inside a node: from its holders to each receiver, or once, and handed on.
        local_UC, across_UC = bytes_UC * (senders_UC > 0), bytes_UC * (senders_UC == 0)
        direct_UC = (senders_UC > 0) & (receivers_UC <= senders_UC)
        share_UC = 1.0 / np.maximum(receivers_UC, 1.0)
        handed_UC = np.where(direct_UC, 0.0, bytes_UC * share_UC)
        self._demand(
            self._inside,
            axes,
            np.where(is_source, group_N * nodes + self.node_N, -1),
            ((local_UC * np.where(direct_UC, receivers_UC, 1.0)) @ to_cells).reshape(-1),
        )

        # Between nodes: once into each node, or once in all, and passed from node to node.
        nodes_UC = ((across_UC > 0) @ to_boxes)[:, box_C]
        straight_UC = nodes_UC <= (holders_UK > 0).sum(1)[:, None]
        part_UC = np.where(straight_UC, 1.0, 1.0 / np.maximum(nodes_UC, 1.0))
        passed_UC = across_UC * np.where(straight_UC, 0.0, part_UC)
        self._demand(self._across, axes, group_N, (across_UC * part_UC).sum(1))

        own = lambda per_UC: _of_devices(per_UC, group_N, cell_N)  # noqa: E731
        wanted_UC = bytes_UV[:, box_C]
        self.lacking_N += own(wanted_UC)
        self.network_in_N += own(across_UC / members_C)
        self._passed_on_N += own(handed_UC * (receivers_UC - 1.0))
        self._network_passed_on_N += own(passed_UC * (nodes_UC - 1.0) / members_C)

        needed_UV = (bytes_UC @ to_boxes > 0) * bytes_UV
        self._demand(self.once, axes, group_N, needed_UV.sum(1))
        self.enters_K += across_UC.sum(0) @ to_cells
        lone_U = (holders_UK > 0).sum(1) == 1
        left_U = ((across_UC @ to_boxes > 0) * bytes_UV).sum(1)
        self.leaves_K += (left_U * lone_U) @ (holders_UK > 0)
        inside_UC = np.where(direct_UC, bytes_UC, local_UC * share_UC)
        self._cuts.append(
            _Cut(
                axes,
                group_N,
                cell_N,
                inside_UC,
                across_UC * part_UC / members_C,
                handed_UC,
                passed_UC,
                box_C,
                members_C,
            )
        )

    def settle(self) -> None:
        """Choose who sends what several hold."""
        inside = balance(list(self._inside.values()), self._passed_on_N)
        across = balance(list(self._across.values()), self._network_passed_on_N)
        self._inside_sent = dict(zip(self._inside, inside, strict=True))
        self._across_sent = dict(zip(self._across, across, strict=True))
        self.network_out_N = self._network_passed_on_N + sum(across)
        self.out_N = self._passed_on_N + sum(inside) + self.network_out_N
        self.in_N = self.lacking_N

    @property
    def latency_seconds(self) -> float:
        """Of one message over the slowest links that are used."""
        tiers = self.cluster.tiers
        hops = [tier for tier in tiers if tier.devices > self.cluster.devices_per_node]
        inner = [tier for tier in tiers if tier.devices <= self.cluster.devices_per_node]
        latency = max([tier.latency_seconds for tier in inner], default=0.0)
        if self.cluster.torus:
            latency = max(latency, self.cluster.torus.latency_seconds)
        if self.network_in_N.any():
            latency = max([latency] + [tier.latency_seconds + tier.launch_seconds for tier in hops])
        return latency

    def pairs(self) -> Floats:
        """Bytes from each device (row) to each other one."""
        n = len(self.numbers)
        pairs_NN = np.zeros((n, n))
        for cut in self._cuts:
            at_source, at_target = cut.group_N >= 0, cut.cell_N >= 0
            group_S, cell_T = cut.group_N[at_source], cut.cell_N[at_target]
            group_T = cut.group_N[at_target]
            lacks_ST = group_S[:, None] != group_T[None]
            same_ST = self.node_N[at_source][:, None] == self.node_N[at_target][None]
            inside = self._inside[cut.axes]
            share = _share(self._inside_sent[cut.axes], inside)[at_source]
            flow_ST = share[:, None] * cut.inside_UC[np.ix_(group_S, cell_T)] * (lacks_ST & same_ST)
            share = _share(self._across_sent[cut.axes], self._across[cut.axes])[at_source]
            flow_ST = flow_ST + share[:, None] * cut.across_UC[np.ix_(group_S, cell_T)] * ~same_ST
            pairs_NN[np.ix_(at_source, at_target)] += flow_ST
            # Handed on in a cell: what both lack. Those with no old box have a row of nothing to take away.
            padded = np.vstack([cut.handed_UC, np.zeros(cut.handed_UC.shape[1])])
            own_T = padded[group_T, cell_T]
            both_TT = np.where(group_T[:, None] == group_T[None], own_T[:, None], 0.0)
            common_TT = cut.handed_UC.sum(0)[cell_T][:, None] - own_T[:, None] - own_T[None] + both_TT
            common_TT = np.where(cell_T[:, None] == cell_T[None], common_TT, 0.0)
            np.fill_diagonal(common_TT, 0.0)
            if cut.passed_UC.any():
                other = (cut.box_C[:, None] == cut.box_C[None]) & ~np.eye(len(cut.box_C), dtype=bool)
                both_CC = np.minimum(cut.passed_UC.T[:, None], cut.passed_UC.T[None]).sum(-1) * other
                both_CC /= cut.members_C[:, None] * cut.members_C[None]
                common_TT = common_TT + both_CC[np.ix_(cell_T, cell_T)]
            pairs_NN[np.ix_(at_target, at_target)] += common_TT
        return pairs_NN

    def _demand(
        self, kinds: dict[tuple[str, ...], Holders], axes: tuple[str, ...], group_N: Ints, demand_U: Floats
    ) -> None:
        if axes in kinds:
            kinds[axes].demand_U = kinds[axes].demand_U + demand_U
        else:
            kinds[axes] = Holders(group_N, demand_U)


def _share(sent_N: Floats, holders: Holders) -> Floats:
    """The part of its set's demand that each device sends."""
    demand_N = np.where(holders.group_N >= 0, holders.demand_U[np.maximum(holders.group_N, 0)], 0.0)
    return np.divide(sent_N, demand_N, out=np.zeros_like(sent_N), where=demand_N > 0)


def _of_devices(per_UC: Floats, group_N: Ints, cell_N: Ints) -> Floats:
    """Sum over the boxes that a device does not hold, in its cell; 0 outside all cells."""
    whole = per_UC.sum(0)[cell_N]
    return np.where(cell_N >= 0, whole - np.where(group_N >= 0, per_UC[group_N, cell_N], 0.0), 0.0)


def link_seconds(traffic: Traffic) -> float:
    """Seconds of the slowest link, each as fast as `search.cluster` says, both directions at once (analytic)."""
    cluster = traffic.cluster
    per_node = cluster.devices_per_node
    inner = [tier for tier in cluster.tiers if tier.devices <= per_node]
    outer = [tier for tier in cluster.tiers if tier.devices > per_node]
    detailed = cluster.torus is not None or cluster.node_bytes_per_second is not None or len(inner) > 1
    detailed |= any(tier.links == "mesh" for tier in inner) or len(outer) > 1
    if not detailed:
        inside = np.maximum(traffic.in_N - traffic.network_in_N, traffic.out_N - traffic.network_out_N)
        seconds = inside.max(initial=0.0) / inner[0].bytes_per_second if inner else 0.0
        across = np.maximum(traffic.network_in_N, traffic.network_out_N).max(initial=0.0)
        return float(max(seconds, across / outer[0].bytes_per_second if outer else 0.0))
    pairs_NN = traffic.pairs()
    seconds, within = 0.0, 1
    for tier in cluster.tiers:
        if cluster.torus and within < cluster.torus.devices < tier.devices:
            within = cluster.torus.devices
        seconds = max(seconds, _tier_seconds(traffic.numbers, pairs_NN, tier, within))
        within = tier.devices
    if cluster.torus:
        seconds = max(seconds, _torus_seconds(traffic.numbers, pairs_NN, cluster.torus))
    if cluster.node_bytes_per_second is not None:
        to_nodes = np.eye(len(traffic.nodes))[traffic.node_N]
        between = to_nodes.T @ pairs_NN @ to_nodes
        np.fill_diagonal(between, 0.0)
        rates = np.asarray(cluster.node_bytes_per_second)[np.ix_(traffic.nodes, traffic.nodes)]
        np.fill_diagonal(rates, 1.0)
        seconds = max(seconds, float((between / rates).max()))
    return float(seconds)


def bound_seconds(traffic: Traffic) -> float:
    """No protocol is faster in which only these devices take part and no byte enters a node that has it.

    The largest of: what a device lacks over all its links; what a node lacks over the network cards of its devices;
    what only one node holds, out over its cards; and for sets of devices, what is held only there and wanted
    elsewhere, once, over the links of the set (an average: the set's slowest device needs at least that long).
    """
    inside, network = _device_rates(traffic.cluster)
    crossing_N = (traffic.enters_K > 0)[traffic.node_N]
    bound = float((traffic.lacking_N / (inside + np.where(crossing_N, network, 0.0))).max(initial=0.0))
    if network:
        size_K = np.bincount(traffic.node_N)
        bound = max(bound, float((np.maximum(traffic.enters_K, traffic.leaves_K) / size_K).max()) / network)
    top = traffic.out_N.max(initial=0.0)
    rate = inside + (network if traffic.enters_K.any() else 0.0)
    for share in (1 - 1e-6, 0.75, 0.5, 0.0):
        chosen_N = traffic.out_N >= share * top
        held = 0.0
        for holders in traffic.once.values():
            is_source = holders.group_N >= 0
            elsewhere = np.bincount(
                holders.group_N[is_source], weights=~chosen_N[is_source], minlength=len(holders.demand_U)
            )
            held += float(holders.demand_U[elsewhere == 0].sum())
        bound = max(bound, held / (float(chosen_N.sum()) * rate))
    return bound


def _device_rates(cluster: Cluster) -> tuple[float, float]:
    """Bytes per second that a device can send at most inside its node, and out of it."""
    per_node = cluster.devices_per_node
    inside = sum(tier.bytes_per_second for tier in cluster.tiers if tier.devices <= per_node)
    network = sum(tier.bytes_per_second for tier in cluster.tiers if tier.devices > per_node)
    if cluster.torus:
        links = sum(0 if n == 1 else 1 if n == 2 else 2 for n in cluster.torus.dims)
        inside += links * cluster.torus.bytes_per_second
    if cluster.node_bytes_per_second is not None:
        rates = np.asarray(cluster.node_bytes_per_second)
        np.fill_diagonal(rates, 0.0)
        network = min(network, float(rates.sum(1).max(initial=0.0))) if network else network
    return inside or network, network


def _tier_seconds(numbers: Ints, pairs_NN: Floats, tier: Tier, within: int) -> float:
    """What crosses units of `within` devices and stays in the tier's groups."""
    crosses = numbers[:, None] // within != numbers[None] // within
    carried = pairs_NN * (crosses & (numbers[:, None] // tier.devices == numbers[None] // tier.devices))
    seconds = max(carried.sum(0).max(initial=0.0), carried.sum(1).max(initial=0.0)) / tier.bytes_per_second
    if tier.links == "mesh" and tier.devices > 1:
        seconds = max(seconds, carried.max(initial=0.0) * (tier.devices - 1) / tier.bytes_per_second)
    return float(seconds)


def _torus_seconds(numbers: Ints, pairs_NN: Floats, torus: Torus) -> float:
    """The fullest link when every message goes along one dimension after the other, the shorter way round."""
    chips = numbers // torus.devices_per_chip
    inside = chips[:, None] // torus.chips == chips[None] // torus.chips
    place = np.stack(np.unravel_index(chips % torus.chips, torus.dims))
    slice_N = chips // torus.chips
    worst = 0.0
    for k, n in enumerate(torus.dims):
        if n == 1:
            continue
        # On its way along k a message has the target's coordinates before k and the source's after it.
        line = np.broadcast_to(slice_N[:, None], pairs_NN.shape)
        for d, size in enumerate(torus.dims):
            if d != k:
                line = line * size + (place[d][None] if d < k else place[d][:, None])
        lines, line = np.unique(line, return_inverse=True)
        index = (line.reshape(pairs_NN.shape) * n + place[k][:, None]) * n + place[k][None]
        moved = np.bincount(index.reshape(-1), weights=(pairs_NN * inside).reshape(-1), minlength=len(lines) * n * n)
        worst = max(worst, float((moved.reshape(len(lines), n * n) @ _routes(n, torus.wrap[k])).max(initial=0.0)))
    return worst / torus.bytes_per_second


def _routes(n: int, wrap: bool) -> Floats:
    """(from, to) x (link up from each place, link down): the part of a message that the link carries."""
    routes = np.zeros((n, n, 2, n))
    for a in range(n):
        for b in range(n):
            up, down = (b - a) % n, (a - b) % n
            if not wrap:
                upward = 1.0 if b > a else 0.0
            else:
                upward = 1.0 if up < down else 0.5 if up == down else 0.0
            for step in range(up if upward else 0):
                routes[a, b, 0, (a + step) % n] += upward
            for step in range(down if upward < 1 and a != b else 0):
                routes[a, b, 1, (a - step) % n] += 1 - upward
    return routes.reshape(n * n, 2 * n)
