"""One model under many plans: does the cost model put them in the right order?

    for ranking in read_vtrain(folder): ranking.name, len(ranking.runs)

`regret` is what the plan with the smallest estimate took longer than the fastest of all, as measured.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib

import numpy as np
from scipy.stats import rankdata

from redco_like.validation.runs import Architecture, Run


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Plans of one model on the same machines and the same batch."""

    name: str
    runs: tuple[Run, ...]


def regret(estimates: np.ndarray, measured: np.ndarray) -> float:
    """What the plan with the smallest estimate takes longer than the best.

    >>> round(regret(np.array([1.0, 2.0]), np.array([1.1, 1.0])), 2)
    0.1
    """
    return float(measured[int(np.argmin(estimates))] / measured.min() - 1)


def spearman(estimates: np.ndarray, measured: np.ndarray) -> float:
    """Correlation of the ranks; ties share theirs.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0]))
    1.0
    """
    if len(estimates) < 2:
        return float("nan")
    return float(np.corrcoef(rankdata(estimates), rankdata(measured))[0, 1].round(12))


def read_vtrain(folder: str | pathlib.Path) -> list[Ranking]:
    """Megatron plans on 256 and 512 A100 (vTrain's multi_node.csv), by model; none where the file is missing.

    The file says neither: vocabulary 51200, float16, every layer recomputed and no fused attention are those of
    Megatron-LM at the time, as is the all-reduce of gradients in 16 bits.
    """
    path = pathlib.Path(folder) / "vtrain" / "multi_node.csv"
    if not path.is_file():
        return []
    groups: dict[str, list[Run]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for index, row in enumerate(csv.DictReader(file)):
            name = f"{row['Parameters (billion)']}B on {row['# GPUs']} A100"
            groups.setdefault(name, []).append(_vtrain_run(row, f"vtrain-{index}"))
    return [Ranking(name, tuple(runs)) for name, runs in groups.items()]


def _vtrain_run(row: dict[str, str], name: str) -> Run:
    def number(column: str) -> int:
        return int(row[column])

    heads, embed = number("attention heads"), number("hidden size")
    data, microbatch = number("data parallelism"), number("micro batch")
    stage = number("pipeline parallelism")
    return Run(
        row=name,
        source="vTrain multi-node",
        group="vtrain",
        model=f"GPT {row['Parameters (billion)']}B",
        framework="megatron",
        architecture=Architecture(
            number("# layers"), embed, heads, heads, embed // heads, 4 * embed, vocab=51200, tied=True
        ),
        seq_len=number("sequence length"),
        accelerator="A100-80",
        devices=number("# GPUs"),
        devices_per_node=8,
        topology="",
        nic_bytes_per_second=0.0,
        product_dtype="float16",
        reduces_narrow=True,
        fused_attention=False,
        data=data,
        fsdp=1,
        tensor=number("tensor parallelism"),
        stage=stage,
        context=1,
        expert=1,
        zero=0,
        sequence=False,
        schedule="1f1b",
        chunks=1,
        layers_per_stage=(),
        spread_vocab=False,
        global_batch=number("global batch"),
        microbatch=microbatch,
        microbatches=number("global batch") // (data * microbatch),
        remat="full",
        seconds=float(row["iteration time (ms)"]) / 1e3,
        memory_bytes=None,
        memory_kind="",
    )
