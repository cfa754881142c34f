"""A server from its start to its end.

    run(app, host="127.0.0.1", port=8000, grace_seconds=30.0)

On SIGTERM or Ctrl-C new requests are refused with 503, those that run have the grace time to end, what is left is given
up, and the server stops. A second signal gives up what runs at once, a third one waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

GRACE_SECONDS = 30.0
LINGER_SECONDS = 0.5
"""For which answers may still be on their way after the last one has ended."""
POLL_SECONDS = 0.02
logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, with an end that lets running requests end first.

    Args:
        app: of `create_app`.
        grace_seconds: that running requests have when the server is told to stop.
        started: called when it listens.
        log_level: of uvicorn.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        grace_seconds: float = GRACE_SECONDS,
        started: Callable[[], None] | None = None,
        log_level: str = "warning",
    ):
        # What is open after the grace time has been given up already: connections need no long time of their own.
        config = uvicorn.Config(
            app, log_level=log_level, timeout_graceful_shutdown=1, lifespan="on", server_header=False, access_log=False
        )
        super().__init__(config)
        self._service = app.state.service
        self._grace, self._started = grace_seconds, started
        self._drain: asyncio.Task[None] | None = None
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._started is not None and self.started:
            self._started()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """What a signal does."""
        self._signals += 1
        if self._loop is None or self._signals > 2:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain if self._signals == 1 else self.abandon)

    def drain(self) -> None:
        """Begin to stop; in the event loop."""
        if self._drain is None:
            self._service.draining = True
            self._drain = asyncio.ensure_future(self._finish())

    def abandon(self) -> None:
        """Give up what runs, and tell its clients; in the event loop."""
        if self._service.worker.open:
            logger.warning("%d sequences are given up", self._service.worker.open)
        self._service.worker.abandon("the server is shutting down")

    async def _finish(self) -> None:
        worker, until = self._service.worker, time.monotonic() + self._grace
        while worker.open and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)
        self.abandon()
        # Streams write their last lines; clients that read them not are not waited for.
        until = time.monotonic() + LINGER_SECONDS
        while self.server_state.tasks and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, which listens when the server runs; port 0 takes a free one.

    Raises:
        OSError: the address is in use, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except BaseException:
        made.close()
        raise
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def run(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace_seconds: float = GRACE_SECONDS,
    sock: socket.socket | None = None,
    started: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal says to stop.

    Args:
        grace_seconds: that running requests have then.
        sock: of `bind`, instead of host and port.
        started: called when the server listens.
    """
    sock = sock or bind(host, port)
    with contextlib.closing(sock):
        Server(app, grace_seconds=grace_seconds, started=started).run(sockets=[sock])
