"""One iteration of RLHF as a graph of model function calls (ReaL, Mei et al. 2024, arXiv 2406.14088).

    graph = ppo()                                              # six calls of four roles
    graph = Graph(                                             # or a user's own
        "best_of_n",
        inputs=("prompts",),
        calls=(
            Call("generate", "actor", "generate", ("prompts",), ("completions",)),
            Call("reward", "reward", "score", ("completions",), ("rewards",)),
            Call("train", "actor", "train", ("completions", "rewards")),
        ),
    )
    graph.before("train")                                      # ("generate", "reward")

A *call* runs one *role* (a model with parameters of its own) on data. A call waits for the calls that write what it
reads. A call that trains writes a new version of its role's parameters: in an iteration it waits for every other call
of its role, and all calls of its role wait for it in the next.
"""

from __future__ import annotations

import dataclasses
import functools
import graphlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

Kind = Literal["generate", "score", "train"]
"""generate: a prompt is continued, by a prefill and one decoding step per token. score: one forward pass over whole
sequences. train: forward, backward and optimizer steps over them."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One model function call.

    Attributes:
        name: of the call, unique in its graph.
        role: whose parameters it uses.
        kind: what it does with them.
        reads, writes: names of data.
    """

    name: str
    role: str
    kind: Kind
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "reads", tuple(self.reads))
        object.__setattr__(self, "writes", tuple(self.writes))
        if self.kind not in get_args(Kind):
            raise ValueError(f"call {self.name!r}: kind={self.kind!r}; one of {', '.join(get_args(Kind))}")


@dataclasses.dataclass(frozen=True)
class Graph:
    """Calls of one iteration.

    Attributes:
        name: of the algorithm.
        inputs: names of data that come from outside.
        calls: in any order; `order` is one that respects what they read.

    Raises:
        ValueError: no calls, two of one name, data that nobody writes or two write, a cycle, a role trained twice.
    """

    name: str
    inputs: tuple[str, ...]
    calls: tuple[Call, ...]

    def __post_init__(self):
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "calls", tuple(self.calls))
        if not self.calls:
            raise ValueError(f"graph {self.name!r} has no calls")
        writers: dict[str, str] = dict.fromkeys(self.inputs, "the inputs")
        seen: set[str] = set()
        trains: dict[str, str] = {}
        for call in self.calls:
            if call.name in seen:
                raise ValueError(f"graph {self.name!r}: two calls are named {call.name!r}")
            seen.add(call.name)
            for data in call.writes:
                if data in writers:
                    raise ValueError(f"graph {self.name!r}: {data!r} is written by {call.name!r} and {writers[data]!r}")
                writers[data] = call.name
            if call.kind == "train" and trains.setdefault(call.role, call.name) != call.name:
                raise ValueError(
                    f"graph {self.name!r}: {trains[call.role]!r} and {call.name!r} both train {call.role!r}"
                )
        for call in self.calls:
            for data in call.reads:
                if data not in writers:
                    raise ValueError(
                        f"graph {self.name!r}: call {call.name!r} reads {data!r}, which nothing writes; there are "
                        f"{', '.join(sorted(writers))}"
                    )
        _ = self.order

    def call(self, name: str) -> Call:
        """Return the call of a name.

        Raises:
            ValueError: there is none.
        """
        for call in self.calls:
            if call.name == name:
                return call
        raise ValueError(f"graph {self.name!r} has no call {name!r}; it has {', '.join(c.name for c in self.calls)}")

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles, in the order of their first calls."""
        return tuple(dict.fromkeys(call.role for call in self.calls))

    def of_role(self, role: str) -> tuple[Call, ...]:
        return tuple(call for call in self.calls if call.role == role)

    def trains(self, role: str) -> Call | None:
        """The call that trains a role; None where it stays as it is."""
        return next((call for call in self.calls if call.role == role and call.kind == "train"), None)

    def before(self, name: str) -> tuple[str, ...]:
        """Calls of the same iteration that a call waits for, directly."""
        return self._before[name]

    def previous(self, name: str) -> tuple[str, ...]:
        """Calls of the iteration before that a call waits for: the one that trains its role."""
        trains = self.trains(self.call(name).role)
        return () if trains is None else (trains.name,)

    @functools.cached_property
    def _before(self) -> dict[str, tuple[str, ...]]:
        writers = {data: call.name for call in self.calls for data in call.writes}
        found: dict[str, tuple[str, ...]] = {}
        for call in self.calls:
            names = [writers[data] for data in call.reads if data in writers]
            if call.kind == "train":
                names += [other.name for other in self.of_role(call.role) if other.name != call.name]
            found[call.name] = tuple(dict.fromkeys(names))
        return found

    @functools.cached_property
    def order(self) -> tuple[str, ...]:
        """Names of the calls, every one after those it waits for.

        Raises:
            ValueError: some wait for each other; names them.
        """
        sorter = graphlib.TopologicalSorter({name: self._before[name] for name in (c.name for c in self.calls)})
        try:
            return tuple(sorter.static_order())
        except graphlib.CycleError as error:
            raise ValueError(
                f"graph {self.name!r} has a cycle: {' waits for '.join(reversed(error.args[1]))}"
            ) from None

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Graph:
        """Undo `to_record`.

        Raises:
            ValueError: unknown or missing fields; a graph that is none.
        """
        try:
            calls = tuple(Call(**call) for call in record["calls"])
            return cls(**{**record, "calls": calls})
        except KeyError as error:
            raise ValueError(f"the graph has no {error}") from None
        except TypeError as error:
            raise ValueError(f"the graph cannot be read: {error}") from None


@dataclasses.dataclass(frozen=True)
class Workload:
    """How much data an iteration has.

    Attributes:
        prompts: of an iteration, over all devices.
        prompt_tokens: of the longest prompt.
        new_tokens: generated per completion at most.
        samples: completions per prompt.
        minibatches: optimizer steps per pass over the data.
        epochs: passes over the data.

    Raises:
        ValueError: a number below 1, or minibatches that do not divide the sequences.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    samples: int = 1
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}={value!r}; a whole number from 1 up")
        if self.sequences % self.minibatches:
            near = max(k for k in range(1, self.minibatches) if not self.sequences % k)
            raise ValueError(
                f"{self.sequences} sequences do not split into minibatches={self.minibatches}; nearest: {near}"
            )

    @property
    def sequences(self) -> int:
        """Completed prompts of an iteration."""
        return self.prompts * self.samples

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens


