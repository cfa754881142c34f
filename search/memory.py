"""Bytes per device of activations, for many candidates at once (analytic), by liveness over the step's own jaxpr.

    memory = ActivationMemory(traced, layout, fused_attention=True)
    found = memory.bytes(placement, "full", microbatches=[1, 2, 4], fsdp=8)
    found.layers, found.outside, found.transient, found.gathered          # int64, one entry per candidate

The jaxpr of the loss and its gradients is read once per rematerialisation. What the backward pass keeps are the
residuals of `jax.vjp` (`search.saved`). The rest is a walk over time, body by body, of the arrays between fused units
(`search.fusion`):

    live(t) = sum of bytes / ways of values made at or before t and read at or after t      a cumulative sum per body
    peak    = max over t of live(t) + peak of the loop that runs at t

* A fused loop may write over what it reads for the last time; so may a loop's carry.
* A gradient is counted at rest from when it is made to the end, besides whole while it is made. With microbatches the
  sums of gradients are there all the time: gradients that a loop over layers stacks are there beside them, others are
  added at once.
* A weight split over fsdp is gathered where it is used, from its first use to its last: in a loop one layer at a time,
  elsewhere once for forward and backward pass, because XLA keeps what it gathered; what is under a `jax.checkpoint` is
  gathered again. Copies of weights in another dtype are values like others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend.core import Var

from search.attention import axes_key, score_keys
from search.fusion import INLINED, Block, Where
from search.liveness import CHECKPOINTS, Call, Remat, Step, analyse_step, bytes_of, calls, dtype_of
from search.units import Unit, Value
from sharding_rules import AXES, CONTEXT, DATA, EXPERT, TENSOR, Layout, TracedFunction
from sharding_rules.axes import BATCH, PARAM, Dims, Scope, loop_parts, shape_of
from sharding_rules.partition import array_spec, tree_bytes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
REMATS: tuple[Remat, ...] = ("none", "dots", "full")
COSTLY = frozenset({"random_bits", "threefry2x32", "concatenate", "pad"})
"""Elementwise operations that are not computed again."""
LOOPED = ("elementwise", "reduce")
PRODUCTS = ("dot", "conv", "ragged")
VALUE, GRADIENT, GATHERED = range(3)
"""Kinds of values: of the step itself, gradients of parameters, weights gathered over fsdp."""


class Splits(Protocol):
    """What counting bytes needs of a `search.cost.Placement`: which mesh axes split which rows, and their sizes."""

    @property
    def expert(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tensor(self) -> int: ...
    @property
    def batch_shards(self) -> int: ...
    @property
    def rows(self) -> Bools: ...
    @property
    def spill(self) -> Bools: ...
    @property
    def beyond(self) -> Bools: ...
    @property
    def groups(self) -> Bools: ...


@dataclasses.dataclass(frozen=True)
class LayoutSplits:
    """The `Splits` of one layout; see `splits_of`."""

    expert: int
    context: int
    tensor: int
    batch_shards: int
    rows: Bools
    spill: Bools
    beyond: Bools
    groups: Bools


def splits_of(layout: Layout) -> LayoutSplits:
    """How a layout splits its rows."""
    rows, assignment, mesh = layout.rows.rows, layout.assignment, layout.mesh_shape
    return LayoutSplits(
        expert=mesh.expert,
        context=mesh.context,
        tensor=mesh.tensor,
        batch_shards=mesh.data * mesh.fsdp,
        rows=np.array([[axis in assignment.compute.get(row.name, ()) for axis in AXES] for row in rows]),
        spill=np.array([[axis in assignment.spill.get(row.name, ()) for axis in AXES] for row in rows]),
        beyond=np.array([row.role == "kv_heads" and row.size % mesh.tensor > 0 for row in rows]),
        groups=np.array([row.role == "groups" for row in rows]),
    )


@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes per device, one entry per candidate (analytic). What a step needs beside parameters, gradients and
    optimizer state is the sum.

    Attributes:
        layers: what the backward pass keeps of all repeated layers, for one microbatch.
        outside: what it keeps of the rest, for one microbatch.
        transient: what the fullest moment takes beyond what is kept, parameters and one float32 set of gradients.
        gathered: weights gathered over fsdp at that moment.
    """

    layers: Ints
    outside: Ints
    transient: Ints
    gathered: Ints

    @property
    def total(self) -> Ints:
        return self.layers + self.outside + self.transient + self.gathered


