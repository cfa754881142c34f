"""Sizing of servers: times and users move the right way, memory adds up, and steps cost what `plan` says they do."""

import dataclasses
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redco_like.cli import main, sizing
from redco_like.cli.serve import Room, room_of
from redco_like.cli.terminal import UsageError
from search import Plan
from search.serving import Load, Phases, Step, about_fitting, serve, size, steady
from sharding_rules import MeshShape

GIB = 2**30


def synthetic(devices=8, *, params=16 * GIB, per_user=GIB / 2, bandwidth=1e12, flops=1e14):
    """A model whose weights are split over tensor, by hand: decoding reads weights and caches, prompts are products."""

    def meshes(replicas):
        return [MeshShape(data=replicas, tensor=devices // replicas)]

    def plan():
        return Plan(MeshShape())

    def decode(replicas, rows):
        out = {}
        for mesh in meshes(replicas):
            held, cache = params / mesh.tensor, rows * per_user / devices
            seconds = (held + cache) / bandwidth + 1e-4 * math.log2(2 * mesh.tensor)
            out[mesh] = Step(seconds, held, cache, cache / 8, plan)
        return out

    def prefill(replicas, tokens):
        out = {}
        for mesh in meshes(replicas):
            seconds = max(tokens * params / mesh.tensor / flops, params / mesh.tensor / bandwidth)
            out[mesh] = Step(seconds, params / mesh.tensor, 0, tokens * 1e3, plan)
        return out

    return Phases(decode, prefill)


def sized(users, *, context=4096, devices=8, budget=15 * GIB, ttft=math.inf, tpot=math.inf, **model):
    load = Load(users, context, min(256, context // 2), ttft, tpot)
    return size(load, synthetic(devices, **model), devices=devices, budget_bytes=budget)


# One replica.


@settings(max_examples=200, deadline=None)
@given(
    users=st.integers(1, 500),
    decode=st.floats(1e-4, 0.1),
    chunk=st.floats(1e-4, 1.0),
    chunks=st.integers(1, 20),
    output=st.integers(1, 2000),
)
def test_times_of_a_replica_lie_within_the_bounds_of_its_queue(users, decode, chunk, chunks, output):
    found = steady(users, decode, chunk, chunks, output)
    prompt = chunks * (chunk + (decode if users > 1 else 0))
    assert found.ttft_seconds >= prompt * (1 - 1e-6)
    assert decode * (1 - 1e-6) <= found.tpot_seconds <= (decode + chunk) * (1 + 1e-6)
    # Little's law, and no more prompts than the time to read them allows.
    cycle = found.ttft_seconds + (output - 1) * found.tpot_seconds
    assert found.requests_per_second * cycle == pytest.approx(users)
    assert found.requests_per_second * prompt <= 1 + 1 / users


@settings(max_examples=100, deadline=None)
@given(users=st.integers(1, 300), decode=st.floats(1e-4, 0.1), chunk=st.floats(1e-4, 1.0), output=st.integers(1, 500))
def test_times_of_a_replica_grow_with_its_users_and_slower_steps_slow_tokens(users, decode, chunk, output):
    base = steady(users, decode, chunk, 3, output)
    more = steady(users + 1, decode, chunk, 3, output)
    assert more.ttft_seconds >= base.ttft_seconds * (1 - 1e-5)
    assert more.tpot_seconds >= base.tpot_seconds * (1 - 1e-5)
    assert steady(users, 1.1 * decode, chunk, 3, output).tpot_seconds >= base.tpot_seconds * (1 - 1e-5)


def simulated(users, decode, chunk, chunks, output, *, alike, rounds=100):
    """One replica, step by step: a token for all who have begun, and a chunk of the prompt that is first in line."""
    rng, now, line, left = random.Random(0), 0.0, [], {}
    asked, began, length = {}, {}, {}
    for user in range(users):
        left[user] = length[user] = rng.randint(1, output - 1)
    firsts, tokens, done, start = [], [], 0, 0.0
    warm = 10 * users
    while done < warm + rounds * users:
        going, head = list(left), line[0] if line else None
        now += (decode if going else 0) + (chunk if head else 0)
        for user in going:
            left[user] -= 1
            if not left[user]:
                del left[user]
                if user in began:
                    done += 1
                    start = now if done == warm else start
                    if done > warm:
                        tokens.append((now - began[user], length[user]))
                asked[user] = now
                line.append([user, chunks])
        if head is not None:
            head[1] -= 1
            if not head[1]:
                user, _ = line.pop(0)
                began[user] = now
                left[user] = length[user] = output - 1 if alike else max(1, round(rng.expovariate(1 / (output - 1))))
                if done > warm:
                    firsts.append(now - asked[user])
    per_token = sum(seconds for seconds, _ in tokens) / sum(count for _, count in tokens)
    return sum(firsts) / len(firsts), per_token, (done - warm) / (now - start)


@pytest.mark.parametrize(
    ("users", "decode", "chunk", "chunks", "output"),
    [
        (32, 0.008, 0.08, 1, 256),
        (100, 0.011, 0.08, 1, 256),
        (32, 0.008, 0.0055, 15, 256),
        (8, 0.01, 0.05, 2, 64),
        (2, 0.01, 0.05, 4, 100),
        (12, 0.01, 0.02, 1, 16),
        (24, 0.01, 0.04, 2, 24),
    ],
)
def test_times_are_those_of_a_simulation(users, decode, chunk, chunks, output):
    found = steady(users, decode, chunk, chunks, output)
    first, token, rate = simulated(users, decode, chunk, chunks, output, alike=False)
    assert found.ttft_seconds == pytest.approx(first, rel=0.05)
    assert found.tpot_seconds == pytest.approx(token, rel=0.08)
    assert found.requests_per_second == pytest.approx(rate, rel=0.05)
    first, token, rate = simulated(users, decode, chunk, chunks, output, alike=True, rounds=20)
    assert found.ttft_seconds >= 0.98 * first
    assert found.tpot_seconds == pytest.approx(token, rel=0.08)
    assert found.requests_per_second == pytest.approx(rate, rel=0.05)


def test_a_lone_user_waits_for_nothing():
    found = steady(1, 0.01, 0.05, 4, 101)
    assert found.ttft_seconds == pytest.approx(0.2)
    assert found.tpot_seconds == pytest.approx(0.01)


def test_where_prompts_are_all_there_is_they_come_one_after_the_other():
    found = steady(10, 0.001, 0.1, 1, 1)
    assert found.requests_per_second == pytest.approx(1 / 0.101)
    assert found.ttft_seconds == pytest.approx(10 * 0.101)


# A cluster.


def test_memory_of_the_users_adds_up_and_stays_within_the_budget():
    found = sized(64).asked
    assert found is not None
    assert found.memory["cache"] == 64 * GIB / 2 / 8
    assert found.memory["params"] == 16 * GIB / found.mesh.tensor
    assert found.bytes_per_device == sum(found.memory.values()) <= 15 * GIB
    assert found.memory["workspace"] == max(found.decode.workspace_bytes, found.prefill.workspace_bytes)


@pytest.mark.parametrize("limits", [{}, {"tpot": 0.02}, {"ttft": 1.0, "tpot": 0.03}])
def test_the_most_users_are_the_last_that_do(limits):
    found = sized(32, **limits)
    load = Load(1, 4096, 256, limits.get("ttft", math.inf), limits.get("tpot", math.inf))
    phases = synthetic()

    def at(users):
        one = dataclasses.replace(load, users=users)
        return serve(one, phases, devices=8, budget_bytes=15 * GIB)

    fitting = found.most_fitting.users
    assert at(fitting) is not None
    assert at(math.ceil(fitting * 17 / 16) + 1) is None
    meeting = found.most_meeting.users
    assert at(meeting).meets(load)
    after = at(math.ceil(meeting * 17 / 16) + 1)
    assert after is None or not after.meets(load)


@settings(max_examples=30, deadline=None)
@given(users=st.integers(1, 200), ttft=st.floats(0.05, 5), tpot=st.floats(0.005, 0.2))
def test_more_users_or_tighter_limits_are_never_easier(users, ttft, tpot):
    load, phases = Load(users, 4096, 256, ttft, tpot), synthetic()

    def meets(load, devices=8):
        found = serve(load, phases if devices == 8 else synthetic(devices), devices=devices, budget_bytes=15 * GIB)
        return found is not None and found.meets(load)

    if not meets(load):
        assert not meets(dataclasses.replace(load, users=users + 8))
        assert not meets(dataclasses.replace(load, tpot_seconds=tpot / 2))
    else:
        assert meets(load, devices=16)


def test_longer_contexts_and_fewer_chips_hold_fewer_users():
    def most(context, devices):
        found = sized(8, context=context, devices=devices, per_user=context * 128 * 1024)
        return found.most_fitting.users if found.most_fitting else 0

    by_context = [most(context, 8) for context in (1024, 4096, 16384)]
    assert by_context == sorted(by_context, reverse=True)
    assert by_context[0] > by_context[-1]
    by_chips = [most(4096, devices) for devices in (1, 2, 4, 8)]
    assert by_chips == sorted(by_chips)
    assert by_chips[0] == 0 < by_chips[-1]


def test_what_does_not_fit_says_what_the_least_would_be():
    found = sized(4, budget=GIB)
    assert found.asked is found.most_fitting is found.most_meeting is None
    assert found.least_bytes > 16 * GIB / 8 > GIB
    assert found.by_mesh == ()


def test_the_guess_of_how_many_fit_is_close():
    exact = sized(8).most_fitting.users
    assert about_fitting(synthetic(), devices=8, budget_bytes=15 * GIB) == pytest.approx(exact, rel=0.1)


def test_a_users_chunk_is_kept():
    load = Load(16, 4096, 256, chunk_tokens=512)
    found = serve(load, synthetic(), devices=8, budget_bytes=15 * GIB)
    assert (found.chunk_tokens, found.chunks) == (512, 8)
    assert serve(Load(16, 256, 128, chunk_tokens=512), synthetic(), devices=8, budget_bytes=15 * GIB).chunks == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"users": 0}, "users=0"),
        ({"output_tokens": 4096}, "nearest: 4095"),
        ({"ttft_seconds": 0.0}, "above 0"),
        ({"tpot_seconds": math.nan}, "above 0"),
    ],
)
def test_a_load_that_means_nothing_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Load(**{"users": 8, "context_tokens": 4096, "output_tokens": 256, **fields})


