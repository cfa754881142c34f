"""What a transformer is, in one record: enough to build every family that `architectures` names.

    config = architecture("llama-3-8b")
    dataclasses.replace(config, layers=4)

Sizes are checked when the record is made, so that a model is never built from numbers that do not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["decoder", "encoder", "vision", "encoder-decoder"]
Block = Literal["pre", "post", "sandwich", "parallel", "parallel_one_norm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the hidden layer.

    Attributes:
        count: number of experts.
        per_token: experts that each token goes to.
        mlp: width of one expert.
        shared_mlp: width of the expert that every token goes to; 0 for none.
        shared_gate: scale the shared expert by a sigmoid of its own (Qwen-MoE).
        router: what turns scores into weights; "sigmoid" also has a correction added for the choice (DeepSeek-V3).
        normalise: divide the chosen weights by their sum.
        scale: factor on the routed experts' output.
        groups, top_groups: experts are chosen from the best `top_groups` of `groups`.
        dense_layers: this many first layers have an ordinary hidden layer.
        balance: weight of the load-balancing loss of the Switch transformer.
    """

    count: int
    per_token: int
    mlp: int
    shared_mlp: int = 0
    shared_gate: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    dense_layers: int = 0
    balance: float = 0.01


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one compressed vector.

    Attributes:
        query_rank: width of the compressed query; 0 for a plain projection.
        kv_rank: width of the compressed keys and values, which the cache holds.
        nope_dim, rope_dim: dimensions of a head without and with rotary position.
        value_dim: dimensions of a head's values.
    """

    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of pretraining, as Hugging Face's `rope_scaling`.

    Attributes:
        attention_factor: on cosines and sines; 0 for what YaRN and LongRoPE make of `factor`.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer.

    Attributes:
        family: name of the family, as Hugging Face's `model_type`.
        kind: "decoder" (next token), "encoder" (masked token), "vision" (classifier), "encoder-decoder" (T5, BART).
        vocab: rows of the embedding; 0 for vision.
        kv_heads: 0 for as many as `heads`. head_dim: 0 for embed / heads.
        token_width: width of the embedding, where kernels turn it into `embed` and back (OPT-350m); 0 for embed.
        block: where the norms are: before each part, after the sum, before and after each part ("sandwich"), or
            attention and hidden layer side by side with two norms or one.
        norm: "rms_plus_one" scales by 1 + weight.
        position: "buckets" is T5's relative bias.
        position_offset: rows of the position table that stand before position 0 (OPT has 2).
        rotary_dim: dimensions of a head that turn; 0 for all.
        rope_interleaved: pairs are (0, 1), (2, 3), ... instead of (0, H/2), (1, H/2 + 1), ...
        window: tokens that attention looks back; 0 for all. global_every, global_first: each such layer, and so many
            first ones, look back over all.
        local_theta: `rope_theta` of the layers with a window, which are not scaled (Gemma 3); 0 for that of all.
        attention_scale: 0 for head_dim ** -0.5.
        attention_softcap, logit_softcap: c * tanh(x / c), 0 for none.
        embed_scale: multiply embeddings by sqrt(embed).
        decoder_layers: of an encoder-decoder. start_token: what its decoder reads before the first label.
        types: rows of BERT's token type table.
        image, patch, channels, classes: of vision.
    """

    family: str
    kind: Kind
    embed: int
    layers: int
    heads: int
    mlp: int
    vocab: int = 0
    token_width: int = 0
    max_length: int = 2048
    kv_heads: int = 0
    head_dim: int = 0
    block: Block = "pre"
    norm: Literal["layer", "rms", "rms_plus_one"] = "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    qk_norm: bool = False
    activation: Activation = "gelu"
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = True
    final_norm: bool = True
    position: Literal["learned", "rotary", "alibi", "buckets", "none"] = "none"
    position_offset: int = 0
    rotary_dim: int = 0
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    window: int = 0
    global_every: int = 0
    global_first: int = 0
    local_theta: float = 0.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    decoder_layers: int = 0
    start_token: int = 0
    buckets: int = 32
    bucket_distance: int = 128
    types: int = 0
    image: int = 0
    patch: int = 0
    channels: int = 3
    classes: int = 0

    def __post_init__(self) -> None:
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        required = ["embed", "layers", "heads", "mlp", "max_length"]
        required += {"vision": ["image", "patch", "classes"], "encoder-decoder": ["vocab", "decoder_layers"]}.get(
            self.kind, ["vocab"]
        )
        for name in required:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.family}: {name}={value!r}; it must be a whole number of at least 1")
        if self.latent and not self.head_dim:
            object.__setattr__(self, "head_dim", self.latent.nope_dim + self.latent.rope_dim)
        if not self.head_dim:
            self._divides("embed", "heads")
            object.__setattr__(self, "head_dim", self.embed // self.heads)
        self._divides("heads", "kv_heads")
        if self.kind == "vision":
            self._divides("image", "patch")
        if self.position == "rotary" and self.rope_dim % 2:
            raise ValueError(f"{self.family}: rotary positions turn pairs, and {self.rope_dim} dimensions are odd")
        if self.rope_dim > self.head_dim:
            raise ValueError(
                f"{self.family}: rotary_dim={self.rotary_dim} is more than head_dim={self.head_dim}; nearest: 0 (all)"
            )
        if (e := self.experts) is not None:
            if not 1 <= e.per_token <= e.count:
                raise ValueError(f"{self.family}: {e.per_token} experts per token of {e.count}; nearest: {e.count}")
            if e.count % e.groups or not 1 <= e.top_groups <= e.groups:
                raise ValueError(
                    f"{self.family}: {e.count} experts in {e.groups} groups of which {e.top_groups} are used: "
                    "groups must divide experts and hold top_groups"
                )
            if e.dense_layers >= self.layers:
                raise ValueError(f"{self.family}: dense_layers={e.dense_layers} leaves none of {self.layers} layers")

    def _divides(self, whole: str, part: str) -> None:
        a, b = getattr(self, whole), getattr(self, part)
        if a % b:
            divisors = [d for d in range(1, a + 1) if a % d == 0]
            near = [*[d for d in divisors if d < b][-1:], *[d for d in divisors if d > b][:1]]
            raise ValueError(
                f"{self.family}: {part}={b} does not divide {whole}={a}; nearest that do: "
                f"{' and '.join(str(d) for d in near)}"
            )

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ModelConfig:
        """Undo `to_record`; fields that are not there have their defaults.

        Raises:
            ValueError: fields that it does not know or lacks, sizes that do not fit.

        >>> config = ModelConfig("gpt", "decoder", embed=64, layers=2, heads=4, mlp=256, vocab=1000)
        >>> ModelConfig.from_record(config.to_record()) == config
        True
        """
        values = dict(record)
        for name, kind in (("experts", Experts), ("latent", Latent), ("rope_scaling", RopeScaling)):
            if values.get(name) is not None:
                values[name] = _read(kind, values[name], name)
        return _read(cls, values, "the model's record")

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.latent.rope_dim if self.latent else self.rotary_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """Factor on the scores of attention."""
        scale = self.attention_scale or self.head_dim**-0.5
        s = self.rope_scaling
        if self.latent and s and s.kind == "yarn" and s.mscale_all_dim:
            # DeepSeek has YaRN's temperature on the scores, not only on the rotary part.
            scale *= yarn_scale(s.factor, s.mscale_all_dim) ** 2
        return scale

    @property
    def windows(self) -> tuple[int, ...]:
        """How far each layer looks back, 0 for all; empty where all layers are alike."""
        if not self.window or not (self.global_every or self.global_first):
            return ()

        def everything(layer: int) -> bool:
            return layer < self.global_first or (bool(self.global_every) and (layer + 1) % self.global_every == 0)

        return tuple(0 if everything(layer) else self.window for layer in range(self.layers))

    @property
    def dense_layers(self) -> int:
        """Number of first layers that differ from the others; 0 where all are alike."""
        return self.experts.dense_layers if self.experts else 0


def _read(kind: Any, record: Mapping[str, Any], what: str) -> Any:
    """Make a dataclass of a record; JSON's lists become tuples."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    unknown, missing = sorted(set(record) - set(fields)), sorted(set(required) - set(record))
    if unknown or missing:
        raise ValueError(f"{what} has unknown {unknown} and lacks {missing}; it has {', '.join(sorted(fields))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def yarn_scale(factor: float, weight: float) -> float:
    """YaRN's temperature (arXiv 2309.00071) for a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
