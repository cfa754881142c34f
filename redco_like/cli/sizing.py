"""`redco-like plan --task serve`: how many users a cluster serves, and how soon they see their tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from redco_like.cli.options import optional
from redco_like.cli.sizing_tables import Change, holds, show, sizing_record
from redco_like.cli.terminal import Terminal, UsageError, bad_input, write_text

if TYPE_CHECKING:
    from redco_like.cli.plan import Plan
    from redco_like.models import ModelConfig
    from search import Cluster, Space
    from search.serving import Load, Phases, Sizing

OUTPUT_TOKENS = 256
WORK = {"prefill": "{rows} prompts", "decode": "a token for {rows} rows"}
NARROW = "float8_e4m3fn"
"""Of a cache with a byte per number."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """What --task serve sizes; the other tasks take none of these."""

    users: Annotated[int | None, optional("N")] = None
    """Requests at once."""
    context: Annotated[int | None, optional("N", "the model's longest")] = None
    """Tokens of a request, prompt and answer together."""
    output_tokens: Annotated[int | None, optional("N", f"{OUTPUT_TOKENS}, at most half the context")] = None
    """Tokens of an answer."""
    slo: Annotated[str | None, optional("LIMITS", "none")] = None
    """Most time to the first token and per token after it: ttft=500ms,tpot=30ms."""
    chunk_tokens: Annotated[int | None, optional("N", "what suits best")] = None
    """Tokens of a prompt that are read between two steps of decoding."""

    def check(self, task: str) -> None:
        """Raise a UsageError for what means nothing, before any work is done."""
        given = [name for name, value in dataclasses.asdict(self).items() if value is not None]
        if task != "serve":
            if given:
                raise UsageError(f"--{given[0].replace('_', '-')} is for --task serve, not for --task {task}")
            return
        if self.users is None:
            raise UsageError("--task serve sizes for a number of users: give --users, such as --users 64")
        for name in given:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}; a whole number from 1 up")
        limits(self.slo)


def limits(text: str | None) -> tuple[float, float]:
    """Read the limits: seconds to the first token and per token, inf where there is none.

    >>> limits("ttft=500ms,tpot=0.03s")
    (0.5, 0.03)

    Raises:
        UsageError: an unknown name, a name twice, no time.
    """
    found: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", value)
        if name not in ("ttft", "tpot") or not match or not float(match[1]):
            raise UsageError(f"--slo {text}: write ttft=500ms,tpot=30ms, or one of the two, with a unit (ms or s)")
        if name in found:
            raise UsageError(f"--slo {text}: {name} twice")
        found[name] = float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)
    return found.get("ttft", math.inf), found.get("tpot", math.inf)


class Machine:
    """A model on clusters: its steps of prefill and decoding, traced once for every size."""

    def __init__(self, config: ModelConfig, options: Plan, tell: Callable[[str], None]):
        import jax

        from pipelines.problem import abstract_init, cast_floats
        from redco_like.models import build_model

        self.options, self.tell, self.dtype = options, tell, options.problem.dtype
        self.model: Any = build_model(config, dtype=self.dtype)
        values = abstract_init(self.model.loss_fn, self.model.init_fn, "float32")
        self.params = cast_floats(values.params, self.dtype)
        self.parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(values.params))
        self._trace = functools.cache(self._traced)
        self._known: dict[tuple[Any, ...], Any] = {}

    def cache_bytes(self, length: int, dtype: str | None = None) -> int:
        """Of one user."""
        import jax

        cache = jax.eval_shape(lambda: self.model.init_cache(1, length, dtype))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))

    def phases(self, cluster: Cluster, context: int, cache_dtype: str | None = None) -> Phases:
        """Steps on a cluster, their caches `context` long."""
        from search.serving import Phases

        budget = self.budget(cluster)

        def steps(task: str, replicas: int, rows: int, length: int, dtype: str | None, within_bytes: float) -> Any:
            from search.serving import steps_of

            key = (cluster.name, task, rows, length, dtype)
            if (key, replicas) not in self._known:
                if key not in self._known:
                    self._known[key] = self._space(cluster, task, rows, length, dtype)
                self.tell(f"{cluster.name}: {WORK[task].format(rows=rows)}, {replicas} replicas")
                self._known[key, replicas] = steps_of(self._known[key], replicas, within_bytes=within_bytes)
            return self._known[key, replicas]

        return Phases(
            decode=lambda replicas, rows: steps("decode", replicas, rows, context, cache_dtype, budget),
            # The cache that is sized is no part of it.
            prefill=lambda replicas, tokens: steps("prefill", replicas, replicas, tokens, None, math.inf),
        )

    def budget(self, cluster: Cluster) -> float:
        """Bytes of a device that may be used."""
        from search.space import memory_share

        share = self.options.search.memory_share or memory_share(cluster.accelerator)
        return share * cluster.accelerator.usable_memory_bytes

    def _traced(self, task: str, rows: int, length: int, cache_dtype: str | None) -> Any:
        import jax
        import jax.numpy as jnp

        from sharding_rules import trace

        cache = jax.eval_shape(lambda: self.model.init_cache(rows, length, cache_dtype))
        batch = {"tokens": jax.ShapeDtypeStruct((rows, length if task == "prefill" else 1), jnp.int32)}
        if task == "decode":
            batch["position"] = jax.ShapeDtypeStruct((), jnp.int32)

        def step(params: Any, batch: Any, state: Any) -> Any:
            position = (batch["position"],) if task == "decode" else ()
            return getattr(self.model, task)(params, batch["tokens"], state, *position)

        return trace(step, self.params, batch, cache, names=("params", "batch", "state"))

    def _space(self, cluster: Cluster, task: str, rows: int, length: int, cache_dtype: str | None) -> Space:
        from redco_like.cli import planning
        from search import Space, TracedModel
        from search.attention import axes_without_kernel, runs_as_kernel

        traced, search = self._trace(task, rows, length, cache_dtype), self.options.search
        wanted = self.options.problem.attention
        fused = wanted == "fused" or (wanted is None and (task == "decode" or runs_as_kernel(traced)))
        model = TracedModel(
            traced,
            None,
            cluster,
            param_dtype=self.dtype,
            fused_attention=cluster.accelerator.kind != "cpu" and fused,
            remats=("none",),
            training=False,
        )
        chosen = planning.constraints(search)
        whole = axes_without_kernel(cluster.accelerator.kind, model.plan_fields["attention"])
        with bad_input():
            return Space(
                model,
                cluster,
                fix={name: value for name, value in chosen.fix.items() if name not in whole},
                forbid=tuple(dict.fromkeys((*chosen.forbid, *whole))),
                max_microbatch=search.max_microbatch,
                memory_share=search.memory_share or 0.0,
            )


def run(options: Plan, terminal: Terminal) -> int:
    """Size, print, and write what was asked for."""
    problem, output = options.problem, options.output
    for name, given in (
        ("seq-len, say --context", problem.seq_len),
        ("global-batch, say --users", problem.global_batch),
        ("report", output.report),
        ("verify", output.verify),
        ("allow-planned", options.search.allow_planned),
        ("time-limit", options.search.time_limit),
    ):
        if given:
            raise UsageError(f"--task serve takes no --{name}")
    with terminal.progress(f"reading {problem.cluster}") as tell:
        from search import parse_cluster
        from search.serving import size

        with bad_input():
            cluster = parse_cluster(problem.record()["cluster"])
            config, name = _config(problem.record()["model"])
            machine = Machine(config, options, tell)
            load = _load(options.serving, machine)
            machine.cache_bytes(load.context_tokens)  # decoders have one
        phases, budget = machine.phases(cluster, load.context_tokens), machine.budget(cluster)
        sizing = size(load, phases, devices=cluster.devices, budget_bytes=budget)
        if sizing.least_bytes == math.inf:
            raise UsageError(f"no mesh of {cluster.devices} devices suits {name} and the constraints")
        changes = _changes(load, machine, cluster, sizing) if not holds(sizing.asked, load) else []
    record = sizing_record(load, machine, cluster, sizing, changes, problem.record())
    if output.out:
        write_text(output.out, json.dumps(record, indent=2) + "\n")
    if output.json:
        terminal.json(record)
    else:
        show(terminal, name, load, machine, cluster, sizing, changes, phases)
    return 0 if holds(sizing.asked, load) else 1


def _config(model: str) -> tuple[ModelConfig, str]:
    import pathlib

    from redco_like.models import architecture, architectures, read_config

    path = pathlib.Path(model).expanduser()
    if model not in architectures() and (path.suffix == ".json" or path.is_dir()):
        path = path / "config.json" if path.is_dir() else path
        return read_config(path), path.parent.name or path.stem
    if path.suffix == ".py":
        raise ValueError(f"{model}: --task serve is for decoders by name or config.json; a run file is trained")
    return architecture(model), model


def _load(serving: Serving, machine: Machine) -> Load:
    from search.serving import Load

    context = machine.model.check_length(serving.context)
    ttft, tpot = limits(serving.slo)
    return Load(
        users=serving.users or 1,
        context_tokens=context,
        output_tokens=serving.output_tokens or max(1, min(OUTPUT_TOKENS, context // 2)),
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        chunk_tokens=serving.chunk_tokens or 0,
    )


def _changes(load: Load, machine: Machine, cluster: Cluster, sizing: Sizing) -> list[Change]:
    """What would help, each thing alone."""
    from search.serving import about_fitting, serve

    if base := sizing.asked or sizing.most_fitting:
        load = dataclasses.replace(load, chunk_tokens=base.chunk_tokens)

    def change(what: str, load: Load = load, cluster: Cluster = cluster, dtype: str | None = None) -> Change:
        phases, budget = machine.phases(cluster, load.context_tokens, dtype), machine.budget(cluster)
        fitting = about_fitting(phases, devices=cluster.devices, budget_bytes=budget)
        served = None
        if fitting * 1.25 >= load.users:
            served = serve(load, phases, devices=cluster.devices, budget_bytes=budget)
        return Change(what, served, holds(served, load), fitting)

    out: list[Change] = []
    seen = {sizing.asked.mesh.tensor} if sizing.asked else set()
    for served in sizing.by_mesh:
        if served.mesh.tensor not in seen:
            seen.add(served.mesh.tensor)
            fitting = served.about_fitting(machine.budget(cluster))
            out.append(Change(f"tensor {served.mesh.tensor}", served, holds(served, load), fitting))
    out.append(change("8-bit cache (lossy, not run yet)", dtype=NARROW))
    half = load.context_tokens // 2
    if load.output_tokens < half:
        out.append(change(f"context of {half:,}", dataclasses.replace(load, context_tokens=half)))
    for times in (2, 4):
        larger = grown(cluster, times)
        if larger is not None:
            out.append(change(f"{larger.name}, {times} times the devices", cluster=larger))
            if out[-1].limits_hold:
                break
    return out


def grown(cluster: Cluster, times: int) -> Cluster | None:
    """The same kind of cluster with so many times the devices, by its name; None where there is none.

    >>> from search import parse_cluster
    >>> [grown(parse_cluster(name), 2).name for name in ("8xH100", "2xH100", "v5e-16", "v5p:2x2x4", "2*v5e-4")]
    ['2x8xH100', '4xH100', 'v5e-32', 'v5p:2x4x4', '4*v5e-4']
    """
    from search import parse_cluster

    name = cluster.name
    tries = []
    if match := re.fullmatch(r"(\d+)\*(.+)", name):
        tries.append(f"{int(match[1]) * times}*{match[2]}")
    elif match := re.fullmatch(r"(\d+)x(\d+)x(\D.*)", name):
        tries.append(f"{int(match[1]) * times}x{match[2]}x{match[3]}")
    elif match := re.fullmatch(r"(\d+)x(\D.*)", name):
        full = cluster.accelerator.devices_per_node
        total = int(match[1]) * times
        tries.append(f"{total}x{match[2]}" if total <= full else f"{total // full}x{full}x{match[2]}")
    elif match := re.fullmatch(r"([^:]+):([\dx]+)", name):
        dims = [int(d) for d in match[2].split("x")]
        for _ in range(int(math.log2(times))):
            at = dims.index(min(dims))
            at = max(i for i, d in enumerate(dims) if d == dims[at])
            dims[at] *= 2
        tries.append(f"{match[1]}:{'x'.join(map(str, sorted(dims)))}")
    elif match := re.fullmatch(r"(.+)-(\d+)", name):
        tries += [f"{match[1]}-{int(match[2]) * times}", f"{times}*{name}"]
    for text in tries:
        with contextlib.suppress(ValueError):
            found = parse_cluster(text)
            if found.devices == times * cluster.devices:
                return found
    return None
