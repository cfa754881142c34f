"""What devices attain of their peaks: the constants of the cost model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What devices attain of their peaks: explicit constants, all analytic, to be replaced by fitted or measured ones.

    Attributes:
        matmul: of the peak, by a large matrix product. 0.9: cuBLAS at 4096 and up on A100 and H100, and the TPU's
            matrix unit (jax-ml.github.io/scaling-book/tpus: sustained close to the peak).
        half_size: a dimension of this size halves the efficiency of a product, x / (x + half_size) for each of m,
            n, k: an assumption; half a tile of 32 is lost on edges and on filling the pipeline.
        attention: of the peak, by fused attention (FlashAttention-2, Dao 2023: 0.5 to 0.73 on A100).
        vector: elementwise arithmetic per peak flop: 67 of 989 TFLOP/s on H100, about 1/30 on TPUs.
        transcendental_flops: that one transcendental operation counts as: assumed.
        bandwidth: of the memory's, by a large loop (0.85: STREAM on HBM reaches 0.8 to 0.92).
        launch_seconds: by kind of accelerator, of one operation: a GPU kernel about 2 us inside a CUDA graph, a TPU
            fusion under 1 us, a CPU loop 5 us: assumed.
        overlap_slowdown: of both sides while compute and a collective run together: 1.13 measured by Galvatron
            (github.com/PKU-DAIR/Hetu-Galvatron, overlap coefficient).
        spread: relative error of a step time: the interval of an estimate is [t / (1 + spread), t (1 + spread)].
    """

    matmul: float = 0.9
    half_size: float = 16.0
    attention: float = 0.6
    vector: float = 1 / 30
    transcendental_flops: float = 8.0
    bandwidth: float = 0.85
    launch_seconds: tuple[tuple[str, float], ...] = (("gpu", 2e-6), ("tpu", 5e-7), ("cpu", 5e-6))
    overlap_slowdown: float = 1.13
    spread: float = 0.15

    def product(self, m: Any, n: Any, k: Any) -> Floats:
        """Share of the peak that a product of (m, k) and (k, n) attains on one device.

        >>> float(Efficiency().product(16, 1e9, 1e9).round(3))
        0.45
        """
        share = np.float64(self.matmul)
        for size in (m, n, k):
            share = share * (size / (np.asarray(size, np.float64) + self.half_size))
        return np.asarray(share)
