"""The exact search over execution plans: against every plan one by one, heuristics and MCMC; its certificate."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_rlhf import RandomCosts, SyntheticCosts

from search import parse_cluster
from search.rlhf import GRAPHS, Call, ExecutionPlan, Graph, Workload, heuristics, simulate, solve
from search.rlhf.anneal import candidates, mcmc
from search.rlhf.bounds import never_together
from search.rlhf.brute import brute_force
from search.rlhf.evaluate import Evaluate
from search.rlhf.problem import Problem
from search.rlhf.simulator import simulate_numbered
from search.rlhf.solver import _Search, minimise

WORKLOAD = Workload(64, 128, 128)
ONE = parse_cluster("8xA100-80")
FOUR = parse_cluster("4x2xA100-80")


def rescore():
    """A graph with a call of the actor beside generation and training, and a frozen role with two calls."""
    return Graph(
        "rescore",
        ("prompts",),
        (
            Call("generate", "actor", "generate", ("prompts",), ("completions",)),
            Call("judge", "judge", "score", ("completions",), ("verdicts",)),
            Call("check", "judge", "score", ("prompts",), ("kinds",)),
            Call("train", "actor", "train", ("completions", "verdicts", "kinds")),
        ),
    )


def ppo_costs(workload=WORKLOAD, size=7e9, strategies=3):
    return SyntheticCosts(dict.fromkeys(GRAPHS["ppo"]().roles, size), workload, 8, strategies=strategies)


CASES = [
    # graph, cluster, sizes, options, offload, usable
    ("grpo", ONE, (2, 4, 8), 2, True, 9.0),
    ("grpo", FOUR, (1, 2, 4), 1, True, 8.0),
    ("grpo", FOUR, (2, 4, 6, 8), 1, False, 99.0),
    ("dpo", ONE, (1, 2, 4, 8), 3, True, 4.5),
    ("ppo", ONE, (2, 8), 1, False, 99.0),
    ("ppo", FOUR, (4, 8), 1, False, 14.0),
    ("ppo", ONE, (8,), 2, True, 8.5),
    ("rescore", ONE, (2, 4, 8), 2, True, 8.0),
    ("rescore", FOUR, (2, 6), 2, False, 99.0),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_search_finds_what_trying_everything_finds(case):
    name, cluster, sizes, count, offload, usable = CASES[case]
    graph = rescore() if name == "rescore" else GRAPHS[name]()
    for seed in range(1 if name == "ppo" else 2):
        costs = RandomCosts(10 * case + seed, count, sizes=(*sizes, 6))
        problem = Problem(graph, WORKLOAD, cluster, costs, usable_bytes=usable, sizes=sizes)
        every = brute_force(problem, candidates(problem), offload=offload)
        for dominance in (True, False):
            found = minimise(Evaluate(problem, offload=offload), dominance=dominance)
            assert found.finished
            if every.seconds == math.inf:
                assert found.best is None
                continue
            assert found.best is not None
            assert found.best.seconds == pytest.approx(every.seconds, rel=1e-8)
            assert found.bound == pytest.approx(every.seconds, rel=1e-8)
            names = [call.name for call in problem.calls]
            again = simulate(
                graph,
                dict(zip(names, found.best.places, strict=True)),
                [names[i] for i in found.best.order],
                costs,
                cluster=cluster,
                offloaded=[problem.roles[i] for i in found.best.offloaded],
                usable_bytes=usable,
            )
            assert again.fits
            assert again.period == pytest.approx(found.best.seconds)


def test_some_of_the_cases_need_offloading_and_some_do_not_fit_at_all():
    kinds = set()
    for usable in (3.0, 6.0, 99.0):
        problem = Problem(GRAPHS["grpo"](), WORKLOAD, ONE, RandomCosts(1, 2), usable_bytes=usable, sizes=(4, 8))
        every = brute_force(problem, candidates(problem))
        best = minimise(Evaluate(problem)).best
        kinds.add("none" if best is None else bool(best.offloaded))
        assert (best is None) == (every.seconds == math.inf)
    assert kinds == {"none", True, False}


@given(st.integers(0, 10**6), st.sampled_from([1, 5, 20]))
@settings(max_examples=15)
def test_a_search_that_is_stopped_has_a_bound_below_the_best(seed, parts):
    problem = Problem(GRAPHS["grpo"](), WORKLOAD, ONE, RandomCosts(seed, 2), usable_bytes=12.0, sizes=(4, 8))
    best = minimise(Evaluate(problem))
    stopped = minimise(Evaluate(problem), parts=parts)
    if best.best is not None:
        assert stopped.bound <= best.best.seconds * (1 + 1e-8)
        assert stopped.best is None or stopped.best.seconds >= best.best.seconds * (1 - 1e-8)


@pytest.mark.parametrize("name, size", [("8xA100-80", 7e9), ("2x8xA100-80", 13e9), ("v5p-16", 7e9)])
def test_nothing_that_people_use_is_better(name, size):
    cluster = parse_cluster(name)
    costs = ppo_costs(size=size, strategies=2)
    found = solve(GRAPHS["ppo"](), WORKLOAD, cluster, costs, time_limit=60)
    best = found.execution
    assert best is not None
    assert found.gap <= 0.05
    assert {"colocated", "real", "shipped", "split", "standalone"} == set(best.heuristics)
    assert best.period_seconds <= min(best.heuristics.values()) * (1 + 1e-9)
    known = heuristics(GRAPHS["ppo"](), WORKLOAD, cluster, costs)
    for key, plan in known.items():
        assert best.heuristics[key] in (pytest.approx(plan.period_seconds), math.inf)
        assert ("does not fit" in plan.reason) == (best.heuristics[key] == math.inf)
    assert len({plan.window for plan in known["colocated"].calls}) == 1
    split = {plan.call: plan.window for plan in known["split"].calls}
    assert split["generate"] == split["reference"] == split["train_actor"]
    assert not split["critic"].overlaps(split["generate"])
    alone = {known["standalone"].home(role).window for role in ("actor", "critic", "reward", "reference")}
    assert not any(a.overlaps(b) for a, b in itertools.combinations(alone, 2))


def test_sizes_that_are_left_out_are_in_no_plan():
    found = solve(GRAPHS["grpo"](), WORKLOAD, ONE, RandomCosts(3, 1), sizes=(2, 4), usable_bytes=99.0)
    assert found.execution is not None
    assert {call.window.devices for call in found.execution.calls} <= {2, 4}
    assert found.gap == 0
    assert "colocated" not in found.execution.heuristics
    assert "split" in found.execution.heuristics


def test_the_plan_is_complete():
    roles = {"actor": "llama-2-7b", "reference": "llama-2-7b", "critic": "tiny", "reward": "tiny"}
    sizes = {"actor": 7e9, "reference": 7e9, "critic": 1e9, "reward": 1e9}
    costs = SyntheticCosts(sizes, WORKLOAD, 8, strategies=2)
    said = []
    found = solve(GRAPHS["ppo"](), WORKLOAD, ONE, costs, models=roles, time_limit=60, tell=said.append)
    plan = found.execution
    assert plan is not None
    assert ExecutionPlan.from_json(plan.to_json()) == plan
    assert plan.models == roles
    assert plan.bound_seconds == pytest.approx(plan.period_seconds)
    assert plan.search["finished"]
    assert plan.search["evaluations"] == found.evaluations > 0
    assert "no plan of the space is faster" in plan.reason
    assert {busy.what for busy in plan.timeline} >= set(plan.graph.order)
    assert sum(window.devices for window, _ in plan.memory) == plan.devices
    assert max(b for _, levels in plan.memory for _, b in levels) <= plan.usable_bytes
    for move in plan.moves:
        assert any(move.kind == busy.kind and move.role in busy.what for busy in plan.timeline)
    for call in plan.calls:
        assert call.seconds > 0
        assert call.params_bytes > 0
    assert any("branch and bound" in text for text in said)
    assert set(found.others) == set(plan.heuristics)


DETERMINED = """
import json
from synthetic_rlhf import RandomCosts
from search import parse_cluster
from search.rlhf import GRAPHS, Workload, solve
found = solve(GRAPHS["grpo"](), Workload(64, 128, 128), parse_cluster("8xA100-80"), RandomCosts(3, 2), usable_bytes=9.0)
plan = json.loads(found.execution.to_json())
del plan["search"]["seconds"]
print(json.dumps(plan, sort_keys=True))
"""


def test_the_same_input_gives_the_same_plan_whatever_the_hash_seed():
    children = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join((os.getcwd(), "tests"))}
        children.append(subprocess.Popen([sys.executable, "-c", DETERMINED], env=env, stdout=subprocess.PIPE))
    first, second = (child.communicate(timeout=120)[0] for child in children)
    assert json.loads(first) == json.loads(second)


def test_mcmc_with_ten_times_the_evaluations_is_never_better():
    for name, seed in (("ppo", 0), ("grpo", 1), ("grpo", 2)):
        problem = Problem(GRAPHS[name](), WORKLOAD, ONE, RandomCosts(seed, 2), usable_bytes=14.0, sizes=(4, 8))
        found = minimise(Evaluate(problem))
        assert found.best is not None
        walk = Evaluate(problem)
        walked = mcmc(walk, candidates(problem), evaluations=min(10 * found.parts, 2000), seed=seed)
        assert walk.count > 20
        assert found.best.seconds <= walked.seconds * (1 + 1e-9)


def test_calls_that_wait_for_each_other_both_ways_never_run_at_the_same_time():
    problem = Problem(GRAPHS["ppo"](), WORKLOAD, ONE, RandomCosts(0, 1))
    apart = never_together(problem)
    names = [call.name for call in problem.calls]

    def of(name):
        return {names[i] for i in range(len(names)) if apart[names.index(name)] >> i & 1}

    assert of("generate") == {"reward", "reference", "critic", "train_actor"}
    assert of("train_critic") == {"critic"}  # It may run beside the next generation, and beside the actor's training.
    assert of("reward") == {"generate", "train_actor"}


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_no_assignment_is_faster_than_the_bounds_that_add_up(seed):
    name, cluster = ("ppo", ONE) if seed % 2 else ("rescore", FOUR)
    graph = rescore() if name == "rescore" else GRAPHS[name]()
    problem = Problem(graph, WORKLOAD, cluster, RandomCosts(seed, 2), usable_bytes=1e9)
    search = _Search(Evaluate(problem), {}, {}, dominance=False)
    options = candidates(problem)
    for step in range(6):
        chosen = {c: options[c][(seed + step * 31 + c * 17) % len(options[c])] for c in range(problem.count)}
        roles = frozenset(range(step % (len(problem.roles) + 1)))
        terms = [
            search.bounds.terms(c, np.array([option.seconds]), window.devices)[:, 0]
            for c, (window, option) in chosen.items()
        ]
        least = search.bounds.with_moves(sum(terms), *search.moving(chosen, roles))
        for order in problem.orders[:3]:
            assert least <= simulate_numbered(problem, chosen, order, roles).period * (1 + 1e-9)
        assert search.bounds.root <= least * (1 + 1e-9)


def test_a_graph_with_very_many_orders_has_a_plan_and_no_proof():
    calls = tuple(Call(f"score{i}", f"role{i}", "score", ("x",), (f"y{i}",)) for i in range(7))
    graph = Graph("wide", ("x",), calls)
    found = solve(graph, WORKLOAD, ONE, RandomCosts(0, 1, sizes=(8,)), time_limit=10, sizes=(8,))
    assert found.execution is not None
    assert not found.execution.search["every_order"]
    assert "of 720 orders of dispatch" in found.execution.reason
    assert 0 <= found.gap < 1


def test_a_short_time_limit_gives_a_plan_with_its_gap():
    cluster = parse_cluster("8x8xA100-80")
    found = solve(GRAPHS["ppo"](), WORKLOAD, cluster, ppo_costs(), time_limit=0.5)
    assert found.execution is not None
    assert 0 <= found.gap < 1
    assert found.execution.bound_seconds <= found.execution.period_seconds
    assert found.execution.gap == pytest.approx(found.gap)


@pytest.mark.parametrize(
    "usable, offload, message",
    [
        # One role alone is too large; together they are; and only without offloading.
        (2e9, True, r"role 'actor' \(big\), call 'generate' needs .* GiB per device .* more than the 1.86 GiB usable"),
        (14e9, True, r"every role fits by itself, but together|role 'actor'"),
        (21e9, False, r"offloading of idle roles \(it fits with that\)"),
    ],
)
def test_where_nothing_fits_the_advice_says_what_would_help(usable, offload, message):
    models = dict.fromkeys(GRAPHS["ppo"]().roles, "big")
    costs = ppo_costs(strategies=9)
    found = solve(
        GRAPHS["ppo"](), WORKLOAD, ONE, costs, models=models, usable_bytes=usable, offload=offload, time_limit=60
    )
    assert found.execution is None
    assert found.bound == math.inf
    assert "It would fit with" in found.advice
    assert re.search(message, found.advice), found.advice


def test_a_role_without_an_option_is_named():
    class Nothing(RandomCosts):
        def options(self, call, devices):
            return () if call.role == "reward" else super().options(call, devices)

    found = solve(GRAPHS["ppo"](), WORKLOAD, ONE, Nothing(0, 1), usable_bytes=99.0)
    assert found.execution is None
    assert "role 'reward' (reward), call 'reward' has no option on any window (1, 2, 4, 8 devices)" in found.advice


def test_a_role_that_fits_on_no_window_is_told_with_the_bytes_it_lacks():
    class Fitting(SyntheticCosts):
        """Has only what fits, and can be asked about other machines."""

        usable = 9e9

        def options(self, call, devices):
            return tuple(o for o in super().options(call, devices) if needs(o) <= self.usable)

        def on(self, cluster):
            more = Fitting(self.sizes, self.workload, self.per_node)
            more.usable = self.usable * cluster.accelerator.memory_bytes / ONE.accelerator.memory_bytes
            return more

    def needs(option):
        return option.params_bytes + option.state_bytes + option.working_bytes

    costs = Fitting(dict.fromkeys(GRAPHS["ppo"]().roles, 7e9), WORKLOAD, 8)
    found = solve(GRAPHS["ppo"](), WORKLOAD, ONE, costs, usable_bytes=9e9)
    least = min(needs(o) for o in SyntheticCosts.options(costs, GRAPHS["ppo"]().call("train_actor"), 8))
    assert found.execution is None
    assert "role 'actor' (actor), call 'train_actor' needs" in found.advice
    assert f"that is {(least - 9e9) / 2**30:.2f} GiB more than the 8.38 GiB usable" in found.advice


def test_bad_arguments_are_refused():
    graph, costs = GRAPHS["dpo"](), RandomCosts(0, 1)
    with pytest.raises(ValueError, match="time_limit=0"):
        solve(graph, WORKLOAD, ONE, costs, time_limit=0)
    with pytest.raises(ValueError, match="role 'reference' has no model; there are models for actor"):
        solve(graph, WORKLOAD, ONE, costs, models={"actor": "m"})
    with pytest.raises(ValueError, match="no window of 8xA100-80 has 5 devices"):
        solve(graph, WORKLOAD, ONE, costs, sizes=(5,))


def test_one_device_has_a_plan():
    one = parse_cluster("1xA100-80")
    costs = SyntheticCosts(dict.fromkeys(("actor", "reference"), 1e9), WORKLOAD, 1)
    found = solve(GRAPHS["dpo"](), WORKLOAD, one, costs)
    assert found.execution is not None
    assert found.gap == 0
    assert set(found.execution.heuristics) <= {"colocated", "real"}
    assert {busy.what for busy in found.execution.timeline} >= {"reference", "train_actor"}


@pytest.mark.parametrize("name, cluster, sizes, count", [("grpo", ONE, (2, 4, 8), 2), ("ppo", FOUR, (4, 8), 1)])
def test_synchronous_iterations_do_not_overlap(name, cluster, sizes, count):
    graph = GRAPHS[name]()
    costs = RandomCosts(5, count, sizes=sizes)
    options = {"usable_bytes": 99.0, "sizes": sizes}
    free = solve(graph, WORKLOAD, cluster, costs, offload=False, **options)
    found = solve(graph, WORKLOAD, cluster, costs, offload=False, synchronous=True, **options)
    assert found.execution is not None
    assert free.execution is not None
    assert found.gap == 0
    # The whole of an iteration lies within its period.
    timeline = found.execution.timeline
    assert min(busy.start for busy in timeline) == pytest.approx(0)
    assert max(busy.end for busy in timeline) == pytest.approx(found.execution.period_seconds)
    assert found.execution.period_seconds >= free.execution.period_seconds - 1e-12
    problem = Problem(graph, WORKLOAD, cluster, costs, synchronous=True, **options)
    assert brute_force(problem, candidates(problem), offload=False).seconds == pytest.approx(
        found.execution.period_seconds
    )
