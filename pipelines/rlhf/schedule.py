"""Runs tasks that need devices, in an order that every process shares; what needs no common device overlaps.

    run_tasks([Task("move", {0, 1}, run=...), Task("score", {0, 1}, after=("move",), run=...), Task("other", {2}, ...)])

On every device tasks run in the order of the list, whatever takes how long: a task begins when those it waits for are
done, and no earlier one that shares a device with it is left. Programs whose devices wait for each other (collectives)
therefore never meet half-way. What is started depends on the list alone, and not on the clock, where several processes
run it: there tasks begin together and are waited for together, a *wave* at a time.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to do.

    Attributes:
        name: unique in its list.
        devices: numbers of the devices that it keeps busy; none for what runs on the host.
        run: does it, in the caller's thread if there are no devices, so that signals and timers work there. None where
            this process has no part in it.
        after: names of tasks that it waits for.
        share: called in the caller's thread when it is done, on every process, in the order of the list.
    """

    name: str
    devices: frozenset[int]
    run: Callable[[], None] | None
    after: tuple[str, ...] = ()
    share: Callable[[BaseException | None], None] | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """When a task ran on this process: seconds since the list was begun."""

    name: str
    start: float
    end: float


def run_tasks(tasks: Sequence[Task], *, waves: bool = False) -> list[Span]:
    """Run all tasks; return when each ran.

    A task that fails lets those that run end, and begins no other; its exception is raised with a note that names it.

    Args:
        tasks: every one after those it waits for.
        waves: start tasks together and wait for all of them before others start: what several processes need, whose
            clocks differ.

    Raises:
        ValueError: a task waits for one that is not before it in the list.
    """
    known: set[str] = set()
    for task in tasks:
        if missing := [name for name in task.after if name not in known]:
            raise ValueError(f"task {task.name!r} waits for {missing[0]!r}, which is not before it")
        known.add(task.name)
    began = time.perf_counter()
    spans: dict[str, Span] = {}
    left, done = list(tasks), set[str]()
    running: dict[futures.Future[None], Task] = {}

    def timed(task: Task) -> None:
        start = time.perf_counter()
        try:
            if task.run is not None:
                task.run()
        except BaseException as error:
            error.add_note(f"while running {task.name!r}")
            raise
        finally:
            spans[task.name] = Span(task.name, start - began, time.perf_counter() - began)

    def finish(task: Task, error: BaseException | None) -> None:
        if task.share is not None:
            task.share(error)
        if error is not None:
            raise error
        done.add(task.name)

    with contextlib.ExitStack() as stack:
        # Leaving it waits for what still runs.
        pool = stack.enter_context(futures.ThreadPoolExecutor(max(len(tasks), 1), thread_name_prefix="call"))
        while left or running:
            ready = _ready(left, done, [task for task in running.values()])
            for task in ready:
                left.remove(task)
            here = [task for task in ready if not task.devices]
            away = [task for task in ready if task.devices]
            if not running and not here and len(away) == 1:  # nothing can start before it ends: no thread is needed
                here, away = away, []
            running |= {pool.submit(timed, task): task for task in away}
            failed: dict[str, BaseException] = {}
            for task in here:
                try:
                    timed(task)
                except BaseException as error:
                    if not waves:
                        raise
                    failed[task.name] = error
            ended: dict[str, tuple[Task, BaseException | None]] = {
                task.name: (task, failed.get(task.name)) for task in here
            }
            if running:
                when = futures.ALL_COMPLETED if waves else futures.FIRST_COMPLETED
                timeout = 0 if here and not waves else None
                for future in futures.wait(running, timeout, return_when=when).done:
                    task = running.pop(future)
                    ended[task.name] = task, future.exception()
            for task in tasks:
                if task.name in ended:
                    finish(*ended[task.name])
    return [spans[task.name] for task in tasks]


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
