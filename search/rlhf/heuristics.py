"""Placements that people use, as assignments with the best options there are for them: what a search must beat.

    placements(Evaluate(problem))["colocated"].seconds

- `colocated`: every call on all devices (DeepSpeed-Chat, Yao et al. 2023, arXiv 2308.01320; HybridFlow's best to 64).
- `real`: ReaL's heuristic (Mei et al. 2024, arXiv 2406.14088): the same for every call on all devices,
  tensor = devices of a node, stages = nodes; or what is nearest to it.
- `shipped`: what ReaL's program sets for PPO: generation on everything with no tensor parallelism and a stage per node,
  but two at least; the actor and the critic train beside each other on halves; the reference on everything, other
  scores on halves.
- `split`: HybridFlow (Sheng et al. 2024, arXiv 2409.19256): actor and reference on one part of the
  devices, the others on the rest.
- `standalone`: every role on devices of its own.

For the last two the sizes of the parts are chosen too: of all ways to cut the devices, the few that are best with the
fastest option of every call, and of these the one that is best with the best options. One that cannot be (fewer
devices than roles, one role alone) is left out; one that does not fit has a period of inf.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Mapping

from search.rlhf.evaluate import Assignment, Evaluate
from search.rlhf.options import Option, Window
from search.rlhf.problem import Place, Problem
from search.rlhf.solver import minimise

WORDS = {
    "colocated": "all roles on all devices",
    "real": "ReaL's heuristic",
    "shipped": "the plan ReaL ships",
    "split": "actor + reference | critic + reward",
    "standalone": "every role on devices of its own",
}
"""What they are called where people read it."""

PARTS = 300
"""Parts that the search for the options of one placement looks at; it mostly ends before."""
TRIED = 3
"""Ways to cut the devices of which the options are searched."""


def placements(evaluate: Evaluate, *, deadline: float = math.inf) -> dict[str, Assignment]:
    """Name -> the heuristic's assignment.

    Args:
        deadline: of `time.monotonic`: what is not reached is left out.
    """
    problem = evaluate.problem
    whole = Window(0, problem.grid.devices)
    makers = {
        "colocated": lambda: _best(evaluate, [dict.fromkeys(range(problem.count), whole)]),
        "real": lambda: _like(evaluate, {}, dict.fromkeys(range(problem.count), _real_mesh(problem))),
        "shipped": lambda: _shipped(evaluate),
        "split": lambda: _best(evaluate, [_by_role(problem, parts) for parts in _splits(problem)]),
        "standalone": lambda: _best(evaluate, [_by_role(problem, parts) for parts in _standalones(problem)]),
    }
    out = {}
    for name, make in makers.items():
        if time.monotonic() > deadline:
            break
        found = make()
        if found is not None:
            out[name] = found
    return out


def _best(evaluate: Evaluate, ways: Collection[Mapping[int, Window]]) -> Assignment | None:
    """The best of several choices of windows, with the best options."""
    problem = evaluate.problem
    quick: list[tuple[float, float, int, Mapping[int, Window]]] = []
    for at, windows in enumerate(ways):
        places = _fastest(problem, windows)
        if places is not None:
            found = evaluate(places)
            quick.append((found.seconds, found.over, at, windows))
    quick.sort(key=lambda entry: entry[:3])
    out: Assignment | None = None
    for *_, windows in quick[:TRIED]:
        places = _fastest(problem, windows)
        start = evaluate(places) if places is not None else None
        allowed = {call: (window,) for call, window in windows.items()}
        found = minimise(evaluate, start=start, allowed=allowed, parts=PARTS).best or start
        if found is not None and (out is None or (found.seconds, found.over) < (out.seconds, out.over)):
            out = found
    return out


def _fastest(problem: Problem, windows: Mapping[int, Window]) -> tuple[Place, ...] | None:
    """Every call at the fastest option that fits on its window by itself; else the one that needs least.

    None where a window has no options, or a size that is left out of the search.
    """
    out = []
    for call in range(problem.count):
        if windows[call].devices not in problem.grid.sizes:
            return None
        options = problem.choices(call, windows[call].devices)
        if not options:
            return None

        def rank(option: Option) -> tuple[float, float]:
            needs = option.params_bytes + option.state_bytes + option.working_bytes
            return (0.0, option.seconds) if needs <= problem.usable else (1.0, needs)

        out.append((windows[call], min(options, key=rank)))
    return tuple(out)


def _like(
    evaluate: Evaluate, windows: Mapping[int, Window], meshes: Mapping[int, Mapping[str, int]]
) -> Assignment | None:
    """Windows, and for some calls the options nearest to a mesh; the rest is searched."""
    problem = evaluate.problem
    whole = Window(0, problem.grid.devices)
    windows = {call: windows.get(call, whole) for call in range(problem.count)}
    places = _fastest(problem, windows)
    if places is None:
        return None
    among: dict[int, tuple[Option, ...]] = {}
    for call, mesh in meshes.items():
        options = problem.choices(call, windows[call].devices)
        least = min(_distance(option, mesh) for option in options)
        among[call] = tuple(option for option in options if _distance(option, mesh) == least)
    allowed = {call: (window,) for call, window in windows.items()}
    best = minimise(evaluate, allowed=allowed, among=among, parts=PARTS).best
    if best is not None:
        return best
    chosen = [
        min(among.get(call, (place[1],)), key=lambda option: option.params_bytes + option.working_bytes)
        for call, place in enumerate(places)
    ]
    return evaluate([(window, option) for (window, _), option in zip(places, chosen, strict=True)])


def _distance(option: Option, mesh: Mapping[str, int]) -> float:
    """How many doublings an option's mesh is from another, over the axes that are named."""
    sizes = option.plan.mesh.sizes
    return sum(abs(math.log2(sizes[axis] / size)) for axis, size in mesh.items())


