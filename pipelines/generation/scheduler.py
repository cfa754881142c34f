"""Which sequence is in which row of the cache, and what is computed next. Plain Python: no arrays, no devices.

    scheduler = Scheduler(rows=16, length=2048, shapes=(Shape(1, 256), Shape(4, 64)))
    scheduler.add(Sequence(request=0, sample=0, prompt=(5, 7, 9), max_tokens=8))
    copies = scheduler.admit()               # waiting sequences get rows; what they share with others is copied
    work = scheduler.chunk()                 # a piece of the prompts that are not read yet
    rows = scheduler.decoding()              # rows that lack exactly one token
    scheduler.read(work); scheduler.wrote(row, tokens, finish)        # what was computed

One rule holds a row together: of the tokens that a sequence has (prompt and continuation), `held` are in the cache.
More than one missing is read in chunks; the last one missing is read by a decoding step, which gives the next token.

Rows are split evenly over `shards` groups of devices; what is copied stays within its shard.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, Literal

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A piece of reading: so many rows of each shard, so many tokens of each."""

    rows: int
    tokens: int


@dataclasses.dataclass
class Sequence:
    """One continuation of a prompt.

    Attributes:
        request, sample: whose it is, and which of the request's continuations.
        params: what the sampler is asked for; the scheduler does not look at it.
        written: tokens of the continuation so far.
        order: place in the order of arrival, given by the scheduler.
    """

    request: int
    sample: int
    prompt: tuple[int, ...]
    max_tokens: int
    params: Any = None
    written: list[int] = dataclasses.field(default_factory=list)
    order: int = -1

    @property
    def known(self) -> list[int]:
        """The prompt and what follows so far."""
        return [*self.prompt, *self.written]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.written)

    def between(self, start: int, stop: int) -> list[int]:
        """`known[start:stop]`, without the rest."""
        read = len(self.prompt)
        return [*self.prompt[start:stop], *self.written[max(start - read, 0) : max(stop - read, 0)]]


@dataclasses.dataclass
class Row:
    """A row of the cache: the tokens whose keys and values it holds, from position 0 on, and for which sequence.

    A row that is free keeps what it holds until it is needed: a later prompt may begin in the same way.
    """

    index: int
    held: list[int] = dataclasses.field(default_factory=list)
    sequence: Sequence | None = None
    freed: int = 0

    @property
    def missing(self) -> int:
        """How many known tokens are not in the cache."""
        s = self.sequence
        return 0 if s is None else len(s) - len(self.held)


@dataclasses.dataclass(frozen=True)
class Copy:
    """The first `tokens` positions of a row are to be copied to another one."""

    source: int
    target: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What one row reads: its tokens from position `start` on; `final` if none is missing after it."""

    row: int
    start: int
    tokens: tuple[int, ...]
    final: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of reading: for each shard the parts of at most `shape.rows` rows."""

    shape: Shape
    parts: tuple[tuple[Part, ...], ...]


