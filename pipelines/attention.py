"""Which kernel computes attention, and on which part of it each device works.

    kernels = attention_kernels(plan.attention, mesh)         # None where attention is computed as the model says
    pinned = layout.pin(mesh, remat=plan.remat, kernels=kernels)
    kernels.choices                                           # what was chosen for each call, and why

TPU: splash attention. GPU: cuDNN where it can run, else Pallas-Triton's flash attention. CPU: none. Kernels run inside
`jax.shard_map` over the whole mesh: examples and heads as the layout splits them, queries over `context` with keys and
values whole. What a kernel cannot do is computed plainly, and a warning says so once.

Shape letters: B batch, L queries, M keys, N = K * G heads, K kv heads, G groups, H head dim, V value dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules import AttentionCall
from sharding_rules.kernels import Call

TILE = 128
"""Rows of queries and of keys that the kernels read at least."""
SPLASH_BLOCKS = (512, 256, 128)
"""Rows per block of splash attention; the largest one that needs little padding is taken."""
GPUS = ("gpu", "cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel of one call, and why it was taken."""

    kernel: Literal["splash", "cudnn", "triton", "plain"]
    reason: str


@dataclasses.dataclass(frozen=True)
class Parts:
    """One call as it is spread over a mesh.

    Attributes:
        call: what is computed.
        queries, keys, values: shapes of the whole arrays, (B, L, N, H), (B, M, K, H) and (B, M, K, V).
        dtype: of all of them.
        rows, length, heads, kv_heads: mesh axes of the batch, of the queries, of their heads, and of the kv heads,
            which are whole on every device where they do not divide.
        keys_length: mesh axes of the keys and values, before they are gathered.
        ways: numbers of parts of the queries and of their heads.
        head_dim_split: whether the layout splits the head dimension, which kernels take whole.
    """

    call: AttentionCall
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]
    dtype: Any
    rows: Any
    length: Any
    heads: Any
    kv_heads: Any
    keys_length: Any
    ways: tuple[int, int]
    head_dim_split: bool

    @property
    def local_heads(self) -> int:
        return self.queries[2] // self.ways[1]

    @property
    def groups(self) -> int:
        return self.queries[2] // self.keys[2]


def attention_kernels(attention: Literal["fused", "plain"], mesh: Mesh) -> AttentionKernels | None:
    """Kernels for a mesh under a plan's `attention`; None where there are none to use."""
    platform = mesh.devices.flat[0].platform
    return AttentionKernels(platform) if attention == "fused" and platform in ("tpu", *GPUS) else None


class AttentionKernels:
    """Computes calls of `attention` by kernels; `Layout.pin` takes it.

    Attributes:
        platform: of the devices.
        interpret: run the kernels' code step by step, on any platform (for tests).
        choices: what was chosen for each call so far.
    """

    def __init__(self, platform: str, *, interpret: bool = False):
        self.platform, self.interpret = platform, interpret
        self.choices: dict[Parts, Choice] = {}

    def __call__(self, call: Call, mesh: Mesh, operands: Sequence[Any], specs: Sequence[P]) -> Any:
        """The result, (B, L, N, V), or None to have it computed plainly."""
        if not isinstance(call, AttentionCall):
            return None
        q_BLNH, k_BMKH, v_BMKV = _joined(*operands)
        if not q_BLNH.dtype == k_BMKH.dtype == v_BMKV.dtype:
            return _tell_once(f"queries, keys and values are {q_BLNH.dtype}, {k_BMKH.dtype} and {v_BMKV.dtype}")
        parts = spread(call, mesh, q_BLNH, k_BMKH, v_BMKV, *specs[:2])
        choice = self.choices[parts] = choose(parts, self.platform, cudnn=self._cudnn(parts, mesh))
        if choice.kernel == "plain":
            return _tell_once(choice.reason) if min(q_BLNH.shape[1], k_BMKH.shape[1]) >= TILE else None
        run = {"splash": _splash, "cudnn": _cudnn, "triton": _triton}[choice.kernel]
        return run(parts, mesh, q_BLNH, k_BMKH, v_BMKV, self.interpret)

    def _cudnn(self, parts: Parts, mesh: Mesh) -> str:
        """Why cuDNN cannot compute this; empty if it can."""
        if self.platform not in GPUS or mesh.devices.flat[0] not in jax.devices():
            return "the program is compiled for devices that this process does not have"
        shapes = [jax.ShapeDtypeStruct(x, parts.dtype) for x in (parts.queries, parts.keys, parts.values)]

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return _cudnn_attention(parts.call, q, k, v).astype(jnp.float32).sum()

        try:
            jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), *shapes)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # what it says of versions and of shapes
            return str(error).splitlines()[0]
        return ""


