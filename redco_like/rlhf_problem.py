"""Models by name as roles of an RLHF graph: their functions traced for the search over execution plans.

    costs = call_costs({"actor": "llama-2-7b", ...}, ppo(), workload, parse_cluster("2x8xA100-80"))
    found = search.rlhf.solve(graph, workload, cluster, costs)

No weights and no device are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pipelines.problem import abstract_init, cast_floats, split_trainable, trace_loss
from redco_like.models import ModelConfig, architecture, architectures, build_model, read_config
from redco_like.problem import make_optimizer
from search import Cluster
from search.attention import runs_as_kernel
from search.rlhf.costs import CallCosts, Constraint, Step, Traced
from search.rlhf.graph import Graph, Workload
from sharding_rules import trace


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRole:
    """A decoder as a role: `search.rlhf.costs.RoleProblem`.

    A model that scores has its whole vocabulary's head, also where a head for one number would do: of a model of 7 B
    parameters that is 2 % more.

    Attributes:
        name: of the model.
        config: its sizes.
        workload: lengths of prompts and answers.
        dtype, param_dtype: as `CallCosts` has them.
        optimizer: by name.
    """

    name: str
    config: ModelConfig
    workload: Workload
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    optimizer: str = "adamw"

    @functools.cached_property
    def model(self) -> Any:
        return build_model(self.config, dtype=self.dtype)

    @functools.cached_property
    def values(self) -> Any:
        return abstract_init(self.model.loss_fn, self.model.init_fn, self.param_dtype)

    @functools.cached_property
    def parameters(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.values.params))

    def traced(self, step: Step, rows: int) -> Traced:
        work = self.workload
        if step in ("train", "score"):
            batch = self.model.abstract_batch(rows, work.length)
            function = trace_loss(
                self.model.loss_fn, self.values, batch, training=step == "train", compute_dtype=self.dtype
            )
            optimizer = make_optimizer(self.optimizer, stacked=True)
            opt_state = jax.eval_shape(optimizer.init, split_trainable(self.values.params)[0])
            return Traced(function, opt_state if step == "train" else None, runs_as_kernel(function))
        if step == "prefill":
            return self._cached(rows, work.prompt_tokens, token=False)
        # The mean over the answer of how much of the cache is filled.
        mean = min(work.prompt_tokens + max(work.new_tokens // 2, 1), work.length)
        found = self._cached(rows, mean, token=True)
        return dataclasses.replace(found, growth=self._cache_bytes(work.length) / self._cache_bytes(mean))

    def _cache_bytes(self, length: int) -> int:
        cache = jax.eval_shape(lambda: self.model.init_cache(1, length))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))

    def _cached(self, rows: int, length: int, *, token: bool) -> Traced:
        """The prompt's pass, or one more token of every row.

        A token is costed as the engine makes it: the cache is only read, and what it gets for the token is written in
        place.
        """
        model = self.model
        cache = jax.eval_shape(lambda: model.init_cache(rows, length))
        batch = {"tokens": jax.ShapeDtypeStruct((rows, 1 if token else length), jnp.int32)}
        if token:
            batch["position"] = jax.ShapeDtypeStruct((rows,), jnp.int32)

        def step(params: Any, batch: Any, state: Any) -> Any:
            if token:
                return model.read(params, batch["tokens"], state, batch["position"])
            return model.prefill(params, batch["tokens"], state)

        params = cast_floats(self.values.params, self.dtype)
        function = trace(step, params, batch, cache, names=("params", "batch", "state"))
        # One token's scores are small, whoever computes them.
        return Traced(function, None, token or runs_as_kernel(function))


def call_costs(
    models: Mapping[str, str | ModelConfig],
    graph: Graph,
    workload: Workload,
    cluster: Cluster,
    *,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    optimizer: str = "adamw",
    constraints: Mapping[str, Constraint] | None = None,
    allow_planned: bool = False,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> CallCosts:
    """Costs of a graph's calls, for models by name.

    Args:
        models: role -> an architecture's name, the path of a `config.json` (or its folder), or a `ModelConfig`.
        dtype: of the computation.
        param_dtype: of the stored parameters of roles that are trained.
        optimizer: of `redco_like.problem.OPTIMIZERS`.
        constraints, allow_planned, tell, options: as `search.rlhf.costs.CallCosts` takes them.

    Raises:
        ValueError: a role without a model, a model for no role, an unknown model or one that is no decoder, sequences
            longer than a table of positions.
    """
    for role in graph.roles:
        if role not in models:
            raise ValueError(f"role {role!r} of {graph.name!r} has no model; there are models for {', '.join(models)}")
    for role in models:
        if role not in graph.roles:
            raise ValueError(f"a model for {role!r}, which is no role of {graph.name!r}: {', '.join(graph.roles)}")
    made: dict[Any, ModelRole] = {}
    problems = {}
    for role, model in models.items():
        config, name = _config(model)
        if config.kind != "decoder":
            raise ValueError(f"role {role!r}: {name} is no decoder ({config.kind}); a decoder is, such as gpt2")
        if config not in made:
            made[config] = ModelRole(name, config, workload, dtype, param_dtype, optimizer)
            made[config].model.check_length(workload.length)
        problems[role] = made[config]
    return CallCosts(
        problems,
        cluster,
        workload,
        dtype=dtype,
        param_dtype=param_dtype,
        constraints=constraints,
        allow_planned=allow_planned,
        still=[role for role in graph.roles if len(graph.of_role(role)) == 1],
        tell=tell,
        **options,
    )


def _config(model: str | ModelConfig) -> tuple[ModelConfig, str]:
    if isinstance(model, ModelConfig):
        return model, model.family
    name = os.fspath(model)
    path = Path(name).expanduser()
    if name not in architectures() and (path.suffix == ".json" or path.is_dir()):
        path = path / "config.json" if path.is_dir() else path
        return read_config(path), path.parent.name or path.stem
    return architecture(name), name
