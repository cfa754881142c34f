"""The devices of this process and of its peers as a `Cluster` to plan for.

    cluster = cluster_here(jax.devices())

Known GPUs and TPUs get the figures of `search/accelerators.toml`. What is not listed there, and every CPU, gets assumed
ones; `redco_like.profile` measures them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from search import Cluster, parse_cluster
from search.accelerators import Accelerator, accelerators, aliases
from search.cluster import Tier
from search.efficiency import Efficiency

TPU_KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e", "7x": "tpu7x"}
"""What JAX calls the kinds of TPU, after the word TPU, where that is not their name."""
CPU_EFFICIENCY = Efficiency(
    matmul=1.0,
    half_size=6.0,
    half_depth=6.0,
    vector=0.36,
    transcendental_flops=40.0,
    bandwidth=1.0,
    launch_seconds=(("gpu", 2e-6), ("tpu", 5e-7), ("cpu", 3.3e-6)),
    overlap_slowdown=2.0,
)
"""From the same machine as the figures of `_cpu`: nothing is hidden behind compute that needs the same cores."""
UNLISTED = {"gpu": "A100-80", "tpu": "v5p"}
"""Whose figures a GPU or TPU gets that is not listed."""


def cluster_here(devices: Sequence[Any]) -> Cluster:
    """The devices of this run. With several processes each calls this and gets the same; the smallest memory counts."""
    facts = np.asarray([memory_bytes_per_device(devices), os.cpu_count() or 1], np.float32)
    if jax.process_count() > 1:
        facts = np.asarray(multihost_utils.process_allgather(facts)).min(0)
    return cluster_of(devices, memory_bytes=float(facts[0]), cores=int(facts[1]))


def memory_bytes_per_device(devices: Sequence[Any]) -> float:
    """Memory of the smallest device as its runtime states it; for CPU devices an equal share of the machine's."""
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    if limits:
        return float(min(limits))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(len(stats), 1)


def cluster_of(devices: Sequence[Any], *, memory_bytes: float, cores: int | None = None) -> Cluster:
    """Describe devices.

    Args:
        devices: all of one kind, as a Deployer has them.
        memory_bytes: that a program may use on each.
        cores: of a host, for CPU devices, which share them; default those of this one.

    Returns:
        Devices of a host and the hosts as tiers; on TPUs the torus of the devices' coordinates. The same on every
        process that gives the same arguments.
    """
    first = devices[0]
    hosts = collections.Counter(device.process_index for device in devices)
    # With a process per GPU, the number within its host says how many there are.
    per_node = max(*hosts.values(), 1 + max(device.local_hardware_id or 0 for device in devices))
    if len(devices) % per_node:
        per_node = math.gcd(len(devices), per_node)
    name = f"{len(devices)} x {first.device_kind}"
    if first.platform == "cpu":
        accelerator = _cpu(first.device_kind, memory_bytes, (cores or os.cpu_count() or 1) / per_node)
        return Cluster(name, accelerator, _tiers(accelerator, len(devices), per_node), efficiency=CPU_EFFICIENCY)
    known = accelerator_of(first.device_kind, memory_bytes)
    listed = known or accelerators()[UNLISTED["tpu" if first.platform == "tpu" else "gpu"]]
    accelerator = dataclasses.replace(listed, usable_memory_bytes=memory_bytes)
    if known is None:
        source = f"assumed: the figures of {listed.name}"
        accelerator = dataclasses.replace(accelerator, name=first.device_kind, source=source)
    if dims := _torus_dims(devices, accelerator):
        slices = len(devices) // (math.prod(dims) * accelerator.devices_per_chip)
        shape = "x".join(map(str, dims))
        cluster = parse_cluster(f"{slices}*{listed.name}:{shape}" if slices > 1 else f"{listed.name}:{shape}")
        return dataclasses.replace(cluster, name=name, accelerator=accelerator)
    return Cluster(name, accelerator, _tiers(accelerator, len(devices), per_node))


def accelerator_of(device_kind: str, memory_bytes: float) -> Accelerator | None:
    """The accelerator that JAX calls `device_kind`; where it comes with several memories, the nearest one.

    >>> accelerator_of("NVIDIA H100 80GB HBM3", 80e9).name, accelerator_of("TPU v5 lite", 16e9).name
    ('H100', 'v5e')
    """
    kind = device_kind.lower()
    if kind.startswith("tpu"):
        version = kind.removeprefix("tpu").strip()
        name = aliases().get(TPU_KINDS.get(version, version))
        return accelerators()[name] if name else None
    words = set(re.split(r"[^a-z0-9]+", kind))
    fitting = [a for a in accelerators().values() if a.kind == "gpu" and a.name.lower().split("-")[0] in words]
    return min(fitting, key=lambda a: abs(a.memory_bytes - memory_bytes), default=None)


def _tiers(accelerator: Accelerator, devices: int, per_node: int) -> tuple[Tier, ...]:
    node = Tier(
        "node",
        per_node,
        accelerator.link_bytes_per_second * accelerator.link_efficiency,
        accelerator.link_latency_seconds,
        accelerator.links,
        accelerator.switch_reduce_bytes_per_second,
    )
    if devices == per_node:
        return (node,)
    network = Tier(
        "network",
        devices,
        accelerator.nic_bytes_per_second * accelerator.nic_efficiency,
        accelerator.nic_latency_seconds,
        launch_seconds=accelerator.nic_launch_seconds,
    )
    return (node, network)


def _torus_dims(devices: Sequence[Any], accelerator: Accelerator) -> tuple[int, ...]:
    """Chips along each dimension of a slice that the devices fill; () where they fill none."""
    coords = [getattr(device, "coords", None) for device in devices]
    if not accelerator.torus_dims or not all(coords):
        return ()
    spans = [max(axis) - min(axis) + 1 for axis in zip(*(c for c in coords if c), strict=True)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if math.prod(spans) * slices * accelerator.devices_per_chip != len(devices):
        return ()
    # JAX gives three coordinates for two-dimensional tori too; x runs fastest, as the last of the cluster's dimensions.
    return tuple(reversed(spans[: len(accelerator.torus_dims)]))


def _cpu(name: str, memory_bytes: float, cores: float) -> Accelerator:
    """A device with a share of a host's cores. All devices compute at once, so that each step waits for all of them."""
    return Accelerator(
        name=name,
        kind="cpu",
        memory_bytes=memory_bytes,
        memory_bytes_per_second=14e9 * cores,
        peak_flops_per_second=(("float32", 65e9 * cores), ("bfloat16", 55e9 * cores)),
        link_bytes_per_second=4e9 * cores,
        link_latency_seconds=3e-6 / cores,
        nic_bytes_per_second=1e9 * cores,
        nic_latency_seconds=5e-5,
        launch_seconds=1.1e-5 / cores,
        source="assumed: what redco_like.profile measured per core on two busy cores of AMD EPYC 9004",
    )
