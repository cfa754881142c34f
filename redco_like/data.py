"""Examples in, batches out: deterministic, resumable at any step, read ahead in the background (on grain).

    loader = DataLoader(examples, collate_fn, 64, seed=0)
    for batch in loader.iterate(start_step=120, place=lambda batch: sharded(batch, shardings)):
        state, metrics = step(state, batch)

The order depends on the seed, the epoch and the number of examples alone: any number of processes sees the same global
batches, and a run that starts at step 120 sees what an uninterrupted run sees there. The grain element is a whole batch
and not an example, because grain's cost per element (tens of microseconds) would otherwise be paid per example.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sharding_rules import path_str, tree_paths

CollateFn = Callable[[list[Any]], Any]
LastBatch = Literal["drop", "keep"]

_PERMUTATION_LIMIT = 2**26
"""Up to here an epoch's order is a numpy permutation (256 MiB); beyond, grain's index shuffle, which needs none."""
_ENDLESS = 2**62
_GROUP = 8
"""Small batches are handed over from the background thread this many at a time: a hand-over costs about 0.1 ms."""
_SMALL_BYTES, _SMALL_SECONDS = 2**18, 1e-3


class DataLoader:
    """Batches of a sequence of examples for training.

    Args:
        examples: anything with `len()` and `[int]`: a list, a numpy array, a Hugging Face dataset, a grain MapDataset.
        collate_fn: list of examples -> tree of numpy arrays whose leading dimension is the number of examples. It must
            return new arrays each time: batches are read ahead.
        global_batch: examples per step over all processes.
        seed: seed of the shuffles; each epoch has its own.
        shuffle: False keeps the order of `examples`.
        last_batch: what becomes of the examples that do not fill a batch at the end of an epoch: left out (other ones
            each epoch, when shuffled), or kept as a smaller batch.
        process_index: which slice of every global batch this loader reads (see `process_rows`).
        process_count: number of slices.
        prefetch: batches read ahead (small ones that take no time are read ahead in groups of 8).

    Raises:
        ValueError: no examples, fewer than one batch, a batch that the processes cannot share out equally, or a
            `collate_fn` whose first batches do not have one shape.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate_fn: CollateFn,
        global_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        last_batch: LastBatch = "drop",
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        size = _check_examples(examples)
        _check_slices(global_batch, process_index, process_count)
        if last_batch not in ("drop", "keep"):
            raise ValueError(f"last_batch={last_batch!r}; write 'drop' or 'keep'")
        if prefetch < 1:
            raise ValueError(f"prefetch={prefetch}; at least 1 batch is read ahead")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}; a whole number from 0 to 2**32 - 1")
        full, rest = divmod(size, global_batch)
        if last_batch == "drop" and not full:
            raise ValueError(
                f"{size} examples are fewer than one global batch of {global_batch}; use global_batch={size} or less, "
                "or last_batch='keep'"
            )
        if last_batch == "keep" and rest % process_count:
            raise ValueError(
                f"the last batch of an epoch has {rest} examples, which {process_count} processes cannot share out "
                "equally; use last_batch='drop'"
            )
        self._examples, self._collate_fn, self._prefetch = examples, collate_fn, prefetch
        self._process_index, self._process_count = process_index, process_count
        self.global_batch = global_batch
        self.last_batch: LastBatch = last_batch
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = full + (last_batch == "keep" and rest > 0)
        self.dropped_per_epoch = rest if last_batch == "drop" else 0
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_epoch_order, size, seed)) if shuffle else None
        self._probe()

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def describe(self) -> str:
        """Say in one line how many steps an epoch has and what is left out."""
        line = f"{len(self)} examples, {self.steps_per_epoch} steps of {self.global_batch} per epoch"
        rest = len(self) % self.global_batch
        if not rest:
            return line
        if self.last_batch == "keep":
            return f"{line}, the last one of {rest}"
        return f"{line}, the last {rest} of each epoch{chr(39)}s {'shuffle' if self.shuffle else 'order'} are left out"

    def abstract_batch(self) -> Any:
        """Tree of `ShapeDtypeStruct` of a full global batch, with the dtypes that JAX gives the arrays."""
        count = self._process_count
        leaves = [jax.ShapeDtypeStruct((shape[0] * count, *shape[1:]), dtype) for shape, dtype in self._forms]
        return self._structure.unflatten(leaves)

    def indices(self, step: int) -> np.ndarray:
        """Which examples make up the global batch of a step, counted from the first step of the first epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        stop = min(start + self.global_batch, len(self))
        if self._order is None:
            return np.arange(start, stop)
        return self._order(epoch, start, stop) if len(self) > _PERMUTATION_LIMIT else self._order(epoch)[start:stop]

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None, *, place: Callable[[Any], Any] | None = None
    ) -> Iterator[Any]:
        """Yield this process's rows of each global batch from a step on, across epochs.

        Args:
            start_step: first step, counted over all epochs.
            stop_step: step before which to stop; default never.
            place: applied to each batch in the background thread, such as `lambda batch: sharded(batch, shardings)`.

        Raises:
            ValueError: while iterating, a batch whose shapes or dtypes are not those of the first one.
        """
        stop = _ENDLESS if stop_step is None else stop_step
        return _read_ahead(self._batch, start_step, stop, self._prefetch, place, self._group)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint at `step` must remember to go on with the same batches (plain JSON data)."""
        return {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "examples": len(self),
            "global_batch": self.global_batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "last_batch": self.last_batch,
        }

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """Say what differs between this loader and the one that wrote `state`; empty if the batches go on unchanged."""
        mine = self.state(0)
        fields = ("examples", "global_batch", "seed", "shuffle", "last_batch")
        changed = [name for name in fields if name in state and state[name] != mine[name]]
        return [f"{name} was {state[name]!r}, is {mine[name]!r}" for name in changed]

    def _batch(self, step: int) -> Any:
        batch, picked = self._collated(step)
        if jax.tree.structure(batch) != self._structure:
            raise ValueError(
                f"collate_fn changed its mind at step {step}: the batch is {jax.tree.structure(batch)}, "
                f"and was {self._structure} in the first batch (examples {_short(picked)})"
            )
        for i, (leaf, (shape, dtype)) in enumerate(zip(jax.tree.leaves(batch), self._forms, strict=True)):
            if leaf.shape[1:] != shape[1:] or leaf.dtype != dtype:
                raise ValueError(
                    f"collate_fn changed its mind at step {step}: batch leaf {tree_paths(batch)[i]!r} is "
                    f"{leaf.dtype}{list(leaf.shape)}, and was {dtype}{list(shape)} in the first batch; every batch "
                    f"has the same shapes: pad or cut to a fixed length (examples {_short(picked)})"
                )
        return batch

    def _collated(self, step: int) -> tuple[Any, np.ndarray]:
        picked = _slice_rows(self.indices(step), self._process_index, self._process_count)
        return collate(self._examples, picked, self._collate_fn), picked

    def _probe(self) -> None:
        """Collate the first two batches: take their common form, or say what is wrong before anything is compiled."""
        first, _ = self._collated(0)
        self._structure = jax.tree.structure(first)
        self._forms = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(first)]
        self._group = 1
        if self.steps_per_epoch == 1:
            return
        before = jax.tree.map(np.copy, first)
        begin = time.perf_counter()
        self._batch(1)
        seconds = time.perf_counter() - begin
        if seconds < _SMALL_SECONDS and sum(leaf.nbytes for leaf in jax.tree.leaves(first)) <= _SMALL_BYTES:
            self._group = _GROUP
        for path, old, new in zip(tree_paths(first), jax.tree.leaves(before), jax.tree.leaves(first), strict=True):
            if old.tobytes() != new.tobytes():
                raise ValueError(
                    f"collate_fn wrote its second batch over its first one (leaf {path!r}): batches are read ahead, so "
                    "return new arrays from each call"
                )


