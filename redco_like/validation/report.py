"""What a validation found, as a table, a record and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from redco_like.validation.rankings import spearman

Split = Literal["fitted", "left out"]
FITTED_BAR, LEFT_OUT_BAR, MEMORY_BAR, REGRET_BAR, SPEARMAN_BAR = 0.08, 0.15, 0.08, 0.03, 0.9


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: what was measured and what is estimated.

    Attributes:
        case: what is computed, whatever the plan: vocabulary, length and batch.
        seconds, estimate: of a step, measured and analytic.
        memory_bytes, memory_estimate: of the fullest device, where it was measured.
        parts: share of the estimate by part.
        doubt: why the measurement itself is in doubt; "" where it is not.
    """

    row: str
    source: str
    group: str
    split: Split
    model: str
    case: str
    accelerator: str
    devices: int
    plan: str
    dense: bool
    seconds: float
    estimate: float
    memory_bytes: float | None
    memory_estimate: float | None
    fits: bool
    parts: dict[str, float]
    doubt: str = ""

    @property
    def error(self) -> float:
        return self.estimate / self.seconds - 1

    @property
    def memory_error(self) -> float:
        assert self.memory_bytes is not None
        assert self.memory_estimate is not None
        return self.memory_estimate / self.memory_bytes - 1


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of some runs' step times.

    Attributes:
        mean: mean absolute error.
        bias: mean error; above 0 where estimates are too long.
        median, largest: of the absolute errors.
        rank: Spearman correlation of estimates and measurements.
    """

    name: str
    split: Split
    runs: int
    mean: float
    bias: float
    median: float
    largest: float
    rank: float


@dataclasses.dataclass(frozen=True)
class RankErrors:
    """Plans of one model: regret of the plan that looks fastest, and the correlation of ranks."""

    name: str
    plans: int
    regret: float
    rank: float
    error: float


@dataclasses.dataclass(frozen=True)
class Bar:
    """A limit that the cost model is held to.

    Attributes:
        value: measured against `limit`; it is met from below, or from above with `at_least`.
        reason: why it is missed.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    reason: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        text = f"{self.name}: {_number(self.value)}, {sign} {_number(self.limit)}"
        return text if self.met or not self.reason else f"{text}; {self.reason}"


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of its own: what else was compared, and why it is off.

    Attributes:
        rows: cells in the order of `columns`; shares are numbers, in a table shown in per cent.
        notes: a line each.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        table = _table(self.title, self.columns)
        for row in self.rows:
            table.add_row(*(_cell(x) for x in row))
        table.caption = "\n".join(self.notes) or None
        table.caption_justify = "left"
        return table


