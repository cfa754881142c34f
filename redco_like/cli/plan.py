"""`redco-like plan`: the fastest plan that fits, the runners-up, and how sure that is."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.markup import escape

from redco_like.cli import sizing
from redco_like.cli.options import Flag, Problem, SearchOptions, optional
from redco_like.cli.sizing import Serving
from redco_like.cli.terminal import Terminal, UsageError, check_folder, write_text
from redco_like.cli.verify import CompileOptions

if TYPE_CHECKING:
    from redco_like.cli.planning import Loaded
    from search import Costed
    from search.solver import SearchResult
    from search.verify import Verification

JSON_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written."""

    out: Annotated[pathlib.Path | None, optional("FILE")] = None
    """Write the plan as JSON: Trainer(plan="plan.json"), explain, diff and report read it."""
    report: Annotated[pathlib.Path | None, optional("FILE")] = None
    """Write a page of HTML: memory, timeline of a step, communication, Pareto front, axes."""
    verify: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Compile the best N with the real compiler, with none of the devices; the fastest of those that fit is taken."""
    json: Flag = False
    """Print one JSON object instead of tables."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The fastest plan that fits, the runners-up, and why.

    Example: redco-like plan --model llama-3-70b --cluster v5p-1024 --seq-len 8192 --global-batch 1024
    """

    problem: Problem
    serving: Serving
    search: SearchOptions
    output: Output
    compiler: CompileOptions

    on_host = True

    def run(self, terminal: Terminal) -> int:
        from redco_like.cli import planning

        self.search.check()
        self.compiler.check()
        output = self.output
        if output.verify < 0:
            raise UsageError(f"--verify {output.verify}; how many of the best plans to compile, a number from 0 up")
        self.serving.check(self.problem.task)
        for path in (output.out, output.report):
            check_folder(path)
        if self.problem.task == "serve":
            return sizing.run(self, terminal)
        record = {**self.problem.record(), "memory_share": self.search.memory_share}
        with terminal.progress(f"reading {record['cluster']}") as tell:
            constraints = planning.constraints(self.search)
            loaded = planning.load(record, tell)
            space = planning.make_space(loaded, self.search, constraints)
            tell("searching")
            options = dataclasses.replace(self.search, runners_up=max(self.search.runners_up, output.verify - 1))
            result = planning.search(loaded, space, options, pareto=output.json or output.report is not None)
            verified = compiled(loaded, result, output.verify, self.compiler, tell)
            if verified:
                result = reranked(result, verified)
            tell("what changes with the constants")
            rows = planning.sensitivities(loaded, result)
            if result.best and output.out:
                write_text(output.out, result.best.plan.to_json() + "\n")
            if result.best and output.report:
                tell("drawing the report")
                from redco_like.report import write_report

                write_report(output.report, problem=loaded.spec, model=loaded.model, result=result)
        if output.json:
            terminal.json(_record(loaded, result, rows, verified))
        elif result.best:
            self._show(terminal, loaded, result, rows, verified)
        else:
            terminal.print(loaded.header(space.budget_bytes), "")
            text = result.advice[:1].upper() + result.advice[1:]
            terminal.print(escape(text).replace("Nothing fits", "[bold red]Nothing fits[/]", 1), "")
            terminal.print(f"[dim]{result.candidates:,} candidates, none fits; {result.seconds:.2f} s of search[/]")
        return 0 if result.best else 1

    def _show(
        self, terminal: Terminal, loaded: Loaded, result: SearchResult, rows: list[Any], verified: list[Verified]
    ) -> None:
        from redco_like.cli.tables import pairs, plan_table, plans_that_fit, sensitivity_table
        from redco_like.cli.verify_tables import ranking_table

        best, batch, width = result.best, loaded.spec.global_batch, terminal.out.width
        assert best is not None
        columns = [("1 (best)", best.plan, best.estimate)]
        columns += [(str(i), c.plan, c.estimate) for i, c in enumerate(result.runners_up, 2)]
        terminal.print(loaded.header(best.estimate.usable_bytes), "")
        terminal.print(
            plan_table(
                columns, global_batch=batch, per_second=loaded.per_second, training=loaded.training, width=width
            ),
            "",
        )
        hidden = len(columns) - plans_that_fit(width, len(columns))
        if hidden:
            terminal.print(f"[dim]{hidden} more in a wider terminal, or with --json[/]\n")
        terminal.print(
            pairs(
                [
                    ("bound by", best.estimate.binds),
                    ("proof", result.certificate()),
                    ("interval", _interval(result, rows)),
                ]
            ),
            "",
        )
        if verified:
            terminal.print(ranking_table(verified), "")
        if rows:
            terminal.print(sensitivity_table(rows), "")
        terminal.print(pairs(loaded.words(best.plan)), "")
        terminal.line(self._next(loaded, result))

    def _next(self, loaded: Loaded, result: SearchResult) -> str:
        if self.output.out is None:
            return "next: the same with --out plan.json, then redco-like explain plan.json"
        name = shlex.quote(str(self.output.out))
        runs = loaded.training and not result.plan.planned  # type: ignore[union-attr]
        trainer = f'    or in Python: Trainer(..., plan="{self.output.out}")' if runs else ""
        return f"next: redco-like explain {name}{trainer}"


@dataclasses.dataclass(frozen=True)
class Verified:
    """One of the best plans as the compiler sees it; `rank` is the planner's, from 1."""

    rank: int
    costed: Costed
    found: Verification


