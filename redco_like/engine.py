"""Inference for many requests at a time: they join and leave at any step, and each gets the tokens it would get alone.

    engine = Engine(model, params, eos=(2,))
    engine.warm_up(print)                                        # compiles everything it will ever use
    request = engine.submit(prompt, SamplingParams(max_tokens=64, temperature=0.7))
    while not engine.idle:
        for event in engine.step():
            ...                                                  # event.tokens as they come, event.finish at the end

    completions = engine.generate([prompt, other], SamplingParams(max_tokens=64))      # or all at once

A step reads at most one piece of the prompts (`chunk_tokens`) and decodes at most `steps_per_dispatch` tokens of every
running row: a long prompt never holds the others up for more than one piece. Prompts that begin alike are read once.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pipelines.generation import SamplingParams, Scheduler, Sizes
from pipelines.generation import Sequence as Continuation
from pipelines.generation.programs import (
    ERROR,
    GOING,
    LENGTH,
    STOP,
    Compilation,
    Decoding,
    Reading,
)
from pipelines.generation.sampling import ENDS, STOP_TOKENS, settings_of
from pipelines.generation.scheduler import Copy, Finish, Row, Work
from pipelines.problem import cast_floats
from redco_like.deployer import Deployer
from redco_like.engine_layout import (
    CHUNK_TOKENS,
    SMALLEST,
    STEPS_PER_DISPATCH,
    classes,
    functions_of,
    make_plans,
    make_programs,
    piece_shapes,
)
from search import Plan
from sharding_rules import MeshShape, abstract, path_str

if TYPE_CHECKING:
    from redco_like.models.model import Model

FINISHES: dict[int, Finish | None] = {GOING: None, STOP: "stop", LENGTH: "length", ERROR: "error"}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Event:
    """Tokens that a request has got in a step, or its end.

    Attributes:
        request: what `submit` returned.
        sample: which of its continuations.
        tokens: new ones; an end token and a stop sequence are among them.
        logprobs: of these tokens, if they were asked for.
        finish: why the continuation ended; None while it goes on.
        error: what went wrong, where `finish` is "error".
    """

    request: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    finish: Finish | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole continuation."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish
    error: str = ""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and how it stands.

    Attributes:
        waiting, running: sequences (a request has n).
        rows: of the cache; as many run at a time.
        prompt_tokens: of all prompts that were begun, and of these `shared_tokens` that were copied, not computed.
        generated_tokens: handed out.
        finished, cancelled, failed: sequences.
        reads, decodes, copies: dispatches; `decode_steps` in all.
        compilations, compile_seconds: programs so far.
        programs: as many there can be.
        cache_bytes, params_bytes: on one device.
    """

    waiting: int
    running: int
    rows: int
    prompt_tokens: int
    shared_tokens: int
    shared_prompts: int
    generated_tokens: int
    finished: int
    cancelled: int
    failed: int
    reads: int
    decodes: int
    decode_steps: int
    copies: int
    compilations: int
    compile_seconds: float
    programs: int
    cache_bytes: int
    params_bytes: int


