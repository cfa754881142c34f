"""Plans of one GPT on 16 T4, measured by AMP (github.com/DachengLi1/AMP, src/homogeneous.py): are they ranked right?

The file has plans and times; that script and DeepSpeed's pipeline example, which it runs, have the rest: 24 layers of
width 1024, vocabulary 52256, length 1024, 32 examples, float16, every layer recomputed, four nodes of four T4.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from redco_like.validation.problems import Problems
from redco_like.validation.rankings import Ranking
from redco_like.validation.report import Section
from redco_like.validation.runs import Architecture, Run
from search import find_accelerator

FILE = "amp/predicted_and_measured.json"
GPT = Architecture(
    layers=24, embed=1024, heads=16, kv_heads=16, head_dim=64, mlp=4096, vocab=52256, gated=False, tied=True
)
BATCH, LENGTH, DEVICES = 32, 1024, 16
FIRST = 2
"""Parts of the pipeline before the first layer: the embedding and a transposition."""

CRASHES = (
    "the source does not say why they crashed; most had the largest microbatches, whose logits PyTorch holds several "
    "times in float32, where XLA fuses them"
)


def read_amp(folder: str | pathlib.Path) -> list[Ranking]:
    """The plans that ran, as one ranking; none where the file is missing."""
    runs = [run for run in _runs(folder) if math.isfinite(run.seconds)]
    return [Ranking("0.4B on 16 T4", tuple(runs))] if runs else []


def crashed_section(folder: str | pathlib.Path) -> Section | None:
    """How many of the plans that crashed are said to fit; None where there are none."""
    crashed = [run for run in _runs(folder) if not math.isfinite(run.seconds)]
    if not crashed:
        return None
    maker, usable = Problems(), find_accelerator("T4").usable_memory_bytes
    fit = sum(maker.of(run).bytes_per_device() <= usable for run in crashed)
    row = ("AMP: crashed, said to fit", len(crashed), str(fit))
    return Section("Plans that crashed", ("", "runs", "found"), (row,), (CRASHES,))


def _runs(folder: str | pathlib.Path) -> list[Run]:
    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        return []
    plans = json.loads(path.read_text("utf-8"))["homogeneous"]
    return [_run(plan, f"amp-{i}") for i, plan in enumerate(plans)]


def _run(plan: Mapping[str, Any], name: str) -> Run:
    cuts = [min(max(int(c) - FIRST, 0), GPT.layers) for c in plan["part"].split(",")]
    layers = tuple(b - a for a, b in itertools.pairwise(cuts))
    return Run(
        row=name,
        source="AMP",
        group="amp",
        model="GPT 0.4B",
        framework="megatron",
        architecture=GPT,
        seq_len=LENGTH,
        accelerator="T4",
        devices=DEVICES,
        devices_per_node=4,
        topology="",
        nic_bytes_per_second=0.0,
        product_dtype="float16",
        reduces_narrow=True,
        fused_attention=False,
        data=plan["dp"],
        fsdp=1,
        tensor=plan["mp"],
        stage=plan["pp"],
        context=1,
        expert=1,
        zero=0,
        sequence=False,
        schedule="1f1b",
        chunks=1,
        layers_per_stage=layers if len(set(layers)) > 1 else (),
        spread_vocab=False,
        global_batch=BATCH,
        microbatch=plan["mbs"],
        microbatches=BATCH // (plan["dp"] * plan["mbs"]),
        remat="full",
        seconds=float(plan["real"]),
        memory_bytes=None,
        memory_kind="",
    )
