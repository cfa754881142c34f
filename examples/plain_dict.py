"""A language model of characters whose parameters are a plain dict of arrays: no framework, no annotation.

    python examples/plain_dict.py

The text is the source of three modules of Python's standard library. The model looks at 16 characters and predicts the
next one (Bengio et al. 2003, with residuals). On a machine without an accelerator it runs on 8 virtual CPU devices.
Shown: a preset chosen by name, a loss as a sum and a weight, sampling with a Predictor.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import argparse
import inspect
import string
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax

import redco_like as rl

ALPHABET = string.printable
WINDOW = 16
EMBED, WIDE, BLOCKS = 16, 512, 2
GLOBAL_BATCH = 512
STEPS = 400
LEARNING_RATE = 3e-3


def init_fn(rng):
    keys = iter(jax.random.split(rng, 3 + 2 * BLOCKS))

    def matrix(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    size = WINDOW * EMBED
    return {
        "characters": matrix(len(ALPHABET), EMBED),
        "blocks": [
            {"scale": jnp.ones(size), "up": matrix(size, WIDE), "bias": jnp.zeros(WIDE), "down": matrix(WIDE, size)}
            for _ in range(BLOCKS)
        ],
        "scale": jnp.ones(size),
        "out": matrix(size, len(ALPHABET)),
    }


def normalised(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def logits_of(params, window):
    x = params["characters"][window].reshape(window.shape[0], -1)
    for block in params["blocks"]:
        h = jax.nn.gelu(normalised(x, block["scale"]) @ block["up"] + block["bias"])
        x = x + h @ block["down"]
    return normalised(x, params["scale"]) @ params["out"]


def collate_fn(examples):
    text = np.stack(examples).astype(np.int32)
    return {"window": text[:, :WINDOW], "next": text[:, -1]}


def loss_fn(params, batch):
    logits = logits_of(params, batch["window"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["next"])
    right = (logits.argmax(-1) == batch["next"]).astype(jnp.float32)
    weight = jnp.float32(losses.shape[0])
    return rl.LossOutput(losses.sum(), weight=weight, metrics={"accuracy": (right.sum(), weight)})


def pred_fn(params, batch, rng):
    keys = jax.vmap(lambda step: jax.random.fold_in(rng, step))(batch["step"])
    return jax.vmap(jax.random.categorical)(keys, logits_of(params, batch["window"]) / 0.5)


def collate_prompts(examples):
    windows, steps = zip(*examples, strict=True)
    return {"window": np.stack(windows), "step": np.asarray(steps, np.int32)}


def sample(predictor, prompts, length):
    """Extend all prompts at once, one character at a time."""
    texts = [list(encode(prompt.rjust(WINDOW))) for prompt in prompts]
    for step in range(length):
        examples = [(np.asarray(text[-WINDOW:], np.int32), step * len(texts) + i) for i, text in enumerate(texts)]
        for text, character in zip(texts, predictor.predict(examples, per_device_batch=1), strict=True):
            text.append(int(character))
    return ["".join(ALPHABET[c] for c in text).strip() for text in texts]


def encode(text):
    return np.asarray([ALPHABET.index(c) for c in text if c in ALPHABET], np.int32)


def main():
    text = encode("".join(inspect.getsource(module) for module in (argparse, inspect, subprocess)))
    examples = np.lib.stride_tricks.sliding_window_view(text, WINDOW + 1)
    # The end of the text is kept for the test, without overlap.
    cut = int(0.95 * len(examples))
    train, test = examples[: cut - WINDOW], examples[cut:]

    deployer = rl.Deployer(seed=0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 20, STEPS)
    trainer = rl.Trainer(
        deployer, collate_fn, loss_fn, init_fn, optax.adamw(schedule), plan="fsdp+megatron", learning_rate=schedule
    )
    trainer.fit(train, global_batch=GLOBAL_BATCH, steps=STEPS, log_every=50)

    predictor = rl.Predictor(deployer, collate_prompts, pred_fn, params=trainer.params)
    for text in sample(predictor, ["    def __init__(", "        return ", "import ", "# The "], 60):
        print(repr(text))
    found = trainer.evaluate(test)
    print(f"loss {found['loss']:.4f}, accuracy {found['accuracy']:.4f} on {len(test)} characters never trained on")


if __name__ == "__main__":
    main()
