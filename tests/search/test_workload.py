"""Flops by hand and by XLA, bytes by the rule of fusion, what the backward pass keeps by `jax.vjp`."""

import collections
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx
from zoo import frameworks, gpt, llama, moe, t5

from search.flops import valid_positions
from search.saved import saved_activations
from search.workload import workload
from sharding_rules import AXES, MeshShape, make_layout, trace

BATCH = 8


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def traced_model(name):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(BATCH), zoo.base.abstract_key())
    return trace(model.loss, *args, names=("params", "batch", "rng"))


def products(work):
    """Flops of products by phase."""
    out = collections.Counter()
    for op in work.ops:
        if op.k:
            out[op.phase] += op.flops * op.trips
    return dict(out)


def weights(params, *names):
    return sum(leaf.size for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key in names)


# Flops by hand.


def test_mlp_flops_equal_the_hand_count():
    forward = 2 * BATCH * (24 * 32 + 32 * 48 + 48 * 40 + 40 * 16)
    # The batch has no gradient: the first layer's input is not differentiated.
    assert products(workload(traced_model("mlp"))) == {
        "forward": forward,
        "backward": 2 * forward - 2 * BATCH * 24 * 32,
    }


def llama_forward(s, tokens):
    layer = s.embed * (2 * s.heads + 2 * s.kv_heads) * s.head_dim + 3 * s.embed * s.mlp
    n = s.layers * layer + s.embed * s.vocab
    return 2 * n * tokens + 4 * s.length * s.heads * s.head_dim * s.layers * tokens


@pytest.mark.parametrize("name", ["llama_scanned", "llama_unrolled", "llama_sdpa", "llama_nnx"])
def test_llama_flops_are_2nt_and_attention(name):
    forward = llama_forward(llama.TINY, BATCH * llama.TINY.length)
    assert products(workload(traced_model(name))) == {"forward": forward, "backward": 2 * forward}


@pytest.mark.parametrize("name, unread", [("llama_scanned", ["kip"]), ("llama_unrolled", ["kip", "bar"])])
def test_full_remat_recomputes_the_layers_less_what_nobody_reads(name, unread):
    s, tokens = llama.TINY, BATCH * llama.TINY.length
    forward = llama_forward(s, tokens)
    # The head is in no block. A block's last product makes its output, which its own gradients do not read; unrolled
    # layers are two blocks each, the attention and the hidden layer.
    dropped = {"kip": s.mlp * s.embed, "bar": s.heads * s.head_dim * s.embed}
    recompute = forward - 2 * s.embed * s.vocab * tokens - 2 * s.layers * tokens * sum(dropped[k] for k in unread)
    assert products(workload(traced_model(name), remat="full")) == {
        "forward": forward,
        "recompute": recompute,
        "backward": 2 * forward,
    }


def test_dots_remat_recomputes_attention_only():
    s, tokens = llama.TINY, BATCH * llama.TINY.length
    # Scores and values: products with batch dimensions, which the policy does not keep.
    attention = 4 * s.length * s.heads * s.head_dim * s.layers * tokens
    assert products(workload(traced_model("llama_scanned"), remat="dots"))["recompute"] == attention


def test_prediction_has_the_forward_pass_only():
    work = workload(traced_model("llama_scanned"), grad=False)
    assert products(work) == {"forward": llama_forward(llama.TINY, BATCH * llama.TINY.length)}


