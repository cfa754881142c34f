"""Reads the scheduled, partitioned programs that XLA prints for TPUs, GPUs and CPUs (HLO text).

    module = parse(text)                                   # computations, ops, their source lines
    for found in collectives(module, mesh): ...            # payload bytes per device, times per step, mesh axes
    flops(module)                                          # of matrix products, per device and step

`search.hlo_text` reads the text, `search.hlo_loops` counts iterations, `search.hlo_products` flops and
`search.replica_groups` reads the groups; `search.roofline` makes seconds of the schedule. Of collectives on TPUs:

- One asynchronous all-gather is spread over fusions: one starts it (`AsyncCollectiveStart`), others carry a part of it
  along with their own work, one ends it (`AsyncCollectiveDone`). It counts once (`Module.exchanges`).
- A reduce-scatter is a fusion of an all-reduce and the slice of it that the device keeps.
- With several slices the program is that of one slice; what goes between them are sends to the hosts
  (`_xla_megascale_transfer_type`), which end at the receive of the same rendezvous.
- Where the compiler made an all-reduce of a gather or of a reduce-scatter (three dimensions of a torus), an all-reduce
  is reported: that is what runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from search import collectives as analytic
from search.hlo_loops import trips
from search.hlo_products import Product, products
from search.hlo_text import HOST_SPACE, Computation, Frame, Op, Program, Shape, bits_of, read
from search.replica_groups import axes_of, device_numbers, factor, parse_groups, runs_backward, steps_of
from sharding_rules import MeshShape

__all__ = [
    "HOST_SPACE",
    "KINDS",
    "Collective",
    "Computation",
    "Exchange",
    "Frame",
    "Module",
    "Op",
    "Product",
    "Shape",
    "bits_of",
    "by_axis",
    "collective",
    "collectives",
    "flops",
    "parse",
    "products",
]

Role = Literal["blocking", "start", "carry", "done"]
KINDS: Mapping[str, analytic.Kind] = {
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-gather": "all_gather",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
    "collective-broadcast": "permute",
}
SLICE_KINDS: Mapping[str, analytic.Kind] = {
    "ALL_REDUCE": "all_reduce",
    "REDUCE_SCATTER": "reduce_scatter",
    "ALL_GATHER": "all_gather",
    "ALL_TO_ALL": "all_to_all",
    "ONE_TO_ONE": "permute",
}
"""Collectives between slices of TPUs: the program of one slice sends its part to the hosts, which do the rest."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a scheduled op has to do with collectives.

    Attributes:
        role: it blocks, starts, carries along (a fusion between start and done) or ends one.
        start: the op that started it (itself where it blocks or starts).
        ops: the collectives, as (kind, op); of one that carries or ends none.
    """

    role: Role
    start: str
    ops: tuple[tuple[analytic.Kind, Op], ...] = ()


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a step.

    Attributes:
        axes: mesh axes of its groups, outermost first; none where every device is alone.
        sizes, strides: of a group in device numbers, as `search.collectives` takes them.
        bytes: payload of one execution per device, as `search.collectives` has it: operand of an all-reduce,
            reduce-scatter, all-to-all or permute, result of an all-gather.
        times: executions per step.
        asynchronous: it runs beside other ops from its start to its done.
        op_name, source: operation and line of the program.
        shapes: of its results, as text.
        name, computation: of the op in the text.
        across: it leaves the slice, by way of the hosts.
        backward: of a permute, whether it goes down along its axes: the other direction of the same links.
    """

    kind: analytic.Kind
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    bytes: int
    times: int
    asynchronous: bool
    op_name: str
    source: str
    shapes: str
    name: str
    computation: str
    across: bool = False
    backward: bool = False

    @property
    def size(self) -> int:
        """Devices of a group."""
        return math.prod(self.sizes)


