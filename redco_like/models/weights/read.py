"""Tensors of a checkpoint into leaves: each is read once, by ranges that some shard of this process wants.

    read_into(leaves, names.pieces, tensors, progress=print)

Several threads read and copy, each with a few megabytes of its own.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from redco_like.models.weights.files import DTYPES, Tensor, grid
from redco_like.models.weights.names import Piece
from redco_like.models.weights.scatter import Box, Range, parts, source_box, unit_of
from redco_like.models.weights.shards import Leaf, Shard

CHUNK_BYTES = 4 * 2**20
"""Read at a time: what stays in a core's cache between reading and copying."""
STAGED_CHUNK_BYTES = 64 * 2**20
"""The same where each chunk's parts are moved to devices one by one."""
_RUN_BYTES = 64 * 2**10  # below this, whole rows are read and some columns dropped
_MAX_THREADS = 8

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and those to read in all, of this process."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a shard wants of a piece: the box of the piece, and where in the shard that begins."""

    piece: Piece
    shard: Shard
    box: Box
    lead: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows and columns of a tensor that are read, and who wants some of them."""

    tensor: Tensor
    rows: Range
    columns: Range
    jobs: tuple[_Job, ...]

    @property
    def bytes(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0]) * grid(self.tensor)[2]


def read_into(
    leaves: Mapping[str, Leaf],
    pieces: Sequence[Piece],
    tensors: Mapping[str, Tensor],
    *,
    progress: Progress | None = None,
) -> None:
    """Fill the leaves of this process, one after the other as far as they have tensors of their own.

    Raises:
        WeightsError: a file became shorter.
        OSError: a file cannot be read.
    """
    blocks = blocks_of(leaves, pieces, tensors)
    total, done, lock = sum(block.bytes for block in blocks), 0, threading.Lock()

    def fill(block: _Block) -> None:
        nonlocal done
        for size in _fill(block):
            if progress is not None:
                with lock:
                    done += size
                    progress(done, total)

    count = min(_MAX_THREADS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="read-weights") as pool:
        futures = [pool.submit(fill, block) for block in blocks]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def blocks_of(leaves: Mapping[str, Leaf], pieces: Iterable[Piece], tensors: Mapping[str, Tensor]) -> list[_Block]:
    """What this process reads: leaf by leaf, so that few are incomplete at a time, then in the order of the files."""
    rank = {path: i for i, path in enumerate(leaves)}
    jobs: dict[str, list[_Job]] = {}
    for piece in pieces:
        for shard in leaves[piece.leaf].shards:
            count = len(piece.at)
            if all(start <= i < stop for i, (start, stop) in zip(piece.at, shard.box, strict=False)):
                lead = tuple(i - start for i, (start, _) in zip(piece.at, shard.box, strict=False))
                jobs.setdefault(piece.tensor, []).append(_Job(piece, shard, shard.box[count:], lead))
    blocks = [block for name, wanted in jobs.items() for block in _merged(tensors[name], wanted)]

    def order(block: _Block) -> tuple[Any, ...]:
        return min(rank[job.piece.leaf] for job in block.jobs), block.tensor.path, block.tensor.start, block.rows

    return sorted(blocks, key=order)


def _merged(tensor: Tensor, jobs: Sequence[_Job]) -> list[_Block]:
    """The ranges of rows that the jobs want, those that touch as one."""
    wanted = []
    for job in jobs:
        rows, columns = (*source_box(tensor.shape, job.piece.view, job.box), (0, 1), (0, 1))[:2]
        wanted.append((rows, columns, job))
    wanted.sort(key=lambda entry: entry[0])
    blocks: list[_Block] = []
    for rows, columns, job in wanted:
        last = blocks[-1] if blocks else None
        if last is not None and rows[0] <= last.rows[1]:
            rows = (last.rows[0], max(rows[1], last.rows[1]))
            columns = (min(columns[0], last.columns[0]), max(columns[1], last.columns[1]))
            blocks[-1] = _Block(tensor, rows, columns, (*last.jobs, job))
        else:
            blocks.append(_Block(tensor, rows, columns, (job,)))
    return [_rounded(block) for block in blocks]


def _rounded(block: _Block) -> _Block:
    """The block with whole heads of every view, and whole rows where little of them is wanted."""
    row_unit, column_unit = _units(block)
    _, C, one = grid(block.tensor)
    columns = _outer(block.columns, column_unit)
    if (columns[1] - columns[0]) * one < _RUN_BYTES:
        columns = (0, C)
    return dataclasses.replace(block, rows=_outer(block.rows, row_unit), columns=columns)


def _outer(inner: Range, unit: int) -> Range:
    return inner[0] // unit * unit, -(-inner[1] // unit) * unit


def _fill(block: _Block) -> Iterable[int]:
    """Read a block by chunks and pass each on; yields the bytes read."""
    chunk_bytes = STAGED_CHUNK_BYTES if any(job.shard.staged for job in block.jobs) else CHUNK_BYTES
    tensor, dtype = block.tensor, DTYPES[block.tensor.dtype]
    one = grid(tensor)[2]
    row_bytes = (block.columns[1] - block.columns[0]) * one
    row_unit, column_unit = _units(block)
    row_step = max(row_unit, chunk_bytes // max(row_bytes, 1) // row_unit * row_unit)
    column_step = block.columns[1] - block.columns[0]
    if row_step * row_bytes > chunk_bytes and row_step == 1:
        column_step = max(column_unit, chunk_bytes // one // column_unit * column_unit)
    scratch = np.empty(row_step * min(column_step * one, row_bytes), np.uint8)
    with tensor.open() as file:
        for rows in _steps(block.rows, row_step):
            for columns in _steps(block.columns, column_step):
                size = (rows[1] - rows[0]) * (columns[1] - columns[0]) * one
                file.read(rows, columns, scratch[:size])
                have = (rows, columns, *((0, n) for n in tensor.shape[2:]))[: len(tensor.shape)]
                chunk = scratch[:size].view(dtype).reshape([stop - start for start, stop in have])
                for job in block.jobs:
                    for part in parts(tensor.shape, job.piece.view, chunk, have, job.box):
                        ones = (1,) * len(job.lead)
                        source = part.source.reshape((*ones, *part.source.shape))
                        job.shard.write((*job.lead, *part.start), (*ones, *part.shape), source)
                yield size


def _units(block: _Block) -> tuple[int, int]:
    """Steps of rows and columns that cut no box of any view apart."""
    shape = block.tensor.shape
    units = [
        math.lcm(*(unit_of(shape, job.piece.view, d) for job in block.jobs)) if d < len(shape) else 1 for d in (0, 1)
    ]
    return units[0], units[1]


def _steps(whole: Range, step: int) -> Iterable[Range]:
    for start in range(*whole, step):
        yield start, min(start + step, whole[1])
