"""Compile every call of an execution plan for its cluster, with none of its devices, and add up the memory.

    checks = verify_execution(execution, cluster, tell=print)
    all(check.fits for check in checks)

Every program (a step of training, a part of what is scored, the largest of the engine's) is compiled for the devices of
its window. What it needs is what the compiler says; what else lies on these devices while it runs (other roles'
parameters and optimizer states) is the execution plan's own account, which is arithmetic of shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from redco_like.rlhf_programs import plan_of, programs
from redco_like.verify import CHILD, Depth, source_digest
from search import Cluster, Plan, hlo
from search.compiler import Cache, compile_in_child
from search.rlhf import CallPlan, ExecutionPlan, Window
from search.roofline import step_seconds
from search.subcluster import part_of
from search.topology import target_of, toolchain
from search.verify import memory_bytes
from sharding_rules import MeshShape, PlanError


@dataclasses.dataclass(frozen=True)
class CallCheck:
    """What the compiler made of one program of a call.

    Attributes:
        call, program: which.
        target: what it was compiled for.
        compiled_bytes: that it needs on a device, by kind and in total.
        planned_bytes: that the execution plan has for the call.
        other_bytes: of what else lies there while the call runs, at most (analytic).
        usable_bytes: of a device.
        seconds: of one run of the program, by roofline over its schedule; None where it does not fit.
        collectives: kind -> count, in one run.
        compile_seconds: that the compiler took.
        out_of_memory: what the compiler said, where it gave up.
    """

    call: str
    program: str
    target: str
    compiled_bytes: dict[str, int]
    planned_bytes: float
    other_bytes: float
    usable_bytes: float
    seconds: float | None
    collectives: dict[str, float]
    compile_seconds: float
    out_of_memory: str = ""

    @property
    def total_bytes(self) -> float:
        """On a device while the call runs."""
        return self.compiled_bytes["total"] + self.other_bytes

    @property
    def fits(self) -> bool:
        return not self.out_of_memory and self.total_bytes <= self.usable_bytes


def verify_execution(
    execution: ExecutionPlan,
    cluster: Cluster,
    *,
    depth: Depth = "fast",
    limit_seconds: float = 1800,
    limit_bytes: float = 16 * 2**30,
    cache: Cache | None = None,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[CallCheck]:
    """Compile all programs of all calls, in the order of dispatch; alike ones once.

    Args:
        execution: for models by name, as `redco-like rlhf` makes it.
        cluster: what it is for.
        depth, limit_seconds, limit_bytes, cache, fresh, tell: as `redco_like.verify.verify` takes them.

    Raises:
        PlanError: a call that cannot be compiled.
        ValueError: the cluster is none that can be compiled for, or has another number of devices.
        CompileFailed: no toolchain, a limit, a killed child, a full disk, an error of the compiler; one clear line.
    """
    if cluster.devices != execution.devices:
        raise ValueError(
            f"the execution plan is for {execution.devices} devices, cluster {cluster.name} has {cluster.devices}"
        )
    for call in execution.calls:
        if call.plan.planned:
            raise PlanError(f"call {call.call!r} has {', '.join(call.plan.planned)}, which cannot be run yet")
    cache = Cache() if cache is None else cache
    checks = []
    each = [(call, program) for call in execution.calls for program in programs(execution, call.call)]
    for number, (call, program) in enumerate(each, 1):
        part = part_of(cluster, call.window.devices)
        target = target_of(part)
        request = {
            "execution": _bare(execution, call).to_json(),
            "call": call.call,
            "program": program,
            "plan": plan_of(call, program).to_json(),
            "cluster": part.to_json(),
        }
        versions = toolchain(target)
        key = {**request, "target": str(target), "versions": versions, "depth": depth, "source": source_digest()}
        found = None if fresh else cache.get(key)
        if found is None:
            words = f"{call.call}, {program} ({number} of {len(each)}): "
            compiled = compile_in_child(
                CHILD,
                request,
                target,
                depth=depth,
                limit_seconds=limit_seconds,
                limit_bytes=int(limit_bytes),
                tell=lambda text, words=words: tell(words + text),
            )
            found = _found(compiled, part, call, program)
            cache.put(key, found)
        checks.append(
            CallCheck(
                call.call,
                program,
                str(target),
                found["bytes"],
                call.params_bytes + call.working_bytes + call.state_bytes,
                other_bytes(execution, call),
                float(cluster.accelerator.usable_memory_bytes),
                found["seconds"],
                found["collectives"],
                found["compile_seconds"],
                found["out_of_memory"],
            )
        )
    return checks


def other_bytes(execution: ExecutionPlan, call: CallPlan) -> float:
    """Bytes per device of what else lies on a call's devices while it runs, at most, by the plan's own account."""
    own = call.params_bytes + call.working_bytes + call.state_bytes
    spans = [(busy.start, busy.end) for busy in execution.timeline if busy.what == call.call]
    most, period = own, execution.period_seconds
    for window, levels in execution.memory:
        if not window.overlaps(call.window):
            continue
        ends = [*(start for start, _ in levels[1:]), period]
        for (start, nbytes), end in zip(levels, ends, strict=True):
            # A call may reach into the next period.
            if any(a + k * period < end and start < b + k * period for a, b in spans for k in (-1, 0)):
                most = max(most, nbytes)
    return most - own


def _bare(execution: ExecutionPlan, call: CallPlan) -> ExecutionPlan:
    """What of an execution plan decides a call's programs: where and how the others run does not."""
    own = CallPlan(
        call.call, Window(0, call.window.devices), _plain(call.plan), call.prefill and _plain(call.prefill), call.rows
    )
    other = Plan(MeshShape(), compute_dtype=call.plan.compute_dtype)
    return ExecutionPlan(
        execution.graph,
        execution.workload,
        execution.models,
        "",
        call.window.devices,
        tuple(own if each is call else CallPlan(each.call, Window(0, 1), other) for each in execution.calls),
        problem={k: v for k, v in execution.problem.items() if k == "optimizer"},
    )


def _plain(plan: Plan) -> Plan:
    return dataclasses.replace(plan, reason="", estimate=None, problem={}, verified={})


def _found(compiled: Any, cluster: Cluster, call: CallPlan, program: str) -> dict[str, Any]:
    """What is kept of a compile."""
    seconds, collectives = None, {}
    if compiled.hlo:
        plan, module = plan_of(call, program), hlo.parse(compiled.hlo)
        seconds = step_seconds(module, cluster, plan.mesh, order=plan.order).seconds
        for one in hlo.collectives(module, plan.mesh, order=plan.order):
            collectives[one.kind] = collectives.get(one.kind, 0) + one.times
    return {
        "bytes": memory_bytes(compiled),
        "seconds": seconds,
        "collectives": collectives,
        "compile_seconds": compiled.seconds,
        "out_of_memory": compiled.out_of_memory,
    }
