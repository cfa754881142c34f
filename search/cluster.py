"""The machines: accelerators, memory and links, read from a short string or a file. No device needed.

    cluster = parse_cluster("16x8xA100-80")        # 16 nodes of 8
    cluster.devices, cluster.accelerator.flops("bfloat16"), cluster.tiers

Links are *tiers* of a hierarchy (devices of a node, nodes of a network), a *torus* between them on TPUs, and optionally
a measured matrix of bandwidths between nodes. Devices are numbered with the innermost tier running fastest.
`search.collectives` turns them into seconds.

What names count. A TPU name counts what Google's accelerator types count (cloud.google.com/tpu/docs/v4, v5p, v5e, v6e,
tpu7x): TensorCores for v4, v5p and tpu7x, two to a chip, so that `v5p-128` is 64 chips; chips for v5e and v6e, so that
`v5e-256` is 256. A shape after a colon counts chips: `v5p:4x4x4`. JAX sees one device per chip, but two on tpu7x.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import re
import tomllib
from typing import Any, get_args

from search.accelerators import (
    Accelerator,
    Links,
    accelerator_from,
    aliases,
    build,
    find_accelerator,
    known_keys,
    not_negative,
    positive,
    whole,
)
from search.efficiency import MAY_BE_ZERO, Efficiency

CLUSTER_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Tier:
    """A level of the hierarchy whose groups of devices are joined by one kind of link.

    Attributes:
        devices: devices in one group of this tier, all inner tiers included.
        bytes_per_second: what a collective attains per device, one direction, through this tier; devices that share a
            network card have a share each.
        latency_seconds: of one hop.
        links: "switch" or "mesh" (an equal share of the bandwidth to each other member).
        reduce_bytes_per_second: all-reduce bytes per second where the switch adds up; 0 where it does not.
        launch_seconds: that a collective through this tier takes to start, besides the accelerator's.
    """

    name: str
    devices: int
    bytes_per_second: float
    latency_seconds: float = 0.0
    links: Links = "switch"
    reduce_bytes_per_second: float = 0.0
    launch_seconds: float = 0.0

    def __post_init__(self):
        whole(self.devices, f"tier {self.name!r}: devices")
        positive(self.bytes_per_second, f"tier {self.name!r}: bytes_per_second")
        not_negative(self.latency_seconds, f"tier {self.name!r}: latency_seconds")
        not_negative(self.reduce_bytes_per_second, f"tier {self.name!r}: reduce_bytes_per_second")
        not_negative(self.launch_seconds, f"tier {self.name!r}: launch_seconds")
        if self.links not in get_args(Links):
            raise ValueError(f"tier {self.name!r}: links={self.links!r}; one of {', '.join(get_args(Links))}")


@dataclasses.dataclass(frozen=True)
class Torus:
    """Chips in a grid, each linked to its neighbours; the last dimension runs fastest in the device numbers.

    Attributes:
        dims: chips along each dimension.
        wrap: whether each dimension closes to a ring.
        bytes_per_second: attained by one link, one direction.
        latency_seconds: of one hop.
        devices_per_chip: devices that share a chip's links.
    """

    dims: tuple[int, ...]
    wrap: tuple[bool, ...]
    bytes_per_second: float
    latency_seconds: float = 0.0
    devices_per_chip: int = 1

    def __post_init__(self):
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "wrap", tuple(bool(w) for w in self.wrap))
        for dim in self.dims:
            whole(dim, "torus: every dimension")
        if len(self.wrap) != len(self.dims) or not self.dims:
            raise ValueError(f"torus: dims {self.dims} need as many entries of wrap, not {self.wrap}")
        positive(self.bytes_per_second, "torus: bytes_per_second")
        not_negative(self.latency_seconds, "torus: latency_seconds")
        whole(self.devices_per_chip, "torus: devices_per_chip")

    @property
    def chips(self) -> int:
        return math.prod(self.dims)

    @property
    def devices(self) -> int:
        return self.chips * self.devices_per_chip


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices and the links between them.

    Attributes:
        name: as it was asked for.
        tiers: innermost first. With a torus, a first tier of `torus.devices_per_chip` devices lies inside it and the
            others outside.
        torus: the links of a TPU slice.
        node_bytes_per_second: measured bandwidth from node (row) to node (column), or None.
        node_names: of the rows.
        efficiency: what its devices attain, where that was measured; None leaves it to the cost model.
    """

    name: str
    accelerator: Accelerator
    tiers: tuple[Tier, ...] = ()
    torus: Torus | None = None
    node_bytes_per_second: tuple[tuple[float, ...], ...] | None = None
    node_names: tuple[str, ...] = ()
    efficiency: Efficiency | None = None
    version: int = CLUSTER_VERSION

    def __post_init__(self):
        object.__setattr__(self, "tiers", tuple(self.tiers))
        object.__setattr__(self, "node_names", tuple(self.node_names))
        if not self.tiers and self.torus is None:
            raise ValueError(f"cluster {self.name!r} has neither tiers nor a torus")
        inner, named = 1, "one device"
        for name, devices in self._units():
            if devices % inner:
                raise ValueError(
                    f"cluster {self.name!r}: {name} has {devices} devices, no multiple of the {inner} of {named}; "
                    f"nearest: {max(1, round(devices / inner)) * inner}"
                )
            inner, named = devices, name
        if self.node_bytes_per_second is not None:
            matrix = tuple(tuple(float(x) for x in row) for row in self.node_bytes_per_second)
            object.__setattr__(self, "node_bytes_per_second", matrix)
            _check_matrix(self, matrix)

    def _units(self) -> list[tuple[str, int]]:
        """Tiers and torus, innermost first: (name, devices in one group)."""
        units = [(f"tier {tier.name!r}", tier.devices) for tier in self.tiers]
        if self.torus:
            inside = sum(tier.devices <= self.torus.devices_per_chip for tier in self.tiers)
            units.insert(inside, ("the torus", self.torus.devices))
        return units

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self._units()[-1][1]

    @property
    def nodes(self) -> int:
        """Number of nodes (GPUs) or slices (TPUs)."""
        return self.devices // self.devices_per_node

    @property
    def devices_per_node(self) -> int:
        """Devices of a node, or of a slice: those inside the slowest links."""
        if self.node_bytes_per_second is not None:
            return self.devices // len(self.node_bytes_per_second)
        units = [devices for _, devices in self._units()]
        if self.torus:
            return self.torus.devices
        return units[-2] if len(units) > 1 else units[-1]

    def to_json(self) -> str:
        """Write every number, so that the file means the same where `accelerators.toml` has changed."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Cluster:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, another version, unknown or missing keys.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the cluster is not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("version") != CLUSTER_VERSION:
            version = record.get("version") if isinstance(record, dict) else None
            raise ValueError(f"the cluster has version {version!r}; this program reads version {CLUSTER_VERSION}")
        record = {
            **record,
            "accelerator": build(Accelerator, record.get("accelerator"), "accelerator"),
            "tiers": tuple(build(Tier, tier, "tier") for tier in record.get("tiers", ())),
            "torus": build(Torus, record["torus"], "torus") if record.get("torus") else None,
            "efficiency": _efficiency(record.get("efficiency"), "efficiency"),
        }
        return build(cls, record, "cluster")


def parse_cluster(text: str | pathlib.Path) -> Cluster:
    """Read a cluster from a short string, or from a TOML or JSON file.

    Strings: `8xH100` (8 devices; more than a node holds are whole nodes), `16x8xA100-80` (16 nodes of 8), `v5p-128`
    (TensorCores or chips, see the module), `v5e:16x16` (chips), `2*v5p:4x4x4` (slices joined by their network cards).

    A TOML file has `accelerator` (a name, or a table with `base` and what differs) and one of: `cluster` (a string as
    above, to start from), `[[tiers]]` (see `Tier`), `[torus]` (see `Torus`). `[nodes]` adds a measured matrix:
    `bytes_per_second` (rows send), `devices_per_node`, and optionally `names`. `[efficiency]` sets constants of
    `search.efficiency.Efficiency`, as `redco_like.profile` measures them; those left out keep their defaults.

    >>> parse_cluster("16x8xA100-80").devices, parse_cluster("v5p-128").torus.dims
    (128, (4, 4, 4))

    Raises:
        ValueError: a typo (the nearest name is given), an impossible size (the nearest one is given), a file that is
            missing or says something unknown.
    """
    name = str(text).strip()
    if name.endswith((".toml", ".json")):
        return _read_file(pathlib.Path(name))
    if not name:
        raise ValueError(
            "the cluster is empty; try 8xH100, 16x8xA100-80, v5p-128, v5e:16x16, 2*v5p:4x4x4 or a TOML file"
        )
    slices, _, rest = name.rpartition("*")
    if slices:
        if not slices.isdigit():
            raise ValueError(f"cluster {name!r}: {slices!r} slices; a whole number comes before '*', as in 2*v5p:4x4x4")
        whole(int(slices), f"cluster {name!r}: the number of slices")
    if match := re.fullmatch(r"([^:*]+):(\d+(?:x\d+)*)", rest):
        dims = tuple(int(d) for d in match[2].split("x"))
        return _slice(name, _tpu(find_accelerator(match[1]), name), dims, int(slices or 1))
    if match := re.fullmatch(r"(\d+)x(?:(\d+)x)?(\D.*)", rest):
        if slices:
            raise ValueError(f"cluster {name!r}: '*' joins TPU slices; nodes are written 2x8x{match[3]}")
        return _nodes(name, find_accelerator(match[3]), *(int(n) for n in match.groups()[:2] if n is not None))
    if rest.lower() not in aliases() and (match := re.fullmatch(r"(.+)-(\d+)", rest)):
        return _named_slice(name, find_accelerator(match[1]), int(match[2]), int(slices or 1))
    accelerator = find_accelerator(rest)
    how = f"{rest}-8 or {rest}:2x2" if accelerator.torus_dims else f"8x{rest}"
    raise ValueError(f"cluster {name!r} names an accelerator and no number of them; try {how}")


def _nodes(name: str, accelerator: Accelerator, first: int, second: int | None = None) -> Cluster:
    if accelerator.torus_dims:
        raise ValueError(
            f"cluster {name!r}: a TPU slice is written {accelerator.name}-{first} or {accelerator.name}:2x2"
        )
    per_node = accelerator.devices_per_node
    whole(first if second is None else first * second, f"cluster {name!r}: the number of devices")
    if second is None:
        if first > per_node and first % per_node:
            low = first // per_node * per_node
            raise ValueError(
                f"cluster {name!r}: {first} devices are no whole number of nodes of {per_node}; "
                f"nearest: {low}x{accelerator.name} or {low + per_node}x{accelerator.name}"
            )
        second = min(first, per_node)
        first = first // second
    if second > per_node:
        raise ValueError(
            f"cluster {name!r}: a node of {accelerator.name} has {per_node} devices, not {second}; "
            f"nearest: {max(1, round(first * second / per_node))}x{per_node}x{accelerator.name}"
        )
    return Cluster(name, accelerator, _gpu_tiers(accelerator, first, second))


def _gpu_tiers(accelerator: Accelerator, nodes: int, per_node: int) -> tuple[Tier, ...]:
    # A partly used node of a full mesh keeps the bandwidth of each pair.
    share = (per_node - 1) / (accelerator.devices_per_node - 1) if accelerator.links == "mesh" and per_node > 1 else 1.0
    tiers = [
        Tier(
            "node",
            per_node,
            accelerator.link_bytes_per_second * accelerator.link_efficiency * share,
            accelerator.link_latency_seconds,
            accelerator.links,
            accelerator.switch_reduce_bytes_per_second,
        )
    ]
    if nodes > 1:
        tiers.append(_network(accelerator, nodes * per_node))
    return tuple(tiers)


def _network(accelerator: Accelerator, devices: int) -> Tier:
    if not accelerator.nic_bytes_per_second:
        raise ValueError(f"accelerator {accelerator.name} has no nic_bytes_per_second to join nodes with")
    bandwidth = accelerator.nic_bytes_per_second * accelerator.nic_efficiency
    return Tier(
        "network",
        devices,
        bandwidth,
        accelerator.nic_latency_seconds,
        launch_seconds=accelerator.nic_launch_seconds,
    )


def _tpu(accelerator: Accelerator, name: str) -> Accelerator:
    if not accelerator.torus_dims:
        raise ValueError(f"cluster {name!r}: {accelerator.name} is no TPU; nodes are written 2x8x{accelerator.name}")
    return accelerator


def _named_slice(name: str, accelerator: Accelerator, number: int, slices: int) -> Cluster:
    if not accelerator.torus_dims:
        raise ValueError(f"cluster {name!r}: nodes of {accelerator.name} are written {number}x{accelerator.name}")
    per_chip = 2 if accelerator.name_counts == "cores" else 1
    shapes = _standard_shapes(accelerator)
    if number not in (sizes := [per_chip * math.prod(dims) for dims in shapes]):
        nearest = min(sizes, key=lambda size: abs(size - number))
        counted = "TensorCores, two a chip" if per_chip == 2 else "chips"
        raise ValueError(
            f"cluster {name!r}: no slice of {accelerator.name} has {number} {counted}; "
            f"nearest: {accelerator.name}-{nearest} ({'x'.join(map(str, shapes[sizes.index(nearest)]))})"
        )
    return _slice(name, accelerator, shapes[sizes.index(number)], slices)


def _standard_shapes(accelerator: Accelerator) -> list[tuple[int, ...]]:
    """The shape of a slice of each size: the most cubic of 4x4x4 cubes, or Google's list for 2D (docs of v5e, v6e)."""
    if len(accelerator.torus_dims) == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    # Half of a smallest host, two devices on tpu7x, is a single chip.
    small = [(1, 1, 1)] if accelerator.devices_per_chip > 1 else []
    small += [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    best: dict[int, tuple[int, ...]] = {}
    ranges = [range(4, limit + 1, 4) for limit in accelerator.torus_dims]
    for dims in itertools.product(*ranges):
        if tuple(sorted(dims)) == dims:
            chips = math.prod(dims)
            if chips not in best or dims[-1] / dims[0] < best[chips][-1] / best[chips][0]:
                best[chips] = dims
    return small + [best[chips] for chips in sorted(best)]


def _slice(name: str, accelerator: Accelerator, dims: tuple[int, ...], slices: int = 1) -> Cluster:
    limits = accelerator.torus_dims
    for dim in dims:
        whole(dim, f"cluster {name!r}: every dimension")
    if len(dims) != len(limits):
        raise ValueError(
            f"cluster {name!r}: a slice of {accelerator.name} has {len(limits)} dimensions, not {len(dims)}; "
            f"nearest: {accelerator.name}:{'x'.join(map(str, _nearest_shape(accelerator, math.prod(dims))))}"
        )
    if any(dim > limit for dim, limit in zip(sorted(dims), limits, strict=True)):
        fitted = _nearest_shape(accelerator, math.prod(dims))
        raise ValueError(
            f"cluster {name!r}: the largest {accelerator.name} is {'x'.join(map(str, limits))} chips; "
            f"nearest: {accelerator.name}:{'x'.join(map(str, fitted))}"
        )
    if accelerator.wrap == "full":
        wrap = tuple(dim == max(limits) for dim in dims)
    else:
        wrap = (all(dim % 4 == 0 for dim in dims),) * len(dims)
    per_chip = accelerator.devices_per_chip
    torus = Torus(
        dims,
        wrap,
        accelerator.link_bytes_per_second * accelerator.link_efficiency,
        accelerator.link_latency_seconds,
        per_chip,
    )
    tiers = []
    if per_chip > 1:
        tiers.append(
            Tier(
                "chip",
                per_chip,
                accelerator.chip_bytes_per_second * accelerator.link_efficiency,
                accelerator.link_latency_seconds,
            )
        )
    if slices > 1:
        tiers.append(_network(accelerator, slices * torus.chips * per_chip))
    return Cluster(name, accelerator, tuple(tiers), torus)


def _nearest_shape(accelerator: Accelerator, chips: int) -> tuple[int, ...]:
    return min(_standard_shapes(accelerator), key=lambda dims: abs(math.prod(dims) - chips))


def _read_file(path: pathlib.Path) -> Cluster:
    if not path.is_file():
        raise ValueError(f"no cluster file at {path}")
    if path.suffix == ".json":
        return Cluster.from_json(path.read_text("utf-8"))
    try:
        record = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"cluster file {path} is not TOML: {error}") from None
    where = f"cluster file {path}"
    known_keys(record, ("name", "cluster", "accelerator", "tiers", "torus", "nodes", "efficiency"), where)
    if sum(key in record for key in ("cluster", "tiers", "torus")) == 0 and "nodes" not in record:
        raise ValueError(f"{where} has no links; give one of cluster, [[tiers]], [torus] or [nodes]")
    start = parse_cluster(record["cluster"]) if "cluster" in record else None
    accelerator = _file_accelerator(record.get("accelerator"), start, where)
    tiers, torus = (start.tiers, start.torus) if start else ((), None)
    if start and "accelerator" in record:  # the links follow what the file changed
        nodes, per_node = start.nodes, start.devices_per_node
        if start.torus:
            again = _slice(start.name, accelerator, start.torus.dims, nodes)
        else:
            again = Cluster(start.name, accelerator, _gpu_tiers(accelerator, nodes, per_node))
        tiers, torus = again.tiers, again.torus
    if "tiers" in record:
        tiers = tuple(build(Tier, tier, f"{where}: tier") for tier in record["tiers"])
    if "torus" in record:
        dims = record["torus"].get("dims", ()) if isinstance(record["torus"], dict) else ()
        torus = build(Torus, {"wrap": [False] * len(dims), **record["torus"]}, f"{where}: torus")
    matrix, names = None, ()
    if "nodes" in record:
        matrix, names, tiers = _file_nodes(record["nodes"], accelerator, tiers, where)
    efficiency = _efficiency(record.get("efficiency"), f"{where}: efficiency")
    return Cluster(record.get("name", path.stem), accelerator, tiers, torus, matrix, names, efficiency)


