"""The scatter plot of estimates against measurements: matplotlib where it is installed, else SVG written by hand."""

from __future__ import annotations

import html
import importlib.util
import math
import pathlib
from collections.abc import Sequence
from typing import Any

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
"""Paul Tol's bright colours: told apart with colour-blind eyes."""


def scatter(points: Sequence[Any], path: pathlib.Path) -> None:
    """Draw estimate against measured seconds on logarithmic axes, coloured by group; left-out groups are crosses.

    Raises:
        ValueError: no matplotlib, and a file that is not SVG.
    """
    if importlib.util.find_spec("matplotlib") is not None:
        _matplotlib(points, path)
    elif path.suffix.lower() == ".svg":
        path.write_text(_svg(points), encoding="utf-8")
    else:
        raise ValueError(
            f"{path.suffix or 'this kind of file'} needs matplotlib (pip install redco-like[plots]); .svg does not"
        )


def _groups(points: Sequence[Any]) -> dict[tuple[str, str], list[Any]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for point in sorted(points, key=lambda p: (p.split, p.group)):
        groups.setdefault((point.group, point.split), []).append(point)
    return groups


def _limits(points: Sequence[Any]) -> tuple[float, float]:
    values = [v for p in points for v in (p.seconds, p.estimate)]
    return 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))


def _matplotlib(points: Sequence[Any], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    low, high = _limits(points)
    axes.fill_between(
        [low, high], [low / 1.15, high / 1.15], [low * 1.15, high * 1.15], color="#dddddd", label="within 15 %"
    )
    axes.plot([low, high], [low, high], color="#888888", linewidth=1)
    for color, ((group, split), mine) in zip(COLORS * 4, _groups(points).items(), strict=False):
        x, y = [p.seconds for p in mine], [p.estimate for p in mine]
        marker = "o" if split == "fitted" else "x"
        axes.scatter(x, y, s=14, marker=marker, color=color, alpha=0.7, label=f"{group} ({split}, {len(mine)})")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("measured seconds per step")
    axes.set_ylabel("estimated seconds per step (analytic)")
    axes.set_aspect("equal")
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=150)


def _svg(points: Sequence[Any]) -> str:
    size, margin = 640, 60
    low, high = _limits(points)
    span = math.log10(high / low)

    def at(value: float) -> float:
        return margin + (size - 2 * margin) * math.log10(value / low) / span

    def xy(x: float, y: float) -> tuple[float, float]:
        return round(at(x), 1), round(size - at(y), 1)

    head = f'width="{size}" height="{size}" font-family="sans-serif" font-size="11"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {head}>',
        f'<rect width="{size}" height="{size}" fill="white"/>',
    ]
    band = [xy(low, low / 1.15), xy(high, high / 1.15), xy(high, high * 1.15), xy(low, low * 1.15)]
    out.append(f'<polygon points="{" ".join(f"{x},{y}" for x, y in band)}" fill="#e4e4e4"/>')
    (x1, y1), (x2, y2) = xy(low, low), xy(high, high)
    out.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#888888"/>')
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        x, y = xy(10.0**power, 10.0**power)
        out.append(f'<text x="{x}" y="{size - margin + 16}" text-anchor="middle">{10.0**power:g}</text>')
        out.append(f'<text x="{margin - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for i, (color, ((group, split), mine)) in enumerate(zip(COLORS * 4, _groups(points).items(), strict=False)):
        for p in mine:
            x, y = xy(p.seconds, p.estimate)
            title = f"<title>{html.escape(f'{p.model}, {p.devices} {p.accelerator}: {p.error:+.0%}')}</title>"
            if split == "fitted":
                out.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}" fill-opacity="0.7">{title}</circle>')
            else:
                cross = f"M{x - 3} {y - 3}l6 6m0 -6l-6 6"
                out.append(f'<path d="{cross}" stroke="{color}" stroke-width="1.5">{title}</path>')
        label = html.escape(f"{group} ({split}, {len(mine)})")
        out.append(f'<text x="{margin + 8}" y="{margin + 14 * i}" fill="{color}">{label}</text>')
    out.append(f'<text x="{size / 2}" y="{size - 18}" text-anchor="middle">measured seconds per step</text>')
    turned = f"translate(16 {size / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">estimated seconds per step (analytic)</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
