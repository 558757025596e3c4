"""Facts that share a key: the same subject behind the same words, as in "X was born in" and "X works as".

The edited module sees the same input for all of them, so it can hold one value only. Written together, each with a
value of its own, they would get the average, with which hardly any is answered. So they are written one after the
other, and the target of each is searched together with those that are there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from .facts import PLACEHOLDER, Fact
from .memory import EditRecord
from .prompts import FactPrompts


MOST_COMPANIONS = 8


class Asked(Protocol):
    """A fact, or the record of one."""

    @property
    def subject(self) -> str:
        """Its subject."""

    @property
    def prompt(self) -> str:
        """Its prompt, with `{}` for the subject."""


def text_up_to_subject(fact: Asked) -> str:
    """The prompt up to the end of the subject, without outer white space: facts share a key where this is the same."""
    return (fact.prompt.strip().partition(PLACEHOLDER)[0] + fact.subject.strip()).strip()


def in_turns(facts: Sequence[Asked]) -> list[list[int]]:
    """Places of facts such that no two of a turn share a key; those of a key come in the order given."""
    turns: list[list[int]] = []
    seen: dict[str, int] = {}
    for place, fact in enumerate(facts):
        text = text_up_to_subject(fact)
        turn = seen[text] = seen.get(text, -1) + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(place)
    return turns


def held_under_same_key(facts: Sequence[Fact], held: Iterable[EditRecord]) -> list[list[Fact]]:
    """For each fact those that an adapter holds under its key, oldest first; not the one that it replaces."""
    sharing: dict[str, list[EditRecord]] = {text_up_to_subject(fact): [] for fact in facts}
    for record in held:
        sharing.get(text_up_to_subject(record), []).append(record)
    return [
        [
            Fact(record.subject, record.prompt, record.target)
            for record in sharing[text_up_to_subject(fact)]
            if record.key != fact.key
        ]
        for fact in facts
    ]


def with_companions(prompts: FactPrompts, companions: Iterable[FactPrompts]) -> FactPrompts:
    """The sequences of a fact, and behind them those of others, for one increment that has all targets said.

    Companions whose tokens up to the subject's end are others, as tokenizers may have it, are left out: theirs is
    another key. Of the rest the last `MOST_COMPANIONS`.
    """
    own = _tokens_up_to_subject(prompts)
    sharing = [each for each in companions if _tokens_up_to_subject(each) == own]
    rows = (row for each in sharing[-MOST_COMPANIONS:] for row in each.rows)
    return replace(prompts, rows=(*prompts.rows, *rows))


def found_on_top(removed: Sequence[EditRecord], left: Iterable[EditRecord]) -> list[EditRecord]:
    """Those facts that were written later than a removed one with the same key, and so keep some of it."""
    first: dict[str, int] = {}
    for record in removed:
        text = text_up_to_subject(record)
        first[text] = min(record.batch, first.get(text, record.batch))
    return [record for record in left if record.batch > first.get(text_up_to_subject(record), record.batch)]


def _tokens_up_to_subject(prompts: FactPrompts) -> tuple[int, ...]:
    bare = prompts.rows[0]
    return tuple(bare.ids[: bare.subject_index + 1])
