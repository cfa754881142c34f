"""What a compiler says of a plan, beside what the planner said: does it fit, what moves, how long it takes.

    verified = verification(compiled, model, plan, target)      # of `search.compiler.compile_in_child`
    verified.fits, verified.bytes["total"], verified.ratio, verified.seconds
    for change in verified.changes: ...                         # of a plan that does not fit: what would

Everything here is labelled compiled, but `seconds`: a roofline over the compiled program (`search.roofline`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search import hlo
from search.collectives import collective_seconds
from search.costing import estimate_plan
from search.knobs import changes
from search.plan import Plan
from search.planned_collectives import collectives as planned_collectives
from search.roofline import step_seconds
from search.space import Model

if TYPE_CHECKING:
    from search.compiler import Compiled

RECORD_VERSION = 1
BYTES = ("arguments", "temporaries", "results", "aliased", "host", "total")
UNPLANNED_SHARE = 0.1
"""Of what the compiled step sends: more than this beyond the plan is told, with the lines it comes from."""
UNPLANNED_BYTES = 2**20
SHOWN = 8
"""Rows of lists that could be long."""
GIB = 2**30
NOISE = frozenset("while body cond closed_call checkpoint rematted_computation shard_map vmap()".split())
"""Parts of a name that say how JAX runs an operation, not where it is from."""
WRAPPERS = ("jvp(", "transpose(", "jit(", "vmap(")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives over one set of mesh axes, per device and step.

    Attributes:
        counts: kind -> executions.
        sent: bytes that a device sends: with n members and a buffer of V bytes, (n-1)/n V for an all-gather, a
            reduce-scatter and an all-to-all, twice that for an all-reduce, V for a permute.
        planned: the same by the planner.
        asynchronous: of `sent`, what runs beside compute.
        seconds: on the links, hidden or not (analytic).
        again: of `sent`, what the compiler sends once more than the program does, as the memory has no room to keep it.
    """

    axes: tuple[str, ...]
    counts: Mapping[str, int]
    sent: float
    planned: float
    asynchronous: float
    seconds: float
    again: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Planned over compiled."""
        return self.planned / self.sent if self.sent else None


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large buffer of the program: bytes, shape, the operation that makes it and its line."""

    bytes: int
    shape: str
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Verification:
    """What the compiler says of a plan. Bytes are per device, seconds and flops per step.

    Attributes:
        target, versions, depth: what it was compiled for, with, and how far.
        fits: `bytes["total"]` is within `usable_bytes`, the device's memory less what the driver keeps.
        bytes: of arguments, temporaries, results beside the arguments, arguments that results take the place of
            (part of arguments), host memory, and the total on the device.
        planned_bytes: analytic.
        traffic: by mesh axes; the seconds are analytic.
        seconds: of the step, by roofline over the compiled program; None where the compiler ran out of memory.
        time: compute, exposed by mesh axis, hidden.
        planned_seconds: analytic.
        flops: matrix products in the program; `planned_flops` those of the traced step over the devices.
        slowest: the slowest operations.
        buffers: the largest buffers.
        warnings: what the compiler or the comparison complains about, one line each.
        changes: of a plan that does not fit, single changes that would, the fastest first.
        out_of_memory: the compiler's message.
        compile_seconds: wall time of the child.
    """

    target: str
    versions: Mapping[str, str]
    depth: str
    fits: bool
    bytes: Mapping[str, int]
    usable_bytes: int
    planned_bytes: int
    traffic: tuple[Traffic, ...]
    seconds: float | None
    time: Mapping[str, float]
    planned_seconds: float
    flops: float
    planned_flops: float
    slowest: tuple[Mapping[str, Any], ...]
    buffers: tuple[Buffer, ...]
    warnings: tuple[str, ...]
    changes: tuple[Mapping[str, Any], ...]
    out_of_memory: str
    compile_seconds: float
    version: int = RECORD_VERSION

    @property
    def ratio(self) -> float:
        """Planned over compiled bytes."""
        return self.planned_bytes / max(1, self.bytes["total"])

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Verification:
        """Undo `to_record`.

        Raises:
            ValueError: a record of another version.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if record.get("version") != RECORD_VERSION or set(record) != names:
            raise ValueError(
                f"a verification of version {record.get('version')!r}; this program reads {RECORD_VERSION}"
            )
        rows = {"traffic": Traffic, "buffers": Buffer}
        fields = {name: tuple(kind(**row) for row in record[name]) for name, kind in rows.items()}
        fields["traffic"] = tuple(dataclasses.replace(row, axes=tuple(row.axes)) for row in fields["traffic"])
        lists = {name: tuple(record[name]) for name in ("slowest", "warnings", "changes")}
        return cls(**{**record, **fields, **lists})


def verification(
    compiled: Compiled, model: Model, plan: Plan, *, target: str, versions: Mapping[str, str], usable_bytes: int
) -> Verification:
    """Read what was compiled and hold it against the plan's estimate.

    Args:
        compiled: the program and what the child said; or the compiler's message that it runs out of memory.
        model: what was planned, on the same cluster.
        plan: what was compiled.
        target, versions: of the compiler.
        usable_bytes: of a device's memory.
    """
    estimate = estimate_plan(model, plan)
    sizes = memory_bytes(compiled)
    cluster, works = model.costs.cluster, model.costs.works[plan.remat]
    planned_flops = works.product_flops / plan.mesh.size
    common: dict[str, Any] = {
        "target": target,
        "versions": dict(versions),
        "depth": compiled.depth,
        "fits": not compiled.out_of_memory and sizes["total"] <= usable_bytes,
        "bytes": sizes,
        "usable_bytes": usable_bytes,
        "planned_bytes": estimate.bytes_per_device,
        "planned_seconds": estimate.seconds_per_step,
        "planned_flops": planned_flops,
        "out_of_memory": compiled.out_of_memory,
        "compile_seconds": compiled.seconds,
    }
    fitting = () if common["fits"] else fitting_changes(model, plan, sizes["total"], usable_bytes)
    if not compiled.hlo:
        return Verification(
            **common,
            traffic=(),
            seconds=None,
            time={},
            flops=0.0,
            slowest=(),
            buffers=(),
            warnings=(),
            changes=fitting,
        )
    module = hlo.parse(compiled.hlo)
    found = hlo.collectives(module, plan.mesh, order=plan.order)
    times = step_seconds(module, cluster, plan.mesh, order=plan.order)
    rows = traffic(found, model, plan)
    exposed = {f"exposed {axis}": seconds for axis, seconds in times.exposed_seconds.items() if seconds}
    return Verification(
        **common,
        traffic=rows,
        seconds=times.seconds,
        time={"compute": sum(times.compute_seconds.values()), **exposed, "hidden": times.hidden_seconds},
        flops=float(times.flops),
        slowest=tuple(dataclasses.asdict(op) for op in times.slowest[:SHOWN]),
        buffers=largest_buffers(compiled.buffers, module),
        warnings=(
            *unplanned(rows, found),
            *partitioner_warnings(compiled.log, module),
            *(f"not in the seconds: {what}" for what in times.unknown),
        ),
        changes=fitting,
    )


def memory_bytes(compiled: Compiled) -> dict[str, int]:
    """Bytes per device by kind: the compiler's own analysis, or its memory report and what the child said."""
    said = compiled.said
    spaces = dict(re.findall(r"Memory Space: (\w+) .*\nTotal bytes: (\d+)", compiled.memory_report))
    if compiled.out_of_memory:
        # The report is exact, the message rounded; where the compiler gave up early there is no report.
        total = int(spaces["default"]) if "default" in spaces else _needed(compiled.out_of_memory)
        sizes = {**dict.fromkeys(BYTES, 0), **said["bytes"], "total": total}
        return sizes | {"temporaries": max(0, sizes["total"] - sizes["arguments"] - sizes["results"])}
    analysis = said.get("memory")
    if analysis:
        total = analysis["argument"] + analysis["output"] - analysis["alias"] + analysis["temp"]
        host = sum(analysis.get(f"host_{name}", 0) for name in ("argument", "output", "temp"))
        return {
            "arguments": analysis["argument"],
            "temporaries": analysis["temp"],
            "results": analysis["output"] - analysis["alias"],
            "aliased": analysis["alias"],
            "host": host - analysis.get("host_alias", 0),
            "total": total,
        }
    total = int(spaces["default"])
    arguments, results = said["bytes"]["arguments"], said["bytes"]["results"]
    return {
        "arguments": arguments,
        "temporaries": max(0, total - arguments - results),
        "results": results,
        "aliased": said["bytes"]["aliased"],
        "host": int(spaces.get("host", 0)),
        "total": total,
    }


