"""What calls cost on windows: the planner's own figures, waves where the cache does not fit, moves, what is refused."""

import dataclasses
import functools
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redco_like.models import architecture
from redco_like.problem import load_problem
from redco_like.rlhf_problem import call_costs
from redco_like.validation.rlhf import llama, read_points
from redco_like.validation.rlhf_placement import WORKLOAD, by_tensor
from search import Space, TracedModel, estimate_plan, parse_cluster, solve
from search.rlhf import GRAPHS, Call, Window, Workload
from search.rlhf.costs import Constraint
from search.rlhf.forward import Dispatch
from search.subcluster import part_of

SMALL = dataclasses.replace(
    architecture("llama-2-7b"), embed=2048, layers=4, heads=16, kv_heads=16, mlp=5632, vocab=4096, max_length=1024
)
WORK = Workload(32, 48, 33, minibatches=2, epochs=2)
GRAPH = GRAPHS["ppo"]()
GENERATE, SCORE, TRAIN = (GRAPH.call(name) for name in ("generate", "reference", "train_actor"))


def cluster(name="8xA100-80", memory=None):
    found = parse_cluster(name)
    if memory is None:
        return found
    accelerator = dataclasses.replace(found.accelerator, usable_memory_bytes=memory)
    return dataclasses.replace(found, accelerator=accelerator)


@functools.cache
def made(key):
    return _KEYS[key]()


_KEYS = {}


def costs(name="8xA100-80", memory=None, work=WORK, planned=True, **constraints):
    """Traced once for all clusters."""
    models = dict.fromkeys(GRAPH.roles, SMALL)
    key = repr((work, planned, sorted(constraints.items())))
    _KEYS[key] = lambda: call_costs(models, GRAPH, work, cluster(), allow_planned=planned, constraints=constraints)
    plain = name == "8xA100-80" and memory is None
    return made(key) if plain else made(key).on(cluster(name, memory))


def total(option):
    return option.params_bytes + option.working_bytes + option.state_bytes


def fastest(options):
    return min(options, key=lambda option: option.seconds)


# Seconds.


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_training_costs_what_the_planner_finds_for_every_step_of_the_iteration(devices):
    part = part_of(cluster(), devices)
    problem = load_problem(SMALL, seq_len=WORK.length, global_batch=16, dtype="bfloat16", param_dtype="float32")
    model = TracedModel(
        problem.traced, problem.opt_state, part, param_dtype="float32", fused_attention=problem.fused_attention
    )
    found = solve(Space(model, part, forbid=("context", "order")), runners_up=0)
    option = fastest(costs(planned=False).options(TRAIN, devices))
    assert option.seconds == pytest.approx(4 * found.estimate.seconds_per_step)
    assert option.plan.mesh.size == devices
    # The copy of the parameters that other calls read is there at every moment.
    planned = found.estimate.bytes_per_device
    assert planned <= total(option) <= planned + option.params_bytes


def test_generation_reads_the_prompts_once_and_then_takes_a_step_per_token():
    option = fastest(costs(planned=False).options(GENERATE, 1))
    part = part_of(cluster(), 1)

    def seconds(task, length):
        problem = load_problem(SMALL, seq_len=length, global_batch=32, dtype="bfloat16", task=task)
        model = TracedModel(
            problem.traced, None, part, param_dtype="bfloat16", fused_attention=True, remats=("none",), training=False
        )
        return estimate_plan(model, dataclasses.replace(option.plan, microbatches=1)).seconds_per_step

    assert option.parts["waves"] == 1
    # The engine only reads the cache in a step; the planner's decode also writes it.
    assert option.parts["token"] == pytest.approx(seconds("decode", 48 + 16), rel=0.05)
    assert option.seconds == pytest.approx(seconds("prefill", 48) + 32 * option.parts["token"])


def test_samples_of_a_prompt_share_its_reading():
    apart = fastest(costs(work=Workload(32, 48, 33)).options(GENERATE, 8))
    alike = fastest(costs(work=Workload(8, 48, 33, samples=4)).options(GENERATE, 8))
    assert alike.parts["decode"] == pytest.approx(apart.parts["decode"])
    assert alike.parts["prefill"] < 0.6 * apart.parts["prefill"]


