"""A few constants per accelerator, fitted on published runs within physical bounds.

    fitted = fit(problems)
    fitted.efficiency("A100-80", "megatron"), fitted.to_toml()

Least squares on log(estimate / measurement) with a robust loss, and a prior around each constant's physical value, so
that what the runs do not tell stays where it is. No constant belongs to a run, a paper or a model. Constants of an
accelerator are fitted together with those of its kind, which say how software uses any of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from redco_like.validation.problems import Problem
from search import find_accelerator
from search.efficiency import PARENTS, Efficiency, Framework
from search.roofline import KERNEL_SHARE

NOISE = 0.05
"""Relative error of a measured step that the loss takes as usual; machines that are alike differ by 2 to 8 %."""
FAMILIES = {"A100-40": "A100", "A100-80": "A100", "A800-80": "A100", "V100-16": "V100", "V100-32": "V100"}
"""Accelerators that differ in memory or links only have the same constants."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant to fit.

    Attributes:
        field: of `search.efficiency.Efficiency`.
        scope: a family of accelerators, or a kind.
        framework: "" for all.
        start: its prior.
        low, high: physical bounds.
        sigma: of the prior, on the logarithm.
        why: what bounds and prior rest on.
    """

    field: str
    scope: str
    framework: str
    start: float
    low: float
    high: float
    sigma: float
    why: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.field, self.scope, self.framework


GEMM = "largest product measured: 0.87 of the peak on A100, 0.80 on H100 (stas00/ml-engineering); TPU 7x 0.83"
KERNEL = (
    "fused causal attention, all scores counted: 0.3 to 0.75 of the peak for the half it computes (FlashAttention-2)"
)
TRITON = "the Triton kernel of 2023 attains half of that on H100, and no less than a fifth"
CONSTANTS = (
    *(Constant("matmul", family, "", 0.75, 0.5, 0.95, 0.3, GEMM) for family in ("V100", "A100", "H100")),
    *(Constant("matmul", family, "", 0.9, 0.6, 1.0, 0.3, GEMM) for family in ("v4", "v5e", "v5p")),
    *(Constant("attention", family, "", 1.1, 0.6, 1.5, 0.1, KERNEL) for family in ("A100", "H100")),
    *(Constant("attention", family, "eager", 0.6, 0.2, 1.2, 0.5, TRITON) for family in ("A100", "H100")),
    Constant("attention_backward", "gpu", "", 0.75, 0.5, 1.0, 0.15, "five products for four: 0.8, and slower kernels"),
    Constant("loop_traffic", "gpu", "eager", 1.0, 0.4, 2.5, 0.5, "kernels fused by hand save what others repeat"),
    Constant("loop_traffic", "gpu", "megatron", 1.0, 0.4, 2.5, 0.5, "kernels fused by hand save what others repeat"),
    Constant(
        "half_output", "gpu", "", 6e5, 1e5, 3e6, 0.7, "half a wave of 128 x 128 tiles: 0.9e6 on A100, 1.1e6 on H100"
    ),
    Constant("narrow", "gpu", "", 0.88, 0.5, 1.0, 0.05, "H100 measured 0.709 of the peak at 8 bits, 0.803 at 16"),
    Constant(
        "gradient_passes", "gpu", "megatron", 1.5, 0.5, 3.0, 0.5, "products that add to the sum: a read and a write"
    ),
    Constant("overlap_slowdown", "gpu", "", 1.3, 1.0, 1.6, 0.3, "1.13 measured by Galvatron; NCCL takes processors"),
    Constant("links", "gpu", "", 0.8, 0.4, 1.2, 0.3, "long rings attain what accelerators.toml has; steps interfere"),
    Constant("network", "gpu", "", 0.8, 0.3, 1.2, 0.3, "shared switches, and rings of other jobs"),
    Constant("network", "tpu", "", 1.0, 0.3, 1.5, 0.3, "data centre network, per host"),
)
COMPILED: dict[str, dict[str, float]] = {
    "gpu": {
        "loop_traffic": 0.59,
        "stack_traffic": 1.03,
        "unhidden": 1.0,
        "own_experts": 1.0,
        "routed_traffic": 0.19,
        "matrix_copies": 3.0,
        "weight_casts": 1.0,
        "weight_copies": 3.9,
        "sums_waited": 0.86,
        "sums_behind_weights": 1.0,
    },
    "tpu": {
        "loop_traffic": 0.33,
        "stack_traffic": 0.27,
        "unhidden": 0.7,
        "own_experts": 1.0,
        "room_for_all": 0.42,
        "routed_traffic": 0.43,
        "matrix_copies": 3.0,
        "weight_casts": 1.0,
        "update_copies": 1.5,
        "kernels_cover": 0.0,
        "loops_cover": 0.3,
    },
    "v5e": {"loop_traffic": 0.25, "stack_traffic": 0.22},
    "v5p": {"loop_traffic": 0.42, "stack_traffic": 0.43},
    "v6e": {"loop_traffic": 0.78, "stack_traffic": 0.34, "tile": 256.0},
    "tpu7x": {"tile": 256.0},
}
"""What XLA's programs move through memory, and what they wait for: read off compiled ones
(`benchmarks/loop_traffic.py`), of accelerators of their own and of all of a kind. `room_for_all` comes from the same
model's plans with an expert axis. `kernels_cover` and `sums_behind_weights` say what XLA's schedulers do; `loops_cover`
was set on the very plans that `benchmarks/plan_order.py` compares, and tiles are the matrix units' sides."""
FIXED: dict[str, dict[str, float]] = {
    "gpu": {"half_size": 16.0, "half_depth": 60.0, "bandwidth": 0.85},
    "tpu": {
        "half_size": 8.0,
        "tile": 128.0,
        "half_depth": 60.0,
        "bandwidth": 0.9,
        "attention": 2 * KERNEL_SHARE,
        "attention_backward": 4 / 7,
        "contiguous": 1.0,
        "links": 1.0,
        "overlap_slowdown": 1.25,
        **COMPILED["tpu"],
    },
}
"""What published runs do not tell apart, and is assumed, or follows from programs. On TPUs attention is splash
attention: half of the scores at the share of the peak that `search.roofline` has, and backward seven products where
four are counted. Left to the runs, which do not say what their attention is, it is three times as slow and products
attain 0.995 of the peak, which none does; links beyond their nominal rate make up for it. Collectives slow down what
they run beside by about the least that the runs leave open (1.23 to 1.6): with more, gathers that hide cost twice what
compiled schedules wait for, as was seen on plans that `benchmarks/plan_order.py` compares."""
BY_FRAMEWORK: dict[str, dict[str, float]] = {
    "compiled": COMPILED["gpu"],
    "eager": {"unhidden": 1.0},
    "megatron": {"unhidden": 1.0},
    "megatron-core": {"in_pieces": 1.0},
}
"""What software does on GPUs, as it is written: nothing to fit. PyTorch waits for collectives between operations, and
so did Megatron until 2023; Transformer Engine runs those over tensor and context in pieces."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Values of the constants.

    Attributes:
        values: by `Constant.key`.
        intervals: of 90 %, by the same key, from the curvature of the fit.
        spread: family -> relative error that nine of ten fitted runs stay under.
        runs: family -> number of runs fitted on.
        cost, evaluations: of the last step of the fit.
    """

    values: Mapping[tuple[str, str, str], float]
    intervals: Mapping[tuple[str, str, str], tuple[float, float]]
    spread: Mapping[str, float]
    runs: Mapping[str, int]
    cost: float = 0.0
    evaluations: int = 0

    def efficiency(self, accelerator: str, framework: Framework) -> Efficiency:
        """The constants of an accelerator; without runs of its own it has those of the newest one of its kind."""
        kind = find_accelerator(accelerator).kind
        family = FAMILIES.get(accelerator, accelerator)
        scopes = (kind, NEWEST.get(kind, ""), family)
        values = dict(FIXED.get(kind, {})) | COMPILED.get(family, {})
        for scope in scopes:
            for which in ("", *PARENTS.get(framework, ()), framework):
                values |= BY_FRAMEWORK.get(which, {}) if scope == kind == "gpu" else {}
                values |= {f: v for (f, s, w), v in self.values.items() if s == scope and w == which}
        return dataclasses.replace(Efficiency(), **values, spread=self.spread.get(family, Efficiency.spread))

    def to_toml(self) -> str:
        """Write `search/efficiencies.toml`."""
        lines = [
            "# What accelerators attain of their peaks: the constants of search/efficiency.py, fitted on published",
            "# runs by `redco-like validate` (redco_like/validation/fit.py has their bounds and reasons). Not by hand.",
            "# [gpu] and [tpu] hold for all of their kind, a table below them for one accelerator, and .megatron or",
            "# .eager for software that is not compiled. `intervals` are 90 % of each fit; `spread` is the error of a",
            "# step time that nine of ten fitted runs stay under.",
        ]
        names: dict[str, list[str]] = {"gpu": ["gpu"], "tpu": ["tpu"]}
        for family in dict.fromkeys(scope for _, scope, _ in self.values if scope not in ("gpu", "tpu")):
            names[family] = [name for name, f in FAMILIES.items() if f == family] or [family]
        names |= {name: [name] for name in COMPILED if name not in names}
        for scope, tables in names.items():
            for table in tables:
                own = {k: v for k, v in self.values.items() if k[1] == scope}
                if scope in NEWEST:
                    own = {k: v for k, v in self.values.items() if k[1] == NEWEST[scope]} | own
                compiled = {} if scope in ("gpu", "tpu") else COMPILED.get(scope, {})
                numbers = dict(FIXED.get(scope, {})) | compiled | {f: v for (f, _, w), v in own.items() if not w}
                lines += ["", f"[{table}]"] + [f"{name} = {value:.4g}" for name, value in numbers.items()]
                if scope in self.spread:
                    lines.append(f"spread = {self.spread[scope]:.3g}")
                ranges = [
                    f"{f} = [{a:.3g}, {b:.3g}]"
                    for k, (a, b) in self.intervals.items()
                    if k in own and not k[2]
                    for f in (k[0],)
                ]
                if ranges:
                    lines.append(f"intervals = {{ {', '.join(ranges)} }}")
                known = BY_FRAMEWORK if scope == "gpu" else {}
                for framework in dict.fromkeys([*(w for _, _, w in own if w), *known]):
                    entry = known.get(framework, {}) | {f: v for (f, _, w), v in own.items() if w == framework}
                    lines += ["", f"[{table}.{framework}]"] + [f"{name} = {v:.4g}" for name, v in entry.items()]
        return "\n".join(lines) + "\n"


