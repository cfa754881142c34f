"""Seconds by hand, traffic of known models, memory and legality as the layout has them."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from tiny_architectures import tiny

from redco_like.problem import load_problem
from search.cluster import parse_cluster
from search.collectives import collective_seconds
from search.cost import Columns, CostModel, Flow, Placement, Variant
from search.costing import memory_parts
from search.efficiency import Efficiency
from search.memory import step_bytes
from search.space import Inner, Space
from search.traced_model import TracedModel
from search.workload import Array, Op, Workload
from sharding_rules import AXES, CONTEXT, FSDP, TENSOR, MeshShape, PlanError, make_layout, trace

BATCH = 8
CLUSTER = parse_cluster("8xA100")


def traced_model(name, batch=BATCH):
    model = zoo.MODELS[name]
    args = (model.abstract_params(), model.abstract_batch(batch), zoo.base.abstract_key())
    traced = trace(model.loss, *args, names=("params", "batch", "rng"))
    trainable = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, args[0])
    return traced, jax.eval_shape(optax.adam(1e-3).init, trainable)


def model_of(name, cluster=CLUSTER, **options):
    return TracedModel(*traced_model(name), cluster, **options)


def placed(model, **sizes):
    inner = Inner(**{"tensor": 1, "context": 1, "expert": 1, "sequence": False, "batch_shards": 1} | sizes)
    place = model.place(inner)
    assert not isinstance(place, str), place
    return place


def columns(fsdp=0, remat=0, microbatches=1):
    return Columns(*(np.atleast_1d(np.array(x, np.int64)) for x in (fsdp, remat, microbatches)))


# By hand.


def one_product(m=4096, n=8192, k=2048):
    """x (m, k) @ w (k, n), rows batch, embed and mlp."""
    x, w, y = ((("batch",), ("embed",)), (("embed",), ("mlp",)), (("batch",), ("mlp",)))
    op = Op(
        kind="dot",
        phase="forward",
        flops=2 * m * n * k,
        transcendentals=0,
        batch=1,
        m=m,
        n=n,
        k=k,
        reads=(Array(2 * m * k, x, False), Array(2 * k * n, w, True)),
        writes=(Array(2 * m * n, y, False),),
        axes=("batch", "embed", "mlp"),
        contracted=("embed",),
        trips=3,
        known=True,
        dtype="bfloat16",
        source="",
    )
    return Workload((op,), {"batch": m, "embed": k, "mlp": n})


def by_hand(*, tensor=1, batch_shards=1, flows=(), fsdp_sizes=(1,)):
    rows = np.zeros((3, len(AXES)), bool)
    rows[0, :2] = True
    rows[2, AXES.index(TENSOR)] = True
    return Placement(
        expert=1,
        context=1,
        tensor=tensor,
        batch_shards=batch_shards,
        sequence=False,
        rows=rows,
        spill=np.zeros_like(rows),
        beyond=np.zeros(3, bool),
        groups=np.zeros(3, bool),
        fsdp_sizes=fsdp_sizes,
        flows=flows,
        held=np.zeros((3, 3, len(fsdp_sizes))),
    )


@pytest.mark.parametrize("tensor, shards, parts", [(1, 1, 1), (2, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_product_takes_the_roofline_of_its_share(tensor, shards, parts):
    costs = CostModel(CLUSTER, {"none": one_product()})
    e = costs.efficiency
    found = costs.seconds(by_hand(tensor=tensor, batch_shards=shards), columns(microbatches=parts))
    m, n, k = 4096 / shards / parts, 8192 / tensor, 2048
    flops = 2 * m * n * k / (312e12 * float(e.product(m, n, k)))
    moved = 2 * (m * k + k * n + m * n) / (0.85 * 2039e9)
    np.testing.assert_allclose(found.compute, [3 * parts * (max(flops, moved) + 2e-6)], rtol=1e-12)


def test_microbatches_read_the_weights_again():
    costs = CostModel(CLUSTER, {"none": one_product(m=64)}, efficiency=Efficiency(launch_seconds=(("gpu", 0.0),)))
    found = costs.seconds(by_hand(), columns([0, 0], [0, 0], [1, 4])).compute
    weights, rest = 2 * 2048 * 8192, 2 * 64 * (2048 + 8192)
    np.testing.assert_allclose(found, [3 * (n * weights + rest) / (0.85 * 2039e9) for n in (1, 4)], rtol=1e-12)


def test_small_products_are_slow_and_large_ones_reach_the_constant():
    e = Efficiency()
    assert 0.88 < e.product(8192, 8192, 8192) < e.matmul
    assert e.product(8192, 8192, 16) < 0.5 * e.matmul
    sizes = np.arange(1, 200)
    assert (np.diff(e.product(sizes, 128, 128)) > 0).all()


@pytest.mark.parametrize("n, share", [(256, 1.0), (176, 176 / 256), (352, 352 / 512), (100, 1.0), (512, 1.0)])
def test_products_fill_the_matrix_unit(n, share):
    free = dict(matmul=1.0, half_size=0.0, half_depth=0.0, tile=256.0)
    assert Efficiency(**free).product(4096, n, 4096) == pytest.approx(share)
    assert Efficiency(**free).product(4096, 4096, n) == pytest.approx(share)
    assert Efficiency(**free).product(n, 4096, 4096) == pytest.approx(1.0)


@pytest.mark.parametrize("compute, collectives, expected", [(10, 2, 0.26), (10, 10, 1.3), (2, 10, 8.26), (3, 0, 0)])
def test_overlap_slows_both_sides(compute, collectives, expected):
    found = CostModel(CLUSTER, {"none": one_product()}).exposed(compute, collectives)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("phase, hides", [("forward", False), ("forward", True), ("step", False), ("step", True)])
def test_flow_costs_its_collective_on_its_stride(phase, hides):
    flow = Flow("all_gather", (FSDP,), 1e9, (TENSOR,), phase, hides, False, {"": 2.0})
    costs = CostModel(CLUSTER, {"none": one_product()})
    place = by_hand(tensor=2, batch_shards=4, flows=(flow,), fsdp_sizes=(1, 2, 4))
    found = costs.seconds(place, columns(2, 0, 4))
    once = 2 * float(collective_seconds(CLUSTER, "all_gather", 0.5e9, 4, 2))
    if not hides:
        np.testing.assert_allclose(found.exposed[FSDP], [once * (4 if phase == "forward" else 1)], rtol=1e-12)
    else:
        assert found.hidden[0] == pytest.approx(once * (4 if phase == "forward" else 1))
        assert found.total[0] >= max(found.compute[0], found.hidden[0])
    assert costs.seconds(place, columns(0, 0, 4)).exposed[FSDP][0] == 0


# Traffic of known models.


def counts(place, *, axis, remat="none"):
    """(kind, phase) -> times per step, of activations whose collectives run over one axis."""
    out = {}
    for flow in place.flows:
        if flow.axes == (axis,) and flow.batch and flow.times(remat):
            key = (flow.kind, flow.phase)
            out[key] = out.get(key, 0) + flow.times(remat)
    return out


@pytest.mark.parametrize("name", ["llama_scanned", "llama_unrolled"])
def test_megatron_reduces_twice_per_layer_and_pass(name):
    model = model_of(name)
    place = placed(model, tensor=4, batch_shards=2)
    big = [f for f in place.flows if f.axes == (TENSOR,) and np.max(f.bytes) == 4 * BATCH * 12 * 32]
    forward = sum(f.times("none") for f in big if f.phase == "forward")
    backward = sum(f.times("none") for f in big if f.phase == "backward")
    # Attention's and the MLP's output; and the embedding's lookup. Their inputs' gradients; and the head's.
    assert (forward, backward) == (2 * 3 + 1, 2 * 3 + 1)
    assert {f.kind for f in big} == {"all_reduce"}


def test_sequence_parallelism_scatters_and_gathers_instead():
    model = model_of("llama_scanned")
    place = placed(model, tensor=4, batch_shards=2, sequence=True)
    big = [f for f in place.flows if f.axes == (TENSOR,) and np.max(f.bytes) == 4 * BATCH * 12 * 32]
    by_kind = {
        key: sum(f.times("none") for f in big if (f.kind, f.phase) == key)
        for key in itertools.product(("all_gather", "reduce_scatter", "all_reduce"), ("forward", "backward"))
    }
    assert by_kind["all_reduce", "forward"] == by_kind["all_reduce", "backward"] == 0
    assert by_kind["reduce_scatter", "forward"] == by_kind["all_gather", "forward"] == 2 * 3 + 1
    assert by_kind["reduce_scatter", "backward"] == 2 * 3 + 1


def test_full_remat_reduces_again_what_it_computes_again():
    place = placed(model_of("llama_scanned"), tensor=4, batch_shards=2)
    none, full = (counts(place, axis=TENSOR, remat=r)["all_reduce", "backward"] for r in ("none", "full"))
    # The attention's output is made again in each of three layers; the block's last product is not read.
    assert full - none >= 3


def test_fsdp_gathers_every_matrix_twice_and_scatters_its_gradient():
    traced, state = traced_model("llama_scanned")
    model = TracedModel(traced, state, CLUSTER)
    place = placed(model, batch_shards=8)
    layout = model.layout.on(MeshShape(fsdp=8), "fsdp")
    matrices = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf, (_, rest) in zip(jax.tree.leaves(traced.arg("params")), layout.param_shares.values(), strict=True)
        if any(FSDP in entry for entry in rest.entries)
    )
    index = place.fsdp_sizes.index(8)
    sums = {}
    for flow in place.flows:
        if flow.axes == (FSDP,):
            key = (flow.kind, flow.phase)
            sums[key] = sums.get(key, 0) + flow.bytes[index] * flow.times("none")
    top = sum(4 * math.prod(traced.arg("params")[name].shape) for name in ("zot", "arc"))
    assert sums == {
        ("all_gather", "forward"): matrices,
        # Outside of the loop, what was gathered is kept.
        ("all_gather", "backward"): matrices - top,
        ("reduce_scatter", "backward"): matrices,
    }


def test_context_gathers_keys_and_values():
    place = placed(model_of("llama_scanned"), context=2, batch_shards=4)
    found = counts(place, axis="context")
    assert found == {
        ("all_gather", "forward"): 2 * 3,
        ("all_gather", "backward"): 2 * 3,
        ("reduce_scatter", "backward"): 2 * 3,
    }


@pytest.mark.parametrize("name", ["llama_scanned", "llama_unrolled"])
def test_collectives_know_their_part_of_the_model(name):
    place = placed(model_of(name), tensor=4, batch_shards=2)
    big = [f for f in place.flows if f.axes == (TENSOR,) and np.max(f.bytes) == 4 * BATCH * 12 * 32]
    found = {
        (f.region, f.phase): sum(g.times("none") for g in big if (g.region, g.phase) == (f.region, f.phase))
        for f in big
    }
    # The embedding's lookup; two sums per layer and pass; the gradient of the head's input.
    assert {key: times for key, times in found.items() if times} == {
        ("first", "forward"): 1,
        ("layers", "forward"): 6,
        ("layers", "backward"): 6,
        ("last", "backward"): 1,
    }


@pytest.mark.parametrize("name", ["moe_one_hot", "moe_ragged"])
def test_experts_exchange_tokens(name):
    model = model_of(name)
    place = placed(model, expert=2, batch_shards=4)
    found = {
        (flow.phase, remat): flow.times(remat)
        for flow in place.flows
        for remat in ("none", "full")
        if flow.kind == "all_to_all"
    }
    # Two layers, in and out; the router exchanges nothing.
    assert found["forward", "none"] == found["backward", "none"] == 4
    assert found["backward", "full"] > 4


# As the layout has it.


@pytest.mark.parametrize("name", ["llama_unrolled", "moe_one_hot", "t5", "resnet", "lstm"])
def test_memory_is_that_of_step_bytes(name):
    traced, state = traced_model(name)
    model = TracedModel(traced, state, CLUSTER, remats=("none", "full"))
    space = Space(model, CLUSTER, forbid=("optimizer_sharding",))
    checked = 0
    for inner in space.inner_meshes():
        place = model.place(inner)
        if isinstance(place, str):
            continue
        cols = space.columns(place)
        for i in range(0, len(cols), max(3, len(cols) // 2)):
            remat, parts = model.costs.remats[cols.remat[i]], int(cols.microbatches[i])
            plan = space.plan(place, cols, i)
            exact = step_bytes(model.layout.on(plan.mesh, plan.preset), state, remat=remat, microbatches=parts)
            found = memory_parts(model, place, cols.take(i))
            for part in ("params", "gradients", "optimizer"):
                assert int(found[part][0]) == getattr(exact, part), (plan, part)
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", ["llama_scanned", "moe_one_hot", "vit_conv", "mlp"])
def test_legal_meshes_are_those_that_the_layout_accepts(name):
    model = model_of(name)
    space = Space(model, CLUSTER)
    inners = space.inner_meshes()
    legal = {
        str(inner.mesh(fsdp)) + str(inner.sequence)
        for inner in inners
        if not isinstance(model.place(inner), str)
        for fsdp in model.place(inner).fsdp_sizes
    }
    expected = set()
    layout = make_layout(model.layout.traced, MeshShape())
    for sizes in itertools.product((1, 2, 4, 8), repeat=5):
        mesh = MeshShape(**dict(zip(("data", "fsdp", "expert", "context", "tensor"), sizes, strict=True)))
        if mesh.size != 8 or BATCH % mesh.batch_shards or (mesh.expert > 1 and not model.has_experts):
            continue
        for sequence in (False, True)[: 1 + (mesh.tensor > 1)]:
            inner = Inner(mesh.tensor, mesh.context, mesh.expert, sequence, mesh.data * mesh.fsdp)
            try:
                found = layout.on(mesh, inner.preset(mesh.fsdp))
            except PlanError:
                continue
            if found.assignment.spill or not sequence:
                expected.add(str(mesh) + str(sequence))
    assert legal == expected


def test_constraints_are_kept_and_nonsense_is_refused():
    model = model_of("llama_scanned")
    space = Space(model, CLUSTER, fix={"tensor": 2, "remat": "full", "fsdp": 2}, forbid=("context", "sequence"))
    for inner in space.inner_meshes():
        assert (inner.tensor, inner.context, inner.sequence) == (2, 1, False)
        cols = space.columns(placed(model, **dataclasses.asdict(inner)))
        assert len(cols)
        for i in range(len(cols)):
            plan = space.plan(model.place(inner), cols, i)
            assert (plan.mesh.fsdp, plan.remat) == (2, "full")
    with pytest.raises(ValueError, match="no choice called 'tensors'"):
        Space(model, CLUSTER, fix={"tensors": 2})
    with pytest.raises(PlanError, match="do not divide the 8"):
        Space(model, CLUSTER, fix={"tensor": 3})
    with pytest.raises(ValueError, match="both fixed and forbidden"):
        Space(model, CLUSTER, fix={"tensor": 2}, forbid=("tensor",))
    with pytest.raises(PlanError, match="stage"):
        Space(model, CLUSTER, fix={"stage": 2})


def test_keys_beyond_their_heads_are_whole_and_queries_are_split():
    """Four heads of keys on tensor=8: queries split inside their groups."""
    model = model_of("llama_scanned")
    place = placed(model, tensor=8)
    assert place.beyond.any()
    spread, whole = (model.costs.seconds(placed(model, **s), columns()).total for s in ({"tensor": 4}, {"tensor": 8}))
    assert np.isfinite(spread).all()
    assert np.isfinite(whole).all()


def test_mfu_of_the_floor_is_below_one():
    model = model_of("llama_scanned")
    floor = model.costs.floor(8)
    assert 0 < model.costs.mfu(floor, 8) <= 1
    assert math.isclose(model.costs.floor(16), floor / 2)


# As XLA runs them.


@pytest.mark.parametrize("causal, slowest", [(True, 2 - 1 / 4), (False, 1.0)])
def test_the_last_part_of_a_causal_sequence_takes_longest(causal, slowest):
    q = (("batch",), ("length",))
    op = dataclasses.replace(
        one_product().ops[0], kind="attention", axes=("batch", "length"), contracted=(), causal=causal, m=0, n=0, k=0
    )
    op = dataclasses.replace(op, flops=10**13, reads=(Array(2, q, False),), writes=())
    place = by_hand()
    rows = np.zeros((2, len(AXES)), bool)
    rows[1, AXES.index(CONTEXT)] = True
    place = dataclasses.replace(
        place, context=4, rows=rows, spill=np.zeros_like(rows), beyond=np.zeros(2, bool), groups=np.zeros(2, bool)
    )
    work = Workload((op,), {"batch": 8, "length": 4096})
    seconds = [
        CostModel(CLUSTER, {"none": work}, efficiency=Efficiency(contiguous=c, launch_seconds=(("gpu", 0.0),))).seconds(
            place, columns()
        )
        for c in (0.0, 1.0)
    ]
    np.testing.assert_allclose(seconds[1].compute, slowest * seconds[0].compute, rtol=1e-12)


def test_own_experts_make_hidden_values_again_and_keep_none():
    found = load_problem(tiny("mixtral-8x7b"), seq_len=16, global_batch=8)
    model = TracedModel(found.traced, found.opt_state, CLUSTER)
    place = placed(model, expert=2, batch_shards=4)
    ops = model.costs.ops[model.costs.remats.index("none")]
    sizes = np.array([{"expert": 2.0, "fsdp": 4.0}.get(axis, 1.0) for axis in AXES])
    plain = dict(half_size=0.0, half_depth=0.0, stack_traffic=1.0)
    other, own = (
        ops.on(CLUSTER, Efficiency(**plain, own_experts=x, room_for_all=x)).seconds(place, sizes, np.ones(1))
        for x in (0.0, 1.0)
    )
    ragged, stacks = ops.kind_n == "ragged", ops.kind_n == "stack"
    # Nine products of a gated expert, forward and backward, and up and gate once more.
    np.testing.assert_allclose(own.flops[0, ragged].sum(), 11 / 9 * other.flops[0, ragged].sum())
    assert own.bytes[0, stacks].sum() < other.bytes[0, stacks].sum()
    loops = ~ragged & ~stacks & ~ops.product_n
    assert own.bytes[0, loops].sum() > other.bytes[0, loops].sum()


def routed_ops(**changes):
    """A small mixture of experts, and its operations on four devices with neutral constants."""
    found = load_problem(tiny("mixtral-8x7b"), seq_len=16, global_batch=8)
    model = TracedModel(found.traced, found.opt_state, CLUSTER)
    ops = model.costs.ops[model.costs.remats.index("none")]
    return model, ops, ops.on(CLUSTER, Efficiency(half_size=0.0, half_depth=0.0, **changes))


def shares(**sizes):
    return np.array([float(sizes.get(axis, 1.0)) for axis in AXES])


def test_sorting_by_experts_moves_its_share_of_bytes_and_products_all():
    model, ops, _ = routed_ops()
    place = placed(model, batch_shards=4)
    whole, less = (
        ops.on(CLUSTER, Efficiency(routed_traffic=x)).seconds(place, shares(fsdp=4), np.ones(1)).bytes[0]
        for x in (1.0, 0.25)
    )
    sorts = ops.routed_n & ~ops.product_n & (ops.kind_n != "stack")
    assert whole[sorts].sum() > 0
    np.testing.assert_allclose(less[sorts], 0.25 * whole[sorts])
    np.testing.assert_allclose(less[~sorts], whole[~sorts])


def test_gathered_matrices_of_experts_are_copied_where_they_are_gathered():
    model, ops, copied = routed_ops(matrix_copies=3.0)
    place = placed(model, batch_shards=4)
    found = copied.seconds(place, shares(fsdp=4), np.ones(1))
    layers, sizes = 2, model.layout.traced.arg("params")
    matrices = [x for x in jax.tree.leaves(sizes) if len(x.shape) == 4]
    nbytes = sum(math.prod(x.shape) for x in matrices) * ops.array_bytes_a[ops.matrix_a][0]
    nbytes /= math.prod(matrices[0].shape[1:])  # of one number, as gradients are computed
    assert {x.shape[0] for x in matrices} == {layers}
    np.testing.assert_allclose(found.gathered.sum() * copied.bandwidth, 2 * 3 * nbytes, rtol=1e-6)
    costs = model.on(CLUSTER, Efficiency(half_size=0.0, half_depth=0.0, matrix_copies=3.0)).costs
    remat, sizes = costs.remats.index("none"), place.fsdp_sizes
    whole, split = (costs.seconds(place, columns(sizes.index(n), remat)).compute[0] for n in (1, 4))
    np.testing.assert_allclose(split - whole, found.gathered.sum(), rtol=1e-6)


def test_own_experts_sum_their_gradients_in_float32():
    model, ops, own = routed_ops(own_experts=1.0)
    apart = own.seconds(placed(model, expert=2, batch_shards=4), shares(expert=2, fsdp=4), np.ones(1))
    together = own.seconds(placed(model, batch_shards=8), shares(fsdp=8), np.ones(1))
    assert together.beside.sum() == 0
    half = (ops.matrix_a * ops.array_bytes_a * ops.trips_n[ops.array_op_a]).sum() / 2
    np.testing.assert_allclose(apart.beside.sum() * own.bandwidth, 10 * half, rtol=1e-6)


@pytest.mark.parametrize("kernels, exposed", [(1.0, 0.0), (0.0, 1.0)])
def test_collectives_hide_behind_kernels_only_where_they_have_a_stream_of_their_own(kernels, exposed):
    op = dataclasses.replace(one_product().ops[0], kind="ragged")
    place = by_hand(flows=(Flow("all_gather", ("tensor",), 1e6, (), "forward", True, False, {"": 1.0}),), tensor=8)
    efficiency = Efficiency(kernels_cover=kernels, overlap_slowdown=1.0, launch_seconds=(("gpu", 0.0),))
    work = Workload((op,), one_product().rows)
    costs = CostModel(CLUSTER, {"none": work}, efficiency=efficiency)
    found = costs.seconds(place, columns())
    assert found.exposed["tensor"][0] == pytest.approx(exposed * found.collectives["tensor"][0])
    assert found.collectives["tensor"][0] > 0


@pytest.mark.parametrize("phase, kind, waits", [("backward", "all_reduce", False), ("forward", "all_reduce", True)])
def test_sums_of_input_gradients_run_behind_the_weights_gradients(phase, kind, waits):
    flow = Flow(kind, ("tensor",), 1e3, (), phase, False, False, {"": 1.0})
    place = by_hand(flows=(flow,), tensor=8)
    op = dataclasses.replace(one_product().ops[0], phase=phase)
    costs = CostModel(
        CLUSTER,
        {"none": Workload((op,), one_product().rows)},
        efficiency=Efficiency(sums_behind_weights=1.0, overlap_slowdown=1.0, launch_seconds=(("gpu", 0.0),)),
    )
    found = costs.seconds(place, columns())
    assert found.collectives["tensor"][0] > 0
    assert (found.exposed["tensor"][0] > 0) == waits


def test_products_read_whole_what_sequence_parallelism_splits_between_blocks():
    model = model_of("llama_scanned")
    ops = model.costs.ops[model.costs.remats.index("none")]
    plain, sequence = (
        ops.seconds(
            placed(model, tensor=4, batch_shards=2, sequence=split), shares(tensor=4, fsdp=2), np.ones(1)
        ).bytes[0]
        for split in (False, True)
    )
    np.testing.assert_allclose(sequence[ops.product_n], plain[ops.product_n], rtol=1e-12)
    loops = np.isin(ops.kind_n, ("elementwise", "reduce"))
    assert sequence[loops].sum() < plain[loops].sum()


@pytest.mark.parametrize("kind, phase, waits", [("all_gather", "forward", 0), ("reduce_scatter", "backward", 0.86)])
def test_a_share_of_the_sums_of_gradients_is_waited_for(kind, phase, waits):
    flow = Flow(kind, (FSDP,), 1e6, (), phase, True, False, {"": 1.0}, waits=bool(waits))
    place = by_hand(flows=(flow,), batch_shards=8, fsdp_sizes=(8,))
    op = dataclasses.replace(one_product().ops[0], phase=phase)
    efficiency = Efficiency(sums_waited=0.86, overlap_slowdown=1.0)
    costs = CostModel(CLUSTER, {"none": Workload((op,), one_product().rows)}, efficiency=efficiency)
    found = costs.seconds(place, columns())
    assert found.collectives[FSDP][0] > 0
    np.testing.assert_allclose(found.exposed[FSDP], waits * found.collectives[FSDP])


@pytest.mark.parametrize(
    "constant, passes",
    [({"weight_casts": 1.0}, 4 + 2), ({"weight_copies": 3.0}, 2 * 3 * 2 * 2), ({"update_copies": 2.0}, 2 * 2 * 4)],
)
def test_own_weights_are_cast_and_copied(constant, passes):
    """Bytes per element of float32 parameters that compute in bfloat16, with two microbatches and ZeRO-1."""
    held = np.zeros((3, 3, 1))
    held[0, 1] = 4e6
    place = dataclasses.replace(by_hand(batch_shards=2), held=held)
    works = {"none": Workload((dataclasses.replace(one_product().ops[0], phase="backward"),), one_product().rows)}
    sharded = dataclasses.replace(columns(microbatches=2), variants=(Variant(optimizer_sharding=True),))
    without, with_ = (
        CostModel(CLUSTER, works, efficiency=Efficiency(**found), stored_width=4).seconds(place, sharded).compute[0]
        for found in ({}, constant)
    )
    np.testing.assert_allclose(with_ - without, 1e6 * passes / (0.85 * 2039e9), rtol=1e-9)
    as_stored = CostModel(CLUSTER, works, efficiency=Efficiency(weight_casts=1.0), stored_width=2)
    assert as_stored.seconds(place, sharded).compute[0] == without


def tensor_sums(name, **changes):
    """Bytes of the all-reduces over tensor of 4, by pass, largest first."""
    found = load_problem(dataclasses.replace(tiny(name), **changes), seq_len=16, global_batch=8)
    model = TracedModel(found.traced, found.opt_state, CLUSTER)
    place = placed(model, tensor=4, batch_shards=2)
    flows = [f for f in place.flows if f.axes == (TENSOR,) and f.kind == "all_reduce" and f.region == "layers"]
    return {
        p: [(float(np.max(f.bytes)), f.times("none")) for f in flows if f.phase == p] for p in ("forward", "backward")
    }


def test_a_routers_gradient_is_summed_in_its_own_width():
    found = tensor_sums("mixtral-8x7b")
    (narrow, _) = max(found["forward"])
    assert (2 * narrow, 2) in found["backward"]  # once per layer, float32 beside bfloat16
    # Queries' and keys' input, and what goes to experts.
    assert sum(times for nbytes, times in found["backward"] if nbytes == narrow) == 2 * 2


def test_sums_of_a_shared_expert_stand_beside_the_experts_own():
    found = tensor_sums("qwen1.5-moe-a2.7b")
    (narrow, _) = max(found["forward"])
    # Attention's input; up and gate of the shared expert apart; and what goes to experts.
    assert sum(times for nbytes, times in found["backward"] if nbytes == narrow) == 2 * 4


@pytest.mark.parametrize("vocab, sequence, sums", [(54, True, 2), (54, False, 1), (56, True, 1)])
def test_a_tied_table_that_tensor_does_not_split_is_summed_once_per_use(vocab, sequence, sums):
    config = dataclasses.replace(tiny("llama-3.2-1b"), vocab=vocab)
    found = load_problem(config, seq_len=16, global_batch=8)
    model = TracedModel(found.traced, found.opt_state, CLUSTER)
    place = placed(model, tensor=4, batch_shards=2, sequence=sequence)
    table = [f for f in place.flows if "data" in f.axes and f.region in ("first", "last")]
    elements = max(float(np.max(f.bytes)) for f in table) / 2
    assert elements == pytest.approx(sums * vocab * 32, rel=0.05)


@pytest.mark.parametrize(
    "name, shards, waiting", [("llama-3.2-1b", (8, 8), {"reduce_scatter"}), ("llama-3.2-1b", (8, 2), set())]
)
def test_sums_that_are_cut_into_shards_wait_and_all_reduces_hide(name, shards, waiting):
    found = load_problem(tiny(name), seq_len=16, global_batch=8)
    model = TracedModel(found.traced, found.opt_state, CLUSTER)
    batch, fsdp = shards
    place = placed(model, batch_shards=batch)
    i = place.fsdp_sizes.index(fsdp)
    sums = [f for f in place.flows if f.hides and f.kind != "all_gather" and np.broadcast_to(f.bytes, 4)[i] > 1e3]
    assert {f.kind for f in sums if f.waits} == waiting
    assert any(not f.waits for f in sums)  # what is not split over fsdp


def test_sums_of_experts_matrices_wait():
    found = load_problem(tiny("mixtral-8x7b"), seq_len=16, global_batch=8)
    model = TracedModel(found.traced, found.opt_state, CLUSTER)
    place = placed(model, batch_shards=8)
    i = place.fsdp_sizes.index(2)
    sums = [f for f in place.flows if f.kind == "all_reduce" and f.hides and np.broadcast_to(f.bytes, 4)[i] > 0]
    waits = sum(float(np.broadcast_to(f.bytes, 4)[i]) * f.times("none") for f in sums if f.waits)
    matrices = sum(math.prod(x.shape) for x in jax.tree.leaves(model.layout.traced.arg("params")) if len(x.shape) == 4)
    assert waits == pytest.approx(matrices * 2, rel=1e-6)
    assert any(not f.waits for f in sums)
