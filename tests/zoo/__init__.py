"""The models that axis inference must understand: small, complete, and with names that mean nothing.

    import zoo
    zoo.MODELS["llama_scanned"]                  # built when asked for
    loss, params, batch = zoo.llama_8b(scanned=True)     # shapes only

Importing makes no array and loads no framework.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from zoo.base import ZooModel
from zoo.large import llama_8b, llama_pinning

__all__ = ["MODELS", "ZooModel", "llama_8b", "llama_pinning"]

_BUILDERS = {
    "mlp": ("mlp", "plain"),
    "mlp_equal": ("mlp", "equal"),
    "mlp_residual": ("mlp", "residual"),
    "fixed_point": ("mlp", "fixed_point"),
    "gpt2": ("gpt", "gpt2"),
    "gpt2_reshaped": ("gpt", "gpt2_reshaped"),
    "opt": ("gpt", "opt"),
    "llama_scanned": ("llama", "scanned"),
    "llama_unrolled": ("llama", "unrolled"),
    "llama_repeat": ("llama", "repeat"),
    "llama_sdpa": ("llama", "sdpa"),
    "llama_fused": ("llama", "fused"),
    "llama_remat": ("llama", "remat"),
    "llama_linen_scanned": ("frameworks", "linen_scanned"),
    "llama_linen_unrolled": ("frameworks", "linen_unrolled"),
    "llama_nnx": ("frameworks", "nnx_llama"),
    "t5": ("t5", "t5"),
    "encoder_linen": ("frameworks", "linen_encoder"),
    "moe_one_hot": ("moe", "one_hot"),
    "moe_ragged": ("moe", "ragged"),
    "lstm": ("moe", "lstm"),
    "vit_conv": ("vision", "vit_conv"),
    "vit_reshape": ("vision", "vit_reshape"),
    "mixer": ("vision", "patches_mixer"),
    "resnet": ("vision", "resnet"),
    "resnet_group": ("vision", "resnet_group"),
    "unet": ("vision", "unet"),
    "equinox_mlp": ("frameworks", "equinox_mlp"),
    "equinox_transformer": ("frameworks", "equinox_transformer"),
}


class _Lazy(Mapping[str, ZooModel]):
    """Models by name, built on first use."""

    def __init__(self) -> None:
        self._built: dict[str, ZooModel] = {}

    def __getitem__(self, name: str) -> ZooModel:
        if name not in self._built:
            module, builder = _BUILDERS[name]
            self._built[name] = getattr(importlib.import_module(f"zoo.{module}"), builder)(name)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_BUILDERS)

    def __len__(self) -> int:
        return len(_BUILDERS)


MODELS: Mapping[str, ZooModel] = _Lazy()
