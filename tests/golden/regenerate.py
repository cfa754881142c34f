"""Verified plans of small models, as JSON to be reviewed as diffs: what lies where, what moves, what it takes.

    python tests/golden/regenerate.py [NAME ...]             # all without names; needs the extras tpu-aot and gpu-aot
    python tests/golden/regenerate.py --planned [NAME ...]   # only what the planner says; needs no compiler
    git diff tests/golden

A file has the plan, the shape and the split of every array of the step, the bytes and the traffic as planned and as
compiled, and the versions of the compiler. No GPU and no TPU is needed; a case takes some seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

FOLDER = pathlib.Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
MODELS = FOLDER / "models"


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan: a file of `models`, a cluster of 8 devices, the problem's sizes, and what `redco-like --set` takes."""

    model: str
    cluster: str
    settings: str
    seq_len: int | None = None
    global_batch: int | None = None
    task: str = "train"


DENSE = {"seq_len": 512, "global_batch": 32}
CASES = {
    "dense_v5e_fsdp": Case("dense.json", "v5e:2x4", "fsdp=8,remat=full", **DENSE),
    "dense_v5p_sequence": Case("dense.json", "v5p:2x2x2", "fsdp=2,tensor=4,sequence=true,remat=dots", **DENSE),
    "dense_h100_microbatches": Case("dense.json", "8xH100", "data=2,fsdp=4,microbatches=2,remat=full", **DENSE),
    "dense_v5e_context": Case("dense.json", "v5e:2x4", "data=2,fsdp=2,context=2,remat=full", **DENSE),
    "gpt2_v5e_tensor": Case("fused_gpt2.py", "v5e:2x4", "data=2,tensor=4"),
    "gpt2_h100_fsdp": Case("fused_gpt2.py", "8xH100", "fsdp=8"),
    "experts_v5e": Case("experts.json", "v5e:2x4", "fsdp=2,expert=4,remat=full", **DENSE),
    "experts_h100": Case("experts.json", "8xH100", "expert=8,remat=dots", **DENSE),
    "t5_v5p_fsdp": Case("t5.json", "v5p:2x2x2", "fsdp=8,remat=dots", **DENSE),
    "t5_h100_tensor": Case("t5.json", "8xH100", "data=4,tensor=2", **DENSE),
    "vit_v5e_zero": Case("vit.json", "v5e:2x4", "data=8,optimizer_sharding=true", global_batch=64),
    "decode_v5e_tensor": Case("dense.json", "v5e:2x4", "data=2,tensor=4", 1024, 64, "decode"),
    "decode_v5p_data": Case("dense.json", "v5p:2x2x2", "data=8", 1024, 64, "decode"),
}


