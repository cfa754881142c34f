"""Adapters: nothing changes at first, merged equals apart, sharded equals one device, the base is never trained."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import redco_like as rl
from pipelines import build_train_program
from pipelines.problem import init_like, train_problem
from redco_like import lora
from redco_like.models import Experts, ModelConfig, build_model
from redco_like.quantize import quantize
from search import Plan, Space, TracedModel, parse_cluster, solve
from sharding_rules import MeshShape, make_mesh, tree_paths

SIZES = {"embed": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 128, "vocab": 96, "norm": "rms", "gated": True}
CONFIG = ModelConfig("llama", "decoder", **SIZES, activation="silu", tied=False, position="rotary", max_length=64)
KERNELS = ["*attention/*/kernel", "*mlp/*/kernel"]
F32_SHARDED = 1e-4


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, dtype="float32")


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.init_fn)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, 96, (8, 17)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def drawn(base, patterns=KERNELS, **options):
    """Adapters that change something: `b` is drawn too."""
    adapters = lora.init(jax.random.key(1), base, patterns, **{"rank": 4, "alpha": 8, **options})
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)


def test_new_adapters_change_nothing(model, base, batch):
    adapters = lora.init(jax.random.key(1), base, KERNELS, rank=4)
    assert len(adapters) == 7
    for apply in ("merged", "flax"):
        tuned = jax.jit(lora.wrap(model.loss_fn, apply=apply))(lora.join(base, adapters), batch)
        np.testing.assert_allclose(tuned, model.loss_fn(base, batch), rtol=1e-6)


def test_keys_belong_to_paths(base):
    few = lora.init(jax.random.key(1), base, ["*attention/q/kernel"], rank=4)
    many = lora.init(jax.random.key(1), base, KERNELS, rank=4)
    (path,) = few
    np.testing.assert_array_equal(few[path].a, many[path].a)
    assert np.abs(many[path].a - many[path.replace("/q/", "/out/")].a).max() > 1e-3


@pytest.mark.parametrize("small", [False, True], ids=["whole", "nf4"])
def test_apart_equals_merged_in_loss_and_gradient(model, base, batch, small):
    base = quantize(base, KERNELS) if small else base
    adapters = drawn(base)
    want = jax.jit(model.loss_fn)(lora.merge(base, adapters), batch)[0]
    grads = []
    for apply in ("merged", "flax"):
        loss_fn = lora.wrap(model.loss_fn, apply=apply)
        loss_and_grad = jax.jit(jax.value_and_grad(lambda a, f=loss_fn: f(lora.join(base, a), batch)[0]))
        loss, grad = loss_and_grad(adapters)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        grads.append(grad)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[0])) > 1e-6


def test_experts_and_tables_of_flax_modules_are_adapted_too(batch):
    config = ModelConfig("mixtral", "decoder", **SIZES, activation="silu", experts=Experts(4, 2, 32))
    model = build_model(config, dtype="float32")
    base = jax.jit(model.init_fn)(jax.random.key(0))
    adapters = drawn(base, ["*/mlp/up", "*/mlp/down", "embed"])
    assert adapters["stack/layers/mlp/up"].a.shape == (2, 4, 64, 4)
    loss_fn = jax.jit(model.loss_fn)
    want = loss_fn(lora.merge(base, adapters), batch)
    assert abs(want[0] - loss_fn(base, batch)[0]) > 1e-3
    for apply in ("merged", "flax"):
        got = jax.jit(lora.wrap(model.loss_fn, apply=apply))(lora.join(base, adapters), batch)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_dense_layers_apart_never_make_the_whole_product(model, base, batch):
    params = lora.join(base, drawn(base))

    def makes_kernels(apply):
        text = str(jax.make_jaxpr(lora.wrap(model.loss_fn, apply=apply))(params, batch))
        return re.search(r"f32\[2,64,128\] = (add|dot_general)|f32\[64,128\] = (add|dot_general)", text) is not None

    assert makes_kernels("merged")
    assert not makes_kernels("flax")


@pytest.mark.parametrize(
    "shape, split", [((3, 4), (0, 1)), ((2, 3, 4), (1, 1)), ((2, 3, 4), (0, 2)), ((2, 1, 4, 3, 2), (2, 1))], ids=str
)
@pytest.mark.parametrize("stabilised", [False, True])
def test_merge_adds_scaled_products_of_any_split(shape, split, stabilised):
    kernel = np.ones(shape, np.float32)
    adapters = drawn({"w": kernel}, {"w": lora.Split(*split)}, rank=2, alpha=3.0, stabilised=stabilised)
    stacked = shape[: split[0]]
    a = np.asarray(adapters["w"].a).reshape(*stacked, -1, 2)
    b = np.asarray(adapters["w"].b).reshape(*stacked, 2, -1)
    scale = 3.0 / (2**0.5 if stabilised else 2)
    want = kernel + scale * (a @ b).reshape(shape)
    np.testing.assert_allclose(lora.merge({"w": kernel}, adapters)["w"], want, rtol=1e-5, atol=1e-6)


def test_plain_functions_and_predictions_can_be_wrapped():
    base = {"foo": jnp.eye(4), "bar": {"w": jnp.ones((4, 3))}}
    adapters = drawn(base, [re.compile("foo|bar/.")], rank=2)

    def pred_fn(params, batch, rng=None):
        return batch @ params["foo"] @ params["bar"]["w"]

    x = jnp.ones((2, 4))
    np.testing.assert_allclose(
        lora.wrap(pred_fn)(lora.join(base, adapters), batch=x), pred_fn(lora.merge(base, adapters), x), rtol=1e-6
    )


def test_merged_parameters_have_the_form_of_the_base(base):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    tuned = lora.merge(half, drawn(half))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tuned) == jax.tree.map(lambda x: (x.shape, x.dtype), half)


def test_backward_pass_holds_no_written_out_kernels_and_leaves_rematerialisation_to_the_plan(model, base, batch):
    small = quantize(base, KERNELS)
    adapters = drawn(small)
    loss_fn = lora.wrap(model.loss_fn, apply="flax")
    text = str(jax.make_jaxpr(jax.grad(lambda a: loss_fn(lora.join(small, a), batch)[0]))(adapters))
    assert "f32[64,128]" in text
    assert "f32[2,64,128]" not in text
    assert "checkpoint" not in text
    assert "remat" not in text


# On a mesh.


def run(model, params, batch, shape, apply, steps=2, **plan):
    preset = {1: "data"}.get(shape.size, "fsdp+megatron" if shape.tensor > 1 else "fsdp")
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    program = build_train_program(
        lora.wrap(model.loss_fn, apply=apply),
        init_like(params),
        optax.adamw(1e-2),
        batch,
        Plan(shape, preset, **plan),
        mesh,
    )
    state = program.state_from(params)
    losses = []
    for _ in range(steps):
        state, metrics = program.step(state, jax.device_put(batch, program.batch_shardings))
        losses.append(float(metrics["loss"]))
    return program, state, losses


@pytest.mark.parametrize("apply, remat, small", [("merged", "none", False), ("flax", "dots", True)])
def test_steps_on_a_mesh_equal_one_device(model, base, batch, apply, remat, small):
    base = quantize(base, KERNELS, double=True) if small else base
    params = lora.join(base, drawn(base))
    _, one, losses = run(model, params, batch, MeshShape(), apply)
    _, state, sharded = run(model, params, batch, MeshShape(data=2, fsdp=2, tensor=2), apply, remat=remat)
    np.testing.assert_allclose(losses, sharded, rtol=F32_SHARDED)
    assert losses[-1] < losses[0] - 0.02
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4),
        *jax.device_get((one.params["adapters"], state.params["adapters"])),
    )
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((params["base"], state.params["base"])))
    assert all(path.startswith("adapters/") for path in tree_paths(state.opt_state[0].mu))
    kernel = jax.tree.leaves(state.params["base"].frozen["stack"]["layers"]["mlp"]["up"]["kernel"])[0]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2


def test_trainer_learns_with_adapters_alone_and_the_merged_model_is_the_same(model, base, batch, tmp_path):
    rows = [{"tokens": t, "labels": y} for t, y in zip(batch["tokens"], batch["labels"], strict=True)]

    def collate(examples):
        return {name: np.stack([e[name] for e in examples]) for name in ("tokens", "labels")}

    adapters = lora.init(jax.random.key(1), base, KERNELS, rank=8, alpha=16)
    with rl.Deployer(tmp_path, compile_cache=False) as deployer:
        deployer.devices = deployer.devices[:2]
        trainer = rl.Trainer(
            deployer,
            collate,
            lora.wrap(model.loss_fn, apply="flax"),
            None,
            optax.adamw(2e-2),
            params=lora.join(base, adapters),
            plan="fsdp",
        )
        before = trainer.evaluate(rows, global_batch=8)["loss"]
        trainer.fit(rows, global_batch=8, steps=8)
        after = trainer.evaluate(rows)["loss"]
    assert after < before - 0.3
    total, count = jax.jit(model.loss_fn)(lora.merge(base, trainer.params["adapters"]), batch)
    np.testing.assert_allclose(total / count, after, rtol=F32_SHARDED)


def test_plan_holds_no_gradients_and_no_optimizer_state_of_the_base(model, base, batch):
    params = lora.join(base, lora.init(jax.random.key(0), base, KERNELS, rank=4))

    cluster = parse_cluster("1xH100")

    def memory(loss_fn, init_fn):
        traced, opt_state = train_problem(loss_fn, init_fn, optax.adamw(1e-3), batch, "float32")
        best = solve(Space(TracedModel(traced, opt_state, cluster), cluster)).best
        assert best is not None
        return best.estimate.memory

    tuned = memory(lora.wrap(model.loss_fn, apply="flax"), init_like(params))
    whole = memory(model.loss_fn, init_like(base))
    adapters, everything = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params["adapters"], base))
    assert (whole["params"], whole["gradients"], whole["optimizer"] - 4) == (everything, everything, 2 * everything)
    assert (tuned["params"], tuned["gradients"]) == (everything + adapters, adapters)
    assert tuned["optimizer"] - 4 == 2 * adapters


# Bad input.


@pytest.mark.parametrize(
    "patterns, options, message",
    [
        (["*attention/query/kernel"], {}, "matches none of the 12 parameters; nearest: stack/layers/attention"),
        ([re.compile("head")], {}, "'head' matches none"),
        ([], {}, "no patterns are given"),
        (KERNELS, {"rank": 0}, "rank=0; it must be a whole number"),
        (KERNELS, {"rank": 33}, "'stack/layers/attention/k/kernel' of shape .* rank of 33 .* nearest: 32"),
        (["norm/scale"], {}, "'norm/scale' has shape .* is no matrix"),
        ({"head/kernel": lora.Split(2, 1)}, {}, "'head/kernel' has shape .*leave none for the outputs"),
    ],
)
def test_adapters_that_cannot_be_are_refused(base, patterns, options, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), base, patterns, **{"rank": 4, **options})


def test_adapters_of_another_model_are_refused(model, base, batch):
    adapters = drawn(base)
    other = build_model(ModelConfig("llama", "decoder", **{**SIZES, "mlp": 256}), dtype="float32")
    params = jax.eval_shape(other.init_fn, jax.random.key(0))
    with pytest.raises(ValueError, match=r"'stack/layers/mlp/down/kernel' .*\(2, 128, 64\).*\(2, 256, 64\)"):
        lora.merge(params, adapters)
    with pytest.raises(ValueError, match="matches none of the 1 parameters; nearest: foo"):
        lora.join({"foo": jnp.ones((2, 2))}, adapters)
    with pytest.raises(ValueError, match="no adapters"):
        lora.merge(base, {})


def test_functions_that_cannot_be_wrapped_are_refused(model, base, batch):
    with pytest.raises(ValueError, match="must name `params`"):
        lora.wrap(lambda weights, batch: 0.0)
    with pytest.raises(ValueError, match="one of merged, flax"):
        lora.wrap(model.loss_fn, apply="fused")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lora\.join"):
        lora.wrap(model.loss_fn)(base, batch)
    adapters = drawn({"w": jnp.ones((2, 2, 4))}, {"w": lora.Split(0, 2)}, rank=2)
    with pytest.raises(ValueError, match="nearest: apply='merged'"):
        lora.wrap(model.loss_fn, apply="flax")(lora.join({"w": jnp.ones((2, 2, 4))}, adapters), batch)


def test_modules_that_are_no_dense_layer_are_left_alone():
    module = nn.Conv(4, (3,))
    x = jnp.ones((1, 8, 2))
    base = module.init(jax.random.key(0), x)["params"]
    adapters = drawn(base, ["kernel"], rank=1)

    def apply(params, x):
        return np.asarray(module.apply({"params": params}, x))

    want = apply(lora.merge(base, adapters), x)
    np.testing.assert_allclose(lora.wrap(apply, apply="flax")(lora.join(base, adapters), x), want, rtol=1e-5)
