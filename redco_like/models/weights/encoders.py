"""Names of bert, vit, t5 (mt5) and bart (mbart).

names = t5(architecture("t5-v1.1-base"))

Shape letters as in `llama`; R buckets, C channels, P side of a patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from redco_like.models.config import ModelConfig
from redco_like.models.weights.names import Names, Piece, Place, Present, layers, view

BERT_IGNORED = (
    r"bert\.pooler\..*",
    r"bert\.embeddings\.position_ids",
    r"cls\.seq_relationship\..*",
    r"cls\.predictions\.decoder\.(weight|bias)",
)
T5_IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    # Older files have a table that no layer reads.
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
BART_IGNORED = (r"model\.(encoder|decoder)\.embed_tokens\.weight", r"model\.(encoder|decoder)\.version")


def bert(c: ModelConfig, present: Present = None) -> Names:
    """BertForMaskedLM. The first published files call the weights of norms gamma and beta."""
    D = c.embed
    top, head = Place(tensor="bert.embeddings"), Place(tensor="cls.predictions")
    pieces = [
        top.part("embed", "word_embeddings.weight", (c.vocab, D)),
        top.part("positions", "position_embeddings.weight", (c.max_length, D)),
        *([top.part("types", "token_type_embeddings.weight", (c.types, D))] if c.types else []),
        *top.norm("embed_norm", "LayerNorm", D, bias=True),
    ]
    for layer in layers(c, "bert.encoder.layer"):
        pieces += attention(
            c, layer, "attention.self", {"q": "query", "k": "key", "v": "value"}, "attention.output.dense"
        )
        pieces += layer.norm("attention_norm", "attention.output.LayerNorm", D, bias=True)
        pieces += hidden(c, layer, "intermediate.dense", "output.dense")
        pieces += layer.norm("mlp_norm", "output.LayerNorm", D, bias=True)
    pieces += head.linear("transform", "transform.dense", inputs=D, outputs=D, bias=True)
    pieces += head.norm("transform_norm", "transform.LayerNorm", D, bias=True)
    pieces.append(head.part("head_bias", "bias", (c.vocab,)))
    if present is not None:
        pieces = [dataclasses.replace(p, tensor=_older(p.tensor, present)) for p in pieces]
    return Names(tuple(pieces), ignored=BERT_IGNORED)


def _older(tensor: str, present: Present) -> str:
    older = tensor.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return older if present is not None and tensor not in present and older in present else tensor


def vit(c: ModelConfig, present: Present = None) -> Names:
    """ViTForImageClassification; a patch's kernel lies as (outputs, channels, rows, columns)."""
    D, C, P = c.embed, c.channels, c.patch
    top, head = Place(tensor="vit"), Place()
    patches = (D, C, P, P)
    pieces = [
        top.part("class_token", "embeddings.cls_token", (1, 1, D)),
        top.part("positions", "embeddings.position_embeddings", (1, (c.image // P) ** 2 + 1, D)),
        top.part(
            "patches/kernel",
            "embeddings.patch_embeddings.projection.weight",
            patches,
            view(patches, ((2,), (3,), (1,), (0,))),
        ),
        top.part("patches/bias", "embeddings.patch_embeddings.projection.bias", (D,)),
    ]
    for layer in layers(c, "vit.encoder.layer"):
        pieces += layer.norm("attention_norm", "layernorm_before", D, bias=True)
        pieces += attention(
            c, layer, "attention.attention", {"q": "query", "k": "key", "v": "value"}, "attention.output.dense"
        )
        pieces += layer.norm("mlp_norm", "layernorm_after", D, bias=True)
        pieces += hidden(c, layer, "intermediate.dense", "output.dense")
    pieces += top.norm("norm", "layernorm", D, bias=True)
    pieces += head.linear("head", "classifier", inputs=D, outputs=c.classes, bias=True)
    return Names(tuple(pieces), ignored=(r"vit\.pooler\..*",))


def t5(c: ModelConfig, present: Present = None) -> Names:
    """T5ForConditionalGeneration. A head that a file does not have is its table (transformers may tie v1.1's)."""
    D, top = c.embed, Place()
    table = _first(present, "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    pieces = [top.part("embed", table, (c.vocab, D))]
    for stack, count in (("encoder", c.layers), ("decoder", c.decoder_layers)):
        below = Place(stack, tensor=stack)
        buckets = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        pieces.append(below.part("buckets", buckets, (c.buckets, c.heads)))
        for layer in layers(c, f"{stack}.block", leaf=stack, count=count):
            letters = {"q": "q", "k": "k", "v": "v"}
            pieces += layer.norm("attention_norm", "layer.0.layer_norm", D)
            pieces += attention(c, layer, "layer.0.SelfAttention", letters, "layer.0.SelfAttention.o")
            last = 1
            if stack == "decoder":
                pieces += layer.norm("cross_norm", "layer.1.layer_norm", D)
                pieces += attention(
                    c, layer, "layer.1.EncDecAttention", letters, "layer.1.EncDecAttention.o", leaf="cross"
                )
                last = 2
            pieces += layer.norm("mlp_norm", f"layer.{last}.layer_norm", D)
            names = {"mlp/gate": "wi_0", "mlp/up": "wi_1"} if c.gated else {"mlp/up": "wi"}
            for leaf, name in names.items():
                pieces += layer.linear(leaf, f"layer.{last}.DenseReluDense.{name}", inputs=D, outputs=c.mlp)
            pieces += layer.linear("mlp/down", f"layer.{last}.DenseReluDense.wo", inputs=c.mlp, outputs=D)
        pieces += below.norm("norm", "final_layer_norm", D)
    if not c.tied:
        head = "lm_head" if present is None or "lm_head.weight" in present else table.removesuffix(".weight")
        pieces += top.linear("head", head, inputs=D, outputs=c.vocab)
    return Names(tuple(pieces), ignored=(*T5_IGNORED, *((r"lm_head\.weight",) if c.tied else ())))


def bart(c: ModelConfig, present: Present = None) -> Names:
    """BartForConditionalGeneration, and MBart, which has a norm after each stack."""
    D, top = c.embed, Place()
    table = _first(
        present, "model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
    )
    pieces = [
        top.part("embed", table, (c.vocab, D)),
        top.part("head_bias", "final_logits_bias", (1, c.vocab), view((1, c.vocab), ((1,),))),
    ]
    for stack, count in (("encoder", c.layers), ("decoder", c.decoder_layers)):
        below = Place(stack, tensor=f"model.{stack}")
        pieces.append(below.part("positions", "embed_positions.weight", (c.max_length + c.position_offset, D)))
        pieces += below.norm("embed_norm", "layernorm_embedding", D, bias=True)
        for layer in layers(c, f"model.{stack}.layers", leaf=stack, count=count):
            letters = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
            pieces += attention(c, layer, "self_attn", letters, "self_attn.out_proj")
            pieces += layer.norm("attention_norm", "self_attn_layer_norm", D, bias=True)
            if stack == "decoder":
                pieces += attention(c, layer, "encoder_attn", letters, "encoder_attn.out_proj", leaf="cross")
                pieces += layer.norm("cross_norm", "encoder_attn_layer_norm", D, bias=True)
            pieces += hidden(c, layer, "fc1", "fc2")
            pieces += layer.norm("mlp_norm", "final_layer_norm", D, bias=True)
        if c.final_norm:
            pieces += below.norm("norm", "layer_norm", D, bias=True)
    if not c.tied:
        pieces += top.linear("head", "lm_head", inputs=D, outputs=c.vocab)
    return Names(tuple(pieces), ignored=(*BART_IGNORED, *((r"lm_head\.weight",) if c.tied else ())))


def _first(present: Present, *tensors: str) -> str:
    """The first name that there is; the first of all where none is."""
    return next((name for name in tensors if present is not None and name in present), tensors[0])


def attention(
    c: ModelConfig, layer: Place, below: str, names: dict[str, str], out: str, *, leaf: str = "attention"
) -> Iterator[Piece]:
    """Query, key and value under their `names` below a name, and the output projection."""
    X = c.heads * c.head_dim
    for letter, name in names.items():
        yield from layer.linear(f"{leaf}/{letter}", f"{below}.{name}", inputs=c.embed, outputs=X, bias=c.qkv_bias)
    yield from layer.linear(f"{leaf}/out", out, inputs=X, outputs=c.embed, bias=c.out_bias)


def hidden(c: ModelConfig, layer: Place, up: str, down: str) -> Iterator[Piece]:
    yield from layer.linear("mlp/up", up, inputs=c.embed, outputs=c.mlp, bias=c.mlp_bias)
    yield from layer.linear("mlp/down", down, inputs=c.mlp, outputs=c.embed, bias=c.mlp_bias)
