"""The text of an XLA program (HLO): computations, instructions, shapes and the lines of the program they come from.

    program = read(text)
    for op in program.entry.ops: print(op.name, op.opcode, op.bytes, op.source)

XLA for TPUs, GPUs and CPUs print the same language. Kernels put raw newlines into it: a computation ends only at a line
that is `}`. Source lines are written with each instruction, or, in newer text, as numbers of frames in tables.
`search.hlo` is the module to use; it adds loops and collectives.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

BITS = {"pred": 8, "bf16": 16, "tf32": 32, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
HOST_SPACE = 5
"""Memory space of a TPU program's buffers in the host's memory; 0 is the device's memory, others are on the chip."""

_STRING = r'"(?:[^"\\]|\\.)*"'
_QUOTED = re.compile(_STRING, re.DOTALL)
_BRACKET = re.compile(rf"{_STRING}|[(){{}}]", re.DOTALL)
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (?=\(|[a-z]\w*\[)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ROW = re.compile(r"^(\d+) (.*)$")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: `layout` is the text between its braces, `memory_space` the n of its `S(n)`, 0 without one."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""
    memory_space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return (self.elements * bits_of(self.dtype) + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


LIBRARIES = ("site-packages/", "dist-packages/", "<frozen ", "search/compile_guard.py", "lib/python3")
"""Where a line of code is not the user's."""
EVALUATORS = ("sharding_rules/", "pipelines/", "redco_like/compile_step.py")


@dataclasses.dataclass(frozen=True)
class Frame:
    """A line of the program that an op comes from."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One instruction.

    Attributes:
        shapes: of the result; those of a tuple one after another.
        operands: names, in the same computation.
        literal: the text between the parentheses: a constant's value, a parameter's number.
        attributes: the text after the parentheses, metadata and configuration included.
        called: (role, computation) pairs: `calls`, `to_apply`, `body`, `condition`, `branch_computations`, ...
        frames: lines of the program, innermost first; the text may have none, or only the innermost.
        computation: that it is in.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    op_name: str
    frames: tuple[Frame, ...]
    called: tuple[tuple[str, str], ...]
    computation: str
    root: bool = False

    @property
    def source_file(self) -> str:
        return self.frames[0].file if self.frames else ""

    @property
    def source_line(self) -> int:
        return self.frames[0].line if self.frames else 0

    @property
    def source(self) -> str:
        """`file:line` of the program, or nothing: the innermost line that is no library's, nor of what evaluates
        the model again with its splits (`sharding_rules`); else the innermost that is no library's; else the innermost.
        """
        own = [f for f in self.frames if not any(part in f.file for part in LIBRARIES)]
        of_model = [f for f in own if not any(part in f.file for part in EVALUATORS)]
        chosen = next(iter(of_model or own or self.frames), None)
        return str(chosen) if chosen else ""

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def backend_config(self) -> dict[str, Any] | None:
        """The configuration that the backend wrote, where it is JSON."""
        at = self.attributes.find("backend_config=")
        if at < 0:
            return None
        text = self.attributes[at + len("backend_config=") :]
        text = text[: _closed(text, 0)] if text.startswith("{") else ""
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return None

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call: what it calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes) if self.opcode == "custom-call" else None
        return found[1] if found else ""

    def callees(self, *roles: str) -> list[str]:
        """Computations that are called in one of these roles, or in any."""
        return [name for role, name in self.called if not roles or role in roles]

    def numbers(self, key: str) -> tuple[int, ...]:
        """Of an attribute `key={1,2}`."""
        found = re.search(rf"\b{key}=\{{([\d,\s]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n.strip()) if found else ()

    def number(self, key: str, default: int) -> int:
        """Of an attribute `key=3`."""
        found = re.search(rf"\b{key}=(\d+)", self.attributes)
        return int(found[1]) if found else default


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Ops in the order of the schedule (bodies of fusions: of the text)."""

    name: str
    ops: tuple[Op, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @functools.cached_property
    def root(self) -> Op:
        return next((op for op in self.ops if op.root), self.ops[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Op]:
        return {int(op.literal): op for op in self.ops if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Op]]:
        """Name -> ops that take it."""
        out: dict[str, list[Op]] = {op.name: [] for op in self.ops}
        for op in self.ops:
            for name in dict.fromkeys(op.operands):
                out.setdefault(name, []).append(op)
        return out

    def operand(self, op: Op, index: int) -> Op | None:
        """The op that makes an operand, if the text has it."""
        return self.by_name.get(op.operands[index]) if index < len(op.operands) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Computations by name, `entry` among them; `memo` keeps what was worked out of them."""

    name: str
    entry: Computation
    computations: dict[str, Computation]
    devices: int
    header: str = ""
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def callers(self) -> dict[str, list[Op]]:
        """Computation -> ops that call it."""
        out: dict[str, list[Op]] = {}
        for computation in self.computations.values():
            for op in computation.ops:
                for _, name in op.called:
                    out.setdefault(name, []).append(op)
        return out

    def within(self, name: str) -> Iterator[Op]:
        """Ops of a computation and of all that it calls."""
        for op in self.computations[name].ops if name in self.computations else ():
            yield op
            for callee in op.callees():
                yield from self.within(callee)


def bits_of(dtype: str) -> int:
    """Bits of an element.

    >>> bits_of("bf16"), bits_of("f8e4m3fn"), bits_of("s4")
    (16, 8, 4)
    """
    found = re.match(r"[a-z]+(\d+)", dtype)
    if dtype in BITS:
        return BITS[dtype]
    if found is None:
        raise ValueError(f"an element type of unknown size in the HLO text: {dtype!r}")
    return int(found[1])


def read(text: str) -> Program:
    """Read a program.

    Raises:
        ValueError: no entry computation; an op that is cut off (a dump that was still being written).
    """
    header, tables, bodies, entry = _lines(text)
    stack = _stack(tables)
    computations = {}
    for name, lines in bodies.items():
        ops = tuple(_op(line, name, stack) for line in lines)
        computations[name] = Computation(name, ops)
    if not entry or not computations[entry].ops:
        raise ValueError(f"the HLO text has no entry computation; it starts with {text[:80]!r}")
    name = re.match(r"HloModule ([^\s,]+)", header)
    partitions, replicas = (re.search(rf"\b{key}=(\d+)", header) for key in ("num_partitions", "replica_count"))
    devices = (int(partitions[1]) if partitions else 1) * (int(replicas[1]) if replicas else 1)
    return Program(name[1] if name else "", computations[entry], computations, devices, header)


def _lines(text: str) -> tuple[str, dict[str, dict[int, str]], dict[str, list[str]], str]:
    """Header, tables of source lines, computations with one text per op, and the entry's name."""
    header = entry = name = table = ""
    tables: dict[str, dict[int, str]] = {key: {} for key in _TABLES}
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if name:
            if line == "}" or line.startswith("}, execution_thread="):
                name = ""
            elif _OP.match(line):
                bodies[name].append(line)
            elif bodies[name]:
                bodies[name][-1] += "\n" + line
        elif line.startswith("HloModule"):
            header = line
        elif head := _HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif line in _TABLES:
            table = line
        elif table and (row := _ROW.match(line)):
            tables[table][int(row[1])] = row[2]
    return header, tables, bodies, entry


def _stack(tables: Mapping[str, Mapping[int, str]]) -> Mapping[int, tuple[Frame, ...]]:
    """Frame id -> lines of the program, innermost first. The text counts parents from 1 more than frames."""
    fields = {key: {i: dict(re.findall(r"(\w+)=(\d+)", row)) for i, row in tables[key].items()} for key in _TABLES[2:]}
    base = int(fields["StackFrames"].get(1, {}).get("parent_frame_id", 0))
    own: dict[int, tuple[Frame, int]] = {}
    for i, frame in fields["StackFrames"].items():
        place = fields["FileLocations"].get(int(frame["file_location_id"]), {})
        file, function = (
            tables[key].get(int(place.get(field, 0)), "").strip('"')
            for key, field in (("FileNames", "file_name_id"), ("FunctionNames", "function_name_id"))
        )
        own[i] = Frame(file, int(place.get("line", 0)), function), int(frame.get("parent_frame_id", 0)) - base
    out: dict[int, tuple[Frame, ...]] = {}
    for i in own:
        frames, at = [], i
        while at in own and len(frames) < len(own):
            frames.append(own[at][0])
            at = own[at][1]
        out[i] = tuple(frames)
    return out


def _closed(text: str, start: int) -> int:
    """Where the bracket at `start` closes, one past it."""
    depth = 0
    for found in _BRACKET.finditer(text, start):
        if found[0] in "({":
            depth += 1
        elif found[0] in ")}":
            depth -= 1
            if depth == 0:
                return found.end()
    raise ValueError(f"the HLO text is cut off: {text[start : start + 200]!r}")


def _op(line: str, computation: str, stack: Mapping[int, tuple[Frame, ...]]) -> Op:
    head = _OP.match(line)
    if head is None:
        raise ValueError(f"no HLO instruction: {line[:200]!r}")
    at = head.end()
    end = _closed(line, at) if line[at] == "(" else line.index(" ", at)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"no opcode in {line[:200]!r}")
    close = _closed(line, opcode.end() - 1)
    literal, attributes = line[opcode.end() : close - 1], line[close:]
    names = re.findall(r"%([\w.\-]+)", literal)
    if not names and opcode[1] not in ("constant", "parameter", "iota"):
        names = [part.split()[-1] for part in re.sub(r"/\*.*?\*/", "", literal).split(",") if part.strip()]
    called = []
    for role, several, one in _CALLED.findall(_QUOTED.sub('""', attributes) if "=" in attributes else ""):
        called += [(role, part.strip().lstrip("%")) for part in (several or one).split(",") if part.strip()]
    meta = attributes[attributes.find("metadata={") :] if "metadata={" in attributes else ""
    op_name = re.search(rf"op_name=({_STRING})", meta)
    return Op(
        name=head[2],
        opcode=opcode[1],
        shapes=_shapes(line[at:end]),
        operands=tuple(names),
        literal=literal,
        attributes=attributes,
        op_name=op_name[1][1:-1] if op_name else "",
        frames=_frames(meta, stack),
        called=tuple(called),
        computation=computation,
        root=bool(head[1]),
    )


def _frames(meta: str, stack: Mapping[int, tuple[Frame, ...]]) -> tuple[Frame, ...]:
    if found := re.search(r"stack_frame_id=(\d+)", meta):
        return stack.get(int(found[1]), ())
    if found := re.search(r'source_file="([^"]*)"(?:.*?source_line=(\d+))?', meta):
        return (Frame(found[1], int(found[2] or 0), ""),)
    return ()


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*found) for found in _SHAPE.findall(text))


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(n.strip().lstrip("<=")) for n in dims.split(",") if n.strip())
    return Shape(dtype, sizes, layout, int(space[1]) if space else 0)
