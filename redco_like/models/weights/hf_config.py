"""`ModelConfig` -> Hugging Face's `config.json`: what `redco_like.models.from_hf` reads, written.

data = to_hf(architecture("llama-3-8b"), dtype="bfloat16")

Rotary settings are written as versions 4 and 5 of transformers both read them. What is written is read again and
compared, so that nothing that a family cannot say is lost.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

from redco_like.models.config import Experts, Latent, ModelConfig
from redco_like.models.hf import from_hf

_CLASSES = {
    "bart": "BartForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gptj": "GPTJForCausalLM",
    "llama": "LlamaForCausalLM",
    "mbart": "MBartForConditionalGeneration",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mpt": "MptForCausalLM",
    "mt5": "MT5ForConditionalGeneration",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}


def to_hf(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        dtype: of the weights beside it.

    Raises:
        ValueError: a family that is not written, or fields that its `config.json` cannot say; names them.
    """
    if config.family not in _WRITERS:
        near = difflib.get_close_matches(config.family, _WRITERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no config.json is written for model_type {config.family!r}{hint}; known: {', '.join(sorted(_WRITERS))}"
        )
    data = {
        "model_type": config.family,
        "architectures": [_CLASSES[config.family]],
        **{name: value for name, value in _WRITERS[config.family](config).items() if value is not _LEFT_OUT},
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
    }
    lost = differences(config, from_hf(data))
    if lost:
        raise ValueError(
            f"a config.json of model_type {config.family!r} cannot say "
            + ", ".join(f"{name}={mine!r} (it would be read as {theirs!r})" for name, mine, theirs in lost)
        )
    return data


