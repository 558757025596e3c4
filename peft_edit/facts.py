"""Facts: what the user wants the model to say, read from the usual forms and validated before anything is changed."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union


PLACEHOLDER = "{}"

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
        paraphrases (`tuple[str, ...]`): Other phrasings (full text, or with `{}`); used by the evaluation only.
        neighborhood (`tuple[str, ...]`): Prompts on other subjects whose answer is `target_true` and must stay so;
            used by the evaluation only.
        id (`str`, *optional*): A name of your own for the fact; by default a digest of subject and prompt.
    """

    subject: str
    prompt: str
    target: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    id: str | None = None

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


def as_facts(source: FactLike | Iterable[FactLike] | str | os.PathLike) -> list[Fact]:
    """Reads facts from whatever holds them and validates all of them.

    Args:
        source: A `Fact`, a mapping, an iterable of either (a `datasets.Dataset` is one), or the path of a `.jsonl` or
            `.json` file. Mappings may be plain (`subject`, `prompt`, `target`), CounterFact records (nested with
            `requested_rewrite`, or flat with `target_new` and the subject already in the prompt) or zsRE records.

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
    facts = []
    problems = []
    for index, item in enumerate(items):
        try:
            facts.append(check_fact(item if isinstance(item, Fact) else fact_from_mapping(item)))
        except FactError as error:
            problems.append(f"fact {index}: {error}")
    if problems:
        shown = " ".join(problems[:5])
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise FactError(f"Nothing was edited, {len(problems)} bad fact(s): {shown}{more}")
    return _without_repeats(facts)


def _read_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise FactError(
            f"There is no facts file at '{path}': give the path of a .jsonl or .json file, or Fact objects."
        )
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FactError(f"'{path}' is not valid JSON ({error}).") from error
        return data if isinstance(data, list) else [data]
    items = []
    for number, line in enumerate(text.splitlines(), start=1):
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
    if isinstance(truth, (list, tuple)):
        truth = truth[0] if truth else None
    paraphrases = record.get("paraphrases") or _listed(record.get("rephrase_prompt", record.get("rephrase")))
    neighborhood = [
        item["prompt"] if isinstance(item, Mapping) else item for item in record.get("neighborhood") or ()
    ] or _listed(record.get("locality_prompt"))
    # The flat forms carry the subject inside the prompt.
    if all(isinstance(text, str) for text in (prompt, subject)) and PLACEHOLDER not in prompt and subject:
        if "target" not in record and subject in prompt:
            prompt = prompt.replace(subject, PLACEHOLDER, 1)
    identifier = record.get("id")
    return Fact(
        subject=subject,
        prompt=prompt,
        target=target,
        target_true=truth,
        paraphrases=tuple(paraphrases),
        neighborhood=tuple(neighborhood),
        id=None if identifier is None else str(identifier),
    )


def _from_counterfact(record: Mapping[str, Any]) -> Fact:
    """The nested form of the CounterFact files: arXiv 2202.05262, section 3.3."""
    try:
        rewrite = record["requested_rewrite"]
        return Fact(
            subject=rewrite["subject"],
            prompt=rewrite["prompt"],
            target=rewrite["target_new"]["str"],
            target_true=rewrite["target_true"]["str"],
            paraphrases=tuple(record.get("paraphrase_prompts", ())),
            neighborhood=tuple(record.get("neighborhood_prompts", ())),
        )
    except (KeyError, TypeError) as error:
        raise FactError(f"a CounterFact record without the field {error}.") from error


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_fact(fact: Fact) -> Fact:
    """One fact by itself: types, empty fields, the placeholder."""
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
    if fact.id is not None and not (isinstance(fact.id, str) and fact.id.strip()):
        raise FactError(f"field 'id' must be non-empty text or None, got {fact.id!r}.")
    for name in ("paraphrases", "neighborhood"):
        if not all(isinstance(text, str) for text in getattr(fact, name)):
            raise FactError(f"field '{name}' must hold texts only.")
    return fact


def _without_repeats(facts: list[Fact]) -> list[Fact]:
    seen: dict[tuple[str, str], tuple[int, Fact]] = {}
    ids: dict[str, int] = {}
    kept = []
    repeats = 0
    for index, fact in enumerate(facts):
        if fact.key in seen:
            first, other = seen[fact.key]
            if other.target.strip() != fact.target.strip():
                raise FactError(
                    f"Nothing was edited, facts {first} and {index} contradict each other: "
                    f"{fact.filled_prompt!r} cannot be both {other.target!r} and {fact.target!r}; keep one of them."
                )
            repeats += 1
            continue
        if fact.fact_id in ids:
            raise FactError(
                f"Nothing was edited, facts {ids[fact.fact_id]} and {index} share the id {fact.fact_id!r}; "
                "ids must be unique."
            )
        seen[fact.key] = (index, fact)
        ids[fact.fact_id] = index
        kept.append(fact)
    if repeats:
        warnings.warn(f"{repeats} fact(s) were given twice and are edited once.", stacklevel=3)
    return kept


def fact_to_dict(fact: Fact) -> dict[str, Any]:
    """A JSON-ready mapping of the fields that are set; `as_facts` reads it back."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in fields(fact)
        if (value := getattr(fact, field.name)) not in (None, ())
    }
