"""Which dimensions of scores belong to the keys: those that a softmax, or the product with the values, sums away.

    keys = key_dimensions(table.scope)       # {variable: (3,)} for scores of shape (B, N, L, M)

In self-attention both lengths of the scores are one axis, so its identity does not say which of the two is the
queries'. What is computed next does: the queries' length is that of the result, the keys' is summed away. A mesh axis
that splits the length must split the queries' here: each device then has whole rows of the softmax, and keys and values
are gathered. Split the other way, the statistics of every softmax and the partial results would be summed.
"""

from __future__ import annotations

import math

from jax.extend.core import JaxprEqn, Literal, Var

from sharding_rules.axes import BATCH, PARAM, Scope, shape_of

Positions = dict[int, int]
"""Dimension of a variable -> the dimension of the scores that it is."""


def key_dimensions(scope: Scope) -> dict[Var, tuple[int, ...]]:
    """Find the keys' dimensions of every product of two activations, and of what is made of it until they are summed.

    Every product of activations is looked at: one that is no attention has its summed dimension too, and nothing else
    is read off it.
    """
    found: dict[Var, tuple[int, ...]] = {}
    for inner in scope.walk():
        for position, eqn in enumerate(inner.jaxpr.eqns):
            if eqn.primitive.name == "dot_general":
                origins = [0 if isinstance(atom, Literal) else inner.origin[atom] for atom in eqn.invars]
                if all(origin & (PARAM | BATCH) == PARAM | BATCH for origin in origins):
                    found |= _follow(inner, position)
    return found


def _follow(scope: Scope, start: int) -> dict[Var, tuple[int, ...]]:
    """Follow the free dimensions of one product until some of them, but not all, are summed."""
    eqns = scope.jaxpr.eqns
    scores = eqns[start]
    (lhs, _), (batch, _) = scores.params["dimension_numbers"]
    first = len(batch)
    middle = first + len(shape_of(scores.invars[0])) - len(batch) - len(lhs)
    rank = len(shape_of(scores.outvars[0]))
    if first == middle or middle == rank:
        return {}
    tracked: dict[Var, Positions] = {scores.outvars[0]: {i: i for i in range(first, rank)}}
    for eqn in eqns[start + 1 :]:
        for k, atom in enumerate(eqn.invars):
            if isinstance(atom, Literal) or atom not in tracked:
                continue
            moved, gone = moved_dimensions(eqn, k)
            places = tracked[atom]
            summed = {label for i, label in places.items() if i in gone}
            if summed and len(summed) < len(places):
                return {
                    var: tuple(i for i, label in p.items() if label in summed)
                    for var, p in tracked.items()
                    if any(label in summed for label in p.values())
                }
            if not summed:
                kept = {moved[i]: label for i, label in places.items() if i in moved}
                tracked |= dict.fromkeys(eqn.outvars, kept)
    return {}


def moved_dimensions(eqn: JaxprEqn, operand: int) -> tuple[dict[int, int], frozenset[int]]:
    """Of an operand's dimensions: which one of the results each becomes, and which are summed; the rest is unknown."""
    name, p = eqn.primitive.name, eqn.params
    shape, out = shape_of(eqn.invars[operand]), shape_of(eqn.outvars[0])
    moved: dict[int, int] = {}
    gone: frozenset[int] = frozenset()
    if name == "transpose":
        moved = {i: j for j, i in enumerate(p["permutation"])}
    elif name == "broadcast_in_dim" and operand == 0:
        moved = dict(enumerate(p["broadcast_dimensions"]))
    elif name == "reshape":  # what has the same size after as many elements
        at = {(math.prod(out[:j]), size): j for j, size in enumerate(out) if size > 1}
        moved = {i: at[key] for i, size in enumerate(shape) if (key := (math.prod(shape[:i]), size)) in at}
    elif name == "dot_general":
        contracted, batch = (side[operand] for side in p["dimension_numbers"])
        free = [i for i in range(len(shape)) if i not in (*contracted, *batch)]
        start = len(out) - len(free) if operand else len(batch)
        moved = {i: j for j, i in enumerate(batch)} | {i: start + j for j, i in enumerate(free)}
        gone = frozenset(contracted)
    elif name.startswith(("reduce_", "arg")) and "axes" in p:
        gone = frozenset(p["axes"])
        moved = {i: j for j, i in enumerate(i for i in range(len(shape)) if i not in gone)}
    elif all(shape_of(var) == shape for var in eqn.outvars):
        moved = {i: i for i in range(len(shape))}
    return moved, gone
