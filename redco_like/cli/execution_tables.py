"""Execution plans of RLHF graphs as tables."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from rich.table import Table

from redco_like.cli import units
from redco_like.cli.words import ordered_axes
from search.rlhf.heuristics import WORDS

if TYPE_CHECKING:
    from search import Plan
    from search.rlhf import CallPlan, ExecutionPlan


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def heading(execution: ExecutionPlan) -> str:
    """What is planned, in one line."""
    w = execution.workload
    samples = f" x {w.samples} completions" if w.samples > 1 else ""
    steps = w.minibatches * w.epochs
    return (
        f"[bold]{execution.graph.name} on {execution.cluster}[/], {execution.devices:,} devices; "
        f"{w.prompts:,} prompts{samples} of {w.prompt_tokens:,} + {w.new_tokens:,} tokens, "
        f"{steps} optimizer step{'s' if steps > 1 else ''}"
    )


def call_table(execution: ExecutionPlan) -> Table:
    """One line for each call, in the order of dispatch."""
    table = _table(
        ("analytic", "left"),
        ("model", "left"),
        ("devices", "right"),
        ("mesh", "left"),
        ("how", "left"),
        ("seconds", "right"),
        ("weights", "right"),
        ("state", "right"),
        ("working", "right"),
    )
    kept = [(call.params_bytes, call.state_bytes, call.working_bytes) for call in execution.calls]
    largest = max(max(sizes) for sizes in kept)
    for call, sizes in zip(execution.calls, kept, strict=True):
        node = execution.graph.call(call.call)
        table.add_row(
            call.call,
            _short(execution.models[node.role]),
            str(call.window),
            mesh(call.plan),
            _how(call, node.kind),
            units.seconds(call.seconds),
            *(units.size(n, largest) if n else "-" for n in sizes),
        )
    return table


def move_table(execution: ExecutionPlan) -> Table:
    """One line for each move of parameters."""
    table = _table(("moves", "left"), ("of", "left"), ("", "left"), ("sent in all", "right"), ("seconds", "right"))
    for move in execution.moves:
        where = f"{move.source} -> {move.target}" if move.kind == "reallocate" else f"for {move.target}"
        table.add_row(move.kind, move.role, where, units.size(move.nbytes), units.seconds(move.seconds))
    return table


def proof(execution: ExecutionPlan) -> list[tuple[str, str]]:
    """The period, what is known of the best, and memory: lines of a name and a text."""
    w, period = execution.workload, execution.period_seconds
    tokens = w.sequences * w.length / period if period else 0.0
    lines = [
        ("iteration", f"{units.seconds(period, 4)}, {units.count(tokens)} tokens/s"),
        ("proof", execution.reason),
    ]
    if execution.memory:
        window, levels = max(execution.memory, key=lambda entry: max(b for _, b in entry[1]))
        most = max(b for _, b in levels)
        text = f"at most {units.size(most)} per device of {units.size(execution.usable_bytes)}, on devices {window}"
        lines.append(("memory", text))
    if execution.offloaded:
        lines.append(("offloaded", f"{', '.join(execution.offloaded)}: in the host's memory between their calls"))
    return lines


def heuristic_table(best: ExecutionPlan) -> Table:
    """What other plans take."""
    table = _table(("beside", "left"), ("iteration", "right"), ("slower", "right"), ("", "left"))
    for name, period in best.heuristics.items():
        fits = period < float("inf")
        told = "does not fit" if not fits else ""
        table.add_row(
            WORDS.get(name, name),
            units.seconds(period, 4) if fits else "-",
            f"{100 * (period / best.period_seconds - 1):+.1f} %" if fits else "-",
            told,
        )
    return table


def mesh(plan: Plan) -> str:
    """Axes and sizes on one line."""
    return " ".join(f"{axis} {plan.mesh.sizes[axis]}" for axis in ordered_axes(plan)) or "one device"


def _short(model: str) -> str:
    """The name of an architecture, of a config.json's folder, or of another file."""
    path = pathlib.Path(model)
    if path.suffix != ".json":
        return model
    return path.parent.name if path.name == "config.json" else path.stem


def _how(call: CallPlan, kind: str) -> str:
    plan = call.plan
    parts = [f"{plan.microbatches} microbatches"] if plan.microbatches > 1 else []
    if kind == "train":
        parts += [f"remat {plan.remat}"] if plan.remat != "none" else []
        parts += ["ZeRO-1"] if plan.optimizer_sharding else []
    parts += ["sequence"] if "sequence" in plan.preset.split("+") else []
    if call.prefill is not None and mesh(call.prefill) != mesh(plan):
        parts.append(f"prompts {mesh(call.prefill)}")
    return ", ".join(parts) or "-"