class Module(Program):
    """A program with its loops and collectives."""

    @functools.cached_property
    def loops(self) -> list[Op]:
        return [op for computation in self.computations.values() for op in computation.ops if op.opcode == "while"]

    def trips(self, loop: Op) -> int | None:
        """Iterations of a loop: as the compiler wrote them, else from its condition; None where neither tells."""
        key = "trips", loop.computation, loop.name
        if key not in self.memo:
            self.memo[key] = trips(self, loop)
        return self.memo[key]

    def unknown_loops(self) -> list[Op]:
        """Loops that run in a step and whose trip count the text does not tell; `executions` counts one iteration."""
        times = self.executions()
        return [loop for loop in self.loops if times.get(loop.computation) and self.trips(loop) is None]

    def executions(self) -> dict[str, int]:
        """Computation -> how often a step runs it. Of a conditional's branches the one with most flops runs.

        Bodies of fusions, reductions, sorts and the like do not run on their own.
        """
        return dict(self._executions)

    @functools.cached_property
    def _executions(self) -> Counter[str]:
        times: Counter[str] = Counter()

        def visit(name: str, count: int) -> None:
            if name not in self.computations or not count:
                return
            times[name] += count
            for op in self.computations[name].ops:
                for callee, often in self.runs(op):
                    visit(callee, count * often)

        visit(self.entry.name, 1)
        return times

    def runs(self, op: Op) -> list[tuple[str, int]]:
        """(computation, times) that an op runs as part of the schedule."""
        if op.opcode == "while":
            often = self.trips(op)
            return [(name, 1 if often is None else often) for name in op.callees("body", "condition")]
        if op.opcode == "conditional":
            branches = op.callees("branch_computations", "true_computation", "false_computation")
            return [(max(branches, key=self._weight), 1)] if branches else []
        if op.opcode == "call":
            return [(name, 1) for name in op.callees("to_apply", "calls")]
        return []

    def _weight(self, name: str) -> tuple[int, int]:
        inside = list(self.within(name))
        return sum(p.flops for op in inside for p in products(self, op)), len(inside)

    def exchanges(self, computation: Computation) -> dict[str, Exchange]:
        """Scheduled op -> the collectives that it blocks for, starts, carries along or ends."""
        key = "exchanges", computation.name
        if key not in self.memo:
            self.memo[key] = _exchanges(self, computation)
        return self.memo[key]


def parse(text: str) -> Module:
    """Read a program.

    Raises:
        ValueError: no entry computation; an op that is cut off (a dump that was still being written).
    """
    program = read(text)
    return Module(program.name, program.entry, program.computations, program.devices, program.header)


def _exchanges(module: Module, computation: Computation) -> dict[str, Exchange]:
    out: dict[str, Exchange] = {}
    sends: dict[str, str] = {}
    for op in computation.ops:
        base = op.opcode.removesuffix("-start")
        if op.opcode in KINDS:
            out[op.name] = Exchange("blocking", op.name, ((KINDS[op.opcode], op),))
        elif base in KINDS:
            role = "blocking" if _is_sync(op) else "start"
            out[op.name] = Exchange(role, op.name, ((KINDS[base], op),))
        elif op.opcode == "send" and (kind := SLICE_KINDS.get(_handler(op, "xla_megascale_transfer_type"))):
            out[op.name] = Exchange("start", op.name, ((kind, op),))
            sends[_handler(op, "xla_host_transfer_rendezvous")] = op.name
        elif op.opcode == "recv-done" and (receive := computation.operand(op, 0)):
            if start := sends.get(_handler(receive, "xla_host_transfer_rendezvous")):
                out[op.name] = Exchange("done", start)
        elif op.opcode.endswith(("-done", "-update")) and op.opcode != "send-done":
            started = out.get(op.operands[0]) if op.operands else None
            if started and started.role in ("start", "carry"):
                out[op.name] = Exchange("done" if op.opcode.endswith("-done") else "carry", started.start)
        elif op.opcode == "fusion" or op.opcode.endswith("-start"):
            found = _fused(module, computation, op, out)
            if found:
                out[op.name] = found
    return out


def _handler(op: Op, key: str) -> str:
    """What an op tells the hosts of its slice."""
    found = re.search(rf'_{key}="([^"]*)"', op.attributes)
    return found[1] if found else ""


def _is_sync(op: Op) -> bool:
    """GPU text: started and ended in one go."""
    config = (op.backend_config or {}).get("collective_backend_config") or {}
    return bool(config.get("is_sync"))


def _fused(module: Module, computation: Computation, op: Op, before: Mapping[str, Exchange]) -> Exchange | None:
    """What a fusion, or an asynchronous call of a computation, does."""
    inside = [inner for name in op.callees("calls", "called_computations") for inner in module.within(name)]
    found = [inner for inner in inside if inner.opcode.removesuffix("-start") in KINDS]
    if not found:
        return None
    kinds: tuple[tuple[analytic.Kind, Op], ...] = tuple((_kind(module, inner), inner) for inner in found)
    if op.opcode != "fusion":
        return Exchange("start", op.name, kinds)
    targets = {inner.target for inner in inside}
    if "AsyncCollectiveStart" in targets:
        return Exchange("start", op.name, kinds)
    if "AsyncCollectiveDone" in targets or all(
        '"async_collective_fusion_config"' in inner.attributes for inner in found
    ):
        role: Role = "done" if "AsyncCollectiveDone" in targets else "carry"
        return Exchange(role, _continued(computation, op, before))
    return Exchange("blocking", op.name, kinds)


def _continued(computation: Computation, op: Op, before: Mapping[str, Exchange]) -> str:
    """The start of the collective whose state a fusion takes, through tuples and loops; "" if it is further out."""
    for name in op.operands:
        made, index = computation.by_name.get(name), 0
        while made is not None and made.opcode in ("get-tuple-element", "bitcast", "while"):
            if made.opcode == "while":
                carry = computation.operand(made, 0)
                made = computation.operand(carry, index) if carry and carry.opcode == "tuple" else None
                continue
            index = made.number("index", 0) if made.opcode == "get-tuple-element" else index
            made = computation.operand(made, 0)
        state = before.get(made.name) if made else None
        if state and state.role in ("start", "carry"):
            return state.start
    return ""