def _needed(message: str) -> int:
    """Bytes that the compiler says a program would need."""
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message) or re.search(r"Used ([\d.]+)([KMGT])", message)
    if match is None:
        raise ValueError(f"the compiler ran out of memory and does not say how much it needs: {message[:300]}")
    return round(float(match[1]) * 1024 ** " KMGT".index(match[2]))


def sent_bytes(kind: str, buffer: float, members: float) -> float:
    """Bytes that a device sends for a collective on a buffer; see `Traffic`."""
    if kind == "permute":
        return buffer
    return (2 if kind == "all_reduce" else 1) * (members - 1) / members * buffer


def traffic(found: list[hlo.Collective], model: Model, plan: Plan) -> tuple[Traffic, ...]:
    """Collectives as compiled and as planned, by mesh axes; those that send most first."""
    sizes = plan.mesh.sizes
    planned: dict[tuple[str, ...], float] = {}
    for row in planned_collectives(model, plan):
        members = 1
        for axis in row.axes:
            members *= sizes[axis]
        planned[row.axes] = planned.get(row.axes, 0.0) + sent_bytes(row.kind, row.bytes, members)
    groups: dict[tuple[str, ...], list[hlo.Collective]] = {axes: [] for axes in planned}
    for c in found:
        if c.axes:
            groups.setdefault(c.axes, []).append(c)
    rows = []
    for axes, group in groups.items():
        counts: dict[str, int] = {}
        sent = again = asynchronous = seconds = 0.0
        for c in group:
            counts[c.kind] = counts.get(c.kind, 0) + c.times
            moved = c.times * sent_bytes(c.kind, c.bytes, c.size)
            sent += moved
            again += moved * (".remat" in c.name)
            asynchronous += moved * c.asynchronous
            seconds += c.times * float(collective_seconds(model.costs.cluster, c.kind, c.bytes, c.sizes, c.strides))
        rows.append(Traffic(axes, counts, sent, planned.get(axes, 0.0), asynchronous, seconds, again))
    return tuple(sorted(rows, key=lambda row: -max(row.sent, row.planned)))