def test_a_token_takes_longer_the_longer_the_answer_gets():
    token = [
        fastest(costs(work=Workload(4096, 48, tokens)).options(GENERATE, 1)).parts["token"] for tokens in (33, 289)
    ]
    assert token[0] < token[1]


def test_stages_of_scoring_take_a_bubble_and_hold_a_share_of_the_layers():
    on = {stage: costs(score=Constraint({"stage": stage, "data": 1, "tensor": 1})) for stage in (1, 2, 4)}
    whole = on[1].options(SCORE, 1)[0]
    for stage in (2, 4):
        options = on[stage].options(SCORE, stage)
        assert {option.plan.mesh.stage for option in options} == {stage}
        one = fastest(options)
        assert whole.seconds / stage < one.seconds < whole.seconds
        assert one.params_bytes < whole.params_bytes
        assert one.parts["bubble"] > 0


def test_decoding_in_a_pipeline_keeps_every_stage_busy_with_parts_of_the_rows():
    mesh = {"stage": 4, "data": 1, "tensor": 1}
    work = Workload(4096, 48, 33)
    found = costs(work=work, generate=Constraint(mesh)).options(GENERATE, 4)
    one = fastest(found)
    assert one.plan.microbatches in (4, 8)
    whole = fastest(costs(work=work).options(GENERATE, 1))
    # With all parts on their way, four stages take about a fourth of one device's time; one part would take all of it.
    assert whole.seconds / 4 < one.seconds < 0.6 * whole.seconds


def test_constants_of_a_system_change_its_seconds_and_no_other_system():
    mine = costs()
    slow = dataclasses.replace(
        mine.cluster, accelerator=dataclasses.replace(mine.cluster.accelerator, launch_seconds=1e-3)
    )
    before = fastest(mine.options(GENERATE, 8)).seconds
    other = mine.on(slow)
    split = [o for o in other.options(GENERATE, 8) if o.plan.mesh.tensor > 1]
    assert all(option.seconds > 32 * 2 * SMALL.layers * 1e-3 for option in split)
    assert fastest(mine.options(GENERATE, 8)).seconds == before


def test_a_host_that_dispatches_slowly_sets_the_time_of_a_token_and_a_quick_one_does_not():
    mine = costs()
    quick, slow = (mine.on(dispatch=Dispatch(seconds, seconds)) for seconds in (1e-12, 1e-3))
    for call in (GENERATE, SCORE):
        assert fastest(quick.options(call, 4)).seconds == fastest(mine.options(call, 4)).seconds
    token = {}
    for tensor in (1, 2):
        fixed = costs(generate=Constraint({"tensor": tensor, "stage": 1})).on(dispatch=Dispatch(1e-3, 1e-3))
        token[tensor] = fastest(fixed.options(GENERATE, 4)).parts["token"]
    # Collectives are dispatched too: two per layer, and the embedding's.
    assert token[1] > 20 * SMALL.layers * 1e-3
    assert token[2] - token[1] == pytest.approx((2 * SMALL.layers + 1) * 1e-3)
    assert fastest(slow.options(TRAIN, 4)).seconds > fastest(mine.options(TRAIN, 4)).seconds


# Memory.


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["8xA100-80", "2x8xA100-80"]),
    call=st.sampled_from(GRAPH.calls),
    devices=st.sampled_from([1, 2, 4, 8]),
    memory=st.sampled_from([None, 3e8, 3e9]),
)
def test_options_fit_are_of_the_window_and_none_beats_another(name, call, devices, memory):
    found = costs(name, memory)
    options = found.options(call, devices)
    assert [option.seconds for option in options] == sorted(option.seconds for option in options)
    for option in options:
        assert option.devices == devices == option.tree.mesh.size
        assert 0 < total(option) <= found.usable_bytes
        assert (option.state_bytes > 0) == (call.kind == "train")
        assert option.tree.bytes_per_device >= option.params_bytes * 0.99
    for i, one in enumerate(options):
        for other in options[i + 1 :]:
            smaller = total(one) <= total(other) and one.params_bytes + one.state_bytes <= (
                other.params_bytes + other.state_bytes
            )
            assert not (smaller and one.plan.mesh == other.plan.mesh)
    assert options == found.on().options(call, devices)


