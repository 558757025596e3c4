"""Facts: what the user wants the model to say, read from the usual forms and validated before anything is changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union


PLACEHOLDER = "{}"
PHRASINGS = ("paraphrases", "neighborhood")  # the fields of a fact that hold several texts

_SURROGATE = re.compile("[\ud800-\udfff]")

FactLike = Union["Fact", Mapping[str, Any]]


class FactError(ValueError):
    """A fact that cannot be edited: the message names the fact, the field and the remedy."""


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge to write into the model.

    Args:
        subject (`str`): The entity that the fact is about. Any text; braces in it are plain text.
        prompt (`str`): A sentence that ends where the answer begins, with `{}` exactly once where the subject stands.
        target (`str`): The new answer. The space between prompt and target is added where the text needs one.
        target_true (`str`, *optional*): What the unedited model should answer; used by the evaluation only.
        paraphrases (`tuple[str, ...]`): Other phrasings (full text, or with `{}`); used by the evaluation only. A bare
            text is one phrasing, a list becomes a tuple.
        neighborhood (`tuple[str, ...]`): Prompts on other subjects whose answer is `target_true` and must stay so;
            used by the evaluation only. A bare text or a list as above.
        id (`str`, *optional*): A name of your own for the fact; by default a digest of subject and prompt.
    """

    subject: str
    prompt: str
    target: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    id: str | None = None

    def __post_init__(self) -> None:
        for name in PHRASINGS:
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))

    @property
    def key(self) -> tuple[str, str]:
        """Subject and prompt without outer white space: two facts with the same key answer the same question."""
        return self.subject.strip(), self.prompt.strip()

    @property
    def fact_id(self) -> str:
        """The user's id, else ten hexadecimal digits of the SHA-256 of subject and prompt."""
        if self.id is not None:
            return self.id
        return hashlib.sha256("\0".join(self.key).encode("utf-8", "surrogatepass")).hexdigest()[:10]

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject in place."""
        return fill(self.prompt, self.subject)


def fill(prompt: str, subject: str) -> str:
    """Puts the subject in place of the (first) `{}`; every other brace, in either text, stays as it is."""
    return prompt.replace(PLACEHOLDER, subject, 1)


def with_placeholder(prompt: str, subject: str) -> str:
    """Puts `{}` in place of the subject: where it first stands as whole words, else where it first stands at all.

    Args:
        prompt (`str`): A prompt with the subject in it; one without is given back as it is.
        subject (`str`): The subject, not empty.
    """
    found = prompt.find(subject)
    start = found
    while start >= 0 and not _stands_alone(prompt, start, start + len(subject)):
        start = prompt.find(subject, start + 1)
    if start < 0:  # inside a longer word, or in a script that sets no spaces
        start = found
    return prompt if start < 0 else prompt[:start] + PLACEHOLDER + prompt[start + len(subject) :]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no word goes on across either edge of the part."""
    return not any(
        0 < edge < len(text) and _is_of_a_word(text[edge - 1]) and _is_of_a_word(text[edge]) for edge in (start, end)
    )


def _is_of_a_word(character: str) -> bool:
    # Accents and vowel signs may be characters of their own (categories Mn, Mc, Me).
    return character.isalnum() or unicodedata.category(character).startswith("M")


def as_facts(source: FactLike | Iterable[FactLike] | str | os.PathLike) -> list[Fact]:
    """Reads facts from whatever holds them and validates all of them.

    Args:
        source: A `Fact`, a mapping, an iterable of either (a `datasets.Dataset` is one), or the path of a `.jsonl` or
            `.json` file in UTF-8. Mappings may be plain (`subject`, `prompt`, `target`), CounterFact records (nested
            with `requested_rewrite`, or flat with `target_new` and the subject already in the prompt) or zsRE records.

    Returns:
        `list[Fact]`: in the order given; exact duplicates are left out with a warning.

    Raises:
        FactError: naming the first facts that are malformed, or two facts that contradict each other.
    """
    if isinstance(source, (Fact, Mapping)):
        items: Iterable[Any] = [source]
    elif isinstance(source, (str, os.PathLike)):
        items = _read_file(Path(source))
    elif isinstance(source, Iterable):
        items = source
    else:
        raise FactError(
            f"Facts must come as Fact objects, mappings, or the path of a JSONL file, got {type(source).__name__}."
        )
    return checked_facts(items)


