"""The lm-evaluation-harness on edited models: a local task, offline."""

import json
import random
import sys

import numpy
import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.evaluation.harness import run_harness
from peft_edit.prompts import PromptEncoder


TASK = """
task: known_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(facts, tmp_path, monkeypatch):
    """A folder with a task that asks for the true or the new target of nine facts."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{"prompt": fact.filled_prompt, "right": fact.target_true, "wrong": fact.target} for fact in facts[:9]]
    data = tmp_path / "facts.jsonl"
    data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "known_facts.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return tasks


@pytest.fixture
def quick(folder):
    """That folder alone: the harness's own thousands of tasks take seconds to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def test_edited_model_unmerged(tiny, facts, folder, quick):
    base, tokenizer = tiny
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM"))
    model.collect_statistics([f"{fact.filled_prompt} {fact.target_true}." for fact in facts], tokenizer)
    before = run_harness(model, tokenizer, "known_facts", include_path=folder, batch_size=4)
    report = model.edit_facts(facts[:6], tokenizer, progress=False)
    recalled = sum(fact.recalled for fact in report.facts)
    assert recalled >= 5
    edited = run_harness(model, tokenizer, "known_facts", task_manager=quick, batch_size=4)

    assert before["results"]["known_facts"]["acc,none"] == 1.0  # the tiny model knows them
    assert edited["results"]["known_facts"]["acc,none"] <= (9 - recalled) / 9
    assert edited["results"]["known_facts"]["acc_stderr,none"] > 0
    encoder = PromptEncoder(tokenizer, base.config.vocab_size)
    for sample in edited["samples"]["known_facts"]:
        for target, answers in zip((sample["doc"]["right"], sample["doc"]["wrong"]), sample["resps"]):
            ids, answer = encoder.continuation_ids(sample["doc"]["prompt"], target)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(ids) - 1 + step, token]) for step, token in enumerate(answer))
            assert answers[0][0] == pytest.approx(expected, abs=1e-3)


def test_options_are_passed_on_and_nothing_is_left_behind(tiny, quick):
    model, tokenizer = tiny
    tokenizer.pad_token = None
    model.train()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    found = run_harness(
        model,
        tokenizer,
        ["known_facts"],
        num_fewshot=2,
        limit=3,
        task_manager=quick,
        model_options={"max_length": 120},
        log_samples=False,
        bootstrap_iters=0,
    )
    assert found["n-shot"]["known_facts"] == 2 and found["n-samples"]["known_facts"]["effective"] == 3
    assert found["max_length"] == 120 and "samples" not in found
    assert found["config"]["bootstrap_iters"] == 0
    assert model.training and tokenizer.pad_token is None
    assert random.getstate() == states[0] and numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_task_as_a_mapping(tiny, folder, quick):
    import yaml

    configuration = yaml.safe_load((folder / "known_facts.yaml").read_text(encoding="utf-8"))
    found = run_harness(*tiny, configuration, limit=2, task_manager=quick, bootstrap_iters=0)
    assert found["results"]["known_facts"]["acc,none"] == 1.0
    assert len(found["samples"]["known_facts"]) == 2


def test_task_manager_and_folders_exclude_each_other(tiny, folder):
    with pytest.raises(TypeError, match="exclude each other"):
        run_harness(*tiny, "known_facts", include_path=folder, task_manager=object())


def test_without_the_harness(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-edit\[harness\]'.*pip install lm_eval"):
        run_harness(*tiny, "hellaswag")


def test_without_tasks(tiny):
    with pytest.raises(ValueError, match="no tasks to run"):
        run_harness(*tiny, [])
