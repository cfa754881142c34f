"""Parameters that a step reads and does not train.

    params = {"head": head, "encoder": Frozen(encoder)}

What is frozen lies on the mesh as the plan says, like every parameter. It keeps its dtype, is not differentiated, has
no optimizer state, and is neither donated nor copied by a step, so that several trainers may share it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


class NotTrained:
    """Base of pytree nodes whose leaves are not trained, whatever their dtype."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen(NotTrained):
    """A part of the parameters that is not trained; `loss_fn` reads it as `.frozen`.

    >>> trainable({"head": jnp.ones(2), "encoder": Frozen({"kernel": jnp.ones(2)})})
    {'head': True, 'encoder': Frozen(frozen={'kernel': False})}
    """

    frozen: Any


def trainable(params: Any) -> Any:
    """Say of every leaf whether it is trained: it is inexact and not frozen. A tree of booleans."""

    def of(node: Any) -> Any:
        if isinstance(node, NotTrained):
            return jax.tree.map(lambda _: False, node)
        return bool(jnp.issubdtype(node.dtype, jnp.inexact))

    return jax.tree.map(of, params, is_leaf=is_frozen)


def is_frozen(node: Any) -> bool:
    """Whether a node of a tree is frozen, with all that is below it."""
    return isinstance(node, NotTrained)


def split_frozen(tree: Any) -> tuple[Any, Any]:
    """Part a tree into what is not frozen and what is, with None where the other has a leaf."""

    def part(keep: bool) -> Any:
        def of(node: Any) -> Any:
            return jax.tree.map(lambda x: x if is_frozen(node) is keep else None, node)

        return jax.tree.map(of, tree, is_leaf=is_frozen)

    return part(False), part(True)


def join(a: Any, b: Any) -> Any:
    """Put together two trees of one structure, each None where the other has a leaf."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
