"""Reading keys and outputs at the subject's last token, running no more of the model than needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .hooks import StopForward, on_input, on_output, replaced_forward
from .prompts import TokenizedPrompt
from .sharded import until_stopped


@dataclass
class _Chunk:
    """Some rows, and what the blocks that no longer change make of them.

    `below` is the output of block `block`, None before the first reading.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor
    block: int = -1
    below: Any = None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)


class SubjectReader:
    """Reads hidden states of the same sequences again and again while deltas change from the bottom up.

    Tokens after the subject are not fed (causality), and a reading starts where the one before it stood: below the
    module that is read nothing changes any more.

    Args:
        model: The causal language model, in eval mode.
        blocks (`Sequence[nn.Module]`): Its decoder blocks.
        facts (`Sequence[Sequence[TokenizedPrompt]]`): Per fact the same number of rows, the bare prompt first.
        chunk (`int`): Rows per forward pass.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[nn.Module],
        facts: Sequence[Sequence[TokenizedPrompt]],
        chunk: int = 256,
    ) -> None:
        self.model = model
        self.blocks = list(blocks)
        self.count, self.rows_per_fact = len(facts), len(facts[0])
        device = model.get_input_embeddings().weight.device
        self.device = torch.device("cpu") if device.type == "meta" else device
        bare = [rows[0] for rows in facts]
        behind_context = [row for rows in facts for row in rows[1:]]
        self.bare = [self._chunk(bare[at : at + chunk]) for at in range(0, len(bare), chunk)]
        self.others = [self._chunk(behind_context[at : at + chunk]) for at in range(0, len(behind_context), chunk)]

    def _chunk(self, rows: Sequence[TokenizedPrompt]) -> _Chunk:
        last = torch.tensor([row.subject_index for row in rows])
        width = int(last.max()) + 1
        ids = [list(row.ids[: row.subject_index + 1]) + [0] * (width - row.subject_index - 1) for row in rows]
        mask = (torch.arange(width) <= last[:, None]).long()
        return _Chunk(torch.tensor(ids).to(self.device), mask.to(self.device), last)

    def keys(self, module: nn.Module, block: int) -> torch.Tensor:
        """The module's input in every row, (facts, rows, d_in). `block` is the index of the module's block."""
        for chunk in [*self.bare, *self.others]:
            self._run(chunk, block, inputs_of=module, stop=None)
        bare = torch.cat([chunk.seen["input"] for chunk in self.bare])[:, None]
        if not self.others:
            return bare
        others = torch.cat([chunk.seen["input"] for chunk in self.others])
        return torch.cat([bare, others.reshape(self.count, self.rows_per_fact - 1, -1)], dim=1)

    def outputs(self, module: nn.Module, block: int, last_block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the bare prompts, (facts, d_model) each: the module's output and that of block `last_block`."""
        for chunk in self.bare:
            self._run(chunk, block, outputs_of=module, stop=last_block)
        return (
            torch.cat([chunk.seen["output"] for chunk in self.bare]),
            torch.cat([chunk.seen["block"] for chunk in self.bare]),
        )

    def _run(
        self,
        chunk: _Chunk,
        block: int,
        inputs_of: nn.Module | None = None,
        outputs_of: nn.Module | None = None,
        stop: int | None = None,
    ) -> None:
        """One pass, from what is known below to the module's input or to block `stop`."""
        known, below = chunk.block, chunk.below

        def keep(name: str, ends: bool) -> Any:
            def read(hidden: torch.Tensor) -> None:
                hidden = hidden.reshape(*chunk.mask.shape, -1)
                rows = torch.arange(len(chunk.last), device=hidden.device)
                chunk.seen[name] = hidden[rows, chunk.last.to(hidden.device)]
                if ends:
                    raise StopForward

            return read

        def remember(_module: nn.Module, _args: Any, output: Any) -> None:
            chunk.block, chunk.below = block - 1, output

        with torch.no_grad(), ExitStack() as stack:
            for skipped in self.blocks[: known + 1]:
                stack.enter_context(replaced_forward(skipped, lambda *_, **__: below))
            if block - 1 > known:
                handle = self.blocks[block - 1].register_forward_hook(remember)
                stack.callback(handle.remove)
            if inputs_of is not None:
                stack.enter_context(on_input(inputs_of, keep("input", ends=True)))
            if outputs_of is not None and stop is not None:
                stack.enter_context(on_output(outputs_of, keep("output", ends=False)))
                stack.enter_context(on_output(self.blocks[stop], keep("block", ends=True)))
            with until_stopped(self.model):
                self.model(input_ids=chunk.ids, attention_mask=chunk.mask, use_cache=False)
