"""Facts as they come: a list that is checked as a whole, or a stream that is read and checked batch by batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from .facts import Fact, FactError, as_facts, checked_facts


_NO_FACTS = "Nothing was edited: there are no facts to edit."


class FactStream:
    """Batches of validated facts, and what of them has been handed out.

    A source that has a length (and a file) is validated whole before the first batch; a generator or a
    `datasets.IterableDataset` is read one batch at a time.

    Args:
        source: As for `edit_facts`.
        batch_size (`int`): Facts per batch.

    Raises:
        FactError: if a fact is malformed, or there are none; of a stream once it is read.
    """

    def __init__(self, source: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self.whole: list[Fact] | None = None
        self.consumed = 0
        self._digest = hashlib.sha256()
        if _is_stream(source):
            self._items: Iterator[Any] = iter(source)
        else:
            facts = as_facts(source)
            if not facts:
                raise FactError(_NO_FACTS)
            self.whole = facts
            self._items = iter(facts)

    @property
    def digest(self) -> str:
        """Of everything handed out so far."""
        return self._digest.hexdigest()

    @property
    def left(self) -> list[Fact] | None:
        """The facts not handed out yet, where they are known."""
        return None if self.whole is None else self.whole[self.consumed :]

    def batches(self) -> Iterator[list[Fact]]:
        """The batches that are left; none after `skip` has passed over all there are.

        Raises:
            FactError: if a fact of the next batch is malformed, or the stream is empty.
        """
        while items := list(islice(self._items, self.batch_size)):
            facts = self._next_facts(items) if self.whole is None else items
            self._count(items, facts)
            yield facts
        if not self.consumed:
            raise FactError(_NO_FACTS)

    def _next_facts(self, items: list[Any]) -> list[Fact]:
        if not self.consumed:
            return checked_facts(items)
        return checked_facts(
            items, self.consumed, f"In the facts from {self.consumed} on nothing was edited (those before were)"
        )

    def skip(self, count: int, digest: str) -> None:
        """Passes over the facts that an earlier run has written.

        Raises:
            ValueError: if they are not the facts of that run.
        """
        while self.consumed < count:
            items = list(islice(self._items, min(self.batch_size, count - self.consumed)))
            if not items:
                break
            self._count(items, checked_facts(items, self.consumed) if self.whole is None else items)
        if self.consumed != count or self.digest != digest:
            raise ValueError(
                f"The facts are not those of the run that is to be resumed: its first {count} facts were others. Give "
                "the same facts in the same order, or another output_dir."
            )

    def _count(self, items: list[Any], facts: list[Fact]) -> None:
        self.consumed += len(items)
        for fact in facts:
            self._digest.update(repr((fact.key, fact.target)).encode())


def _is_stream(source: Any) -> bool:
    if isinstance(source, (Fact, Mapping, str, os.PathLike)) or not isinstance(source, Iterable):
        return False
    return not hasattr(source, "__len__")
