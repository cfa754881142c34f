"""From an algorithm and an execution plan to the steps that run it.

    problem = Problem(algorithm, graph, workload, members, sampling, optimizers)
    problem.sequences, problem.experience            # shapes of what is scored and of what is trained on
    steps = build_steps(problem, execution, devices, seed=0)

The shapes come from the algorithm itself: it is given a rollout of zeros of the size that an iteration has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from pipelines.generation import SamplingParams
from pipelines.rlhf import ScoreStep, Step, TrainStep, window_mesh
from redco_like.models.model import Model
from redco_like.rlhf.algorithm import Algorithm, Examples, Pairs, Rollout
from redco_like.rlhf.generation import GenerateStep
from search.rlhf import Call, ExecutionPlan, Graph, Workload

SEQUENCES, EXPERIENCE = "sequences", "experience"
"""Names of the data that scoring and training read."""
PARTS = {"prompts": 1, "examples": 2, "pairs": 3}
"""What comes from outside -> sequences of tokens per item."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A role: its model, and the parameters that it starts from."""

    model: Model
    params: Any

    @property
    def forms(self) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What there is to run, without a device.

    Attributes:
        algorithm, graph: what is done.
        workload: how much of it.
        members: role -> model and parameters.
        sampling: how prompts are continued.
        optimizers: role -> optimizer, of those that are trained.
        eos: tokens that end a completion.
        rows: sequences that are generated at a time; None for all.

    Raises:
        ValueError: data from outside that the trainer does not know; calls that the algorithm has no function for.
    """

    algorithm: Algorithm
    graph: Graph
    workload: Workload
    members: Mapping[str, Member]
    sampling: SamplingParams
    optimizers: Mapping[str, optax.GradientTransformation]
    eos: tuple[int, ...] = ()
    rows: int | None = None

    def __post_init__(self):
        if len(self.graph.inputs) != 1 or self.graph.inputs[0] not in PARTS:
            raise ValueError(f"graph {self.graph.name!r} has inputs {self.graph.inputs}; one of {', '.join(PARTS)}")
        for kind, functions in (("score", self.algorithm.score_fns()), ("train", self.algorithm.loss_fns())):
            for call in self.graph.calls:
                if call.kind == kind and call.name not in functions:
                    raise ValueError(
                        f"{type(self.algorithm).__name__} has no function for the {kind} call {call.name!r}; it has "
                        f"{', '.join(functions) or 'none'}"
                    )

    @property
    def inputs(self) -> str:
        """Name of what comes from outside."""
        return self.graph.inputs[0]

    def score_fn(self, call: Call) -> Callable[..., Any]:
        return self.algorithm.score_fns()[call.name](self.members[call.role].model)

    def loss_fn(self, call: Call) -> Callable[..., Any]:
        return self.algorithm.loss_fns()[call.name](self.members[call.role].model)

    @functools.cached_property
    def sequences(self) -> Any:
        """Shapes of what score calls read."""
        return _forms(self._blank.batch())

    @functools.cached_property
    def experience(self) -> Any:
        """Shapes of what train calls read."""
        record = self._blank
        for call in self.graph.calls:
            if call.kind == "score":
                made = jax.eval_shape(self.score_fn(call), self.members[call.role].forms, self.sequences)
                record = record.scored(call.writes[0], np.zeros(made.shape, np.float32))
        return _forms(self.algorithm.experience(record, self.algorithm.start()).batch)

    @functools.cached_property
    def _blank(self) -> Any:
        w = self.workload
        prompt, rest = (0,) * w.prompt_tokens, (0,) * w.new_tokens
        match self.inputs:
            case "pairs":
                return Pairs.of([(prompt, rest, rest)] * w.prompts, width=w.length)
            case "examples":
                return Examples.of([(prompt, rest)] * w.prompts, width=w.length)
        rows = w.sequences
        nothing = [(0.0,) * w.new_tokens] * rows
        record = Rollout.of([prompt] * w.prompts, [rest] * rows, width=w.length, samples=w.samples, logprobs=nothing)
        return record.scored("rewards", np.zeros(rows, np.float32))

    def minibatch(self) -> Any:
        """Shapes of one optimizer step's rows."""
        each = self.workload.minibatches
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // each, *x.shape[1:]), x.dtype), self.experience
        )


def build_steps(problem: Problem, execution: ExecutionPlan, devices: Sequence[Any], *, seed: int) -> dict[str, Step]:
    """Make every call's step on the mesh of its window. Nothing is compiled yet.

    Raises:
        PlanError: a plan that cannot be carried out; a window of devices that are not there.
        ValueError: rows that do not split over a plan's mesh; names the call.
    """
    return {call.name: _build(problem, execution, call, devices, seed) for call in problem.graph.calls}


def _build(problem: Problem, execution: ExecutionPlan, call: Call, devices: Sequence[Any], seed: int) -> Step:
    plan, workload = execution.call(call.name), problem.workload
    member = problem.members[call.role]
    try:
        if call.kind == "generate":
            tokens, logprobs = call.writes
            return GenerateStep(
                member.model,
                member.forms,
                plan,
                devices,
                sampling=problem.sampling,
                prompts=workload.prompts,
                prompt_tokens=workload.prompt_tokens,
                writes=(tokens, logprobs),
                rows=problem.rows or plan.rows or None,
                eos=problem.eos,
                seed=seed,
            )
        mesh = window_mesh(plan, devices)
        if call.kind == "score":
            function, name = problem.score_fn(call), call.writes[0]
            return ScoreStep(function, member.forms, problem.sequences, plan.plan, mesh, reads=SEQUENCES, writes=name)
        return TrainStep(
            problem.loss_fn(call),
            member.forms,
            problem.optimizers[call.role],
            problem.experience,
            plan.plan,
            mesh,
            reads=EXPERIENCE,
            minibatches=workload.minibatches,
            epochs=workload.epochs,
            seed=seed,
        )
    except Exception as error:
        error.add_note(f"while building call {call.name!r} on devices {plan.window}")
        raise


def _forms(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)
