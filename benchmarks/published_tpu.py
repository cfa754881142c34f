"""Published TPU training runs: their step time against the compiled program's, by roofline, and the planner's own.

    REDCO_LIKE_GROUND_TRUTH=/data/published python benchmarks/published_tpu.py [--quick] [--only TEXT ...]
    REDCO_LIKE_GROUND_TRUTH=/data/published python benchmarks/published_tpu.py --write docs       also the plot

Needs the extra tpu-aot and no TPU; 3 minutes where nothing else runs, `--quick` 4 rows. Every row of
published_runs.csv that trained on TPU v4, v5e or v5p is built as published (sizes, batch, mesh, rematerialisation,
attention, the compiler options of its scripts), compiled for its slices until buffers are assigned, and timed by
`search.roofline.step_seconds`. The planner estimates the same plan with its shipped constants. A row whose
rematerialisation no plan has is left out when the nearest that one has does not fit: it would be another program.

Bars: at least 20 rows, mean absolute error at most 10 % over all of them. The shares of the roofline (0.9 of the peak,
0.85 of the memory bandwidth, 0.5 for attention kernels) were set before the comparison, and nothing is fitted here; its
structure was mended once while these rows were read (links that carry both ways, a network between slices, groups whose
masked blocks are skipped; each has a test). The planner's constants were fitted on these rows among others
(`redco-like validate`), so that its error is not held out.

The gap between the two is split into products, attention kernels, everything else that computes, and waiting by mesh
axes; what makes a part differ (flops, the rate they attain, seconds on the wire) is computed from both sides and
printed, and so is what further slices add to a step, published and estimated. Compiled programs are kept
(`search.compiler.Cache`); --fresh compiles again.

Exits with 1 when a bar is missed, with 2 without the data.
"""

from __future__ import annotations

import argparse
import base64
import collections
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

if TYPE_CHECKING:
    from redco_like.models import ModelConfig
    from redco_like.validation.runs import Run
    from search import Cluster, Plan
    from search.hlo import Module
    from search.roofline import HloTime

VARIABLE = "REDCO_LIKE_GROUND_TRUTH"
LEAST_ROWS, MOST_ERROR = 20, 0.10
TPUS = ("v4", "v5e", "v5p")
QUICK = ("mt-v4-22B-1", "mt-v5e-16B-1", "mt-v5e-128B-2", "mt-v5p-128B-1x256")
SOURCES = ("sharding_rules", "pipelines", "redco_like/models", "redco_like/problem.py", "redco_like/compile_step.py")
"""What the compiled step is made from: part of the key of what is kept."""
COLOURS = {"v4": "#8e6bbf", "v5e": "#2a6fbb", "v5p": "#c44e52"}
SIDES = ("compiled", "analytic")
SHOWN = 0.01
"""A part of the gap is told where it is more than this share of the step."""

