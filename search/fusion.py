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

from search.flops import Product, arithmetic, product
from search.liveness import CHECKPOINTS, Call, Phase, Step, calls, dtype_of, itemsize, source_of
from sharding_rules.axes import BATCH, PARAM, Dims, Scope, leaves, shape_of
from sharding_rules.primitives import ELEMENTWISE

VIEWS = frozenset(
    """broadcast_in_dim reshape transpose squeeze expand_dims slice split unstack rev dynamic_slice stop_gradient
    optimization_barrier copy copy_p iota full empty empty2 sharding_constraint reshard device_put pvary pcast
    mesh_cast random_wrap random_unwrap name axis_index create_token""".split()
)
"""Primitives that move nothing: their result is read from their operand, where it lies."""
LOOPS = frozenset({*ELEMENTWISE, "concatenate", "pad", "random_bits", "tile"}) - VIEWS
COLLECTIVES = frozenset(
    """psum psum_invariant pmax pmin ppermute all_gather all_gather_invariant all_to_all ragged_all_to_all
    psum_scatter reduce_scatter pbroadcast""".split()
)
INLINED = frozenset({"scan", "while", "cond", "shard_map"})
"""Calls whose bodies are run apart; all others are read as part of their caller."""

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
        self.units: list[Unit] = []
        self.nested: list[Unit] = []
        self.parents: list[int] = []
        self.roots: dict[Value, tuple[Value, ...]] = {}
        self.level: dict[Value, int] = {}
        self.producer: dict[Value, int] = {}
        self.readers: dict[Value, set[int]] = {}
        self.operands: dict[Value, Operand] = {}
        self.owner: dict[Value, int] = {}
        """Scores of fused attentions, by the product that the attention begins with."""

    def run(self, scope: Scope) -> list[Unit]:
        """The units of a whole body, joined."""
        self._walk(scope, self.where)
        for atom in scope.jaxpr.outvars:
            self._outside(scope, [atom])
        return self._joined() + self.nested

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
                self.nested += self._run_apart(scope, eqn, inner, here)
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
            self.operands[key] = _operand(scope, atom)
        return self.roots[key]

    def _level(self, scope: Scope, eqn: JaxprEqn) -> int:
        return max((self.level[root] for atom in eqn.invars for root in self._roots(scope, atom)), default=0)

    def _define(self, scope: Scope, eqn: JaxprEqn, level: int, unit: int | None = None) -> None:
        for var in eqn.outvars:
            (root,) = self._roots(scope, var)
            self.level[root] = level
            if unit is not None:
                self.producer[root] = unit

    def _outside(self, scope: Scope, atoms: Iterable[Any]) -> None:
        for atom in atoms:
            for root in self._roots(scope, atom):
                self.readers.setdefault(root, set()).add(-1)

    def _equation(self, scope: Scope, eqn: JaxprEqn, where: Where) -> None:
        name = eqn.primitive.name
        sources = [root for atom in eqn.invars for root in self._roots(scope, atom)]
        reduction = name.startswith(("reduce_", "arg")) and not name.startswith(("reduce_window", "reduce_precision"))
        kept = reduction and math.prod(shape_of(eqn.invars[0])) == math.prod(shape_of(eqn.outvars[0]))
        if name in VIEWS or kept or (name in LOOPS and not sources):
            for var in eqn.outvars:
                self.roots[(id(scope), var)] = tuple(dict.fromkeys(sources))
            return
        level = self._level(scope, eqn)
        index = self._new_unit(scope, eqn, "reduce" if reduction else _kind(name), where)
        unit = self.units[index]
        joins = name in LOOPS or reduction
        touched, written = _touched(eqn, unit.kind, fresh=not self._roots(scope, eqn.invars[0]) if eqn.invars else True)
        for position, atom in enumerate(eqn.invars):
            size = _bytes(atom) if isinstance(atom, Var) else 0
            for root in self._roots(scope, atom):
                behind = self.operands[root]
                # A view of one array that is smaller than it reads that much of it.
                read = dataclasses.replace(behind, bytes=touched.get(position, min(behind.bytes, size)))
                if root not in unit.reads or unit.reads[root].bytes < read.bytes:
                    unit.reads[root] = read
                self.readers.setdefault(root, set()).add(index)
                maker = self.producer.get(root) if joins and self.level[root] == level else None
                if maker is not None:
                    made_by = self.units[maker]
                    if made_by.kind == "elementwise" and made_by.phase == unit.phase:
                        self._union(maker, index)
        self._define(scope, eqn, level if name in LOOPS else level + 1, index)
        for var in eqn.outvars:
            root = (id(scope), var)
            size = self.operands[root].bytes if written is None else written
            unit.writes[root] = dataclasses.replace(self.operands[root], bytes=size)

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
        if found:
            lhs, rhs, out = (scope.dims.get(a, ()) if isinstance(a, Var) else () for a in _three(eqn))
            unit.space = (*lhs, *rhs, *out)
            unit.contracted = tuple(lhs[i] for i in contracted_dimensions(eqn) if lhs)
            unit.dtype = dtype_of(eqn.invars[0])
        self.units.append(unit)
        self.parents.append(len(self.parents))
        return len(self.units) - 1

    def _phase(self, scope: Scope, eqn: JaxprEqn, where: Where) -> Phase:
        if not where.backward:
            return "forward"
        if where.checkpoint and not self.step.flow.is_backward(scope, eqn):
            return "recompute"
        return "backward"

    # Joining.

    def _find(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def _union(self, a: int, b: int) -> None:
        a, b = sorted((self._find(a), self._find(b)))
        self.parents[b] = a

    def _joined(self) -> list[Unit]:
        if self.scores is not None:
            self._join_scores()
        groups: dict[int, list[int]] = {}
        for index in range(len(self.units)):
            groups.setdefault(self._find(index), []).append(index)
        return [self._join(root, members) for root, members in groups.items()]

    def _is_score(self, value: Value) -> bool:
        return self.scores is not None and axes_key(self.operands[value].dims) in self.scores

    def _join_scores(self) -> None:
        """Join each attention: the product that makes scores (or their gradient), and what they flow through.

        Where scores of two attentions meet (the gradient of a bias that layers share), they go to the later one. A
        product of scores kept from the forward pass (the gradient of the values) joins the one that reads the same
        gradient of the output, and statistics join the loops that hand them to each other.
        """
        beside: dict[tuple[Value, Phase], int] = {}
        waiting: list[int] = []
        for index, unit in enumerate(self.units):
            read = [self.owner[v] for v in unit.reads if v in self.owner]
            read = [seed for seed in read if self.units[seed].phase == unit.phase]
            made = [v for v in unit.writes if self._is_score(v)]
            if read:
                self._union(max(read), index)
            elif unit.product is not None and made:
                beside.update({(v, unit.phase): index for v in unit.reads})
            else:
                if unit.product is not None and any(self._is_score(v) for v in unit.reads):
                    waiting.append(index)
                continue
            self.owner.update(dict.fromkeys(made, max(read, default=index)))
        for index in waiting:
            unit = self.units[index]
            for seed in {beside[v, unit.phase] for v in unit.reads if (v, unit.phase) in beside}:
                self._union(seed, index)
        attention = {self._find(seed) for seed in self.owner.values()}
        for index, unit in enumerate(self.units):
            makers = {self.producer.get(v, -1) for v in unit.reads}
            if unit.product is None and makers and -1 not in makers:
                groups = {self._find(m) for m in makers}
                loops = all(self.units[m].product is None and self.units[m].phase == unit.phase for m in makers)
                if loops and len(groups) == 1 and groups <= attention:
                    self._union(min(makers), index)

    def _reads_memory(self, value: Value, phase: Phase, kind: str) -> bool:
        """Whether a unit reads a value from memory: not scores that a fused attention makes again."""
        if kind != "attention" or not self._is_score(value):
            return True
        seed = self.owner.get(value)
        # Not made by a product here: in the backward pass kept scores, elsewhere a bias.
        return phase != "backward" if seed is None else self.units[seed].phase == phase

    def _writes_memory(self, value: Value, root: int, phase: Phase) -> bool:
        """Whether something outside a unit reads a value; of a fused attention's scores, within the same phase."""
        outside = [r for r in self.readers.get(value, ()) if r < 0 or self._find(r) != root]
        if value in self.owner:
            return any(r >= 0 and self.units[r].phase == phase for r in outside)
        return bool(outside)

    def _join(self, root: int, members: list[int]) -> Unit:
        units = [self.units[i] for i in members]
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
                if value not in inside and self._reads_memory(value, main.phase, kind):
                    known = reads.get(value)
                    reads[value] = operand if known is None or known.bytes < operand.bytes else known
        writes = {
            value: operand
            for unit in units
            for value, operand in unit.writes.items()
            if not self._is_score(value) and any(r < 0 or self._find(r) != root for r in self.readers.get(value, ()))
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


def axes_key(dims: Dims) -> frozenset[Any]:
    """The axes of an array in any order, with how often each occurs."""
    count: dict[Any, int] = {}
    for dim in dims:
        for axis in leaves(dim):
            count[axis] = count.get(axis, 0) + 1
    return frozenset(count.items())


def score_keys(step: Step) -> frozenset[Any]:
    """Axes of attention's scores: products of two activations of which a maximum over one axis is taken (softmax)."""
    keys: set[Any] = set()
    _find_scores(step, step.table.scope, {}, keys)
    return frozenset(keys)


def _find_scores(step: Step, scope: Scope, made: dict[Var, frozenset[Any]], keys: set[Any]) -> None:
    for position in step.flow.live(scope):
        eqn = scope.jaxpr.eqns[position]
        name = eqn.primitive.name
        operands = [a for a in eqn.invars if isinstance(a, Var)]
        carried = frozenset().union(*(made.get(a, frozenset()) for a in operands))
        inner = calls(scope, position)
        for call in inner:
            bound = zip(call.scope.jaxpr.invars, call.operands, strict=True)
            _find_scores(step, call.scope, {v: made[a] for v, a in bound if isinstance(a, Var) and a in made}, keys)
        if name == "dot_general" and all(scope.origin[a] & BATCH for a in operands) and len(operands) == 2:
            carried = frozenset({axes_key(scope.dims[eqn.outvars[0]])})
        elif name == "reduce_max":
            key = axes_key(scope.dims[operands[0]]) if operands else None
            if key in carried:
                keys.add(key)
            carried = frozenset()
        elif inner or not (name in VIEWS or name in LOOPS):
            carried = frozenset()
        if carried:
            made.update(dict.fromkeys(eqn.outvars, carried))


def contracted_dimensions(eqn: JaxprEqn) -> tuple[int, ...]:
    """Dimensions of a product's first operand that are summed over; of a convolution, its channels."""
    match eqn.primitive.name:
        case "conv_general_dilated":
            return (eqn.params["dimension_numbers"].lhs_spec[1],) if eqn.params["feature_group_count"] == 1 else ()
        case "dot_general":
            return tuple(eqn.params["dimension_numbers"][0][0])
        case _:
            return tuple(eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0])


def _touched(eqn: JaxprEqn, kind: str, *, fresh: bool) -> tuple[dict[int, int], int | None]:
    """What indexing moves: bytes read of some operands, by position, and bytes written; else all of each.

    What is picked is read and written. What is put is read and written, and added to what was there; `fresh` where that
    is a constant, as in the gradient of a gather: then the whole result is written as well.
    """
    if kind == "gather":
        return {0: _bytes(eqn.outvars[0])}, None
    if kind == "scatter" and not eqn.primitive.name.startswith("select"):
        plain = eqn.primitive.name in ("scatter", "dynamic_update_slice")
        update = _bytes(eqn.invars[1 if eqn.primitive.name == "dynamic_update_slice" else 2])
        return {0: 0 if plain else update}, update + (_bytes(eqn.outvars[0]) if fresh else 0)
    return {}, None


def _kind(name: str) -> str:
    if name in LOOPS:
        return "elementwise"
    if name in COLLECTIVES:
        return "collective"
    if name == "gather":
        return "gather"
    if name.startswith("scatter") or name in {"dynamic_update_slice", "select_and_scatter_add", "select_and_scatter"}:
        return "scatter"
    if name in {"sort", "top_k", "approx_top_k"}:
        return "sort"
    if name.startswith(("reduce", "cum")):
        return "reduce"
    return "other"


def _three(eqn: JaxprEqn) -> tuple[Any, Any, Any]:
    return eqn.invars[0], eqn.invars[1], eqn.outvars[0]


def _bytes(atom: Any) -> int:
    dtype = dtype_of(atom)
    return math.prod(shape_of(atom)) * itemsize(dtype) if dtype is not None else 0


def _operand(scope: Scope, var: Var) -> Operand:
    return Operand(_bytes(var), scope.dims.get(var, ()), scope.origin.get(var) == PARAM)


def source(unit: Unit) -> str:
    """Where the model computes a unit."""
    return source_of(unit.source)
