"""Folders of PEFT: names and shapes, there and back, what is refused; and PEFT itself with the same logits."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from redco_like import lora
from redco_like.lora.peft import CONFIG, TENSORS
from redco_like.models import Experts, ModelConfig, load, save
from redco_like.models.weights.loading import abstract_params, nested

SIZES: dict[str, Any] = {"embed": 32, "layers": 2, "heads": 4, "mlp": 64, "vocab": 96, "max_length": 64}
LLAMA: dict[str, Any] = {
    "kv_heads": 2,
    "norm": "rms",
    "gated": True,
    "activation": "silu",
    "tied": False,
    "position": "rotary",
}
CONFIG_LLAMA = ModelConfig("llama", "decoder", **SIZES, **LLAMA)


def adapters_of(config, patterns, **options):
    base = nested({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in abstract_params(config).items()})
    adapters = lora.init(jax.random.key(0), base, patterns, **{"rank": 4, "alpha": 6, **options})
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)


def rewritten(folder, **changes):
    record = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(record | changes))


def test_names_and_shapes_are_pefts(tmp_path):
    adapters = adapters_of(CONFIG_LLAMA, ["*attention/[qv]/kernel"], stabilised=True)
    lora.save_peft(tmp_path, CONFIG_LLAMA, adapters, base_model="some/base")
    record, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / TENSORS)
    assert record["target_modules"] == ["q_proj", "v_proj"]
    assert (record["peft_type"], record["task_type"], record["r"], record["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 6)
    assert record["use_rslora"]
    assert record["base_model_name_or_path"] == "some/base"
    assert len(tensors) == 2 * 2 * 2
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora"
    a, b = tensors[f"{name}_A.weight"], tensors[f"{name}_B.weight"]
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    kept = adapters["stack/layers/attention/v/kernel"]
    np.testing.assert_allclose(b @ a, np.asarray(kept.a[1] @ kept.b[1]).T, rtol=1e-5, atol=1e-6)


def test_adapters_come_back_as_they_were(tmp_path):
    adapters = adapters_of(CONFIG_LLAMA, ["*/kernel"])
    lora.save_peft(tmp_path, CONFIG_LLAMA, adapters)
    found = lora.load_peft(tmp_path, CONFIG_LLAMA)
    assert found.keys() == adapters.keys()
    jax.tree.map(np.testing.assert_array_equal, {p: adapters[p] for p in found}, found)


def test_layers_without_an_adapter_get_zeros(tmp_path):
    lora.save_peft(tmp_path, CONFIG_LLAMA, adapters_of(CONFIG_LLAMA, ["*/up/kernel"]))
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: v for k, v in tensors.items() if ".layers.0." not in k}, tmp_path / TENSORS)
    (adapter,) = lora.load_peft(tmp_path, CONFIG_LLAMA).values()
    assert float(jnp.abs(adapter.delta()[0]).max()) == 0
    assert float(jnp.abs(adapter.delta()[1]).max()) > 0


@pytest.mark.parametrize(
    "config, patterns, message",
    [
        (ModelConfig("gpt2", "decoder", **SIZES), ["*attention/q/kernel"], "q/kernel.* a part of the tensor .*c_attn"),
        (
            ModelConfig("mixtral", "decoder", **SIZES, **LLAMA, experts=Experts(4, 2, 32)),
            ["*/mlp/up"],
            "'stack/layers/mlp/up' cannot be written for PEFT: it is no kernel of a dense layer",
        ),
        (CONFIG_LLAMA, ["embed"], "'embed' cannot be written .*merge it with lora.merge"),
    ],
)
def test_what_peft_has_no_adapter_for_is_refused(tmp_path, config, patterns, message):
    with pytest.raises(ValueError, match=message):
        lora.save_peft(tmp_path / "a", config, adapters_of(config, patterns))
    assert not (tmp_path / "a").exists()


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        lora.load_peft(tmp_path, CONFIG_LLAMA)
    adapters = adapters_of(CONFIG_LLAMA, ["*/up/kernel"])
    lora.save_peft(tmp_path, CONFIG_LLAMA, adapters)
    wide = ModelConfig("llama", "decoder", **{**SIZES, "mlp": 96}, **LLAMA)
    with pytest.raises(ValueError, match=r"up_proj.weight' maps 32 inputs to 96, .*\(4, 32\) and \(64, 4\)"):
        lora.load_peft(tmp_path, wide)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' is no linear layer of gpt2"):
        lora.load_peft(tmp_path, ModelConfig("gpt2", "decoder", **SIZES))
    with pytest.raises(ValueError, match=r"is for kernels of .*another model"):
        lora.save_peft(tmp_path / "a", wide, adapters)
    rewritten(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match="use_dora is True; only plain LoRA"):
        lora.load_peft(tmp_path, CONFIG_LLAMA)
    rewritten(tmp_path, use_dora=False, peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        lora.load_peft(tmp_path, CONFIG_LLAMA)


@pytest.mark.reference
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_peft_has_the_same_logits_both_ways(tmp_path, family):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind: dict[str, Any] = {**LLAMA, "qk_norm": family == "qwen3", "head_dim": 8}
    if family == "gpt2":
        kind = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
        kind |= {"position": "learned", "activation": "gelu_tanh"}
    loaded = load(ModelConfig(family, "decoder", **SIZES, **kind), random_seed=0)
    save(tmp_path / "base", loaded.model, loaded.params)
    patterns = ["*mlp/*/kernel"] if family == "gpt2" else ["*attention/*/kernel", "*mlp/up/kernel"]
    adapters = adapters_of(loaded.config, patterns, stabilised=family == "qwen3")
    lora.save_peft(tmp_path / "adapter", loaded.config, adapters, base_model=str(tmp_path / "base"))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 12))

    def ours(adapters):
        params = lora.merge(loaded.params, adapters)
        return loaded.model.module.apply({"params": params}, jnp.asarray(tokens, jnp.int32))[0]

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(tokens)).logits.numpy()

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    np.testing.assert_allclose(
        ours(adapters), theirs(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), atol=1e-5
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    targets = ["c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    made = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"))
    for key, value in made.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.1)
    made.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(ours(lora.load_peft(tmp_path / "theirs", loaded.config)), theirs(made), atol=1e-5)
