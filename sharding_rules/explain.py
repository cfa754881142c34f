"""Why each array is split as it is: the table of axes, the parameters, and everything that stays whole, with its bytes.

print(layout.explain())
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import jax

from sharding_rules.axes import leaves, size_of
from sharding_rules.partition import bytes_per_device, state_specs, tree_bytes
from sharding_rules.roles import NEVER_SPLIT, Row, spread

if TYPE_CHECKING:
    from sharding_rules.layout import Layout


def explain(layout: Layout, abstract_opt_state: Any = None) -> str:
    """Write a layout as text. Repeated layers are one line, with their number."""
    mesh, assignment = layout.mesh_shape, layout.assignment
    text = [f"mesh {mesh} ({mesh.size} device{'s' if mesh.size > 1 else ''})", ""]

    rows = [("axis", "size", "count", "split over", "found in")]
    rows += [(a.name, str(a.size), str(a.count), a.split or "-", a.found) for a in axis_lines(layout)]
    text += [*_columns(rows), ""]

    whole: dict[tuple[str, str], list[int]] = {}
    moved: dict[str, int] = {}
    abstract = jax.tree.leaves(layout.traced.arg(layout.params))
    dims_of = layout.table.inputs(layout.params)
    for (path, (compute, rest)), leaf, dims in zip(layout.param_shares.items(), abstract, dims_of, strict=True):
        size = bytes_per_device(leaf, rest.entries, mesh)
        generic = _generic(path)
        if mesh.size > 1 and not any(rest.entries):
            reason = rest.reasons[-1] if rest.reasons else _why_whole(layout, dims)
            entry = whole.setdefault((generic, reason), [0, 0])
            entry[0] += 1
            entry[1] += size
        if rest.misaligned and any(rest.entries[i] for i in rest.misaligned):
            moved[generic] = moved.get(generic, 0) + bytes_per_device(leaf, compute.entries, mesh)
    table = [("parameter", "shape", "axes", "at rest", "in use", "bytes/device")]
    params = param_lines(layout)
    for line in params:
        number = f" ({line.count})" if line.count > 1 else ""
        in_use = "same" if line.at_rest == line.in_use else line.in_use
        table.append(
            (line.path + number, str(line.shape), line.axes, line.at_rest, in_use, format_bytes(line.bytes_per_device))
        )
    total = sum(line.bytes_per_device for line in params)
    text += [*_columns(table), f"parameters: {format_bytes(total)} per device"]
    left: list[str] = []
    if abstract_opt_state is not None:
        specs, left = state_specs(abstract_opt_state, layout.traced.arg(layout.params), layout.specs(layout.params))
        text.append(f"optimizer state: {format_bytes(tree_bytes(abstract_opt_state, specs, mesh))} per device")
    text.append("")
    if left:
        text += ["whole in the optimizer's state:", *(f"  {item}" for item in left), ""]

    if whole:
        text.append(f"whole on every device: {format_bytes(sum(size for _, size in whole.values()))}")
        by_reason: dict[str, list[str]] = {}
        for (generic, reason), (count, size) in whole.items():
            number = f" ({count})" if count > 1 else ""
            by_reason.setdefault(reason, []).append(f"{generic}{number} {format_bytes(size)}")
        for reason, items in by_reason.items():
            more = [f"{len(items) - 4} more"] if len(items) > 5 else []
            text.append(f"  {', '.join([*(items[:4] if more else items), *more])}: {reason}")
        text.append("")
    if moved:
        text.append("split across a concatenation (each use moves up to these bytes per device):")
        text += [f"  {path}: {format_bytes(size)}" for path, size in moved.items()] + [""]
    if assignment.notes:
        text += ["left whole by the preset:", *(f"  {note}" for note in assignment.notes), ""]
    if layout.table.unknown:
        listed = ", ".join(f"{name} x{count}" for name, count in layout.table.unknown.items())
        text += [
            f"primitives without a rule for how they are used; their results got axes of their own: {listed}",
            "",
        ]
    if layout.table.notes:
        text += ["not aligned:", *(f"  {note}" for note in dict.fromkeys(layout.table.notes)), ""]
    return "\n".join(text).rstrip()


@dataclasses.dataclass(frozen=True)
class AxisLine:
    """A line of the table of axes: rows that are named, sized, split and found alike.

    Attributes:
        name, size: of the rows; each axis has `size` elements.
        count: axes of these rows.
        split: mesh axes in words; empty where it is whole.
        found: arguments that have it, or "activations".
    """

    name: str
    size: int
    count: int
    split: str
    found: str


@dataclasses.dataclass(frozen=True)
class ParamLine:
    """A line of the table of parameters: those of repeated layers together.

    Attributes:
        path: with `*` for numbers.
        count: parameters.
        shape, dtype, axes: of one, as it was traced; its logical axes in words.
        at_rest, in_use: its spec in words, "whole" where no mesh axis splits it.
        bytes_per_device: of all of them, at rest.
    """

    path: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    axes: str
    at_rest: str
    in_use: str
    bytes_per_device: int


def axis_lines(layout: Layout) -> list[AxisLine]:
    """List the logical axes and the mesh axes that split them."""
    mesh, assignment = layout.mesh_shape, layout.assignment
    where = _where(layout)
    counts: dict[tuple[str, int, str, str], int] = {}
    for row in layout.rows.rows:
        axes = [a for a in assignment.compute.get(row.name, ()) if mesh.sizes[a] > 1]
        axes += [f"{a} between blocks" for a in assignment.spill.get(row.name, ()) if mesh.sizes[a] > 1]
        # What only intermediate results have matters where it is split.
        if row.role in {"segment", "fused", "window"} or not (axes or row.name in where):
            continue
        key = (_row_name(row), row.size, " x ".join(axes), where.get(row.name, "activations"))
        counts[key] = counts.get(key, 0) + len(row.axes)
    return [AxisLine(name, size, count, split, found) for (name, size, split, found), count in counts.items()]


def param_lines(layout: Layout) -> list[ParamLine]:
    """List the parameters with their specs and bytes."""
    counts: dict[tuple, list[int]] = {}
    abstract = jax.tree.leaves(layout.traced.arg(layout.params))
    dims_of = layout.table.inputs(layout.params)
    for (path, (compute, rest)), leaf, dims in zip(layout.param_shares.items(), abstract, dims_of, strict=True):
        names = " ".join(_dim_name(layout, dim) for dim in dims)
        key = (_generic(path), tuple(leaf.shape), leaf.dtype.name, names, _spec(rest.entries), _spec(compute.entries))
        entry = counts.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += bytes_per_device(leaf, rest.entries, layout.mesh_shape)
    return [
        ParamLine(path, count, shape, dtype, names, at_rest, in_use, size)
        for (path, shape, dtype, names, at_rest, in_use), (count, size) in counts.items()
    ]


def _generic(path: str) -> str:
    """A path with `*` for numbers."""
    return re.sub(r"(?<![^/])\d+(?![^/])", "*", path)


def _where(layout: Layout) -> dict[str, str]:
    """Row -> what it occurs in, for the table of axes."""
    found: dict[str, set[str]] = {}
    for name in (layout.params, *(n for n in layout.traced.names if n != layout.params)):
        for dims in layout.table.inputs(name):
            for dim in dims:
                for axis in spread(dim):
                    row = layout.rows.of(axis)
                    if row is not None:
                        found.setdefault(row.name, set()).add(name)
    return {row: ", ".join(sorted(names)) for row, names in found.items()}


def _row_name(row: Row) -> str:
    """A row's name; the role alone where no plan tells its rows apart."""
    return row.role if row.role in NEVER_SPLIT else row.name


