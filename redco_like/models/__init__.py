"""Transformers of the published families, from one configuration record. Flax is imported when a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redco_like.models.architectures import architecture, architectures
from redco_like.models.config import Experts, Latent, ModelConfig, RopeScaling
from redco_like.models.hf import from_hf, read_config

if TYPE_CHECKING:
    from redco_like.models.model import Model

__all__ = [
    "Experts",
    "Latent",
    "ModelConfig",
    "RopeScaling",
    "architecture",
    "architectures",
    "build_model",
    "from_hf",
    "read_config",
]


def build_model(config: ModelConfig, *, dtype: str = "bfloat16") -> Model:
    """Functions of an architecture (parameters, loss, inference), computing in `dtype`."""
    from redco_like.models.model import build_model as build

    return build(config, dtype=dtype)
