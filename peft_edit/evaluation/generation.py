"""Free generation: what the model answers when nothing of the answer is given to it, neither its words nor its length.

The scores follow the critique of arXiv 2502.11177: no teacher forcing, no cut at the target's length; the answer goes
on until the model stops by itself. See docs/generation_metrics.md.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Union

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation import GenerationMixin

from ..facts import PLACEHOLDER, Fact, fill
from ..prompts import PromptEncoder, context_window, is_spaceless
from .scores import fact_means, prompts_of, split_over_processes


# "sentence", "newline", "eos", or texts of which any ends the answer.
Stop = Union[str, Sequence[str]]

_AS_IT_IS = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
STOPS = ("sentence", "newline", "eos")
QA_TEMPLATE = "Question: {}\nAnswer:"

_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]\u00bb]*(?=\s|\Z)|[\u3002\uff01\uff1f]")
# Abbreviations that a name follows: their full stop ends no sentence, nor does that of an initial.
_TITLES = frozenset("mr mrs ms dr st mt ft prof gen lt col sgt capt rev hon gov sen rep".split())
_IN_WORD = frozenset(".'\u2019")


@dataclass(frozen=True)
class Answer:
    """One free answer.

    Args:
        text (`str`): The text up to the stop, which is left out, without outer white space.
        stopped (`bool`): The model came to a stop within the allowed tokens.
    """

    text: str
    stopped: bool


@dataclass(frozen=True)
class GenerationScores:
    """Scores in percent, each the mean over facts of the mean over a fact's prompts.

    Args:
        exact_match (`float`): The answer, normalised, is the target, normalised (`normalise_answer`).
        contained (`float`): The target's words stand in the answer one after the other, before the stop.
        stopped (`float`): The model came to a stop within the allowed tokens.
        facts (`int`): N, number of facts given.
        per_fact (`dict[str, list[float]]`): (N,) values of each score, by its name, in the order of the facts; NaN
            for a fact without prompts of the kind asked for.
        answers (`list[list[str]]`): What was said to each prompt of each fact.
    """

    exact_match: float
    contained: float
    stopped: float
    facts: int
    per_fact: dict[str, list[float]] = field(repr=False)
    answers: list[list[str]] = field(repr=False)

    def to_dict(self, per_fact: bool = False) -> dict[str, Any]:
        """Plain mapping; values and answers of every fact are in it only if asked for."""
        left_out = () if per_fact else ("per_fact", "answers")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def __str__(self) -> str:
        shares = f"exact match {self.exact_match:.1f}  contained {self.contained:.1f}  stopped {self.stopped:.1f}"
        return f"free generation, {self.facts} facts: {shares}"


def answer_words(text: str) -> list[str]:
    """The words by which answers are compared: Unicode NFKC, case folded, punctuation and articles gone.

    Full stops and apostrophes vanish ("U.S." is "us"), and so do commas in numbers ("1,000"); a decimal point and
    other punctuation separate. A character of a script written without spaces is a word of its own. Articles stay
    where nothing else would be left.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"(?<=\d)\.(?=\d)", " ", re.sub(r"(?<=\d),(?=\d{3})", "", folded))
    characters = []
    for character in folded:
        if unicodedata.category(character).startswith("P"):
            characters.append("" if character in _IN_WORD else " ")
        elif is_spaceless(character):
            characters.append(f" {character} ")
        else:
            characters.append(character)
    words = "".join(characters).split()
    return [word for word in words if word not in ("a", "an", "the")] or words


def normalise_answer(text: str) -> str:
    """`answer_words`, one space between them: two answers that are equal in this form match exactly."""
    return " ".join(answer_words(text))


def contains_answer(text: str, target: str) -> bool:
    """Whether the target's words stand in the text, whole, one after the other, in order."""
    words, wanted = answer_words(text), answer_words(target)
    if not wanted:
        return False
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


