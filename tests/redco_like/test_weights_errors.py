"""Weights that are missing, damaged, of another model or too many: one clear error, and nothing half done."""

import errno
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_architectures import make_params, tiny

from redco_like.models import WeightsError, build_model, load, save
from redco_like.models.weights import saving
from redco_like.models.weights.files import open_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "llama"
    config = tiny("llama-3-8b")
    save(folder, config, make_params(build_model(config).init_fn))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def header_of(path: pathlib.Path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: pathlib.Path, header, body: bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def edit(folder: pathlib.Path, change):
    """Write the file again after `change(header)`, which may return the bytes to put behind those that are there."""
    path = folder / "model.safetensors"
    header, body = header_of(path)
    write(path, header, body + (change(header) or b""))


def change_config(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


# Damaged files.


def test_a_cut_off_file_names_the_first_tensor_that_is_lost(folder):
    path = folder / "model.safetensors"
    header, _ = header_of(path)
    last = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    os.truncate(path, path.stat().st_size - 1)
    words = re.escape(f"is cut off: tensor {last!r} of shape {tuple(header[last]['shape'])}")
    with pytest.raises(WeightsError, match=words + ".*download it again"):
        load(folder)
    os.truncate(path, 100)
    with pytest.raises(WeightsError, match=r"is cut off: its header is \d+ bytes, the file 100"):
        load(folder)
    os.truncate(path, 3)
    with pytest.raises(WeightsError, match="has 3 bytes: too few for a safetensors header"):
        load(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"{not json}", "damaged header: Expecting property name"),
        (b"\xff\xfe{}", "damaged header"),
        (b"[1, 2]", "damaged header: a list instead of an object"),
        (b'{"a": {"dtype": "F32"}}', "entry of tensor 'a' is damaged"),
        (b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', "entry of tensor 'a' is damaged"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "tensor 'a' of shape"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "takes 8 bytes, but the header gives it those",
        ),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "tensor 'a' of shape .* ends at byte"),
        (b'{"a": 3}', "entry of tensor 'a' is damaged"),
    ],
)
def test_a_bad_header_is_refused(text, words, folder):
    write(folder / "model.safetensors", text, b"")
    with pytest.raises(WeightsError, match=words):
        load(folder)


def test_what_is_no_safetensors_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a zip file, as torch writes them")
    with pytest.raises(WeightsError, match="does not begin as a safetensors file"):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(folder):
    tensor = max(open_checkpoint(folder).values(), key=lambda t: t.start)
    os.truncate(tensor.path, tensor.start + 4)
    out = np.empty(tensor.bytes, np.uint8)
    with tensor.open() as file, pytest.raises(WeightsError, match=f"the file ends inside tensor {tensor.name!r}"):
        _, C, _ = file.sizes
        file.read((0, tensor.shape[0]), (0, C), out)


# Other tensors than the model's.


def test_a_missing_tensor_is_named_with_the_nearest(folder):
    def rename(header):
        header["model.layers.1.mlp.up_projection.weight"] = header.pop("model.layers.1.mlp.up_proj.weight")

    edit(folder, rename)
    with pytest.raises(
        WeightsError,
        match=r"lacks tensor 'model.layers.1.mlp.up_proj.weight' of shape \(48, 32\), which llama .* nearest: "
        r"'model.layers.1.mlp.up_projection.weight'",
    ):
        load(folder)


def test_many_missing_tensors_are_counted(folder):
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(WeightsError, match=r"lacks tensor 'model.layers.2.* \(and 17 more\)"):
        load(folder)


def test_an_extra_tensor_is_named(folder):
    def add(header):
        header["model.layers.0.self_attn.q_proj.bias"] = {
            **{"dtype": "F32", "shape": [32]},
            "data_offsets": header["model.norm.weight"]["data_offsets"],
        }

    edit(folder, add)
    with pytest.raises(
        WeightsError, match=r"has tensor 'model.layers.0.self_attn.q_proj.bias' of shape \(32,\), which"
    ):
        load(folder)


def test_a_wrong_shape_says_both(folder):
    change_config(folder, intermediate_size=40)
    with pytest.raises(WeightsError, match=r"up_proj.weight'|gate_proj.weight'") as caught:
        load(folder)
    assert "has shape (48, 32)" in str(caught.value)
    assert "it is (40, 32)" in str(caught.value)


def test_ignored_are_only_known_buffers(folder):
    def add(header):
        place = header["model.norm.weight"]["data_offsets"]
        header["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"dtype": "F32", "shape": [32], "data_offsets": place}

    edit(folder, add)
    assert load(folder).params["embed"].shape == (56, 32)


# Quantised.


def test_quantised_checkpoints_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(WeightsError, match=r"is quantised .*'fp8'.*only float32, bfloat16 and float16"):
        load(folder)


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 1), ("I8", 1)])
def test_quantised_tensors_are_refused(dtype, size, folder):
    def change(header):
        entry = header["model.layers.0.mlp.up_proj.weight"]
        start = entry["data_offsets"][0]
        header["model.layers.0.mlp.up_proj.weight"] = {
            **entry,
            "dtype": dtype,
            "data_offsets": [start, start + size * 48 * 32],
        }

    edit(folder, change)
    with pytest.raises(WeightsError, match=f"'model.layers.0.mlp.up_proj.weight' is {dtype}: quantised"):
        load(folder)


