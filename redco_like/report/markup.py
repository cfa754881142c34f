"""HTML and SVG from nested calls, numbers in words, and round ticks. What is not markup already is escaped.

>>> tag("p", "a < b", class_="note")
'<p class="note">a &lt; b</p>'
"""

from __future__ import annotations

import html
import math

TIMES = "\u00d7"
"""The sign between factors."""
VOID = ("meta", "br", "col")
"""HTML elements that have no end tag."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """Write an element; in attribute names a trailing `_` is dropped and the others become `-`; None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str | None) -> Markup:
    """Put markup and text one after the other; text is escaped."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(str(text))


def _number(value: object) -> str:
    """Coordinates to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


# SVG.


def svg(width: float, height: float, *children: str, label: str) -> Markup:
    """A drawing that scales with its place."""
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def rect(x: float, y: float, width: float, height: float, class_: str, **more: object) -> Markup:
    return tag("rect", x=float(x), y=float(y), width=float(max(width, 0)), height=float(height), class_=class_, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str, **more: object) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_, **more)


def text(x: float, y: float, words: str, class_: str = "", *, anchor: str = "start") -> Markup:
    return tag("text", words, x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor)


def shorten(words: str, width: float, size: float = 12) -> str:
    """Cut words that take more than so many pixels."""
    while words and text_width(words, size) > width:
        words = words.removesuffix("…")[:-1].rstrip(" ,") + "…"
    return words


def text_width(words: str, size: float = 12) -> float:
    """About how many pixels words take in a sans-serif font, on the safe side."""
    return 0.51 * size * len(words)


# Numbers.


def digits(value: float, count: int = 3) -> str:
    """A number to so many significant digits, never in scientific notation.

    >>> digits(1234.6), digits(12.345), digits(0.012345)
    ('1235', '12.3', '0.0123')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


def decimals(most: float, count: int = 3) -> int:
    """Decimals with which the largest number of a column has so many significant digits.

    >>> decimals(9.891, 4), decimals(66)
    (3, 1)
    """
    return max(0, count - 1 - math.floor(math.log10(most))) if most > 0 else 0


def seconds(value: float, count: int = 3) -> str:
    """Seconds in the unit that suits them.

    >>> seconds(12.345), seconds(0.0123), seconds(0)
    ('12.3 s', '12.3 ms', '0 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= scale:
            return f"{digits(value / scale, count)} {unit}"
    return f"{digits(value / 1e-6, count)} µs" if value else "0 s"


def time_unit(value: float) -> tuple[str, float]:
    """The unit that suits a time, for the columns and axes that have it at their top."""
    return next(((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3)) if value >= scale), ("µs", 1e-6))


def amount(value: float) -> str:
    """A count with a short unit.

    >>> amount(1_048_576), amount(70.6e9), amount(512)
    ('1.05 M', '70.6 G', '512')
    """
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}"
    return digits(value) if value % 1 else f"{value:.0f}"


def gib(value: float) -> str:
    """Bytes in GiB, three digits; small ones in MiB.

    >>> gib(85_899_345_920), gib(1_048_576)
    ('80.0 GiB', '1.00 MiB')
    """
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(share: float) -> str:
    """A share in percent, without digits that say nothing.

    >>> percent(0.1234), percent(0.0123), percent(0), percent(1)
    ('12 %', '1.2 %', '0 %', '100 %')
    """
    return f"{100 * share:.1f} %" if 0 < abs(share) < 0.0995 else f"{100 * share:.0f} %"


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least about this.

    >>> round_step(0.3), round_step(13), round_step(20.4)
    (0.5, 20, 20)
    """
    power = math.floor(math.log10(least))
    return next(m * 10**power for m in (1, 2, 5, 10) if m * 10**power >= least * 0.8)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within an interval.

    >>> ticks(0, 11)
    [0, 2, 4, 6, 8, 10]
    """
    if not high > low:
        return [low]
    step = round_step((high - low) / count)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within an interval."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.999 <= m * 10.0**p <= high * 1.001]
