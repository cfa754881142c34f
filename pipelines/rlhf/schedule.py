"""Runs tasks that need devices, in an order that every process shares; what needs no common device overlaps.

    with Stream() as stream:
        stream.add([Task("move", {0, 1}, run=...), Task("score", {0, 1}, after=("move",), run=...), ...])
        stream.add(more)                         # may begin while the first ones still run
        spans = stream.run("score")              # until it is done

On every device tasks run in the order in which they were added, whatever takes how long: a task begins when those it
waits for are done, and no earlier one that shares a device with it is left. Programs whose devices wait for each other
(collectives) therefore never meet half-way. What is started depends on the list alone, and not on the clock, where
several processes run it: there tasks begin together and are waited for together, a *wave* at a time.
"""

from __future__ import annotations

import concurrent.futures as futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to do.

    Attributes:
        name: unique in its stream.
        devices: numbers of the devices that it keeps busy; none for what runs on the host.
        run: does it, in the caller's thread if there are no devices, so that signals and timers work there. None where
            this process has no part in it.
        after: names of tasks that it waits for.
        share: called in the caller's thread when it is done, on every process, in the order of the list, with what
            `run` raised. May raise.
    """

    name: str
    devices: frozenset[int]
    run: Callable[[], None] | None
    after: tuple[str, ...] = ()
    share: Callable[[BaseException | None], None] | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """When a task ran on this process, by `time.perf_counter`."""

    name: str
    start: float
    end: float


class Stream:
    """Tasks that are added and run in order. Use as a context, or close it.

    Args:
        waves: start tasks together and wait for all of them before others start: what several processes need, whose
            clocks differ.
    """

    def __init__(self, *, waves: bool = False):
        self._waves = waves
        self._known: dict[str, Task] = {}
        self._left: list[Task] = []
        self._running: dict[futures.Future[None], Task] = {}
        self._done: set[str] = set()
        self._spans: dict[str, Span] = {}
        self._failed: tuple[str, BaseException] | None = None
        self._pool: futures.ThreadPoolExecutor | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, tasks: Sequence[Task]) -> None:
        """Add tasks behind those that are there.

        Raises:
            ValueError: a task waits for one that is not before it.
        """
        for task in tasks:
            if missing := [name for name in task.after if name not in self._known]:
                raise ValueError(f"task {task.name!r} waits for {missing[0]!r}, which is not before it")
            self._known[task.name] = task
            self._left.append(task)

    def run(self, *names: str) -> list[Span]:
        """Run until the named tasks are done; others may still run then. Returns when each of the named ran.

        A task that fails is known by a note, and no task begins that was added after it or with it; the exception is
        raised when those it would keep from being done are asked for.
        """
        wanted = set(names)
        while not wanted <= self._done:
            lost = self._failed is not None and not any(
                task.name in wanted for task in (*self._left, *self._running.values())
            )
            if lost or not (self._left or self._running):
                error = self._failed[1] if self._failed is not None else ValueError(f"no such tasks: {sorted(wanted)}")
                self._wait()
                raise error
            self._turn()
        return [self._spans[name] for name in names]

    def forget(self, *names: str) -> None:
        """Drop what is known of tasks that are done and that nothing added later waits for."""
        for name in names:
            self._known.pop(name, None)
            self._spans.pop(name, None)
            self._done.discard(name)

    def cancel(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._left.clear()
        self._wait()
        self._failed = None

    def close(self) -> None:
        self.cancel()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _turn(self) -> None:
        """Start what can start, and take in what is done."""
        ready = _ready(self._left, self._done, list(self._running.values()))
        for task in ready:
            self._left.remove(task)
        here = [task for task in ready if not task.devices]
        away = [task for task in ready if task.devices]
        if not self._running and not here and len(away) == 1:  # nothing can start before it ends: no thread is needed
            here, away = away, []
        if away and self._pool is None:
            self._pool = futures.ThreadPoolExecutor(32, thread_name_prefix="call")
        for task in away:
            if self._pool is not None:
                self._running[self._pool.submit(self._timed, task)] = task
        ended: dict[str, tuple[Task, BaseException | None]] = {}
        for task in here:
            error = None
            try:
                self._timed(task)
            except Exception as caught:  # noqa: BLE001 (raised by `run`, when it is asked for)
                error = caught
            ended[task.name] = task, error
        if self._running:
            when = futures.ALL_COMPLETED if self._waves else futures.FIRST_COMPLETED
            timeout = 0 if here and not self._waves else None
            for future in futures.wait(self._running, timeout, return_when=when).done:
                task = self._running.pop(future)
                ended[task.name] = task, future.exception()
        for name in [name for name in self._known if name in ended]:
            self._finish(*ended[name])

    def _timed(self, task: Task) -> None:
        start = time.perf_counter()
        try:
            if task.run is not None:
                task.run()
        except BaseException as error:
            error.add_note(f"while running {task.name!r}")
            raise
        finally:
            self._spans[task.name] = Span(task.name, start, time.perf_counter())

    def _finish(self, task: Task, error: BaseException | None) -> None:
        if task.share is not None:
            try:
                task.share(error)
            except Exception as caught:  # noqa: BLE001 (as above)
                error = caught if error is None else error
        if error is None:
            self._done.add(task.name)
        elif self._failed is None:
            self._failed = task.name, error
            # Tasks that were added before it, and do not wait for it, are still worth their while.
            order = {name: i for i, name in enumerate(self._known)}
            self._left = [other for other in self._left if order[other.name] < order[task.name]]

    def _wait(self) -> None:
        """Wait for what runs; what comes of it is not looked at."""
        futures.wait(self._running)
        self._running.clear()


def _ready(left: Sequence[Task], done: set[str], running: Sequence[Task]) -> list[Task]:
    """Those that may begin now: what they wait for is done, and no earlier one needs their devices."""
    taken: set[int] = set().union(*(task.devices for task in running))
    ready = []
    for task in left:
        if all(name in done for name in task.after) and not task.devices & taken:
            ready.append(task)
        taken |= task.devices
    return ready


def no_wait(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that may wait for other processes, without a limit; see `Runner`."""
    del what
    return function(*args)
