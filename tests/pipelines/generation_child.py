"""Compiles one program of generation for devices that are not there; started by `search.compiler.compile_in_child`.

python -m generation_child request.json
"""

import json
import pathlib
import sys

import jax


def main(path: str) -> None:
    request = json.loads(pathlib.Path(path).read_text("utf-8"))
    from pipelines.generation import CachedModel, GenerationPrograms, Plans, Shape, Sizes
    from pipelines.problem import cast_floats
    from redco_like.models import architecture, build_model
    from search import Plan, parse_cluster
    from search.topology import open_devices, target_of
    from sharding_rules import MeshShape, make_mesh

    model = build_model(architecture(request["model"]))
    shape = MeshShape.parse(request["mesh"])
    mesh = make_mesh(shape, open_devices(target_of(parse_cluster(request["cluster"]))))
    plan = Plan(shape, request["preset"], compute_dtype=model.dtype)
    rows, length, reach, tokens = (request[name] for name in ("rows", "length", "reach", "tokens"))
    reaches = tuple(sorted({reach, length}))
    programs = GenerationPrograms(
        CachedModel(
            model.init_cache,
            lambda params, tokens, cache, position, last, reach: model.read(
                params, tokens, cache, position, last_B=last, reach=reach
            ),
            model.config.vocab,
        ),
        cast_floats(jax.eval_shape(model.init_fn, jax.eval_shape(jax.random.key, 0)), model.dtype),
        plans=Plans(plan, plan),
        mesh=mesh,
        sizes=Sizes(rows, length, reaches, reaches, (Shape(1, tokens),), 8),
    )
    name = next(n for n in programs.names if n.startswith(request["program"]) and f"{reach} positions" in n)
    lowered = programs.lower(name)
    cache = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), programs.abstract_cache)
    said = {"cache_bytes": programs.cache_bytes, "params_bytes": programs.params_bytes, "cache_shapes": cache}
    print(json.dumps({"event": "lowered", **said}), flush=True)
    lowered.compile()


if __name__ == "__main__":
    main(sys.argv[1])
