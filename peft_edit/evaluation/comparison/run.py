"""One entrant's way through a comparison: edits, scores at the points asked for, and files to go on from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...checkpoints import find_checkpoint
from ...facts import Fact
from ...files import replace_file
from ...statistics import KeyStatistics
from ..scores import KINDS
from .entrants import BASELINES, Entrant
from .scoring import Measurement, Plan, finite, limited_threads, make_row, measure


Load = Callable[[], tuple[Any, Any]]

ROWS, BATCHES, CHECKPOINTS, WEIGHTS = "rows.jsonl", "batches.jsonl", "checkpoints", "weights.safetensors"


@dataclass(frozen=True)
class Batch:
    """What editing one batch took.

    Args:
        edits (`int`): Facts edited up to its end.
        facts (`int`): Its own.
        seconds (`float`): Wall-clock time of its edit, without scores and checkpoints.
        search_steps (`float`): Mean steps of the target search; of a baseline, optimiser steps of the batch.
        converged (`float`, *optional*): Share of facts whose search ended with the target as most probable in every
            context; None where there is no search.
        norms (`dict[str, float]`): ||Δ||_F / ||W0||_F of each edited module at its end.
    """

    edits: int
    facts: int
    seconds: float
    search_steps: float
    converged: float | None
    norms: dict[str, float]


AfterBatch = Callable[[Batch], None]


class EntrantStopped(Exception):
    """A batch cannot be edited, and so none after it."""


class RunFiles:
    """Rows and batches of one run on disk. A file is replaced as a whole, so that a kill leaves the old or the new.

    Args:
        plan (`Plan`): The comparison.
        entrant (`Entrant`): Who runs.
        seed (`int`): Of the order and the adapter.
    """

    def __init__(self, plan: Plan, entrant: Entrant, seed: int) -> None:
        self.plan, self.entrant, self.seed = plan, entrant, seed
        self.folder = plan.folder / "runs" / f"{entrant.folder_name}-seed{seed}"
        self.checkpoints = self.folder / CHECKPOINTS
        self.rows = {row["edits"]: row for row in read_lines(self.folder / ROWS)}
        self.batches = {each["edits"]: Batch(**each) for each in read_lines(self.folder / BATCHES)}

    @property
    def finished(self) -> bool:
        """Whether every point has its row, or the run has stopped before."""
        return any(row["stopped"] for row in self.rows.values()) or all(p in self.rows for p in self.plan.points)

    def discard_gaps(self, saved: int) -> None:
        """Removes checkpoints of which a row or batch is missing, so that the run begins at the beginning.

        Args:
            saved (`int`): Edits in the newest checkpoint.
        """
        size = self.plan.batch_size
        ends = {min(end, saved) for end in range(size, saved + size, size)}
        missing = [point for point in self.plan.points if point <= saved and point not in self.rows]
        if saved and (missing or not ends <= set(self.batches)):
            shutil.rmtree(self.checkpoints)

    def add_batch(self, batch: Batch) -> None:
        """Keeps what a batch took; one that is edited again after a kill replaces the old."""
        self.batches[batch.edits] = batch
        write_lines(self.folder / BATCHES, [asdict(self.batches[edits]) for edits in sorted(self.batches)])

    def add_row(self, edits: int, values: dict[str, Any], stopped: str | None = None) -> dict[str, Any]:
        """Keeps a row, with what the batches since the row before took."""
        before = max((point for point in self.rows if point < edits), default=0)
        since = [batch for batch in self.batches.values() if before < batch.edits <= edits]
        row = {
            "label": self.entrant.label,
            "method": self.entrant.method,
            "regularisers": sorted(self.entrant.traits),
            "seed": self.seed,
            "edits": edits,
            "seconds_per_edit": _per_fact(since, "seconds"),
            "search_steps": _mean(since, "search_steps"),
            "converged": _mean(since, "converged"),
            "norms": self.batches[edits].norms if edits in self.batches else {},
            **values,
            "stopped": stopped,
        }
        self.rows[edits] = finite(row)
        write_lines(self.folder / ROWS, [self.rows[point] for point in sorted(self.rows)])
        return self.rows[edits]


class AdapterEditing:
    """An edit adapter that goes through facts with `edit_facts`, its checkpoints and its log.

    Args:
        base: The unedited model, which gets the adapter.
        tokenizer: Its tokenizer.
        entrant (`Entrant`), seed (`int`), plan (`Plan`): Who, and what.
        folder (`Path`): Where checkpoints go.
    """

    def __init__(self, base: Any, tokenizer: Any, entrant: Entrant, seed: int, plan: Plan, folder: Path) -> None:
        self.model = get_peft_model(base, entrant.config(seed)).eval()
        self.tokenizer, self.plan, self.folder = tokenizer, plan, folder

    @property
    def saved(self) -> int:
        """Edits in the newest checkpoint."""
        found = find_checkpoint(self.folder)
        return 0 if found is None else int(found.name.rsplit("-", 1)[1])

    def run(self, facts: Sequence[Fact], after_batch: AfterBatch) -> None:
        """Edits what is left of the facts, calling `after_batch` before each checkpoint.

        Raises:
            EntrantStopped: if a batch cannot be edited.
        """
        stream = _TimedFacts(facts, self.plan.batch_size, self.saved)
        try:
            self.model.edit_facts(
                iter(stream),
                self.tokenizer,
                batch_size=self.plan.batch_size,
                statistics=KeyStatistics.load(self.plan.statistics_folder),
                progress=False,
                output_dir=self.folder,
                save_steps=self.plan.save_steps,
                resume_from_checkpoint=True,
                tracker=_AfterBatch(stream, after_batch),
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            if not stream.editing:  # the settings are wrong, not the method's numbers
                raise
            raise EntrantStopped(str(error)) from error


@dataclass
class _TimedFacts:
    """Facts one by one; knows when the first of a batch was asked for, which is when its edit begins."""

    facts: Sequence[Fact]
    batch_size: int
    saved: int  # passed over, as a checkpoint holds them
    started: float = 0.0
    editing: bool = field(default=False)

    def __iter__(self) -> Iterator[Fact]:
        for place, fact in enumerate(self.facts):
            if place >= self.saved and place % self.batch_size == 0:
                self.started, self.editing = time.perf_counter(), True
            yield fact


@dataclass
class _AfterBatch:
    """A tracker that hands on what `edit_facts` logs after each batch."""

    stream: _TimedFacts
    after_batch: AfterBatch

    def log(self, values: dict[str, Any], step: int) -> None:
        """Takes the log of the batch that ends with fact `step`."""
        seconds = time.perf_counter() - self.stream.started
        self.stream.editing = False
        prefix = "edit/norm_share/"
        self.after_batch(
            Batch(
                edits=step,
                facts=(step - 1) % self.stream.batch_size + 1,
                seconds=seconds,
                search_steps=values["edit/search_steps"],
                converged=values["edit/converged"],
                norms={name[len(prefix) :]: share for name, share in values.items() if name.startswith(prefix)},
            )
        )


class BaselineEditing:
    """A baseline that trains on facts; its checkpoint is the trained weights, as every batch begins afresh from them.

    Args: as for `AdapterEditing`.
    """

    def __init__(self, base: Any, tokenizer: Any, entrant: Entrant, seed: int, plan: Plan, folder: Path) -> None:
        settings: dict[str, Any] = dict(entrant.settings)
        if entrant.method == "lora":
            settings.setdefault("seed", seed)
        self.baseline = BASELINES[entrant.method](base, tokenizer, **settings)
        self.model = self.baseline.model
        self.plan, self.folder = plan, folder

    @property
    def saved(self) -> int:
        """Edits in the checkpoint."""
        if not (self.folder / WEIGHTS).is_file():
            return 0
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return int(file.metadata()["edits"])

    def run(self, facts: Sequence[Fact], after_batch: AfterBatch) -> None:
        """As `AdapterEditing.run`."""
        start = self.saved
        if start:
            weights = load_file(self.folder / WEIGHTS)
            with torch.no_grad():
                for place, weight in enumerate(self.baseline.trained()):
                    weight.copy_(weights[str(place)])
        for first in range(start, len(facts), self.plan.batch_size):
            own = facts[first : first + self.plan.batch_size]
            try:
                report = self.baseline.edit_facts(own, batch_size=len(own))
            except ValueError as error:
                raise EntrantStopped(str(error)) from error
            edits = first + len(own)
            after_batch(Batch(edits, len(own), report.seconds, report.steps[-1], None, report.norms[-1]))
            if edits % (self.plan.batch_size * self.plan.save_steps) == 0 or edits == len(facts):
                self._save(edits)

    def _save(self, edits: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trained = self.baseline.trained()
        weights = {str(place): weight.detach().cpu().contiguous() for place, weight in enumerate(trained)}
        metadata = {"edits": str(edits), "format": "pt"}
        replace_file(self.folder / WEIGHTS, lambda path: save_file(weights, path, metadata=metadata))


def run_entrant(load: Load, entrant: Entrant, seed: int, plan: Plan, base: Measurement, progress: bool) -> None:
    """Edits and scores one entrant, from where its files say that it stopped.

    Args:
        load: Gives the unedited model, in eval mode, and its tokenizer; called once, and its model is changed.
        entrant (`Entrant`): Who.
        seed (`int`): Of the order of the facts and the adapter.
        plan (`Plan`): What.
        base (`Measurement`): Of the unedited model, on all facts.
        progress (`bool`): Print a line after each scoring point.
    """
    files = RunFiles(plan, entrant, seed)
    if files.finished:
        return
    places = editing_order(len(plan.facts), seed)
    facts = [plan.facts[place] for place in places]
    with limited_threads(plan.threads):
        model, tokenizer = load()
        kind = BaselineEditing if entrant.is_baseline else AdapterEditing
        editing = kind(model, tokenizer, entrant, seed, plan, files.checkpoints)
        files.discard_gaps(editing.saved)

        edits = editing.saved

        def score(stopped: str | None = None) -> None:
            values = {}
            if edits:
                found = measure(editing.model, tokenizer, facts[:edits], plan)
                values = make_row(found, base, places[:edits])
            row = files.add_row(edits, values, stopped)
            if progress:
                print(progress_line(row), flush=True)

        def after_batch(batch: Batch) -> None:
            nonlocal edits
            files.add_batch(batch)
            edits = batch.edits
            if edits in plan.points and edits not in files.rows:
                score()

        try:
            editing.run(facts, after_batch)
        except EntrantStopped as stop:
            score(str(stop))


def editing_order(count: int, seed: int) -> list[int]:
    """Places of the facts in the order in which a seed has them edited."""
    places = list(range(count))
    Random(seed).shuffle(places)
    return places


def progress_line(row: dict[str, Any]) -> str:
    """A row in a line."""
    named: dict[str, float | None] = {}
    if "scores" in row:
        named |= {letter: row["scores"][name][0] for letter, name in zip(("ES", "PS", "NS", "S"), (*KINDS, "score"))}
        named |= {"recall": row["recall"][0], "perplexity": row["perplexity"]}
    numbers = "  ".join(f"{name} {value:.1f}" for name, value in named.items() if value is not None)
    stopped = f"  stopped: {row['stopped']}" if row["stopped"] else ""
    return f"{row['label']}, seed {row['seed']}, {row['edits']} edits  {numbers}{stopped}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none if it is not there.

    Raises:
        ValueError: naming the file and the line that is damaged.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of '{path}' is no JSON ({error.msg}): remove the folder '{path.parent}', and the run "
                "begins at its beginning."
            ) from None
    return found


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Replaces a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))


def _mean(batches: Sequence[Batch], name: str) -> float | None:
    """Mean over facts of a value of batches; None if there is none."""
    known = [(getattr(batch, name), batch.facts) for batch in batches if getattr(batch, name) is not None]
    total = sum(facts for _, facts in known)
    return sum(value * facts for value, facts in known) / total if total else None


def _per_fact(batches: Sequence[Batch], name: str) -> float | None:
    total = sum(batch.facts for batch in batches)
    return sum(getattr(batch, name) for batch in batches) / total if total else None
