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


def run_children(what: str) -> list[dict]:
    """Start both, kill them when the time is over; their results, None where one printed none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "PJRT_NPROC": "32",
        "PYTHONPATH": str(ROOT),
    }
    script = str(pathlib.Path(__file__).with_name("reshard_child.py"))
    children = [
        subprocess.Popen(
            [sys.executable, script, str(i), str(port), what],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in (0, 1)
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
