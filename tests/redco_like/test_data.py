"""Batches: deterministic, resumable, the same for any number of processes; bad input refused before the first step."""

import collections
import itertools
import threading

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from redco_like.data import DataLoader, process_rows, sequential, sharded
from sharding_rules import BATCH_AXES, MeshShape, make_mesh


def examples_of(size):
    return [{"x": np.full(3, i, np.float32), "i": i} for i in range(size)]


def collate(examples):
    return {"x": np.stack([e["x"] for e in examples]), "i": np.asarray([e["i"] for e in examples])}


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def ids(batches):
    return [batch["i"].tolist() for batch in batches]


def test_epochs_are_different_permutations_and_leave_out_the_stated_rest():
    loader = DataLoader(examples_of(23), collate, 5, seed=1)
    assert loader.describe() == "23 examples, 4 steps of 5 per epoch, the last 3 of each epoch's shuffle are left out"
    assert (loader.steps_per_epoch, loader.dropped_per_epoch) == (4, 3)
    first, second = (joined(ids(loader.iterate(start, start + 4))) for start in (0, 4))
    for epoch in (first, second):
        assert len(set(epoch)) == 20
    assert first != second
    assert first != joined(ids(DataLoader(examples_of(23), collate, 5, seed=2).iterate(0, 4)))


def test_starting_in_the_middle_of_an_epoch_continues_the_same_batches():
    def loader():
        return DataLoader(examples_of(23), collate, 5, seed=1)

    whole = ids(loader().iterate(0, 14))
    for start in (1, 3, 4, 9):
        assert ids(loader().iterate(start, 14)) == whole[start:]
    assert ids(loader().iterate(5, 5)) == []


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(count):
    alone = ids(DataLoader(examples_of(50), collate, 8, seed=1).iterate(2, 13))
    parts = [
        ids(DataLoader(examples_of(50), collate, 8, seed=1, process_index=i, process_count=count).iterate(2, 13))
        for i in range(count)
    ]
    assert [joined(pieces) for pieces in zip(*parts, strict=True)] == alone


def test_abstract_batch_is_global_and_has_the_dtypes_of_jax():
    loader = DataLoader(examples_of(50), collate, 8, process_index=1, process_count=2)
    abstract = loader.abstract_batch()
    assert abstract["x"] == jax.ShapeDtypeStruct((8, 3), np.float32)
    assert abstract["i"] == jax.ShapeDtypeStruct((8,), np.int32)
    assert next(loader.iterate())["i"].dtype == np.int32


def test_kept_last_batch_is_smaller_and_stated():
    loader = DataLoader(examples_of(23), collate, 5, last_batch="keep", shuffle=False)
    assert loader.describe() == "23 examples, 5 steps of 5 per epoch, the last one of 3"
    batches = ids(loader.iterate(0, 10))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] * 2
    assert joined(batches[:5]) == list(range(23))


