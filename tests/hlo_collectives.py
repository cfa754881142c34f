"""Collectives of a compiled step, by kind and mesh axes, in bytes per device; those in loops as often as they run.

    found = collectives(compiled.as_text(), mesh_shape)
    by_axis(found)                          # {("all_gather", ("fsdp",)): bytes, ...}

`bytes` is the buffer as `search.collectives` has it: the operand of a sum or an all-to-all, the result of an
all-gather. XLA for CPUs has no reduce-scatter: it sums the whole and every device keeps its part. Both are therefore
"sum" here, which has the bytes of either.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from sharding_rules import MeshShape

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = {
    "all-reduce": "sum",
    "reduce-scatter": "sum",
    "all-gather": "all_gather",
    "all-to-all": "all_to_all",
    "collective-permute": "permute",
}
_OP = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)$")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled step.

    Attributes:
        kind: "sum" (all-reduce or reduce-scatter), "all_gather", "all_to_all" or "permute".
        axes: mesh axes of its groups, outermost first; none where every device is alone.
        bytes: of one execution, per device.
        times: executions per step.
        source: the operation of the program that it comes from.
        shapes: of its results, as text.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    source: str
    shapes: str


def collectives(hlo: str, mesh: MeshShape) -> list[Collective]:
    """The collectives of an HLO module compiled for a mesh of devices 0, 1, 2, ... in the order of its axes."""
    bodies = _computations(hlo)
    times = _executions(bodies, hlo)
    out = []
    for name, lines in bodies.items():
        for line in lines:
            match = _OP.match(line)
            if match is None or not times[name]:
                continue
            kind = KINDS[match[3]]
            groups = _groups(line, mesh.size)
            shapes = _SHAPE.findall(match[2])
            bytes_ = sum(WIDTHS[dtype] * math.prod(int(n) for n in size.split(",") if n) for dtype, size in shapes)
            if match[3] == "reduce-scatter":
                bytes_ *= len(groups[0])
            source = re.search(r'op_name="([^"]*)"', line)
            said = " ".join(f"{dtype}[{size}]" for dtype, size in shapes)
            out.append(Collective(kind, _axes(groups, mesh), bytes_, times[name], source[1] if source else "", said))
    return out


def by_axis(found: Iterable[Collective]) -> Counter[tuple[str, tuple[str, ...]]]:
    """(kind, mesh axes) -> bytes per device and step."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in found:
        total[c.kind, c.axes] += c.bytes * c.times
    return total


def _computations(hlo: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            name = head[1]
            bodies[name] = []
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    return bodies


def _executions(bodies: dict[str, list[str]], hlo: str) -> Counter[str]:
    """How often each computation runs, from the entry down: a loop's body as often as the compiler says."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, ()):
            trips = 1
            if " while(" in line:
                known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
                if known is None:
                    raise ValueError(f"a loop with an unknown number of iterations: {line.strip()[:200]}")
                trips = int(known[1])
            for called in _CALLED.findall(line):
                visit(called, count * trips)
            for several in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for called in several.split(","):
                    visit(called.strip().lstrip("%"), count)

    visit(entry[1] if entry else "", 1)
    return times


def _groups(line: str, devices: int) -> list[list[int]]:
    """Devices that exchange with each other; of a permutation, the pairs."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if pairs or listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", (pairs or listed)[1])]
    meshed = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}", line)
    if meshed:
        ids = _iota(meshed[2], meshed[3]) if meshed[2] else np.arange(devices)
        return ids[_groups_of_mesh(meshed[1], meshed[4])].tolist()
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", line)
    if iota is None:
        return [list(range(devices))]
    return _iota(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")]).tolist()


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Devices in the order `[2,4]T(1,0)`: 0, 1, 2, ... as an array of this shape, turned, and flat again."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _groups_of_mesh(sizes: str, used: str) -> np.ndarray:
    """Groups written as axes of a mesh, `mesh['a'=2,'b'=4] {'b':(2)2}`: of an axis, the part after the first 2."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in axes}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
        parts[name].append((int(before or 1), int(size or axes[name])))
    shape: list[int] = []
    inside: list[int] = []
    for name, total in axes.items():
        at = 1
        for before, size in sorted(parts[name]):
            shape += [before // at, size]
            inside.append(len(shape) - 1)
            at = before * size
        shape.append(total // at)
    outside = [i for i in range(len(shape)) if i not in inside]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose([*outside, *inside])
    return ids.reshape(-1, math.prod(shape[i] for i in inside))


def _axes(groups: Sequence[Sequence[int]], mesh: MeshShape) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    sizes = mesh.sizes
    places = np.stack(np.unravel_index(np.arange(mesh.size), tuple(sizes.values())), axis=1)
    moved = np.zeros(len(sizes), bool)
    for group in groups:
        moved |= (places[group] != places[group[0]]).any(axis=0)
    return tuple(axis for axis, used in zip(sizes, moved, strict=True) if used)