@dataclasses.dataclass(frozen=True)
class Piece:
    """A batch of `sequential`: unpacks as `batch, count`.

    Attributes:
        batch: this process's rows of a full global batch, or all rows of the last, smaller one.
        count: number of examples in the global batch.
        whole: True if `batch` holds all rows of the global batch on every process.
    """

    batch: Any
    count: int
    whole: bool

    def __iter__(self) -> Iterator[Any]:
        return iter((self.batch, self.count))


def sequential(
    examples: Sequence[Any],
    collate_fn: CollateFn,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    prefetch: int = 2,
    place: Callable[[Piece], Any] | None = None,
) -> Iterator[Any]:
    """Go through the examples once, in order: every example exactly once, for evaluation and prediction.

    Args:
        examples, collate_fn, global_batch, process_index, process_count, prefetch: as for `DataLoader`.
        place: applied to each `Piece` in the background thread; its result is what is yielded.

    Returns:
        An iterator of `Piece`, each a `(batch, count)`. The last one is smaller if the examples do not fill it, and is
        whole on every process.

    Raises:
        ValueError: at once, if there are no examples or the batch cannot be shared out.
    """
    size = _check_examples(examples)
    _check_slices(global_batch, process_index, process_count)

    def piece(index: int) -> Piece:
        rows = np.arange(index * global_batch, min((index + 1) * global_batch, size))
        whole = process_count == 1 or len(rows) < global_batch
        picked = rows if whole else _slice_rows(rows, process_index, process_count)
        return Piece(collate(examples, picked, collate_fn), len(rows), whole)

    return _read_ahead(piece, 0, math.ceil(size / global_batch), prefetch, place)


