"""Generation as a call of an execution plan: an engine on the window's devices, prompts in, completions out.

    step = GenerateStep(model, abstract_params, call_plan, devices, sampling=sampling, prompt_tokens=64, rows=32)
    done = step.run(params, {"prompts": prompts}, iteration)      # done.outputs["completions"], ["logprobs"]

Over several processes each has an engine on its own devices of the window, and continues its share of the prompts; the
data axis is what is shared out, and all other axes stay within a process. The n samples of a prompt follow each other.
What is drawn depends on the seed, the iteration and the number of the prompt alone: not on the devices, and not on what
else is in the batch.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.generation import SamplingParams
from pipelines.generation.programs import decode_problem
from pipelines.problem import cast_floats, layout_of
from pipelines.rlhf import Done, window_mesh
from redco_like.engine import Engine
from redco_like.engine_layout import functions_of
from redco_like.models.model import Model
from search import Plan
from search.rlhf import CallPlan
from sharding_rules import DATA, MeshShape, PlanError, make_mesh


class GenerateStep:
    """Continues an iteration's prompts.

    Attributes:
        sampling: how; may be replaced by another that has no more tokens and as many continuations.

    Args:
        model: a decoder; abstract_params: shapes of its parameters.
        call: window and plans.
        devices: as the execution plan numbers them.
        sampling: how prompts are continued, `n` times each.
        prompts: of an iteration.
        prompt_tokens: of the longest prompt.
        writes: names of the completions and of their log-probabilities.
        rows: sequences that run at a time on all devices together; default all of them.
        eos: tokens that end a completion, where `sampling` does not say.
        seed: of the draws.

    Raises:
        PlanError: a plan that splits parameters over processes, or that cannot be carried out.
        ValueError: as `Engine`.
    """

    def __init__(
        self,
        model: Model,
        abstract_params: Any,
        call: CallPlan,
        devices: Sequence[Any],
        *,
        sampling: SamplingParams,
        prompts: int,
        prompt_tokens: int,
        writes: tuple[str, str] = ("completions", "logprobs"),
        rows: int | None = None,
        eos: Sequence[int] = (),
        seed: int = 0,
    ):
        self.reads, self._writes = ("prompts",), writes
        self.mesh = window_mesh(call, devices)
        self.compute_dtype: str | None = model.dtype
        self.sampling = sampling
        self._seed, self._length = seed, prompt_tokens + sampling.max_tokens
        blocks = _blocks(self.mesh, call)
        plans = _within(call.prefill or call.plan, len(blocks)), _within(call.plan, len(blocks))
        shards = plans[1].mesh.batch_shards
        here = math.ceil(prompts / len(blocks)) * sampling.n
        rows = here if rows is None else min(math.ceil(rows / len(blocks)), here)
        rows = math.ceil(rows / shards) * shards
        shapes = cast_floats(_forms(abstract_params), model.dtype)
        traced = decode_problem(functions_of(model, self._length), shapes, rows, self._length, self._length)
        specs = layout_of(traced, plans[1]).specs("params")
        if len(blocks) > 1 and any(DATA in _axes(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)):
            raise PlanError(f"call {call.call!r}: the plan splits parameters over data, which goes across processes")
        self.param_shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)
        self._blocks = [block[0].process_index for block in blocks]
        self._engine: Engine | None = None
        if jax.process_index() in self._blocks:
            block = blocks[self._blocks.index(jax.process_index())]
            local = self.mesh if len(blocks) == 1 else _local_mesh(plans[1], block, call)
            self._local = jax.tree.map(lambda spec: NamedSharding(local, spec), specs, is_leaf=_is_spec)
            placed = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), _forms(abstract_params), self._local
            )
            self._engine = Engine(model, placed, plan=plans, devices=block, rows=rows, length=self._length, eos=eos)

    @property
    def engine(self) -> Engine:
        """This process's engine.

        Raises:
            ValueError: it has no devices of the window.
        """
        if self._engine is None:
            raise ValueError(f"process {jax.process_index()} has no devices of the window of this call")
        return self._engine

    def run(self, params: Any, data: Mapping[str, Any], iteration: int) -> Done:
        prompts = data[self.reads[0]]
        shares = np.array_split(np.arange(len(prompts)), len(self._blocks))
        mine = shares[self._blocks.index(jax.process_index())]
        engine = self.engine
        engine.set_params(params if len(self._blocks) == 1 else jax.tree.map(_view, params, self._local))
        made = engine.generate([prompts[i] for i in mine], [self._asked(int(i), iteration) for i in mine])
        written = [completion for samples in made for completion in samples]
        for i, completion in enumerate(written):
            if completion.finish == "error":
                raise ValueError(
                    f"completion {i % self.sampling.n} of prompt {mine[i // self.sampling.n]}: {completion.error}"
                )
        tokens, logprobs = self._writes
        outputs = {
            tokens: [completion.tokens for completion in written],
            logprobs: [completion.logprobs or () for completion in written],
            "finishes": [completion.finish for completion in written],
        }
        return Done(outputs)

    def joined(self, parts: Sequence[Done]) -> Done:
        names = parts[0].outputs
        return Done({name: [row for part in parts for row in part.outputs[name]] for name in names})

    def close(self) -> None:
        if self._engine is not None:
            self._engine.release()

    def _asked(self, prompt: int, iteration: int) -> SamplingParams:
        seed = zlib.crc32(f"{self._seed}/{self.sampling.seed}/{iteration}/{prompt}".encode())
        return dataclasses.replace(self.sampling, seed=seed, logprobs=True)


def _blocks(mesh: Mesh, call: CallPlan) -> list[list[Any]]:
    """The devices of each process, as equal parts of the data axis.

    Raises:
        PlanError: the processes do not have such parts.
    """
    processes = list(dict.fromkeys(device.process_index for device in mesh.devices.flat))
    if len(processes) == 1:
        return [list(mesh.devices.flat)]
    shape = call.plan.mesh
    if shape.data % len(processes):
        raise PlanError(
            f"call {call.call!r}: generation on {len(processes)} processes shares out the data axis, which has "
            f"{shape.data} devices (mesh {shape}); other axes stay within a process: nearest data={len(processes)}"
        )
    parts = np.split(mesh.devices, len(processes), axis=mesh.axis_names.index(DATA))
    for part in parts:
        if len({device.process_index for device in part.flat}) > 1:
            raise PlanError(
                f"call {call.call!r}: an axis other than data goes across processes (mesh {shape}, order "
                f"{call.plan.order or 'as it is'}); generation keeps them within a process"
            )
    return [list(part.flat) for part in parts]


def _within(plan: Plan, processes: int) -> Plan:
    """The plan of one process's part."""
    mesh = dataclasses.replace(plan.mesh, data=plan.mesh.data // processes)
    order = tuple(axis for axis in plan.order if mesh.sizes[axis] > 1)
    return dataclasses.replace(plan, mesh=mesh, order=order)


def _local_mesh(plan: Plan, devices: Sequence[Any], call: CallPlan) -> Mesh:
    shape: MeshShape = plan.mesh
    mesh = make_mesh(shape, devices, order=plan.order)
    if list(mesh.devices.flat) != list(devices):
        raise PlanError(
            f"call {call.call!r}: the devices of a process do not lie as in the whole mesh {call.plan.mesh}"
        )
    return mesh


def _view(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """This process's part of an array as an array of its own; nothing is copied."""
    return jax.make_array_from_single_device_arrays(x.shape, sharding, [shard.data for shard in x.addressable_shards])


def _axes(spec: P) -> set[str]:
    return {axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))}


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _forms(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
