"""Moves a tree of arrays to other shardings, on any devices: the same, some of them, others, of several processes.

    moved = reshard(params, target_shardings, budget_bytes=256 * 2**20, donate=True)

    move = Reshard(abstract_params, source_shardings, target_shardings)      # keep it: the schedule is made once
    move.predicted.sent_bytes, move.predicted.seconds
    params = move.run(params)

Beside the old tree and the new one no more than `budget_bytes` are in use; with `donate` the old one is freed leaf by
leaf. What moves is what a device lacks and nothing else, from holders that share the work (`pipelines.reshard_pieces`).
Before anything moves the tree is compared with what was declared; afterwards every new shard is compared with the
checksums of the pieces that it was made of.

How (`method`), by measurement (benchmarks/reshard.py; docs/rlhf/moves.md):

- "host": CPU devices. Shards are copied once, from memory to memory, by a few threads.
- "compiled": other devices, the same ones before and after: one compiled identity per group of leaves, so that XLA's
  collectives move the bytes, between processes too.
- "device": everything else. Slices go from device to device; between processes they pass through host memory.

Between processes "host" and "device" use connections of their own (`pipelines.reshard_links`): every process calls the
move with the same arguments, and a process that dies or stands still is an error with a name. A move whose bytes all
stay within processes needs no other process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from pipelines.devices import cluster_of, memory_bytes_per_device
from pipelines.reshard_checksums import part_checksum
from pipelines.reshard_copies import LeafCopies, host_copies
from pipelines.reshard_host import HostTree, from_host, to_host
from pipelines.reshard_links import ReshardError
from pipelines.reshard_moving import BUDGET_BYTES, DEADLINE_SECONDS, free, move_pieces
from pipelines.reshard_pieces import LeafMove, Schedule, make_schedule, shardings_of
from pipelines.reshard_stores import DeviceStore, HostStore
from search.cluster import Cluster
from sharding_rules.mesh import in_order

__all__ = ["HostTree", "Predicted", "Reshard", "ReshardError", "from_host", "reshard", "to_host"]

Method = Literal["auto", "host", "device", "compiled"]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What a move takes (analytic, from the schedule).

    Attributes:
        seconds: of the slowest device, on the cluster's links.
        sent_bytes: received by devices that lack them, over all devices.
        lower_bound_bytes: what the devices lack: no schedule sends less.
        crossing_bytes: the part that goes between processes.
        kept_bytes: what stays on its device.
        in_bytes, out_bytes: device id -> bytes.
        bound_seconds: of the device that lacks most, on the same links.
    """

    seconds: float
    sent_bytes: int
    lower_bound_bytes: int
    crossing_bytes: int
    kept_bytes: int
    in_bytes: Mapping[int, int]
    out_bytes: Mapping[int, int]
    bound_seconds: float


