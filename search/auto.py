"""A sensible plan that fits, by a count of bytes: what `plan="auto"` takes.

    plan = auto_plan(traced, abstract_opt_state, n_devices=8, memory_bytes=80e9)

Candidates are tried from the least communication to the most, and the first that fits is taken: data parallelism,
then parameters spread over all devices (fsdp), then with tensor parallelism inside a node; each with nothing
recomputed, then all but matrix products, then whole blocks, then in more microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from search.memory import ActivationMemory, StepBytes, step_bytes
from search.plan import Plan
from sharding_rules import MeshShape, PlanError, TracedFunction, format_bytes, make_layout

HEADROOM = 0.85
"""Share of a device's memory that a plan may count on; the rest is for the compiler's transients and fragmentation."""
REMATS = ("none", "dots", "full")


def auto_plan(
    traced: TracedFunction,
    abstract_opt_state: Any,
    *,
    n_devices: int,
    memory_bytes: float,
    mesh: MeshShape | None = None,
    devices_per_node: int = 8,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
) -> Plan:
    """Choose a preset, a mesh, rematerialisation and microbatches.

    Args:
        traced: the loss, traced on the whole global batch, with arguments `params` and `batch`.
        abstract_opt_state: shapes of the optimizer's state.
        n_devices: devices to use.
        memory_bytes: memory of one device.
        mesh: take this mesh, and choose the rest.
        devices_per_node: bound on the tensor axis.
        param_dtype, compute_dtype: recorded in the plan; the first sizes the stored parameters.

    Raises:
        PlanError: nothing fits; the message has the closest candidate and what it lacks.
    """
    layout = make_layout(traced, MeshShape(), "data")
    memory = ActivationMemory(traced, layout)
    rows = max((x.shape[0] for x in jax.tree.leaves(traced.arg("batch")) if x.shape), default=1)
    budget = HEADROOM * memory_bytes
    closest: tuple[int, str, Plan] | None = None
    refused: str | None = None
    for preset, shape in _candidates(n_devices, devices_per_node, mesh):
        if rows % shape.batch_shards:
            refused = refused or f"a batch of {rows} does not split over {shape}"
            continue
        try:
            here = layout.on(shape, preset)
        except PlanError as error:
            if mesh is not None:
                raise
            refused = refused or str(error)
            continue
        for remat, microbatches in _savings(rows // shape.batch_shards):
            bytes_ = step_bytes(
                here,
                abstract_opt_state,
                remat=remat,
                microbatches=microbatches,
                param_dtype=param_dtype,
                memory=memory,
            )
            plan = Plan(shape, preset, (), microbatches, remat, param_dtype=param_dtype, compute_dtype=compute_dtype)
            if bytes_.total <= budget:
                return dataclasses.replace(plan, reason=_reason(bytes_, memory_bytes, mesh is not None, closest))
            if closest is None or bytes_.total < closest[0]:
                closest = (bytes_.total, f"{preset} on {shape}, remat {remat}, {microbatches} microbatches", plan)
    if closest is None:
        raise PlanError(f"no mesh of {n_devices} devices suits this model and batch: {refused}")
    raise PlanError(
        f"no plan fits {format_bytes(memory_bytes)} per device on {n_devices} devices (analytic count, {HEADROOM:.0%} "
        f"of it usable): the closest, {closest[1]}, needs {format_bytes(closest[0])}; take more devices, a smaller "
        "global batch or an optimizer with a smaller state"
    )


def _candidates(n_devices: int, devices_per_node: int, mesh: MeshShape | None) -> Iterator[tuple[str, MeshShape]]:
    if mesh is not None:
        parts = ["data", *(["fsdp"] if mesh.fsdp > 1 else []), *(["megatron"] if mesh.tensor > 1 else [])]
        yield "+".join(parts[1:] or parts), mesh
        return
    yield "data", MeshShape(data=n_devices)
    tensor = 1
    while tensor <= min(n_devices, devices_per_node):
        if n_devices % tensor == 0:
            rest = n_devices // tensor
            yield (
                ("fsdp" if tensor == 1 else "fsdp+megatron" if rest > 1 else "megatron"),
                MeshShape(fsdp=rest, tensor=tensor),
            )
        tensor *= 2


def _savings(rows_per_device: int) -> Iterator[tuple[Any, int]]:
    for remat in REMATS:
        yield remat, 1
    microbatches = 2
    while rows_per_device % microbatches == 0:
        yield "full", microbatches
        microbatches *= 2


def _reason(bytes_: StepBytes, memory_bytes: float, asked: bool, closest: tuple[int, str, Plan] | None) -> str:
    kept = bytes_.params + bytes_.gradients + bytes_.optimizer
    text = (
        f"{'the mesh asked for; ' if asked else ''}parameters, gradients and optimizer {format_bytes(kept)} + "
        f"activations {format_bytes(bytes_.activations)} of {format_bytes(memory_bytes)} per device (analytic)"
    )
    return text + (f"; {closest[1]} would need {format_bytes(closest[0])}" if closest else "")
