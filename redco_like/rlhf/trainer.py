"""Reinforcement learning from rewards and preferences: three functions and an algorithm; everything else has defaults.

    trainer = RLTrainer(deployer, model, params, algorithm=GRPO(samples=8), collate_fn=encode, reward_fn=correct)
    trainer.fit(prompts, iterations=100, sampling=SamplingParams(max_tokens=32, temperature=1.0))
    trainer.params                                   # the actor's

`collate_fn(prompts)` makes token ids of prompts, which are any objects; `reward_fn(prompts, completions)` returns one
number per completion (`redco_like.rlhf.rewards` says what it is given); `metrics_fn(prompts, completions, rewards)` a
dict of numbers to log. For DPO, reward modelling and SFT `collate_fn` makes (prompt, chosen, rejected) or (prompt,
completion) of examples, and there is no reward function.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from pipelines.functions import argument_names
from pipelines.generation import SamplingParams
from pipelines.rlhf import Outcome, Runner
from redco_like.checkpoint import CheckpointStore
from redco_like.deployer import Deployer
from redco_like.launch import within_deadline
from redco_like.metrics import MetricsLog, Progress, Writer
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Algorithm, Examples, Pairs
from redco_like.rlhf.between import Between
from redco_like.rlhf.building import PARTS, SEQUENCES, Member, Problem, build_steps
from redco_like.rlhf.generation import GenerateStep
from redco_like.rlhf.members import members_of, optimizers_of
from redco_like.rlhf.planning import resolve_execution, words
from redco_like.rlhf.prompts import PromptOrder, Row, check_lengths, longest, rows_of
from redco_like.rlhf.report import iteration_metrics
from redco_like.rlhf.rewards import METRICS_ARGUMENTS, REWARD_ARGUMENTS, call_metrics
from redco_like.rlhf.run import RLResult, Run
from redco_like.rlhf.samples import SamplePage, pick, sample_table
from redco_like.watch import NonFiniteError, StopRequest, announced
from search.rlhf import ExecutionPlan, Graph, Workload
from sharding_rules import PlanError


class RLTrainer:
    """Runs an algorithm on the devices of a deployer. Nothing is compiled before `fit`.

    Args:
        deployer: devices, folders, keys.
        model: of the actor, and of all roles that are not said otherwise.
        params: what the actor starts from, the reference stays, and the critic's model begins with; never consumed.
        algorithm: PPO, GRPO, RLOO, DPO, RewardModel, SFT, or one of your own.
        collate_fn: list of prompts -> token ids of each; of examples and pairs, two or three sequences of them each.
        reward_fn: see above; or
        reward_model: (model, params) of a model with a value head that scores completions in the graph.
        metrics_fn: see above.
        decode_fn: tokens -> text; then the functions see texts.
        optimizer: of all roles that are trained; or role -> optimizer. Default Adam with a rate of 1e-5, and gradients
            clipped to a norm of 1.
        critic: (model, params) with a value head; default the actor's, with a head of its own.
        roles: role -> (model, params), for graphs with others.
        plan: where and how every call runs: "auto", "colocated", an `ExecutionPlan`, or the path of one.
        eos: tokens that end a completion, where the sampling parameters do not say.
        rows: sequences that are generated at a time; default what the plan says, or all of an iteration.
        samples_every: iterations between tables of completions, in the log and in samples.html in the trainer's folder;
            None for none.
        name: of this trainer; its files are in that folder of the workdir, its draws belong to it.
        keep_checkpoints: number of latest checkpoints kept.
        deadline_seconds: how long a call, or a reward function, may take on another process.
        writers: where metrics go besides the JSONL file.

    Raises:
        ValueError: functions that cannot be called, roles without a model, settings that contradict each other.
    """

    def __init__(
        self,
        deployer: Deployer,
        model: Model,
        params: Any,
        *,
        algorithm: Algorithm,
        collate_fn: Callable[[list[Any]], Any],
        reward_fn: Callable[..., Any] | None = None,
        reward_model: tuple[Model, Any] | None = None,
        metrics_fn: Callable[..., Any] | None = None,
        decode_fn: Callable[[Sequence[int]], str] | None = None,
        optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation] | None = None,
        critic: tuple[Model, Any] | None = None,
        roles: Mapping[str, tuple[Model, Any]] | None = None,
        plan: ExecutionPlan | str | pathlib.Path = "auto",
        eos: Sequence[int] = (),
        rows: int | None = None,
        samples_every: int | None = 10,
        name: str = "rl",
        keep_checkpoints: int = 2,
        deadline_seconds: float = 3600.0,
        writers: Sequence[str | Writer] = (),
    ):
        for role, function in (("collate_fn", collate_fn), ("decode_fn", decode_fn)):
            if function is not None and not callable(function):
                raise ValueError(f"{role} is a {type(function).__name__}, not a function")
        if reward_fn is not None:
            argument_names(reward_fn, REWARD_ARGUMENTS, role="reward_fn")
        if metrics_fn is not None:
            argument_names(metrics_fn, METRICS_ARGUMENTS, role="metrics_fn")
        self.algorithm, self.name = algorithm, name
        self.graph: Graph = algorithm.graph(reward_model=reward_model is not None)
        online = self.graph.inputs == ("prompts",)
        if online and (reward_fn is None) == (reward_model is None):
            both = "both reward_fn and reward_model" if reward_fn else "neither reward_fn nor reward_model"
            raise ValueError(f"{both}: {type(algorithm).__name__} needs one of them")
        if not online and (reward_fn or reward_model or metrics_fn):
            raise ValueError(
                f"{type(algorithm).__name__} generates nothing that a reward or metrics function could see"
            )
        self._deployer, self._collate_fn, self._decode_fn = deployer, collate_fn, decode_fn
        self._reward_fn, self._metrics_fn = reward_fn, metrics_fn
        self._plan_wanted, self._rows, self._eos = plan, rows, tuple(int(t) for t in eos)
        given = dict(roles or {})
        given |= {role: pair for role, pair in (("critic", critic), ("reward", reward_model)) if pair is not None}
        self.members = members_of(self.graph, model, params, given, deployer.rng(f"{name}/heads"))
        self._optimizers = optimizers_of(self.graph, optimizer)
        self._keep, self._writers, self._deadline = keep_checkpoints, tuple(writers), deadline_seconds
        if samples_every is not None and (isinstance(samples_every, bool) or samples_every < 1):
            raise ValueError(f"samples_every={samples_every!r}; a whole number from 1 up, or None")
        self._samples_every = samples_every
        self._page: SamplePage | None = None
        self._seed = zlib.crc32(f"{deployer.seed}/{name}".encode()) % 2**31
        self.iteration = 0
        self._algorithm_state: dict[str, float] = dict(algorithm.start())
        self._runner: Runner | None = None
        self._between: Between | None = None
        self._store: CheckpointStore | None = None
        self._saved: int | None = None
        self._may_resume = True

    # What there is.

    @property
    def runner(self) -> Runner:
        """What runs the calls, once `fit` has seen prompts.

        Raises:
            ValueError: it has not.
        """
        if self._runner is None:
            raise ValueError(f"trainer {self.name!r} has seen no prompts yet: call fit first")
        return self._runner

    @property
    def execution(self) -> ExecutionPlan:
        return self.runner.execution

    @property
    def params(self) -> Any:
        """Parameters of the actor, or of the role that is trained, on its devices. The next iteration consumes them."""
        trained = [role for role in self.graph.roles if self.graph.trains(role) is not None]
        return self.params_of("actor" if "actor" in trained else trained[0])

    def params_of(self, role: str) -> Any:
        """Parameters of a role, where they lie; see `params`."""
        return self.runner.params(role)

    @property
    def folder(self) -> pathlib.Path | None:
        """Where this trainer's files are; None if the Deployer has no workdir."""
        return None if self._deployer.workdir is None else self._deployer.subfolder(self.name)

    # What it does.

    def fit(
        self,
        prompts: Sequence[Any],
        *,
        iterations: int,
        prompts_per_iteration: int | None = None,
        sampling: SamplingParams | None = None,
        prompt_tokens: int | None = None,
        length: int | None = None,
        checkpoint_every: int | None = None,
        resume: bool = True,
    ) -> RLResult:
        """Run iterations: generate, reward, score, train.

        The first call of a process goes on from the latest checkpoint in the workdir, if there is one, to the end that
        the interrupted call had, and equals a run that was never interrupted. Later calls go on from where the trainer
        is. SIGTERM, or a file called STOP in `folder`, saves a checkpoint after the iteration and ends the call. Where
        something fails before an iteration trains, such as `reward_fn`, the iterations before it are saved. Where calls
        run on disjoint windows an iteration may begin while the one before is still trained on, with the same result.

        Args:
            prompts: a sequence of any objects; or examples, or pairs. In an order of its own in each pass over them.
            iterations: of this call.
            prompts_per_iteration: default 16, or as many as there are.
            sampling: default 64 tokens at temperature 1. How many continuations a prompt has is the algorithm's to say.
            prompt_tokens: of the longest prompt; default the longest of all, which are collated once for it.
            length: of the longest example or pair, in tokens; default the longest of all.
            checkpoint_every: iterations between checkpoints; default only the end of the call.
            resume: False leaves a checkpoint that is there alone and starts anew.

        Raises:
            ValueError: prompts, functions or sizes of a wrong form.
            RewardError: what `reward_fn` returned.
            PlanError: an execution plan that cannot be carried out.
            CheckpointError: a checkpoint that is damaged or of another model.
            NonFiniteError: a loss or gradient that is not finite; the step was not applied.
        """
        for what, value in (("iterations", iterations), ("checkpoint_every", checkpoint_every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{what}={value!r}; a whole number from 1 up")
        if not len(prompts):
            raise ValueError("prompts is empty: there is nothing to learn from")
        each = min(16, len(prompts)) if prompts_per_iteration is None else prompts_per_iteration
        sampling = self._sampling(sampling)
        parts = PARTS[self.graph.inputs[0]]
        if prompt_tokens is None or (parts > 1 and length is None):
            with announced(f"{self.name}: looking for the longest of {len(prompts)} prompts", self._deployer.logger):
                most = longest(prompts, self._collate_fn, parts)
            prompt_tokens, length = prompt_tokens or most[0], length or most[1]
        new = sampling.max_tokens if parts == 1 else max((length or 0) - prompt_tokens, 1)
        a = self.algorithm
        workload = Workload(each, prompt_tokens, new, samples=a.samples, minibatches=a.minibatches, epochs=a.epochs)
        store = self._open_store()
        found = store.latest_step() if store is not None and resume and self._may_resume else None
        data_state = store.metadata(found)["data_state"] if store is not None and found is not None else {}
        start = data_state.get("started_at", self.iteration)
        order = PromptOrder(len(prompts), each, zlib.crc32(f"{self._seed}/{start}".encode()))
        if differences := order.differences(data_state.get("order", {})):
            raise ValueError(
                f"checkpoint {found} in {self.folder} was written with other data: {'; '.join(differences)}. Give the "
                "same, or resume=False to start anew"
            )
        run = Run(prompts, order, workload, start, start + iterations, checkpoint_every, store)
        _ = self._inputs(run, (self.iteration if found is None else found) + 1)  # what is wrong with it shows first
        self._prepare(workload, sampling)
        if store is not None and found is not None:
            self._restore(store, found, data_state)
        self._may_resume = False
        log = self._deployer.logger
        if self.iteration >= run.end:
            log.info("%s: all %d iterations were done already", self.name, iterations)
            return RLResult(self.iteration, {}, "finished")
        writers = ("jsonl", *self._writers)
        config = {"algorithm": dataclasses.asdict(self.algorithm)} if dataclasses.is_dataclass(self.algorithm) else {}
        active = self._deployer.is_first
        with (
            MetricsLog(self.folder, writers, run_name=self.name, config=config, active=active) as metrics,
            Progress(run.end, description=self.name, unit="iterations", active=active) as progress,
            StopRequest(self.folder) as request,
        ):
            return self._run(run, metrics, progress, request)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self._store is not None:
            self._store.wait()

    # How it is done.

    def _sampling(self, sampling: SamplingParams | None) -> SamplingParams:
        sampling = SamplingParams(max_tokens=64, temperature=1.0) if sampling is None else sampling
        samples = self.algorithm.samples
        if sampling.n not in (1, samples):
            raise ValueError(
                f"sampling.n={sampling.n}, but {type(self.algorithm).__name__} has samples={samples}; leave n out"
            )
        return dataclasses.replace(sampling, n=samples)

    def _prepare(self, workload: Workload, sampling: SamplingParams) -> None:
        """Make the runner for this form of data, with the roles as they are."""
        problem = Problem(
            self.algorithm,
            self.graph,
            workload,
            self.members,
            sampling,
            self._optimizers,
            eos=self._eos,
            rows=self._rows,
        )
        if self._runner is not None and self._between is not None and workload == self._between.problem.workload:
            for step in self._runner.steps.values():
                if isinstance(step, GenerateStep):
                    step.sampling = sampling
            self._between.problem = problem
            return
        between = Between(problem, self._reward_fn, self._decode_fn)
        runner = self._runner_of(problem, between, self._plan_wanted)
        if self._runner is not None:
            runner.set_state(self._runner.state)
            self._runner.close()
        # What the roles began as is theirs to keep, in the layout of their homes.
        self.members = {role: Member(member.model, member.forms) for role, member in self.members.items()}
        between.problem = dataclasses.replace(problem, members=self.members)
        self._runner, self._between, execution = runner, between, runner.execution
        self._deployer.logger.info("%s: %s", self.name, words(execution))
        if self.folder is not None and self._deployer.is_first:
            execution.save(self.folder / "execution.json")

    def _runner_of(self, problem: Problem, between: Between, wanted: ExecutionPlan | str | pathlib.Path) -> Runner:
        devices, log = self._deployer.devices, self._deployer.logger
        with announced(f"{self.name}: planning", log):
            execution = resolve_execution(wanted, problem, devices, tell=log.debug, together=self._together)
        try:
            steps = build_steps(problem, execution, devices, seed=self._seed)
        except (PlanError, ValueError) as error:
            if wanted != "auto":
                raise
            why = "; ".join([str(error), *getattr(error, "__notes__", ())])
            log.warning("%s: the plan that was found cannot be run (%s): all calls on all devices", self.name, why)
            return self._runner_of(problem, between, "colocated")
        return Runner(
            execution,
            steps,
            {
                role: self.members[role].params if self._runner is None else self._runner.params(role)
                for role in self.graph.roles
            },
            hosts=between.steps(),
            devices=devices,
            seed=self._seed,
            together=self._together,
            deadline_seconds=self._deployer.deadline_seconds,
        )

    def _together(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        return within_deadline(what, self._deadline, function, *args)

    @property
    def _the_between(self) -> Between:
        if self._between is None:
            raise ValueError(f"trainer {self.name!r} has seen no prompts yet: call fit first")
        return self._between

    def _inputs(self, run: Run, iteration: int) -> dict[str, Any]:
        """An iteration's data from outside."""
        picked = run.order.picked(iteration - run.start).tolist()
        objects = [run.prompts[i] for i in picked]
        name, workload = self.graph.inputs[0], run.workload
        rows: list[Row] = rows_of(objects, self._collate_fn, PARTS[name])
        check_lengths(rows, picked, prompt_tokens=workload.prompt_tokens, width=workload.length)
        data = {"picked": picked, "objects": objects, "rows": rows}
        if name == "prompts":
            return {**data, name: [row[0] for row in rows]}
        kind = Pairs if name == "pairs" else Examples
        record = kind.of(rows, width=workload.length)  # pyright: ignore[reportArgumentType]
        return {**data, name: rows, "record": record, SEQUENCES: record.batch()}

    def _run(self, run: Run, log: MetricsLog, progress: Progress, request: StopRequest) -> RLResult:
        runner, between, metrics, ended = self.runner, self._the_between, dict[str, float](), ""
        begun = self.iteration
        between.state = dict(self._algorithm_state)
        while self.iteration < run.end and not ended:
            number = self.iteration + 1
            try:
                if begun < number:
                    runner.begin(self._inputs(run, number), number)
                begun = number + self._look_ahead(run, number)
                outcome = runner.finish()
            except BaseException:
                self._rescue(run)
                raise
            self._algorithm_state = dict(outcome.data["made"].state)
            self.iteration = number
            metrics = self._metrics(outcome)
            log.write(number, metrics)
            self._show(outcome, number)
            progress.update(number, {k: metrics[k] for k in ("reward", "loss") if k in metrics})
            if skipped := [call for call, values in outcome.metrics.items() if values.get("skipped")]:
                runner.cancel()
                if run.store is not None:
                    self._save(run.store, run)
                    self.wait()
                raise NonFiniteError(
                    f"iteration {number}: a loss or gradient of {', '.join(skipped)} was not finite; "
                    f"{outcome.metrics[skipped[0]]['skipped']:g} steps were not applied"
                )
            ended = self._wish(request)
            if ended:
                runner.cancel()
            if run.store is not None and (ended or run.saves(number)):
                self._save(run.store, run)
        self.wait()
        if ended:
            self._deployer.logger.warning("%s: stopped after iteration %d: %s", self.name, self.iteration, ended)
        return RLResult(self.iteration, metrics, ended or "finished")

    def _look_ahead(self, run: Run, number: int) -> bool:
        """Begin the next iteration already, where its calls could overlap with this one's; not if this one is saved."""
        windows = [plan.window for plan in self.execution.calls]
        apart = any(not a.overlaps(b) for a in windows for b in windows)
        if not apart or number == run.end or run.saves(number):
            return False
        try:
            inputs = self._inputs(run, number + 1)
        except Exception as error:  # noqa: BLE001 (raised again in its turn, when this iteration is done)
            self._deployer.logger.debug("%s: iteration %d does not begin early: %s", self.name, number + 1, error)
            return False
        self.runner.begin(inputs, number + 1)
        return True

    def _metrics(self, outcome: Outcome) -> dict[str, float]:
        made = outcome.data["made"]
        values = iteration_metrics(self.graph, self._the_between.problem.workload, outcome) | dict(made.metrics)
        if self._metrics_fn is not None:
            values |= call_metrics(
                self._metrics_fn, self._the_between.written(outcome.data), np.asarray(outcome.data["rewards"])
            )
        return values

    def _show(self, outcome: Outcome, number: int) -> None:
        """Completions of the first iteration, and of one from time to time, for people to look at."""
        every = self._samples_every
        if every is None or not self._deployer.is_first or self.graph.inputs != ("prompts",):
            return
        if number != 1 and number % every:
            return
        if self._page is None and self.folder is not None:
            self._page = SamplePage(self.folder / "samples.html", title=f"Completions of {self.name}")
        written, rewards = self._the_between.written(outcome.data), np.asarray(outcome.data["rewards"]).tolist()
        given = written.prompts, written.completions, rewards, [len(row) for row in written.tokens]
        mean, table = float(np.mean(rewards)), sample_table(pick(*given, count=4))
        self._deployer.logger.info("%s: iteration %d, reward %.4g\n%s", self.name, number, mean, table)
        if self._page is not None:
            self._page.add(number, pick(*given, count=8), reward=mean)

    def _rescue(self, run: Run) -> None:
        """Something failed: keep the iterations that were finished, if none was begun to be trained since."""
        alone = jax.process_count() > 1 and not self.runner.failed_together
        if run.store is None or self.iteration in (0, self._saved) or self.runner.changed or alone:
            return
        self._save(run.store, run)
        self.wait()
        self._deployer.logger.warning("%s: iteration %d was saved before the error", self.name, self.iteration)

    def _wish(self, request: StopRequest) -> str:
        """Why to stop now, agreed on by all processes."""
        reason = request.reason()
        if self._deployer.process_count == 1:
            return reason
        flags = within_deadline(
            "whether a process was asked to stop",
            self._deployer.deadline_seconds,
            multihost_utils.process_allgather,
            np.asarray([bool(reason)], np.int32),
        )
        return reason or ("another process was asked to stop" if np.asarray(flags).any() else "")

    def _open_store(self) -> CheckpointStore | None:
        if self._store is None and self.folder is not None:
            self._store = CheckpointStore(self.folder / "checkpoints", keep=self._keep)
        return self._store

    def _save(self, store: CheckpointStore, run: Run) -> None:
        where = {"started_at": run.start, "order": run.order.state(), "algorithm": self._algorithm_state}
        plan = self.execution.to_json()
        store.save(self.iteration, {"roles": self.runner.state}, plan_json=plan, data_state=where)
        self._saved = self.iteration

    def _restore(self, store: CheckpointStore, step: int, data_state: Mapping[str, Any]) -> None:
        restored = store.restore({"roles": self.runner.abstract_state}, step)
        self.runner.set_state(restored["roles"])
        self.iteration = self._saved = step
        self._algorithm_state = {name: float(value) for name, value in data_state["algorithm"].items()}
        self._deployer.logger.info("%s: going on from the checkpoint of iteration %d", self.name, step)