def differences(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Fields of which two configurations do not compute the same, with both values."""
    first, second = _plain(a), _plain(b)
    return [(name, first[name], second[name]) for name in first if not _equal(first[name], second[name])]


def _plain(c: ModelConfig) -> dict[str, Any]:
    """The record, without what makes no difference to what the model computes."""
    changes: dict[str, Any] = {"rotary_dim": c.rope_dim if c.position == "rotary" else 0}
    if (e := c.experts) is not None:
        changes["experts"] = dataclasses.replace(e, balance=0.0)  # which only training reads
        changes["mlp"] = c.mlp if e.dense_layers else e.mlp
    return dataclasses.replace(c, **changes).to_record()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-12)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b


_LEFT_OUT = object()
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
_GPT_ACTIVATIONS = _ACTIVATIONS | {"gelu_tanh": "gelu_new"}


def _sizes(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.embed,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "max_position_embeddings": c.max_length,
    }


def _rope(c: ModelConfig) -> dict[str, Any]:
    """Base, partial rotation and stretching."""
    data: dict[str, Any] = {"rope_theta": c.rope_theta}
    if c.rope_dim != c.head_dim and not c.latent:
        data["partial_rotary_factor"] = c.rope_dim / c.head_dim
    if (s := c.rope_scaling) is None:
        return data
    scaling: dict[str, Any] = {"rope_type": s.kind, "type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        scaling["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        scaling |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        scaling |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        scaling |= {n: v for n, v in (("mscale", s.mscale), ("mscale_all_dim", s.mscale_all_dim)) if v}
    if s.attention_factor:
        scaling["attention_factor"] = s.attention_factor
    if s.kind == "longrope":
        scaling |= {"short_factor": list(s.short_factor), "long_factor": list(s.long_factor)}
        data["original_max_position_embeddings"] = s.original_length
    return {**data, "rope_scaling": scaling}


def _llama(c: ModelConfig, **more: Any) -> dict[str, Any]:
    return {
        **_sizes(c),
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": _ACTIVATIONS[c.activation],
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        **_rope(c),
        **more,
    }


def _windowed(c: ModelConfig, **more: Any) -> dict[str, Any]:
    return _llama(c, attention_bias=_LEFT_OUT, mlp_bias=_LEFT_OUT, sliding_window=c.window or None, **more)


def _mixtral(c: ModelConfig) -> dict[str, Any]:
    e = _experts(c)
    return _windowed(
        c,
        num_local_experts=e.count,
        num_experts_per_tok=e.per_token,
        router_aux_loss_coef=e.balance,
        intermediate_size=e.mlp,
    )


def _phi3(c: ModelConfig) -> dict[str, Any]:
    # The class has the padding token of the published model, which other vocabularies may not have.
    return {"original_max_position_embeddings": c.max_length, "pad_token_id": None, **_windowed(c)}


def _qwen2(c: ModelConfig, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict(attention_bias=_LEFT_OUT, mlp_bias=_LEFT_OUT, use_sliding_window=bool(c.window))
    if c.window:
        plain |= {"sliding_window": c.window, "max_window_layers": c.global_first, "layer_types": _layer_types(c)}
    return _llama(c, **{**plain, **more})


def _layer_types(c: ModelConfig) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in c.windows or [c.window] * c.layers]


def _qwen3(c: ModelConfig, **more: Any) -> dict[str, Any]:
    return _qwen2(c, attention_bias=c.qkv_bias, **more)


def _qwen_experts(c: ModelConfig) -> dict[str, Any]:
    e = _experts(c)
    return {
        "num_experts": e.count,
        "num_experts_per_tok": e.per_token,
        "moe_intermediate_size": e.mlp,
        "norm_topk_prob": e.normalise,
        "router_aux_loss_coef": e.balance,
        **({"shared_expert_intermediate_size": e.shared_mlp} if e.shared_mlp else {}),
    }


def _gemma(c: ModelConfig, **more: Any) -> dict[str, Any]:
    activation = _ACTIVATIONS[c.activation]
    return _llama(c, mlp_bias=_LEFT_OUT, hidden_act=activation, hidden_activation=activation, **more)


def _gemma2(c: ModelConfig, **more: Any) -> dict[str, Any]:
    scalar = c.attention_scale**-2 if c.attention_scale else c.head_dim
    return _gemma(
        c,
        sliding_window=c.window,
        layer_types=_layer_types(c),
        query_pre_attn_scalar=round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar,
        attn_logit_softcapping=c.attention_softcap or None,
        final_logit_softcapping=c.logit_softcap or None,
        **more,
    )


def _gemma3(c: ModelConfig) -> dict[str, Any]:
    return _gemma2(c, rope_local_base_freq=c.local_theta or c.rope_theta)


def _gpt(c: ModelConfig, **more: Any) -> dict[str, Any]:
    return {
        **{"vocab_size": c.vocab, "n_embd": c.embed, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.mlp},
        **{"n_positions": c.max_length, "activation_function": _GPT_ACTIVATIONS[c.activation]},
        **{"layer_norm_epsilon": c.norm_eps, **more},
    }


def _neox(c: ModelConfig) -> dict[str, Any]:
    return {
        **_sizes(c),
        **_rope(c),
        "hidden_act": _GPT_ACTIVATIONS[c.activation],
        "layer_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "use_parallel_residual": c.block == "parallel",
        "rotary_pct": c.rope_dim / c.head_dim,
        "rotary_emb_base": c.rope_theta,
        "partial_rotary_factor": _LEFT_OUT,
        "rope_theta": _LEFT_OUT,
    }


def _opt(c: ModelConfig) -> dict[str, Any]:
    sizes = {name: value for name, value in _sizes(c).items() if name != "intermediate_size"}
    return {
        **sizes,
        "ffn_dim": c.mlp,
        "activation_function": _GPT_ACTIVATIONS[c.activation],
        "word_embed_proj_dim": c.token_width or c.embed,
        "do_layer_norm_before": c.block != "post",
        "enable_bias": c.qkv_bias,
    }


def _mpt(c: ModelConfig) -> dict[str, Any]:
    ratio = c.mlp / c.embed
    return {
        **{"vocab_size": c.vocab, "d_model": c.embed, "n_layers": c.layers, "n_heads": c.heads},
        **{"max_seq_len": c.max_length, "expansion_ratio": int(ratio) if ratio == int(ratio) else ratio},
        **{"no_bias": not c.mlp_bias, "layer_norm_epsilon": c.norm_eps},
        "attn_config": {"alibi": c.position == "alibi", "softmax_scale": c.attention_scale or None},
    }


def _phi(c: ModelConfig) -> dict[str, Any]:
    return {
        **_sizes(c),
        **_rope(c),
        "num_key_value_heads": c.kv_heads,
        "hidden_act": _GPT_ACTIVATIONS[c.activation],
        "layer_norm_eps": c.norm_eps,
        "partial_rotary_factor": c.rope_dim / c.head_dim,
    }


def _deepseek(c: ModelConfig) -> dict[str, Any]:
    e, m = _experts(c), _latent(c)
    v3 = c.family == "deepseek_v3"
    return {
        **_llama(c, head_dim=_LEFT_OUT, mlp_bias=_LEFT_OUT, num_key_value_heads=c.heads),
        **{"q_lora_rank": m.query_rank or None, "kv_lora_rank": m.kv_rank, "v_head_dim": m.value_dim},
        **{"qk_nope_head_dim": m.nope_dim, "qk_rope_head_dim": m.rope_dim},
        **{"n_routed_experts": e.count, "num_experts_per_tok": e.per_token, "moe_intermediate_size": e.mlp},
        **{"n_shared_experts": e.shared_mlp // e.mlp, "first_k_dense_replace": e.dense_layers, "moe_layer_freq": 1},
        **{"n_group": e.groups, "topk_group": e.top_groups, "routed_scaling_factor": e.scale},
        "topk_method": "noaux_tc" if v3 else "greedy" if e.groups == 1 else "group_limited_greedy",
        "norm_topk_prob": e.normalise,
        "scoring_func": e.router,
        **({"rope_interleave": c.rope_interleaved} if v3 else {"aux_loss_alpha": e.balance}),
    }


def _t5(c: ModelConfig) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu"}.get(c.activation, c.activation)
    return {
        **{"vocab_size": c.vocab, "d_model": c.embed, "d_kv": c.head_dim, "d_ff": c.mlp, "num_heads": c.heads},
        **{"num_layers": c.layers, "num_decoder_layers": c.decoder_layers, "layer_norm_epsilon": c.norm_eps},
        **{"relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.bucket_distance},
        **{"n_positions": c.max_length, "feed_forward_proj": f"gated-{activation}" if c.gated else activation},
        "scale_decoder_outputs": c.tied,
        "decoder_start_token_id": c.start_token,
    }


def _bart(c: ModelConfig) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        **{"vocab_size": c.vocab, "d_model": c.embed, "max_position_embeddings": c.max_length},
        **{"encoder_layers": c.layers, "decoder_layers": c.decoder_layers},
        **{f"{side}_attention_heads": c.heads for side in sides},
        **{f"{side}_ffn_dim": c.mlp for side in sides},
        "activation_function": _GPT_ACTIVATIONS[c.activation],
        "scale_embedding": c.embed_scale,
        "decoder_start_token_id": c.start_token,
    }


def _bert(c: ModelConfig) -> dict[str, Any]:
    activation = _GPT_ACTIVATIONS[c.activation]
    return {**_sizes(c), "type_vocab_size": c.types, "hidden_act": activation, "layer_norm_eps": c.norm_eps}


def _vit(c: ModelConfig) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(c.classes)}
    sizes = {n: v for n, v in _sizes(c).items() if n not in ("vocab_size", "max_position_embeddings")}
    return {
        **sizes,
        **{"image_size": c.image, "patch_size": c.patch, "num_channels": c.channels, "qkv_bias": c.qkv_bias},
        **{"hidden_act": _GPT_ACTIVATIONS[c.activation], "layer_norm_eps": c.norm_eps},
        **{"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}},
    }


def _experts(c: ModelConfig) -> Experts:
    if c.experts is None:
        raise ValueError(f"model_type {c.family!r} has experts, and this configuration has none")
    return c.experts


def _latent(c: ModelConfig) -> Latent:
    if c.latent is None:
        raise ValueError(f"model_type {c.family!r} has latent attention, and this configuration has none")
    return c.latent


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "bart": _bart,
    "bert": _bert,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt,
    "gpt_neox": _neox,
    "gptj": lambda c: _gpt(c, rotary_dim=c.rope_dim),
    "llama": _llama,
    "mbart": _bart,
    "mistral": _windowed,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "mt5": _t5,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_moe": lambda c: _qwen2(c, **_qwen_experts(c)),
    "qwen3": _qwen3,
    "qwen3_moe": lambda c: _qwen3(c, **_qwen_experts(c)),
    "t5": _t5,
    "vit": _vit,
}
