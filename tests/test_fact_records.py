"""Facts from files and published records: what is understood, and what is refused in one sentence that names it."""

import json
import warnings

import pytest

from peft_edit import Fact, FactError, as_facts
from peft_edit.facts import fact_to_dict, with_placeholder


PLAIN = {"subject": "Bob", "prompt": "{} was born in", "target": "Rome"}


def nested(**changes):
    rewrite = {"subject": "Bob", "prompt": "{} was born in", "target_new": {"str": "Rome"}}
    return {"requested_rewrite": {**rewrite, **changes}}


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_only(tmp_path, character, end):
    records = [{**PLAIN, "subject": f"Bob{character}Ross"}, {**PLAIN, "subject": "Ada"}]
    path = tmp_path / "facts.jsonl"
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode())
    assert [fact.subject for fact in as_facts(path)] == [f"Bob{character}Ross", "Ada"]


@pytest.mark.parametrize("character", ["\x0b", "\x0c"])
def test_a_raw_control_character_is_an_error_of_its_own_line(tmp_path, character):
    path = tmp_path / "facts.jsonl"
    path.write_text(f'{json.dumps(PLAIN)}\n{{"subject": "Bob{character}Ross"}}\n')
    with pytest.raises(FactError, match=r"Line 2 of .*Invalid control character"):
        as_facts(path)


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_a_byte_order_mark_is_passed_over(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(PLAIN), encoding="utf-8-sig")
    assert as_facts(tmp_path / name) == [Fact("Bob", "{} was born in", "Rome")]


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_a_file_that_is_not_utf8_names_itself_and_the_remedy(tmp_path, name):
    text = json.dumps({**PLAIN, "subject": "Zoë"}, ensure_ascii=False)
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(FactError) as error:
        as_facts(tmp_path / name)
    assert str(error.value) == f"'{tmp_path / name}' is not UTF-8 text (byte {text.index('ë')}): save it as UTF-8."


# --- phrasings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paraphrases", "neighborhood"])
@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("Where was Bob born? In", ("Where was Bob born? In",)),
        (["one", "two"], ("one", "two")),
        (("one",), ("one",)),
        (None, ()),
        ([], ()),
        ("", ()),
        (" ", ()),
    ],
)
def test_a_bare_text_is_one_phrasing(name, given, read):
    fact = Fact("Bob", "{} was born in", "Rome", **{name: given})
    assert getattr(fact, name) == read
    assert as_facts(fact) == as_facts({**PLAIN, name: given}) == as_facts(fact_to_dict(fact)) == [fact]
    assert hash(fact) == hash(as_facts({**PLAIN, name: given})[0])


