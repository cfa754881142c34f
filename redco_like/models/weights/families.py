"""The map of names of each family.

names = names_of(config)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from redco_like.models.config import ModelConfig
from redco_like.models.weights import encoders, gpt, llama, moe
from redco_like.models.weights.names import Names, Present

FAMILIES: dict[str, Callable[[ModelConfig, Present], Names]] = {
    "bart": encoders.bart,
    "bert": encoders.bert,
    "deepseek_v2": moe.deepseek,
    "deepseek_v3": moe.deepseek,
    "gemma": llama.llama,
    "gemma2": llama.llama,
    "gemma3_text": llama.llama,
    "gpt2": gpt.gpt2,
    "gpt_neox": gpt.gpt_neox,
    "gptj": gpt.gptj,
    "llama": llama.llama,
    "mbart": encoders.bart,
    "mistral": llama.llama,
    "mixtral": moe.mixtral,
    "mpt": gpt.mpt,
    "mt5": encoders.t5,
    "opt": gpt.opt,
    "phi": gpt.phi,
    "phi3": llama.phi3,
    "qwen2": llama.llama,
    "qwen2_moe": moe.qwen_moe,
    "qwen3": llama.llama,
    "qwen3_moe": moe.qwen_moe,
    "t5": encoders.t5,
    "vit": encoders.vit,
}


def names_of(config: ModelConfig, present: Present = None) -> Names:
    """The tensors that a model is made of.

    Args:
        present: names of the tensors of a checkpoint, where a family has been published in more than one form.

    Raises:
        ValueError: the family has no map; names the nearest that has.
    """
    if config.family not in FAMILIES:
        near = difflib.get_close_matches(config.family, FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"the weights of model_type {config.family!r} cannot be read{hint}; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.family](config, present)
