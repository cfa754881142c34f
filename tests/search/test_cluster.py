"""Clusters: what strings and files mean, and that mistakes get one clear error with the nearest thing that works."""

import dataclasses
import json

import pytest

from search.accelerators import accelerators, find_accelerator
from search.cluster import Cluster, Tier, Torus, parse_cluster
from search.cost import CostModel
from search.efficiency import Efficiency
from search.workload import Workload

STRINGS = ("8xH100", "16x8xA100-80", "v5p-128", "v5e:16x16", "2*v5p:4x4x4", "4xMI300X", "tpu7x-128", "2x72xGB200")


@pytest.mark.parametrize(
    "text, devices, nodes, torus",
    [
        ("8xH100", 8, 1, None),
        ("3xH100", 3, 1, None),
        ("64xH100", 64, 8, None),
        ("16x8xA100-80", 128, 16, None),
        ("4x4xt4", 16, 4, None),
        ("144xGB200", 144, 2, None),
        ("v5p-8", 4, 1, (2, 2, 1)),
        ("v5p-128", 64, 1, (4, 4, 4)),
        ("v5p-1024", 512, 1, (8, 8, 8)),
        ("v5p-12288", 6144, 1, (16, 16, 24)),
        ("v4-4096", 2048, 1, (8, 16, 16)),
        ("v5e-256", 256, 1, (16, 16)),
        ("v5litepod-8", 8, 1, (2, 4)),
        ("v6e:8x16", 128, 1, (8, 16)),
        ("tpu7x-128", 128, 1, (4, 4, 4)),
        ("2*v5p:4x4x4", 128, 2, (4, 4, 4)),
        ("4*v5e-16", 64, 4, (4, 4)),
    ],
)
def test_string_counts_what_google_and_nodes_count(text, devices, nodes, torus):
    cluster = parse_cluster(text)
    assert (cluster.devices, cluster.nodes) == (devices, nodes)
    assert (cluster.torus.dims if cluster.torus else None) == torus


@pytest.mark.parametrize(
    "text, wrap",
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v5e:8x8", (False, False)),
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
    ],
)
def test_torus_closes_where_the_slice_does(text, wrap):
    assert parse_cluster(text).torus.wrap == wrap


@pytest.mark.parametrize(
    "text, parts",
    [
        ("8xH10", ["'H10'", "did you mean 'H100'"]),
        ("8xA100-8", ["did you mean 'A100-80'"]),
        ("v5q-128", ["'v5q'", "did you mean"]),
        ("12xH100", ["12 devices", "8xH100 or 16xH100"]),
        ("4x16xH100", ["has 8 devices, not 16", "8x8xH100"]),
        ("v5p-100", ["100 TensorCores", "v5p-128 (4x4x4)"]),
        ("v5e-100", ["100 chips", "v5e-128 (8x16)"]),
        ("v5e:32x16", ["largest v5e is 16x16", "v5e:16x16"]),
        ("v5p:4x4", ["3 dimensions, not 2", "nearest: v5p:2x2x4"]),
        ("0xH100", ["number of devices is 0"]),
        ("0x8xH100", ["number of devices is 0"]),
        ("v5e:0x4", ["dimension is 0"]),
        ("0*v5e:4x4", ["slices is 0"]),
        ("2*8xH100", ["nodes are written 2x8xH100"]),
        ("8xv5p", ["a TPU slice is written v5p-8"]),
        ("H100-8", ["nodes of H100 are written 8xH100"]),
        ("H100", ["no number of them", "8xH100"]),
        ("", ["empty", "8xH100"]),
        ("no/such.toml", ["no cluster file at no/such.toml"]),
    ],
)
def test_mistake_gets_the_nearest_thing_that_works(text, parts):
    with pytest.raises(ValueError) as error:
        parse_cluster(text)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", accelerators())
def test_accelerator_is_complete_and_sourced(name):
    accelerator = accelerators()[name]
    assert accelerator.source
    assert accelerator.fit
    assert 0.9 * accelerator.memory_bytes < accelerator.usable_memory_bytes <= accelerator.memory_bytes
    assert accelerator.flops("float16" if name[0] == "V" else "bfloat16") > accelerator.flops("float32") > 0
    assert accelerator.nic_bytes_per_second < accelerator.link_bytes_per_second
    with pytest.raises(ValueError, match="it has"):
        accelerator.flops("complex64")


def test_tpu_memory_is_the_compilers_limit():
    gib = {"v5e": 15.75, "v6e": 31.24, "v5p": 95.73, "tpu7x": 94.74, "v4": 2 * 15.25}
    for name, limit in gib.items():
        assert find_accelerator(name).usable_memory_bytes == pytest.approx(limit * 2**30, rel=1e-6)


@pytest.mark.parametrize("text", STRINGS)
def test_json_round_trip(text):
    cluster = parse_cluster(text)
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_json_of_a_measured_matrix_round_trips(tmp_path):
    cluster = _file(tmp_path, NODES)
    path = tmp_path / "cluster.json"
    path.write_text(cluster.to_json())
    assert parse_cluster(path) == cluster


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 9}, "version 9"),
        ({"tier": 1}, "unknown key 'tier', did you mean 'tiers'"),
        ({"accelerator": None}, "accelerator is None"),
    ],
)
def test_json_that_cannot_be_read_says_why(change, message):
    record = json.loads(parse_cluster("8xH100").to_json())
    with pytest.raises(ValueError, match=message):
        Cluster.from_json(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match="not JSON"):
        Cluster.from_json("{")


