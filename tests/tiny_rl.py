"""A small problem of reinforcement learning: random prompts, a reward of tokens, plans on unequal windows."""

import functools

import jax
import numpy as np
import optax
from tiny_architectures import make_params, tiny

from redco_like import Deployer, SamplingParams
from redco_like import rlhf as rl
from redco_like.models import build_model
from search import Plan
from search.rlhf import CallPlan, ExecutionPlan, Window, Workload
from sharding_rules import MeshShape

PROMPTS = list(range(24))
PROMPT_TOKENS, NEW_TOKENS = 5, 6

UNEQUAL = {
    "generate": (Window(0, 4), "data+megatron", {"data": 2, "tensor": 2}),
    "reference": (Window(0, 2), "fsdp", {"fsdp": 2}),
    "critic": (Window(4, 4), "data+megatron", {"data": 2, "tensor": 2}),
    "train_actor": (Window(0, 8), "fsdp", {"fsdp": 8}),
    "train_critic": (Window(4, 4), "fsdp", {"fsdp": 4}),
}
"""Generation on half of the devices, the critic on the other half, the actor trained on all: parameters move."""
BOTH_PROCESSES = UNEQUAL | {"generate": (Window(0, 8), "data+megatron", {"data": 4, "tensor": 2})}
"""The same with generation on all, for two processes of four devices."""


@functools.cache
def made():
    model = build_model(tiny("llama-3-8b", max_length=48), dtype="float32")
    return model, make_params(model.init_fn)


def collate(prompts):
    return [tuple((7 * p + i * i) % 50 for i in range(2 + p % 4)) for p in prompts]


def reward(prompts, completions):
    return [len(set(tokens)) / len(tokens) + 0.1 * (tokens[0] % 3) for tokens in completions]


def deployer_of(devices, workdir=None):
    deployer = Deployer(workdir, compile_cache=False)
    deployer.devices = deployer.devices[:devices]
    return deployer


def execution_of(algorithm, prompts, where, offloaded=()):
    graph = algorithm.graph(reward_model=False)
    a = algorithm
    workload = Workload(prompts, PROMPT_TOKENS, NEW_TOKENS, a.samples, a.minibatches, a.epochs)
    calls = [CallPlan(name, w, Plan(MeshShape(**mesh), preset)) for name, (w, preset, mesh) in where.items()]
    order = {name: i for i, name in enumerate(graph.order)}
    calls = sorted((plan for plan in calls if plan.call in order), key=lambda plan: order[plan.call])
    models = dict.fromkeys(graph.roles, "tiny")
    return ExecutionPlan(graph, workload, models, "8 CPU devices", 8, tuple(calls), offloaded=tuple(offloaded))


def trainer_of(algorithm, *, devices=1, workdir=None, plan="colocated", params=None, **options):
    model, drawn = made()
    params = drawn if params is None else params
    options = {"collate_fn": collate, "reward_fn": reward, "optimizer": optax.adam(1e-3)} | options
    return rl.RLTrainer(deployer_of(devices, workdir), model, params, algorithm=algorithm, plan=plan, **options)


def fit(trainer, iterations=3, sequences=16, temperature=1.0, **options):
    each = sequences // trainer.algorithm.samples
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature)
    options = {"prompts_per_iteration": each, "sampling": sampling} | options
    return trainer.fit(PROMPTS, iterations=iterations, **options)


def params_of(trainer):
    return {role: jax.device_get(trainer.params_of(role)) for role in trainer.graph.roles}


def furthest(a, b):
    """The largest difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))
