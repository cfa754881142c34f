"""Properties over random models, shapes and meshes: specs are legal, bytes are those that JAX places, names and
wrapping do not matter, and the pinned function computes the same."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from zoo.base import abstract_key

from sharding_rules import MeshShape, PlanError, make_layout, make_mesh, trace

P = jax.P
PRESETS = ("data", "fsdp", "megatron", "fsdp+megatron", "fsdp+megatron+sequence")
few = functools.partial(settings, deadline=None, derandomize=True)
sizes = st.integers(1, 12)
meshes = st.sampled_from(
    [
        MeshShape(),
        MeshShape(data=3),
        MeshShape(fsdp=4),
        MeshShape(fsdp=8),
        MeshShape(tensor=4),
        MeshShape(data=2, fsdp=2, tensor=2),
        MeshShape(fsdp=2, tensor=3),
        MeshShape(data=2, context=2),
        MeshShape(expert=2, tensor=2),
    ]
)


def is_spec(x):
    return isinstance(x, P)


@st.composite
def models(draw):
    """A random perceptron or attention block: (loss, params, batch) with random sizes, abstract."""
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    examples = draw(st.sampled_from([1, 2, 6, 8]))
    if draw(st.booleans()):
        widths = draw(st.lists(sizes, min_size=2, max_size=5))
        residual = draw(st.booleans())

        def loss(params, batch):
            x = batch
            for layer in params:
                y = jnp.tanh(x @ layer["w"] + layer["b"][None])
                x = x + y if residual and y.shape == x.shape else y
            return jnp.mean(x**2)

        params = [{"w": shape(a, b), "b": shape(b)} for a, b in itertools.pairwise(widths)]
        return loss, params, shape(examples, widths[0])
    vocab, embed, kv, groups, inner, mlp = (draw(sizes) for _ in range(6))
    length, layers = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    fused, scanned, tied = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    queries, keys = kv * groups * inner, kv * inner

    def block(x, p):
        if fused:
            q, k, v = jnp.split(x @ p["qkv"], [queries, queries + keys], axis=-1)
        else:
            q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
        q = q.reshape(*x.shape[:2], kv, groups, inner)
        k, v = (t.reshape(*x.shape[:2], kv, inner) for t in (k, v))
        s = jax.nn.softmax(jnp.einsum("blkgh,bmkh->bkglm", q, k))
        x = x + jnp.einsum("bkglm,bmkh->blkgh", s, v).reshape(*x.shape[:2], queries) @ p["o"]
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"]

    def loss(params, batch):
        tokens = batch % vocab
        x = params["table"][tokens]
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = block(x, p)
        logits = x @ (params["table"].T if tied else params["head"])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1))

    layer = {"o": (queries, embed), "up": (embed, mlp), "down": (mlp, embed)}
    wide = {"q": (embed, queries), "k": (embed, keys), "v": (embed, keys)}
    wide = {"qkv": (embed, queries + 2 * keys)} if fused else wide
    layer = {name: shape(*dims) for name, dims in (layer | wide).items()}
    stacked = {name: shape(layers, *leaf.shape) for name, leaf in layer.items()}
    params = {"table": shape(vocab, embed), "blocks": stacked if scanned else [layer] * layers}
    params |= {} if tied else {"head": shape(embed, vocab)}
    return loss, params, jax.ShapeDtypeStruct((examples, length), jnp.int32)


def layout_of(model, mesh, preset):
    """The layout, or None where the preset refuses the sizes."""
    loss, params, batch = model
    try:
        return make_layout(trace(loss, params, batch, names=("params", "batch")), mesh, preset)
    except PlanError:
        return None


def drawn(tree, seed=0):
    """Numbers for abstract arrays."""
    rng = np.random.default_rng(seed)

    def one(x):
        if x.dtype == jnp.int32:
            return rng.integers(0, 100, x.shape).astype(np.int32)
        return (rng.normal(size=x.shape) / max(x.shape[0], 1) ** 0.5).astype(np.float32)

    return jax.tree.map(one, tree)


def ways(entry, mesh):
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return axes, int(np.prod([mesh.sizes[axis] for axis in axes]))


@few(max_examples=150)
@given(models(), meshes, st.sampled_from(PRESETS))
def test_every_spec_is_legal(model, mesh, preset):
    layout = layout_of(model, mesh, preset)
    assume(layout is not None)
    pairs = []
    for name in ("params", "batch"):
        abstract = jax.tree.leaves(layout.traced.arg(name))
        for specs in (layout.specs(name), layout.compute_specs(name)):
            pairs += zip(abstract, jax.tree.leaves(specs, is_leaf=is_spec), strict=True)
    pairs += zip(jax.tree.leaves(layout.traced.out), jax.tree.leaves(layout.out_specs, is_leaf=is_spec), strict=True)
    for leaf, spec in pairs:
        used = []
        assert len(spec) <= len(leaf.shape)
        for size, entry in zip(leaf.shape, spec, strict=False):
            axes, parts = ways(entry, mesh)
            assert size % parts == 0
            used += axes
        assert len(used) == len(set(used))
        assert all(mesh.sizes[axis] > 1 for axis in used)
    layout.explain()


@few(max_examples=40)
@given(models(), meshes, st.sampled_from(PRESETS))
def test_bytes_per_device_are_those_that_jax_places(model, mesh, preset):
    layout = layout_of(model, mesh, preset)
    assume(layout is not None)
    device_mesh = make_mesh(mesh, jax.devices()[: mesh.size])
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(np.zeros(leaf.shape, leaf.dtype), NamedSharding(device_mesh, spec)),
        layout.traced.arg("params"),
        layout.specs("params"),
    )
    for device in device_mesh.devices.flat:
        shards = [s for leaf in jax.tree.leaves(placed) for s in leaf.addressable_shards if s.device == device]
        assert sum(shard.data.nbytes for shard in shards) == layout.bytes_per_device("params")


@few(max_examples=6)
@given(models(), st.sampled_from([MeshShape(data=2, fsdp=2, tensor=2), MeshShape(tensor=4)]), st.booleans())
def test_pinned_loss_and_gradient_equal_the_plain_ones(model, mesh, remat):
    layout = layout_of(model, mesh, "fsdp+megatron")
    assume(layout is not None)
    loss, params, batch = model
    params, batch = drawn(params), drawn(batch)
    pinned = layout.pin(make_mesh(mesh, jax.devices()[: mesh.size]), "full" if remat else "none")
    want, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    got, pinned_gradient = jax.jit(jax.value_and_grad(pinned))(params, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for have, expected in zip(*map(jax.tree.leaves, (pinned_gradient, gradient)), strict=True):
        np.testing.assert_allclose(have, expected, rtol=0, atol=1e-4 * np.abs(expected).max() + 1e-7)


def shares(layout):
    """Specs of the parameters at rest and in use, in leaf order."""
    return [(compute.spec, rest.spec) for compute, rest in layout.param_shares.values()]


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit_of_remat": lambda fn: jax.jit(jax.checkpoint(fn)),
    "remat_of_jit": lambda fn: jax.checkpoint(jax.jit(fn)),
}


@few(max_examples=40)
@given(models(), meshes, st.sampled_from(PRESETS), st.sampled_from(sorted(WRAPPERS)))
def test_wrapping_changes_no_spec(model, mesh, preset, wrapper):
    loss, params, batch = model
    plain = layout_of(model, mesh, preset)
    wrapped = layout_of((WRAPPERS[wrapper](loss), params, batch), mesh, preset)
    assert (plain is None) == (wrapped is None)
    if plain is not None:
        assert shares(plain) == shares(wrapped)
        assert [row.name for row in plain.rows.rows] == [row.name for row in wrapped.rows.rows]


def renamed(loss, params, order):
    """The same model over a dict of meaningless names, whose leaves come in another order."""
    leaves, structure = jax.tree.flatten(params)
    names = [f"n{position:03d}" for position in order]

    def other(scrambled, *rest):
        return loss(jax.tree.unflatten(structure, [scrambled[name] for name in names]), *rest)

    return other, dict(zip(names, leaves, strict=True)), names


@few(max_examples=40)
@given(models(), meshes, st.sampled_from(PRESETS), st.randoms(use_true_random=False))
def test_names_and_their_order_change_no_spec(model, mesh, preset, random):
    loss, params, batch = model
    order = list(range(len(jax.tree.leaves(params))))
    random.shuffle(order)
    other, scrambled, names = renamed(loss, params, order)
    plain = layout_of(model, mesh, preset)
    changed = layout_of((other, scrambled, batch), mesh, preset)
    assert (plain is None) == (changed is None)
    if plain is not None:
        by_name = {path: rest.spec for path, (_, rest) in changed.param_shares.items()}
        assert [rest.spec for _, rest in plain.param_shares.values()] == [by_name[name] for name in names]


@few(max_examples=12)
@given(st.sampled_from(["gpt2", "llama_scanned", "t5", "opt", "moe_one_hot"]), st.randoms(use_true_random=False))
def test_scrambled_names_of_the_zoo_change_no_spec(name, random):
    model = zoo.MODELS[name]
    params, batch = model.abstract_params(), model.abstract_batch(8)
    order = list(range(len(jax.tree.leaves(params))))
    random.shuffle(order)
    other, scrambled, names = renamed(model.loss, params, order)
    mesh = MeshShape(fsdp=2, tensor=4)

    def specs(loss, params):
        traced = trace(loss, params, batch, abstract_key(), names=("params", "batch", "rng"))
        return make_layout(traced, mesh, "fsdp+megatron").param_shares

    changed = specs(other, scrambled)
    assert [rest.spec for _, rest in specs(model.loss, params).values()] == [changed[n][1].spec for n in names]


@few(max_examples=200)
@given(st.builds(MeshShape, **{axis: st.integers(1, 9) for axis in ("data", "fsdp", "stage", "tensor")}))
def test_a_mesh_is_read_back_from_its_text(mesh):
    assert MeshShape.parse(str(mesh)) == mesh
