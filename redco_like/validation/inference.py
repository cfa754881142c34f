"""Latencies and memory of published inference runs, and whether what ran out of memory is said not to fit.

    requests = read_requests("/data/published")
    answers = answer(requests, efficiency)
    answers[0].seconds, answers[0].bytes_per_device, answers[0].fits

A request is a batch of prompts of one length, read at once, then one token after the other. The prompt's pass makes the
first token, so `output_len` tokens take `output_len - 1` more steps.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipelines.problem import abstract_key, cast_floats
from redco_like.models import ModelConfig
from redco_like.models.model import Model, build_model
from redco_like.validation.problems import make_cluster
from redco_like.validation.rankings import spearman
from redco_like.validation.report import LEFT_OUT_BAR, MEMORY_BAR, Bar, Section
from redco_like.validation.runs import ACCELERATORS
from search import Estimate, Plan, TracedModel, estimate_plan
from search.cluster import Cluster
from search.efficiency import Efficiency, Framework
from search.space import Inner
from sharding_rules import MeshShape, trace

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
Constants = Callable[[str, Framework], Efficiency]
"""From an accelerator and a framework to the constants of the cost model."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One measured batch of prompts.

    Attributes:
        software: as the source has it.
        input_len, output_len: tokens of a prompt, and tokens made after it.
        seconds: until the last token; None where the run ran out of memory.
        memory_bytes: of a device, the program's own use included; None where not published.
        out_of_memory: whether the run failed.
    """

    row: str
    group: str
    model: str
    software: str
    config: ModelConfig
    accelerator: str
    devices: int
    devices_per_node: int
    dtype: str
    tensor: int
    batch: int
    input_len: int
    output_len: int
    seconds: float | None
    memory_bytes: float | None
    out_of_memory: bool

    @property
    def length(self) -> int:
        """Tokens of a sequence when it is done: the length of the cache."""
        return self.input_len + self.output_len


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the cost model says of a request.

    Attributes:
        seconds: until the last token; `prompt_seconds` of it for the prompt.
        bytes_per_device: weights, cache and the larger of the two working sets.
        fits: within what the planner lets a plan use of a device.
    """

    request: Request
    seconds: float
    prompt_seconds: float
    bytes_per_device: float
    fits: bool


def read_requests(folder: str | pathlib.Path) -> tuple[list[Request], dict[str, int]]:
    """Read the inference runs that the cost model knows, and reason -> number of the others.

    Raises:
        ValueError: the folder has no published_runs.csv.
    """
    path = pathlib.Path(folder) / "published_runs.csv"
    if not path.is_file():
        raise ValueError(f"no published_runs.csv in {folder}")
    requests: list[Request] = []
    left: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            failed = row["kind"] == "oom_observation" and bool(row["input_len"])
            if row["kind"] != "inference" and not failed:
                continue
            if reason := _unknown(row, failed):
                left[f"{row['source_id']}: {reason}"] = left.get(f"{row['source_id']}: {reason}", 0) + 1
            else:
                requests.append(_request(row, failed))
    return requests, left


def _unknown(row: dict[str, str], failed: bool) -> str:
    if row["precision"] not in DTYPES:
        return f"weights and cache in {row['precision']}"
    if row["pp"] not in ("", "1"):
        return "stages: their microbatches are not published"
    if row["arch_class"] != "dense_gpt":
        return f"architecture {row['arch_class']}"
    if row["usable"] == "no" and not failed:
        return f"not published: {row['missing_fields']}"
    return ""


def _request(row: dict[str, str], failed: bool) -> Request:
    sizes = {name: int(row[name]) for name in ("n_layers", "d_model", "n_heads", "d_ff", "vocab")}
    input_len, output_len = int(row["input_len"]), int(row["output_len"])
    config = ModelConfig(
        family="gpt2",
        kind="decoder",
        vocab=sizes["vocab"],
        embed=sizes["d_model"],
        layers=sizes["n_layers"],
        heads=sizes["n_heads"],
        mlp=sizes["d_ff"],
        max_length=2048,
        activation="gelu_tanh",
        position="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=row["tied_emb"] == "true",
    )
    return Request(
        row=row["row_id"],
        group=row["independent_group"],
        model=row["model"],
        software=row["framework"].split(" (")[0],
        config=config,
        accelerator=ACCELERATORS[row["hardware"]],
        devices=int(row["n_devices"]),
        devices_per_node=int(row["devices_per_node"]),
        dtype=DTYPES[row["precision"]],
        tensor=int(row["tp"]),
        batch=int(row["global_batch"]),
        input_len=input_len,
        output_len=output_len,
        seconds=float(row["step_time_s"]) if row["step_time_s"] else None,
        memory_bytes=float(row["mem_per_device_GB"]) * 1e9 if row["mem_per_device_GB"] else None,
        out_of_memory=failed,
    )


