"""The picture of one step: lanes of `redco_like.report.lanes` over a time axis, without the middle of a long one."""

from __future__ import annotations

import dataclasses
import math

from redco_like.report.lanes import Block, Lane, Repeat, Step
from redco_like.report.markup import (
    Markup,
    digits,
    join,
    line,
    rect,
    round_step,
    seconds,
    svg,
    tag,
    text,
    text_width,
    time_unit,
)

NAMES = {
    "forward": "forward",
    "backward": "backward",
    "weight": "gradient of the weights",
    "exposed": "communication that compute waits for",
    "hidden": "communication behind compute",
    "optimizer": "optimizer",
    "offload": "host transfers",
}
MOST_LANES, MOST_BLOCKS, MOST_TIPS = 16, 8000, 1200
"""Stages and blocks that are drawn, else every second (third, ...) stage is; blocks that say what they are when pointed
at, above which those of a lane and kind are one shape.
"""
BREAK = 40
"""Pixels of a stretch that is left out."""
TOP, AXIS = 24, 34
LEAST = {True: 13.0, False: 64.0}
AIM = {True: 25.0, False: 120.0}
"""Pixels of one microbatch's passes, in pipelines and else: below the first, some are left out to get to the other."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Seconds that are left out, and how many microbatches they have."""

    start: float
    end: float
    microbatches: int


def timeline_kinds(step: Step) -> list[str]:
    """Kinds of blocks that a step has, in the order of the legend."""
    have = {block.kind for lane in step.lanes for block in lane.blocks}
    return [kind for kind in NAMES if kind in have]


def draw_timeline(step: Step, width: int) -> Markup:
    """Draw a step `width` pixels wide."""
    narrow = width < 600
    left = 58 if narrow else 84
    plot = width - left - 8
    cuts = choose_cuts(step, plot, narrow=narrow)
    scale = _Scale(step.seconds, cuts, left, plot)
    lanes = step.lanes[:: drawn_every(step, cuts)]
    heights = [_height(lane, len(lanes), step.pipeline) for lane in lanes]
    dense = sum(_seen(lane, cuts) for lane in lanes) > MOST_TIPS
    gap = 2 if step.pipeline else 7
    marks: list[Markup] = []
    y = TOP
    for lane, height in zip(lanes, heights, strict=True):
        marks.append(text(left - 8, y + height / 2 + 4, lane.name, "name", anchor="end"))
        marks += _lane(lane, y, height, scale, dense)
        y += height + gap
    bottom = y - gap
    more = "more" if narrow else "more microbatches"
    for cut in cuts:
        x = scale.x(cut.start)
        words = f"{cut.microbatches} {more}, {seconds(cut.end - cut.start)}"
        half = text_width(words, 11) / 2
        at = min(max(x + BREAK / 2, left + half), left + plot - half)
        marks.append(text(at, 13, words, "small", anchor="middle"))
        for side in (x + 6, x + BREAK - 6):
            marks.append(line(side - 4, bottom + 4, side + 4, TOP - 4, "break"))
        marks.append(text(x + BREAK / 2, (TOP + bottom) / 2 + 4, "···", "name", anchor="middle"))
    marks += _axis(scale, bottom + 6)
    return svg(width, bottom + AXIS, *marks, label=f"timeline of one step of {seconds(step.seconds)}")


def choose_cuts(step: Step, plot: float, *, narrow: bool) -> list[Cut]:
    """Leave out whole periods in the middle of each stretch that repeats, if they would be too thin to tell apart."""
    repeats = [r for r in step.repeats if r.count > 3]
    small = 0.75 if narrow else 1.0
    if not repeats or not step.seconds:
        return []
    # GPipe has its forward and its backward passes apart: one microbatch is one of each.
    period = sum(r.period / r.passes for r in repeats)
    if plot * period / step.seconds >= LEAST[step.pipeline] * small:
        return []
    room = plot - BREAK * len(repeats)
    for drop in range(2, max(r.count for r in repeats) - 1):
        gone = sum(_dropped(r, drop) * r.period for r in repeats)
        if room * period / (step.seconds - gone) >= AIM[step.pipeline] * small:
            break
    else:
        drop = max(r.count for r in repeats) - 2
    cuts = []
    for r in repeats:
        dropped = _dropped(r, drop)
        start = r.start + math.ceil((r.count - dropped) / 2) * r.period
        cuts.append(Cut(start, start + dropped * r.period, dropped * r.microbatches))
    return cuts


def drawn_every(step: Step, cuts: list[Cut]) -> int:
    """1 if every lane is drawn, 2 if every second is, ..."""
    if not step.pipeline:
        return 1
    return max(
        math.ceil(len(step.lanes) / MOST_LANES), math.ceil(sum(_seen(lane, cuts) for lane in step.lanes) / MOST_BLOCKS)
    )


