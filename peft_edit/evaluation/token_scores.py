"""Token accuracy, as zsRE is scored: on edited prompts, other phrasings, and prompts that must not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..facts import Fact
from ..hooks import evaluating
from ..prompts import PromptEncoder
from ..scoring import predict_targets
from .bootstrap import Estimate, estimates
from .scores import fact_means, prompts_of, score_pairs, split_over_processes, unedited_base


TOKEN_KINDS = ("rewrite", "paraphrase", "locality")

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TokenScores:
    """Token accuracy in percent, each the mean over facts of the mean over a fact's prompts.

    Args:
        rewrite (`float`): Of the new target on the edited prompts.
        paraphrase (`float`): Of the new target on other phrasings.
        locality (`float`): On prompts that must not change, the positions at which the edited model predicts the token
            that its unedited base predicts.
        score (`float`): Harmonic mean of the three.
        base_rewrite (`float`), base_paraphrase (`float`): Those of the unedited base, whose locality is 100.
        facts (`int`): N, number of facts scored.
        intervals (`dict[str, tuple[float, float]]`): Bootstrap interval of each of the values above.
        per_fact (`dict[str, list[float]]`): (N,) values by name; NaN for a fact without such prompts.
    """

    rewrite: float
    paraphrase: float
    locality: float
    score: float
    base_rewrite: float
    base_paraphrase: float
    facts: int
    intervals: dict[str, tuple[float, float]] = field(repr=False)
    per_fact: dict[str, list[float]] = field(repr=False)

    def to_dict(self, per_fact: bool = False) -> dict[str, Any]:
        """Plain mapping; the values of every fact are in it only if asked for."""
        found = asdict(self)
        found["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        return found if per_fact else {name: value for name, value in found.items() if name != "per_fact"}

    def __str__(self) -> str:
        names = (*TOKEN_KINDS, "score")
        scores = "  ".join(f"{name} {Estimate(getattr(self, name), *self.intervals[name])}" for name in names)
        return f"{scores}  (base: rewrite {self.base_rewrite:.1f}, paraphrase {self.base_paraphrase:.1f})"


def token_accuracy(model: Any, tokenizer: Any, pairs: Pairs, batch_size: int = 128) -> list[float]:
    """Share of each answer's tokens that the model predicts, given the prompt and the answer's tokens before.

    Args:
        model: The model as it stands.
        tokenizer: Its tokenizer.
        pairs (`Sequence[tuple[str, str]]`): P prompts and answers.
        batch_size (`int`): Prompts per forward pass.

    Returns:
        `list[float]`: (P,) shares, 0 to 1.
    """
    return score_pairs(model, tokenizer, pairs, batch_size).token_accuracy.tolist()


def token_agreement(model: Any, tokenizer: Any, pairs: Pairs, base: Any = None, batch_size: int = 128) -> list[float]:
    """Share of each answer's positions at which the model predicts the same token as its unedited base.

    Args:
        model, tokenizer, pairs, batch_size: As for `token_accuracy`. Both models read the answer's tokens before.
        base (*optional*): The unedited model; by default the model with its adapters turned off.

    Returns:
        `list[float]`: (P,) shares, 0 to 1.

    Raises:
        ValueError: if the model has no adapters and no base is given.
    """
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)

    def agree(own: Sequence[tuple[str, str]]) -> Sequence[torch.Tensor]:
        encoded = [encoder.continuation_ids(*pair) for pair in own]
        found = predict_targets(model, encoded, chunk=batch_size)
        with unedited_base(model, base) as other, evaluating(other):
            expected = predict_targets(other, encoded, chunk=batch_size)
        return [torch.stack([(one == two).float().mean() for one, two in zip(found, expected)])]

    return split_over_processes(model, pairs, agree)[0].tolist() if pairs else []


def score_tokens(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    locality: Sequence[Pairs] | None = None,
    base: Any = None,
    batch_size: int = 128,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> TokenScores:
    """Token accuracy of edits, the measure used on zsRE (MEND, arXiv 2110.11309; MEMIT, arXiv 2210.07229).

    Args:
        model, tokenizer, batch_size, confidence, resamples, seed: As for `score_edits`.
        facts (`Sequence[Fact]`): The edited facts; `target_true` is not needed.
        locality (*optional*): For each fact the prompts that must not change, with an answer as long as what is to be
            compared. By default the fact's `neighborhood`, answered with `target_true` (nothing if it has none).
        base (*optional*): The unedited model; by default the model with its adapters turned off.

    Returns:
        `TokenScores`: a score without any prompt to measure it on is NaN.

    Raises:
        ValueError: if no fact is given, `locality` has another length, or there is no base.
    """
    prompts = prompts_of(facts)
    if locality is None:
        locality = [
            [(text, fact.target_true) for text in fact.neighborhood if fact.target_true is not None] for fact in facts
        ]
    if len(locality) != len(facts):
        raise ValueError(f"locality must have an entry for each of the {len(facts)} facts, got {len(locality)}.")
    shares: dict[str, list[float]] = {}
    owners: dict[str, list[int]] = {}
    for name, kind in (("rewrite", "efficacy"), ("paraphrase", "paraphrase")):
        pairs = [(text, facts[place].target) for place, text in prompts[kind]]
        owners[name] = owners[f"base_{name}"] = [place for place, _ in prompts[kind]]
        shares[name] = token_accuracy(model, tokenizer, pairs, batch_size)
        with unedited_base(model, base) as other:
            shares[f"base_{name}"] = token_accuracy(other, tokenizer, pairs, batch_size)
    kept = [pair for asked in locality for pair in asked]
    owners["locality"] = [place for place, asked in enumerate(locality) for _ in asked]
    shares["locality"] = token_agreement(model, tokenizer, kept, base, batch_size)
    per_fact = {
        name: [100.0 * mean for mean in fact_means(each, owners[name], len(facts))] for name, each in shares.items()
    }
    found = estimates(per_fact, TOKEN_KINDS, confidence, resamples, seed)
    values: dict[str, Any] = {name: estimate.value for name, estimate in found.items()}
    return TokenScores(
        **values,
        facts=len(facts),
        intervals={name: (estimate.low, estimate.high) for name, estimate in found.items()},
        per_fact=per_fact,
    )
