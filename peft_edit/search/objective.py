"""What a target search minimises, for many facts at once, and what it reads off while doing so.

Mean negative log-likelihood of the target over the contexts, the KL divergence on the essence prompt, and a weight
decay (ROME and MEMIT: arXiv 2202.05262, eq. 4; arXiv 2210.07229, eq. 16); with LTI (arXiv 2410.07819) also how far the
model is from answering as it does when it is told the new fact in its context (`in_context.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .forward import FullForward
from .in_context import Inference
from .rows import View
from .settings import SearchSettings


class Objective:
    """The objective of the facts that `forward` was prepared for.

    Args:
        forward (`FullForward`): How the model is run.
        settings (`SearchSettings`): Weights of the terms.
        unit (`torch.Tensor`): (F, 1), length of an increment of the module's output per unit of delta.
        length (`torch.Tensor`): (F, 1), ||h||.
        inference (`Inference`, *optional*): The model's own answers with the facts in context, for LTI.
    """

    def __init__(
        self,
        forward: FullForward,
        settings: SearchSettings,
        unit: torch.Tensor,
        length: torch.Tensor,
        inference: Inference | None = None,
    ) -> None:
        self.forward = forward
        self.settings = settings
        self.unit = unit
        self.length = length
        self.inference = inference
        self.device, self.dtype = unit.device, unit.dtype
        # Of each fact, what follows the essence prompt without an increment: seen at its first evaluation.
        self.essence: dict[int, torch.Tensor] = {}

    def begin(self, facts: Sequence[int]) -> None:
        """Facts that are going to be searched."""
        if self.inference is not None:
            self.inference.begin(facts)

    def forget(self, facts: Sequence[int]) -> None:
        """Facts whose search has ended."""
        for fact in facts:
            del self.essence[fact]
        if self.inference is not None:
            self.inference.forget(facts)

    def evaluate(
        self, view: View, places: torch.Tensor, active: list[int], delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Objective (A,), whether every target token is the most probable (A,), target probability (A,).

        Args:
            view (`View`): Rows of the A facts.
            places (`torch.LongTensor`): (A,) which facts those are, on the search's device.
            active (`list[int]`): The same as numbers.
            delta (`torch.Tensor`): (A, d_model), in units of the residual stream.
        """
        shape = (len(active), self.forward.rows.rows_per_fact)
        make: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        total, missed = torch.zeros(len(view.tokens), **make), torch.zeros(len(view.tokens), **make)
        divergence, inferred = torch.zeros(len(active), **make), torch.zeros(len(active), **make)
        increments = delta * self.unit[places]
        for part in view.parts:
            reading: Any = nullcontext({}) if self.inference is None else self.inference.reading(part)
            with reading as seen:
                logits = self.forward.logits(part, increments)
            labels, rows = part.labels.to(logits.device), part.target_rows.to(self.device)
            target_logits, essence = logits[: len(labels)].to(self.dtype), logits[len(labels) :].to(self.dtype)
            scored = -nn.functional.cross_entropy(target_logits, labels, reduction="none")
            wrong = target_logits.detach().argmax(-1) != labels
            total = total.index_add(0, rows, scored.to(self.device))
            missed = missed.index_add(0, rows, wrong.to(self.device, self.dtype))
            kl = self._divergence([active[slot] for slot in part.essence_slots], essence.log_softmax(-1))
            slots = torch.tensor(part.essence_slots, dtype=torch.long).to(self.device, non_blocking=True)
            divergence = divergence.index_add(0, slots, kl.to(self.device))
            if self.inference is not None:
                terms = self.inference.terms(part, view, active, target_logits, seen)
                for slots, term in terms:
                    inferred = inferred.index_add(0, slots.to(self.device), term.to(**make))
        per_row = (total / view.tokens.to(self.device).clamp_min(1)).reshape(shape)[:, :-1]  # without the essence row
        probable = missed.reshape(shape).sum(1) == 0
        # The square root of a zero increment has no gradient; there the decay has none either.
        size = torch.where((delta == 0).all(-1), delta.new_zeros(()), delta.square().sum(-1).clamp_min(1e-30).sqrt())
        decay = size / self.length[places, 0].square()
        objective = -per_row.mean(1) + self.settings.kl_weight * divergence + self.settings.weight_decay * decay
        if self.inference is not None:
            objective = objective + inferred
        return objective, probable, per_row.detach().exp().mean(1)

    def _divergence(self, facts: list[int], essence: torch.Tensor) -> torch.Tensor:
        """KL divergence, one per fact, of what follows the essence prompt from what did without an increment."""
        for row, fact in enumerate(facts):
            self.essence.setdefault(fact, essence[row].detach())  # at the first evaluation the increment is zero
        if not facts:
            return essence.sum(-1)
        before = torch.stack([self.essence[fact] for fact in facts])
        return (essence.exp() * (essence - before)).sum(-1)
