"""Forms of a configuration that few checkpoints have, against transformers: logits, with a cache and without.

What each decoder family computes is compared in the reference tests of weights; here are windows in some layers,
stretched rotary positions, and OPT with a narrow table.
"""

from __future__ import annotations

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from redco_like.models import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

VOCAB, LENGTH, PROMPT = 64, 24, 9
_SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4},
    **{"num_hidden_layers": 3, "max_position_embeddings": 64},
}
_GROUPED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_QWEN = {**_GROUPED, "use_sliding_window": True, "sliding_window": 5}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5}
_PHI3 = {**_GROUPED, "pad_token_id": 0}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 3.0, 4.0]}


def turned(kind, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


GEMMA_LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": turned("default"),
    },
}
LLAMA3 = turned("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = turned("yarn", factor=4.0, original_max_position_embeddings=16)

CASES = {
    "opt-350m": ("OPT", {**_SIZES, "ffn_dim": 48, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "qwen2 windows in the last layers": ("Qwen2", {**_QWEN, "max_window_layers": 1}),
    "qwen3 windows in the last layers": ("Qwen3", {**_QWEN, "max_window_layers": 2, "head_dim": 8}),
    "qwen3 windows in all layers": ("Qwen3", {**_QWEN, "max_window_layers": 0, "head_dim": 8}),
    "gemma3": ("Gemma3", {**_GEMMA, **GEMMA_LAYERS}),
    "gemma3 of windows alone": ("Gemma3", _GEMMA),
    "llama3 rope": ("Llama", {**_GROUPED, "rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {**_GROUPED, "rope_parameters": turned("linear", factor=4.0)}),
    "yarn": ("Qwen2", {**_GROUPED, "rope_parameters": YARN}),
    "yarn with a factor of attention": ("Llama", {**_GROUPED, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "partial rope": ("Phi3", {**_PHI3, "rope_parameters": turned("default", partial_rotary_factor=0.5)}),
    "longrope within its first length": (
        "Phi3",
        {**_PHI3, "original_max_position_embeddings": 32, "rope_parameters": _LONG},
    ),
    "longrope beyond it": ("Phi3", {**_PHI3, "original_max_position_embeddings": 8, "rope_parameters": _LONG}),
}


@functools.cache
def reference(name):
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=rng)
            scale = "norm" in path and path.endswith("weight") and family != "Gemma3"  # which has 1 + weight
            x.copy_(1 + 0.2 * noise if scale else 0.2 * noise)
    return model


def compare(folder, model):
    """The greatest differences of logits, of all tokens at once and one after the other."""
    tokens = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(tokens)).logits.numpy()
    assert np.abs(wanted).max() > 1
    loaded = load(folder, dtype="float32")
    ours = loaded.model
    whole = jax.jit(lambda p, t: ours.module.apply({"params": p}, t)[0])(loaded.params, tokens)
    logits, cache = jax.jit(ours.prefill)(loaded.params, tokens[:, :PROMPT], ours.init_cache(2, LENGTH))
    found = [logits]
    decode = jax.jit(ours.decode)
    for position in range(PROMPT, LENGTH):
        logits, cache = decode(loaded.params, tokens[:, position : position + 1], cache, jnp.int32(position))
        found.append(logits)
    apart = np.abs(np.concatenate(found, axis=1) - wanted[:, PROMPT - 1 :]).max()
    return float(np.abs(whole - wanted).max()), float(apart)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    reference(name).save_pretrained(tmp_path)
    together, apart = compare(tmp_path, reference(name))
    print(f"\n{name}: max abs difference {together:.1e} at once, {apart:.1e} one after the other")
    assert max(together, apart) < 1e-4


def test_the_older_form_of_rotary_settings_is_read_alike(tmp_path):
    reference("llama3 rope").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    new = data.pop("rope_parameters")
    data |= {"rope_theta": new.pop("rope_theta"), "rope_scaling": new, "torch_dtype": data.pop("dtype")}
    path.write_text(json.dumps(data))
    assert max(compare(tmp_path, reference("llama3 rope"))) < 1e-4
