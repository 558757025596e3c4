"""Efficacy, paraphrase and neighborhood scores of edited facts, beside those of the unedited base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..facts import PLACEHOLDER, Fact, fill
from ..hooks import evaluating
from ..prompts import PromptEncoder
from ..scoring import TargetScores, score_targets
from ..workers import Workers
from .bootstrap import Estimate, estimate_differences, estimates, group_means


KINDS = ("efficacy", "paraphrase", "neighborhood")


def comparison(log_probability_new: Any, log_probability_true: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Success and magnitude of P prompts (arXiv 2202.05262, section 3.3).

    Args:
        log_probability_new, log_probability_true: (P,) mean log-probability per token of the new and the true target.
        kind (`str`): One of `KINDS`. The new target is wanted, on neighbouring subjects the true one.

    Returns:
        (P,) 100 where the wanted target is more probable than the other, else 0; (P,) probability of the wanted one
        minus that of the other, in percentage points. A log-probability that is NaN counts as probability 0.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    new, true = (np.asarray(values, dtype=np.float64) for values in (log_probability_new, log_probability_true))
    wanted, other = (true, new) if kind == "neighborhood" else (new, true)
    magnitude = np.nan_to_num(np.exp(wanted)) - np.nan_to_num(np.exp(other))
    return 100.0 * (wanted > other), 100.0 * magnitude


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
        efficacy_magnitude (`float`), paraphrase_magnitude (`float`), neighborhood_magnitude (`float`): by how much the
            wanted answer is more probable than the other, in percentage points, -100 to 100.
        facts (`int`): N, number of facts scored.
        intervals (`dict[str, tuple[float, float]]`): Bootstrap interval of each of the scores, by its name.
        per_fact (`dict[str, list[float]]`): (N,) values of each of the scores but `score`, by its name, in the order
            of the facts; NaN for a fact without such prompts.
        confidence (`float`), resamples (`int`), seed (`int`): How the intervals were made.
    """

    efficacy: float
    paraphrase: float
    neighborhood: float
    score: float
    efficacy_accuracy: float
    paraphrase_accuracy: float
    neighborhood_accuracy: float
    efficacy_magnitude: float
    paraphrase_magnitude: float
    neighborhood_magnitude: float
    facts: int
    intervals: dict[str, tuple[float, float]] = field(repr=False)
    per_fact: dict[str, list[float]] = field(repr=False)
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    @classmethod
    def of(
        cls, per_fact: Mapping[str, Sequence[float]], confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> EditScores:
        """Scores of facts whose own values are known; see `per_fact`."""
        found = estimates(per_fact, KINDS, confidence, resamples, seed)
        values: dict[str, Any] = {name: estimate.value for name, estimate in found.items()}
        return cls(
            **values,
            facts=len(per_fact[KINDS[0]]),
            intervals={name: (estimate.low, estimate.high) for name, estimate in found.items()},
            per_fact={name: list(each) for name, each in per_fact.items()},
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )

    def subset(self, places: Sequence[int]) -> EditScores:
        """Scores of some of the facts, by their places; nothing is run again."""
        chosen = {name: [values[place] for place in places] for name, values in self.per_fact.items()}
        return EditScores.of(chosen, self.confidence, self.resamples, self.seed)

    def estimate(self, name: str) -> Estimate:
        """A score by its name, with its interval."""
        return Estimate(getattr(self, name), *self.intervals[name])

    def minus(self, other: EditScores) -> dict[str, Estimate]:
        """Differences to the scores of another model on the same facts, with paired intervals."""
        settings = (self.confidence, self.resamples, self.seed)
        return estimate_differences(self.per_fact, other.per_fact, KINDS, *settings)

    def to_dict(self, per_fact: bool = False) -> dict[str, Any]:
        """Plain mapping; the values of every fact are in it only if asked for."""
        found = asdict(self)
        found["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        return found if per_fact else {name: value for name, value in found.items() if name != "per_fact"}

    def __str__(self) -> str:
        letters = zip(("ES", "PS", "NS", "S"), (*KINDS, "score"))
        scores = "  ".join(f"{letter} {self.estimate(name)}" for letter, name in letters)
        greedy = " / ".join(f"{getattr(self, f'{kind}_accuracy'):.1f}" for kind in KINDS)
        return f"{scores}  (greedy: {greedy})"


@dataclass(frozen=True)
class ComparedScores:
    """Scores of an edited model beside those of its unedited base. Prints as a table.

    Args:
        edited (`EditScores`): Of the edited model.
        base (`EditScores`): Of the base, on the same facts.
    """

    edited: EditScores
    base: EditScores

    def differences(self) -> dict[str, Estimate]:
        """Edited minus base, with paired intervals."""
        return self.edited.minus(self.base)

    def subset(self, places: Sequence[int]) -> ComparedScores:
        """The same for some of the facts, by their places."""
        return ComparedScores(self.edited.subset(places), self.base.subset(places))

    def to_dict(self, per_fact: bool = False) -> dict[str, Any]:
        """Plain mapping with the entries `edited`, `base` and `difference`."""
        return {
            "edited": self.edited.to_dict(per_fact),
            "base": self.base.to_dict(per_fact),
            "difference": {name: list(estimate) for name, estimate in self.differences().items()},
        }

    def __str__(self) -> str:
        differences = self.differences()
        lines = [f"{f'{self.edited.facts} facts':24}{'edited':>24}{'base':>24}{'difference':>24}"]
        for name in ("score", *self.edited.per_fact):
            cells = (self.edited.estimate(name), self.base.estimate(name), differences[name])
            lines.append(f"{name.replace('_', ', '):24}" + "".join(f"{cell!s:>24}" for cell in cells))
        return "\n".join(lines)


@contextmanager
def unedited_base(model: Any, base: Any = None) -> Iterator[Any]:
    """The unedited base of a model, for the time being.

    Args:
        model: A PEFT model, merged (`merge_adapter`) or not; its adapters are off inside, and as before afterwards.
        base (*optional*): The unedited model, if `model` does not hold it.

    Raises:
        ValueError: if `model` is no PEFT model, as after `merge_and_unload`, and no base is given.
    """
    if base is not None:
        yield base
        return
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"{type(model).__name__} has no adapter that could be turned off to see its unedited base: pass the "
            "unedited model as base=."
        )
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and layer.merged]
    merged = [(layer, list(layer.merged_adapters)) for layer in layers]
    try:
        for layer, _ in reversed(merged):  # disabled layers would unmerge too, but stay so
            layer.unmerge()
        with model.disable_adapter():
            yield model
    finally:
        for layer, names in merged:
            if not layer.merged:
                layer.merge(adapter_names=names)


