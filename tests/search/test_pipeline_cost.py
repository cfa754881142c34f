"""What stages, schedules, offload and sharded optimizers do to seconds and bytes; where layers begin and end."""

import dataclasses
import math

import numpy as np
import pytest
from test_cost import model_of, traced_model

from search import Plan, Space, estimate_plan, parse_cluster, sensitivity, solve, timeline
from search.costing import candidate, memory_parts
from search.placement import Columns, Variant, in_flight, numbering, orders
from search.regions import count_layers, op_regions, param_regions, sequence_regions, stacks
from search.schedules import make_schedule, peak_in_flight
from search.workload import workload
from sharding_rules import AXES, MeshShape, PlanError, make_layout, tree_paths

CLUSTER = parse_cluster("8xA100")


@pytest.fixture(scope="module")
def model():
    return model_of("llama_scanned", CLUSTER)


def stage_plan(stage=3, microbatches=4, **fields):
    return Plan(MeshShape(stage=stage), "data", microbatches=microbatches, **{"compute_dtype": "float32"} | fields)


# Regions.


@pytest.mark.parametrize("name", ["llama_scanned", "llama_unrolled", "llama_linen_scanned", "llama_linen_unrolled"])
def test_layers_are_found_in_loops_and_written_out(name):
    traced, _ = traced_model(name)
    layout = make_layout(traced, MeshShape(), "data")
    assert count_layers(layout) == 3
    assert stacks(layout) == 1
    regions = dict(zip(tree_paths(traced.arg("params")), param_regions(layout, 3), strict=True))
    assert sorted(set(regions.values())) == ["first", "last", "layers"]
    work = workload(traced).merged()
    flops = dict.fromkeys(("layers", "first", "last"), 0)
    for op, region in zip(work.ops, op_regions(work, 3), strict=True):
        if op.k:
            flops[region] += op.flops * op.trips
    # The embedding is a lookup; the head's products are the last region's.
    assert flops["first"] == 0
    assert flops["last"] > 0
    assert flops["layers"] > 5 * flops["last"]


@pytest.mark.parametrize("name, layers", [("mlp", 1), ("lstm", 1), ("equinox_mlp", 1), ("gpt2", 2), ("moe_ragged", 2)])
def test_what_repeats_is_counted(name, layers):
    traced, _ = traced_model(name)
    assert count_layers(make_layout(traced, MeshShape(), "data")) == layers


def test_a_tied_embedding_is_used_at_both_ends():
    traced, _ = traced_model("gpt2")
    layout = make_layout(traced, MeshShape(), "data")
    assert param_regions(layout, 2).count("both") == 1


def test_layers_go_on_between_the_first_and_the_last_of_them():
    assert sequence_regions([False, True, False, True, False]) == ["first", "layers", "layers", "layers", "last"]
    assert sequence_regions([False, False]) == ["first", "first"]


@pytest.mark.parametrize("name", ["t5", "resnet", "mlp", "unet"])
def test_models_without_one_stack_of_layers_have_no_stages(name):
    model = model_of(name, CLUSTER, remats=("none",))
    if name != "t5":
        assert model.layers == 1
        assert {inner.stage for inner in Space(model, CLUSTER, allow_planned=True).inner_meshes()} == {1}
    with pytest.raises(PlanError, match="stage=4"):
        estimate_plan(model, Plan(MeshShape(stage=4), "data"))


# Seconds.


def test_kept_microbatches_are_those_of_the_schedule():
    for name, chunks in (("gpipe", 1), ("1f1b", 1), ("zb_h1", 1), ("interleaved", 2), ("interleaved", 3)):
        for stages in (2, 3, 5):
            for m in (stages, 3 * stages):
                schedule = make_schedule(name, stages=stages, chunks=chunks, microbatches=m)
                found = in_flight(name, stages=stages, chunks=chunks, microbatches=m)
                np.testing.assert_allclose(found, np.array(peak_in_flight(schedule)) / chunks)


