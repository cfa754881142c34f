"""Tables from axes to mesh axes: presets against hand-written Megatron, Redco's rules, overrides, and every error."""

import functools

import jax
import jax.numpy as jnp
import pytest
import zoo
from axis_letters import f32, i32
from zoo.base import abstract_key

from sharding_rules import AXES, BATCH_AXES, MeshShape, PlanError, make_layout, trace
from sharding_rules.assignment import redco_rules

P = jax.P
MEGATRON = [name for name in zoo.MODELS if zoo.MODELS[name].megatron]
SHAPES = ("gpt2", "opt", "llama_scanned", "llama_unrolled", "t5")
"""The families that Redco is compared on."""


@functools.cache
def zoo_layout(name):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(8), abstract_key())
    return make_layout(trace(model.loss, *args, names=("params", "batch", "rng")), MeshShape())


def by_path(layout, name="params"):
    specs = jax.tree.leaves(layout.specs(name), is_leaf=lambda x: isinstance(x, P))
    return dict(zip(layout.table.paths(name), specs, strict=True))


def without_trailing_none(dims):
    dims = list(dims)
    while dims and dims[-1] is None:
        dims.pop()
    return tuple(dims)


def different(specs, expected):
    """Path -> (found, expected) where they are not the same."""
    wanted = {path: without_trailing_none(dims) for path, dims in expected.items()}
    return {path: (tuple(specs[path]), want) for path, want in wanted.items() if tuple(specs[path]) != want}


def two_layers(vocab=16, embed=6, heads=4, mlp=8):
    """A small attention block with an embedding; heads have 3 elements."""

    def loss(params, batch):
        x = params["emb"][batch["i"]]
        q, k, v = ((x @ params[n]).reshape(*x.shape[:2], heads, 3) for n in "qkv")
        p = jax.nn.softmax(jnp.einsum("blhd,bmhd->bhlm", q, k))
        x = x + jnp.einsum("bhlm,bmhd->blhd", p, v).reshape(*x.shape[:2], 3 * heads) @ params["o"]
        x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
        return jax.nn.log_softmax(x @ params["emb"].T).mean()

    wide = f32(embed, 3 * heads)
    params = {
        "emb": f32(vocab, embed),
        **dict.fromkeys("qkv", wide),
        "o": f32(3 * heads, embed),
        "up": f32(embed, mlp),
        "down": f32(mlp, embed),
    }
    return trace(loss, params, {"i": i32(8, 5)}, names=("params", "batch"))


# Presets.


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_specs_equal_those_written_by_hand(name, tensor):
    layout = zoo_layout(name).on(MeshShape(data=2, tensor=tensor), "megatron")
    assert not different(by_path(layout), zoo.MODELS[name].megatron)


def test_data_preset_splits_the_batch_and_nothing_else():
    layout = make_layout(two_layers(), MeshShape(data=4), "data")
    assert set(by_path(layout).values()) == {P()}
    assert by_path(layout, "batch") == {"i": P("data")}


def test_fsdp_splits_parameters_at_rest_and_gathers_them_in_use():
    layout = make_layout(two_layers(), MeshShape(fsdp=2), "fsdp")
    assert all(tuple(spec).count("fsdp") == 1 for spec in by_path(layout).values())
    compute = jax.tree.leaves(layout.compute_specs("params"), is_leaf=lambda x: isinstance(x, P))
    assert set(compute) == {P()}
    assert by_path(layout, "batch") == {"i": P("fsdp")}


def test_presets_add_up():
    layout = make_layout(two_layers(), MeshShape(data=2, fsdp=2, tensor=2), "fsdp+megatron")
    assert by_path(layout)["up"] == P("fsdp", "tensor")
    assert by_path(layout)["down"] == P("tensor", "fsdp")
    assert by_path(layout, "batch") == {"i": P(("data", "fsdp"))}
    assert by_path(make_layout(two_layers(), MeshShape(data=2, fsdp=2, tensor=2), "megatron+fsdp")) == by_path(layout)


def test_a_batch_that_does_not_divide_stays_whole():
    layout = make_layout(two_layers(), MeshShape(data=3), "data")
    assert by_path(layout, "batch") == {"i": P()}


