"""Graphs of calls, workloads and execution plans as records: what they know, what they refuse, and their JSON."""

import dataclasses

import pytest

from search import Plan
from search.rlhf import GRAPHS, Busy, Call, CallPlan, ExecutionPlan, Graph, Move, Window, Workload
from sharding_rules import MeshShape


def execution(**changes):
    graph = GRAPHS["ppo"]()
    wide, narrow = Plan(MeshShape(data=2, tensor=4)), Plan(MeshShape(tensor=4))
    windows = {"train_actor": (Window(0, 8), wide), "critic": (Window(4, 4), narrow)}
    calls = tuple(
        CallPlan(name, *windows.get(name, (Window(0, 4), narrow)), seconds=1.5, params_bytes=2.0)
        for name in graph.order
    )
    fields = {
        "graph": graph,
        "workload": Workload(64, 128, 128, samples=2, minibatches=4),
        "models": dict.fromkeys(graph.roles, "gpt2"),
        "cluster": "1x8xA100",
        "devices": 8,
        "calls": calls,
        "moves": (Move("actor", "reallocate", "train_actor", "generate", 5.0, 0.1),),
        "offloaded": ("reference",),
        "period_seconds": 10.0,
        "bound_seconds": 9.5,
        "timeline": (Busy("generate", "generate", Window(0, 4), 0.0, 1.5),),
        "memory": ((Window(0, 4), ((0.0, 5.0), (1.5, 3.0))),),
        "heuristics": {"colocated": 12.0, "split": float("inf")},
    }
    return ExecutionPlan(**{**fields, **changes})


def test_a_call_waits_for_what_it_reads_and_training_for_every_call_of_its_role():
    graph = GRAPHS["ppo"]()
    assert graph.before("generate") == ()
    assert set(graph.before("train_actor")) == {"generate", "reward", "reference", "critic"}
    assert graph.previous("critic") == ("train_critic",)
    assert graph.previous("reference") == ()
    # A score that nothing reads still comes before the training of its role.
    calls = (Call("train", "m", "train", ("x",)), Call("score", "m", "score", ("x",), ("y",)))
    assert Graph("g", ("x",), calls).order == ("score", "train")


def test_every_built_in_graph_runs_and_is_read_back():
    for make in GRAPHS.values():
        graph = make()
        assert len(graph.order) == len(graph.calls)
        assert Graph.from_record(graph.to_record()) == graph


@pytest.mark.parametrize(
    "calls, message",
    [
        ((), "no calls"),
        ((Call("a", "m", "score", ("y",), ("x",)), Call("b", "m", "score", ("x",), ("y",))), "cycle: . waits for ."),
        ((Call("a", "m", "score", ("nothing",)),), "'a' reads 'nothing', which nothing writes"),
        ((Call("a", "m", "score", ("p",), ("p",)),), "'p' is written by 'a' and 'the inputs'"),
        ((Call("a", "m", "train", ("p",)), Call("b", "m", "train", ("p",))), "both train 'm'"),
        ((Call("a", "m", "train", ("p",)), Call("a", "n", "train", ("p",))), "two calls are named 'a'"),
    ],
)
def test_graphs_that_are_none_are_refused(calls, message):
    with pytest.raises(ValueError, match=message):
        Graph("g", ("p",), calls)


def test_bad_calls_and_workloads_are_refused():
    with pytest.raises(ValueError, match="kind='run'; one of generate, score, train"):
        Call("a", "m", "run", ())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prompts=0"):
        Workload(0, 1, 1)
    with pytest.raises(ValueError, match="12 sequences do not split into minibatches=5; nearest: 4"):
        Workload(6, 1, 1, samples=2, minibatches=5)


def test_execution_plans_survive_json():
    plan = execution()
    again = ExecutionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.gap == pytest.approx(0.05)
    assert again.home("actor").call == "train_actor"
    assert again.home("reference").call == "reference"


def test_execution_plans_that_contradict_themselves_are_refused(tmp_path):
    plan = execution()
    with pytest.raises(ValueError, match=r"has calls .*; the graph 'ppo' has"):
        execution(calls=plan.calls[1:])
    with pytest.raises(ValueError, match=r"'.*' is dispatched before '.*', which it waits for"):
        execution(calls=plan.calls[::-1])
    with pytest.raises(ValueError, match="role 'actor' has no model"):
        execution(models={})
    with pytest.raises(ValueError, match="but there are 4 devices"):
        execution(devices=4)
    with pytest.raises(ValueError, match="has 4 devices, its window 0-7 has 8"):
        dataclasses.replace(plan.call("critic"), window=Window(0, 8))
    with pytest.raises(ValueError, match="offloaded role 'judge' is none of"):
        execution(offloaded=("judge",))
    with pytest.raises(ValueError, match="no execution plan at"):
        ExecutionPlan.load(tmp_path / "none.json")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "version None"),
        (plan.to_json().replace('"calls"', '"c"'), "has no 'calls'"),
    ):
        with pytest.raises(ValueError, match=message):
            ExecutionPlan.from_json(text)
