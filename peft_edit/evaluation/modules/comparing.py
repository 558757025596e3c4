"""What the modules have in common: arguments, and the way from prompts to facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bootstrap import Estimate, estimates, group_means
from ..scores import KINDS, comparison


# arXiv 2202.05262
CITATION = """\
@inproceedings{meng2022locating,
  title = {Locating and Editing Factual Associations in {GPT}},
  author = {Meng, Kevin and Bau, David and Andonian, Alex and Belinkov, Yonatan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}
"""

INPUTS = """
Args:
    predictions (list of float): Mean log-probability per token of the new target after each prompt.
    references (list of float): That of the true target.
    groups (list of int, optional): Which fact each prompt belongs to; by default each to one of its own. Means are
        taken over the prompts of a fact, then over facts.
    confidence (float): Of the intervals, 0.95 by default. They are percentile bootstrap intervals over facts.
    resamples (int): Number of bootstrap resamples, 1000 by default.
    seed (int): Of the resampling, 0 by default.
"""


def comparison_results(
    kind: str,
    predictions: Sequence[float],
    references: Sequence[float],
    groups: Sequence[int] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Success and magnitude of prompts of one kind, each with its interval, and the number of facts."""
    owners = range(len(predictions)) if groups is None else groups
    per_fact = per_fact_values([kind] * len(predictions), predictions, references, owners)
    chosen = {name: per_fact[name] for name in (kind, f"{kind}_magnitude")}
    found = estimates(chosen, (), confidence, resamples, seed)
    return with_intervals(found) | {"facts": len(chosen[kind])}


def per_fact_values(
    kinds: Sequence[str], predictions: Sequence[float], references: Sequence[float], groups: Sequence[int]
) -> dict[str, list[float]]:
    """Success and magnitude of every kind for every fact, in the order of the facts' numbers.

    Args:
        kinds (`Sequence[str]`): (P,) which score each prompt is for.
        predictions, references: (P,) mean log-probability per token of the new and the true target.
        groups (`Sequence[int]`): (P,) number of the fact that each prompt belongs to.

    Returns:
        `dict[str, list[float]]`: name -> (N,) values in percent; NaN for a fact without prompts of that kind.

    Raises:
        ValueError: if the lengths differ, or a kind is unknown.
    """
    if len({len(kinds), len(predictions), len(references), len(groups)}) != 1:
        raise ValueError(
            f"There are {len(predictions)} predictions, {len(references)} references, {len(kinds)} kinds and "
            f"{len(groups)} groups: give one of each for every prompt."
        )
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"Unknown kinds of prompts {sorted(unknown)}: they are {', '.join(KINDS)}.")
    facts, owners = np.unique(np.asarray(groups), return_inverse=True)
    new, true = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        chosen = np.asarray([each == kind for each in kinds], dtype=bool)
        success, magnitude = comparison(new[chosen], true[chosen], kind)
        found[kind] = group_means(success, owners[chosen], len(facts)).tolist()
        found[f"{kind}_magnitude"] = group_means(magnitude, owners[chosen], len(facts)).tolist()
    return found


def token_shares(predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[float]:
    """Percentage of positions at which prediction and reference are the same token, for each prompt.

    Raises:
        ValueError: naming the first prompt whose two lists have different lengths or no token.
    """
    for place, (found, expected) in enumerate(zip(predictions, references)):
        if len(found) != len(expected) or not len(expected):
            raise ValueError(
                f"Prompt {place} has {len(found)} predicted tokens and {len(expected)} reference tokens: give the "
                "most probable token at every position of the target."
            )
    return [100.0 * float(np.mean(np.equal(*pair))) for pair in zip(predictions, references)]


def means_of_facts(values: Sequence[float], groups: Sequence[int] | None) -> list[float]:
    """Means over each fact's prompts, in the order of the facts' numbers; each prompt its own fact without groups."""
    owners = range(len(values)) if groups is None else groups
    if len(owners) != len(values):
        raise ValueError(f"There are {len(values)} prompts and {len(owners)} groups: give one for every prompt.")
    facts, places = np.unique(np.asarray(owners), return_inverse=True)
    return group_means(values, places, len(facts)).tolist()


def with_intervals(found: dict[str, Estimate]) -> dict[str, Any]:
    """Each value by its name, and its interval by the name with `_interval`."""
    flat: dict[str, Any] = {}
    for name, estimate in found.items():
        flat[name] = estimate.value
        flat[f"{name}_interval"] = [estimate.low, estimate.high]
    return flat
