"""Hugging Face's `config.json` -> `ModelConfig`, by its `model_type`.

config = read_config("Llama-3.1-8B/config.json")
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redco_like.models.config import Experts, Latent, ModelConfig
from redco_like.models.hf_keys import ACTIVATIONS, Keys, rope_parameters, rotary_fields, windows


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        ValueError: no such file, no JSON, a `model_type` that is not supported, or keys that are missing.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
            + (" (the file ends there: is it truncated?)" if error.pos >= len(error.doc.rstrip()) - 1 else "")
        ) from error
    try:
        return from_hf(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_hf(data: Any) -> ModelConfig:
    """The configuration that a `config.json` describes.

    Raises:
        ValueError: not an object, an unsupported `model_type`, or missing keys.
    """
    if not isinstance(data, dict):
        raise ValueError(f"the configuration is a {type(data).__name__}, not an object with a model_type")
    kind = data.get("model_type")
    supported = ", ".join(sorted(_READERS))
    if kind is None:
        raise ValueError(f"the configuration has no model_type; supported: {supported}")
    if kind not in _READERS:
        near = difflib.get_close_matches(str(kind), _READERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"model_type {kind!r} is not supported{hint}; supported: {supported}")
    keys = Keys(data)
    fields = _READERS[kind](keys)
    if keys.missing:
        raise ValueError(f"model_type {kind!r} lacks {', '.join(dict.fromkeys(keys.missing))}")
    return ModelConfig(**{"family": kind, "kind": "decoder", **fields})


def _sizes(k: Keys) -> dict[str, Any]:
    return {
        "vocab": k.size("vocab_size"),
        "embed": k.size("hidden_size"),
        "layers": k.size("num_hidden_layers"),
        "heads": k.size("num_attention_heads"),
        "mlp": k.size("intermediate_size"),
        "max_length": k.size("max_position_embeddings"),
    }


def _gpt_sizes(k: Keys) -> dict[str, Any]:
    embed = k.size("n_embd")
    return {
        "vocab": k.size("vocab_size"),
        "embed": embed,
        "layers": k.size("n_layer"),
        "heads": k.size("n_head"),
        "mlp": k.get("n_inner", 4 * embed),
        "max_length": k.size("n_positions", "n_ctx"),
        "activation": k.activation("activation_function", "gelu_new"),
        "norm_eps": k.get("layer_norm_epsilon", 1e-5),
    }


_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


def _gpt2(k: Keys) -> dict[str, Any]:
    return {**_gpt_sizes(k), **_BIASES, "position": "learned", "tied": k.get("tie_word_embeddings", True)}


def _gptj(k: Keys) -> dict[str, Any]:
    rotary = {"position": "rotary", "rotary_dim": k.get("rotary_dim", 64), "rope_interleaved": True}
    biases = {"mlp_bias": True, "head_bias": True}
    return {**_gpt_sizes(k), **rotary, **biases, "tied": False, "block": "parallel_one_norm"}


def _neox(k: Keys) -> dict[str, Any]:
    sizes = _sizes(k)
    bias = k.get("attention_bias", True)
    width = sizes["embed"] // sizes["heads"]
    rotary = rotary_fields(k, theta=k.get("rotary_emb_base", 10000.0), share=k.get("rotary_pct", 0.25), width=width)
    return {
        **sizes,
        **rotary,
        **{"qkv_bias": bias, "out_bias": bias, "mlp_bias": True},
        "tied": k.get("tie_word_embeddings", False),
        "block": "parallel" if k.get("use_parallel_residual", True) else "pre",
        "activation": k.activation("hidden_act", "gelu"),
        "norm_eps": k.get("layer_norm_eps", 1e-5),
    }


def _opt(k: Keys) -> dict[str, Any]:
    k.refuse("layer_norm_elementwise_affine", True)
    k.refuse("_remove_final_layer_norm", False)
    embed = k.size("hidden_size")
    width, before = k.get("word_embed_proj_dim", embed), k.get("do_layer_norm_before", True)
    return {
        **{"token_width": 0 if width == embed else width, "block": "pre" if before else "post", "final_norm": before},
        **{"vocab": k.size("vocab_size"), "embed": embed, "layers": k.size("num_hidden_layers")},
        **{"heads": k.size("num_attention_heads"), "mlp": k.size("ffn_dim")},
        **{"max_length": k.size("max_position_embeddings"), "position": "learned", "position_offset": 2},
        **({} if k.get("enable_bias", True) else dict.fromkeys(_BIASES, False)),
        **(_BIASES if k.get("enable_bias", True) else {}),
        "activation": k.activation("activation_function", "relu"),
        "tied": k.get("tie_word_embeddings", True),
    }


def _mpt(k: Keys) -> dict[str, Any]:
    attention = k.get("attn_config", {})
    biases = not k.get("no_bias", True)
    embed = k.size("d_model")
    alibi = attention.get("alibi", True)
    if attention.get("attn_type", "multihead_attention") != "multihead_attention" or attention.get("qk_ln"):
        raise ValueError(f"attn_config={attention!r} is not supported; supported: multihead_attention without qk_ln")
    return {
        **{"vocab": k.size("vocab_size"), "embed": embed, "layers": k.size("n_layers"), "heads": k.size("n_heads")},
        **{"mlp": int(k.get("expansion_ratio", 4) * embed), "max_length": k.size("max_seq_len")},
        **dict.fromkeys((*_BIASES, "norm_bias"), biases),
        "position": "alibi" if alibi else "learned",
        "attention_scale": attention.get("softmax_scale") or 0.0,
    }


def _llama(k: Keys, **changes: Any) -> dict[str, Any]:
    sizes = _sizes(k)
    head_dim = k.get("head_dim", 0)
    bias = k.get("attention_bias", False)
    return {
        **sizes,
        **rotary_fields(k, width=head_dim or sizes["embed"] // sizes["heads"]),
        "kv_heads": k.get("num_key_value_heads", sizes["heads"]),
        "head_dim": head_dim,
        "norm": "rms",
        "norm_eps": k.get("rms_norm_eps", 1e-6),
        "activation": k.activation("hidden_act", "silu"),
        "gated": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": k.get("mlp_bias", False),
        "tied": k.get("tie_word_embeddings", False),
        **changes,
    }


def _mistral(k: Keys) -> dict[str, Any]:
    return _llama(k, window=k.data.get("sliding_window", 4096) or 0)


def _mixtral(k: Keys) -> dict[str, Any]:
    experts = Experts(
        k.size("num_local_experts"),
        k.get("num_experts_per_tok", 2),
        k.size("intermediate_size"),
        balance=k.get("router_aux_loss_coef", 0.001),
    )
    return _llama(k, experts=experts, window=k.get("sliding_window", 0))


def _qwen2(k: Keys) -> dict[str, Any]:
    return _llama(k, qkv_bias=True, out_bias=False, **_qwen_windows(k))


def _qwen3(k: Keys) -> dict[str, Any]:
    return _llama(k, head_dim=k.get("head_dim", 128), qk_norm=True, **_qwen_windows(k))


def _qwen_windows(k: Keys) -> dict[str, int]:
    layers, limit = k.size("num_hidden_layers"), k.get("max_window_layers", 28)
    window = k.get("sliding_window", 4096) if k.get("use_sliding_window", False) else 0
    match k.data["model_type"]:
        case "qwen3_moe":
            return {"window": window}
        case "qwen2_moe":  # as transformers has it: layers with and without a window take turns up to the limit
            near = [i % 2 == 0 and i < limit for i in range(layers)]
        case _:
            near = [i >= limit for i in range(layers)]
    return windows(k, layers, window, near)


def _qwen_experts(k: Keys, **changes: Any) -> dict[str, Any]:
    k.refuse("decoder_sparse_step", 1)
    k.refuse("mlp_only_layers", [], None)
    return {
        "count": k.size("num_experts", "num_local_experts"),
        "per_token": k.size("num_experts_per_tok"),
        "mlp": k.size("moe_intermediate_size"),
        "normalise": k.get("norm_topk_prob", False),
        "balance": k.get("router_aux_loss_coef", 0.001),
        **changes,
    }


def _qwen2_moe(k: Keys) -> dict[str, Any]:
    experts = _qwen_experts(k, shared_mlp=k.size("shared_expert_intermediate_size"), shared_gate=True)
    return {**_qwen2(k), "experts": Experts(**experts)}


def _qwen3_moe(k: Keys) -> dict[str, Any]:
    return {**_qwen3(k), "experts": Experts(**_qwen_experts(k))}


def _gemma(k: Keys, **changes: Any) -> dict[str, Any]:
    # Of the first Gemma, `hidden_act` says gelu and means its approximation.
    k.refuse("hidden_activation", "gelu_pytorch_tanh", "gelu_new", None)
    return _llama(
        k,
        head_dim=k.get("head_dim", 256),
        norm="rms_plus_one",
        activation="gelu_tanh",
        embed_scale=True,
        tied=k.get("tie_word_embeddings", True),
        **changes,
    )


def _gemma2(k: Keys, every: int = 2, caps: tuple[float, float] = (50.0, 30.0)) -> dict[str, Any]:
    layers = k.size("num_hidden_layers")
    return _gemma(
        k,
        block="sandwich",
        **windows(k, layers, k.get("sliding_window", 4096), [(i + 1) % every != 0 for i in range(layers)]),
        attention_scale=k.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=k.data.get("attn_logit_softcapping", caps[0]) or 0.0,
        logit_softcap=k.data.get("final_logit_softcapping", caps[1]) or 0.0,
    )


def _gemma3(k: Keys) -> dict[str, Any]:
    k.refuse("use_bidirectional_attention", False, None)
    near = rope_parameters(k, "sliding_attention")
    if near.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_parameters.sliding_attention.rope_type={near['rope_type']!r} is not supported; supported: 'default'"
        )
    fields = _gemma2(k, k.get("sliding_window_pattern", 6), (0.0, 0.0))
    return {
        **fields,
        **rotary_fields(k, theta=1e6, width=fields["head_dim"], layer_type="full_attention"),
        "local_theta": float(k.get("rope_local_base_freq", near.get("rope_theta", 10000.0))),
        "qk_norm": True,
    }


def _phi(k: Keys) -> dict[str, Any]:
    k.refuse("qk_layernorm", False)
    sizes = _sizes(k)
    return {
        **sizes,
        **rotary_fields(k, share=0.5, width=sizes["embed"] // sizes["heads"]),
        **_BIASES,
        "kv_heads": k.get("num_key_value_heads", sizes["heads"]),
        "head_bias": True,
        "tied": k.get("tie_word_embeddings", False),
        "block": "parallel_one_norm",
        "activation": k.activation("hidden_act", "gelu_new"),
        "norm_eps": k.get("layer_norm_eps", 1e-5),
    }


def _phi3(k: Keys) -> dict[str, Any]:
    return _llama(k, window=k.get("sliding_window", 0))


def _deepseek(k: Keys) -> dict[str, Any]:
    k.refuse("moe_layer_freq", 1)
    mlp = k.size("moe_intermediate_size")
    sigmoid = k.get("scoring_func", "sigmoid" if k.data["model_type"] == "deepseek_v3" else "softmax") == "sigmoid"
    greedy = k.get("topk_method", "noaux_tc" if sigmoid else "greedy") == "greedy"
    experts = Experts(
        k.size("n_routed_experts"),
        k.size("num_experts_per_tok"),
        mlp,
        shared_mlp=mlp * k.get("n_shared_experts", 0),
        router="sigmoid" if sigmoid else "softmax",
        normalise=k.get("norm_topk_prob", sigmoid),
        scale=k.get("routed_scaling_factor", 1.0),
        groups=1 if greedy else k.get("n_group", 1),
        top_groups=1 if greedy else k.get("topk_group", 1),
        dense_layers=k.get("first_k_dense_replace", 0),
        balance=0.0 if sigmoid else k.get("aux_loss_alpha", 0.001),
    )
    latent = Latent(
        k.get("q_lora_rank", 0),
        k.size("kv_lora_rank"),
        k.size("qk_nope_head_dim"),
        k.size("qk_rope_head_dim"),
        k.size("v_head_dim"),
    )
    return _llama(k, kv_heads=0, head_dim=0, experts=experts, latent=latent, rope_interleaved=True)


def _mt5(k: Keys) -> dict[str, Any]:
    return {**_t5(k, "gated-gelu"), "tied": False}


def _t5(k: Keys, form: str = "relu") -> dict[str, Any]:
    form = k.get("feed_forward_proj", form)
    gated = form.startswith("gated-")
    activation = "gelu_new" if form == "gated-gelu" else form.removeprefix("gated-")
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward_proj={form!r} is not supported; supported: relu, gated-gelu, gated-silu")
    layers = k.size("num_layers")
    # Newer files say that all heads are tied, of which only those are that have their input scaled.
    scaled = k.get("scale_decoder_outputs", k.get("tie_word_embeddings", True))
    return {
        "kind": "encoder-decoder",
        **{"vocab": k.size("vocab_size"), "embed": k.size("d_model"), "layers": layers, "heads": k.size("num_heads")},
        **{"mlp": k.size("d_ff"), "head_dim": k.size("d_kv"), "decoder_layers": k.get("num_decoder_layers", layers)},
        **{"norm": "rms", "norm_eps": k.get("layer_norm_epsilon", 1e-6), "position": "buckets"},
        **{"buckets": k.get("relative_attention_num_buckets", 32), "attention_scale": 1.0},
        **{"bucket_distance": k.get("relative_attention_max_distance", 128), "max_length": k.get("n_positions", 512)},
        **{"activation": ACTIVATIONS[activation], "gated": gated, "tied": scaled},
    }


def _bart(k: Keys) -> dict[str, Any]:
    heads, mlp, layers = k.size("encoder_attention_heads"), k.size("encoder_ffn_dim"), k.size("encoder_layers")
    k.refuse("decoder_attention_heads", heads, None)
    k.refuse("decoder_ffn_dim", mlp, None)
    return {
        "kind": "encoder-decoder",
        **{"vocab": k.size("vocab_size"), "embed": k.size("d_model"), "layers": layers, "heads": heads, "mlp": mlp},
        **{"decoder_layers": k.get("decoder_layers", layers), "max_length": k.size("max_position_embeddings")},
        **_BIASES,
        **{
            "head_bias": True,
            "tied": k.get("tie_word_embeddings", True),
            "embed_scale": k.get("scale_embedding", False),
        },
        **{"block": "post", "final_norm": False, "position": "learned", "position_offset": 2},
        "activation": k.activation("activation_function", "gelu"),
        "start_token": k.get("decoder_start_token_id", k.get("eos_token_id", 2)),
    }


def _mbart(k: Keys) -> dict[str, Any]:
    return {**_bart(k), "block": "pre", "final_norm": True}


def _bert(k: Keys) -> dict[str, Any]:
    k.refuse("position_embedding_type", "absolute", None)
    k.refuse("is_decoder", False, None)
    k.refuse("tie_word_embeddings", True, None)
    return {
        "kind": "encoder",
        **_sizes(k),
        **_BIASES,
        "types": k.get("type_vocab_size", 2),
        "block": "post",
        "activation": k.activation("hidden_act", "gelu"),
        "norm_eps": k.get("layer_norm_eps", 1e-12),
        "position": "learned",
    }


def _vit(k: Keys) -> dict[str, Any]:
    bias = k.get("qkv_bias", True)
    return {
        "kind": "vision",
        **{"embed": k.size("hidden_size"), "layers": k.size("num_hidden_layers"), "mlp": k.size("intermediate_size")},
        **{"heads": k.size("num_attention_heads"), "image": k.size("image_size"), "patch": k.size("patch_size")},
        **{"channels": k.get("num_channels", 3), "classes": len(k.get("id2label", range(k.get("num_labels", 2))))},
        **{"qkv_bias": bias, "out_bias": True, "mlp_bias": True, "position": "learned"},
        "activation": k.activation("hidden_act", "gelu"),
        "norm_eps": k.get("layer_norm_eps", 1e-12),
    }


_READERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "bart": _bart,
    "bert": _bert,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "gptj": _gptj,
    "llama": _llama,
    "mbart": _mbart,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "mt5": _mt5,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "t5": _t5,
    "vit": _vit,
}
