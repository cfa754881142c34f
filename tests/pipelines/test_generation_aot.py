"""What the TPU compiler makes of generation, with no TPU: the cache stays where it is, and nothing of it is sent."""

import math
import pathlib
import re
import sys

import pytest

from search import hlo, parse_cluster
from search.compiler import compile_in_child
from search.topology import ToolchainMissing, target_of, toolchain
from sharding_rules import MeshShape

CLUSTER = "v5e:2x4"
REQUEST = {"model": "llama-3-8b", "cluster": CLUSTER, "rows": 16, "length": 8192, "reach": 2048, "tokens": 256}


@pytest.mark.aot
@pytest.mark.parametrize("program", ["up to 8 steps", "reading"])
@pytest.mark.parametrize("mesh, preset", [("data=2,tensor=4", "data+megatron"), ("tensor=8", "megatron")])
def test_the_cache_of_an_8b_model_is_written_in_place_and_not_sent(monkeypatch, program, mesh, preset):
    target = target_of(parse_cluster(CLUSTER))
    try:
        toolchain(target)
    except ToolchainMissing as error:
        pytest.skip(str(error))
    monkeypatch.setattr(sys, "path", [str(pathlib.Path(__file__).parent), *sys.path])
    request = {**REQUEST, "program": program, "mesh": mesh, "preset": preset}
    compiled = compile_in_child("generation_child", request, target, limit_seconds=600)
    assert not compiled.out_of_memory
    said, module = compiled.said, hlo.parse(compiled.hlo)
    shapes = {tuple(shape) for shape in said["cache_shapes"].values()}
    [shape] = shapes

    # Every array of the cache is an argument and, in its place, a result.
    entry = compiled.hlo[compiled.hlo.index("ENTRY ") :]
    text = ",".join(map(str, shape))
    ours = set(re.findall(rf"bf16\[{text}\]\S* parameter\((\d+)\), sharding", entry))
    header = compiled.hlo[: compiled.hlo.index("entry_computation_layout")]
    aliased = set(re.findall(r"\((\d+), \{\}, (?:may|must)-alias\)", header))
    assert len(ours) == len(said["cache_shapes"])
    assert ours <= aliased
    assert 2 * 2 * math.prod(shape) == said["cache_bytes"]

    # It is nowhere else: no copy, and what is left of the memory beside parameters and cache is small.
    assert not re.findall(rf"= bf16\[{text}\]\S* copy(?:-start)?\(", compiled.hlo)
    match = re.search(r"Total bytes: (\d+)", compiled.memory_report)
    assert match
    rest = int(match[1]) - said["cache_bytes"] - said["params_bytes"]
    assert 0 <= rest < said["cache_bytes"] / 10

    # Nothing that moves is as large as what one layer holds of the cache.
    moved = hlo.collectives(module, MeshShape.parse(mesh))
    assert moved
    layer = said["cache_bytes"] / 2 / shape[0]
    assert [c for c in moved if c.bytes > layer / 2] == []
