"""What an axis is, from structure alone: batch, length, vocab, embed, heads, kv_heads, head_dim, mlp, expert, layers,
...

    rows = find_rows(table)
    rows.of(axis).name          # "mlp"

No name of a parameter is read. An axis of experts is one that a weight keeps as a batch dimension of a product; heads
are the axes of weights over which a product of two activations is batched; the vocabulary is what token ids index.

Axes with the same role and the same neighbours (through the parameters that contain them) form one *row*: the 80
`mlp` axes of 80 unrolled layers are one decision. Neighbours are compared by colour refinement (Weisfeiler and Leman
1968).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from sharding_rules.axes import BATCH, PARAM, Axis, AxisTable, Dim, leaves

NEVER_SPLIT = frozenset({"layers", "head_dim", "position", "window", "segments", "time"})
"""Roles that no preset shards: cutting them moves data in every operation."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One decision: axes that are sharded alike.

    Attributes:
        name: the role, numbered where several rows share it (`mlp`, `mlp_2`).
        role: the role.
        size: number of elements of each axis.
        axes: its axes.
    """

    name: str
    role: str
    size: int
    axes: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """All rows of a model; `of` finds the row of an axis."""

    rows: tuple[Row, ...]
    by_axis: dict[Axis, Row]

    def of(self, axis: Axis) -> Row | None:
        return self.by_axis.get(axis)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


def find_rows(table: AxisTable, *, params: str = "params", batch: str = "batch") -> Rows:
    """Name every axis of parameters, batch and activations, and group those that are decided together."""
    roles = find_roles(table, params=params, batch=batch)
    colours = _refine(table, roles, params)
    groups: dict[tuple, list[Axis]] = defaultdict(list)
    for axis, role in roles.items():
        groups[(role, axis.size, colours[axis])].append(axis)
    counts: Counter[str] = Counter()
    rows = []
    for (role, size, _), axes in groups.items():
        counts[role] += 1
        name = role if counts[role] == 1 else f"{role}_{counts[role]}"
        rows.append(Row(name, role, size, tuple(axes)))
    return Rows(tuple(rows), {axis: row for row in rows for axis in row.axes})


def find_roles(table: AxisTable, *, params: str = "params", batch: str = "batch") -> dict[Axis, str]:
    """The role of every axis, in a stable order: axes of parameters, then of the batch, then of activations."""
    names = table.traced.names
    param_dims = table.inputs(params) if params in names else []
    batch_dims = table.inputs(batch) if batch in names else []
    in_params = _axes(param_dims)
    in_batch = _axes(batch_dims)
    marks: dict[str, dict[Axis, None]] = defaultdict(dict)
    for mark in table.marks:
        for axis in spread(mark.dim):
            marks[mark.kind][axis] = None
    roles: dict[Axis, str] = {}

    def name(axes: Iterable[Axis], role: str) -> None:
        for axis in axes:
            roles.setdefault(axis, role)

    for dims in batch_dims:
        if dims and dims[0]:
            name(dims[0][:1], "batch")
    name((a for a in marks["layers"] if a in in_params), "layers")
    weighty = weight_axes(table)
    _name_attention(table, weighty, name, roles)
    name((a for a in marks["group"] if a in in_params), "expert")
    # What token ids index; what labels index in the model's output is the same thing where there are tokens.
    tables = [a for a in marks["table"] if a in in_params and _is_table(a, param_dims)]
    name(tables, "vocab")
    name((a for a in marks["label"] if a in in_params), "vocab" if tables else "classes")
    name((a for a in marks["position"] if a in in_params), "position")
    name((a for a in marks["spatial"] if a not in in_params), "spatial")
    contracted = _contracted(table)
    name((a for a in marks["window"] if a in in_params and a not in contracted), "window")
    name((a for a in marks["indexed"] if a in in_params and a not in contracted), "segments")
    name((a for a in in_batch if a in in_params and a in weighty), "feature")
    name((a for a in in_batch if a in in_params), "length")
    _name_hidden(table, param_dims, in_params, marks["channel"], name, roles)
    name((a for a in marks["layers"]), "layers")
    name((a for a in in_batch if a in marks["time"]), "length")
    name(in_batch, "length")
    name((a for a in _activation_axes(table) if a not in in_params), "length")
    name((a for axis in list(roles) for a in spread((axis,))), "segment")
    return roles


def weight_axes(table: AxisTable) -> Counter[Axis]:
    """Axes of weights in products with activations, and in how many products."""
    count: Counter[Axis] = Counter()
    for c in table.contractions:
        if c.weight is not None:
            count.update({a for dim in c.weight for a in spread(dim)})
    return count


def _name_attention(
    table: AxisTable, weighty: Counter[Axis], name: Callable[..., None], roles: dict[Axis, str]
) -> None:
    """Products of two activations batched over an axis of the weights: heads; what they contract: head_dim."""
    for c in table.contractions:
        if c.kind == "dot" and c.weight is not None:
            weight = {a for dim in c.weight for a in leaves(dim)}
            name((a for dim in c.batch for a in leaves(dim) if a in weight and a not in roles), "expert")
    scores, values = [], []
    for c in table.contractions:
        origin = c.lhs_origin | c.rhs_origin
        # Of two activations; one of them may be what a cache holds, which comes from neither weights nor batch.
        kept = c.weight is None and 0 in (c.lhs_origin, c.rhs_origin) and origin & PARAM
        if c.kind == "dot" and (c.lhs_origin & c.rhs_origin & PARAM or kept) and origin & BATCH:
            shared = (a for dim in c.contracted for a in leaves(dim))
            inner = any(a in weighty and roles.get(a) not in {"batch", "expert"} for a in shared)
            (scores if inner else values).append(c)
    keys: dict[Axis, None] = {}
    groups: dict[Axis, None] = {}
    for c in scores:
        shared = {a: None for dim in c.batch for a in leaves(dim) if a in weighty and a not in roles}
        if not shared and not any(roles.get(a) == "batch" for dim in c.batch for a in leaves(dim)):
            continue
        # Keys repeated for their groups: both axes are batched over, but the keys' own weights have only one of them.
        most = max((weighty[a] for a in shared), default=0)
        keys |= {a: None for a in shared if weighty[a] == most}
        groups |= {a: None for a in shared if weighty[a] < most}
        free = {a: None for dim in c.out[len(c.batch) :] for a in leaves(dim) if a in weighty and a not in roles}
        groups |= free
        name((a for dim in c.contracted for a in spread(dim) if a in weighty), "head_dim")
    groups = {a: None for a in groups if a not in keys and a not in roles}
    if not keys and not groups:
        return
    name(keys, "kv_heads" if groups else "heads")
    name(groups, "groups" if keys else "heads")
    for c in values:
        if any(a in keys or a in groups for dim in (*c.batch, *c.out) for a in leaves(dim)):
            name((a for dim in c.out for a in spread(dim) if a in weighty and a not in roles), "head_dim")


def _name_hidden(
    table: AxisTable,
    param_dims: list[tuple[Dim, ...]],
    in_params: dict[Axis, None],
    channels: Iterable[Axis],
    name: Callable[..., None],
    roles: dict[Axis, str],
) -> None:
    """The rest of the weights' axes: `embed` runs between blocks, `mlp` is made and consumed inside one."""
    made, used = {}, {}
    pairs: set[tuple[Axis, Axis]] = set()
    for c in table.contractions:
        if c.weight is None:
            continue
        ins = {a for dim in c.contracted for a in spread(dim)}
        outs = {a for dim in c.weight for a in spread(dim)} - ins - {a for dim in c.batch for a in spread(dim)}
        used |= dict.fromkeys(ins)
        made |= dict.fromkeys(outs)
        pairs |= {(a, b) for a in ins for b in outs}
    # An axis that no product with a weight has: positions that are added to every example.
    name((a for a in in_params if a not in made and a not in used and a in _in_activations(table)), "length")
    anchors = {a for a, role in roles.items() if role in {"vocab", "heads", "kv_heads", "groups"}}
    count: Counter[Axis] = Counter()
    touching: set[Axis] = set()
    for dims in param_dims:
        axes = {a for dim in dims for a in spread(dim)}
        count.update(axes)
        if axes & anchors:
            touching |= {a for a in axes if roles.get(a) is None}
    hidden = [a for a in in_params if a not in roles]
    embed = [a for a in hidden if a in touching and a.segments is None]
    name(embed, "embed")
    name((a for a in channels if a in in_params), "channel")
    hidden = [a for a in hidden if a not in roles]
    if not embed:
        # No attention and no vocabulary: of two axes that feed each other, the one in more parameters runs between
        # blocks.
        embed = [
            a
            for a in hidden
            if any((a, b) in pairs and (b, a) in pairs and a is not b and count[a] > count[b] for b in hidden)
        ]
    name(embed, "embed")
    name((a for a in hidden if a.segments is None and any((a, b) in pairs and (b, a) in pairs for b in embed)), "mlp")
    name((a for a in hidden if (a, a) in pairs), "hidden")
    name((a for a in hidden if a.segments is not None), "fused")
    name((a for a in hidden if a in made and a in used), "mlp")
    name((a for a in hidden if a in made), "output")
    name((a for a in hidden if a in used), "feature")
    name(hidden, "other")


