"""Bytes per device of a training step: the planner's count against the compilers', over models, plans and clusters.

    python benchmarks/memory_accuracy.py [--quick] [--only TEXT ...]        about 20 minutes; 6 cases, one minute
    python benchmarks/memory_accuracy.py --write docs                       also the table and the plot

It needs the extras tpu-aot and gpu-aot, and no TPU and no GPU. The step is the trainer's own, with Adam and float32
parameters (`memory_cases`). TPU bytes are those that the compiler holds against the device's limit: the total of the
default memory space once buffers are assigned, or what it says it lacks. GPU bytes are arguments, outputs and
temporaries, less what outputs share with arguments.

Bars: mean absolute error 6 %; no plan that counts as fitting (`search.space.memory_share`) is over the device's memory.
What was compiled is kept (`search.compiler.Cache`); --fresh compiles again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
sys.path[:0] = FOLDERS

from memory_cases import CASES, QUICK, Case, analytic, program_of  # noqa: E402

MOST_ERROR = 0.06
SOURCES = ("sharding_rules", "pipelines", "redco_like/models", "tests/zoo", "benchmarks/memory_cases.py")
"""What the compiled step is made from: part of the key of what is kept."""
COLOURS = {"v5e": "#2a6fbb", "v5p": "#c44e52", "v6e": "#e1a02a", "H100": "#3a923a"}


def child(path: str) -> None:
    """Compile one case; of a TPU compile, ended by the parent when the buffers are assigned."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    from search import parse_cluster
    from search.topology import open_devices, target_of

    case = Case(**json.loads(pathlib.Path(path).read_text("utf-8")))
    program = program_of(case, open_devices(target_of(parse_cluster(case.cluster))))
    print(json.dumps({"event": "lowered"}), flush=True)
    print(json.dumps({"event": "compiled", "bytes": program.compiled_bytes_per_device}), flush=True)


def compiled_bytes(case: Case, cache: Any, sources: str) -> int:
    """Bytes per device by the compiler."""
    from search import parse_cluster
    from search.compiler import compile_in_child
    from search.topology import target_of, toolchain

    target = target_of(parse_cluster(case.cluster))
    request = dataclasses.asdict(case)
    key = {"benchmark": "memory_accuracy", **request, "versions": toolchain(target), "sources": sources}
    kept = cache.get(key) if cache is not None else None
    if kept is None:
        compiled = compile_in_child("memory_accuracy", request, target, limit_seconds=600)
        kept = {"bytes": _bytes_of(compiled)}
        if cache is not None:
            cache.put(key, kept)
    return kept["bytes"]


def _bytes_of(compiled: Any) -> int:
    if compiled.out_of_memory:
        needed = re.search(r"\(([\d.]+)([MGT])\) exceeds", compiled.out_of_memory)
        if needed is None:
            raise RuntimeError(f"how much is needed? {compiled.out_of_memory[:500]}")
        return int(float(needed[1]) * 2.0 ** {"M": 20, "G": 30, "T": 40}[needed[2]])
    total = re.search(r"^Memory Space: default.*\nTotal bytes:\s*(\d+)", compiled.memory_report, re.MULTILINE)
    return int(total[1]) if total else int(compiled.said["bytes"])


def _sources() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _mean(errors: list[float]) -> float:
    return round(sum(map(abs, errors)) / max(1, len(errors)), 4)


def _row(case: Case, cache: Any, sources: str) -> dict[str, Any]:
    from search import parse_cluster

    estimate = analytic(case)
    needed = compiled_bytes(case, cache, sources)
    usable = parse_cluster(case.cluster).accelerator.usable_memory_bytes
    return {
        **dataclasses.asdict(case),
        "analytic_bytes": estimate.bytes_per_device,
        "compiled_bytes": needed,
        "error": round(estimate.bytes_per_device / needed - 1, 4),
        "usable_bytes": int(usable),
        "fits_analytic": estimate.fits,
        "fits_compiled": needed <= usable,
        "held_out": case.held_out,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors as a whole and by cluster, and whether the bars are met."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["cluster"], []).append(row)
    by_cluster = {}
    for name, some in groups.items():
        errors = [row["error"] for row in some]
        ratios = [row["compiled_bytes"] / row["analytic_bytes"] for row in some]
        by_cluster[name] = {
            "cases": len(some),
            "mean_absolute_error": _mean(errors),
            "least": min(errors),
            "most": max(errors),
            "mean_ratio": round(sum(ratios) / len(ratios), 4),
            "most_ratio": round(max(ratios), 4),
        }
    wrong = [Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)}).name for row in rows if _false_fit(row)]
    mean = _mean([row["error"] for row in rows])
    return {
        "benchmark": "memory_accuracy",
        "labels": {"analytic_bytes": "analytic", "compiled_bytes": "compiled"},
        "machine": platform.processor() or "cpu",
        "cases": len(rows),
        "mean_absolute_error": mean,
        "mean_absolute_error_held_out": _mean([row["error"] for row in rows if row["held_out"]]),
        "by_cluster": by_cluster,
        "called_fitting": sum(row["fits_analytic"] for row in rows),
        "called_fitting_and_above_three_quarters": sum(
            row["fits_analytic"] and row["compiled_bytes"] > 0.75 * row["usable_bytes"] for row in rows
        ),
        "called_fitting_but_over": wrong,
        "bars": {"mean_absolute_error": MOST_ERROR, "called_fitting_but_over": 0},
        "passed": sum(abs(row["error"]) for row in rows) <= MOST_ERROR * len(rows) and not wrong,
    }