def test_phrasings_of_published_records():
    record = nested() | {"paraphrase_prompts": "Bob comes from", "neighborhood_prompts": None}
    (fact,) = as_facts(record)
    assert (fact.paraphrases, fact.neighborhood) == (("Bob comes from",), ())
    (fact,) = as_facts({**PLAIN, "rephrase": ["Bob is of"], "neighborhood": [{"prompt": "Ada was born in"}, "Cy is"]})
    assert (fact.paraphrases, fact.neighborhood) == (("Bob is of",), ("Ada was born in", "Cy is"))


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {**PLAIN, "neighborhood": ["x", {"text": "x"}]},
            "field 'neighborhood' must hold texts, and item 1 is a mapping without a text 'prompt'.",
        ),
        (
            {**PLAIN, "neighborhood": [{"prompt": 3}]},
            "field 'neighborhood' must hold texts, and item 0 is of the type",
        ),
        ({**PLAIN, "paraphrases": 5}, "field 'paraphrases' must be a text or a list of texts, got int."),
        ({**PLAIN, "paraphrases": b"who"}, "field 'paraphrases' must be a text or a list of texts, got bytes."),
        ({**PLAIN, "paraphrases": ["x", None]}, "field 'paraphrases' must hold texts, and item 1 is of the type None"),
        ({**PLAIN, "rephrase_prompt": 5}, "field 'rephrase_prompt' must be a text or a list of texts, got int."),
        (nested() | {"paraphrase_prompts": 5}, "field 'paraphrase_prompts' must be a text or a list of texts"),
        ({**PLAIN, "target_true": 3}, "field 'target_true' must be text or None, got int."),
        (
            nested(target_new="x"),
            "field 'requested_rewrite.target_new' must be a mapping with the answer in its field 'str'",
        ),
        (nested(target_true="x"), "field 'requested_rewrite.target_true' must be a mapping"),
        (nested(target_new={"id": "Q1"}), "got {'id': 'Q1'}."),
        (nested(target_new={"str": 5}), "field 'target' must be text, got int."),
        (
            {"requested_rewrite": "a text", "target_new": "x"},
            "field 'requested_rewrite' must be a mapping, as in CounterFact, got str.",
        ),
        ({"requested_rewrite": {"subject": "Bob"}}, "without the field 'prompt' in 'requested_rewrite'."),
        (
            {"requested_rewrite": {"subject": "Bob", "prompt": "{} is"}, "target_new": "x"},
            "without the field 'target_new' in 'requested_rewrite'.",
        ),
    ],
)
def test_a_malformed_record_names_its_index_and_field(record, said):
    with pytest.raises(FactError) as error:
        as_facts([{**PLAIN, "subject": "Ada"}, record])
    assert str(error.value).startswith("Nothing was edited, 1 bad fact(s): fact 1: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subject", "Bob\ud83d"),
        ("prompt", "Bo\ud83d {} is"),
        ("target", "Rom\udc00e"),
        ("target_true", "Rom\udc00e"),
        ("paraphrases", ["x", "who\ud83d"]),
        ("neighborhood", "who\ud83d"),
        ("id", "who\ud83d"),
    ],
)
def test_half_a_surrogate_pair_names_its_field(tmp_path, name, value):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({**PLAIN, name: value}))  # an escape: the file itself is sound
    with pytest.raises(FactError, match=f"fact 0: field '{name}' holds half a surrogate pair") as error:
        as_facts(path)
    str(error.value).encode()  # can be printed


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({**PLAIN, "subject": "Bob \U0001f600"}, ensure_ascii=True))
    assert as_facts(path)[0].subject == "Bob \U0001f600"


# --- true targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"target_true": None}, {"target_true": {"str": None}}])
def test_counterfact_without_a_true_target(given):
    (fact,) = as_facts(nested(**given))
    assert fact == Fact("Bob", "{} was born in", "Rome")


@pytest.mark.parametrize("truth", ["Oslo", ["Oslo", "Paris"], [["Oslo"]], {"str": "Oslo"}])
def test_forms_of_the_true_target(truth):
    assert as_facts({**PLAIN, "target_true": truth})[0].target_true == "Oslo"


# --- where the subject stands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "marked"),
    [
        ("Bobby and Bob are", "Bob", "Bobby and {} are"),
        ("Bobby, Bob and Bob are", "Bob", "Bobby, {} and Bob are"),
        ("Bob's and Bobby's home is", "Bob", "{}'s and Bobby's home is"),
        ("McBob met Bob", "Bob", "McBob met {}"),
        ("Bob2 is by Bob", "Bob", "Bob2 is by {}"),
        ("Only Bobby is here", "Bob", "Only {}by is here"),
        ("banana", "ana", "b{}na"),
        # An edge of the subject that is no letter or digit is a boundary.
        ("The !!!band is by", "!!!", "The {}band is by"),
        ("Yahoo!s home and Yahoo! are", "Yahoo!", "{}s home and Yahoo! are"),
        ("xC++y or C++y", "C++", "xC++y or {}y"),
        # No spaces between words, so there is no boundary to find.
        ("日本の首都東京は", "東京", "日本の首都{}は"),
        # An accent, or a vowel sign, as a character of its own goes on with the word.
        ("Zoe\u0308 and Zoe are", "Zoe", "Zoe\u0308 and {} are"),
        ("रामायण और राम", "राम", "रामायण और {}"),
        ("Nobody of this name", "Bob", "Nobody of this name"),
    ],
)
def test_the_subject_is_found_as_whole_words_first(prompt, subject, marked):
    assert with_placeholder(prompt, subject) == marked
    if "{}" in marked:
        (fact,) = as_facts({"subject": subject, "prompt": prompt, "target_new": "Rome"})
        assert fact.prompt == marked and fact.filled_prompt == prompt


def test_repeats_are_reported_where_they_were_given():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        as_facts([PLAIN, PLAIN])
    assert [warning.filename for warning in caught] == [__file__]
