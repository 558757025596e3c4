"""What comes before the subject: keys and values that no increment reaches, kept as a read-only cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
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
        states = [*list(self.states[:2]) * blocks_below, *self.states]
        for layer in range(len(states) // 2):
            cache.update(states[2 * layer], states[2 * layer + 1], layer)
        return cache


def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other; narrower ones are padded, prefixes on the left, hidden states on the right.

    Args:
        pieces (`Sequence[torch.Tensor]`): Masks (n, P) or states (n, heads, P, head size) of prefixes, aligned to the
            right, or hidden states (n, tokens, width), aligned to the left, or vectors (n, width).
    """
    dims = pieces[0].dim()
    if dims == 2 and pieces[0].dtype != torch.bool:
        return torch.cat(list(pieces))
    dim = {2: 1, 3: 1, 4: 2}[dims]
    width = max(piece.shape[dim] for piece in pieces)
    grown = []
    for piece in pieces:
        missing = width - piece.shape[dim]
        before, after = (0, missing) if dims == 3 else (missing, 0)
        grown.append(nn.functional.pad(piece, (0, 0) * (dims - 1 - dim) + (before, after)))
    return torch.cat(grown)