def test_scales_of_quantised_tensors_are_recognised(folder):
    def change(header):
        place = header["model.norm.weight"]["data_offsets"]
        header["model.layers.0.mlp.up_proj.weight_scale_inv"] = {"dtype": "F32", "shape": [32], "data_offsets": place}

    edit(folder, change)
    with pytest.raises(WeightsError, match=r"up_proj.weight_scale_inv' is F32: quantised"):
        load(folder)


# Folders.


def test_an_unknown_architecture_lists_the_known_ones(folder):
    change_config(folder, model_type="lama")
    with pytest.raises(ValueError, match=r"'lama' is not supported \(did you mean 'llama'\?\); supported: .*qwen3_moe"):
        load(folder)
    change_config(folder, model_type=None)
    with pytest.raises(ValueError, match=r"has no model_type; supported: .*llama"):
        load(folder)


def test_a_folder_without_its_files_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(WeightsError, match=r"neither model.safetensors nor .*; it has config.json, consolidated.safe"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"pytorch_model.bin, a pickle, .*save_pretrained"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no config.json; it has consolidated.safetensors, pytorch_model.bin"):
        load(folder)


def test_a_missing_shard_says_what_is_lost(original, tmp_path):
    loaded = load(original)
    save(tmp_path / "m", loaded.model, loaded.params, shard_bytes=20_000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    lost = next(iter(open_checkpoint(tmp_path / "m").values())).name
    files[0].unlink()
    with pytest.raises(
        WeightsError, match=rf"lacks {files[0].name} of {len(files)} files .*tensor {lost!r} and \d+ more"
    ):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "index, words",
    [
        ("{", "cannot be read"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "names '../other/model.safetensors', which is no file"),
        ('{"weight_map": {"a": "model.safetensors"}}', "says that tensor 'a' is in model.safetensors, which does not"),
        ('{"weight_map": {"model.norm.wieght": "model.safetensors"}}', "nearest: 'model.norm.weight'"),
    ],
)
def test_a_bad_index_is_refused(index, words, folder):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=words):
        load(folder)


def test_a_name_of_the_hub_says_how_to_download_it():
    with pytest.raises(
        WeightsError, match=r"huggingface-cli download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B"
    ):
        load("meta-llama/Llama-3.1-8B")


def test_a_mistyped_folder_names_the_nearest(folder):
    with pytest.raises(WeightsError, match=r"there is no folder .*; nearest: m"):
        load(folder.parent / "mm")
    with pytest.raises(WeightsError, match="is a file; give the folder"):
        load(folder / "config.json")
    with pytest.raises(WeightsError, match=r"nearest: .*llama-3-8b"):
        load("llama3-8b")


def test_a_dtype_that_is_no_number_of_parameters_is_refused(folder):
    with pytest.raises(ValueError, match="dtype='int8' is not supported; supported: float32, bfloat16, float16"):
        load(folder, dtype="int8")


# Saving.


@pytest.fixture
def loaded(original):
    return load(original)


def test_a_full_disk_is_noticed_before_writing(loaded, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    monkeypatch.setattr(saving, "_SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2 + 1))
    with pytest.raises(WeightsError, match=r"GB free; dtype='bfloat16' takes .* GB; nothing was written"):
        save(tmp_path / "out", loaded.model, loaded.params)
    save(tmp_path / "half", loaded.model, loaded.params, dtype="bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fills_up_leaves_nothing_behind(number, loaded, tmp_path, monkeypatch):
    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    kind = WeightsError if number == errno.ENOSPC else OSError
    with pytest.raises(kind, match="disk .* is full: .*nothing was left behind" if kind is WeightsError else "error"):
        save(tmp_path / "out", loaded.model, loaded.params)
    assert not list(tmp_path.iterdir())


def test_a_save_that_is_interrupted_leaves_nothing_behind(loaded, tmp_path):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", loaded.model, loaded.params, progress=stop)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", loaded.model, loaded.params)
    with pytest.raises(WeightsError, match=r"exists and is not an empty folder; nearest: .*out-1"):
        save(tmp_path / "out", loaded.model, loaded.params)


def test_parameters_of_another_model_are_refused(loaded, tmp_path):
    params = loaded.params

    def refused(changed, words, config=loaded.config):
        with pytest.raises(ValueError, match=words):
            save(tmp_path / "out", config, changed)
        assert not list(tmp_path.iterdir())

    refused(
        {k: v for k, v in params.items() if k != "head"}, r"lack 'head/kernel' of shape \(32, 56\), which llama has"
    )
    refused({**params, "hed": params["embed"]}, "have 'hed', which llama has not; nearest: 'head/kernel'|'hed'")
    refused({**params, "embed": params["embed"].T}, r"'embed' has shape \(32, 56\); llama has it as \(56, 32\)")
    refused({**params, "embed": params["embed"].astype(jnp.int8)}, "'embed' is int8; written are float64, float32")
    refused(params, "lack 'stack/layers/attention/k/bias'", tiny("qwen2-7b"))
    with pytest.raises(ValueError, match="dtype='int4' is not supported"):
        save(tmp_path / "out", loaded.config, params, dtype="int4")
    with pytest.raises(ValueError, match="shard_bytes=0"):
        save(tmp_path / "out", loaded.config, params, shard_bytes=0)


def test_a_reader_that_fails_stops_the_others(folder):
    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        load(folder, progress=stop)
