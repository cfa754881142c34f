"""Costs of RLHF calls in closed form, for tests and benchmarks of the search: what matters is that they trade off.

    costs = SyntheticCosts({"actor": 7e9, ...}, workload, per_node=8)

Tensor parallelism communicates per layer, and pays for leaving the node; pipelines have bubbles and decode one stage at
a time; data parallelism needs parameters and optimizer state everywhere. 2 bytes per parameter, 16 while it is trained.
"""

import dataclasses

from search.plan import Plan
from search.rlhf import Call, Option, Window, Workload
from sharding_rules import MeshShape

PEAK, MEMORY_RATE, NODE_RATE, NETWORK_RATE, HOST_RATE = 312e12 * 0.5, 2.0e12 * 0.7, 200e9, 20e9, 20e9


@dataclasses.dataclass
class SyntheticCosts:
    """See the module.

    Attributes:
        sizes: role -> parameters.
        strategies: at most so many options per call and size; those that are fastest.
    """

    sizes: dict[str, float]
    workload: Workload
    per_node: int
    strategies: int = 99
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
            self._known[key] = tuple(found[: self.strategies])
        return self._known[key]

    def option(self, call: Call, data: int, tensor: int, stage: int) -> Option:
        work, size = self.workload, self.sizes[call.role]
        layers, width = 12 * (size / 1e8) ** 0.4, 1024 * (size / 1e9) ** 0.3
        devices, shard = data * tensor * stage, size / (tensor * stage)
        sequences = work.sequences / data
        tokens = sequences * work.length
        reduce = 4 * width * 2 * (tensor - 1) / tensor / NODE_RATE * layers / stage  # Per token.
        passes, bubble = 1, (stage - 1) / (stage - 1 + 4 * stage)
        parts = {}
        if call.kind == "generate":
            step = 2 * shard / MEMORY_RATE + 2e-5 * layers / stage * (1 + (tensor > 1))
            step = max(step, 2 * shard * sequences / stage / PEAK) * stage
            cache = sequences * work.length * layers * width * 4 / (tensor * stage)
            parts["decode"] = work.new_tokens * (step + sequences * reduce + cache / MEMORY_RATE)
            parts["prefill"] = 2 * shard * sequences * work.prompt_tokens / PEAK
            working = cache
        else:
            passes = 3 if call.kind == "train" else 1
            steps = work.minibatches if call.kind == "train" else 1
            parts["compute"] = passes * (2 * shard * tokens / PEAK + tokens * reduce) / (1 - bubble)
            working = 2.0 * tokens / steps * width * 24 / tensor / (16 if call.kind == "train" else 32)
            if call.kind == "train":
                rate = NODE_RATE if devices <= self.per_node else NETWORK_RATE
                parts["gradients"] = steps * 4 * shard * (data - 1) / data / rate
                working += 2 * shard
        trains = call.kind == "train"
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
