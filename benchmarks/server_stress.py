"""The server under clients who leave: are answers right, are rows and memory given back, and what does HTTP cost?

    python benchmarks/server_stress.py            # 6 rounds of 200 requests, 30 % of whose clients leave
    python benchmarks/server_stress.py --quick    # 3 rounds of 60

Bar, each by itself:
- every answer of a client that stayed is the one its request gets alone;
- after every round no sequence runs or waits: no row is lost;
- memory is flat: from the second round to the last, resident memory grows by less than 8 MiB;
- a request (20 tokens on average, every second one streamed) costs the server's event loop at most 3 ms of processor
  time: HTTP, reading and checking, tokenising, text of tokens, records. The engine has its thread of its own.

Beside these are the tokens per second of all clients together and of the engine alone: both, and the clients, share the
machine's few processors, and the model takes next to nothing, so that these two say little of a real one.

A model with random weights runs on this machine's CPU. The last line is one JSON object; exit code 1 when the bar is
missed.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from serving import Running, serving, tiny_folder  # noqa: E402
from stress import make_requests, resident_bytes, storm  # noqa: E402

from redco_like import Engine, SamplingParams  # noqa: E402
from redco_like.models import load  # noqa: E402
from redco_like.server import Limits  # noqa: E402
from redco_like.text import Text  # noqa: E402

LEAVING, LENGTH, ROWS, LONGEST = 0.3, 128, 16, 60
MOST_GROWTH_BYTES, MOST_LOOP_SECONDS = 8 * 2**20, 0.003


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rounds, count = (3, 60) if quick else (6, 200)
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_folder(pathlib.Path(scratch), length=LENGTH)
        loaded, text = load(folder), Text.from_folder(folder)
        engine = Engine(loaded.model, loaded.params, rows=ROWS, length=LENGTH, chunk_tokens=64, eos=text.eos)
        engine.warm_up(None)
        requests = make_requests(count, seed=0, longest=LONGEST)
        by_itself = [engine_tokens_per_second(engine, text, requests) for _ in range(3)]
        with serving(engine, text=text, name="tiny", limits=Limits(waiting=10_000)) as server:
            alone = answers_alone(server, requests)
            wrong, lost, memory, left, through, costs, seconds = 0, 0, [], 0, [], [], 100.0
            for number in range(rounds):
                # The first round shows how long one takes.
                answers, seconds = asyncio.run(
                    storm(server.base_url, requests, leaving=LEAVING, seed=number, patience=0.7 * seconds)
                )
                server.wait_idle(60)
                stats = server.engine.stats()
                lost += stats.running + stats.waiting + server.service.worker.open
                left += sum(answer is None for answer in answers)
                wrong += sum(a is not None and a != b for a, b in zip(answers, alone, strict=True))
                memory.append(resident_bytes())
                print(f"round {number + 1}: {sum(a is None for a in answers)} left, {memory[-1] / 2**20:.0f} MiB")
            for _ in range(3):
                before, cpu = engine.stats().generated_tokens, loop_seconds(server)
                _, seconds = asyncio.run(storm(server.base_url, requests, leaving=0.0, seed=0, patience=1.0))
                costs.append((loop_seconds(server) - cpu) / count)
                through.append((engine.stats().generated_tokens - before) / seconds)
    growth = memory[-1] - memory[1]
    passed = {
        "answers": wrong == 0,
        "rows": lost == 0,
        "memory": growth < MOST_GROWTH_BYTES,
        "cost": statistics.median(costs) <= MOST_LOOP_SECONDS,
        "some_left": left > 0,
    }
    record = {
        "benchmark": "server_stress",
        "quick": quick,
        "requests": rounds * count,
        "left": left,
        "wrong_answers": wrong,
        "lost_sequences": lost,
        "growth_bytes": growth,
        "resident_bytes": memory,
        "engine_tokens_per_second": by_itself,
        "server_tokens_per_second": through,
        "loop_seconds_per_request": costs,
        "passed": passed,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }
    print(json.dumps(record))
    return 0 if all(passed.values()) else 1


def engine_tokens_per_second(engine: Engine, text: Text, requests: list) -> float:
    prompts = [text.encode(request.prompt) for request in requests]
    asked = [SamplingParams(max_tokens=r.max_tokens, temperature=r.temperature, seed=r.seed, eos=()) for r in requests]
    start = time.perf_counter()
    done = engine.generate(prompts, asked)
    return sum(len(c.tokens) for samples in done for c in samples) / (time.perf_counter() - start)


def loop_seconds(server: Running) -> float:
    """Processor time of the event loop's thread."""
    found: concurrent.futures.Future[float] = concurrent.futures.Future()
    server.server._loop.call_soon_threadsafe(lambda: found.set_result(time.thread_time()))
    return found.result(10)


def answers_alone(server: Running, requests: list) -> list[str]:
    """One after the other."""
    found = []
    for request in requests:
        response = server.client.post("/v1/completions", json={**request.body(), "stream": False})
        found.append(response.raise_for_status().json()["choices"][0]["text"])
    return found


if __name__ == "__main__":
    sys.exit(main())
