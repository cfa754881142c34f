"""A real task learned on CPUs by each algorithm, from a small fine-tuned model, with a reward that is exactly known.

    python benchmarks/rl_learning.py [--quick] [--svg docs/rlhf/learning.svg]          about 15 minutes, no extra needed

The task is that of the examples (`examples/sorting.py`): four digits are to be written in ascending order. The model,
0.1 M parameters, has learned from demonstrations of which one in eight is in that order. PPO, GRPO and RLOO get
a reward of 1 for the right completion and 0 for any other; DPO gets pairs that the same reward makes of the model's own
samples, in rounds. What is measured is the reward of draws at temperature 1, of questions that nobody trained on.

Bars, for PPO, GRPO and RLOO and each of three seeds: from below 0.2 to above 0.8, in under 8 minutes with fine-tuning
and compilation; for DPO, which sees no reward: from below 0.2 to above 0.5. `--quick` does GRPO with one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import jax  # noqa: E402
import sorting  # noqa: E402  # pyright: ignore[reportMissingImports]
from sorting import adam  # noqa: E402  # pyright: ignore[reportMissingImports]

import redco_like as rl  # noqa: E402
from redco_like import rlhf  # noqa: E402
from redco_like.report.markup import Markup, join, line, svg, tag, text  # noqa: E402

BEFORE, SECONDS = 0.2, 480.0
AFTER = {"PPO": 0.8, "GRPO": 0.8, "RLOO": 0.8, "DPO": 0.5}
SEEDS = (0, 1, 2)
ITERATIONS = 100
QUESTIONS = 400
"""That the reward is measured on, before and after."""
ROUNDS, ASKED, PAIRS = 5, 1000, 32
"""Of DPO: rounds, questions that 8 samples are drawn for in each, and pairs in a step."""
COLORS = {"PPO": "#4477aa", "GRPO": "#ee6677", "RLOO": "#228833", "DPO": "#aa3377"}
"""Paul Tol's bright colours: told apart with colour-blind eyes."""

ALGORITHMS: dict[str, tuple[Any, int]] = {
    "PPO": (rlhf.PPO(kl=0.005, epochs=2, minibatches=2), 256),
    "GRPO": (rlhf.GRPO(kl=0.005, samples=8), 32),
    "RLOO": (rlhf.RLOO(kl=0.005, samples=4), 64),
}
"""Settings, and prompts per iteration: 256 completions each."""


def online(name: str, deployer: rl.Deployer, model: Any, params: Any, iterations: int) -> tuple[Any, list[float]]:
    """Parameters after so many iterations, and the reward of each iteration's completions."""
    algorithm, prompts = ALGORITHMS[name]
    warm = 10 * algorithm.epochs * algorithm.minibatches
    curve: list[float] = []

    def metrics_fn(rewards: Sequence[float]) -> dict[str, float]:
        curve.append(sum(rewards) / len(rewards))
        return {}

    trainer = rlhf.RLTrainer(
        deployer,
        model,
        params,
        algorithm=algorithm,
        collate_fn=sorting.collate_fn,
        reward_fn=sorting.reward_fn,
        metrics_fn=metrics_fn,
        decode_fn=sorting.decode,
        optimizer={"actor": adam(5e-4, warm=warm), "critic": adam(1e-3, warm=warm)},
        eos=sorting.EOS,
        plan="colocated",
        name=name,
    )
    trainer.fit(
        sorting.questions(deployer.seed, prompts * iterations),
        iterations=iterations,
        prompts_per_iteration=prompts,
        sampling=rl.SamplingParams(max_tokens=sorting.MAX_TOKENS, temperature=1.0),
    )
    return trainer.params, curve


def preferences(deployer: rl.Deployer, model: Any, params: Any, rounds: int) -> tuple[Any, list[float]]:
    """Parameters after rounds of DPO, and the reward of the samples that each round began with."""
    curve = []
    for number in range(rounds):
        pairs, reward = sorting.preference_pairs(model, params, seed=rounds * deployer.seed + number, count=ASKED)
        curve.append(reward)
        steps = len(pairs) // PAIRS
        trainer = rlhf.RLTrainer(
            deployer,
            model,
            params,
            algorithm=rlhf.DPO(beta=1.0),
            collate_fn=sorting.collate_pairs,
            optimizer=adam(3e-4, steps=steps),
            plan="colocated",
            name=f"DPO/{number}",
        )
        trainer.fit(pairs, iterations=steps, prompts_per_iteration=PAIRS)
        params = trainer.params
    return params, curve


