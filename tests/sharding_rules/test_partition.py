"""PartitionSpecs of optimizer states by path and shape, shares of single arrays, and bytes."""

import jax
import jax.numpy as jnp
import optax
import pytest
import zoo
from axis_letters import f32, i32
from zoo.base import abstract_key

from sharding_rules import MeshShape, make_layout, path_str, trace
from sharding_rules.partition import array_spec, state_specs, to_spec

P = jax.P
IS_SPEC = {"is_leaf": lambda x: isinstance(x, P)}


def layout_of(mesh, preset, **sizes):
    shape = {"vocab": 16, "embed": 8, "mlp": 12, **sizes}

    def loss(params, batch):
        x = params["table"][batch["i"]] * params["scale"][None, None]
        x = x + jax.nn.relu(x @ params["mlp"]["up"]) @ params["mlp"]["down"]
        return jax.nn.log_softmax(x @ params["table"].T).mean()

    vocab, embed, mlp = shape.values()
    params = {
        "table": f32(vocab, embed),
        "scale": f32(embed),
        "mlp": {"up": f32(embed, mlp), "down": f32(mlp, embed)},
    }
    return make_layout(trace(loss, params, {"i": i32(8, 4)}, names=("params", "batch")), mesh, preset)


def specs_by_path(tree, specs):
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(paths, jax.tree.leaves(specs, **IS_SPEC), strict=True))


def optimizer_specs(layout, optimizer):
    state = jax.eval_shape(optimizer.init, layout.traced.arg("params"))
    specs = layout.state_specs(state)
    assert jax.tree.structure(specs, **IS_SPEC) == jax.tree.structure(state)
    return specs_by_path(state, specs)


LAYOUT = layout_of(MeshShape(fsdp=2, tensor=2), "fsdp+megatron")
PARAMS = specs_by_path(LAYOUT.traced.arg("params"), LAYOUT.specs("params"))


def test_the_layout_splits_what_is_compared_below():
    assert {
        "table": P("tensor", "fsdp"),
        "scale": P(),
        "mlp/up": P("fsdp", "tensor"),
        "mlp/down": P("tensor", "fsdp"),
    } == PARAMS


def test_adamw_moments_are_split_like_their_parameters():
    found = optimizer_specs(LAYOUT, optax.adamw(1e-3))
    for path, spec in PARAMS.items():
        assert found[f"0/mu/{path}"] == found[f"0/nu/{path}"] == spec
    assert found["0/count"] == P()


def test_muon_momentum_is_split_and_its_adam_too():
    found = optimizer_specs(LAYOUT, optax.contrib.muon(1e-3))
    for path, spec in PARAMS.items():
        owners = [key for key in found if key.endswith(f"mu/{path}")]
        assert owners
        assert {found[key] for key in owners} == {spec}


def test_masked_and_multi_transform_states_are_split():
    mask = {"table": True, "scale": False, "mlp": {"up": True, "down": True}}
    found = optimizer_specs(LAYOUT, optax.masked(optax.adam(1e-3), mask))
    assert {key.partition("mu/")[2] for key in found if "/mu/" in key} == {"table", "mlp/up", "mlp/down"}
    labels = {"table": "a", "scale": "b", "mlp": {"up": "b", "down": "a"}}
    both = optimizer_specs(LAYOUT, optax.multi_transform({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, 0.9)}, labels))
    for found_, paths in ((found, ("table", "mlp/up", "mlp/down")), (both, PARAMS)):
        for path in paths:
            specs = {spec for key, spec in found_.items() if key.endswith(f"/{path}")}
            assert specs == {PARAMS[path]}, path


def test_chains_with_averages_are_split():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), optax.ema(0.99))
    found = optimizer_specs(LAYOUT, optimizer)
    assert found["2/ema/mlp/up"] == P("fsdp", "tensor")


