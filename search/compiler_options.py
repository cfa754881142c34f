"""Options of XLA that a plan's step is compiled with, chosen by what its mesh moves.

    plan = dataclasses.replace(plan, compiler_options=options_for(cluster.accelerator, plan))
    lowered.compile(compiler_options=options_on(plan, platform))

The gains below are of the step's seconds by roofline over the compiled schedule (`search.roofline`; libtpu 0.0.42):
compiled, not measured. Left alone, XLA:TPU compiles every all-reduce, and on v5p and v6e every all-gather, as an
operation that the program waits for. The names are those of MaxText's published sets
(github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py).

| group | plans | gain |
|---|---|---|
| `GATHERS` | all | v6e:8x8, 8B, fsdp=64: 13 % beyond `SUMS`; none on v5e, where it is the default |
| `SUMS` | no activations summed | v5p:4x4x4, 8B, fsdp=64: 9 %; v6e:8x8: 20 % with `GATHERS`; v5e:4x4, 1B: 4 % |
| `SCATTERS` | fsdp, sequence | with sequence: v5e:4x4, 1B, fsdp=4 tensor=4: 1 %; v6e:8x8, 8B, fsdp=16 tensor=4: 3 % |

`SUMS` is left out where tensor sums whole activations: there it is 10 % faster (v5e:4x4, 1B, data=4 tensor=4) in 12 %
more memory, which estimates do not count. Without effect on any plan tried, and so not here: optimisations of data
parallel all-reduces (`xla_tpu_enable_data_parallel_all_reduce_opt`, for slices joined by a network), two- and
three-dimensional reduce-scatters, all experimental features of the scheduler, the threshold of windowed einsums
(gathers of parameters are pinned here, so they are never windowed; with sequence parallelism windows are 1 % faster).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from search.accelerators import Accelerator
from sharding_rules import FSDP, TENSOR

if TYPE_CHECKING:
    from search.plan import Plan

Options = tuple[tuple[str, str], ...]

FUSE: Options = (
    ("xla_tpu_enable_async_collective_fusion", "true"),
    ("xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),
    ("xla_tpu_overlap_compute_collective_tc", "true"),
)
"""A collective is cut into steps that run inside the fusions of compute beside it."""
GATHERS: Options = (
    ("xla_enable_async_all_gather", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true"),
)
"""Gathers of parameters start ahead of the layer that needs them. Where they are not on by themselves: v5p, v6e."""
SUMS: Options = (
    ("xla_enable_async_all_reduce", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true"),
    ("xla_jf_crs_combiner_threshold_in_bytes", str(2**20)),
)
"""Gradients are summed behind the backward pass. Those of a layer are joined in one all-reduce unless told otherwise,
which can start only when the last of them is there; below 1 MiB they stay joined, since each costs a launch."""
SCATTERS: Options = (
    ("xla_enable_async_reduce_scatter_fusion", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter", "true"),
    ("xla_tpu_assign_all_reduce_scatter_layout", "true"),
    ("xla_tpu_relayout_group_size_threshold_for_reduce_scatter", "1"),
    ("xla_tpu_use_minor_sharding_for_major_trivial_input", "true"),
)
"""Reduce-scatters behind compute, in layouts that need no padding and no exchange with a neighbour after it."""
TPU_PREFIXES = ("xla_tpu_", "xla_jf_", "xla_enable_async_")


def options_for(accelerator: Accelerator, plan: Plan) -> Options:
    """Options for a plan on an accelerator, sorted by name; none where there is nothing to move, and none for GPUs.

    >>> from search import Plan, find_accelerator
    >>> from sharding_rules import MeshShape
    >>> options_for(find_accelerator("H100"), Plan(MeshShape(fsdp=8), "fsdp"))
    ()
    """
    if accelerator.kind != "tpu" or plan.mesh.size == 1:
        return ()
    sequence = "sequence" in plan.preset.split("+")
    sizes = plan.mesh.sizes
    chosen = [*FUSE, *GATHERS]
    if sizes[TENSOR] == 1 or sequence:
        chosen += SUMS
    if sizes[FSDP] > 1 or sequence:
        chosen += SCATTERS
    return tuple(sorted(chosen))


def options_on(plan: Plan, platform: str) -> dict[str, str | bool] | None:
    """A plan's options for `.compile(compiler_options=...)`, without those of TPUs where the devices are others.

    A plan made for TPUs is also run on CPUs, to try it.
    """
    options: dict[str, str | bool] = dict(plan.compiler_options)
    if platform != "tpu":
        options = {name: value for name, value in options.items() if not name.startswith(TPU_PREFIXES)}
    return options or None


__all__ = ["Options", "options_for", "options_on"]
