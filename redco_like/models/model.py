"""A configuration as functions: what makes the parameters, the loss, and inference.

model = build_model(architecture("gpt2"), dtype="float32")
params = model.init_fn(jax.random.key(0))
total, count = model.loss_fn(params, {"tokens": tokens, "labels": labels})
logits, cache = model.prefill(params, prompt, model.init_cache(rows=8, length=256))
logits, cache = model.decode(params, tokens, cache, position)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from redco_like.models.attention import Cache, empty_cache
from redco_like.models.config import ModelConfig
from redco_like.models.decoder import Decoder
from redco_like.models.encoder import Bert, Vit
from redco_like.models.layers import cross_entropy
from redco_like.models.t5 import T5

MODULES = {"decoder": Decoder, "encoder": Bert, "vision": Vit, "encoder-decoder": T5}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as pure functions of its parameters.

    Attributes:
        config: its sizes.
        dtype: of the computation; parameters are made in float32 and cast where they are used.
        module: the Flax module.
    """

    config: ModelConfig
    dtype: str
    module: Any

    def abstract_batch(self, global_batch: int, seq_len: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch, as `loss_fn` reads it.

        Decoders: tokens and labels (the next tokens; negative ones are left out). BERT: tokens and labels, of which
        those not asked for are negative. T5: source and labels, both of `seq_len`. ViT: images and labels.

        Raises:
            ValueError: `seq_len` is missing, or longer than a table of positions.
        """
        c = self.config
        if c.kind == "vision":
            images = jax.ShapeDtypeStruct((global_batch, c.image, c.image, c.channels), jnp.float32)
            return {"images": images, "labels": jax.ShapeDtypeStruct((global_batch,), jnp.int32)}
        ids = jax.ShapeDtypeStruct((global_batch, self.check_length(seq_len)), jnp.int32)
        return {"source" if c.kind == "encoder-decoder" else "tokens": ids, "labels": ids}

    def check_length(self, seq_len: int | None) -> int:
        """Return `seq_len`, or the longest of the model if None.

        Raises:
            ValueError: the model has a table of positions that ends before.
        """
        c = self.config
        length = c.max_length if seq_len is None else seq_len
        if c.position == "learned" and length > c.max_length:
            raise ValueError(
                f"seq_len={length} is longer than the table of {c.max_length} positions that {c.family} learns; "
                f"nearest: {c.max_length}"
            )
        return length

    def init_fn(self, rng: jax.Array) -> Any:
        """Draw the parameters."""
        ids = jnp.zeros((1, 1), jnp.int32)
        c = self.config
        inputs = {
            "vision": (jnp.zeros((1, c.image, c.image, c.channels), jnp.float32),),
            "encoder-decoder": (ids, ids),
        }
        return self.module.init(rng, *inputs.get(c.kind, (ids,)))["params"]

    def loss_fn(self, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Sum of the cross entropy, with the experts' balance loss in proportion, and the number of labels."""
        c = self.config
        apply = self.module.apply
        variables = {"params": params}
        labels = batch["labels"]
        match c.kind:
            case "vision":
                return cross_entropy(apply(variables, batch["images"]), labels)
            case "encoder":
                return cross_entropy(apply(variables, batch["tokens"], batch.get("types"), batch.get("mask")), labels)
            case "encoder-decoder":
                # The decoder reads the labels one place to the right, after the padding token 0.
                tokens_BL = jnp.pad(jnp.maximum(labels, 0)[:, :-1], ((0, 0), (1, 0)))
                return cross_entropy(apply(variables, batch["source"], tokens_BL, batch.get("mask")), labels)
        logits, _, balance = apply(variables, batch["tokens"])
        total, count = cross_entropy(logits, labels)
        if c.experts is not None and c.experts.balance:
            total += c.experts.balance * balance * count
        return total, count

    def init_cache(self, rows: int, length: int, dtype: str | None = None) -> Cache:
        """An empty cache for `rows` sequences of up to `length` tokens."""
        self._check_decoder()
        return empty_cache(self.config, rows, self.check_length(length), jnp.dtype(dtype or self.dtype))

    def prefill(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read a prompt (B, L) from position 0 on: logits of its last token (B, 1, V), and the cache with it."""
        self._check_decoder()
        logits, cache, _ = self.module.apply({"params": params}, tokens, cache)
        return logits, cache

    def decode(self, params: Any, tokens: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """Read the tokens (B, 1) at a position (a scalar, the same for all rows): logits (B, 1, V), and the cache."""
        self._check_decoder()
        logits, cache, _ = self.module.apply({"params": params}, tokens, cache, position)
        return logits, cache

    def _check_decoder(self) -> None:
        if self.config.kind != "decoder":
            raise ValueError(
                f"{self.config.family} ({self.config.kind}) has no prefill and decode; only decoders have: "
                "plan its training, or a decoder such as gpt2"
            )


def build_model(config: ModelConfig, *, dtype: str = "bfloat16") -> Model:
    """The functions of an architecture, computing in `dtype`."""
    return Model(config, dtype, MODULES[config.kind](config, jnp.dtype(dtype)))