NODES = """
accelerator = "A100-80"
[nodes]
devices_per_node = 8
names = ["a", "b", "c"]
bytes_per_second = [[0, 2e10, 1e10], [2e10, 0, 1.6e10], [1e10, 1.6e10, 0]]
"""
TIERS = """
name = "lab"
[accelerator]
base = "H100"
memory_bytes = 40e9
[[tiers]]
name = "node"
devices = 4
bytes_per_second = 3e11
[[tiers]]
name = "rack"
devices = 32
bytes_per_second = 2e10
latency_seconds = 5e-6
"""
CUSTOM = """
[accelerator]
name = "cpu"
kind = "cpu"
memory_bytes = 8e9
memory_bytes_per_second = 2e10
link_bytes_per_second = 1e9
flops_per_second = { float32 = 1e11 }
[torus]
dims = [2, 4]
bytes_per_second = 1e9
"""


MEASURED = """
cluster = "8xH100"
[efficiency]
matmul = 0.7
launch_seconds = { gpu = 1e-5 }
"""


def _file(tmp_path, text):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return parse_cluster(path)


def test_file_of_tiers(tmp_path):
    cluster = _file(tmp_path, TIERS)
    assert (cluster.name, cluster.devices, cluster.devices_per_node) == ("lab", 32, 4)
    assert cluster.accelerator.memory_bytes == cluster.accelerator.usable_memory_bytes == 40e9
    assert cluster.accelerator.flops("bfloat16") == find_accelerator("H100").flops("bfloat16")


def test_file_of_a_torus_and_a_custom_accelerator(tmp_path):
    cluster = _file(tmp_path, CUSTOM)
    assert cluster.torus == Torus((2, 4), (False, False), 1e9)
    assert cluster.devices == 8


def test_file_of_a_measured_matrix_shares_the_median_among_a_nodes_devices(tmp_path):
    cluster = _file(tmp_path, NODES)
    assert (cluster.devices, cluster.nodes, cluster.node_names) == (24, 3, ("a", "b", "c"))
    assert cluster.tiers[-1].bytes_per_second == 1.6e10 / 8


def test_file_starts_from_a_string_and_changes_the_accelerator(tmp_path):
    cluster = _file(tmp_path, 'cluster = "2x8xA100"\n[accelerator]\nnic_bytes_per_second = 5e9\n')
    plain = parse_cluster("2x8xA100")
    assert cluster.tiers[0] == plain.tiers[0]
    assert cluster.tiers[1].bytes_per_second == pytest.approx(plain.tiers[1].bytes_per_second / 5)


@pytest.mark.parametrize(
    "text, old, new, message",
    [
        (TIERS, "tiers", "tires", "unknown key 'tires', did you mean 'tiers'"),
        (TIERS, "latency_seconds", "latency_second", "did you mean 'latency_seconds'"),
        (TIERS, "devices = 32", "devices = 30", "no multiple of the 4 .* nearest: 32"),
        (TIERS, "devices = 4", "devices = 0", "devices is 0"),
        (TIERS, "memory_bytes = 40e9", "memory_bytes = 0", "memory_bytes is 0; it is a number above 0"),
        (TIERS, "memory_bytes = 40e9", "memory_byte = 1", "did you mean 'memory_bytes'"),
        (TIERS, "3e11", "-1", "bytes_per_second is -1"),
        (TIERS, "devices = 4\n", "", "lacks devices"),
        (TIERS, '"H100"', '"H1000"', "did you mean 'H100'"),
        (NODES, "[0, 2e10, 1e10]", "[0, 2e10]", "square"),
        (NODES, "[0, 2e10, 1e10]", "[0, 0, 1e10]", "from node 0 to node 1 is 0.0"),
        (NODES, '"c"]', '"c", "d"]', "4 names for 3 nodes"),
        (CUSTOM, "float32 = 1e11", "", "no flops_per_second"),
        (CUSTOM, "dims = [2, 4]", "dims = []", "need as many entries"),
        (CUSTOM, 'kind = "cpu"\n', "", "lacks kind"),
        (CUSTOM, "[torus]", "[torus", "is not TOML"),
        ('accelerator = "H100"', "", "", "no links"),
        (MEASURED, "matmul", "matmull", "efficiency: unknown key 'matmull', did you mean 'matmul'"),
        (MEASURED, "0.7", "0", "efficiency: matmul is 0"),
        (MEASURED, "gpu = 1e-5", "gp = 1e-5", "launch_seconds: unknown key 'gp', did you mean 'gpu'"),
    ],
)
def test_file_with_a_mistake_gets_one_clear_error(tmp_path, text, old, new, message):
    with pytest.raises(ValueError, match=message):
        _file(tmp_path, text.replace(old, new) if old else text)


def test_measured_efficiency_is_what_the_cost_model_takes(tmp_path):
    cluster = _file(tmp_path, MEASURED)
    assert cluster.efficiency == dataclasses.replace(
        Efficiency(), matmul=0.7, launch_seconds=(("gpu", 1e-5), *Efficiency().launch_seconds[1:])
    )
    assert Cluster.from_json(cluster.to_json()) == cluster
    assert CostModel(cluster, {"none": Workload((), {})}).efficiency == cluster.efficiency
    other = Efficiency(matmul=0.5)
    assert CostModel(cluster, {"none": Workload((), {})}, efficiency=other).efficiency == other
    assert parse_cluster("8xH100").efficiency is None


def test_tiers_that_do_not_nest_are_refused():
    h100 = find_accelerator("H100")
    with pytest.raises(ValueError, match="nearest: 16"):
        Cluster("x", h100, (Tier("node", 8, 1e9), Tier("rack", 12, 1e9)))
    with pytest.raises(ValueError, match="neither tiers nor a torus"):
        Cluster("x", h100)
    with pytest.raises(ValueError, match="one of switch, mesh"):
        dataclasses.replace(parse_cluster("8xH100").tiers[0], links="rings")