def test_adafactor_moments_keep_the_split_of_the_dimensions_they_have():
    found = optimizer_specs(LAYOUT, optax.adafactor(1e-3, min_dim_size_to_factor=4))
    for path, spec in (("table", P("tensor", "fsdp")), ("mlp/up", P("fsdp", "tensor"))):
        shape = {"table": (16, 8), "mlp/up": (8, 12)}[path]
        keys = [key for key in found if key.endswith(f"v_row/{path}") or key.endswith(f"v_col/{path}")]
        assert len(keys) == 2
        # One of the two is summed over each dimension, so that each entry is kept once.
        assert {tuple(found[key]) for key in keys} == {(spec[0],), (spec[1],)}, shape
    assert all(spec == P() for key, spec in found.items() if key.endswith("scale"))


def test_an_ambiguous_moment_stays_whole_and_is_listed():
    params = {"w": f32(8, 8)}
    state = {"v_row": {"w": f32(8)}, "odd": {"w": f32(3, 8)}, "other": f32(5)}
    specs, whole = state_specs(state, params, {"w": P("fsdp", "tensor")})
    assert specs == {"v_row": {"w": P()}, "odd": {"w": P()}, "other": P()}
    assert [line.split(" ")[0] for line in whole] == ["odd/w", "other", "v_row/w"]
    # Where both ways of saying so give the same split, there is no doubt.
    specs, whole = state_specs({"v_row": {"w": f32(8)}}, params, {"w": P()})
    assert specs == {"v_row": {"w": P(None)}}
    assert not whole


def test_the_longest_path_owns_a_state():
    params = {"w": f32(4, 8), "a": {"w": f32(8, 4)}}
    specs, _ = state_specs({"mu": params}, params, {"w": P("data"), "a": {"w": P(None, "tensor")}})
    assert specs == {"mu": {"w": P("data"), "a": {"w": P(None, "tensor")}}}


def test_a_single_array_as_parameters_owns_its_moments():
    state = jax.eval_shape(optax.adam(1e-3).init, f32(8, 4))
    specs, whole = state_specs(state, f32(8, 4), P("fsdp"))
    assert specs[0].mu == specs[0].nu == P("fsdp")
    assert not whole


@pytest.mark.parametrize("name", ["llama_nnx", "equinox_transformer", "llama_linen_scanned"])
def test_optimizer_states_of_frameworks_are_split(name):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(8), abstract_key())
    layout = make_layout(
        trace(model.loss, *args, names=("params", "batch", "rng")), MeshShape(fsdp=2, tensor=2), "fsdp+megatron"
    )
    state = jax.eval_shape(optax.adam(1e-3).init, args[0])
    specs = layout.state_specs(state)
    params = jax.tree.leaves(layout.specs("params"), **IS_SPEC)
    assert jax.tree.leaves(specs[0].mu, **IS_SPEC) == params
    assert jax.tree.leaves(specs[0].nu, **IS_SPEC) == params


# Single arrays.


def test_specs_leave_trailing_whole_dimensions_out():
    assert to_spec([("a",), (), ("b", "c"), (), ()]) == P("a", None, ("b", "c"))
    assert to_spec([(), ()]) == P()


def test_vectors_stay_whole_under_fsdp():
    layout = layout_of(MeshShape(fsdp=2), "fsdp")
    assert layout.param_shares["scale"][1].entries == ((),)
    assert "a vector" in layout.param_shares["scale"][1].reasons[-1]


def test_fsdp_takes_another_dimension_where_the_largest_does_not_divide():
    layout = layout_of(MeshShape(fsdp=4), "fsdp", embed=6)
    assert layout.param_shares["mlp/up"][1].spec == P(None, "fsdp")
    assert layout.param_shares["table"][1].spec == P("fsdp")


def test_fsdp_shares_a_dimension_with_tensor_where_nothing_else_divides():
    layout = layout_of(MeshShape(fsdp=2, tensor=2), "fsdp+megatron", embed=7)
    assert layout.param_shares["mlp/up"][1].spec == P(None, ("tensor", "fsdp"))
    assert layout.param_shares["mlp/up"][0].spec == P(None, "tensor")


