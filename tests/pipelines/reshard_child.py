"""One of two processes of 4 CPU devices that move trees between them; started by test_reshard_processes.py."""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.reshard import Reshard, ReshardError, reshard
from sharding_rules import FSDP, TENSOR, MeshShape, make_mesh

SHAPES = {"w": (16, 24), "stack": [(4, 8, 8), (24,)], "scale": ()}


def on(devices, spec, **sizes):
    return NamedSharding(make_mesh(MeshShape(**sizes), devices), spec)


def place(tree, sharding):
    """Arrays that every process knows whole, each placing its own shards."""

    def one(value, sharding):
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index], dtype=value.dtype)

    return jax.tree.map(one, tree, sharding)


def check(tree, wanted):
    for leaf, value in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])


def values(seed=0):
    rng = np.random.default_rng(seed)
    dtypes = {"w": jnp.float32, "stack": [jnp.bfloat16, jnp.int8], "scale": jnp.float32}
    return jax.tree.map(
        lambda s, d: rng.normal(size=s, scale=50).astype(d), SHAPES, dtypes, is_leaf=lambda x: isinstance(x, tuple)
    )


def layouts(devices):
    first, second = devices[:4], devices[4:]
    across = [devices[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    split = {"w": P(FSDP, TENSOR), "stack": [P(None, TENSOR), P(FSDP)], "scale": P()}
    rows = {"w": P(FSDP), "stack": [P(FSDP), P()], "scale": P()}
    whole = {"w": P(), "stack": [P(), P()], "scale": P()}

    def tree(specs, devices, **sizes):
        return jax.tree.map(lambda spec: on(devices, spec, **sizes), specs, is_leaf=lambda x: isinstance(x, P))

    return {
        "one process": tree(split, first, fsdp=2, tensor=2),
        "the other": tree(rows, second, fsdp=4),
        "replicas over there": tree(whole, second, data=4),
        "both": tree(split, devices, fsdp=4, tensor=2),
        "both, interleaved": tree(rows, across, data=2, fsdp=4),
        "a part of each": tree(split, devices[2:6], fsdp=2, tensor=2),
        "one device": tree(whole, devices[6:7], data=1),
    }


def everything(devices):
    """Every layout to every other one."""
    found = layouts(devices)
    wanted, moves = values(), 0
    for name, old in found.items():
        for other, new in found.items():
            tree = place(wanted, old)
            moved = reshard(tree, new, donate=moves % 2 == 0, budget_bytes=2**10 if moves % 3 else 2**28)
            check(moved, wanted)
            assert jax.tree.map(lambda x: x.sharding, moved) == new, (name, other)
            moves += 1
    return {"moves": moves}


def quick(devices):
    """Once there and back, repeated; what is refused; bytes that go between the processes."""
    found = layouts(devices)
    wanted = values()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    there = Reshard(abstract, found["one process"], found["replicas over there"])
    back = Reshard(abstract, found["replicas over there"], found["one process"], donate=True)
    tree = place(wanted, found["one process"])
    for _ in range(3):
        moved = there.run(tree)
        check(moved, wanted)
        tree = back.run(moved)
        check(tree, wanted)
    size = sum(x.nbytes for x in jax.tree.leaves(wanted))
    assert there.predicted.crossing_bytes == size, (there.predicted, size)
    assert there.predicted.sent_bytes == 4 * size
    device = Reshard(abstract, found["one process"], found["the other"], method="device", budget_bytes=512)
    check(device.run(place(wanted, found["one process"])), wanted)
    # A move within one process needs nobody else.
    if jax.process_index() == 0:
        mine = place({"x": np.ones((8, 8), np.float32)}, {"x": on(devices[:4], P(FSDP), fsdp=4)})
        check(reshard(mine, on(devices[1:3], P(None, TENSOR), tensor=2)), {"x": np.ones((8, 8), np.float32)})
    # Not the same move on both.
    target = found["the other"] if jax.process_index() else found["replicas over there"]
    try:
        reshard(place(wanted, found["one process"]), target)
    except ReshardError as error:
        return {"crossing": there.predicted.crossing_bytes, "error": str(error)}
    return {"error": ""}


def dies(devices):
    """Process 1 ends in the middle of a run; process 0 must say so."""
    found = layouts(devices)
    move = Reshard(values(), found["one process"], found["the other"])
    move.run(place(values(), found["one process"]))
    if jax.process_index() == 1:
        sys.stdout.flush()
        os._exit(3)
    begin = time.monotonic()
    try:
        for _ in range(100):
            move.run(place(values(), found["one process"]))
            time.sleep(0.05)
    except ReshardError as error:
        return {"error": str(error), "seconds": time.monotonic() - begin}
    return {"error": ""}


def stands_still(devices):
    """Process 1 does not come."""
    found = layouts(devices)
    move = Reshard(values(), found["one process"], found["the other"], deadline_seconds=2)
    move.run(place(values(), found["one process"]))
    if jax.process_index() == 1:
        time.sleep(6)
        return {"error": "none", "seconds": 0}
    begin = time.monotonic()
    try:
        move.run(place(values(), found["one process"]))
    except ReshardError as error:
        return {"error": str(error), "seconds": time.monotonic() - begin}
    return {"error": ""}


def main() -> None:
    process, port, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
    result = {"everything": everything, "quick": quick, "dies": dies, "stands_still": stands_still}[what](jax.devices())
    print("RESULT", json.dumps(result), flush=True)
    os._exit(0)  # the shutdown of jax.distributed would wait for a process that is gone


if __name__ == "__main__":
    main()
