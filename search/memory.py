"""Bytes per device of activations, for many candidates at once (analytic), by liveness over the step's own jaxpr.

    memory = ActivationMemory(traced, layout, fused_attention=True)
    found = memory.bytes(placement, "full", microbatches=[1, 2, 4], fsdp=8)
    found.layers, found.outside, found.transient, found.gathered          # int64, one entry per candidate

The jaxpr of the loss and its gradients is read once per rematerialisation: which arrays lie in memory from when to when
(`search.resident`). A placement divides their bytes; one cumulative sum per body and candidate gives the fullest
moment. What is alive between forward and backward pass is what the backward pass keeps: of a loop over layers the
residuals of `jax.vjp`, of layers written out what XLA does not compute again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from search.attention import score_keys
from search.fusion import Where
from search.liveness import Remat, Step, analyse_step
from search.regions import count_layers
from search.resident import Body, Kept
from search.shares import Arrays, LayoutSplits, Splits, splits_of
from sharding_rules import Layout, TracedFunction, trainable
from sharding_rules.partition import tree_bytes

__all__ = [
    "ActivationBytes",
    "ActivationMemory",
    "LayoutSplits",
    "StepBytes",
    "activation_bytes",
    "splits_of",
    "step_bytes",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
REMATS: tuple[Remat, ...] = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes per device, one entry per candidate (analytic). What a step needs beside parameters, gradients and
    optimizer state is the sum.

    Attributes:
        layers: what the backward pass keeps of all repeated layers, for one microbatch.
        outside: what it keeps of the rest, for one microbatch, as far as it is still there at the fullest moment.
        transient: what the fullest moment takes beyond what is kept, parameters and one float32 set of gradients.
        gathered: weights gathered over fsdp at that moment.
        stacked: the part of `transient` that grows with the layers on a device: gradients of one microbatch of several,
            and copies of weights.
    """

    layers: Ints
    outside: Ints
    transient: Ints
    gathered: Ints
    stacked: Ints

    @property
    def total(self) -> Ints:
        return self.layers + self.outside + self.transient + self.gathered


class ActivationMemory:
    """Activations of a traced loss under any placement.

    Args:
        traced: the loss on the whole global batch.
        layout: of it, on any mesh; its rows are those of placements.
        remats: rematerialisations that will be asked for.
        fused_attention: scores of attention are never in memory.
        steps: analysed steps, for those that have them already.
        accelerator: kind of device that the step is compiled for, as `search.accelerators.Accelerator.kind`.
        param_dtype: of the stored parameters; where the loss takes narrower ones, the step has copies of them.
    """

    def __init__(
        self,
        traced: TracedFunction,
        layout: Layout,
        remats: Sequence[Remat] = REMATS,
        *,
        fused_attention: bool = False,
        steps: Mapping[Remat, Step] | None = None,
        accelerator: str = "tpu",
        param_dtype: str = "float32",
    ):
        self._traced, self._layout = traced, layout
        self._options: dict[str, Any] = {
            "fused_attention": fused_attention,
            "accelerator": accelerator,
            "param_dtype": param_dtype,
        }
        self._remats = tuple(remats)
        self._steps = dict(steps or {})
        self._programs: dict[str, _Program] = {}

    def _program(self, remat: Remat) -> _Program:
        if remat not in self._programs:
            if remat not in self._remats:
                raise ValueError(f"remat={remat!r}; this memory was made for {', '.join(self._remats)}")
            step = self._steps.pop(remat, None) or analyse_step(self._traced, remat=remat, params=self._layout.params)
            self._programs[remat] = _Program(step, self._layout, **self._options)
        return self._programs[remat]

    def bytes(self, place: Splits, remat: Remat, microbatches: Any = 1, fsdp: Any = 1) -> ActivationBytes:
        """Bytes of candidates of one placement with one rematerialisation.

        Args:
            place: which mesh axes split which rows.
            remat: one of those the model was made for.
            microbatches: numbers of microbatches, one per candidate.
            fsdp: sizes of the fsdp axis, one per candidate or one for all.
        """
        parts, shards = np.broadcast_arrays(np.atleast_1d(microbatches), np.atleast_1d(fsdp))
        return self._program(remat).bytes(place, parts.astype(np.float64), shards.astype(np.float64))


