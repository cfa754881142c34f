"""Leaves of a tree by patterns over their paths.

matching(params, ["*attention/*/kernel"])                   # {"stack/layers/attention/q/kernel": array, ...}
replaced(params, {"stack/layers/attention/q/kernel": other})
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from sharding_rules import path_str

Pattern = str | re.Pattern[str]
"""A glob over the whole path, whose `*` passes over `/`, or a compiled regular expression that matches all of it."""

IsLeaf = Callable[[Any], bool] | None


def leaves_by_path(tree: Any, *, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """Path -> leaf, in leaf order."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def matching(tree: Any, patterns: Pattern | Iterable[Pattern], *, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """Path -> leaf of all leaves that some pattern matches, in leaf order.

    >>> import jax.numpy as jnp
    >>> list(matching({"q": {"kernel": jnp.ones(2)}, "head": jnp.ones(2)}, ["*/kernel"]))
    ['q/kernel']

    Raises:
        ValueError: a pattern that matches nothing; names the nearest paths.
    """
    leaves = leaves_by_path(tree, is_leaf=is_leaf)
    chosen: set[str] = set()
    patterns = listed(patterns)
    if not patterns:
        raise ValueError("no patterns are given; one that matches every kernel is '*/kernel'")
    for pattern in patterns:
        hits = [path for path in leaves if _matches(pattern, path)]
        if not hits:
            text = pattern if isinstance(pattern, str) else pattern.pattern
            near = difflib.get_close_matches(text.replace("*", ""), leaves, n=3, cutoff=0.0)
            raise ValueError(
                f"pattern {text!r} matches none of the {len(leaves)} parameters; nearest: {', '.join(near)}"
            )
        chosen.update(hits)
    return {path: leaf for path, leaf in leaves.items() if path in chosen}


def replaced(tree: Any, leaves: Mapping[str, Any], *, is_leaf: IsLeaf = None) -> Any:
    """The tree with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_str(path), leaf), tree, is_leaf=is_leaf)


def listed(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    """Patterns as a list, also where there is one alone."""
    return [patterns] if isinstance(patterns, str | re.Pattern) else list(patterns)


def _matches(pattern: Pattern, path: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    return fnmatch.fnmatchcase(path, pattern)