def spread(call: AttentionCall, mesh: Mesh, q_BLNH: Any, k_BMKH: Any, v_BMKV: Any, spec: P, keys: P) -> Parts:
    """A call over a mesh, its queries split by `spec`, the length of its keys and values as `keys` has it."""
    rows, length, heads, head_dim = (*spec, *[None] * (4 - len(spec)))

    def ways(entry: Any) -> int:
        return math.prod(mesh.shape[axis] for axis in _axes(entry))

    kv_heads = heads if k_BMKH.shape[2] % ways(heads) == 0 else None
    shapes = tuple(q_BLNH.shape), tuple(k_BMKH.shape), tuple(v_BMKV.shape)
    keys_length = keys[1] if len(keys) > 1 and k_BMKH.shape[1] % ways(keys[1]) == 0 else None
    split = rows, length, heads, kv_heads, keys_length, (ways(length), ways(heads)), bool(_axes(head_dim))
    return Parts(call, *shapes, q_BLNH.dtype, *split)


def choose(parts: Parts, platform: str, *, cudnn: str = "") -> Choice:
    """The kernel for one call.

    Args:
        parts: the call.
        platform: of the devices.
        cudnn: why cuDNN cannot be used; empty if it can.
    """
    call, (_, L, N, H), (_, M, K, _) = parts.call, parts.queries, parts.keys
    context = parts.ways[0]

    def plain(reason: str) -> Choice:
        return Choice("plain", reason)

    if parts.head_dim_split:
        return plain("the layout splits the head dimension, which kernels take whole")
    if N % parts.ways[1] or (parts.local_heads % parts.groups and parts.groups % parts.local_heads):
        return plain(f"{N} heads over {parts.ways[1]} devices, {K} kv heads: a device's heads share no whole keys")
    if min(L, M) < TILE:
        return plain(f"{L} queries and {M} keys: less than a tile of {TILE}")
    if platform == "tpu":
        if context > 1 and call.causal and L % (context * TILE):
            return plain(f"{L} queries over {context} devices are no multiple of {TILE} on each")
        if max(H, parts.values[3]) > 256:
            return plain(f"a head dimension of {max(H, parts.values[3])}; splash attention takes up to 256")
        return Choice("splash", "TPU")
    if platform not in GPUS:
        return plain(f"no kernel for {platform}")
    if context > 1 and call.causal:
        return plain(f"queries over {context} devices: GPU kernels know no positions but from 0")
    if not cudnn:
        return Choice("cudnn", "GPU with cuDNN")
    if parts.values[3] != H:
        return plain(f"no cuDNN ({cudnn}), and the Triton kernel wants values as wide as keys, not {parts.values[3]}")
    if H > 128:
        return plain(f"no cuDNN ({cudnn}), and the Triton kernel takes head dimensions up to 128, not {H}")
    if call.window or call.softcap:
        return plain(f"no cuDNN ({cudnn}), and the Triton kernel has no window and no softcap")
    if context > 1 or L != M:
        on_each = L // context
        return plain(f"no cuDNN ({cudnn}), and the Triton kernel wants as many keys as queries, not {M} and {on_each}")
    return Choice("triton", f"GPU without cuDNN: {cudnn}")


