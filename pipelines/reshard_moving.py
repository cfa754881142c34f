"""Carries out a schedule: copies within this process, what comes and goes by wire, checksums, leaf by leaf.

arrays = move_pieces(schedule, HostStore(schedule, old), budget_bytes=2**28, verify=True, deadline_seconds=300)
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from pipelines.reshard_checksums import MODULUS, part_checksum
from pipelines.reshard_copies import THREADS
from pipelines.reshard_links import ReshardError
from pipelines.reshard_pieces import Schedule
from pipelines.reshard_stores import DeviceStore, HostStore
from pipelines.reshard_wire import Wire

BUDGET_BYTES = 256 * 2**20
DEADLINE_SECONDS = 300.0
ALONE_BYTES = 4 * 2**20
"""What is not worth a thread's start."""


def move_pieces(
    schedule: Schedule,
    store: HostStore | DeviceStore,
    *,
    budget_bytes: float,
    verify: bool,
    deadline_seconds: float,
    arrived: Callable[[int], None] | None = None,
) -> list[jax.Array]:
    """Carry out a schedule between the shards of a store.

    Args:
        schedule, store: what moves, from where to where.
        budget_bytes: for pieces in flight.
        verify: compare checksums of new shards with those of the pieces they are made of.
        deadline_seconds: how long another process may stand still.
        arrived: called with each leaf when it is complete and nobody reads the old one any more.

    Raises:
        ReshardError: another process is gone, stands still or moves something else; or a checksum differs.
    """
    sums = Sums(schedule, store) if verify else None
    made: list[jax.Array] = []
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        Wire(schedule, store, sums, budget_bytes=budget_bytes, deadline_seconds=deadline_seconds) as wire,
    ):
        # Old arrays that are donated, and what checksums take, wait for no more than half of the budget.
        together = math.inf if arrived is None and sums is None else budget_bytes / 2
        for leaves in _groups(schedule, together):
            several = isinstance(store, HostStore) and sum(schedule.moves[i].nbytes for i in leaves) > ALONE_BYTES
            _carry_out([job for leaf in leaves for job in store.jobs(leaf)], pool if several else None)
            for leaf in leaves:
                wire.wait(leaf)
                if sums is not None:
                    sums.before(leaf, schedule.of_leaf[leaf])
                made.append(store.finish(leaf))
                if sums is not None:
                    sums.after(leaf, schedule.of_leaf[leaf], made[-1])
                if arrived is not None:
                    store.flush()
                    if sums is not None:
                        sums.wait()  # an array that is still read keeps its memory when it is deleted
                    arrived(leaf)
            if sums is not None:
                sums.wait()
        store.flush()
    if sums is not None:
        sums.compare()
    return made


def _groups(schedule: Schedule, limit: float) -> Iterable[list[int]]:
    """Leaves in a row that come to no more than the limit, or single ones."""
    group: list[int] = []
    room = limit
    for leaf, move in enumerate(schedule.moves):
        if group and move.nbytes > room:
            yield group
            group, room = [], limit
        group.append(leaf)
        room -= move.nbytes
    if group:
        yield group


def _carry_out(jobs: Sequence[Callable[[], None]], pool: concurrent.futures.Executor | None) -> None:
    """All jobs, by all threads of the pool while this one waits: were it busy, each copy would wait for the interpreter
    at its end."""
    left = collections.deque(jobs)

    def work() -> None:
        while True:
            try:
                job = left.popleft()
            except IndexError:
                return
            job()

    if pool is None:
        work()
    else:
        for future in [pool.submit(work) for _ in range(THREADS)]:
            future.result()


def free(store: HostStore | DeviceStore, leaf: int, array: Any) -> None:
    """Delete what the new array does not share."""
    if not isinstance(array, jax.Array):
        return
    shards = array.addressable_shards
    going = [shard for shard in shards if not store.stays(leaf, shard.device)]
    if len(going) == len(shards):
        array.delete()
    else:
        for shard in going:
            shard.data.delete()


class Sums:
    """Checksums of pieces, where they come from, and of new shards, which are made of them."""

    def __init__(self, schedule: Schedule, store: HostStore | DeviceStore):
        self._schedule, self._store = schedule, store
        self._received: dict[int, int] = {}
        self._pieces: dict[int, Any] = {}
        self._shards: list[tuple[int, Any, list[int], Any]] = []
        self._begun: list[Any] = []
        self._lock = threading.Lock()

    def of_piece(self, number: int, device: Any) -> Any:
        """Checksum of a piece on a device that holds it."""
        piece = self._schedule.pieces[number]
        held = self._schedule.held[piece.leaf][device]
        shape = self._schedule.moves[piece.leaf].shape
        return part_checksum(self._store.old(piece.leaf)[device], held, piece.box, shape)

    def received(self, number: int, checksum: int) -> None:
        """The sender's checksum of a piece that has come by wire."""
        with self._lock:
            self._received[number] = checksum

    def before(self, leaf: int, numbers: Sequence[int]) -> None:
        """Begin the checksums of what came from devices of this process."""
        here = jax.process_index()
        for number in numbers:
            piece = self._schedule.pieces[number]
            senders = [d for d in piece.kept if d.process_index == here and not self._store.stays(leaf, d)]
            senders += [r.sender for r in piece.routes if not r.crosses and r.sender.process_index == here]
            if senders:
                self._pieces[number] = self.of_piece(number, senders[-1])
                self._begun.append(self._pieces[number])

    def wait(self) -> None:
        """Wait for all checksums that have been begun."""
        jax.block_until_ready(self._begun)
        self._begun.clear()

    def after(self, leaf: int, numbers: Sequence[int], made: jax.Array) -> None:
        """Begin the checksums of the new shards."""
        shape = self._schedule.moves[leaf].shape
        boxes = self._schedule.wanted[leaf]
        of_device: dict[Any, list[int]] = {}
        for number in numbers:
            piece = self._schedule.pieces[number]
            for device in (*piece.kept, *(d for route in piece.routes for d in route.receivers)):
                of_device.setdefault(device, []).append(number)
        seen = set()
        for shard in made.addressable_shards:
            device = shard.device
            if isinstance(self._store, HostStore) and boxes[device] in seen:
                continue  # the same memory
            if not self._store.stays(leaf, device):
                seen.add(boxes[device])
                total = part_checksum(shard.data, boxes[device], boxes[device], shape)
                self._shards.append((leaf, device, of_device.get(device, []), total))
                self._begun.append(total)

    def compare(self) -> None:
        """Compare all.

        Raises:
            ReshardError: a shard is not made of what was sent.
        """
        pieces = {number: int(value) for number, value in jax.device_get(self._pieces).items()} | self._received
        totals = jax.device_get([total for *_, total in self._shards])
        for (leaf, device, numbers, _), total in zip(self._shards, totals, strict=True):
            wanted = sum(pieces[number] for number in numbers) % MODULUS
            if wanted != int(total):
                raise ReshardError(
                    f"{self._schedule.moves[leaf].path} arrived on {device} with other values: checksum "
                    f"{int(total):08x}, sent {wanted:08x}"
                )
