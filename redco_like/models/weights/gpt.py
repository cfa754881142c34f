"""Names of gpt2, gptj, gpt_neox, opt, mpt and phi: layers with a plain hidden layer, each with names of its own.

names = gpt2(architecture("gpt2"))

Shape letters as in `llama`.
"""

from __future__ import annotations

from collections.abc import Iterator

from redco_like.models.config import ModelConfig
from redco_like.models.weights.llama import rows
from redco_like.models.weights.names import Names, Piece, Place, Present, layers, view

MASKS = (r".*\.attn\.(bias|masked_bias)", r".*\.attention\.(bias|masked_bias)", r".*\.rotary_emb\.inv_freq")
"""Buffers that older versions wrote beside the weights."""


def gpt2(c: ModelConfig, present: Present = None) -> Names:
    """Weights lie as (inputs, outputs), as ours; query, key and value are columns of one."""
    D, F, X = c.embed, c.mlp, c.heads * c.head_dim
    top = Place(tensor="transformer")
    pieces = [top.part("embed", "wte.weight", (c.vocab, D)), *positions(c, top, "wpe.weight")]
    for layer in layers(c, "transformer.h"):
        pieces += [*layer.norm("attention_norm", "ln_1", D, bias=True), *layer.norm("mlp_norm", "ln_2", D, bias=True)]
        for i, leaf in enumerate(("q", "k", "v")):
            taken, shape = (i * X, (i + 1) * X), (D, 3 * X)
            kernel, bias = view(shape, ((0,), (1,)), {1: taken}), view((3 * X,), ((0,),), {0: taken})
            pieces.append(layer.part(f"attention/{leaf}/kernel", "attn.c_attn.weight", shape, kernel))
            pieces.append(layer.part(f"attention/{leaf}/bias", "attn.c_attn.bias", (3 * X,), bias))
        for leaf, tensor, inputs, outputs in (
            ("attention/out", "attn.c_proj", X, D),
            ("mlp/up", "mlp.c_fc", D, F),
            ("mlp/down", "mlp.c_proj", F, D),
        ):
            pieces.append(layer.part(f"{leaf}/kernel", f"{tensor}.weight", (inputs, outputs)))
            pieces.append(layer.part(f"{leaf}/bias", f"{tensor}.bias", (outputs,)))
    pieces += [*top.norm("norm", "ln_f", D, bias=True), *head(c, "lm_head")]
    return named(c, pieces, "transformer.", "lm_head")


def gptj(c: ModelConfig, present: Present = None) -> Names:
    top = Place(tensor="transformer")
    pieces = [top.part("embed", "wte.weight", (c.vocab, c.embed))]
    for layer in layers(c, "transformer.h"):
        pieces += layer.norm("attention_norm", "ln_1", c.embed, bias=True)
        pieces += [*separate(c, layer, "attn", "out_proj"), *hidden(c, layer, "mlp.fc_in", "mlp.fc_out")]
    pieces += [*top.norm("norm", "ln_f", c.embed, bias=True), *head(c, "lm_head")]
    return named(c, pieces, "transformer.", "lm_head")


