"""Shards of a parameter that are filled bit by bit, in whatever order their parts come.

    leaf = Leaf("embed", shape, dtype, sharding)
    for shard in leaf.shards:                        # those of this process, each once however many devices hold it
        shard.write((0, 128), numbers, factors)      # the box of this shape that begins there
    array = leaf.array()

On CPU devices a shard is filled in the memory that the array will have. On others a part is moved as soon as it is
there, and written into the shard on its device: the host keeps no more than the parts that are on their way.
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

    def write(self, start: Sequence[int], shape: Sequence[int], factors: Sequence[int], source: np.ndarray) -> None:
        """Write a part.

        Args:
            start: where it begins in the shard; shape: its size there.
            factors: `shape` with dimensions split, in which `source` is given.
        """
        ...

    def arrays(self) -> list[jax.Array]:
        """The whole shard on each of its devices."""
        ...


class HostShard:
    """Filled in host memory, which the devices (CPU) share."""

    def __init__(self, box: Box, dtype: np.dtype, devices: Sequence[Any]):
        self.box, self._devices = box, devices
        self._dtype, self._lock = dtype, threading.Lock()
        self._memory: np.ndarray | None = None

    def write(self, start: Sequence[int], shape: Sequence[int], factors: Sequence[int], source: np.ndarray) -> None:
        with self._lock:
            if self._memory is None:
                self._memory = _aligned(_sizes(self.box), self._dtype)
        within = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        copy(self._memory[within].reshape(factors), source)

    def arrays(self) -> list[jax.Array]:
        memory = _aligned(_sizes(self.box), self._dtype) if self._memory is None else self._memory
        self._memory = None
        return [jax.device_put(memory, device) for device in self._devices]


class DeviceShard:
    """Filled on its devices, part by part."""

    def __init__(self, box: Box, dtype: np.dtype, devices: Sequence[Any], transfers: Transfers):
        self.box, self._dtype, self._devices, self._transfers = box, dtype, devices, transfers
        self._lock = threading.Lock()
        self._arrays: list[jax.Array] = []

    def write(self, start: Sequence[int], shape: Sequence[int], factors: Sequence[int], source: np.ndarray) -> None:
        # Widened on the device, where that is; narrowed here.
        dtype = source.dtype if source.dtype.itemsize < self._dtype.itemsize else self._dtype
        part = np.empty(shape, dtype)
        copy(part.reshape(factors), source)
        places = np.asarray(start, np.int32)
        with self._lock:
            if not self._arrays:
                self._arrays = [_zeros(_sizes(self.box), self._dtype, device) for device in self._devices]
            for i, device in enumerate(self._devices):
                moved = jax.device_put(part, device)
                self._arrays[i] = _update(self._arrays[i], moved, places)
                self._transfers.add(part.nbytes, moved)

    def arrays(self) -> list[jax.Array]:
        return self._arrays or [_zeros(_sizes(self.box), self._dtype, device) for device in self._devices]


class Transfers:
    """Bounds the bytes on their way to devices."""

    def __init__(self, limit_bytes: int = _IN_FLIGHT_BYTES):
        self._limit, self._bytes = limit_bytes, 0
        self._waiting: collections.deque[tuple[int, jax.Array]] = collections.deque()
        self._lock = threading.Lock()

    def add(self, size: int, moved: jax.Array) -> None:
        with self._lock:
            self._waiting.append((size, moved))
            self._bytes += size
            while self._bytes > self._limit:
                oldest, array = self._waiting.popleft()
                array.block_until_ready()
                self._bytes -= oldest


class Leaf:
    """A parameter that is being loaded.

    Args:
        path: "stack/layers/attention/q/kernel".
        staged: whether parts are moved to the devices as they come; else, for CPU devices, the host's memory is theirs.
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
            DeviceShard(box, dtype, devices, transfers) if staged else HostShard(box, dtype, devices)
            for box, devices in holders.items()
        ]

    @property
    def local_bytes(self) -> int:
        """Bytes of this process's shards, replicas not counted."""
        return sum(math.prod(_sizes(shard.box)) for shard in self.shards) * self.dtype.itemsize

    def array(self) -> jax.Array:
        """The parameter, once all of it is written."""
        shards = [array for shard in self.shards for array in shard.arrays()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> jax.Array:
    return _make_zeros(shape, dtype, SingleDeviceSharding(device))()


@functools.cache
def _make_zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: SingleDeviceSharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    places = [start[i] for i in range(whole.ndim)]
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), places)
