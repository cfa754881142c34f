"""A compile held against its plan, on stored programs of real compilers: bytes, traffic, warnings, buffers."""

import dataclasses
import functools
import json

import jax
import optax
import pytest
from hlo_programs import CASES, model_of, read_case

from search import Plan, TracedModel, hlo, parse_cluster
from search.compiler import Compiled
from search.knobs import changed
from search.verify import (
    Traffic,
    Verification,
    fitting_changes,
    largest_buffers,
    memory_bytes,
    operation,
    partitioner_warnings,
    sent_bytes,
    traffic,
    unplanned,
    verification,
)
from sharding_rules import MeshShape, trace

GIB = 2**30
# As libtpu writes it.
REPORT = """Memory Space: default (color=0)
Total bytes: 700000000 (667.57MiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   12.00MiB( 20%);   12.00MiB;      5554176;                2; 2xbf16[8,2048,4864]

Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)

Memory Space: host (color=5)
Total bytes: 4096 (4.0KiB)
"""
SAID = {"bytes": {"arguments": 300_000_000, "aliased": 200_000_000, "results": 50_000_000}}
ANALYSIS = {
    **{"argument": 400, "output": 300, "alias": 250, "temp": 1000, "generated_code": 9},
    **{"host_argument": 64, "host_output": 32, "host_alias": 16, "host_temp": 8},
}
OUT_OF_TPU = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (50.00G) exceeds "
    "available HBM (15.75G)."
)
OUT_OF_HBM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.52G of 15.75G "
    "hbm. Exceeded hbm capacity by 2.77G."
)
INVOLUNTARY = (
    "W1124 18:23:19.099544   27272 spmd_partitioner.cc:654] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {devices=[1,1,4]<=[4]} to {devices=[1,2,1,2]<=[4] last_tile_dim_replicate} efficiently "
    "for HLO operation %copy = f32[3,170,255]{2,1,0} copy(%cos.3), sharding={devices=[1,1,4]<=[4]}, "
    'metadata={op_name="jit(step)/cos" stack_frame_id=7}. As the last resort, SPMD will replicate the tensor.\n'
)
OLDER = (
    "E0324 [spmd] Involuntary full rematerialization. The compiler was not able to go from sharding {a} to {b} without "
    "doing a full rematerialization of the tensor for HLO operation: %dot = bf16[8,16]{1,0} dot(%a, %b), "
    'metadata={op_name="jit(step)/mlp/dot_general" source_file="mine.py" source_line=12}. You probably want\n'
)
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <20 reduce_sum.115 @0> (size=512,offset=0): s32[]{:T(128)}
allocation 1: size 8192, parameter 1, shape |f32[64,32]| at ShapeIndex {}, maybe-live-out:
 value: <3105 kernel @0> (size=8192,offset=0): f32[64,32]{1,0:T(8,128)}
 value: <3539 fusion.1{1} @0> (size=8192,offset=0): f32[64,32]{1,0:T(8,128)}
allocation 2: size 30000, preallocated-temp:
 value: <40 while.1{3} (phi) @0> (size=20000,offset=0): f32[100,50]{1,0:T(8,128)}
 value: <41 dot.7 @0> (size=20000,offset=0): f32[100,50]{1,0:T(8,128)}
 value: <42 small @0> (size=10000,offset=20000): bf16[100,50]{1,0:T(8,128)(2,1)}

Total bytes used: 38704
"""
MODULE = """HloModule jit_step, is_scheduled=true

