"""BERT, ViT, T5 and BART against transformers: tiny random models that transformers wrote, read under three plans.

The differences are of float32 sums in another order: on logits of size 1 to 10 they are near 1e-5.
"""

from __future__ import annotations

import functools
import warnings

import jax
import numpy as np
import pytest

from pipelines.infer import build_predict_program
from redco_like.models import load, save
from redco_like.models.encoder_decoder import bucket_bias
from redco_like.models.greedy import greedy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

ROWS, SOURCE, LABELS, TOKENS, VOCAB = 8, 24, 16, 64, 96
PLANS = {
    "one device": ("fsdp", "data=1"),
    "fsdp 8": ("fsdp", "fsdp=8"),
    "tensor 2 x data 4": ("megatron", "data=4,tensor=2"),
}

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
_BART = {
    **{"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 80},
    **{
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("attention_heads", 4), ("ffn_dim", 48))
    },
}


def models():
    """Name -> a function that makes transformers' model."""
    t = transformers
    return {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=VOCAB, max_position_embeddings=40, **_WIDTHS)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=4, num_labels=6, **_WIDTHS)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=VOCAB, **_T5)),
        "t5-v1.1": lambda: untied(
            t.T5ForConditionalGeneration(
                t.T5Config(vocab_size=VOCAB, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_T5)
            )
        ),
        "mt5": lambda: untied(t.MT5ForConditionalGeneration(t.MT5Config(vocab_size=VOCAB, **_T5))),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(vocab_size=VOCAB, **_BART)),
        "mbart": lambda: t.MBartForConditionalGeneration(
            t.MBartConfig(vocab_size=VOCAB, scale_embedding=True, decoder_start_token_id=5, **_BART)
        ),
    }


def untied(model):
    """Version 1.1 and mT5 have a head of their own, as published; transformers 5 makes it the table."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.all_tied_weights_keys.pop("lm_head.weight")
    return model


NAMES = ("bert", "vit", "t5", "t5-v1.1", "mt5", "bart", "mbart")


def size_of(name, path):
    """Of random numbers, such that greedy rows do not stay at one token: 8 to 40 kinds of them per test."""
    if path.endswith(("bias", "logits_bias")):
        return 0.05
    if "embed" in path or "shared" in path:
        return 2.0 if "positions" in path else 0.25
    # T5 does not scale its scores.
    return 0.06 if ".q." in path else {"t5": 0.8, "bart": 0.15, "mbart": 0.15}.get(name, 0.25)


@functools.cache
def reference(name):
    """transformers' model with random parameters, biases and norms included."""
    model = models()[name]().eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, x in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(x.shape, generator=rng)
            if not x.dtype.is_floating_point or path.endswith("embed_scale"):
                continue
            if "norm" in path.lower() and path.endswith("weight"):
                x.copy_(1 + 0.2 * noise)
            else:
                x.copy_(noise * size_of(name, path))
    if hasattr(model, "generation_config") and model.generation_config is not None:
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


@functools.cache
def inputs(name):
    rng = np.random.default_rng(1)
    keep = np.arange(SOURCE)[None] < rng.integers(5, SOURCE + 1, ROWS)[:, None]
    ids = {
        n: rng.integers(3, VOCAB, (ROWS, length)).astype(np.int32)
        for n, length in (("tokens", SOURCE), ("labels", LABELS))
    }
    if name == "vit":
        return {"images": rng.normal(size=(ROWS, 16, 16, 3)).astype(np.float32)}
    if name == "bert":
        return {"tokens": ids["tokens"], "types": rng.integers(0, 2, (ROWS, SOURCE)).astype(np.int32), "mask": keep}
    return {"source": ids["tokens"], "tokens": ids["labels"], "mask": keep}


def their_logits(name, model):
    batch = {key: torch.tensor(x) for key, x in inputs(name).items()}
    with torch.no_grad():
        if name == "vit":
            return model(pixel_values=batch["images"].permute(0, 3, 1, 2)).logits.numpy()
        mask = batch["mask"].long()
        if name == "bert":
            return model(input_ids=batch["tokens"], token_type_ids=batch["types"], attention_mask=mask).logits.numpy()
        out = model(input_ids=batch["source"], attention_mask=mask, decoder_input_ids=batch["tokens"])
        return out.logits.numpy()


