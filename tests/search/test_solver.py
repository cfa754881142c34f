"""The search equals brute force, bounds are bounds, and better machines are never worse."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from test_cost import model_of

from search.cluster import Cluster, parse_cluster
from search.cost import CostModel
from search.costing import estimate_plan, memory_parts, saved_bytes
from search.efficiency import Efficiency
from search.memory import ActivationBytes
from search.placement import Columns, Flow, Placement, Variant, orders
from search.solver import solve
from search.space import Space
from search.workload import Array, Op, Workload
from sharding_rules import AXES, TENSOR

ROWS = {"batch": 16, "length": 64, "embed": 128, "mlp": 256, "vocab": 512}
REMATS = ("none", "dots", "full")


class Synthetic:
    """A random model: operations, traffic and bytes, with none behind them; legal where a coin says so."""

    has_experts = False
    tokens = 1024
    plan_fields = {"param_dtype": "float32", "compute_dtype": "bfloat16"}  # noqa: RUF012

    def __init__(self, seed, cluster, efficiency=None):
        draw = random.Random(seed)
        self.batch = draw.choice([4, 8, 16])
        rows = {**ROWS, "batch": self.batch}
        first = [random_op(draw, rows, "forward") for _ in range(draw.randint(1, 4))]
        first += [random_op(draw, rows, "backward") for _ in range(draw.randint(1, 4))]
        more = [random_op(draw, rows, "recompute") for _ in range(2)]
        works = {r: Workload((*first, *more[:i]), rows) for i, r in enumerate(REMATS)}
        self.layers = 4
        self.costs = CostModel(cluster, works, efficiency=efficiency, layers=self.layers)
        self.seed = seed
        self.flows = tuple(random_flow(draw) for _ in range(draw.randint(0, 5)))
        self.params, self.saved = 10 ** draw.uniform(8.5, 11), 10 ** draw.uniform(8.5, 11.5)
        self.boundary = 10 ** draw.uniform(4, 9)
        shares = np.array([draw.random() for _ in range(9)]).reshape(3, 3, 1)
        self.shares = shares / shares.sum()

    def place(self, inner):
        draw = random.Random(str((self.seed, inner.tensor, inner.context, inner.sequence)))
        if self.batch % inner.batch_shards or draw.random() < 0.15 or inner.context > 4 or self.layers % inner.stage:
            return "unlucky"
        rows = np.zeros((5, len(AXES)), bool)
        rows[0, :2], rows[1, 4], rows[3:, 5] = True, inner.context > 1, True
        spill = np.zeros_like(rows)
        spill[1, 5] = inner.sequence
        sizes = np.array([f for f in range(1, inner.batch_shards + 1) if inner.batch_shards % f == 0])
        kept = self.params / inner.tensor / sizes
        flows = [f for f in self.flows if f.axes != (TENSOR,) or not inner.sequence]
        for phase in ("forward", "backward"):
            again = phase == "backward"
            flows.append(Flow("all_gather", ("fsdp",), kept * sizes, (), phase, True, False, {"": 2.0}, again=again))
        return Placement(
            expert=1,
            context=inner.context,
            tensor=inner.tensor,
            batch_shards=inner.batch_shards,
            sequence=inner.sequence,
            rows=rows,
            spill=spill,
            beyond=np.zeros(5, bool),
            groups=np.zeros(5, bool),
            fsdp_sizes=tuple(int(f) for f in sizes),
            flows=tuple(flows),
            held=kept * self.shares,
            stage=inner.stage,
            boundary_bytes=self.boundary / inner.batch_shards,
        )

    def activations(self, place, remat, microbatches, fsdp):
        share = {"none": 1, "dots": 0.4, "full": 0.1}[remat]
        kept = self.saved * share / place.batch_shards / place.context / place.tensor**0.5 / microbatches
        parts = (0.7 * kept, 0.1 * kept, 0.2 * kept, np.where(fsdp > 1, 1e6, 0.0), 0.1 * kept)
        return ActivationBytes(*(part.astype(np.int64) for part in parts))


def random_op(draw, rows, phase):
    names = draw.sample(list(rows), draw.randint(2, 4))
    m, k, n = (2 ** draw.randint(4, 12) for _ in range(3))
    kind = draw.choice(["dot", "elementwise"])
    left, right = names[:2], names[1:]
    return Op(
        kind=kind,
        phase=phase,
        flops=2 * m * k * n if kind == "dot" else m * n,
        transcendentals=draw.choice([0, m]),
        batch=1 if kind == "dot" else 0,
        m=m if kind == "dot" else 0,
        n=n if kind == "dot" else 0,
        k=k if kind == "dot" else 0,
        reads=(Array(2 * m * k, tuple((x,) for x in left), False), Array(2 * k * n, tuple((x,) for x in right), True)),
        writes=(Array(2 * m * n, tuple((x,) for x in names if x != names[1]), False),),
        axes=tuple(names),
        contracted=(names[1],) if kind == "dot" else (),
        trips=draw.choice([1, 4, 32]),
        known=True,
        dtype="bfloat16",
        source="",
    )


def random_flow(draw):
    axis = draw.choice(["data", "context", "tensor"])
    kind = draw.choice(["all_reduce", "all_gather", "reduce_scatter"])
    phase = draw.choice(["forward", "backward", "step"])
    hides = axis == "data"
    counts = {"none": 2.0, "dots": 2.0, "full": 3.0} if draw.random() < 0.5 else {"": 1.0}
    split = tuple(a for a in ("data", "fsdp", "tensor") if a != axis and draw.random() < 0.5)
    split = tuple(a for a in split if "data" in split or a != "fsdp")
    shrinks = phase != "step" and draw.random() < 0.5
    region = draw.choice(["layers", "layers", "first", "last"])
    return Flow(kind, (axis,), 10 ** draw.uniform(4, 9), split, phase, hides, shrinks, counts, region=region)


CLUSTERS = ["4xA100", "8xH100", "2x8xH100", "v5e:2x4", "v5p-16", "2*v5e:2x2"]


def enumerate_all(space, *, one_by_one=True, apart=False):
    """Every candidate, in the best order of its mesh axes: (seconds, bytes).

    With a sharded optimizer and without it is one candidate, unless they are kept `apart`.
    """
    model, found = space.model, {}
    for inner in space.inner_meshes():
        place = model.place(inner)
        if isinstance(place, str):
            continue
        if space.allow_planned:
            columns = space.columns(place)
        else:
            # Every order, also those that differ in an axis of size 1.
            alone = space.cluster.nodes == 1 and space.cluster.torus is None
            placed = [()] if alone else orders(place)
            variants = tuple(Variant(order=o, optimizer_sharding=z) for o in placed for z in (False, True))
            each = model.batch // (place.batch_shards * place.expert)
            parts = [m for m in range(1, each + 1) if each % m == 0]
            numbers = (range(len(place.fsdp_sizes)), range(len(model.costs.remats)), parts, range(len(variants)))
            columns = Columns(*np.array(list(itertools.product(*numbers))).T, variants)
        for group in [columns.take(i) for i in range(len(columns))] if one_by_one else [columns]:
            if not len(group):
                continue
            saved = saved_bytes(model, place, group)
            total = model.costs.seconds(place, group, saved_bytes=saved).total
            memory = sum(memory_parts(model, place, group).values())
            for i in range(len(group)):
                variant = group.variants[group.variant[i]]
                if variant.optimizer_sharding and place.fsdp_sizes[group.fsdp[i]] == place.batch_shards:
                    continue  # nothing is left to split over data
                variant = dataclasses.replace(
                    variant, order=(), optimizer_sharding=apart and variant.optimizer_sharding
                )
                key = (inner, variant, group.fsdp[i], group.remat[i], group.microbatches[i])
                # Of those that are one plan by another name the fastest that fits.
                one = (bool(memory[i] > space.budget_bytes), float(total[i]), float(memory[i]))
                found[key] = min(found.get(key, (True, math.inf, 0)), one)
    return [(seconds, bytes_) for _, seconds, bytes_ in found.values()]


@pytest.mark.parametrize("block", range(3))
def test_search_equals_brute_force(block):
    check_against_brute_force(range(20 * block, 20 * block + 20))


@pytest.mark.parametrize("block", range(2))
def test_search_over_what_is_planned_equals_brute_force(block):
    check_against_brute_force(range(100 + 8 * block, 108 + 8 * block), allow_planned=True)


@pytest.mark.slow
def test_search_equals_brute_force_on_thousands():
    check_against_brute_force(range(60, 2500))
    check_against_brute_force(range(116, 180), allow_planned=True)


def check_against_brute_force(seeds, **options):
    solved = 0
    for seed in seeds:
        cluster = parse_cluster(CLUSTERS[seed % len(CLUSTERS)])
        space = Space(Synthetic(seed, cluster), cluster, **options)
        every = enumerate_all(space, one_by_one=seed % 10 == 0 and not options)
        fitting = sorted(seconds for seconds, bytes_ in every if bytes_ <= space.budget_bytes)
        result = solve(space, runners_up=3)
        if not fitting:
            assert result.plan is None
            assert result.advice
            continue
        solved += 1
        assert result.gap == 0
        found = [c.estimate.seconds_per_step for c in (result.best, *result.runners_up)]
        np.testing.assert_allclose(found, fitting[: len(found)], rtol=1e-9)
        assert len(found) == min(4, len(fitting))
        assert result.evaluated <= result.candidates
        assert options or result.candidates >= len(every)
        assert sum(result.best.estimate.seconds.values()) == pytest.approx(found[0])
        again = estimate_plan(space.model, result.plan)
        assert again.seconds_per_step == pytest.approx(found[0], rel=1e-12)
        assert again.memory == result.estimate.memory
    assert solved > len(seeds) // 2


@pytest.mark.parametrize("name", ["llama_scanned", "moe_one_hot"])
def test_search_of_a_traced_model_equals_brute_force(name):
    cluster = parse_cluster("8xA100")
    space = Space(model_of(name, cluster), cluster)
    every = enumerate_all(space, one_by_one=False)
    for share in (1.0, 3e-6, 5e-7):
        tight = dataclasses.replace(space, memory_share=share)
        fitting = sorted(s for s, b in every if b <= tight.budget_bytes)
        result = solve(tight, runners_up=0)
        assert (result.best is None) == (not fitting)
        if result.best:
            assert result.best.estimate.seconds_per_step == pytest.approx(fitting[0], rel=1e-9)
            assert result.gap == 0
    assert not fitting


@pytest.mark.parametrize("seed", range(60))
def test_bounds_never_exceed_what_is_below(seed):
    cluster = parse_cluster(CLUSTERS[seed % len(CLUSTERS)])
    check_bounds(Space(Synthetic(seed, cluster), cluster, allow_planned=seed % 6 == 0))


@pytest.mark.parametrize("name", ["llama_unrolled", "moe_ragged", "resnet", "t5"])
def test_bounds_hold_for_traced_models(name):
    cluster = parse_cluster("8xH100")
    check_bounds(Space(model_of(name, cluster), cluster))


def check_bounds(space):
    costs = space.model.costs
    floor = costs.floor(space.cluster.devices)
    for inner in space.inner_meshes():
        place = space.model.place(inner)
        if isinstance(place, str):
            continue
        columns = space.columns(place)
        saved = saved_bytes(space.model, place, columns)
        total, early = (costs.seconds(place, columns, saved_bytes=saved, exact=e).total for e in (True, False))
        assert (early <= total * (1 + 1e-12)).all()
        for remat in range(len(costs.remats)):
            least = total[columns.remat == remat].min()
            bound = costs.bound(place, remat, sharded=True)
            assert floor <= costs.bound(place, remat) * (1 + 1e-12)
            assert bound <= least * (1 + 1e-12)


# Metamorphic.


def best_seconds(seed, cluster, **options):
    efficiency = options.pop("efficiency", None)
    result = solve(Space(Synthetic(seed, cluster, efficiency), cluster, **options), runners_up=0)
    return result.estimate.seconds_per_step if result.estimate else math.inf


def faster(cluster: Cluster, **factors) -> Cluster:
    """A cluster with some rates multiplied, and times divided."""
    links, memory, flops = (factors.get(k, 1.0) for k in ("links", "memory", "flops"))
    latency = factors.get("latency", 1.0)
    a = cluster.accelerator
    accelerator = dataclasses.replace(
        a,
        memory_bytes_per_second=a.memory_bytes_per_second * memory,
        peak_flops_per_second=tuple((k, v * flops) for k, v in a.peak_flops_per_second),
        launch_seconds=a.launch_seconds / latency,
    )
    tiers = tuple(
        dataclasses.replace(
            t,
            bytes_per_second=t.bytes_per_second * links,
            reduce_bytes_per_second=t.reduce_bytes_per_second * links,
            latency_seconds=t.latency_seconds / latency,
            launch_seconds=t.launch_seconds / latency,
        )
        for t in cluster.tiers
    )
    torus = cluster.torus and dataclasses.replace(
        cluster.torus,
        bytes_per_second=cluster.torus.bytes_per_second * links,
        latency_seconds=cluster.torus.latency_seconds / latency,
    )
    return dataclasses.replace(cluster, accelerator=accelerator, tiers=tiers, torus=torus)


@pytest.mark.parametrize("what", ["links", "memory", "flops", "latency"])
def test_faster_machines_are_never_worse(what):
    for seed in range(24):
        cluster = parse_cluster(CLUSTERS[seed % len(CLUSTERS)])
        assert best_seconds(seed, faster(cluster, **{what: 2.0})) <= best_seconds(seed, cluster) * (1 + 1e-12)


def test_more_memory_is_never_worse():
    cluster = parse_cluster("8xH100")
    for seed in range(24):
        seconds = [best_seconds(seed, cluster, memory_share=share) for share in (0.01, 0.1, 0.4, 0.85)]
        assert seconds == sorted(seconds, reverse=True)


def test_more_devices_are_never_worse():
    clusters = [parse_cluster(name) for name in ("8xH100", "2x8xH100", "4x8xH100")]
    for seed in range(24):
        seconds = [best_seconds(seed, cluster, allow_idle=True) for cluster in clusters]
        assert seconds == sorted(seconds, reverse=True)


def test_slower_time_scales_the_cost():
    for seed in range(24):
        cluster = parse_cluster(CLUSTERS[seed % len(CLUSTERS)])
        slow = faster(cluster, links=0.25, memory=0.25, flops=0.25, latency=0.25)
        usual = Efficiency()
        launch = tuple((kind, 4 * seconds) for kind, seconds in usual.launch_seconds)
        scaled = best_seconds(seed, slow, efficiency=dataclasses.replace(usual, launch_seconds=launch))
        assert scaled == pytest.approx(4 * best_seconds(seed, cluster, efficiency=usual), rel=1e-9)


# The result.


def test_front_has_every_plan_that_nothing_beats():
    cluster = parse_cluster("8xH100")
    for seed in range(12):
        space = Space(Synthetic(seed, cluster), cluster)
        result = solve(space, pareto=True)
        points = [(s, b) for s, b in enumerate_all(space, one_by_one=False, apart=True) if b <= space.budget_bytes]
        expected = {(s, b) for s, b in points if not any((t <= s and c < b) or (t < s and c <= b) for t, c in points)}
        found = [(c.estimate.seconds_per_step, c.estimate.bytes_per_device) for c in result.pareto]
        assert found == sorted(found)
        np.testing.assert_allclose(found, sorted(expected), rtol=1e-6)


def test_time_limit_returns_a_plan_with_its_gap():
    cluster = parse_cluster("8xH100")
    space = Space(Synthetic(3, cluster), cluster)
    exact, hurried = solve(space), solve(space, time_limit_seconds=0)
    assert hurried.bound <= exact.estimate.seconds_per_step <= hurried.estimate.seconds_per_step
    assert 0 <= hurried.gap < 1
    assert hurried.gap >= 1 - exact.estimate.seconds_per_step / hurried.estimate.seconds_per_step - 1e-12


def test_nothing_fits_says_what_would():
    cluster = parse_cluster("8xA100")
    model = model_of("llama_scanned", cluster)
    result = solve(Space(model, cluster, memory_share=1e-7))
    assert result.plan is None
    assert "nothing fits" in result.advice
    assert "devices" in result.advice
    result = solve(Space(model, cluster, fix={"tensor": 8, "sequence": True}))
    assert result.plan is None
    assert "no length divides by tensor=8" in result.advice


@pytest.mark.parametrize("name", ["resnet", "moe_ragged", "t5", "vit_conv", "llama_nnx", "lstm", "unet"])
def test_any_model_is_planned_by_the_same_code(name):
    cluster = parse_cluster("8xA100")
    result = solve(Space(model_of(name, cluster), cluster), runners_up=1)
    assert result.gap == 0
    assert 0 < result.estimate.mfu < 1
    assert result.plan.mesh.size == 8
    assert type(result.plan).from_json(result.plan.to_json()) == result.plan


def test_one_device_has_no_communication():
    cluster = parse_cluster("1xA100")
    result = solve(Space(model_of("llama_scanned", cluster), cluster))
    assert str(result.plan.mesh) == "data=1"
    assert set(result.estimate.seconds) == {"compute", "optimizer"}
