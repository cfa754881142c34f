"""Where bytes are read from and written to: host memory (CPU devices), or device memory by small compiled programs.

    store = HostStore(schedule, arrays)             # or DeviceStore
    for job in store.jobs(leaf): job()              # within this process
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from pipelines.reshard_copies import ALIGNMENT, Bytes, LeafCopies, host_copies
from pipelines.reshard_pieces import Box, Schedule, box_of, cut, within

Values = npt.NDArray[Any]


class Store(Protocol):
    """Old and new shards of the devices of this process."""

    def jobs(self, leaf: int) -> list[Callable[[], None]]:
        """What copies the parts of a leaf that do not leave this process, in any order and by several threads."""
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
    memory = np.empty(math.prod(shape) * np.dtype(dtype).itemsize + ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % ALIGNMENT)


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


class _Shards:
    """The old and new boxes of each leaf, on this process's devices."""

    def __init__(self, schedule: Schedule, arrays: Sequence[jax.Array | Mapping[Any, Values]]):
        self.schedule = schedule
        self._arrays: list[Any] = list(arrays)
        self._old: dict[int, dict[Any, Any]] = {}
        self._lock = threading.Lock()

    def mine(self, leaf: int) -> list[Any]:
        """Devices of this process that hold a part of the new array."""
        here = jax.process_index()
        return [d for d in self.schedule.wanted[leaf] if d.process_index == here]

    def stays(self, leaf: int, device: Any) -> bool:
        """Whether a device's new shard is its old one."""
        old = self.schedule.held[leaf].get(device)
        return old is not None and old == self.schedule.wanted[leaf].get(device)

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
        return jax.make_array_from_single_device_arrays(move.shape, move.target, ordered, dtype=move.dtype)

    def forget(self, leaf: int) -> None:
        with self._lock:
            self._old.pop(leaf, None)
            self._arrays[leaf] = None


