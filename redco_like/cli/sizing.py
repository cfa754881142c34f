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

from rich.table import Table
from rich.text import Text

from redco_like.cli import units
from redco_like.cli.options import optional
from redco_like.cli.terminal import Terminal, UsageError, bad_input, write_text

if TYPE_CHECKING:
    from redco_like.cli.plan import Plan
    from redco_like.models import ModelConfig
    from search import Cluster, Space
    from search.serving import Load, Phases, Served, Sizing

SIZING_VERSION = 1
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


@dataclasses.dataclass(frozen=True)
class Change:
    """Something else than what was asked for, what becomes of the same users with it, and about how many fit."""

    what: str
    served: Served | None
    limits_hold: bool
    fitting: int


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
        changes = _changes(load, machine, cluster, sizing) if not _holds(sizing.asked, load) else []
    record = _record(load, machine, cluster, sizing, changes, problem.record())
    if output.out:
        write_text(output.out, json.dumps(record, indent=2) + "\n")
    if output.json:
        terminal.json(record)
    else:
        _show(terminal, name, load, machine, cluster, sizing, changes, phases)
    return 0 if _holds(sizing.asked, load) else 1


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


def _holds(served: Served | None, load: Load) -> bool:
    return served is not None and served.meets(load)


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
        return Change(what, served, _holds(served, load), fitting)

    out: list[Change] = []
    seen = {sizing.asked.mesh.tensor} if sizing.asked else set()
    for served in sizing.by_mesh:
        if served.mesh.tensor not in seen:
            seen.add(served.mesh.tensor)
            fitting = served.about_fitting(machine.budget(cluster))
            out.append(Change(f"tensor {served.mesh.tensor}", served, _holds(served, load), fitting))
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


# What is printed.


def _show(
    terminal: Terminal,
    name: str,
    load: Load,
    machine: Machine,
    cluster: Cluster,
    sizing: Sizing,
    changes: list[Change],
    phases: Phases,
) -> None:
    from redco_like.cli.tables import pairs

    each = machine.cache_bytes(load.context_tokens)
    chip = cluster.accelerator
    wanted = [f"{text} {units.seconds(value)}" for text, value in _limits(load) if value < math.inf]
    header = [
        ("model", f"{name}: {units.many(machine.parameters)} parameters in {machine.dtype}"),
        (
            "load",
            f"{load.users:,} users, {load.context_tokens:,} tokens each: a prompt of {load.prompt_tokens:,}, an answer "
            f"of {load.output_tokens:,}; {units.size(each)} of cache each",
        ),
        ("limits", ", ".join(wanted) or "none given (--slo ttft=500ms,tpot=30ms)"),
        (
            "cluster",
            f"{cluster.name}: {cluster.devices:,} x {chip.name}, {units.size(chip.memory_bytes)} of memory, of which "
            f"{units.size(machine.budget(cluster))} may be used",
        ),
    ]
    terminal.print(pairs(header), "")
    columns = _columns(load, sizing)
    if columns:
        terminal.print(serving_table(columns, load, machine.budget(cluster)), "")
    verdict = _verdict(load, machine, cluster, sizing)
    terminal.print(Text(verdict, style="green" if _holds(sizing.asked, load) else "bold red"), "")
    if changes:
        terminal.print(change_table(load, changes), "")
    if columns:
        terminal.print(pairs(_alone(columns[0][1], load, phases, cluster.devices, machine.budget(cluster))), "")
    terminal.print(
        "[dim]analytic: one copy of the parameters; after each step of decoding, on each replica, one chunk of a prompt"
        " if one waits; caches counted full; users send the next prompt when they have their answer[/]"
    )


def _columns(load: Load, sizing: Sizing) -> list[tuple[str, Served]]:
    """Headings and what stands below: what was asked, and the most, without what would stand there twice."""
    out = [("asked", sizing.asked)] if sizing.asked else []
    if load.limited and sizing.most_meeting:
        out.append(("most within limits", sizing.most_meeting))
    if sizing.most_fitting:
        out.append(("most that fit", sizing.most_fitting))
    seen: dict[int, tuple[str, Served]] = {}
    for heading, served in out:
        if served.users in seen:
            heading = f"{seen[served.users][0]}, {heading}"
        seen[served.users] = heading, served
    return list(seen.values())


