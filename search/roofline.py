"""Seconds of a compiled step by roofline over its schedule: two streams, compute and communication (compiled).

    time = step_seconds(parse(text), cluster, mesh)
    time.seconds, time.compute_seconds["product"], time.exposed_seconds["fsdp"], time.hidden_seconds

The ops of the scheduled program run one after another, those of loops as often as they run. An op takes the longer of
its matrix products and of its bytes to and from memory. A collective that blocks waits for what is before it and holds
up what comes after; an asynchronous one runs from its start on and is waited for at its done. Collectives run one at a
time, in the time that `search.collectives` gives them, but for those that share no link: on a torus, permutes in
opposite directions, and what goes between slices by way of the hosts.

Copies that the compiler starts ahead (prefetches into a TPU's on-chip memory) have a stream of their own, which gets
the memory bandwidth that ops leave over: memory is never faster than it is. Buffers on the chip cost nothing.

`PRODUCT_SHARE`, `MEMORY_SHARE` and `KERNEL_SHARE` were set before any comparison with measured steps: big products in
XLA:TPU's own cycle estimates run at 0.92 to 0.96 of the peak. GPUs attain much less of theirs: their products take what
`search.efficiency` has for their sizes, fitted on published runs. Launches and loops cost nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from search.cluster import Cluster
from search.collectives import collective_seconds
from search.efficiency import Efficiency
from search.hlo import Collective, Module, collective, products
from search.hlo_products import Product
from search.hlo_text import HOST_SPACE, Computation, Op, Shape, bits_of
from sharding_rules import MeshShape

PRODUCT_SHARE = 0.9
"""Of the peak, by matrix products."""
MEMORY_SHARE = 0.85
"""Of the memory bandwidth."""
KERNEL_SHARE = 0.5
"""Of the peak, by attention kernels."""
SLOWEST = 10
DTYPES = {"bf16": "bfloat16", "f16": "float16", "s8": "int8", "u8": "int8", "s4": "int8", "u4": "int8"}
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id optimization-barrier "
    "add-dependency domain send send-done recv recv-done async-update get-dimension-size".split()
)
FREE_CALLS = frozenset(
    "AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound AsyncCollectiveStart AsyncCollectiveDone Sharding "
    "SPMDFullToShardShape SPMDShardToFullShape X64Combine X64SplitLow X64SplitHigh SliceId "
    "PrepareAsyncCallStart PrepareAsyncCallDone".split()
)
KNOWN_CALLS = frozenset(
    "GatherScatterIndicesBitpacked ragged-dot-metadata ZeroCrop SliceToDynamic PadToStatic TopK __cub$DeviceRadixSort "
    "mha_preprocess_backward".split()
)
"""Calls whose work is their memory traffic."""
SLICES = frozenset("slice dynamic-slice gather".split())
VIEWS = frozenset("bitcast reshape convert transpose copy".split())


@dataclasses.dataclass(frozen=True)
class CollectiveTime:
    """A collective of the step: `seconds` and the part of them that is waited for, of one execution."""

    collective: Collective
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class OpTime:
    """An op: seconds of all its executions in a step."""

    name: str
    kind: str
    seconds: float
    times: int
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True)
class HloTime:
    """Seconds of a step, from its compiled program.

    Attributes:
        compute_seconds: by kind: "product", "attention", "ragged", "memory", "copy"; "prefetch" is waiting for one.
        exposed_seconds: waiting for collectives, by mesh axes joined with "+".
        hidden_seconds: of collectives that run beside compute.
        wire_seconds: that each wire is busy: of a torus both directions of its links and the network between slices.
        flops: of matrix products and kernels; bytes: to and from memory. Per device.
        slowest: the ops that take longest.
        collectives: in schedule order of their computations.
        unknown: what is not in the seconds or only as its memory traffic: calls, loops of unknown length, host copies.
    """

    seconds: float
    compute_seconds: dict[str, float]
    exposed_seconds: dict[str, float]
    hidden_seconds: float
    flops: int
    bytes: int
    slowest: tuple[OpTime, ...]
    collectives: tuple[CollectiveTime, ...]
    unknown: tuple[str, ...]
    wire_seconds: dict[str, float]
    label: str = "compiled"


def step_seconds(
    module: Module, cluster: Cluster, mesh: MeshShape | Mapping[str, int], *, order: Sequence[str] = ()
) -> HloTime:
    """Return the seconds of a step.

    Args:
        module: the program of one device (of one slice, where there are several).
        cluster: that it was compiled for.
        mesh, order: as `search.hlo.collectives` takes them.

    Raises:
        ValueError: a collective that reaches past the mesh or the cluster.
    """
    walk = _Walk(module, cluster, mesh, tuple(order))
    whole = walk.run(module.entry)
    times = module.executions()
    compute: defaultdict[str, float] = defaultdict(float)
    exposed: defaultdict[str, float] = defaultdict(float)
    hidden, flops, bytes_ = 0.0, 0, 0
    slowest: list[OpTime] = []
    found: list[CollectiveTime] = []
    for name, part in walk.parts.items():
        count = times.get(name, 0)
        flops += part.flops * count
        bytes_ += part.bytes * count
        for op, kind, each in part.ops:
            compute[kind] += each * count
            if kind != "prefetch":
                slowest.append(OpTime(op.name, kind, each * count, count, op.op_name, op.source))
        for taken in part.collectives:
            axes = "+".join(taken.collective.axes)
            exposed[axes] += taken.exposed_seconds * count
            hidden += max(0.0, taken.seconds - taken.exposed_seconds) * count
            found.append(dataclasses.replace(taken, collective=dataclasses.replace(taken.collective, times=count)))
    unknown = [*walk.unknown, *(f"loop {loop.name}: iterations unknown, 1 counted" for loop in module.unknown_loops())]
    return HloTime(
        seconds=whole.seconds,
        compute_seconds=dict(compute),
        exposed_seconds=dict(exposed),
        hidden_seconds=hidden,
        flops=flops,
        bytes=bytes_,
        slowest=tuple(sorted(slowest, key=lambda op: -op.seconds)[:SLOWEST]),
        collectives=tuple(found),
        unknown=tuple(dict.fromkeys(unknown)),
        wire_seconds=dict(whole.wire_seconds),
    )


@dataclasses.dataclass
class _Part:
    """What one execution of a computation takes, without the computations that it runs, but for `seconds`."""

    seconds: float = 0.0
    memory_seconds: float = 0.0
    wire_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    ops: list[tuple[Op, str, float]] = dataclasses.field(default_factory=list)
    collectives: list[CollectiveTime] = dataclasses.field(default_factory=list)


class _Clock:
    """The streams of one computation: the time now, when each wire is free, and copies that wait for memory."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wires: defaultdict[str, float] = defaultdict(float)
        self.copies: list[list[float | str]] = []

    def compute(self, seconds: float, memory: float) -> None:
        """Run an op that uses the memory for a part of its time; the rest goes to the copies."""
        self.now += seconds
        self._copy(max(0.0, seconds - memory))

    def wait(self, until: float) -> float:
        """Idle until a time; the seconds that it takes."""
        idle = max(0.0, until - self.now)
        self.compute(idle, 0.0)
        return idle

    def send(self, seconds: float, wires: Iterable[str]) -> float:
        """Put a collective on its wires, when all of them are free; the time when it is done."""
        ends = max(self.now, *(self.wires[wire] for wire in wires)) + seconds
        self.wires.update(dict.fromkeys(wires, ends))
        return ends

    def _copy(self, seconds: float) -> None:
        while self.copies and seconds > 0:
            taken = min(seconds, float(self.copies[0][1]))
            self.copies[0][1] = float(self.copies[0][1]) - taken
            seconds -= taken
            if float(self.copies[0][1]) <= 0:
                self.copies.pop(0)

    def fetched(self, name: str) -> float:
        """Wait for a copy and those before it."""
        names = [copy[0] for copy in self.copies]
        if name not in names:
            return 0.0
        return self.wait(self.now + sum(float(copy[1]) for copy in self.copies[: names.index(name) + 1]))


