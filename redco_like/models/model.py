"""A configuration as functions: what makes the parameters, the loss, and inference.

model = build_model(architecture("gpt2"), dtype="float32")
params = model.init_fn(jax.random.key(0))
total, count = model.loss_fn(params, {"tokens": tokens, "labels": labels})
logits, cache = model.prefill(params, prompt, model.init_cache(rows=8, length=256))
logits, cache = model.decode(params, tokens, cache, position)
logits, cache = model.extend(params, tokens, cache, position_B)      # each row at a position of its own

An encoder-decoder reads the source first, and then goes on as a decoder does:

memory = model.encode(params, source, mask)
logits, cache = model.prefill(params, first_tokens, model.init_cache(rows=8, length=256, source=512), memory)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from redco_like.models.attention import Cache, empty_cache, store_rows
from redco_like.models.config import ModelConfig
from redco_like.models.decoder import Decoder
from redco_like.models.encoder import Bert, Vit
from redco_like.models.encoder_decoder import EncoderDecoder, Memory, empty_memory
from redco_like.models.layers import cross_entropy

MODULES = {"decoder": Decoder, "encoder": Bert, "vision": Vit, "encoder-decoder": EncoderDecoder}


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
        those not asked for are negative. T5 and BART: source and labels, both of `seq_len`. ViT: images and labels.

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
        first = jnp.zeros((1, c.image, c.image, c.channels), jnp.float32) if c.kind == "vision" else ids
        more = {"source": ids} if c.kind == "encoder-decoder" else {}
        return self.module.init(rng, first, **more)["params"]

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
                self._check_source(batch["source"])
                # The decoder reads the labels one place to the right, and the start token for one that is left out.
                shifted_BL = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
                tokens_BL = jnp.where(shifted_BL < 0, c.start_token, shifted_BL)
                logits, _ = apply(variables, tokens_BL, source=batch["source"], keep=batch.get("mask"))
                return cross_entropy(logits, labels)
        logits, balance = self.forward(params, batch["tokens"])
        total, count = cross_entropy(logits, labels)
        if c.experts is not None and c.experts.balance:
            total += c.experts.balance * balance * count
        return total, count

    def forward(self, params: Any, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Read whole sequences: a decoder's logits (B, L, V), and the experts' balance loss (0 where there are none).

        Raises:
            ValueError: another kind of model.
        """
        self._check_whole()
        logits_BLV, _, balance = self.module.apply({"params": params}, tokens_BL)
        return logits_BLV, balance

    def hidden(self, params: Any, tokens_BL: jax.Array) -> jax.Array:
        """What a decoder's logits are made of, after the last norm (B, L, D). The head's kernel may be missing.

        Raises:
            ValueError: another kind of model.
        """
        self._check_whole()
        hidden_BLD, _, _ = self.module.apply({"params": params}, tokens_BL, hidden=True)
        return hidden_BLD

    def init_cache(self, rows: int, length: int, dtype: str | None = None, *, source: int | None = None) -> Cache:
        """An empty cache for `rows` sequences of up to `length` tokens; an encoder-decoder's, of sources of `source`.

        Without `source` an encoder-decoder's sources are as long as what it writes.
        """
        self._check_decoder()
        c, kind = self.config, jnp.dtype(dtype or self.dtype)
        length = self.check_length(length)
        if c.kind == "decoder":
            return empty_cache(c, rows, length, kind)
        more = empty_memory(c, rows, length if source is None else self.check_length(source), kind)
        return {**empty_cache(dataclasses.replace(c, layers=c.decoder_layers), rows, length, kind), **more}

    def encode(self, params: Any, source: jax.Array, mask: jax.Array | None = None) -> Memory:
        """Read the source (B, S) of an encoder-decoder; `mask` (B, S) tells what of it is no padding.

        Raises:
            ValueError: another kind of model, a source that is empty or longer than the table of positions.
        """
        if self.config.kind != "encoder-decoder":
            raise ValueError(f"{self.config.family} ({self.config.kind}) has no encoder apart from its decoder")
        self._check_source(source)
        return self.module.apply({"params": params}, source, mask, method="encode")

    def prefill(
        self, params: Any, tokens: jax.Array, cache: Cache, memory: Memory | None = None
    ) -> tuple[jax.Array, Cache]:
        """Read a prompt (B, L) from position 0 on: logits of its last token (B, 1, V), and the cache with it.

        An encoder-decoder's prompt is what its decoder begins with, such as the start token; it needs the memory of its
        source, of which the cache keeps the keys and values.
        """
        self._check_decoder()
        more = {}
        if self.config.kind == "encoder-decoder":
            if memory is None:
                raise ValueError(f"{self.config.family}: prefill needs memory=model.encode(params, source)")
            more = {"memory": memory}
        logits, cache, *_ = self.module.apply({"params": params}, tokens, cache, **more)
        return logits, cache

    def decode(self, params: Any, tokens: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """Read the tokens (B, 1) at a position (a scalar, the same for all rows): logits (B, 1, V), and the cache."""
        self._check_decoder()
        logits, cache, *_ = self.module.apply({"params": params}, tokens, cache, position)
        return logits, cache

    def read(
        self,
        params: Any,
        tokens_BL: jax.Array,
        cache: Cache,
        position_B: jax.Array,
        *,
        last_B: jax.Array | None = None,
        reach: int | None = None,
        length: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Read L tokens of each row, from the row's own position on, and leave the cache as it is.

        Args:
            last_B: index in L of each row's last token, whose logits are made; None for L - 1. What comes after is
                padding, and hidden from it.
            reach: how many positions of the cache attention reads, static: as many as every row has tokens; None for
                all.
            length: how long a row may get, where this cache is a part of a longer one (LongRoPE turns by it).

        Returns:
            Logits (B, 1, V), and what the cache gets for the tokens: like the cache, with L positions.

        Raises:
            ValueError: another kind of model.
        """
        if self.config.kind != "decoder":
            raise ValueError(
                f"{self.config.family} ({self.config.kind}): only decoders read a cache without writing it"
            )
        last_B = _last(tokens_BL, last_B)
        logits_B1V, added, _ = self.module.apply(
            {"params": params}, tokens_BL, cache, position_B, last_B, reach, longest=length
        )
        return logits_B1V, added

    def extend(
        self,
        params: Any,
        tokens_BL: jax.Array,
        cache: Cache,
        position_B: jax.Array,
        *,
        last_B: jax.Array | None = None,
        reach: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Read L tokens of each row as `read` does, and write what the cache gets for them, in place where donated.

        What padding leaves in the cache lies behind the row's last token, and is written over by what the row reads
        next. A row whose `position_B` is the length of the cache (or so near to it that not all L tokens fit) writes
        nothing.

        Returns:
            Logits (B, 1, V), and the cache with what is new.
        """
        self._check_decoder()
        if self.config.kind == "decoder":
            logits_B1V, added = self.read(params, tokens_BL, cache, position_B, last_B=last_B, reach=reach)
            return logits_B1V, store_rows(cache, added, position_B)
        last_B = _last(tokens_BL, last_B)
        logits_B1V, cache = self.module.apply({"params": params}, tokens_BL, cache, position_B, last_B, reach)
        return logits_B1V, cache

    def _check_decoder(self) -> None:
        if self.config.kind not in ("decoder", "encoder-decoder"):
            raise ValueError(
                f"{self.config.family} ({self.config.kind}) has no prefill and decode; only decoders have: "
                "plan its training, or a decoder such as gpt2"
            )

    def _check_whole(self) -> None:
        if self.config.kind != "decoder":
            raise ValueError(f"{self.config.family} ({self.config.kind}): only decoders score whole sequences")

    def _check_source(self, source: jax.Array) -> None:
        if not source.shape[1]:
            raise ValueError(f"{self.config.family}: a source of shape {source.shape} is empty; nearest: 1 token")
        self.check_length(source.shape[1])


def unrolled(model: Model) -> Model:
    """A decoder whose layers are not in a loop, for CPUs, where a loop copies what it reads; see `unroll`."""
    return dataclasses.replace(model, module=Decoder(model.config, jnp.dtype(model.dtype), unrolled=True))


def build_model(config: ModelConfig, *, dtype: str = "bfloat16") -> Model:
    """The functions of an architecture, computing in `dtype`."""
    return Model(config, dtype, MODULES[config.kind](config, jnp.dtype(dtype)))


def _last(tokens_BL: jax.Array, last_B: jax.Array | None) -> jax.Array | None:
    """Index of each row's last token; None where there is only one."""
    if last_B is None and tokens_BL.shape[1] > 1:
        return jnp.full(tokens_BL.shape[:1], tokens_BL.shape[1] - 1, jnp.int32)
    return last_B
