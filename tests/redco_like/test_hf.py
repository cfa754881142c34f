"""What a `config.json` says in its older, newer and rarer forms, and which field is to blame where nothing fits."""

import dataclasses

import pytest

from redco_like.models import RopeScaling, architecture, from_hf
from redco_like.models.hf_keys import stored_dtype
from redco_like.models.weights.families import names_of

LLAMA = {
    **{"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 64},
}
QWEN = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
GEMMA = {**QWEN, "model_type": "gemma3_text", "head_dim": 8}
BART = {
    **{"model_type": "bart", "vocab_size": 50265, "d_model": 1024, "max_position_embeddings": 1024},
    **{"encoder_layers": 12, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096},
    **{"decoder_layers": 12, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096},
    **{"decoder_start_token_id": 2, "scale_embedding": False, "activation_function": "gelu"},
}
OPT = {
    **{"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096},
    **{"num_attention_heads": 16, "max_position_embeddings": 2048},
    **{"do_layer_norm_before": False, "word_embed_proj_dim": 512},
}
FULL, NEAR = "full_attention", "sliding_attention"


def test_published_files_of_bart_opt_350m_and_gemma_3_give_the_architectures():
    assert from_hf(BART) == architecture("bart-large")
    mbart = {**BART, "model_type": "mbart", "vocab_size": 250027, "scale_embedding": True}
    assert from_hf(mbart) == architecture("mbart-large")
    assert from_hf(OPT) == architecture("opt-350m")
    gemma = {
        **{"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912},
        **{"max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "sliding_window": 512},
        **{"sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None},
    }
    assert from_hf(gemma) == architecture("gemma-3-1b")


def test_rotary_settings_are_read_in_their_older_and_newer_form():
    kinds = {
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "linear": {"factor": 4.0},
        "yarn": {"factor": 4.0, "attention_factor": 1.2},
    }
    for kind, more in kinds.items():
        more = {**more, "original_max_position_embeddings": 16}
        new = from_hf({**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **more}})
        assert new.rope_theta == 5e5
        assert new.rope_scaling == RopeScaling(
            kind, **{k: v for k, v in more.items() if "original" not in k}, original_length=16 * (kind != "linear")
        )
        for key in ("rope_type", "type"):
            assert from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {key: kind, **more}}) == new
    plain = from_hf({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert plain == from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": None})
    half = from_hf({**LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})
    assert half.rotary_dim == from_hf({**LLAMA, "partial_rotary_factor": 0.5}).rotary_dim == 4


def test_without_a_factor_yarn_and_longrope_stretch_to_the_longest_length():
    for kind, more in (("yarn", {}), ("longrope", {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4})):
        found = from_hf({**LLAMA, "rope_scaling": {"type": kind, "original_max_position_embeddings": 16, **more}})
        assert found.rope_scaling is not None
        assert (found.rope_scaling.factor, found.rope_scaling.original_length) == (4.0, 16)
    with pytest.raises(ValueError, match=r"lacks rope_scaling\.factor"):
        from_hf({**LLAMA, "rope_scaling": {"type": "linear"}})


@pytest.mark.parametrize(
    "more, windows",
    [
        ({}, ()),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (0, 0, 0, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": [NEAR, FULL] * 2}, (8, 0, 8, 0)),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL] * 4}, ()),
        ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2}, (8, 0, 8, 0)),
    ],
)
def test_windows_are_in_the_layers_that_the_file_says(more, windows):
    found = from_hf({**QWEN, "head_dim": 8, **more})
    assert found.windows == windows
    assert found.window == max(windows, default=0)


def test_windows_in_all_layers_are_one_number():
    found = from_hf({**QWEN, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0})
    assert (found.window, found.windows) == (8, ())
    # Mistral has a window where nothing is said of it, and none where it is null.
    mistral = {**LLAMA, "model_type": "mistral"}
    assert from_hf(mistral).window == 4096
    assert from_hf({**mistral, "sliding_window": None}).window == 0


def test_gemma_3_turns_layers_with_and_without_a_window_differently():
    old = {
        **GEMMA,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    }
    new = {
        **GEMMA,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            NEAR: {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert from_hf(old) == from_hf(new)
    assert (from_hf(new).rope_theta, from_hf(new).local_theta, from_hf(new).qk_norm) == (1e6, 1e4, True)


def test_null_is_as_if_a_key_were_not_there():
    plain = from_hf(LLAMA)
    assert from_hf({**LLAMA, "head_dim": None, "num_key_value_heads": None, "rope_scaling": None}) == plain
    assert plain.head_dim == 8
    assert plain.kv_heads == 4


def test_the_dtype_is_read_in_both_forms():
    assert stored_dtype({"dtype": "bfloat16"}) == stored_dtype({"torch_dtype": "torch.bfloat16"}) == "bfloat16"
    assert stored_dtype({"dtype": None, "torch_dtype": "float16"}) == "float16"
    assert stored_dtype({}) is None


def test_a_head_of_t5_is_its_table_only_where_its_input_is_scaled():
    old = {
        **{"model_type": "t5", "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "feed_forward_proj": "gated-gelu",
    }
    assert from_hf(old).tied
    assert not from_hf({**old, "tie_word_embeddings": False}).tied
    untied = from_hf({**old, "tie_word_embeddings": True, "scale_decoder_outputs": False})
    assert not untied.tied
    head = {p.leaf: p.tensor for p in names_of(untied, {"shared.weight"}).pieces}
    assert head["head/kernel"] == head["embed"] == "shared.weight"
    assert {p.leaf: p.tensor for p in names_of(untied).pieces}["head/kernel"] == "lm_head.weight"


def test_the_first_files_of_bert_have_other_names_for_norms():
    config = dataclasses.replace(architecture("bert-base"), layers=1)
    written = {p.tensor for p in names_of(config).pieces}
    old = {
        t.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for t in written
    }
    assert old != written
    assert {p.tensor for p in names_of(config, old).pieces} == old
    assert {p.tensor for p in names_of(config, written).pieces} == written


@pytest.mark.parametrize(
    "data, words",
    [
        ({**BART, "decoder_ffn_dim": 8}, "decoder_ffn_dim=8 is not supported; supported: 4096"),
        ({**BART, "decoder_attention_heads": 8}, "decoder_attention_heads=8 is not supported; supported: 16"),
        ({**OPT, "layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False is not supported"),
        (
            {**QWEN, "use_sliding_window": True, "layer_types": [NEAR, FULL, FULL, NEAR]},
            "layer_types=.* in the first layers",
        ),
        ({**QWEN, "layer_types": [FULL]}, "layer_types=.*for each of num_hidden_layers=4 layers"),
        ({**QWEN, "layer_types": ["chunked_attention"] * 4}, "layer_types=.*supported: for each"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({**GEMMA, "hidden_activation": "relu"}, "hidden_activation='relu' is not supported"),
        (
            {**GEMMA, "rope_parameters": {NEAR: {"rope_type": "yarn"}, FULL: {}}},
            r"rope_parameters\.sliding_attention\.rope_type='yarn' is not supported",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_type": "spiral"}},
            r"rope_parameters\.rope_type='spiral' is not supported",
        ),
        ({**LLAMA, "rope_scaling": {"type": "spiral"}}, r"rope_scaling\.rope_type='spiral' is not supported"),
        ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling='linear'; it must be an object"),
        (
            {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            r"rope_scaling\.truncate=False is not supported",
        ),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder=True is not supported"),
    ],
)
def test_what_cannot_be_said_names_the_field(data, words):
    with pytest.raises(ValueError, match=words):
        from_hf(data)
