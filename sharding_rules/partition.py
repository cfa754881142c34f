"""PartitionSpecs of parameters, optimizer state, batch, outputs and intermediates, from an assignment.

    shares = array_spec(assignment, dims)                 # any array whose axes are known
    specs = state_specs(abstract_opt_state, params, param_specs)

A dimension is a product of axes, major to minor, and a device's shard is contiguous: so the major axis can be split,
and the next only once the one before it is split down to single elements. A dimension whose split axis is not the
major one, or is repeated in the segments of a concatenation, is *misaligned*: a parameter is still split evenly at
rest, and the compiler moves its values when it is used; an intermediate is left to the compiler there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sharding_rules.assignment import Assignment, misfit
from sharding_rules.axes import Axis, Dim, leaves, size_of
from sharding_rules.errors import PlanError
from sharding_rules.mesh import AXES, BATCH_AXES, FSDP, MeshShape
from sharding_rules.trace import path_str, tree_paths

Entry = tuple[str, ...]
"""Mesh axes of one dimension, major first; empty if it is whole."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """How one array is split.

    Attributes:
        entries: mesh axes per dimension.
        misaligned: dimensions whose split cuts across their axes or segments.
        reasons: per dimension that could be split and is not, why.
    """

    entries: tuple[Entry, ...]
    misaligned: frozenset[int] = frozenset()
    reasons: tuple[str, ...] = ()

    @property
    def spec(self) -> PartitionSpec:
        return to_spec(self.entries)


def to_spec(entries: Sequence[Entry], *, unconstrained: frozenset[int] = frozenset()) -> PartitionSpec:
    """A PartitionSpec with trailing whole dimensions left out, so that equal layouts compare equal."""
    out: list[Any] = [None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries]
    for i in unconstrained:
        out[i] = PartitionSpec.UNCONSTRAINED
    while out and out[-1] is None:
        out.pop()
    return PartitionSpec(*out)


def array_spec(
    assignment: Assignment,
    dims: Sequence[Dim],
    *,
    spill: bool = False,
    at_rest: bool = False,
    keys: Collection[int] = (),
) -> Shares:
    """Split an array by its axes.

    Args:
        assignment: the table.
        dims: axes of each dimension.
        spill: also apply the assignment's `spill` (activations between blocks).
        at_rest: split misaligned dimensions too (parameters).
        keys: dimensions along the keys of attention, which give way to the queries' where both want a mesh axis.
    """
    wanted: list[tuple[int, int, Axis, str, Entry]] = []
    resolved = [leaves(dim) for dim in dims]
    order = {name: i for i, name in enumerate((*assignment.compute, *assignment.spill))}
    for i, dim in enumerate(resolved):
        for axis in dim:
            row = _row(assignment, axis)
            if row is None:
                continue
            target = assignment.compute.get(row) or (assignment.spill.get(row) if spill else None)
            target = tuple(name for name in target or () if assignment.mesh.sizes[name] > 1)
            if target:
                wanted.append((order[row], i, axis, row, target))
    entries: list[Entry] = [() for _ in dims]
    used: dict[str, tuple[int, str]] = {}
    misaligned: set[int] = set()
    reasons: list[str] = []
    for _, i, axis, row, target in sorted(wanted, key=lambda w: (w[1] in keys, w[0], w[1])):
        take: list[str] = []
        have = assignment.ways(entries[i])
        for name in target:
            if name in used:
                if used[name][0] != i:
                    reasons.append(
                        f"dimension {i} ({row}) stays whole: {name} already splits "
                        f"dimension {used[name][0]} ({used[name][1]})"
                    )
                continue
            names = (*take, name)
            if size_of(resolved[i]) % (have * assignment.ways(names)) == 0 and _fits(
                assignment, resolved[i], axis, names
            ):
                take.append(name)
            else:
                if assignment.beyond_keys(axis, assignment.ways(names)):
                    # Queries are split within the groups of a key: no mesh axis says so where the two are apart.
                    # Keys by themselves are whole on every device.
                    groups = _dimensions_of_role(assignment, resolved, "groups")
                    misaligned |= {i, *groups} if groups else set()
                reasons.append(
                    f"dimension {i} ({row}, {axis.size}) stays whole: "
                    f"{name}={assignment.mesh.sizes[name]} does not divide it"
                )
                break
        if not take:
            continue
        before = resolved[i][: resolved[i].index(axis)]
        # Examples that are put together (chosen and rejected ones) or taken apart are split as they lie: what moves are
        # the parts, once, where each product would be repeated on every device otherwise.
        cut = axis.segments is not None and assignment.rows[row].role != "batch"
        aligned = not cut and math.prod(a.size for a in before) == have
        if not aligned:
            if not at_rest or entries[i]:
                misaligned.add(i)
                continue
            misaligned.add(i)
        entries[i] = (*entries[i], *take)
        used |= {name: (i, row) for name in take}
    return Shares(tuple(entries), frozenset(misaligned), tuple(reasons))


def _row(assignment: Assignment, axis: Axis) -> str | None:
    """The row that decides an axis: its own, or for a concatenation the one that its segments agree on."""
    row = assignment.rows.of(axis)
    if axis.segments is None or (row is not None and row.name in assignment.compute):
        return row.name if row else None
    inner: set[str | None] = set()
    for segment in axis.segments:
        if size_of(segment) > 1:
            rows = (_row(assignment, a) for a in leaves(segment))
            inner.add(next((name for name in rows if name in assignment.compute), None))
    targets = {assignment.compute[name] if name else () for name in inner}
    return min(name for name in inner if name) if len(targets) == 1 and None not in inner and inner else None


def _fits(assignment: Assignment, dim: Dim, axis: Axis, names: Sequence[str]) -> bool:
    """Whether mesh axes divide an axis, each segment of a concatenation, or keys with the groups after them."""
    ways = assignment.ways(names)
    if axis.segments is not None:
        sizes = [size_of(segment) for segment in axis.segments]
        return axis.size % ways == 0 and all(size % ways == 0 for size in sizes if size > 1)
    after = dim[dim.index(axis) + 1 :]
    if assignment.beyond_keys(axis, ways) and after and assignment.role(after[0]) == "groups":
        return after[0].size % (ways // axis.size) == 0
    return axis.size % ways == 0


def _dimensions_of_role(assignment: Assignment, dims: Sequence[Dim], role: str) -> set[int]:
    return {i for i, dim in enumerate(dims) if any(assignment.role(axis) == role for axis in dim)}


def param_shares(assignment: Assignment, path: str, dims: Sequence[Dim]) -> tuple[Shares, Shares]:
    """How one parameter is split while computing, and at rest."""
    shape = tuple(size_of(dim) for dim in dims)
    if path in assignment.by_path:
        stated = assignment.by_path[path]
        compute = Shares(tuple(tuple(a for a in entry if a not in BATCH_AXES) for entry in stated))
        if any(a in BATCH_AXES for entry in stated for a in entry) or not assignment.storage:
            return compute, Shares(stated)
    else:
        compute = array_spec(assignment, dims, at_rest=True)
    return compute, _add_fsdp(assignment, dims, shape, compute)


def _add_fsdp(assignment: Assignment, dims: Sequence[Dim], shape: tuple[int, ...], compute: Shares) -> Shares:
    """At rest, also split over `fsdp`: a whole dimension if one divides, else one that is split already; the largest
    first.
    """
    ways = assignment.mesh.fsdp
    if not assignment.storage or ways == 1:
        return compute
    inner = [
        i
        for i, dim in enumerate(dims)
        if not any((row := assignment.rows.of(axis)) and row.role == "layers" for axis in leaves(dim))
    ]
    if sum(shape[i] > 1 for i in inner) < 2:
        return dataclasses.replace(
            compute, reasons=(*compute.reasons, "a vector: gathering it would cost more time than its bytes")
        )
    local = {i: shape[i] // assignment.ways(compute.entries[i]) for i in inner}
    choices = [i for i in inner if local[i] % ways == 0]
    if not choices:
        return dataclasses.replace(
            compute, reasons=(*compute.reasons, f"no dimension of {shape} divides by fsdp={ways}")
        )
    best = min(choices, key=lambda i: (bool(compute.entries[i]), -local[i], i))
    entries = list(compute.entries)
    entries[best] = (*entries[best], FSDP)
    return dataclasses.replace(compute, entries=tuple(entries))


def override(
    paths: Sequence[str], shapes: Sequence[tuple[int, ...]], rules: Sequence[tuple[str, Any]], mesh: MeshShape
) -> dict[str, tuple[Entry, ...]]:
    """Specs stated by the user, by regular expression over the whole path; a later rule wins.

    Raises:
        PlanError: a pattern that matches no parameter (the nearest path is named), too many dimensions, an unknown
            mesh axis, a mesh axis used twice, sizes that do not divide.
    """
    import difflib

    found: dict[str, tuple[Entry, ...]] = {}
    for pattern, spec in rules:
        hits = [k for k, path in enumerate(paths) if re.fullmatch(pattern, path)]
        if not hits:
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            raise PlanError(f"rule {pattern!r} matches no parameter; the nearest path is {near[0] if near else None!r}")
        for k in hits:
            path, shape = paths[k], shapes[k]
            entries = [_entry(pattern, e) for e in spec]
            if len(entries) > len(shape):
                raise PlanError(
                    f"rule {pattern!r} gives {len(entries)} dimensions, but parameter {path!r} has shape {shape}"
                )
            entries += [()] * (len(shape) - len(entries))
            seen: dict[str, int] = {}
            for i, entry in enumerate(entries):
                for axis in entry:
                    if axis not in AXES:
                        raise PlanError(f"rule {pattern!r}: {axis!r} is no mesh axis ({', '.join(AXES)})")
                    if axis in seen:
                        raise PlanError(
                            f"rule {pattern!r} splits parameter {path!r} twice over {axis!r}: "
                            f"dimensions {seen[axis]} and {i} of shape {shape}"
                        )
                    seen[axis] = i
            for i, entry in enumerate(entries):
                if shape[i] % math.prod(mesh.sizes[axis] for axis in entry):
                    raise PlanError(
                        f"rule {pattern!r}: parameter {path!r}, dimension {i} of shape {shape} has {shape[i]} "
                        f"elements, which {misfit(shape[i], entry, mesh)}"
                    )
            found[path] = tuple(tuple(a for a in entry if mesh.sizes[a] > 1) for entry in entries)
    return found


def _entry(pattern: str, entry: Any) -> Entry:
    """Mesh axes of one dimension of a rule's spec."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    if isinstance(entry, list | tuple) and all(isinstance(axis, str) for axis in entry):
        return tuple(entry)
    raise PlanError(f"rule {pattern!r} has {entry!r} for a dimension; write None, a mesh axis or a tuple of mesh axes")


