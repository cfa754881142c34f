"""What the devices of this process attain, measured: a cluster file that the planner takes.

    profile = profile_devices()
    print(profile)                          # each constant, with the quartiles of what was measured of it
    profile.save("cluster.toml")            # for redco-like plan --cluster cluster.toml and Trainer(cluster=...)

From the times of `redco_like.microbench`, by least absolute deviation of logarithms:

    product     T = flops / (peak x/(x+h) for each of x = m, n, k) + launch      peak by dtype, one h
    stream      T = bytes / bandwidth + launch                                   of the two largest sizes
    vector      T = flops / rate,  transcendental  T = operations flops / rate
    collective  `search.collectives`, with a launch, and a latency and a bandwidth for each tier of links
    overlap     T(both) = max(C, X) + (s - 1) min(C, X)                          as in `search.cost`

Virtual devices of one CPU share its cores: each gets the share that it has while all are busy.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pipelines.devices import cluster_here
from redco_like.microbench import COLLECTIVES, OVERLAP, STREAMED, VECTOR_FLOPS, Effort, Measurement, measure
from search.accelerators import Accelerator
from search.cluster import Cluster
from search.collectives import collective_seconds
from search.efficiency import Efficiency


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant of the cost model (measured).

    Attributes:
        value: that fits best.
        low, high: quartiles of the values that single measurements would give.
        count: measurements.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    count: int

    def __str__(self) -> str:
        low, high = self.low / self.value - 1, self.high / self.value - 1
        return f"{self.name:36s} {self.value:10.4g} {self.unit:8s} {low:+5.0%} {high:+5.0%}  {self.count:3d} measured"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Devices, measured.

    Attributes:
        cluster: with the measured constants in its accelerator, its links and its `efficiency`.
        constants: the same with their spread.
        measurements: that they come from.
        seconds: that measuring took.
        when: date and time, UTC.
    """

    cluster: Cluster
    constants: tuple[Constant, ...]
    measurements: tuple[Measurement, ...]
    seconds: float
    when: str
    label: str = "measured"

    def __str__(self) -> str:
        title = f"{self.cluster.name} (measured {self.when}, {self.seconds:.0f} s; value, quartiles)"
        return "\n".join([title, *map(str, self.constants)])

    def save(self, path: str | pathlib.Path) -> None:
        """Write a cluster file.

        Raises:
            ValueError: a path that does not end in .toml.
        """
        path = pathlib.Path(path)
        if path.suffix != ".toml":
            raise ValueError(f"a cluster file is a TOML file, not {path.name!r}; nearest: {path.with_suffix('.toml')}")
        path.write_text(self.to_toml(), "utf-8")

    def to_toml(self) -> str:
        """The cluster as `search.parse_cluster` reads it, the spread in comments."""
        lines = [f"# {line}" for line in str(self).splitlines()]
        lines += ["", f"name = {_toml(self.cluster.name)}", "", "[accelerator]"]
        lines += _table(self.cluster.accelerator, {"peak_flops_per_second": "flops_per_second"})
        for tier in self.cluster.tiers:
            lines += ["", "[[tiers]]", *_table(tier)]
        if self.cluster.torus is not None:
            lines += ["", "[torus]", *_table(self.cluster.torus)]
        if self.cluster.efficiency is not None:
            lines += ["", "[efficiency]", *_table(self.cluster.efficiency)]
        return "\n".join(lines) + "\n"


def profile_devices(
    devices: Sequence[Any] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    effort: Effort | None = None,
) -> Profile:
    """Measure devices: products, memory, arithmetic, launches, collectives, overlap.

    Args:
        devices: all are busy at once; default `jax.devices()`. With several processes each calls this.
        progress: is told what is measured, whenever that changes.
        effort: how long to measure; the default takes under a minute on 8 virtual devices of 2 cores.

    Returns:
        What was measured, as a cluster to plan for.
    """
    devices = list(jax.devices() if devices is None else devices)
    start = time.perf_counter()
    found = measure(devices, effort or Effort(), progress=progress or (lambda _: None))
    cluster, constants = fit(cluster_here(devices), found)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Profile(cluster, constants, tuple(found), time.perf_counter() - start, now)


