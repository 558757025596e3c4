"""Published editing methods as settings of the same few parts: `EditConfig.from_method("memit")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A preset.

    Args:
        summary (`str`): What it is, in a line.
        source (`str`): Where it was published.
        settings (`Mapping`): Fields of `EditConfig` that differ from their defaults.
    """

    summary: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


# Every step of the published search, for each fact by itself, and none of what the ridge solution leaves unwritten.
_ALL_STEPS = {"early_stopping": "none", "search_optimizer": "adam", "refinements": 0, "joint_search": False}

METHODS: Mapping[str, Method] = {
    "encore": Method("MPES, ridge on all facts so far, penalty on the cumulative norm", "arXiv 2502.01636"),
    "memit": Method(
        "all search steps, ridge on all facts so far", "arXiv 2210.07229", {**_ALL_STEPS, "norm_penalty": 0.0}
    ),
    "memit-forgetful": Method(
        "all search steps, ridge on the batch alone: as MEMIT was published",
        "arXiv 2210.07229",
        {**_ALL_STEPS, "norm_penalty": 0.0, "update": "forgetful"},
    ),
    "rome": Method(
        "all search steps, every fact met exactly by a matrix of rank one",
        "arXiv 2202.05262",
        {**_ALL_STEPS, "norm_penalty": 0.0, "update": "rank_one"},
    ),
    "emmet": Method(
        "all search steps, every fact of a batch met exactly",
        "arXiv 2403.14236",
        {**_ALL_STEPS, "norm_penalty": 0.0, "update": "constrained"},
    ),
    "alphaedit": Method(
        "all search steps, ridge in the null space of ordinary keys",
        "arXiv 2410.02355",
        {**_ALL_STEPS, "update": "null_space"},
    ),
    "rect": Method(
        "as memit, of each batch's change only the relatively largest entries",
        "arXiv 2401.04700",
        {**_ALL_STEPS, "norm_penalty": 0.0, "update": "sparse"},
    ),
    "prune": Method(
        "as memit, the delta's largest singular values restrained",
        "arXiv 2405.16821",
        {**_ALL_STEPS, "norm_penalty": 0.0, "update": "restrained"},
    ),
    "nas": Method(
        "as alphaedit, every searched value rescaled to its norm on the unedited model",
        "arXiv 2602.02543",
        {**_ALL_STEPS, "update": "null_space", "value_norm": "anchored"},
    ),
    "ultraedit": Method(
        "no search: value gradients normalised by statistics of all facts so far, ridge on the batch alone",
        "arXiv 2505.14679",
        {
            "update": "normalized",
            "preservation_weight": 0.0,
            "norm_penalty": 1.0,
            "refinements": 0,
            "joint_search": False,
        },
    ),
}
