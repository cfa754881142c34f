"""Mapping: exact equals brute force, annealing never beats exact, labels do not matter."""

import itertools
import json
import math
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.cluster import parse_cluster
from search.collectives import collective_seconds
from search.mapping import (
    Traffic,
    axis_strides,
    device_order,
    order_axes,
    order_nodes,
    order_seconds,
    reorder_nodes,
    turn_torus,
)

SHAPES = [(shape, pace) for shape in ("ring", "line") for pace in ("slowest", "sum")]


def _bandwidths(n, seed):
    return np.random.default_rng(seed).uniform(1.0, 10.0, (n, n))


@pytest.mark.parametrize("shape, pace", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_exact_order_equals_permutation_brute_force(shape, pace, n):
    for seed in range(2 if n == 7 else 6):
        matrix = _bandwidths(n, seed)
        found = order_nodes(matrix, shape=shape, pace=pace)
        brute = min(order_seconds(matrix, p, shape=shape, pace=pace) for p in itertools.permutations(range(n)))
        assert found.seconds == pytest.approx(brute, rel=1e-12)
        assert found.exact
        assert found.gap == 0


@pytest.mark.parametrize("shape, pace", SHAPES)
def test_exact_order_equals_brute_force_of_eight_nodes(shape, pace):
    matrix = _bandwidths(8, 3)
    weights = 1 / matrix
    orders = np.array(list(itertools.permutations(range(8))))
    following = np.roll(orders, -1, axis=1)
    links = weights[orders, following] if shape == "ring" else weights[orders[:, :-1], following[:, :-1]]
    brute = (links.max(axis=1) if pace == "slowest" else links.sum(axis=1)).min()
    assert order_nodes(matrix, shape=shape, pace=pace).seconds == pytest.approx(brute, rel=1e-12)


@pytest.mark.parametrize("shape, pace", SHAPES)
def test_annealing_lies_between_its_bound_and_exact(shape, pace):
    for seed in range(4):
        matrix = _bandwidths(11, seed)
        exact = order_nodes(matrix, shape=shape, pace=pace)
        annealed = order_nodes(matrix, shape=shape, pace=pace, exact_nodes=0, sweeps=100)
        assert annealed.seconds >= exact.seconds * (1 - 1e-12)
        assert annealed.lower_bound_seconds <= exact.seconds * (1 + 1e-12)
        assert annealed.seconds <= 1.25 * exact.seconds
        assert not annealed.exact
        assert annealed.gap == pytest.approx(annealed.seconds / annealed.lower_bound_seconds - 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 9), st.integers(0, 1000), st.sampled_from(SHAPES), st.sampled_from([20, 0]))
def test_relabelling_nodes_changes_nothing(n, seed, kind, exact_nodes):
    shape, pace = kind
    matrix = _bandwidths(n, seed)
    labels = np.random.default_rng(seed + 1).permutation(n)
    first = order_nodes(matrix, shape=shape, pace=pace, exact_nodes=exact_nodes, sweeps=20)
    again = order_nodes(matrix[np.ix_(labels, labels)], shape=shape, pace=pace, exact_nodes=exact_nodes, sweeps=20)
    assert again.seconds == first.seconds
    assert again.lower_bound_seconds == pytest.approx(first.lower_bound_seconds, rel=1e-12)
    assert sorted(again.order) == list(range(n))


def test_seconds_scale_with_bytes_and_bandwidth():
    matrix = _bandwidths(6, 0)
    once = order_nodes(matrix, bytes_=1.0, pace="sum")
    assert order_nodes(matrix, bytes_=8.0, pace="sum").seconds == pytest.approx(8 * once.seconds)
    assert order_nodes(4 * matrix, bytes_=1.0, pace="sum").seconds == pytest.approx(once.seconds / 4)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from(SHAPES))
