"""How many users a cluster serves: concurrency, memory, time to first token and per token (analytic).

    phases = Phases(decode=..., prefill=...)                   # what a step costs, by mesh
    found = size(Load(users=64, context_tokens=4096, output_tokens=256, ttft_seconds=0.5), phases, ...)
    found.asked, found.most_meeting, found.most_fitting        # each a Served, or None

The server that is sized batches continuously: one copy of the parameters, a step of decoding for all rows, and, where a
prompt waits, one chunk of it on every replica after each step (chunked prefill: Sarathi-Serve, Agrawal et al. 2024,
arXiv 2403.02310). Users send their next prompt when they have their answer, so a replica is a closed queueing network
of n users, its clock the steps: prompts are served one at a time, s chunks each, and an answer takes Z steps. Time to
the first token is R steps by mean value analysis, with the queue that an arriving prompt finds estimated as Bard (1979)
and Schweitzer (1979) do and half a prompt left of the one that is read (Reiser 1979): the R > 0 with
R^2 + (Z - n s) R = s Z - (n - 1) s^2 / 2. A simulation with answers of random lengths agrees within a twentieth; where
all answers are equally long, prompts come in turn, and the first token sooner.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from search.costing import memory_parts
from search.plan import Plan
from search.space import Space, divisors
from sharding_rules import MeshShape

CHUNKS = (256, 1024)
"""Chunks of a prompt that are tried, besides the whole of it."""
PRECISION = 16
"""The most users are found to one part in so many."""
MOST_USERS = 2**20


__all__ = [
    "Load",
    "Phases",
    "Served",
    "Sizing",
    "Step",
    "Times",
    "about_fitting",
    "serve",
    "size",
    "steady",
    "steps_of",
]


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        users: requests at once, each in its prompt or its answer.
        context_tokens: of a request, prompt and answer together; its cache is this long.
        output_tokens: of the answer.
        ttft_seconds: most time to the first token; inf for any.
        tpot_seconds: most time per token after it; inf for any.
        chunk_tokens: of a prompt between two steps of decoding; 0 for what suits best.

    Raises:
        ValueError: sizes below 1, no room for a prompt, limits that are not positive.
    """

    users: int
    context_tokens: int
    output_tokens: int
    ttft_seconds: float = math.inf
    tpot_seconds: float = math.inf
    chunk_tokens: int = 0

    def __post_init__(self):
        for name, low in (("users", 1), ("context_tokens", 2), ("output_tokens", 1), ("chunk_tokens", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}; a whole number from {low} up")
        if self.output_tokens >= self.context_tokens:
            raise ValueError(
                f"output_tokens={self.output_tokens} of a context of {self.context_tokens} leave no room for a prompt; "
                f"nearest: {self.context_tokens - 1}"
            )
        for name in ("ttft_seconds", "tpot_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; a time above 0")

    @property
    def prompt_tokens(self) -> int:
        return self.context_tokens - self.output_tokens

    @property
    def limited(self) -> bool:
        """Whether there is a limit on any time."""
        return min(self.ttft_seconds, self.tpot_seconds) < math.inf

    @property
    def chunks(self) -> tuple[int, ...]:
        """Sizes of chunks to choose from."""
        if self.chunk_tokens:
            return (min(self.chunk_tokens, self.prompt_tokens),)
        return (*(size for size in CHUNKS if size < self.prompt_tokens), self.prompt_tokens)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step costs on one mesh: seconds, bytes per device, and how to make its plan."""

    seconds: float
    params_bytes: float
    cache_bytes: float
    workspace_bytes: float
    plan: Callable[[], Plan] = dataclasses.field(compare=False, repr=False)


Steps = Mapping[MeshShape, Step]


@dataclasses.dataclass(frozen=True)
class Phases:
    """The two kinds of steps, each on every mesh that can run it.

    Attributes:
        decode: (replicas, rows) -> steps of one more token for each row, their caches full, on meshes with so many
            replicas.
        prefill: (replicas, tokens) -> steps that read the first tokens of a prompt on each replica.
    """

    decode: Callable[[int, int], Steps]
    prefill: Callable[[int, int], Steps]


@dataclasses.dataclass(frozen=True)
class Served:
    """A number of users on one mesh; all of it is analytic.

    Attributes:
        users: requests at once.
        rows: of the cache: users, rounded up to what the replicas share out evenly.
        mesh: devices per axis, of both kinds of steps.
        chunk_tokens: of a prompt per step; chunks: of a whole prompt.
        decode_seconds, chunk_seconds: of a step of decoding, and of a chunk of a prompt per replica.
        ttft_seconds, tpot_seconds: time to the first token, and mean time per token after it, under this load.
        requests_per_second: of the cluster.
        memory: params, cache and workspace, bytes per device.
        decode, prefill: the steps' plans.
    """

    users: int
    rows: int
    mesh: MeshShape
    chunk_tokens: int
    chunks: int
    decode_seconds: float
    chunk_seconds: float
    ttft_seconds: float
    tpot_seconds: float
    requests_per_second: float
    memory: Mapping[str, float]
    decode: Step
    prefill: Step

    @property
    def bytes_per_device(self) -> float:
        return sum(self.memory.values())

    @property
    def prompt_seconds(self) -> float:
        """Of a prompt that nothing else delays."""
        return self.chunks * self.chunk_seconds

    def about_fitting(self, budget_bytes: float) -> int:
        """About how many users fit on this mesh."""
        return about(self.decode, self.rows, budget_bytes)

    def misses(self, load: Load) -> float:
        """The worst time over its limit; at most 1 where both limits hold."""
        return max(self.ttft_seconds / load.ttft_seconds, self.tpot_seconds / load.tpot_seconds)

    def meets(self, load: Load) -> bool:
        return self.misses(load) <= 1


@dataclasses.dataclass(frozen=True)
class Sizing:
    """What was found.

    Attributes:
        asked: the best for the users that were asked for; None where they do not fit.
        most_meeting: the most users for whom the limits hold; None where they hold for none.
        most_fitting: the most users whose caches fit; None where not even one fits.
        by_mesh: for the users asked for, the best of every mesh that holds them.
        least_bytes: per device, of the mesh that needs least for one user; 0 where that fits.
    """

    asked: Served | None
    most_meeting: Served | None
    most_fitting: Served | None
    by_mesh: tuple[Served, ...]
    least_bytes: float


def steady(users: float, decode_seconds: float, chunk_seconds: float, chunks: int, output_tokens: int) -> Times:
    """Times of one replica in its steady state.

    Args:
        users: of this replica.
        decode_seconds: of a step of decoding for all of them.
        chunk_seconds: of a chunk of a prompt, between two steps.
        chunks: of a prompt.
        output_tokens: of an answer; the first comes with the prompt.

    >>> alone = steady(1, 0.01, 0.1, 2, 11)
    >>> round(alone.ttft_seconds, 3), round(alone.tpot_seconds, 4)
    (0.2, 0.01)
    """
    answer = output_tokens - 1
    slack = answer - users * chunks
    found = slack**2 + 4 * chunks * answer - 2 * (users - 1) * chunks**2
    steps = max((math.sqrt(max(found, 0.0)) - slack) / 2, -slack, chunks)
    # Of the steps of an answer, those that a chunk of another user's prompt comes between; a user alone has none.
    share = min((users - 1) * chunks / (steps + answer), 1.0) if users > 1 else 0.0
    ttft = steps * (chunk_seconds + (decode_seconds if users > 1 else 0.0))
    tpot = decode_seconds + share * chunk_seconds
    return Times(ttft, tpot, users / (ttft + answer * tpot))


@dataclasses.dataclass(frozen=True)
class Times:
    """Time to first token, time per token, and requests per second, of one replica."""

    ttft_seconds: float
    tpot_seconds: float
    requests_per_second: float


def size(load: Load, phases: Phases, *, devices: int, budget_bytes: float) -> Sizing:
    """Find the best mesh for the users, and how many users there may be.

    On every mesh, times and bytes grow with the users, so that the most are found by closing in on them.

    Args:
        load: what is asked.
        phases: what steps cost.
        devices: of the cluster.
        budget_bytes: of a device that may be used.
    """
    search = _Search(load, phases, devices, budget_bytes)
    asked = search.served(load.users)
    fitting = _most(load.users, lambda users: search.least_bytes(users) / budget_bytes)
    meeting = 0
    if fitting and (not asked or load.limited):
        start = min(load.users, fitting)
        meeting = _most(start, lambda users: min((s.misses(load) for s in search.served(users)), default=math.inf))
    elif fitting:
        meeting = fitting
    by_mesh: dict[MeshShape, Served] = {}
    for one in asked:
        by_mesh.setdefault(one.mesh, one)
    return Sizing(
        asked=asked[0] if asked else None,
        most_meeting=search.served(meeting)[0] if meeting else None,
        most_fitting=search.served(fitting)[0] if fitting else None,
        by_mesh=tuple(by_mesh.values()),
        least_bytes=0.0 if fitting else search.least_bytes(1),
    )


def serve(load: Load, phases: Phases, *, devices: int, budget_bytes: float) -> Served | None:
    """The best mesh for just these users, as `size` has it; None where they do not fit."""
    return next(iter(_Search(load, phases, devices, budget_bytes).served(load.users)), None)


def about_fitting(phases: Phases, *, devices: int, budget_bytes: float) -> int:
    """About how many users fit, by one look at as many as there are devices: see `about`."""
    rows = devices
    steps = (step for shards in divisors(devices) for step in phases.decode(shards, rows).values())
    return max((about(step, rows, budget_bytes) for step in steps), default=0)


def about(step: Step, rows: int, budget_bytes: float) -> int:
    """How many rows fit where the cache and the workspace grow in proportion to them."""
    grows = step.cache_bytes + step.workspace_bytes
    return max(0, int(rows * (budget_bytes - step.params_bytes) / grows))


class _Search:
    """One sizing, with what it has worked out so far."""

    def __init__(self, load: Load, phases: Phases, devices: int, budget_bytes: float):
        self.load, self.phases, self.budget = load, phases, budget_bytes
        self.shards = divisors(devices)
        self._served: dict[int, list[Served]] = {}

    def _meshes(self, users: int) -> Iterator[tuple[int, int, Steps]]:
        """Replicas, rows, and steps of decoding on every mesh with so many replicas."""
        for shards in self.shards:
            rows = -(-users // shards) * shards
            yield shards, rows, self.phases.decode(shards, rows)

    def least_bytes(self, users: int) -> float:
        """Per device, on the mesh that needs least, with the smallest chunk."""
        least, chunk = math.inf, min(self.load.chunks)
        for shards, _, steps in self._meshes(users):
            if not any(sum(_memory(step).values()) < min(least, self.budget) for step in steps.values()):
                # It does not matter how much more a chunk takes where the cache is too much already.
                least = min([least, *(sum(_memory(step).values()) for step in steps.values())])
                continue
            parts = self.phases.prefill(shards, chunk)
            both = (sum(_memory(step, parts[mesh]).values()) for mesh, step in steps.items() if mesh in parts)
            least = min([least, *both])
        return least

    def served(self, users: int) -> list[Served]:
        """Every mesh and chunk that holds so many users, the best first."""
        if users not in self._served:
            self._served[users] = sorted(self._choices(users), key=lambda s: _order(s, self.load))
        return self._served[users]

    def _choices(self, users: int) -> Iterator[Served]:
        load = self.load
        groups = [
            (shards, rows, {mesh: step for mesh, step in steps.items() if sum(_memory(step).values()) <= self.budget})
            for shards, rows, steps in self._meshes(users)
        ]
        fastest = [min((step.seconds for step in steps.values()), default=math.inf) for _, _, steps in groups]
        # Where decoding alone is too slow, prompts need not be looked at, unless it is too slow everywhere.
        limit = load.tpot_seconds if min(fastest) <= load.tpot_seconds else math.inf
        for (shards, rows, meshes), seconds in zip(groups, fastest, strict=True):
            if not meshes or seconds > limit:
                continue
            whole = self.phases.prefill(shards, load.prompt_tokens)
            for chunk in load.chunks:
                parts = self.phases.prefill(shards, chunk)
                for mesh, decode in meshes.items():
                    if mesh in whole and mesh in parts and sum(_memory(decode, parts[mesh]).values()) <= self.budget:
                        # A later chunk attends to those before it: it takes its share of the whole prompt, on average.
                        share = whole[mesh].seconds * chunk / load.prompt_tokens
                        seconds = max(parts[mesh].seconds, share)
                        yield _serve(load, users, rows, mesh, chunk, decode, parts[mesh], seconds)


def _serve(
    load: Load, users: int, rows: int, mesh: MeshShape, chunk: int, decode: Step, prefill: Step, chunk_seconds: float
) -> Served:
    shards, chunks = mesh.batch_shards, -(-load.prompt_tokens // chunk)
    times = steady(rows / shards, decode.seconds, chunk_seconds, chunks, load.output_tokens)
    return Served(
        users=users,
        rows=rows,
        mesh=mesh,
        chunk_tokens=chunk,
        chunks=chunks,
        decode_seconds=decode.seconds,
        chunk_seconds=chunk_seconds,
        ttft_seconds=times.ttft_seconds,
        tpot_seconds=times.tpot_seconds,
        # Some replicas may have a user less than the others.
        requests_per_second=times.requests_per_second * shards * users / rows,
        memory=_memory(decode, prefill),
        decode=decode,
        prefill=prefill,
    )


def _memory(decode: Step, prefill: Step | None = None) -> dict[str, float]:
    """Bytes per device: the two kinds of steps share parameters and cache, and take turns with the workspace."""
    return {
        "params": decode.params_bytes,
        "cache": decode.cache_bytes,
        "workspace": max(decode.workspace_bytes, prefill.workspace_bytes if prefill else 0.0),
    }


def _order(served: Served, load: Load) -> tuple[float, ...]:
    """Where the limits hold, the most requests per second come first; else what misses them least."""
    return max(served.misses(load), 1.0), -served.requests_per_second, served.bytes_per_device


def _most(start: int, share: Callable[[int], float]) -> int:
    """The largest number whose share of a limit, which grows with it, is at most 1; to one part in `PRECISION`.

    By false position, on a line through what is known on both sides, and by halves where that is slow.

    Returns:
        0 where even 1 has too large a share.
    """
    low, high, below, above = 0, start, 0.0, share(start)
    if above > 1 and start > 1:
        low, below = 1, share(1)
    if below > 1:
        return 0
    while above <= 1:
        if high >= MOST_USERS:
            return high
        low, below = high, above
        # What grows from nothing in proportion would reach the limit there; what has a fixed part goes further yet.
        high = min(max(2 * high, min(int(high / max(above, 1e-9)), 32 * high)), MOST_USERS)
        above = share(high)
    halve = False
    while high - low > max(1, low // PRECISION):
        middle = (low + high) // 2
        if not halve and math.isfinite(above):
            middle = int(low + (high - low) * (1 - below) / (above - below))
        # Numbers with large powers of two among their factors: replicas of any number share them out evenly.
        grain = 2 ** int(math.log2(max(1, low // PRECISION)))
        middle = max(middle // grain, low // grain + 1) * grain
        middle = middle if middle < high else low + 1
        found = share(middle)
        halve = not halve
        if found <= 1:
            low, below = middle, found
        else:
            high, above = middle, found
    return low


def steps_of(space: Space, replicas: int, *, within_bytes: float = math.inf) -> dict[MeshShape, Step]:
    """What a step costs on every mesh of a space with so many replicas, with its fastest preset and order of axes.

    Args:
        within_bytes: meshes that need more per device are not costed: their seconds are inf.
    """
    model, best = space.model, {}
    for inner in space.inner_meshes():
        if inner.mesh().batch_shards != replicas:
            continue
        place = model.place(inner)
        if isinstance(place, str):
            continue
        columns = space.columns(place)
        if not len(columns):
            continue
        memory = memory_parts(model, place, columns)
        needed = sum(memory.values(), start=np.zeros(len(columns)))
        seconds = np.full(len(columns), math.inf)
        if (held := np.flatnonzero(needed <= within_bytes)).size:
            seconds[held] = model.costs.seconds(place, columns.take(held), exact=True).total
        for fsdp in np.unique(columns.fsdp):
            rows = np.flatnonzero(columns.fsdp == fsdp)
            i = int(rows[np.argmin(seconds[rows])])
            mesh = place.mesh(place.fsdp_sizes[int(fsdp)])
            if mesh in best and best[mesh].seconds <= seconds[i]:
                continue
            parts = {name: float(x[i]) for name, x in memory.items()}
            params, cache = parts.pop("params"), parts.pop("cache", 0.0)
            best[mesh] = Step(float(seconds[i]), params, cache, sum(parts.values()), _planner(space, place, columns, i))
    return best


def _planner(space: Space, place: Any, columns: Any, row: int) -> Callable[[], Plan]:
    return lambda: space.plan(place, columns, row)
