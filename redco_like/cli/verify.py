"""`redco-like verify`: what the real compiler says of a plan, with none of its devices."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from redco_like.cli.options import Flag, SameProblem, optional
from redco_like.cli.terminal import Terminal, UsageError, bad_input, check_folder, write_text

if TYPE_CHECKING:
    from redco_like.cli.planning import Loaded
    from search import Cluster, Plan
    from search.rlhf import ExecutionPlan
    from search.verify import Verification

Depth = Literal["fast", "full"]
MORE_FLOPS = 1.02
"""Over those of the traced step: what is told."""


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """How the compiler is run."""

    depth: Depth = "fast"
    """fast stops when memory, collectives and schedule are known; full also makes the code, which takes minutes."""
    compile_limit: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 1800
    """Stop a compile that takes longer."""
    compile_memory: Annotated[float, tyro.conf.arg(metavar="GIB")] = 16
    """Stop a compile that takes more memory on this machine."""
    fresh: Flag = False
    """Compile again where the result is kept from an earlier time."""

    def check(self) -> None:
        """Raise a UsageError for what means nothing."""
        for name in ("compile_limit", "compile_memory"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}; a number above 0")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compile a plan for its cluster, with none of its devices: bytes per device, collectives, whether it fits.

    Example: redco-like verify plan.json

    Example: redco-like verify plan.json --set remat=full,microbatches=2 --out smaller.json
    """

    plan: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN.JSON")]
    """A plan, as `redco-like plan --out` writes it; or an execution plan, as `redco-like rlhf --out` does."""
    problem: SameProblem
    compiler: CompileOptions
    set: Annotated[str | None, optional("KEY=VALUE,...")] = None
    """Change the plan first: a mesh axis, or remat, microbatches, sequence, optimizer_sharding, ..."""
    out: Annotated[pathlib.Path | None, optional("FILE")] = None
    """Write the plan, as it was changed, with what the compiler said."""
    json: Flag = False
    """Print one JSON object instead of tables."""

    on_host = True

    def run(self, terminal: Terminal) -> int:
        from redco_like.cli import planning

        self.compiler.check()
        check_folder(self.out)
        if (execution := read_execution(self.plan)) is not None:
            from redco_like.cli import verify_execution

            return verify_execution.run(self, execution, terminal)
        plan = planning.read_plan(self.plan)
        record = self.problem.over(dict(plan.problem))
        with terminal.progress("reading the plan") as tell:
            loaded = planning.load(record, tell)
            if self.set:
                plan = changed_plan(plan, self.set, loaded.cluster)
            plan = planning.estimated(loaded, plan)
            verified = compile_plan(loaded, plan, self.compiler, tell)
        plan = dataclasses.replace(plan, verified=summary(verified))
        if self.out:
            write_text(self.out, plan.to_json() + "\n")
        if self.json:
            terminal.json({"plan": planning.plan_record(plan), "verification": verified.to_record()})
        else:
            show(terminal, loaded, plan, verified, self._again)
        return 0 if verified.fits else 1

    def _again(self, settings: str) -> str:
        """The command that makes one more change of the same plan."""
        base, first = (self.out, None) if self.out else (self.plan, self.set)
        target = self.out or self.plan
        both = ",".join(part for part in (_without(first, settings), settings) if part)
        return f"redco-like verify {shlex.quote(str(base))} --set {both} --out {shlex.quote(str(target))}"


def read_execution(path: pathlib.Path) -> ExecutionPlan | None:
    """The execution plan of a file; None where it is something else.

    Raises:
        UsageError: an execution plan that cannot be read.
    """
    from search.rlhf import ExecutionPlan

    try:
        text = path.read_text("utf-8")
        record = json.loads(text)
    except (OSError, ValueError):
        return None
    if not (isinstance(record, dict) and "graph" in record and "calls" in record):
        return None
    with bad_input():
        return ExecutionPlan.from_json(text)


def _without(first: str | None, second: str) -> str:
    """Pairs of `--set` that a second one does not replace."""
    names = {pair.partition("=")[0] for pair in second.split(",")}
    return ",".join(pair for pair in (first or "").split(",") if pair and pair.partition("=")[0].strip() not in names)


