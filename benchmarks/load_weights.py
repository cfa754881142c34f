"""What loading a checkpoint takes: memory of the host beside the arrays, and time against safetensors' own reading.

Bars, for a random Llama of 1 GB in bfloat16 (five files), on 8 CPU devices, read as it is kept (fsdp 8; data 2 x tensor
4; one device) and, for memory, also converted to float32 on the way (fsdp 8):

- the process grows, at its peak, by at most 1.3 times the shards it then holds, plus 64 MB. CPU devices keep their
  arrays in the host's memory, so the shards themselves are in that figure; what is beside them is stated too.
- loading takes at most 1.5 times as long as `safetensors.numpy.load_file` of the same files, which copies each tensor
  once and neither transposes nor shards it, as it is kept. Both read files that are in the page cache.

Memory: a process of its own for each case; peak resident memory (VmHWM) while loading, less what was resident before
it, when a tiny model has been loaded the same way, so that code and traces are there. Time: in one process, in turn;
of each the best round, as other work on the machine only ever adds to it. Tracing and laying out the model (which does
not grow with its size) is in the time of loading.

    python benchmarks/load_weights.py              # last line: one JSON object; exit status 1 if a bar is missed
    python benchmarks/load_weights.py --quick      # 0.1 GB, where the bar for time does not hold: it is reported
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_GROWTH = 1.3
CONSTANT_BYTES = 64e6
MAX_TIME = 1.5
CASES: dict[str, dict[str, Any]] = {
    "fsdp 8": {"plan": "fsdp", "mesh": "fsdp=8"},
    "data 2 x tensor 4": {"plan": "data+megatron", "mesh": "data=2,tensor=4"},
    "one device": {},
    "fsdp 8, to float32": {"plan": "fsdp", "mesh": "fsdp=8", "dtype": "float32"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and time of loading a checkpoint")
    parser.add_argument("--quick", action="store_true", help="0.1 GB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], pathlib.Path(options.child[1]), options.quick, options.rounds)
    with tempfile.TemporaryDirectory(prefix="load-weights-") as folder:
        return measure(pathlib.Path(folder), options.quick, options.rounds)


def measure(folder: pathlib.Path, quick: bool, rounds: int) -> int:
    written = run("write", folder, quick, rounds)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        f"checkpoint: {written['bytes'] / 1e9:.3f} GB, {written['files']} files, written in {written['seconds']:.1f} s"
    )
    memory = {case: run(f"memory {case}", folder, quick, rounds) for case in CASES}
    times = run("time", folder, quick, rounds)
    print(f"{'':20} {'arrays':>9} {'growth':>9} {'beside':>9} {'seconds':>8} {'spread':>14} {'of load_file':>12}")
    theirs = min(times["safetensors"])
    ok = True
    for case, m in memory.items():
        seconds = times[case]
        beside, ratio = m["growth"] - m["arrays"], min(seconds) / theirs
        sizes = "".join(f"{n / 1e6:6.0f} MB " for n in (m["arrays"], m["growth"], beside))
        print(f"{case:20} {sizes}{min(seconds):8.2f} {min(seconds):6.2f} .. {max(seconds):4.2f} {ratio:11.2f}x")
        ok &= m["growth"] <= MAX_GROWTH * m["arrays"] + CONSTANT_BYTES
        ok &= quick or "dtype" in CASES[case] or ratio <= MAX_TIME
    opened = min(times["safe_open"])
    print(f"{'load_file':50} {theirs:8.2f} {theirs:6.2f} .. {max(times['safetensors']):4.2f}")
    print(f"{'safe_open':50} {opened:8.2f} {opened:6.2f} .. {max(times['safe_open']):4.2f}")
    record = {
        "benchmark": "load_weights",
        "quick": quick,
        "checkpoint_bytes": written["bytes"],
        "memory": memory,
        "seconds": {
            case: {"best": min(t), "median": statistics.median(t), "worst": max(t)} for case, t in times.items()
        },
        "time_ratio": {case: min(times[case]) / theirs for case in CASES},
        "cores": os.cpu_count(),
        "passed": ok,
    }
    print(json.dumps(record))
    return 0 if ok else 1


def run(task: str, folder: pathlib.Path, quick: bool, rounds: int) -> Any:
    """A task in a process of its own."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, str(folder), "--rounds", str(rounds), *["--quick"] * quick],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": "32", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# In a child.


def child(task: str, folder: pathlib.Path, quick: bool, rounds: int) -> int:
    if task == "write":
        result = write(folder, quick)
    elif task == "time":
        result = times(folder, rounds)
    else:
        result = memory(folder, CASES[task.removeprefix("memory ")])
    print(json.dumps(result))
    return 0


def write(folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    import jax.numpy as jnp
    import numpy as np

    from redco_like.models import ModelConfig, save
    from redco_like.models.weights.loading import abstract_params, nested

    form: dict[str, Any] = dict(norm="rms", activation="silu", gated=True, position="rotary", tied=False)
    sizes: dict[str, Any] = dict(embed=512, layers=8, heads=8, kv_heads=4, mlp=1536, vocab=32000)
    if not quick:
        sizes = dict(embed=2048, layers=8, heads=16, kv_heads=8, mlp=5632, vocab=32000)
    config = ModelConfig(family="llama", kind="decoder", **sizes, **form)
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for name, c in (("large", config), ("tiny", dataclasses.replace(config, vocab=8, embed=16, mlp=16, layers=2))):
        shapes = abstract_params(c)
        params = {
            path: (rng.integers(0, 2**16, shape, np.uint16) & 0x3FFF).view(jnp.bfloat16)
            for path, shape in shapes.items()
        }
        save(folder / name, c, nested(params), shard_bytes=250_000_000)
    files = list((folder / "large").glob("*.safetensors"))
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
        "seconds": time.perf_counter() - began,
    }


def memory(folder: pathlib.Path, case: dict[str, Any]) -> dict[str, float]:
    import jax

    from redco_like.models import load

    load(folder / "tiny", **case)
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    params = load(folder / "large", **case).params
    jax.block_until_ready(params)
    peak = resident("VmHWM")
    held = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
    }
    return {"arrays": float(sum(held.values())), "growth": float(peak - before)}


def resident(what: str) -> int:
    """Bytes that the system counts as this process's: VmRSS now, VmHWM at most."""
    found = re.search(rf"{what}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {what}")
    return int(found[1]) * 1024


def times(folder: pathlib.Path, rounds: int) -> dict[str, list[float]]:
    import jax
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import load_file

    from redco_like.models import load

    files = sorted((folder / "large").glob("*.safetensors"))

    def whole() -> Any:
        return [load_file(file) for file in files]

    def opened() -> Any:
        tensors = []
        for path in files:
            with safe_open(path, "np") as file:
                tensors += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        return tensors

    def ours(case: dict[str, Any]) -> Any:
        return jax.block_until_ready(load(folder / "large", **case).params)

    runs: dict[str, Any] = {"safetensors": whole, "safe_open": opened}
    runs |= {name: lambda case=case: ours(case) for name, case in CASES.items()}
    first = {name: tensor for part in whole() for name, tensor in part.items()}
    mine = ours(CASES["fsdp 8"])
    np.testing.assert_array_equal(np.asarray(mine["embed"]), first["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        np.asarray(mine["stack"]["layers"]["mlp"]["down"]["kernel"])[3], first["model.layers.3.mlp.down_proj.weight"].T
    )
    del first, mine
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, call in runs.items():
            began = time.perf_counter()
            result = call()
            took = time.perf_counter() - began
            del result
            if round_number:  # the first round loads the libraries and warms the page cache
                seconds[name].append(took)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
