"""The sequences of a target search as tensors: all of them, and those that are run at the moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..prompts import FactPrompts


MOST_ROWS = 512


@dataclass(frozen=True)
class SearchRows:
    """The sequences of some facts as padded tensors. F facts of R rows (the last is the essence prompt), N = F * R.

    Args:
        ids (`torch.LongTensor`): (N, T), right-padded; the last target token is not fed.
        lengths (`torch.LongTensor`): (N,).
        subject (`torch.LongTensor`): (N,) index of the subject's last token.
        read_positions (`torch.LongTensor`): (F, R, K) positions whose next-token logits are read.
        read_mask (`torch.BoolTensor`): (F, R, K) which of them exist.
        labels (`torch.LongTensor`): (F, R, K) target tokens; -1 where nothing is to be predicted (essence).
        shared (`torch.LongTensor`): (R,) tokens before the subject that are the same in that row of every fact, such
            as those of a context.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    subject: torch.Tensor
    read_positions: torch.Tensor
    read_mask: torch.Tensor
    labels: torch.Tensor
    shared: torch.Tensor

    @classmethod
    def from_prompts(cls, prompts: list[FactPrompts], device: torch.device | str = "cpu") -> SearchRows:
        """Pads the rows of all facts into one rectangle."""
        rows_per_fact = len(prompts[0].rows) + 1
        rows = [(row, True) for fact in prompts for row in fact.rows]
        width = max(len(row.target_ids) for row, _ in rows)
        sequences, subjects, positions, labels = [], [], [], []
        for fact in prompts:
            for row in fact.rows:
                sequences.append(row.ids[:-1])
                subjects.append(row.subject_index)
                reads = list(range(row.prompt_length - 1, len(row.ids) - 1))
                positions.append(reads + [-1] * (width - len(reads)))
                labels.append(list(row.target_ids) + [-1] * (width - len(reads)))
            sequences.append(fact.essence.ids)
            subjects.append(fact.essence.subject_index)
            positions.append([len(fact.essence.ids) - 1] + [-1] * (width - 1))
            labels.append([-1] * width)
        longest = max(map(len, sequences))
        shape = (len(prompts), rows_per_fact, width)
        read = torch.tensor(positions).reshape(shape)
        return cls(
            ids=torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in sequences]).to(device),
            lengths=torch.tensor([len(ids) for ids in sequences]).to(device),
            subject=torch.tensor(subjects).to(device),
            read_positions=read.clamp_min(0).to(device),
            read_mask=(read >= 0).to(device),
            labels=torch.tensor(labels).reshape(shape).to(device),
            shared=torch.tensor(
                [
                    _common_length([ids[:end] for ids, end in zip(sequences[place::rows_per_fact], ends)])
                    for place in range(rows_per_fact)
                    if (ends := subjects[place::rows_per_fact])
                ]
            ).to(device),
        )

    @property
    def rows_per_fact(self) -> int:
        return self.read_mask.shape[1]

    def of_facts(self, facts: torch.Tensor) -> torch.Tensor:
        """Row indices, (A * R,), of the given facts, (A,)."""
        steps = torch.arange(self.rows_per_fact, device=facts.device)
        return (facts[:, None] * self.rows_per_fact + steps).reshape(-1)


def width_buckets(lengths: Sequence[int], spare: int, most: int = MOST_ROWS) -> list[list[int]]:
    """Groups sequences of similar length, so that padding each group to its longest wastes little.

    Args:
        lengths (`Sequence[int]`): Tokens of each sequence.
        spare (`int`): Tokens of padding that are cheaper than one more pass.
        most (`int`): Sequences in one group at most.

    Returns:
        `list[list[int]]`: places in `lengths`, each in one group; longest first.
    """
    buckets: list[list[int]] = []
    padding = width = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        padding += width - lengths[place]
        if not buckets or padding > spare or len(buckets[-1]) == most:
            buckets.append([])
            padding, width = 0, lengths[place]
        buckets[-1].append(place)
    return buckets


def _common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest common beginning."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (one, other) in enumerate(zip(first, last)) if one != other), min(len(first), len(last)))


@dataclass(frozen=True)
class BaseStates:
    """What the model does before any increment, per fact.

    Args:
        hidden (`torch.Tensor`): (F, d_model) output of the edited block, bare prompt, subject's last token.
        module_output (`torch.Tensor`): (F, d_model) output of the edited module there.
        keys (`torch.Tensor`): (F, R - 1, d_in) input of the first edited module at every row's subject.
    """

    hidden: torch.Tensor
    module_output: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Rows of one view that are run together, being of similar length.

    Args:
        rows (`torch.LongTensor`): (n,) the row in the view, of A * R, of each row here.
        row_slots (`torch.LongTensor`): (n,) the place in the view of each row's fact.
        read_rows (`torch.LongTensor`), read_columns (`torch.LongTensor`): (M,) hidden states that reach the head:
            first those that predict a target token, then those after an essence prompt.
        target_rows (`torch.LongTensor`): (targets,) the row in the view, of A * R, of each target token.
        labels (`torch.LongTensor`): (targets,) the target tokens.
        essence_slots (`list[int]`): (M - targets,) the place in the view of the fact of each essence row.
        state: What the forward pass needs besides.
    """

    rows: torch.Tensor
    row_slots: torch.Tensor
    read_rows: torch.Tensor
    read_columns: torch.Tensor
    target_rows: torch.Tensor
    labels: torch.Tensor
    essence_slots: list[int]
    state: Any


@dataclass(frozen=True)
class View:
    """The rows of the A facts that are being searched at the moment, in the form that the forward pass takes.

    Args:
        facts (`torch.LongTensor`): (A,).
        tokens (`torch.LongTensor`): (A * R,) target tokens of each row.
        parts (`list[Part]`): The rows.
    """

    facts: torch.Tensor
    tokens: torch.Tensor
    parts: list[Part]
