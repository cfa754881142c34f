"""Compiler options of plans: which plans get which, what a platform takes, and that XLA knows their names."""

import dataclasses

import pytest

from search import Plan, Space, find_accelerator, parse_cluster, solve
from search.compiler_options import FUSE, GATHERS, SCATTERS, SUMS, options_for, options_on
from sharding_rules import MeshShape

CHILD = """
import json, sys
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from search import parse_cluster
from search.topology import open_devices, target_of
from sharding_rules import MeshShape, make_mesh

request = json.load(open(sys.argv[1]))
devices = open_devices(target_of(parse_cluster(request["cluster"])))
mesh = make_mesh(MeshShape(fsdp=len(devices)), devices)
x = jax.ShapeDtypeStruct((len(devices) * 128, 128), "float32", sharding=NamedSharding(mesh, P("fsdp")))
def step(x):
    return (x @ x.T).sum()
lowered = jax.jit(step).lower(x)
print(json.dumps({"event": "lowered", "bytes": {"arguments": 0, "results": 0, "aliased": 0}}), flush=True)
lowered.compile(compiler_options=request["options"])
"""


def options(accelerator, preset="fsdp", **sizes):
    return set(options_for(find_accelerator(accelerator), Plan(MeshShape(**sizes), preset)))


def test_each_group_comes_with_the_plans_that_it_helps():
    assert options("v5p", fsdp=8) == {*FUSE, *GATHERS, *SUMS, *SCATTERS}
    assert options("v5p", "data", data=8) == {*FUSE, *GATHERS, *SUMS}
    # Whole activations are summed: behind compute they would take memory that no estimate counts.
    assert options("v5p", "megatron", tensor=8) == {*FUSE, *GATHERS}
    assert options("v5p", "megatron+sequence", tensor=8) == {*FUSE, *GATHERS, *SUMS, *SCATTERS}


def test_nothing_to_move_and_gpus_have_no_options():
    assert not options("v5p", "data")
    assert not options("H100", fsdp=8)


def test_options_are_sorted_so_that_equal_plans_are_equal():
    found = options_for(find_accelerator("v6e"), Plan(MeshShape(fsdp=8), "fsdp"))
    assert list(found) == sorted(found)
    assert len(dict(found)) == len(found)


def test_other_platforms_take_their_own_options_only():
    plan = Plan(MeshShape(fsdp=8), "fsdp", compiler_options=(*SUMS, ("xla_gpu_enable_something", "true")))
    assert options_on(plan, "tpu") == dict(plan.compiler_options)
    assert options_on(plan, "gpu") == {"xla_gpu_enable_something": "true"}
    assert options_on(dataclasses.replace(plan, compiler_options=SUMS), "cpu") is None
    assert options_on(Plan(MeshShape()), "tpu") is None


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1"])
def test_the_compiler_knows_every_option(name, tmp_path, monkeypatch):
    pytest.importorskip("libtpu")
    from search.compiler import compile_in_child
    from search.topology import target_of

    (tmp_path / "options_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    request = {"cluster": name, "options": dict([*FUSE, *GATHERS, *SUMS, *SCATTERS])}
    assert compile_in_child("options_child", request, target_of(parse_cluster(name)), limit_seconds=120).hlo


def test_plans_of_the_planner_carry_them():
    from redco_like.cli.planning import load

    record = {"model": "gpt2", "cluster": "v5e:2x4", "seq_len": 128, "global_batch": 16}
    loaded = load(
        {**record, "optimizer": "adamw", "dtype": "bfloat16", "param_dtype": "float32", "task": "train"}, print
    )
    plan = solve(Space(loaded.model, loaded.cluster, fix={"fsdp": 8}), runners_up=0).plan
    assert plan is not None
    assert plan.compiler_options == options_for(loaded.cluster.accelerator, plan)
    assert dict(plan.compiler_options)["xla_enable_async_all_reduce"] == "true"
