"""`redco-like rlhf`: where and how every call of an RLHF graph runs, and how far that is from the best."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.markup import escape

from redco_like.cli.options import Dtype, Flag, optional
from redco_like.cli.terminal import Terminal, UsageError, bad_input, check_folder, write_text

if TYPE_CHECKING:
    from search.rlhf import ExecutionPlan, Graph, Workload

JSON_VERSION = 1
PAIRS = ("dpo", "reward_modelling")
"""Graphs whose prompts come as pairs of completions."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of the graph's roles: architectures (llama-2-7b) or Hugging Face config.json files."""

    actor: Annotated[str | None, optional("NAME|FILE")] = None
    """What is trained to answer."""
    critic: Annotated[str | None, optional("NAME|FILE", "the actor's")] = None
    """What values answers."""
    reward: Annotated[str | None, optional("NAME|FILE", "the critic's, else the actor's")] = None
    """What scores answers."""
    reference: Annotated[str | None, optional("NAME|FILE", "the actor's")] = None
    """What the actor must stay near."""
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="ROLE=NAME")] = ()
    """Of another role of a graph of your own."""

    def of(self, graph: Graph) -> dict[str, str]:
        """Role -> model.

        Raises:
            UsageError: a role without a model, or a model for a role that the graph does not have.
        """
        given = {n: v for n in ("actor", "critic", "reward", "reference") if (v := getattr(self, n)) is not None}
        for text in self.model:
            role, equals, name = (part.strip() for part in text.partition("="))
            if not (role and equals and name):
                raise UsageError(f"--model {text}: write ROLE=NAME, such as judge=llama-2-7b")
            given[role] = name
        for role in given:
            if role not in graph.roles:
                near = difflib.get_close_matches(role, graph.roles, n=1)
                more = f", did you mean {near[0]}?" if near else ""
                raise UsageError(
                    f"the graph {graph.name!r} has no role {role!r}{more}; it has {', '.join(graph.roles)}"
                )
        defaults = {"critic": ("actor",), "reward": ("critic", "actor"), "reference": ("actor",)}
        out = {}
        for role in graph.roles:
            found = next((given[name] for name in (role, *defaults.get(role, ())) if name in given), None)
            if found is None:
                option = f"--{role} NAME" if role in ("actor", *defaults) else f"--model {role}=NAME"
                raise UsageError(f"the graph {graph.name!r} has a role {role!r} without a model: give {option}")
            path = pathlib.Path(found)
            out[role] = str(path.expanduser().resolve()) if path.suffix == ".json" else found
        return out


@dataclasses.dataclass(frozen=True)
class Load:
    """How much data an iteration has."""

    prompts: int
    """Of an iteration, over all devices (pairs, for DPO and reward modelling)."""
    prompt_tokens: int
    """Of the longest prompt."""
    new_tokens: int
    """Of a completion, at most."""
    samples: int = 1
    """Completions per prompt; a pair has two."""
    minibatches: int = 1
    """Optimizer steps per pass over the data."""
    epochs: int = 1
    """Passes over the data."""

    def workload(self, graph: Graph) -> Workload:
        """The record.

        Raises:
            UsageError: numbers that are none.
        """
        from search.rlhf import Workload

        samples = 2 if graph.name in PAIRS and self.samples == 1 else self.samples
        with bad_input():
            return Workload(self.prompts, self.prompt_tokens, self.new_tokens, samples, self.minibatches, self.epochs)


@dataclasses.dataclass(frozen=True)
class Search:
    """How it is searched."""

    optimizer: Annotated[str, tyro.conf.arg(metavar="NAME")] = "adamw"
    """Of the roles that are trained."""
    dtype: Dtype = "bfloat16"
    """Of the computation, and of the weights that are only read."""
    param_dtype: Dtype = "float32"
    """Of the stored parameters of roles that are trained."""
    time_limit: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
    """Stop the search after this time, and say how far from the best the plan may be."""
    no_offload: Flag = False
    """Keep idle roles on the devices."""
    stages: Flag = False
    """Also pipelines of stages, which cannot be run yet."""

    def check(self) -> None:
        if not self.time_limit > 0:
            raise UsageError(f"--time-limit {self.time_limit}; a number of seconds above 0")


