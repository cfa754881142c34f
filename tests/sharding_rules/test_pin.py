"""The pinned function: nothing added on one device, the user's own rematerialisation and gradients kept, and the
collectives that the compiler makes of it on 8 devices."""

import collections
import functools
import re

import hlo_collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding

from sharding_rules import MeshShape, make_layout, make_mesh, trace

P = jax.P
ONE = MeshShape()
EIGHT = MeshShape(data=2, fsdp=2, tensor=2)


def layout_of(loss, params, batch, mesh=ONE, preset="data"):
    return make_layout(trace(loss, params, batch, names=("params", "batch")), mesh, preset)


def pinned(loss, params, batch, mesh=ONE, preset="data", remat="none"):
    devices = jax.devices()[: mesh.size]
    return layout_of(loss, params, batch, mesh, preset).pin(make_mesh(mesh, devices), remat)


def primitives_of(fn, *args):
    """Names of all primitives of a function, inner jaxprs included."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            found.append(eqn.primitive.name)
            for value in eqn.params.values():
                for item in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(item, ClosedJaxpr):
                        visit(item.jaxpr)
                    elif isinstance(item, Jaxpr):
                        visit(item)

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def blocks(layers, embed, mlp, *, scanned):
    """Residual blocks: (loss, params, batch)."""

    def block(x, p):
        h = jnp.tanh(x @ p["u"])
        return x + jnp.sin(h) @ p["v"]

    def loss(params, batch):
        x = batch @ params["in"]
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = block(x, p)
        return jnp.mean((x @ params["out"]) ** 2)

    keys = iter(jax.random.split(jax.random.key(0), 2 * layers + 3))

    def weight(*shape):
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    layer = [{"u": weight(embed, mlp), "v": weight(mlp, embed)} for _ in range(layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layer) if scanned else layer
    params = {"in": weight(16, embed), "blocks": stacked, "out": weight(embed, 16)}
    return loss, params, jax.random.normal(next(keys), (256, 16))


# One device.


@pytest.mark.parametrize("name", ["gpt2", "llama_scanned", "moe_one_hot", "resnet"])
def test_one_device_adds_no_constraint(name):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(8), jax.random.key(0))
    layout = make_layout(trace(model.loss, *args, names=("params", "batch", "rng")), ONE)
    fn = layout.pin(make_mesh(ONE, jax.devices()[:1]))
    found = primitives_of(fn, *args)
    assert "sharding_constraint" not in found
    assert "dot_general" in found
    spread = layout.on(MeshShape(data=2, tensor=2), "megatron").pin(
        make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])
    )
    assert "sharding_constraint" in primitives_of(spread, *args)


def test_one_device_does_the_same_operations():
    loss, params, batch = blocks(2, 16, 24, scanned=True)
    assert sorted(primitives_of(pinned(loss, params, batch), params, batch)) == sorted(
        primitives_of(loss, params, batch)
    )


def test_arguments_of_another_structure_are_refused():
    loss, params, batch = blocks(1, 16, 24, scanned=False)
    with pytest.raises(ValueError, match="structure that was traced"):
        pinned(loss, params, batch)({**params, "more": batch}, batch)


def test_another_mesh_and_an_unknown_remat_are_refused():
    loss, params, batch = blocks(1, 16, 24, scanned=False)
    layout = layout_of(loss, params, batch, MeshShape(data=2))
    with pytest.raises(ValueError, match="this layout is for mesh data=2"):
        layout.pin(make_mesh(MeshShape(tensor=2), jax.devices()[:2]))
    with pytest.raises(ValueError, match="remat='some'; one of none, full, dots"):
        layout.pin(make_mesh(MeshShape(data=2), jax.devices()[:2]), "some")


# What the user wrote stays.


@jax.custom_vjp
def _seven_times_too_steep(x):
    return jnp.sin(x)


_seven_times_too_steep.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (7.0 * g * jnp.cos(x),))


@jax.custom_jvp
def _flat(x):
    return jnp.tanh(x)


_flat.defjvp(lambda primals, tangents: (_flat(*primals), 0.5 * tangents[0]))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("wrong", [_seven_times_too_steep, _flat])
def test_custom_gradients_stay_even_when_they_are_wrong(wrong, scanned, remat):
    def loss(params, batch):
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (x + wrong(x @ w), None), batch, params["w"])
        else:
            x = batch
            for i in range(2):
                x = x + wrong(x @ params["w"][i])
        return jnp.mean(x**2)

    params, batch = {"w": jnp.linspace(-1, 1, 128).reshape(2, 8, 8)}, jnp.linspace(-1, 1, 64).reshape(8, 8)
    want = jax.grad(loss)(params, batch)["w"]
    fn = pinned(loss, params, batch, MeshShape(data=2), "data", remat)
    got = jax.jit(jax.grad(fn))(params, batch)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_users_remat_stays_with_its_policy():
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("kept"))
    def block(x, w):
        h = checkpoint_name(jnp.sin(x @ w), "kept")
        return jnp.sin(jnp.cos(h) @ w)

    def loss(params, batch):
        return jnp.mean(block(block(batch, params), params))

    params, batch = jnp.ones((8, 8)) / 8, jnp.ones((4, 8))

    def saved(fn):
        _, vjp = jax.vjp(fn, params, batch)
        return sorted(leaf.shape for leaf in jax.tree.leaves(vjp))

    fn = pinned(loss, params, batch)
    assert primitives_of(fn, params, batch).count(CHECKPOINT) == 2
    assert saved(fn) == saved(loss)
    assert len(saved(fn)) < len(saved(lambda p, b: jnp.mean(block.__wrapped__(block.__wrapped__(b, p), p))))


CHECKPOINT = primitives_of(jax.checkpoint(jnp.sin), 1.0)[0]


def test_jitted_parts_change_nothing():
    loss, params, batch = blocks(2, 16, 24, scanned=False)
    fn = pinned(jax.jit(loss), params, batch, EIGHT, "fsdp+megatron")
    assert primitives_of(fn, params, batch) == primitives_of(
        pinned(loss, params, batch, EIGHT, "fsdp+megatron"), params, batch
    )


def test_a_loss_with_other_outputs_keeps_their_structure():
    def loss(params, batch):
        h = jnp.tanh(batch["x"] @ params["w"])
        return h.mean(), {"norm": (h**2).sum(), "h": h, "constant": 3.0, "x": batch["x"]}

    params, batch = {"w": jnp.ones((8, 16)) / 8}, {"x": jnp.ones((8, 8))}
    got = jax.jit(pinned(loss, params, batch, MeshShape(data=2, tensor=2), "megatron"))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, loss(params, batch))


# Rematerialisation.


def saved_bytes(fn, params, batch):
    """Bytes that the backward pass keeps, besides the arguments."""
    _, vjp = jax.eval_shape(lambda p, b: jax.vjp(fn, p, b), params, batch)
    arguments = [leaf.shape for leaf in jax.tree.leaves((params, batch))]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp) if leaf.shape not in arguments)


@pytest.mark.parametrize("wrap", ["plain", "jit"])
@pytest.mark.parametrize("scanned", [True, False])
def test_remat_saves_less_and_gives_the_same_gradient(scanned, wrap):
    loss, params, batch = blocks(4, 32, 128, scanned=scanned)
    loss = jax.jit(loss) if wrap == "jit" else loss
    kept = {
        remat: saved_bytes(pinned(loss, params, batch, remat=remat), params, batch)
        for remat in ("none", "dots", "full")
    }
    # One block keeps tanh and cos of the hidden layer, or two products, or its input alone.
    assert kept["full"] < kept["dots"] < kept["none"]
    assert kept["full"] < kept["none"] / 3
    want = jax.jit(jax.grad(loss))(params, batch)
    got = jax.jit(jax.grad(pinned(loss, params, batch, remat="full")))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_remat_of_a_jitted_trunk_is_by_block():
    # The trunk alone is jitted, as frameworks do: its blocks are rematerialised one by one, not the trunk at once.
    def trunk(params, x):
        for p in params:
            x = x + jnp.sin(jnp.tanh(x @ p["u"])) @ p["v"]
        return x

    def loss(params, batch):
        return jnp.mean(jax.jit(trunk)(params["trunk"], batch @ params["in"]) ** 2)

    layers = [{"u": jnp.ones((16, 64)), "v": jnp.ones((64, 16))}] * 4
    params, batch = {"trunk": layers, "in": jnp.ones((16, 16))}, jnp.ones((8, 16))
    fn = pinned(loss, params, batch, remat="full")
    assert primitives_of(fn, params, batch).count(CHECKPOINT) == 1 + 4  # what comes before the trunk, its blocks


def test_remat_leaves_a_rematerialised_layer_alone():
    model = zoo.MODELS["llama_remat"]
    args = (model.abstract_params(), model.abstract_batch(8), jax.random.key(0))
    layout = make_layout(trace(model.loss, *args, names=("params", "batch", "rng")), ONE)
    fn = layout.pin(make_mesh(ONE, jax.devices()[:1]), "full")
    assert primitives_of(fn, *args).count(CHECKPOINT) == 1


# Collectives.


def hlo_of(fn, layout, mesh, params, batch):
    """Compiled HLO of the loss and its gradient, with gradients where the parameters are."""
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), layout.specs("params"), is_leaf=lambda x: isinstance(x, P)
    )
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    batch = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        batch,
        layout.specs("batch"),
    )
    step = jax.jit(jax.value_and_grad(fn), out_shardings=(NamedSharding(mesh, P()), shardings))
    return step.lower(placed, batch).compile().as_text()


COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(text):
    """(kind, elements of the largest result) of every collective."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((match[2], max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)))
    return found


