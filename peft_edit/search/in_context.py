"""Learn the Inference (LTI, arXiv 2410.07819): an edited model shall answer as the model does that is told the fact.

The reference is the model itself before the edit, with "Imagine that <fact>" in front of the prompt. Two KL
divergences hold the search to it, in every context: of the next-token distributions at the target tokens, and of what
the subject's last token stands for at a middle block, read through the final norm and the output head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ..facts import Fact, fill
from ..hooks import on_input, on_output, replaced_forward
from ..prompts import FactPrompts, PromptEncoder, TokenizedPrompt, join
from .forward import FullForward
from .rows import Part, View


INTRODUCTION = "Imagine that {}\n"


@dataclass(frozen=True)
class InContextPrompts(FactPrompts):
    """Sequences of a fact, and `told`: each of its `rows` again, behind the sentence that tells the new fact."""

    told: tuple[TokenizedPrompt, ...]


def encode_in_context(encoder: PromptEncoder, fact: Fact, contexts: Sequence[str]) -> InContextPrompts:
    """As `PromptEncoder.encode_fact`, with the rows that tell the fact.

    Raises:
        FactError: as there; also if a row exceeds the context window together with the sentence in front.
    """
    prompts = encoder.encode_fact(fact, contexts)
    introduction = INTRODUCTION.replace("{}", "".join(join(fill(fact.prompt, fact.subject), fact.target)), 1)
    told = []
    for row, context in zip(prompts.rows, ("", *contexts)):
        found = encoder.encode(fact, fact.prompt, introduction + context, fact.target)
        # The same target tokens as without the introduction, so that distributions are compared one to one.
        ids = found.ids[: found.prompt_length] + row.target_ids
        told.append(TokenizedPrompt(ids, found.subject_index, found.prompt_length))
    return InContextPrompts(prompts.rows, prompts.essence, tuple(told))


def middle_block(edited: int, count: int, wanted: int | None) -> int:
    """The block whose output is constrained: the wanted one, else halfway between the edited one and the last.

    Args:
        edited (`int`): The block of the last edited module.
        count (`int`): Blocks of the model.
        wanted (`int`, *optional*): What the user asks for.

    Raises:
        ValueError: if the wanted block lies below the edited one, or is the last one.
    """
    highest = max(edited, count - 2)  # what the last block makes of the subject reaches no other position
    if wanted is None:
        return min((edited + count) // 2, highest)
    if not edited <= wanted <= highest:
        raise ValueError(
            f"lti_layer={wanted} is out of reach: it must be from {edited}, the last edited block, to {highest}, the "
            "last block whose output at the subject is still read."
        )
    return wanted


@dataclass(frozen=True)
class _Reference:
    """Of the rows of a part.

    Args:
        final (`torch.Tensor`): (targets, vocabulary), log-probabilities at the target tokens.
        shares (`torch.Tensor`): (targets,), of each in its fact's mean.
        places (`torch.LongTensor`): (n,), the rows that are no essence row.
        slots (`torch.LongTensor`): (n,), the place in the view of their facts.
        middle (`torch.Tensor`): (n, vocabulary), log-probabilities at the middle block.
    """

    final: torch.Tensor
    shares: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor
    middle: torch.Tensor


class Inference:
    """The reference of the facts under search, and the two divergences from it.

    Args:
        forward (`FullForward`): How the model is run; prepared.
        prompts (`Sequence[InContextPrompts]`): The facts, in the order of the forward's rows.
        final_weight (`float`): Weight of the divergence of the answers.
        middle_weight (`float`): Weight of the divergence at the middle block.
        block (`int`, *optional*): The middle block; see `middle_block`.
    """

    def __init__(
        self,
        forward: FullForward,
        prompts: Sequence[InContextPrompts],
        final_weight: float,
        middle_weight: float,
        block: int | None = None,
    ) -> None:
        self.forward = forward
        self.prompts = prompts
        self.final_weight = final_weight
        self.middle_weight = middle_weight
        self.block = middle_block(forward.block_index, len(forward.blocks), block)
        self.rows = forward.rows.rows_per_fact - 1  # without the essence row
        # Of each fact under search: log-probabilities (rows, target tokens, vocabulary) and (rows, vocabulary).
        self.final: dict[int, torch.Tensor] = {}
        self.middle: dict[int, torch.Tensor] = {}
        self._gathered: dict[int, tuple[Part, _Reference]] = {}

    # --- the reference -----------------------------------------------------------------------------------------

    def begin(self, facts: Sequence[int]) -> None:
        """Runs the rows that tell the facts, once and without gradient."""
        self._gathered = {}
        new = [fact for fact in facts if fact not in self.final]
        if not new:
            return
        rows = [row for fact in new for row in self.prompts[fact].told]
        lengths = torch.tensor([len(row.ids) - 1 for row in rows])

        def run(index: torch.Tensor) -> Sequence[torch.Tensor]:
            return self._told([rows[place] for place in index.tolist()])

        with torch.no_grad():
            final, middle = self.forward.in_buckets(lengths, torch.arange(len(rows)), run)
        for place, fact in enumerate(new):
            own = slice(place * self.rows, (place + 1) * self.rows)
            self.final[fact], self.middle[fact] = final[own], middle[own]

    def forget(self, facts: Sequence[int]) -> None:
        """Lets go of facts whose search has ended."""
        self._gathered = {}
        for fact in facts:
            del self.final[fact], self.middle[fact]

    def _told(self, rows: Sequence[TokenizedPrompt]) -> Sequence[torch.Tensor]:
        """Log-probabilities at the target tokens (n, K, vocabulary) and at the middle block (n, vocabulary)."""
        device = self.forward.rows.ids.device
        width, most = max(len(row.ids) for row in rows) - 1, max(len(row.target_ids) for row in rows)
        ids = torch.tensor([[*row.ids[:-1], *[0] * (width - len(row.ids) + 1)] for row in rows]).to(device)
        mask = torch.tensor([[1] * (len(row.ids) - 1) + [0] * (width - len(row.ids) + 1) for row in rows]).to(device)
        reads = torch.tensor([[min(row.prompt_length - 1 + k, width - 1) for k in range(most)] for row in rows])
        subjects = torch.tensor([row.subject_index for row in rows])
        place = torch.arange(len(rows))
        seen: dict[str, torch.Tensor] = {}

        def at_subject(hidden: torch.Tensor) -> None:
            seen["middle"] = hidden[place.to(hidden.device), subjects.to(hidden.device)]

        def gather(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[place.to(hidden.device)[:, None], reads.to(hidden.device)].flatten(0, 1)[None]

        with self.forward.learning_output_form(self.block), on_output(self.forward.blocks[self.block], at_subject):
            with on_input(self.forward.model.get_output_embeddings(), gather):
                logits = self.forward.run(ids, mask)
        final = _log_softmax(logits).unflatten(0, (len(rows), most))
        return final, _log_softmax(self.lens(seen["middle"]))

    # --- during the search -------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, part: Part) -> Iterator[dict[str, torch.Tensor]]:
        """Reads the middle block's output (n, d_model) at the subject of every row of a part, as `"middle"`."""
        seen: dict[str, torch.Tensor] = {}

        def at_subject(hidden: torch.Tensor) -> None:
            seen["middle"] = self.forward.at_subjects(part, hidden)

        with on_output(self.forward.blocks[self.block], at_subject):
            yield seen

    def terms(
        self, part: Part, view: View, active: Sequence[int], target_logits: torch.Tensor, seen: dict[str, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Weighted divergences of a part's rows, as (places in the view, values); a fact's terms are their sum.

        Both are means over the fact's rows, the first of means over target tokens.

        Args:
            part (`Part`), view (`View`): The rows.
            active (`Sequence[int]`): The facts of the view.
            target_logits (`torch.Tensor`): (targets, vocabulary).
            seen (`dict`): From `reading`.
        """
        known = self._reference(part, view, active)
        if self.final_weight and len(part.labels):
            found = divergence(_log_softmax(target_logits), known.final)
            yield part.target_rows // (self.rows + 1), self.final_weight * known.shares.to(found) * found
        if self.middle_weight and len(known.places):
            hidden = seen["middle"]
            found = divergence(_log_softmax(self.lens(hidden[known.places.to(hidden.device)])), known.middle)
            yield known.slots, self.middle_weight / self.rows * found

    def _reference(self, part: Part, view: View, active: Sequence[int]) -> _Reference:
        """The reference of a part's rows, gathered once for as long as the view lasts."""
        held = self._gathered.get(id(part))
        if held is not None and held[0] is part:
            return held[1]
        rows_per_fact = self.rows + 1
        rows, tokens = part.rows.tolist(), view.tokens.tolist()
        places = [place for place, row in enumerate(rows) if row % rows_per_fact != self.rows]
        owners = [(active[rows[place] // rows_per_fact], rows[place] % rows_per_fact) for place in places]
        none = [self.middle[active[0]][:0]]  # a part may hold essence rows only
        final = [self.final[fact][row, : tokens[rows[place]]] for place, (fact, row) in zip(places, owners)]
        known = _Reference(
            final=torch.cat(none + final),
            shares=1.0 / (self.rows * view.tokens[part.target_rows]),
            places=torch.tensor(places, dtype=torch.long),
            slots=part.rows[torch.tensor(places, dtype=torch.long)] // rows_per_fact,
            middle=torch.cat(none + [self.middle[fact][row : row + 1] for fact, row in owners]),
        )
        self._gathered[id(part)] = (part, known)
        return known

    def lens(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's own last norm and head make of hidden states: (n, d_model) to logits (n, vocabulary)."""
        forward = self.forward
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=forward.rows.ids.device)
        with ExitStack() as stack:
            for block in forward.blocks[:-1]:
                stack.enter_context(replaced_forward(block, forward.pass_through))
            last = forward.blocks[-1]
            stack.enter_context(replaced_forward(last, lambda *_, **__: forward.as_block(hidden[:, None])))
            stack.enter_context(on_input(forward.model.get_output_embeddings(), lambda each: each[:, 0][None]))
            return forward.run(ids, torch.ones_like(ids))


def divergence(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL divergence (n,) of distributions from their references, as log-probabilities (n, vocabulary) each."""
    return (found.exp() * (found - reference.to(found))).sum(-1)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
