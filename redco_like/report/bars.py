"""Stacked bars: seconds and bytes of the plans side by side, and the collectives of each mesh axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from redco_like.report.markup import Markup, digits, gib, line, rect, seconds, shorten, svg, tag, text, ticks, time_unit
from redco_like.report.words import MEMORY_PARTS, exposed, how_words, mesh_words, plan_tip
from search import Plan
from search.estimate import Estimate

ROW, BAR = 44, 18
TIME_PARTS = ("compute", "exposed", "bubble", "offload", "optimizer")


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan in a figure."""

    name: str
    plan: Plan
    estimate: Estimate


def time_parts(estimate: Estimate) -> list[tuple[str, str, float]]:
    """(kind, words, seconds) of what is on the critical path."""
    parts = [("compute", "compute", estimate.seconds.get("compute", 0.0))]
    parts += [("exposed", f"waiting for {axis}", s) for axis, s in exposed(estimate).items()]
    parts += [(k, {"bubble": "idle pipeline stages"}.get(k, k), estimate.seconds.get(k, 0.0)) for k in TIME_PARTS[2:]]
    return [part for part in parts if part[2] > 0]


def memory_parts(estimate: Estimate) -> list[tuple[str, str, float]]:
    """(kind, words, bytes per device)."""
    known = [(k, words, float(estimate.memory.get(k, 0))) for k, words in MEMORY_PARTS.items()]
    more = [("transient", k, float(size)) for k, size in estimate.memory.items() if k not in MEMORY_PARTS]
    return [part for part in known + more if part[2] > 0]


