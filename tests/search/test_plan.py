"""The plan as a record: read back as written, refused with a name where it cannot be."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import Estimate, Plan
from sharding_rules import AXES, MeshShape

entries = st.one_of(st.none(), st.sampled_from(AXES), st.lists(st.sampled_from(AXES), min_size=1).map(tuple))
dtypes = st.sampled_from(["float32", "bfloat16"])
plans = st.builds(
    Plan,
    mesh=st.builds(MeshShape, **{axis: st.integers(1, 16) for axis in AXES}),
    preset=st.sampled_from(["data", "fsdp+megatron"]),
    rules=st.lists(st.tuples(st.text(), st.lists(entries).map(tuple)), max_size=3).map(tuple),
    microbatches=st.integers(1, 64),
    remat=st.sampled_from(["none", "dots", "full"]),
    schedule=st.sampled_from(["1f1b", "gpipe", "interleaved", "zb_h1"]),
    vocab=st.sampled_from(["ends", "spread"]),
    optimizer_sharding=st.booleans(),
    regather=st.booleans(),
    offload=st.lists(st.sampled_from(["optimizer", "activations", "params"]), unique=True).map(tuple),
    param_dtype=dtypes,
    compute_dtype=dtypes,
    accum_dtype=dtypes,
    reason=st.text(),
)
PLAN = Plan(MeshShape(data=2, tensor=4), "megatron", (("blocks/.*", (None, ("fsdp", "tensor"))),), 2, "full")


@settings(deadline=None, max_examples=100)
@given(plans)
def test_a_plan_is_read_back_as_it_was_written(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)


@settings(deadline=None, max_examples=50)
@given(plans, plans)
def test_diff_is_empty_for_equals_only_and_turns_around(a, b):
    assert (a.diff(b) == {}) == (a == b)
    assert {name: (theirs, mine) for name, (mine, theirs) in a.diff(b).items()} == b.diff(a)


def test_diff_names_the_fields():
    other = dataclasses.replace(PLAN, microbatches=4, mesh=MeshShape(data=8))
    assert PLAN.diff(other) == {"mesh": (PLAN.mesh, MeshShape(data=8)), "microbatches": (2, 4)}


def test_a_plan_is_saved_and_loaded(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 3


def test_an_estimate_is_saved_beside_the_plan_and_is_no_part_of_it(tmp_path):
    estimate = Estimate(
        seconds_per_step=2.0,
        low_seconds=1.8,
        high_seconds=2.3,
        seconds={"compute": 1.5, "exposed tensor": 0.5},
        hidden_seconds=0.25,
        communication={"tensor": {"seconds": 0.75, "exposed": 0.5, "bytes": 1e9}},
        mfu=0.4,
        tokens_per_second=1e5,
        memory={"params": 5, "activations": 7},
        usable_bytes=11,
        flops=1e15,
        binds="compute",
        labels={"seconds": "analytic", "memory": "compiled"},
    )
    plan = dataclasses.replace(PLAN, estimate=estimate, problem={"model": "llama-3-8b", "seq_len": 8192})
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert found == PLAN == plan
    assert hash(found) == hash(PLAN)
    assert found.estimate == estimate
    assert found.problem["seq_len"] == 8192
    assert estimate.bytes_per_device == 12
    assert not estimate.fits
    assert estimate.exposed_seconds == 0.5
    with pytest.raises(ValueError, match=r"lacks \['flops'\]"):
        Estimate.from_record({k: v for k, v in estimate.to_record().items() if k != "flops"})
    with pytest.raises(ValueError, match="guessed"):
        dataclasses.replace(estimate, labels={"seconds": "guessed"})


def test_a_plan_of_the_first_version_is_read():
    old = {"mesh": {"data": 2, "tensor": 4}, "preset": "megatron", "rules": [], "microbatches": 2, "version": 1}
    assert Plan.from_json(json.dumps(old)) == Plan(MeshShape(data=2, tensor=4), "megatron", (), 2)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, ()),
        ({"mesh": MeshShape(stage=4), "schedule": "zb_h1", "vocab": "spread"}, ("stage=4 (zb_h1)", "vocabulary")),
        ({"offload": ("optimizer",)}, ("optimizer offloaded",)),
        ({"mesh": MeshShape(data=2, fsdp=2), "regather": False}, ("gathered once",)),
        ({"order": ("tensor", "data")}, ()),
    ],
)
def test_what_the_step_cannot_run_is_said(fields, words):
    planned = dataclasses.replace(PLAN, **fields).planned
    assert len(planned) == len(words)
    assert all(w in p for w, p in zip(words, planned, strict=True))


def test_specs_of_rules_become_plain_data():
    from jax.sharding import PartitionSpec

    rules = [("a", PartitionSpec(None, ("fsdp", "tensor")))]
    assert Plan(MeshShape(), rules=rules) == Plan(MeshShape(), rules=(("a", (None, ("fsdp", "tensor"))),))


def record(**changes):
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


BAD = {
    "not_json": ("{", "not JSON"),
    "not_an_object": ("[1]", "not a JSON object"),
    "unknown_field": (record(microbatch=2), r"unknown fields \['microbatch'\]; known: .*microbatches"),
    "other_version": (record(version=9), "version 9; this program reads 1, 2, 3"),
    "attention": ('{"version": 3, "mesh": {}, "attention": "flash"}', "attention='flash'; one of fused, plain"),
    "options": ('{"version": 3, "mesh": {}, "compiler_options": [["xla", 1]]}', "compiler_options are pairs"),
    "schedule": ('{"version": 2, "mesh": {}, "schedule": "2f2b"}', "schedule='2f2b'"),
    "chunks": ('{"version": 2, "mesh": {}, "chunks": 2}', "only interleaved has chunks"),
    "offload": ('{"version": 2, "mesh": {}, "offload": ["everything"]}', "offload: 'everything'; among optimizer"),
    "order": ('{"version": 2, "mesh": {"data": 2}, "order": ["tensor"]}', "is not the axes of the mesh data=2"),
    "no_version": ('{"mesh": {}}', "version None"),
    "no_mesh": ('{"version": 1}', "names no mesh"),
    "unknown_mesh_axis": (record(mesh={"model": 2}), "mesh axis 'model'.*data, fsdp"),
    "mesh_of_nothing": (record(mesh={"data": 0}), "'data' has size 0"),
    "bad_remat": (record(remat="some"), "remat='some'; one of none, dots, full"),
    "no_microbatches": (record(microbatches=0), "microbatches=0"),
    "half_a_microbatch": (record(microbatches=1.5), "microbatches=1.5"),
    "unknown_dtype": (record(compute_dtype="float31"), "compute_dtype='float31'"),
    "a_rule_of_one": (record(rules=[["a"]]), "rules"),
    "a_rule_of_numbers": (record(rules=[["a", [3]]]), "rules"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plan_says_what_is_wrong(name):
    text, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no plan file at .*nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.microbatches = 3
