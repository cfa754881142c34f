"""What pinning intermediates buys, by the TPU compiler: temporaries and collectives with and without.

    python benchmarks/pinning.py [--svg docs/pinning.svg]      under a minute

It needs the tpu-aot extra (`pip install -e '.[tpu-aot]'`) and no TPU.

A Llama-like decoder (4 scanned layers, d_model 4096, 32 heads, 8 kv heads, batch 16, length 2048) is laid out for v5e
4x4 as fsdp 4 x tensor 4. Without pins only the parameters and the batch are split, as rule-based tools do.

Bars: with pins no collective moves an activation of the whole batch, and temporaries are at most half of those without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import platform
import sys
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import tpu_compile  # noqa: E402

BATCH, LENGTH, LAYERS = 16, 2048, 4
TOPOLOGY, ACCELERATOR = "v5e:4x4", "v5litepod-16"
PRESETS = {"without pins": "fsdp+megatron", "pinned": "fsdp+megatron", "pinned, sequence": "fsdp+megatron+sequence"}
MOST_TEMP_RATIO = 0.5


def child(variant: str) -> None:
    """Lower and compile one variant; ended by the parent when the buffers are assigned."""
    import jax
    import zoo
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding_rules import MeshShape, make_layout, make_mesh, trace

    loss, params, batch = zoo.llama_pinning(BATCH, LENGTH, LAYERS)
    traced = trace(loss, params, batch, names=("params", "batch"))
    layout = make_layout(traced, MeshShape(fsdp=4, tensor=4), PRESETS[variant])
    mesh = make_mesh(layout.mesh_shape, topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)
    fn = loss if variant == "without pins" else layout.pin(mesh)

    def shardings(name: str):
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), layout.specs(name), is_leaf=lambda x: isinstance(x, PartitionSpec)
        )

    def step(params, batch):
        value, gradients = jax.value_and_grad(fn)(params, batch)
        return value, jax.tree.map(lambda p, g: p - 1e-4 * g, params, gradients)

    at_rest = shardings("params")
    compiled = jax.jit(
        step, in_shardings=(at_rest, shardings("batch")), out_shardings=(None, at_rest), donate_argnums=0
    )
    print("argument_bytes", layout.bytes_per_device("params") + layout.bytes_per_device("batch"), flush=True)
    compiled.lower(params, batch).compile()


def moves_whole_batch(collective: tpu_compile.Collective) -> bool:
    """Whether a collective's result has the whole batch and more than one number per token."""
    for shape in collective.shapes.split():
        dims = [int(n) for n in shape.partition("[")[2].rstrip("]").split(",") if n]
        tokens = (BATCH in dims and LENGTH in dims) or BATCH * LENGTH in dims
        if tokens and math.prod(dims) > BATCH * LENGTH:
            return True
    return False


def draw(results: dict[str, dict[str, float]]) -> str:
    """Two groups of bars as a self-contained SVG."""
    panels = {
        "temp_mb": "temporaries, MB per device",
        "collective_result_mb_per_step": "results of collectives, MB per step",
    }
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="170" font-family="sans-serif" font-size="13">',
        '<rect width="760" height="170" fill="white"/>',
    ]
    for panel, (key, title) in enumerate(panels.items()):
        left, most = 20 + 380 * panel, max(r[key] for r in results.values())
        parts.append(f'<text x="{left}" y="24" font-weight="bold">{title}</text>')
        for i, (variant, result) in enumerate(results.items()):
            y, width = 40 + 42 * i, 170 * result[key] / most
            colour = "#b0b0b0" if variant == "without pins" else "#2a6fbb"
            parts.append(f'<text x="{left}" y="{y + 19}">{variant}</text>')
            parts.append(f'<rect x="{left + 120}" y="{y}" width="{width:.0f}" height="28" fill="{colour}"/>')
            parts.append(f'<text x="{left + 126 + width:.0f}" y="{y + 19}">{result[key]:,}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(svg: str | None) -> int:
    results = {}
    for variant in PRESETS:
        report = tpu_compile.run_child(
            __file__, ["--variant", variant], accelerator_type=ACCELERATOR, limit_seconds=300
        )
        moved = sum(c.result_bytes * (LAYERS if c.in_loop else 1) for c in report.collectives)
        whole = [c for c in report.collectives if moves_whole_batch(c)]
        results[variant] = {
            "temp_mb": round((report.total_bytes - report.argument_bytes) / 1e6),
            "argument_mb": round(report.argument_bytes / 1e6),
            "collective_result_mb_per_step": round(moved / 1e6),
            "whole_batch_collectives": len(whole),
            "compile_seconds": round(report.seconds, 1),
        }
        print(f"\n{variant}: temporaries {results[variant]['temp_mb']:,} MB, collectives (in a loop: once per layer):")
        kinds = Counter((c.in_loop, c.kind, c.shapes, c.result_bytes) for c in report.collectives)
        for (in_loop, kind, shapes, size), count in sorted(kinds.items(), key=lambda item: -item[0][3])[:12]:
            where = "loop" if in_loop else "once"
            print(f"  {where}  {count} x {kind:18} {shapes[:70]:70} {size / 1e6:8.1f} MB")
    if svg is not None:
        pathlib.Path(svg).write_text(draw(results))
    ratio = results["pinned"]["temp_mb"] / results["without pins"]["temp_mb"]
    passed = ratio <= MOST_TEMP_RATIO and results["pinned"]["whole_batch_collectives"] == 0
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "pinning",
                "topology": TOPOLOGY,
                "label": "compiled",
                "machine": platform.processor() or "cpu",
                "results": results,
                "temp_ratio": round(ratio, 3),
                "bar": MOST_TEMP_RATIO,
                "passed": passed,
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=PRESETS)
    parser.add_argument("--svg", metavar="FILE", help="also draw the figures")
    arguments = parser.parse_args()
    if os.environ.get(tpu_compile.CHILD):
        child(arguments.variant)
    else:
        sys.exit(main(arguments.svg))
