"""What may be written for a plan, and the cluster that the devices at hand are planned as."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

from pipelines import resolve_plan
from pipelines.devices import accelerator_of, cluster_here, cluster_of, memory_bytes_per_device
from pipelines.resolve import mesh_for_preset
from search import Plan, Space, TracedModel, parse_cluster, solve
from search.space import HEADROOM
from sharding_rules import MeshShape, PlanError, trace


@pytest.mark.parametrize(
    "preset, n_devices, mesh",
    [
        ("data", 8, "data=8"),
        ("fsdp", 8, "fsdp=8"),
        ("megatron", 4, "tensor=4"),
        ("fsdp+megatron", 8, "fsdp=4,tensor=2"),
        ("data+megatron", 16, "data=4,tensor=4"),
        ("fsdp+megatron", 1, "data=1"),
        ("fsdp+megatron", 7, "fsdp=7"),
    ],
)
def test_plain_mesh_of_a_preset_uses_all_devices(preset, n_devices, mesh):
    assert str(mesh_for_preset(preset, n_devices)) == mesh
    assert resolve_plan(preset, n_devices=n_devices).mesh == MeshShape.parse(mesh)


def test_plan_and_file_are_taken_as_they_are(tmp_path):
    plan = Plan(MeshShape(fsdp=4), "fsdp", microbatches=2, compute_dtype="bfloat16")
    plan.save(tmp_path / "plan.json")
    assert resolve_plan(plan, n_devices=8) is plan
    assert resolve_plan(str(tmp_path / "plan.json"), n_devices=8, compute_dtype="float32") == plan
    assert resolve_plan(tmp_path / "plan.json", n_devices=8, mesh="fsdp=4") == plan


def test_contradictions_and_missing_files_are_refused():
    with pytest.raises(ValueError, match="the plan is for mesh fsdp=4, but mesh=data=2 was asked for"):
        resolve_plan(Plan(MeshShape(fsdp=4)), n_devices=8, mesh="data=2")
    with pytest.raises(ValueError, match="no plan file at nowhere"):
        resolve_plan(pathlib.Path("nowhere"), n_devices=8)
    with pytest.raises(ValueError, match="needs a problem"):
        resolve_plan("auto", n_devices=8)
    with pytest.raises(ValueError, match="mesh tensor=4 needs 4 devices, but 8 are there"):
        auto(mesh="tensor=4")
    with pytest.raises(ValueError, match="16xH100 has 16 devices, but the plan is for 8"):
        auto(cluster="16xH100")


def test_plan_that_the_step_cannot_run_is_refused(tmp_path):
    plan = Plan(MeshShape(data=2, stage=4), offload=("optimizer",), microbatches=4)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"the plan has stage=4 \(1f1b\); optimizer offloaded .* plan='auto'"):
        resolve_plan(tmp_path / "plan.json", n_devices=8)


WIDTH, LAYERS, ROWS = 64, 3, 32


def problem(width=WIDTH, rows=ROWS):
    def loss(params, batch):
        x = batch["x"]
        for p in params["layers"]:
            x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        return jnp.square(x).mean()

    one = {"up": f32(width, 4 * width), "down": f32(4 * width, width)}
    params = {"layers": [one] * LAYERS}
    traced = trace(loss, params, {"x": f32(rows, width)}, names=("params", "batch"))
    return traced, jax.eval_shape(optax.adam(1e-3).init, params)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def auto(cluster="8xH100", mesh=None, memory_bytes=None, **sizes):
    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    if memory_bytes is not None:
        accelerator = dataclasses.replace(where.accelerator, usable_memory_bytes=memory_bytes)
        where = dataclasses.replace(where, accelerator=accelerator)
    return resolve_plan("auto", n_devices=8, mesh=mesh, problem=lambda: problem(**sizes), cluster=lambda: where)


def kept_bytes(width):
    return 4 * 4 * LAYERS * 8 * width**2  # parameters, gradients, two moments; float32


def test_auto_is_the_fastest_plan_of_the_space_and_says_what_comes_next():
    plan = auto()
    where = parse_cluster("8xH100")
    model = TracedModel(*problem(), where)
    front = solve(Space(model, where), runners_up=0, pareto=True).pareto
    assert plan.estimate.seconds_per_step == min(c.estimate.seconds_per_step for c in front)
    assert "s per step on 8 of 8xH100 (analytic)" in plan.reason
    assert "; next: " in plan.reason
    assert plan == auto()
    assert not plan.planned


def test_auto_keeps_a_tiny_model_whole_on_slow_links_and_splits_a_large_one_that_does_not_fit():
    # Two floats of gradient per example and layer are cheaper to move than activations where a launch costs this much.
    assert auto(width=8, rows=4096).mesh == MeshShape(data=8)
    needs = kept_bytes(1024)
    plan = auto(width=1024, rows=4096, memory_bytes=needs / 2)
    assert plan.mesh.fsdp * plan.mesh.tensor > 1
    assert plan.estimate.bytes_per_device <= HEADROOM * needs / 2
    assert auto(width=1024, rows=4096).estimate.seconds_per_step <= plan.estimate.seconds_per_step


def test_auto_keeps_the_mesh_asked_for_and_chooses_the_rest():
    plan = auto(mesh="data=2,fsdp=2,tensor=2")
    assert plan.mesh == MeshShape(data=2, fsdp=2, tensor=2)
    assert {"fsdp", "megatron"} <= set(plan.preset.split("+"))
    assert plan.reason.startswith("the mesh asked for; ")


def test_auto_says_what_would_fit_where_nothing_does():
    with pytest.raises(PlanError, match=r"nothing fits .* It would fit with .* the devices"):
        auto(memory_bytes=1000)
    with pytest.raises(PlanError, match="a batch of 12 does not split over 8 devices"):
        auto(mesh="data=8", rows=12)


def test_auto_for_a_function_that_is_only_run_forward_keeps_no_gradients():
    where = parse_cluster("8xH100")
    plan = resolve_plan("auto", n_devices=8, problem=lambda: (problem()[0], {}), cluster=lambda: where, training=False)
    assert plan.microbatches == 1
    assert plan.remat == "none"
    assert plan.estimate.memory.get("gradients", 0) == plan.estimate.memory.get("optimizer", 0) == 0


class Device:
    """What a device says of itself."""

    def __init__(self, kind, platform, process=0, local=0, coords=None, memory=None, slice_index=0):
        self.device_kind, self.platform, self.process_index = kind, platform, process
        self.local_hardware_id, self.coords, self.memory, self.slice_index = local, coords, memory, slice_index

    def memory_stats(self):
        return self.memory and {"bytes_limit": self.memory}


@pytest.mark.parametrize(
    "kind, memory, name",
    [
        ("NVIDIA H100 80GB HBM3", 80e9, "H100"),
        ("NVIDIA H200", 141e9, "H200"),
        ("NVIDIA A100-SXM4-40GB", 39e9, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 79e9, "A100-80"),
        ("Tesla V100-SXM2-16GB", 15e9, "V100-16"),
        ("AMD Instinct MI300X", 190e9, "MI300X"),
        ("TPU v4", 32e9, "v4"),
        ("TPU v5 lite", 16e9, "v5e"),
        ("TPU v5", 95e9, "v5p"),
        ("TPU v6 lite", 32e9, "v6e"),
        ("TPU7x", 96e9, "tpu7x"),
    ],
)
def test_kinds_of_devices_are_known(kind, memory, name):
    assert accelerator_of(kind, memory).name == name


def test_gpus_of_two_hosts_are_two_tiers_however_many_processes_there_are():
    for per_process in (8, 1):
        devices = [Device("NVIDIA H100 80GB HBM3", "gpu", process=i // per_process, local=i % 8) for i in range(16)]
        cluster = cluster_of(devices, memory_bytes=70e9)
        assert [tier.devices for tier in cluster.tiers] == [8, 16]
        assert cluster.tiers[1] == parse_cluster("2x8xH100").tiers[1]
        assert cluster.accelerator.usable_memory_bytes == 70e9


def test_tpu_slices_have_the_torus_of_their_coordinates():
    chips = [(x, y, 0) for y in range(4) for x in range(2)]
    devices = [Device("TPU v5 lite", "tpu", process=i // 4, coords=c) for i, c in enumerate(chips)]
    cluster = cluster_of(devices, memory_bytes=15e9)
    assert cluster.torus.dims == (4, 2)
    assert cluster.devices == 8
    two = [*devices, *(Device("TPU v5 lite", "tpu", process=9, coords=c, slice_index=1) for c in chips)]
    assert cluster_of(two, memory_bytes=15e9).tiers[-1].devices == 16
    assert cluster_of(devices[:3], memory_bytes=15e9).torus is None  # no whole torus


def test_unlisted_gpu_gets_assumed_figures_under_its_own_name():
    accelerator = cluster_of([Device("NVIDIA L40S", "gpu")], memory_bytes=45e9).accelerator
    assert (accelerator.name, accelerator.usable_memory_bytes) == ("NVIDIA L40S", 45e9)
    assert accelerator.source.startswith("assumed")


def test_cpu_devices_share_the_cores_of_their_host():
    two, eight = (
        cluster_of([Device("cpu", "cpu", local=i) for i in range(n)], memory_bytes=1e9, cores=8) for n in (2, 8)
    )
    assert two.accelerator.flops("float32") == pytest.approx(4 * eight.accelerator.flops("float32"))
    assert cluster_here(jax.devices()) == cluster_here(jax.devices())
    assert cluster_here(jax.devices()).devices == 8


def test_memory_of_a_device_is_a_share_of_this_machine():
    class Cpu:
        process_index = 0

        def memory_stats(self):
            return None

    class Gpu(Cpu):
        def memory_stats(self):
            return {"bytes_limit": 80e9}

    assert memory_bytes_per_device([Cpu()] * 4) == pytest.approx(memory_bytes_per_device([Cpu()]) / 4)
    assert memory_bytes_per_device([Gpu(), Gpu()]) == 80e9
