"""Plans of the zoo's models whose collectives are compared: as planned, and as compiled for 8 CPU devices.

rows = compare(PLANS[0])            # one per kind and mesh axes, in bytes per device and step
all(row.agrees for row in rows)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import zoo
from hlo_collectives import by_axis, collectives
from jax.sharding import NamedSharding, PartitionSpec

from search.cluster import parse_cluster
from search.plan import Remat
from search.space import Inner
from search.traced_model import TracedModel
from sharding_rules import FSDP, MeshShape, make_mesh, trace

BATCH = 8
BAR = 0.1
"""Relative to the compiled bytes."""
NEGLIGIBLE = 0.001
"""Of the bytes that a step moves on a device: less is not compared (80 bytes, where labels are shifted by a token)."""


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
    """A plan to compile: a model of the zoo, mesh, sequence parallelism and rematerialisation; `why` it is missed."""

    model: str
    mesh: str
    sequence: bool = False
    remat: Remat = "none"
    why: str = ""

    def __str__(self) -> str:
        extra = [",sequence"] * self.sequence + [f",remat={self.remat}"] * (self.remat != "none")
        return f"{self.model}[{self.mesh}{''.join(extra)}]"

    @property
    def inner(self) -> Inner:
        shape = MeshShape.parse(self.mesh)
        return Inner(shape.tensor, shape.context, shape.expert, self.sequence, shape.data * shape.fsdp)


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes per device and step of one kind of collective over some mesh axes; `total` is of all collectives."""

    kind: str
    axes: tuple[str, ...]
    planned: float
    compiled: float
    total: float

    @property
    def ratio(self) -> float:
        return self.planned / self.compiled if self.compiled else math.inf

    @property
    def agrees(self) -> bool:
        small = max(self.planned, self.compiled) <= NEGLIGIBLE * self.total
        return small or abs(self.planned - self.compiled) <= BAR * self.compiled


PLANS = (
    CompiledPlan("llama_unrolled", "data=8"),
    CompiledPlan("llama_unrolled", "fsdp=8"),
    CompiledPlan("llama_unrolled", "data=2,fsdp=4"),
    CompiledPlan("llama_unrolled", "fsdp=8", remat="full"),
    CompiledPlan("llama_unrolled", "data=2,tensor=4"),
    CompiledPlan("llama_unrolled", "fsdp=4,tensor=2"),
    CompiledPlan("llama_unrolled", "data=2,tensor=4", sequence=True),
    CompiledPlan("llama_unrolled", "tensor=8"),
    CompiledPlan("llama_unrolled", "data=2,context=4"),
    CompiledPlan("llama_scanned", "fsdp=8"),
    CompiledPlan("llama_scanned", "fsdp=8", remat="full"),
    CompiledPlan("llama_scanned", "data=2,context=4"),
    CompiledPlan("llama_scanned", "fsdp=2,context=2,tensor=2"),
    CompiledPlan("llama_nnx", "fsdp=4,tensor=2"),
    CompiledPlan("gpt2", "fsdp=8"),
    CompiledPlan("gpt2", "data=2,context=4"),
    CompiledPlan("t5", "fsdp=8"),
    CompiledPlan("t5", "fsdp=2,tensor=4"),
    CompiledPlan("t5", "data=2,context=4"),
    CompiledPlan("vit_conv", "fsdp=8"),
    CompiledPlan("vit_reshape", "fsdp=2,tensor=4"),
    CompiledPlan("encoder_linen", "data=4,tensor=2"),
    CompiledPlan("equinox_mlp", "fsdp=8"),
    CompiledPlan("equinox_transformer", "data=2,fsdp=2,tensor=2"),
    CompiledPlan("mixer", "data=2,fsdp=2,tensor=2"),
    CompiledPlan("mlp", "data=4,tensor=2"),
    CompiledPlan("resnet", "fsdp=8"),
    CompiledPlan("unet", "fsdp=8"),
    CompiledPlan("moe_one_hot", "fsdp=8"),
    CompiledPlan("llama_fused", "data=4,tensor=2"),
    CompiledPlan("gpt2", "data=4,tensor=2", why="parts of the fused bias are gathered, 0.7 % of the bytes"),
    CompiledPlan("llama_fused", "data=2,tensor=4", why="XLA moves parts of a fused weight in several steps"),
    CompiledPlan("moe_one_hot", "fsdp=4,tensor=2"),
    CompiledPlan("moe_one_hot", "data=4,expert=2", why="XLA gathers tokens over expert, and sums, for all-to-alls"),
)


def compare(plan: CompiledPlan) -> list[Row]:
    """The collectives of a plan, in the order of their compiled bytes."""
    model = _model(plan.model, plan.remat)
    planned, compiled = _planned(model, plan), _compiled(model, plan)
    total = sum(compiled.values())
    rows = [Row(kind, axes, planned[kind, axes], compiled[kind, axes], total) for kind, axes in planned | compiled]
    return sorted(rows, key=lambda row: -row.compiled)


@functools.cache
def _model(name: str, remat: Remat) -> TracedModel:
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(BATCH), zoo.base.abstract_key())
    traced = trace(model.loss, *args, names=("params", "batch", "rng"))
    trainable = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, args[0])
    cluster = parse_cluster("8xA100")
    cluster = dataclasses.replace(cluster, accelerator=dataclasses.replace(cluster.accelerator, kind="cpu"))
    return TracedModel(traced, jax.eval_shape(optax.adam(1e-3).init, trainable), cluster, remats=(remat,))


def _planned(model: TracedModel, plan: CompiledPlan) -> Counter[Any]:
    place = model.place(plan.inner)
    if isinstance(place, str):
        raise ValueError(f"{plan}: {place}")
    sizes = MeshShape.parse(plan.mesh).sizes
    found: Counter[Any] = Counter()
    for flow in place.flows:
        axes = tuple(axis for axis in flow.axes if sizes[axis] > 1)
        bytes_ = flow.bytes if np.ndim(flow.bytes) == 0 else flow.bytes[place.fsdp_sizes.index(sizes[FSDP])]
        bytes_ = float(bytes_) * flow.times(plan.remat) / math.prod(sizes[axis] for axis in flow.split)
        if axes and bytes_:
            found["sum" if flow.kind in ("all_reduce", "reduce_scatter") else flow.kind, axes] += bytes_
    return found


def _compiled(model: TracedModel, plan: CompiledPlan) -> Counter[Any]:
    shape = MeshShape.parse(plan.mesh)
    layout = model.layout.on(shape, plan.inner.preset(shape.fsdp))
    mesh = make_mesh(shape)

    def place(name: str) -> Any:
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout.specs(name), is_leaf=is_spec)

    shardings = tuple(place(name) for name in layout.traced.names)
    step = jax.value_and_grad(layout.pin(mesh, plan.remat))
    jitted = jax.jit(step, in_shardings=shardings, out_shardings=(None, shardings[0]))
    return by_axis(collectives(jitted.lower(*layout.traced.args).compile().as_text(), shape))
