"""Numbers of a run: a JSONL file always, other writers as extras, and a progress line that costs nothing to ignore.

log = MetricsLog("runs/lm", writers=("tensorboard",))
with log, Progress(1000, unit="tokens", units_per_step=8192) as bar:
    log.write(step, {"train/loss": 2.31})
    bar.update(step, {"loss": 2.31})
"""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

FILE_NAME = "metrics.jsonl"
_RESERVED = ("step", "seconds", "unix_seconds", "nonfinite")


class Writer(Protocol):
    """Where metrics go besides the JSONL file; pass an object of this kind in `writers` to add one."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Writes metrics to `folder/metrics.jsonl`, one JSON object a line, and to the other writers that are named.

    Each line has `step`, `seconds` since the log was opened, `unix_seconds`, and the metrics. Numbers that JSON cannot
    hold are `null`, and `nonfinite` says what they were. A run that goes on appends to the file.

    Args:
        folder: created if missing; None writes to the other writers only.
        writers: `"jsonl"` (always on), `"tensorboard"`, `"wandb"`, `"trackio"`, or objects with `write` and `close`.
        run_name: name of the run for wandb and trackio; default the folder's name.
        config: settings that wandb and trackio show beside the run.
        active: False writes nothing: for every process but the first.

    Raises:
        ValueError: an unknown writer.
        ImportError: a writer whose package is not installed; says which extra installs it.
    """

    def __init__(
        self,
        folder: str | pathlib.Path | None,
        writers: Sequence[str | Writer] = ("jsonl",),
        *,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        unknown = [writer for writer in writers if isinstance(writer, str) and writer not in ("jsonl", *_WRITERS)]
        if unknown:
            raise ValueError(f"unknown metrics writer {unknown[0]!r}; there are jsonl, {', '.join(_WRITERS)}")
        folder = None if folder is None else pathlib.Path(folder)
        name = run_name or (folder.absolute().name if folder else "run")
        self._start = time.monotonic()
        self._file: IO[str] | None = None
        self._writers: list[Writer] = []
        if not active:
            return
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for writer in writers:
            if not isinstance(writer, str):
                self._writers.append(writer)
            elif writer != "jsonl":
                self._writers.append(_WRITERS[writer](folder or pathlib.Path("."), name, dict(config or {})))
        if folder is not None:
            self._file = _open_appending(folder / FILE_NAME)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the metrics of a step; values are numbers or scalar arrays (reading one off a device waits for it)."""
        clash = sorted(set(values) & set(_RESERVED))
        if clash:
            raise ValueError(f"a metric cannot be called {clash[0]!r}: each line has a field of that name already")
        numbers = {name: float(value) for name, value in values.items()}
        if self._file is not None:
            json.dump(self._record(step, numbers), self._file, allow_nan=False)
            self._file.write("\n")
            self._file.flush()
        for writer in self._writers:
            writer.write(step, numbers)

    def close(self) -> None:
        for closable in (self._file, *self._writers):
            if closable is not None:
                closable.close()
        self._file, self._writers = None, []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, step: int, numbers: Mapping[str, float]) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": int(step),
            "seconds": round(time.monotonic() - self._start, 3),
            "unix_seconds": round(time.time(), 3),
        }
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        nonfinite = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
        return record | ({"nonfinite": nonfinite} if nonfinite else {})


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Read a metrics file (or the one in a folder), in the order written.

    A run that was killed and went on from a checkpoint wrote some steps twice; both lines are returned.
    """
    path = pathlib.Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()]