@dataclasses.dataclass(frozen=True)
class Rlhf:
    """The fastest execution plan of an RLHF graph that fits: devices and a plan for every call, and what moves between.

    Example: redco-like rlhf --actor llama-2-7b --cluster 2x8xA100-80 --prompts 512 --prompt-tokens 128 --new-tokens 128
    """

    cluster: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")]
    """16x8xA100-80, v5p-128, ... or a TOML file, as for `redco-like plan`."""
    models: Models
    load: Load
    search: Search
    graph: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "ppo"
    """ppo, grpo, rloo, dpo, reward_modelling, sft; or a Python file with get_graph()."""
    reward_function: Flag = False
    """Rewards come from a function, not from a model: the graph has no reward role."""
    out: Annotated[pathlib.Path | None, optional("FILE")] = None
    """Write the execution plan as JSON: RLTrainer(plan="rlhf.json") and `redco-like verify` read it."""
    report: Annotated[pathlib.Path | None, optional("FILE")] = None
    """Write a page of HTML: who does what when, beside the heuristics' plans, and memory over time."""
    json: Flag = False
    """Print one JSON object instead of tables."""

    on_host = True

    def run(self, terminal: Terminal) -> int:
        self.search.check()
        for path in (self.out, self.report):
            check_folder(path)
        graph = read_graph(self.graph, reward_model=not self.reward_function)
        models, workload = self.models.of(graph), self.load.workload(graph)
        with terminal.progress(f"reading {self.cluster}") as tell:
            from redco_like.rlhf_problem import call_costs
            from search import parse_cluster
            from search.rlhf import solve

            with bad_input():
                cluster = parse_cluster(self.cluster)
                costs = call_costs(
                    models,
                    graph,
                    workload,
                    cluster,
                    dtype=self.search.dtype,
                    param_dtype=self.search.param_dtype,
                    optimizer=self.search.optimizer,
                    allow_planned=self.search.stages,
                    tell=tell,
                )
            tell("searching")
            found = solve(
                graph,
                workload,
                cluster,
                costs,
                models=models,
                time_limit=self.search.time_limit,
                offload=not self.search.no_offload,
                tell=tell,
            )
            best = found.execution and dataclasses.replace(found.execution, problem=self._problem())
            if best and self.out:
                write_text(self.out, best.to_json() + "\n")
            if best and self.report:
                tell("drawing the report")
                from redco_like.report import write_execution_report

                write_execution_report(self.report, best, others=found.others)
        if self.json:
            terminal.json(_record(best, found))
        elif best:
            self._show(terminal, best)
        else:
            text = found.advice[:1].upper() + found.advice[1:]
            terminal.print(escape(text).replace("Nothing fits", "[bold red]Nothing fits[/]", 1))
        return 0 if best else 1

    def _problem(self) -> dict[str, Any]:
        """What an execution plan keeps of the options, for `verify`."""
        from redco_like.cli.options import resolved

        names = ("optimizer", "dtype", "param_dtype")
        return resolved({"cluster": self.cluster, **{name: getattr(self.search, name) for name in names}})

    def _show(self, terminal: Terminal, best: ExecutionPlan) -> None:
        from redco_like.cli.execution_tables import call_table, heading, heuristic_table, move_table, proof
        from redco_like.cli.tables import pairs

        terminal.print(heading(best), "")
        terminal.print(call_table(best), "")
        if best.moves:
            terminal.print(move_table(best), "")
        terminal.print(pairs(proof(best)), "")
        if best.heuristics:
            terminal.print(heuristic_table(best), "")
        if self.out is None:
            terminal.line("next: the same with --out rlhf.json --report rlhf.html")
        else:
            name = shlex.quote(str(self.out))
            terminal.line(f'next: redco-like verify {name}    or in Python: RLTrainer(..., plan="{self.out}")')


def read_graph(name: str, *, reward_model: bool) -> Graph:
    """A built-in graph, or that of a file.

    Raises:
        UsageError: there is none of this name; a file that fails, or whose get_graph() returns something else.
    """
    from search.rlhf import GRAPHS, Graph

    path = pathlib.Path(name)
    if path.suffix == ".py":
        from redco_like.run_file import call_of_file

        with bad_input():
            graph = call_of_file(path, "get_graph", "a search.rlhf.Graph")
        if not isinstance(graph, Graph):
            raise UsageError(f"{path}: get_graph() returned a {type(graph).__name__}; it must be a search.rlhf.Graph")
        return graph
    key = name.replace("-", "_")
    if key not in GRAPHS:
        near = difflib.get_close_matches(key, GRAPHS, n=1)
        more = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"no graph {name!r}{more}; there are {', '.join(GRAPHS)}, or a Python file with get_graph()")
    if reward_model or key in ("dpo", "reward_modelling", "sft"):
        return GRAPHS[key]()
    return GRAPHS[key](reward_model=False)


def _record(best: ExecutionPlan | None, found: Any) -> dict[str, Any]:
    """What `--json` prints; keys are only ever added."""
    import json

    return {
        "version": JSON_VERSION,
        "fits": best is not None,
        "execution": json.loads(best.to_json()) if best else None,
        "period_seconds": best and best.period_seconds,
        "bound_seconds": found.bound,
        "gap": found.gap,
        "evaluations": found.evaluations,
        "advice": found.advice,
    }
