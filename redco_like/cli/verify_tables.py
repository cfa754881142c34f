"""What a compiler found, as tables: planned beside compiled."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from redco_like.cli import units
from search.verify import operation

if TYPE_CHECKING:
    from redco_like.cli.plan import Verified
    from search import Plan
    from search.verify import Verification


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def byte_table(verified: Verification, plan: Plan) -> Table:
    """Bytes per device by kind, and the planner's total."""
    table = _table(("memory per device", "left"), ("compiled", "right"), ("planned", "right"))
    total = verified.bytes["total"]
    held = sum((plan.estimate.memory if plan.estimate else {}).get(n, 0) for n in ("params", "optimizer", "cache"))
    for kind in ("arguments", "temporaries", "results"):
        if verified.bytes[kind] > 1e-4 * total:
            planned = units.size(held, total) if kind == "arguments" and held else ""
            table.add_row(kind, units.size(verified.bytes[kind], total), planned)
    planned = f"{units.size(verified.planned_bytes, total)}  {_off(verified.planned_bytes / max(1, total))}"
    table.add_row("total", units.size(total), planned, style="bold")
    if verified.bytes["aliased"]:
        table.add_row("[dim]arguments written in place[/]", units.size(verified.bytes["aliased"], total), "")
    if verified.bytes["host"] > 2**20:
        table.add_row("host", units.size(verified.bytes["host"], total), "")
    return table


def traffic_table(verified: Verification) -> Table:
    """What a device sends, by mesh axes."""
    table = _table(
        ("over", "left"),
        ("collectives", "left"),
        ("sent, compiled", "right"),
        ("planned", "right"),
        ("beside compute", "right"),
        ("seconds", "right"),
    )
    for row in verified.traffic:
        kinds = ", ".join(f"{count:,} {kind.replace('_', '-')}" for kind, count in row.counts.items()) or "none"
        planned = units.size(row.planned) + (f"  {_off(row.planned / row.sent)}" if row.sent and row.planned else "")
        share = units.percent(row.asynchronous / row.sent) if row.sent else "-"
        table.add_row(" x ".join(row.axes), kinds, units.size(row.sent), planned, share, units.seconds(row.seconds))
    return table


def time_table(verified: Verification, plan: Plan) -> Table:
    """The step's seconds by roofline over the compiled program, and the planner's."""
    table = _table(("step time", "left"), ("compiled (roofline)", "right"), ("planned (analytic)", "right"))
    estimate = plan.estimate
    planned = dict(estimate.seconds) if estimate else {}
    if estimate:
        planned["hidden"] = estimate.hidden_seconds
        planned["compute"] = planned.get("compute", 0.0) + planned.pop("optimizer", 0.0)
    for part in dict.fromkeys((*verified.time, *planned)):
        values = verified.time.get(part, 0.0), planned.get(part, 0.0)
        if any(values):
            name = f"[dim]{part} behind compute[/]" if part == "hidden" else f"  {part}"
            table.add_row(name, *(units.seconds(value) for value in values))
    assert verified.seconds is not None
    total = f"{units.seconds(verified.planned_seconds, 4)}  {_off(verified.planned_seconds / verified.seconds)}"
    table.add_row("total", units.seconds(verified.seconds, 4), total, style="bold")
    return table


def slow_table(verified: Verification) -> Table:
    """The operations that take longest."""
    table = _table(("slowest operations", "left"), ("seconds", "right"), ("times", "right"), ("from", "left"))
    for row in verified.slowest:
        table.add_row(
            operation(row["op_name"] or row["name"]),
            units.seconds(row["seconds"]),
            units.count(row["times"]),
            place(row["source"]),
        )
    return table


def buffer_table(verified: Verification) -> Table:
    """The largest buffers."""
    table = _table(("largest buffers", "left"), ("bytes", "right"), ("shape", "left"), ("from", "left"))
    for row in verified.buffers:
        table.add_row(operation(row.op_name), units.size(row.bytes), row.shape, place(row.source))
    return table


def ranking_table(rows: Sequence[Verified]) -> Table:
    """The best plans in the compiler's order, with the planner's beside it."""
    table = _table(
        ("compiled", "left"),
        ("planner's rank", "right"),
        ("memory, compiled", "right"),
        ("planned", "right"),
        ("step, roofline", "right"),
        ("planned", "right"),
        ("", "left"),
    )
    for place, row in enumerate(rows, 1):
        found, estimate = row.found, row.costed.estimate
        total = found.bytes["total"]
        table.add_row(
            str(place) if found.fits else "-",
            str(row.rank),
            units.size(total),
            f"{units.size(found.planned_bytes, total)}  {_off(found.ratio)}",
            units.seconds(found.seconds, 4) if found.seconds else "-",
            units.seconds(estimate.seconds_per_step, 4),
            str(row.costed.plan.mesh) if found.fits else "[red]does not fit[/]",
        )
    return table


def change_table(verified: Verification) -> Table:
    """Changes with which the plan is expected to fit."""
    table = _table(("with --set", "left"), ("would need", "right"), ("to spare", "right"), ("step time", "right"))
    for row in verified.changes:
        slower = row["slower"] - 1
        table.add_row(row["set"], units.size(row["bytes"]), units.size(row["spare"]), f"{100 * slower:+.1f} %")
    return table


def place(source: str) -> str:
    """A line of the program, from the folder of the libraries or the current one on."""
    for folder in ("site-packages/", f"{pathlib.Path.cwd()}/"):
        source = source.rpartition(folder)[2]
    return source


def _off(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
