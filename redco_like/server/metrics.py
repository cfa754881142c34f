"""Counts of a server in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats).

    metrics = Metrics()
    metrics.requests.add(1, endpoint="chat", outcome="ok")
    metrics.first_token.observe(0.12)
    text = metrics.render(engine.stats())

Used from one thread, the event loop's.
"""

from __future__ import annotations

import bisect
from typing import Any

PREFIX = "redco_like_"
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """A number that only grows, by labels."""

    def __init__(self, name: str, help: str):
        self.name, self.help = name, help
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self) -> list[str]:
        rows = sorted(self.values.items()) or [((), 0.0)]
        return [*_head(self.name, self.help, "counter"), *(f"{self.name}{_labels(k)} {v:g}" for k, v in rows)]


class Histogram:
    """How often values were at most so large."""

    def __init__(self, name: str, help: str, bounds: tuple[float, ...]):
        self.name, self.help, self.bounds = name, help, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def lines(self) -> list[str]:
        out, total = _head(self.name, self.help, "histogram"), 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            out.append(f'{self.name}_bucket{{le="{"+Inf" if bound is None else f"{bound:g}"}"}} {total}')
        return [*out, f"{self.name}_sum {self.sum:.9g}", f"{self.name}_count {total}"]


class Metrics:
    """All of a server's."""

    def __init__(self) -> None:
        self.requests = Counter(f"{PREFIX}requests_total", "Requests by endpoint and outcome.")
        self.prompt_tokens = Counter(f"{PREFIX}prompt_tokens_total", "Tokens of accepted prompts.")
        self.output_tokens = Counter(f"{PREFIX}output_tokens_total", "Tokens generated for requests.")
        self.first_token = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "From acceptance to the first token, waiting included.", FIRST
        )
        self.each_token = Histogram(
            f"{PREFIX}time_per_output_token_seconds", "Mean time per token after the first, by sequence.", EACH
        )
        self.whole = Histogram(f"{PREFIX}request_seconds", "From acceptance to the end, by sequence.", WHOLE)

    def render(self, stats: Any, *, up: bool, open_sequences: int) -> str:
        """The page, with how the engine stands."""
        known = (self.requests, self.prompt_tokens, self.output_tokens, self.first_token, self.each_token, self.whole)
        lines = [line for one in known for line in one.lines()]
        gauges = {
            "engine_up": (int(up), "Whether the engine runs."),
            "sequences_open": (open_sequences, "Sequences whose clients wait."),
            "sequences_running": (stats.running, "Sequences that have a row."),
            "sequences_waiting": (stats.waiting, "Sequences that wait for a row."),
            "rows": (stats.rows, "Sequences that can run at a time."),
        }
        for name, (value, help) in gauges.items():
            lines += [*_head(PREFIX + name, help, "gauge"), f"{PREFIX}{name} {value:g}"]
        shared = Counter(f"{PREFIX}shared_prompt_tokens_total", "Prompt tokens that were copied, not computed.")
        shared.add(stats.shared_tokens)
        return "\n".join([*lines, *shared.lines()]) + "\n"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _labels(pairs: tuple[tuple[str, str], ...]) -> str:
    if not pairs:
        return ""
    escaped = (f'{k}="{v.translate(_ESCAPES)}"' for k, v in pairs)
    return "{" + ",".join(escaped) + "}"


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
