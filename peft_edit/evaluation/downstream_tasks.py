"""Six downstream tasks as label words after few-shot prompts: where examples come from, and how they are asked."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question.

    Args:
        text (`str`): All that stands before the answer.
        label (`int`): Index of the right answer in the task's `words`.
    """

    text: str
    label: int


@dataclass(frozen=True)
class DownstreamTask:
    """A classification task whose answers are words that the model may continue a prompt with.

    Args:
        name (`str`): Its name.
        words (`tuple[str, ...]`): The answer of each label.
        instruction (`str`): Opens every prompt; nothing where it is empty.
        positive (`int`, *optional*): The label that binary F1 is about; None for more than two labels.
        examples (`tuple[Example, ...]`): Its questions.

    Raises:
        ValueError: if there are not two different answers or more, or a label is none of them.
    """

    name: str
    words: tuple[str, ...]
    instruction: str = ""
    positive: int | None = None
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if len(self.words) < 2 or len(set(self.words)) < len(self.words):
            raise ValueError(f"The task {self.name!r} needs two different answers or more, got {self.words!r}.")
        for index, example in enumerate(self.examples):
            if not 0 <= example.label < len(self.words):
                raise ValueError(
                    f"Example {index} of the task {self.name!r} has the label {example.label!r}, but the task has "
                    f"{len(self.words)} answers: labels go from 0 to {len(self.words) - 1}."
                )


@dataclass(frozen=True)
class TaskSource:
    """How records of a dataset become questions.

    Args:
        task (`DownstreamTask`): The task, without examples.
        question: From a record to the text of a question; raises a KeyError, TypeError or ValueError on a bad one.
        label_field (`str`): Where a record holds its label.
        label_names (`tuple[str, ...]`): The dataset's own names of the labels, for records that give names.
        hub (`tuple[str, str, str]`): Dataset, configuration and split on the Hub.
    """

    task: DownstreamTask
    question: Callable[[Mapping[str, Any]], str]
    label_field: str
    label_names: tuple[str, ...]
    hub: tuple[str, str, str]

    def example(self, record: Any) -> Example:
        """A record as a question.

        Raises:
            ValueError: naming the field that is missing or wrong.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"it must be a mapping, got {type(record).__name__}.")
        try:
            return Example(text=self.question(record), label=self._label(record[self.label_field]))
        except KeyError as error:
            raise ValueError(f"it lacks the field {error}; it has {', '.join(map(repr, record)) or 'none'}.") from None

    def _label(self, value: Any) -> int:
        if isinstance(value, str):
            if value in self.label_names:
                return self.label_names.index(value)
            value = int(value) if value.isdecimal() else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.label_names):
            return value
        raise ValueError(
            f"field '{self.label_field}' must be 0 to {len(self.label_names) - 1} or one of "
            f"{', '.join(self.label_names)}, got {value!r}."
        )


def _field(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field '{name}' must be text that is not empty, got {value!r}.")
    return value.strip()


def _ask_sentiment(record: Mapping[str, Any]) -> str:
    return f"Review: {_field(record, 'sentence')}\nSentiment:"


def _ask_acceptability(record: Mapping[str, Any]) -> str:
    return f"Sentence: {_field(record, 'sentence')}\nGrammatical:"


def _ask_paraphrase(record: Mapping[str, Any]) -> str:
    first, second = _field(record, "sentence1"), _field(record, "sentence2")
    return f"First: {first}\nSecond: {second}\nSame meaning:"


def _ask_entailment(record: Mapping[str, Any]) -> str:
    return f"Text: {_field(record, 'sentence1')}\nClaim: {_field(record, 'sentence2')}\nFollows:"


def _ask_inference(record: Mapping[str, Any]) -> str:
    premise, hypothesis = _field(record, "sentence1"), _field(record, "sentence2")
    return f"Premise: {premise}\nHypothesis: {hypothesis}\nThe hypothesis is"


_LETTERS = ("A", "B", "C", "D")


def _ask_choice(record: Mapping[str, Any]) -> str:
    choices = record["choices"]
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) != len(_LETTERS):
        raise ValueError(f"field 'choices' must be a list of four texts, got {choices!r}.")
    lines = [f"{letter}. {str(choice).strip()}" for letter, choice in zip(_LETTERS, choices)]
    return "\n".join([f"Question: {_field(record, 'question')}", *lines, "Answer:"])


def _sources() -> Iterable[TaskSource]:
    glue = "nyu-mll/glue"
    yield TaskSource(
        DownstreamTask("sst2", ("negative", "positive"), "Is the movie review positive or negative?", positive=1),
        _ask_sentiment,
        "label",
        ("negative", "positive"),
        (glue, "sst2", "validation"),
    )
    yield TaskSource(
        DownstreamTask(
            "mrpc", ("no", "yes"), "Do the two sentences say the same in other words? Answer yes or no.", positive=1
        ),
        _ask_paraphrase,
        "label",
        ("not_equivalent", "equivalent"),
        (glue, "mrpc", "validation"),
    )
    yield TaskSource(
        DownstreamTask("cola", ("no", "yes"), "Is the sentence good English? Answer yes or no.", positive=1),
        _ask_acceptability,
        "label",
        ("unacceptable", "acceptable"),
        (glue, "cola", "validation"),
    )
    yield TaskSource(
        DownstreamTask("rte", ("yes", "no"), "Does the claim follow from the text? Answer yes or no.", positive=0),
        _ask_entailment,
        "label",
        ("entailment", "not_entailment"),
        (glue, "rte", "validation"),
    )
    yield TaskSource(
        DownstreamTask(
            "nli", ("true", "false"), "Given the premise, is the hypothesis certainly true, or false?", positive=0
        ),
        _ask_inference,
        "label",
        ("entailment", "not_entailment"),
        (glue, "rte", "train"),  # the set that editing papers call NLI is RTE's training split
    )
    yield TaskSource(
        DownstreamTask("mmlu", _LETTERS, "Answer each question with the letter of the right choice."),
        _ask_choice,
        "answer",
        _LETTERS,
        ("cais/mmlu", "all", "validation"),
    )


TASKS: Mapping[str, TaskSource] = MappingProxyType({source.task.name: source for source in _sources()})


def load_task(
    name: str, source: str | os.PathLike[str] | None = None, limit: int | None = None, seed: int = 0
) -> DownstreamTask:
    """A task with its examples.

    Args:
        name (`str`): "sst2", "mrpc", "cola", "rte", "nli" or "mmlu".
        source (`str`, *optional*): A folder with `<name>.jsonl`, one record a line in the fields of the GLUE and MMLU
            datasets. Without it the records come from the Hub, through `datasets`.
        limit (`int`, *optional*): Draw this many examples at random; all of them if there are fewer.
        seed (`int`): Seed of the draw.

    Returns:
        `DownstreamTask`: its examples in the order of the data.

    Raises:
        ValueError: if the task is unknown, the limit is not positive, or a record is malformed; it names the record.
        FileNotFoundError: if the folder has no such file.
        ImportError: if `datasets` is needed and not installed.
    """
    if name not in TASKS:
        raise ValueError(f"There is no downstream task {name!r}; choose from {', '.join(TASKS)}.")
    check_limit(limit)
    form = TASKS[name]
    records = _hub_records(form.hub) if source is None else _file_records(Path(source) / f"{name}.jsonl")
    examples = []
    for place, record in records:
        try:
            examples.append(form.example(record))
        except ValueError as error:
            raise ValueError(f"{place} is no {name} record: {error}") from None
    if not examples:
        raise ValueError(f"{'the Hub' if source is None else source} has no {name} records.")
    return replace(form.task, examples=tuple(draw(examples, limit, name, seed)))


def check_limit(limit: int | None) -> None:
    """Raises a ValueError unless the limit is None or positive."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be a positive number or None, got {limit!r}.")


