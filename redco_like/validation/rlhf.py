"""Published seconds of PPO iterations, estimated: plans that are known, and what a search gains over them.

    points = read_points("/data")                                  # heuristic and searched, of one piece of work each
    software = fit_software([point for point in points if point.group == (7, 7, 8)])
    points[0].case.heuristic_seconds(software), points[0].case.search(software).period_seconds

The runs are those of ReaL (Mei et al. 2024, arXiv 2406.14088): PPO of Llama-like models on nodes of 8 A800, fp16, four
minibatches, gradient checkpointing. *ReaL-Heuristic* runs all six calls on the whole cluster, tensor 8, as many stages
as nodes, data 1. Its software dispatches every operation from Python: a step of decoding takes as long as that takes,
whatever the devices. `Dispatch` has what this costs; its two numbers belong to that system, and no default of
the planner comes from them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from redco_like.models import ModelConfig, architecture
from redco_like.rlhf_problem import call_costs
from search import Cluster, parse_cluster
from search.efficiency import Efficiency
from search.rlhf.costs import CallCosts, Constraint
from search.rlhf.forward import Dispatch
from search.rlhf.graph import GRAPHS, Workload
from search.rlhf.options import Option, Window
from search.rlhf.plans import Found, solve
from search.rlhf.simulator import simulate

PROMPT_TOKENS = 128
MINIBATCHES = 4
ACCELERATOR = "A800-80"
PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Iteration:
    """One published point.

    Attributes:
        system: whose plan: "ReaL" is the searched one, "ReaL-Heuristic" the one it is compared with.
        case: "actor" or "critic": which role grows with the cluster.
        gpus: of the cluster.
        actor, critic: parameters in billions; the reference is as large as the actor, the reward model as the critic.
        prompts: of an iteration.
        new_tokens: generated for each.
        seconds: of the iteration.
    """

    system: str
    case: str
    gpus: int
    actor: int
    critic: int
    prompts: int
    new_tokens: int
    seconds: float

    @property
    def group(self) -> tuple[int, int, int]:
        """What is fitted on or left out as a whole."""
        return self.actor, self.critic, self.gpus

    @property
    def work(self) -> tuple[int, ...]:
        """What is run: the same for all systems."""
        return (*self.group, self.prompts, self.new_tokens)


def read_iterations(folder: str | pathlib.Path) -> list[Iteration]:
    """Read the published points; a point that is in two figures comes once.

    Raises:
        ValueError: the folder has no realhf/iteration_seconds.json.
    """
    path = pathlib.Path(folder) / "realhf" / "iteration_seconds.json"
    if not path.is_file():
        raise ValueError(f"no realhf/iteration_seconds.json in {folder}")
    found: dict[tuple[Any, ...], Iteration] = {}
    for row in json.loads(path.read_text()):
        names = {"prompts": "bs", "new_tokens": "gen", "seconds": "t"}
        fields = {f.name: row[names.get(f.name, f.name)] for f in dataclasses.fields(Iteration)}
        one = Iteration(**fields)
        found.setdefault((one.system, one.work), one)
    return list(found.values())


def llama(billions: int) -> ModelConfig:
    """The Llama of a size as ReaL has them; 34 is CodeLlama (Roziere et al. 2023, arXiv 2308.12950).

    Raises:
        ValueError: another size.
    """
    if billions == 34:
        return dataclasses.replace(architecture("llama-2-70b"), layers=48, mlp=22016, rope_theta=1e6, max_length=16384)
    if billions not in (7, 13, 70):
        raise ValueError(f"no Llama of {billions} billion parameters here; 7, 13, 34, 70")
    return architecture(f"llama-2-{billions}b")


START = Dispatch(2e-5, 2e-4)
"""Where fits begin: PyTorch takes some 10 to 30 us per operation from Python, and NCCL some ten times that."""


def cluster(gpus: int) -> Cluster:
    """Nodes of the system."""
    found = parse_cluster(f"{gpus // PER_NODE}x{PER_NODE}x{ACCELERATOR}")
    return dataclasses.replace(found, efficiency=Efficiency.for_accelerator(found.accelerator, "megatron"))


class Case:
    """What was run in one point: a graph, its models and its workload, traced once for all constants."""

    def __init__(self, row: Iteration):
        self.row = row
        self.graph = GRAPHS["ppo"]()
        self.workload = Workload(row.prompts, PROMPT_TOKENS, row.new_tokens, minibatches=MINIBATCHES)

    @functools.cached_property
    def _models(self) -> dict[str, ModelConfig]:
        actor, critic = llama(self.row.actor), llama(self.row.critic)
        return {"actor": actor, "reference": actor, "critic": critic, "reward": critic}

    def _costs(self, constraints: dict[str, Constraint]) -> CallCosts:
        return call_costs(
            self._models,
            self.graph,
            self.workload,
            cluster(self.row.gpus),
            dtype="float16",
            constraints=constraints,
            allow_planned=True,
        )

    @functools.cached_property
    def _heuristic(self) -> CallCosts:
        mesh = {"tensor": PER_NODE, "stage": self.row.gpus // PER_NODE, "data": 1}
        constraint = Constraint(mesh)
        return self._costs(
            {"train": Constraint({**mesh, "remat": "full"}), "score": constraint, "generate": constraint}
        )

    @functools.cached_property
    def _space(self) -> CallCosts:
        """What ReaL searches: stages, data and tensor; it checkpoints always."""
        return self._costs({"train": Constraint({"remat": "full"}, ("fsdp",)), "score": Constraint({}, ("fsdp",))})

    def space(self, software: Dispatch) -> CallCosts:
        """Costs of every plan that the search may take."""
        return self._space.on(dispatch=software)

    def heuristic(self, software: Dispatch) -> dict[str, Option]:
        """The heuristic's calls, each with its best number of microbatches.

        Raises:
            ValueError: a call does not fit.
        """
        costs = self._heuristic.on(dispatch=software)
        found = {}
        for call in self.graph.calls:
            options = costs.options(call, self.row.gpus)
            if not options:
                raise ValueError(f"{call.name} of {self.row.group} does not fit under the heuristic")
            found[call.name] = min(options, key=lambda option: option.seconds)
        return found

    def heuristic_seconds(self, software: Dispatch) -> float:
        """Of an iteration: all calls have the same devices, so that they follow each other."""
        return sum(option.seconds for option in self.heuristic(software).values())

    def search(self, software: Dispatch, *, time_limit: float = 60.0) -> Found:
        """Search for the best plan of a system whose iterations begin when all calls of the one before have ended."""
        costs = self.space(software)
        return solve(self.graph, self.workload, costs.cluster, costs, time_limit=time_limit, synchronous=True)

    def seconds_on(self, software: Dispatch, windows: Mapping[str, Window]) -> float:
        """Of an iteration whose calls have these windows, each with its fastest option."""
        costs = self.space(software)
        places = {
            name: (window, min(costs.options(self.graph.call(name), window.devices), key=lambda option: option.seconds))
            for name, window in windows.items()
        }
        found = simulate(self.graph, places, None, costs, cluster=costs.cluster, synchronous=True)
        return found.period


@dataclasses.dataclass(frozen=True)
class Point:
    """What was measured of one piece of work: seconds under the heuristic and, where it was published, the searched
    plan.
    """

    case: Case
    heuristic_seconds: float
    searched_seconds: float | None

    @property
    def group(self) -> tuple[int, int, int]:
        return self.case.row.group

    @property
    def gain(self) -> float | None:
        """The heuristic's seconds over those of the searched plan."""
        return None if self.searched_seconds is None else self.heuristic_seconds / self.searched_seconds


