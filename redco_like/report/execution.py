"""A page of HTML on an execution plan of an RLHF graph: the Gantt of a steady iteration, memory, calls, moves.

    write_execution_report("rlhf.html", execution, others={"colocated": colocated, "real": real})

`others` are what it is compared with: each is drawn on the same time axis.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from redco_like.report.gantt import draw_gantt, draw_memory, idle_share, kinds
from redco_like.report.markup import TIMES, Markup, amount, gib, join, percent, seconds, tag
from redco_like.report.page import both, keys, section, stat, whole_page
from redco_like.report.tables import table
from redco_like.report.words import how_words, mesh_words
from search.rlhf import CallPlan, ExecutionPlan
from search.rlhf.heuristics import WORDS


def write_execution_report(
    path: str | pathlib.Path, execution: ExecutionPlan, *, others: Mapping[str, ExecutionPlan] | None = None
) -> pathlib.Path:
    """Write the page.

    Args:
        path: of the file.
        execution: what is shown.
        others: plans that it is compared with, by name.
    """
    path = pathlib.Path(path)
    path.write_text(execution_html(execution, others=others or {}), "utf-8")
    return path


def execution_html(execution: ExecutionPlan, *, others: Mapping[str, ExecutionPlan]) -> str:
    """The page of `write_execution_report` as text."""
    title = f"{execution.graph.name.upper()} on {execution.cluster}"
    sections = [_headline(title, execution), _timelines(execution, others)]
    if execution.memory:
        sections.append(_memory(execution))
    sections += [_calls(execution), _moves(execution)]
    details = tag("details", tag("summary", "The execution plan as a file"), tag("pre", execution.to_json()))
    sections.append(tag("section", details, id="file", class_="long"))
    return whole_page(title, sections)


def _headline(title: str, execution: ExecutionPlan) -> Markup:
    w, period = execution.workload, execution.period_seconds
    models = ", ".join(f"{role} {execution.models[role]}" for role in execution.graph.roles)
    load = f"{w.prompts:,} prompts of {w.prompt_tokens:,} tokens, {w.new_tokens:,} new ones"
    load += f", {w.samples} completions each" if w.samples > 1 else ""
    slower = {name: p / period for name, p in execution.heuristics.items() if period and p < float("inf")}
    best = min(slower, key=lambda name: slower[name], default="")
    proof = "nothing in the declared space is faster and fits" if execution.gap < 1e-9 else "the search was cut short"
    stats = [
        stat("Iteration", seconds(period), f"no plan is below {seconds(execution.bound_seconds)}"),
        stat(
            "Tokens per second",
            amount(w.sequences * w.length / period) if period else "-",
            f"{amount(w.sequences * w.length)} tokens per iteration",
        ),
        stat("Devices idle", percent(idle_share(execution)), f"of {execution.devices:,} devices, over an iteration"),
    ]
    if best:
        stats.append(stat("Best heuristic", f"{slower[best]:.2f} {TIMES}", f"the time: {WORDS.get(best, best)}"))
    return tag(
        "section",
        tag("p", "redco-like rlhf", class_="eyebrow"),
        tag("h1", title),
        tag("p", f"{models} · {load}", class_="soft"),
        tag("dl", *stats, class_="stats"),
        tag("p", tag("span", "analytic", class_="label"), " computed, not run."),
        tag("p", tag("b", f"Gap {percent(max(0.0, execution.gap))}"), f": {proof}. {execution.reason}"),
        id="headline",
    )


def _named(name: str) -> str:
    words = WORDS.get(name, name)
    return words[:1].upper() + words[1:]


def _timelines(execution: ExecutionPlan, others: Mapping[str, ExecutionPlan]) -> Markup:
    upto = max([execution.period_seconds, *(other.period_seconds for other in others.values())])
    legend = keys({**kinds(execution), "idle": "idle"})
    figures = [
        tag("h3", f"This plan: {seconds(execution.period_seconds)}"),
        both(lambda width: draw_gantt(execution, width, upto=upto)),
    ]
    for name, other in others.items():
        ratio = other.period_seconds / execution.period_seconds
        figures += [
            tag("h3", f"{_named(name)}: {seconds(other.period_seconds)}, {ratio:.2f} {TIMES}"),
            both(lambda width, other=other: draw_gantt(other, width, upto=upto)),
        ]
    said = "A steady iteration; what is drawn faint belongs to the one before or after."
    return section("timeline", "Who does what, when", said, legend, *figures, long=True)


def _memory(execution: ExecutionPlan) -> Markup:
    said = "Bytes of one device of each group: parameters, optimizer states, copies, caches and working memory."
    return section("memory", "Memory over an iteration", said, both(lambda width: draw_memory(execution, width)))


def _calls(execution: ExecutionPlan) -> Markup:
    rows = []
    for call in execution.calls:
        node = execution.graph.call(call.call)
        kept = call.params_bytes + call.state_bytes
        plans = [
            tag("div", mesh_words(call.plan)),
            *(tag("div", words, class_="more") for words in _how(call, node.kind)),
        ]
        rows.append(
            [
                call.call,
                f"{node.role} ({execution.models[node.role]})",
                str(call.window),
                join(*plans),
                seconds(call.seconds),
                gib(kept),
                gib(call.working_bytes),
            ]
        )
    head = ["call", "role", "devices", "plan", "takes", "parameters and state", "while it runs"]
    return section(
        "calls", "Calls", "In the order of dispatch.", table(head, rows, numbers=range(4, 7), class_="full"), long=True
    )


def _how(call: CallPlan, kind: str) -> list[str]:
    """What else the call's plan chooses; only training keeps activations."""
    m = call.plan.microbatches
    words = [how_words(call.plan)] if kind == "train" else [f"{m} parts, one after the other"] if m > 1 else []
    if call.prefill is not None and mesh_words(call.prefill) != mesh_words(call.plan):
        words.append(f"prompts: {mesh_words(call.prefill)}")
    return words


def _moves(execution: ExecutionPlan) -> Markup:
    if not execution.moves:
        return section("moves", "Moves of parameters", "None: every role stays where it is.")
    rows = []
    for move in execution.moves:
        where = f"{move.source} → {move.target}" if move.kind == "reallocate" else f"for {move.target}"
        rows.append([move.role, move.kind, where, gib(move.nbytes), seconds(move.seconds)])
    said = "Each iteration, after the parameters have changed."
    head = ["role", "kind", "calls", "sent in all", "takes"]
    return section("moves", "Moves of parameters", said, table(head, rows, numbers=(3, 4)))