def _kind(module: Module, op: Op) -> analytic.Kind:
    """An all-reduce of which the device keeps a slice is a reduce-scatter."""
    kind = KINDS[op.opcode.removesuffix("-start")]
    return "reduce_scatter" if kind == "all_reduce" and _is_scattered(module.computations[op.computation], op) else kind


def _is_scattered(computation: Computation, op: Op) -> bool:
    users = computation.users[op.name]
    through = ("get-tuple-element", "bitcast", "reshape", "convert", "copy")
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in through and _is_scattered(computation, user))
        for user in users
    )


def collectives(module: Module, mesh: MeshShape | Mapping[str, int], *, order: Sequence[str] = ()) -> list[Collective]:
    """The collectives of a step, in the order of the text; loops as often as they run.

    Args:
        mesh: devices per axis, as the program was compiled for them.
        order: axes, outermost first, as they are laid out over the device numbers; default as in `mesh`.

    Raises:
        ValueError: the mesh has not the program's devices.
    """
    times = module.executions()
    out = []
    for name, computation in module.computations.items():
        for op_name, exchange in module.exchanges(computation).items() if times.get(name) else ():
            for kind, op in exchange.ops:
                said = _said(computation, computation.by_name[op_name]) if not op.op_name else op
                sized = dataclasses.replace(
                    collective(module, mesh, kind, op, order=order),
                    op_name=said.op_name,
                    source=said.source,
                    times=times[name],
                    asynchronous=exchange.role == "start",
                    name=op_name,
                    computation=name,
                )
                out.append(sized)
    return out


def collective(
    module: Module, mesh: MeshShape | Mapping[str, int], kind: analytic.Kind, op: Op, *, order: Sequence[str] = ()
) -> Collective:
    """One execution of a collective op."""
    sizes = mesh.sizes if isinstance(mesh, MeshShape) else mesh
    total = math.prod(sizes.values())
    across = op.opcode == "send"  # The same device of every slice.
    groups = np.arange(0, total, module.devices)[None, :] if across else parse_groups(op.attributes, total)
    if groups.size and int(groups.max()) >= total:
        raise ValueError(f"{op.name} has device {int(groups.max())}, and the mesh {dict(sizes)} has {total} devices")
    devices = device_numbers(sizes, order)
    if kind == "permute" and not across:
        shape = steps_of(groups, sizes, devices)
        members = 1
    else:
        shape = factor(devices[groups[0]].tolist())
        members = groups.shape[1]
    results = _results(op)
    return Collective(
        kind=kind,
        axes=axes_of(groups, sizes),
        sizes=shape[0],
        strides=shape[1],
        bytes=_payload(module.computations[op.computation], op, kind, members),
        times=1,
        asynchronous=False,
        op_name=op.op_name,
        source=op.source,
        shapes=" ".join(map(str, results)),
        name=op.name,
        computation=op.computation,
        across=across,
        backward=kind == "permute" and not across and runs_backward(groups, sizes),
    )


def _said(computation: Computation, op: Op) -> Op:
    """The op itself, or, where the compiler wrote no name, the nearest before it that has one."""
    at: Op | None = op
    while at is not None and not at.op_name:
        at = computation.operand(at, 0)
    return at or op


def _results(op: Op) -> tuple[Shape, ...]:
    """Shapes of a collective's results; those of a start follow its operands, and its state follows them."""
    if op.opcode == "send":
        return op.shapes[:1]
    shapes = tuple(shape for shape in op.shapes if shape.dims or not shape.dtype.startswith(("u32", "token")))
    if op.opcode.endswith("-start") and op.opcode != "all-reduce-start" and len(shapes) > 1:
        return shapes[len(shapes) // 2 :]
    return shapes


def _payload(computation: Computation, op: Op, kind: analytic.Kind, members: int) -> int:
    operands = [computation.by_name.get(name) for name in op.operands]
    if op.opcode.startswith("ragged") or op.opcode == "send":
        operands = operands[:1]
    if operands and all(operands):
        size = sum(operand.bytes for operand in operands if operand)
        return size * members if kind == "all_gather" else size
    size = sum(shape.bytes for shape in _results(op))
    return size * members if op.opcode.startswith("reduce-scatter") else size


def by_axis(found: Iterable[Collective]) -> Counter[tuple[str, tuple[str, ...]]]:
    """(kind, mesh axes) -> bytes per device and step."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in found:
        total[c.kind, c.axes] += c.bytes * c.times
    return total


def flops(module: Module) -> int:
    """Flops of matrix products per device and step, kernels included (see `Product`)."""
    return sum(
        count * sum(product.flops for op in module.computations[name].ops for product in products(module, op))
        for name, count in module.executions().items()
    )