def draw_plans(rows: Sequence[Row], width: int) -> Markup:
    """Draw seconds per step and bytes per device of each plan, side by side or one below the other."""
    unit, size = time_unit(rows[0].estimate.seconds_per_step)
    most = max(max(row.estimate.high_seconds, row.estimate.seconds_per_step) for row in rows)
    room = max(max(row.estimate.bytes_per_device, row.estimate.usable_bytes) for row in rows)
    time = _Panel(
        f"{unit} per step",
        most / size,
        lambda row: [(k, f"{w}: {seconds(s)}", s / size) for k, w, s in time_parts(row.estimate)],
        lambda row: f"{digits(row.estimate.seconds_per_step / size, 4)} {unit}",
        lambda row: (row.estimate.low_seconds / size, row.estimate.high_seconds / size),
    )
    memory = _Panel(
        "GiB per device",
        room / 2**30,
        lambda row: [(k, f"{w}: {gib(b)}", b / 2**30) for k, w, b in memory_parts(row.estimate)],
        lambda row: gib(row.estimate.bytes_per_device),
        None,
        limit=rows[0].estimate.usable_bytes / 2**30,
    )
    if width >= 600:
        label, number, between = 300, 70, 26
        plot = (width - label - 2 * number - between) / 2
        height = 30 + ROW * len(rows) + 32
        marks = [_label(row, label - 14, 30 + ROW * i + ROW / 2 - 2, i == 0) for i, row in enumerate(rows)]
        marks += _panel(time, rows, label, plot, 30, ROW, number)
        marks += _panel(memory, rows, label + plot + number + between, plot, 30, ROW, number)
        return svg(width, height, *marks, label="seconds and memory of the plans")
    number, row_height = 70, 62
    block = 30 + row_height * len(rows) + 36
    marks = []
    for k, panel in enumerate((time, memory)):
        top = 30 + k * block
        marks += [_label(row, width, top + row_height * i + 13, i == 0) for i, row in enumerate(rows)]
        marks += _panel(panel, rows, 0, width - number, top, row_height, number, below=34)
    return svg(width, 2 * block, *marks, label="seconds and memory of the plans")


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A measure of plans.

    Attributes:
        title: with the unit.
        most: the end of its axis.
        parts: of a row, as (kind, tip, value).
        value: of a row, in words.
        interval: of a row.
        limit: a line that no bar should cross.
    """

    title: str
    most: float
    parts: Callable[[Row], list[tuple[str, str, float]]]
    value: Callable[[Row], str]
    interval: Callable[[Row], tuple[float, float]] | None
    limit: float | None = None


def _label(row: Row, room: float, y: float, best: bool) -> Markup:
    return tag(
        "g",
        text(0, y, row.name, "strong" if best else ""),
        text(16, y, shorten(mesh_words(row.plan), room - 16), "strong" if best else ""),
        text(16, y + 15, shorten(how_words(row.plan), room - 16, 11.5), "small"),
        data_tip=plan_tip(row.name, row.plan, row.estimate),
    )


def _panel(
    panel: _Panel,
    rows: Sequence[Row],
    left: float,
    plot: float,
    top: float,
    pitch: float,
    number: float,
    below: float = 0,
) -> list[Markup]:
    scale = plot / (panel.most or 1)
    bottom = top + pitch * len(rows)
    marks = [text(left, top - 16, panel.title, "small")]
    for tick in ticks(0, panel.most, 4):
        # Where words stand above the bars, only the bars have a grid.
        spans = (
            [(top + pitch * i + below - 3, BAR + 6) for i in range(len(rows))] if below else [(top - 2, bottom - top)]
        )
        marks += [line(left + tick * scale, y, left + tick * scale, y + length, "grid") for y, length in spans]
        anchor = "start" if not tick and below else "middle"
        marks.append(text(left + tick * scale, bottom + 14, f"{tick:g}", "tick", anchor=anchor))
    for i, row in enumerate(rows):
        y = top + pitch * i + (below or (pitch - BAR) / 2)
        x = left
        for kind, tip, value in panel.parts(row):
            marks.append(rect(x, y, value * scale, BAR, f"block {kind}", data_tip=tip))
            x += value * scale
        if panel.interval:
            low, high = (left + v * scale for v in panel.interval(row))
            marks += [line(low, y + BAR / 2, high, y + BAR / 2, "whisker")]
            marks += [line(v, y + BAR / 2 - 4, v, y + BAR / 2 + 4, "whisker") for v in (low, high)]
        words = panel.value(row)
        marks.append(text(left + plot + number - 2, y + BAR / 2 + 4, words, "strong" if i == 0 else "", anchor="end"))
    if panel.limit is not None:
        x = left + panel.limit * scale
        marks.append(line(x, top - 6, x, bottom, "limit"))
        marks.append(text(x, top - 10, f"usable {digits(panel.limit)}", "small limit-text", anchor="end"))
    return marks


def draw_communication(estimate: Estimate, sizes: dict[str, int], width: int) -> Markup:
    """Collectives of each mesh axis: seconds behind compute, seconds that compute waits for, bytes."""
    waits = exposed(estimate)
    axes = [axis for axis, row in estimate.communication.items() if row["seconds"] > 0 or row["bytes"] > 0]
    hidden = {axis: max(0.0, estimate.communication[axis]["seconds"] - waits.get(axis, 0.0)) for axis in axes}
    longest = max((hidden[axis] + waits.get(axis, 0.0) for axis in axes), default=0.0) or 1.0
    unit, size = time_unit(longest)
    narrow = width < 600
    label, columns = (0, 0) if narrow else (96, 330)
    pitch = 54 if narrow else 34
    plot = width - label - columns - (8 if narrow else 0)
    scale = plot / (longest / size)
    top, marks = 24, []
    bottom = top + pitch * len(axes)
    for tick in ticks(0, longest / size, 4 if narrow else 5):
        x = label + tick * scale
        marks.append(line(x, top - 2, x, bottom, "grid"))
        marks.append(text(x, bottom + 14, f"{tick:g}", "tick", anchor="middle" if tick or not narrow else "start"))
    marks.append(text(label, 12, f"{unit} per step", "small"))
    at = [width - 220, width - 110, width - 2]
    if not narrow:
        heads = ("behind compute", "compute waits", "moved per device")
        marks += [text(x, 12, words, "small", anchor="end") for x, words in zip(at, heads, strict=True)]
    for i, axis in enumerate(axes):
        y = top + pitch * i + (24 if narrow else (pitch - BAR) / 2)
        wait = waits.get(axis, 0.0)
        x = label + hidden[axis] / size * scale
        marks.append(
            rect(
                label,
                y,
                hidden[axis] / size * scale,
                BAR,
                "block hidden",
                data_tip=f"{axis}: {seconds(hidden[axis])} behind compute",
            )
        )
        marks.append(
            rect(x, y, wait / size * scale, BAR, "block exposed", data_tip=f"{axis}: compute waits {seconds(wait)}")
        )
        name = f"{axis} {sizes.get(axis, 1)}"
        numbers = (seconds(hidden[axis]), seconds(wait), gib(estimate.communication[axis]["bytes"]))
        if narrow:
            marks.append(text(0, y - 6, name, "strong"))
            marks.append(text(width - 2, y - 6, f"{numbers[1]} waits, {numbers[2]} moved", "small", anchor="end"))
        else:
            marks.append(text(label - 10, y + BAR / 2 + 4, name, "", anchor="end"))
            marks += [text(x, y + BAR / 2 + 4, words, "", anchor="end") for x, words in zip(at, numbers, strict=True)]
    return svg(width, bottom + 22, *marks, label="communication of each mesh axis")
