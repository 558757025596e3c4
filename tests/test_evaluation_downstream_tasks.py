"""Downstream tasks: records become questions, prompts, shots, malformed files, the Hub, the real files."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from peft_edit.evaluation.downstream import downstream_scores
from peft_edit.evaluation.downstream_tasks import TASKS, Example, few_shot_prompt, load_task, split_shots

from .toy_task import toy


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "downstream"

MMLU = {"question": "Which is a colour?", "choices": ["Red", "Dog", "Run", "Two"], "answer": 0, "subject": "art"}
RECORDS = {
    "sst2": {"sentence": "a dull film ", "label": 0},
    "mrpc": {"sentence1": "He ran .", "sentence2": "He was running .", "label": 1},
    "cola": {"sentence": "Cats sleeps.", "label": 0},
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    "nli": {"index": "3", "sentence1": "It rains.", "sentence2": "It is {dry}.", "label": "not_entailment"},
    "mmlu": MMLU,
}


def write(folder, name, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- records and prompts ---------------------------------------------------------------------------------------------

QUESTIONS = {
    "sst2": ("Review: a dull film\nSentiment:", "negative"),
    "mrpc": ("First: He ran .\nSecond: He was running .\nSame meaning:", "yes"),
    "cola": ("Sentence: Cats sleeps.\nGrammatical:", "no"),
    "rte": ("Text: It rains.\nClaim: It is wet.\nFollows:", "yes"),
    "nli": ("Premise: It rains.\nHypothesis: It is {dry}.\nThe hypothesis is", "false"),
    "mmlu": ("Question: Which is a colour?\nA. Red\nB. Dog\nC. Run\nD. Two\nAnswer:", "A"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_record_becomes_a_question(name, tmp_path):
    write(tmp_path, name, [RECORDS[name]])
    task = load_task(name, tmp_path)
    (example,) = task.examples
    assert (example.text, task.words[example.label]) == QUESTIONS[name]
    assert len(task.words) == len(TASKS[name].label_names)


def test_labels_may_be_indices_digits_or_the_datasets_names(tmp_path):
    labels = [0, "0", "entailment", 1, "1", "not_entailment"]
    write(tmp_path, "rte", [{**RECORDS["rte"], "label": label} for label in labels])
    assert [example.label for example in load_task("rte", tmp_path).examples] == [0, 0, 0, 1, 1, 1]


def test_prompt_is_instruction_shots_and_question():
    shots = [Example("Number 1\nIs it small:", 1), Example("Number 90\nIs it small:", 0)]
    prompt = few_shot_prompt(toy(), shots, Example("Number 7\nIs it small:", 0))
    assert prompt == (
        "Small or not?\n\nNumber 1\nIs it small: yes\n\nNumber 90\nIs it small: no\n\nNumber 7\nIs it small:"
    )
    assert few_shot_prompt(toy(instruction=""), [], Example("Number 7\nIs it small:", 0)) == "Number 7\nIs it small:"


# --- shots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(9))
def test_shots_are_balanced_and_never_scored(count):
    task = toy()
    shots, asked = split_shots(task, count, seed=1)
    labels = [shot.label for shot in shots]
    assert len(shots) == count and abs(labels.count(0) - labels.count(1)) <= 1
    assert not {shot.text for shot in shots} & {example.text for example in asked}
    assert [example for example in task.examples if example not in shots] == asked
    assert len(asked) == 12 - count


def test_a_shot_that_stands_twice_in_the_data_is_scored_in_neither_place():
    task = toy(count=6, positives=3)
    doubled = replace(task, examples=task.examples + task.examples)
    for seed in range(5):
        shots, asked = split_shots(doubled, 2, seed)
        assert len({shot.text for shot in shots}) == 2 and len(asked) == 8
        assert not {shot.text for shot in shots} & {example.text for example in asked}


def test_shots_depend_on_the_seed_alone():
    chosen = [split_shots(toy(), 4, seed)[0] for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(shots) for shots in chosen}) > 1


def test_too_many_shots():
    with pytest.raises(ValueError, match="too few examples with the answer 'yes' for 10 shots"):
        split_shots(toy(), 10)
    with pytest.raises(ValueError, match="no example left beside 4 shots"):
        split_shots(toy(count=4, positives=2), 4)
    with pytest.raises(ValueError, match="must not be negative"):
        split_shots(toy(), -1)


# --- files, the Hub, errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sst", "SST2", ""])
def test_unknown_task(name, tmp_path):
    with pytest.raises(ValueError, match="choose from sst2, mrpc, cola, rte, nli, mmlu"):
        load_task(name, tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="cola.jsonl.*give the folder"):
        load_task("cola", tmp_path)


@pytest.mark.parametrize(
    "name, record, message",
    [
        ("sst2", {"sentence": "fine", "label": 2}, "field 'label' must be 0 to 1 or one of negative, positive, got 2"),
        ("sst2", {"sentence": "fine", "label": -1}, "got -1"),
        ("sst2", {"sentence": "fine", "label": True}, "got True"),
        ("sst2", {"sentence": " ", "label": 1}, "field 'sentence' must be text that is not empty"),
        ("cola", {"label": 1}, "lacks the field 'sentence'; it has 'label'"),
        ("mrpc", {"sentence1": "a", "sentence2": 3, "label": 1}, "field 'sentence2' must be text"),
        ("rte", ["a", "b"], "must be a mapping, got list"),
        ("mmlu", {**MMLU, "choices": ["Red", "Dog"]}, "field 'choices' must be a list of four texts"),
        ("mmlu", {**MMLU, "choices": "ABCD"}, "field 'choices' must be a list of four texts"),
        ("mmlu", {**MMLU, "answer": 4}, "field 'answer' must be 0 to 3"),
        ("nli", "{broken", "is not valid JSON"),
    ],
)
def test_a_malformed_record_names_its_line(name, record, message, tmp_path):
    write(tmp_path, name, [RECORDS[name], record])
    with pytest.raises(ValueError, match=message) as error:
        load_task(name, tmp_path)
    assert f"Line 2 of '{tmp_path / name}.jsonl'" in str(error.value)


def test_empty_file_and_bad_limits(tmp_path, tiny):
    write(tmp_path, "rte", [])
    with pytest.raises(ValueError, match="has no rte records"):
        load_task("rte", tmp_path)
    with pytest.raises(ValueError, match="limit must be a positive number"):
        load_task("rte", tmp_path, limit=0)
    with pytest.raises(ValueError, match="limit must be a positive number"):
        downstream_scores(*tiny, [toy()], limit=0)


def test_tasks_of_ones_own_are_checked():
    with pytest.raises(ValueError, match="Example 1 of the task 'toy' has the label 2.*from 0 to 1"):
        toy(examples=(Example("a", 1), Example("b", 2)))
    with pytest.raises(ValueError, match="two different answers or more"):
        toy(words=("yes", "yes"))


def test_the_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-edit\[eval\]', or give source"):
        load_task("sst2")


def test_records_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        return [RECORDS["nli"] | {"label": 1}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_task("nli").examples == (Example(QUESTIONS["nli"][0], 1),)
    assert asked == [("nyu-mll/glue", "rte", "train")]


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="the tasks' files are not here")
@pytest.mark.parametrize(
    "name, counts",
    [
        ("sst2", [428, 428]),
        ("mrpc", [129, 129]),
        ("cola", [322, 322]),
        ("rte", [131, 131]),
        ("nli", [1249, 1240]),
        ("mmlu", [379, 379, 379, 379]),
    ],
)
def test_real_files(name, counts):
    task = load_task(name, REAL)
    labels = [example.label for example in task.examples]
    assert [labels.count(label) for label in range(len(task.words))] == counts
    some = load_task(name, REAL, limit=50, seed=2)
    assert len(some.examples) == 50 and set(some.examples) <= set(task.examples)
    assert some == load_task(name, REAL, limit=50, seed=2) != load_task(name, REAL, limit=50, seed=3)
