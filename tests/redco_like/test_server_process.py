"""A server as a process: signals, and what `redco-like serve` finds out before it loads anything."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import httpx
import jax
import pytest
from fake_engine import expected
from serving import tiny_folder

from redco_like.cli import main
from redco_like.cli.serve import Room, Settings, enough_memory, room_of
from redco_like.cli.terminal import UsageError
from redco_like.server.process import is_loopback
from search import Plan
from sharding_rules import MeshShape

ROOT = pathlib.Path(__file__).parents[2]
SERVER = """
from fake_engine import FakeEngine
from redco_like.server import create_app, run
from redco_like.server.process import bind
from redco_like.text import Text
sock = bind("127.0.0.1", 0)
app = create_app(FakeEngine(delay=0.02), Text.of_bytes(eos=(0,)), name="fake")
run(app, sock=sock, grace_seconds=20, started=lambda: print(sock.getsockname()[1], flush=True))
print("stopped", flush=True)
"""


@pytest.fixture
def process():
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    started = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    with started:
        port = int(started.stdout.readline())
        yield started, f"http://127.0.0.1:{port}"
        started.kill()


def stream(url, count):
    """Lines of a stream as they come."""
    body = {"prompt": "hello", "seed": 1, "max_tokens": count, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line:
                yield line.removeprefix("data: ")


def test_a_signal_lets_a_stream_end(process):
    running, url = process
    lines = stream(url, 60)
    found = [next(lines)]
    running.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 503
    found += list(lines)
    assert found.pop() == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in found)
    assert text == expected(b"hello", 1, 60)
    assert running.wait(10) == 0
    assert running.stdout.read() == "stopped\n"


def test_a_second_signal_gives_up_what_runs(process):
    running, url = process
    lines = stream(url, 200)
    next(lines)
    running.send_signal(signal.SIGINT)
    time.sleep(0.2)
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    *_, last = lines
    assert "shutting down" in json.loads(last)["error"]["message"]
    assert running.wait(10) == 0
    assert time.monotonic() - start < 2.5
    assert running.stdout.read() == "stopped\n"


def test_an_interrupt_while_programs_are_compiled_ends_at_once():
    """Threads that compile go on; the interpreter cannot wait for them, nor end beside them."""
    program = (
        "import threading, time; from redco_like.cli.serve import leaving_compilers\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "with leaving_compilers(): raise KeyboardInterrupt"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (130, "redco-like serve: interrupted\n")


# The command's complaints.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


def complain(capsys, *arguments):
    assert main(["serve", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_a_folder_that_is_missing_or_has_no_model(capsys, tmp_path):
    assert "there is no folder" in complain(capsys, "--model", tmp_path / "missing")
    assert "no config.json" in complain(capsys, "--model", tmp_path)


def test_a_folder_without_a_tokenizer(capsys, folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    said = complain(capsys, "--model", tmp_path)
    assert "no tokenizer.json" in said
    assert "--tokenizer bytes" in said


def test_a_folder_without_weights(capsys, folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert "safetensors" in complain(capsys, "--model", tmp_path, "--port", 0)


def test_a_port_that_is_in_use(capsys, folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = complain(capsys, "--model", folder, "--port", other.getsockname()[1])
    assert "in use" in said
    assert "--port 0" in said


def test_other_machines_need_a_key(capsys, folder, monkeypatch):
    monkeypatch.delenv("REDCO_LIKE_API_KEY", raising=False)
    said = complain(capsys, "--model", folder, "--host", "0.0.0.0")
    assert "--allow-no-key" in said
    assert "REDCO_LIKE_API_KEY" in said
    monkeypatch.setenv("REDCO_LIKE_API_KEY", "secret")
    assert "no-such-plan" in complain(capsys, "--model", folder, "--host", "0.0.0.0", "--plan", "no-such-plan.json")


def test_a_missing_extra_is_named(capsys, folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert "pip install 'redco-like[serve]'" in complain(capsys, "--model", folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", 70000), "0 to 65535"),
        (("--rows", 0), "--rows 0"),
        (("--max-n", 0), "n=0"),
        (("--length", 257, "--port", 0), "nearest: 256"),
        (("--mesh", "tensor=3", "--port", 0, "--rows", 3), "tensor=3"),
        (("--grace", -1), "--grace"),
    ],
)
def test_numbers_out_of_range(capsys, folder, arguments, said):
    assert said in complain(capsys, "--model", folder, *arguments)


@pytest.mark.parametrize(
    ("host", "inside"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback_addresses(host, inside):
    assert is_loopback(host) is inside


@pytest.mark.parametrize("error", [MemoryError("35 GiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 35 GiB")])
def test_devices_without_room_are_no_traceback(error):
    with pytest.raises(UsageError, match=r"no room .* 7 rows of 99 tokens.*35 GiB.*plan --task serve"):  # noqa: SIM117
        with enough_memory(Settings("auto", 7, 99, 16)):
            raise error


# Plans.


def test_a_plan_leaves_rows_length_and_chunk_as_they_are(tmp_path):
    file = tmp_path / "plan.json"
    Plan(MeshShape(tensor=2), "megatron").save(file)
    found = room_of(Room(plan=str(file)))
    assert (found.rows, found.length, found.chunk_tokens, found.plan.mesh.tensor) == (16, None, 256, 2)
    assert room_of(Room()).plan == "auto"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", "version"), ("[1]", "JSON object"), ("{", "JSON"), ('{"plans": {"decode": null}}', "nothing fits")],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, said):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        room_of(Room(plan=str(file)))
