"""What it takes to move a tree of arrays between two plans on any devices of a cluster. Pure numpy, no device.

    tree = sharded_tree(abstract_params, layout.specs("params"), layout.mesh_shape, plan.order)
    moved = transfer((0, trained), (8, generating), parse_cluster("2x8xA100-80"))
    moved.sent_bytes, moved.seconds, moved.gap

A plan cuts every array into boxes; a device holds one box of each. What a device must get is the part of its new box
that it does not hold already; how much of it each old box has follows from intersections of intervals, one dimension
at a time. Leaves that are cut alike are one class, and classes that are cut by the same axes share everything that
depends on devices, so that the time does not grow with the number of layers.

The schedule that is costed (`pipelines.reshard` follows it):

- What a device holds is not sent. What a node holds does not enter it: the receivers are served from within.
- A box that several devices hold is sent by them such that the loads are equal (see `search.reallocation_balance`).
- Where r devices want a box that s < r hold, the holders send it once and the receivers hand it on among each other,
  (r-1)/r of it each (van de Geijn's scatter and gather: Thakur 2005, section 4.3). The same between nodes: a box
  enters a node once, spread over the devices that want it, and goes from node to node where fewer nodes hold it.

Every device then receives exactly what it lacks, so that `sent_bytes` is `lower_bound_bytes`, always: no protocol moves
less. How close the seconds are is `gap`, against `search.reallocation_links.bound_seconds`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import PartitionSpec

from search.cluster import Cluster
from search.mapping import axis_strides
from search.reallocation_links import Traffic, bound_seconds, link_seconds
from sharding_rules import MeshShape
from sharding_rules.mesh import AXES

CHUNK_BYTES = 256 * 2**20
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Spec = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a tree and how it is cut.

    Attributes:
        shape: of the whole array.
        itemsize: bytes of an element.
        spec: a PartitionSpec, or for each dimension the mesh axes that cut it, major first.
        path: for messages.
    """

    shape: tuple[int, ...]
    itemsize: int
    spec: Spec
    path: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in tuple(self.spec)]
        if len(entries) > len(self.shape):
            raise ValueError(f"{self.path or 'a leaf'} of shape {self.shape} has a spec of {len(entries)} dimensions")
        object.__setattr__(self, "spec", tuple(entries) + ((),) * (len(self.shape) - len(entries)))
        object.__setattr__(self, "_hash", hash((self.shape, self.itemsize, self.spec)))

    def __hash__(self) -> int:
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class ShardedTree:
    """How a tree lies on a mesh whose devices are numbered from 0.

    Attributes:
        leaves: in the tree's order. Two trees that are moved into each other have the same shapes in the same order.
        mesh: devices per axis.
        order: axes larger than 1, outermost first, as in `Plan.order`; empty: the order of `AXES`.

    Raises:
        ValueError: an unknown mesh axis, one that cuts a leaf twice, or a dimension that its axes do not divide.
    """

    leaves: tuple[Leaf, ...]
    mesh: MeshShape
    order: tuple[str, ...] = ()

    def __post_init__(self):
        sizes = self.mesh.sizes
        used = [axis for axis in AXES if sizes[axis] > 1]
        if self.order and sorted(self.order) != sorted(used):
            raise ValueError(
                f"order={self.order} is not the axes of the mesh {self.mesh} that are larger than 1: {used}"
            )
        object.__setattr__(self, "order", tuple(self.order) or tuple(used))
        known: dict[Leaf, Leaf] = {}
        leaves = tuple(known.get(leaf) or known.setdefault(leaf, _on(leaf, sizes)) for leaf in self.leaves)
        object.__setattr__(self, "leaves", leaves)
        object.__setattr__(self, "_hash", hash((leaves, self.mesh, self.order)))

    def __hash__(self) -> int:
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tree, once."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @functools.cached_property
    def bytes_per_device(self) -> int:
        sizes = self.mesh.sizes
        return sum(n * leaf.nbytes // _ways(leaf, sizes) for leaf, n in Counter(self.leaves).items())


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A move of parameters (analytic).

    Attributes:
        seconds: of the move, with nothing else on the links.
        sent_bytes: over all devices; what stays on its device is not sent.
        lower_bound_bytes: what the devices lack: no protocol sends less.
        kept_bytes: what already lies where it is wanted, over all devices.
        bound_seconds: no protocol on the same devices is faster.
        devices: numbers in the cluster, of both windows.
        in_bytes, out_bytes: of each of `devices`.
        network_in_bytes, network_out_bytes: the parts of them that cross nodes.
        chunks: how often a device starts anew under the byte budget.
        parts: what the seconds are made of: "links", "memory", "start".
    """

    seconds: float
    sent_bytes: float
    lower_bound_bytes: float
    kept_bytes: float
    bound_seconds: float
    devices: tuple[int, ...]
    in_bytes: Floats = dataclasses.field(compare=False)
    out_bytes: Floats = dataclasses.field(compare=False)
    network_in_bytes: Floats = dataclasses.field(compare=False)
    network_out_bytes: Floats = dataclasses.field(compare=False)
    chunks: int = 0
    parts: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def gap(self) -> float:
        """How far the seconds on the links may be above the best, relative to the bound."""
        return self.parts["links"] / self.bound_seconds - 1 if self.bound_seconds > 0 else 0.0


def sharded_tree(
    abstract_params: Any, specs: Any, mesh_shape: MeshShape, order: Sequence[str] = (), dtype: Any = None
) -> ShardedTree:
    """Describe how parameters lie on a mesh.

    Args:
        abstract_params: tree of anything with shape and dtype.
        specs: tree of PartitionSpec, as `layout.specs("params")`.
        mesh_shape, order: of the plan.
        dtype: of all leaves that hold floating point numbers, where the call casts them; None: their own.

    Raises:
        ValueError: the trees do not match; see also `ShardedTree`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract_params)
    flat_specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    if len(flat) != len(flat_specs):
        raise ValueError(f"{len(flat)} parameters, {len(flat_specs)} specs")
    leaves = []
    for (path, leaf), spec in zip(flat, flat_specs, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        floats = dtype is not None and jnp.issubdtype(leaf.dtype, np.floating)
        itemsize = np.dtype(dtype).itemsize if floats else leaf.dtype.itemsize
        leaves.append(Leaf(tuple(leaf.shape), itemsize, spec, name))
    return ShardedTree(tuple(leaves), mesh_shape, tuple(order))


def transfer(
    source: tuple[int, ShardedTree],
    target: tuple[int, ShardedTree],
    cluster: Cluster,
    *,
    chunk_bytes: float = CHUNK_BYTES,
) -> Transfer:
    """Cost the move of a tree from one plan and window to another.

    Args:
        source, target: the window's first device in the cluster's numbering, and how the tree lies from there on.
            Where the two have different element sizes, the smaller one travels.
        cluster: the machines.
        chunk_bytes: what a device receives before it starts anew; only the seconds depend on it.

    Returns:
        Bytes and seconds. Results are cached by the arguments.

    Raises:
        ValueError: the trees do not match, the window is not in the cluster, no chunk bytes.
    """
    if not chunk_bytes > 0:
        raise ValueError(f"chunks of {chunk_bytes} bytes")
    for what, (first, tree) in (("source", source), ("target", target)):
        if first < 0 or first + tree.mesh.size > cluster.devices:
            raise ValueError(
                f"the {what} lies on devices {first} to {first + tree.mesh.size - 1}; {cluster.name} has "
                f"{cluster.devices} devices"
            )
    return _transfer(source, target, cluster, float(chunk_bytes))


@functools.lru_cache(maxsize=4096)
def _transfer(
    source: tuple[int, ShardedTree], target: tuple[int, ShardedTree], cluster: Cluster, chunk_bytes: float
) -> Transfer:
    (first_s, tree_s), (first_t, tree_t) = source, target
    numbers = np.union1d(first_s + np.arange(tree_s.mesh.size), first_t + np.arange(tree_t.mesh.size))
    traffic = Traffic(numbers, cluster)
    copied = np.zeros(len(numbers))
    for (axes_s, axes_t), bytes_UV in _classes(tree_s, tree_t).items():
        group_N = _groups(tree_s, axes_s, first_s, numbers)
        wanted_N = _groups(tree_t, axes_t, first_t, numbers)
        traffic.add(axes_s, group_N, wanted_N, bytes_UV)
        copied += np.where(wanted_N >= 0, bytes_UV.sum(0)[wanted_N], 0.0)
    traffic.settle()
    held = float(copied.sum() - traffic.lacking_N.sum())
    links, bound = link_seconds(traffic), bound_seconds(traffic)
    # A box that stays as it is is not copied; every other one is written, and read where it comes from.
    moved = traffic.lacking_N > 0
    memory = float((copied * moved).max(initial=0.0)) * 2 / cluster.accelerator.memory_bytes_per_second
    chunks = math.ceil(traffic.lacking_N.max(initial=0.0) / chunk_bytes)
    start = chunks * (cluster.accelerator.launch_seconds + traffic.latency_seconds)
    return Transfer(
        seconds=links + memory + start,
        sent_bytes=float(traffic.in_N.sum()),
        lower_bound_bytes=float(traffic.lacking_N.sum()),
        kept_bytes=held,
        bound_seconds=bound,
        devices=tuple(numbers.tolist()),
        in_bytes=traffic.in_N,
        out_bytes=traffic.out_N,
        network_in_bytes=traffic.network_in_N,
        network_out_bytes=traffic.network_out_N,
        chunks=chunks,
        parts={"links": links, "memory": memory, "start": start},
    )


@functools.lru_cache(maxsize=1024)
def _classes(source: ShardedTree, target: ShardedTree) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Floats]:
    """Bytes of old box u in new box v, summed over the leaves that are cut by the same axes."""
    if len(source.leaves) != len(target.leaves):
        raise ValueError(f"the source has {len(source.leaves)} leaves, the target {len(target.leaves)}")
    sums: dict[tuple[tuple[str, ...], tuple[str, ...]], Floats] = {}
    for (a, b), count in Counter(zip(source.leaves, target.leaves, strict=True)).items():
        if a.shape != b.shape:
            raise ValueError(
                f"{a.path or b.path or 'a leaf'} has shape {a.shape} in the source, {b.shape} in the target"
            )
        key, bytes_UV = _overlap(a, b, source.mesh, target.mesh)
        sums[key] = sums[key] + count * bytes_UV if key in sums else count * bytes_UV
    return sums