def checked_facts(items: Iterable[Any], first: int = 0, outcome: str = "Nothing was edited") -> list[Fact]:
    """Reads and validates facts that belong together: a whole list, or one batch of a stream.

    Args:
        items (`Iterable`): `Fact` objects and mappings.
        first (`int`): The index that errors give the first of them.
        outcome (`str`): What of the call was edited if one of them is bad; errors begin with it.

    Returns:
        `list[Fact]`: in the order given; exact duplicates are left out with a warning.

    Raises:
        FactError: as `as_facts` does.
    """
    facts = []
    problems = []
    for index, item in enumerate(items, start=first):
        try:
            facts.append(check_fact(item if isinstance(item, Fact) else fact_from_mapping(item)))
        except FactError as error:
            problems.append(f"fact {index}: {error}")
    if problems:
        shown = " ".join(problems[:5])
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise FactError(f"{outcome}, {len(problems)} bad fact(s): {shown}{more}")
    return _without_repeats(facts, first, outcome)


def _read_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise FactError(
            f"There is no facts file at '{path}': give the path of a .jsonl or .json file, or Fact objects."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FactError(f"'{path}' is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FactError(f"'{path}' is not valid JSON ({error}).") from error
        return data if isinstance(data, list) else [data]
    items = []
    # Not `splitlines`: it also splits at U+2028 and others, which may stand in a JSON string as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise FactError(f"Line {number} of '{path}' is not valid JSON ({error.msg}).") from error
    return items


def fact_from_mapping(record: Any) -> Fact:
    """Recognises the published record forms by their fields."""
    if not isinstance(record, Mapping):
        raise FactError(
            f"expected a Fact or a mapping, got {type(record).__name__}; use Fact(subject, prompt, target)."
        )
    if "requested_rewrite" in record:
        return _from_counterfact(record)
    subject = record.get("subject", "")
    target = record.get("target", record.get("target_new", record.get("alt", "")))
    prompt = record.get("prompt", record.get("src", ""))
    if isinstance(target, Mapping):
        target = target.get("str", "")
    truth = record.get("target_true", record.get("ground_truth"))
    while isinstance(truth, (list, tuple)):
        truth = truth[0] if truth else None
    if isinstance(truth, Mapping):
        truth = truth.get("str")
    # The flat forms carry the subject inside the prompt.
    if all(isinstance(text, str) for text in (prompt, subject)) and PLACEHOLDER not in prompt and subject:
        if "target" not in record:
            prompt = with_placeholder(prompt, subject)
    identifier = record.get("id")
    return Fact(
        subject=subject,
        prompt=prompt,
        target=target,
        target_true=truth,
        paraphrases=(
            _phrasings(record, "paraphrases")
            or _phrasings(record, "rephrase_prompt")
            or _phrasings(record, "rephrase")
        ),
        neighborhood=_phrasings(record, "neighborhood") or _phrasings(record, "locality_prompt"),
        id=None if identifier is None else str(identifier),
    )


def _from_counterfact(record: Mapping[str, Any]) -> Fact:
    """The nested form of the CounterFact files: arXiv 2202.05262, section 3.3."""
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise FactError(
            f"field 'requested_rewrite' must be a mapping, as in CounterFact, got {type(rewrite).__name__}."
        )
    return Fact(
        subject=_rewrite_field(rewrite, "subject"),
        prompt=_rewrite_field(rewrite, "prompt"),
        target=_rewrite_answer(rewrite, "target_new"),
        target_true=None if rewrite.get("target_true") is None else _rewrite_answer(rewrite, "target_true"),
        paraphrases=_phrasings(record, "paraphrase_prompts"),
        neighborhood=_phrasings(record, "neighborhood_prompts"),
    )


def _rewrite_field(rewrite: Mapping[str, Any], name: str) -> Any:
    if name not in rewrite:
        raise FactError(f"a CounterFact record without the field '{name}' in 'requested_rewrite'.")
    return rewrite[name]


def _rewrite_answer(rewrite: Mapping[str, Any], name: str) -> Any:
    answer = _rewrite_field(rewrite, name)
    if not isinstance(answer, Mapping) or "str" not in answer:
        raise FactError(
            f"field 'requested_rewrite.{name}' must be a mapping with the answer in its field 'str', as in "
            f"CounterFact, got {answer!r}."
        )
    return answer["str"]


def _phrasings(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The texts of one field; each may be the `prompt` of a mapping."""
    items = _as_tuple(record.get(name))
    if isinstance(items, tuple):
        items = tuple(item["prompt"] if isinstance(item, Mapping) and "prompt" in item else item for item in items)
    _check_phrasings(items, name)
    return items


def _as_tuple(value: Any) -> Any:
    """Nothing, one text or many as a tuple; what cannot be texts stays as it is, for `check_fact` to refuse."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, (str, Mapping)):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return tuple(value)
    return value


def check_fact(fact: Fact) -> Fact:
    """One fact by itself: types, empty fields, characters that are no text, the placeholder."""
    for name in ("subject", "prompt", "target"):
        value = getattr(fact, name)
        if not isinstance(value, str):
            raise FactError(f"field '{name}' must be text, got {type(value).__name__}.")
        if not value.strip():
            raise FactError(f"field '{name}' is empty; every fact needs a subject, a prompt and a target.")
        if "\0" in value:
            raise FactError(f"field '{name}' holds a NUL character; remove it.")
    count = fact.prompt.count(PLACEHOLDER)
    if count != 1:
        raise FactError(
            f"the prompt {fact.prompt!r} holds the placeholder {{}} {count} times; write it exactly once, where the "
            f"subject {fact.subject!r} stands."
        )
    if fact.target_true is not None and not isinstance(fact.target_true, str):
        raise FactError(f"field 'target_true' must be text or None, got {type(fact.target_true).__name__}.")
    if fact.id is not None and not (isinstance(fact.id, str) and fact.id.strip()):
        raise FactError(f"field 'id' must be non-empty text or None, got {fact.id!r}.")
    for name in PHRASINGS:
        _check_phrasings(getattr(fact, name), name)
    _check_characters(fact)
    return fact


def _check_phrasings(value: Any, name: str) -> None:
    if not isinstance(value, tuple):
        raise FactError(f"field '{name}' must be a text or a list of texts, got {type(value).__name__}.")
    for place, item in enumerate(value):
        if isinstance(item, Mapping):
            raise FactError(f"field '{name}' must hold texts, and item {place} is a mapping without a text 'prompt'.")
        if not isinstance(item, str):
            raise FactError(f"field '{name}' must hold texts, and item {place} is of the type {type(item).__name__}.")


def _check_characters(fact: Fact) -> None:
    """A surrogate by itself is half a character: no tokenizer takes it, and it cannot be written as UTF-8."""
    for field in fields(fact):
        value = getattr(fact, field.name)
        for text in value if isinstance(value, tuple) else (value or "",):
            if (found := _SURROGATE.search(text)) is not None:
                raise FactError(
                    f"field '{field.name}' holds half a surrogate pair (character {found.start()} of {text!r}): no "
                    "valid text; write the whole character, or remove it."
                )


def _without_repeats(facts: list[Fact], start: int, outcome: str) -> list[Fact]:
    seen: dict[tuple[str, str], tuple[int, Fact]] = {}
    ids: dict[str, int] = {}
    kept = []
    repeats = 0
    for index, fact in enumerate(facts, start=start):
        if fact.key in seen:
            first, other = seen[fact.key]
            if other.target.strip() != fact.target.strip():
                raise FactError(
                    f"{outcome}, facts {first} and {index} contradict each other: "
                    f"{fact.filled_prompt!r} cannot be both {other.target!r} and {fact.target!r}; keep one of them."
                )
            repeats += 1
            continue
        if fact.fact_id in ids:
            raise FactError(
                f"{outcome}, facts {ids[fact.fact_id]} and {index} share the id {fact.fact_id!r}; ids must be unique."
            )
        seen[fact.key] = (index, fact)
        ids[fact.fact_id] = index
        kept.append(fact)
    if repeats:
        warnings.warn(f"{repeats} fact(s) were given twice and are edited once.", stacklevel=4)
    return kept


def fact_to_dict(fact: Fact) -> dict[str, Any]:
    """A JSON-ready mapping of the fields that are set; `as_facts` reads it back."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in fields(fact)
        if (value := getattr(fact, field.name)) not in (None, ())
    }
