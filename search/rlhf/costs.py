"""What calls and moves cost, by the planner's own cost model: the `Costs` of a search over execution plans.

    costs = CallCosts({"actor": problem, ...}, cluster, workload)
    costs.options(graph.call("generate"), 8)                   # the few ways to generate on 8 devices worth looking at
    costs.move("actor", (Window(0, 8), trained), (Window(0, 4), generates))

A role's functions are traced once per number of rows, whatever the window: a window is the same model on other links.
Training is `search.rlhf.training`, scoring a forward pass over whole sequences (`search.rlhf.forward`), generation
`search.rlhf.generation`. All of it is analytic and deterministic.

Of all ways to run a call on a window, those remain that no other beats in time and memory (to a grain of it). Where a
role has several calls, how its parameters lie counts too, since it decides what moves: a layout stays unless another
one fits in no more memory and is faster by more than it could take to bring all parameters from the one to the other
and back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from search.cluster import Cluster
from search.cost import HOST_BYTES_PER_SECOND
from search.efficiency import Efficiency
from search.plan import Plan
from search.reallocation import Leaf, ShardedTree, transfer
from search.rlhf.forward import Dispatch, passes
from search.rlhf.generation import Generated, generation, parts_of
from search.rlhf.graph import Call, Workload
from search.rlhf.options import Option, Window
from search.rlhf.training import training
from search.space import divisors, memory_share
from search.subcluster import part_of
from search.traced_model import REMATS, TracedModel
from sharding_rules import STAGE, TracedFunction
from sharding_rules.axes import leaves

Step = Literal["train", "score", "prefill", "decode"]
MOST_PARTS = 128
"""Into which the rows of a forward pass are cut."""
GRAIN = 0.02
"""Share of a device's memory: less is not worth another option."""
FORBIDDEN = {
    "train": ("context",),
    "score": ("context",),
    "generate": ("context", "fsdp", "sequence"),
}
"""Mesh axes that are not looked at unless they are fixed: sequences of RLHF are short, and a step of decoding that
gathers its weights takes longer than one that reads them."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of a role on a number of rows.

    Attributes:
        function: with arguments `params`, `batch`, and for prefill and decode the cache as `state`.
        opt_state: shapes of the optimizer's state, for training.
        fused_attention: cost attention as one operation.
        growth: bytes of the cache at its full length over those of the one it is traced with, for decode.
    """

    function: TracedFunction
    opt_state: Any = None
    fused_attention: bool = False
    growth: float = 1.0


class RoleProblem(Protocol):
    """A role's model."""

    @property
    def name(self) -> str: ...

    def traced(self, step: Step, rows: int) -> Traced:
        """A step on so many rows: whole sequences for train and score, prompts for prefill, and for decode one token of
        every sequence at the mean length of the cache over the answer.

        Raises:
            ValueError: the model cannot do this; names it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Choices that are fixed and mesh axes that are forbidden, as `search.Space` has them."""

    fix: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    forbid: tuple[str, ...] = ()


