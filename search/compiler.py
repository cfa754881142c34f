"""Runs a compiler in a child process with limits, and reads the module that it scheduled. Nothing is left behind.

    compiled = compile_in_child("redco_like.compile_step", request, target, tell=print)
    compiled.hlo, compiled.memory_report, compiled.said, compiled.out_of_memory
    Cache().put({**request, "versions": toolchain(target)}, {"hlo": compiled.hlo})       # .get(...) next time

The child compiles a function named `step` and tells what it knows as lines of JSON, `{"event": "lowered", ...}`. XLA
dumps its modules into a temporary folder. About nine tenths of a TPU compile come after buffers are assigned (code
generation), when the schedule and the bytes are known: depth "fast" ends the child there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from search import compile_guard
from search.topology import CompileFailed, Target, ToolchainMissing, environment, toolchain

__all__ = [
    "Cache",
    "CompileFailed",
    "CompileKilled",
    "CompileTimeout",
    "Compiled",
    "CompilerError",
    "DiskFull",
    "ToolchainMissing",
    "compile_in_child",
]

Depth = Literal["fast", "full"]

STEP = "step"
"""Name of the function whose module is read; the others that a child compiles are small."""
CACHE_VARIABLE = "REDCO_LIKE_CACHE"
FREE_BYTES = 256 * 2**20
"""Asked for where the disk is full. A small step writes 0.5 MB to its folder; large modules are some MB a copy."""
_POLL_SECONDS = 0.1
_TAIL_BYTES = 4000
_LOG_BYTES = 100_000
_PHASES = {"opening": "starting", "lowered": "compiling", "compiled": "reading"}
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class CompileTimeout(CompileFailed):
    """The compile took longer than it may."""


class CompileKilled(CompileFailed):
    """The child was killed: by its memory limit, or from outside."""


class DiskFull(CompileFailed):
    """No space left, for the child or for this process."""


class CompilerError(CompileFailed):
    """The compiler, or what it was given, failed; the message is its own."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of one compile.

    Attributes:
        hlo: the module of `step`, partitioned, scheduled, buffers assigned where the memory sufficed; "" where the
            compiler gave up before.
        memory_report: the TPU compiler's, bytes by memory space and the largest buffers; "" for GPUs.
        said: fields of the child's events, later ones over earlier ones.
        cpu_seconds: of the child.
        depth: "full" for GPUs, whatever was asked for: their compiles are short.
        out_of_memory: the compiler's whole message where the step exceeds the device's memory, else "". A fast compile
            may be ended before the compiler compares: compare the bytes of the report with the device's yourself.
        buffers: XLA's text of where every value lies (its buffer assignment); "" where it wrote none.
        log: the last part of what the child wrote to its standard error.
    """

    hlo: str
    memory_report: str
    said: dict[str, Any]
    seconds: float
    cpu_seconds: float
    depth: Depth
    out_of_memory: str = ""
    buffers: str = ""
    log: str = ""


def compile_in_child(
    module: str,
    request: Mapping[str, Any],
    target: Target,
    *,
    depth: Depth = "fast",
    limit_seconds: float = 1800,
    limit_bytes: float = 16 * 2**30,
    tell: Callable[[str], None] = lambda text: None,
) -> Compiled:
    """Run `python -m MODULE REQUEST.json` to compile `step` for a target, and read what it compiled.

    Args:
        module: its main program reads the path of the request, tells events on standard output, compiles `step`.
        request: written as JSON for the child.
        depth: "fast" ends a TPU compile when buffers are assigned; "full" lets it end, with its memory analysis.
        limit_seconds, limit_bytes: of the child and what it starts, wall clock and resident memory.
        tell: called about once a second with what is going on.

    Raises:
        CompileFailed: one of its subclasses, in one clear line; the child and its folder are gone by then.
    """
    toolchain(target)
    depth = "full" if target.platform == "cuda" else depth
    with _folder() as folder:
        try:
            child = _Child(folder, module, request, target)
        except OSError as error:
            raise _as_failure(error) from error
        try:
            return _follow(child, target, depth, limit_seconds, limit_bytes, tell)
        finally:
            child.kill()


@contextlib.contextmanager
def _folder() -> Iterator[pathlib.Path]:
    try:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="redco-like-compile-"))
    except FileNotFoundError as error:  # tempfile's message lists the folders that it tried to write to
        raise DiskFull(f"no temporary folder for the compile: {error}; free some space, or set TMPDIR") from error
    except OSError as error:
        raise _as_failure(error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_failure(error: OSError) -> CompileFailed:
    if error.errno in _FULL_DISK:
        return _disk_full(str(error))
    return CompileFailed(f"the compile could not be started in {tempfile.gettempdir()}: {error}")


def _disk_full(message: str) -> DiskFull:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 2**20
    return DiskFull(
        f"no space left for the compile in {folder} ({free:.0f} MiB free): have {FREE_BYTES / 2**20:.0f} MiB there, "
        f"or set TMPDIR to another folder ({message})"
    )


class _Child:
    """The process, its group and its files."""

    def __init__(self, folder: pathlib.Path, module: str, request: Mapping[str, Any], target: Target):
        self.folder, self.dump = folder, folder / "dump"
        self.dump.mkdir()
        path = folder / "request.json"
        path.write_text(json.dumps(request), "utf-8")
        env = os.environ | environment(target)
        # The user's flags stay. Of a flag given twice, the last counts.
        flags = f'--xla_dump_to="{self.dump}" --xla_dump_hlo_as_text'
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        self.events: dict[str, Any] = {}
        self.phase = "starting"
        self.started = time.monotonic()
        self.cpu_seconds = 0.0
        self._read = 0
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-P", compile_guard.__file__, str(folder), str(os.getpid()), module, str(path)],
                stdin=subprocess.PIPE,  # never written to: its end tells the child that this process is gone
                stdout=out,
                stderr=err,
                env=env,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def ended(self) -> bool:
        return self._wait(os.WNOHANG)

    def _wait(self, options: int) -> bool:
        if self.process.returncode is None:
            try:
                pid, status, usage = os.wait4(self.process.pid, options)
            except ChildProcessError:  # somebody else in this process waited for all its children
                self.process.returncode = self.process.returncode or -signal.SIGKILL
                return True
            if pid == 0:
                return False
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return True

    def kill(self) -> None:
        """End the whole group, and wait until it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._wait(0)
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        deadline = time.monotonic() + 5
        while _members(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)

    def listen(self) -> None:
        """Read the events that are whole lines by now."""
        with open(self.folder / "stdout", "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and isinstance(event.get("event"), str):
                    name = event.pop("event")
                    self.phase = _PHASES.get(name, name)
                    self.events.update(event)

    def tail(self, size: int = _TAIL_BYTES) -> str:
        """Return the last lines that it printed, at most so many bytes."""
        for name in ("stderr", "stdout"):
            with open(self.folder / name, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                text = file.read().decode("utf-8", "replace").strip()
            if text:
                return text
        return "it printed nothing"


def _follow(
    child: _Child,
    target: Target,
    depth: Depth,
    limit_seconds: float,
    limit_bytes: float,
    tell: Callable[[str], None],
) -> Compiled:
    told = -1
    while not child.ended():
        child.listen()
        if target.platform == "tpu" and depth == "fast" and (files := _dumped(child, target)):
            child.listen()  # what it told before it wrote the module, and after the last look
            return _result(child, target, depth, files)
        if child.seconds > limit_seconds:
            raise CompileTimeout(
                f"compiling for {target} was not done after {limit_seconds:g} s (it was {child.phase}); "
                f"raise limit_seconds={limit_seconds:g}"
            )
        if told != (told := int(child.seconds)):
            used = _members(child.process.pid)
            if sum(used.values()) > limit_bytes:
                raise CompileKilled(
                    f"compiling for {target} was ended: it used {sum(used.values()) / 2**30:.1f} GiB of this machine's "
                    f"memory, more than limit_bytes={limit_bytes:g} ({limit_bytes / 2**30:.1f} GiB); raise the limit"
                )
            tell(f"{child.phase} for {target}: {told} s")
        time.sleep(_POLL_SECONDS)
    child.listen()
    if child.process.returncode:
        return _failed(child, target, depth)
    files = _dumped(child, target)
    if files is None:
        text = child.tail()
        if "No space left" in text or shutil.disk_usage(child.folder).free < 2**20:
            raise _disk_full("the compiler wrote no module")
        raise CompilerError(
            f"compiling for {target} ended without a module of a function named {STEP!r}; last lines: {text}"
        )
    return _result(child, target, depth, files)


def _failed(child: _Child, target: Target, depth: Depth) -> Compiled:
    """Tell why it failed: an exception of the child, a crash of the compiler, somebody's kill."""
    code = child.process.returncode
    failure: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        failure = json.loads((child.folder / compile_guard.FAILURE).read_text("utf-8"))
    message = failure.get("message", "")
    if "RESOURCE_EXHAUSTED" in message:
        # Scheduled, but without places for its buffers.
        files = _dumped(child, target, ending="_before_buffer_assignment.txt")
        hlo, report = (_read(path) for path in files) if files else ("", "")
        seconds, buffers = child.seconds, _buffers(child)
        return Compiled(
            hlo, report, child.events, seconds, child.cpu_seconds, depth, message, buffers, child.tail(_LOG_BYTES)
        )
    if failure.get("errno") in _FULL_DISK or (not failure and "No space left on device" in child.tail()):
        raise _disk_full(message or child.tail()[-200:])
    if code < 0:
        name = signal.Signals(-code).name
        if -code in _CRASHES:
            raise CompilerError(f"the compiler for {target} crashed ({name}); last lines: {child.tail()}")
        hint = "; with SIGKILL, often the kernel's, out of memory" if -code == signal.SIGKILL else ""
        raise CompileKilled(
            f"compiling for {target} was killed by {name} after {child.seconds:.0f} s ({child.phase}), not by its "
            f"limits{hint}"
        )
    if failure:
        lines = message.strip()[-_TAIL_BYTES:]
        raise CompilerError(f"compiling for {target} failed: {failure.get('type')}: {lines}")
    raise CompilerError(f"compiling for {target} ended with status {code}; last lines: {child.tail()}")


def _dumped(child: _Child, target: Target, ending: str = "") -> tuple[pathlib.Path, pathlib.Path] | None:
    """Return the files of the last module of `step` and of its memory, once both are written to their end."""
    if not ending:
        ending = "_after_buffer_assignment.txt" if target.platform == "tpu" else "gpu_after_optimizations.txt"
    found: dict[str, pathlib.Path] = {}
    for path in sorted(child.dump.iterdir()):
        match = re.fullmatch(
            rf"(module_\d+)\.(?:p?jit_{STEP}\.|jit\({STEP}\)\.).*?(memory-usage-report\.txt|)", path.name
        )
        if match and match[2]:
            found[match[1] + ".report"] = path
        elif match and path.name.endswith(ending):
            found[match[1]] = path
    modules = [name for name in found if not name.endswith(".report")]
    if not modules or f"{modules[-1]}.report" not in found:
        return None
    last = modules[-1]
    files = found[last], found[f"{last}.report"]
    return None if child.process.returncode is None and _being_written(child, files) else files


def _being_written(child: _Child, files: tuple[pathlib.Path, ...]) -> bool:
    """Whether a process of the group has one of the files open, or, where that is not known, one changed lately."""
    opened = set()
    for pid in _members(child.process.pid):
        try:
            entries = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # ended
            continue
        for entry in entries:
            with contextlib.suppress(OSError):
                opened.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
    if opened:
        return any(str(path.resolve()) in opened for path in files)
    return any(time.time() - path.stat().st_mtime < 1 for path in files)


def _result(child: _Child, target: Target, depth: Depth, files: tuple[pathlib.Path, pathlib.Path]) -> Compiled:
    seconds = child.seconds
    child.kill()
    hlo, report = (_read(path) for path in files)
    report = report if target.platform == "tpu" else ""
    buffers, log = _buffers(child), child.tail(_LOG_BYTES)
    return Compiled(hlo, report, child.events, seconds, child.cpu_seconds, depth, buffers=buffers, log=log)


def _buffers(child: _Child) -> str:
    """Return the text of the buffer assignment of the last module of `step`."""
    found = sorted(path for path in child.dump.glob(f"*{STEP}*buffer-assignment.txt"))
    return _read(found[-1]) if found else ""


def _read(path: pathlib.Path) -> str:
    return path.read_text("utf-8", "replace")


def _members(group: int) -> dict[int, int]:
    """Processes of a group that have not ended -> bytes of resident memory. Empty where there is no /proc."""
    found = {}
    page = os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    fields = pathlib.Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == group and fields[0] not in "ZX":
                        found[int(name)] = int(fields[21]) * page
    return found


class Cache:
    """Records as JSON files, each under the digest of its key; several processes may use a folder at once.

    A key is whatever the record depends on, as JSON: the request, the target, `toolchain(target)`, the depth.

    Args:
        folder: default `$REDCO_LIKE_CACHE`, else `~/.cache/redco-like`.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        default = os.environ.get(CACHE_VARIABLE) or "~/.cache/redco-like"
        self.folder = pathlib.Path(folder or default).expanduser()

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record, or None where there is none that can be read whole."""
        digest = _digest(key)
        try:
            entry = json.loads((self.folder / f"{digest}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(entry, dict) or entry.get("key") != digest or not isinstance(entry.get("record"), dict):
            return None
        return entry["record"]

    def put(self, key: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Keep a record; where it cannot be written, warn: what it holds can be found again."""
        digest = _digest(key)
        text = json.dumps({"key": digest, "record": record})
        path = self.folder / f"{digest}.json"
        temporary = self.folder / f".{digest}.{os.getpid()}.{threading.get_ident()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, "utf-8")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            warnings.warn(
                f"the record was not kept in {self.folder}: {error}; set {CACHE_VARIABLE} to another folder",
                RuntimeWarning,
                stacklevel=2,
            )


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
