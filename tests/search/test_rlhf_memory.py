"""What an assignment costs: the timeline, moves, offloading and memory of `simulate`."""

import dataclasses
import itertools

import pytest
from synthetic_rlhf import RandomCosts, SyntheticCosts

from search import parse_cluster
from search.rlhf import GRAPHS, Call, Graph, Option, Window, Workload, simulate
from search.rlhf.anneal import candidates
from search.rlhf.evaluate import Evaluate
from search.rlhf.problem import Problem
from search.rlhf.simulator import simulate_numbered

NODE = parse_cluster("8xA100-80")
WORKLOAD = Workload(64, 128, 128)


class TableCosts(RandomCosts):
    """Moves take 1 second and offloading 0.5 seconds per byte."""

    def move(self, role, source, target):
        same = source[0] == target[0] and source[1].tree == target[1].tree
        return (0.0, 0.0) if same else (1.0, 10.0)

    def offload(self, role, option, nbytes):
        return 0.5 * nbytes


COSTS = TableCosts(0, 1)


def option(devices, seconds, *, params=1.0, working=0.5, state=0.0, tree=0):
    plain = COSTS.options(GRAPHS["ppo"]().calls[0], devices)[0]
    return dataclasses.replace(
        plain, seconds=seconds, params_bytes=params, working_bytes=working, state_bytes=state, tree=tree
    )


def places(**windows):
    """PPO: calls on all devices with the same layout unless told otherwise."""
    out = {name: (Window(0, 8), option(8, 1.0)) for name in GRAPHS["ppo"]().order}
    for name in ("train_actor", "train_critic"):
        out[name] = Window(0, 8), option(8, 2.0, state=3.0)
    return {**out, **windows}


def ppo(places, **settings):
    return simulate(GRAPHS["ppo"](), places, settings.pop("order", None), COSTS, cluster=NODE, **settings)


def test_calls_on_the_same_devices_run_one_after_another():
    found = ppo(places())
    assert found.period == pytest.approx(4 * 1 + 2 * 2)
    assert not found.moves
    assert found.fits
    ends = sorted((busy.start, busy.end) for busy in found.timeline)
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(ends))


def test_the_critic_trains_beside_the_next_generation():
    left, right = Window(0, 4), Window(4, 4)
    apart = places(
        generate=(left, option(4, 5.0)),
        train_actor=(left, option(4, 2.0, state=1.0)),
        reference=(left, option(4, 1.0)),
        reward=(right, option(4, 1.0)),
        critic=(right, option(4, 1.0)),
        train_critic=(right, option(4, 5.0, state=1.0)),
    )
    found = ppo(apart)
    # One iteration alone takes 5 + 1 + 5 on the right; in the long run the left is what is busy all the time.
    assert max(busy.end for busy in found.timeline) - min(busy.start for busy in found.timeline) > 10
    assert found.period == pytest.approx(5 + 2 + 2)


def test_a_copy_is_made_where_the_layout_is_not_the_homes():
    moved = places(generate=(Window(0, 8), option(8, 1.0, params=2.0, tree=1)))
    found = ppo(moved)
    (move,) = found.moves
    assert (move.role, move.kind, move.source, move.target) == ("actor", "reallocate", "train_actor", "generate")
    assert (move.nbytes, move.seconds) == (10.0, 1.0)
    assert found.period == pytest.approx(ppo(places()).period + 1)
    # Homes of four roles with the optimizers of two, and the copy with what generation needs.
    assert found.usage.peak == pytest.approx(4 * 1.0 + 2 * 3.0 + 2.0 + 0.5)
    levels = [nbytes for _, nbytes in found.memory[0][1]]
    assert max(levels) == found.usage.peak
    assert min(levels) == pytest.approx(10.0 + 0.5)  # Another call always runs.


def test_offloading_takes_time_and_gives_room():
    wide = places(generate=(Window(0, 8), option(8, 1.0, working=5.0)))
    plain, away = ppo(wide), ppo(wide, offloaded=("actor",))
    # For generation the parameters come (0.5 s); for training the optimizer too (2 s), and both go back (2 s).
    assert away.period == pytest.approx(plain.period + 0.5 + 2 + 2)
    kinds = [(m.kind, m.target, m.nbytes) for m in away.moves]
    assert kinds == [
        ("onload", "generate", 8 * 1.0),
        ("onload", "train_actor", 8 * 4.0),
        ("offload", "train_actor", 8 * 4.0),
    ]
    # Homes of four roles and two optimizers, and what generation needs; without the actor's optimizer meanwhile.
    assert plain.usage.peak == pytest.approx(4 * 1.0 + 2 * 3.0 + 5.0)
    assert away.usage.peak == pytest.approx(plain.usage.peak - 3.0)
    assert not ppo(wide, usable_bytes=12.0).fits
    assert ppo(wide, usable_bytes=12.0, offloaded=("actor",)).fits


