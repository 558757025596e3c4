"""Norm-anchored values (NAS, arXiv 2602.02543): what an edit writes is as long as it would be in the unedited model.

Values that grow with the edited weights, and weights that grow with the values, amplify each other over many batches.
NAS breaks the loop: each solved value vector, the last edited module's output with the wanted change, is rescaled to
the mean norm that value vectors have on the unedited model.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .residual import ResidualPath
from .search import SearchResult


OUTLIERS = 0.05  # share of the longest pilot values that the mean leaves out, as published


def anchor_norm(found: SearchResult) -> float:
    """Mean norm of the value vectors of pilot facts, without the longest; facts that failed do not count.

    Args:
        found (`SearchResult`): Of the pilot facts, searched on the unedited model.

    Raises:
        ValueError: if no search succeeded.
    """
    norms = (found.outputs + found.increments)[~found.failed].double().norm(dim=-1).sort().values
    if not len(norms):
        raise ValueError("The norm anchor cannot be measured: the search failed for every fact of the first batch.")
    return float(norms[: len(norms) - int(OUTLIERS * len(norms))].mean())


def anchored(found: SearchResult, anchor: float, path: ResidualPath) -> SearchResult:
    """The same result with every value vector rescaled to the anchor.

    With several edited modules the values belong to the last one; the target in the residual stream moves with them,
    and what is spread over the modules is the way to that target.

    Args:
        found (`SearchResult`): Of F facts.
        anchor (`float`): The norm.
        path (`ResidualPath`): How the module's output reaches the residual stream.
    """
    values = found.outputs + found.increments
    norms = values.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    increments = values * (anchor / norms) - found.outputs
    with torch.no_grad():
        before, after = (path.push(found.outputs, each) for each in (found.increments, increments))
    return replace(found, increments=increments, targets=found.targets + (after - before).to(found.targets))