def _dim_name(layout: Layout, dim: tuple) -> str:
    """`kv_heads*groups*head_dim` for a dimension of three axes, `[2 mlp]` or `[q|k]` for a concatenation."""
    if not dim:
        return "1"
    names = []
    for axis in leaves(dim):
        row = layout.rows.of(axis)
        if axis.segments is not None and (row is None or row.role == "fused"):
            parts = [_dim_name(layout, segment) for segment in axis.segments]
            names.append(f"[{len(parts)} {parts[0]}]" if len(set(parts)) == 1 else f"[{'|'.join(parts)}]")
        else:
            names.append(_row_name(row) if row else str(axis.size))
    return "*".join(names)


def _why_whole(layout: Layout, dims: tuple) -> str:
    if all(size_of(dim) == 1 for dim in dims):
        return "a scalar"
    return "none of its axes is split by this plan"


def _spec(entries: tuple[tuple[str, ...], ...]) -> str:
    if not any(entries):
        return "whole"
    return "(" + ", ".join("-" if not e else "*".join(e) for e in entries) + ")"


def format_bytes(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> format_bytes(3_500_000)
    '3.3 MiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    k = 0
    while count >= 1024 and k < len(units) - 1:
        count, k = count / 1024, k + 1
    return f"{count:.0f} B" if k == 0 else f"{count:.1f} {units[k]}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
