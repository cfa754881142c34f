"""One line per primitive: how the axes of what goes in and comes out relate, in the letters of `axis_letters`."""

import jax
import jax.numpy as jnp
import pytest
from axis_letters import f32, i32, infer, letters
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding_rules import MeshShape, make_layout, make_mesh, primitives, trace
from sharding_rules.axes import Unifier, infer_axes, leaves

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(strides=(1, 1), padding="SAME", groups=1):
    def run(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC, feature_group_count=groups)

    return run


def pool(init, operator, window, stride, padding):
    return lambda x: lax.reduce_window(x, init, operator, (1, window, window, 1), (1, stride, stride, 1), padding)


def _slices(h):
    return h[:, :4], h[:, 4:8], h[:, 8:]


def _pick(x, labels):
    return jnp.take_along_axis(x, labels[..., None], axis=-1)


def _dropout_by_legacy_key(x):
    return x * jax.random.bernoulli(jax.random.PRNGKey(0), 0.5, x.shape)


def _multiply_until_large(x, w):
    return lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ w, x)


CASES = {
    # Products.
    "dot": ("ab bc -> ac", jnp.dot, f32(2, 3), f32(3, 4)),
    "dot_batched": ("abc acd -> abd", jnp.matmul, f32(2, 3, 4), f32(2, 4, 5)),
    "vmap": ("ab bc -> ac", jax.vmap(jnp.dot, (0, None)), f32(2, 4), f32(4, 3)),
    "attention": (
        "abcd aecd aecf -> abcf",
        jax.nn.dot_product_attention,
        f32(2, 8, 4, 5),
        f32(2, 8, 4, 5),
        f32(2, 8, 4, 5),
    ),
    "ragged_dot": ("ab cbd c -> ad", lax.ragged_dot, f32(8, 3), f32(4, 3, 5), i32(4)),
    "ragged_dot_of_square_matrices": ("ab cbd c -> ad", lax.ragged_dot, f32(8, 3), f32(4, 3, 3), i32(4)),
    "ragged_dot_gradients": (
        "ab cbd c ad -> ab cbd",
        lambda x, w, groups, ct: jax.vjp(lambda x, w: lax.ragged_dot(x, w, groups), x, w)[1](ct),
        f32(8, 3),
        f32(4, 3, 5),
        i32(4),
        f32(8, 5),
    ),
    # Elementwise, broadcasting.
    "add": ("ab ab -> ab", jnp.add, f32(4, 5), f32(4, 5)),
    "broadcast_size_1": ("a1 ab -> ab", jnp.add, f32(4, 1), f32(4, 5)),
    "broadcast_size_1_both": ("a1 1b -> ab", jnp.multiply, f32(4, 1), f32(1, 5)),
    "broadcast_rank": ("ab b -> ab", lambda x, y: x + y[None], f32(4, 5), f32(5)),
    "outer_of_equal_sizes": ("a b -> ab", lambda x, y: x[:, None] * y[None], f32(4), f32(4)),
    "where": ("ab ab -> ab", lambda x, y: jnp.where(x > 0, y, 0.0), f32(4, 5), f32(4, 5)),
    "clip": ("ab -> ab", lambda x: jnp.clip(x, 0, 1), f32(3, 4)),
    "tril": ("ab -> ab", jnp.tril, f32(4, 4)),
    "random": ("ab -> ab", lambda x: x * jax.random.normal(jax.random.key(0), x.shape), f32(3, 4)),
    "random_legacy_key": (
        "ab -> ab",
        lambda x: x * jax.random.bernoulli(jax.random.PRNGKey(0), 0.5, x.shape),
        f32(3, 4),
    ),
    "random_gamma": ("ab -> ab", lambda x: jax.random.gamma(jax.random.key(0), x), f32(3, 4)),
    "categorical": ("ab -> a", lambda x: jax.random.categorical(jax.random.key(0), x), f32(3, 4)),
    # Shapes.
    "reshape_split": ("a(bc) -> abc", lambda x: x.reshape(4, 2, 3), f32(4, 6)),
    "reshape_merge": ("abc -> (ab)c", lambda x: x.reshape(8, 3), f32(4, 2, 3)),
    "reshape_through_flat": ("abc -> a(bc)", lambda x: x.reshape(24).reshape(4, 6), f32(4, 2, 3)),
    "reshape_size_1": ("ab -> 1a1b1", lambda x: x.reshape(1, 4, 1, 6, 1), f32(4, 6)),
    "transpose": ("abc -> cab", lambda x: x.transpose(2, 0, 1), f32(2, 3, 4)),
    "repeat": ("ab -> a(bc)", lambda x: jnp.repeat(x, 2, axis=1), f32(3, 4)),
    "tile": ("ab -> a(cb)", lambda x: jnp.tile(x, (1, 2)), f32(3, 4)),
    "pad": ("ab -> ac", lambda x: jnp.pad(x, ((0, 0), (1, 1))), f32(3, 4)),
    "shifted_sum": ("ab -> cb", lambda x: x[1:] + x[:-1], f32(6, 2)),
    # Concatenation.
    "concatenate": ("ab ac -> a[b|c]", lambda x, y: jnp.concatenate([x, y], 1), f32(2, 3), f32(2, 4)),
    "concatenate_nothing": ("ab a1 -> ab", lambda x, y: jnp.concatenate([x, y], 1), f32(2, 3), f32(2, 0)),
    "concatenate_one": ("ab a1 -> a[b|1]", lambda x, y: jnp.concatenate([x, y], 1), f32(2, 3), f32(2, 1)),
    "concatenate_and_cut": (
        "ab ac -> ab ac",
        lambda x, y: jnp.split(2 * jnp.concatenate([x, y], 1), [3], 1),
        f32(2, 3),
        f32(2, 4),
    ),
    "roll_by_nothing": ("ab -> ab", lambda x: x + jnp.roll(x, 0, axis=0), f32(6, 2)),
    "split": ("a[b|c|d] -> ab ac ad", lambda x: jnp.split(x, 3, axis=1), f32(2, 12)),
    "fused_split": ("ab b[c|d|e] -> ac ad ae", lambda x, w: jnp.split(x @ w, 3, axis=-1), f32(2, 4), f32(4, 12)),
    "fused_split_unequal": (
        "ab b[c|d|e] -> ac ad ae",
        lambda x, w: jnp.split(x @ w, [8, 10], axis=-1),
        f32(2, 4),
        f32(4, 12),
    ),
    "fused_slices": (
        "ab b[c|d|e] -> ac ad ae",
        lambda x, w: _slices(x @ w),
        f32(2, 4),
        f32(4, 12),
    ),
    "fused_reshape": (
        "ab b(cd) -> ad ad",
        lambda x, w: (lambda h: (h[:, 0], h[:, 2]))((x @ w).reshape(2, 3, 4)),
        f32(2, 4),
        f32(4, 12),
    ),
    "fused_interleaved": (
        "ab b(cd) -> ac ac",
        lambda x, w: ((x @ w)[:, 0::2], (x @ w)[:, 1::2]),
        f32(2, 4),
        f32(4, 12),
    ),
    # Indexing.
    "embedding": ("ab cd -> cdb", lambda t, i: t[i], f32(7, 5), i32(2, 3)),
    "take_along_axis": (
        "abc ab -> ab1",
        lambda x, i: jnp.take_along_axis(x, i[..., None], -1),
        f32(2, 3, 7),
        i32(2, 3),
    ),
    "take_along_inner_axis": ("ab ac -> ac", lambda x, i: jnp.take_along_axis(x, i, 1), f32(2, 3), i32(2, 4)),
    "take_inner_axis": ("abc d -> adc", lambda x, i: jnp.take(x, i, axis=1), f32(4, 7, 5), i32(3)),
    "permutation": ("ab -> cb", lambda x: jax.random.permutation(jax.random.key(0), x), f32(3, 4)),
    "scatter": ("ab c cb -> ab", lambda x, i, u: x.at[i].set(u), f32(7, 5), i32(3), f32(3, 5)),
    "scatter_add_inner": ("ab c ac -> ab", lambda x, i, u: x.at[:, i].add(u), f32(7, 5), i32(3), f32(7, 3)),
    "segment_sum": ("ab a -> cb", lambda x, i: jax.ops.segment_sum(x, i, num_segments=6), f32(7, 5), i32(7)),
    "dynamic_slice": ("ab . -> ac", lambda x, i: lax.dynamic_slice_in_dim(x, i, 2, 1), f32(3, 5), i32()),
    "dynamic_index": ("ab . -> b", lambda x, i: lax.dynamic_index_in_dim(x, i, 0, False), f32(3, 5), i32()),
    "dynamic_update_slice": (
        "ab ac . -> ab",
        lambda x, u, i: lax.dynamic_update_slice_in_dim(x, u, i, 1),
        f32(3, 5),
        f32(3, 2),
        i32(),
    ),
    "one_hot": ("ab -> abc", lambda i: jax.nn.one_hot(i, 5), i32(3, 4)),
    "one_hot_dispatch": (
        "ab ac -> dab",
        lambda x, g: jnp.einsum("te,td->etd", jax.nn.one_hot(jnp.argmax(g, -1), 4), x),
        f32(6, 5),
        f32(6, 4),
    ),
    # Order and sums.
    "sort": ("ab -> ab", lambda x: jnp.sort(x, axis=-1), f32(2, 5)),
    "argsort": ("ab -> ab", lambda x: jnp.argsort(x, axis=-1), f32(2, 5)),
    "sort_of_pairs": ("ab ab -> ab ab", lambda x, y: lax.sort((x, y), num_keys=1), f32(2, 5), f32(2, 5)),
    "top_k": ("ab -> ac ac", lambda x: lax.top_k(x, 2), f32(3, 5)),
    "approx_max_k": ("ab -> ac ac", lambda x: lax.approx_max_k(x, 2), f32(3, 50)),
    "cumsum": ("ab -> ab", lambda x: jnp.cumsum(x, axis=1), f32(2, 5)),
    "logsumexp": ("ab -> a", lambda x: jax.nn.logsumexp(x, -1), f32(3, 4)),
    # Windows.
    "conv": ("abcd efdg -> abcg", conv(), f32(2, 8, 6, 3), f32(3, 3, 3, 5)),
    "conv_valid": ("abcd efdg -> ahig", conv(padding="VALID"), f32(2, 8, 6, 3), f32(3, 3, 3, 5)),
    "conv_strided": ("a(bc)(de)f ghfi -> abdi", conv((2, 2)), f32(2, 8, 6, 3), f32(3, 3, 3, 5)),
    "conv_depthwise": ("abcd ef1d -> abcd", conv(groups=3), f32(2, 8, 6, 3), f32(3, 3, 1, 3)),
    "conv_depthwise_multiplied": ("abcd ef1(dg) -> abc(dg)", conv(groups=3), f32(2, 8, 6, 3), f32(3, 3, 1, 6)),
    "conv_grouped": ("abc(de) fge(dh) -> abc(dh)", conv(groups=2), f32(2, 8, 6, 4), f32(3, 3, 2, 6)),
    "conv_transposed": (
        "abcd efdg -> a(bh)(ci)g",
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
        f32(2, 8, 6, 3),
        f32(2, 2, 3, 5),
    ),
    "conv_1d_channels_first": (
        "abc dbe -> adc",
        lambda x, k: lax.conv_general_dilated(x, k, (1,), "SAME"),
        f32(2, 3, 8),
        f32(5, 3, 3),
    ),
    "max_pool": ("a(bc)(de)f -> abdf", pool(-jnp.inf, lax.max, 2, 2, "VALID"), f32(2, 8, 6, 3)),
    "average_pool": ("abcd -> abcd", pool(0.0, lax.add, 3, 1, "SAME"), f32(2, 8, 6, 3)),
    "pool_of_any_function": ("abcd -> abcd", pool(1.0, lambda a, b: a * b + 1, 3, 1, "SAME"), f32(2, 8, 6, 3)),
    "max_pool_gradient": (
        "a(bc)(de)f -> a(bc)(de)f",
        jax.grad(lambda x: pool(-jnp.inf, lax.max, 2, 2, "VALID")(x).sum()),
        f32(2, 8, 6, 3),
    ),
    "product_gradient": ("ab ca -> ab", jax.grad(lambda w, x: jnp.tanh(x @ w).sum()), f32(3, 4), f32(2, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_primitive_relates_axes(case):
    expected, fn, *args = CASES[case]
    assert letters(fn, *args) == expected


def test_every_case_is_understood():
    unknown = {case: infer(fn, *args).unknown for case, (_, fn, *args) in CASES.items()}
    assert not {case: names for case, names in unknown.items() if names}


# Calls, loops, branches.


@jax.custom_jvp
def _soft_sign(x):
    return x / (1 + jnp.abs(x))


_soft_sign.defjvp(lambda primals, tangents: (_soft_sign(*primals), tangents[0]))


@jax.custom_vjp
def _product(x, w):
    return x @ w


_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def _shard_map(fn, in_specs, out_specs):
    mesh = jax.sharding.AbstractMesh((4,), ("z",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


CALLS = {
    "jit": ("ab bc -> ac", jax.jit(lambda x, w: jnp.tanh(x @ w)), f32(2, 3), f32(3, 4)),
    "remat": ("ab bc -> ac", jax.checkpoint(lambda x, w: jnp.tanh(x @ w)), f32(2, 3), f32(3, 4)),
    "custom_jvp": ("ab -> ab", _soft_sign, f32(2, 3)),
    "custom_vjp": ("ab bc -> ac", _product, f32(2, 3), f32(3, 4)),
    "scan_carry_and_outputs": (
        "abb cb -> cb ac",
        lambda w, x: lax.scan(lambda h, p: (jnp.tanh(h @ p), h.sum(-1)), x, w),
        f32(3, 5, 5),
        f32(2, 5),
    ),
    "scan_of_blocks": (
        "abc acb db -> db",
        lambda u, v, x: lax.scan(lambda h, p: (h + jnp.tanh(h @ p[0]) @ p[1], None), x, (u, v))[0],
        f32(3, 5, 7),
        f32(3, 7, 5),
        f32(2, 5),
    ),
    "scan_constants": (
        "ab cb -> b ca",
        lambda w, x: lax.scan(lambda c, row: (c + row, w @ row), jnp.zeros(5), x, reverse=True),
        f32(4, 5),
        f32(3, 5),
    ),
    "while": (
        "ab bb -> ab",
        lambda x, w: lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ w, x),
        f32(2, 4),
        f32(4, 4),
    ),
    "fori": ("ab bb -> ab", lambda x, w: lax.fori_loop(0, 3, lambda i, c: c @ w, x), f32(2, 4), f32(4, 4)),
    "cond": ("ab ab -> ab", lambda x, y: lax.cond(x.sum() > 0, lambda: x, lambda: y), f32(2, 4), f32(2, 4)),
    "switch": (
        ". ab bb -> ab",
        lambda i, x, w: lax.switch(i, [lambda: x @ w, lambda: x, lambda: 2 * x]),
        i32(),
        f32(2, 4),
        f32(4, 4),
    ),
    "shard_map": ("(ab)c cd -> (ab)d", _shard_map(jnp.dot, (P("z"), P()), P("z")), f32(8, 3), f32(3, 4)),
    "shard_map_psum": (
        "a(bc) (bc)d -> ad",
        _shard_map(lambda x, w: lax.psum(x @ w, "z"), (P(None, "z"), P("z")), P()),
        f32(3, 8),
        f32(8, 5),
    ),
    "shard_map_all_gather": (
        "(ab)c -> dc",
        _shard_map(lambda x: lax.all_gather(x, "z", tiled=True), (P("z"),), P()),
        f32(8, 3),
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_call_relates_axes(case):
    expected, fn, *args = CALLS[case]
    assert letters(fn, *args) == expected
    assert not infer(fn, *args).unknown


def test_two_calls_of_one_function_do_not_join_their_axes():
    double = jax.jit(lambda x: 2 * x)
    assert letters(lambda x, y: (double(x), double(y)), f32(4, 5), f32(4, 5)) == "ab cd -> ab cd"


# Sizes and what cannot be known.


def test_equal_sizes_never_join():
    def attend(w, x):
        q = (x @ w).reshape(8, 8, 8, 8)
        return jnp.einsum("blnh,bmnh->bnlm", q, q)

    # Batch, length, heads and head_dim are all 8; embed is 64, as is heads * head_dim.
    assert letters(attend, f32(64, 64), f32(8, 8, 64)) == "a(bc) dea -> dbee"


def test_reshape_inside_an_axis_is_noted():
    table = infer(lambda x: x.reshape(6, 4), f32(4, 6))
    assert letters(lambda x: x.reshape(6, 4), f32(4, 6)) == "ab -> cd"
    assert "reshape (4, 6) -> (6, 4)" in table.notes[0]


UNKNOWN = {
    "fft": (lambda x: jnp.fft.fft(x, axis=1).real, "fft"),
    "cholesky": (lambda x: jnp.linalg.cholesky(x.T @ x + 8 * jnp.eye(x.shape[1])), "cholesky"),
    "eigh": (lambda x: jnp.linalg.eigh(x.T @ x)[0], "eigh"),
    "solve": (lambda x: jnp.linalg.solve(x.T @ x + 8 * jnp.eye(x.shape[1]), x.T), "custom_linear_solve"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_primitive_is_listed_and_runs_pinned_with_its_gradient(name):
    fn, primitive = UNKNOWN[name]

    def loss(params, batch):
        return jnp.mean(fn(jnp.tanh(batch @ params["u"])) ** 2)

    params, batch = {"u": jnp.linspace(-1, 1, 24).reshape(6, 4)}, jnp.linspace(0, 1, 48).reshape(8, 6)
    shape = MeshShape(data=2, fsdp=2)
    layout = make_layout(trace(loss, params, batch, names=("params", "batch")), shape, "fsdp")
    assert primitive in layout.table.unknown
    listed = next(line for line in layout.explain().splitlines() if "without a rule" in line)
    assert primitive in listed
    pinned = layout.pin(make_mesh(shape, jax.devices()[:4]))
    want = jax.jit(jax.grad(loss))(params, batch)["u"]
    assert jnp.allclose(jax.jit(jax.grad(pinned))(params, batch)["u"], want, rtol=1e-4, atol=1e-5)


def test_a_rule_that_does_not_foresee_a_use_is_listed():
    table = infer(lambda x: lax.bitcast_convert_type(x, jnp.int8), f32(3, 4))
    assert table.unknown == {"bitcast_convert_type": 1}


def test_a_rule_written_by_a_user_is_used(monkeypatch):
    monkeypatch.setitem(primitives.RULES, "fft", primitives.same_dims)
    assert letters(lambda x: jnp.fft.fft(x, axis=1).real, f32(3, 8)) == "ab -> ab"


def test_a_parameter_called_jaxpr_that_is_no_call_is_not_entered(monkeypatch):
    # The reduction of `lax.reduce` is a jaxpr over scalars with as many inputs as the equation has operands.
    monkeypatch.delitem(primitives.RULES, "reduce")
    table = infer(lambda x: lax.reduce(x, 1.0, lambda a, b: a * b + 1.0, (1,)), f32(3, 4))
    assert table.unknown == {"reduce": 1}


# The unifier.


def test_split_of_a_joined_axis_splits_both():
    axes = Unifier()
    a, b = axes.fresh(12), axes.fresh(12)
    assert axes.unify(a, b)
    head, rest = axes.take(a, 3)
    assert leaves(b) == (*head, *rest)
    assert [axis.size for axis in leaves(b)] == [3, 4]


def test_axes_without_common_factors_stay_apart():
    axes = Unifier()
    a, b = (*axes.fresh(2), *axes.fresh(3)), (*axes.fresh(3), *axes.fresh(2))
    assert not axes.unify(a, b)
    assert leaves(a) != leaves(b)


def test_concatenation_of_equal_segments_splits_between_them():
    axes = Unifier()
    segments = [axes.fresh(4) for _ in range(3)]
    whole = axes.concatenated(segments, [4, 4, 4])
    head, rest = axes.take(whole, 3)
    assert [axis.size for axis in head] == [3]
    assert leaves(segments[0]) == leaves(segments[2]) == leaves(rest)


def test_every_output_has_the_size_of_its_shape():
    for _, fn, *args in [*CASES.values(), *CALLS.values()]:
        table = infer(fn, *args)
        for dims, leaf in zip(table.outputs(), jax.tree.leaves(table.traced.out), strict=True):
            sizes = [1] * len(dims)
            for i, dim in enumerate(dims):
                for axis in dim:
                    sizes[i] *= axis.size
            assert tuple(sizes) == leaf.shape


def test_inference_needs_only_shapes():
    table = infer_axes(trace(jnp.dot, f32(2**20, 2**20), f32(2**20, 2**20), names=("params", "batch")))
    assert table.contractions[0].flops == 2**61