def state_specs(abstract_state: Any, abstract_params: Any, param_specs: Any) -> tuple[Any, list[str]]:
    """PartitionSpecs of any optimizer state: a leaf whose path ends in a parameter's path is split like that parameter.

    A leaf of another shape (the row and column moments of Adafactor) keeps the split of the dimensions it still has,
    when that is unambiguous. Returns the tree of specs, and what was left whole.
    """
    shapes = dict(zip(tree_paths(abstract_params), [x.shape for x in jax.tree.leaves(abstract_params)], strict=True))
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    specs = dict(zip(shapes, jax.tree.leaves(param_specs, is_leaf=is_spec), strict=True))
    whole: list[str] = []

    def of(keypath: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        path = path_str(keypath)
        owner = _owner(path, shapes)
        if owner is None or math.prod(leaf.shape) <= 1:
            if math.prod(leaf.shape) > 1:
                whole.append(f"{path} {leaf.shape}: belongs to no parameter")
            return PartitionSpec()
        if leaf.shape == shapes[owner]:
            return specs[owner]
        entries = (*specs[owner], *((None,) * (len(shapes[owner]) - len(specs[owner]))))
        kept = {tuple(entries[i] for i in dims) for dims in _kept_dimensions(leaf.shape, shapes[owner])}
        if len(kept) != 1:
            whole.append(f"{path} {leaf.shape}: not the shape of its parameter {shapes[owner]}")
            return PartitionSpec()
        return PartitionSpec(*kept.pop())

    return jax.tree_util.tree_map_with_path(of, abstract_state), whole


def _owner(path: str, shapes: Mapping[str, Any]) -> str | None:
    parts = path.split("/")
    for start in range(len(parts)):
        candidate = "/".join(parts[start:])
        if candidate in shapes:
            return candidate
    return "" if "" in shapes else None


def _kept_dimensions(shape: tuple[int, ...], full: tuple[int, ...]) -> list[list[int]]:
    """Which dimensions of `full` are left in `shape` if one was summed: every way to say so."""
    return [[j for j in range(len(full)) if j != i] for i in range(len(full)) if full[:i] + full[i + 1 :] == shape]


def bytes_per_device(leaf: Any, entries: Sequence[Entry], mesh: MeshShape) -> int:
    """Bytes of one device's shard of an array."""
    ways = math.prod(mesh.sizes[axis] for entry in entries for axis in entry)
    return math.prod(leaf.shape) // ways * leaf.dtype.itemsize


def tree_bytes(tree: Any, specs: Any, mesh: MeshShape) -> int:
    """Bytes on one device of a tree of arrays split by a tree of PartitionSpecs."""
    flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    total = 0
    for leaf, spec in zip(jax.tree.leaves(tree), flat, strict=True):
        entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
        total += bytes_per_device(leaf, entries, mesh)
    return total
