"""What a command has to say: one JSON document, or text and tables; and notes on the way, on stderr."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union


_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?(%| [a-zA-Z]+)?|-|")


@dataclass(frozen=True)
class Table:
    """Rows of text under a head. Columns of numbers, with or without a unit, are set to the right.

    Args:
        head (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[str]]`): Cells.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        numeric = self.numeric()
        texts = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])

    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [
            bool(self.rows) and all(_NUMBER.fullmatch(row[column]) for row in self.rows)
            for column in range(len(self.head))
        ]


Block = Union[str, Table]


@dataclass(frozen=True)
class Result:
    """What a command returns.

    Args:
        document (`Mapping`): For `--json`.
        blocks (`Sequence[Block]`): The same for people, set apart by blank lines.
        exit_code (`int`): 0, unless the document is that of a failure.
    """

    document: Mapping[str, Any]
    blocks: Sequence[Block] = field(default_factory=list)
    exit_code: int = 0


class Output:
    """Where a command writes.

    Args:
        as_json (`bool`): One JSON document on stdout.
        quiet (`bool`): No notes, no progress.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    @property
    def progress(self) -> bool:
        """Whether to show progress bars: to somebody who sees them move."""
        return not self.quiet and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """A word on the way, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def error(self, text: str, code: int) -> None:
        """The one sentence of a failure on stderr; with `--json` also as a document."""
        print(f"peft-edit: {text}", file=sys.stderr, flush=True)
        if self.as_json:
            print(to_json({"error": text, "exit_code": code}))

    def show(self, result: Result) -> None:
        """The result on stdout."""
        if self.as_json:
            print(to_json(result.document))
            return
        for number, block in enumerate(result.blocks):
            if number:
                print()
            self._print(block)

    def _print(self, block: Block) -> None:
        console = _console() if isinstance(block, Table) else None
        if console is None or isinstance(block, str):
            print(block)
            return
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, header_style="bold", pad_edge=False)
        for name, right in zip(block.head, block.numeric()):
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in block.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)


def _console() -> Any:
    """A rich console if rich is there and somebody looks; else None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def to_json(document: Any) -> str:
    """JSON text; what JSON has no number for (NaN, infinity) becomes null."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_plain(entry) for entry in entries]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def shorten(text: str, width: int) -> str:
    """Text in one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def size(bytes_: float) -> str:
    """Bytes for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if bytes_ < 1024:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
