"""What `--fix`, `--set` and `--forbid` say: choices of `search.Space` and their values."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from redco_like.cli.terminal import UsageError
from search.plan import Remat, Vocab
from search.schedules import ScheduleName
from search.space import CHOICES, OFFLOADS
from sharding_rules import AXES

SIZES = (*AXES, "microbatches", "chunks")
SWITCHES = ("sequence", "optimizer_sharding", "regather")
NAMED = {
    "remat": get_args(Remat),
    "schedule": get_args(ScheduleName),
    "vocab": get_args(Vocab),
    "offload": ("none", *dict.fromkeys(what for some in OFFLOADS for what in some)),
}
LISTS = ("order",)
FORBIDDABLE = (*AXES, "sequence", "order", "optimizer_sharding", "offload")
WORDS = {"true": True, "yes": True, "false": False, "no": False}


def fixed(texts: Sequence[str], option: str = "--fix") -> dict[str, Any]:
    """Read pairs, also several in one text.

    >>> fixed(["tensor=8,remat=full", "sequence=yes"])
    {'tensor': 8, 'remat': 'full', 'sequence': True}

    Raises:
        UsageError: no pair, a choice twice or unknown, a value that it does not take.
    """
    found: dict[str, Any] = {}
    for pair in _parts(texts):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise UsageError(f"{option} {pair}: write KEY=VALUE, such as tensor=8")
        if name in found:
            raise UsageError(f"{option} {name} twice: {found[name]} and {value}")
        if name not in CHOICES:
            raise UsageError(f"{option} {pair}: no such choice{_near(name, CHOICES)}; there are {', '.join(CHOICES)}")
        found[name] = _value(name, value, option)
    return found


def forbidden(texts: Sequence[str]) -> tuple[str, ...]:
    """Read names, also several in one text.

    Raises:
        UsageError: what cannot be forbidden.
    """
    names = tuple(_parts(texts))
    for name in names:
        if name not in FORBIDDABLE:
            near, listed = _near(name, FORBIDDABLE), ", ".join(FORBIDDABLE)
            raise UsageError(f"--forbid {name}: not to be forbidden{near}; there are {listed}")
    return names


def _value(name: str, value: str, option: str) -> Any:
    if name in SIZES:
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"{option} {name}={value}: {name} is a whole number from 1 up, such as {name}=8")
        return int(value)
    if name in SWITCHES:
        if value.lower() not in WORDS:
            raise UsageError(f"{option} {name}={value}: {name} is true or false")
        return WORDS[value.lower()]
    if name in LISTS:
        axes = tuple(value.split("+"))
        if unknown := [axis for axis in axes if axis not in AXES]:
            what = f"{unknown[0]} is no mesh axis{_near(unknown[0], AXES)}"
            raise UsageError(f"{option} {name}={value}: {what}; write them outermost first: data+fsdp+tensor")
        return axes
    for part in value.split("+") if name == "offload" else [value]:
        if part not in NAMED[name]:
            raise UsageError(f"{option} {name}={value}: {name} is one of {', '.join(NAMED[name])}")
    return value


def _parts(texts: Sequence[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _near(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {found[0]}?" if found else ""
