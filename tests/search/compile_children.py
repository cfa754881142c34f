"""Children for the tests of `search/compiler.py`, chosen by `request["do"]`; all but "step" need no compiler.

compile_in_child("search_children", {"do": "sleep"}, target)
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

HLO = "HloModule jit_step, is_scheduled=true\n\nENTRY %main () -> f32[] {\n  ROOT %c = f32[] constant(1)\n}\n"


def tell(event, **what):
    print(json.dumps({"event": event, **what}), flush=True)


def dump(text=HLO, *, module="module_0007.jit_step.cl_1", pause=0.0):
    """Write what libtpu writes, in its order; `pause` seconds lie between the two halves of the module."""
    folder = pathlib.Path(re.findall(r'--xla_dump_to="(.*?)"', os.environ["XLA_FLAGS"])[-1])
    (folder / f"{module}.before_optimizations.txt").write_text("HloModule jit_step")
    (folder / f"{module}.after_optimizations-memory-usage-report.txt").write_text("Total bytes: 12")
    with open(folder / f"{module}.after_optimizations_after_buffer_assignment.txt", "w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        time.sleep(pause)
        file.write(text[len(text) // 2 :])


def step(request):
    """Compile a small sharded step for the cluster of the request, as the real child does."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from search.cluster import Cluster
    from search.topology import open_devices, target_of
    from sharding_rules import MeshShape, make_mesh

    devices = open_devices(target_of(Cluster.from_json(request["cluster"])))
    mesh = make_mesh(MeshShape(data=len(devices) // request["tensor"], tensor=request["tensor"]), devices)

    def other(x):
        return x + 1

    def step(w, x):
        return (jnp.tanh(x @ w).astype(jnp.float32) ** 2).mean()

    def of(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    rows, width = request["rows"], request["width"]
    jax.jit(other).lower(of((width, width))).compile()
    lowered = jax.jit(jax.value_and_grad(step)).lower(of((width, width), "data", "tensor"), of((rows, width), "data"))
    tell("lowered", devices=[[d.id, list(d.coords)] for d in mesh.devices.flat])
    analysis = lowered.compile().memory_analysis()
    tell("compiled", memory={"argument": analysis.argument_size_in_bytes, "temp": analysis.temp_size_in_bytes})


def main(path):
    request = json.loads(pathlib.Path(path).read_text())
    do = request["do"]
    print("not an event", [1], "\n3\n", flush=True)
    tell("opening", pid=os.getpid(), folder=str(pathlib.Path(path).parent), flags=os.environ["XLA_FLAGS"])
    if "note" in request:  # where the test looks while it waits, or once this process is gone
        pathlib.Path(request["note"]).write_text(json.dumps([os.getpid(), str(pathlib.Path(path).parent)]))
    if do == "step":
        step(request)
    elif do == "dump":
        dump(HLO.replace("jit_step", "jit_other"), module="module_0009.jit_other.cl_1")
        dump(pause=request.get("pause", 0.0))
        tell("lowered", arguments=5)
        time.sleep(request.get("sleep", 0))
        tell("compiled", memory={"temp": 3})
    elif do == "sleep":
        tell("lowered")
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        tell("waiting", grandchild=grandchild.pid)
        if "note" in request:
            pathlib.Path(request["note"]).write_text(json.dumps([os.getpid(), grandchild.pid, os.path.dirname(path)]))
        time.sleep(600)
    elif do == "allocate":
        keep = [bytearray(b"x") * 2**20 for _ in range(request["mebibytes"])]
        time.sleep(600)
        print(len(keep))
    elif do == "crash":
        print("F0000 Check failed: operand_count == 1", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, request["signal"]))
        time.sleep(600)
    elif do == "raise":
        raise ValueError(request["message"])
    elif do == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device", "x.txt")
    elif do == "exit":
        print("x" * 100_000, "the last line", file=sys.stderr)
        sys.exit(request["code"])
    else:
        raise AssertionError(do)


if __name__ == "__main__":
    main(sys.argv[1])