class Scheduler:
    """Rows, the queue, and what is shared.

    Args:
        rows: of the cache; a multiple of `shards`.
        length: positions of a row.
        shapes: what can be read at a time; one of one row is needed.
        shards: groups of devices that have rows of their own.
        least_shared: prompts that have fewer first tokens in common share nothing.
    """

    def __init__(self, *, rows: int, length: int, shapes: Seq[Shape], shards: int = 1, least_shared: int = 16):
        if rows < 1 or rows % shards:
            raise ValueError(f"rows={rows} over {shards} shards; nearest: {max(1, rows // shards) * shards}")
        self.length, self.shapes, self.shards, self.least_shared = length, tuple(shapes), shards, least_shared
        self.rows = [Row(i) for i in range(rows)]
        self.waiting: list[Sequence] = []
        self.shared_tokens = self.shared_prompts = 0
        self._orders, self._frees = itertools.count(), itertools.count(1)

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if row.sequence is not None]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def shard(self, row: int) -> int:
        return row // (len(self.rows) // self.shards)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue.

        Raises:
            ValueError: it is empty, or does not fit into a row.
        """
        if not sequence.prompt or len(sequence.prompt) + sequence.max_tokens > self.length:
            raise ValueError(
                f"a prompt of {len(sequence.prompt)} tokens and {sequence.max_tokens} new ones; there is at least one, "
                f"and together at most {self.length}"
            )
        sequence.order = next(self._orders)
        self.waiting.append(sequence)

    def cancel(self, request: int) -> list[Sequence]:
        """Drop all sequences of a request, waiting or running."""
        dropped = [s for s in self.waiting if s.request == request]
        self.waiting = [s for s in self.waiting if s.request != request]
        for row in self.running:
            if row.sequence is not None and row.sequence.request == request:
                dropped.append(row.sequence)
                self.free(row.index)
        return dropped

    def free(self, row: int, *, spoiled: bool = False) -> None:
        """Take a row from its sequence; one that is spoiled shares nothing."""
        self.rows[row].sequence = None
        self.rows[row].freed = next(self._frees)
        if spoiled:
            self.rows[row].held = []

    def admit(self) -> list[Copy]:
        """Give rows to waiting sequences, first come first served; return what is to be copied, in order.

        A sequence whose prompt begins with what a row of the same shard is about to hold waits for it, and a free row
        of that shard with it.
        """
        copies: list[Copy] = []
        free = {shard: [row for row in self._of(shard) if row.sequence is None] for shard in range(self.shards)}
        for sequence in list(self.waiting):
            open_ = [shard for shard in free if free[shard]]
            if not open_:
                break
            best = {shard: self._match(shard, sequence.prompt) for shard in open_}
            shard = max(open_, key=lambda s: (best[s][1], len(free[s]), -s))
            source, common = best[shard]
            soon = max(open_, key=lambda s: self._coming(s, sequence.prompt))
            if self._coming(soon, sequence.prompt) > common:
                free[soon].pop()  # kept for it
                continue
            target = self._target(free[shard], source, common)
            if source is not None and common:
                if source is not target:
                    copies.append(Copy(source.index, target.index, common))
                self.shared_tokens += common
                self.shared_prompts += 1
            free[shard].remove(target)
            self.waiting.remove(sequence)
            target.held, target.sequence = list(sequence.prompt[:common]), sequence
        return copies

    def chunk(self) -> Work | None:
        """What is read next of the prompts: of all shapes, the one that gets most done for its size."""
        wanted = [
            sorted((row for row in self._of(shard) if row.missing > 1), key=_order) for shard in range(self.shards)
        ]
        if not any(wanted):
            return None

        def gain(shape: Shape) -> float:
            useful = sum(min(row.missing, shape.tokens) for rows in wanted for row in rows[: shape.rows])
            # A dispatch costs about as much as a quarter of the largest piece.
            return useful / (self.shards * shape.rows * shape.tokens + overhead)

        overhead = max(shape.rows * shape.tokens for shape in self.shapes) * self.shards / 4
        shape = max(self.shapes, key=gain)
        return Work(shape, tuple(tuple(self._parts(rows[: shape.rows], shape)) for rows in wanted))

    def decoding(self) -> list[Row]:
        """Rows whose next token can be computed."""
        return [row for row in self.rows if row.missing == 1]

    def read(self, work: Work) -> None:
        """Note that a piece was read."""
        for part in itertools.chain(*work.parts):
            row = self.rows[part.row]
            row.held[part.start :] = part.tokens

    def wrote(self, row: int, tokens: Seq[int], finish: Finish | None) -> Sequence:
        """Note the tokens that a row has got, all but the last of which are in the cache; free it if it is finished.

        Returns:
            The row's sequence.
        """
        place = self.rows[row]
        sequence = place.sequence
        if sequence is None:
            raise ValueError(f"row {row} has no sequence")
        if tokens:
            sequence.written.extend(tokens)
            if finish != "error":
                place.held += sequence.between(len(place.held), len(sequence) - 1)
        if finish is not None:
            self.free(row, spoiled=finish == "error")
        return sequence

    def _of(self, shard: int) -> list[Row]:
        count = len(self.rows) // self.shards
        return self.rows[shard * count : (shard + 1) * count]

    def _match(self, shard: int, prompt: tuple[int, ...]) -> tuple[Row | None, int]:
        """The row of a shard that has most of a prompt; at least one token is left to be read."""
        found: tuple[Row | None, int] = (None, 0)
        for row in self._of(shard):
            common = min(common_prefix(row.held, prompt), len(prompt) - 1)
            if common >= self.least_shared and common > found[1]:
                found = row, common
        return found

    def _coming(self, shard: int, prompt: tuple[int, ...]) -> int:
        """How much of a prompt the rows of a shard will have when they have read theirs."""
        reading = [row.sequence for row in self._of(shard) if row.sequence is not None and row.missing > 1]
        most = max((min(common_prefix(s.prompt, prompt), len(prompt) - 1) for s in reading), default=0)
        return most if most >= self.least_shared else 0

    def _target(self, free: list[Row], source: Row | None, common: int) -> Row:
        """The free row to take: the source itself if nothing of it is lost, else the one that was freed first."""
        if source is not None and any(row is source for row in free) and (len(source.held) <= common or len(free) == 1):
            return source
        return min((row for row in free if row is not source), key=lambda row: (bool(row.held), row.freed, row.index))

    def _parts(self, rows: list[Row], shape: Shape) -> Iterator[Part]:
        for row in rows:
            if (sequence := row.sequence) is None:
                continue
            # A piece ends within the row; tokens that were read already are read again.
            start = min(len(row.held), self.length - shape.tokens)
            stop = min(len(sequence), start + shape.tokens)
            yield Part(row.index, start, tuple(sequence.between(start, stop)), stop == len(sequence))


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """How many first tokens two sequences have in common.

    >>> common_prefix([1, 2, 3], (1, 2, 4, 5))
    2
    """
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _order(row: Row) -> int:
    return row.sequence.order if row.sequence is not None else -1
