"""What is read from compiled programs, against what the models and plans say: real text of XLA for TPUs and GPUs."""

import re
from collections import Counter

import hlo_programs as make
import numpy as np
import pytest

from search.hlo import collectives, flops, parse, products
from search.replica_groups import axes_of, device_numbers, factor, parse_groups, steps_of
from search.workload import workload
from sharding_rules import MeshShape

LLAMAS = [name for name, case in make.CASES.items() if case.model != "attention"]
KERNELS = [name for name, case in make.CASES.items() if case.model == "attention"]
FSDP = [name for name in LLAMAS if make.CASES[name].preset == "fsdp" and make.CASES[name].pinned]


def module_of(name, _cache={}):  # noqa: B006
    if name not in _cache:
        _cache[name] = parse(make.read_case(name))
    return _cache[name]


def found_in(name):
    return collectives(module_of(name), MeshShape.parse(make.CASES[name].mesh))


def sizes_of(name):
    """Elements of the matrices of one layer, and of the embedding and the head."""
    shapes = {**make.SMALL}
    embed, head = shapes["embed"], shapes["head_dim"]
    layer = embed * head * 2 * (shapes["heads"] + shapes["kv_heads"]) + 3 * embed * shapes["mlp"]
    return layer, shapes["vocab"] * embed


@pytest.mark.parametrize("name", LLAMAS)
def test_flops_are_those_of_the_jaxpr(name):
    case = make.CASES[name]
    counted = workload(make.layout_of(case).traced, remat=case.remat).product_flops * case.microbatches
    assert flops(module_of(name)) == counted / MeshShape.parse(case.mesh).size


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_counted_from_their_shapes(name):
    case = make.CASES[name]
    tokens, embed, heads, kv_heads, head_dim = case.batch * case.length, 512, 8, 4, 128
    into = 2 * tokens * embed * (heads + 2 * kv_heads) * head_dim
    out = 2 * tokens * heads * head_dim * embed
    scores = 2 * case.batch * heads * case.length**2 * head_dim
    # Two products forward; dq and dkv take 3 and 4, in one kernel on GPUs. Half of the scores are computed.
    kernels = (2 + 3 + 4) * scores / 2
    # No gradient by the batch.
    assert flops(module_of(name)) == (2 * into + 3 * out + kernels) / 8
    made = [p for op in module_of(name).entry.ops for p in products(module_of(name), op)]
    assert sum(p.flops for p in made if p.kernel == "attention") == kernels / 8


def test_the_last_queries_of_a_context_see_most_keys():
    made = [p for op in module_of("v5e_splash").entry.ops for p in products(module_of("v5e_splash"), op) if p.kernel]
    assert {p.slowest for p in made} == {1.5}  # 3/4 of the scores instead of 1/2


@pytest.mark.parametrize("name", make.CASES)
def test_every_loop_has_a_trip_count(name):
    module, case = module_of(name), make.CASES[name]
    assert not module.unknown_loops()
    trips = {module.trips(loop) for loop in module.loops}
    if case.model == "scanned":
        assert make.SMALL["layers"] in trips
    else:
        assert not trips
    if case.microbatches > 1:
        assert trips == {make.SMALL["layers"], case.microbatches}
        assert max(module.executions().values()) == make.SMALL["layers"] * case.microbatches
    if case.cluster.startswith("v5"):
        assert "known_trip_count" not in make.read_case(name)


def test_windowed_products_move_a_part_per_iteration():
    """Each loop passes its part on in 16 devices' turns, less the first: four permutes in each of four iterations."""
    module = module_of("v5e_windowed")
    inner = [loop for loop in module.loops if module.executions()[loop.computation] == make.SMALL["layers"]]
    assert len(inner) >= 8
    assert {module.trips(loop) for loop in inner} == {4}
    for loop in inner:
        body = module.computations[loop.callees("body")[0]]
        starts = [op for op in body.ops if op.opcode == "collective-permute-start"]
        assert len(starts) * module.trips(loop) == MeshShape.parse("fsdp=16").size


def test_an_all_gather_that_loops_carry_along_is_counted_once():
    module = module_of("v5e_windowed")
    carried = [
        exchange
        for name in module.executions()
        for exchange in module.exchanges(module.computations[name]).values()
        if exchange.role == "carry"
    ]
    assert carried
    gathers = [c for c in found_in("v5e_windowed") if c.kind == "all_gather" and c.asynchronous]
    assert [c.times for c in gathers] == [make.SMALL["layers"]]


@pytest.mark.parametrize("name", LLAMAS)
def test_asynchronous_collectives_have_one_start_and_one_done(name):
    module, text = module_of(name), make.read_case(name)
    roles = Counter(exchange.role for c in module.computations.values() for exchange in module.exchanges(c).values())
    assert roles["start"] == roles["done"]
    if name.startswith("v5"):
        assert roles["start"] >= text.count('custom_call_target="AsyncCollectiveStart"')