def fit(template: Cluster, measurements: Sequence[Measurement]) -> tuple[Cluster, tuple[Constant, ...]]:
    """Constants that explain measurements.

    Args:
        template: the devices and the shape of their links; its peaks are kept where the accelerator is a listed one,
            so that shares of the peak mean what they do elsewhere.
        measurements: of all kinds.

    Returns:
        The cluster with what was measured in place of what was listed or assumed, and the constants.
    """
    by = {what: [m for m in measurements if m.what == what] for what in dict.fromkeys(m.what for m in measurements)}
    launch = _constant("launch of an operation", "s", [m.seconds for m in by["launch"]], by["launch"])
    peaks, half_size = _fit_products(by["product"], launch.value)
    streams = sorted(by["stream"], key=lambda m: m.sizes)[-2:]
    moved = [STREAMED * m.sizes[0] / _net(m, launch.value) for m in streams]
    bandwidth = _constant("memory bandwidth", "B/s", moved, streams)
    # The largest size: a smaller one also measures how the work is started on the cores of a device.
    largest = {what: max(by[what], key=lambda m: m.sizes) for what in ("vector", "transcendental")}
    m = largest["vector"]
    vector = _constant("elementwise arithmetic", "FLOP/s", [m.sizes[0] / 4 * VECTOR_FLOPS / m.seconds], [m])
    m = largest["transcendental"]
    ratio = m.seconds / (m.sizes[0] / 4) * vector.value
    transcendental = _constant("a transcendental function", "flops", [ratio], [m])
    constants = [*peaks.values(), half_size, bandwidth, vector, transcendental, launch]
    accelerator, efficiency = _accelerator(template.accelerator, peaks, bandwidth.value)
    efficiency = dataclasses.replace(
        efficiency,
        half_size=half_size.value,
        half_depth=half_size.value,
        vector=vector.value / accelerator.flops("bfloat16"),
        transcendental_flops=transcendental.value,
        launch_seconds=tuple(
            (kind, launch.value if kind == accelerator.kind else seconds) for kind, seconds in efficiency.launch_seconds
        ),
    )
    if "overlap" in by:
        overlap = _fit_overlap(by["overlap"])
        efficiency = dataclasses.replace(efficiency, overlap_slowdown=overlap.value)
        constants.append(overlap)
    cluster = dataclasses.replace(template, accelerator=accelerator, efficiency=efficiency)
    moves = [m for m in measurements if m.what in COLLECTIVES]
    if moves:
        cluster, links = _fit_links(cluster, moves)
        constants += links
    return cluster, tuple(constants)


def _accelerator(
    listed: Accelerator, peaks: Mapping[str, Constant], bandwidth: float
) -> tuple[Accelerator, Efficiency]:
    """Peaks and the share of them that is attained. A listed accelerator keeps its own; another has what it attains."""
    # What is not measured here, such as fused attention, stays as it was fitted.
    default = dataclasses.replace(Efficiency.for_accelerator(listed), links=1.0, network=1.0)
    if listed.source.startswith("assumed"):
        attained = tuple((dtype, peak.value) for dtype, peak in peaks.items())
        accelerator = dataclasses.replace(listed, peak_flops_per_second=attained, memory_bytes_per_second=bandwidth)
        return dataclasses.replace(accelerator, source="measured"), dataclasses.replace(
            default, matmul=1.0, bandwidth=1.0
        )
    # One share for all dtypes: that of bfloat16. The others get the peak that this share of makes what was measured.
    share = peaks["bfloat16"].value / listed.flops("bfloat16")
    own = dict(listed.peak_flops_per_second) | {d: p.value / share for d, p in peaks.items() if d != "bfloat16"}
    accelerator = dataclasses.replace(listed, peak_flops_per_second=tuple(own.items()))
    reached = bandwidth / listed.memory_bytes_per_second
    return accelerator, dataclasses.replace(default, matmul=share, bandwidth=reached)


def _net(m: Measurement, launch: float) -> float:
    """Seconds without the launch, which a short measurement may not exceed by much."""
    return max(m.seconds - launch, 0.2 * m.seconds)


def _constant(name: str, unit: str, values: Sequence[float], of: Sequence[Measurement]) -> Constant:
    """The median of values, and their quartiles; of a single one, those of its repetitions."""
    if len(values) > 1:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Constant(name, middle, low, high, unit, len(values))
    (value,), (m,) = values, of
    low, high = m.low / m.seconds, m.high / m.seconds
    if unit.endswith("/s"):
        low, high = 1 / high, 1 / low
    return Constant(name, value, value * low, value * high, unit, 1)


def _fit_products(found: Sequence[Measurement], launch: float) -> tuple[dict[str, Constant], Constant]:
    """Peaks by dtype, and the dimension that halves what is attained."""
    sizes = np.array([m.sizes for m in found], np.float64)
    rates = np.array([2 * math.prod(m.sizes) / _net(m, launch) for m in found])
    dtypes = np.array([m.dtype for m in found])

    def implied(half_size: float) -> np.ndarray:
        return rates / (sizes / (sizes + half_size)).prod(1)

    def error(half_size: float) -> float:
        logs = np.log(implied(half_size))
        return sum(float(np.abs(logs[dtypes == d] - np.median(logs[dtypes == d])).sum()) for d in set(dtypes))

    candidates = np.geomspace(0.25, 512, 200)
    errors = np.array([error(h) for h in candidates])
    best = float(candidates[np.argmin(errors)])
    near = candidates[errors <= errors.min() * (1 + 1 / math.sqrt(len(found)))]
    half_size = Constant("dimension that halves a product", best, float(near[0]), float(near[-1]), "", len(found))
    peaks = {
        d: _constant(f"products of {d}", "FLOP/s", list(implied(best)[dtypes == d]), [])
        for d in dict.fromkeys(m.dtype for m in found)
    }
    return peaks, half_size


