"""Causal tracing: which states, restored in a run whose subject is corrupted, bring the answer back.

Meng et al. 2022, arXiv 2202.05262, section 2. Positions are taken by their class (`POSITIONS`), all tokens of a class
at once, and the layers below a restored one are run once for all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..facts import Fact
from ..hooks import evaluating, on_output
from ..prompts import PromptEncoder
from ..scoring import predict_targets, score_targets
from .passes import Passes, Question, down_projections


POSITIONS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
LAST_SUBJECT_TOKEN = POSITIONS.index("last subject token")

# "hidden": what a block leaves in the residual stream; "mlp": what its MLP writes to it.
KINDS = ("hidden", "mlp")


@dataclass(frozen=True)
class Tracing:
    """Average indirect effects of restoring states. P position classes, L layers.

    Args:
        effects (`dict[str, list[list[float]]]`): By kind (`KINDS`), (P, L) mean over facts and noise samples of
            P(answer | restored) - P(answer | corrupted), in -1..1; NaN where no fact has such a token. The column of a
            window is its middle layer.
        facts (`list[int]`): (P,) facts that have a token of the class.
        clean (`float`): Mean P(answer) of the model as it is.
        corrupted (`float`): Mean P(answer) with the subject corrupted.
        window (`int`): Layers whose MLP outputs were restored together.
        samples (`int`): Noise samples of each fact.
        noise (`float`): Standard deviation of the noise that was added to the subject's embeddings.
        positions (`tuple[str, ...]`): Names of the position classes.
    """

    effects: dict[str, list[list[float]]]
    facts: list[int]
    clean: float
    corrupted: float
    window: int
    samples: int
    noise: float
    positions: tuple[str, ...] = POSITIONS

    @property
    def total_effect(self) -> float:
        """What corrupting the subject costs: P(answer | clean) - P(answer | corrupted)."""
        return self.clean - self.corrupted


def known_questions(model: Any, encoder: PromptEncoder, facts: Sequence[Fact]) -> tuple[list[Question], int]:
    """The facts' prompts with the answers that the model gives.

    Args:
        model: The causal language model, in eval mode.
        encoder (`PromptEncoder`): Of its tokenizer.
        facts (`Sequence[Fact]`): With `target_true`, which must be the model's greedy completion to be known; without
            it the model's own most probable next token is the answer.

    Returns:
        The questions of known facts, in order, and the number of facts that the model does not know.
    """
    stated = [fact for fact in facts if fact.target_true is not None]
    asked = [Question.of(encoder, fact, fact.target_true) for fact in stated]
    pairs = [(question.prompt.ids[: question.prompt.prompt_length], question.prompt.target_ids) for question in asked]
    greedy = score_targets(model, pairs).greedy.tolist() if pairs else []
    known = {id(fact): question for fact, question, right in zip(stated, asked, greedy) if right}
    open_facts = [fact for fact in facts if fact.target_true is None]
    bare = [Question.of(encoder, fact, None) for fact in open_facts]
    tokens = predict_targets(model, [(question.prompt.ids, (0,)) for question in bare]) if bare else []
    for fact, question, token in zip(open_facts, bare, tokens):
        known[id(fact)] = question.answered(int(token[0]))
    questions = [known[id(fact)] for fact in facts if id(fact) in known]
    return questions, len(facts) - len(questions)


def trace(
    model: Any,
    questions: Sequence[Question],
    samples: int = 5,
    noise: float = 3.0,
    window: int | None = None,
    kinds: Sequence[str] = KINDS,
    batch_size: int = 256,
    seed: int = 0,
) -> Tracing:
    """Traces questions that the model answers.

    Args:
        model: The causal language model; left as it was.
        questions (`Sequence[Question]`): At least one, with the model's own answers (`known_questions`).
        samples (`int`): Noise samples of each question.
        noise (`float`): Standard deviation of the noise, in that of the embeddings of the subjects' tokens.
        window (`int`, *optional*): Layers whose MLP outputs are restored together, around each layer; by default 10 of
            48 layers, as published, in proportion. The hidden state is restored in one layer at a time.
        kinds (`Sequence[str]`): Of `KINDS`.
        batch_size (`int`): Sequences in a pass at most, but not fewer than one question needs.
        seed (`int`): Of the noise, which does not depend on the batches.

    Returns:
        `Tracing`

    Raises:
        ValueError: if there is no question, or an argument is out of range.
    """
    if not questions:
        raise ValueError("There is nothing to trace: none of the facts has an answer that the model knows.")
    _check(samples, noise, window, kinds)
    layers = len(Passes(model, questions[:1]).blocks)
    window = window or max(1, layers * 10 // 48)
    deviation = noise * subject_deviation(model, questions)
    order = sorted(range(len(questions)), key=lambda place: len(questions[place].prompt.ids))
    share = max(1, batch_size // (samples * len(POSITIONS)))
    sums = {kind: torch.zeros(len(POSITIONS), layers, dtype=torch.float64) for kind in kinds}
    counts = torch.zeros(len(POSITIONS))
    clean = corrupted = 0.0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), share):
            places = order[start : start + share]
            part = _Traced(model, [questions[place] for place in places], samples)
            part.run([seed * 1_000_003 + place for place in places], deviation)
            clean += float(part.clean_probability.sum())
            corrupted += float(part.corrupted_probability.sum())
            counts += part.tokens.any(-1).sum(0)
            for kind in kinds:
                for layer in range(layers):
                    span = around(layer, 1 if kind == "hidden" else window, layers)
                    sums[kind][:, layer] += part.effects(kind, span)
    return Tracing(
        effects={kind: (total / counts[:, None]).tolist() for kind, total in sums.items()},
        facts=[int(count) for count in counts],
        clean=clean / len(questions),
        corrupted=corrupted / len(questions),
        window=window,
        samples=samples,
        noise=deviation,
    )


def around(layer: int, window: int, layers: int) -> range:
    """`window` layers with `layer` in the middle (before the middle if even), cut off at the ends."""
    first = layer - window // 2
    return range(max(0, first), min(layers, first + window))


def subject_deviation(model: Any, questions: Sequence[Question]) -> float:
    """Standard deviation of all entries of the embeddings of all subjects' tokens."""
    embedding = model.get_input_embeddings()
    ids = [token for question in questions for token in question.prompt.ids[_subject_tokens(question)]]
    with torch.no_grad():
        device = embedding.weight.device
        vectors = embedding(torch.tensor(ids, device="cpu" if device.type == "meta" else device))
    return float(vectors.double().std(correction=0))


