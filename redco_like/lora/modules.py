"""Kernels of flax.linen that stay apart from their adapters until a layer uses them.

    with apart():
        module.apply({"params": boxed(base, adapters)}, x)

A box is what `flax.core.meta.AxisMetadata` is: a leaf of the variables that `nn.scan` slices and `self.param` opens. A
dense layer does not open it: it computes `x W + scale (x a) b`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from redco_like.lora.adapters import Adapter, Adapters
from redco_like.paths import leaves_by_path, replaced
from redco_like.quantize import Nf4, is_nf4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(meta.AxisMetadata[Any]):
    """A kernel and its adapter; opened, their sum.

    Attributes:
        kernel: array or `Nf4`.
        a, b, scale: of the adapter.
    """

    kernel: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})

    def unbox(self) -> jax.Array:
        delta = jnp.matmul(self.a, self.b) * self.scale
        return _opened(self.kernel, delta.dtype) + delta

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Adapted:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Adapted:
        return self


def boxed(base: Any, adapters: Adapters) -> Any:
    """The base with its adapted kernels in boxes.

    Raises:
        ValueError: an adapter of a kernel that is no matrix with stacked dimensions in front.
    """
    kernels = leaves_by_path(base, is_leaf=is_nf4)
    boxes = {path: _box(path, kernels[path], adapter) for path, adapter in adapters.items()}
    return replaced(base, boxes, is_leaf=is_nf4)


def _box(path: str, kernel: Any, adapter: Adapter) -> Adapted:
    if adapter.split.inputs != 1 or adapter.split.stacked != len(kernel.shape) - 2:
        raise ValueError(
            f"the adapter of {path!r} has {adapter.split}: apply='flax' is for kernels whose last two dimensions are "
            "inputs and outputs; nearest: apply='merged'"
        )
    return Adapted(kernel, adapter.a, adapter.b, adapter.scale)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within it, dense layers of flax.linen multiply by a kernel and its adapter one after the other."""
    with nn.intercept_methods(_dense):
        yield


def _dense(
    call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], context: nn.module.InterceptorContext
) -> Any:
    module = context.module
    if type(module) is not nn.Dense or context.method_name != "__call__" or len(args) != 1 or kwargs:
        return call(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    if not isinstance(kernel, Adapted | Nf4) or module.dot_general_cls is not None:
        return call(*args)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    product = module.dot_general or jax.lax.dot_general

    def times(x: jax.Array, w: jax.Array) -> jax.Array:
        return product(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision=module.precision)

    weight = kernel.kernel if isinstance(kernel, Adapted) else kernel
    dtype = module.dtype or jnp.result_type(args[0], weight.dtype)
    x = args[0].astype(dtype)
    y: Any = _frozen_product(times, x, weight) if isinstance(weight, Nf4) else times(x, weight.astype(dtype))
    if isinstance(kernel, Adapted):
        y += times(times(x, kernel.a.astype(dtype)), kernel.b.astype(dtype)) * kernel.scale
    return y if bias is None else y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _opened(kernel: Any, dtype: Any) -> jax.Array:
    return kernel.dequantize(dtype) if isinstance(kernel, Nf4) else kernel.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_product(times: Callable[..., jax.Array], x: jax.Array, weight: Nf4) -> jax.Array:
    """`times(x, kernel)` of a quantised kernel, which is written out again in the backward pass and has no gradient.

    Otherwise the backward pass of a loop over layers would hold the kernels of all of them at once. `jax.checkpoint`
    would do as well, but a layer that has its own is left alone by the plan's rematerialisation.
    """
    return _times_kernel(times, weight, x)


def _forward(times: Callable[..., jax.Array], x: jax.Array, weight: Nf4) -> tuple[jax.Array, tuple[jax.Array, Nf4]]:
    return _frozen_product(times, x, weight), (x, weight)


def _backward(times: Callable[..., jax.Array], kept: tuple[jax.Array, Nf4], dy: jax.Array) -> tuple[jax.Array, None]:
    x, weight = kept
    _, pullback = jax.vjp(functools.partial(_times_kernel, times, weight), x)
    return (*pullback(dy), None)


def _times_kernel(times: Callable[..., jax.Array], weight: Nf4, x: jax.Array) -> jax.Array:
    return times(x, weight.dequantize(x.dtype))


_frozen_product.defvjp(_forward, _backward)
