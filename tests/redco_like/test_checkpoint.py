"""Checkpoints: any mesh, best and latest, damage and other models named, a killed save harmless."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from redco_like.checkpoint import CheckpointError, CheckpointStore
from sharding_rules import DATA, FSDP, TENSOR, MeshShape, make_mesh

SAVED_ON, READ_ON = MeshShape(fsdp=8), MeshShape(data=2, tensor=4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def make_state(value=1.0, width=8):
    mesh = make_mesh(SAVED_ON)
    rows = NamedSharding(mesh, P(FSDP))
    params = {
        "layers": [{"kernel": jax.device_put(jnp.full((16, width), float(value)), rows)} for _ in range(2)],
        "scale": jax.device_put(jnp.full(3, value, jnp.bfloat16), NamedSharding(mesh, P())),
    }
    key = jax.device_put(jax.random.key(3), NamedSharding(mesh, P()))
    step = jax.device_put(jnp.int32(5), NamedSharding(mesh, P()))
    opt = optax.adam(1e-3).init(params)
    return {"step": step, "params": params, "opt": opt, "rng": key, "epoch": 2, "host": np.arange(3)}


def abstract_on(state, shape):
    mesh = make_mesh(shape)

    def leaf(x):
        if not isinstance(x, jax.Array):
            return x
        spec = P(DATA, TENSOR) if x.ndim == 2 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, state)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_comes_back_on_another_mesh(folder, asynchronous):
    state = make_state()
    with CheckpointStore(folder, asynchronous=asynchronous) as store:
        assert store.save(5, state, metrics={"loss": 1.5}, plan_json='{"preset": "data"}', data_state={"step": 5})
    with CheckpointStore(folder) as store:
        back = store.restore(abstract_on(state, READ_ON))
        record = store.metadata()
    assert_equal(back, state)
    assert back["params"]["layers"][1]["kernel"].sharding.spec == P(DATA, TENSOR)
    assert isinstance(back["epoch"], int)
    assert isinstance(back["host"], np.ndarray)
    assert (record["step"], record["plan"], record["data_state"]) == (5, {"preset": "data"}, {"step": 5})
    assert record["arrays"]["params/layers/0/kernel"] == {"shape": [16, 8], "dtype": "float32"}
    assert record["versions"]["jax"] == jax.__version__


def test_part_of_a_state_is_read_by_prefix_and_cast(folder):
    state = make_state()
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state["params"])
    with CheckpointStore(folder) as store:
        store.save(5, state)
        params = store.restore(wanted, prefix="params")
        assert params["layers"][0]["kernel"].dtype == jnp.bfloat16
        with pytest.raises(CheckpointError, match="params/other: saved nothing, wanted"):
            store.restore({**wanted, "other": wanted["scale"]}, prefix="params")


def test_latest_and_best_are_kept_and_nan_is_never_best(folder):
    with CheckpointStore(folder, keep=2, best_metric="loss") as store:
        for step, loss in enumerate((3.0, 1.0, 2.0, float("nan"), 2.5)):
            store.save(step, make_state(step), metrics={"loss": loss})
        assert (store.latest_step(), store.best_step()) == (4, 1)
    with CheckpointStore(folder, keep=2, best_metric="loss") as store:
        assert store.steps() == [1, 3, 4]
        wanted = abstract_on(make_state(), READ_ON)
        assert float(store.restore(wanted, "best")["params"]["layers"][0]["kernel"][0, 0]) == 1
        assert float(store.restore(wanted)["params"]["layers"][0]["kernel"][0, 0]) == 4
        assert store.metadata(3)["metrics"] == {"loss": None}


def test_best_mode_max_takes_the_largest(folder):
    with CheckpointStore(folder, keep=1, best_metric="accuracy", best_mode="max") as store:
        for step, accuracy in enumerate((0.2, 0.9, 0.5)):
            store.save(step, {"w": jnp.ones(2)}, metrics={"accuracy": accuracy})
        store.wait()
        assert (store.best_step(), store.steps()) == (1, [1, 2])


def test_state_may_be_donated_while_it_is_written(folder):
    state = {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}
    expected = np.array(state["w"])
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with CheckpointStore(folder) as store:
        store.save(1, state)
        jax.block_until_ready(overwrite(state))
        np.testing.assert_array_equal(store.restore({"w": np.zeros((1024, 1024), np.float32)})["w"], expected)


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_truncated_checkpoint_names_the_last_whole_step(folder, harm, sealed):
    state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    with CheckpointStore(folder, keep=3) as store:
        for step in (10, 20, 30):
            store.save(step, state)
    if not sealed:  # killed between the commit and the list of files
        (folder / "30" / "files.json").unlink()
    victim = largest_file(folder / "30" / "state")
    os.truncate(victim, victim.stat().st_size // 2) if harm == "cut" else victim.unlink()
    with CheckpointStore(folder) as store:
        message = r"checkpoint 30 in .* is damaged: .*restore step 20, the last whole one"
        with pytest.raises(CheckpointError, match=message):
            store.restore(state)
        np.testing.assert_array_equal(store.restore(state, 20)["w"], state["w"])


def test_every_checkpoint_damaged_is_said(folder):
    with CheckpointStore(folder) as store:
        store.save(10, {"w": jnp.ones(4)})
    (folder / "10" / "metadata" / "metadata").write_text("{")
    with CheckpointStore(folder) as store, pytest.raises(CheckpointError, match="no earlier one is whole"):
        store.restore({"w": jnp.ones(4)})


def test_another_model_is_refused_before_arrays_are_read(folder):
    with CheckpointStore(folder) as store:
        store.save(7, make_state())
        other = abstract_on(make_state(width=4), READ_ON)
        other["params"]["bias"] = other["params"].pop("scale")
        with pytest.raises(CheckpointError, match="holds another model") as caught:
            store.restore(other)
    message = str(caught.value)
    assert "params/layers/0/kernel: saved float32[16, 8], wanted float32[16, 4]" in message
    assert "params/bias: saved nothing, wanted bfloat16[3]" in message
    assert message.count("saved") == 6 + message.count("that was saved")
    assert "more" in message


def test_missing_checkpoints_are_named(folder):
    with CheckpointStore(folder) as store:
        assert (store.latest_step(), store.best_step()) == (None, None)
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            store.restore({})
        store.save(7, {"w": jnp.ones(2)})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 .*there are \[7\]"):
            store.restore({"w": jnp.ones(2)}, 8)
        with pytest.raises(CheckpointError, match="has a finite metric"):
            store.restore({"w": jnp.ones(2)}, "best")


def test_steps_of_an_earlier_run_are_set_aside_and_not_lost(folder):
    with CheckpointStore(folder, best_metric="loss") as store:
        store.save(50, {"w": jnp.ones(2)}, metrics={"loss": 0.1})
    with CheckpointStore(folder, best_metric="loss") as store:
        store.save(10, {"w": jnp.zeros(2)}, metrics={"loss": 9.0})
        store.wait()
        assert (store.steps(), store.best_step()) == ([10], 10)
    assert [path.name for path in (folder / "set-aside").glob("*/*")] == ["50"]


def test_going_back_to_an_earlier_step_sets_the_later_ones_aside(folder):
    with CheckpointStore(folder, keep=5) as store:
        for step in (10, 20, 30):
            store.save(step, {"w": jnp.full(2, float(step))})
    with CheckpointStore(folder, keep=5) as store:
        assert float(store.restore({"w": np.zeros(2, np.float32)}, 20)["w"][0]) == 20
        store.save(30, {"w": jnp.full(2, 31.0)})
        assert float(store.restore({"w": np.zeros(2, np.float32)}, 30)["w"][0]) == 31
        assert store.steps() == [10, 20, 30]


def test_saving_a_step_twice_is_no_error(folder):
    with CheckpointStore(folder) as store:
        assert store.save(10, {"w": jnp.ones(2)})
        assert not store.save(10, {"w": jnp.ones(2)})


def test_what_cannot_be_saved_is_named(folder):
    with CheckpointStore(folder) as store, pytest.raises(ValueError, match="holds a str"):
        store.save(1, {"name": "x"})


def test_metadata_is_strict_json_and_nothing_is_pickled(folder):
    with CheckpointStore(folder) as store:
        store.save(1, make_state(), metrics={"loss": float("inf")})
    for name in ("metadata/metadata", "files.json"):
        json.loads((folder / "1" / name).read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert not [f for f in folder.rglob("*") if f.suffix in (".pkl", ".pickle")]


KILLED = """
import sys, jax, jax.numpy as jnp
from redco_like.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1], keep=3)
state = {f"w{i}": jax.random.normal(jax.random.key(i), (1024, 1024)) for i in range(12)}
store.save(1, state); store.wait()
print("saved", flush=True)
for step in range(2, 1000):
    store.save(step, state)
    print("step", step, flush=True)
"""


def test_process_killed_during_a_save_leaves_whole_checkpoints(folder):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("step 3"):
                break
        deadline = time.monotonic() + 60
        while not (half := [path for path in folder.iterdir() if "tmp" in path.name]):
            assert time.monotonic() < deadline, "the child saved nothing more"
        child.send_signal(signal.SIGKILL)
    assert half
    wanted = {f"w{i}": np.zeros((1024, 1024), np.float32) for i in range(12)}
    with CheckpointStore(folder, keep=3) as store:
        steps = store.steps()
        assert steps
        for step in steps:
            back = store.restore(wanted, step)
            np.testing.assert_array_equal(back["w3"], jax.random.normal(jax.random.key(3), (1024, 1024)))
        store.save(max(steps) + 1, wanted)
