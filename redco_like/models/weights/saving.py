"""A model as a folder that transformers loads, and `load` too.

    save("out/my-llama", model, params, tokenizer_from="Llama-3.1-8B", dtype="bfloat16")

The folder appears whole or not at all: it is written beside its place, and renamed. Memory on the host: one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from redco_like.models.config import ModelConfig
from redco_like.models.hf import from_hf
from redco_like.models.weights.families import names_of
from redco_like.models.weights.files import DTYPES, INDEX, SINGLE, WeightsError, folder_of, nearest
from redco_like.models.weights.hf_config import differences, to_hf
from redco_like.models.weights.names import Piece
from redco_like.models.weights.scatter import copy
from sharding_rules import path_str

if TYPE_CHECKING:
    from redco_like.models.model import Model

logger = logging.getLogger("redco_like.models")

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SPARE_BYTES = 16 * 2**20  # that headers, tokenizer and the file system take


@dataclasses.dataclass(frozen=True)
class _Out:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save(
    folder: str | os.PathLike[str],
    model: Model | ModelConfig,
    params: Any,
    *,
    dtype: str | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> pathlib.Path:
    """Write `config.json`, safetensors (with an index where there are several) and the tokenizer.

    With several processes each calls it, for parts that others hold; the first one writes.

    Args:
        folder: a new one, or an empty one.
        model: or its configuration.
        params: its parameters, on any devices.
        dtype: of the files; default each parameter's.
        tokenizer_from: a folder whose tokenizer is copied; its `config.json`, too, where it is of the same model.
        shard_bytes: most bytes of a file, where a single tensor has no more.
        progress: called with (bytes written, bytes to write).

    Returns:
        The folder.

    Raises:
        WeightsError: no space on the disk, a folder that is not empty, no tokenizer in `tokenizer_from`.
        ValueError: parameters of another model, or a configuration that `config.json` cannot say.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes}; at least 1")
    if dtype is not None and jnp.dtype(dtype) not in _NAMES:
        raise ValueError(f"dtype={dtype!r} is not supported; supported: {', '.join(d.name for d in _NAMES)}")
    leaves = _checked(config, params)
    tensors = _tensors(config, leaves, dtype)
    data = _config(config, tensors, tokenizer_from)
    target = folder_of(folder).absolute()
    arrays = (_assembled(tensor, leaves) for tensor in tensors)
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            _write(target, data, tensors, arrays, tokenizer_from, shard_bytes, progress)
        except (OSError, ValueError) as error:
            if jax.process_count() == 1:
                raise
            failure = error  # the others wait for this process in what follows
    if jax.process_count() > 1:
        for _ in arrays:  # each is fetched by all processes together
            pass
        failed = multihost_utils.process_allgather(np.asarray(failure is not None))
        if failure is not None:
            raise failure
        if np.any(failed):
            raise WeightsError(f"process 0 could not write {target}; its own error says why")
    return target


# What is written.


def _checked(config: ModelConfig, params: Any) -> dict[str, Any]:
    """The parameters by path, of which each is one of the model's."""
    from redco_like.models.weights.loading import abstract_params

    wanted = abstract_params(config)
    leaves = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, shape in wanted.items():
        if path not in leaves:
            raise ValueError(f"the parameters lack {path!r} of shape {shape}, which {config.family} has")
        if leaves[path].shape != shape:
            raise ValueError(
                f"the parameter {path!r} has shape {leaves[path].shape}; {config.family} has it as {shape}"
            )
        if np.dtype(leaves[path].dtype) not in _NAMES:
            raise ValueError(
                f"the parameter {path!r} is {leaves[path].dtype}; written are {', '.join(d.name for d in _NAMES)}"
            )
    for path in leaves:
        if path not in wanted:
            raise ValueError(
                f"the parameters have {path!r}, which {config.family} has not{nearest(path, list(wanted))}"
            )
    return leaves


def _tensors(config: ModelConfig, leaves: dict[str, Any], dtype: str | None) -> list[_Out]:
    pieces: dict[str, list[Piece]] = {}
    for piece in names_of(config).pieces:
        pieces.setdefault(piece.tensor, []).append(piece)
    made = []
    for name, parts in pieces.items():
        kinds = {np.dtype(leaves[piece.leaf].dtype) for piece in parts} if dtype is None else {jnp.dtype(dtype)}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        made.append(_Out(name, parts[0].shape, kind, tuple(parts)))
    return made


def _config(config: ModelConfig, tensors: list[_Out], source: str | os.PathLike[str] | None) -> dict[str, Any]:
    """`config.json`: that of `source` where it is of this model, else one of our own with its token ids."""
    dtype = max(tensors, key=lambda tensor: tensor.bytes).dtype.name
    there: dict[str, Any] = {}
    if source is not None and (folder_of(source) / "config.json").is_file():
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            there = json.loads((folder_of(source) / "config.json").read_text(encoding="utf-8"))
        with contextlib.suppress(ValueError):
            if not differences(config, from_hf(there)):
                kept = {name: value for name, value in there.items() if name not in ("dtype", "quantization_config")}
                return kept | {"torch_dtype": dtype}
    return to_hf(config, dtype=dtype) | {name: there[name] for name in _TOKENS if name in there}