class ActivationMemory:
    """Activations of a traced loss under any placement.

    Args:
        traced: the loss on the whole global batch.
        layout: of it, on any mesh; its rows are those of placements.
        remats: rematerialisations that will be asked for.
        fused_attention: scores of attention are never in memory.
        steps: analysed steps, for those that have them already.
    """

    def __init__(
        self,
        traced: TracedFunction,
        layout: Layout,
        remats: Sequence[Remat] = REMATS,
        *,
        fused_attention: bool = False,
        steps: Mapping[Remat, Step] | None = None,
    ):
        self.row_names = tuple(row.name for row in layout.rows.rows)
        self._steps = dict(steps or {})
        self._batch_rows = frozenset(row.name for row in layout.rows.rows if row.role == "batch")
        self._programs: dict[str, _Program] = {}
        for remat in remats:
            step = self._steps.get(remat) or analyse_step(traced, remat=remat, params=layout.params)
            self._programs[remat] = _Program(step, self.row_names, self._batch_rows, fused_attention)

    def bytes(self, place: Splits, remat: str, microbatches: Any = 1, fsdp: Any = 1) -> ActivationBytes:
        """Bytes of candidates of one placement with one rematerialisation.

        Args:
            place: which mesh axes split which rows.
            remat: one of those the model was made for.
            microbatches: numbers of microbatches, one per candidate.
            fsdp: sizes of the fsdp axis, one per candidate or one for all.
        """
        parts, shards = np.broadcast_arrays(np.atleast_1d(microbatches), np.atleast_1d(fsdp))
        return self._programs[remat].bytes(place, parts.astype(np.float64), shards.astype(np.float64))


# Arrays whose bytes are divided by a placement.


class _Values:
    """Arrays as columns: bytes, which of the distinct sets of rows they have, and whether the batch is among them."""

    def __init__(self, rows: Sequence[str], batch_rows: frozenset[str]):
        self._column = {name: i for i, name in enumerate(rows)}
        self.batch_rows = batch_rows
        self._sets: dict[frozenset[str], int] = {}
        self.bytes: list[float] = []
        self.set: list[int] = []
        self.batched: list[bool] = []

    def add(self, bytes_: float, names: Iterable[Sequence[str]]) -> int:
        rows = frozenset(name for dim in names for name in dim if name in self._column)
        self.bytes.append(bytes_)
        self.set.append(self._sets.setdefault(rows, len(self._sets)))
        self.batched.append(bool(rows & self.batch_rows))
        return len(self.bytes) - 1

    def freeze(self) -> None:
        self.bytes_v = np.array(self.bytes, np.float64)
        self.set_v = np.array(self.set, np.int64)
        self.batched_v = np.array(self.batched, bool)
        self.incidence_sr = np.zeros((len(self._sets), len(self._column)), bool)
        for rows, i in self._sets.items():
            self.incidence_sr[i, [self._column[name] for name in rows]] = True

    def split(self, place: Splits) -> Floats:
        """Bytes on one device, for the whole batch."""
        sizes = {DATA: place.batch_shards, EXPERT: place.expert, CONTEXT: place.context, TENSOR: place.tensor}
        sizes_x = np.array([float(sizes.get(axis, 1)) for axis in AXES])
        inc = self.incidence_sr
        grouped = np.any(inc & place.groups, axis=1)
        taken = (inc & ~place.beyond) @ place.rows | ((inc & place.beyond) @ place.rows & grouped[:, None])
        taken = taken | inc @ place.spill
        ways_s = np.where(taken, sizes_x, 1.0).prod(1)
        return self.bytes_v / ways_s[self.set_v]


