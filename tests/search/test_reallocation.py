"""Bytes, loads and seconds of moves between plans: against counting element by element, and against bounds."""

import math
import time
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import PartitionSpec as P

from search.cluster import Cluster, Tier, parse_cluster
from search.reallocation import Leaf, ShardedTree, sharded_tree, transfer
from search.reallocation_balance import Holders, balance
from search.reallocation_links import Traffic
from sharding_rules import DATA, FSDP, TENSOR, MeshShape

CLUSTERS = [parse_cluster(name) for name in ("2x8xA100-80", "v5p:2x2x4", "4x4xH100", "tpu7x:2x2x2")]
SHAPES = [(8, 12), (24,), (16, 4, 6), (48, 8), ()]


@st.composite
def trees(draw, devices: int = 16):
    """A window and a tree on it, with the leaves of `SHAPES` cut at random."""
    sizes = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 1), (2, 2, 2), (1, 1, 8), (4, 2, 2), (3, 2, 1)])
    )
    mesh = MeshShape(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    large = [axis for axis in (DATA, FSDP, TENSOR) if mesh.sizes[axis] > 1]
    order = tuple(draw(st.permutations(large)))
    leaves = []
    for shape in SHAPES:
        spec: list[tuple[str, ...]] = [()] * len(shape)
        for axis in draw(st.permutations((DATA, FSDP, TENSOR))):
            if not shape or draw(st.booleans()):
                continue
            dim = draw(st.integers(0, len(shape) - 1))
            ways = math.prod(mesh.sizes[a] for a in (*spec[dim], axis))
            if shape[dim] % ways == 0:
                spec[dim] = (*spec[dim], axis)
        leaves.append(Leaf(shape, 2, tuple(spec)))
    return draw(st.integers(0, devices - mesh.size)), ShardedTree(tuple(leaves), mesh, order)


def cuts(first: int, tree: ShardedTree) -> dict[int, list[np.ndarray]]:
    """Device -> for each leaf, which elements it holds: by JAX's own rule for meshes laid out as `make_mesh` does."""
    sizes = tree.mesh.sizes
    placed = [*(axis for axis in sizes if sizes[axis] == 1), *tree.order]
    numbers = np.arange(tree.mesh.size).reshape([sizes[axis] for axis in placed])
    numbers = numbers.transpose([placed.index(axis) for axis in sizes])
    held: dict[int, list[np.ndarray]] = {}
    for at, number in np.ndenumerate(numbers):
        place = dict(zip(sizes, at, strict=True))
        masks = []
        for leaf in tree.leaves:
            mask = np.zeros(leaf.shape, bool)
            box = []
            for length, axes in zip(leaf.shape, leaf.spec, strict=True):
                index, ways = 0, 1
                for axis in axes:
                    index, ways = index * sizes[axis] + place[axis], ways * sizes[axis]
                box.append(slice(index * length // ways, (index + 1) * length // ways))
            mask[tuple(box)] = True
            masks.append(mask)
        held[first + int(number)] = masks
    return held


def lacking(source, target) -> dict[int, int]:
    """Device -> bytes it wants and does not hold, element by element."""
    old, new = cuts(*source), cuts(*target)
    return {
        device: sum(
            2 * int((want & ~(old[device][i] if device in old else False)).sum()) for i, want in enumerate(masks)
        )
        for device, masks in new.items()
    }


@hypothesis.settings(max_examples=60)
@hypothesis.given(source=trees(), target=trees(), cluster=st.sampled_from(CLUSTERS))
def test_bytes_moved_equal_the_lower_bound_of_random_pairs_of_plans(source, target, cluster):
    hypothesis.assume(max(first + tree.mesh.size for first, tree in (source, target)) <= cluster.devices)
    moved = transfer(source, target, cluster)
    wanted = lacking(source, target)
    assert moved.sent_bytes == pytest.approx(moved.lower_bound_bytes) == sum(wanted.values())
    for device, got in zip(moved.devices, moved.in_bytes, strict=True):
        assert got == pytest.approx(wanted.get(device, 0))
    assert moved.out_bytes.sum() == pytest.approx(moved.sent_bytes)
    assert moved.network_out_bytes.sum() == pytest.approx(moved.network_in_bytes.sum())
    assert (moved.network_in_bytes <= moved.in_bytes + 1e-6).all()
    assert moved.kept_bytes + moved.sent_bytes == pytest.approx(target[1].mesh.size * target[1].bytes_per_device)
    assert moved.gap >= -1e-9
    assert moved.seconds >= moved.bound_seconds * (1 - 1e-9)
    assert (moved.seconds > 0) == (moved.sent_bytes > 0)


@hypothesis.settings(max_examples=40)
@hypothesis.given(source=trees(), target=trees(), cluster=st.sampled_from(CLUSTERS))
def test_bytes_of_pairs_of_devices_add_up_to_bytes_of_devices(source, target, cluster):
    hypothesis.assume(max(first + tree.mesh.size for first, tree in (source, target)) <= cluster.devices)
    from search import reallocation

    (first_s, tree_s), (first_t, tree_t) = source, target
    numbers = np.union1d(first_s + np.arange(tree_s.mesh.size), first_t + np.arange(tree_t.mesh.size))
    traffic = Traffic(numbers, cluster)
    for (axes_s, axes_t), bytes_UV in reallocation._classes(tree_s, tree_t).items():
        group_N = reallocation._groups(tree_s, axes_s, first_s, numbers)
        traffic.add(axes_s, group_N, reallocation._groups(tree_t, axes_t, first_t, numbers), bytes_UV)
    traffic.settle()
    pairs_NN = traffic.pairs()
    np.testing.assert_allclose(pairs_NN.sum(0), traffic.in_N, atol=1e-6)
    np.testing.assert_allclose(pairs_NN.sum(1), traffic.out_N, atol=1e-6)
    assert np.diag(pairs_NN).max() == 0
    apart = traffic.node_N[:, None] != traffic.node_N[None]
    np.testing.assert_allclose((pairs_NN * apart).sum(0), traffic.network_in_N, atol=1e-6)
    np.testing.assert_allclose((pairs_NN * apart).sum(1), traffic.network_out_N, atol=1e-6)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    sets=st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6), min_size=1, max_size=3),
    demands=st.lists(st.integers(0, 50), min_size=12, max_size=12),
    base=st.lists(st.integers(0, 30), min_size=6, max_size=6),
)
def test_balanced_loads_are_those_of_the_linear_program(sets, demands, base):
    kinds = []
    for i, group in enumerate(sets):
        demand = np.asarray(demands[4 * i : 4 * i + 4], float) * np.isin(np.arange(4), group)
        kinds.append(Holders(np.asarray(group), demand))
    sent = balance(kinds, np.asarray(base, float))
    for kind, bytes_N in zip(kinds, sent, strict=True):
        for u in range(4):
            assert bytes_N[kind.group_N == u].sum() == pytest.approx(kind.demand_U[u])
        assert (bytes_N >= 0).all()
        assert bytes_N[kind.group_N < 0].sum() == 0

    # Variables: what each device sends of each kind, and the level.
    n = 6 * len(kinds)
    equal, right = [], []
    for i, kind in enumerate(kinds):
        for u in range(4):
            row = np.zeros(n + 1)
            row[6 * i : 6 * i + 6] = kind.group_N == u
            equal.append(row)
            right.append(kind.demand_U[u])
        row = np.zeros(n + 1)
        row[6 * i : 6 * i + 6] = kind.group_N < 0
        equal.append(row)
        right.append(0.0)
    below = np.zeros((6, n + 1))
    for device in range(6):
        below[device, device:n:6] = 1
    below[:, -1] = -1
    cost = np.zeros(n + 1)
    cost[-1] = 1
    best = scipy.optimize.linprog(cost, below, -np.asarray(base, float), np.asarray(equal), right)
    assert best.status == 0
    level = (np.asarray(base) + sum(sent)).max()
    assert level == pytest.approx(best.fun, rel=1e-2, abs=1e-6)


