"""Training: three functions in, a state out; plans, compiles, feeds, evaluates, logs, checkpoints and resumes.

trainer = Trainer(deployer, collate_fn, loss_fn, init_fn, optax.adamw(3e-4))
trainer.fit(train_examples, global_batch=64, epochs=1, eval_examples=valid_examples)
trainer.evaluate(test_examples)                # {"loss": ...}, every example exactly once
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pipelines import TrainProgram, TrainState, build_train_program, resolve_plan
from pipelines.devices import cluster_here
from pipelines.functions import LOSS_ARGUMENTS, argument_names, batch_rows
from pipelines.problem import check_rows, init_like, train_problem
from redco_like.checkpoint import CheckpointStore
from redco_like.data import DataLoader, Piece, collate, from_whole, process_rows, sequential, sharded
from redco_like.deployer import Deployer
from redco_like.metrics import Writer
from redco_like.run_log import RunLog
from redco_like.watch import OnNonfinite, StepWatch, StopRequest, announced, check_policy
from search import Cluster, Plan, parse_cluster
from sharding_rules import Layout, MeshShape, format_bytes, make_mesh, split_frozen
from sharding_rules.frozen import join

Every = int | Literal["epoch"] | None
"""How often: every so many steps, at the end of each epoch, or never. The end of a run always counts."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended.

    Attributes:
        step: steps done in all.
        loss: of the last step that was read; None if this call had nothing to do.
        skipped: steps of this call that were not finite and therefore not applied.
        ended: "finished", or why the run stopped early.
        evaluation: the last evaluation's metrics, if there was one.
    """

    step: int
    loss: float | None
    skipped: int
    ended: str
    evaluation: dict[str, float] | None


class Trainer:
    """Trains one model. Several trainers may share a Deployer, each under its own name.

    Nothing is traced or compiled before examples are seen: by `prepare`, `fit` or `evaluate`.

    Args:
        deployer: devices, folders, keys.
        collate_fn: list of examples -> batch, a tree of numpy arrays with one row per example.
        loss_fn: takes what it names of `(params, batch, rng, state, training)`; returns a scalar mean, `(sum, weight)`,
            `(loss, metrics)` or a `LossOutput`.
        init_fn: `init_fn(rng) -> params`, or `(params, state)` if `loss_fn` names `state`; run sharded. None: `params`
            are all there is to start from.
        optimizer: any optax transformation; its schedules count optimizer steps.
        plan: "auto" (the fastest that fits, by exact search), the name of a preset, a `Plan`, or a plan file.
        mesh: devices per axis, such as "data=2,tensor=4"; default what the plan or the preset suggests.
        cluster: what "auto" plans for, in place of what the devices are known or assumed to attain: a `Cluster`, a
            string such as "8xH100", or a file, best one that `redco_like.profile` has measured here.
        compute_dtype: of forward and backward pass, where the plan does not say.
        name: of this trainer; its files are in that folder of the workdir, its keys belong to it.
        params: start from these instead of `init_fn`'s; copied, but for what is `Frozen`, which is used where it is.
        model_state: goes with `params` if the model has mutable state.
        on_nonfinite: what a loss or gradient that is not finite leads to. The step is never applied; then "raise" is an
            error, "skip" goes on (up to `most_skips` in a row), "stop" saves a checkpoint and ends `fit`.
        most_skips: see above.
        learning_rate: the schedule, `step -> rate`, to log what is applied; not needed with `optax.inject_hyperparams`.
        best_metric: metric of the evaluation whose best checkpoint is kept, such as "loss".
        best_mode: whether less or more of it is better.
        keep_checkpoints: number of latest checkpoints kept.
        writers: where metrics go besides the JSONL file: "tensorboard", "wandb", "trackio", or your own.

    Raises:
        ValueError: functions that cannot be called, or settings that do not exist.
    """

    def __init__(
        self,
        deployer: Deployer,
        collate_fn: Callable[[list[Any]], Any],
        loss_fn: Callable[..., Any],
        init_fn: Callable[[jax.Array], Any] | None,
        optimizer: optax.GradientTransformation,
        *,
        plan: Plan | str | pathlib.Path = "auto",
        mesh: MeshShape | str | None = None,
        cluster: Cluster | str | pathlib.Path | None = None,
        compute_dtype: str = "float32",
        name: str = "train",
        params: Any = None,
        model_state: Any = None,
        on_nonfinite: OnNonfinite = "raise",
        most_skips: int = 20,
        learning_rate: Callable[[Any], Any] | None = None,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        keep_checkpoints: int = 2,
        writers: Sequence[str | Writer] = (),
    ):
        argument_names(loss_fn, LOSS_ARGUMENTS, role="loss_fn")
        for role, function in (("collate_fn", collate_fn), ("init_fn", init_fn), ("learning_rate", learning_rate)):
            if function is not None and not callable(function):
                raise ValueError(f"{role} is a {type(function).__name__}, not a function")
        if init_fn is None and params is None:
            raise ValueError("neither init_fn nor params: there is nothing to train; give one of them")
        if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}; it must be an optax transformation")
        self._deployer, self._collate_fn = deployer, collate_fn
        # Where `init_fn` is None, what every reset starts from.
        self._given = (params, model_state) if init_fn is None else None
        self._init_fn = init_like(params, model_state) if init_fn is None else init_fn
        self._loss_fn, self._optimizer = loss_fn, optimizer
        self._plan_wanted, self._compute_dtype = plan, compute_dtype
        self._mesh_wanted = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
        self._cluster = parse_cluster(cluster) if isinstance(cluster, str | pathlib.Path) else cluster
        self._initial = params, model_state
        self._on_nonfinite: OnNonfinite = check_policy(on_nonfinite)
        self._most_skips = most_skips
        self._learning_rate = learning_rate
        self._best: dict[str, Any] = {"best_metric": best_metric, "best_mode": best_mode}
        self._keep, self._writers = keep_checkpoints, tuple(writers)
        self.name = name
        self.step = 0
        self._rng = deployer.rng(name)
        self._program: TrainProgram | None = None
        self._programs: dict[Any, TrainProgram] = {}
        self._state: TrainState | None = None
        self._store: CheckpointStore | None = None
        self._may_resume = True

    # What there is.

    @property
    def program(self) -> TrainProgram:
        """The compiled step and what belongs to it.

        Raises:
            ValueError: no examples were seen yet.
        """
        if self._program is None:
            raise ValueError(
                f"trainer {self.name!r} has seen no examples yet, and a model is laid out for a batch: call "
                "trainer.prepare(examples, global_batch=...) or fit first"
            )
        return self._program

    @property
    def state(self) -> TrainState:
        """Parameters, optimizer state, model state. The next step of `fit` consumes it: copy what must outlive that."""
        _ = self.program
        if self._state is None:
            raise ValueError(f"trainer {self.name!r} has no state")
        return self._state

    @property
    def params(self) -> Any:
        """The parameters, on the devices. The next step of `fit` consumes them; see `state`."""
        return self.state.params

    @property
    def plan(self) -> Plan:
        return self.program.plan

    @property
    def layout(self) -> Layout:
        return self.program.layout

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    @property
    def folder(self) -> pathlib.Path | None:
        """Where this trainer's files are; None if the Deployer has no workdir."""
        return None if self._deployer.workdir is None else self._deployer.subfolder(self.name)

    # What it does.

    def prepare(self, examples: Sequence[Any], *, global_batch: int) -> None:
        """Choose the plan, compile the step and make the initial state. `fit` does it, where it was not done.

        Raises:
            ValueError: functions or batches of a wrong form.
            PlanError: a plan that cannot be carried out.
        """
        self._prepare(self._abstract_batch(examples, global_batch))

    def fit(
        self,
        examples: Sequence[Any],
        *,
        global_batch: int,
        epochs: int | None = None,
        steps: int | None = None,
        eval_examples: Sequence[Any] | None = None,
        eval_every: Every = "epoch",
        checkpoint_every: Every = "epoch",
        log_every: int = 10,
        resume: bool = True,
        tokens_per_example: int | None = None,
    ) -> FitResult:
        """Train for some epochs or steps.

        The first call of a process goes on from the latest checkpoint in the workdir, if there is one, to the end that
        the interrupted call had; the losses are those of a run that was never interrupted. Later calls train on from
        where the trainer is. SIGTERM, or a file called STOP in `folder`, saves a checkpoint and ends the call.

        Args:
            examples: a sequence; shuffled anew in each epoch.
            global_batch: examples per step, over all devices.
            epochs: how long to train, default 1; or
            steps: how long to train.
            eval_examples: evaluated every `eval_every`; one batch of them is tried before training starts.
            eval_every, checkpoint_every: a number of steps, "epoch" or None. The end of the call counts as well.
            log_every: steps between lines of metrics.
            resume: False leaves a checkpoint that is there alone and starts anew.
            tokens_per_example: what tokens/s counts; default the size of an example's largest row of integers.

        Raises:
            ValueError: before training starts, for arguments, functions and data of a wrong form.
            CheckpointError: a checkpoint that is damaged or of another model.
            NonFiniteError: see `on_nonfinite`.
        """
        if epochs is not None and steps is not None:
            raise ValueError(f"epochs={epochs} and steps={steps}: say one of them")
        if log_every < 1:
            raise ValueError(f"log_every={log_every}; at least 1")
        for what, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
            if not (every is None or every == "epoch" or (isinstance(every, int) and every > 0)):
                raise ValueError(f"{what}={every!r}; a number of steps from 1 up, 'epoch' or None")
        best = self._best["best_metric"]
        if best is not None and eval_examples is None:
            raise ValueError(f"best_metric={best!r} is a metric of the evaluation: give eval_examples")
        store = self._open_store() if resume or checkpoint_every is not None else None
        found = store.latest_step() if store is not None and resume and self._may_resume else None
        data_state = store.metadata(found)["data_state"] if store is not None and found is not None else {}
        start = data_state.get("started_at", self.step)
        loader = self._loader(examples, global_batch, start)
        differences = loader.differences(data_state.get("loader", {}))
        if differences:
            raise ValueError(
                f"checkpoint {found} in {self.folder} was written while reading other data: {'; '.join(differences)}. "
                "Give the same, or resume=False to start anew, or trainer.restore() before fit to train on from it"
            )
        self._prepare(loader.abstract_batch())
        if self._deployer.process_count > 1:
            loader = self._loader(examples, global_batch, start, self._row_slice())
        if store is not None and found is not None:
            self.restore(found)
            self._deployer.logger.info("%s: going on from the checkpoint of step %d", self.name, found)
        self._may_resume = False
        if eval_examples is not None:
            self._try_evaluation(eval_examples)
        total = steps if steps is not None else (1 if epochs is None else epochs) * loader.steps_per_epoch
        self._deployer.logger.info("%s: %s", self.name, loader.describe())
        if self.step >= start + total:
            self._deployer.logger.info("%s: all %d steps were done already", self.name, self.step - start)
            return FitResult(self.step, None, 0, "finished", None)
        tokens = _tokens_per_step(self.program.abstract_batch, tokens_per_example)
        epoch = loader.steps_per_epoch
        run = _Run(
            loader=loader,
            start=start,
            total=total,
            eval_steps=0 if eval_examples is None else _steps(eval_every, epoch),
            save_steps=_steps(checkpoint_every, epoch),
            eval_examples=eval_examples,
            store=store if checkpoint_every is not None else None,
            log_every=log_every,
        )
        log = RunLog(
            self.folder,
            name=self.name,
            writers=self._writers,
            config={"plan": dataclasses.asdict(self.plan)},
            active=self._deployer.is_first,
            unit="tokens" if tokens else "examples",
            units_per_step=tokens or loader.global_batch,
            steps_per_epoch=loader.steps_per_epoch,
            start=start,
            step=self.step,
            last_step=start + total,
        )
        with log, StopRequest(self.folder) as request:
            return self._train(run, log, request)

    def evaluate(self, examples: Sequence[Any], *, global_batch: int | None = None) -> dict[str, float]:
        """Means of the loss and of the metrics over all examples, each counted exactly once, with `training=False`.

        Args:
            examples: a sequence, of any length.
            global_batch: examples at a time; default what `fit` computes on at a time. The last ones may be fewer.

        Raises:
            ValueError: no examples, or batches of a wrong form.
        """
        if self._program is None:
            if global_batch is None:
                raise ValueError(
                    "before anything was trained, say global_batch: how many examples to evaluate at a time"
                )
            self._prepare(self._abstract_batch(examples, global_batch))
        rows = global_batch or batch_rows(self.program.abstract_batch) // self.plan.microbatches
        check_rows(rows, microbatches=1, mesh=self.plan.mesh)
        sums: dict[str, np.ndarray] = {}
        for totals in self._evaluated(examples, rows):
            for name, (total, weight) in totals.items():
                sums[name] = sums.get(name, 0.0) + np.asarray([float(total), float(weight)])
        return {name: float(total / weight) if weight else float("nan") for name, (total, weight) in sums.items()}

    def reset(self, params: Any = None, *, model_state: Any = None, rng: jax.Array | None = None) -> None:
        """Start anew from given parameters, or from `init_fn`, with a fresh optimizer state. Compiles nothing.

        Args:
            params: copied; None takes `init_fn`'s, or those that the trainer was given in place of it.
            model_state: goes with `params`; default the present one.
            rng: key for `init_fn` and for the steps; default the trainer's own, so that a reset repeats the run.
        """
        self._rng = self._rng if rng is None else rng
        if params is None and self._given is not None:
            params, model_state = self._given[0], self._given[1] if model_state is None else model_state
        self._initial = params, model_state
        self.step = 0
        if self._program is None:
            return
        if params is not None and model_state is None and self._state is not None:
            self._initial = params, self._state.model_state
        self._state = self._initial_state()
        self._may_resume = False

    def save(self, *, metrics: Mapping[str, float] | None = None) -> None:
        """Save a checkpoint of the present state; returns when it is on disk.

        Raises:
            ValueError: the Deployer has no workdir.
        """
        self._save(self._require_store(), {"started_at": self.step}, metrics or {})
        self.wait()

    def restore(self, step: int | Literal["best"] | None = None) -> None:
        """Read a checkpoint into this trainer, whatever mesh and plan it was saved under.

        Args:
            step: default the latest; "best" by `best_metric`.

        Raises:
            ValueError: nothing was prepared yet.
            CheckpointError: no such checkpoint, a damaged one, or one of another model.
        """
        store = self._require_store()
        self.step = store.metadata(step)["step"]
        moving, _ = split_frozen(self.program.abstract_state)
        self._state = join(store.restore(moving, self.step), split_frozen(self.state)[1])
        self._may_resume = False

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self._store is not None:
            self._store.wait()

    # How it is done.

    def _abstract_batch(self, examples: Sequence[Any], global_batch: int) -> Any:
        """Shapes of a global batch, from collating as many examples as there are, up to one batch of them."""
        if len(examples) == 0:
            raise ValueError("examples is empty: there is nothing to read")
        batch = collate(examples, np.arange(min(global_batch, len(examples))), self._collate_fn)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((global_batch, *x.shape[1:]), x.dtype), batch)

    def _loader(
        self, examples: Sequence[Any], global_batch: int, start: int, rows: tuple[int, int] = (0, 1)
    ) -> DataLoader:
        seed = zlib.crc32(f"{self._deployer.seed}/{self.name}/{start}".encode())
        return DataLoader(
            examples, self._collate_fn, global_batch, seed=seed, process_index=rows[0], process_count=rows[1]
        )

    def _row_slice(self) -> tuple[int, int]:
        return process_rows(jax.tree.leaves(self.program.batch_shardings)[0])

    def _prepare(self, abstract_batch: Any) -> None:
        """Make the program for this form of batch the present one, and see that there is a state."""
        leaves, structure = jax.tree.flatten(abstract_batch)
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._build(abstract_batch)
            with announced(f"{self.name}: compiling the step", self._deployer.logger):
                program.compile()
            self._say_bytes(program)
        self._program = program
        if self._state is None:
            self._state = self._initial_state()
        else:
            self._state = jax.device_put(self._state, program.state_shardings)

    def _build(self, abstract_batch: Any) -> TrainProgram:
        functions = self._loss_fn, self._init_fn, self._optimizer, abstract_batch
        devices = self._deployer.devices
        plan = resolve_plan(
            self._plan_wanted,
            n_devices=len(devices),
            # A trainer stays on its mesh when the form of its batches changes.
            mesh=self._mesh_wanted if self._program is None else self._program.plan.mesh,
            problem=lambda: train_problem(*functions, self._compute_dtype),
            cluster=lambda: self._cluster or cluster_here(devices),
            compute_dtype=self._compute_dtype,
        )
        mesh = make_mesh(plan.mesh, devices, order=plan.order) if self._program is None else self._program.mesh
        program = build_train_program(*functions, plan, mesh, learning_rate=self._learning_rate)
        logger = self._deployer.logger
        logger.info(
            "%s: plan: preset %s on mesh %s, %d microbatches, remat %s, %s parameters, %s computation%s",
            self.name, plan.preset, plan.mesh, plan.microbatches, plan.remat, plan.param_dtype, plan.compute_dtype,
            f" ({plan.reason})" if plan.reason else "",
        )  # fmt: skip
        logger.info("%s", program.layout.explain(program.abstract_state.opt_state))
        if self.folder is not None and self._deployer.is_first:
            plan.save(self.folder / "plan.json")
        return program

    def _say_bytes(self, program: TrainProgram) -> None:
        needed = program.compiled_bytes_per_device
        if needed is not None:
            self._deployer.logger.info("%s: the step needs %s per device (compiled)", self.name, format_bytes(needed))

    def _initial_state(self) -> TrainState:
        params, model_state = self._initial
        if params is None:
            return self.program.init(self._rng)
        return self.program.state_from(params, model_state=model_state, rng=self._rng)

    def _open_store(self) -> CheckpointStore | None:
        if self._store is None and self.folder is not None:
            self._store = CheckpointStore(self.folder / "checkpoints", keep=self._keep, **self._best)
        return self._store

    def _require_store(self) -> CheckpointStore:
        store = self._open_store()
        if store is None:
            raise ValueError("checkpoints need a folder: give the Deployer a workdir")
        return store

    def _save(self, store: CheckpointStore, data_state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        # What is frozen is the same in every checkpoint: it comes from `init_fn` or `params`, as at the start.
        moving, _ = split_frozen(self.state)
        store.save(self.step, moving, metrics=metrics, plan_json=self.plan.to_json(), data_state=data_state)

    def _train(self, run: _Run, log: RunLog, request: StopRequest) -> FitResult:
        program, shardings = self.program, self.program.batch_shardings
        watch = StepWatch(
            log.record,
            log_every=run.log_every,
            last_step=run.start + run.total,
            policy=self._on_nonfinite,
            most_skips=self._most_skips,
            explain=self._explain_nonfinite,
            logger=self._deployer.logger,
        )
        evaluation: dict[str, float] | None = None
        ended = ""
        # One device takes arrays of the host as they are: that costs less than placing them (0.07 ms a batch).
        place = None if program.mesh.size == 1 else lambda batch: sharded(batch, shardings)
        batches: Any = run.loader.iterate(self.step - run.start, run.total, place=place)
        with contextlib.closing(batches):
            for batch in batches:
                self._state, metrics = program.step(self.state, batch)
                self.step += 1
                done = self.step - run.start
                watch.push(self.step, metrics, batch)
                log.tick(self.step)
                if done == run.total:
                    watch.drain()
                ended = "a loss or gradient was not finite" if watch.stop else self._wish(request, done, run)
                last = done == run.total or bool(ended)
                evaluating = bool(run.eval_steps) and (done % run.eval_steps == 0 or last) and not ended
                store = run.store if not ended else self._open_store()  # a run cut short is saved, asked for or not
                saving = store is not None and (last or (run.save_steps and done % run.save_steps == 0))
                if evaluating or saving:
                    watch.drain()
                if evaluating and run.eval_examples is not None:
                    evaluation = self.evaluate(run.eval_examples)
                    log.evaluation(self.step, evaluation)
                    saving = saving or (store is not None and self._best["best_metric"] is not None)
                if saving and store is not None:
                    where = {"started_at": run.start, "loader": run.loader.state(done)}
                    self._save(store, where, evaluation if evaluating and evaluation else {})
                if evaluating or saving:
                    log.pause(self.step)
                if ended:
                    break
        watch.drain()
        self.wait()
        if ended:
            saved = (
                "no checkpoint was saved, as there is no workdir" if self.folder is None else "a checkpoint was saved"
            )
            self._deployer.logger.warning("%s: stopped at step %d: %s; %s", self.name, self.step, ended, saved)
        return FitResult(self.step, watch.loss, watch.skipped, ended or "finished", evaluation)

    def _wish(self, request: StopRequest, done: int, run: _Run) -> str:
        """Why to stop now, agreed on by all processes."""
        reason = request.reason()
        if self._deployer.process_count == 1:
            return reason
        if done % run.log_every:
            return ""
        flags = np.asarray(multihost_utils.process_allgather(np.asarray([bool(reason)], np.int32)))
        return reason or ("another process was asked to stop" if flags.any() else "")

    def _explain_nonfinite(self, batch: Any) -> str:
        with announced(f"{self.name}: looking for what is not finite", self._deployer.logger):
            found = self.program.nonfinite_paths(self.state, batch)
        parts = [
            f"{what} {', '.join(paths[:4])}{f' and {len(paths) - 4} more' if len(paths) > 4 else ''}"
            for what, paths in found.items()
            if paths
        ]
        return (
            f"not finite: {'; '.join(parts)}"
            if parts
            else (
                "gradients, parameters and batch are finite when computed again; the weights of the batch may sum to 0"
            )
        )

    def _evaluated(self, examples: Sequence[Any], rows: int) -> Iterator[dict[str, tuple[Any, Any]]]:
        """Sums and weights of every batch; two batches are in flight before one is handed out."""
        program, state = self.program, self.state
        slices = self._row_slice() if self._deployer.process_count > 1 else (0, 1)

        def place(piece: Piece) -> Any:
            forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct((piece.count, *x.shape[1:]), x.dtype), piece.batch)
            shardings = program.eval_shardings(forms)
            return (from_whole if piece.whole else sharded)(piece.batch, shardings)

        in_flight: list[dict[str, tuple[Any, Any]]] = []
        for index, batch in enumerate(sequential(examples, self._collate_fn, rows, *slices, place=place)):
            key = jax.random.fold_in(self._rng, index)
            in_flight.append(program.eval_step(state.params, state.model_state, batch, key))
            if len(in_flight) > 2:
                yield in_flight.pop(0)
        yield from in_flight

    def _try_evaluation(self, examples: Sequence[Any]) -> None:
        """Evaluate one batch, so that what is wrong with it shows before the training and not after it."""
        rows = batch_rows(self.program.abstract_batch) // self.plan.microbatches
        with announced(f"{self.name}: compiling the evaluation", self._deployer.logger):
            names = set(next(self._evaluated([examples[i] for i in range(min(rows, len(examples)))], rows)))
        best = self._best["best_metric"]
        if best is not None and best not in names:
            raise ValueError(
                f"best_metric={best!r} is not among the metrics of the evaluation: {', '.join(sorted(names))}"
            )


@dataclasses.dataclass(frozen=True)
class _Run:
    """One call of `fit`: steps `start` to `start + total`; 0 for `eval_steps` and `save_steps` means never."""

    loader: DataLoader
    start: int
    total: int
    eval_steps: int
    save_steps: int
    eval_examples: Sequence[Any] | None
    store: CheckpointStore | None
    log_every: int


def _steps(every: Every, steps_per_epoch: int) -> int:
    return 0 if every is None else steps_per_epoch if every == "epoch" else every


def _tokens_per_step(abstract_batch: Any, tokens_per_example: int | None) -> int:
    """Tokens of a batch: as told, or the size of its largest (rows, length) leaf of integers; 0 if it has none."""
    if tokens_per_example is not None:
        return tokens_per_example * batch_rows(abstract_batch)
    leaves = [x for x in jax.tree.leaves(abstract_batch) if np.issubdtype(x.dtype, np.integer) and len(x.shape) == 2]
    return max((x.shape[0] * x.shape[1] for x in leaves), default=0)
