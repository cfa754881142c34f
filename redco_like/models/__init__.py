"""Transformers of the published families, from one configuration record, with Hugging Face weights in and out.

    loaded = load("Llama-3.1-8B", plan="auto", dtype="bfloat16")
    save("out/tuned", loaded.model, loaded.params, tokenizer_from="Llama-3.1-8B")

Flax is imported when a model is built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from redco_like.models.architectures import architecture, architectures
from redco_like.models.config import Experts, Latent, ModelConfig, RopeScaling
from redco_like.models.hf import from_hf, read_config

if TYPE_CHECKING:
    from redco_like.models.model import Model
    from redco_like.models.weights.files import WeightsError
    from redco_like.models.weights.loading import Loaded, load
    from redco_like.models.weights.saving import save

__all__ = [
    "Experts",
    "Latent",
    "Loaded",
    "ModelConfig",
    "RopeScaling",
    "WeightsError",
    "architecture",
    "architectures",
    "build_model",
    "from_hf",
    "load",
    "read_config",
    "save",
]

_HOMES = {
    "Loaded": "redco_like.models.weights.loading",
    "WeightsError": "redco_like.models.weights.files",
    "load": "redco_like.models.weights.loading",
    "save": "redco_like.models.weights.saving",
}


def build_model(config: ModelConfig, *, dtype: str = "bfloat16") -> Model:
    """Functions of an architecture (parameters, loss, inference), computing in `dtype`."""
    from redco_like.models.model import build_model as build

    return build(config, dtype=dtype)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