@functools.cache
def _tell_once(reason: str) -> None:
    """Say why a call has no kernel, the first time that it is for this reason."""
    warnings.warn(f"attention is computed plainly, with its scores in memory: {reason}", stacklevel=2)


def _axes(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _joined(q_BLNH: Any, k_BMKH: Any, v_BMKV: Any, *more: Any) -> tuple[Any, Any, Any]:
    """Queries, keys and values; further dimensions of queries and keys, whose products are added, are appended."""
    if more:
        k_more = jnp.repeat(more[1], k_BMKH.shape[2] // more[1].shape[2], axis=2)
        q_BLNH = jnp.concatenate([q_BLNH, more[0]], axis=-1)
        k_BMKH = jnp.concatenate([k_BMKH, k_more], axis=-1)
    return q_BLNH, k_BMKH, v_BMKV


def _over(parts: Parts, mesh: Mesh, body: Callable[..., Any], *first_specs: Any) -> Callable[..., Any]:
    """`body` on each device's part of queries, keys and values, after arguments that are split by `first_specs`."""
    queries = P(parts.rows, parts.length, parts.heads, None)
    keys = P(parts.rows, parts.keys_length, parts.kv_heads, None)
    gathered = _axes(parts.keys_length)

    def local(*args: Any) -> Any:
        *first, q_BLNH, k_BMKH, v_BMKV = args
        if gathered:
            # Here, and not before: their gradients are then scattered as they are summed. Of a sum over all devices
            # that is cut afterwards, XLA makes this only where nothing is between (half the bytes; GPT-3 on v5e).
            k_BMKH, v_BMKV = (jax.lax.all_gather(x, gathered, axis=1, tiled=True) for x in (k_BMKH, v_BMKV))
        if parts.kv_heads != parts.heads:
            k_BMKH, v_BMKV = (_own_heads(parts, x) for x in (k_BMKH, v_BMKV))
        with jax.named_scope(parts.call.name):  # `search.hlo_products` reads it in the compiled program
            return body(*first, q_BLNH, k_BMKH, v_BMKV)

    specs = (*first_specs, queries, keys, keys)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)


def _own_heads(parts: Parts, x_BMKH: jax.Array) -> jax.Array:
    """Of kv heads that are whole on every device, those that this device's heads read."""
    count = max(1, parts.local_heads // parts.groups)
    start = jax.lax.axis_index(_axes(parts.heads)) * parts.local_heads // parts.groups
    return jax.lax.dynamic_slice_in_dim(x_BMKH, start, count, axis=2)


def _padded(x: jax.Array, size: int, axis: int) -> jax.Array:
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


# TPU.


def splash_block(size: int, *, exact: bool = False) -> int:
    """Rows per block for a length: the largest that adds at most an eighth of padding, or none.

    >>> splash_block(8192), splash_block(8320), splash_block(197)
    (512, 512, 128)
    """
    slack = 0 if exact else size // 8
    return next((b for b in SPLASH_BLOCKS if _up(size, b) <= size + slack), TILE)


@functools.cache
def _splash_kernel(
    call: AttentionCall, heads: int, sizes: tuple[int, int], blocks: tuple[int, int], shards: int, interpret: bool
) -> Any:
    """Splash attention for `heads` heads, of `sizes` queries and keys, with the queries in `shards` parts."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if call.window:
        mask = masks.LocalMask(sizes, window_size=(call.window - 1, 0), offset=0)
    else:
        mask = masks.CausalMask(sizes) if call.causal else masks.FullMask(sizes)
    q, kv = blocks
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
            ),
            attn_logits_soft_cap=call.softcap or None,
            head_shards=1,
            q_seq_shards=shards,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)


def _splash(parts: Parts, mesh: Mesh, q_BLNH: Any, k_BMKH: Any, v_BMKV: Any, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    call, L, M, shards = parts.call, parts.queries[1], parts.keys[1], parts.ways[0]
    if not call.causal:  # a mask that hides nothing is the same for every part of the queries
        L, shards = L // shards, 1
    block_q, block_kv = splash_block(L // shards, exact=shards > 1), splash_block(M, exact=shards > 1)
    sizes = _up(L, block_q * shards), _up(M, block_kv)
    kernel = _splash_kernel(call, parts.local_heads, sizes, (block_q, block_kv), shards, interpret)
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, parts.length if shards > 1 else None)))
    # A causal mask hides the keys that padding adds from all queries but those that it adds.
    hidden = not call.causal and sizes[1] > M

    def local(kernel: Any, q_BLNH: jax.Array, k_BMKH: jax.Array, v_BMKV: jax.Array) -> jax.Array:
        length = q_BLNH.shape[1]
        q_BLNH = (q_BLNH.astype(jnp.float32) * call.scale).astype(q_BLNH.dtype)
        q_BNLH = _padded(q_BLNH.swapaxes(1, 2), sizes[0] // shards, 2)
        k_BKMH, v_BKMV = (_padded(x.swapaxes(1, 2), sizes[1], 2) for x in (k_BMKH, v_BMKV))
        segments = None
        if hidden:
            keys_M = (jnp.arange(sizes[1]) >= M).astype(jnp.int32)
            segments = splash.SegmentIds(q=jnp.zeros(q_BNLH.shape[2], jnp.int32), kv=keys_M)
        o_BNLV = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q_BNLH, k_BKMH, v_BKMV, segments)
        return o_BNLV[:, :, :length].swapaxes(1, 2)

    return _over(parts, mesh, local, specs)(kernel, q_BLNH, k_BMKH, v_BMKV)


# GPU.


def _cudnn_attention(call: AttentionCall, q_BLNH: Any, k_BMKH: Any, v_BMKV: Any) -> Any:
    if call.softcap:
        raise NotImplementedError("it has no softcap")
    return jax.nn.dot_product_attention(
        q_BLNH,
        k_BMKH,
        v_BMKV,
        scale=call.scale,
        is_causal=call.causal,
        local_window_size=(call.window - 1, 0) if call.window else None,
        implementation="cudnn",
    )


def _cudnn(parts: Parts, mesh: Mesh, q_BLNH: Any, k_BMKH: Any, v_BMKV: Any, interpret: bool) -> Any:
    del interpret
    return _over(parts, mesh, functools.partial(_cudnn_attention, parts.call))(q_BLNH, k_BMKH, v_BMKV)


def _triton(parts: Parts, mesh: Mesh, q_BLNH: Any, k_BMKH: Any, v_BMKV: Any, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.gpu import attention as flash

    call, M = parts.call, parts.keys[1]

    def local(q_BLNH: jax.Array, k_BMKH: jax.Array, v_BMKV: jax.Array) -> jax.Array:
        B, L, N, _ = q_BLNH.shape
        k_BMNH, v_BMNV = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BMKH, v_BMKV))
        k_BMNH, v_BMNV = (_padded(x, _up(M, TILE), 1) for x in (k_BMNH, v_BMNV))
        segments = None
        if not call.causal and M % TILE:  # as for splash attention
            ids_M = (jnp.arange(_up(M, TILE)) >= M).astype(jnp.int32)
            segments = jnp.broadcast_to(ids_M[None], (B, ids_M.size))
        q_BLNH = _padded(q_BLNH, _up(L, TILE), 1)
        o_BLNV: Any = flash.mha(q_BLNH, k_BMNH, v_BMNV, segments, call.scale, call.causal, interpret=interpret)
        return o_BLNV[:, :L]

    return _over(parts, mesh, local)(q_BLNH, k_BMKH, v_BMKV)
