"""The child process of `verify`: builds the step of a plan for devices that are not there, and compiles it.

    python -m redco_like.compile_step request.json

The request has the plan, the problem it is for and the cluster, as JSON; the problem's model is a name, a file or the
record of a `ModelConfig`. Or, in place of a problem, an execution plan of an RLHF graph, a call and its program. What
is found out is told on stdout, one JSON object per line with an `event`: `lowered` (bytes of arguments and results by
shape and sharding), then, where the compile is not ended before, `compiled` (the compiler's own memory analysis).
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

MEMORY_FIELDS = ("argument", "output", "alias", "temp", "generated_code")


def main(path: str) -> int:
    """Compile what a request asks for."""
    request = json.loads(pathlib.Path(path).read_text("utf-8"))
    from search import Cluster, Plan
    from search.topology import open_devices, target_of
    from sharding_rules import make_mesh

    cluster, plan = Cluster.from_json(request["cluster"]), Plan.from_json(request["plan"])
    tell("opening", what=cluster.name)
    devices = open_devices(target_of(cluster))
    mesh = make_mesh(plan.mesh, devices, order=plan.order)
    tell("tracing")
    program = build(request, plan, mesh)
    lowered = program.lower()
    tell("lowered", bytes=program.device_bytes)
    compiled = lowered.compile(compiler_options=dict(plan.compiler_options) or None)
    analysis = compiled.memory_analysis()
    if analysis is not None:
        sizes = {name: getattr(analysis, f"{name}_size_in_bytes", 0) for name in MEMORY_FIELDS}
        sizes |= {f"host_{name}": getattr(analysis, f"host_{name}_size_in_bytes", 0) for name in MEMORY_FIELDS}
        tell("compiled", memory=sizes)
    return 0


def build(request: dict[str, Any], plan: Any, mesh: Any) -> Any:
    """The program that a request asks for: a problem's step, or one of a call of an execution plan."""
    if "execution" in request:
        from redco_like.rlhf_programs import build_program
        from search.rlhf import ExecutionPlan

        return build_program(ExecutionPlan.from_json(request["execution"]), request["call"], request["program"], mesh)
    from redco_like.models import ModelConfig
    from redco_like.problem import load_problem

    model = request["problem"].pop("model")
    model = ModelConfig.from_record(model) if isinstance(model, dict) else model
    problem = load_problem(model, **request["problem"])
    assert problem.build is not None
    return problem.build(plan, mesh)


def tell(event: str, **what: Any) -> None:
    print(json.dumps({"event": event, **what}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
