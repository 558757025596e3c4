"""Where facts and texts come from: files, the bundled facts, or a dataset of the Hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..facts import Fact, FactError, as_facts, check_fact, fact_from_mapping
from ..tiny import load_tiny_facts
from .errors import CliError, explain_hub


BUNDLED = "tiny"
SEPARATOR = " | "  # of the phrasings in one cell of a CSV file
REQUIRED, OPTIONAL = ("subject", "prompt", "target"), ("target_true", "id")
LISTS = ("paraphrases", "neighborhood")
FILES = {".jsonl", ".json", ".csv", ".tsv", ".txt"}
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst", ".zip")

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Placed = tuple[str, Any]  # where a record stands, and the record


@dataclass(frozen=True)
class ReadFacts:
    """Facts that were read, and what could not be.

    Args:
        facts (`list[Fact]`): Sound facts, in order.
        places (`list[str]`): Where each of them stands.
        problems (`list[str]`): One sentence for each that is not.
    """

    facts: list[Fact]
    places: list[str]
    problems: list[str]

    def sound(self) -> list[Fact]:
        """The facts, if all of them are sound.

        Raises:
            CliError: naming the first five that are not.
        """
        if self.problems:
            more = f" And {len(self.problems) - 5} more." if len(self.problems) > 5 else ""
            raise CliError(
                f"Nothing was changed, {len(self.problems)} bad fact(s): " + " ".join(self.problems[:5]) + more
            )
        if not self.facts:
            raise CliError("Nothing was changed: there are no facts in this source.")
        return self.facts


def read_facts(
    source: str, subset: str | None = None, split: str = "train", revision: str | None = None, limit: int | None = None
) -> ReadFacts:
    """Reads facts and checks each of them, then all together.

    Args:
        source (`str`): A `.jsonl`, `.json`, `.csv` or `.tsv` file, `tiny` for the bundled facts, or a dataset (a
            directory of data files, or the id of one on the Hub).
        subset (`str`, *optional*), split (`str`), revision (`str`, *optional*): Of a dataset.
        limit (`int`, *optional*): Facts to read at most.

    Raises:
        CliError: if there is no such source, or it cannot be read at all.
    """
    if source == BUNDLED and not Path(source).exists():
        facts = load_tiny_facts()[:limit]
        return ReadFacts(facts, [f"fact {number}" for number in range(1, len(facts) + 1)], [])
    records = islice(_records(source, subset, split, revision), limit)
    facts, places, problems = [], [], []
    for place, record in records:
        try:
            if isinstance(record, FactError):
                raise record
            facts.append(check_fact(fact_from_mapping(record)))
            places.append(place)
        except FactError as error:
            problems.append(f"{place}: {error}")
    return _without_repeats(facts, places, problems)


def _without_repeats(facts: list[Fact], places: list[str], problems: list[str]) -> ReadFacts:
    """Exact repeats are left out (with a warning of `as_facts`); contradictions and shared ids are problems."""
    by_key: dict[tuple[str, str], int] = {}
    by_id: dict[str, int] = {}
    contradictions = []
    for number, fact in enumerate(facts):
        first = by_key.setdefault(fact.key, number)
        other = facts[first]
        if other.target.strip() != fact.target.strip():
            contradictions.append(
                f"{places[number]}: {fact.filled_prompt!r} cannot be both {other.target!r} ({places[first]}) and "
                f"{fact.target!r}; keep one of them."
            )
        elif first == number and (twin := by_id.setdefault(fact.fact_id, number)) != number:
            contradictions.append(
                f"{places[number]}: the id {fact.fact_id!r} is that of {places[twin]} too; ids must be unique."
            )
    problems = problems + contradictions
    if contradictions:
        return ReadFacts(facts, places, problems)
    kept = as_facts(facts)
    return ReadFacts(kept, [places[by_key[fact.key]] for fact in kept], problems)


def _records(source: str, subset: str | None, split: str, revision: str | None) -> Iterator[Placed]:
    path = Path(source)
    if path.is_file():
        return _file_records(path)
    if path.is_dir() or is_repository(source):
        rows = load_dataset(source, subset, split, revision)
        return ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    raise CliError(
        f"There is no facts file '{source}': give a .jsonl, .json or .csv file, the id of a dataset on the Hub, or "
        f"'{BUNDLED}' for the bundled facts."
    )


def is_repository(name: str) -> bool:
    """Whether this may be the id of a repository on the Hub: `owner/name`, and no data file by its ending."""
    return bool(_REPOSITORY.fullmatch(name)) and Path(name).suffix.lower() not in FILES


def _file_records(path: Path) -> Iterator[Placed]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _csv_records(path)
    if kind == ".jsonl":
        return _json_lines(path)
    if kind == ".json":
        return _json_records(path)
    raise CliError(f"'{path}' has none of the endings .jsonl, .json, .csv and .tsv: rename or convert it.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(f"'{path}' is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[Placed]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"line {number}", FactError(f"is not valid JSON ({error.msg}, column {error.colno}).")


def _json_records(path: Path) -> Iterator[Placed]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CliError(f"'{path}' is not valid JSON ({error.msg}, line {error.lineno}).") from error
    for number, record in enumerate(data if isinstance(data, list) else [data], start=1):
        yield f"fact {number}", record


def _csv_records(path: Path) -> Iterator[Placed]:
    text = _read_text(path)
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise CliError(
                f"'{path}' has no column '{missing[0]}': its first line must name the columns {', '.join(REQUIRED)} "
                f"(and may name {', '.join((*OPTIONAL, *LISTS))})."
            )
        for row in reader:
            place = f"line {reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(columns):
                yield place, FactError(f"has {len(row)} cells, the first line names {len(columns)}; quote commas.")
                continue
            yield place, _from_cells(dict(zip(columns, row)))
    except csv.Error as error:
        raise CliError(f"Line {reader.line_num} of '{path}' is not valid CSV ({error}).") from error


def _from_cells(cells: Mapping[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {name: cells[name] for name in REQUIRED}
    record |= {name: cells[name] for name in OPTIONAL if cells.get(name, "").strip()}
    for name in LISTS:
        if cells.get(name, "").strip():
            record[name] = [text.strip() for text in cells[name].split(SEPARATOR)]
    return record


def load_dataset(source: str, subset: str | None, split: str, revision: str | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a dataset, streamed.

    Raises:
        CliError: if `datasets` is not installed, or the dataset or its split is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise CliError(
            f"Reading the dataset '{source}' needs the datasets library: pip install 'peft-edit[eval]'."
        ) from error
    folder = Path(source)
    if folder.is_dir() and not _holds_data(folder, split):  # or every file below it would be looked at
        raise CliError(
            f"The directory '{source}' holds no data files ({', '.join(DATA_FILES)}), nor does a folder 'data' or "
            f"'{split}' in it: name a file, or the directory of a dataset."
        )
    try:
        return datasets.load_dataset(source, subset, split=split, streaming=True, revision=revision)
    except Exception as error:  # of many libraries, by the kind of the data files
        reason = explain_hub(error, source, revision) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CliError(f"The dataset '{source}' cannot be read: {reason}") from error


def _holds_data(folder: Path, split: str) -> bool:
    """Whether this looks like the directory of a dataset: data files where they usually are, or a dataset's card."""
    places = [place for place in (folder, folder / "data", folder / split) if place.is_dir()]
    return any(path.suffix.lower() in DATA_FILES for place in places for path in place.iterdir()) or (
        (folder / "README.md").is_file()
    )


