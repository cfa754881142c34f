"""Continuous against static batching at random arrivals, and the time of a token against the length that is reserved.

    python benchmarks/generate_continuous.py [--quick]          some minutes, no extra needed

Requests arrive as a Poisson process, faster than they can be served one batch after the other, and ask for 8 to 128
tokens. Static batching takes what has arrived, up to 16 requests, and answers when the last of them is done, as a plain
`generate` does; continuous batching is the engine. Both are the same engine and programs, on the same arrivals, in
turns. Random weights of a Llama of 20 M parameters.

Bars: the time of a decoding step within a window of 256 positions is the same within 10 % whether 256 or 2048 are
reserved per row. Throughput and latency are reported as ratios; continuous must not lose.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]

import jax  # noqa: E402
import numpy as np  # noqa: E402

from redco_like import Engine, SamplingParams  # noqa: E402
from redco_like.models import ModelConfig, build_model  # noqa: E402

ROWS, PROMPT = 16, 32
FLAT = 1.10
Arrival = tuple[float, list[int], int]


def small_llama() -> ModelConfig:
    return ModelConfig(
        "llama",
        "decoder",
        embed=384,
        layers=6,
        heads=6,
        mlp=1024,
        vocab=16000,
        max_length=4096,
        norm="rms",
        activation="silu",
        gated=True,
        position="rotary",
    )


def arrivals(rng: np.random.Generator, count: int, rate: float) -> list[Arrival]:
    times = np.cumsum(rng.exponential(1 / rate, count))
    return [(float(t), rng.integers(0, 16000, PROMPT).tolist(), int(rng.integers(8, 129))) for t in times]


def continuous(engine: Engine, todo: list[Arrival]) -> tuple[float, list[float]]:
    start, waiting, came, latencies = time.perf_counter(), list(todo), {}, []
    while len(latencies) < len(todo):
        now = time.perf_counter() - start
        while waiting and waiting[0][0] <= now:
            at, prompt, new = waiting.pop(0)
            came[engine.submit(prompt, SamplingParams(max_tokens=new, eos=()))] = at
        if engine.idle:
            time.sleep(max(waiting[0][0] - now, 0.0))
        for event in engine.step():
            if event.finish:
                latencies.append(time.perf_counter() - start - came[event.request])
    return time.perf_counter() - start, latencies


def static(engine: Engine, todo: list[Arrival]) -> tuple[float, list[float]]:
    start, waiting, latencies = time.perf_counter(), list(todo), []
    while waiting:
        now = time.perf_counter() - start
        batch = [a for a in waiting if a[0] <= now][:ROWS]
        if not batch:
            time.sleep(waiting[0][0] - now)
            continue
        waiting = waiting[len(batch) :]
        engine.generate([a[1] for a in batch], [SamplingParams(max_tokens=a[2], eos=()) for a in batch])
        latencies += [time.perf_counter() - start - a[0] for a in batch]
    return time.perf_counter() - start, latencies


def step_seconds(engines: dict[int, Engine], repeats: int) -> dict[int, list[float]]:
    """Seconds per decoding step of full engines whose rows stay within 256 positions, in turns."""
    found: dict[int, list[float]] = {length: [] for length in engines}
    rng = np.random.default_rng(1)
    for _ in range(repeats):
        for length, engine in engines.items():
            for _ in range(ROWS):
                engine.submit(rng.integers(0, 16000, PROMPT).tolist(), SamplingParams(max_tokens=128, eos=()))
            while engine.stats().generated_tokens % (128 * ROWS) < 8 * ROWS:
                engine.step()
            before, start = engine.stats().decode_steps, time.perf_counter()
            for _ in range(8):
                engine.step()
            found[length].append((time.perf_counter() - start) / (engine.stats().decode_steps - before))
            while not engine.idle:
                engine.step()
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    repeats, count = (2, 24) if options.quick else (5, 96)
    model = build_model(small_llama(), dtype="float32")
    params = jax.jit(model.init_fn)(jax.random.key(0))
    engines = {length: Engine(model, params, rows=ROWS, length=length) for length in (256, 2048)}
    for engine in engines.values():
        engine.warm_up(None)

    steps = step_seconds(engines, 2 * repeats + 1)
    best = {length: min(values) for length, values in steps.items()}
    medians = {length: statistics.median(values) for length, values in steps.items()}
    flat = statistics.median(b / a for a, b in zip(steps[256], steps[2048], strict=True))
    print(
        f"seconds per step of {ROWS} rows: "
        + ", ".join(f"{medians[n]:.4f} (least {best[n]:.4f}) with {n} reserved" for n in steps)
        + f"; ratio {flat:.3f} (bar {FLAT})"
    )

    engine, rng = engines[256], np.random.default_rng(0)
    # As fast as full batches are served: then there is always somebody waiting.
    rate = 1 / (68 / ROWS * medians[256])
    ratios: dict[str, list[float]] = {"throughput": [], "median latency": [], "worst latency": []}
    for _ in range(repeats):
        todo = arrivals(rng, count, rate)
        other = [(at, rng.integers(0, 16000, PROMPT).tolist(), new) for at, _, new in todo]  # nothing to share
        (seconds_s, latency_s), (seconds_c, latency_c) = static(engine, todo), continuous(engine, other)
        ratios["throughput"].append(seconds_s / seconds_c)
        ratios["median latency"].append(statistics.median(latency_s) / statistics.median(latency_c))
        ratios["worst latency"].append(max(latency_s) / max(latency_c))
    for name, values in ratios.items():
        print(
            f"{name}, static over continuous: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        )
    gain = statistics.median(ratios["throughput"])
    passed = flat <= FLAT and gain >= 1.0
    print(
        json.dumps(
            {
                "benchmark": "generate_continuous",
                "label": "measured",
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "load_average": round(os.getloadavg()[0], 1),
                "requests": count,
                "requests_per_second": round(rate, 2),
                "ratios": {
                    name: {"median": round(statistics.median(v), 2), "spread": [round(min(v), 2), round(max(v), 2)]}
                    for name, v in ratios.items()
                },
                "step_seconds": {str(n): round(medians[n], 5) for n in steps},
                "step_ratio": round(flat, 3),
                "bar": FLAT,
                "passed": bool(passed),
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
