"""What goes round a run of edits: checkpoints to go on from, and a log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .checkpoints import RunState, find_checkpoint, load_checkpoint, read_state, save_checkpoint
from .memory import EditRecord
from .report import EditReport
from .stream import FactStream


if TYPE_CHECKING:
    from .editing import FactEditor


class Tracker(Protocol):
    """What takes a log: an `accelerate.Accelerator` after `init_trackers`, or one of its trackers."""

    def log(self, values: dict[str, Any], step: int) -> Any:
        """Takes one row of numbers; `step` is the number of facts edited."""


@dataclass
class Run:
    """Checkpoints and log of one call of `edit_facts`.

    Args:
        output_dir (`str`, *optional*): Where checkpoints go; none without.
        save_steps (`int`): Batches between two checkpoints.
        resume (`bool`): Go on from the newest checkpoint, if there is one.
        tracker (`Tracker`, *optional*): Where the log goes.
        probes (`int`): Facts of earlier batches that are asked again after each batch, for the log.
    """

    output_dir: str | os.PathLike | None = None
    save_steps: int = 1
    resume: bool = False
    tracker: Tracker | None = None
    probes: int = 0
    _batches: int = field(default=0, init=False)
    _saved: int = field(default=-1, init=False)
    _logs: bool = field(default=False, init=False)  # in any process: probes are asked in all of them
    _seconds: float = field(default=0.0, init=False)

    def start(self, editor: FactEditor, stream: FactStream) -> None:
        """Puts the newest checkpoint in place and passes over its facts.

        Raises:
            ValueError: if there is a checkpoint but nobody asked to resume, or it is of other facts.
        """
        self._seconds = time.perf_counter()
        editor.workers.check_same(
            repr((self.output_dir and str(self.output_dir), self.save_steps, self.resume, self.probes)),
            "output_dir, save_steps, resume_from_checkpoint or probes",
        )
        self._logs = any(editor.workers.gather(self.tracker is not None))
        checkpoint = find_checkpoint(self.output_dir) if self.output_dir is not None else None
        if checkpoint is None:
            return
        if not self.resume:
            raise ValueError(
                f"'{self.output_dir}' holds a run already ({checkpoint.name}): pass resume_from_checkpoint=True to "
                "go on with it, or another output_dir."
            )
        state = read_state(checkpoint)
        if state.batch_size != stream.batch_size:
            raise ValueError(
                f"The run in '{self.output_dir}' has batches of {state.batch_size}, not {stream.batch_size}: resume "
                "it with the same batch_size."
            )
        stream.skip(state.facts, state.digest)
        load_checkpoint(editor.tuner, editor.adapter_name, checkpoint)
        self._saved = state.facts

    def after_batch(self, editor: FactEditor, stream: FactStream, report: EditReport, count: int) -> None:
        """Logs the batch of `count` facts and writes a checkpoint when it is time to."""
        self._batches += 1
        if self._logs:
            self._log(editor, stream, report, count)
        if self._batches % self.save_steps == 0:
            self.save(editor, stream)

    def save(self, editor: FactEditor, stream: FactStream) -> None:
        """Writes a checkpoint, unless it is there already."""
        if self.output_dir is None or self._saved == stream.consumed:
            return
        config, state = editor.config, RunState(stream.consumed, stream.digest, stream.batch_size)
        deltas = {name: layer.get_delta(editor.adapter_name) for name, layer in editor.layers.items()}
        directory = self.output_dir

        def write() -> None:
            if editor.workers.is_main:
                save_checkpoint(config, deltas, directory, state)

        editor.workers.together(write)
        # From here on as a run would that was resumed here.
        config.memory = config.memory.canonical()
        self._saved = stream.consumed

    def _log(self, editor: FactEditor, stream: FactStream, report: EditReport, count: int) -> None:
        facts, now = report.facts[len(report.facts) - count :], time.perf_counter()
        values: dict[str, Any] = {
            "edit/facts_held": len(editor.config.memory),
            "edit/facts_per_second": count / max(now - self._seconds, 1e-9),
            "edit/search_steps": _mean([fact.steps for fact in facts]),
            "edit/converged": _mean([fact.converged for fact in facts]),
            "edit/recalled": _mean([fact.recalled for fact in facts]),
            **{f"edit/norm_share/{name}": share for name, share in report.norms[-1].items()},
        }
        if self.probes:
            values |= self._probe(editor)
        self._seconds = time.perf_counter()
        if self.tracker is not None and editor.workers.is_main:
            self.tracker.log(values, step=stream.consumed)

    def _probe(self, editor: FactEditor) -> dict[str, float]:
        """Recall of facts spread evenly over all that the adapter holds."""
        records: Sequence[EditRecord] = editor.config.memory.records
        chosen = [records[place * len(records) // self.probes] for place in range(min(self.probes, len(records)))]
        log_probability, greedy = editor.score(
            [editor.encoder.continuation_ids(r.filled_prompt, r.target) for r in chosen]
        )
        return {
            "probe/recalled": float(greedy.float().mean()),
            "probe/probability": float(log_probability.exp().mean()),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