def test_equal_stages_take_the_closed_form(model):
    plan = stage_plan(vocab="spread", microbatches=8)
    parts = estimate_plan(model, plan).seconds
    place, columns = candidate(model, plan)
    one = model.costs.stage_seconds(place, columns)
    each = one["forward_seconds"] + one["backward_seconds"]
    assert np.ptp(each) < 1e-12
    assert place.boundary_bytes > 0
    assert one["transfer_seconds"] > 0
    still = dataclasses.replace(place, boundary_bytes=0.0)
    bubble = float(model.costs.seconds(still, columns).bubble[0])
    alone = model.costs.stage_seconds(still, columns)
    assert bubble == pytest.approx(2 * (alone["forward_seconds"] + alone["backward_seconds"])[0], rel=1e-9)
    assert parts["bubble"] > bubble


def test_a_spread_vocabulary_sums_the_last_activation_once_per_pass_on_every_stage(model):
    for microbatches in (1, 4):
        place, columns = candidate(model, stage_plan(vocab="spread", microbatches=microbatches))
        local = math.prod(getattr(place.mesh(1), axis) for axis in place.boundary_split)
        moved = model.costs.seconds(place, columns).moved["stage"]
        assert moved == pytest.approx(2 * place.boundary_bytes / local)


@pytest.mark.parametrize("schedule, chunks", [("gpipe", 1), ("1f1b", 1), ("zb_h1", 1)])
@pytest.mark.parametrize("vocab", ["ends", "spread"])
def test_the_timeline_is_the_estimate(model, schedule, chunks, vocab):
    plan = stage_plan(schedule=schedule, chunks=chunks, vocab=vocab)
    found, ran = estimate_plan(model, plan), timeline(model, plan)
    # What comes once per step is not in the timeline: gradients summed over microbatches, the optimizer,
    # copies of weights.
    place, columns = candidate(model, plan)
    seconds = model.costs.seconds(place, columns)
    gradients = model.costs.held(place, columns)[1] / model.costs.bandwidth * plan.microbatches
    once = float(seconds.optimizer[0]) + model.costs.efficiency.gradient_passes * float(gradients[0])
    once += float(model.costs.copied_bytes(place, columns)[0]) / model.costs.bandwidth
    assert ran.makespan_seconds + once == pytest.approx(found.seconds_per_step, rel=1e-6)


def test_more_microbatches_make_the_bubble_smaller(model):
    shares = []
    for m in (1, 2, 4, 8):
        found = estimate_plan(model, stage_plan(microbatches=m, vocab="spread"))
        shares.append(found.seconds["bubble"] / found.seconds_per_step)
    assert shares == sorted(shares, reverse=True)
    assert (
        estimate_plan(model, stage_plan(schedule="zb_h1")).seconds["bubble"]
        < (estimate_plan(model, stage_plan(schedule="1f1b")).seconds["bubble"])
    )


def test_stages_share_out_parameters_and_work(model):
    one = estimate_plan(model, Plan(MeshShape(), "data", compute_dtype="float32"))
    three = estimate_plan(model, stage_plan(3, 1))
    ends = model.place(dataclasses.replace(_inner(), stage=1)).held
    layers, first, last = ends[:, :, 0].sum(0)
    kept = sum(three.memory[part] for part in ("params", "gradients", "optimizer"))
    assert kept == pytest.approx(layers / 3 + max(first, last), rel=1e-3)
    assert sum(one.memory[p] for p in ("params", "gradients", "optimizer")) == pytest.approx(layers + first + last)


def _inner():
    from search.space import Inner

    return Inner(tensor=1, context=1, expert=1, sequence=False, batch_shards=1)


# What is planned only.


def test_a_sharded_optimizer_is_split_over_data(model):
    plan = Plan(MeshShape(data=4), "data", compute_dtype="float32")
    whole, split = (estimate_plan(model, dataclasses.replace(plan, optimizer_sharding=s)) for s in (False, True))
    assert split.memory["optimizer"] == pytest.approx(whole.memory["optimizer"] / 4, abs=4)
    assert split.memory["params"] == whole.memory["params"]
    assert split.seconds["optimizer"] < whole.seconds["optimizer"]


