"""Candidates with their seconds and bytes made plans with estimates; any plan estimated; its timeline.

estimate_plan(model, plan)                       # an Estimate of any plan, also of one that cannot run yet
memory_parts(model, place, columns)              # bytes per device by part, of many candidates
timeline(model, plan)                            # of a pipeline, operation by operation
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from search.cost import StepSeconds
from search.estimate import Estimate
from search.memory import ActivationBytes
from search.placement import Columns, Floats, Placement, Variant, in_flight
from search.plan import Plan
from search.schedules import Timeline, make_schedule, simulate
from search.space import Inner, Model
from search.space import memory_share as share_of
from sharding_rules import PlanError

KINDS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "operations bound by memory bandwidth",
    "arithmetic": "elementwise arithmetic",
    "launches": "launching operations",
}


@dataclasses.dataclass(frozen=True)
class Costed:
    """A plan and its estimate."""

    plan: Plan
    estimate: Estimate


def memory_parts(model: Model, place: Placement, columns: Columns) -> dict[str, Floats]:
    """Bytes per device of candidates by part, on the fullest device (analytic).

    With stages, a device holds its share of the layers, and of every microbatch in flight its activations.
    """
    n, p = len(columns), place.stage
    fsdp_n = np.array(place.fsdp_sizes, np.int64)[columns.fsdp]
    data_n = place.batch_shards / fsdp_n
    layers, outside, transient, gathered, stacked = _activations(model, place, columns)
    # Of the largest working set, what grows with the layers on a device: a stage has its share.
    transient = transient - stacked * (1 - 1 / p)
    kept = ~columns.flags("regather").astype(bool)
    width, stored = (jnp.dtype(model.plan_fields[name]).itemsize for name in ("compute_dtype", "param_dtype"))
    best: dict[str, Floats] = {}
    for v, variant in enumerate(columns.variants):
        here = columns.variant == v
        if not here.any():
            continue
        weights_kr = place.stage_weights(variant.vocab)
        m = columns.microbatches[here]
        flight = in_flight(variant.schedule, stages=p, chunks=variant.chunks, microbatches=m) if p > 1 else [1.0]
        for k in {0, len(weights_kr) - 1}:
            params, gradients, state = np.einsum("r,prn->pn", weights_kr[k], place.held[:, :, columns.fsdp[here]])
            whole = params * np.where(kept[here], fsdp_n[here] * width / stored, 0.0)
            state = state / np.where(variant.optimizer_sharding, data_n[here], 1.0)
            # Sums over microbatches are split as the optimizer that reads them; one gradient is whole before.
            summed = variant.optimizer_sharding & (m > 1)
            gradients = gradients / np.where(summed, data_n[here], 1.0)
            held = flight[-1 if k else 0]
            ends = outside[here] * (1 / p if variant.vocab == "spread" else 1.0 if k or p == 1 else 0.0)
            activations = held * (layers[here] / p) + ends
            if "activations" in variant.offload:
                # Two layers at a time: one that is used and one on its way.
                activations = activations * min(1.0, 2 * p / model.layers)
            parts = {
                "params": params * (min(1.0, 2 * p / model.layers) if "params" in variant.offload else 1.0),
                "gradients": gradients,
                "optimizer": state * (0.0 if "optimizer" in variant.offload else 1.0),
                "activations": activations,
                "transient": transient[here] + np.maximum(gathered[here], whole),
            }
            if not model.costs.trains:
                # The cache is written in place: the new one is not beside it.
                parts["transient"] = np.maximum(parts["transient"] - place.cache_bytes, 0.0)
            if place.cache_bytes:
                parts["cache"] = np.full(here.sum(), float(place.cache_bytes))
            if not best:
                best = {name: np.zeros(n) for name in parts}
            fuller = sum(parts.values()) > sum(x[here] for x in best.values())
            for name, x in parts.items():
                best[name][here] = np.where(fuller, x, best[name][here])
    return best


def saved_bytes(model: Model, place: Placement, columns: Columns) -> Floats | None:
    """Activations that one microbatch keeps, where candidates offload them."""
    if not columns.offloads("activations").any():
        return None
    return _activations(model, place, columns)[0]


def _activations(model: Model, place: Placement, columns: Columns) -> Floats:
    """The fields of `ActivationBytes`, per candidate; shape (fields, candidates)."""
    fsdp_n = np.array(place.fsdp_sizes, np.int64)[columns.fsdp]
    fields = [field.name for field in dataclasses.fields(ActivationBytes)]
    out = np.zeros((len(fields), len(columns)))
    for remat in np.unique(columns.remat):
        here = columns.remat == remat
        # Variants do not matter: each pair of numbers once.
        pairs, inverse = np.unique(np.stack([columns.microbatches[here], fsdp_n[here]]), axis=1, return_inverse=True)
        found = model.activations(place, model.costs.remats[remat], pairs[0], pairs[1])
        parts = np.stack([getattr(found, name) for name in fields])
        out[:, here] = parts[:, inverse.reshape(-1)]
    return out


def estimate(
    model: Model, place: Placement, columns: Columns, row: int, parts: StepSeconds, usable_bytes: float
) -> Estimate:
    """The estimate of one candidate from the seconds of its placement's candidates."""
    one = columns.take(row)
    seconds = float(parts.total[row])
    spread = model.costs.efficiency.spread
    memory = {name: int(x[0]) for name, x in memory_parts(model, place, one).items()}
    communication = {
        axis: {
            "seconds": float(parts.collectives[axis][row]),
            "exposed": float(parts.exposed[axis][row]),
            "bytes": float(parts.moved[axis][row]),
        }
        for axis in parts.collectives
        if parts.collectives[axis][row] > 0
    }
    return Estimate(
        seconds_per_step=seconds,
        low_seconds=seconds / (1 + spread),
        high_seconds=seconds * (1 + spread),
        seconds=parts.at(row),
        hidden_seconds=float(parts.hidden[row]),
        communication=communication,
        mfu=float(model.costs.mfu(seconds, model.costs.cluster.devices)),
        tokens_per_second=model.tokens / seconds,
        memory=memory,
        usable_bytes=int(usable_bytes),
        flops=float(model.costs.model_flops),
        binds=_binds(model, place, one, parts.at(row), seconds),
        labels={"seconds": "analytic", "memory": "analytic", "collectives": "analytic"},
    )


