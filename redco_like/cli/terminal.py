"""Where output goes: tables on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

WAIT_SECONDS = 1.0
"""What is done sooner shows no progress."""
FILE_WIDTH = 120
"""Columns where stdout is no terminal and COLUMNS does not say."""


class UsageError(ValueError):
    """Bad input: the message is shown alone, and the exit code is 2."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turn a ValueError or OSError of what reads the user's input into a UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Terminal:
    """Consoles of stdout and stderr."""

    out: Console
    err: Console

    @classmethod
    def open(cls) -> Terminal:
        wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
        return cls(Console(file=sys.stdout, width=wide, highlight=False), Console(file=sys.stderr, highlight=False))

    def print(self, *what: Any) -> None:
        """Print tables, and text with rich's markup."""
        self.out.print(*what)

    def line(self, text: str) -> None:
        """Print a line as it is; the terminal wraps it."""
        self.out.print(text, markup=False, soft_wrap=True)

    def json(self, record: Any) -> None:
        """Print one JSON object; numbers that are not finite become null."""
        sys.stdout.write(json.dumps(_plain(record), indent=2, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show what is being done and for how long, from the first second on, where stderr is a terminal.

        Yields a function that tells what is done next.
        """
        if not self.err.is_terminal:
            yield lambda _: None
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.err, transient=True
        )
        task = bar.add_task(what)
        lock, over = threading.Lock(), False

        def show() -> None:
            with lock:
                if not over:
                    bar.start()

        timer = threading.Timer(WAIT_SECONDS, show)
        timer.daemon = True
        timer.start()
        try:
            yield lambda text: bar.update(task, description=text)
        finally:
            timer.cancel()
            with lock:
                over = True
            bar.stop()


def check_folder(path: pathlib.Path | None) -> None:
    """Find out before the work that a file cannot be written.

    Raises:
        UsageError: its folder is missing.
    """
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file that the user named.

    Raises:
        UsageError: where it cannot be written.
    """
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
