"""Bytes per device of a training step: the analytic count against the TPU compiler's, over models and plans.

    python benchmarks/memory_analytic.py [--only NAME ...]        some minutes

It needs the tpu-aot extra (`pip install -e '.[tpu-aot]'`) and no TPU. The step is the trainer's own, with Adam and
float32 parameters, compiled for v5e 2x4.

Bars: mean absolute error 8 %, no case more than 5 % under what the compiler needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import tpu_compile  # noqa: E402

TOPOLOGY, ACCELERATOR = "v5e:2x4", "v5litepod-8"
MOST_ERROR, MOST_UNDER = 0.08, 0.05
LLAMA = {"vocab": 32768, "embed": 2048, "layers": 4, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp": 8192}
LLAMA |= {"length": 2048}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model under one plan."""

    model: str
    mesh: str
    preset: str
    remat: str = "none"
    microbatches: int = 1
    batch: int = 16
    layers: int = 4


CASES = {
    "scan data none": Case("scanned", "data=8", "data", batch=8),
    "scan data full": Case("scanned", "data=8", "data", "full"),
    "scan fsdp full": Case("scanned", "fsdp=8", "fsdp", "full", layers=8, batch=32),
    "scan fsdp dots": Case("scanned", "fsdp=8", "fsdp", "dots", layers=8, batch=32),
    "scan fsdp none": Case("scanned", "fsdp=8", "fsdp", batch=16),
    "scan tensor dots": Case("scanned", "fsdp=2,tensor=4", "fsdp+megatron", "dots", layers=8),
    "scan sequence full": Case("scanned", "fsdp=2,tensor=4", "fsdp+megatron+sequence", "full", layers=8, batch=32),
    "scan microbatches": Case("scanned", "fsdp=8", "fsdp", "full", 4, layers=8, batch=64),
    "scan data microbatches": Case("scanned", "data=8", "data", "dots", 2, batch=32),
    "scan tensor microbatches": Case("scanned", "fsdp=2,tensor=4", "fsdp+megatron", "full", 4, layers=8, batch=32),
    "unrolled microbatches": Case("unrolled", "fsdp=8", "fsdp", "full", 2, batch=32),
    "unrolled data none": Case("unrolled", "data=8", "data", "none", batch=16),
    "unrolled fsdp none": Case("unrolled", "fsdp=8", "fsdp", batch=16),
    "unrolled fsdp full": Case("unrolled", "fsdp=8", "fsdp", "full", batch=32),
    "unrolled tensor dots": Case("unrolled", "fsdp=2,tensor=4", "fsdp+megatron", "dots", batch=16),
    "moe fsdp full": Case("moe", "fsdp=8", "fsdp", "full", batch=16),
}
HELD_OUT = {
    "wide tensor full": Case("wide", "fsdp=4,tensor=2", "fsdp+megatron", "full", batch=8, layers=2),
    "wide fsdp dots": Case("wide", "fsdp=8", "fsdp", "dots", 2, batch=16, layers=2),
    "short mixed none": Case("short", "data=2,fsdp=2,tensor=2", "fsdp+megatron", batch=64, layers=6),
    "short sequence dots": Case("short", "fsdp=4,tensor=2", "fsdp+megatron+sequence", "dots", 2, batch=128, layers=6),
    "unrolled mixed dots": Case("unrolled", "data=2,fsdp=4", "fsdp", "dots", batch=16, layers=6),
    "moe data full": Case("moe", "data=8", "data", "full", 2, batch=16, layers=2),
    "short unrolled full": Case("short unrolled", "fsdp=2,tensor=4", "fsdp+megatron", "full", 2, batch=128, layers=6),
    "short unrolled none": Case("short unrolled", "fsdp=4,tensor=2", "fsdp+megatron", batch=32),
    "wide sequence dots": Case("wide", "fsdp=4,tensor=2", "fsdp+megatron+sequence", "dots", batch=8, layers=2),
    "wide data2 full": Case("wide", "data=2,fsdp=4", "fsdp", "full", batch=16, layers=2),
}
"""Of other sizes than those by which the rules of `search.resident` were found; "unrolled mixed dots" found one."""
SIZES = {
    "wide": {"vocab": 128256, "embed": 4096, "heads": 32, "mlp": 14336, "length": 4096},
    "short": {"vocab": 50304, "length": 512, "heads": 32, "kv_heads": 32, "head_dim": 64},
}
SIZES["short unrolled"] = SIZES["short"]


