"""Efficacy, paraphrase and neighborhood scores of edited facts, and recall of facts that were not edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..facts import PLACEHOLDER, Fact, fill
from ..hooks import evaluating
from ..prompts import PromptEncoder
from ..scoring import TargetScores, score_targets


@dataclass(frozen=True)
class EditScores:
    """Scores in percent, each the mean over facts of the mean over a fact's prompts (arXiv 2202.05262, section 3.3).

    Args:
        efficacy (`float`): ES: on the edited prompts the new target is more probable than the true one.
        paraphrase (`float`): PS: the same on other phrasings.
        neighborhood (`float`): NS: on neighbouring subjects the true target is more probable than the new one.
        score (`float`): S: harmonic mean of the three.
        efficacy_accuracy (`float`), paraphrase_accuracy (`float`), neighborhood_accuracy (`float`): the wanted answer
            is also the greedy completion, which is much stricter.
        facts (`int`): Number of facts scored.
    """

    efficacy: float
    paraphrase: float
    neighborhood: float
    score: float
    efficacy_accuracy: float
    paraphrase_accuracy: float
    neighborhood_accuracy: float
    facts: int

    def to_dict(self) -> dict[str, float]:
        """Plain mapping."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"ES {self.efficacy:.1f}  PS {self.paraphrase:.1f}  NS {self.neighborhood:.1f}  S {self.score:.1f}  "
            f"(greedy: {self.efficacy_accuracy:.1f} / {self.paraphrase_accuracy:.1f} / "
            f"{self.neighborhood_accuracy:.1f})"
        )


def score_edits(model: Any, tokenizer: Any, facts: Sequence[Fact], batch_size: int = 128) -> EditScores:
    """Scores edits by probability comparison and by greedy completion.

    Args:
        model: The edited (or base) model, a PEFT model or a plain one.
        tokenizer: Its tokenizer.
        facts (`Sequence[Fact]`): Facts with `target_true`; `paraphrases` and `neighborhood` where they have them.
        batch_size (`int`): Prompts per forward pass.

    Returns:
        `EditScores`: a score without any prompt to measure it on is NaN.

    Raises:
        ValueError: if no fact is given or one lacks `target_true`.
    """
    if not facts:
        raise ValueError("There are no facts to score.")
    for fact in facts:
        if fact.target_true is None:
            raise ValueError(
                f"The fact {fact.filled_prompt!r} has no target_true, which the comparison needs: give it."
            )
    prompts = {
        "efficacy": [[fact.filled_prompt] for fact in facts],
        "paraphrase": [
            [fill(text, fact.subject) if PLACEHOLDER in text else text for text in fact.paraphrases] for fact in facts
        ],
        "neighborhood": [list(fact.neighborhood) for fact in facts],
    }
    success: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    for kind, per_fact in prompts.items():
        wanted = [fact.target_true if kind == "neighborhood" else fact.target for fact in facts]
        other = [fact.target if kind == "neighborhood" else fact.target_true for fact in facts]
        texts = [(text, index) for index, texts in enumerate(per_fact) for text in texts]
        first = _score(model, tokenizer, [(text, wanted[index]) for text, index in texts], batch_size)
        second = _score(model, tokenizer, [(text, other[index]) for text, index in texts], batch_size)
        better = (first.log_probability > second.log_probability).float().tolist()
        groups = [index for _, index in texts]
        success[kind] = _mean_of_means(better, groups)
        accuracy[kind] = _mean_of_means(first.greedy.float().tolist(), groups)
    return EditScores(
        **success,
        score=_harmonic(list(success.values())),
        **{f"{kind}_accuracy": value for kind, value in accuracy.items()},
        facts=len(facts),
    )


def recall(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 128) -> float:
    """Percentage of (prompt, answer) texts that the model completes greedily with the answer."""
    if not pairs:
        raise ValueError("There are no prompts to recall.")
    return 100.0 * float(_score(model, tokenizer, pairs, batch_size).greedy.float().mean())


def _score(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, Any]], batch_size: int) -> TargetScores:
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)
    with evaluating(model):
        return score_targets(model, [encoder.continuation_ids(*pair) for pair in pairs], chunk=batch_size)


def _mean_of_means(values: Sequence[float], groups: Sequence[int]) -> float:
    per_group: dict[int, list[float]] = {}
    for value, group in zip(values, groups):
        per_group.setdefault(group, []).append(value)
    if not per_group:
        return float("nan")
    return 100.0 * sum(sum(group) / len(group) for group in per_group.values()) / len(per_group)


def _harmonic(values: Sequence[float]) -> float:
    if any(value == 0 for value in values):
        return 0.0
    return len(values) / sum(1.0 / value for value in values)