def test_a_cache_that_does_not_fit_is_filled_in_waves():
    work = Workload(512, 48, 65)
    roomy = fastest(costs(work=work).options(GENERATE, 1))
    assert roomy.parts["waves"] == 1
    assert roomy.rows == 512
    memory = roomy.params_bytes + roomy.working_bytes / 3.5
    tight = costs(memory=memory / 0.9, work=work)
    option = fastest(tight.options(GENERATE, 1))
    assert option.parts["waves"] >= 3
    assert option.rows < 512 / 2
    assert total(option) <= tight.usable_bytes
    assert option.seconds > roomy.seconds


def test_more_memory_is_never_slower():
    for call in (GENERATE, SCORE, TRAIN):
        seconds = []
        for memory in (1e7, 3e8, 1e9, 4e9, 8e10):
            options = costs(memory=memory).options(call, 4)
            seconds.append(fastest(options).seconds if options else float("inf"))
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] < seconds[0] == float("inf")


def test_a_model_that_fits_nowhere_has_no_options():
    assert [costs(memory=1e7).options(call, 8) for call in (GENERATE, SCORE, TRAIN)] == [()] * 3


def test_trained_roles_hold_what_is_read_apart_from_master_weights_and_the_optimizer():
    mesh = Constraint({"tensor": 1, "fsdp": 1, "stage": 1, "optimizer_sharding": False})
    option = fastest(costs(train=mesh).options(TRAIN, 2))
    assert option.state_bytes == pytest.approx(6 * option.params_bytes, rel=1e-3)


# Layouts and moves.


def test_parameters_of_an_option_lie_as_its_plan_says():
    for call, devices in ((TRAIN, 8), (GENERATE, 4), (SCORE, 2)):
        for option in costs().options(call, devices):
            if option.plan.mesh.stage == 1:
                assert option.tree.bytes_per_device == pytest.approx(option.params_bytes)


def test_moves_cost_nothing_within_a_layout_and_all_that_is_lacking_across_windows():
    found = costs("2x8xA100-80")
    trained, generates = found.options(TRAIN, 8)[0], found.options(GENERATE, 4)[0]
    assert found.move("actor", (Window(0, 8), trained), (Window(0, 8), trained))[1] == 0
    near = found.move("actor", (Window(0, 8), trained), (Window(4, 4), generates))
    far = found.move("actor", (Window(0, 8), trained), (Window(8, 4), generates))
    assert far[1] == pytest.approx(4 * generates.tree.bytes_per_device)
    assert near[1] <= far[1]
    assert near[0] < far[0]
    assert found.offload("actor", trained, 25e9) == pytest.approx(1.0)


def test_rows_are_filled_up_where_devices_are_more_than_divide_them():
    work = Workload(6, 48, 33)
    assert costs(work=work).options(GENERATE, 8)
    assert costs(work=work).options(SCORE, 4)
    # A step's examples are not.
    assert {option.plan.mesh.batch_shards for option in costs(work=work).options(TRAIN, 4)} <= {1, 2}


# Parts of clusters.


@pytest.mark.parametrize("name", ["4x8xA100-80", "6xH100", "v5p:4x4x4", "v5e:4x8", "2*v5e-4", "tpu7x:2x2x4"])
def test_parts_of_a_cluster_have_its_links(name):
    whole = parse_cluster(name)
    for devices in range(1, whole.devices + 1):
        try:
            part = part_of(whole, devices)
        except ValueError:
            continue
        assert part.devices == devices
        assert {tier.bytes_per_second for tier in part.tiers} <= {tier.bytes_per_second for tier in whole.tiers}
        assert part.nodes == max(1, devices // whole.devices_per_node)
    assert part_of(whole, whole.devices) is whole


def test_a_part_of_a_torus_closes_only_where_it_is_whole():
    part = part_of(parse_cluster("v5p:4x4x8"), 32)
    assert part.torus.dims == (1, 4, 8)
    assert part.torus.wrap == (False, True, True)


def test_a_part_of_measured_nodes_has_the_slowest_of_their_links():
    matrix = np.full((4, 4), 2e10)
    matrix[2, 3] = matrix[3, 2] = 1e9
    whole = dataclasses.replace(parse_cluster("4x8xA100-80"), node_bytes_per_second=tuple(map(tuple, matrix)))
    assert part_of(whole, 16).node_bytes_per_second[0][1] == 1e9
    assert part_of(whole, 8).node_bytes_per_second is None


def test_a_size_that_is_no_part_of_a_cluster_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="12 devices are no part of 4x8xA100-80, 32 devices; nearest: 8"):
        part_of(parse_cluster("4x8xA100-80"), 12)
    with pytest.raises(ValueError, match="nearest: 8"):
        costs().options(TRAIN, 16)


