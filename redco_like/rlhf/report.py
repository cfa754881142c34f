"""An iteration in numbers: rewards, lengths, losses, seconds and tokens per second of every call and edge.

iteration_metrics(graph, workload, outcome)["generate/tokens_per_second"]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.rlhf import Outcome
from search.rlhf import Graph, Workload


def iteration_metrics(graph: Graph, workload: Workload, outcome: Outcome) -> dict[str, float]:
    """Numbers of an iteration, by name.

    `loss` and the other metrics of a call that trains are means over its optimizer steps; where two calls train, they
    stand behind the call's name, and those of the actor without it too. `<call>/seconds`, `<call>/tokens_per_second`
    (prompts and completions without fillings; of generation, completions alone), `edge/<role: from -> to>/seconds`.
    """
    data = outcome.data
    values: dict[str, float] = {}
    trained = [call for call in graph.calls if call.kind == "train"]
    for call in trained:
        named = outcome.metrics.get(call.name, {})
        if call is trained[0]:
            values |= named
        if len(trained) > 1:
            values |= {f"{call.name}/{name}": value for name, value in named.items()}
    if "rewards" in data:
        rewards_B = np.asarray(data["rewards"], np.float64)
        values |= {"reward": float(rewards_B.mean()), "reward_std": float(rewards_B.std())}
    generated = sum(len(row) for row in data[_completions(graph)]) if _completions(graph) else 0
    if generated:
        lengths = [len(row) for row in data[_completions(graph)]]
        values |= {"length": float(np.mean(lengths)), "length_max": float(max(lengths))}
        values["ended"] = float(np.mean([finish == "stop" for finish in data["finishes"]]))
    tokens = _tokens(data, graph, workload)
    for ran in outcome.ran:
        if ran.kind in ("reallocate", "onload", "offload"):
            values[f"edge/{ran.what}/seconds"] = ran.seconds
            continue
        values[f"{ran.what}/seconds"] = ran.seconds
        count = {"generate": generated, "score": tokens, "train": tokens * workload.epochs}.get(ran.kind, 0)
        if count and ran.seconds > 0:
            values[f"{ran.what}/tokens_per_second"] = count / ran.seconds
    values["iteration/seconds"] = max((ran.end for ran in outcome.ran), default=0.0)
    return values


def _completions(graph: Graph) -> str:
    """Name of what is generated; empty if nothing is."""
    return next((call.writes[0] for call in graph.calls if call.kind == "generate"), "")


def _tokens(data: Any, graph: Graph, workload: Workload) -> int:
    """Tokens of all sequences, without fillings."""
    rows = data["rows"]
    if name := _completions(graph):
        return workload.samples * sum(len(row[0]) for row in rows) + sum(len(row) for row in data[name])
    return sum((len(row) - 1) * len(row[0]) + sum(map(len, row[1:])) for row in rows)
