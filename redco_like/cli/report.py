"""`redco-like report`: a plan as one page of HTML."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import tyro

from redco_like.cli.options import SameProblem
from redco_like.cli.terminal import Terminal, check_folder


@dataclasses.dataclass(frozen=True)
class Report:
    """A page of HTML on a plan, in one file: memory, the timeline of a step, communication and the table of axes.

    Example: redco-like report plan.json --out plan.html
    """

    plan: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN.JSON")]
    """A plan."""
    problem: SameProblem
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")] = pathlib.Path("plan.html")
    """Where to write it."""

    on_host = True

    def run(self, terminal: Terminal) -> int:
        from redco_like.cli.planning import estimated, load, read_plan

        check_folder(self.out)
        plan = read_plan(self.plan)
        with terminal.progress("reading the plan") as tell:
            loaded = load(self.problem.over(dict(plan.problem)), tell)
            plan = estimated(loaded, plan)
            tell("drawing the report")
            from redco_like.report import write_report

            write_report(self.out, problem=loaded.spec, model=loaded.model, plan=plan)
        terminal.line(f"wrote {self.out}")
        return 0
