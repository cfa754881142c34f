"""A tree of arrays in its host's memory while nobody needs it on the devices.

    host = to_host(params, donate=True)         # the devices' memory is free
    params = from_host(host)                    # as they lay; or: from_host(host, other_shardings)

Where devices have `pinned_host` memory the arrays go there, by `jax.device_put`. CPU devices' memory is the host's
already: there the tree is copied into numpy arrays, so that the meaning is the same. A box that several devices of
this process hold is stored once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from pipelines.reshard_copies import host_copies
from pipelines.reshard_moving import BUDGET_BYTES, DEADLINE_SECONDS, free, move_pieces
from pipelines.reshard_pieces import LeafMove, boxes, make_schedule, shardings_of
from pipelines.reshard_stores import DeviceStore, HostStore, Values, aligned_empty

PINNED = "pinned_host"


@dataclasses.dataclass
class HostTree:
    """What `to_host` made. A resource: `from_host(..., donate=True)` empties it.

    Attributes:
        structure: of the tree.
        leaves: paths, shapes, dtypes; `source` is the sharding that each leaf had on the devices.
        parts: for each leaf an array in pinned memory, or device -> numpy array of the devices of this process.
    """

    structure: Any
    leaves: tuple[LeafMove, ...]
    parts: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that this process holds."""
        return sum(
            part.nbytes
            for leaf in self.parts
            for part in (
                {id(p): p for p in leaf.values()}.values()
                if isinstance(leaf, dict)
                else [shard.data for shard in leaf.addressable_shards]
                if leaf is not None
                else []
            )
        )


def offload_bytes(abstract_tree: Any, shardings: Any) -> int:
    """Bytes that each device sends to its host, one way; times the devices of a host for its whole traffic.

    Args:
        abstract_tree: anything with shape and dtype at its leaves.
        shardings: one, or a tree of them.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(abstract_tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    given = shardings_of(shardings, structure, paths, "given")
    return sum(
        math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        for (_, leaf), sharding in zip(flat, given, strict=True)
    )


def to_host(tree: Any, *, donate: bool = False) -> HostTree:
    """Copy a tree into host memory.

    Args:
        tree: of jax.Array; those with no addressable shards stay without.
        donate: delete each array when its copy is done.

    Raises:
        ValueError: a leaf is no jax.Array, or has been deleted.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves, parts = [], []
    for path, array in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(array, jax.Array):
            raise ValueError(f"{name} is a {type(array).__name__}, not a jax.Array")
        if array.is_deleted():
            raise ValueError(f"{name} has been deleted or donated")
        leaves.append(LeafMove(name, array.shape, np.dtype(array.dtype), array.sharding, array.sharding))
    for (_, array), leaf in zip(flat, leaves, strict=True):
        if _pinned(leaf.source):
            copy = jax.device_put(array, leaf.source.with_memory_kind(PINNED))
            if donate:
                jax.block_until_ready(copy)
            parts.append(copy)
        else:
            parts.append(_copies(array, leaf))
        if donate:
            array.delete()
    return HostTree(structure, tuple(leaves), parts)


def from_host(
    host: HostTree,
    shardings: Any = None,
    *,
    budget_bytes: float = BUDGET_BYTES,
    verify: bool = False,
    donate: bool = False,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Any:
    """Copy a tree back to devices.

    Args:
        host: from `to_host`.
        shardings: one, or a tree of them; None: as the arrays lay. On any devices, as in `Reshard`: only what a device
            lacks is moved between processes.
        budget_bytes, verify, deadline_seconds: as in `Reshard`.
        donate: empty `host` leaf by leaf.

    Raises:
        ValueError: the host tree has been emptied, or the shardings do not fit.
        ReshardError: as in `Reshard.run`.
    """
    if any(part is None for part in host.parts):
        raise ValueError("this host tree has been given back to the devices before")
    paths = [leaf.path for leaf in host.leaves]
    old = [leaf.source for leaf in host.leaves]
    new = old if shardings is None else shardings_of(shardings, host.structure, paths, "target")

    def forget(leaf: int) -> None:
        host.parts[leaf] = None

    schedule = make_schedule(dataclasses.replace(leaf, target=t) for leaf, t in zip(host.leaves, new, strict=True))
    if host.leaves and not isinstance(host.parts[0], dict):
        back = []
        for i, (part, sharding) in enumerate(zip(host.parts, old, strict=True)):
            back.append(jax.device_put(part, sharding))
            if donate:
                jax.block_until_ready(back[-1])
                forget(i)
        if new == old:
            return jax.tree.unflatten(host.structure, back)
        store = DeviceStore(schedule, back, budget_bytes)
        arrived = lambda leaf: free(store, leaf, back[leaf])  # noqa: E731
    else:
        devices = {d for move in schedule.moves for side in (move.source, move.target) for d in side.device_set}
        on_cpu = all(device.platform == "cpu" for device in devices)
        store = (
            HostStore(schedule, host.parts, host_copies(schedule, share=False))
            if on_cpu
            else DeviceStore(schedule, host.parts, budget_bytes)
        )
        arrived = forget if donate else None
    made = move_pieces(
        schedule,
        store,
        budget_bytes=budget_bytes,
        verify=verify,
        deadline_seconds=deadline_seconds,
        arrived=arrived,
    )
    return jax.tree.unflatten(host.structure, made)


def _pinned(sharding: jax.sharding.Sharding) -> bool:
    """Whether the devices copy from and to page-locked memory. CPU devices name it and have no other memory."""
    devices = sharding.addressable_devices
    return bool(devices) and all(
        d.platform != "cpu" and any(memory.kind == PINNED for memory in d.addressable_memories()) for d in devices
    )


def _copies(array: jax.Array, leaf: LeafMove) -> dict[Any, Values]:
    placed = boxes(leaf.source, leaf.shape)
    stored: dict[Any, Values] = {}
    parts = {}
    for shard in array.addressable_shards:
        box = placed[shard.device]
        if box not in stored:
            stored[box] = aligned_empty(shard.data.shape, leaf.dtype)
            np.copyto(stored[box], np.asarray(shard.data))
        parts[shard.device] = stored[box]
    return parts
