"""What devices attain of their peaks: the constants of the cost model, from `efficiencies.toml` where they were fitted.

    Efficiency.for_accelerator(find_accelerator("H100"))

`redco-like validate` fits them on published runs, within physical bounds, and writes the file; `redco-like profile`
measures them on the devices at hand.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import tomllib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from search.accelerators import Accelerator
from sharding_rules import CONTEXT, TENSOR

Floats = npt.NDArray[np.float64]
Framework = Literal["compiled", "megatron", "megatron-core", "eager"]
"""How operations reach the device: XLA; PyTorch with the elementwise operations fused by hand, whose collectives are
waited for; the same on Transformer Engine, whose collectives over tensor and context run piece by piece with the
products they feed; PyTorch as it comes."""
PARENTS: dict[str, tuple[Framework, ...]] = {"megatron-core": ("megatron",)}
"""Frameworks whose constants hold where one has none of its own."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What devices attain of their peaks; all analytic. The defaults are neutral or assumed; the file has fitted ones.

    Attributes:
        matmul: of the peak, by a large matrix product. 0.9: cuBLAS at 4096 and up on A100 and H100, and the TPU's
            matrix unit (jax-ml.github.io/scaling-book/tpus: sustained close to the peak).
        half_size: rows or columns (m, n) of a product that halve its efficiency, x / (x + half_size): an assumption;
            half a tile of 32 is lost on edges and on filling the pipeline.
        half_depth: the same of k, for the dtype whose peak is that of bfloat16; a dtype twice as fast needs twice it.
        tile: to a multiple of which n and k above half of it are filled up: the side of a TPU's matrix unit (128; 256
            on v6e and 7x: cloud.google.com/tpu/docs/v6e); 1 where tiles differ with the product.
        half_output: elements of a product's result that halve its efficiency: too few to fill all processors evenly.
            Half a wave of tiles of 128 x 128 on the 108 processors of an A100 is 0.9e6; 0 where tiles run one by one.
        narrow: of `matmul`, by products in 8 bits and fewer.
        attention: of the peak, by fused attention forward, all scores counted: a causal kernel that leaves out half of
            them attains twice its share (FlashAttention-2, Dao 2023: 0.5 to 0.73 on A100 of the half).
        attention_backward: of `attention`, in the backward pass, where a kernel makes the scores again.
        contiguous: 1 where the parts of a sequence that context splits are contiguous, so that the device with the last
            one computes most of a causal mask's scores; 0 where each has an early and a late part.
        vector: elementwise arithmetic per peak flop: 67 of 989 TFLOP/s on H100, about 1/30 on TPUs.
        transcendental_flops: that one transcendental operation counts as: assumed.
        bandwidth: of the memory's, by a large loop (0.85: STREAM on HBM reaches 0.8 to 0.92).
        loop_traffic: bytes that elementwise loops and reductions move per byte of the rule of fusion (`search.fusion`).
        stack_traffic: times that what a loop keeps for its backward pass is copied into an array of all iterations, and
            as often out of it: XLA does it, where other software keeps each iteration's arrays.
        routed_traffic: bytes that sorting tokens by experts and back moves per byte of what the model writes out:
            kernels that read through an index, and gathers fused into what reads them, move fewer.
        matrix_copies: times that experts' matrices which are gathered over devices, and their gradients, are copied
            into another order: a kernel takes them in its own, where XLA's products take what a gather leaves.
        weight_casts: 1 where parameters that lie wider than they compute are cast once per step, on their own device.
        weight_copies: times that a device's own part of a layer's weights, and of their gradient, is copied out of the
            array of all layers and into it, per microbatch: XLA's loops do it where products do not read through it.
        update_copies: times that parameters are copied when the optimizer's shards have been gathered (ZeRO-1): XLA for
            TPUs copies what it is given and what it returns, as these share memory.
        own_experts: 1 where experts of a device's own are computed as `pipelines.experts` does: see `search.op_times`.
        room_for_all: share of the room for the tokens of all devices in its arrays that is moved besides the part that
            is filled; XLA for GPUs fuses what reads them.
        gradient_passes: times that the gradients move through memory when those of a microbatch are added to the sum: 3
            where it is a loop of its own, fewer where products add to it.
        launch_seconds: by kind of accelerator, of one operation: a GPU kernel about 2 us inside a CUDA graph, a TPU
            fusion under 1 us, a CPU loop 5 us: assumed.
        overlap_slowdown: of both sides while compute and a collective run together: 1.13 measured by Galvatron
            (github.com/PKU-DAIR/Hetu-Galvatron, overlap coefficient).
        unhidden: share of the collectives between operations that is waited for, the rest runs behind the products it
            feeds (XLA's collective matmul, Wang et al. 2023); on GPUs with copies of what is gathered along a sequence.
        kernels_cover, loops_cover: share of the kernels (attention, experts) and of the loops that collectives may run
            behind, beside XLA's products: 1 where they have streams of their own; XLA for TPUs runs them within the
            fusions of products, and of few others.
        sums_waited: share of the sums of gradients that is waited for where they are cut into shards or are those of
            experts, which a call sums at its end: XLA for GPUs hides all-reduces, but not these.
        sums_behind_weights: 1 where all-reduces of the backward pass (gradients of inputs, over tensor) run behind the
            products of the weights' gradients, which do not wait for them: XLA's scheduler for GPUs does it.
        in_pieces: 1 where those over tensor and context run as a ring, one piece per member, each piece behind the
            product of the one before: the first is waited for (Transformer Engine's userbuffers, ring attention).
        links, network: bandwidth of collectives inside a node or slice, and of those that leave it, over what
            `search.collectives` says.
        spread: relative error of a step time: the interval of an estimate is [t / (1 + spread), t (1 + spread)].
    """

    matmul: float = 0.9
    half_size: float = 16.0
    half_depth: float = 16.0
    tile: float = 1.0
    half_output: float = 0.0
    narrow: float = 1.0
    attention: float = 0.6
    attention_backward: float = 1.0
    contiguous: float = 0.0
    vector: float = 1 / 30
    transcendental_flops: float = 8.0
    bandwidth: float = 0.85
    loop_traffic: float = 1.0
    stack_traffic: float = 0.0
    routed_traffic: float = 1.0
    matrix_copies: float = 0.0
    weight_casts: float = 0.0
    weight_copies: float = 0.0
    update_copies: float = 0.0
    own_experts: float = 0.0
    room_for_all: float = 0.0
    gradient_passes: float = 3.0
    launch_seconds: tuple[tuple[str, float], ...] = (("gpu", 2e-6), ("tpu", 5e-7), ("cpu", 5e-6))
    overlap_slowdown: float = 1.13
    unhidden: float = 1.0
    kernels_cover: float = 1.0
    loops_cover: float = 1.0
    sums_waited: float = 0.0
    sums_behind_weights: float = 0.0
    in_pieces: float = 0.0
    links: float = 1.0
    network: float = 1.0
    spread: float = 0.15

    @classmethod
    def for_accelerator(cls, accelerator: Accelerator, framework: Framework = "compiled") -> Efficiency:
        """Read the constants of an accelerator from the packaged file.

        Those of the kind (gpu, tpu) hold where an accelerator has none of its own, and the defaults of this class where
        the kind has none.
        """
        table = _fitted()
        kind = table.get(accelerator.kind, {})
        own = table.get(accelerator.name, {})
        values: dict[str, Any] = {}
        names = (*PARENTS.get(framework, ()), framework)
        for entry in (kind, *(kind.get(n, {}) for n in names), own, *(own.get(n, {}) for n in names)):
            values |= {name: value for name, value in entry.items() if name in _NUMBERS}
        return cls(**values)

    def waited(self, axes: Sequence[str], size: Any) -> Floats:
        """Share of a collective between operations that is waited for, by its mesh axes and its number of members.

        >>> float(Efficiency(in_pieces=1.0).waited(("tensor",), 4))
        0.25
        """
        whole = np.full(np.shape(size), self.unhidden)
        if set(axes) <= {TENSOR, CONTEXT}:
            return self.in_pieces / np.maximum(size, 1) + (1 - self.in_pieces) * whole
        return whole

    def product(self, m: Any, n: Any, k: Any, *, batch: Any = 1.0, speed: Any = 1.0) -> Floats:
        """Share of the peak that a product of (m, k) and (k, n) attains on one device.

        A result of fewer elements than `half_output` is made in pieces of its depth that run at once and are added
        (split-K in cuBLAS and CUTLASS), none shorter than `half_depth`: one token's products with a large matrix.

        Args:
            m, n, k: sizes.
            batch: products of this size that run at once.
            speed: peak of the dtype over that of bfloat16.

        >>> float(Efficiency().product(16, 1e9, 1e9).round(3))
        0.45
        """
        share = np.float64(self.matmul)
        elements = np.asarray(batch, np.float64) * m * n
        depth = np.asarray(k, np.float64)
        half_depth = self.half_depth * np.asarray(speed)
        if self.half_output:
            pieces = np.minimum(self.half_output / np.maximum(elements, 1), depth / np.maximum(half_depth, 1))
            pieces = np.maximum(pieces, 1)
            elements, depth = elements * pieces, depth / pieces
        for size, half in ((m, self.half_size), (n, self.half_size), (depth, half_depth)):
            share = share * (size / (np.asarray(size, np.float64) + half))
        if self.tile > 1:
            for size in (np.asarray(n, np.float64), np.asarray(k, np.float64)):
                filled = np.ceil(size / self.tile) * self.tile
                share = share * np.where(size > self.tile / 2, size / filled, 1.0)
        return np.asarray(share * (elements / (elements + self.half_output)))


MAY_BE_ZERO = ("loop_traffic", "routed_traffic", "kernels_cover", "loops_cover", "unhidden")
"""Shares whose default is not 0, and that may be."""
_NUMBERS = frozenset(field.name for field in dataclasses.fields(Efficiency) if field.name != "launch_seconds")


@functools.cache
def _fitted() -> dict[str, Any]:
    file = importlib.resources.files("search").joinpath("efficiencies.toml")
    return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
