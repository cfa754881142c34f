"""The programs of an execution plan's calls, for models by name: what runs, as a compiler takes it. No weights.

    programs(execution, "generate")                            # ("decode", "prompts")
    program = build_program(execution, "generate", "decode", mesh)
    program.lower(), program.device_bytes

Losses and scores are the algorithm's own (`redco_like.rlhf`). In a graph of a user's own, whose functions are not known
here, the language model's loss and log-probabilities stand for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from pipelines.generation import GenerationPrograms, Plans, SamplingParams, Sizes
from pipelines.infer import build_predict_program
from pipelines.problem import cast_floats, init_like
from pipelines.train import build_train_program
from redco_like.engine_layout import (
    CHUNK_TOKENS,
    SMALLEST,
    STEPS_PER_DISPATCH,
    classes,
    functions_of,
    piece_shapes,
)
from redco_like.models import architecture, architectures, build_model, read_config
from redco_like.problem import make_optimizer
from redco_like.rlhf.algorithm import Experience
from redco_like.rlhf.building import Member, Problem
from redco_like.rlhf.dpo import DPO
from redco_like.rlhf.grpo import GRPO
from redco_like.rlhf.heads import init_head
from redco_like.rlhf.members import HEADS
from redco_like.rlhf.policy import score_logprobs
from redco_like.rlhf.ppo import PPO
from redco_like.rlhf.reward_model import RewardModel
from redco_like.rlhf.rloo import RLOO
from redco_like.rlhf.sft import SFT
from search import Plan
from search.rlhf import CallPlan, ExecutionPlan, Graph

ALGORITHMS: dict[str, Any] = {
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "dpo": DPO,
    "reward_modelling": RewardModel,
    "sft": SFT,
}


class Program(Protocol):
    """What a compiler takes."""

    @property
    def device_bytes(self) -> dict[str, int]: ...

    def lower(self) -> jax.stages.Lowered: ...


@dataclasses.dataclass(frozen=True)
class Lowering:
    """A program that is one of several of a whole."""

    device_bytes: dict[str, int]
    lower: Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Standing:
    """An algorithm that stands for a user's own, whose functions are not known."""

    calls: Graph
    samples: int = 1
    minibatches: int = 1
    epochs: int = 1

    def graph(self, *, reward_model: bool) -> Graph:
        return self.calls

    def score_fns(self) -> dict[str, Any]:
        return {call.name: score_logprobs for call in self.calls.calls if call.kind == "score"}

    def loss_fns(self) -> dict[str, Any]:
        return {call.name: lambda model: model.loss_fn for call in self.calls.calls if call.kind == "train"}

    def start(self) -> dict[str, float]:
        return {}

    def experience(self, rollout: Any, state: Any) -> Experience:
        return Experience(rollout.batch(), {}, dict(state))


def programs(execution: ExecutionPlan, call: str) -> tuple[str, ...]:
    """Names of the programs that a call runs."""
    kind = execution.graph.call(call).kind
    return ("decode", "prompts") if kind == "generate" else (kind,)


def plan_of(call: CallPlan, program: str) -> Plan:
    """The plan of one of a call's programs."""
    return call.prefill if program == "prompts" and call.prefill is not None else call.plan


def build_program(execution: ExecutionPlan, call: str, program: str, mesh: Mesh) -> Program:
    """Lay a program of a call out on the mesh of its window; nothing is compiled yet.

    Args:
        execution: a plan for models by name; its `problem` has the optimizer.
        program: of `programs`. "decode" makes `STEPS_PER_DISPATCH` tokens of every row at the full length, "prompts"
            reads the largest piece of prompts.

    Raises:
        ValueError, PlanError: what cannot be built.
    """
    plan, node, problem = execution.call(call), execution.graph.call(call), problem_of(execution)
    member = problem.members[node.role]
    if program in ("decode", "prompts"):
        return _generation(plan, program, member, execution, mesh)
    if program == "train":
        function, init_fn = problem.loss_fn(node), init_like(member.forms)
        known = execution.graph.name in ALGORITHMS
        batch = problem.minibatch() if known else _part(problem.sequences, execution.workload.minibatches)
        return build_train_program(function, init_fn, problem.optimizers[node.role], batch, plan.plan, mesh)
    batch = _part(problem.sequences, plan.plan.microbatches)
    # What is scored lies in the dtype of the computation: a role that is trained lends a copy in it.
    params = cast_floats(member.forms, plan.plan.compute_dtype)
    one = dataclasses.replace(plan.plan, microbatches=1)
    return build_predict_program(problem.score_fn(node), params, batch, one, mesh)


def _part(batch: Any, parts: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), batch)


def problem_of(execution: ExecutionPlan) -> Problem:
    """The algorithm with its models as shapes."""
    graph, work = execution.graph, execution.workload
    make = ALGORITHMS.get(graph.name)
    if make is None:
        algorithm = Standing(graph, work.samples, work.minibatches, work.epochs)
    else:
        samples = 1 if graph.inputs == ("pairs",) else work.samples
        algorithm = make(samples=samples, minibatches=work.minibatches, epochs=work.epochs)
    dtype = execution.call(graph.order[0]).plan.compute_dtype
    optimizer = make_optimizer(execution.problem.get("optimizer", "adamw"), stacked=True)
    return Problem(
        algorithm,
        graph,
        work,
        {role: _member(execution.models[role], role in HEADS and make is not None, dtype) for role in graph.roles},
        SamplingParams(max_tokens=work.new_tokens, n=work.samples),
        {role: optimizer for role in graph.roles if graph.trains(role) is not None},
    )


@functools.cache
def _member(name: str, head: bool, dtype: str) -> Member:
    """A model and the shapes of its parameters."""
    config = architecture(name) if name in architectures() else read_config(name)
    model = build_model(config, dtype=dtype)
    key = jax.eval_shape(jax.random.key, 0)
    make = (lambda key: init_head(model, key)) if head else model.init_fn
    return Member(model, jax.eval_shape(make, key))


def _generation(call: CallPlan, program: str, member: Member, execution: ExecutionPlan, mesh: Mesh) -> Lowering:
    """One of the engine's programs, with the rows and the length that it has in the run."""
    work, shards = execution.workload, call.plan.mesh.batch_shards
    length = work.length
    rows = -(-(call.rows or work.sequences) // shards) * shards
    plans = Plans(*(dataclasses.replace(plan_of(call, name), microbatches=1) for name in ("prompts", "decode")))
    sizes = Sizes(
        rows,
        length,
        classes(length, 2, SMALLEST),
        classes(length, 4, 2 * SMALLEST),
        piece_shapes(min(CHUNK_TOKENS, length), rows // shards),
        STEPS_PER_DISPATCH,
    )
    made = GenerationPrograms(
        functions_of(member.model, length),
        cast_floats(member.forms, member.model.dtype),
        plans=plans,
        mesh=mesh,
        sizes=sizes,
    )
    start = "up to" if program == "decode" else "reading"
    name = next(n for n in made.names if n.startswith(start) and n.endswith(f"within {length} positions"))
    held = made.params_bytes // (2 if made.params_twice else 1)
    return Lowering(
        {"arguments": held + made.cache_bytes, "aliased": made.cache_bytes, "results": 0}, lambda: made.lower(name)
    )
