"""Connections between the processes of a run: bytes straight into a buffer, and an error in place of a hang.

    links = connect(deadline_seconds=120)              # every process, once; the same object from then on
    links.meet(digest, "reshard of 120 leaves")        # every process; raises where a peer does something else
    links.send(1, view); links.receive_into(0, view)

Plain TCP, one connection per pair of processes, a thread per direction is up to the caller. Addresses are exchanged by
one gather over JAX's own channel. A process that dies closes its connections, which the others see at once; one that
stands still is seen after the deadline. After an error all connections are closed, so that every peer learns of it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_ADDRESS_BYTES = 1024


class ReshardError(RuntimeError):
    """A move that did not end well: a process that is not there or does something else, or wrong bytes."""


class Links:
    """Connections of this process to all others."""

    def __init__(self, sockets: dict[int, socket.socket], deadline_seconds: float):
        self._sockets = sockets
        self.deadline_seconds = deadline_seconds
        self._meetings = 0
        self.broken = ""

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(sorted(self._sockets))

    def meet(self, digest: bytes, what: str, *, deadline_seconds: float | None = None) -> None:
        """Wait until every process is here, for the same thing.

        Args:
            digest: 32 bytes that say what for.
            what: for the message.
            deadline_seconds: of this wait and of everything until the next one.

        Raises:
            ReshardError: a process is gone, does not come within the deadline, or has come for something else.
        """
        if deadline_seconds is not None:
            self.deadline_seconds = deadline_seconds
        self._meetings += 1
        mine = struct.pack("!q", self._meetings) + digest
        for peer in self.peers:
            self.send(peer, memoryview(mine), what)
        for peer in self.peers:
            theirs = bytearray(len(mine))
            self.receive_into(peer, memoryview(theirs), what)
            if bytes(theirs) != mine:
                self.close(f"process {peer} came for another move")
                raise ReshardError(
                    f"{what}: process {peer} moves something else (its move {struct.unpack('!q', theirs[:8])[0]}, here "
                    f"move {self._meetings}); all processes call the same moves in the same order with the same trees"
                )

    def send(self, peer: int, view: memoryview, what: str = "") -> None:
        """Send all bytes.

        Raises:
            ReshardError: the peer is gone, or takes nothing for the deadline.
        """
        try:
            connection = self._socket(peer, what)
            # The deadline is of a standstill, not of the whole: a large buffer may take longer.
            connection.settimeout(self.deadline_seconds)
            view = view.cast("B")
            sent = 0
            while sent < len(view):
                sent += connection.send(view[sent : sent + 2**22])
        except OSError as error:
            raise self._gone(peer, what, error) from error

    def receive_into(self, peer: int, view: memoryview, what: str = "") -> None:
        """Fill the buffer.

        Raises:
            ReshardError: the peer is gone, or sends nothing for the deadline.
        """
        try:
            connection = self._socket(peer, what)
            connection.settimeout(self.deadline_seconds)
            view = view.cast("B")
            got = 0
            while got < len(view):
                n = connection.recv_into(view[got:])
                if n == 0:
                    raise ConnectionResetError("it closed the connection")
                got += n
        except OSError as error:
            raise self._gone(peer, what, error) from error

    def close(self, why: str) -> None:
        """Close all connections; every peer that waits for this process sees it at once."""
        self.broken = self.broken or why
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _socket(self, peer: int, what: str) -> socket.socket:
        if self.broken:
            raise ReshardError(f"{what}: no connection to process {peer} any more: {self.broken}")
        return self._sockets[peer]

    def _gone(self, peer: int, what: str, error: OSError) -> ReshardError:
        first = self.broken
        if isinstance(error, TimeoutError):
            reason = f"process {peer} did nothing for {self.deadline_seconds:g} s"
        else:
            reason = f"process {peer} is gone ({error})"
        self.close(reason)
        return ReshardError(f"{what or 'a move'}: {first or reason}")


_lock = threading.Lock()
_links: Links | None = None


def connect(deadline_seconds: float) -> Links:
    """Connect all processes of the run; every process calls it. Later calls return the first one's connections.

    Raises:
        ReshardError: a process does not come within the deadline.
    """
    global _links
    with _lock:
        if _links is None or _links.broken:
            if _links is not None:
                raise ReshardError(f"connections between the processes are closed: {_links.broken}; start the run anew")
            _links = _connect(deadline_seconds)
        return _links


def _connect(deadline_seconds: float) -> Links:
    me, count = jax.process_index(), jax.process_count()
    deadline = time.monotonic() + deadline_seconds
    server = _listen()
    with server:
        hello = {
            "port": server.getsockname()[1],
            "host": socket.gethostname(),
            "addresses": _own_addresses(),
            "secret": secrets.token_hex(16),
        }
        row = np.zeros(_ADDRESS_BYTES, np.uint8)
        data = json.dumps(hello).encode()
        row[: len(data)] = np.frombuffer(data, np.uint8)
        rows = _within(
            deadline_seconds,
            "addresses of all processes",
            lambda: np.asarray(multihost_utils.process_allgather(row)).reshape(count, -1),
        )
        peers = [json.loads(bytes(r).rstrip(b"\0")) for r in rows]
        secret = "".join(peer["secret"] for peer in peers).encode()
        sockets: dict[int, socket.socket] = {}
        for other in range(me):
            sockets[other] = _reach(peers[other], peers[me]["host"], me, other, secret, deadline)
        while len(sockets) < count - 1:
            missing = [i for i in range(count) if i != me and i not in sockets]
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise ReshardError(
                    f"processes {missing} did not connect to process {me} within {deadline_seconds:g} s"
                ) from None
            who = _answer(connection, secret, missing, deadline)
            if who is not None:
                sockets[who] = connection
    for connection in sockets.values():
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Links(sockets, deadline_seconds)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_addresses() -> list[str]:
    """Addresses under which other hosts may reach this one, best guess first."""
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it only picks the interface of the default route
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(found))[:6]


def _reach(peer: dict[str, Any], my_host: str, me: int, other: int, secret: bytes, deadline: float) -> socket.socket:
    """Connect to a process that listens; the one of several addresses under which it proves to know the secret."""
    addresses = [*(["127.0.0.1"] if peer["host"] == my_host else []), *peer["addresses"]]
    reason = "it has no address"
    while time.monotonic() < deadline:
        for address in addresses:
            left = max(min(10.0, deadline - time.monotonic()), 0.1)
            connection = None
            try:
                connection = socket.create_connection((address, peer["port"]), timeout=left)
                connection.sendall(struct.pack("!i", me) + _proof(secret, me))
                answer = _read(connection, 32)
                if hmac.compare_digest(answer, _proof(secret, other)):
                    return connection
                reason = f"{address} is another program"
            except OSError as error:
                reason = f"{address}: {error}"
            if connection is not None:
                connection.close()
        time.sleep(0.1)
    raise ReshardError(f"process {me} cannot connect to process {other} at {', '.join(addresses)}: {reason}")


def _answer(connection: socket.socket, secret: bytes, missing: list[int], deadline: float) -> int | None:
    """Check who connects; None, and closed, if it is a stranger."""
    connection.settimeout(max(min(10.0, deadline - time.monotonic()), 0.1))
    with contextlib.suppress(OSError):
        who = struct.unpack("!i", _read(connection, 4))[0]
        if who in missing and hmac.compare_digest(_read(connection, 32), _proof(secret, who)):
            connection.sendall(_proof(secret, jax.process_index()))
            return who
    connection.close()
    return None


def _proof(secret: bytes, process: int) -> bytes:
    return hmac.digest(secret, struct.pack("!i", process), "sha256")


def _read(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        part = connection.recv(n - len(data))
        if not part:
            raise ConnectionResetError("it closed the connection")
        data += part
    return data


def _within(seconds: float, what: str, function: Callable[[], Any]) -> Any:
    """Call a function that waits for other processes and has no deadline of its own."""
    result: list[Any] = []
    failure: list[Exception] = []

    def call() -> None:
        try:
            result.append(function())
        except Exception as error:  # noqa: BLE001  it is raised again below, on the caller's thread
            failure.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise ReshardError(f"{what}: {failure[0]}") from failure[0]
    if not result:
        raise ReshardError(f"{what}: not all there after {seconds:g} s")
    return result[0]
