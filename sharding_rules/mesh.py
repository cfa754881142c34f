"""Mesh axis names and the only maker of meshes.

    shape = MeshShape(data=2, tensor=4)
    mesh = make_mesh(shape)              # all six axes, slowest link first

Every mesh carries all six axes, so that a plan never asks whether an axis exists: an unused one has size 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA = "data"
FSDP = "fsdp"
STAGE = "stage"
EXPERT = "expert"
CONTEXT = "context"
TENSOR = "tensor"
AXES = (DATA, FSDP, STAGE, EXPERT, CONTEXT, TENSOR)
"""Mesh axes, slowest link first: neighbours in `tensor` sit next to each other."""
BATCH_AXES = (DATA, FSDP, EXPERT)
"""Axes that split the batch: fsdp devices hold different examples and share the parameters' bytes; expert devices hold
different examples outside the experts."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis.

    >>> str(MeshShape(data=2, tensor=4))
    'data=2,tensor=4'
    >>> MeshShape.parse("fsdp=8").size
    8
    """

    data: int = 1
    fsdp: int = 1
    stage: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis, size in self.sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh axis {axis!r} has size {size!r}; sizes are integers from 1 up")

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes.values())

    @property
    def batch_shards(self) -> int:
        """Number of ways the batch is split."""
        return math.prod(self.sizes[axis] for axis in BATCH_AXES)

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Read `"data=2,tensor=4"`.

        Raises:
            ValueError: an unknown axis (the nearest name is given), an axis twice, or a size that is not a whole
                number.
        """
        import difflib

        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, size = part.partition("=")
            if name not in AXES:
                near = difflib.get_close_matches(name, AXES, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"unknown mesh axis {name!r} in {text!r}; did you mean {near!r}? (axes: {', '.join(AXES)})"
                )
            if name in sizes:
                raise ValueError(f"mesh axis {name!r} twice in {text!r}")
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"mesh axis {part!r} in {text!r}: write it as {name}=N with N at least 1")
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        used = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return ",".join(used) or "data=1"


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Sort devices into the numbering that plans and cost models count in: neighbours first.

    TPUs go by slice, then coordinates with the last one fastest, then core of the chip; JAX's own ids count x fastest.
    GPUs go by slice, then process, then id. CPU devices stay as they are.
    """
    if not devices or devices[0].platform == "cpu":
        return list(devices)
    if devices[0].platform == "tpu":
        return sorted(devices, key=lambda d: (_slice(d), tuple(d.coords), getattr(d, "core_on_chip", 0) or 0))
    return sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None, *, order: Sequence[str] = ()) -> Mesh:
    """Lay devices out as a mesh with all six axes, automatic partitioning on each.

    Args:
        shape: devices per axis; their product is the number of devices used.
        devices: default `jax.devices()`. On accelerators they are laid out in the numbering of `in_order`, so that each
            axis runs over the links that the plan was costed with.
        order: axes larger than 1, outermost (slowest links) first; default the order of `AXES`. The mesh's own axes
            keep their order: only which device sits where changes.

    Raises:
        ValueError: the devices are not as many as the shape asks for, or the order has other axes.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) != shape.size:
        raise ValueError(f"mesh {shape} needs {shape.size} devices, but {len(devices)} are there")
    large = [axis for axis in AXES if shape.sizes[axis] > 1]
    if order and sorted(order) != sorted(large):
        raise ValueError(f"order={tuple(order)} is not the axes of the mesh {shape} that are larger than 1: {large}")
    placed = [*(axis for axis in AXES if axis not in large), *(order or large)]
    laid = np.asarray(in_order(devices)).reshape([shape.sizes[axis] for axis in placed])
    return Mesh(laid.transpose([placed.index(axis) for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
