"""Experts on a mesh equal experts on one device, loss and every gradient; no device works on the tokens of others."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny_architectures import make_batch, make_params, tiny

from pipelines.experts import experts_kernels
from pipelines.grouped import grouped_dot, obstacle
from pipelines.grouped_tpu import grouped_dot_tpu
from pipelines.kernels import kernels_for
from redco_like.models import build_model
from sharding_rules import MeshShape, experts, make_layout, make_mesh, trace

TOLERANCE = 1e-4
"""Relative to the largest entry of each gradient: float32 sums in another order."""
B, L, D, E, F = 8, 24, 32, 8, 64


def mixture(params, batch, *, per_token, gated, skewed):
    """One layer of experts; where `skewed`, nearly all tokens choose the first ones."""
    x = batch["x"] @ params["in"]
    scores = x @ params["router"]
    if skewed:
        scores += jnp.where(jnp.arange(E) < per_token, 100.0, 0.0)[None, None]
    weight, expert = jax.lax.top_k(jax.nn.softmax(scores), per_token)
    gate = params["gate"] if gated else None
    y = experts(x, expert, weight, params["up"], params["down"], gate, activation=jax.nn.silu)
    return jnp.square(y @ params["out"]).sum()


@functools.cache
def one_layer(per_token, gated, skewed):
    rng = np.random.default_rng(0)
    shapes = {"in": (D, D), "router": (D, E), "up": (E, D, F), "gate": (E, D, F), "down": (E, F, D), "out": (D, D)}
    params = {name: jnp.asarray(rng.normal(size=s) * s[-2] ** -0.5, jnp.float32) for name, s in shapes.items()}
    if not gated:
        del params["gate"]
    batch = {"x": jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)}
    loss = functools.partial(mixture, per_token=per_token, gated=gated, skewed=skewed)
    return (
        params,
        batch,
        jax.jit(jax.value_and_grad(loss))(params, batch),
        trace(loss, params, batch, names=("params", "batch")),
    )


def on_mesh(params, batch, traced, shape, preset, remat="none", kernels=None):
    """Compiled value_and_grad of a traced loss, and its arguments."""
    layout, mesh = make_layout(traced, shape, preset), make_mesh(shape)

    def put(tree, specs):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    pinned = layout.pin(mesh, remat, kernels or kernels_for("fused", mesh))
    args = put(params, layout.specs("params")), put(batch, layout.specs("batch"))
    return jax.jit(jax.value_and_grad(pinned)).lower(*args).compile(), args


def assert_equal(want, got):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(want[1]), jax.tree.leaves(got[1]), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= TOLERANCE * np.abs(a).max() + 1e-7, path


def has_array(text, *sizes):
    """Whether a compiled program has an array with dimensions of these sizes."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}
    return any(set(sizes) <= set(shape) for shape in shapes)


MESHES = [
    ("data=8", "data"),
    ("fsdp=8", "fsdp"),
    ("data=2,tensor=4", "megatron"),
    ("data=2,tensor=4", "megatron+sequence"),
    ("data=2,context=4", "data"),
    ("fsdp=2,expert=4", "fsdp"),
    ("expert=8", "data"),
    ("data=2,expert=2,tensor=2", "megatron+sequence"),
    ("fsdp=2,expert=2,context=2", "fsdp"),
]


@pytest.mark.parametrize("mesh, preset", MESHES, ids=[f"{m}-{p}" for m, p in MESHES])
def test_one_layer_equals_unsharded(mesh, preset):
    params, batch, want, traced = one_layer(2, True, False)
    compiled, args = on_mesh(params, batch, traced, MeshShape.parse(mesh), preset)
    assert_equal(want, compiled(*args))


@pytest.mark.parametrize("per_token, gated, skewed", [(1, False, False), (2, True, True), (1, True, True)])
@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "data=2,expert=4"])
def test_no_token_is_dropped_where_all_choose_the_same_experts(per_token, gated, skewed, mesh):
    params, batch, want, traced = one_layer(per_token, gated, skewed)
    shape = MeshShape.parse(mesh)
    compiled, args = on_mesh(params, batch, traced, shape, "megatron" if shape.tensor > 1 else "data")
    assert_equal(want, compiled(*args))


