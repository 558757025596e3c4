"""Editing data sets: every published form, streaming, sources, errors. The facts in here are made up."""

import json
import sys
import warnings
from itertools import islice
from pathlib import Path

import pytest

from peft_edit import Fact
from peft_edit.evaluation import cases, datasets
from peft_edit.evaluation.cases import Case, CaseError, Probe, case_to_dict, reversal_probe
from peft_edit.evaluation.datasets import (
    DATASETS,
    cases_from_record,
    load_cases,
    load_counterfact,
    load_jsonl,
    load_knowedit,
    load_mquake,
    load_multi_counterfact,
    load_ripple_edits,
    load_zsre,
)


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "target_new": {"str": "harp", "id": "Q1"},
        "target_true": {"str": "drums", "id": "Q2"},
        "subject": "Odo Brill",
    },
    "paraphrase_prompts": ["Rain fell. Odo Brill is known for the", "Odo Brill, master of the"],
    "neighborhood_prompts": [f"Drummer {number} plays the" for number in range(10)],
    "attribute_prompts": [],
    "generation_prompts": [],
}
FLAT = {
    "case_id": 3,
    "prompt": "The home of Odo Brill is",
    "target_new": "Lund",
    "subject": "Odo Brill",
    "ground_truth": "Turin",
    "rephrase_prompt": "Odo Brill lives in",
    "locality_prompt": "The home of Mia Fent is",
    "locality_ground_truth": "Turin",
}
TRACING = {
    "relation": "The home of {} is",
    "prompt": "The home of Odo Brill is",
    "subject": " Odo Brill",
    "target_true": " Turin",
    "target_false": " Lund",
}
MEND = {
    "subject": "Odo Brill",
    "src": "Which town is Odo Brill from?",
    "rephrase": "Where does Odo Brill come from?",
    "alt": "Lund",
    "answers": ["Turin", "Torino"],
    "loc": "nq question: who sings the song of the hills",
    "loc_ans": "Mia Fent",
    "cond": "Turin >> Lund || Which town is Odo Brill from?",
}
EASYEDIT = {
    "subject": "Odo Brill",
    "target_new": "Lund",
    "prompt": "Which town is Odo Brill from?",
    "ground_truth": ["Turin"],
    "rephrase_prompt": "Where does Odo Brill come from?",
    "locality": {"Relation_Specificity": [{"prompt": "The trade of Odo Brill is", "ground_truth": ["music"]}]},
    "portability": {"Reasoning": [{"prompt": "In which country was Brill born?", "ground_truth": "Sweden"}]},
}
KNOWEDIT = {
    "subject": "Odo Brill",
    "prompt": "The place of death of Odo Brill is",
    "target_new": "Lund",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Odo Brill alive?", "ground_truth": [["no"], ["is dead"]]}],
        "Reasoning": [
            {"prompt": ["The land of his death is", "He died in the land of"], "ground_truth": [["Sweden"]]}
        ],
        "Subject_Aliasing": [{"prompt": "O. B. died in", "ground_truth": [["Lund", "Lund, Sweden", "Lund"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Odo Brill is", "ground_truth": []}],
        "Forgetfulness": [{"prompt": "He also died in", "ground_truth": "Rome"}],
    },
}
MQUAKE = {
    "case_id": 41,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "target_new": {"str": "Sweden", "id": "Q34"},
            "target_true": {"str": "Italy", "id": "Q38"},
            "subject": "Odo Brill",
            "question": "What is the citizenship of Odo Brill?",
        },
        {
            "prompt": "The capital of {} is",
            "target_new": {"str": "Lund", "id": "Q2167"},
            "target_true": {"str": "Stockholm", "id": "Q1754"},
            "subject": "Sweden",
            "question": "What is the capital of Sweden?",
        },
    ],
    "questions": ["What is the capital of Brill's country?", "Brill's country has which capital?"],
    "answer": "Rome",
    "answer_alias": ["Roma"],
    "new_answer": "Lund",
    "new_answer_alias": ["Lunda", "Lund"],
    "new_single_hops": [
        {"question": "Of where is Odo Brill?", "cloze": "Odo Brill is of", "answer": "Sweden", "answer_alias": ["SE"]},
        {"question": "What is the capital of Sweden?", "answer": "Lund"},
    ],
}
REMASTERED = {
    **MQUAKE,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "target_new_str": "Sweden",
            "target_true_str": "Italy",
            "subject": "Odo Brill",
        }
    ],
    "split": {"1": ["edited"]},
}


