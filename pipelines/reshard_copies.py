"""Copies within this process's host memory, as strides: made once for a schedule, each carried out by a call of numpy.

    leaf = host_copies(schedule)[0]
    new = [aligned_empty((n,), np.uint8) for n in leaf.buffers]
    for copy in leaf.copies: copy.carry_out(old_bytes[copy.source], new[copy.buffer])
    leaf.places[box]                                # buffer and offset of each new shard

A part of a shard is rows of bytes; rows that lie one behind the other in the old and in the new shard are one. A row is
an element of a `void` type, which numpy hands to the C library's memmove whole: up to 8 times as fast as copies by
element or by words of eight bytes, the shorter the rows the more.

What a call costs beside the bytes, 2 microseconds and now and then a wait for the interpreter, is most of the time of
small leaves. All new shards of such a leaf therefore lie in one buffer at equal distances, so that what goes from one
old shard to several new ones is one copy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from pipelines.reshard_pieces import Box, Schedule, cut

ALIGNMENT = 64
"""Bytes, from which XLA's CPU client takes memory as it is."""
THREADS = min(os.cpu_count() or 1, 8, max(2, (os.cpu_count() or 1) // 4))
"""One core copies 5 to 20 GB/s. Measured on 2 cores: a second thread is 1.3 to 1.7 times as fast where rows are copied,
and hardly where whole shards are."""
RELEASING_ELEMENTS = 512
"""numpy lets other threads run while it copies more than 500 elements."""
BLOCK_BYTES = 8 * 2**20
"""What one of several threads copies at a time, and the largest leaf whose new shards share a buffer."""
Bytes = npt.NDArray[np.uint8]


class Copy(NamedTuple):
    """From an old shard into a new buffer.

    Attributes:
        source: the device that holds the old shard, C-ordered.
        buffer: number of the buffer.
        shape, row: how many rows, in each dimension, of which type.
        read_at, read_strides: where rows lie in the old shard, bytes.
        write_at, write_strides: in the buffer.
    """

    source: Any
    buffer: int
    shape: tuple[int, ...]
    row: Any
    read_at: int
    read_strides: tuple[int, ...]
    write_at: int
    write_strides: tuple[int, ...]

    def carry_out(self, old: Bytes, new: Bytes) -> None:
        """Copy, from the bytes of the old shard to those of the buffer."""
        np.copyto(
            np.ndarray(self.shape, self.row, new, self.write_at, self.write_strides),
            np.ndarray(self.shape, self.row, old, self.read_at, self.read_strides),
        )


@dataclasses.dataclass(frozen=True)
class LeafCopies:
    """What is copied of one leaf, and where its new shards lie.

    Attributes:
        copies: in any order.
        buffers: bytes of each.
        places: box of a new shard -> number of its buffer, offset in bytes. Devices that want a box share it.
        stays: devices whose new shard is their old one; it is not copied.
    """

    copies: tuple[Copy, ...]
    buffers: tuple[int, ...]
    places: dict[Box, tuple[int, int]]
    stays: frozenset[Any]


def host_copies(
    schedule: Schedule, *, share: bool = True, limit: float = BLOCK_BYTES if THREADS > 1 else math.inf
) -> list[LeafCopies]:
    """Per leaf, what is copied within this process.

    Args:
        schedule: what moves.
        share: whether old shards that stay may be parts of the new array.
        limit: bytes of one copy.
    """
    return [_of_leaf(schedule, leaf, share, limit) for leaf in range(len(schedule.moves))]


def _of_leaf(schedule: Schedule, leaf: int, share: bool, limit: float) -> LeafCopies:
    move = schedule.moves[leaf]
    here = jax.process_index()
    old, new = schedule.held[leaf], {d: box for d, box in schedule.wanted[leaf].items() if d.process_index == here}
    stays = frozenset(d for d, box in new.items() if share and old.get(d) == box)
    nbytes = next((_nbytes(box, move.dtype.itemsize) for box in new.values()), 0)
    distance = -(-nbytes // ALIGNMENT) * ALIGNMENT
    together = len(set(new.values())) > 1 and distance * len(set(new.values())) <= BLOCK_BYTES
    if together and len(stays) < len(new):
        stays = frozenset()  # the whole buffer of the old shards would be kept for one of them
    boxes = dict.fromkeys(box for d, box in new.items() if d not in stays)
    places = {box: (0, i * distance) if together else (i, 0) for i, box in enumerate(boxes)}
    buffers = (distance * len(boxes),) if together else (nbytes,) * len(boxes)
    copies = []
    for number in schedule.of_leaf[leaf]:
        piece = schedule.pieces[number]
        ways = [(d, d) for d in piece.kept if d.process_index == here and d not in stays]
        ways += [(r.sender, r.receivers[0]) for r in piece.routes if not r.crosses and r.sender.process_index == here]
        if ways:
            source, target = ways[0]
            buffer, offset = places[new[target]]
            for shape, row, read_at, read, write_at, write in _rows(
                piece.box, old[source], new[target], move.dtype.itemsize, limit
            ):
                copies.append(Copy(source, buffer, shape, row, read_at, read, offset + write_at, write))
    return LeafCopies(tuple(map(_in_short_rows, _merged(copies))), buffers, places, stays)


@functools.lru_cache(maxsize=4096)
def _rows(box: Box, held: Box, wanted: Box, itemsize: int, limit: float) -> list[tuple[Any, ...]]:
    """Shape, row type, offsets and strides of each part, in the old shard and in the new one."""
    return [_strided(part, held, wanted, itemsize) for part in cut(box, itemsize, limit)]


def _strided(box: Box, held: Box, wanted: Box, itemsize: int) -> tuple[Any, ...]:
    read, written = _strides(held, itemsize), _strides(wanted, itemsize)
    dims = [(itemsize, 1, 1)]  # (how many, bytes from one to the next in the old shard, in the new), innermost first
    for (start, stop), a, b in reversed(list(zip(box, read, written, strict=True))):
        count, inner_a, inner_b = dims[-1]
        if (a, b) == (count * inner_a, count * inner_b):
            dims[-1] = (count * (stop - start), inner_a, inner_b)
        elif stop - start > 1:
            dims.append((stop - start, a, b))
    at = [
        sum((start - begin) * step for (start, _), (begin, _), step in zip(box, outside, steps, strict=True))
        for outside, steps in ((held, read), (wanted, written))
    ]
    row, outer = dims[0][0], dims[:0:-1]
    if not outer:
        return (row,), np.dtype(np.uint8), at[0], (1,), at[1], (1,)
    shape, read, written = zip(*outer, strict=True)
    return shape, np.dtype((np.void, row)), at[0], read, at[1], written


def _merged(copies: Sequence[Copy]) -> Sequence[Copy]:
    """Copies that differ by equal distances, on both sides, as one with a dimension more; so often as there are any."""
    while True:
        groups: dict[Any, list[Copy]] = {}
        for copy in copies:
            groups.setdefault(copy._replace(read_at=0, write_at=0), []).append(copy)
        found = [one for group in groups.values() for one in _progressions(group)]
        if len(found) == len(copies):
            return copies
        copies = found


def _progressions(group: list[Copy]) -> Iterable[Copy]:
    group = sorted(group, key=lambda copy: copy.write_at)
    while group:
        many = 1
        if len(group) > 1:
            read, write = _distance(group[0], group[1])
            many = next(
                (i for i in range(2, len(group)) if _distance(group[i - 1], group[i]) != (read, write)), len(group)
            )
        first, group = group[0], group[many:]
        if many == 1:
            yield first
        elif first.row == np.uint8:
            row = np.dtype((np.void, first.shape[0]))
            yield first._replace(shape=(many,), row=row, read_strides=(read,), write_strides=(write,))
        else:
            yield first._replace(
                shape=(many, *first.shape),
                read_strides=(read, *first.read_strides),
                write_strides=(write, *first.write_strides),
            )


def _in_short_rows(copy: Copy) -> Copy:
    """The same copy in enough elements for other threads to run beside it, where its rows divide."""
    row = copy.row.itemsize
    wanted = -(-RELEASING_ELEMENTS // math.prod(copy.shape))
    parts = next((n for n in range(wanted, min(8 * wanted, row // 64)) if row % n == 0), 1)
    if copy.row == np.uint8 or parts == 1:
        return copy
    return copy._replace(
        shape=(*copy.shape, parts),
        row=np.dtype((np.void, row // parts)),
        read_strides=(*copy.read_strides, row // parts),
        write_strides=(*copy.write_strides, row // parts),
    )


def _distance(a: Copy, b: Copy) -> tuple[int, int]:
    return b.read_at - a.read_at, b.write_at - a.write_at


def _strides(box: Box, itemsize: int) -> tuple[int, ...]:
    """Bytes from one index to the next, of each dimension of a C-ordered array."""
    strides = [itemsize]
    for start, stop in reversed(box[1:]):
        strides.append(strides[-1] * (stop - start))
    return tuple(reversed(strides))[: len(box)]


def _nbytes(box: Box, itemsize: int) -> int:
    return math.prod(stop - start for start, stop in box) * itemsize
