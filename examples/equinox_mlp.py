"""Classification of a table with an Equinox network: benign or malignant, from 30 measurements (scikit-learn).

    python examples/equinox_mlp.py

On a machine without an accelerator it runs on 8 virtual CPU devices. Shown: parameters are the arrays of
`eqx.partition`; dropout that is off outside training; probabilities from a Predictor.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import redco_like as rl

WIDTH = 64
EPOCHS = 20
GLOBAL_BATCH = 64
LEARNING_RATE = 1e-3


class Net(eqx.Module):
    """One example in, one logit out; two hidden layers with dropout between them."""

    layers: list[eqx.nn.Linear]
    dropout: eqx.nn.Dropout

    def __init__(self, rng):
        sizes = (30, WIDTH, WIDTH, 1)
        keys = jax.random.split(rng, len(sizes) - 1)
        self.layers = [eqx.nn.Linear(m, n, key=k) for m, n, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
        self.dropout = eqx.nn.Dropout(0.4)

    def __call__(self, x, rng, inference):
        x = jax.nn.relu(self.layers[0](x))
        x = self.dropout(x, key=rng, inference=inference)
        x = jax.nn.relu(self.layers[1](x))
        return self.layers[2](x)[0]


# What is not an array: functions, sizes, rates.
SHAPES = eqx.filter_eval_shape(Net, jax.eval_shape(jax.random.key, 0))
STATIC = eqx.filter(SHAPES, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), inverse=True)


def init_fn(rng):
    return eqx.filter(Net(rng), eqx.is_array)


def logits_of(params, x, rng, *, inference):
    model = eqx.combine(params, STATIC)
    return jax.vmap(lambda row, key: model(row, key, inference))(x, jax.random.split(rng, x.shape[0]))


def collate_fn(examples):
    rows, labels = zip(*examples, strict=True)
    return {"x": np.stack(rows).astype(np.float32), "malignant": np.asarray(labels, np.float32)}


def loss_fn(params, batch, rng, training):
    logits = logits_of(params, batch["x"], rng, inference=not training)
    return optax.sigmoid_binary_cross_entropy(logits, batch["malignant"]).mean()


def pred_fn(params, batch, rng):
    return jax.nn.sigmoid(logits_of(params, batch["x"], rng, inference=True))


def main():
    table = load_breast_cancer()
    x, malignant = table.data, (table.target == 0).astype(int)
    x_train, x_test, y_train, y_test = train_test_split(
        x, malignant, test_size=0.25, random_state=0, stratify=malignant
    )
    scaler = StandardScaler().fit(x_train)
    train = list(zip(scaler.transform(x_train), y_train, strict=True))
    test = list(zip(scaler.transform(x_test), y_test, strict=True))

    deployer = rl.Deployer(seed=0)
    trainer = rl.Trainer(
        deployer, collate_fn, loss_fn, init_fn, optax.adamw(LEARNING_RATE, weight_decay=0.1), plan="fsdp"
    )
    trainer.fit(train, global_batch=GLOBAL_BATCH, epochs=EPOCHS)

    print(f"loss {trainer.evaluate(test)['loss']:.4f}")
    predictor = rl.Predictor(deployer, collate_fn, pred_fn, params=trainer.params)
    probabilities = np.asarray(predictor.predict(test, per_device_batch=8))
    right = (probabilities > 0.5) == (y_test == 1)
    print(f"accuracy {right.mean():.4f} on {len(test)} patients never trained on")


if __name__ == "__main__":
    main()
