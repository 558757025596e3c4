"""Cases: a fact to edit with everything it is to be asked about, and how published records become cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..facts import PLACEHOLDER, Fact, FactError, check_fact, fact_from_mapping, fact_to_dict, fill, with_placeholder


PORTABILITY = "portability"
MULTI_HOP = "multi_hop"
SINGLE_HOP = "single_hop"
SUBJECT_ALIASING = "subject_aliasing"
LOGICAL_GENERALIZATION = "logical_generalization"
COMPOSITIONALITY = "compositionality"
REVERSAL = "reversal"
NEGATION = "negation"
RELATION_SPECIFICITY = "relation_specificity"
FORGETFULNESS = "forgetfulness"
UNRELATED = "unrelated"

KINDS: dict[str, str] = {
    PORTABILITY: "a question one step of reasoning away from the edited fact",
    MULTI_HOP: "a question whose chain of facts holds every edited fact of the group",
    SINGLE_HOP: "one step of such a chain, as it is after the edit",
    SUBJECT_ALIASING: "the edited question with another name of the subject",
    LOGICAL_GENERALIZATION: "what follows from the edit by a property of the relation (symmetry, negation, ...)",
    COMPOSITIONALITY: "the edited fact composed with another fact about subject or target",
    REVERSAL: "the question from the target back to the subject",
    NEGATION: "the edited question in negated form",
    RELATION_SPECIFICITY: "another relation of the same subject, which must stay",
    FORGETFULNESS: "another answer to the same question, which must stay",
    UNRELATED: "a question that has nothing to do with the edit, which must stay",
}
"""Every kind of probe, and what it asks; the vocabulary is closed."""

STAYING_KINDS = frozenset({RELATION_SPECIFICITY, FORGETFULNESS, UNRELATED})
"""Kinds whose answers the edit must not change; the answers of all others follow from the edit."""


class CaseError(ValueError):
    """A record that has not the published form: the message names the record and the field."""


class UnusableRecord(Exception):
    """A well-formed record that cannot be edited, because its prompt does not name its subject."""


@dataclass(frozen=True)
class Probe:
    """A question whose right answer after the edit is known.

    Args:
        prompt (`str`): The full text.
        answers (`tuple[str, ...]`): Any of them is right; the first is the canonical one.
        subject (`str`, *optional*): The entity asked about, where known.
    """

    prompt: str
    answers: tuple[str, ...]
    subject: str | None = None


@dataclass(frozen=True)
class Case:
    """A fact to edit and everything it is to be asked about.

    Args:
        fact (`Fact`): With `target_true`, `paraphrases` and `neighborhood` as far as the data set has them.
        probes (`Mapping[str, tuple[Probe, ...]]`): Kind (a key of `KINDS`) to probes.
        group (`str`, *optional*): Cases of one group belong together: the probes of any of them hold only after the
            facts of all of them are edited. Cases of a group stand next to each other.

    Raises:
        CaseError: for a kind that is not in `KINDS`.
    """

    fact: Fact
    probes: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    group: str | None = None

    def __post_init__(self) -> None:
        for kind in self.probes:
            if kind not in KINDS:
                raise CaseError(f"there is no kind of probe {kind!r}; the kinds are {', '.join(KINDS)}.")


def reversal_probe(fact: Fact, template: str) -> Probe:
    """Asks from the target back to the subject (the reversal curse, arXiv 2309.12288).

    Args:
        fact (`Fact`): The edited fact.
        template (`str`): With `{}` where the target stands; the relation must be one to one.

    Raises:
        ValueError: if the template has no `{}`.
    """
    if PLACEHOLDER not in template:
        raise ValueError(f"The template {template!r} holds no {{}}: write it where the target {fact.target!r} stands.")
    return Probe(fill(template, fact.target), (fact.subject,), fact.target)


def case_to_dict(case: Case) -> dict[str, Any]:
    """A JSON-ready mapping; `plain_cases` reads it back."""
    record = fact_to_dict(case.fact)
    if case.probes:
        record["probes"] = {kind: [asdict(probe) for probe in probes] for kind, probes in case.probes.items()}
    return record if case.group is None else record | {"group": case.group}


def plain_cases(record: Any) -> list[Case]:
    """The form of `case_to_dict`: the fields of a fact, and if wanted `probes` and `group`."""
    probes = {}
    for kind, items in _mapping(record.get("probes") or {}, "'probes'").items():
        where = f"probes.{kind}"
        probes[kind] = tuple(
            Probe(
                _text(item, "prompt", where),
                _answers(_get(item, "answers", where), f"{where}.answers"),
                _optional_text(item, "subject", where),
            )
            for item in _items(items, where)
        )
    return [Case(_usable(record), probes, _optional_text(record, "group"))]


def counterfact_cases(record: Any) -> list[Case]:
    """CounterFact (arXiv 2202.05262), nested or flat, and its reduction `counterfact-tracing`.

    A neighbour of the flat form goes to `Fact.neighborhood` if its answer is the fact's true target, else to the
    unrelated probes with its own answer.
    """
    if "requested_rewrite" in record:
        return [Case(_usable(record))]
    new, true = ("target_false", "target_true") if "target_false" in record else ("target_new", "ground_truth")
    fact = _flat_fact(record, new, true, paraphrase="rephrase_prompt")
    neighbour = _optional_text(record, "locality_prompt")
    if neighbour is None:
        return [Case(fact)]
    answers = _answers(record.get("locality_ground_truth", fact.target_true), "locality_ground_truth")
    if fact.target_true in answers:
        return [Case(replace(fact, neighborhood=(neighbour,)))]
    return [Case(fact, {UNRELATED: (Probe(neighbour, answers),)})]


def mend_cases(record: Any, target: str = "alt") -> list[Case]:
    """zsRE in the form of MEND (arXiv 2110.11309).

    Args:
        record: With `subject`, `src`, `alt`, `answers`, `rephrase`, `loc`, `loc_ans`.
        target (`str`): "alt" writes the alternative answer, and the first of `answers` is the true one; "answer"
            writes the first of `answers`, as ROME and MEMIT do, and then no true target is known.
    """
    if target not in ("alt", "answer"):
        raise ValueError(f"The target of a zsRE edit is 'alt' or 'answer', got {target!r}.")
    record = {**record, "answers": _answers(_get(record, "answers"), "answers")[0]}
    new, true = ("alt", "answers") if target == "alt" else ("answers", None)
    fact = _flat_fact(record, new, true, paraphrase="rephrase", prompt="src")
    if record.get("loc") is None:
        return [Case(fact)]
    # The questions come from Natural Questions, marked as such and without a question mark.
    question = _text(record, "loc").removeprefix("nq question: ").rstrip("? ") + "?"
    return [Case(fact, {UNRELATED: (Probe(question, _answers(_get(record, "loc_ans"), "loc_ans")),)})]


_KNOWEDIT_KINDS = {
    "portability": {
        "Reasoning": PORTABILITY,
        "Logical_Generalization": LOGICAL_GENERALIZATION,
        "Subject_Aliasing": SUBJECT_ALIASING,
    },
    "locality": {"Relation_Specificity": RELATION_SPECIFICITY, "Forgetfulness": FORGETFULNESS},
}


def knowedit_cases(record: Any) -> list[Case]:
    """KnowEdit (arXiv 2401.01286): wiki_recent, wiki_counterfact and ZsRE, which is also EasyEdit's form of zsRE."""
    paraphrase = "rephrase_prompt" if "rephrase_prompt" in record else "rephrase"
    fact = _flat_fact(record, "target_new", "ground_truth", paraphrase)
    probes: dict[str, tuple[Probe, ...]] = {}
    for part, kinds in _KNOWEDIT_KINDS.items():
        for name, items in _mapping(record.get(part) or {}, f"'{part}'").items():
            where = f"{part}.{name}"
            if name not in kinds:
                raise CaseError(f"the field '{where}' is not known; '{part}' holds {', '.join(kinds)}.")
            for item in _items(items, where):
                answers = _answers(_get(item, "ground_truth", where), f"{where}.ground_truth", may_be_empty=True)
                for prompt in _answers(_get(item, "prompt", where), f"{where}.prompt"):
                    _add(probes, kinds[name], prompt, answers, fact)
    return [Case(fact, probes)]