def test_experts_go_over_the_expert_axis():
    layout = zoo_layout("moe_one_hot").on(MeshShape(data=2, expert=2, tensor=2), "megatron")
    assert by_path(layout)["l/0/b/s"] == P("expert", None, "tensor")
    assert by_path(layout)["l/0/b/k"] == P("expert", "tensor")
    assert by_path(layout, "batch")["s"] == P(("data", "expert"))


def test_length_goes_over_the_context_axis():
    layout = zoo_layout("llama_scanned").on(MeshShape(data=2, context=2), "data")
    assert by_path(layout, "batch")["s"] == P("data", "context")


# Redco's rules, as its package derives them.


@pytest.mark.parametrize("name", SHAPES)
def test_redco_rules_split_nothing_where_names_mean_nothing(name):
    layout = zoo_layout(name)
    leaves = jax.tree.leaves(layout.traced.arg("params"))
    shapes = {path: leaf.shape for path, leaf in zip(layout.table.paths("params"), leaves, strict=True)}
    assert redco_rules(shapes, 2) == {}
    with pytest.raises(PlanError, match="preset 'redco' splits nothing over it"):
        layout.on(MeshShape(data=2, tensor=2), "redco")


def test_redco_rules_split_heads_inside_in_three_dimensional_kernels():
    # linen's MultiHeadDotProductAttention: (embed, heads, head_dim). Redco splits the last dimension, within heads.
    rename = {"zoo": "MultiHeadDotProductAttention", "fan": "up", "aim": "down"}
    megatron = {}
    shapes = {}
    layout = zoo_layout("encoder_linen")
    for path, leaf in zip(layout.table.paths("params"), jax.tree.leaves(layout.traced.arg("params")), strict=True):
        named = path
        for word, meaning in rename.items():
            named = named.replace(word, meaning)
        shapes[named] = leaf.shape
        if path in zoo.MODELS["encoder_linen"].megatron:
            megatron[named] = zoo.MODELS["encoder_linen"].megatron[path]
    found = redco_rules(shapes, 2)
    query = "MultiHeadDotProductAttention_0/query/kernel"
    assert found[query] == ((), (), ("tensor",))
    assert without_trailing_none(megatron[query]) == (None, "tensor")
    # The hidden layer's names are those that Redco knows: there it agrees.
    assert found["up_0/kernel"] == ((), ("tensor",))
    assert megatron["up_0/kernel"] == (None, "tensor")
    # Biases of split columns stay whole.
    assert "up_0/bias" not in found
    assert megatron["up_0/bias"] == ("tensor",)


def test_redco_rules_split_stacked_layers_between_layers():
    shapes = {"layers/attn/o_proj/kernel": (4, 12, 6), "layers/mlp/down_proj/kernel": (4, 8, 6)}
    assert redco_rules(shapes, 4) == {path: (("tensor",), (), ()) for path in shapes}


def test_redco_rules_cannot_tell_one_dense_from_another():
    # BERT calls three products `dense`: attention's output, the hidden layer's in and out.
    shapes = {
        "layer/attention/output/dense/kernel": (12, 12),
        "layer/intermediate/dense/kernel": (12, 16),
        "layer/output/dense/kernel": (16, 12),
    }
    assert redco_rules(shapes, 4) == {path: ((), ("tensor",)) for path in shapes}


def test_redco_rules_alternate_by_the_alphabet():
    assert redco_rules({"c/kernel": (8, 16), "a/kernel": (16, 16), "b/kernel": (16, 4)}, 4) == {
        "a/kernel": ((), ("tensor",)),
        "b/kernel": (("tensor",), ()),
        "c/kernel": ((), ("tensor",)),
    }


def test_redco_rules_agree_with_megatron_on_names_they_know():
    names = {"q_proj": (6, 12), "k_proj": (6, 12), "v_proj": (6, 12), "o_proj": (12, 6)}
    found = redco_rules({f"attn/{name}/kernel": shape for name, shape in names.items()}, 4)
    assert found["attn/q_proj/kernel"] == found["attn/k_proj/kernel"] == ((), ("tensor",))
    assert found["attn/o_proj/kernel"] == (("tensor",), ())


