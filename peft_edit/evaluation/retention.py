"""What a long run of edits keeps: early and late facts, facts that were not edited, ordinary text; beside the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from ..facts import Fact
from ..prompts import context_window
from ..scoring import score_targets
from .bootstrap import Estimate, estimates
from .scores import KINDS, ComparedScores, compare_with_base, score_pairs, split_over_processes, unedited_base


@dataclass(frozen=True)
class Retention:
    """What an edited model has kept, beside its unedited base. Prints as a table.

    Args:
        tenths (`dict[str, ComparedScores]`): Scores of the `first`, `middle` and `last` tenth of the facts, in the
            order in which they were edited.
        recall (`Estimate`), base_recall (`Estimate`): Percentage of unedited prompts that are completed greedily with
            their answer; the interval is resampled over prompts.
        perplexity (`float`), base_perplexity (`float`): Of ordinary text; None if none was given.
    """

    tenths: dict[str, ComparedScores]
    recall: Estimate
    base_recall: Estimate
    perplexity: float | None
    base_perplexity: float | None

    def to_dict(self, per_fact: bool = False) -> dict[str, Any]:
        """Plain mapping; the values of every fact are in it only if asked for."""
        return {
            "tenths": {name: scores.to_dict(per_fact) for name, scores in self.tenths.items()},
            "recall": list(self.recall),
            "base_recall": list(self.base_recall),
            "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity,
        }

    def __str__(self) -> str:
        lines = [f"{'':24}{'edited':>24}{'base':>24}"]
        for name, scores in self.tenths.items():
            for letter, kind in zip(("ES", "PS", "NS", "S"), (*KINDS, "score")):
                cells = (scores.edited.estimate(kind), scores.base.estimate(kind))
                lines.append(f"{f'{name} tenth, {letter}':24}" + "".join(f"{cell!s:>24}" for cell in cells))
        lines.append(f"{'recall, unedited':24}{self.recall!s:>24}{self.base_recall!s:>24}")
        if self.perplexity is not None:
            lines.append(f"{'perplexity':24}{self.perplexity:>24.2f}{self.base_perplexity:>24.2f}")
        return "\n".join(lines)


def tenths(count: int) -> dict[str, range]:
    """Places of the first, middle and last tenth of `count` facts: count // 10 places each, at least one."""
    size = max(1, count // 10)
    middle = (count - size) // 2
    return {
        "first": range(size),
        "middle": range(middle, middle + size),
        "last": range(count - size, count),
    }


def retention(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    unedited: Sequence[tuple[str, str]],
    text: str | Sequence[str] | None = None,
    base: Any = None,
    batch_size: int = 128,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    window: int | None = None,
    stride: int | None = None,
) -> Retention:
    """Scores what must still be there after many edits, beside the unedited base.

    Args:
        model: The edited model: a PEFT model, merged or not, or a plain one with `base`.
        tokenizer: Its tokenizer.
        facts (`Sequence[Fact]`): All edited facts in the order of editing, with `target_true`. Only the first, middle
            and last tenth of them are scored.
        unedited (`Sequence[tuple[str, str]]`): Prompts and answers of facts that were not edited.
        text (`str` or `Sequence[str]`, *optional*): Ordinary text, for the perplexity.
        base (*optional*): The unedited model; by default the model with its adapters turned off.
        batch_size (`int`): Prompts per forward pass.
        confidence (`float`), resamples (`int`), seed (`int`): Of the intervals.
        window (`int`, *optional*), stride (`int`, *optional*): See `perplexity`.

    Raises:
        ValueError: if there are no facts, no unedited prompts, or no base.
    """
    if not facts:
        raise ValueError("There are no facts to score.")
    if not unedited:
        raise ValueError("There are no unedited prompts: give some (prompt, answer) pairs that no edit is about.")
    settings: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    places = {name: list(part) for name, part in tenths(len(facts)).items()}
    scored = sorted({place for part in places.values() for place in part})
    compared = compare_with_base(
        model, tokenizer, [facts[place] for place in scored], base, batch_size=batch_size, **settings
    )

    def recalled(asked: Any) -> Estimate:
        greedy = 100.0 * score_pairs(asked, tokenizer, unedited, batch_size).greedy.double()
        return estimates({"recall": greedy.tolist()}, **settings)["recall"]

    def perplexed(asked: Any) -> float | None:
        return None if text is None else perplexity(asked, tokenizer, text, window, stride)

    with unedited_base(model, base) as other:
        before = recalled(other), perplexed(other)
    return Retention(
        tenths={name: compared.subset([scored.index(place) for place in part]) for name, part in places.items()},
        recall=recalled(model),
        base_recall=before[0],
        perplexity=perplexed(model),
        base_perplexity=before[1],
    )


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
) -> float:
    """Perplexity of texts: exp of the mean negative log-likelihood over all their tokens, each scored once.

    A text longer than the window is read in windows that overlap: each begins `stride` tokens after the one before and
    scores the tokens which that one did not reach, so that they have at least `window - stride` tokens of context. The
    special tokens that open a sequence stand before every window and are not scored; without any, the first token of
    a text is not scored, as nothing predicts it. Every token weighs the same, whichever text it is in.

    Args:
        model: The causal language model as it stands.
        tokenizer: Its tokenizer. The figure holds for this tokenizer only.
        texts (`str` or `Sequence[str]`): One text or several, each read by itself.
        window (`int`, *optional*): Tokens per window; by default 1024, or the model's context window if that is less.
        stride (`int`, *optional*): Tokens from one window to the next; by default half of a window.
        batch_size (`int`): Windows per forward pass.

    Returns:
        `float`: at least 1; infinite if it overflows, NaN if the model's outputs are not finite.

    Raises:
        ValueError: if no text has a token to score, or window and stride do not fit.
    """
    longest = context_window(model.config)
    window = min(1024, longest or 1024) if window is None else window
    if longest is not None and window > longest:
        raise ValueError(f"A window of {window} tokens exceeds the model's context window of {longest}: lower it.")
    stride = window // 2 if stride is None else stride
    opening = _opening(tokenizer)
    most = window - max(1, len(opening))  # a scored token needs one before it
    if not 1 <= stride <= most:
        raise ValueError(
            f"stride must be between 1 and {most} for windows of {window} tokens, got {stride}: else tokens would be "
            "left out, or have nothing before them."
        )
    pieces = []
    for text in [texts] if isinstance(texts, str) else texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += _windows(opening, list(ids), window, stride)
    if not pieces:
        raise ValueError("The texts hold no token to score: give text of at least two tokens.")

    def score(own: list[tuple[list[int], list[int]]]) -> Sequence[torch.Tensor]:
        return [score_targets(model, own, chunk=batch_size).log_probability]

    [mean] = split_over_processes(model, pieces, score)
    weight = torch.tensor([len(scored) for _, scored in pieces], dtype=torch.float64)
    with np.errstate(over="ignore"):
        return float(np.exp(-float((mean.double() * weight).sum() / weight.sum())))


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    added = takewhile(lambda pair: pair[1], zip(encoded["input_ids"], encoded["special_tokens_mask"]))
    return [token for token, _ in added]


def _windows(opening: list[int], ids: list[int], window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """What a text's windows read before the tokens that they score, and those tokens."""
    width = window - len(opening)
    found = []
    done = 0 if opening else 1
    start = 0
    while done < len(ids):
        end = min(start + width, len(ids))
        found.append(([*opening, *ids[start:done]], ids[done:end]))
        done, start = end, start + stride
    return found
