"""The work of a step as a table of operations: flops, bytes, logical axes, trip counts, per rematerialisation.

    traced = sharding_rules.trace(loss, params, batch, names=("params", "batch"))
    work = workload(traced, remat="full")
    work.flops, work.flops_by("phase")
    table = work.table()                               # numpy columns, one row per operation

A cost model takes an assignment of mesh axes to rows (names of logical axes) and divides:

    ways = np.where(table["axes"], mesh_sizes_of_rows, 1).prod(axis=1)
    flops_per_device = table["flops"] / ways

All figures are analytic, of the whole step on the traced batch, unsharded. Flops of products are exact, those of
elementwise operations count one per element; bytes follow the rule of fusion of `search.fusion`. Rows of a loop's body
are there once, with the number of executions in `trips`. What one execution of a loop with an unknown number of
iterations costs has `known=False`; of several branches the costliest counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from search.attention import all_causal, score_keys
from search.fusion import Block, Where
from search.liveness import INNER, Names, Phase, Remat, Step, analyse_step, source_of
from search.saved import saved_in
from search.units import Operand, Unit
from sharding_rules import TracedFunction

Kind = Literal[
    "dot",
    "conv",
    "ragged",
    "attention",
    "elementwise",
    "reduce",
    "gather",
    "scatter",
    "sort",
    "collective",
    "stack",
    "other",
]


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an operation reads or writes.

    Attributes:
        bytes: moved in one execution.
        axes: row names per dimension, major to minor.
        weight: computed from parameters alone.
    """

    bytes: int
    axes: Names
    weight: bool


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation; quantities are of one execution.

    Attributes:
        kind: "elementwise" and "reduce" are fused loops; "attention" is scores, softmax and values in one; "stack"
            copies what the backward pass keeps of a loop's iteration into an array of all iterations, or out of it.
        phase: "forward", "recompute" (of the forward pass, inside the backward pass) or "backward".
        flops: floating point operations; of products 2 batch m n k.
        transcendentals: exponentials, square roots and the like, which are not among the flops.
        batch, m, n, k: sizes of a product, 0 for what is none. Of a convolution m are positions, k a window's inputs.
        reads, writes: arrays moved; of a product, the operands and the result.
        axes: rows over which the work divides: of all arrays of a product, of the largest array of a loop.
        contracted: rows that a product sums over; of a lookup, those of what it picks from.
        trips: executions per step.
        known: whether `trips` and the cost are certain.
        causal: of attention, that queries see no later keys: kernels leave those scores out.
        dtype: of a product's first operand, of a loop's result.
        source: `file:line (function)`.
    """

    kind: Kind
    phase: Phase
    flops: int
    transcendentals: int
    batch: int
    m: int
    n: int
    k: int
    reads: tuple[Array, ...]
    writes: tuple[Array, ...]
    axes: tuple[str, ...]
    contracted: tuple[str, ...]
    trips: int
    known: bool
    dtype: str
    source: str
    causal: bool = False

    @property
    def bytes_read(self) -> int:
        return sum(array.bytes for array in self.reads)

    @property
    def bytes_written(self) -> int:
        return sum(array.bytes for array in self.writes)


@dataclasses.dataclass(frozen=True)
class Workload:
    """The operations of a step.

    Attributes:
        ops: in the order of the program.
        rows: name of every row of logical axes -> number of elements.
    """

    ops: tuple[Op, ...]
    rows: dict[str, int]

    @property
    def flops(self) -> int:
        """Of the whole step, transcendental operations left out."""
        return sum(op.flops * op.trips for op in self.ops)

    @property
    def bytes(self) -> int:
        """Read and written by the whole step, what is copied into stacks and out of them included."""
        return sum((op.bytes_read + op.bytes_written) * op.trips for op in self.ops)

    @property
    def product_flops(self) -> int:
        """Of matrix products and convolutions, exact; the elementwise part of fused attention is not among them."""
        return sum(
            2 * op.batch * op.m * op.n * op.k * op.trips for op in self.ops if op.kind in ("dot", "ragged")
        ) + sum(op.flops * op.trips for op in self.ops if op.kind in ("conv", "attention"))

    @property
    def unknown(self) -> tuple[Op, ...]:
        """Operations whose number of executions or whose cost is not known."""
        return tuple(op for op in self.ops if not op.known)

    def flops_by(self, field: Literal["kind", "phase", "dtype", "source"]) -> dict[str, int]:
        """Flops of the whole step by one field of the operations."""
        total: dict[str, int] = {}
        for op in self.ops:
            key = getattr(op, field)
            total[key] = total.get(key, 0) + op.flops * op.trips
        return total

    def merged(self) -> Workload:
        """Operations that are alike, as those of unrolled layers are, as one with the sum of their trips.

        The source is that of the first.
        """
        first: dict[Op, Op] = {}
        trips: dict[Op, int] = {}
        for op in self.ops:
            key = dataclasses.replace(op, source="", trips=0)
            first.setdefault(key, op)
            trips[key] = trips.get(key, 0) + op.trips
        return Workload(tuple(dataclasses.replace(op, trips=trips[key]) for key, op in first.items()), self.rows)

    def table(self) -> dict[str, np.ndarray]:
        """Columns over operations: the fields of `Op`, `bytes_read`, `bytes_written`, and two incidence matrices.

        `axes` and `contracted` are bool (operations, rows), rows in the order of `Workload.rows`.
        """
        numbers = ("flops", "transcendentals", "bytes_read", "bytes_written", "batch", "m", "n", "k", "trips")
        words = ("kind", "phase", "dtype", "source")
        return {
            **{name: np.array([getattr(op, name) for op in self.ops], dtype=np.float64) for name in numbers},
            **{name: np.array([getattr(op, name) for op in self.ops], dtype=np.str_) for name in words},
            **{name: np.array([getattr(op, name) for op in self.ops], dtype=bool) for name in ("known", "causal")},
            "axes": self._incidence([op.axes for op in self.ops]),
            "contracted": self._incidence([op.contracted for op in self.ops]),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Columns over the arrays of all operations: `op` (its index), `bytes`, `written`, `weight`, `axes`.

        An operation's sharded bytes are `np.bincount(op, bytes / ways)`, with the ways of each array's own axes.
        """
        entries = list(self._entries())
        return {
            "op": np.array([index for index, _, _ in entries], dtype=np.int64),
            "bytes": np.array([array.bytes for _, array, _ in entries], dtype=np.float64),
            "written": np.array([written for _, _, written in entries], dtype=bool),
            "weight": np.array([array.weight for _, array, _ in entries], dtype=bool),
            "axes": self._incidence([[name for dim in array.axes for name in dim] for _, array, _ in entries]),
        }

    def _entries(self) -> Iterator[tuple[int, Array, bool]]:
        for index, op in enumerate(self.ops):
            yield from ((index, array, False) for array in op.reads)
            yield from ((index, array, True) for array in op.writes)

    def _incidence(self, names: Sequence[Sequence[str]]) -> np.ndarray:
        column = {name: i for i, name in enumerate(self.rows)}
        out = np.zeros((len(names), len(column)), dtype=bool)
        for i, row in enumerate(names):
            for name in row:
                if name in column:
                    out[i, column[name]] = True
        return out


