"""What an axis is, from structure: over the zoo, and on small models that differ in one thing."""

import functools

import jax
import jax.numpy as jnp
import pytest
import zoo
from axis_letters import f32, i32
from zoo.base import abstract_key

from sharding_rules import MeshShape, make_layout, trace
from sharding_rules.axes import infer_axes, leaves
from sharding_rules.roles import find_rows


@functools.cache
def zoo_layout(name):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(8), abstract_key())
    return make_layout(trace(model.loss, *args, names=("params", "batch", "rng")), MeshShape())


def role_names(table, rows, name="params"):
    """Path -> role of each dimension, `a*b` for a dimension of two axes, `1` for one of size 1."""

    def dim_name(dim):
        return "*".join(row.role if (row := rows.of(axis)) else "?" for axis in leaves(dim)) or "1"

    return {
        path: tuple(dim_name(dim) for dim in dims)
        for path, dims in zip(table.paths(name), table.inputs(name), strict=True)
    }


def roles_of(loss, params, batch):
    table = infer_axes(trace(loss, params, batch, names=("params", "batch")))
    return role_names(table, find_rows(table)), role_names(table, find_rows(table), "batch")


@pytest.mark.parametrize("name", zoo.MODELS)
def test_zoo_roles_are_as_expected(name):
    layout = zoo_layout(name)
    found = role_names(layout.table, layout.rows)
    expected = zoo.MODELS[name].expected_roles
    wrong = {
        path: (found[path], want)
        for path, want in expected.items()
        if any(w is not None and w != f for f, w in zip(found[path], want, strict=True))
    }
    assert not wrong
    assert not layout.table.unknown


@pytest.mark.parametrize("name", ["gpt2", "llama_unrolled", "t5", "moe_one_hot"])
def test_batch_and_length_are_named(name):
    layout = zoo_layout(name)
    for path, dims in role_names(layout.table, layout.rows, "batch").items():
        assert dims[0] == "batch", path
        assert dims[1] == "length" or layout.table.inputs("batch")[0][1][0].segments is not None, path


def test_unrolled_layers_are_as_many_rows_as_scanned_ones():
    def rows(name):
        decided = {"embed", "mlp", "kv_heads", "groups", "head_dim", "vocab"}
        return sorted((row.role, row.size) for row in zoo_layout(name).rows.rows if row.role in decided)

    assert rows("llama_unrolled") == rows("llama_scanned")
    assert len(zoo_layout("llama_unrolled").rows["mlp"].axes) == 3


def test_heads_and_experts_that_equal_the_batch_are_not_the_batch():
    for name in ("opt", "moe_one_hot"):
        layout = zoo_layout(name)
        (batch,) = [row for row in layout.rows.rows if row.role == "batch"]
        assert batch.size == 8
        others = [row for row in layout.rows.rows if row.role in {"heads", "expert"} and row.size == 8]
        assert others
        assert not set(batch.axes) & {axis for row in others for axis in row.axes}


# One thing each.


def _mlp(params, batch):
    return jnp.mean(jnp.tanh(batch["x"] @ params["u"]) @ params["v"])


def test_the_hidden_axis_of_a_perceptron_is_mlp():
    params, batch = roles_of(_mlp, {"u": f32(6, 8), "v": f32(8, 3)}, {"x": f32(4, 6)})
    assert params == {"u": ("feature", "mlp"), "v": ("mlp", "output")}
    assert batch == {"x": ("batch", "feature")}


def test_what_token_ids_look_up_is_the_vocabulary():
    def loss(params, batch):
        return (params["t"][batch["i"]] @ params["t"].T).mean()

    params, batch = roles_of(loss, {"t": f32(16, 6)}, {"i": i32(4, 5)})
    assert params == {"t": ("vocab", "embed")}
    assert batch == {"i": ("batch", "length")}


def test_what_an_iota_looks_up_is_positions():
    def loss(params, batch):
        return (params["t"][batch["i"]] + (params["p"][jnp.arange(5)] @ params["w"])[None]).mean()

    params, _ = roles_of(loss, {"t": f32(16, 6), "p": f32(9, 3), "w": f32(3, 6)}, {"i": i32(4, 5)})
    assert params["p"][0] == "position"


