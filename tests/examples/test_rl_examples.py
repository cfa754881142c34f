"""The examples of reinforcement learning run, say what they did, and have no sharding code."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ["ppo", "grpo", "dpo"]
QUICK = {
    "ppo": ["--iterations", "2", "--steps", "5"],
    "grpo": ["--iterations", "2", "--steps", "5"],
    "dpo": ["--rounds", "1", "--questions", "200", "--steps", "120"],
}


def run(folder, example, *arguments, timeout=600):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{example}.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def shares(out):
    return [float(share) for share in re.findall(r"([0-9.]+)% right", out)]


def test_grpo_runs_and_leaves_its_samples(tmp_path):
    out = run(tmp_path, "grpo", *QUICK["grpo"])
    assert len(shares(out)) == 2
    page = (tmp_path / "runs/grpo/rl/samples.html").read_text()
    assert "Iteration 1" in page or "Iteration 2" in page


@pytest.mark.slow
@pytest.mark.parametrize("example", ["ppo", "dpo"])
def test_the_other_examples_run(tmp_path, example):
    assert len(shares(run(tmp_path, example, *QUICK[example]))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_example_learns_the_task(tmp_path, example):
    before, *_, after = shares(run(tmp_path, example))
    assert before < 20
    assert after > (80 if example != "dpo" else 50)  # docs/rlhf/algorithms.md says why


@pytest.mark.parametrize("example", [*EXAMPLES, "sorting"])
def test_example_is_short_and_has_no_sharding_code(example):
    source = (ROOT / "examples" / f"{example}.py").read_text()
    assert len(source.splitlines()) < 120
    assert not re.search(r"(import|from) (sharding_rules|search|pipelines)|PartitionSpec|NamedSharding|[Mm]esh", source)
