"""`redco-like explain`: a plan in words, and where its seconds and bytes come from."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from redco_like.cli.options import Flag, SameProblem, optional
from redco_like.cli.terminal import Terminal, UsageError, bad_input

if TYPE_CHECKING:
    from search import Cluster
    from search import Plan as RunPlan


@dataclasses.dataclass(frozen=True)
class Explain:
    """A plan in words, which array is split how, and where the seconds and bytes come from.

    Example: redco-like explain plan.json

    Example: redco-like explain fsdp --model llama-3-8b --cluster v5p-128 --seq-len 4096 --global-batch 64
    """

    plan: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN.JSON|PRESET")]
    """A plan, or a preset (data, fsdp, megatron, sequence, parts joined by +)."""
    problem: SameProblem
    mesh: Annotated[str | None, optional("AXIS=N,...", "all devices on the one axis of the preset")] = None
    """With a preset: devices per mesh axis."""
    microbatches: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """With a preset."""
    remat: Annotated[str, tyro.conf.arg(metavar="{none,dots,full}")] = "none"
    """With a preset: what the backward pass recomputes."""
    json: Flag = False
    """Print one JSON object instead of tables."""

    on_host = True

    def run(self, terminal: Terminal) -> int:
        from redco_like.cli import planning

        is_file = pathlib.Path(self.plan).suffix == ".json" or pathlib.Path(self.plan).exists()
        plan = planning.read_plan(self.plan) if is_file else None
        record = self.problem.over(dict(plan.problem) if plan else {})
        if plan and not record.get("model"):
            return self._without_model(terminal, plan)
        with terminal.progress("reading the plan") as tell:
            loaded = planning.load(record, tell)
            if plan is None:
                plan = self._preset(loaded.cluster, record)
            tell("estimating")
            from search.planned_collectives import collectives

            plan = planning.estimated(loaded, plan)
            layout = planning.layout(loaded, plan)
            moves = collectives(loaded.model, plan)
            axes = layout.explain(loaded.spec.opt_state)
        estimate = plan.estimate
        assert estimate is not None
        if self.json:
            terminal.json({"plan": planning.plan_record(plan), "collectives": moves, "axes": axes})
            return 0
        from redco_like.cli.tables import collective_table, estimate_table, pairs

        terminal.print(loaded.header(estimate.usable_bytes), "")
        terminal.print(pairs(loaded.words(plan)), "")
        terminal.print(estimate_table(estimate), "")
        terminal.print(pairs([("bound by", estimate.binds)]), "")
        if estimate.communication:
            terminal.print(collective_table(moves, estimate), "")
        if plan.mesh.stage > 1:
            terminal.line(f"Inside each of the {plan.mesh.stage} stages, as if it held all layers:")
        terminal.line(axes)
        if plan.param_dtype != plan.compute_dtype:
            terminal.line(f"(bytes in {plan.compute_dtype}, as in use; at rest parameters are {plan.param_dtype})")
        return 0

    def _preset(self, cluster: Cluster, record: dict[str, Any]) -> RunPlan:
        """The plan of a preset on all devices."""
        from search import Plan
        from sharding_rules import MeshShape

        alone = {"data": "data", "fsdp": "fsdp", "megatron": "tensor", "sequence": "tensor"}
        if self.mesh is None and self.plan not in alone:
            raise UsageError(
                f"{self.plan} is no file; if it is a preset, say how many devices each axis has, such as "
                f"--mesh fsdp={max(1, cluster.devices // 4)},tensor={min(4, cluster.devices)}"
            )
        with bad_input():
            mesh = MeshShape.parse(self.mesh or f"{alone[self.plan]}={cluster.devices}")
            return Plan(
                mesh,
                self.plan,
                microbatches=self.microbatches,
                remat=self.remat,  # type: ignore[arg-type]
                param_dtype=record["param_dtype"],
                compute_dtype=record["dtype"],
                problem=record,
            )

    def _without_model(self, terminal: Terminal, plan: RunPlan) -> int:
        """What a plan says by itself."""
        from redco_like.cli.tables import estimate_table, pairs
        from redco_like.cli.words import describe

        if self.json:
            from redco_like.cli.planning import plan_record

            terminal.json({"plan": plan_record(plan), "collectives": [], "axes": None})
            return 0
        terminal.print(pairs(describe(plan)), "")
        if plan.estimate:
            terminal.print(estimate_table(plan.estimate), "")
        if plan.reason:
            terminal.print(pairs([("reason", plan.reason)]), "")
        terminal.print("The plan does not say what it was made for; with --model and --cluster there is more to tell.")
        return 0