def mquake_cases(record: Any) -> list[Case]:
    """MQuAKE (arXiv 2305.14795) and MQuAKE-Remastered: one case for each rewrite, all in the group of the record.

    The multi-hop questions, and the single hops of the chain after the edit (as cloze), are at the last case of the
    group, so that they are there once and asked when all facts of the group are in. The question of a rewrite becomes
    a paraphrase of its fact.
    """
    facts = []
    where = "requested_rewrite"
    for rewrite in _items(_get(record, where), where):
        fact = Fact(
            subject=_text(rewrite, "subject", where),
            prompt=_text(rewrite, "prompt", where),
            target=_target(rewrite, "target_new"),
            target_true=_target(rewrite, "target_true"),
            paraphrases=_answers(rewrite.get("question"), f"{where}.question", may_be_empty=True),
        )
        facts.append(_usable(fact))
    if not facts:
        raise CaseError("the field 'requested_rewrite' is empty.")
    answers = _answers([_get(record, "new_answer"), record.get("new_answer_alias") or []], "new_answer")
    probes = {MULTI_HOP: tuple(Probe(prompt, answers) for prompt in _answers(_get(record, "questions"), "questions"))}
    hops = []
    where = "new_single_hops"
    for hop in _items(record.get(where) or [], where):
        prompt = _optional_text(hop, "cloze", where) or _text(hop, "question", where)
        hop_answers = [_get(hop, "answer", where), hop.get("answer_alias") or []]
        hops.append(Probe(prompt, _answers(hop_answers, f"{where}.answer")))
    if hops:
        probes[SINGLE_HOP] = tuple(hops)
    group = str(_get(record, "case_id"))
    return [Case(fact, probes if fact is facts[-1] else {}, group) for fact in facts]


