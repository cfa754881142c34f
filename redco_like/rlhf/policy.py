"""What losses of policies share: log-probabilities of the labels, entropy, the clipped objective, sums over a mask.

    policy = read_policy(model, params, batch)          # policy.logprobs_BL, policy.entropy_BL
    change_BL = (policy.logprobs_BL - batch["logprobs"]) * batch["mask"]
    gain_BL, held_BL = clipped(change_BL, batch["advantages"], low=0.2, high=0.2)

Shape letters as in `algorithm`; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from redco_like.models.layers import label_loss
from redco_like.models.model import Model


class Policy(NamedTuple):
    """What a model says of a batch, in float32.

    Attributes:
        logprobs_BL: of the labels, at temperature 1.
        entropy_BL: of the distribution that each is drawn from, in nats; no gradient.
        balance: loss of the experts' balance per token, weighted as in the model's own loss; 0 where there are none.
    """

    logprobs_BL: jax.Array
    entropy_BL: jax.Array
    balance: jax.Array


def read_policy(model: Model, params: Any, batch: Mapping[str, Any]) -> Policy:
    """Run a model over whole sequences."""
    logits_BLV, balance = model.forward(params, batch["tokens"])
    experts = model.config.experts
    weight = 0.0 if experts is None else experts.balance
    wide_BLV = jax.lax.stop_gradient(logits_BLV.astype(jnp.float32))
    most_BL1 = wide_BLV.max(-1, keepdims=True)
    weights_BLV = jnp.exp(wide_BLV - most_BL1)
    total_BL = weights_BLV.sum(-1)
    # H = log Z - sum(p x), with x = logit - max: nothing overflows, and no second array of probabilities is made.
    entropy_BL = jnp.log(total_BL) - (weights_BLV * (wide_BLV - most_BL1)).sum(-1) / total_BL
    return Policy(-label_loss(logits_BLV, batch["labels"]), entropy_BL, weight * balance)


def score_logprobs(model: Model) -> Any:
    """Log-probabilities of a completion's tokens (B, L), 0 elsewhere: what a reference does."""

    def pred_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
        logits_BLV, _ = model.forward(params, batch["tokens"])
        return -label_loss(logits_BLV, batch["labels"]) * batch["mask"]

    return pred_fn


def clipped(change: jax.Array, advantages: jax.Array, *, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

        min(r A, clip(r, 1 - low, 1 + high) A),  r = exp(change)

    Args:
        change: log pi(a) - log pi_old(a).
        advantages: of the shape of `change`.

    Returns:
        The objective, which is to be large, and 1 where the clip holds it back (there its gradient is 0).
    """
    ratio = jnp.exp(change)
    free, held = ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return jnp.minimum(free, held), (held < free).astype(jnp.float32)


def k3(change: jax.Array) -> jax.Array:
    """Estimate KL(pi || other) from samples of pi: exp(c) - 1 - c with c = log other - log pi.

    Never negative, and unbiased (Schulman 2020, http://joschu.net/blog/kl-approx.html; Shao et al. 2024, eq. 4).

    Args:
        change: log other(a) - log pi(a) of a sampled a.
    """
    return jnp.expm1(change) - change


def policy_metrics(
    policy: Policy, change_BL: jax.Array, held_BL: jax.Array, mask_BL: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Means over the tokens of the completions, as sums and weights.

    `entropy` in nats, `clip_fraction`, `ratio` to the model that wrote the completions, `kl_behaviour` to it (k3).
    """
    count = mask_BL.sum()
    values_BL = {
        "entropy": policy.entropy_BL,
        "clip_fraction": held_BL,
        "ratio": jnp.exp(change_BL),
        "kl_behaviour": k3(-change_BL),
    }
    return {name: ((value_BL * mask_BL).sum(), count) for name, value_BL in values_BL.items()}
