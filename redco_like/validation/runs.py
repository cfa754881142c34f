"""Published runs as data: who ran which model how, and what was measured. Read from a folder, never copied.

runs = read_runs("/data/published")          # a folder with published_runs.csv
runs[0].architecture, runs[0].accelerator, runs[0].seconds
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import re

from search.efficiency import Framework
from search.plan import Remat

ACCELERATORS = {
    "V100-SXM3-32GB (DGX-2)": "V100-32",
    "A100-SXM-40GB": "A100-40",
    "A100-SXM-80GB": "A100-80",
    "H100-SXM-80GB": "H100",
    "B200-SXM-180GB": "B200",
    "B300-SXM": "B300",
    "GB200-NVL72": "GB200",
    "GB300-NVL72": "GB300",
    "MI300X": "MI300X",
    "TPU-v4": "v4",
    "TPU-v5e": "v5e",
    "TPU-v5p": "v5p",
}
"""Hardware as the table has it -> name in `search/accelerators.toml`."""


@dataclasses.dataclass(frozen=True)
class Mla:
    """Ranks and head sizes of multi-head latent attention; q_rank 0 projects queries in one step."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    v: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder.

    Attributes:
        gated: whether the hidden layer has a gate (three matrices instead of two).
        experts, chosen, expert_width: routed experts, how many a token takes, and their hidden width; 0 where dense.
        shared: experts that every token takes.
        dense_layers: layers without experts, first.
    """

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    gated: bool = False
    tied: bool = False
    experts: int = 0
    chosen: int = 0
    expert_width: int = 0
    shared: int = 0
    dense_layers: int = 0
    mla: Mla | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        group: who measured; the unit of a split into fitted and left-out.
        seconds: of a training step.
        memory_bytes: of the fullest device, or None; `memory_kind` says what was measured.
        reduces_narrow: whether gradients are summed over devices in 16 bits.
        fused_attention: False where the scores went through memory.
        topology: chips along each dimension of a slice, as "4x4x8"; "" where the source does not say.
        nic_bytes_per_second: of the network, per device; 0 where the source does not say.
        product_dtype: of the products with weights.
        tensor, context, stage, expert, data, fsdp: sizes of the mesh axes; `data` counts replicas besides the experts'.
        zero: stage of ZeRO; 1 splits the optimizer over data, 2 keeps what was gathered for the backward pass.
        layers_per_stage: where they are not equal.
        sequence: whether activations between blocks are split over tensor.
        doubt: why the measured time is in doubt; "" where it is not.
        recompute_latents: whether queries, keys and values are made of the latents again.
        sums_narrow: whether gradients are summed over microbatches in 16 bits.
        expert_ways: devices over which the experts lie, also where they lie over tensor, which no mesh axis says.
    """

    row: str
    source: str
    group: str
    model: str
    framework: Framework
    architecture: Architecture
    seq_len: int
    accelerator: str
    devices: int
    devices_per_node: int
    topology: str
    nic_bytes_per_second: float
    product_dtype: str
    reduces_narrow: bool
    fused_attention: bool
    data: int
    fsdp: int
    tensor: int
    stage: int
    context: int
    expert: int
    zero: int
    sequence: bool
    schedule: str
    chunks: int
    layers_per_stage: tuple[int, ...]
    spread_vocab: bool
    global_batch: int
    microbatch: int
    microbatches: int
    remat: Remat
    seconds: float
    memory_bytes: float | None
    memory_kind: str
    doubt: str = ""
    recompute_latents: bool = False
    sums_narrow: bool = False
    expert_ways: int = 1

    @property
    def dense(self) -> bool:
        return not self.architecture.experts


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A row that says too little, or more than the cost model knows."""

    row: str
    group: str
    reason: str


def read_runs(folder: str | pathlib.Path) -> tuple[list[Run], list[Skipped]]:
    """Read the training runs whose configuration is known, and the reasons why the others were left.

    Raises:
        ValueError: the folder has no published_runs.csv.
    """
    path = pathlib.Path(folder) / "published_runs.csv"
    if not path.is_file():
        raise ValueError(f"no published_runs.csv in {folder}")
    runs: list[Run] = []
    skipped: list[Skipped] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["usable"] not in ("strict", "soft"):
                continue
            reason = _unknown(row)
            if reason:
                skipped.append(Skipped(row["row_id"], row["independent_group"], reason))
            else:
                runs.append(_run(row))
    return runs, skipped


def _unknown(row: dict[str, str]) -> str:
    if row["kind"] == "inference":
        return "inference"
    if row["kind"] not in ("train", "finetune"):
        return f"{row['kind']}: no training step"
    if row["hardware"] not in ACCELERATORS:
        return f"accelerator {row['hardware']}"
    if not row["best_step_time_s"]:
        return "no time"
    if "sliding window" in row["attn_type"]:
        return "sliding-window attention"
    if "V-Half" in row["pp_schedule"]:
        return "schedule V-Half"
    if "interlaced" in row["pp_schedule"]:
        return "schedule interlaced"
    if "offload" in row["offload"]:
        return row["offload"]
    if "LoRA" in row["model"]:
        return "LoRA"
    return ""


def _run(row: dict[str, str]) -> Run:
    number = _Numbers(row)
    heads, embed = number("n_heads"), number("d_model")
    experts = number("n_experts", 0)
    architecture = Architecture(
        layers=number("n_layers"),
        embed=embed,
        heads=heads,
        kv_heads=number("n_kv_heads", heads),
        head_dim=number("head_dim", embed // heads),
        mlp=number("d_ff", 0),
        vocab=number("vocab"),
        gated=row["mlp_gated"] == "true",
        tied=row["tied_emb"] == "true",
        experts=experts,
        chosen=number("moe_topk", 0),
        expert_width=number("moe_d_ff", 0),
        shared=number("n_shared_experts", 0) if experts else 0,
        dense_layers=number("dense_layers", 0) if experts else 0,
        mla=_mla(row["attn_type"]),
    )
    stage, expert = number("pp", 1), number("ep", 1)
    # Experts are spread over replicas of the rest of the model; MaxText counts replicas besides them.
    data = number("dp", 1)
    if row["framework"].startswith("MaxText") or number("fsdp", 1) > 1:
        expert_axis = 1 if experts == 0 else expert
    else:
        expert_axis = expert
        if data % expert == 0:
            data //= expert
        else:
            expert_axis = 1
    if expert_axis > 1 and number("fsdp", 1) > 1 and not row["framework"].startswith("MaxText"):
        expert_axis = 1
    schedule = row["pp_schedule"]
    return Run(
        row=row["row_id"],
        source=row["source_id"],
        group=row["independent_group"],
        model=row["model"],
        framework=_framework(row["framework"]),
        architecture=architecture,
        seq_len=number("seq_len"),
        accelerator=ACCELERATORS[row["hardware"]],
        devices=number("n_devices"),
        devices_per_node=number("devices_per_node"),
        topology=_topology(row["interconnect"]),
        nic_bytes_per_second=_nic(row["interconnect"], number("devices_per_node")),
        product_dtype=_dtype(row["precision"]),
        reduces_narrow="fp32 grad reduce" not in row["precision"] and not row["framework"].startswith("MaxText"),
        fused_attention=_fused(row["attn_type"]),
        data=data,
        fsdp=number("fsdp", 1) if number("zero_stage", 0) >= 2 else 1,
        tensor=number("tp", 1),
        stage=stage,
        context=number("cp", 1),
        expert=expert_axis,
        zero=number("zero_stage", 0),
        # MaxText splits what lies between blocks over tensor too, along the model's width instead of the tokens.
        sequence=row["sp"] == "true" or (row["framework"].startswith("MaxText") and number("tp", 1) > 1),
        schedule="interleaved" if stage > 1 and number("vpp", 1) > 1 else "1f1b",
        chunks=number("vpp", 1) if stage > 1 else 1,
        layers_per_stage=_layers_per_stage(row["other"]),
        spread_vocab="vocab-parallel" in schedule,
        global_batch=number("global_batch"),
        microbatch=number("micro_batch"),
        microbatches=number("grad_accum", 1),
        remat=_remat(row["recompute"]),
        recompute_latents="mla_up_proj" in row["recompute"],
        sums_narrow="bf16 grad reduce" in row["precision"] or "bf16 params/grad-reduce" in row["precision"],
        expert_ways=expert,
        seconds=float(row["best_step_time_s"]),
        memory_bytes=float(row["mem_per_device_GB"]) * 1e9 if row["mem_per_device_GB"] else None,
        memory_kind=row["mem_kind"],
        doubt="an upper bound, from hours of the whole run" if "upper bound" in row["notes"] else "",
    )


class _Numbers:
    """Whole numbers of a row by column; an empty cell has the default."""

    def __init__(self, row: dict[str, str]):
        self.row = row

    def __call__(self, column: str, default: int | None = None) -> int:
        text = self.row[column]
        if text:
            return int(float(text))
        if default is None:
            raise ValueError(f"row {self.row['row_id']} has no {column}")
        return default


def _nic(text: str, devices_per_node: int) -> float:
    """Bytes per second and device of "8x200 Gb/s" per node or "1x400 Gb/s NIC per GPU"; 0 without such words."""
    found = re.search(r"(\d+)x(\d+) ?G", text)
    if not found:
        return 0.0
    total = int(found[1]) * int(found[2]) * 1e9 / 8
    return total if "per GPU" in text else total / devices_per_node


def _layers_per_stage(text: str) -> tuple[int, ...]:
    found = re.search(r"layers per stage \[([\d, ]+)\]", text)
    layers = tuple(int(n) for n in found[1].split(",")) if found else ()
    return layers if len(set(layers)) > 1 else ()


def _topology(text: str) -> str:
    found = re.search(r"\d+x\d+(x\d+)?", text)
    return found[0] if found and "ICI" in text else ""


def _fused(text: str) -> bool:
    return ("flash" in text and "no flash" not in text) or "MLA" in text


def _mla(text: str) -> Mla | None:
    found = re.search(r"MLA q_lora (\d+) kv_lora (\d+) nope (\d+) rope (\d+) v (\d+)", text)
    return Mla(*(int(x) for x in found.groups())) if found else None


def _framework(text: str) -> Framework:
    """How operations reach the device.

    "eager": PyTorch modules one kernel at a time. "megatron": the same with the elementwise operations fused by hand,
    and no collective behind compute. "megatron-core": the same with Transformer Engine, and all of them behind compute.
    "compiled": XLA.
    """
    if text.startswith("MaxText"):
        return "compiled"
    if "Megatron-Core" in text:
        return "megatron-core"
    if text.startswith(("Megatron", "GPT-NeoX")):
        return "megatron"
    return "eager"


def _dtype(precision: str) -> str:
    if precision.startswith(("fp8", "mxfp8")):
        return "float8"
    if precision.startswith("nvfp4"):
        return "float4"
    return "float16" if precision.startswith("fp16") and "bf16" not in precision else "bfloat16"


def _remat(text: str) -> Remat:
    """The policy that recomputes the same products: all of a block, or what lies between its weights' products.

    Recomputing the core of attention is "dots" where scores are materialised. Policies that keep the output of a fused
    attention (minimal_flash), or recompute single elementwise operations, cost next to nothing: "none".
    """
    if text.startswith("full"):
        return "full" if "first 5 layers" not in text else "none"
    if text.startswith(("minimal (", "selective (")) or text.startswith("save_dot"):
        return "dots"
    return "none"
