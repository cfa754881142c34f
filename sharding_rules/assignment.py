"""Logical axes to mesh axes: the table that is the plan.

    assignment = preset("fsdp+megatron", table, rows, MeshShape(data=2, fsdp=2, tensor=2))
    assignment = assign(table, rows, {"batch": ("data",), "mlp": ("tensor",)}, mesh_shape)

A preset is parts joined by `+`, each a small function that adds to the table:

* `data`: examples over the batch axes (always there);
* `fsdp`: parameters and optimizer state at rest over `fsdp` (ZeRO-3, Rajbhandari et al. 2020);
* `megatron`: one axis of every weight over `tensor` (Shoeybi et al. 2019), found as the independent set of rows that
  covers most of the model's flops: no two of its rows meet in one parameter;
* `sequence`: activations between blocks over `tensor` along length (Korthikanti et al. 2022); with `megatron`;
* `redco`: Redco's rules by parameter name (Tan et al. 2023), for comparison.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sharding_rules.axes import Axis, AxisTable, Contraction, leaves, size_of
from sharding_rules.errors import PlanError
from sharding_rules.mesh import AXES, BATCH_AXES, CONTEXT, DATA, EXPERT, STAGE, TENSOR, MeshShape
from sharding_rules.roles import NEVER_SPLIT, Row, Rows, weight_axes

CHEAP_TO_REPLICATE = frozenset({"vocab", "classes", "output", "feature", "channel", "fused"})
"""Roles whose indivisible rows a preset leaves whole, saying so; for the others it refuses."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which mesh axes each row is split over.

    Attributes:
        rows: the rows of the model.
        mesh: devices per mesh axis.
        compute: row name -> mesh axes while computing; earlier rows win where two meet in one activation.
        spill: like `compute`, for activations whose mesh axes no row of `compute` took (sequence parallelism).
        by_path: parameter path -> mesh axes of each dimension; overrides and name-based presets.
        storage: whether parameters at rest are also split over `fsdp`.
        notes: what was left whole, and why.
    """

    rows: Rows
    mesh: MeshShape
    compute: Mapping[str, tuple[str, ...]]
    spill: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    by_path: Mapping[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    storage: bool = False
    notes: tuple[str, ...] = ()

    def ways(self, axes: Sequence[str]) -> int:
        """Number of parts that a split over `axes` makes."""
        ways = 1
        for axis in axes:
            ways *= self.mesh.sizes[axis]
        return ways

    def role(self, axis: Axis) -> str | None:
        row = self.rows.of(axis)
        return row.role if row else None

    def beyond_keys(self, axis: Axis, ways: int) -> bool:
        """Whether a split into `ways` takes all heads of the keys and goes on in the groups of queries at each."""
        return ways > axis.size and ways % axis.size == 0 and self.role(axis) == "kv_heads"


def assign(
    table: AxisTable, rows: Rows, compute: Mapping[str, Sequence[str] | str], mesh: MeshShape, *, params: str = "params"
) -> Assignment:
    """Make an assignment from a table of row names, checked for legality.

    Raises:
        PlanError: an unknown row or mesh axis; a size that its mesh axes do not divide; two rows of one parameter on
            one mesh axis.
    """
    plain = {name: (axes,) if isinstance(axes, str) else tuple(axes) for name, axes in compute.items()}
    for name, axes in plain.items():
        if name not in {row.name for row in rows.rows}:
            raise PlanError(f"no axis called {name!r}; this model has {', '.join(row.name for row in rows.rows)}")
        for axis in axes:
            if axis not in AXES:
                raise PlanError(f"axis {name!r} is assigned to {axis!r}, which is no mesh axis ({', '.join(AXES)})")
            if axes.count(axis) > 1:
                raise PlanError(f"axis {name!r} is assigned to {axis!r} twice: {axes}")
    assignment = Assignment(rows, mesh, plain)
    for name, axes in plain.items():
        row = rows[name]
        if row.role != "batch" and row.size % assignment.ways(axes):
            raise indivisible(table, rows, row, axes, mesh, params=params)
    for path, dims in zip(table.paths(params), table.inputs(params), strict=True):
        owner: dict[str, tuple[int, str]] = {}
        for i, dim in enumerate(dims):
            for name in {r.name for axis in dim if (r := rows.of(axis))}:
                for axis in plain.get(name, ()):
                    if mesh.sizes[axis] > 1 and axis in owner and owner[axis] != (i, name):
                        j, other = owner[axis]
                        if other != name:
                            raise PlanError(
                                f"mesh axis {axis!r} would split two dimensions of parameter {path!r} "
                                f"(shape {tuple(size_of(d) for d in dims)}): dimension {j} ({other}) and "
                                f"dimension {i} ({name}); assign only one of them to {axis!r}"
                            )
                    owner.setdefault(axis, (i, name))
    return assignment


def indivisible(
    table: AxisTable, rows: Rows, row: Row, axes: Sequence[str], mesh: MeshShape, *, params: str = "params"
) -> PlanError:
    """The error for a row that its mesh axes do not divide, with the parameter and the nearest mesh that works."""
    where = f"axis {row.name}"
    for path, dims in zip(table.paths(params), table.inputs(params), strict=True):
        hit = [i for i, dim in enumerate(dims) if any(rows.of(axis) is row for axis in _with_segments(dim))]
        if hit:
            where = f"parameter {path!r}, dimension {hit[0]} of shape {tuple(size_of(d) for d in dims)}"
            break
    return PlanError(f"{where}: {row.name} has {row.size} elements, which {misfit(row.size, axes, mesh)}")


def misfit(size: int, axes: Sequence[str], mesh: MeshShape) -> str:
    """`tensor=3 does not divide; the nearest mesh that works is data=2,tensor=2`, over as many devices.

    Of several axes the last is made smaller; data takes what it gives up.
    """
    ways = math.prod(mesh.sizes[axis] for axis in axes)
    *others, axis = axes
    rest = math.prod(mesh.sizes[other] for other in others)
    legal = [n for n in range(1, mesh.size + 1) if size % (rest * n) == 0 and mesh.size % (rest * n) == 0]
    text = f"{'*'.join(axes)}={ways} does not divide"
    if not legal or DATA in axes:
        return (
            f"{text}; the largest number of parts up to {ways} is {max(n for n in range(1, ways + 1) if size % n == 0)}"
        )
    nearest = min(legal, key=lambda n: (abs(n - mesh.sizes[axis]), -n))
    other = dataclasses.replace(mesh, data=1, **{axis: nearest})
    if mesh.size % other.size:
        other = MeshShape(**{name: mesh.sizes[name] for name in others}, **{axis: nearest})
    return f"{text}; the nearest mesh that works is {dataclasses.replace(other, data=mesh.size // other.size)}"


Part = Callable[[AxisTable, Rows, MeshShape, str], dict]


def preset(
    name: str,
    table: AxisTable,
    rows: Rows,
    mesh: MeshShape,
    *,
    params: str = "params",
    stated: Mapping[str, tuple[tuple[str, ...], ...]] | None = None,
) -> Assignment:
    """The assignment of a preset such as `"fsdp+megatron"`, under what is `stated` by parameter path.

    Raises:
        PlanError: an unknown preset, a mesh axis above 1 that the preset leaves unused, sizes that do not divide.
    """
    parts = name.split("+")
    unknown = [part for part in parts if part not in PRESETS]
    if unknown:
        raise PlanError(f"unknown preset {unknown[0]!r} in {name!r}; presets are {', '.join(PRESETS)}, joined by '+'")
    compute: dict[str, tuple[str, ...]] = {}
    more: dict = {"spill": {}, "by_path": {}, "storage": False, "notes": []}
    for part in sorted(set(parts), key=list(PRESETS).index):
        result = PRESETS[part](table, rows, mesh, params)
        compute |= result.pop("compute", {})
        more["notes"] += result.pop("notes", [])
        for key, value in result.items():
            more[key] = more[key] | value if isinstance(value, dict) else value
    # Rows of tensors come first: where they meet the batch in one activation, they win the mesh axis. So do those of
    # experts that take tokens by a dense product (one-hot dispatch); else only the router's results have both, and lie
    # as the tokens do.
    compute |= {row.name: BATCH_AXES for row in rows.rows if row.role == "batch"}
    if mesh.expert > 1:
        experts = [row for row in rows.rows if row.role == "expert"]
        for row in experts:
            if row.size % mesh.expert:
                raise indivisible(table, rows, row, (EXPERT,), mesh, params=params)
        dense = {row.name for row in experts if _multiplied_apart(table, rows, row)}
        compute = {name: (EXPERT,) for name in dense} | compute
        compute |= {row.name: (EXPERT,) for row in experts if row.name not in dense}
    if mesh.context > 1:
        compute |= {row.name: (CONTEXT,) for row in rows.rows if row.role == "length" and row.size % mesh.context == 0}
    more["by_path"] |= stated or {}
    used = {axis for axes in (*compute.values(), *more["spill"].values()) for axis in axes}
    used |= {axis for spec in more["by_path"].values() for axes in spec for axis in axes}
    idle = [axis for axis, size in mesh.sizes.items() if size > 1 and axis not in used]
    if idle:
        raise PlanError(
            f"mesh {mesh} has {idle[0]}={mesh.sizes[idle[0]]}, but preset {name!r} splits nothing over it on this "
            f"model: the devices along it would repeat each other's work. {_advice(idle[0])}"
        )
    return Assignment(rows, mesh, compute, more["spill"], more["by_path"], more["storage"], tuple(more["notes"]))


def _multiplied_apart(table: AxisTable, rows: Rows, row: Row) -> bool:
    """Whether some dense product has a row as a batch dimension."""
    return any(
        rows.of(axis) == row for c in table.contractions if c.kind == "dot" for dim in c.batch for axis in leaves(dim)
    )


def _advice(axis: str) -> str:
    return {
        TENSOR: "Add '+megatron' to the preset, or give its devices to data or fsdp",
        CONTEXT: "No length of this model divides by it: give its devices to data or fsdp",
        STAGE: "Pipeline stages are not run by this step: give its devices to data or fsdp",
    }.get(axis, "Give its devices to another axis")


def _data(table: AxisTable, rows: Rows, mesh: MeshShape, params: str) -> dict:
    return {}


def _fsdp(table: AxisTable, rows: Rows, mesh: MeshShape, params: str) -> dict:
    return {"storage": True}


def _megatron(table: AxisTable, rows: Rows, mesh: MeshShape, params: str) -> dict:
    if mesh.tensor == 1:
        return {}
    graph = _Conflicts(table, rows, params)

    def divides(row: Row) -> bool:
        return row.size % mesh.tensor == 0 or _within_groups(table, rows, row, mesh.tensor, params)

    best = graph.cover(lambda row: True)
    # An indivisible vocabulary must not turn the rest around: what it alone would split is left out of the choice, and
    # only then covered by whatever else fits.
    dropped = [row for row in best if not divides(row) and row.role in CHEAP_TO_REPLICATE]
    chosen = graph.cover(divides, without=dropped)
    if dropped:
        chosen = graph.cover(divides, given=chosen)
    notes = []
    for row in graph.candidates:
        if row in chosen and row.size % mesh.tensor:
            notes.append(
                f"keys and values are whole on all devices of tensor={mesh.tensor}, which is more than their "
                f"{row.size} heads ({row.name}): each computes all of them, and the compiler moves queries to them"
            )
        if divides(row) or row not in best:
            continue
        if row.role in CHEAP_TO_REPLICATE or graph.covers(chosen, row):
            notes.append(f"{row.name} ({row.size}) is not split: tensor={mesh.tensor} does not divide it")
        else:
            raise indivisible(table, rows, row, (TENSOR,), mesh, params=params)
    taken = set(chosen)
    for row, (path, others) in graph.twice.items():
        if not others & taken:
            notes.append(f"{row.name} ({row.size}) is not split: parameter {path!r} has it on two dimensions")
    return {"compute": {row.name: (TENSOR,) for row in chosen}, "notes": notes}


def _within_groups(table: AxisTable, rows: Rows, row: Row, ways: int, params: str) -> bool:
    """Whether more ways than there are heads of keys can split the queries, inside the groups that share a key."""
    if row.role != "kv_heads" or ways % row.size:
        return False
    for dims in table.inputs(params):
        for dim in dims:
            for axis, after in itertools.pairwise(_with_segments(dim)):
                group = rows.of(after)
                if rows.of(axis) is row and group and group.role == "groups" and after.size % (ways // row.size) == 0:
                    return True
    return False


def _sequence(table: AxisTable, rows: Rows, mesh: MeshShape, params: str) -> dict:
    if mesh.tensor == 1:
        return {}
    lengths = [row for row in rows.rows if row.role == "length"]
    return {
        "spill": {row.name: (TENSOR,) for row in lengths if row.size % mesh.tensor == 0},
        "notes": [
            f"{row.name} ({row.size}) is not split: tensor={mesh.tensor} does not divide it"
            for row in lengths
            if row.size % mesh.tensor
        ],
    }


def _redco(table: AxisTable, rows: Rows, mesh: MeshShape, params: str) -> dict:
    shapes = {
        path: tuple(size_of(dim) for dim in dims)
        for path, dims in zip(table.paths(params), table.inputs(params), strict=True)
    }
    return {"by_path": redco_rules(shapes, mesh.tensor)} if mesh.tensor > 1 else {}


PRESETS: dict[str, Part] = {
    "data": _data,
    "fsdp": _fsdp,
    "megatron": _megatron,
    "sequence": _sequence,
    "redco": _redco,
}


def redco_rules(shapes: Mapping[str, tuple[int, ...]], ways: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The specs that Redco 0.4.23 derives from names and shapes, for comparison.

    A rule is made per pair (module, `kernel`) and per other last name; only kernels and embeddings are split, each
    over one dimension that divides in all arrays of its rule. Embeddings take the first such dimension; in modules
    whose path says attention or attn, names that begin or end in q, k, v take the last and in o the first; up, gate,
    wi, in the last and down, wo, out the first; all others alternate, in alphabetical order. The first rule that
    matches anywhere in a path is taken. Lists of parameters stay whole.

    Source: Redco (Tan et al. 2023, arXiv 2310.16355, section 3) and `get_sharding_rules` of its package.

    Returns:
        Mesh axes per dimension, of the parameters that are split.
    """
    legal: dict[tuple[str, ...], list[bool] | None] = {}
    in_attention: dict[tuple[str, ...], bool] = {}
    keys = {path: tuple(path.split("/")) for path in shapes}
    keys = {path: key for path, key in keys.items() if not any(part.isdigit() for part in key)}
    for path, key in keys.items():
        rule, shape = key[-2:] if key[-1] == "kernel" else key[-1:], shapes[path]
        if key[-1] not in {"embedding", "kernel"}:
            legal[rule] = None
            continue
        if rule not in legal:
            legal[rule], in_attention[rule] = [True] * len(shape), True
        dims = legal[rule]
        if dims is None or len(dims) != len(shape):
            legal[rule] = None
            continue
        legal[rule] = [ok and size % ways == 0 for ok, size in zip(dims, shape, strict=True)]
        in_attention[rule] &= any("attention" in part.lower() or "attn" in part.lower() for part in key)
    split: dict[tuple[str, ...], int | None] = {}
    last: int | None = None
    for rule in sorted(legal):
        choices = [i for i, ok in enumerate(legal[rule] or ()) if ok]
        split[rule] = None
        if not choices:
            continue
        name, words = rule[0], rule[0].split("_")
        first, final = choices[0], choices[-1]
        if rule[-1] == "embedding":
            split[rule] = first
        elif in_attention[rule] and (name[0] in "qkv" or name[-1] in "qkv"):
            split[rule] = final
        elif in_attention[rule] and (name[0] == "o" or name[-1] == "o"):
            split[rule] = first
        elif name.startswith(("up", "gate", "wi")) or "in" in words:
            split[rule] = final
        elif name.startswith(("down", "wo")) or "out" in words:
            split[rule] = first
        elif name.startswith("head") or name.endswith("head"):
            split[rule] = final
        else:
            last = split[rule] = choices[-2] if final == last and len(choices) > 1 else final
    specs: dict[str, tuple[tuple[str, ...], ...]] = {}
    for path, key in keys.items():
        windows = {key[i : i + n] for n in (1, 2) for i in range(len(key) - n + 1)}
        dimension = next((split[rule] for rule in split if rule in windows), None)
        shape = shapes[path]
        if dimension is not None and dimension < len(shape) and shape[dimension] % ways == 0:
            specs[path] = tuple((TENSOR,) if i == dimension else () for i in range(len(shape)))
    return specs


