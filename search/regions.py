"""The parts of a model that a pipeline tells apart: repeated layers, what comes before them, and what comes after.

    layers = count_layers(layout)                    # 80; 1 where nothing repeats
    param_regions(layout, layers)                    # per parameter: "layers", "first", "last" or "both" (tied)
    op_regions(work, layers)                         # per operation: "layers", "first" or "last"

Layers are found by repetition, in a loop or written out: parameters with the same axes, and operations that are alike,
occur a multiple of the number of layers times.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Literal

import jax
import numpy as np

from search.workload import Op, Workload
from sharding_rules import Layout
from sharding_rules.axes import leaves

Region = Literal["layers", "first", "last"]
ParamRegion = Literal["layers", "first", "last", "both"]


def count_layers(layout: Layout) -> int:
    """Number of repeated layers: what divides the number of occurrences of most parameters; 1 without repetition."""
    size: collections.Counter[int] = collections.Counter()
    occurrences, elements = _occurrences(layout)
    for key, count in occurrences.items():
        size[count] += elements[key]
    best = max(size, key=lambda n: (n > 1, sum(e for m, e in size.items() if m % n == 0), n), default=1)
    return best


def stacks(layout: Layout) -> int:
    """Number of loops over layers: an encoder and a decoder are two."""
    return max(1, sum(row.role == "layers" for row in layout.rows.rows))


def param_regions(layout: Layout, layers: int) -> list[ParamRegion]:
    """The region of every parameter, in leaf order; "both" for one that is used before and after the layers."""
    if layers == 1:
        return ["first"] * len(jax.tree.leaves(layout.traced.arg(layout.params)))
    occurrences, _ = _occurrences(layout)
    keys = _keys(layout)
    jaxpr = layout.table.scope.jaxpr
    variables = jaxpr.invars[layout.traced.arg_slice(layout.params)]
    wanted = set(variables)
    uses: dict[object, list[int]] = collections.defaultdict(list)
    # A weight is often cast or turned before its use: those results stand for it.
    stands_for: dict[object, object] = {v: v for v in variables}
    for position, eqn in enumerate(jaxpr.eqns):
        inputs = {stands_for[v] for v in eqn.invars if isinstance(v, Hashable) and v in stands_for}
        if len(inputs) == 1 and len(eqn.outvars) == 1 and eqn.primitive.name in PASSED_ON:
            stands_for[eqn.outvars[0]] = next(iter(inputs))
            continue
        for variable in inputs & wanted:
            uses[variable].append(position)
    inside = [p for v, key in zip(variables, keys, strict=True) if occurrences[key] % layers == 0 for p in uses[v]]
    begin, end = min(inside, default=0), max(inside, default=0)
    out: list[ParamRegion] = []
    for variable, key in zip(variables, keys, strict=True):
        before, after = (any(p < begin for p in uses[variable]), any(p > end for p in uses[variable]))
        if occurrences[key] % layers == 0:
            out.append("layers")
        elif before and after:
            out.append("both")
        else:
            out.append("last" if after else "first" if before else "layers")
    return out


PASSED_ON = frozenset(("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "slice"))


def sequence_regions(inside: Sequence[bool]) -> list[Region]:
    """Regions of items in program order, of which those of layers are known; what lies between them is theirs.

    >>> sequence_regions([False, True, False, True, False])
    ['first', 'layers', 'layers', 'layers', 'last']
    """
    found = np.flatnonzero(inside)
    if not len(found):
        return ["first"] * len(inside)
    begin, end = int(found[0]), int(found[-1])
    return ["first" if i < begin else "last" if i > end else "layers" for i in range(len(inside))]


def op_regions(work: Workload, layers: int) -> list[Region]:
    """The region of every operation of a merged workload: its backward pass runs through the regions the other way.

    Operations of layers are alike, so that a merged one is executed a multiple of the number of layers times.
    """
    inside = [layers > 1 and op.trips % layers == 0 for op in work.ops]
    forward = [i for i, op in enumerate(work.ops) if op.phase == "forward"]
    backward = [i for i, op in enumerate(work.ops) if op.phase != "forward"]
    out: list[Region] = ["first"] * len(work.ops)
    turned: dict[Region, Region] = {"first": "last", "last": "first", "layers": "layers"}
    for indices, back in ((forward, False), (backward, True)):
        for i, region in zip(indices, sequence_regions([inside[i] for i in indices]), strict=True):
            out[i] = turned[region] if back and any(inside) else region
    return out


def split_ends(work: Workload, layers: int) -> Workload:
    """Split what layers and one of the ends have alike: executed a multiple of the number of layers times, and some.

    The rest, such as the norm after the last layer, comes after the layers' (before them in the backward pass).
    """
    if layers == 1:
        return work
    ends: dict[bool, list[Op]] = {False: [], True: []}
    inside: list[Op] = []
    for op in work.ops:
        rest = op.trips % layers
        if op.trips < layers or not rest:
            inside.append(op)
            continue
        inside.append(dataclasses.replace(op, trips=op.trips - rest))
        ends[op.phase != "forward"].append(dataclasses.replace(op, trips=rest))
    return Workload((*ends[True], *inside, *ends[False]), work.rows)


def _keys(layout: Layout) -> list[Hashable]:
    """What makes parameters alike: the names and sizes of their axes, layers left out, and their dtype."""
    out: list[Hashable] = []
    params = jax.tree.leaves(layout.traced.arg(layout.params))
    for dims, leaf in zip(layout.table.inputs(layout.params), params, strict=True):
        axes = []
        for dim in dims:
            rows = [(layout.rows.of(axis), axis.size) for axis in leaves(dim)]
            axes.append(tuple((r.name if r else "", size) for r, size in rows if r is None or r.role != "layers"))
        out.append((tuple(axes), str(leaf.dtype)))
    return out


def _occurrences(layout: Layout) -> tuple[collections.Counter, collections.Counter]:
    """How often parameters of each kind occur, in loops and out, and their elements in total."""
    count: collections.Counter = collections.Counter()
    elements: collections.Counter = collections.Counter()
    params = jax.tree.leaves(layout.traced.arg(layout.params))
    for key, dims, leaf in zip(_keys(layout), layout.table.inputs(layout.params), params, strict=True):
        rows = [layout.rows.of(axis) for dim in dims for axis in leaves(dim)]
        count[key] += math.prod(row.size for row in rows if row is not None and row.role == "layers")
        elements[key] += math.prod(leaf.shape)
    return count, elements
