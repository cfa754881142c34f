"""What only the TPU compiler can say, with no TPU."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.aot
def test_pinning_halves_temporaries_and_keeps_the_batch_split():
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "pinning.py"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["results"]["without pins"]["whole_batch_collectives"] > 0
    assert result["temp_ratio"] <= 0.5
