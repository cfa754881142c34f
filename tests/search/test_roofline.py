"""Seconds of compiled programs: small programs by hand, and real ones against what their parts must add up to."""

import dataclasses
import math

import hlo_programs as make
import pytest

from search.cluster import parse_cluster
from search.collectives import collective_seconds
from search.efficiency import Efficiency
from search.hlo import flops, parse
from search.roofline import MEMORY_SHARE, PRODUCT_SHARE, step_seconds
from sharding_rules import MeshShape

TPU = parse_cluster("v5e:2x4")
BANDWIDTH = MEMORY_SHARE * TPU.accelerator.memory_bytes_per_second
PEAK = PRODUCT_SHARE * TPU.accelerator.flops("bfloat16")
SIZE = 4096
ARRAY = 2 * SIZE**2
READ = ARRAY / BANDWIDTH
DOT = 2 * SIZE**3 / PEAK
SUM = float(collective_seconds(TPU, "all_reduce", ARRAY, 8, 1))
A = f"bf16[{SIZE},{SIZE}]{{1,0}}"
CHIP = f"bf16[{SIZE},{SIZE}]{{1,0:S(1)}}"
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add"


def time_of(body, *more, cluster=TPU, mesh=MeshShape(fsdp=8)):  # noqa: B008
    """A step whose entry has these ops after its parameters a and b."""
    lines = [f"%a = {A} parameter(0)", f"%b = {A} parameter(1)", *body]
    entry = "\n".join(f"  {line}" for line in lines)
    others = "".join(
        f"%{name} (p: {A}) -> {A} {{\n" + "\n".join(f"  {x}" for x in ops) + "\n}\n\n" for name, ops in more
    )
    head = "HloModule m, is_scheduled=true, num_partitions=8"
    text = f"{head}\n\n{others}ENTRY %main (a: {A}, b: {A}) -> {A} {{\n{entry}\n}}\n"
    return step_seconds(parse(text), cluster, mesh)


def dot(name="c", a="a", b="b"):
    return f"%{name} = {A} dot(%{a}, %{b}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"


def test_a_product_takes_the_longer_of_flops_and_bytes():
    assert time_of([dot()]).seconds == pytest.approx(max(DOT, 3 * READ))
    assert DOT > 3 * READ
    found = time_of([f"%c = {A} add(%a, %b)"])
    assert found.seconds == pytest.approx(3 * READ)
    assert found.compute_seconds == {"memory": pytest.approx(3 * READ)}
    assert found.bytes == 3 * ARRAY


def test_float32_at_highest_precision_takes_six_passes():
    found = time_of([dot().replace("bf16", "f32") + ", operand_precision={highest,highest}"])
    assert found.seconds == pytest.approx(DOT)  # The operands are bfloat16.
    wide = [f"%x = {A.replace('bf16', 'f32')} convert(%a)", dot(a="x", b="x") + ", operand_precision={highest,highest}"]
    assert time_of(wide).compute_seconds["product"] == pytest.approx(6 * DOT)


def test_a_blocking_collective_stops_compute():
    found = time_of([dot(), f"%d = {A} all-reduce(%c), {GROUPS}", dot("e")])
    assert found.seconds == pytest.approx(2 * DOT + SUM)
    assert found.exposed_seconds == {"fsdp": pytest.approx(SUM)}
    assert found.hidden_seconds == 0


def test_an_asynchronous_collective_runs_beside_compute():
    start, done = f"%s = {A} all-reduce-start(%a), {GROUPS}", f"%d = {A} all-reduce-done(%s)"
    count = math.ceil(SUM / DOT)
    hidden = time_of([start, *(dot(f"c{i}") for i in range(count)), done])
    assert hidden.seconds == pytest.approx(count * DOT)
    assert hidden.hidden_seconds == pytest.approx(SUM)
    short = time_of([start, dot(), done])
    assert short.seconds == pytest.approx(max(SUM, DOT))
    assert short.exposed_seconds["fsdp"] + short.hidden_seconds == pytest.approx(SUM)


def test_two_collectives_share_the_wire():
    lines = [f"%s{i} = {A} all-reduce-start(%a), {GROUPS}" for i in range(2)]
    lines += [f"%d{i} = {A} all-reduce-done(%s{i})" for i in range(2)]
    assert time_of(lines).seconds == pytest.approx(2 * SUM)


