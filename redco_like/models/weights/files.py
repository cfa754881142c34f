"""Safetensors files of a Hugging Face folder: what is in them, checked before any of it is used; parts read on demand.

    tensors = open_checkpoint("Llama-3.1-8B")           # name -> Tensor: file, dtype, shape, place
    with tensors["lm_head.weight"].open() as file:
        file.read(rows=(0, 512), columns=(0, 4096), out=buffer)

The format: 8 bytes with the length of a JSON header, the header, then the bytes of all tensors.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Numbers that parameters may be kept in."""
_OTHERS = {
    **{"I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class WeightsError(ValueError):
    """A checkpoint that is not there, is damaged, or is not of the model; or one that cannot be written."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        dtype: as safetensors calls it.
        start: of its bytes, from the beginning of the file.
    """

    name: str
    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    @contextlib.contextmanager
    def open(self) -> Iterator[Reading]:
        """Open the file for reading parts of this tensor; each thread opens it for itself."""
        with self.path.open("rb", buffering=0) as file:
            yield Reading(self, file)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A tensor whose file is open, seen as rows of columns of the rest."""

    tensor: Tensor
    file: Any

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns, and bytes of one place: the first dimension, the second, and all others."""
        return grid(self.tensor)

    def read(self, rows: tuple[int, int], columns: tuple[int, int], out: np.ndarray) -> None:
        """Fill `out`, contiguous uint8, with a range of rows and columns.

        Raises:
            WeightsError: the file ends before.
        """
        _, C, one = self.sizes
        bytes_out = out.data.cast("B")
        if columns == (0, C):
            self._fill(rows[0] * C * one, bytes_out)
            return
        width = (columns[1] - columns[0]) * one
        for i, row in enumerate(range(*rows)):
            self._fill((row * C + columns[0]) * one, bytes_out[i * width : (i + 1) * width])

    def _fill(self, offset: int, out: memoryview) -> None:
        file: BinaryIO = self.file
        file.seek(self.tensor.start + offset)
        done = 0
        while done < len(out):
            count = file.readinto(out[done:])  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise WeightsError(
                    f"{self.tensor.path}: the file ends inside tensor {self.tensor.name!r} of shape "
                    f"{self.tensor.shape}, {len(out) - done} bytes early: it has become shorter while it was read"
                )
            done += count


def grid(tensor: Tensor) -> tuple[int, int, int]:
    """Rows, columns, and bytes of one place of a tensor."""
    shape = (*tensor.shape, 1, 1)
    return shape[0], shape[1], tensor.bytes // max(1, shape[0] * shape[1])


def open_checkpoint(folder: pathlib.Path) -> dict[str, Tensor]:
    """What is in the files of a folder.

    Raises:
        WeightsError: no safetensors, a file that is missing or cut off, a header that makes no sense, or a tensor that
            is not in the file that the index names.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if pickles:
        raise WeightsError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read: only safetensors "
            "is read. With transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)"
        )
    there = sorted(p.name for p in folder.iterdir())
    raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}; it has {_few(there) or 'no files'}")


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file, each checked to lie inside it.

    Raises:
        WeightsError: says what is wrong with which tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8:
                raise WeightsError(f"{path} has {size} bytes: too few for a safetensors header; download it again")
            if length > _MAX_HEADER_BYTES:
                raise WeightsError(f"{path} does not begin as a safetensors file (a header of {length} bytes)")
            if 8 + length > size:
                raise WeightsError(
                    f"{path} is cut off: its header is {length} bytes, the file {size}; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a damaged header: a {type(header).__name__} instead of an object")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _tensor(path: pathlib.Path, name: str, entry: Any, base: int, file_bytes: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        bits = _bits(dtype)
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{path}: the header's entry of tensor {name!r} is damaged: {entry!r}") from error
    needed = math.prod(shape) * bits // 8 if sound else 0
    if not sound or end - begin != needed:
        raise WeightsError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} takes {needed} bytes, but the header gives it "
            f"those from {begin} to {end}"
        )
    if base + end > file_bytes:
        raise WeightsError(
            f"{path} is cut off: tensor {name!r} of shape {shape} ends at byte {base + end}, the file at {file_bytes}; "
            "download it again"
        )
    return Tensor(name, path, dtype, shape, base + begin, end - begin)


def _bits(dtype: str) -> int:
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize * 8
    return _OTHERS[dtype] * 8 if dtype in _OTHERS else _BITS[dtype]


def _indexed(folder: pathlib.Path) -> dict[str, Tensor]:
    index = folder / INDEX
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in wanted.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{index} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} has no weight_map from the names of tensors to files") from error
    files = sorted(set(named.values()))
    if outside := [file for file in files if pathlib.PurePath(file).name != file]:
        raise WeightsError(f"{index} names {outside[0]!r}, which is no file of this folder")
    if missing := [file for file in files if not (folder / file).is_file()]:
        lost = next(name for name, file in named.items() if file == missing[0])
        raise WeightsError(
            f"{folder} lacks {_few(missing)} of {len(files)} files that {INDEX} names (with tensor {lost!r} and "
            f"{sum(file in missing for file in named.values()) - 1} more); download it again"
        )
    held = {file: read_header(folder / file) for file in files}
    for name, file in named.items():
        if name not in held[file]:
            raise WeightsError(
                f"{INDEX} says that tensor {name!r} is in {file}, which does not have it{nearest(name, held[file])}"
            )
    return {name: held[file][name] for name, file in named.items()}


def nearest(name: str, others: Mapping[str, Any] | Sequence[str]) -> str:
    """The words to add about the most similar of other names; none if none is."""
    near = difflib.get_close_matches(name, list(others), n=1, cutoff=0.6)
    return f"; nearest: {near[0]!r}" if near else ""


def _few(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(path).expanduser()
