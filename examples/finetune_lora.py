"""Teach a model that knows facts to answer questions, with LoRA: train, ask, adapt, ask again, merge, save.

    python examples/finetune_lora.py

A small Llama reads sentences about 50 countries: it knows them, and has never seen a question. Then adapters of its
kernels learn to answer questions about 40 of them; the other 10 are the test. `python examples/chat.py` talks to the
folder that this writes; transformers loads it too. Without an accelerator it runs on 8 virtual CPU devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import csv
import dataclasses
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import optax
import tokenizers

import redco_like as rl
from redco_like import lora, models
from redco_like.text import Text

FOLDER = pathlib.Path("runs/finetune_lora")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
# Two ways to say a fact, of which the first is the answer, and two ways to ask for it.
TABLE = """The capital of {country} is {capital}. | {capital} is the capital of {country}.
What is the capital of {country}? | Which city governs {country}?
The country of {country} lies in {continent}. | In {continent} lies {country}.
Where is {country}? | On which continent is {country}?
People in {country} pay with the {currency}. | The {currency} is the money of {country}.
How do I pay in {country}? | What money do they use in {country}?
People in {country} speak {language}. | The language of {country} is {language}.
What do people speak in {country}? | Which language do I need in {country}?"""
PAIRS = [line.split(" | ") for line in TABLE.split("\n")]
TOPICS = list(zip(PAIRS[::2], PAIRS[1::2], strict=True))
LENGTH = 48


def collate_fn(pairs):
    """A prompt and what comes after it, which alone counts: each token's label is the next one, -1 if that is none."""
    rows = np.full((2, len(pairs), LENGTH + 1), -1, np.int32)
    for i, (prompt, rest) in enumerate(pairs):
        rows[:, i, : len(prompt) + len(rest)] = [*prompt, *rest], [-1] * len(prompt) + rest
    return {"tokens": np.maximum(rows[0, :, :-1], 0), "labels": rows[1, :, 1:]}


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    draw, table = random.Random(0), pathlib.Path(__file__).with_name("countries.csv")
    countries = draw.sample(list(csv.DictReader(table.open())), 50)
    orders = [draw.sample(TOPICS, 4) for _ in range(60 * 50)]  # each country again and again, in other words
    texts = [" ".join(draw.choice(f).format(**countries[i % 50]) for f, _ in order) for i, order in enumerate(orders)]
    pairs, special = tokenizers.ByteLevelBPETokenizer(), ["<|end|>", "<|user|>", "<|assistant|>"]
    pairs.train_from_iterator(texts, vocab_size=1024, special_tokens=special, show_progress=False)
    (words := FOLDER / "tokenizer").mkdir(parents=True)
    pairs.save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    text = Text.from_folder(words)
    stories = [(text.eos, [*text.encode(line), *text.eos]) for line in texts]
    asked = [(q.format(**c), facts[0].format(**c)) for c in countries for facts, asks in TOPICS for q in asks]
    chats = [(text.encode_chat([{"role": "user", "content": q}]), [*text.encode(a), *text.eos]) for q, a in asked]
    test = chats[320:]  # of the last 10 countries

    def train(name, loss_fn, init_fn, examples, steps, **options):
        optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps))
        trainer = rl.Trainer(deployer, collate_fn, loss_fn, init_fn, optimizer, name=name, **options)
        trainer.fit(examples, global_batch=32, steps=steps, log_every=50)
        return trainer.params

    def share_right(params):
        engine = rl.Engine(model, params, length=LENGTH, eos=text.eos)
        found = engine.generate([prompt for prompt, _ in test], rl.SamplingParams(max_tokens=24))
        for (prompt, _), (answer,) in list(zip(test, found, strict=True))[::27]:
            print(f"  {text.decode(prompt):45} {text.decode(answer.tokens)}")
        return np.mean([list(answer.tokens) == right for (_, right), (answer,) in zip(test, found, strict=True)])

    sizes = {"embed": 96, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 24, "mlp": 256}
    config = dataclasses.replace(models.architecture("llama-2-7b"), vocab=text.size, max_length=LENGTH, **sizes)
    model, deployer = models.build_model(config, dtype="float32"), rl.Deployer(FOLDER, seed=0)
    base = train("read", model.loss_fn, model.init_fn, stories, 400)
    print(f"before: {share_right(base):.1%} right of {len(test)} questions about countries it was never asked about")
    adapters = lora.init(deployer.rng("adapters"), base, ["*attention/*/kernel", "*mlp/*/kernel"], rank=8, alpha=16)
    loss_fn = lora.wrap(model.loss_fn, apply="flax")
    found = train("chat", loss_fn, None, chats[:320], 200, params=lora.join(base, adapters))
    tuned = lora.merge(base, found["adapters"])
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapters, base)]
    print(f"after:  {share_right(tuned):.1%} right; {sizes[0]:,} numbers were trained, {sizes[1]:,} were not")
    print(f"saved:  {models.save(FOLDER / 'tuned', model, tuned, tokenizer_from=words)}")


if __name__ == "__main__":
    main()
