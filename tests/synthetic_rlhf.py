"""Costs of RLHF calls in closed form, for tests and benchmarks of the search: what matters is that they trade off.

    costs = SyntheticCosts({"actor": 7e9, ...}, workload, per_node=8)

Tensor parallelism communicates per layer; pipelines have bubbles and decode one stage at a time; data parallelism needs
parameters and optimizer state everywhere, and sums gradients; a layer takes a least time, so that many devices for few
rows are wasted. 2 bytes per parameter, 16 while it is trained.
"""

import dataclasses
import random

from search.plan import Plan
from search.rlhf import Call, Option, Window, Workload
from sharding_rules import MeshShape

PEAK, MEMORY_RATE, NODE_RATE, NETWORK_RATE, HOST_RATE = 312e12 * 0.5, 2.0e12 * 0.7, 200e9, 20e9, 20e9


@dataclasses.dataclass
class SyntheticCosts:
    """See the module.

    Attributes:
        sizes: role -> parameters.
        strategies: at most so many options per call, the fastest; or devices -> so many.
        slower: all seconds of calls are multiplied by it.
    """

    sizes: dict[str, float]
    workload: Workload
    per_node: int
    strategies: int | dict[int, int] = 99
    slower: float = 1.0

    def __post_init__(self):
        self._known: dict[tuple[str, int], tuple[Option, ...]] = {}

    def options(self, call: Call, devices: int) -> tuple[Option, ...]:
        key = call.name, devices
        if key not in self._known:
            found = []
            for tensor in _powers(min(devices, self.per_node)):
                for stage in _powers(devices // tensor):
                    data, rest = divmod(devices, tensor * stage)
                    if not rest and self.workload.sequences % data == 0:
                        found.append(self.option(call, data, tensor, stage))
            found.sort(key=lambda option: option.seconds)
            most = self.strategies if isinstance(self.strategies, int) else self.strategies.get(devices, 0)
            self._known[key] = tuple(found[:most])
        return self._known[key]

    def option(self, call: Call, data: int, tensor: int, stage: int) -> Option:
        """One way to run a call."""
        work, size = self.workload, self.sizes[call.role]
        layers, width = 12 * (size / 1e8) ** 0.4, 1024 * (size / 1e9) ** 0.3
        shard, rows = size / (tensor * stage), work.sequences / data
        trains = call.kind == "train"
        floor = 3e-5 + 2e-5 * (tensor > 1)  # Seconds of a layer, however little there is to do.
        reduce = 4 * width * (tensor - 1) / tensor / NODE_RATE  # Per token and layer.
        parts = {}

        def forward(rows_at_once: float, tokens: float) -> float:
            """A stage, with so many rows of so many tokens."""
            flops = 2 * shard * rows_at_once * tokens / PEAK
            return layers / stage * max(floor, rows_at_once * tokens * reduce) + flops

        if call.kind == "generate":
            at_once = rows / stage  # The stages work on as many groups of rows.
            cache = rows * work.length * layers * width * 4 / (tensor * stage)
            reads = (2 * shard + cache / stage / 2) / MEMORY_RATE
            parts["decode"] = work.new_tokens * stage * max(reads, 1.5 * forward(at_once, 1.0))
            parts["prefill"] = (2 * stage - 1) * forward(at_once, work.prompt_tokens)
            working = cache
        else:
            steps = work.minibatches if trains else 1
            groups = max(1.0, min(4.0 * stage, rows / steps))
            at_once = rows / steps / groups
            once = forward(at_once, work.length) * (groups + stage - 1)
            parts["compute"] = steps * once * (3 if trains else 1)
            in_flight = min(groups, stage) if trains else 1
            working = at_once * work.length * width * (24 * layers / stage if trains else 48) / tensor * in_flight
            if trains:
                rate = NODE_RATE if data * tensor * stage <= self.per_node else NETWORK_RATE
                parts["gradients"] = steps * 4 * shard * (data - 1) / data / rate
                working += 2 * shard
        return Option(
            Plan(MeshShape(data=data, tensor=tensor, stage=stage)),
            seconds=self.slower * sum(parts.values()) + 0.05,
            params_bytes=2 * shard,
            working_bytes=working,
            state_bytes=12 * shard if trains else 0.0,
            tree=(data, tensor, stage),
            parts=parts,
        )

    def move(self, role: str, source: tuple[Window, Option], target: tuple[Window, Option]) -> tuple[float, float]:
        if source[0] == target[0] and source[1].tree == target[1].tree:
            return 0.0, 0.0
        common = max(0, min(source[0].end, target[0].end) - max(source[0].first, target[0].first))
        # Of what devices in both need, they have a part already.
        kept = common / target[0].devices * min(1.0, target[1].tree[1] / source[1].tree[1]) * 0.5
        per_device = target[1].params_bytes * (1 - kept)
        spans = max(source[0].end, target[0].end) - min(source[0].first, target[0].first)
        rate = NODE_RATE if spans <= self.per_node else NETWORK_RATE
        return 0.01 + per_device / rate, per_device * target[0].devices

    def offload(self, role: str, option: Option, nbytes: float) -> float:
        return nbytes / HOST_RATE


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


@dataclasses.dataclass
class RandomCosts:
    """Any numbers at all: what is true of a search here is true of it anywhere. Bytes are about 1 a role and device.

    Attributes:
        seed: of everything.
        count: options per call and size.
        sizes: of windows, in devices, that have options.
    """

    seed: int
    count: int
    sizes: tuple[int, ...] = (1, 2, 4, 8)

    def options(self, call: Call, devices: int) -> tuple[Option, ...]:
        if devices not in self.sizes:
            return ()
        draw = random.Random(f"{self.seed} {call.name} {devices}")
        out = []
        for _ in range(self.count):
            layout = draw.randrange(3)  # Some options lie alike.
            mesh = MeshShape(data=devices) if layout else MeshShape(tensor=devices)
            out.append(
                Option(
                    Plan(mesh, microbatches=layout + 1),
                    seconds=draw.uniform(1, 4) * (8 / devices) ** draw.uniform(0.2, 1.1),
                    params_bytes=1.0 * (8 / devices) ** 0.5 if layout else 1.5,
                    working_bytes=draw.uniform(0.2, 2),
                    state_bytes=draw.uniform(1, 4) if call.kind == "train" else 0.0,
                    tree=(layout, devices),
                )
            )
        return tuple(out)

    def move(self, role: str, source: tuple[Window, Option], target: tuple[Window, Option]) -> tuple[float, float]:
        if source[0] == target[0] and source[1].tree == target[1].tree:
            return 0.0, 0.0
        where = source[0].first, source[0].devices, target[0].first, target[0].devices
        draw = random.Random(f"{self.seed} {role} {where} {source[1].tree} {target[1].tree}")
        return draw.uniform(0, 1), draw.uniform(1, 2)

    def offload(self, role: str, option: Option, nbytes: float) -> float:
        return 0.2 * nbytes
