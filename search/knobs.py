"""Single changes of a plan, and what each would do to its memory and its time: the way out of a plan that is too large.

    for change in changes(model, plan, scale=1.04):
        change.text, change.settings, change.bytes_per_device, change.seconds

Bytes are analytic, times what the compiler found for the plan itself over its analytic bytes (`scale`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from search.costing import estimate_plan
from search.plan import Plan, Remat
from search.space import Inner, Model, divisors
from sharding_rules import CONTEXT, DATA, EXPERT, FSDP, TENSOR, PlanError

REMATS = get_args(Remat)
"""What is computed again, the least first."""
SPLITS = (
    (DATA, FSDP),
    (DATA, TENSOR),
    (FSDP, TENSOR),
    (DATA, CONTEXT),
    (FSDP, CONTEXT),
    (DATA, EXPERT),
    (TENSOR, FSDP),
    (TENSOR, DATA),
)
"""Devices that may go from one mesh axis to another."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a plan.

    Attributes:
        settings: choice -> new value, as `changed` takes them.
        bytes_per_device: expected of the changed plan.
        seconds: analytic, of its step.
    """

    settings: Mapping[str, Any]
    bytes_per_device: int
    seconds: float

    @property
    def text(self) -> str:
        """As `--set` takes it."""
        return ",".join(f"{name}={str(value).lower()}" for name, value in self.settings.items())


def changed(plan: Plan, settings: Mapping[str, Any]) -> Plan:
    """The plan with other sizes of mesh axes or other values of its fields; the preset follows the mesh.

    `sequence` is sequence parallelism, which is part of the preset.

    Raises:
        ValueError: a value that the field does not have.
    """
    sizes = {**plan.mesh.sizes, **{name: value for name, value in settings.items() if name in plan.mesh.sizes}}
    sequence = settings.get("sequence", "sequence" in plan.preset.split("+")) and sizes[TENSOR] > 1
    mesh = dataclasses.replace(plan.mesh, **sizes)
    inner = Inner(mesh.tensor, mesh.context, mesh.expert, bool(sequence), mesh.data * mesh.fsdp, mesh.stage)
    fields = {name: value for name, value in settings.items() if name not in sizes and name != "sequence"}
    if isinstance(fields.get("offload"), str):  # as a Space fixes it
        fields["offload"] = tuple(part for part in fields["offload"].split("+") if part != "none")
    known = {field.name for field in dataclasses.fields(Plan)}
    for name in fields:
        if name not in known:
            raise ValueError(f"a plan has no {name!r}; it has {', '.join([*sizes, 'sequence', *sorted(known)])}")
    large = [axis for axis, size in sizes.items() if size > 1]
    order = plan.order if sorted(plan.order) == sorted(large) else ()
    update: dict[str, Any] = {"mesh": mesh, "preset": inner.preset(mesh.fsdp), "order": order, **fields}
    if mesh.data == 1:
        update["optimizer_sharding"] = False
    return dataclasses.replace(plan, **update, estimate=None, reason="")


def changes(model: Model, plan: Plan, *, scale: float = 1.0, budget_bytes: float = math.inf) -> list[Change]:
    """Changes that need less memory and stay within a budget, the fastest first: single ones, or else pairs."""
    singles = list(_settings(model, plan))
    found = _costed(model, plan, singles, scale, budget_bytes)
    if found:
        return found
    pairs = [a | b for a, b in itertools.combinations(singles, 2) if not set(a) & set(b)]
    return _costed(model, plan, pairs, scale, budget_bytes)


def _costed(
    model: Model, plan: Plan, options: Iterable[dict[str, Any]], scale: float, budget_bytes: float
) -> list[Change]:
    now = estimate_plan(model, plan)
    found = []
    for settings in options:
        new = changed(plan, settings)
        if model.batch % (new.microbatches * new.mesh.batch_shards):  # no equal parts
            continue
        try:
            estimate = estimate_plan(model, new)
        except (PlanError, ValueError):  # not legal for the model
            continue
        needed = round(scale * estimate.bytes_per_device)
        if estimate.bytes_per_device < now.bytes_per_device and needed <= budget_bytes:
            found.append(Change(settings, needed, estimate.seconds_per_step))
    return sorted(found, key=lambda change: change.seconds)


def _settings(model: Model, plan: Plan) -> Iterator[dict[str, Any]]:
    """Choices that can lower the memory of a step."""
    sizes, trains = plan.mesh.sizes, model.costs.trains
    if trains:
        yield from ({"remat": r} for r in REMATS[REMATS.index(plan.remat) + 1 :] if r in model.costs.remats)
        each = model.batch // plan.mesh.batch_shards
        yield from ({"microbatches": m} for m in divisors(each) if m > plan.microbatches)
        if plan.mesh.data > 1 and not plan.optimizer_sharding:
            yield {"optimizer_sharding": True}
    if plan.mesh.tensor > 1 and "sequence" not in plan.preset.split("+"):
        yield {"sequence": True}
    for giver, taker in SPLITS:
        if taker == EXPERT and not model.has_experts:
            continue
        for factor in divisors(sizes[giver])[1:]:
            yield {giver: sizes[giver] // factor, taker: sizes[taker] * factor}
