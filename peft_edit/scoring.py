"""Probability of given targets after given prompts: one batched pass, the output head on the target positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .hooks import on_input


TokenPairs = Sequence[tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class TargetScores:
    """Scores of P prompt-target pairs.

    Args:
        log_probability (`torch.Tensor`): (P,) mean log-probability of the target's tokens, teacher-forced; float32.
        greedy (`torch.BoolTensor`): (P,) every target token is the most probable one.
        token_accuracy (`torch.Tensor`): (P,) share of the target's tokens, 0 to 1, that are the most probable one
            after the prompt and the target's tokens before it; float32.
    """

    log_probability: torch.Tensor
    greedy: torch.Tensor
    token_accuracy: torch.Tensor


def score_targets(model: Any, pairs: TokenPairs, chunk: int = 128) -> TargetScores:
    """Scores targets under the model as it stands.

    Args:
        model: The causal language model (adapters as they are), in eval mode.
        pairs: (prompt token ids, target token ids).
        chunk (`int`): Pairs per forward pass.

    Returns:
        `TargetScores`: on the CPU, in the order given.
    """
    log_probability, token_accuracy = torch.zeros(2, len(pairs), dtype=torch.float32)
    greedy = torch.zeros(len(pairs), dtype=torch.bool)
    for part, rows, labels, logits in _target_logits(model, pairs, chunk):
        scored = -nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="none").cpu()
        hit = (logits.argmax(-1).cpu() == labels).float()
        none = scored.new_zeros(len(part))
        length = none.index_add(0, rows, torch.ones_like(scored))
        hits = none.index_add(0, rows, hit)
        place = torch.tensor(part)
        log_probability[place] = none.index_add(0, rows, scored) / length
        greedy[place] = hits == length
        token_accuracy[place] = hits / length
    return TargetScores(log_probability, greedy, token_accuracy)


def predict_targets(model: Any, pairs: TokenPairs, chunk: int = 128) -> list[torch.Tensor]:
    """The most probable token at every position of the targets, teacher-forced.

    Args:
        model: The causal language model (adapters as they are), in eval mode.
        pairs: (prompt token ids, target token ids).
        chunk (`int`): Pairs per forward pass.

    Returns:
        `list[torch.Tensor]`: (T,) int64 for each pair, T the length of its target; on the CPU, in the order given.
    """
    found: list[Any] = [None] * len(pairs)
    for part, _, _, logits in _target_logits(model, pairs, chunk):
        tokens = logits.argmax(-1).cpu().split([len(pairs[place][1]) for place in part])
        for place, predicted in zip(part, tokens):
            found[place] = predicted
    return found


def _target_logits(
    model: Any, pairs: TokenPairs, chunk: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Passes over the pairs, short ones first. What several pairs read (one prompt, targets of one token) is run once.

    Yields:
        places of C pairs; for the T target tokens of all of them: (T,) which of the C it belongs to, (T,) the token,
        and (T, vocabulary) the logits that predict it.
    """
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    inputs = [(*prompt, *target)[:-1] for prompt, target in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (len(inputs[i]), inputs[i]))  # equal ones side by side
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        row_of = {ids: row for row, ids in enumerate(dict.fromkeys(inputs[i] for i in part))}
        width = max(map(len, row_of))
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in row_of])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in row_of])
        wanted = [(row_of[inputs[i]], len(pairs[i][0]) - 1 + step) for i in part for step in range(len(pairs[i][1]))]
        read_of = {place: read for read, place in enumerate(dict.fromkeys(wanted))}
        rows, columns = (torch.tensor(places) for places in zip(*read_of))
        owners = torch.tensor([owner for owner, i in enumerate(part) for _ in pairs[i][1]])
        labels = torch.tensor([token for i in part for token in pairs[i][1]])

        def gather(hidden: torch.Tensor, rows=rows, columns=columns) -> torch.Tensor:
            return hidden[rows.to(hidden.device), columns.to(hidden.device)][None]

        with torch.no_grad(), on_input(model.get_output_embeddings(), gather):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[0]
        yield part, owners, labels, logits[torch.tensor([read_of[place] for place in wanted]).to(logits.device)]