def test_what_a_running_count_of_the_mask_looks_up_is_positions():
    def loss(params, batch):
        counted = jnp.cumsum(batch["m"], axis=1) * batch["m"]
        return (params["t"][batch["i"]] + params["p"][counted]).mean()

    params, _ = roles_of(loss, {"t": f32(16, 6), "p": f32(9, 6)}, {"i": i32(4, 5), "m": i32(4, 5)})
    assert params == {"t": ("vocab", "embed"), "p": ("position", "embed")}


def test_what_labels_pick_without_tokens_is_classes():
    def loss(params, batch):
        logp = jax.nn.log_softmax(batch["x"] @ params["w"])
        return -jnp.take_along_axis(logp, batch["y"][:, None], axis=1).mean()

    params, _ = roles_of(loss, {"w": f32(6, 10)}, {"x": f32(4, 6), "y": i32(4)})
    assert params["w"][1] == "classes"


def _attention(kv_heads):
    def loss(params, batch):
        x = params["t"][batch["i"]]
        q = (x @ params["q"]).reshape(4, 5, kv_heads, 4 // kv_heads, 3)
        k, v = ((x @ params[n]).reshape(4, 5, kv_heads, 3) for n in "kv")
        p = jax.nn.softmax(jnp.einsum("blkgh,bmkh->bkglm", q, k))
        return (jnp.einsum("bkglm,bmkh->blkgh", p, v).reshape(4, 5, 12) @ params["o"] + x).mean()

    kv = f32(6, 3 * kv_heads)
    params = {"t": f32(16, 6), "q": f32(6, 12), "k": kv, "v": kv, "o": f32(12, 6)}
    return roles_of(loss, params, {"i": i32(4, 5)})[0]


def test_grouped_attention_has_kv_heads_and_groups():
    found = _attention(2)
    assert found["q"] == ("embed", "kv_heads*groups*head_dim")
    assert found["k"] == found["v"] == ("embed", "kv_heads*head_dim")
    assert found["o"] == ("kv_heads*groups*head_dim", "embed")


def test_plain_attention_has_heads():
    found = _attention(4)
    assert found["q"] == found["k"] == ("embed", "heads*head_dim")
    assert found["o"] == ("heads*head_dim", "embed")


def test_multi_query_attention_has_only_query_heads():
    found = _attention(1)
    assert found["q"] == ("embed", "heads*head_dim")
    assert found["k"] == ("embed", "head_dim")


def test_a_scan_over_weights_is_layers_and_over_the_batch_is_length():
    def loss(params, batch):
        x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch["x"], params["w"])
        total, _ = jax.lax.scan(lambda c, x_t: (c + x_t @ params["v"], None), 0 * x, jnp.swapaxes(batch["s"], 0, 1))
        return (x + total).mean()

    params, batch = roles_of(loss, {"w": f32(3, 6, 6), "v": f32(7, 6)}, {"x": f32(4, 6), "s": f32(4, 5, 7)})
    assert params["w"][0] == "layers"
    assert batch["s"][:2] == ("batch", "length")


def test_experts_are_a_batch_dimension_of_weights():
    def loss(params, batch):
        gate = jax.nn.softmax(batch["x"] @ params["r"])
        h = jnp.einsum("be,bd,edf->ebf", gate, batch["x"], params["u"])
        return jnp.einsum("ebf,efd->bd", jax.nn.relu(h), params["v"]).mean()

    params, _ = roles_of(loss, {"r": f32(6, 4), "u": f32(4, 6, 8), "v": f32(4, 8, 6)}, {"x": f32(5, 6)})
    assert params["u"][0] == params["v"][0] == params["r"][1] == "expert"
    assert params["u"][2] == params["v"][1] == "mlp"


def test_every_axis_of_parameters_and_batch_has_a_row():
    for name in zoo.MODELS:
        layout = zoo_layout(name)
        for argument in ("params", "batch"):
            for dims in layout.table.inputs(argument):
                for dim in dims:
                    assert all(layout.rows.of(axis) for axis in leaves(dim) if axis.size > 1), name


def test_rows_do_not_depend_on_the_argument_names():
    def loss(weights, examples):
        return _mlp(weights, examples)

    args = ({"u": f32(6, 8), "v": f32(8, 3)}, {"x": f32(4, 6)})
    table = infer_axes(trace(loss, *args, names=("weights", "examples")), params="weights", batch="examples")
    rows = find_rows(table, params="weights", batch="examples")
    assert role_names(table, rows, "weights") == {"u": ("feature", "mlp"), "v": ("mlp", "output")}
