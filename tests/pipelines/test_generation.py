"""Sampling against plain numpy, the scheduler as a machine of rows, and rows of any cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.generation import SamplingParams, Scheduler, Sequence, Shape, sample
from pipelines.generation.rows import CacheRows, cache_dims
from pipelines.generation.sampling import (
    STOP_TOKENS,
    STOPS,
    draw,
    ended,
    kept_weights,
    penalise,
    settings_of,
    uniforms,
)
from sharding_rules import MeshShape, PlanError, make_mesh

V = 300
QUICK_COMPILE = {"xla_backend_optimization_level": "0"}


# Sampling.


def rows_of(*params, last=1000, sample=0, ends=()):
    return settings_of([(p, sample, last, ends) for p in params])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(logits_V, p):
    """Probabilities as transformers' processors and warpers have them, by sorting, in float64."""
    x = logits_V.astype(np.float64) / p.temperature
    if p.top_k:
        x = np.where(x < np.sort(x)[-min(p.top_k, len(x))], -np.inf, x)
    if p.top_p < 1:
        order = np.argsort(x)[::-1]
        before = np.cumsum(softmax(x)[order]) - softmax(x)[order]
        x[order[before >= p.top_p]] = -np.inf
    if p.min_p:
        x = np.where(softmax(x) < p.min_p * softmax(x).max(), -np.inf, x)
    return softmax(x)


CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@jax.jit
def weights_of(logits, s):
    return kept_weights(logits, s.temperature_B, s.top_k_B, s.top_p_B, s.min_p_B)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_cuts_keep_the_tokens_that_sorting_keeps(temperature):
    logits = np.random.default_rng(0).normal(size=(len(CUTS), V)).astype(np.float32) * 3
    asked = [SamplingParams(temperature=temperature, **cut) for cut in CUTS]
    weights = np.asarray(weights_of(logits, rows_of(*asked)), np.float64)
    for row, p in enumerate(asked):
        wanted = reference(logits[row], p)
        np.testing.assert_array_equal(weights[row] > 0, wanted > 0, err_msg=str(p))
        np.testing.assert_allclose(weights[row] / weights[row].sum(), wanted, rtol=1e-5, atol=1e-7)


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    logits = np.array([[3.0, 1.0, 2.0, 2.0, 0.0]], np.float32)
    for cut in ({"top_k": 2}, {"top_p": 0.7}):
        weights = weights_of(logits, rows_of(SamplingParams(temperature=1.0, **cut)))
        assert (np.asarray(weights)[0] > 0).tolist() == [True, False, True, True, False]


def test_repetition_penalty_is_that_of_transformers():
    logits = np.array([[2.0, -2.0, 1.0]], np.float32)
    got = penalise(logits, np.array([[True, True, False]]), np.array([2.0], np.float32))
    np.testing.assert_array_equal(got, [[1.0, -4.0, 1.0]])


@pytest.mark.reference
def test_processors_of_transformers_agree():
    torch = pytest.importorskip("torch")
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(1).normal(size=(1, V)).astype(np.float32) * 3
    ids = np.random.default_rng(2).integers(0, V, (1, 40))
    p = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    chain = LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(p.repetition_penalty),
            theirs.TemperatureLogitsWarper(p.temperature),
            theirs.TopKLogitsWarper(p.top_k),
            theirs.TopPLogitsWarper(p.top_p),
            theirs.MinPLogitsWarper(p.min_p),
        ]
    )
    wanted = torch.softmax(chain(torch.tensor(ids), torch.tensor(logits)), -1).numpy()
    seen = np.zeros((1, V), bool)
    seen[0, ids[0]] = True
    s = rows_of(p)
    got = np.asarray(weights_of(penalise(logits, seen, s.penalty_B), s))
    np.testing.assert_allclose(got / got.sum(), wanted, rtol=1e-5, atol=1e-7)


def test_draws_follow_the_weights():
    weights = np.zeros((1, 600), np.float32)
    weights[0, [0, 5, 255, 256, 599]] = [1, 2, 3, 0, 4]
    numbers = (np.arange(1000) + 0.5).astype(np.float32) / 1000
    tokens = np.asarray(draw(jnp.repeat(jnp.asarray(weights), 1000, 0), numbers))
    values, counts = np.unique(tokens, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0: 100, 5: 200, 255: 300, 599: 400}
    extremes = draw(jnp.repeat(jnp.asarray(weights), 2, 0), np.array([0.0, 1 - 2**-24], np.float32))
    assert np.asarray(extremes).tolist() == [0, 599]