def collate(examples: Sequence[Any], picked: np.ndarray, collate_fn: CollateFn) -> Any:
    """Collate the examples at the indices `picked` into a tree of numpy arrays, and check it.

    Raises:
        ValueError: `collate_fn` cannot stack the examples, or a leaf is no numeric array with one row per example.
    """
    chosen = _fetch(examples, picked)
    try:
        batch = collate_fn(chosen)
    except Exception as error:
        ragged = _first_difference(chosen, picked)
        if ragged and isinstance(error, ValueError | TypeError):
            raise ValueError(f"collate_fn cannot stack its examples: {ragged} ({error})") from error
        error.add_note(f"collate_fn was given examples {_short(picked)}")
        raise
    leaves, structure = jax.tree.flatten(batch)
    if not leaves:
        raise ValueError(f"collate_fn returned no array: {type(batch).__name__} {batch!r:.80}")
    checked = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
        wrong = _what_is_wrong(leaf, chosen, picked)
        if wrong:
            raise ValueError(f"collate_fn returned {wrong} (batch leaf {tree_paths(batch)[i]!r})")
        dtype = _jax_dtype(leaf.dtype)
        checked.append(leaf if leaf.dtype == dtype else leaf.astype(dtype))
    return structure.unflatten(checked)


def sharded(batch: Any, shardings: Any) -> Any:
    """Place this process's rows of a batch on the mesh as global arrays.

    Args:
        batch: tree of numpy arrays: the rows that `process_rows` says this process holds, in order.
        shardings: tree of shardings of the global batch, or one for every leaf.
    """
    leaves, structure = jax.tree.flatten(batch)
    targets = [shardings] * len(leaves) if isinstance(shardings, Sharding) else structure.flatten_up_to(shardings)
    return structure.unflatten([_place(leaf, target) for leaf, target in zip(leaves, targets, strict=True)])


def from_whole(batch: Any, shardings: Any) -> Any:
    """Place a batch on the mesh of which every process holds all rows, such as the last one of `sequential`."""
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), batch, shardings)


def process_rows(sharding: NamedSharding) -> tuple[int, int]:
    """Which slice of the global batch this process feeds: `(process_index, process_count)` for `DataLoader`.

    It is not always `(jax.process_index(), jax.process_count())`: processes that share a data shard (a tensor axis
    across hosts) read the same rows.

    Raises:
        ValueError: the devices of this process do not hold one contiguous slice of the rows.
    """
    return _row_slice(NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1])))


@functools.lru_cache(maxsize=256)
def _row_slice(rows: NamedSharding) -> tuple[int, int]:
    shards = rows.num_devices // rows.shard_shape((rows.num_devices,))[0]
    indices = rows.addressable_devices_indices_map((shards,)).values()
    here = sorted({index[0].start or 0 for index in indices if index is not None})
    if here != list(range(here[0], here[0] + len(here))) or here[0] % len(here) or shards % len(here):
        raise ValueError(
            f"process {jax.process_index()} holds the batch shards {here} of {shards}, which is not one slice of the "
            "batch; order the mesh so that each process's devices are neighbours along the batch axes"
        )
    return here[0] // len(here), shards // len(here)


def _place(leaf: np.ndarray, sharding: Sharding) -> jax.Array:
    # A callback per shard costs less than device_put on small batches (74 against 100 us for two leaves on 8 CPU
    # devices, 30 against 70 us on one), and is the same code for one process and many.
    index, count = 0, 1
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
        index, count = process_rows(sharding)
    if count == 1:
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
    rows = len(leaf)
    offset = index * rows

    def shard(where: Any) -> np.ndarray:
        start, stop, _ = where[0].indices(rows * count)
        return leaf[(slice(start - offset, stop - offset), *where[1:])]

    return jax.make_array_from_callback((rows * count, *leaf.shape[1:]), sharding, shard)


def _read_ahead(
    make: Callable[[int], Any],
    start: int,
    stop: int,
    prefetch: int,
    place: Callable[[Any], Any] | None,
    group: int = 1,
) -> Iterator[Any]:
    """Compute `place(make(i))` for `i` in order in one grain thread, about `prefetch` of them ahead."""
    # Grain and what it brings take half a second to import: not paid by the planner.
    import grain

    if start >= stop:
        return iter(())
    dataset = grain.MapDataset.source(_Groups(make, place, start, stop, group))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=math.ceil(prefetch / group))
    return _one_by_one(iter(dataset.to_iter_dataset(options)))


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An error on its way from the background thread to the step that it belongs to."""

    error: Exception


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Random-access source for grain: element `i` is the list of the `group` items from `start + i * group` on."""

    make: Callable[[int], Any]
    place: Callable[[Any], Any] | None
    start: int
    stop: int
    group: int

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.group)

    def __getitem__(self, index: int) -> list[Any]:
        first = self.start + int(index) * self.group
        items: list[Any] = []
        for i in range(first, min(first + self.group, self.stop)):
            try:
                item = self.make(i)
                items.append(item if self.place is None else self.place(item))
            except Exception as error:  # noqa: BLE001 (raised at its step, after the items before it)
                items.append(_Failure(error))
                break
        return items


