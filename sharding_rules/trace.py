"""From a function and abstract arguments to a jaxpr whose inputs have paths.

    traced = trace(loss_fn, params, batch, rng, names=("params", "batch", "rng"))

Arguments are trees of `jax.ShapeDtypeStruct` (arrays pass too): nothing is allocated and no device is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def path_str(keypath: tuple[Any, ...]) -> str:
    """Write a key path as `"layers/0/attn/kernel"`.

    The attribute `value` in which flax's nnx keeps an array is left out: it is in every path and says nothing.
    """
    if len(keypath) > 1 and keypath[-1] == GetAttrKey("value"):
        keypath = keypath[:-1]

    def name(key: Any) -> str:
        match key:
            case DictKey() | FlattenedIndexKey():
                return str(key.key)
            case GetAttrKey():
                return key.name
            case SequenceKey():
                return str(key.idx)
            case _:
                return str(key).strip(".[]'\"")

    return "/".join(name(key) for key in keypath)


def tree_paths(tree: Any) -> list[str]:
    """Paths of the leaves of a tree, in leaf order."""
    return [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def abstract(tree: Any) -> Any:
    """Replace every array of a tree by its `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            jax.numpy.shape(x),
            jax.dtypes.canonicalize_dtype(x.dtype)
            if not jax.numpy.issubdtype(x.dtype, jax.dtypes.extended)
            else x.dtype,
        ),
        tree,
    )


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A function as a jaxpr, with the trees of its arguments and results.

    Attributes:
        jaxpr: closed jaxpr over the flattened arguments.
        names: one name per argument, such as `("params", "batch", "rng")`.
        args: the abstract arguments.
        out: the abstract result.
    """

    jaxpr: ClosedJaxpr
    names: tuple[str, ...]
    args: tuple[Any, ...]
    out: Any

    def arg(self, name: str) -> Any:
        """The abstract argument called `name`."""
        return self.args[self.names.index(name)]

    def arg_slice(self, name: str) -> slice:
        """Where the leaves of the argument `name` lie among the jaxpr's inputs."""
        position = self.names.index(name)
        counts = [len(jax.tree.leaves(arg)) for arg in self.args]
        start = sum(counts[:position])
        return slice(start, start + counts[position])


def trace(fn: Callable[..., Any], *abstract_args: Any, names: Sequence[str] | None = None) -> TracedFunction:
    """Trace `fn` on abstract arguments.

    Args:
        fn: any JAX function of trees.
        abstract_args: trees of arrays or `ShapeDtypeStruct`, one per positional argument.
        names: a name per argument; default `arg0, arg1, ...`.
    """
    names = tuple(names) if names is not None else tuple(f"arg{i}" for i in range(len(abstract_args)))
    if len(names) != len(abstract_args):
        raise ValueError(f"{len(abstract_args)} arguments but {len(names)} names: {names}")
    args = tuple(abstract(arg) for arg in abstract_args)
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return TracedFunction(jaxpr, names, args, out)
