"""Small programs that all devices run at once, timed: products, streams, elementwise chains, launches, collectives.

    measurements = measure(devices, Effort())

Each program repeats one operation in a loop whose number of trips is an argument, and each trip needs the one before.
Seconds of one operation are the difference of two runs over the difference of their trips, so that starting a program
and waiting for it count for nothing. The devices are all busy at the same time: where they share something (virtual
devices share cores, GPUs a network card) each is measured with its share.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from search.collectives import Kind
from sharding_rules import AXES, DATA, TENSOR, MeshShape, make_mesh

COLLECTIVES: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute")
DTYPES = ("float32", "bfloat16")
CHAIN = 32
"""Operations in a row in one trip of a chain."""
VECTOR_FLOPS = 2 * CHAIN
"""Of one element in one trip of the chain of multiplications and additions."""
OVERLAP = ("product", "gather", "both")
"""What is measured of the overlap of compute and collectives: an index into this is the measurement's size."""
STREAMED = 3
"""Arrays that one trip of the stream moves: two are read, one is written."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: pairs of runs of each program; the median counts.
        run_seconds: of the shorter run of a pair, where one trip is not longer.
        longest_seconds: of one operation: sizes grow until it is reached.
    """

    repeats: int = 5
    run_seconds: float = 3e-3
    longest_seconds: float = 8e-3


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One operation on every device at once (measured).

    Attributes:
        what: "product", "stream", "vector", "transcendental", "launch", "overlap", or a kind of collective.
        dtype: of its arrays.
        sizes: (m, n, k) of a product; bytes of one array, or of a collective's whole buffer on one device.
        group: (members, stride) of a collective.
        seconds: median of the pairs of runs.
        low, high: their quartiles.
    """

    what: str
    dtype: str
    sizes: tuple[int, ...]
    group: tuple[int, int]
    seconds: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class _Program:
    """A loop over `trip`, which maps a tuple of arrays of one device to the next one; `shapes` are those arrays'."""

    what: str
    dtype: str
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    trip: Callable[[Any], Any]
    operations: int = 1
    mesh: MeshShape | None = None
    group: tuple[int, int] = (1, 1)