def test_a_frozen_role_with_two_layouts_is_brought_to_its_second_call():
    calls = (
        Call("first", "judge", "score", ("x",), ("a",)),
        Call("second", "judge", "score", ("a",), ("b",)),
    )
    both = {"first": (Window(0, 8), option(8, 1.0)), "second": (Window(0, 4), option(4, 1.0))}
    found = simulate(Graph("g", ("x",), calls), both, None, COSTS, cluster=NODE)
    assert [(m.source, m.target) for m in found.moves] == [("first", "second")]
    # The home stays; nothing waits for a version, so calls follow each other on the devices that they share.
    assert found.period == pytest.approx(1 + 1 + 1)


@pytest.mark.parametrize("seed", range(4))
def test_memory_over_time_is_what_the_search_counts_and_devices_do_one_thing_at_a_time(seed):
    cluster = parse_cluster("2x4xA100-80")
    problem = Problem(GRAPHS["ppo"](), WORKLOAD, cluster, RandomCosts(seed, 2), usable_bytes=1e9)
    options = candidates(problem)
    for step in range(12):
        chosen = {c: options[c][(seed * 97 + step * 31 + c * 17) % len(options[c])] for c in range(6)}
        for offloaded in (frozenset(), frozenset({0, 2}), frozenset(range(4))):
            found = simulate_numbered(problem, chosen, problem.orders[step % len(problem.orders)], offloaded)
            assert max(nbytes for _, levels in found.memory for _, nbytes in levels) == pytest.approx(found.usage.peak)
            assert sum(window.devices for window, _ in found.memory) == 8
            for device in range(8):
                here = [b for b in found.timeline if b.window.first <= device < b.window.end]
                assert sum(b.end - b.start for b in here) <= found.period * (1 + 1e-9)
                for a, b in itertools.combinations(here, 2):
                    shift = (b.start - a.start) % found.period
                    apart = shift >= a.end - a.start - 1e-6 and shift + (b.end - b.start) <= found.period + 1e-6
                    assert apart or min(a.end - a.start, b.end - b.start) < 1e-9


def test_offloading_more_never_shortens_a_period_and_never_needs_more_memory():
    problem = Problem(GRAPHS["ppo"](), WORKLOAD, NODE, RandomCosts(1, 2), usable_bytes=1e9)
    options = candidates(problem)
    for step in range(10):
        chosen = {c: options[c][(step * 31 + c * 17) % len(options[c])] for c in range(6)}
        order = problem.orders[step]
        some = simulate_numbered(problem, chosen, order, frozenset({step % 4}))
        more = simulate_numbered(problem, chosen, order, frozenset({step % 4, (step + 1) % 4}))
        none = simulate_numbered(problem, chosen, order, frozenset())
        assert none.period <= some.period + 1e-9
        assert some.period <= more.period + 1e-9
        assert none.usage.peak >= some.usage.peak - 1e-9
        assert some.usage.peak >= more.usage.peak - 1e-9


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"critic": None}, {}, "call 'critic' has no window and option"),
        ({"critic": (Window(0, 4), option(8, 1.0))}, {}, "'critic': its option is for 8 devices, its window 0-3 has 4"),
        ({"critic": (Window(8, 8), option(8, 1.0))}, {}, "'critic': window 8-15 of a cluster of 8 devices"),
        ({"judge": (Window(0, 8), option(8, 1.0))}, {}, "no call 'judge'"),
        ({}, {"offloaded": ("judge",)}, "role 'judge' is offloaded, but there are only actor, "),
        ({}, {"order": ("generate",)}, "the order generate is not one of the calls"),
    ],
)
def test_assignments_that_are_none_are_refused(change, settings, message):
    given = {name: place for name, place in places(**change).items() if place}
    with pytest.raises(ValueError, match=message):
        ppo(given, **settings)


def test_an_order_against_the_data_is_refused():
    order = ("reward", "generate", "reference", "critic", "train_actor", "train_critic")
    with pytest.raises(ValueError, match="'reward' is dispatched before 'generate', which it waits for"):
        ppo(places(), order=order)


def test_options_that_contradict_themselves_are_refused():
    class Wrong(RandomCosts):
        def options(self, call, devices) -> tuple[Option, ...]:
            return (option(8, float("nan")),)

    problem = Problem(GRAPHS["ppo"](), WORKLOAD, NODE, Wrong(0, 1))
    with pytest.raises(ValueError, match=r"call 'generate' on 8 devices: an option on 8 devices with seconds, .*nan"):
        problem.choices(0, 8)
    with pytest.raises(ValueError, match="call 'generate' on 4 devices: an option on 8 devices"):
        problem.choices(0, 4)


def test_more_room_needs_less_offloading():
    costs = SyntheticCosts(dict.fromkeys(GRAPHS["ppo"]().roles, 7e9), WORKLOAD, 8, strategies=2)
    away = []
    for usable in (60e9, 80e9, 200e9):
        problem = Problem(GRAPHS["ppo"](), WORKLOAD, NODE, costs, usable_bytes=usable, sizes=(8,))
        whole = [(Window(0, 8), problem.choices(call, 8)[0]) for call in range(6)]
        found = Evaluate(problem)(whole)
        away.append(len(found.offloaded) if found.seconds < 1e9 else 9)
    assert away == sorted(away, reverse=True)
    assert away[-1] == 0