NEWEST = {"gpu": "H100", "tpu": "v5p"}
"""Whose constants an accelerator without published runs of its own has."""


def fit(problems: Sequence[Problem], *, progress: Callable[[str], None] | None = None) -> Fitted:
    """Fit the constants on runs; those of GPUs and those of TPUs apart."""
    values: dict[tuple[str, str, str], float] = {}
    intervals: dict[tuple[str, str, str], tuple[float, float]] = {}
    runs: dict[str, int] = {}
    cost, evaluations = 0.0, 0
    for kind in ("gpu", "tpu"):
        mine = [p for p in problems if p.model.costs.cluster.accelerator.kind == kind]
        if not mine:
            continue
        families = {FAMILIES.get(p.run.accelerator, p.run.accelerator) for p in mine}
        constants = [c for c in CONSTANTS if c.scope == kind or c.scope in families]
        if progress:
            progress(f"fitting {len(constants)} constants of {kind.upper()}s on {len(mine)} runs")
        found = _fit_kind(mine, constants)
        values |= found[0]
        intervals |= found[1]
        cost, evaluations = cost + found[2], evaluations + found[3]
        for p in mine:
            family = FAMILIES.get(p.run.accelerator, p.run.accelerator)
            runs[family] = runs.get(family, 0) + 1
    fitted = Fitted(values, intervals, {}, runs, cost, evaluations)
    errors: dict[str, list[float]] = {}
    for p in problems:
        family = FAMILIES.get(p.run.accelerator, p.run.accelerator)
        estimate = p.seconds(fitted.efficiency(p.run.accelerator, p.run.framework))
        errors.setdefault(family, []).append(abs(math.log(estimate / p.run.seconds)))
    spread = {family: max(0.05, math.expm1(float(np.quantile(e, 0.9)))) for family, e in errors.items()}
    return dataclasses.replace(fitted, spread=spread)