def _assembled(tensor: _Out, leaves: dict[str, Any]) -> np.ndarray:
    """A tensor in host memory."""
    out = np.empty(tensor.shape, tensor.dtype)
    for piece in tensor.pieces:
        leaf, target = leaves[piece.leaf], piece.view.of(out)
        if target.shape == piece.view.shape:
            _fetch(leaf, piece.at, target)
        else:  # heads and their dimensions, which shards may cut apart
            values = np.empty(piece.view.shape, np.dtype(leaf.dtype))
            _fetch(leaf, piece.at, values)
            copy(target, values.reshape(target.shape))
    return out


def _fetch(leaf: Any, at: tuple[int, ...], out: np.ndarray) -> None:
    """Write a parameter, or its place in leading dimensions, to `out`; a shard at a time, none of which stays here."""
    if not isinstance(leaf, jax.Array):
        copy(out, np.asarray(leaf)[at])
    elif leaf.is_fully_replicated:
        copy(out, _on_host(leaf.addressable_shards[0].data, at))
    elif not leaf.is_fully_addressable:
        whole = multihost_utils.process_allgather(_one(leaf, np.asarray(at, np.int32)), tiled=True)
        copy(out, np.asarray(whole))
    else:
        for shard in leaf.addressable_shards:
            box = [cut.indices(n)[:2] for cut, n in zip(shard.index, leaf.shape, strict=True)]
            if shard.replica_id == 0 and all(a <= i < b for i, (a, b) in zip(at, box, strict=False)):
                within = tuple(i - a for i, (a, _) in zip(at, box, strict=False))
                copy(out[tuple(slice(a, b) for a, b in box[len(at) :])], _on_host(shard.data, within))


def _on_host(x: jax.Array, at: tuple[int, ...]) -> np.ndarray:
    if next(iter(x.devices())).platform == "cpu":
        return np.asarray(x)[at]  # shares the device's memory
    # Of an array that goes away: JAX keeps the host's copy as long as the array lives.
    return np.asarray(_one(x, np.asarray(at, np.int32)) if at else jnp.copy(x))


@jax.jit
def _one(x: jax.Array, at: jax.Array) -> jax.Array:
    for i in range(at.shape[0]):
        x = jax.lax.dynamic_index_in_dim(x, at[i], 0, keepdims=False)
    return x


# Files.


def _write(
    target: pathlib.Path,
    data: dict[str, Any],
    tensors: list[_Out],
    arrays: Iterator[np.ndarray],
    tokenizer_from: str | os.PathLike[str] | None,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(tensor.bytes for tensor in tensors)
    copied = _tokenizer(tokenizer_from)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target} exists and is not an empty folder; nearest: {_free_name(target)}")
    aside = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, total, tensors)
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        _write_tensors(aside, tensors, arrays, shard_bytes, total, progress)
        for path in copied:
            shutil.copyfile(path, aside / path.name)
        os.replace(aside, target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(
                f"the disk of {target} is full: {total / 1e9:.3g} GB were to be written; nothing was left behind"
            ) from error
        raise


def _write_tensors(
    folder: pathlib.Path,
    tensors: list[_Out],
    arrays: Iterator[np.ndarray],
    shard_bytes: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    files = _shared_out(tensors, shard_bytes)
    weight_map, done = {}, 0
    for number, held in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(held))
            for tensor in held:
                array = next(arrays)
                file.write(array.reshape(-1).view(np.uint8).data)
                weight_map[tensor.name] = name
                done += tensor.bytes
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shared_out(tensors: list[_Out], shard_bytes: int) -> list[list[_Out]]:
    """Tensors of each file, in order."""
    files: list[list[_Out]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.bytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    return files


def _header(tensors: list[_Out]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers wants to read
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.bytes]
        entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tokenizer(source: str | os.PathLike[str] | None) -> list[pathlib.Path]:
    if source is None:
        return []
    folder = folder_of(source)
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise WeightsError(
            f"tokenizer_from={os.fspath(source)!r} has no tokenizer; looked for {TOKENIZER_FILES[0]} ..."
        )
    return found


def _check_space(target: pathlib.Path, total: int, tensors: list[_Out]) -> None:
    free = shutil.disk_usage(target.parent).free
    if total + _SPARE_BYTES <= free:
        return
    half = sum(tensor.bytes * 2 // tensor.dtype.itemsize for tensor in tensors)
    hint = f"; dtype='bfloat16' takes {half / 1e9:.3g} GB" if half < total and half + _SPARE_BYTES <= free else ""
    raise WeightsError(
        f"{target} takes {total / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB free{hint}; nothing was written"
    )


def _free_name(target: pathlib.Path) -> pathlib.Path:
    return next(p for i in range(1, 1000) if not (p := target.with_name(f"{target.name}-{i}")).exists())