class Built:
    """A case with its problem traced and its plan made."""

    def __init__(self, name: str):
        from redco_like.cli.choices import fixed
        from redco_like.problem import load_problem
        from search import Plan, TracedModel, parse_cluster
        from search.knobs import changed
        from sharding_rules import MeshShape

        self.name, self.case = name, CASES[name]
        case, settings = self.case, fixed((self.case.settings,), "settings")
        training = case.task == "train"
        self.cluster = parse_cluster(case.cluster)
        self.record = {
            "model": str(MODELS / case.model),
            "cluster": case.cluster,
            "seq_len": case.seq_len,
            "global_batch": case.global_batch,
            "task": case.task,
            "optimizer": "adamw",
            "dtype": "bfloat16",
            "param_dtype": "float32",
        }
        options = {key: value for key, value in self.record.items() if key not in ("model", "cluster")}
        self.problem = load_problem(self.record["model"], **options)
        self.model = TracedModel(
            self.problem.traced,
            self.problem.opt_state,
            self.cluster,
            param_dtype="float32" if training else "bfloat16",
            fused_attention=True,
            remats=(settings.get("remat", "none"),),
            training=training,
        )
        self.plan = changed(Plan(MeshShape(), **self.model.plan_fields), settings)

    def plan_record(self) -> dict[str, Any]:
        """What the plan says, and of what."""
        apart = ("estimate", "problem", "verified", "reason")
        plan = {key: value for key, value in dataclasses.asdict(self.plan).items() if key not in apart}
        return {
            "problem": {**self.record, "model": str(pathlib.Path(self.record["model"]).relative_to(REPOSITORY))},
            "plan": json.loads(json.dumps(plan)),
        }

    def specs(self) -> dict[str, dict[str, str]]:
        """Shape and split of every array that the step takes, as the runtime has them: path -> `f32[8,4] (fsdp, -)`."""
        import jax

        from pipelines.train import TrainProgram
        from sharding_rules import make_mesh, path_str

        assert self.problem.build is not None
        program = self.problem.build(self.plan, make_mesh(self.plan.mesh, jax.devices()[:8], order=self.plan.order))
        if isinstance(program, TrainProgram):
            state = program.abstract_state
            batch = jax.tree.map(_placed, program.abstract_batch, program.batch_shardings)
            trees = {"params": state.params, "opt_state": state.opt_state, "batch": batch}
        else:
            trees = dict(zip(("params", "batch", "cache"), program.abstract_arguments, strict=True))
        return {
            name: {path_str(path): _written(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
            for name, tree in trees.items()
        }

    def planned(self) -> dict[str, Any]:
        """The planner's bytes and traffic per device and step."""
        from search.costing import estimate_plan
        from search.verify import traffic

        memory = estimate_plan(self.model, self.plan).memory
        return {
            "bytes": {**{kind: round(size) for kind, size in memory.items()}, "total": round(sum(memory.values()))},
            "sent": {"+".join(row.axes): round(row.planned) for row in traffic([], self.model, self.plan)},
        }

    def compiled(self) -> dict[str, Any]:
        """What the compiler makes of it.

        Raises:
            ToolchainMissing: the compiler is not installed.
        """
        from redco_like.verify import verify
        from search.compiler import Cache

        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            found = verify(self.plan, self.record, self.cluster, self.model, cache=Cache(folder), limit_seconds=300)
        collectives = {
            "+".join(row.axes): {
                "counts": dict(row.counts),
                "sent": round(row.sent),
                "asynchronous": round(row.asynchronous),
            }
            for row in found.traffic
            if row.counts
        }
        return {
            "target": found.target,
            "depth": found.depth,
            "versions": dict(found.versions),
            "bytes": dict(found.bytes),
            "collectives": collectives,
            "flops": round(found.flops),
            "warnings": [_local(warning) for warning in found.warnings],
        }


def _placed(x: Any, sharding: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _written(x: Any) -> str:
    """The dtype, shape and split of an array: `float32[4,512] (-, fsdp)`."""
    entries = (*x.sharding.spec, *[None] * len(x.shape))[: len(x.shape)]
    words = ["-" if e is None else e if isinstance(e, str) else "+".join(e) for e in entries]
    shape = f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"{shape} ({', '.join(words)})" if words else shape


def _local(text: str) -> str:
    """A message without this machine's folders and without line numbers, which move with every edit."""
    text = text.replace(f"{REPOSITORY}{os.sep}", "")
    text = re.sub(r"/\S*/(?:site|dist)-packages/", "", text)
    return re.sub(r"(\.py):\d+", r"\1", text)


def path_of(name: str) -> pathlib.Path:
    """Where the plan of a case is kept."""
    return FOLDER / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    """A case as it is kept."""
    return json.loads(path_of(name).read_text("utf-8"))


def write(name: str, record: dict[str, Any]) -> None:
    """Keep a case; the same record always gives the same text."""
    path_of(name).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")


def main(argv: list[str]) -> int:
    """Write the files of the cases named, or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--planned", action="store_true", help="keep what was compiled; needs no compiler")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
    for name in options.names or CASES:
        case = Built(name)
        kept = read(name).get("compiled") if options.planned else None
        compiled = case.compiled() if kept is None else kept
        write(name, {**case.plan_record(), "specs": case.specs(), "planned": case.planned(), "compiled": compiled})
        print(path_of(name).relative_to(REPOSITORY), flush=True)
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    sys.exit(main(sys.argv[1:]))