def model_of(case: Case) -> tuple[Any, Any, Any]:
    """(loss, init, abstract batch) of a case."""
    import jax
    import jax.numpy as jnp

    if case.model == "moe":
        return moe(case)
    from zoo import llama

    shapes = llama.Shapes(**{**LLAMA, **SIZES.get(case.model, {}), "layers": case.layers})
    init = llama.init_unrolled if case.model.endswith("unrolled") else llama.init_scanned
    tokens = jax.ShapeDtypeStruct((case.batch, shapes.length), jnp.int32)

    def loss(params: Any, batch: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return llama.forward_loss(params, batch, shapes, dtype=jnp.bfloat16)

    return loss, lambda rng: init(rng, shapes), {"s": tokens, "t": tokens}


def moe(case: Case) -> tuple[Any, Any, Any]:
    """Scanned layers of attention and eight experts, two per token, by sorting and `ragged_dot`."""
    import jax
    import jax.numpy as jnp
    from zoo import base, gpt

    vocab, embed, heads, head_dim, experts, hidden, top, length = 32768, 1024, 8, 128, 8, 2048, 2, 2048
    layer = {"n": base.g(embed), **{k: base.w(embed, heads * head_dim) for k in "qkv"}}
    layer |= {"o": base.w(heads * head_dim, embed), "m": base.g(embed), "r": base.w(embed, experts)}
    layer |= {"a": base.w(experts, embed, hidden), "b": base.w(experts, hidden, embed)}

    def init(rng: Any) -> Any:
        keys = jax.random.split(rng, case.layers)
        layers = jax.vmap(lambda key: base.draw(key, layer, jnp.float32))(keys)
        return {"l": layers, **base.draw(rng, {"t": base.table(vocab, embed), "f": base.w(embed, vocab)}, jnp.float32)}

    def block(x_BLD: Any, p: Any) -> tuple[Any, None]:
        p = jax.tree.map(lambda leaf: leaf.astype(x_BLD.dtype), p)
        B, L, D = x_BLD.shape
        h = base.rms_norm(x_BLD, p["n"])
        q, k, v = ((h @ p[name]).reshape(B, L, heads, head_dim) for name in "qkv")
        x_BLD = x_BLD + gpt.causal_attention(q, k, v).reshape(B, L, heads * head_dim) @ p["o"]
        x_TD = base.rms_norm(x_BLD, p["m"]).reshape(-1, D)
        gates_TE = jax.nn.softmax((x_TD @ p["r"]).astype(jnp.float32), axis=-1)
        top_TJ, index_TJ = jax.lax.top_k(gates_TE, top)
        order = jnp.argsort(index_TJ.reshape(-1))
        counts = jnp.bincount(index_TJ.reshape(-1), length=experts)
        h = jax.nn.silu(jax.lax.ragged_dot(x_TD[order // top], p["a"], counts))
        h = jax.lax.ragged_dot(h, p["b"], counts)
        y = jnp.zeros_like(h).at[order].set(h).reshape(-1, top, D)
        return x_BLD + jnp.einsum("tj,tjd->td", top_TJ.astype(x_TD.dtype), y).reshape(B, L, D), None

    def loss(params: Any, batch: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            x, _ = jax.lax.scan(block, params["t"].astype(jnp.bfloat16)[batch["s"]], params["l"])
            return base.cross_entropy(x @ params["f"].astype(jnp.bfloat16), batch["t"])

    tokens = jax.ShapeDtypeStruct((case.batch, length), jnp.int32)
    return loss, init, {"s": tokens, "t": tokens}


def child(name: str) -> None:
    """Lower and compile one case; ended by the parent when the buffers are assigned."""
    import jax
    import optax
    from jax.experimental import topologies

    from pipelines import build_train_program
    from search import Plan
    from sharding_rules import MeshShape, make_mesh

    case = (CASES | HELD_OUT)[name]
    loss, init, batch = model_of(case)
    mesh_shape = MeshShape.parse(case.mesh)
    plan = Plan(mesh_shape, case.preset, (), case.microbatches, case.remat)  # type: ignore[arg-type]
    mesh = make_mesh(mesh_shape, topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)
    program = build_train_program(loss, init, optax.adam(1e-3), batch, plan, mesh)
    arguments = [program.abstract_state, jax.tree.map(_placed, batch, program.batch_shardings)]
    print("argument_bytes", sum(_local_bytes(leaf) for leaf in jax.tree.leaves(arguments)), flush=True)
    _ = program.compiled_bytes_per_device


def _placed(leaf: Any, sharding: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _local_bytes(leaf: Any) -> int:
    from search.liveness import itemsize

    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize(leaf.dtype)


def analytic(case: Case) -> dict[str, int]:
    """Bytes by part."""
    import jax
    import optax
    from zoo import base

    from search.memory import ActivationMemory, splits_of, step_bytes
    from sharding_rules import MeshShape, make_layout, trace

    loss, init, batch = model_of(case)
    params = jax.eval_shape(init, base.abstract_key())
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    mesh = MeshShape.parse(case.mesh)
    layout = make_layout(trace(loss, params, batch, names=("params", "batch")), mesh, case.preset)
    kept = step_bytes(layout, state, remat=case.remat, microbatches=1)
    memory = ActivationMemory(layout.traced, layout, (case.remat,))  # type: ignore[arg-type]
    found = memory.bytes(splits_of(layout), case.remat, case.microbatches, mesh.fsdp)
    parts = {"params": kept.params, "gradients": kept.gradients, "optimizer": kept.optimizer}
    parts |= {name: int(getattr(found, name)[0]) for name in ("layers", "outside", "transient", "gathered")}
    return parts | {"batch": layout.bytes_per_device("batch")}


def _mean(errors: list[float]) -> float:
    return sum(abs(e) for e in errors) / max(1, len(errors))


def main(only: list[str]) -> int:
    results = {}
    for name, case in (CASES | HELD_OUT).items():
        if only and name not in only:
            continue
        parts = analytic(case)
        report = tpu_compile.run_child(__file__, ["--case", name], accelerator_type=ACCELERATOR, limit_seconds=400)
        counted = sum(parts.values())
        error = counted / report.total_bytes - 1
        results[name] = {"analytic": counted, "compiled": report.total_bytes, "error": round(error, 4), **parts}
        shown = " ".join(f"{part} {size / 2**20:,.0f}" for part, size in parts.items() if size > 2**19)
        print(
            f"{name:24} analytic {counted / 2**20:9,.0f}  compiled {report.total_bytes / 2**20:9,.0f} MiB  {error:+.1%}"
            f"   ({shown}; arguments {report.argument_bytes / 2**20:,.0f}, {report.seconds:.0f} s)",
            flush=True,
        )
    errors = [r["error"] for r in results.values()]
    mean = _mean(errors)
    held_out = _mean([r["error"] for name, r in results.items() if name in HELD_OUT])
    passed = mean <= MOST_ERROR and min(errors) >= -MOST_UNDER
    # The share of memory at which no plan that counts as fitting would not fit.
    share = 1 / max(r["compiled"] / r["analytic"] for r in results.values())
    print(
        json.dumps(
            {
                "benchmark": "memory_analytic",
                "topology": TOPOLOGY,
                "labels": {"analytic": "analytic", "compiled": "compiled"},
                "machine": platform.processor() or "cpu",
                "results": results,
                "mean_absolute_error": round(mean, 4),
                "mean_absolute_error_held_out": round(held_out, 4),
                "most_under": round(min(errors), 4),
                "share_without_false_fits": round(share, 3),
                "bars": {"mean_absolute_error": MOST_ERROR, "most_under": MOST_UNDER},
                "passed": passed,
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES | HELD_OUT)
    parser.add_argument("--only", nargs="*", default=[], help="some cases")
    arguments = parser.parse_args()
    if os.environ.get(tpu_compile.CHILD):
        child(arguments.case)
    else:
        sys.exit(main(arguments.only))