def _efficiency(entry: Any, where: str) -> Efficiency | None:
    """From a table; `launch_seconds` is a table by kind of accelerator (TOML) or its items (JSON)."""
    if entry is None:
        return None
    launches = entry.get("launch_seconds") if isinstance(entry, dict) else None
    if launches is not None:
        items = launches.items() if isinstance(launches, dict) else launches
        known = dict(Efficiency().launch_seconds)
        known_keys(dict(items), known, f"{where}: launch_seconds")
        entry = {**entry, "launch_seconds": tuple((known | dict(items)).items())}
    made = build(Efficiency, entry, where)
    for field in dataclasses.fields(made):
        if isinstance(field.default, int | float):
            check = positive if field.default and field.name not in MAY_BE_ZERO else not_negative
            check(getattr(made, field.name), f"{where}: {field.name}")
    return made


def _file_accelerator(entry: Any, start: Cluster | None, where: str) -> Accelerator:
    if entry is None:
        if start is None:
            raise ValueError(f"{where} names no accelerator")
        return start.accelerator
    if isinstance(entry, str):
        return find_accelerator(entry)
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: accelerator is {entry!r}; a name, or a table with base = a name")
    entry = dict(entry)
    base = entry.pop("base", start.accelerator.name if start else None)
    name = entry.pop("name", f"{base} as in the file" if base else "custom")
    return accelerator_from(name, entry, find_accelerator(base) if base else None, where)


