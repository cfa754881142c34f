"""A sizing as tables and as a record."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from redco_like.cli import units
from redco_like.cli.terminal import Terminal

if TYPE_CHECKING:
    from redco_like.cli.sizing import Machine
    from search import Cluster
    from search.serving import Load, Phases, Served, Sizing

SIZING_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Change:
    """Something else than what was asked for, what becomes of the same users with it, and about how many fit."""

    what: str
    served: Served | None
    limits_hold: bool
    fitting: int


def holds(served: Served | None, load: Load) -> bool:
    """Whether users fit within the limits."""
    return served is not None and served.meets(load)


def show(
    terminal: Terminal,
    name: str,
    load: Load,
    machine: Machine,
    cluster: Cluster,
    sizing: Sizing,
    changes: list[Change],
    phases: Phases,
) -> None:
    """Print a sizing: what was asked, numbers of users side by side, what would help."""
    from redco_like.cli.tables import pairs

    each = machine.cache_bytes(load.context_tokens)
    chip = cluster.accelerator
    wanted = [f"{text} {units.seconds(value)}" for text, value in _limits(load) if value < math.inf]
    header = [
        ("model", f"{name}: {units.many(machine.parameters)} parameters in {machine.dtype}"),
        (
            "load",
            f"{load.users:,} users, {load.context_tokens:,} tokens each: a prompt of {load.prompt_tokens:,}, an answer "
            f"of {load.output_tokens:,}; {units.size(each)} of cache each",
        ),
        ("limits", ", ".join(wanted) or "none given (--slo ttft=500ms,tpot=30ms)"),
        (
            "cluster",
            f"{cluster.name}: {cluster.devices:,} x {chip.name}, {units.size(chip.memory_bytes)} of memory, of which "
            f"{units.size(machine.budget(cluster))} may be used",
        ),
    ]
    terminal.print(pairs(header), "")
    columns = _columns(load, sizing)
    if columns:
        terminal.print(serving_table(columns, load, machine.budget(cluster)), "")
    verdict = _verdict(load, machine, cluster, sizing)
    terminal.print(Text(verdict, style="green" if holds(sizing.asked, load) else "bold red"), "")
    if changes:
        terminal.print(change_table(load, changes), "")
    if columns:
        terminal.print(pairs(_alone(columns[0][1], load, phases, cluster.devices, machine.budget(cluster))), "")
    terminal.print(
        "[dim]analytic: one copy of the parameters; after each step of decoding, on each replica, one chunk of a prompt"
        " if one waits; caches counted full; users send the next prompt when they have their answer[/]"
    )


def _columns(load: Load, sizing: Sizing) -> list[tuple[str, Served]]:
    """Headings and what stands below: what was asked, and the most, without what would stand there twice."""
    out = [("asked", sizing.asked)] if sizing.asked else []
    if load.limited and sizing.most_meeting:
        out.append(("most within limits", sizing.most_meeting))
    if sizing.most_fitting:
        out.append(("most that fit", sizing.most_fitting))
    seen: dict[int, tuple[str, Served]] = {}
    for heading, served in out:
        if served.users in seen:
            heading = f"{seen[served.users][0]}, {heading}"
        seen[served.users] = heading, served
    return list(seen.values())


def serving_table(columns: list[tuple[str, Served]], load: Load, budget_bytes: float) -> Table:
    """Numbers of users side by side."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("analytic", no_wrap=True, header_style="dim")
    for i, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right", max_width=22, style="green" if i == 0 else "")

    def row(name: str, cell: Callable[[Served], str], style: str = "") -> None:
        table.add_row(
            Text(name, style="dim" if name.startswith(" ") else ""), *(cell(s) for _, s in columns), style=style
        )

    def judged(seconds: float, limit: float) -> str:
        mark = "" if limit == math.inf else " ok" if seconds <= limit else " [bold red]over[/]"
        return units.seconds(seconds) + mark

    largest = max(s.bytes_per_device for _, s in columns)
    row("users", lambda s: f"{s.users:,}", "bold")
    row("mesh", lambda s: "\n".join(f"{axis} {n}" for axis, n in s.mesh.sizes.items() if n > 1) or "one device")
    row("replicas x users", lambda s: f"{s.mesh.batch_shards} x {s.rows // s.mesh.batch_shards:,}")
    row("chunk of a prompt", lambda s: "whole" if s.chunks == 1 else f"{s.chunk_tokens:,} tokens")
    table.add_section()
    row("time to first token", lambda s: judged(s.ttft_seconds, load.ttft_seconds), "bold")
    row("  a prompt alone", lambda s: units.seconds(s.prompt_seconds))
    row("time per token", lambda s: judged(s.tpot_seconds, load.tpot_seconds), "bold")
    row("  no prompt between", lambda s: units.seconds(s.decode_seconds))
    row("  a prompt between", lambda s: units.seconds(s.decode_seconds + s.chunk_seconds))
    row("output tokens/s", lambda s: units.count(s.requests_per_second * load.output_tokens))
    row("prompt tokens/s", lambda s: units.count(s.requests_per_second * load.prompt_tokens))
    table.add_section()
    row("memory", lambda s: units.size(s.bytes_per_device, largest), "bold")
    row("  of usable", lambda s: units.percent(s.bytes_per_device / budget_bytes))
    for part in ("params", "cache", "workspace"):
        row(f"  {part}", lambda s, part=part: units.size(s.memory[part], largest))
    return table


