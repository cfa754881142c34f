"""Tokens per second of the engine against transformers' `generate`: the same weights, prompts, threads, in one run.

    python benchmarks/generate_throughput.py [--quick]      some minutes; needs redco-like[hf], torch, transformers

A Llama of 107 M random parameters that transformers writes and `redco_like.models.load` reads, float32, greedy, prompts
of 64 tokens and 64 new ones, for 1 row and for 16. The tokens have to be the same. Repeats take turns; no prompt comes
twice, so that the engine has nothing to share. torch gets as many threads as it is fastest with, one or all.

Bars: 1.5 times the tokens per second of transformers at 16 rows, and as many at 1 row (medians of ratios).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from redco_like import Engine, SamplingParams  # noqa: E402
from redco_like.models import load  # noqa: E402

BARS = {1: 1.0, 16: 1.5}
PROMPT, NEW, LENGTH = 64, 64, 256


def made(folder: str, quick: bool) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    width, layers = (256, 4) if quick else (768, 12)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def theirs(model: transformers.LlamaForCausalLM, prompts: np.ndarray) -> list[tuple[int, ...]]:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return [tuple(row) for row in out[:, PROMPT:].tolist()]


def best_threads(model: transformers.LlamaForCausalLM, prompts: np.ndarray, most: int) -> int:
    """How many threads torch is fastest with: on a busy machine its threads wait for each other."""
    seconds = {}
    for count in dict.fromkeys((1, most)):
        torch.set_num_threads(count)
        theirs(model, prompts[:1])
        start = time.perf_counter()
        theirs(model, prompts)
        seconds[count] = time.perf_counter() - start
    return min(seconds, key=lambda count: seconds[count])


def ours(engine: Engine, prompts: np.ndarray) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=NEW, eos=())
    return [samples[0].tokens for samples in engine.generate(prompts.tolist(), params)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small model, and no bar")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    rng = np.random.default_rng(0)
    results, passed = {}, True
    with tempfile.TemporaryDirectory() as folder:
        reference = made(folder, options.quick)
        loaded = load(folder, dtype="float32")
        count = sum(p.numel() for p in reference.parameters())
        print(f"{count / 1e6:.0f} M parameters, {PROMPT} + {NEW} tokens, float32, {threads} threads")
        for rows, bar in BARS.items():
            engine = Engine(loaded.model, loaded.params, rows=rows, length=LENGTH)
            compile_seconds = sum(c.seconds for c in engine.warm_up(None))
            rates: dict[str, list[float]] = {"ours": [], "transformers": []}
            same = total = 0
            torch_threads = best_threads(reference, rng.integers(3, 32000, (rows, PROMPT)), threads)
            torch.set_num_threads(torch_threads)
            for repeat in range(options.repeats + 1):
                prompts = rng.integers(3, 32000, (rows, PROMPT))
                start = time.perf_counter()
                a = ours(engine, prompts)
                middle = time.perf_counter()
                b = theirs(reference, prompts)
                end = time.perf_counter()
                same, total = same + sum(x == y for x, y in zip(a, b, strict=True)), total + rows
                if repeat:  # the first is a warm-up for both
                    rates["ours"].append(rows * NEW / (middle - start))
                    rates["transformers"].append(rows * NEW / (end - middle))
            ratios = [x / y for x, y in zip(*rates.values(), strict=True)]
            ratio = statistics.median(ratios)
            good = (options.quick or ratio >= bar) and same == total
            passed &= good
            results[str(rows)] = {
                "tokens_per_second": {name: round(statistics.median(r), 1) for name, r in rates.items()},
                "ratio": round(ratio, 2),
                "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
                "torch_threads": torch_threads,
                "bar": None if options.quick else bar,
                "same_tokens": f"{same} of {total} rows",
                "compile_seconds": round(compile_seconds, 1),
            }
            medians = ", ".join(f"{name} {statistics.median(r):.1f}" for name, r in rates.items())
            print(
                f"{rows} rows: tokens/s {medians}; ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
                f"bar {bar}), {same} of {total} rows alike"
            )
    machine = f"{platform.machine()}, {threads} threads"
    load_average = round(os.getloadavg()[0], 1)
    print(
        json.dumps(
            {
                "benchmark": "generate_throughput",
                "label": "measured",
                "machine": machine,
                "load_average": load_average,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "parameters": count,
                "rows": results,
                "passed": bool(passed),
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