ENTRY %main (kernel: f32[64,32]) -> f32[64,32] {
  %kernel = f32[64,32]{1,0} parameter(0), metadata={op_name="params['mlp']['kernel']"}
  %dot.7 = f32[100,50]{1,0} negate(%kernel), metadata={op_name="jit(step)/jvp()/mlp/up/dot_general" \
source_file="mine.py" source_line=12}
  %cos = f32[3,170,255]{2,1,0} cosine(%dot.7), metadata={op_name="jit(step)/cos" source_file="mine.py" source_line=7}
  ROOT %small = f32[64,32]{1,0} negate(%kernel)
}
"""


@functools.cache
def problem(name):
    """(model, plan) of a stored program."""
    case = CASES[name]
    loss, params, batch = model_of(case)
    model = TracedModel(
        trace(loss, params, batch, names=("params", "batch")),
        jax.eval_shape(optax.sgd(0.1).init, params),
        parse_cluster(case.cluster),
        fused_attention=True,
        remats=tuple(dict.fromkeys((case.remat, "full"))),
    )
    plan = Plan(MeshShape.parse(case.mesh), case.preset, microbatches=case.microbatches, remat=case.remat)
    return model, dataclasses.replace(plan, **model.plan_fields)


def compiled(hlo_text="", **fields):
    return Compiled(**{**dict(hlo=hlo_text, memory_report=REPORT, said=SAID, seconds=3.0, cpu_seconds=2.0), **fields})


@functools.cache
def verified(name, **fields):
    model, plan = problem(name)
    out = compiled(read_case(name), depth="fast", **fields)
    return verification(out, model, plan, target="here", versions={"libtpu": "1"}, usable_bytes=GIB)


# Memory.


def test_bytes_of_a_tpu_are_those_of_its_report():
    assert memory_bytes(compiled(depth="fast")) == {
        **{"arguments": 300_000_000, "aliased": 200_000_000, "results": 50_000_000},
        **{"temporaries": 350_000_000, "host": 4096, "total": 700_000_000},
    }


def test_bytes_of_a_gpu_are_those_of_its_analysis():
    sizes = memory_bytes(compiled(depth="full", memory_report="", said={**SAID, "memory": ANALYSIS}))
    assert sizes == {
        **{"arguments": 400, "aliased": 250, "results": 50, "temporaries": 1000},
        **{"host": 64 + 32 + 8 - 16, "total": 400 + 50 + 1000},
    }


@pytest.mark.parametrize("message, gib", [(OUT_OF_TPU, 50.0), (OUT_OF_HBM, 18.52)])
def test_out_of_memory_says_how_much_is_needed(message, gib):
    sizes = memory_bytes(compiled(depth="fast", memory_report="", out_of_memory=message))
    assert sizes["total"] == pytest.approx(gib * GIB, rel=1e-4)
    assert sizes["arguments"] == SAID["bytes"]["arguments"]


def test_out_of_memory_without_a_number_is_an_error_that_quotes_it():
    with pytest.raises(ValueError, match="a message of tomorrow"):
        memory_bytes(compiled(depth="fast", memory_report="", out_of_memory="a message of tomorrow"))


def test_fits_by_what_is_usable():
    model, plan = problem("v5e_fsdp")
    text = read_case("v5e_fsdp")
    for usable, fits in ((700_000_000, True), (699_999_999, False)):
        found = verification(compiled(text, depth="fast"), model, plan, target="here", versions={}, usable_bytes=usable)
        assert found.fits is fits
        assert found.bytes["total"] == 700_000_000
        if fits:
            assert found.changes == ()


def test_out_of_memory_does_not_fit_whatever_is_usable():
    model, plan = problem("v5e_fsdp")
    out = compiled(depth="fast", memory_report="", out_of_memory=OUT_OF_HBM)
    found = verification(out, model, plan, target="here", versions={}, usable_bytes=100 * GIB)
    assert not found.fits
    assert found.seconds is None
    assert (found.traffic, found.buffers, found.out_of_memory) == ((), (), OUT_OF_HBM)
    assert Verification.from_record(json.loads(json.dumps(found.to_record()))) == found


def test_changes_are_scaled_by_what_the_compiler_found():
    model, plan = problem("v5e_sequence")
    planned = verified("v5e_sequence").planned_bytes
    rows = fitting_changes(model, plan, 3 * planned, 3 * planned - 1)
    assert rows
    for row in rows:
        assert row["bytes"] < 3 * planned
        assert row["spare"] == 3 * planned - 1 - row["bytes"] >= 0
        assert row["slower"] > 0
    assert [row["slower"] for row in rows] == sorted(row["slower"] for row in rows)
    assert fitting_changes(model, plan, 3 * planned, 1) == ()


# Traffic, flops and time.


@pytest.mark.parametrize("name", ["v5e_fsdp", "v5e_sequence", "v5e_microbatches", "h100_fsdp", "h100_sequence"])
def test_traffic_is_told_by_axes_beside_the_plan(name):
    _, plan = problem(name)
    found = verified(name)
    assert {axis for row in found.traffic for axis in row.axes} <= {a for a, n in plan.mesh.sizes.items() if n > 1}
    assert len({row.axes for row in found.traffic}) == len(found.traffic)
    collectives = hlo.collectives(hlo.parse(read_case(name)), plan.mesh, order=plan.order)
    wanted = sum(c.times * sent_bytes(c.kind, c.bytes, c.size) for c in collectives if c.axes)
    assert sum(row.sent for row in found.traffic) == pytest.approx(wanted)
    most = found.traffic[0]
    assert most.counts
    assert 0 <= most.asynchronous <= most.sent
    assert most.seconds > 0
    assert most.ratio is not None
    assert most.ratio > 0
    for row in found.traffic:  # what is sent beyond the plan is told
        beyond = row.sent - row.planned > max(0.1 * wanted, 2**20)
        assert beyond == any(f"over {'+'.join(row.axes)} a device sends" in line for line in found.warnings)


def test_what_the_compiler_sends_again_is_told_apart():
    model, plan = problem("v5e_fsdp")
    found = [c for c in hlo.collectives(hlo.parse(read_case("v5e_fsdp")), plan.mesh) if c.axes]
    rows = traffic(found, model, plan)
    assert all(row.again == 0 for row in rows)
    twice = [*found, dataclasses.replace(found[0], name=f"{found[0].name}.remat")]
    (more,) = (row for row in traffic(twice, model, plan) if row.axes == found[0].axes)
    once = next(row for row in rows if row.axes == found[0].axes)
    assert more.again == more.sent - once.sent > 0
    (line,) = unplanned([dataclasses.replace(more, planned=0.0)], twice)
    assert f"({more.again / GIB:.2f} GiB a second time, for want of memory)" in line


def test_time_adds_up_and_products_are_those_of_the_step():
    for name in ("v5e_fsdp", "h100_fsdp"):
        found = verified(name)
        parts = sum(seconds for part, seconds in found.time.items() if part != "hidden")
        assert found.seconds == pytest.approx(parts, rel=1e-6)
        assert found.flops == pytest.approx(found.planned_flops, rel=0.1)
        slowest = [row["seconds"] for row in found.slowest]
        assert slowest == sorted(slowest, reverse=True)


@pytest.mark.parametrize(
    "kind, sent",
    [("all_gather", 6.0), ("reduce_scatter", 6.0), ("all_to_all", 6.0), ("all_reduce", 12.0), ("permute", 8.0)],
)
def test_a_device_sends_by_kind(kind, sent):
    assert sent_bytes(kind, 8.0, 4) == sent


def test_unplanned_traffic_is_told_with_its_lines():
    module = hlo.parse(read_case("v5e_sequence"))
    _, plan = problem("v5e_sequence")
    found = [c for c in hlo.collectives(module, plan.mesh) if c.axes]
    axes = found[0].axes
    row = Traffic(axes, {"all_gather": 3}, 10 * GIB, 1 * GIB, 0.0, 1.0)
    (line,) = unplanned([row], found)
    assert line.startswith(f"over {'+'.join(axes)} a device sends 10.00 GiB, planned 1.00")
    assert ".py:" in line
    assert " x " in line
    as_planned = dataclasses.replace(row, planned=row.sent)
    assert unplanned([as_planned], found) == []
    assert unplanned([dataclasses.replace(row, sent=2**20, planned=0.0)], found) == []  # too little to speak of
    assert unplanned([dataclasses.replace(row, sent=1.0 * GIB, planned=2.0 * GIB)], found) == []  # less than planned


# What the compiler says.


def test_involuntary_moves_are_told_once_with_shape_name_and_line():
    module = hlo.parse(MODULE)
    lines = partitioner_warnings("I0 something else\n" + 2 * INVOLUNTARY + OLDER, module)
    assert len(lines) == 2
    for line, wanted in zip(
        lines, [("f32[3,170,255]", "cos", "(mine.py:7)"), ("bf16[8,16]", "dot_general", "(mine.py:12)")], strict=True
    ):
        for part in ("whole on every device", *wanted):
            assert part in line
    assert partitioner_warnings("nothing of that kind", module) == []


def test_involuntary_moves_are_warnings_of_a_verification():
    model, plan = problem("v5e_fsdp")
    out = compiled(read_case("v5e_fsdp"), depth="fast", log=OLDER)
    found = verification(out, model, plan, target="here", versions={}, usable_bytes=GIB)
    assert any("mine.py:12" in warning for warning in found.warnings)


def test_largest_buffers_have_names_lines_and_come_once_a_place():
    buffers = largest_buffers(ASSIGNMENT, hlo.parse(MODULE))
    assert [(b.bytes, b.shape) for b in buffers] == [
        *((20000, "f32[100,50]"), (10000, "bf16[100,50]"), (8192, "f32[64,32]"), (512, "s32[]")),
    ]
    assert "mlp/up/dot_general" in buffers[0].op_name
    assert buffers[0].source == "mine.py:12"
    assert operation(buffers[2].op_name) == "params/mlp/kernel"
    assert largest_buffers("", hlo.parse(MODULE)) == ()


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("jit(step)/jvp()/while/body/closed_call/layers/mlp/up/dot_general", "forward: layers/mlp/up/dot_general"),
        ("jit(step)/transpose(jvp())/while/body/closed_call/layers/q/dot_general", "backward: layers/q/dot_general"),
        ("params['layers']['up']", "params/layers/up"),
    ],
)
def test_operations_are_told_in_the_words_of_the_model(name, wanted):
    assert operation(name) == wanted


# Records.


def test_a_record_is_read_back_as_it_was_written():
    for name in ("v5e_sequence", "h100_fsdp"):
        found = verified(name)
        record = json.loads(json.dumps(found.to_record()))
        assert Verification.from_record(record) == found
        with pytest.raises(ValueError, match="version 0"):
            Verification.from_record({**record, "version": 0})
        record.pop("traffic")
        with pytest.raises(ValueError):
            Verification.from_record(record)


def test_planned_over_compiled_is_the_ratio():
    found = verified("v5e_fsdp")
    assert found.ratio == found.planned_bytes / 700_000_000
    model, plan = problem("v5e_fsdp")
    other = changed(plan, {"remat": "full"})
    assert verification(
        compiled(read_case("v5e_fsdp"), depth="fast"), model, other, target="", versions={}, usable_bytes=GIB
    ).planned_bytes == pytest.approx(found.planned_bytes)  # it is "full" already
