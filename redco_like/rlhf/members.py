"""Who takes part: every role's model, what it starts from, and what it is trained with.

members = members_of(graph, model, params, {"critic": (critic_model, critic_params)}, rng)
optimizers = optimizers_of(graph, optax.adam(1e-5))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from redco_like.models.model import Model
from redco_like.rlhf.building import Member
from redco_like.rlhf.heads import init_head
from search.rlhf import Graph

HEADS = ("critic", "reward")
"""Roles whose models have a value head in place of the one that makes logits."""


def members_of(
    graph: Graph, model: Model, params: Any, given: Mapping[str, tuple[Model, Any]], rng: jax.Array
) -> dict[str, Member]:
    """Every role's model and parameters."""
    if unknown := sorted(set(given) - set(graph.roles)):
        raise ValueError(f"there is no role {unknown[0]!r} in graph {graph.name!r}; it has {', '.join(graph.roles)}")
    members = {}
    for i, role in enumerate(graph.roles):
        if role in given:
            members[role] = Member(*given[role])
        elif role in HEADS and "head" not in _names(params, "model"):
            members[role] = Member(model, init_head(model, jax.random.fold_in(rng, i), params))
        else:
            members[role] = Member(model, params)
    return members


def _names(params: Any, needed: str) -> set[str]:
    """Top names of parameters with a value head; none of those without."""
    return set(params) if isinstance(params, Mapping) and needed in params else set()


def optimizers_of(
    graph: Graph, optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation] | None
) -> dict[str, optax.GradientTransformation]:
    trained = [role for role in graph.roles if graph.trains(role) is not None]
    if optimizer is None:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5))
    if not isinstance(optimizer, Mapping):
        if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}; it must be an optax transformation")
        return dict.fromkeys(trained, optimizer)
    if missing := [role for role in trained if role not in optimizer]:
        raise ValueError(f"role {missing[0]!r} is trained and has no optimizer; there are {', '.join(optimizer)}")
    return dict(optimizer)
