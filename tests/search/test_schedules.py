"""Schedules against their published orders and closed forms, the simulator against longest paths, tables on tokens."""

import dataclasses
import doctest
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import schedule_table, schedule_times, schedules
from search.schedule_table import NONE, lockstep, lockstep_seconds, validate_table
from search.schedule_times import makespan, makespan_bound
from search.schedules import Op, Schedule, make_schedule, peak_in_flight, simulate, validate

RANKS = (1, 2, 3, 4, 8)
GRID = [
    (name, P, V, k * P)
    for name, chunks in (("gpipe", (1, 2, 3, 4)), ("1f1b", (1,)), ("interleaved", (1, 2, 3, 4)), ("zb_h1", (1,)))
    for P in RANKS
    for V in chunks
    for k in (1, 2, 4)
]
RAGGED = [(name, P, 1, M) for name in ("gpipe", "1f1b", "zb_h1") for P in (2, 4) for M in (1, 3, 5, 7)]


def uniform(name, P, V, M, *, f=1.0, b=1.0, w=1.0, transfer=0.0):
    """One stage's work is the same for every V: virtual stages take 1/V of it."""
    schedule = make_schedule(name, stages=P, chunks=V, microbatches=M)
    return simulate(
        schedule, forward_seconds=f / V, backward_seconds=b / V, weight_seconds=w / V, transfer_seconds=transfer
    )


def random_times(seed, L, *, transfers=0.5):
    rng = np.random.default_rng(seed)
    return {
        "forward_seconds": rng.random(L),
        "backward_seconds": rng.random(L),
        "weight_seconds": rng.random(L),
        "transfer_seconds": rng.random(L - 1) * transfers if L > 1 else 0.0,
    }


def longest_path(schedule, forward_seconds, backward_seconds, weight_seconds, transfer_seconds):
    """Relax all edges of the dependency graph until nothing changes: no order of operations is assumed."""
    P, L = schedule.stages, schedule.stages * schedule.chunks
    nodes = {op: i for i, op in enumerate(op for order in schedule.orders for op in order)}
    edges = [(nodes[a], nodes[b], 0.0) for order in schedule.orders for a, b in itertools.pairwise(order)]
    for (kind, s, m), node in nodes.items():
        if kind == "F" and s + 1 < L:
            hop = transfer_seconds[s] if P > 1 else 0.0
            edges.append((node, nodes["F", s + 1, m], hop))
            edges.append((nodes["B", s + 1, m], nodes["B", s, m], hop))
        if kind == "F":
            edges.append((node, nodes["B", s, m], 0.0))
        if kind == "W":
            edges.append((nodes["B", s, m], node, 0.0))
    backward = backward_seconds if schedule.split_backward else backward_seconds + weight_seconds
    seconds = {"F": forward_seconds, "B": backward, "W": weight_seconds}
    duration = np.array([seconds[kind][s] for kind, s, _ in nodes])
    source, target, hop = (np.array(column) for column in zip(*edges, strict=True))
    start = np.zeros(len(nodes))
    while True:
        new = start.copy()
        np.maximum.at(new, target, start[source] + duration[source] + hop)
        if np.array_equal(new, start):
            return (start + duration).max()
        start = new


