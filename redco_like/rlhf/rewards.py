"""The user's functions on completions: called with what they name, and what they return is checked.

    rewards_B = call_rewards(reward_fn, Written(prompts, completions, texts), picked=indices, iteration=7)

`reward_fn(prompts, completions)` gets one prompt per completion (the n samples of a prompt follow each other) and
returns one number per completion. Completions are texts where the trainer was given `decode_fn`, else tuples of tokens;
a function that names `tokens` gets the tokens too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipelines.functions import call_by_name

REWARD_ARGUMENTS = ("prompts", "completions", "tokens")
METRICS_ARGUMENTS = ("prompts", "completions", "rewards", "tokens")


class RewardError(ValueError):
    """A reward function returned something else than one finite number per completion."""


@dataclasses.dataclass(frozen=True)
class Written:
    """An iteration's completions.

    Attributes:
        prompts: the user's objects, one per completion.
        tokens: of each completion, its end token among them.
        texts: of each completion, without its end token; None without a tokenizer.
    """

    prompts: list[Any]
    tokens: list[tuple[int, ...]]
    texts: list[str] | None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Any],
        tokens: Sequence[Sequence[int]],
        *,
        samples: int,
        decode_fn: Callable[[Sequence[int]], str] | None,
        eos: Sequence[int],
    ) -> Written:
        each = [prompt for prompt in prompts for _ in range(samples)]
        rows = [tuple(row) for row in tokens]
        texts = None
        if decode_fn is not None:
            texts = [decode_fn(row[:-1] if row and row[-1] in eos else row) for row in rows]
        return cls(each, rows, texts)

    @property
    def completions(self) -> list[Any]:
        """As the user's functions see them."""
        return list(self.tokens) if self.texts is None else list(self.texts)


def call_rewards(
    reward_fn: Callable[..., Any] | None, written: Written, *, picked: Sequence[int], iteration: int
) -> np.ndarray:
    """Score completions by the user's function.

    Raises:
        RewardError: not one finite number per completion; names the first that is none. What the function raises gets
            a note that says for which iteration and prompts it was called.
    """
    if reward_fn is None:
        raise ValueError("there is no reward_fn")
    call = call_by_name(reward_fn, REWARD_ARGUMENTS, role="reward_fn")
    count = len(written.tokens)
    try:
        made = call(prompts=written.prompts, completions=written.completions, tokens=list(written.tokens))
        if made is None or isinstance(made, str) or not hasattr(made, "__len__"):
            raise RewardError(f"reward_fn returned a {type(made).__name__}; it must be one number per completion")
        if np.ndim(made) != 1 or len(made) != count:
            raise RewardError(
                f"reward_fn returned {np.shape(made)} numbers for {count} completions; one each is needed"
            )
        rewards = []
        for i, value in enumerate(made):
            number = _number(value)
            if number is None or not math.isfinite(number):
                raise RewardError(
                    f"reward_fn returned {value!r:.60} for completion {i} of {count}, {written.completions[i]!r:.200} "
                    f"(of prompt {written.prompts[i]!r:.200}); it must be a finite number"
                )
            rewards.append(number)
    except Exception as error:
        shown = ", ".join(map(str, picked[:8])) + (f", and {len(picked) - 8} more" if len(picked) > 8 else "")
        error.add_note(f"in iteration {iteration}, where reward_fn scored {count} completions of prompts {shown}")
        raise
    return np.asarray(rewards, np.float32)


def call_metrics(metrics_fn: Callable[..., Any], written: Written, rewards_B: np.ndarray) -> dict[str, float]:
    """Call the user's metrics.

    Raises:
        ValueError: it does not return a dict of numbers.
    """
    call = call_by_name(metrics_fn, METRICS_ARGUMENTS, role="metrics_fn")
    made = call(
        prompts=written.prompts,
        completions=written.completions,
        rewards=rewards_B.tolist(),
        tokens=list(written.tokens),
    )
    numbers = {name: _number(value) for name, value in made.items()} if isinstance(made, dict) else None
    if numbers is None or any(number is None for number in numbers.values()):
        raise ValueError(f"metrics_fn returned {made!r:.80}; it must be a dict from name to number")
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
