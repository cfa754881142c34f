"""Matrix products of an XLA program, and the kernels that are made of them.

    sum(product.flops for op in program.entry.ops for product in products(program, op))

XLA for TPUs writes products with batch dimensions as convolutions: what counts is the window positions that fall on
data. Kernels are opaque; those of attention and of ragged products are known by name, and their flops follow from the
shapes of their operands.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Literal

from search.flops import valid_positions
from search.hlo_text import Computation, Op, Program, Shape


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, or a kernel made of them.

    Attributes:
        flops: per device; of a kernel that leaves out scores, those computed, as a mean over devices.
        dtype: of its operands, as HLO writes it.
        passes: over the multiplier (float32 on a TPU takes several where the program asks for precision).
        kernel: "attention" or "ragged", or nothing.
        slowest: flops of the device with most of them over `flops` (causal attention of a part of the queries).
        sizes: rows, columns and depth of one product of a dot or of products in groups; none where they are not read.
    """

    flops: int
    dtype: str
    passes: int = 1
    kernel: Literal["", "attention", "ragged"] = ""
    slowest: float = 1.0
    sizes: tuple[int, ...] = ()


def products(program: Program, op: Op) -> tuple[Product, ...]:
    """Products of one execution of an op, of a fusion or an asynchronous call those inside; none of loops and calls."""
    key = "products", op.computation, op.name
    if key not in program.memo:
        program.memo[key] = _products(program, op)
    return program.memo[key]