def answer(requests: Iterable[Request], efficiency: Constants) -> list[Answer]:
    """Estimate requests.

    A model and a batch are traced once for every length of prompt, and twice for one more token: at the shortest and
    the longest cache, between which everything is linear.
    """
    requests = list(requests)
    groups: dict[tuple[ModelConfig, str, int], list[Request]] = {}
    for request in requests:
        groups.setdefault((request.config, request.dtype, request.batch), []).append(request)
    found: dict[str, Answer] = {}
    for mine in groups.values():
        prompts = {r.input_len: _Traced(r, r.input_len) for r in mine}
        ends = sorted({min(r.input_len for r in mine) + 1, max(r.length for r in mine)})
        tokens = [(length, _Traced(mine[0], length, token=True)) for length in ends]
        for r in mine:
            constants = efficiency(r.accelerator, "megatron")
            prompt = prompts[r.input_len].estimate(r, constants)
            found[r.row] = _combine(r, prompt, [(n, t.estimate(r, constants)) for n, t in tokens])
    return [found[r.row] for r in requests]


class _Traced:
    """The prompt's pass or one more token, of one model and batch, on whatever devices.

    One kernel reads the cache for a token; the scores of a prompt go through memory (FasterTransformer's decoders).
    """

    def __init__(self, request: Request, length: int, *, token: bool = False):
        model, params = _build(request.config, request.dtype)
        cache = jax.eval_shape(lambda: model.init_cache(request.batch, length))
        shape = (request.batch, 1 if token else length)
        batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}
        if token:
            batch["position"] = jax.ShapeDtypeStruct((), jnp.int32)
        traced = trace(
            lambda p, b, state: (
                model.decode(p, b["tokens"], state, b["position"]) if token else model.prefill(p, b["tokens"], state)
            ),
            params,
            batch,
            cache,
            names=("params", "batch", "state"),
        )
        self._model = TracedModel(
            traced,
            None,
            _cluster(request),
            param_dtype=request.dtype,
            fused_attention=token,
            remats=("none",),
            training=False,
        )

    def estimate(self, request: Request, efficiency: Efficiency) -> Estimate:
        n = request.tensor
        plan = Plan(
            mesh=MeshShape(tensor=n),
            preset=Inner(n, 1, 1, False, 1, 1).preset(1),
            remat="none",
            param_dtype=request.dtype,
            compute_dtype=request.dtype,
        )
        return estimate_plan(self._model.on(_cluster(request), efficiency), plan)


@functools.cache
def _build(config: ModelConfig, dtype: str) -> tuple[Model, Any]:
    """A model's functions, and the shapes of its weights, stored in the dtype of the computation."""
    model = build_model(config, dtype=dtype)
    params = jax.eval_shape(model.init_fn, abstract_key())
    return model, cast_floats(params, dtype)


def _cluster(request: Request) -> Cluster:
    return make_cluster(request.accelerator, request.devices, request.devices_per_node)


def _combine(request: Request, prompt: Estimate, tokens: Sequence[tuple[int, Estimate]]) -> Answer:
    """One request from its prompt's pass and single tokens after caches of two lengths."""
    lengths = [n for n, _ in tokens]
    slots = {name: [t.memory.get(name, 0) for _, t in tokens] for name in ("cache", "activations", "transient")}
    after = {name: float(np.interp(request.length, lengths, values)) for name, values in slots.items()}
    # Every step reads one token more: the mean of a linear function is its value in the middle.
    middle = (request.input_len + 1 + request.length) / 2
    step = float(np.interp(middle, lengths, [t.seconds_per_step for _, t in tokens]))
    working = max(
        prompt.memory["activations"] + prompt.memory["transient"],
        after["activations"] + after["transient"],
    )
    total = prompt.memory["params"] + after["cache"] + working
    return Answer(
        request=request,
        seconds=prompt.seconds_per_step + (request.output_len - 1) * step,
        prompt_seconds=prompt.seconds_per_step,
        bytes_per_device=total,
        fits=total <= prompt.usable_bytes,
    )


# Reporting.

LAUNCHES = (
    "models of under 2 billion parameters: a token's pass is many short kernels, each launched by the host, and "
    "sampling (top-p) waits for the host; the cost model launches them as one graph"
)
EAGER = "Megatron-LM's inference launches each operation from Python and copies its cache"
CONTEXT = (
    "what was read off the device includes the CUDA context and libraries, 2 to 3 GB that the planner leaves out; "
    "the growth with the batch does not"
)
IN_PLACE = (
    "a cache that is written in a loop over layers counts one and a half times, in the working set; without it "
    "two of the nine that failed would be said to fit, as FasterTransformer's own buffers are larger"
)


