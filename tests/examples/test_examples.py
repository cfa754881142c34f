"""Each example runs as its docstring says, in time, and reaches what it should."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = {"digits_nnx": 0.97, "plain_dict": 0.60, "equinox_mlp": 0.93}


@pytest.mark.parametrize("example, least_accuracy", EXAMPLES.items())
def test_example_reaches_its_accuracy(example, least_accuracy):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, f"examples/{example}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    accuracies = re.findall(r"accuracy ([0-9.]+) on \d+ \w+ never trained on", run.stdout)
    assert len(accuracies) == 1, run.stdout[-3000:]
    assert float(accuracies[0]) >= least_accuracy


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_is_short_and_uses_the_public_api_alone(example):
    source = (ROOT / "examples" / f"{example}.py").read_text()
    assert len(source.splitlines()) < 150
    assert not re.search(r"(import|from) (sharding_rules|search|pipelines)|from redco_like", source)
