"""The compiled programs that generation runs, laid out by plans: a piece of prompts, some steps of decoding, a copy.

    programs = GenerationPrograms(functions, abstract_params, plans=Plans(prefill, decode), mesh=mesh, sizes=sizes)
    cache, seen = programs.new_cache()
    cache, seen, result = programs.decode(params, cache, seen, rows, settings, steps=8)

How many there are is known beforehand: one per class of length (how much of the cache attention reads) and shape.
The cache and `seen` (tokens that a row has had, for the repetition penalty) are donated: they are written in place.

Shape letters: B rows, L tokens read, R = S * P rows read (S shards, P of each), K steps, V vocabulary; S also tokens
of a tail.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.cached import ARGUMENTS
from pipelines.generation.rows import CacheRows, cache_dims
from pipelines.generation.sampling import STOP_TOKENS, RowSettings, ended, sample, settings_of
from pipelines.generation.scheduler import Shape
from pipelines.kernels import kernels_for
from pipelines.problem import check_rows, layout_of, local_bytes
from search import Plan
from search.compiler_options import options_on
from sharding_rules import BATCH_AXES, Layout, PlanError, TracedFunction, trace

GOING, STOP, LENGTH, ERROR = range(4)
"""How a row stands after a program."""


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A model as generation needs it.

    Attributes:
        init_cache: (rows, length) -> cache, a tree of arrays with one dimension of rows and one of positions each.
        read: (params, tokens_BL, cache, position_B, last_B or None, reach) -> (logits_B1V, added): reads L tokens of
            each row from `position_B` on, attending to what the first `reach` positions of the cache hold before
            that, and returns what the cache gets for them, like the cache itself with L positions.
        vocab: number of tokens.
    """

    init_cache: Callable[[int, int], Any]
    read: Callable[..., tuple[Any, Any]]
    vocab: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for.

    Attributes:
        rows, length: of the cache.
        reaches: classes of length for decoding, ascending; the last is `length`.
        read_reaches: the same for reading prompts.
        shapes: pieces that are read.
        steps: decoding steps per dispatch, at most.
    """

    rows: int
    length: int
    reaches: tuple[int, ...]
    read_reaches: tuple[int, ...]
    shapes: tuple[Shape, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class Plans:
    """How prompts are read and how tokens are decoded: on the same mesh, each in its own way."""

    prefill: Plan
    decode: Plan


class Decoding(NamedTuple):
    """Where the rows stand: the token that is read next, its position, which rows run, and their last tokens."""

    token_B: Any
    position_B: Any
    alive_B: Any
    tail_BS: Any


class Reading(NamedTuple):
    """What is read: rows by number within their shard and in all (the number of rows for none), tokens, positions."""

    local_SP: Any
    row_R: Any
    tokens_RL: Any
    start_R: Any
    last_R: Any
    final_R: Any


class Result(NamedTuple):
    """Tokens (K, B), -1 where a row had ended, their log-probabilities, and how each row stands."""

    tokens: Any
    logprobs: Any
    code: Any


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One compiled program, and the seconds that it took to trace and to compile."""

    name: str
    seconds: float


def decode_problem(model: CachedModel, abstract_params: Any, rows: int, length: int, reach: int) -> TracedFunction:
    """One step of decoding, traced, with arguments params, batch and state (the cache)."""
    batch = {"tokens": jax.ShapeDtypeStruct((rows, 1), jnp.int32), "position": jax.ShapeDtypeStruct((rows,), jnp.int32)}

    def step(params: Any, batch: Any, state: Any) -> Any:
        return model.read(params, batch["tokens"], state, batch["position"], None, reach)

    return trace(step, abstract_params, batch, _abstract_cache(model, rows, length), names=ARGUMENTS)


