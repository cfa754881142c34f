"""`redco-like verify` of an execution plan: every call compiled, and what lies beside it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from redco_like.cli import units
from redco_like.cli.execution_tables import heading, mesh
from redco_like.cli.tables import pairs
from redco_like.cli.terminal import Terminal, UsageError, bad_input

if TYPE_CHECKING:
    from redco_like.cli.verify import Verify
    from redco_like.rlhf_verify import CallCheck
    from search.rlhf import ExecutionPlan


def run(options: Verify, execution: ExecutionPlan, terminal: Terminal) -> int:
    """Compile all calls; the exit code is 0 where all fit.

    Raises:
        UsageError: options that mean nothing here, no toolchain, a cluster that cannot be compiled for, a failure.
    """
    for name in ("set", "out"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} changes one plan; search an execution plan anew with redco-like rlhf")
    from redco_like.rlhf_verify import verify_execution
    from search import parse_cluster
    from search.topology import CompileFailed

    try:
        with terminal.progress("reading the execution plan") as tell, bad_input():
            cluster = parse_cluster(options.problem.cluster or execution.problem.get("cluster") or execution.cluster)
            checks = verify_execution(
                execution,
                cluster,
                depth=options.compiler.depth,
                limit_seconds=options.compiler.compile_limit,
                limit_bytes=options.compiler.compile_memory * 2**30,
                fresh=options.compiler.fresh,
                tell=tell,
            )
    except CompileFailed as error:
        raise UsageError(str(error)) from error
    fits = all(check.fits for check in checks)
    if options.json:
        terminal.json({"fits": fits, "checks": [{**dataclasses.asdict(c), "fits": c.fits} for c in checks]})
        return 0 if fits else 1
    terminal.print(heading(execution), "")
    terminal.print(pairs([("verdict", _verdict(checks)), ("compiler", _compiler(checks))]), "")
    terminal.print(check_table(execution, checks))
    return 0 if fits else 1


def check_table(execution: ExecutionPlan, checks: list[CallCheck]) -> Table:
    """One line for each program."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name, justify in (
        ("call", "left"),
        ("program", "left"),
        ("devices", "right"),
        ("mesh", "left"),
        ("compiled", "right"),
        ("planned", "right"),
        ("beside it", "right"),
        ("in all", "right"),
        ("of usable", "right"),
        ("one run", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for check in checks:
        call = execution.call(check.call)
        plan = call.prefill if check.program == "prompts" and call.prefill else call.plan
        share = units.percent(check.total_bytes / check.usable_bytes)
        table.add_row(
            check.call,
            check.program,
            str(call.window),
            mesh(plan),
            units.size(check.compiled_bytes["total"], 2**30),
            units.size(check.planned_bytes, 2**30),
            units.size(check.other_bytes, 2**30),
            units.size(check.total_bytes, 2**30),
            share if check.fits else f"[red]{share}[/]",
            units.seconds(check.seconds) if check.seconds is not None else "-",
        )
    return table


def _verdict(checks: list[CallCheck]) -> str:
    worst = max(checks, key=lambda check: check.total_bytes)
    room = worst.usable_bytes - worst.total_bytes
    what = f"{worst.call} ({worst.program})"
    if all(check.fits for check in checks):
        return f"fits: at most {units.size(worst.total_bytes)} per device, in {what}, {units.size(room)} to spare"
    return f"does not fit: {units.size(worst.total_bytes)} per device in {what}, {units.size(-room)} too much"


def _compiler(checks: list[CallCheck]) -> str:
    seconds = sum(check.compile_seconds for check in checks)
    targets = ", ".join(dict.fromkeys(check.target for check in checks))
    return (
        f"{len(checks)} programs for {targets}, {units.seconds(seconds)} of compiling; seconds by roofline (compiled)"
    )