def test_conv_counts_window_positions_on_data():
    def loss(params, batch):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(batch, params["a"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.lax.conv_general_dilated(x, params["b"], (2, 2), "SAME", dimension_numbers=numbers)
        return jnp.sum(x.mean((1, 2)) @ params["c"])

    params = {"a": f32(3, 3, 5, 6), "b": f32(3, 3, 6, 7), "c": f32(7, 4)}
    work = workload(trace(loss, params, f32(2, 8, 8, 5), names=("params", "batch")))
    # Along one dimension of 8, stride 1: 8 * 3 windows' positions, of which 2 fall off; stride 2: 4 * 3, 1 falls off.
    first, second, head = 2 * 2 * 5 * 6 * 22**2, 2 * 2 * 6 * 7 * 11**2, 2 * 2 * 7 * 4
    assert products(work) == {"forward": first + second + head, "backward": first + 2 * second + 2 * head}


@pytest.mark.parametrize("case", [(7, 3, 4, 2, 1, 1, 1), (5, 3, 9, 1, 2, 2, 1), (9, 3, 5, 1, 0, 1, 2)])
def test_valid_positions_equal_counting(case):
    size, window, out, stride, low, lhs, rhs = case
    data = np.zeros(1000, bool)
    data[200 : 200 + (size - 1) * lhs + 1 : lhs] = True
    count = sum(data[200 - low + o * stride + k * rhs] for o in range(out) for k in range(window))
    assert valid_positions(size, window, out, stride, low, lhs, rhs) == count


def test_moe_one_hot_flops_equal_the_hand_count():
    B, L, D, E, F, V, J, N, H = BATCH, moe.L, moe.D, moe.E, moe.F, moe.V, moe.J, moe.N, moe.H
    capacity = 2 * J * L // E
    attention = 2 * B * L * 4 * D * N * H + 4 * B * L * L * N * H
    router, head = 2 * B * L * D * E, 2 * B * L * D * V
    experts = 3 * 2 * E * B * capacity * D * F
    slots, dispatch = 2 * B * L * J * E * capacity, 2 * B * L * E * capacity * D
    forward = moe.LAYERS * (attention + router + experts + slots + 2 * dispatch) + head
    # Slots and the dispatch mask come from integers and comparisons: only the other operand has a gradient.
    backward = 2 * forward - moe.LAYERS * (slots + dispatch)
    assert products(workload(traced_model("moe_one_hot"))) == {"forward": forward, "backward": backward}


def test_moe_ragged_multiplies_every_token_twice():
    T, D, F = BATCH * moe.L * moe.J, moe.D, moe.F
    ragged = [op for op in workload(traced_model("moe_ragged")).ops if op.kind == "ragged"]
    assert sum(op.flops for op in ragged) == 3 * moe.LAYERS * 3 * 2 * T * D * F
    assert {op.phase for op in ragged} == {"forward", "backward"}


def test_vit_flops_equal_the_hand_count():
    P, D, F = 17, 32, 48
    patches, head = 2 * BATCH * 16 * 48 * D, 2 * BATCH * D * 24
    forward = patches + 2 * (2 * BATCH * P * (4 * D * D + 2 * D * F) + 4 * BATCH * P * P * D) + head
    assert products(workload(traced_model("vit_reshape"))) == {
        "forward": forward,
        "backward": 2 * forward - patches,
    }


def test_llama_8b_is_exact_and_quick():
    loss, params, batch = zoo.llama_8b(scanned=True)
    traced = trace(loss, params, batch, names=("params", "batch"))
    start = time.process_time()
    work = workload(traced)
    assert time.process_time() - start < 2
    shapes = llama.Shapes(128256, 4096, 32, 32, 8, 128, 14336, 2048)
    forward = llama_forward(shapes, 8 * 2048)
    assert products(work) == {"forward": forward, "backward": 2 * forward}
    assert work.product_flops == 3 * forward


# Flops by XLA.


@pytest.mark.parametrize(
    "name", ["mlp", "llama_unrolled", "llama_sdpa", "vit_conv", "resnet", "unet", "moe_one_hot", "mixer", "t5"]
)
def test_flops_agree_with_xla_before_fusion(name):
    traced = traced_model(name)
    expected = jax.jit(jax.value_and_grad(zoo.MODELS[name].loss)).lower(*traced.args).cost_analysis()
    assert workload(traced).flops == pytest.approx(expected["flops"], rel=0.01)


@pytest.mark.parametrize("name", ["mlp", "vit_reshape", "unet", "moe_one_hot", "t5"])
def test_flops_agree_with_the_compiled_step(name):
    """Of the others, XLA for CPUs computes cheap operands more than once, which at width 32 is 4 to 12 % (gpt2)."""
    traced = traced_model(name)
    compiled = jax.jit(jax.value_and_grad(zoo.MODELS[name].loss)).lower(*traced.args).compile()
    assert workload(traced).flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.03)


WIDE = {
    gpt: {"L": 64, "D": 256, "N": 8, "H": 32, "F": 1024, "V": 512},
    moe: {"L": 64, "D": 256, "N": 8, "H": 32, "F": 512, "V": 512},
    t5: {"S": 64, "T": 48, "D": 256, "N": 8, "H": 32, "F": 1024, "V": 512},
    frameworks: {"S": llama.Shapes(512, 256, 2, 8, 4, 32, 768, 64)},
}
"""Sizes at which products are most of the work, as in models that are trained."""
WIDE_MODELS = {
    "gpt2": (gpt, gpt.gpt2),
    "moe_one_hot": (moe, moe.one_hot),
    "t5": (t5, t5.t5),
    "llama_nnx": (frameworks, frameworks.nnx_llama),
}


@pytest.mark.parametrize("name", WIDE_MODELS)
def test_flops_of_wide_models_agree_with_the_compiled_step(name, monkeypatch):
    module, build = WIDE_MODELS[name]
    for constant, size in WIDE[module].items():
        monkeypatch.setattr(module, constant, size)
    model = build(name)
    args = (model.abstract_params(), model.abstract_batch(4), zoo.base.abstract_key())
    assert_flops_as_compiled(model.loss, *args)


def assert_flops_as_compiled(loss, *args, compiled=None):
    """`compiled` is the same function without loops, whose bodies XLA counts once."""
    traced = trace(loss, *args, names=("params", "batch", "rng")[: len(args)])
    step = jax.jit(jax.value_and_grad(compiled or loss)).lower(*traced.args).compile()
    assert workload(traced).flops == pytest.approx(step.cost_analysis()["flops"], rel=0.03)


class ConvNet(nnx.Module):
    """Strided and residual convolutions with group norms, as a user would write them."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 64, (7, 7), strides=2, rngs=rngs)
        self.inner = nnx.List([nnx.Conv(64, 64, (3, 3), rngs=rngs) for _ in range(3)])
        self.norms = nnx.List([nnx.GroupNorm(64, num_groups=8, rngs=rngs) for _ in range(3)])
        self.down = nnx.Conv(64, 128, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images_BYXC):
        x = self.stem(images_BYXC)
        for norm, conv in zip(self.norms, self.inner, strict=True):
            x = x + conv(nnx.relu(norm(x)))
        return self.head(nnx.relu(self.down(x)).mean((1, 2)))


class PatchTransformer(nnx.Module):
    """A vision transformer of two blocks."""

    def __init__(self, rngs):
        self.patch = nnx.Conv(3, 192, (8, 8), strides=8, padding="VALID", rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(192, rngs=rngs) for _ in range(4)])
        self.attend = nnx.List([nnx.MultiHeadAttention(4, 192, decode=False, rngs=rngs) for _ in range(2)])
        self.up = nnx.List([nnx.Linear(192, 768, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(768, 192, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(192, 10, rngs=rngs)

    def __call__(self, images_BYXC):
        x = self.patch(images_BYXC)
        x = x.reshape(x.shape[0], -1, 192)
        for i in range(2):
            x = x + self.attend[i](self.norms[2 * i](x))
            x = x + self.down[i](nnx.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x.mean(1))


@pytest.mark.parametrize("module", [ConvNet, PatchTransformer])
def test_flops_of_a_users_module_agree_with_the_compiled_step(module):
    graph, params = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))

    def loss(params, batch):
        return jnp.mean(nnx.merge(graph, params)(batch) ** 2)

    assert_flops_as_compiled(loss, params, f32(4, 64, 64, 3))


def test_flops_of_a_loop_are_those_of_the_layers_written_out():
    shapes = llama.Shapes(512, 256, 3, 8, 4, 32, 768, 64)
    params = jax.eval_shape(lambda: llama.init_scanned(jax.random.key(0), shapes))
    batch = {name: jax.ShapeDtypeStruct((4, shapes.length), jnp.int32) for name in ("s", "t")}

    def scanned(params, batch):
        return llama.forward_loss(params, batch, shapes)

    def written_out(params, batch):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["ham"]) for i in range(shapes.layers)]
        return llama.forward_loss({**params, "ham": layers}, batch, shapes)

    with jax.numpy_rank_promotion("allow"):
        assert_flops_as_compiled(scanned, params, batch, compiled=written_out)


# Phases, loops, branches.


def test_cond_takes_the_costliest_branch_and_while_is_flagged():
    def loss(params, batch):
        x = jax.lax.cond(batch[0, 0] > 0, lambda: batch @ params @ params, lambda: batch @ params)
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ params, x).sum()

    work = workload(trace(loss, f32(8, 8), f32(4, 8), names=("params", "batch")), grad=False)
    dots = [op for op in work.ops if op.kind == "dot"]
    assert [op.known for op in dots] == [True, True, False]
    assert set(work.unknown) >= {dots[2]}


def test_nested_scans_multiply_trips():
    def loss(params, batch):
        def inner(x, _):
            return x @ params["a"], None

        def outer(x, w):
            return jax.lax.scan(inner, x @ w, None, length=5)[0], None

        return jax.lax.scan(outer, batch, params["w"])[0].sum()

    work = workload(trace(loss, {"a": f32(8, 8), "w": f32(3, 8, 8)}, f32(4, 8), names=("params", "batch")))
    assert products(work)["forward"] == 2 * 4 * 8 * 8 * (3 + 15)
    assert {op.trips for op in work.ops if op.kind == "dot"} == {3, 15}


def test_integer_parameters_have_no_gradient():
    def loss(params, batch):
        return jnp.sum(batch @ params["w"]) * params["step"]

    params = {"w": f32(8, 8), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    work = workload(trace(loss, params, f32(4, 8), names=("params", "batch")))
    assert products(work) == {"forward": 2 * 4 * 8 * 8, "backward": 2 * 4 * 8 * 8}


@pytest.mark.parametrize("name", ["llama_scanned", "gpt2", "t5", "lstm", "fixed_point", "resnet_group"])
def test_every_row_is_named_and_every_cost_is_finite(name):
    work = workload(traced_model(name), remat="full")
    table, arrays = work.table(), work.arrays()
    assert table["axes"].shape == table["contracted"].shape == (len(work.ops), len(work.rows))
    assert np.isfinite(table["flops"]).all()
    assert (table["trips"] >= 1).all()
    for written, column in ((False, "bytes_read"), (True, "bytes_written")):
        total = np.bincount(arrays["op"], arrays["bytes"] * (arrays["written"] == written), len(work.ops))
        np.testing.assert_array_equal(total, table[column])
    # Only the inner axes of a few intermediates have no row.
    dots = [op for op in work.ops if op.kind == "dot" and op.flops > 1000]
    assert all("inner" not in dim for op in dots for a in (*op.reads, *op.writes) for dim in a.axes)
    assert all(op.axes for op in dots)


def test_rejects_what_is_no_loss():
    with pytest.raises(ValueError, match="floating scalar"):
        workload(trace(lambda params, batch: batch @ params, f32(8, 8), f32(4, 8), names=("params", "batch")))
    with pytest.raises(ValueError, match="remat"):
        workload(traced_model("mlp"), grad=False, remat="full")


# Axes.


def test_products_know_their_rows():
    work = workload(traced_model("llama_scanned"))
    up = next(op for op in work.ops if op.kind == "dot" and op.phase == "forward" and "mlp" in op.axes)
    assert up.axes == ("batch", "length", "embed", "mlp")
    assert up.contracted == ("embed",)
    assert [array.weight for array in up.reads] == [False, True]
    assert up.writes[0].axes == (("batch",), ("length",), ("mlp",))
    gradients = [op for op in work.ops if op.phase == "backward" and set(op.contracted) == {"batch", "length"}]
    assert sum(op.trips for op in gradients) == 3 * 7 + 1


def test_sharded_flops_divide_by_the_ways_of_the_rows():
    work = workload(traced_model("llama_scanned"))
    table, rows = work.table(), list(work.rows)
    sizes = np.ones(len(rows))
    sizes[rows.index("batch")], sizes[rows.index("mlp")] = 2, 4
    ways = np.where(table["axes"], sizes, 1).prod(axis=1)
    in_mlp = table["axes"][:, rows.index("mlp")] & (table["kind"] == "dot")
    assert set(ways[in_mlp]) == {8}


def test_merging_keeps_totals_and_folds_layers():
    work = workload(traced_model("llama_unrolled"))
    merged = work.merged()
    assert (merged.flops, merged.bytes) == (work.flops, work.bytes)
    assert len(merged.ops) < len(work.ops) / 2


# Bytes.


def test_elementwise_chain_is_one_loop():
    def fn(params, batch):
        x = jnp.tanh(batch * 2.0) + params[None, :]
        return jnp.where(x > 0, x, 0.1 * x)

    (op,) = workload(trace(fn, f32(32), f32(16, 32), names=("params", "batch")), grad=False).ops
    assert (op.kind, op.bytes_read, op.bytes_written) == ("elementwise", 4 * (16 * 32 + 32), 4 * 16 * 32)
    assert op.transcendentals == 16 * 32


def test_softmax_is_three_passes():
    def fn(batch):
        return jax.nn.softmax(batch)

    n = 4 * 16 * 32
    work = workload(trace(fn, f32(16, 32), names=("batch",)), grad=False)
    assert [op.kind for op in work.ops] == ["reduce", "reduce", "elementwise"]
    # Read; read and write the exponentials; read them and write the result; and 16 statistics in between.
    assert [op.bytes_read // n for op in work.ops] == [1, 1, 1]
    assert [op.bytes_written // n for op in work.ops] == [0, 1, 1]


def test_product_reads_its_operands_and_writes_its_result():
    (op,) = workload(
        trace(lambda params, batch: batch @ params, f32(32, 8), f32(16, 32), names=("params", "batch")), grad=False
    ).ops
    assert (op.batch, op.m, op.n, op.k) == (1, 16, 8, 32)
    assert (op.bytes_read, op.bytes_written) == (4 * (16 * 32 + 32 * 8), 4 * 16 * 8)


def test_gather_touches_what_it_picks():
    def fn(params, batch):
        return params[batch]

    args = (f32(1000, 32), jax.ShapeDtypeStruct((16,), jnp.int32))
    op = next(o for o in workload(trace(fn, *args, names=("params", "batch")), grad=False).ops if o.kind == "gather")
    assert (op.bytes_read, op.bytes_written) == (4 * 16 * 32 + 4 * 16, 4 * 16 * 32)


def test_what_a_lookup_moves_divides_with_the_batch():
    def loss(params, batch):
        return jnp.sum(params["table"][batch] @ params["w"])

    params = {"table": f32(1000, 32), "w": f32(32, 8)}
    work = workload(trace(loss, params, jax.ShapeDtypeStruct((16,), jnp.int32), names=("params", "batch")))
    gather = next(op for op in work.ops if op.kind == "gather")
    # What is picked divides with the batch, and with the rows of the table where several devices hold them.
    assert gather.reads[0].axes[:-1] == gather.writes[0].axes
    scatter = next(op for op in work.ops if op.kind == "scatter")
    put = max(scatter.reads, key=lambda array: array.bytes)
    assert (put.bytes, put.axes[:2]) == (2 * 4 * 16 * 32, gather.writes[0].axes)
    (whole,) = scatter.writes
    assert (whole.bytes, whole.axes[1]) == (4 * 1000 * 32, gather.writes[0].axes[-1])


@pytest.mark.parametrize("name", ["llama_scanned", "llama_unrolled", "llama_sdpa", "gpt2", "vit_conv", "t5"])
def test_fused_attention_keeps_flops_and_drops_scores(name):
    traced = traced_model(name)
    plain, fused = workload(traced), workload(traced, fused_attention=True)
    assert fused.flops == plain.flops
    attention = [op for op in fused.ops if op.kind == "attention"]
    layers = {"t5": 6, "gpt2": 2, "vit_conv": 2}.get(name, 3)
    assert {p: sum(o.trips for o in attention if o.phase == p) for p in ("forward", "backward")} == {
        "forward": layers,
        "backward": layers,
    }
    assert fused.bytes < plain.bytes


def test_fused_attention_moves_queries_keys_values_and_statistics():
    s = llama.TINY
    work = workload(traced_model("llama_scanned"), fused_attention=True)
    rows = 4 * BATCH * s.length
    q, kv, statistics = rows * s.heads * s.head_dim, rows * s.kv_heads * s.head_dim, rows * s.heads
    forward, backward = (op for op in work.ops if op.kind == "attention")
    assert forward.bytes_read == q + 2 * kv
    # The sum of the exponentials, and its derivative's factor.
    assert forward.bytes_written == q + 2 * statistics
    assert backward.bytes_read == 2 * q + 2 * kv + 2 * statistics
    assert backward.bytes_written == q + 2 * kv


def test_fused_attention_reads_a_bias_and_writes_its_gradient():
    """T5's encoder layers share a bias of positions and padding, as large as the scores."""
    ops = [op for op in workload(traced_model("t5"), fused_attention=True).ops if op.kind == "attention"]
    scores = 4 * BATCH * 8 * 20 * 20

    def of_scores(arrays):
        return [a.bytes for a in arrays if a.bytes == scores and len(a.axes) == 4]

    encoder = [op for op in ops if op.m == op.n == 20]
    assert [(of_scores(op.reads), of_scores(op.writes)) for op in encoder if op.phase == "forward"] == [
        ([scores], []),
        ([scores], []),
    ]
    # The later layer's gradient of the scores is kept until the earlier one's is added to it.
    assert [(of_scores(op.reads), of_scores(op.writes)) for op in encoder if op.phase == "backward"] == [
        ([], [scores]),
        ([scores], []),
    ]


def test_mixture_routing_is_no_attention():
    work = workload(traced_model("moe_one_hot"), fused_attention=True)
    assert sum(op.trips for op in work.ops if op.kind == "attention" and op.phase == "forward") == moe.LAYERS
    assert all("expert" not in op.axes for op in work.ops if op.kind == "attention")


# What the backward pass keeps.


def residuals(traced, remat):
    """Types of the residuals of `jax.vjp` that the compiled pullback reads and that are no arguments."""
    pinned = make_layout(traced, MeshShape()).pin(jax.sharding.AbstractMesh((1,) * len(AXES), AXES), remat)

    def forward(*args):
        return jax.vjp(lambda params: pinned(params, *args[1:]), args[0])[1]

    pullback = jax.eval_shape(forward, *traced.args)
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(forward(*args)))(*traced.args).jaxpr
    leaves, structure = jax.tree.flatten(pullback)
    own = {var: i for i, var in enumerate(jaxpr.outvars) if var not in jaxpr.invars}

    def run(values, cotangent):
        zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        for i, var in enumerate(jaxpr.outvars):
            if var in own:
                zeros[i] = values[list(own).index(var)]
        return jax.tree.unflatten(structure, zeros)(cotangent)

    text = jax.jit(run).lower([leaves[i] for i in own.values()], traced.out).as_text()
    types = re.findall(r"%arg\d+: tensor<([^>]*)>", text.split("@main", 1)[1].split("->", 1)[0])
    return collections.Counter(types) - collections.Counter(["f32"])


