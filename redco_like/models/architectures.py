"""Published architectures by name, with the sizes of their published configurations.

    architecture("llama-3-70b")

Sources: the `config.json` next to the weights of each model on Hugging Face, the papers' tables for GPT-3, and the
configurations of `google-research/vision_transformer` and `scaling_vit`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

from redco_like.models.config import Experts, Latent, ModelConfig, RopeScaling


def architecture(name: str) -> ModelConfig:
    """The configuration of a published architecture.

    >>> architecture("llama-3-8b").kv_heads
    8

    Raises:
        ValueError: unknown; lists the nearest names.
    """
    known = architectures()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
    raise ValueError(
        f"no architecture is called {name!r}; {hint}. A Hugging Face config.json or a run file (.py) works as well"
    )


def gpt2(embed: int, layers: int, heads: int, **changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            **dict(family="gpt2", kind="decoder", vocab=50257, embed=embed, layers=layers, heads=heads, mlp=4 * embed),
            **dict(max_length=1024, activation="gelu_tanh", position="learned"),
            **dict(qkv_bias=True, out_bias=True, mlp_bias=True),
            **changes,
        }
    )


def gpt_neox(embed: int, layers: int, heads: int, **changes: Any) -> ModelConfig:
    sizes = dict(vocab=50304, embed=embed, layers=layers, heads=heads, mlp=4 * embed, max_length=2048, tied=False)
    form = dict(block="parallel", position="rotary", rotary_dim=embed // heads // 4, activation="gelu")
    biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
    return ModelConfig(**{**dict(family="gpt_neox", kind="decoder"), **sizes, **form, **biases, **changes})


def opt(embed: int, layers: int, heads: int) -> ModelConfig:
    return gpt2(embed, layers, heads, family="opt", vocab=50272, max_length=2048, activation="relu", position_offset=2)


def mpt(embed: int, layers: int, heads: int, length: int) -> ModelConfig:
    sizes = dict(vocab=50432, embed=embed, layers=layers, heads=heads, mlp=4 * embed, max_length=length)
    return ModelConfig(**{**dict(family="mpt", kind="decoder", norm_bias=False, position="alibi"), **sizes})


def llama(embed: int, layers: int, heads: int, mlp: int, **changes: Any) -> ModelConfig:
    sizes = dict(vocab=32000, embed=embed, layers=layers, heads=heads, mlp=mlp, max_length=2048, tied=False)
    form = dict(norm="rms", norm_eps=1e-5, activation="silu", gated=True, position="rotary")
    return ModelConfig(**{**dict(family="llama", kind="decoder"), **sizes, **form, **changes})


def llama3(embed: int, layers: int, heads: int, mlp: int, *, stretch: float = 0.0, **changes: Any) -> ModelConfig:
    more: dict[str, Any] = dict(vocab=128256, kv_heads=8, max_length=8192, rope_theta=500000.0)
    if stretch:
        more["max_length"] = 131072
        more["rope_scaling"] = RopeScaling("llama3", factor=stretch, original_length=8192)
    return llama(embed, layers, heads, mlp, **{**more, **changes})


def qwen2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **changes: Any) -> ModelConfig:
    more = dict(family="qwen2", vocab=151936, kv_heads=kv_heads, max_length=32768, rope_theta=1e6, norm_eps=1e-6)
    return llama(embed, layers, heads, mlp, **{**more, "qkv_bias": True, **changes})


def qwen3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **changes: Any) -> ModelConfig:
    more = dict(family="qwen3", qkv_bias=False, qk_norm=True, head_dim=128, max_length=40960)
    return qwen2(embed, layers, heads, kv_heads, mlp, **{**more, **changes})


def gemma(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **changes: Any) -> ModelConfig:
    more = dict(family="gemma", vocab=256000, kv_heads=kv_heads, head_dim=256, max_length=8192, tied=True)
    form = dict(norm="rms_plus_one", norm_eps=1e-6, activation="gelu_tanh", embed_scale=True)
    return llama(embed, layers, heads, mlp, **{**more, **form, **changes})


def gemma2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, query: int, **changes: Any) -> ModelConfig:
    form = dict(block="sandwich", attention_softcap=50.0, logit_softcap=30.0, attention_scale=query**-0.5)
    more = dict(family="gemma2", window=4096, global_every=2)
    return gemma(embed, layers, heads, kv_heads, mlp, **{**more, **form, **changes})


def gemma3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **changes: Any) -> ModelConfig:
    form = dict(block="sandwich", qk_norm=True, attention_scale=256**-0.5, global_every=6, window=1024)
    rope = dict(rope_theta=1e6, local_theta=1e4, rope_scaling=RopeScaling("linear", 8.0), max_length=131072)
    more = dict(family="gemma3_text", vocab=262208)
    return gemma(embed, layers, heads, kv_heads, mlp, **{**more, **form, **rope, **changes})


def phi(embed: int, layers: int, heads: int, rotary_dim: int) -> ModelConfig:
    form: dict[str, Any] = dict(
        family="phi",
        vocab=51200,
        head_bias=True,
        block="parallel_one_norm",
        rotary_dim=rotary_dim,
        activation="gelu_tanh",
    )
    return gpt_neox(embed, layers, heads, **form)


def t5(embed: int, layers: int, heads: int, mlp: int, head_dim: int, **changes: Any) -> ModelConfig:
    sizes = dict(vocab=32128, embed=embed, layers=layers, decoder_layers=layers, heads=heads, mlp=mlp)
    form = dict(norm="rms", norm_eps=1e-6, activation="relu", position="buckets", attention_scale=1.0, max_length=512)
    return ModelConfig(**{**dict(family="t5", kind="encoder-decoder", head_dim=head_dim), **sizes, **form, **changes})


def t5_v1_1(embed: int, layers: int, heads: int, mlp: int) -> ModelConfig:
    return t5(embed, layers, heads, mlp, 64, gated=True, activation="gelu_tanh", tied=False)


def bart(embed: int, layers: int, heads: int, **changes: Any) -> ModelConfig:
    sizes = dict(vocab=50265, embed=embed, layers=layers, decoder_layers=layers, heads=heads, mlp=4 * embed)
    form = dict(block="post", final_norm=False, position="learned", position_offset=2, max_length=1024, start_token=2)
    biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True)
    return ModelConfig(**{**dict(family="bart", kind="encoder-decoder"), **sizes, **form, **biases, **changes})


def bert(embed: int, layers: int, heads: int, *, vocab: int = 30522) -> ModelConfig:
    sizes = dict(vocab=vocab, embed=embed, layers=layers, heads=heads, mlp=4 * embed, max_length=512, types=2)
    form = dict(block="post", norm_eps=1e-12, position="learned", qkv_bias=True, out_bias=True, mlp_bias=True)
    return ModelConfig(**{**dict(family="bert", kind="encoder"), **sizes, **form})


def vit(embed: int, layers: int, heads: int, mlp: int, patch: int) -> ModelConfig:
    sizes = dict(embed=embed, layers=layers, heads=heads, mlp=mlp, image=224, patch=patch, classes=1000)
    form = dict(norm_eps=1e-6, position="learned", qkv_bias=True, out_bias=True, mlp_bias=True)
    return ModelConfig(**{**dict(family="vit", kind="vision"), **sizes, **form})


def deepseek(embed: int, layers: int, heads: int, mlp: int, experts: Experts, query_rank: int, **changes: Any):
    latent = Latent(query_rank=query_rank, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    more = dict(family="deepseek_v2", vocab=102400, norm_eps=1e-6, rope_interleaved=True)
    return llama(embed, layers, heads, mlp, **{**more, **dict(experts=experts, latent=latent), **changes})


@functools.cache
def architectures() -> dict[str, ModelConfig]:
    """All architectures by name."""
    deep = RopeScaling("yarn", factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707)
    deep3 = RopeScaling("yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    models = {
        "gpt2": gpt2(768, 12, 12),
        "gpt2-medium": gpt2(1024, 24, 16),
        "gpt2-large": gpt2(1280, 36, 20),
        "gpt2-xl": gpt2(1600, 48, 25),
        "gpt3-125m": gpt2(768, 12, 12, max_length=2048),
        "gpt3-350m": gpt2(1024, 24, 16, max_length=2048),
        "gpt3-760m": gpt2(1536, 24, 16, max_length=2048),
        "gpt3-1.3b": gpt2(2048, 24, 16, max_length=2048),
        "gpt3-2.7b": gpt2(2560, 32, 32, max_length=2048),
        "gpt3-6.7b": gpt2(4096, 32, 32, max_length=2048),
        "gpt3-13b": gpt2(5120, 40, 40, max_length=2048),
        "gpt3-175b": gpt2(12288, 96, 96, max_length=2048),
        "gpt-j-6b": gpt_neox(
            *(4096, 28, 16),
            **dict(family="gptj", vocab=50400, block="parallel_one_norm", rotary_dim=64, rope_interleaved=True),
            **dict(activation="gelu_tanh", qkv_bias=False, out_bias=False, head_bias=True),
        ),
        "gpt-neox-20b": gpt_neox(6144, 44, 64, vocab=50432),
        "pythia-70m": gpt_neox(512, 6, 8),
        "pythia-160m": gpt_neox(768, 12, 12),
        "pythia-410m": gpt_neox(1024, 24, 16),
        "pythia-1b": gpt_neox(2048, 16, 8),
        "pythia-1.4b": gpt_neox(2048, 24, 16),
        "pythia-2.8b": gpt_neox(2560, 32, 32),
        "pythia-6.9b": gpt_neox(4096, 32, 32, vocab=50432),
        "pythia-12b": gpt_neox(5120, 36, 40, vocab=50688),
        "opt-125m": opt(768, 12, 12),
        "opt-350m": dataclasses.replace(opt(1024, 24, 16), block="post", final_norm=False, token_width=512),
        "opt-1.3b": opt(2048, 24, 32),
        "opt-2.7b": opt(2560, 32, 32),
        "opt-6.7b": opt(4096, 32, 32),
        "opt-13b": opt(5120, 40, 40),
        "opt-30b": opt(7168, 48, 56),
        "opt-66b": opt(9216, 64, 72),
        "opt-175b": opt(12288, 96, 96),
        "mpt-7b": mpt(4096, 32, 32, 2048),
        "mpt-30b": mpt(7168, 48, 64, 8192),
        "llama-7b": llama(4096, 32, 32, 11008, norm_eps=1e-6),
        "llama-13b": llama(5120, 40, 40, 13824, norm_eps=1e-6),
        "llama-30b": llama(6656, 60, 52, 17920, norm_eps=1e-6),
        "llama-65b": llama(8192, 80, 64, 22016),
        "llama-2-7b": llama(4096, 32, 32, 11008, max_length=4096),
        "llama-2-13b": llama(5120, 40, 40, 13824, max_length=4096),
        "llama-2-70b": llama(8192, 80, 64, 28672, max_length=4096, kv_heads=8),
        "llama-3-8b": llama3(4096, 32, 32, 14336),
        "llama-3-70b": llama3(8192, 80, 64, 28672),
        "llama-3.1-8b": llama3(4096, 32, 32, 14336, stretch=8.0),
        "llama-3.1-70b": llama3(8192, 80, 64, 28672, stretch=8.0),
        "llama-3.1-405b": llama3(16384, 126, 128, 53248, stretch=8.0),
        "llama-3.2-1b": llama3(2048, 16, 32, 8192, stretch=32.0, tied=True),
        "llama-3.2-3b": llama3(3072, 28, 24, 8192, stretch=32.0, tied=True),
        "mistral-7b": llama(4096, 32, 32, 14336, family="mistral", kv_heads=8, max_length=32768, window=4096),
        "mixtral-8x7b": llama(
            *(4096, 32, 32, 14336),
            **dict(family="mixtral", kv_heads=8, max_length=32768, rope_theta=1e6, experts=Experts(8, 2, 14336)),
        ),
        "mixtral-8x22b": llama(
            *(6144, 56, 48, 16384),
            **dict(family="mixtral", kv_heads=8, max_length=65536, rope_theta=1e6, experts=Experts(8, 2, 16384)),
        ),
        "qwen2-0.5b": qwen2(896, 24, 14, 2, 4864, tied=True),
        "qwen2-1.5b": qwen2(1536, 28, 12, 2, 8960, tied=True),
        "qwen2-7b": qwen2(3584, 28, 28, 4, 18944, vocab=152064),
        "qwen2-72b": qwen2(8192, 80, 64, 8, 29568, vocab=152064),
        "qwen2.5-0.5b": qwen2(896, 24, 14, 2, 4864, tied=True),
        "qwen2.5-1.5b": qwen2(1536, 28, 12, 2, 8960, tied=True),
        "qwen2.5-3b": qwen2(2048, 36, 16, 2, 11008, tied=True),
        "qwen2.5-7b": qwen2(3584, 28, 28, 4, 18944, vocab=152064),
        "qwen2.5-14b": qwen2(5120, 48, 40, 8, 13824, vocab=152064),
        "qwen2.5-32b": qwen2(5120, 64, 40, 8, 27648, vocab=152064),
        "qwen2.5-72b": qwen2(8192, 80, 64, 8, 29568, vocab=152064),
        "qwen3-0.6b": qwen3(1024, 28, 16, 8, 3072, tied=True),
        "qwen3-1.7b": qwen3(2048, 28, 16, 8, 6144, tied=True),
        "qwen3-4b": qwen3(2560, 36, 32, 8, 9728, tied=True),
        "qwen3-8b": qwen3(4096, 36, 32, 8, 12288),
        "qwen3-14b": qwen3(5120, 40, 40, 8, 17408),
        "qwen3-32b": qwen3(5120, 64, 64, 8, 25600),
        "qwen1.5-moe-a2.7b": qwen2(
            *(2048, 24, 16, 16, 5632),
            **dict(family="qwen2_moe", max_length=8192),
            experts=Experts(60, 4, 1408, shared_mlp=5632, shared_gate=True, normalise=False, balance=0.001),
        ),
        "qwen3-30b-a3b": qwen3(2048, 48, 32, 4, 6144, family="qwen3_moe", experts=Experts(128, 8, 768, balance=0.001)),
        "qwen3-235b-a22b": qwen3(
            4096, 94, 64, 4, 12288, family="qwen3_moe", experts=Experts(128, 8, 1536, balance=0.001)
        ),
        "gemma-2b": gemma(2048, 18, 8, 1, 16384),
        "gemma-7b": gemma(3072, 28, 16, 16, 24576),
        "gemma-2-2b": gemma2(2304, 26, 8, 4, 9216, 256),
        "gemma-2-9b": gemma2(3584, 42, 16, 8, 14336, 256),
        "gemma-2-27b": gemma2(4608, 46, 32, 16, 36864, 144, head_dim=128),
        "gemma-3-1b": gemma3(1152, 26, 4, 1, 6912, vocab=262144, window=512, max_length=32768, rope_scaling=None),
        "gemma-3-4b": gemma3(2560, 34, 8, 4, 10240),
        "gemma-3-12b": gemma3(3840, 48, 16, 8, 15360),
        "gemma-3-27b": gemma3(5376, 62, 32, 16, 21504, head_dim=128, attention_scale=168**-0.5),
        "phi-1.5": phi(2048, 24, 32, 32),
        "phi-2": phi(2560, 32, 32, 32),
        "phi-3-mini": llama(3072, 32, 32, 8192, family="phi3", vocab=32064, max_length=4096, window=2047),
        "deepseek-v2-lite": deepseek(
            *(2048, 27, 16, 10944),
            Experts(64, 6, 1408, shared_mlp=2816, normalise=False, dense_layers=1, balance=0.001),
            0,
            max_length=163840,
            rope_scaling=deep,
        ),
        "deepseek-v2": deepseek(
            *(5120, 60, 128, 12288),
            Experts(160, 6, 1536, 3072, normalise=False, scale=16.0, groups=8, top_groups=3, dense_layers=1),
            1536,
            max_length=163840,
            rope_scaling=deep,
        ),
        "deepseek-v3": deepseek(
            *(7168, 61, 128, 18432),
            Experts(256, 8, 2048, 2048, router="sigmoid", scale=2.5, groups=8, top_groups=4, dense_layers=3),
            1536,
            family="deepseek_v3",
            vocab=129280,
            max_length=163840,
            rope_scaling=deep3,
        ),
        "t5-small": t5(512, 6, 8, 2048, 64),
        "t5-base": t5(768, 12, 12, 3072, 64),
        "t5-large": t5(1024, 24, 16, 4096, 64),
        "t5-3b": t5(1024, 24, 32, 16384, 128),
        "t5-11b": t5(1024, 24, 128, 65536, 128),
        "t5-v1.1-small": t5_v1_1(512, 8, 6, 1024),
        "t5-v1.1-base": t5_v1_1(768, 12, 12, 2048),
        "t5-v1.1-large": t5_v1_1(1024, 24, 16, 2816),
        "t5-v1.1-xl": t5_v1_1(2048, 24, 32, 5120),
        "t5-v1.1-xxl": t5_v1_1(4096, 24, 64, 10240),
        "bart-base": bart(768, 6, 12),
        "bart-large": bart(1024, 12, 16),
        "bart-large-cnn": bart(1024, 12, 16, vocab=50264),
        "mbart-large": bart(
            *(1024, 12, 16),
            **dict(family="mbart", vocab=250027, block="pre", final_norm=True, embed_scale=True),
        ),
        "bert-base": bert(768, 12, 12),
        "bert-large": bert(1024, 24, 16),
        "vit-b16": vit(768, 12, 12, 3072, 16),
        "vit-l16": vit(1024, 24, 16, 4096, 16),
        "vit-h14": vit(1280, 32, 16, 5120, 14),
        "vit-g14": vit(1408, 40, 16, 6144, 14),
        "vit-bigg14": vit(1664, 48, 16, 8192, 14),
    }
    return models