def _refine(table: AxisTable, roles: dict[Axis, str], params: str) -> dict[Axis, int]:
    """Colour refinement over the parameters: equal colours mean the same role, size and neighbourhood."""
    arrays = table.inputs(params) if params in table.traced.names else []
    colours: dict[Axis, int] = _number({axis: (role, axis.size) for axis, role in roles.items()})
    members: dict[Axis, list[tuple[int, int]]] = defaultdict(list)
    for k, dims in enumerate(arrays):
        for i, dim in enumerate(dims):
            for axis in dim:
                members[axis].append((k, i))
    while True:
        shapes = [tuple(tuple(colours.get(a, -1) for a in dim) for dim in dims) for dims in arrays]
        keyed = {
            axis: (colour, frozenset((shapes[k], i) for k, i in members[axis])) for axis, colour in colours.items()
        }
        refined = _number(keyed)
        if len(set(refined.values())) == len(set(colours.values())):
            return refined
        colours = refined


def _number(keys: Mapping[Axis, Hashable]) -> dict[Axis, int]:
    numbers: dict[Hashable, int] = {}
    return {axis: numbers.setdefault(key, len(numbers)) for axis, key in keys.items()}


def _axes(arrays: Iterable[Sequence[Dim]]) -> dict[Axis, None]:
    """Axes of arrays, segments of concatenations included, in order."""
    return {axis: None for dims in arrays for dim in dims for axis in spread(dim)}


def spread(dim: Sequence[Axis]) -> Iterable[Axis]:
    """The axes of a dimension, and those of the segments of its concatenations."""
    for axis in leaves(dim):
        if axis.size > 1:
            yield axis
        for segment in axis.segments or ():
            yield from spread(segment)


def _contracted(table: AxisTable) -> set[Axis]:
    return {a for c in table.contractions for dim in c.contracted for a in spread(dim)}


def _is_table(axis: Axis, param_dims: list[tuple[Dim, ...]]) -> bool:
    """Whether some matrix of two plain dimensions is indexed by this axis."""
    return any(len(dims) == 2 and (axis,) in dims for dims in param_dims)


def _activation_axes(table: AxisTable) -> Iterable[Axis]:
    """Axes of values computed from the batch, in the order of the program."""
    for scope in table.scope.walk():
        for var, dims in scope.dims.items():
            if scope.origin.get(var, 0) & BATCH:
                for dim in dims:
                    yield from leaves(dim)


def _in_activations(table: AxisTable) -> set[Axis]:
    """Axes of operands and results of products of two activations."""
    return {
        a
        for c in table.contractions
        if c.weight is None
        for dims in (c.lhs, c.rhs)
        for dim in dims
        for a in leaves(dim)
    }
