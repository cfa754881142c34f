"""Who sends what several devices hold: equal loads (exact in the limit of many pieces). Pure numpy.

    shares = balance([Holders(group_N, demand_U), ...], base_N)

The bytes of box u may come from any of its holders, in any split. The split that minimises the sum of squared loads
also minimises the largest load (Harvey et al. 2003, Semi-matchings for bipartite graphs, Theorem 3.1 in its fractional
form). It is found by filling the boxes of one kind at a time up to a common level, over all kinds, until nothing moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SWEEPS = 12
TOLERANCE = 1e-4


@dataclasses.dataclass
class Holders:
    """Disjoint sets of devices and what must come out of each.

    Attributes:
        group_N: the set of each device; -1: in none.
        demand_U: bytes that must come out of each set.
    """

    group_N: Ints
    demand_U: Floats


def balance(kinds: Sequence[Holders], base_N: Floats) -> list[Floats]:
    """Split each set's demand among its members.

    Args:
        kinds: each is a family of disjoint sets; sets of different kinds overlap.
        base_N: what the devices send besides.

    Returns:
        Bytes sent by each device, for each kind.
    """
    slots = [_slots(kind) for kind in kinds]
    sent = [np.zeros(len(base_N)) for _ in kinds]
    load_N = base_N.copy()
    for sweep in range(SWEEPS):
        change = 0.0
        for i, kind in enumerate(kinds):
            if not kind.demand_U.any():
                continue
            others_N = load_N - sent[i]
            filled_N = _fill(others_N, kind.demand_U, slots[i])
            change = max(change, float(np.abs(filled_N - sent[i]).max()))
            sent[i], load_N = filled_N, others_N + filled_N
        if (sweep == 0 and len(kinds) == 1) or change <= TOLERANCE * load_N.max(initial=0.0):
            break
    return sent


def _slots(kind: Holders) -> Ints:
    """Members of each set in a row, filled up with N (nobody)."""
    n, sets = len(kind.group_N), len(kind.demand_U)
    by_group = np.argsort(kind.group_N, kind="stable")
    by_group = by_group[np.searchsorted(kind.group_N[by_group], 0) :]
    group = kind.group_N[by_group]
    starts = np.searchsorted(group, np.arange(sets))
    rank = np.arange(len(group)) - starts[group]
    slots = np.full((sets, int(rank.max(initial=0)) + 1), n)
    slots[group, rank] = by_group
    return slots


def _fill(others_N: Floats, demand_U: Floats, slots_UR: Ints) -> Floats:
    """Pour each demand over its members, the lowest first, up to one level."""
    padded = np.append(others_N, np.inf)
    others_UR = padded[slots_UR]
    sorted_UR = np.sort(others_UR, axis=1)
    levels_UR = (demand_U[:, None] + np.cumsum(sorted_UR, axis=1)) / np.arange(1, sorted_UR.shape[1] + 1)
    following_UR = np.concatenate([sorted_UR[:, 1:], np.full((len(demand_U), 1), np.inf)], axis=1)
    enough_U = np.argmax(levels_UR <= following_UR, axis=1)
    level_U = levels_UR[np.arange(len(demand_U)), enough_U]
    sent = np.zeros(len(others_N) + 1)
    there_UR = slots_UR < len(others_N)
    sent[slots_UR[there_UR]] = np.maximum(np.where(there_UR, level_U[:, None], 0.0) - others_UR, 0.0)[there_UR]
    return sent[:-1]