def read_points(folder: str | pathlib.Path) -> list[Point]:
    """Read the published points of the heuristic, with the searched plan's beside them."""
    rows = read_iterations(folder)
    searched = {row.work: row.seconds for row in rows if row.system == "ReaL"}
    return [Point(Case(row), row.seconds, searched.get(row.work)) for row in rows if row.system == "ReaL-Heuristic"]


def fit_software(
    points: Sequence[Point], *, start: Dispatch = START, rounds: int = 1, time_limit: float = 20.0
) -> Dispatch:
    """Fit the constants of a system on some points: least squares on the logarithm of estimate over measurement.

    Under the heuristic every operation of decoding has its share of collectives, so that its seconds tell what both
    take together; what each takes is told by the searched plan, which decodes without collectives. Its windows are not
    published: they are searched for with the constants so far, in some rounds.
    """
    found = start
    for _ in range(rounds):
        windows = []
        for point in points:
            execution = (
                point.case.search(found, time_limit=time_limit).execution
                if point.searched_seconds is not None
                else None
            )
            windows.append({} if execution is None else {plan.call: plan.window for plan in execution.calls})

        def errors(logs: Any, windows: list[dict[str, Window]] = windows) -> list[float]:
            software = Dispatch(*np.exp(logs))
            out = []
            for point, places in zip(points, windows, strict=True):
                out.append(math.log(point.case.heuristic_seconds(software) / point.heuristic_seconds))
                if places and point.searched_seconds is not None:
                    out.append(math.log(point.case.seconds_on(software, places) / point.searched_seconds))
            return out

        best = least_squares(errors, np.log(dataclasses.astuple(found)), diff_step=0.02, max_nfev=12)
        found = Dispatch(*(float(x) for x in np.exp(best.x)))
    return found
