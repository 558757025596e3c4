"""The editing data sets as cases: from the Hub at a pinned revision, or from local files in the published forms."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Union

from .cases import (
    Case,
    CaseError,
    UnusableRecord,
    counterfact_cases,
    knowedit_cases,
    mend_cases,
    mquake_cases,
    plain_cases,
    ripple_cases,
)


Cases = Union[list[Case], Iterator[Case]]
Source = Union[str, os.PathLike, None]

BUNDLED = "bundled"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class DatasetSpec:
    """Where a published data set is, and how its records are read.

    Args:
        read (`Callable`): A record to its cases.
        repo (`str`, *optional*): Hub id.
        revision (`str`): The pinned commit, or a branch where no commit is pinned; "" where there are no revisions.
        splits (`tuple[str, ...]`): Read one after the other by default.
        files (`Mapping[str, str]`): Split to a JSON file: a path within `repo`, or a URL (with `{revision}` if it has
            revisions). Empty for a table that `datasets.load_dataset` reads.
    """

    read: Callable[[Any], list[Case]]
    repo: str | None = None
    revision: str = "main"
    splits: tuple[str, ...] = ("test",)
    files: Mapping[str, str] = field(default_factory=dict)


_ROME_URL = "https://rome.baulab.info/data/dsets/"
_MQUAKE_URL = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/{revision}/datasets/"
# The files are kept in Git LFS, which is served from another host than plain files.
_RIPPLE_URL = "https://media.githubusercontent.com/media/edenbiran/RippleEdits/{revision}/data/benchmark/"
_MEND_FILES = {"test": f"{_ROME_URL}zsre_mend_eval.json", "train": f"{_ROME_URL}zsre_mend_train.json"}
_KNOWEDIT = partial(
    DatasetSpec, knowedit_cases, repo="zjunlp/KnowEdit", revision="6d218881e60c7c8be836bd2befd598eb3b318be4"
)
_REMASTERED = partial(DatasetSpec, mquake_cases, repo="henryzhongsc/MQuAKE-Remastered")

DATASETS: dict[str, DatasetSpec] = {
    "counterfact": DatasetSpec(
        counterfact_cases, "azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9", ("train", "test")
    ),
    "counterfact_tracing": DatasetSpec(
        counterfact_cases, "NeelNanda/counterfact-tracing", "c945b082ca08d0a8f3ba227fb78404a09614c36e", ("train",)
    ),
    "multi_counterfact": DatasetSpec(
        counterfact_cases, revision="", files={"test": f"{_ROME_URL}multi_counterfact.json"}
    ),
    "zsre": _KNOWEDIT(files={"test": "benchmark/ZsRE/ZsRE-test-all.json"}),
    "zsre_mend": DatasetSpec(mend_cases, revision="", files=_MEND_FILES),
    "zsre_mend_answer": DatasetSpec(partial(mend_cases, target="answer"), revision="", files=_MEND_FILES),
    **{
        f"mquake_{variant.lower().replace('-', '_')}": DatasetSpec(
            mquake_cases, files={"test": f"{_MQUAKE_URL}MQuAKE-{variant}.json"}
        )
        for variant in ("CF", "CF-3k", "CF-3k-v2", "T")
    },
    **{
        f"mquake_remastered_{variant}": _REMASTERED(splits=(split,))
        for variant, split in (("cf_3k", "CF3k"), ("cf_9k", "CF9k"), ("cf_6334", "CF6334"), ("t", "T"))
    },
    **{
        f"ripple_edits_{subset}": DatasetSpec(
            ripple_cases,
            revision="21182d13b6ddaa50f023052d13ff59e279deec05",
            files={"test": f"{_RIPPLE_URL}{subset}.json"},
        )
        for subset in ("popular", "random", "recent")
    },
    "knowedit_wiki_recent": _KNOWEDIT(
        files={split: f"benchmark/wiki_recent/recent_{split}.json" for split in ("test", "train")}
    ),
    "knowedit_wiki_counterfact": _KNOWEDIT(
        files={split: f"benchmark/wiki_counterfact/{split}_cf.json" for split in ("test", "train")}
    ),
}
"""Every data set that `load_cases` knows by name, besides "bundled"."""


def load_cases(
    name_or_path: Source,
    *,
    source: Source = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> Cases:
    """Loads a data set by name, or the records of a file or a Hub data set in any of the published forms.

    Records whose prompt does not name their subject cannot be edited; they are left out, with one warning that gives
    their indices.

    Args:
        name_or_path: A name of `DATASETS`; "bundled" (the facts of the bundled tiny model, without network); the path
            of a `.jsonl` or `.json` file; or a Hub id.
        source: For a name: where to read instead of the published place. A `.jsonl` or `.json` file, a directory with
            the published files, or another Hub id.
        split (`str`, *optional*): Only this split.
        revision (`str`, *optional*): A commit, tag or branch other than the pinned one.
        streaming (`bool`): Gives a lazy iterator; files are read record by record.
        limit (`int`, *optional*): Read at most that many records. A record of MQuAKE gives several cases.

    Returns:
        `list[Case]`, or an iterator of `Case` if streaming.

    Raises:
        CaseError: for an unknown name or split, and for a record that has not the form (with its index and field).
        ConnectionError: if the data cannot be reached.
        ImportError: if `datasets` is needed and not installed.
    """
    name = os.fspath(name_or_path) if name_or_path is not None else ""
    if name == BUNDLED:
        cases: Iterator[Case] = islice(_bundled(), limit)
    elif name in DATASETS:
        spec = DATASETS[name]
        cases = _cases(spec.read, _records(name, spec, source, split, revision, streaming), limit)
    elif Path(name).is_file() or Path(name).suffix in (".json", ".jsonl"):
        cases = _cases(cases_from_record, [(name, _file_records(Path(name)))], limit)
    elif _is_hub_id(name):
        cases = _cases(cases_from_record, [(name, _table(name, split or "train", revision, streaming))], limit)
    else:
        known = ", ".join([BUNDLED, *DATASETS])
        raise CaseError(f"There is no data set {name!r}; give a .json or .jsonl file, a Hub id, or one of {known}.")
    return cases if streaming else list(cases)


def load_counterfact(source: Source = None, **options: Any) -> Cases:
    """CounterFact (21,919 facts), nested or flat; options as for `load_cases`."""
    return load_cases("counterfact", source=source, **options)


def load_multi_counterfact(source: Source = None, **options: Any) -> Cases:
    """CounterFact as MEMIT uses it (20,877 facts that do not contradict each other); options as for `load_cases`."""
    return load_cases("multi_counterfact", source=source, **options)


def load_zsre(source: Source = None, form: str = "easyedit", **options: Any) -> Cases:
    """zsRE; `form` is "easyedit" (with locality and portability), "mend" (writes the alternative answer) or
    "mend_answer" (writes the true answer, as ROME and MEMIT do); options as for `load_cases`."""
    return load_cases(_choice("form", form, {"easyedit": "zsre", **_named("zsre_")}), source=source, **options)


def load_mquake(source: Source = None, variant: str = "cf_3k_v2", **options: Any) -> Cases:
    """MQuAKE; `variant` is "cf", "cf_3k", "cf_3k_v2", "t" or "remastered_" with "cf_3k", "cf_9k", "cf_6334", "t"."""
    return load_cases(_choice("variant", variant, _named("mquake_")), source=source, **options)


def load_ripple_edits(source: Source = None, subset: str = "popular", **options: Any) -> Cases:
    """RippleEdits; `subset` is "popular", "random" or "recent"; options as for `load_cases`."""
    return load_cases(_choice("subset", subset, _named("ripple_edits_")), source=source, **options)


def load_knowedit(source: Source = None, subset: str = "wiki_recent", **options: Any) -> Cases:
    """KnowEdit; `subset` is "wiki_recent" or "wiki_counterfact"; options as for `load_cases`."""
    return load_cases(_choice("subset", subset, _named("knowedit_")), source=source, **options)


def load_jsonl(path: str | os.PathLike, *, streaming: bool = False, limit: int | None = None) -> Cases:
    """A JSON Lines (or JSON) file whose records have any of the published forms, or that of `case_to_dict`."""
    cases = _cases(cases_from_record, [(os.fspath(path), _file_records(Path(path)))], limit)
    return cases if streaming else list(cases)


def cases_from_record(record: Mapping[str, Any]) -> list[Case]:
    """Recognises the form of a record by its fields and reads it; several cases (MQuAKE) share a group.

    Raises:
        CaseError: naming the field that is missing or of the wrong type.
        UnusableRecord: if the prompt does not name the subject.
    """
    if isinstance(record.get("requested_rewrite"), list):
        return mquake_cases(record)
    if "requested_rewrite" in record or "target_false" in record or "locality_prompt" in record:
        return counterfact_cases(record)
    if "edit" in record:
        return ripple_cases(record)
    if "src" in record:
        return mend_cases(record)
    if "portability" in record or "locality" in record:
        return knowedit_cases(record)
    return plain_cases(record)


def _bundled() -> Iterator[Case]:
    from ..tiny import load_tiny_facts

    return (Case(fact) for fact in load_tiny_facts())


def _named(prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in DATASETS if name.startswith(prefix)}


def _choice(argument: str, value: str, choices: Mapping[str, str]) -> str:
    if value not in choices:
        raise CaseError(f"{argument} must be one of {', '.join(choices)}, got {value!r}.")
    return choices[value]


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def _cases(
    read: Callable[[Any], list[Case]], parts: list[tuple[str, Iterator[Any]]], limit: int | None
) -> Iterator[Case]:
    """Reads records one by one; errors get the place and the index, unusable records are counted."""
    unusable: list[str] = []
    indexed = ((place, index, record) for place, records in parts for index, record in enumerate(records))
    try:
        for place, index, record in islice(indexed, limit):
            try:
                if not isinstance(record, Mapping):
                    raise CaseError(f"a record must be a mapping, got {type(record).__name__}.")
                yield from read(record)
            except CaseError as error:
                raise CaseError(f"Record {index} of {place}: {error}") from None
            except UnusableRecord as error:
                unusable.append(f"{index} of {place} ({error})")
    finally:
        if unusable:
            more = f" and {len(unusable) - 5} more" if len(unusable) > 5 else ""
            warnings.warn(
                f"{len(unusable)} record(s) cannot be edited and are left out: {'; '.join(unusable[:5])}{more}.",
                stacklevel=2,
            )


def _records(
    name: str, spec: DatasetSpec, source: Source, split: str | None, revision: str | None, streaming: bool
) -> list[tuple[str, Iterator[Any]]]:
    """Places and their records, split by split. Where to read is decided, and checked, before the first record."""
    splits = spec.splits if split is None else (split,)
    path = None if source is None else Path(source)
    if path is not None and (path.is_file() or path.suffix in (".json", ".jsonl")):
        return [(os.fspath(path), _file_records(path))]
    if path is not None and path.is_dir():
        return [(os.fspath(path), _directory_records(path, spec, wanted, streaming)) for wanted in splits]
    if path is not None and not _is_hub_id(os.fspath(path)):
        raise CaseError(f"There is no file or directory '{path}'; give one, or a Hub id.")
    if path is not None:
        return [(str(source), _table(str(source), wanted, revision, streaming, name)) for wanted in splits]
    pinned = revision or spec.revision
    if not spec.files:
        return [(name, _table(str(spec.repo), wanted, pinned, streaming, name)) for wanted in splits]
    files = [_choice("split", wanted, spec.files) for wanted in splits]
    return [(name, _file_records(_download(name, spec, file, pinned))) for file in files]


def _directory_records(path: Path, spec: DatasetSpec, split: str, streaming: bool) -> Iterator[Any]:
    if not spec.files:
        return _table(os.fspath(path), split, None, streaming)
    file = Path(_choice("split", split, spec.files))
    for candidate in (path / file, path / file.name):
        if candidate.is_file():
            return _file_records(candidate)
    raise CaseError(f"The directory '{path}' holds no file '{file.name}'; give the path of a file.")


def _table(
    repo: str, split: str, revision: str | None, streaming: bool, name: str | None = None
) -> Iterator[Mapping[str, Any]]:
    """Rows that `datasets.load_dataset` finds at a Hub id or in a directory."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Data sets of the Hub need the package datasets: pip install 'peft-edit[eval]'.") from error
    try:
        rows = load_dataset(repo, split=split, revision=revision, streaming=streaming)
    except OSError as error:
        raise _unreachable(repo, name, error) from error
    return _guarded(iter(rows), repo, name)