@functools.lru_cache(maxsize=4096)
def _overlap(
    a: Leaf, b: Leaf, mesh_a: MeshShape, mesh_b: MeshShape
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], Floats]:
    """The axes that cut a leaf, and the bytes that each old box shares with each new one."""
    axes_a, index_a = _boxes(a.spec, mesh_a)
    axes_b, index_b = _boxes(b.spec, mesh_b)
    sizes_a, sizes_b = mesh_a.sizes, mesh_b.sizes
    bytes_UV = np.full((_product(axes_a, sizes_a), _product(axes_b, sizes_b)), float(min(a.itemsize, b.itemsize)))
    for dim, length in enumerate(a.shape):
        ways_a, ways_b = _product(a.spec[dim], sizes_a), _product(b.spec[dim], sizes_b)
        u, v = np.arange(ways_a)[:, None], np.arange(ways_b)[None]
        side_a, side_b = length // ways_a, length // ways_b
        common = np.minimum((u + 1) * side_a, (v + 1) * side_b) - np.maximum(u * side_a, v * side_b)
        bytes_UV *= np.maximum(common, 0)[np.ix_(index_a[dim], index_b[dim])]
    return (axes_a, axes_b), bytes_UV


@functools.lru_cache(maxsize=1024)
def _boxes(spec: Spec, mesh: MeshShape) -> tuple[tuple[str, ...], tuple[Ints, ...]]:
    """The axes of a spec in the order of `AXES`, and for each dimension the interval of each of their coordinates."""
    sizes = mesh.sizes
    axes = tuple(axis for axis in AXES if any(axis in dim for dim in spec))
    boxes = _product(axes, sizes)
    coordinates = np.indices([sizes[axis] for axis in axes]).reshape(len(axes), boxes) if axes else None
    index = []
    for dim in spec:
        at = np.zeros(boxes, np.int64)
        for axis in dim:
            at = at * sizes[axis] + coordinates[axes.index(axis)]  # pyright: ignore[reportOptionalSubscript]
        index.append(at)
    return axes, tuple(index)


