"""The picture of a steady iteration of an RLHF graph: who is busy with what, device by device, and their memory.

    draw_gantt(execution, width, seconds=execution.period_seconds)
    draw_memory(execution, width)

What is drawn faint belongs to the iteration before or after: the steady state repeats with the period.
"""

from __future__ import annotations

import itertools
import math

from redco_like.report.markup import (
    Markup,
    digits,
    gib,
    join,
    line,
    percent,
    rect,
    round_step,
    seconds,
    svg,
    text,
    text_width,
    time_unit,
)
from search.rlhf import Busy, ExecutionPlan, Window

NAMES = {
    "generate": "generate",
    "score": "score",
    "train": "train",
    "reallocate": "parameters move to another layout",
    "onload": "parameters move from and to the host",
}
TOP, AXIS, GAP = 8, 34, 2
MOST_HEIGHT, LEAST_LANE, MOST_LANE = 300.0, 15.0, 34.0
"""Pixels of all lanes, and of one."""
CHART = 74.0
"""Pixels of one group's memory."""


def kind(busy: Busy) -> str:
    """The colour of what a device does."""
    return "onload" if busy.kind == "offload" else busy.kind


def kinds(execution: ExecutionPlan) -> dict[str, str]:
    """Kinds that an execution plan has and their names, in the order of the legend."""
    have = {kind(busy) for busy in execution.timeline}
    return {k: words for k, words in NAMES.items() if k in have}


def lanes_of(execution: ExecutionPlan) -> list[Window]:
    """Runs of devices that do the same at any time."""
    edges = {0, execution.devices}
    for window in [*(busy.window for busy in execution.timeline), *(call.window for call in execution.calls)]:
        edges |= {window.first, window.end}
    cuts = sorted(edges)
    return [Window(a, b - a) for a, b in itertools.pairwise(cuts)]


def idle_share(execution: ExecutionPlan) -> float:
    """Share of a period, over all devices, in which they do nothing."""
    whole = execution.period_seconds * execution.devices
    busy = 0.0
    for lane in lanes_of(execution):
        # A move is there twice where its two windows overlap.
        spans = {(b.start, b.end) for b in execution.timeline if b.window.overlaps(lane)}
        busy += lane.devices * sum(end - start for start, end in spans)
    return max(0.0, 1 - busy / whole) if whole else 0.0


def draw_gantt(execution: ExecutionPlan, width: int, *, upto: float) -> Markup:
    """Draw a steady iteration, on a time axis of `upto` seconds."""
    lanes = lanes_of(execution)
    scale = _Scale(upto, width, max(text_width(_devices(lane)) for lane in lanes))
    height = min(MOST_LANE, max(LEAST_LANE, MOST_HEIGHT / len(lanes)))
    tops = {lane.first: TOP + i * (height + GAP) for i, lane in enumerate(lanes)}
    period = execution.period_seconds
    until = min(scale.x(period), scale.end)
    marks: list[Markup] = []
    for lane in lanes:
        y = tops[lane.first]
        marks.append(text(scale.left - 8, y + height / 2 + 4, _devices(lane), "name", anchor="end"))
        marks.append(rect(scale.left, y, until - scale.left, height, "idle", data_tip=f"devices {lane}: idle"))
    for shift in (-1, 1, 0):
        for busy in execution.timeline:
            start, end = busy.start + shift * period, busy.end + shift * period
            if end <= 0 or start >= period:
                continue
            inside = max(start, 0.0), min(end, period)
            covered = [tops[lane.first] for lane in lanes if lane.overlaps(busy.window)]
            tall = covered[-1] - covered[0] + height
            marks.append(_block(busy, inside, shift, covered[0], tall, scale))
    bottom = TOP + len(lanes) * (height + GAP)
    marks.append(line(until, TOP - 4, until, bottom, "axis"))
    marks += scale.axis(bottom + 4, period)
    return svg(width, bottom + AXIS, *marks, label=f"one iteration of {seconds(period)} on {execution.devices} devices")


