"""Calls of `jit` written out, so that a function reads the same however it was wrapped.

    jaxpr = inline_calls(jax.make_jaxpr(loss)(params, batch))

Loops, branches and rematerialisation stay, with their bodies written out; custom gradients and kernels stay as
they are. Calls of `attention` and `experts` are written out too, and where each of them lies is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from sharding_rules.kernels import Call, kernel_call

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})
CONTROL_FLOW = frozenset({"scan", "while", "cond", "checkpoint", "remat", "remat2"})

Done = dict[int, tuple[Jaxpr, Jaxpr]]
"""Bodies written out already, by identity of the original, which is kept so that its identity is not reused."""


@dataclasses.dataclass(frozen=True)
class WrittenOut:
    """A call of `attention` or `experts` that was written out.

    Attributes:
        call: what it computes.
        operands, result: of the call.
        stop: position after its last equation, in the jaxpr that it is part of now.
    """

    call: Call
    operands: tuple[Var | Literal, ...]
    result: Var
    stop: int


Found = dict[Var, WrittenOut]
"""By the first variable that the call's first equation makes."""


def inline_calls(closed: ClosedJaxpr, found: Found | None = None) -> ClosedJaxpr:
    """Write out every call, in bodies of loops and branches too. Shared bodies stay shared.

    Args:
        closed: the jaxpr.
        found: filled with the calls of `attention` and `experts` in it.
    """
    return ClosedJaxpr(_inlined(closed.jaxpr, {}, {} if found is None else found), closed.consts)


def _inlined(jaxpr: Jaxpr, done: Done, found: Found) -> Jaxpr:
    if id(jaxpr) not in done:
        eqns: list[JaxprEqn] = []
        outs = _write_out(jaxpr, {}, eqns, done, found, fresh=False)
        new = Jaxpr(jaxpr.constvars, jaxpr.invars, outs, eqns, jaxpr.effects, jaxpr.debug_info)
        done[id(jaxpr)] = jaxpr, new
    return done[id(jaxpr)][1]


def _write_out(
    jaxpr: Jaxpr, env: dict[Var, Var | Literal], eqns: list[JaxprEqn], done: Done, found: Found, *, fresh: bool
) -> list[Var | Literal]:
    """Append the equations of a jaxpr whose inputs are in `env`; its results. A call's own variables are renamed."""

    def read(atoms: Sequence[Any]) -> list[Any]:
        return [atom if isinstance(atom, Literal) else env.get(atom, atom) for atom in atoms]

    for eqn in jaxpr.eqns:
        body = _body(eqn)
        if body is not None:
            start, operands = len(eqns), read(eqn.invars)
            outs = _write_out(body, dict(zip(body.invars, operands, strict=True)), eqns, done, found, fresh=True)
            env.update(zip(eqn.outvars, outs, strict=True))
            if (call := kernel_call(eqn)) is not None and isinstance(outs[0], Var):
                found[eqns[start].outvars[0]] = WrittenOut(call, tuple(operands), outs[0], len(eqns))
            continue
        invars, outvars, params = read(eqn.invars), eqn.outvars, eqn.params
        if fresh:
            outvars = [Var(var.aval) for var in outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
        if eqn.primitive.name in CONTROL_FLOW:
            params = {name: _param(value, done, found) for name, value in params.items()}
        eqns.append(eqn.replace(invars=invars, outvars=outvars, params=params))
    return read(jaxpr.outvars)


def _body(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr of a plain call without constants of its own."""
    if eqn.primitive.name not in CALLS:
        return None
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if isinstance(body, ClosedJaxpr):
        body = None if body.consts else body.jaxpr
    return body if isinstance(body, Jaxpr) and not body.constvars else None


def _param(value: Any, done: Done, found: Found) -> Any:
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_inlined(value.jaxpr, done, found), value.consts)
    if isinstance(value, Jaxpr):
        return _inlined(value, done, found)
    if isinstance(value, tuple) and any(isinstance(item, Jaxpr | ClosedJaxpr) for item in value):
        return tuple(_param(item, done, found) for item in value)
    return value
