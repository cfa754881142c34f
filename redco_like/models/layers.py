"""Parts that all architectures share: dense kernels, norms, hidden layers, the mixture of experts, the loss.

Shape letters: B batch, L length, T = B * L tokens, D embed, E experts, J experts per token, F mlp, V vocab.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from redco_like.models.config import Activation, Experts, ModelConfig

normal = nn.initializers.normal(0.02)

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
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
    """Experts: tokens are sorted by expert and multiplied in groups (arXiv 2211.15841); none is dropped.

    Kernels of all experts are stacked: gate and up (E, D, F), down (E, F, D). Returns the output and the balance loss.
    """

    config: ModelConfig
    experts: Experts
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, e = self.config, self.experts
        D = x_BLD.shape[-1]
        x_TD = x_BLD.reshape(-1, D)
        router = self.param("router", normal, (D, e.count))
        scores_TE = x_TD.astype(jnp.float32) @ router.astype(jnp.float32)
        gates_TE = jax.nn.sigmoid(scores_TE) if e.router == "sigmoid" else jax.nn.softmax(scores_TE, axis=-1)
        weights_TJ, expert_TJ = self._choose(gates_TE)
        if e.normalise:
            weights_TJ /= weights_TJ.sum(-1, keepdims=True)
        weights_TJ = (weights_TJ * e.scale).astype(self.dtype)

        def kernel(name: str, rows: int, columns: int) -> jax.Array:
            return self.param(name, normal, (e.count, rows, columns)).astype(self.dtype)

        expert = expert_TJ.reshape(-1)
        order = jnp.argsort(expert)
        counts_E = jnp.bincount(expert, length=e.count)
        h = x_TD[order // e.per_token]
        up = jax.lax.ragged_dot(h, kernel("up", D, e.mlp), counts_E)
        gate = jax.lax.ragged_dot(h, kernel("gate", D, e.mlp), counts_E)
        h = jax.lax.ragged_dot(activate(c.activation, gate) * up, kernel("down", e.mlp, D), counts_E)
        y_TJD = jnp.zeros_like(h).at[order].set(h).reshape(-1, e.per_token, D)
        y_BLD = jnp.einsum("tj,tjd->td", weights_TJ, y_TJD).reshape(x_BLD.shape)
        if e.shared_mlp:
            shared_BLD = Hidden(c, e.shared_mlp, self.dtype, name="shared")(x_BLD)
            if e.shared_gate:
                shared_BLD *= jax.nn.sigmoid(dense(1, "shared_gate", False, self.dtype)(x_BLD))
            y_BLD += shared_BLD
        share_E = counts_E.astype(jnp.float32) / expert.shape[0]
        return y_BLD, e.count * jnp.sum(share_E * (gates_TE / gates_TE.sum(-1, keepdims=True)).mean(0))

    def _choose(self, gates_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights and numbers of each token's experts."""
        e = self.experts
        choice_TE = gates_TE
        if e.router == "sigmoid":
            # Moved by the balance of the load in training, not by the gradient (arXiv 2408.15664).
            correction = self.param("correction", nn.initializers.zeros, (e.count,)).astype(jnp.float32)
            choice_TE = gates_TE + jax.lax.stop_gradient(correction)[None]
        if e.groups > 1:
            # By index and not by a reshape, so that the experts stay one axis, which any number of devices may divide.
            members_GE = np.arange(e.count).reshape(e.groups, -1)
            best = min(2 if e.router == "sigmoid" else 1, members_GE.shape[1])
            group_TG = jax.lax.top_k(choice_TE[:, members_GE], best)[0].sum(-1)
            least_T1 = jax.lax.top_k(group_TG, e.top_groups)[0][:, -1:]
            allowed_TE = (group_TG >= least_T1)[:, np.arange(e.count) // members_GE.shape[1]]
            choice_TE = jnp.where(allowed_TE, choice_TE, 0.0)
        weights_TJ, expert_TJ = jax.lax.top_k(choice_TE, e.per_token)
        if e.router == "sigmoid":
            weights_TJ = jnp.take_along_axis(gates_TE, expert_TJ, axis=-1)
        return weights_TJ, expert_TJ


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(label) in float32 and the number of labels; a negative label is left out."""
    wide = logits.astype(jnp.float32)
    counted = labels >= 0
    picked = jnp.take_along_axis(wide, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.where(counted, jax.nn.logsumexp(wide, axis=-1) - picked, 0.0)
    return loss.sum(), counted.sum().astype(jnp.float32)