OVERLAP = (
    ("xla_tpu_enable_data_parallel_all_reduce_opt", "true"),
    ("xla_tpu_data_parallel_opt_different_sized_ops", "true"),
)
ASYNC = (
    ("xla_tpu_enable_async_collective_fusion", "true"),
    ("xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),
    ("xla_tpu_overlap_compute_collective_tc", "true"),
    ("xla_enable_async_all_gather", "true"),
)
FUSE_GATHER = (("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true"),)
V5P = (
    ("xla_tpu_megacore_fusion_allow_ags", "false"),
    ("xla_enable_async_collective_permute", "true"),
    ("xla_tpu_enable_ag_backward_pipelining", "true"),
)
OPTIONS = {
    "MaxText-v4": (("xla_enable_async_all_gather", "true"),),
    "MaxText-v5e": (*OVERLAP, *ASYNC, *FUSE_GATHER),
    "MaxText-v5p": (*OVERLAP, *ASYNC, *V5P),
    "MaxText-tiering": (*OVERLAP, *ASYNC, *FUSE_GATHER),
}
"""LIBTPU_INIT_ARGS of the scripts, by source of the row (github.com/AI-Hypercomputer/maxtext): MaxText/configs/
1xv4-128.sh at b5947a6, v5e/16b.sh, v5p/128b.sh at 76bd53b, benchmarks/maxtext_v5p_model_configs.py. That of v4 also
asks for TPU_MEGACORE=MEGACORE_DENSE, which is no option of a compile; nothing is known of the row of the docs."""


def config_of(run: Run) -> ModelConfig:
    """The model of a run.

    MaxText's own block of 2023 adds attention and hidden layer of one and the same RMS norm, with ReLU; from that
    summer on it turns queries and keys, and until then its plain attention normalised them (MaxText/layers.py at
    b5947a6, 0012666).
    """
    from redco_like.models import ModelConfig
    from redco_like.models.config import Experts, Latent

    a, m = run.architecture, run.architecture.mla
    own = not a.gated
    experts = Experts(a.experts, a.chosen, a.expert_width, a.shared * a.expert_width, dense_layers=a.dense_layers)
    return ModelConfig(
        family=run.model,
        kind="decoder",
        embed=a.embed,
        layers=a.layers,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=0 if m else a.head_dim,
        mlp=a.mlp,
        vocab=a.vocab,
        max_length=run.seq_len,
        norm="rms",
        block="parallel_one_norm" if own else "pre",
        activation="relu" if own else "silu",
        gated=a.gated,
        tied=a.tied,
        position="none" if own and not run.fused_attention else "rotary",
        qk_norm=own and not run.fused_attention,
        experts=experts if a.experts else None,
        latent=Latent(m.q_rank, m.kv_rank, m.nope, m.rope, m.v) if m else None,
    )


def plan_of(run: Run) -> Plan:
    """The plan of a run: float32 parameters, and slices outermost in its mesh."""
    from redco_like.validation.problems import plan_of

    attention = "fused" if run.fused_attention else "plain"
    return dataclasses.replace(
        plan_of(run), param_dtype="float32", attention=attention, compiler_options=OPTIONS.get(run.source, ())
    )


def group_of(run: Run) -> str:
    slices = run.devices // run.devices_per_node
    own = run.source in ("MaxText-v4", "MaxText-v5e", "MaxText-v5p")
    return f"{run.accelerator}, {'one slice' if slices == 1 else 'several slices'}" if own else run.model


class Rows:
    """Compiles and estimates runs.

    Args:
        fresh: compile what is kept, too.
    """

    def __init__(self, *, fresh: bool) -> None:
        from search.compiler import Cache

        self.cache, self.fresh = Cache(), fresh
        self.sources = _digest()
        self.models: dict[Any, Any] = {}

    def row(self, run: Run) -> dict[str, Any]:
        """One row of the table: times, ratios to the published one and their parts."""
        from redco_like.validation.problems import cluster_of
        from search.hlo import parse
        from search.roofline import step_seconds

        cluster, plan = cluster_of(run), plan_of(run)
        kept = self._compiled(run, cluster, plan)
        out = {
            "row": run.row,
            "group": group_of(run),
            "run": f"{run.model} on {run.devices_per_node} {run.accelerator}",
            "cluster": cluster.name,
            "slices": run.devices // run.devices_per_node,
            "mesh": str(plan.mesh),
            "remat": plan.remat,
            "published_seconds": run.seconds,
            "compile_seconds": kept["seconds"],
        }
        analytic = self._analytic(run, cluster, plan)
        out |= {"analytic_seconds": analytic.pop("total"), "analytic": analytic}
        out["analytic_ratio"] = out["analytic_seconds"] / run.seconds
        if kept["hlo"]:
            module = parse(zlib.decompress(base64.b64decode(kept["hlo"])).decode())
            found = step_seconds(module, cluster, plan.mesh, order=plan.order)
            out |= {"compiled_seconds": found.seconds, "compiled": compiled_parts(module, found, cluster)}
            out["ratio"] = found.seconds / run.seconds
            out["unknown"] = list(found.unknown)
        out["out_of_memory"] = kept["out_of_memory"]
        return out

    def _compiled(self, run: Run, cluster: Cluster, plan: Plan) -> dict[str, Any]:
        from search.compiler import compile_in_child
        from search.topology import target_of, toolchain

        target = target_of(cluster)
        problem = {"model": config_of(run).to_record(), "seq_len": run.seq_len, "global_batch": run.global_batch}
        request = {"plan": plan.to_json(), "cluster": cluster.to_json(), "problem": problem}
        key = {**request, "benchmark": "published_tpu", "versions": toolchain(target), "sources": self.sources}
        kept = None if self.fresh else self.cache.get(key)
        if kept is None:
            compiled = compile_in_child("redco_like.compile_step", request, target, limit_seconds=900)
            kept = {
                "hlo": base64.b64encode(zlib.compress(compiled.hlo.encode())).decode() if compiled.hlo else "",
                "out_of_memory": compiled.out_of_memory[:300],
                "seconds": round(compiled.seconds, 1),
            }
            self.cache.put(key, kept)
        return kept

    def _analytic(self, run: Run, cluster: Cluster, plan: Plan) -> dict[str, Any]:
        """Seconds of the planner, by part, and what they are made of."""
        from redco_like.problem import load_problem
        from search import TracedModel
        from search.costing import candidate
        from search.costing import estimate_plan as estimate

        key = (config_of(run), run.seq_len, run.global_batch, plan.remat, plan.attention)
        if key not in self.models:
            problem = load_problem(config_of(run), seq_len=run.seq_len, global_batch=run.global_batch)
            fused = plan.attention == "fused"
            self.models[key] = TracedModel(
                problem.traced, problem.opt_state, cluster, fused_attention=fused, remats=(plan.remat,)
            )
        model = self.models[key].on(cluster)
        place, columns = candidate(model, plan)
        found = estimate(model, plan)
        kinds = model.costs.compute_by_kind(place, int(columns.remat[0]), plan.microbatches)
        scale = found.seconds["compute"] / sum(kinds.values())  # What runs beside collectives takes longer.
        ops = model.costs.works[plan.remat].ops
        counted: collections.Counter[str] = collections.Counter()
        for op in ops:
            if op.kind in ("dot", "ragged"):
                counted["products"] += 2 * op.batch * op.m * op.n * op.k * op.trips
            elif op.kind in ("conv", "attention"):
                counted["attention" if op.kind == "attention" else "products"] += op.flops * op.trips
        parts = {name: kinds.get(name, 0.0) * scale for name in ("products", "attention")}
        parts["other"] = found.seconds["compute"] - sum(parts.values())
        for name, seconds in found.seconds.items():
            if name.startswith("exposed "):
                parts[name] = seconds
            elif name != "compute":
                parts["other"] += seconds
        return {
            "total": found.seconds_per_step,
            "seconds": parts,
            "flops": {name: flops / run.devices for name, flops in counted.items()},
            "wire": {axis: one["seconds"] for axis, one in found.communication.items()},
        }


def compiled_parts(module: Module, found: HloTime, cluster: Cluster) -> dict[str, Any]:
    """Seconds of a compiled program in the parts that the planner's estimate has, and what they are made of."""
    from search.hlo import products

    compute = collections.Counter(found.compute_seconds)
    parts = {"products": compute["product"] + compute["ragged"], "attention": compute["attention"]}
    parts["other"] = sum(compute.values()) - sum(parts.values())
    parts |= {f"exposed {axes}": seconds for axes, seconds in found.exposed_seconds.items()}
    flops: collections.Counter[str] = collections.Counter()
    wire: collections.defaultdict[str, float] = collections.defaultdict(float)
    for name, times in module.executions().items():
        for op in module.computations[name].ops:
            for made in products(module, op):
                flops["attention" if made.kernel == "attention" else "products"] += made.flops * times
    for taken in found.collectives:
        wire["+".join(taken.collective.axes)] += taken.seconds * taken.collective.times
    return {"seconds": parts, "flops": dict(flops), "wire": dict(wire), "peak": cluster.accelerator.flops("bfloat16")}


def explain(rows: list[dict[str, Any]], every: list[dict[str, Any]]) -> list[str]:
    """Why compiled and analytic seconds of a group differ, a line for every part; what slices add, where there are.

    A gradient that is summed over data and fsdp is one collective to the planner and two to the compiler: these axes
    are compared together.
    """

    def share(side: str, what: str, part: str) -> float:
        return sum(_merged(row[side][what]).get(part, 0.0) / row["published_seconds"] for row in rows) / len(rows)

    def total(side: str, what: str, part: str) -> float:
        return sum(row[side][what].get(part, 0.0) * row["compiled"]["peak"] ** (what == "seconds") for row in rows)

    lines = []
    names = {name for row in rows for side in SIDES for name in _merged(row[side]["seconds"])}
    gaps = {name: share("analytic", "seconds", name) - share("compiled", "seconds", name) for name in sorted(names)}
    for part, gap in sorted(gaps.items(), key=lambda item: -abs(item[1])):
        if abs(gap) < SHOWN:
            continue
        spent = " against ".join(f"{share(side, 'seconds', part):.1%}" for side in reversed(SIDES))
        why = "elementwise work, copies, prefetches that are waited for"
        if part in ("products", "attention"):
            compiled, analytic = (total(side, "flops", part) for side in SIDES)
            rates = [total(s, "flops", part) / (total(s, "seconds", part) or float("inf")) for s in SIDES]
            why = f"{analytic / compiled:.2f} of the flops" if compiled else "flops in no kernel of the program"
            why += f", at {rates[1]:.2f} of the peak against {rates[0]:.2f}"
        elif part.startswith("exposed "):
            wires = [share(side, "wire", part.removeprefix("exposed ")) for side in reversed(SIDES)]
            why = f"{wires[0]:.1%} on the wire, behind compute or not, against {wires[1]:.1%}"
        lines.append(f"{part} {gap:+.1%} of the step ({spent}): {why}")
    return lines + _slices(rows, every)


def _slices(rows: list[dict[str, Any]], every: list[dict[str, Any]]) -> list[str]:
    """How much longer a step takes on several slices than on one."""
    one = {row["run"]: row for row in every if row["slices"] == 1}
    pairs = [(row, one[row["run"]]) for row in rows if row["slices"] > 1 and row["run"] in one]
    lines = []
    for slices in sorted({row["slices"] for row, _ in pairs}):
        some = [pair for pair in pairs if pair[0]["slices"] == slices]
        grown = [
            f"{key.removesuffix('_seconds')} {sum(row[key] / alone[key] - 1 for row, alone in some) / len(some):+.1%}"
            for key in ("published_seconds", "compiled_seconds", "analytic_seconds")
        ]
        lines.append(f"{slices} slices instead of one: {', '.join(grown)}")
    return lines


def _merged(parts: dict[str, float]) -> dict[str, float]:
    """Parts with data and fsdp as one axis."""
    out: dict[str, float] = collections.defaultdict(float)
    for name, value in parts.items():
        head, _, axes = name.rpartition(" ")
        joined = "data, fsdp" if set(axes.split("+")) <= {"data", "fsdp"} else axes
        out[f"{head} {joined}".strip()] += value
    return out


def summary(rows: list[dict[str, Any]], unexpressed: list[str]) -> dict[str, Any]:
    """Errors of both, over all and by group."""

    def errors(some: list[dict[str, Any]], key: str) -> dict[str, float]:
        off = [row[key] - 1 for row in some]
        return {"absolute": round(sum(map(abs, off)) / len(off), 4), "signed": round(sum(off) / len(off), 4)}

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    both = {"compiled": "ratio", "analytic": "analytic_ratio"}
    mean = errors(rows, "ratio")["absolute"]
    return {
        "benchmark": "published_tpu",
        "labels": {"compiled_seconds": "compiled", "analytic_seconds": "analytic", "published_seconds": "measured"},
        "rows": len(rows),
        "left_out": unexpressed,
        "mean_absolute_error": mean,
        "mean_absolute_error_analytic": errors(rows, "analytic_ratio")["absolute"],
        "within_10_percent": sum(abs(row["ratio"] - 1) <= 0.1 for row in rows),
        "groups": {
            name: {"rows": len(some), **{k: errors(some, v) for k, v in both.items()}, "gap": explain(some, rows)}
            for name, some in groups.items()
        },
        "bars": {"rows": LEAST_ROWS, "mean_absolute_error": MOST_ERROR},
        "passed": len(rows) >= LEAST_ROWS and mean <= MOST_ERROR,
        "table": [{k: _rounded(v) for k, v in row.items()} for row in rows],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _digest() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Estimates over published times, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "published_tpu"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 0.19 * len(rows) + 1.4))
    axes.axvspan(0.9, 1.1, color="#eeeeee", zorder=0)
    axes.axvline(1.0, color="#444444", linewidth=1, zorder=1)
    at = {row["row"]: -i for i, row in enumerate(rows)}
    for name, colour in COLOURS.items():
        some = [row for row in rows if row["cluster"].split("*")[-1].startswith(name)]
        y = [at[row["row"]] for row in some]
        axes.scatter([row["ratio"] for row in some], y, s=26, color=colour, label=f"{name}, compiled", zorder=3)
        hollow = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.1}
        axes.scatter([row["analytic_ratio"] for row in some], y, s=26, label=f"{name}, analytic", zorder=2, **hollow)
    axes.set_yticks(list(at.values()), [name.removeprefix("mt-") for name in at], fontsize=7)
    axes.set(ylim=(-len(rows) + 0.2, 0.8), xlabel="estimated over published seconds per step (grey: within 10 %)")
    axes.set_title(f"Step times of {len(rows)} published TPU runs", fontsize=11)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.055), frameon=False)
    axes.grid(axis="y", color="#f3f3f3")
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def main(options: argparse.Namespace) -> int:
    from redco_like.validation.runs import read_runs

    folder = os.environ.get(VARIABLE)
    if not folder or not pathlib.Path(folder, "published_runs.csv").is_file():
        print(f"set {VARIABLE} to the folder of published_runs.csv; it is {folder!r}", file=sys.stderr)
        return 2
    with open(pathlib.Path(folder, "published_runs.csv"), newline="", encoding="utf-8") as file:
        training = {row["row_id"] for row in csv.DictReader(file) if row["kind"] == "train"}
    runs = [run for run in read_runs(folder)[0] if run.accelerator in TPUS and run.row in training]
    if options.quick:
        runs = [run for run in runs if run.row in QUICK]
    runs = [run for run in runs if not options.only or any(text in run.row for text in options.only)]
    made, start = Rows(fresh=options.fresh), time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, run in enumerate(runs, 1):
        row = made.row(run)
        done = f"{number}/{len(runs)} {time.monotonic() - start:4.0f} s  {run.row:30s} {run.seconds:7.2f} s"
        if row["out_of_memory"]:
            ratio = f" (ratio {row['ratio']:.3f})" if "ratio" in row else ""
            left_out.append(f"{run.row}: with remat {row['remat']}, the nearest{ratio}: {row['out_of_memory']}")
            print(f"{done}  {left_out[-1]}", flush=True)
            continue
        rows.append(row)
        print(f"{done}  compiled {row['ratio']:.3f}  analytic {row['analytic_ratio']:.3f} of it", flush=True)
    result = summary(rows, left_out)
    for name, group in result["groups"].items():
        errors = ", ".join(
            f"{k} {group[k]['signed']:+.1%} ({group[k]['absolute']:.1%})" for k in ("compiled", "analytic")
        )
        print(f"\n{name}, {group['rows']} rows: {errors}; analytic less compiled:")
        print("".join(f"  {line}\n" for line in group["gap"]) or "  nothing above 1 % of the step\n", end="")
    if options.write:
        draw(rows, pathlib.Path(options.write) / "published_tpu.svg")
    if options.quick or options.only:
        result["passed"] = result["mean_absolute_error"] <= MOST_ERROR
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 rows")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="rows whose name has one of these")
    parser.add_argument("--fresh", action="store_true", help="compile what was compiled before")
    parser.add_argument("--write", metavar="FOLDER", help="write published_tpu.svg there")
    sys.exit(main(parser.parse_args()))
