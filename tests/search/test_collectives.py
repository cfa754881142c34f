"""Collectives: closed forms, link loads counted one by one, metamorphic relations, published measurements."""

import csv
import dataclasses
import itertools
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.cluster import Cluster, Tier, Torus, parse_cluster
from search.collectives import bus_bandwidth, collective_seconds, compiled_kind, lower_bound_seconds

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute")
CLUSTERS = ("8xH100", "4x8xA100", "3x4xMI300X", "v5p:4x4x8", "v5e:4x16", "2*v5p:4x4x4", "2*tpu7x:2x2x1")


def _plain(*tiers, torus=None):
    """A cluster without launch or ramp: wire time and hops alone."""
    h100 = parse_cluster("8xH100").accelerator
    accelerator = dataclasses.replace(h100, launch_seconds=0.0, ramp=0.0)
    return Cluster("plain", accelerator, tiers, torus)


def _faster(cluster, factor):
    """The same cluster with all bandwidths times `factor`."""
    tiers = [
        dataclasses.replace(
            tier,
            bytes_per_second=tier.bytes_per_second * factor,
            reduce_bytes_per_second=tier.reduce_bytes_per_second * factor,
        )
        for tier in cluster.tiers
    ]
    torus = cluster.torus
    if torus:
        torus = dataclasses.replace(torus, bytes_per_second=torus.bytes_per_second * factor)
    return dataclasses.replace(cluster, tiers=tuple(tiers), torus=torus)


def _groups(cluster):
    """(size, stride) of every aligned group of more than one device."""
    divisors = [d for d in range(1, cluster.devices + 1) if cluster.devices % d == 0]
    pairs = [(n, s) for n, s in itertools.product(divisors, divisors) if n > 1 and cluster.devices % (n * s) == 0]
    return tuple(np.array(x) for x in zip(*pairs, strict=True))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_ring_on_one_tier_equals_the_closed_form(n):
    cluster = _plain(Tier("node", 8, 100e9, 2e-6))
    volume = 1e9
    gather = (n - 1) * 2e-6 + (n - 1) / n * volume / 100e9
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert collective_seconds(cluster, kind, volume, n) == pytest.approx(gather)
    assert collective_seconds(cluster, "all_reduce", volume, n, algorithm="ring") == pytest.approx(2 * gather)
    assert collective_seconds(cluster, "permute", volume, n) == pytest.approx(2e-6 + volume / 100e9)


def test_tree_wins_where_hops_matter():
    cluster = _plain(Tier("node", 256, 100e9, 2e-6))
    tree = collective_seconds(cluster, "all_reduce", 1e3, 256, algorithm="tree")
    assert tree == pytest.approx(2 * 8 * 2e-6 + 2 * 1e3 / 100e9)
    assert collective_seconds(cluster, "all_reduce", 1e3, 256) == tree
    ring = collective_seconds(cluster, "all_reduce", 1e12, 256, algorithm="ring")
    assert collective_seconds(cluster, "all_reduce", 1e12, 256) == ring


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 1e12), st.sampled_from([2, 4, 8, 16, 32]), st.sampled_from([1, 2, 8]))
def test_ring_all_reduce_is_reduce_scatter_and_all_gather(volume, n, stride):
    cluster = _plain(Tier("node", 8, 300e9, 1e-6), Tier("network", 256, 20e9, 5e-6))
    whole = collective_seconds(cluster, "all_reduce", volume, n, stride, algorithm="ring")
    parts = [collective_seconds(cluster, kind, volume, n, stride) for kind in ("reduce_scatter", "all_gather")]
    assert whole == pytest.approx(sum(parts), rel=1e-12)


def test_hierarchical_all_reduce_is_two_stages():
    cluster = _plain(Tier("node", 8, 300e9), Tier("network", 32, 20e9))
    stages = 2 * 7 / 8 * 1e9 / 300e9 + 2 * 3 / 4 * (1e9 / 8) / 20e9
    assert collective_seconds(cluster, "all_reduce", 1e9, 32, algorithm="hierarchical") == pytest.approx(stages)


