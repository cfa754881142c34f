"""PPO: a model that seldom sorts learns to, with a critic that says what each token was worth.

    python examples/ppo.py [--iterations 40] [--steps 400]

The task and the model to start from are in sorting.py. Each of the 256 completions of an iteration gets 1 or 0, and a
penalty for what the fine-tuned model would not write, whose coefficient is steered to 3 nats per completion.
runs/ppo/rl/samples.html shows what the model wrote on the way.
"""

import argparse
import shutil

import sorting

import redco_like as rl
from redco_like import rlhf


def metrics_fn(completions):
    """Numbers of our own: how many completions are four digits, sorted or not."""
    return {"four_digits": sum(len(text) == 4 and text.isdigit() for text in completions) / len(completions)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400, help="of supervised fine-tuning before")
    arguments = parser.parse_args()
    shutil.rmtree("runs/ppo", ignore_errors=True)
    deployer = rl.Deployer("runs/ppo", seed=0)
    model, params = sorting.fine_tuned(deployer, steps=arguments.steps)
    print(f"before: {sorting.share_right(model, params):.1%} right of 200 questions that are never trained on")
    trainer = rlhf.RLTrainer(
        deployer,
        model,
        params,
        algorithm=rlhf.PPO(kl=0.005, kl_target=3.0, epochs=2, minibatches=2),
        collate_fn=sorting.collate_fn,
        reward_fn=sorting.reward_fn,
        metrics_fn=metrics_fn,
        decode_fn=sorting.decode,
        optimizer={"actor": sorting.adam(5e-4, warm=40), "critic": sorting.adam(1e-3, warm=40)},
        eos=sorting.EOS,
    )
    result = trainer.fit(
        sorting.questions(seed=0, count=256 * arguments.iterations),
        iterations=arguments.iterations,
        prompts_per_iteration=256,
        sampling=rl.SamplingParams(max_tokens=sorting.MAX_TOKENS, temperature=1.0),
    )
    told = ("reward", "kl", "kl_coefficient", "entropy", "clip_fraction", "explained_variance", "four_digits")
    print("last iteration: " + ", ".join(f"{name} {result.metrics[name]:.3g}" for name in told))
    print(f"after:  {sorting.share_right(model, trainer.params):.1%} right; {trainer.folder}/samples.html")


if __name__ == "__main__":
    main()
