"""GRPO: a model that seldom sorts learns to, from a reward of 1 or 0 for each of 8 completions per question.

    python examples/grpo.py [--iterations 80] [--steps 400]

The task and the model to start from are in sorting.py. There is no critic: the completions of a question are compared
with each other. runs/grpo/rl/samples.html shows what the model wrote on the way.
"""

import argparse
import shutil

import sorting

import redco_like as rl
from redco_like import rlhf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--steps", type=int, default=400, help="of supervised fine-tuning before")
    arguments = parser.parse_args()
    shutil.rmtree("runs/grpo", ignore_errors=True)
    deployer = rl.Deployer("runs/grpo", seed=0)
    model, params = sorting.fine_tuned(deployer, steps=arguments.steps)
    print(f"before: {sorting.share_right(model, params):.1%} right of 200 questions that are never trained on")
    trainer = rlhf.RLTrainer(
        deployer,
        model,
        params,
        algorithm=rlhf.GRPO(samples=8, kl=0.005),
        collate_fn=sorting.collate_fn,
        reward_fn=sorting.reward_fn,
        decode_fn=sorting.decode,
        optimizer=sorting.adam(5e-4),
        eos=sorting.EOS,
    )
    trainer.fit(
        sorting.questions(seed=0, count=32 * arguments.iterations),
        iterations=arguments.iterations,
        prompts_per_iteration=32,
        sampling=rl.SamplingParams(max_tokens=sorting.MAX_TOKENS, temperature=1.0),
    )
    print(f"after:  {sorting.share_right(model, trainer.params):.1%} right; {trainer.folder}/samples.html")


if __name__ == "__main__":
    main()
