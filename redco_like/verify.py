"""Compile the step of a plan for its cluster with none of its devices, and say what the compiler found.

    verified = verify(plan, problem, cluster, model)       # in a child process; seconds to minutes
    verified.fits, verified.bytes, verified.warnings

The compilers are extras: `pip install 'redco-like[tpu-aot]'` for TPUs, `'redco-like[gpu-aot]'` for NVIDIA GPUs. What
was found is kept in a folder (`search.compiler.Cache`), by plan, problem, cluster, versions of the compilers and this
program's own source.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from search import Cluster, Plan
from search.compiler import Cache, compile_in_child
from search.space import Model
from search.topology import target_of, toolchain
from search.verify import Verification, verification
from sharding_rules import PlanError

PACKAGES = ("sharding_rules", "search", "pipelines", "redco_like")
CHILD = "redco_like.compile_step"
COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""What of the environment changes what a compiler makes."""
PROBLEM = ("model", "seq_len", "global_batch", "optimizer", "dtype", "param_dtype", "task")
"""What of a problem's record decides the step."""
Depth = Literal["fast", "full"]


def verify(
    plan: Plan,
    record: Mapping[str, Any],
    cluster: Cluster,
    model: Model,
    *,
    depth: Depth = "fast",
    limit_seconds: float = 1800,
    limit_bytes: float = 16 * 2**30,
    cache: Cache | None = None,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Compile a plan's step and hold it against the plan's estimate.

    Args:
        plan: what to compile; what the step cannot run yet (`Plan.planned`) cannot be compiled either.
        record: the problem, as `redco_like.problem.load_problem` takes it, with the model's file by absolute path.
        cluster: what to compile for.
        model: the problem as the planner sees it, on the same cluster.
        depth: "fast" stops when the buffers have their places, which is when memory, collectives and schedule are
            known; "full" also makes the code. Compiles for GPUs are always full.
        limit_seconds, limit_bytes: what the child may take; memory is that of all its processes.
        cache: where results are kept; default the user's.
        fresh: compile even where a result is kept.
        tell: is told what is being done.

    Raises:
        PlanError: the plan cannot be compiled.
        ValueError: the cluster is none that can be compiled for.
        CompileFailed: no toolchain, a limit, a killed child, a full disk, an error of the compiler; one clear line.
    """
    if plan.planned:
        raise PlanError(
            f"the plan has {', '.join(plan.planned)}, which the step cannot run yet: there is nothing to compile; "
            "plan again without --allow-planned"
        )
    target = target_of(cluster)
    versions = toolchain(target)
    bare = dataclasses.replace(plan, reason="", estimate=None, problem={})
    request = {
        "plan": bare.to_json(),
        "cluster": cluster.to_json(),
        "problem": {name: record[name] for name in PROBLEM if record.get(name) is not None},
    }
    cache = Cache() if cache is None else cache
    key = {**request, "target": str(target), "versions": versions, "depth": depth, "source": source_digest()}
    key["environment"] = {name: os.environ[name] for name in COMPILER_VARIABLES if name in os.environ}
    path = pathlib.Path(str(record["model"]))
    if path.is_file():
        key["model_file"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if not fresh and (kept := cache.get(key)) is not None:
        try:
            return Verification.from_record(kept)
        except (ValueError, TypeError):  # of another version
            pass
    compiled = compile_in_child(
        CHILD, request, target, depth=depth, limit_seconds=limit_seconds, limit_bytes=int(limit_bytes), tell=tell
    )
    tell("reading the compiled program")
    usable = int(cluster.accelerator.usable_memory_bytes)
    found = verification(compiled, model, plan, target=str(target), versions=versions, usable_bytes=usable)
    cache.put(key, found.to_record())
    return found


@functools.cache
def source_digest() -> str:
    """A digest of the source of this program, on which the compiled step depends."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in sorted(spec.submodule_search_locations or () if spec else ()):
            for path in sorted(pathlib.Path(folder).rglob("*")):
                if path.suffix in (".py", ".toml", ".txtpb"):
                    digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