def measure(
    devices: Sequence[Any], effort: Effort, *, progress: Callable[[str], None] = lambda _: None
) -> list[Measurement]:
    """Measure everything, in rounds: what else the machine does in one of them counts for all programs alike.

    Args:
        devices: all of them are used at once. Every process calls this.
        effort: how long to measure.
        progress: is told what is going on.
    """
    bench = _Bench(devices, effort)
    progress("matrix products")
    for dtype in DTYPES:
        largest = bench.grow([_product(dtype, n, n, n) for n in _doubling(32, 16384)], at_least=4).sizes[0]
        for thin in ((largest // 16, largest, largest), (largest, largest // 16, largest)):
            bench.grow([_product(dtype, *thin)])
    progress("memory, arithmetic and launches")
    # A loop over less would stay in the caches, as what a training step moves does not.
    bench.grow([_stream(2**i) for i in (22, 23, 25, 27)], at_least=2)
    bench.grow([_vector(2**17)])
    bench.grow([_transcendental(2**17)])
    bench.grow([_launch()])
    for size in (n for n in _doubling(2, len(devices)) if len(devices) % n == 0):
        for stride in sorted({1, len(devices) // size}):
            progress(f"collectives over groups of {size}, every {stride}" if stride > 1 else f"... groups of {size}")
            for kind in COLLECTIVES:
                sizes = (4**i for i in range(6, 14, 2))
                bench.grow([_collective(kind, size, stride, len(devices), n) for n in sizes], at_least=2)
    if len(devices) > 1:
        _overlap(bench, len(devices))
    return bench.rounds(progress)


class _Bench:
    """Programs that are ready to run, and their times."""

    def __init__(self, devices: Sequence[Any], effort: Effort):
        self.devices, self.effort = list(devices), effort
        self.ready: list[tuple[_Program, _Loop, int]] = []

    def grow(self, programs: Iterable[_Program], *, at_least: int = 1) -> _Program:
        """Make programs of growing size ready until one takes so long that the next would take too long."""
        for made, program in enumerate(programs, 1):
            seconds = self.add(program)
            if made >= at_least and seconds > self.effort.longest_seconds / 4:
                break
        return self.ready[-1][0]

    def add(self, program: _Program) -> float:
        """Compile a program and find how many trips take long enough; returns seconds of a trip."""
        loop = _Loop(program, make_mesh(program.mesh or MeshShape(data=len(self.devices)), self.devices))
        with loop:
            self._seconds(loop, 1)
            trips, spent = 1, self._seconds(loop, 1)
            while spent < self.effort.run_seconds and trips < 2**14:
                trips = min(2**14, trips * max(2, min(8, int(self.effort.run_seconds / spent))))
                spent = self._seconds(loop, trips)
        self.ready.append((program, loop, trips))
        return spent / trips

    def rounds(self, progress: Callable[[str], None]) -> list[Measurement]:
        """Time every program once per round."""
        samples: list[list[float]] = [[] for _ in self.ready]
        for i in range(self.effort.repeats):
            progress(f"round {i + 1} of {self.effort.repeats}: {len(self.ready)} programs")
            for (program, loop, trips), found in zip(self.ready, samples, strict=True):
                with loop:
                    self._seconds(loop, 1)
                    # The order changes, so that what the first run of a pair finds warm or cold counts both ways.
                    order = sorted((trips, 3 * trips), reverse=bool(i % 2))
                    spent = {n: self._seconds(loop, n) for n in order}
                difference = max(spent[3 * trips] - spent[trips], 0.05 * spent[3 * trips])
                found.append(difference / (2 * trips * program.operations))
        out = []
        for (program, _, _), found in zip(self.ready, samples, strict=True):
            low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
            out.append(Measurement(program.what, program.dtype, program.sizes, program.group, middle, low, high))
        return out

    def _seconds(self, loop: _Loop, trips: int) -> float:
        """Of a run; those of the first process, since what they decide every process has to decide."""
        seconds = loop.seconds(trips)
        if jax.process_count() == 1:
            return seconds
        return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


class _Loop:
    """A compiled program; as a context it holds its arrays."""

    def __init__(self, program: _Program, mesh: Mesh):
        split = P(AXES)
        sharding, replicated = NamedSharding(mesh, split), NamedSharding(mesh, P())
        count = len(program.shapes)

        def arrays() -> tuple[jax.Array, ...]:
            # Dense, bounded and not constant: what chips draw, and with it their clock, depends on the values.
            return tuple(
                (0.5 * jnp.cos(jnp.arange(math.prod(shape), dtype=jnp.float32))).reshape(shape).astype(program.dtype)
                for shape in ((mesh.size * first, *rest) for first, *rest in program.shapes)
            )

        def body(trips: jax.Array, *arrays: jax.Array) -> Any:
            return jax.lax.fori_loop(0, trips, lambda _, carry: program.trip(carry), arrays)

        looped = jax.shard_map(
            body, mesh=mesh, in_specs=(P(), *[split] * count), out_specs=(split,) * count, check_vma=False
        )
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in jax.eval_shape(arrays)]
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        self._make = jax.jit(arrays, out_shardings=(sharding,) * count).lower().compile()
        self._run = jax.jit(looped).lower(number, *shapes).compile()
        self._replicated = replicated
        self._arrays: Any = ()

    def __enter__(self) -> _Loop:
        self._arrays = self._make()
        return self

    def __exit__(self, *_: Any) -> None:
        self._arrays = ()

    def seconds(self, trips: int) -> float:
        """Of one run with so many trips."""
        number = jax.device_put(jnp.int32(trips), self._replicated)
        jax.block_until_ready((number, self._arrays))
        start = time.perf_counter()
        jax.block_until_ready(self._run(number, *self._arrays))
        return time.perf_counter() - start


def _doubling(first: int, last: int) -> list[int]:
    return [first * 2**i for i in range((last // first).bit_length()) if first * 2**i <= last]


def _product(dtype: str, m: int, n: int, k: int) -> _Program:
    """(m, k) by (k, n), and back by the transposed sizes: two products of the same cost in the model."""

    def trip(carry: Any) -> Any:
        x, w, back = carry
        for _ in range(pairs):
            x = (x @ w) @ back
        return x * jnp.asarray(1 / k, x.dtype), w, back

    pairs = 4 if m * n * k < 2**21 else 1
    return _Program("product", dtype, (m, n, k), ((m, k), (k, n), (n, k)), trip, 2 * pairs)


def _stream(elements: int) -> _Program:
    def trip(carry: Any) -> Any:
        x, y = carry
        return 0.5 * x + y, y

    return _Program("stream", "float32", (4 * elements,), ((elements,), (elements,)), trip)


def _vector(elements: int) -> _Program:
    def trip(carry: Any) -> Any:
        (x,) = carry
        for i in range(CHAIN):
            x = x * (0.5 + 1e-3 * i) + 0.25
        return (x,)

    return _Program("vector", "float32", (4 * elements,), ((elements,),), trip)


def _transcendental(elements: int) -> _Program:
    def trip(carry: Any) -> Any:
        (x,) = carry
        for _ in range(4):
            x = jnp.tanh(jnp.exp(-x))
        return (x,)

    return _Program("transcendental", "float32", (4 * elements,), ((elements,),), trip, 8)


def _launch() -> _Program:
    def trip(carry: Any) -> Any:
        x, w = carry
        for _ in range(CHAIN):
            x = x @ w
        return x, w

    return _Program("launch", "float32", (8, 8, 8), ((8, 8), (8, 8)), trip, CHAIN)


def _collective(kind: Kind, size: int, stride: int, devices: int, elements: int) -> _Program:
    consecutive = stride == 1
    mesh = MeshShape(data=devices // size, tensor=size) if consecutive else MeshShape(data=size, tensor=stride)
    axis = TENSOR if consecutive else DATA

    def trip(carry: Any) -> Any:
        (x,) = carry
        return (_moved(x, kind, axis, size),)

    return _Program(kind, "float32", (4 * elements,), ((elements,),), trip, 1, mesh, (size, stride))


def _moved(x: jax.Array, kind: Kind, axis: str, size: int) -> jax.Array:
    """A collective whose whole buffer has the shape of `x`."""
    shard = x.shape[0] // size
    if kind == "all_reduce":
        return jax.lax.psum(x, axis)
    if kind == "all_gather":
        return jax.lax.all_gather(x[:shard], axis, tiled=True)
    if kind == "reduce_scatter":
        return x.at[:shard].set(jax.lax.psum_scatter(x, axis, tiled=True))
    if kind == "all_to_all":
        return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _overlap(bench: _Bench, devices: int) -> None:
    """A product alone, a gather alone, and the two side by side in one program; about as long as each other."""

    def product(carry: Any) -> Any:
        x, w, y = carry
        return (x @ w) * jnp.asarray(1 / w.shape[0], x.dtype), w, y

    def gather(carry: Any) -> Any:
        x, w, y = carry
        return x, w, _moved(y, "all_gather", DATA, devices)

    def both(carry: Any) -> Any:
        (x, w, _), (_, _, y) = product(carry), gather(carry)
        return x, w, y

    def program(trip: Callable[[Any], Any], n: int) -> _Program:
        size = (OVERLAP.index(trip.__name__),)
        return _Program("overlap", "float32", size, ((n, n), (n, n), (4**8,)), trip, 1, None, (devices, 1))

    gathered = bench.add(program(gather, n := 64))
    while n < 8192 and bench.add(program(product, n)) < gathered:
        bench.ready.pop()
        n *= 2
    bench.add(program(both, n))
