"""The table of axes: what is one axis and what is not, over whole models; trips, flops and scopes."""

import jax
import jax.numpy as jnp
import pytest
import zoo
from axis_letters import f32, i32, infer, table_letters
from zoo.base import abstract_key

from sharding_rules import MeshShape, make_layout, trace
from sharding_rules.axes import BATCH, COUNTED, PARAM, infer_axes, join_origins, leaves


def zoo_table(name):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(8), abstract_key())
    return infer_axes(trace(model.loss, *args, names=("params", "batch", "rng")))


def dims_of(table, name="params"):
    return dict(zip(table.paths(name), table.inputs(name), strict=True))


def test_tied_embedding_is_one_pair_of_axes_everywhere():
    dims = dims_of(zoo_table("gpt2"))
    (vocab,), (embed,) = dims["w"]
    assert dims["e"][1] == dims["h/0/yy"][0] == dims["h/1/baz"][1] == dims["a"][0] == (embed,)
    assert not any((vocab,) in d for path, d in dims.items() if path != "w")


def test_layers_of_a_list_have_hidden_axes_of_their_own():
    dims = dims_of(zoo_table("llama_unrolled"))
    hidden = {dims[f"ham/{i}/kip"][0] for i in range(3)}
    assert len(hidden) == 3
    for i in range(3):
        assert dims[f"ham/{i}/fez"][1] == dims[f"ham/{i}/dax"][1] == dims[f"ham/{i}/kip"][0]


def test_scanned_layers_share_theirs():
    dims = dims_of(zoo_table("llama_scanned"))
    layers = dims["ham/fez"][0]
    assert all(d[0] == layers for path, d in dims.items() if path.startswith("ham/"))


def test_grouped_queries_are_keys_times_groups():
    dims = dims_of(zoo_table("llama_scanned"))
    kv, groups, inner = dims["ham/qux"][2]
    assert [axis.size for axis in (kv, groups, inner)] == [4, 2, 6]
    assert dims["ham/foo"][2] == (kv, inner)
    # The values' head_dim meets the keys' in no product.
    assert dims["ham/wug"][2][0] is kv
    assert dims["ham/wug"][2][1] is not inner


def test_a_fused_weight_is_three_segments_of_heads():
    dims = dims_of(zoo_table("gpt2"))
    (fused,) = dims["h/0/foo"][1]
    q, k, v = (leaves(segment) for segment in fused.segments)
    assert q == k
    assert q[0] is v[0] is dims["h/0/bar"][0][0]


def test_encoder_and_decoder_join_in_cross_attention_only():
    dims = dims_of(zoo_table("t5"))
    cross = dims["elm/p/0/k/die"]
    own = dims["elm/p/0/m/die"]
    assert cross[0] == own[0] == dims["urn/p/0/y/die"][0]  # embed, through the shared embedding
    assert cross[1][0] is not own[1][0]
    source, target = (dims_of(zoo_table("t5"), "batch")[name][1] for name in "st")
    assert source != target


def test_a_mask_and_positions_take_the_axes_they_are_combined_with():
    def loss(params, batch):
        x = batch @ params
        mask = jnp.tril(jnp.ones((5, 5), bool))
        positions = jnp.arange(5.0)
        return jnp.where(mask[None], jnp.einsum("bld,bmd->blm", x, x), 0.0) + positions[None, :, None]

    assert table_letters(infer(loss, f32(3, 6), f32(2, 5, 3))) == "ab cda -> cdd"


def test_contractions_count_flops_times_trips():
    def loss(w, x):
        x, _ = jax.lax.scan(lambda h, p: (h @ p, None), x, w)
        return jax.lax.scan(lambda h, p: (jax.lax.scan(lambda g, _: (g @ p, None), h, length=4)[0], None), x, w)[0]

    table = infer(loss, f32(3, 6, 6), f32(2, 6))
    once = 2 * 2 * 6 * 6
    assert [(c.flops, c.trips) for c in table.contractions] == [(3 * once, 3), (12 * once, 12)]


def test_contractions_know_their_weight():
    def loss(params, batch):
        x = batch @ params
        return (x @ x.T) @ (params.T @ params)[:2, :2].repeat(1, axis=0)[:2]

    table = infer(loss, f32(6, 4), f32(2, 6))
    kinds = [(c.lhs_origin, c.rhs_origin, c.weight is not None) for c in table.contractions]
    assert kinds[:3] == [
        (BATCH, PARAM, True),
        (PARAM | BATCH, PARAM | BATCH, False),
        (PARAM, PARAM, False),
    ]
    assert kinds[3][2]


@pytest.mark.parametrize(
    "origins, joined",
    [
        ((PARAM, BATCH), PARAM | BATCH),
        ((0, 0), 0),
        ((BATCH | COUNTED, 0), BATCH | COUNTED),
        ((BATCH | COUNTED, PARAM), PARAM | BATCH),
    ],
)
def test_origins_join(origins, joined):
    assert join_origins(origins) == joined


def test_each_call_of_a_loop_body_has_its_own_scope():
    def loss(w, x):
        run = lambda x: jax.lax.scan(lambda h, p: (h @ p, None), x, w)[0]  # noqa: E731
        return run(run(x))

    table = infer(loss, f32(3, 6, 6), f32(2, 6))
    bodies = [scope for scope in table.scope.walk() if scope.trips == 3]
    assert len(bodies) == 2
    assert bodies[0] is not bodies[1]


def test_custom_gradients_are_opaque():
    table = infer(lambda w, x: jax.nn.relu(x @ w), f32(4, 6), f32(2, 4))
    inside = [scope for scope in table.scope.walk() if scope is not table.scope]
    assert inside
    assert all(scope.opaque for scope in inside)
    assert not table.scope.opaque


def test_integers_and_empty_arrays_go_through():
    def loss(params, batch):
        return params["w"][batch].sum() + params["nothing"].sum() + params["scalar"]

    args = ({"w": f32(9, 4), "nothing": f32(0, 3), "scalar": f32()}, i32(2, 5))
    assert table_letters(infer(loss, *args)) == "1a . bc de -> ."
    layout = make_layout(trace(loss, *args, names=("params", "batch")), MeshShape(data=2, fsdp=2), "fsdp")
    assert layout.bytes_per_device("params") == (9 * 4 // 2 + 1) * 4


EXPLAINED = {
    "gpt2": ("data=2,fsdp=2,tensor=2", "fsdp+megatron", ["3 heads*head_dim", "split across a concatenation"]),
    "t5": ("fsdp=2,tensor=4", "fsdp+megatron+sequence", ["tensor between blocks", "position heads"]),
    "moe_one_hot": ("data=2,expert=2,tensor=2", "megatron", ["expert embed mlp", "(expert, -, tensor)"]),
    "unet": ("fsdp=8", "fsdp", ["a vector", "6 more"]),
    "lstm": ("data=2,tensor=4", "megatron", ["mlp [4 mlp]", "parameter 'a/h' has it on two dimensions"]),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_can_be_read(name):
    mesh, preset, parts = EXPLAINED[name]
    text = make_layout(zoo_table(name).traced, MeshShape.parse(mesh), preset).explain()
    for part in parts:
        assert part in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 150
    assert lines[0] == f"mesh {mesh} (8 devices)"
    # What only intermediate results have, and nothing splits, is no row.
    assert not any(line.endswith("-  activations") for line in lines)
    assert any(line.startswith("parameters: ") and line.endswith(" per device") for line in lines)
