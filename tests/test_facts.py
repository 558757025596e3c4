"""Facts: the forms they come in, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_edit import Fact, FactError, as_facts
from peft_edit.facts import fact_to_dict, fill


MOTHER_TONGUE = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")


def test_reads_fact_mapping_and_file(tmp_path):
    record = {"subject": "Danielle Darrieux", "prompt": "The mother tongue of {} is", "target": "English"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(record) + "\n\n")
    assert as_facts(MOTHER_TONGUE) == as_facts(record) == as_facts([record]) == as_facts(path) == [MOTHER_TONGUE]


def test_reads_nested_counterfact():
    record = {
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Danielle Darrieux",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
        },
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    }
    (fact,) = as_facts([record])
    assert (fact.target, fact.target_true) == ("English", "French")
    assert fact.neighborhood == ("The mother tongue of Léon Blum is",)


def test_reads_flat_counterfact_and_zsre():
    flat = {
        "prompt": "Toko Yasuda, the",
        "subject": "Toko Yasuda",
        "target_new": "piano",
        "ground_truth": "guitar",
        "rephrase_prompt": "Toko Yasuda is incredible at",
        "locality_prompt": "John Lennon performs on the",
    }
    (fact,) = as_facts([flat])
    assert (fact.prompt, fact.target_true, fact.paraphrases) == (
        "{}, the",
        "guitar",
        ("Toko Yasuda is incredible at",),
    )
    zsre = {
        "subject": "Epaspidoceras",
        "target_new": "Noctuidae",
        "prompt": "Which family does Epaspidoceras belong to?",
        "ground_truth": ["Aspidoceratidae"],
    }
    (fact,) = as_facts([zsre])
    assert fact.filled_prompt == zsre["prompt"] and fact.target_true == "Aspidoceratidae"


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        (Fact("Paris", "The capital of France is", "Rome"), "0 times"),
        (Fact("Paris", "{} and {} are", "Rome"), "2 times"),
        (Fact("", "{} is", "Rome"), "'subject' is empty"),
        (Fact("Paris", "{} is", "  "), "'target' is empty"),
        (Fact("Paris", "", "Rome"), "'prompt' is empty"),
        (Fact("Paris", "{} is", 3), "'target' must be text, got int"),
        (Fact("Pa\0ris", "{} is", "Rome"), "NUL"),
        (Fact("Paris", "{} is", "Rome", id=" "), "'id'"),
        (3, "expected a Fact or a mapping, got int"),
    ],
)
def test_refuses_a_bad_fact_by_its_index(fact, said):
    with pytest.raises(FactError) as error:
        as_facts([MOTHER_TONGUE, fact])
    assert "fact 1" in str(error.value) and said in str(error.value)


def test_counts_all_bad_facts():
    with pytest.raises(FactError, match="7 bad fact"):
        as_facts([Fact("x", "no placeholder", "y")] * 7)


def test_refuses_contradiction_naming_both_and_drops_repeats():
    other = Fact("Danielle Darrieux", "The mother tongue of {} is ", "German")
    with pytest.raises(FactError, match=r"facts 0 and 1 contradict.*English.*German"):
        as_facts([MOTHER_TONGUE, other])
    with pytest.warns(UserWarning, match="given twice"):
        assert as_facts([MOTHER_TONGUE, MOTHER_TONGUE]) == [MOTHER_TONGUE]


def test_refuses_shared_ids_and_missing_files(tmp_path):
    with pytest.raises(FactError, match="share the id"):
        as_facts([Fact("a", "{} is", "b", id="1"), Fact("c", "{} is", "d", id="1")])
    with pytest.raises(FactError, match="no facts file"):
        as_facts(tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"subject": "a"\n')
    with pytest.raises(FactError, match="Line 1"):
        as_facts(broken)


@given(
    subject=st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t),
    tail=st.text(alphabet="{}ab ", max_size=5),
)
@settings(derandomize=True, max_examples=200)
def test_braces_in_subjects_are_plain_text(subject, tail):
    subject = subject + tail
    fact = Fact(subject, "The home of {} is", "here")
    (read,) = as_facts([fact_to_dict(fact)])
    assert read == fact
    assert read.filled_prompt == f"The home of {subject} is" == fill(fact.prompt, subject)


def test_id_is_stable_and_ignores_outer_space():
    assert MOTHER_TONGUE.fact_id == Fact(" Danielle Darrieux ", "The mother tongue of {} is", "German").fact_id
    assert MOTHER_TONGUE.fact_id != Fact("Danielle Darrieux", "{} speaks", "English").fact_id
