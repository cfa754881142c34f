"""What a checkpoint has against what the model needs: compared in full before a byte is read.

names = matched(config, tensors, "Llama-3.1-8B")          # or WeightsError, which says what is wrong with which tensor
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from redco_like.models.config import ModelConfig
from redco_like.models.weights.families import names_of
from redco_like.models.weights.files import DTYPES, Tensor, WeightsError, nearest
from redco_like.models.weights.names import Names

_QUANTISED = re.compile(r".*\.(weight_scale(_inv)?|weight_packed|qweight|qzeros|absmax|quant_state\..*|SCB)")


def matched(config: ModelConfig, tensors: Mapping[str, Tensor], where: object) -> Names:
    """The names of the model as this checkpoint has them.

    Raises:
        WeightsError: tensors that are missing, too many, of a wrong shape or of a kind that is not read.
    """
    names = names_of(config, tensors.keys())
    needed = {piece.tensor: piece.shape for piece in names.pieces}
    bare = {name.removeprefix(names.prefix) for name in needed}
    if names.prefix and not any(n in tensors for n in needed if n.startswith(names.prefix)) and bare & set(tensors):
        short = names.without_prefix()
        needed, prefix, names = {piece.tensor: piece.shape for piece in short.pieces}, names.prefix, short
    else:
        prefix = ""
    _check_quantised(tensors, needed, where)
    extra = [n for n in tensors if n not in needed and not _ignored(n, prefix, names.ignored)]
    missing = [n for n in needed if n not in tensors]
    if missing:
        name = missing[0]
        raise WeightsError(
            f"{where} lacks tensor {name!r} of shape {needed[name]}{_more(missing)}, which {config.family} with the "
            f"sizes of config.json has{nearest(name, extra or list(tensors))}"
        )
    for name, shape in needed.items():
        if tensors[name].shape != shape:
            raise WeightsError(
                f"{where}: tensor {name!r} has shape {tensors[name].shape}, but with the sizes of config.json it is "
                f"{shape}; is this the config.json of these weights?"
            )
    if extra:
        raise WeightsError(
            f"{where} has tensor {extra[0]!r} of shape {tensors[extra[0]].shape}{_more(extra)}, which {config.family} "
            f"with the sizes of config.json has no place for{nearest(extra[0], list(needed))}"
        )
    return names


def _check_quantised(tensors: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]], where: object) -> None:
    odd = [n for n, t in tensors.items() if t.dtype not in DTYPES and n in needed]
    odd += [n for n in tensors if n not in needed and _QUANTISED.fullmatch(n)]
    if odd:
        raise WeightsError(
            f"{where}: tensor {odd[0]!r} is {tensors[odd[0]].dtype}{_more(odd)}: quantised weights are not read. Use "
            f"the checkpoint they were made from; read are {', '.join(DTYPES)}"
        )


def _ignored(name: str, prefix: str, patterns: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, n) for pattern in patterns for n in (name, prefix + name))


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
