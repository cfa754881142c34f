"""Pieces of a schedule that go between processes: a thread per peer and direction.

    with Wire(schedule, store, sums, budget_bytes=2**28, deadline_seconds=300) as wire:
        wire.wait(leaf)                       # all that this process sends and receives of a leaf is done

Both ends go through the pieces in the schedule's order, so that nothing but the bytes is sent (and a checksum after
each piece, where they are compared). Contiguous parts go from array memory to array memory.
"""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np

from pipelines.reshard_links import Links, ReshardError, connect
from pipelines.reshard_pieces import Box, Route, Schedule, cut
from pipelines.reshard_stores import DeviceStore, HostStore, shape_of

WIRE_BYTES = 8 * 2**20
"""What is staged at most for a piece that is not contiguous."""


class Wire:
    """Sends and receives in the background; see the module."""

    def __init__(
        self,
        schedule: Schedule,
        store: HostStore | DeviceStore,
        sums: Any,
        *,
        budget_bytes: float,
        deadline_seconds: float,
    ):
        self._schedule, self._store, self._sums = schedule, store, sums
        self._deadline_seconds = deadline_seconds
        here = jax.process_index()
        self._out: dict[int, list[tuple[int, Route]]] = {}
        self._in: dict[int, list[tuple[int, Route]]] = {}
        self._pending = [0] * len(schedule.moves)
        self._needed = False
        for number, piece in enumerate(schedule.pieces):
            for route in piece.routes:
                if not route.crosses:
                    continue
                self._needed = True
                sender, receiver = route.sender.process_index, route.receivers[0].process_index
                if here in (sender, receiver):
                    self._pending[piece.leaf] += 1
                    side, peer = (self._out, receiver) if here == sender else (self._in, sender)
                    side.setdefault(peer, []).append((number, route))
        ways = max(len(self._out) + len(self._in), 1)
        self._chunk_bytes = min(WIRE_BYTES, budget_bytes / (2 * ways))
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._links: Links | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Wire:
        if self._needed:
            self._links = connect(self._deadline_seconds)
            moves = self._schedule.moves
            what = f"move of {len(moves)} leaves ({moves[0].path}, ...)"
            self._links.meet(self._schedule.fingerprint(), what, deadline_seconds=self._deadline_seconds)
            for side, work in ((self._out, self._send), (self._in, self._receive)):
                for peer, routes in side.items():
                    thread = threading.Thread(target=self._run, args=(work, self._links, peer, routes), daemon=True)
                    self._threads.append(thread)
                    thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._links is not None:
            self._links.close(f"this process failed: {error}")
        for thread in self._threads:
            thread.join()

    def wait(self, leaf: int) -> None:
        """Wait until this process has sent and received all of a leaf.

        Raises:
            ReshardError: a peer is gone or stands still.
        """
        with self._changed:
            # Each thread gives up by itself when its peer does nothing until the deadline.
            self._changed.wait_for(lambda: self._failure is not None or self._pending[leaf] == 0)
            if self._failure is not None:
                raise ReshardError(str(self._failure)) from self._failure

    def _run(self, work: Any, links: Links, peer: int, routes: list[tuple[int, Route]]) -> None:
        try:
            for number, route in routes:
                work(links, peer, number, route)
                with self._changed:
                    self._pending[self._schedule.pieces[number].leaf] -= 1
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  raised again by `wait`, on the caller's thread
            links.close(str(error))
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _send(self, links: Links, peer: int, number: int, route: Route) -> None:
        piece = self._schedule.pieces[number]
        for box in self._parts(number):
            values = self._store.read(piece.leaf, route.sender, box)
            links.send(peer, _memory(np.ascontiguousarray(values)), self._name(number))
        if self._sums is not None:
            checksum = int(self._sums.of_piece(number, route.sender))
            links.send(peer, memoryview(checksum.to_bytes(4, "big")), self._name(number))

    def _receive(self, links: Links, peer: int, number: int, route: Route) -> None:
        piece = self._schedule.pieces[number]
        dtype = self._schedule.moves[piece.leaf].dtype
        for box in self._parts(number):
            hole = self._store.hole(piece.leaf, route.receivers[0], box)
            values = np.empty(shape_of(box), dtype) if hole is None else hole
            links.receive_into(peer, _memory(values), self._name(number))
            if hole is None:
                self._store.write(piece.leaf, route.receivers, box, values)
        if self._sums is not None:
            checksum = bytearray(4)
            links.receive_into(peer, memoryview(checksum), self._name(number))
            self._sums.received(number, int.from_bytes(checksum, "big"))

    def _parts(self, number: int) -> list[Box]:
        piece = self._schedule.pieces[number]
        return cut(piece.box, self._schedule.moves[piece.leaf].dtype.itemsize, self._chunk_bytes)

    def _name(self, number: int) -> str:
        return f"{self._schedule.moves[self._schedule.pieces[number].leaf].path} between processes"


def _memory(values: np.ndarray[Any, Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
