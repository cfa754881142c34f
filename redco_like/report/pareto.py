"""The scatter of time against memory: plans that no other beats in both, with the winner and the runners-up marked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from redco_like.report.bars import Row
from redco_like.report.markup import Markup, digits, line, log_ticks, svg, tag, text, text_width, ticks, time_unit
from redco_like.report.words import mesh_words, plan_tip

LOG_FROM = 2.5
"""From this ratio of the slowest to the fastest plan on, the time axis is logarithmic."""


def draw_pareto(front: Sequence[Row], rows: Sequence[Row], width: int) -> Markup:
    """Draw the front as a line of points, and the compared plans as numbered circles."""
    narrow = width < 600
    left, right, top, bottom = (44, 14, 24, 44) if narrow else (64, 40, 24, 46)
    height = 320 if narrow else 380
    every = [*front, *rows]
    times = [row.estimate.seconds_per_step for row in every]
    unit, size = time_unit(min(times))
    bytes_ = [row.estimate.bytes_per_device / 2**30 for row in every]
    usable = every[0].estimate.usable_bytes / 2**30
    log = max(times) > LOG_FROM * min(times)
    low_t, high_t = min(times) / size, max(times) / size
    pad = 1.06 if log else (high_t - low_t or low_t * 0.1) * 0.05
    low_t, high_t = (low_t / pad, high_t * pad) if log else (low_t - pad, high_t + pad)
    fits = usable < 1.5 * max(bytes_)
    low_b, high_b = min(bytes_), max(*bytes_, usable if fits else 0)
    low_b, high_b = max(0.0, low_b - 0.08 * (high_b - low_b or high_b)), high_b + 0.12 * (high_b - low_b or high_b)

    def x(seconds: float) -> float:
        value = seconds / size
        share = math.log(value / low_t) / math.log(high_t / low_t) if log else (value - low_t) / (high_t - low_t)
        return left + share * (width - left - right)

    def y(gib: float) -> float:
        return height - bottom - (gib - low_b) / (high_b - low_b) * (height - top - bottom)

    marks: list[Markup] = []
    for tick in ticks(low_b, high_b, 5):
        marks += [line(left, y(tick), width - right, y(tick), "grid")]
        marks += [text(left - 8, y(tick) + 4, f"{tick:g}", "tick", anchor="end")]
    for tick in log_ticks(low_t, high_t) if high_t > 12 * low_t else ticks(low_t, high_t, 4 if narrow else 7):
        at = x(tick * size)
        marks += [line(at, height - bottom, at, height - bottom + 5, "axis")]
        marks += [text(at, height - bottom + 19, f"{tick:g}", "tick", anchor="middle")]
    marks += [line(left, height - bottom, width - right, height - bottom, "axis")]
    marks += [text(left - 8 if not narrow else 0, 12, "GiB per device", "small")]
    marks += [
        text(width - right, height - 6, f"{unit} per step{', logarithmic' if log else ''}", "small", anchor="end")
    ]
    if fits:
        marks += [line(left, y(usable), width - right, y(usable), "limit")]
        marks += [text(width - right, y(usable) - 5, f"usable {digits(usable)}", "small limit-text", anchor="end")]
    spots = sorted((x(r.estimate.seconds_per_step), y(r.estimate.bytes_per_device / 2**30)) for r in front)
    if len(spots) > 1:
        steps = "".join(f"H{b[0]:.1f}V{b[1]:.1f}" for b in spots[1:])
        marks.append(tag("path", d=f"M{spots[0][0]:.1f},{spots[0][1]:.1f}{steps}", class_="front"))
    for row in front:
        at = x(row.estimate.seconds_per_step), y(row.estimate.bytes_per_device / 2**30)
        marks.append(_circle(*at, 3.5, "point", plan_tip("on the front", row.plan, row.estimate)))
    labels = _Labels([(x(r.estimate.seconds_per_step), y(r.estimate.bytes_per_device / 2**30)) for r in every])
    if fits:
        labels.avoid(left, width - right, y(usable), y(usable))
    for a, b in itertools.pairwise(spots):
        labels.avoid(a[0], b[0], a[1], a[1])
        labels.avoid(b[0], b[0], b[1], a[1])
    for k, row in reversed(list(enumerate(rows))):
        at = x(row.estimate.seconds_per_step), y(row.estimate.bytes_per_device / 2**30)
        marks.append(_circle(*at, 5, "winner" if k == 0 else "runner", plan_tip(row.name, row.plan, row.estimate)))
    for k, row in enumerate(rows):
        at = x(row.estimate.seconds_per_step), y(row.estimate.bytes_per_device / 2**30)
        for words in [f"{row.name}: {mesh_words(row.plan)}"] * (k == 0 and not narrow) + [row.name]:
            if place := labels.place(*at, words, (left, width)):
                marks.append(text(*place, words, "mark strong" if k == 0 else "mark small"))
                break
    return svg(width, height, *marks, label="time against memory")


def _circle(x: float, y: float, radius: float, class_: str, tip: str) -> Markup:
    return tag("circle", cx=float(x), cy=float(y), r=float(radius), class_=class_, data_tip=tip, tabindex=0)


class _Labels:
    """Puts labels beside points where they cover neither points nor labels; leaves out what has no place."""

    def __init__(self, points: Sequence[tuple[float, float]]):
        self.taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in points]

    def avoid(self, left: float, right: float, top: float, bottom: float) -> None:
        """Keep labels off a straight line."""
        self.taken.append((left - 2, top - 2, right + 2, bottom + 2))

    def place(self, x: float, y: float, words: str, within: tuple[float, float]) -> tuple[float, float] | None:
        wide = text_width(words)
        beside, centred = (10, -wide - 8), -wide / 2
        places = [*((dx, 4) for dx in beside), (centred, -11), (centred, 20)]
        places += [(8, -9), (8, 17), (-wide - 6, -9), (-wide - 6, 17)]
        for dx, dy in places:
            box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 2)
            inside = box[0] >= within[0] and box[2] <= within[1]
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return x + dx, y + dy
        return None


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