def gpt_neox(c: ModelConfig, present: Present = None) -> Names:
    """Rows of one weight go head by head, and within a head query, key and value."""
    D, N, H = c.embed, c.heads, c.head_dim
    top = Place(tensor="gpt_neox")
    pieces = [top.part("embed", "embed_in.weight", (c.vocab, D))]
    for layer in layers(c, "gpt_neox.layers"):
        pieces += layer.norm("attention_norm", "input_layernorm", D, bias=True)
        pieces += layer.norm("mlp_norm", "post_attention_layernorm", D, bias=True)
        tensor = "attention.query_key_value"
        for i, leaf in enumerate(("q", "k", "v")):
            kernel = view((N, 3, H, D), ((3,), (0, 2)), {1: (i, i + 1)})
            pieces.append(layer.part(f"attention/{leaf}/kernel", f"{tensor}.weight", (3 * N * H, D), kernel))
            if c.qkv_bias:
                bias = view((N, 3, H), ((0, 2),), {1: (i, i + 1)})
                pieces.append(layer.part(f"attention/{leaf}/bias", f"{tensor}.bias", (3 * N * H,), bias))
        pieces += layer.linear("attention/out", "attention.dense", inputs=N * H, outputs=D, bias=c.out_bias)
        pieces += hidden(c, layer, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    pieces += [*top.norm("norm", "final_layer_norm", D, bias=True), *head(c, "embed_out")]
    return named(c, pieces, "gpt_neox.", "embed_out")


def opt(c: ModelConfig, present: Present = None) -> Names:
    """OPT-350m has a narrower table, with a kernel on either side of the layers, and no last norm."""
    W = c.token_width or c.embed
    top = Place(tensor="model.decoder")
    pieces = [top.part("embed", "embed_tokens.weight", (c.vocab, W)), *positions(c, top, "embed_positions.weight")]
    if c.token_width:
        pieces += top.linear("embed_in", "project_in", inputs=W, outputs=c.embed)
        pieces += top.linear("embed_out", "project_out", inputs=c.embed, outputs=W)
    for layer in layers(c, "model.decoder.layers"):
        pieces += layer.norm("attention_norm", "self_attn_layer_norm", c.embed, bias=True)
        pieces += layer.norm("mlp_norm", "final_layer_norm", c.embed, bias=True)
        pieces += [*separate(c, layer, "self_attn", "out_proj"), *hidden(c, layer, "fc1", "fc2")]
    if c.final_norm:
        pieces += top.norm("norm", "final_layer_norm", c.embed, bias=True)
    return named(c, [*pieces, *head(c, "lm_head")], "model.", "lm_head")


def mpt(c: ModelConfig, present: Present = None) -> Names:
    """Rows of one weight: all of the query, then the key, then the value."""
    D, X = c.embed, c.heads * c.head_dim
    top = Place(tensor="transformer")
    pieces = [top.part("embed", "wte.weight", (c.vocab, D)), *positions(c, top, "wpe.weight")]
    for layer in layers(c, "transformer.blocks"):
        pieces += layer.norm("attention_norm", "norm_1", D, bias=c.norm_bias)
        pieces += layer.norm("mlp_norm", "norm_2", D, bias=c.norm_bias)
        parts = {"attention/q": X, "attention/k": X, "attention/v": X}
        pieces += rows(layer, "attn.Wqkv", D, parts, bias=c.qkv_bias)
        pieces += layer.linear("attention/out", "attn.out_proj", inputs=X, outputs=D, bias=c.out_bias)
        pieces += hidden(c, layer, "ffn.up_proj", "ffn.down_proj")
    pieces += [*top.norm("norm", "norm_f", D, bias=c.norm_bias), *head(c, "lm_head")]
    return named(c, pieces, "transformer.", "lm_head")


def phi(c: ModelConfig, present: Present = None) -> Names:
    top = Place(tensor="model")
    pieces = [top.part("embed", "embed_tokens.weight", (c.vocab, c.embed))]
    for layer in layers(c, "model.layers"):
        pieces += layer.norm("attention_norm", "input_layernorm", c.embed, bias=True)
        pieces += [*separate(c, layer, "self_attn", "dense"), *hidden(c, layer, "mlp.fc1", "mlp.fc2")]
    pieces += [*top.norm("norm", "final_layernorm", c.embed, bias=True), *head(c, "lm_head")]
    return named(c, pieces, "model.", "lm_head")


def named(c: ModelConfig, pieces: list[Piece], prefix: str, head: str) -> Names:
    return Names(tuple(pieces), prefix, (*MASKS, *((rf"{head}\.weight",) if c.tied else ())))


def positions(c: ModelConfig, top: Place, tensor: str) -> Iterator[Piece]:
    if c.position == "learned":
        yield top.part("positions", tensor, (c.max_length + c.position_offset, c.embed))


def head(c: ModelConfig, tensor: str) -> Iterator[Piece]:
    if not c.tied:
        yield from Place().linear("head", tensor, inputs=c.token_width or c.embed, outputs=c.vocab, bias=c.head_bias)


def separate(c: ModelConfig, layer: Place, below: str, out: str) -> Iterator[Piece]:
    """q_proj, k_proj, v_proj and the output projection."""
    for leaf, count in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        yield from layer.linear(
            f"attention/{leaf}", f"{below}.{leaf}_proj", inputs=c.embed, outputs=count * c.head_dim, bias=c.qkv_bias
        )
    inputs = c.heads * c.head_dim
    yield from layer.linear("attention/out", f"{below}.{out}", inputs=inputs, outputs=c.embed, bias=c.out_bias)


def hidden(c: ModelConfig, layer: Place, up: str, down: str) -> Iterator[Piece]:
    yield from layer.linear("mlp/up", up, inputs=c.embed, outputs=c.mlp, bias=c.mlp_bias)
    yield from layer.linear("mlp/down", down, inputs=c.mlp, outputs=c.embed, bias=c.mlp_bias)
