"""What may be written for a plan."""

import pathlib

import pytest

from pipelines import resolve_plan
from pipelines.resolve import memory_bytes_per_device, mesh_for_preset
from search import Plan
from sharding_rules import MeshShape


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
