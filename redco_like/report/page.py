"""Puts the page together: what was asked, what won, and why, from a search's result or from one saved plan."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import search
from redco_like.report.bars import Row, draw_communication, draw_plans, memory_parts, time_parts
from redco_like.report.lanes import step_lanes
from redco_like.report.markup import TIMES, Markup, amount, gib, percent, seconds, tag
from redco_like.report.pareto import draw_pareto
from redco_like.report.style import JS, css
from redco_like.report.tables import axes_table, params_table, params_total, plans_table, sensitivity_table
from redco_like.report.timeline import NAMES, choose_cuts, draw_timeline, drawn_every, timeline_kinds
from redco_like.report.words import exposed, field, how_words, mesh_words
from search import Plan, Sensitivity, TracedModel
from search.estimate import Estimate
from search.schedules import Timeline
from search.solver import SearchResult
from sharding_rules import Layout, PlanError, make_layout

WIDE, NARROW = 960, 358


def write_report(
    path: str | pathlib.Path,
    *,
    problem: Any = None,
    model: TracedModel | None = None,
    result: SearchResult | None = None,
    plan: Plan | None = None,
    estimate: Estimate | None = None,
    sensitivity: Sequence[Sensitivity] | None = None,
) -> pathlib.Path:
    """Write one self-contained HTML page on the result of a search, or on one plan.

    Args:
        path: of the page.
        problem: what was planned: a `redco_like.problem.ModelProblem`, or the `problem` of a plan (the default).
        model: the traced model: for its cluster, the table of axes and the parameters.
        result: of `search.solve`. Without it:
        plan, estimate: the plan to show, and what it is expected to do; by default the estimate stored in the plan.
        sensitivity: of the winner and the runners-up, in this order; by default it is computed if `model` is there.

    Returns:
        The path.

    Raises:
        ValueError: neither a result nor a plan with an estimate.
    """
    path = pathlib.Path(path)
    path.write_text(
        report_html(problem=problem, model=model, result=result, plan=plan, estimate=estimate, sensitivity=sensitivity),
        "utf-8",
    )
    return path


def report_html(
    *,
    problem: Any = None,
    model: TracedModel | None = None,
    result: SearchResult | None = None,
    plan: Plan | None = None,
    estimate: Estimate | None = None,
    sensitivity: Sequence[Sensitivity] | None = None,
) -> str:
    """The page of `write_report` as text."""
    rows, front = _rows(result, plan, estimate)
    if rows and not problem:
        problem = rows[0].plan.problem
    cluster = model.costs.cluster.name if model is not None else field(problem, "cluster", "")
    name = field(problem, "name") or field(problem, "model") or "model"
    title = f"{name} on {cluster}" if cluster else str(name)
    sections = [_headline(title, problem, rows, result)]
    if rows:
        best = rows[0]
        sections += [_compared(rows), _timeline(best, model, problem), _communication(best.estimate, best.plan)]
        if len(front) > 1:
            sections.append(_pareto(front, rows))
        if sensitivity is None and model is not None and result is not None:
            sensitivity = search.sensitivity(model, [row.plan for row in rows])
        sections += [_table(rows, sensitivity or ()), _axes(best.plan, model, problem), _file(best.plan)]
    return whole_page(title, sections)


def whole_page(title: str, sections: Sequence[Markup]) -> str:
    """A page from its sections, with the style and the script that they need."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(css())),
    )
    body = tag(
        "body", tag("main", *sections), tag("div", id="tip", hidden="", role="tooltip"), tag("script", Markup(JS))
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _rows(result: SearchResult | None, plan: Plan | None, estimate: Estimate | None) -> tuple[list[Row], list[Row]]:
    """The compared plans, winner first, and the front."""
    if result is None:
        estimate = estimate or (plan.estimate if plan is not None else None)
        if plan is None or estimate is None:
            raise ValueError("a report needs result=, or plan= with an estimate (its own, or estimate=)")
        return [Row("1", plan, estimate)], []
    if result.best is None:
        return [], []
    rows = [Row(str(k + 1), c.plan, c.estimate) for k, c in enumerate((result.best, *result.runners_up))]
    return rows, [Row("", c.plan, c.estimate) for c in result.pareto]


# Sections.


def _headline(title: str, problem: Any, rows: Sequence[Row], result: SearchResult | None) -> Markup:
    name = str(field(problem, "name") or "")
    facts = [str(field(problem, "description") or "").removeprefix(f"{name}: ")]
    known = {"seq_len": "tokens per sequence", "global_batch": "examples per step"}
    known |= {} if facts[0] else {"parameters": "parameters"}
    facts += [f"{_count(field(problem, k))} {words}" for k, words in known.items() if field(problem, k)]
    facts += [str(field(problem, k)) for k in ("optimizer", "task") if field(problem, k, "train") != "train"]
    top = [
        tag("p", "redco-like plan", class_="eyebrow"),
        tag("h1", title),
        tag("p", " · ".join(fact for fact in facts if fact), class_="soft"),
    ]
    if not rows:
        advice = result.advice if result is not None else ""
        return tag("section", *top, tag("p", "No plan fits.", class_="winner-line"), tag("p", advice), id="headline")
    plan, e = rows[0].plan, rows[0].estimate
    labels = set(e.labels.values())
    label = tag("span", " / ".join(sorted(labels)), class_="label")
    said = f", {how_words(plan)} (preset {plan.preset}): {seconds(e.seconds_per_step)} per step."
    lead = "The fastest plan that fits: " if result is not None else "The plan: "
    top.append(tag("p", lead, tag("b", mesh_words(plan)), said, class_="winner-line"))
    if plan.planned:
        top.append(
            tag("p", f"Planned only; the training step cannot run it yet: {', '.join(plan.planned)}.", class_="warn")
        )
    if not e.fits:
        top.append(tag("p", f"Does not fit: {gib(e.bytes_per_device)} of {gib(e.usable_bytes)} usable.", class_="warn"))
    devices = plan.mesh.size
    unit = "tokens" if field(problem, "seq_len") else "tokens or examples"
    top.append(
        tag(
            "dl",
            stat("Step time", seconds(e.seconds_per_step), f"{seconds(e.low_seconds)} to {seconds(e.high_seconds)}"),
            stat(
                f"{unit.capitalize()} per second",
                amount(e.tokens_per_second),
                f"{amount(e.tokens_per_second / devices)} per device",
            ),
            stat("Model FLOPs utilisation", percent(e.mfu), f"{amount(e.flops)}FLOP per step on {devices:,} devices"),
            stat(
                "Memory per device",
                gib(e.bytes_per_device),
                f"{percent(e.bytes_per_device / max(e.usable_bytes, 1))} of {gib(e.usable_bytes)} usable",
            ),
            class_="stats",
        )
    )
    how = {"analytic": "computed, not run", "compiled": "read from the compiled step", "measured": "timed on devices"}
    each = ", ".join(f"{what} {word}" for what, word in e.labels.items())
    told = how[next(iter(labels))] if len(labels) == 1 else each
    top.append(tag("p", label, f" {told}. What binds: {e.binds}."))
    if result is not None:
        proof = "nothing in the declared space is faster and fits" if result.gap == 0 else "the search was cut short"
        top.append(
            tag(
                "p",
                tag("b", f"Gap {percent(result.gap)}"),
                f": {proof}. ",
                tag("span", result.certificate() + ".", class_="soft"),
            )
        )
    return tag("section", *top, id="headline")


def _count(number: Any) -> str:
    return f"{number:,.0f}" if number < 1e6 else amount(number)


def stat(name: str, value: str, more: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, class_="big"), tag("dd", more, class_="sub"))


