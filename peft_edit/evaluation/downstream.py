"""Downstream scores: what a model can still do besides the edited facts, asked of it by label probability."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from ..hooks import evaluating
from ..prompts import PromptEncoder, context_window
from ..scoring import score_targets
from ..sharded import runnable
from ..workers import Workers
from .bootstrap import percentile_interval, resampled_means
from .downstream_tasks import (
    TASKS,
    DownstreamTask,
    Example,
    check_limit,
    draw,
    few_shot_prompt,
    load_task,
    split_shots,
)


@dataclass(frozen=True)
class Agreement:
    """How predicted labels agree with the right ones. All in percent but `matthews`.

    Args:
        accuracy (`float`): Share that is right.
        f1 (`float`): Mean over labels of their F1, weighted by how often each is right; the one editing papers report.
        f1_macro (`float`): The plain mean over the labels that occur, as right answer or as prediction.
        f1_binary (`float`, *optional*): F1 of the positive label, where the task has one.
        matthews (`float`): Matthews correlation, −1 to 1; 0 where it is undefined (Gorodkin, 2004, for > 2 labels).
    """

    accuracy: float
    f1: float
    f1_macro: float
    f1_binary: float | None
    matthews: float


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int], number_of_labels: int) -> np.ndarray:
    """How often each label L was predicted as each label.

    Args:
        labels (`Sequence[int]`): The right label of each example.
        predictions (`Sequence[int]`): The predicted one; −1 where there is none, which is wrong for every label.
        number_of_labels (`int`): L.

    Returns:
        `np.ndarray`: (L, L + 1) float64 counts, a row for each right label; the last column counts no prediction.

    Raises:
        ValueError: if there are no examples, or not one prediction for each.
    """
    if not labels or len(labels) != len(predictions):
        raise ValueError(f"There must be one prediction per example, got {len(predictions)} for {len(labels)}.")
    return _cells(labels, predictions, number_of_labels).sum(0).reshape(number_of_labels, -1)


def _cells(labels: Sequence[int], predictions: Sequence[int], number_of_labels: int) -> np.ndarray:
    """(N, L · (L + 1)): a one at each example's place in the confusion matrix."""
    cells = np.zeros((len(labels), number_of_labels, number_of_labels + 1))
    cells[np.arange(len(labels)), labels, predictions] = 1.0
    return cells.reshape(len(labels), -1)


def label_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of every label, 2 TP / (2 TP + FP + FN): (..., L, L + 1) -> (..., L); 0 for a label that does not occur."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    occurs = confusion.sum(-1) + confusion[..., :-1].sum(-2)
    return 2.0 * right / np.where(occurs > 0, occurs, 1.0)


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of labels, averaged with their frequency as weights: (..., L, L + 1) -> (...)."""
    actual = confusion.sum(-1)
    return (label_f1(confusion) * actual).sum(-1) / actual.sum(-1)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share on the diagonal: (..., L, L + 1) -> (...)."""
    return np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1) / confusion.sum((-2, -1))


def agreement(confusion: np.ndarray, positive: int | None = None) -> Agreement:
    """Accuracy, F1 and Matthews correlation.

    Args:
        confusion (`np.ndarray`): (L, L + 1), as `confusion_matrix` gives it.
        positive (`int`, *optional*): The label of binary F1.
    """
    f1 = label_f1(confusion)
    occurs = confusion.sum(-1) + confusion[:, :-1].sum(0) > 0
    return Agreement(
        accuracy=100.0 * float(accuracy(confusion)),
        f1=100.0 * float(weighted_f1(confusion)),
        f1_macro=100.0 * float(f1[occurs].mean()),
        f1_binary=None if positive is None else 100.0 * float(f1[positive]),
        matthews=_matthews(confusion),
    )


