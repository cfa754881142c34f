"""DPO: a model that seldom sorts learns to from pairs, of which it is only known which is better.

    python examples/dpo.py [--rounds 4] [--questions 1000] [--steps 400]

The task and the model to start from are in sorting.py. In each round the model answers questions eight times each; a
right and a wrong answer of the same question make a pair. The reference of a round is the model that wrote its pairs.
"""

import argparse
import shutil

import sorting

import redco_like as rl
from redco_like import rlhf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--questions", type=int, default=1000, help="of a round")
    parser.add_argument("--steps", type=int, default=400, help="of supervised fine-tuning before")
    arguments = parser.parse_args()
    shutil.rmtree("runs/dpo", ignore_errors=True)
    deployer = rl.Deployer("runs/dpo", seed=0)
    model, params = sorting.fine_tuned(deployer, steps=arguments.steps)
    print(f"before:  {sorting.share_right(model, params):.1%} right of 200 questions that are never trained on")
    for number in range(1, arguments.rounds + 1):
        pairs, _ = sorting.preference_pairs(model, params, seed=number, count=arguments.questions)
        steps = max(len(pairs) // 32, 1)
        trainer = rlhf.RLTrainer(
            deployer,
            model,
            params,
            algorithm=rlhf.DPO(beta=1.0),
            collate_fn=sorting.collate_pairs,
            optimizer=sorting.adam(3e-4, steps=steps),
            name=f"round{number}",
        )
        result = trainer.fit(pairs, iterations=steps, prompts_per_iteration=min(32, len(pairs)))
        params = trainer.params
        words = f"{len(pairs)} pairs, accuracy {result.metrics['accuracy']:.2f}, margin {result.metrics['margin']:.2f}"
        print(f"round {number}: {words}; then {sorting.share_right(model, params):.1%} right")


if __name__ == "__main__":
    main()
