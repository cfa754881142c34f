"""The measured constants: those that synthetic times were made with, a file that says them again, and a real run."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from pipelines.devices import cluster_of
from redco_like.microbench import COLLECTIVES, STREAMED, VECTOR_FLOPS, Effort, Measurement
from redco_like.profile import Profile, fit, profile_devices
from search import parse_cluster
from search.collectives import collective_seconds
from search.efficiency import Efficiency

LAUNCH, PEAK, HALF, BANDWIDTH, VECTOR, EXP, SLOWDOWN = 3e-6, 2e10, 8.0, 5e9, 4e9, 30.0, 1.7


def template():
    return cluster_of(jax.devices(), memory_bytes=1e9, cores=2)


def truth():
    cluster = template()
    tier = dataclasses.replace(cluster.tiers[0], bytes_per_second=2e9, latency_seconds=2e-5)
    accelerator = dataclasses.replace(cluster.accelerator, launch_seconds=5e-5)
    return dataclasses.replace(cluster, accelerator=accelerator, tiers=(tier,))


def synthetic(noise=0.0):
    draw = np.random.default_rng(0)

    def one(what, seconds, sizes, group=(1, 1), dtype="float32"):
        seconds = float(seconds) * math.exp(noise * draw.normal())
        return Measurement(what, dtype, sizes, group, seconds, 0.9 * seconds, 1.1 * seconds)

    found = []
    for dtype, peak in (("float32", PEAK), ("bfloat16", 2 * PEAK)):
        for sizes in [(n, n, n) for n in (32, 64, 128, 256, 512)] + [(32, 512, 512), (512, 32, 512)]:
            share = math.prod(x / (x + HALF) for x in sizes)
            found.append(one("product", 2 * math.prod(sizes) / peak / share + LAUNCH, sizes, dtype=dtype))
    for bytes_ in (2**22, 2**24):
        found.append(one("stream", STREAMED * bytes_ / BANDWIDTH + LAUNCH, (bytes_,)))
    found.append(one("vector", 2**17 * VECTOR_FLOPS / VECTOR, (2**19,)))
    found.append(one("transcendental", 2**17 * EXP / VECTOR, (2**19,)))
    found.append(one("launch", LAUNCH, (8, 8, 8)))
    for kind in COLLECTIVES:
        for group in ((2, 1), (4, 2), (8, 1)):
            for bytes_ in (2**14, 2**18, 2**22):
                found.append(one(kind, collective_seconds(truth(), kind, bytes_, *group), (bytes_,), group))
    for i, seconds in enumerate((2e-3, 1e-3, 2e-3 + (SLOWDOWN - 1) * 1e-3)):
        found.append(one("overlap", seconds, (i,), (8, 1)))
    return found


@pytest.mark.parametrize("noise, within", [(0.0, 0.03), (0.1, 0.25)])
def test_fit_finds_the_constants_that_the_times_were_made_with(noise, within):
    cluster, constants = fit(template(), synthetic(noise))
    assert cluster.accelerator.flops("float32") == pytest.approx(PEAK, rel=within)
    assert cluster.accelerator.flops("bfloat16") == pytest.approx(2 * PEAK, rel=within)
    assert cluster.accelerator.memory_bytes_per_second == pytest.approx(BANDWIDTH, rel=within)
    efficiency = cluster.efficiency
    assert efficiency.matmul == efficiency.bandwidth == 1.0
    assert efficiency.vector * cluster.accelerator.flops("bfloat16") == pytest.approx(VECTOR, rel=within)
    assert efficiency.transcendental_flops == pytest.approx(EXP, rel=within)
    assert dict(efficiency.launch_seconds)["cpu"] == pytest.approx(LAUNCH, rel=within)
    if not noise:
        assert efficiency.half_size == pytest.approx(HALF, rel=within)
        assert efficiency.overlap_slowdown == pytest.approx(SLOWDOWN, rel=within)
    for kind in COLLECTIVES:
        for group, bytes_ in (((2, 1), 2**16), ((8, 1), 2**20)):
            expected = collective_seconds(truth(), kind, bytes_, *group)
            assert collective_seconds(cluster, kind, bytes_, *group) == pytest.approx(expected, rel=max(within, 0.1))
    assert all(c.low <= c.value <= c.high for c in constants), [c for c in constants if not c.low <= c.value <= c.high]


def test_listed_accelerator_keeps_its_peaks_and_gets_its_shares():
    listed = dataclasses.replace(parse_cluster("8xH100"), name="here")
    cluster, _ = fit(listed, synthetic())
    accelerator, efficiency = cluster.accelerator, cluster.efficiency
    assert accelerator.flops("bfloat16") == listed.accelerator.flops("bfloat16")
    assert efficiency.matmul * accelerator.flops("bfloat16") == pytest.approx(2 * PEAK, rel=0.03)
    assert efficiency.matmul * accelerator.flops("float32") == pytest.approx(PEAK, rel=0.03)
    assert efficiency.bandwidth * accelerator.memory_bytes_per_second == pytest.approx(BANDWIDTH, rel=0.03)
    assert efficiency.attention == Efficiency.for_accelerator(listed.accelerator).attention  # not measured


def test_file_says_the_same_cluster_again(tmp_path):
    measurements = synthetic()
    cluster, constants = fit(template(), measurements)
    profile = Profile(cluster, constants, tuple(measurements), 1.0, "2026-01-01T00:00:00+00:00")
    profile.save(tmp_path / "here.toml")
    read = parse_cluster(tmp_path / "here.toml")
    assert read.tiers[0].bytes_per_second == pytest.approx(cluster.tiers[0].bytes_per_second, rel=1e-5)
    assert read.efficiency.transcendental_flops == pytest.approx(cluster.efficiency.transcendental_flops, rel=1e-5)
    assert read.accelerator.flops("bfloat16") == pytest.approx(cluster.accelerator.flops("bfloat16"), rel=1e-5)
    assert (read.name, read.devices, read.accelerator.kind) == (cluster.name, 8, "cpu")
    assert "# memory bandwidth" in (tmp_path / "here.toml").read_text()
    with pytest.raises(ValueError, match=r"nearest: .*here\.toml"):
        profile.save(tmp_path / "here.json")


def test_torus_and_slices_survive_the_file(tmp_path):
    pod = parse_cluster("2*v5e:2x4")
    moves = [
        dataclasses.replace(m, group=group, seconds=float(collective_seconds(pod, m.what, m.sizes[0], *group)))
        for m in synthetic()
        if m.what in COLLECTIVES
        for group in ((4, 1), (2, 8))
    ]
    others = [m for m in synthetic() if m.what not in COLLECTIVES]
    cluster, _ = fit(pod, [*others, *moves])
    for m in moves:
        again = collective_seconds(cluster, m.what, m.sizes[0], *m.group)
        assert again == pytest.approx(m.seconds, rel=0.5)
    Profile(cluster, (), (), 0.0, "").save(tmp_path / "pod.toml")
    assert parse_cluster(tmp_path / "pod.toml").torus.dims == (2, 4)


def test_devices_are_measured_and_told_about():
    said = []
    effort = Effort(repeats=1, run_seconds=1e-4, longest_seconds=1e-4)
    profile = profile_devices(jax.devices()[:2], progress=said.append, effort=effort)
    assert profile.label == "measured"
    assert profile.cluster.devices == 2
    assert {m.what for m in profile.measurements} >= {"product", "stream", "launch", "overlap", *COLLECTIVES}
    assert all(m.seconds > 0 for m in profile.measurements)
    assert any("round 1 of 1" in line for line in said)
    assert profile.cluster.accelerator.memory_bytes_per_second > 1e7
