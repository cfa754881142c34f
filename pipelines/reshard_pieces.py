"""Which part of every array goes from which device to which: a schedule, from shardings alone.

    schedule = make_schedule([LeafMove("layers/0/w", (4096, 4096), dtype, old, new), ...])
    schedule.pieces[0].box, schedule.pieces[0].routes

A *piece* is what an old box and a new box share. A device that wants a piece and holds it keeps it. Otherwise it comes
from a holder of its own process where there is one, and enters a process once where there is none. Of several holders
the one that has sent least so far sends; where more devices of a process want a piece than hold it, it is handed on
from one to the next. This is what `search.reallocation` costs, with whole pieces instead of fractions.

Every process computes the same schedule from the same shardings.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

Box = tuple[tuple[int, int], ...]
"""(start, stop) of each dimension."""


@dataclasses.dataclass(frozen=True)
class LeafMove:
    """One array and where it goes."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    source: Sharding
    target: Sharding

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Route:
    """A piece's way: from the sender to the first receiver, from there to the second, and so on.

    All receivers are of one process; the sender is of another one only where that process holds no copy.
    """

    sender: Any
    receivers: tuple[Any, ...]

    @property
    def crosses(self) -> bool:
        """Whether it goes from process to process."""
        return self.sender.process_index != self.receivers[0].process_index


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one leaf. `kept` are the devices that hold it and want it."""

    leaf: int
    box: Box
    nbytes: int
    kept: tuple[Any, ...]
    routes: tuple[Route, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All pieces, leaf by leaf.

    Attributes:
        moves: the leaves.
        pieces: in the order in which they are sent.
        in_bytes, out_bytes: device -> bytes received and sent.
        crossing_in_bytes, crossing_out_bytes: the parts of them that go between processes.
        kept_bytes: over all devices.
        held, wanted: leaf -> device -> box, before and after.
    """

    moves: tuple[LeafMove, ...]
    pieces: tuple[Piece, ...]
    in_bytes: dict[Any, int]
    out_bytes: dict[Any, int]
    crossing_in_bytes: dict[Any, int]
    crossing_out_bytes: dict[Any, int]
    kept_bytes: int
    held: tuple[dict[Any, Box], ...]
    wanted: tuple[dict[Any, Box], ...]

    @functools.cached_property
    def of_leaf(self) -> list[list[int]]:
        """Leaf -> numbers of its pieces."""
        numbers: list[list[int]] = [[] for _ in self.moves]
        for number, piece in enumerate(self.pieces):
            numbers[piece.leaf].append(number)
        return numbers

    @property
    def sent_bytes(self) -> int:
        return sum(self.in_bytes.values())

    def fingerprint(self) -> bytes:
        """A digest that differs where leaves, layouts or routes differ."""
        digest = hashlib.sha256()
        for move in self.moves:
            digest.update(repr((move.path, move.shape, str(move.dtype))).encode())
        for piece in self.pieces:
            routes = [(route.sender.id, [d.id for d in route.receivers]) for route in piece.routes]
            digest.update(repr((piece.leaf, piece.box, [d.id for d in piece.kept], routes)).encode())
        return digest.digest()


def boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[Any, Box]:
    """The part of an array that each device of a sharding holds, over all processes."""
    return {device: box_of(index, shape) for device, index in sharding.devices_indices_map(shape).items()}


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box of an index of slices without steps, as shardings give them."""
    return tuple((s.start or 0, n if s.stop is None else s.stop) for s, n in zip(index, shape, strict=True))


def shardings_of(given: Any, structure: Any, paths: Sequence[str], what: str) -> list[Sharding]:
    """One sharding per leaf."""
    if isinstance(given, Sharding):
        return [given] * len(paths)
    flat, theirs = jax.tree_util.tree_flatten_with_path(given)
    if theirs != structure:
        have = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}
        odd = sorted(have.symmetric_difference(paths))
        raise ValueError(
            f"the {what} shardings have another structure than the tree ({len(flat)} against {len(paths)} leaves); "
            f"first difference: {odd[0] if odd else theirs}"
        )
    for path, (_, sharding) in zip(paths, flat, strict=True):
        if not isinstance(sharding, Sharding):
            raise ValueError(
                f"{path}: the {what} sharding is a {type(sharding).__name__}; give a jax.sharding.Sharding"
            )
    return [sharding for _, sharding in flat]


def make_schedule(moves: Iterable[LeafMove]) -> Schedule:
    """Cut every leaf into pieces and choose who sends.

    Raises:
        ValueError: a sharding does not divide a leaf; the message names its path.
    """
    moves = tuple(moves)
    known: dict[Any, tuple[Any, Any, Any]] = {}
    loads = _Loads()
    pieces, kept_bytes = [], 0
    placed = []
    for i, move in enumerate(moves):
        key = (move.shape, move.source, move.target)
        if key not in known:
            old, new = _placed(move, "source"), _placed(move, "target")
            known[key] = old, new, _cut(old, new)
        *sides, common = known[key]
        placed.append(sides)
        for box, holders, wants in common:
            nbytes = math.prod(stop - start for start, stop in box) * move.dtype.itemsize
            held = set(holders)
            kept = tuple(d for d in wants if d in held)
            kept_bytes += nbytes * len(kept)
            lacking: dict[int, list[Any]] = {}
            for device in wants:
                if device not in held:
                    lacking.setdefault(device.process_index, []).append(device)
            routes = [route for wanting in lacking.values() for route in loads.routes(holders, wanting, nbytes)]
            pieces.append(Piece(i, box, nbytes, kept, tuple(routes)))
    return Schedule(
        moves,
        tuple(pieces),
        dict(loads.received),
        dict(loads.sent),
        dict(loads.crossing_in),
        dict(loads.crossing_out),
        kept_bytes,
        held=tuple(old for old, _ in placed),
        wanted=tuple(new for _, new in placed),
    )


class _Loads:
    """Bytes that devices have sent and received so far."""

    def __init__(self):
        self.sent: collections.Counter[Any] = collections.Counter()
        self.received: collections.Counter[Any] = collections.Counter()
        self.crossing_out: collections.Counter[Any] = collections.Counter()
        self.crossing_in: collections.Counter[Any] = collections.Counter()

    def routes(self, holders: Sequence[Any], wanting: Sequence[Any], nbytes: int) -> list[Route]:
        """Serve the devices of one process."""
        near = [d for d in holders if d.process_index == wanting[0].process_index]
        if near and len(wanting) <= len(near):
            routes = [self._route(near, [device], nbytes) for device in wanting]
        else:
            # The one that has sent most comes last: it hands nothing on.
            routes = [self._route(near or holders, sorted(wanting, key=lambda d: self.sent[d]), nbytes)]
        return routes

    def _route(self, holders: Sequence[Any], receivers: list[Any], nbytes: int) -> Route:
        if holders[0].process_index != receivers[0].process_index:
            sender = min(holders, key=lambda d: (self.crossing_out[d], self.sent[d]))
            first = min(receivers, key=lambda d: self.crossing_in[d])
            receivers = [first, *(d for d in receivers if d is not first)]
            self.crossing_out[sender] += nbytes
            self.crossing_in[first] += nbytes
        else:
            sender = min(holders, key=lambda d: self.sent[d])
        for device in (sender, *receivers[:-1]):
            self.sent[device] += nbytes
        for device in receivers:
            self.received[device] += nbytes
        return Route(sender, tuple(receivers))


def _placed(move: LeafMove, side: str) -> dict[Any, Box]:
    try:
        return boxes(getattr(move, side), move.shape)
    except ValueError as error:
        raise ValueError(f"{move.path}: the {side} sharding does not fit shape {move.shape}: {error}") from None


def _cut(held: dict[Any, Box], wanted: dict[Any, Box]) -> list[tuple[Box, tuple[Any, ...], tuple[Any, ...]]]:
    """(box, holders, devices that want it) of each piece."""
    sides = []
    for placed in (held, wanted):
        groups: dict[Box, list[Any]] = {}
        for device, box in placed.items():
            groups.setdefault(box, []).append(device)
        sides.append(groups)
    old, new = sides
    found = []
    for wish, wants in new.items():
        for box, holders in old.items():
            common = intersect(box, wish)
            if common is not None:
                found.append((common, tuple(holders), tuple(wants)))
    return found


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share; None if nothing."""
    common = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Index of a box in an array that holds another one."""
    return tuple(slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(box, outer, strict=True))


def cut(box: Box, itemsize: int, limit: float) -> list[Box]:
    """Cut a box into parts of at most `limit` bytes, or single elements; one after the other they are the box's bytes
    in order.

    >>> cut(((0, 4), (0, 8)), 4, 64)
    [((0, 2), (0, 8)), ((2, 4), (0, 8))]
    """
    nbytes = math.prod(stop - start for start, stop in box) * itemsize
    if nbytes <= limit:
        return [box]
    for dim, (start, stop) in enumerate(box):
        if stop - start > 1:
            rows = max(1, int(limit * (stop - start) / nbytes))
            parts = [(*box[:dim], (at, min(at + rows, stop)), *box[dim + 1 :]) for at in range(start, stop, rows)]
            return [small for part in parts for small in cut(part, itemsize, limit)]
    return [box]