def test_redco_preset_gives_specs():
    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["a"]["kernel"]) @ params["b"]["kernel"])

    traced = trace(loss, {"a": {"kernel": f32(6, 8)}, "b": {"kernel": f32(8, 6)}}, f32(4, 6), names=("params", "batch"))
    layout = make_layout(traced, MeshShape(data=2, tensor=2), "redco")
    assert by_path(layout) == {"a/kernel": P(None, "tensor"), "b/kernel": P("tensor")}


# Overrides.


def test_a_rule_overrides_the_preset_and_the_last_one_wins():
    rules = (("up|down", P("fsdp", None)), ("up", P(None, ("fsdp", "tensor"))))
    layout = make_layout(two_layers(), MeshShape(fsdp=2, tensor=2), "fsdp+megatron", rules=rules)
    assert by_path(layout)["up"] == P(None, ("fsdp", "tensor"))
    assert by_path(layout)["down"] == P("fsdp")
    assert by_path(layout)["q"] == P("fsdp", "tensor")


def test_a_rule_over_a_tensor_axis_stays_under_fsdp():
    layout = make_layout(two_layers(), MeshShape(fsdp=2, tensor=2), "fsdp+megatron", rules=(("up", P("tensor")),))
    assert by_path(layout)["up"] == P("tensor", "fsdp")


def test_rules_alone_may_use_a_mesh_axis():
    layout = make_layout(two_layers(), MeshShape(data=2, tensor=2), "data", rules=(("up", [None, "tensor"]),))
    assert by_path(layout)["up"] == P(None, "tensor")
    assert by_path(layout)["q"] == P()


def test_a_table_of_rows_replaces_the_preset():
    layout = make_layout(two_layers(), MeshShape(data=2, tensor=2), table={"batch": "data", "mlp": ("tensor",)})
    assert by_path(layout)["up"] == P(None, "tensor")
    assert by_path(layout)["q"] == P()
    assert by_path(layout, "batch") == {"i": P("data")}


# Errors: what was asked, parameter, dimension, sizes, the nearest thing that works.


def error(*args, **kwargs):
    with pytest.raises(PlanError) as caught:
        make_layout(*args, **kwargs)
    return str(caught.value)


def test_indivisible_heads_name_parameter_dimension_sizes_and_mesh():
    message = error(two_layers(heads=6, embed=8), MeshShape(data=2, tensor=4), "megatron")
    assert message == (
        "parameter 'k', dimension 1 of shape (8, 18): heads has 6 elements, which tensor=4 does not divide; "
        "the nearest mesh that works is data=4,tensor=2"
    )
    make_layout(two_layers(heads=6, embed=8), MeshShape(data=4, tensor=2), "megatron")


def test_the_nearest_mesh_keeps_the_number_of_devices_and_is_legal():
    for heads in (2, 3, 5, 6, 9, 12):
        for mesh in (MeshShape(data=2, tensor=8), MeshShape(fsdp=4, tensor=4), MeshShape(tensor=24)):
            try:
                make_layout(two_layers(heads=heads, mlp=24, vocab=48, embed=24), mesh, "fsdp+megatron")
            except PlanError as caught:
                nearest = MeshShape.parse(str(caught).rpartition("works is ")[2])
                assert nearest.size == mesh.size
                make_layout(two_layers(heads=heads, mlp=24, vocab=48, embed=24), nearest, "fsdp+megatron")


def test_indivisible_experts_name_the_parameter():
    layout = zoo_layout("moe_one_hot")
    with pytest.raises(PlanError, match=r"parameter 'l/0/b/.', dimension \d .*expert has 8 elements, which expert=3"):
        layout.on(MeshShape(expert=3), "data")


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in BATCH_AXES])
def test_a_mesh_axis_that_the_preset_leaves_idle_is_refused(axis):
    message = error(two_layers(), MeshShape(data=2, **{axis: 2}), "data")
    assert f"has {axis}=2, but preset 'data' splits nothing over it" in message
    if axis == "tensor":
        assert "Add '+megatron'" in message


