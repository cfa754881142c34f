"""Moves between two processes of 4 CPU devices each: every pair of layouts, what is refused, and a peer that dies."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

LIMIT_SECONDS = 90
ROOT = pathlib.Path(__file__).parents[2]


def run_children(what: str, *, script: str = "reshard_child.py", processes: int = 2, devices: int = 4) -> list[dict]:
    """Start both, kill them when the time is over; their results, None where one printed none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "PJRT_NPROC": "32",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # so that what is freed is given back, and peaks are real ones
    }
    path = str(pathlib.Path(__file__).with_name(script))
    children = [
        subprocess.Popen(
            [sys.executable, path, *([str(i), str(port), what] if processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=LIMIT_SECONDS)[0] for child in children]
    finally:
        for child in children:  # SIGTERM does not end a process of jax.distributed
            child.kill()
            child.wait()
    results = []
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        results.append(json.loads(lines[0].removeprefix("RESULT ")) if lines else {"output": output})
    return results


def test_there_and_back_between_processes_and_unlike_moves_are_refused():
    results = run_children("quick")
    for me, result in enumerate(results):
        assert "error" in result, result.get("output")
        assert f"process {1 - me} moves something else" in result["error"]


@pytest.mark.slow
def test_every_layout_to_every_other_one_over_two_processes():
    for result in run_children("everything"):
        assert result.get("moves") == 49, result.get("output")


@pytest.mark.slow
def test_a_dead_process_is_an_error_with_a_name():
    first, second = run_children("dies")
    assert "process 1 is gone" in first.get("error", ""), first
    assert first["seconds"] < 30
    assert "error" not in second


@pytest.mark.slow
def test_a_process_that_stands_still_is_an_error_after_the_deadline():
    first, _ = run_children("stands_still")
    assert "process 1 did nothing for 2 s" in first.get("error", ""), first
    assert first["seconds"] < 10


def within_budget(results: list[dict]) -> None:
    """Compare peaks with budgets; a MB is for what the interpreter and threads take meanwhile."""
    for result in results:
        assert "budget_bytes" in result, result.get("output")
        for name, case in result.items():
            if not isinstance(case, dict):
                continue
            trees = result["leaf_bytes"] if name.endswith("donated") else result["tree_bytes"]
            beside = case["peak_bytes"] - trees
            assert beside <= result["budget_bytes"] + 2**20, (name, beside)
            assert all(case["donated"]) == name.endswith("donated")


def test_memory_beside_the_trees_stays_within_the_budget():
    """Donated: the new tree grows as the old one shrinks, a leaf at a time."""
    within_budget(run_children("", script="reshard_memory_child.py", processes=1, devices=8))


@pytest.mark.slow
def test_memory_between_processes_stays_within_the_budget():
    # Each process has one of the two trees: donating frees none of the receiver's memory.
    results = run_children("", script="reshard_memory_child.py")
    for result in results:
        assert "budget_bytes" in result, result.get("output")
        for name in ("host kept", "host donated"):
            beside = result[name]["peak_bytes"] - result["tree_bytes"]
            assert beside <= result["budget_bytes"] + 2**20, (name, beside)