def _fit_kind(problems: Sequence[Problem], constants: Sequence[Constant]):
    start = np.log([c.start for c in constants])
    low, high = np.log([c.low for c in constants]), np.log([c.high for c in constants])
    sigma = np.array([c.sigma for c in constants])
    measured = np.log([p.run.seconds for p in problems])
    users: list[tuple[str, Framework]] = sorted({(p.run.accelerator, p.run.framework) for p in problems})
    which = [users.index((p.run.accelerator, p.run.framework)) for p in problems]
    touched = [_touches(c, users) for c in constants]

    def estimates(x: npt.NDArray[np.float64], rows: Sequence[int], *, exact: bool = False) -> npt.NDArray[np.float64]:
        fitted = Fitted({c.key: math.exp(v) for c, v in zip(constants, x, strict=True)}, {}, {}, {})
        efficiency = [fitted.efficiency(accelerator, framework) for accelerator, framework in users]
        return np.log([problems[i].seconds(efficiency[which[i]], exact=exact) for i in rows])

    everyone = range(len(problems))
    correction = np.zeros(len(problems))
    here: dict[bytes, npt.NDArray[np.float64]] = {}

    def at(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if x.tobytes() not in here:
            here[x.tobytes()] = estimates(x, everyone)
        return here[x.tobytes()]

    def residuals(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.concatenate([(at(x) + correction - measured) / NOISE, (x - start) / sigma])

    def jacobian(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        base, step = at(x), 1e-3
        columns = []
        for j in range(len(constants)):
            rows = [i for i in everyone if which[i] in touched[j]]
            column = np.zeros(len(problems))
            moved = x.copy()
            moved[j] += step if x[j] + step <= high[j] else -step
            column[rows] = (estimates(moved, rows) - base[rows]) / (moved[j] - x[j])
            columns.append(column / NOISE)
        return np.concatenate([np.stack(columns, axis=1), np.diag(1 / sigma)])

    x, result = start, None
    for _ in range(2):
        # Pipelines are bounded while fitting; the ratio to the schedule's time hardly moves with the constants.
        correction[:] = estimates(x, everyone, exact=True) - at(x)
        result = least_squares(residuals, x, jac=jacobian, bounds=(low, high), loss="soft_l1", max_nfev=12)  # pyright: ignore[reportArgumentType]
        x = result.x
    assert result is not None
    curvature = result.jac.T @ result.jac
    width = 1.64 * np.sqrt(np.diag(np.linalg.pinv(curvature)))
    keys = [c.key for c in constants]
    values = dict(zip(keys, np.exp(x).tolist(), strict=True))
    ends = zip(np.exp(np.maximum(x - width, low)), np.exp(np.minimum(x + width, high)), strict=True)
    intervals = {key: (float(a), float(b)) for key, (a, b) in zip(keys, ends, strict=True)}
    return values, intervals, float(result.cost), len(here)


def _touches(constant: Constant, users: Sequence[tuple[str, Framework]]) -> set[int]:
    """Which accelerators and frameworks a constant has a say in."""
    out = set()
    for i, (accelerator, framework) in enumerate(users):
        family = FAMILIES.get(accelerator, accelerator)
        kind = find_accelerator(accelerator).kind
        if constant.scope in (family, kind, NEWEST[kind]) and constant.framework in (
            "",
            *PARENTS.get(framework, ()),
            framework,
        ):
            out.add(i)
    return out
