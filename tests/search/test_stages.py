"""Stage cuts against every cut there is."""

import doctest
import itertools

import numpy as np
import pytest

from search import stages as stages_module
from search.schedule_times import makespan
from search.stages import cut_equal_layers, cut_layers, cut_pipeline


def all_edges(L, P):
    return np.array([(0, *cuts, L) for cuts in itertools.combinations(range(1, L), P - 1)])


def sums(layers, edges):
    return np.diff(np.concatenate([[0.0], np.cumsum(layers)])[edges])


def instance(seed, most_layers=14):
    rng = np.random.default_rng(seed)
    L = int(rng.integers(1, most_layers + 1))
    P = int(rng.integers(1, min(L, 6) + 1))
    M = int(rng.choice([1, 2, P, 2 * P, 4 * P, 16]))
    f = rng.integers(1, 4, L).astype(float) if seed % 3 == 0 else rng.random(L)  # whole numbers give ties
    b = 2 * f if seed % 2 else rng.random(L)
    transfer = rng.random(L - 1) * rng.choice([0.0, 0.3, 3.0])
    return L, P, M, f, b, rng.random(L) * 0.5, transfer


def test_docstrings_run():
    assert doctest.testmod(stages_module).failed == 0


def test_cut_layers_equals_every_cut():
    for seed in range(200):
        L, P, M, f, b, w, transfer = instance(seed)
        layers, edges = f + b + w, all_edges(L, P)
        times = sums(layers, edges)
        ways = 2 * np.append(transfer, 0.0)[edges[:, 1:-1] - 1].sum(1)
        cut = cut_layers(layers, stages=P, transfer_seconds=transfer)
        least = times.max(1).min()
        assert cut.bottleneck_seconds == pytest.approx(least)
        at = np.flatnonzero((edges[:, 1:] == np.cumsum(cut.layers_per_stage)).all(1))
        assert ways[at] == pytest.approx(ways[times.max(1) <= least * (1 + 1e-9)].min())  # ties: least transfers
        cut = cut_layers(layers, stages=P, microbatches=M, transfer_seconds=transfer)
        assert cut.objective_seconds == pytest.approx(((M - 1) * times.max(1) + times.sum(1) + ways).min())
        assert sum(cut.layers_per_stage) == L


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1"])
def test_cut_pipeline_equals_simulating_every_cut(schedule):
    for seed in range(120):
        L, P, M, f, b, w, transfer = instance(seed)
        edges = all_edges(L, P)
        times = {
            "forward_seconds": sums(f, edges),
            "backward_seconds": sums(b, edges),
            "weight_seconds": sums(w, edges),
            "transfer_seconds": np.append(transfer, 0.0)[edges[:, 1:-1] - 1],
        }
        best = makespan(schedule, stages=P, microbatches=M, **times).min()
        cut = cut_pipeline(
            f, b, weight_seconds=w, transfer_seconds=transfer, stages=P, microbatches=M, schedule=schedule
        )
        assert cut.objective_seconds == pytest.approx(best)
        assert cut.gap == 0


def test_equal_layers_in_closed_form_equal_the_dynamic_programme():
    rng = np.random.default_rng(0)
    for seed in range(300):
        L = int(rng.integers(1, 50))
        P = int(rng.integers(1, min(L, 8) + 1))
        first, last = (0.0, 0.0) if seed % 3 == 0 else np.round(rng.random(2) * [2, 12], int(rng.integers(0, 3)))
        layers = np.full(L, 0.7)
        layers[0] += 0.7 * first
        layers[-1] += 0.7 * last
        closed = cut_equal_layers(L, stages=P, layer_seconds=0.7, first_layers=first, last_layers=last)
        assert closed.bottleneck_seconds == pytest.approx(cut_layers(layers, stages=P).bottleneck_seconds)
        assert sum(closed.layers_per_stage) == L
        assert min(closed.layers_per_stage) >= 1
        if first == last == 0:
            assert closed.bottleneck_seconds == pytest.approx(0.7 * -(-L // P))
            assert set(closed.layers_per_stage) <= {L // P, -(-L // P)}


def test_slow_head_gets_fewer_layers_and_a_slow_first_stage_hides():
    f = np.ones(32)
    f[-1] += 2
    cut = cut_pipeline(f, 2 * f, stages=4, microbatches=16)
    assert cut.layers_per_stage[-1] < 8
    even = makespan("1f1b", stages=4, microbatches=16, forward_seconds=[8, 8, 8, 10], backward_seconds=[16, 16, 16, 20])
    assert cut.objective_seconds < 0.92 * even


def test_search_cut_short_states_its_gap():
    f = np.ones(24)
    short = cut_pipeline(f, 2 * f, stages=6, microbatches=6, frontier=10)
    full = cut_pipeline(f, 2 * f, stages=6, microbatches=6, frontier=100_000)
    assert full.gap == 0
    assert 0 < short.gap < 0.3
    assert short.bound_seconds <= full.objective_seconds <= short.objective_seconds


def test_scaling_costs_scales_the_cut():
    _, P, M, f, b, w, transfer = instance(7)
    one = cut_pipeline(f, b, weight_seconds=w, transfer_seconds=transfer, stages=P, microbatches=M)
    four = cut_pipeline(4 * f, 4 * b, weight_seconds=4 * w, transfer_seconds=4 * transfer, stages=P, microbatches=M)
    assert four.layers_per_stage == one.layers_per_stage
    assert four.objective_seconds == 4 * one.objective_seconds


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cut_layers([1, 1], stages=3), "2 layers cannot fill 3 stages; at most 2"),
        (lambda: cut_layers([1, -1], stages=1), "layer_seconds holds negative"),
        (
            lambda: cut_layers([1, 1, 1], stages=2, transfer_seconds=[1, 1, 1]),
            "transfer_seconds has 3 numbers; one, or 2",
        ),
        (lambda: cut_layers([1, 1, 1], stages=2, microbatches=0), "microbatches=0"),
        (lambda: cut_equal_layers(4, stages=0), "stages=0"),
        (lambda: cut_equal_layers(4, stages=2, last_layers=-1), "last_layers holds negative"),
        (lambda: cut_pipeline([1, 1], [1, 1, 1], stages=2, microbatches=2), "forward_seconds has 2 numbers; one, or 3"),
        (lambda: cut_pipeline([1, 1], 1, stages=2, microbatches=2, schedule="x"), "'x' is unknown"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