def latency_section(answers: Sequence[Answer]) -> Section:
    """Errors by software and model."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for a in answers:
        if a.request.seconds is not None:
            groups.setdefault((a.request.software, a.request.model), []).append(a)
    rows = []
    for (software, model), mine in sorted(groups.items()):
        errors = _errors(mine)
        size = np.abs(errors)
        rank = spearman(*np.array([(a.seconds, a.request.seconds) for a in mine]).T)
        words = (float(size.mean()), float(np.median(size)), f"{errors.mean():+.1%}", float(size.max()), f"{rank:.3f}")
        rows.append((f"{software}, {model}", len(mine), *words))
    columns = ("inference by", "runs", "mean error", "median", "bias", "largest", "rank correlation")
    return Section("Latency of a batch of prompts", columns, tuple(rows), (LAUNCHES, EAGER))


def fit_section(answers: Sequence[Answer]) -> Section:
    """Which runs fit, as measured and as estimated, and their memory."""
    failed = [a for a in answers if a.request.out_of_memory]
    ran = [a for a in answers if a.request.seconds is not None]
    rows: list[tuple[str, int, str]] = [
        ("ran out of memory, said to fit", len(failed), str(sum(a.fits for a in failed))),
        ("ran, said not to fit", len(ran), str(sum(not a.fits for a in ran))),
    ]
    whole, growth = _memory_errors(answers)
    for name, errors in (("memory", whole), ("growth of memory with the batch", growth)):
        if errors:
            off = np.array(errors)
            rows.append((f"{name}, mean error (bias)", len(off), f"{np.abs(off).mean():.1%} ({off.mean():+.1%})"))
    return Section("Memory of inference", ("", "runs", "found"), tuple(rows), (CONTEXT, IN_PLACE))


def inference_bars(answers: Sequence[Answer]) -> list[Bar]:
    """Mean errors of latency by software, false fits, and memory; no run of inference is fitted."""
    bars = []
    for software in dict.fromkeys(a.request.software for a in answers):
        mine = [a for a in answers if a.request.software == software and a.request.seconds is not None]
        if mine:
            why = f"{_worst(mine)}; {LAUNCHES}" if software == "FasterTransformer" else EAGER
            error = float(np.abs(_errors(mine)).mean())
            bars.append(Bar(f"{software}, mean error of latency (left out)", error, LEFT_OUT_BAR, reason=why))
    failed = [a for a in answers if a.request.out_of_memory]
    if failed:
        bars.append(Bar("runs out of memory that are said to fit", float(sum(a.fits for a in failed)), 0.0))
    whole, growth = _memory_errors(answers)
    if whole:
        bars.append(Bar("inference, mean error of memory", float(np.abs(whole).mean()), MEMORY_BAR, reason=CONTEXT))
    if growth:
        name = "inference, mean error of the growth of memory with the batch"
        bars.append(Bar(name, float(np.abs(growth).mean()), MEMORY_BAR, reason=IN_PLACE))
    return bars


def _worst(answers: Sequence[Answer]) -> str:
    """The model with the largest errors in all, and its mean error."""
    by: dict[str, list[Answer]] = {}
    for a in answers:
        by.setdefault(a.request.model, []).append(a)
    model, mine = max(by.items(), key=lambda item: float(np.abs(_errors(item[1])).sum()))
    return f"{model} alone {np.abs(_errors(mine)).mean():.1%} ({len(mine)} runs)"


def _errors(answers: Sequence[Answer]) -> np.ndarray:
    return np.array([a.seconds / a.request.seconds - 1 for a in answers if a.request.seconds])


def _memory_errors(answers: Sequence[Answer]) -> tuple[list[float], list[float]]:
    """Of memory, and of what the largest batch of a model and its lengths takes more than the smallest."""
    whole: list[float] = []
    series: dict[tuple[str, int, int], list[Answer]] = {}
    for a in answers:
        if a.request.memory_bytes:
            whole.append(a.bytes_per_device / a.request.memory_bytes - 1)
            series.setdefault((a.request.model, a.request.input_len, a.request.output_len), []).append(a)
    growth = []
    for mine in series.values():
        # The smallest measured number is the floor: a first run may have allocated for itself once.
        low = min(mine, key=lambda a: a.request.memory_bytes or 0)
        high = max(mine, key=lambda a: a.request.batch)
        if low.request.batch < high.request.batch:
            measured = (high.request.memory_bytes or 0) - (low.request.memory_bytes or 0)
            growth.append((high.bytes_per_device - low.bytes_per_device) / measured - 1)
    return whole, growth
