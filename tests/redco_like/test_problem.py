"""Problems for the planner: by name, from a Hugging Face configuration, from a run file; and what is refused."""

import json
import math
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from tiny_architectures import DECODERS, tiny

from redco_like.models import ModelConfig, architecture, build_model, from_hf
from redco_like.problem import OPTIMIZERS, load_problem, make_optimizer
from search import TracedModel, parse_cluster

LLAMA = {
    **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu"},
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}
GPT = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
LIKE_LLAMA = {"vocab_size": 32000, "num_key_value_heads": 8, "num_hidden_layers": 32, "num_attention_heads": 32}
# The published files, without the keys that say nothing about sizes; after each the architecture of that name.
HF = [
    (LLAMA, "llama-3.1-8b"),
    ({"model_type": "gpt2", **GPT}, "gpt2"),
    (
        {
            **{"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16},
            **{"n_positions": 2048, "rotary_dim": 64},
        },
        "gpt-j-6b",
    ),
    (
        {
            **{"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "num_hidden_layers": 6},
            **{"num_attention_heads": 8, "intermediate_size": 2048, "max_position_embeddings": 2048},
            **{"rotary_pct": 0.25, "use_parallel_residual": True},
        },
        "pythia-70m",
    ),
    (
        {
            **{"model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072},
            **{"num_attention_heads": 12, "max_position_embeddings": 2048, "do_layer_norm_before": True},
            "word_embed_proj_dim": 768,
        },
        "opt-125m",
    ),
    (
        {
            **{"model_type": "mpt", "vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32},
            **{"max_seq_len": 2048, "expansion_ratio": 4, "no_bias": True, "attn_config": {"alibi": True}},
        },
        "mpt-7b",
    ),
    (
        {
            **LIKE_LLAMA,
            **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": 4096},
            **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
        },
        "mistral-7b",
    ),
    (
        {
            **LIKE_LLAMA,
            **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8},
            **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
            "router_aux_loss_coef": 0.01,
        },
        "mixtral-8x7b",
    ),
    (
        {
            **{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28},
            **{"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "rope_theta": 1e6},
            **{"max_position_embeddings": 32768, "use_sliding_window": False, "tie_word_embeddings": False},
        },
        "qwen2-7b",
    ),
    (
        {
            **{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48},
            **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144},
            **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
            **{"max_position_embeddings": 40960, "rope_theta": 1e6, "decoder_sparse_step": 1, "mlp_only_layers": []},
        },
        "qwen3-30b-a3b",
    ),
    (
        {
            **{"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26},
            **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216},
            **{"max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "sliding_window": 4096},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
        "gemma-2-2b",
    ),
    (
        {
            **{"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "intermediate_size": 10240, "max_position_embeddings": 2048},
            "partial_rotary_factor": 0.4,
        },
        "phi-2",
    ),
    (
        {
            **{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61},
            **{"num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432},
            **{"moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8},
            **{"topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
            **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "q_lora_rank": 1536},
            **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
            "max_position_embeddings": 163840,
            "rope_scaling": {
                **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32},
                **{"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
        },
        "deepseek-v3",
    ),
    (
        {
            **{"model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12},
            **{"num_heads": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        },
        "t5-v1.1-base",
    ),
    (
        {
            **{"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12},
            **{"num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512},
        },
        "bert-base",
    ),
    (
        {
            **{"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
            "id2label": {str(i): f"LABEL_{i}" for i in range(1000)},
            **{"intermediate_size": 3072, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
        },
        "vit-b16",
    ),
]

RUN_FILE = """
import jax, jax.numpy as jnp, numpy as np, optax

def init_fn(rng):
    return {"w": jax.random.normal(rng, (4, 3))}

def loss_fn(params, batch):
    return jnp.square(batch["x"] @ params["w"]).mean()

def get_config():
    return dict(loss_fn=loss_fn, init_fn=init_fn, optimizer=optax.adam(1e-3), batch={"x": np.zeros((8, 4), np.float32)})
"""


@pytest.fixture
def run_file(tmp_path):
    def write(text, name="run.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_a_name_gives_a_traced_loss_and_the_optimizer_state():
    problem = load_problem("gpt2", seq_len=512, global_batch=16)
    assert (problem.source, problem.parameters, problem.seq_len) == ("architecture", 124_439_808, 512)
    assert problem.traced.arg("batch")["tokens"].shape == (16, 512)
    assert {x.dtype.name for x in jax.tree.leaves(problem.traced.arg("params"))} == {"bfloat16"}
    state = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(problem.opt_state) if x.ndim)
    assert state == 2 * 4 * problem.parameters
    assert "124.4 M parameters" in problem.description
    assert "\n" not in problem.description


def test_param_dtype_is_that_of_the_optimizer_state():
    problem = load_problem(tiny("llama-3-8b"), seq_len=16, global_batch=8, param_dtype="bfloat16", dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(problem.opt_state) if x.ndim} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(problem.traced.arg("params"))} == {"float32"}


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "t5-v1.1-base", "bert-base", "vit-b16"])
def test_the_planner_takes_a_problem(name):
    config = tiny(name)
    problem = load_problem(config, seq_len=None if config.kind == "vision" else 16, global_batch=8)
    model = TracedModel(problem.traced, problem.opt_state, parse_cluster("8xH100"), fused_attention=True)
    assert model.batch == 8
    assert model.has_experts == (config.experts is not None)


def test_a_large_model_is_traced_within_a_second_and_import_makes_no_device():
    script = """
        import sys, time
        import jax, optax
        from redco_like.problem import load_problem
        assert "flax.linen" not in sys.modules
        began = time.process_time()
        problem = load_problem("llama-3-70b", seq_len=8192, global_batch=1024)
        print(time.process_time() - began, problem.parameters)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    seconds, parameters = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(parameters) == 70_553_706_496
    assert float(seconds) < 1.0


@pytest.mark.parametrize("data, name", HF, ids=[name for _, name in HF])
def test_published_config_json_gives_the_architecture(data, name):
    found, expected = from_hf(data), architecture(name)
    # Files leave some epsilons and the weight of the balance loss to the defaults of the code that reads them.
    loose = {"norm_eps", "rope_scaling", "experts"}
    fields = {f for f in ModelConfig.__dataclass_fields__ if f not in loose}
    assert {f: getattr(found, f) for f in fields} == {f: getattr(expected, f) for f in fields}
    assert found.rope_scaling == expected.rope_scaling
    if expected.experts:
        assert {**vars(found.experts), "balance": 0} == {**vars(expected.experts), "balance": 0}


def test_a_folder_with_config_json_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT}))
    for path in (tmp_path, str(tmp_path / "config.json")):
        problem = load_problem(path, seq_len=128, global_batch=8)
        assert (problem.source, problem.parameters) == ("hf-config", 124_439_808)


def test_t5_has_the_length_on_both_sides_and_vit_has_none():
    batch = load_problem(tiny("t5-base"), seq_len=16, global_batch=8).traced.arg("batch")
    assert {name: x.shape for name, x in batch.items()} == {"source": (8, 16), "labels": (8, 16)}
    problem = load_problem(tiny("vit-b16"), global_batch=8)
    assert problem.seq_len is None
    assert problem.traced.arg("batch")["images"].shape == (8, 16, 16, 3)


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_decode_are_traced_with_a_cache(name):
    for task, width in (("prefill", 16), ("decode", 1)):
        problem = load_problem(tiny(name), seq_len=16, global_batch=4, task=task)
        assert problem.opt_state is None
        assert problem.traced.names == ("params", "batch", "state")
        assert problem.traced.arg("batch")["tokens"].shape == (4, width)
        logits, cache = problem.traced.out
        assert logits.shape == (4, 1, 56)
        shapes = [
            jax.tree.map(lambda x: (x.shape, x.dtype.name), tree) for tree in (cache, problem.traced.arg("state"))
        ]
        assert shapes[0] == shapes[1]
        assert {d for _, d in jax.tree.leaves(shapes[0], is_leaf=lambda x: isinstance(x, tuple))} == {"bfloat16"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_state_for_every_model(name):
    model = build_model(tiny("llama-3-8b"))
    params = jax.eval_shape(model.init_fn, jax.eval_shape(jax.random.key, 0))
    state = jax.eval_shape(make_optimizer(name, stacked=True).init, params)
    leaves = [math.prod(x.shape) for x in jax.tree.leaves(state)]
    held = sum(n for n in leaves if n > 3)  # counters and Muon's three coefficients are no state of a parameter
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    kernels = sum(math.prod(x.shape) for x in jax.tree.leaves(params["stack"]) if x.ndim == 3)
    # Muon keeps one number where Adam keeps two; Adafactor does not factor dimensions below 128.
    expected = {"adamw": 2 * size, "adam": 2 * size, "sgd": 0, "none": 0, "momentum": size, "lion": size}
    expected |= {"muon": 2 * size - kernels}
    if name != "adafactor":
        assert held == expected[name]
    assert held <= 2 * size


def test_a_run_file_is_a_problem(run_file):
    problem = load_problem(run_file(RUN_FILE))
    assert (problem.source, problem.name, problem.parameters, problem.global_batch) == ("run file", "run", 12, 8)
    assert problem.seq_len is None
    assert not problem.fused_attention
    assert load_problem(run_file(RUN_FILE), global_batch=32).traced.arg("batch")["x"].shape == (32, 4)


def test_a_run_file_may_give_examples_and_an_object(run_file):
    text = RUN_FILE[: RUN_FILE.index("def get_config")] + textwrap.dedent("""
        import types
        def get_config():
            return types.SimpleNamespace(
                loss_fn=loss_fn, init_fn=init_fn, global_batch=4, fused_attention=True,
                examples=[np.zeros(4, np.float32)] * 9, collate_fn=lambda xs: {"x": np.stack(xs)},
            )
    """)
    problem = load_problem(run_file(text), optimizer="sgd")
    assert problem.traced.arg("batch")["x"].shape == (4, 4)
    assert problem.fused_attention
    assert not [x for x in jax.tree.leaves(problem.opt_state) if x.ndim]


# What is refused.


@pytest.mark.parametrize(
    "model, options, words",
    [
        ("lama-3-70b", {}, "llama-3-70b"),
        ("gpt2", {"optimizer": "adamW"}, "nearest: adamw"),
        ("gpt2", {"dtype": "bf16"}, "nearest: bfloat16"),
        ("gpt2", {"param_dtype": "float23"}, "nearest: float32"),
        ("gpt2", {"task": "decoding"}, "nearest: decode"),
        ("gpt2", {"seq_len": 2048}, "seq_len=2048 is longer than the table of 1024 positions.*nearest: 1024"),
        ("gpt2", {"seq_len": 0}, "seq_len=0"),
        ("gpt2", {"global_batch": -8}, "global_batch=-8"),
        ("gpt2", {"global_batch": None}, "global_batch is not given"),
        ("vit-b16", {"seq_len": 128}, "leave seq_len=128 out"),
        ("bert-base", {"task": "decode", "seq_len": 128}, "no prefill and decode"),
        ("missing/config.json", {}, "no file missing/config.json"),
        ("missing.py", {}, "no run file missing.py"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_problem(model, **{"global_batch": 8, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("not json", "not JSON: Expecting value at line 1 column 1"),
        ('{"model_type": "llama", "hidden_size"', "is it truncated"),
        ('["llama"]', "is a list, not an object"),
        ("{}", "no model_type; supported: bart, bert, deepseek_v2"),
        ('{"model_type": "lama"}', "did you mean 'llama'.*supported: bart"),
        ('{"model_type": "llama", "vocab_size": 10}', "lacks hidden_size, num_hidden_layers, num_attention_heads"),
        (json.dumps({**LLAMA, "num_attention_heads": 31, "num_key_value_heads": 31}), "heads=31 does not divide"),
        (
            json.dumps({**LLAMA, "num_key_value_heads": 5}),
            "kv_heads=5 does not divide heads=32; nearest.*: 4 and 8",
        ),
        (json.dumps({**LLAMA, "hidden_size": "wide"}), "hidden_size='wide'; it must be a whole number"),
        (json.dumps({**LLAMA, "num_hidden_layers": 0}), "layers=0; it must be a whole number of at least 1"),
        (json.dumps({**LLAMA, "hidden_act": "mish"}), "hidden_act='mish' is not supported; supported: gelu"),
        (json.dumps({**LLAMA, "rope_scaling": {"type": "spiral"}}), "'spiral' is not supported; supported: linear"),
        (
            json.dumps({"model_type": "opt", "hidden_size": 8, "layer_norm_elementwise_affine": False}),
            "elementwise_affine=F",
        ),
    ],
)
def test_a_bad_config_json_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_problem(path, seq_len=16, global_batch=8)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("import jax\n\nraise RuntimeError('two\\nlines')", r"run.py:3 raised RuntimeError: two lines"),
        ("x = 1\ndef get_config(:\n", r"run.py:2 raised SyntaxError"),
        ("import no_such_module", r"run.py:1 raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit(3)", r"run.py:2 raised SystemExit: 3"),
        ("x = 1", "has no function get_config"),
        ("def get_config():\n    return 1 / 0", r"run.py:2 raised ZeroDivisionError"),
        ("def get_config():\n    return 7", "returned a int, not a dict"),
        (RUN_FILE.replace("init_fn=init_fn, ", ""), "get_config\\(\\) has no 'init_fn'"),
        (RUN_FILE.replace("batch={", "other={"), "get_config\\(\\) has no 'collate_fn'"),
        (RUN_FILE.replace("(8, 4)", "(8, 5)"), r"run.py:\d+ raised TypeError"),
        (RUN_FILE.replace('batch={"x": np.zeros((8, 4), np.float32)}', 'batch={"x": "text"}'), "the batch holds a str"),
        (RUN_FILE.replace(".mean()", ""), "loss_fn.*shape \\(8, 3\\).*must be a scalar"),
        (RUN_FILE.replace("loss_fn(params, batch)", "loss_fn(params, batches)"), "argument 'batches'"),
        (RUN_FILE.replace('{"w": jax.random.normal(rng, (4, 3))}', "{'w': print}"), "init_fn returned a builtin"),
        (RUN_FILE.replace("optax.adam(1e-3)", "'adam'"), "optimizer is a str"),
    ],
)
def test_a_bad_run_file_is_refused_in_one_line(run_file, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_problem(run_file(text))
    assert "\n" not in str(caught.value)


def test_a_run_file_has_its_own_batch(run_file):
    path = run_file(RUN_FILE)
    with pytest.raises(ValueError, match="leave seq_len=128 out"):
        load_problem(path, seq_len=128)
    with pytest.raises(ValueError, match="task='decode'"):
        load_problem(path, task="decode")
    with pytest.raises(ValueError, match=r"did you mean .*run\.py"):
        load_problem(path.with_name("rum.py"))
    assert jnp.dtype(load_problem(path, dtype="float32").traced.arg("params")["w"].dtype) == jnp.float32
