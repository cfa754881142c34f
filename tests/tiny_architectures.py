"""Published architectures with small sizes, one of each form: what a form is stays, what is only large shrinks."""

import dataclasses

import jax
import numpy as np

from redco_like.models import Latent, ModelConfig, architecture

LENGTH = 16

DECODERS = (
    "gpt2",
    "gpt-j-6b",
    "gpt-neox-20b",
    "opt-125m",
    "opt-350m",
    "mpt-7b",
    "llama-3-8b",
    "mistral-7b",
    "qwen2-7b",
    "qwen3-8b",
    "gemma-2b",
    "gemma-2-2b",
    "gemma-3-1b",
    "phi-2",
    "mixtral-8x7b",
    "qwen1.5-moe-a2.7b",
    "deepseek-v2",
    "deepseek-v3",
)
OTHERS = ("t5-base", "t5-v1.1-base", "bart-base", "mbart-large", "bert-base", "vit-b16")
FAMILIES = DECODERS + OTHERS
ALIKE = frozenset(
    {"gpt-neox-20b", "opt-125m", "opt-350m", "qwen2-7b", "gemma-2b", "deepseek-v2", "t5-base", "mbart-large"}
)
"""Made of the same parts as another one; where a test compiles, these are marked slow."""


def tiny(name: str, **changes) -> ModelConfig:
    """The architecture `name` with a width of 32, two layers, four heads and a vocabulary of 56."""
    config = architecture(name)
    small = {"embed": 32, "layers": 2, "heads": 4, "mlp": 48, "max_length": 24, "head_dim": 8}
    small["kv_heads"] = 2 if config.kv_heads < config.heads else 4
    if config.vocab:
        small["vocab"] = 56
    if config.token_width:
        small["token_width"] = 20
    if config.kind == "encoder-decoder":
        small |= {"decoder_layers": 2, "buckets": 8, "bucket_distance": 16}
    if config.kind == "vision":
        small |= {"image": 16, "patch": 4, "classes": 10}
    if config.rotary_dim:
        small["rotary_dim"] = 4
    if config.window:
        small |= {"window": 5, "global_every": min(config.global_every, 2)}
    if config.rope_scaling:
        small["rope_scaling"] = dataclasses.replace(config.rope_scaling, original_length=8, factor=2.0)
    if config.latent:
        rank = 12 if config.latent.query_rank else 0
        small |= {"latent": Latent(rank, kv_rank=20, nope_dim=8, rope_dim=4, value_dim=8), "head_dim": 12}
    if (e := config.experts) is not None:
        groups, shared = (4, 2) if e.groups > 1 else (1, 1), 24 if e.shared_mlp else 0
        small["experts"] = dataclasses.replace(
            e,
            **{"count": 8, "per_token": 2, "mlp": 24, "shared_mlp": shared, "balance": 0.0},
            **{"groups": groups[0], "top_groups": groups[1], "dense_layers": min(e.dense_layers, 1)},
        )
    return dataclasses.replace(config, **{**small, **changes})


def make_params(init_fn, seed: int = 0):
    """Random parameters without compiling `init_fn`; large enough that attention is far from flat."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init_fn, jax.eval_shape(jax.random.key, 0))

    def draw(path, x):
        noise = rng.normal(size=x.shape).astype(np.float32)
        return 1 + 0.1 * noise if path[-1].key == "scale" else 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_batch(config: ModelConfig, rows: int = 4, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Random numbers in the form that the model's loss reads."""
    rng = np.random.default_rng(seed)
    if config.kind == "vision":
        images = rng.normal(size=(rows, config.image, config.image, config.channels)).astype(np.float32)
        return {"images": images, "labels": rng.integers(0, config.classes, rows).astype(np.int32)}
    first = "source" if config.kind == "encoder-decoder" else "tokens"
    return {name: rng.integers(0, config.vocab, (rows, length)).astype(np.int32) for name in (first, "labels")}