def unplanned(rows: Sequence[Traffic], found: Sequence[hlo.Collective]) -> list[str]:
    """Lines on what the compiled step sends beyond the plan, with the largest of those collectives and their lines."""
    total = sum(row.sent for row in rows)
    out = []
    for row in rows:
        if row.sent - row.planned <= max(UNPLANNED_SHARE * total, UNPLANNED_BYTES):
            continue
        over = "+".join(row.axes)
        alike: dict[str, float] = {}  # bytes
        times: Counter[str] = Counter()
        for c in found:
            if c.axes == row.axes:
                source = f" ({c.source})" if c.source else ""
                text = f"{c.kind.replace('_', '-')} of {c.shapes} in {operation(c.op_name)}{source}"
                alike[text] = alike.get(text, 0.0) + c.times * sent_bytes(c.kind, c.bytes, c.size)
                times[text] += c.times
        lines = [f"{times[text]} x {text}" for text in sorted(alike, key=lambda text: -alike[text])[:3]]
        out.append(
            f"over {over} a device sends {row.sent / GIB:.2f} GiB, planned {row.planned / GIB:.2f}"
            + (f" ({row.again / GIB:.2f} GiB a second time, for want of memory)" if row.again else "")
            + "; most of it: "
            + "; ".join(lines)
        )
    return out


