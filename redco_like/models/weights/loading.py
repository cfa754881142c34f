"""A Hugging Face folder as a model whose parameters lie where they are used.

    loaded = load("Llama-3.1-8B", plan="auto", dtype="bfloat16")
    logits, cache = loaded.model.prefill(loaded.params, tokens, cache)

Every process reads what its own devices hold, each range of a tensor once. Numbers go from a few megabytes of scratch
memory, transposed and converted on the way, straight into the shards.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import json
import logging
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from redco_like.models.architectures import architecture, architectures
from redco_like.models.config import ModelConfig
from redco_like.models.hf import read_config
from redco_like.models.weights.check import matched
from redco_like.models.weights.files import DTYPES, Tensor, WeightsError, folder_of, open_checkpoint
from redco_like.models.weights.layout import Placement, place
from redco_like.models.weights.names import Names
from redco_like.models.weights.read import Progress, read_into
from redco_like.models.weights.shards import Leaf, Transfers
from search import Plan
from sharding_rules import MeshShape, path_str

if TYPE_CHECKING:
    from redco_like.models.model import Model

logger = logging.getLogger("redco_like.models")

_STAGED_ABOVE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with parameters.

    Attributes:
        model: its functions, computing in the dtype that was asked for, else the checkpoint's.
        params: the parameters, sharded.
        config: its sizes.
        folder: where it comes from; None where the parameters are random and no folder was given.
        plan, mesh: how the parameters are laid out; None where no plan, or no mesh, was given.
    """

    model: Model
    params: Any
    config: ModelConfig
    folder: pathlib.Path | None
    plan: Plan | None = None
    mesh: Mesh | None = None


