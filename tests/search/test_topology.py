"""What a cluster is compiled for: names, sizes, rings, descriptions of GPUs; what cannot be compiled says so."""

import os
import subprocess
import sys

import pytest

from search import topology
from search.cluster import parse_cluster
from search.topology import Target, ToolchainMissing, environment, gpu_description, target_of, toolchain


@pytest.mark.parametrize(
    "cluster, name, slices, devices, wrap, kind",
    [
        ("v4:4x4x4", "v4:4x4x4", 1, 64, (True,) * 3, "v4-128"),
        ("v5p-128", "v5p:4x4x4", 1, 64, (True,) * 3, "v5p-128"),
        ("v5p:2x2x1", "v5p:2x2x1", 1, 4, (False,) * 3, "v5p-8"),
        ("2*v5p:4x4x4", "v5p:4x4x4", 2, 128, (True,) * 3, "v5p-128"),
        ("v5e-16", "v5e:4x4", 1, 16, (False,) * 2, "v5litepod-16"),
        ("v5e:8x16", "v5e:8x16", 1, 128, (False, True), "v5litepod-128"),
        ("v5e:1x1", "v5e:1x1", 1, 1, (False,) * 2, "v5litepod-1"),
        ("v6e:16x16", "v6e:16x16", 1, 256, (True,) * 2, "v6e-256"),
        ("tpu7x:4x4x8", "tpu7x:4x4x8", 1, 256, (True,) * 3, "tpu7x-256"),
    ],
)
def test_tpu_slices_have_names_and_rings(cluster, name, slices, devices, wrap, kind):
    target = target_of(parse_cluster(cluster))
    assert (target.platform, target.extra, target.config) == ("tpu", "tpu-aot", "")
    assert (target.topology, target.slices, target.devices, target.wrap) == (name, slices, devices, wrap)
    assert str(target) == (f"{slices}*{name}" if slices > 1 else name)
    env = environment(target)
    assert env["TPU_ACCELERATOR_TYPE"] == kind
    assert env["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert env["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    "cluster, shape, device",
    [
        ("8xH100", "1x1x8", "NVIDIA H100 80GB HBM3"),
        ("4x8xH200", "1x4x8", "NVIDIA H200 141GB HBM3e"),
        ("16x8xA100", "1x16x8", "NVIDIA A100-SXM4-80GB"),
        ("8xA100-40", "1x1x8", "NVIDIA A100-SXM4-40GB"),
        ("2x8xB200", "1x2x8", "NVIDIA B200"),
        ("2x72xGB200", "1x2x72", "NVIDIA GB200"),
        ("1xH100", "1x1x1", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_gpus_have_shapes_and_descriptions(cluster, shape, device):
    target = target_of(parse_cluster(cluster))
    assert (target.platform, target.extra, target.topology) == ("cuda", "gpu-aot", shape)
    assert target.devices == parse_cluster(cluster).devices
    assert f'device_description_str: "{device}"' in target.config
    assert environment(target)["CUDA_VISIBLE_DEVICES"] == "-1"


def test_a_description_says_what_the_accelerators_table_does():
    from search.accelerators import accelerators

    for name, gpu in topology._gpus().items():
        ours = accelerators()[name]
        assert gpu["memory_bytes"] == pytest.approx(ours.memory_bytes, rel=0.08)
        assert gpu["memory_bytes_per_second"] == pytest.approx(ours.memory_bytes_per_second, rel=0.05)
        assert gpu_description(name).count("{") == gpu_description(name).count("}")


@pytest.mark.parametrize(
    "cluster, message",
    [
        ("8xMI300X", r"no compiler here compiles for MI300X; .* the nearest is H200"),
        ("8xV100", r"no compiler here compiles for V100-32; .*A100-40.* the nearest is A100-40"),
    ],
)
def test_what_has_no_compiler_names_the_nearest(cluster, message):
    with pytest.raises(ValueError, match=message):
        target_of(parse_cluster(cluster))


def cluster_file(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return parse_cluster(path)


def test_a_file_compiles_for_the_base_of_its_accelerator(tmp_path):
    text = 'cluster = "v5e:2x4"\n[accelerator]\nlink_bytes_per_second = 1e9\n'
    assert target_of(cluster_file(tmp_path, text)).topology == "v5e:2x4"
    text = (
        '[accelerator]\nbase = "v5p"\n[torus]\ndims = [2, 2, 4]\nwrap = [false, false, true]\nbytes_per_second = 9e10\n'
    )
    target = target_of(cluster_file(tmp_path, text))
    assert (target.topology, target.wrap) == ("v5p:2x2x4", (False, False, True))


@pytest.mark.parametrize(
    "text, message",
    [
        (
            'cluster = "v5e:2x4"\n[accelerator]\nname = "v9"\n',
            r"accelerator 'v9' is none that a compiler knows .*'v5e'",
        ),
        ('accelerator = "v5e"\n[[tiers]]\nname = "t"\ndevices = 4\nbytes_per_second = 1e9\n', r"of v5e and no torus"),
        ('accelerator = "v5p"\n[torus]\ndims = [2, 4]\nbytes_per_second = 1e9\n', r"2x4 chips has 2 dim.*takes 3"),
        ('accelerator = "tpu7x"\n[torus]\ndims = [2, 2, 1]\nbytes_per_second = 1e9\n', r"give devices_per_chip = 2"),
    ],
)
def test_a_file_that_no_compiler_understands_says_what_to_change(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        target_of(cluster_file(tmp_path, text))


def test_a_missing_compiler_names_its_extra_and_the_wheels(monkeypatch):
    monkeypatch.setattr(
        topology, "_version", lambda name: "1" if name in ("jax", "jaxlib", "jax-cuda12-pjrt") else None
    )
    with pytest.raises(ToolchainMissing, match=r"v5e:2x4: libtpu not installed; pip install 'redco-like\[tpu-aot\]'"):
        toolchain(target_of(parse_cluster("v5e:2x4")))
    with pytest.raises(ToolchainMissing, match=r"1x8xH100: jax-cuda12-plugin not installed; .*redco-like\[gpu-aot\]'"):
        toolchain(target_of(parse_cluster("8xH100")))


def test_wheels_in_a_folder_of_their_own_are_the_childs_alone(tmp_path, monkeypatch):
    for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        info = tmp_path / f"{name.replace('-', '_')}-9.8.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8\n")
    target = target_of(parse_cluster("8xH100"))
    monkeypatch.setenv("REDCO_LIKE_TOOLCHAIN_PATH", str(tmp_path))
    assert toolchain(target).items() >= {"jax-cuda12-plugin": "9.8", "jax-cuda12-pjrt": "9.8"}.items()
    assert environment(target)["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path


OPEN = """
import sys
from search.cluster import parse_cluster
from search.topology import open_devices, target_of
cluster = parse_cluster(sys.argv[1])
for n, d in enumerate(open_devices(target_of(cluster))):
    dims = (*cluster.torus.dims, cluster.torus.devices_per_chip)
    where = (*d.coords[: len(dims) - 1], d.core_on_chip)
    for dim, x in zip(dims[::-1], where[::-1]):
        n, at = divmod(n, dim)
        assert at == x, (n, d)
    assert n == (getattr(d, "slice_index", None) or 0), d
print("numbered")
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    "cluster", ["v4:2x2x4", "v5e:1x1", "v5e:2x4", "2*v5p:4x4x4", "v5p:2x2x1", "v5p:2x3x4", "v6e:4x8", "tpu7x:2x2x2"]
)
def test_devices_open_in_the_planners_numbering(cluster):
    target = target_of(parse_cluster(cluster))
    toolchain(target)
    run = subprocess.run(
        [sys.executable, "-c", OPEN, cluster], env=os.environ | environment(target), capture_output=True, text=True
    )
    assert run.stdout.strip() == "numbered", run.stderr[-2000:]


def test_a_target_is_data():
    target = target_of(parse_cluster("v5e:2x4"))
    assert target == Target("tpu", "tpu-aot", "v5e:2x4", 1, "", 8, (False, False), "v5e")
