"""Image classification: a Flax nnx network with batch normalisation on the handwritten digits of scikit-learn.

    python examples/digits_nnx.py

On a machine without an accelerator it runs on 8 virtual CPU devices. Shown: mutable state (the running statistics), a
metric besides the loss, evaluation in training, prediction in order.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import redco_like as rl

CHANNELS = 32
EPOCHS = 10
GLOBAL_BATCH = 64
LEARNING_RATE = 3e-3


class Net(nnx.Module):
    """Three convolutions, the second with stride 2, and a classifier of the mean over space."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(1, CHANNELS, (3, 3), rngs=rngs)
        self.norm_1 = nnx.BatchNorm(CHANNELS, momentum=0.9, rngs=rngs)
        self.conv_2 = nnx.Conv(CHANNELS, 2 * CHANNELS, (3, 3), strides=2, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(2 * CHANNELS, momentum=0.9, rngs=rngs)
        self.conv_3 = nnx.Conv(2 * CHANNELS, 2 * CHANNELS, (3, 3), rngs=rngs)
        self.head = nnx.Linear(2 * CHANNELS, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm_1(self.conv_1(x)))
        x = nnx.relu(self.norm_2(self.conv_2(x)))
        x = nnx.relu(self.conv_3(x))
        return self.head(x.mean(axis=(1, 2)))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


def init_fn(rng):
    model = Net(nnx.Rngs(rng))
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)


def collate_fn(examples):
    images, labels = zip(*examples, strict=True)
    return {"image": np.stack(images)[..., None].astype(np.float32) / 16, "label": np.asarray(labels, np.int32)}


def loss_fn(params, state, batch, training):
    model = nnx.merge(GRAPH, params, state)
    if training:
        model.train()
    else:
        model.eval()
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
    return rl.LossOutput(loss, metrics={"accuracy": accuracy}, state=nnx.state(model, nnx.BatchStat))


def pred_fn(params, state, batch):
    model = nnx.merge(GRAPH, params, state)
    model.eval()
    return model(batch["image"]).argmax(-1)


def main():
    digits = load_digits()
    data = list(zip(digits.images, digits.target, strict=True))
    train, test = train_test_split(data, test_size=0.2, random_state=0, stratify=digits.target)

    deployer = rl.Deployer(seed=0)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, EPOCHS * (len(train) // GLOBAL_BATCH))
    trainer = rl.Trainer(
        deployer, collate_fn, loss_fn, init_fn, optax.adamw(schedule, weight_decay=1e-3), learning_rate=schedule
    )
    trainer.fit(train, global_batch=GLOBAL_BATCH, epochs=EPOCHS, eval_examples=test)

    predictor = rl.Predictor(deployer, collate_fn, pred_fn, params=trainer.params, state=trainer.state.model_state)
    predicted = predictor.predict(test, per_device_batch=16)
    right = sum(int(guess) == int(label) for guess, (_, label) in zip(predicted, test, strict=True))
    print(f"accuracy {right / len(test):.4f} on {len(test)} digits never trained on")


if __name__ == "__main__":
    main()
