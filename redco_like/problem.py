"""What there is to plan: a published architecture, a Hugging Face `config.json`, or a user's run file, traced.

    problem = load_problem("llama-3-70b", seq_len=8192, global_batch=1024, optimizer="adamw")
    problem = load_problem("path/to/config.json", seq_len=2048, global_batch=64)
    problem = load_problem("run.py")
    model = search.TracedModel(problem.traced, problem.opt_state, cluster)

A run file is Python with `get_config()`, which returns a dict or an object with `loss_fn`, `init_fn`, `optimizer`
(optax; else the one asked for by name), and either `batch` (a tree of arrays or `ShapeDtypeStruct`, the global batch)
or `collate_fn`, `examples` and `global_batch`. It may say `fused_attention=True` where its attention runs as a kernel
of its own; that of `redco_like.attention` is known. Nothing is allocated and no device is needed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pipelines.cached import CachedProgram, build_cached_program
from pipelines.functions import batch_rows
from pipelines.problem import abstract_init, cast_floats, split_trainable, trace_loss
from pipelines.train import TrainProgram, build_train_program
from redco_like.models import ModelConfig, architecture, architectures
from redco_like.models.hf import read_config
from redco_like.run_file import blamed, call_of_file
from search import Plan
from search.attention import runs_as_kernel
from sharding_rules import TracedFunction, abstract, trace

Task = Literal["train", "prefill", "decode"]
TASKS = ("train", "prefill", "decode")
DTYPES = ("float32", "bfloat16", "float16")
LEARNING_RATE = 1e-3  # any: only the shapes of the optimizer's state matter here


@dataclasses.dataclass(frozen=True)
class ModelProblem:
    """What a planner looks at.

    Attributes:
        name: the architecture's name, or the file's.
        traced: the loss on the global batch, with arguments params, batch, rng and state; for prefill and decode the
            inference function, with arguments params, batch and state (the cache).
        opt_state: shapes of the optimizer's state; None for prefill and decode.
        parameters: how many numbers the model holds.
        global_batch: examples per step; sequences for prefill and decode.
        seq_len: tokens of a sequence (T5: of the source and of the target); the length of the cache for decode; None
            where the batch has none.
        fused_attention: whether attention is to be counted as one kernel that keeps no scores in memory.
        source: where the model comes from.
        description: one line.
        task: what is traced.
        config: sizes of the architecture; None for a run file.
        build: (plan, mesh) -> the step as the runtime runs it: a program with `lower()`.
    """

    name: str
    traced: TracedFunction
    opt_state: Any
    parameters: int
    global_batch: int
    seq_len: int | None
    fused_attention: bool
    source: Literal["architecture", "hf-config", "run file"]
    description: str
    task: Task = "train"
    config: ModelConfig | None = None
    build: Callable[[Plan, Mesh], TrainProgram | CachedProgram] | None = dataclasses.field(default=None, repr=False)


def load_problem(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    seq_len: int | None = None,
    global_batch: int | None = None,
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    task: Task = "train",
) -> ModelProblem:
    """Trace a model for the planner.

    Args:
        model: an architecture's name, the path of a `config.json` (or of the folder that holds it), the path of a run
            file (`.py`), or a `ModelConfig`.
        seq_len: default the longest of the architecture. Not for a run file or for images, whose batch has its shapes.
        global_batch: examples per step; default for a run file what its batch has.
        optimizer: a name of `OPTIMIZERS`; a run file's own counts first.
        dtype: of the computation, and for prefill and decode of the weights and the cache.
        param_dtype: of the stored parameters in training.
        task: "train", or for decoders "prefill" (a whole prompt) or "decode" (one token after `seq_len` - 1).

    Raises:
        ValueError: something is unknown, missing or does not fit; one line that says what, and the nearest that works.
    """
    _check_name("task", task, TASKS)
    _check_name("dtype", dtype, DTYPES)
    _check_name("param_dtype", param_dtype, DTYPES)
    _check_name("optimizer", optimizer, OPTIMIZERS)
    for name, value in (("seq_len", seq_len), ("global_batch", global_batch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
    options = _Options(seq_len, global_batch, optimizer, dtype, param_dtype, task)
    if isinstance(model, ModelConfig):
        return _of_config(model, model.family, "architecture", options)
    name = os.fspath(model)
    if name in architectures():
        return _of_config(architecture(name), name, "architecture", options)
    path = Path(name).expanduser()
    if path.suffix == ".py":
        return _of_run_file(path, options)
    if path.suffix == ".json" or path.is_dir():
        path = path / "config.json" if path.is_dir() else path
        return _of_config(read_config(path), path.parent.name or path.stem, "hf-config", options)
    if path.exists():
        raise ValueError(f"{name} is neither a run file (.py) nor a Hugging Face configuration (.json)")
    return _of_config(architecture(name), name, "architecture", options)


@dataclasses.dataclass(frozen=True)
class _Options:
    seq_len: int | None
    global_batch: int | None
    optimizer: str
    dtype: str
    param_dtype: str
    task: Task


# Optimizers.


def make_optimizer(name: str, *, stacked: bool = False) -> optax.GradientTransformation:
    """An optimizer by name, for the shapes of its state.

    Args:
        stacked: whether layers are stacked as in `redco_like.models`: Muon then works on the last two dimensions of
            the layers' kernels, and Adam on everything else.

    Raises:
        ValueError: unknown; names the nearest.
    """
    _check_name("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](stacked)


def _muon(stacked: bool) -> optax.GradientTransformation:
    from optax.contrib import MuonDimensionNumbers, muon

    def matrices(params: Any) -> Any:
        def of(path: Any, leaf: Any) -> Any:
            layered = any(getattr(key, "key", "").endswith("layers") for key in path)
            return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if layered and leaf.ndim >= 3 else None

        return jax.tree_util.tree_map_with_path(of, params)

    return muon(LEARNING_RATE, muon_weight_dimension_numbers=matrices if stacked else None)


OPTIMIZERS: dict[str, Callable[[bool], optax.GradientTransformation]] = {
    "adamw": lambda _: optax.adamw(LEARNING_RATE),
    "adam": lambda _: optax.adam(LEARNING_RATE),
    "sgd": lambda _: optax.sgd(LEARNING_RATE),
    "momentum": lambda _: optax.sgd(LEARNING_RATE, momentum=0.9),
    "lion": lambda _: optax.lion(LEARNING_RATE),
    "adafactor": lambda _: optax.adafactor(LEARNING_RATE),
    "muon": _muon,
    "none": lambda _: optax.identity(),
}
"""Name -> a function of `stacked`."""


# Architectures.


def _of_config(
    config: ModelConfig, name: str, source: Literal["architecture", "hf-config"], options: _Options
) -> ModelProblem:
    from redco_like.models.model import build_model

    if options.global_batch is None:
        raise ValueError(f"{name}: global_batch is not given; say how many sequences (or images) a step takes")
    rows = options.global_batch
    if config.kind == "vision" and options.seq_len is not None:
        raise ValueError(f"{name} reads images of {config.image}x{config.image}: leave seq_len={options.seq_len} out")
    model = build_model(config, dtype=options.dtype)
    seq_len = None if config.kind == "vision" else model.check_length(options.seq_len)
    values = abstract_init(model.loss_fn, model.init_fn, options.param_dtype)
    opt_state = None
    if options.task == "train":
        batch = model.abstract_batch(rows, seq_len)
        traced = trace_loss(model.loss_fn, values, batch, training=True, compute_dtype=options.dtype)
        optimizer = make_optimizer(options.optimizer, stacked=True)
        build = functools.partial(build_train_program, model.loss_fn, model.init_fn, optimizer, batch)
        opt_state = jax.eval_shape(optimizer.init, split_trainable(values.params)[0])
    else:
        length = model.check_length(seq_len)
        cache = jax.eval_shape(lambda: model.init_cache(rows, length))
        params = cast_floats(values.params, options.dtype)
        batch = {"tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32)}
        function = _prefill_of(model)
        if config.kind == "encoder-decoder" and options.task == "prefill":
            # The source is what there is much of; the decoder has read one token when it is done.
            batch = {"source": batch["tokens"], "tokens": jax.ShapeDtypeStruct((rows, 1), jnp.int32)}
        if options.task == "decode":
            batch = {
                "tokens": jax.ShapeDtypeStruct((rows, 1), jnp.int32),
                "position": jax.ShapeDtypeStruct((), jnp.int32),
            }
            function = _decode_of(model)
            if config.kind == "encoder-decoder":
                from redco_like.models.encoder_decoder import read_by_decode

                params = read_by_decode(params)
        traced = trace(function, params, batch, cache, names=("params", "batch", "state"))
        build = functools.partial(build_cached_program, traced)
    parameters = _count(values.params)
    return ModelProblem(
        name=name,
        traced=traced,
        opt_state=opt_state,
        parameters=parameters,
        global_batch=rows,
        seq_len=seq_len,
        # One token's scores are small, whoever computes them.
        fused_attention=options.task == "decode" or runs_as_kernel(traced),
        source=source,
        description=_describe(config, name, parameters),
        task=options.task,
        config=config,
        build=build,
    )


def _prefill_of(model: Any) -> Callable[..., Any]:
    if model.config.kind == "encoder-decoder":
        return lambda params, batch, state: model.prefill(
            params, batch["tokens"], state, model.encode(params, batch["source"])
        )
    return lambda params, batch, state: model.prefill(params, batch["tokens"], state)


def _decode_of(model: Any) -> Callable[..., Any]:
    return lambda params, batch, state: model.decode(params, batch["tokens"], state, batch["position"])


def _describe(c: ModelConfig, name: str, parameters: int) -> str:
    layers = f"{c.layers}+{c.decoder_layers}" if c.decoder_layers else f"{c.layers}"
    heads = f"{c.heads} heads" if c.kv_heads == c.heads or c.latent else f"{c.heads} heads ({c.kv_heads} of keys)"
    hidden = f"hidden {c.mlp}"
    if e := c.experts:
        hidden = f"{e.count} experts of {e.mlp}, {e.per_token} per token"
    ends = f"{c.classes} classes" if c.kind == "vision" else f"vocabulary {c.vocab}"
    return (
        f"{name}: {_short(parameters)} parameters, {c.family} {c.kind}, {layers} layers, width {c.embed}, {heads}, "
        f"{hidden}, {ends}"
    )


def _count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


# Run files.


def _of_run_file(path: Path, options: _Options) -> ModelProblem:
    if options.task != "train":
        raise ValueError(f"{path}: task={options.task!r} is for decoders by name or config.json; a run file is trained")
    if options.seq_len is not None:
        raise ValueError(f"{path}: a run file brings its own batch; leave seq_len={options.seq_len} out")
    fields = _read_run_file(path)
    loss_fn, init_fn = _need(fields, "loss_fn", path), _need(fields, "init_fn", path)
    optimizer = fields("optimizer") or make_optimizer(options.optimizer)
    if not callable(getattr(optimizer, "init", None)):
        raise ValueError(
            f"{path}: optimizer is a {type(optimizer).__name__}, not an optax optimizer such as optax.adam"
        )
    with blamed(path):
        batch = _run_file_batch(fields, path, options.global_batch)
        values = abstract_init(loss_fn, init_fn, options.param_dtype)
        traced = trace_loss(loss_fn, values, batch, training=True, compute_dtype=options.dtype)
        opt_state = jax.eval_shape(optimizer.init, split_trainable(values.params)[0])
    rows = batch_rows(batch)
    parameters = _count(values.params)
    name = fields("name") or path.stem
    return ModelProblem(
        name=name,
        traced=traced,
        opt_state=opt_state,
        parameters=parameters,
        global_batch=rows,
        seq_len=_length_of(batch),
        fused_attention=bool(fields("fused_attention")) or runs_as_kernel(traced),
        source="run file",
        description=f"{name}: {_short(parameters)} parameters, from {path}",
        build=functools.partial(build_train_program, loss_fn, init_fn, optimizer, batch),
    )


def _length_of(batch: Any) -> int | None:
    """The second dimension of token ids, where a batch has some."""
    ids = [x for x in jax.tree.leaves(batch) if jnp.issubdtype(x.dtype, jnp.integer) and len(x.shape) == 2]
    return max((x.shape[1] for x in ids), default=None)


def _run_file_batch(fields: Callable[[str], Any], path: Path, global_batch: int | None) -> Any:
    """Shapes of the global batch; its rows are `global_batch` where that is given."""
    batch = fields("batch")
    if batch is None:
        for name in ("collate_fn", "examples"):
            if fields(name) is None:
                raise ValueError(
                    f"{path}: get_config() has no {name!r}; it returns `batch` (arrays or shapes of the global batch), "
                    "or `collate_fn`, `examples` and `global_batch`"
                )
        rows = global_batch or fields("global_batch")
        if rows is None:
            raise ValueError(f"{path}: get_config() has no 'global_batch', and none was given")
        examples = [example for example, _ in zip(fields("examples"), range(rows), strict=False)]
        if not examples:
            raise ValueError(f"{path}: `examples` is empty")
        batch, global_batch = fields("collate_fn")(examples), rows
    for leaf in jax.tree.leaves(batch):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(f"{path}: the batch holds a {type(leaf).__name__}; every leaf must be an array or a shape")
    shapes = abstract(batch)
    rows = global_batch or batch_rows(shapes)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), shapes)


def _read_run_file(path: Path) -> Callable[[str], Any]:
    """Run a file and its `get_config`; the result as a function from a name to a value or None."""
    config = call_of_file(path, "get_config", "a dict with loss_fn, init_fn, optimizer and batch")
    if isinstance(config, Mapping):
        return config.get
    if config is None or isinstance(config, str | int | float | list | tuple):
        raise ValueError(
            f"{path}: get_config() returned a {type(config).__name__}, not a dict or an object with fields"
        )
    return lambda field: getattr(config, field, None)


def _need(fields: Callable[[str], Any], name: str, path: Path) -> Any:
    if (value := fields(name)) is None:
        raise ValueError(
            f"{path}: get_config() has no {name!r}; it returns loss_fn, init_fn, optimizer, and batch "
            "(or collate_fn, examples and global_batch)"
        )
    return value


def _check_name(what: str, name: str, known: Any) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.4)
    hint = f"nearest: {near[0]}" if near else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")
