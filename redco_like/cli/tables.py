"""Estimates as tables: one column per plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from redco_like.cli import units
from redco_like.cli.words import ordered_axes

if TYPE_CHECKING:
    from search import Estimate, Plan, Sensitivity
    from search.planned_collectives import Collective

LABEL_WIDTH, PLAN_WIDTH = 18, 13
MEMORY_PARTS = ("params", "gradients", "optimizer", "activations", "transient")


def plans_that_fit(width: int, count: int) -> int:
    """How many plans have a column in so many characters."""
    return max(1, min(count, (width - LABEL_WIDTH - 2) // (PLAN_WIDTH + 2)))


def plan_table(
    plans: Sequence[tuple[str, Plan, Estimate]],
    *,
    global_batch: int | None = None,
    per_second: str = "tokens/s",
    training: bool = True,
    width: int = 120,
) -> Table:
    """Plans side by side: what they are, their seconds and their bytes. Rows that are zero everywhere are left out.

    Args:
        plans: (heading, plan, estimate), the one that others are compared with first.
        global_batch: examples per step.
        per_second: what `Estimate.tokens_per_second` counts.
        training: whether there is a backward pass.
        width: characters; plans that do not fit are left out.
    """
    plans = plans[: plans_that_fit(width, len(plans))]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    labels = plans[0][2].labels
    table.add_column(labels.get("seconds", ""), width=LABEL_WIDTH, no_wrap=True, header_style="dim")
    for i, (heading, _, _) in enumerate(plans):
        table.add_column(
            heading,
            justify="right",
            overflow="fold",
            min_width=PLAN_WIDTH - 1,
            max_width=PLAN_WIDTH,
            style="green" if i == 0 else "",
        )

    def row(name: str, cell: Callable[[Plan, Estimate], str], style: str = "") -> None:
        cells = [cell(plan, estimate) for _, plan, estimate in plans]
        if any(text not in ("", "0", "0 s", "-", "0 %") for text in cells):
            table.add_row(Text(name, style="dim" if name.startswith(" ") else ""), *cells, style=style)

    best = plans[0][2].seconds_per_step
    row("mesh", lambda p, _: "\n".join(f"{a} {p.mesh.sizes[a]}" for a in ordered_axes(p)) or "one device")
    row("seq. parallel", lambda p, _: "yes" if "sequence" in p.preset.split("+") else "-")
    if any(p.mesh.stage > 1 for _, p, _ in plans):
        row("schedule", lambda p, _: _schedule(p))
    row("offload", lambda p, _: "\n".join(p.offload) or "-")
    row("ZeRO-1", lambda p, _: "yes" if p.optimizer_sharding else "-")
    row("params gathered", lambda p, _: "once" if p.mesh.fsdp > 1 and not p.regather else "-")
    row("microbatches x ex." if global_batch else "microbatches", lambda p, _: _microbatches(p, global_batch))
    if training:
        row("remat", lambda p, _: p.remat)
    table.add_section()
    row("step time", lambda _, e: units.seconds(e.seconds_per_step, 4), style="bold")
    row("  vs first", lambda _, e: _slower(e.seconds_per_step / best - 1))
    row(per_second, lambda _, e: units.count(e.tokens_per_second))
    row("MFU", lambda _, e: units.percent(e.mfu))
    for part in _parts(plans):
        row(f"  {part}", lambda _, e, part=part: _share(e.seconds.get(part, 0.0), e.seconds_per_step))
    row("  hidden transfers", lambda _, e: units.seconds(e.hidden_seconds))
    row("bound by", lambda _, e: e.binds.partition(",")[0])
    table.add_section()
    largest = max(e.bytes_per_device for _, _, e in plans)
    memory = labels.get("memory", "")
    name = "memory" if memory == labels.get("seconds", "") else f"memory, {memory}"
    row(name, lambda _, e: units.size(e.bytes_per_device, largest), style="bold")
    row("  of usable", lambda _, e: units.percent(e.bytes_per_device / e.usable_bytes))
    for part in dict.fromkeys((*MEMORY_PARTS, *(part for _, _, e in plans for part in e.memory))):
        row(f"  {part}", lambda _, e, part=part: units.size(e.memory.get(part, 0), largest))
    return table


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """Lines of a name and a text, the names in a column of their own."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, text in lines:
        table.add_row(Text(name), Text(text))
    return table