class HostStore(_Shards):
    """Shards in host memory. Old ones are arrays on CPU devices, or numpy arrays by device.

    Devices of this process that want the same box share its memory, as they do after `jax.device_put`.
    """

    def __init__(
        self,
        schedule: Schedule,
        arrays: Sequence[jax.Array | Mapping[Any, Values]],
        copies: Sequence[LeafCopies] | None = None,
    ):
        """copies: what `host_copies` makes of the schedule, where it is at hand."""
        super().__init__(schedule, arrays)
        self._copies = host_copies(schedule) if copies is None else copies
        self._views: list[dict[Any, Bytes]] = [{} for _ in schedule.moves]
        self._new: list[dict[int, Bytes]] = [{} for _ in schedule.moves]
        self._store_lock = threading.Lock()

    def stays(self, leaf: int, device: Any) -> bool:
        return device in self._copies[leaf].stays

    def _old_bytes(self, leaf: int, device: Any) -> Bytes:
        with self._store_lock:
            views = self._views[leaf]
            if device not in views:
                views[device] = np.ascontiguousarray(self.old(leaf)[device]).reshape(-1).view(np.uint8)
            return views[device]

    def _buffer(self, leaf: int, number: int) -> Bytes:
        with self._store_lock:
            buffers = self._new[leaf]
            if number not in buffers:
                buffers[number] = aligned_empty((self._copies[leaf].buffers[number],), np.uint8)
            return buffers[number]

    def jobs(self, leaf: int) -> list[Callable[[], None]]:
        return [
            functools.partial(copy.carry_out, self._old_bytes(leaf, copy.source), self._buffer(leaf, copy.buffer))
            for copy in self._copies[leaf].copies
        ]

    def _old_shard(self, leaf: int, device: Any) -> Values:
        dtype, box = self.schedule.moves[leaf].dtype, self.schedule.held[leaf][device]
        return self._old_bytes(leaf, device).view(dtype).reshape(shape_of(box))

    def _new_shard(self, leaf: int, box: Box) -> Values:
        number, offset = self._copies[leaf].places[box]
        return np.ndarray(shape_of(box), self.schedule.moves[leaf].dtype, self._buffer(leaf, number), offset)

    def read(self, leaf: int, source: Any, box: Box) -> Values:
        return self._old_shard(leaf, source)[(*within(box, self.schedule.held[leaf][source]), ...)]

    def _new_part(self, leaf: int, target: Any, box: Box) -> Values:
        wanted = self.schedule.wanted[leaf][target]
        return self._new_shard(leaf, wanted)[(*within(box, wanted), ...)]

    def write(self, leaf: int, targets: Sequence[Any], box: Box, values: Values) -> None:
        np.copyto(self._new_part(leaf, targets[0], box), values)  # which is everyone's

    def hole(self, leaf: int, target: Any, box: Box) -> Values | None:
        part = self._new_part(leaf, target, box)
        return part if part.flags.c_contiguous else None

    def finish(self, leaf: int) -> jax.Array:
        wanted, mine = self.schedule.wanted[leaf], self.mine(leaf)
        new = {d: self._new_shard(leaf, wanted[d]) for d in mine if not self.stays(leaf, d)}
        # XLA takes the buffers over; where it did not, the copies are of one leaf.
        if mine and len(new) == len(mine):
            made = self._at_once(leaf, new)
        else:
            parts = dict(zip(new, jax.device_put(list(new.values()), list(new)), strict=True))
            made = self.assemble(leaf, {d: self.old(leaf)[d] for d in mine if d not in parts} | parts)
        self.forget(leaf)
        return made

    def _at_once(self, leaf: int, shards: dict[Any, Values]) -> jax.Array:
        """A fifth of the time of shard by shard."""
        move = self.schedule.moves[leaf]
        by_box = {self.schedule.wanted[leaf][device]: values for device, values in shards.items()}

        def shard(index: Any) -> Values:
            return by_box[box_of(index, move.shape)]

        return jax.make_array_from_callback(move.shape, move.target, shard, dtype=move.dtype)

    def forget(self, leaf: int) -> None:
        super().forget(leaf)
        with self._store_lock:
            self._views[leaf], self._new[leaf] = {}, {}

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

    def jobs(self, leaf: int) -> list[Callable[[], None]]:
        here = jax.process_index()
        jobs = []
        for number in self.schedule.of_leaf[leaf]:
            piece = self.schedule.pieces[number]
            ways = [(d, (d,)) for d in piece.kept if d.process_index == here and not self.stays(leaf, d)]
            ways += [(r.sender, r.receivers) for r in piece.routes if not r.crosses and r.sender.process_index == here]
            parts = cut(piece.box, self.schedule.moves[leaf].dtype.itemsize, self._budget_bytes / 8) if ways else []
            jobs += [functools.partial(self._copy, leaf, *way, part) for way in ways for part in parts]
        return jobs

    def _copy(self, leaf: int, source: Any, targets: Sequence[Any], box: Box) -> None:
        self.write(leaf, targets, box, self._slice(leaf, source, box))

    def read(self, leaf: int, source: Any, box: Box) -> Values:
        return np.asarray(self._slice(leaf, source, box))

    def write(self, leaf: int, targets: Sequence[Any], box: Box, values: Any) -> None:
        for target in targets:  # each hands on to the next
            values = self._put(leaf, target, box, values)

    def hole(self, leaf: int, target: Any, box: Box) -> Values | None:
        return None

    def _slice(self, leaf: int, source: Any, box: Box) -> Any:
        shard, held = self.old(leaf)[source], self.schedule.held[leaf][source]
        if box == held:
            return shard
        if isinstance(shard, np.ndarray):
            return shard[(*within(box, held), ...)]
        start = np.asarray([s - begin for (s, _), (begin, _) in zip(box, held, strict=True)], np.int32)
        return _slice(shard, start, shape_of(box))

    def _put(self, leaf: int, target: Any, box: Box, part: Any) -> jax.Array:
        with self._write_lock:
            new = self._new.setdefault(leaf, {})
            whole = self.schedule.wanted[leaf][target]
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
                    shape_of(self.schedule.wanted[leaf][device]), self.schedule.moves[leaf].dtype, device
                )
        self._new.pop(leaf, None)
        made = self.assemble(leaf, parts)
        self.forget(leaf)
        return made

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
