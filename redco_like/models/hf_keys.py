"""Keys of Hugging Face's `config.json` that several families share: activations, rotary positions, windows.

    k = Keys(json.loads(text))
    k.size("hidden_size")
    rotary_fields(k)            # of `ModelConfig`

Version 5 of transformers keeps in `rope_parameters` what older files have in `rope_theta`, `rope_scaling` and keys
beside them; both are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redco_like.models.config import RopeScaling

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Keys:
    """Values of a configuration; notes what is missing, so that all of it is reported at once."""

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        self.missing: list[str] = []

    def size(self, *names: str) -> int:
        """A whole number that must be there, under one of several names."""
        for name in names:
            if self.data.get(name) is not None:
                value = self.data[name]
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ValueError(f"{name}={value!r}; it must be a whole number")
                return value
        self.missing.append(names[0])
        return 1

    def get(self, name: str, default: Any) -> Any:
        """A value, or the default that the family has where the key is left out."""
        value = self.data.get(name)
        return default if value is None else value

    def activation(self, name: str, default: str) -> Any:
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            raise ValueError(f"{name}={value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, *allowed: Any) -> None:
        """Raise where a key has a value other than those that are supported."""
        if name in self.data and self.data[name] not in allowed:
            raise ValueError(
                f"{name}={self.data[name]!r} is not supported; supported: {', '.join(repr(a) for a in allowed)}"
            )


def stored_dtype(data: Mapping[str, Any]) -> str | None:
    """The dtype that a configuration says its weights have: `dtype`, or `torch_dtype` in older files.

    >>> stored_dtype({"torch_dtype": "bfloat16"})
    'bfloat16'
    """
    value = data.get("dtype") or data.get("torch_dtype")
    return None if value is None else str(value).removeprefix("torch.")


def windows(k: Keys, layers: int, window: int, near: Sequence[bool]) -> dict[str, int]:
    """Fields for layers of which some look back over `window` tokens, and some over all.

    Args:
        near: which layers have the window, where the file has no `layer_types`.

    Raises:
        ValueError: an order of layers that `ModelConfig` cannot say.
    """
    kinds = k.get("layer_types", ["sliding_attention" if x else "full_attention" for x in near])
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types={kinds!r} is not supported; supported: for each of num_hidden_layers={layers} layers "
            "'full_attention' or 'sliding_attention'"
        )
    wide = [kind == "full_attention" for kind in kinds]
    if not window or all(wide):
        return {}
    first = wide.index(False)
    if not any(wide[first:]):
        return {"window": window, "global_first": first}
    every = wide.index(True) + 1
    if wide == [(i + 1) % every == 0 for i in range(layers)]:
        return {"window": window, "global_every": every}
    raise ValueError(
        f"layer_types={kinds!r} is not supported; supported: 'full_attention' in the first layers alone, or in every "
        "n-th layer alone"
    )


def rope_parameters(k: Keys, layer_type: str = "") -> dict[str, Any]:
    """`rope_parameters`, where newer files keep what older ones spread over keys; of one type of layers if given."""
    data = k.get("rope_parameters", {})
    return data.get(layer_type) or {} if layer_type else data


def rotary_fields(
    k: Keys, *, theta: float = 10000.0, share: float = 1.0, width: int, layer_type: str = ""
) -> dict[str, Any]:
    """Rotary positions.

    Args:
        theta, share: of files that say nothing of base and share of dimensions.
        width: dimensions of a head.
        layer_type: of `rope_parameters` that differ between types.
    """
    new = rope_parameters(k, layer_type)
    share = k.get("partial_rotary_factor", new.get("partial_rotary_factor", share))
    return {
        "position": "rotary",
        "rotary_dim": 0 if share == 1.0 else int(width * share),
        "rope_theta": float(k.get("rope_theta", new.get("rope_theta", theta))),
        "rope_scaling": rope_scaling(k, new),
    }


def rope_scaling(k: Keys, new: Mapping[str, Any]) -> RopeScaling | None:
    """How frequencies are stretched, by `rope_scaling` or by `new`, what there is of `rope_parameters`.

    Raises:
        ValueError: a type, or a setting of one, that is not supported.
    """
    where, data = ("rope_scaling", k.data["rope_scaling"]) if k.get("rope_scaling", {}) else ("rope_parameters", new)
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}={data!r}; it must be an object")
    kind = data.get("rope_type", data.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic: as trained up to the longest length, beyond which it is not planned
        return None
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise ValueError(f"{where}.rope_type={kind!r} is not supported; supported: linear, llama3, yarn, longrope")
    if kind == "yarn" and data.get("truncate") is False:
        raise ValueError(f"{where}.truncate=False is not supported; supported: True")
    longest = k.size("max_position_embeddings")
    original = data.get("original_max_position_embeddings") or k.get("original_max_position_embeddings", longest)
    factor = data.get("factor") or (longest / original if kind in ("yarn", "longrope") else 0.0)
    if not factor:
        k.missing.append(f"{where}.factor")
    numbers = "low_freq_factor high_freq_factor beta_fast beta_slow mscale mscale_all_dim attention_factor"
    return RopeScaling(
        kind=kind,
        factor=float(factor),
        original_length=0 if kind == "linear" else original,
        short_factor=tuple(data.get("short_factor") or ()),
        long_factor=tuple(data.get("long_factor") or ()),
        **{name: float(data[name]) for name in numbers.split() if data.get(name) is not None},
    )