def test_groups_that_share_a_network_card_divide_it():
    """With k of a node's devices in the group, k shares of the card serve it, and 8 / k groups run at once."""
    cluster = _plain(Tier("node", 8, 300e9), Tier("network", 16, 5e9))
    for inside in (1, 2, 4, 8):
        n, stride = 2 * inside, 8 // inside
        ring = collective_seconds(cluster, "all_gather", 1e9, n, stride)
        assert ring == pytest.approx((n - 1) / n * 1e9 / (inside * 5e9))


def test_full_mesh_gives_two_devices_one_link():
    cluster = _plain(Tier("node", 8, 448e9, links="mesh"))
    assert collective_seconds(cluster, "all_gather", 1e9, 2) == pytest.approx(0.5 * 1e9 / 64e9)
    assert collective_seconds(cluster, "all_gather", 1e9, 8) == pytest.approx(7 / 8 * 1e9 / 448e9)
    assert collective_seconds(cluster, "permute", 1e9, 8) == pytest.approx(1e9 / 64e9)


def test_torus_gather_uses_rings_lines_and_several_dimensions():
    cluster = _plain(torus=Torus((4, 8), (False, True), 50e9))
    ring = 7 / 8 * 1e9 / 100e9
    line = 3 / 4 * 1e9 / 50e9
    both = 31 / 32 * 1e9 / 150e9
    assert collective_seconds(cluster, "all_gather", 1e9, 8, 1) == pytest.approx(ring)
    assert collective_seconds(cluster, "all_gather", 1e9, 4, 8) == pytest.approx(line)
    assert collective_seconds(cluster, "all_gather", 1e9, 32, 1) == pytest.approx(both)
    # Half of the ring is a line; every second chip of it is a ring that shares its links with another.
    assert collective_seconds(cluster, "all_gather", 1e9, 4, 1) == pytest.approx(3 / 4 * 1e9 / 50e9)
    assert collective_seconds(cluster, "all_gather", 1e9, 4, 2) == pytest.approx(3 / 4 * 1e9 / 50e9)


def test_gather_over_three_torus_dimensions_is_a_gather():
    cluster = _plain(torus=Torus((4, 4, 4), (True, True, True), 100e9))
    two = collective_seconds(cluster, "all_gather", 1e9, 16)
    three = collective_seconds(cluster, "all_gather", 1e9, 64)
    assert two == pytest.approx(15 / 16 * 1e9 / 400e9)
    assert three == pytest.approx(63 / 64 * 1e9 / 600e9)


# What libtpu 0.0.42 compiles `jax.lax.psum_scatter` to.
COMPILED = {
    "v5e:2x2": {4: "reduce_scatter"},
    "v5e:2x4": {8: "reduce_scatter"},
    "v5e:4x4": {4: "reduce_scatter", 8: "reduce_scatter", 16: "all_reduce"},
    "2*v5e:4x4": {16: "all_reduce"},
    "v5e:4x8": {32: "reduce_scatter"},
    "v5e:8x16": {128: "reduce_scatter"},
    "v5e:16x16": {16: "reduce_scatter", 256: "all_reduce"},
    "v6e:8x8": {64: "all_reduce"},
    "v5p:2x2x1": {4: "reduce_scatter"},
    "v5p:2x2x2": {8: "all_reduce"},
    "v5p:4x4x4": {16: "reduce_scatter", 32: "reduce_scatter", 64: "all_reduce"},
    "v5p:4x4x8": {64: "reduce_scatter", 128: "all_reduce"},
    "v4:2x2x4": {16: "all_reduce"},
    "tpu7x:2x2x4": {16: "reduce_scatter", 32: "reduce_scatter"},
}


@pytest.mark.parametrize("name", COMPILED)
def test_reduce_scatter_over_a_whole_slice_is_what_the_compiler_makes_of_it(name):
    cluster = parse_cluster(name)
    for members, kind in COMPILED[name].items():
        assert compiled_kind(cluster, "reduce_scatter", members) == kind
        assert compiled_kind(cluster, "all_gather", members) == "all_gather"
        gather, scatter, both = (
            collective_seconds(cluster, k, 1e12, members) for k in ("all_gather", "reduce_scatter", "all_reduce")
        )
        assert scatter == pytest.approx(both if kind == "all_reduce" else gather, rel=1e-3)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("m", [3, 4, 5, 8])