def serving_table(columns: list[tuple[str, Served]], load: Load, budget_bytes: float) -> Table:
    """Numbers of users side by side."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("analytic", no_wrap=True, header_style="dim")
    for i, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right", max_width=22, style="green" if i == 0 else "")

    def row(name: str, cell: Callable[[Served], str], style: str = "") -> None:
        table.add_row(
            Text(name, style="dim" if name.startswith(" ") else ""), *(cell(s) for _, s in columns), style=style
        )

    def judged(seconds: float, limit: float) -> str:
        mark = "" if limit == math.inf else " ok" if seconds <= limit else " [bold red]over[/]"
        return units.seconds(seconds) + mark

    largest = max(s.bytes_per_device for _, s in columns)
    row("users", lambda s: f"{s.users:,}", "bold")
    row("mesh", lambda s: "\n".join(f"{axis} {n}" for axis, n in s.mesh.sizes.items() if n > 1) or "one device")
    row("replicas x users", lambda s: f"{s.mesh.batch_shards} x {s.rows // s.mesh.batch_shards:,}")
    row("chunk of a prompt", lambda s: "whole" if s.chunks == 1 else f"{s.chunk_tokens:,} tokens")
    table.add_section()
    row("time to first token", lambda s: judged(s.ttft_seconds, load.ttft_seconds), "bold")
    row("  a prompt alone", lambda s: units.seconds(s.prompt_seconds))
    row("time per token", lambda s: judged(s.tpot_seconds, load.tpot_seconds), "bold")
    row("  no prompt between", lambda s: units.seconds(s.decode_seconds))
    row("  a prompt between", lambda s: units.seconds(s.decode_seconds + s.chunk_seconds))
    row("output tokens/s", lambda s: units.count(s.requests_per_second * load.output_tokens))
    row("prompt tokens/s", lambda s: units.count(s.requests_per_second * load.prompt_tokens))
    table.add_section()
    row("memory", lambda s: units.size(s.bytes_per_device, largest), "bold")
    row("  of usable", lambda s: units.percent(s.bytes_per_device / budget_bytes))
    for part in ("params", "cache", "workspace"):
        row(f"  {part}", lambda s, part=part: units.size(s.memory[part], largest))
    return table


def change_table(load: Load, changes: list[Change]) -> Table:
    """What would become of the same users with something changed."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(f"{load.users:,} users with", no_wrap=True)
    for name in ("fit", "most that fit", "first token", "per token", "output tokens/s", "limits"):
        table.add_column(name, justify="right")
    for change in changes:
        s = change.served
        most = f"about {change.fitting:,}" if change.fitting else "0"
        if s is None:
            table.add_row(change.what, "[red]no[/]", most, "-", "-", "-", "-")
            continue
        table.add_row(
            change.what,
            "yes",
            most,
            units.seconds(s.ttft_seconds),
            units.seconds(s.tpot_seconds),
            units.count(s.requests_per_second * load.output_tokens),
            "-" if not load.limited else "[green]hold[/]" if change.limits_hold else "[red]missed[/]",
        )
    return table


def _limits(load: Load) -> tuple[tuple[str, float], ...]:
    return (("first token within", load.ttft_seconds), ("a token per", load.tpot_seconds))


def _verdict(load: Load, machine: Machine, cluster: Cluster, sizing: Sizing) -> str:
    """One line: whether the users fit, and whether the limits hold."""
    most = f"{sizing.most_fitting.users:,}" if sizing.most_fitting else "0"
    if sizing.most_fitting is None:
        need, have = units.size(sizing.least_bytes), units.size(machine.budget(cluster))
        return f"Not even one user fits: the least is {need} per device, and {have} may be used."
    if sizing.asked is None:
        text = f"{load.users:,} users do not fit: about {most} do"
    else:
        text = f"{load.users:,} users fit, of about {most} at most"
    if not load.limited:
        return text + "."
    if _holds(sizing.asked, load):
        most_meeting = f"{sizing.most_meeting.users:,}" if sizing.most_meeting else "0"
        return f"{text}, and the limits hold; they do up to about {most_meeting} users."
    if sizing.most_meeting is None:
        return f"{text}; the limits hold for no number of users."
    return f"{text}; the limits hold up to about {sizing.most_meeting.users:,}."