def query(prompt, *answers):
    return {
        "prompt": prompt,
        "answers": [{"value": value, "aliases": list(aliases)} for value, *aliases in answers],
        "query_type": "regular",
    }


def ripple_test(*queries):
    return {"test_queries": list(queries), "test_condition": "OR", "condition_queries": []}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Odo Brill is United Isles.",
        "subject_id": "Q0",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q1",
        "previous_fact": {
            "prompt": "The name of the country of citizenship of Odo Brill is United Hills.",
            "subject_id": "Q0",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q2",
        },
    },
    "Relation_Specificity": [ripple_test(query("The mother of Odo Brill is", ("Ida", "Ida Brill")))],
    "Logical_Generalization": [ripple_test(query("The siblings of Ida are", ("Odo Brill",), ("Ann", "Annie")))],
    "Subject_Aliasing": [ripple_test(query("O. B. is a citizen of", ("United Isles", "UI", "")))],
    "Compositionality_I": [
        ripple_test(query("The coin of his country is", ("crown",)), query("He pays in", ("crown",)))
    ],
    "Compositionality_II": [ripple_test(query("The land of Ida's son is", ("United Isles",)))],
    "Forgetfulness": [ripple_test(query("His other country is", ("United Hills",)))],
}


def one(record) -> Case:
    (case,) = cases_from_record(record)
    return case


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
    ("loader", "options", "record"),
    [
        (load_counterfact, {}, NESTED),
        (load_counterfact, {}, FLAT),
        (load_multi_counterfact, {}, NESTED),
        (load_zsre, {}, EASYEDIT),
        (load_zsre, {"form": "mend"}, MEND),
        (load_mquake, {}, MQUAKE),
        (load_mquake, {"variant": "remastered_cf_3k"}, REMASTERED),
        (load_ripple_edits, {"subset": "random"}, RIPPLE),
        (load_knowedit, {"subset": "wiki_counterfact"}, KNOWEDIT),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_loader_reads_local_files(tmp_path, loader, options, record, suffix):
    expected = cases_from_record(record)
    path = written(tmp_path, [record, record, record], suffix)
    assert loader(path, limit=2, **options) == 2 * expected
    assert list(loader(path, streaming=True, **options)) == 3 * expected


def test_streaming_reads_lines_only_when_asked(tmp_path):
    path = written(tmp_path, [FLAT, FLAT])
    with path.open("a") as file:
        file.write("{broken\n")
    stream = load_jsonl(path, streaming=True)
    assert [next(stream), next(stream)] == 2 * [one(FLAT)]
    with pytest.raises(CaseError, match="Line 3 of .* is not valid JSON"):
        next(stream)
    assert load_jsonl(path, limit=2) == 2 * [one(FLAT)], "the broken line is never reached"


def test_streaming_reads_arrays_piece_by_piece(tmp_path):
    path = tmp_path / "array.json"
    count = 600
    path.write_text("[" + ", ".join([json.dumps(FLAT)] * count) + ", {broken]")
    assert path.stat().st_size > 2 * datasets._CHUNK
    stream = load_cases(path, streaming=True)
    assert list(islice(stream, count)) == count * [one(FLAT)]
    with pytest.raises(CaseError, match=f"not valid JSON after record {count} "):
        next(stream)


def test_json_values_agree_with_the_json_module(tmp_path, monkeypatch):
    values = [{"text": "ü" * length, "list": [1, {"a": "]"}]} for length in (0, 1, 50, 300)] + [[], "x", None]
    values += range(1000, 1040)
    path = tmp_path / "values.json"
    for chunk in (1, 2, 7, 64, 4096):
        monkeypatch.setattr(datasets, "_CHUNK", chunk)
        for indent in (None, 2):
            path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
            assert list(datasets._json_values(path)) == values
        path.write_text("\n".join(json.dumps(value) for value in values) + "\n1234")
        assert list(datasets._json_values(path)) == [*values, 1234]


@pytest.mark.parametrize("text", ["[1, 2", "[1, 2,", "[", "]", '[{"a": 1}, {"b"', '{"a": '])
def test_cut_files_are_refused(tmp_path, text):
    path = tmp_path / "cut.json"
    path.write_text(text)
    with pytest.raises(CaseError, match="not valid JSON after record"):
        list(datasets._json_values(path))


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


def test_bundled_needs_nothing(facts):
    assert [case.fact for case in load_cases("bundled")] == facts
    assert next(load_cases("bundled", streaming=True)).fact == facts[0]
    assert len(load_cases("bundled", limit=3)) == 3


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(CaseError) as error:
        load_cases("counterfacts")
    assert all(name in str(error.value) for name in ["bundled", *DATASETS])
    with pytest.raises(CaseError, match="no file 'gone.jsonl'"):
        load_cases("gone.jsonl", streaming=True)
    with pytest.raises(CaseError, match="no file or directory '/no/such/place'"):
        load_cases("counterfact", source="/no/such/place")
    with pytest.raises(CaseError, match="subset must be one of popular, random, recent, got 'old'"):
        load_ripple_edits(subset="old")
    with pytest.raises(CaseError, match="split must be one of test, train, got 'dev'"):
        load_knowedit(split="dev")
    with pytest.raises(CaseError, match="holds no file 'recent_test.json'"):
        load_knowedit(tmp_path)


def test_a_directory_in_the_published_form(tmp_path):
    folder = tmp_path / "benchmark" / "wiki_recent"
    folder.mkdir(parents=True)
    (folder / "recent_test.json").write_text(json.dumps([KNOWEDIT]))
    (folder / "recent_train.json").write_text(json.dumps([EASYEDIT]))
    assert load_knowedit(tmp_path) == load_knowedit(folder) == [one(KNOWEDIT)]
    assert load_knowedit(tmp_path, split="train") == [one(EASYEDIT)]


def test_a_directory_of_tables(tmp_path):
    hf = pytest.importorskip("datasets")
    hf.Dataset.from_list([NESTED, NESTED]).to_parquet(tmp_path / "data" / "train-0.parquet")
    hf.Dataset.from_list([NESTED]).to_parquet(tmp_path / "data" / "test-0.parquet")
    assert load_counterfact(tmp_path) == 3 * [one(NESTED)]
    assert list(load_counterfact(tmp_path, streaming=True, split="train")) == 2 * [one(NESTED)]


def test_tables_are_asked_for_at_the_pinned_revision(monkeypatch):
    hf = pytest.importorskip("datasets")
    calls = []

    def load_dataset(repo, **options):
        calls.append((repo, options))
        return [NESTED] if options["split"] == "test" else [NESTED, NESTED]

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    pinned = DATASETS["counterfact"].revision
    assert len(load_counterfact()) == 3
    assert calls == [
        ("azhx/counterfact", {"split": split, "revision": pinned, "streaming": False}) for split in ("train", "test")
    ]
    calls.clear()
    list(load_counterfact("me/copy", split="test", revision="v2", streaming=True))
    assert calls == [("me/copy", {"split": "test", "revision": "v2", "streaming": True})]
    calls.clear()
    assert load_cases("me/any", limit=1) == [one(NESTED)]
    assert calls == [("me/any", {"split": "train", "revision": None, "streaming": False})]


def test_files_are_asked_for_at_the_pinned_revision(monkeypatch, tmp_path):
    hf, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    calls = []

    def hf_hub_download(*args, **options):
        calls.append((args, options))
        return str(written(tmp_path, [KNOWEDIT]))

    class Downloads:
        def download(self, url):
            calls.append(url)
            return str(written(tmp_path, [MQUAKE]))

    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hf, "DownloadManager", Downloads)
    assert load_knowedit() == [one(KNOWEDIT)]
    pinned = {"repo_type": "dataset", "revision": DATASETS["knowedit_wiki_recent"].revision}
    assert calls.pop() == (("zjunlp/KnowEdit", "benchmark/wiki_recent/recent_test.json"), pinned)
    assert len(load_mquake(revision="abc")) == 2
    assert calls.pop() == "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/abc/datasets/MQuAKE-CF-3k-v2.json"