def estimate_table(estimate: Estimate) -> Table:
    """The parts of one estimate, seconds beside bytes."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name, justify in (
        ("step", "left"),
        ("seconds", "right"),
        ("share", "right"),
        ("", "left"),
        ("memory per device", "left"),
        ("bytes", "right"),
        ("of usable", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    total = estimate.seconds_per_step
    used = estimate.bytes_per_device
    times = [(name, units.seconds(s), units.percent(s / total)) for name, s in estimate.seconds.items() if s > 0]
    times.append(("total", units.seconds(total, 4), "100 %"))
    sizes = [
        (name, units.size(b, used), units.percent(b / estimate.usable_bytes))
        for name, b in estimate.memory.items()
        if b
    ]
    sizes.append(("total", units.size(used), units.percent(used / estimate.usable_bytes)))
    for i in range(max(len(times), len(sizes))):
        left = times[i] if i < len(times) else ("", "", "")
        right = sizes[i] if i < len(sizes) else ("", "", "")
        table.add_row(*left, "   ", *right)
    return table


def sensitivity_table(rows: Sequence[Sensitivity]) -> Table:
    """Step time of the best plan where a constant of the estimate is off, and who wins then."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("step time with")
    factors = list(dict.fromkeys(row.factor for row in rows))
    for factor in factors:
        table.add_column(f"{'+' if factor > 1 else '-'}{100 * abs(factor - 1):.0f} %")
    for constant in dict.fromkeys(row.constant for row in rows):
        cells = {row.factor: _outcome(row) for row in rows if row.constant == constant}
        table.add_row(constant, *(cells.get(factor, "") for factor in factors))
    return table


def _outcome(row: Sensitivity) -> str:
    text = units.seconds(row.seconds[0], 4)
    if row.winner == 0:
        return text
    return f"{text}; plan {row.winner + 1} wins, {units.seconds(row.seconds[row.winner], 4)}"


def collective_table(rows: Sequence[Collective], estimate: Estimate) -> Table:
    """Collectives by mesh axis, with how much of each axis nothing hides."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name, justify in (
        ("over", "left"),
        ("collective", "left"),
        ("in", "left"),
        ("times", "right"),
        ("bytes", "right"),
        ("seconds", "right"),
        ("exposed", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for axis in dict.fromkeys((*(row.axis for row in rows), *estimate.communication)):
        totals = estimate.communication.get(axis, {})
        for row in (row for row in rows if row.axis == axis):
            table.add_row(
                " x ".join(row.axes),
                row.kind.replace("_", "-"),
                row.phase,
                units.count(row.count),
                units.size(row.bytes),
                units.seconds(row.seconds),
                "hides" if row.hides else units.seconds(row.seconds),
            )
        table.add_row(
            f"[bold]{axis}[/]",
            "",
            "",
            "",
            units.size(totals.get("bytes", 0.0)),
            units.seconds(totals.get("seconds", 0.0)),
            units.seconds(totals.get("exposed", 0.0)),
            style="bold",
        )
    return table


def _slower(share: float) -> str:
    return "-" if abs(share) < 5e-5 else f"{'+' if share > 0 else '-'}{units.percent(abs(share))}"


def _parts(plans: Sequence[tuple[str, Plan, Estimate]]) -> list[str]:
    order = ["compute", *(f"exposed {axis}" for axis in plans[0][1].mesh.sizes), "bubble", "optimizer", "offload"]
    found = dict.fromkeys(part for _, _, estimate in plans for part in estimate.seconds)
    return sorted(found, key=lambda part: order.index(part) if part in order else len(order))


def _share(value: float, total: float) -> str:
    return f"{units.seconds(value)} {100 * value / total:3.0f} %" if value > 0 else "-"


def _microbatches(plan: Plan, global_batch: int | None) -> str:
    if not global_batch:
        return str(plan.microbatches)
    return f"{plan.microbatches} x {global_batch // (plan.mesh.batch_shards * plan.microbatches):,}"


def _schedule(plan: Plan) -> str:
    if plan.mesh.stage == 1:
        return "-"
    return (
        plan.schedule
        + (f"\n{plan.chunks} chunks" if plan.chunks > 1 else "")
        + ("\nvocab spread" if plan.vocab == "spread" else "")
    )
