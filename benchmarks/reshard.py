"""Moves of a 1 GB tree within one process of 8 CPU devices, against plain copies of memory and `jax.device_put`.

    python benchmarks/reshard.py [--quick]
    python benchmarks/reshard.py --processes          # bytes per second between two processes, no bar

Bars, by medians of ratios of neighbours, two of the kinds of copies taking turns:

- bytes moved per second at least 0.8 of plain copies: `np.copyto` of the same bytes in their old order into as many new
  arrays, one after the other;
- never slower than `jax.device_put` by more than 10 %;
- the sender's and receivers' bytes equal the lower bound.

Reported beside, without a bar: plain copies by as many threads as the move has, and checksums (`verify`).
--quick: 128 MB, three rounds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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
from pipelines.reshard_copies import THREADS
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


def timed(function, tree) -> float:
    tree = [anew(x) for x in tree]
    begin = time.perf_counter()
    made = function(tree)
    jax.block_until_ready(made)
    return time.perf_counter() - begin


def alternate(one, other, tree, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, in turns: what one frees is what the other is given, whose pages have been touched."""
    seconds = []
    for turn in range(WARM_ROUNDS + rounds):
        a, b = timed(one, tree), timed(other, tree)
        if turn >= WARM_ROUNDS:
            seconds.append((a, b))
    return seconds


def plain_copies(tree: list[jax.Array], shard_bytes: list[int], pool=None) -> list[np.ndarray]:
    """The tree's bytes, in their order, into new arrays of the sizes of the move's."""
    made = [np.empty(n, np.uint8) for n in shard_bytes]
    parts, at, room = [], 0, 0
    for shard in (shard for x in tree for shard in x.addressable_shards if shard.replica_id == 0):
        old = np.asarray(shard.data).reshape(-1).view(np.uint8)
        while old.size:
            if not room:
                room = shard_bytes[at]
                at += 1
            n = min(room, old.size)
            begin = shard_bytes[at - 1] - room
            parts.append((made[at - 1][begin : begin + n], old[:n]))
            old, room = old[n:], room - n
    if pool is None:
        for new, old in parts:
            np.copyto(new, old)
    else:
        list(pool.map(np.copyto, *zip(*parts, strict=True)))
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
        # Replicas within a process share memory on CPU devices, after `device_put` as well: written once.
        distinct = len(set(map(str, new.devices_indices_map(shapes[0]).values())))
        shard_bytes = [math.prod(new.shard_shape(shape)) * 2 for shape in shapes for _ in range(distinct)]
        written = sum(shard_bytes)
        todo = {
            "move": move.run,
            "copy": lambda tree, shard_bytes=shard_bytes: plain_copies(tree, shard_bytes),
            "copy by threads": lambda tree, shard_bytes=shard_bytes: plain_copies(tree, shard_bytes, pool),
            "device_put": lambda tree, new=new: jax.device_put(tree, new),
            "checked": checked.run,
        }
        seconds = {
            other: alternate(todo["move"], todo[other], tree, max(3, rounds // 3) if other == "checked" else rounds)
            for other in list(todo)[1:]
        }
        to_copy, to_threads, to_put, cost = ([b / a for a, b in pairs] for pairs in seconds.values())
        to_put = [1 / ratio for ratio in to_put]
        moved = statistics.median(a for a, _ in seconds["copy"])
        row = {
            "case": name,
            "gigabytes_written": round(written / 1e9, 3),
            "gigabytes_per_second": round(written / 1e9 / moved, 2),
            "of_plain_copy": spread(to_copy),
            "of_plain_copy_by_threads": spread(to_threads),
            "of_device_put_seconds": spread(to_put),
            "checked_over_unchecked": spread(cost),
            "median_seconds": {
                "move": round(moved, 3),
                **{what: round(statistics.median(b for _, b in pairs), 3) for what, pairs in seconds.items()},
            },
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
        del tree, todo
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
            spent = [timed(move.run, tree) for _ in range(6)][1:]
            crossing = move.predicted.crossing_bytes / 1e9
            rows[f"{name}{', checked' if verify else ''}"] = spread([crossing / s for s in spent])
    what = {"benchmark": "reshard between processes", "gigabytes_per_second": rows, "load_average": os.getloadavg()[0]}
    print(json.dumps(what), flush=True)
    os._exit(0)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


if __name__ == "__main__":
    sys.exit(main())