def _binds(model: Model, place: Placement, one: Columns, parts: dict[str, float], seconds: float) -> str:
    """What the step time mostly is, one line."""
    kinds = model.costs.compute_by_kind(place, int(one.remat[0]), int(one.microbatches[0]))
    shares = {KINDS[kind]: s for kind, s in kinds.items()}
    for part, s in parts.items():
        if part.startswith("exposed "):
            shares[f"communication over {part.removeprefix('exposed ')}"] = s
        elif part != "compute":
            shares[{"bubble": "the pipeline's bubble", "offload": "transfers to the host"}.get(part, part)] = s
    largest = sorted(shares.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {s / seconds:.0%}" for name, s in largest if s > 0.05 * seconds)


def candidate(model: Model, plan: Plan) -> tuple[Placement, Columns]:
    """The placement and the column that a plan is.

    Raises:
        PlanError: the plan is not legal for the model, or has rules of its own.
    """
    if plan.rules:
        raise PlanError("a plan with rules of its own is not costed; leave the rules out to see what its mesh costs")
    mesh = plan.mesh
    inner = Inner(
        mesh.tensor, mesh.context, mesh.expert, "sequence" in plan.preset.split("+"), mesh.data * mesh.fsdp, mesh.stage
    )
    place = model.place(inner)
    if isinstance(place, str):
        raise PlanError(place)
    if plan.preset != inner.preset(mesh.fsdp):
        raise PlanError(
            f"the preset {plan.preset!r} on the mesh {mesh} is not costed; the planner knows "
            f"{inner.preset(mesh.fsdp)!r}"
        )
    if plan.remat not in model.costs.remats:
        raise PlanError(f"remat={plan.remat!r} was not analysed; there are {', '.join(model.costs.remats)}")
    variant = Variant(
        plan.schedule, plan.chunks, plan.vocab, plan.optimizer_sharding, plan.regather, plan.offload, plan.order
    )
    index = (place.fsdp_sizes.index(mesh.fsdp), model.costs.remats.index(plan.remat), plan.microbatches, 0)
    fsdp, remat, microbatches, which = (np.array([i], np.int64) for i in index)
    return place, Columns(fsdp, remat, microbatches, which, (variant,))


def estimate_plan(model: Model, plan: Plan, *, memory_share: float | None = None) -> Estimate:
    """Estimate any plan, also one that the step cannot run yet.

    Args:
        memory_share: of a device's usable memory that the plan may count on; default `search.space.memory_share`.

    Raises:
        PlanError: the plan is not legal for the model.
    """
    place, columns = candidate(model, plan)
    parts = model.costs.seconds(place, columns, saved_bytes=saved_bytes(model, place, columns))
    accelerator = model.costs.cluster.accelerator
    usable = (memory_share or share_of(accelerator)) * accelerator.usable_memory_bytes
    return estimate(model, place, columns, 0, parts, usable)


def stage_seconds(model: Model, plan: Plan) -> dict[str, Any]:
    """Seconds of one microbatch on every virtual stage, forward and backward, as `search.schedules.simulate` takes
    them.
    """
    place, columns = candidate(model, plan)
    return model.costs.stage_seconds(place, columns, saved_bytes(model, place, columns))


def timeline(model: Model, plan: Plan) -> Timeline:
    """Run a plan's schedule: when every stage works on what, and when it waits."""
    schedule = make_schedule(plan.schedule, stages=plan.mesh.stage, chunks=plan.chunks, microbatches=plan.microbatches)
    return simulate(schedule, **stage_seconds(model, plan))


__all__ = [
    "Costed",
    "candidate",
    "estimate",
    "estimate_plan",
    "memory_parts",
    "saved_bytes",
    "stage_seconds",
    "timeline",
]
