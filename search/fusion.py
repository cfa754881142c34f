"""From equations to what a compiler would run: products, fused loops, indexing, as rows with the arrays they move.

The rule of fusion, after XLA's loop and input fusion, within one body (of a loop, a branch, or the whole function):

* broadcasts, reshapes, transposes, slices and what is computed from constants alone are views: they move nothing, and
  reading one reads the array behind it (or the view, if that is smaller);
* every other value has a level: the number of products, reductions, gathers and the like on the longest path to it;
* elementwise operations of one level, phase and body that are connected form one loop; a reduction joins the loop of
  what it reads, and its result has the next level;
* a loop reads every array from outside once, and writes those of its values that something outside it reads.

So a normalisation is two passes over its input and a softmax three. Products read their operands and write their
result, with no epilogue; converting a weight is a loop of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jax.extend.core import JaxprEqn, Var

from search.attention import Attention
from search.flops import arithmetic, product
from search.kinds import LOOPS, contracted_dimensions, is_reduction, is_view, kind_of, touched, touched_like
from search.liveness import CHECKPOINTS, Call, Phase, Step, bytes_of, calls, dtype_of
from search.units import Operand, Unit, Units, Value
from sharding_rules.axes import PARAM, Dims, Scope, leaves, shape_of

INLINED = frozenset({"scan", "while", "cond", "shard_map"})
"""Calls whose bodies are run apart; all others are read as part of their caller."""


@dataclasses.dataclass(frozen=True)
class Where:
    """What holds for a whole body: executions, whether their number is known, and in which phase it is."""

    trips: int = 1
    known: bool = True
    backward: bool = False
    checkpoint: bool = False


class Block:
    """The units of one body, with the arrays between them."""

    def __init__(self, step: Step, where: Where, scores: frozenset[Any] | None):
        self.step, self.where, self.scores = step, where, scores
        self.units = Units()
        self.nested: list[tuple[int, list[Unit]]] = []
        """Units of the bodies inside, with how many of this body's units come before."""
        self.own: list[Unit] = []
        """Joined units of this body alone, once it has run."""
        self.roots: dict[Value, tuple[Value, ...]] = {}
        self.level: dict[Value, int] = {}

    def run(self, scope: Scope) -> list[Unit]:
        """The units of a whole body, joined, in the order of the program."""
        self._walk(scope, self.where)
        for atom in scope.jaxpr.outvars:
            self._outside(scope, [atom])
        joined = self._joined()
        self.own = [unit for _, unit in joined]
        mine = [(root, 1, [unit]) for root, unit in joined]
        inside = [(before, 0, units) for before, units in self.nested]
        ordered = sorted([*mine, *inside], key=lambda item: item[:2])
        return [unit for _, _, units in ordered for unit in units]

    # Reading a body.

    def _walk(self, scope: Scope, where: Where) -> None:
        top = scope is self.step.table.scope
        flow = self.step.flow
        for position in flow.live(scope):
            eqn = scope.jaxpr.eqns[position]
            here = dataclasses.replace(where, backward=True) if top and position > flow.boundary else where
            inner = calls(scope, position)
            if inner and eqn.primitive.name in INLINED:
                self._outside(scope, eqn.invars)
                self.nested.append((len(self.units.units), self._run_apart(scope, eqn, inner, here)))
                self._define(scope, eqn, self._level(scope, eqn) + 1)
            elif inner:
                checkpoint = here.checkpoint or eqn.primitive.name in CHECKPOINTS
                for call in inner[:1]:
                    for var, atom in zip(call.scope.jaxpr.invars, call.operands, strict=True):
                        self.roots[(id(call.scope), var)] = self._roots(scope, atom)
                    self._walk(call.scope, dataclasses.replace(here, checkpoint=checkpoint))
                    for var, atom in zip(eqn.outvars, call.scope.jaxpr.outvars, strict=True):
                        self.roots[(id(scope), var)] = self._roots(call.scope, atom)
            else:
                self._equation(scope, eqn, here)

    def _run_apart(self, scope: Scope, eqn: JaxprEqn, inner: list[Call], where: Where) -> list[Unit]:
        name = eqn.primitive.name
        trips = where.trips * (eqn.params["length"] if name == "scan" else 1)
        if name == "shard_map":
            trips *= math.prod(eqn.params["mesh"].shape.values())
        inside = dataclasses.replace(where, trips=trips, known=where.known and name != "while")
        results = [self._run_body(scope, call, inside) for call in inner]
        if name == "cond":
            return max(results, key=lambda units: sum((u.flops + u.transcendentals) * u.trips for u in units))
        return [unit for units in results for unit in units]

    def _run_body(self, scope: Scope, call: Call, where: Where) -> list[Unit]:
        block = Block(self.step, where, self.scores)
        start, carried = call.loop
        for position, (var, atom) in enumerate(zip(call.scope.jaxpr.invars, call.operands, strict=True)):
            # A constant outside is one inside, unless the loop changes it.
            if not self._roots(scope, atom) and not start <= position < start + carried:
                block.roots[(id(call.scope), var)] = ()
        return block.run(call.scope)

    def _roots(self, scope: Scope, atom: Any) -> tuple[Value, ...]:
        if not isinstance(atom, Var):
            return ()
        key = (id(scope), atom)
        if key not in self.roots:
            self.roots[key] = (key,)
            self.level.setdefault(key, 0)
            self.units.operands[key] = _operand(scope, atom)
        return self.roots[key]

    def _level(self, scope: Scope, eqn: JaxprEqn) -> int:
        return max((self.level[root] for atom in eqn.invars for root in self._roots(scope, atom)), default=0)

    def _define(self, scope: Scope, eqn: JaxprEqn, level: int, unit: int | None = None) -> None:
        for var in eqn.outvars:
            (root,) = self._roots(scope, var)
            self.level[root] = level
            if unit is not None:
                self.units.producer[root] = unit

    def _outside(self, scope: Scope, atoms: Iterable[Any]) -> None:
        for atom in atoms:
            for root in self._roots(scope, atom):
                self.units.readers.setdefault(root, set()).add(-1)

    def _equation(self, scope: Scope, eqn: JaxprEqn, where: Where) -> None:
        name = eqn.primitive.name
        sources = [root for atom in eqn.invars for root in self._roots(scope, atom)]
        if is_view(eqn) or (name in LOOPS and not sources):
            for var in eqn.outvars:
                self.roots[(id(scope), var)] = tuple(dict.fromkeys(sources))
            return
        level, reduction = self._level(scope, eqn), is_reduction(eqn)
        index = self._new_unit(scope, eqn, "reduce" if reduction else kind_of(name), where)
        unit = self.units.units[index]
        joins = name in LOOPS or reduction
        fresh = not (eqn.invars and self._roots(scope, eqn.invars[0]))
        partly, written = touched(eqn, unit.kind, fresh=fresh)
        like = touched_like(eqn, unit.kind)
        moved = _touched_dims(scope, eqn, like) if like is not None else None
        for position, atom in enumerate(eqn.invars):
            size = bytes_of(atom) if isinstance(atom, Var) else 0
            for root in self._roots(scope, atom):
                behind = self.units.operands[root]
                # A view of one array that is smaller than it reads that much of it.
                read = dataclasses.replace(behind, bytes=partly.get(position, min(behind.bytes, size)))
                if position in partly and moved is not None:
                    read = dataclasses.replace(read, dims=moved)
                if root not in unit.reads or unit.reads[root].bytes < read.bytes:
                    unit.reads[root] = read
                self.units.readers.setdefault(root, set()).add(index)
                maker = self.units.producer.get(root) if joins and self.level[root] == level else None
                if maker is not None:
                    made_by = self.units.units[maker]
                    if made_by.kind == "elementwise" and made_by.phase == unit.phase:
                        self.units.union(maker, index)
        self._define(scope, eqn, level if name in LOOPS else level + 1, index)
        for var in eqn.outvars:
            root = (id(scope), var)
            size = self.units.operands[root].bytes if written is None else written
            unit.writes[root] = dataclasses.replace(self.units.operands[root], bytes=size)
            if unit.kind == "scatter" and not fresh and moved is not None:
                unit.writes[root] = dataclasses.replace(unit.writes[root], dims=moved)

    def _new_unit(self, scope: Scope, eqn: JaxprEqn, kind: str, where: Where) -> int:
        found = product(eqn)
        flops, transcendentals = (found.flops, 0) if found else arithmetic(eqn)
        known = where.known
        estimate = eqn.params.get("cost_estimate")
        if estimate is not None:
            flops, transcendentals = int(estimate.flops), int(estimate.transcendentals)
        elif kind == "other" and any("jaxpr" in key for key in eqn.params):
            known = False
        atoms = [a for a in (*eqn.outvars, *eqn.invars) if isinstance(a, Var)]
        largest = max(atoms, key=lambda a: math.prod(shape_of(a)), default=None)
        unit = Unit(
            kind=found.kind if found else kind,
            phase=self._phase(scope, eqn, where),
            flops=flops,
            transcendentals=transcendentals,
            trips=where.trips,
            known=known,
            space=scope.dims[largest] if largest is not None else (),
            elements=math.prod(shape_of(largest)) if largest is not None else 0,
            dtype=dtype_of(atoms[0]) if atoms else None,
            source=eqn,
            product=found,
        )
        if kind == "gather" and isinstance(eqn.invars[0], Var):
            unit.contracted = scope.dims[eqn.invars[0]]
        if found:
            three = (eqn.invars[0], eqn.invars[1], eqn.outvars[0])
            lhs, rhs, out = (scope.dims[a] if isinstance(a, Var) else () for a in three)
            unit.space = (*lhs, *rhs, *out)
            unit.contracted = tuple(lhs[i] for i in contracted_dimensions(eqn) if lhs)
            unit.dtype = dtype_of(eqn.invars[0])
        return self.units.add(unit)

    def _phase(self, scope: Scope, eqn: JaxprEqn, where: Where) -> Phase:
        if not where.backward:
            return "forward"
        if where.checkpoint and not self.step.flow.is_backward(scope, eqn):
            return "recompute"
        return "backward"

    # Joining.

    def _joined(self) -> list[tuple[int, Unit]]:
        attention = Attention(self.scores) if self.scores is not None else None
        if attention is not None:
            attention.join(self.units)
        return [(root, self._join(root, members, attention)) for root, members in self.units.groups().items()]

    def _join(self, root: int, members: list[int], attention: Attention | None) -> Unit:
        units = [self.units.units[i] for i in members]
        main = max(units, key=lambda u: (u.product is not None, u.elements))
        inside = {value for u in units for value in u.writes}
        kind = main.kind
        if len(units) > 1 and main.product is None:
            kind = "reduce" if any(u.kind == "reduce" for u in units) else "elementwise"
        if len(units) > 1 and main.product is not None:
            kind = "attention"
        reads: dict[Value, Operand] = {}
        for unit in units:
            for value, operand in unit.reads.items():
                if value in inside:
                    continue
                if kind != "attention" or attention is None or attention.reads_memory(self.units, value, main.phase):
                    known = reads.get(value)
                    reads[value] = operand if known is None or known.bytes < operand.bytes else known
        writes = {
            value: operand
            for unit in units
            for value, operand in unit.writes.items()
            if (
                attention.writes_memory(self.units, value, root, main.phase)
                if attention is not None
                else self.units.read_outside(value, root)
            )
        }
        return dataclasses.replace(
            main,
            kind=kind,
            flops=sum(u.flops for u in units),
            transcendentals=sum(u.transcendentals for u in units),
            known=all(u.known for u in units),
            reads=reads,
            writes=writes,
        )


def _touched_dims(scope: Scope, eqn: JaxprEqn, like: Var) -> Dims:
    """Dimensions over which what indexing moves divides: its own, and those of the whole array that it does not have.

    Of a table whose rows lie on several devices, each picks only what it holds.
    """
    own = scope.dims.get(like, ())
    whole = eqn.invars[0] if isinstance(eqn.invars[0], Var) else eqn.outvars[0]
    has = {axis for dim in own for axis in leaves(dim)}
    return (*own, *(dim for dim in scope.dims.get(whole, ()) if not has & set(leaves(dim))))


def _operand(scope: Scope, var: Var) -> Operand:
    return Operand(bytes_of(var), scope.dims.get(var, ()), scope.origin.get(var) == PARAM)
