"""Adapters as folders of PEFT: adapter_config.json and adapter_model.safetensors.

    save_peft("adapter", model.config, adapters, base_model="folder or published name")
    adapters = load_peft("adapter", model.config)

For kernels that are one tensor of the Hugging Face checkpoint each. What is fused there (GPT-2's queries, keys and
values), experts and embeddings have no such adapter: merge and save those models whole.
"""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from redco_like.lora.adapters import Adapter, Adapters, Split
from redco_like.models.config import ModelConfig
from redco_like.models.weights.families import names_of
from redco_like.models.weights.names import Names, Piece

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


def save_peft(folder: str | os.PathLike[str], config: ModelConfig, adapters: Adapters, *, base_model: str = "") -> None:
    """Write adapters so that PEFT loads them: `PeftModel.from_pretrained(transformers_model, folder)`.

    Args:
        folder: made if it is not there.
        config: of the model.
        adapters: by path, as `init` makes them.
        base_model: folder or name of the base, which PEFT keeps a note of.

    Raises:
        ValueError: an adapter of what is not one tensor of a checkpoint; names the path and the tensor.
    """
    if not adapters:
        raise ValueError("there are no adapters to save")
    pieces = _linear_pieces(names_of(config))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, adapter in adapters.items():
        if path not in pieces:
            raise ValueError(f"{path!r} is no parameter of {config.family} that a checkpoint has")
        a, b = np.asarray(adapter.a, np.float32), np.asarray(adapter.b, np.float32)
        for piece in pieces[path]:
            if problem := _problem(piece):
                raise ValueError(
                    f"the adapter of {path!r} cannot be written for PEFT: {problem}; merge it with lora.merge and save "
                    "the whole model"
                )
            module = piece.tensor.removesuffix(".weight")
            if (a[piece.at].shape[0], b[piece.at].shape[1]) != piece.view.shape:
                raise ValueError(
                    f"the adapter of {path!r} is for kernels of ({a[piece.at].shape[0]}, {b[piece.at].shape[1]}), and "
                    f"{piece.tensor!r} is one of {piece.view.shape}: it is of another model"
                )
            ranks[module], alphas[module] = adapter.rank, adapter.alpha
            for letter, value in (("A", a[piece.at]), ("B", b[piece.at])):
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = np.ascontiguousarray(value.T)
    stabilised = {adapter.stabilised for adapter in adapters.values()}
    if len(stabilised) > 1:
        raise ValueError("some adapters are rank-stabilised and some are not; PEFT has one setting for all")
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    record = {
        "peft_type": "LORA",
        "task_type": TASKS.get(config.kind),
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "use_rslora": stabilised.pop(),
        "target_modules": _targets(set(ranks), {p.tensor for found in pieces.values() for p in found}),
        "fan_in_fan_out": any(_stored_as_kernel(p) for path in adapters for p in pieces[path]),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _safetensors().save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_peft(folder: str | os.PathLike[str], config: ModelConfig, *, dtype: Any = jnp.float32) -> dict[str, Adapter]:
    """Read a PEFT folder as adapters by path. Layers that have none get zeros.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: of the model that the adapters are for.
        dtype: of the adapters.

    Raises:
        ValueError: no such folder, adapters that are more than LoRA (biases, DoRA, whole modules), tensors that the
            model has not, or of other shapes; names the tensor.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is no folder of PEFT with safetensors")
    record = json.loads((folder / CONFIG).read_text())
    _check_plain(folder, record)
    tensors = _safetensors().load_file(folder / TENSORS)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{folder / TENSORS}: {name!r} is no lora_A or lora_B of a linear layer")
        found.setdefault(match[1], {})[match[2]] = np.asarray(tensor, np.float32)
    names = names_of(config)
    if not any(f"{module}.weight" in {p.tensor for p in names.pieces} for module in found):
        names = names.without_prefix()
    pieces = _linear_pieces(names)
    known = {p.tensor.removesuffix(".weight"): path for path, ps in pieces.items() for p in ps if not _problem(p)}
    for module, pair in found.items():
        if module not in known:
            raise ValueError(f"{folder / TENSORS}: {module!r} is no linear layer of {config.family} of this size")
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{folder / TENSORS}: {module!r} has lora_{min(pair)} and not the other one")
    made = {}
    for path in dict.fromkeys(known[module] for module in found):
        made[path] = _adapter(path, pieces[path], found, record, dtype)
    return made


def _adapter(
    path: str, pieces: list[Piece], found: Mapping[str, Any], record: Mapping[str, Any], dtype: Any
) -> Adapter:
    here = {p: found[m] for p in pieces if (m := p.tensor.removesuffix(".weight")) in found}
    forms = {(pair["A"].shape[0], _alpha(p.tensor.removesuffix(".weight"), record)) for p, pair in here.items()}
    if len(forms) > 1:
        raise ValueError(
            f"the layers of {path!r} have adapters of several ranks or alphas, {sorted(forms)}; one is read"
        )
    rank, alpha = forms.pop()
    K, N = pieces[0].view.shape
    front = tuple(max(place) + 1 for place in zip(*(p.at for p in pieces), strict=True))
    a, b = np.zeros((*front, K, rank), np.float32), np.zeros((*front, rank, N), np.float32)
    for piece, pair in here.items():
        if (pair["A"].shape, pair["B"].shape) != ((rank, K), (N, rank)):
            raise ValueError(
                f"{piece.tensor!r} maps {K} inputs to {N}, and its lora_A and lora_B have shapes {pair['A'].shape} and "
                f"{pair['B'].shape}: the adapter is of another model"
            )
        a[piece.at], b[piece.at] = pair["A"].T, pair["B"].T
    stabilised = bool(record.get("use_rslora"))
    return Adapter(jnp.asarray(a, dtype), jnp.asarray(b, dtype), alpha, stabilised, Split(len(front), 1))


def _check_plain(folder: Path, record: Mapping[str, Any]) -> None:
    if record.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type is {record.get('peft_type')!r}; only LORA is read")
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if record.get(name):
            raise ValueError(f"{folder / CONFIG}: {name} is {record[name]!r}; only plain LoRA is read")
    if record.get("bias", "none") != "none":
        raise ValueError(f"{folder / CONFIG}: bias is {record['bias']!r}; only 'none' is read")


def _alpha(module: str, record: Mapping[str, Any]) -> float:
    """Of one module: `alpha_pattern` first, whose keys are ends of names."""
    for pattern, alpha in (record.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(record["lora_alpha"])


def _linear_pieces(names: Names) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for piece in names.pieces:
        pieces.setdefault(piece.leaf, []).append(piece)
    return pieces


def _problem(piece: Piece) -> str:
    """Why a piece is no linear layer of its own; empty if it is one."""
    if not piece.leaf.endswith("/kernel"):
        return "it is no kernel of a dense layer"
    if len(piece.at) > 1:
        return f"{piece.tensor!r} is one of many experts"
    view = piece.view
    if view.split != piece.shape or view.sizes != piece.shape or view.order not in (((1,), (0,)), ((0,), (1,))):
        return f"it is a part of the tensor {piece.tensor!r}, or one whose rows have another order there"
    return ""


def _stored_as_kernel(piece: Piece) -> bool:
    """Whether the checkpoint has (inputs, outputs), as GPT-2's Conv1D, and not the transpose."""
    return piece.view.order == ((0,), (1,))


def _targets(chosen: set[str], tensors: set[str]) -> list[str]:
    """Ends of names where these say exactly which modules are meant, else whole names."""
    ends = {module.rpartition(".")[2] for module in chosen}
    modules = {t.removesuffix(".weight") for t in tensors if t.endswith(".weight")}
    meant = {module for module in modules if module.rpartition(".")[2] in ends}
    return sorted(ends if meant == chosen else chosen)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("reading and writing PEFT folders needs safetensors: pip install 'redco-like[hf]'") from error
    return safetensors.numpy
