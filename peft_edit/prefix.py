"""What comes before the subject: keys and values that no increment reaches, kept as a read-only cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache


@dataclass(frozen=True)
class Prefix:
    """Attention keys and values of n token sequences, aligned to the right.

    Args:
        mask (`torch.BoolTensor`): (n, P) which tokens exist.
        states (`Sequence[torch.Tensor]`): keys and values of one block after another, each (n, heads, P, head size).
    """

    mask: torch.Tensor
    states: Sequence[torch.Tensor]

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Prefix:
        """Sequences without a token."""
        return cls(torch.zeros(count, 0, dtype=torch.bool, device=device), ())

    @classmethod
    def of(cls, cache: DynamicCache, mask: torch.Tensor) -> Prefix:
        """What a forward pass has left in `cache`; `mask` (n, P) says which of it is real."""
        order = mask.long().sort(dim=1, stable=True).indices  # what is missing first, the rest as it was
        width = int(mask.sum(1).max())
        order = order[:, order.shape[1] - width :]

        def aligned(tensor: torch.Tensor) -> torch.Tensor:
            index = order.to(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
            return tensor.gather(2, index)

        states = [aligned(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return cls(mask.gather(1, order), states)

    @classmethod
    def joined(cls, pieces: Sequence[Prefix]) -> Prefix:
        """One after the other, brought to one width."""
        width = max(piece.mask.shape[1] for piece in pieces)

        def grown(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            shape = list(tensor.shape)
            shape[dim] = width - shape[dim]
            return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor

        if width == 0:
            return cls(torch.cat([piece.mask for piece in pieces]), ())
        templates = next(piece for piece in pieces if piece.states).states
        states = [
            torch.cat(
                [
                    grown(piece.states[place], 2)
                    if piece.states
                    else template.new_zeros(len(piece.mask), template.shape[1], width, template.shape[3])
                    for piece in pieces
                ]
            )
            for place, template in enumerate(templates)
        ]
        return cls(torch.cat([grown(piece.mask, 1) for piece in pieces]), states)

    @property
    def lengths(self) -> torch.Tensor:
        """(n,) tokens of each sequence."""
        return self.mask.sum(1)

    def rows(self, index: torch.Tensor) -> Prefix:
        """The sequences that `index` names."""
        return Prefix(self.mask[index], [tensor[index.to(tensor.device)] for tensor in self.states])

    def trimmed(self) -> Prefix:
        """Without the columns in which no sequence has a token."""
        start = self.mask.shape[1] - int(self.lengths.max())
        return Prefix(self.mask[:, start:], [tensor[:, :, start:] for tensor in self.states] if start else self.states)

    def above(self, block: int) -> Prefix:
        """Of the blocks above one only."""
        return Prefix(self.mask, self.states[2 * (block + 1) :])

    def cache(self, blocks_below: int = 0) -> DynamicCache:
        """A cache for a forward pass, which leaves these tensors as they are.

        Args:
            blocks_below (`int`): Blocks before the first one held; they are not run and only lend a sequence length.
        """
        cache = DynamicCache()
        if self.mask.shape[1] == 0:
            return cache
        states = [*self.states[:2] * blocks_below, *self.states]
        for layer in range(len(states) // 2):
            cache.update(states[2 * layer], states[2 * layer + 1], layer)
        return cache