def test_all_to_all_on_a_torus_equals_the_busiest_link_counted(m, wrap):
    """Shortest paths, ties split both ways; an even ring balances exactly, an odd one within its rounding."""
    load = np.zeros((m, 2))
    for a, b in itertools.permutations(range(m), 2):
        right = (b - a) % m if wrap else b - a
        for steps, direction in ((right, 1), ((a - b) % m if wrap else a - b, -1)):
            if steps <= 0 or (wrap and steps > m / 2):
                continue
            for step in range(steps):
                load[(a + direction * step) % m, direction == 1] += 0.5 if wrap and steps == m / 2 else 1.0
    cluster = _plain(torus=Torus((m,), (wrap,), 1.0))
    assert collective_seconds(cluster, "all_to_all", m, m) == pytest.approx(load.max())


@pytest.mark.parametrize("text", CLUSTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_lower_bound_holds_for_every_group_and_for_larger_ones(text, kind):
    cluster = parse_cluster(text)
    sizes, strides = _groups(cluster)
    volumes = np.array([[1.0], [1e5], [1e7], [1e10]])
    seconds = collective_seconds(cluster, kind, volumes, sizes, strides)
    assert np.all(lower_bound_seconds(cluster, kind, volumes, sizes) <= seconds * (1 + 1e-12))
    bounds = lower_bound_seconds(cluster, kind, 1e8, np.arange(1, cluster.devices + 1))
    assert np.all(np.diff(bounds) >= 0)
    for algorithm in ("ring", "tree", "hierarchical"):
        fixed = collective_seconds(cluster, kind, volumes, sizes, strides, algorithm=algorithm)
        assert np.all(lower_bound_seconds(cluster, kind, volumes, sizes) <= fixed * (1 + 1e-12))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CLUSTERS), st.sampled_from(KINDS), st.floats(1, 1e11), st.floats(1, 10))
def test_more_bandwidth_and_fewer_bytes_never_cost_more(text, kind, volume, factor):
    cluster = parse_cluster(text)
    sizes, strides = _groups(cluster)
    now = collective_seconds(cluster, kind, volume, sizes, strides)
    assert np.all(collective_seconds(_faster(cluster, factor), kind, volume, sizes, strides) <= now * (1 + 1e-12))
    assert np.all(collective_seconds(cluster, kind, volume / factor, sizes, strides) <= now * (1 + 1e-12))
    assert np.all(now > 0)


@pytest.mark.parametrize("text", ["8xH100", "4x8xA100", "16x8xB200", "8xV100"])
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_groups_never_cost_more_on_tiers(text, kind):
    """On a torus they may: a group that spans another dimension has more links."""
    cluster = parse_cluster(text)
    for volume in (1e3, 1e6, 1e9):
        for stride in (1, 2, 8):
            sizes = np.array([n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * stride <= cluster.devices])
            if sizes.size:
                seconds = collective_seconds(cluster, kind, volume, sizes, stride)
                assert np.all(np.diff(seconds) >= -1e-15)


@pytest.mark.parametrize("text", CLUSTERS)
def test_all_times_scale_together(text):
    """Half the bandwidth and twice every latency: twice the seconds."""
    cluster = parse_cluster(text)
    slow = _faster(cluster, 0.5)
    accelerator = dataclasses.replace(slow.accelerator, launch_seconds=2 * slow.accelerator.launch_seconds)
    tiers = [
        dataclasses.replace(t, latency_seconds=2 * t.latency_seconds, launch_seconds=2 * t.launch_seconds)
        for t in slow.tiers
    ]
    torus = slow.torus and dataclasses.replace(slow.torus, latency_seconds=2 * slow.torus.latency_seconds)
    slow = dataclasses.replace(slow, accelerator=accelerator, tiers=tuple(tiers), torus=torus)
    sizes, strides = _groups(cluster)
    for kind in KINDS:
        twice = collective_seconds(slow, kind, 1e7, sizes, strides)
        np.testing.assert_allclose(twice, 2 * collective_seconds(cluster, kind, 1e7, sizes, strides), rtol=1e-12)


