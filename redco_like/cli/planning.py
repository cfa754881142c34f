"""From options to something to search: the cluster, the model and the space."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from redco_like.cli import units
from redco_like.cli.options import SearchOptions
from redco_like.cli.tables import pairs
from redco_like.cli.terminal import UsageError, bad_input
from redco_like.cli.words import describe

if TYPE_CHECKING:
    from rich.table import Table

    from redco_like.problem import ModelProblem
    from search import Cluster, Plan, Space, TracedModel
    from search.plan import Remat
    from search.solver import SearchResult
    from sharding_rules import Layout


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A problem that was read.

    Attributes:
        record: its options, with files by absolute path and sizes that the model decided.
    """

    record: dict[str, Any]
    spec: ModelProblem
    cluster: Cluster
    model: TracedModel

    @property
    def training(self) -> bool:
        return self.record["task"] == "train"

    @property
    def per_second(self) -> str:
        """What `Estimate.tokens_per_second` counts."""
        return "examples/s" if self.spec.seq_len is None else "tokens/s"

    def words(self, plan: Plan) -> list[tuple[str, str]]:
        """The plan in words."""
        batch = self.spec.global_batch
        return describe(plan, global_batch=batch, cluster=self.cluster, training=self.training)

    def header(self, usable_bytes: float) -> Table:
        """Lines on what is planned and for what."""
        spec, cluster, chip = self.spec, self.cluster, self.cluster.accelerator
        dtypes = self.model.plan_fields
        dtype = dtypes["compute_dtype"]
        parameters = f"{units.many(spec.parameters)} parameters in {dtypes['param_dtype']}, computed in {dtype}"
        batch = f"{units.count(spec.global_batch)} examples"
        if spec.seq_len:
            batch += f" of {units.count(spec.seq_len)} tokens"
        if spec.task == "train":
            parameters += ", " + ("its own optimizer" if spec.source == "run file" else self.record["optimizer"])
            batch += (
                f", {units.many(spec.global_batch * spec.seq_len)} tokens per step" if spec.seq_len else " per step"
            )
        elif spec.task == "prefill":
            batch += ", prefill: the whole prompts in one step"
        else:
            batch += ", decode: one token of each per step, after a cache of the others"
        links = f"torus {'x'.join(map(str, cluster.torus.dims))}" if cluster.torus else ""
        if cluster.nodes > 1:
            links = f"{cluster.nodes:,} {'slices' if cluster.torus else 'nodes'}" + (f" of {links}" if links else "")
        try:
            peak = f"{units.flops(chip.flops(dtype))} in {dtype}"
        except ValueError:
            peak = f"no peak known for {dtype}"
        return pairs(
            [
                ("model", f"{spec.name}: {parameters}"),
                ("batch", batch),
                ("cluster", f"{cluster.name}: {cluster.devices:,} x {chip.name}{f', {links}' if links else ''}"),
                (
                    "each",
                    f"{peak}, {units.size(chip.memory_bytes)} of memory, of which a plan may use "
                    f"{units.size(usable_bytes)}",
                ),
            ]
        )