def permutes(*shifts, size=8):
    lines = []
    for i, shift in enumerate(shifts):
        pairs = ",".join(f"{{{at},{(at + shift) % size}}}" for at in range(size))
        state = f"({A}, {A}, u32[]{{:S(2)}}, u32[]{{:S(2)}})"
        lines.append(f"%s{i} = {state} collective-permute-start(%a), source_target_pairs={{{pairs}}}")
    return [*lines, *(f"%d{i} = {A} collective-permute-done(%s{i})" for i in range(len(shifts)))]


def test_permutes_in_opposite_directions_use_different_links_of_a_torus():
    one = time_of(permutes(1)).seconds
    assert time_of(permutes(1, 1)).seconds == pytest.approx(2 * one)
    assert time_of(permutes(1, -1)).seconds == pytest.approx(one)
    summed = [*permutes(1, -1)[:2], f"%e = {A} all-reduce(%b), {GROUPS}", *permutes(1, -1)[2:]]
    assert time_of(summed).seconds == pytest.approx(one + SUM)
    gpu = parse_cluster("8xH100")
    both, alone = (time_of(permutes(*shifts), cluster=gpu).seconds for shifts in ((1, -1), (1,)))
    assert both == pytest.approx(2 * alone)


def test_what_goes_between_slices_does_not_hold_up_the_links_inside_them():
    slices = parse_cluster("2*v5e:2x4")
    said = '_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"'
    attributes = f"is_host_transfer=true, frontend_attributes={{{said}}}"
    send = [
        "%t = token[] after-all()",
        f"%s = ({A}, u32[]{{:S(2)}}, token[]) send(%a, %t), channel_id=2, {attributes}",
        f"%r = ({A}, u32[]{{:S(2)}}, token[]) recv(%t), channel_id=1, {attributes}",
    ]
    done = f"%d = ({A}, token[]) recv-done(%r), channel_id=1"
    inside = f"%e = {A} all-reduce(%b), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add"
    mesh = MeshShape(data=2, fsdp=8)
    across = time_of([*send, done], cluster=slices, mesh=mesh)
    assert set(across.wire_seconds) == {"network"}
    both = time_of([*send, inside, done], cluster=slices, mesh=mesh)
    assert both.seconds == pytest.approx(max(across.seconds, SUM))


def test_buffers_on_the_chip_cost_nothing_on_tpus():
    assert time_of([f"%c = {CHIP} add(%a, %b)"]).seconds == pytest.approx(2 * READ)
    gpu = parse_cluster("8xH100")
    read = ARRAY / (MEMORY_SHARE * gpu.accelerator.memory_bytes_per_second)
    assert time_of([f"%c = {CHIP} add(%a, %b)"], cluster=gpu).seconds == pytest.approx(3 * read)


def test_products_attain_on_gpus_what_was_fitted_for_their_sizes():
    gpu = parse_cluster("8xH100")
    attained = Efficiency.for_accelerator(gpu.accelerator).product(SIZE, SIZE, SIZE)
    assert attained < PRODUCT_SHARE
    found = time_of([dot()], cluster=gpu)
    assert found.compute_seconds["product"] == pytest.approx(
        found.flops / (attained * gpu.accelerator.flops("bfloat16"))
    )


def test_a_prefetch_runs_beside_products_but_not_beside_traffic():
    start = f"%s = ({CHIP}, {A}, u32[]{{:S(2)}}) copy-start(%a)"
    done = f"%d = {CHIP} copy-done(%s)"
    assert time_of([start, dot(), done]).seconds == pytest.approx(max(DOT, 4 * READ))
    assert time_of([start, f"%c = {A} add(%a, %b)", done]).seconds == pytest.approx(4 * READ)
    alone = time_of([start, done])
    assert alone.seconds == pytest.approx(READ)
    assert alone.compute_seconds == {"prefetch": pytest.approx(READ)}


def test_fusions_pay_for_what_they_touch():
    one = f"bf16[1,{SIZE}]{{1,0}}"
    body = [
        f"%p = {A} parameter(0)",
        "%i = s32[] parameter(1)",
        "%z = s32[] constant(0)",
        f"%row = {one} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={{1,{SIZE}}}",
        f"%twice = {one} add(%row, %row)",
        f"ROOT %u = {A} dynamic-update-slice(%p, %twice, %i, %z)",
    ]
    found = time_of(["%n = s32[] constant(3)", f"%f = {A} fusion(%a, %n), kind=kLoop, calls=%body"], ("body", body))
    assert found.bytes == 2 * (2 * SIZE) + 4  # The row that is read, the row that is written, and the number.


