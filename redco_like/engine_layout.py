"""How an engine lies on its devices: plans of reading and decoding on one mesh, sizes of programs, the programs.

plans, mesh = make_plans(functions_of(model, length), params, plan="auto", mesh=None, devices=devices, dtype=dtype,
                         rows=16, length=2048, chunk_tokens=256)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from pipelines import resolve_plan
from pipelines.devices import cluster_here
from pipelines.generation import CachedModel, GenerationPrograms, Plans, Shape, Sizes
from pipelines.generation.programs import decode_problem, read_problem
from pipelines.problem import cast_floats
from redco_like.predictor import home_of
from search import Plan
from sharding_rules import CONTEXT, MeshShape, PlanError, abstract, make_mesh

if TYPE_CHECKING:
    from redco_like.models.model import Model

CHUNK_TOKENS = 256
"""Tokens of prompts that are read at a time, where the engine is not told otherwise."""
STEPS_PER_DISPATCH = 8
"""Tokens per row that are decoded before the host looks at them, the same."""
SMALLEST = 128
"""Positions of the smallest class of length for decoding; reading starts with twice as many."""


def functions_of(model: Model, length: int) -> CachedModel:
    """What the programs call of a model whose rows hold `length` positions."""

    def read(params: Any, tokens: Any, cache: Any, position: Any, last: Any, reach: int) -> Any:
        return model.read(params, tokens, cache, position, last_B=last, reach=reach, length=length)

    return CachedModel(model.init_cache, read, model.config.vocab)


def classes(length: int, factor: int, size: int) -> tuple[int, ...]:
    """Classes of length from `size` on, each `factor` times the one before, the last one `length` itself.

    >>> classes(2048, 2, 256)
    (256, 512, 1024, 2048)
    >>> classes(1000, 4, 256)
    (256, 1000)
    """
    sizes = []
    while size < length:
        sizes.append(size)
        size *= factor
    return (*sizes, length)


def piece_shapes(tokens: int, rows: int) -> tuple[Shape, ...]:
    """Pieces of prompts: one long one, or four short ones, or a short one."""
    short = max(tokens // 4, 1)
    return tuple(dict.fromkeys((Shape(1, tokens), Shape(min(4, rows), short), Shape(1, short))))


def make_plans(
    functions: CachedModel,
    params: Any,
    *,
    plan: Any,
    mesh: MeshShape | None,
    devices: list[Any],
    dtype: str,
    rows: int,
    length: int,
    chunk_tokens: int,
) -> tuple[Plans, Mesh]:
    """The plans, and their mesh: the parameters' own if they live on one that fits.

    Args:
        plan: one for both, or (prefill, decode): "auto", a preset, a `Plan` or the path of one.
        rows, length: of the cache. chunk_tokens: of a prompt that are read at a time.

    Raises:
        ValueError: a mesh of more devices than there are.
        PlanError: a plan that cannot be carried out.
    """
    home = home_of(params)
    shapes = cast_floats(abstract(params), dtype)
    given = plan if isinstance(plan, tuple) else (plan, plan)
    if mesh is None and home is not None and all(isinstance(p, str) and not p.endswith(".json") for p in given):
        mesh = MeshShape(**home.shape)
    if mesh is not None:
        if mesh.size > len(devices):
            raise ValueError(f"mesh {mesh} needs {mesh.size} devices, but {len(devices)} are there")
        devices = devices[: mesh.size]

    def resolve(plan: Any, mesh: MeshShape | None, problem: Callable[[], Any]) -> Plan:
        if plan == "auto" and len(devices) == 1:
            return Plan(MeshShape(), "data", compute_dtype=dtype, reason="there is one device")
        return resolve_plan(
            plan,
            n_devices=len(devices),
            mesh=mesh,
            problem=problem,
            cluster=lambda: cluster_here(devices),
            compute_dtype=dtype,
            training=False,
            forbid=(CONTEXT,),  # the positions of a row stay together
        )

    decode = resolve(given[1], mesh, lambda: (decode_problem(functions, shapes, rows, length, length), {}))
    shards = decode.mesh.batch_shards
    prefill = resolve(
        given[0], decode.mesh, lambda: (read_problem(functions, shapes, shards, chunk_tokens, length), {})
    )
    at_home = home is not None and MeshShape(**home.shape) == decode.mesh
    devices = devices[: decode.mesh.size]
    return Plans(prefill, decode), home if home is not None and at_home else make_mesh(
        decode.mesh, devices, order=decode.order
    )


def make_programs(
    functions: CachedModel, abstract_params: Any, plans: Plans, mesh: Mesh, sizes: Sizes
) -> GenerationPrograms:
    """Programs under both plans; under that of decoding alone, where a planned one would need parameters of its own."""

    def build(plans: Plans) -> GenerationPrograms:
        return GenerationPrograms(functions, abstract_params, plans=plans, mesh=mesh, sizes=sizes)

    planned = "auto" if plans.prefill.estimate is not None and plans.prefill != plans.decode else ""
    try:
        programs = build(plans)
    except PlanError:
        if not planned:
            raise
        return build(Plans(plans.decode, plans.decode))
    return build(Plans(plans.decode, plans.decode)) if planned and programs.params_twice else programs
