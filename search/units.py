"""What runs: units of work and the arrays between them, before and after they are joined."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.extend.core import JaxprEqn, Var

from search.flops import Product
from search.liveness import Phase
from sharding_rules.axes import Dims

Value = tuple[int, Var]
"""A variable in a scope, by the scope's identity: a jaxpr called twice has its variables twice."""


@dataclasses.dataclass
class Operand:
    """An array that a unit reads or writes."""

    bytes: int
    dims: Dims
    weight: bool


@dataclasses.dataclass
class Unit:
    """One thing that runs: an equation, and once joined with others a loop or a fused attention."""

    kind: str
    phase: Phase
    flops: int
    transcendentals: int
    trips: int
    known: bool
    space: Dims
    elements: int
    dtype: Any
    source: JaxprEqn
    product: Product | None = None
    contracted: Dims = ()
    reads: dict[Value, Operand] = dataclasses.field(default_factory=dict)
    writes: dict[Value, Operand] = dataclasses.field(default_factory=dict)


class Units:
    """The units of one body, in the order of the program, and which of them are joined.

    Attributes:
        units: one per equation.
        producer: unit that makes a value.
        readers: units that read a value; -1 stands for anything outside the body.
        operands: every value that is no view.
    """

    def __init__(self):
        self.units: list[Unit] = []
        self.producer: dict[Value, int] = {}
        self.readers: dict[Value, set[int]] = {}
        self.operands: dict[Value, Operand] = {}
        self._parents: list[int] = []

    def add(self, unit: Unit) -> int:
        self.units.append(unit)
        self._parents.append(len(self._parents))
        return len(self.units) - 1

    def find(self, index: int) -> int:
        """The first of the units that a unit is joined with."""
        while self._parents[index] != index:
            self._parents[index] = self._parents[self._parents[index]]
            index = self._parents[index]
        return index

    def union(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        self._parents[b] = a

    def groups(self) -> dict[int, list[int]]:
        """Joined units, by the first of them."""
        groups: dict[int, list[int]] = {}
        for index in range(len(self.units)):
            groups.setdefault(self.find(index), []).append(index)
        return groups

    def read_outside(self, value: Value, root: int) -> list[int]:
        """Who reads a value outside the group that makes it."""
        return [r for r in self.readers.get(value, ()) if r < 0 or self.find(r) != root]
