"""Compiles the training step of a tiny decoder for v5e 2x4, in a process of its own; prints what the program has.

python tests/pipelines/attention_child.py data=2,context=2,tensor=2 dots
"""

import dataclasses
import json
import os
import re
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from tiny_architectures import tiny

from pipelines.train import build_train_program
from redco_like.models import build_model
from search import Plan
from sharding_rules import MeshShape, make_mesh

LENGTH = 2048


def main(mesh: str, remat: str) -> None:
    config = dataclasses.replace(tiny("llama-3-8b"), embed=256, mlp=512, head_dim=64, max_length=LENGTH)
    model, shape = build_model(config), MeshShape.parse(mesh)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    ids = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    plan = Plan(mesh=shape, preset="megatron", remat=remat, param_dtype="bfloat16", compute_dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    batch = {"tokens": ids, "labels": ids}
    program = build_train_program(
        lambda params, batch: model.loss_fn(params, batch),
        model.init_fn,
        optax.sgd(1e-3),
        batch,
        plan,
        make_mesh(shape, list(devices)),
    )
    text = program.lower().compile().as_text() or ""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}
    lengths = {LENGTH, LENGTH // shape.context}
    assert program.kernels.attention is not None
    found = {
        "choices": [choice.kernel for choice in program.kernels.attention.choices.values()],
        "kernels": sorted(set(re.findall(r"splash_mha_(fwd|dq|dkv)", text))),
        "scores": sorted(dims for dims in shapes if sum(size in lengths for size in dims) > 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
