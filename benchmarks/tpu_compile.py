"""Compile a step for a TPU topology with no TPU, stopped after buffer assignment: seconds instead of minutes.

The real XLA:TPU compiler (libtpu, extra `tpu-aot`) runs in a child process that dumps its HLO. When the buffers are
assigned, the scheduled and partitioned program and its memory report are on disk, and the child is ended: code
generation is 90 % of a compile.

    child:   when `REDCO_LIKE_CHILD` is set, the script prints `argument_bytes N` and compiles a function `...step`
    parent:  report = run_child(script, ["--variant", "pinned"], limit_seconds=300)
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

CHILD = "REDCO_LIKE_CHILD"
DTYPE_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the compiled program: kind, result shapes as text, bytes of its result, whether inside a
    loop.
    """

    kind: str
    shapes: str
    result_bytes: int
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler said, per device: bytes of the whole program and of its arguments, and its collectives."""

    total_bytes: int
    argument_bytes: int
    collectives: tuple[Collective, ...]
    seconds: float


def run_child(script: str, args: list[str], *, accelerator_type: str, limit_seconds: float) -> Report:
    """Run `script` as a compiling child and read its dump.

    Raises:
        TimeoutError: no memory report within the limit.
        RuntimeError: the child failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="tpu-compile-") as folder:
        env = os.environ | {
            CHILD: "1",
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": accelerator_type,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
        }
        log = pathlib.Path(folder, "log.txt")
        start = time.monotonic()
        with log.open("w") as out:
            child = subprocess.Popen([sys.executable, script, *args], env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            while True:
                texts = _finished(pathlib.Path(folder))
                if texts is not None:
                    hlo, memory = texts
                    break
                if child.poll() is not None:
                    raise RuntimeError(f"the compiling child ended with {child.returncode}: {log.read_text()[-1500:]}")
                if time.monotonic() - start > limit_seconds:
                    raise TimeoutError(f"no memory report after {limit_seconds:.0f} s")
                time.sleep(0.5)
        finally:
            child.kill()
            child.wait()
        seconds = time.monotonic() - start
        said = re.search(r"^argument_bytes (\d+)", log.read_text(), re.MULTILINE)
        if said is None:
            raise RuntimeError("the compiling child did not say its argument_bytes")
    return _report(hlo, memory, int(said[1]), seconds)


def _finished(folder: pathlib.Path) -> tuple[str, str] | None:
    hlo = sorted(folder.glob("*jit_*step*after_optimizations_after_buffer_assignment.txt"))
    memory = sorted(folder.glob("*jit_*step*memory-usage-report.txt"))
    if not hlo or not memory:
        return None
    text = hlo[-1].read_text()
    return (text, memory[-1].read_text()) if text.rstrip().endswith("}") and memory[-1].stat().st_size else None


def _report(hlo: str, memory: str, argument_bytes: int, seconds: float) -> Report:
    total = re.search(r"Total bytes:\s*(\d+)", memory)
    if total is None:
        raise RuntimeError(f"the memory report has no total: {memory[:500]}")
    return Report(int(total[1]), argument_bytes, tuple(collectives(hlo)), seconds)


def collectives(hlo: str) -> list[Collective]:
    """Collectives of an HLO module; those reachable from a loop's body count as inside it."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            name = head[1]
            bodies[name] = []
        elif line == "}":
            name = ""
        elif name:
            bodies[name].append(line)
    inside: set[str] = set()
    queue = [
        m
        for lines in bodies.values()
        for line in lines
        if " while(" in line
        for m in re.findall(r"body=%?([\w.\-]+)", line)
    ]
    while queue:
        here = queue.pop()
        if here in inside:
            continue
        inside.add(here)
        for line in bodies.get(here, []):
            queue += re.findall(r"(?:calls|to_apply|body|condition|async_execution_thread)=%?([\w.\-]+)", line)
    found = []
    for computation, lines in bodies.items():
        for line in lines:
            op = re.search(r"= (\(?[^=]*?\)?) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(", line)
            if op:
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", op[1])
                size = sum(
                    DTYPE_BYTES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in shapes
                )
                found.append(Collective(op[2], " ".join(f"{t}[{d}]" for t, d in shapes), size, computation in inside))
    return found