def _matthews(confusion: np.ndarray) -> float:
    total, actual, predicted = confusion.sum(), confusion.sum(-1), confusion.sum(0)
    covariance = np.trace(confusion) * total - actual @ predicted[:-1]
    spread = (total**2 - actual @ actual) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread else 0.0


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task, in percent but `matthews`.

    Args:
        accuracy (`float`), f1 (`float`), f1_macro (`float`), f1_binary (`float`, *optional*), matthews (`float`): As
            in `Agreement`; `f1` is the weighted one.
        accuracy_interval (`tuple[float, float]`), f1_interval (`tuple[float, float]`): Bootstrap over examples.
        majority (`float`): Accuracy of always giving the most frequent label.
        count (`int`): Examples that were scored.
        shortened (`int`): How many of them lost shots to the context window.
        left_out (`int`): Examples that do not fit in it even without shots; they are not scored.
        invalid (`int`): Scored examples for which the model gave NaN; they count as wrong.
        predicted (`dict[str, int]`): How often each answer was given. A broken model gives one answer only.
        words (`tuple[str, ...]`): The answers, by label.
        labels (`tuple[int, ...]`), predictions (`tuple[int, ...]`): Right and predicted label (−1: none) of each
            scored example, in the order of the data; for comparing two models example by example.
    """

    accuracy: float
    f1: float
    f1_macro: float
    f1_binary: float | None
    matthews: float
    accuracy_interval: tuple[float, float]
    f1_interval: tuple[float, float]
    majority: float
    count: int
    shortened: int
    left_out: int
    invalid: int
    predicted: dict[str, int]
    words: tuple[str, ...]
    labels: tuple[int, ...]
    predictions: tuple[int, ...]


@dataclass(frozen=True)
class DownstreamScores:
    """Scores of several tasks.

    Args:
        tasks (`dict[str, TaskScores]`): By the tasks' names.
        shots (`int`): Examples shown in each prompt.
        seed (`int`): Seed of the choice of shots and examples.
    """

    tasks: dict[str, TaskScores]
    shots: int
    seed: int

    @property
    def mean_f1(self) -> float:
        """Mean of the tasks' weighted F1, in percent."""
        return sum(task.f1 for task in self.tasks.values()) / len(self.tasks)

    @property
    def mean_accuracy(self) -> float:
        """Mean of the tasks' accuracies, in percent."""
        return sum(task.accuracy for task in self.tasks.values()) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping, without the single examples."""
        tasks = {name: asdict(task) for name, task in self.tasks.items()}
        for task in tasks.values():
            del task["labels"], task["predictions"], task["words"]
        return {
            "tasks": tasks,
            "mean_f1": self.mean_f1,
            "mean_accuracy": self.mean_accuracy,
            "shots": self.shots,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        width = max(len("task"), *map(len, self.tasks))
        lines = [f"{'task':<{width}}  accuracy     F1      interval    MCC  majority  count"]
        for name, task in self.tasks.items():
            lines.append(
                f"{name:<{width}}  {task.accuracy:>8.1f} {task.f1:>6.1f} {_interval(task.f1_interval):>13} "
                f"{task.matthews:>6.2f} {task.majority:>9.1f} {task.count:>6}{_remarks(task)}"
            )
        lines.append(f"{'mean':<{width}}  {self.mean_accuracy:>8.1f} {self.mean_f1:>6.1f}")
        return "\n".join(lines)


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.1f}, {ends[1]:.1f}]"


def _remarks(task: TaskScores) -> str:
    counts = {"with fewer shots": task.shortened, "too long": task.left_out, "not finite": task.invalid}
    found = [f"{count} {what}" for what, count in counts.items() if count]
    return f"  ({', '.join(found)})" if found else ""


def downstream_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | DownstreamTask] = tuple(TASKS),
    source: str | PathLike[str] | None = None,
    shots: int = 4,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    max_length: int | None = None,
    confidence: float = 0.95,
) -> DownstreamScores:
    """Scores few-shot classification; the answer is the label word with the highest mean log-probability per token.

    In a run of several processes each scores its share of the examples, and all get the same scores.

    Args:
        model: The edited (or base) model, a PEFT model or a plain one.
        tokenizer: Its tokenizer.
        tasks (`Sequence[str | DownstreamTask]`): Names that `load_task` knows, or tasks of your own.
        source (`str`, *optional*): The folder of the tasks' files; see `load_task`.
        shots (`int`): Examples shown with their answers, the same ones in every prompt of a task, balanced over the
            labels and never scored themselves. A prompt that would exceed the context window drops the first ones.
        limit (`int`, *optional*): Score this many examples per task, drawn at random.
        batch_size (`int`): Prompts per forward pass.
        seed (`int`): Seed of the choice of shots and examples, and of the bootstrap.
        max_length (`int`, *optional*): Tokens that a prompt and its answer may take; by default the model's
            context window.
        confidence (`float`): Of the intervals.

    Returns:
        `DownstreamScores`: scores of every task.

    Raises:
        ValueError: if there is no task, one is unknown or given twice, its records are malformed or too few, or none
            of its examples fits in the context window.
        FileNotFoundError: if `source` lacks a task's file.
        ImportError: if `datasets` is needed and not installed.
    """
    names = [task if isinstance(task, str) else task.name for task in tasks]
    if isinstance(tasks, str) or not names:
        raise ValueError(f"tasks must be a list of tasks such as ['sst2'], got {tasks!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must be different from each other, got {', '.join(names)}.")
    check_limit(limit)
    workers = Workers.of(model)
    loaded = workers.together(lambda: [_prepared(task, source, shots, limit, seed) for task in tasks])
    workers.check_same(_digest(loaded), "downstream tasks or examples")
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)
    window = max_length or context_window(model.config)
    scores = {}
    with evaluating(model), runnable(model):
        for task, shown in loaded:
            answers = _answer(model, encoder, task, shown, window, batch_size, workers)
            scores[task.name] = _task_scores(task, *answers, len(shown), confidence, seed)
    return DownstreamScores(tasks=scores, shots=shots, seed=seed)


def _prepared(
    task: str | DownstreamTask, source: str | PathLike[str] | None, shots: int, limit: int | None, seed: int
) -> tuple[DownstreamTask, list[Example]]:
    """A task with the examples to score, and the shots."""
    whole = load_task(task, source) if isinstance(task, str) else task
    shown, asked = split_shots(whole, shots, seed)
    asked = draw(asked, limit, whole.name, seed)
    return (
        DownstreamTask(whole.name, whole.words, whole.instruction, whole.positive, examples=tuple(asked)),
        shown,
    )


def _digest(loaded: Sequence[tuple[DownstreamTask, list[Example]]]) -> str:
    return hashlib.sha256(repr(loaded).encode()).hexdigest()


def _answer(
    model: Any,
    encoder: PromptEncoder,
    task: DownstreamTask,
    shots: Sequence[Example],
    window: int | None,
    batch_size: int,
    workers: Workers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (E, labels) of the answers, and how many shots each prompt had (E,): −1 where none fits."""

    def answer(own: list[int]) -> list[torch.Tensor]:
        encoded = [_encode(encoder, task, shots, task.examples[place], window) for place in own]
        fitting = [row for row, (pairs, _) in enumerate(encoded) if pairs]
        found = torch.full((len(own), len(task.words)), torch.nan)
        if fitting:
            pairs = [pair for row in fitting for pair in encoded[row][0]]
            found[fitting] = score_targets(model, pairs, chunk=batch_size).log_probability.view(len(fitting), -1)
        return [found, torch.tensor([used for _, used in encoded])]

    log_probability, used = workers.rows(len(task.examples), answer)
    if int(used.max()) < 0:
        raise ValueError(
            f"None of the {len(task.examples)} examples of {task.name!r} fits in {window} tokens, even without shots: "
            "take a model with a larger context window, or raise max_length."
        )
    return log_probability, used


