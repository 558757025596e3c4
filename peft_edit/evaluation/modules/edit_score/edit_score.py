"""Efficacy, generalisation and specificity of edits in one number, for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peft_edit.evaluation import bootstrap, scores
from peft_edit.evaluation.modules import comparing


DESCRIPTION = """
The score S of an editing method: the harmonic mean of efficacy, paraphrase and neighborhood success
(arXiv 2202.05262, section 3.3). It is low as soon as one of the three is.
"""

INPUTS = """
Args:
    predictions (list of float): Mean log-probability per token of the new target after each prompt.
    references (list of float): That of the true target.
    kinds (list of str): Which score each prompt is for: "efficacy", "paraphrase" or "neighborhood".
    groups (list of int): Which fact each prompt belongs to. Means are taken over the prompts of a fact, then over
        facts; intervals are resampled over facts, all three scores from the same ones.
    confidence (float): Of the intervals, 0.95 by default.
    resamples (int): Number of bootstrap resamples, 1000 by default.
    seed (int): Of the resampling, 0 by default.

Returns:
    score: S in percent; NaN if there are no prompts of one kind.
    efficacy, paraphrase, neighborhood: percentages of success.
    efficacy_magnitude, paraphrase_magnitude, neighborhood_magnitude: probability of the wanted target minus that of
        the other, in percentage points.
    score_interval and so on: [low, high] of each.
    facts: number of facts.

Examples:
    >>> from peft_edit.evaluation.modules import load_module
    >>> metric = load_module("edit_score")
    >>> kinds = ["efficacy", "paraphrase", "neighborhood", "neighborhood"]
    >>> new, true = [-1.0, -1.0, -5.0, -1.0], [-3.0, -2.0, -1.0, -2.0]
    >>> metric.compute(predictions=new, references=true, kinds=kinds, groups=[0, 0, 0, 0])["score"]
    75.0
"""


class EditScore(evaluate.Metric):
    """S, and the three scores that it is made of."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=comparing.CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                    "kinds": datasets.Value("string"),
                    "groups": datasets.Value("int64"),
                }
            ),
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        kinds: Sequence[str],
        groups: Sequence[int],
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        per_fact = comparing.per_fact_values(kinds, predictions, references, groups)
        found = bootstrap.estimates(per_fact, scores.KINDS, confidence, resamples, seed)
        return comparing.with_intervals(found) | {"facts": len(per_fact["efficacy"])}
