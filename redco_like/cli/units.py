"""Numbers as text, with their units."""

from __future__ import annotations


def seconds(value: float, digits: int = 3) -> str:
    """Seconds in the unit that suits them.

    >>> seconds(12.3456), seconds(0.0123456, 4), seconds(0), seconds(3e-6)
    ('12.3 s', '12.35 ms', '0 s', '3.00 µs')
    """
    if value <= 0:
        return "0 s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale * (1 - 0.5 * 10**-digits) or unit == "µs":
            return f"{_significant(value / scale, digits)} {unit}"
    raise AssertionError


def size(count: float, like: float | None = None) -> str:
    """Bytes in the unit that suits them, or that suits another count.

    >>> size(3.26 * 2**30), size(2048), size(100 * 2**20, like=2**40), size(0)
    ('3.3 GiB', '2.0 KiB', '0.1 GiB', '0')
    """
    names = ("B", "KiB", "MiB", "GiB")
    power = next((k for k in (3, 2, 1) if (like or count) >= 1024**k), 0)
    if not count:
        return "0"
    value = count / 1024**power
    return f"{value:,.0f} B" if not power else f"{value:,.{1 if value >= 0.095 else 3}f} {names[power]}"


def percent(share: float) -> str:
    """A share of 1.

    >>> percent(0.4567), percent(0.0012), percent(0), percent(1)
    ('45.7 %', '0.12 %', '0 %', '100 %')
    """
    if share == 0:
        return "0 %"
    if 0 < share < 5e-5:
        return "<0.01 %"
    places = 0 if abs(share) >= 0.9995 else 1 if abs(share) >= 0.00995 else 2
    return f"{100 * share:.{places}f} %"


def count(value: float) -> str:
    """A whole number with thousands.

    >>> count(1234567.8)
    '1,234,568'
    """
    return f"{value:,.0f}"


def many(value: float) -> str:
    """A large number in words' units.

    >>> many(70.6e9), many(124_439_808), many(999), many(1.5e15)
    ('70.6 B', '124 M', '999', '1.50 P')
    """
    for unit, scale in (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{_significant(value / scale, 3)} {unit}"
    return f"{value:.0f}"


def flops(value: float) -> str:
    """Floating point operations per second.

    >>> flops(989e12), flops(1.7e11)
    ('989 TFLOP/s', '170 GFLOP/s')
    """
    number, _, unit = many(value).partition(" ")
    return f"{number} {'G' if unit == 'B' else unit}FLOP/s"


def _significant(value: float, digits: int) -> str:
    places = max(0, digits - len(str(int(value)))) if value >= 1 else digits - 1
    return f"{value:,.{places}f}"