def _groups(tree: ShardedTree, axes: tuple[str, ...], first: int, numbers: Ints) -> Ints:
    """Which box each device holds of what is cut by these axes; -1 outside the window."""
    own = _own_groups(tree.mesh, tree.order, axes)
    at = numbers - first
    inside = (at >= 0) & (at < len(own))
    return np.where(inside, own[np.clip(at, 0, len(own) - 1)], -1)


@functools.lru_cache(maxsize=1024)
def _own_groups(mesh: MeshShape, order: tuple[str, ...], axes: tuple[str, ...]) -> Ints:
    sizes, strides = mesh.sizes, axis_strides(order, mesh.sizes)
    group = np.zeros(mesh.size, np.int64)
    for axis in axes:
        group = group * sizes[axis] + np.arange(mesh.size) // strides[axis] % sizes[axis]
    return group


def _on(leaf: Leaf, sizes: dict[str, int]) -> Leaf:
    """The leaf without axes of size 1, checked."""
    seen: set[str] = set()
    for dim, axes in enumerate(leaf.spec):
        for axis in axes:
            if axis not in sizes:
                raise ValueError(f"{leaf.path or 'a leaf'}: no mesh axis {axis!r}; axes: {', '.join(AXES)}")
            if axis in seen:
                raise ValueError(f"{leaf.path or 'a leaf'}: mesh axis {axis!r} cuts it twice in {leaf.spec}")
            seen.add(axis)
        if leaf.shape[dim] % _product(axes, sizes):
            raise ValueError(
                f"{leaf.path or 'a leaf'} of shape {leaf.shape}: dimension {dim} is not divided by the "
                f"{_product(axes, sizes)} devices of {axes}"
            )
    spec = tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in leaf.spec)
    return leaf if spec == leaf.spec else dataclasses.replace(leaf, spec=spec)


def _ways(leaf: Leaf, sizes: dict[str, int]) -> int:
    return math.prod(_product(axes, sizes) for axes in leaf.spec)


def _product(axes: Sequence[str], sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
