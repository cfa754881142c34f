"""Moves of a 1 GB tree within one process of 8 CPU devices, against plain copies of memory and `jax.device_put`.

    python benchmarks/reshard.py [--quick]
    python benchmarks/reshard.py --processes          # bytes per second between two processes, no bar

Bars, by medians of ratios inside one round (a round runs everything once, one after the other):

- bytes moved per second at least 0.8 of plain copies (`np.copyto` into fresh memory, the same bytes in as many arrays,
  by as many threads as the move has);
- never slower than `jax.device_put` by more than 10 %;
- the sender's and receivers' bytes equal the lower bound.

Seconds with checksums (`verify`) are reported beside, without a bar, and so are seconds of all cores together, which
other work on the machine disturbs less. --quick: 128 MB, three rounds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import time

if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.reshard import Reshard
from pipelines.reshard_moving import THREADS
from sharding_rules import FSDP, TENSOR, MeshShape, make_mesh

BAR_COPY, BAR_DEVICE_PUT = 0.8, 1.1
WARM_ROUNDS = 2
"""They compile, and touch memory for the first time, which takes a virtual machine ten times as long as later."""


def cases(total_bytes: int):
    """Name -> (leaves: shapes, dtype, old sharding, new sharding)."""
    devices = jax.devices()
    first, second = devices[:4], devices[4:]
    large = [(4096, total_bytes // 16 // 4096 // 2)] * 16  # bfloat16
    small = [(256, total_bytes // 300 // 256 // 2 // 8 * 8)] * 300

    def on(devices, spec, **sizes):
        return NamedSharding(make_mesh(MeshShape(**sizes), devices), spec)

    return {
        "other devices, same layout": (large, on(first, P(FSDP), fsdp=4), on(second, P(FSDP), fsdp=4)),
        "other devices, columns to rows": (large, on(first, P(None, TENSOR), tensor=4), on(second, P(FSDP), fsdp=4)),
        "other devices, to replicas": (large, on(first, P(FSDP), fsdp=4), on(second, P(), data=4)),
        "same devices, columns to rows": (large, on(devices, P(None, TENSOR), tensor=8), on(devices, P(FSDP), fsdp=8)),
        "same devices, fsdp x tensor to tensor": (
            large,
            on(devices, P(FSDP, TENSOR), fsdp=4, tensor=2),
            on(devices, P(None, TENSOR), data=4, tensor=2),
        ),
        "all to half": (large, on(devices, P(FSDP), fsdp=8), on(second, P(None, TENSOR), tensor=4)),
        "half to all": (large, on(first, P(FSDP), fsdp=4), on(devices, P(FSDP, TENSOR), fsdp=4, tensor=2)),
        "300 small leaves": (small, on(first, P(FSDP), fsdp=4), on(second, P(None, TENSOR), tensor=4)),
    }


def anew(x: jax.Array) -> jax.Array:
    """The same shards as another array: without the host copy that `device_put` leaves in an array, for next time."""
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [s.data for s in x.addressable_shards])


def timed(function, tree) -> tuple[float, float, object]:
    """Seconds of the clock and of all cores, and what was made."""
    cores, begin = time.process_time(), time.perf_counter()
    made = function(tree)
    jax.block_until_ready(made)
    return time.perf_counter() - begin, time.process_time() - cores, made


def plain_copies(sources: list[np.ndarray], pool) -> list[np.ndarray]:
    """Each source into fresh memory, by as many threads as the move has."""
    made = [np.empty_like(source) for source in sources]
    if THREADS == 1:
        for new, old in zip(made, sources, strict=True):
            np.copyto(new, old)
    else:
        list(pool.map(np.copyto, made, sources))
    return made


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    if arguments.processes:
        return between_processes()
    total = 2**27 if arguments.quick else 2**30
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    rows, failed = [], []
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    for name, (shapes, old, new) in cases(total).items():
        if arguments.case not in name:
            continue
        tree = [jax.jit(lambda s=s: jnp.ones(s, jnp.bfloat16), out_shardings=old)() for s in shapes]
        jax.block_until_ready(tree)
        abstract = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
        begin = time.perf_counter()
        move = Reshard(abstract, old, new, verify=False)
        schedule_seconds = time.perf_counter() - begin
        checked = Reshard(abstract, old, new, verify=True)
        distinct = len({str(index) for index in new.devices_indices_map(shapes[0]).values()})
        shard_bytes = [math.prod(new.shard_shape(shape)) * 2 for shape in shapes for _ in range(distinct)]
        # Replicas within a process share memory on CPU devices, after `device_put` as well: written once.
        written = sum(shard_bytes)
        shared = np.ones(max(shard_bytes) * min(len(shard_bytes), 64), np.uint8)
        sources = [shared[i % 64 * n : i % 64 * n + n] for i, n in enumerate(shard_bytes)]
        seconds: dict[str, list[float]] = {"copy": [], "move": [], "device_put": [], "checked": []}
        cores: dict[str, list[float]] = {what: [] for what in seconds}
        todo = {
            "copy": lambda _, sources=sources: plain_copies(sources, pool),
            "move": lambda tree, move=move: move.run(tree),
            "device_put": lambda tree, new=new: jax.device_put(tree, new),
            "checked": lambda tree, checked=checked: checked.run(tree),
        }
        for turn in range(rounds + WARM_ROUNDS):
            names = list(todo)
            for what in names[turn % 4 :] + names[: turn % 4]:
                spent, of_cores, made = timed(todo[what], [anew(x) for x in tree])
                del made
                gc.collect()
                if turn >= WARM_ROUNDS:
                    seconds[what].append(spent)
                    cores[what].append(of_cores)
        to_copy = [c / m for c, m in zip(seconds["copy"], seconds["move"], strict=True)]
        to_put = [m / p for m, p in zip(seconds["move"], seconds["device_put"], strict=True)]
        cost = [c / m for c, m in zip(seconds["checked"], seconds["move"], strict=True)]
        row = {
            "case": name,
            "gigabytes_written": round(written / 1e9, 3),
            "gigabytes_per_second": round(written / 1e9 / statistics.median(seconds["move"]), 2),
            "of_plain_copy": spread(to_copy),
            "of_device_put_seconds": spread(to_put),
            "checked_over_unchecked": spread(cost),
            "median_seconds": {what: round(statistics.median(s), 3) for what, s in seconds.items()},
            "median_core_seconds": {what: round(statistics.median(s), 3) for what, s in cores.items()},
            "schedule_seconds": round(schedule_seconds, 4),
            "sent_equals_bound": move.predicted.sent_bytes == move.predicted.lower_bound_bytes,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        if statistics.median(to_copy) < BAR_COPY:
            failed.append(f"{name}: {statistics.median(to_copy):.2f} of plain copies, bar {BAR_COPY}")
        if statistics.median(to_put) > BAR_DEVICE_PUT:
            failed.append(f"{name}: {statistics.median(to_put):.2f} of device_put's seconds, bar {BAR_DEVICE_PUT}")
        if not row["sent_equals_bound"]:
            failed.append(f"{name}: sent bytes above the lower bound")
        del tree, sources, todo
        gc.collect()
    for line in failed:
        print("MISSED", line, file=sys.stderr)
    result = {
        "benchmark": "reshard",
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
        "tree_bytes": total,
        "threads": THREADS,
        "cases": rows,
        "bars": {"of_plain_copy": BAR_COPY, "of_device_put_seconds": BAR_DEVICE_PUT},
        "missed": failed,
    }
    print(json.dumps(result))
    return 1 if failed else 0


def between_processes() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", str(i), str(port)],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in (0, 1)
    ]
    try:
        outputs = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for process in children:  # SIGTERM does not end a process of jax.distributed
            process.kill()
            process.wait()
    lines = [line for line in outputs[1].splitlines() if line.startswith("{")]
    print(lines[-1] if lines else json.dumps({"benchmark": "reshard between processes", "failed": outputs}))
    return 0 if lines else 1


def child(process: str, port: str) -> int:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    devices = jax.devices()
    shapes = [(2048, 4096)] * 16  # 256 MB in bfloat16
    old = NamedSharding(make_mesh(MeshShape(tensor=4), devices[:4]), P(None, TENSOR))
    rows = {}
    for name, new in {
        "same layout": NamedSharding(make_mesh(MeshShape(tensor=4), devices[4:]), P(None, TENSOR)),
        "columns to rows": NamedSharding(make_mesh(MeshShape(fsdp=4), devices[4:]), P(FSDP)),
        "to replicas": NamedSharding(make_mesh(MeshShape(data=4), devices[4:]), P()),
    }.items():
        for verify in (False, True):
            tree = [jax.jit(lambda s=s: jnp.ones(s, jnp.bfloat16), out_shardings=old)() for s in shapes]
            move = Reshard(tree, old, new, verify=verify)
            spent = [timed(move.run, tree)[0] for _ in range(6)][1:]
            crossing = move.predicted.crossing_bytes / 1e9
            rows[f"{name}{', checked' if verify else ''}"] = spread([crossing / s for s in spent])
    what = {"benchmark": "reshard between processes", "gigabytes_per_second": rows, "load_average": os.getloadavg()[0]}
    print(json.dumps(what), flush=True)
    os._exit(0)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


if __name__ == "__main__":
    sys.exit(main())