def change_table(load: Load, changes: list[Change]) -> Table:
    """What would become of the same users with something changed."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(f"{load.users:,} users with", no_wrap=True)
    for name in ("fit", "most that fit", "first token", "per token", "output tokens/s", "limits"):
        table.add_column(name, justify="right")
    for change in changes:
        s = change.served
        most = f"about {change.fitting:,}" if change.fitting else "0"
        if s is None:
            table.add_row(change.what, "[red]no[/]", most, "-", "-", "-", "-")
            continue
        table.add_row(
            change.what,
            "yes",
            most,
            units.seconds(s.ttft_seconds),
            units.seconds(s.tpot_seconds),
            units.count(s.requests_per_second * load.output_tokens),
            "-" if not load.limited else "[green]hold[/]" if change.limits_hold else "[red]missed[/]",
        )
    return table


def _limits(load: Load) -> tuple[tuple[str, float], ...]:
    return (("first token within", load.ttft_seconds), ("a token per", load.tpot_seconds))


def _verdict(load: Load, machine: Machine, cluster: Cluster, sizing: Sizing) -> str:
    """One line: whether the users fit, and whether the limits hold."""
    most = f"{sizing.most_fitting.users:,}" if sizing.most_fitting else "0"
    if sizing.most_fitting is None:
        need, have = units.size(sizing.least_bytes), units.size(machine.budget(cluster))
        return f"Not even one user fits: the least is {need} per device, and {have} may be used."
    if sizing.asked is None:
        text = f"{load.users:,} users do not fit: about {most} do"
    else:
        text = f"{load.users:,} users fit, of about {most} at most"
    if not load.limited:
        return text + "."
    if holds(sizing.asked, load):
        most_meeting = f"{sizing.most_meeting.users:,}" if sizing.most_meeting else "0"
        return f"{text}, and the limits hold; they do up to about {most_meeting} users."
    if sizing.most_meeting is None:
        return f"{text}; the limits hold for no number of users."
    return f"{text}; the limits hold up to about {sizing.most_meeting.users:,}."


def _alone(served: Served, load: Load, phases: Phases, devices: int, budget_bytes: float) -> list[tuple[str, str]]:
    """What either kind of step would rather run on, if it had the cluster for itself."""

    def mesh(found: Any) -> str:
        return " x ".join(f"{axis} {n}" for axis, n in found.sizes.items() if n > 1) or "one device"

    def held(step: Any) -> float:
        return step.params_bytes + step.cache_bytes + step.workspace_bytes

    out = []
    for name, steps, what in (
        ("prompts alone", phases.prefill(1, load.prompt_tokens), "for one prompt at a time"),
        ("decoding alone", _everywhere(phases, served.rows, devices), f"per token of {served.rows:,} rows"),
    ):
        fits = {m: step for m, step in steps.items() if held(step) <= budget_bytes}
        if fits:
            best = min(fits, key=lambda m: fits[m].seconds)
            out.append((name, f"best on {mesh(best)}: {units.seconds(fits[best].seconds)} {what}"))
    return out


def _everywhere(phases: Phases, rows: int, devices: int) -> dict[Any, Any]:
    """Steps of decoding on every mesh that shares out so many rows."""
    from search.space import divisors

    shared = (replicas for replicas in divisors(devices) if rows % replicas == 0)
    return {mesh: step for replicas in shared for mesh, step in phases.decode(replicas, rows).items()}


def sizing_record(
    load: Load,
    machine: Machine,
    cluster: Cluster,
    sizing: Sizing,
    changes: list[Change],
    problem: dict[str, Any],
) -> dict[str, Any]:
    """What `--json` prints and `--out` writes; keys are only ever added."""

    def plain(served: Served | None) -> dict[str, Any] | None:
        if served is None:
            return None
        found = {name: getattr(served, name) for name in ("users", "rows", "chunk_tokens", "decode_seconds")}
        found |= {name: getattr(served, name) for name in ("chunk_seconds", "prompt_seconds", "ttft_seconds")}
        found |= {"tpot_seconds": served.tpot_seconds, "requests_per_second": served.requests_per_second}
        return found | {
            "output_tokens_per_second": served.requests_per_second * load.output_tokens,
            "mesh": served.mesh.sizes,
            "memory": dict(served.memory),
            "bytes_per_device": served.bytes_per_device,
            "limits_hold": served.meets(load),
        }

    def plans(served: Served | None) -> dict[str, Any]:
        if served is None:
            return {"decode": None, "prefill": None}
        made = {"decode": served.decode.plan(), "prefill": served.prefill.plan()}
        return {name: json.loads(plan.to_json()) for name, plan in made.items()}

    given = {name: value if value < math.inf else None for name, value in _limits_by_name(load).items()}
    return {
        "version": SIZING_VERSION,
        "label": "analytic",
        "problem": {
            "model": problem["model"],
            "cluster": problem["cluster"],
            "dtype": machine.dtype,
            "parameters": machine.parameters,
            "devices": cluster.devices,
            "users": load.users,
            "context_tokens": load.context_tokens,
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            **given,
        },
        "cache_bytes_per_user": machine.cache_bytes(load.context_tokens),
        "usable_bytes": machine.budget(cluster),
        "fits": sizing.asked is not None,
        "limits_hold": holds(sizing.asked, load),
        "asked": plain(sizing.asked),
        "most_within_limits": plain(sizing.most_meeting) if load.limited else None,
        "most_that_fit": plain(sizing.most_fitting),
        "changes": [{"what": c.what, "most_that_fit": c.fitting, "served": plain(c.served)} for c in changes],
        "plans": plans(sizing.asked or sizing.most_meeting or sizing.most_fitting),
    }


def _limits_by_name(load: Load) -> dict[str, float]:
    return {"ttft_seconds": load.ttft_seconds, "tpot_seconds": load.tpot_seconds}
