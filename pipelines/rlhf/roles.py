"""Where the parameters of roles are: at home, lent to a call with another layout, or in the host's memory.

    roles = Roles(homes, offloaded=("reference",))
    roles.lend("actor", "generate", step.param_shardings)      # a copy as the call wants it, or the arrays themselves
    step.run(roles.lent("generate"), ...)
    roles.give_up("generate")

A role's home holds what changes in training, as the program that trains it takes it; a role that is not trained is its
parameters alone. Only the call that trains may consume the home, and by then nothing of it is lent. Moves are made by
`pipelines.reshard`; each is scheduled once and repeated in every iteration.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.problem import cast_floats
from pipelines.reshard import Reshard
from pipelines.reshard_host import HostTree, from_host, to_host
from pipelines.rlhf.steps import keyed, plain
from pipelines.train import TrainState
from sharding_rules import FSDP, MeshShape, make_mesh, path_str


class Roles:
    """The values of all roles. Calls that run at the same time may use it.

    Args:
        homes: role -> its state, or its parameters where it is not trained; arrays on every process, also on those
            without devices of it (`absent`).
        offloaded: roles that lie in the host's memory between their calls.
        verify: compare what arrives with checksums of what was sent, the first time that a move is made; later ones
            repeat its schedule. Checksums take some ten times as long as a move between CPU devices.
        deadline_seconds: how long another process may stand still in a move.
    """

    def __init__(
        self,
        homes: Mapping[str, Any],
        *,
        offloaded: tuple[str, ...] = (),
        verify: bool = True,
        deadline_seconds: float = 300.0,
    ):
        self._homes = dict(homes)
        self._forms = {role: abstract_of(home) for role, home in homes.items()}
        self._offloaded = frozenset(offloaded)
        self._how = {"verify": verify, "deadline_seconds": deadline_seconds}
        self._lent: dict[str, Any] = {}
        self._moves: dict[Any, Reshard] = {}
        self._casts: dict[Any, Any] = {}
        self._brought: set[tuple[str, str]] = set()
        """Roles and calls whose parameters came from the host before."""
        self._lock = threading.Lock()
        for role in offloaded:
            self._homes[role] = OnHost.of(self._homes[role])

    def home(self, role: str) -> Any:
        """All of a role on its devices; what lies on the host is brought there and stays on the host as well."""
        with self._lock:
            home = self._homes[role]
        return home.back(self._how) if isinstance(home, OnHost) else home

    def set_home(self, role: str, home: Any) -> None:
        """Take a role's new values; those of an offloaded one go to the host."""
        home = OnHost.of(home) if role in self._offloaded else home
        with self._lock:
            self._homes[role] = home

    def form(self, role: str) -> Any:
        """Shapes and shardings of a role at home on its devices."""
        return self._forms[role]

    def same_layout(self, role: str, shardings: Any) -> bool:
        """Whether a role's parameters lie at home as a call wants them, so that they are used where they are."""
        return role not in self._offloaded and alike(params_of(self._forms[role]), shardings)

    def lend(self, role: str, call: str, shardings: Any, dtype: str | None = None) -> None:
        """Bring a role's parameters to where a call wants them; arrays that are there are not copied.

        Args:
            dtype: that the call computes in: what is stored in a wider one is sent, and lies there, in this one.
        """
        with self._lock:
            home = self._homes[role]
        if isinstance(home, OnHost):
            verify = bool(self._how["verify"]) and (role, call) not in self._brought
            brought = from_host(home.params, shardings, **{**self._how, "verify": verify})
            self._brought.add((role, call))
            moved = self._narrowed((role, call), brought, dtype)
        elif self.same_layout(role, shardings):
            moved = params_of(home)
        else:
            moved = self.moved((role, call), self._narrowed((role, call), params_of(home), dtype), shardings)
        with self._lock:
            self._lent[call] = moved

    def lent(self, call: str) -> Any:
        with self._lock:
            return self._lent[call]

    def give_up(self, call: str) -> None:
        """Let go of what was lent to a call."""
        with self._lock:
            self._lent.pop(call, None)

    def onload(self, role: str, call: str) -> None:
        """Bring all of an offloaded role to its devices, for the call that trains it."""
        home = self.home(role)
        with self._lock:
            self._lent[call] = home

    def put(self, call: str, values: Any) -> None:
        """Replace what was brought for a call by what it has made of it."""
        with self._lock:
            self._lent[call] = values

    def moved(self, key: Any, tree: Any, shardings: Any) -> Any:
        """Bring a tree without keys to another layout; the schedule is kept under `key`."""
        if alike(tree, shardings):
            return tree
        if key not in self._moves:
            forms = abstract_of(tree)
            sources = jax.tree.map(lambda x: x.sharding, forms)
            self._moves[key] = Reshard(forms, sources, shardings, **self._how)
        moved = self._moves[key].run(tree)
        self._moves[key].verify = False
        return moved

    def _narrowed(self, key: Any, tree: Any, dtype: str | None) -> Any:
        """A tree with its wider floats in a dtype, where they are."""
        if dtype is None or all(
            x.dtype == cast.dtype for x, cast in _pairs(tree, cast_floats(abstract_of(tree), dtype))
        ):
            return tree
        if key not in self._casts:
            self._casts[key] = jax.jit(functools.partial(cast_floats, dtype=dtype))
        return self._casts[key](tree)

    @property
    def predicted(self) -> dict[tuple[str, str], Any]:
        """(role, call) -> what its move is expected to take, of those that were made."""
        return {key: move.predicted for key, move in self._moves.items() if isinstance(key, tuple) and len(key) == 2}


