"""Weights: every family goes out and comes back, on any mesh; views cover what they are views of."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tiny_architectures import DECODERS, make_params, tiny

from redco_like.models import WeightsError, build_model, from_hf, load, save
from redco_like.models.weights import read
from redco_like.models.weights.families import names_of
from redco_like.models.weights.files import open_checkpoint, read_header
from redco_like.models.weights.hf_config import to_hf
from redco_like.models.weights.layout import Placement
from redco_like.models.weights.loading import abstract_params, fill, leaf_dtypes, nested
from redco_like.models.weights.names import View, view
from redco_like.models.weights.scatter import parts, source_box
from redco_like.models.weights.shards import Leaf, Transfers
from sharding_rules import MeshShape, make_mesh, path_str

NAMES = (*DECODERS, "phi-3-mini", "qwen3-30b-a3b", "deepseek-v2-lite")


def params_of(config, seed=0):
    return make_params(build_model(config).init_fn, seed)


def assert_same(a, b):
    first, second = dict(flat(a)), dict(flat(b))
    assert first.keys() == second.keys()
    for path, x in first.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(second[path]), err_msg=path)


def flat(tree):
    return [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


# Views.


@pytest.mark.parametrize("name", NAMES)
def test_names_cover_every_leaf_and_every_tensor_once(name):
    config = tiny(name)
    shapes = abstract_params(config)
    count = {path: np.zeros(shape, np.int8) for path, shape in shapes.items()}
    tensors = {}
    for piece in names_of(config).pieces:
        place = count[piece.leaf][piece.at]
        assert place.shape == piece.view.shape, piece
        place += 1
        tensor = tensors.setdefault(piece.tensor, np.zeros(piece.shape, np.int8))
        assert tensor.shape == piece.shape
        piece.view.of(tensor)[...] += 1
    assert all((c == 1).all() for c in count.values())
    assert all((t == 1).all() for t in tensors.values())


@st.composite
def views(draw):
    """A tensor of one to three dimensions, each of up to three factors; some taken in part; any order."""
    groups = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    split = [size for group in groups for size in group]
    take = {}
    for i, size in enumerate(split):
        start = draw(st.integers(0, size - 1))
        take[i] = (start, draw(st.integers(start + 1, size)))
    kept = [i for i in range(len(split)) if take[i][1] - take[i][0] > 1 or draw(st.booleans())]
    kept = draw(st.permutations(kept or [0]))
    order, rest = [], list(kept)
    while rest:
        count = draw(st.integers(1, len(rest)))
        order.append(rest[:count])
        rest = rest[count:]
    return tuple(math.prod(group) for group in groups), view(split, order, take)


@settings(max_examples=200)
@given(views(), st.data())
def test_any_box_of_a_view_is_put_together_from_chunks_of_rows(made, data):
    shape, v = made
    tensor = np.arange(math.prod(shape)).reshape(shape)
    piece = v.of(tensor).reshape(v.shape)
    box = []
    for size in v.shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    box = tuple(box)
    needed = source_box(shape, v, box)
    unit = math.prod(v.split[i] for i in first_dimension(shape, v)[1:])
    step = unit * data.draw(st.integers(1, 3))
    out = np.full([b - a for a, b in box], -1)
    for start in range(*needed[0], step):
        rows = (start, min(start + step, needed[0][1]))
        have = (rows, *((0, n) for n in shape[1:]))
        for part in parts(shape, v, np.ascontiguousarray(tensor[slice(*rows)]), have, box):
            assert (out[part.within] == -1).all()
            out[part.within].reshape(part.source.shape)[...] = part.source
    np.testing.assert_array_equal(out, piece[tuple(slice(*b) for b in box)])


def first_dimension(shape, v: View):
    product, group = 1, []
    for i, size in enumerate(v.split):
        if product == shape[0] and size != 1:
            break
        group.append(i)
        product *= size
    return group


def test_views_share_the_tensors_memory():
    x = np.zeros((24, 8))
    v = view((4, 3, 2, 8), ((3,), (0, 2)), {1: (1, 2)})
    assert np.shares_memory(v.of(x), x)
    v.of(x)[...] = 1
    assert x.sum() == 8 * 4 * 2


# Out and back.


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_loaded_on_any_mesh(name, tmp_path):
    config = tiny(name)
    params = params_of(config)
    save(tmp_path / "whole", config, params)
    loaded = load(tmp_path / "whole")
    assert to_hf(loaded.config) == to_hf(config)
    assert_same(loaded.params, params)
    for mesh in (MeshShape(fsdp=8), MeshShape(data=2, tensor=4), MeshShape(fsdp=4, expert=2)):
        placed = load(tmp_path / "whole", shardings=shard_something(config, make_mesh(mesh)))
        assert_same(placed.params, params)
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed.params))
    save(tmp_path / "again", placed.model, placed.params, shard_bytes=20_000)
    assert_same(load(tmp_path / "again").params, params)
    files = sorted(p.name for p in (tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 1
    assert all((tmp_path / "again" / f).stat().st_size < 40_000 for f in files)


@st.composite
def configs(draw):
    """A family with sizes of its own, as uneven as they may be."""
    name = draw(st.sampled_from(NAMES))
    config = tiny(name)
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, head_dim = kv_heads * groups, 2 * draw(st.integers(2, 6))
    if config.kv_heads == config.heads or config.latent:
        kv_heads = heads
    embed = heads * head_dim
    changes = dict(heads=heads, kv_heads=kv_heads, layers=draw(st.integers(2, 3)), vocab=draw(st.integers(5, 70)))
    changes |= dict(embed=embed, head_dim=head_dim, mlp=draw(st.integers(1, 3)) * embed)
    if config.latent:
        changes |= dict(head_dim=config.head_dim)
    if config.rotary_dim:
        changes |= dict(rotary_dim=2)
    if config.family in ("llama", "qwen2", "mistral", "qwen3") and draw(st.booleans()):
        changes |= dict(tied=not config.tied, mlp=draw(st.integers(1, 80)))
    return tiny(name, **changes)


@settings(max_examples=15)
@given(
    configs(),
    st.sampled_from([MeshShape(), MeshShape(fsdp=2, tensor=4), MeshShape(data=4, expert=2)]),
    st.integers(1, 30),
)
def test_random_sizes_go_out_and_come_back(tmp_path_factory, config, mesh, files):
    folder = tmp_path_factory.mktemp("random") / "m"
    params = params_of(config)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    save(folder, config, params, shard_bytes=max(1, size // files))
    shardings = shard_something(config, make_mesh(mesh, jax.devices()[: mesh.size]))
    assert_same(load(folder, shardings=shardings).params, params)


def shard_something(config, mesh):
    """Shardings that cut dimensions here and there, experts and layers among them, as far as the sizes allow it."""
    axes = [axis for axis, size in mesh.shape.items() if size > 1]

    def sharding(number, shape):
        spec, left = [None] * len(shape), list(axes)
        for i in range(len(shape)):
            d = (i + number) % len(shape)
            if left and shape[d] % mesh.shape[left[0]] == 0:
                spec[d] = left.pop(0)
        return NamedSharding(mesh, P(*spec))

    return nested({path: sharding(i, shape) for i, (path, shape) in enumerate(abstract_params(config).items())})


@pytest.mark.parametrize(
    "name, plan, mesh",
    [
        ("llama-3-8b", "fsdp", "fsdp=8"),
        ("llama-3-8b", "data+megatron", "data=2,tensor=4"),
        ("mixtral-8x7b", "fsdp", "fsdp=4,expert=2"),
    ],
)
def test_plans_lay_parameters_out(name, plan, mesh, tmp_path):
    config = tiny(name)
    params = params_of(config)
    save(tmp_path / "m", config, params)
    loaded = load(tmp_path / "m", plan=plan, mesh=mesh)
    assert_same(loaded.params, params)
    assert (loaded.plan.preset, loaded.plan.mesh) == (plan, MeshShape.parse(mesh))
    whole = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded.params))
    assert first < 0.6 * whole


def test_parts_moved_to_devices_one_by_one_make_the_same_arrays(tmp_path):
    config = tiny("gpt2")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    tensors, names, shapes = open_checkpoint(tmp_path / "m"), names_of(config), abstract_params(config)
    mesh = make_mesh(MeshShape(tensor=2), jax.devices()[:2])
    placement = Placement(
        {path: NamedSharding(mesh, P(*(None,) * (len(s) - 1), "tensor")) for path, s in shapes.items()}
    )
    for dtype in ("bfloat16", "float32"):
        made = fill(shapes, leaf_dtypes(names, tensors, dtype), placement, names, tensors, staged_above=1500)
        assert_same(made, jax.tree.map(lambda x, kind=dtype: x.astype(jnp.dtype(kind)), params))


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16", None])
def test_dtypes_are_converted_on_the_way(kept, wanted, tmp_path):
    config = tiny("llama-3-8b")
    params = params_of(config)
    save(tmp_path / "m", config, params, dtype=kept)
    loaded = load(tmp_path / "m", dtype=wanted)
    assert loaded.model.dtype == (wanted or kept)
    expected = jax.tree.map(lambda x: x.astype(jnp.dtype(kept)).astype(jnp.dtype(wanted or kept)), params)
    assert_same(loaded.params, expected)


def test_leaves_of_several_dtypes_keep_theirs(tmp_path):
    config = tiny("llama-3-8b")
    params = params_of(config)
    params["embed"] = params["embed"].astype(jnp.bfloat16)
    save(tmp_path / "m", config, params)
    loaded = load(tmp_path / "m")
    assert (loaded.params["embed"].dtype, loaded.params["head"]["kernel"].dtype) == (jnp.bfloat16, jnp.float32)
    assert_same(loaded.params, params)


def test_safetensors_reads_what_is_written_and_the_other_way_round(tmp_path):
    from safetensors.numpy import load_file, save_file

    config = tiny("gpt-neox-20b")
    save(tmp_path / "m", config, params_of(config))
    theirs = load_file(tmp_path / "m" / "model.safetensors")
    assert {name: t.shape for name, t in theirs.items()} == {p.tensor: p.shape for p in names_of(config).pieces}
    (tmp_path / "n").mkdir()
    save_file(theirs, tmp_path / "n" / "model.safetensors")
    (tmp_path / "n" / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    assert_same(load(tmp_path / "n").params, load(tmp_path / "m").params)


def fuse_experts(file, config):
    """Write all experts of a layer as two tensors, as transformers has them in memory."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    for layer in range(config.layers):
        below = f"model.layers.{layer}.mlp.experts"
        taken = {
            kind: np.stack([tensors.pop(f"{below}.{e}.{kind}_proj.weight") for e in range(config.experts.count)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{below}.gate_up_proj"] = np.concatenate([taken["gate"], taken["up"]], axis=1)
        tensors[f"{below}.down_proj"] = taken["down"]
    save_file(tensors, file)


def test_fused_experts_are_read(tmp_path):
    config = tiny("qwen3-30b-a3b")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    fuse_experts(tmp_path / "m" / "model.safetensors", config)
    assert_same(load(tmp_path / "m", plan="fsdp", mesh="fsdp=4,expert=2").params, params)


def test_names_without_prefix_and_known_buffers_are_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    config = tiny("gpt2")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    file = tmp_path / "m" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
    tensors["h.0.attn.masked_bias"] = np.float32(-1e4).reshape(1)[0:1]
    tensors["lm_head.weight"] = np.asarray(tensors["wte.weight"]).copy()
    save_file(tensors, file)
    assert_same(load(tmp_path / "m").params, params)


def test_given_shardings_are_used(tmp_path):
    config = tiny("llama-3-8b")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    shardings = nested(
        {path: NamedSharding(mesh, P("tensor") if path == "embed" else P()) for path in abstract_params(config)}
    )
    placed = load(tmp_path / "m", shardings=shardings)
    assert placed.params["embed"].sharding.spec == P("tensor")
    assert_same(placed.params, params)
    last = SingleDeviceSharding(jax.devices()[-1])
    assert load(tmp_path / "m", shardings=last).params["embed"].devices() == {jax.devices()[-1]}
    everywhere = load(tmp_path / "m", mesh="data=8")
    assert everywhere.params["embed"].is_fully_replicated
    assert len(everywhere.params["embed"].devices()) == 8
    with pytest.raises(ValueError, match="leave plan and mesh out"):
        load(tmp_path / "m", shardings=last, mesh="data=8")
    with pytest.raises(ValueError, match="lacks"):
        load(tmp_path / "m", shardings={"embed": last})


def test_heads_may_be_cut_anywhere(tmp_path):
    config = tiny("gpt-neox-20b")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    mesh = make_mesh(MeshShape(tensor=8))
    cut = {
        "stack/layers/attention/q/kernel": P(None, None, "tensor"),
        "stack/layers/attention/k/bias": P(None, "tensor"),
    }
    shardings = nested({path: NamedSharding(mesh, cut.get(path, P())) for path in abstract_params(config)})
    assert_same(load(tmp_path / "m", shardings=shardings).params, params)


def test_donating_a_loaded_parameter_leaves_its_copies_alone(tmp_path):
    config = tiny("gpt2")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    table = load(tmp_path / "m", mesh="data=8").params["embed"]
    copies = [shard.data for shard in table.addressable_shards]
    first = jax.jit(lambda x: x * 0, donate_argnums=0)(copies[0])
    assert not np.asarray(first).any()
    np.testing.assert_array_equal(np.asarray(copies[1]), params["embed"])


def test_each_byte_is_read_once_however_many_devices_hold_it(tmp_path):
    config = tiny("gpt2")
    save(tmp_path / "m", config, params_of(config))
    seen = []
    load(tmp_path / "m", mesh="data=8", progress=lambda done, total: seen.append((done, total)))
    size = sum(tensor.bytes for tensor in open_checkpoint(tmp_path / "m").values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_only_the_shards_of_this_process_are_read(tmp_path):
    """As a process with two of eight devices sees it: a quarter of each sharded leaf."""
    config = tiny("llama-3-8b", embed=128, mlp=256, vocab=512)
    save(tmp_path / "m", config, params_of(config))
    tensors, names = open_checkpoint(tmp_path / "m"), names_of(config)
    shapes = abstract_params(config)
    mesh = make_mesh(MeshShape(fsdp=8))

    def rows_only(path, shape):
        # Parameters whose sharded dimension is the rows of the file.
        return (
            P(*(None,) * (len(shape) - 1), "fsdp") if path.endswith("kernel") else P("fsdp") if path == "embed" else P()
        )

    leaves = {
        path: Leaf(
            path,
            shape,
            np.dtype(np.float32),
            NamedSharding(mesh, rows_only(path, shape)),
            staged=False,
            transfers=Transfers(),
        )
        for path, shape in shapes.items()
    }
    for leaf in leaves.values():
        leaf.shards = leaf.shards[:2]
    kernels = {path for path in shapes if path.endswith("kernel") or path == "embed"}
    wanted = sum(leaf.local_bytes for path, leaf in leaves.items() if path in kernels)
    pieces = [piece for piece in names.pieces if piece.leaf in kernels]
    assert sum(block.bytes for block in read.blocks_of(leaves, pieces, tensors)) == wanted


@pytest.mark.parametrize("name", ["gpt-neox-20b", "qwen3-30b-a3b", "deepseek-v3"])
def test_small_chunks_of_some_columns_make_the_same_shards(name, tmp_path, monkeypatch):
    """As a process with two of four devices reads matrices that are large against what it reads at a time."""
    config = tiny(name)
    params = dict(flat(params_of(config)))
    save(tmp_path / "m", config, nested(params))
    fused = name.startswith("qwen3")
    if fused:
        fuse_experts(tmp_path / "m" / "model.safetensors", config)
    tensors = open_checkpoint(tmp_path / "m")
    names = names_of(config, tensors.keys())
    monkeypatch.setattr(read, "_RUN_BYTES", 1)
    monkeypatch.setattr(read, "CHUNK_BYTES", 200)
    mesh = make_mesh(MeshShape(tensor=4), jax.devices()[:4])
    for dimension in (-1, -2):
        leaves = {}
        for path, x in params.items():
            spec = [None] * x.ndim
            if x.ndim >= 2 and x.shape[dimension] % 4 == 0:
                spec[dimension] = "tensor"
            placed = NamedSharding(mesh, P(*spec))
            leaves[path] = Leaf(path, x.shape, x.dtype, placed, staged=False, transfers=Transfers())
            leaves[path].shards = leaves[path].shards[-2:]
        blocks = read.blocks_of(leaves, names.pieces, tensors)
        assert any(
            block.columns[1] - block.columns[0] < block.tensor.shape[1]
            for block in blocks
            if len(block.tensor.shape) > 1
        )
        read.read_into(leaves, names.pieces, tensors)
        for path, leaf in leaves.items():
            for shard in leaf.shards:
                box = tuple(slice(*b) for b in shard.box)
                np.testing.assert_array_equal(np.asarray(shard.arrays()[0]), params[path][box], err_msg=path)


# Configurations.


@pytest.mark.parametrize("name", NAMES)
def test_config_json_says_what_the_configuration_says(name):
    config = tiny(name)
    data = json.loads(json.dumps(to_hf(config, dtype="bfloat16")))
    assert to_hf(from_hf(data), dtype="bfloat16") == data
    assert data["architectures"]
    assert data["torch_dtype"] == "bfloat16"


def test_what_config_json_cannot_say_is_refused(tmp_path):
    config = tiny("llama-3-8b", window=4)
    with pytest.raises(ValueError, match=r"'llama' cannot say window=4 \(it would be read as 0\)"):
        save(tmp_path / "m", config, params_of(config))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"'llamma' \(did you mean 'llama'\?\)"):
        to_hf(tiny("llama-3-8b", family="llamma"))


def test_tokenizer_token_ids_and_settings_are_taken_over(tmp_path):
    config = tiny("llama-3-8b")
    params = params_of(config)
    first, second, third = (tmp_path / n for n in "abc")
    save(first, config, params)
    (first / "tokenizer.json").write_text("{}")
    (first / "generation_config.json").write_text('{"eos_token_id": 7}')
    (first / "notes.txt").write_text("not copied")
    data = json.loads((first / "config.json").read_text()) | {"eos_token_id": 7, "of_my_own": 1, "dtype": "bfloat16"}
    (first / "config.json").write_text(json.dumps(data))
    save(second, config, params, tokenizer_from=first)
    assert sorted(p.name for p in second.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    ]
    taken = json.loads((second / "config.json").read_text())
    assert (taken["of_my_own"], taken["torch_dtype"], "dtype" in taken) == (1, "float32", False)
    other = tiny("llama-3-8b", rope_theta=7.0)
    save(third, other, params, tokenizer_from=first)
    changed = json.loads((third / "config.json").read_text())
    assert (changed["eos_token_id"], changed["rope_theta"], "of_my_own" in changed) == (7, 7.0, False)
    with pytest.raises(WeightsError, match="has no tokenizer"):
        save(tmp_path / "d", config, params, tokenizer_from=second.parent)


# Without weights.


def test_random_parameters_are_made_on_request_only(tmp_path, caplog):
    config = tiny("llama-3-8b")
    with pytest.raises(WeightsError, match="no weights: give a folder, or random_seed=0"):
        load(config)
    with pytest.raises(WeightsError, match="'llama-3-8b' is an architecture, which has sizes and no weights"):
        load("llama-3-8b")
    one = load(config, random_seed=3, dtype="bfloat16")
    assert "random (random_seed=3)" in caplog.text
    many = load(config, random_seed=3, plan="fsdp", mesh="fsdp=8")
    assert one.params["embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(many.params["embed"].astype(jnp.bfloat16)), np.asarray(one.params["embed"])
    )
    assert not many.params["embed"].is_fully_replicated
    assert many.folder is None


def test_auto_plans_for_the_devices(tmp_path):
    config = tiny("llama-3-8b")
    params = params_of(config)
    save(tmp_path / "m", config, params)
    loaded = load(tmp_path / "m", plan="auto")
    assert loaded.plan.mesh.size == jax.device_count() == loaded.mesh.size
    assert_same(loaded.params, params)


def test_importing_models_imports_no_flax_and_no_safetensors():
    import subprocess
    import sys

    code = (
        "import sys, redco_like.models as m; m.load, m.save; "
        "heavy = {'flax', 'safetensors', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})


def test_headers_are_aligned(tmp_path):
    config = tiny("gpt2")
    save(tmp_path / "m", config, params_of(config))
    tensors = read_header(tmp_path / "m" / "model.safetensors")
    assert all(tensor.start % 8 == 0 for tensor in tensors.values())
