"""Shards of a parameter that are filled bit by bit, in whatever order their parts come.

    leaf = Leaf("embed", shape, dtype, sharding, staged=False, transfers=Transfers())
    for shard in leaf.shards:                        # those of this process, each once however many devices hold it
        shard.write((0, 128), (64, 32), numbers)     # a box of shape (64, 32) that begins there
    array = leaf.array()

A `HostShard` is filled in host memory, which CPU devices then share, and which others get as soon as it is full. A
`DeviceShard` is filled on its device: each part is moved there when it comes, so that large shards are never whole on
the host.
"""

from __future__ import annotations

import collections
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from redco_like.models.weights.scatter import Box, copy

_ALIGNMENT = 64  # from which XLA's CPU client takes memory as it is
_IN_FLIGHT_BYTES = 256 * 2**20


class Shard(Protocol):
    """A box of a leaf, on one or several devices."""

    box: Box
    staged: bool

    def write(self, start: Sequence[int], shape: Sequence[int], source: np.ndarray) -> None:
        """Write a part.

        Args:
            start: where it begins in the shard.
            shape: its size there.
            source: its numbers, the dimensions of `shape` split in some way.
        """
        ...

    def arrays(self) -> list[jax.Array]:
        """The whole shard on each of its devices, once all of it is written."""
        ...


class HostShard:
    """Filled in host memory."""

    staged = False

    def __init__(self, box: Box, dtype: np.dtype, devices: Sequence[Any], transfers: Transfers):
        self.box, self._dtype, self._devices, self._transfers = box, dtype, devices, transfers
        self._lock = threading.Lock()
        self._left = math.prod(sizes(box))
        self._memory: np.ndarray | None = None
        self._arrays: list[jax.Array] = []

    def write(self, start: Sequence[int], shape: Sequence[int], source: np.ndarray) -> None:
        with self._lock:
            if self._memory is None:
                self._memory = _aligned(sizes(self.box), self._dtype)
            memory = self._memory
        within = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        copy(memory[within].reshape(source.shape), source)
        with self._lock:
            self._left -= math.prod(shape)
            if not self._left:
                self._arrays = [jax.device_put(memory, device) for device in self._devices]
                self._memory = None
                self._transfers.add(memory.nbytes, self._arrays)

    def arrays(self) -> list[jax.Array]:
        return self._arrays


class DeviceShard:
    """Filled on its devices, part by part."""

    staged = True

    def __init__(self, box: Box, dtype: np.dtype, devices: Sequence[Any], transfers: Transfers):
        self.box, self._dtype, self._devices, self._transfers = box, dtype, devices, transfers
        self._lock = threading.Lock()
        self._arrays: list[jax.Array] = []

    def write(self, start: Sequence[int], shape: Sequence[int], source: np.ndarray) -> None:
        # Widened on the device, where that is; narrowed here.
        dtype = source.dtype if source.dtype.itemsize < self._dtype.itemsize else self._dtype
        part = np.empty(shape, dtype)
        copy(part.reshape(source.shape), source)
        places = np.asarray(start, np.int32)
        moved = [jax.device_put(part, device) for device in self._devices]
        self._transfers.add(part.nbytes, moved)
        with self._lock:
            if not self._arrays:
                shape = sizes(self.box)
                self._arrays = [_make_zeros(shape, self._dtype, SingleDeviceSharding(d))() for d in self._devices]
            self._arrays = [_update(whole, part, places) for whole, part in zip(self._arrays, moved, strict=True)]

    def arrays(self) -> list[jax.Array]:
        return self._arrays


class Transfers:
    """Bounds the bytes of the host that are on their way to devices."""

    def __init__(self, limit_bytes: int = _IN_FLIGHT_BYTES):
        self._limit, self._bytes = limit_bytes, 0
        self._waiting: collections.deque[tuple[int, list[jax.Array]]] = collections.deque()
        self._lock = threading.Lock()

    def add(self, size: int, moved: list[jax.Array]) -> None:
        with self._lock:
            self._waiting.append((size, moved))
            self._bytes += size
            while self._bytes > self._limit:
                oldest, arrays = self._waiting.popleft()
                jax.block_until_ready(arrays)
                self._bytes -= oldest


class Leaf:
    """A parameter that is being loaded.

    Args:
        path: "stack/layers/attention/q/kernel".
        staged: whether parts are moved to the devices as they come.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        sharding: Sharding,
        *,
        staged: bool,
        transfers: Transfers,
    ):
        self.path, self.shape, self.dtype, self.sharding = path, shape, dtype, sharding
        holders: dict[Box, list[Any]] = collections.defaultdict(list)
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            cut = index if index is not None else (slice(None),) * len(shape)
            box = tuple(s.indices(n)[:2] for s, n in zip(cut, shape, strict=True))
            holders[box].append(device)
        self.shards: list[Shard] = [
            (DeviceShard if staged else HostShard)(box, dtype, devices, transfers) for box, devices in holders.items()
        ]

    @property
    def local_bytes(self) -> int:
        """Bytes of this process's shards, replicas not counted."""
        return sum(math.prod(sizes(shard.box)) for shard in self.shards) * self.dtype.itemsize

    def array(self) -> jax.Array:
        """The parameter, once all of it is written."""
        shards = [array for shard in self.shards for array in shard.arrays()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def sizes(box: Box) -> tuple[int, ...]:
    """Shape of a box."""
    return tuple(stop - start for start, stop in box)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


@functools.cache
def _make_zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: SingleDeviceSharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    places = [start[i] for i in range(whole.ndim)]
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), places)
