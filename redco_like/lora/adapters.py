"""Adapters as a tree of their own, and functions of a frozen base and its adapters.

adapters = init(rng, base, ["*attention/*/kernel"], rank=8, alpha=16)      # path -> Adapter(a, b)
merge(base, adapters)                                                      # base + scale * a b, where there is one

A kernel is a matrix from its inputs to its outputs with further dimensions in front, such as layers that are stacked,
for each of which there is an adapter. Shape letters: ... stacked, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from redco_like.paths import Pattern, leaves_by_path, listed, matching, replaced
from redco_like.quantize import Nf4, is_nf4
from sharding_rules import Frozen


class Split(NamedTuple):
    """How many dimensions of a kernel are stacked in front, how many after them are inputs; the rest are outputs."""

    stacked: int
    inputs: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is added to one kernel: `scale * a @ b`.

    Attributes:
        a: (..., K, R), drawn.
        b: (..., R, N), zeros at first.
        alpha: numerator of the scale.
        stabilised: the scale is alpha / sqrt(rank) and not alpha / rank (arXiv 2312.03732).
        split: of the kernel.
    """

    a: Any
    b: Any
    alpha: float = dataclasses.field(metadata={"static": True})
    stabilised: bool = dataclasses.field(default=False, metadata={"static": True})
    split: Split = dataclasses.field(default=Split(0, 1), metadata={"static": True})

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """Factor on the product of `a` and `b`."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return (*self.a.shape[:-1], *self.b.shape[self.split.stacked + 1 :])

    def delta(self) -> jax.Array:
        """`scale * a @ b`, of the kernel's shape."""
        stacked = tuple(range(self.split.stacked))
        contracted = ((self.a.ndim - 1,), (self.split.stacked,))
        return jax.lax.dot_general(self.a, self.b, (contracted, (stacked, stacked))) * self.scale


Adapters = Mapping[str, Adapter]