def _file_nodes(entry: Any, accelerator: Accelerator, tiers: tuple[Tier, ...], where: str):
    """The measured matrix; without tiers, nodes joined at the median of its bandwidths, shared by their devices."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: [nodes] is a table with bytes_per_second and devices_per_node")
    known_keys(entry, ("bytes_per_second", "devices_per_node", "names"), f"{where}: nodes")
    matrix = entry.get("bytes_per_second")
    if not isinstance(matrix, list) or not all(isinstance(row, list) for row in matrix):
        raise ValueError(f"{where}: nodes.bytes_per_second is a list of rows, one per node")
    per_node = entry.get("devices_per_node", accelerator.devices_per_node)
    whole(per_node, f"{where}: nodes.devices_per_node")
    if not tiers:
        tiers = _gpu_tiers(accelerator, 1, per_node)
        between = sorted(x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j)
        if between:
            median = between[len(between) // 2]
            positive(median, f"{where}: nodes.bytes_per_second")
            tiers += (Tier("network", len(matrix) * per_node, median / per_node, accelerator.nic_latency_seconds),)
    return tuple(tuple(row) for row in matrix), tuple(entry.get("names", ())), tiers


def _check_matrix(cluster: Cluster, matrix: tuple[tuple[float, ...], ...]) -> None:
    nodes = len(matrix)
    if not nodes or any(len(row) != nodes for row in matrix):
        raise ValueError(
            f"cluster {cluster.name!r}: the matrix of bandwidths has {nodes} rows of "
            f"{sorted({len(row) for row in matrix})} numbers; it is square, one row and one column per node"
        )
    if cluster.devices % nodes:
        raise ValueError(f"cluster {cluster.name!r}: {cluster.devices} devices on the {nodes} nodes of its matrix")
    if cluster.node_names and len(cluster.node_names) != nodes:
        raise ValueError(f"cluster {cluster.name!r}: {len(cluster.node_names)} names for {nodes} nodes")
    for i, j in itertools.permutations(range(nodes), 2):
        positive(matrix[i][j], f"cluster {cluster.name!r}: bandwidth from node {i} to node {j}")
