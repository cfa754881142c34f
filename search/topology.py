"""What a cluster's compiler is asked to compile for, with no device attached: topologies of TPUs, descriptions of GPUs.

    target = target_of(parse_cluster("2*v5p:4x4x4"))    # platform, topology, devices; ValueError where there is none
    toolchain(target)                                    # versions, or ToolchainMissing: which extra to install
    env = os.environ | environment(target)               # of the child that compiles, see search/compiler.py
    devices = open_devices(target)                       # in that child: in the planner's numbering

TPU compilers open a slice without its wrap-around links unless told (`wrap`), and list v4's two cores apart unless told
(`chip_config_name`): both change what is compiled. On v5p:4x4x4 without wrap, an all-gather over 64 chips is compiled
as an all-reduce of twice the bytes; with it, as an all-gather.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import math
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from typing import Any, Literal

from search.accelerators import Accelerator, accelerators, aliases
from search.cluster import Cluster
from sharding_rules.mesh import in_order

TOOLCHAIN_PATH = "REDCO_LIKE_TOOLCHAIN_PATH"
"""Environment variable: folders of more wheels (`pip install --no-deps --target FOLDER ...`), seen by children only."""

# Accelerator of accelerators.toml -> name that libtpu opens, prefix of TPU_ACCELERATOR_TYPE, what its number counts in
# a chip.
_TPUS = {
    "v4": ("v4", "v4", 2),
    "v5e": ("v5e", "v5litepod", 1),
    "v5p": ("v5p", "v5p", 2),
    "v6e": ("v6e", "v6e", 1),
    "tpu7x": ("tpu7x", "tpu7x", 2),
}
_GPU_WHEELS = [("jax-cuda12-plugin", "jax-cuda12-pjrt"), ("jax-cuda13-plugin", "jax-cuda13-pjrt")]


class CompileFailed(RuntimeError):
    """A compile came to nothing: the line says why. Subclasses tell causes apart, see `search.compiler`."""


class ToolchainMissing(CompileFailed):
    """The compiler is not installed; the message names the extra that brings it."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
        extra: the extra of this package that brings the compiler.
        topology: "v5p:4x4x4" (chips of one slice); GPUs "1x16x8" (partitions x nodes x GPUs of a node).
        slices: TPU slices, joined by their network cards; 1 for GPUs.
        config: description of the GPU, in XLA's text format; "" for TPUs.
        devices: JAX devices of all slices, as the planner counts them.
        wrap: per dimension of the slice, whether it closes to a ring.
        accelerator: its name in `accelerators.toml`.
    """

    platform: Literal["tpu", "cuda"]
    extra: Literal["tpu-aot", "gpu-aot"]
    topology: str
    slices: int
    config: str
    devices: int
    wrap: tuple[bool, ...] = ()
    accelerator: str = ""

    def __str__(self) -> str:
        if self.platform == "tpu":
            return f"{self.slices}*{self.topology}" if self.slices > 1 else self.topology
        _, nodes, per_node = self.topology.split("x")
        return f"{nodes}x{per_node}x{self.accelerator}"


def target_of(cluster: Cluster) -> Target:
    """Return what the cluster's compiler is asked to compile for.

    >>> from search.cluster import parse_cluster
    >>> target_of(parse_cluster("2*v5p-128")).topology, target_of(parse_cluster("4x8xH100")).topology
    ('v5p:4x4x4', '1x4x8')

    Raises:
        ValueError: no compiler for that accelerator (the nearest is given), or TPUs in no torus.
    """
    name = _known_name(cluster)
    accelerator = accelerators()[name]
    if accelerator.torus_dims:
        return _tpu_target(cluster, name)
    if name not in _gpus():
        near = _nearest(accelerator, _gpus())
        raise ValueError(
            f"cluster {cluster.name!r}: no compiler here compiles for {name}; GPUs it compiles for: "
            f"{', '.join(_gpus())}; the nearest is {near}"
        )
    per_node = cluster.devices_per_node
    topology = f"1x{cluster.devices // per_node}x{per_node}"
    return Target("cuda", "gpu-aot", topology, 1, gpu_description(name), cluster.devices, accelerator=name)


def _known_name(cluster: Cluster) -> str:
    """The accelerator's name in accelerators.toml; what a file changes of it is not the compiler's to know."""
    name = cluster.accelerator.name
    base = name.removesuffix(" as in the file")
    if base.lower() in aliases():
        return aliases()[base.lower()]
    near = _nearest(cluster.accelerator, [*_TPUS, *_gpus()])
    raise ValueError(
        f"cluster {cluster.name!r}: its accelerator {name!r} is none that a compiler knows "
        f"({', '.join([*_TPUS, *_gpus()])}); in the file, leave accelerator.name out and give the one to compile "
        f"for as accelerator.base; the nearest is base = {near!r}"
    )


def _nearest(accelerator: Accelerator, names: Any) -> str:
    def distance(name: str) -> float:
        other = accelerators()[name]
        peak, others = (max(p for _, p in a.peak_flops_per_second if p) for a in (accelerator, other))
        apart = abs(math.log(accelerator.memory_bytes / other.memory_bytes)) + abs(math.log(peak / others))
        return apart + 10 * (accelerator.kind != other.kind)

    return min(names, key=distance)


def _tpu_target(cluster: Cluster, name: str) -> Target:
    torus = cluster.torus
    if torus is None:
        raise ValueError(
            f"cluster {cluster.name!r} has {cluster.devices} devices of {name} and no torus; a TPU compiler compiles "
            f"for slices: give [torus] with dims in the file, or write the cluster as {name}:"
            f"{'x'.join('2' * len(accelerators()[name].torus_dims))}"
        )
    dims, limits = torus.dims, accelerators()[name].torus_dims
    per_chip = accelerators()[name].devices_per_chip
    if torus.devices_per_chip != per_chip:
        raise ValueError(
            f"cluster {cluster.name!r}: its torus has {torus.devices_per_chip} devices a chip, but the compiler of "
            f"{name} has {per_chip}; give devices_per_chip = {per_chip}"
        )
    if len(dims) != len(limits):
        raise ValueError(
            f"cluster {cluster.name!r}: a torus of {'x'.join(map(str, dims))} chips has {len(dims)} dimensions; the "
            f"compiler of {name} takes {len(limits)}, as in {name}:{'x'.join('4' * len(limits))}"
        )
    topology = f"{_TPUS[name][0]}:{'x'.join(map(str, dims))}"
    slices = cluster.devices // torus.devices
    return Target("tpu", "tpu-aot", topology, slices, "", cluster.devices, tuple(torus.wrap), name)


@functools.cache
def _gpus() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads(importlib.resources.files("search").joinpath("targets/gpus.toml").read_text("utf-8"))


# The limits that all of them share: CUDA C++ Programming Guide, technical specifications per compute capability.
_DESCRIPTION = """gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {cores}
  fpus_per_core: {lanes_per_core}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  memory_bandwidth: {memory_bytes_per_second}
  l2_cache_size: {l2_cache_bytes}
  shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  device_interconnect_info {{ active_links: {links} }}
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def gpu_description(name: str) -> str:
    """Return the description of a GPU that XLA compiles for, in its text format (`GpuTargetConfigProto`)."""
    gpu = _gpus()[name]
    match = re.fullmatch(r"(\d+)\.(\d)(a?)", gpu["capability"])
    if match is None:
        raise ValueError(f"targets/gpus.toml: {name} has capability {gpu['capability']!r}; write it as in 9.0a")
    major, minor, accelerated = match.groups()
    extension = "ACCELERATED_FEATURES" if accelerated else "NONE"
    return _DESCRIPTION.format(**gpu, major=major, minor=minor, extension=extension)


