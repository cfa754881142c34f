"""How arrays divide over a placement: rows of their axes, and the mesh axes that split them.

arrays = Arrays(row_names, batch_rows)
index = arrays.add(bytes, [("batch",), ("length",), ("kv_heads", "head_dim")])
arrays.freeze()
arrays.split(placement)[index]                     # bytes on one device, for the whole batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sharding_rules import AXES, CONTEXT, DATA, EXPERT, TENSOR, Layout

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Splits(Protocol):
    """What counting bytes needs of a `search.cost.Placement`: which mesh axes split which rows, and their sizes."""

    @property
    def expert(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tensor(self) -> int: ...
    @property
    def batch_shards(self) -> int: ...
    @property
    def rows(self) -> Bools: ...
    @property
    def spill(self) -> Bools: ...
    @property
    def beyond(self) -> Bools: ...
    @property
    def groups(self) -> Bools: ...


@dataclasses.dataclass(frozen=True)
class LayoutSplits:
    """The `Splits` of one layout; see `splits_of`."""

    expert: int
    context: int
    tensor: int
    batch_shards: int
    rows: Bools
    spill: Bools
    beyond: Bools
    groups: Bools


def splits_of(layout: Layout) -> LayoutSplits:
    """How a layout splits its rows."""
    rows, assignment, mesh = layout.rows.rows, layout.assignment, layout.mesh_shape
    return LayoutSplits(
        expert=mesh.expert,
        context=mesh.context,
        tensor=mesh.tensor,
        batch_shards=mesh.data * mesh.fsdp,
        rows=np.array([[axis in assignment.compute.get(row.name, ()) for axis in AXES] for row in rows]),
        spill=np.array([[axis in assignment.spill.get(row.name, ()) for axis in AXES] for row in rows]),
        beyond=np.array([row.role == "kv_heads" and row.size % mesh.tensor > 0 for row in rows]),
        groups=np.array([row.role == "groups" for row in rows]),
    )


class Arrays:
    """Arrays as columns: bytes, which of the distinct sets of rows they have, and whether the batch is among them."""

    def __init__(self, rows: Sequence[str], batch_rows: Sequence[str]):
        self._column = {name: i for i, name in enumerate(rows)}
        self.batch_rows = frozenset(batch_rows)
        self._sets: dict[frozenset[str], int] = {}
        self.bytes: list[float] = []
        self.set: list[int] = []
        self.batched: list[bool] = []
        self.whole: dict[int, int] = {}
        """Operands of products, as gathered for them: index -> the set of the other rows of the product."""

    def add(
        self,
        bytes_: float,
        names: Iterable[Sequence[str]],
        beside: Iterable[Sequence[str]] | None = None,
        *,
        batched: bool = False,
    ) -> int:
        """Add an array; returns its index.

        Args:
            bytes_: of the whole array.
            names: of rows, per dimension.
            beside: rows of a product that works on the array. It is then the array as gathered for that product: where
                it is split along rows that spill, by a mesh axis that splits other rows of the product.
            batched: it has the examples of a microbatch, though no device splits them.
        """
        rows = self._rows(names)
        self.bytes.append(bytes_)
        self.set.append(self._sets.setdefault(rows, len(self._sets)))
        self.batched.append(batched or bool(rows & self.batch_rows))
        if beside is not None:
            self.whole[len(self.bytes) - 1] = self._sets.setdefault(self._rows(beside) - rows, len(self._sets))
        return len(self.bytes) - 1

    def _rows(self, names: Iterable[Sequence[str]]) -> frozenset[str]:
        return frozenset(name for dim in names for name in dim if name in self._column)

    def freeze(self) -> None:
        self.bytes_v = np.array(self.bytes, np.float64)
        self.set_v = np.array(self.set, np.int64)
        self.batched_v = np.array(self.batched, bool)
        self.incidence_sr = np.zeros((len(self._sets), len(self._column)), bool)
        for rows, i in self._sets.items():
            self.incidence_sr[i, [self._column[name] for name in rows]] = True

    def split(self, place: Splits) -> Floats:
        """Bytes on one device, for the whole batch."""
        sizes = {DATA: place.batch_shards, EXPERT: place.expert, CONTEXT: place.context, TENSOR: place.tensor}
        sizes_x = np.array([float(sizes.get(axis, 1)) for axis in AXES])
        inc = self.incidence_sr
        grouped = np.any(inc & place.groups, axis=1)
        taken = (inc & ~place.beyond) @ place.rows | ((inc & place.beyond) @ place.rows & grouped[:, None])
        spilled = inc @ place.spill & ~taken
        ways_s = np.where(taken | spilled, sizes_x, 1.0).prod(1)
        local_v = self.bytes_v / ways_s[self.set_v]
        if self.whole:
            index_w, beside_w = (np.array(x, np.int64) for x in zip(*self.whole.items(), strict=True))
            set_w = self.set_v[index_w]
            gathered_w = np.any(spilled[set_w] & taken[beside_w] & (sizes_x > 1), axis=1)
            whole_w = self.bytes_v[index_w] / np.where(taken, sizes_x, 1.0).prod(1)[set_w]
            local_v[index_w] = np.where(gathered_w, whole_w, 0.0)
        return local_v
