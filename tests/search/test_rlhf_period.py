"""The steady-state period, against iterations that are run one after another; and the windows that calls lie on."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import parse_cluster
from search.rlhf import Window
from search.rlhf.period import Task, period, starts
from search.rlhf.windows import Arrangements, Grid, segments


@st.composite
def task_lists(draw):
    count = draw(st.integers(1, 6))
    tasks = []
    for j in range(count):
        after = tuple(i for i in range(j) if draw(st.integers(0, 3)) == 0)
        previous = tuple(i for i in range(j, count) if draw(st.integers(0, 4)) == 0)
        tasks.append(Task(float(draw(st.integers(0, 9))), draw(st.integers(0, 15)), after, previous))
    return tasks


def run(tasks, iterations):
    """When every iteration's tasks end, every task as early as it may be."""
    free = [0.0] * 4
    ends = []
    for k in range(iterations):
        now = []
        for task in tasks:
            mine = [d for d in range(4) if task.devices >> d & 1]
            waits = [free[d] for d in mine] + [now[i] for i in task.after]
            waits += [ends[k - 1][i] for i in task.previous] if k else []
            end = max(waits, default=0.0) + task.seconds
            for d in mine:
                free[d] = end
            now.append(end)
        ends.append(now)
    return ends


@given(task_lists())
@settings(max_examples=80)
def test_the_period_is_the_rate_at_which_iterations_end_in_the_long_run(tasks):
    # Cycles have at most as many iterations as there are tasks; 60 is a multiple of 1 to 6.
    ends = run(tasks, 401)
    rate = max((b - a) / 60 for a, b in zip(ends[340], ends[400], strict=True))
    assert period(tasks) == pytest.approx(rate, abs=1e-9)


def test_a_cycle_over_two_iterations_can_be_the_longest():
    # Two chains that each begin where the other one ends: neither comes back to its own begin after one iteration.
    tasks = [Task(1, 1), Task(1, 2), Task(10, 0, (0,)), Task(10, 0, (1,)), Task(1, 2, (2,)), Task(1, 1, (3,))]
    assert period(tasks) == 12
    assert period(tasks, below=12.5) == 12
    assert period(tasks, below=2) == float("inf")


@given(task_lists())
@settings(max_examples=60)
def test_begins_of_a_steady_iteration_keep_every_wait(tasks):
    seconds = period(tasks)
    begin = starts(tasks, seconds)
    assert min(begin) == 0
    for (i, a), (j, b) in itertools.product(enumerate(tasks), repeat=2):
        shared = a.devices & b.devices
        if i < j and (shared or i in b.after):
            assert begin[j] >= begin[i] + a.seconds - 1e-6
        if i >= j and (shared or i in b.previous):
            assert begin[j] + seconds >= begin[i] + a.seconds - 1e-6
    if seconds:
        with pytest.raises(ValueError, match="cannot begin every"):
            starts(tasks, seconds * 0.9)


def test_windows_are_runs_of_nodes_and_aligned_slices():
    grid = Grid.of(parse_cluster("3x4xA100-80"))
    assert grid.sizes == (1, 2, 4, 8, 12)
    assert len(grid.windows) == 12 + 6 + 3 + 2 + 1
    assert Window(2, 2) in grid.windows
    assert Window(1, 2) not in grid.windows
    assert Window(4, 8) in grid.windows
    assert Grid.of(parse_cluster("v5e-16")).sizes == (1, 2, 4, 8, 16)
    assert [w.first for w in Grid.of(parse_cluster("1x6xA100-80")).windows if w.devices == 4] == [0]
    assert Grid.of(parse_cluster("2x8xH100"), sizes=(8, 4)).sizes == (4, 8)
    with pytest.raises(ValueError, match="no window of 2x8xH100 has 3 devices; there are 1, 2, 4, 8, 16"):
        Grid.of(parse_cluster("2x8xH100"), sizes=(3,))


def test_nodes_of_unlike_links_are_not_relabelled(tmp_path):
    rows = "[[0, 9e9, 1e9], [9e9, 0, 1e9], [1e9, 1e9, 0]]"
    path = tmp_path / "c.toml"
    path.write_text(f'cluster = "3x4xA100-80"\n[nodes]\nbytes_per_second = {rows}\ndevices_per_node = 4\n')
    cluster = parse_cluster(path)
    assert not Grid.of(cluster).alike
    assert len(Arrangements(Grid.of(cluster), {}).child(4)) == 3
    assert len(Arrangements(Grid.of(parse_cluster("3x4xA100-80")), {}).child(4)) == 1


@pytest.mark.parametrize("name", ["8xA100-80", "4x2xA100-80"])
@pytest.mark.parametrize("related", [{}, {2: (0,)}])
def test_classes_have_every_placement_once_and_their_members_are_alike(name, related):
    grid = Grid.of(parse_cluster(name))
    root = Arrangements(grid, related)
    for sizes in itertools.product(grid.sizes, repeat=3):
        leaves = [c for a in root.child(sizes[0]) for b in a.child(sizes[1]) for c in b.child(sizes[2])]
        members = [tuple(row) for leaf in leaves for row in leaf.firsts_CD.tolist()]
        assert sorted(members) == sorted(itertools.product(*(grid.firsts(s).tolist() for s in sizes)))
        for leaf in leaves:
            facts = set()
            for row in leaf.firsts_CD.tolist():
                windows = [Window(f, s) for f, s in zip(row, sizes, strict=True)]
                count = {}
                for window, cover in segments(windows, grid.devices):
                    count[cover] = count.get(cover, 0) + window.devices
                pair = grid.relation(windows[0], windows[2]) if related else None
                nodes = tuple(frozenset(range(w.first // grid.per_node, -(-w.end // grid.per_node))) for w in windows)
                common = tuple(len(a & b) for a, b in itertools.combinations(nodes, 2))
                facts.add((tuple(sorted(count.items())), common, pair))
            assert len(facts) == 1
            assert set(leaf.covers) == {cover for _, cover in segments(leaf.windows, grid.devices)}


def test_pairs_of_windows_that_are_alike_stand_at_the_lowest_numbers():
    grid = Grid.of(parse_cluster("2x8xH100"))
    assert grid.relation(Window(8, 4), Window(12, 4)) == (Window(0, 4), Window(4, 4))
    assert grid.relation(Window(14, 2), Window(8, 4)) == (Window(0, 2), Window(4, 4))
    assert grid.relation(Window(12, 4), Window(0, 4)) == (Window(0, 4), Window(8, 4))
    assert grid.relation(Window(12, 2), Window(8, 8)) == (Window(4, 2), Window(0, 8))
    assert Grid.of(parse_cluster("6xA100-80")).relation(Window(4, 2), Window(0, 4)) == (Window(4, 2), Window(0, 4))