def plans(**sizes: int) -> ShardedTree:
    mesh = MeshShape(**sizes)
    return ShardedTree((Leaf((64, 32), 4, ((FSDP,), (TENSOR,))),), mesh)


NODE = parse_cluster("8xA100-80")
BYTES = 64 * 32 * 4


def test_known_moves_have_known_loads():
    same = transfer((0, plans(tensor=4)), (0, plans(tensor=4)), NODE)
    assert (same.sent_bytes, same.seconds, same.kept_bytes) == (0, 0, BYTES)
    # Replicas share the work, on other devices: 4 holders of halves, 8 quarters wanted... by 4 devices.
    spread = transfer((0, plans(data=2, tensor=2)), (4, plans(tensor=4)), NODE)
    np.testing.assert_allclose(spread.out_bytes, [BYTES / 4] * 4 + [0] * 4)
    np.testing.assert_allclose(spread.in_bytes, [0] * 4 + [BYTES / 4] * 4)
    # One holder, four who want all: sent once, handed on.
    fan = transfer((0, plans()), (1, plans(data=4)), NODE)
    np.testing.assert_allclose(fan.out_bytes, [BYTES] + [BYTES * 3 / 4] * 4)
    assert fan.gap == pytest.approx(0)
    # A gather in place keeps what is there.
    gather = transfer((0, plans(fsdp=4)), (0, plans(data=4)), NODE)
    np.testing.assert_allclose(gather.in_bytes, [BYTES * 3 / 4] * 4)
    assert gather.kept_bytes == BYTES