def _products(program: Program, op: Op) -> tuple[Product, ...]:
    computation = program.computations[op.computation]
    match op.opcode:
        case "fusion" | "async-start":
            inside = (inner for name in op.callees() for inner in program.computations[name].ops)
            found = tuple(product for inner in inside for product in products(program, inner))
            groups = _skipped_groups(computation, op)
            if groups > 1:
                return tuple(dataclasses.replace(made, flops=made.flops // groups, kernel="ragged") for made in found)
            return found
        case "dot":
            return (_dot(computation, op, op.numbers("lhs_contracting_dims")),)
        case "convolution":
            return (_convolution(computation, op),)
        case "ragged-dot":
            return (_ragged(computation, op, 0),)
        case "custom-call":
            found = _kernel(computation, op)
            return (found,) if found else ()
    return ()


def _skipped_groups(computation: Computation, op: Op) -> int:
    """How many matrices a TPU fusion makes of one and the same rows, each row for one of them.

    The gradient of a ragged product's weights is written as a product of all rows for every group, masked by
    `pred[groups, rows]`; blocks whose mask is empty are skipped, so that every row enters once.
    """
    mask = (op.backend_config or {}).get("mask_aggregator_config") or {}
    if mask.get("iteration_skipper_mode", "").rpartition("MODE_")[2] in ("", "NONE", "UNSPECIFIED", "INVALID"):
        return 1
    masks = [shape for shape in _operand_shapes(computation, op) if shape.dtype == "pred" and len(shape.dims) == 2]
    return masks[0].dims[0] if len(masks) == 1 else 1


def _operand_shapes(computation: Computation, op: Op) -> list[Shape]:
    made = [computation.by_name[name] for name in op.operands]
    return [m.shapes[0] if len(m.shapes) == 1 else Shape("token", ()) for m in made]


def _dot(computation: Computation, op: Op, contracted: Sequence[int]) -> Product:
    lhs = _operand_shapes(computation, op)[0]
    depth = math.prod(lhs.dims[i] for i in contracted)
    rows, columns = (1, 1, *op.shapes[0].dims)[-2:]
    size = 2 * op.shapes[0].elements * depth
    return Product(size, lhs.dtype, _passes(lhs.dtype, op), sizes=(rows, columns, depth))


def _passes(dtype: str, op: Op) -> int:
    asked = re.search(r"operand_precision=\{([^}]*)\}", op.attributes)
    return {"highest": 6, "high": 3}.get(asked[1].split(",")[0].strip(), 1) if asked and dtype == "f32" else 1


def _convolution(computation: Computation, op: Op) -> Product:
    """A convolution: one product per output element, input feature and window position that falls on data."""
    lhs, rhs = _operand_shapes(computation, op)[:2]
    out = op.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {op.name}")
    places = [{label: i for i, label in enumerate(part)} for part in labels.groups()]
    spatial = sorted(label for label in places[2] if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    each = {
        key: fields[key].split("x") if key in fields else [] for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    valid = 1
    for n, label in enumerate(spatial):
        stride, lhs_dilate, rhs_dilate = (
            int(each[key][n]) if each[key] else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(each["pad"][n].split("_")[0]) if each["pad"] else 0
        sizes = lhs.dims[places[0][label]], rhs.dims[places[1][label]], out.dims[places[2][label]]
        valid *= _positions(*sizes, stride, low, lhs_dilate, rhs_dilate)
    rows, columns = out.dims[places[2]["b"]], out.dims[places[2]["f"]]
    size = 2 * rows * columns * rhs.dims[places[1]["i"]] * valid
    return Product(size, lhs.dtype, _passes(lhs.dtype, op))


_positions = functools.lru_cache(maxsize=4096)(valid_positions)


def _ragged(computation: Computation, op: Op, lhs: int) -> Product:
    """Rows in groups, each with a matrix of its own, or the gradient of those matrices: every row enters once."""
    a, b = _operand_shapes(computation, op)[lhs : lhs + 2]
    rows, inner = a.dims[0], a.dims[-1]
    columns = op.shapes[0].dims[-1] if len(op.shapes[0].dims) == 2 else b.dims[-1]
    # Of the gradient of matrices the rows are what is summed over.
    sizes = (rows, columns, inner) if len(op.shapes[0].dims) == 2 else (inner, columns, rows)
    return Product(2 * rows * inner * columns, a.dtype, kernel="ragged", sizes=sizes)


SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products of the splash attention kernels: forward scores and values; dq and dkv compute the scores again."""
FUSED_BACKWARD_PRODUCTS = 5
GPU_PRODUCTS = {"mha_forward": 2, "mha_backward": 7}
"""Of the Triton kernels of `jax.experimental.pallas.ops.gpu.attention`: backward loops over queries and over keys."""
_GROUPED = re.compile(r"\bgrouped_(rows|matrices)\b")
"""Kernels of `pipelines.grouped` and `pipelines.grouped_tpu`."""
_CALL = re.compile(r"\battention_(causal|full)(?:_window(\d+))?")
"""Name of a call of `sharding_rules.attention`, in the names of the operations that compute it."""


def _kernel(computation: Computation, op: Op) -> Product | None:
    """Products of a kernel that a rule knows."""
    if op.target.startswith("__cublas$"):
        numbers = (op.backend_config or {}).get("gemm_backend_config", {}).get("dot_dimension_numbers", {})
        return _dot(computation, op, [int(n) for n in numbers.get("lhs_contracting_dimensions", ())])
    shapes = _operand_shapes(computation, op)
    floats = [shape for shape in shapes if len(shape.dims) >= 3 and shape.dtype.startswith(("bf", "f"))]
    called = _CALL.search(op.op_name)
    if op.target == "tpu_custom_call":
        if re.match(r"ragged-dot(?!-metadata)", op.name) or _GROUPED.search(op.op_name):
            return _ragged(computation, op, next(i for i, s in enumerate(shapes) if s.dtype.startswith(("bf", "f"))))
        found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{op.name} {op.op_name}")
        if found and len(floats) >= 3:
            # Without a name: the positions of the queries are an operand where a mask is computed.
            causal = called[1] == "causal" if called else any(s.dtype == "s32" and len(s.dims) == 2 for s in shapes)
            fused = found[1] == "dkv" and re.search(r'use_fused_bwd_kernel\\*": true', op.attributes)
            count = FUSED_BACKWARD_PRODUCTS if fused else SPLASH_PRODUCTS[found[1]]
            return _attention(count, floats[0], floats[1], -2, causal, called)
    if op.target == "__gpu$xla.gpu.triton":
        if _GROUPED.search(op.op_name):
            return _ragged(computation, op, next(i for i, s in enumerate(shapes) if s.dtype.startswith(("bf", "f"))))
        found = re.search(r"\b(mha_forward|mha_backward)\b", op.op_name)
        if found and len(floats) >= 3:
            causal = called is None or called[1] == "causal"
            return _attention(GPU_PRODUCTS[found[1]], floats[0], floats[1], -3, causal, called)
    return None


def _attention(
    count: int, query: Shape, key: Shape, length: int, causal: bool, called: re.Match[str] | None
) -> Product:
    """`count` products of queries with keys; of a causal kernel half of the scores, of a window its part of them.

    Of queries that are a part of the sequence, the last part sees most keys.
    """
    queries, keys = query.dims[length], key.dims[length]
    full = 2 * count * query.elements * keys
    if not causal:
        return Product(full, query.dtype, kernel="attention")
    if called and called[2]:
        window = min(int(called[2]), keys)
        return Product(int(full * window * (keys - window / 2) / keys**2), query.dtype, kernel="attention")
    slowest = 2 - queries / keys if queries < keys else 1.0
    return Product(full // 2, query.dtype, kernel="attention", slowest=slowest)
