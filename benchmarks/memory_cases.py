"""Models under plans, for comparing the planner's bytes per device with a compiler's.

    case = CASES[0]
    loss, init, batch = model_of(case)
    estimate = analytic(case)                     # the planner's own
    program = program_of(case, devices)           # the trainer's own step, to compile

Models are named architectures with real widths and few layers, and models as users write them (plain trees, layers
scanned or written out, casts inside the loss). What is counted is the step that the trainer runs, optimizer included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.train import TrainProgram
    from search import Estimate, Plan, TracedModel


@dataclasses.dataclass(frozen=True)
class Case:
    """One model under one plan on one cluster.

    Attributes:
        model: a name of `SIZES`, "moe", or an architecture.
        cluster: as `search.parse_cluster` reads it.
        plan: mesh, preset, rematerialisation and microbatches, as `fsdp=8 fsdp full 2`; `zero1` after it splits the
            optimizer's state over data.
        batch: examples of the global batch.
        layers, length: of the model.
        attention: as in `search.Plan`.
    """

    model: str
    cluster: str
    plan: str
    batch: int
    layers: int = 4
    length: int = 2048
    attention: str = "plain"

    @property
    def name(self) -> str:
        fused = " fused" if self.attention == "fused" else ""
        return f"{self.model} {self.layers}x{self.length}{fused} b{self.batch}, {self.cluster}, {self.plan}"

    @property
    def held_out(self) -> bool:
        """Whether the model is one that no rule of `search.resident` was found on."""
        return self.model in HELD_OUT

    @property
    def compute_dtype(self) -> str:
        """Users' models cast what they read; the trainer casts the parameters of architectures."""
        return "float32" if self.model in USERS else "bfloat16"


