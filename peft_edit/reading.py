"""Reading keys and outputs at the subject's last token, running no more of the model than needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from .hooks import StopForward, on_input, on_output
from .prompts import TokenizedPrompt


def read_at_subject(
    model: Any,
    rows: Sequence[TokenizedPrompt],
    inputs_of: nn.Module | None = None,
    outputs_of: Sequence[nn.Module] = (),
    chunk: int = 256,
) -> list[torch.Tensor]:
    """Hidden states at every row's subject; tokens after the subject are not fed (causality).

    Args:
        model: The causal language model, in eval mode.
        rows: The sequences.
        inputs_of: A module whose input is read.
        outputs_of: Modules whose output is read; the pass stops after the last of everything read has been seen.
        chunk (`int`): Rows per forward pass.

    Returns:
        `list[torch.Tensor]`: one (rows, width) tensor for `inputs_of` (if given), then one for each of `outputs_of`.
    """
    wanted = (inputs_of is not None) + len(outputs_of)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(wanted)]
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        last = torch.tensor([row.subject_index for row in part])
        width = int(last.max()) + 1
        ids = torch.tensor(
            [list(row.ids[: row.subject_index + 1]) + [0] * (width - row.subject_index - 1) for row in part]
        )
        mask = (torch.arange(width) <= last[:, None]).long()
        seen: dict[int, torch.Tensor] = {}

        def keep(place: int, hidden: torch.Tensor, last: torch.Tensor = last, width: int = width, seen=seen) -> None:
            hidden = hidden.reshape(len(last), width, hidden.shape[-1])
            seen[place] = hidden[torch.arange(len(last), device=hidden.device), last.to(hidden.device)].detach()
            if len(seen) == wanted:
                raise StopForward

        with ExitStack() as stack, torch.no_grad():
            if inputs_of is not None:
                stack.enter_context(on_input(inputs_of, partial(keep, 0)))
            offset = wanted - len(outputs_of)
            for place, module in enumerate(outputs_of, start=offset):
                stack.enter_context(on_output(module, partial(keep, place)))
            try:
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            except StopForward:
                pass
        for place in range(wanted):
            pieces[place].append(seen[place])
    return [torch.cat(parts) for parts in pieces]