@dataclasses.dataclass(frozen=True)
class ValidationReport:
    """Estimates against published runs.

    Attributes:
        points: every run that could be estimated.
        skipped: reason -> number of rows left.
        groups, sources: errors by group, and by source and accelerator.
        memory: group -> mean absolute error of memory, and number of runs.
        rankings: plans of one model in the right order?
        schedules: (what, plans in the order of their measured times, pairs in the right order, pairs).
        constants: rows of the fitted constants: field, scope, framework, value, low, high.
        bars: what the cost model is held to.
        constants_file: what `search/efficiencies.toml` would hold.
        sections: other comparisons: inference, memory by plan.
    """

    points: tuple[Point, ...]
    skipped: dict[str, int]
    groups: tuple[Errors, ...]
    sources: tuple[Errors, ...]
    memory: dict[str, tuple[float, int]]
    rankings: tuple[RankErrors, ...]
    schedules: tuple[tuple[str, int, int], ...]
    constants: tuple[tuple[str, str, str, float, float, float], ...]
    bars: tuple[Bar, ...]
    constants_file: str = dataclasses.field(repr=False, default="")
    sections: tuple[Section, ...] = ()

    @property
    def missed(self) -> list[Bar]:
        return [bar for bar in self.bars if not bar.met]

    def worst(self, n: int = 10) -> list[Point]:
        """Runs with the largest errors."""
        return sorted(self.points, key=lambda p: -abs(math.log(p.estimate / p.seconds)))[:n]

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "constants_file"}
        for name in ("points", "groups", "sources", "rankings", "sections"):
            record[name] = [dataclasses.asdict(x) for x in record[name]]
        record["bars"] = [dataclasses.asdict(bar) | {"met": bar.met} for bar in self.bars]
        record["missed"] = [str(bar) for bar in self.missed]
        record["constants"] = [
            dict(zip(("field", "scope", "framework", "value", "low", "high"), c, strict=True)) for c in self.constants
        ]
        record["label"] = "analytic estimates against measured runs"
        return _without_nan(record)

    def to_json(self) -> str:
        return json.dumps(self.to_record(), indent=1)

    def table(self) -> RenderableType:
        """Tables of errors by group and source, memory, order of plans, worst runs, and bars."""
        parts: list[RenderableType] = [self._errors("Step time by group", self.groups)]
        parts.append(self._errors("By source and accelerator", self.sources))
        if self.memory:
            table = _table("Memory of the fullest device", ("group", "runs", "mean error"))
            for name, (error, runs) in self.memory.items():
                table.add_row(name, str(runs), f"{error:.1%}")
            parts.append(table)
        if self.rankings or self.schedules:
            table = _table("Order of plans", ("plans of", "plans", "regret", "rank correlation", "mean error"))
            for r in self.rankings:
                table.add_row(r.name, str(r.plans), f"{r.regret:.1%}", f"{r.rank:.2f}", f"{r.error:.1%}")
            for name, right, pairs in self.schedules:
                table.add_row(name, f"{right} of {pairs} pairs right", "", "", "")
            parts.append(table)
        parts += [section.table() for section in self.sections]
        table = _table("Worst runs", ("source", "run", "plan", "measured s", "estimate s", "error"))
        for p in self.worst():
            run = f"{p.model} on {p.devices} {p.accelerator}"
            table.add_row(p.source, run, p.plan, f"{p.seconds:.3g}", f"{p.estimate:.3g}", f"{p.error:+.0%}")
        parts.append(table)
        table = _table("Bars", ("", "bar"))
        for bar in self.bars:
            table.add_row("met" if bar.met else "[bold red]missed[/]", str(bar))
        parts.append(table)
        return Group(*parts)

    def __rich__(self) -> RenderableType:
        return self.table()

    def _errors(self, title: str, rows: tuple[Errors, ...]) -> Table:
        table = _table(title, ("", "split", "runs", "mean error", "median", "bias", "largest", "rank correlation"))
        for e in rows:
            numbers = (f"{e.mean:.1%}", f"{e.median:.1%}", f"{e.bias:+.1%}", f"{e.largest:.0%}")
            table.add_row(e.name, e.split, str(e.runs), *numbers, f"{e.rank:.2f}")
        return table

    def plot(self, path: str | pathlib.Path) -> None:
        """Draw estimates against measurements: with matplotlib where it is installed, else SVG by hand.

        Raises:
            ValueError: no matplotlib, and a file that is not SVG.
        """
        from redco_like.validation.picture import scatter

        scatter(self.points, pathlib.Path(path))


def errors(name: str, split: Split, points: list[Point]) -> Errors:
    """Errors of some runs."""
    e = np.array([p.error for p in points])
    estimates, measured = np.array([[p.estimate, p.seconds] for p in points]).T
    size = np.abs(e)
    return Errors(
        name,
        split,
        len(points),
        float(size.mean()),
        float(e.mean()),
        float(np.median(size)),
        float(size.max()),
        spearman(estimates, measured),
    )


def _without_nan(x: Any) -> Any:
    """JSON has no NaN: the correlation of a single run is null."""
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        right = column in ("runs", "mean error", "median", "bias", "largest", "rank correlation", "regret", "error")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _cell(x: str | int | float) -> str:
    return f"{x:.1%}" if isinstance(x, float) else str(x)


def _number(value: float) -> str:
    return f"{value:.1%}" if abs(value) < 10 and not float(value).is_integer() else f"{value:g}"
