"""One call of `RLTrainer.fit`: what it was asked for, and how it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from redco_like.checkpoint import CheckpointStore
from redco_like.rlhf.prompts import PromptOrder
from search.rlhf import Workload


@dataclasses.dataclass(frozen=True)
class RLResult:
    """How a call of `fit` ended.

    Attributes:
        iteration: iterations done in all.
        metrics: of the last one of this call; empty if it had nothing to do.
        ended: "finished", or why the run stopped early.
    """

    iteration: int
    metrics: dict[str, float]
    ended: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `fit`: iterations `start + 1` to `end`."""

    prompts: Sequence[Any]
    order: PromptOrder
    workload: Workload
    start: int
    end: int
    checkpoint_every: int | None
    store: CheckpointStore | None

    def saves(self, number: int) -> bool:
        """Whether a checkpoint is due after an iteration."""
        if self.store is None:
            return False
        every = self.checkpoint_every
        return number == self.end or (every is not None and (number - self.start) % every == 0)