def find_stop(text: str, stop: Stop = "sentence", complete: bool = True) -> int | None:
    """Where an answer ends, as an index of `text`, or None. White space before the first word stops nothing.

    Args:
        text (`str`): What the model has written so far.
        stop: `"sentence"`: a new line, or the mark that ends a sentence (`.`, `!`, `?`, `…` before white space, and
            `。`, `！`, `？`); the full stop of an initial or of a title (`St.`, `Dr.`) is none. `"newline"`: a new
            line. `"eos"`: nothing in the text. Or texts, the first of which ends the answer: `(".", "\\n")` is the
            criterion of arXiv 2502.11177.
        complete (`bool`): Whether nothing will follow, so that a mark at the very end of the text counts.

    Raises:
        ValueError: if `stop` is another name or holds no text.
    """
    begin = len(text) - len(text.lstrip())
    if not isinstance(stop, str):
        if not stop or not all(isinstance(mark, str) and mark for mark in stop):
            raise ValueError(f"stop must hold texts that end an answer, got {stop!r}.")
        return min((place for mark in stop if (place := text.find(mark, begin)) >= 0), default=None)
    if stop not in STOPS:
        raise ValueError(f"stop must be one of {', '.join(STOPS)}, or a tuple of texts, got {stop!r}.")
    if stop == "eos":
        return None
    ends = [place for place in [text.find("\n", begin)] if place >= 0]
    if stop == "sentence":
        marks = (match for match in _SENTENCE_END.finditer(text, begin) if _ends_sentence(text, match, complete))
        ends += [match.start() for match in [next(marks, None)] if match is not None]
    return min(ends, default=None)


def _ends_sentence(text: str, match: re.Match[str], complete: bool) -> bool:
    if match.end() == len(text) and not complete and match[0] not in "\u3002\uff01\uff1f":
        return False  # "3." may become "3.5"
    if match[0] != ".":
        return True
    word = re.split(r"\W", text[: match.start()])[-1]
    return not (word.casefold() in _TITLES or (len(word) == 1 and word.isupper()))


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    stop: Stop = "sentence",
    batch_size: int = 64,
    template: str | None = None,
) -> list[str]:
    """What the model says to each prompt, decoded greedily, up to its own stop; `generate_until_stop` tells more."""
    answers = generate_until_stop(model, tokenizer, prompts, max_new_tokens, stop, batch_size, template)
    return [answer.text for answer in answers]


def generate_until_stop(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    stop: Stop = "sentence",
    batch_size: int = 64,
    template: str | None = None,
) -> list[Answer]:
    """Greedy answers up to the model's own stop: its end-of-sequence token always, and what `stop` says.

    Several processes share the prompts out, and all return all answers.

    Args:
        model: The causal language model, PEFT or plain, adapters as they are.
        tokenizer: Its tokenizer, with or without a padding token.
        prompts (`Sequence[str]`): Full texts. White space at their end is dropped, as in editing.
        max_new_tokens (`int`): An answer longer than this has not stopped.
        stop: See `find_stop`.
        batch_size (`int`): Prompts per pass; the answers do not depend on it, but for rounding in 16 bit.
        template (`str`, *optional*): A frame with `{}` for the prompt, such as `QA_TEMPLATE` for questions.

    Returns:
        `list[Answer]`: in the order of the prompts.

    Raises:
        ValueError: if a setting is out of range, a prompt is empty, or it leaves no room in the context window.
    """
    find_stop("", stop)
    if template is not None:
        if PLACEHOLDER not in template:
            raise ValueError(f"The template {template!r} has no {{}} for the prompt to stand in.")
        prompts = [fill(template, prompt) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    answers = []
    stopping = partial(_AtStop, tokenizer, stop)
    for ids in continue_prompts(model, tokenizer, prompts, max_new_tokens, batch_size, stopping):
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:length], **_AS_IT_IS)
        place = find_stop(text, stop)
        answers.append(Answer(text[:place].strip(), place is not None or length < len(ids)))
    return answers


