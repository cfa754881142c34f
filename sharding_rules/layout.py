"""First working version of the layout: batch over the batch axes, parameters replicated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import math
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, PartitionSpec as P

from sharding_rules.mesh import BATCH_AXES, MeshShape
from sharding_rules.trace import TracedFunction


class PlanError(ValueError):
    """A plan that cannot be carried out."""


@dataclasses.dataclass(frozen=True)
class Layout:
    traced: TracedFunction
    mesh_shape: MeshShape

    def specs(self, name: str) -> Any:
        if name == "batch":
            return jax.tree.map(lambda x: P(BATCH_AXES) if x.ndim and x.shape[0] % self.mesh_shape.batch_shards == 0
                                else P(), self.traced.arg(name))
        return jax.tree.map(lambda _: P(), self.traced.arg(name))

    compute_specs = specs

    @property
    def out_specs(self) -> Any:
        return jax.tree.map(lambda _: P(), self.traced.out)

    def state_specs(self, abstract_state: Any, update=None) -> Any:
        return jax.tree.map(lambda _: P(), abstract_state)

    def pin(self, mesh: Mesh, remat: str = "none"):
        def pinned(*args):
            flat = jaxpr_as_fun(self.traced.jaxpr)(*jax.tree.leaves(args))
            return jax.tree.unflatten(jax.tree.structure(self.traced.out), flat)
        return pinned

    def explain(self) -> str:
        return f"mesh {self.mesh_shape}: batch split, parameters replicated"

    def bytes_per_device(self, name: str) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.traced.arg(name)))


def make_layout(traced: TracedFunction, mesh_shape: MeshShape, preset: str = "data", rules=()) -> Layout:
    return Layout(traced, mesh_shape)