def test_loops_take_their_iterations():
    condition = [
        f"%p = (s32[], {A}) parameter(0)",
        "%i = s32[] get-tuple-element(%p), index=0",
        "%n = s32[] constant(7)",
        "ROOT %c = pred[] compare(%i, %n), direction=LT",
    ]
    body = [
        f"%p = (s32[], {A}) parameter(0)",
        "%i = s32[] get-tuple-element(%p), index=0",
        f"%x = {A} get-tuple-element(%p), index=1",
        dot("y", "x", "x"),
        f"%z = {A} all-reduce(%y), {GROUPS}",
        "%one = s32[]{:S(6)} constant(1)",
        "%j = s32[]{:S(6)} add(%i, %one)",
        f"ROOT %t = (s32[], {A}) tuple(%j, %z)",
    ]
    lines = ["%zero = s32[] constant(0)", f"%init = (s32[], {A}) tuple(%zero, %a)"]
    lines += [f"%w = (s32[], {A}) while(%init), condition=%cond, body=%body"]
    found = time_of(lines, ("cond", condition), ("body", body))
    assert found.seconds == pytest.approx(7 * (DOT + SUM), rel=1e-3)
    assert found.exposed_seconds["fsdp"] == pytest.approx(7 * SUM)
    assert found.flops == 7 * 2 * SIZE**3
    assert found.slowest[0].times == 7


def test_unknown_calls_and_loops_are_listed():
    found = time_of([f'%c = {A} custom-call(%a), custom_call_target="mystery"'])
    assert found.seconds == pytest.approx(2 * READ)
    assert len(found.unknown) == 1
    assert "mystery" in found.unknown[0]


@pytest.mark.parametrize("name", make.CASES)
def test_real_programs_add_up(name):
    case = make.CASES[name]
    module, cluster = parse(make.read_case(name)), parse_cluster(case.cluster)
    found = step_seconds(module, cluster, MeshShape.parse(case.mesh))
    parts = sum(found.compute_seconds.values()) + sum(found.exposed_seconds.values())
    assert found.seconds == pytest.approx(parts)
    assert found.flops == flops(module)
    assert found.label == "compiled"
    assert not found.unknown
    bound = max(
        found.flops / cluster.accelerator.flops("bfloat16"), found.bytes / cluster.accelerator.memory_bytes_per_second
    )
    assert found.seconds >= bound
    sent = sum(c.seconds * c.collective.times for c in found.collectives)
    assert sum(found.exposed_seconds.values()) + found.hidden_seconds >= sent * (1 - 1e-9)
    busy = found.wire_seconds
    assert found.seconds >= max(busy.values()) * (1 - 1e-9)
    assert max(busy.values()) <= sent * (1 + 1e-9)
    assert sum(busy.values()) >= sent * (1 - 1e-9)
    assert {op.source for op in found.slowest} - {""}


@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_scanned_and_unrolled_layers_compute_as_long(kind):
    scanned, unrolled = (
        step_seconds(parse(make.read_case(name)), parse_cluster(make.CASES[name].cluster), MeshShape(fsdp=8))
        for name in (f"{kind}_fsdp", f"{kind}_fsdp_unrolled")
    )
    assert scanned.compute_seconds["product"] / scanned.flops == pytest.approx(
        unrolled.compute_seconds["product"] / unrolled.flops, rel=0.05
    )


def test_faster_links_shorten_only_the_waiting():
    name = "v5e_sequence"
    module, mesh = parse(make.read_case(name)), MeshShape.parse(make.CASES[name].mesh)
    torus = TPU.torus
    fast = dataclasses.replace(TPU, torus=dataclasses.replace(torus, bytes_per_second=1e3 * torus.bytes_per_second))
    slow, quick = step_seconds(module, TPU, mesh), step_seconds(module, fast, mesh)
    assert quick.seconds < slow.seconds
    assert quick.compute_seconds["product"] == pytest.approx(slow.compute_seconds["product"])


def test_the_order_of_axes_decides_which_links_they_use():
    """Tensor over distant devices of two nodes takes longer than over neighbours."""
    cluster = dataclasses.replace(parse_cluster("2x4xH100"))
    module, mesh = parse(make.read_case("h100_sequence")), MeshShape(fsdp=2, tensor=4)
    near = step_seconds(module, cluster, mesh)
    far = step_seconds(module, cluster, mesh, order=("tensor", "fsdp"))
    assert far.exposed_seconds["tensor"] > near.exposed_seconds["tensor"]
