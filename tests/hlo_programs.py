"""Small Llamas and attention kernels as the compilers for TPUs and GPUs made them, stored in `tests/search/hlo`.

    read_case("v5e_fsdp")                             # the text
    python tests/hlo_programs.py [NAME ...]           # compile them again; needs the extras tpu-aot and gpu-aot

Every program is a step of gradient descent of a loss under a plan; no TPU and no GPU is needed. TPU programs are as
they were when their buffers were assigned.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

TESTS = pathlib.Path(__file__).resolve().parent
TEXTS = TESTS / "search" / "hlo"

LEARNING_RATE = 0.1
SMALL = {
    "vocab": 2048,
    "embed": 512,
    "layers": 3,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "mlp": 1024,
    "length": 256,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program: a cluster as `search.cluster` names it, a plan, a model, `wide` times as wide; compiler options.

    Not `pinned`, the partitioner decides where parameters are gathered.
    """

    cluster: str
    mesh: str
    preset: str
    model: str = "scanned"
    remat: str = "none"
    microbatches: int = 1
    batch: int = 16
    length: int = 256
    wide: int = 1
    pinned: bool = True
    options: tuple[tuple[str, str], ...] = ()


WINDOWED = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", "0"),)
CASES = {
    "v5e_fsdp": Case("v5e:2x4", "fsdp=8", "fsdp", remat="full"),
    "v5e_fsdp_unrolled": Case("v5e:2x4", "fsdp=8", "fsdp", "unrolled", remat="full"),
    "v5e_windowed": Case("v5e:4x4", "fsdp=16", "fsdp", batch=32, wide=4, pinned=False),
    "v5e_sequence": Case("v5e:2x4", "fsdp=2,tensor=4", "fsdp+megatron+sequence", remat="dots"),
    "v5e_microbatches": Case("v5e:2x4", "fsdp=8", "fsdp", microbatches=4, batch=32),
    "v5e_splash": Case("v5e:2x4", "data=2,context=2,tensor=2", "megatron", "attention", length=1024),
    "v5p_fsdp64": Case("v5p:4x4x4", "fsdp=64", "fsdp", batch=64, wide=4, pinned=False),
    "v5e_slices": Case("2*v5e:2x4", "data=2,fsdp=8", "fsdp"),
    "h100_fsdp": Case("8xH100", "fsdp=8", "fsdp", remat="full"),
    "h100_fsdp_unrolled": Case("8xH100", "fsdp=8", "fsdp", "unrolled", remat="full"),
    "h100_sequence": Case("8xH100", "fsdp=2,tensor=4", "fsdp+megatron+sequence", remat="dots"),
    "h100_microbatches": Case("8xH100", "fsdp=8", "fsdp", microbatches=4, batch=32),
    "h100_triton": Case("8xH100", "data=4,tensor=2", "megatron", "attention", length=1024),
}