LLAMA = {"vocab": 32768, "embed": 2048, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp": 8192}
WIDE = {"vocab": 128256, "embed": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "mlp": 14336}
SHORT = {"vocab": 50304, "embed": 2048, "heads": 32, "kv_heads": 32, "head_dim": 64, "mlp": 8192}
SIZES = {"scanned": LLAMA, "unrolled": LLAMA, "wide": WIDE, "short": SHORT, "short unrolled": SHORT}
USERS = {*SIZES, "moe"}
HELD_OUT = {"short", "short unrolled", "qwen1.5-moe-a2.7b", "bert-large", "qwen2.5-7b", "gpt3-175b"}


def cases_of(cluster: str, *rows: tuple[Any, ...], attention: str = "plain") -> list[Case]:
    return [Case(model, cluster, *rest, attention=attention) for model, *rest in rows]


CASES: list[Case] = [
    *cases_of(
        "v5e:2x4",
        ("scanned", "data=8 data none 1", 8),
        ("scanned", "data=8 data full 1", 16),
        ("scanned", "data=8 data dots 2", 32),
        ("scanned", "fsdp=8 fsdp none 1", 16),
        ("scanned", "fsdp=8 fsdp dots 1", 32, 8),
        ("scanned", "fsdp=8 fsdp full 1", 32, 8),
        ("scanned", "fsdp=8 fsdp full 4", 64, 8),
        ("scanned", "fsdp=2,tensor=4 fsdp+megatron dots 1", 16, 8),
        ("scanned", "fsdp=2,tensor=4 fsdp+megatron full 4", 32, 8),
        ("scanned", "fsdp=2,tensor=4 fsdp+megatron+sequence full 1", 32, 8),
        ("scanned", "data=8 data full 1 zero1", 16),
        ("scanned", "data=4,tensor=2 megatron dots 2 zero1", 16),
        ("scanned", "fsdp=4,context=2 fsdp full 1", 16, 8),
        ("unrolled", "fsdp=8 fsdp none 1", 16),
        ("unrolled", "fsdp=8 fsdp full 1", 32),
        ("unrolled", "fsdp=8 fsdp full 2", 32),
        ("unrolled", "data=8 data none 1", 16),
        ("unrolled", "fsdp=2,tensor=4 fsdp+megatron dots 1", 16),
        ("unrolled", "data=2,fsdp=4 fsdp dots 1", 16, 6),
        ("moe", "fsdp=8 fsdp full 1", 16),
        ("moe", "data=8 data full 2", 16, 2),
        ("wide", "fsdp=4,tensor=2 fsdp+megatron full 1", 8, 2, 4096),
        ("wide", "fsdp=8 fsdp dots 2", 16, 2, 4096),
        ("wide", "fsdp=4,tensor=2 fsdp+megatron+sequence dots 1", 8, 2, 4096),
        ("wide", "data=2,fsdp=4 fsdp full 1", 16, 2, 4096),
        ("short", "data=2,fsdp=2,tensor=2 fsdp+megatron none 1", 64, 6, 512),
        ("short", "fsdp=4,tensor=2 fsdp+megatron+sequence dots 2", 128, 6, 512),
        ("short unrolled", "fsdp=2,tensor=4 fsdp+megatron full 2", 128, 6, 512),
        ("short unrolled", "fsdp=4,tensor=2 fsdp+megatron none 1", 32, 4, 512),
        ("short", "data=8 data full 1 zero1", 64, 6, 512),
        ("bert-large", "data=8 data none 1", 64, 8, 512),
        ("bert-large", "fsdp=8 fsdp dots 2", 256, 8, 512),
    ),
    *cases_of(
        "v5e:4x4",
        ("llama-3-8b", "fsdp=16 fsdp full 1", 16, 4, 2048),
        ("llama-3-8b", "fsdp=4,tensor=4 fsdp+megatron+sequence full 1", 16, 8, 2048),
        ("gpt3-2.7b", "fsdp=8,tensor=2 fsdp+megatron dots 2", 64, 8, 2048),
        ("mixtral-8x7b", "fsdp=16 fsdp full 1", 16, 2, 2048),
        ("qwen3-8b", "fsdp=8,tensor=2 fsdp+megatron full 2", 32, 6, 2048),
        ("gemma-2b", "fsdp=16 fsdp full 1", 16, 6, 2048),
        ("pythia-2.8b", "data=4,fsdp=4 fsdp full 2", 64, 8, 2048),
    ),
    *cases_of(
        "v5p:2x2x2",
        ("llama-3-8b", "fsdp=8 fsdp none 1", 16, 4, 2048),
        ("llama-3-8b", "fsdp=8 fsdp full 1", 64, 8, 2048),
        ("llama-3-8b", "fsdp=4,tensor=2 fsdp+megatron dots 1", 32, 8, 2048),
        ("llama-3-8b", "data=8 data full 1 zero1", 16, 4, 2048),
        ("llama-3-8b", "fsdp=2,tensor=4 fsdp+megatron+sequence full 2", 64, 8, 2048),
        ("gpt3-2.7b", "data=8 data full 4", 64, 8, 2048),
        ("gpt3-2.7b", "fsdp=4,context=2 fsdp full 1", 32, 8, 2048),
        ("mixtral-8x7b", "fsdp=8 fsdp full 1", 16, 2, 2048),
        ("mixtral-8x7b", "fsdp=2,expert=4 fsdp full 2", 32, 2, 2048),
        ("qwen3-8b", "fsdp=8 fsdp dots 2", 64, 6, 2048),
        ("qwen3-8b", "fsdp=2,tensor=4 fsdp+megatron full 1", 32, 8, 2048),
        ("gemma-2b", "data=8 data full 2", 32, 6, 2048),
        ("gemma-2b", "fsdp=8 fsdp none 1", 16, 6, 2048),
        ("qwen1.5-moe-a2.7b", "fsdp=8 fsdp full 1", 32, 4, 2048),
        ("pythia-2.8b", "data=2,fsdp=4 fsdp dots 1", 32, 8, 2048),
        ("wide", "fsdp=8 fsdp full 1", 64, 4, 2048),
        ("scanned", "data=8 data dots 1", 64),
    ),
    *cases_of(
        "v5p:4x4x4",
        ("llama-3-8b", "fsdp=64 fsdp full 1", 128, 8, 2048),
        ("llama-3-8b", "fsdp=16,tensor=4 fsdp+megatron dots 1", 128, 8, 2048),
        ("llama-3-8b", "fsdp=32,context=2 fsdp full 1", 64, 8, 2048),
        ("gpt3-2.7b", "data=4,fsdp=16 fsdp dots 2", 256, 8, 2048),
        ("gpt3-2.7b", "data=16,tensor=4 megatron full 2 zero1", 128, 8, 2048),
        ("mixtral-8x7b", "fsdp=8,expert=8 fsdp full 1", 64, 2, 2048),
        ("qwen3-8b", "fsdp=16,tensor=4 fsdp+megatron+sequence full 2", 256, 8, 2048),
        ("gemma-2b", "fsdp=64 fsdp none 1", 128, 6, 2048),
        ("pythia-2.8b", "data=8,fsdp=8 fsdp full 1", 256, 8, 2048),
        ("wide", "fsdp=32,tensor=2 fsdp+megatron dots 1", 64, 4, 2048),
    ),
    *cases_of(
        "v6e:4x4",
        ("llama-3-8b", "fsdp=16 fsdp full 1", 32, 8, 2048),
        ("llama-3-8b", "fsdp=16 fsdp dots 2", 64, 4, 2048),
        ("llama-3-8b", "fsdp=4,tensor=4 fsdp+megatron full 1", 32, 8, 2048),
        ("llama-3-8b", "data=4,tensor=4 megatron full 2 zero1", 32, 4, 2048),
        ("gpt3-2.7b", "fsdp=16 fsdp none 1", 16, 8, 2048),
        ("gpt3-2.7b", "fsdp=4,tensor=4 fsdp+megatron+sequence dots 1", 32, 8, 2048),
        ("mixtral-8x7b", "fsdp=16 fsdp full 1", 16, 2, 2048),
        ("qwen3-8b", "fsdp=16 fsdp full 1", 64, 8, 2048),
        ("qwen3-8b", "fsdp=8,tensor=2 fsdp+megatron+sequence dots 2", 64, 6, 2048),
        ("gemma-2b", "fsdp=8,tensor=2 fsdp+megatron full 1", 32, 6, 2048),
        ("pythia-2.8b", "fsdp=8,context=2 fsdp full 1", 32, 8, 2048),
        ("qwen1.5-moe-a2.7b", "data=4,fsdp=4 fsdp full 1", 32, 2, 2048),
        ("unrolled", "fsdp=16 fsdp dots 1", 32),
        ("short unrolled", "data=16 data full 1", 256, 6, 512),
    ),
    *cases_of(
        "8xH100",
        ("scanned", "data=8 data none 1", 16),
        ("scanned", "fsdp=8 fsdp dots 1", 64, 8),
        ("unrolled", "fsdp=8 fsdp full 1", 64),
        ("unrolled", "fsdp=2,tensor=4 fsdp+megatron dots 2", 64),
        ("llama-3-8b", "fsdp=8 fsdp none 1", 16, 4, 2048),
        ("llama-3-8b", "fsdp=8 fsdp full 1", 64, 8, 2048),
        ("llama-3-8b", "fsdp=4,tensor=2 fsdp+megatron dots 1", 32, 4, 2048),
        ("llama-3-8b", "data=8 data full 1 zero1", 16, 4, 2048),
        ("gpt3-2.7b", "data=8 data full 4", 64, 8, 2048),
        ("gpt3-2.7b", "fsdp=4,context=2 fsdp full 1", 32, 8, 2048),
        ("mixtral-8x7b", "fsdp=8 fsdp full 1", 16, 2, 2048),
        ("qwen3-8b", "fsdp=8 fsdp dots 2", 64, 6, 2048),
        ("qwen3-8b", "fsdp=2,tensor=4 fsdp+megatron+sequence full 1", 32, 8, 2048),
        ("gemma-2b", "data=8 data full 2", 32, 6, 2048),
        ("gemma-2b", "fsdp=8 fsdp none 1", 16, 6, 2048),
        ("pythia-2.8b", "data=2,fsdp=4 fsdp dots 1", 32, 8, 2048),
        ("qwen1.5-moe-a2.7b", "fsdp=8 fsdp full 1", 32, 2, 2048),
        ("wide", "fsdp=8 fsdp full 2", 64, 4, 2048),
        ("short unrolled", "data=8 data none 1", 64, 6, 512),
        ("bert-large", "data=8 data none 1", 128, 8, 512),
    ),
    # Plans that nearly fill the device.
    *cases_of(
        "v5e:2x4",
        ("scanned", "fsdp=8 fsdp none 1", 32),
        ("scanned", "data=8 data dots 1", 72),
        ("unrolled", "fsdp=8 fsdp full 1", 184),
    ),
    *cases_of(
        "v5e:4x4",
        ("qwen3-8b", "fsdp=16 fsdp full 1", 96, 8),
        ("pythia-2.8b", "fsdp=8,tensor=2 fsdp+megatron dots 1", 104, 8),
    ),
    *cases_of(
        "v5p:2x2x2",
        ("llama-3-8b", "fsdp=8 fsdp dots 1", 232, 8),
        ("gpt3-2.7b", "fsdp=8 fsdp none 1", 64, 8),
    ),
    *cases_of(
        "v6e:4x4",
        ("llama-3-8b", "fsdp=16 fsdp dots 1", 144, 8),
        ("gemma-2b", "fsdp=16 fsdp full 1", 128, 8),
        ("short", "data=16 data none 1", 32, 6),
    ),
    *cases_of(
        "8xH100",
        ("llama-3-8b", "fsdp=8 fsdp full 1", 296, 16),
        ("qwen3-8b", "fsdp=8 fsdp none 1", 72),
        ("wide", "fsdp=4,tensor=2 fsdp+megatron none 1", 72),
    ),
    # Attention by the platform's kernel.
    *cases_of(
        "v5e:2x4",
        ("llama-3.2-1b", "data=8 data none 1 zero1", 8, 4, 4096),
        ("llama-3.2-1b", "data=4,fsdp=2 fsdp full 2", 16, 8, 8192),
        attention="fused",
    ),
    *cases_of(
        "v5e:4x4",
        ("llama-3-8b", "fsdp=8,tensor=2 fsdp+megatron full 1", 16, 8, 8192),
        ("llama-3.2-1b", "data=16 data dots 1", 16, 4, 8192),
        ("llama-3-8b", "fsdp=4,tensor=4 fsdp+megatron+sequence dots 1", 16, 6, 8192),
        ("mistral-7b", "fsdp=16 fsdp full 2", 32, 6, 4096),
        ("qwen2.5-7b", "fsdp=8,context=2 fsdp full 1", 8, 6, 8192),
        ("gpt3-6.7b", "fsdp=16 fsdp none 1", 16, 4, 2048),
        attention="fused",
    ),
    *cases_of(
        "v5p:2x2x2",
        ("llama-3-8b", "fsdp=8 fsdp none 1", 16, 8, 8192),
        ("llama-3-8b", "fsdp=8 fsdp dots 1", 16, 8, 8192),
        ("gpt3-13b", "fsdp=4,tensor=2 fsdp+megatron full 4", 64, 6, 2048),
        ("mistral-7b", "data=8 data full 1 zero1", 8, 4, 8192),
        ("qwen3-14b", "fsdp=4,context=2 fsdp dots 1", 8, 6, 8192),
        attention="fused",
    ),
    *cases_of(
        "v5p:4x4x4",
        ("llama-3-70b", "fsdp=64 fsdp full 1", 64, 4, 8192),
        ("llama-3-70b", "fsdp=16,tensor=4 fsdp+megatron+sequence none 1", 32, 4, 8192),
        ("qwen3-14b", "fsdp=32,tensor=2 fsdp+megatron dots 2", 128, 6, 4096),
        ("gpt3-175b", "fsdp=8,tensor=8 fsdp+megatron full 2", 64, 2, 2048),
        attention="fused",
    ),
    *cases_of(
        "v6e:4x4",
        ("llama-3-8b", "fsdp=16 fsdp dots 1", 32, 8, 8192),
        ("llama-3.2-1b", "data=16 data full 2 zero1", 64, 8, 4096),
        ("gpt3-13b", "fsdp=4,tensor=4 fsdp+megatron+sequence dots 2", 64, 4, 2048),
        ("mistral-7b", "fsdp=8,tensor=2 fsdp+megatron none 1", 16, 4, 8192),
        ("qwen3-14b", "fsdp=8,context=2 fsdp full 1", 16, 6, 8192),
        attention="fused",
    ),
    *cases_of(
        "8xH100",
        ("llama-3-8b", "fsdp=8 fsdp full 1", 16, 8, 8192),
        ("llama-3-8b", "fsdp=8 fsdp none 1", 16, 4, 8192),
        ("llama-3.2-1b", "data=8 data dots 2 zero1", 32, 8, 4096),
        ("qwen2.5-7b", "fsdp=4,tensor=2 fsdp+megatron dots 1", 16, 4, 8192),
        ("qwen3-14b", "fsdp=2,tensor=4 fsdp+megatron+sequence full 1", 16, 4, 8192),
        ("gpt3-6.7b", "fsdp=8 fsdp full 4", 64, 8, 2048),
        attention="fused",
    ),
]


QUICK = [0, 9, 35, 44, 74, 88]
"""Indices of six of them: of each accelerator at least one."""


def plan_of(case: Case) -> Plan:
    """The plan of a case."""
    from search import Plan
    from sharding_rules import MeshShape

    mesh, preset, remat, microbatches, *rest = case.plan.split()
    return Plan(
        mesh=MeshShape.parse(mesh),
        preset=preset,
        microbatches=int(microbatches),
        remat=remat,  # type: ignore[arg-type]
        optimizer_sharding="zero1" in rest,
        compute_dtype=case.compute_dtype,
        attention=case.attention,  # type: ignore[arg-type]
    )


def model_of(case: Case) -> tuple[Any, Any, Any]:
    """(loss, init, abstract batch) of a case."""
    import jax
    import jax.numpy as jnp

    if case.model not in USERS:
        from redco_like.models import architecture, build_model

        model = build_model(dataclasses.replace(architecture(case.model), layers=case.layers), dtype="bfloat16")
        return model.loss_fn, model.init_fn, model.abstract_batch(case.batch, case.length)
    if case.model == "moe":
        return _moe(case)
    from zoo import llama

    shapes = llama.Shapes(**SIZES[case.model], layers=case.layers, length=case.length)
    init = llama.init_unrolled if case.model.endswith("unrolled") else llama.init_scanned
    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)

    def loss(params: Any, batch: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return llama.forward_loss(params, batch, shapes, dtype=jnp.bfloat16)

    return loss, lambda rng: init(rng, shapes), {"s": tokens, "t": tokens}


def _moe(case: Case) -> tuple[Any, Any, Any]:
    """Scanned layers of attention and eight experts, two per token, by sorting and `ragged_dot`."""
    import jax
    import jax.numpy as jnp
    from zoo import base, gpt

    vocab, embed, heads, head_dim, experts, hidden, top = 32768, 1024, 8, 128, 8, 2048, 2
    layer = {"n": base.g(embed), **{k: base.w(embed, heads * head_dim) for k in "qkv"}}
    layer |= {"o": base.w(heads * head_dim, embed), "m": base.g(embed), "r": base.w(embed, experts)}
    layer |= {"a": base.w(experts, embed, hidden), "b": base.w(experts, hidden, embed)}

    def init(rng: Any) -> Any:
        keys = jax.random.split(rng, case.layers)
        layers = jax.vmap(lambda key: base.draw(key, layer, jnp.float32))(keys)
        return {"l": layers, **base.draw(rng, {"t": base.table(vocab, embed), "f": base.w(embed, vocab)}, jnp.float32)}

    def block(x_BLD: Any, p: Any) -> tuple[Any, None]:
        p = jax.tree.map(lambda leaf: leaf.astype(x_BLD.dtype), p)
        B, L, D = x_BLD.shape
        h = base.rms_norm(x_BLD, p["n"])
        q, k, v = ((h @ p[name]).reshape(B, L, heads, head_dim) for name in "qkv")
        x_BLD = x_BLD + gpt.causal_attention(q, k, v).reshape(B, L, heads * head_dim) @ p["o"]
        x_TD = base.rms_norm(x_BLD, p["m"]).reshape(-1, D)
        gates_TE = jax.nn.softmax((x_TD @ p["r"]).astype(jnp.float32), axis=-1)
        top_TJ, index_TJ = jax.lax.top_k(gates_TE, top)
        order = jnp.argsort(index_TJ.reshape(-1))
        counts = jnp.bincount(index_TJ.reshape(-1), length=experts)
        h = jax.nn.silu(jax.lax.ragged_dot(x_TD[order // top], p["a"], counts))
        h = jax.lax.ragged_dot(h, p["b"], counts)
        y = jnp.zeros_like(h).at[order].set(h).reshape(-1, top, D)
        return x_BLD + jnp.einsum("tj,tjd->td", top_TJ.astype(x_TD.dtype), y).reshape(B, L, D), None

    def loss(params: Any, batch: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            x, _ = jax.lax.scan(block, params["t"].astype(jnp.bfloat16)[batch["s"]], params["l"])
            return base.cross_entropy(x @ params["f"].astype(jnp.bfloat16), batch["t"])

    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    return loss, init, {"s": tokens, "t": tokens}


def traced_model(case: Case) -> TracedModel:
    """What the planner looks at."""
    import optax

    from pipelines.problem import train_problem
    from search import TracedModel, parse_cluster

    loss, init, batch = model_of(case)
    traced, opt_state = train_problem(loss, init, optax.adam(1e-3), batch, case.compute_dtype)
    plan = plan_of(case)
    fused = case.attention == "fused"
    return TracedModel(traced, opt_state, parse_cluster(case.cluster), fused_attention=fused, remats=(plan.remat,))


def analytic(case: Case) -> Estimate:
    """The planner's estimate."""
    from search import estimate_plan

    return estimate_plan(traced_model(case), plan_of(case))


def program_of(case: Case, devices: Sequence[Any]) -> TrainProgram:
    """The trainer's step, with Adam and float32 parameters."""
    import optax

    from pipelines import build_train_program
    from sharding_rules import make_mesh

    loss, init, batch = model_of(case)
    plan = plan_of(case)
    return build_train_program(loss, init, optax.adam(1e-3), batch, plan, make_mesh(plan.mesh, devices))
