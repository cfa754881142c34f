"""Names of mixtures of experts: mixtral, qwen2_moe, qwen3_moe, and DeepSeek's, whose attention is latent.

names = mixtral(architecture("mixtral-8x7b"))

Shape letters as in `llama`; E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from redco_like.models.config import Experts, Latent, ModelConfig
from redco_like.models.weights.llama import BUFFERS, attention, ends, hidden, named, norms
from redco_like.models.weights.names import Names, Piece, Place, Present, layers, transposed, view


def mixtral(c: ModelConfig, present: Present = None) -> Names:
    """Experts' gate, down and up are called w1, w2 and w3."""
    e = _experts(c)
    pieces = [*ends(c)]
    for layer in layers(c, "model.layers"):
        pieces += [*norms(c, layer), *attention(c, layer)]
        pieces += experts(c, e, layer, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}, present)
    return named(c, pieces)


def qwen_moe(c: ModelConfig, present: Present = None) -> Names:
    e = _experts(c)
    pieces = [*ends(c)]
    for layer in layers(c, "model.layers"):
        pieces += [*norms(c, layer), *attention(c, layer), *experts(c, e, layer, "mlp", PROJ, present)]
        if e.shared_mlp:
            pieces += hidden(c, layer, leaf="mlp/shared", tensor="mlp.shared_expert", width=e.shared_mlp)
        if e.shared_gate:
            pieces += layer.linear("mlp/shared_gate", "mlp.shared_expert_gate", inputs=c.embed, outputs=1)
    return named(c, pieces)


def deepseek(c: ModelConfig, present: Present = None) -> Names:
    """The layers after the last, which predict a token further ahead (DeepSeek-V3), are left out."""
    e = _experts(c)
    pieces = [*ends(c)]
    for number, layer in enumerate(layers(c, "model.layers")):
        pieces += [*norms(c, layer), *latent(c, layer)]
        if number < e.dense_layers:
            pieces += hidden(c, layer)
            continue
        pieces += experts(c, e, layer, "mlp", PROJ, present)
        if e.router == "sigmoid":
            pieces.append(layer.part("mlp/correction", "mlp.gate.e_score_correction_bias", (e.count,)))
        if e.shared_mlp:
            pieces += hidden(c, layer, leaf="mlp/shared", tensor="mlp.shared_experts", width=e.shared_mlp)
    names = named(c, pieces)
    return dataclasses.replace(names, ignored=(*names.ignored, *BUFFERS, rf"model\.layers\.{c.layers}\..*"))


PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def experts(
    c: ModelConfig, e: Experts, layer: Place, below: str, called: dict[str, str], present: Present
) -> Iterator[Piece]:
    """The router, and the experts: a tensor each, or all of a layer in two, gate and up one after the other."""
    D, F, E = c.embed, e.mlp, e.count
    fused = f"{layer.tensor}.mlp.experts.gate_up_proj"
    if present is not None and fused in present:
        yield layer.part("mlp/router", "mlp.gate.weight", (E, D), transposed((E, D)))
        for i, leaf in enumerate(("gate", "up")):
            taken = view((E, 2 * F, D), ((0,), (2,), (1,)), {1: (i * F, (i + 1) * F)})
            yield layer.part(f"mlp/{leaf}", "mlp.experts.gate_up_proj", (E, 2 * F, D), taken)
        yield layer.part("mlp/down", "mlp.experts.down_proj", (E, D, F), view((E, D, F), ((0,), (2,), (1,))))
        return
    yield layer.part("mlp/router", f"{below}.gate.weight", (E, D), transposed((E, D)))
    for expert in range(E):
        place = Place(f"{layer.leaf}/mlp", (*layer.at, expert), f"{layer.tensor}.{below}.experts.{expert}")
        for leaf, tensor in called.items():
            shape = (D, F) if leaf == "down" else (F, D)
            yield place.part(leaf, f"{tensor}.weight", shape, transposed(shape))


def latent(c: ModelConfig, layer: Place) -> Iterator[Piece]:
    """Attention with compressed keys and values: rows of a head, or of a weight, that are unlike parts are leaves."""
    m = c.latent
    if m is None:
        raise ValueError(f"{c.family}: the configuration has no latent attention, which its names are of")
    D, N = c.embed, c.heads
    source, rank = ("q_b_proj", m.query_rank) if m.query_rank else ("q_proj", D)
    if m.query_rank:
        yield from layer.linear("attention/q_a", "self_attn.q_a_proj", inputs=D, outputs=rank, bias=c.qkv_bias)
        yield from layer.norm("attention/q_norm", "self_attn.q_a_layernorm", rank)
    yield from _heads(layer, source, rank, N, {"q_nope/kernel": m.nope_dim, "q_rope/kernel": m.rope_dim})
    yield from _compressed(c, m, layer)
    yield from layer.norm("attention/kv_norm", "self_attn.kv_a_layernorm", m.kv_rank)
    yield from _heads(layer, "kv_b_proj", m.kv_rank, N, {"k_b": m.nope_dim, "v_b": m.value_dim})
    yield from layer.linear("attention/out", "self_attn.o_proj", inputs=N * m.value_dim, outputs=D, bias=c.out_bias)


def _compressed(c: ModelConfig, m: Latent, layer: Place) -> Iterator[Piece]:
    rows, tensor = m.kv_rank + m.rope_dim, "self_attn.kv_a_proj_with_mqa"
    for leaf, taken in (("kv_a", (0, m.kv_rank)), ("k_rope", (m.kv_rank, rows))):
        kernel = view((rows, c.embed), ((1,), (0,)), {0: taken})
        yield layer.part(f"attention/{leaf}/kernel", f"{tensor}.weight", (rows, c.embed), kernel)
        if c.qkv_bias:
            yield layer.part(f"attention/{leaf}/bias", f"{tensor}.bias", (rows,), view((rows,), ((0,),), {0: taken}))


def _heads(layer: Place, tensor: str, inputs: int, heads: int, leaves: dict[str, int]) -> Iterator[Piece]:
    """Kernels (inputs, heads * dim) of which one weight holds, head by head, one after the other."""
    dim, start = sum(leaves.values()), 0
    for leaf, size in leaves.items():
        taken = view((heads, dim, inputs), ((2,), (0, 1)), {1: (start, start + size)})
        yield layer.part(f"attention/{leaf}", f"self_attn.{tensor}.weight", (heads * dim, inputs), taken)
        start += size


def _experts(c: ModelConfig) -> Experts:
    if c.experts is None:
        raise ValueError(f"{c.family}: the configuration has no experts, which its names are of")
    return c.experts
