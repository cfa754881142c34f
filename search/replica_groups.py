"""Which devices exchange with each other: the replica groups of HLO text, and the mesh axes that they are.

    groups = parse_groups(attributes, devices=8)               # [[0, 1], [2, 3], ...]; pairs of a permutation
    axes_of(groups, {"fsdp": 4, "tensor": 2})                  # ("tensor",)
    factor(groups[0])                                          # ((2,), (1,)): sizes and strides

XLA writes groups as lists `{{0,1},{2,3}}`, as a reshaped and turned count `[8,4]<=[32]T(1,0)`, or as axes of a mesh
`mesh['a'=2,'b'=4] {'b'}`, with device ids `device_ids=([2,4]T(1,0))` where the mesh is not 0, 1, 2, ..., and with parts
of axes, `{'b':(2)2}`: of axis b, the part of size 2 that comes after a part of size 2.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Groups = npt.NDArray[np.int64]
"""(groups, members) device numbers; of a permutation, (pairs, 2)."""
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}")
_COUNT = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")


def parse_groups(attributes: str, devices: int) -> Groups:
    """Devices that exchange with each other; all of them where the text names none.

    >>> parse_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    [[0, 2], [1, 3]]
    >>> parse_groups("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", 8).tolist()
    [[0, 1], [2, 3], [4, 5], [6, 7]]

    Raises:
        ValueError: groups of several sizes.
    """
    found = _MESH.search(attributes) or _COUNT.search(attributes) or _LISTED.search(attributes)
    return _parse(found[0] if found else "", devices)


@functools.lru_cache(maxsize=1024)
def _parse(text: str, devices: int) -> Groups:
    meshed, counted, listed = _MESH.search(text), _COUNT.search(text), _LISTED.search(text)
    if meshed:
        inside = _groups_of_mesh(meshed[1], meshed[4])
        return _iota(meshed[2], meshed[3])[inside] if meshed[2] else inside
    if counted:
        return _iota(counted[2], counted[3]).reshape(_numbers(counted[1]))
    if listed:
        rows = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"groups of several sizes: {text[:200]}")
        return np.asarray(rows, np.int64)
    return np.arange(devices, dtype=np.int64)[None, :]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, order: str | None) -> Groups:
    """Devices in the order `[2,4]T(1,0)`: 0, 1, 2, ... as an array of this shape, turned, and flat again."""
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes), dtype=np.int64).reshape(sizes)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _groups_of_mesh(sizes: str, used: str) -> Groups:
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in axes}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        parts[name].append((int(before or 1), int(size or axes[name])))
    shape: list[int] = []
    inside: list[int] = []
    for name, total in axes.items():
        at = 1
        for before, size in sorted(parts[name]):
            shape += [before // at, size]
            inside.append(len(shape) - 1)
            at = before * size
        shape.append(total // at)
    outside = [i for i in range(len(shape)) if i not in inside]
    ids = np.arange(math.prod(shape), dtype=np.int64).reshape(shape).transpose([*outside, *inside])
    return ids.reshape(-1, math.prod(shape[i] for i in inside))


def axes_of(groups: Groups, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; `sizes` are of a mesh of devices 0, 1, 2, ...

    >>> axes_of(np.array([[0, 2], [1, 3]]), {"data": 2, "tensor": 2})
    ('data',)
    """
    places = np.stack(np.unravel_index(groups, tuple(sizes.values())))  # (axes, groups, members)
    moved = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, used in zip(sizes, moved, strict=True) if used)


def device_numbers(sizes: Mapping[str, int], order: Sequence[str] = ()) -> Groups:
    """The device at every place of a mesh whose axes are laid out in another order, outermost first.

    The compiler numbers places; links are between devices. Axes that `order` leaves out come first.

    >>> device_numbers({"data": 2, "tensor": 2}, ("tensor", "data")).tolist()
    [0, 2, 1, 3]
    """
    names = list(sizes)
    placed = [*(axis for axis in names if axis not in order), *(order or ())]
    laid = np.arange(math.prod(sizes.values()), dtype=np.int64).reshape([sizes[axis] for axis in placed])
    return laid.transpose([placed.index(axis) for axis in names]).reshape(-1)


def factor(group: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a group, outermost first, as `search.collectives` takes them.

    A group that is no such grid is taken as evenly spread between its first and last device.

    >>> factor([0, 1, 4, 5])
    ((2, 2), (4, 1))
    """
    at = np.sort(np.asarray(group, np.int64))
    at = at - at[0]
    sizes: list[int] = []
    strides: list[int] = []
    block = 1
    while block < len(at):
        stride = int(at[block])
        size = 1
        while (size + 1) * block <= len(at) and np.array_equal(
            at[size * block : (size + 1) * block], at[:block] + size * stride
        ):
            size += 1
        if size == 1 or len(at) % (block * size):
            return (len(at),), (max(1, int(at[-1]) // (len(at) - 1)),)
        sizes.insert(0, size)
        strides.insert(0, stride)
        block *= size
    return (tuple(sizes), tuple(strides)) if sizes else ((1,), (1,))


def steps_of(pairs: Groups, sizes: Mapping[str, int], devices: Groups) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a permutation: along every axis that it moves, the devices it passes and how far it goes.

    Args:
        pairs: (source, target) places.
        sizes: of the mesh.
        devices: the device at every place.
    """
    shape = tuple(sizes.values())
    places = np.stack(np.unravel_index(pairs, shape))
    grid = devices.reshape(shape)
    out_sizes: list[int] = []
    out_strides: list[int] = []
    for axis, size in enumerate(shape):
        shifts = (places[axis, :, 1] - places[axis, :, 0]) % size
        shifts = np.minimum(shifts, size - shifts)[shifts != 0]
        if not len(shifts):
            continue
        shift = int(np.bincount(shifts).argmax())
        neighbour = int(np.take(grid, 1, axis).reshape(-1)[0] - np.take(grid, 0, axis).reshape(-1)[0])
        out_sizes.append(max(2, size // shift))
        out_strides.append(neighbour * shift)
    return (tuple(out_sizes), tuple(out_strides)) if out_sizes else ((1,), (1,))


def runs_backward(pairs: Groups, sizes: Mapping[str, int]) -> bool:
    """Whether most of a permutation's steps go down along their axes: 0 to the last, 1 to 0, 2 to 1, ...

    >>> runs_backward(np.array([[0, 3], [1, 0], [2, 1], [3, 2]]), {"tensor": 4})
    True
    """
    shape = np.array(tuple(sizes.values()))[:, None]
    places = np.stack(np.unravel_index(pairs, tuple(sizes.values())))
    shifts = (places[:, :, 1] - places[:, :, 0]) % shape
    return bool((shifts > shape - shifts).sum() > ((shifts > 0) & (shifts < shape - shifts)).sum())