def toolchain_path() -> list[str]:
    """Folders of `REDCO_LIKE_TOOLCHAIN_PATH`, which only the compiling children import from."""
    return [folder for folder in os.environ.get(TOOLCHAIN_PATH, "").split(os.pathsep) if folder]


def toolchain(target: Target) -> dict[str, str]:
    """Return the versions that what is compiled depends on, without importing the compiler.

    Raises:
        ToolchainMissing: it is not installed.
    """
    found = {name: version for name in ("jax", "jaxlib") if (version := _version(name))}
    sets = [("libtpu",)] if target.platform == "tpu" else _GPU_WHEELS
    for wheels in sets:
        versions = {name: _version(name) for name in wheels}
        if all(versions.values()):
            return found | {name: version for name, version in versions.items() if version}
    missing = [name for name in sets[0] if not _version(name)]
    raise ToolchainMissing(
        f"no compiler for {target}: {' and '.join(missing)} not installed; pip install 'redco-like[{target.extra}]'"
    )


def _version(name: str) -> str | None:
    for found in importlib.metadata.distributions(name=name, path=toolchain_path()):
        return found.version
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(target: Target) -> dict[str, str]:
    """Return the environment variables of the child that compiles, to lay over those of the parent."""
    # What this process can import, the child can.
    path = [os.getcwd() if folder == "" else folder for folder in sys.path]
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes out of it is not compiled, and leaves nothing to read
        "PYTHONPATH": os.pathsep.join([*path, *toolchain_path()]),
        "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings too: the partitioner's are read
    }
    if target.platform == "cuda":
        return env | {"CUDA_VISIBLE_DEVICES": "-1"}
    _, prefix, per_chip = _TPUS[target.accelerator]
    return env | {
        "TPU_STDERR_LOG_LEVEL": "1",  # libtpu's own, of the same
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{prefix}-{math.prod(_dims(target)) * per_chip}",
        # Without it, two processes that start together die on libtpu's lock file. No device is used: nothing to guard.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _dims(target: Target) -> tuple[int, ...]:
    return tuple(int(dim) for dim in target.topology.partition(":")[2].split("x"))


def open_devices(target: Target) -> list:
    """Open the topology: its devices in the planner's numbering (`search.cluster.Torus`: last dimension fastest).

    For the child process only, under `environment(target)`: it loads the compiler.

    Raises:
        CompileFailed: the compiler does not open the topology, or counts other devices than the planner.
    """
    import jax
    from jax.experimental import topologies

    if target.platform == "cuda":
        options: dict[str, Any] = {"target_config": target.config, "topology": target.topology}
    else:
        dims = (*_dims(target), 1)[:3]
        options = {
            "topology_name": target.topology,
            "wrap": [*target.wrap, False][:3],
            # Chips of a host, which tile the slice: 2x2 unless a side is odd.
            "chips_per_host_bounds": [2 - dims[0] % 2, 2 - dims[1] % 2, 1],
        }
        if target.slices > 1:
            options["num_slices"] = target.slices
        if target.accelerator == "v4":
            options["chip_config_name"] = "megacore"  # a device is a chip, as on the real ones
    try:
        devices = list(topologies.get_topology_desc(platform=target.platform, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise CompileFailed(f"the compiler does not open {target}: {error}") from error
    if len(devices) != target.devices:
        raise CompileFailed(f"the compiler lists {len(devices)} devices for {target}; the planner has {target.devices}")
    return in_order(devices)
