"""The next token of each row: what a request asks for, as arrays, so that one compiled program serves every mix.

    tokens_B, logprobs_B, finite_B = sample(logits_BV, seen_BV, position_B, settings)

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. All three cuts are a least
probability, found by bisection over floating-point numbers, so that nothing is sorted: tokens that are exactly as
likely as the last one kept are kept too. A sampled token depends on the row's logits, its seed and its position alone.

Shape letters: B rows, V vocabulary, Q stop sequences, S tokens of a stop sequence, E end tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STOPS, STOP_TOKENS, ENDS = 8, 16, 8
"""How many stop sequences a request may have, how long each may be, and how many end tokens: sizes of arrays."""
BLOCK = 256
"""Tokens whose probabilities are summed up at once where one is drawn."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request is continued.

    Attributes:
        max_tokens: how many tokens at most.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn from; 0 for all.
        top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2019, arXiv 1904.09751).
        min_p: only tokens at least this times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
        repetition_penalty: logits of tokens that the prompt or the continuation has are divided by it where they are
            positive, else multiplied (Keskar et al. 2019, arXiv 1909.05858).
        stop: token sequences after which the continuation ends; they are part of it.
        eos: tokens after which it ends; None for those of the engine.
        seed: of the draws; the same seed draws the same tokens, whatever else runs.
        logprobs: whether log-probabilities of the tokens (of the model's own logits) are wanted.
        n: continuations of the prompt, each with draws of its own.

    Raises:
        ValueError: a number out of its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[tuple[int, ...], ...] = ()
    eos: tuple[int, ...] | None = None
    seed: int = 0
    logprobs: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        def check(name: str, good: bool, what: str) -> None:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}; it must be {what}")

        def whole(x: Any, low: int, high: int) -> bool:
            return isinstance(x, int | np.integer) and not isinstance(x, bool) and low <= int(x) <= high

        def number(x: Any) -> bool:
            return isinstance(x, int | float | np.number) and math.isfinite(x)

        check("max_tokens", whole(self.max_tokens, 1, 2**31 - 1), "a whole number of at least 1")
        check("n", whole(self.n, 1, 2**16), "a whole number of at least 1")
        check("top_k", whole(self.top_k, 0, 2**31 - 1), "a whole number of at least 0 (0 for all tokens)")
        check("seed", whole(self.seed, 0, 2**32 - 1), "a whole number from 0 to 2**32 - 1")
        check("temperature", number(self.temperature) and self.temperature >= 0, "a number of at least 0 (0 is greedy)")
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1")
        check("repetition_penalty", number(self.repetition_penalty) and self.repetition_penalty > 0, "above 0")
        object.__setattr__(self, "stop", tuple(tuple(int(t) for t in sequence) for sequence in self.stop))
        check("stop", len(self.stop) <= STOPS, f"at most {STOPS} token sequences")
        check(
            "stop",
            all(1 <= len(sequence) <= STOP_TOKENS for sequence in self.stop),
            f"token sequences of 1 to {STOP_TOKENS} tokens",
        )
        if self.eos is not None:
            object.__setattr__(self, "eos", tuple(int(t) for t in self.eos))
            check("eos", len(self.eos) <= ENDS, f"at most {ENDS} tokens")


class RowSettings(NamedTuple):
    """What the requests in the rows of a batch ask for. Made by `settings_of`.

    Attributes:
        last_B: position of the last token that each may have.
        sample_B: which of a request's continuations a row is.
        stops_BQS: stop sequences, their ends at the end, -1 before; ends_BE: tokens that end, -1 for none.
        logprobs_B: whether log-probabilities are wanted.
    """

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    penalty_B: Any
    seed_B: Any
    sample_B: Any
    last_B: Any
    stops_BQS: Any
    ends_BE: Any
    logprobs_B: Any