def _compared(rows: Sequence[Row]) -> Markup:
    e = rows[0].estimate
    biggest = max(memory_parts(e), key=lambda part: part[2], default=("", "nothing", 0.0))
    said = f"Most of the memory is {biggest[1]}: {gib(biggest[2])} of {gib(e.bytes_per_device)}."
    if len(rows) > 1:
        slower = rows[1].estimate.seconds_per_step / e.seconds_per_step - 1
        said += f" The runner-up is {100 * slower:.1f} % slower."
    time = {
        k: {"exposed": "waiting for communication", "bubble": "idle stages"}.get(k, k)
        for r in rows
        for k, _, _ in time_parts(r.estimate)
    }
    memory = {k: w for r in rows for k, w, _ in memory_parts(r.estimate) if k != "optimizer"}
    if "optimizer" in time or any(r.estimate.memory.get("optimizer") for r in rows):
        time["optimizer"] = "optimizer: step and state"
    return section(
        "memory",
        "Time and memory",
        said,
        keys({**time, **memory}),
        both(lambda width: draw_plans(rows, width)),
        caption="Whiskers: interval of the step time from the errors of the model's constants.",
    )


def _timeline(row: Row, model: TracedModel | None, problem: Any) -> Markup:
    share = _forward_share(model, row.plan, problem)
    step = step_lanes(row.plan, row.estimate, forward_share=share, timeline=_schedule(model, row.plan))
    e = row.estimate
    waits = sum(exposed(e).values())
    said = f"Devices compute for {_of(e.seconds.get('compute', 0.0), e)} of the step"
    said += f" and wait for communication {_of(waits, e)}" if waits else ""
    said += f"; stages are idle {_of(e.seconds['bubble'], e)}" if e.seconds.get("bubble") else ""
    said += f"; another {seconds(e.hidden_seconds)} of communication runs behind compute." if e.hidden_seconds else "."
    kinds = {kind: NAMES[kind] for kind in timeline_kinds(step)}
    if step.pipeline:
        caption = (
            f"One lane per stage of {row.plan.mesh.stage}, {row.plan.schedule} schedule; numbers are microbatches. "
            "Communication within a stage is part of its blocks."
        )
        every = drawn_every(step, choose_cuts(step, WIDE, narrow=False))
        caption += f" One stage in {every} is drawn." if every > 1 else ""
    else:
        caption = (
            "Lengths are the estimate's. The collectives of a pass, in truth spread over its layers, are drawn "
            "together at its end."
        )
    return section(
        "timeline",
        "One step",
        said,
        keys({**kinds, "idle": "idle"}),
        both(lambda width: draw_timeline(step, width)),
        caption=caption,
    )