class _Program:
    """One rematerialisation: what is kept, and the bodies with what is alive in them."""

    def __init__(self, step: Step, layout: Layout, *, fused_attention: bool, accelerator: str, param_dtype: str):
        rows = layout.rows.rows
        self.arrays = Arrays([row.name for row in rows], [row.name for row in rows if row.role == "batch"])
        layers = count_layers(layout)
        scores = score_keys(step) if fused_attention else None
        options: dict[str, Any] = {"accelerator": accelerator, "param_bytes": jnp.dtype(param_dtype).itemsize}
        self.body = Body(self.arrays, step, step.table.scope, Where(), scores, **options)
        kept = self.body.kept()
        counts = _counts(kept)
        self._kept = [k.index for k in kept]
        self._in_layers = np.array([layers > 1 and n % layers == 0 for n in counts], bool)
        self.arrays.freeze()
        self.body.freeze()

    def bytes(self, place: Splits, parts_n: Floats, fsdp_n: Floats) -> ActivationBytes:
        local_v = self.arrays.split(place)
        kept_k, batched_k = local_v[self._kept], self.arrays.batched_v[self._kept]

        def kept(mask: Any) -> Floats:
            fixed, shrinking = kept_k[mask & ~batched_k].sum(), kept_k[mask & batched_k].sum()
            return fixed + shrinking / parts_n

        peak_n, gathered_n, stacked_n = self.body.peak(local_v, parts_n, fsdp_n)
        gradients_n = np.where(parts_n > 1, 0.0, self.body.gradients(local_v) / fsdp_n)
        layers_n = kept(self._in_layers)
        # In one microbatch, gradients of layers take the place of what the head keeps, or are not there yet.
        room_n = np.maximum(peak_n - gradients_n - layers_n, 0.0)
        outside_n = np.minimum(kept(~self._in_layers), room_n)
        gathered_n = np.minimum(gathered_n, room_n - outside_n)
        transient_n = room_n - outside_n - gathered_n
        parts = (layers_n, outside_n, transient_n, gathered_n, np.minimum(stacked_n, transient_n))
        return ActivationBytes(*(np.ceil(x).astype(np.int64) for x in parts))


def _counts(kept: Sequence[Kept]) -> list[int]:
    """How often each kept value occurs, counting those that are alike as one."""
    total: dict[Any, int] = {}
    for k in kept:
        total[k.like] = total.get(k.like, 0) + k.trips
    return [total[k.like] for k in kept]


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes per device, by part (analytic)."""

    params: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.params + self.gradients + self.optimizer + self.activations


def step_bytes(
    layout: Layout,
    abstract_opt_state: Any,
    *,
    remat: Remat,
    microbatches: int,
    param_dtype: str = "float32",
    memory: ActivationMemory | None = None,
) -> StepBytes:
    """Count the bytes per device of a training step: parameters and optimizer state exactly, by their specs.

    Args:
        layout: of the loss traced on the whole global batch.
        abstract_opt_state: shapes of the optimizer's state.
        remat: "none", "dots" or "full".
        microbatches: activations are those of one microbatch.
        param_dtype: dtype of the stored parameters; gradients are summed in float32 or wider.
        memory: of the loss on any mesh, where several layouts of it are counted.
    """
    width = jnp.dtype(param_dtype).itemsize
    params = elements = 0
    arrays = layout.traced.arg(layout.params)
    for leaf, trained, (_, rest) in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(trainable(arrays)), layout.param_shares.values(), strict=True
    ):
        held = math.prod(leaf.shape) // layout.assignment.ways([a for entry in rest.entries for a in entry])
        params += held * (width if trained else leaf.dtype.itemsize)
        elements += held * trained
    optimizer = tree_bytes(abstract_opt_state, layout.state_specs(abstract_opt_state), layout.mesh_shape)
    memory = memory or ActivationMemory(layout.traced, layout, (remat,), param_dtype=param_dtype)
    activations = activation_bytes(layout, remat, microbatches=microbatches, memory=memory)
    return StepBytes(params, elements * max(width, 4), optimizer, activations)


def activation_bytes(
    layout: Layout, remat: Remat, *, microbatches: int = 1, memory: ActivationMemory | None = None
) -> int:
    """Bytes per device of activations of one layout: see `ActivationMemory`."""
    memory = memory or ActivationMemory(layout.traced, layout, (remat,))
    found = memory.bytes(splits_of(layout), remat, microbatches, layout.mesh_shape.fsdp)
    return int(found.total[0])
