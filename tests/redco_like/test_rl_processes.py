"""An execution plan over two real processes: the same as on one device, resumed, and failing with a name."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_rl import fit, trainer_of

from redco_like import CheckpointStore, read_metrics
from redco_like import rlhf as rl

LIMIT_SECONDS = 240
ALGORITHMS = {"ppo": rl.PPO(minibatches=2, epochs=1, kl_target=0.5), "grpo": rl.GRPO(samples=2, minibatches=2)}

CHILD = """
import json, pathlib, sys
import optax
from redco_like import Deployer
from redco_like import rlhf as rl
from pipelines.rlhf import CallError
from test_rl_processes import ALGORITHMS
from tiny_rl import BOTH_PROCESSES, collate, execution_of, fit, made, reward

process, folder, port, name = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
explicit = dict(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=process)
algorithm = ALGORITHMS[name]
with Deployer(folder, distributed=explicit, deadline_seconds=60) as deployer:
    model, params = made()
    plan = execution_of(algorithm, 16 // algorithm.samples, BOTH_PROCESSES)
    calls = []

    def scored(prompts, completions):
        calls.append(1)
        if len(calls) == 5:
            raise ConnectionError("the judge is away")
        return reward(prompts, completions)

    def trainer():
        options = {"collate_fn": collate, "reward_fn": scored, "optimizer": optax.adam(1e-3)}
        return rl.RLTrainer(deployer, model, params, algorithm=algorithm, plan=plan, **options)

    fit(trainer(), iterations=2)
    again = trainer()
    metrics = fit(again, iterations=3).metrics
    error = None
    try:
        fit(again, iterations=2, resume=False)
    except (CallError, ConnectionError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    deployer.barrier("the end")
    print("RESULT", json.dumps({"metrics": metrics, "calls": len(calls), "error": error, "iteration": again.iteration}))
"""


def run_children(folder, name):
    """Two processes of 4 CPU devices each; returns what they print, and leaves none running."""
    script = folder / "child.py"
    script.write_text(CHILD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = pathlib.Path(__file__)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "PJRT_NPROC": "32",
        "PYTHONPATH": os.pathsep.join(map(str, (here.parents[2], here.parents[1], here.parent))),
    }
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(process), str(folder / "both"), str(port), name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        outputs = [child.communicate(timeout=LIMIT_SECONDS)[0] for child in children]
    finally:
        for child in children:  # SIGTERM does not end a process of jax.distributed
            child.kill()
            child.wait()
    results = []
    for output in outputs:
        line = [line for line in output.splitlines() if line.startswith("RESULT ")]
        assert line, output
        results.append(json.loads(line[0].removeprefix("RESULT ")))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_equal_one_device(tmp_path, name):
    first, second = run_children(tmp_path, name)
    alone = trainer_of(ALGORITHMS[name], workdir=tmp_path / "one")
    fit(alone)

    def losses(folder):
        return [
            [line[name] for name in line if name.endswith(("loss", "reward", "kl"))] for line in read_metrics(folder)
        ]

    here, there = losses(tmp_path / "both/rl"), losses(tmp_path / "one/rl")
    assert (len(here), len(there)) == (4, 3)  # two of the first trainer, two of that which went on
    np.testing.assert_allclose(here[:3], there, atol=1e-4)
    with CheckpointStore(tmp_path / "both/rl/checkpoints") as store:
        assert store.steps() == [3, 4]  # the fourth iteration was finished before it went wrong
        saved = store.restore({"roles": alone.runner.abstract_state}, 3)["roles"]
    for a, b in zip(jax.tree.leaves(alone.runner.state), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(np.asarray(b, np.float64), np.asarray(a, np.float64), atol=1e-4)
    # Rewards are asked for once, and both processes know of them, and of what went wrong with them.
    assert (first["calls"], second["calls"]) == (5, 0)
    assert first["error"] == "ConnectionError: the judge is away"
    assert second["error"] == "CallError: 'reward_fn' failed on process 0: ConnectionError: the judge is away"
    same = [name for name in first["metrics"] if "second" not in name]
    assert {name: first["metrics"][name] for name in same} == {name: second["metrics"][name] for name in same}
    assert first["iteration"] == second["iteration"] == 4