def _communication(e: Estimate, plan: Plan) -> Markup:
    total = sum(row["bytes"] for row in e.communication.values())
    if not total:
        return section("communication", "Communication", "Devices exchange nothing.")
    most = max(e.communication, key=lambda axis: e.communication[axis]["seconds"])
    waits = sum(exposed(e).values())
    said = (
        f"Collectives of a device move {gib(total)} per step, longest over {most}; "
        f"compute waits for them {seconds(waits)}, {_of(waits, e)} of the step."
    )
    return section(
        "communication",
        "Communication by mesh axis",
        said,
        keys({"hidden": "behind compute", "exposed": "compute waits"}),
        both(lambda width: draw_communication(e, plan.mesh.sizes, width)),
        caption="Per device and step. Waiting includes the slow-down of compute and collectives that run side by side.",
    )


def _pareto(front: Sequence[Row], rows: Sequence[Row]) -> Markup:
    least = min(front, key=lambda row: row.estimate.bytes_per_device)
    best = rows[0].estimate
    slower = least.estimate.seconds_per_step / best.seconds_per_step
    said = (
        f"The least memory is {gib(least.estimate.bytes_per_device)}, at {slower:.2f} times the winner's step time: "
        f"{mesh_words(least.plan)}, {how_words(least.plan)}."
    )
    return section(
        "pareto",
        "Time against memory",
        said,
        keys({"winner": "winner", "runner": "runners-up", "point": "the front"}),
        both(lambda width: draw_pareto(front, rows, width)),
        caption=f"The {len(front)} plans that no other beats in both; numbers are those of the plans above. Point at "
        "one for what it is.",
    )


