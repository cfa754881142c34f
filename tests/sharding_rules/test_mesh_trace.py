"""Meshes and their names; functions as jaxprs with paths."""

import collections
import itertools
import subprocess
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType

from sharding_rules import AXES, BATCH_AXES, MeshShape, abstract, make_mesh, path_str, trace, tree_paths
from sharding_rules.inline import inline_calls
from sharding_rules.mesh import in_order


def test_a_mesh_has_all_axes_slowest_first_and_automatic():
    mesh = make_mesh(MeshShape(data=2, tensor=4))
    assert mesh.axis_names == AXES == ("data", "fsdp", "stage", "expert", "context", "tensor")
    assert dict(mesh.shape) == MeshShape(data=2, tensor=4).sizes
    assert set(mesh.axis_types) == {AxisType.Auto}
    # Neighbours in `tensor` are neighbours among the devices.
    assert [d.id for d in mesh.devices[0].flat] == [d.id for d in jax.devices()[:4]]


def test_order_of_axes_says_which_devices_are_neighbours():
    shape = MeshShape(data=2, fsdp=2, tensor=2)
    plain = make_mesh(shape)
    assert make_mesh(shape, order=("data", "fsdp", "tensor")) == plain
    turned = make_mesh(shape, order=("tensor", "fsdp", "data"))
    assert turned.axis_names == AXES
    assert dict(turned.shape) == shape.sizes
    numbers = jax.tree.map(lambda d: d.id, turned.devices.squeeze().tolist())
    # Next to each other along data, four apart along tensor.
    assert numbers == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]
    with pytest.raises(ValueError, match=r"order=.*is not the axes of the mesh data=8 that are larger than 1"):
        make_mesh(MeshShape(data=8), order=("tensor",))


def test_a_mesh_of_some_devices_uses_those():
    mesh = make_mesh(MeshShape(fsdp=2), jax.devices()[3:5])
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()[3:5]]


def device(platform, number, **where):
    return types.SimpleNamespace(platform=platform, id=number, **where)


def test_tpus_are_numbered_by_slice_and_coordinates_with_the_last_fastest():
    ids = itertools.count()
    # As the runtime lists them: x fastest, and here the second slice first.
    listed = [
        device("tpu", next(ids), slice_index=which, coords=[x, y, z], core_on_chip=core)
        for which, z, y, x, core in itertools.product((1, 0), range(2), range(4), range(2), range(2))
    ]
    at = [(d.slice_index, *d.coords, d.core_on_chip) for d in in_order(listed)]
    assert at == list(itertools.product(range(2), range(2), range(4), range(2), range(2)))