class CallCosts:
    """Costs of the calls of a graph.

    Args:
        problems: role -> its model.
        cluster: all devices.
        workload: of an iteration.
        dtype: of the computation, and of the parameters as they are read and moved.
        param_dtype: of the parameters of roles that are trained, as they are stored.
        constraints: "train", "score" or "generate" -> what is fixed or forbidden there.
        allow_planned: also pipelines of stages, which cannot be run yet.
        share: of a device's usable memory that may be counted on; default `search.space.memory_share`.
        efficiency: constants of the cost model; default the cluster's.
        call_seconds: that every call takes besides.
        dispatch: of hosts that dispatch operation by operation; None where steps are compiled.
        still: roles of one call, whose parameters never move.
        tell: told what is being costed.
    """

    def __init__(
        self,
        problems: Mapping[str, RoleProblem],
        cluster: Cluster,
        workload: Workload,
        *,
        dtype: str = "bfloat16",
        param_dtype: str = "float32",
        constraints: Mapping[str, Constraint] | None = None,
        allow_planned: bool = False,
        share: float = 0.0,
        efficiency: Efficiency | None = None,
        call_seconds: float = 0.0,
        dispatch: Dispatch | None = None,
        still: Sequence[str] = (),
        tell: Callable[[str], None] | None = None,
    ):
        for kind in constraints or {}:
            if kind not in FORBIDDEN:
                raise ValueError(f"constraints for {kind!r}; for {', '.join(FORBIDDEN)}")
        self.problems, self.workload = dict(problems), workload
        self.cluster = dataclasses.replace(cluster, efficiency=efficiency) if efficiency else cluster
        self.dtype, self.param_dtype = dtype, param_dtype
        self.constraints = {kind: (constraints or {}).get(kind, Constraint()) for kind in FORBIDDEN}
        self.allow_planned, self.call_seconds = allow_planned, call_seconds
        self.still, self.dispatch = frozenset(still), dispatch
        self._share = share or memory_share(cluster.accelerator)
        self._tell = tell or (lambda _: None)
        self._models: dict[Any, tuple[TracedModel, Traced]] = {}
        self._known: dict[Any, tuple[Option, ...]] = {}
        self._trees: dict[Any, ShardedTree] = {}

    @property
    def usable_bytes(self) -> float:
        """Of a device."""
        return self._share * self.cluster.accelerator.usable_memory_bytes

    def options(self, call: Call, devices: int) -> Sequence[Option]:
        """Ways to run a call on a window of so many devices; none where it does not fit.

        Raises:
            ValueError: the role has no model, or no such window exists in the cluster.
        """
        if call.role not in self.problems:
            raise ValueError(
                f"role {call.role!r} of call {call.name!r} has no model; there are models for "
                f"{', '.join(self.problems) or 'none'}"
            )
        # Roles of the same model cost the same.
        still = call.role in self.still
        key = (id(self.problems[call.role]), call.kind, devices, still)
        if key not in self._known:
            cluster = part_of(self.cluster, devices)
            self._tell(f"{call.kind} of {self.problems[call.role].name} on {devices} devices")
            make = {"train": self._train, "score": self._score, "generate": self._generate}[call.kind]
            found = [option for option in make(call.role, cluster) if _bytes(option) <= self.usable_bytes]
            self._known[key] = _front(found, cluster, GRAIN * self.usable_bytes, still)
        return self._known[key]

    def move(self, role: str, source: tuple[Window, Option], target: tuple[Window, Option]) -> tuple[float, float]:
        """Seconds and bytes (over all devices) of bringing a role's parameters from one layout to another."""
        (here, one), (there, other) = source, target
        moved = transfer((here.first, one.tree), (there.first, other.tree), self.cluster)
        return moved.seconds, moved.sent_bytes

    def offload(self, role: str, option: Option, nbytes: float) -> float:
        """Seconds of moving `nbytes` per device between a device and its host, one way."""
        return nbytes / HOST_BYTES_PER_SECOND[self.cluster.accelerator.kind]

    def on(
        self,
        cluster: Cluster | None = None,
        *,
        efficiency: Efficiency | None = None,
        dispatch: Dispatch | None = None,
    ) -> CallCosts:
        """The same calls on other machines of the same kind, or with other constants; nothing is traced again."""
        other = copy.copy(self)
        other.cluster = cluster or self.cluster
        if efficiency is not None:
            other.cluster = dataclasses.replace(other.cluster, efficiency=efficiency)
        other.dispatch = dispatch or self.dispatch
        other._known = {}
        return other

    def _model(self, role: str, step: Step, rows: int) -> tuple[TracedModel, Traced]:
        key = (id(self.problems[role]), step, rows)
        if key not in self._models:
            traced = self.problems[role].traced(step, rows)
            trains = step == "train"
            model = TracedModel(
                traced.function,
                traced.opt_state,
                self.cluster,
                param_dtype=self.param_dtype if trains else self.dtype,
                fused_attention=self.cluster.accelerator.kind != "cpu" and traced.fused_attention,
                remats=REMATS if trains else ("none",),
                training=trains,
            )
            self._models[key] = model, traced
        return self._models[key]

    def _limits(self, kind: str) -> dict[str, Any]:
        limit = self.constraints[kind]
        forbid = dict.fromkeys((*FORBIDDEN[kind], *limit.forbid))
        return {"fix": dict(limit.fix), "forbid": tuple(name for name in forbid if name not in limit.fix)}

    def _stages(self, kind: str, model: TracedModel, devices: int) -> list[int]:
        limits = self._limits(kind)
        if not self.allow_planned or STAGE in limits["forbid"]:
            return [1]
        wanted = limits["fix"].get(STAGE)
        return [p for p in divisors(devices) if model.repeats % p == 0 and p == (wanted or p)]

    def _train(self, role: str, cluster: Cluster) -> list[Option]:
        work = self.workload
        steps = work.minibatches * work.epochs
        model, _ = self._model(role, "train", work.sequences // work.minibatches)
        if self.dispatch is not None:
            cluster = self.dispatch.cluster(cluster)
        found = training(
            model, cluster, budget_bytes=self.usable_bytes, allow_planned=self.allow_planned, **self._limits("train")
        )
        return [
            Option(
                plan=(plan := one.plan()),
                tree=self._tree(model, plan),
                seconds=steps * one.seconds + self.call_seconds,
                params_bytes=one.params_bytes,
                working_bytes=one.working_bytes,
                state_bytes=one.state_bytes,
                parts={name: steps * s for name, s in one.parts.items()},
            )
            for one in found
        ]

    def _score(self, role: str, cluster: Cluster) -> list[Option]:
        rows = _whole(self.workload.sequences, cluster.devices)
        model, _ = self._model(role, "score", rows)
        out = []
        stages = self._stages("score", model, cluster.devices)
        for one in passes(
            model, cluster, parts=_parts(rows), stages=stages, dispatch=self.dispatch, **self._limits("score")
        ):
            seconds_n = one.all_seconds()
            least = float("inf")
            for i in sorted(range(len(seconds_n)), key=lambda i: (seconds_n[i], one.workspace_n[i], i)):
                if one.workspace_n[i] >= least:
                    continue
                least = float(one.workspace_n[i])
                seconds = float(seconds_n[i])
                bubble = float(one.through_n[i] - one.slowest_n[i])
                out.append(
                    Option(
                        plan=(plan := one.plan(i)),
                        tree=self._tree(model, plan),
                        seconds=seconds + self.call_seconds,
                        params_bytes=one.params_bytes,
                        working_bytes=least,
                        parts={"forward": seconds - bubble} | ({"bubble": bubble} if one.stages > 1 else {}),
                    )
                )
        return out

    def _generate(self, role: str, cluster: Cluster) -> list[Option]:
        work = self.workload
        rows, prompts = _whole(work.sequences, cluster.devices), _whole(work.prompts, cluster.devices)
        decode, traced = self._model(role, "decode", rows)
        prefill, _ = self._model(role, "prefill", prompts)
        limits = self._limits("generate") | {"uneven": True, "dispatch": self.dispatch}
        stages = self._stages("generate", decode, cluster.devices)
        parts = parts_of(stages)
        reads = {one.key: one for one in passes(prefill, cluster, parts=parts, stages=stages, **limits)}
        out = []
        for one in passes(decode, cluster, parts=parts, stages=stages, **limits):
            if one.key in reads:
                found = generation(one, reads[one.key], work, growth=traced.growth, budget_bytes=self.usable_bytes)
                out += [self._generated(decode, way) for way in found]
        return out

    def _generated(self, model: TracedModel, way: Generated) -> Option:
        plan = dataclasses.replace(way.decode.plan(way.decode_row), microbatches=way.rotating)
        return Option(
            plan=plan,
            tree=self._tree(model, plan),
            prefill=way.prefill.plan(way.prefill_row),
            rows=-(-self.workload.sequences // way.waves),
            seconds=way.seconds + self.call_seconds,
            params_bytes=way.decode.params_bytes,
            working_bytes=way.working_bytes,
            parts={
                "prefill": way.prefill_seconds,
                "decode": way.seconds - way.prefill_seconds,
                "waves": float(way.waves),
                "token": way.token_seconds,
            },
        )

    def _tree(self, model: TracedModel, plan: Plan) -> ShardedTree:
        """How the parameters of a plan lie.

        What is not in the layers (embedding, head) is counted on every stage, though the first or the last has it: so
        much less is moved.
        """
        key = (id(model), plan.mesh, plan.preset, plan.order)
        if key not in self._trees:
            layout = model.layout.on(dataclasses.replace(plan.mesh, stage=1), plan.preset)
            dims_by_leaf = layout.table.inputs(layout.params)
            width = jnp.dtype(self.dtype).itemsize
            arrays = jax.tree.leaves(layout.traced.arg(layout.params))
            found = []
            for (path, (_, rest)), dims, leaf in zip(layout.param_shares.items(), dims_by_leaf, arrays, strict=True):
                roles = [{row.role for axis in leaves(dim) if (row := layout.rows.of(axis))} for dim in dims]
                staged = [plan.mesh.stage > 1 and "layers" in role for role in roles]
                spec = [(STAGE, *entry) if cut else entry for entry, cut in zip(rest.entries, staged, strict=True)]
                itemsize = width if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype.itemsize
                found.append(Leaf(tuple(leaf.shape), itemsize, tuple(spec), path))
            self._trees[key] = ShardedTree(tuple(found), plan.mesh, plan.order)
        return self._trees[key]


def _whole(rows: int, devices: int) -> int:
    """Rows, filled up so that the devices share them out evenly where there are more than devices."""
    return -(-rows // devices) * devices


def _parts(rows: int) -> list[int]:
    return [m for m in divisors(rows) if m <= MOST_PARTS]


def _bytes(option: Option) -> float:
    return option.params_bytes + option.working_bytes + option.state_bytes


def _layout(option: Option) -> Any:
    """How the parameters lie."""
    return option.plan.mesh, option.plan.order, option.plan.rules


def _moving_seconds(option: Option, cluster: Cluster) -> float:
    """All parameters of a device, as the slowest links of its window bring them."""
    slowest = [tier.bytes_per_second for tier in cluster.tiers]
    if cluster.torus is not None:
        slowest.append(cluster.torus.bytes_per_second)
    return option.params_bytes / min(slowest)


def _front(options: Sequence[Option], cluster: Cluster, grain_bytes: float, still: bool) -> tuple[Option, ...]:
    """Options that no other makes needless, the fastest first."""
    ordered = sorted(options, key=lambda o: (o.seconds, _bytes(o), str(o.plan.mesh), o.plan.microbatches))
    out: list[Option] = []
    for one in ordered:
        if not any(_beats(other, one, cluster, grain_bytes, still) for other in out):
            out.append(one)
    return tuple(out)


def _beats(one: Option, other: Option, cluster: Cluster, grain_bytes: float, still: bool) -> bool:
    """Whether an option that is no slower makes another one needless.

    What counts of its bytes is what it takes while the call runs, and what of that stays.
    """
    if _bytes(one) > _bytes(other) + grain_bytes or _stays(one) > _stays(other) + grain_bytes:
        return False
    if still or _layout(one) == _layout(other):
        return True
    there, back = _moving_seconds(one, cluster), _moving_seconds(other, cluster)
    return one.seconds + there + back <= other.seconds


def _stays(option: Option) -> float:
    return option.params_bytes + option.state_bytes


__all__ = ["CallCosts", "Constraint", "RoleProblem", "Step", "Traced"]