class _Program:
    """One rematerialisation: what is kept, and the bodies with what is alive in them."""

    def __init__(self, step: Step, rows: Sequence[str], batch_rows: frozenset[str], fused_attention: bool):
        self.values = _Values(rows, batch_rows)
        scores = score_keys(step) if fused_attention else None
        self.body = _Body(self.values, step, step.table.scope, Where(), scores, None)
        kept = self.body.kept()
        counts = _counts(kept)
        layers = _repeats(kept, counts)
        self._kept = [k.index for k in kept]
        self._in_layers = np.array([layers > 1 and n % layers == 0 for n in counts], bool)
        self.values.freeze()
        self.body.freeze(self.values)

    def bytes(self, place: Splits, parts_n: Floats, fsdp_n: Floats) -> ActivationBytes:
        local_v = self.values.split(place)
        batched_v = self.values.batched_v
        kept_k, batched_k = local_v[self._kept], batched_v[self._kept]

        def kept(mask: Any) -> Floats:
            fixed, shrinking = kept_k[mask & ~batched_k].sum(), kept_k[mask & batched_k].sum()
            return fixed + shrinking / parts_n

        layers_n, rest_n = kept(self._in_layers), kept(~self._in_layers)
        peak_n, gathered_n = self.body.peak(local_v, batched_v, parts_n, fsdp_n)
        gradients_n = np.where(parts_n > 1, 0.0, self.body.gradients(local_v) / fsdp_n)
        # What is not there any more, or not yet, at the fullest moment: kept by the head, or gradients of layers.
        beyond_n = np.maximum(peak_n - layers_n - gradients_n, 0.0)
        outside_n = np.minimum(rest_n, beyond_n)
        gathered_n = np.minimum(gathered_n, beyond_n - outside_n)
        transient_n = beyond_n - outside_n - gathered_n
        return ActivationBytes(*(np.ceil(x).astype(np.int64) for x in (layers_n, outside_n, transient_n, gathered_n)))


def _counts(kept: Sequence[_Kept]) -> list[int]:
    """How often each kept value occurs, counting those that are alike as one."""
    total: dict[Any, int] = {}
    for k in kept:
        total[k.like] = total.get(k.like, 0) + k.trips
    return [total[k.like] for k in kept]


def _repeats(kept: Sequence[_Kept], counts: Sequence[int]) -> int:
    """The number of layers: the count that most of the bytes of what is kept have."""
    weight: dict[int, float] = {}
    for k, count in zip(kept, counts, strict=True):
        weight[count] = weight.get(count, 0.0) + k.bytes
    weight.pop(1, None)
    return max(weight, key=lambda n: (weight[n], -n), default=1)


# Bodies.


