"""Single changes of a plan: legal ones only, that need less memory, singles before pairs."""

import dataclasses
import functools

import jax
import optax
import pytest
from hlo_programs import CASES, model_of

from redco_like.models import Experts, ModelConfig
from redco_like.problem import load_problem
from search import Plan, TracedModel, parse_cluster
from search.costing import estimate_plan
from search.knobs import Change, changed, changes
from search.verify import fitting_changes
from sharding_rules import MeshShape, PlanError, trace

PLAN = Plan(MeshShape(data=2, fsdp=2, tensor=2), "fsdp+megatron+sequence", order=("tensor", "fsdp", "data"))
GIB = 2**30


@functools.cache
def llama():
    """A small Llama on 8 chips: heads 8 (4 of keys), batch 16, three layers."""
    loss, params, batch = model_of(CASES["v5e_fsdp"])
    traced = trace(loss, params, batch, names=("params", "batch"))
    state = jax.eval_shape(optax.adamw(0.1).init, params)
    return TracedModel(traced, state, parse_cluster("v5e:2x4"), fused_attention=True)


@functools.cache
def experts(task):
    sizes = dict(vocab=64, embed=64, layers=2, heads=8, kv_heads=2, mlp=48, max_length=64, experts=Experts(8, 2, 48))
    form = dict(family="mixtral", kind="decoder", norm="rms", activation="silu", gated=True, position="rotary")
    spec = load_problem(ModelConfig(**sizes, **form), seq_len=64, global_batch=16, task=task)
    training = task == "train"
    remats = ("none", "dots", "full") if training else ("none",)
    return TracedModel(
        spec.traced, spec.opt_state, parse_cluster("v5e:2x4"), fused_attention=True, remats=remats, training=training
    )


def plan_of(model, **settings):
    return changed(Plan(MeshShape(), **model.plan_fields), settings)


# changed


@pytest.mark.parametrize(
    "settings, preset",
    [
        ({"data": 4, "fsdp": 1}, "megatron+sequence"),
        ({"tensor": 1, "fsdp": 4}, "fsdp"),
        ({"sequence": False}, "fsdp+megatron"),
        ({"remat": "full"}, "fsdp+megatron+sequence"),
    ],
)
def test_the_preset_follows_the_mesh(settings, preset):
    new = changed(PLAN, settings)
    assert set(new.preset.split("+")) == set(preset.split("+"))
    assert Plan.from_json(new.to_json()) == new


def test_a_changed_plan_is_changed_in_what_was_asked_for_only():
    new = changed(dataclasses.replace(PLAN, reason="fast", rules=((".*bias", (None,)),)), {"microbatches": 4})
    assert PLAN.diff(new).keys() == {"microbatches", "rules"}
    assert (new.reason, new.estimate) == ("", None)


def test_the_order_is_kept_where_it_still_names_the_axes():
    assert changed(PLAN, {"data": 1, "fsdp": 2, "tensor": 4}).order == ()
    assert changed(PLAN, {"remat": "full"}).order == PLAN.order
    assert changed(PLAN, {"order": ("data", "fsdp", "tensor")}).order == ("data", "fsdp", "tensor")


def test_an_optimizer_is_not_split_over_one():
    plan = dataclasses.replace(PLAN, optimizer_sharding=True)
    assert changed(plan, {"data": 4, "fsdp": 1}).optimizer_sharding
    assert not changed(plan, {"data": 1, "fsdp": 4}).optimizer_sharding


def test_unknown_fields_and_values_are_refused():
    with pytest.raises(ValueError, match=r"remta.*it has .*remat"):
        changed(PLAN, {"remta": "full"})
    with pytest.raises(ValueError, match="one of none, dots, full"):
        changed(PLAN, {"remat": "some"})
    with pytest.raises(ValueError, match="order"):
        changed(PLAN, {"order": ("data",)})


# changes


def start():
    return plan_of(llama(), data=8)


