"""Activations by hand, against `jax.vjp`, against one placement at a time, and what more devices may never do."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import base, llama

from search.liveness import analyse_step
from search.memory import ActivationMemory, splits_of
from search.saved import saved_in
from sharding_rules import AXES, MeshShape, make_layout, trace

BATCH = 8
FLOAT = 4


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def layout_of(loss, params, batch):
    return make_layout(trace(loss, params, batch, names=("params", "batch")), MeshShape())


def memory_of(layout, **options):
    return ActivationMemory(layout.traced, layout, **options)


def at(memory, layout, remat="none", microbatches=1):
    """Parts of one layout."""
    found = memory.bytes(splits_of(layout), remat, microbatches, layout.mesh_shape.fsdp)
    return {part: int(getattr(found, part)[0]) for part in ("layers", "outside", "transient", "gathered")}


# By hand: a hidden layer, unrolled.

IN, HIDDEN, OUT = 16, 64, 32


def mlp_loss(params, batch):
    return jnp.square(jnp.tanh(batch["x"] @ params["u"]) @ params["v"]).sum()


MLP = layout_of(mlp_loss, {"u": f32(IN, HIDDEN), "v": f32(HIDDEN, OUT)}, {"x": f32(BATCH, IN)})


def test_a_hidden_layer_keeps_its_two_products():
    # tanh and its derivative are computed again from the first product; the square needs the second.
    found = at(memory_of(MLP), MLP)
    assert found["layers"] + found["outside"] == FLOAT * BATCH * (HIDDEN + OUT) + FLOAT  # and the loss
    assert found["gathered"] == 0


def test_a_hidden_layer_of_microbatches_keeps_a_share():
    one, four = (at(memory_of(MLP), MLP, microbatches=m) for m in (1, 4))
    assert 4 * (four["layers"] + four["outside"] - FLOAT) == one["layers"] + one["outside"] - FLOAT


# Repeated layers: scanned and written out.

EMBED, MLP_ROWS, LAYERS, LENGTH, VOCAB = 32, 128, 6, 16, 64


def block(x, p):
    return x + jnp.tanh(x @ p["u"]) @ p["v"]


def scanned_loss(params, batch):
    x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), params["t"][batch["i"]], params["b"])
    return jax.nn.log_softmax(x @ params["h"]).mean()


def unrolled_loss(params, batch):
    x = params["t"][batch["i"]]
    for p in params["b"]:
        x = block(x, p)
    return jax.nn.log_softmax(x @ params["h"]).mean()


TOKENS = {"i": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)}
ENDS = {"t": f32(VOCAB, EMBED), "h": f32(EMBED, VOCAB)}
SCANNED = layout_of(
    scanned_loss, {**ENDS, "b": {"u": f32(LAYERS, EMBED, MLP_ROWS), "v": f32(LAYERS, MLP_ROWS, EMBED)}}, TOKENS
)
UNROLLED = layout_of(
    unrolled_loss, {**ENDS, "b": [{"u": f32(EMBED, MLP_ROWS), "v": f32(MLP_ROWS, EMBED)}] * LAYERS}, TOKENS
)
ROW = FLOAT * BATCH * LENGTH


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_loop_keeps_the_residuals_of_vjp(remat):
    step = analyse_step(SCANNED.traced, remat=remat)
    residuals = sum(s.bytes for s in saved_in(step) if s.trips == LAYERS and s.activation)
    found = at(memory_of(SCANNED, remats=(remat,), steps={remat: step}), SCANNED, remat)
    assert found["layers"] == residuals > 0


@pytest.mark.parametrize("layout", [SCANNED, UNROLLED], ids=["scanned", "unrolled"])
def test_full_remat_keeps_the_inputs_of_blocks(layout):
    found = at(memory_of(layout), layout, "full")
    assert found["layers"] == LAYERS * ROW * EMBED


@pytest.mark.parametrize("layout", [SCANNED, UNROLLED], ids=["scanned", "unrolled"])
def test_full_remat_computes_one_block_at_a_time(layout):
    memory = memory_of(layout)
    none, full = at(memory, layout, "none"), at(memory, layout, "full")
    weights = FLOAT * 2 * EMBED * MLP_ROWS
    # Beyond the inputs of blocks: of one block at most the hidden layer a few times, or the head's logits.
    assert full["transient"] + full["outside"] <= ROW * 4 * max(MLP_ROWS, VOCAB) + 2 * weights
    assert sum(full.values()) < sum(none.values()) / 2


def test_written_out_layers_keep_what_cannot_be_computed_again():
    # Per layer: its first product, and its input (of the residual's chain of sums).
    found = at(memory_of(UNROLLED), UNROLLED)
    assert LAYERS * ROW * MLP_ROWS <= found["layers"] <= LAYERS * ROW * (MLP_ROWS + EMBED)


# Attention.

SHAPES = llama.Shapes(vocab=64, embed=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp=48, length=128)


def attention_layout(length):
    shapes = dataclasses.replace(SHAPES, length=length)
    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
    params = jax.eval_shape(lambda rng: llama.init_scanned(rng, shapes), base.abstract_key())
    with jax.numpy_rank_promotion("allow"):
        return layout_of(lambda p, b: llama.forward_loss(p, b, shapes), params, {"s": tokens, "t": tokens})


ATTENTION = attention_layout(SHAPES.length)
SCORES = FLOAT * 4 * SHAPES.heads * SHAPES.length**2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fused_attention_leaves_out_scores(remat):
    plain = at(memory_of(ATTENTION), ATTENTION, remat)
    fused = at(memory_of(ATTENTION, fused_attention=True), ATTENTION, remat)
    assert sum(plain.values()) - sum(fused.values()) >= SCORES
    if remat == "none":
        assert plain["layers"] - fused["layers"] >= SHAPES.layers * SCORES


def test_fused_attention_keeps_in_proportion_to_the_length():
    long = attention_layout(2 * SHAPES.length)
    one, two = (at(memory_of(m, fused_attention=True), m)["layers"] for m in (ATTENTION, long))
    assert two <= 2 * one
    one, two = (at(memory_of(m), m)["layers"] for m in (ATTENTION, long))
    assert two > 2.5 * one


# Placements.

MESHES = [
    (MeshShape(data=4), "data"),
    (MeshShape(fsdp=2), "fsdp"),
    (MeshShape(fsdp=2, tensor=4), "fsdp+megatron+sequence"),
]


def brute_force(memory, layout, remat, microbatches):
    """The fullest moment of one candidate, by adding up every interval at every time."""
    program = memory._program(remat)
    splits = splits_of(layout)
    sizes = {**layout.mesh_shape.sizes, "data": splits.batch_shards, "fsdp": 1}
    fsdp = layout.mesh_shape.fsdp

    def axes_of(rows, tables):
        grouped = bool((rows & splits.groups).any())
        found = set()
        for r in np.flatnonzero(rows):
            for table in tables:
                if table is splits.spill or grouped or not splits.beyond[r]:
                    found |= {a for a, on in zip(AXES, table[r], strict=True) if on and sizes[a] > 1}
        return found

    def local(index):
        arrays = program.arrays
        rows = arrays.incidence_sr[arrays.set_v[index]]
        held, axes = (axes_of(rows, tables) for tables in ((splits.rows,), (splits.rows, splits.spill)))
        shrinks = microbatches if arrays.batched_v[index] else 1
        if index in arrays.whole:
            beside = axes_of(arrays.incidence_sr[arrays.whole[index]], (splits.rows,))
            if not (axes - held) & beside:
                return 0.0
            axes = held
        return arrays.bytes[index] / np.prod([sizes[a] for a in axes] or [1]) / shrinks

    def peak(body):
        loops = dict(body.inner)
        moments = []
        for t in range(body._now + 3):
            total = 0.0
            for i in body.intervals:
                always = i.lasting and microbatches > 1
                if not (always or i.start <= t <= max(i.start, i.stop)):
                    continue
                kind = ("value", "gradient", "gathered", "copy", "shard", "early", "sent")[i.kind]
                if kind in ("gathered", "shard", "sent") and fsdp == 1:
                    continue
                if kind == "early" and microbatches > 1:
                    continue
                if kind == "gradient" and microbatches > 1 and i.start not in loops:
                    continue
                total += i.sign * local(i.index) / (fsdp if kind in ("gradient", "copy", "shard") else 1)
            moments.append(total + max((peak(b) for b in loops.get(t, [])), default=0.0))
        return max(moments)

    return peak(program.body)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("model", [ATTENTION, UNROLLED], ids=["attention", "unrolled"])
def test_all_candidates_at_once_are_those_one_by_one(model, remat):
    memory = memory_of(model)
    for mesh, preset in MESHES:
        layout = model.on(mesh, preset)
        counts = np.array([1, 2, 4])
        peaks, _, _ = memory._program(remat).body.peak(
            memory._program(remat).arrays.split(splits_of(layout)), counts * 1.0, np.full(3, float(mesh.fsdp))
        )
        np.testing.assert_allclose(peaks, [brute_force(memory, layout, remat, m) for m in counts], rtol=1e-9)
        together = memory.bytes(splits_of(layout), remat, counts, mesh.fsdp)
        for i, m in enumerate(counts):
            assert int(together.total[i]) == sum(at(memory, layout, remat, m).values())


def test_tensor_parallelism_halves_what_it_splits():
    memory = memory_of(SCANNED)
    one, two = (at(memory, SCANNED.on(mesh, "megatron"), "none") for mesh in (MeshShape(), MeshShape(tensor=2)))
    hidden = sum(
        s.bytes for s in saved_in(analyse_step(SCANNED.traced)) if s.activation and s.shape[-1:] == (MLP_ROWS,)
    )
    assert hidden > 0
    assert one["layers"] - two["layers"] == hidden // 2


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("model", [ATTENTION, SCANNED, UNROLLED], ids=["attention", "scanned", "unrolled"])
def test_more_tensor_parallelism_never_takes_more(model, remat):
    memory = memory_of(model, remats=(remat,))
    totals = [sum(at(memory, model.on(MeshShape(tensor=n), "megatron"), remat).values()) for n in (1, 2, 4)]
    assert totals == sorted(totals, reverse=True)


def test_sequence_parallelism_gathers_what_products_read():
    memory = memory_of(SCANNED)
    program = memory._program("none")
    mesh = MeshShape(tensor=4)
    split, spilled = (
        program.arrays.split(splits_of(SCANNED.on(mesh, f"megatron{more}"))) for more in ("", "+sequence")
    )
    whole = sorted(program.arrays.whole)
    assert whole
    assert not split[whole].any()
    # The input of a block is gathered for its first product; the hidden layer is split over tensor anyway.
    assert ROW * EMBED in spilled[whole]
    assert set(spilled[whole]) <= {0.0, ROW * EMBED}


@pytest.mark.parametrize("model", [ATTENTION, SCANNED, UNROLLED], ids=["attention", "scanned", "unrolled"])
def test_more_microbatches_never_keep_more(model):
    found = memory_of(model).bytes(splits_of(model), "full", [2, 4, 8], 1)
    assert np.all(np.diff(found.layers) < 0)
    assert np.all(np.diff(found.total) < 0)


def test_gradients_of_a_microbatch_lie_beside_their_sums_in_a_loop_only():
    weights = FLOAT * 2 * EMBED * MLP_ROWS
    scanned, unrolled = (memory_of(m).bytes(splits_of(m), "full", [1, 4]) for m in (SCANNED, UNROLLED))
    assert scanned.stacked[0] == 0
    assert scanned.stacked[1] == LAYERS * weights
    assert not unrolled.stacked.any()


def test_weights_are_gathered_one_layer_at_a_time_in_a_loop_only():
    weights = FLOAT * 2 * EMBED * MLP_ROWS
    scanned, unrolled = (at(memory_of(m), m.on(MeshShape(fsdp=8), "fsdp"), "none") for m in (SCANNED, UNROLLED))
    assert scanned["gathered"] <= weights + FLOAT * EMBED * VOCAB
    assert unrolled["gathered"] > (LAYERS - 1) * weights
    assert at(memory_of(UNROLLED), UNROLLED.on(MeshShape(data=8), "data"))["gathered"] == 0


def test_a_placement_takes_under_five_milliseconds():
    memory = memory_of(ATTENTION)
    splits = splits_of(ATTENTION.on(MeshShape(fsdp=2, tensor=2), "fsdp+megatron"))
    microbatches, fsdp = np.repeat([1, 2, 4, 8], 4), np.tile([1, 2, 4, 8], 4)
    memory.bytes(splits, "full", microbatches, fsdp)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        memory.bytes(splits, "full", microbatches, fsdp)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5e-3


def test_a_rematerialisation_that_was_not_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"remat='dots'; this memory was made for none, full"):
        memory_of(MLP, remats=("none", "full")).bytes(splits_of(MLP), "dots")