@dataclasses.dataclass
class _Interval:
    """A value from one time to another, both included; `sign` is -1 where a loop's carry may be written over."""

    index: int
    start: int
    stop: int
    kind: int
    sign: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A value that the backward pass keeps: what it is like, and how many such values a loop has put into it."""

    index: int
    bytes: float
    like: Any
    trips: int


class _Body:
    """One body (the whole step, a loop's, a branch): its values in time, and the bodies inside it."""

    def __init__(
        self,
        values: _Values,
        step: Step,
        scope: Scope,
        where: Where,
        scores: frozenset[Any] | None,
        call: Call | None,
        outer: tuple[Block, Scope] | None = None,
        scale: int = 1,
    ):
        self.step, self.values, self.scale = step, values, scale
        self.intervals: list[_Interval] = []
        self.inner: list[tuple[int, list[_Body]]] = []
        self._times: dict[Value, int] = {}
        self._checkpointed: set[int] = set()
        self._nested: list[tuple[int, Scope, int, Where]] = []
        self._now = 0
        self._boundary = 0
        self._made: dict[int, Value] = {}
        self._trips: dict[Value, int] = {}
        self._scopes: dict[int, Scope] = {}
        self.block = Block(step, where, scores)
        if call is not None and outer is not None:
            block, around = outer
            start, carried = call.loop
            for position, (var, atom) in enumerate(zip(scope.jaxpr.invars, call.operands, strict=True)):
                constant = not isinstance(atom, Var) or block.roots.get((id(around), atom)) == ()
                if constant and not start <= position < start + carried:
                    self.block.roots[(id(scope), var)] = ()
        units = self.block.run(scope)
        self._walk(scope, where)
        self._read(scope, units[: len(units) - len(self.block.nested)], call, scores)

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

    def _roots(self, scope: Scope, atom: Any) -> tuple[Value, ...]:
        return self.block.roots.get((id(scope), atom), ()) if isinstance(atom, Var) else ()

    def _read(self, scope: Scope, units: list[Unit], call: Call | None, scores: frozenset[Any] | None) -> None:
        end = self._now + 1
        jaxpr = scope.jaxpr
        made: dict[Value, int] = {}
        last: dict[Value, int] = {}
        held: set[Value] = set()
        weights: dict[tuple[Value, bool], list[int]] = {}
        operands = self.block.units.operands
        stored = _Stored(self.block, units, self._checkpointed)

        for root, unit in stored.groups.items():
            written = [v for v in stored.written[root] if v in self._times]
            if not written:
                continue
            time = max(self._times[v] for v in written)
            again = stored.again[root]
            for value in written:
                made[value] = self._times[value]
            largest = max(operands[v].bytes for v in written)
            for value in stored.reads[root]:
                # What a fused loop reads for the last time it may write over.
                over = unit.kind == "elementwise" and operands[value].bytes <= largest
                last[value] = max(last.get(value, 0), time - 1 if over else time)
                if operands[value].weight and unit.kind != "elementwise":
                    weights.setdefault((value, again), []).append(time)
        for unit in self.block.units.units:
            self._whole(unit)
        for time, around, position, where in self._nested:
            self._run_inside(time, around, position, where, scores, made, last)

        start, carried = call.loop if call is not None else (0, 0)
        carries = {(id(scope), v) for v in jaxpr.invars[start : start + carried]}
        outs = list(jaxpr.outvars)
        for atom in outs[:carried] if call is not None and call.loop != (0, 0) else outs:
            held |= set(self._roots(scope, atom))
        gradients: set[Value] = set()
        nested = {time for time, _ in self.inner}
        if call is None:
            gradients = {root for atom in outs[self._results() :] for root in self._roots(scope, atom)}
        for value, begin in made.items():
            operand = operands[value]
            if operand.bytes == 0 or (scores is not None and _is_score(operand.dims, scores)):
                continue
            index = self._add(operand.bytes, operand.dims)
            self._made[index] = value
            stop = max(last.get(value, begin), begin)
            if value in gradients:
                width = jnp.dtype(dtype_of(value[1])).itemsize
                rest = self._add(operand.bytes * max(1, 4 // width), operand.dims)
                self.intervals.append(_Interval(rest, begin, end, GRADIENT))
                if begin not in nested:
                    self.intervals.append(_Interval(index, begin, begin, VALUE))
            else:
                self.intervals.append(_Interval(index, begin, end if value in held else stop, VALUE))
        for value in carries & set(operands):
            if bytes_of(value[1]):
                index = self._add(bytes_of(value[1]), operands[value].dims)
                self.intervals.append(_Interval(index, last.get(value, 0) + 1, end, VALUE, -1.0))
        for (value, _), times in weights.items():
            if value not in made and operands[value].bytes:
                index = self._add(operands[value].bytes, operands[value].dims)
                self.intervals.append(_Interval(index, min(times), max(times), GATHERED))

    def _whole(self, unit: Unit) -> None:
        """Add what works on the whole batch on every device: lookups along it, and products of sorted tokens.

        XLA has no partitioned form of either.
        """
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
        if not any(name in self.values.batch_rows for d in along for name in names[d]):
            return
        for var in (*(v for v in eqn.invars if isinstance(v, Var) and v in dims), out):
            rows = [[n for n in dim if n not in self.values.batch_rows] for dim in self.step.names(dims[var])]
            index = self.values.add(float(bytes_of(var) * self.scale), rows)
            self.intervals.append(_Interval(index, self._times[value], self._times[value], VALUE))

    def _results(self) -> int:
        """Results of the step before the gradients: the loss and what else the loss function returns."""
        return len(jax.tree.leaves(self.step.layout.traced.out))

    def _run_inside(
        self,
        time: int,
        scope: Scope,
        position: int,
        where: Where,
        scores: frozenset[Any] | None,
        made: dict[Value, int],
        last: dict[Value, int],
    ) -> None:
        eqn = scope.jaxpr.eqns[position]
        name = eqn.primitive.name
        scale = self.scale * (math.prod(eqn.params["mesh"].shape.values()) if name == "shard_map" else 1)
        trips = where.trips * (eqn.params["length"] if name == "scan" else 1)
        inside = dataclasses.replace(where, trips=trips)
        bodies = []
        for call in calls(scope, position):
            begin, carried = call.loop
            needed = self.step.flow.needed_inputs(call.scope)
            for i, atom in enumerate(call.operands):
                for root in self._roots(scope, atom) if needed[i] else ():
                    over = begin <= i < begin + carried
                    last[root] = max(last.get(root, 0), time - 1 if over else time)
            bodies.append(_Body(self.values, self.step, call.scope, inside, scores, call, (self.block, scope), scale))
        self.inner.append((time, bodies))
        stacked = range(loop_parts(eqn)[1], len(eqn.outvars)) if name == "scan" else ()
        for i, var in enumerate(eqn.outvars):
            made[(id(scope), var)] = time
            self._trips[(id(scope), var)] = shape_of(var)[0] if i in stacked else 1

    def _add(self, bytes_: int, dims: Dims) -> int:
        return self.values.add(float(bytes_ * self.scale), self.step.names(dims))

    def kept(self) -> list[_Kept]:
        """What is alive when the forward pass ends and read after it."""
        out = []
        for i in self.intervals:
            if i.kind == VALUE and i.sign > 0 and i.start < self._boundary < i.stop:
                value = self._made[i.index]
                bytes_, trips = self.values.bytes[i.index], self._trips.get(value, 1)
                like = (bytes_ / trips, self.step.names(self.block.units.operands[value].dims)[trips > 1 :])
                out.append(_Kept(i.index, bytes_, like, trips))
        return out

    def freeze(self, values: _Values) -> None:
        """Turn the intervals into arrays."""
        self.index_i = np.array([i.index for i in self.intervals], np.int64)
        self.start_i = np.array([i.start for i in self.intervals], np.int64)
        self.stop_i = np.array([max(i.stop, i.start) + 1 for i in self.intervals], np.int64)
        self.kind_i = np.array([i.kind for i in self.intervals], np.int64)
        self.sign_i = np.array([i.sign for i in self.intervals], np.float64)
        self.length = self._now + 3
        for _, bodies in self.inner:
            for body in bodies:
                body.freeze(values)

    def gradients(self, local_v: Floats) -> float:
        """Bytes of all gradients at rest on one device, before fsdp splits them."""
        return float(local_v[self.index_i[self.kind_i == GRADIENT]].sum())

    def peak(self, local_v: Floats, batched_v: Any, parts_n: Floats, fsdp_n: Floats) -> tuple[Floats, Floats]:
        """Most bytes alive at once, and those of gathered weights among them."""
        live_nt = np.zeros((len(parts_n), self.length))
        gathered_nt = np.zeros_like(live_nt)
        shrinks_i = batched_v[self.index_i]
        stacked = {time for time, _ in self.inner}
        loops_i = np.isin(self.start_i, list(stacked))
        for kind in (VALUE, GRADIENT, GATHERED):
            for shrinks in (False, True):
                mask = (self.kind_i == kind) & (shrinks_i == shrinks)
                if not mask.any():
                    continue
                factor_n = 1 / parts_n if shrinks else np.ones_like(parts_n)
                if kind == GRADIENT:
                    # With microbatches, a gradient that no loop stacks is added to the sums as it is made.
                    live_nt += (factor_n / fsdp_n)[:, None] * self._line(local_v, mask & loops_i)
                    alone = self._line(local_v, mask & ~loops_i)
                    live_nt += np.where(parts_n > 1, 0.0, factor_n / fsdp_n)[:, None] * alone
                elif kind == GATHERED:
                    gathered_nt += np.where(fsdp_n > 1, factor_n, 0.0)[:, None] * self._line(local_v, mask)
                else:
                    live_nt += factor_n[:, None] * self._line(local_v, mask)
        for time, bodies in self.inner:
            found = [body.peak(local_v, batched_v, parts_n, fsdp_n) for body in bodies]
            most = np.argmax([peak for peak, _ in found], axis=0)
            rows = np.arange(len(parts_n))
            peak_n = np.stack([peak for peak, _ in found])[most, rows]
            inside_n = np.stack([gathered for _, gathered in found])[most, rows]
            live_nt[:, time] += np.maximum(peak_n - inside_n, 0.0)
            gathered_nt[:, time] += inside_n
        total_nt = live_nt + gathered_nt
        at = np.argmax(total_nt, axis=1)
        rows = np.arange(len(parts_n))
        return total_nt[rows, at], gathered_nt[rows, at]

    def _line(self, local_v: Floats, mask: Any) -> Floats:
        """What is alive over time: one cumulative sum."""
        change_t = np.zeros(self.length + 1)
        bytes_i = local_v[self.index_i[mask]] * self.sign_i[mask]
        np.add.at(change_t, self.start_i[mask], bytes_i)
        np.add.at(change_t, np.minimum(self.stop_i[mask], self.length), -bytes_i)
        return np.cumsum(change_t)[:-1]


class _Stored:
    """Which values of a body are in memory: those of fused units, less what each reader computes again, as XLA does.

    * A cheap elementwise operation is computed again by all that read it, if all are fused loops.
    * What the forward pass (or its recomputation) makes by elementwise operations, the backward pass of the same body
      computes again from products and reductions, unless a `jax.checkpoint` lies between them.

    Attributes:
        groups: fused unit by its first equation's.
        written: values that it leaves in memory.
        reads: values in memory that it reads.
        again: whether it is under a `jax.checkpoint` in the backward pass.
    """

    def __init__(self, block: Block, units: list[Unit], checkpointed: set[int]):
        self._all = block.units
        self.groups = dict(zip(self._all.groups(), units, strict=True))
        self.again: dict[int, bool] = {}
        for root, unit in self.groups.items():
            scopes = {key for key, _ in unit.writes}
            self.again[root] = unit.phase != "forward" and bool(scopes & checkpointed)
        self._virtual: dict[Value, bool] = {}
        self.reads: dict[int, set[Value]] = {}
        self.written: dict[int, set[Value]] = {}
        for root, unit in self.groups.items():
            self.written[root] = {v for v in unit.writes if self._near(v, root) and not self._is_virtual(v)}
        needed = {value for written in self.written.values() for value in written}
        for root, unit in self.groups.items():
            self.reads[root] = {s for v in unit.reads for s in self._sources(v, root)}
            if self.written[root]:
                needed |= self.reads[root]
        # A costly operation inside a loop whose cheap readers are computed again elsewhere.
        for root, members in self._all.groups().items():
            inside = {v for i in members for v in self._all.units[i].writes}
            self.written[root] |= inside & needed

    def _sources(self, value: Value, reader: int) -> set[Value]:
        """What a fused unit reads of memory for a value."""
        if not self._is_virtual(value) and not self._is_far(value, reader):
            return {value}
        unit = self._all.units[self._all.producer[value]]
        return {source for read in unit.reads for source in self._sources(read, reader)}

    def _near(self, value: Value, root: int) -> bool:
        """Whether anything outside a group reads a value as it is."""
        readers = self._all.read_outside(value, root)
        return any(r < 0 or not self._is_far(value, self._all.find(r)) for r in readers)

    def _is_far(self, value: Value, reader: int) -> bool:
        """Whether a unit of the backward pass computes a value of the forward pass again."""
        index = self._all.producer.get(value)
        if index is None or reader not in self.groups:
            return False
        unit, root, there = self._all.units[index], self._all.find(index), self.groups[reader]
        return (
            unit.kind == "elementwise"
            and unit.source.primitive.name not in COSTLY
            and not self._all.operands[value].weight
            and unit.phase != "backward"
            and there.phase == "backward"
            and there.kind in (*LOOPED, *PRODUCTS)
            and self.again[root] == self.again[reader]
        )

    def _is_virtual(self, value: Value) -> bool:
        if value not in self._virtual:
            self._virtual[value] = self._computed_again(value)
        return self._virtual[value]

    def _computed_again(self, value: Value) -> bool:
        index = self._all.producer.get(value)
        if index is None:
            return False
        unit, root = self._all.units[index], self._all.find(index)
        if unit.kind != "elementwise" or unit.transcendentals or unit.source.primitive.name in COSTLY:
            return False
        for r in self._all.readers.get(value, ()):
            reader = self._all.find(r) if r >= 0 else -1
            if reader not in self.groups:
                return False
            fused = self.groups[reader].kind in LOOPED and self.again[reader] == self.again[root]
            if not fused and not self._is_far(value, reader):
                return False
        return True


def _is_score(dims: Dims, scores: frozenset[Any]) -> bool:
    """Whether an array, or what a loop stacks in it, has the axes of attention's scores."""
    return axes_key(dims) in scores or (len(dims) > 1 and axes_key(dims[1:]) in scores)


# By hand, of one layout: what `search.auto` takes.

NOT_SAVED = frozenset(
    """add add_any sub neg broadcast_in_dim reshape transpose squeeze expand_dims convert_element_type slice split
    concatenate reduce_sum copy copy_p stop_gradient select_n iota pad rev dynamic_slice jit pjit closed_call scan
    while cond checkpoint remat remat2 custom_jvp_call custom_vjp_call sharding_constraint
    optimization_barrier""".split()
)
"""Linear or cheap operations whose results no derivative needs, and calls, whose insides are counted instead."""


SAVED_TWICE = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma div erf erf_inv erfc expm1 integer_pow lgamma log
    log1p logistic pow rsqrt sin sinh sqrt square tan tanh""".split()
)
"""Operations whose derivative is a factor of its own (the cosine of a sine), saved beside the result."""


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes per device, by part (analytic)."""

    params: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.params + self.gradients + self.optimizer + self.activations


def step_bytes(
    layout: Layout, abstract_opt_state: Any, *, remat: str, microbatches: int, param_dtype: str = "float32"
) -> StepBytes:
    """Count the bytes per device of a training step.

    Args:
        layout: of the loss traced on the whole global batch.
        abstract_opt_state: shapes of the optimizer's state.
        remat: "none", "dots" or "full".
        microbatches: activations are those of one microbatch.
        param_dtype: dtype of the stored parameters; gradients are summed in float32 or wider.
    """
    width = jnp.dtype(param_dtype).itemsize
    elements = 0
    for leaf, (_, rest) in zip(
        jax.tree.leaves(layout.traced.arg(layout.params)), layout.param_shares.values(), strict=True
    ):
        elements += math.prod(leaf.shape) // layout.assignment.ways([a for entry in rest.entries for a in entry])
    optimizer = tree_bytes(abstract_opt_state, layout.state_specs(abstract_opt_state), layout.mesh_shape)
    activations = activation_bytes(layout, remat) // microbatches
    return StepBytes(elements * width, elements * max(width, 4), optimizer, activations)


def activation_bytes(layout: Layout, remat: str) -> int:
    """Bytes per device that the backward pass of one pass over the traced batch keeps, with the largest block's
    transients.
    """
    saved = 0
    block = 0
    for scope in layout.table.scope.walk():
        inside = scope.trips > 1 and remat != "none"
        everything = sum(_bytes(layout, scope, var) * times for var, times in _needed(scope))
        if not inside:
            saved += everything * scope.trips
            continue
        block = max(block, everything)
        if remat == "dots":
            saved += scope.trips * sum(
                _bytes(layout, scope, eqn.outvars[0])
                for eqn in scope.jaxpr.eqns
                if eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][0]
            )
    if remat != "none":
        saved += _carries(layout)
    return saved + block


def _needed(scope: Scope) -> list[tuple[Any, int]]:
    """Results that a backward pass may need, and how many arrays of their size."""
    return [
        (var, 2 if eqn.primitive.name in SAVED_TWICE else 1)
        for eqn in scope.jaxpr.eqns
        if eqn.primitive.name not in NOT_SAVED
        for var in eqn.outvars
        if scope.origin.get(var) == PARAM | BATCH and shape_of(var)
    ]


def _carries(layout: Layout) -> int:
    """The inputs of every block: what a loop carries, once per iteration."""
    total = 0
    for scope in layout.table.scope.walk():
        for position, eqn in enumerate(scope.jaxpr.eqns):
            if eqn.primitive.name == "scan":
                (body,) = scope.children[position]
                start, carry = loop_parts(eqn)
                for var in body.jaxpr.invars[start : start + carry]:
                    if body.origin[var] & BATCH and jnp.issubdtype(_dtype(var), jnp.floating):
                        total += _bytes(layout, body, var) * body.trips
    return total


def _bytes(layout: Layout, scope: Scope, var: Any) -> int:
    shares = array_spec(layout.assignment, scope.dims[var], spill=True)
    ways = layout.assignment.ways([a for entry in shares.entries for a in entry])
    return math.prod(shape_of(var)) * _dtype(var).itemsize // ways


def _dtype(var: Any) -> Any:
    return var.aval.dtype
