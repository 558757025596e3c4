"""Token accuracy of edits, for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peft_edit.evaluation import bootstrap
from peft_edit.evaluation.modules import comparing


DESCRIPTION = """
Share of target tokens that are the most probable token after the prompt and the target's tokens before: the measure
used on zsRE (MEND, arXiv 2110.11309; MEMIT, arXiv 2210.07229). With the unedited model's tokens as references it
measures locality.
"""

CITATION = """\
@inproceedings{mitchell2022fast,
  title = {Fast Model Editing at Scale},
  author = {Mitchell, Eric and Lin, Charles and Bosselut, Antoine and Finn, Chelsea and Manning, Christopher D.},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}
"""

INPUTS = """
Args:
    predictions (list of list of int): For each prompt the most probable token at every position of the target.
    references (list of list of int): The target's tokens, or what the unedited model predicts there.
    groups (list of int, optional): Which fact each prompt belongs to; by default each to one of its own. Means are
        taken over the tokens of a prompt, over the prompts of a fact, then over facts.
    confidence (float): Of the interval, 0.95 by default. It is a percentile bootstrap interval over facts.
    resamples (int): Number of bootstrap resamples, 1000 by default.
    seed (int): Of the resampling, 0 by default.

Returns:
    token_accuracy: in percent.
    token_accuracy_interval: [low, high].
    facts: number of facts.

Examples:
    >>> from peft_edit.evaluation.modules import load_module
    >>> metric = load_module("token_accuracy")
    >>> metric.compute(predictions=[[5, 7], [3]], references=[[5, 8], [3]])["token_accuracy"]
    75.0
"""


class TokenAccuracy(evaluate.Metric):
    """Target tokens that are the most probable one."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        groups: Sequence[int] | None = None,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        shares = comparing.token_shares(predictions, references)
        per_fact = {"token_accuracy": comparing.means_of_facts(shares, groups)}
        found = bootstrap.estimates(per_fact, (), confidence, resamples, seed)
        return comparing.with_intervals(found) | {"facts": len(per_fact["token_accuracy"])}
