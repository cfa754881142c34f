"""Models: published sizes, finite losses, causality, inference equal to training, and the planner's axes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_architectures import ALIKE, DECODERS, FAMILIES, LENGTH, make_batch, make_params, tiny

from redco_like.models import architecture, build_model
from redco_like.models.attention import alibi
from redco_like.models.layers import Mixture
from redco_like.models.rotary import rope_frequencies
from search.workload import workload
from sharding_rules import MeshShape, make_layout, make_mesh, path_str, trace
from sharding_rules.kernels import plain_attention

QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# As the papers, the model cards or the README of the authors have them.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "mpt-7b": 6_649_286_656,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-xxl": 11_135_332_352,
    # With the bias of the logits, a buffer that the published count leaves out.
    "bart-base": 139_420_416 + 50_265,
    "bart-large": 406_291_456 + 50_265,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "vit-h14": 632_045_800,
}
# Published only rounded, in millions.
ROUNDED = {
    "gpt3-175b": (174_600, 100),
    "opt-66b": (65_700, 100),
    "vit-g14": (1_012.6, 0.1),
    "vit-bigg14": (1_844.4, 0.1),
}


def abstract_key():
    return jax.eval_shape(jax.random.key, 0)


def count_parameters(config):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(build_model(config).init_fn, abstract_key())))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_count(name):
    assert count_parameters(architecture(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_equal_the_published_count_as_far_as_it_goes(name):
    millions, digit = ROUNDED[name]
    assert abs(count_parameters(architecture(name)) / 1e6 - millions) <= digit / 2 + 1e-9


@functools.cache
def made(name):
    """Model, parameters, and its compiled loss and gradients as a function of parameters and batch."""
    model = build_model(tiny(name), dtype="float32")
    step = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True), compiler_options=QUICK_COMPILE)
    return model, make_params(model.init_fn), step


def compiled(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in names]


def loss_of(step, params, batch):
    return float(step(params, batch)[0][0])


@pytest.mark.parametrize("name", compiled(FAMILIES))
def test_loss_is_finite_and_every_parameter_has_a_gradient(name):
    model, params, step = made(name)
    (total, count), grads = step(params, make_batch(model.config))
    assert float(count) == (4 if model.config.kind == "vision" else 4 * LENGTH)
    assert 0.5 < float(total / count) < 20
    flat = {path_str(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(g).all() for g in flat.values())
    unused = [path for path, g in flat.items() if not np.any(g)]
    # The router's correction is moved by the load, not by the gradient; BART's bias of the logits is a buffer.
    known = ("mlp/correction", *(["head_bias"] if model.config.kind == "encoder-decoder" else []))
    assert [path for path in unused if not path.endswith(known)] == []


@pytest.mark.parametrize("name", compiled(DECODERS))
def test_a_decoder_sees_no_later_token(name):
    model, params, step = made(name)
    batch = make_batch(model.config)
    cut = LENGTH // 2
    before = np.arange(LENGTH)[None] < cut
    batch["tokens"] = np.where(before, batch["tokens"] % 28, 28 + batch["tokens"] % 28).astype(np.int32)
    other = np.where(before, batch["tokens"], 28).astype(np.int32)
    early = {**batch, "labels": np.where(before, batch["labels"], -1).astype(np.int32)}
    (total, _), grads = step(params, early)
    assert loss_of(step, params, {**early, "tokens": other}) == pytest.approx(float(total), rel=1e-6)
    # Later losses do change, so that the test can fail.
    changed = loss_of(step, params, {**batch, "tokens": other})
    assert changed != pytest.approx(loss_of(step, params, batch), rel=1e-4)
    if not model.config.tied:
        assert np.any(np.asarray(grads["embed"][:28]))
        assert not np.any(np.asarray(grads["embed"][28:]))


@pytest.mark.parametrize("name, sees", [("llama-3-8b", True), ("mistral-7b", False), ("gemma-2-2b", True)])
def test_a_window_hides_what_lies_before_it_in_all_layers(name, sees):
    model, params, step = made(name)
    batch = make_batch(model.config)
    # Two layers with windows of 5 reach back 8 tokens; Gemma's second layer sees everything.
    batch["labels"][:, :-1] = -1
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][:, 0] = (batch["tokens"][:, 0] + 1) % 56
    same = loss_of(step, params, batch) == pytest.approx(loss_of(step, params, other), rel=1e-6)
    assert same != sees


@pytest.mark.parametrize(
    "name", compiled(["gpt2", "mpt-7b", "opt-125m", "gemma-2-2b", "gemma-3-1b", "mixtral-8x7b", "deepseek-v3"])
)
def test_inference_gives_the_logits_of_training(name):
    model, params, _ = made(name)
    tokens = jnp.asarray(make_batch(model.config, rows=2)["tokens"])
    jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    whole = jit(lambda p, t: model.module.apply({"params": p}, t)[0])(params, tokens)
    prompt = LENGTH - 3
    logits, cache = jit(model.prefill)(params, tokens[:, :prompt], model.init_cache(2, 20))
    assert {x.shape[:2] for x in cache.values()} == {(2, 2)}
    np.testing.assert_allclose(logits[:, 0], whole[:, prompt - 1], rtol=1e-4, atol=1e-4)
    decode = jit(model.decode)
    for position in range(prompt, LENGTH):
        logits, cache = decode(params, tokens[:, position : position + 1], cache, jnp.int32(position))
        np.testing.assert_allclose(logits[:, 0], whole[:, position], rtol=1e-4, atol=1e-4)


def test_the_cache_is_updated_where_it_is():
    model = build_model(tiny("llama-3-8b", layers=8, max_length=4096), dtype="float32")
    params = jax.eval_shape(model.init_fn, abstract_key())
    cache = jax.eval_shape(lambda: model.init_cache(2, 4096))
    assert {x.shape for x in cache.values()} == {(8, 2, 2, 4096, 8)}
    token, position = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    memory = jax.jit(model.decode, donate_argnums=2).lower(params, token, cache, position).compile().memory_analysis()
    bytes_of_cache = sum(4 * math.prod(x.shape) for x in cache.values())
    assert memory.alias_size_in_bytes >= bytes_of_cache
    assert memory.temp_size_in_bytes < bytes_of_cache / 2


@pytest.mark.parametrize("name, first", [("bert-base", "tokens"), ("t5-v1.1-base", "source")])
def test_padding_is_not_attended_to(name, first):
    model, params, step = made(name)
    batch = make_batch(model.config)
    keep = np.repeat(np.arange(LENGTH)[None] < 9, 4, axis=0)
    if first == "tokens":
        batch["labels"] = np.where(keep, batch["labels"], -1).astype(np.int32)
    other = {**batch, first: np.where(keep, batch[first], 3).astype(np.int32)}
    masked = [loss_of(step, params, {**b, "mask": keep}) for b in (batch, other)]
    assert masked[0] == pytest.approx(masked[1], rel=1e-6)
    open_ = [loss_of(step, params, b) for b in (batch, other)]
    assert open_[0] != pytest.approx(open_[1], rel=1e-4)


def test_grouped_heads_equal_repeated_keys():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, n, 4)), jnp.float32) for n in (6, 2, 2))
    keep = jnp.tril(jnp.ones((5, 5), bool))[None, None, None]
    grouped = plain_attention(q, k, v, scale=0.5, keep=keep)
    repeated = plain_attention(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), scale=0.5, keep=keep)
    theirs = jax.nn.dot_product_attention(q, k, v, scale=0.5, is_causal=True)
    parts = plain_attention(q[..., :2], k[..., :2], v, more=(q[..., 2:], k[..., 2:]), scale=0.5, keep=keep)
    for other in (repeated, theirs, parts):
        np.testing.assert_allclose(grouped, other, rtol=1e-5, atol=1e-6)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi(8, 2, 2, None)[0, :, 1, 0], [-(2.0**-i) for i in range(1, 9)])
    assert alibi(6, 2, 2, None).shape == (1, 6, 2, 2)


def test_rope_scaling_leaves_fast_frequencies_and_stretches_slow_ones():
    for name in ("llama-3.1-8b", "deepseek-v3"):
        config = architecture(name)
        assert config.rope_scaling is not None
        plain, _ = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        scaled, _ = rope_frequencies(config)
        assert scaled[0] == pytest.approx(plain[0])
        assert scaled[-1] == pytest.approx(plain[-1] / config.rope_scaling.factor)
        assert np.all(np.diff(scaled) < 0)


def test_the_balance_loss_is_one_where_all_experts_are_as_likely():
    config = tiny("mixtral-8x7b")
    module = Mixture(config, config.experts, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 32)), jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]
    even = {**params, "router": jnp.zeros_like(params["router"])}
    _, balance = module.apply({"params": even}, x)
    assert float(balance) == pytest.approx(1.0)
    # All tokens to the same two experts: half of the choices times all of the weight, times 8 experts, twice.
    one_way = {**params, "router": jnp.zeros((32, 8)).at[:, :2].set(100 * jnp.sign(x[0, 0])[:, None])}
    _, balance = module.apply({"params": one_way}, x[:1, :1])
    assert float(balance) == pytest.approx(4.0, rel=1e-3)


def test_parameters_start_near_a_uniform_guess():
    model, _, step = made("llama-3-8b")
    params = jax.jit(model.init_fn, compiler_options=QUICK_COMPILE)(jax.random.key(0))
    (total, count), _ = step(params, make_batch(model.config))
    assert float(total / count) == pytest.approx(math.log(56), rel=0.02)


# The planner's view.


@functools.cache
def traced_loss(name, rows=8):
    config = tiny(name)
    model = build_model(config, dtype="float32")
    batch = model.abstract_batch(rows, None if config.kind == "vision" else LENGTH)
    params = jax.eval_shape(model.init_fn, abstract_key())
    return trace(lambda p, b: model.loss_fn(p, b)[0], params, batch, names=("params", "batch"))


COLUMNS = frozenset("q k v q_nope q_rope k_b v_b up gate".split())
ROWS = frozenset({"out", "down"})


@pytest.mark.parametrize("name", FAMILIES)
def test_tensor_parallelism_splits_heads_and_hidden_layers(name):
    config = tiny(name)
    layout = make_layout(traced_loss(name), MeshShape(fsdp=2, tensor=2), "fsdp+megatron")
    roles = {row.role for row in layout.rows.rows}
    assert {"heads", "kv_heads"} & roles
    assert "mlp" in roles
    assert ("expert" in roles) == (config.experts is not None)
    shapes = {path_str(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(layout.traced.arg("params"))}
    specs = jax.tree_util.tree_leaves_with_path(layout.specs("params"), is_leaf=lambda x: isinstance(x, PartitionSpec))
    seen = set()
    for path, spec in specs:
        text = path_str(path)
        parts = text.removesuffix("/kernel").split("/")
        if text.endswith("/bias") or parts[-1] not in COLUMNS | ROWS:
            continue
        where = [i for i, entry in enumerate(spec) if "tensor" in (entry if isinstance(entry, tuple) else (entry,))]
        assert where == [len(shapes[text]) - (1 if parts[-1] in COLUMNS else 2)], text
        seen.add(parts[-1])
    assert seen >= {"up", "down", "out"}
    assert seen >= ({"q_nope", "q_rope", "k_b", "v_b"} if config.latent else {"q", "k", "v"})


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_recognised(name):
    work = workload(traced_loss(name), grad=False, fused_attention=True)
    kinds = [op.kind for op in work.ops]
    assert kinds.count("attention") == {"encoder-decoder": 3}.get(tiny(name).kind, 1 + (tiny(name).dense_layers > 0))
    assert not work.unknown


@pytest.mark.parametrize(
    "name, mesh, preset",
    [
        ("llama-3-8b", MeshShape(data=2, fsdp=2, tensor=2), "fsdp+megatron"),
        ("mixtral-8x7b", MeshShape(fsdp=2, expert=2, tensor=2), "fsdp+megatron"),
    ],
)
def test_sharded_equals_unsharded(name, mesh, preset):
    model, params, step = made(name)
    batch = make_batch(model.config, rows=8)
    (total, _), grads = step(params, batch)
    layout = make_layout(traced_loss(name), mesh, preset)
    on_mesh = make_mesh(mesh)

    def put(tree, specs):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(on_mesh, spec)), tree, specs)

    sharded = jax.jit(jax.value_and_grad(layout.pin(on_mesh)), compiler_options=QUICK_COMPILE)
    loss, found = sharded(put(params, layout.specs("params")), put(batch, layout.specs("batch")))
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    for path, expected in jax.tree_util.tree_leaves_with_path(grads):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, found)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale, err_msg=path_str(path))