def test_gpus_are_numbered_by_slice_process_and_id():
    listed = [device("gpu", n, slice_index=n % 2, process_index=3 - n // 2, coords=[0, 0, 0]) for n in range(8)]
    assert [d.id for d in in_order(listed)] == [6, 4, 2, 0, 7, 5, 3, 1]
    alone = [device("gpu", n, process_index=0) for n in (2, 0, 1)]
    assert [d.id for d in in_order(alone)] == [0, 1, 2]


def test_cpu_devices_stay_as_they_are_given():
    assert in_order(jax.devices()[::-1]) == jax.devices()[::-1]
    assert in_order([]) == []


def test_a_mesh_of_another_size_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"mesh data=3 needs 3 devices, but 8 are there"):
        make_mesh(MeshShape(data=3))


def test_a_shape_knows_its_sizes():
    shape = MeshShape(data=2, fsdp=3, expert=2, tensor=4)
    assert shape.size == 48
    assert shape.batch_shards == 12
    assert set(BATCH_AXES) == {"data", "fsdp", "expert"}
    assert str(shape) == "data=2,fsdp=3,expert=2,tensor=4"
    assert str(MeshShape()) == "data=1"


def test_a_shape_is_read_from_text():
    assert MeshShape.parse(" data=2 , tensor=4,") == MeshShape(data=2, tensor=4)
    assert MeshShape.parse("") == MeshShape()


@pytest.mark.parametrize(
    "text, message",
    [
        ("tensr=4", "unknown mesh axis 'tensr' .* did you mean 'tensor'"),
        ("data=x", "write it as data=N"),
        ("data=0", "write it as data=N"),
        ("data=-1", "write it as data=N"),
        ("data", "write it as data=N"),
        ("data=2,data=4", "'data' twice"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        MeshShape.parse(text)


@pytest.mark.parametrize("size", [0, -2, 1.5, "2"])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="mesh axis 'fsdp' has size"):
        MeshShape(fsdp=size)


# Paths.

Point = collections.namedtuple("Point", "x y")


class Module(eqx.Module):
    weight: jax.Array
    inner: list


def test_paths_of_any_tree_are_written_alike():
    leaf = jnp.zeros(2)
    tree = {"layers": [{"attn": {"kernel": leaf}}, (leaf,)], "point": Point(leaf, None)}
    assert tree_paths(tree) == ["layers/0/attn/kernel", "layers/1/0", "point/x"]
    assert tree_paths(Module(leaf, [leaf, Point(leaf, leaf)])) == ["weight", "inner/0", "inner/1/x", "inner/1/y"]
    assert tree_paths(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == ["bias", "kernel"]
    assert tree_paths(leaf) == [""]
    assert path_str(()) == ""


# Tracing.


def test_tracing_needs_no_device_and_no_array():
    code = (
        "import jax, jax.numpy as jnp\n"
        "from sharding_rules import MeshShape, make_layout, trace\n"
        "def refuse(*a, **k): raise RuntimeError('a device was asked for')\n"
        "jax.devices = jax.local_devices = jax.device_put = refuse\n"
        "big = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)\n"
        "traced = trace(lambda params, batch: (batch @ params).mean(), big, big, names=('params', 'batch'))\n"
        "print(make_layout(traced, MeshShape(fsdp=1024), 'fsdp').bytes_per_device('params'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(2**40 * 4 // 1024), done.stderr


def test_arguments_are_found_by_name():
    params, batch = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}, jnp.ones((4, 2))
    traced = trace(lambda p, x: x @ p["a"] + p["b"][None], params, batch, names=("params", "batch"))
    assert traced.arg("batch") == jax.ShapeDtypeStruct((4, 2), jnp.float32)
    assert traced.arg_slice("params") == slice(0, 2)
    assert traced.arg_slice("batch") == slice(2, 3)
    assert traced.out.shape == (4, 3)


def test_names_must_be_as_many_as_arguments():
    with pytest.raises(ValueError, match=r"2 arguments but 1 names"):
        trace(jnp.dot, jnp.ones(2), jnp.ones(2), names=("params",))


def test_abstract_keeps_shapes_dtypes_and_keys():
    tree = abstract({"a": jnp.ones((2, 3), jnp.bfloat16), "key": jax.random.key(0), "n": jax.ShapeDtypeStruct((), int)})
    assert tree["a"] == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    assert jnp.issubdtype(tree["key"].dtype, jax.dtypes.prng_key)
    assert tree["n"].dtype == jnp.int32


# Calls written out.


def names_of(jaxpr):
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def test_calls_are_written_out_and_compute_the_same():
    double = jax.jit(lambda x: (2 * x, x))

    @jax.jit
    def twice(x):
        a, same = double(x)
        return double(a)[0] + same

    def fn(x):
        y, _ = jax.lax.scan(lambda c, _: (twice(c), None), x, length=3)
        return jax.checkpoint(twice)(y), double(y)[1]

    x = jnp.arange(4.0)
    closed = jax.make_jaxpr(fn)(x)
    written = inline_calls(closed)
    assert not set(names_of(written.jaxpr)) & {"jit", "pjit"}
    assert names_of(closed.jaxpr) != names_of(written.jaxpr)
    got, want = jaxpr_as_fun(written)(x), fn(x)
    assert all(jnp.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_custom_gradients_are_not_written_out():
    names = names_of(inline_calls(jax.make_jaxpr(jax.jit(jax.nn.relu))(jnp.ones(3))).jaxpr)
    assert len(names) == 1
    assert names[0].startswith("custom_jvp")