@pytest.mark.parametrize(
    "examples",
    [
        np.arange(12),
        list(range(12)),
        tuple(range(12)),
        grain.MapDataset.range(12),
        grain.MapDataset.range(24)[::2].map(lambda x: x // 2),
    ],
)
def test_any_sequence_is_read(examples):
    loader = DataLoader(examples, np.asarray, 4, shuffle=False)
    assert [batch.tolist() for batch in loader.iterate(0, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_many_examples_are_read_at_once_where_the_dataset_can():
    class Rows(collections.UserList):
        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, indices):
            return [self.data[i] for i in indices]

    assert next(DataLoader(Rows(range(12)), np.asarray, 4, shuffle=False).iterate()).tolist() == [0, 1, 2, 3]


def test_order_of_a_huge_data_set_takes_no_memory(monkeypatch):
    monkeypatch.setattr("redco_like.data._PERMUTATION_LIMIT", 10)
    loader = DataLoader(np.arange(23), np.asarray, 5, seed=1)
    epochs = [joined(b.tolist() for b in loader.iterate(s, s + 4)) for s in (0, 4)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [b.tolist() for b in loader.iterate(5, 8)] == [b.tolist() for b in loader.iterate(0, 8)][5:]


@pytest.mark.parametrize("size, batch, count", [(23, 5, 1), (24, 8, 2), (21, 8, 2), (3, 8, 1)])
def test_sequential_gives_every_example_once_in_order(size, batch, count):
    parts = [list(sequential(examples_of(size), collate, batch, i, count)) for i in range(count)]
    seen = []
    for pieces in zip(*parts, strict=True):
        assert len({piece.count for piece in pieces}) == 1
        rows = pieces[0].batch["i"].tolist() if pieces[0].whole else joined(ids(p.batch for p in pieces))
        assert len(rows) == pieces[0].count
        seen += rows
    assert seen == list(range(size))


def test_sequential_unpacks_and_places():
    (batch, count), *_ = sequential(examples_of(5), collate, 4)
    assert (batch["i"].tolist(), count) == ([0, 1, 2, 3], 4)
    placed = sequential(examples_of(5), collate, 4, place=lambda piece: (piece.batch["i"].sum(), piece.count))
    assert list(placed) == [(6, 4), (4, 1)]


@pytest.mark.parametrize(
    "shape", [MeshShape(data=8), MeshShape(fsdp=4, tensor=2), MeshShape(tensor=8), MeshShape(data=2, fsdp=2, tensor=2)]
)
def test_placed_batches_hold_the_host_values(shape):
    mesh = make_mesh(shape)
    rows = NamedSharding(mesh, P(BATCH_AXES))
    assert process_rows(rows) == (0, 1)
    batch = collate(examples_of(16))
    for target in (rows, {"x": NamedSharding(mesh, P(BATCH_AXES, None)), "i": rows}):
        placed = sharded(batch, target)
        assert placed["x"].sharding.is_equivalent_to(rows, 2)
        np.testing.assert_array_equal(placed["x"], batch["x"])
        np.testing.assert_array_equal(placed["i"], batch["i"])


def test_placing_happens_in_the_background_thread():
    names = set()
    loader = DataLoader(examples_of(20), collate, 4)
    list(loader.iterate(0, 5, place=lambda batch: names.add(threading.current_thread().name)))
    assert threading.main_thread().name not in names


def test_state_tells_what_changed():
    loader = DataLoader(examples_of(23), collate, 5, seed=1)
    state = loader.state(9)
    assert (state["step"], state["epoch"]) == (9, 2)
    assert loader.differences(state) == []
    other = DataLoader(examples_of(24), collate, 6, seed=1)
    assert other.differences(state) == ["examples was 23, is 24", "global_batch was 5, is 6"]


def ragged(examples):
    return {"ids": np.asarray([e["ids"] for e in examples])}


RAGGED = [{"ids": [1] * (3 + (i == 6))} for i in range(8)]


@pytest.mark.parametrize(
    ("examples", "function", "options", "message"),
    [
        ([], collate, {}, r"examples is empty"),
        (examples_of(3), collate, {}, r"3 examples are fewer than one global batch of 4; use global_batch=3"),
        ({"x": 1, "y": 2}, collate, {}, r"mapping with keys \['x', 'y'\]"),
        ((x for x in range(9)), collate, {}, r"generator without a length"),
        (examples_of(8), collate, {"process_count": 3}, r"global_batch=4 cannot be shared out among 3 processes"),
        (examples_of(7), collate, {"last_batch": "keep", "process_count": 2}, r"last batch of an epoch has 3 examples"),
        (examples_of(8), collate, {"last_batch": "pad"}, r"write 'drop' or 'keep'"),
        (RAGGED, ragged, {}, r"cannot stack its examples: example 4 has 'ids' .*\(3,\), example 6 'ids' .*\(4,\)"),
        (
            RAGGED[4:] * 2,
            lambda e: {"ids": np.asarray([x["ids"] for x in e], dtype=object)},
            {},
            r"dtype object .* example 2 'ids' of shape \(4,\); pad or cut .*leaf 'ids'",
        ),
        (examples_of(8), lambda e: {"a": {"i": [x["i"] for x in e]}}, {}, r"a int and not an array.*asarray.*'a/i/0'"),
        (examples_of(8), lambda e: {"t": np.asarray(["a"] * len(e))}, {}, r"dtype <U1 .*numbers only.*'t'"),
        (examples_of(8), lambda e: {"x": np.zeros((4, 2)), "y": np.zeros(3)}, {}, r"shape \(3,\) .*'y'"),
        (examples_of(8), lambda e: {"x": np.float32(0)}, {}, r"not an array.*'x'"),
        (examples_of(8), lambda e: {}, {}, r"returned no array"),
        (
            [{"ids": [1] * (3 + (i > 3))} for i in range(8)],
            ragged,
            {},
            r"changed its mind at step 1: batch leaf 'ids' is .*\[4, 4\], and was .*\[4, 3\]",
        ),
    ],
)
def test_bad_input_is_refused_before_the_first_step(examples, function, options, message):
    with pytest.raises(ValueError, match=message):
        DataLoader(examples, function, 4, shuffle=False, **options)


def test_buffer_that_collate_uses_again_is_refused():
    buffer = np.zeros((4, 3), np.float32)

    def into_buffer(examples):
        np.stack([e["x"] for e in examples], out=buffer)
        return {"x": buffer}

    with pytest.raises(ValueError, match="wrote its second batch over its first one"):
        DataLoader(examples_of(8), into_buffer, 4)


def test_error_of_the_users_function_says_which_examples_it_was_given():
    def fails(examples):
        raise KeyError("missing")

    with pytest.raises(KeyError) as caught:
        DataLoader(examples_of(8), fails, 4, shuffle=False)
    assert caught.value.__notes__ == ["collate_fn was given examples 0, 1, 2, 3"]


def test_late_error_arrives_at_its_step_and_is_not_lost():
    late = [{"ids": [1] * (3 + (i >= 12))} for i in range(16)]
    batches = DataLoader(late, ragged, 4, shuffle=False).iterate()
    for _ in range(3):
        assert next(batches)["ids"].shape == (4, 3)
    with pytest.raises(ValueError, match="changed its mind at step 3"):
        next(batches)


def test_sequential_refuses_at_the_call():
    with pytest.raises(ValueError, match="examples is empty"):
        sequential([], collate, 4)
