"""Generalisation of edits to other phrasings, for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peft_edit.evaluation.modules import comparing


DESCRIPTION = """
On how many other phrasings of the edited prompts the new target is more probable than the true one (PS and PM of
arXiv 2202.05262, section 3.3).
"""

RETURNS = """
Returns:
    paraphrase: percentage of prompts on which the new target is the more probable one.
    paraphrase_magnitude: probability of the new target minus that of the other, in percentage points.
    paraphrase_interval, paraphrase_magnitude_interval: [low, high] of each.
    facts: number of facts.

Examples:
    >>> from peft_edit.evaluation.modules import load_module
    >>> metric = load_module("paraphrase")
    >>> metric.compute(predictions=[-1.0, -2.0], references=[-3.0, -1.5])["paraphrase"]
    50.0
"""


class Paraphrase(evaluate.Metric):
    """PS and PM: the new target against the true one on other phrasings."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=comparing.CITATION,
            inputs_description=comparing.INPUTS + RETURNS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        groups: Sequence[int] | None = None,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        return comparing.comparison_results("paraphrase", predictions, references, groups, confidence, resamples, seed)
