"""Runs an execution plan, iteration by iteration: every call its own program on its own mesh.

    runner = Runner(execution, steps, params, hosts=hosts)
    outcome = runner.iteration({"prompts": prompts}, 1)        # outcome.data, outcome.metrics, outcome.spans
    runner.state                                               # role -> what a checkpoint holds

Between calls data are on the host, as numpy arrays that every process has: they are counted in tokens, and small beside
parameters. Parameters go from device to device: from a role's home to the calls that hold them otherwise, and into the
host's memory where the plan says so. A call begins when the data and the parameters that it waits for are there and no
earlier call of the plan's order is left on its devices; calls on disjoint windows overlap, and so do iterations, where
the next one is begun before one is finished:

    runner.begin(inputs, 1)
    runner.begin(more, 2)                                      # its calls begin as soon as their devices are free
    outcome = runner.finish()                                  # of iteration 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from pipelines.rlhf.exchange import Together, share
from pipelines.rlhf.roles import Roles, absent, params_of, storage
from pipelines.rlhf.schedule import Stream, Task, no_wait
from pipelines.rlhf.steps import Done, Step, TrainStep, keyed, moving, place, plain, with_moving
from search.rlhf import Call, CallPlan, ExecutionPlan
from sharding_rules import PlanError

Kind = Literal["generate", "score", "train", "reallocate", "onload", "offload", "host"]


class CallError(RuntimeError):
    """A call failed on another process."""


@dataclasses.dataclass(frozen=True)
class HostStep:
    """A function of the host between calls: rewards, advantages.

    Attributes:
        name: not that of a call.
        reads, writes: names of data.
        run: (data, iteration) -> what it writes, by name.
        where: "all": every process runs it on the same data, and gets the same; "first": process 0 does, and tells.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
    where: Literal["all", "first"] = "all"