# The command.


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=5", "ttft=5ms,ttft=6ms", "latency=5ms", "tpot=-1ms", "tpot=0ms", "ttft=1s,"]
)
def test_limits_that_cannot_be_read_are_refused(text):
    with pytest.raises(UsageError, match="--slo"):
        sizing.limits(text)


def run(capsys, *arguments):
    code = main(["plan", "--task", "serve", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SMALL = ("--model", "gpt2", "--cluster", "2xH100", "--context", "512", "--chunk-tokens", "128")


def test_steps_cost_what_the_planner_says_of_them(capsys, tmp_path):
    file = tmp_path / "sizing.json"
    code, out, _ = run(capsys, *SMALL, "--users", "64", "--json", "--fix", "tensor=2", "--out", str(file))
    assert code == 0
    assert json.loads(file.read_text()) == json.loads(out)
    # The server takes it for a plan, with its rows, their length, and the chunk.
    served = room_of(Room(plan=str(file)))
    assert (served.rows, served.length, served.chunk_tokens, served.plan.mesh.tensor) == (64, 512, 128, 2)
    assert (room_of(Room(plan=str(file), rows=8, length=64)).rows, room_of(Room(plan=str(file))).rows) == (8, 64)
    found = json.loads(out)
    assert found["label"] == "analytic"
    rows = found["asked"]["rows"]
    data = found["asked"]["mesh"]["data"]
    sizes = ("--seq-len", "512", "--global-batch", str(rows), "--fix", f"tensor=2,data={data}")
    assert main(["plan", "--task", "decode", "--model", "gpt2", "--cluster", "2xH100", "--json", *sizes]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert found["asked"]["decode_seconds"] == pytest.approx(planned["estimate"]["seconds_per_step"])
    assert found["asked"]["memory"]["cache"] == planned["estimate"]["memory"]["cache"]
    assert found["asked"]["memory"]["params"] == planned["estimate"]["memory"]["params"]
    # Twelve layers, keys and values of width 768, two bytes each.
    assert found["cache_bytes_per_user"] == 12 * 2 * 768 * 2 * 512
    assert found["asked"]["memory"]["cache"] == found["cache_bytes_per_user"] * rows / 2
    assert found["asked"]["bytes_per_device"] == sum(found["asked"]["memory"].values()) <= found["usable_bytes"]
    plan = Plan.from_json(json.dumps(found["plans"]["decode"]))
    assert plan.mesh.tensor == 2


def test_what_is_missed_is_said_with_what_would_help(capsys, tmp_path):
    file = tmp_path / "sizing.json"
    code, out, _ = run(
        capsys, *SMALL, "--users", "20000", "--output-tokens", "64", "--slo", "tpot=2ms", "--out", str(file)
    )
    assert code == 1
    for text in ("20,000 users", "most that fit", "context of 256", "4xH100, 2 times the devices"):
        assert text in out
    found = json.loads(file.read_text())
    assert not found["limits_hold"]
    assert found["most_within_limits"]["tpot_seconds"] <= 0.002
    assert found["most_within_limits"]["users"] < 20000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "gpt2"), "--users"),
        (("--model", "gpt2", "--users", "0"), "--users 0"),
        (("--model", "gpt2", "--users", "4", "--context", "4096"), "1024"),
        (("--model", "gpt2", "--users", "4", "--global-batch", "4"), "--users"),
        (("--model", "bert-base", "--users", "4", "--context", "128"), "only decoders"),
        (("--model", "gtp2", "--users", "4"), "gpt2"),
        (("--model", "gpt2", "--users", "4", "--output-tokens", "1024"), "no room"),
        (("--model", "gpt2", "--users", "4", "--fix", "tensor=3"), "divide"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, said):
    code, out, err = run(capsys, "--cluster", "8xH100", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_options_of_serving_are_for_serving(capsys):
    assert main(["plan", "--model", "gpt2", "--cluster", "8xH100", "--users", "4"]) == 2
    assert "--users is for --task serve" in capsys.readouterr().err