def compiled(
    loaded: Loaded, result: SearchResult, count: int, options: CompileOptions, tell: Callable[[str], None]
) -> list[Verified]:
    """Compile the best plans, in the order of the compiler: those that fit by their seconds, then the others."""
    from redco_like.cli.verify import compile_plan, summary

    if result.best is None or not count:
        return []
    best = [result.best, *result.runners_up][:count]
    out = []
    for rank, costed in enumerate(best, 1):
        which = f"plan {rank} of {len(best)}: "
        found = compile_plan(loaded, costed.plan, options, lambda text, which=which: tell(which + text))
        plan = dataclasses.replace(costed.plan, verified=summary(found))
        out.append(Verified(rank, dataclasses.replace(costed, plan=plan), found))
    return sorted(out, key=lambda row: (not row.found.fits, row.found.seconds or row.costed.estimate.seconds_per_step))


def reranked(result: SearchResult, verified: list[Verified]) -> SearchResult:
    """The search's result with what was compiled in the compiler's order; what does not fit is left out.

    Where nothing that was compiled fits, there is no best plan, and the advice says so.
    """
    fitting = [row.costed for row in verified if row.found.fits]
    others = result.runners_up[max(0, len(verified) - 1) :]
    if fitting:
        return dataclasses.replace(result, best=fitting[0], runners_up=(*fitting[1:], *others))
    least = min(verified, key=lambda row: row.found.bytes["total"])
    over = least.found.bytes["total"] - least.found.usable_bytes
    changes = [f"--set {change['set']}" for change in least.found.changes[:3]]
    advice = (
        f"nothing fits of the {len(verified)} plans that were compiled, though the planner expected it: plan "
        f"{least.rank} needs {over / 2**30:.1f} GiB too much"
        + (f"; expected to fit: redco-like verify with {' or '.join(changes)}" if changes else "")
        + "; or verify more plans, or plan with a smaller --memory-share"
    )
    return dataclasses.replace(result, best=None, runners_up=(), advice=advice)


def _interval(result: SearchResult, rows: list[Any]) -> str:
    """The interval of the best, and who wins within it: most of an error is common to all plans."""
    from redco_like.cli.units import seconds

    best = result.best.estimate  # type: ignore[union-attr]
    text = f"{seconds(best.low_seconds)} to {seconds(best.high_seconds)} per step, by the errors of the constants"
    if not result.runners_up:
        return text
    others = sorted({row.winner + 1 for row in rows} - {1})
    if not others:
        return f"{text}; plan 1 stays ahead with any one of them off"
    listed = f"plan {others[0]}" if len(others) == 1 else f"plans {', '.join(map(str, others))}"
    return f"{text}; {listed} would win with one of them off"


def _record(loaded: Loaded, result: SearchResult, rows: list[Any], verified: list[Verified]) -> dict[str, Any]:
    """What `--json` prints; keys are only ever added."""

    def costed(entry: Any) -> dict[str, Any] | None:
        if entry is None:
            return None
        plan = dataclasses.asdict(entry.plan)
        return {"plan": {k: v for k, v in plan.items() if k not in ("estimate", "problem")}} | {
            "estimate": dataclasses.asdict(entry.estimate),
            "planned": entry.plan.planned,
        }

    best = costed(result.best)
    return {
        "version": JSON_VERSION,
        "problem": {**loaded.record, "parameters": loaded.spec.parameters, "devices": loaded.cluster.devices},
        "fits": result.best is not None,
        "plan": best and best["plan"],
        "planned": best and best["planned"],
        "estimate": best and best["estimate"],
        "runners_up": [costed(entry) for entry in result.runners_up],
        "pareto": [costed(entry) for entry in result.pareto],
        "certificate": {
            "text": result.certificate(),
            "candidates": result.candidates,
            "bound_seconds": result.bound,
            "gap": result.gap,
            "search_seconds": result.seconds,
        },
        "sensitivity": [dataclasses.asdict(row) for row in rows],
        "advice": result.advice,
        "verified": [{"rank": row.rank, **row.found.to_record()} for row in verified],
    }