@dataclasses.dataclass(frozen=True)
class Ran:
    """A stretch of an iteration on this process.

    Attributes:
        what: a call, a host step, or "role: from -> to" of a move.
        kind: of it.
        devices: that it kept busy, as numbers in the plan.
        start, end: seconds since the iteration began.
    """

    what: str
    kind: Kind
    devices: tuple[int, ...]
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an iteration.

    Attributes:
        data: all of it, by name.
        metrics: call -> name -> number.
        ran: what ran when, in the order of dispatch.
    """

    data: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    ran: tuple[Ran, ...]


class Runner:
    """An execution plan with all that runs it.

    Args:
        execution: the plan.
        steps: call -> what it runs, on the mesh of its window.
        params: role -> parameters to start from; those of roles that are trained are copied.
        hosts: what the host does between the calls.
        devices: as the plan numbers them; default all.
        seed: of the keys of the roles that are trained.
        together: calls what waits for other processes, with a limit of time.
        deadline_seconds: how long another process may stand still in a move of parameters.

    Attributes:
        changed: whether a role was trained in an iteration that did not end.
        failed_together: whether all processes know of the last failure.

    Raises:
        PlanError: more devices than there are; a step on other devices than its window's.
        ValueError: steps, parameters or data that are missing.
    """

    def __init__(
        self,
        execution: ExecutionPlan,
        steps: Mapping[str, Step],
        params: Mapping[str, Any],
        *,
        hosts: Sequence[HostStep] = (),
        devices: Sequence[Any] | None = None,
        seed: int = 0,
        together: Together = no_wait,
        deadline_seconds: float = 300.0,
    ):
        self.execution, self.steps, self.hosts = execution, dict(steps), tuple(hosts)
        self._devices = list(jax.devices() if devices is None else devices)
        self._together, self.changed = together, False
        self._several = jax.process_count() > 1
        self._stream, self._pending, self._past = Stream(waves=self._several), list[_Iteration](), list[str]()
        self.failed_together = False
        self._check(params)
        self.roles = Roles(self._homes(params, seed), offloaded=execution.offloaded, deadline_seconds=deadline_seconds)

    @property
    def state(self) -> dict[str, Any]:
        """Role -> all of it that training changes: what a checkpoint holds. Keys are numbers.

        In a run of several processes every process calls it: what lies on some of them only is spread over all devices.
        """
        saved = {role: plain(moving(self.roles.home(role))) for role in self._trained}
        return {role: self.roles.moved((role, "saved", 0), x, self._saved_as(x)) for role, x in saved.items()}

    @property
    def abstract_state(self) -> dict[str, Any]:
        """Shapes and shardings of `state`, as a checkpoint is restored into it."""
        forms = {role: plain(moving(self.roles.form(role))) for role in self._trained}
        return {
            role: jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), form, self._saved_as(form)
            )
            for role, form in forms.items()
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or from the state of another runner of the same roles."""
        for role, saved in state.items():
            form = moving(self.roles.form(role))
            at_home = jax.tree.map(lambda x: x.sharding, plain(form))
            moved = self.roles.moved((role, "restored", tuple(_places(saved))), saved, at_home)
            self.roles.set_home(role, with_moving(self.roles.home(role), keyed(moved, form)))
        self.changed = False

    def _saved_as(self, form: Any) -> Any:
        """Where a checkpoint's arrays lie."""
        everywhere = len({device.process_index for device in self._devices})
        held = {d.process_index for x in jax.tree.leaves(form) for d in x.sharding.device_set}
        if len(held) == everywhere:
            return jax.tree.map(lambda x: x.sharding, form)
        return storage(form, self._devices)

    def params(self, role: str) -> Any:
        """A role's parameters at home; the next iteration may consume them."""
        return params_of(self.roles.home(role))

    def iteration(self, inputs: Mapping[str, Any], number: int) -> Outcome:
        """Run every call once: `begin` and `finish`.

        Args:
            inputs: the data that come from outside.
            number: of the iteration: what is drawn depends on it.

        Raises:
            ValueError: others were begun and not finished.
            CallError: a call failed on another process. What fails on this one raises its own exception, with a note.
        """
        if self._pending:
            raise ValueError(f"iteration {self._pending[0].number} was begun and not finished")
        self.begin(inputs, number)
        return self.finish()

    def begin(self, inputs: Mapping[str, Any], number: int) -> None:
        """Put an iteration behind those that were begun; the next call of `finish` may run some of it already.

        Its calls wait for the roles' newest parameters, and those that train for all of the iteration before, so that
        the state is that of the oldest finished iteration until the next one is finished.
        """
        last = self._pending[-1] if self._pending else None
        now = _Iteration(number, dict(inputs))
        self._list(now)
        self._stream.add([self._behind(now, task, last) for task in now.tasks])
        self._pending.append(now)

    def finish(self) -> Outcome:
        """Run until the oldest iteration that was begun is done.

        Raises:
            ValueError: none was begun.
            CallError, or what a call raises: as `iteration`; all that was begun is then given up.
        """
        if not self._pending:
            raise ValueError("no iteration was begun")
        now = self._pending[0]
        try:
            spans = self._stream.run(*(now.full(task.name) for task in now.tasks))
        except BaseException:
            self.cancel()
            raise
        self.changed = False
        self._pending.pop(0)
        self._stream.forget(*self._past)
        self._past = [now.full(task.name) for task in now.tasks]
        began = min(span.start for span in spans)
        ran = tuple(
            Ran(task.name, now.kinds[task.name], tuple(sorted(task.devices)), span.start - began, span.end - began)
            for task, span in zip(now.tasks, spans, strict=True)
        )
        return Outcome(now.data, now.metrics, ran)

    def cancel(self) -> None:
        """Give up what was begun and not finished, once the calls that run have ended."""
        self._stream.cancel()
        for iteration in self._pending:
            self._stream.forget(*(iteration.full(task.name) for task in iteration.tasks))
        self._pending.clear()
        for call in self.execution.calls:
            self.roles.give_up(call.call)

    def close(self) -> None:
        """Give up what was begun, and the threads."""
        self.cancel()
        self._stream.close()

    # How it is done.

    @property
    def _trained(self) -> list[str]:
        graph = self.execution.graph
        return [role for role in graph.roles if graph.trains(role) is not None]

    def _check(self, params: Mapping[str, Any]) -> None:
        execution, graph = self.execution, self.execution.graph
        if execution.devices > len(self._devices):
            last = max(execution.calls, key=lambda plan: plan.window.end)
            raise PlanError(
                f"the execution plan is for {execution.devices} devices (call {last.call!r} runs on {last.window}), "
                f"but there are {len(self._devices)}; make one for {len(self._devices)}"
            )
        for call in graph.calls:
            if call.name not in self.steps:
                raise ValueError(
                    f"call {call.name!r} has no step; there are steps for {', '.join(self.steps) or 'none'}"
                )
            plan = execution.call(call.name)
            wanted = self._devices[plan.window.first : plan.window.end]
            if set(self.steps[call.name].mesh.devices.flat) != set(wanted):
                raise PlanError(f"the step of call {call.name!r} is not on the devices of its window {plan.window}")
            if (call.kind == "train") != isinstance(self.steps[call.name], TrainStep):
                raise ValueError(f"call {call.name!r} is of kind {call.kind}; a TrainStep is what trains, and only it")
        for role in graph.roles:
            if role not in params:
                raise ValueError(f"role {role!r} has no parameters; there are those of {', '.join(params) or 'none'}")
        writers: dict[str, str] = {}
        for host in self.hosts:
            if host.name in self.steps or host.name in writers.values():
                raise ValueError(f"two steps are named {host.name!r}")
            for name in host.writes:
                if name in writers:
                    raise ValueError(f"{name!r} is written by {host.name!r} and {writers[name]!r}")
                writers[name] = host.name

    def _homes(self, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
        homes: dict[str, Any] = {}
        for i, role in enumerate(self.execution.graph.roles):
            call = self.execution.home(role).call
            step = self.steps[call]
            if not self._takes_part(call):
                homes[role] = absent(
                    step.abstract_state if isinstance(step, TrainStep) else _forms_on(params[role], step)
                )
            elif isinstance(step, TrainStep):
                homes[role] = step.state_from(params[role], seed + i)
            else:
                homes[role] = place(params[role], step.param_shardings)
        return homes

    def _takes_part(self, call: str) -> bool:
        """Whether this process has devices of a call."""
        mine = jax.process_index()
        return any(device.process_index == mine for device in self.steps[call].mesh.devices.flat)

    def _list(self, now: _Iteration) -> None:
        """What an iteration does, in order: the plan's calls, each after what moves for it, and the host's steps."""
        graph, data = self.execution.graph, now.data
        writers = {name: call.name for call in graph.calls for name in call.writes}
        writers |= {name: host.name for host in self.hosts for name in host.writes}
        hosts = list(self.hosts)

        def add_hosts() -> None:
            """Those whose data are all written by what is in the list."""
            for host in list(hosts):
                needed = self._needed(host.reads, writers, data, host.name)
                if all(name in now.kinds for name in needed):
                    now.add("host", self._host_task(host, needed, now))
                    hosts.remove(host)

        for plan in self.execution.calls:
            add_hosts()
            call, step = graph.call(plan.call), self.steps[plan.call]
            needed = (*graph.before(call.name), *self._needed(step.reads, writers, data, call.name))
            before, after = self._moves(call, plan, step)
            for kind, task in before:
                now.add(kind, task, call.role)
            needed = tuple(dict.fromkeys((*needed, *(task.name for _, task in before))))
            now.add(call.kind, self._call_task(call, plan, step, needed, now), call.role)
            for kind, task in after:
                now.add(kind, task, call.role)
        add_hosts()
        if hosts:
            raise ValueError(f"host step {hosts[0].name!r} waits for what comes after it, or for itself")

    def _behind(self, now: _Iteration, task: Task, last: _Iteration | None) -> Task:
        """A task as the stream knows it: with the name of its iteration, after what it waits for of the one before."""
        after = [now.full(name) for name in task.after]
        if last is not None:
            kind, role = now.kinds[task.name], now.roles[task.name]
            for other in last.tasks:
                same_host = kind == "host" and other.name == task.name
                newest = role and last.roles[other.name] == role and last.kinds[other.name] in ("train", "offload")
                if kind == "train" or same_host or newest:
                    after.append(last.full(other.name))
        return dataclasses.replace(task, name=now.full(task.name), after=tuple(after))

    def _needed(self, reads: Sequence[str], writers: Mapping[str, str], data: Mapping[str, Any], who: str) -> list[str]:
        for name in reads:
            if name not in writers and name not in data:
                known = ", ".join(sorted({*writers, *data}))
                raise ValueError(f"{who!r} reads {name!r}, which nothing writes; there are {known}")
        return list(dict.fromkeys(writers[name] for name in reads if name in writers))

    def _moves(self, call: Call, plan: CallPlan, step: Step) -> tuple[list[tuple[Kind, Task]], list[tuple[Kind, Task]]]:
        """What brings a role's parameters to a call, and what comes after it."""
        role, roles = call.role, self.roles
        offloaded = role in self.execution.offloaded
        here = _numbers(plan)
        if call.kind == "train":
            if not offloaded:
                return [], []
            back, away = f"{role}: host -> {call.name}", f"{role}: {call.name} -> host"

            def offload() -> None:
                roles.set_home(role, roles.lent(call.name))
                roles.give_up(call.name)

            return (
                [("onload", Task(back, here, self._if_here(call, lambda: roles.onload(role, call.name))))],
                [("offload", Task(away, here, self._if_here(call, offload), (call.name,)))],
            )
        home = self.execution.home(role)
        source = "host" if offloaded else home.call
        name = f"{role}: {source} -> {call.name}"
        if roles.same_layout(role, step.param_shardings):
            return [], []
        both = here if offloaded else here | _numbers(home)
        if self._several:  # all processes take part in a move, and one at a time
            both = frozenset(range(len(self._devices)))
        lend = Task(name, both, lambda: roles.lend(role, call.name, step.param_shardings, step.compute_dtype))
        return [("onload" if offloaded else "reallocate", lend)], []

    def _if_here(self, call: Call, run: Callable[[], None]) -> Callable[[], None] | None:
        return run if self._takes_part(call.name) else None

    def _call_task(
        self,
        call: Call,
        plan: CallPlan,
        step: Step,
        needed: tuple[str, ...],
        now: _Iteration,
    ) -> Task:
        mine: list[Done] = []
        roles, data, number = self.roles, now.data, now.number

        def run() -> None:
            if call.kind == "train":
                self.changed = True
                if call.role in self.execution.offloaded:
                    done = step.run(roles.lent(call.name), data, number)
                    roles.put(call.name, done.state)
                else:
                    done = step.run(roles.home(call.role), data, number)
                    roles.set_home(call.role, done.state)
                mine.append(dataclasses.replace(done, state=None))
                return
            if roles.same_layout(call.role, step.param_shardings):
                roles.lend(call.role, call.name, step.param_shardings)
            try:
                mine.append(step.run(roles.lent(call.name), data, number))
            finally:
                step.close()
                roles.give_up(call.name)

        def take(error: BaseException | None) -> None:
            parts = self._everyones(call.name, mine[0] if mine else None, error)
            if parts:
                done = step.joined(parts)
                data.update(done.outputs)
                now.metrics[call.name] = done.metrics

        return Task(call.name, _numbers(plan), self._if_here(call, run), needed, take)

    def _host_task(self, host: HostStep, needed: Sequence[str], now: _Iteration) -> Task:
        mine: list[Done] = []
        data, number = now.data, now.number
        alone = host.where == "all" or jax.process_index() == 0

        def run() -> None:
            made = dict(host.run(data, number))
            if missing := [name for name in host.writes if name not in made]:
                raise ValueError(f"host step {host.name!r} did not write {missing[0]!r}")
            mine.append(Done(made))

        def take(error: BaseException | None) -> None:
            if host.where == "first":
                parts = self._everyones(host.name, mine[0] if mine else None, error)
                data.update(parts[0].outputs if parts else {})
            elif mine:
                data.update(mine[0].outputs)

        return Task(host.name, frozenset(), run if alone else None, tuple(needed), take)

    def _everyones(self, name: str, mine: Done | None, error: BaseException | None) -> list[Done]:
        """What each process that took part has made, or an error that says which one failed."""
        if not self._several:
            return [] if mine is None else [mine]
        record: Any = None
        if error is not None:
            record = {"error": f"{type(error).__name__}: {error}"}
        elif mine is not None:
            record = {"outputs": mine.outputs, "metrics": mine.metrics}
        records = share(record, what=f"the results of {name!r}", together=self._together)
        self.failed_together = any(r is not None and "error" in r for r in records)
        failed = [(i, r["error"]) for i, r in enumerate(records) if r is not None and "error" in r]
        if failed and error is None:
            raise CallError(f"{name!r} failed on process {failed[0][0]}: {failed[0][1]}")
        return [Done(r["outputs"], r["metrics"]) for r in records if r is not None and "outputs" in r]


@dataclasses.dataclass
class _Iteration:
    """An iteration that was begun: its data, as they come to be, and its tasks under their own names."""

    number: int
    data: dict[str, Any]
    metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    tasks: list[Task] = dataclasses.field(default_factory=list)
    kinds: dict[str, Kind] = dataclasses.field(default_factory=dict)
    roles: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, kind: Kind, task: Task, role: str = "") -> None:
        self.tasks.append(task)
        self.kinds[task.name], self.roles[task.name] = kind, role

    def full(self, name: str) -> str:
        """A task's name among those of other iterations."""
        return f"{name} of iteration {self.number}"


def _places(tree: Any) -> list[Any]:
    return [x.sharding for x in jax.tree.leaves(tree)]


def _numbers(plan: CallPlan) -> frozenset[int]:
    return frozenset(range(plan.window.first, plan.window.end))


def _forms_on(params: Any, step: Step) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, step.param_shardings)
