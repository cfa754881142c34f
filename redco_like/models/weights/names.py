"""Which part of which tensor of a Hugging Face checkpoint each of our parameters is: data, for reading and writing.

    for layer in layers(config, "model.layers"):
        yield from layer.linear("attention/q", "self_attn.q_proj", inputs=D, outputs=N * H, bias=True)
        gate = view((2 * F, D), ((1,), (0,)), {0: (0, F)})      # the first F rows, transposed
        yield layer.part("mlp/gate/kernel", "mlp.gate_up_proj.weight", (2 * F, D), gate)

A `View` splits the dimensions of a tensor, takes a range of each, and permutes them into the dimensions of a leaf: in
numpy a reshape that splits, basic slices and a transpose, none of which copies. Read through it, a tensor gives the
leaf; written through it, the leaf fills its part of the tensor. Parts of one tensor that several leaves are (a fused
query, key and value) cover it together.

Leaves are named by their path, "stack/layers/attention/q/kernel". Layers that a scan stacks, and experts, are leading
dimensions of a leaf: a piece says at which place of these it stands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from redco_like.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class View:
    """Part of a tensor with its dimensions split and permuted.

    Attributes:
        split: sizes that the tensor's dimensions are split into; each dimension is the product of some neighbours.
        take: first and last + 1 of each split dimension.
        order: for each dimension of the leaf, the split dimensions that it is made of, the major one first. A split
            dimension that is in none is taken at one place.
    """

    split: tuple[int, ...]
    take: tuple[tuple[int, int], ...]
    order: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How much is taken of each split dimension."""
        return tuple(stop - start for start, stop in self.take)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Sizes that each dimension of the leaf is the product of."""
        return tuple(tuple(self.sizes[i] for i in group) for group in self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf's piece."""
        return tuple(math.prod(sizes) for sizes in self.factors)

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """The part of `tensor`, a view with the dimensions of all `factors` one after the other; what is written to it
        is written to the tensor.

        >>> x = np.arange(6).reshape(3, 2)
        >>> view((3, 2), ((1,), (0,)), {0: (1, 3)}).of(x)
        array([[2, 4],
               [3, 5]])
        """
        taken = tensor.reshape(self.split)[tuple(slice(*t) for t in self.take)]
        kept = [i for group in self.order for i in group]
        dropped = [i for i in range(len(self.split)) if i not in kept]
        return taken.transpose(dropped + kept).reshape(tuple(self.sizes[i] for i in kept))


def view(
    split: Sequence[int], order: Sequence[Sequence[int]], take: Mapping[int, tuple[int, int]] | None = None
) -> View:
    """A view; of split dimensions that `take` does not name, all is taken.

    Raises:
        ValueError: `order` names a dimension twice, or leaves one out of which more than one place is taken.
    """
    ranges = tuple((take or {}).get(i, (0, size)) for i, size in enumerate(split))
    made = View(tuple(split), ranges, tuple(tuple(group) for group in order))
    kept = [i for group in made.order for i in group]
    lost = [i for i, size in enumerate(made.sizes) if i not in kept and size != 1]
    if len(set(kept)) != len(kept) or lost:
        raise ValueError(f"a view of {made.split} that takes {ranges} has order {made.order}: {lost or kept}")
    return made


def whole(shape: Sequence[int]) -> View:
    """The tensor as it is."""
    return view(shape, [(i,) for i in range(len(shape))])


def transposed(shape: Sequence[int]) -> View:
    """A matrix with its two dimensions swapped: a torch.nn.Linear's weight (outputs, inputs) as our kernel."""
    return view(shape, ((1,), (0,)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A leaf, or its place in leading dimensions, and where it is in a checkpoint.

    Attributes:
        leaf: path of the parameter.
        at: indices into its leading dimensions (layer, expert); () for a leaf of its own.
        tensor: name in the checkpoint.
        shape: that the tensor has.
        view: of the tensor; its shape is that of the leaf without the dimensions of `at`.
    """

    leaf: str
    at: tuple[int, ...]
    tensor: str
    shape: tuple[int, ...]
    view: View


@dataclasses.dataclass(frozen=True)
class Names:
    """All of a model.

    Attributes:
        pieces: every leaf, every place in it once.
        prefix: which names of tensors may lack in a checkpoint, as where the model was saved without its head.
        ignored: patterns of whole names that are no parameters: buffers, or a second copy of a tied table.
    """

    pieces: tuple[Piece, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def without_prefix(self) -> Names:
        """The same for a checkpoint that lacks `prefix`."""
        pieces = [dataclasses.replace(p, tensor=p.tensor.removeprefix(self.prefix)) for p in self.pieces]
        return dataclasses.replace(self, pieces=tuple(pieces), prefix="")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where pieces stand: below a path of our parameters, at an index of the stacked dimensions, below a name.

    Attributes:
        leaf: "stack/layers", or "".
        at: (layer,), or ().
        tensor: "model.layers.3", or "".
    """

    leaf: str = ""
    at: tuple[int, ...] = ()
    tensor: str = ""

    def part(self, leaf: str, tensor: str, shape: Sequence[int], view: View | None = None) -> Piece:
        """One piece; without a view the tensor as it is."""
        path, name = "/".join(filter(None, (self.leaf, leaf))), ".".join(filter(None, (self.tensor, tensor)))
        return Piece(path, self.at, name, tuple(shape), whole(shape) if view is None else view)

    def linear(self, leaf: str, tensor: str, *, inputs: int, outputs: int, bias: bool = False) -> Iterator[Piece]:
        """kernel (inputs, outputs), and bias, of a torch.nn.Linear."""
        yield self.part(f"{leaf}/kernel", f"{tensor}.weight", (outputs, inputs), transposed((outputs, inputs)))
        if bias:
            yield self.part(f"{leaf}/bias", f"{tensor}.bias", (outputs,))

    def norm(self, leaf: str, tensor: str, width: int, *, bias: bool = False) -> Iterator[Piece]:
        """scale, and bias, of a norm."""
        yield self.part(f"{leaf}/scale", f"{tensor}.weight", (width,))
        if bias:
            yield self.part(f"{leaf}/bias", f"{tensor}.bias", (width,))


def layers(config: ModelConfig, tensor: str, *, leaf: str = "stack", count: int = 0) -> Iterator[Place]:
    """Each layer of a stack: the first `dense_layers`, where these differ, then the others.

    Args:
        tensor: below which the checkpoint's layers are numbered.
        leaf: path of the stack.
        count: of layers; default those of the configuration.
    """
    for number in range(count or config.layers):
        dense = number < config.dense_layers
        stack, first = ("dense_layers", 0) if dense else ("layers", config.dense_layers)
        yield Place(f"{leaf}/{stack}", (number - first,), f"{tensor}.{number}")


Present = Collection[str] | None
"""Names of a checkpoint's tensors, where a family is published in more than one form; None for what is written."""
