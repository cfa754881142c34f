"""What a user may write for the execution plan, made an `ExecutionPlan`.

resolve_execution("colocated", problem, devices)      # all calls on all devices, each after the other
resolve_execution("rlhf.json", problem, devices)
resolve_execution("auto", problem, devices)
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pipelines import resolve_plan
from pipelines.devices import cluster_here
from pipelines.functions import batch_rows
from pipelines.generation.programs import decode_problem
from pipelines.infer import trace_pred
from pipelines.problem import cast_floats, init_like, train_problem
from pipelines.rlhf.exchange import Together, share
from pipelines.rlhf.schedule import no_wait
from redco_like.engine_layout import functions_of
from redco_like.rlhf.building import Problem
from redco_like.rlhf_problem import call_costs
from search import Plan
from search.rlhf import Call, CallPlan, ExecutionPlan, Window, solve
from sharding_rules import CONTEXT, MeshShape, PlanError

SEARCH_SECONDS = 20.0
"""Of searching, after the costs of the calls are known."""


def resolve_execution(
    plan: ExecutionPlan | str | pathlib.Path,
    problem: Problem,
    devices: Sequence[Any],
    *,
    tell: Callable[[str], None] = lambda text: None,
    together: Together = no_wait,
) -> ExecutionPlan:
    """Turn `"auto"`, `"colocated"`, an `ExecutionPlan` or the path of one into an `ExecutionPlan` for these devices.

    Raises:
        ValueError: no such file, or a plan of another graph; says where they differ.
        PlanError: a plan for more devices than there are, or none that fits.
    """
    if isinstance(plan, str) and plan in ("auto", "colocated"):
        if plan == "auto" and len(devices) > 1:
            return _agreed(problem, devices, tell, together)
        return colocated(problem, devices)
    execution = plan if isinstance(plan, ExecutionPlan) else ExecutionPlan.load(plan)
    if execution.devices > len(devices):
        raise PlanError(
            f"the execution plan is for {execution.devices} devices ({execution.cluster}), but there are "
            f"{len(devices)}; make one for {len(devices)}, or leave it to plan='auto'"
        )
    wanted, given = set(problem.graph.calls), set(execution.graph.calls)
    if wanted != given:
        more = ", ".join(sorted(call.name for call in given - wanted)) or "none"
        less = ", ".join(sorted(call.name for call in wanted - given)) or "none"
        raise ValueError(
            f"the execution plan is of graph {execution.graph.name!r}, the algorithm runs {problem.graph.name!r}: "
            f"calls of the plan alone: {more}; of the algorithm alone: {less}"
        )
    return execution


def searched(
    problem: Problem, devices: Sequence[Any], *, tell: Callable[[str], None] = lambda text: None
) -> ExecutionPlan:
    """The plan with the shortest period that the search finds for these devices, or `colocated`, with the reason.

    Models are costed as `redco_like.rlhf_problem` does, the optimizer as AdamW.
    """
    models = {role: problem.members[role].model for role in problem.graph.roles}
    dtypes = {model.dtype for model in models.values()}
    cluster = cluster_here(devices)
    costs = call_costs(
        {role: model.config for role, model in models.items()},
        problem.graph,
        problem.workload,
        cluster,
        dtype=sorted(dtypes)[0],
        tell=tell,
    )
    names = {role: model.config.family for role, model in models.items()}
    found = solve(problem.graph, problem.workload, cluster, costs, models=names, time_limit=SEARCH_SECONDS, tell=tell)
    if found.execution is None:
        tell(f"no execution plan fits by the search's estimates ({found.advice}); all calls on all devices instead")
        return colocated(problem, devices)
    return found.execution


def _agreed(problem: Problem, devices: Sequence[Any], tell: Callable[[str], None], together: Together) -> ExecutionPlan:
    """What the first process has found: a search with a limit of time may end elsewhere on another."""
    found = searched(problem, devices, tell=tell)
    plans = share(found.to_json(), what="the execution plan of process 0", together=together)
    return found if len(plans) == 1 else ExecutionPlan.from_json(plans[0])


def colocated(problem: Problem, devices: Sequence[Any]) -> ExecutionPlan:
    """All calls on all devices, one after the other; each call's plan is the fastest of its own that fits.

    A role that is trained is scored under the plan that it is trained under, so that nothing moves for it.
    """
    window = Window(0, len(devices))
    training: dict[str, Plan] = {}
    for call in problem.graph.calls:
        if call.kind == "train":
            training[call.role] = _train_plan(problem, call, devices)
    calls = []
    for name in problem.graph.order:
        call = problem.graph.call(name)
        match call.kind:
            case "train":
                plan = training[call.role]
            case "score":
                plan = _score_plan(problem, call, devices, training.get(call.role))
            case _:
                plan = _decode_plan(problem, call, devices)
        calls.append(CallPlan(name, window, plan))
    return ExecutionPlan(
        problem.graph,
        problem.workload,
        {role: problem.members[role].model.config.family for role in problem.graph.roles},
        f"{len(devices)} x {devices[0].device_kind}",
        len(devices),
        tuple(calls),
        reason="all calls on all devices, one after the other",
    )


def _alone(problem: Problem, call: Call) -> Plan:
    dtype = problem.members[call.role].model.dtype
    return Plan(MeshShape(), "data", compute_dtype=dtype, reason="there is one device")


def _train_plan(problem: Problem, call: Call, devices: Sequence[Any]) -> Plan:
    if len(devices) == 1:
        return _alone(problem, call)
    member = problem.members[call.role]
    functions = problem.loss_fn(call), init_like(member.forms), problem.optimizers[call.role], problem.minibatch()
    return resolve_plan(
        "auto",
        n_devices=len(devices),
        problem=lambda: train_problem(*functions, member.model.dtype),
        cluster=lambda: cluster_here(devices),
        compute_dtype=member.model.dtype,
    )


def _score_plan(problem: Problem, call: Call, devices: Sequence[Any], trained: Plan | None) -> Plan:
    if len(devices) == 1:
        return _alone(problem, call)
    rows = batch_rows(problem.sequences)
    if trained is not None and rows % trained.mesh.batch_shards == 0:
        reason = "as it is trained"
        return dataclasses.replace(trained, microbatches=1, remat="none", reason=reason, estimate=None)
    forms, dtype = problem.members[call.role].forms, problem.members[call.role].model.dtype
    return resolve_plan(
        "auto",
        n_devices=len(devices),
        problem=lambda: (
            trace_pred(problem.score_fn(call), forms, problem.sequences, abstract_state={}, compute_dtype=dtype),
            {},
        ),
        cluster=lambda: cluster_here(devices),
        compute_dtype=dtype,
        training=False,
    )


def _decode_plan(problem: Problem, call: Call, devices: Sequence[Any]) -> Plan:
    member, length = problem.members[call.role], problem.workload.length
    dtype = member.model.dtype
    if len(devices) == 1:
        return _alone(problem, call)
    shapes = cast_floats(member.forms, dtype)
    rows = -(-(problem.rows or problem.workload.sequences) // len(devices)) * len(devices)
    plan = resolve_plan(
        "auto",
        n_devices=len(devices),
        problem=lambda: (decode_problem(functions_of(member.model, length), shapes, rows, length, length), {}),
        cluster=lambda: cluster_here(devices),
        compute_dtype=dtype,
        training=False,
        forbid=(CONTEXT,),
    )
    if jax.process_count() > 1 and plan.mesh.data % jax.process_count():
        mesh = MeshShape(data=len(devices))
        return Plan(mesh, "data", compute_dtype=dtype, reason="data alone goes across processes")
    return plan


def words(execution: ExecutionPlan) -> str:
    """One line per call: where it runs, and how."""
    lines = [
        f"{plan.call}: devices {plan.window}, {plan.plan.preset} on mesh {plan.plan.mesh}"
        + (f", {plan.plan.microbatches} microbatches" if plan.plan.microbatches > 1 else "")
        for plan in execution.calls
    ]
    rest = f"; offloaded between calls: {', '.join(execution.offloaded)}" if execution.offloaded else ""
    return f"execution plan ({execution.reason or execution.cluster}){rest}\n  " + "\n  ".join(lines)