class Reshard:
    """A move that can be repeated.

    Attributes:
        schedule: its pieces.
        predicted: bytes and seconds.
        method: "host", "device" or "compiled".

    Args:
        abstract_tree: anything with shape and dtype at its leaves.
        source_shardings, target_shardings: one sharding for all leaves, or a tree of them.
        budget_bytes: of memory beside the two trees, on each device and on the host.
        verify: compare checksums. It reads every byte that moves twice more.
        donate: free the old arrays as their bytes are on their way; they cannot be used again, nor can they after an
            error. Shards that stay where they are are shared by the old and the new array.
        deadline_seconds: how long another process may stand still.
        method: see the module.
        cluster: whose links the prediction is for; default: what the devices are (`pipelines.devices`).

    Raises:
        ValueError: trees of different structure, a sharding that does not fit its leaf; the message names the path.
    """

    def __init__(
        self,
        abstract_tree: Any,
        source_shardings: Any,
        target_shardings: Any,
        *,
        budget_bytes: float = BUDGET_BYTES,
        verify: bool = True,
        donate: bool = False,
        deadline_seconds: float = DEADLINE_SECONDS,
        method: Method = "auto",
        cluster: Cluster | None = None,
    ):
        if not budget_bytes >= 1:
            raise ValueError(f"budget_bytes={budget_bytes}; at least 1")
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}; one of {', '.join(get_args(Method))}")
        flat, self.structure = jax.tree_util.tree_flatten_with_path(abstract_tree)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
        for path, (_, leaf) in zip(paths, flat, strict=True):
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise ValueError(f"{path} is a {type(leaf).__name__}, not an array")
            if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                raise ValueError(f"{path} holds {leaf.dtype}; move its jax.random.key_data")
        old = shardings_of(source_shardings, self.structure, paths, "source")
        new = shardings_of(target_shardings, self.structure, paths, "target")
        self.schedule = make_schedule(
            LeafMove(path, tuple(leaf.shape), np.dtype(leaf.dtype), a, b)
            for path, (_, leaf), a, b in zip(paths, flat, old, new, strict=True)
        )
        self.budget_bytes, self.verify, self.donate = float(budget_bytes), verify, donate
        self.deadline_seconds = deadline_seconds
        self._cluster = cluster
        self.method = _method(self.schedule) if method == "auto" else method

    @functools.cached_property
    def predicted(self) -> Predicted:
        return _predict(self.schedule, self._cluster)

    @functools.cached_property
    def _copies(self) -> list[LeafCopies]:
        return host_copies(self.schedule)

    def run(self, tree: Any) -> Any:
        """Move a tree.

        Args:
            tree: as declared: structure, shapes, dtypes and shardings. A process without devices in the source
                may have arrays without addressable shards, or `jax.ShapeDtypeStruct`s, in their place.

        Returns:
            The same tree in the new shardings; on processes without devices there, without addressable shards.

        Raises:
            ValueError: the tree is not the declared one; nothing has moved.
            ReshardError: another process is gone, stands still or moves something else; or a checksum differs.
        """
        arrays = self._checked(tree)
        made = self._run_compiled(arrays) if self.method == "compiled" else self._run_pieces(arrays)
        return jax.tree.unflatten(self.structure, made)

    def _checked(self, tree: Any) -> list[Any]:
        flat, structure = jax.tree_util.tree_flatten_with_path(tree)
        if structure != self.structure:
            have = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}
            want = {move.path for move in self.schedule.moves}
            missing, foreign = sorted(want - have), sorted(have - want)
            raise ValueError(
                f"the tree is not the declared one: {len(flat)} leaves, not {len(want)}"
                + (f"; missing: {', '.join(missing[:5])}" if missing else "")
                + (f"; unknown: {', '.join(foreign[:5])}" if foreign else "")
                + ("" if missing or foreign else f"; its structure is {structure}, not {self.structure}")
            )
        here = jax.process_index()
        arrays = []
        for (_, array), move in zip(flat, self.schedule.moves, strict=True):
            if tuple(getattr(array, "shape", ("?",))) != move.shape or array.dtype != move.dtype:
                have = f"{getattr(array, 'dtype', type(array).__name__)}{list(getattr(array, 'shape', []))}"
                raise ValueError(f"{move.path} is {have}; declared: {move.dtype}{list(move.shape)}")
            if not isinstance(array, jax.Array):
                if any(d.process_index == here for d in move.source.device_set):
                    raise ValueError(f"{move.path} is a {type(array).__name__}, not a jax.Array")
            elif array.is_deleted() or any(shard.data.is_deleted() for shard in array.addressable_shards):
                raise ValueError(f"{move.path} has been deleted or donated")
            elif not array.sharding.is_equivalent_to(move.source, len(move.shape)):
                raise ValueError(f"{move.path} lies as {array.sharding}; declared: {move.source}")
            arrays.append(array)
        return arrays

    def _run_pieces(self, arrays: Sequence[Any]) -> list[jax.Array]:
        sources = [a if isinstance(a, jax.Array) else {} for a in arrays]
        store = (
            HostStore(self.schedule, sources, self._copies)
            if self.method == "host"
            else DeviceStore(self.schedule, sources, self.budget_bytes)
        )
        made = move_pieces(
            self.schedule,
            store,
            budget_bytes=self.budget_bytes,
            verify=self.verify,
            deadline_seconds=self.deadline_seconds,
            arrived=(lambda leaf: free(store, leaf, arrays[leaf])) if self.donate else None,
        )
        return made

    def _run_compiled(self, arrays: Sequence[Any]) -> list[jax.Array]:
        made: list[jax.Array] = []
        for group in _groups(self.schedule, self.budget_bytes / 2):
            targets = tuple(self.schedule.moves[i].target for i in group)
            olds = [arrays[i] for i in group]
            news = _identity(targets)(*olds)
            if self.verify:
                for i, before, after in zip(group, _totals(olds), _totals(news), strict=True):
                    if int(before) != int(after):
                        raise ReshardError(
                            f"{self.schedule.moves[i].path} arrived with other values: its checksum differs"
                        )
            jax.block_until_ready(news)
            if self.donate:
                for i, old in zip(group, olds, strict=True):
                    if not self.schedule.moves[i].source.is_equivalent_to(
                        self.schedule.moves[i].target, len(self.schedule.moves[i].shape)
                    ):
                        old.delete()
            made += news
        return made


