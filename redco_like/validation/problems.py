"""A published run as a problem of the planner: its traced model, its cluster and its plan.

problems = Problems()
problem = problems.of(run)
problem.seconds(efficiency), problem.bytes_per_device()
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from redco_like.validation.decoder import decoder_problem
from redco_like.validation.runs import Run
from search import Plan, TracedModel, find_accelerator, parse_cluster
from search.cluster import Cluster
from search.costing import candidate, memory_parts
from search.efficiency import Efficiency
from search.placement import Columns, Flow, Placement
from search.schedule_times import makespan
from search.space import Inner
from sharding_rules import CONTEXT, DATA, EXPERT, FSDP, STAGE, TENSOR, MeshShape, PlanError

LAYER_TENSORS = 12
"""Of a block of GPT: two normalisations and four products, each with a bias."""
LIVE = 1e9
"""Parameters that DeepSpeed keeps gathered (stage3_max_live_parameters, stage3_max_reuse_distance)."""
BITS = {"float8": 8, "float4": 4}


@dataclasses.dataclass
class Problem:
    """One run that the cost model can be asked about.

    Attributes:
        run, plan, model: what was measured, as which plan, of which model.
        place, columns: the plan as a candidate of the cost model.
    """

    run: Run
    plan: Plan
    model: TracedModel
    place: Placement
    columns: Columns

    def seconds(self, efficiency: Efficiency, *, exact: bool = True) -> float:
        """Seconds per step. Without `exact`, what no order of the pipeline's operations beats."""
        costs = self.model.costs.on(self.model.costs.cluster, efficiency)
        total = float(costs.seconds(self.place, self.columns, exact=exact).total[0])
        if self.run.layers_per_stage:
            total += self._uneven(costs.stage_seconds(self.place, self.columns))
        return total

    def _uneven(self, times: dict[str, Any]) -> float:
        """What stages with unequal numbers of layers take more than equal ones."""
        layers = np.array(self.run.layers_per_stage)
        options = {"stages": len(layers), "microbatches": self.plan.microbatches}
        options["transfer_seconds"] = times["transfer_seconds"]
        equal, moved = dict(options), dict(options)
        for name in ("forward_seconds", "backward_seconds"):
            inner = np.median(times[name])
            equal[name] = times[name]
            moved[name] = times[name] + inner * (layers / layers.mean() - 1)
        return float(makespan("1f1b", **moved) - makespan("1f1b", **equal))

    def parts(self, efficiency: Efficiency) -> dict[str, float]:
        costs = self.model.costs.on(self.model.costs.cluster, efficiency)
        return costs.seconds(self.place, self.columns).at(0)

    def bytes_per_device(self) -> float:
        """Of the fullest device, analytic, less what PyTorch does not hold of what XLA does.

        XLA stacks the gradients of a loop's layers before they are summed, in float32; PyTorch adds each at once, in
        the dtype in which devices sum them. Its shards are of all weights laid end to end, so that any number of
        devices divides them, and those of Megatron's optimizer over all devices that hold the same weights.
        """
        found = memory_parts(self.model, self.place, self.columns)
        parts = {name: float(part[0]) for name, part in found.items()}
        run = self.run
        if run.framework == "compiled":
            return sum(parts.values())
        if self.columns.flags("optimizer_sharding")[0] and self.columns.microbatches[0] > 1:
            # Our step sums gradients where the optimizer takes them; others keep whole sums on every replica.
            parts["gradients"] *= self.place.batch_shards / run.fsdp
        fsdp = np.array([run.fsdp], np.int64)
        held = self.model.activations(self.place, run.remat, self.columns.microbatches, fsdp)
        parts["transient"] -= float(held.stacked[0]) / self.place.stage
        if run.fsdp > 1 and run.stage == 1:
            whole = self.place.held[:, :, self.place.fsdp_sizes.index(1)].sum(1) / run.fsdp
            parts |= dict(zip(("params", "gradients", "optimizer"), whole.tolist(), strict=True))
        if run.sums_narrow:
            parts["gradients"] = min(parts["gradients"], parts["params"])
        if run.framework.startswith("megatron") and run.zero == 1:
            a = run.architecture
            experts = (a.layers - a.dense_layers) * a.experts * (2 + a.gated) * a.embed * a.expert_width
            share = min(1.0, 2 * experts / (run.expert * run.tensor * run.stage) / parts["params"])
            parts["optimizer"] *= (share + (1 - share) / run.expert) / run.context
            if run.expert_ways > run.expert * run.tensor:
                # Experts over replicas and tensor, where the plan has them over tensor alone.
                for name in ("params", "gradients"):
                    parts[name] *= 1 - share + share * run.expert * run.tensor / run.expert_ways
        return sum(parts.values())


