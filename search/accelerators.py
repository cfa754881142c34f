"""Accelerators: peaks, memory and links per JAX device, from the packaged `accelerators.toml`.

    find_accelerator("H100").flops("bfloat16")

A TPU device is a chip, but half of one on tpu7x, as JAX sees them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

Links = Literal["switch", "mesh"]


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of JAX device. Bytes, bytes per second of one direction, seconds; see `accelerators.toml`.

    Attributes:
        peak_flops_per_second: (dtype, peak) pairs; read with `flops`.
        usable_memory_bytes: what a program may use of `memory_bytes`.
        devices_per_node: size of the fast domain of a GPU; 1 for TPUs, whose slice is a torus.
        links: "switch": a device may send all its bandwidth to any other; "mesh": an equal share to each other device.
        link_bytes_per_second: raw bandwidth of a device in its node, or of one torus link.
        link_efficiency, nic_efficiency: share of the raw bandwidth that a long ring collective attains.
        switch_reduce_bytes_per_second: all-reduce bytes per second where the switch adds up (NVLink SHARP).
        nic_bytes_per_second: raw bandwidth per device out of its node or slice.
        launch_seconds: of starting one collective.
        nic_launch_seconds: more of it where the collective leaves the node or slice.
        ramp: weight of the square-root term of `search.collectives` (1 for NCCL, 0 for TPUs).
        name_counts: what a number after a TPU's name counts.
        torus_dims: the largest torus, in chips.
        wrap: "full" closes a dimension of full length only, "cubes" every dimension of a torus made of 4x4x4 cubes.
        chip_bytes_per_second: between the devices of one chip, where `devices_per_chip` is more than 1.
        source, fit: where the raw figures and the fitted ones come from.
    """

    name: str
    kind: Literal["gpu", "tpu", "cpu"]
    memory_bytes: float
    memory_bytes_per_second: float
    peak_flops_per_second: tuple[tuple[str, float], ...]
    link_bytes_per_second: float
    usable_memory_bytes: float = 0
    link_efficiency: float = 1.0
    link_latency_seconds: float = 0.0
    link: str = ""
    links: Links = "switch"
    switch_reduce_bytes_per_second: float = 0.0
    nic: str = ""
    nic_bytes_per_second: float = 0.0
    nic_efficiency: float = 1.0
    nic_latency_seconds: float = 0.0
    nic_launch_seconds: float = 0.0
    launch_seconds: float = 0.0
    ramp: float = 0.0
    devices_per_node: int = 1
    name_counts: Literal["devices", "cores", "chips"] = "devices"
    devices_per_chip: int = 1
    chip_bytes_per_second: float = 0.0
    torus_dims: tuple[int, ...] = ()
    wrap: Literal["", "full", "cubes"] = ""
    source: str = ""
    fit: str = ""

    def __post_init__(self):
        object.__setattr__(self, "torus_dims", tuple(self.torus_dims))
        object.__setattr__(
            self, "peak_flops_per_second", tuple((str(name), float(peak)) for name, peak in self.peak_flops_per_second)
        )
        if not self.usable_memory_bytes:
            object.__setattr__(self, "usable_memory_bytes", self.memory_bytes)
        for field in ("memory_bytes", "usable_memory_bytes", "memory_bytes_per_second", "link_bytes_per_second"):
            positive(getattr(self, field), f"accelerator {self.name}: {field}")
        for dtype, peak in self.peak_flops_per_second:
            positive(peak, f"accelerator {self.name}: flops_per_second of {dtype}")
        if not self.peak_flops_per_second:
            raise ValueError(f"accelerator {self.name} has no flops_per_second; give at least one dtype")
        if self.links not in get_args(Links):
            raise ValueError(f"accelerator {self.name}: links={self.links!r}; one of {', '.join(get_args(Links))}")

    def flops(self, dtype: str) -> float:
        """Return the peak FLOP/s of matrix products in a dtype.

        float16 stands in for a missing bfloat16 and the other way round. A float32 product runs at `float32`, else, on
        TPUs, in six bfloat16 passes (`jax.lax.Precision.HIGHEST`).

        >>> find_accelerator("H100").flops("bfloat16")
        989400000000000.0

        Raises:
            ValueError: the accelerator has no such dtype; the message has those it has.
        """
        peaks = dict(self.peak_flops_per_second)
        twin = {"bfloat16": "float16", "float16": "bfloat16"}.get(dtype, dtype)
        if dtype in peaks or twin in peaks:
            return peaks.get(dtype, peaks.get(twin, 0.0))
        if dtype == "float32" and "bfloat16" in peaks:
            return peaks["bfloat16"] / 6
        raise ValueError(f"{self.name} has no peak for {dtype!r}; it has {', '.join(peaks)}")