def generation_scores(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    kind: str = "efficacy",
    max_new_tokens: int = 32,
    stop: Stop = "sentence",
    batch_size: int = 64,
    template: str | None = None,
) -> GenerationScores:
    """Scores facts by what the model freely says.

    Args:
        model, tokenizer, max_new_tokens, stop, batch_size, template: See `generate_until_stop`.
        facts (`Sequence[Fact]`): The facts.
        kind (`str`): Which prompts: `"efficacy"`, the edited ones; `"paraphrase"`; or `"neighborhood"`, where
            `target_true` is wanted instead of the target.

    Raises:
        ValueError: if no fact has a prompt of that kind, `kind` is another, or a neighborhood has no `target_true`.
    """
    questions = prompts_of(facts)
    if kind not in questions:
        raise ValueError(f"kind must be one of {', '.join(questions)}, got {kind!r}.")
    owners = [place for place, _ in questions[kind]]
    if not owners:
        raise ValueError(f"None of the {len(facts)} facts has a prompt of the kind {kind}: there is nothing to score.")
    wanted = [facts[place].target_true if kind == "neighborhood" else facts[place].target for place in owners]
    if None in wanted:
        fact = facts[owners[wanted.index(None)]]
        raise ValueError(f"The fact {fact.filled_prompt!r} has no target_true, which its neighborhood needs: give it.")
    texts = [text for _, text in questions[kind]]
    given = generate_until_stop(model, tokenizer, texts, max_new_tokens, stop, batch_size, template)
    answers: list[list[str]] = [[] for _ in facts]
    for place, answer in zip(owners, given):
        answers[place].append(answer.text)
    hits = {
        "exact_match": [
            normalise_answer(answer.text) == normalise_answer(str(wish)) for answer, wish in zip(given, wanted)
        ],
        "contained": [contains_answer(answer.text, str(wish)) for answer, wish in zip(given, wanted)],
        "stopped": [answer.stopped for answer in given],
    }
    per_fact = {name: [100.0 * mean for mean in fact_means(each, owners, len(facts))] for name, each in hits.items()}
    scores = {name: float(np.nanmean(values)) for name, values in per_fact.items()}
    return GenerationScores(**scores, facts=len(facts), per_fact=per_fact, answers=answers)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens with which this model ends a text: those of its generation config and the tokenizer's."""
    listed = getattr(_generator(model).generation_config, "eos_token_id", None)
    ends = listed if isinstance(listed, (list, tuple)) else [listed]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    stopping: Callable[[int], StoppingCriteria] | None = None,
    processor: Callable[[list[int]], LogitsProcessor] | None = None,
) -> list[list[int]]:
    """The tokens that the model puts after each prompt, the most probable one at each step.

    Prompts of like length run together, padded on the left behind an attention mask. The sampling settings that a
    model brings in its generation config are left aside. Processes share the prompts out and all return all.

    Args:
        model, tokenizer, prompts, max_new_tokens, batch_size: See `generate_until_stop`.
        stopping: Makes the stopping criterion of a batch from the width of its prompts, in tokens.
        processor: Makes the logits processor of a batch from the places of its prompts.

    Returns:
        `list[list[int]]`: at most `max_new_tokens` each; after an end token or a stop come tokens without meaning.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)
    ids = [encoder.tokenize(prompt.rstrip())[0] for prompt in prompts]
    _check_lengths(model, prompts, ids, max_new_tokens)
    # Like lengths together; each process takes every so-manieth prompt of this order.
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found = torch.full((len(ids), max_new_tokens), -1)

    def work(own: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        rows = torch.full((len(own), max_new_tokens), -1)
        with torch.no_grad(), _plain_decoding(model, tokenizer, max_new_tokens) as config:
            for start in range(0, len(own), batch_size):
                places, prefixes = zip(*own[start : start + batch_size])
                criteria = [stopping(max(map(len, prefixes)))] if stopping else []
                processors = [processor(list(places))] if processor else []
                new = _generate(model, prefixes, config, criteria, processors)
                rows[start : start + len(new), : new.shape[1]] = new
        return [rows]

    if ids:
        found[order] = split_over_processes(model, [(place, ids[place]) for place in order], work)[0]
    return [[token for token in row if token >= 0] for row in found.tolist()]


def _check_lengths(model: Any, prompts: Sequence[str], ids: Sequence[list[int]], max_new_tokens: int) -> None:
    window = context_window(getattr(model, "config", None))
    for prompt, tokens in zip(prompts, ids):
        if not tokens:
            raise ValueError(f"The prompt {prompt!r} has no token to continue: write one.")
        if window is not None and len(tokens) + max_new_tokens > window:
            raise ValueError(
                f"{prompt[:80]!r} takes {len(tokens)} tokens, with max_new_tokens={max_new_tokens} more than the "
                f"model's context window of {window}; shorten one of them."
            )


def _generate(
    model: Any,
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    criteria: list[StoppingCriteria],
    processors: list[LogitsProcessor],
) -> torch.Tensor:
    """The tokens after each row, left-padded together, on the CPU."""
    pad, width = config.pad_token_id, max(map(len, rows))
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    settings = dict(generation_config=config, stopping_criteria=criteria, logits_processor=processors)
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:].cpu()


def _generator(model: Any) -> Any:
    """The transformers model inside a PEFT model, whose generation config is in force."""
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)


@contextmanager
def _plain_decoding(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """Greedy decoding and nothing else: what the model's own generation config would fill in is set aside."""
    ends = sorted(end_tokens(model, tokenizer))
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    inner = _generator(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad)
    finally:
        inner.generation_config = own


class _AtStop(StoppingCriteria):
    """Ends a row once its stop is certain."""

    def __init__(self, tokenizer: Any, stop: Stop, width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :].tolist(), **_AS_IT_IS)
        done = [find_stop(text, self.stop, complete=False) is not None for text in texts]
        return torch.tensor(done, device=input_ids.device)