def load(
    source: str | os.PathLike[str] | ModelConfig,
    *,
    plan: Plan | str | pathlib.Path | None = None,
    mesh: Mesh | MeshShape | str | None = None,
    shardings: Any = None,
    dtype: str | None = None,
    random_seed: int | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Load a model. Every process of a run calls it with the same arguments.

    Args:
        source: a folder with `config.json` and `model.safetensors` (or an index and its files), on every host of a run.
            With `random_seed` also the name of an architecture, or a configuration.
        plan: "auto" (the fastest for decoding 16 sequences of up to 2048 tokens), the name of a preset such as "fsdp",
            a `Plan`, or the path of a plan file; None puts all of it on the first device, or on all of `mesh`.
        mesh: devices per axis: a `Mesh`, a `MeshShape` or text such as "data=2,tensor=4"; default what the plan says.
        shardings: instead of a plan, a tree of shardings like the parameters, or one for all of them.
        dtype: of parameters and computation; default for each parameter the checkpoint's.
        random_seed: make random parameters in place of those of a checkpoint.
        progress: called with (bytes read, bytes to read) of this process.

    Raises:
        WeightsError: no weights, or not those of this model; says which tensor, both shapes, and what is nearest.
        ValueError: a configuration that is not supported, or arguments that do not fit.
        PlanError: a plan that cannot be carried out.
    """
    if dtype is not None and jnp.dtype(dtype) not in {*DTYPES.values()} - {np.dtype(np.float64)}:
        raise ValueError(f"dtype={dtype!r} is not supported; supported: float32, bfloat16, float16")
    config, folder = _find(source, random_seed is not None)
    from redco_like.models.model import build_model  # Flax is imported when a model is built

    shapes = abstract_params(config)
    placing = functools.partial(place, config, list(shapes), plan=plan, mesh=mesh, shardings=shardings)
    if random_seed is not None:
        model = build_model(config, dtype=dtype or "float32")
        placement = placing(dtype=model.dtype)
        logger.warning("%s: the parameters are random (random_seed=%d)", folder or config.family, random_seed)
        params = _random(model, placement, random_seed)
        return Loaded(model, params, config, folder, placement.plan, placement.mesh)
    if folder is None:  # `_find` has refused this
        raise ValueError(f"{source} has no weights")
    tensors = open_checkpoint(folder)
    names = matched(config, tensors, folder)
    dtypes = leaf_dtypes(names, tensors, dtype)
    common = collections.Counter(dtypes.values()).most_common(1)[0][0]
    model = build_model(config, dtype=common.name)
    placement = placing(dtype=model.dtype)
    params = fill(shapes, dtypes, placement, names, tensors, progress=progress)
    return Loaded(model, params, config, folder, placement.plan, placement.mesh)


def fill(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, np.dtype],
    placement: Placement,
    names: Names,
    tensors: dict[str, Tensor],
    *,
    staged_above: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Read all parameters; a tree of dicts.

    Args:
        staged_above: parameters of which this process holds more bytes are put together on their devices; default
            256 MiB, and none for CPU devices, which share the host's memory.
    """
    platforms = {next(iter(sharding.device_set)).platform for sharding in placement.shardings.values()}
    if staged_above is None and platforms != {"cpu"}:
        staged_above = _STAGED_ABOVE_BYTES
    transfers, leaves = Transfers(), {}
    for path, shape in shapes.items():
        sharding, dtype = placement.shardings[path], dtypes[path]
        size = len(sharding.addressable_devices) * math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        staged = staged_above is not None and size > staged_above
        leaves[path] = Leaf(path, shape, dtype, sharding, staged=staged, transfers=transfers)
    read_into(leaves, names.pieces, tensors, progress=progress)
    return nested({path: leaf.array() for path, leaf in leaves.items()})


@functools.lru_cache(32)
def abstract_params(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by path."""
    from redco_like.models.model import build_model

    made = jax.eval_shape(build_model(config).init_fn, jax.eval_shape(jax.random.key, 0))
    return {path_str(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(made)}


def leaf_dtypes(names: Names, tensors: dict[str, Tensor], dtype: str | None) -> dict[str, np.dtype]:
    """The dtype of each parameter: the one asked for, else the widest of its tensors, of at most 32 bits."""
    found: dict[str, set[np.dtype]] = collections.defaultdict(set)
    for piece in names.pieces:
        found[piece.leaf].add(DTYPES[tensors[piece.tensor].dtype])
    narrow = {np.dtype(np.float64): np.dtype(np.float32)}

    def choose(kinds: set[np.dtype]) -> np.dtype:
        if dtype is not None:
            return jnp.dtype(dtype)
        kinds = {narrow.get(kind, kind) for kind in kinds}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    return {leaf: choose(kinds) for leaf, kinds in found.items()}


def nested(table: dict[str, Any]) -> Any:
    """A tree of dicts from a table by path.

    >>> nested({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in table.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _random(model: Model, placement: Placement, seed: int) -> Any:
    shardings = nested(dict(placement.shardings))
    dtype = jnp.dtype(model.dtype)

    def make(rng: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), model.init_fn(rng))

    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))


def _find(source: str | os.PathLike[str] | ModelConfig, random: bool) -> tuple[ModelConfig, pathlib.Path | None]:
    """The configuration, and the folder with weights.

    Raises:
        WeightsError: there is no such folder, or it has no weights; says how to get some.
    """
    if isinstance(source, ModelConfig):
        if not random:
            raise WeightsError(f"a configuration ({source.family}) has no weights: give a folder, or {_RANDOM}")
        return source, None
    folder = folder_of(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "no files"
            raise WeightsError(f"{folder} has no config.json; it has {there}")
        if not random:
            _refuse_quantised(folder / "config.json")
        return read_config(folder / "config.json"), folder
    name = os.fspath(source)
    if name in architectures():
        if not random:
            raise WeightsError(
                f"{name!r} is an architecture, which has sizes and no weights, and there is no folder of this name: "
                f"give the folder of a checkpoint, or {_RANDOM}"
            )
        return architecture(name), None
    if folder.exists():
        raise WeightsError(f"{folder} is a file; give the folder that holds config.json and the weights")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir():
        short = name.partition("/")[2]
        raise WeightsError(
            f"there is no folder {name!r}. If it is a model of the Hugging Face hub, download it first:\n"
            f"    huggingface-cli download {name} --local-dir {short}\n"
            f"and load {short!r}: nothing is downloaded here"
        )
    beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, [*beside, *architectures()], n=3)
    raise WeightsError(
        f"there is no folder {name!r}, and no architecture of this name"
        + (f"; nearest: {', '.join(near)}" if near else "")
    )


_RANDOM = "random_seed=0 for random parameters"


def _refuse_quantised(path: pathlib.Path) -> None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return  # `read_config` says what is wrong
    kept = data.get("quantization_config") if isinstance(data, dict) else None
    if kept:
        method = kept.get("quant_method", "unknown") if isinstance(kept, dict) else kept
        raise WeightsError(
            f"{path.parent} is quantised (quantization_config of method {method!r}): only float32, bfloat16 and "
            "float16 weights are read. Use the checkpoint it was made from"
        )