def _pairs(one: Any, other: Any) -> Any:
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def params_of(home: Any) -> Any:
    """The parameters of a role's home."""
    return home.params if isinstance(home, TrainState) else home


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A role in its host's memory.

    Attributes:
        params: its parameters, which calls with any layout may be given.
        rest: what else it is, if it is trained; keys are numbers.
        form: of the rest.
    """

    params: HostTree
    rest: HostTree | None = None
    form: Any = None

    @classmethod
    def of(cls, home: Any) -> OnHost:
        """Copy a role to the host; its arrays are then free to go."""
        if not isinstance(home, TrainState):
            return cls(to_host(home))
        rest = dataclasses.replace(home, params=())
        return cls(to_host(home.params), to_host(plain(rest)), abstract_of(rest))

    def back(self, how: Mapping[str, Any]) -> Any:
        """All of it on its devices, as it lay."""
        params = from_host(self.params, **how)
        if self.rest is None:
            return params
        return dataclasses.replace(keyed(from_host(self.rest, **how), self.form), params=params)


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
        if x.sharding.addressable_devices:
            raise ValueError(f"{path_str(path)} lies on devices of this process too")
        if _is_key(x):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
            none = jax.make_array_from_single_device_arrays(data.shape, x.sharding, [], dtype=data.dtype)
            return jax.random.wrap_key_data(none)
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [], dtype=x.dtype)

    return jax.tree_util.tree_map_with_path(one, form)


def storage(form: Any, devices: list[Any]) -> Any:
    """Shardings over all devices, for checkpoints of what lies on those of some processes only: each array is cut along
    its largest dimension that divides, or else whole on every device."""
    mesh = make_mesh(MeshShape(fsdp=len(devices)), devices)

    def one(x: Any) -> NamedSharding:
        fitting = [i for i, size in enumerate(x.shape) if size and size % len(devices) == 0]
        if not fitting:
            return NamedSharding(mesh, P())
        at = max(fitting, key=lambda i: x.shape[i])
        return NamedSharding(mesh, P(*[None] * at, FSDP))

    return jax.tree.map(one, form)


def abstract_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
