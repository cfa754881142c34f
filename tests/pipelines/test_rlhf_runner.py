"""Execution plans that run: tasks in order, values between processes, roles that are lent, refused plans."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pipelines.rlhf import HostStep, Runner, ScoreStep, TrainStep, window_mesh
from pipelines.rlhf.exchange import pack, unpack
from pipelines.rlhf.roles import Roles, storage
from pipelines.rlhf.schedule import Stream, Task
from search import Plan
from search.rlhf import Call, CallPlan, ExecutionPlan, Graph, Window, Workload
from sharding_rules import DATA, FSDP, MeshShape, PlanError, make_mesh

# Tasks.


def nothing():
    pass


def run_tasks(tasks, *, waves=False):
    with Stream(waves=waves) as stream:
        stream.add(tasks)
        return stream.run(*(task.name for task in tasks))


def test_tasks_on_disjoint_devices_overlap():
    meet = threading.Barrier(2, timeout=20)  # broken unless both are inside at once
    spans = run_tasks([Task("a", frozenset({0}), meet.wait), Task("b", frozenset({1}), meet.wait)])
    assert [span.name for span in spans] == ["a", "b"]
    assert spans[0].start < spans[1].end and spans[1].start < spans[0].end  # noqa: PT018


def test_what_the_host_does_overlaps_and_stays_in_its_thread():
    meet, seen = threading.Barrier(2, timeout=20), []

    def on_host():
        seen.append(threading.current_thread())
        meet.wait()

    run_tasks([Task("score", frozenset({0}), meet.wait), Task("reward", frozenset(), on_host)])
    assert seen == [threading.main_thread()]


@given(
    st.lists(st.tuples(st.frozensets(st.integers(0, 3)), st.lists(st.integers(0, 9), max_size=2)), max_size=9),
    st.booleans(),
)
def test_tasks_keep_the_order_of_the_list_on_every_device(drawn, waves):
    began, lock = [], threading.Lock()
    busy: dict[int, str] = {}
    clashes = []

    def task(i, devices, after):
        def run():
            with lock:
                began.append(i)
                clashes.extend(device for device in devices if device in busy)
                busy.update(dict.fromkeys(devices, i))
            time.sleep(0.0002)
            with lock:
                for device in devices:
                    del busy[device]

        return Task(str(i), devices, run, tuple(str(j) for j in after if j < i))

    tasks = [task(i, devices, after) for i, (devices, after) in enumerate(drawn)]
    spans = {span.name: span for span in run_tasks(tasks, waves=waves)}
    assert sorted(began) == list(range(len(tasks)))
    assert not clashes
    for device in range(4):
        mine = [i for i in began if device in drawn[i][0]]
        assert mine == sorted(mine)
    for task_ in tasks:
        assert all(spans[name].end <= spans[task_.name].start for name in task_.after)


def test_a_task_that_fails_is_named_and_no_other_begins():
    began = []

    def fail():
        raise KeyError("gone")

    tasks = [
        Task("score", frozenset({0}), fail),
        Task("other", frozenset({1}), lambda: time.sleep(0.05)),
        Task("train", frozenset({0}), lambda: began.append(1), ("score",)),
    ]
    with pytest.raises(KeyError, match="gone") as caught:
        run_tasks(tasks)
    assert caught.value.__notes__ == ["while running 'score'"]
    assert not began
    with pytest.raises(ValueError, match="task 'a' waits for 'b', which is not before it"):
        run_tasks([Task("a", frozenset(), nothing, ("b",)), Task("b", frozenset(), nothing)])


def test_a_failure_leaves_what_was_added_before_it():
    """An iteration is finished though the next one, which was begun, has failed."""
    gate, began = threading.Event(), []

    def fail():
        gate.set()
        raise KeyError("gone")

    with Stream() as stream:
        stream.add(
            [Task("train 1", frozenset({1}), lambda: gate.wait(20)), Task("log 1", frozenset(), nothing, ("train 1",))]
        )
        stream.add(
            [
                Task("generate 2", frozenset({0}), fail),
                Task("train 2", frozenset({1}), lambda: began.append(1), ("generate 2",)),
            ]
        )
        assert [span.name for span in stream.run("train 1", "log 1")] == ["train 1", "log 1"]
        with pytest.raises(KeyError, match="gone"):
            stream.run("train 2")
        assert not began
        stream.cancel()
        stream.add([Task("train 3", frozenset({1}), lambda: began.append(3))])
        stream.run("train 3")
        assert began == [3]
        with pytest.raises(ValueError, match="no such tasks"):
            stream.run("train 4")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=8,
)


@given(values)
def test_values_survive_the_way_to_another_process(value):
    assert unpack(pack(value)) == value


def test_arrays_survive_the_way_to_another_process():
    for array in (np.arange(6, dtype=np.int32).reshape(2, 3), np.float32(1.1) * np.ones((0, 2), np.float32)):
        back = unpack(pack({"x": array}))["x"]
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)
    with pytest.raises(ValueError, match="a set cannot go to another process"):
        pack({"x": {1}})


# Roles.


def placed(devices, spec, shape=(8, 4), **mesh):
    mesh = make_mesh(MeshShape(**mesh), devices)
    return jax.device_put(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), NamedSharding(mesh, spec))


def test_roles_are_used_where_they_lie_and_copied_elsewhere():
    devices = jax.devices()
    x = placed(devices, P(FSDP), fsdp=8)
    roles = Roles({"actor": x})
    assert roles.same_layout("actor", x.sharding)
    roles.lend("actor", "score", x.sharding)
    assert roles.lent("score") is x
    there = NamedSharding(make_mesh(MeshShape(data=2), devices[4:6]), P(None, DATA))
    roles.lend("actor", "generate", there)
    copy = roles.lent("generate")
    assert copy.sharding == there
    roles.give_up("generate")
    with pytest.raises(KeyError):
        roles.lent("generate")
    x.delete()  # as a step that is given it does
    np.testing.assert_array_equal(copy, np.arange(32).reshape(8, 4))


def test_offloaded_roles_are_lent_from_the_host():
    x = placed(jax.devices()[:4], P(FSDP, DATA), fsdp=2, data=2)
    roles = Roles({"critic": x}, offloaded=("critic",))
    x.delete()
    assert not roles.same_layout("critic", x.sharding)
    there = NamedSharding(make_mesh(MeshShape(data=2), jax.devices()[5:7]), P(None, DATA))
    roles.lend("critic", "score", there)
    assert roles.lent("score").sharding == there
    np.testing.assert_array_equal(roles.lent("score"), np.arange(32).reshape(8, 4))
    back = roles.home("critic")
    assert back.sharding == x.sharding
    np.testing.assert_array_equal(back, np.arange(32).reshape(8, 4))


def test_checkpoints_are_spread_over_all_devices():
    form = {
        name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in {"a": (3, 16), "b": (24, 8), "c": ()}.items()
    }
    specs = {name: tuple(sharding.spec) for name, sharding in storage(form, jax.devices()).items()}
    assert specs == {"a": (None, FSDP), "b": (FSDP,), "c": ()}


# The runner, on a graph of its own: a scorer and a learner of one role, and a teacher beside them.

GRAPH = Graph(
    "toy",
    ("batch",),
    (
        Call("guess", "learner", "score", ("batch",), ("guesses",)),
        Call("teach", "teacher", "score", ("batch",), ("answers",)),
        Call("learn", "learner", "train", ("batch", "guesses", "answers")),
    ),
)
BATCH = {"x": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)}
WEIGHTS = {"learner": {"w": np.zeros((4, 2), np.float32)}, "teacher": {"w": np.ones((4, 2), np.float32)}}


def apply(params, batch):
    return batch["x"] @ params["w"]


def loss(params, batch):
    return ((apply(params, batch) - batch["answers"]) ** 2).mean()


def toy(where, *, devices=None, offloaded=(), hosts=None, params=WEIGHTS, drop=None):
    calls = tuple(
        CallPlan(name, Window(*where[name][:2]), Plan(MeshShape(**where[name][2]), where[name][3])) for name in where
    )
    last = max(plan.window.end for plan in calls)
    execution = ExecutionPlan(
        GRAPH, Workload(8, 1, 1), dict.fromkeys(GRAPH.roles, "toy"), "8 CPU devices", last, calls, offloaded=offloaded
    )
    devices = jax.devices() if devices is None else devices
    forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (BATCH, WEIGHTS))
    steps = {}
    for plan in calls[: 0 if drop == "steps" else None]:
        mesh = window_mesh(plan, devices)
        call = GRAPH.call(plan.call)
        params_form = forms[1][call.role]
        if call.kind == "train":
            batch = forms[0] | {"answers": jax.ShapeDtypeStruct((8, 2), np.float32)}
            steps[call.name] = TrainStep(
                loss, params_form, optax.sgd(0.1), batch, plan.plan, mesh, reads="lesson", minibatches=2
            )
        else:
            steps[call.name] = ScoreStep(
                apply, params_form, forms[0], plan.plan, mesh, reads="batch", writes=call.writes[0]
            )
    if hosts is None:
        hosts = (HostStep("prepare", ("batch", "answers"), ("lesson",), prepare),)
    return Runner(execution, steps, params, hosts=hosts, devices=devices)


def prepare(data, iteration):
    return {"lesson": {**data["batch"], "answers": data["answers"]}}


ALONE = {name: (0, 1, {}, "data") for name in ("guess", "teach", "learn")}
APART = {
    "guess": (0, 4, {"data": 4}, "data"),
    "teach": (4, 2, {"fsdp": 2}, "fsdp"),
    "learn": (2, 4, {"fsdp": 2, "data": 2}, "fsdp+data"),
}


def run(runner, iterations=2):
    return [runner.iteration({"batch": BATCH}, i + 1) for i in range(iterations)]


def test_a_graph_on_windows_equals_one_device_with_roles_at_home_or_on_the_host():
    alone = toy(ALONE)
    there = run(alone)
    assert np.abs(there[1].data["guesses"]).max() > 0.1  # the second guess is that of the learner as trained
    for offloaded in ((), ("learner", "teacher")):
        apart = toy(APART, offloaded=offloaded)
        here = run(apart)
        for a, b in zip(there, here, strict=True):
            np.testing.assert_allclose(b.data["guesses"], a.data["guesses"], atol=1e-6)
            assert b.metrics["learn"]["loss"] == pytest.approx(a.metrics["learn"]["loss"], abs=1e-6)
        np.testing.assert_allclose(apart.params("learner")["w"], alone.params("learner")["w"], atol=1e-6)
        moves = [ran.what for ran in here[1].ran if ran.kind in ("reallocate", "onload", "offload")]
        assert moves == (
            [
                "learner: host -> guess",
                "teacher: host -> teach",
                "learner: host -> learn",
                "learner: learn -> host",
            ]
            if offloaded
            else ["learner: learn -> guess"]
        )
    assert [ran.what for ran in there[0].ran] == ["guess", "teach", "prepare", "learn"]  # nothing moved
    # Iterations that overlap are the same.
    ahead = toy(APART)
    ahead.begin({"batch": BATCH}, 1)
    ahead.begin({"batch": BATCH}, 2)
    for a in there:
        np.testing.assert_allclose(ahead.finish().data["guesses"], a.data["guesses"], atol=1e-6)
    with pytest.raises(ValueError, match="no iteration was begun"):
        ahead.finish()
    ahead.close()
    # Another plan goes on where this one is.
    apart.set_state(alone.state)
    np.testing.assert_array_equal(apart.params("learner")["w"], alone.params("learner")["w"])


def test_plans_and_steps_that_do_not_fit_are_refused():
    with pytest.raises(PlanError, match="call 'teach' runs on devices 4-5, but there are 4"):
        toy(APART, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="call 'guess' has no step"):
        toy(ALONE, drop="steps")
    with pytest.raises(ValueError, match="role 'teacher' has no parameters; there are those of learner"):
        toy(ALONE, params={"learner": WEIGHTS["learner"]})
    with pytest.raises(ValueError, match="'learn' reads 'lesson', which nothing writes; there are"):
        toy(ALONE, hosts=()).iteration({"batch": BATCH}, 1)
    with pytest.raises(ValueError, match="two steps are named 'guess'"):
        toy(ALONE, hosts=(HostStep("guess", (), ("lesson",), prepare),))
    with pytest.raises(ValueError, match="'lesson' is written by 'b' and 'a'"):
        toy(ALONE, hosts=(HostStep("a", (), ("lesson",), prepare), HostStep("b", (), ("lesson",), prepare)))
    with pytest.raises(ValueError, match="did not write 'lesson'"):
        toy(ALONE, hosts=(HostStep("a", ("answers",), ("lesson",), lambda data, i: {}),)).iteration({"batch": BATCH}, 1)
    with pytest.raises(PlanError, match="is not on the devices of its window 0-0"):
        Runner(toy(ALONE).execution, toy(APART).steps, WEIGHTS)


def test_a_call_that_computes_in_less_is_sent_less():
    devices = jax.devices()
    home = make_mesh(MeshShape(fsdp=4), devices[:4])
    away = make_mesh(MeshShape(tensor=2), devices[4:6])
    weights = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    params = {
        "w": jax.device_put(weights, NamedSharding(home, P("fsdp"))),
        "n": jax.device_put(3, NamedSharding(home, P())),
    }
    there = {"w": NamedSharding(away, P(None, "tensor")), "n": NamedSharding(away, P())}
    roles = Roles({"actor": params})
    roles.lend("actor", "wide", there)
    roles.lend("actor", "narrow", there, "bfloat16")
    wide, narrow = roles.lent("wide"), roles.lent("narrow")
    assert (wide["w"].dtype, narrow["w"].dtype, narrow["n"].dtype) == (jnp.float32, jnp.bfloat16, params["n"].dtype)
    assert narrow["w"].sharding == there["w"]
    np.testing.assert_array_equal(narrow["w"], weights.astype(jnp.bfloat16))
    np.testing.assert_array_equal(wide["w"], weights)
    sent = {call: predicted.sent_bytes for (_, call), predicted in roles.predicted.items()}
    assert sent["wide"] - sent["narrow"] == weights.nbytes / 2
    # Where nothing moves, nothing is cast: the arrays are used as they are.
    roles.lend("actor", "home", jax.tree.map(lambda x: x.sharding, params), "bfloat16")
    assert roles.lent("home")["w"] is params["w"]


def test_a_move_is_checked_the_first_time():
    devices = jax.devices()
    params = {
        "w": jax.device_put(
            np.ones((8, 8), np.float32), NamedSharding(make_mesh(MeshShape(fsdp=2), devices[:2]), P("fsdp"))
        )
    }
    there = {"w": NamedSharding(make_mesh(MeshShape(fsdp=2), devices[2:4]), P(None, "fsdp"))}
    roles = Roles({"actor": params})
    checked = []
    for _ in range(2):
        move = roles._moves.get(("actor", "generate"))
        checked.append(move is None or move.verify)
        roles.lend("actor", "generate", there)
        np.testing.assert_array_equal(roles.lent("generate")["w"], np.ones((8, 8)))
        roles.give_up("generate")
    assert checked == [True, False]