def load(record: Mapping[str, Any], tell: Callable[[str], None]) -> Loaded:
    """Read the cluster and the model, and trace one step.

    Raises:
        UsageError: with what is wrong in one line.
    """
    for name in ("model", "cluster"):
        if record.get(name) is None:
            raise UsageError(f"the plan does not say which {name} it was made for; give --{name}")
    with bad_input():
        from search import parse_cluster

        cluster = parse_cluster(record["cluster"])
    tell(f"reading {record['model']}")
    from redco_like.problem import load_problem
    from search import TracedModel

    # What a run file prints does not belong among our results.
    with bad_input(), contextlib.redirect_stdout(sys.stderr):
        spec = load_problem(
            record["model"],
            seq_len=record.get("seq_len"),
            global_batch=record.get("global_batch"),
            optimizer=record["optimizer"],
            dtype=record["dtype"],
            param_dtype=record["param_dtype"],
            task=record["task"],
        )
    tell("reading its operations")
    attention, fused = record.get("attention"), "fused" if spec.fused_attention else "plain"
    training = record["task"] == "train"
    remats: tuple[Remat, ...] = ("none", "dots", "full") if training else ("none",)
    model = TracedModel(
        spec.traced,
        spec.opt_state,
        cluster,
        param_dtype=record["param_dtype"] if training else record["dtype"],
        fused_attention=cluster.accelerator.kind != "cpu" and (attention or fused) == "fused",
        remats=remats,
        training=training,
    )
    sizes: dict[str, Any] = {"global_batch": spec.global_batch}
    if spec.source != "run file":  # whose batch has its own lengths
        sizes["seq_len"] = spec.seq_len
    return Loaded({**record, **sizes}, spec, cluster, model)


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What is fixed and what is forbidden."""

    fix: dict[str, Any]
    forbid: tuple[str, ...]


def constraints(options: SearchOptions) -> Constraints:
    """Read them, before the model is.

    Raises:
        UsageError: what is no choice or no value of it.
    """
    from redco_like.cli.choices import fixed, forbidden

    return Constraints(fixed(options.fix), forbidden(options.forbid))


def make_space(loaded: Loaded, options: SearchOptions, limits: Constraints) -> Space:
    """The space that the options leave.

    Raises:
        UsageError: sizes that do not divide the devices or the batch, what cannot run and is not allowed, ...
    """
    from search import Space
    from search.space import divisors

    batch, parts = loaded.spec.global_batch, limits.fix.get("microbatches", 1)
    if batch % parts:
        near = min(divisors(batch), key=lambda m: abs(m - parts))
        raise UsageError(f"--fix microbatches={parts}: a batch of {batch} has no {parts} equal parts; nearest: {near}")
    with bad_input():
        return Space(
            loaded.model,
            loaded.cluster,
            fix=limits.fix,
            forbid=limits.forbid,
            allow_planned=options.allow_planned,
            max_microbatch=options.max_microbatch,
            memory_share=options.memory_share or 0.0,
        )


def search(loaded: Loaded, space: Space, options: SearchOptions, *, pareto: bool) -> SearchResult:
    """Search, and write into every plan found what it was made for and what is expected of it.

    Args:
        pareto: whether the front of time and memory is wanted too, which costs every candidate.

    Raises:
        UsageError: no plan is legal, whatever the memory.
    """
    from search import solve

    result = solve(
        space,
        runners_up=options.runners_up,
        pareto=pareto,
        time_limit_seconds=math.inf if options.time_limit is None else options.time_limit,
    )
    if not result.candidates:
        batch, devices = loaded.spec.global_batch, loaded.cluster.devices
        near = max(devices, round(batch / devices) * devices)
        text = "" if batch % devices == 0 else f". A batch of {near} divides by all {devices} devices"
        raise UsageError(result.advice + text)

    def signed(costed: Any) -> Any:
        plan = dataclasses.replace(costed.plan, problem=loaded.record, estimate=costed.estimate)
        return dataclasses.replace(costed, plan=plan)

    return dataclasses.replace(
        result,
        best=result.best and signed(result.best),
        runners_up=tuple(map(signed, result.runners_up)),
        pareto=tuple(map(signed, result.pareto)),
    )


def sensitivities(loaded: Loaded, result: SearchResult) -> list[Any]:
    """What the step takes, and which plan wins, where a constant is off."""
    if result.best is None:
        return []
    from search import sensitivity

    return list(sensitivity(loaded.model, [costed.plan for costed in (result.best, *result.runners_up)]))


def read_plan(path: Any) -> Plan:
    """A plan's file.

    Raises:
        UsageError: missing, or no plan.
    """
    from search import Plan

    with bad_input():
        try:
            return Plan.load(path)
        except (ValueError, OSError) as error:
            name = str(path)
            raise UsageError(str(error) if name in str(error) else f"{name}: {error}") from error


def estimated(loaded: Loaded, plan: Plan) -> Plan:
    """The plan with an estimate of it for this problem.

    Raises:
        UsageError: the plan is not legal for it.
    """
    from pipelines.problem import check_rows
    from search.costing import estimate_plan

    if plan.mesh.size != loaded.cluster.devices:
        raise UsageError(
            f"the plan is for {plan.mesh.size} devices ({plan.mesh}), and {loaded.cluster.name} has "
            f"{loaded.cluster.devices:,}: give other sizes of mesh axes, or plan again"
        )
    with bad_input():
        check_rows(loaded.spec.global_batch, microbatches=plan.microbatches, mesh=plan.mesh)
        share = loaded.record.get("memory_share")
        estimate = estimate_plan(loaded.model, plan, **({} if share is None else {"memory_share": share}))
        return dataclasses.replace(plan, estimate=estimate, problem=loaded.record)


def layout(loaded: Loaded, plan: Plan) -> Layout:
    """Which array of the model is split how; of a pipeline, inside one stage."""
    with bad_input():
        return loaded.model.layout.on(dataclasses.replace(plan.mesh, stage=1), plan.preset, rules=plan.rules)


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, with what it cannot run yet."""
    return {**dataclasses.asdict(plan), "planned": plan.planned}