def ppo(*, reward_model: bool = True) -> Graph:
    """PPO with a critic (Ouyang et al. 2022, arXiv 2203.02155): actor, reference, critic, and a reward model.

    >>> ppo().order[0], ppo().before("train_critic")
    ('generate', ('generate', 'reward', 'reference', 'critic'))
    """
    return _online("ppo", critic=True, reward_model=reward_model)


def grpo(*, reward_model: bool = True) -> Graph:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): the group of a prompt's samples stands for the critic."""
    return _online("grpo", critic=False, reward_model=reward_model)


def rloo(*, reward_model: bool = True) -> Graph:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): the other samples of a prompt are the baseline."""
    return _online("rloo", critic=False, reward_model=reward_model)


def dpo() -> Graph:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290): pairs are scored by the reference, then trained on."""
    return Graph(
        "dpo",
        ("pairs",),
        (
            Call("reference", "reference", "score", ("pairs",), ("reference_logprobs",)),
            Call("train_actor", "actor", "train", ("pairs", "reference_logprobs")),
        ),
    )


def reward_modelling() -> Graph:
    """Training of a reward model on pairs (Ouyang et al. 2022)."""
    return Graph("reward_modelling", ("pairs",), (Call("train_reward", "reward", "train", ("pairs",)),))


def sft() -> Graph:
    """Supervised fine-tuning."""
    return Graph("sft", ("examples",), (Call("train_actor", "actor", "train", ("examples",)),))


def _online(name: str, *, critic: bool, reward_model: bool) -> Graph:
    calls = [Call("generate", "actor", "generate", ("prompts",), ("completions", "logprobs"))]
    known = ["completions", "logprobs", "reference_logprobs"]
    if reward_model:
        calls.append(Call("reward", "reward", "score", ("completions",), ("rewards",)))
        known.append("rewards")
    calls.append(Call("reference", "reference", "score", ("completions",), ("reference_logprobs",)))
    if critic:
        calls.append(Call("critic", "critic", "score", ("completions",), ("values",)))
        known.append("values")
    calls.append(Call("train_actor", "actor", "train", tuple(known)))
    if critic:
        calls.append(Call("train_critic", "critic", "train", tuple(known)))
    return Graph(name, ("prompts",), tuple(calls))


GRAPHS = {"ppo": ppo, "grpo": grpo, "rloo": rloo, "dpo": dpo, "reward_modelling": reward_modelling, "sft": sft}
"""Built-in graphs by name."""