class Progress:
    """Shows step, metrics, rate and time left: a bar on a terminal, else a plain line from time to time.

    `update` returns at once (about a microsecond) unless it is time to show something, and starts no thread.

    Args:
        total_steps: last step of the run.
        description: what is running.
        unit: what the rate counts, such as "tokens" or "examples".
        units_per_step: how many of them a step has.
        seconds_between: time between two showings; default 0.25 on a terminal and 10 elsewhere.
        stream: where to write; default standard error.
        active: False shows nothing: for every process but the first.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        description: str = "train",
        unit: str = "examples",
        units_per_step: float = 1.0,
        seconds_between: float | None = None,
        stream: IO[str] | None = None,
        active: bool = True,
    ):
        self._total, self._description = total_steps, description
        self._unit, self._units_per_step = unit, units_per_step
        self._console = Console(file=stream or sys.stderr)
        self._plain = not self._console.is_terminal
        self._every = seconds_between if seconds_between is not None else (10.0 if self._plain else 0.25)
        self._active = active
        self._next = 0.0 if active else math.inf
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None
        self._steps_per_second = 0.0
        self._values: Mapping[str, Any] = {}
        self._shown_step = -1
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> bool:
        """Say that `step` steps are done. Returns True if it was shown.

        Args:
            step: steps done.
            values: what to show beside it: numbers or scalar arrays, read only if shown. Default what was given last.
        """
        if values is not None:
            self._values = values
        now = time.monotonic()
        if now < self._next:
            return False
        self._show(step, now)
        return True

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._active:
            self._print(text)

    def close(self, step: int | None = None) -> None:
        """Show the last step and take the bar down."""
        if self._active and step is not None and step != self._shown_step:
            self._show(step, time.monotonic())
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._active, self._next = False, math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, step: int) -> str:
        """The text shown at a step: metrics, rate and time left."""
        parts = [f"{name} {_number(float(value))}" for name, value in self._values.items()]
        if self._steps_per_second > 0:
            parts.append(f"{self._steps_per_second * self._units_per_step:,.0f} {self._unit}/s")
            if step < self._total:
                parts.append(f"{_duration((self._total - step) / self._steps_per_second)} left")
        return "  ".join(parts)

    def _show(self, step: int, now: float) -> None:
        if self._first is None:
            self._first = self._last = (now, step)  # the first step holds the compilation: the rate counts from here
        elif self._last is not None and step > self._last[1] and now > self._last[0]:
            recent = (step - self._last[1]) / (now - self._last[0])
            whole = (step - self._first[1]) / (now - self._first[0])
            weight = 0.3 if self._steps_per_second else 1.0
            self._steps_per_second = (1 - weight) * (self._steps_per_second or whole) + weight * recent
            self._last = (now, step)
        self._shown_step = step
        text = self.line(step)
        if self._plain:
            self._print(f"{self._description} {step}/{self._total}  {text}".rstrip())
        else:
            if self._bar is None:
                self._bar = _bar(self._console)
                self._bar.start()
                self._task = self._bar.add_task(self._description, total=self._total, text="")
            self._bar.update(self._task, completed=step, text=text)
            self._bar.refresh()
        self._next = now + self._every

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console) -> RichProgress:
    text = TextColumn("{task.fields[text]}")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), text)
    return RichProgress(*columns, console=console, auto_refresh=False)


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}" if not value.is_integer() else f"{value:.0f}"
    return f"{value:.2e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _open_appending(path: pathlib.Path) -> IO[str]:
    """Open a file of lines for appending, after cutting off a line that a killed process left half-written."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    return path.open("a", encoding="utf-8")


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the metrics writer {extra!r} needs the package {module}: pip install 'redco-like[{extra}]'"
        ) from error


class _TensorBoard:
    def __init__(self, folder: pathlib.Path, name: str, config: Mapping[str, Any]):
        del name, config
        self._writer = _import("tensorboardX", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run of wandb, or of trackio, which has the same calls."""

    def __init__(self, module: str, folder: pathlib.Path, name: str, config: Mapping[str, Any]):
        self._module = _import(module, module)
        where = {"dir": str(folder)} if module == "wandb" else {}
        self._module.init(project="redco-like", name=name, config=dict(config), **where)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def _wandb(folder: pathlib.Path, name: str, config: Mapping[str, Any]) -> Writer:
    return _Run("wandb", folder, name, config)


def _trackio(folder: pathlib.Path, name: str, config: Mapping[str, Any]) -> Writer:
    return _Run("trackio", folder, name, config)


_WRITERS: dict[str, Callable[[pathlib.Path, str, Mapping[str, Any]], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}