def test_layers_are_never_split_by_fsdp():
    model = zoo.MODELS["llama_scanned"]
    args = (model.abstract_params(), model.abstract_batch(8), abstract_key())
    layout = make_layout(trace(model.loss, *args, names=("params", "batch", "rng")), MeshShape(fsdp=3), "fsdp")
    for path, (_, rest) in layout.param_shares.items():
        if path.startswith("ham/"):
            assert rest.entries[0] == (), path


def _product(params, batch):
    return jnp.einsum("bd,dhk->bhk", batch, params.reshape(6, 4, 3)).mean()


def test_only_the_major_factor_of_a_dimension_is_split():
    traced = trace(_product, f32(6, 12), f32(8, 6), names=("params", "batch"))
    layout = make_layout(traced, MeshShape())
    heads, inner = layout.table.inputs("params")[0][1]
    assert (heads.size, inner.size) == (4, 3)
    for axis, ways, aligned in ((heads, 2, True), (inner, 3, False)):
        row = layout.rows.of(axis).name
        split = make_layout(traced, MeshShape(tensor=ways), table={row: "tensor"})
        shares = array_spec(split.assignment, split.table.inputs("params")[0])
        assert (shares.entries[1] == ("tensor",)) == aligned
        assert (shares.misaligned == frozenset({1})) != aligned


def test_one_mesh_axis_splits_one_dimension_and_says_so():
    # Scores of a length with itself.
    def loss(params, batch):
        x = batch @ params
        return jnp.einsum("bld,bmd->blm", x, x).mean()

    traced = trace(loss, f32(6, 4), f32(8, 12, 6), names=("params", "batch"))
    layout = make_layout(traced, MeshShape(context=2), "data")
    contraction = next(c for c in layout.table.contractions if c.weight is None)
    shares = array_spec(layout.assignment, contraction.out)
    assert shares.entries == ((), ("context",), ())
    assert shares.reasons == ("dimension 2 (length) stays whole: context already splits dimension 1 (length)",)


@pytest.mark.parametrize("joined", [True, False])
def test_examples_put_together_or_taken_apart_are_split(joined):
    # A preference loss: chosen and rejected examples go through the model together.
    def loss(params, batch):
        x = jnp.concatenate([batch["c"], batch["r"]]) if joined else batch["x"]
        good, bad = jnp.split((jnp.tanh(x @ params["u"]) @ params["v"]).mean(1), 2)
        return -jax.nn.log_sigmoid(good - bad).mean()

    batch = {"c": f32(8, 6), "r": f32(8, 6)} if joined else {"x": f32(16, 6)}
    traced = trace(loss, {"u": f32(6, 12), "v": f32(12, 6)}, batch, names=("params", "batch"))
    layout = make_layout(traced, MeshShape(data=4, tensor=2), "megatron")
    assert set(jax.tree.leaves(layout.specs("batch"), **IS_SPEC)) == {P("data")}
    product = layout.table.contractions[0]
    assert array_spec(layout.assignment, product.out).spec == P("data", "tensor")


# Bytes.


def test_bytes_per_device_follow_the_specs():
    expected = 4 * (16 * 8 // 4 + 8 + 2 * (8 * 12 // 4))
    assert LAYOUT.bytes_per_device("params") == expected
    assert layout_of(MeshShape(), "data").bytes_per_device("params") == 4 * (16 * 8 + 8 + 2 * 8 * 12)
    assert layout_of(MeshShape(data=4), "data").bytes_per_device("batch") == 4 * 8 * 4 // 4


def test_bytes_per_device_count_the_dtype():
    def loss(params, batch):
        return (batch @ params.astype(jnp.float32)).mean()

    traced = trace(loss, jax.ShapeDtypeStruct((4, 6), jnp.bfloat16), f32(8, 4), names=("params", "batch"))
    assert make_layout(traced, MeshShape()).bytes_per_device("params") == 48
