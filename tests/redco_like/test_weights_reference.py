"""Decoders against transformers: tiny random models that transformers wrote, read under three plans, and written again.

The differences are of float32 sums in another order: on logits of up to 8 they are 2e-6 to 4e-5.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipelines.infer import build_predict_program
from redco_like.models import load, save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference
torch.set_num_threads(1)  # more wait for each other in models as small as these

ROWS, PROMPT, TOKENS, VOCAB = 8, 12, 64, 96
TOLERANCE = 1e-4
PLANS = {
    "one device": ("fsdp", "data=1"),
    "data 2 x fsdp 4": ("fsdp", "data=2,fsdp=4"),
}
SPECIAL = {
    "data 4 x tensor 2": ("data+megatron", "data=4,tensor=2"),
    "fsdp 4 x expert 2": ("fsdp", "fsdp=4,expert=2"),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")

_SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 128},
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LATENT = {
    **_SIZES,
    **{"num_key_value_heads": 4, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
}
CASES = {
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": _SIZES,  # a quarter of each head turns
    "opt": {n: v for n, v in _SIZES.items() if n != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": VOCAB},
    "phi": _SIZES,  # half of each head turns
    "llama": _GROUPED
    | {
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        }
    },
    "mistral": _GROUPED | {"sliding_window": 7},
    "qwen2": _GROUPED | {"tie_word_embeddings": True},
    "qwen3": _GROUPED | {"head_dim": 12},  # heads wider than the model, normed
    "gemma": _GROUPED | {"num_key_value_heads": 1, "head_dim": 12},
    "gemma2": _GROUPED
    | {
        **{"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 7},
        **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    },
    "phi3": _GROUPED | {"pad_token_id": 0, "sliding_window": 9},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": _GROUPED | _EXPERTS | {"head_dim": 12, "norm_topk_prob": True},
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy", "q_lora_rank": None},
    "deepseek_v3": _LATENT | {"q_lora_rank": 12},
}


@functools.cache
def reference(name):
    """transformers' model with random parameters, biases and norms included."""
    tokens = {"bos_token_id": None, "eos_token_id": None} | (
        {} if "pad_token_id" in CASES[name] else {"pad_token_id": None}
    )
    config = transformers.AutoConfig.for_model(name, **{**tokens, **CASES[name]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rng = torch.Generator().manual_seed(1)
    corrections = [(path, x) for path, x in model.named_buffers() if path.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for path, x in [*model.named_parameters(), *corrections]:
            noise = torch.randn(x.shape, generator=rng)
            if ("norm" in path.lower() or "ln_" in path) and path.endswith("weight"):
                x.copy_(0.2 * noise + (0 if name.startswith("gemma") else 1))
            else:
                x.copy_(size_of(name, path) * noise)
    return model


def size_of(name, path):
    """Of random numbers, such that greedy rows do not stay at one token."""
    if path.endswith("bias"):
        return 0.05
    if name == "gemma2" and "embed" in path:
        return 0.06
    return 0.3


def prompts():
    return np.random.default_rng(2).integers(3, VOCAB, (ROWS, PROMPT)).astype(np.int32)


@functools.cache
def expected(name):
    """The tokens that transformers writes, and its logits for them."""
    model = reference(name)
    greedy = transformers.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        written = model.generate(torch.tensor(prompts()), generation_config=greedy).numpy()
    return written, logits_of(model, written)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name -> the folder that transformers wrote, once."""
    root = tmp_path_factory.mktemp("written_by_transformers")

    @functools.cache
    def write(name):
        reference(name).save_pretrained(root / name)
        return root / name

    return write


def ours(loaded, tokens):
    """Logits of all tokens at once, and what is written after the prompts with a cache, as the plan lays it out."""
    model = loaded.model

    def predict(params, batch):
        logits = model.module.apply({"params": params}, batch["tokens"])[0]
        rows = batch["prompt"].shape[0]
        first, cache = model.prefill(params, batch["prompt"], model.init_cache(rows, PROMPT + TOKENS))

        def step(state, position):
            token, cache = state
            logits, cache = model.decode(params, token[:, None], cache, position)
            chosen = jnp.argmax(logits[:, 0], -1).astype(jnp.int32)
            return (chosen, cache), chosen

        token = jnp.argmax(first[:, 0], -1).astype(jnp.int32)
        _, more = jax.lax.scan(step, (token, cache), jnp.arange(PROMPT, PROMPT + TOKENS - 1, dtype=jnp.int32))
        return {"logits": logits, "written": jnp.concatenate([token[:, None], more.T], axis=1)}

    batch = {"tokens": tokens, "prompt": prompts()}
    program = build_predict_program(predict, loaded.params, batch, loaded.plan, loaded.mesh)
    params, state = program.place(loaded.params)
    found = program.predict(params, jax.device_put(batch, program.batch_shardings), jax.random.key(0), state)
    return jax.tree.map(np.asarray, found)


def together(name, *more):
    """A case, whose reference one process makes for all its tests."""
    return pytest.param(name, *more, marks=pytest.mark.xdist_group(f"weights {name}"))


def plans_of(name):
    return [*PLANS, "fsdp 4 x expert 2" if name in MIXTURES else "data 4 x tensor 2"]


@pytest.mark.parametrize("name, plan", [together(name, plan) for name in CASES for plan in plans_of(name)])
def test_logits_and_greedy_tokens_are_those_of_transformers(name, plan, folder):
    preset, mesh = (PLANS | SPECIAL)[plan]
    loaded = load(folder(name), plan=preset, mesh=mesh)
    written, wanted = expected(name)
    assert wanted.std() > 0.3
    found = ours(loaded, written)
    difference = float(np.abs(found["logits"] - wanted).max())
    kinds, size = len(set(written[:, PROMPT:].ravel().tolist())), np.abs(wanted).max()
    print(f"\n{name}, {plan}: max abs difference {difference:.1e} of {size:.1f}; {kinds} kinds of tokens")
    assert kinds > 12, "rows that repeat themselves show little"
    assert difference < TOLERANCE
    np.testing.assert_array_equal(found["written"], written[:, PROMPT:])


@pytest.mark.parametrize("name", [together(name) for name in CASES])
def test_transformers_loads_what_is_saved(name, folder, tmp_path):
    loaded = load(folder(name), plan="fsdp", mesh="fsdp=8")
    save(tmp_path / "again", loaded.model, loaded.params, shard_bytes=40_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written, wanted = expected(name)
    np.testing.assert_array_equal(logits_of(model.eval(), written), wanted)