class Problems:
    """Makes problems; models that differ in their machines only are traced once."""

    def __init__(self):
        self._models: dict[Any, TracedModel] = {}

    def of(self, run: Run) -> Problem:
        """The problem of a run.

        Raises:
            PlanError: the cost model does not know such a plan.
        """
        cluster = cluster_of(run)
        model = self._model(run, cluster)
        plan = plan_of(run)
        if run.stage > 1 and model.layers % run.stage:
            # Embedding and head stand for a layer each where 126 layers lie on 8 stages: equal shares all the same.
            model.layers = run.stage * math.ceil(model.layers / run.stage)
        place, columns = candidate(model, plan)
        return Problem(run, plan, model, _as_run(place, run, cluster), columns)

    def _model(self, run: Run, cluster: Cluster) -> TracedModel:
        # Megatron's checkpoint runs the whole block again; PyTorch's stops and XLA's starts where nothing is needed.
        gain = run.framework.startswith("megatron") and run.remat == "full"
        key = (run.architecture, run.seq_len, run.global_batch, run.product_dtype, gain, run.remat, run.fused_attention)
        fused_loss = run.framework != "compiled"
        key = (*key, run.recompute_latents, fused_loss)
        if key not in self._models:
            traced, state = decoder_problem(
                run.architecture,
                seq_len=run.seq_len,
                global_batch=run.global_batch,
                product_dtype=run.product_dtype,
                gain=gain,
                recompute_latents=run.recompute_latents,
                fused_loss=fused_loss,
            )
            self._models[key] = TracedModel(
                traced,
                state,
                cluster,
                param_dtype="bfloat16",
                fused_attention=run.fused_attention,
                remats=(run.remat,),
            )
        return self._models[key].on(cluster)


def _as_run(place: Placement, run: Run, cluster: Cluster) -> Placement:
    """A placement with its collectives as the software of a run does them."""
    if run.framework == "compiled":
        return place
    if run.fsdp > 1 and run.stage == 1:
        place = _flat(place, run.fsdp)
    flows = [_flow_as_run(flow, run, cluster) for flow in place.flows]
    split = place.boundary_split
    if run.framework == "megatron" and run.stage > 1 and TENSOR not in split:
        # Each device of a tensor group sends a part to the next stage, which gathers them (Narayanan et al. 2021, 4.1).
        count = {"": float(run.stage * run.chunks)}
        phases = ("forward", "backward")
        bytes_ = place.boundary_bytes
        flows += [Flow("all_gather", (TENSOR,), bytes_, split, phase, False, True, count) for phase in phases]
        split = (*split, TENSOR)
    return dataclasses.replace(place, flows=tuple(flows), boundary_split=split)


def _flat(place: Placement, fsdp: int) -> Placement:
    """Weights laid end to end before they are split: devices that divide no array do too (where fewer do)."""
    gathered = sum(flow.bytes for flow in place.flows if flow.kind == "all_gather" and flow.axes == (FSDP,))
    best = int(np.argmax(gathered))
    alike = np.ones(len(place.fsdp_sizes))
    flows = []
    for flow in place.flows:
        if np.ndim(flow.bytes):
            summed = None if flow.summed_bytes is None else alike * np.asarray(flow.summed_bytes)[best]
            flow = dataclasses.replace(flow, bytes=alike * np.asarray(flow.bytes)[best], summed_bytes=summed)
            if flow.kind == "all_reduce" and FSDP in flow.axes and place.batch_shards == fsdp:
                flow = dataclasses.replace(flow, kind="reduce_scatter", axes=(FSDP,))
        flows.append(flow)
    held = place.held[:, :, [place.fsdp_sizes.index(1)]] / np.array(place.fsdp_sizes, np.float64)
    return dataclasses.replace(place, flows=tuple(flows), held=held)


