"""What an algorithm is, and the data that it works on: rollouts, pairs and examples, on the host.

    rollout = Rollout.of(prompts, completions, logprobs=logprobs, samples=4, width=96)      # token tuples -> arrays
    rollout = rollout.scored("rewards", rewards_B).scored("reference_logprobs", logprobs_BL)
    made = algorithm.experience(rollout, state)
    made.batch                        # what the losses read; any rows of it are a minibatch
    made.metrics, made.state          # what to log, and what the algorithm knows in the next iteration

An algorithm holds no parameters and knows no device: it names the graph of its calls, makes the function that each call
runs, and turns a scored rollout into what is trained on.

Shape letters: B sequences (rows i n, ..., i n + n - 1 are the n samples of prompt i) or pairs, L tokens of a sequence,
2 the chosen and the rejected one of a pair. Sequences are filled up to L on the right. The model's output at place l
predicts token l + 1, and every array but the tokens themselves has what belongs to a token at the place that predicts
it: `labels[l]` is `tokens[l + 1]`, `mask[l]` is 1 where that is a token of the completion. So no loss ever moves an
array along L, which may be spread over devices. In batches the names have no letters: `tokens`, `labels`, `mask`,
`last`, `logprobs`, `reference_logprobs`, `values`, `rewards`, `advantages`, `returns`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from redco_like.models.model import Model
from search.rlhf.graph import Graph

Tokens = Sequence[int]
PredFn = Callable[[Any, Mapping[str, Any]], Any]
"""(params, batch) -> an array with one row per row of the batch."""
LossFn = Callable[[Any, Mapping[str, Any]], Any]
"""(params, batch) -> what `pipelines.functions.loss_output` reads: a sum, its weight, metrics."""
State = Mapping[str, float]
"""What an algorithm remembers from one iteration to the next; plain numbers, for checkpoints."""


@dataclasses.dataclass(frozen=True)
class Experience:
    """What an iteration is trained on.

    Attributes:
        batch: name -> array with one row per sequence or pair; all losses of the algorithm read this one.
        metrics: name -> number, of the whole rollout.
        state: of the algorithm, for the next iteration.
    """

    batch: dict[str, np.ndarray]
    metrics: dict[str, float]
    state: dict[str, float]


@runtime_checkable
class Algorithm(Protocol):
    """PPO, GRPO, RLOO, DPO, RewardModel, SFT, or a user's own: a frozen dataclass of its settings."""

    @property
    def samples(self) -> int:
        """Completions per prompt."""
        ...

    @property
    def minibatches(self) -> int:
        """Optimizer steps per pass over an iteration's data."""
        ...

    @property
    def epochs(self) -> int:
        """Passes over an iteration's data."""
        ...

    def graph(self, *, reward_model: bool) -> Graph:
        """The calls of an iteration; their data have the names that `scored` takes.

        Args:
            reward_model: whether rewards are a model's, not a function's.
        """
        ...

    def score_fns(self) -> Mapping[str, Callable[[Model], PredFn]]:
        """Score call -> what it runs, made of its role's model; reads `batch()` of the record."""
        ...

    def loss_fns(self) -> Mapping[str, Callable[[Model], LossFn]]:
        """Train call -> its loss, made of its role's model; reads `Experience.batch`."""
        ...

    def start(self) -> dict[str, float]:
        """The state of the first iteration."""
        ...

    def experience(self, rollout: Any, state: State) -> Experience:
        """Turn a scored `Rollout` (or `Pairs`, or `Examples`) into what is trained on.

        Raises:
            ValueError: a score is missing.
        """
        ...


WHOLE = ("tokens",)
"""Arrays of whole numbers."""