def read_texts(
    source: str, subset: str | None = None, split: str = "train", revision: str | None = None, column: str = "text"
) -> Iterator[str]:
    """Ordinary text for key statistics.

    Args:
        source (`str`): A `.txt` file (passages set apart by blank lines), a `.jsonl` file, or a dataset.
        subset (`str`, *optional*), split (`str`), revision (`str`, *optional*): Of a dataset.
        column (`str`): Field of a record that holds the text.

    Raises:
        CliError: if there is no such source or field.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() != ".jsonl":
        return (passage for passage in re.split(r"\n\s*\n", _read_text(path)) if passage.strip())
    if path.is_file():
        return _column(_json_lines(path), column, source)
    if path.is_dir() or is_repository(source):
        rows = load_dataset(source, subset, split, revision)
        return _column(((f"row {number}", row) for number, row in enumerate(rows, start=1)), column, source)
    raise CliError(
        f"There is no text file '{source}': give a .txt file, a .jsonl file with a field '{column}', or the id of a "
        "dataset on the Hub."
    )


def _column(records: Iterable[Placed], column: str, source: str) -> Iterator[str]:
    for place, record in records:
        if isinstance(record, FactError):
            raise CliError(f"'{source}', {place}: {record}")
        if not isinstance(record, Mapping) or not isinstance(record.get(column), str):
            raise CliError(
                f"'{source}', {place}: there is no text in a field '{column}'; name the field with --column."
            )
        yield record[column]
