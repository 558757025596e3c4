"""What a comparison found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bootstrap import Estimate, estimate_differences, estimates
from ..scores import KINDS
from .entrants import Entrant
from .scoring import known


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Args:
        entrants (`list[Entrant]`): Who took part, in the order given.
        rows (`list[dict]`): The base at 0 edits, then every entrant, seed and scoring point; see docs/comparison.md.
        finals (`dict[str, dict[str, list[float]]]`): After the last edit, by label (and "base"), of every fact its
            values of `KINDS`, and of every unedited prompt `"recall"`; means over seeds. Not of who stopped before.
        settings (`dict`): The arguments; of facts and texts their digests.
        environment (`dict`): Versions of what was run.
        folder (`Path`): Where the files are.
    """

    entrants: list[Entrant]
    rows: list[dict[str, Any]]
    finals: dict[str, dict[str, list[float]]]
    settings: dict[str, Any]
    environment: dict[str, str]
    folder: Path

    @property
    def base(self) -> dict[str, Any]:
        """The row of the unedited model."""
        return self.rows[0]

    def rows_of(self, label: str) -> list[dict[str, Any]]:
        """An entrant's rows, by seed and edits."""
        return [row for row in self.rows if row["label"] == label]

    def final_rows(self, label: str) -> list[dict[str, Any]]:
        """An entrant's last row of each seed."""
        last = {row["seed"]: row for row in self.rows_of(label)}
        return list(last.values())

    def final_estimates(self, label: str) -> dict[str, Estimate]:
        """ES, PS, NS (by the names in `KINDS`), S (`"score"`) and `"recall"` after the last edit, over all seeds.

        Of an entrant that stopped before: those of the seed that came least far; none if it never wrote a batch.
        """
        if label in self.finals:
            values = dict(self.finals[label])
            recall = values.pop("recall")
            return estimates(values, KINDS) | estimates({"recall": recall})
        row = min(self.final_rows(label), key=lambda row: row["edits"])
        if "scores" not in row:
            return {}
        found = {name: row["scores"][name] for name in (*KINDS, "score")} | {"recall": row["recall"]}
        return {name: Estimate(*known(values)) for name, values in found.items()}

    def mean_over_edits(self, label: str, name: str) -> float | None:
        """Mean over all edits and seeds of `"seconds_per_edit"`, `"search_steps"` or `"converged"`; None without any.

        A row holds the mean since the row before it.
        """
        total, edits, before = 0.0, 0, 0
        for row in self.rows_of(label):
            before = 0 if row["edits"] <= before else before  # the next seed
            if row[name] is not None:
                total += row[name] * (row["edits"] - before)
                edits += row["edits"] - before
            before = row["edits"]
        return total / edits if edits else None

    @property
    def best(self) -> str | None:
        """Label of the entrant with the highest S after the last edit; None if none came that far."""
        scores = {
            each.label: self.final_estimates(each.label)["score"].value
            for each in self.entrants
            if each.label in self.finals
        }
        return max(scores, key=lambda label: np.nan_to_num(scores[label], nan=-1.0), default=None)

    def differences(self) -> dict[str, dict[str, Estimate]]:
        """The best entrant minus each other one (and the base), by label: `"score"` and `"recall"`, paired.

        Both are worked out on the same resampled facts (unedited prompts), so that an interval without 0 says that the
        two differ.
        """
        best = self.best
        if best is None:
            return {}
        first = self.finals[best]
        found = {}
        for label, second in self.finals.items():
            if label != best:
                one, other = ({kind: values[kind] for kind in KINDS} for values in (first, second))
                score = estimate_differences(one, other, KINDS)["score"]
                one, other = ({"recall": values["recall"]} for values in (first, second))
                found[label] = {"score": score, "recall": estimate_differences(one, other)["recall"]}
        return found