class _Record:
    """What rollouts, pairs and examples share: their arrays by name, checked."""

    ARRAYS: ClassVar[Mapping[str, tuple[str, str]]]
    """Name -> (field, letters of its shape)."""

    def _check(self) -> None:
        shape, letters = np.shape(self._array("mask")), self.ARRAYS["mask"][1]
        sizes = dict(zip(letters, shape, strict=False))
        if len(shape) != len(letters) or sizes.get("2", 2) != 2:
            raise ValueError(f"the mask has shape {shape}; it must be ({', '.join(letters)})")
        for name, (field, letters) in self.ARRAYS.items():
            value = getattr(self, field)
            if value is None:
                continue
            array = np.asarray(value, np.int32 if name in WHOLE else np.float32)
            wanted = tuple(sizes[letter] for letter in letters)
            if array.shape != wanted:
                raise ValueError(f"{name} has shape {array.shape}; it must be {wanted}, as the mask says")
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise ValueError(f"{name} has {array[row][~np.isfinite(array[row])].flat[0]} in row {row}")
            object.__setattr__(self, field, array)

    def _array(self, name: str) -> Any:
        return getattr(self, self.ARRAYS[name][0])

    def scored(self, name: str, array: Any) -> Any:
        """The record with what a call has written.

        Raises:
            ValueError: it has no such data, the array has another shape, or holds what is no finite number.
        """
        if name not in self.ARRAYS:
            known = ", ".join(self.ARRAYS)
            raise ValueError(f"a {type(self).__name__} has no {name!r}; it has {known}")
        return dataclasses.replace(self, **{self.ARRAYS[name][0]: np.asarray(array)})  # pyright: ignore[reportArgumentType]

    def batch(self) -> dict[str, np.ndarray]:
        """What score calls read: `tokens`, `labels`, `mask`, and `last`, the place of each sequence's last token."""
        tokens, mask = self._array("tokens"), self._array("mask")
        labels = np.concatenate([tokens[..., 1:], np.zeros_like(tokens[..., :1])], -1)
        places = np.arange(1, mask.shape[-1] + 1, dtype=np.int32) * (mask > 0)
        return {"tokens": tokens, "labels": labels, "mask": mask, "last": places.max(-1).astype(np.int32)}

    def need(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays by name.

        Raises:
            ValueError: one was never scored; names it.
        """
        for name in names:
            if self._array(name) is None:
                raise ValueError(
                    f"the {type(self).__name__.lower()} has no {name}: no call has written them "
                    f"(record.scored({name!r}, ...))"
                )
        return {name: self._array(name) for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout(_Record):
    """Completed prompts and what is known of them.

    Attributes:
        tokens_BL: prompt, completion, filling; int32.
        mask_BL: 1 where a token of the completion is predicted, its end token among them.
        samples: completions per prompt; those of a prompt follow each other.
        logprobs_BL: of the model that wrote the completion, at temperature 1; 0 outside the mask.
        rewards_B: one per completion; None before it is known, as all that follows.
        reference_logprobs_BL: of the same tokens under the reference.
        values_BL: of what stood before each token, as the critic sees it.

    Raises:
        ValueError: shapes that disagree, numbers that are not finite, rows that are no whole number of groups.
    """

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    samples: int = 1
    logprobs_BL: np.ndarray | None = None
    rewards_B: np.ndarray | None = None
    reference_logprobs_BL: np.ndarray | None = None
    values_BL: np.ndarray | None = None

    ARRAYS: ClassVar = {
        "mask": ("mask_BL", "BL"),
        "tokens": ("tokens_BL", "BL"),
        "logprobs": ("logprobs_BL", "BL"),
        "rewards": ("rewards_B", "B"),
        "reference_logprobs": ("reference_logprobs_BL", "BL"),
        "values": ("values_BL", "BL"),
    }

    def __post_init__(self):
        self._check()
        rows = len(self.mask_BL)
        if self.samples < 1 or rows % self.samples:
            near = max(rows // max(self.samples, 1), 1) * max(self.samples, 1)
            raise ValueError(
                f"{rows} completions are no whole number of groups of samples={self.samples}; as {near} are"
            )

    @property
    def lengths_B(self) -> np.ndarray:
        """Tokens of each completion."""
        return self.mask_BL.sum(1)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        *,
        width: int,
        samples: int = 1,
        logprobs: Sequence[Sequence[float]] | None = None,
        rewards: Sequence[float] | None = None,
    ) -> Rollout:
        """Lay tokens into arrays.

        Args:
            prompts: one each, or one per completion.
            completions: of the first prompt, then of the second, and so on.
            width: L; as many tokens as the longest sequence may get, so that all iterations have one shape.
            samples: completions per prompt.
            logprobs: one per token of a completion.
            rewards: one per completion.

        Raises:
            ValueError: numbers of prompts, completions or log-probabilities that disagree, a sequence wider than
                `width`, an empty prompt.
        """
        if len(completions) not in (len(prompts), len(prompts) * samples):
            raise ValueError(f"{len(completions)} completions of {len(prompts)} prompts with samples={samples}")
        each = len(completions) // len(prompts) if prompts else 1
        whole = [prompts[i // each] for i in range(len(completions))]
        tokens_BL, mask_BL = _lay(list(zip(whole, completions, strict=True)), width)
        logprobs_BL = None
        if logprobs is not None:
            logprobs_BL = np.zeros(mask_BL.shape, np.float32)
            for i, (completion, values) in enumerate(zip(completions, logprobs, strict=True)):
                if len(values) != len(completion):
                    raise ValueError(f"completion {i}: {len(values)} log-probabilities of {len(completion)} tokens")
                logprobs_BL[i, mask_BL[i] > 0] = values
        rewards_B = None if rewards is None else np.asarray(rewards, np.float32)
        return cls(tokens_BL, mask_BL, samples, logprobs_BL, rewards_B)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs(_Record):
    """Prompts with two completions each, of which one was preferred.

    Attributes:
        tokens_B2L: prompt, completion, filling; the chosen one first. int32.
        mask_B2L: 1 where a token of the completions is predicted.
        reference_logprobs_B2: log-probability of each completion under the reference; None before it is known.
    """

    tokens_B2L: np.ndarray
    mask_B2L: np.ndarray
    reference_logprobs_B2: np.ndarray | None = None

    ARRAYS: ClassVar = {
        "mask": ("mask_B2L", "B2L"),
        "tokens": ("tokens_B2L", "B2L"),
        "reference_logprobs": ("reference_logprobs_B2", "B2"),
    }

    def __post_init__(self):
        self._check()

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tokens, Tokens, Tokens]], *, width: int) -> Pairs:
        """Lay (prompt, chosen, rejected) into arrays of `width` tokens.

        Raises:
            ValueError: a sequence wider than `width`, an empty prompt.
        """
        rows = [(prompt, one) for prompt, *both in pairs for one in both]
        tokens_BL, mask_BL = _lay(rows, width)
        return cls(tokens_BL.reshape(-1, 2, width), mask_BL.reshape(-1, 2, width))


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(_Record):
    """Prompts with the completion that is to be learned.

    Attributes:
        tokens_BL: prompt, completion, filling; int32.
        mask_BL: 1 where a token of the completion is predicted.
    """

    tokens_BL: np.ndarray
    mask_BL: np.ndarray

    ARRAYS: ClassVar = {"mask": ("mask_BL", "BL"), "tokens": ("tokens_BL", "BL")}

    def __post_init__(self):
        self._check()

    @classmethod
    def of(cls, examples: Sequence[tuple[Tokens, Tokens]], *, width: int) -> Examples:
        """Lay (prompt, completion) into arrays of `width` tokens.

        Raises:
            ValueError: a sequence wider than `width`, an empty prompt.
        """
        return cls(*_lay(list(examples), width))


def _lay(rows: Sequence[tuple[Tokens, Tokens]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, completion) as tokens (B, L), filled up with 0, and the mask of the completions (B, L)."""
    tokens_BL = np.zeros((len(rows), width), np.int32)
    mask_BL = np.zeros((len(rows), width), np.float32)
    for i, (prompt, completion) in enumerate(rows):
        used = len(prompt) + len(completion)
        if used > width:
            raise ValueError(
                f"row {i} has a prompt of {len(prompt)} and a completion of {len(completion)} tokens, {used} in all; "
                f"width={width}, nearest: {used}"
            )
        if not len(prompt):
            raise ValueError(f"row {i} has an empty prompt: nothing predicts its first token; begin with a start token")
        tokens_BL[i, :used] = [*prompt, *completion]
        mask_BL[i, len(prompt) - 1 : used - 1] = 1
    return tokens_BL, mask_BL


RECORDS: Mapping[str, Callable[..., Any]] = {"prompts": Rollout.of, "pairs": Pairs.of, "examples": Examples.of}
"""The input of a graph -> what lays it into arrays."""


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What is logged of any rollout.

    `reward` and `reward_std` over completions, `kl` in nats per completion against the reference (the mean of
    log pi - log pi_ref, summed over tokens), `length` in tokens per completion, and where prompts have several samples
    `groups_equal`: the share of prompts all of whose samples have the same reward, from which nothing is learned by
    comparing them.
    """
    known = rollout.need("rewards", "logprobs", "reference_logprobs")
    rewards_B = known["rewards"]
    excess_BL = (known["logprobs"] - known["reference_logprobs"]) * rollout.mask_BL
    metrics = {
        "reward": float(rewards_B.mean()),
        "reward_std": float(rewards_B.std()),
        "kl": float(excess_BL.sum(1).mean()),
        "length": float(rollout.lengths_B.mean()),
    }
    if rollout.samples > 1:
        rewards_PN = rewards_B.reshape(-1, rollout.samples)
        metrics["groups_equal"] = float((rewards_PN == rewards_PN[:, :1]).all(1).mean())
    return metrics


def check_numbers(
    settings: Any, *, above_0: Sequence[str] = (), from_0: Sequence[str] = (), share: Sequence[str] = ()
) -> None:
    """Check fields of an algorithm, and its `samples`, `minibatches` and `epochs`; None passes.

    Raises:
        ValueError: names the field, what it is and what it must be.
    """
    for names, good, what in (
        (above_0, lambda x: x > 0, "above 0"),
        (from_0, lambda x: x >= 0, "at least 0"),
        (share, lambda x: 0 <= x <= 1, "from 0 to 1"),
    ):
        for name in names:
            value = getattr(settings, name)
            number = isinstance(value, int | float) and math.isfinite(value) and good(value)
            if value is not None and not number:
                raise ValueError(f"{type(settings).__name__}: {name}={value!r}; it must be a number {what}")
    for name in ("samples", "minibatches", "epochs"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(settings).__name__}: {name}={value!r}; a whole number from 1 up")


def check_samples(settings: Any, rollout: Rollout | None = None) -> None:
    """Check that samples of a prompt can be compared.

    Raises:
        ValueError: there is only one.
    """
    samples = settings.samples if rollout is None else rollout.samples
    if samples < 2:
        raise ValueError(
            f"{type(settings).__name__}: samples={samples}; the samples of a prompt are compared with each other, so "
            "there must be at least 2"
        )
