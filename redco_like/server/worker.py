"""The engine in a thread of its own, and its events brought to those who wait for them in the event loop.

    worker = EngineWorker(engine)
    worker.start()                                   # in a running event loop
    box = Mailbox(2)
    worker.submit(tokens, params, box, 0)
    async for part in box: ...                       # tokens that have come since the last one

A mailbox joins what comes while its reader is busy, so that a slow client holds nothing up: what waits for it is at
most its own answer. The engine's thread never waits for the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

logger = logging.getLogger(__name__)
JOIN_SECONDS = 10.0


class EngineLike(Protocol):
    """What is asked of an engine; `redco_like.Engine` is one."""

    length: int
    eos: tuple[int, ...]

    def submit(self, prompt: Sequence[int], params: Any) -> int: ...
    def cancel(self, request: int) -> None: ...
    def step(self) -> list[Any]: ...
    def stats(self) -> Any: ...
    @property
    def idle(self) -> bool: ...


class EngineFailed(RuntimeError):
    """The engine's thread has ended with an exception."""


@dataclasses.dataclass
class Part:
    """What has come for one sequence since the last part.

    Attributes:
        index: of the sequence in its mailbox.
        logprobs: one per token, or none at all.
        finish: why it ended; None while it goes on.
        error: what went wrong where finish is "error".
    """

    index: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None
    error: str = ""


class Mailbox:
    """Where the sequences of one HTTP request arrive; read in the event loop by one reader."""

    def __init__(self, count: int):
        self._left = count
        self._waiting: dict[int, Part] = {}
        self._event = asyncio.Event()

    def put(self, index: int, tokens: Sequence[int], logprobs: Sequence[float], finish: str | None, error: str) -> None:
        part = self._waiting.setdefault(index, Part(index))
        part.tokens += tokens
        part.logprobs += logprobs
        part.finish, part.error = finish, error
        self._event.set()

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> list[Part]:
        """All parts that wait; until every sequence has ended."""
        if not self._left:
            raise StopAsyncIteration
        await self._event.wait()
        self._event.clear()
        parts, self._waiting = list(self._waiting.values()), {}
        self._left -= sum(part.finish is not None for part in parts)
        return parts


@dataclasses.dataclass
class _Open:
    box: Mailbox
    index: int
    accepted: float
    first: float = 0.0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of a sequence that has ended by itself: seconds to its first token, per token after it, and in all."""

    first: float
    each: float | None
    whole: float
    tokens: int


class EngineWorker:
    """Runs an engine. All methods are called in the event loop; the thread touches the engine alone.

    Attributes:
        engine: what is run.
        failure: the exception that ended the thread; None while it runs.
        on_first: called with seconds when a sequence has its first token; on_end: with its `Timing`.
    """

    def __init__(self, engine: EngineLike):
        self.engine = engine
        self.failure: BaseException | None = None
        self.on_first: Callable[[float], None] = lambda seconds: None
        self.on_end: Callable[[Timing], None] = lambda timing: None
        self._open: dict[int, _Open] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def open(self) -> int:
        """Sequences that somebody waits for."""
        return len(self._open)

    @property
    def running(self) -> bool:
        return self._thread is not None and self.failure is None

    def start(self) -> None:
        """Begin; in a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Give up what is open, and end the thread."""
        self.cancel(list(self._open))
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    def submit(self, prompt: Sequence[int], params: Any, box: Mailbox, index: int) -> int:
        """Queue one sequence, whose parts go to a mailbox under an index.

        Raises:
            EngineFailed: the engine has stopped.
            ValueError: as `Engine.submit`.
        """
        if self.failure is not None:
            raise EngineFailed(f"the engine has stopped: {self.failure}") from self.failure
        request = self.engine.submit(prompt, params)
        self._open[request] = _Open(box, index, time.perf_counter())
        self._notify()
        return request

    def cancel(self, requests: Sequence[int]) -> None:
        """Give sequences up; those that have ended are left as they are."""
        for request in requests:
            if self._open.pop(request, None) is not None:
                self.engine.cancel(request)
        self._notify()

    def abandon(self, reason: str) -> None:
        """Give everything up, and tell those who wait why."""
        for request in self._open:
            self.engine.cancel(request)
        self._end_all("cancelled", reason)
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    # The thread.

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while True:
                with self._wake:
                    while self.engine.idle and not self._stopping:
                        self._wake.wait()
                    if self._stopping:
                        return
                if events := self.engine.step():
                    self._tell(self._deliver, events)
        except BaseException as error:
            logger.exception("the engine has stopped")
            self.failure = error
            self._tell(self._fail, error)

    def _tell(self, function: Callable[[Any], None], what: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, what)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            self._stopping = True

    # In the loop again.

    def _deliver(self, events: list[Any]) -> None:
        now = time.perf_counter()
        for event in events:
            entry = self._open.get(event.request)
            if entry is None:  # cancelled
                continue
            if event.tokens and not entry.tokens:
                entry.first = now
                self.on_first(now - entry.accepted)
            entry.tokens += len(event.tokens)
            entry.box.put(entry.index, event.tokens, event.logprobs or (), event.finish, getattr(event, "error", ""))
            if event.finish is not None:
                del self._open[event.request]
                if entry.tokens and event.finish in ("stop", "length"):
                    each = (now - entry.first) / (entry.tokens - 1) if entry.tokens > 1 else None
                    self.on_end(Timing(entry.first - entry.accepted, each, now - entry.accepted, entry.tokens))

    def _fail(self, error: BaseException) -> None:
        self._end_all("error", f"the engine has stopped: {error}")

    def _end_all(self, finish: str, reason: str) -> None:
        entries, self._open = self._open, {}
        for entry in entries.values():
            entry.box.put(entry.index, (), (), finish, reason)