def _flow_as_run(flow: Flow, run: Run, cluster: Cluster) -> Flow:
    """A collective as the software of a run does it."""
    if run.reduces_narrow and flow.phase == "step":
        # The planner sums gradients over devices in float32, as the step does; these summed them in 16 bits.
        flow = dataclasses.replace(flow, summed_bytes=None)
    if run.framework == "megatron":
        # No collective runs behind compute, and what ZeRO-3 has split is gathered tensor by tensor when it is needed.
        flow = dataclasses.replace(flow, hides=False)
        if flow.kind == "all_gather" and flow.axes == (FSDP,) and flow.region == "layers":
            # A block larger than what DeepSpeed keeps goes after it was computed again, and is gathered once more.
            gathers = LAYER_TENSORS * (2 if flow.again and run.remat == "full" and _block(run) > LIVE else 1)
            count = {remat: gathers * times for remat, times in flow.count.items()}
            flow = dataclasses.replace(flow, bytes=flow.bytes / LAYER_TENSORS, count=count)
    if run.framework == "megatron-core" and flow.kind == "all_gather" and flow.axes == (TENSOR,):
        # Transformer Engine gathers activations as its products take them: in 8 or 4 bits.
        flow = dataclasses.replace(flow, bytes=flow.bytes * BITS.get(run.product_dtype, 16) / 16)
    if run.framework == "megatron-core" and flow.kind == "all_to_all" and flow.axes == (EXPERT,):
        # A token goes once to a node (a device, inside one) however many of its experts are there (DeepEP, HybridEP).
        inside = max(1, cluster.devices_per_node // (run.tensor * run.context))
        places = run.expert / inside if run.expert > inside else run.expert
        once = places * (1 - (1 - 1 / places) ** run.architecture.chosen) / run.architecture.chosen
        if run.sequence and TENSOR not in flow.split:
            # Every device of a tensor group sends the tokens that it holds.
            once /= run.tensor
        flow = dataclasses.replace(flow, bytes=flow.bytes * once)
    return flow


def _block(run: Run) -> int:
    """Parameters of a dense block, roughly."""
    a = run.architecture
    return a.embed * (2 * (a.heads + a.kv_heads) * a.head_dim + (2 + a.gated) * a.mlp)


def plan_of(run: Run) -> Plan:
    """The plan that a run was, in this project's words."""
    mesh = MeshShape(
        data=run.data, fsdp=run.fsdp, stage=run.stage, expert=run.expert, context=run.context, tensor=run.tensor
    )
    inner = Inner(run.tensor, run.context, run.expert, run.sequence, run.data * run.fsdp, run.stage)
    if run.schedule not in ("1f1b", "interleaved"):
        raise PlanError(f"schedule {run.schedule}")
    return Plan(
        mesh=mesh,
        preset=inner.preset(run.fsdp),
        microbatches=run.microbatches,
        remat=run.remat,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        schedule=run.schedule,
        chunks=run.chunks,
        vocab="spread" if run.spread_vocab else "ends",
        optimizer_sharding=run.zero == 1,
        regather=run.zero != 2,
        order=_order(run),
    )


def _order(run: Run) -> tuple[str, ...]:
    """Mesh axes, outermost first: Megatron puts stages outside of replicas, others as the mesh has them."""
    if not run.framework.startswith("megatron") or run.stage == 1:
        return ()
    names = (STAGE, DATA, FSDP, EXPERT, CONTEXT, TENSOR)
    return tuple(axis for axis in names if getattr(run, axis) > 1)


def cluster_of(run: Run) -> Cluster:
    """The machines of a run: nodes of what their fast domain holds, or slices of a torus."""
    accelerator = find_accelerator(run.accelerator)
    if accelerator.torus_dims:
        slices = run.devices // run.devices_per_node
        prefix = f"{slices}*" if slices > 1 else ""
        if run.topology:
            return parse_cluster(f"{prefix}{accelerator.name}:{run.topology}")
        return parse_cluster(f"{prefix}{accelerator.name}-{2 * run.devices_per_node}")
    cluster = make_cluster(accelerator.name, run.devices, run.devices_per_node)
    if len(cluster.tiers) < 2 or not run.nic_bytes_per_second:
        return cluster
    inner, network = cluster.tiers
    attained = run.nic_bytes_per_second * accelerator.nic_efficiency
    return dataclasses.replace(cluster, tiers=(inner, dataclasses.replace(network, bytes_per_second=attained)))


def make_cluster(accelerator: str, devices: int, devices_per_node: int) -> Cluster:
    """Full nodes of an accelerator, or as much of one as there are devices."""
    most = min(devices, devices_per_node)
    # 256 devices of domains of 72 are taken as four of 64.
    per_node = max(n for n in range(1, most + 1) if devices % n == 0)
    return parse_cluster(f"{devices // per_node}x{per_node}x{accelerator}")