def read_problem(model: CachedModel, abstract_params: Any, rows: int, tokens: int, reach: int) -> TracedFunction:
    """One piece of prompts, traced, with arguments params, batch and state (the rows' first `reach` positions)."""
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = {"tokens": ints((rows, tokens)), "position": ints((rows,)), "last": ints((rows,))}

    def step(params: Any, batch: Any, state: Any) -> Any:
        return model.read(params, batch["tokens"], state, batch["position"], batch["last"], reach)

    return trace(step, abstract_params, batch, _abstract_cache(model, rows, reach), names=ARGUMENTS)


def _abstract_cache(model: CachedModel, rows: int, length: int) -> Any:
    return jax.eval_shape(lambda: model.init_cache(rows, length))


class GenerationPrograms:
    """Compiles what generation runs, each program when it is first used or by `compile_all`.

    Args:
        model: the functions.
        abstract_params: shapes of the parameters.
        plans: how prompts are read, and how tokens are decoded.
        mesh: devices laid out as both plans say.
        sizes: what is compiled for.

    Attributes:
        param_shardings: of the parameters that `decode` takes; `read_param_shardings` of those of `read`.
        cache_shardings: of the cache.
        compilations: what was compiled so far.

    Raises:
        ValueError: rows that do not split over the devices, plans for other meshes.
        PlanError: the plans lay the cache out in different ways.
    """

    def __init__(self, model: CachedModel, abstract_params: Any, *, plans: Plans, mesh: Mesh, sizes: Sizes):
        if plans.prefill.mesh != plans.decode.mesh:
            raise ValueError(
                f"prompts are read on mesh {plans.prefill.mesh} and decoded on {plans.decode.mesh}; they share a "
                "cache, and so need the same mesh"
            )
        self.model, self.abstract_params, self.plans, self.mesh, self.sizes = model, abstract_params, plans, mesh, sizes
        self.shards = plans.decode.mesh.batch_shards
        check_rows(sizes.rows, microbatches=1, mesh=plans.decode.mesh, what="cache")
        self.compilations: list[Compilation] = []
        self._executables: dict[str, Any] = {}
        decoding = self._decode_layout(sizes.length)
        reading = self._read_layout(sizes.shapes[0], sizes.length)
        self.param_shardings, self.cache_shardings = (self._placed(decoding.specs(x)) for x in ("params", "state"))
        self.read_param_shardings, view = (self._placed(reading.specs(x)) for x in ("params", "state"))
        self._rows = CacheRows(cache_dims(model.init_cache), decoding.specs("state"), mesh)
        self._replicated = NamedSharding(mesh, P())
        if jax.tree.leaves(view) != jax.tree.leaves(self.cache_shardings):
            specs = [jax.tree.leaves(tree)[0].spec for tree in (view, self.cache_shardings)]
            raise PlanError(
                f"the plans lay the cache out differently, {plans.prefill.preset} as {specs[0]} and "
                f"{plans.decode.preset} as {specs[1]}; give one plan for both"
            )

    @property
    def params_twice(self) -> bool:
        """Whether the two plans want the parameters in different places, so that they are there twice."""
        return jax.tree.leaves(self.param_shardings) != jax.tree.leaves(self.read_param_shardings)

    @property
    def abstract_cache(self) -> Any:
        """The cache as shapes with shardings."""
        shapes = _abstract_cache(self.model, self.sizes.rows, self.sizes.length)
        return _with(shapes, self.cache_shardings)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on one device."""
        return local_bytes(self.abstract_cache)

    @property
    def params_bytes(self) -> int:
        """Bytes of the parameters on one device."""
        once = local_bytes(_with(self.abstract_params, self.param_shardings))
        return once + (local_bytes(_with(self.abstract_params, self.read_param_shardings)) if self.params_twice else 0)

    def new_cache(self) -> tuple[Any, Any]:
        """An empty cache, and no token seen in any row."""
        return self._empty(), jax.device_put(np.zeros((self.sizes.rows, self.model.vocab), bool), self._replicated)

    @functools.cached_property
    def _empty(self) -> Callable[[], Any]:
        rows, length = self.sizes.rows, self.sizes.length
        return jax.jit(lambda: self.model.init_cache(rows, length), out_shardings=self.cache_shardings)

    # What is run.

    def decode(
        self, params: Any, cache: Any, seen: Any, rows: Decoding, settings: RowSettings, steps: int, reach: int
    ) -> tuple[Any, Any, Result]:
        """Run up to `steps` steps; a row that has ended does nothing more, and when all have, nobody does."""
        run = self._executable(self._decode_name(_class(self.sizes.reaches, reach)))
        return run(params, cache, seen, rows, settings, np.int32(steps))

    def read(
        self, params: Any, cache: Any, seen: Any, shape: Shape, what: Reading, settings: RowSettings, reach: int
    ) -> tuple[Any, Any, Result]:
        """Read a piece of prompts; a row whose prompt is complete gets its first token, as tokens (1, R)."""
        run = self._executable(self._read_name(shape, _class(self.sizes.read_reaches, reach)))
        return run(params, cache, seen, what, settings)

    def copy(self, cache: Any, source_S1: Any, target_S1: Any, tokens: int) -> Any:
        """Copy the first positions of a row of each shard to another row of it."""
        run = self._executable(f"copy of {_class(self.sizes.read_reaches, tokens)} positions")
        return run(cache, source_S1, target_S1)

    def clear(self, cache: Any, row_S1: Any) -> Any:
        """Zero a row of each shard."""
        return self._executable("clearing a row")(cache, row_S1)

    def mark(self, seen: Any, row: int, tokens: Any) -> Any:
        """Note which tokens (V,) a row has had."""
        return self._executable("noting a prompt's tokens")(seen, np.int32(row), tokens)

    def compile_all(self, progress: Callable[[str], None] | None = None) -> list[Compilation]:
        """Compile everything that can be needed; returns what was not compiled before."""
        before = len(self.compilations)
        names = self.names
        for i, name in enumerate(names, 1):
            known = len(self.compilations)
            self._executable(name)
            if progress is not None and len(self.compilations) > known:
                progress(f"{i} of {len(names)}: {name}, {self.compilations[-1].seconds:.1f} s")
        return self.compilations[before:]

    @property
    def names(self) -> list[str]:
        """Names of all programs."""
        s = self.sizes
        return [
            *(self._decode_name(reach) for reach in s.reaches),
            *(self._read_name(shape, reach) for shape in s.shapes for reach in s.read_reaches if reach >= shape.tokens),
            *(f"copy of {reach} positions" for reach in s.read_reaches),
            "clearing a row",
            "noting a prompt's tokens",
        ]

    # How it is made.

    def _decode_name(self, reach: int) -> str:
        return f"up to {self.sizes.steps} steps of {self.sizes.rows} rows within {reach} positions"

    def _read_name(self, shape: Shape, reach: int) -> str:
        return f"reading {self.shards * shape.rows} x {shape.tokens} tokens within {reach} positions"

    def _executable(self, name: str) -> Any:
        if name not in self._executables:
            began = time.perf_counter()
            self._executables[name] = self.lower(name).compile(
                compiler_options=options_on(
                    self.plans.prefill if name.startswith("reading") else self.plans.decode,
                    self.mesh.devices.flat[0].platform,
                )
            )
            self.compilations.append(Compilation(name, time.perf_counter() - began))
        return self._executables[name]

    def lower(self, name: str) -> jax.stages.Lowered:
        """A program of `names` as the compiler takes it."""
        s = self.sizes
        for reach in s.reaches:
            if name == self._decode_name(reach):
                return self._lower_decode(reach)
        for reach in s.read_reaches:
            if name == f"copy of {reach} positions":
                return self._lower_copy(reach)
            for shape in s.shapes:
                if name == self._read_name(shape, reach):
                    return self._lower_read(shape, reach)
        local = jax.ShapeDtypeStruct((self.shards, 1), jnp.int32)
        if name == "clearing a row":
            return self._lower(self._rows.clear, (self.abstract_cache, local), (0,))
        if name == "noting a prompt's tokens":
            row, tokens = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((self.model.vocab,), jnp.bool_)
            return self._lower(
                lambda seen, row, tokens: seen.at[row].set(tokens), (self._abstract_seen, row, tokens), (0,)
            )
        raise ValueError(f"there is no program {name!r}; there are {', '.join(self.names)}")

    def _lower_decode(self, reach: int) -> jax.stages.Lowered:
        B, K = self.sizes.rows, self.sizes.steps
        layout = self._decode_layout(reach)
        step = layout.pin(self.mesh, kernels=kernels_for(self.plans.decode.attention, self.mesh))

        def decode(params: Any, cache: Any, seen: Any, rows: Decoding, settings: RowSettings, steps: Any) -> Any:
            def going(carry: Any) -> Any:
                return (carry[0] < steps) & jnp.any(carry[3].alive_B)

            def body(carry: Any) -> Any:
                i, cache, seen, rows, result = carry
                position_B = jnp.where(rows.alive_B, rows.position_B, self.sizes.length)
                logits, added = step(params, {"tokens": rows.token_B[:, None], "position": position_B}, cache)
                at_B = rows.position_B + 1
                token_B, logprob_B, finite_B = sample(self._by_rows(logits[:, 0]), seen, at_B, settings)
                # A token is never below 0. Only what is written after all has been read needs no copy to read from.
                start_B = position_B + (token_B < 0)
                cache = self._rows.append(cache, added, own_SP, start_B.reshape(own_SP.shape))
                tail_BS = jnp.concatenate([rows.tail_BS[:, 1:], token_B[:, None]], axis=1)
                code_B = jnp.where(rows.alive_B, _code(finite_B, tail_BS, at_B, settings), result.code)
                wrote_B = rows.alive_B & finite_B
                seen = seen.at[jnp.arange(B), jnp.where(wrote_B, token_B, self.model.vocab)].set(True, mode="drop")
                result = Result(
                    result.tokens.at[i].set(jnp.where(wrote_B, token_B, -1)),
                    result.logprobs.at[i].set(jnp.where(wrote_B, logprob_B, 0.0)),
                    code_B,
                )
                rows = Decoding(token_B, at_B, rows.alive_B & (code_B == GOING), tail_BS)
                return i + 1, cache, seen, rows, result

            own_SP = jnp.tile(jnp.arange(B // self.shards, dtype=jnp.int32)[None], (self.shards, 1))
            empty = Result(jnp.full((K, B), -1, jnp.int32), jnp.zeros((K, B), jnp.float32), jnp.zeros(B, jnp.int32))
            _, cache, seen, _, result = jax.lax.while_loop(going, body, (jnp.int32(0), cache, seen, rows, empty))
            return cache, seen, result

        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        alive = jax.ShapeDtypeStruct((B,), jnp.bool_)
        rows = Decoding(ints((B,)), ints((B,)), alive, ints((B, STOP_TOKENS)))
        params = _with(self.abstract_params, self.param_shardings)
        arguments = (params, self.abstract_cache, self._abstract_seen, rows, _abstract_settings(B), ints(()))
        return self._lower(decode, arguments, (1, 2))

    def _lower_read(self, shape: Shape, reach: int) -> jax.stages.Lowered:
        S, R, L = self.shards, self.shards * shape.rows, shape.tokens
        layout = self._read_layout(shape, reach)
        step = layout.pin(self.mesh, kernels=kernels_for(self.plans.prefill.attention, self.mesh))

        def read(params: Any, cache: Any, seen: Any, what: Reading, settings: RowSettings) -> Any:
            batch = {"tokens": what.tokens_RL, "position": what.start_R, "last": what.last_R}
            logits, added = step(params, batch, self._rows.take(cache, what.local_SP, reach))
            cache = self._rows.append(cache, added, what.local_SP, what.start_R.reshape(what.local_SP.shape))
            at_R = what.start_R + what.last_R + 1
            seen_RV = seen[jnp.minimum(what.row_R, self.sizes.rows - 1)]
            token_R, logprob_R, finite_R = sample(self._by_rows(logits[:, 0]), seen_RV, at_R, settings)
            tail_RS = jnp.concatenate([jnp.full((R, STOP_TOKENS - 1), -1, jnp.int32), token_R[:, None]], axis=1)
            code_R = _code(finite_R, tail_RS, at_R, settings)
            wrote_R = what.final_R & finite_R
            seen = seen.at[what.row_R, jnp.where(wrote_R, token_R, self.model.vocab)].set(True, mode="drop")
            token_R = jnp.where(wrote_R, token_R, -1)
            return cache, seen, Result(token_R[None], logprob_R[None], jnp.where(what.final_R, code_R, GOING))

        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        final = jax.ShapeDtypeStruct((R,), jnp.bool_)
        what = Reading(ints((S, shape.rows)), ints((R,)), ints((R, L)), ints((R,)), ints((R,)), final)
        params = _with(self.abstract_params, self.read_param_shardings)
        return self._lower(
            read, (params, self.abstract_cache, self._abstract_seen, what, _abstract_settings(R)), (1, 2)
        )

    def _lower_copy(self, reach: int) -> jax.stages.Lowered:
        def copy(cache: Any, source_S1: Any, target_S1: Any) -> Any:
            return self._rows.copy(cache, source_S1, target_S1, reach)

        local = jax.ShapeDtypeStruct((self.shards, 1), jnp.int32)
        return self._lower(copy, (self.abstract_cache, local, local), (0,))

    def _lower(self, function: Any, arguments: tuple[Any, ...], donated: tuple[int, ...]) -> jax.stages.Lowered:
        """Arguments without a sharding are whole on every device, and so are results that are not donated arguments."""
        arguments = jax.tree.map(lambda x: x if x.sharding is not None else _on(x, self._replicated), arguments)
        out = jax.eval_shape(function, *arguments)
        kept = [jax.tree.map(lambda x: x.sharding, arguments[i]) for i in donated]
        if len(kept) == 1:
            shardings: Any = kept[0]
        else:
            shardings = (*kept, jax.tree.map(lambda _: self._replicated, out[len(kept)]))

        def step(*arguments: Any) -> Any:  # the name that `search.compiler` reads
            return function(*arguments)

        return jax.jit(step, donate_argnums=donated, out_shardings=shardings).lower(*arguments)

    @property
    def _abstract_seen(self) -> Any:
        return jax.ShapeDtypeStruct((self.sizes.rows, self.model.vocab), jnp.bool_)

    def _by_rows(self, logits_BV: jax.Array) -> jax.Array:
        """Each device has all logits of its rows."""
        return jax.lax.with_sharding_constraint(logits_BV, NamedSharding(self.mesh, P(BATCH_AXES, None)))

    def _decode_layout(self, reach: int) -> Layout:
        rows, length = self.sizes.rows, self.sizes.length
        return layout_of(decode_problem(self.model, self.abstract_params, rows, length, reach), self.plans.decode)

    def _read_layout(self, shape: Shape, reach: int) -> Layout:
        rows = self.shards * shape.rows
        return layout_of(read_problem(self.model, self.abstract_params, rows, shape.tokens, reach), self.plans.prefill)

    def _placed(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def _code(finite_B: Any, tail_BS: Any, at_B: Any, settings: RowSettings) -> Any:
    """How rows stand that have just got the token at the end of their tails, at a position."""
    code_B = jnp.where(at_B >= settings.last_B, LENGTH, GOING)
    code_B = jnp.where(ended(tail_BS, settings), STOP, code_B)
    return jnp.where(finite_B, code_B, ERROR)


def _class(classes: tuple[int, ...], wanted: int) -> int:
    """The smallest class that is large enough."""
    return next(c for c in classes if c >= wanted)


def _abstract_settings(rows: int) -> RowSettings:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), settings_of([None] * rows))


def _on(x: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _with(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(_on, shapes, shardings)
