"""Measures what a move needs beside its trees, by the process's peak of resident memory; prints JSON."""

import ctypes
import gc
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.reshard import Reshard
from sharding_rules import FSDP, TENSOR, MeshShape, make_mesh

LEAVES, SHAPE = 12, (1024, 2048)  # of 8 MiB
TREE_BYTES = LEAVES * SHAPE[0] * SHAPE[1] * 4


def status(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def settle() -> int:
    """Give back what is free, forget the old peak, and return what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def measure(method: str, donate: bool, budget: int, old, new) -> dict:
    shapes = [jax.ShapeDtypeStruct(SHAPE, jnp.float32)] * LEAVES
    move = Reshard(shapes, old, new, method=method, donate=donate, budget_bytes=budget)
    make = jax.jit(lambda seed: jnp.full(SHAPE, seed, jnp.float32), out_shardings=old)
    moved = move.run([make(float(i)) for i in range(LEAVES)])  # compiles, starts threads
    del moved
    tree = [make(float(i)) for i in range(LEAVES)]
    jax.block_until_ready(tree)
    before = settle()
    moved = move.run(tree)
    jax.block_until_ready(moved)
    peak = status("VmHWM")
    for i, leaf in enumerate(moved):
        assert all((np.asarray(shard.data) == i).all() for shard in leaf.addressable_shards)
    return {"peak_bytes": peak - before, "donated": [x.is_deleted() for x in tree]}


def main() -> None:
    if len(sys.argv) > 1:
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]), initialization_timeout=60)
    devices = jax.devices()
    first, second = devices[: len(devices) // 2], devices[len(devices) // 2 :]
    columns = NamedSharding(make_mesh(MeshShape(tensor=4), first), P(None, TENSOR))
    rows = NamedSharding(make_mesh(MeshShape(fsdp=4), second), P(FSDP))
    budget = 4 * 2**20
    cases = [("host", False), ("host", True)] + ([] if len(sys.argv) > 1 else [("device", False), ("device", True)])
    found = {
        f"{method} {'donated' if donate else 'kept'}": measure(method, donate, budget, columns, rows)
        for method, donate in cases
    }
    print(
        "RESULT",
        json.dumps({"tree_bytes": TREE_BYTES, "leaf_bytes": TREE_BYTES // LEAVES, "budget_bytes": budget, **found}),
        flush=True,
    )
    os._exit(0)


if __name__ == "__main__":
    main()