def test_a_box_enters_a_node_once():
    cluster = parse_cluster("2x8xA100-80")
    moved = transfer((0, plans(tensor=8)), (8, plans(data=8)), cluster)
    assert moved.network_in_bytes.sum() == BYTES
    assert moved.sent_bytes == 8 * BYTES
    np.testing.assert_allclose(moved.network_in_bytes[8:], BYTES / 8)
    np.testing.assert_allclose(moved.network_out_bytes[:8], BYTES / 8)
    here = transfer((0, plans(tensor=8)), (0, plans(data=8)), cluster)
    assert here.network_in_bytes.sum() == 0
    assert here.parts["links"] < moved.parts["links"]


def test_nodes_hand_on_where_fewer_hold():
    cluster = parse_cluster("8x4xH100")
    moved = transfer((0, plans(tensor=4)), (4, plans(data=7, tensor=4)), cluster)
    np.testing.assert_allclose(moved.network_out_bytes[:4], BYTES / 4)
    np.testing.assert_allclose(moved.network_out_bytes[4:], BYTES / 4 * 6 / 7)
    assert moved.gap == pytest.approx(0)


def test_seconds_follow_links():
    slow, fast = (Cluster("c", NODE.accelerator, (Tier("node", 8, rate),)) for rate in (1e9, 2e9))
    pair = (0, plans(fsdp=8)), (0, plans(data=8))
    a, b = transfer(*pair, slow), transfer(*pair, fast)
    assert a.parts["links"] == pytest.approx(2 * b.parts["links"]) == pytest.approx(BYTES * 7 / 8 / 1e9)
    mesh = Cluster("c", NODE.accelerator, (Tier("node", 8, 1e9, links="mesh"),))
    lone = (0, plans()), (1, plans())
    assert transfer(*lone, mesh).parts["links"] == pytest.approx(7 * transfer(*lone, slow).parts["links"])
    matrix = ((1.0, 1e6), (2e6, 1.0))
    tiers = (Tier("node", 4, 1e9), Tier("network", 8, 1e9))
    measured = Cluster("c", NODE.accelerator, tiers, node_bytes_per_second=matrix)
    assert transfer((0, plans(tensor=4)), (4, plans(tensor=4)), measured).parts["links"] == pytest.approx(BYTES / 1e6)
    assert transfer((4, plans(tensor=4)), (0, plans(tensor=4)), measured).parts["links"] == pytest.approx(BYTES / 2e6)
    chunked = transfer(*pair, slow, chunk_bytes=BYTES / 8)
    assert (chunked.chunks, a.chunks) == (7, 1)
    assert chunked.seconds > a.seconds