def test_more_bandwidth_never_makes_the_best_order_worse(n, seed, kind):
    shape, pace = kind
    rng = np.random.default_rng(seed)
    matrix = _bandwidths(n, seed)
    better = matrix * rng.uniform(1, 2, (n, n))
    assert (
        order_nodes(better, shape=shape, pace=pace).seconds
        <= order_nodes(matrix, shape=shape, pace=pace).seconds + 1e-12
    )


def test_sick_link_is_avoided():
    matrix = np.full((6, 6), 20e9)
    matrix[2, 3] = matrix[3, 2] = 1e9
    found = order_nodes(matrix, bytes_=20e9)
    assert found.seconds == pytest.approx(1.0)
    assert order_seconds(matrix, range(6), bytes_=20e9) == pytest.approx(20.0)


def test_measured_hosts_with_two_fast_pairs_keep_the_fast_links():
    """Four hosts on shaped links, (0,2) and (1,3) at 800 Mbit/s, the rest at 100: order 0,2,1,3 was measured best."""
    matrix = np.full((4, 4), 12.5e6)
    for a, b in ((0, 2), (1, 3)):
        matrix[a, b] = matrix[b, a] = 100e6
    found = order_nodes(matrix, shape="line", pace="sum", bytes_=8e6)
    assert found.seconds == pytest.approx(0.08 + 0.64 + 0.08)


@pytest.mark.parametrize(
    "matrix, message",
    [
        ([[1, 2, 3]], "square"),
        ([[1, 0], [1, 1]], "from node 0 to node 1 is 0.0"),
        ([[1, math.nan], [1, 1]], "from node 0 to node 1 is nan"),
    ],
)
def test_bad_matrix_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        order_nodes(matrix)


def test_bad_order_is_refused():
    with pytest.raises(ValueError, match="no order of 3 nodes"):
        order_seconds(_bandwidths(3, 0), [0, 0, 1])
    with pytest.raises(ValueError, match="shape='star'"):
        order_nodes(_bandwidths(3, 0), shape="star")


TRAFFIC = (
    Traffic("all_reduce", 1e8, ("tensor",), 100),
    Traffic("all_gather", 1e9, ("fsdp",)),
    Traffic("all_reduce", 1e9, ("data", "fsdp")),
    Traffic("permute", 1e7, ("stage",), 8),
)


@pytest.mark.parametrize("text", ["8x8xH100", "v5p:4x4x4", "2*v5e:4x8"])
def test_axis_order_equals_brute_force(text):
    cluster = parse_cluster(text)
    sizes = {"data": 4, "fsdp": 2, "stage": 2, "tensor": 4, "context": 1}
    best = order_axes(cluster, sizes, TRAFFIC)
    brute = math.inf
    for perm in itertools.permutations(range(len(cluster.torus.dims) if cluster.torus else 0)):
        for order in itertools.permutations(axis for axis in sizes if sizes[axis] > 1):
            strides = axis_strides(order, sizes)
            seconds = 0.0
            for t in TRAFFIC:
                group = tuple(sizes[a] for a in t.axes), tuple(strides[a] for a in t.axes)
                seconds += t.count * float(collective_seconds(turn_torus(cluster, perm), t.kind, t.bytes_, *group))
            brute = min(brute, seconds)
    assert best.seconds == pytest.approx(brute, rel=1e-12)
    assert all(seconds > best.seconds for _, _, seconds in best.runners_up)


def test_tensor_axis_lies_inside_the_node():
    best = order_axes(parse_cluster("4x8xH100"), {"tensor": 8, "data": 4}, TRAFFIC[:1])
    assert best.order == ("data", "tensor")
    assert best.candidates == 2


def test_axis_of_eight_lies_on_the_dimension_that_closes():
    """4x4x8: along the last dimension 8 chips are a ring; across two others they are a ring and a line."""
    cluster = parse_cluster("v5p:8x4x4")
    best = order_axes(cluster, {"data": 16, "tensor": 8}, [Traffic("all_to_all", 1e9, ("tensor",))])
    devices = device_order(cluster, best, {"data": 16, "tensor": 8})
    coordinates = np.stack(np.unravel_index(devices, cluster.torus.dims), axis=-1)
    assert len(np.unique(coordinates[0], axis=0)) == 8