def partitioner_warnings(log: str, module: hlo.Module) -> list[str]:
    """What XLA's partitioner says it had to move whole: an operation whose splits it could not go between."""
    sources = {op.op_name: op.source for computation in module.computations.values() for op in computation.ops}
    found = re.findall(r"Involuntary full rematerialization.*?for HLO operation:? (.*)", log)
    out: dict[str, None] = {}
    for operation in found:
        name = re.search(r'op_name="([^"]*)"', operation)
        source = re.search(r'source_file="([^"]*)" source_line=(\d+)', operation)
        shape = re.search(r"= (\S+)", operation)
        line = f"{source[1]}:{source[2]}" if source else sources.get(name[1], "") if name else ""
        where = f" ({line})" if line else ""
        what = " ".join(match[1] for match in (shape, name) if match)
        out[f"gathered whole on every device and split again: {what}{where}"] = None
    return list(out)


def operation(name: str) -> str:
    """An operation's name in the program, without what the transformations of JAX add to it.

    >>> operation("jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/layers/mlp/up/dot_general")
    'backward: layers/mlp/up/dot_general'
    >>> operation("state.params['layers']['up']")
    'state.params/layers/up'
    """
    if name.startswith("jit("):
        passes = "backward" if "transpose(" in name else "forward" if "jvp(" in name else ""
        again = " again" if "rematted_computation" in name else ""
        parts = [part for part in name.split("/")[1:] if part not in NOISE and not part.startswith(WRAPPERS)]
        parts = [part for part, before in zip(parts, ["", *parts], strict=False) if part != before]
        return (f"{passes}{again}: " if passes else "") + "/".join(parts)
    # A parameter's path, as Python would write it.
    return re.sub(r"\\?'\]?\[\\?'|\[\\?'", "/", name).replace("\\']", "").replace("']", "")


def largest_buffers(assignment: str, module: hlo.Module) -> tuple[Buffer, ...]:
    """The largest buffers of a device's memory, from XLA's text of its buffer assignment; the largest first.

    Values that share a place one after the other are one buffer, told by the first that comes from the program.
    """
    ops = {op.name: op for computation in module.computations.values() for op in computation.ops}
    places: dict[tuple[int, int], Buffer] = {}
    allocation = -1
    for line in assignment.splitlines():
        if head := re.match(r"allocation (\d+):", line):
            allocation = int(head[1])
        value = re.match(
            r"\s*value: <\d+ ([^ {}]+)(?:\{[\d,]*\})?(?: \(phi\))? @0> \(size=(\d+),offset=(\d+)\): (\S+)", line
        )
        if value is None:
            continue
        op = ops.get(value[1])
        here = (allocation, int(value[3]))
        made = Buffer(
            int(value[2]), value[4].partition("{")[0], op.op_name if op else value[1], op.source if op else ""
        )
        kept = places.get(here)
        if kept is None or made.bytes > kept.bytes or (made.bytes == kept.bytes and not kept.source and made.source):
            places[here] = made
    return tuple(sorted(places.values(), key=lambda b: -b.bytes)[:SHOWN])


def fitting_changes(model: Model, plan: Plan, needed: int, usable_bytes: int) -> tuple[Mapping[str, Any], ...]:
    """Changes of a plan that is too large with which it is expected to fit, the fastest first; of each kind one."""
    now = estimate_plan(model, plan)
    scale = max(1.0, needed / max(1, now.bytes_per_device))
    out: dict[Any, Mapping[str, Any]] = {}
    for change in changes(model, plan, scale=scale, budget_bytes=usable_bytes):
        row = {
            "set": change.text,
            "bytes": change.bytes_per_device,
            "spare": usable_bytes - change.bytes_per_device,
            "slower": change.seconds / now.seconds_per_step,
        }
        out.setdefault(tuple(change.settings), row)
    return tuple(out.values())
