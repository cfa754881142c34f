"""The README's first block runs as it stands and prints what it says."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_first_block_prints_its_output(tmp_path):
    text = (ROOT / "README.md").read_text()
    code, output = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.DOTALL).groups()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-2000:]
    # The last digits of a loss differ between processors.
    assert re.sub(r"(\d\.\d{3})\d+", r"\1", run.stdout).split() == re.sub(r"(\d\.\d{3})\d+", r"\1", output).split()


def test_names_of_files_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:examples|benchmarks|sharding_rules|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