def learn(name: str, seed: int, *, iterations: int) -> dict[str, Any]:
    """One run: fine-tuning, the reward before, training, the reward after."""
    start = time.perf_counter()
    with rl.Deployer(None, seed=seed, log_level="WARNING") as deployer:
        model, params = sorting.fine_tuned(deployer)
        before = sorting.share_right(model, params, count=QUESTIONS)
        if name == "DPO":
            params, curve = preferences(deployer, model, params, ROUNDS)
        else:
            params, curve = online(name, deployer, model, params, iterations)
        after = sorting.share_right(model, params, count=QUESTIONS)
        greedy = sorting.share_right(model, params, count=QUESTIONS, temperature=0.0)
    seconds = time.perf_counter() - start
    run = {"algorithm": name, "seed": seed, "before": before, "after": after, "greedy": greedy, "seconds": seconds}
    print(f"{name:5} seed {seed}: {before:.3f} -> {after:.3f} (greedy {greedy:.3f}), {seconds:.0f} s", flush=True)
    return {**run, "curve": [round(value, 3) for value in curve]}


def draw(runs: Sequence[dict[str, Any]]) -> Markup:
    """A panel per algorithm, a line per seed, the bars dashed."""
    names = list(dict.fromkeys(run["algorithm"] for run in runs))
    wide, high, left, top, gap = 190.0, 170.0, 40.0, 34.0, 24.0
    drawn: list[Markup] = []
    for number, name in enumerate(names):
        x0 = left + number * (wide + gap)
        mine = [run for run in runs if run["algorithm"] == name]
        points = {id(run): [*run["curve"], run["after"]] if name == "DPO" else run["curve"] for run in mine}
        last = max(len(values) - 1 for values in points.values())

        def y(value: float) -> float:
            return top + high * (1 - value)

        for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            dashes = "4 3" if value in (BEFORE, 0.8) else None
            color = "#62666b" if dashes else "#e4e4de"
            drawn.append(line(x0, y(value), x0 + wide, y(value), "", stroke=color, stroke_dasharray=dashes))
            if not number:
                drawn.append(text(x0 - 8, y(value) + 4, f"{value:.1f}", anchor="end"))
        first = 0 if name == "DPO" else 1  # what a round begins with, and what an iteration has written
        for value in dict.fromkeys((0, last // 2, last)):
            drawn.append(text(x0 + wide * value / max(last, 1), top + high + 18, str(value + first), anchor="middle"))
        for run in mine:
            values = points[id(run)]
            spots = [f"{x0 + wide * i / max(last, 1):.1f},{y(value):.1f}" for i, value in enumerate(values)]
            drawn.append(tag("polyline", points=" ".join(spots), fill="none", stroke=COLORS[name], stroke_width=1.5))
        drawn.append(tag("text", name, x=x0, y=22.0, style=f"font-weight:650;fill:{COLORS[name]}"))
        drawn.append(text(x0 + wide, top + high + 36, "rounds" if name == "DPO" else "iterations", anchor="end"))
    width, height = left + len(names) * (wide + gap), top + high + 46
    style = tag("style", Markup("text{font:12px sans-serif;fill:#1d1f21}"))
    back = tag("rect", x=0, y=0, width=width, height=height, fill="#fffffb")
    label = "Reward of completions over iterations, a line per seed"
    body = svg(width, height, style, back, join(*drawn), label=label)
    return Markup(body.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" ', 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="GRPO with one seed")
    parser.add_argument("--algorithms", nargs="+", choices=[*ALGORITHMS, "DPO"], default=[*ALGORITHMS, "DPO"])
    parser.add_argument("--svg", type=pathlib.Path, help="draw the curves into this file")
    arguments = parser.parse_args()
    names, seeds = (["GRPO"], SEEDS[:1]) if arguments.quick else (arguments.algorithms, SEEDS)
    runs = [learn(name, seed, iterations=ITERATIONS) for name in names for seed in seeds]
    if arguments.svg is not None:
        arguments.svg.write_text(draw(runs) + "\n", "utf-8")
    missed = [
        f"{run['algorithm']} seed {run['seed']}"
        for run in runs
        if not (run["before"] < BEFORE and run["after"] > AFTER[run["algorithm"]] and run["seconds"] < SECONDS)
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    bars = {"before": BEFORE, "after": AFTER, "seconds": SECONDS}
    result = {"benchmark": "rl_learning", "machine": machine, "bars": bars, "missed": missed, "runs": runs}
    print(json.dumps(result))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
