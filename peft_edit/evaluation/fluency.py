"""Fluency and consistency of text that an edited model writes (arXiv 2202.05262, section 3.3 and appendix).

Fluency is the entropy of n-grams: a model that falls into repetition has little. Consistency is the likeness of what
the model writes about a subject to reference texts about others that share the new answer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessor

from ..prompts import PromptEncoder, is_spaceless
from .generation import continue_prompts, end_tokens


# n of the n-grams and the weight of their entropy, whose mean is taken (arXiv 2202.05262, appendix).
ENTROPY_WEIGHTS: Mapping[int, float] = {2: 2 / 3, 3: 4 / 3}

_WORD_OR_MARK = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FluencyScores:
    """How the model writes.

    Args:
        entropy (`float`): Mean over facts of the mean n-gram entropy of a fact's texts, in bits. Published tables
            often give 100 times this number.
        consistency (`float`): Mean over facts of the cosine with the reference texts, 0 to 1; NaN without references.
        facts (`int`): N, number of facts given.
        per_fact (`dict[str, list[float]]`): (N,) values of both, by name, in the order of the facts; NaN for a fact
            without generation prompts, or without references.
        texts (`list[list[str]]`): What was written, for each fact.
    """

    entropy: float
    consistency: float
    facts: int
    per_fact: dict[str, list[float]] = field(repr=False)
    texts: list[list[str]] = field(repr=False)

    def to_dict(self, per_fact: bool = False) -> dict[str, Any]:
        """Plain mapping; values and texts of every fact are in it only if asked for."""
        left_out = () if per_fact else ("per_fact", "texts")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def __str__(self) -> str:
        likeness = "" if math.isnan(self.consistency) else f"  consistency {self.consistency:.3f}"
        return f"fluency, {self.facts} facts: entropy {self.entropy:.2f} bits{likeness}"


def entropy_words(text: str) -> list[str]:
    """Words and marks of punctuation, in order, case kept; a character of a spaceless script stands alone."""
    return _WORD_OR_MARK.findall(_spaced(text))


def index_words(text: str) -> list[str]:
    """Words without punctuation, case folded: the terms of `TfIdf`."""
    return _WORD.findall(_spaced(text).casefold())


def _spaced(text: str) -> str:
    return "".join(f" {character} " if is_spaceless(character) else character for character in text)


def ngram_entropy(text: str | Sequence[str], weights: Mapping[int, float] = ENTROPY_WEIGHTS) -> float:
    """Weighted mean of n-gram entropies in bits: (1/|N|) Σ_n w_n H_n with H_n = −Σ_g f(g) log2 f(g).

    f(g) is the share of the n-gram g among all n-grams of the text. With the default weights: H_2 / 3 + 2 H_3 / 3.

    Args:
        text: A text, or its words.
        weights: From n to w_n.

    Returns:
        `float`: at least 0; a text too short for any n-gram of some n has H_n = 0.

    Raises:
        ValueError: if `weights` is empty or holds an n below 1.
    """
    if not weights or min(weights) < 1:
        raise ValueError(f"weights must map n-gram lengths, 1 or more, to weights, got {dict(weights)!r}.")
    words = entropy_words(text) if isinstance(text, str) else list(text)
    total = sum(weight * _entropy(zip(*(words[start:] for start in range(n)))) for n, weight in weights.items())
    return total / len(weights)


def _entropy(things: Iterable[Any]) -> float:
    counts = Counter(things).values()
    total = sum(counts)
    return math.log2(total) - sum(count * math.log2(count) for count in counts) / total if total else 0.0


class TfIdf:
    """Unigram TF-IDF vectors, by term: tf(t) · idf(t), with idf(t) = ln((1 + N) / (1 + df(t))) + 1.

    tf is the plain count, N the number of documents, df how many of them hold the term. A term that no document holds
    has no weight.

    Args:
        documents: The texts from which document frequencies are counted.

    Raises:
        ValueError: if there is no document.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        texts = list(documents)
        if not texts:
            raise ValueError("Document frequencies need at least one text.")
        counts = Counter(term for text in texts for term in set(index_words(text)))
        self.idf = {term: math.log((1 + len(texts)) / (1 + count)) + 1 for term, count in counts.items()}

    def vector(self, text: str) -> dict[str, float]:
        """Weight of every known term of the text; not normalised."""
        return {term: count * self.idf[term] for term, count in Counter(index_words(text)).items() if term in self.idf}

    def cosine(self, first: str, second: str) -> float:
        """Cosine of the vectors of two texts, 0 to 1; 0 where either holds no known term."""
        left, right = self.vector(first), self.vector(second)
        norms = math.hypot(*left.values()) * math.hypot(*right.values())
        return sum(weight * right.get(term, 0.0) for term, weight in left.items()) / norms if norms else 0.0


