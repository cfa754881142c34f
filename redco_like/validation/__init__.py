"""The cost model against published runs: fit its few constants on some, estimate all, and say how far it is off.

    report = validate("/data/published")         # a folder with published_runs.csv; default $REDCO_LIKE_GROUND_TRUTH
    report.missed                                # the bars that the cost model misses, with reasons
    print(report.to_json()); report.plot("validation.png")

The runs are not part of this repository. Groups of those who measured are the unit of the split: constants are fitted
on `FITTED` and on every second other group by name (the second, the fourth ...); the rest is left out.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from redco_like.validation import fit as fitting
from redco_like.validation.amp import crashed_section, read_amp
from redco_like.validation.fit import Fitted
from redco_like.validation.inference import answer, fit_section, inference_bars, latency_section, read_requests
from redco_like.validation.memory import compare_plans, memory_bars, memory_section
from redco_like.validation.problems import Problem, Problems
from redco_like.validation.rankings import Ranking, read_vtrain, regret, spearman
from redco_like.validation.report import (
    FITTED_BAR,
    LEFT_OUT_BAR,
    MEMORY_BAR,
    REGRET_BAR,
    SPEARMAN_BAR,
    Bar,
    Errors,
    Point,
    RankErrors,
    Section,
    Split,
    ValidationReport,
    errors,
)
from redco_like.validation.runs import Run, read_runs
from search import find_accelerator
from search.efficiency import Efficiency, Framework
from sharding_rules import PlanError

FOLDER_VARIABLE = "REDCO_LIKE_GROUND_TRUTH"
FITTED = ("mosaicml", "nvidia-megatron", "google-maxtext")
DIFFERENT = 0.02
"""Measured times of two plans that differ by less are not told apart."""
WHY = {
    "Pythia-T5": "times are hours of whole runs by steps, with evaluation, checkpoints and restarts: upper bounds",
    "Megatron-Bridge": "runs of one plan differ by up to 2 times with the release (kernels, CUDA graphs), and no run "
    "on most of these accelerators is fitted",
    "NeMo-24.07": "products and attention in 8 bits attain more with Transformer Engine than the fitted runs do",
    "vTrain 18.4B on 256 A100": "plans with tensor=4 and stage=2 took 9 to 17 % longer than estimated, those with "
    "tensor=8 and one stage did not; why is not known",
}


def validate(
    folder: str | pathlib.Path | None = None,
    *,
    fit: bool = True,
    progress: Callable[[str], None] | None = None,
    plot: str | pathlib.Path | None = None,
) -> ValidationReport:
    """Estimate published runs and compare.

    Args:
        folder: with published_runs.csv, and optionally vtrain/, amp/ and galvatron/; default
            `$REDCO_LIKE_GROUND_TRUTH`.
        fit: fit the constants on the runs; otherwise those of `search/efficiencies.toml` hold.
        progress: is told what happens, whenever that changes.
        plot: file for the scatter plot.

    Raises:
        ValueError: no folder is named, or it has no published_runs.csv.
    """
    tell = progress or (lambda _: None)
    runs, skipped_rows = read_runs(_folder(folder))
    rankings = [*read_vtrain(_folder(folder)), *read_amp(_folder(folder))]
    split = split_groups({run.group for run in runs} | {row.group for row in skipped_rows})
    skipped = collections.Counter(f"{row.group}: {row.reason}" for row in skipped_rows)
    tell(f"tracing the models of {len(runs)} runs")
    problems, maker = [], Problems()
    for run in runs:
        try:
            problems.append(maker.of(run))
        except PlanError as error:
            skipped[f"{run.group}: {error}"] += 1
    chosen = [p for p in problems if split[p.run.group] == "fitted"]
    fitted = fitting.fit(chosen, progress=tell) if fit else None
    efficiency = _Constants(fitted)
    tell("estimating")
    points = tuple(_point(p, split[p.run.group], efficiency) for p in problems)
    ranked = [(r, [maker.of(run) for run in r.runs]) for r in rankings]
    orders = tuple(_rank(r, mine, efficiency) for r, mine in ranked)
    groups = _by(points, lambda p: p.group)
    schedules = _schedules(points)
    memory = _memory(problems, points)
    sections, more_bars = _others(_folder(folder), efficiency, skipped, tell)
    report = ValidationReport(
        points=points,
        skipped=dict(skipped),
        groups=groups,
        sources=_by(points, lambda p: f"{p.source} {p.accelerator}" + ("" if p.dense else " experts")),
        memory=memory,
        rankings=orders,
        schedules=schedules,
        constants=tuple((*key, v, *fitted.intervals[key]) for key, v in fitted.values.items()) if fitted else (),
        bars=(*_time_bars(groups, points), *_other_bars(memory, orders, schedules), *more_bars),
        constants_file=fitted.to_toml() if fitted else "",
        sections=tuple(sections),
    )
    if plot is not None:
        report.plot(plot)
    return report


def split_groups(groups: set[str]) -> dict[str, Split]:
    """Which groups are fitted: `FITTED`, and every second of the others by name.

    >>> sorted(split_groups({"mosaicml", "a", "b", "c"}).items())
    [('a', 'left out'), ('b', 'fitted'), ('c', 'left out'), ('mosaicml', 'fitted')]
    """
    others = sorted(groups - set(FITTED))
    fitted = set(FITTED) | set(others[1::2])
    return {group: "fitted" if group in fitted else "left out" for group in groups}


def _folder(folder: str | pathlib.Path | None) -> pathlib.Path:
    found = folder or os.environ.get(FOLDER_VARIABLE)
    if not found:
        raise ValueError(
            f"no published runs: name their folder, or set {FOLDER_VARIABLE} to one that has published_runs.csv"
        )
    return pathlib.Path(found)


class _Constants:
    """The constants that a run is estimated with."""

    def __init__(self, fitted: Fitted | None):
        self._fitted = fitted
        self._made: dict[tuple[str, str], Efficiency] = {}

    def __call__(self, run: Run) -> Efficiency:
        return self.of(run.accelerator, run.framework)

    def of(self, accelerator: str, framework: Framework) -> Efficiency:
        key = (accelerator, framework)
        if key not in self._made:
            if self._fitted is not None:
                self._made[key] = self._fitted.efficiency(*key)
            else:
                self._made[key] = Efficiency.for_accelerator(find_accelerator(accelerator), framework)
        return self._made[key]


def _others(
    folder: pathlib.Path, efficiency: _Constants, skipped: collections.Counter[str], tell: Callable[[str], None]
) -> tuple[list[Section], list[Bar]]:
    """Inference, and memory plan by plan; what they leave out replaces the rows of inference in `skipped`."""
    for reason in [r for r in skipped if r.endswith(": inference")]:
        del skipped[reason]
    requests, left = read_requests(folder)
    skipped.update(left)
    sections: list[Section] = []
    bars: list[Bar] = []
    if requests:
        tell(f"estimating {len(requests)} runs of inference")
        answers = answer(requests, efficiency.of)
        sections += [latency_section(answers), fit_section(answers)]
        bars += inference_bars(answers)
    if crashed := crashed_section(folder):
        sections.append(crashed)
    if plans := compare_plans(folder):
        sections.append(memory_section(plans))
        bars += memory_bars(plans)
    return sections, bars


def _point(problem: Problem, split: Split, efficiency: _Constants) -> Point:
    run = problem.run
    estimate = problem.seconds(efficiency(run))
    parts = problem.parts(efficiency(run))
    total = sum(parts.values())
    bytes_ = problem.bytes_per_device()
    return Point(
        row=run.row,
        source=run.source,
        group=run.group,
        split=split,
        model=run.model,
        case=f"vocab {run.architecture.vocab}, length {run.seq_len}, batch {run.global_batch}",
        accelerator=run.accelerator,
        devices=run.devices,
        plan=_plan_words(run),
        dense=run.dense,
        seconds=run.seconds,
        estimate=estimate,
        memory_bytes=run.memory_bytes,
        memory_estimate=bytes_,
        fits=bytes_ <= find_accelerator(run.accelerator).usable_memory_bytes,
        parts={name: round(seconds / total, 4) for name, seconds in parts.items()},
        doubt=run.doubt,
    )


def _plan_words(run: Run) -> str:
    sizes = {axis: getattr(run, axis) for axis in ("data", "fsdp", "stage", "expert", "context", "tensor")}
    words = [f"{axis}={n}" for axis, n in sizes.items() if n > 1]
    words += ["sequence"] * run.sequence + [f"chunks={run.chunks}"] * (run.chunks > 1)
    words += ["uneven"] * bool(run.layers_per_stage) + ["vocab=spread"] * run.spread_vocab
    words += [f"microbatches={run.microbatches}", f"remat={run.remat}", run.product_dtype]
    return " ".join(words)


def _by(points: Sequence[Point], name: Callable[[Point], str]) -> tuple[Errors, ...]:
    groups: dict[tuple[Split, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.split, name(point)), []).append(point)
    return tuple(errors(label, split, groups[split, label]) for split, label in sorted(groups))


def _rank(ranking: Ranking, problems: Sequence[Problem], efficiency: _Constants) -> RankErrors:
    estimates = np.array([p.seconds(efficiency(p.run)) for p in problems])
    measured = np.array([p.run.seconds for p in problems])
    error = float(np.abs(estimates / measured - 1).mean())
    source = problems[0].run.source.split()[0]
    return RankErrors(
        f"{source} {ranking.name}", len(problems), regret(estimates, measured), spearman(estimates, measured), error
    )


def _schedules(points: Sequence[Point]) -> tuple[tuple[str, int, int], ...]:
    """Pairs of schedules of one model and one vocabulary in the right order, by source.

    Two plans that the cost model cannot tell apart (one or two barriers of vocabulary parallelism) are no pair, and
    neither are two whose measured times differ by less than `DIFFERENT`.
    """
    out = []
    for source in dict.fromkeys(p.source for p in points if p.source.startswith("VocabPP")):
        groups: dict[str, list[Point]] = {}
        for point in points:
            if point.source == source:
                groups.setdefault(point.case, []).append(point)
        right = pairs = 0
        for mine in groups.values():
            for i, a in enumerate(mine):
                for b in mine[:i]:
                    if a.plan == b.plan or abs(a.seconds / b.seconds - 1) < DIFFERENT:
                        continue
                    pairs += 1
                    right += (a.estimate < b.estimate) == (a.seconds < b.seconds)
        out.append((f"{source} schedules", right, pairs))
    return tuple(out)


def _memory(problems: Sequence[Problem], points: Sequence[Point]) -> dict[str, tuple[float, int]]:
    """Mean absolute error of memory by group and by what was measured."""
    found: dict[str, list[float]] = {}
    for problem, point in zip(problems, points, strict=True):
        if point.memory_bytes:
            kind = problem.run.memory_kind
            what = "reserved" if "RESERVED" in kind else "allocated" if "allocated" in kind else "compiler"
            found.setdefault(f"{point.group} {what}", []).append(abs(point.memory_error))
    return {name: (float(np.mean(e)), len(e)) for name, e in found.items()}


def _time_bars(groups: Sequence[Errors], points: Sequence[Point]) -> list[Bar]:
    bars = []
    for group in groups:
        limit = FITTED_BAR if group.split == "fitted" else LEFT_OUT_BAR
        name = f"{group.name} ({group.split}), mean error of step time"
        bars.append(Bar(name, group.mean, limit, reason=_reason([p for p in points if p.group == group.name], limit)))
    return bars


def _reason(points: Sequence[Point], limit: float) -> str:
    """The source that a group's error comes from, and why."""
    by: dict[str, list[Point]] = {}
    for p in points:
        by.setdefault(p.source, []).append(p)
    source = max(by, key=lambda s: sum(abs(p.error) for p in by[s]) - limit * len(by[s]))
    mine, rest = by[source], [p for p in points if p.source != source]
    error = np.mean([abs(p.error) for p in mine])
    text = f"{source} alone {error:.1%}"
    if rest:
        text += f" ({len(mine)} runs), the others {np.mean([abs(p.error) for p in rest]):.1%}"
    return f"{text}: {WHY[source]}" if source in WHY else text


def _other_bars(
    memory: Mapping[str, tuple[float, int]],
    orders: Sequence[RankErrors],
    schedules: Sequence[tuple[str, int, int]],
) -> list[Bar]:
    bars = []
    for name, (error, _) in memory.items():
        why = "the caching allocator keeps more than is in use" if name.endswith("reserved") else ""
        bars.append(Bar(f"{name}, mean error of memory", error, MEMORY_BAR, reason=why))
    for order in orders:
        why = WHY.get(order.name, "")
        bars.append(Bar(f"{order.name}, regret", order.regret, REGRET_BAR, reason=why))
        bars.append(Bar(f"{order.name}, rank correlation", order.rank, SPEARMAN_BAR, at_least=True, reason=why))
    for name, right, pairs in schedules:
        if pairs:
            bars.append(Bar(f"{name}, pairs in the right order", right / pairs, 1.0, at_least=True))
    return bars


__all__ = [
    "FITTED",
    "FOLDER_VARIABLE",
    "Bar",
    "Errors",
    "Point",
    "RankErrors",
    "ValidationReport",
    "read_runs",
    "split_groups",
    "validate",
]
