"""A small language model of Python, on text that every machine has: the standard library's own sources.

    python examples/lm.py             train (or go on from the last checkpoint), evaluate, sample
    python examples/lm.py --demo      the same, killed half way and resumed: the losses done twice are compared

On a CPU it stands in for a pod: 8 virtual devices, as data 2 x fsdp 2 x tensor 2. On GPUs or TPUs the same script takes
every device, and the plan that fits. No line of the model or the loss says how anything is sharded.
"""

import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import redco_like as rl

WORKDIR = pathlib.Path("runs/lm")
LENGTH, EMBED, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 96, 128, 3, 8, 4, 384, 2048
GLOBAL_BATCH, STEPS, CHECKPOINT_EVERY = 16, 700, 100
PROMPTS = ["def __init__(self", "import ", "    for ", "class "]


class Vocabulary:
    """The 256 bytes and the pieces of text (words, runs of blanks) that are most frequent."""

    def __init__(self, text: bytes):
        count = collections.Counter(self.cut(text))
        frequent = [piece for piece, _ in count.most_common() if len(piece) > 1]
        self.pieces = [bytes([i]) for i in range(256)] + frequent[: VOCAB - 256]
        self.ids = {piece: [i] for i, piece in enumerate(self.pieces)}

    @staticmethod
    def cut(text: bytes) -> list[bytes]:
        return re.findall(rb"\n *| ?[A-Za-z]+|_+|.", text, re.DOTALL)

    def encode(self, text: bytes) -> np.ndarray:
        return np.array([i for piece in self.cut(text) for i in self.ids.get(piece, piece)], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return b"".join(self.pieces[i] for i in tokens).decode(errors="replace")


class Block(nn.Module):
    """Grouped-query attention and a gated MLP, as one step of a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        batch, length, _ = x.shape
        h = nn.RMSNorm()(x)
        q, k, v = jnp.split(
            nn.Dense((HEADS + 2 * KV_HEADS) * (EMBED // HEADS), use_bias=False)(h),
            [EMBED, EMBED + EMBED * KV_HEADS // HEADS],
            axis=-1,
        )
        heads = jax.nn.dot_product_attention(
            q.reshape(batch, length, HEADS, -1),
            k.reshape(batch, length, KV_HEADS, -1),
            v.reshape(batch, length, KV_HEADS, -1),
            is_causal=True,
        )
        x = x + nn.Dense(EMBED, use_bias=False)(heads.reshape(x.shape))
        h = nn.RMSNorm()(x)
        return x + nn.Dense(EMBED, use_bias=False)(nn.silu(nn.Dense(MLP)(h)) * nn.Dense(MLP)(h)), None


class LanguageModel(nn.Module):
    """Logits of the next token at every position of (batch, length) tokens."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, EMBED)(tokens) + self.param("positions", nn.initializers.normal(0.02), (LENGTH, EMBED))
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()(x, None)
        return nn.Dense(VOCAB, use_bias=False)(nn.RMSNorm()(x))


model = LanguageModel()


def collate_fn(examples):
    return {"tokens": np.stack(examples)}


def init_fn(rng):
    return model.init(rng, jnp.zeros((1, LENGTH), jnp.int32))["params"]


def loss_fn(params, batch):
    logits = model.apply({"params": params}, batch["tokens"][:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    return losses.sum(), losses.size


def pred_fn(params, batch, rng):
    """Continue each row after its given tokens; a token is drawn at temperature 0.6."""

    def extend(i, tokens):
        logits = model.apply({"params": params}, tokens)[:, i - 1] / 0.6
        drawn = jax.random.categorical(jax.random.fold_in(rng, i), logits)
        return tokens.at[:, i].set(jnp.where(i < batch["given"], tokens[:, i], drawn))

    return jax.lax.fori_loop(1, LENGTH, extend, batch["tokens"])


def collate_prompts(prompts):
    given = np.array([len(prompt) for prompt in prompts], np.int32)
    return {"tokens": np.stack([np.pad(p, (0, LENGTH - len(p))) for p in prompts]), "given": given}


def main():
    sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(path.read_bytes() for path in sources)
    vocabulary = Vocabulary(text)
    tokens = vocabulary.encode(text)
    rows = [tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - LENGTH - 1, LENGTH)]
    train, valid = rows[:-256], rows[-256:]
    print(f"{len(sources)} files, {len(text):,} bytes as {len(tokens):,} tokens of {VOCAB}")

    on_cpu = jax.default_backend() == "cpu"
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, 20, STEPS)
    deployer = rl.Deployer(WORKDIR, seed=0)
    trainer = rl.Trainer(
        deployer,
        collate_fn,
        loss_fn,
        init_fn,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
        mesh="data=2,fsdp=2,tensor=2" if on_cpu and jax.device_count() == 8 else None,
        compute_dtype="float32" if on_cpu else "bfloat16",
        learning_rate=rate,
    )
    trainer.fit(train, global_batch=GLOBAL_BATCH, steps=STEPS, eval_examples=valid, checkpoint_every=CHECKPOINT_EVERY)
    loss = trainer.evaluate(valid)["loss"]
    size = sum(len(vocabulary.pieces[i]) for row in valid for i in row[1:]) / (len(valid) * LENGTH)
    print(f"\nheld out: {loss:.3f} nats per token, {loss / size / np.log(2):.2f} bits per byte")

    predictor = rl.Predictor(deployer, collate_prompts, pred_fn, params=lambda: trainer.params)
    prompts = [vocabulary.encode(prompt.encode()) for prompt in PROMPTS]
    for row in predictor.predict(prompts, per_device_batch=1):
        print("-" * 60, vocabulary.decode(row), sep="\n")


def demo():
    """Train in a child, kill it between checkpoints, start it again; losses of steps done twice must be equal."""
    shutil.rmtree(WORKDIR, ignore_errors=True)
    log = WORKDIR / "train" / "metrics.jsonl"
    child = subprocess.Popen([sys.executable, __file__])
    kill_at = CHECKPOINT_EVERY * 2 + CHECKPOINT_EVERY // 2
    while child.poll() is None and not any(step >= kill_at for step, _ in losses(log)):
        time.sleep(0.2)
    if child.returncode is not None:
        sys.exit(f"training ended with {child.returncode} before step {kill_at}")
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = losses(log)
    print(f"\n--- killed after step {before[-1][0]}; starting again ---\n", flush=True)
    subprocess.run([sys.executable, __file__], check=True)
    after = dict(losses(log)[len(before) :])
    twice = [(step, loss, after[step]) for step, loss in before if step in after]
    print("\nstep  loss before the kill  after resuming")
    for step, first, second in twice:
        print(f"{step:4}  {first:.6f}              {second:.6f}")
    if not twice or any(first != second for _, first, second in twice):
        sys.exit("the resumed run does not repeat the losses of the killed one")
    print("resumed: the same losses, bit for bit")


def losses(log):
    """(step, loss) of each line of a metrics file, in the order written."""
    return [(line["step"], line["loss"]) for line in (rl.read_metrics(log) if log.exists() else []) if "loss" in line]


if __name__ == "__main__":
    demo() if "--demo" in sys.argv[1:] else main()