def init(
    rng: jax.Array,
    base: Any,
    patterns: Pattern | Iterable[Pattern] | Mapping[Pattern, Split | None],
    *,
    rank: int,
    alpha: float | None = None,
    stabilised: bool = False,
    dtype: Any = jnp.float32,
) -> dict[str, Adapter]:
    """Draw adapters for the kernels that the patterns match. `b` is zero: they change nothing yet.

    Args:
        rng: key; each kernel's depends on its path alone.
        base: parameters; arrays, shapes or `Nf4`.
        patterns: globs over paths such as "*attention/*/kernel", or compiled regular expressions. As a mapping, with
            the `Split` of the kernels; None, and the rule where there is no mapping, is that the last two dimensions
            are inputs and outputs, and those in front are stacked.
        rank: columns of `a`.
        alpha: the scale is alpha / rank; default alpha = rank.
        stabilised: the scale is alpha / sqrt(rank), under which high ranks learn as fast as low ones.
        dtype: of the adapters.

    Raises:
        ValueError: a pattern that matches nothing, a rank that no kernel can have, a leaf that is no matrix.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}; it must be a whole number of at least 1")
    rules = patterns if isinstance(patterns, Mapping) else dict.fromkeys(listed(patterns))
    matching(base, rules, is_leaf=is_nf4)
    adapters = {}
    for pattern, stated in rules.items():
        for path, kernel in matching(base, [pattern], is_leaf=is_nf4).items():
            split = _split_of(path, kernel.shape, stated)
            adapters[path] = _drawn(rng, path, kernel.shape, split, rank, alpha or rank, stabilised, dtype)
    return {path: adapters[path] for path in leaves_by_path(base, is_leaf=is_nf4) if path in adapters}


def _drawn(
    rng: jax.Array,
    path: str,
    shape: tuple[int, ...],
    split: Split,
    rank: int,
    alpha: float,
    stabilised: bool,
    dtype: Any,
) -> Adapter:
    stacked, inputs, outputs = _parts(shape, split)
    most = min(math.prod(inputs), math.prod(outputs))
    if rank > most:
        raise ValueError(
            f"{path!r} of shape {shape} maps {math.prod(inputs)} inputs to {math.prod(outputs)} outputs: a rank of "
            f"{rank} is more than its own; nearest: {most}. If other dimensions are meant, give lora.Split(stacked, "
            "inputs), and if it is no kernel, a pattern that leaves it out"
        )
    bound = math.prod(inputs) ** -0.5  # as PEFT draws it: Kaiming's uniform with a = sqrt(5)
    key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
    a = jax.random.uniform(key, (*stacked, *inputs, rank), dtype, -bound, bound)
    return Adapter(a, jnp.zeros((*stacked, rank, *outputs), dtype), float(alpha), stabilised, split)


def merge(base: Any, adapters: Adapters) -> Any:
    """Add the adapters into the base: parameters of its structure and dtypes, quantised ones written out.

    Raises:
        ValueError: adapters of another model; names the path and the shapes.
    """
    check(base, adapters)
    return _merged(base, adapters)


def join(base: Any, adapters: Adapters) -> dict[str, Any]:
    """What a Trainer trains: `{"adapters": adapters, "base": Frozen(base)}`.

    Raises:
        ValueError: adapters of another model; names the path and the shapes.
    """
    check(base, adapters)
    return {"adapters": dict(adapters), "base": Frozen(base)}


def wrap(fn: Callable[..., Any], *, apply: Literal["merged", "flax"] = "merged") -> Callable[..., Any]:
    """Turn a loss or a prediction of parameters into one of `join(base, adapters)`.

    Args:
        fn: names an argument `params`.
        apply: "merged" adds the adapters to the kernels before `fn` is called, which any function can do with: each
            adapted kernel is written once more and has a whole gradient for a moment. "flax" leaves them apart:
            modules of flax.linen read their kernels inside the layer, dense layers compute `x W + scale (x a) b`, and
            quantised kernels are written out one layer at a time, again in the backward pass.

    Raises:
        ValueError: `fn` names no `params`; at a call, parameters of another form, or adapters of another model.
    """
    if apply not in ("merged", "flax"):
        raise ValueError(f"apply={apply!r}; one of merged, flax")
    signature = inspect.signature(fn)
    if "params" not in signature.parameters:
        raise ValueError(f"the function to wrap takes ({', '.join(signature.parameters)}); it must name `params`")

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        base, adapters = _parted(bound.arguments["params"])
        dtype = next(iter(adapters.values())).a.dtype
        cast = functools.partial(jax.tree.map, lambda x: _cast(x, dtype), is_leaf=is_nf4)
        if apply == "merged":
            bound.arguments["params"] = _merged(cast(base), adapters, dtype)
            return fn(*bound.args, **bound.kwargs)
        from redco_like.lora.modules import apart, boxed

        bound.arguments["params"] = boxed(cast(base), adapters)
        with apart():
            return fn(*bound.args, **bound.kwargs)

    return wrapped


def check(base: Any, adapters: Adapters) -> None:
    """Refuse adapters of another model.

    Raises:
        ValueError: none at all, or one whose kernel is not there or has another shape.
    """
    if not adapters:
        raise ValueError("there are no adapters")
    kernels = leaves_by_path(base, is_leaf=is_nf4)
    for path, adapter in adapters.items():
        if path not in kernels:
            matching(base, [path], is_leaf=is_nf4)
        if tuple(kernels[path].shape) != adapter.shape:
            raise ValueError(
                f"the adapter of {path!r} is for a kernel of shape {adapter.shape} (a {tuple(adapter.a.shape)}, b "
                f"{tuple(adapter.b.shape)}), and the model's is {tuple(kernels[path].shape)}: it is of another model"
            )


def _merged(base: Any, adapters: Adapters, dtype: Any = None) -> Any:
    kernels = leaves_by_path(base, is_leaf=is_nf4)
    tuned = {path: _sum(kernels[path], adapter, dtype) for path, adapter in adapters.items()}
    tree = replaced(base, tuned, is_leaf=is_nf4)
    return jax.tree.map(lambda x: x.dequantize(dtype) if is_nf4(x) else x, tree, is_leaf=is_nf4)


def _sum(kernel: Any, adapter: Adapter, dtype: Any) -> jax.Array:
    kernel = kernel.dequantize(dtype) if isinstance(kernel, Nf4) else kernel
    wide = jnp.promote_types(kernel.dtype, adapter.a.dtype)
    return (kernel.astype(wide) + adapter.delta().astype(wide)).astype(kernel.dtype)


def _cast(x: Any, dtype: Any) -> Any:
    if is_nf4(x) or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype:
        return x
    return x.astype(dtype)


def _parted(params: Any) -> tuple[Any, Adapters]:
    if not (isinstance(params, Mapping) and set(params) == {"adapters", "base"} and isinstance(params["base"], Frozen)):
        raise ValueError("a function wrapped by lora.wrap takes the parameters that lora.join(base, adapters) makes")
    check(params["base"].frozen, params["adapters"])
    return params["base"].frozen, params["adapters"]


def _split_of(path: str, shape: tuple[int, ...], stated: Split | None) -> Split:
    split = Split(len(shape) - 2, 1) if stated is None else Split(*stated)
    if split.stacked < 0 or split.inputs < 1 or split.stacked + split.inputs >= len(shape):
        raise ValueError(
            f"{path!r} has shape {tuple(shape)}: {split.stacked} stacked dimensions and {split.inputs} of inputs leave "
            "none for the outputs; a kernel has at least one of each"
            if stated is not None
            else f"{path!r} has shape {tuple(shape)} and is no matrix; give a pattern that leaves it out, such as "
            "'*/kernel'"
        )
    return split


def _parts(shape: tuple[int, ...], split: Split) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    inputs = split.stacked + split.inputs
    return tuple(shape[: split.stacked]), tuple(shape[split.stacked : inputs]), tuple(shape[inputs:])