@functools.cache
def accelerators() -> Mapping[str, Accelerator]:
    """Read the packaged `accelerators.toml`: name -> Accelerator.

    >>> sorted(accelerators())[:3]
    ['A100-40', 'A100-80', 'A800-80']
    """
    table = tomllib.loads(importlib.resources.files("search").joinpath("accelerators.toml").read_text("utf-8"))
    return {name: accelerator_from(name, entry) for name, entry in table.items()}


@functools.cache
def aliases() -> Mapping[str, str]:
    """Spellings in lower case -> name."""
    table = tomllib.loads(importlib.resources.files("search").joinpath("accelerators.toml").read_text("utf-8"))
    return {alias.lower(): name for name, entry in table.items() for alias in (name, *entry.get("aliases", ()))}


def find_accelerator(name: str) -> Accelerator:
    """Return an accelerator by name or alias, in any case.

    >>> find_accelerator("a100").name
    'A100-80'

    Raises:
        ValueError: unknown; the message has the nearest name.
    """
    known = aliases()
    if name.lower() in known:
        return accelerators()[known[name.lower()]]
    raise ValueError(
        f"unknown accelerator {name!r}{nearest(name, known, lambda alias: known[alias])}; "
        f"known: {', '.join(accelerators())}"
    )


def accelerator_from(
    name: str, entry: Mapping[str, Any], base: Accelerator | None = None, where: str = ""
) -> Accelerator:
    fields = [field.name for field in dataclasses.fields(Accelerator) if field.name != "name"]
    known = ["flops_per_second" if field == "peak_flops_per_second" else field for field in fields]
    known_keys(entry, (*known, "aliases"), f"{where}: accelerator" if where else f"accelerator {name}")
    values = {key: value for key, value in entry.items() if key not in ("aliases", "flops_per_second")}
    if "flops_per_second" in entry:
        peaks = entry["flops_per_second"]
        if not isinstance(peaks, dict):
            raise ValueError(f"accelerator {name}: flops_per_second is a table such as {{ bfloat16 = 312e12 }}")
        values["peak_flops_per_second"] = tuple(peaks.items())
    if base is not None:
        if "memory_bytes" in values and "usable_memory_bytes" not in values:
            values["usable_memory_bytes"] = min(values["memory_bytes"], base.usable_memory_bytes)
        return dataclasses.replace(base, name=name, **values)
    return build(Accelerator, {"name": name, **values}, f"accelerator {name}")


def build(kind: Any, values: Any, where: str) -> Any:
    """Make a dataclass from a table, with one clear error for keys that it does not have or lacks."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; a table is needed")
    fields = dataclasses.fields(kind)
    known_keys(values, [field.name for field in fields], where)
    missing = [
        f.name
        for f in fields
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**values)


def known_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")


def nearest(word: str, known: Iterable[str], name: Callable[[str], str] = lambda word: word) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f", did you mean {name(close[0])!r}?" if close else ""


def positive(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{what} is {value!r}; it is a number above 0")


def not_negative(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} is {value!r}; it is a number from 0 up")


def whole(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}; it is a whole number from 1 up")