def _task_scores(
    task: DownstreamTask, log_probability: torch.Tensor, used: torch.Tensor, shots: int, confidence: float, seed: int
) -> TaskScores:
    """Scores from what `_answer` gave."""
    kept = used >= 0
    log_probability = log_probability[kept]
    valid = log_probability.isfinite().all(-1)
    predictions = torch.where(valid, log_probability.argmax(-1), -1).tolist()
    labels = [example.label for example, keep in zip(task.examples, kept.tolist()) if keep]
    size = len(task.words)
    resampled = resampled_means(_cells(labels, predictions, size), seed=seed).reshape(-1, size, size + 1)
    return TaskScores(
        **asdict(agreement(confusion_matrix(labels, predictions, size), task.positive)),
        accuracy_interval=percentile_interval(100.0 * accuracy(resampled), confidence),
        f1_interval=percentile_interval(100.0 * weighted_f1(resampled), confidence),
        majority=100.0 * max(labels.count(label) for label in range(size)) / len(labels),
        count=len(labels),
        shortened=int((used[kept] < shots).sum()),
        left_out=int((~kept).sum()),
        invalid=int((~valid).sum()),
        predicted={word: predictions.count(label) for label, word in enumerate(task.words)},
        words=task.words,
        labels=tuple(labels),
        predictions=tuple(predictions),
    )


def _encode(
    encoder: PromptEncoder,
    task: DownstreamTask,
    shots: Sequence[Example],
    example: Example,
    window: int | None,
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Token ids of the prompt with each answer, and with how many shots it fits in the window: −1 if not at all."""
    for used in range(len(shots), -1, -1):
        prompt = few_shot_prompt(task, shots[len(shots) - used :], example)
        pairs = [encoder.continuation_ids(prompt, word) for word in task.words]
        if window is None or max(len(ids) + len(answer) for ids, answer in pairs) <= window:
            return pairs, used
    return [], -1
