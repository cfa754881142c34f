"""Low-rank adapters (LoRA, arXiv 2106.09685) of any parameters, chosen by path.

adapters = lora.init(jax.random.key(0), base, ["*attention/*/kernel"], rank=8, alpha=16)
params = lora.join(base, adapters)                    # the base is frozen: no gradient, no optimizer state
trainer = rl.Trainer(deployer, collate_fn, lora.wrap(loss_fn), None, optax.adamw(1e-3), params=params)
tuned = lora.merge(base, trainer.params["adapters"])  # parameters like the base's, at its speed
"""

from redco_like.lora.adapters import Adapter, Split, init, join, merge, wrap
from redco_like.lora.peft import load_peft, save_peft

__all__ = ["Adapter", "Split", "init", "join", "load_peft", "merge", "save_peft", "wrap"]