def megatron_order(P, V, M, rank):
    """Megatron-LM's forward_backward_pipelining_with(out)_interleaving, as its paper and code describe it."""
    total = M * V
    warmup = min(total, P - rank - 1 if V == 1 else (P - rank - 1) * 2 + (V - 1) * P)

    def op(kind, k):
        chunk = k % (P * V) // P
        chunk = V - 1 - chunk if kind == "B" else chunk
        return Op(kind, chunk * P + rank, k // (P * V) * P + k % P if V > 1 else k)

    order = [op("F", k) for k in range(warmup)]
    for k in range(total - warmup):
        order += [op("F", warmup + k), op("B", k)]
    return (*order, *(op("B", k) for k in range(total - warmup, total)))


@pytest.mark.parametrize("module", [schedules, schedule_times, schedule_table])
def test_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name, P, V, M", GRID + RAGGED)
def test_named_schedules_are_valid_and_survive_json(name, P, V, M):
    schedule = make_schedule(name, stages=P, chunks=V, microbatches=M)
    validate(schedule)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.split_backward == (name == "zb_h1")


@pytest.mark.parametrize("P", RANKS)
@pytest.mark.parametrize("V", [1, 2, 3, 4])
def test_orders_are_megatrons(P, V):
    for M in (P, 2 * P, 4 * P):
        for name in ("interleaved", "1f1b") if V == 1 else ("interleaved",):
            schedule = make_schedule(name, stages=P, chunks=V, microbatches=M)
            assert schedule.orders == tuple(megatron_order(P, V, M, rank) for rank in range(P))


@pytest.mark.parametrize("name, P, V, M", GRID + RAGGED)
def test_uniform_times_equal_closed_forms(name, P, V, M):
    f, b, w = 3.0 * V, 4.0 * V, 2.0 * V
    timeline = uniform(name, P, V, M, f=f, b=b, w=w)
    ideal = M * (f + b + w)
    if name == "zb_h1":
        assert timeline.in_flight == (min(M, P),) * P
        if M >= P:
            assert timeline.makespan_seconds == pytest.approx(ideal + (P - 1) * (f + b - w))
        return
    assert timeline.makespan_seconds == pytest.approx(ideal + (P - 1) * (f + b + w) / V)
    assert timeline.bubble_overhead == pytest.approx((P - 1) / (V * M))
    assert timeline.bubble_fraction == pytest.approx((P - 1) / (V * M + P - 1))
    if name == "gpipe":
        assert timeline.in_flight == (M * V,) * P
    elif V == 1:
        assert timeline.in_flight == tuple(min(M, P - rank) for rank in range(P))
    else:
        assert max(timeline.in_flight) == min(P * V + P - 1, M * V)


@pytest.mark.parametrize("name, P, V, M", GRID + RAGGED)
def test_simulator_fast_path_and_bound_agree_with_longest_path(name, P, V, M):
    schedule = make_schedule(name, stages=P, chunks=V, microbatches=M)
    sizes = {"stages": P, "chunks": V, "microbatches": M}
    for seed in range(2):
        times = random_times(seed, P * V)
        timeline = simulate(schedule, **times)
        assert timeline.makespan_seconds == pytest.approx(longest_path(schedule, **times), rel=1e-12)
        assert makespan(name, **sizes, **times) == timeline.makespan_seconds  # to the last bit
        assert makespan_bound(name, **sizes, **times) <= timeline.makespan_seconds * (1 + 1e-12)


@pytest.mark.parametrize(
    "name, V, expected", [("gpipe", 1, 57), ("1f1b", 1, 57), ("interleaved", 2, 52.5), ("interleaved", 4, 50.25)]
)
def test_published_numbers_of_four_stages(name, V, expected):
    """P = 4, M = 16, F = 1, B + W = 2: work 48. ZB-H1's hand-made schedule takes 51."""
    assert uniform(name, 4, V, 16).makespan_seconds == expected
    assert uniform("zb_h1", 4, 1, 16).makespan_seconds == 51


def test_costs_of_a_compiled_stage_give_the_prototypes_numbers():
    """F 5.4, B 11.4, W 4.7 Mcycles of a TPU stage, M = 16, P = 4: 1F1B 408, V=2 376, V=4 360, ZB-H1 below 1F1B."""
    costs = {"f": 5.4, "b": 11.4, "w": 4.7}
    assert uniform("1f1b", 4, 1, 16, **costs).makespan_seconds == pytest.approx(408, abs=1)
    assert uniform("interleaved", 4, 2, 16, **costs).makespan_seconds == pytest.approx(376, abs=1)
    assert uniform("interleaved", 4, 4, 16, **costs).makespan_seconds == pytest.approx(360, abs=1)
    assert uniform("zb_h1", 4, 1, 16, **costs).makespan_seconds == pytest.approx(344 + 3 * (5.4 + 11.4 - 4.7), abs=1)


@pytest.mark.parametrize("P, x", [(1, 0.3), (2, 0.3), (4, 0.3), (8, 0.125)])
def test_one_f_one_b_pays_transfers_per_group_of_stages(P, x):
    """Pipette's hidden path: every P microbatches cost P (f + b) + 2 (P-1) transfer, though transfers overlap."""
    f, b = 1.0, 2.0

    def seconds(name, M):
        return uniform(name, P, 1, M, f=f, b=b, w=0.0, transfer=x).makespan_seconds

    for M in (1, 2, P + 1, 2 * P, 3 * P, 3 * P + 1, 4 * P):
        closed = (M + P - 1) * (f + b) + 2 * x * (P - 1 + (M - 1) - -(-(M - 1) // P))
        assert seconds("1f1b", M) == pytest.approx(closed)
        sizes = {"stages": P, "microbatches": M}
        times = {"forward_seconds": f, "backward_seconds": b, "transfer_seconds": x}
        assert makespan_bound("1f1b", **sizes, **times) == pytest.approx(closed)
        assert seconds("gpipe", M) == pytest.approx((M + P - 1) * (f + b) + 2 * x * (P - 1))  # pays them once
    for g in (2, 3):
        assert seconds("1f1b", (g + 1) * P) - seconds("1f1b", g * P) == pytest.approx(P * (f + b) + 2 * (P - 1) * x)


@pytest.mark.parametrize("P", RANKS)
def test_bound_is_the_makespan_where_it_says_so(P):
    for V in (1, 2, 3):
        for name in ("gpipe", "interleaved"):
            sizes = {"stages": P, "chunks": V, "microbatches": 2 * P}
            times = {"forward_seconds": 2.0, "backward_seconds": 3.0}
            assert makespan_bound(name, **sizes, **times) == pytest.approx(makespan(name, **sizes, **times))
    times = random_times(0, P)
    for M in (1, 5, 2 * P):
        sizes = {"stages": P, "microbatches": M}
        assert makespan_bound("gpipe", **sizes, **times) == pytest.approx(makespan("gpipe", **sizes, **times))


@st.composite
def cases(draw):
    name, V = draw(st.sampled_from([("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1)]))
    P = draw(st.integers(1, 5))
    return name, P, V, draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.5, 5.0]))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_random_times_obey_bounds_and_scale(case):
    name, P, V, seed, transfers = case
    times = random_times(seed, P * V, transfers=transfers)
    seconds, bounds = [], []
    for M in (P, 2 * P, 3 * P, 4 * P):
        sizes = {"stages": P, "chunks": V, "microbatches": M}
        seconds.append(float(makespan(name, **sizes, **times)))
        bounds.append(float(makespan_bound(name, **sizes, **times)))
        doubled = {key: 2 * np.asarray(value) for key, value in times.items()}
        assert makespan(name, **sizes, **doubled) == 2 * seconds[-1]
        slower = {**times, "forward_seconds": times["forward_seconds"] + 0.1}
        assert makespan(name, **sizes, **slower) >= seconds[-1]
        work = sum(times[key].reshape(V, P).sum(0) for key in times if key != "transfer_seconds")
        assert seconds[-1] >= M * work.max() * (1 - 1e-12)
    assert np.all(np.array(bounds) <= np.array(seconds) * (1 + 1e-12))
    if transfers:
        return  # long transfers are paid again by each group of P microbatches: the bubble then has no order
    per_microbatch = np.array(seconds) / np.arange(1, 5)  # the bubble fraction is 1 - work / this
    assert np.all(np.diff(per_microbatch) <= 1e-9), "more microbatches raised the bubble fraction"


def test_zero_bubble_never_loses_to_one_f_one_b():
    rng = np.random.default_rng(0)
    for P in (2, 3, 4, 8):
        times = {key: rng.random((50, 1)) for key in ("forward_seconds", "backward_seconds", "weight_seconds")}
        for M in (1, P, 3 * P):
            sizes = {"stages": P, "microbatches": M}
            assert np.all(makespan("zb_h1", **sizes, **times) <= makespan("1f1b", **sizes, **times) * (1 + 1e-12))


def test_busy_and_idle_tile_the_makespan():
    schedule = make_schedule("interleaved", stages=3, chunks=2, microbatches=6)
    timeline = simulate(schedule, **random_times(3, 6))
    for rank in range(3):
        assert tuple(item.op for item in timeline.busy[rank]) == schedule.orders[rank]
        pieces = sorted([item[1:] for item in timeline.busy[rank]] + list(timeline.idle[rank]))
        assert pieces[0][0] == 0
        assert pieces[-1][1] == timeline.makespan_seconds
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    idle = sum(b - a for rank in timeline.idle for a, b in rank)
    assert timeline.bubble_fraction == pytest.approx(idle / (3 * timeline.makespan_seconds))


def test_activation_bytes_count_per_stage():
    schedule = make_schedule("1f1b", stages=2, microbatches=4)
    assert peak_in_flight(schedule, [10, 7]) == (20.0, 7.0)


def test_makespan_takes_many_candidates(monkeypatch):
    rng = np.random.default_rng(0)
    f, b, x = rng.random((5, 1, 4)), rng.random((3, 1)), rng.random(3)
    sizes = {"stages": 4, "microbatches": 6}
    together = makespan("1f1b", **sizes, forward_seconds=f, backward_seconds=b, transfer_seconds=x)
    assert together.shape == (5, 3)
    alone = makespan("1f1b", **sizes, forward_seconds=f[2, 0], backward_seconds=b[1], transfer_seconds=x)
    assert together[2, 1] == alone
    monkeypatch.setattr(schedule_times, "_BLOCK_NUMBERS", 100)  # in blocks of one candidate
    blocks = makespan("1f1b", **sizes, forward_seconds=f, backward_seconds=b, transfer_seconds=x)
    assert np.array_equal(together, blocks)
    assert makespan("1f1b", **sizes, forward_seconds=np.ones((0, 4)), backward_seconds=1.0).shape == (0,)


# Tables.


@pytest.mark.parametrize("name, P, V, M", [case for case in GRID + RAGGED if case[0] != "zb_h1"])
def test_lockstep_table_reads_what_it_should_in_closed_form(name, P, V, M):
    schedule = make_schedule(name, stages=P, chunks=V, microbatches=M)
    table = lockstep(schedule)
    validate_table(table)
    assert lockstep_seconds(table, forward_seconds=1, backward_seconds=2) == (M * V + P - 1) * 3
    assert lockstep_seconds(table, forward_seconds=1, backward_seconds=2) == pytest.approx(
        simulate(schedule, forward_seconds=1, backward_seconds=2).makespan_seconds
    )
    if name == "gpipe":
        assert table.in_flight == (M * V,) * P
        assert table.ticks == 2 * (M * V + P - 1)
    else:
        assert table.ticks == M * V + P * V + P - 2
        if V == 1:
            assert table.in_flight == tuple(min(M, 2 * (P - rank) - 1) for rank in range(P))
        else:  # Megatron's own order, and its memory
            assert table.in_flight == peak_in_flight(schedule)
            assert max(table.in_flight) == min(P * V + P - 1, M * V)
    assert table.slots - max(table.in_flight) in (0, 1)
    if name != "gpipe" and M > 2 * P - 1:
        assert table.slots == max(table.in_flight)  # idle forwards find a dead slot


def test_phases_are_warmup_steady_cooldown():
    table = lockstep(make_schedule("interleaved", stages=4, chunks=2, microbatches=8))
    assert [tuple(phase) for phase in table.phases] == [(0, 7, True, False), (7, 19, True, True), (19, 26, False, True)]
    table = lockstep(make_schedule("gpipe", stages=4, microbatches=8))
    assert [tuple(phase) for phase in table.phases] == [(0, 11, True, False), (11, 22, False, True)]


def changed(table, name, at, value):
    column = getattr(table, name).copy()
    column[at] = value
    return dataclasses.replace(table, **{name: column})


@pytest.mark.parametrize(
    "name, at, value, message",
    [
        ("forward_slot", (3, 0), 2, "reads"),
        ("backward_slot", (9, 0), 5, r"tick 9 rank 0: B\(stage 0, microbatch 3\) reads \('F', 0, 5\)"),
        ("forward_microbatch", (4, 1), 5, r"tick 4 rank 1: F\(stage 1, microbatch 5\) reads \('F', 0, 3\)"),
        ("backward_microbatch", (12, 0), NONE, r"B\(stage 0, microbatch 6\) is missing"),
        ("forward_slot", (3, 0), 99, "slot 99 is outside"),
    ],
)
def test_damaged_table_is_refused(name, at, value, message):
    table = lockstep(make_schedule("1f1b", stages=4, microbatches=8))
    with pytest.raises(ValueError, match=message):
        validate_table(changed(table, name, at, value))


def test_lockstep_refuses_what_it_would_slow_down():
    with pytest.raises(ValueError, match="longest of F, B and W"):
        lockstep(make_schedule("zb_h1", stages=2, microbatches=2))
    schedule = make_schedule("1f1b", stages=2, microbatches=2)
    with pytest.raises(ValueError, match="orders are not those of '1f1b'"):
        lockstep(dataclasses.replace(schedule, orders=make_schedule("gpipe", stages=2, microbatches=2).orders))


# Errors.


def with_order(rank, change):
    schedule = make_schedule("1f1b", stages=2, microbatches=2)
    orders = [list(order) for order in schedule.orders]
    change(orders[rank])
    return dataclasses.replace(schedule, orders=tuple(tuple(order) for order in orders))


@pytest.mark.parametrize(
    "rank, change, message",
    [
        (1, lambda order: order.pop(), r"B\(stage 1, microbatch 1\) is missing on rank 1"),
        (0, lambda order: order.append(order[0]), r"position 4: F\(stage 0, microbatch 0\) runs twice"),
        (0, lambda order: order.append(Op("F", 1, 0)), r"F\(stage 1, microbatch 0\) belongs on rank 1"),
        (0, lambda order: order.append(Op("F", 2, 0)), "outside of 2 virtual stages"),
        (0, lambda order: order.append(Op("G", 0, 0)), "kind 'G' is unknown"),
        (0, lambda order: order.append(Op("W", 0, 0)), r"W\(stage 0, microbatch 1\) is missing"),
        (
            1,
            lambda order: order.reverse(),
            r"rank 1 at B\(stage 1, microbatch 1\) waits for F\(stage 1, microbatch 1\)",
        ),
    ],
)
def test_schedule_that_cannot_run_names_the_operation(rank, change, message):
    with pytest.raises(ValueError, match=message):
        validate(with_order(rank, change))


def test_deadlock_across_ranks_is_told_rank_by_rank():
    schedule = with_order(0, lambda order: order.insert(0, order.pop(2)))  # B of microbatch 0 before any forward
    with pytest.raises(
        ValueError, match=r"deadlocks: rank 0 at B\(stage 0.*rank 1 at F\(stage 1, microbatch 0\) waits"
    ):
        simulate(schedule, forward_seconds=1, backward_seconds=1)


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("gpip", {"stages": 2, "microbatches": 2}, "'gpip' is unknown; one of gpipe, 1f1b"),
        ("1f1b", {"stages": 0, "microbatches": 2}, "stages=0"),
        ("1f1b", {"stages": 2, "microbatches": 2.5}, "microbatches=2.5"),
        ("1f1b", {"stages": 2, "chunks": 2, "microbatches": 2}, "use 'interleaved'"),
        ("interleaved", {"stages": 4, "chunks": 2, "microbatches": 6}, "got 6; nearest: 4 or 8"),
        ("interleaved", {"stages": 4, "chunks": 2, "microbatches": 3}, "got 3; nearest: 4"),
    ],
)
def test_impossible_sizes_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, **sizes)


@pytest.mark.parametrize(
    "times, message",
    [
        ({"forward_seconds": [1, 2, 3]}, "forward_seconds has 3 numbers; one, or 4"),
        ({"backward_seconds": -1}, "backward_seconds holds negative or infinite numbers: -1"),
        ({"weight_seconds": [0, 0, np.inf, 0]}, "weight_seconds holds .* inf"),
        ({"transfer_seconds": [0, 0, 0, 0]}, "transfer_seconds has 4 numbers; one, or 3"),
        ({"forward_seconds": float("nan")}, "forward_seconds holds .* nan"),
    ],
)
def test_wrong_times_are_refused(times, message):
    times = {"forward_seconds": 1.0, "backward_seconds": 1.0, **times}
    with pytest.raises(ValueError, match=message):
        simulate(make_schedule("1f1b", stages=4, microbatches=4), **times)
    with pytest.raises(ValueError, match=message):
        makespan("1f1b", stages=4, microbatches=4, **times)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 9}, "version 9; this program reads version 1"),
        ({"extra": 1}, r"unknown fields \['extra'\]"),
        ({"orders": [[["F", 0]]]}, "list per rank"),
        ({"orders": []}, "0 orders for stages=1"),
    ],
)
def test_schedule_files_are_checked(change, message):
    record = json.loads(make_schedule("1f1b", stages=1, microbatches=1).to_json())
    with pytest.raises(ValueError, match=message):
        Schedule.from_json(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match="not JSON"):
        Schedule.from_json("{")