def model_of(case: Case) -> tuple[Any, Any, Any]:
    """(loss, abstract parameters, abstract batch)."""
    import jax
    import jax.numpy as jnp
    from zoo import base, llama

    if case.model == "attention":
        return attention_model(case)
    wide = {name: SMALL[name] * case.wide for name in ("embed", "heads", "kv_heads", "mlp")}
    shapes = llama.Shapes(**{**SMALL, **wide, "length": case.length})
    init = llama.init_unrolled if case.model == "unrolled" else llama.init_scanned
    tokens = jax.ShapeDtypeStruct((case.batch, shapes.length), jnp.int32)

    def loss(params: Any, batch: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return llama.forward_loss(params, batch, shapes, dtype=jnp.bfloat16)

    return loss, jax.eval_shape(functools.partial(init, s=shapes), base.abstract_key()), {"s": tokens, "t": tokens}


def attention_model(case: Case) -> tuple[Any, Any, Any]:
    """Causal attention of 8 heads and 4 kv heads of 128, between projections."""
    import jax
    import jax.numpy as jnp

    from sharding_rules import attention

    embed, heads, kv_heads, head_dim = 512, 8, 4, 128
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    params = {name: jax.ShapeDtypeStruct((embed, n * head_dim), jnp.bfloat16) for name, n in sizes.items()}
    params["o"] = jax.ShapeDtypeStruct((heads * head_dim, embed), jnp.bfloat16)

    def loss(params: Any, batch: Any) -> Any:
        B, L, _ = batch.shape
        q, k, v = ((batch @ params[name]).reshape(B, L, n, head_dim) for name, n in sizes.items())
        mixed = attention(q, k, v, causal=True, scale=head_dim**-0.5)
        return jnp.square((mixed.reshape(B, L, -1) @ params["o"]).astype(jnp.float32)).mean()

    return loss, params, jax.ShapeDtypeStruct((case.batch, case.length, embed), jnp.bfloat16)


def layout_of(case: Case) -> Any:
    """The loss under the case's plan."""
    from sharding_rules import MeshShape, make_layout, trace

    loss, params, batch = model_of(case)
    if case.microbatches > 1:
        import jax

        smaller = lambda x: jax.ShapeDtypeStruct((x.shape[0] // case.microbatches, *x.shape[1:]), x.dtype)  # noqa: E731
        batch = jax.tree.map(smaller, batch)
    traced = trace(loss, params, batch, names=("params", "batch"))
    return make_layout(traced, MeshShape.parse(case.mesh), case.preset)


def child(case: Case) -> None:
    """Compile a case; on TPUs ended by the parent when the buffers are assigned."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pipelines.kernels import kernels_for
    from search.cluster import parse_cluster
    from search.topology import open_devices, target_of
    from sharding_rules.mesh import AXES, MeshShape

    devices = open_devices(target_of(parse_cluster(case.cluster)))
    sizes = MeshShape.parse(case.mesh).sizes
    mesh = Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    layout = layout_of(case)
    loss = layout.pin(mesh, case.remat, kernels_for("fused", mesh)) if case.pinned else model_of(case)[0]
    n = case.microbatches

    def step(params: Any, batch: Any) -> Any:
        if n == 1:
            _, total = jax.value_and_grad(loss)(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)
            zeros = jax.tree.map(jnp.zeros_like, params)
            add = lambda total, part: jax.tree.map(jnp.add, total, jax.grad(loss)(params, part))  # noqa: E731
            total, _ = jax.lax.scan(lambda total, part: (add(total, part), None), zeros, parts)
        return jax.tree.map(lambda p, g: (p - LEARNING_RATE * g).astype(p.dtype), params, total)

    def placed(name: str) -> Any:
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout.specs(name), is_leaf=is_spec)

    _, params, batch = model_of(case)
    shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    arguments = jax.tree.map(shaped, params, placed("params")), jax.tree.map(shaped, batch, placed("batch"))
    lowered = jax.jit(step, donate_argnums=0, out_shardings=placed("params")).lower(*arguments)
    compiled = lowered.compile(compiler_options=dict(case.options))
    pathlib.Path(os.environ["HLO_OUT"]).write_text(compiled.as_text() or "")


def compile_case(name: str) -> str:
    """The text of a case."""
    from search.cluster import parse_cluster
    from search.topology import environment, target_of

    target = target_of(parse_cluster(CASES[name].cluster))
    with tempfile.TemporaryDirectory(prefix="hlo-") as folder:
        out = pathlib.Path(folder, "out.txt")
        env = os.environ | environment(target) | {"HLO_OUT": str(out), "PYTHONSAFEPATH": "1"}
        if target.platform == "tpu":
            env["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        process = subprocess.Popen([sys.executable, __file__, "--child", name], env=env)
        try:
            while process.poll() is None:
                found = list(pathlib.Path(folder).glob("*jit_step*after_optimizations_after_buffer_assignment.txt"))
                if found and found[0].read_text().rstrip().endswith("}"):
                    return found[0].read_text()
                time.sleep(0.2)
            if process.returncode:
                raise RuntimeError(f"{name}: the compiling child ended with {process.returncode}")
            return out.read_text()
        finally:
            process.kill()
            process.wait()


def read_case(name: str) -> str:
    """The stored text of a case."""
    return gzip.decompress((TEXTS / f"{name}.txt.gz").read_bytes()).decode()


def main(names: list[str]) -> None:
    for name in names or CASES:
        text = compile_case(name)
        (TEXTS / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(json.dumps({"name": name, "characters": len(text)}), flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    if sys.argv[1:2] == ["--child"]:
        child(CASES[sys.argv[2]])
    else:
        main(sys.argv[1:])