class _Walk:
    """Walks the schedule of every computation once; `parts` has what each takes."""

    def __init__(
        self, module: Module, cluster: Cluster, mesh: MeshShape | Mapping[str, int], order: tuple[str, ...]
    ) -> None:
        self.module, self.cluster, self.mesh, self.order = module, cluster, mesh, order
        self.on_chip = cluster.accelerator.kind == "tpu"
        self.bandwidth = MEMORY_SHARE * cluster.accelerator.memory_bytes_per_second
        self.attained = cluster.efficiency or Efficiency.for_accelerator(cluster.accelerator)
        self.parts: dict[str, _Part] = {}
        self.unknown: list[str] = []

    def run(self, computation: Computation) -> _Part:
        if computation.name in self.parts:
            return self.parts[computation.name]
        part, clock = _Part(), _Clock()
        exchanges = self.module.exchanges(computation)
        started: dict[str, tuple[float, list[tuple[Collective, float]]]] = {}
        for op in computation.ops:
            exchange = exchanges.get(op.name)
            if exchange and exchange.role == "done":
                ends, sent = started.pop(exchange.start, (clock.now, []))
                self._waited(part, sent, clock.wait(ends))
            elif exchange and exchange.role in ("start", "blocking"):
                if op.opcode == "fusion":
                    self._compute(part, clock, computation, op)
                sent = [self._sent(computation, kind, inner) for kind, inner in exchange.ops]
                ends = max(clock.send(seconds, self._wires(taken)) for taken, seconds in sent)
                sent = [(dataclasses.replace(c, asynchronous=exchange.role == "start"), seconds) for c, seconds in sent]
                if exchange.role == "start":
                    started[op.name] = ends, sent
                else:
                    self._waited(part, sent, clock.wait(ends))
            elif self.module.runs(op):
                self._inner(part, clock, op)
            elif op.opcode.endswith("-start"):
                moved = self._copied(computation, op)
                part.bytes += moved
                part.memory_seconds += moved / self.bandwidth
                clock.copies.append([op.name, moved / self.bandwidth])
            elif op.opcode.endswith("-done") and op.operands:
                waited = clock.fetched(op.operands[0])
                if waited:
                    part.ops.append((op, "prefetch", waited))
            else:
                self._compute(part, clock, computation, op)
        for ends, sent in started.values():  # Ended in a computation around this one, or not at all.
            self._waited(part, sent, clock.wait(ends) if computation is self.module.entry else 0.0)
        part.seconds = clock.now
        for taken in part.collectives:
            self._occupy(part, dict.fromkeys(self._wires(taken.collective), taken.seconds))
        self.parts[computation.name] = part
        return part

    def _inner(self, part: _Part, clock: _Clock, op: Op) -> None:
        """Run the computations of a loop, a call or a conditional."""
        for name, times in self.module.runs(op):
            inner = self.run(self.module.computations[name])
            clock.compute(inner.seconds * times, min(inner.memory_seconds, inner.seconds) * times)
            part.memory_seconds += inner.memory_seconds * times
            for wire, seconds in inner.wire_seconds.items():
                clock.wires[wire] = max(clock.wires[wire], clock.now - inner.seconds * times) + seconds * times
            self._occupy(part, {wire: seconds * times for wire, seconds in inner.wire_seconds.items()})

    def _occupy(self, part: _Part, seconds: Mapping[str, float]) -> None:
        part.wire_seconds |= {wire: part.wire_seconds.get(wire, 0.0) + more for wire, more in seconds.items()}

    def _wires(self, taken: Collective) -> tuple[str, ...]:
        """The wires that a collective has to itself.

        A torus link carries as much one way while it carries the other way (Wang et al. 2023, ASPLOS: the compiler
        splits a product over a ring into two permutes in opposite directions for that). Elsewhere a device sends all
        it sends through one port.
        """
        if self.cluster.torus is None:
            return ("port",)
        if taken.across:
            return ("network",)
        return (("backward" if taken.backward else "forward"),) if taken.kind == "permute" else ("forward", "backward")

    def _waited(self, part: _Part, sent: Sequence[tuple[Collective, float]], waited: float) -> None:
        """Note collectives that were waited for together."""
        total = sum(seconds for _, seconds in sent)
        for taken, seconds in sent:
            part.collectives.append(CollectiveTime(taken, seconds, waited * seconds / total if total else 0.0))

    def _sent(self, computation: Computation, kind: str, op: Op) -> tuple[Collective, float]:
        found = collective(self.module, self.mesh, kind, op, order=self.order)  # type: ignore[arg-type]
        return found, _wire_seconds(self.cluster, found.kind, found.bytes, found.sizes, found.strides)

    def _compute(self, part: _Part, clock: _Clock, computation: Computation, op: Op) -> None:
        if op.opcode in FREE or op.target in FREE_CALLS:
            return
        made = products(self.module, op)
        product_seconds = sum(p.flops * p.slowest * p.passes / (self._peak(p.dtype) * self._share(p)) for p in made)
        if op.opcode == "custom-call" and not made and not self._is_known(op):
            self.unknown.append(
                f"custom call {op.target} ({op.op_name.rpartition('/')[2] or op.name}): memory traffic only"
            )
        moved = self._moved(computation, op)
        memory_seconds = moved / self.bandwidth
        seconds = max(product_seconds, memory_seconds)
        part.flops += sum(p.flops for p in made)
        part.bytes += moved
        part.memory_seconds += memory_seconds
        clock.compute(seconds, memory_seconds)
        kernels = [p.kernel for p in made if p.kernel]
        kind = kernels[0] if kernels else "product" if made else "copy" if op.opcode == "copy" else "memory"
        part.ops.append((op, kind, seconds))

    def _share(self, product: Product) -> float:
        """Share of the peak that a product attains."""
        if product.kernel == "attention":
            return KERNEL_SHARE
        if self.cluster.accelerator.kind != "gpu":
            return PRODUCT_SHARE
        if not product.sizes:
            return self.attained.matmul
        m, n, k = product.sizes
        batch = max(1.0, product.flops / (2 * m * n * k))
        return float(self.attained.product(m, n, k, batch=batch))

    def _is_known(self, op: Op) -> bool:
        said = {op.target, *op.op_name.split("/"), op.name.rpartition(".")[0]}
        return bool(said & KNOWN_CALLS)

    def _peak(self, dtype: str) -> float:
        """Flops per second of one pass; float32 products take the bfloat16 unit of a TPU, the tfloat32 one of a GPU."""
        accelerator = self.cluster.accelerator
        peaks = dict(accelerator.peak_flops_per_second)
        if dtype == "f32":
            return accelerator.flops("bfloat16" if self.on_chip else "tfloat32" if "tfloat32" in peaks else "float32")
        name = DTYPES.get(dtype, "float8" if dtype.startswith("f8") else "float32")
        return (
            accelerator.flops(name)
            if name in peaks or name in ("float16", "bfloat16")
            else accelerator.flops("bfloat16")
        )

    # Bytes to and from memory.

    def _in_memory(self, shape: Shape) -> bool:
        return not self.on_chip or shape.memory_space in (0, HOST_SPACE)

    def _copied(self, computation: Computation, op: Op) -> int:
        """Of an asynchronous copy or slice: what it moves, once for each side that is in memory."""
        source = computation.operand(op, 0)
        target = op.shapes[0 if op.opcode == "copy-start" else min(1, len(op.shapes) - 1)]
        shapes = [source.shapes[0] if source else target, target]
        if any(shape.memory_space == HOST_SPACE for shape in shapes) and self.on_chip:
            self.unknown.append("copies to or from the host's memory: the link's seconds are not counted")
        return target.bytes * sum(self._in_memory(shape) for shape in shapes)

    def _moved(self, computation: Computation, op: Op) -> int:
        """Bytes that an op reads from and writes to memory."""
        if op.opcode == "fusion" and op.callees():
            return self._fusion(computation, op, self.module.computations[op.callees()[0]])
        operands = [computation.by_name[name] for name in op.operands if name in computation.by_name]
        if op.opcode == "dynamic-update-slice":
            update = operands[1].shapes[0]
            read = update.bytes * self._in_memory(update)
            return read + update.bytes * self._in_memory(op.shapes[0])
        if op.opcode == "scatter":
            updates = sum(o.bytes for o in operands[1:])
            return 2 * updates
        written = sum(shape.bytes for shape in op.shapes if self._in_memory(shape))
        if op.opcode in SLICES and operands:
            return written + op.bytes * self._in_memory(operands[0].shapes[0])
        return written + sum(s.bytes for o in operands for s in o.shapes if self._in_memory(s))

    def _fusion(self, computation: Computation, op: Op, body: Computation) -> int:
        total = 0
        for index, parameter in body.parameters.items():
            outer = computation.operand(op, index)
            shape = (outer or parameter).shapes[0]
            if self._in_memory(shape):
                total += _touched(self.module, body, parameter) * bits_of(shape.dtype) // 8
        root = body.root
        results = [body.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for shape, result in zip(op.shapes, results, strict=False):
            if self._in_memory(shape):
                total += _written(body, result) * bits_of(shape.dtype) // 8
        return total


@functools.lru_cache(maxsize=65536)
def _wire_seconds(cluster: Cluster, kind: str, bytes_: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> float:
    return float(collective_seconds(cluster, kind, bytes_, sizes, strides))  # type: ignore[arg-type]


def _touched(module: Module, body: Computation, op: Op) -> int:
    """Elements of a fused op that its users read: of a slice the slice, of what is passed on or updated none."""
    elements = op.shapes[0].elements if op.shapes else 0
    total = 0
    for user in body.users.get(op.name, ()):
        first = bool(user.operands) and user.operands[0] == op.name
        if user.opcode == "tuple" or (user.opcode in ("dynamic-update-slice", "scatter") and first):
            continue
        if user.opcode.removesuffix("-start") in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"):
            continue
        if user.target in FREE_CALLS:
            continue
        if user.opcode in SLICES and first:
            total += user.shapes[0].elements
        elif user.opcode in VIEWS and not user.root:
            total += _touched(module, body, user)
        elif user.opcode == "fusion" and user.callees():
            inner = module.computations[user.callees()[0]]
            total += sum(
                _touched(module, inner, inner.parameters[i])
                for i, name in enumerate(user.operands)
                if name == op.name and i in inner.parameters
            )
        else:
            return elements
    return min(total, elements)


def _written(body: Computation, op: Op) -> int:
    """Elements that a fusion writes for one of its results: of an update in place the update, of an operand none."""
    at: Op | None = op
    while at is not None and at.opcode in ("bitcast", "reshape", "get-tuple-element"):
        at = body.operand(at, 0)
    if at is None or at.opcode == "parameter" or at.target in FREE_CALLS:
        return 0
    if at.opcode.removesuffix("-start") in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"):
        return 0
    if at.opcode == "dynamic-update-slice":
        update = body.operand(at, 1)
        return update.shapes[0].elements if update else 0
    if at.opcode == "scatter":
        return sum(body.by_name[name].shapes[0].elements for name in at.operands[2:] if name in body.by_name)
    return op.shapes[0].elements if op.shapes else 0