def test_an_unknown_preset_is_named_with_the_known_ones():
    message = error(two_layers(), MeshShape(data=2), "fsdp+megatorn")
    assert "unknown preset 'megatorn' in 'fsdp+megatorn'" in message
    assert "megatron" in message.partition("presets are")[2]


RULE_ERRORS = {
    "no_parameter": ((("upp", P("tensor")),), ["'upp' matches no parameter", "nearest path is 'up'"]),
    "unknown_axis": ((("up", P("model")),), ["'model' is no mesh axis", "data, fsdp, stage, expert, context, tensor"]),
    "axis_twice": (
        (("up", P("tensor", "tensor")),),
        ["parameter 'up' twice over 'tensor'", "dimensions 0 and 1", "(6, 8)"],
    ),
    "axis_twice_in_one_dimension": ((("up", P(None, ("tensor", "tensor"))),), ["parameter 'up' twice over 'tensor'"]),
    "too_many_dimensions": ((("up", P(None, None, "tensor")),), ["gives 3 dimensions", "'up' has shape (6, 8)"]),
    "indivisible": (
        (("up", P("tensor")),),
        ["parameter 'up', dimension 0 of shape (6, 8) has 6 elements", "tensor=4", "nearest mesh", "data=4,tensor=2"],
    ),
    "indivisible_over_two_axes": (
        (("up", P(("data", "tensor"))),),
        ["parameter 'up', dimension 0 of shape (6, 8)", "data*tensor=8 does not divide", "up to 8 is 6"],
    ),
    "no_spec": ((("up", (3, None)),), ["rule 'up' has 3 for a dimension", "None, a mesh axis"]),
    "part_of_a_path": ((("u", P()),), ["'u' matches no parameter"]),
}


@pytest.mark.parametrize("name", RULE_ERRORS)
def test_a_bad_rule_says_what_is_wrong(name):
    rules, parts = RULE_ERRORS[name]
    message = error(two_layers(), MeshShape(data=2, tensor=4), "megatron", rules=rules)
    for part in parts:
        assert part in message


TABLE_ERRORS = {
    "unknown_row": ({"mpl": "tensor"}, ["no axis called 'mpl'", "heads", "mlp", "vocab"]),
    "unknown_mesh_axis": ({"mlp": "model"}, ["'mlp' is assigned to 'model'", "data, fsdp"]),
    "two_rows_of_one_parameter": (
        {"embed": "tensor", "mlp": "tensor"},
        ["'tensor' would split two dimensions of parameter", "(12, 8)", "(embed)", "(mlp)"],
    ),
    "indivisible": ({"heads": "tensor"}, ["parameter 'k', dimension 1", "heads has 6", "tensor=4", "data=4,tensor=2"]),
    "axis_twice": ({"mlp": ("tensor", "tensor")}, ["'mlp' is assigned to 'tensor' twice"]),
}


@pytest.mark.parametrize("name", TABLE_ERRORS)
def test_a_bad_table_says_what_is_wrong(name):
    table, parts = TABLE_ERRORS[name]
    message = error(two_layers(embed=8, mlp=12, heads=6), MeshShape(data=2, tensor=4), table=table)
    for part in parts:
        assert part in message


# What is left whole is said.


def test_an_indivisible_vocabulary_is_left_whole_and_listed():
    layout = make_layout(two_layers(vocab=50257, embed=8), MeshShape(data=2, tensor=4), "megatron")
    assert by_path(layout)["emb"] == P()
    assert by_path(layout)["up"] == P(None, "tensor")
    text = layout.explain()
    assert "vocab (50257) is not split: tensor=4 does not divide it" in text
    assert any("emb" in line for line in text.partition("whole on every device")[2].splitlines())


def test_explain_names_what_is_whole_with_its_bytes():
    text = make_layout(two_layers(vocab=15, embed=5, mlp=8), MeshShape(fsdp=2), "fsdp").explain()
    whole = text.partition("whole on every device")[2]
    assert "emb 300 B" in whole
    assert "no dimension of (15, 5) divides by fsdp=2" in whole
