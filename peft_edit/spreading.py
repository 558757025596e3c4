"""From what was found for a batch of facts to the keys and values of each edited module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .gradients import FactGradients
from .prompts import FactPrompts
from .reading import SubjectReader
from .search import SearchResult


if TYPE_CHECKING:
    from .editing import FactEditor


class Spread:
    """Spreads the wanted change over the edited modules as MEMIT does (arXiv 2210.07229, algorithm 1).

    The modules are asked for one after the other, each when the ones before it have their new delta.

    Args:
        editor (`FactEditor`): Whose modules these are.
        prompts (`Sequence[FactPrompts]`): Of the facts.
        found (`SearchResult` or `FactGradients`): Of the same facts.
    """

    def __init__(
        self, editor: FactEditor, prompts: Sequence[FactPrompts], found: SearchResult | FactGradients
    ) -> None:
        self.editor = editor
        self.prompts = prompts
        self.found = found
        self._readers: dict[int, SubjectReader] = {}  # of this process, by the first fact of a group

    def pairs(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (n, d_in) and values (n, d_out) for a module, in the dtype and on the device that they are kept in.

        Args:
            index (`int`): Which edited module, counted from 0.
        """
        editor, found = self.editor, self.found
        delta = list(editor.layers.values())[index].get_delta(editor.adapter_name)
        if isinstance(found, FactGradients):
            kept_dtype = _kept_dtype(found.keys[index], delta)
            return found.keys[index].to(delta.device, kept_dtype), found.gradients[index].to(delta)
        row_keys, increments = self._wanted(index, found)
        kept_dtype = _kept_dtype(row_keys, delta)
        keys = _fact_keys(row_keys.to(found.targets.dtype)).to(delta.device, kept_dtype)
        return keys, (keys.to(delta) @ delta.T + increments.to(delta)).to(kept_dtype)

    def _wanted(self, index: int, found: SearchResult) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (n, rows, d_in) of a module at the subjects, and the wanted change (n, d_model) of its output."""
        editor = self.editor
        if len(editor.layers) == 1:
            return found.keys, found.increments
        name, layer = list(editor.layers.items())[index]
        block = editor.block_of[name]

        def read(own: list[int]) -> Sequence[torch.Tensor]:
            path, reader = editor.paths[name], self._reader(own)
            assert path is not None
            # Below the first edited module nothing has changed since the search.
            row_keys = found.keys[own] if index == 0 else reader.keys(layer, block)
            output, hidden = reader.outputs(layer, block, editor.block_of[editor.last])
            residual = (found.targets[own] - hidden.to(found.targets)) / (len(editor.layers) - index)
            with torch.no_grad():
                increments = path.pull(output.to(residual.dtype), residual.to(output.device))
            return row_keys, increments

        row_keys, increments = editor.workers.rows(len(self.prompts), read, editor.groups(self.prompts))
        return row_keys, increments

    def _reader(self, own: list[int]) -> SubjectReader:
        if own[0] not in self._readers:
            rows = [self.prompts[place].rows for place in own]
            self._readers[own[0]] = SubjectReader(self.editor.model, self.editor.blocks, rows)
        return self._readers[own[0]]


def _kept_dtype(keys: torch.Tensor, delta: torch.Tensor) -> torch.dtype:
    """What pairs are kept in: 16 bit where the model computes so, else as the delta."""
    return keys.dtype if keys.dtype.itemsize == 2 else delta.dtype


def _fact_keys(row_keys: torch.Tensor) -> torch.Tensor:
    """One key per fact, (n, d_in), of those of its rows, (n, rows, d_in).

    As in MEMIT's code the bare prompt counts half, the contexts together the other half.
    """
    if row_keys.shape[1] == 1:
        return row_keys[:, 0]
    return 0.5 * row_keys[:, 0] + 0.5 * row_keys[:, 1:].mean(1)
