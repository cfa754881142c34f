"""What the host does between the calls of an iteration: completions to arrays, rewards, advantages.

between = Between(problem, reward_fn, decode_fn)
runner = Runner(execution, steps, params, hosts=between.steps())
between.written(outcome.data)                    # completions, as the user's functions see them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.rlhf import HostStep
from redco_like.rlhf.algorithm import Rollout
from redco_like.rlhf.building import EXPERIENCE, SEQUENCES, Problem
from redco_like.rlhf.rewards import Written, call_rewards


class Between:
    """The steps of the host, and what the algorithm remembers from one iteration to the next.

    Attributes:
        problem: what is run.
        state: of the algorithm, as the next iteration to come to its experience gets it.
    """

    def __init__(
        self,
        problem: Problem,
        reward_fn: Callable[..., Any] | None,
        decode_fn: Callable[[Sequence[int]], str] | None,
    ):
        self.problem, self._reward_fn, self._decode_fn = problem, reward_fn, decode_fn
        self.state: dict[str, float] = dict(problem.algorithm.start())

    def steps(self) -> list[HostStep]:
        """What the runner is given."""
        hosts = []
        known: tuple[str, ...] = (SEQUENCES, *self._scored)
        if self.problem.graph.inputs == ("prompts",):
            completions, logprobs = next(call.writes for call in self.problem.graph.calls if call.kind == "generate")
            hosts.append(HostStep("rollout", (completions, logprobs), ("record", SEQUENCES), self._rollout))
            known = ("record", *known)
            if self._reward_fn is not None:
                hosts.append(HostStep("reward_fn", (completions,), ("rewards",), self._rewards, "first"))
                known = (*known, "rewards")
        hosts.append(HostStep("experience", known, (EXPERIENCE, "made"), self._experience))
        return hosts

    @property
    def _scored(self) -> list[str]:
        """Names of what score calls write."""
        return [name for call in self.problem.graph.calls if call.kind == "score" for name in call.writes]

    def _rollout(self, data: Mapping[str, Any], iteration: int) -> dict[str, Any]:
        del iteration
        workload = self.problem.workload
        call = next(call for call in self.problem.graph.calls if call.kind == "generate")
        completions, logprobs = (data[name] for name in call.writes)
        record = Rollout.of(
            data["prompts"], completions, width=workload.length, samples=workload.samples, logprobs=logprobs
        )
        return {"record": record, SEQUENCES: record.batch()}

    def _rewards(self, data: Mapping[str, Any], iteration: int) -> dict[str, Any]:
        written = self.written(data)
        return {"rewards": call_rewards(self._reward_fn, written, picked=data["picked"], iteration=iteration)}

    def _experience(self, data: Mapping[str, Any], iteration: int) -> dict[str, Any]:
        del iteration
        record = data["record"]
        for name in (*self._scored, *(["rewards"] if self._reward_fn is not None else [])):
            record = record.scored(name, data[name])
        made = self.problem.algorithm.experience(record, self.state)
        self.state = dict(made.state)  # the next iteration may come here before this one is finished
        return {EXPERIENCE: made.batch, "made": made}

    def written(self, data: Mapping[str, Any]) -> Written:
        """An iteration's completions, as the user's functions see them."""
        call = next(call for call in self.problem.graph.calls if call.kind == "generate")
        sampling = self.problem.sampling
        return Written.of(
            data["objects"],
            data[call.writes[0]],
            samples=sampling.n,
            decode_fn=self._decode_fn,
            eos=self.problem.eos if sampling.eos is None else sampling.eos,
        )
