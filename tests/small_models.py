"""Models and data small enough that a test is mostly compile time."""

import jax
import jax.numpy as jnp
import numpy as np

from pipelines import LossOutput

WIDTH, HIDDEN, CLASSES = 4, 16, 3


def init_mlp(rng):
    first, second = jax.random.split(rng)
    return {
        "w": jax.random.normal(first, (WIDTH, HIDDEN)) * 0.3,
        "b": jnp.zeros(HIDDEN),
        "v": jax.random.normal(second, (HIDDEN, CLASSES)) * 0.3,
    }


def logits(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"][None]) @ params["v"]


def cross_entropy(params, batch):
    """One loss per example."""
    scores = jax.nn.log_softmax(logits(params, batch["x"]))
    return -jnp.take_along_axis(scores, batch["y"][:, None], axis=1)[:, 0]


def mean_loss(params, batch):
    return cross_entropy(params, batch).mean()


def masked_loss(params, batch):
    """(sum, weight) over the examples whose mask is 1."""
    return (cross_entropy(params, batch) * batch["mask"]).sum(), batch["mask"].sum()


def batch_norm_loss(params, batch, state, training):
    """A running mean of the input, updated in training and used in evaluation."""
    mean = batch["x"].mean(0) if training else state["mean"]
    new = {"mean": 0.9 * state["mean"] + 0.1 * mean} if training else state
    centred = {**batch, "x": batch["x"] - jax.lax.stop_gradient(mean)[None]}
    return LossOutput(mean_loss(params, centred), state=new)


def init_batch_norm(rng):
    return init_mlp(rng), {"mean": jnp.zeros(WIDTH)}


def make_batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, WIDTH)).astype(np.float32),
        "y": rng.integers(0, CLASSES, rows).astype(np.int32),
        "mask": (rng.random(rows) < 0.4).astype(np.float32),
    }


def make_examples(count, seed=0):
    batch = make_batch(count, seed)
    return [{name: leaf[i] for name, leaf in batch.items()} for i in range(count)]


def collate(examples):
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
