"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import tyro

from redco_like.cli.terminal import UsageError

Dtype = Literal["float32", "bfloat16", "float16"]
Task = Literal["train", "prefill", "decode"]
PlanTask = Literal["train", "prefill", "decode", "serve"]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Attention = Literal["fused", "plain"]


def optional(metavar: str, otherwise: str = "") -> Any:
    """How help shows an option that may be left out: its placeholder, and what happens without it."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})" if otherwise else "")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is planned, and for which machines."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")]
    """An architecture (llama-3-70b), a Hugging Face config.json, or a Python file with get_config(): any model."""
    cluster: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")]
    """8xH100, 16x8xA100-80, v5p-128, v5e:16x16, 2*v5p:4x4x4, or a TOML file (as `redco-like profile` writes)."""
    seq_len: Annotated[int | None, optional("N", "the model's, or that of the run file's batch")] = None
    """Tokens per example."""
    global_batch: Annotated[int | None, optional("N", "that of the run file's batch")] = None
    """Examples per step, over all devices."""
    task: PlanTask = "train"
    """A step of training, of a whole prompt, or of one more token after a cache of seq-len; or a server of both."""
    optimizer: Annotated[str, tyro.conf.arg(metavar="NAME")] = "adamw"
    """Its state takes memory and time. A run file brings its own."""
    dtype: Dtype = "bfloat16"
    """Of the forward and backward pass."""
    param_dtype: Dtype = "float32"
    """Of the stored parameters."""
    attention: Annotated[Attention | None, optional("{fused,plain}", "as the model has it")] = None
    """Whether attention is one kernel (FlashAttention) or writes its scores to memory."""

    def record(self) -> dict[str, Any]:
        """What a plan keeps of it, for `explain` and `report`."""
        return resolved(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class SameProblem:
    """Instead of what the plan was made for."""

    model: Annotated[str | None, optional("NAME|FILE", "the plan's, as of all below")] = None
    """An architecture, a config.json or a run file."""
    cluster: Annotated[str | None, optional("NAME|FILE")] = None
    """A cluster or its file."""
    seq_len: Annotated[int | None, optional("N")] = None
    """Tokens per example."""
    global_batch: Annotated[int | None, optional("N")] = None
    """Examples per step, over all devices."""
    task: Annotated[Task | None, optional("TASK")] = None
    """train, prefill or decode."""
    optimizer: Annotated[str | None, optional("NAME")] = None
    """Of training."""
    dtype: Annotated[Dtype | None, optional("DTYPE")] = None
    """Of the forward and backward pass."""
    param_dtype: Annotated[Dtype | None, optional("DTYPE")] = None
    """Of the stored parameters."""
    attention: Annotated[Attention | None, optional("{fused,plain}")] = None
    """Whether attention is one kernel."""

    def over(self, record: dict[str, Any]) -> dict[str, Any]:
        """The plan's problem with what was given here instead."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        defaults = {"task": "train", "optimizer": "adamw", "dtype": "bfloat16", "param_dtype": "float32"}
        return resolved({**defaults, **record, **given})


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Which plans are searched."""

    fix: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Only plans with this size of a mesh axis, or this sequence, remat, microbatches, ...: tensor=8, remat=full."""
    forbid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY")] = ()
    """Only plans without this: stage, context, tensor, ..."""
    max_microbatch: Annotated[int | None, optional("N", "no limit")] = None
    """Examples per device and microbatch, at most."""
    memory_share: Annotated[float | None, optional("SHARE", "search.space.memory_share of the accelerator")] = None
    """Of a device's usable memory that a plan may count on."""
    allow_planned: Flag = False
    """Also plans with parts that Trainer cannot run yet (pipeline stages, offload, ...); they say so."""
    runners_up: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """How many of the next fastest plans to show."""
    time_limit: Annotated[float | None, optional("SECONDS", "none: the gap is 0")] = None
    """Stop the search after this time, and say how far from the best the plan may be."""

    def check(self) -> None:
        """Raise a UsageError for what means nothing, before any work is done."""
        for name, low in (("runners_up", 0), ("max_microbatch", 1), ("time_limit", 0), ("memory_share", 0)):
            value = getattr(self, name)
            if value is not None and (value < low or (name == "memory_share" and not 0 < value <= 1)):
                wanted = "above 0 and up to 1" if name == "memory_share" else f"at least {low}"
                raise UsageError(f"--{name.replace('_', '-')} {value}; a number {wanted}")


def resolved(record: dict[str, Any]) -> dict[str, Any]:
    """A problem with its files by absolute path, so that the plan may be read from another folder."""
    out = dict(record)
    for name in ("model", "cluster"):
        value = out.get(name)
        if isinstance(value, str) and pathlib.Path(value).suffix in (".py", ".json", ".toml"):
            out[name] = str(pathlib.Path(value).expanduser().resolve())
    return out
