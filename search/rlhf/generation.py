"""What it takes to generate: prompts are read, then every sequence gets one token after the other (analytic).

    found = generation(decode, prefill, workload, growth=1.8, budget_bytes=7e10)
    found[0].seconds, found[0].working_bytes, found[0].waves

A *wave* is the sequences whose caches are on the devices at once. Where all fit there is one; where not, several follow
each other, each with its own prefill and all its steps of decoding. The samples of a prompt share the reading of it.

Decoding with stages: the wave's rows are cut into parts that go round the stages, so that all stages work at once. With
t the seconds of a part on the slowest stage and T those of a part through all of them, one token for all k parts takes
max(k t, T): a part's next token waits until the part is through. The steps are costed at the mean length of the cache
over the answer, which is exact where they are linear in it, and the cache is counted at its full length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from search.rlhf.forward import Passes
from search.rlhf.graph import Workload

EACH = 8
"""Waves up to which every number is looked at."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One way to generate, on one mesh; all of it is analytic.

    Attributes:
        decode, prefill: the two kinds of steps; `decode_row` and `prefill_row`: their numbers of parts.
        rotating: parts of a wave that go round the stages.
        waves: of sequences.
        seconds: of all sequences; `prefill_seconds` of it for reading prompts.
        token_seconds: of one token for all sequences of a wave.
        working_bytes: cache and workspace of a device, `cache_bytes` of it the cache.
    """

    decode: Passes
    prefill: Passes
    decode_row: int
    prefill_row: int
    rotating: int
    waves: int
    seconds: float
    prefill_seconds: float
    token_seconds: float
    working_bytes: float
    cache_bytes: float


def generation(
    decode: Passes, prefill: Passes, workload: Workload, *, growth: float, budget_bytes: float
) -> list[Generated]:
    """Ways to generate on one mesh, from few waves to many; none is both slower and larger than another.

    Args:
        decode: a step for all sequences, by the number of parts of all waves together.
        prefill: all prompts, by the number of parts of all waves together.
        growth: bytes of the cache at its full length over those of the one that `decode` was traced with.
        budget_bytes: of a device, the parameters included.
    """
    found = sorted(
        _choices(decode, prefill, workload, growth, budget_bytes - decode.params_bytes),
        key=lambda g: (g.seconds, g.working_bytes, g.waves),
    )
    out: list[Generated] = []
    for one in found:
        if not out or one.working_bytes < out[-1].working_bytes:
            out.append(one)
    return out


def _choices(
    decode: Passes, prefill: Passes, workload: Workload, growth: float, room_bytes: float
) -> Iterator[Generated]:
    steps = workload.new_tokens - 1
    for d, parts in enumerate(decode.parts_n):
        # More parts than twice the stages only make the steps smaller.
        for rotating in {k for k in (1, decode.stages, 2 * decode.stages) if not parts % k}:
            waves = int(parts // rotating)
            token = max(rotating * float(decode.slowest_n[d]), float(decode.through_n[d]))
            cache = growth * decode.cache_bytes * math.ceil(decode.rows / waves) / decode.rows
            # Each wave fills the stages anew.
            read_n = prefill.all_seconds() + (waves - 1) * (prefill.through_n - prefill.slowest_n)
            working_n = cache + np.maximum(prefill.workspace_n, decode.workspace_n[d])
            # No part of the prompts belongs to two waves.
            ok = (prefill.parts_n >= min(waves, prefill.rows)) & (working_n <= room_bytes)
            for p in np.flatnonzero(ok):
                read = float(read_n[p])
                yield Generated(
                    decode=decode,
                    prefill=prefill,
                    decode_row=d,
                    prefill_row=int(p),
                    rotating=rotating,
                    waves=waves,
                    seconds=read + waves * steps * token,
                    prefill_seconds=read,
                    token_seconds=token,
                    working_bytes=float(working_n[p]),
                    cache_bytes=cache,
                )


def parts_of(stages: Sequence[int]) -> list[int]:
    """Numbers of parts that `generation` looks at: of one wave to `EACH` every number, and then twice as many each."""
    waves = [*range(1, EACH + 1), *(EACH * 2**i for i in range(1, 5))]
    return sorted({w * k * p for w in waves for p in stages for k in (1, 2)})