def consistency(generated: Sequence[str], references: Sequence[str], index: TfIdf) -> float:
    """Cosine of all that was written about a fact, as one text, with all its references, as one text."""
    return index.cosine(" ".join(generated), " ".join(references))


def write_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    length: int = 100,
    top_k: int = 5,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """Texts of `length` tokens, each with its prompt, as the model writes them.

    Sampling is from the `top_k` most probable tokens, seeded by `seed` and the place of the prompt: neither the batch
    size nor the global random state matters. Tokens that end a text are not allowed, so that all texts are as long.

    Args:
        model: The causal language model, PEFT or plain, adapters as they are.
        tokenizer: Its tokenizer.
        prompts (`Sequence[str]`): Where the texts begin.
        length (`int`): Tokens of a text, the prompt's included (100 in arXiv 2202.05262).
        top_k (`int`): 1 is greedy.
        seed (`int`): Seed of the sampling.
        batch_size (`int`): Prompts per pass.

    Raises:
        ValueError: if a setting is out of range, or a prompt alone has `length` tokens.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if not prompts:
        return []
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)
    own = [encoder.tokenize(prompt.rstrip())[0] for prompt in prompts]
    for prompt, ids in zip(prompts, own):
        if len(ids) >= length:
            raise ValueError(f"{prompt[:80]!r} takes {len(ids)} tokens of the {length} of its text: raise length.")
    banned = sorted({*tokenizer.all_special_ids, *end_tokens(model, tokenizer)})
    sampler = partial(_SeededTopK, top_k, seed, banned, len(tokenizer))
    longest = length - min(map(len, own))
    found = continue_prompts(model, tokenizer, prompts, longest, batch_size, processor=sampler)
    texts = [[*ids, *new][:length] for ids, new in zip(own, found)]
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in texts]


class _SeededTopK(LogitsProcessor):
    """Makes the greedy choice a sample from the k most probable tokens, by the Gumbel-max trick.

    argmax of log p + Gumbel noise is distributed as p; the noise of each row comes from its own generator.
    """

    def __init__(self, top_k: int, seed: int, banned: Sequence[int], vocabulary: int, places: Sequence[int]) -> None:
        self.top_k = top_k
        self.banned = list(banned)
        self.vocabulary = vocabulary
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63) for place in places]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.float().clone()
        scores[:, self.vocabulary :] = -torch.inf
        scores[:, [token for token in self.banned if token < scores.shape[1]]] = -torch.inf
        if self.top_k == 1:
            return scores
        values, tokens = scores.topk(min(self.top_k, scores.shape[1]))
        uniform = torch.stack([torch.rand(values.shape[1], generator=generator) for generator in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, values + noise.to(values.device))


def fluency_scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]] | None = None,
    index: TfIdf | None = None,
    length: int = 100,
    top_k: int = 5,
    seed: int = 0,
    batch_size: int = 32,
) -> FluencyScores:
    """Lets the model write from each fact's generation prompts and scores the texts, prompts included.

    Args:
        model, tokenizer, length, top_k, seed, batch_size: See `write_texts`.
        prompts: For each fact its generation prompts.
        references: For each fact its reference texts, if consistency is wanted.
        index: Document frequencies; by default those of all references, each one document.

    Raises:
        ValueError: if no fact has a prompt, or `references` are not as many as `prompts`.
    """
    if references is not None and len(references) != len(prompts):
        raise ValueError(f"There are prompts of {len(prompts)} facts but references of {len(references)}.")
    flat = [prompt for group in prompts for prompt in group]
    if not flat:
        raise ValueError("There are no generation prompts: give at least one fact one.")
    written = iter(write_texts(model, tokenizer, flat, length, top_k, seed, batch_size))
    texts = [[next(written) for _ in group] for group in prompts]
    known = references if references is not None else [()] * len(texts)
    corpus = [text for group in known for text in group]
    if index is None and corpus:
        index = TfIdf(corpus)
    per_fact = {
        "entropy": [_mean(list(map(ngram_entropy, group))) for group in texts],
        "consistency": [
            consistency(group, own, index) if group and own and index is not None else math.nan
            for group, own in zip(texts, known)
        ],
    }
    means = {name: _mean([value for value in each if not math.isnan(value)]) for name, each in per_fact.items()}
    return FluencyScores(**means, facts=len(prompts), per_fact=per_fact, texts=texts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
