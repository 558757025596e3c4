"""Records of every published form become cases; one that cannot says which it is and why."""

import pytest

from peft_edit import Fact
from peft_edit.evaluation import cases
from peft_edit.evaluation.cases import Case, CaseError, Probe, case_to_dict, reversal_probe
from peft_edit.evaluation.datasets import cases_from_record, load_jsonl, load_mquake, load_zsre

from .dataset_records import (
    EASYEDIT,
    FLAT,
    KNOWEDIT,
    MEND,
    MQUAKE,
    NESTED,
    REMASTERED,
    RIPPLE,
    TRACING,
    one,
    ripple_test,
    written,
)


def test_nested_counterfact_has_ten_neighbours():
    assert one(NESTED) == Case(
        Fact(
            "Odo Brill",
            "{} plays the",
            "harp",
            target_true="drums",
            paraphrases=("Rain fell. Odo Brill is known for the", "Odo Brill, master of the"),
            neighborhood=tuple(f"Drummer {number} plays the" for number in range(10)),
        )
    )


def test_flat_counterfact_takes_the_subject_out_of_the_prompt():
    fact = Fact(
        "Odo Brill", "The home of {} is", "Lund", "Turin", ("Odo Brill lives in",), ("The home of Mia Fent is",)
    )
    assert one(FLAT) == Case(fact)


def test_a_neighbour_with_another_answer_is_an_unrelated_probe():
    case = one({**FLAT, "locality_ground_truth": "Oslo"})
    assert case.fact.neighborhood == ()
    assert case.probes == {cases.UNRELATED: (Probe("The home of Mia Fent is", ("Oslo",)),)}


def test_counterfact_tracing_is_stripped():
    assert one(TRACING) == Case(Fact("Odo Brill", "The home of {} is", "Lund", "Turin"))


def test_mend_form_of_zsre():
    case = one(MEND)
    assert case.fact == Fact(
        "Odo Brill", "Which town is {} from?", "Lund", "Turin", ("Where does Odo Brill come from?",)
    )
    assert case.probes == {cases.UNRELATED: (Probe("who sings the song of the hills?", ("Mia Fent",)),)}


def test_mend_form_can_write_the_true_answer(tmp_path):
    path = written(tmp_path, [MEND])
    (case,) = load_zsre(path, form="mend_answer")
    assert (case.fact.target, case.fact.target_true) == ("Turin", None)


def test_easyedit_form_of_zsre():
    case = one(EASYEDIT)
    assert case.fact.prompt == "Which town is {} from?" and case.fact.target_true == "Turin"
    assert case.fact.paraphrases == ("Where does Odo Brill come from?",)
    assert case.probes == {
        cases.PORTABILITY: (Probe("In which country was Brill born?", ("Sweden",)),),
        cases.RELATION_SPECIFICITY: (Probe("The trade of Odo Brill is", ("music",), "Odo Brill"),),
    }


def test_knowedit_answers_of_any_nesting():
    case = one(KNOWEDIT)
    assert case.fact == Fact("Odo Brill", "The place of death of {} is", "Lund")
    assert case.probes == {
        cases.LOGICAL_GENERALIZATION: (Probe("Is Odo Brill alive?", ("no", "is dead"), "Odo Brill"),),
        cases.PORTABILITY: (
            Probe("The land of his death is", ("Sweden",)),
            Probe("He died in the land of", ("Sweden",)),
        ),
        cases.SUBJECT_ALIASING: (Probe("O. B. died in", ("Lund", "Lund, Sweden")),),
        cases.FORGETFULNESS: (Probe("He also died in", ("Rome",)),),
    }, "a question without an answer is left out"