def changed_plan(plan: Plan, text: str, cluster: Cluster) -> Plan:
    """A plan with `--set`; compiler options that the planner chose follow what the plan moves now.

    Raises:
        UsageError: no such choice, or no value of it.
    """
    from redco_like.cli.choices import fixed
    from search.compiler_options import options_for
    from search.knobs import changed

    with bad_input():
        new = changed(plan, fixed((text,), "--set"))
        chosen = plan.compiler_options == options_for(cluster.accelerator, plan)
        return dataclasses.replace(new, compiler_options=options_for(cluster.accelerator, new)) if chosen else new


def compile_plan(loaded: Loaded, plan: Plan, options: CompileOptions, tell: Callable[[str], None]) -> Verification:
    """Compile one plan.

    Raises:
        UsageError: no toolchain, a cluster that cannot be compiled for, a limit, a failure; one line.
    """
    from redco_like.verify import verify
    from search.topology import CompileFailed

    try:
        with bad_input():
            return verify(
                plan,
                loaded.record,
                loaded.cluster,
                loaded.model,
                depth=options.depth,
                limit_seconds=options.compile_limit,
                limit_bytes=options.compile_memory * 2**30,
                fresh=options.fresh,
                tell=tell,
            )
    except CompileFailed as error:
        raise UsageError(str(error)) from error


def summary(verified: Verification) -> dict[str, Any]:
    """What a plan keeps of its verification."""
    return {
        "fits": verified.fits,
        "bytes": dict(verified.bytes),
        "seconds_per_step": verified.seconds,
        "target": verified.target,
        "depth": verified.depth,
        "versions": dict(verified.versions),
    }


def show(terminal: Terminal, loaded: Loaded, plan: Plan, verified: Verification, again: Callable[[str], str]) -> None:
    """Print everything; `again` makes the command of one more change."""
    from redco_like.cli import units
    from redco_like.cli.tables import pairs
    from redco_like.cli.verify_tables import (
        buffer_table,
        byte_table,
        change_table,
        slow_table,
        time_table,
        traffic_table,
    )

    terminal.print(loaded.header(verified.usable_bytes), "")
    terminal.print(pairs(loaded.words(plan)), "")
    terminal.print(pairs([("verdict", _verdict(verified)), ("compiler", _compiler(verified))]), "")
    terminal.print(byte_table(verified, plan), "")
    if verified.changes:
        terminal.print(change_table(verified), "")
        terminal.line(f"next: {again(verified.changes[0]['set'])}\n")
    elif not verified.fits:
        terminal.print("No single change or pair of changes is expected to fit: more devices, or a smaller batch.", "")
    if verified.traffic:
        terminal.print(traffic_table(verified), "")
    if verified.seconds is not None:
        terminal.print(time_table(verified, plan), "")
        if verified.planned_flops:
            ratio = verified.flops / verified.planned_flops
            note = ": more is computed on every device than its share" * (ratio > MORE_FLOPS)
            if verified.out_of_memory:
                note = ", with what XLA computes again to save memory"
            text = f"{units.many(verified.flops)} flops of products per device, {ratio:.3f} of the traced step's{note}"
            terminal.print(pairs([("products", text)]), "")
    for warning in verified.warnings:
        terminal.line(f"warning: {warning}\n")
    if verified.slowest:
        terminal.print(slow_table(verified), "")
    if verified.buffers:
        terminal.print(buffer_table(verified))


def _verdict(verified: Verification) -> str:
    from redco_like.cli import units

    total, usable = verified.bytes["total"], verified.usable_bytes
    room = f"{units.size(abs(usable - total))} {'to spare' if verified.fits else 'too much'}"
    word = "fits" if verified.fits else "does not fit"
    return f"{word}: {units.size(total)} per device of {units.size(usable)}, {room} (compiled)"


def _compiler(verified: Verification) -> str:
    from redco_like.cli import units

    versions = ", ".join(f"{name} {version}" for name, version in verified.versions.items())
    return f"{verified.target}, {verified.depth}, {units.seconds(verified.compile_seconds)}; {versions}"