class Engine:
    """Continuous batching of a decoder on a mesh. `submit` and `cancel` may be called by any thread, `step` by one.

    Args:
        model: a decoder.
        params: its parameters; floats are cast to the model's dtype. Those that lie as the plan wants are not copied.
            Or their shapes: then `set_params` brings them before the first step.
        plan: "auto", the name of a preset, a `Plan`, the path of a plan file; or two of them, for reading prompts and
            for decoding. The parameters are there twice if these want them in different places.
        mesh: devices per axis; default the one that the parameters live on, else what the plan suggests.
        deployer: whose devices are used; default all there are.
        devices: those that are used, in place of the deployer's; all of this process, whatever others there are.
        rows: sequences that run at a time.
        length: tokens of a sequence at most, prompt and continuation.
        chunk_tokens: tokens of prompts that are read at a time, on each group of devices that shares a row.
        steps_per_dispatch: tokens per row that are decoded before the host looks at them; one while prompts are read.
        eos: tokens that end a continuation, where the request does not say.

    Raises:
        ValueError: bad sizes, a model that is no decoder.
        PlanError: a plan that cannot be carried out.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        *,
        plan: Plan | str | pathlib.Path | tuple[Any, Any] = "auto",
        mesh: MeshShape | str | None = None,
        deployer: Deployer | None = None,
        devices: Sequence[Any] | None = None,
        rows: int = 16,
        length: int = 2048,
        chunk_tokens: int = CHUNK_TOKENS,
        steps_per_dispatch: int = STEPS_PER_DISPATCH,
        eos: Sequence[int] = (),
    ):
        for name, value in (
            ("rows", rows),
            ("length", length),
            ("chunk_tokens", chunk_tokens),
            ("steps_per_dispatch", steps_per_dispatch),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
        if model.config.kind != "decoder":
            raise ValueError(f"{model.config.family} ({model.config.kind}) is no decoder; Predictor.generate takes it")
        if devices is None:
            devices = jax.devices() if deployer is None else deployer.devices
        elsewhere = [d for d in devices if d.process_index != jax.process_index()]
        if elsewhere or not len(devices):
            raise ValueError(
                f"an Engine runs in one process: of the {len(devices)} devices {len(elsewhere)} belong to others than "
                f"process {jax.process_index()}; give devices=jax.local_devices(), or some of them"
            )
        if len(eos) > ENDS:
            raise ValueError(f"eos has {len(eos)} tokens; at most {ENDS}")
        model.check_length(length)
        self.model, self.length, self.eos = model, length, tuple(int(t) for t in eos)
        self._vocab = model.config.vocab
        self._apart: Callable[[Any], Any] | None = None
        self._steps = steps_per_dispatch
        functions = functions_of(model, length)
        plans, on_mesh = make_plans(
            functions,
            params,
            plan=plan,
            mesh=MeshShape.parse(mesh) if isinstance(mesh, str) else mesh,
            devices=list(devices),
            dtype=model.dtype,
            rows=rows,
            length=length,
            chunk_tokens=min(chunk_tokens, length),
        )
        shards = plans.decode.mesh.batch_shards
        if rows % shards:
            raise ValueError(
                f"rows={rows} do not split over {shards} data shards (mesh {plans.decode.mesh}); nearest: "
                f"{max(rows // shards, 1) * shards}"
            )
        sizes = Sizes(
            rows,
            length,
            classes(length, 2, SMALLEST),
            classes(length, 4, 2 * SMALLEST),
            piece_shapes(min(chunk_tokens, length), rows // shards),
            steps_per_dispatch,
        )
        if (
            on_mesh.size == 1
            and on_mesh.devices.flat[0].platform == "cpu"
            and not (plans.decode.rules or plans.prefill.rules)
        ):
            from redco_like.models.decoder import unroll
            from redco_like.models.model import unrolled

            functions = functions_of(unrolled(model), length)
            self._apart = unroll
        there = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        params = self._laid_out(params) if there else jax.eval_shape(self._laid_out, params)
        self.programs = make_programs(functions, abstract(params), plans, on_mesh, sizes)
        self.params = self._read_params = self._cache = self._seen = None
        if there:
            self._place(params)
        self._scheduler = Scheduler(rows=rows, length=length, shapes=sizes.shapes, shards=shards)
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._arrived: collections.deque[list[Continuation]] = collections.deque()
        self._cancelled: set[int] = set()
        self._kept: list[Event] = []
        """Events of other requests that came while `generate` ran."""
        self._marked: dict[int, int] = {}
        """Row -> order of the sequence whose prompt's tokens are noted for it."""
        self._counts: collections.Counter[str] = collections.Counter()

    # What any thread may call.

    def submit(self, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a prompt; return the number of the request.

        Raises:
            ValueError: an empty prompt, tokens that the model does not have, or more than fit into a row.
        """
        params = SamplingParams() if params is None else params
        tokens = self._checked(prompt, params)
        with self._lock:
            request = next(self._ids)
            self._arrived.append(
                [Continuation(request, sample, tokens, params.max_tokens, params) for sample in range(params.n)]
            )
        return request

    def cancel(self, request: int) -> None:
        """Give a request up: its rows are free from the next step on. One that has ended is left as it is."""
        with self._lock:
            self._cancelled.add(request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and nothing to tell."""
        with self._lock:
            return not self._arrived and not self._kept and self._scheduler.idle

    def stats(self) -> EngineStats:
        """Counts so far."""
        with self._lock:
            arrived = sum(len(group) for group in self._arrived)
        counts, s, programs = self._counts, self._scheduler, self.programs
        return EngineStats(
            waiting=arrived + len(s.waiting),
            running=len(s.running),
            rows=len(s.rows),
            prompt_tokens=counts["prompt_tokens"],
            shared_tokens=s.shared_tokens,
            shared_prompts=s.shared_prompts,
            generated_tokens=counts["generated_tokens"],
            finished=counts["stop"] + counts["length"],
            cancelled=counts["cancelled"],
            failed=counts["error"],
            reads=counts["reads"],
            decodes=counts["decodes"],
            decode_steps=counts["decode_steps"],
            copies=counts["copies"],
            compilations=len(programs.compilations),
            compile_seconds=sum(c.seconds for c in programs.compilations),
            programs=len(programs.names),
            cache_bytes=programs.cache_bytes,
            params_bytes=programs.params_bytes,
        )

    # What one thread calls.

    def set_params(self, params: Any) -> None:
        """Take other parameters of the same shapes, as a trainer's after a step; what the cache holds is forgotten.

        Raises:
            ValueError: requests are running, or the parameters have other shapes.
        """
        if not self.idle:
            raise ValueError("parameters are exchanged while requests run; wait until engine.idle, or cancel them")
        params = self._laid_out(params)
        if (given := _forms(params)) != (wanted := _forms(self.programs.abstract_params)):
            raise ValueError(f"the parameters have other shapes than those of this engine: {given} against {wanted}")
        self._place(params)
        for row in self._scheduler.rows:
            row.held = []

    def release(self) -> None:
        """Give up the parameters and the cache, until `set_params`; what is compiled stays.

        Raises:
            ValueError: requests are running.
        """
        if not self.idle:
            raise ValueError("parameters are given up while requests run; wait until engine.idle, or cancel them")
        self.params = self._read_params = self._cache = self._seen = None

    def _laid_out(self, params: Any) -> Any:
        """Parameters in the model's dtype, and as the programs take them apart."""
        params = cast_floats(params, self.model.dtype)
        return params if self._apart is None else self._apart(params)

    def _place(self, params: Any) -> None:
        programs = self.programs
        self.params = jax.device_put(params, programs.param_shardings)
        self._read_params = (
            jax.device_put(params, programs.read_param_shardings) if programs.params_twice else self.params
        )
        if self._cache is None:
            self._cache, self._seen = programs.new_cache()

    def warm_up(self, progress: Callable[[str], None] | None = logger.info) -> list[Compilation]:
        """Compile every program that the engine can need; return those that were not compiled before.

        Args:
            progress: told of each program what it is and how long it took.
        """
        return self.programs.compile_all(progress)

    def step(self) -> list[Event]:
        """Do what is next: admit, read a piece of prompts, decode some tokens; return what came of it.

        Raises:
            ValueError: there are no parameters.
        """
        if self.params is None:
            raise ValueError("this Engine has no parameters; give it some with set_params")
        events, self._kept = self._kept, []
        events += self._take_in()
        for copy in self._scheduler.admit():
            self._copy(copy)
        for row in self._scheduler.running:
            self._mark(row)
        work, rows = self._scheduler.chunk(), self._scheduler.decoding()
        read = self._read(work) if work is not None else None
        steps = self._steps_of(rows, reading=work is not None)
        decoded = self._decode(rows, steps) if rows else None
        if work is not None and read is not None:
            self._scheduler.read(work)
            read = jax.device_get(read)
            for shard, parts in enumerate(work.parts):
                for i, part in enumerate(parts):
                    if part.final:
                        events.append(self._wrote(part.row, read, shard * work.shape.rows + i))
        if decoded is not None:
            decoded = jax.device_get(decoded)
            events += [self._wrote(row.index, decoded, row.index) for row in rows]
            self._counts["decode_steps"] += int((decoded.tokens >= 0).any(1).sum())
        return events

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Run until the prompts are done; return the continuations of each, n of them, in order.

        Args:
            prompts: token sequences.
            params: for all of them, or one each.

        Raises:
            ValueError: as `submit`, before anything is run.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} parameters; one for all, or one each")
        for prompt, one in zip(prompts, each, strict=True):
            self._checked(prompt, one)
        requests = {self.submit(prompt, one): i for i, (prompt, one) in enumerate(zip(prompts, each, strict=True))}
        got: list[list[list[Event]]] = [[[] for _ in range(one.n)] for one in each]
        left = sum(one.n for one in each)
        others: list[Event] = []
        while left:
            for event in self.step():
                if event.request not in requests:
                    others.append(event)
                    continue
                got[requests[event.request]][event.sample].append(event)
                left -= event.finish is not None
        self._kept += others
        return [[_joined(events) for events in samples] for samples in got]

    # Parts of a step.

    def _checked(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        tokens = tuple(int(t) for t in prompt)
        if not tokens:
            raise ValueError("the prompt is empty: there is nothing to continue")
        for what, values in (
            ("the prompt", tokens),
            ("stop", itertools.chain(*params.stop)),
            ("eos", params.eos or ()),
        ):
            for t in values:
                if not 0 <= t < self._vocab:
                    raise ValueError(f"{what} has token {t}; the model has tokens 0 to {self._vocab - 1}")
        if len(tokens) + params.max_tokens > self.length:
            room = self.length - len(tokens)
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_tokens={params.max_tokens} are "
                f"{len(tokens) + params.max_tokens}, more than the engine's length={self.length}; nearest: "
                + (f"max_tokens={room}" if room > 0 else f"a prompt of {self.length - 1} tokens")
            )
        return tokens

    def _take_in(self) -> list[Event]:
        """What was submitted and cancelled since the last step."""
        with self._lock:
            arrived, self._arrived = self._arrived, collections.deque()
            cancelled, self._cancelled = self._cancelled, set()
        for sequence in itertools.chain(*arrived):
            self._scheduler.add(sequence)
        dropped = [sequence for request in sorted(cancelled) for sequence in self._scheduler.cancel(request)]
        self._counts["cancelled"] += len(dropped)
        return [Event(s.request, s.sample, (), None, "cancelled") for s in dropped]

    def _copy(self, copy: Copy) -> None:
        source, target = (self._local({self._scheduler.shard(row): [row]}, 1) for row in (copy.source, copy.target))
        self._cache = self.programs.copy(self._cache, source, target, copy.tokens)
        self._counts["copies"] += 1

    def _mark(self, row: Row) -> None:
        """Note the prompt's tokens of a new sequence that repeats itself less."""
        s = row.sequence
        if s is None or self._marked.get(row.index) == s.order:
            return
        self._marked[row.index] = s.order
        self._counts["prompt_tokens"] += len(s.prompt)
        if s.params.repetition_penalty != 1.0:
            seen_V = np.zeros(self._vocab, bool)
            seen_V[list(s.prompt)] = True
            self._seen = self.programs.mark(self._seen, row.index, seen_V)

    def _read(self, work: Work) -> Any:
        per, L = work.shape.rows, work.shape.tokens
        total = per * len(work.parts)
        rows, start, last = (np.zeros(total, np.int32) for _ in range(3))
        tokens, final = np.zeros((total, L), np.int32), np.zeros(total, bool)
        rows[:], start[:] = len(self._scheduler.rows), self.length
        asked: list[Any] = [None] * total
        for shard, parts in enumerate(work.parts):
            for i, part in enumerate(parts, shard * per):
                rows[i], start[i], last[i], final[i] = part.row, part.start, len(part.tokens) - 1, part.final
                tokens[i, : len(part.tokens)] = part.tokens
                asked[i] = self._asked(self._scheduler.rows[part.row])
        local = self._local({shard: [part.row for part in parts] for shard, parts in enumerate(work.parts)}, per)
        reach = max(part.start + L for parts in work.parts for part in parts)
        what = Reading(local, rows, tokens, start, last, final)
        self._cache, self._seen, result = self.programs.read(
            self._read_params, self._cache, self._seen, work.shape, what, settings_of(asked), reach
        )
        self._counts["reads"] += 1
        return result

    def _steps_of(self, rows: list[Row], *, reading: bool) -> int:
        if reading:
            return 1
        left = max((s.max_tokens - len(s.written) for row in rows if (s := row.sequence) is not None), default=1)
        return min(self._steps, left)

    def _decode(self, rows: list[Row], steps: int) -> Any:
        B = len(self._scheduler.rows)
        token, position, alive = np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros(B, bool)
        tail = np.full((B, STOP_TOKENS), -1, np.int32)
        asked: list[Any] = [None] * B
        for row in rows:
            i, s = row.index, row.sequence
            if s is None:
                continue
            token[i], position[i], alive[i] = (s.written or s.prompt)[-1], len(row.held), True
            if s.written:
                newest = s.written[-STOP_TOKENS:]
                tail[i, -len(newest) :] = newest
            asked[i] = self._asked(row)
        reach = min(int(position.max()) + steps, self.length)
        standing = Decoding(token, position, alive, tail)
        self._cache, self._seen, result = self.programs.decode(
            self.params, self._cache, self._seen, standing, settings_of(asked), steps, reach
        )
        self._counts["decodes"] += 1
        return result

    def _asked(self, row: Row) -> Any:
        s = row.sequence
        if s is None:
            return None
        ends = self.eos if s.params.eos is None else s.params.eos
        return s.params, s.sample, len(s.prompt) + s.max_tokens - 1, ends

    def _wrote(self, row: int, result: Any, column: int) -> Event:
        """Take what a program wrote for a row."""
        finish = FINISHES[int(result.code[column])]
        kept = result.tokens[:, column] >= 0
        tokens = tuple(result.tokens[kept, column].tolist())
        s = self._scheduler.wrote(row, tokens, finish)
        logprobs = tuple(result.logprobs[kept, column].tolist()) if s.params.logprobs else None
        self._counts["generated_tokens"] += len(tokens)
        self._counts[finish or "going"] += 1
        error = ""
        if finish == "error":
            error = f"the logits after {len(s.prompt) + len(s.written)} tokens are not finite numbers"
            shard = self._scheduler.shard(row)
            self._cache = self.programs.clear(self._cache, self._local({shard: [row]}, 1))
        return Event(s.request, s.sample, tokens, logprobs, finish, error)

    def _local(self, rows: dict[int, list[int]], per: int) -> np.ndarray:
        """Numbers of rows within their shards, (shards, per); where there is none, a number that is none."""
        count = len(self._scheduler.rows) // self._scheduler.shards
        local = np.full((self._scheduler.shards, per), count, np.int32)
        for shard, numbers in rows.items():
            local[shard, : len(numbers)] = [row - shard * count for row in numbers]
        return local


def _forms(params: Any) -> list[Any]:
    return [(path_str(path), x.shape, str(x.dtype)) for path, x in jax.tree_util.tree_leaves_with_path(params)]


def _joined(events: list[Event]) -> Completion:
    tokens = tuple(itertools.chain(*(event.tokens for event in events)))
    last = events[-1]
    logprobs = None
    if any(event.logprobs is not None for event in events):
        logprobs = tuple(itertools.chain(*(event.logprobs or () for event in events)))
    return Completion(tokens, logprobs, last.finish or "error", last.error)
