"""Efficacy of edits, for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peft_edit.evaluation.modules import comparing


DESCRIPTION = """
On how many of the edited prompts the new target is more probable than the true one (ES and EM of
arXiv 2202.05262, section 3.3).
"""

RETURNS = """
Returns:
    efficacy: percentage of prompts on which the new target is the more probable one.
    efficacy_magnitude: probability of the new target minus that of the other, in percentage points.
    efficacy_interval, efficacy_magnitude_interval: [low, high] of each.
    facts: number of facts.

Examples:
    >>> from peft_edit.evaluation.modules import load_module
    >>> metric = load_module("efficacy")
    >>> metric.compute(predictions=[-1.0, -2.0], references=[-3.0, -1.5])["efficacy"]
    50.0
"""


class Efficacy(evaluate.Metric):
    """ES and EM: the new target against the true one on edited prompts."""

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
        return comparing.comparison_results("efficacy", predictions, references, groups, confidence, resamples, seed)