def _false_fit(row: dict[str, Any]) -> bool:
    return row["fits_analytic"] and not row["fits_compiled"]


def ratios(rows: list[dict[str, Any]]) -> str:
    """What the planner keeps of the table: compiled over analytic bytes by accelerator.

    Of programs that take at least half of the memory: those that may not fit are of that kind.
    """
    from search import parse_cluster

    found: dict[str, list[float]] = {}
    for row in rows:
        if row["compiled_bytes"] >= row["usable_bytes"] / 2:
            name = parse_cluster(row["cluster"]).accelerator.name
            found.setdefault(name, []).append(row["compiled_bytes"] / row["analytic_bytes"])
    lines = [
        "# Compiled over analytic bytes per device of training steps that take half of the memory or more.",
        "# Written by benchmarks/memory_accuracy.py --write; read by search.space.memory_share.",
    ]
    for name, some in sorted(found.items()):
        mean = sum(some) / len(some)
        lines += ["", f"[{name}]", f"cases = {len(some)}", f"mean = {mean:.3f}", f"most = {max(some) + 5e-4:.3f}"]
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """The table as CSV and the plot as SVG; and what the planner keeps of it."""
    (ROOT / "search" / "memory_ratios.toml").write_text(ratios(rows))
    with (folder / "memory_accuracy.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "memory_accuracy"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 5.6))
    gib = 2.0**30
    sizes = [row[key] / gib for row in rows for key in ("analytic_bytes", "compiled_bytes")]
    low, high = min(sizes) / 1.3, max(sizes) * 1.3
    axes.plot([low, high], [low, high], color="#444444", linewidth=1, label="equal")
    axes.fill_between([low, high], [low / 1.06, high / 1.06], [low * 1.06, high * 1.06], color="#dddddd", label="±6 %")
    for name, colour in COLOURS.items():
        some = [row for row in rows if name in row["cluster"]]
        if not some:
            continue
        for held_out, marker in ((False, "o"), (True, "^")):
            points = [row for row in some if row["held_out"] == held_out]
            x, y = ([row[key] / gib for row in points] for key in ("compiled_bytes", "analytic_bytes"))
            label = name if not held_out else f"{name}, held-out models"
            axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.8, linewidths=0, label=label, zorder=3)
        limit = some[0]["usable_bytes"] / gib
        axes.axvline(limit, color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("compiled, GiB per device (dotted: usable memory)")
    axes.set_ylabel("analytic, GiB per device")
    axes.set_title(f"Memory of a training step: {len(rows)} cases")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(folder / "memory_accuracy.svg", metadata={"Date": None})
    figure.savefig(folder / "memory_accuracy.png", dpi=120) if os.environ.get("MEMORY_ACCURACY_PNG") else None


def main(options: argparse.Namespace) -> int:
    from search.compiler import Cache

    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    cases = [CASES[i] for i in QUICK] if options.quick else CASES
    cases = [case for case in cases if not options.only or any(text in case.name for text in options.only)]
    cache, sources = None if options.fresh else Cache(), _sources()
    start, rows = time.monotonic(), []
    for number, case in enumerate(cases, 1):
        row = _row(case, cache, sources)
        rows.append(row)
        sizes = f"analytic {row['analytic_bytes'] / 2**30:6.2f}  compiled {row['compiled_bytes'] / 2**30:6.2f} GiB"
        over = "" if row["fits_compiled"] else "  OVER" + (", called fitting" if row["fits_analytic"] else "")
        done = f"{number}/{len(cases)} {time.monotonic() - start:4.0f} s"
        print(f"{done}  {sizes}  {row['error']:+6.1%}  {case.name}{over}", flush=True)
    if options.write:
        write(rows, pathlib.Path(options.write))
    result = summary(rows)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        child(sys.argv[1])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 cases")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose name has one of these")
    parser.add_argument("--fresh", action="store_true", help="compile what was compiled before")
    parser.add_argument("--write", metavar="FOLDER", help="write memory_accuracy.csv and memory_accuracy.svg there")
    sys.exit(main(parser.parse_args()))