_RIPPLE_KINDS = {
    "Relation_Specificity": RELATION_SPECIFICITY,
    "Relation_Specifity": RELATION_SPECIFICITY,
    "Logical_Generalization": LOGICAL_GENERALIZATION,
    "Subject_Aliasing": SUBJECT_ALIASING,
    "Compositionality_I": COMPOSITIONALITY,
    "Compositionality_II": COMPOSITIONALITY,
    "Forgetfulness": FORGETFULNESS,
}

# What stands before and after the subject, for the relations that are not phrased "<relation> of <subject> is".
_RIPPLE_WORDS = {
    "AWARD_RECEIVED": ("award ", " won is "),
    "CAPITAL": ("capital city of ", " is "),
    "CAPITAL_OF": ("country which ", " is the capital of is "),
    "CAST_MEMBER": ("cast members of ", " are "),
    "CONTINENT": ("continent which ", " is part of is "),
    "COUNTRY": ("country which ", " is associated with is "),
    "CURRENCY": ("currency in ", " is "),
    "ETHNIC_GROUP": ("ethnic group which ", " is associated with is "),
    "FOLLOWED_BY": ("", " is followed by "),
    "FOLLOWS": ("", " follows "),
    "LEAGUE": ("league which ", " plays in is "),
    "MEMBER_OF_SPORTS_TEAM": ("sports team which ", " is a member of is "),
    "NATIVE_LANGUAGE": ("mother tongue of ", " is "),
    "NUMBER_OF_CHILDREN": ("number of children ", " has is "),
    "POSITION_HELD": ("position held by ", " is "),
    "RELIGION": ("religion which ", " is associated with is "),
    "SEX_OR_GENDER": ("gender of ", " is "),
    "SIBLING": ("siblings of ", " are "),
}


def ripple_cases(record: Any) -> list[Case]:
    """RippleEdits (arXiv 2307.12976), popular, random and recent.

    The files name subject and target by Wikidata ids and give the fact as one sentence, which is split here by the
    wording of its relation. Every test query becomes a probe of its own, and any one of its answers is right.
    """
    edit = _mapping(_get(record, "edit"), "'edit'")
    relation = _text(edit, "relation", "edit")
    previous = edit.get("previous_fact")
    before = None if previous is None else _text(previous, "prompt", "edit.previous_fact")
    sentence = _text(edit, "prompt", "edit")
    start, end, after = _subject_span(sentence, relation, before)
    fact = Fact(
        subject=sentence[start:end],
        prompt=f"{sentence[:start]}{PLACEHOLDER}{after.rstrip()}",
        target=sentence[end + len(after) :].removesuffix("."),
        target_true=None if before is None else before[end + len(after) :].removesuffix("."),
    )
    probes: dict[str, tuple[Probe, ...]] = {}
    for name, kind in _RIPPLE_KINDS.items():
        for test in _items(record.get(name) or [], name):
            for query in _items(_get(test, "test_queries", name), f"{name}.test_queries"):
                where = f"{name}.test_queries"
                answers = [
                    [_get(answer, "value", f"{where}.answers"), answer.get("aliases") or []]
                    for answer in _items(_get(query, "answers", where), f"{where}.answers")
                ]
                found = _answers(answers, f"{where}.answers", may_be_empty=True)
                _add(probes, kind, _text(query, "prompt", where), found, fact)
    return [Case(_usable(fact), probes)]


