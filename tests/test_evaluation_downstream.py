"""Downstream scores: by hand, by the model's own probabilities, cut to the context window, by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peft_edit.evaluation import downstream
from peft_edit.evaluation.downstream import agreement, confusion_matrix, downstream_scores
from peft_edit.evaluation.downstream_tasks import DownstreamTask, Example, few_shot_prompt, split_shots
from peft_edit.prompts import PromptEncoder

from .toy_task import toy


ROOT = Path(__file__).resolve().parents[1]


class Judge:
    """Stands in for `score_targets`: a log-probability for every (prompt, answer), from the prompt's text."""

    def __init__(self, tokenizer, prefer):
        self.tokenizer, self.prefer, self.prompts, self.chunks = tokenizer, prefer, [], []

    def __call__(self, model, pairs, chunk):
        self.chunks.append(chunk)
        texts = [
            (self.tokenizer.decode(ids, skip_special_tokens=True), self.tokenizer.decode(answer).strip())
            for ids, answer in pairs
        ]
        self.prompts += [prompt for prompt, _ in texts]
        return SimpleNamespace(log_probability=torch.tensor([float(self.prefer(*text)) for text in texts]))


@pytest.fixture
def judged(tiny, monkeypatch):
    """Scores tasks as a given preference would; the tiny model only lends its tokenizer and its window."""
    model, tokenizer = tiny

    def score(task, prefer, **options):
        judge = Judge(tokenizer, prefer)
        monkeypatch.setattr(downstream, "score_targets", judge)
        scores = downstream_scores(model, tokenizer, [task], **options)
        return scores.tasks[task.name], judge

    return score


def test_the_model_reads_exactly_that_prompt_once_for_each_answer(judged):
    task = toy()
    shots, asked = split_shots(task, 2, seed=3)
    _, judge = judged(task, lambda prompt, answer: 0, shots=2, seed=3, batch_size=5)
    assert judge.prompts == [few_shot_prompt(task, shots, example) for example in asked for _ in task.words]
    assert judge.chunks == [5]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_model_that_always_says_no(judged):
    scores, _ = judged(toy(), lambda prompt, answer: answer == "no", shots=0)
    # 8 no, 4 yes; all answered no: F1 of no = 16 / (16 + 4), of yes = 0
    assert scores.accuracy == pytest.approx(100 * 8 / 12) and scores.majority == pytest.approx(100 * 8 / 12)
    assert scores.f1 == pytest.approx(100 * 0.8 * 8 / 12)
    assert scores.f1_macro == pytest.approx(40.0)
    assert scores.f1_binary == 0.0
    assert scores.matthews == 0.0
    assert scores.predicted == {"no": 12, "yes": 0}
    assert (scores.count, scores.shortened, scores.left_out, scores.invalid) == (12, 0, 0, 0)
    low, high = scores.accuracy_interval
    assert 30 < low < scores.accuracy < high < 100


def test_a_model_that_is_right(judged):
    small = {f"Number {index}\nIs it small:" for index in range(4)}
    scores, _ = judged(toy(), lambda prompt, answer: (answer == "yes") == (prompt.split("\n\n")[-1] in small), shots=2)
    assert scores.labels == scores.predictions and scores.count == 10
    assert (scores.accuracy, scores.f1, scores.f1_binary, scores.matthews) == (100.0, 100.0, 100.0, 1.0)
    assert scores.accuracy_interval == scores.f1_interval == (100.0, 100.0)


def test_what_is_not_a_number_is_wrong(judged):
    def prefer(prompt, answer):
        return float("nan") if "Number 11" in prompt and answer == "yes" else answer == "no"

    scores, _ = judged(toy(), prefer, shots=0)
    assert scores.invalid == 1 and scores.predictions[11] == -1
    assert scores.accuracy == pytest.approx(100 * 7 / 12)
    assert scores.predicted == {"no": 11, "yes": 0}
    assert scores.f1_binary == 0.0