def test_arrays_equal_one_at_a_time():
    cluster = parse_cluster("4x8xH100")
    sizes, strides = _groups(cluster)
    volumes = np.array([[0.0], [1e6], [1e9]])
    together = collective_seconds(cluster, "all_reduce", volumes, sizes, strides)
    assert together.shape == (3, len(sizes))
    for i, j in np.ndindex(together.shape):
        assert together[i, j] == collective_seconds(
            cluster, "all_reduce", volumes[i, 0], int(sizes[j]), int(strides[j])
        )


@pytest.mark.parametrize("text", CLUSTERS)
def test_group_over_adjacent_axes_is_one_axis(text):
    cluster = parse_cluster(text)
    if cluster.devices % 8:
        pytest.skip("not a multiple of 8")
    for kind in KINDS:
        one = collective_seconds(cluster, kind, 1e9, 8, 1)
        assert collective_seconds(cluster, kind, 1e9, (2, 4), (4, 1)) == pytest.approx(float(one))
        assert collective_seconds(cluster, kind, 1e9, (4, 2, 1), (1, 4, 8)) == pytest.approx(float(one))


def test_alone_or_with_nothing_to_send_takes_no_time():
    cluster = parse_cluster("2x8xH100")
    for kind in KINDS:
        assert collective_seconds(cluster, kind, 1e9, 1) == 0
        assert collective_seconds(cluster, kind, 0, 8) == 0
        assert lower_bound_seconds(cluster, kind, 1e9, 1) == 0


def test_strided_groups_across_nodes_are_several_times_slower():
    """Measured 7.5 to 18 times (Galvatron's hardware profile of two nodes)."""
    cluster = parse_cluster("2x8xA800")
    near = collective_seconds(cluster, "all_reduce", 256e6, np.array([2, 4, 8]), 1)
    far = collective_seconds(cluster, "all_reduce", 256e6, np.array([2, 4, 8]), np.array([8, 4, 2]))
    assert np.all(far > 5 * near)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "broadcast"}, "kind='broadcast'; one of all_reduce"),
        ({"algorithm": "bruck"}, "algorithm='bruck'"),
        ({"size": 0}, "whole numbers from 1 up"),
        ({"size": 16}, "reaches device 15; 8xH100 has 8"),
        ({"size": 4, "stride": 4}, "reaches device 12"),
        ({"size": (2, 2), "stride": (1,)}, "one stride per size"),
        ({"bytes_": -1.0}, "of -1 bytes"),
    ],
)
def test_impossible_group_is_refused(change, message):
    arguments = {"kind": "all_reduce", "bytes_": 1.0, "size": 2, "stride": 1, **change}
    with pytest.raises(ValueError, match=message):
        collective_seconds(parse_cluster("8xH100"), **arguments)


# Published measurements. Constants are per accelerator and tier; the bands are what they reach.

published = pytest.mark.skipif(
    "REDCO_LIKE_GROUND_TRUTH" not in os.environ, reason="REDCO_LIKE_GROUND_TRUTH names no folder of published figures"
)
MIB = 2.0**20


def _folder():
    return pathlib.Path(os.environ["REDCO_LIKE_GROUND_TRUTH"])


def _report(name, predicted, measured):
    error = np.asarray(predicted) / np.asarray(measured) - 1
    mean, worst = np.abs(error).mean(), error[np.abs(error).argmax()]
    print(f"{name}: {len(error)} points, mean |error| {mean:.1%}, bias {error.mean():+.1%}, worst {worst:+.1%}")
    return mean


def _rows():
    return list(csv.DictReader((_folder() / "microbench.csv").read_text().splitlines()))


@published
@pytest.mark.parametrize(
    "hardware, devices, text, band",
    [
        ("A100-SXM", 8, "8xA100", 0.09),
        ("H200-SXM", 8, "8xH200", 0.07),
        ("B200-SXM", 8, "8xB200", 0.11),
        ("B200-SXM", 32, "4x8xB200", 0.11),
    ],
)
def test_all_reduce_from_a_mebibyte_up_is_near_the_measured(hardware, devices, text, band):
    rows = [r for r in _rows() if r["hardware"].startswith(hardware) and r["time_us"] and r["op"] == "all_reduce"]
    rows = [r for r in rows if int(r["n_devices"]) == devices and float(r["payload_bytes"]) >= MIB]
    sent = np.array([float(r["payload_bytes"]) for r in rows])
    measured = np.array([float(r["time_us"]) for r in rows]) * 1e-6
    assert len(rows) >= 15
    assert _report(text, collective_seconds(parse_cluster(text), "all_reduce", sent, devices), measured) < band