def _real_mesh(problem: Problem) -> dict[str, int]:
    return {"tensor": problem.grid.per_node, "stage": problem.grid.nodes}


def _shipped(evaluate: Evaluate) -> Assignment | None:
    problem = evaluate.problem
    halves = _halves(problem)
    if halves is None:
        return None
    trained = [role for role in problem.roles if problem.graph.trains(role) is not None]
    windows, meshes = {}, {}
    scores = 0
    for call, entry in enumerate(problem.calls):
        if entry.kind == "generate":
            meshes[call] = {"tensor": 1, "stage": max(2, problem.grid.nodes)}
        elif entry.kind == "train" and len(trained) > 1:
            windows[call] = halves[trained.index(entry.role) % 2]
        elif entry.kind == "score" and entry.role != "reference":
            windows[call] = halves[scores % 2]
            scores += 1
    return _like(evaluate, windows, meshes)


def _halves(problem: Problem) -> tuple[Window, Window] | None:
    """Two disjoint windows as large as can be."""
    nodes, per = problem.grid.nodes, problem.grid.per_node
    half = nodes // 2 * per if nodes > 1 else 2 ** ((per // 2).bit_length() - 1) if per > 1 else 0
    if not half:
        return None
    return Window(0, half), Window(half, half)


def _by_role(problem: Problem, windows: Mapping[str, Window]) -> dict[int, Window]:
    return {call: windows[entry.role] for call, entry in enumerate(problem.calls)}


def _splits(problem: Problem) -> list[dict[str, Window]]:
    """Ways to give two groups of roles two parts of the devices."""
    first = [role for role in problem.roles if role in ("actor", "reference")]
    if not first or len(first) == len(problem.roles):
        first = list(problem.roles[: (len(problem.roles) + 1) // 2])
    if len(first) == len(problem.roles):
        return []
    out = []
    for sizes in _cuts(problem, 2):
        windows = _pack(problem, sizes)
        if windows is not None:
            out.append({role: windows[role not in first] for role in problem.roles})
    return out


def _standalones(problem: Problem) -> list[dict[str, Window]]:
    """Ways to give every role a part of the devices."""
    if len(problem.roles) < 2:
        return []
    packed = (_pack(problem, sizes) for sizes in _cuts(problem, len(problem.roles)))
    return [dict(zip(problem.roles, windows, strict=True)) for windows in packed if windows is not None]


def _cuts(problem: Problem, parts: int) -> list[tuple[int, ...]]:
    """Sizes of windows that add up to all devices, in every order."""
    grid = problem.grid
    sizes = [s for s in grid.sizes if s < grid.devices]
    if grid.nodes > 16:  # Whole powers of two of nodes are enough to compare with.
        sizes = [s for s in sizes if s & (s - 1) == 0]
    have = set(sizes)
    out = []
    for some in itertools.product(sizes, repeat=parts - 1):
        last = grid.devices - sum(some)
        if last in have:
            out.append((*some, last))
    return out


def _pack(problem: Problem, sizes: tuple[int, ...]) -> tuple[Window, ...] | None:
    """Disjoint windows of these sizes, the large ones first; None where they do not go side by side."""
    per = problem.grid.per_node
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    out: dict[int, Window] = {}
    for i in order:
        size = sizes[i]
        places = (Window(int(first), size) for first in problem.grid.firsts(size))
        free = next((w for w in places if not any(w.overlaps(other) for other in out.values())), None)
        if free is None or (size >= per and free.first % per):
            return None
        out[i] = free
    return tuple(out[i] for i in range(len(sizes)))
