"""Programs of an execution plan's calls: what is built, for which devices, and what lies beside it in memory."""

import jax
import pytest
from executions import execution

from redco_like.rlhf_programs import build_program, programs
from redco_like.rlhf_verify import other_bytes, verify_execution
from search import Plan, parse_cluster
from search.rlhf import GRAPHS, Call, CallPlan, ExecutionPlan, Graph, Window, Workload
from search.topology import ToolchainMissing, target_of, toolchain
from sharding_rules import MeshShape, PlanError, make_mesh

GIB = 2**30


def small(graph, devices=4, cluster="v5e:2x2", **problem):
    """GPT-2 in every role, all calls on all devices."""
    plans = {
        "generate": Plan(MeshShape(data=devices // 2, tensor=2), "megatron", compute_dtype="bfloat16"),
        "score": Plan(MeshShape(data=devices), "data", compute_dtype="bfloat16", microbatches=2),
        "train": Plan(MeshShape(fsdp=devices), "fsdp", compute_dtype="bfloat16", remat="full"),
    }
    calls = tuple(CallPlan(name, Window(0, devices), plans[graph.call(name).kind], rows=8) for name in graph.order)
    samples = 1 if graph.inputs == ("pairs",) else 2
    work = Workload(8, 32, 32, samples=samples, minibatches=2)
    return ExecutionPlan(graph, work, dict.fromkeys(graph.roles, "gpt2"), cluster, devices, calls, problem=problem)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "reward_modelling", "sft"])
def test_every_call_of_a_graph_has_programs_for_its_mesh(name):
    plan = small(GRAPHS[name]())
    for call in plan.calls:
        mesh = make_mesh(call.plan.mesh, jax.devices()[:4], order=call.plan.order)
        for program in programs(plan, call.call):
            made = build_program(plan, call.call, program, mesh)
            assert made.device_bytes["arguments"] > 0
            if plan.graph.call(call.call).kind == "train":
                # Parameters in float32 and two moments, each on a device of its own quarter.
                assert made.device_bytes["arguments"] > 12 * 110e6 / 4


def test_a_critic_has_a_head_and_a_users_graph_the_language_models_loss():
    heads = small(GRAPHS["ppo"]())
    mesh = make_mesh(heads.call("critic").plan.mesh, jax.devices()[:4])
    critic = build_program(heads, "critic", "score", mesh).device_bytes
    reference = build_program(heads, "reference", "score", mesh).device_bytes
    # GPT-2 makes logits with its embedding, so that a head is 768 + 1 more numbers.
    assert critic["arguments"] - reference["arguments"] == 2 * (768 + 1)
    own = Graph(
        "own",
        ("prompts",),
        (
            Call("write", "actor", "generate", ("prompts",), ("texts", "logprobs")),
            Call("judge", "judge", "score", ("texts",), ("rewards",)),
            Call("learn", "actor", "train", ("texts", "rewards")),
        ),
    )
    plan = small(own)
    for call in plan.calls:
        mesh = make_mesh(call.plan.mesh, jax.devices()[:4], order=call.plan.order)
        for program in programs(plan, call.call):
            assert build_program(plan, call.call, program, mesh).device_bytes["arguments"] > 0


def test_what_lies_beside_a_call_is_the_most_of_its_time_less_its_own():
    plan = execution()
    # Devices 0-5 have 44 GiB while it generates, 6-7 30 GiB; 10 of that is the call's own.
    assert other_bytes(plan, plan.call("generate")) == pytest.approx(34 * GIB)
    # Training takes 22 GiB of the 66 GiB of devices 6-7.
    assert other_bytes(plan, plan.call("train_critic")) == pytest.approx(44 * GIB)


def test_what_cannot_be_compiled_is_said_before_anything_is():
    plan = small(GRAPHS["sft"]())
    with pytest.raises(ValueError, match="is for 4 devices, cluster v5e:4x4 has 16"):
        verify_execution(plan, parse_cluster("v5e:4x4"))
    staged = Plan(MeshShape(stage=4), "data", microbatches=4)
    calls = (CallPlan("train_actor", Window(0, 4), staged),)
    plan = ExecutionPlan(plan.graph, plan.workload, plan.models, plan.cluster, 4, calls)
    with pytest.raises(PlanError, match="call 'train_actor' has stage=4"):
        verify_execution(plan, parse_cluster("v5e:2x2"))


@pytest.mark.aot
def test_the_tpu_compiler_takes_every_call(tmp_path):
    from search.compiler import Cache

    cluster = parse_cluster("v5e:2x2")
    try:
        toolchain(target_of(cluster))
    except ToolchainMissing as error:
        pytest.skip(str(error))
    plan, cache = small(GRAPHS["grpo"]()), Cache(tmp_path)
    checks = verify_execution(plan, cluster, cache=cache)
    assert [(check.call, check.program) for check in checks] == [
        ("generate", "decode"),
        ("generate", "prompts"),
        ("reward", "score"),
        ("reference", "score"),
        ("train_actor", "train"),
    ]
    assert all(check.fits for check in checks)
    train = checks[-1]
    assert train.compiled_bytes["arguments"] > 12 * 124e6 / 4
    assert train.seconds is not None
    assert train.collectives["all_gather"] > 0
    assert verify_execution(plan, cluster, cache=cache, limit_seconds=1e-3) == checks
