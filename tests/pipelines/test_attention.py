"""Attention's kernels, interpreted on CPU devices, equal the plain computation; the plan and the platform choose."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_architectures import make_batch, make_params, tiny

from pipelines.attention import AttentionKernels, attention_kernels, choose, spread
from redco_like.models import build_model
from search.saved import saved_activations
from search.workload import workload
from sharding_rules import AttentionCall, MeshShape, attention, make_layout, make_mesh, trace
from sharding_rules.inline import inline_calls
from sharding_rules.kernels import causal_keep, plain_attention

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5
"""Of values and gradients of order 1, in float32: sums in another order."""
ALONG = P(("data", "fsdp"), "context", "tensor")
WHOLE = P()
CALLS = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "window": {"causal": True, "window": 60},
    "softcap": {"causal": True, "softcap": 2.0},
}


def operands(B=2, L=256, N=4, K=2, H=16, V=16, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=(B, L, heads, width)), jnp.float32) for heads, width in ((N, H), (K, H), (K, V))
    )


def plain(call, q, k, v):
    keep = causal_keep(q.shape[1], k.shape[1], None, call.window) if call.causal else None
    return plain_attention(q, k, v, scale=call.scale, keep=keep, softcap=call.softcap)


def value_and_gradients(f, given):
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=jax.eval_shape(f, *given).shape), jnp.float32)

    def both(*given):
        out, back = jax.vjp(f, *given)
        return out, *back(weights)

    return jax.jit(both)(*given)


def assert_kernel_equals_plain(call, platform, mesh_name, given, kernel, keys=WHOLE):
    shape = MeshShape.parse(mesh_name)
    mesh = make_mesh(shape, devices=jax.devices()[: shape.size])
    kernels = AttentionKernels(platform, interpret=True)
    got = value_and_gradients(lambda *xs: kernels(call, mesh, xs, [ALONG, keys, keys]), given)
    assert [choice.kernel for choice in kernels.choices.values()] == [kernel]
    for have, want in zip(got, value_and_gradients(lambda *xs: plain(call, *xs), given), strict=True):
        np.testing.assert_allclose(have, want, atol=TOLERANCE * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    "name, mesh, sizes",
    [
        pytest.param("causal", "data=2,tensor=2,context=2", {}, id="causal-grouped-context"),
        pytest.param("window", "tensor=2,context=2", {"B": 1, "L": 512}, id="window-context"),
        pytest.param("softcap", "data=2", {}, id="softcap"),
        pytest.param("full", "context=2", {"L": 256}, id="full-context"),
        pytest.param("full", "data=1", {"B": 1, "L": 197}, id="full-padded"),
        pytest.param("causal", "data=1", {"B": 1, "L": 150, "H": 24}, id="causal-padded-values-narrower"),
        pytest.param("causal", "tensor=4", {"B": 1, "N": 8}, id="tensor-above-kv-heads"),
        pytest.param("causal", "tensor=8", {"B": 1, "N": 8, "K": 1}, id="multi-query"),
    ],
)
def test_splash_equals_plain_value_and_gradients(name, mesh, sizes):
    assert_kernel_equals_plain(AttentionCall(scale=0.3, **CALLS[name]), "tpu", mesh, operands(**sizes), "splash")


@pytest.mark.parametrize("name, mesh", [("causal", "data=2,tensor=2,context=2"), ("full", "context=4")])
def test_splash_gathers_keys_that_are_split(name, mesh):
    call = AttentionCall(scale=0.3, **CALLS[name])
    assert_kernel_equals_plain(call, "tpu", mesh, operands(L=512), "splash", keys=ALONG)


def test_gradients_of_keys_are_scattered_as_they_are_summed():
    mesh, call = make_mesh(MeshShape(context=4), devices=jax.devices()[:4]), AttentionCall(scale=0.3, causal=True)
    kernels = AttentionKernels("tpu", interpret=True)

    def total(*xs):
        return kernels(call, mesh, xs, [ALONG, ALONG, ALONG]).sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*operands(L=512)))
    over = re.findall(r"\b(all_gather|reduce_scatter|psum)\w*\[[^]]*'context'", text)
    assert sorted(over) == ["all_gather"] * 2 + ["reduce_scatter"] * 2


@pytest.mark.parametrize(
    "name, mesh, sizes",
    [
        pytest.param("causal", "data=2,tensor=2", {}, id="causal-grouped"),
        pytest.param("full", "data=1", {"B": 1, "L": 197}, id="full-padded"),
        pytest.param("causal", "tensor=4", {"B": 1, "N": 8, "L": 150}, id="tensor-above-kv-heads-padded"),
    ],
)
def test_triton_equals_plain_value_and_gradients(name, mesh, sizes):
    assert_kernel_equals_plain(AttentionCall(scale=0.3, **CALLS[name]), "gpu", mesh, operands(**sizes), "triton")


@functools.cache
def decoder(name):
    """A tiny decoder in float32 at length 128: its loss, parameters, batch, and loss and gradients without a kernel."""
    config = tiny(name, max_length=128)
    model = build_model(config, dtype="float32")
    params = make_params(model.init_fn)
    batch = make_batch(config, rows=4, length=128)

    def loss(params, batch):
        total, count = model.loss_fn(params, batch)
        return total / count

    layout = make_layout(trace(loss, params, batch, names=("params", "batch")), MeshShape())
    return params, batch, layout, jax.jit(jax.value_and_grad(loss))(params, batch)


@pytest.mark.parametrize(
    "name, mesh_name, preset, remat",
    [
        ("llama-3-8b", "fsdp=2,tensor=4", "fsdp+megatron", "dots"),  # 4 heads, 2 kv heads
        ("mistral-7b", "data=2,fsdp=2,tensor=2", "fsdp+megatron+sequence", "full"),
        ("deepseek-v2", "data=2,tensor=2", "megatron", "none"),
    ],
)
def test_pinned_decoder_with_kernels_equals_plain(name, mesh_name, preset, remat):
    params, batch, layout, (loss, gradients) = decoder(name)
    shape = MeshShape.parse(mesh_name)
    layout, mesh = layout.on(shape, preset), make_mesh(shape, jax.devices()[: shape.size])
    kernels = AttentionKernels("tpu", interpret=True)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, layout.specs("params"))
    pinned = layout.pin(mesh, remat, kernels)
    got, sharded = jax.jit(jax.value_and_grad(pinned))(placed, batch)
    (parts,) = kernels.choices
    assert kernels.choices[parts].kernel == "splash"
    assert parts.ways == (1, shape.tensor)
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    for want, have in zip(*map(jax.tree.leaves, (gradients, sharded)), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4 * float(np.abs(want).max()) + 1e-7)


# What the model's jaxpr says stays what it was.


def written_out(f, *given):
    """The jaxpr with its calls written out, and the calls of `attention` in it."""
    found = {}
    return str(inline_calls(jax.make_jaxpr(f)(*given), found)), list(found.values())


def test_marked_call_written_out_is_plain_attention():
    given = operands(L=8)
    call = AttentionCall(causal=True, scale=0.3, window=3, softcap=2.0)
    text, found = written_out(lambda q, k, v: attention(q, k, v, causal=True, scale=0.3, window=3, softcap=2.0), *given)
    assert (text, []) == written_out(functools.partial(plain, call), *given)
    assert [one.call for one in found] == [call]


def unmarked(q, k, v, *, more=None, **static):
    """As `attention`, with nothing in the jaxpr that says so."""
    call = AttentionCall(**static)
    keep = causal_keep(q.shape[1], k.shape[1], None, call.window) if call.causal else None
    return plain_attention(q, k, v, scale=call.scale, more=more, keep=keep, softcap=call.softcap)


@pytest.mark.parametrize("name", ["mistral-7b", "deepseek-v2"])
def test_planner_sees_the_same_work_and_memory_in_a_marked_call(name, monkeypatch):
    config = tiny(name)
    model, batch = build_model(config), make_batch(config)
    params = jax.eval_shape(model.init_fn, jax.eval_shape(jax.random.key, 0))

    def seen():
        traced = trace(lambda params, batch: model.loss_fn(params, batch)[0], params, batch, names=("params", "batch"))
        facts: list = [str(make_layout(traced, MeshShape(tensor=2), "megatron").specs("params"))]
        for remat in ("none", "dots"):
            saved = saved_activations(traced, remat, fused_attention=True)
            ops = workload(traced, remat=remat, fused_attention=True).ops
            facts.append(Counter((x.shape, str(x.dtype), x.axes, x.trips) for x in saved))
            facts.append(Counter((op.kind, op.phase, op.flops, op.trips, op.axes) for op in ops))
        return facts

    marked = seen()
    monkeypatch.setattr("redco_like.models.attention.attention", unmarked)
    assert marked == seen()


def test_only_plain_calls_are_found():
    given = operands(B=1, L=8)

    def one(q, k, v):
        return attention(q, k, v, causal=True, scale=0.3)

    batched = [jnp.stack([x, x]) for x in given]
    assert not written_out(jax.vmap(one), *batched)[1]
    assert not written_out(lambda *xs: jax.jvp(one, xs, xs)[1], *given)[1]
    checkpointed = written_out(lambda *xs: jax.checkpoint(one)(*xs), *given)[1]
    assert [found.call.name for found in checkpointed] == ["attention_causal_scale0.3"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"causal": False, "window": 3}, "window=3 with causal=False"),
        ({"causal": True, "window": 0}, "window=0"),
    ],
)
def test_attention_refuses_windows_that_it_has_not(changes, message):
    with pytest.raises(ValueError, match=message):
        attention(*operands(L=8), scale=1.0, **changes)


def test_attention_refuses_shapes_that_do_not_go_together():
    q, k, v = operands(L=8)
    with pytest.raises(ValueError, match="multiple of K"):
        attention(q[:, :, :3], k, v, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="8 queries and 7 keys"):
        attention(q, k[:, :7], v[:, :7], causal=True, scale=1.0)


# The choice.


def parts_of(spec=ALONG, mesh="data=1", call=None, **sizes):
    q, k, v = jax.eval_shape(functools.partial(operands, **sizes))
    shape = MeshShape.parse(mesh)
    call = call or AttentionCall(causal=True, scale=0.3)
    return spread(call, make_mesh(shape, jax.devices()[: shape.size]), q, k, v, spec, spec)


@pytest.mark.parametrize(
    "platform, cudnn, changes, kernel, reason",
    [
        ("tpu", "", {}, "splash", "TPU"),
        ("tpu", "", {"L": 64}, "plain", "less than a tile"),
        ("tpu", "", {"L": 384, "mesh": "context=2"}, "plain", "no multiple of 128 on each"),
        ("tpu", "", {"spec": P(None, None, None, "tensor"), "mesh": "tensor=2"}, "plain", "head dimension"),
        ("tpu", "", {"H": 512}, "plain", "head dimension of 512"),
        ("tpu", "", {"N": 6, "K": 2, "mesh": "tensor=3"}, "plain", "share no whole keys"),
        ("cuda", "", {}, "cudnn", "cuDNN"),
        ("gpu", "none here", {}, "triton", "none here"),
        ("gpu", "none here", {"V": 8}, "plain", "as wide as keys"),
        ("gpu", "none here", {"call": AttentionCall(True, 0.3, window=9)}, "plain", "no window"),
        ("gpu", "", {"mesh": "context=2"}, "plain", "no positions"),
        ("cpu", "", {}, "plain", "no kernel for cpu"),
    ],
)
def test_choice_follows_platform_and_shapes(platform, cudnn, changes, kernel, reason):
    choice = choose(parts_of(**changes), platform, cudnn=cudnn)
    assert choice.kernel == kernel
    assert reason in choice.reason


def test_cpus_and_plain_plans_have_no_kernels():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    assert attention_kernels("fused", mesh) is None
    assert attention_kernels("plain", mesh) is None


def test_what_is_computed_plainly_is_told_once():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    given = jax.eval_shape(functools.partial(operands, H=260))
    kernels = AttentionKernels("tpu")
    call = AttentionCall(causal=True, scale=0.3)
    with pytest.warns(UserWarning, match="head dimension of 260"):
        assert kernels(call, mesh, given, [P(), P(), P()]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels(call, mesh, given, [P(), P(), P()]) is None


# What the TPU compiler makes of it.


@pytest.mark.aot
@pytest.mark.parametrize("mesh, remat", [("data=4,tensor=2", "none"), ("data=2,context=2,tensor=2", "dots")])
def test_compiled_step_has_the_kernels_and_no_scores(mesh, remat):
    child = pathlib.Path(__file__).with_name("attention_child.py")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, child, mesh, remat],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {"choices": ["splash"], "kernels": ["dkv", "dq", "fwd"], "scores": []}