def draw(examples: Sequence[Example], limit: int | None, name: str, seed: int) -> list[Example]:
    """`limit` of a task's examples, drawn at random and in their order; all of them if there are no more."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[index] for index in sorted(_random(name, seed).sample(range(len(examples)), limit))]


def _random(name: str, seed: int) -> random.Random:
    return random.Random(f"{name}:{seed}")


def _file_records(path: Path) -> Iterable[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}': give the folder that holds {path.name}, or source=None for the Hub's."
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"Line {number} of '{path}'", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"Line {number} of '{path}' is not valid JSON ({error.msg}).") from None


def _hub_records(hub: tuple[str, str, str]) -> Iterable[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "Tasks come from the Hub through the package datasets: pip install 'peft-edit[eval]', or give source, a "
            "folder with one JSONL file per task."
        ) from error
    path, configuration, split = hub
    for number, record in enumerate(load_dataset(path, configuration, split=split)):
        yield f"Record {number} of {path} ({configuration}, {split})", record


def split_shots(task: DownstreamTask, count: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The examples that are shown with their answers, and those that are asked; no text is among both.

    Shots come in rounds; in a round every label stands once, in random order. So labels are balanced to within one,
    and stay so to within two when the first shots are dropped.

    Args:
        task (`DownstreamTask`): A task with examples.
        count (`int`): How many to show.
        seed (`int`): Seed of the choice.

    Returns:
        `tuple[list[Example], list[Example]]`: shots, and the other examples in the task's order.

    Raises:
        ValueError: if the count is negative, or the task has too few examples.
    """
    if count < 0:
        raise ValueError(f"shots must not be negative, got {count}.")
    generator = _random(task.name, seed)
    examples = list(dict.fromkeys(task.examples))
    generator.shuffle(examples)
    waiting = [[example for example in examples if example.label == label] for label in range(len(task.words))]
    shots: list[Example] = []
    while len(shots) < count:
        labels = list(range(len(task.words)))
        generator.shuffle(labels)
        for label in labels[: count - len(shots)]:
            if not waiting[label]:
                raise ValueError(
                    f"The task {task.name!r} has too few examples with the answer {task.words[label]!r} for {count} "
                    "shots: ask for fewer."
                )
            shots.append(waiting[label].pop())
    shown = {shot.text for shot in shots}
    asked = [example for example in task.examples if example.text not in shown]
    if not asked:
        raise ValueError(f"The task {task.name!r} has no example left beside {count} shots: ask for fewer.")
    return shots, asked


def few_shot_prompt(task: DownstreamTask, shots: Sequence[Example], example: Example) -> str:
    """Instruction, shots with their answers, and the question, parted by empty lines."""
    shown = [f"{shot.text} {task.words[shot.label]}" for shot in shots]
    return "\n\n".join([*([task.instruction] if task.instruction else []), *shown, example.text])
