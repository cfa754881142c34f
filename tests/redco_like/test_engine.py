"""The engine: whatever runs beside a request, it gets the tokens that it would get alone."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import make_params, tiny

from pipelines.generation import sample
from pipelines.generation.sampling import settings_of
from redco_like import Deployer, Engine, MeshShape, Plan, Predictor, SamplingParams
from redco_like.models import build_model

LENGTH = 48
ONE = Plan(MeshShape(), "data")
SPREAD = Plan(MeshShape(data=4, tensor=2), "data+megatron")
QUICK_COMPILE = {"xla_backend_optimization_level": "0"}


@functools.cache
def made(name):
    model = build_model(tiny(name, max_length=LENGTH), dtype="float32")
    return model, make_params(model.init_fn)


@functools.cache
def engine_of(name, plan):
    """One engine for all tests: what earlier requests left in its rows is part of what is tested."""
    model, params = made(name)
    return Engine(model, params, plan=plan, rows=8, length=LENGTH, chunk_tokens=8, steps_per_dispatch=3, eos=(5,))


@functools.cache
def solo_step(name):
    model, _ = made(name)
    return jax.jit(model.decode, compiler_options=QUICK_COMPILE), jax.jit(sample, compiler_options=QUICK_COMPILE)


def solo(name, prompt, p, number=0, eos=(5,)):
    """A batch of one, one token at a time, with a plain check of what ends it."""
    model, params = made(name)
    step, choose = solo_step(name)
    cache, known = model.init_cache(1, LENGTH), list(prompt)
    logits = None
    asked = settings_of([(p, number, 0, ())])
    for position, token in enumerate(prompt):
        logits, cache = step(params, jnp.full((1, 1), token, jnp.int32), cache, jnp.int32(position))
    while True:
        seen = np.isin(np.arange(model.config.vocab), known)[None]
        token = int(choose(logits[:, 0], seen, np.full(1, len(known), np.int32), asked)[0][0])
        known.append(token)
        written = known[len(prompt) :]
        if token in (eos if p.eos is None else p.eos) or any(tuple(written[-len(s) :]) == s for s in p.stop):
            return tuple(written), "stop"
        if len(written) == p.max_tokens:
            return tuple(written), "length"
        logits, cache = step(params, jnp.full((1, 1), token, jnp.int32), cache, jnp.int32(len(known) - 1))


def check(name, completions, prompts, asked):
    for prompt, p, samples in zip(prompts, asked, completions, strict=True):
        assert len(samples) == p.n
        for number, completion in enumerate(samples):
            assert (completion.tokens, completion.finish) == solo(name, prompt, p, number), (prompt, p, number)


tokens = st.integers(0, 55)
# Two beginnings that many prompts share, so that rows are copied and used again.
beginnings = st.sampled_from([(), tuple(range(10, 30)), tuple(range(10, 22)) + tuple(range(40, 48))])
prompts_ = st.builds(lambda a, b: a + tuple(b), beginnings, st.lists(tokens, min_size=1, max_size=9))
params_ = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    stop=st.sampled_from([(), ((7,), (11, 12))]),
    eos=st.sampled_from([None, (), (3, 9)]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 1, 3]),
)
requests_ = st.lists(st.tuples(prompts_, params_), min_size=1, max_size=10)


def play(name, plan, requests, seed):
    """Requests come and go at random steps; those that are left get the tokens that they get alone."""
    rng, engine = np.random.default_rng(seed), engine_of(name, plan)
    todo, ids, got, finished, cancelled = list(requests), {}, {}, {}, set()
    while todo or not engine.idle:
        while todo and rng.random() < 0.6:
            prompt, p = todo.pop(0)
            ids[engine.submit(prompt, p)] = prompt, p
        if ids and rng.random() < 0.15:
            victim = int(rng.choice(list(ids)))
            engine.cancel(victim)
            cancelled.add(victim)
        for event in engine.step():
            key = event.request, event.sample
            assert key not in finished
            got[key] = got.get(key, ()) + event.tokens
            if event.finish:
                finished[key] = event.finish
    for request, (prompt, p) in ids.items():
        for number in range(p.n):
            tokens, finish = solo(name, prompt, p, number)
            if finished[request, number] == "cancelled":
                assert request in cancelled
                assert got[request, number] == tokens[: len(got[request, number])]
            else:
                assert (got[request, number], finished[request, number]) == (tokens, finish)
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.failed == 0
    assert stats.compilations <= stats.programs


@pytest.mark.parametrize("plan", [ONE, SPREAD], ids=["one", "spread"])
@given(requests_, st.integers(0, 2**31))
@settings(max_examples=8)
def test_every_request_gets_its_own_tokens(plan, requests, seed):
    play("llama-3-8b", plan, requests, seed)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [ONE, SPREAD], ids=["one", "spread"])
@given(requests_, st.integers(0, 2**31))
@settings(max_examples=150)
def test_every_request_gets_its_own_tokens_often(plan, requests, seed):
    play("llama-3-8b", plan, requests, seed)


@pytest.mark.parametrize("name", ["gpt2", "mistral-7b", "mixtral-8x7b"])
def test_positions_windows_and_experts(name):
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 56, n).tolist()) for n in (3, 17, 9, 1, 30, 21)]
    asked = [SamplingParams(max_tokens=10 + i, temperature=0.8 * (i % 2), seed=i) for i in range(6)]
    check(name, engine_of(name, ONE).generate(prompts, asked), prompts, asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, plan", [("mpt-7b", SPREAD), ("gemma-2-2b", SPREAD), ("mixtral-8x7b", SPREAD), ("deepseek-v3", ONE)]
)
def test_other_decoders(name, plan):
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 56, n).tolist()) for n in (3, 17, 9, 1, 30, 21)]
    asked = [SamplingParams(max_tokens=10 + i, temperature=0.8 * (i % 2), seed=i) for i in range(6)]
    check(name, engine_of(name, plan).generate(prompts, asked), prompts, asked)


def test_samples_of_one_prompt_read_it_once():
    engine = engine_of("llama-3-8b", ONE)
    prompt, p = tuple(range(55, 25, -1)), SamplingParams(max_tokens=6, temperature=1.0, n=5, eos=())
    before = engine.stats()
    samples = engine.generate([prompt], p)
    after = engine.stats()
    check("llama-3-8b", samples, [prompt], [p])
    assert len({c.tokens for c in samples[0]}) > 1
    assert after.prompt_tokens - before.prompt_tokens == 5 * 30
    assert after.shared_tokens - before.shared_tokens == 4 * 29
    assert after.reads - before.reads == 30 // 8 + 1


def test_logprobs_are_those_of_the_model():
    model, params = made("llama-3-8b")
    prompt = (3, 1, 4, 1, 5)
    [[completion]] = engine_of("llama-3-8b", ONE).generate(
        [prompt], SamplingParams(max_tokens=6, logprobs=True, eos=())
    )
    whole = jnp.asarray([[*prompt, *completion.tokens]])
    logits = jax.jit(lambda p, t: model.module.apply({"params": p}, t)[0], compiler_options=QUICK_COMPILE)(
        params, whole
    )
    wanted = np.asarray(jax.nn.log_softmax(logits[0, 4:-1]))[np.arange(6), list(completion.tokens)]
    np.testing.assert_allclose(completion.logprobs, wanted, rtol=1e-4, atol=1e-5)


def test_everything_is_compiled_in_the_warm_up_and_nothing_after():
    engine, told = engine_of("llama-3-8b", SPREAD), []
    known, compiled = engine.stats().compilations, engine.warm_up(told.append)
    programs = engine.stats().programs
    assert programs == len(engine.programs.names) == engine.stats().compilations == known + len(compiled)
    assert [line.split(": ", 1)[1] for line in told] == [f"{c.name}, {c.seconds:.1f} s" for c in compiled]
    assert all(c.seconds > 0 for c in compiled)
    asked = [SamplingParams(max_tokens=4, temperature=t, n=2, repetition_penalty=r) for t, r in ((0, 1.0), (1, 2.0))]
    engine.generate([list(range(20)), [3]], asked)
    assert engine.stats().compilations == programs
    assert engine.warm_up() == []


def test_logits_that_are_no_numbers_fail_one_request_and_nobody_else():
    model, params = made("llama-3-8b")
    table = np.array(params["embed"])
    table[50] = np.nan
    engine = Engine(
        model, {**params, "embed": table}, plan=ONE, rows=2, length=24, chunk_tokens=4, steps_per_dispatch=2
    )
    good, bad = (1, 2, 3), (4, 50, 6)
    p = SamplingParams(max_tokens=5)
    for _ in range(2):  # the row that failed is used again
        one, [failed], two = (*engine.generate([good, bad, good], p),)
        assert failed.finish == "error"
        assert "after 3 tokens are not finite" in failed.error
        assert (one[0].tokens, one[0].finish) == (two[0].tokens, two[0].finish) == solo("llama-3-8b", good, p, eos=())
    assert engine.stats().failed == 2


def test_cancelling_is_idempotent_and_frees_the_row():
    engine = engine_of("llama-3-8b", ONE)
    request = engine.submit((1, 2, 3), SamplingParams(max_tokens=40, n=2, eos=()))
    engine.step()
    for _ in range(2):
        engine.cancel(request)
    engine.cancel(10**6)
    assert sorted((e.request, e.sample, e.finish) for e in engine.step()) == [
        (request, 0, "cancelled"),
        (request, 1, "cancelled"),
    ]
    assert engine.idle
    engine.cancel(request)
    assert engine.step() == []


def test_a_long_prompt_does_not_hold_the_others_up():
    engine = engine_of("llama-3-8b", ONE)
    first = engine.submit((1, 2, 3), SamplingParams(max_tokens=30, eos=()))
    while not any(e.tokens for e in engine.step()):
        pass
    engine.submit(tuple(range(47)), SamplingParams(max_tokens=1, eos=()))
    for _ in range(47 // 8):
        assert sum(len(e.tokens) for e in engine.step() if e.request == first) >= 1
    while not engine.idle:
        engine.step()


def test_events_of_others_are_not_lost_while_a_batch_is_generated():
    engine = engine_of("llama-3-8b", ONE)
    other = engine.submit((9, 8, 7), SamplingParams(max_tokens=3, eos=()))
    engine.generate([(1, 2, 3)], SamplingParams(max_tokens=20, eos=()))
    events = []
    while not engine.idle:
        events += engine.step()
    assert sum(len(e.tokens) for e in events if e.request == other) == 3
    assert engine.generate([], SamplingParams()) == []


def test_bad_requests_are_refused_with_the_nearest_that_works():
    engine = engine_of("llama-3-8b", ONE)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([])
    with pytest.raises(ValueError, match="the prompt has token 56; the model has tokens 0 to 55"):
        engine.submit([1, 56])
    with pytest.raises(ValueError, match="stop has token -1"):
        engine.submit([1], SamplingParams(stop=((-1,),)))
    with pytest.raises(
        ValueError, match=r"40 tokens and max_tokens=10 are 50, more .* length=48; nearest: max_tokens=8"
    ):
        engine.submit([1] * 40, SamplingParams(max_tokens=10))
    with pytest.raises(ValueError, match="nearest: a prompt of 47 tokens"):
        engine.submit([1] * 50)
    with pytest.raises(ValueError, match="2 prompts and 1 parameters"):
        engine.generate([[1], [2]], [SamplingParams()])
    assert engine.idle


def test_bad_engines_are_refused():
    model, params = made("llama-3-8b")
    with pytest.raises(ValueError, match=r"rows=6 do not split over 4 data shards .* nearest: 4"):
        Engine(model, params, plan=SPREAD, rows=6, length=24)
    with pytest.raises(ValueError, match="steps_per_dispatch=0"):
        Engine(model, params, plan=ONE, steps_per_dispatch=0)
    with pytest.raises(ValueError, match="table of 48 positions"):
        Engine(*made("gpt2"), plan=ONE, length=64)
    encoder = build_model(tiny("bert-base"), dtype="float32")
    with pytest.raises(ValueError, match="is no decoder"):
        Engine(encoder, {}, plan=ONE)


def test_the_planner_lays_an_engine_out():
    model, params = made("llama-3-8b")
    engine = Engine(model, params, rows=8, length=24, chunk_tokens=8)
    assert engine.programs.plans.decode.mesh.size == 8
    prompts, p = [(1, 2, 3), (7, 8)], SamplingParams(max_tokens=4)
    got = engine.generate(prompts, p)
    assert [c[0].tokens for c in got] == [solo("llama-3-8b", prompt, p, eos=())[0] for prompt in prompts]


def test_other_parameters_are_taken_and_nothing_is_remembered():
    model, params = made("llama-3-8b")
    engine = Engine(model, params, plan=ONE, rows=2, length=48, chunk_tokens=8, steps_per_dispatch=3)
    prompt, p = tuple(range(30)), SamplingParams(max_tokens=4)
    before = engine.generate([prompt], p)
    engine.set_params(jax.tree.map(lambda x: x[..., ::-1], params))
    changed = engine.generate([prompt], p)
    engine.set_params(params)
    assert engine.generate([prompt], p) == before != changed
    assert engine.stats().shared_tokens == 0
    with pytest.raises(ValueError, match="other shapes"):
        engine.set_params(made("llama-3-8b")[1] | {"embed": np.zeros((4, 32), np.float32)})
    engine.submit(prompt, p)
    with pytest.raises(ValueError, match="while requests run"):
        engine.set_params(params)


def test_a_predictor_continues_prompts_in_order():
    model, params = made("llama-3-8b")
    holder = [params]
    predictor = Predictor(
        Deployer(compile_cache=False),
        lambda examples: {"x": np.zeros(len(examples))},
        lambda params, batch: batch["x"],
        params=lambda: holder[0],
        plan=SPREAD,
    )
    examples = [{"ids": (i, i + 1, 7)} for i in range(11)]
    p = SamplingParams(max_tokens=5)
    got = predictor.generate(examples, model, p, prompt_fn=lambda e: e["ids"], rows=8, length=LENGTH, eos=(5,))
    check("llama-3-8b", got, [e["ids"] for e in examples], [p] * 11)
    holder[0] = jax.tree.map(lambda x: x[..., ::-1], params)
    other = predictor.generate(examples, model, p, prompt_fn=lambda e: e["ids"], rows=8, length=LENGTH, eos=(5,))
    assert other != got
    with pytest.raises(ValueError, match="11 examples and 2 sampling parameters"):
        predictor.generate(examples, model, [p, p], prompt_fn=lambda e: e["ids"])


def test_a_predictor_translates_with_an_encoder_decoder():
    model = build_model(tiny("t5-v1.1-base"), dtype="float32")
    params = make_params(model.init_fn)
    predictor = Predictor(
        Deployer(compile_cache=False), lambda x: {"x": np.zeros(len(x))}, lambda batch: batch["x"], params=params
    )
    sources = [(3, 4, 5), (9, 2, 8), (8, 7, 6, 5, 4, 3)]
    step = jax.jit(lambda p, t, s: model.module.apply({"params": p}, t, source=s), compiler_options=QUICK_COMPILE)
    got = predictor.generate(sources, model, SamplingParams(max_tokens=6), rows=2)
    for source, [completion] in zip(sources, got, strict=True):
        read = jnp.asarray([[model.config.start_token, *completion.tokens[:-1]]])
        logits, _ = step(params, read, jnp.asarray([source]))
        assert completion.tokens == tuple(np.asarray(logits[0].argmax(-1)).tolist())
    with pytest.raises(ValueError, match="is continued greedily"):
        predictor.generate(sources, model, SamplingParams(temperature=1.0))


def test_parameters_come_and_go():
    """What a trainer does with an engine: made of shapes, given parameters, and freed of them and of its cache."""
    model, params = made("llama-3-8b")
    forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    sizes = {"rows": 8, "length": LENGTH, "chunk_tokens": 8, "steps_per_dispatch": 3, "eos": (5,)}
    engine = Engine(model, forms, plan=ONE, devices=jax.devices()[3:4], **sizes)
    engine.submit([1, 2, 3], SamplingParams(max_tokens=4))
    with pytest.raises(ValueError, match="this Engine has no parameters; give it some with set_params"):
        engine.step()
    engine.cancel(0)
    with pytest.raises(ValueError, match="parameters are given up while requests run"):
        engine.release()
    engine = Engine(model, forms, plan=ONE, devices=jax.devices()[3:4], **sizes)
    wanted = engine_of("llama-3-8b", ONE).generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    for _ in range(2):
        engine.set_params(params)
        assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4)) == wanted
        assert {x.device for x in jax.tree.leaves(engine.params)} == {jax.devices()[3]}
        engine.release()
        assert engine.params is None
    elsewhere = [types.SimpleNamespace(process_index=1)]
    with pytest.raises(
        ValueError, match=r"of the 2 devices 1 belong to others than process 0; give devices=jax\.local"
    ):
        Engine(model, params, devices=[*jax.devices()[:1], *elsewhere], **sizes)
