"""Attention as one operation: the scores, their mask, the softmax and the product with the values.

Scores are known by their axes, which the backward pass shares: a product of two activations of which a maximum over one
axis is taken. In a fused attention they stay on the chip, forward and backward.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import Var

from search.kinds import LOOPS, VIEWS
from search.liveness import Phase, Step, analyse_step, calls
from search.units import Units, Value
from sharding_rules import CONTEXT, AttentionCall, TracedFunction
from sharding_rules.axes import BATCH, Dims, Scope, leaves


def axes_without_kernel(kind: str, attention: str) -> tuple[str, ...]:
    """Mesh axes that the platform's attention kernels cannot split over, so that a plan with them would run plainly.

    Those of GPUs take whole sequences (`pipelines.attention`); splash attention on TPUs splits its queries.

    >>> axes_without_kernel("gpu", "fused"), axes_without_kernel("tpu", "fused"), axes_without_kernel("gpu", "plain")
    (('context',), (), ())
    """
    return (CONTEXT,) if kind == "gpu" and attention == "fused" else ()


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


def runs_as_kernel(traced: TracedFunction) -> bool:
    """Whether all attention of a function is calls of `sharding_rules.attention`, which the platform's kernel may run.

    Attention that is written out otherwise keeps its scores in memory.
    """
    step = analyse_step(traced, remat="none", grad=False)
    called: set[Any] = set()
    for scope in step.table.scope.walk():
        eqns = scope.jaxpr.eqns
        for position, eqn in enumerate(eqns):
            found = step.table.calls.get(eqn.outvars[0]) if eqn.outvars else None
            if found is not None and isinstance(found.call, AttentionCall):
                inside = [e for e in eqns[position : found.stop] if e.primitive.name == "dot_general"]
                called |= {axes_key(scope.dims[e.outvars[0]]) for e in inside}
    return bool(called) and score_keys(step) <= called


def all_causal(step: Step) -> bool:
    """Whether a function calls `sharding_rules.attention`, and every call is causal."""
    # Of the loss: in the step the calls are written out.
    found = [call.call for call in step.layout.table.calls.values() if isinstance(call.call, AttentionCall)]
    return bool(found) and all(call.causal for call in found)


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


class Attention:
    """Joins the units of every attention of a body.

    Attributes:
        keys: axes of scores, from `score_keys`.
        owner: the scores of the body, by the product that their attention begins with.
    """

    def __init__(self, keys: frozenset[Any]):
        self.keys = keys
        self.owner: dict[Value, int] = {}

    def _is_score(self, units: Units, value: Value) -> bool:
        return axes_key(units.operands[value].dims) in self.keys

    def join(self, units: Units) -> None:
        """Join each attention: the product that makes scores (or their gradient), and what they flow through.

        Where scores of two attentions meet (the gradient of a bias that layers share), they go to the later one. A
        product of scores kept from the forward pass (the gradient of the values) joins the one that reads the same
        gradient of the output, and statistics join the loops that hand them to each other.
        """
        beside: dict[tuple[Value, Phase], int] = {}
        waiting: list[int] = []
        for index, unit in enumerate(units.units):
            read = [self.owner[v] for v in unit.reads if v in self.owner]
            read = [seed for seed in read if units.units[seed].phase == unit.phase]
            made = [v for v in unit.writes if self._is_score(units, v)]
            if read:
                units.union(max(read), index)
            elif unit.product is not None and made:
                beside.update({(v, unit.phase): index for v in unit.reads})
            else:
                if unit.product is not None and any(self._is_score(units, v) for v in unit.reads):
                    waiting.append(index)
                continue
            self.owner.update(dict.fromkeys(made, max(read, default=index)))
        for index in waiting:
            unit = units.units[index]
            for seed in {beside[v, unit.phase] for v in unit.reads if (v, unit.phase) in beside}:
                units.union(seed, index)
        attention = {units.find(seed) for seed in self.owner.values()}
        for index, unit in enumerate(units.units):
            makers = {units.producer.get(v, -1) for v in unit.reads}
            if unit.product is None and makers and -1 not in makers:
                groups = {units.find(m) for m in makers}
                loops = all(units.units[m].product is None and units.units[m].phase == unit.phase for m in makers)
                if loops and len(groups) == 1 and groups <= attention:
                    units.union(min(makers), index)

    def reads_memory(self, units: Units, value: Value, phase: Phase) -> bool:
        """Whether a fused attention reads a value from memory: not scores that it makes itself, or makes again."""
        if not self._is_score(units, value):
            return True
        seed = self.owner.get(value)
        # Not made by a product here: in the backward pass kept scores, elsewhere a bias.
        return phase != "backward" if seed is None else units.units[seed].phase == phase

    def writes_memory(self, units: Units, value: Value, root: int, phase: Phase) -> bool:
        """Whether something outside a unit reads a value; of a fused attention's scores, within the same phase."""
        outside = units.read_outside(value, root)
        if value in self.owner:
            return any(r >= 0 and units.units[r].phase == phase for r in outside)
        return bool(outside)