def test_changes_are_legal_need_less_and_are_estimated_as_the_changed_plan():
    model, plan = llama(), start()
    now = estimate_plan(model, plan)
    found = changes(model, plan)
    assert found
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    for change in found:
        new = changed(plan, change.settings)
        estimate = estimate_plan(model, new)  # raises where it is not legal
        assert new.mesh.size == 8
        assert estimate.bytes_per_device == change.bytes_per_device < now.bytes_per_device
        assert estimate.seconds_per_step == change.seconds


def test_illegal_ones_are_left_out():
    texts = {change.text for change in changes(llama(), start())}
    assert "data=1,fsdp=8" in texts
    assert "remat=full" in texts
    assert "optimizer_sharding=true" in texts
    assert not any("microbatches=4" in text for text in texts)  # two examples a device are two parts at most
    assert not any("expert" in text for text in texts)  # the model has none
    assert not any("stage" in text for text in texts)


def test_parts_of_a_batch_stay_whole():
    """Four microbatches of one example on four groups of devices: eight groups would have half an example each."""
    model = llama()
    plan = plan_of(model, data=4, tensor=2, microbatches=4)
    found = changes(model, plan) + changes(
        model, plan, budget_bytes=min(c.bytes_per_device for c in changes(model, plan))
    )
    assert found
    for change in found:
        new = changed(plan, change.settings)
        assert model.batch % (new.microbatches * new.mesh.batch_shards) == 0


def test_bytes_are_scaled_and_kept_within_the_budget():
    model, plan = llama(), start()
    all_of_them = changes(model, plan)
    budget = sorted(c.bytes_per_device for c in all_of_them)[len(all_of_them) // 2]
    within = changes(model, plan, scale=1.0, budget_bytes=budget)
    assert {c.text for c in within} == {c.text for c in all_of_them if c.bytes_per_device <= budget}
    scaled = changes(model, plan, scale=1.5, budget_bytes=1.5 * budget)
    assert {c.text for c in scaled} == {c.text for c in within}
    for change, plain in zip(scaled, within, strict=True):
        assert change.bytes_per_device == round(1.5 * plain.bytes_per_device)


def test_pairs_only_where_no_single_one_fits():
    model, plan = llama(), start()
    singles = changes(model, plan)
    least = min(c.bytes_per_device for c in singles)
    pairs = changes(model, plan, budget_bytes=least - 1)
    assert pairs
    single = {frozenset(c.settings.items()) for c in singles}
    for pair in pairs:
        assert pair.bytes_per_device < least
        assert frozenset(pair.settings.items()) not in single
    assert changes(model, plan, budget_bytes=1) == []


def test_of_a_change_the_command_line_reads_the_text():
    from redco_like.cli.choices import fixed

    for change in changes(llama(), start()):
        assert fixed((change.text,), "--set") == change.settings
    assert Change({"sequence": True, "tensor": 2}, 0, 0.0).text == "sequence=true,tensor=2"


def test_experts_take_devices_of_a_model_that_has_them():
    model = experts("train")
    assert any("expert" in c.settings for c in changes(model, plan_of(model, data=8)))


def test_inference_has_no_changes_of_training():
    model = experts("decode")
    found = changes(model, plan_of(model, data=8))
    assert found
    assert not {"remat", "microbatches", "optimizer_sharding"} & {key for c in found for key in c.settings}


def test_a_cache_that_tensor_would_leave_whole_is_refused():
    model = experts("decode")
    with pytest.raises(PlanError, match="tensor=8 is more than the 2 kv heads of the cache"):
        changes(model, plan_of(model, tensor=8))


def test_what_verify_offers_is_one_of_each_kind_the_fastest_first():
    model, plan = llama(), start()
    now = estimate_plan(model, plan).bytes_per_device
    rows = fitting_changes(model, plan, now, now - 1)
    kinds = [tuple(part.partition("=")[0] for part in row["set"].split(",")) for row in rows]
    assert len(set(kinds)) == len(kinds)
    assert [row["slower"] for row in rows] == sorted(row["slower"] for row in rows)
