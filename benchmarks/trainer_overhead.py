"""What `Trainer.fit` costs over a hand-written loop.

Bar: at most 0.3 ms per step over the raw loop for a step of about 0.5 ms (a one-layer decoder of width 32, length 8,
batch 8, one device, 300 steps), and at least 0.97 of the raw loop's steps per second for a step of 20 ms.

Raw loop, `Trainer.fit` and, where it is installed, Redco run the same model on the same batches, in turn, in one
process, in an order that changes from round to round. What is compared is the median over the rounds of the difference
(or the ratio) within a round, so that other load on the machine counts for both. The raw loop is what a user writes: a
jitted step with donated state, fed with arrays collated beforehand, nothing fetched until the end. `Trainer.fit`
shuffles, collates, feeds, checks each step for non-finite numbers, logs a line every 10 steps and keeps a progress
line; the opening and closing of its files, threads and loader is in its time.

    python benchmarks/trainer_overhead.py            # last line: one JSON object; exit status 1 if the bar is missed
    pip install --no-deps redco==0.4.23 tqdm         # optional, in an environment of its own: adds Redco's figures
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import redco_like as rl

MAX_EXTRA_MS = 0.3
MIN_SPEED = 0.97


class Lm:
    """A decoder with one attention and one MLP block, as functions of a dict of arrays."""

    def __init__(self, width: int, length: int, batch: int, vocab: int = 64):
        self.width, self.length, self.batch, self.vocab = width, length, batch, vocab

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        d, v = self.width, self.vocab
        shapes = {"embed": (v, d), "q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (d, 4 * d),
                  "down": (4 * d, d), "head": (d, v)}  # fmt: skip
        keys = jax.random.split(rng, len(shapes))
        return {
            name: jax.random.normal(key, shape) * 0.05 for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def loss(self, params: Any, batch: Any) -> jax.Array:
        tokens_BL = batch["tokens"]
        x_BLD = params["embed"][tokens_BL]
        q, k, v = (x_BLD @ params[name] for name in "qkv")
        scores_BLL = jnp.einsum("bld,bmd->blm", q, k) / self.width**0.5
        causal = jnp.tril(jnp.ones((self.length, self.length), bool))[None]
        x_BLD += jax.nn.softmax(jnp.where(causal, scores_BLL, -1e9)) @ v @ params["o"]
        x_BLD += jax.nn.relu(x_BLD @ params["up"]) @ params["down"]
        logits_BLV = (x_BLD @ params["head"])[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL[:, 1:]).mean()

    def examples(self, steps: int) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return list(rng.integers(0, self.vocab, (steps * self.batch, self.length)).astype(np.int32))


def collate(examples: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {"tokens": np.stack(examples)}


def raw_loop(model: Lm, steps: int) -> Callable[[], float]:
    """A jitted step and a for loop; returns a function that gives seconds per step."""
    optimizer = optax.adam(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    examples = model.examples(steps)
    batches = [collate(examples[i : i + model.batch]) for i in range(0, len(examples), model.batch)]

    def run() -> float:
        params = jax.jit(model.init)(jax.random.key(0))
        state = jax.block_until_ready(optimizer.init(params))
        start = time.perf_counter()
        for batch in batches:
            params, state, loss = step(params, state, batch)
        jax.block_until_ready((params, loss))
        return (time.perf_counter() - start) / steps

    return run


def trainer_loop(model: Lm, steps: int, folder: str) -> Callable[[], float]:
    """`Trainer.fit` on the same, from the call to its return."""
    deployer = rl.Deployer(folder, log_level=logging.WARNING)
    trainer = rl.Trainer(deployer, collate, model.loss, model.init, optax.adam(1e-3), plan="data", mesh="data=1")
    examples = model.examples(steps)
    trainer.prepare(examples, global_batch=model.batch)

    def run() -> float:
        trainer.reset()
        jax.block_until_ready(trainer.params)
        start = time.perf_counter()
        trainer.fit(examples, global_batch=model.batch, checkpoint_every=None, resume=False)
        jax.block_until_ready(trainer.params)
        return (time.perf_counter() - start) / steps

    return run


def redco_loop(model: Lm, steps: int, folder: str) -> Callable[[], float]:
    """Redco 0.4.23 on the same."""
    import redco

    deployer = redco.Deployer(jax_seed=0, workdir=folder, verbose=False)

    def loss_fn(rng: Any, state: Any, params: Any, batch: Any, is_training: bool) -> jax.Array:
        del rng, state, is_training
        return model.loss(params, batch)

    examples = [{"tokens": tokens} for tokens in model.examples(steps)]
    trainer = redco.Trainer(
        deployer=deployer,
        collate_fn=lambda examples: collate([example["tokens"] for example in examples]),
        apply_fn=lambda *_: None,
        loss_fn=loss_fn,
        params=jax.tree.map(np.asarray, model.init(jax.random.key(0))),
        optimizer=optax.adam(1e-3),
    )

    def run() -> float:
        start = time.perf_counter()
        trainer.fit(train_examples=examples, per_device_batch_size=model.batch, n_epochs=1)
        return (time.perf_counter() - start) / steps

    return run


def compare(model: Lm, steps: int, rounds: int, *, with_redco: bool) -> dict[str, list[float]]:
    """Run the loops in turn; give the milliseconds per step of each, by round."""
    with tempfile.TemporaryDirectory() as folder:
        loops = {"raw": raw_loop(model, steps), "trainer": trainer_loop(model, steps, f"{folder}/a")}
        if with_redco:
            loops["redco"] = redco_loop(model, steps, f"{folder}/b")
        times: dict[str, list[float]] = {name: [] for name in loops}
        for i in range(rounds + 1):
            for name in sorted(loops, reverse=bool(i % 2)):
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    seconds = loops[name]()
                if i:  # the first round compiles and warms up
                    times[name].append(seconds * 1e3)
    return times


def summary(milliseconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    spread = {"min": min(milliseconds), "quartile1": low, "quartile3": high, "max": max(milliseconds)}
    return {name: round(value, 4) for name, value in {"median": middle, **spread}.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="overhead of Trainer.fit over a raw jit loop")
    parser.add_argument("--rounds", type=int, default=11, help="of the small step; the large one has twice as many")
    rounds = parser.parse_args().rounds
    with_redco = importlib.util.find_spec("redco") is not None and importlib.util.find_spec("tqdm") is not None
    small = compare(Lm(width=32, length=8, batch=8), 300, rounds, with_redco=with_redco)
    large = compare(Lm(width=128, length=64, batch=32), 40, 2 * rounds, with_redco=False)
    extra = statistics.median(t - r for t, r in zip(small["trainer"], small["raw"], strict=True))
    speed = statistics.median(r / t for t, r in zip(large["trainer"], large["raw"], strict=True))
    met = extra <= MAX_EXTRA_MS and speed >= MIN_SPEED
    for title, result in (("step of about 0.5 ms", small), ("step of about 20 ms", large)):
        print(title)
        for name, values in result.items():
            print(f"  {name:8s} {statistics.median(values):8.3f} ms per step  ({min(values):.3f} to {max(values):.3f})")
    print(
        f"extra: {extra:.3f} ms per small step (bar {MAX_EXTRA_MS}); speed: {speed:.3f} at the large (bar {MIN_SPEED})"
    )
    record = {
        "benchmark": "trainer_overhead",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "rounds": rounds,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "small_step_ms": {name: summary(values) for name, values in small.items()},
        "large_step_ms": {name: summary(values) for name, values in large.items()},
        "extra_ms_per_small_step": round(extra, 4),
        "large_step_speed": round(speed, 4),
        "redco": "not installed" if not with_redco else importlib.metadata.version("redco"),
        "extra_ms_of_redco": round(
            statistics.median(t - r for t, r in zip(small["redco"], small["raw"], strict=True)), 4
        )
        if with_redco
        else None,
        "met": met,
    }
    print(json.dumps(record))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