def they_write(name, model):
    batch = {key: torch.tensor(x) for key, x in inputs(name).items()}
    options = transformers.GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, pad_token_id=1, decoder_start_token_id=start_token(name)
    )
    out = model.generate(input_ids=batch["source"], attention_mask=batch["mask"].long(), generation_config=options)
    return out.numpy()[:, 1:]


def start_token(name):
    return {"bart": 2, "mbart": 5}.get(name, 0)


@functools.cache
def expected(name):
    """Logits that transformers computes, and the tokens that it writes, where the model writes any."""
    written = None if name in ("bert", "vit") else they_write(name, reference(name))
    return their_logits(name, reference(name)), written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name -> the folder that transformers wrote, once."""
    root = tmp_path_factory.mktemp("written_by_transformers")

    @functools.cache
    def write(name):
        reference(name).save_pretrained(root / name)
        return root / name

    return write


def ours(loaded, name):
    """Logits and written tokens, computed as the plan says."""
    model = loaded.model

    def predict(params, batch):
        apply = functools.partial(model.module.apply, {"params": params})
        if name == "vit":
            return {"logits": apply(batch["images"])}
        if name == "bert":
            return {"logits": apply(batch["tokens"], batch["types"], batch["mask"])}
        logits, _ = apply(batch["tokens"], source=batch["source"], keep=batch["mask"])
        return {"logits": logits, "written": greedy(model, params, batch["source"], batch["mask"], max_tokens=TOKENS)}

    batch = inputs(name)
    program = build_predict_program(predict, loaded.params, batch, loaded.plan, loaded.mesh)
    params, state = program.place(loaded.params)
    found = program.predict(params, jax.device_put(batch, program.batch_shardings), jax.random.key(0), state)
    return jax.tree.map(np.asarray, found)


def difference(name, logits, wanted):
    """The greatest, over what is no padding; refuses logits that are all alike."""
    if name == "bert":
        logits, wanted = logits[inputs(name)["mask"]], wanted[inputs(name)["mask"]]
    assert logits.shape == wanted.shape
    assert np.abs(wanted).max() > 1
    assert wanted.std() > 0.2
    return float(np.abs(logits - wanted).max())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, plan, folder):
    preset, mesh = PLANS[plan]
    loaded = load(folder(name), plan=preset, mesh=mesh, dtype="float32")
    found = ours(loaded, name)
    logits, written = expected(name)
    greatest = difference(name, found["logits"], logits)
    print(f"\n{name}, {plan}: max abs difference {greatest:.1e} of logits up to {np.abs(logits).max():.1f}")
    assert greatest < 1e-4
    if written is not None:
        assert len(np.unique(written)) > 8
        np.testing.assert_array_equal(found["written"], written)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_transformers_loads(name, folder, tmp_path):
    loaded = load(folder(name), plan="fsdp", mesh="fsdp=8", dtype="float32")
    save(tmp_path / "saved", loaded.model, loaded.params)
    model, notes = type(reference(name)).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert not notes["mismatched_keys"]
    again = their_logits(name, model.eval())
    np.testing.assert_array_equal(again, expected(name)[0])


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 16), (64, 1000)])
def test_every_distance_is_in_the_bucket_that_transformers_puts_it_in(buckets, distance, both_ways):
    length = 1200
    table = np.arange(buckets, dtype=np.float32)[:, None]
    found = bucket_bias(table, 1, length, np.int32(600), both_ways=both_ways, distance=distance)[0, 0, 0]
    relative = torch.arange(length)[None] - 600
    attention = transformers.models.t5.modeling_t5.T5Attention
    wanted = attention._relative_position_bucket(relative, both_ways, buckets, distance)[0].numpy()
    np.testing.assert_array_equal(found, wanted)