def _table(rows: Sequence[Row], sensitivity: Sequence[Sensitivity]) -> Markup:
    title = "Plans" if len(rows) > 1 else "The plan in numbers"
    more: list[Markup] = []
    if sensitivity and len(rows) > 1:
        factor = max(row.factor for row in sensitivity)
        lost = [row for row in sensitivity if row.winner != 0]
        said = f"With any one of them off by a factor of {factor:.2f}, up or down, plan 1 stays the fastest of these."
        if lost:
            cases = [f"plan {rows[r.winner].name} with {r.constant} at {TIMES} {r.factor:.2f}" for r in lost]
            said = f"Another of these plans would be the fastest: {'; '.join(cases)}."
        more = [
            tag("h3", "If the model's constants are off"),
            tag("p", said),
            sensitivity_table(sensitivity, [row.name for row in rows]),
        ]
    return section("plans", title, "", plans_table(rows), *more, long=True)


def _axes(plan: Plan, model: TracedModel | None, problem: Any) -> Markup:
    try:
        layout = _layout(plan, model, problem)
    except PlanError as error:
        return section("axes", "Axes", f"There is no table of axes: {error}")
    if layout is None:
        return section("axes", "Axes", "The table of axes needs the model; this page was made from the plan alone.")
    count, size = params_total(layout, plan.param_dtype)
    said, whose = "Every array of the step follows from this table.", "per device"
    if plan.mesh.stage > 1:
        said += f" The {plan.mesh.stage} pipeline stages have some layers each; the table is that of all of them."
        whose = "of all stages' devices at one place of the rest of the mesh"
    return section(
        "axes",
        "What is split over what",
        said,
        axes_table(layout),
        tag(
            "details",
            tag("summary", f"Parameters: {count:,} arrays, {gib(size)} as {plan.param_dtype} {whose}"),
            params_table(layout, plan.param_dtype, whose),
            class_="print",
        ),
        long=True,
    )


def _file(plan: Plan) -> Markup:
    return tag(
        "section",
        tag("details", tag("summary", "The plan as a file"), tag("pre", plan.to_json())),
        id="file",
        class_="long",
    )


# Parts of sections.


def section(name: str, title: str, said: str, *children: Markup, caption: str = "", long: bool = False) -> Markup:
    more = [tag("p", caption, class_="soft caption")] if caption else []
    lede = [tag("p", said)] if said else []
    return tag("section", tag("h2", title), *lede, *children, *more, id=name, class_="long" if long else None)


def both(draw: Callable[[int], Markup]) -> Markup:
    """A figure for wide screens and paper, and one for phones."""
    return tag("figure", tag("div", draw(WIDE), class_="wide"), tag("div", draw(NARROW), class_="narrow"))


def keys(kinds: dict[str, str]) -> Markup:
    return tag("ul", *(tag("li", tag("i", class_=kind), words) for kind, words in kinds.items()), class_="keys")


def _of(part: float, e: Estimate) -> str:
    return percent(part / e.seconds_per_step) if e.seconds_per_step else "0 %"


def _layout(plan: Plan, model: TracedModel | None, problem: Any) -> Layout | None:
    """The layout of a plan, of all its stages together; None without the model."""
    mesh = dataclasses.replace(plan.mesh, stage=1)
    if model is not None:
        return model.layout.on(mesh, plan.preset, rules=plan.rules)
    traced = field(problem, "traced")
    return None if traced is None else make_layout(traced, mesh, plan.preset, rules=plan.rules)


def _schedule(model: TracedModel | None, plan: Plan) -> Timeline | None:
    """When the stages of a pipeline work, if there are any and the model is there to say it."""
    if model is None or plan.mesh.stage == 1:
        return None
    try:
        return search.timeline(model, plan)
    except PlanError:
        return None  # a plan with rules of its own is drawn with equal stages


def _forward_share(model: TracedModel | None, plan: Plan, problem: Any) -> float | None:
    """Share of a step's flops that its forward pass has; None where neither the model nor the task says it."""
    if field(problem, "task", "train") != "train":
        return 1.0
    work = model.works.get(plan.remat) if model is not None else None
    phases = work.flops_by("phase") if work is not None else {}
    return phases.get("forward", 0) / sum(phases.values()) if any(phases.values()) else None
