"""Two real processes on this machine: one mesh, the same batches, shared checkpoints, errors in time."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from redco_like.checkpoint import CheckpointStore
from redco_like.data import DataLoader, sequential
from sharding_rules import FSDP, MeshShape, make_mesh

LIMIT_SECONDS = 100

COMMON = """
import json, logging, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from redco_like.checkpoint import CheckpointStore
from redco_like.data import DataLoader, process_rows, sequential, sharded
from redco_like.deployer import Deployer
from redco_like.launch import DeployError
from sharding_rules import BATCH_AXES, FSDP, TENSOR, MeshShape, make_mesh

process, folder, port = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
explicit = dict(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=process)
examples = [{"x": np.arange(4, dtype=np.float32) + i, "i": i} for i in range(43)]

def collate(examples):
    return {"x": np.stack([e["x"] for e in examples]), "i": np.asarray([e["i"] for e in examples], np.int32)}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_processes(body: str, folder: pathlib.Path, processes=(0, 1), variables=lambda process, port: {}) -> list[str]:
    """Run a program as several processes of 4 CPU devices each; returns their outputs, and leaves none running."""
    script = folder / "program.py"
    script.write_text(COMMON + textwrap.dedent(body))
    port = free_port()
    children = []
    for process in processes:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PJRT_NPROC": "32",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        }
        children.append(
            subprocess.Popen(
                [sys.executable, str(script), str(process), str(folder), str(port)],
                env=environment | variables(process, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [child.communicate(timeout=LIMIT_SECONDS)[0] for child in children]
    finally:
        for child in children:  # SIGTERM does not end a process of jax.distributed
            child.kill()
            child.wait()


def test_two_processes_share_mesh_batches_and_checkpoints(tmp_path):
    outputs = run_processes(
        """
        with Deployer(folder / "run", distributed=explicit, deadline_seconds=60) as deployer:
            assert (deployer.process_count, deployer.process_index, len(deployer.devices)) == (2, process, 8)
            assert len(deployer.local_devices) == 4 and deployer.workdir_shared
            mesh = make_mesh(MeshShape(data=2, fsdp=4))
            rows = NamedSharding(mesh, P(BATCH_AXES))
            assert process_rows(rows) == (process, 2)
            everything = NamedSharding(mesh, P())
            loader = DataLoader(examples, collate, 8, seed=3, process_index=process, process_count=2)
            seen = []
            for batch in loader.iterate(2, 9, place=lambda batch: sharded(batch, rows)):
                assert batch["x"].shape == (8, 4) and len(batch["x"].addressable_shards) == 4
                whole = jax.jit(lambda b: b, out_shardings=everything)(batch)
                seen.append(np.asarray(whole["i"]).tolist())
                assert (np.asarray(whole["x"])[:, 0] == np.asarray(whole["i"])).all()
            pieces = [(p.batch["i"].tolist(), p.count, p.whole) for p in sequential(examples, collate, 8, process, 2)]

            # Processes that share their rows: the tensor axis goes across them.
            across = make_mesh(MeshShape(data=4, tensor=2), np.asarray(jax.devices()).reshape(2, 4).T.reshape(-1))
            shared_rows = NamedSharding(across, P(BATCH_AXES))
            assert process_rows(shared_rows) == (0, 1)
            placed = sharded(collate(examples[:8]), shared_rows)
            assert placed["x"].shape == (8, 4) and float(jnp.sum(placed["x"][:, 0])) == 28

            state = {
                "w": jax.jit(lambda: jnp.arange(64.0).reshape(8, 8), out_shardings=NamedSharding(mesh, P(FSDP)))(),
                "rng": jax.jit(lambda: jax.random.key(5), out_shardings=everything)(),
                "count": 3,
            }
            with CheckpointStore(folder / "checkpoints", keep=2) as store:
                for step in (4, 8, 12):
                    store.save(step, state, data_state=loader.state(step))
                store.wait()
                back = store.restore(state, 8)
                assert back["w"].sharding == state["w"].sharding
                store.save(10, state)
            assert store.steps() == [8, 10], store.steps()
            deployer.barrier("the end")
            key = jax.random.key_data(deployer.rng("a")).tolist()
            print("RESULT", json.dumps({"seen": seen, "pieces": pieces, "key": key}))
        """,
        tmp_path,
    )
    results = []
    for output in outputs:
        line = [line for line in output.splitlines() if line.startswith("RESULT ")]
        assert line, output
        results.append(json.loads(line[0].removeprefix("RESULT ")))
    assert results[0]["seen"] == results[1]["seen"]
    assert results[0]["key"] == results[1]["key"]

    examples = [{"x": np.arange(4, dtype=np.float32) + i, "i": i} for i in range(43)]

    def collate(examples):
        return {"x": np.stack([e["x"] for e in examples]), "i": np.asarray([e["i"] for e in examples], np.int32)}

    alone = DataLoader(examples, collate, 8, seed=3)
    assert [batch["i"].tolist() for batch in alone.iterate(2, 9)] == results[0]["seen"]

    for mine, first, second in zip(
        sequential(examples, collate, 8), results[0]["pieces"], results[1]["pieces"], strict=True
    ):
        got = first[0] if first[2] else first[0] + second[0]
        assert got == mine.batch["i"].tolist()
        assert first[1] == second[1] == mine.count

    mesh = make_mesh(MeshShape(fsdp=4), jax.devices()[:4])
    wanted = {
        "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, FSDP))),
        "rng": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(mesh, P())),
        "count": 0,
    }
    with CheckpointStore(tmp_path / "checkpoints") as store:
        state = store.restore(wanted)
        assert store.metadata()["process_count"] == 2
    np.testing.assert_array_equal(state["w"], np.arange(64.0).reshape(8, 8))
    assert jnp.all(jax.random.key_data(state["rng"]) == jax.random.key_data(jax.random.key(5)))
    assert state["count"] == 3


def test_environment_variables_start_two_processes_and_a_lone_workdir_is_stated(tmp_path):
    outputs = run_processes(
        """
        with Deployer(folder / f"own-{process}", deadline_seconds=60) as deployer:
            assert deployer.process_count == 2
            print("SHARED", deployer.workdir_shared, "processes", deployer.process_count)
        """,
        tmp_path,
        variables=lambda process, port: {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
        },
    )
    for output in outputs:
        assert "SHARED False processes 2" in output, output
    assert "is not seen by processes [1]" in outputs[0]


def test_two_processes_of_unlike_hosts_choose_one_plan_and_see_when_they_would_not(tmp_path):
    outputs = run_processes(
        """
        import dataclasses, optax
        import pipelines.devices as seen
        from pipelines import resolve_plan
        from sharding_rules import PlanError, trace
        from search import parse_cluster

        def problem():
            f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
            params = {"up": f32(256, 1024), "down": f32(1024, 256)}
            loss = lambda params, batch: jnp.square(jnp.tanh(batch["x"] @ params["up"]) @ params["down"]).mean()
            traced = trace(loss, params, {"x": f32(64, 256)}, names=("params", "batch"))
            return traced, jax.eval_shape(optax.adam(1e-3).init, params)

        with Deployer(distributed=explicit, deadline_seconds=60) as deployer:
            seen.os.cpu_count = lambda: 64 if process else 4
            seen.memory_bytes_per_device = lambda devices: 8e9 if process else 6e6
            auto = dict(n_devices=8, problem=problem)
            here = seen.cluster_here(deployer.devices)
            assert [tier.devices for tier in here.tiers] == [4, 8]
            assert here.accelerator.usable_memory_bytes == 6e6
            plan = resolve_plan("auto", cluster=lambda: here, **auto)
            slow = dataclasses.replace(here.tiers[0], bytes_per_second=1e4)
            other = dataclasses.replace(here, tiers=(slow, here.tiers[1])) if process else parse_cluster("8xH100")
            try:
                resolve_plan("auto", cluster=lambda: other, **auto)
                message = ""
            except PlanError as error:
                message = str(error)
            print("RESULT", json.dumps({"plan": plan.to_json(), "message": message}))
        """,
        tmp_path,
    )
    results = []
    for output in outputs:
        line = [line for line in output.splitlines() if line.startswith("RESULT ")]
        assert line, output
        results.append(json.loads(line[0].removeprefix("RESULT ")))
    assert results[0]["plan"] == results[1]["plan"]
    for process, result in enumerate(results):
        assert f"different plans (process {process}: " in result["message"]
        assert "the same cluster file" in result["message"]
