"""What computes the calls of `attention` and `experts` in a model, by the devices of a mesh.

pinned = layout.pin(mesh, remat=plan.remat, kernels=kernels_for(plan.attention, mesh))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jax.sharding import Mesh, PartitionSpec

from pipelines.attention import AttentionKernels, attention_kernels
from pipelines.experts import ExpertsKernels, experts_kernels
from sharding_rules import AttentionCall
from sharding_rules.kernels import Call


@dataclasses.dataclass(frozen=True)
class PlatformKernels:
    """Computes calls by kernels; `Layout.pin` takes it. What is None computes nothing: the calls run as they stand."""

    attention: AttentionKernels | None
    experts: ExpertsKernels | None

    def __call__(self, call: Call, mesh: Mesh, operands: Sequence[Any], specs: Sequence[PartitionSpec]) -> Any:
        """The result of a call, or None to have it computed plainly."""
        kernels = self.attention if isinstance(call, AttentionCall) else self.experts
        return None if kernels is None else kernels(call, mesh, operands, specs)


def kernels_for(attention: Literal["fused", "plain"], mesh: Mesh) -> PlatformKernels:
    """Kernels for a mesh under a plan's `attention`."""
    return PlatformKernels(attention_kernels(attention, mesh), experts_kernels(mesh))