def _fit_overlap(found: Sequence[Measurement]) -> Constant:
    compute, gather, both = (next(m for m in found if m.sizes == (i,)) for i in range(len(OVERLAP)))

    def slowdown(seconds: float) -> float:
        longer, shorter = sorted((compute.seconds, gather.seconds), reverse=True)
        return max(1.0, 1 + (seconds - longer) / shorter)

    low, value, high = (slowdown(seconds) for seconds in (both.low, both.seconds, both.high))
    return Constant("slowdown of overlap", value, low, high, "times", 1)


def _fit_links(cluster: Cluster, found: Sequence[Measurement]) -> tuple[Cluster, list[Constant]]:
    """A launch, and a latency and a bandwidth of each level of links, by a search along one logarithm after another."""
    tiers = len(cluster.tiers)
    torus = cluster.torus
    names = ["launch of a collective"]
    start = [max(cluster.accelerator.launch_seconds, 1e-6)]
    for level in (*cluster.tiers, *([torus] if torus else [])):
        name = getattr(level, "name", "torus")
        names += [f"latency, {name}", f"bandwidth, {name}"]
        start += [max(level.latency_seconds, 1e-7), level.bytes_per_second]
    groups = {(m.what, m.group): [n for n in found if (n.what, n.group) == (m.what, m.group)] for m in found}
    flat = [m for group in groups.values() for m in group]
    measured = np.log([m.seconds for m in flat])

    def put(values: Sequence[float]) -> Cluster:
        levels = list(zip(values[1::2], values[2::2], strict=True))
        accelerator = dataclasses.replace(
            cluster.accelerator, launch_seconds=values[0], nic_launch_seconds=0.0, link_efficiency=1.0
        )
        changed = [
            dataclasses.replace(
                tier, latency_seconds=lat, bytes_per_second=bw, launch_seconds=0.0, reduce_bytes_per_second=0.0
            )
            for tier, (lat, bw) in zip(cluster.tiers, levels, strict=False)
        ]
        ring = torus and dataclasses.replace(torus, latency_seconds=levels[-1][0], bytes_per_second=levels[-1][1])
        return dataclasses.replace(cluster, accelerator=accelerator, tiers=tuple(changed), torus=ring)

    def errors(values: Sequence[float]) -> np.ndarray:
        made = put(values)
        expected = [
            collective_seconds(made, kind, [m.sizes[0] for m in group], *where)  # type: ignore[arg-type]
            for (kind, where), group in groups.items()
        ]
        return np.log(np.concatenate(expected)) - measured

    values = minimise(lambda logs: float(np.abs(errors(list(np.exp(logs)))).mean()), np.log(start))
    best = [float(x) for x in np.exp(values)]
    low, high = np.exp(np.quantile(errors(best), [0.25, 0.75]))
    constants = [
        Constant(name, value, value * low, value * high, "B/s" if "bandwidth" in name else "s", len(flat))
        for name, value in zip(names, best, strict=True)
    ]
    made = put(best)
    inner = (made.tiers[0] if tiers else made.torus) or cluster.tiers[0]
    accelerator = dataclasses.replace(
        made.accelerator,
        link_bytes_per_second=inner.bytes_per_second,
        link_latency_seconds=inner.latency_seconds,
        fit="measured by redco_like.profile",
    )
    return dataclasses.replace(made, accelerator=accelerator), constants


def minimise(loss: Callable[[np.ndarray], float], start: Any, *, step: float = 1.0, least: float = 0.02) -> np.ndarray:
    """Search along one coordinate after another with a step that shrinks.

    >>> minimise(lambda x: float(abs(x - np.array([3.0, -1.0])).sum()), np.zeros(2)).round(1)
    array([ 3., -1.])
    """
    x = np.asarray(start, np.float64).copy()
    best = loss(x)
    while step > least:
        moved = False
        for i in range(len(x)):
            for sign in (1, -1):
                trial = x.copy()
                trial[i] += sign * step
                if (value := loss(trial)) < best:
                    x, best, moved = trial, value, True
                    break
        if not moved:
            step /= 2
    return x


def _table(record: Any, renamed: Mapping[str, str] | None = None) -> list[str]:
    """The fields of a dataclass that are not at their defaults."""
    lines = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            lines.append(f"{(renamed or {}).get(field.name, field.name)} = {_toml(value)}")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "{ " + ", ".join(f"{key} = {_toml(x)}" for key, x in value) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(x) for x in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