sample_jit = jax.jit(sample)


def test_a_token_depends_on_its_own_row_alone():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(6, V)).astype(np.float32)
    seen = rng.integers(0, 2, (6, V)).astype(bool)
    asked = [
        SamplingParams(temperature=1.5, seed=1, logprobs=True),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=9, seed=2),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(temperature=1.0, top_p=0.5, seed=2**32 - 1),
        SamplingParams(temperature=3.0, min_p=0.2, repetition_penalty=0.5),
    ]
    position = np.arange(6, dtype=np.int32) + 11
    tokens, logprobs, finite = (np.asarray(x) for x in sample_jit(logits, seen, position, rows_of(*asked)))
    assert finite.all()
    np.testing.assert_allclose(logprobs, np.log(softmax(logits.astype(np.float64)))[np.arange(6), tokens], rtol=1e-5)
    order = np.array([4, 2, 0, 5, 1, 3])
    mixed = sample_jit(logits[order], seen[order], position[order], rows_of(*[asked[i] for i in order]))
    np.testing.assert_array_equal(mixed[0], tokens[order])
    for i, p in enumerate(asked):  # beside rows that want something else
        others = [dataclasses.replace(p) if j == i else SamplingParams() for j in range(6)]
        assert int(sample_jit(logits, seen, position, rows_of(*others))[0][i]) == tokens[i]
    assert tokens[1] == logits[1].argmax()


def test_seeds_samples_and_positions_draw_different_numbers():
    grid = np.stack(np.meshgrid([0, 1, 2], [0, 1], [5, 6]), -1).reshape(-1, 3)
    numbers = uniforms(grid[:, 0].astype(np.uint32), grid[:, 1].astype(np.int32), grid[:, 2].astype(np.int32))
    assert len(set(np.asarray(numbers).tolist())) == len(grid)


def test_logits_that_are_no_numbers_are_found_in_their_row():
    logits = np.zeros((4, V), np.float32)
    logits[1, 7] = np.nan
    logits[2, :] = -np.inf
    finite = sample_jit(logits, np.zeros((4, V), bool), np.zeros(4, np.int32), rows_of(*[SamplingParams()] * 4))[2]
    assert np.asarray(finite).tolist() == [True, False, False, True]


@given(
    tail=st.lists(st.integers(0, 2), min_size=1, max_size=STOP_TOKENS),
    stops=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3),
    ends=st.lists(st.integers(0, 2), max_size=2),
)
@settings(max_examples=60)
def test_a_row_ends_with_its_stop_sequences_and_end_tokens(tail, stops, ends):
    padded = np.full((1, STOP_TOKENS), -1, np.int32)
    padded[0, -len(tail) :] = tail
    got = ended(jnp.asarray(padded), rows_of(SamplingParams(stop=tuple(map(tuple, stops))), ends=tuple(ends)))
    assert bool(got[0]) == (tail[-1] in ends or any(tail[-len(s) :] == s for s in stops))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"n": 0}, "n=0"),
        ({"stop": ((),)}, "stop="),
        ({"stop": ((1,),) * (STOPS + 1)}, "at most"),
        ({"stop": (tuple(range(STOP_TOKENS + 1)),)}, "1 to 16 tokens"),
    ],
)
def test_wrong_parameters_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        SamplingParams(**wrong)


# The scheduler.

SHAPES = (Shape(1, 8), Shape(2, 2), Shape(1, 2))
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)
arrivals = st.lists(st.tuples(prompts, st.integers(1, 10), st.integers(1, 3)), min_size=1, max_size=12)


