"""Batches of prompts in, continuations out, in order: what `Predictor.generate` does.

    completions = continue_prompts(engines, model, params, prompts, sampling, where={}, rows=16, length=None, eos=())

Decoders are run by an `Engine`. Encoder-decoders write greedily, sources padded to a power of two and all of a batch at
a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pipelines.generation import SamplingParams
from pipelines.problem import cast_floats
from redco_like.engine import Completion, Engine
from redco_like.engine_layout import SMALLEST

if TYPE_CHECKING:
    from redco_like.models.model import Model


def continue_prompts(
    engines: dict[Any, Any],
    model: Model,
    params: Any,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    *,
    where: Mapping[str, Any],
    rows: int,
    length: int | None,
    eos: tuple[int, ...],
) -> list[list[Completion]]:
    """Continue prompts; programs are kept in `engines`, which starts empty.

    Args:
        where: `deployer`, `plan` and `mesh` of an engine.

    Raises:
        ValueError: as `Engine.submit`; an encoder-decoder and anything but greedy.
    """
    each = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} examples and {len(each)} sampling parameters; one for all, or one each")
    if not prompts:
        return []
    if model.config.kind == "encoder-decoder":
        return _translate(engines, model, params, prompts, each, rows=rows, eos=eos)
    needed = max(len(prompt) + p.max_tokens for prompt, p in zip(prompts, each, strict=True))
    if length is None:
        length = _rounded(needed, model.config.max_length if model.config.position == "learned" else None)
    key = id(model), rows, length, eos
    if key not in engines:
        engines[key] = params, model, Engine(model, params, rows=rows, length=length, eos=eos, **where)
    known, _, engine = engines[key]
    if any(a is not b for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(params), strict=True)):
        engine.set_params(params)
        engines[key] = params, model, engine
    return engine.generate(prompts, each)


def _translate(
    programs: dict[Any, Any],
    model: Model,
    params: Any,
    sources: Sequence[tuple[int, ...]],
    each: Sequence[SamplingParams],
    *,
    rows: int,
    eos: tuple[int, ...],
) -> list[list[Completion]]:
    from redco_like.models.greedy import greedy

    for p in each:
        if p.temperature or p.repetition_penalty != 1.0 or p.n > 1 or p.stop or p.logprobs:
            raise ValueError(
                f"{model.config.family} is an encoder-decoder, which is continued greedily; {p} asks for more"
            )
        if len(ends := eos if p.eos is None else p.eos) > 1:
            raise ValueError(f"an encoder-decoder has one end token, not {ends}")
    params = cast_floats(params, model.dtype)
    done: list[list[Completion]] = []
    for start in range(0, len(sources), rows):
        batch, asked = sources[start : start + rows], each[start : start + rows]
        width = _rounded(max(map(len, batch)), None)
        tokens, keep = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for i, source in enumerate(batch):
            tokens[i, : len(source)], keep[i, : len(source)] = source, True
        keep[len(batch) :, 0] = True
        most, ends = max(p.max_tokens for p in asked), {(eos if p.eos is None else p.eos)[:1] for p in asked}
        if len(ends) > 1:
            raise ValueError(f"the examples of a batch end with different tokens: {sorted(ends)}")
        end = next(iter(ends))
        key = "greedy", id(model), most, end
        if key not in programs:
            run = jax.jit(
                lambda params, tokens, keep, most=most, end=end: greedy(
                    model, params, tokens, keep, max_tokens=most, eos=end[0] if end else None
                )
            )
            programs[key] = model, run
        written = np.asarray(programs[key][1](params, jnp.asarray(tokens), jnp.asarray(keep)))
        for row, p in zip(written[: len(batch)], asked, strict=True):
            got = tuple(row[row >= 0][: p.max_tokens].tolist())
            done.append([Completion(got, None, "stop" if got and got[-1:] == end else "length")])
    return done


def _rounded(needed: int, most: int | None) -> int:
    """The power of two that is enough, of at least the smallest class, and at most `most` if that is enough."""
    size = 2 * SMALLEST
    while size < needed:
        size *= 2
    return size if most is None or needed > most else min(size, most)