def workload(
    traced: TracedFunction,
    *,
    remat: Remat = "none",
    grad: bool = True,
    fused_attention: bool = False,
    params: str = "params",
    batch: str = "batch",
) -> Workload:
    """Count the work of a function, and of its backward pass.

    Args:
        traced: from `sharding_rules.trace`; with `grad`, the first leaf of its result is the loss.
        remat: what the backward pass computes again, applied as `Layout.pin` does.
        grad: add the gradients by the parameters that are trained. False for prediction.
        fused_attention: count attention as one operation that keeps no scores in memory. Its flops are those of the
            model as written: a kernel that computes the scores again in its backward pass has one product more.
        params, batch: names of the arguments that hold the parameters and the examples.

    Raises:
        ValueError: no scalar loss, no parameter that is trained, or `remat` without `grad`.
    """
    step = analyse_step(traced, remat=remat, grad=grad, params=params, batch=batch)
    return workload_of(step, fused_attention=fused_attention)


def workload_of(step: Step, *, fused_attention: bool = False) -> Workload:
    """As `workload`, from an analysed step."""
    scores = score_keys(step) if fused_attention else None
    units = Block(step, Where(), scores).run(step.table.scope)
    ops = [op for op in (_op(step, unit) for unit in units) if op.flops or op.reads or op.writes]
    if all_causal(step):
        ops = [dataclasses.replace(op, causal=op.kind == "attention") for op in ops]
    if any(op.phase == "backward" for op in ops):
        for op in _stacks(step, fused_attention):
            # Beside what its loop computes: what comes before the first operation of layers, and after the last, is
            # not of layers.
            beside = (
                i
                for i, o in enumerate(ops)
                if o.trips == op.trips and (o.phase == "forward") == (op.phase == "forward")
            )
            ops.insert(next(beside, len(ops)), op)
    return Workload(tuple(ops), {row.name: row.size for row in step.layout.rows.rows})


def _stacks(step: Step, fused_attention: bool) -> Iterator[Op]:
    """Copies of what loops keep for their backward pass: in, and out again."""
    for saved in saved_in(step, fused_attention=fused_attention):
        if saved.trips == 1 or not saved.activation:
            continue
        array = Array(saved.bytes // saved.trips, saved.axes, False)
        phases: tuple[Phase, ...] = ("forward", "backward")
        for phase in phases:
            yield Op(
                kind="stack",
                phase=phase,
                flops=0,
                transcendentals=0,
                batch=0,
                m=0,
                n=0,
                k=0,
                reads=(array,),
                writes=(array,),
                axes=_flat(saved.axes),
                contracted=(),
                trips=saved.trips,
                known=True,
                dtype=str(saved.dtype),
                source=saved.source,
            )


def _op(step: Step, unit: Unit) -> Op:
    reads = [_array(step, operand) for operand in unit.reads.values()]
    writes = [_array(step, operand) for operand in unit.writes.values()]
    p = unit.product
    return Op(
        kind=unit.kind,  # pyright: ignore[reportArgumentType]
        phase=unit.phase,
        flops=unit.flops,
        transcendentals=unit.transcendentals,
        batch=p.batch if p else 0,
        m=p.m if p else 0,
        n=p.n if p else 0,
        k=p.k if p else 0,
        reads=tuple(a for a in reads if a.bytes),
        writes=tuple(a for a in writes if a.bytes),
        axes=_flat(step.names(unit.space)),
        contracted=_flat(step.names(unit.contracted)),
        trips=unit.trips,
        known=unit.known,
        dtype=str(unit.dtype),
        source=source_of(unit.source),
    )


def _array(step: Step, operand: Operand) -> Array:
    return Array(operand.bytes, step.names(operand.dims), operand.weight)


def _flat(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for dim in names for name in dim if name != INNER))
