"""Where the parameters of roles are: at home, lent to a call with another layout, or in the host's memory.

    roles = Roles(homes, tell)
    roles.lend("actor", "generate", step.param_shardings)      # a copy as the call wants it, or the arrays themselves
    step.run(roles.lent("generate"), ...)
    roles.give_up("generate")

A role's home holds what changes in training, as the program that trains it takes it; a role that is not trained is its
parameters alone. Only the call that trains may consume the home, and by then nothing of it is lent.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pipelines.train import TrainState
from sharding_rules import path_str


class Roles:
    """The values of all roles. Calls that run at the same time may use it.

    Args:
        homes: role -> its state, or its parameters where it is not trained; arrays of every process, also of those
            without devices of it (`absent`).
        offloaded: roles that lie in the host's memory between their calls.
    """

    def __init__(self, homes: Mapping[str, Any], *, offloaded: tuple[str, ...] = ()):
        self._homes = dict(homes)
        self._forms = {role: _abstract(home) for role, home in homes.items()}
        self._offloaded = frozenset(offloaded)
        self._lent: dict[str, Any] = {}
        self._lock = threading.Lock()
        for role in offloaded:
            self._homes[role] = to_host(self._homes[role])

    def home(self, role: str) -> Any:
        """What a role is, as it lies now."""
        with self._lock:
            return self._homes[role]

    def set_home(self, role: str, home: Any) -> None:
        with self._lock:
            self._homes[role] = home

    def form(self, role: str) -> Any:
        """Shapes and shardings of a role at home on its devices."""
        return self._forms[role]

    def same_layout(self, role: str, shardings: Any) -> bool:
        """Whether a role's parameters lie at home as a call wants them, so that they are used where they are."""
        if role in self._offloaded:
            return False
        return alike(params_of(self._forms[role]), shardings)

    def lend(self, role: str, call: str, shardings: Any) -> None:
        """Bring a role's parameters to where a call wants them; arrays that are there are not copied."""
        params = params_of(self.home(role))
        moved = params if self.same_layout(role, shardings) else move(params, shardings)
        with self._lock:
            self._lent[call] = moved

    def lent(self, call: str) -> Any:
        with self._lock:
            return self._lent[call]

    def give_up(self, call: str) -> None:
        """Let go of what was lent to a call."""
        with self._lock:
            self._lent.pop(call, None)

    def take_over(self, role: str, other: Roles) -> None:
        """Take a role as other roles have it, and lay it out as here."""
        moved = move(other.home(role), jax.tree.map(lambda x: x.sharding, self._forms[role]))
        self.set_home(role, to_host(moved) if role in self._offloaded else moved)

    def onload(self, role: str) -> None:
        """Bring all of an offloaded role to its devices."""
        self.set_home(role, from_host(self.home(role), jax.tree.map(lambda x: x.sharding, self._forms[role])))

    def offload(self, role: str) -> None:
        """Bring all of a role to its host."""
        self.set_home(role, to_host(self.home(role)))


def params_of(home: Any) -> Any:
    """The parameters of a role's home."""
    return home.params if isinstance(home, TrainState) else home


def move(tree: Any, shardings: Any) -> Any:
    """Bring a tree from one layout to another, on any devices, and wait for it."""
    return jax.block_until_ready(jax.device_put(tree, shardings))


def to_host(tree: Any) -> Any:
    """A tree as numpy arrays; keys stay where they are."""
    return jax.tree.map(lambda x: x if _is_key(x) else jax.device_get(x), tree)


def from_host(tree: Any, shardings: Any) -> Any:
    return jax.block_until_ready(jax.device_put(tree, shardings))


def alike(forms: Any, shardings: Any) -> bool:
    """Whether all leaves lie as they are wanted: on the same devices, cut in the same way."""
    leaves = zip(jax.tree.leaves(forms), jax.tree.leaves(shardings), strict=True)
    return all(x.sharding.is_equivalent_to(wanted, len(x.shape)) for x, wanted in leaves)


def absent(form: Any) -> Any:
    """Arrays of which this process has no part, for what lies on other processes' devices.

    Raises:
        ValueError: this process has a part.
    """

    def one(path: Any, x: Any) -> Any:
        if isinstance(x.sharding, NamedSharding) and x.sharding.addressable_devices:
            raise ValueError(f"{path_str(path)} lies on devices of this process too")
        if _is_key(x):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
            none = jax.make_array_from_single_device_arrays(data.shape, x.sharding, [], dtype=data.dtype)
            return jax.random.wrap_key_data(none)
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [], dtype=x.dtype)

    return jax.tree_util.tree_map_with_path(one, form)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
