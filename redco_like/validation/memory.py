"""Memory of plans that another planner measured rank by rank (Galvatron's profile of Llama-2-7B on eight devices).

    for plan in compare_plans(folder): plan.name, plan.measured, plan.estimate

Measured are two numbers of each rank: model states (parameters, gradients, Adam's moments, all float32), and what lies
above them at the peak. One or two layers per stage, sequences of 2048, eight of them in one microbatch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from redco_like.models import architecture
from redco_like.problem import load_problem
from redco_like.validation.problems import make_cluster
from redco_like.validation.report import MEMORY_BAR, Bar, Section
from search import Plan, TracedModel, estimate_plan
from search.plan import Remat
from search.space import Inner
from sharding_rules import MeshShape

PROFILE = "galvatron/memory_profiling_bf16_llama2-7b_all.json"
MIB = 2**20
STATES = ("params", "gradients", "optimizer")
HEAD = (
    "what a layer keeps is near what was measured; the rest is short as PyTorch holds the logits in 16 bits and in "
    "float32, their softmax and its gradient, where XLA fuses them"
)
RECOMPUTED = "a recomputed layer keeps 32 MiB where its input in 16 bits has 16; the source does not say what else"
BUFFERS = (
    "model states as measured include the buffers that Megatron keeps for gathered activations: two of a rank's batch, "
    "where tensor > 1"
)


@dataclasses.dataclass(frozen=True)
class PlanMemory:
    """Bytes of the fullest rank of one plan, measured and estimated.

    Attributes:
        states: parameters, gradients and optimizer; measured, estimated.
        above: what lies above them at the peak; measured, estimated.
        layer: what one more layer keeps after the forward pass; measured, estimated. None with stages, whose numbers of
            layers are not varied.
        whole_vocab: whether every member of a tensor group made all logits, which this project's plans do not.
    """

    name: str
    layers: int
    states: tuple[float, float]
    above: tuple[float, float]
    layer: tuple[float, float] | None
    whole_vocab: bool

    @property
    def error(self) -> float:
        return (self.states[1] + self.above[1]) / (self.states[0] + self.above[0]) - 1


def compare_plans(folder: str | pathlib.Path) -> list[PlanMemory]:
    """Estimate every plan of the profile; none where the file is missing."""
    path = pathlib.Path(folder) / PROFILE
    if not path.is_file():
        return []
    found: list[PlanMemory] = []
    models = functools.cache(_traced)
    for name, values in json.loads(path.read_text("utf-8")).items():
        sizes = re.fullmatch(r"(\d+)_(\d+)_(\d+)(_vtp)?(_c)?(_sp)?", name)
        if sizes is None:
            continue
        stage, tensor, data = (int(sizes[i]) for i in (1, 2, 3))
        remat: Remat = "full" if sizes[5] else "none"
        inner = Inner(tensor, 1, 1, tensor > 1 and bool(sizes[6]), data, stage)
        plan = Plan(
            mesh=MeshShape(fsdp=data, tensor=tensor, stage=stage),
            preset=inner.preset(data),
            remat=remat,
            param_dtype="float32",
            compute_dtype="bfloat16",
        )
        runs = _runs(values)
        memory = {key: estimate_plan(models(*key, remat), plan).memory for key in sorted(runs)}
        most = max(runs)
        rank = max(runs[most].values(), key=lambda r: r["ms"] + r["act_peak"])
        own = float(sum(memory[most][part] for part in STATES))
        layer = None
        if stage == 1 and len(runs) == 2:
            less = min(runs)
            measured = max(r["act"] for r in runs[most].values()) - max(r["act"] for r in runs[less].values())
            kept = memory[most]["activations"] - memory[less]["activations"]
            layer = (measured / (most[0] - less[0]), kept / (most[0] - less[0]))
        found.append(
            PlanMemory(
                name=f"stage={stage} tensor={tensor} fsdp={data}" + (" remat=full" if sizes[5] else ""),
                layers=most[0],
                states=(rank["ms"], own),
                above=(rank["act_peak"], sum(memory[most].values()) - own),
                layer=layer,
                whole_vocab=tensor > 1 and not sizes[4],
            )
        )
    return found


def _runs(values: dict[str, float]) -> dict[tuple[int, int, int], dict[str, dict[str, float]]]:
    """(layers, batch, length) -> rank -> what was measured -> bytes."""
    runs: dict[tuple[int, int, int], dict[str, dict[str, float]]] = {}
    for key, mib in values.items():
        sizes = re.fullmatch(r"layernum\[(\d+)\]_bsz(\d+)_seq(\d+)_rank(\d+)_(ms|act|act_peak)", key)
        if sizes is not None:
            run = runs.setdefault((int(sizes[1]), int(sizes[2]), int(sizes[3])), {})
            run.setdefault(sizes[4], {})[sizes[5]] = mib * MIB
    return runs


def _traced(layers: int, batch: int, seq_len: int, remat: Remat) -> TracedModel:
    config = dataclasses.replace(architecture("llama-2-7b"), layers=layers)
    problem = load_problem(config, seq_len=seq_len, global_batch=batch, optimizer="adam")
    cluster = make_cluster("A100-80", 8, 8)
    return TracedModel(problem.traced, problem.opt_state, cluster, fused_attention=True, remats=(remat,))


def memory_section(plans: Sequence[PlanMemory]) -> Section:
    """The plans as a table."""
    rows = tuple(
        (
            p.name + (" (whole vocabulary)" if p.whole_vocab else ""),
            f"{(p.states[0] + p.above[0]) / MIB:.0f}",
            f"{(p.states[1] + p.above[1]) / MIB:.0f}",
            f"{p.error:+.1%}",
            _off(p.states),
            _off(p.above),
            _off(p.layer) if p.layer else "",
        )
        for p in plans
    )
    columns = ("plan", "measured MiB", "estimate MiB", "error", "model states", "the rest", "kept by a layer")
    return Section("Memory of plans of Llama-2-7B (Galvatron)", columns, rows, (HEAD, BUFFERS, RECOMPUTED))


def memory_bars(plans: Sequence[PlanMemory]) -> list[Bar]:
    """Mean errors over plans: of all, of model states, and of what a layer keeps."""
    layers = [p.layer for p in plans if p.layer]
    return [
        Bar("Galvatron, mean error of memory", _mean(p.error for p in plans), MEMORY_BAR, reason=HEAD),
        Bar(
            "Galvatron, mean error of model states", _mean(_error(p.states) for p in plans), MEMORY_BAR, reason=BUFFERS
        ),
        Bar("Galvatron, mean error of what a layer keeps", _mean(_error(x) for x in layers), MEMORY_BAR),
    ]


def _error(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0] - 1


def _off(pair: tuple[float, float]) -> str:
    return f"{_error(pair):+.1%}"


def _mean(errors: Iterable[float]) -> float:
    return float(np.mean([abs(e) for e in errors]))
