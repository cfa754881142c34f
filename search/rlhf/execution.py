"""An execution plan: where and how every call of a graph runs, what moves between them, and when. Plain data.

    execution = ExecutionPlan.load("rlhf.json")
    execution.call("generate").window, execution.call("generate").plan
    execution.save("rlhf.json")

A role's *home* is the call that trains it, or else its first call: the parameters live there. Every other call of the
role whose layout differs gets a copy, which is made after the parameters have changed and given up when the call ends.
A role that is offloaded lies in its host's memory between its calls. The calls are listed in the order in which they
are dispatched; on every device they run in that order. The same file gives the same order on every host.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from search.plan import Plan
from search.rlhf.graph import Graph, Workload
from search.rlhf.options import Window

EXECUTION_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CallPlan:
    """Where and how a call runs.

    Attributes:
        call: its name.
        window: its devices; the plan's mesh lies on them in order.
        plan: of the step (training, scoring) or of decoding.
        prefill: of reading prompts; None where it is `plan`, or the call does not generate.
        rows: sequences that are generated at a time; 0: all.
        seconds: of the call in an iteration (analytic).
        params_bytes, working_bytes, state_bytes: per device, as in `Option`.
    """

    call: str
    window: Window
    plan: Plan
    prefill: Plan | None = None
    rows: int = 0
    seconds: float = 0.0
    params_bytes: float = 0.0
    working_bytes: float = 0.0
    state_bytes: float = 0.0

    def __post_init__(self):
        for plan in (self.plan, self.prefill):
            if plan is not None and plan.mesh.size != self.window.devices:
                raise ValueError(
                    f"call {self.call!r}: the plan's mesh {plan.mesh} has {plan.mesh.size} devices, its window "
                    f"{self.window} has {self.window.devices}"
                )


@dataclasses.dataclass(frozen=True)
class Move:
    """Parameters that move, each iteration.

    Attributes:
        role: whose.
        kind: "reallocate": from its home to a call's layout; "onload" and "offload": from and to the host.
        source, target: calls; for onload and offload both are the call that it is for.
        nbytes: sent, over all devices.
        seconds: that the devices of both windows are busy with it (analytic).
    """

    role: str
    kind: Literal["reallocate", "onload", "offload"]
    source: str
    target: str
    nbytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Busy:
    """A stretch of a steady iteration in which devices are busy; times are seconds from the iteration's begin.

    What is done at the end of an iteration may reach beyond the period: the next iteration has begun by then elsewhere.
    """

    what: str
    kind: Literal["generate", "score", "train", "reallocate", "onload", "offload"]
    window: Window
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """How a graph runs on a cluster.

    Attributes:
        graph, workload: what runs.
        models: role -> name of its model.
        cluster, devices: where.
        calls: one for each of the graph's, in the order of dispatch.
        moves: of parameters, each iteration.
        offloaded: roles that lie in the host's memory between their calls.
        period_seconds: from one iteration's begin to the next one's, in the long run.
        bound_seconds: no plan of the declared space has a shorter period; equal to it where the search finished.
        timeline: one steady iteration.
        memory: per group of devices that are alike: (window, ((seconds, bytes), ...)): bytes per device from each time
            on.
        usable_bytes: of a device.
        heuristics: name -> period of what was compared; inf where it does not fit.
        search: what the search did: seconds, evaluations, how it ended.
        reason: one line.
        problem: what it was made for besides: dtypes, the optimizer, the cluster's file.
    """

    graph: Graph
    workload: Workload
    models: Mapping[str, str]
    cluster: str
    devices: int
    calls: tuple[CallPlan, ...]
    moves: tuple[Move, ...] = ()
    offloaded: tuple[str, ...] = ()
    period_seconds: float = 0.0
    bound_seconds: float = 0.0
    timeline: tuple[Busy, ...] = ()
    memory: tuple[tuple[Window, tuple[tuple[float, float], ...]], ...] = ()
    usable_bytes: float = 0.0
    heuristics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    problem: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: int = EXECUTION_VERSION

    def __post_init__(self):
        names = [plan.call for plan in self.calls]
        if sorted(names) != sorted(self.graph.order):
            raise ValueError(
                f"the execution plan has calls {', '.join(names) or 'none'}; the graph {self.graph.name!r} has "
                f"{', '.join(self.graph.order)}"
            )
        for i, name in enumerate(names):
            late = [other for other in self.graph.before(name) if other in names[i:]]
            if late:
                raise ValueError(f"call {name!r} is dispatched before {late[0]!r}, which it waits for")
        for plan in self.calls:
            if plan.window.end > self.devices:
                raise ValueError(
                    f"call {plan.call!r} runs on devices {plan.window}, but there are {self.devices} devices"
                )
        for role in self.graph.roles:
            if role not in self.models:
                raise ValueError(f"role {role!r} has no model; there are models for {', '.join(self.models) or 'none'}")
        for role in self.offloaded:
            if role not in self.graph.roles:
                raise ValueError(f"offloaded role {role!r} is none of {', '.join(self.graph.roles)}")

    def call(self, name: str) -> CallPlan:
        """Return the plan of a call.

        Raises:
            ValueError: there is no such call.
        """
        _ = self.graph.call(name)
        return next(plan for plan in self.calls if plan.call == name)

    def home(self, role: str) -> CallPlan:
        """Where a role's parameters live."""
        trains = self.graph.trains(role)
        return self.call(trains.name if trains is not None else self.graph.of_role(role)[0].name)

    @property
    def gap(self) -> float:
        """How far the period may be above the best, as a share of it."""
        return 1 - self.bound_seconds / self.period_seconds if self.period_seconds else 0.0

    def to_json(self) -> str:
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        record["calls"] = [_plain(plan) for plan in self.calls]
        return json.dumps({k: _plain(v) for k, v in record.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ExecutionPlan:
        """Read an execution plan.

        Raises:
            ValueError: not JSON, another version, unknown fields, or a plan that contradicts itself.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the execution plan is not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("version") != EXECUTION_VERSION:
            version = record.get("version") if isinstance(record, dict) else None
            raise ValueError(f"the execution plan has version {version!r}; this program reads {EXECUTION_VERSION}")
        try:
            return cls(
                **{
                    **record,
                    "graph": Graph.from_record(record["graph"]),
                    "workload": Workload(**record["workload"]),
                    "calls": tuple(_call_plan(entry) for entry in record["calls"]),
                    "moves": tuple(Move(**entry) for entry in record.get("moves", ())),
                    "offloaded": tuple(record.get("offloaded", ())),
                    "timeline": tuple(
                        Busy(**{**entry, "window": Window(**entry["window"])}) for entry in record.get("timeline", ())
                    ),
                    "memory": tuple(
                        (Window(**window), tuple((t, b) for t, b in levels))
                        for window, levels in record.get("memory", ())
                    ),
                }
            )
        except KeyError as error:
            raise ValueError(f"the execution plan has no {error}") from None
        except TypeError as error:
            raise ValueError(f"the execution plan cannot be read: {error}") from None

    def save(self, path: str | pathlib.Path) -> None:
        pathlib.Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> ExecutionPlan:
        """Read a file.

        Raises:
            ValueError: there is none, or see `from_json`.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"no execution plan at {path}")
        return cls.from_json(path.read_text())


def _plain(value: Any) -> Any:
    """Records as dicts, plans as their own JSON."""
    if isinstance(value, Plan):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _call_plan(record: Mapping[str, Any]) -> CallPlan:
    plan, prefill = Plan.from_json(json.dumps(record["plan"])), record.get("prefill")
    return CallPlan(
        **{
            **record,
            "window": Window(**record["window"]),
            "plan": plan,
            "prefill": None if prefill is None else Plan.from_json(json.dumps(prefill)),
        }
    )