def test_mquake_gives_a_case_for_each_rewrite_and_asks_at_the_last():
    first, last = cases_from_record(MQUAKE)
    assert first == Case(
        Fact("Odo Brill", "{} is a citizen of", "Sweden", "Italy", ("What is the citizenship of Odo Brill?",)),
        {},
        group="41",
    )
    assert last.fact == Fact(
        "Sweden", "The capital of {} is", "Lund", "Stockholm", ("What is the capital of Sweden?",)
    )
    assert last.group == "41"
    assert last.probes == {
        cases.MULTI_HOP: (
            Probe("What is the capital of Brill's country?", ("Lund", "Lunda")),
            Probe("Brill's country has which capital?", ("Lund", "Lunda")),
        ),
        cases.SINGLE_HOP: (
            Probe("Odo Brill is of", ("Sweden", "SE")),
            Probe("What is the capital of Sweden?", ("Lund",)),
        ),
    }


def test_mquake_remastered_names_targets_otherwise():
    case = one(REMASTERED)
    assert case.fact == Fact("Odo Brill", "{} is a citizen of", "Sweden", "Italy")
    assert set(case.probes) == {cases.MULTI_HOP, cases.SINGLE_HOP}


def test_ripple_edits():
    case = one(RIPPLE)
    assert case.fact == Fact(
        "Odo Brill", "The name of the country of citizenship of {} is", "United Isles", "United Hills"
    )
    assert case.probes == {
        cases.RELATION_SPECIFICITY: (Probe("The mother of Odo Brill is", ("Ida", "Ida Brill"), "Odo Brill"),),
        cases.LOGICAL_GENERALIZATION: (Probe("The siblings of Ida are", ("Odo Brill", "Ann", "Annie")),),
        cases.SUBJECT_ALIASING: (Probe("O. B. is a citizen of", ("United Isles", "UI")),),
        cases.COMPOSITIONALITY: (
            Probe("The coin of his country is", ("crown",)),
            Probe("He pays in", ("crown",)),
            Probe("The land of Ida's son is", ("United Isles",)),
        ),
        cases.FORGETFULNESS: (Probe("His other country is", ("United Hills",)),),
    }


@pytest.mark.parametrize(
    ("relation", "sentence", "previous", "expected"),
    [
        ("MOTHER", "The mother of Odo is Ida.", None, ("Odo", "The mother of {} is", "Ida", None)),
        ("FOLLOWS", "Isles II follows Isles I.", None, ("Isles II", "{} follows", "Isles I", None)),
        ("SIBLING", "The siblings of Odo are Ida.", None, ("Odo", "The siblings of {} are", "Ida", None)),
        ("AWARD_RECEIVED", "The award Odo won is Gold.", None, ("Odo", "The award {} won is", "Gold", None)),
        (
            "DIRECTOR",
            "The director of Love is Blue is Ida.",
            "The director of Love is Blue is Ada B.",
            ("Love is Blue", "The director of {} is", "Ida", "Ada B"),
        ),
        (
            "AUTHOR",
            "The author of Hills is Who is Ida.",
            "The author of Hills is Odo.",
            ("Hills", "The author of {} is", "Who is Ida", "Odo"),
        ),
        (
            "MEMBER_OF_SPORTS_TEAM",
            "The team, a sports team which Odo is a member of is Lund F.C..",
            None,
            ("Odo", "The team, a sports team which {} is a member of is", "Lund F.C.", None),
        ),
    ],
)
def test_ripple_sentences_are_split_by_their_relation(relation, sentence, previous, expected):
    edit = {"prompt": sentence, "relation": relation}
    if previous is not None:
        edit["previous_fact"] = {"prompt": previous}
    fact = one({"edit": edit}).fact
    assert (fact.subject, fact.prompt, fact.target, fact.target_true) == expected


def test_own_form_is_written_and_read_back(tmp_path):
    case = Case(
        Fact("Odo", "{} lives in", "Lund", id="odo"),
        {
            cases.NEGATION: (Probe("Odo does not live in", ("Rome", "Oslo")),),
            cases.REVERSAL: (Probe("?", ("Odo",), "x"),),
        },
        "g",
    )
    assert load_jsonl(written(tmp_path, [case_to_dict(case)])) == [case]
    assert load_jsonl(written(tmp_path, [case_to_dict(Case(case.fact))])) == [Case(case.fact)]