def settings_of(rows: list[tuple[SamplingParams, int, int, tuple[int, ...]] | None]) -> RowSettings:
    """Arrays of what each row asks for.

    Args:
        rows: of each row its parameters, the number of its sample, the position of the last token that it may have,
            and its end tokens; None for a row that is not used.
    """
    B = len(rows)
    made = RowSettings(
        np.zeros(B, np.float32),
        np.zeros(B, np.int32),
        np.ones(B, np.float32),
        np.zeros(B, np.float32),
        np.ones(B, np.float32),
        np.zeros(B, np.uint32),
        np.zeros(B, np.int32),
        np.zeros(B, np.int32),
        np.full((B, STOPS, STOP_TOKENS), -1, np.int32),
        np.full((B, ENDS), -1, np.int32),
        np.zeros(B, bool),
    )
    for i, row in enumerate(rows):
        if row is None:
            continue
        p, sample, last, ends = row
        values = p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.seed, sample, last
        for array, value in zip(made[:8], values, strict=True):
            array[i] = value
        for j, sequence in enumerate(p.stop):
            made.stops_BQS[i, j, STOP_TOKENS - len(sequence) :] = sequence
        made.ends_BE[i, : len(ends)] = ends
        made.logprobs_B[i] = p.logprobs
    return made


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array, position_B: jax.Array, settings: RowSettings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose a token for each row.

    Args:
        logits_BV: of the model.
        seen_BV: tokens that the row has already, for the repetition penalty.
        position_B: where the chosen tokens will stand.

    Returns:
        Tokens (B,), the logarithms of their probabilities under the model (B,), 0 where no row wants them, and whether
        the logits were numbers.
    """
    raw_BV = logits_BV.astype(jnp.float32)
    most_B = raw_BV.max(-1)
    s = settings
    penalised_BV = jax.lax.cond(
        jnp.any(s.penalty_B != 1.0), lambda: penalise(raw_BV, seen_BV, s.penalty_B), lambda: raw_BV
    )
    greedy_B = likeliest(penalised_BV)

    def drawn() -> jax.Array:
        weights_BV = kept_weights(penalised_BV, s.temperature_B, s.top_k_B, s.top_p_B, s.min_p_B)
        return jnp.where(s.temperature_B > 0, draw(weights_BV, uniforms(s.seed_B, s.sample_B, position_B)), greedy_B)

    tokens_B = jax.lax.cond(jnp.any(s.temperature_B > 0), drawn, lambda: greedy_B)

    def logprobs() -> jax.Array:
        chosen_B = jnp.take_along_axis(raw_BV, tokens_B[:, None], axis=-1)[:, 0]
        return chosen_B - most_B - jnp.log(jnp.exp(raw_BV - most_B[:, None]).sum(-1))

    logprobs_B = jax.lax.cond(jnp.any(s.logprobs_B), logprobs, lambda: jnp.zeros_like(most_B))
    return tokens_B, logprobs_B, jnp.isfinite(most_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest logits of each row, as `argmax`, which takes CPUs as long as a layer: in two passes."""
    V = logits_BV.shape[-1]
    place_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    found_BV = jnp.where(logits_BV == logits_BV.max(-1, keepdims=True), place_BV, V - 1)
    return found_BV.min(-1)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Make tokens that a row has already less likely."""
    factor_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV < 0, logits_BV * factor_B1, logits_BV / factor_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)


def kept_weights(
    logits_BV: jax.Array, temperature_B: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """Probabilities of the tokens that are drawn from, relative to the likeliest one; 0 for all others."""
    temperature_B1 = jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    scaled_BV = logits_BV / temperature_B1
    p_BV = jnp.exp(scaled_BV - scaled_BV.max(-1, keepdims=True))
    V = p_BV.shape[-1]

    def top_k(p_BV: jax.Array) -> jax.Array:
        k_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
        return cut(p_BV, lambda kept_BV: kept_BV.sum(-1, dtype=jnp.int32) >= k_B)

    def top_p(p_BV: jax.Array) -> jax.Array:
        wanted_B = top_p_B * p_BV.sum(-1)
        cut_BV = cut(p_BV, lambda kept_BV: jnp.where(kept_BV, p_BV, 0.0).sum(-1) >= wanted_B)
        return jnp.where(top_p_B[:, None] < 1.0, cut_BV, p_BV)

    p_BV = jax.lax.cond(jnp.any(top_k_B > 0), top_k, lambda p: p, p_BV)
    p_BV = jax.lax.cond(jnp.any(top_p_B < 1.0), top_p, lambda p: p, p_BV)
    return jnp.where(p_BV >= min_p_B[:, None], p_BV, 0.0)


def cut(p_BV: jax.Array, enough: Any) -> jax.Array:
    """Keep the largest numbers of each row, as few as are `enough`, and zero the rest.

    Non-negative floating-point numbers are ordered as their bits are, read as integers: 31 halvings find the largest
    threshold exactly.

    Args:
        enough: which numbers are kept (B, V) -> whether they suffice (B,); more always suffice if fewer do.
    """
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # keeping what is at least `low` is enough, what is at least `high` is not
        middle_B = low_B + (high_B - low_B) // 2
        good_B = enough(bits_BV >= middle_B[:, None])
        return jnp.where(good_B, middle_B, low_B), jnp.where(good_B, high_B, middle_B)

    rows = p_BV.shape[0]
    most = int(np.float32(np.inf).view(np.int32))
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, most, jnp.int32)))
    return jnp.where(bits_BV >= low_B[:, None], p_BV, 0.0)


def uniforms(seed_B: jax.Array, sample_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """A number in [0, 1) for each row, from its seed, the number of its sample and its position."""

    def one(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), position))

    return jax.vmap(one)(seed_B, sample_B, position_B)


def draw(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Draw a token with probability in proportion to its weight: the first whose running sum exceeds `uniform_B`."""
    B, V = weights_BV.shape
    blocks = -(-V // BLOCK)
    padded_BGW = jnp.pad(weights_BV, ((0, 0), (0, blocks * BLOCK - V))).reshape(B, blocks, BLOCK)
    sums_BG = jnp.cumsum(padded_BGW.sum(-1), axis=-1)
    target_B = uniform_B * sums_BG[:, -1]
    block_B = _first_above(sums_BG, target_B)
    before_B = jnp.where(block_B > 0, jnp.take_along_axis(sums_BG, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside_BW = jnp.take_along_axis(padded_BGW, block_B[:, None, None], axis=1)[:, 0]
    within_B = _first_above(jnp.cumsum(inside_BW, axis=-1), target_B - before_B)
    # Rounding may lead past the last token of the block that has a weight.
    last_B = BLOCK - 1 - jnp.argmax(inside_BW[:, ::-1] > 0, axis=-1).astype(jnp.int32)
    return block_B * BLOCK + jnp.minimum(within_B, last_B)


def _first_above(sums_BG: jax.Array, target_B: jax.Array) -> jax.Array:
    count_B = (sums_BG <= target_B[:, None]).sum(-1, dtype=jnp.int32)
    return jnp.minimum(count_B, sums_BG.shape[-1] - 1)


def ended(tail_BS: jax.Array, settings: RowSettings) -> jax.Array:
    """Whether the last tokens of a row (the newest last) are an end token or end with one of its stop sequences."""
    ends_B = (settings.ends_BE == tail_BS[:, -1:]).any(-1)
    stops_BQS = settings.stops_BQS
    same_BQ = ((stops_BQS == tail_BS[:, None]) | (stops_BQS < 0)).all(-1)
    return ends_B | (same_BQ & (stops_BQS[..., -1] >= 0)).any(-1)