def score_edits(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    batch_size: int = 128,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> EditScores:
    """Scores edits by probability comparison and by greedy completion.

    Targets are compared by their mean log-probability per token, as in the reference implementations of ROME and
    MEMIT, so that a target of more tokens has no disadvantage. In a run of several processes every process has to
    make the call; each scores a share of the prompts, and all return the same.

    Args:
        model: The edited (or base) model, a PEFT model or a plain one.
        tokenizer: Its tokenizer.
        facts (`Sequence[Fact]`): Facts with `target_true`; `paraphrases` and `neighborhood` where they have them.
        batch_size (`int`): Prompts per forward pass.
        confidence (`float`): Of the intervals, which are resampled over facts.
        resamples (`int`): Number of bootstrap resamples.
        seed (`int`): Of the resampling.

    Returns:
        `EditScores`: a score without any prompt to measure it on is NaN.

    Raises:
        ValueError: if no fact is given or one lacks `target_true`.
    """
    questions = prompts_of(facts)
    for fact in facts:
        if fact.target_true is None:
            raise ValueError(
                f"The fact {fact.filled_prompt!r} has no target_true, which the comparison needs: give it."
            )
    # A prompt that several facts ask is run once for each target.
    pairs: dict[tuple[str, Any], int] = {}
    for asked in questions.values():
        for place, text in asked:
            for target in (facts[place].target, facts[place].target_true):
                pairs.setdefault((text, target), len(pairs))
    scores = score_pairs(model, tokenizer, list(pairs), batch_size)
    success, accuracy, magnitude = {}, {}, {}
    for kind, asked in questions.items():
        owners = [place for place, _ in asked]
        new = [pairs[text, facts[place].target] for place, text in asked]
        true = [pairs[text, facts[place].target_true] for place, text in asked]
        better, margin = comparison(scores.log_probability[new], scores.log_probability[true], kind)
        greedy = 100.0 * scores.greedy[true if kind == "neighborhood" else new].double()
        success[kind] = fact_means(better, owners, len(facts))
        accuracy[f"{kind}_accuracy"] = fact_means(greedy, owners, len(facts))
        magnitude[f"{kind}_magnitude"] = fact_means(margin, owners, len(facts))
    return EditScores.of(success | accuracy | magnitude, confidence, resamples, seed)


def compare_with_base(
    model: Any, tokenizer: Any, facts: Sequence[Fact], base: Any = None, **settings: Any
) -> ComparedScores:
    """Scores of the edited model beside those of its unedited base.

    Args:
        model, tokenizer, facts: As for `score_edits`.
        base (*optional*): The unedited model; by default the model with its adapters turned off.
        settings: `batch_size`, `confidence`, `resamples`, `seed` of `score_edits`.

    Raises:
        ValueError: if the model has no adapters and no base is given; see also `score_edits`.
    """
    with unedited_base(model, base) as other:
        reference = score_edits(other, tokenizer, facts, **settings)
    return ComparedScores(score_edits(model, tokenizer, facts, **settings), reference)


def recall(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 128) -> float:
    """Percentage of (prompt, answer) texts that the model completes greedily with the answer."""
    if not pairs:
        raise ValueError("There are no prompts to recall.")
    return 100.0 * float(score_pairs(model, tokenizer, pairs, batch_size).greedy.double().mean())


def prompts_of(facts: Sequence[Fact]) -> dict[str, list[tuple[int, str]]]:
    """The prompts of each of `KINDS`, with the place of the fact they belong to.

    Raises:
        ValueError: if no fact is given.
    """
    if not facts:
        raise ValueError("There are no facts to score.")
    texts: dict[str, list[Sequence[str]]] = {
        "efficacy": [[fact.filled_prompt] for fact in facts],
        "paraphrase": [
            [fill(text, fact.subject) if PLACEHOLDER in text else text for text in fact.paraphrases] for fact in facts
        ],
        "neighborhood": [fact.neighborhood for fact in facts],
    }
    return {kind: [(place, text) for place, own in enumerate(each) for text in own] for kind, each in texts.items()}


def fact_means(values: Any, owners: Sequence[int], count: int) -> list[float]:
    """Mean over each fact's prompts, from the values of all prompts and the places of their facts."""
    return group_means(values, owners, count).tolist()


def score_pairs(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, Any]], batch_size: int) -> TargetScores:
    """Scores of P (prompt, target) texts; each process works out a share, and all return the same."""
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)

    def score(own: list[tuple[str, Any]]) -> Sequence[torch.Tensor]:
        found = score_targets(model, [encoder.continuation_ids(*pair) for pair in own], chunk=batch_size)
        return found.log_probability, found.greedy, found.token_accuracy

    if not pairs:
        return TargetScores(*score([]))
    return TargetScores(*split_over_processes(model, pairs, score))


def split_over_processes(
    model: Any, things: Sequence[Any], work: Callable[[list[Any]], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Tensors with a row for each of the things, of which each process works out its share, in eval mode.

    Args:
        model: The model that `work` runs.
        things (`Sequence`): At least one, the same in every process.
        work: From things to tensors with a row for each.

    Returns:
        `list[torch.Tensor]`: the same in every process.

    Raises:
        ValueError: in every process, if they were given different things.
    """
    workers = Workers.of(model)
    if workers.size > 1:
        workers.check_same(hashlib.sha256(repr(things).encode("utf-8", "surrogatepass")).hexdigest(), "prompts")
    with evaluating(model):
        return workers.rows(len(things), lambda own: work([things[place] for place in own]))