def _one_by_one(groups: Iterator[list[Any]]) -> Iterator[Any]:
    for group in groups:
        for item in group:
            if isinstance(item, _Failure):
                raise item.error
            yield item


def _epoch_order(size: int, seed: int, epoch: int, start: int = 0, stop: int = 0) -> np.ndarray:
    if size <= _PERMUTATION_LIMIT:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(
            np.arange(size, dtype=np.int32)
        )
    import grain

    shuffled = grain.experimental.index_shuffle
    epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return np.asarray([shuffled(i, size - 1, epoch_seed, 4) for i in range(start, stop)])


def _fetch(examples: Sequence[Any], picked: np.ndarray) -> list[Any]:
    many = getattr(examples, "__getitems__", None)  # Hugging Face datasets read a list of rows at once
    if many is not None:
        return list(many(picked.tolist()))
    return [examples[index] for index in picked.tolist()]


def _slice_rows(rows: np.ndarray, index: int, count: int) -> np.ndarray:
    share = len(rows) // count
    return rows[index * share : (index + 1) * share]


def _check_examples(examples: Any) -> int:
    if isinstance(examples, Mapping):
        raise ValueError(
            f"examples is a mapping with keys {list(examples)[:5]}; it must be a sequence of examples, such as "
            "[{'x': x, 'y': y} for x, y in zip(xs, ys)]"
        )
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
        raise ValueError(
            f"examples is a {type(examples).__name__} without a length or indexing; it must be a sequence, such as "
            "list(examples)"
        )
    if len(examples) == 0:
        raise ValueError("examples is empty: there is nothing to read")
    return len(examples)


def _check_slices(global_batch: int, process_index: int, process_count: int) -> None:
    if global_batch < 1:
        raise ValueError(f"global_batch={global_batch}; at least 1 example")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not one of {process_count} processes")
    if global_batch % process_count:
        raise ValueError(
            f"global_batch={global_batch} cannot be shared out among {process_count} processes; "
            f"the nearest that can is {max(1, round(global_batch / process_count)) * process_count}"
        )


def _what_is_wrong(leaf: Any, chosen: list[Any], picked: np.ndarray) -> str:
    if not isinstance(leaf, np.ndarray):
        return f"a {type(leaf).__name__} and not an array: a list of numbers needs np.asarray(...) around it"
    if leaf.dtype.kind not in "biufcV":
        ragged = _first_difference(chosen, picked)
        reason = f"{ragged}; pad or cut examples to one length" if ragged else "batches hold numbers only"
        return f"an array of dtype {leaf.dtype} and shape {leaf.shape}: {reason}"
    if leaf.ndim == 0 or leaf.shape[0] != len(chosen):
        return f"shape {leaf.shape} for {len(chosen)} examples: the leading dimension of every leaf is the examples"
    return ""


@functools.cache
def _jax_dtype(dtype: np.dtype) -> np.dtype:
    return jax.dtypes.canonicalize_dtype(dtype)


def _first_difference(chosen: list[Any], picked: np.ndarray) -> str:
    """Name the first example whose leaves have other shapes than the first one's; empty if all agree."""

    def shapes(example: Any) -> dict[str, tuple[int, ...]]:
        as_leaf = lambda x: isinstance(x, list) and bool(x) and not isinstance(x[0], list | dict | tuple)  # noqa: E731
        leaves = jax.tree_util.tree_leaves_with_path(example, is_leaf=as_leaf)
        return {path_str(path): (len(leaf),) if isinstance(leaf, list) else np.shape(leaf) for path, leaf in leaves}

    first = shapes(chosen[0])
    for index, example in zip(picked[1:], chosen[1:], strict=True):
        other = shapes(example)
        for path in sorted(first.keys() | other.keys()):
            if first.get(path) != other.get(path):
                where = f"{path!r} " if path else ""
                return (
                    f"example {picked[0]} has {where}of shape {first.get(path, 'nothing')}, "
                    f"example {index} {where}of shape {other.get(path, 'nothing')}"
                )
    return ""


def _short(picked: np.ndarray) -> str:
    shown = ", ".join(map(str, picked[:4].tolist()))
    return f"{shown}, ... ({len(picked)} in all)" if len(picked) > 4 else shown