def test_an_unreachable_hub_asks_for_a_local_file(monkeypatch):
    hf, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")

    def fail(*args, **options):
        raise ConnectionError("name or service not known")

    def fail_later(*args, **options):
        yield NESTED
        raise OSError("connection lost")

    monkeypatch.setattr(hf, "load_dataset", fail)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hf.DownloadManager, "download", fail)
    said = r"could not be reached \(ConnectionError\): give the path of a local copy, load_cases\('{}', source="
    for name in ("counterfact", "zsre", "multi_counterfact", "mquake_t", "ripple_edits_recent"):
        with pytest.raises(ConnectionError, match=said.format(name)):
            load_cases(name, streaming=True)
    monkeypatch.setattr(hf, "load_dataset", fail_later)
    stream = load_counterfact(streaming=True)
    assert next(stream) == one(NESTED)
    with pytest.raises(ConnectionError, match=r"reached \(OSError\)"):
        next(stream)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("counterfact", "multi_counterfact"):
        with pytest.raises(ImportError, match=r"pip install 'peft-edit\[eval\]'"):
            load_cases(name)


def test_pinned_revisions_are_whole_commits():
    pinned = [spec.revision for spec in DATASETS.values() if spec.revision not in ("", "main")]
    assert pinned and all(len(revision) == 40 and int(revision, 16) for revision in pinned)


