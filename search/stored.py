"""Which values of a body lie in memory, and which are computed again where they are read, as XLA's fusion does."""

from __future__ import annotations

from search.fusion import Block
from search.units import Unit, Value

COSTLY = frozenset({"random_bits", "threefry2x32", "concatenate", "pad"})
"""Elementwise operations that are not computed again."""
LOOPED = ("elementwise", "reduce")
PRODUCTS = ("dot", "conv", "ragged")


class Stored:
    """Which values of a body are in memory: those of fused units, less what each reader computes again, as XLA does.

    * A cheap elementwise operation is computed again by all that read it, if all are fused loops.
    * What the forward pass (or its recomputation) makes by elementwise operations, the backward pass of the same body
      computes again from products and reductions, unless a `jax.checkpoint` lies between them. On GPUs the
      operands of products are in memory, and an exponential and the like is not computed twice.

    Attributes:
        groups: fused unit by its first equation's.
        written: values that it leaves in memory.
        reads: values in memory that it reads.
        again: whether it is under a `jax.checkpoint` in the backward pass.
    """

    def __init__(self, block: Block, checkpointed: set[int], accelerator: str):
        self._all = block.units
        self._gpu = accelerator == "gpu"
        self._fusing = LOOPED if self._gpu else (*LOOPED, *PRODUCTS)
        self.groups: dict[int, Unit] = dict(zip(self._all.groups(), block.own, strict=True))
        self.again: dict[int, bool] = {}
        for root, unit in self.groups.items():
            scopes = {key for key, _ in unit.writes}
            self.again[root] = unit.phase != "forward" and bool(scopes & checkpointed)
        self._virtual: dict[Value, bool] = {}
        self.reads: dict[int, set[Value]] = {}
        self.written: dict[int, set[Value]] = {}
        for root, unit in self.groups.items():
            self.written[root] = {v for v in unit.writes if self._near(v, root) and not self._is_virtual(v)}
        needed = {value for written in self.written.values() for value in written}
        for root, unit in self.groups.items():
            self.reads[root] = {s for v in unit.reads for s in self._sources(v, root)}
            if self.written[root]:
                needed |= self.reads[root]
        # A costly operation inside a loop whose cheap readers are computed again elsewhere.
        for root, members in self._all.groups().items():
            inside = {v for i in members for v in self._all.units[i].writes}
            self.written[root] |= inside & needed

    def _sources(self, value: Value, reader: int) -> set[Value]:
        """What a fused unit reads of memory for a value."""
        if not self._is_virtual(value) and not self._is_far(value, reader):
            return {value}
        unit = self._all.units[self._all.producer[value]]
        return {source for read in unit.reads for source in self._sources(read, reader)}

    def _near(self, value: Value, root: int) -> bool:
        """Whether anything outside a group reads a value as it is."""
        readers = self._all.read_outside(value, root)
        return any(r < 0 or not self._is_far(value, self._all.find(r)) for r in readers)

    def _is_far(self, value: Value, reader: int) -> bool:
        """Whether a unit of the backward pass computes a value of the forward pass again."""
        index = self._all.producer.get(value)
        if index is None or reader not in self.groups:
            return False
        unit, root, there = self._all.units[index], self._all.find(index), self.groups[reader]
        return (
            unit.kind == "elementwise"
            and unit.source.primitive.name not in COSTLY
            and not (self._gpu and unit.transcendentals and unit.phase == "recompute")
            and not self._all.operands[value].weight
            and unit.phase != "backward"
            and there.phase == "backward"
            and there.kind in self._fusing
            and self.again[root] == self.again[reader]
        )

    def _is_virtual(self, value: Value) -> bool:
        if value not in self._virtual:
            self._virtual[value] = self._computed_again(value)
        return self._virtual[value]

    def _computed_again(self, value: Value) -> bool:
        index = self._all.producer.get(value)
        if index is None:
            return False
        unit, root = self._all.units[index], self._all.find(index)
        if unit.kind != "elementwise" or unit.transcendentals or unit.source.primitive.name in COSTLY:
            return False
        for r in self._all.readers.get(value, ()):
            reader = self._all.find(r) if r >= 0 else -1
            if reader not in self.groups:
                return False
            fused = self.groups[reader].kind in LOOPED and self.again[reader] == self.again[root]
            if not fused and not self._is_far(value, reader):
                return False
        return True