def test_a_torus_takes_the_shorter_way_round():
    ring = parse_cluster("v5p:4x4x4")
    rate = ring.torus.bytes_per_second
    one = (0, plans())
    near, wrapped, far = (transfer(one, (first, plans()), ring).parts["links"] for first in (1, 3, 2))
    assert near == wrapped == pytest.approx(BYTES / rate)
    assert far == pytest.approx(BYTES / 2 / rate)  # both ways round at once
    line = parse_cluster("v5p:2x2x1")
    assert transfer(one, (3, plans()), line).parts["links"] == pytest.approx(BYTES / line.torus.bytes_per_second)


def test_the_smaller_elements_travel():
    wide = ShardedTree((Leaf((64, 32), 4, ((FSDP,), ())),), MeshShape(fsdp=2))
    narrow = ShardedTree((Leaf((64, 32), 2, ((), ())),), MeshShape(data=2))
    assert transfer((0, wide), (0, narrow), NODE).sent_bytes == BYTES / 2
    assert transfer((0, narrow), (2, wide), NODE).sent_bytes == BYTES / 2


def test_trees_of_a_model_are_made_from_specs():
    leaf = lambda *shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    params = {"a": leaf(8, 4), "b": [leaf(6), leaf(4, dtype=np.int32)]}
    specs = {"a": P((FSDP, TENSOR), None), "b": [P(), P(TENSOR)]}
    tree = sharded_tree(params, specs, MeshShape(fsdp=2, tensor=4), order=(TENSOR, FSDP))
    assert [leaf.path for leaf in tree.leaves] == ["a", "b/0", "b/1"]
    assert tree.bytes_per_device == 32 * 4 // 8 + 24 + 4
    assert tree.nbytes == 128 + 24 + 16
    cast = sharded_tree(params, specs, MeshShape(fsdp=2, tensor=4), dtype="bfloat16")
    assert [leaf.itemsize for leaf in cast.leaves] == [2, 2, 4]
    with pytest.raises(ValueError, match="3 parameters, 1 specs"):
        sharded_tree(params, {"a": P()}, MeshShape())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardedTree((Leaf((6, 4), 4, ((FSDP,), ()), "w"),), MeshShape(fsdp=4)), "w of shape .* dimension 0"),
        (lambda: ShardedTree((Leaf((8, 4), 4, ((FSDP,), (FSDP,)), "w"),), MeshShape(fsdp=2)), "cuts it twice"),
        (lambda: ShardedTree((Leaf((8,), 4, (("rows",),), "w"),), MeshShape()), "no mesh axis 'rows'"),
        (lambda: ShardedTree((), MeshShape(fsdp=2), (TENSOR,)), "order="),
        (lambda: Leaf((8,), 4, ((), (FSDP,)), "w"), "2 dimensions"),
        (lambda: transfer((0, plans()), (8, plans()), NODE), "has 8 devices"),
        (lambda: transfer((0, plans()), (0, plans()), NODE, chunk_bytes=0), "chunks of 0"),
        (lambda: transfer((0, plans()), (0, ShardedTree((), MeshShape())), NODE), "1 leaves, the target 0"),
        (
            lambda: transfer((0, plans()), (0, ShardedTree((Leaf((3,), 4, ((),), "v"),), MeshShape())), NODE),
            "v has shape",
        ),
    ],
)
def test_bad_trees_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_hundred_leaves_on_64_devices_take_a_few_milliseconds():
    from search import reallocation

    def tree(**sizes):
        kinds = [
            ((4096, 4096), ((FSDP,), (TENSOR,))),
            ((4096, 11008), ((FSDP,), (TENSOR,))),
            ((11008, 4096), ((TENSOR,), (FSDP,))),
            ((4096,), ((),)),
            ((32000, 4096), ((TENSOR, FSDP), ())),
        ]
        return ShardedTree(tuple(Leaf(shape, 2, spec) for shape, spec in kinds * 20), MeshShape(**sizes))

    cluster = parse_cluster("8x8xA100-80")
    old, new = tree(fsdp=8, tensor=8), tree(data=4, tensor=8, fsdp=2)
    transfer((0, old), (0, new), cluster)
    seconds = []
    for _ in range(10):
        reallocation._transfer.cache_clear()
        reallocation._classes.cache_clear()
        begin = time.perf_counter()
        transfer((0, old), (0, new), cluster)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 5e-3, types.SimpleNamespace(seconds=seconds)
