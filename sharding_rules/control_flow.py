"""Rules for primitives that carry a jaxpr: calls, loops, branches, `shard_map`. Written like those of `primitives`."""

from __future__ import annotations

import math
from typing import Any

from sharding_rules.axes import Called, Dim, Dims, Equation, Inference, inner_jaxpr, join_origins, loop_parts
from sharding_rules.primitives import rule


def inline_call(inf: Inference, eq: Equation) -> Called:
    """jit, remat, custom gradients: through the inner jaxpr. Custom gradients are read but never rewritten."""
    inner = inner_jaxpr(eq.eqn)
    if inner is None:
        raise ValueError(f"{eq.eqn.primitive.name} calls no jaxpr")
    opaque = eq.eqn.primitive.name.startswith(("custom_vjp", "custom_jvp", "shard_map"))
    return Called(*inf.call(eq.scope, eq.position, inner, eq.ins, eq.origins, opaque=opaque))


@rule("scan")
def scan(inf: Inference, eq: Equation) -> Called:
    """The carry's axes are the same going in and coming out; scanned inputs and outputs share the axis of
    iterations.
    """
    consts, carry = loop_parts(eq.eqn)
    length = inf.axes.fresh(eq.params["length"])
    for dims, origin in zip(eq.ins[consts + carry :], eq.origins[consts + carry :], strict=True):
        if length and dims[0]:
            inf.unify(length, dims[0])
        if origin == 1:
            inf.mark("layers", length)
        elif origin & 2:
            inf.mark("time", length)
    joined = join_origins(eq.origins)
    dims = eq.ins[: consts + carry] + [d[1:] for d in eq.ins[consts + carry :]]
    origins = [*eq.origins[:consts], *([joined] * carry), *eq.origins[consts + carry :]]
    outs, out_origins = inf.call(eq.scope, eq.position, eq.params["jaxpr"], dims, origins, trips=eq.params["length"])
    for before, after in zip(eq.ins[consts : consts + carry], outs[:carry], strict=True):
        inf.unify_all(before, after)
    stacked = [(length, *dims) for dims in outs[carry:]]
    return Called(outs[:carry] + stacked, out_origins)


@rule("while")
def while_(inf: Inference, eq: Equation) -> Called:
    cond_n, body_n = eq.params["cond_nconsts"], eq.params["body_nconsts"]
    joined = join_origins(eq.origins)
    cond_consts, body_consts, carry = eq.ins[:cond_n], eq.ins[cond_n : cond_n + body_n], eq.ins[cond_n + body_n :]
    origins = [*eq.origins[cond_n : cond_n + body_n], *([joined] * len(carry))]
    outs, out_origins = inf.call(eq.scope, eq.position, eq.params["body_jaxpr"], body_consts + carry, origins)
    inf.call(
        eq.scope,
        eq.position,
        eq.params["cond_jaxpr"],
        cond_consts + carry,
        [*eq.origins[:cond_n], *([joined] * len(carry))],
        opaque=True,
    )
    for before, after in zip(carry, outs, strict=True):
        inf.unify_all(before, after)
    return Called(outs, out_origins)


@rule("cond")
def cond(inf: Inference, eq: Equation) -> Called:
    results = [inf.call(eq.scope, eq.position, branch, eq.ins[1:], eq.origins[1:]) for branch in eq.params["branches"]]
    outs, origins = results[0]
    for other, other_origins in results[1:]:
        for a, b in zip(outs, other, strict=True):
            inf.unify_all(a, b)
        origins = [join_origins(both) for both in zip(origins, other_origins, strict=True)]
    return Called(outs, [join_origins((origin, eq.origins[0])) for origin in origins])


@rule("shard_map")
def shard_map(inf: Inference, eq: Equation) -> Called | None:
    """Inside, arrays are shards: a dimension cut `n` ways enters as its minor part, and leaves with the major part
    back.
    """
    inner, mesh = eq.params["jaxpr"], eq.params["mesh"]
    majors: dict[Any, Dim] = {}
    locals_: list[Dims] = []
    for dims, spec in zip(eq.ins, eq.params["in_specs"], strict=True):
        local: list[Dim] = []
        for i, dim in enumerate(dims):
            entry = spec[i] if i < len(spec) else None
            cut = inf.axes.take(dim, _ways(mesh, entry))
            if cut is None:
                return None
            if entry is not None and cut[0] and majors.setdefault(entry, cut[0]) is not cut[0]:
                inf.unify(majors[entry], cut[0])
            local.append(cut[1])
        locals_.append(tuple(local))
    outs, origins = inf.call(eq.scope, eq.position, inner, locals_, eq.origins, opaque=True)
    whole: list[Dims] = []
    for dims, spec in zip(outs, eq.params["out_specs"], strict=True):
        out: list[Dim] = []
        for i, dim in enumerate(dims):
            entry = spec[i] if i < len(spec) else None
            ways = _ways(mesh, entry)
            major = majors.get(entry) or inf.axes.fresh(ways) if ways > 1 else ()
            out.append((*major, *dim))
        whole.append(tuple(out))
    return Called(whole, origins)


def _ways(mesh: Any, entry: Any) -> int:
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names)