def test_limit_draws_examples_in_the_order_of_the_data(judged):
    task = toy(count=40, positives=20)
    scores, judge = judged(task, lambda prompt, answer: 0, shots=2, limit=7)
    numbers = [int(prompt.split("Number ")[-1].split("\n")[0]) for prompt in judge.prompts[::2]]
    assert scores.count == 7 and numbers == sorted(numbers) and len(set(numbers)) == 7
    assert judge.prompts == judged(task, lambda prompt, answer: 0, shots=2, limit=7)[1].prompts
    assert judge.prompts != judged(task, lambda prompt, answer: 0, shots=2, limit=7, seed=1)[1].prompts


def test_the_models_own_probabilities_decide(tiny):
    """Against one pass of the model for each prompt with each answer."""
    model, tokenizer = tiny
    words = ("English", "French", "a city of old stones")  # of one token and of many
    texts = ["The mother tongue of Danielle Darrieux is", "Paris is", "The language they speak is"]
    task = DownstreamTask("tongues", words, examples=tuple(Example(text, i) for i, text in enumerate(texts)))
    encoder = PromptEncoder(tokenizer, model.config.vocab_size)
    expected = []
    for text in texts:
        means = []
        for word in words:
            prompt, answer = encoder.continuation_ids(text, word)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            means.append(sum(float(logits[place, token]) for place, token in zip(places, answer)) / len(answer))
        expected.append(int(np.argmax(means)))
    model.train()
    scores = downstream_scores(model, tokenizer, [task], shots=0, batch_size=2)
    assert scores.tasks["tongues"].predictions == tuple(expected)
    assert scores.tasks["tongues"].f1_binary is None
    assert model.training  # as it was


def test_agreement_of_a_confusion_matrix_by_hand():
    labels = [0] * 5 + [1] * 3 + [2] * 2
    predictions = [0, 0, 0, 1, -1] + [1, 1, 0] + [2, 1]
    confusion = confusion_matrix(labels, predictions, 3)
    assert confusion.tolist() == [[3, 1, 0, 1], [1, 2, 0, 0], [0, 1, 1, 0]]
    found = agreement(confusion, positive=1)
    f1 = [6 / (5 + 4), 4 / (3 + 4), 2 / (2 + 1)]
    assert found.accuracy == pytest.approx(60.0)
    assert found.f1 == pytest.approx(100 * (5 * f1[0] + 3 * f1[1] + 2 * f1[2]) / 10)
    assert found.f1_macro == pytest.approx(100 * sum(f1) / 3)
    assert found.f1_binary == pytest.approx(100 * f1[1])
    # Gorodkin's R_K: (6·10 − 5·4 − 3·4 − 2·1) / sqrt((100 − 25 − 9 − 4)(100 − 16 − 16 − 1 − 1))
    assert found.matthews == pytest.approx(26 / (62 * 66) ** 0.5)


def test_matthews_of_two_labels_by_hand():
    # TN 5, FP 1, FN 2, TP 4
    found = agreement(np.array([[5.0, 1.0, 0.0], [2.0, 4.0, 0.0]]), positive=1)
    assert found.matthews == pytest.approx((4 * 5 - 1 * 2) / (5 * 6 * 6 * 7) ** 0.5)
    assert found.f1_binary == pytest.approx(100 * 8 / 11)


def test_a_label_that_does_not_occur_is_not_in_the_macro_mean():
    found = agreement(confusion_matrix([0, 0, 1, 1], [0, 0, 1, 0], 3))
    assert found.f1_macro == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)


def test_confusion_needs_a_prediction_for_each_example():
    with pytest.raises(ValueError, match="one prediction per example, got 1 for 2"):
        confusion_matrix([0, 1], [0], 2)