def elements_of(c):
    return sum(int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\[([\d,]+)\]", c.shapes))


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_sums_every_gradient_once(name):
    case = make.CASES[name]
    layer, table = sizes_of(name)
    summed = [c for c in found_in(name) if c.kind in ("all_reduce", "reduce_scatter") and c.bytes > 2**16]
    assert {c.axes for c in summed} - {("data",)} == {("fsdp",)}
    gradients = 2 * case.microbatches * (make.SMALL["layers"] * layer + 2 * table)  # bfloat16
    found = sum(c.bytes * c.times for c in summed if c.axes == ("fsdp",))
    assert found == pytest.approx(gradients, rel=0.01)  # Gains of norms are among them, or on their own.


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_gathers_weights_of_layers_twice_and_tables_once(name):
    """XLA for GPUs gathers some in float32, and the tables for every microbatch: elements count, not bytes."""
    case = make.CASES[name]
    layer, table = sizes_of(name)
    layers = make.SMALL["layers"]
    gathered = [c for c in found_in(name) if c.kind == "all_gather" and c.bytes > 2**16]
    assert {c.axes for c in gathered} == {("fsdp",)}
    found = sum(elements_of(c) * c.times for c in gathered)
    if case.model == "unrolled":  # It keeps what it has gathered where the next use is near.
        assert layers * layer + 2 * table <= found <= 2 * layers * layer + 4 * table
    else:
        tables = [2 * table, 2 * table * case.microbatches]
        assert found - 2 * layers * layer * case.microbatches in tables


@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_sequence_parallelism_gathers_and_scatters_over_tensor(kind):
    found = found_in(f"{kind}_sequence")
    axes = {c.axes for c in found if c.bytes > 2**16}
    assert {("tensor",), ("fsdp",)} <= axes
    case = make.CASES[f"{kind}_sequence"]
    activations = 2 * case.batch * case.length * make.SMALL["embed"] // 2  # fsdp=2 splits the batch.
    moved = [c for c in found if c.axes == ("tensor",) and c.kind in ("all_gather", "reduce_scatter")]
    assert moved
    assert activations in {c.bytes for c in moved}
    assert {(c.sizes, c.strides) for c in found if c.axes == ("fsdp",) and c.kind != "permute"} == {((2,), (4,))}


@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_scanned_and_unrolled_layers_sum_the_same_bytes(kind):
    def summed(name):
        kinds = ("all_reduce", "reduce_scatter")
        return sum(c.bytes * c.times for c in found_in(name) if c.kind in kinds and c.bytes > 2**16)

    assert summed(f"{kind}_fsdp") == pytest.approx(summed(f"{kind}_fsdp_unrolled"), rel=0.001)


def test_sums_between_slices_are_sends_to_the_hosts():
    layer, table = sizes_of("v5e_slices")
    across = [c for c in found_in("v5e_slices") if c.axes == ("data",)]
    assert {(c.kind, c.sizes, c.strides, c.asynchronous) for c in across} == {("all_reduce", (2,), (8,), True)}
    # Every device has an eighth of the gradients, in bfloat16; gains of norms are small.
    gradients = 2 * (make.SMALL["layers"] * layer + 2 * table) / 8
    assert sum(c.bytes * c.times for c in across) == pytest.approx(gradients, rel=0.01)


def test_a_sum_over_three_torus_dimensions_is_the_all_reduce_that_runs():
    """Each device keeps a 64th of the gradients, and yet all of them are summed on all devices."""
    text = make.read_case("v5p_fsdp64")
    found = [c for c in found_in("v5p_fsdp64") if c.bytes > 2**16]
    assert {(c.axes, c.size) for c in found} == {(("fsdp",), 64)}
    assert " dynamic-slice(" in text
    assert {c.kind for c in found} == {"all_gather", "all_reduce"}
    embeddings = 2 * make.SMALL["vocab"] * make.SMALL["embed"] * make.CASES["v5p_fsdp64"].wide
    assert max(c.bytes for c in found if c.kind == "all_reduce" and c.times == 1) >= 2 * embeddings


def test_ops_know_their_source_lines():
    for name in ("v5e_fsdp", "h100_fsdp"):
        dots = [op for c in module_of(name).computations.values() for op in c.ops if "/dot_general" in op.op_name]
        assert dots
        functions = {frame.function for op in dots for frame in op.frames}
        assert {"block", "forward_loss"} <= functions
        assert any(op.source_file.endswith("llama.py") and op.source_line > 1 for op in dots)


def test_kernels_with_newlines_do_not_end_a_computation():
    text = make.read_case("v5e_splash")
    assert "\n}}, metadata=" in text
    module = module_of("v5e_splash")
    assert sum("splash" in op.name for op in module.entry.ops if op.opcode == "custom-call") == 3
    assert module.entry.root.opcode == "tuple"


def test_tuples_layouts_and_memory_spaces_are_read():
    shapes = [s for c in module_of("v5e_fsdp").computations.values() for op in c.ops for s in op.shapes]
    assert {0, 1} <= {s.memory_space for s in shapes}
    assert {s.memory_space for c in module_of("h100_fsdp").computations.values() for o in c.ops for s in o.shapes} == {
        0
    }


LOOP = """HloModule m, num_partitions=8

%fused (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%b, %a), direction=GT
}

%inner_cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %f = pred[] fusion(%i, %n), kind=kLoop, calls=%fused
}

%inner (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%two, %i)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

%outer_cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %zero = s32[] constant(0)
  ROOT %c = pred[] compare(%i, %zero), direction=GE
}

%outer (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %start = s32[] constant(0)
  %carry = (s32[], s32[]) tuple(%start, %n)
  %w = (s32[], s32[]) while(%carry), condition=%inner_cond, body=%inner
  %next = s32[] subtract(%i, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

ENTRY %main (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %five = s32[] constant(5)
  %seven = s32[] constant(7)
  %carry = (s32[], s32[]) tuple(%five, %seven)
  %w = (s32[], s32[]) while(%carry), condition=%outer_cond, body=%outer
  ROOT %r = s32[] get-tuple-element(%w), index=0
}
"""


def test_trips_follow_bounds_through_loops_and_fusions():
    """Outside from 5 down to 0; inside 0, 2, 4, 6 below a 7 that comes in from outside."""
    module = parse(LOOP)
    assert {loop.computation: module.trips(loop) for loop in module.loops} == {"outer": 4, "main": 6}
    assert module.executions()["inner"] == 24


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "ROOT %t = (s32[], s32[]) tuple(%next, %n)\n}\n\n%outer_cond",
            "ROOT %t = (s32[], s32[]) tuple(%next, %i)\n}\n\n%outer_cond",
        ),
        ("%five = s32[] constant(5)", "%five = s32[] copy(%x)"),
    ],
)
def test_a_loop_that_depends_on_data_has_no_trip_count(old, new):
    assert old in LOOP
    module = parse(LOOP.replace(old, new))
    assert len(module.unknown_loops()) == 1


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]], ("data", "fsdp")),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]], ("fsdp",)),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            ("data",),
        ),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]], ("data",)),
        ("", [[0, 1, 2, 3, 4, 5, 6, 7]], ("data", "fsdp", "tensor")),
    ],
)
def test_groups_in_all_spellings_are_mesh_axes(text, groups, axes):
    found = parse_groups(f"channel_id=1, {text}, use_global_device_ids=true", 8)
    assert found.tolist() == groups
    assert axes_of(found, {"data": 2, "fsdp": 2, "tensor": 2}) == axes