class _Conflicts:
    """Rows that a tensor axis may split; two that meet in one parameter exclude each other."""

    def __init__(self, table: AxisTable, rows: Rows, params: str):
        self.rows = rows
        pairs: set[frozenset[Row]] = set()
        size: Counter[Row] = Counter()
        twice: dict[Row, tuple[str, set[Row]]] = {}
        for path, dims in zip(table.paths(params), table.inputs(params), strict=True):
            # In order, and not as a set, whose order differs between processes: ties go to the first.
            per_dim = [dict.fromkeys(r for axis in _with_segments(dim) if (r := rows.of(axis))) for dim in dims]
            elements = 1
            for dim in dims:
                elements *= size_of(dim)
            for i, here in enumerate(per_dim):
                for row in here:
                    size[row] += elements
                for there in per_dim[i + 1 :]:
                    for row in (row for row in here if row in there):
                        twice.setdefault(row, (path, set().union(*per_dim)))
                    pairs |= {frozenset((a, b)) for a in here for b in there}
        has_keys = any(row.role == "kv_heads" for row in rows.rows)
        skip = (
            NEVER_SPLIT
            | {"batch", "length", "spatial", "segment", "fused", "expert"}
            | ({"groups"} if has_keys else set())
        )
        weighty = {row for axis in weight_axes(table) if (row := rows.of(axis))}
        self.candidates = [
            row
            for row in size
            if row.role not in skip and frozenset((row,)) not in pairs and (row in weighty or row.role == "vocab")
        ]
        self.twice = {row: found for row, found in twice.items() if row.role not in skip and row in weighty}
        index = {row: 1 << i for i, row in enumerate(self.candidates)}
        self.index = index
        self.conflict = {
            row: sum(index[other] for other in self.candidates if frozenset((row, other)) in pairs)
            for row in self.candidates
        }
        self.flops: Counter[int] = Counter()
        self.traffic: Counter[int] = Counter()
        shared: dict[tuple, int] = {}
        for c in table.contractions:
            self.flops[self._mask(self._rows(c))] += c.flops
            if c.weight is None:
                continue
            contracted = {r for dim in c.contracted for axis in _with_segments(dim) if (r := rows.of(axis))}
            made = {r for dim in c.weight for axis in _with_segments(dim) if (r := rows.of(axis))} - contracted
            batch = {r for dim in c.batch for axis in _with_segments(dim) if (r := rows.of(axis))}
            self.traffic[self._mask(contracted)] += c.trips * _elements(c.out)
            activation, key = (c.lhs, c.lhs_key) if c.weight is c.rhs else (c.rhs, c.rhs_key)
            # Products of one activation share the sum of its gradient.
            shared[(key, self._mask(made - batch))] = c.trips * _elements(activation)
        for (_, mask), elements in shared.items():
            self.traffic[mask] += elements
        self.size = {index[row]: size[row] for row in self.candidates}

    def _rows(self, c: Contraction) -> set[Row]:
        """Rows that split a product: any of its axes if it has a weight, else those it is batched over (heads)."""
        arrays = (c.lhs, c.rhs) if c.weight is not None else (c.batch,)
        return {
            r
            for dims in arrays
            for dim in dims
            for axis in _with_segments(dim)
            if (r := self.rows.of(axis)) is not None
        }

    def _mask(self, rows: set[Row]) -> int:
        return sum(self.index[row] for row in rows if row in self.index)

    def covers(self, chosen: Sequence[Row], row: Row) -> bool:
        """Whether every product that `row` takes part in is split by some chosen row."""
        mask = self._mask(set(chosen))
        return all(m & mask for m in self.flops if m & self.index[row])

    def cover(
        self, allowed: Callable[[Row], bool], *, without: Sequence[Row] = (), given: Sequence[Row] = ()
    ) -> list[Row]:
        """The independent set with the most flops covered, then the least traffic, then the most parameters.

        Exact by branch and bound; past 50,000 nodes the best set found so far is taken.

        Args:
            allowed: which rows may be taken.
            without: rows whose products do not count.
            given: rows that are taken already.
        """
        left_out, start = self._mask(set(without)), self._mask(set(given))
        flops = {mask: count for mask, count in self.flops.items() if not mask & left_out}
        rows = sorted(
            (row for row in self.candidates if allowed(row) and not self.index[row] & start),
            key=lambda row: -sum(f for m, f in flops.items() if m & self.index[row]),
        )
        total = max(sum(flops.values()), 1)
        best: tuple[tuple[float, float, float], int] = ((0.0, 0.0, 0.0), start)
        nodes = 0

        def score(mask: int) -> tuple[float, float, float]:
            covered = sum(f for m, f in flops.items() if m & mask)
            traffic = sum(e for m, e in self.traffic.items() if m & mask)
            return round(covered / total, 4), -traffic, sum(n for bit, n in self.size.items() if bit & mask)

        def visit(i: int, mask: int, banned: int) -> None:
            nonlocal best, nodes
            nodes += 1
            here = score(mask)
            if here > best[0]:
                best = (here, mask)
            if i == len(rows) or nodes > 50_000:
                return
            rest = mask
            for row in rows[i:]:
                if not self.index[row] & banned:
                    rest |= self.index[row]
            if round(sum(f for m, f in flops.items() if m & rest) / total, 4) < best[0][0]:
                return
            bit = self.index[rows[i]]
            if not bit & banned:
                visit(i + 1, mask | bit, banned | self.conflict[rows[i]])
            visit(i + 1, mask, banned)

        banned = 0
        for row in given:
            banned |= self.conflict[row]
        visit(0, start, banned)
        return [row for row in self.candidates if self.index[row] & best[1]]


def _elements(dims: Sequence[Sequence[Axis]]) -> int:
    elements = 1
    for dim in dims:
        elements *= size_of(dim)
    return elements


def _with_segments(dim: Sequence[Axis]) -> list[Axis]:
    """Axes of a dimension; a concatenation counts as the axes of its segments."""
    out: list[Axis] = []
    for axis in leaves(dim):
        if axis.segments is None:
            out.append(axis)
        else:
            out.extend(a for segment in axis.segments for a in _with_segments(segment))
    return out