def test_offload_empties_the_device_and_takes_time(model):
    plan = Plan(MeshShape(data=4), "data", compute_dtype="float32")
    found = {what: estimate_plan(model, dataclasses.replace(plan, offload=what)) for what in ((), ("optimizer",))}
    assert found["optimizer",].memory["optimizer"] == 0 < found[()].memory["optimizer"]
    assert found["optimizer",].seconds["offload"] > 0
    assert "offload" not in found[()].seconds
    saved = estimate_plan(model, dataclasses.replace(plan, offload=("activations",)))
    assert saved.memory["activations"] < found[()].memory["activations"]


def test_parameters_gathered_once_move_less_and_stay(model):
    plan = Plan(MeshShape(fsdp=8), "fsdp", compute_dtype="float32")
    again, once = (estimate_plan(model, dataclasses.replace(plan, regather=r)) for r in (True, False))
    assert once.communication["fsdp"]["bytes"] < again.communication["fsdp"]["bytes"]
    assert once.memory["transient"] >= again.memory["transient"]


def test_every_order_of_axes_is_another_cost():
    cluster = parse_cluster("2x4xA100")
    model = model_of("llama_scanned", cluster, remats=("none",))
    place = model.place(dataclasses.replace(_inner(), tensor=2, batch_shards=4))
    assert orders(place)[0] == ("data", "fsdp", "tensor")
    assert len(orders(place)) == math.factorial(3)
    variants = (Variant(), Variant(order=("tensor", "data", "fsdp")))
    columns = Columns(*(np.array(x) for x in ([0, 0], [0, 0], [1, 1], [0, 1])), variants)
    strides = [numbering(place, columns)[1]["tensor"][i] for i in (0, 1)]
    assert strides == [1, 4]
    inside, across = model.costs.seconds(place, columns).exposed["tensor"]
    assert across > inside
    assert set(variants[1].order) < set(AXES)


def test_what_cannot_be_costed_says_why(model):
    with pytest.raises(PlanError, match="rules of its own"):
        estimate_plan(model, Plan(MeshShape(data=8), "data", rules=(("a", (None,)),)))
    with pytest.raises(PlanError, match="planner knows 'fsdp'"):
        estimate_plan(model, Plan(MeshShape(fsdp=8), "data"))
    with pytest.raises(PlanError, match="does not divide the model's 3 layers"):
        estimate_plan(model, stage_plan(2))
    with pytest.raises(PlanError, match="allow_planned"):
        Space(model, CLUSTER, fix={"stage": 3})


# Sensitivity.


def test_constants_turned_down_make_no_plan_faster(model):
    result = solve(Space(model, CLUSTER), runners_up=3)
    plans = [result.plan, *(c.plan for c in result.runners_up)]
    usual = [c.estimate.seconds_per_step for c in (result.best, *result.runners_up)]
    rows = sensitivity(model, plans)
    assert {row.factor < 1 for row in rows} == {True, False}
    for row in rows:
        assert all((s >= u) if row.factor < 1 else (s <= u) for s, u in zip(row.seconds, usual, strict=True)), row
        assert row.seconds[row.winner] == min(row.seconds)
    assert any(row.seconds != tuple(usual) for row in rows)


def test_a_plan_with_everything_planned_is_read_back(model):
    fix = {"data": 1, "stage": 1, "regather": True, "offload": ("optimizer",)}
    space = Space(model, CLUSTER, allow_planned=True, fix=fix)
    result = solve(space, runners_up=0)
    assert result.plan.planned == ("optimizer offloaded to the host",)
    again = type(result.plan).from_json(result.plan.to_json())
    assert again == result.plan
    assert again.estimate == result.estimate
    place, columns = candidate(model, again)
    assert {k: int(v[0]) for k, v in memory_parts(model, place, columns).items()} == result.estimate.memory