def _subject_span(sentence: str, relation: str, previous: str | None) -> tuple[int, int, str]:
    """First and last place of the subject, and the words after it.

    A subject may hold the words itself ("Life Is ..."): the last place is taken that the previous sentence shares.
    """
    before, after = _RIPPLE_WORDS.get(relation, (f"{relation.lower().replace('_', ' ')} of ", " is "))
    start = sentence.find(before) + len(before) if before in sentence else -1
    end = sentence.rfind(after)
    while previous is not None and end > start and not previous.startswith(sentence[: end + len(after)]):
        end = sentence.rfind(after, 0, end)
    if start < 0 or end <= start:
        raise UnusableRecord(f"the sentence {sentence!r} is not phrased as the relation {relation} is")
    return start, end, after


def _flat_fact(record: Any, target: str, target_true: str | None, paraphrase: str, prompt: str = "prompt") -> Fact:
    """A fact whose prompt holds the subject already; the arguments name the fields."""
    subject = _text(record, "subject").strip()
    text = _text(record, prompt)
    true = None if target_true is None else _answers(record.get(target_true), target_true, may_be_empty=True)
    fact = Fact(
        subject=subject,
        prompt=text if PLACEHOLDER in text else with_placeholder(text, subject),
        target=_text(record, target).strip(),
        target_true=true[0] if true else None,
        paraphrases=_answers(record.get(paraphrase) or [], paraphrase, may_be_empty=True),
    )
    return _usable(fact)


def _usable(fact: Fact | Mapping[str, Any]) -> Fact:
    """Checks a fact, or reads it from one of the forms that `as_facts` knows."""
    try:
        fact = fact if isinstance(fact, Fact) else fact_from_mapping(fact)
        if isinstance(fact.prompt, str) and fact.prompt.strip() and PLACEHOLDER not in fact.prompt:
            raise UnusableRecord(f"the prompt {fact.prompt!r} does not name the subject {fact.subject!r}")
        return check_fact(fact)
    except FactError as error:
        raise CaseError(str(error)) from None


def _add(probes: dict[str, tuple[Probe, ...]], kind: str, prompt: str, answers: tuple[str, ...], fact: Fact) -> None:
    """A question without any answer cannot be scored and is left out."""
    if answers:
        probe = Probe(prompt, answers, fact.subject if fact.subject in prompt else None)
        probes[kind] = (*probes.get(kind, ()), probe)


def _target(rewrite: Mapping[str, Any], name: str) -> str:
    """MQuAKE nests the text (`target_new.str`), the Remastered form does not (`target_new_str`)."""
    if f"{name}_str" in rewrite:
        return _text(rewrite, f"{name}_str", "requested_rewrite")
    return _text(_get(rewrite, name, "requested_rewrite"), "str", f"requested_rewrite.{name}")


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CaseError(f"{name} must be a mapping, got {type(value).__name__}.")
    return value


def _items(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise CaseError(f"the field '{name}' must be a list, got {type(value).__name__}.")
    return list(value)


def _get(record: Any, name: str, where: str = "") -> Any:
    value = _mapping(record, f"an entry of '{where}'").get(name)
    if value is None:
        raise CaseError(f"the field '{_path(where, name)}' is missing.")
    return value


def _text(record: Any, name: str, where: str = "") -> str:
    value = _get(record, name, where)
    if not isinstance(value, str):
        raise CaseError(f"the field '{_path(where, name)}' must be text, got {type(value).__name__}.")
    return value


def _optional_text(record: Any, name: str, where: str = "") -> str | None:
    return None if _mapping(record, f"an entry of '{where}'").get(name) is None else _text(record, name, where)


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _answers(value: Any, name: str, may_be_empty: bool = False) -> tuple[str, ...]:
    """Texts of any nesting, flat and without repeats; numbers become text."""
    found = tuple(dict.fromkeys(text for text in _leaves(value, name) if text))
    if not found and not may_be_empty:
        raise CaseError(f"the field '{name}' holds no text.")
    return found


def _leaves(value: Any, name: str) -> Iterable[str]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, name)
    elif isinstance(value, (str, int, float)):
        yield str(value).strip()
    elif value is not None:
        raise CaseError(f"the field '{name}' must hold texts, got {type(value).__name__}.")
