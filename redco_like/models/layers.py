"""Parts that all architectures share: dense kernels, norms, hidden layers, the mixture of experts, the loss.

Shape letters: B batch, L length, D embed, E experts, J experts per token, F mlp, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from redco_like.models.config import Activation, Experts, ModelConfig
from sharding_rules import experts

normal = nn.initializers.normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def dense(features: int, name: str, bias: bool, dtype: Any) -> nn.Dense:
    """A kernel (inputs, features), and a bias."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=normal, name=name)


def activate(kind: Activation, x: jax.Array) -> jax.Array:
    return ACTIVATIONS[kind](x)


class Norm(nn.Module):
    """Normalise the last dimension, in float32."""

    kind: Literal["layer", "rms", "rms_plus_one"]
    eps: float
    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        if self.kind == "layer":
            wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        init = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32).reshape(shape)
        wide *= scale + 1.0 if self.kind == "rms_plus_one" else scale
        if self.kind == "layer" and self.bias:
            wide += self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32).reshape(shape)
        return wide.astype(self.dtype)


def norm(c: ModelConfig, dtype: Any, name: str) -> Norm:
    """A norm as the architecture has it."""
    return Norm(c.norm, c.norm_eps, c.norm_bias, dtype, name=name)


class Hidden(nn.Module):
    """The hidden layer: up (and gate), activation, down."""

    config: ModelConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        h_BLF = dense(self.width, "up", c.mlp_bias, self.dtype)(x_BLD)
        if c.gated:
            h_BLF *= activate(c.activation, dense(self.width, "gate", c.mlp_bias, self.dtype)(x_BLD))
        else:
            h_BLF = activate(c.activation, h_BLF)
        return dense(x_BLD.shape[-1], "down", c.mlp_bias, self.dtype)(h_BLF)


class Mixture(nn.Module):
    """Experts: each token goes to some of them; none is dropped (`redco_like.experts`).

    Kernels of all experts are stacked: gate and up (E, D, F), down (E, F, D). Returns the output and the balance loss.
    """

    config: ModelConfig
    experts: Experts
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, e = self.config, self.experts
        D = x_BLD.shape[-1]
        router = self.param("router", normal, (D, e.count))
        scores_BLE = x_BLD.astype(jnp.float32) @ router.astype(jnp.float32)
        gates_BLE = jax.nn.sigmoid(scores_BLE) if e.router == "sigmoid" else jax.nn.softmax(scores_BLE, axis=-1)
        weights_BLJ, expert_BLJ = self._choose(gates_BLE)
        if e.normalise:
            weights_BLJ /= weights_BLJ.sum(-1, keepdims=True)
        weights_BLJ = (weights_BLJ * e.scale).astype(self.dtype)

        def kernel(name: str, rows: int, columns: int) -> jax.Array:
            return self.param(name, normal, (e.count, rows, columns)).astype(self.dtype)

        up, gate, down = kernel("up", D, e.mlp), kernel("gate", D, e.mlp), kernel("down", e.mlp, D)
        y_BLD = experts(x_BLD, expert_BLJ, weights_BLJ, up, down, gate, activation=ACTIVATIONS[c.activation])
        if e.shared_mlp:
            shared_BLD = Hidden(c, e.shared_mlp, self.dtype, name="shared")(x_BLD)
            if e.shared_gate:
                shared_BLD *= jax.nn.sigmoid(dense(1, "shared_gate", False, self.dtype)(x_BLD))
            y_BLD += shared_BLD
        return y_BLD, balance_loss(gates_BLE, expert_BLJ)

    def _choose(self, gates_BLE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights and numbers of each token's experts."""
        e = self.experts
        choice_BLE = gates_BLE
        if e.router == "sigmoid":
            # Moved by the balance of the load in training, not by the gradient (arXiv 2408.15664).
            correction = self.param("correction", nn.initializers.zeros, (e.count,)).astype(jnp.float32)
            choice_BLE = gates_BLE + jax.lax.stop_gradient(correction)[None, None]
        if e.groups > 1:
            # By index and not by a reshape, so that the experts stay one axis, which any number of devices may divide.
            members_GE = np.arange(e.count).reshape(e.groups, -1)
            best = min(2 if e.router == "sigmoid" else 1, members_GE.shape[1])
            group_BLG = jax.lax.top_k(choice_BLE[..., members_GE], best)[0].sum(-1)
            least_BL1 = jax.lax.top_k(group_BLG, e.top_groups)[0][..., -1:]
            allowed_BLE = (group_BLG >= least_BL1)[..., np.arange(e.count) // members_GE.shape[1]]
            choice_BLE = jnp.where(allowed_BLE, choice_BLE, 0.0)
        weights_BLJ, expert_BLJ = jax.lax.top_k(choice_BLE, e.per_token)
        if e.router == "sigmoid":
            weights_BLJ = jnp.take_along_axis(gates_BLE, expert_BLJ, axis=-1)
        return weights_BLJ, expert_BLJ


def balance_loss(gates_BLE: jax.Array, expert_BLJ: jax.Array) -> jax.Array:
    """Load balancing of the Switch transformer (arXiv 2101.03961) over all tokens; 1 where all experts get as many."""
    E = gates_BLE.shape[-1]
    share_E = jax.nn.one_hot(expert_BLJ, E, dtype=jnp.float32).mean((0, 1, 2))
    return E * jnp.sum(share_E * (gates_BLE / gates_BLE.sum(-1, keepdims=True)).mean((0, 1)))


def learned_positions(table_PD: jax.Array, length: int, position: jax.Array | None, offset: int) -> jax.Array:
    """Rows of a table of positions for `length` tokens: (1, L, D), or (B, L, D) where each row has its own position.

    Args:
        position: of the first token, a scalar or one per row (B,); None for 0.
        offset: rows of the table that stand before position 0.
    """
    if position is not None and position.ndim:
        return table_PD[position[:, None] + jnp.arange(offset, offset + length)[None]]
    start = offset if position is None else position + offset
    return jax.lax.dynamic_slice_in_dim(table_PD, start, length)[None]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(label) in float32 and the number of labels; a negative label is left out."""
    counted = labels >= 0
    loss = jnp.where(counted, label_loss(logits, jnp.maximum(labels, 0)), 0.0)
    return loss.sum(), counted.sum().astype(jnp.float32)


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p(label) in float32, of the shape of the labels."""
    wide = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(wide, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(wide, axis=-1) - picked
