"""Seconds by stage, added up over many turns. A stage within another counts for itself alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Called with a stage's name it is a context that measures one more turn of that stage.

    Args:
        seconds (`dict[str, float]`): By stage.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _within: float = field(default=0.0, repr=False)  # seconds of the stages within the present one, so far

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, before = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + whole - self._within
            self._within = before + whole
