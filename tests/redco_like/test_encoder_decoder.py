"""T5 and BART: training, causality, the cache, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_architectures import LENGTH, make_batch, make_params, tiny

from redco_like.models import build_model
from redco_like.models.encoder_decoder import bucket_bounds, read_by_decode
from redco_like.models.greedy import greedy
from redco_like.problem import load_problem
from sharding_rules import MeshShape, make_layout, make_mesh, path_str, trace

QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@functools.cache
def made(name):
    model = build_model(tiny(name), dtype="float32")
    return model, make_params(model.init_fn)


@functools.cache
def whole(name):
    """Logits of all labels, from the source, what the decoder reads, and the mask."""
    model, _ = made(name)
    return jit(lambda p, source, tokens, keep: model.module.apply({"params": p}, tokens, source=source, keep=keep)[0])


@functools.cache
def stepped(name):
    """Loss, number of labels and gradients, from parameters and a batch with a mask."""
    model, _ = made(name)
    return jit(jax.value_and_grad(model.loss_fn, has_aux=True))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 56, shape).astype(np.int32)


def padded(rows, length):
    """A mask whose rows keep different numbers of tokens."""
    return np.arange(length)[None] < np.arange(length - rows + 1, length + 1)[:, None]


def test_bart_on_eight_devices_equals_one():
    model, params = made("bart-base")
    batch = {**make_batch(model.config, rows=8), "mask": padded(8, LENGTH)}
    batch["labels"][:, -2:] = -1
    (total, count), grads = stepped("bart-base")(params, batch)
    assert float(count) == 8 * (LENGTH - 2)
    mesh = MeshShape(data=2, fsdp=2, tensor=2)
    traced = trace(lambda p, b: model.loss_fn(p, b)[0], params, batch, names=("params", "batch"))
    layout = make_layout(traced, mesh, "fsdp+megatron")
    on_mesh = make_mesh(mesh)

    def put(tree, specs):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(on_mesh, spec)), tree, specs)

    step = jit(jax.value_and_grad(layout.pin(on_mesh)))
    loss, found = step(put(params, layout.specs("params")), put(batch, layout.specs("batch")))
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    for (path, expected), actual in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(found), strict=True
    ):
        # A bias of all keys alike has no gradient but rounding.
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale, err_msg=path_str(path))


@pytest.mark.parametrize("name", ["bart-base", "t5-v1.1-base"])
def test_the_decoder_sees_the_source_and_no_later_label(name):
    _, params = made(name)
    source, tokens = draw(2, LENGTH), draw(2, LENGTH, seed=1)
    keep = padded(2, LENGTH)
    logits = whole(name)(params, source, tokens, keep)
    later = tokens.copy()
    later[:, 9:] = (later[:, 9:] + 1) % 56
    other = whole(name)(params, source, later, keep)
    np.testing.assert_array_equal(logits[:, :9], other[:, :9])
    assert np.abs(logits[:, 9:] - other[:, 9:]).max() > 1e-3
    behind = source.copy()
    behind[:, -1] = (behind[:, -1] + 1) % 56
    other = whole(name)(params, behind, tokens, keep)
    # The first row's mask hides the last token of the source; the second row's does not.
    np.testing.assert_array_equal(logits[0], other[0])
    assert np.abs(logits[1] - other[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["bart-base", "t5-v1.1-base", pytest.param("mbart-large", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["decode", "extend"])
def test_inference_gives_the_logits_of_training(name, mode):
    model, params = made(name)
    source, tokens, keep = draw(2, 11), draw(2, LENGTH, seed=1), padded(2, 11)
    expected = whole(name)(params, source, tokens, keep)
    memory = jit(model.encode)(params, source, keep)
    # Room for a longer source than there is.
    cache = model.init_cache(2, 20, source=13)
    assert cache["cross_keys"].shape == (2, 2, 4, 13, 8)
    prompt = 6
    logits, cache = jit(model.prefill)(params, tokens[:, :prompt], cache, memory)
    np.testing.assert_allclose(logits[:, 0], expected[:, prompt - 1], rtol=1e-4, atol=1e-4)
    if mode == "decode":
        decode, params = jit(model.decode), read_by_decode(params)
        assert "encoder" not in params
        for position in range(prompt, LENGTH):
            logits, cache = decode(params, tokens[:, position : position + 1], cache, jnp.int32(position))
            np.testing.assert_allclose(logits[:, 0], expected[:, position], rtol=1e-4, atol=1e-4)
        return
    # Rows at positions of their own: the second one reads three of its tokens again.
    position = np.array([prompt, prompt - 3], np.int32)
    more = np.stack([tokens[row, p : p + 4] for row, p in enumerate(position)])
    logits, cache = jit(model.extend)(params, more, cache, position, last_B=np.array([2, 3], np.int32))
    last = position + np.array([2, 3])
    np.testing.assert_allclose(logits[:, 0], expected[np.arange(2), last], rtol=1e-4, atol=1e-4)


def test_the_decoders_cache_is_updated_where_it_is():
    model = build_model(tiny("bart-base", max_length=4096, decoder_layers=8), dtype="float32")
    params = jax.eval_shape(model.init_fn, jax.eval_shape(jax.random.key, 0))
    cache = jax.eval_shape(lambda: model.init_cache(2, 4096))
    token, position = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    memory = jax.jit(model.decode, donate_argnums=2).lower(params, token, cache, position).compile().memory_analysis()
    size = sum(x.dtype.itemsize * x.size for x in cache.values())
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


@pytest.mark.parametrize("name", ["bart-base", "t5-v1.1-base"])
def test_greedy_writes_the_likeliest_tokens_up_to_the_end(name):
    model, params = made(name)
    source, keep = draw(2, 11), padded(2, 11)
    T = LENGTH if name == "bart-base" else 6

    def write(**options):
        return np.asarray(jit(functools.partial(greedy, model, **options))(params, source, keep))

    tokens = write(max_tokens=T)
    read = np.full((2, LENGTH), model.config.start_token, np.int32)
    read[:, 1:T] = tokens[:, :-1]
    np.testing.assert_array_equal(np.argmax(whole(name)(params, source, read, keep)[:, :T], axis=-1), tokens)
    if name != "bart-base":
        return
    end = int(tokens[0, 3])
    for row, written in zip(tokens, write(max_tokens=T, eos=end), strict=True):
        at = list(row).index(end) + 1 if end in row else T
        np.testing.assert_array_equal(written, [*row[:at], *[-1] * (T - at)])
    # A prompt of two tokens goes on where these end.
    np.testing.assert_array_equal(write(max_tokens=4, prompt_BL=read[:, :2]), tokens[:, 1:5])


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    model, params = made("bart-base")
    batch = {**make_batch(model.config, rows=8), "mask": padded(8, LENGTH)}
    batch["labels"][:] = -100
    (total, count), grads = stepped("bart-base")(params, batch)
    assert float(total) == float(count) == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_what_stands_for_a_label_that_is_left_out_does_not_matter():
    model, params = made("bart-base")
    batch = {**make_batch(model.config, rows=8), "mask": padded(8, LENGTH)}
    losses = []
    for ignored in (-100, -1):
        batch["labels"][:, 8:] = ignored
        (total, count), _ = stepped("bart-base")(params, batch)
        losses.append(float(total))
        assert float(count) == 8 * 8
    assert losses[0] == losses[1] > 0


def test_bad_input_is_refused():
    model, params = made("bart-base")
    ids = np.zeros((2, 4), np.int32)
    long = np.zeros((2, 25), np.int32)
    with pytest.raises(ValueError, match="seq_len=25 is longer than the table of 24 positions that bart learns"):
        model.encode(params, long)
    with pytest.raises(ValueError, match="table of 24 positions"):
        model.loss_fn(params, {"source": long, "labels": ids})
    with pytest.raises(ValueError, match=r"source of shape \(2, 0\) is empty"):
        model.encode(params, ids[:, :0])
    with pytest.raises(ValueError, match=r"source of shape \(2, 0\) is empty"):
        model.loss_fn(params, {"source": ids[:, :0], "labels": ids})
    with pytest.raises(ValueError, match="table of 24 positions"):
        greedy(model, params, ids, max_tokens=25)
    with pytest.raises(ValueError, match="max_tokens=0"):
        greedy(model, params, ids, max_tokens=0)
    with pytest.raises(ValueError, match=r"prefill needs memory=model\.encode"):
        model.prefill(params, ids, model.init_cache(2, 8))
    with pytest.raises(ValueError, match="neither a source, nor the memory of one, nor a cache"):
        model.module.apply({"params": params}, ids)
    memory = jax.eval_shape(model.encode, params, ids)
    with pytest.raises(ValueError, match=r"a source of 4 tokens for a cache of 3; nearest: init_cache\(source=4\)"):
        jax.eval_shape(model.prefill, params, ids, model.init_cache(2, 8, source=3), memory)
    decoder, _ = made("gpt2")
    with pytest.raises(ValueError, match=r"gpt2 \(decoder\) has no encoder"):
        decoder.encode({}, ids)


def test_the_source_of_t5_has_no_longest_length():
    model, params = made("t5-base")
    assert model.config.max_length < 30
    assert jax.eval_shape(model.encode, params, np.zeros((1, 30), np.int32)).values_BSD.shape == (1, 30, 32)


def test_bounds_of_the_buckets_grow_by_a_factor():
    # Of the paper's 32 buckets: 16 for keys before the query, of which the last 8 go from 8 to 128.
    assert bucket_bounds(16, 128) == [12, 16, 23, 32, 46, 64, 91]
    assert bucket_bounds(32, 128) == [19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


@pytest.mark.parametrize("name", ["bart-base", "t5-v1.1-base"])
@pytest.mark.parametrize("task", ["prefill", "decode"])
def test_tensor_parallel_inference_splits_heads_of_both_caches(name, task):
    problem = load_problem(tiny(name), seq_len=LENGTH, global_batch=8, task=task)
    layout = make_layout(problem.traced, MeshShape(data=2, tensor=4), "megatron")
    specs = layout.specs("state")
    for key in ("keys", "values", "cross_keys", "cross_values"):
        assert specs[key] == P(None, "data", "tensor"), key
    params = layout.specs("params")
    cross, mlp = params["decoder"]["layers"]["cross"], params["decoder"]["layers"]["mlp"]
    assert ("encoder" in params) == (task == "prefill")
    assert set(cross) == ({"q", "k", "v", "out"} if task == "prefill" else {"q", "out"})
    assert {name: part["kernel"] for name, part in cross.items()} == {
        name: P(None, "tensor") if name == "out" else P(None, None, "tensor") for name in cross
    }
    assert mlp["down"]["kernel"] == P(None, "tensor")