@published
@pytest.mark.parametrize("name, band", [("H200", 0.05), ("B200", 0.05), ("MI300X", 0.03)])
def test_bus_bandwidth_of_long_collectives_is_near_the_measured(name, band):
    predicted, measured = [], []
    for row in _rows():
        if not row["hardware"].startswith(name) or row["time_us"] or not row["busbw_GBps"]:
            continue
        kind, _, algorithm = row["op"].partition(" ")
        algorithm = "ring" if algorithm == "ring" else "best"
        rounds = [(algorithm, float(row["busbw_GBps"]))]
        if "NVLS off" in row["notes"]:
            rounds.append(("ring", float(row["notes"].split()[-1])))
        for chosen, busbw in rounds:
            n, sent = int(row["n_devices"]), float(row["payload_bytes"])
            seconds = collective_seconds(parse_cluster(f"8x{name}"), kind, sent, n, algorithm=chosen)
            predicted.append(float(bus_bandwidth(kind, sent, n, seconds)) / 1e9)
            measured.append(busbw)
    assert _report(name, predicted, measured) < band


@published
def test_gather_on_a_tpu_is_near_the_measured():
    """Payload is printed as 2 (n-1)/n of the result; the group is taken as one device of each of four chips."""
    for text, label in (("tpu7x:2x2x1", "TPU-v7x 2x2x1"), ("tpu7x:2x2x2", "TPU-v7x 2x2x2")):
        rows = [r for r in _rows() if r["hardware"] == label]
        sent = np.array([float(r["payload_bytes"]) for r in rows])
        measured = sent / np.array([float(r["busbw_GBps"] or r["algbw_GBps"]) for r in rows]) / 1e9
        assert _report(text, collective_seconds(parse_cluster(text), "all_gather", sent / 1.5, 4, 2), measured) < 0.03


@published
def test_constants_of_one_a100_node_hold_on_another():
    """Galvatron's node was not used for any constant."""
    record = json.loads((_folder() / "galvatron" / "sp_time_1nodes_8gpus_per_node.json").read_text())
    cluster = parse_cluster("8xA100")
    for name, kind, band in (("allreduce", "all_reduce", 0.08), ("all2all", "all_to_all", 0.15)):
        points = [
            (int(k.split("_")[2]), int(k.split("_")[3][:-2]) * MIB, v * 1e-3)
            for k, v in record.items()
            if k.startswith(name)
        ]
        n, sent, measured = (np.array(x) for x in zip(*points, strict=True))
        assert _report(f"Galvatron {name}", collective_seconds(cluster, kind, sent, n), measured) < band


@published
def test_consecutive_and_strided_groups_of_two_nodes_are_near_the_measured():
    """One constant, the network's bytes per second per device. A figure is the mean bus bandwidth of 16 to 512 MiB."""
    base = parse_cluster("2x8xA100")
    node, network = base.tiers
    cluster = dataclasses.replace(base, tiers=(node, dataclasses.replace(network, bytes_per_second=7.9e9)))
    sent = MIB * 2.0 ** np.arange(4, 10)
    for file, kind, band in (("allreduce", "all_reduce", 0.16), ("p2p", "permute", 0.18)):
        record = json.loads((_folder() / "galvatron" / f"{file}_bandwidth_2nodes_8gpus_per_node.json").read_text())
        predicted = []
        for key in record:
            n = int(key.split("_")[2])
            stride = 1 if key.endswith("consec_1") else 16 // n
            seconds = collective_seconds(cluster, kind, sent, n, stride)
            predicted.append(bus_bandwidth(kind, sent, n, seconds).mean() / 1e9)
        assert _report(f"Galvatron 2 nodes {file}", predicted, list(record.values())) < band
