"""What a plan is expected to do: seconds, bytes and where they come from. A record that is stored beside the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

Label = Literal["analytic", "compiled", "measured"]
MEMORY_PARTS = ("params", "gradients", "optimizer", "cache", "activations", "transient")
"""Parts of a device's memory; the cache is what inference keeps of earlier tokens, or a model's mutable state."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a plan is expected to do, per step; every part is labelled.

    Attributes:
        seconds_per_step: the sum of `seconds`.
        low_seconds, high_seconds: interval of the step time, from the errors of the model's constants.
        seconds: part -> seconds on the critical path: compute, exposed <mesh axis>, bubble, optimizer, offload.
        hidden_seconds: of collectives behind compute.
        communication: mesh axis -> seconds, exposed (seconds) and bytes (sent by a device) of its collectives.
        mfu: model flops over the peak of all devices; what is recomputed does not count.
        tokens_per_second: of all devices; examples where the batch holds no tokens.
        memory: part -> bytes per device, of the fullest device.
        usable_bytes: that the plan may use of a device's memory.
        flops: of the model, per step.
        binds: what the step time mostly is, one line.
        labels: seconds, memory and collectives -> analytic, compiled or measured.
    """

    seconds_per_step: float
    low_seconds: float
    high_seconds: float
    seconds: Mapping[str, float]
    hidden_seconds: float
    communication: Mapping[str, Mapping[str, float]]
    mfu: float
    tokens_per_second: float
    memory: Mapping[str, int]
    usable_bytes: int
    flops: float
    binds: str
    labels: Mapping[str, Label]

    def __post_init__(self):
        for what, label in self.labels.items():
            if label not in get_args(Label):
                raise ValueError(f"labels: {what} is {label!r}; one of {', '.join(get_args(Label))}")

    @property
    def bytes_per_device(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes_per_device <= self.usable_bytes

    @property
    def exposed_seconds(self) -> float:
        """Of collectives, over all mesh axes."""
        return sum(s for part, s in self.seconds.items() if part.startswith("exposed "))

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Estimate:
        """Undo `to_record`.

        Raises:
            ValueError: names the fields that are missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(record) != names:
            raise ValueError(
                f"the estimate lacks {sorted(names - set(record))} and has unknown {sorted(set(record) - names)}"
            )
        return cls(**record)