def test_fsdp_gathers_weights_and_never_a_whole_batch():
    loss, params, batch = blocks(2, 32, 64, scanned=True)  # batch 256: an activation is 256 x 32 or 256 x 64
    mesh = MeshShape(fsdp=8)
    layout = layout_of(loss, params, batch, mesh, "fsdp")
    found = collectives(hlo_of(layout.pin(make_mesh(mesh)), layout, make_mesh(mesh), params, batch))
    gathers = [size for kind, size in found if kind == "all-gather"]
    assert len(gathers) >= 4
    assert max(size for _, size in found) <= 32 * 64  # one weight of one layer; an activation is four times that


def _fused_attention(params, batch):
    B, L, D = batch.shape
    q, k, v = (t.reshape(B, L, 4, D // 4) for t in jnp.split(batch @ params["qkv"] + params["bias"], 3, axis=-1))
    p = jax.nn.softmax(jnp.einsum("blhd,bmhd->bhlm", q, k))
    out = jnp.einsum("bhlm,bmhd->blhd", p, v).reshape(B, L, D) @ params["out"]
    return jnp.mean((batch + out) ** 2)


def test_fused_qkv_gathers_weights_and_no_activation():
    params = {"qkv": jnp.ones((16, 48)), "bias": jnp.ones((1, 1, 48)), "out": jnp.ones((16, 16))}
    batch = jnp.ones((8, 64, 16))  # activations: 8 * 64 * 16 = 8192 elements; the fused weight has 768
    mesh = MeshShape(data=2, tensor=4)
    layout = layout_of(_fused_attention, params, batch, mesh, "megatron")
    assert layout.specs("params")["qkv"] == P(None, "tensor")
    text = hlo_of(layout.pin(make_mesh(mesh)), layout, make_mesh(mesh), params, batch)
    moved = [size for kind, size in collectives(text) if kind in {"all-gather", "all-to-all", "collective-permute"}]
    assert max(moved, default=0) <= 768
    # One sum of partial products over tensor, forward; none is over the whole batch.
    assert max(size for kind, size in collectives(text) if kind == "all-reduce") <= 8 * 64 * 16 // 2


def _attention(params, batch, *, swapped):
    B, L, D = batch.shape
    q, k, v = ((batch @ params[name]).reshape(B, L, 4, D // 4) for name in "qkv")
    s_BHLM = jnp.einsum("bmhd,blhd->bhlm", k, q) if swapped else jnp.einsum("blhd,bmhd->bhlm", q, k)
    p_BHLM = jax.nn.softmax(s_BHLM)
    out = jnp.einsum("bmhd,bhlm->blhd", v, p_BHLM) if swapped else jnp.einsum("bhlm,bmhd->blhd", p_BHLM, v)
    return jnp.mean((batch + out.reshape(B, L, D) @ params["out"]) ** 2)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("context, tensor", [(2, 1), (4, 1), (8, 1), (2, 4), (4, 2)])
def test_context_gathers_keys_and_values_and_sums_no_statistics(swapped, context, tensor):
    loss = functools.partial(_attention, swapped=swapped)
    params = {name: jnp.ones((16, 16)) for name in ("q", "k", "v", "out")}
    batch = jnp.ones((8, 64, 16))
    mesh = MeshShape(data=8 // (context * tensor), context=context, tensor=tensor)
    layout = layout_of(loss, params, batch, mesh, "megatron")
    text = hlo_of(layout.pin(make_mesh(mesh)), layout, make_mesh(mesh), params, batch)
    found = hlo_collectives.collectives(text, mesh)
    keys = 4 * 8 * 64 * 16 // (mesh.data * tensor)
    over_context = collections.Counter()
    for c in found:
        if "context" in c.axes:
            over_context[c.kind] += c.bytes
    # Keys and values forward; their gradients and those of the weights, which lie split over tensor, and the loss.
    assert over_context == {"all_gather": 2 * keys, "sum": 2 * keys + 4 * 4 * 16 * 16 // tensor + 4}


def test_megatron_block_sums_once_forward():
    loss, params, batch = blocks(1, 32, 64, scanned=False)
    mesh = MeshShape(tensor=8)
    layout = layout_of(loss, params, batch, mesh, "megatron")
    fn = layout.pin(make_mesh(mesh))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(make_mesh(mesh), spec), layout.specs("params"), is_leaf=lambda x: isinstance(x, P)
    )
    text = jax.jit(fn, in_shardings=(shardings, None)).lower(params, batch).compile().as_text()
    # The sum over the split features of the first product, the sum over mlp, and the loss.
    assert sorted(collectives(text)) == [("all-reduce", 1), ("all-reduce", 256 * 32), ("all-reduce", 256 * 32)]


def test_outputs_are_sharded_as_promised():
    def features(params, batch):
        return jnp.tanh(batch @ params["w"])

    params, batch = {"w": jnp.ones((8, 16))}, jnp.ones((8, 8))
    mesh = MeshShape(data=2, tensor=2)
    layout = layout_of(features, params, batch, mesh, "megatron")
    assert layout.out_specs == P("data", "tensor")
    out = jax.jit(layout.pin(make_mesh(mesh, jax.devices()[:4])))(params, batch)
    assert out.sharding.spec == P("data", "tensor")
