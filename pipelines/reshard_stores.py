"""Where bytes are read from and written to: host memory (CPU devices), or device memory by small compiled programs.

    store = HostStore(schedule, arrays)             # or DeviceStore
    store.copy(leaf, source, targets, box)          # within this process
    store.write(leaf, targets, box, values); store.read(leaf, source, box)
    new = store.finish(leaf)

On CPU devices an array's memory is the process's own: old shards are read as numpy views, new ones are written once
into aligned memory that XLA takes over as it is. Each byte is read once and written once, and nothing else is
allocated. (`jax.device_put` gathers the whole array on the host where layouts differ.) Elsewhere pieces are sliced on
the sender, sent by `jax.device_put` of one-device arrays, and written into the new shard, which is donated from write
to write.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from pipelines.reshard_pieces import Box, Schedule, boxes, within

ALIGNMENT = 64
"""Bytes, from which XLA's CPU client takes memory as it is."""
Values = npt.NDArray[Any]


class Store(Protocol):
    """Old and new shards of the devices of this process."""

    def copy(self, leaf: int, source: Any, targets: Sequence[Any], box: Box) -> None:
        """Copy a part of an old shard into new ones."""
        ...

    def read(self, leaf: int, source: Any, box: Box) -> Values:
        """A part of an old shard, on the host."""
        ...

    def write(self, leaf: int, targets: Sequence[Any], box: Box, values: Values) -> None:
        """Write a part of new shards."""
        ...

    def hole(self, leaf: int, target: Any, box: Box) -> Values | None:
        """A contiguous part of a new shard to write into, where it lies in host memory; else None."""
        ...

    def finish(self, leaf: int) -> jax.Array:
        """The new array; the store forgets the leaf."""
        ...

    def flush(self) -> None:
        """Wait for what was begun, so that its memory is free."""
        ...


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Values:
    """An uninitialised numpy array that a CPU device takes without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + nbytes].view(dtype).reshape(shape)


def copy_values(new: Values, old: Values) -> None:
    """Copy elements of one dtype; in words of eight bytes where both are made of them, which is the fastest."""
    if _in_words(new) and _in_words(old):
        new, old = new.view(np.uint64), old.view(np.uint64)
    np.copyto(new, old)


def _in_words(values: Values) -> bool:
    return (
        values.ndim > 0
        and values.strides[-1] == values.itemsize
        and values.itemsize <= 8
        and all(step % 8 == 0 for step in (*values.strides[:-1], values.shape[-1] * values.itemsize))
        and values.ctypes.data % 8 == 0
    )


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


class _Shards:
    """The old and new boxes of each leaf, on this process's devices."""

    def __init__(self, schedule: Schedule, arrays: Sequence[jax.Array | Mapping[Any, Values]]):
        self.schedule = schedule
        self._arrays: list[Any] = list(arrays)
        self._old: dict[int, dict[Any, Any]] = {}
        self._known: dict[Any, dict[Any, Box]] = {}
        self._lock = threading.Lock()

    def boxes(self, leaf: int, side: str) -> dict[Any, Box]:
        move = self.schedule.moves[leaf]
        key = (getattr(move, side), move.shape)
        if key not in self._known:
            self._known[key] = boxes(*key)
        return self._known[key]

    def mine(self, leaf: int) -> list[Any]:
        """Devices of this process that hold a part of the new array."""
        here = jax.process_index()
        return [d for d in self.boxes(leaf, "target") if d.process_index == here]

    def stays(self, leaf: int, device: Any) -> bool:
        """Whether a device's new shard is its old one."""
        old = self.boxes(leaf, "source").get(device)
        return old is not None and old == self.boxes(leaf, "target").get(device)

    def old(self, leaf: int) -> dict[Any, Any]:
        """Device -> old shard."""
        with self._lock:
            if leaf not in self._old:
                array = self._arrays[leaf]
                if isinstance(array, Mapping):
                    self._old[leaf] = dict(array)
                else:
                    self._old[leaf] = {shard.device: shard.data for shard in array.addressable_shards}
            return self._old[leaf]

    def assemble(self, leaf: int, parts: dict[Any, Any]) -> jax.Array:
        move = self.schedule.moves[leaf]
        ordered = [parts[device] for device in self.mine(leaf)]
        made = jax.make_array_from_single_device_arrays(move.shape, move.target, ordered, dtype=move.dtype)
        with self._lock:
            self._old.pop(leaf, None)
            self._arrays[leaf] = None
        return made