def position_classes(question: Question) -> torch.Tensor:
    """(P, T) bool: which tokens of the fed sequence are of which class; a token is of one class at most.

    A subject of one token has a last token only; a prompt that ends with its subject has no last token besides.
    """
    start, last = question.subject_start, question.prompt.subject_index
    end = question.prompt.prompt_length - 1
    classes = torch.zeros(len(POSITIONS), len(question.prompt.ids) - 1, dtype=torch.bool)
    if start < last:
        classes[0, start] = True
        classes[1, start + 1 : last] = True
    classes[LAST_SUBJECT_TOKEN, last] = True
    if end > last:
        classes[5, end] = True
        if end > last + 1:
            classes[3, last + 1] = True
            classes[4, last + 2 : end] = True
    return classes


class _Traced:
    """Q questions that are traced together, each with S corrupted runs."""

    def __init__(self, model: Any, questions: Sequence[Question], samples: int) -> None:
        self.model = model
        self.questions = questions
        self.samples = samples
        self.passes = Passes(model, questions)
        self.writers = down_projections(model)
        width = self.passes.ids.shape[1]
        self.tokens = torch.zeros(len(questions), len(POSITIONS), width, dtype=torch.bool)
        for place, question in enumerate(questions):
            classes = position_classes(question)
            self.tokens[place, :, : classes.shape[1]] = classes
        # Pairs of a question and a class that it has, each in all samples.
        owners, self.classes = self.tokens.any(-1).nonzero(as_tuple=True)
        self.owners = owners.repeat_interleave(samples)
        self.sources = (owners[:, None] * samples + torch.arange(samples)).flatten()
        self.restored = self.tokens[owners, self.classes].repeat_interleave(samples, 0)[..., None]

    def run(self, seeds: Sequence[int], deviation: float) -> None:
        """The clean and the corrupted runs; keeps what blocks and MLPs put out."""
        passes, every = self.passes, self.passes.every
        modules = [*passes.blocks, *self.writers]
        with passes.reading(modules) as seen:
            self.clean_probability = passes.log_probability(every).exp().cpu()
        self.clean = list(seen)
        self.noise = self._noise(seeds, deviation)
        rows = every.repeat_interleave(self.samples)
        with passes.reading(passes.blocks) as seen, self._corrupted(torch.arange(len(rows))):
            probability = passes.log_probability(rows).exp().cpu()
        self.broken = list(seen)
        self.corrupted_probability = probability.unflatten(0, (-1, self.samples)).mean(1)

    def effects(self, kind: str, span: range) -> torch.Tensor:
        """Effects of restoring the layers of `span`; a hidden state is restored in one layer.

        Returns:
            `torch.Tensor`: (P,) sum over questions of the mean over samples, float64.
        """
        passes = self.passes
        known = span[0] if kind == "hidden" else span[0] - 1
        with ExitStack() as stack:
            if known < 0:
                stack.enter_context(self._corrupted(self.sources))
            else:
                broken = self.broken[known]
                states = broken[self.sources.to(broken.device)]
                if kind == "hidden":
                    states = self._restore(self.clean[known], states)
                stack.enter_context(passes.entering_after(known, states))
            if kind == "mlp":
                for layer in span:
                    restore = partial(self._restore, self.clean[len(passes.blocks) + layer])
                    stack.enter_context(passes.on_states(self.writers[layer], restore))
            probability = passes.log_probability(self.owners).exp().cpu()
        mean = probability.unflatten(0, (-1, self.samples)).mean(1)
        effect = mean - self.corrupted_probability[self.owners[:: self.samples]]
        return torch.zeros(len(POSITIONS), dtype=torch.float64).index_add(0, self.classes, effect.double())

    def _restore(self, clean: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The clean states in their places among those of corrupted runs, (rows, T, width)."""
        return torch.where(self.restored.to(hidden.device), clean[self.owners.to(clean.device)], hidden)

    def _noise(self, seeds: Sequence[int], deviation: float) -> torch.Tensor:
        """(Q * S, T, width) noise on the subject's tokens, zero elsewhere."""
        width = self.model.get_input_embeddings().weight.shape[1]
        noise = torch.zeros(len(seeds), self.samples, self.passes.ids.shape[1], width)
        for place, (question, seed) in enumerate(zip(self.questions, seeds)):
            noise[place, :, _subject_tokens(question)] = deviation * subject_noise(question, self.samples, width, seed)
        return noise.flatten(0, 1)

    @contextmanager
    def _corrupted(self, sources: torch.Tensor) -> Iterator[None]:
        """Embeddings with the noise of the given corrupted runs."""

        def add(hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.noise[sources].to(hidden)

        with on_output(self.model.get_input_embeddings(), add):
            yield


def subject_noise(question: Question, samples: int, width: int, seed: int) -> torch.Tensor:
    """(samples, subject's tokens, width) standard normal, float32, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = question.prompt.subject_index - question.subject_start + 1
    return torch.randn(samples, tokens, width, generator=generator)


def _subject_tokens(question: Question) -> slice:
    return slice(question.subject_start, question.prompt.subject_index + 1)


def _check(samples: int, noise: float, window: int | None, kinds: Sequence[str]) -> None:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}: each is one draw of the noise.")
    if not noise > 0:
        raise ValueError(f"noise must be above 0, got {noise!r}: it is in deviations of the subjects' embeddings.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 layer, got {window!r}.")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {list(kinds)}.")