def reshard(
    tree: Any,
    target_shardings: Any,
    *,
    budget_bytes: float = BUDGET_BYTES,
    verify: bool = True,
    donate: bool = False,
    deadline_seconds: float = DEADLINE_SECONDS,
    method: Method = "auto",
) -> Any:
    """Move a tree of arrays to other shardings; see `Reshard`.

    Raises:
        ValueError: a leaf is no jax.Array, trees of different structure, a sharding that does not fit.
        ReshardError: see `Reshard.run`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in leaves:
        if getattr(leaf, "sharding", None) is None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} is a {type(leaf).__name__} without a sharding, not a jax.Array")
    sources = jax.tree.unflatten(structure, [leaf.sharding for _, leaf in leaves])
    move = Reshard(
        tree,
        sources,
        target_shardings,
        budget_bytes=budget_bytes,
        verify=verify,
        donate=donate,
        deadline_seconds=deadline_seconds,
        method=method,
    )
    return move.run(tree)


def _method(schedule: Schedule) -> Method:
    devices = {d for move in schedule.moves for side in (move.source, move.target) for d in side.device_set}
    if all(device.platform == "cpu" for device in devices):
        return "host"
    same = all(move.source.device_set == move.target.device_set == devices for move in schedule.moves)
    return "compiled" if same else "device"


def _groups(schedule: Schedule, limit: float) -> list[list[int]]:
    """Leaves in a row whose new shards come to no more than the limit per device, or single leaves."""
    groups: list[list[int]] = []
    room = 0.0
    for i, move in enumerate(schedule.moves):
        nbytes = math.prod(move.target.shard_shape(move.shape)) * move.dtype.itemsize
        if not groups or nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(i)
        room -= nbytes
    return groups


@functools.lru_cache(maxsize=256)
def _identity(targets: tuple[Sharding, ...]) -> Any:
    return jax.jit(lambda *arrays: arrays, out_shardings=targets)


def _totals(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Checksums of whole arrays."""
    whole = [tuple((0, n) for n in array.shape) for array in arrays]
    return [part_checksum(array, box, box, array.shape) for array, box in zip(arrays, whole, strict=True)]


def _predict(schedule: Schedule, cluster: Cluster | None) -> Predicted:
    devices = {d for move in schedule.moves for side in (move.source, move.target) for d in side.device_set}
    if cluster is None:
        cluster = cluster_of(
            in_order(sorted(devices, key=lambda d: d.id)), memory_bytes=memory_bytes_per_device(list(devices))
        )
    per_node = cluster.devices_per_node
    inside = max([t.bytes_per_second for t in cluster.tiers if t.devices <= per_node], default=0.0)
    if cluster.torus:
        inside = max(inside, cluster.torus.bytes_per_second)
    across = max([t.bytes_per_second for t in cluster.tiers if t.devices > per_node], default=inside)
    inside = inside or across

    def seconds(total: Mapping[Any, int], crossing: Mapping[Any, int]) -> float:
        # The links inside a node and those out of it work at the same time.
        return max(
            (max((n - crossing.get(d, 0)) / inside, crossing.get(d, 0) / across) for d, n in total.items()), default=0.0
        )

    crossing = schedule.crossing_in_bytes
    received = seconds(schedule.in_bytes, crossing)
    sent = seconds(schedule.out_bytes, schedule.crossing_out_bytes)
    lacking = sum(
        math.prod(m.target.shard_shape(m.shape)) * m.dtype.itemsize * len(m.target.device_set) for m in schedule.moves
    )
    return Predicted(
        seconds=max(received, sent),
        sent_bytes=schedule.sent_bytes,
        lower_bound_bytes=lacking - schedule.kept_bytes,
        crossing_bytes=sum(crossing.values()),
        kept_bytes=schedule.kept_bytes,
        in_bytes={d.id: n for d, n in schedule.in_bytes.items()},
        out_bytes={d.id: n for d, n in schedule.out_bytes.items()},
        bound_seconds=max(
            (n / (inside + (across if crossing.get(d) else 0.0)) for d, n in schedule.in_bytes.items()), default=0.0
        ),
    )
