"""The task of the examples of reinforcement learning: four digits in, the same digits in ascending order out.

    python examples/ppo.py        python examples/grpo.py        python examples/dpo.py

A small Llama starts from demonstrations that are good at something else: of each list of digits one copy in eight is in
ascending order, the others are as they came or backwards. So the model can sort, and seldom does. Whether a completion
is right is exactly known.
"""

import dataclasses
import random

import numpy as np
import optax

import redco_like as rl
from redco_like import models, rlhf

LETTERS = "0123456789=;"
EOS = (LETTERS.index(";"),)
MAX_TOKENS = 6


def encode(text):
    return tuple(LETTERS.index(letter) for letter in text)


def decode(tokens):
    return "".join(LETTERS[token] for token in tokens)


def questions(seed, count, *, test=False):
    """Four digits each; one list in eight is only for tests."""
    numbers = [n for n in range(10_000) if (n % 8 == 0) == test]
    return [f"{n:04}=" for n in random.Random(seed).choices(numbers, k=count)]


def right(question):
    return "".join(sorted(question[:-1]))


def collate_fn(prompts):
    return [encode(prompt) for prompt in prompts]


def reward_fn(prompts, completions):
    """1 for the digits in ascending order and nothing else, 0 for all else. Completions are texts without their end."""
    return [float(completion == right(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


def demonstrations(seed, count):
    """(question, answer) as people wrote them: 2 of 16 in ascending order, 7 as they came, 7 backwards."""
    draw, pairs = random.Random(seed), []
    for question in questions(seed, count):
        digits, how = question[:-1], draw.randrange(16)
        pairs.append((question, (right(question) if how < 2 else digits if how < 9 else digits[::-1]) + ";"))
    return pairs


def adam(rate, *, warm=10, steps=None):
    """Adam as reinforcement learning likes it: small first steps, clipped gradients, a short memory of squares.

    With `steps` the rate falls to 0 by then.
    """
    schedule = optax.linear_schedule(rate / 10, rate, warm)
    if steps is not None:
        schedule = optax.warmup_cosine_decay_schedule(rate / 10, rate, min(warm, steps // 2), max(steps, 2))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95))


def fine_tuned(deployer, *, steps=400):
    """The model, and its parameters after supervised fine-tuning."""
    sizes = {"embed": 64, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "mlp": 192}
    config = dataclasses.replace(models.architecture("llama-2-7b"), vocab=len(LETTERS), max_length=16, **sizes)
    model = models.build_model(config, dtype="float32")
    trainer = rlhf.RLTrainer(
        deployer,
        model,
        model.init_fn(deployer.rng("model")),
        algorithm=rlhf.SFT(),
        collate_fn=lambda pairs: [(encode(question), encode(answer)) for question, answer in pairs],
        optimizer=optax.adamw(optax.cosine_decay_schedule(2e-3, steps)),
        name="sft",
    )
    trainer.fit(demonstrations(deployer.seed, 64 * steps), iterations=steps, prompts_per_iteration=64)
    return model, trainer.params


def share_right(model, params, *, seed=0, count=200, temperature=1.0):
    """How many questions that nobody trained on are answered rightly, by draws at a temperature."""
    asked = questions(seed, count, test=True)
    engine = rl.Engine(model, params, rows=64, length=16, eos=EOS)
    sampling = [rl.SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=i) for i in range(len(asked))]
    written = [decode(done.tokens[:-1]) for (done,) in engine.generate(collate_fn(asked), sampling)]
    return float(np.mean(reward_fn(asked, written)))


def preference_pairs(model, params, *, seed, count):
    """(question, right, wrong) made of the model's own samples, and the reward of all samples."""
    asked = questions(seed, count)
    engine = rl.Engine(model, params, rows=256, length=16, eos=EOS)
    sampling = [
        rl.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, n=8, seed=seed * count + i) for i in range(count)
    ]
    pairs, rewards = [], []
    for question, samples in zip(asked, engine.generate(collate_fn(asked), sampling), strict=True):
        texts = [decode(done.tokens) for done in samples]
        good = [text for text in texts if text == right(question) + ";"]
        bad = [text for text in texts if text != right(question) + ";"]
        rewards.append(len(good) / len(texts))
        pairs += [(question, good[i % len(good)], text) for i, text in enumerate(bad[:4]) if good]
    return pairs, float(np.mean(rewards))


def collate_pairs(pairs):
    return [tuple(encode(text) for text in pair) for pair in pairs]