def test_table_and_dictionary(judged, tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(downstream, "score_targets", Judge(tokenizer, lambda prompt, answer: answer == "no"))
    tasks = [toy(), toy(count=10, positives=5, name="other")]
    scores = downstream_scores(model, tokenizer, tasks, shots=0)
    assert scores.mean_accuracy == pytest.approx((100 * 8 / 12 + 50) / 2)
    assert scores.mean_f1 == pytest.approx((100 * 0.8 * 8 / 12 + 100 * (2 / 3) / 2) / 2)
    plain = json.loads(json.dumps(scores.to_dict()))
    assert plain["tasks"]["other"]["accuracy"] == 50.0 and "predictions" not in plain["tasks"]["other"]
    assert plain["mean_f1"] == scores.mean_f1 and plain["shots"] == 0
    rows = str(scores).splitlines()
    assert [row.split()[0] for row in rows] == ["task", "toy", "other", "mean"]
    assert "66.7" in rows[1] and "58.3" in rows[3]


# --- the context window ----------------------------------------------------------------------------------------------


def test_prompts_lose_their_first_shots_to_the_window(judged, tiny):
    model, tokenizer = tiny
    task = toy()
    shots, asked = split_shots(task, 4)
    encoder = PromptEncoder(tokenizer, model.config.vocab_size)

    def tokens(example, kept):
        prompt = few_shot_prompt(task, shots[4 - kept :], example)
        return max(sum(map(len, encoder.continuation_ids(prompt, word))) for word in task.words)

    window = max(tokens(example, 2) for example in asked)
    kept = [max(count for count in range(5) if tokens(example, count) <= window) for example in asked]
    assert 2 in kept
    scores, judge = judged(task, lambda prompt, answer: 0, shots=4, max_length=window)
    expected = [few_shot_prompt(task, shots[4 - count :], example) for example, count in zip(asked, kept)]
    assert judge.prompts[::2] == expected
    assert scores.shortened == sum(count < 4 for count in kept) == 8
    assert scores.left_out == 0


def test_examples_that_never_fit_are_left_out_and_counted(judged):
    long = Example("word " * 300 + "\nIs it small:", 1)
    task = toy(examples=(*toy().examples, long))
    scores, judge = judged(task, lambda prompt, answer: answer == "no", shots=0)
    assert scores.left_out == 1 and scores.count == 12
    assert not any("word word" in prompt for prompt in judge.prompts)
    with pytest.raises(ValueError, match="None of the 1 examples of 'toy' fits in 256 tokens"):
        judged(toy(examples=(long,)), lambda prompt, answer: 0, shots=0)


def test_which_tasks(tiny):
    with pytest.raises(ValueError, match="must be a list of tasks"):
        downstream_scores(*tiny, "sst2")
    with pytest.raises(ValueError, match="must be a list of tasks"):
        downstream_scores(*tiny, [])
    with pytest.raises(ValueError, match="different from each other, got toy, toy"):
        downstream_scores(*tiny, [toy(), toy()])


# --- several processes -----------------------------------------------------------------------------------------------


PROCESS = """
import json, sys
from torch import distributed
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
from peft_edit.tiny import load_tiny_model
from tests.test_evaluation_downstream import downstream, downstream_scores, toy
calls = []
plain = downstream.score_targets
downstream.score_targets = lambda model, pairs, chunk: calls.append(len(pairs)) or plain(model, pairs, chunk)
found = downstream_scores(*load_tiny_model(), [toy(count=9)], shots=2)
differing = toy(count=9 + rank)
try:
    downstream_scores(*load_tiny_model(), [differing], shots=2)
    error = ""
except ValueError as raised:
    error = str(raised)
json.dump([found.tasks["toy"].predictions, found.to_dict(), calls, error], open(f"{folder}/{rank}.json", "w"))
distributed.barrier()  # a process that leaves first may take the other's connections with it
distributed.destroy_process_group()
"""


def test_two_processes_share_the_examples_and_agree(tmp_path, tiny):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    alone = downstream_scores(*tiny, [toy(count=9)], shots=2)
    for rank, pairs in enumerate(([8], [6])):  # seven examples, two answers each
        predictions, scores, calls, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tuple(predictions) == alone.tasks["toy"].predictions
        assert scores == json.loads(json.dumps(alone.to_dict()))
        assert calls == pairs
        assert "different downstream tasks or examples" in error
