"""Specificity of edits, for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peft_edit.evaluation.modules import comparing


DESCRIPTION = """
On how many prompts about neighbouring subjects the true target is still more probable than the new one (NS and NM of
arXiv 2202.05262, section 3.3). Predictions are those of the new target here too.
"""

RETURNS = """
Returns:
    neighborhood: percentage of prompts on which the true target is the more probable one.
    neighborhood_magnitude: probability of the true target minus that of the other, in percentage points.
    neighborhood_interval, neighborhood_magnitude_interval: [low, high] of each.
    facts: number of facts.

Examples:
    >>> from peft_edit.evaluation.modules import load_module
    >>> metric = load_module("neighborhood")
    >>> metric.compute(predictions=[-1.0, -2.0], references=[-3.0, -1.5])["neighborhood"]
    50.0
"""


class Neighborhood(evaluate.Metric):
    """NS and NM: the true target against the new one on neighbouring subjects."""

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
        return comparing.comparison_results(
            "neighborhood", predictions, references, groups, confidence, resamples, seed
        )