def test_reversal_asks_from_the_target():
    fact = Fact("Lund", "{} is the capital of", "Sweden")
    assert reversal_probe(fact, "The capital of {} is") == Probe("The capital of Sweden is", ("Lund",), "Sweden")
    with pytest.raises(ValueError, match="holds no {}.*Sweden"):
        reversal_probe(fact, "The capital is")


def test_kinds_are_a_closed_vocabulary():
    assert cases.STAYING_KINDS < set(cases.KINDS)
    with pytest.raises(CaseError, match="no kind of probe 'hopping'; the kinds are portability"):
        Case(one(FLAT).fact, {"hopping": ()})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**FLAT, "subject": None}, "the field 'subject' is missing"),
        ({**FLAT, "target_new": 3}, "'target_new' must be text, got int"),
        ({**FLAT, "target_new": " "}, "'target' is empty"),
        ({**NESTED, "requested_rewrite": {"prompt": "{} is"}}, "without the field 'subject'"),
        ({**MEND, "answers": []}, "'answers' holds no text"),
        ({**MEND, "alt": None}, "'alt' is missing"),
        ({**MEND, "loc_ans": None}, "'loc_ans' is missing"),
        ({**EASYEDIT, "portability": {"Guessing": []}}, "'portability.Guessing' is not known"),
        ({**EASYEDIT, "portability": []}, None),
        ({**EASYEDIT, "locality": [1]}, "'locality' must be a mapping, got list"),
        ({**EASYEDIT, "locality": {"Forgetfulness": [{"prompt": "a"}]}}, "'locality.Forgetfulness.ground_truth' is"),
        ({**MQUAKE, "questions": []}, "'questions' holds no text"),
        ({**MQUAKE, "new_answer": None}, "'new_answer' is missing"),
        ({**MQUAKE, "requested_rewrite": []}, "'requested_rewrite' is empty"),
        ({**MQUAKE, "requested_rewrite": [{"subject": "a", "prompt": "{}"}]}, "'requested_rewrite.target_new' is"),
        ({**RIPPLE, "edit": "x"}, "'edit' must be a mapping"),
        ({**RIPPLE, "Forgetfulness": [{}]}, "'Forgetfulness.test_queries' is missing"),
        ({**RIPPLE, "Forgetfulness": [ripple_test({"prompt": "x"})]}, "'Forgetfulness.test_queries.answers' is"),
        ({"subject": "Odo", "prompt": "{} is", "target": "x", "probes": {"hops": []}}, "no kind of probe 'hops'"),
        ({"subject": "Odo", "prompt": "{} and {} is", "target": "x"}, "2 times"),
        (7, "a record must be a mapping, got int"),
    ],
)
def test_a_bad_record_names_its_index_and_field(tmp_path, record, said):
    path = written(tmp_path, [FLAT, record])
    if said is None:
        assert len(load_jsonl(path)) == 2
        return
    with pytest.raises(CaseError) as error:
        load_jsonl(path)
    assert f"Record 1 of {path}: " in str(error.value) and said in str(error.value)


def test_a_named_loader_refuses_another_form(tmp_path):
    with pytest.raises(CaseError, match="Record 0 of .*'requested_rewrite' is missing"):
        load_mquake(written(tmp_path, [FLAT]))


def test_records_that_cannot_be_edited_are_left_out_with_one_warning(tmp_path):
    nameless = {**EASYEDIT, "subject": "Brill, Odo"}
    odd = {"edit": {"prompt": "Odo's mother: Ida.", "relation": "MOTHER"}}
    path = written(tmp_path, [nameless, EASYEDIT, odd])
    with pytest.warns(UserWarning, match=r"2 record\(s\).*: 0 of .*does not name.*; 2 of .*phrased") as caught:
        assert load_jsonl(path) == [one(EASYEDIT)]
    assert len(caught) == 1
