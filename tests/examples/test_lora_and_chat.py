"""Fine-tuning with LoRA teaches what the base could not do, and the chat talks to what it wrote."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ["finetune_lora", "chat"]


def run(folder, *command, **options):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        **options,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
def test_adapters_teach_to_answer_and_the_chat_answers(tmp_path):
    out = run(tmp_path, ROOT / "examples" / "finetune_lora.py")
    before, after = (float(re.search(rf"{when}: +([0-9.]+)% right", out)[1]) for when in ("before", "after"))
    assert before <= 5
    assert after >= 90
    asked = "What is the capital of Japan?\nHow do I pay in Poland?\n"
    out = run(tmp_path, ROOT / "examples" / "chat.py", input=asked)
    assert "> What is the capital of Japan?\nThe capital of Japan is Tokyo.\n" in out
    assert "People in Poland pay with the zloty." in out
    out = run(tmp_path, ROOT / "examples" / "chat.py", "--prompt", "What do people speak in Chile?")
    assert "People in Chile speak Spanish." in out


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_is_short_and_has_no_sharding_code(example):
    source = (ROOT / "examples" / f"{example}.py").read_text()
    assert len(source.splitlines()) < 100
    assert not re.search(r"(import|from) (sharding_rules|search|pipelines)|PartitionSpec|NamedSharding|Mesh", source)
