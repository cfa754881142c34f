"""Compiles in child processes: limits, deaths, full disks, several at once; nothing is left. Most need no compiler."""

import contextlib
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from compile_children import HLO

from search import compiler
from search.cluster import parse_cluster
from search.compiler import (
    Cache,
    CompileKilled,
    CompilerError,
    CompileTimeout,
    DiskFull,
    ToolchainMissing,
    compile_in_child,
)
from search.topology import target_of

CHILDREN = "compile_children"
TARGET = target_of(parse_cluster("v5e:2x4"))
GPUS = target_of(parse_cluster("8xH100"))


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """A temporary folder of its own, which every test must leave empty."""
    folder = tmp_path_factory.mktemp("a temporary folder")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(compiler, "toolchain", lambda target: {})


def run(do, target=TARGET, *, limits=None, depth="fast", tell=lambda text: None, **request):
    return compile_in_child(CHILDREN, {"do": do, **request}, target, depth=depth, tell=tell, **(limits or {}))


def gone(pid, within=5.0):
    """Whether a process has ended, or does so soon."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def until(ready, within=20.0):
    deadline = time.monotonic() + within
    while not (value := ready()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.02)
    return value


def noted(path):
    def read():
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())

    return read


# What comes out.


@pytest.mark.usefixtures("installed")
def test_a_fast_compile_ends_when_the_module_is_written_whole(temporary, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_user_flag=1")
    said = []
    started = time.monotonic()
    compiled = run("dump", pause=1.5, sleep=600, tell=said.append)
    assert time.monotonic() - started < 60
    assert compiled.hlo == HLO
    assert compiled.memory_report == "Total bytes: 12"
    assert compiled.said["arguments"] == 5
    assert "memory" not in compiled.said
    assert compiled.said["flags"].startswith("--xla_user_flag=1 --xla_dump_to=")
    assert (compiled.depth, compiled.out_of_memory) == ("fast", "")
    assert 1.5 <= compiled.seconds < 60
    assert 0 < compiled.cpu_seconds < compiled.seconds
    assert gone(compiled.said["pid"])
    assert said[0] == "starting for v5e:2x4: 0 s"


@pytest.mark.usefixtures("installed")
def test_a_full_compile_waits_for_what_the_child_says_last():
    compiled = run("dump", sleep=0.5, depth="full")
    assert compiled.hlo == HLO
    assert compiled.said["memory"] == {"temp": 3}
    assert compiled.depth == "full"


@pytest.mark.usefixtures("installed")
def test_running_out_of_device_memory_is_a_result_with_the_whole_message():
    message = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: 90.74G exceeds 15.75G\n" + "  1. Size: 4.00G\n" * 2000
    compiled = run("raise", message=message)
    assert compiled.out_of_memory == message
    assert compiled.hlo == ""


# What goes wrong.


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("depth", ["fast", "full"])
def test_a_time_limit_ends_the_child_and_what_it_started(tmp_path, depth):
    with pytest.raises(CompileTimeout, match=r"compiling for v5e:2x4 was not done after 3 s \(it was waiting\)"):
        run("sleep", note=str(tmp_path / "note"), depth=depth, limits={"limit_seconds": 3})
    child, grandchild, folder = noted(tmp_path / "note")()
    assert gone(child)
    assert gone(grandchild)
    assert not os.path.exists(folder)


@pytest.mark.usefixtures("installed")
def test_a_memory_limit_ends_the_child():
    with pytest.raises(
        CompileKilled, match=r"it used 0\.\d GiB of this machine's memory, more than limit_bytes=2e\+08"
    ):
        run("allocate", mebibytes=400, limits={"limit_bytes": 2e8})


@pytest.mark.usefixtures("installed")
def test_a_child_killed_from_outside_says_so(tmp_path):
    thread = threading.Thread(target=lambda: os.kill(until(noted(tmp_path / "note"))[0], signal.SIGKILL))
    thread.start()
    with pytest.raises(CompileKilled, match=r"was killed by SIGKILL after \d+ s \(.*\), not by its limits"):
        run("sleep", note=str(tmp_path / "note"))
    thread.join()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "do, request_, message",
    [
        ("crash", {"signal": "SIGABRT"}, r"crashed \(SIGABRT\); last lines: F0000 Check failed: operand_count == 1"),
        ("raise", {"message": "mosaic: no"}, r"compiling for v5e:2x4 failed: ValueError: mosaic: no"),
        ("exit", {"code": 3}, r"ended with status 3; last lines: x+ the last line"),
        ("exit", {"code": 0}, r"ended without a module of a function named 'step'"),
    ],
)
def test_an_error_has_the_compilers_own_last_lines(do, request_, message):
    with pytest.raises(CompilerError, match=message) as caught:
        run(do, **request_)
    assert len(str(caught.value)) < 5000


@pytest.mark.usefixtures("installed")
def test_a_module_that_cannot_be_imported_is_named():
    with pytest.raises(CompilerError, match="no_such_module"):
        compile_in_child("no_such_module", {}, TARGET)


@pytest.mark.usefixtures("installed")
def test_a_full_disk_in_the_child_names_the_folder(temporary):
    with pytest.raises(
        DiskFull, match=rf"no space left for the compile in {re.escape(str(temporary))} \(.*or set TMPDIR"
    ):
        run("full disk")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["mkdtemp", "write_text"])
def test_a_full_disk_here_names_the_folder(temporary, monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((tempfile, name) if name == "mkdtemp" else (pathlib.Path, name)), fail)
    with pytest.raises(
        DiskFull, match=rf"no space left for the compile in {re.escape(str(temporary))} \(\d+ MiB free\)"
    ):
        run("dump")


@pytest.mark.parametrize("target, extra", [(TARGET, "tpu-aot"), (GPUS, "gpu-aot")])
def test_a_missing_compiler_names_its_extra_and_starts_nothing(monkeypatch, target, extra):
    from search import topology

    monkeypatch.setattr(topology, "_version", lambda name: "1.0" if name in ("jax", "jaxlib") else None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ToolchainMissing, match=rf"not installed; pip install 'redco-like\[{extra}\]'"):
        run("dump", target)


# Interruptions.


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_ends_the_child(kind):
    pids = []

    def interrupt(text):
        if "waiting" in text:
            raise kind

    def remember(text):
        pids.extend(member for member in os.listdir("/proc") if member.isdigit() and child_of_this(int(member)))
        interrupt(text)

    with pytest.raises(kind):
        run("sleep", tell=remember)
    assert pids
    assert all(gone(int(pid)) for pid in pids)


def child_of_this(pid):
    with contextlib.suppress(OSError):
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_dies_with_its_parent_and_the_folder_goes(tmp_path, temporary, number):
    code = (
        "import signal, sys, tempfile; sys.path.insert(0, {here!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background inherits it as ignored
        "from search import compiler\n"
        "from search.topology import Target\n"
        "compiler.toolchain = lambda target: {{}}\n"
        "tempfile.tempdir = {temporary!r}\n"
        "target = Target('tpu', 'tpu-aot', 'v5e:2x4', 1, '', 8, (False, False), 'v5e')\n"
        "compiler.compile_in_child('compile_children', {{'do': 'sleep', 'note': {note!r}}}, target)\n"
    ).format(here=str(pathlib.Path(__file__).parent), temporary=str(temporary), note=str(tmp_path / "note"))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        child, grandchild, folder = until(lambda: (n := noted(tmp_path / "note")()) and len(n) == 3 and n)
        assert os.path.isdir(folder)
    finally:
        parent.send_signal(number)
        parent.wait(20)
    assert gone(child)
    assert gone(grandchild)
    until(lambda: not os.path.exists(folder))


@pytest.mark.usefixtures("installed")
def test_two_at_once_do_not_meet():
    results = {}

    def one(sleep):
        results[sleep] = run("dump", sleep=sleep, depth="full")

    threads = [threading.Thread(target=one, args=(sleep,)) for sleep in (0.1, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0.1].said["folder"] != results[0.2].said["folder"]
    assert results[0.1].hlo == results[0.2].hlo == HLO


# The cache.

KEY = {"plan": "{}", "versions": {"jax": "0.10.2"}}


def test_a_record_is_found_again_under_its_key_alone(tmp_path):
    cache = Cache(tmp_path / "new" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, {"bytes": 5})
    assert cache.get(dict(reversed(KEY.items()))) == {"bytes": 5}
    assert cache.get({**KEY, "versions": {"jax": "0.11"}}) is None
    assert Cache(tmp_path / "new" / "cache").get(KEY) == {"bytes": 5}


def test_the_folder_of_records_can_be_set(tmp_path, monkeypatch):
    monkeypatch.setenv("REDCO_LIKE_CACHE", str(tmp_path))
    assert Cache().folder == tmp_path
    monkeypatch.delenv("REDCO_LIKE_CACHE")
    assert Cache().folder == pathlib.Path("~/.cache/redco-like").expanduser()


@pytest.mark.parametrize("change", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff\x00", lambda b: b"[1]"])
def test_a_corrupt_record_counts_as_missing(tmp_path, change):
    cache = Cache(tmp_path)
    cache.put(KEY, {"bytes": 5})
    (path,) = tmp_path.iterdir()
    path.write_bytes(change(path.read_bytes()))
    assert cache.get(KEY) is None
    cache.put(KEY, {"bytes": 6})
    assert cache.get(KEY) == {"bytes": 6}


def test_writers_at_once_leave_one_whole_record(tmp_path):
    cache = Cache(tmp_path)
    wrong = []

    def write(number):
        for _ in range(50):
            cache.put(KEY, {"numbers": [number] * 2000})
            record = cache.get(KEY)
            if record is None or len(set(record["numbers"])) != 1:
                wrong.append(record)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_only_warns_and_leaves_no_part(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    cache.put(KEY, {"bytes": 5})

    def fail(path, text, *args):
        with open(path, "w") as file:
            file.write(text[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", fail)
    with pytest.warns(RuntimeWarning, match=r"was not kept in .*No space left on device; set REDCO_LIKE_CACHE"):
        cache.put(KEY, {"bytes": 6})
    assert cache.get(KEY) == {"bytes": 5}
    assert len(list(tmp_path.iterdir())) == 1


# The real compilers.


def missing(target):
    from search.topology import toolchain

    try:
        toolchain(target)
    except ToolchainMissing as error:
        return str(error)


@pytest.mark.aot
@pytest.mark.parametrize("depth", ["fast", "full"])
@pytest.mark.parametrize("cluster", ["v5e:2x4", "2*v5e:2x2", "8xH100"])
def test_a_sharded_step_is_compiled_with_no_device(cluster, depth):
    target = target_of(parse_cluster(cluster))
    if why := missing(target):
        pytest.skip(why)
    request = {"cluster": parse_cluster(cluster).to_json(), "tensor": 2, "rows": 1024, "width": 512}
    compiled = run("step", target, depth=depth, limits={"limit_seconds": 300}, **request)
    assert compiled.hlo.startswith("HloModule jit_step")
    assert "is_scheduled=true" in compiled.hlo
    assert "all-reduce" in compiled.hlo
    assert len(compiled.said["devices"]) == 8
    assert compiled.depth == ("full" if target.platform == "cuda" else depth)
    # Weights and rows in bfloat16, split 8 and 4 ways.
    assert compiled.said.get("memory", {"argument": 0})["argument"] in (0, 512 * 512 * 2 // 8 + 1024 * 512 * 2 // 4)
    assert "memory" in compiled.said or compiled.depth == "fast"
    assert ("Total bytes" in compiled.memory_report) == (target.platform == "tpu")


@pytest.mark.aot
def test_a_step_that_does_not_fit_says_by_how_much():
    if why := missing(TARGET):
        pytest.skip(why)
    request = {"cluster": parse_cluster("v5e:2x4").to_json(), "tensor": 2, "rows": 2**24, "width": 8192}
    compiled = run("step", depth="full", limits={"limit_seconds": 300}, **request)
    assert re.search(r"\([\d.]+G\) exceeds available HBM \(15\.75G\)", compiled.out_of_memory)
    assert "Total bytes" in compiled.memory_report
