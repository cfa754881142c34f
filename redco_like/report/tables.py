"""The tables of the page: plans, sensitivity, logical axes and parameters."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from redco_like.report.bars import Row
from redco_like.report.markup import TIMES, Markup, decimals, gib, join, tag, time_unit
from redco_like.report.words import MEMORY_PARTS, exposed, how_words, mesh_words
from search import Sensitivity
from sharding_rules import Layout
from sharding_rules.explain import ParamLine, axis_lines, param_lines


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    groups: Sequence[tuple[str, int]] = (),
    numbers: Sequence[int] = (),
    best: int = -1,
    class_: str | None = None,
) -> Markup:
    """Write a table.

    Args:
        head, rows: text or markup.
        groups: heads over some columns each, and their number.
        numbers: columns that are aligned right.
        best: row that is set in bold.
        class_: of the table.
    """
    of = lambda k: "n" if k in numbers else None  # noqa: E731
    top = [
        tag("tr", *(tag("th", words, colspan=count, class_="group" if words else "none") for words, count in groups))
    ]
    top = [*(top if groups else []), tag("tr", *(tag("th", c, class_=of(k), scope="col") for k, c in enumerate(head)))]
    body = [
        tag("tr", *(tag("td", cell, class_=of(k)) for k, cell in enumerate(row)), class_="best" if i == best else None)
        for i, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", *top), tag("tbody", *body), class_=class_), class_="scroll")


def plans_table(rows: Sequence[Row]) -> Markup:
    """The winner and the runners-up: what they choose, where their seconds go, what they keep."""
    unit, size = time_unit(rows[0].estimate.seconds_per_step)
    best = rows[0].estimate.seconds_per_step
    parts = ["bubble", "offload", "optimizer"]
    parts = [part for part in parts if any(row.estimate.seconds.get(part) for row in rows)]
    memory = [part for part in MEMORY_PARTS if any(row.estimate.memory.get(part) for row in rows)]
    places = decimals(best / size, 4)
    after = decimals(max(row.estimate.bytes_per_device for row in rows) / 2**30)
    cells = []
    for row in rows:
        e = row.estimate
        kept = [*(e.memory.get(part, 0) for part in memory), e.bytes_per_device]
        timed = [e.seconds.get("compute", 0.0), sum(exposed(e).values()), *(e.seconds.get(part, 0.0) for part in parts)]
        more = [how_words(row.plan), f"preset {row.plan.preset}"]
        more += ["not run yet: " + ", ".join(row.plan.planned)] if row.plan.planned else []
        plan = [tag("div", mesh_words(row.plan)), *(tag("div", words, class_="more") for words in more)]
        cells.append(
            [
                row.name,
                join(*plan),
                f"{e.seconds_per_step / size:.{places}f}",
                "" if row is rows[0] else f"+{100 * (e.seconds_per_step / best - 1):.1f} %",
                f"{100 * e.mfu:.1f} %",
                *(f"{s / size:.{places}f}" for s in timed),
                *(f"{b / 2**30:.{after}f}" for b in kept),
            ]
        )
    head = ["", "plan", f"step, {unit}", "slower", "MFU", "compute", "waits", *parts]
    groups = (("", 5), (f"{unit} per step", 2 + len(parts)), ("GiB per device", len(memory) + 1))
    head += [*(MEMORY_PARTS[part] for part in memory), "all"]
    return table(
        head, cells, groups=groups, numbers=range(2, len(head)), best=0 if len(rows) > 1 else -1, class_="full"
    )


def sensitivity_table(rows: Sequence[Sensitivity], names: Sequence[str]) -> Markup:
    """Seconds of the plans with one constant of the model turned down or up; the fastest of a row is bold."""
    unit, size = time_unit(rows[0].seconds[0])
    places = decimals(max(max(row.seconds) for row in rows) / size, 4)
    cells = []
    for row in rows:
        times = [f"{s / size:.{places}f}" for s in row.seconds]
        times = [tag("b", words) if k == row.winner else words for k, words in enumerate(times)]
        cells.append([row.constant, f"{TIMES} {row.factor:.2f}", *times])
    head = ["constant", "rate", *(f"plan {name}, {unit}" for name in names)]
    return table(head, cells, numbers=range(1, len(head)))


def axes_table(layout: Layout) -> Markup:
    """Logical rows -> mesh axes."""
    rows = [
        [a.name, f"{a.size:,}", f"{a.count:,}", a.split.replace(" x ", f" {TIMES} ") or "—", a.found]
        for a in sorted(axis_lines(layout), key=lambda a: not a.split)
    ]
    return table(["logical axis", "elements", "axes", "split over", "found in"], rows, numbers=(1, 2))


def params_table(layout: Layout, param_dtype: str, whose: str = "per device") -> Markup:
    """Parameters with their specs, stored in a dtype; those of repeated layers are one line."""
    rows = [
        [
            join(tag("code", p.path), f" ({p.count})" if p.count > 1 else ""),
            f" {TIMES} ".join(f"{n:,}" for n in p.shape) or "scalar",
            p.axes,
            tag("code", p.at_rest),
            tag("code", p.in_use) if p.in_use != p.at_rest else "same",
            gib(_stored(p, param_dtype)),
        ]
        for p in param_lines(layout)
    ]
    head = ["parameter", "shape", "logical axes", "spec at rest", "spec in use", f"bytes {whose}"]
    return table(head, rows, numbers=(5,))


def params_total(layout: Layout, param_dtype: str) -> tuple[int, int]:
    """Number of parameter arrays, and their bytes per device."""
    lines = param_lines(layout)
    return sum(p.count for p in lines), sum(_stored(p, param_dtype) for p in lines)


def _stored(line: ParamLine, param_dtype: str) -> int:
    """Bytes of parameters that are stored in another dtype than they are traced with; whole numbers keep theirs."""
    if not jnp.issubdtype(line.dtype, jnp.floating):
        return line.bytes_per_device
    return line.bytes_per_device // jnp.dtype(line.dtype).itemsize * jnp.dtype(param_dtype).itemsize
