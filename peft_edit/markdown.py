"""Any text as Markdown that shows it as it is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any


LONGEST_CELL = 120
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#])")


def escape(text: str, longest: int = LONGEST_CELL) -> str:
    """Any text as one line of Markdown that shows it as it is, also in a table; cut where it is longer."""
    line = " ".join("".join(" " if unicodedata.category(mark) == "Cc" else mark for mark in text).split())
    line = line.encode("utf-8", "replace").decode("utf-8")
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    return _SPECIAL.sub(r"\\\1", line)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The lines of a table, whose cells are escaped, and an empty one after it."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(escape(str(cell)) for cell in row) + " |"
    yield ""
