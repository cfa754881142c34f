"""What a model of the zoo is, and the few helpers its models share.

model = zoo.MODELS["gpt2"]
params = model.init(jax.random.key(0))
batch = model.make_batch(numpy.random.default_rng(0), 8)
loss = model.loss(params, batch, jax.random.key(1))
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Dims = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One small model with meaningless parameter names.

    Attributes:
        name: its key in `zoo.MODELS`.
        init: rng -> params.
        loss: (params, batch, rng) -> scalar, a mean over the batch.
        make_batch: (numpy generator, global batch) -> tree of numpy arrays, batch dimension first.
        expected_roles: path -> a role per dimension; `a*b` for a dimension made of two axes, None where not certain.
        megatron: path -> "tensor" or None per dimension, by hand, after Megatron-LM: columns of what enters heads
            and the hidden layer, rows of what leaves them, the vocabulary of embeddings; biases follow their columns.
        notes: what is special about it.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    make_batch: Callable[[np.random.Generator, int], Any]
    expected_roles: Mapping[str, Dims] = dataclasses.field(default_factory=dict)
    megatron: Mapping[str, Dims] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", _allow_rank_promotion(self.init))
        object.__setattr__(self, "loss", _allow_rank_promotion(self.loss))

    def abstract_params(self) -> Any:
        """Shapes of the parameters; nothing is allocated."""
        return jax.eval_shape(self.init, abstract_key())

    def abstract_batch(self, global_batch: int = 8) -> Any:
        """Shapes of a batch."""
        batch = self.make_batch(np.random.default_rng(0), global_batch)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def _allow_rank_promotion(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model write `x + bias`, as users do; the tests' strict setting is for the library's own code."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return wrapped


def abstract_key() -> Any:
    """A typed key's shape."""
    return jax.eval_shape(jax.random.key, 0)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter to be drawn: normal around `mean` with standard deviation `scale`."""

    shape: tuple[int, ...]
    mean: float
    scale: float


def w(*shape: int, fan_in: int | None = None) -> Leaf:
    """A matrix, scaled by the dimension before the last unless told."""
    return Leaf(shape, 0.0, (fan_in or shape[-2]) ** -0.5)


def b(*shape: int) -> Leaf:
    """A bias; not zero, so that a misplaced one is seen."""
    return Leaf(shape, 0.0, 0.1)


def g(*shape: int) -> Leaf:
    """The scale of a normalisation."""
    return Leaf(shape, 1.0, 0.1)


def table(*shape: int) -> Leaf:
    """An embedding."""
    return Leaf(shape, 0.0, 0.5)


def draw(rng: jax.Array, tree: Any, dtype: Any = jnp.float32) -> Any:
    """Draw every `Leaf` of a tree, from one vector of random numbers: one operation to compile."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Leaf))
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    numbers = jax.random.normal(rng, (sum(sizes),))
    arrays, start = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        piece = numbers[start : start + size].reshape(leaf.shape)
        arrays.append((leaf.mean + leaf.scale * piece).astype(dtype))
        start += size
    return jax.tree.unflatten(structure, arrays)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalise the last dimension, with scale and bias."""
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divide by the root mean square of the last dimension; computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of -log p(label); the label's log probability is gathered."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logp, labels[..., None], axis=-1).mean()


def tokens(vocab: int, length: int, *names: str) -> Callable[[np.random.Generator, int], dict[str, np.ndarray]]:
    """A batch maker of int32 tokens (global batch, length), one array per name."""

    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        return {name: rng.integers(0, vocab, (global_batch, length)).astype(np.int32) for name in names}

    return make_batch


def per_layer(tree: Mapping[str, Dims], prefix: str, layers: int) -> dict[str, Dims]:
    """Repeat a layer's entries for `prefix/0`, `prefix/1`, ..."""
    return {f"{prefix}/{i}/{path}": dims for i in range(layers) for path, dims in tree.items()}


def stacked(tree: Mapping[str, Dims], prefix: str, first: Any) -> dict[str, Dims]:
    """A layer's entries with a leading dimension of layers."""
    return {f"{prefix}/{path}": (first, *dims) for path, dims in tree.items()}