def _guarded(rows: Iterator[Any], repo: str, name: str | None) -> Iterator[Any]:
    try:
        yield from rows
    except OSError as error:
        raise _unreachable(repo, name, error) from error


def _download(name: str, spec: DatasetSpec, file: str, revision: str) -> Path:
    """A local copy of a JSON file. Its columns mix types, which tables of `datasets` cannot hold."""
    try:
        if "://" not in file:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(str(spec.repo), file, repo_type="dataset", revision=revision))
        from datasets import DownloadManager

        return Path(DownloadManager().download(file.format(revision=revision)))
    except ImportError as error:
        raise ImportError(f"Downloading {name} needs the package datasets: pip install 'peft-edit[eval]'.") from error
    except OSError as error:
        raise _unreachable(spec.repo or file.format(revision=revision), name, error) from error


def _unreachable(place: str, name: str | None, error: OSError) -> ConnectionError:
    call = f"load_cases({name or place!r}, source='...')" if name else "load_cases('...')"
    return ConnectionError(
        f"'{place}' could not be reached ({type(error).__name__}): give the path of a local copy, {call}."
    )


def _file_records(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CaseError(f"There is no file '{path}'; give the path of a .jsonl or .json file.")
    return _json_lines(path) if path.suffix == ".jsonl" else _json_values(path)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise CaseError(f"Line {number} of '{path}' is not valid JSON ({error.msg}).") from error


def _json_values(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, or JSON values one after the other, without reading the whole file."""
    decoder = json.JSONDecoder()
    size = _CHUNK
    with path.open(encoding="utf-8") as file:
        text = file.read(size).lstrip("\ufeff \t\r\n")
        in_array = text.startswith("[")
        text = text[1:] if in_array else text
        count = 0
        while True:
            text = text.lstrip(" \t\r\n,")
            if in_array and text.startswith("]"):
                return
            try:
                value, end = decoder.raw_decode(text)
                complete = end < len(text)  # a number at the end of the text may go on
            except json.JSONDecodeError as error:
                complete, problem = False, error.msg
            else:
                problem = ""
            if not complete:
                more = file.read(size)
                size *= 2  # a long value is not decoded again and again
                if more:
                    text += more
                    continue
                if not text and not in_array:
                    return
                if problem or in_array:
                    raise CaseError(f"'{path}' is not valid JSON after record {count} ({problem or 'no end'}).")
            yield value
            count += 1
            text = text[end:]
            size = _CHUNK
