"""Host values from process to process: tokens, scores, metrics. Not for parameters, which `pipelines.reshard` moves.

    everyones = share({"rewards": rewards_B}, together=within)      # one value per process, the same on all of them

Values are trees of dicts, lists, tuples, numpy arrays, numbers, text and None. They travel as JSON with the arrays'
bytes in base64, by one gather of all processes: right for what is counted in tokens, and nothing is unpickled.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Together = Callable[..., Any]
"""`together(what, function, *args)`: calls a function that waits for other processes, and gives up after a time with an
error that names `what`."""


def pack(value: Any) -> bytes:
    """A tree of values as bytes.

    >>> unpack(pack({"tokens": (1, 2), "rewards": np.ones(2, "float32")}))
    {'tokens': (1, 2), 'rewards': array([1., 1.], dtype=float32)}

    Raises:
        ValueError: it holds something else.
    """
    return json.dumps(_plain(value)).encode()


def unpack(data: bytes) -> Any:
    """Undo `pack`."""
    return _value(json.loads(data))


def share(mine: Any, *, what: str, together: Together) -> list[Any]:
    """Everyone's value of every process, in the order of the processes. All of them call it, in the same order."""
    if jax.process_count() == 1:
        return [mine]
    data = np.frombuffer(pack(mine), np.uint8)
    sizes = np.asarray(together(what, multihost_utils.process_allgather, np.asarray([data.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    everyones = np.asarray(together(what, multihost_utils.process_allgather, padded)).reshape(len(sizes), -1)
    return [unpack(row[:size].tobytes()) for row, size in zip(everyones, sizes, strict=True)]


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return value.item()
        case np.ndarray() | jax.Array():
            array = np.ascontiguousarray(value)
            data = base64.b64encode(array.tobytes()).decode()
            return {"array": data, "dtype": str(array.dtype), "shape": list(array.shape)}
        case dict():
            return {"dict": [[key, _plain(v)] for key, v in value.items()]}
        case tuple():
            return {"tuple": [_plain(v) for v in value]}
        case list():
            return [_plain(v) for v in value]
    raise ValueError(f"a {type(value).__name__} cannot go to another process; arrays, numbers, text and trees of them")


def _value(plain: Any) -> Any:
    match plain:
        case {"array": data, "dtype": dtype, "shape": shape}:
            return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
        case {"dict": entries}:
            return {key: _value(v) for key, v in entries}
        case {"tuple": entries}:
            return tuple(_value(v) for v in entries)
        case list():
            return [_value(v) for v in plain]
    return plain