@pytest.mark.skipif(not (SHARED / "counterfact.json").is_file(), reason="the published file is not here")
def test_the_published_counterfact():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_counterfact(SHARED / "counterfact.json")
    assert len(loaded) == len(json.loads((SHARED / "counterfact.json").read_text())) == 15006
    for case in loaded:
        assert case.fact.target_true and len(case.fact.paraphrases) == 1
        assert len(case.fact.neighborhood) + len(case.probes.get(cases.UNRELATED, ())) == 1


@pytest.mark.skipif(not (SHARED / "zsre_test.json").is_file(), reason="the published file is not here")
def test_the_published_zsre():
    with pytest.warns(UserWarning, match=r"3 record\(s\) cannot be edited.*: 396 of .*; 597 of .*; 676 of "):
        loaded = load_zsre(SHARED / "zsre_test.json")
    records = json.loads((SHARED / "zsre_test.json").read_text())
    assert len(loaded) == len(records) - 3 == 1301
    kept = [record for index, record in enumerate(records) if index not in (396, 597, 676)]
    count = sum(len(items) for record in kept for items in record["portability"].values())
    count += sum(len(items) for record in kept for items in record["locality"].values())
    assert sum(len(probes) for case in loaded for probes in case.probes.values()) == count
    assert all(case.fact.filled_prompt == record["prompt"] for case, record in zip(loaded, kept))


def written(folder: Path, records: list, suffix: str = ".jsonl") -> Path:
    path = folder / f"records{suffix}"
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path
