"""How often the loops of an XLA program run.

    trips(program, loop)          # 32, or None where the text does not tell

GPU and CPU text says it. For TPUs it follows from the condition's bound, the first value of what it compares, and the
step: all of them may be fused, and the bound and the first value may be passed in from the loops around. Loops over
parts of a product (windowed einsum) count by two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from search.hlo_text import Computation, Op, Program


@dataclasses.dataclass(frozen=True)
class _Carried:
    """An element of what a loop carries, plus a number."""

    element: int
    plus: int = 0


_Scalar = int | _Carried | None
_SAME = frozenset("copy bitcast convert reshape copy-start copy-done broadcast optimization-barrier".split())
_TURNED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}


def trips(program: Program, loop: Op) -> int | None:
    """Iterations of a `while`: as the compiler wrote them, else from its condition; None where neither tells."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    body, condition = (program.computations.get(next(iter(loop.callees(role)), "")) for role in ("body", "condition"))
    if body is None or condition is None or not condition.ops:
        return None
    compared = _compared(program, condition, condition.root, {})
    if compared is None:
        return None
    left, right, direction = compared
    if not isinstance(left, _Carried) or (isinstance(right, _Carried) and not _constant(program, body, right)):
        left, right, direction = right, left, _TURNED.get(direction, direction)
    bound = _first(program, loop, body, right) if isinstance(right, _Carried) else right
    if not isinstance(left, _Carried) or bound is None:
        return None
    after = _element(program, body, body.root, left.element, {})
    first = _initial(program, loop, left.element)
    if not isinstance(after, _Carried) or after.element != left.element or first is None or not after.plus:
        return None
    return _count(first + left.plus, bound, after.plus, direction)


def _count(first: int, bound: int, step: int, direction: str) -> int | None:
    """Iterations while `first + i * step` compares with the bound.

    >>> _count(0, 7, 2, "LT"), _count(8, 0, -1, "GT"), _count(0, 3, 1, "GT")
    (4, 8, 0)
    """
    distance = bound - first
    if direction == "NE":
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    elif direction not in ("LT", "LE"):
        return None
    distance += direction in ("LE", "GE")
    if step <= 0:
        return 0 if distance <= 0 else None
    return max(0, -(-distance // step))


def _compared(
    program: Program, computation: Computation, op: Op, bound: Mapping[int, _Scalar]
) -> tuple[_Scalar, _Scalar, str] | None:
    """The two sides of a condition and how they compare."""
    if op.opcode == "compare":
        sides = [_scalar(program, computation, computation.operand(op, i), bound) for i in (0, 1)]
        direction = re.search(r"direction=(\w+)", op.attributes)
        return sides[0], sides[1], direction[1] if direction else ""
    if op.opcode in _SAME and (inner := computation.operand(op, 0)):
        return _compared(program, computation, inner, bound)
    if op.opcode in ("fusion", "call") and op.callees():
        inside = program.computations[op.callees()[0]]
        return _compared(program, inside, inside.root, _arguments(program, computation, op, bound))
    return None


def _arguments(program: Program, computation: Computation, op: Op, bound: Mapping[int, _Scalar]) -> dict[int, _Scalar]:
    operands = (computation.operand(op, i) for i in range(len(op.operands)))
    return {i: _scalar(program, computation, operand, bound) for i, operand in enumerate(operands)}


def _scalar(program: Program, computation: Computation, op: Op | None, bound: Mapping[int, _Scalar]) -> _Scalar:
    """Value of an op; `bound` has those of a fused computation's parameters."""
    if op is None:
        return None
    match op.opcode:
        case "constant":
            found = re.fullmatch(r"\{?(-?\d+)\}?", op.literal.strip())
            return int(found[1]) if found else None
        case "parameter":
            return bound.get(int(op.literal))
        case "get-tuple-element":
            return _element(program, computation, computation.operand(op, 0), op.number("index", 0), bound)
        case "add" | "subtract" | "multiply":
            a, b = (_scalar(program, computation, computation.operand(op, i), bound) for i in (0, 1))
            return _combined(op.opcode, a, b)
        case "fusion" | "call" if op.callees():
            inside = program.computations[op.callees()[0]]
            return _scalar(program, inside, inside.root, _arguments(program, computation, op, bound))
        case opcode if opcode in _SAME:
            return _scalar(program, computation, computation.operand(op, 0), bound)
    return None


def _combined(opcode: str, a: _Scalar, b: _Scalar) -> _Scalar:
    if a is None or b is None:
        return None
    if opcode == "add":
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if isinstance(a, _Carried) and isinstance(b, int):
            return _Carried(a.element, a.plus + b)
        if isinstance(b, _Carried) and isinstance(a, int):
            return _Carried(b.element, b.plus + a)
    elif opcode == "subtract" and isinstance(b, int):
        return a - b if isinstance(a, int) else _Carried(a.element, a.plus - b)
    elif opcode == "multiply" and isinstance(a, int) and isinstance(b, int):
        return a * b
    return None


def _element(
    program: Program, computation: Computation, op: Op | None, index: int, bound: Mapping[int, _Scalar]
) -> _Scalar:
    """Value of an element of a tuple; of the parameter of a loop, what is carried."""
    if op is None:
        return None
    match op.opcode:
        case "parameter":
            return _Carried(index)
        case "tuple":
            return _scalar(program, computation, computation.operand(op, index), bound)
        case "copy" | "optimization-barrier" | "copy-done":
            return _element(program, computation, computation.operand(op, 0), index, bound)
        case "fusion" if op.callees():
            inside = program.computations[op.callees()[0]]
            return _element(program, inside, inside.root, index, _arguments(program, computation, op, bound))
        case "while":
            body = program.computations.get(next(iter(op.callees("body")), ""))
            if body is not None and _constant(program, body, _Carried(index)):
                return _element(program, computation, computation.operand(op, 0), index, bound)
    return None


def _constant(program: Program, body: Computation, carried: _Carried) -> bool:
    """Whether a loop passes an element of its carry on as it is."""
    return _element(program, body, body.root, carried.element, {}) == _Carried(carried.element)


def _first(program: Program, loop: Op, body: Computation, carried: _Carried) -> int | None:
    """Value of an element that a loop passes on as it is."""
    if not _constant(program, body, carried):
        return None
    first = _initial(program, loop, carried.element)
    return None if first is None else first + carried.plus


def _initial(program: Program, loop: Op, index: int) -> int | None:
    """Value of an element of a loop's carry before the first iteration, through the loops around it."""
    computation = program.computations[loop.computation]
    value = _element(program, computation, computation.operand(loop, 0), index, {})
    if not isinstance(value, _Carried):
        return value
    outer = [op for op in program.callers.get(computation.name, ()) if op.opcode == "while"]
    values = {_first(program, op, computation, value) for op in outer}
    return values.pop() if len(values) == 1 else None
