"""Which prompts an iteration has, and how long prompts are.

    order = PromptOrder(len(prompts), per_iteration=16, seed=3)
    order.picked(1)                                  # indices of the first iteration's prompts

The order depends on the seed and the number of prompts alone: a run that goes on sees what an uninterrupted one sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_AT_A_TIME = 1024
"""Prompts that are collated at once where only their length is wanted."""


@dataclasses.dataclass(frozen=True)
class PromptOrder:
    """All prompts in an order of their own in each pass, cut into iterations; none is left out.

    Attributes:
        count: prompts there are.
        per_iteration: of them in an iteration.
        seed: of the shuffles.

    Raises:
        ValueError: fewer prompts than an iteration has.
    """

    count: int
    per_iteration: int
    seed: int

    def __post_init__(self):
        if self.per_iteration < 1:
            raise ValueError(f"prompts_per_iteration={self.per_iteration}; at least 1")
        if self.count < self.per_iteration:
            raise ValueError(
                f"prompts_per_iteration={self.per_iteration}, but there are {self.count} prompts; nearest: "
                f"{self.count or 'none: give some'}"
            )

    def picked(self, iteration: int) -> np.ndarray:
        """Indices of the prompts of an iteration, the first of which is 1."""
        begin, end = (iteration - 1) * self.per_iteration, iteration * self.per_iteration
        picked: list[np.ndarray] = []
        for p in range(begin // self.count, (end - 1) // self.count + 1):
            order, first = np.random.default_rng([self.seed, p]).permutation(self.count), p * self.count
            picked.append(order[max(begin - first, 0) : end - first])
        return np.concatenate(picked)

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """Where another run's order was made of something else, in words."""
        names = {"count": "prompts", "per_iteration": "prompts_per_iteration", "seed": "the seed"}
        mine = self.state()
        return [f"{names[k]}: {v} then, {mine[k]} now" for k, v in state.items() if k in mine and mine[k] != v]


Row = tuple[tuple[int, ...], ...]
"""What an example is to the trainer: (prompt,), (prompt, completion) or (prompt, chosen, rejected), in tokens."""


def rows_of(examples: Sequence[Any], collate_fn: Callable[[list[Any]], Any], parts: int) -> list[Row]:
    """Collate prompts or examples.

    Args:
        collate_fn: list of examples -> of each, the tokens of a prompt (`parts` 1), or so many sequences of tokens.

    Raises:
        ValueError: another number of them, an empty prompt, or what are no tokens; names the example.
    """
    made = collate_fn(list(examples))
    if len(made) != len(examples):
        raise ValueError(f"collate_fn returned {len(made)} items for {len(examples)} prompts; one each is needed")
    rows = []
    for i, item in enumerate(made):
        try:
            row = (item,) if parts == 1 else tuple(item)
            row = tuple(tuple(int(t) for t in part) for part in row)
        except (TypeError, ValueError):
            wanted = "a sequence of token ids" if parts == 1 else f"{parts} sequences of token ids"
            raise ValueError(f"collate_fn made of {examples[i]!r:.80} {item!r:.80}; it must be {wanted}") from None
        if len(row) != parts:
            raise ValueError(
                f"collate_fn made {len(row)} sequences of {examples[i]!r:.80}; they must be {parts}: "
                + ("prompt, completion" if parts == 2 else "prompt, chosen, rejected")
            )
        if not row[0]:
            raise ValueError(f"collate_fn made an empty prompt of {examples[i]!r:.80}: there is nothing to continue")
        rows.append(row)
    return rows


def longest(examples: Sequence[Any], collate_fn: Callable[[list[Any]], Any], parts: int) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest prompt with what follows it."""
    prompt = whole = 0
    for start in range(0, len(examples), _AT_A_TIME):
        piece = [examples[i] for i in range(start, min(start + _AT_A_TIME, len(examples)))]
        for row in rows_of(piece, collate_fn, parts):
            prompt = max(prompt, len(row[0]))
            whole = max(whole, len(row[0]) + max((len(part) for part in row[1:]), default=0))
    return prompt, whole


def check_lengths(rows: Sequence[Row], picked: Sequence[int], *, prompt_tokens: int, width: int) -> None:
    """Refuse what is longer than the programs are for.

    Raises:
        ValueError: names the first prompt that is.
    """
    for index, row in zip(picked, rows, strict=True):
        if len(row[0]) > prompt_tokens:
            raise ValueError(
                f"prompt {index} has {len(row[0])} tokens, more than prompt_tokens={prompt_tokens}, which the cache "
                f"and the programs are made for; nearest: prompt_tokens={len(row[0])}"
            )
        whole = len(row[0]) + max((len(part) for part in row[1:]), default=0)
        if whole > width:
            raise ValueError(f"example {index} has {whole} tokens, more than length={width}; nearest: length={whole}")