# Bad input.


@pytest.mark.parametrize(
    ("models", "work", "says"),
    [
        ({"actor": SMALL}, WORK, "role 'reference' of 'dpo' has no model; there are models for actor"),
        (
            dict.fromkeys(("actor", "reference", "critic"), SMALL),
            WORK,
            "a model for 'critic', which is no role of 'dpo'",
        ),
        ({"actor": "bert-base", "reference": SMALL}, WORK, "bert-base is no decoder"),
        ({"actor": "lama-2-7b", "reference": SMALL}, WORK, "llama-2-7b"),
        ({"actor": "gpt2", "reference": SMALL}, Workload(8, 1000, 100), "longer than the table of 1024 positions"),
    ],
)
def test_models_that_do_not_suit_the_graph_are_named(models, work, says):
    with pytest.raises(ValueError, match=says):
        call_costs(models, GRAPHS["dpo"](), work, cluster())


def test_a_call_of_a_role_without_a_model_is_refused():
    with pytest.raises(ValueError, match="role 'judge' of call 'judge' has no model; there are models for actor"):
        costs().options(Call("judge", "judge", "score", ("completions",)), 1)
    with pytest.raises(ValueError, match="constraints for 'sample'; for train, score, generate"):
        costs(sample=Constraint())


# Published iterations: constants as benchmarks/rlhf_published.py fits them, on groups that are not these.

SOFTWARE = Dispatch(operation_seconds=30e-6, collective_seconds=270e-6)


@functools.cache
def points():
    folder = os.environ.get("REDCO_LIKE_GROUND_TRUTH")
    if not folder or not (pathlib.Path(folder) / "realhf").is_dir():
        pytest.skip("REDCO_LIKE_GROUND_TRUTH names no folder with realhf: published iterations are not at hand")
    return read_points(folder)


def errors(group, *lengths):
    return [
        point.case.heuristic_seconds(SOFTWARE) / point.heuristic_seconds - 1
        for point in points()
        if point.group == group and point.case.row.new_tokens in (lengths or (128, 384, 896))
    ]


def test_every_published_point_comes_once_with_the_searched_plan_beside_it():
    assert len(points()) == 21
    assert all(point.gain is None or point.gain > 1 for point in points())
    assert {point.group for point in points()} >= {(7, 7, 8), (70, 7, 64), (7, 34, 32)}
    with pytest.raises(ValueError, match=r"no realhf/iteration_seconds\.json in nowhere"):
        read_points("nowhere")
    with pytest.raises(ValueError, match="no Llama of 8 billion parameters here; 7, 13, 34, 70"):
        llama(8)


def test_a_published_heuristic_is_estimated_within_fifteen_percent():
    assert np.abs(errors((34, 7, 32), 896)).mean() < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("group", [(34, 7, 32), (7, 34, 32), (7, 13, 16), (70, 7, 64), (7, 70, 64)])
def test_published_heuristics_of_other_groups_are_too(group):
    assert np.abs(errors(group)).mean() < 0.15


@pytest.mark.slow
def test_the_search_gains_what_was_measured_where_that_was_one_node():
    point = next(point for point in points() if point.group == (7, 7, 8) and point.case.row.new_tokens == 896)
    found = point.case.search(SOFTWARE, time_limit=30)
    assert point.case.heuristic_seconds(SOFTWARE) / found.execution.period_seconds >= point.gain


@pytest.mark.slow
def test_the_cache_decides_how_generation_is_split():
    # With two devices per replica the weights leave room for all sequences at once; with one they do not.
    found = by_tensor(7, 16, offload=True)
    assert found[1].rows < found[2].rows == WORKLOAD.sequences
    assert min(found, key=lambda tensor: found[tensor].seconds) == 2
