"""Moves between random meshes of 8 CPU devices: values, shardings, bytes, donation, and what is refused."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pipelines import reshard_checksums, reshard_copies
from pipelines.reshard import Reshard, ReshardError, from_host, reshard, to_host
from pipelines.reshard_checksums import MODULUS, part_checksum
from pipelines.reshard_copies import Copy, host_copies
from pipelines.reshard_host import offload_bytes
from pipelines.reshard_pieces import LeafMove, boxes, cut, make_schedule
from pipelines.reshard_stores import DeviceStore
from search.cluster import parse_cluster
from search.reallocation import Leaf, ShardedTree, transfer
from sharding_rules import DATA, FSDP, TENSOR, MeshShape, make_mesh

SHAPES = {"w": (8, 12), "stack": [(4, 24, 8), (24,)], "scale": (), "empty": (0, 8)}
DTYPES = {"w": jnp.float32, "stack": [jnp.bfloat16, jnp.int8], "scale": jnp.float32, "empty": jnp.float32}
PATHS = ["empty", "scale", "stack/0", "stack/1", "w"]


@st.composite
def shardings(draw):
    """A mesh on some of the devices, in any order, and a sharding for each leaf of `SHAPES`."""
    sizes = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (1, 1, 4), (2, 2, 2), (1, 4, 2), (3, 2, 1)])
    )
    mesh_shape = MeshShape(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    devices = draw(st.permutations(jax.devices()))[: mesh_shape.size]
    mesh = make_mesh(mesh_shape, devices)

    def spec(shape):
        axes: list[list[str]] = [[] for _ in shape]
        for axis in draw(st.permutations((DATA, FSDP, TENSOR))):
            if shape and draw(st.booleans()):
                dim = draw(st.integers(0, len(shape) - 1))
                ways = mesh_shape.sizes[axis]
                for other in axes[dim]:
                    ways *= mesh_shape.sizes[other]
                if shape[dim] % ways == 0:
                    axes[dim].append(axis)
        return NamedSharding(mesh, P(*(tuple(a) or None for a in axes)))

    return jax.tree.map(spec, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def values():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape, dtype: rng.normal(size=shape, scale=50).astype(dtype),
        SHAPES,
        DTYPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def same(tree, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), wanted)


@hypothesis.settings(max_examples=15)
@hypothesis.given(old=shardings(), new=shardings(), donate=st.booleans(), verify=st.booleans())
def test_values_arrive_in_the_shardings_asked_for(old, new, donate, verify):
    wanted = values()
    tree = jax.device_put(wanted, old)
    moved = reshard(tree, new, donate=donate, verify=verify)
    same(moved, wanted)
    assert jax.tree.map(lambda x: x.sharding, moved) == new
    # Every shard on every device, not only the first replica.
    for leaf, value in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])
    if not donate:
        same(tree, wanted)


@hypothesis.settings(max_examples=3)
@hypothesis.given(old=shardings(), new=shardings(), budget=st.sampled_from([64, 1024, 2**28]))
def test_pieces_in_device_memory_arrive_too(old, new, budget):
    wanted = values()
    moved = reshard(jax.device_put(wanted, old), new, method="device", budget_bytes=budget, verify=False)
    same(moved, wanted)
    assert jax.tree.map(lambda x: x.sharding, moved) == new


@hypothesis.settings(max_examples=60)
@hypothesis.given(old=shardings(), new=shardings())
def test_bytes_predicted_are_those_that_devices_lack(old, new):
    move = Reshard(values(), old, new)
    lacking = dict.fromkeys((d.id for d in jax.devices()), 0)
    kept = 0
    flat = zip(jax.tree.leaves(values()), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    for value, a, b in flat:
        have = a.devices_indices_map(value.shape)
        for device, index in b.devices_indices_map(value.shape).items():
            wants, holds = np.zeros(value.shape, bool), np.zeros(value.shape, bool)
            wants[index] = True
            if device in have:
                holds[have[device]] = True
            lacking[device.id] += int((wants & ~holds).sum()) * value.itemsize
            kept += int((wants & holds).sum()) * value.itemsize
    predicted = move.predicted
    assert {d: predicted.in_bytes.get(d, 0) for d in lacking} == lacking
    assert predicted.sent_bytes == predicted.lower_bound_bytes == sum(lacking.values())
    assert predicted.kept_bytes == kept
    assert sum(predicted.out_bytes.values()) == predicted.sent_bytes
    assert predicted.crossing_bytes == 0
    assert predicted.seconds >= predicted.bound_seconds
    # Only holders send, or those that a piece has reached.
    for piece in move.schedule.pieces:
        holders = set(boxes(move.schedule.moves[piece.leaf].source, move.schedule.moves[piece.leaf].shape))
        for route in piece.routes:
            assert route.sender in holders
            assert not set(route.receivers) & set(piece.kept)


def test_the_schedule_of_pieces_sends_what_the_search_costs():
    devices = jax.devices()
    shape = (64, 64)
    leaves = 12
    cases = [
        (MeshShape(fsdp=2, tensor=2), P(FSDP, TENSOR), 0, MeshShape(tensor=4), P(None, TENSOR), 4),
        (MeshShape(data=2, tensor=2), P(None, TENSOR), 0, MeshShape(tensor=4), P(TENSOR), 4),
        (MeshShape(fsdp=8), P(FSDP), 0, MeshShape(data=8), P(), 0),
        (MeshShape(data=4), P(), 0, MeshShape(fsdp=8), P(FSDP), 0),
        (MeshShape(), P(), 0, MeshShape(data=4), P(), 1),
    ]
    for mesh_a, spec_a, first_a, mesh_b, spec_b, first_b in cases:
        old = NamedSharding(make_mesh(mesh_a, devices[first_a : first_a + mesh_a.size]), spec_a)
        new = NamedSharding(make_mesh(mesh_b, devices[first_b : first_b + mesh_b.size]), spec_b)
        schedule = make_schedule(LeafMove(str(i), shape, np.dtype("float32"), old, new) for i in range(leaves))
        trees = [
            (first, ShardedTree((Leaf(shape, 4, spec),) * leaves, mesh))
            for first, spec, mesh in ((first_a, spec_a, mesh_a), (first_b, spec_b, mesh_b))
        ]
        costed = transfer(trees[0], trees[1], parse_cluster("8xA100-80"))
        assert schedule.sent_bytes == costed.sent_bytes
        # Whole pieces instead of fractions: the fullest sender has at most one piece of each leaf more than its share.
        assert max(schedule.out_bytes.values(), default=0) <= costed.out_bytes.max() * 1.1 + 1


def test_other_devices_replicas_and_single_devices():
    devices = jax.devices()
    x = jax.device_put(np.arange(24.0, dtype=np.float32).reshape(6, 4), SingleDeviceSharding(devices[3]))
    spread = reshard({"x": x}, NamedSharding(make_mesh(MeshShape(fsdp=2), devices[5:7]), P(FSDP)))["x"]
    back = reshard({"x": spread}, SingleDeviceSharding(devices[0]))["x"]
    np.testing.assert_array_equal(back, np.arange(24.0, dtype=np.float32).reshape(6, 4))
    assert back.devices() == {devices[0]}


def test_compiled_moves_on_the_same_devices():
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    old = NamedSharding(mesh, P(FSDP, TENSOR))
    tree = {"a": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones((16, 8), jnp.bfloat16)}
    new = {"a": NamedSharding(mesh, P(TENSOR)), "b": old}
    given = jax.device_put(tree, old)
    moved = reshard(given, new, method="compiled", budget_bytes=128, donate=True)
    same(moved, jax.device_get(tree))
    assert jax.tree.map(lambda x: x.sharding, moved) == new
    assert given["a"].is_deleted()


def test_donated_arrays_are_freed_and_what_stays_is_shared():
    devices = jax.devices()
    old = NamedSharding(make_mesh(MeshShape(data=2), devices[:2]), P())
    new = NamedSharding(make_mesh(MeshShape(data=2), devices[1:3]), P())
    x = jax.jit(lambda: jnp.arange(64.0), out_shardings=old)()
    stays = x.addressable_shards[1].data.unsafe_buffer_pointer()
    first, second = (shard.data for shard in x.addressable_shards)
    y = reshard([x], new, donate=True)[0]
    assert first.is_deleted()
    assert not second.is_deleted()
    assert {s.device: s.data.unsafe_buffer_pointer() for s in y.addressable_shards}[devices[1]] == stays
    np.testing.assert_array_equal(y, np.arange(64.0))
    with pytest.raises(ValueError, match="0 has been deleted"):
        reshard([x], new)
    z = reshard([y], SingleDeviceSharding(devices[7]), donate=True)[0]
    assert y.is_deleted()
    np.testing.assert_array_equal(z, np.arange(64.0))


def test_small_leaves_lie_in_one_buffer_and_larger_ones_shard_by_shard(monkeypatch):
    devices = jax.devices()
    rows = NamedSharding(make_mesh(MeshShape(fsdp=4), devices[:4]), P(FSDP))
    grid = NamedSharding(make_mesh(MeshShape(fsdp=2, tensor=2), devices[:4]), P(FSDP, TENSOR))
    x = np.arange(16 * 64, dtype=np.float32).reshape(16, 64)

    def made(old, new, **options):
        schedule = make_schedule([LeafMove("x", x.shape, x.dtype, old, new)])
        return host_copies(schedule, **options)[0]

    together = made(rows, grid)
    assert together.buffers == (x.nbytes,)
    assert sorted(offset for _, offset in together.places.values()) == [0, 1024, 2048, 3072]
    assert [copy.source for copy in together.copies] == devices[:4]  # to two new shards each
    assert all(copy.shape[:2] == (2, 4) for copy in together.copies)
    # A shard that stays would keep its neighbours' memory: it is copied, unless all stay.
    fewer = NamedSharding(make_mesh(MeshShape(fsdp=4), [devices[i] for i in (0, 1, 6, 7)]), P(FSDP))
    assert not made(rows, fewer).stays
    assert made(rows, rows).stays == set(devices[:4])
    assert not made(rows, rows).copies
    assert len(made(rows, rows, share=False).copies) == 4
    monkeypatch.setattr(reshard_copies, "BLOCK_BYTES", 1024)
    apart = made(rows, grid)
    assert apart.buffers == (1024,) * 4
    assert len(apart.copies) == 8
    assert made(rows, fewer).stays == {devices[0], devices[1]}
    for old, new in ((rows, grid), (rows, fewer)):
        arrays = [jax.device_put(x, old)]
        moved = reshard(arrays, new, donate=True)[0]
        np.testing.assert_array_equal(moved, x)
        assert moved.sharding == new


@hypothesis.given(rows=st.integers(1, 40), row=st.integers(1, 5000))
def test_copies_of_few_rows_are_cut_into_more_of_the_same_bytes(rows, row):
    rng = np.random.default_rng(row)
    old = rng.integers(0, 255, rows * (row + 3), dtype=np.uint8)
    whole = Copy(None, 0, (rows,), np.dtype((np.void, row)), 2, (row + 3,), 1, (row + 1,))
    cut_up = reshard_copies._in_short_rows(whole)
    assert cut_up.row.itemsize * math.prod(cut_up.shape) == rows * row
    made = [np.zeros(1 + rows * (row + 1), np.uint8) for _ in range(2)]
    for copy, new in zip((whole, cut_up), made, strict=True):
        copy.carry_out(np.concatenate([np.zeros(2, np.uint8), old]), new)
    np.testing.assert_array_equal(*made)


def test_a_move_can_be_repeated():
    devices = jax.devices()
    there = NamedSharding(make_mesh(MeshShape(fsdp=4), devices[:4]), P(FSDP))
    here = NamedSharding(make_mesh(MeshShape(tensor=2), devices[6:]), P(None, TENSOR))
    move = Reshard({"x": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, there, here)
    for i in range(3):
        x = jax.device_put(np.full((8, 4), i, np.float32), there)
        np.testing.assert_array_equal(move.run({"x": x})["x"], np.full((8, 4), i))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "float8_e4m3fn", "complex64", "int4"])
def test_checksums_of_parts_add_up_and_see_changes(dtype):
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 2, size=(6, 8))
    values = jnp.asarray(numbers).astype(dtype)
    whole = ((0, 6), (0, 8))
    total = int(part_checksum(values, whole, whole, (6, 8)))
    parts = [((0, 2), (0, 8)), ((2, 6), (0, 3)), ((2, 6), (3, 8))]
    assert sum(int(part_checksum(values, whole, part, (6, 8))) for part in parts) % MODULUS == total
    # A shard that starts elsewhere has the numbers of the whole array.
    assert int(part_checksum(values[2:, 3:], parts[2], parts[2], (6, 8))) == int(
        part_checksum(values, whole, parts[2], (6, 8))
    )
    numbers[3, 4] = 1 - numbers[3, 4]
    changed = jnp.asarray(numbers).astype(dtype)
    assert int(part_checksum(changed, whole, whole, (6, 8))) != total
    swapped = values[::-1]
    assert int(part_checksum(swapped, whole, whole, (6, 8))) != total


def test_checksums_go_block_by_block(monkeypatch):
    rng = np.random.default_rng(2)
    shape = (3, 5, 7, 2)
    values = jnp.asarray(rng.normal(size=shape), jnp.float32)
    whole = tuple((0, n) for n in shape)
    part = ((1, 3), (0, 5), (2, 7), (0, 2))
    cases = [(values, whole, whole, shape), (values, whole, part, shape)]
    wanted = [int(part_checksum(*case)) for case in cases]
    for block in (1, 9, 30):
        monkeypatch.setattr(reshard_checksums, "BLOCK_ELEMENTS", block)
        reshard_checksums._checksum.clear_cache()
        assert [int(part_checksum(*case)) for case in cases] == wanted
    reshard_checksums._checksum.clear_cache()
    x = reshard_checksums._bits(jnp.ones((1024, 2048), jnp.bfloat16))
    index = [jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.int32, jnp.uint32, jnp.uint32)]
    monkeypatch.undo()
    compiled = reshard_checksums._checksum.lower(x, *index, (1024, 2048)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2e6


@pytest.mark.parametrize("method", ["host", "device"])
def test_wrong_bytes_on_arrival_are_an_error(monkeypatch, method):
    devices = jax.devices()
    old = NamedSharding(make_mesh(MeshShape(fsdp=2), devices[:2]), P(FSDP))
    tree = {"layers": [jax.device_put(np.arange(8.0, dtype=np.float32), old)]}
    target = SingleDeviceSharding(devices[3])
    write, carry_out = DeviceStore.write, Copy.carry_out

    def wrong_write(self, leaf, targets, box, values):
        write(self, leaf, targets, box, np.asarray(values) + (box[0][0] == 4))

    def wrong_copy(self, old, new):
        carry_out(self, old, new)
        if self.write_at == 16:
            new.view(np.float32)[4] += 1

    monkeypatch.setattr(DeviceStore, "write", wrong_write)
    monkeypatch.setattr(Copy, "carry_out", wrong_copy)
    with pytest.raises(ReshardError, match=r"layers/0 arrived on .* with other values"):
        reshard(tree, target, method=method)
    moved = reshard(tree, target, method=method, verify=False)
    assert moved["layers"][0][4] == 5.0


def test_foreign_trees_are_refused_before_anything_moves():
    devices = jax.devices()
    old = NamedSharding(make_mesh(MeshShape(fsdp=4), devices[:4]), P(FSDP))
    new = SingleDeviceSharding(devices[5])
    tree = {
        "a": {"w": jax.device_put(np.ones((8, 4), np.float32), old)},
        "b": jax.device_put(np.ones(4, np.float32), old),
    }
    move = Reshard(tree, old, new, donate=True)
    wide = {**tree, "b": jax.device_put(np.ones(8, np.float32), old)}
    half = {**tree, "b": tree["b"].astype(jnp.bfloat16)}
    elsewhere = {**tree, "b": jax.device_put(tree["b"], devices[0])}
    for bad, message in [
        ({"a": tree["a"]}, "2 leaves|missing: b"),
        ({**tree, "c": tree["b"]}, "unknown: c"),
        (wide, r"b is float32\[8\]; declared: float32\[4\]"),
        (half, r"b is bfloat16\[4\]; declared: float32"),
        (elsewhere, "b lies as"),
        ({**tree, "b": np.ones(4, np.float32)}, "b is a ndarray, not a jax.Array"),
    ]:
        with pytest.raises(ValueError, match=message):
            move.run(bad)
    assert not tree["a"]["w"].is_deleted()
    with pytest.raises(ValueError, match="another structure"):
        reshard(tree, {"a": new, "b": new})
    with pytest.raises(ValueError, match="b: the target sharding is a str"):
        reshard(tree, {"a": {"w": new}, "b": "data"})
    mesh = make_mesh(MeshShape(tensor=8))
    with pytest.raises(ValueError, match="b: the target sharding does not fit shape"):
        reshard(tree, NamedSharding(mesh, P(TENSOR)))
    with pytest.raises(ValueError, match="budget_bytes=0"):
        reshard(tree, new, budget_bytes=0)
    with pytest.raises(ValueError, match="method='fast'"):
        reshard(tree, new, method="fast")
    with pytest.raises(ValueError, match="a is a ndarray without a sharding"):
        reshard({"a": np.ones(3)}, new)
    with pytest.raises(ValueError, match="key_data"):
        reshard({"key": jax.random.key(0)}, new)


@hypothesis.given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=3),
    limit=st.integers(1, 200),
    itemsize=st.sampled_from([1, 4]),
)
def test_parts_of_a_box_are_its_bytes_in_order(shape, limit, itemsize):
    number = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = cut(tuple((0, n) for n in shape), itemsize, limit)
    pieces = [number[tuple(slice(*interval) for interval in part)] for part in parts]
    np.testing.assert_array_equal(np.concatenate([p.reshape(-1) for p in pieces]), number.reshape(-1))
    assert all(p.size * itemsize <= max(limit, itemsize) for p in pieces)


@hypothesis.settings(max_examples=6)
@hypothesis.given(old=shardings(), new=shardings(), donate=st.booleans())
def test_host_trees_come_back_as_they_lay_or_otherwise(old, new, donate):
    wanted = values()
    tree = jax.device_put(wanted, old)
    host = to_host(tree, donate=donate)
    assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(tree))
    assert host.nbytes == sum(value.nbytes for value in jax.tree.leaves(wanted))
    back = from_host(host)
    same(back, wanted)
    assert jax.tree.map(lambda x: x.sharding, back) == old
    other = from_host(host, new, verify=True, donate=True)
    same(other, wanted)
    assert jax.tree.map(lambda x: x.sharding, other) == new
    same(back, wanted)  # nothing is shared with the memory that was given back
    assert host.nbytes == 0
    with pytest.raises(ValueError, match="given back"):
        from_host(host)


def test_host_trees_refuse_what_is_no_array_and_say_their_bytes():
    sharding = NamedSharding(make_mesh(MeshShape(fsdp=4), jax.devices()[:4]), P(FSDP))
    tree = {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32), "b": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    assert offload_bytes(tree, sharding) == 8 * 4 + 2
    with pytest.raises(ValueError, match="a is a ndarray"):
        to_host({"a": np.ones(3)})
