"""Names of the Llama kin: llama, mistral, qwen2, qwen3, gemma, gemma2, phi3 (its fused projections).

names = llama(architecture("llama-3-8b"))

Shape letters: D embed, N heads, K kv heads, H head dim, F mlp, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator

from redco_like.models.config import ModelConfig
from redco_like.models.weights.names import Names, Piece, Place, Present, layers, view

BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def llama(c: ModelConfig, present: Present = None) -> Names:
    """Separate projections, with whatever biases and norms the configuration has."""
    pieces = [*ends(c)]
    for layer in layers(c, "model.layers"):
        pieces += [*norms(c, layer), *attention(c, layer), *hidden(c, layer)]
    return named(c, pieces)


def phi3(c: ModelConfig, present: Present = None) -> Names:
    """One projection for query, key and value, and one for gate and up; rows one after the other."""
    D, N, K, H, F = c.embed, c.heads, c.kv_heads, c.head_dim, c.mlp
    pieces = [*ends(c)]
    for layer in layers(c, "model.layers"):
        pieces += [*norms(c, layer)]
        pieces += rows(
            layer, "self_attn.qkv_proj", D, {"attention/q": N * H, "attention/k": K * H, "attention/v": K * H}
        )
        pieces += layer.linear("attention/out", "self_attn.o_proj", inputs=N * H, outputs=D)
        pieces += rows(layer, "mlp.gate_up_proj", D, {"mlp/gate": F, "mlp/up": F})
        pieces += layer.linear("mlp/down", "mlp.down_proj", inputs=F, outputs=D)
    return named(c, pieces)


def rows(layer: Place, tensor: str, inputs: int, leaves: dict[str, int], *, bias: bool = False) -> Iterator[Piece]:
    """Kernels that one torch.nn.Linear holds one after the other, and their biases."""
    total, start = sum(leaves.values()), 0
    for leaf, size in leaves.items():
        taken = {0: (start, start + size)}
        kernel = view((total, inputs), ((1,), (0,)), taken)
        yield layer.part(f"{leaf}/kernel", f"{tensor}.weight", (total, inputs), kernel)
        if bias:
            yield layer.part(f"{leaf}/bias", f"{tensor}.bias", (total,), view((total,), ((0,),), taken))
        start += size


def named(c: ModelConfig, pieces: list[Piece]) -> Names:
    return Names(tuple(pieces), "model.", (*BUFFERS, *((r"lm_head\.weight",) if c.tied else ())))


def ends(c: ModelConfig) -> Iterator[Piece]:
    """Table, last norm and head."""
    top = Place()
    yield top.part("embed", "model.embed_tokens.weight", (c.vocab, c.embed))
    yield from top.norm("norm", "model.norm", c.embed)
    if not c.tied:
        yield from top.linear("head", "lm_head", inputs=c.embed, outputs=c.vocab, bias=c.head_bias)


def norms(c: ModelConfig, layer: Place) -> Iterator[Piece]:
    yield from layer.norm("attention_norm", "input_layernorm", c.embed)
    if c.block == "sandwich":
        yield from layer.norm("attention_out_norm", "post_attention_layernorm", c.embed)
        yield from layer.norm("mlp_norm", "pre_feedforward_layernorm", c.embed)
        yield from layer.norm("mlp_out_norm", "post_feedforward_layernorm", c.embed)
    else:
        yield from layer.norm("mlp_norm", "post_attention_layernorm", c.embed)


def attention(c: ModelConfig, layer: Place) -> Iterator[Piece]:
    D, N, K, H = c.embed, c.heads, c.kv_heads, c.head_dim
    for ours, theirs, count in (("q", "q_proj", N), ("k", "k_proj", K), ("v", "v_proj", K)):
        yield from layer.linear(
            f"attention/{ours}", f"self_attn.{theirs}", inputs=D, outputs=count * H, bias=c.qkv_bias
        )
    yield from layer.linear("attention/out", "self_attn.o_proj", inputs=N * H, outputs=D, bias=c.out_bias)
    if c.qk_norm:
        yield from layer.norm("attention/q_norm", "self_attn.q_norm", H)
        yield from layer.norm("attention/k_norm", "self_attn.k_norm", H)


def hidden(
    c: ModelConfig, layer: Place, *, leaf: str = "mlp", tensor: str = "mlp", width: int = 0, bias: bool | None = None
) -> Iterator[Piece]:
    """gate, up and down of a hidden layer; also of a shared expert."""
    D, F = c.embed, width or c.mlp
    bias = c.mlp_bias if bias is None else bias
    yield from layer.linear(f"{leaf}/gate", f"{tensor}.gate_proj", inputs=D, outputs=F, bias=bias)
    yield from layer.linear(f"{leaf}/up", f"{tensor}.up_proj", inputs=D, outputs=F, bias=bias)
    yield from layer.linear(f"{leaf}/down", f"{tensor}.down_proj", inputs=F, outputs=D, bias=bias)
