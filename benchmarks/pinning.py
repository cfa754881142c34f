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
import re
import sys
from collections import Counter
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
sys.path[:0] = FOLDERS

BATCH, LENGTH, LAYERS = 16, 2048, 4
TOPOLOGY = "v5e:4x4"
MESH = {"fsdp": 4, "tensor": 4}
PRESETS = {"without pins": "fsdp+megatron", "pinned": "fsdp+megatron", "pinned, sequence": "fsdp+megatron+sequence"}
MOST_TEMP_RATIO = 0.5


def child(path: str) -> None:
    """Lower and compile one variant; ended by the parent when the buffers are assigned."""
    import jax
    import zoo
    from jax.sharding import NamedSharding, PartitionSpec

    from search import parse_cluster
    from search.topology import open_devices, target_of
    from sharding_rules import MeshShape, make_layout, make_mesh, trace

    variant = json.loads(pathlib.Path(path).read_text("utf-8"))["variant"]

    loss, params, batch = zoo.llama_pinning(BATCH, LENGTH, LAYERS)
    traced = trace(loss, params, batch, names=("params", "batch"))
    layout = make_layout(traced, MeshShape(**MESH), PRESETS[variant])
    mesh = make_mesh(layout.mesh_shape, open_devices(target_of(parse_cluster(TOPOLOGY))))
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
    arguments = layout.bytes_per_device("params") + layout.bytes_per_device("batch")
    print(json.dumps({"event": "lowered", "argument_bytes": arguments}), flush=True)
    compiled.lower(params, batch).compile()


def moves_whole_batch(collective: Any) -> bool:
    """Whether a collective's result has the whole batch and more than one number per token."""
    for found in re.findall(r"\[([\d,]*)\]", collective.shapes):
        dims = [int(n) for n in found.split(",") if n]
        tokens = (BATCH in dims and LENGTH in dims) or BATCH * LENGTH in dims
        if tokens and math.prod(dims) > BATCH * LENGTH:
            return True
    return False


def draw(results: dict[str, dict[str, float]]) -> str:
    """Two groups of bars as a self-contained SVG."""
    panels = {
        "temp_mb": "temporaries, MB per device",
        "collective_mb_per_step": "payload of collectives, MB per step",
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
    from search import hlo, parse_cluster
    from search.compiler import compile_in_child
    from search.topology import target_of

    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    results = {}
    for variant in PRESETS:
        compiled = compile_in_child(
            "pinning", {"variant": variant}, target_of(parse_cluster(TOPOLOGY)), limit_seconds=300
        )
        total = re.search(r"^Memory Space: default.*\nTotal bytes:\s*(\d+)", compiled.memory_report, re.MULTILINE)
        if total is None:
            raise RuntimeError(f"the memory report has no total: {compiled.memory_report[:500]}")
        collectives = hlo.collectives(hlo.parse(compiled.hlo), MESH)
        whole = [c for c in collectives if moves_whole_batch(c)]
        arguments = compiled.said["argument_bytes"]
        results[variant] = {
            "temp_mb": round((int(total[1]) - arguments) / 1e6),
            "argument_mb": round(arguments / 1e6),
            "collective_mb_per_step": round(sum(c.bytes * c.times for c in collectives) / 1e6),
            "whole_batch_collectives": len(whole),
            "compile_seconds": round(compiled.seconds, 1),
        }
        print(f"\n{variant}: temporaries {results[variant]['temp_mb']:,} MB, collectives (executions per step):")
        kinds = Counter((c.times, c.kind, c.shapes, c.bytes) for c in collectives)
        for (times, kind, shapes, size), count in sorted(kinds.items(), key=lambda item: -item[0][3])[:12]:
            print(f"  {times:2} x  {count} x {kind:18} {shapes[:70]:70} {size / 1e6:8.1f} MB")
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
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        child(sys.argv[1])
        sys.exit()
    parser = argparse.ArgumentParser()
    parser.add_argument("--svg", metavar="FILE", help="also draw the figures")
    sys.exit(main(parser.parse_args().svg))
