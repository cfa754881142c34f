"""An execution plan of PPO on 8 devices, written by hand, for tests of what reads one."""

from search import Plan
from search.rlhf import GRAPHS, Busy, CallPlan, ExecutionPlan, Move, Window, Workload
from sharding_rules import MeshShape

WINDOWS = {
    "generate": (Window(0, 8), MeshShape(data=4, tensor=2), "data+megatron"),
    "reward": (Window(0, 4), MeshShape(tensor=4), "megatron"),
    "reference": (Window(4, 2), MeshShape(tensor=2), "megatron"),
    "critic": (Window(6, 2), MeshShape(fsdp=2), "fsdp"),
    "train_actor": (Window(0, 6), MeshShape(fsdp=6), "fsdp"),
    "train_critic": (Window(6, 2), MeshShape(fsdp=2), "fsdp"),
}
TIMES = {
    "generate": (0.4, 4.4),
    "reward": (4.4, 5.4),
    "reference": (4.4, 6.0),
    "critic": (4.4, 6.2),
    "train_actor": (6.2, 10.0),
    "train_critic": (6.2, 10.6),
}


def execution(**changes):
    """The plan, with some fields changed."""
    graph = GRAPHS["ppo"]()
    calls = tuple(
        CallPlan(
            name,
            WINDOWS[name][0],
            Plan(WINDOWS[name][1], "fsdp" if "fsdp" in WINDOWS[name][2] else "megatron", remat="full"),
            seconds=TIMES[name][1] - TIMES[name][0],
            params_bytes=4 * 2.0**30,
            working_bytes=6 * 2.0**30,
            state_bytes=12 * 2.0**30 if name.startswith("train") else 0.0,
        )
        for name in TIMES
    )
    timeline = (
        Busy("actor to generate", "reallocate", Window(0, 8), 0.0, 0.4),
        *(Busy(name, graph.call(name).kind, WINDOWS[name][0], *TIMES[name]) for name in TIMES),
    )
    fields = {
        "graph": graph,
        "workload": Workload(64, 128, 128, samples=2, minibatches=4),
        "models": dict.fromkeys(graph.roles, "llama-2-7b"),
        "cluster": "8xA100-80",
        "devices": 8,
        "calls": calls,
        "moves": (
            Move("actor", "reallocate", "train_actor", "generate", 50 * 2.0**30, 0.4),
            Move("reference", "onload", "reference", "reference", 12 * 2.0**30, 0.3),
        ),
        "offloaded": ("reference",),
        "period_seconds": 10.2,
        "bound_seconds": 9.8,
        "timeline": timeline,
        "memory": (
            (Window(0, 6), ((0.0, 20 * 2.0**30), (0.4, 44 * 2.0**30), (4.4, 31 * 2.0**30), (6.2, 60 * 2.0**30))),
            (Window(6, 2), ((0.0, 30 * 2.0**30), (4.4, 41 * 2.0**30), (6.2, 66 * 2.0**30))),
        ),
        "usable_bytes": 73 * 2.0**30,
        "heuristics": {"colocated": 12.0, "standalone": float("inf")},
        "reason": "stopped at its time limit, 3.9 % above what no plan can beat",
    }
    return ExecutionPlan(**{**fields, **changes})