def draw_memory(execution: ExecutionPlan, width: int) -> Markup:
    """Draw the bytes of every group of devices over a steady iteration, below what is usable."""
    period, usable = execution.period_seconds, execution.usable_bytes
    most = max([usable, *(b for _, levels in execution.memory for _, b in levels)])
    scale = _Scale(period, width, max(text_width(_devices(window)) for window, _ in execution.memory))
    marks: list[Markup] = []
    y = TOP + 6.0
    for window, levels in execution.memory:
        base = y + CHART
        at = lambda nbytes, base=base: base - CHART * nbytes / most  # noqa: E731
        marks.append(text(scale.left - 8, base - CHART / 2 + 4, _devices(window), "name", anchor="end"))
        ends = [*(t for t, _ in levels[1:]), period]
        for (start, nbytes), end in zip(levels, ends, strict=True):
            tip = f"devices {window}, {seconds(start)} to {seconds(end)}: {gib(nbytes)} of {gib(usable)}"
            x = scale.x(start)
            marks.append(rect(x, at(nbytes), scale.x(end) - x, base - at(nbytes), "block params", data_tip=tip))
        marks.append(line(scale.left, at(usable), scale.end, at(usable), "limit"))
        peak = max(b for _, b in levels)
        words = f"most {gib(peak)}, {percent(peak / usable)} of {gib(usable)} usable"
        marks.append(text(scale.end, at(usable) - 3, words, "small mark", anchor="end"))
        y = base + 22
    marks += scale.axis(y - 14, period)
    return svg(width, y - 14 + AXIS, *marks, label="memory per device over one iteration")


def _devices(window: Window) -> str:
    return f"device {window.first}" if window.devices == 1 else f"devices {window}"


def _block(busy: Busy, inside: tuple[float, float], shift: int, y: float, height: float, scale: _Scale) -> Markup:
    x0 = scale.x(inside[0])
    width = max(scale.x(inside[1]) - x0, 0.8)
    whose = {-1: ", of the iteration before", 0: "", 1: ", of the next iteration"}[shift]
    when = f"{seconds(busy.start)} to {seconds(busy.end)}: {seconds(busy.end - busy.start)}"
    tip = f"{busy.what}{whose}\ndevices {busy.window}\n{when}"
    shape = rect(x0, y, width, height, f"block {kind(busy)}{' odd' if shift else ''}", data_tip=tip)
    words = busy.what
    if height < 12 or text_width(words, 11) + 6 > width:
        return shape
    return join(shape, text(x0 + width / 2, y + height / 2 + 4, words, f"on {kind(busy)}", anchor="middle"))


class _Scale:
    """Seconds to pixels."""

    def __init__(self, total: float, width: int, names: float):
        self.left = float(math.ceil(names) + 12)
        self.end = float(width - 8)
        self.total = total
        self.per_second = (self.end - self.left) / total if total > 0 else 0.0

    def x(self, time: float) -> float:
        return self.left + time * self.per_second

    def axis(self, y: float, period: float) -> list[Markup]:
        """Round ticks up to the period, and the period itself."""
        unit, size = time_unit(self.total)
        step = round_step(70 / (self.per_second or 1) / size) * size
        end = min(self.x(period), self.end)
        last = f"{digits(period / size)} {unit}"
        taken = end - text_width(last) - 8
        marks = [
            line(self.left, y, end, y, "axis"),
            line(end, y, end, y + 5, "axis"),
            text(end, y + 20, last, "tick strong", anchor="end"),
        ]
        for i in range(math.floor(period / step + 1e-9) + 1):
            x = self.x(i * step)
            words = f"{round(i * step / size, 9):g}"
            if x + text_width(words) / 2 < taken:
                marks += [line(x, y, x, y + 5, "axis"), text(x, y + 20, words, "tick", anchor="middle")]
        return marks