def mlir_type(saved):
    shape = (saved.trips, *saved.shape) if saved.trips > 1 else saved.shape
    name = {"float32": "f32", "bool": "i1", "int32": "i32", "uint32": "ui32"}[str(saved.dtype)]
    return "x".join([*map(str, shape), name])


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", ["mlp_equal", "llama_scanned", "llama_unrolled", "resnet", "moe_one_hot", "lstm"])
def test_saved_activations_are_the_residuals_of_vjp(name, remat):
    traced = traced_model(name)
    saved = collections.Counter(mlir_type(s) for s in saved_activations(traced, remat))
    assert saved == residuals(traced, remat)


def test_fused_attention_keeps_no_scores():
    s, traced = llama.TINY, traced_model("llama_scanned")
    scores = BATCH * s.heads * s.length**2
    plain = [x for x in saved_activations(traced) if np.prod(x.shape) == scores]
    fused = [x for x in saved_activations(traced, fused_attention=True) if np.prod(x.shape) == scores]
    assert plain
    assert not fused


def test_full_remat_keeps_the_inputs_of_blocks():
    s = llama.TINY
    saved = [x for x in saved_activations(traced_model("llama_scanned"), "full") if x.trips > 1]
    (carry,) = saved
    assert (carry.shape, carry.trips) == ((BATCH, s.length, s.embed), s.layers)
    assert carry.axes == (("batch",), ("length",), ("embed",))
    assert carry.bytes == 4 * BATCH * s.length * s.embed * s.layers
    assert carry.activation


# What loops keep.


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_a_loop_keeps_is_copied_in_and_out_of_a_stack(remat):
    traced = traced_model("llama_scanned")
    kept = sum(s.bytes for s in saved_activations(traced, remat) if s.trips > 1 and s.activation)
    copies = [op for op in workload(traced, remat=remat).ops if op.kind == "stack"]
    for phase in ("forward", "backward"):
        mine = [op for op in copies if op.phase == phase]
        assert (
            sum(op.bytes_read * op.trips for op in mine) == sum(op.bytes_written * op.trips for op in mine) == kept > 0
        )


def test_layers_written_out_have_no_stacks():
    assert not [op for op in workload(traced_model("llama_unrolled")).ops if op.kind == "stack"]