def _alone(served: Served, load: Load, phases: Phases, devices: int, budget_bytes: float) -> list[tuple[str, str]]:
    """What either kind of step would rather run on, if it had the cluster for itself."""

    def mesh(found: Any) -> str:
        return " x ".join(f"{axis} {n}" for axis, n in found.sizes.items() if n > 1) or "one device"

    def held(step: Any) -> float:
        return step.params_bytes + step.cache_bytes + step.workspace_bytes

    out = []
    for name, steps, what in (
        ("prompts alone", phases.prefill(1, load.prompt_tokens), "for one prompt at a time"),
        ("decoding alone", _everywhere(phases, served.rows, devices), f"per token of {served.rows:,} rows"),
    ):
        fits = {m: step for m, step in steps.items() if held(step) <= budget_bytes}
        if fits:
            best = min(fits, key=lambda m: fits[m].seconds)
            out.append((name, f"best on {mesh(best)}: {units.seconds(fits[best].seconds)} {what}"))
    return out


def _everywhere(phases: Phases, rows: int, devices: int) -> dict[Any, Any]:
    """Steps of decoding on every mesh that shares out so many rows."""
    from search.space import divisors

    shared = (replicas for replicas in divisors(devices) if rows % replicas == 0)
    return {mesh: step for replicas in shared for mesh, step in phases.decode(replicas, rows).items()}


def _record(
    load: Load,
    machine: Machine,
    cluster: Cluster,
    sizing: Sizing,
    changes: list[Change],
    problem: dict[str, Any],
) -> dict[str, Any]:
    """What `--json` prints and `--out` writes; keys are only ever added."""

    def plain(served: Served | None) -> dict[str, Any] | None:
        if served is None:
            return None
        found = {name: getattr(served, name) for name in ("users", "rows", "chunk_tokens", "decode_seconds")}
        found |= {name: getattr(served, name) for name in ("chunk_seconds", "prompt_seconds", "ttft_seconds")}
        found |= {"tpot_seconds": served.tpot_seconds, "requests_per_second": served.requests_per_second}
        return found | {
            "output_tokens_per_second": served.requests_per_second * load.output_tokens,
            "mesh": served.mesh.sizes,
            "memory": dict(served.memory),
            "bytes_per_device": served.bytes_per_device,
            "limits_hold": served.meets(load),
        }

    def plans(served: Served | None) -> dict[str, Any]:
        if served is None:
            return {"decode": None, "prefill": None}
        made = {"decode": served.decode.plan(), "prefill": served.prefill.plan()}
        return {name: json.loads(plan.to_json()) for name, plan in made.items()}

    given = {name: value if value < math.inf else None for name, value in _limits_by_name(load).items()}
    return {
        "version": SIZING_VERSION,
        "label": "analytic",
        "problem": {
            "model": problem["model"],
            "cluster": problem["cluster"],
            "dtype": machine.dtype,
            "parameters": machine.parameters,
            "devices": cluster.devices,
            "users": load.users,
            "context_tokens": load.context_tokens,
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            **given,
        },
        "cache_bytes_per_user": machine.cache_bytes(load.context_tokens),
        "usable_bytes": machine.budget(cluster),
        "fits": sizing.asked is not None,
        "limits_hold": _holds(sizing.asked, load),
        "asked": plain(sizing.asked),
        "most_within_limits": plain(sizing.most_meeting) if load.limited else None,
        "most_that_fit": plain(sizing.most_fitting),
        "changes": [{"what": c.what, "most_that_fit": c.fitting, "served": plain(c.served)} for c in changes],
        "plans": plans(sizing.asked or sizing.most_meeting or sizing.most_fitting),
    }


def _limits_by_name(load: Load) -> dict[str, float]:
    return {"ttft_seconds": load.ttft_seconds, "tpot_seconds": load.tpot_seconds}