def test_groups_are_sizes_and_strides_of_device_numbers():
    assert factor([0, 2, 4, 6]) == ((4,), (2,))
    assert factor([0, 1, 8, 9, 16, 17]) == ((3, 2), (8, 1))
    assert factor([3]) == ((1,), (1,))
    sizes = {"data": 2, "tensor": 4}
    devices = device_numbers(sizes, ("tensor", "data"))  # Neighbours in data are next to each other.
    groups = parse_groups("replica_groups=[2,4]<=[8]", 8)
    assert factor(devices[groups[0]].tolist()) == ((4,), (2,))
    ring = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4]])
    assert steps_of(ring, sizes, np.arange(8)) == ((4,), (1,))
    assert steps_of(ring, sizes, devices) == ((4,), (2,))


def test_a_text_that_is_cut_off_is_an_error():
    text = make.read_case("h100_triton")
    with pytest.raises(ValueError, match="cut off"):
        parse(text[: text.index(" custom-call(") + 20])
    with pytest.raises(ValueError, match="no entry"):
        parse("HloModule empty\n")


def test_a_program_of_more_devices_than_the_mesh_is_an_error():
    with pytest.raises(ValueError, match="has 4 devices"):
        collectives(module_of("v5e_fsdp"), MeshShape(fsdp=4))


MASKED = """HloModule m, num_partitions=1

%masked (a: bf16[512,32], b: bf16[512,16], m: pred[4,512]) -> bf16[4,32,16] {
  %a = bf16[512,32] parameter(0)
  %b = bf16[512,16] parameter(1)
  %m = pred[4,512] parameter(2)
  %x = bf16[4,512,32] broadcast(%a), dimensions={1,2}
  %y = bf16[4,512,16] broadcast(%b), dimensions={1,2}
  ROOT %c = bf16[4,32,16] convolution(%x, %y), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf
}

ENTRY %main (a: bf16[512,32], b: bf16[512,16], m: pred[4,512]) -> bf16[4,32,16] {
  %a = bf16[512,32] parameter(0)
  %b = bf16[512,16] parameter(1)
  %m = pred[4,512] parameter(2)
  ROOT %f = bf16[4,32,16] fusion(%a, %b, %m), kind=kOutput, calls=%masked, backend_config={CONFIG}
}
"""


def test_groups_whose_masked_blocks_are_skipped_are_a_ragged_product():
    # As XLA:TPU writes the gradient of a ragged product's weights: every row belongs to one of four groups.
    every = parse(MASKED.replace("CONFIG", '"mask_aggregator_config":{}'))
    skipped = '"mask_aggregator_config":{"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_ITERATION_INDICES"}'
    once = parse(MASKED.replace("CONFIG", skipped))
    assert flops(every) == 4 * 2 * 512 * 32 * 16
    assert flops(once) == 2 * 512 * 32 * 16
    assert [made.kernel for made in products(once, once.entry.root)] == ["ragged"]