def _seen(lane: Lane, cuts: list[Cut]) -> int:
    """Blocks that are not left out."""
    return sum(not any(cut.start <= b.start and b.end <= cut.end for cut in cuts) for b in lane.blocks)


def _dropped(repeat: Repeat, drop: int) -> int:
    return min(drop, repeat.count - 2)


class _Scale:
    """Seconds to pixels, in pieces between what is left out."""

    def __init__(self, total: float, cuts: list[Cut], left: float, plot: float):
        self.total, self.cuts, self.left, self.plot = total, cuts, left, plot
        shown = total - sum(cut.end - cut.start for cut in cuts)
        self.per_second = (plot - BREAK * len(cuts)) / shown if shown > 0 else 0.0
        edges = [0.0, *(edge for cut in cuts for edge in (cut.start, cut.end)), total]
        self.pieces = list(zip(edges[::2], edges[1::2], strict=True))

    def x(self, time: float) -> float:
        """Pixels of a time that is drawn; of the start of a cut: where the break starts."""
        gone = sum(min(time, cut.end) - cut.start for cut in self.cuts if time > cut.start)
        breaks = sum(time >= cut.end for cut in self.cuts)
        return self.left + (time - gone) * self.per_second + BREAK * breaks


def _height(lane: Lane, count: int, pipeline: bool) -> float:
    if pipeline:
        return min(24.0, 340 / count)
    return 34.0 if lane.works else 15.0


def _lane(lane: Lane, y: float, height: float, scale: _Scale, dense: bool) -> list[Markup]:
    marks = []
    shapes: dict[str, list[str]] = {}
    for start, end in scale.pieces:
        x0, x1 = scale.x(start), _until(scale, start, end)
        if lane.works:
            marks.append(rect(x0, y, x1 - x0, height, "idle", data_tip=f"{lane.name}: idle"))
        else:
            marks.append(line(x0, y + height - 0.5, x1, y + height - 0.5, "rule"))
        for block in lane.blocks:
            if block.end > start and block.start < end:
                inside = max(block.start, start), min(block.end, end)
                if dense:
                    a, b = (_until(scale, start, time) for time in inside)
                    shapes.setdefault(_class(block), []).append(f"M{a:.1f},{y:.1f}H{b:.1f}v{height:.1f}H{a:.1f}z")
                else:
                    marks.append(_block(block, *inside, y, height, scale, start))
    return [*marks, *(tag("path", d="".join(d), class_=class_) for class_, d in shapes.items())]


def _class(block: Block) -> str:
    return f"block {block.kind}{' odd' if block.odd else ''}"


def _until(scale: _Scale, start: float, end: float) -> float:
    """Pixels of the end of a piece; the break after it comes later."""
    return scale.x(start) + (end - start) * scale.per_second


def _block(block: Block, start: float, end: float, y: float, height: float, scale: _Scale, piece: float) -> Markup:
    x0 = _until(scale, piece, start)
    width = max((end - start) * scale.per_second, 0.7)
    shape = rect(x0, y, width, height, _class(block), data_tip=block.tip)
    if not block.label or height < 12:
        return shape
    words = next((w for w in (f"{block.kind} {block.label}", block.label) if text_width(w, 11) + 4 < width), "")
    if not words:
        return shape
    return join(shape, text(x0 + width / 2, y + height / 2 + 4, words, f"on {block.kind}", anchor="middle"))


def _axis(scale: _Scale, y: float) -> list[Markup]:
    """Ticks of each piece, and the whole time at the end."""
    unit, size = time_unit(scale.total)
    step = round_step(70 / (scale.per_second or 1) / size) * size
    last = f"{digits(scale.total / size)} {unit}"
    end = scale.left + scale.plot
    marks = [text(end, y + 20, last, "tick strong", anchor="end"), line(end, y, end, y + 5, "axis")]
    taken = [(end - text_width(last) - 8, end)]
    for start, stop in scale.pieces:
        marks.append(line(scale.x(start), y, _until(scale, start, stop), y, "axis"))
        for i in range(math.ceil(start / step - 1e-9), math.floor(stop / step + 1e-9) + 1):
            x = _until(scale, start, i * step)
            words = f"{round(i * step / size, 9):g}"
            half = text_width(words) / 2 + 3
            if all(x + half < a or x - half > b for a, b in taken):
                taken.append((x - half, x + half))
                marks += [line(x, y, x, y + 5, "axis"), text(x, y + 20, words, "tick", anchor="middle")]
    return marks