class World:
    """Plays the device: what the cache holds is tracked token by token, and every program checks what it reads."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.cache = [[None] * scheduler.length for _ in scheduler.rows]
        self.read_tokens = 0

    @staticmethod
    def next_token(known):
        return (sum(known) * 7 + len(known)) % 5

    def step(self, rng, steps=3):
        s = self.scheduler
        before = {row.index: row.sequence for row in s.running}
        for copy in s.admit():
            assert s.shard(copy.source) == s.shard(copy.target)
            assert copy.target not in before
            self.cache[copy.target][: copy.tokens] = self.cache[copy.source][: copy.tokens]
        for row in s.running:
            assert list(row.held) == self.cache[row.index][: len(row.held)]
            assert row.held == row.sequence.known[: len(row.held)]
        work, decoding = s.chunk(), s.decoding()
        firsts = []
        if work:
            assert work.shape in s.shapes
            s.read(work)
            for part in [part for parts in work.parts for part in parts]:
                assert len(part.tokens) <= work.shape.tokens
                assert part.start + work.shape.tokens <= s.length
                self.read_tokens += len(part.tokens)
                self.cache[part.row][part.start : part.start + len(part.tokens)] = part.tokens
                if part.final:
                    firsts.append(part.row)
        done = []
        for index, count in [(i, 1) for i in firsts] + [
            (row.index, int(rng.integers(1, steps + 1))) for row in decoding
        ]:
            sequence, new = s.rows[index].sequence, []
            finish = None
            while len(new) < count and finish is None:
                known = [*sequence.known, *new]
                if index not in firsts or new:
                    self.cache[index][len(known) - 1] = known[-1]
                assert None not in self.cache[index][: len(known) - (index in firsts)]
                new.append(self.next_token(known))
                if len(sequence.written) + len(new) == sequence.max_tokens:
                    finish = "length"
            s.wrote(index, new, finish)
            if finish:
                done.append(sequence)
        return done


@given(arrivals, st.integers(0, 1000), st.sampled_from([(4, 1), (4, 2), (1, 1)]))
@settings(max_examples=80)
def test_every_sequence_gets_the_tokens_of_its_own(arrived, seed, layout):
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(rows=layout[0], length=32, shapes=SHAPES, shards=layout[1], least_shared=3)
    world, pending, done, dropped = World(scheduler), list(enumerate(arrived)), [], []
    for _ in range(2000):
        while pending and rng.random() < 0.5:
            request, (prompt, count, n) = pending.pop(0)
            for i in range(n):
                scheduler.add(Sequence(request, i, prompt, count))
        if rng.random() < 0.1:
            dropped += scheduler.cancel(int(rng.integers(0, len(arrived))))
        done += world.step(rng)
        if not pending and scheduler.idle:
            break
    assert scheduler.idle
    total = sum(n for _, _, n in arrived)
    assert sorted((s.request, s.sample) for s in done + dropped) == [
        (request, i) for request, (_, _, n) in enumerate(arrived) for i in range(n)
    ]
    assert len(done) + len(dropped) == total
    for s in done:
        known = list(s.prompt)
        for token in s.written:
            assert token == world.next_token(known)
            known.append(token)
        assert len(s.written) == s.max_tokens
    assert all(row.sequence is None for row in scheduler.rows)


def run(scheduler, world=None):
    world, rng, rounds, done = world or World(scheduler), np.random.default_rng(0), 0, []
    while not scheduler.idle:
        done += world.step(rng)
        rounds += 1
        assert rounds < 1000
    return world, done


def test_samples_of_one_prompt_read_it_once():
    scheduler = Scheduler(rows=4, length=64, shapes=(Shape(1, 8),))
    for i in range(4):
        scheduler.add(Sequence(0, i, tuple(range(40)), 5))
    world, _ = run(scheduler)
    assert world.read_tokens == 40
    assert scheduler.shared_tokens == 3 * 39


def test_a_row_that_is_free_is_used_again_for_the_same_beginning():
    scheduler = Scheduler(rows=2, length=64, shapes=(Shape(1, 8),))
    scheduler.add(Sequence(0, 0, tuple(range(40)), 5))
    world, done = run(scheduler)
    world.scheduler.add(Sequence(1, 0, (*done[0].known[:43], 7, 8, 9), 5))
    world.read_tokens = 0
    run(scheduler, world)
    assert world.read_tokens == 3


def test_decoding_rows_never_wait_more_than_one_piece():
    scheduler = Scheduler(rows=2, length=64, shapes=(Shape(1, 4),))
    scheduler.add(Sequence(0, 0, (1, 2), 20))
    world, rng = World(scheduler), np.random.default_rng(0)
    while not scheduler.decoding():
        world.step(rng)
    scheduler.add(Sequence(1, 0, tuple(range(30)), 1))
    while scheduler.running[0].missing and scheduler.running[-1].missing != 1 and len(scheduler.running) == 2:
        before = len(scheduler.rows[0].sequence.written)
        world.step(rng, steps=1)
        assert len(scheduler.rows[0].sequence.written) == before + 1


def test_first_come_first_served():
    scheduler = Scheduler(rows=1, length=64, shapes=(Shape(1, 4),))
    for request in range(5):
        scheduler.add(Sequence(request, 0, (request, 1), 2))
    assert [s.request for s in run(scheduler)[1]] == [0, 1, 2, 3, 4]


def test_a_spoiled_row_shares_nothing():
    scheduler = Scheduler(rows=1, length=64, shapes=(Shape(1, 64),))
    scheduler.add(Sequence(0, 0, tuple(range(40)), 5))
    scheduler.admit()
    scheduler.read(scheduler.chunk())
    scheduler.wrote(0, [], "error")
    scheduler.add(Sequence(1, 0, tuple(range(40)), 5))
    assert scheduler.admit() == []
    assert scheduler.rows[0].held == []


def test_a_sequence_that_does_not_fit_is_refused():
    scheduler = Scheduler(rows=1, length=16, shapes=(Shape(1, 4),))
    with pytest.raises(ValueError, match=r"10 tokens and 7 new ones; .* at most 16"):
        scheduler.add(Sequence(0, 0, tuple(range(10)), 7))
    with pytest.raises(ValueError, match="rows=3 over 2 shards; nearest: 2"):
        Scheduler(rows=3, length=16, shapes=(Shape(1, 4),), shards=2)


# Rows.


def make_cache(rows, length):
    return {"keys": jnp.zeros((2, rows, 3, length, 4)), "latent": jnp.zeros((2, rows, length, 5), jnp.bfloat16)}


def rows_on(shape):
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    specs = {"keys": P(None, ("data", "fsdp"), "tensor"), "latent": P(None, ("data", "fsdp"))}
    cache = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in random_cache().items()}
    return CacheRows(cache_dims(make_cache), specs, mesh), cache


def random_cache(rows=8, length=6):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), make_cache(rows, length))


NONE = 4
"""No row of a shard of four."""


def test_rows_are_moved_within_their_shards():
    rows, cache = rows_on(MeshShape(data=2, tensor=3))
    jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    before = jax.tree.map(np.asarray, cache)
    view = jit(rows.take, static_argnums=2)(cache, np.array([[3, 1], [0, NONE]], np.int32), 5)
    for name, x in view.items():
        np.testing.assert_array_equal(x[:, :3], before[name][:, [3, 1, 4]][..., :5, :])

    # Rows 3, 1 and 4 from positions 0, 4 and 2 on; of row 3 of the second shard too little is left.
    added = random_cache(4, 2)
    where = np.array([[3, 1], [0, 3]], np.int32), np.array([[0, 4], [2, 5]], np.int32)
    got, wanted = jit(rows.append)(cache, added, *where), jax.tree.map(np.array, before)
    for name, x in wanted.items():
        for i, (row, start) in enumerate([(3, 0), (1, 4), (4, 2)]):
            x[:, row, ..., start : start + 2, :] = np.asarray(added[name])[:, i]
        np.testing.assert_array_equal(got[name], x)

    copied = jit(rows.copy, static_argnums=3)(cache, np.array([[1], [2]]), np.array([[0], [NONE]]), 3)
    for name, x in jax.tree.map(np.array, before).items():
        x[:, 0, ..., :3, :] = x[:, 1, ..., :3, :]
        np.testing.assert_array_equal(copied[name], x)

    cleared = jit(rows.clear)(cache, np.array([[2], [NONE]]))
    assert not np.asarray(cleared["keys"])[:, 2].any()
    np.testing.assert_array_equal(np.delete(cleared["keys"], 2, 1), np.delete(before["keys"], 2, 1))


def test_a_plan_that_splits_positions_is_refused():
    mesh = make_mesh(MeshShape(context=2), jax.devices()[:2])
    specs = {"keys": P(None, None, None, "context"), "latent": P()}
    with pytest.raises(PlanError, match=r"'keys' as .* a plan without the axis context"):
        CacheRows(cache_dims(make_cache), specs, mesh)


def test_a_cache_without_positions_is_refused():
    with pytest.raises(ValueError, match=r"'state' of shape .* one each is needed"):
        cache_dims(lambda rows, length: {"state": jnp.zeros((rows, 4))})
