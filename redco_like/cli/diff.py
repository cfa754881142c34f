"""`redco-like diff`: what two plans do differently, and what that costs."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import tyro

from redco_like.cli.options import Flag
from redco_like.cli.terminal import Terminal


@dataclasses.dataclass(frozen=True)
class Diff:
    """What two plans do differently, their estimates side by side. Exit code 0 if they are the same, 1 if not.

    Example: redco-like diff yesterday.json today.json
    """

    a: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="A.JSON")]
    """A plan."""
    b: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="B.JSON")]
    """Another plan."""
    json: Flag = False
    """Print one JSON object instead of tables."""

    on_host = True

    def run(self, terminal: Terminal) -> int:
        from rich.table import Table

        from redco_like.cli.planning import read_plan
        from redco_like.cli.tables import plan_table

        a, b = read_plan(self.a), read_plan(self.b)
        fields = a.diff(b)
        # What a plan was made for and why it was taken are no difference in what it does.
        fields.pop("reason", None)
        names = [str(path) if self.a.name == self.b.name else path.name for path in (self.a, self.b)]
        estimated = [(name, plan, plan.estimate) for name, plan in zip(names, (a, b), strict=True) if plan.estimate]
        if self.json:
            terminal.json(
                {
                    "equal": not fields,
                    "fields": {name: list(map(_plain, pair)) for name, pair in fields.items()},
                    "estimates": [plan.estimate and dataclasses.asdict(plan.estimate) for plan in (a, b)],
                    "problems": [dict(a.problem), dict(b.problem)],
                }
            )
            return 1 if fields else 0
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for name in ("", *names):
            table.add_column(name, overflow="fold")
        for name, pair in fields.items():
            table.add_row(name, *(str(_plain(value)) for value in pair))
        for name in dict.fromkeys((*a.problem, *b.problem)):
            if a.problem.get(name) != b.problem.get(name):
                table.add_row(f"[dim]made for: {name}[/]", *(str(plan.problem.get(name, "-")) for plan in (a, b)))
        if table.row_count:
            terminal.print(table)
        if not fields:
            terminal.print("The plans are the same.")
        if len(estimated) == 2:
            per_second = "tokens/s" if a.problem.get("seq_len") else "per second"
            terminal.print("", plan_table(estimated, per_second=per_second, width=terminal.out.width))
        else:
            terminal.print("[dim]No estimates to compare: a plan of redco-like plan --out has one.[/]")
        return 1 if fields else 0


def _plain(value: object) -> object:
    """A mesh as text, everything else as it is."""
    return str(value) if dataclasses.is_dataclass(value) else value
