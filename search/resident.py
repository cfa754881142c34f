"""What lies in memory while a step runs: intervals of time of the arrays of every body, and their sum at the fullest.

    body = Body(arrays, step, step.table.scope, Where(), scores)
    arrays.freeze()
    body.freeze()
    peak, gathered = body.peak(arrays.split(placement), microbatches, fsdp)

Time counts the equations of a body in the order of the program. A loop is one moment of the body around it, and brings
the peak of its own body:

    live(t) = sum of bytes / ways of what is made at or before t and read at or after t
    peak    = max over t of live(t) + peak of the loop that runs at t

The rules, each seen in buffers that XLA assigned (`benchmarks/memory_accuracy.py`):

* A loop writes over its carry. Fused loops have results of their own, also where an operand is read for the last time.
* A gradient is counted as it rests, from when it is made to the end, besides whole while it is made outside of loops;
  there on TPUs twice where fsdp splits it and it is not converted: what is scattered has another layout.
  With microbatches the sums of gradients are there all the time, and are not counted here: gradients that a loop over
  layers stacks lie beside them, others are added at once.
* A weight split over fsdp is gathered where products use it, from the first use to the last: in a loop one layer at a
  time, elsewhere once for forward and backward pass. Under a `jax.checkpoint` a parameter is gathered again, but not a
  copy of it that was made before.
* Copies of weights in another dtype are made as the weights rest: in a loop over layers of all layers at once, before
  the loop. Where fsdp does not split them, products outside of loops convert what they read without a copy.
* Parameters stored wider than the loss takes them are converted before it, at rest, and stay until their last use.
* With microbatches, copies of weights and what the forward pass gathered outside of loops are made once and kept.
* What rests split over tensor between products (sequence parallelism) is gathered for them: from the first product that
  reads it to the last, of the forward pass and of the backward one.
* A product that is only converted to a wider dtype is written in that one. Where a label is picked, its gradient (one
  element per row, put into zeros) is part of the loops that read it. Without microbatches, XLA for
  GPUs makes one of constants before the forward pass, and the zeros of other lookups' gradients right after it.
* Lookups along the batch and products of tokens sorted by expert work on the whole batch on every device; the result of
  such a product is whole until what follows has read it. XLA for GPUs multiplies every token with every expert there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend.core import JaxprEqn, Var

from search.attention import axes_key
from search.fusion import INLINED, Block, Where
from search.liveness import CHECKPOINTS, COTANGENT, Call, Step, bytes_of, calls, dtype_of, itemsize
from search.shares import Arrays
from search.stored import LOOPED, PRODUCTS, Stored
from search.units import Unit, Value
from sharding_rules import ExpertsCall, trainable
from sharding_rules.axes import Dims, Scope, loop_parts, shape_of

Floats = npt.NDArray[np.float64]
VALUE, GRADIENT, GATHERED, COPY, SHARD, EARLY, SENT = range(7)
"""Kinds of intervals: a value of the step; the gradient of a parameter, at rest; a weight gathered over fsdp; a copy of
a weight, at rest; the same where it exists only if fsdp splits it; a value before its time, without microbatches;
the gradient of a parameter as it is scattered, where fsdp splits it."""
SUM_BYTES = 4
"""Bytes of an element of summed gradients, at least."""


@dataclasses.dataclass
class Interval:
    """An array from one time to another, both included.

    Attributes:
        index: in the arrays of the step.
        kind: VALUE, GRADIENT, GATHERED, COPY, SHARD, EARLY or SENT.
        sign: -1 where a loop's carry may be written over.
        lasting: with microbatches, there all the time.
    """

    index: int
    start: int
    stop: int
    kind: int
    sign: float = 1.0
    lasting: bool = False


@dataclasses.dataclass(frozen=True)
class Kept:
    """A value that the backward pass keeps: what it is like, and how many such values a loop has put into it."""

    index: int
    bytes: float
    like: Any
    trips: int


class Body:
    """One body (the whole step, a loop's, a branch): its arrays in time, and the bodies inside it.

    Args:
        arrays: to which the body adds its own.
        step: the analysed step.
        scope: the body.
        where: as for `search.fusion.Block`.
        scores: axes of attention's scores, if these are never in memory.
        call: how the body is called, and in which body; none for the whole step.
        scale: devices of a `shard_map` around it, whose arrays are shards.
        accelerator: kind of device that the step is compiled for.
        param_bytes: of an element of the stored parameters.
    """

    def __init__(
        self,
        arrays: Arrays,
        step: Step,
        scope: Scope,
        where: Where,
        scores: frozenset[Any] | None,
        *,
        call: tuple[Call, Body, Scope] | None = None,
        scale: int = 1,
        accelerator: str = "tpu",
        param_bytes: int = SUM_BYTES,
    ):
        self.step, self.arrays, self.scores, self.scale = step, arrays, scores, scale
        self.accelerator = accelerator
        self.block = Block(step, where, scores)
        self.intervals: list[Interval] = []
        self.inner: list[tuple[int, list[Body]]] = []
        self.copies: dict[tuple[int, Any], int] = {}
        """Weights converted in a loop's body: (operand of the loop, dtype) -> bytes of all iterations."""
        self._times: dict[Value, int] = {}
        self._made: dict[Value, int] = {}
        self._last: dict[Value, int] = {}
        self._trips: dict[Value, int] = {}
        self._scopes: dict[int, Scope] = {}
        self._checkpointed: set[int] = set()
        self._nested: list[tuple[int, Scope, int, Where]] = []
        self._values: dict[int, Value] = {}
        self._copied: dict[tuple[Value, str, int], list[int]] = {}
        self._widths: dict[int, int] = {}
        """Of gradients: how many times as wide their sums are."""
        self._now = self._boundary = 0
        loop = call[0].loop if call is not None else (0, 0)
        if call is not None:
            inner, around, outer = call
            for position, (var, atom) in enumerate(zip(scope.jaxpr.invars, inner.operands, strict=True)):
                constant = not around.roots(outer, atom)
                if constant and not loop[0] <= position < sum(loop):
                    self.block.roots[(id(scope), var)] = ()
        self.block.run(scope)
        self._walk(scope, where)
        stored = Stored(self.block, self._checkpointed, accelerator)
        weights = self._use(stored)
        for unit in self.block.units.units:
            self._add_whole(unit)
        self._add_gathered()
        for time, around, position, here in self._nested:
            self._run_inside(time, around, position, here)
        self._add_weights(scope, weights, loop, whole=call is None)
        self._add_values(scope, loop, whole=call is None)
        if call is None:
            self._add_casts(scope, weights, param_bytes)

    def _walk(self, scope: Scope, where: Where) -> None:
        """Number the equations in the order of the program, calls that are no loops inlined."""
        self._scopes[id(scope)] = scope
        top = scope is self.step.table.scope
        for position in self.step.flow.live(scope):
            eqn = scope.jaxpr.eqns[position]
            here = dataclasses.replace(where, backward=True) if top and position > self.step.flow.boundary else where
            inner = calls(scope, position)
            if inner and eqn.primitive.name not in INLINED:
                checkpoint = here.checkpoint or eqn.primitive.name in CHECKPOINTS
                if checkpoint:
                    self._checkpointed.add(id(inner[0].scope))
                self._walk(inner[0].scope, dataclasses.replace(here, checkpoint=checkpoint))
                continue
            self._now += 1
            if top and position == self.step.flow.boundary:
                self._boundary = self._now
            self._times.update({(id(scope), var): self._now for var in eqn.outvars})
            if inner:
                self._nested.append((self._now, scope, position, here))

    def roots(self, scope: Scope, atom: Any) -> tuple[Value, ...]:
        """The values behind an operand; none for a constant."""
        return self.block.roots.get((id(scope), atom), ()) if isinstance(atom, Var) else ()

    def _use(self, stored: Stored) -> dict[Value, list[tuple[bool, int, str]]]:
        """When values are made and read for the last time; returns the uses of weights: again, when, by what."""
        operands = self.block.units.operands
        weights: dict[Value, list[tuple[bool, int, str]]] = {}
        for root, unit in stored.groups.items():
            written = [v for v in stored.written[root] if v in self._times]
            if not written:
                continue
            time = max(self._times[v] for v in written)
            self._made.update((v, self._times[v]) for v in written)
            for value in stored.reads[root]:
                self._last[value] = max(self._last.get(value, 0), time)
                if operands[value].weight and unit.kind != "elementwise":
                    weights.setdefault(value, []).append((stored.again[root], time, unit.kind))
        return weights

    def _run_inside(self, time: int, scope: Scope, position: int, where: Where) -> None:
        """Add the bodies of a loop, and what it reads and makes."""
        eqn = scope.jaxpr.eqns[position]
        name = eqn.primitive.name
        scale = self.scale * (math.prod(eqn.params["mesh"].shape.values()) if name == "shard_map" else 1)
        trips = where.trips * (eqn.params["length"] if name == "scan" else 1)
        bodies = []
        for call in calls(scope, position):
            begin, carried = call.loop
            needed = self.step.flow.needed_inputs(call.scope)
            for i, atom in enumerate(call.operands):
                for root in self.roots(scope, atom) if needed[i] else ():
                    over = begin <= i < begin + carried
                    self._last[root] = max(self._last.get(root, 0), time - 1 if over else time)
            inside = dataclasses.replace(where, trips=trips)
            options: dict[str, Any] = {"call": (call, self, scope), "scale": scale, "accelerator": self.accelerator}
            body = Body(self.arrays, self.step, call.scope, inside, self.scores, **options)
            bodies.append(body)
            for (operand, dtype), size in body.copies.items():
                for root in self.roots(scope, call.operands[operand]):
                    self._copied.setdefault((root, str(dtype), size), []).append(time)
        self.inner.append((time, bodies))
        stacked = range(loop_parts(eqn)[1], len(eqn.outvars)) if name == "scan" else ()
        for i, var in enumerate(eqn.outvars):
            self._made[(id(scope), var)] = time
            self._trips[(id(scope), var)] = shape_of(var)[0] if i in stacked else 1

    def _add_weights(self, scope: Scope, weights: Any, loop: tuple[int, int], *, whole: bool) -> None:
        """Add weights gathered over fsdp and their copies in another dtype."""
        operands = self.block.units.operands
        inputs = {(id(scope), var): i for i, var in enumerate(scope.jaxpr.invars)}
        for value, uses in weights.items():
            operand = operands[value]
            origin = self._copy_of(value)
            if not operand.bytes or (value in self._made and origin is None):
                continue
            # A copy is gathered once, a parameter once more under a checkpoint.
            sets = [uses] if origin is not None else [[u for u in uses if u[0] == again] for again in (False, True)]
            for some in filter(None, sets):
                times = [time for _, time, _ in some]
                index = self._add(operand.bytes, operand.dims)
                lasting = whole and not all(again for again, _, _ in some)
                self.intervals.append(Interval(index, min(times), max(times), GATHERED, lasting=lasting))
            if origin is None:
                continue
            begin = self._made.pop(value)
            if sum(loop) and inputs.get(origin, -1) >= sum(loop):
                trips = self.block.where.trips
                self.copies[inputs[origin], dtype_of(value[1])] = operand.bytes * trips
                continue
            fused = all(kind in PRODUCTS for _, _, kind in uses)
            index = self._add(operand.bytes, operand.dims)
            stop = max(time for _, time, _ in uses)
            lasting = whole and not all(again for again, _, _ in uses)
            self.intervals.append(Interval(index, begin, stop, SHARD if fused else COPY, lasting=lasting))
        for (root, _, size), times in self._copied.items():
            index = self._add(size, operands[root].dims)
            self.intervals.append(Interval(index, min(times), max(times), COPY, lasting=whole))

    def _add_casts(self, scope: Scope, weights: Any, param_bytes: int) -> None:
        """Add the parameters that the loss takes in a narrower dtype than they are stored in."""
        traced = self.step.table.traced
        name = self.step.layout.params
        trained = jax.tree.leaves(trainable(traced.arg(name)))
        for var, cast in zip(scope.jaxpr.invars[traced.arg_slice(name)], trained, strict=True):
            value, dtype = (id(scope), var), dtype_of(var)
            narrower = cast and jnp.issubdtype(dtype, jnp.floating) and itemsize(dtype) < param_bytes
            if narrower and value in self._last:
                fused = value in weights and all(kind in PRODUCTS for _, _, kind in weights[value])
                index = self._add(bytes_of(var), self.block.units.operands[value].dims)
                kind = SHARD if fused else COPY
                self.intervals.append(Interval(index, 0, self._last[value], kind, lasting=True))

    def _copy_of(self, value: Value) -> Value | None:
        """The weight that a value is a copy of in another dtype."""
        units = self.block.units
        index = units.producer.get(value)
        if index is None or units.units[index].source.primitive.name != "convert_element_type":
            return None
        (origin,) = units.units[index].reads
        return origin if units.operands[origin].weight and origin not in self._made else None

    def _add_values(self, scope: Scope, loop: tuple[int, int], *, whole: bool) -> None:
        """Add what the body makes, and what loops in it make."""
        end = self._now + 1
        operands, outs = self.block.units.operands, list(scope.jaxpr.outvars)
        held = {root for atom in (outs[: loop[1]] if sum(loop) else outs) for root in self.roots(scope, atom)}
        results = len(jax.tree.leaves(self.step.layout.traced.out))
        gradients = {root for atom in outs[results:] for root in self.roots(scope, atom)} if whole else set()
        loops = {time for time, _ in self.inner}
        for value in list(self._made):
            wide = self._converted(value)
            if wide is not None:
                begin = self._made.pop(value)
                self._made[wide] = begin
                self._last[wide] = max(self._last.get(wide, begin), self._last.get(value, begin))
        for value, begin in self._made.items():
            operand = operands[value]
            if operand.bytes == 0 or (self.scores is not None and _is_score(operand.dims, self.scores)):
                continue
            source = self._into_zeros(value)
            if source is not None:
                constant = all(map(self._is_constant, self.roots(self._scopes[value[0]], source.invars[2])))
                early = self.accelerator == "gpu" and whole
                selection = self._is_selection(value, source)
                if early and (constant or not selection):
                    first = 0 if constant else self._boundary
                    stop = max(self._last.get(value, begin), begin) if selection else begin - 1
                    self.intervals.append(Interval(self._add(operand.bytes, operand.dims), first, stop, EARLY))
                if selection:
                    continue
            index = self._add(operand.bytes, operand.dims)
            self._values[index] = value
            if value not in gradients:
                stop = end if value in held else max(self._last.get(value, begin), begin)
                # What a loop stacks of its weights rests as they do.
                kind = COPY if operand.weight and begin in loops else VALUE
                self.intervals.append(Interval(index, begin, stop, kind))
                continue
            rest = self._add(operand.bytes, operand.dims)
            self._widths[rest] = max(1, SUM_BYTES // itemsize(dtype_of(value[1])))
            self.intervals.append(Interval(rest, begin, end, GRADIENT))
            if begin not in loops:
                self.intervals.append(Interval(index, begin, begin, VALUE))
                producer = self.block.units.producer.get(value)
                source = self.block.units.units[producer].source if producer is not None else None
                if self.accelerator == "tpu" and (source is None or source.primitive.name != "convert_element_type"):
                    self.intervals.append(Interval(index, begin, begin, SENT))
        for var in scope.jaxpr.invars[loop[0] : sum(loop)]:
            value = (id(scope), var)
            if value in operands and bytes_of(var):
                index = self._add(bytes_of(var), operands[value].dims)
                self.intervals.append(Interval(index, self._last.get(value, 0) + 1, end, VALUE, -1.0))

    def _into_zeros(self, value: Value) -> JaxprEqn | None:
        """The equation that makes a value by adding into zeros, as the gradient of a lookup is made."""
        index = self.block.units.producer.get(value)
        source = self.block.units.units[index].source if index is not None else None
        if source is None or source.primitive.name != "scatter-add":
            return None
        return None if self.roots(self._scopes[value[0]], source.invars[0]) else source

    def _is_constant(self, value: Value) -> bool:
        """Whether a value is the loss's cotangent, which is one, or computed from nothing else."""
        index = self.block.units.producer.get(value)
        if index is not None:
            return all(map(self._is_constant, self.block.units.units[index].reads))
        table = self.step.table
        return value[0] == id(table.scope) and value[1] in table.scope.jaxpr.invars[table.traced.arg_slice(COTANGENT)]

    def _is_selection(self, value: Value, source: JaxprEqn) -> bool:
        """Whether what is put into zeros is one element per row, and only read by fused loops: part of these.

        So is the gradient of a loss that picks the label's logit.
        """
        single = not source.params["dimension_numbers"].update_window_dims
        return single and all(self._reader_kind(r) in LOOPED for r in self.block.units.readers.get(value, ()))

    def _converted(self, value: Value) -> Value | None:
        """What a product is written as: the wider array that is all that is made of it, where that is in memory."""
        units = self.block.units
        index = units.producer.get(value)
        if index is None or units.units[index].product is None:
            return None
        readers = units.readers.get(value, ())
        if len(readers) != 1 or min(readers) < 0:
            return None
        (reader,) = (units.units[r] for r in readers)
        if reader.source.primitive.name != "convert_element_type":
            return None
        (written,) = reader.writes
        wider = units.operands[written].bytes > units.operands[value].bytes
        return written if wider and written in self._made else None

    def _reader_kind(self, reader: int) -> str:
        units = self.block.units
        return units.units[units.find(reader)].kind if reader >= 0 else ""

    def _add_whole(self, unit: Unit) -> None:
        """Add what works on the whole batch on every device: lookups along it, and products of sorted tokens.

        XLA has no partitioned form of either. Calls of `experts` are none: every device sorts its own tokens.
        """
        if any(isinstance(c.call, ExpertsCall) for c in self.step.layout.table.calls.values()):
            return
        eqn = unit.source
        if unit.kind == "ragged":
            along = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        elif unit.kind == "gather":
            along = eqn.params["dimension_numbers"].start_index_map
        elif unit.kind == "scatter" and "dimension_numbers" in eqn.params:
            along = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
        else:
            return
        (value,) = unit.writes
        operand, out = eqn.invars[0], eqn.outvars[0]
        dims = self._scopes[value[0]].dims
        if not isinstance(operand, Var) or operand not in dims:
            return
        names = self.step.names(dims[operand])
        if not any(name in self.arrays.batch_rows for d in along for name in names[d]):
            return
        # XLA for GPUs multiplies every token with every group, of which all but one are masked.
        groups = 1
        if unit.kind == "ragged" and self.accelerator == "gpu":
            groups = shape_of(eqn.invars[2])[0]
        time = self._times[value]
        for var in (*(v for v in eqn.invars if isinstance(v, Var) and v in dims), out):
            names = self.step.names(dims[var])
            rows = [[n for n in dim if n not in self.arrays.batch_rows] for dim in names]
            batched = any(n in self.arrays.batch_rows for dim in names for n in dim)
            copies = groups if batched else 1
            index = self.arrays.add(float(bytes_of(var) * self.scale * copies), rows, batched=batched)
            # A product is whole until what follows it has read it.
            stop = self._read_until(value, unit.phase) if var is out and unit.kind == "ragged" else time
            self.intervals.append(Interval(index, time, max(time, stop), VALUE))

    def _read_until(self, value: Value, phase: str) -> int:
        """When the pass that a phase belongs to, forward or backward, reads a value for the last time."""
        units = self.block.units
        readers = [units.units[r] for r in units.readers.get(value, ()) if r >= 0]
        times = [
            self._times.get(v, 0)
            for unit in readers
            if (unit.phase == "forward") == (phase == "forward")
            for v in unit.writes
        ]
        return max(times, default=0)

    def _add_gathered(self) -> None:
        """Add activations as products take them, where these need them whole."""
        uses: dict[tuple[Value, bool], tuple[list[int], Dims]] = {}
        for unit in self.block.units.units:
            times = [self._times[v] for v in unit.writes if v in self._times]
            if unit.kind != "dot" or not times:
                continue
            for value, operand in unit.reads.items():
                if not operand.weight and operand.bytes:
                    when, _ = uses.setdefault((value, unit.phase == "forward"), ([], (*unit.space, *unit.contracted)))
                    when.append(max(times))
        for (value, _), (when, rows) in uses.items():
            operand = self.block.units.operands[value]
            names = self.step.names(operand.dims)
            index = self.arrays.add(float(operand.bytes * self.scale), names, self.step.names(rows))
            self.intervals.append(Interval(index, min(when), max(when), VALUE))

    def _add(self, bytes_: int, dims: Dims) -> int:
        return self.arrays.add(float(bytes_ * self.scale), self.step.names(dims))

    def kept(self) -> list[Kept]:
        """What is alive when the forward pass ends and read after it."""
        out = []
        for i in self.intervals:
            if i.kind == VALUE and i.index in self._values and i.sign > 0 and i.start < self._boundary < i.stop:
                value = self._values[i.index]
                bytes_, trips = self.arrays.bytes[i.index], self._trips.get(value, 1)
                like = (trips > 1, bytes_ / trips, self.step.names(self.block.units.operands[value].dims)[trips > 1 :])
                out.append(Kept(i.index, bytes_, like, trips))
        return out

    def freeze(self) -> None:
        """Sort the intervals by what their bytes are multiplied with, once all bodies have theirs."""
        self._length = self._now + 3
        loops = {time for time, _ in self.inner}
        groups: dict[tuple[int, bool, bool], list[Interval]] = {}
        for i in self.intervals:
            special = i.start in loops if i.kind == GRADIENT else i.lasting
            groups.setdefault((i.kind, bool(self.arrays.batched_v[i.index]), special), []).append(i)
        self._groups = [
            (
                key,
                np.array([i.index for i in group], np.int64),
                np.array([i.sign for i in group], np.float64),
                np.array([[i.start for i in group], [max(i.stop, i.start) + 1 for i in group]], np.int64),
            )
            for key, group in groups.items()
        ]
        for _, bodies in self.inner:
            for body in bodies:
                body.freeze()

    def gradients(self, local_v: Floats) -> float:
        """Bytes of the sums of all gradients on one device, before fsdp splits them."""
        return float(sum(local_v[index] * width for index, width in self._widths.items()))

    def peak(self, local_v: Floats, parts_n: Floats, fsdp_n: Floats) -> tuple[Floats, Floats, Floats]:
        """Most bytes alive at once; among them those of gathered weights, and of what loops hold of all layers.

        Args:
            local_v: bytes of the step's arrays on one device, for the whole batch.
            parts_n: microbatches of every candidate.
            fsdp_n: size of its fsdp axis.
        """
        lines, factors, kinds = [np.zeros(self._length)], [np.zeros_like(parts_n)], [VALUE]
        for key, index_i, sign_i, span_2i in self._groups:
            bytes_i = local_v[index_i] * sign_i
            change_t = np.bincount(span_2i.ravel(), np.concatenate([bytes_i, -bytes_i]), self._length + 1)
            line_t = np.cumsum(change_t[: self._length])
            lines += [line_t, np.full(self._length, bytes_i.sum())]
            factors += self._factors(*key, parts_n, fsdp_n)
            kinds += [key[0]] * 2
        lines_gt, factors_ng, kinds_g = np.stack(lines), np.stack(factors, axis=1), np.array(kinds)
        total_nt = factors_ng @ lines_gt
        rows = np.arange(len(parts_n))
        inside_nt: dict[int, Floats] = {}
        for time, bodies in self.inner:
            peaks, gathered, _ = map(np.stack, zip(*(b.peak(local_v, parts_n, fsdp_n) for b in bodies), strict=True))
            most = np.argmax(peaks, axis=0)
            total_nt[:, time] += peaks[most, rows]
            inside_nt[time] = gathered[most, rows]
        fullest = np.argmax(total_nt, axis=1)
        held_ng = factors_ng * lines_gt[:, fullest].T
        gathered_n = held_ng[:, kinds_g == GATHERED].sum(1)
        gradients_n = np.where(parts_n > 1, held_ng[:, kinds_g == GRADIENT].sum(1), 0.0)
        stacked_n = held_ng[:, kinds_g == COPY].sum(1) + gradients_n
        for time, inside_n in inside_nt.items():
            gathered_n += np.where(fullest == time, inside_n, 0.0)
        return total_nt[rows, fullest], gathered_n, stacked_n

    @staticmethod
    def _factors(kind: int, shrinks: bool, special: bool, parts_n: Floats, fsdp_n: Floats) -> list[Floats]:
        """What the bytes of intervals count while they last, and what they count all the time."""
        split_n = fsdp_n > 1
        rest_n = {
            VALUE: np.ones_like(parts_n),
            GRADIENT: 1 / fsdp_n,
            GATHERED: split_n.astype(np.float64),
            COPY: 1 / fsdp_n,
            SHARD: np.where(split_n, 1 / fsdp_n, 0.0),
            EARLY: np.where(parts_n > 1, 0.0, 1.0),
            SENT: split_n.astype(np.float64),
        }[kind] / (parts_n if shrinks else 1.0)
        never_n, one = np.zeros_like(parts_n), parts_n <= 1
        if kind == GRADIENT:
            return [rest_n if special else np.where(one, rest_n, 0.0), never_n]
        if special:
            return [np.where(one, rest_n, 0.0), np.where(one, 0.0, rest_n)]
        return [rest_n, never_n]


def _is_score(dims: Dims, scores: frozenset[Any]) -> bool:
    """Whether an array, or what a loop stacks in it, has the axes of attention's scores."""
    return axes_key(dims) in scores or (len(dims) > 1 and axes_key(dims[1:]) in scores)
