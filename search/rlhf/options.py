"""What a call may do: a window of devices, and a plan there with what it costs.

    option = Option(plan, seconds=2.1, params_bytes=14e9, working_bytes=3e9, state_bytes=56e9, tree=tree)
    Window(8, 8).overlaps(Window(0, 16))                       # True

A *window* is a run of devices in the cluster's order. `Costs` says what options a call has on a window of so many
devices; where the window begins does not matter to the call itself, only to the moves of parameters between calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from search.plan import Plan
from search.rlhf.graph import Call


@dataclasses.dataclass(frozen=True, order=True)
class Window:
    """Devices `first`, ..., `first + devices - 1` of the cluster.

    Raises:
        ValueError: no devices.
    """

    first: int
    devices: int

    def __post_init__(self):
        if self.first < 0 or self.devices < 1:
            raise ValueError(f"a window of {self.devices} devices from device {self.first} on; at least one, from 0 on")

    @property
    def end(self) -> int:
        return self.first + self.devices

    def overlaps(self, other: Window) -> bool:
        return self.first < other.end and other.first < self.end

    def __str__(self) -> str:
        return f"{self.first}-{self.end - 1}"


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run a call on a window of `plan.mesh.size` devices; analytic.

    Attributes:
        plan: of the step: of training, of scoring, or of decoding.
        prefill: of reading prompts, for generation.
        rows: sequences that are generated at a time; 0: all.
        seconds: of the whole call, all the iteration's data.
        params_bytes: the role's parameters as this call holds them, on the fullest device.
        working_bytes: what else a device needs while the call runs (activations, cache, gradients).
        state_bytes: what stays with the parameters of a role that is trained here (optimizer state and, where
            they are apart, master weights); 0 for other calls.
        tree: how the parameters lie, for moves: what `Costs` and the maker of moves agree on.
        parts: what the seconds are made of.
    """

    plan: Plan
    seconds: float
    params_bytes: float
    working_bytes: float
    state_bytes: float = 0.0
    prefill: Plan | None = None
    rows: int = 0
    tree: Any = dataclasses.field(default=None, compare=False, repr=False)
    parts: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def devices(self) -> int:
        return self.plan.mesh.size


class Costs(Protocol):
    """What calls and moves cost. Everything is analytic, and deterministic."""

    def options(self, call: Call, devices: int) -> Sequence[Option]:
        """Ways to run a call on a window of so many devices, none worse than another in every respect."""
        ...

    def move(self, role: str, source: tuple[Window, Option], target: tuple[Window, Option]) -> tuple[float, float]:
        """Seconds and bytes (over all devices) of bringing a role's parameters from one layout to another."""
        ...

    def offload(self, role: str, option: Option, nbytes: float) -> float:
        """Seconds of moving `nbytes` per device between a device and its host, one way."""
        ...
