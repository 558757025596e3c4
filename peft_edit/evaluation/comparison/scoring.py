"""What is measured of one model at one point of a comparison, and the row that it makes beside the unedited base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...analysis.contributions import residual_contributions
from ...facts import Fact
from ..bootstrap import Estimate, estimates
from ..downstream import downstream_scores
from ..downstream_tasks import DownstreamTask
from ..retention import perplexity, tenths
from ..scores import KINDS, EditScores, score_edits, score_pairs


# Sequences on which the parts of the residual stream are measured.
CONTRIBUTION_TEXTS = 64


@dataclass(frozen=True)
class Plan:
    """What every entrant is put through.

    Args:
        facts (`tuple[Fact, ...]`): The facts that are edited, with `target_true`; a seed sets their order.
        unedited (`tuple[tuple[str, str], ...]`): Prompts and answers that no edit is about.
        text (`str` or `tuple[str, ...]`, *optional*): Ordinary text, for the perplexity.
        tasks (`tuple[DownstreamTask, ...]`): Downstream tasks with their examples.
        shots (`int`), limit (`int`, *optional*): Of `downstream_scores`.
        batch_size (`int`): Facts per batch.
        score_every (`int`): Edits between two scoring points.
        save_steps (`int`): Batches between two checkpoints.
        threads (`int`): Threads of each process.
        folder (`Path`): The comparison's directory.
    """

    facts: tuple[Fact, ...]
    unedited: tuple[tuple[str, str], ...]
    text: str | tuple[str, ...] | None
    tasks: tuple[DownstreamTask, ...]
    shots: int
    limit: int | None
    batch_size: int
    score_every: int
    save_steps: int
    threads: int
    folder: Path

    @property
    def points(self) -> list[int]:
        """Numbers of edits after which is scored; the last is that of all facts."""
        return [*range(self.score_every, len(self.facts), self.score_every), len(self.facts)]

    @property
    def statistics_folder(self) -> Path:
        """Where the key statistics lie that all entrants share."""
        return self.folder / "statistics"


@dataclass(frozen=True)
class Measurement:
    """What a model does.

    Args:
        per_fact (`dict[str, list[float]]`): (N,) of every score of `EditScores` but `score`, in the order of the facts
            given; NaN for a fact without such prompts.
        recalled (`list[float]`): For each unedited prompt 100 where it is completed greedily with its answer, else 0.
        perplexity (`float`, *optional*): Of the text, where there is one.
        contributions (`dict`, *optional*): Shares of attention, MLP and edits in the residual stream, by layer; None
            where the architecture does not let them be told apart.
        downstream (`dict`): By task weighted F1 and accuracy, and the interval of the F1, in percent.
    """

    per_fact: dict[str, list[float]]
    recalled: list[float]
    perplexity: float | None
    contributions: dict[str, Any] | None
    downstream: dict[str, dict[str, Any]]


def measure(model: Any, tokenizer: Any, facts: Sequence[Fact], plan: Plan) -> Measurement:
    """Asks a model everything that a row holds.

    Args:
        model: The model as it stands, in eval mode.
        tokenizer: Its tokenizer.
        facts (`Sequence[Fact]`): Those edited so far, in their order.
        plan (`Plan`): What else is asked.
    """
    return Measurement(
        per_fact=score_edits(model, tokenizer, facts, resamples=1).per_fact,
        recalled=(100.0 * score_pairs(model, tokenizer, plan.unedited, 128).greedy.double()).tolist(),
        perplexity=None if plan.text is None else perplexity(model, tokenizer, plan.text),
        contributions=_contributions(model, tokenizer, plan),
        downstream=_downstream(model, tokenizer, plan),
    )


def make_row(found: Measurement, base: Measurement, places: Sequence[int]) -> dict[str, Any]:
    """A measurement as a row, JSON-ready: values with their intervals, beside those of the base on the same facts.

    Args:
        found (`Measurement`): Of the model, after the facts at `places`.
        base (`Measurement`): Of the unedited model, on all facts.
        places (`Sequence[int]`): Which facts were edited, in the order of editing.
    """
    scores = EditScores.of(found.per_fact)
    base_scores = EditScores.of({name: [values[i] for i in places] for name, values in base.per_fact.items()})
    parts = {name: list(part) for name, part in tenths(len(places)).items()}
    row = {
        "scores": _scores(scores),
        "tenths": {name: _scores(scores.subset(part), (*KINDS, "score")) for name, part in parts.items()},
        "recall": list(_recall(found)),
        "perplexity": found.perplexity,
        "contributions": found.contributions,
        "downstream": found.downstream,
        "base": {
            "scores": _scores(base_scores),
            "tenths": {name: _scores(base_scores.subset(part), (*KINDS, "score")) for name, part in parts.items()},
            "recall": list(_recall(base)),
            "perplexity": base.perplexity,
        },
        "per_fact": {kind: found.per_fact[kind] for kind in KINDS},
        "recalled": found.recalled,
    }
    return finite(row)


def measurement_to_dict(found: Measurement) -> dict[str, Any]:
    """JSON-ready; `measurement_from_dict` reads it."""
    return finite(asdict(found))


def measurement_from_dict(values: Mapping[str, Any]) -> Measurement:
    """What `measurement_to_dict` made, to the last bit."""
    per_fact = {name: known(numbers) for name, numbers in values["per_fact"].items()}
    return Measurement(**{**values, "per_fact": per_fact})


def known(numbers: Sequence[float | None]) -> list[float]:
    """Numbers of a JSON file, in which null stands for NaN."""
    return [math.nan if number is None else number for number in numbers]


def finite(value: Any) -> Any:
    """Plain containers in which None stands for every number that is not finite, as JSON has none of these."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Torch works with that many threads inside: sums come out the same in every process that does."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scores(scores: EditScores, names: Sequence[str] = ()) -> dict[str, list[float]]:
    return {name: list(scores.estimate(name)) for name in names or (*scores.per_fact, "score")}


def _recall(found: Measurement) -> Estimate:
    return estimates({"recall": found.recalled})["recall"]


def _contributions(model: Any, tokenizer: Any, plan: Plan) -> dict[str, Any] | None:
    texts = [f"{prompt} {answer}" for prompt, answer in plan.unedited[:CONTRIBUTION_TEXTS]]
    try:
        return residual_contributions(model, tokenizer, texts).to_dict()
    except ValueError as error:
        warnings.warn(f"The parts of the residual stream are left out: {error}", stacklevel=2)
        return None


def _downstream(model: Any, tokenizer: Any, plan: Plan) -> dict[str, dict[str, Any]]:
    if not plan.tasks:
        return {}
    found = downstream_scores(model, tokenizer, plan.tasks, shots=plan.shots, limit=plan.limit)
    return {
        name: {
            "f1": task.f1,
            "f1_interval": list(task.f1_interval),
            "accuracy": task.accuracy,
            "majority": task.majority,
            "count": task.count,
        }
        for name, task in found.tasks.items()
    }
