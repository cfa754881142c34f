"""Plans in words, the same everywhere on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redco_like.report.markup import TIMES, gib, percent, seconds
from search import Plan
from search.estimate import Estimate
from sharding_rules import AXES

MEMORY_PARTS = {
    "params": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "transient": "transient",
}
"""Parts of the memory and what they are called, in the order they are drawn."""


def mesh_words(plan: Plan) -> str:
    """List the mesh axes that are used with their sizes, outermost first."""
    sizes = {axis: size for axis, size in plan.mesh.sizes.items() if size > 1}
    order = plan.order or tuple(axis for axis in AXES if axis in sizes)
    return f" {TIMES} ".join(f"{axis} {sizes[axis]}" for axis in order) or "1 device"


def how_words(plan: Plan) -> str:
    """What else a plan chooses, in one line."""
    count = plan.microbatches
    parts = [f"{count} microbatch{'es' if count > 1 else ''}"]
    if plan.mesh.stage > 1:
        chunks = f" with {plan.chunks} chunks" if plan.chunks > 1 else ""
        parts.append(f"{plan.schedule}{chunks}")
        parts += ["vocabulary spread"] if plan.vocab == "spread" else []
    parts.append("no remat" if plan.remat == "none" else f"remat {plan.remat}")
    parts += ["sequence parallel"] if "sequence" in plan.preset.split("+") else []
    parts += ["ZeRO-1 optimizer"] if plan.optimizer_sharding else []
    parts += ["gathered once per microbatch"] if not plan.regather else []
    parts += [f"{' and '.join(plan.offload)} offloaded"] if plan.offload else []
    return ", ".join(parts)


def plan_tip(name: str, plan: Plan, estimate: Estimate) -> str:
    """What hovering over a plan shows."""
    return (
        f"{name}: {mesh_words(plan)}\n{how_words(plan)}\n{seconds(estimate.seconds_per_step, 4)} per step, "
        f"MFU {percent(estimate.mfu)}\n{gib(estimate.bytes_per_device)} per device"
    )


def exposed(estimate: Estimate) -> dict[str, float]:
    """Mesh axis -> seconds of its collectives that compute waits for."""
    return {k.removeprefix("exposed "): s for k, s in estimate.seconds.items() if k.startswith("exposed ")}


def field(problem: Any, name: str, default: Any = None) -> Any:
    """A field of a problem, which is a record of `redco_like.problem` or the `problem` of a plan."""
    if isinstance(problem, Mapping):
        return problem.get(name, default)
    return getattr(problem, name, default)
