"""A search problem: a graph on a cluster, with what options, moves and offloading cost kept once they are known.

    problem = Problem(graph, workload, cluster, costs)
    problem.choices(0, 8)                                      # options of the first call on 8 devices
    problem.move(0, place, home)                               # seconds, bytes, whether the home itself does

Calls are numbers here, in the order of `graph.order`; a *place* is a window and an option. A role's home is the call
that trains it, or else its first call.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection

from search.cluster import Cluster
from search.rlhf.graph import Graph, Workload
from search.rlhf.options import Costs, Option, Window
from search.rlhf.windows import Grid
from search.space import memory_share

Place = tuple[Window, Option]

ORDERS = 720
"""At most so many orders of dispatch are looked at. A graph with more has the first of them, and then no proof."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """What bringing a role's parameters to a call takes.

    Attributes:
        seconds, nbytes: of the move, over all devices.
        copies: whether there is a copy: the call's layout is not the home's.
    """

    seconds: float
    nbytes: float
    copies: bool


_AT_HOME = Moved(0.0, 0.0, False)


class Problem:
    """A graph on a cluster.

    Args:
        usable_bytes: of a device; default: the share of its memory that plans count on.
        sizes: that windows may have; default: all.
        synchronous: an iteration begins when all calls of the one before have ended.

    Raises:
        ValueError: a size that no window has; options that contradict themselves.
    """

    def __init__(
        self,
        graph: Graph,
        workload: Workload,
        cluster: Cluster,
        costs: Costs,
        *,
        usable_bytes: float | None = None,
        sizes: Collection[int] | None = None,
        synchronous: bool = False,
    ):
        self.synchronous = synchronous
        self.graph, self.workload, self.cluster, self.costs = graph, workload, cluster, costs
        accelerator = cluster.accelerator
        self.usable = usable_bytes or memory_share(accelerator) * accelerator.usable_memory_bytes
        self.grid = Grid.of(cluster, sizes=sizes)
        self.calls = tuple(graph.call(name) for name in graph.order)
        self.count = len(self.calls)
        index = {call.name: i for i, call in enumerate(self.calls)}
        self.index = index
        self.roles = graph.roles
        self.before = tuple(tuple(index[name] for name in graph.before(call.name)) for call in self.calls)
        homes = {
            role: index[(graph.trains(role) or graph.of_role(role)[0]).name]  # The home: see the module.
            for role in self.roles
        }
        self.home = tuple(homes[call.role] for call in self.calls)
        self.role = tuple(self.roles.index(call.role) for call in self.calls)
        self.trained = tuple(graph.trains(call.role) is not None for call in self.calls)
        self._options: dict[tuple[int, int], tuple[Option, ...]] = {}
        self._moves: dict[tuple, tuple[Moved, Option, Option]] = {}
        self._host: dict[tuple, tuple[float, Option]] = {}
        self.orders = tuple(itertools.islice(_orders(self.before, ()), ORDERS + 1))
        self.every_order = len(self.orders) <= ORDERS
        self.orders = self.orders[:ORDERS]
        self.positions = tuple(tuple(order.index(call) for call in range(self.count)) for order in self.orders)
        self.ancestors = tuple(self._ancestors(call) for call in range(self.count))
        self.unordered = tuple(
            (a, b)
            for a, b in itertools.combinations(range(self.count), 2)
            if not (self.ancestors[b] >> a & 1 or self.ancestors[a] >> b & 1)
        )

    def _ancestors(self, call: int) -> int:
        """Calls of the same iteration that a call waits for, directly or not, as bits."""
        out = 0
        for other in self.before[call]:
            out |= 1 << other | self._ancestors(other)
        return out

    def choices(self, call: int, devices: int) -> tuple[Option, ...]:
        """Options of a call on so many devices.

        Raises:
            ValueError: one is for another number of devices, or has a number that is none.
        """
        key = call, devices
        if key not in self._options:
            options = tuple(self.costs.options(self.calls[call], devices))
            for option in options:
                numbers = (option.seconds, option.params_bytes, option.working_bytes, option.state_bytes)
                if option.devices != devices or not all(math.isfinite(x) and x >= 0 for x in numbers):
                    raise ValueError(
                        f"call {self.calls[call].name!r} on {devices} devices: an option on {option.devices} devices "
                        f"with seconds, params_bytes, working_bytes, state_bytes = {numbers}"
                    )
            self._options[key] = options
        return self._options[key]

    def move(self, call: int, place: Place, home: Place) -> Moved:
        """What bringing the parameters from home to a call takes."""
        if self.home[call] == call:
            return _AT_HOME
        mine, its = place[0], home[0]
        exact = call, id(place[1]), id(home[1]), its.first, mine.first
        known = self._moves.get(exact)
        if known is None:
            source, target = self.grid.relation(its, mine)
            alike = call, id(place[1]), id(home[1]), source.first, target.first
            known = self._moves.get(alike)
            if known is None:
                known = self._move(call, (target, place[1]), (source, home[1])), place[1], home[1]
            self._moves[exact] = self._moves[alike] = known
        return known[0]

    def _move(self, call: int, place: Place, home: Place) -> Moved:
        if home[0] == place[0] and _alike(home[1], place[1]):
            return _AT_HOME
        seconds, nbytes = self.costs.move(self.calls[call].role, home, place)
        # Nothing comes and nothing goes: every device has what it needs, and no more.
        same = home[0] == place[0] and nbytes == 0 and home[1].params_bytes == place[1].params_bytes
        return _AT_HOME if same else Moved(seconds, nbytes, True)

    def host_bytes(self, call: int, home: Place, *, offload: bool = False) -> float:
        """Bytes per device that come from the host for a call, or go back after it."""
        if offload and self.calls[call].kind != "train":
            return 0.0
        trains = self.calls[call].kind == "train"
        return home[1].params_bytes + (home[1].state_bytes if trains else 0.0)

    def host_seconds(self, call: int, home: Place) -> float:
        """Seconds of bringing an offloaded role's home to the devices for a call; and of bringing it back."""
        nbytes = self.host_bytes(call, home)
        key = call, id(home[1])
        if key not in self._host:
            self._host[key] = self.costs.offload(self.calls[call].role, home[1], nbytes), home[1]
        return self._host[key][0]


def _alike(home: Option, here: Option) -> bool:
    if home.tree is not None and here.tree is not None:
        return home.tree == here.tree and home.params_bytes == here.params_bytes
    return home.plan == here.plan and home.params_bytes == here.params_bytes


def _orders(before: tuple[tuple[int, ...], ...], done: tuple[int, ...]):
    """Orders of dispatch in which every call comes after those that it waits for."""
    if len(done) == len(before):
        yield done
    for call, waits in enumerate(before):
        if call not in done and all(i in done for i in waits):
            yield from _orders(before, (*done, call))