class HostStore(_Shards):
    """Shards in host memory. Old ones are arrays on CPU devices, or numpy arrays by device.

    Devices of this process that want the same box share its memory, as they do after `jax.device_put`.
    """

    def __init__(self, schedule: Schedule, arrays: Sequence[jax.Array | Mapping[Any, Values]]):
        super().__init__(schedule, arrays)
        self._views: dict[int, dict[Any, Values]] = {}
        self._new: dict[int, dict[Box, Values]] = {}
        self._store_lock = threading.Lock()

    def _view(self, leaf: int, device: Any) -> Values:
        with self._store_lock:
            views = self._views.setdefault(leaf, {})
            if device not in views:
                views[device] = np.asarray(self.old(leaf)[device])
            return views[device]

    def _buffer(self, leaf: int, device: Any) -> Values:
        box = self.boxes(leaf, "target")[device]
        with self._store_lock:
            buffers = self._new.setdefault(leaf, {})
            if box not in buffers:
                buffers[box] = aligned_empty(shape_of(box), self.schedule.moves[leaf].dtype)
            return buffers[box]

    def copy(self, leaf: int, source: Any, targets: Sequence[Any], box: Box) -> None:
        self.write(leaf, targets, box, self.read(leaf, source, box))

    def read(self, leaf: int, source: Any, box: Box) -> Values:
        return self._view(leaf, source)[(*within(box, self.boxes(leaf, "source")[source]), ...)]

    def _new_part(self, leaf: int, target: Any, box: Box) -> Values:
        return self._buffer(leaf, target)[(*within(box, self.boxes(leaf, "target")[target]), ...)]

    def write(self, leaf: int, targets: Sequence[Any], box: Box, values: Values) -> None:
        copy_values(self._new_part(leaf, targets[0], box), values)  # which is everyone's

    def hole(self, leaf: int, target: Any, box: Box) -> Values | None:
        part = self._new_part(leaf, target, box)
        return part if part.flags.c_contiguous else None

    def finish(self, leaf: int) -> jax.Array:
        mine = self.mine(leaf)
        old = {d: self.old(leaf)[d] for d in mine if self.stays(leaf, d)}
        parts = {d: shard for d, shard in old.items() if isinstance(shard, jax.Array)}
        new = [d for d in mine if d not in parts]
        # XLA takes the buffers over; where it did not, the copies are of one leaf.
        parts |= zip(new, jax.device_put([self._part(leaf, d) for d in new], new), strict=True)
        made = self.assemble(leaf, parts)
        with self._store_lock:
            self._views.pop(leaf, None)
            self._new.pop(leaf, None)
        return made

    def _part(self, leaf: int, device: Any) -> Values:
        if self.stays(leaf, device):
            # Values that came as numpy arrays belong to their giver.
            box = self.boxes(leaf, "target")[device]
            if box not in self._new.get(leaf, {}):
                copy_values(self._buffer(leaf, device), self._view(leaf, device))
        return self._buffer(leaf, device)

    def flush(self) -> None:
        pass


class DeviceStore(_Shards):
    """Shards in device memory; pieces in flight are waited for when they reach the byte budget."""

    def __init__(self, schedule: Schedule, arrays: Sequence[jax.Array | Mapping[Any, Values]], budget_bytes: float):
        super().__init__(schedule, arrays)
        self._new: dict[int, dict[Any, jax.Array]] = {}
        self._budget_bytes = budget_bytes
        self._flying_bytes = 0
        self._write_lock = threading.Lock()

    def copy(self, leaf: int, source: Any, targets: Sequence[Any], box: Box) -> None:
        self.write(leaf, targets, box, self._slice(leaf, source, box))

    def read(self, leaf: int, source: Any, box: Box) -> Values:
        return np.asarray(self._slice(leaf, source, box))

    def write(self, leaf: int, targets: Sequence[Any], box: Box, values: Any) -> None:
        for target in targets:  # each hands on to the next
            values = self._put(leaf, target, box, values)

    def hole(self, leaf: int, target: Any, box: Box) -> Values | None:
        return None

    def _slice(self, leaf: int, source: Any, box: Box) -> Any:
        shard, held = self.old(leaf)[source], self.boxes(leaf, "source")[source]
        if box == held:
            return shard
        if isinstance(shard, np.ndarray):
            return shard[(*within(box, held), ...)]
        start = np.asarray([s - begin for (s, _), (begin, _) in zip(box, held, strict=True)], np.int32)
        return _slice(shard, start, shape_of(box))

    def _put(self, leaf: int, target: Any, box: Box, part: Any) -> jax.Array:
        with self._write_lock:
            new = self._new.setdefault(leaf, {})
            whole = self.boxes(leaf, "target")[target]
            arrived = jax.device_put(part, target)
            if box == whole:
                new[target] = arrived
                return arrived
            if target not in new:
                new[target] = _zeros(shape_of(whole), self.schedule.moves[leaf].dtype, target)
            start = np.asarray([s - begin for (s, _), (begin, _) in zip(box, whole, strict=True)], np.int32)
            new[target] = _update(new[target], arrived, start)
            # The slice on the sender and what arrives.
            self._flying_bytes += 2 * arrived.nbytes
            if self._flying_bytes >= self._budget_bytes / 2:
                jax.block_until_ready(new[target])
                self._flying_bytes = 0
            return arrived

    def finish(self, leaf: int) -> jax.Array:
        parts = {}
        for device in self.mine(leaf):
            if self.stays(leaf, device):
                parts[device] = jax.device_put(self.old(leaf)[device], device)
            elif device in self._new.get(leaf, {}):
                parts[device] = self._new[leaf][device]
            else:  # nothing in it
                parts[device] = _zeros(
                    shape_of(self.boxes(leaf, "target")[device]), self.schedule.moves[leaf].dtype, device
                )
        self._new.pop(leaf, None)
        return self.assemble(leaf, parts)

    def flush(self) -> None:
        with self._write_lock:
            jax.block_until_ready([list(parts.values()) for parts in self._new.values()])
            self._flying_bytes = 0


@functools.partial(jax.jit, static_argnums=2)
def _slice(shard: jax.Array, start: Any, size: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_slice(shard, [start[d] for d in range(len(size))], size)


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice(whole, part, [start[d] for d in range(part.ndim)])


def _zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> jax.Array:
    with jax.default_device(device):
        return jax.device_put(jnp.zeros(shape, dtype), device)