@pytest.mark.parametrize(
    "text, sizes", [("2*v5p:4x4x4", {"data": 8, "fsdp": 4, "tensor": 4}), ("2x8xH100", {"data": 16})]
)
def test_device_order_is_a_permutation_in_the_meshs_shape(text, sizes):
    cluster = parse_cluster(text)
    best = order_axes(cluster, sizes, [Traffic("all_reduce", 1e9, ("data",))])
    devices = device_order(cluster, best, sizes)
    assert devices.shape == tuple(sizes.values())
    assert sorted(devices.flat) == list(range(cluster.devices))


def test_device_order_follows_the_strides():
    cluster = parse_cluster("4x8xH100")
    sizes = {"tensor": 8, "data": 4}
    devices = device_order(cluster, order_axes(cluster, sizes, TRAFFIC[:1]), sizes)
    assert list(devices[:, 0]) == list(range(8))
    assert list(devices[0]) == [0, 8, 16, 24]


def test_traffic_that_does_not_fit_the_mesh_is_refused():
    cluster = parse_cluster("8xH100")
    with pytest.raises(ValueError, match=r"a mesh of 4 devices \(tensor 4\) on the 8 of 8xH100"):
        order_axes(cluster, {"tensor": 4}, [])
    with pytest.raises(ValueError, match="traffic on axis 'data'"):
        order_axes(cluster, {"tensor": 8}, [Traffic("all_reduce", 1.0, ("data",))])


def test_nodes_of_a_cluster_are_reordered_with_their_names(tmp_path):
    path = tmp_path / "c.toml"
    rows = [[0, 1e9, 2e9], [3e9, 0, 4e9], [5e9, 6e9, 0]]
    path.write_text(f'accelerator = "A100"\n[nodes]\nnames = ["a", "b", "c"]\nbytes_per_second = {rows}\n')
    cluster = reorder_nodes(parse_cluster(path), (2, 0, 1))
    assert cluster.node_names == ("c", "a", "b")
    assert cluster.node_bytes_per_second[0] == (0, 5e9, 6e9)
    with pytest.raises(ValueError, match="no order of the 3 nodes"):
        reorder_nodes(cluster, (0, 1))
    with pytest.raises(ValueError, match="no measured matrix"):
        reorder_nodes(parse_cluster("8xH100"), (0,))


@pytest.mark.skipif(
    "REDCO_LIKE_GROUND_TRUTH" not in os.environ, reason="REDCO_LIKE_GROUND_TRUTH names no folder of published figures"
)
@pytest.mark.parametrize("time", [0, 1])
def test_measured_cluster_of_16_nodes_is_ordered_exactly(time):
    """On a healthy cluster the order of nodes is a small lever: under 20 % for the slowest link, 2 % for the sum."""
    folder = pathlib.Path(os.environ["REDCO_LIKE_GROUND_TRUTH"])
    record = json.loads((folder / "pipette" / f"node_bandwidth_time_{time}.json").read_text())
    matrix = np.array(record["0"]["bandwidth"]) * 1e6
    for pace, most in (("slowest", 1.2), ("sum", 1.02)):
        exact = order_nodes(matrix, pace=pace)
        annealed = order_nodes(matrix, pace=pace, exact_nodes=0)
        plain = order_seconds(matrix, range(16), pace=pace)
        assert exact.seconds <= annealed.seconds <= 1.02 * exact.seconds
        assert exact.seconds < plain < most * exact.seconds
        ratios = plain / exact.seconds, annealed.seconds / exact.seconds
        print(f"{pace}: as given / best {ratios[0]:.4f}, annealed / best {ratios[1]:.5f}")
