"""A plan in words: what each mesh axis does, and what the step does besides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharding_rules import CONTEXT, DATA, EXPERT, FSDP, STAGE, TENSOR

if TYPE_CHECKING:
    from search import Cluster, Plan

AXES = {
    DATA: "hold different examples; their gradients are summed once per step",
    FSDP: "hold different examples and a share of every parameter, gradient and optimizer state, gathered for use",
    STAGE: "are stages of a pipeline, each with a share of the layers",
    EXPERT: "hold different examples, and different experts; tokens travel to their experts and back",
    CONTEXT: "hold different tokens of the same examples; attention gathers keys and values",
    TENSOR: "share each product (heads, MLP, vocabulary) and sum its results",
}
INFERENCE = {
    DATA: "hold different examples",
    FSDP: "hold different examples and a share of every parameter, gathered for use",
}
REMAT = {
    "none": "nothing is recomputed in the backward pass",
    "dots": "matrix products are kept, the rest is recomputed in the backward pass",
    "full": "only the inputs of blocks are kept, whole blocks are recomputed in the backward pass",
}
SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "interleaved 1F1B", "zb_h1": "zero bubble H1"}
OFFLOAD = {"optimizer": "the optimizer's state", "activations": "saved activations", "params": "parameters"}


def describe(
    plan: Plan, *, global_batch: int | None = None, cluster: Cluster | None = None, training: bool = True
) -> list[tuple[str, str]]:
    """What a plan does, as lines of a name and a text.

    Args:
        plan: what to describe.
        global_batch: examples per step, for the size of microbatches.
        cluster: for the links that each mesh axis talks over.
        training: whether there are gradients.
    """
    lines = []
    places = links(plan, cluster) if cluster else {}
    for axis in ordered_axes(plan):
        size = plan.mesh.sizes[axis]
        text = AXES[axis] if training else INFERENCE.get(axis, AXES[axis])
        if axis == TENSOR and "sequence" in plan.preset.split("+"):
            text += "; between blocks they share the tokens (sequence parallelism)"
        if axis == STAGE:
            chunks = f", {plan.chunks} chunks of layers each" if plan.chunks > 1 else ""
            spread = "; embedding and head are spread over all stages" if plan.vocab == "spread" else ""
            text += f" ({SCHEDULES[plan.schedule]}{chunks}){spread}"
        if axis == FSDP and not plan.regather:
            text += " once per microbatch and kept until its backward pass ends"
        if axis == DATA and plan.optimizer_sharding:
            text += "; each holds a share of the optimizer's state (ZeRO-1)"
        lines.append((f"{axis} {size}", f"{size} devices {text}" + (f" [{places[axis]}]" if axis in places else "")))
    if plan.mesh.size == 1:
        lines.append(("one device", "no array is split"))
    order = ordered_axes(plan)
    if order != [axis for axis in plan.mesh.sizes if axis in order]:
        text = f"{', '.join(order)}: outermost first, so that neighbours in {order[-1]} sit next to each other"
        lines.append(("order", text))
    lines.append(("microbatches", _microbatches(plan, global_batch, training)))
    if training:
        lines.append((f"remat {plan.remat}", REMAT[plan.remat]))
    if plan.offload:
        lines.append(("offload", f"in the host's memory while not used: {', '.join(OFFLOAD[x] for x in plan.offload)}"))
    if plan.rules:
        lines.append(("rules", "; ".join(f"{pattern} as {_spec(spec)}" for pattern, spec in plan.rules)))
    if plan.compiler_options:
        count, (name, value) = len(plan.compiler_options), plan.compiler_options[-1]
        others = f" and {count - 1} others, which the plan's file lists" if count > 1 else ""
        listed = f"{name}={value}{others}"
        lines.append(("XLA options", listed))
    if plan.planned:
        lines.append(("not run yet", f"Trainer cannot execute {', '.join(plan.planned)}"))
    return lines


def _microbatches(plan: Plan, global_batch: int | None, training: bool) -> str:
    shards = plan.mesh.batch_shards
    rows = f" of {global_batch // (shards * plan.microbatches):,} examples per device" if global_batch else ""
    if plan.microbatches == 1:
        return f"none: the whole batch at once,{rows.removeprefix(' of')}" if rows else "none: the whole batch at once"
    gradients = "; their gradients are summed" if training else ""
    return f"{plan.microbatches}{rows}, one after the other{gradients}"


def ordered_axes(plan: Plan) -> list[str]:
    """Mesh axes larger than 1, outermost (slowest links) first."""
    return list(plan.order) or [axis for axis, size in plan.mesh.sizes.items() if size > 1]


def links(plan: Plan, cluster: Cluster) -> dict[str, str]:
    """Mesh axis -> which links its neighbours talk over, where a cluster has more than one node or slice."""
    if cluster.nodes == 1:
        return {}
    sizes, order = plan.mesh.sizes, ordered_axes(plan)
    node, inside = ("slice", "in a slice") if cluster.torus else ("node", "inside a node")
    found, stride = {}, 1
    for axis in reversed(order):
        span = stride * sizes[axis]
        if span <= cluster.devices_per_node:
            found[axis] = inside
        else:
            found[axis] = f"across {node}s" if stride >= cluster.devices_per_node else f"inside and across {node}s"
        stride = span
    return found


def _spec(spec: tuple) -> str:
    entries = ("-" if e is None else "*".join(e) if isinstance(e, tuple) else e for e in spec)
    return f"({', '.join(entries)})"