@pytest.mark.parametrize(
    "name, mesh, preset, remat",
    [
        ("mixtral-8x7b", "fsdp=2,expert=2,tensor=2", "fsdp+megatron+sequence", "none"),
        pytest.param("mixtral-8x7b", "fsdp=4,tensor=2", "fsdp+megatron", "full", marks=pytest.mark.slow),
        pytest.param("mixtral-8x7b", "data=2,context=2,expert=2", "data", "dots", marks=pytest.mark.slow),
        ("deepseek-v3", "fsdp=2,expert=2,tensor=2", "fsdp+megatron+sequence", "full"),
    ],
)
def test_scanned_decoders_equal_unsharded(name, mesh, preset, remat):
    config = tiny(name)
    assert config.experts is not None
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, balance=0.01))
    model = build_model(config, dtype="float32")
    params, batch = make_params(model.init_fn), make_batch(config, rows=8)

    def loss(params, batch):
        return model.loss_fn(params, batch)[0]

    want = jax.jit(jax.value_and_grad(loss))(params, batch)
    traced = trace(loss, params, batch, names=("params", "batch"))
    compiled, args = on_mesh(params, batch, traced, MeshShape.parse(mesh), preset, remat)
    assert_equal(want, compiled(*args))


def test_a_device_multiplies_its_own_rows():
    params, batch, _, traced = one_layer(2, True, False)
    shape = MeshShape(data=8)
    layout, mesh = make_layout(traced, shape, "data"), make_mesh(shape)
    abstract = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        (params, batch),
        (layout.specs("params"), layout.specs("batch")),
    )
    text = {}
    for name, kernels in (("plain", None), ("local", kernels_for("fused", mesh))):
        text[name] = jax.jit(layout.pin(mesh, kernels=kernels)).lower(*abstract).compile().as_text() or ""
    assert has_array(text["plain"], B * L * 2, D)
    assert not has_array(text["local"], B * L * 2, D)
    assert has_array(text["local"], B * L * 2 // 8, D)


def test_own_experts_take_room_for_their_share_of_the_tokens():
    params, batch, _, traced = one_layer(2, True, False)
    compiled, _ = on_mesh(params, batch, traced, MeshShape(expert=8), "data")
    text = compiled.as_text() or ""
    rows = B * L * 2
    assert not has_array(text, rows, F)
    assert has_array(text, rows // 8, F)


def test_one_device_has_no_kernels_for_experts():
    assert experts_kernels(make_mesh(MeshShape(), jax.devices()[:1])) is None


@pytest.mark.parametrize("grouped", [grouped_dot, grouped_dot_tpu])
@pytest.mark.parametrize("counts", [(100, 0, 200, 57), (0, 0, 0, 300), (128, 128, 0, 0), (1, 1, 1, 1)])
def test_grouped_products_are_those_of_ragged_dot(counts, grouped):
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((357, 128), (4, 128, 256), (357, 256)))
    counts = jnp.asarray(counts, jnp.int32)
    inside = (jnp.arange(357) < counts.sum())[:, None]

    def products(dot):
        y, pull = jax.vjp(lambda x, w: jnp.where(inside, dot(jnp.where(inside, x, 0), w), 0), x, w)
        return y, *pull(g)

    want = products(lambda x, w: jax.lax.ragged_dot(x, w, counts))
    for a, b in zip(want, products(lambda x, w: grouped(x, w, counts, True)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("counts", [(700, 0, 1000, 300), (0, 512, 512, 1024), (0, 0, 1, 0), (2100, 0, 0, 0)])
def test_gradients_of_matrices_of_several_blocks_and_tiles(counts):
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2100, 1100), (4, 1100, 200), (2100, 200)))
    counts = jnp.asarray(counts, jnp.int32)
    inside = (jnp.arange(2100) < counts.sum())[:, None]
    x, g = jnp.where(inside, x, jnp.nan), jnp.where(inside, g, jnp.nan)
    _, pull = jax.vjp(lambda w: grouped_dot_tpu(x, w, counts, True), w)
    _, plain = jax.vjp(lambda w: jax.lax.ragged_dot(jnp.where(inside, x, 0), w, counts), w)
    want = plain(jnp.where(inside, g, 0))[0]
    np.testing.assert_allclose(pull(g)[0], want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("inner, columns", [(176, 96), (64, 200), (130, 128)])
def test_grouped_products_of_any_size(inner, columns):
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((150, inner), (3, inner, columns), (150, columns))
    )
    counts = jnp.asarray((70, 30, 50), jnp.int32)
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, counts, True), x, w)
    want, plain = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, counts), x, w)
    for a, b in zip((want, *plain(g)), (y, *pull(g)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


def test_what_grouped_products_do_not_take_is_said():
    bf16, f32 = jnp.bfloat16, jnp.float32
    assert obstacle(bf16, bf16, bf16) == ""
    assert "bfloat16 and float32" in obstacle(bf16, f32)
