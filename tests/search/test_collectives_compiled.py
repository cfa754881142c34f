"""Planned collectives against those that XLA compiles, for 8 CPU devices: kind, mesh axes, bytes per device."""

import pytest
from hlo_collectives import collectives
from plan_collectives import PLANS, compare

from sharding_rules import MeshShape


def cases():
    for plan in PLANS:
        marks = [pytest.mark.xfail(strict=True, raises=AssertionError, reason=plan.why)] if plan.why else []
        yield pytest.param(plan, id=str(plan), marks=marks)


@pytest.mark.parametrize("plan", list(cases()))
def test_planned_collectives_are_those_of_the_compiled_step(plan):
    rows = compare(plan)
    assert rows
    missed = [row for row in rows if not row.agrees]
    assert not missed


def test_at_least_eight_plans_of_four_models_are_expected_to_agree():
    plans = [plan for plan in PLANS if not plan.why]
    assert len(plans) >= 8
    assert len({plan.model for plan in plans}) >= 4


HLO = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = f32[4,2]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
}

%cond (p: (s32[], f32[4])) -> pred[] {
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %b = (f32[], bf16[8]) all-reduce(%y, %z), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %c = f32[2]{0} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %d = f32[2]{0} all-gather(%y), replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}
  %e = f32[2]{0} all-gather(%y), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  ROOT %f = f32[2]{0} collective-permute(%y), source_target_pairs={{0,4},{4,0}}
}
"""


def test_reader_counts_loops_groups_and_axes():
    found = collectives(HLO, MeshShape(data=2, fsdp=2, tensor=2))
    assert [(c.kind, c.axes, c.bytes, c.times) for c in found] == [
        ("all_gather", ("tensor",), 32, 3),
        ("sum", ("data", "fsdp"), 20, 1),
        ("sum", ("fsdp", "tensor"), 32, 1),
        ("all_gather", ("tensor",), 8, 1),
        ("all_gather", ("fsdp", "tensor"), 8, 1),
        ("permute", ("data",), 8, 1),
    ]
